"""Training compared with what is held out: normalised, by recorded thresholds, trusted where it may be."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from scm.guards.gap import (
    CONSENSUS_LEVELS,
    REFERENCE_THRESHOLDS,
    Consensus,
    GapAlert,
    GapMonitor,
    GapThresholds,
    GapWatch,
    Measured,
    consensus,
    measure_outputs,
    normalised_entropy,
    vote,
)
from scm.guards.symmetry import D4
from scm.training.config import TrainingConfig
from scm.training.loader import TensorBatches
from scm.training.targets import lift_semantic_targets
from scm.training.trainer import SCMTrainer

NAN = math.nan
F64 = torch.float64


# --- entropy -------------------------------------------------------------------------------------


def test_a_sharp_distribution_has_no_entropy_on_any_canvas() -> None:
    """The reference's floor of 1e-6 an entry makes 9 and 112 times more of the same attention."""

    def floored(weights: Tensor) -> float:
        held = weights.clamp(min=1e-6)
        return -(held * held.log()).sum().item()

    sharp = {side: torch.zeros(side, side) for side in (3, 10, 30)}
    for canvas in sharp.values():
        canvas[1, 2] = 1.0
    assert {normalised_entropy(canvas, axes=2).item() for canvas in sharp.values()} == {0.0}
    assert floored(sharp[30]) / floored(sharp[10]) == pytest.approx(9.08, abs=0.01)
    assert floored(sharp[30]) / floored(sharp[3]) == pytest.approx(112, abs=1)


@given(st.integers(2, 30), st.integers(2, 30), st.floats(1e-3, 1e3))
def test_equal_weights_have_entropy_one_on_any_canvas(height, width, scale) -> None:
    """Whatever they sum to; among so many entries as can have weight."""
    weights = torch.full((2, height, width), scale, dtype=F64)
    assert normalised_entropy(weights, axes=2).tolist() == pytest.approx([1.0, 1.0])
    weights[:, 1:] = 0.0
    usable = torch.tensor([width, width])
    assert normalised_entropy(weights, axes=2, usable=usable).tolist() == pytest.approx([1.0, 1.0])


@given(st.lists(st.floats(0.0, 1.0), min_size=2, max_size=8).filter(lambda row: sum(row) > 1e-6))
def test_entropy_lies_between_zero_and_one(row) -> None:
    """And does not depend on the order."""
    weights = torch.tensor(row, dtype=F64)
    found = normalised_entropy(weights).item()
    assert 0.0 <= found <= 1.0 + 1e-12
    assert normalised_entropy(weights.flip(0)).item() == pytest.approx(found, abs=1e-12)


def test_entropy_at_the_edges() -> None:
    """One entry has no entropy, no weights have none that is known, half precision has one in full."""
    assert normalised_entropy(torch.ones(3, 1)).tolist() == [0.0, 0.0, 0.0]
    assert math.isnan(normalised_entropy(torch.zeros(4)).item())
    half = normalised_entropy(torch.full((900,), 1 / 900, dtype=torch.float16))
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(1.0)
    weights = torch.tensor([0.0, 0.5, 0.5], requires_grad=True)
    normalised_entropy(weights).backward()
    assert bool(torch.isfinite(weights.grad).all())


# --- thresholds ----------------------------------------------------------------------------------


def measured(values: dict[str, float]) -> Measured:
    """The recorded names in ours."""
    names = {"exact_match": "score", "dsc_entropy": "entropy", "stop_value": "stop", "task_loss": "loss"}
    return Measured(**{names[name]: value for name, value in values.items()})


def test_the_references_thresholds_by_name_give_what_was_recorded(guard_vectors: dict[str, Any]) -> None:
    """Every alert of every recorded epoch, trends included, in order."""
    named = {"score": "exact_match", "entropy": "entropy", "stop": "stop_value", "loss": "loss"}
    named |= {"score_trend": "exact_match_trend", "entropy_trend": "entropy_trend"}
    seen = set()
    for sequence in guard_vectors["gap_monitor"]:
        monitor = GapMonitor(REFERENCE_THRESHOLDS)
        for step in sequence["steps"]:
            alerts = monitor.add(measured(step["train"]), measured(step["eval"]))
            assert [(named[alert.metric], alert.severity) for alert in alerts] == [
                (alert["metric"], alert["severity"]) for alert in step["alerts"]
            ]
            for alert, expected in zip(alerts, step["alerts"], strict=True):
                assert (alert.gap, alert.threshold) == pytest.approx((expected["gap"], expected["threshold"]))
                seen.add((alert.metric, alert.severity))
    assert len(seen) == 10


def test_entropies_are_compared_as_a_difference() -> None:
    """The published 27.4 is the ratio of 1.37 to 0.05: over 900 cells both sides are sharp."""
    train, held_out = Measured(entropy=0.05 / math.log(900)), Measured(entropy=1.37 / math.log(900))
    (alert,) = GapMonitor().add(train, held_out)
    assert (alert.metric, alert.severity) == ("entropy", "warning")
    assert alert.gap == pytest.approx(0.194, abs=1e-3)
    assert GapMonitor().add(Measured(entropy=1e-9), Measured(entropy=1e-6)) == []
    held = GapMonitor(GapThresholds(entropy=(2.0, 5.0), entropy_as_ratio=True, least=0.0))
    assert held.add(Measured(entropy=1e-9), Measured(entropy=1e-6))[0].severity == "critical"


def test_nothing_is_called_healthy_where_everything_is_answered_alike() -> None:
    """A constant predictor has no gap at all: that is the alert."""
    for train, held_out in ((1.0, 50.0), (50.0, 1.0), (1.0, 1.0)):
        alerts = GapMonitor().add(Measured(score=0.0, distinct=train), Measured(score=0.0, distinct=held_out))
        assert alerts == [GapAlert("degenerate", "critical", 1.0, 1.0)]
    assert GapMonitor().add(Measured(score=0.5, distinct=2), Measured(score=0.5, distinct=2)) == []


def test_what_was_not_measured_raises_no_alert() -> None:
    """Neither a gap nor a trend, which goes on over the epochs that were."""
    monitor = GapMonitor()
    gaps = [0.05, NAN, 0.06, 0.07]
    found = [monitor.add(Measured(score=0.5 + gap), Measured(score=0.5)) for gap in gaps]
    assert found[:3] == [[], [], []]
    ((metric, severity, gap, threshold),) = found[3]
    assert (metric, severity, threshold) == ("score_trend", "warning", 0.0)
    assert gap == pytest.approx(0.02)


def test_a_monitor_goes_on_from_its_state() -> None:
    """Trends reach over an interruption, and no history grows without end."""
    one, other = GapMonitor(), GapMonitor()
    for gap in (0.01, 0.03, 0.06):
        one.add(Measured(score=gap), Measured(score=0.0))
    other.load_state_dict(one.state_dict())
    assert [alert.metric for alert in other.add(Measured(score=0.07), Measured(score=0.0))] == ["score_trend"]
    for _ in range(20):
        other.add(Measured(score=0.0), Measured(score=0.0))
    assert len(other.state_dict()["score"]) == 3


# --- agreement of views --------------------------------------------------------------------------


def test_answers_of_other_shapes_are_other_answers() -> None:
    """The reference compares the values alone: 2x3 and 3x2 grids of the same colours are one answer there."""
    flat = torch.arange(6)
    votes = [flat.view(2, 3), flat.view(3, 2), flat.view(3, 2)]
    found = vote(votes)
    assert torch.equal(found.winner, votes[1])
    assert (found.share, found.different, found.tied) == (2 / 3, 2, False)
    assert len({answer.contiguous().numpy().tobytes() for answer in votes}) == 1


def test_votes_are_counted() -> None:
    """The first of those given as often wins, and a tie is one; types and the sign of zero do not matter."""
    one, two = torch.tensor([[1, 2]]), torch.tensor([[2, 1]])
    assert torch.equal(vote([two, one, one]).winner, one)
    tie = vote([two, one])
    assert torch.equal(tie.winner, two)
    assert (tie.share, tie.different, tie.tied) == (0.5, 2, True)
    assert vote([one, one.to(torch.int32)]).different == 1
    assert vote([torch.tensor([0.0, NAN]), torch.tensor([-0.0, NAN])]).different == 1
    assert vote([one.t(), one.t().contiguous()]).different == 1
    with pytest.raises(ValueError, match="answers must hold at least one, got none"):
        vote([])
    with pytest.raises(ValueError, match="rows must hold at least one, got none"):
        consensus([])


def test_a_constant_answer_agrees_with_itself_and_is_not_trusted() -> None:
    """Fifty inputs, eight views each: the reference calls a constant predictor's 100 % good."""
    generator = torch.Generator().manual_seed(0)
    grids = torch.randint(0, 10, (50, 4, 4), generator=generator)
    constant = consensus([[torch.zeros(4, 4, dtype=torch.int64) for _ in D4] for _ in grids])
    assert (constant.share, constant.different, constant.distinct) == (1.0, 1.0, 1)
    assert (constant.trusted, constant.level) == (False, "degenerate")
    faithful = consensus([[item.undo(item.apply(grid)) for item in D4.values()] for grid in grids])
    assert (faithful.share, faithful.trusted, faithful.level) == (1.0, True, "good")
    turned = consensus([[item.apply(grid) for item in D4.values()] for grid in grids])
    assert turned.level == "critical"
    assert turned.ties > 0.9


@pytest.mark.parametrize(
    "share, level",
    [(0.1, "critical"), (0.15, "low"), (0.24, "low"), (0.25, "moderate"), (0.5, "good"), (1.0, "good")],
)
def test_levels_of_consensus_have_their_recorded_bounds(share, level) -> None:
    """Each bound belongs to the level above it."""
    assert Consensus(share, 1.0, 0.0, distinct=2, rows=2).level == level
    assert [bound for _, bound in CONSENSUS_LEVELS] == sorted(bound for _, bound in CONSENSUS_LEVELS)


# --- what a model answered -----------------------------------------------------------------------


def test_pairs_are_measured_as_lines() -> None:
    """The right lines score 1 at any length and sign, bottoms included; missing rows do not count."""
    y = torch.tensor([0.5, -2.0, math.inf, 7.0], dtype=F64)
    targets = lift_semantic_targets(y, ["finite", "finite", "censored_above", "missing"])
    P, Q = torch.tensor([1.0, 4.0, -3.0, 0.0]), torch.tensor([2.0, -2.0, 0.0, 1.0])
    found = measure_outputs((P.double(), Q.double()), targets)
    assert found.score == pytest.approx(1.0)
    assert (found.distinct, math.isnan(found.entropy), math.isnan(found.stop)) == (4.0, True, True)
    wrong = measure_outputs((Q.double(), -P.double()), targets)
    assert wrong.score == pytest.approx(0.0)
    constant = measure_outputs((torch.full((4,), 2.0), torch.tensor([1.0, 1.0, 1.0, 1.0001])), targets)
    assert constant.distinct == 1.0


def test_classes_are_measured_at_their_places() -> None:
    """Accuracy over trained places, entropy of probabilities or of attention, and the mean of stopping."""
    generator = torch.Generator().manual_seed(0)
    right = torch.randint(0, 3, (5, 2, 2), generator=generator)
    one_hot = torch.nn.functional.one_hot(right, 3).movedim(-1, 1).double()
    kept = torch.ones(5, 1, 2, 2, dtype=torch.bool)
    kept[:, :, 0, 0] = False
    codes = torch.where(kept.expand_as(one_hot), 0, 5)  # finite, missing
    targets = lift_semantic_targets(one_hot, codes)
    scores = 100.0 * one_hot
    scores[:, :, 0, 0] = scores[:, :, 0, 0].flip(1)  # wrong, where nothing is asked
    scores[0, :, 1, 1] = scores[0, :, 1, 1].roll(1)  # wrong, where something is
    found = measure_outputs(scores, targets)
    assert found.score == pytest.approx(14 / 15)
    assert found.entropy == pytest.approx(0.0, abs=1e-9)
    assert found.distinct == 5.0
    named = {"attention": torch.full((5, 2, 3, 3), 1 / 9), "stop_logits": torch.zeros(5, 2)}
    found = measure_outputs((scores, torch.rand(5), named), targets)
    assert (found.entropy, found.stop) == (pytest.approx(1.0), 0.5)


def test_one_class_everywhere_is_one_answer_whatever_stands_where_nothing_is_asked() -> None:
    """Noise outside of the trained places does not make a constant predictor diverse."""
    values = torch.zeros(6, 2, 2, 2, dtype=F64)
    codes = torch.zeros(values.shape, dtype=torch.int64)
    codes[:, :, 0] = 5  # missing
    targets = lift_semantic_targets(values, codes)
    scores = torch.randn(6, 2, 2, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    scores[:, 0, 1] = 9.0
    assert measure_outputs(scores, targets).distinct == 1.0
    scores[0, 1, 1, 0] = 10.0
    assert measure_outputs(scores, targets).distinct > 1


# --- in the trainer ------------------------------------------------------------------------------


class Attends(nn.Module):
    """Attend to one of nine cells by learned keys, with Gumbel noise in training mode, and answer from it."""

    def __init__(self, noise: float, sharpness: float = 10.0) -> None:
        super().__init__()
        self.noise = noise
        self.sharpness = sharpness
        self.value = nn.Linear(9, 2).double()
        self.norm = nn.BatchNorm1d(2).double()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Map (B, 9) to P, Q and the attention over a grid of 3x3."""
        scores = self.sharpness * x
        if self.training and self.noise:
            drawn = -torch.empty_like(scores).exponential_().log()
            scores = scores + self.noise * self.sharpness * drawn
        attention = scores.softmax(dim=-1)
        P, Q = self.norm(self.value(attention * x)).unbind(-1)
        return P, Q, {"attention": attention.view(-1, 1, 3, 3)}


def rows(seed: int, count: int = 64) -> TensorBatches:
    """Rows of nine numbers, and the largest of them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(count, 9, generator=generator, dtype=F64)
    targets = lift_semantic_targets(x.amax(1), torch.zeros(count, dtype=torch.int64))
    return TensorBatches(x, targets, 16, generator=torch.Generator().manual_seed(seed))


def fit(outputs: Any, lifted: Any) -> Tensor:
    """The squared error of P, with Q near 1."""
    return (outputs[0] - lifted[0]).square().mean() + (outputs[1] - 1.0).square().mean()


def watched(model: nn.Module, *, held_out: Any = None, epochs: int = 2, watch: bool = True) -> SCMTrainer:
    """Train with a watch on 64 rows of each side."""
    loader = rows(0)
    companions = [GapWatch(model, loader, rows(1) if held_out is None else held_out)] if watch else []
    config = TrainingConfig(max_epochs=epochs, coverage_threshold=0.0, seed=0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    trainer = SCMTrainer(model, optimizer, fit, loader, config=config, companions=companions)
    trainer.fit()
    return trainer


def made(noise: float) -> Attends:
    """The same weights each time."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return Attends(noise)


def test_noise_in_training_mode_alone_shows_as_a_gap_that_the_mode_makes() -> None:
    """Attention is noisier, or sharper, in training than held out; without noise there is no gap."""
    noisy, clean = (watched(made(noise)).telemetry() for noise in (1.0, 0.0))
    assert abs(noisy["gap_entropy"]) > 0.1
    assert noisy["gap_entropy_mode"] == pytest.approx(noisy["gap_entropy"], abs=0.05)
    assert abs(clean["gap_entropy"]) < 0.05
    assert clean["gap_entropy_mode"] == pytest.approx(0.0, abs=1e-12)
    assert noisy["gap_trusted"] == clean["gap_trusted"] == 1.0


def test_watching_changes_nothing_of_the_training() -> None:
    """Weights, batch statistics and draws are bit for bit those of a training without it."""
    states = [watched(made(1.0), watch=watch).model.state_dict() for watch in (True, False)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


class Constant(nn.Module):
    """One answer to everything."""

    def __init__(self) -> None:
        super().__init__()
        self.answer = nn.Parameter(torch.tensor([0.3, 1.0], dtype=F64))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map (B, 9) to P and Q."""
        P, Q = self.answer.expand(len(x), 2).unbind(-1)
        return P, Q


def test_the_gap_of_a_constant_model_is_not_trusted() -> None:
    """No gap between training and held-out rows, and the watch says that this means nothing."""
    model = Constant()
    trainer = watched(model)
    said = trainer.telemetry()
    assert abs(said["gap_score"]) < 0.02
    assert said["gap_trusted"] == 0.0
    (watch,) = [member for member in trainer._companions.members if isinstance(member, GapWatch)]
    assert watch.alerts == [GapAlert("degenerate", "critical", 1.0, 1.0)]


def test_a_model_that_learned_its_rows_by_heart_shows_a_score_gap() -> None:
    """Held-out targets are another function's: right in training, wrong outside of it."""
    held_out = rows(1)
    flipped = lift_semantic_targets(-1 / held_out.targets.Y_n, torch.zeros(64, dtype=torch.int64))
    said = watched(made(0.0), held_out=TensorBatches(held_out.inputs, flipped, 16), epochs=20).telemetry()
    assert said["gap_score"] > 0.5


def test_without_held_out_rows_there_is_no_gap() -> None:
    """Nothing is measured, before the first epoch as after it; too few rows to differ are refused."""
    model = made(0.0)
    watch = GapWatch(model, rows(0), None)
    before = watch.telemetry()
    watch.after_epoch(None)
    assert all(math.isnan(value) for value in (*before.values(), *watch.telemetry().values()))
    with pytest.raises(ValueError, match="rows must be >= 2, got rows=1"):
        GapWatch(model, rows(0), rows(1), rows=1)


def test_rows_are_taken_evenly_of_more() -> None:
    """Data in order of their values: the rows compared are not the first ones."""
    loader = rows(0)
    order = loader.inputs[:, 0].argsort()
    ordered = TensorBatches(loader.inputs[order], loader.targets.index(order), 16)
    watch = GapWatch(made(0.0), ordered, ordered, rows=8)
    taken = watch._probes[0].inputs[:, 0]
    assert (taken[0], taken[-1]) == (ordered.inputs[0, 0], ordered.inputs[-1, 0])
    assert len(taken.unique()) == 8


def test_what_was_said_last_is_in_the_checkpoint(tmp_path) -> None:
    """A training that was interrupted between epochs says it again before the next one ends."""
    whole = watched(made(1.0), epochs=4)
    short = watched(made(1.0), epochs=2)
    short.save_checkpoint(tmp_path / "half.pt")
    model, loader = made(1.0), rows(0)
    config = TrainingConfig(max_epochs=4, coverage_threshold=0.0, seed=0)
    resumed = SCMTrainer(
        model,
        torch.optim.Adam(model.parameters(), lr=1e-2),
        fit,
        loader,
        config=config,
        companions=[GapWatch(model, loader, rows(1))],
    )
    resumed.load_checkpoint(tmp_path / "half.pt")
    assert resumed.telemetry() == short.telemetry()
    resumed.fit()
    assert resumed.telemetry() == whole.telemetry()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_gaps_are_those_of_the_cpu() -> None:
    """Rows, measures and the state that comes back are on the device."""
    said = []
    for device in ("cpu", "cuda"):
        model = made(0.0).to(device)
        sides = [TensorBatches(side.inputs, side.targets, 16, device=device) for side in (rows(0), rows(1))]
        watch = GapWatch(model, *sides)
        watch.after_epoch(None)
        said.append(watch.telemetry())
    assert said[1] == pytest.approx(said[0], rel=1e-9)
