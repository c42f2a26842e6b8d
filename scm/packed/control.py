"""Coverage control of the trials of a pack: the rules of `scm.training.adaptive_loss`, with a state a trial.

What `CoverageController` does around a micro-batch, on tensors: the rules themselves, and what counts as an
accepted answer, are theirs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from scm.guards.gates import RAW_OUTPUTS
from scm.losses.rowwise import bool_mask
from scm.training.adaptive_loss import AdaptiveLossConfig
from scm.training.companion import Moment
from scm.training.control_rules import RULES, ControlSettings, ControlState
from scm.training.records import split_outputs
from scm.trial_config import TrialConfig

CONTROL_SETTINGS: tuple[str, ...] = (*ControlSettings._fields, "initial")
"""What a controller is told, one number a trial: the settings of its rule, and where it begins."""

_STATE = len(ControlState._fields)
STATE_SIZE = _STATE + 2
"""Numbers that a controller remembers: its rule's state, and the epoch's accepted and counted answers."""


def control_settings(config: TrialConfig) -> tuple[float, ...]:
    """Return a trial's numbers in the order of `CONTROL_SETTINGS`."""
    adaptive = AdaptiveLossConfig(
        rule=config.coverage_control,
        initial_lambda=config.lambda_rej,
        target_coverage=config.target_coverage,
        learning_rate=config.control_rate,
        lambda_min=config.control_lambda_min,
        lambda_rej_min=config.control_lambda_min,
        lambda_max=config.control_lambda_max,
        momentum=config.control_momentum,
        warmup_steps=config.control_warmup_steps,
        update_frequency=config.control_update_frequency,
        exponential_decay=config.control_decay,
        dead_band=config.control_dead_band,
    )
    settings = (float(value) for value in adaptive.settings())
    return (*settings, float(config.lambda_rej))


def first_state(config: TrialConfig) -> Tensor:
    """Return a controller's state before any batch, (STATE_SIZE,) float64."""
    return torch.tensor([*ControlState(float(config.lambda_rej)), 0.0, 0.0], dtype=torch.float64)


def begin_epoch(states: Tensor) -> Tensor:
    """Return states (trials, STATE_SIZE) that count an epoch's answers anew."""
    begun = states.clone()
    begun[:, _STATE:] = 0.0
    return begun


def control_weight(held: Mapping[str, Tensor], config: Any, *, ramped: bool) -> Tensor:
    """Return what the coverage term of one trial weighs, in the dtype of its thresholds."""
    return (held["control.state"][0] * _share(held, config, ramped=ramped)).to(held["tau"].dtype)


def _share(held: Mapping[str, Tensor], config: Any, *, ramped: bool) -> Tensor:
    """Return the ramp's weight over the initial one: the share of the multiplier that holds now."""
    initial = held["control.initial"]
    if not ramped:
        return torch.ones_like(initial)
    return torch.where(initial > 0, config.lambda_rej / torch.where(initial > 0, initial, 1.0), 1.0)


def controlled(moment: Moment, held: Mapping[str, Tensor], rule: str, config: Any) -> Tensor:
    """Return the state of one trial's controller after the micro-batch's answers."""
    P, Q = split_outputs(moment.found.get(RAW_OUTPUTS, moment.outputs))
    assert P is not None
    assert Q is not None
    accepted = (P / Q).isfinite() & Q.isfinite() & (Q.abs() >= moment.facts["tau"])
    assert moment.fed.semantic is not None
    trained = bool_mask("mask_trained", moment.fed.semantic.mask_trained, accepted)
    counted = trained.sum().to(torch.float64)
    finite = (accepted & trained).sum().to(torch.float64)
    settings = ControlSettings(*(held[f"control.{name}"] for name in ControlSettings._fields))
    numbers = held["control.state"]
    before = ControlState(*(numbers[place] for place in range(_STATE)))
    after = RULES[rule].step(before, finite, counted, settings)
    told = torch.stack([torch.as_tensor(item).to(torch.float64) for item in after])
    # Where the term weighs nothing, nothing is learned.
    share = _share(held, config, ramped=moment.facts["loss_weights"] is not None)
    kept = torch.where(share != 0, told, numbers[:_STATE])
    return torch.cat([kept, torch.stack([numbers[_STATE] + finite, numbers[_STATE + 1] + counted])])


def control_telemetry(state: list[float]) -> dict[str, float]:
    """Return what a controller in this state says."""
    finite, counted = state[_STATE:]
    return {"lambda_rej": state[0], "control_coverage": finite / counted if counted else math.nan}
