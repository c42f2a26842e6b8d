"""The rules by which a multiplier follows the coverage: pure functions of numbers, of one controller or many.

Each takes a state, what was counted of a batch, and settings, and gives the next state; a training alone and
a pack call the same ones. Who counts, and what the multiplier weighs, is decided in `adaptive_loss`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

Number = float | Tensor
"""A plain number, or a tensor in float64: 0-d, or one entry for each of many controllers."""


class ControlSettings(NamedTuple):
    """The settings of one controller, or of many: every field a number or a tensor of one entry each.

    floor: the higher one of both floors. cap: inf for none. Steps are counted in batches.
    """

    target: Number
    rate: Number
    floor: Number
    cap: Number
    momentum: Number
    warmup_steps: Number
    update_frequency: Number
    decay: Number
    dead_band: Number
    rate_up: Number
    rate_down: Number
    cumulative_steps: Number


class ControlState(NamedTuple):
    """What a controller knows after some batches; see `Number`.

    finite and counted: answers with a value and all answers, "reference": so far, "unbiased": since the last
    update. updates: how often the multiplier was due. last_update: its last change, before the bounds.
    """

    multiplier: Number
    velocity: Number = 0.0
    step: Number = 0.0
    finite: Number = 0.0
    counted: Number = 0.0
    last_update: Number = 0.0
    updates: Number = 0.0


def reference_step(
    state: ControlState,
    finite: Number,
    counted: Number,
    settings: ControlSettings,
    heard: bool | Tensor = True,
) -> ControlState:
    """Return the state after a batch of `counted` answers, `finite` of them with a value; the recorded rule.

    After warm-up, at every update_frequency-th batch, gap is the target minus the coverage of the batch, or
    of all answers so far in the first cumulative_steps batches. Where |gap| < dead_band nothing moves, the
    velocity included. Else u = rate * decay^(batches since warm-up) * gap, v = momentum * v + u, and the
    multiplier changes by v (u without momentum), times rate_down where the gap is below 0, else rate_up. A
    batch without answers has coverage 1. One that is not `heard` passes, and tells nothing.
    """
    step = state.step + 1.0
    since = step - settings.warmup_steps
    seen = state.finite + pick(heard, finite, 0.0)
    of = state.counted + pick(heard, counted, 0.0)
    after = state._replace(step=step, finite=seen, counted=of)
    due = (since > 0) & (since % settings.update_frequency == 0) & heard
    if not isinstance(due, Tensor) and not due:
        return after
    early = step <= settings.cumulative_steps
    gap = settings.target - pick(early, share_of(seen, of), share_of(finite, counted))
    acts = (_size(gap) >= settings.dead_band) & due
    update = settings.rate * settings.decay**since * gap
    velocity = settings.momentum * state.velocity + update
    with_momentum = settings.momentum > 0
    change = pick(with_momentum, velocity, update)
    change = change * pick(gap < 0, settings.rate_down, settings.rate_up)
    moved = _bounded(state.multiplier + change, settings)
    return after._replace(
        multiplier=pick(acts, moved, state.multiplier),
        velocity=pick(acts & with_momentum, velocity, state.velocity),
        last_update=pick(due, pick(acts, change, 0.0), state.last_update),
        updates=pick(due, state.updates + 1.0, state.updates),
    )


def unbiased_step(
    state: ControlState,
    finite: Number,
    counted: Number,
    settings: ControlSettings,
    heard: bool | Tensor = True,
) -> ControlState:
    """Return the state after a batch, by ascent on the multiplier; see `reference_step` for the arguments.

    After warm-up, at every update_frequency-th batch, gap is the target minus the coverage of all answers
    since the last update, 0 where its size is below dead_band; v = momentum * v + rate * decay^(batches since
    warm-up) * gap, and the multiplier changes by v. Steps up and down are alike, so that noise around the
    target leaves the multiplier where it is on average. At a bound v becomes 0: what could not be done is
    not made up for later. Without an answer since the last update nothing moves.
    """
    step = state.step + 1.0
    since = step - settings.warmup_steps
    takes = (since > 0) & heard
    seen = state.finite + pick(takes, finite, 0.0)
    of = state.counted + pick(takes, counted, 0.0)
    after = state._replace(step=step, finite=seen, counted=of)
    on_time = (since > 0) & (since % settings.update_frequency == 0)
    if not isinstance(on_time, Tensor) and not on_time:
        return after
    due = on_time & (of > 0)
    gap = settings.target - share_of(seen, of)
    gap = pick(_size(gap) < settings.dead_band, 0.0, gap)
    velocity = settings.momentum * state.velocity + settings.rate * settings.decay**since * gap
    change = velocity * settings.rate_up
    free = state.multiplier + change
    moved = _bounded(free, settings)
    return after._replace(
        multiplier=pick(due, moved, state.multiplier),
        velocity=pick(due, pick(moved == free, velocity, 0.0), state.velocity),
        finite=pick(due, 0.0, seen),
        counted=pick(due, 0.0, of),
        last_update=pick(due, change, state.last_update),
        updates=pick(due, state.updates + 1.0, state.updates),
    )


class Rule(NamedTuple):
    """A rule's update, and its own values of the settings that are None by default."""

    step: Callable[..., ControlState]
    defaults: Mapping[str, float | int]


RULES: Mapping[str, Rule] = {
    "reference": Rule(
        reference_step,
        {
            "lambda_min": 0.1,
            "lambda_rej_min": 0.1,
            "dead_band": 0.02,
            "rate_up": 0.5,
            "rate_down": 2.0,
            "cumulative_steps": 2,
        },
    ),
    "unbiased": Rule(
        unbiased_step,
        {
            "lambda_min": 0.0,
            "lambda_rej_min": 0.0,
            "dead_band": 0.0,
            "rate_up": 1.0,
            "rate_down": 1.0,
            "cumulative_steps": 0,
        },
    ),
}


def share_of(finite: Number, counted: Number) -> Number:
    """Return the share of answers with a value; 1 of no answers."""
    none = counted == 0
    return pick(none, 1.0, finite / (counted + none))


def _size(gap: Number) -> Number:
    return gap.abs() if isinstance(gap, Tensor) else abs(gap)


def _bounded(multiplier: Number, settings: ControlSettings) -> Number:
    raised = pick(multiplier < settings.floor, settings.floor, multiplier)
    return pick(raised > settings.cap, settings.cap, raised)


def pick(condition: bool | Tensor, one: Number, other: Number) -> Number:
    """Return one number where the condition holds, and the other where it does not."""
    if not isinstance(condition, Tensor):
        return one if condition else other
    if not isinstance(one, Tensor) and not isinstance(other, Tensor):
        # Of two plain numbers torch.where makes a float32.
        one = torch.full((), one, dtype=torch.float64, device=condition.device)
    return torch.where(condition, one, other)
