"""The ranked coverage term: what it asks of which rows, its gradient, and its place in the objective."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from scm.losses.coverage import ranked_coverage_loss, soft_coverage_loss
from scm.losses.training import LossConfig, SCMTrainingLoss

values = st.lists(st.floats(-1, 1).map(lambda x: round(x, 3)), min_size=1, max_size=12)
shares = st.floats(0, 1)


def by_hand(Q: list[float], edge: float, target: float, weights: list[float] | None = None) -> float:
    """The same sum, row by row."""
    weights = [1.0] * len(Q) if weights is None else weights
    total, before, lost = sum(weights), 0.0, 0.0
    for size, weight in sorted(zip(map(abs, Q), weights, strict=True), reverse=True):
        asked = min(max(target * total - before, 0.0), weight)
        lost += asked * max(1 - size / edge, 0.0)
        before += weight
    return lost / total if total else 0.0


@given(Q=values, target=shares, tau=st.floats(0, 0.5), margin=st.floats(0.01, 0.5))
def test_it_is_what_the_asked_share_lacks(Q: list[float], target: float, tau: float, margin: float) -> None:
    """The formula, in [0, target], and 0 exactly where the share is above the threshold and its margin."""
    held = torch.tensor(Q, dtype=torch.float64)
    loss = float(ranked_coverage_loss(held, tau, margin, target))
    assert loss == pytest.approx(by_hand(Q, tau + margin, target), abs=1e-12)
    assert 0.0 <= loss <= target + 1e-12


@given(Q=values, target=shares, data=st.data())
def test_weights_are_numbers_of_rows(Q: list[float], target: float, data: st.DataObject) -> None:
    """A weight of 2 is the row twice, one of 0 no row; all weights scaled change nothing."""
    counts = data.draw(st.lists(st.integers(0, 3), min_size=len(Q), max_size=len(Q)))
    held, weights = torch.tensor(Q, dtype=torch.float64), torch.tensor(counts, dtype=torch.float64)
    repeated = held.repeat_interleave(weights.long())
    plain = ranked_coverage_loss(repeated, 0.3, 0.1, target)
    for scale in (1.0, 0.25):
        weighted = ranked_coverage_loss(held, 0.3, 0.1, target, row_weights=scale * weights)
        assert float(weighted) == pytest.approx(float(plain), abs=1e-12)


@given(Q=values, target=shares, data=st.data())
def test_rows_outside_of_the_mask_are_no_rows(Q: list[float], target: float, data: st.DataObject) -> None:
    """Whatever they hold; they get no gradient."""
    kept = data.draw(st.lists(st.booleans(), min_size=len(Q), max_size=len(Q)))
    mask = torch.tensor(kept)
    held = torch.tensor(Q, dtype=torch.float64)
    spoilt = torch.where(mask, held, math.nan).requires_grad_()
    loss = ranked_coverage_loss(spoilt, 0.3, 0.1, target, mask=mask)
    assert float(loss.detach()) == pytest.approx(
        float(ranked_coverage_loss(held[mask], 0.3, 0.1, target)), abs=1e-12
    )
    (gradient,) = torch.autograd.grad(loss, spoilt)
    assert torch.equal(gradient[~mask], torch.zeros(len(Q))[~mask].double())


def test_the_gradient_is_that_of_the_formula() -> None:
    """Against differences, once and twice, with and without masks and weights."""
    drawn = torch.Generator().manual_seed(0)
    Q = torch.randn(9, generator=drawn, dtype=torch.float64).requires_grad_()
    mask = torch.rand(9, generator=drawn) > 0.3
    weights = torch.rand(9, generator=drawn, dtype=torch.float64)
    for options in ({}, {"mask": mask}, {"row_weights": weights}, {"mask": mask, "row_weights": weights}):

        def loss(q: Tensor, options: dict[str, Any] = options) -> Tensor:
            return ranked_coverage_loss(q, 0.5, 0.4, 0.7, **options)

        assert torch.autograd.gradcheck(loss, (Q,))


def test_rows_far_below_the_threshold_are_pulled_like_those_close_to_it() -> None:
    """Where the soft term of a small temperature has no gradient left; zeros go to the side of their sign."""
    Q = torch.tensor([0.4, -0.3, 0.05, -1e-6, 0.0, -0.0], requires_grad=True)
    (ranked,) = torch.autograd.grad(ranked_coverage_loss(Q, 0.5, 0.1, 1.0), Q)
    assert torch.allclose(ranked.abs(), torch.full((6,), 1 / 6 / 0.6))
    assert torch.equal(ranked.sign(), torch.tensor([-1.0, 1.0, -1.0, 1.0, -1.0, 1.0]))
    (soft,) = torch.autograd.grad(soft_coverage_loss(Q, 0.5, 1e-2, 1.0), Q)
    assert soft.abs()[2:].max() < 1e-15


def test_of_rows_that_are_alike_only_the_share_is_pulled() -> None:
    """The largest ones; the last of them in part, and those beyond not at all."""
    Q = torch.full((8,), 0.1, requires_grad=True)
    (gradient,) = torch.autograd.grad(ranked_coverage_loss(Q, 0.5, 0.5, 0.3), Q)
    found = sorted((-8 * gradient).tolist(), reverse=True)
    assert found == pytest.approx([1.0, 1.0, 0.4, 0.0, 0.0, 0.0, 0.0, 0.0])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_denominator_that_is_not_finite_is_not_covered(bad: float) -> None:
    """It lacks all, has no gradient, and leaves the others theirs."""
    Q = torch.tensor([bad, 0.2, 1.0], requires_grad=True)
    loss = ranked_coverage_loss(Q, 0.5, 0.5, 1.0)
    assert float(loss.detach()) == pytest.approx((1.0 + 0.8) / 3)
    (gradient,) = torch.autograd.grad(loss, Q)
    assert gradient.tolist() == pytest.approx([0.0, -1 / 3, 0.0])


def test_many_trials_at_once_are_each_of_them_alone() -> None:
    """Under vmap, with thresholds, margins and targets of their own."""
    drawn = torch.Generator().manual_seed(0)
    Q = torch.randn(5, 16, generator=drawn, dtype=torch.float64)
    tau, margin, target = (torch.rand(5, generator=drawn, dtype=torch.float64) * 0.5 + 0.1 for _ in range(3))
    together = torch.vmap(torch.func.grad_and_value(ranked_coverage_loss))(Q, tau, margin, target)
    for k in range(5):
        one = torch.func.grad_and_value(ranked_coverage_loss)(
            Q[k], float(tau[k]), float(margin[k]), float(target[k])
        )
        assert torch.allclose(together[0][k], one[0], rtol=1e-12, atol=0)
        assert torch.allclose(together[1][k], one[1], rtol=1e-12, atol=0)


@pytest.mark.parametrize("rows", [0, 3])
def test_of_no_rows_nothing_is_asked(rows: int) -> None:
    """No rows at all, or none in the mask."""
    Q = torch.zeros(rows, requires_grad=True)
    loss = ranked_coverage_loss(Q, 0.5, 0.5, 1.0, mask=torch.zeros(rows, dtype=torch.bool))
    assert float(loss.detach()) == 0.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-0.1, 0.1, 0.5), "tau must be finite and >= 0"),
        ((0.1, 0.0, 0.5), "margin must be > 0"),
        ((0.1, math.nan, 0.5), "margin must be finite"),
        ((0.1, 0.1, 1.5), "target must be in"),
    ],
    ids=["tau", "no margin", "nan margin", "target"],
)
def test_thresholds_that_cannot_be_right_are_refused(arguments: tuple[float, ...], message: str) -> None:
    """Plain numbers are checked."""
    with pytest.raises(ValueError, match=message):
        ranked_coverage_loss(torch.zeros(2), *arguments)


def test_the_objective_has_it_under_its_name() -> None:
    """`coverage_term="ranked"` weighs it as "rejection", at tau_train with the temperature as margin."""
    drawn = torch.Generator().manual_seed(0)
    P, Q = torch.randn(2, 12, generator=drawn, dtype=torch.float64)
    Y_n, Y_d = torch.randn(12, generator=drawn, dtype=torch.float64), torch.ones(12, dtype=torch.float64)
    trained = torch.rand(12, generator=drawn) > 0.2
    config = LossConfig(
        lambda_margin=0.0,
        lambda_sign=0.0,
        lambda_rej=3.0,
        coverage_term="ranked",
        coverage_temperature=0.2,
        target_coverage=0.9,
    )
    Q = Q.requires_grad_()
    fit = Q.square().sum()
    arguments: dict[str, Any] = {"mask_trained": trained, "tau_train": 0.6}
    total, parts = SCMTrainingLoss(config)(fit, P, Q, Y_n, Y_d, **arguments)
    alone = ranked_coverage_loss(Q, 0.6, 0.2, 0.9, mask=trained)
    assert float(parts["rejection"]) == float(alone.detach()) > 0
    assert torch.allclose(total, fit + 3 * alone, rtol=1e-14)
    (gradient,) = torch.autograd.grad(total, Q, retain_graph=True)
    (expected,) = torch.autograd.grad(fit + 3 * alone, Q)
    assert torch.allclose(gradient, expected, rtol=1e-14)
    apart = SCMTrainingLoss(config).terms(fit, P, Q, Y_n, Y_d, **arguments)
    assert torch.allclose(apart.auxiliaries["rejection"], 3 * alone, rtol=1e-14)
