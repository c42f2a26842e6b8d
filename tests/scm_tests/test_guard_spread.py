"""Spread: how it is measured, how it comes back from collapse, and what it does not tell."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from scm.guards.spread import (
    SPREAD_FORMS,
    RunningSpread,
    SpreadGuard,
    pairwise_spread,
    projective_residual,
    relevance,
    spread_loss,
)
from scm.losses.terms import LossTerms
from scm.training.companion import Moment
from scm.training.targets import STATUS_CODES, lift_semantic_targets

NAN = float("nan")
numbers = st.floats(-100, 100, width=32)
several = st.lists(numbers, min_size=2, max_size=12)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(values=several, shift=numbers, factor=st.floats(0.125, 8, width=32))
def test_pairwise_spread_is_the_mean_distance(values, shift, factor):
    """By the sorted sum as by all pairs; moved with nothing, scaled with its values."""
    x = torch.tensor(values, dtype=torch.float64)
    n = len(x)
    distances = (x[:, None] - x[None, :]).abs().sum() / (n * (n - 1))
    expected = distances * math.sqrt(math.pi) / 2
    torch.testing.assert_close(pairwise_spread(x), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(pairwise_spread(x * factor + shift), expected * factor, rtol=1e-6, atol=1e-6)


@given(values=several, kept=st.lists(st.booleans(), min_size=12, max_size=12))
def test_rows_outside_of_the_mask_have_no_spread(values, kept):
    """Masked rows change neither value nor gradient, whatever stands there."""
    x, mask = torch.tensor(values, dtype=torch.float64), torch.tensor(kept[: len(values)])
    dirty = torch.where(mask, x, NAN).requires_grad_()
    spread = pairwise_spread(dirty, mask)
    torch.testing.assert_close(spread, pairwise_spread(x[mask]), rtol=1e-9, atol=1e-9)
    (gradient,) = torch.autograd.grad(spread, dirty)
    assert (gradient[~mask] == 0).all()


@pytest.mark.parametrize("rows", [2, 4, 32])
def test_for_normal_values_it_is_their_deviation_in_batches_of_any_size(rows):
    """The standard deviation of two values is a fifth too small on average, this is not."""
    draws = torch.randn((4000, rows), generator=seeded()) * 0.5
    pairwise = torch.vmap(pairwise_spread)(draws)
    assert pairwise.mean().item() == pytest.approx(0.5, abs=0.02)
    if rows == 2:
        assert draws.std(dim=1).mean() < 0.42


@pytest.mark.parametrize("form", SPREAD_FORMS)
def test_one_row_has_no_spread_and_costs_nothing(form):
    """No NaN, for no row either; a backward pass through it gives zeros."""
    for rows in (0, 1):
        values = torch.ones(rows, requires_grad=True)
        loss = spread_loss(values, 0.5, form=form, generator=seeded())
        assert loss.item() == 0.0
        assert torch.equal(loss + values.sum() * 0, loss)


def collapsed(form: str | None, steps: int = 200) -> tuple[float, float]:
    """Train an input-independent head on its spread alone; return its deviation and the first gradient."""
    features = torch.randn((32, 8), generator=seeded())
    weight = torch.zeros((8, 6), requires_grad=True)
    optimizer = torch.optim.Adam([weight], lr=1e-2)
    running, noise, first = RunningSpread(0.5), seeded(1), 0.0
    for step in range(steps):
        counts = (1 - torch.sigmoid(features @ weight)).sum(1)
        loss = running.term(counts) if form is None else spread_loss(counts, form=form, generator=noise)
        optimizer.zero_grad()
        loss.backward()
        assert weight.grad is not None
        first = float(weight.grad.abs().max()) if step == 0 else first
        optimizer.step()
    return float((1 - torch.sigmoid(features @ weight)).sum(1).detach().std()), first


def test_the_recorded_hinge_cannot_leave_exact_collapse():
    """All rows alike: it costs 0.5, has no gradient, and that is where the head stays."""
    assert spread_loss(torch.ones(8), form="hinge").item() == 0.5
    assert collapsed("hinge", steps=20) == (0.0, 0.0)


@pytest.mark.parametrize("form", ["pairwise", "jittered", None], ids=["pairwise", "jittered", "running"])
def test_from_exact_collapse_the_other_forms_come_back(form):
    """Rows part by their order, or by noise, and then by what they are."""
    deviation, first = collapsed(form)
    assert first > 1e-3
    assert deviation > 0.5


def train_stop_head(form: str | None, seed: int) -> list[float]:
    """Spread after each of 200 steps of a head with mean count 1.16 and deviation 0.07; None: no term."""
    features = torch.randn((64, 8), generator=seeded(seed))
    weight = torch.randn((8, 6), generator=seeded(seed)) * 0.05
    bias = torch.full((6,), math.log((6 - 1.16) / 1.16), requires_grad=True)

    def counts() -> Tensor:
        return (1 - torch.sigmoid(features @ weight + bias)).sum(1)

    with torch.no_grad():
        for _ in range(20):
            weight *= 0.07 / counts().std()
    weight.requires_grad_()
    optimizer = torch.optim.Adam([weight, bias], lr=1e-2)
    running, trace = RunningSpread(0.5), []
    for _ in range(200):
        now = counts()
        trace.append(float(now.detach().std()))
        if form is None:
            continue
        loss = running.term(now) if form == "running" else spread_loss(now, 0.5, form=form)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return trace


@pytest.mark.parametrize("form", ["hinge", "pairwise", "running"])
def test_a_stop_head_that_is_nearly_collapsed_comes_apart(form):
    """From a deviation of 0.07 it reaches 0.5 within 50 steps and stays above; without a term it stays."""
    trace = train_stop_head(form, seed=0)
    assert trace[0] == pytest.approx(0.07, abs=0.005)
    assert max(trace[:50]) >= 0.5
    assert trace[-1] >= 0.5
    assert max(train_stop_head(None, seed=0)) < 0.1


@pytest.mark.parametrize("rows", [2, 4, 8, 32])
def test_a_healthy_head_is_left_alone_in_batches_of_any_size(rows):
    """The recorded hinge punishes a head of the wanted spread in half of all batches and more."""
    running, generator, hinged, ours = RunningSpread(0.5), seeded(), [], []
    for _ in range(500):
        values = 1 + 0.5 * torch.randn(rows, generator=generator)
        hinged.append(spread_loss(values, 0.5, form="hinge").item())
        ours.append(running.term(values).item())
    assert sum(cost > 0 for cost in hinged) > 0.45 * len(hinged)
    assert sum(cost > 0 for cost in ours) < 0.05 * len(ours)
    assert running.estimate == pytest.approx(0.5, abs=0.1)


def test_a_running_spread_passes_over_what_it_cannot_use():
    """A NaN among the rows, or fewer than two of them, change no estimate and cost nothing."""
    running = RunningSpread(0.5)
    assert math.isnan(running.estimate)
    values = torch.tensor([0.1, NAN, 0.1, 0.2], requires_grad=True)
    running.term(values).backward()
    assert values.grad is not None
    assert values.grad.isfinite().all()
    assert values.grad[1] == 0
    before = running.estimate
    assert before == pytest.approx(pairwise_spread(torch.tensor([0.1, 0.1, 0.2])).item())
    for few in (torch.tensor([3.0]), torch.tensor([NAN, 3.0])):
        assert running.term(few).item() == 0.0
    assert running.term(torch.tensor([3.0, 0.0, 9.0]), torch.tensor([True, False, False])).item() == 0.0
    assert running.estimate == before


def test_a_running_spread_goes_on_from_its_state():
    """Stopped and taken up, it estimates what it would have."""
    batches = torch.randn((8, 4), generator=seeded())
    whole, first, second = RunningSpread(), RunningSpread(), RunningSpread()
    for batch in batches:
        whole.term(batch)
    for batch in batches[:5]:
        first.term(batch)
    second.load_state_dict(first.state_dict())
    for batch in batches[5:]:
        second.term(batch)
    assert second.estimate == whole.estimate


def test_a_running_spread_forgets():
    """What was before the window does not count: a head that collapses is noticed."""
    running = RunningSpread(0.5, window=64)
    for _ in range(20):
        running.term(torch.randn(16, generator=seeded()))
    assert running.term(torch.full((16,), 1.0)) == 0
    for _ in range(20):
        running.term(torch.full((16,), 1.0))
    assert running.estimate < 0.05
    assert running.term(torch.full((16,), 1.0)) > 0.4


# --- relevance --------------------------------------------------------------------------------------


def test_relevance_is_the_correlation():
    """As numpy has it; without a gradient."""
    x, y = torch.randn((2, 50), generator=seeded(), dtype=torch.float64, requires_grad=True)
    y = 0.5 * x + y
    found = relevance(x, y)
    torch.testing.assert_close(found, torch.corrcoef(torch.stack([x, y]).detach())[0, 1])
    assert not found.requires_grad


@pytest.mark.parametrize(
    "values", [torch.full((5,), 0.1), torch.ones(1), torch.ones(0)], ids=["constant", "one row", "no row"]
)
def test_where_nothing_varies_relevance_is_not_known(values):
    """Not 0, and not what rounding would make of it."""
    assert relevance(values, torch.arange(float(len(values)))).isnan()
    assert relevance(torch.arange(float(len(values))), values).isnan()


def test_spread_is_reached_without_relevance():
    """A head that has features of noise alone gets its spread: it says nothing of the difficulty of a row."""
    features = torch.randn((256, 4), generator=seeded())
    difficulty = torch.randn(256, generator=seeded(1))
    weight = torch.zeros((4, 1), requires_grad=True)
    optimizer = torch.optim.Adam([weight], lr=1e-2)
    for _ in range(200):
        loss = spread_loss((features @ weight)[:, 0], 0.5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    values = (features @ weight)[:, 0].detach()
    assert values.std() > 0.5
    assert relevance(values, difficulty).abs() < 0.3


# --- the guard of a training ------------------------------------------------------------------------


def moment_of(outputs: Any, semantic: Any = None, lifted: Any = None) -> Moment:
    fed = SimpleNamespace(semantic=semantic, lifted=lifted)
    return Moment(nn.Identity(), fed, {"tau": 0.1}, outputs, LossTerms(torch.zeros(())))  # type: ignore[arg-type]


def test_the_guard_adds_its_term_for_the_number_of_each_row():
    """|Q|, meaned over outputs, or what the model calls its clue count; weighted, beside the task."""
    Q = torch.tensor([[0.1, -0.3], [0.2, 0.2], [0.0, 0.4]])
    same = moment_of((torch.zeros(3, 2), Q))
    guard = SpreadGuard(3.0, 0.5)
    guard.after_loss(same)
    assert same.terms is not None
    assert same.terms.auxiliaries["spread"].item() == pytest.approx(1.5)  # |Q| is 0.2 on average in each row
    counts = moment_of((torch.zeros(3), torch.ones(3), {"clue_count": torch.tensor([0.0, 1.0, 2.0])}))
    fresh = SpreadGuard(3.0, 0.5)
    fresh.after_loss(counts)
    assert counts.terms is not None
    assert counts.terms.auxiliaries["spread"].item() == 0.0
    assert fresh.telemetry()["spread_std"] == pytest.approx(math.sqrt(math.pi) / 2 * 4 / 3)


def test_the_guard_says_what_it_measured():
    """nan before the first batch; the mean of the term and the correlation are of the epoch."""
    guard = SpreadGuard(1.0, 0.5, difficulty=lambda moment: torch.tensor([3.0, 1.0, 2.0]))
    assert set(guard.telemetry()) == {"spread_std", "spread_term", "spread_relevance"}
    assert all(math.isnan(value) for value in guard.telemetry().values())
    guard.after_loss(moment_of((torch.zeros(3), torch.tensor([0.3, 0.1, 0.2]))))
    said = guard.telemetry()
    assert said["spread_relevance"] == pytest.approx(1.0)
    assert said["spread_term"] > 0.2
    guard.begin_epoch(1, {})
    again = guard.telemetry()
    assert math.isnan(again["spread_term"])
    assert again["spread_std"] == said["spread_std"]


def test_rows_that_may_not_be_trained_have_no_spread():
    """A row labelled missing changes nothing, whatever its denominator is."""
    codes = torch.tensor([STATUS_CODES["finite"], STATUS_CODES["missing"], STATUS_CODES["finite"]])
    semantic = lift_semantic_targets(torch.zeros(3), codes)
    guard = SpreadGuard(1.0, 0.5)
    guard.after_loss(moment_of((torch.zeros(3), torch.tensor([0.1, 9.0, 0.2])), semantic))
    assert guard.telemetry()["spread_std"] == pytest.approx(0.1 * math.sqrt(math.pi) / 2)


def test_a_weight_of_zero_only_measures():
    """No term, so that the loss is the task's own."""
    moment = moment_of((torch.zeros(2), torch.tensor([0.1, 0.2])))
    guard = SpreadGuard(0.0)
    guard.after_loss(moment)
    assert moment.terms is not None
    assert moment.terms.auxiliaries == {}
    assert guard.telemetry()["spread_std"] > 0


def test_how_hard_a_row_is_can_be_read_from_its_target():
    """The distance of (P, Q) from the target's line; unknown where shapes tell of another kind of task."""
    lifted = (torch.tensor([1.0, 1.0]), torch.tensor([1.0, 0.0]))
    moment = moment_of((torch.tensor([0.6, 0.6]), torch.tensor([0.8, 0.8])), lifted=lifted)
    residual = projective_residual(moment)
    assert residual is not None
    assert residual.tolist() == pytest.approx([0.2, 0.8])
    assert projective_residual(moment_of((torch.zeros(2, 3), torch.zeros(2, 3)), lifted=lifted)) is None


BAD: dict[str, Any] = {
    "form": (lambda: spread_loss(torch.ones(2), form="std"), "form must be one of hinge, pairwise, jittered"),
    "no generator": (lambda: spread_loss(torch.ones(2), form="jittered"), "must be given a generator"),
    "shape": (
        lambda: spread_loss(torch.ones(2, 2)),
        r"values must have one number per row, got shape \(2, 2\)",
    ),
    "target": (lambda: spread_loss(torch.ones(2), -0.1), "target must be finite and >= 0"),
    "window": (lambda: RunningSpread(0.5, 1), "window must be >= 2, got window=1"),
    "weight": (lambda: SpreadGuard(-1.0), "weight must be finite and >= 0"),
    "guard's target": (lambda: SpreadGuard(1.0, NAN), "target must be finite and >= 0"),
    "rows": (lambda: relevance(torch.ones(2), torch.ones(3)), "values and difficulty must have one number"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_refused(name):
    """The message says which argument breaks which rule."""
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call()
