"""Packs: every trial comes to what it comes to alone, whatever else is in its pack."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from scm.data import Split
from scm.models import make_model
from scm.packed import NotPackable, PackedTrainer, PackTrial
from scm.packed.toolchain import has_compiler
from scm.packed.traced import Programs
from scm.training.checkpoint import CheckpointError, write_checkpoint
from scm.training.records import EpochReport
from scm.training.targets import lift_semantic_targets
from scm.trial import Decoded, decode_split, make_trainer, make_training_loss
from scm.trial_config import TrialConfig

PROGRAMS: Programs = {}  # what one test traces, the next need not
SMALL: dict[str, Any] = {"dtype": "float64", "max_epochs": 3, "hidden_width": 8, "learning_rate": 0.01}
TIGHT = 1e-9


def split(rows: int, seed: int, *, bad_row: int | None = None) -> Split:
    """Rows of five inputs: most with a number, some censored, some missing, some a bottom of no direction."""
    source = torch.Generator().manual_seed(seed)
    inputs = torch.randn(rows, 5, generator=source, dtype=torch.float64)
    values = inputs.sum(1) + 0.3 * torch.randn(rows, generator=source, dtype=torch.float64)
    statuses = torch.tensor([0, 0, 0, 3, 0, 2, 0, 5, 1, 0]).repeat(-(-rows // 10))[:rows]
    if bad_row is not None:
        inputs[bad_row, 0] = math.nan
    return Split(inputs, lift_semantic_targets(values, statuses))


SHARED = {"train": split(64, 0), "val": split(24, 1), "test": split(20, 2)}


def shared(seed: int) -> Mapping[str, Split]:
    return SHARED


def own(seed: int) -> Mapping[str, Split]:
    """Other data for every seed, of the same shapes."""
    return {"train": split(64, 10 + seed), "val": split(24, 20 + seed), "test": split(20, 30 + seed)}


def build(config: TrialConfig) -> nn.Module:
    return make_model(config, 5)


class Outcome(NamedTuple):
    """All that a trial comes to."""

    weights: dict[str, Tensor]
    reports: list[EpochReport]
    test: Decoded
    telemetry: dict[str, float]
    stop_reason: str
    nan_origin: str


def alone(
    config: TrialConfig, seed: int, splits_of: Callable[[int], Mapping[str, Split]] = shared, **options: Any
) -> Outcome:
    """Train one trial by `make_trainer`."""
    data = splits_of(seed)
    trainer = make_trainer(config, seed, lambda: build(config), data["train"], data.get("val"), **options)
    reports = list(trainer.epochs())
    weights = {name: item.clone() for name, item in trainer.model.state_dict().items()}
    test = decode_split(trainer.model, data["test"], tau_infer=config.tau_infer)
    return Outcome(weights, reports, test, trainer.telemetry(), trainer.stop_reason, trainer.nan_origin)


def trials(configs: Sequence[TrialConfig], seeds: Sequence[int] | None = None) -> list[PackTrial]:
    seeds = [place % 3 for place in range(len(configs))] if seeds is None else seeds
    pairs = zip(configs, seeds, strict=True)
    return [PackTrial(config, seed, f"t{place}") for place, (config, seed) in enumerate(pairs)]


def pack_of(
    members: Sequence[PackTrial], splits_of: Callable[[int], Mapping[str, Split]] = shared, **options: Any
) -> PackedTrainer:
    return PackedTrainer(members, build, splits_of, programs=PROGRAMS, **options)


def outcomes(pack: PackedTrainer, after_epoch: Callable[[PackedTrainer, int], None] | None = None) -> Any:
    """Train a pack to its end; what every trial came to, by key."""
    reports: dict[str, list[EpochReport]] = {}
    ended: dict[str, Outcome] = {}
    for count, epoch in enumerate(pack.epochs(), start=1):
        for key, report in epoch.reports.items():
            reports.setdefault(key, []).append(report)
        if after_epoch is not None:
            after_epoch(pack, count)
        test = pack.decode("test")
        telemetry = dict(zip(pack.keys, pack.telemetry(), strict=True))
        for key in pack.keys:
            lane = pack.lane(key)
            if lane.status != "running":
                weights = dict(pack.model_of(key).state_dict())
                told = telemetry[key], lane.stop_reason, lane.nan_origin
                ended[key] = Outcome(weights, reports[key], test.of(key), *told)
    return ended


def assert_alike(found: Outcome, right: Outcome, tolerance: float = TIGHT) -> None:
    """Weights within 1e-9 of the largest of their tensor, everything that is said with them."""
    for name, item in right.weights.items():
        scale = item.abs().max().clamp(min=1e-300) if item.numel() else 1.0
        assert float((found.weights[name] - item).abs().max() / scale) <= tolerance, name
    assert len(found.reports) == len(right.reports)
    for one, other in zip(found.reports, right.reports, strict=True):
        assert (one.epoch, one.status, one.nan_counts) == (other.epoch, other.status, other.nan_counts)
        assert one.train == pytest.approx(other.train, rel=1e-8, abs=1e-12, nan_ok=True)
        assert (one.val is None) == (other.val is None)
        if one.val is not None:
            assert one.val == pytest.approx(other.val, rel=1e-8, abs=1e-12, nan_ok=True)
    for one_column, other_column in zip(found.test, right.test, strict=True):
        torch.testing.assert_close(one_column, other_column, rtol=1e-8, atol=1e-10, equal_nan=True)
    assert found.telemetry == pytest.approx(right.telemetry, rel=1e-7, abs=1e-10, nan_ok=True)
    assert found.stop_reason == right.stop_reason
    assert found.nan_origin == right.nan_origin


def check_pack(
    configs: Sequence[TrialConfig],
    seeds: Sequence[int] | None = None,
    splits_of: Callable[[int], Mapping[str, Split]] = shared,
    **options: Any,
) -> None:
    members = trials(configs, seeds)
    found = outcomes(pack_of(members, splits_of, **options))
    assert found.keys() == {member.key for member in members}
    for member in members:
        assert_alike(found[member.key], alone(member.config, member.seed, splits_of))


_TAUS = {"tau_train_min": 0.1, "tau_train_max": 0.3}
CASES: dict[str, list[dict[str, Any]]] = {
    "numbers of their own": [{}, {"learning_rate": 3e-3, "lambda_margin": 0.5, "gamma": 1e-6, **_TAUS}],
    "optimizers": [
        {"optimizer": kind, "weight_decay": decay, **more}
        for decay in (0.0, 0.01)
        for kind, more in (
            ("adam", {"beta1": 0.8}),
            ("adamw", {"beta2": 0.9}),
            ("sgd", {}),
            ("sgd", {"momentum": 0.9, "nesterov": True}),
            ("rmsprop", {}),
            ("rmsprop", {"momentum": 0.5}),
        )
    ],
    "schedules": [
        {"lr_schedule": kind, "max_epochs": epochs}
        for kind in ("constant", "cosine", "linear")
        for epochs in (2, 4)
    ],
    "policies": [{"gradient_policy": name, **_TAUS} for name in (None, "clamp", "project", "reject", "pass")],
    "a term that reads Q alone, behind a policy": [
        {"lambda_margin": 0.0, "lambda_sign": 0.0, **own}
        for own in ({"lambda_push_up": 0.3}, {"gradient_policy": "clamp"}, {"gradient_policy": "reject"})
    ],
    "clipped": [{"clip_norm": 0.02}, {}, {"clip_norm": 0.5, "optimizer": "sgd"}],
    "curricula": [
        {"loss_ramp_epochs": 3},
        {},
        {"loss_ramp_epochs": 2, "lambda_push_up": 0.3, "lambda_push_down": 0.2, "lambda_sign": 0.0},
    ],
    "implicit": [{"fit": "implicit"}, {"fit": "implicit", "gamma": 1e-3}],
    "implicit_detached": [{"fit": "implicit_detached"}, {"fit": "implicit_detached", "lambda_rej": 0.0}],
    "quotient": [{"fit": "quotient", **_TAUS}, {"fit": "quotient", "lambda_rej": 0.2, "loss_ramp_epochs": 2}],
    "hard coverage": [
        {"coverage_term": "hard", "lambda_rej": 0.3, **_TAUS},
        {"coverage_term": "hard", "gradient_policy": "reject"},
    ],
    "ranked coverage": [{"coverage_term": "ranked", "lambda_rej": 0.3, **_TAUS}, {"coverage_term": "ranked"}],
    "reference control": [
        {"coverage_control": "reference", "control_warmup_steps": 2, "lambda_rej": 0.5, **_TAUS},
        {"coverage_control": "reference", "control_warmup_steps": 0, "loss_ramp_epochs": 2},
        {"coverage_control": "reference", "control_momentum": 0.5, "lambda_rej": 0.0, **_TAUS},
    ],
    "unbiased control": [
        {"coverage_control": "unbiased", "control_warmup_steps": 2, "control_update_frequency": 2, **_TAUS},
        {"coverage_control": "unbiased", "control_warmup_steps": 0, "control_momentum": 0.5, **_TAUS},
    ],
    "bounded outputs": [{"output_bound": 0.5}, {"output_bound": 0.9, "lambda_rej": 0.3, **_TAUS}],
    "hard bound": [{"output_bound": 0.5, "output_bound_form": "hard", "tuple_norm": "none"}],
    "straight through": [{"output_bound": 0.5, "output_bound_form": "straight_through"}],
    "saturation": [{"lambda_saturation": 0.1}, {"lambda_saturation": 0.01, "saturation_threshold": 1.0}],
    "spread": [{"lambda_spread": 0.5}, {"lambda_spread": 0.1, "target_spread": 1.0}],
    "cap by loss": [{"cap_ratio": 0.1, "lambda_push_up": 1.0}, {"cap_ratio": 0.3, "cap_floor": 0.05}],
    "cap of the reference": [{"cap_ratio": 0.1, "cap_currency": "reference"}],
    "several guards": [
        {"cap_ratio": 0.2, "lambda_spread": 0.5, "lambda_saturation": 0.1, "output_bound": 0.9, **_TAUS}
    ],
    "accumulated": [
        {"gradient_accumulation_steps": 2, "batch_size": 16, "clip_norm": 0.1},
        {"gradient_accumulation_steps": 2, "batch_size": 16},
    ],
    "a short last batch": [{"batch_size": 24}, {"batch_size": 24, "optimizer": "sgd"}],
    "a short last group": [{"batch_size": 14, "gradient_accumulation_steps": 3}],
    "one batch": [{"batch_size": 100}, {"batch_size": 100, "optimizer": "rmsprop"}],
    "an angular head": [{"head": "angular"}],
    "a shared denominator": [{"head": "multihead", "q_anchor": "ones"}],
    "a rational head": [{"head": "tr_rational", "basis": "chebyshev"}],
    "too little coverage": [
        {"coverage_threshold": 1.0, "coverage_patience": 2, "tau_infer": 0.2, **_TAUS, "tau_train_min": 0.2},
        {"coverage_threshold": 0.1},
    ],
    "the best epoch": [
        {"restore_best": True, "learning_rate": 0.3},
        {"restore_best": True, "max_epochs": 2, "learning_rate": 0.3},
        {},
    ],
    "decoding thresholds": [{"tau_infer": 1e-5}, {"tau_infer": 1e-4}, {"tau_infer": 1e-5}],
}


@pytest.mark.parametrize("name", sorted(CASES))
def test_each_trial_of_a_pack_comes_to_what_it_comes_to_alone(name):
    """Weights, every number of every epoch, decoded answers, telemetry and how it ends."""
    check_pack([TrialConfig(**{**SMALL, **own}) for own in CASES[name]])


@pytest.mark.parametrize("name", ["optimizers", "policies", "a short last group", "quotient"])
def test_so_it_does_where_nothing_is_compiled(name):
    check_pack([TrialConfig(**{**SMALL, **own}) for own in CASES[name]], native=False)


@pytest.mark.skipif(not has_compiler(), reason="there is no C compiler")
@pytest.mark.parametrize("name", sorted(CASES))
def test_steps_run_as_machine_code_but_for_those_that_sort(name):
    pack = pack_of(trials([TrialConfig(**{**SMALL, **own}) for own in CASES[name]]))
    config = pack.lanes[0].config
    assert pack.machine_code == (config.coverage_term != "ranked" and not config.lambda_spread)


@pytest.mark.skipif(not has_compiler(), reason="there is no C compiler")
@pytest.mark.parametrize("width", range(3, 12))
def test_single_precision_does_not_keep_steps_from_machine_code(width):
    """Which form runs must not depend on who is in the pack: the two differ by roundings."""
    small = {**SMALL, "dtype": "float32", "hidden_width": width}
    assert pack_of(trials([TrialConfig(**small)] * 2)).machine_code


def test_trials_of_other_seeds_may_have_other_data():
    check_pack([TrialConfig(**SMALL)] * 4, [0, 1, 2, 1], own)


def test_a_pack_without_validation_judges_by_its_training():
    def train_only(seed: int) -> Mapping[str, Split]:
        return {name: SHARED[name] for name in ("train", "test")}

    configs = [TrialConfig(**SMALL), TrialConfig(**SMALL, coverage_threshold=1.0, coverage_patience=1)]
    check_pack(configs, None, train_only)


def test_a_task_may_bring_its_own_loss():
    """A loss made of the config sees the numbers of its own trial."""

    def fit(P: Tensor, Q: Tensor, Y_n: Tensor, Y_d: Tensor, mask: Tensor | None) -> Tensor:
        cost = (P * Y_d - Q * Y_n).square()
        return torch.where(mask, cost, 0.0).mean() if mask is not None else cost.mean()

    def loss_of(config: TrialConfig) -> Any:
        return make_training_loss(config, fit)

    configs = [TrialConfig(**SMALL), TrialConfig(**SMALL, lambda_margin=0.7, tau_train_max=0.3)]
    found = outcomes(pack_of(trials(configs), loss_of=loss_of))
    for member in trials(configs):
        right = alone(member.config, member.seed, loss_fn=loss_of(member.config))
        assert_alike(found[member.key], right)


def test_float32_agrees_as_far_as_it_can():
    configs = [TrialConfig(**{**SMALL, "dtype": "float32"}, lambda_rej=rej) for rej in (0.01, 0.3)]
    found = outcomes(pack_of(trials(configs)))
    for member in trials(configs):
        right = alone(member.config, member.seed)
        for name, item in right.weights.items():
            torch.testing.assert_close(found[member.key].weights[name], item, rtol=1e-4, atol=1e-5)


# --- whatever else is in the pack -----------------------------------------------------------------


def weights_by_key(members: Sequence[PackTrial], **options: Any) -> dict[str, dict[str, Tensor]]:
    return {key: held.weights for key, held in outcomes(pack_of(members, **options)).items()}


@given(st.permutations(range(5)), st.integers(1, 5))
@settings(max_examples=8)
def test_neither_place_nor_neighbours_nor_their_number_matter(order, count):
    """Any trials of a pack, in any order: each comes to what it came to before."""
    base = {**SMALL, "max_epochs": 2}
    configs = [TrialConfig(**{**base, "learning_rate": 10.0 ** -(1 + place)}) for place in range(3)]
    configs += [TrialConfig(**base, optimizer="sgd"), TrialConfig(**base, gradient_policy="project")]
    members = trials(configs)
    # As machine code one trial is computed after another, and not even a rounding differs.
    tolerance = {"rtol": 0.0, "atol": 0.0} if has_compiler() else {"rtol": TIGHT, "atol": 1e-12}
    everyone = weights_by_key(members)
    for key, weights in weights_by_key([members[place] for place in order[:count]]).items():
        for name, item in weights.items():
            torch.testing.assert_close(item, everyone[key][name], **tolerance)


def spoiled(seed: int, bad_row: int = 0) -> Mapping[str, Split]:
    """As `own`, but the data of seed 1 have a row that is not finite."""
    data = dict(own(seed))
    if seed == 1:
        data["train"] = split(64, 11, bad_row=bad_row)
    return data


def secretly_spoiled(seed: int) -> Mapping[str, Split]:
    """The bad row is one that no loss sees: the gradients alone are not finite."""
    return spoiled(seed, 7)


@pytest.mark.parametrize(
    ("data", "bad"), [(spoiled, "loss"), (secretly_spoiled, "gradient")], ids=["loss", "gradient"]
)
@pytest.mark.parametrize("kind", ["adam", "adamw", "sgd", "rmsprop"])
def test_a_bad_step_of_one_trial_leaves_its_neighbours_bit_identical(kind, data, bad):
    """Every epoch one step of the second trial is not taken, and counted as it is alone."""
    config = TrialConfig(**SMALL, optimizer=kind, weight_decay=0.01)
    members = trials([config] * 3)
    fine = outcomes(pack_of(members, own))
    found = outcomes(pack_of(members, data))
    for key in ("t0", "t2"):
        for name, item in fine[key].weights.items():
            assert torch.equal(found[key].weights[name], item)
        assert found[key].reports[-1].nan_counts == fine[key].reports[-1].nan_counts
    assert found["t1"].reports[-1].nan_counts[bad] == 3
    assert_alike(found["t1"], alone(config, 1, data))


@pytest.mark.parametrize(
    "told",
    [
        {"nonfinite_budget": 1},
        {"nonfinite_budget": 0},
        {"finite_action": "stop"},
        {"finite_action": "stop", "finite_streak": 2},
        {"batch_size": 16, "gradient_accumulation_steps": 2, "nonfinite_budget": 2},
        {"gradient_policy": "clamp", "clip_norm": 0.1, "nonfinite_budget": 2},
        {"loss_ramp_epochs": 2, "nonfinite_budget": 2},
    ],
    ids=str,
)
def test_a_trial_diverges_where_it_diverges_alone(told):
    """In mid-epoch too: what comes after does not count, and its neighbours go on."""
    config = TrialConfig(**{**SMALL, **told, "max_epochs": 4})
    check_pack([config] * 3, None, spoiled)


def test_weights_that_overflow_end_their_trial_alone():
    """A rate that no float can follow: the trial diverges as it does alone, its neighbour trains."""
    wild = TrialConfig(**{**SMALL, "optimizer": "sgd", "learning_rate": 1e308, "tuple_norm": "none"})
    calm = TrialConfig(**{**SMALL, "optimizer": "sgd", "tuple_norm": "none"})
    check_pack([calm, wild, calm])


# --- lanes ----------------------------------------------------------------------------------------


def test_a_trial_that_ends_frees_its_lane_and_one_that_waits_enters():
    """Late trials come to the same: their epochs are their own."""
    configs = [TrialConfig(**{**SMALL, "max_epochs": epochs}) for epochs in (1, 3, 2, 2)]
    members = trials(configs)
    sizes = []

    def later(pack: PackedTrainer, count: int) -> None:
        sizes.append(len(pack.keys))
        if count in (1, 2):
            pack.refill(members[count + 1])

    found = outcomes(pack_of(members[:2]), later)
    assert sizes == [2, 2, 3, 1]
    for member in members:
        assert_alike(found[member.key], alone(member.config, member.seed))


def test_a_pack_shrinks_when_nobody_waits_and_is_done_when_it_is_empty():
    pack = pack_of(trials([TrialConfig(**{**SMALL, "max_epochs": epochs}) for epochs in (1, 2, 4)]))
    sizes = [len(pack.keys) for _ in pack.epochs()]
    assert sizes == [3, 2, 1, 1]
    assert pack.done
    assert list(pack.epochs()) == []
    pack.refill(PackTrial(TrialConfig(**SMALL), 0, "late"))
    assert not pack.done
    assert len(list(pack.epochs())) == 3


def test_a_trial_may_be_stopped_from_outside():
    """It is still there to be decoded until the next epoch begins, and its reason is the caller's."""
    pack = pack_of(trials([TrialConfig(**SMALL)] * 2))
    for count, epoch in enumerate(pack.epochs()):
        if count == 0:
            pack.stop("t0", "halving")
            assert pack.lane("t0").status == "stopped"
            assert pack.lane("t0").stop_reason == "halving"
            assert pack.decode("val").of("t0").decoded.shape == (24,)
        else:
            assert epoch.keys == ("t1",)
    with pytest.raises(KeyError, match="the pack must hold trial 't0'"):
        pack.lane("t0")


def test_what_is_not_asked_for_is_not_run():
    pack = pack_of(trials([TrialConfig(**SMALL)]))
    epochs = pack.epochs()
    next(epochs)
    assert pack.lane("t0").epoch == 1


def test_an_epoch_says_of_every_trial_what_its_report_says(monkeypatch):
    """To the last bit, also where validation goes batch by batch."""
    monkeypatch.setattr("scm.packed.engine._VALIDATION_ROWS", 1)
    pack = pack_of(trials([TrialConfig(**{**SMALL, "learning_rate": rate}) for rate in (0.1, 0.001)]))
    for epoch in pack.epochs():
        reports = [epoch.reports[key] for key in epoch.keys]
        assert epoch.epoch == [item.epoch for item in reports]
        assert epoch.status == [item.status for item in reports]
        assert epoch.loss == [item.train["loss"] for item in reports]
        assert epoch.learning_rate == [item.train["lr"] for item in reports]
        assert epoch.val_loss == [item.val["val_loss"] for item in reports]
        assert epoch.val_coverage == [item.val["val_coverage"] for item in reports]
        assert epoch.nan_count == [sum(item.nan_counts.values()) for item in reports]
        assert all(item.bench["pack_step_ms"] == epoch.step_ms > 0 for item in reports)


# --- checkpoints ----------------------------------------------------------------------------------


def test_a_pack_goes_on_bit_for_bit_from_a_checkpoint(tmp_path):
    """With optimizers, controllers, guards, thresholds, best weights and bad steps of all kinds."""
    base = {**SMALL, **_TAUS, "max_epochs": 4, "restore_best": True, "coverage_control": "unbiased"}
    kinds = itertools.cycle(("adam", "sgd", "rmsprop"))
    configs = [
        TrialConfig(**{**base, "optimizer": next(kinds), "control_warmup_steps": 2, "lambda_spread": 0.3})
        for _ in range(4)
    ]
    members = trials(configs)
    whole = outcomes(pack_of(members, spoiled))

    first = pack_of(members[:3], spoiled)
    for count, _ in enumerate(first.epochs(), start=1):
        if count == 2:
            break
    first.refill(members[3])
    first.save_checkpoint(tmp_path / "pack.pt")
    second = pack_of([], spoiled)
    second.load_checkpoint(tmp_path / "pack.pt")
    assert second.keys == first.keys
    found = outcomes(second)
    assert found.keys() == whole.keys()
    for key, outcome in whole.items():
        for name, item in outcome.weights.items():
            assert torch.equal(found[key].weights[name], item), (key, name)
        assert found[key].reports[-1].train == outcome.reports[-1].train
        assert found[key].reports[-1].nan_counts == outcome.reports[-1].nan_counts
        assert found[key].telemetry == pytest.approx(outcome.telemetry, nan_ok=True)


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    write_checkpoint(tmp_path / "other.pt", {"model": {}})
    with pytest.raises(CheckpointError, match="must be of a pack"):
        pack_of([]).load_checkpoint(tmp_path / "other.pt")


# --- who may not ----------------------------------------------------------------------------------


class Normed(nn.Module):
    """A network whose batch statistics run."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, 4), norm, nn.Linear(4, 2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        P, Q = self.layers(x).unbind(-1)
        return P, Q


class Branching(Normed):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        P, Q = super().forward(x)
        return (P, Q) if Q.sum() > 0 else (-P, -Q)


class Idle(Normed):
    """Has a parameter that takes no part."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__(norm)
        self.idle = nn.Parameter(torch.ones(3))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Normed(nn.BatchNorm1d(4)), "running statistics"),
        (lambda: Normed(nn.Dropout(0.5)), "random numbers"),
        (lambda: Branching(nn.Identity()), "control flow depends on the values"),
        (lambda: Idle(nn.Identity()), r"gradient\.idle"),
        (lambda: nn.Linear(5, 1), r"does not answer \(P, Q\)"),
    ],
)
def test_a_model_that_cannot_be_batched_is_told_before_training_with_its_reason(make, reason):
    with pytest.raises(NotPackable, match=reason) as caught:
        PackedTrainer([PackTrial(TrialConfig(), 0, "first")], lambda config: make(), shared)
    assert caught.value.key == "first"
    assert "must be trained alone" in str(caught.value)


@pytest.mark.parametrize(
    "make", [lambda: nn.LayerNorm(4), lambda: nn.BatchNorm1d(4, track_running_stats=False), nn.Tanh]
)
def test_any_other_model_may_be_packed(make):
    """Models of one's own: normalised, with other activations."""
    config = TrialConfig(**{**SMALL, "batch_size": 16, "optimizer": "sgd"})
    pack = PackedTrainer(trials([config] * 3), lambda _: Normed(make()), shared)
    found = outcomes(pack)
    for member in trials([config] * 3):
        trainer = make_trainer(config, member.seed, lambda: Normed(make()), SHARED["train"], SHARED["val"])
        list(trainer.epochs())
        for name, item in trainer.model.state_dict().items():
            torch.testing.assert_close(found[member.key].weights[name], item, rtol=TIGHT, atol=1e-12)


def test_a_trial_of_another_form_is_refused_by_its_key():
    pack = pack_of(trials([TrialConfig(**SMALL)]))
    with pytest.raises(NotPackable, match="trial other must be trained alone: its shapes") as caught:
        pack.refill(PackTrial(TrialConfig(**{**SMALL, "hidden_width": 16}), 0, "other"))
    assert caught.value.key == "other"
    with pytest.raises(NotPackable, match="gap_watch=True"):
        pack.refill(PackTrial(TrialConfig(**SMALL, gap_watch=True), 0, "watched"))
    with pytest.raises(ValueError, match="a key must be one trial's alone, got 't0' twice"):
        pack.refill(trials([TrialConfig(**SMALL)])[0])


def test_a_loss_that_reads_what_differs_from_trial_to_trial_is_refused():
    def loss_of(config: TrialConfig) -> Any:
        return make_training_loss(config) if config.optimizer == "adam" else None

    with pytest.raises(NotPackable, match="its loss reads optimizer"):
        pack_of(trials([TrialConfig(**SMALL)]), loss_of=loss_of)


def test_an_absent_device_is_an_error():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises((RuntimeError, AssertionError)):
        pack_of(trials([TrialConfig(**SMALL)]), device="cuda")


# --- at length ------------------------------------------------------------------------------------

_FLOATS = st.floats(0.001, 0.5)
_CONFIGS = st.fixed_dictionaries(
    {
        "optimizer": st.sampled_from(["adam", "adamw", "sgd", "rmsprop"]),
        "learning_rate": st.floats(1e-4, 1e-2),
        "weight_decay": st.sampled_from([0.0, 1e-3]),
        "lr_schedule": st.sampled_from(["constant", "cosine", "linear"]),
        "clip_norm": st.one_of(st.none(), _FLOATS),
        "gradient_policy": st.sampled_from([None, "clamp", "project", "reject", "pass"]),
        "lambda_margin": st.one_of(st.just(0.0), _FLOATS),
        "lambda_sign": st.one_of(st.just(0.0), _FLOATS),
        "lambda_rej": _FLOATS,
        "lambda_push_down": st.one_of(st.just(0.0), _FLOATS),
        "lambda_push_up": st.one_of(st.just(0.0), _FLOATS),
        "tau_train_max": st.floats(0.01, 0.4),
        "tau_train_min": st.just(0.01),
        "target_coverage": st.floats(0.5, 1.0),
        "loss_ramp_epochs": st.integers(0, 20),
        "seed": st.integers(0, 3),
    }
)
_FORMS = st.fixed_dictionaries(
    {
        "fit": st.sampled_from(["projective", "implicit", "implicit_detached", "quotient"]),
        "coverage_term": st.sampled_from(["soft", "ranked"]),
        "coverage_control": st.sampled_from(["none", "reference", "unbiased"]),
        "output_bound": st.sampled_from([None, 0.8]),
        "lambda_saturation": st.sampled_from([0.0, 0.05]),
        "lambda_spread": st.sampled_from([0.0, 0.2]),
        "cap_ratio": st.sampled_from([None, 0.3]),
        "gradient_accumulation_steps": st.sampled_from([1, 2]),
        "head": st.sampled_from(["pattern", "angular"]),
    }
)


def trained_weights(member: PackTrial, *, moved: bool = False) -> dict[str, Tensor]:
    """The weights after a training alone; `moved` begins it with the first ones a rounding away."""
    source = torch.Generator().manual_seed(0)

    def build_moved() -> nn.Module:
        model = build(member.config)
        with torch.no_grad():
            for held in model.parameters() if moved else ():
                signs = torch.randn(held.shape, generator=source, dtype=held.dtype).sign()
                held.mul_(1.0 + torch.finfo(held.dtype).eps * signs)
        return model

    data = shared(member.seed)
    trainer = make_trainer(member.config, member.seed, build_moved, data["train"], data["val"])
    list(trainer.epochs())
    assert trainer.optimizer_steps == 200
    return trainer.model.state_dict()


def distances(one: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> dict[str, float]:
    """How far weights are from the right ones, relative to the largest of their tensor."""
    return {
        name: float((one[name] - item).abs().max() / item.abs().max().clamp(min=1e-300))
        for name, item in right.items()
    }


@pytest.mark.slow
@given(_FORMS, st.lists(_CONFIGS, min_size=2, max_size=5))
@settings(max_examples=12)
def test_after_two_hundred_steps_the_weights_are_within_a_billionth(form, members):
    """Random configs, each against itself alone: 200 optimizer steps in float64.

    Some trainings enlarge a rounding more than that: Adam divides by the size of gradients, be they zero but
    for rounding. What a training alone makes of its first weights moved by one rounding is the measure then.
    """
    steps = form["gradient_accumulation_steps"]
    size = {"batch_size": 16 // steps, "max_epochs": 50, "control_warmup_steps": 20}
    configs, seeds = [], []
    for told in members:
        seeds.append(told.pop("seed"))
        configs.append(TrialConfig(**{**SMALL, **size, **form, **told}))
    pack = pack_of(trials(configs, seeds))
    found = {}
    for _ in pack.epochs():
        found = {key: dict(pack.model_of(key).state_dict()) for key in pack.keys}
    for member in trials(configs, seeds):
        right = trained_weights(member)
        apart = distances(found[member.key], right)
        if max(apart.values()) > TIGHT:
            enlarged = max(distances(trained_weights(member, moved=True), right).values())
            assert max(apart.values()) <= max(TIGHT, 10.0 * enlarged), (member.config, apart)
