"""The cap on auxiliary terms: the recorded cases, both currencies, and what it keeps in a training."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from scm.guards.budget import (
    Budget,
    BudgetGuard,
    Cap,
    GradientBudget,
    capped,
    gradient_cap,
    meta_loss_cap,
)
from scm.losses.terms import LossTerms
from scm.training.companion import Moment
from scm.training.config import TrainingConfig
from scm.training.trainer import SCMTrainer

INF, NAN = math.inf, math.nan
F64 = torch.float64


def scalar(value: float) -> Tensor:
    """A 0-d float64 tensor."""
    return torch.tensor(value, dtype=F64)


# --- the recorded cases --------------------------------------------------------------------------


def recorded(case: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor], dict[str, float]]:
    """Task, weighted auxiliaries and weights of a recorded case."""
    weights = {"loo": case["loo_weight"], "equivariance": case["equiv_weight"]}
    values = dict(zip(weights, case["aux_losses"], strict=True))
    weights = {name: weight for name, weight in weights.items() if weight is not None}
    terms = {name: scalar(weight * values[name]) for name, weight in weights.items()}
    return scalar(case["task_loss"]), terms, weights


def capped_cases(guard_vectors: dict[str, Any]) -> list[dict[str, Any]]:
    """The cases in which a cap is on, at a ratio that a share can have."""
    return [case for case in guard_vectors["meta_cap"] if case["enabled"] and case["ratio"] < 1]


def test_the_share_is_kept_as_it_should_be_in_every_recorded_case(guard_vectors: dict[str, Any]) -> None:
    """The right formula: factor and share, with 0 where there is no task loss to compare with."""
    for case in capped_cases(guard_vectors):
        if case["name"] == "nan_aux":  # ours leaves the term out, see below
            continue
        task, terms, _ = recorded(case)
        cap = meta_loss_cap(task, terms, case["ratio"])
        expected = case["corrected"]
        assert cap.factor.item() == pytest.approx(expected["factor"], rel=1e-12), case["name"]
        if expected["share"] is not None:
            assert cap.share_after.item() == pytest.approx(expected["share"], rel=1e-12), case["name"]


def test_the_references_rule_by_name_gives_what_the_reference_gave(guard_vectors: dict[str, Any]) -> None:
    """Factor, limit and share of every recorded case, also where the share is not kept."""
    for case in capped_cases(guard_vectors):
        task, terms, weights = recorded(case)
        cap = meta_loss_cap(task, terms, case["ratio"], rule="reference", weights=weights)
        assert cap.factor.item() == pytest.approx(case["out"]["factor"], rel=1e-12), case["name"]
        if case["out"]["max_meta_contribution"] is not None:
            assert cap.limit.item() == pytest.approx(case["out"]["max_meta_contribution"], rel=1e-12)
        if case["upstream_share"] is not None and math.isfinite(case["task_loss"]):
            assert cap.share_after.item() == pytest.approx(case["upstream_share"], rel=1e-12), case["name"]


def test_ratios_that_no_share_can_have_are_refused(guard_vectors: dict[str, Any]) -> None:
    """The reference divides by zero at 1, and takes a negative limit above it."""
    cases = [case for case in guard_vectors["meta_cap"] if case["ratio"] >= 1]
    assert {case["ratio"] for case in cases} == {1.0, 1.5}
    for case in cases:
        with pytest.raises(ValueError, match=r"ratio must be in \[0, 1\)"):
            meta_loss_cap(recorded(case)[0], recorded(case)[1], case["ratio"])


@pytest.mark.parametrize(
    "task, loo, raw, by_reference, capped_share",
    [
        (0.17, 1.4706, 0.409, 0.263, 0.25),
        (0.17, 3.0, 0.585, 0.421, 0.25),
        (0.17, 10.0, 0.825, 0.708, 0.25),
        (0.17, 0.1, 0.045, 0.024, 0.045),  # the reference scales without need
        (1.0, 10.0, 0.444, 0.444, 0.25),  # and here not at all
    ],
)
def test_the_share_is_bounded_whatever_the_terms_are_worth(
    task, loo, raw, by_reference, capped_share
) -> None:
    """The published example (40.9 %) and four others, without a cap, with the reference's, and with ours."""
    terms = {"loo": scalar(0.08 * loo), "equivariance": scalar(0.03 * 0.0)}
    weights = {"loo": 0.08, "equivariance": 0.03}
    cap = meta_loss_cap(scalar(task), terms, 0.25)
    reference = meta_loss_cap(scalar(task), terms, 0.25, rule="reference", weights=weights)
    assert cap.share_before.item() == reference.share_before.item() == pytest.approx(raw, abs=6e-4)
    assert reference.share_after.item() == pytest.approx(by_reference, abs=6e-4)
    assert cap.share_after.item() == pytest.approx(capped_share, abs=6e-4)


# --- the formula ---------------------------------------------------------------------------------

POSITIVE = st.floats(1e-6, 1e6)
AT_LEAST_ZERO = st.just(0.0) | POSITIVE


@given(POSITIVE, st.lists(AT_LEAST_ZERO, min_size=1, max_size=4), st.just(0.0) | st.floats(1e-6, 0.99))
def test_no_share_exceeds_the_ratio(task, terms, ratio) -> None:
    """And where the cap binds, the share is the ratio; where it does not, nothing changes."""
    cap = meta_loss_cap(scalar(task), [scalar(term) for term in terms], ratio)
    assert cap.share_after.item() <= ratio * (1 + 1e-9)
    if cap.factor.item() == 1.0:
        assert cap.share_after.item() == cap.share_before.item()
    else:
        assert cap.share_after.item() == pytest.approx(ratio, rel=1e-9)
    assert cap.share_before.item() == pytest.approx(sum(terms) / (task + sum(terms)), rel=1e-9)


@given(POSITIVE, st.floats(1e-3, 1e6), st.floats(0.01, 0.99), st.floats(1e-4, 1e4))
def test_the_factor_does_not_depend_on_units(task, term, ratio, scale) -> None:
    """Task and auxiliaries in other units: the same factor. The reference's changes with the units."""
    cap = meta_loss_cap(scalar(task), [scalar(term)], ratio)
    scaled = meta_loss_cap(scalar(task * scale), [scalar(term * scale)], ratio)
    assert scaled.factor.item() == pytest.approx(cap.factor.item(), rel=1e-9)


@pytest.mark.parametrize("task", [0.0, -0.0, -1.0, NAN, INF, -INF], ids=str)
def test_without_a_task_loss_to_compare_with_the_floor_holds(task) -> None:
    """0 by default, and continuously so: a task loss just above 0 gives nearly the same."""
    terms = [scalar(1.0)]
    assert meta_loss_cap(scalar(task), terms, 0.25).factor.item() == 0.0
    assert meta_loss_cap(scalar(1e-9), terms, 0.25).factor.item() == pytest.approx(0.0, abs=1e-9)
    assert meta_loss_cap(scalar(task), terms, 0.25, floor=0.02).factor.item() == 0.02


def test_a_floor_keeps_the_terms_alive_and_breaks_the_bound() -> None:
    """What the docstring says: 90.9 % at the reference's floor, the ratio without one."""
    task, terms = scalar(1e-3), [scalar(1.0)]
    assert meta_loss_cap(task, terms, 0.25, floor=0.01).share_after.item() == pytest.approx(0.909, abs=1e-3)
    assert meta_loss_cap(task, terms, 0.25).share_after.item() == pytest.approx(0.25)
    assert meta_loss_cap(scalar(1.0), terms, 0.25, floor=0.01).share_after.item() == pytest.approx(0.25)


def test_ratio_zero_excludes_the_auxiliaries() -> None:
    """The reference never goes below 0.01."""
    cap = meta_loss_cap(scalar(0.2), [scalar(0.6)], 0.0)
    assert (cap.factor.item(), cap.share_after.item()) == (0.0, 0.0)


@pytest.mark.parametrize("bad", [NAN, INF, -INF], ids=str)
def test_a_term_that_is_not_finite_is_left_out_and_counted(guard_vectors: dict[str, Any], bad) -> None:
    """The others are capped as if it were not there, in the recorded case with a nan as well."""
    alone = meta_loss_cap(scalar(0.17), [scalar(3.0)], 0.25)
    cap = meta_loss_cap(scalar(0.17), [scalar(bad), scalar(3.0)], 0.25)
    assert cap.excluded.item() == 1.0
    assert alone.excluded.item() == 0.0
    assert (cap.factor, cap.share_after) == (alone.factor, alone.share_after)
    (case,) = [case for case in guard_vectors["meta_cap"] if case["name"] == "nan_aux"]
    task, terms, _ = recorded(case)
    cap = meta_loss_cap(task, terms, case["ratio"])
    assert (cap.excluded.item(), cap.factor.item()) == (1.0, 1.0)
    assert cap.contribution.item() == pytest.approx(0.1 * 0.1)


def test_a_negative_sum_is_flagged_and_not_capped() -> None:
    """A share of it would mean nothing."""
    cap = meta_loss_cap(scalar(0.1), [scalar(-5.0)], 0.25)
    assert (bool(cap.negative), cap.factor.item()) == (True, 1.0)
    assert not meta_loss_cap(scalar(0.1), [scalar(0.0)], 0.25).negative


def test_no_auxiliaries_are_a_share_of_nothing() -> None:
    """Nothing to scale, nothing to divide by, with and without a task loss."""
    for task in (0.0, 1.0):
        cap = meta_loss_cap(scalar(task), {}, 0.25)
        assert (cap.share_before.item(), cap.share_after.item(), cap.excluded.item()) == (0.0, 0.0, 0.0)


def test_many_trials_are_capped_at_once() -> None:
    """One entry a trial, ratios and floors of their own, also under vmap: each as if it were alone."""
    task = torch.tensor([0.17, 1.0, 0.0, NAN, 0.17], dtype=F64)
    terms = {"a": torch.tensor([3.0, 0.1, 1.0, 1.0, NAN], dtype=F64), "b": torch.ones(5, dtype=F64)}
    ratio = torch.tensor([0.25, 0.5, 0.25, 0.25, 0.1], dtype=F64)
    floor = torch.tensor([0.0, 0.0, 0.01, 0.0, 0.5], dtype=F64)
    together = meta_loss_cap(task, terms, ratio, floor=floor)
    mapped = torch.vmap(lambda *row: meta_loss_cap(row[0], list(row[1:3]), row[3], floor=row[4]))(
        task, *terms.values(), ratio, floor
    )
    for name, value in together._asdict().items():
        assert torch.equal(getattr(mapped, name).nan_to_num(), value.nan_to_num())
    for k in range(5):
        alone = meta_loss_cap(
            task[k], [term[k] for term in terms.values()], ratio[k].item(), floor=floor[k].item()
        )
        for name, value in together._asdict().items():
            assert value[k].item() == pytest.approx(getattr(alone, name).item(), nan_ok=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_half_precision_does_not_overflow_the_limit(dtype) -> None:
    """Limits and factors are computed in float32 at least."""
    cap = meta_loss_cap(torch.tensor(1000.0, dtype=dtype), [torch.tensor(60000.0, dtype=dtype)], 0.99)
    assert cap.factor.dtype == torch.float32
    assert cap.limit.item() == pytest.approx(99000.0, rel=1e-3)
    assert cap.factor.item() == 1.0


BAD_ARGUMENTS: list[tuple[str, Any, str]] = [
    ("ratio", {"ratio": 1.0}, r"ratio must be in \[0, 1\), got ratio=1.0"),
    ("ratio above", {"ratio": 1.5}, r"ratio must be in \[0, 1\), got ratio=1.5"),
    ("ratio below", {"ratio": -0.1}, r"ratio must be in \[0, 1\), got ratio=-0.1"),
    ("ratio nan", {"ratio": NAN}, r"ratio must be in \[0, 1\), got ratio=nan"),
    ("floor above", {"floor": 1.1}, r"floor must be in \[0, 1\], got floor=1.1"),
    ("floor below", {"floor": -1e-9}, r"floor must be in \[0, 1\], got floor=-1e-09"),
    ("floor nan", {"floor": NAN}, r"floor must be in \[0, 1\], got floor=nan"),
    ("rule", {"rule": "loose"}, "rule must be one of loss, reference, got rule='loose'"),
]


@pytest.mark.parametrize(
    "more, message", [row[1:] for row in BAD_ARGUMENTS], ids=[r[0] for r in BAD_ARGUMENTS]
)
def test_arguments_out_of_range_are_refused(more, message) -> None:
    """By the function and by the class that wraps it, at once."""
    settings = {"ratio": 0.25, **more}
    with pytest.raises(ValueError, match=message):
        meta_loss_cap(scalar(1.0), [scalar(1.0)], **settings)
    with pytest.raises(ValueError, match=message):
        Budget({"a": 1.0}, **settings)


@pytest.mark.parametrize("make", [BudgetGuard, lambda ratio, **more: GradientBudget([], ratio, **more)])
def test_a_currency_that_is_not_known_is_refused(make) -> None:
    """The message names those that are."""
    with pytest.raises(ValueError, match="currency must be one of loss, gradient.*, got currency='euro'"):
        make(0.25, currency="euro")
    with pytest.raises(ValueError, match="ratio must be in"):
        make(2.0)


def test_the_references_rule_needs_the_weights() -> None:
    """A term without one would silently count as nothing."""
    terms = {"a": scalar(1.0), "b": scalar(1.0)}
    with pytest.raises(ValueError, match="weight of every auxiliary, got none for 'b'; known: a"):
        meta_loss_cap(scalar(1.0), terms, 0.25, rule="reference", weights={"a": 0.1})


@pytest.mark.parametrize(
    "task, auxiliary, expected",
    [
        (1.0, 1.0, 1 / 3),
        (1.0, 0.1, 1.0),
        (1.0, 0.0, 1.0),
        (0.0, 1.0, 0.0),
        (NAN, 1.0, 0.0),
        (INF, 1.0, 0.0),
        (1.0, NAN, 0.0),
        (1.0, INF, 0.0),
    ],
)
def test_gradients_are_capped_by_their_norms(task, auxiliary, expected) -> None:
    """f = min(1, r/(1-r) * |g_task| / |g_aux|); a gradient that is not finite is left out."""
    cap = gradient_cap(scalar(task), scalar(auxiliary), 0.25)
    assert cap.factor.item() == pytest.approx(expected)
    assert cap.excluded.item() == (not math.isfinite(auxiliary))
    assert gradient_cap(scalar(0.0), scalar(1.0), 0.25, floor=0.1).factor.item() == 0.1


# --- alone, in any training step -----------------------------------------------------------------


def test_a_budget_scales_the_gradient_as_it_scales_the_loss() -> None:
    """The factor is a constant of the step: no gradient flows through it."""
    x = scalar(2.0).requires_grad_()
    budget = Budget({"far": 0.5, "near": 2.0}, ratio=0.25)
    total, cap = budget.total(x**2, {"far": x**4, "near": x})
    assert cap.share_before.item() == pytest.approx(12 / 16)
    assert total.item() == pytest.approx(4 / 0.75)
    total.backward()
    factor = cap.factor.item()
    assert x.grad.item() == pytest.approx(2 * 2 + factor * (0.5 * 4 * 8 + 2.0))
    with pytest.raises(ValueError, match="unknown loss 'fra'; known: far, near"):
        budget.total(x**2, {"fra": x})


def poisoned(x: Tensor) -> Tensor:
    """0/0: neither the value nor the gradient is finite."""
    return (x - x) / (x - x)


def test_a_term_that_is_not_finite_leaves_no_trace_in_the_gradient() -> None:
    """Multiplied by 0, or masked after the fact, its gradient would still be nan."""
    x = scalar(2.0).requires_grad_()
    total, cap = Budget({"bad": 1.0, "good": 1.0}, 0.5).total(x**2, {"bad": poisoned(x), "good": x})
    total.backward()
    assert cap.excluded.item() == 1.0
    assert x.grad.item() == 4.0 + 1.0


def test_terms_of_many_trials_are_replaced_where_they_are_not_finite() -> None:
    """One entry a trial: a neighbour's nan leaves the others as they were."""
    terms = LossTerms(torch.ones(3), {"a": torch.tensor([1.0, NAN, 2.0])})
    assert capped(terms, torch.tensor([0.5, 0.5, 1.0])).auxiliaries["a"].tolist() == [0.5, 0.0, 2.0]


class Pieces:
    """A task loss and auxiliaries in two pieces, of one linear layer."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(6, 3, generator=generator, dtype=F64)
        self.model = nn.Linear(3, 1, dtype=F64)
        with torch.no_grad():
            self.model.weight.copy_(torch.randn(1, 3, generator=generator, dtype=F64))
            self.model.bias.fill_(0.3)

    def task(self) -> Tensor:
        return 0.01 * self.model(self.x).square().mean()

    def auxiliary(self, rows: slice) -> Tensor:
        return (self.model(self.x[rows]) - 2.0).square().mean()

    def gradients(self) -> Tensor:
        return torch.cat([parameter.grad.flatten() for parameter in self.model.parameters()])

    def gradient_of(self, loss: Tensor) -> Tensor:
        return torch.cat([part.flatten() for part in torch.autograd.grad(loss, self.model.parameters())])


@pytest.mark.parametrize("currency", ["loss", "gradient"])
@pytest.mark.parametrize("task_first", [True, False])
def test_gradients_made_before_the_values_are_known_are_scaled_exactly(currency, task_first) -> None:
    """Back-propagated piece by piece, the gradient is that of the capped total."""
    pieces = Pieces()
    budget = GradientBudget(pieces.model.parameters(), 0.25, currency=currency)
    if task_first:
        pieces.task().backward()
    for rows in (slice(0, 3), slice(3, 6)):
        with budget.auxiliary("loo") as spent:
            loss = 0.5 * pieces.auxiliary(rows)
            loss.backward()
            spent.add(loss)
    if not task_first:
        assert all(parameter.grad is None for parameter in pieces.model.parameters())
        pieces.task().backward()
    cap = budget.merge(pieces.task())
    whole = 0.5 * (pieces.auxiliary(slice(0, 3)) + pieces.auxiliary(slice(3, 6)))
    task, beside = pieces.gradient_of(pieces.task()), pieces.gradient_of(whole)
    if currency == "loss":
        expected = (pieces.task() / 3 / whole).item()
    else:
        expected = (task.norm() / 3 / beside.norm()).item()
    assert cap.factor.item() == pytest.approx(expected)
    assert expected < 1
    assert cap.share_after.item() == pytest.approx(0.25)
    assert torch.allclose(pieces.gradients(), task + expected * beside)
    pieces.model.zero_grad()
    pieces.task().backward()
    assert budget.merge(pieces.task()).contribution.item() == 0.0  # nothing is left over
    assert torch.allclose(pieces.gradients(), task)


@pytest.mark.parametrize("currency", ["loss", "gradient"])
def test_a_buffer_that_is_not_finite_is_left_out_exactly(currency) -> None:
    """In its loss or only in its gradient: the other buffers and the task go on."""
    pieces = Pieces()
    budget = GradientBudget(pieces.model.parameters(), 0.25, currency=currency)
    for name, spoil in (("good", None), ("bad loss", NAN), ("bad gradient", 1.0)):
        with budget.auxiliary(name) as spent:
            loss = 0.5 * pieces.auxiliary(slice(0, 6))
            loss.backward()
            spent.add(loss if spoil is None else loss * spoil)
        if name == "bad gradient":
            spent.gradients[0][0, 1] = INF
    pieces.task().backward()
    cap = budget.merge(pieces.task())
    assert cap.excluded.item() == 2.0
    assert cap.contribution.item() == pytest.approx(
        0.5 * pieces.auxiliary(slice(0, 6)).item()
        if currency == "loss"
        else 0.5 * pieces.gradient_of(pieces.auxiliary(slice(0, 6))).norm().item()
    )
    good = 0.5 * pieces.gradient_of(pieces.auxiliary(slice(0, 6)))
    task = pieces.gradient_of(pieces.task())
    assert torch.allclose(pieces.gradients(), task + cap.factor * good)


def test_a_buffer_without_its_loss_cannot_be_capped_by_value() -> None:
    """Nobody told what it is worth."""
    pieces = Pieces()
    budget = GradientBudget(pieces.model.parameters(), 0.25)
    with budget.auxiliary("loo"):
        pieces.auxiliary(slice(0, 6)).backward()
    with pytest.raises(ValueError, match="loss of 'loo' must be told by add"):
        budget.merge(pieces.task())


# --- what the currencies keep --------------------------------------------------------------------


def conflict(rule: str | None, scale: float, steps: int = 120) -> dict[str, float]:
    """Train a small classifier beside one of random labels; weight 0.11, the loss times `scale`.

    Returns accuracy and the largest share of the auxiliary over the last 60 steps, in both currencies.
    """
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(256, 8, generator=generator)
    labels = (x @ torch.randn(8, generator=generator) > 0).long()
    noise = torch.randint(0, 2, (256,), generator=generator)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2))
    parameters = list(model.parameters())
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    shares: list[tuple[float, float]] = []
    for step in range(steps):
        logits = model(x)
        task = functional.cross_entropy(logits, labels)
        beside = 0.11 * scale * functional.cross_entropy(logits, noise)
        own = torch.autograd.grad(task, parameters, retain_graph=True)
        other = torch.autograd.grad(beside, parameters)
        norms = [torch.nn.utils.get_total_norm(list(part)) for part in (own, other)]
        cap: Cap | None = None
        if rule == "gradient":
            cap = gradient_cap(norms[0], norms[1], 0.25)
        elif rule is not None:
            cap = meta_loss_cap(task, {"noise": beside}, 0.25, rule=rule, weights={"noise": 0.11})
        factor = 1.0 if cap is None else cap.factor.item()
        if step >= steps - 60:
            pairs = ((task.item(), beside.item()), (norms[0].item(), norms[1].item()))
            shares.append(tuple(factor * b / (a + factor * b) for a, b in pairs))
        for parameter, a, b in zip(parameters, own, other, strict=True):
            parameter.grad = a + factor * b
        optimizer.step()
    return {
        "accuracy": (model(x).argmax(-1) == labels).float().mean().item(),
        "loss": max(share[0] for share in shares),
        "gradient": max(share[1] for share in shares),
    }


def test_a_task_survives_a_large_auxiliary_that_contradicts_it() -> None:
    """Random labels, ten times as loud: without a cap, and with the reference's, the task is not learned."""
    free, reference = conflict(None, 10.0), conflict("reference", 10.0)
    by_loss, by_gradient = conflict("loss", 10.0), conflict("gradient", 10.0)
    assert free["accuracy"] < 0.9
    assert free["loss"] > 0.5
    assert reference == free  # the weight alone never exceeds the limit
    assert by_loss["accuracy"] > 0.97
    assert by_loss["loss"] == pytest.approx(0.25, abs=1e-6)
    assert by_gradient["accuracy"] > 0.97
    assert by_gradient["gradient"] == pytest.approx(0.25, abs=1e-5)
    # One currency does not bound the other.
    assert by_gradient["loss"] > 0.27


# --- in the trainer ------------------------------------------------------------------------------


class Line(nn.Module):
    """P a line of x, Q one."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.5, -0.2], dtype=F64))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map (B, 2) to two (B,)."""
        P = x @ self.weight
        return P, torch.ones_like(P)


def loud(outputs: tuple[Tensor, Tensor], lifted: tuple[Tensor, Tensor]) -> LossTerms:
    """A fit, and a term beside it that is worth a hundred times as much."""
    fit = (outputs[0] - lifted[0]).square().mean()
    return LossTerms(fit, {"loud": 100.0 * (outputs[0] - 1.0).square().mean()})


def rows(seed: int = 0, count: int = 32) -> list[tuple[Tensor, Tensor]]:
    """Four batches of a line."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 2, generator=generator, dtype=F64)
    y = x @ torch.tensor([1.0, 2.0], dtype=F64)
    return list(zip(x.split(8), y.split(8), strict=True))


def trained(guard: BudgetGuard | None, loss: Any = loud, epochs: int = 2, **more: Any) -> SCMTrainer:
    """Train a line beside a loud term."""
    model = Line()
    config = TrainingConfig(max_epochs=epochs, coverage_threshold=0.0, **more)
    companions = [] if guard is None else [guard]
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    trainer = SCMTrainer(model, optimizer, loss, rows(), config=config, companions=companions)
    trainer.fit()
    return trainer


@pytest.mark.parametrize("currency", ["loss", "gradient"])
def test_a_guard_keeps_the_share_in_every_step_of_a_training(currency) -> None:
    """What it says of itself, and what the weights became: the fit is learned, and is not without."""
    trainer = trained(BudgetGuard(0.25, currency=currency), epochs=30)
    said = trainer.telemetry()
    assert said["cap_share_before"] > 0.8
    assert said["cap_share_after"] == pytest.approx(0.25)
    assert said["cap_active_share"] == 1.0
    assert 0 < said["cap_factor"] < 0.02
    assert (said["cap_excluded"], said["cap_negative"]) == (0.0, 0.0)
    goal = torch.tensor([1.0, 2.0], dtype=F64)
    assert (trainer.model.weight - goal).norm() < 0.4 * (trained(None, epochs=30).model.weight - goal).norm()


@pytest.mark.parametrize("currency", ["loss", "gradient"])
@pytest.mark.parametrize(
    "more", [{"mixed_precision": True}, {"gradient_accumulation_steps": 3}, {"clip_norm": 0.1}], ids=str
)
def test_the_share_is_kept_whatever_else_a_step_does(currency, more) -> None:
    """The reference caps in one branch of its loop alone: mixed precision, with a scaler, on a GPU."""
    said = trained(BudgetGuard(0.25, currency=currency), **more).telemetry()
    assert said["cap_share_before"] > 0.8
    assert said["cap_share_after"] == pytest.approx(0.25)


def test_a_step_is_scaled_by_the_factor_exactly() -> None:
    """One step of SGD beside the formula."""
    trainer = trained(BudgetGuard(0.25), epochs=1)
    model = Line()
    for x, y in rows():
        terms = loud(model(x), (y, torch.ones_like(y)))
        factor = (terms.task / 3 / terms.auxiliaries["loud"]).item()
        (gradient,) = torch.autograd.grad(terms.task + factor * terms.auxiliaries["loud"], model.parameters())
        with torch.no_grad():
            model.weight -= 1e-2 * gradient
    assert torch.allclose(model.weight, trainer.model.weight, rtol=1e-12)


def test_a_guard_that_never_binds_changes_nothing() -> None:
    """A quiet term: the training with the guard is the training without it."""

    def quiet(outputs: tuple[Tensor, Tensor], lifted: tuple[Tensor, Tensor]) -> LossTerms:
        terms = loud(outputs, lifted)
        return LossTerms(terms.task, {"quiet": 1e-5 * terms.auxiliaries["loud"]})

    trainer = trained(BudgetGuard(0.25), quiet)
    assert torch.equal(trainer.model.weight, trained(None, quiet).model.weight)
    assert trainer.telemetry()["cap_factor"] == 1.0
    assert trainer.telemetry()["cap_active_share"] == 0.0


def test_the_references_rule_takes_the_weights_of_the_step_first() -> None:
    """Those that a curriculum or a controller has set, before those it was made with."""
    guard = BudgetGuard(0.5, currency="reference", weights={"loud": 0.0})
    terms = LossTerms(scalar(1.0), {"loud": scalar(3.0)})
    moment = Moment(Line(), None, {"loss_weights": {"loud": 4.0}}, terms=terms)
    guard.after_loss(moment)
    assert moment.terms.auxiliaries["loud"].item() == 3.0 / 4.0
    moment = Moment(Line(), None, {"loss_weights": None}, terms=terms)
    guard.after_loss(moment)
    assert moment.terms.auxiliaries["loud"].item() == 3.0


@pytest.mark.parametrize("currency", ["loss", "gradient"])
def test_a_poisoned_auxiliary_stops_no_training(currency) -> None:
    """Its value and its gradient are nan: the step is taken on the rest, and the term is counted."""

    def with_poison(outputs: tuple[Tensor, Tensor], lifted: tuple[Tensor, Tensor]) -> LossTerms:
        terms = loud(outputs, lifted)
        terms.auxiliaries["poison"] = poisoned(outputs[0].sum())
        return terms

    trainer = trained(BudgetGuard(0.25, currency=currency), with_poison)
    assert trainer.telemetry()["cap_excluded"] == 8.0
    assert trainer.nan_counts == {"loss": 0, "gradient": 0, "output": 0, "parameter": 0}
    expected = trained(BudgetGuard(0.25, currency=currency)).model.weight
    assert torch.allclose(trainer.model.weight, expected, rtol=1e-12)


def test_what_a_guard_said_goes_on_in_mid_epoch(tmp_path) -> None:
    """Interrupted after some batches and gone on with: the same telemetry as without."""
    expected = trained(BudgetGuard(0.25))

    def stop_at(record: Any) -> None:
        if record["step"] == 6:
            interrupted[0].save_checkpoint(tmp_path / "mid.pt")

    def make(hook: Any) -> SCMTrainer:
        model = Line()
        config = TrainingConfig(max_epochs=2, coverage_threshold=0.0, log_hook=hook, log_interval=1)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        return SCMTrainer(model, optimizer, loud, rows(), config=config, companions=[BudgetGuard(0.25)])

    interrupted = [make(stop_at)]
    interrupted[0].fit()
    resumed = make(lambda record: None)
    resumed.load_checkpoint(tmp_path / "mid.pt")
    resumed.fit()
    assert resumed.telemetry() == expected.telemetry()
    assert torch.equal(resumed.model.weight, expected.model.weight)


def test_a_guard_has_nothing_to_say_before_the_first_step() -> None:
    """Means of nothing are nan, counts are 0."""
    said = BudgetGuard(0.25).telemetry()
    counts = {name: said.pop(name) for name in ("cap_excluded", "cap_negative")}
    assert counts == {"cap_excluded": 0.0, "cap_negative": 0.0}
    assert all(math.isnan(value) for value in said.values())
    assert len(said) == 4


# --- on a GPU ------------------------------------------------------------------------------------

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class Unread:
    """Batches on the device, during which nothing may be read back from it."""

    def __init__(self, batches: list[tuple[Tensor, Tensor]]) -> None:
        self.batches = [(x.cuda(), y.cuda()) for x, y in batches]

    def __iter__(self) -> Any:
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield from self.batches
        finally:
            torch.cuda.set_sync_debug_mode("default")


@needs_gpu
@pytest.mark.parametrize("currency", ["loss", "gradient"])
@pytest.mark.parametrize("poison", [False, True], ids=["finite", "poisoned"])
def test_on_a_gpu_the_share_is_kept_without_waiting(currency, poison) -> None:
    """The same as on the CPU; a term whose value is nan is left out, and counted, without a look at it."""

    def loss(outputs: tuple[Tensor, Tensor], lifted: tuple[Tensor, Tensor]) -> LossTerms:
        terms = loud(outputs, lifted)
        if poison:  # the value alone: its gradient is 0 where the term is left out
            terms.auxiliaries["poison"] = outputs[0].sum() * 0.0 + torch.full_like(outputs[0].sum(), NAN)
        return terms

    said, weights = [], []
    for device, loader in (("cpu", rows()), ("cuda", Unread(rows()))):
        model = Line().to(device)
        config = TrainingConfig(max_epochs=2, coverage_threshold=0.0, device=device)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, fused=True)
        guard = BudgetGuard(0.25, currency=currency)
        trainer = SCMTrainer(model, optimizer, loss, loader, config=config, companions=[guard])
        trainer.fit()
        said.append(trainer.telemetry())
        weights.append(trainer.model.weight.detach().cpu())
    assert said[1] == pytest.approx(said[0], rel=1e-9)
    assert said[1]["cap_excluded"] == (8.0 if poison else 0.0)
    assert torch.allclose(weights[1], weights[0], rtol=1e-9)


@needs_gpu
def test_on_a_gpu_buffers_are_merged_without_waiting() -> None:
    """Including those that are left out."""
    x = torch.ones(3, device="cuda", requires_grad=True)
    budget = GradientBudget([x], 0.25, currency="gradient")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for name, scale in (("good", 1.0), ("bad", NAN)):
            with budget.auxiliary(name) as spent:
                loss = 10.0 * scale * x.sum()
                loss.backward()
                spent.add(loss)
        task = x.square().sum()
        task.backward()
        cap = budget.merge(task)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert cap.excluded.item() == 1.0
    assert x.grad.tolist() == pytest.approx([2.0 + 2.0 / 3] * 3)
