"""A whole trial from a config and a seed: repeatable, its streams independent, every knob connected."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from scm.autodiff.policies import GradientPolicy
from scm.data import Split
from scm.guards.symmetry import make_symmetries, unchanged
from scm.models import make_model
from scm.seeding import generator
from scm.training.targets import lift_semantic_targets
from scm.training.trainer import SCMTrainer
from scm.trial import (
    decode_split,
    make_optimizer,
    make_scheduler,
    make_trainer,
    make_training_config,
    make_training_loss,
)
from scm.trial_config import KNOBS, TrialConfig


def make_split(rows: int, seed: int) -> Split:
    """Two inputs, a smooth target with a pole, and some rows of every status."""
    drawn = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 2, generator=drawn)
    y = 1 / (x[:, 0] + 0.3 * x[:, 1])
    codes = torch.randint(1, 7, (rows,), generator=drawn) * (torch.rand(rows, generator=drawn) < 0.3)
    return Split(x, lift_semantic_targets(y, codes))


TRAIN, VAL = make_split(90, 0), make_split(40, 1)
# A training in which every knob has something to act on.
BUSY: dict[str, Any] = {
    "max_epochs": 4,
    "batch_size": 20,
    "learning_rate": 0.02,
    "tau_train_min": 0.05,
    "tau_train_max": 0.4,
    "tau_infer": 0.01,
    "lambda_margin": 1.0,
    "lambda_rej": 1.0,
    "lambda_push_down": 0.5,
    "lambda_push_up": 0.5,
    "tau_bottom": 0.05,
    "tau_finite": 0.3,
    "coverage_temperature": 0.1,
    "hidden_width": 8,
}


# What the target is a function of, x_0 + 0.3 x_1, changes sign, or stays as it is.
ALONG = torch.tensor([0.3, -1.0])
MIRRORED = make_symmetries(
    {
        "mirror": (torch.neg, torch.neg, lambda outputs: (-outputs[0], *outputs[1:])),
        "slide": (lambda x: x + ALONG.to(x), lambda x: x - ALONG.to(x), unchanged),
    },
    TRAIN.inputs,
)


def trainer_of(seed: int = 0, **knobs: Any) -> SCMTrainer:
    """The trainer of one trial on the two splits."""
    config = TrialConfig.from_flat({**BUSY, **knobs})
    return make_trainer(config, seed, lambda: make_model(config, 2), TRAIN, VAL, symmetries=MIRRORED)


def weights_of(trainer: SCMTrainer) -> Tensor:
    """All weights in one row, in float64."""
    return torch.cat([item.detach().double().flatten() for item in trainer.model.parameters()])


def outcome(seed: int = 0, **knobs: Any) -> tuple[Tensor, list[dict[str, float]]]:
    """Train to the end; return weights, and validation with what companions say."""
    trainer = trainer_of(seed, **knobs)
    trainer.fit()
    said = [trainer.telemetry()] if trainer.telemetry() else []
    return weights_of(trainer), trainer.val_history + said


@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"optimizer": "sgd", "momentum": 0.9, "lr_schedule": "cosine"},
        {"mixed_precision": True, "gradient_accumulation_steps": 2},
        {"dtype": "float64", "head": "multihead", "gradient_policy": "project"},
        {"head": "angular", "fit": "implicit", "coverage_term": "hard"},
    ],
    ids=["plain", "sgd", "half", "double", "angular"],
)
def test_a_seed_decides_a_trial(knobs: dict[str, Any]) -> None:
    """The same seed gives the same bits, whatever the process drew before; another seed other weights."""
    torch.manual_seed(1)
    first = outcome(3, **knobs)
    torch.manual_seed(2)
    torch.rand(17)
    again = outcome(3, **knobs)
    other = outcome(4, **knobs)
    assert torch.equal(first[0], again[0])
    assert first[1] == again[1]
    assert not torch.equal(first[0], other[0])


def test_a_trial_leaves_the_global_stream_alone() -> None:
    """Two trials in one process do not see each other."""
    torch.manual_seed(9)
    expected = torch.rand(4)
    torch.manual_seed(9)
    outcome(1)
    assert torch.equal(torch.rand(4), expected)


def test_streams_are_independent() -> None:
    """Thresholds do not move the order or the weights' start; the model's size does not move the order."""

    def orders(trainer: SCMTrainer) -> list[list[float]]:
        return [inputs[:, 0].tolist() for inputs, _ in trainer.train_loader]

    plain = trainer_of()
    drawn = trainer_of(tau_train_max=0.05)
    larger = trainer_of(hidden_width=16)
    assert torch.equal(weights_of(plain), weights_of(drawn))
    for trainer in (plain, drawn, larger):
        next(trainer.epochs())
    assert orders(plain) == orders(drawn) == orders(larger)
    assert list(plain.last_thresholds) == list(larger.last_thresholds)
    assert list(plain.last_thresholds) != list(drawn.last_thresholds)
    start = trainer_of().train_loader.generator.get_state()
    assert torch.equal(start, generator(0, "order").get_state())


OTHER: dict[str, Any] = {
    "max_epochs": 5,
    "batch_size": 30,
    "optimizer": "sgd",
    "learning_rate": 0.01,
    "weight_decay": 0.1,
    "momentum": 0.5,
    "nesterov": True,
    "beta1": 0.5,
    "beta2": 0.9,
    "lr_schedule": "linear",
    "clip_norm": 1e-3,
    "gradient_accumulation_steps": 2,
    "mixed_precision": True,
    "amp_dtype": "float16",
    "dtype": "float64",
    "tau_train_min": 0.1,
    "tau_train_max": 0.5,
    "tau_infer": 0.04,
    "fit": "implicit_detached",
    "gamma": 1e-2,
    "lambda_margin": 0.3,
    "lambda_sign": 0.3,
    "lambda_rej": 3.0,
    "target_coverage": 0.99,
    "coverage_term": "hard",
    "coverage_temperature": 0.3,
    "lambda_push_down": 2.0,
    "lambda_push_up": 2.0,
    "tau_bottom": 0.1,
    "tau_finite": 0.6,
    "loss_ramp_epochs": 3,
    "gradient_policy": "project",
    "coverage_control": "unbiased",
    "control_rate": 1.0,
    "control_dead_band": 0.5,
    "control_momentum": 0.9,
    "control_warmup_steps": 7,
    "control_update_frequency": 3,
    "control_decay": 0.5,
    "control_lambda_min": 1.5,
    "control_lambda_max": 0.7,
    "hybrid_schedule": "linear",
    "hybrid_warmup_epochs": 2,
    "hybrid_transition_epochs": 3,
    "hybrid_delta_init": 0.6,
    "hybrid_delta_final": 0.7,
    "hybrid_adaptive_delta": False,
    "hybrid_bound": 0.1,
    "sampling": "near_pole",
    "sampling_strength": 3.0,
    "sampling_beta": 0.5,
    "sampling_memory": 1.0,
    "sampling_correction": True,
    "output_bound": 0.5,
    "output_bound_form": "hard",
    "lambda_saturation": 1.0,
    "saturation_threshold": 1.0,
    "lambda_spread": 1.0,
    "target_spread": 0.01,
    "cap_ratio": 0.25,
    "cap_currency": "gradient",
    "cap_floor": 0.8,
    "lambda_equivariance": 1.0,
    "equivariance_views": 1,
    "equivariance_distance": "l2",
    "gap_watch": True,
    "head": "angular",
    "hidden_width": 9,
    "hidden_depth": 1,
    "tuple_norm": "none",
    "q_anchor": "ones",
    "q_param": "softplus",
    "q_min": 0.2,
    "numerator_degree": 2,
    "denominator_degree": 3,
    "basis": "chebyshev",
    "lambda_pole": 1.0,
    "pole_threshold": 0.9,
    "lambda_tag": 1.0,
    "tag_labels": "model",
    "tag_adaptive": True,
}
HYBRID: dict[str, Any] = {
    "fit": "quotient",
    "hybrid_schedule": "exponential",
    "hybrid_transition_epochs": 2,
    "hybrid_delta_init": 0.9,
    "hybrid_delta_final": 0.5,
}
CONTROLLED: dict[str, Any] = {
    "coverage_control": "unbiased",
    "coverage_term": "ranked",
    "control_warmup_steps": 2,
}
SAMPLED: dict[str, Any] = {"sampling": "near_pole", "sampling_strength": 8.0}
NEEDS: dict[str, dict[str, Any]] = {
    **{name: HYBRID for name in KNOBS if name.startswith("hybrid_") and name != "hybrid_schedule"},
    "hybrid_schedule": {**HYBRID, "hybrid_schedule": "none"},
    **{name: CONTROLLED for name in KNOBS if name.startswith("control_")},
    "coverage_control": {**CONTROLLED, "coverage_control": "none"},
    **{name: SAMPLED for name in KNOBS if name.startswith("sampling_")},
    "nesterov": {"optimizer": "sgd", "momentum": 0.9},
    "momentum": {"optimizer": "sgd"},
    "gamma": {"fit": "implicit"},
    "q_anchor": {"head": "multihead"},
    "q_param": {"head": "multihead"},
    "q_min": {"head": "multihead", "q_param": "softplus", "q_anchor": "none"},
    "numerator_degree": {"head": "multihead"},
    "denominator_degree": {"head": "multihead"},
    "basis": {"head": "multihead"},
    "pole_threshold": {"lambda_pole": 1.0},
    "tag_labels": {"lambda_tag": 1.0},
    # Above a coverage of 0.98 alone: every answer of these is one.
    "tag_adaptive": {"lambda_tag": 1.0, "tau_train_min": 1e-6, "tau_train_max": 1e-6, "tau_infer": 1e-6},
    "output_bound_form": {"output_bound": 0.5},
    "saturation_threshold": {"lambda_saturation": 1.0},
    "target_spread": {"lambda_spread": 1.0},
    "cap_currency": {"cap_ratio": 0.1},
    "cap_floor": {"cap_ratio": 0.1},
    "equivariance_views": {"lambda_equivariance": 1.0},
    "equivariance_distance": {"lambda_equivariance": 1.0},
}
# These act when a training ends, judge it, or meet what is not finite; amp_dtype on CUDA.
JUDGES = {
    "finite_action",
    "finite_streak",
    "coverage_threshold",
    "coverage_patience",
    "nonfinite_budget",
    "restore_best",
    "amp_dtype",
}


@pytest.mark.parametrize("name", sorted(set(KNOBS) - JUDGES))
def test_every_knob_changes_something(name: str) -> None:
    """Another value of a knob gives other weights, or another validation."""
    needs = NEEDS.get(name, {})
    before = outcome(**needs)
    after = outcome(**{**needs, name: OTHER[name]})
    same = before[0].shape == after[0].shape and torch.equal(before[0], after[0])
    assert not (same and before[1] == after[1])


@pytest.mark.parametrize(
    "name",
    [name for name, knob in KNOBS.items() if "head" in knob.active_when or "q_param" in knob.active_when],
)
def test_a_knob_of_another_head_changes_nothing(name: str) -> None:
    """Where a knob of the heads is said to be inactive, the weights are the same to the bit."""
    choices = {other: KNOBS[other].choices for other in ("head", "q_param")}
    for head, q_param in itertools.product(choices["head"], choices["q_param"]):
        base = {"head": head, "q_param": q_param}
        if KNOBS[name].is_active({**TrialConfig().to_flat(), **base}) or name in base:
            continue
        before, after = outcome(**base), outcome(**{**base, name: OTHER[name]})
        assert torch.equal(before[0], after[0]), base
        assert before[1] == after[1], base


def test_knobs_that_judge_a_training_are_handed_on() -> None:
    """What ends or crowns a training reaches the trainer's config."""
    knobs = {"coverage_threshold": 0.5, "coverage_patience": 2, "nonfinite_budget": 7, "restore_best": True}
    config = trainer_of(**knobs).config
    assert {name: getattr(config, name) for name in knobs} == knobs
    for action in KNOBS["finite_action"].choices:
        config = trainer_of(finite_action=action, finite_streak=5).config
        assert config.finite_action == action
        assert config.finite_streak == (None if action == "skip_step" else 5)
    assert trainer_of(mixed_precision=True, amp_dtype="float16").config.amp_dtype is torch.float16


@pytest.mark.parametrize("name", KNOBS["optimizer"].choices)
def test_optimizers_take_their_knobs(name: str) -> None:
    """Every optimizer of the config is made, with the rates that the config names."""
    config = TrialConfig(
        optimizer=name, learning_rate=0.3, weight_decay=0.2, momentum=0.4, beta1=0.5, beta2=0.6
    )
    (group,) = make_optimizer(config, [torch.nn.Parameter(torch.zeros(2))]).param_groups
    assert group["lr"] == 0.3
    assert group["weight_decay"] == 0.2
    assert group.get("betas", (0.5, 0.6)) == (0.5, 0.6)
    assert group.get("momentum", 0.4) == 0.4


@pytest.mark.parametrize(("schedule", "half"), [("constant", 1.0), ("cosine", 0.5), ("linear", 0.5)])
def test_schedules_fall_towards_zero(schedule: str, half: float) -> None:
    """At half of the epochs half of the rate, at their end none; a constant rate stays."""
    config = TrialConfig(lr_schedule=schedule, learning_rate=1.0, max_epochs=10)
    optimizer = make_optimizer(config, [torch.nn.Parameter(torch.zeros(2))])
    scheduler = make_scheduler(config, optimizer)
    rates = []
    for _ in range(10):
        rates.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    assert rates[0] == 1.0
    assert rates[5] == pytest.approx(half)
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(
        2 * half - 1 if half < 1 else 1.0, abs=1e-12
    )


def test_constraints_ramp_up() -> None:
    """At first the fit alone, at the end of the ramp the full weights."""
    trainer = trainer_of(loss_ramp_epochs=2, lambda_sign=0.0)
    weights = [trainer._facts(epoch)["loss_weights"] for epoch in range(4)]
    assert set(weights[0].values()) == {0.0}
    assert weights[1] == {"margin": 0.5, "rejection": 0.5, "push_down": 0.25, "push_up": 0.25}
    assert weights[2] == weights[3] == {"margin": 1.0, "rejection": 1.0, "push_down": 0.5, "push_up": 0.5}
    loss, split = make_training_loss(TrialConfig.from_flat(BUSY)), VAL
    P, Q = torch.ones(40), torch.full((40,), 0.1)
    lifted = (split.targets.Y_n, split.targets.Y_d)
    known = {"tau": 0.2, "semantic_targets": split.targets}
    assert loss((P, Q), lifted, loss_weights=weights[0], **known) < loss((P, Q), lifted, **known)


def test_decoding_is_strict_and_in_the_order_of_the_rows() -> None:
    """In pieces as at once: P/Q where |Q| >= tau_infer, NaN elsewhere; the mode of the model is kept."""
    trainer = trainer_of()
    trainer.fit()
    trainer.model.train()
    tau = trainer.model(VAL.inputs)[1].abs().median().item()
    whole = decode_split(trainer.model, VAL, tau_infer=tau)
    pieces = decode_split(trainer.model, VAL, tau_infer=tau, batch_size=7)
    P, Q = trainer.model(VAL.inputs)
    assert torch.equal(whole.bottom, Q.abs() < tau)
    assert 0 < int(whole.bottom.sum()) < 40
    torch.testing.assert_close(whole.decoded[~whole.bottom], (P / Q).detach()[~whole.bottom])
    assert bool(whole.decoded[whole.bottom].isnan().all())
    for one, other in zip(whole, pieces, strict=True):
        torch.testing.assert_close(one, other, equal_nan=True)
    assert trainer.model.training
    assert not whole.decoded.is_inference()
    with pytest.raises(ValueError, match="at least one row"):
        decode_split(trainer.model, Split(torch.zeros(0, 2), VAL.targets.index(slice(0, 0))), tau_infer=tau)


def test_a_device_that_is_absent_is_an_error() -> None:
    """Asking for a GPU never quietly gives the CPU."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    config = TrialConfig.from_flat(BUSY)
    with pytest.raises((RuntimeError, AssertionError), match="(?i)cuda"):
        make_trainer(config, 0, lambda: make_model(config, 2), TRAIN, VAL, device="cuda")


def test_a_config_makes_the_training_config_that_its_trainer_has() -> None:
    """What is made of a config by hand tells a trainer the same; restore_best asks for validation data."""
    config = TrialConfig.from_flat({"max_epochs": 3, "clip_norm": 2.0, "gradient_policy": "project"})
    made = make_training_config(config, seed=1)
    assert (made.max_epochs, made.clip_norm, made.seed) == (3, 2.0, 1)
    assert made.gradient_policy is GradientPolicy.PROJECT
    assert made.identity()["scheduler_cadence"] == "per_epoch"
    with pytest.raises(ValueError, match="restore_best needs a val_loader"):
        make_training_config(TrialConfig.from_flat({"restore_best": True}))
