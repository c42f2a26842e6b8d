"""Importance weights of rows: from a batch to every term, as if rows had been drawn that often."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from scm.losses.coverage import rejection_loss, soft_coverage_loss
from scm.losses.implicit import implicit_loss
from scm.losses.margin import margin_loss
from scm.losses.projective import projective_fit_loss
from scm.losses.quotient import quotient_loss
from scm.losses.separation import scm_separation_losses
from scm.losses.sign import sign_consistency_loss
from scm.losses.training import LossConfig, SCMTrainingLoss
from scm.training.feed import Feeder, LossCall
from scm.training.objective import FITS, ProjectiveObjective
from scm.training.targets import SemanticTargets, lift_semantic_targets
from scm.training.trainer import SCMTrainer, TrainingConfig

NAN = float("nan")
ROWS = 14


class Batch:
    """Answers and targets of a few rows; of every status, several outputs a row if asked."""

    def __init__(self, dtype: torch.dtype, outputs: int | None = None) -> None:
        drawn = torch.Generator().manual_seed(1)
        shape = (ROWS,) if outputs is None else (ROWS, outputs)
        self.P, self.Q, y = (torch.randn(shape, generator=drawn, dtype=dtype) for _ in range(3))
        self.Q = 0.3 * self.Q
        codes = torch.arange(self.P.numel()).reshape(shape) % 7
        self.targets = lift_semantic_targets(y, codes)

    def of(self, rows: Tensor) -> Batch:
        """The rows of these positions, repeats included."""
        made = object.__new__(Batch)
        made.P, made.Q, made.targets = self.P[rows], self.Q[rows], self.targets.index(rows)
        return made


Term = Callable[[Batch, Tensor, Tensor, "Tensor | None"], Tensor]


def fit_of(function: Callable[..., Tensor]) -> Term:
    def term(batch: Batch, P: Tensor, Q: Tensor, weights: Tensor | None) -> Tensor:
        lifted = (batch.targets.Y_n, batch.targets.Y_d)
        return function(P, Q, *lifted, mask=batch.targets.mask_trained, row_weights=weights)

    return term


def objective_of(fit: str, coverage_term: str = "soft") -> Term:
    def term(batch: Batch, P: Tensor, Q: Tensor, weights: Tensor | None) -> Tensor:
        config = LossConfig(
            coverage_term=coverage_term,
            lambda_push_down=1.0,
            lambda_push_up=1.0,
            tau_finite=0.4,
            lambda_rej=2.0,
        )
        lifted = (batch.targets.Y_n, batch.targets.Y_d)
        loss = ProjectiveObjective(SCMTrainingLoss(config), fit=fit)
        return loss((P, Q), lifted, tau=0.25, semantic_targets=batch.targets, row_weights=weights)

    return term


def in_terms(batch: Batch, P: Tensor, Q: Tensor, weights: Tensor | None) -> Tensor:
    loss = ProjectiveObjective(SCMTrainingLoss(LossConfig(coverage_term="soft")))
    lifted = (batch.targets.Y_n, batch.targets.Y_d)
    return loss.terms((P, Q), lifted, tau=0.25, semantic_targets=batch.targets, row_weights=weights).total()


TERMS: dict[str, Term] = {
    "projective": fit_of(projective_fit_loss),
    "implicit": fit_of(implicit_loss),
    "implicit, detached": fit_of(lambda *a, **k: implicit_loss(*a, detach_scale=True, **k)),
    "quotient": fit_of(lambda *a, **k: quotient_loss(*a, tau=0.1, **k)),
    "quotient, saturating": fit_of(lambda *a, **k: quotient_loss(*a, tau=0.1, hybrid_delta=0.3, **k)),
    "margin": lambda b, P, Q, w: margin_loss(Q, 0.4, b.targets.mask_finite, row_weights=w),
    "margin, conditional": lambda b, P, Q, w: margin_loss(
        Q, 0.4, b.targets.mask_finite, reduction="conditional", row_weights=w
    ),
    "sign": lambda b, P, Q, w: sign_consistency_loss(
        P, Q, b.targets.Y_n, b.targets.Y_d, mask_singular=b.targets.mask_oriented, row_weights=w
    ),
    "soft coverage": lambda b, P, Q, w: soft_coverage_loss(
        Q, 0.3, 0.1, 0.95, mask=b.targets.mask_trained, row_weights=w
    ),
    "hard coverage": lambda b, P, Q, w: rejection_loss(Q.abs() < 0.3, row_weights=w) + 0 * Q.sum(),
    "push down": lambda b, P, Q, w: scm_separation_losses(
        Q, mask_censored=b.targets.mask_bottom, mask_finite=b.targets.mask_finite, row_weights=w
    )[0],
    "push up": lambda b, P, Q, w: scm_separation_losses(
        Q, mask_censored=b.targets.mask_bottom, tau_finite=0.4, row_weights=w
    )[1],
    **{f"objective, {fit}": objective_of(fit) for fit in FITS},
    "objective, hard coverage": objective_of("projective", "hard"),
    "objective, in terms": in_terms,
}


def found(name: str, batch: Batch, weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and gradients in P and Q; zeros where a term has none."""
    P, Q = batch.P.clone().requires_grad_(), batch.Q.clone().requires_grad_()
    loss = TERMS[name](batch, P, Q, weights)
    by_p, by_q = torch.autograd.grad(loss, (P, Q), allow_unused=True)
    zero = torch.zeros_like(P)
    return loss.detach(), zero if by_p is None else by_p, zero if by_q is None else by_q


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("outputs", [None, 3], ids=["one output", "three"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_weights_of_one_change_nothing(dtype: torch.dtype, outputs: int | None, name: str) -> None:
    """Value and gradients are the same to the last bit, whatever dtype the weights have."""
    batch = Batch(dtype, outputs)
    plain = found(name, batch, None)
    for weights in (torch.ones(ROWS), torch.ones(ROWS, dtype=torch.float64)):
        assert all(torch.equal(a, b) for a, b in zip(plain, found(name, batch, weights), strict=True))


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("outputs", [None, 3], ids=["one output", "three"])
@settings(max_examples=10, deadline=None)
@given(counts=st.lists(st.integers(0, 3), min_size=ROWS, max_size=ROWS))
def test_a_row_of_weight_n_counts_as_n_rows(outputs: int | None, name: str, counts: list[int]) -> None:
    """Loss and summed gradients are those of the batch in which each row stands that often."""
    batch, often = Batch(torch.float64, outputs), torch.tensor(counts)
    repeated = torch.arange(ROWS).repeat_interleave(often)
    loss, by_p, by_q = found(name, batch, often.double())
    expected, *gradients = found(name, batch.of(repeated), None)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)
    for gradient, apart in zip((by_p, by_q), gradients, strict=True):
        summed = torch.zeros_like(gradient).index_add_(0, repeated, apart)
        torch.testing.assert_close(gradient, summed, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", TERMS)
def test_only_the_ratios_of_weights_matter(name: str) -> None:
    """All of them times a number is the same loss; none at all is a loss of nothing."""
    batch = Batch(torch.float64)
    weights = torch.linspace(0.1, 3, ROWS, dtype=torch.float64)
    for one, other in zip(found(name, batch, weights), found(name, batch, 7.5 * weights), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=0)
    nothing = found(name, batch, torch.zeros(ROWS))
    assert all(bool(torch.isfinite(item).all()) for item in nothing)
    assert not nothing[1].any()


@pytest.mark.parametrize("bad", [NAN, float("inf")])
@pytest.mark.parametrize("name", [name for name in TERMS if "hard" not in name])
def test_a_row_of_weight_zero_is_no_row(name: str, bad: float) -> None:
    """Even one that is not finite reaches neither the loss nor any gradient."""
    batch, weights = Batch(torch.float64), torch.ones(ROWS)
    weights[0] = 0
    clean = found(name, batch, weights)
    batch.P[0] = batch.Q[0] = bad
    spoiled = found(name, batch, weights)
    assert torch.equal(clean[0], spoiled[0])
    for one, other in zip(clean[1:], spoiled[1:], strict=True):
        assert torch.equal(one[1:], other[1:])


@pytest.mark.parametrize("fit", FITS)
def test_many_weightings_are_one_call(fit: str) -> None:
    """Under vmap each trial has weights of its own."""
    batch = Batch(torch.float64)
    weights = torch.rand(4, ROWS, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    term = objective_of(fit)

    def loss(Q: Tensor, weights: Tensor) -> Tensor:
        return term(batch, batch.P, Q, weights)

    gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(batch.Q, weights)
    for k in range(4):
        torch.testing.assert_close(gradients[k], found(f"objective, {fit}", batch, weights[k])[2])


def test_weights_of_other_rows_are_refused() -> None:
    """One entry a row."""
    batch = Batch(torch.float32)
    with pytest.raises(ValueError, match=r"row_weights must have one entry a row of \(14,\), got \(13,\)"):
        found("margin", batch, torch.ones(ROWS - 1))


def test_a_fit_of_one_s_own_takes_weights_or_refuses_them() -> None:
    """By the name of its parameter; silently trained without, they would not be missed."""
    batch, seen = Batch(torch.float64), []

    def weighed(P: Tensor, Q: Tensor, Y_n: Tensor, Y_d: Tensor, mask: Any, row_weights: Any = None) -> Tensor:
        seen.append(row_weights)
        return (P - Q).square().sum()

    def unaware(P: Tensor, Q: Tensor, Y_n: Tensor, Y_d: Tensor, mask: Any) -> Tensor:
        return (P - Q).square().sum()

    def call(fit: Any, weights: Tensor | None) -> None:
        lifted = (batch.targets.Y_n, batch.targets.Y_d)
        objective = ProjectiveObjective(SCMTrainingLoss(), fit=fit)
        objective((batch.P, batch.Q), lifted, tau=0.1, row_weights=weights)

    weights = torch.ones(ROWS)
    call(weighed, weights)
    call(weighed, None)
    assert seen[0] is weights
    assert seen[1] is None
    call(unaware, None)
    with pytest.raises(ValueError, match="fit must take row_weights"):
        call(unaware, weights)


# --- from the loader --------------------------------------------------------------------------------

X = torch.arange(28.0).reshape(ROWS, 2) / 10
W = torch.linspace(0.5, 2, ROWS)
AT = torch.arange(ROWS)


def targets(missing: bool = False) -> SemanticTargets:
    """Finite targets, or one that must not be trained among them."""
    codes = torch.zeros(ROWS, dtype=torch.int64)
    codes[3] = 5 if missing else 0
    return lift_semantic_targets(X.sum(1), codes)


def weighed(outputs: Any, lifted: Any, *, row_weights: Any) -> Tensor:
    return outputs[0].sum()


def feeder(loss: Any = weighed) -> Feeder:
    return Feeder(LossCall(loss), torch.device("cpu"), unreachable=False)


@pytest.mark.parametrize(
    "batch",
    [
        (X, targets(), {"row_weights": W, "indices": AT}),
        (X, X.sum(1), {"row_weights": W, "indices": AT}),
        (X, X.sum(1), ["finite"] * ROWS, {"row_weights": W, "indices": AT}),
        [X, X.sum(1), torch.zeros(ROWS, dtype=torch.int64), {"indices": AT, "row_weights": W}],
    ],
    ids=["lifted", "plain", "words", "codes in a list"],
)
def test_a_batch_may_say_more_of_its_rows(batch: Any) -> None:
    """A dict after any form of batch; it comes through as it is."""
    fed = feeder().prepare(batch)
    assert fed is not None
    assert set(fed.extras) == {"row_weights", "indices"}
    assert torch.equal(fed.extras["row_weights"], W)
    assert torch.equal(fed.extras["indices"], AT)
    assert fed.rows == ROWS


def test_a_third_tensor_of_floats_is_row_weights() -> None:
    """(x, SemanticTargets, w) is short for the dict with one entry; without it there are none."""
    fed = feeder().prepare((X, targets(), W))
    assert fed is not None
    assert list(fed.extras) == ["row_weights"]
    plain = feeder().prepare((X, targets()))
    assert plain is not None
    assert not plain.extras


def test_what_is_said_of_rows_that_are_left_out_is_left_out() -> None:
    """Where a loss may not see missing rows, their weights and indices go with them."""

    def taking_any(outputs: Any, lifted: Any, *, row_weights: Any, **facts: Any) -> Tensor:
        return outputs[0].sum()

    fed = feeder(taking_any).prepare((X, targets(missing=True), {"row_weights": W, "indices": AT}))
    assert fed is not None
    assert fed.rows == ROWS - 1
    assert fed.extras["indices"].tolist() == [0, 1, 2, *range(4, ROWS)]
    assert torch.equal(fed.extras["row_weights"], W[fed.extras["indices"]])


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        (
            (X, targets(), AT),
            TypeError,
            "neither a dict of tensors nor a float tensor of row weights: Tensor",
        ),
        ((X, targets(), "finite"), TypeError, "neither a dict of tensors nor .*: str"),
        ((X, targets(), {"row_weights": [1.0]}), TypeError, r"must be tensors, got row_weights=\[1.0\]"),
        ((X, targets(), {"indices": AT[1:]}), ValueError, r"indices must have one entry a row \(14\), .*13"),
        ((X, targets(), {"row_weights": AT}), ValueError, r"floats of shape \(14,\), got torch.int64"),
        ((X, targets(), W[:, None]), ValueError, r"floats of shape \(14,\), got torch.float32 \(14, 1\)"),
        ((X, X.sum(1), W), TypeError, "status_labels must be words or integer codes"),
        ((X, {"row_weights": W}), TypeError, "targets must be a tensor or SemanticTargets, got dict"),
    ],
    ids=["codes", "word", "list", "too few", "integers", "two dimensions", "labels", "no targets"],
)
def test_what_is_not_said_of_every_row_is_refused(batch: Any, error: type[Exception], message: str) -> None:
    """Errors name what was given."""
    with pytest.raises(error, match=message):
        feeder().prepare(batch)


class Line(nn.Module):
    """P = x . w, Q = 1."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.5, -0.5]))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x @ self.w, torch.ones(len(x))


def train(loader: Any, loss: Any) -> Tensor:
    model = Line()
    config = TrainingConfig(coverage_threshold=0.0)
    SCMTrainer(model, torch.optim.SGD(model.parameters(), lr=0.1), loss, loader, config=config).fit()
    return model.w.detach()


def test_a_trainer_trains_by_the_weights_of_its_loader() -> None:
    """As on the repeated rows, whose number the weights are."""
    often = torch.arange(ROWS) % 3
    repeated = torch.arange(ROWS).repeat_interleave(often)
    loss = ProjectiveObjective(SCMTrainingLoss(LossConfig(coverage_term="soft")))
    by_weight = train([(X, targets(), often.float())], loss)
    torch.testing.assert_close(by_weight, train([(X[repeated], targets().index(repeated))], loss))
    assert not torch.equal(by_weight, train([(X, targets())], loss))


def test_weights_that_a_loss_does_not_take_are_refused() -> None:
    """The alternative would be to train on another mean than was asked for."""

    def unaware(outputs: Any, lifted: Any) -> Tensor:
        return (outputs[0] - lifted[0]).square().mean()

    train([(X, targets(), {"indices": AT})], unaware)
    with pytest.raises(ValueError, match="loss_fn must take row_weights when the loader gives them"):
        train([(X, targets(), W)], unaware)
