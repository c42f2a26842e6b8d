"""No knob of a space changes nothing: each value gives another training, or another held-out answer."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from scm.data import Split
from scm.guards.symmetry import make_symmetries, unchanged
from scm.models import make_model
from scm.training.targets import STATUS_CODES, lift_semantic_targets
from scm.trial import decode_split, make_trainer
from scm.trial_config import KNOBS, TrialConfig
from search_spaces.named import SPACES
from search_spaces.space import Space

KNOBS_IN_SPACES = [
    (name, knob) for name, space in SPACES.items() if name != "default" for knob in space.domains
]

# Every loss term weighs, and thresholds are so high that some outputs are bottoms in training as in decoding.
BASE: dict[str, Any] = {
    "max_epochs": 3,
    "dtype": "float64",
    "hidden_width": 8,
    "hidden_depth": 1,
    "learning_rate": 1e-2,
    "nonfinite_budget": 0,
    "tau_infer": 0.1,
    "tau_train_min": 0.2,
    "tau_train_max": 0.4,
    "lambda_margin": 1.0,
    "lambda_sign": 1.0,
    "lambda_rej": 1.0,
    "coverage_temperature": 0.1,
    "lambda_push_down": 1.0,
    "lambda_push_up": 1.0,
    "tau_bottom": 0.05,
    "tau_finite": 0.4,
}
# What a knob needs beside itself: an order to keep, or gradients large enough to be clipped or clamped.
BESIDE: dict[str, dict[str, Any]] = {
    "tau_train_min": {"tau_infer": 1e-4},
    "tau_train_max": {"tau_infer": 1e-4, "tau_train_min": 1e-3},
    "tau_finite": {"tau_bottom": 1e-3},
    "clip_norm": {"fit": "implicit_detached", "tuple_norm": "none", "optimizer": "sgd"},
    "nesterov": {"momentum": 0.9},
    "gradient_policy": {
        "fit": "implicit_detached",
        "tuple_norm": "none",
        "optimizer": "sgd",
        "batch_size": 16,
    },
    "optimizer": {"weight_decay": 1e-2},  # adam and adamw differ in how they decay
    **{
        knob: {"hybrid_delta_init": 0.3, "hybrid_delta_final": 0.02, "hybrid_transition_epochs": 3}
        for knob in SPACES["hybrid"].domains
    },
    "hybrid_warmup_epochs": {"max_epochs": 11, "hybrid_delta_init": 0.3},
    "hybrid_delta_final": {"hybrid_delta_init": 0.3, "hybrid_transition_epochs": 1},
    **{knob: {"sampling_strength": 8.0} for knob in SPACES["sampling"].domains},
    **{
        knob: {"coverage_control": "unbiased", "coverage_term": "ranked", "control_warmup_steps": 0}
        for knob in SPACES["controller"].domains
        if knob.startswith("control_")
    },
    "coverage_control": {"coverage_term": "ranked", "control_warmup_steps": 0},
    "control_dead_band": {
        "coverage_control": "unbiased",
        "control_warmup_steps": 0,
        "target_coverage": 0.51,  # of 32 rows, 16 are 0.01 away from it, and 15 are 0.04
        "max_epochs": 12,
    },
    "control_warmup_steps": {"coverage_control": "unbiased", "batch_size": 8, "max_epochs": 25},
    "control_lambda_min": {
        "coverage_control": "unbiased",
        "control_warmup_steps": 0,
        "control_rate": 1e-6,
        "lambda_rej": 1e-4,
    },
    "control_lambda_max": {"coverage_control": "unbiased", "control_warmup_steps": 0, "lambda_rej": 20.0},
    "saturation_threshold": {"lambda_saturation": 1.0, "coverage_temperature": 1e-2},
    "target_spread": {"lambda_spread": 1.0},
    "cap_floor": {"cap_ratio": 0.1},
    "equivariance_views": {"lambda_equivariance": 1.0},
    "equivariance_distance": {"lambda_equivariance": 1.0},
    "pole_threshold": {"lambda_pole": 1.0},
    # Over a low threshold every answer of a small batch may have a value: what the weight adapts to.
    "tag_labels": {"lambda_tag": 1.0},
    "tag_adaptive": {
        "lambda_tag": 1.0,
        "batch_size": 8,
        "tau_infer": 1e-4,
        "tau_train_min": 1e-3,
        "tau_train_max": 1e-3,
    },
}


def problem(seed: int, rows: int = 160) -> Split:
    """y = 20 / x with bottoms of every semantic kind around the pole."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.rand((rows, 2), generator=generator, dtype=torch.float64) * 2 - 1
    x = inputs[:, 0]
    codes = torch.full((rows,), STATUS_CODES["finite"])
    codes[(x > 0) & (x < 0.2)] = STATUS_CODES["censored_above"]
    codes[(x < 0) & (x > -0.2)] = STATUS_CODES["censored_below"]
    codes[(x.abs() > 0.2) & (x.abs() < 0.25)] = STATUS_CODES["bottom"]
    return Split(inputs, lift_semantic_targets(20 / x, codes))


TRAIN, HELD_OUT = problem(0), problem(1)


def turned(*signs: float) -> Callable[[Tensor], Tensor]:
    """Change the signs of the inputs."""
    return lambda inputs: inputs * torch.tensor(signs, dtype=inputs.dtype)


def odd(outputs: Any) -> Any:
    """Change the sign of the answers."""
    return (-outputs[0], *outputs[1:])


# 20 / x changes sign with its first input, and does not see the second.
MIRRORED = make_symmetries(
    {
        "first": (turned(-1, 1), turned(-1, 1), odd),
        "second": (turned(1, -1), turned(1, -1), unchanged),
        "both": (turned(-1, -1), turned(-1, -1), odd),
    },
    TRAIN.inputs,
)


def outcome(config: dict[str, Any]) -> tuple[list[Tensor], Tensor, Tensor]:
    """The trained weights, the held-out bottoms and the held-out answers, 0 at bottoms."""
    trial = TrialConfig.from_flat(config)
    trainer = make_trainer(trial, 0, lambda: make_model(trial, 2), TRAIN, None, symmetries=MIRRORED)
    trainer.fit()
    assert trainer.status == "completed", trainer.stop_reason
    decoded = decode_split(trainer.model, HELD_OUT, tau_infer=trial.tau_infer)
    weights = [weight.detach() for weight in trainer.model.parameters()]
    return weights, decoded.bottom, decoded.decoded.nan_to_num(0.0)


def differs(left: tuple[list[Tensor], Tensor, Tensor], right: tuple[list[Tensor], Tensor, Tensor]) -> bool:
    """Whether weights differ in shape or beyond rounding, or a held-out row is a bottom in one alone."""
    if [weight.shape for weight in left[0]] != [weight.shape for weight in right[0]]:
        return True
    moved = max(float((a - b).abs().max()) for a, b in zip(left[0], right[0], strict=True))
    return moved > 1e-10 or not torch.equal(left[1], right[1])


def settings(space: Space, knob: str) -> dict[str, Any]:
    """A config in which the knob is active: every condition on the way to it holds."""
    config = dict(BASE)
    when = space.domains[knob].when
    for parent in when:
        config |= settings(space, parent)
    return config | {parent: values[0] for parent, values in when.items()} | BESIDE.get(knob, {})


@pytest.mark.parametrize("name, knob", KNOBS_IN_SPACES, ids=[knob for _, knob in KNOBS_IN_SPACES])
def test_every_value_of_a_knob_trains_otherwise(name, knob):
    """Both ends and the middle of a range, and every option of a choice, differ from one another."""
    config = settings(SPACES[name], knob)
    assert KNOBS[knob].is_active(TrialConfig.from_flat(config).to_flat())
    low, high = -torch.inf, torch.inf
    for order in SPACES[name].constraints:
        low = config[order.smaller] if order.larger == knob else low
        high = config[order.larger] if order.smaller == knob else high
    values = SPACES[name].domains[knob].spread(3, low, high)
    results = {value: outcome({**config, knob: value}) for value in values}
    assert len(results) >= 2
    for left, right in itertools.combinations(results, 2):
        assert differs(results[left], results[right]), f"{knob}={left!r} and {knob}={right!r} train alike"


@pytest.mark.parametrize("draw", range(40))
def test_every_draw_trains_a_model_that_can_say_bottom(draw):
    """No config of the default space is refused by the trainer or diverges on this problem at once."""
    space = SPACES["default"].with_fixed({"max_epochs": 1})
    generator = torch.Generator().manual_seed(draw)
    config = space.sample(
        torch.rand(len(space.dimensions), generator=generator, dtype=torch.float64).tolist()
    )
    weights, bottom, answers = outcome(config)
    assert all(bool(weight.isfinite().all()) for weight in weights)
    assert len(bottom) == len(answers) == len(HELD_OUT)
    assert not bool(answers[bottom].any())


def test_the_problem_holds_what_knobs_act_on():
    """Rows of each kind are there, and the untouched base config both answers and abstains."""
    assert bool(TRAIN.targets.mask_finite.any())
    assert set(TRAIN.targets.orientation_label[TRAIN.targets.mask_bottom].tolist()) == {-1, 0, 1}
    _, bottom, _ = outcome(BASE)
    assert 0 < int(bottom.sum()) < len(HELD_OUT)


def test_the_policy_that_is_not_in_the_space_trains_as_none():
    """`pass` lets every gradient through as no policy does: drawing both would train one config twice."""
    assert "pass" not in SPACES["gradient_policy"].domains["gradient_policy"].to_plain()["options"]
    assert not differs(outcome(BASE), outcome({**BASE, "gradient_policy": "pass"}))
