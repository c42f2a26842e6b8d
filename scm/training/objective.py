"""From a model's (P, Q) and a batch's targets to one scalar: the fit term and the constraints together.

Which rows each term may see is decided here, from the statuses; what the terms are, in `scm.losses`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scm.autodiff.policies import gate_tuple
from scm.losses.implicit import implicit_loss
from scm.losses.projective import projective_fit_loss
from scm.losses.quotient import quotient_loss
from scm.losses.terms import LossTerms
from scm.losses.training import SCMTrainingLoss
from scm.training.targets import SemanticTargets

FITS = ("projective", "implicit", "implicit_detached", "quotient")

FitLoss = Callable[..., Tensor]
"""A fit term of one's own: (P, Q, Y_n, Y_d, mask of the trained rows or None for all) -> 0-d tensor.

One that names `row_weights` is given them where a loader draws rows unequally often.
Gradient policies act on the P and Q that it is given, at the batch's threshold.
"""


class ProjectiveObjective:
    """The trainer's loss function for heads that answer (P, Q).

    fit: "projective" (bounded, unchanged by scaling the tuple), "implicit", or "implicit_detached" (no
    gradient through its scale), "quotient" (half the square of P/Q - y where |Q| >= tau, the weight of the
    rejection where there is no value, see `quotient_loss`), or a function of one's own (`FitLoss`). Rows
    labelled missing or fault take part in no term; the margin sees finite rows, the orientation term those
    with a direction, push_down those whose right answer is bottom. hybrid_bound: of the quotient's gradients
    where they saturate.
    """

    def __init__(
        self,
        constraints: SCMTrainingLoss,
        *,
        fit: str | FitLoss = "projective",
        gamma: float = 1e-9,
        hybrid_bound: float | Tensor = 1.0,
    ) -> None:
        if not callable(fit) and fit not in FITS:
            raise ValueError(f"fit must be one of {', '.join(FITS)}, got {fit=}")
        self.constraints = constraints
        self.fit = fit
        self._fit_takes_weights = callable(fit) and "row_weights" in inspect.signature(fit).parameters
        self.gamma = gamma
        self.hybrid_bound = hybrid_bound

    def __call__(
        self,
        outputs: tuple[Tensor, Tensor],
        lifted: tuple[Tensor, Tensor],
        *,
        tau: float | Tensor,
        semantic_targets: SemanticTargets | None = None,
        loss_weights: Mapping[str, Any] | None = None,
        row_weights: Tensor | None = None,
        hybrid_delta: float | Tensor | None = None,
    ) -> Tensor:
        """Return the weighted sum, 0-d. `loss_weights` override the lambdas by the names of the terms.

        row_weights: (rows,), every mean over rows is weighted by them, see `SCMTrainingLoss`. A fit of one's
        own must take them by that name (ValueError).
        hybrid_delta: the |Q| up to which the quotient's gradients saturate; other fits have no such radius.
        Without `semantic_targets` every row is trained, and those with Y_d = 0 are bottoms with a direction.
        """
        held = self._arguments(
            outputs, lifted, tau, semantic_targets, loss_weights, row_weights, hybrid_delta
        )
        total, _ = self.constraints(*held.tensors, **held.named)
        return total

    def terms(
        self,
        outputs: tuple[Tensor, Tensor],
        lifted: tuple[Tensor, Tensor],
        *,
        tau: float | Tensor,
        semantic_targets: SemanticTargets | None = None,
        loss_weights: Mapping[str, Any] | None = None,
        row_weights: Tensor | None = None,
        hybrid_delta: float | Tensor | None = None,
    ) -> LossTerms:
        """Return the same sum in its parts: the fit is the task, the constraints by name are beside it."""
        held = self._arguments(
            outputs, lifted, tau, semantic_targets, loss_weights, row_weights, hybrid_delta
        )
        return self.constraints.terms(*held.tensors, **held.named)

    def _arguments(
        self,
        outputs: tuple[Tensor, Tensor],
        lifted: tuple[Tensor, Tensor],
        tau: float | Tensor,
        semantic_targets: SemanticTargets | None,
        loss_weights: Mapping[str, Any] | None,
        row_weights: Tensor | None,
        hybrid_delta: float | Tensor | None,
    ) -> _Arguments:
        P, Q = outputs[0], outputs[1]
        Y_n, Y_d = lifted
        masks = _Masks(semantic_targets, Y_d)
        if self.fit == "quotient":
            fit = quotient_loss(
                P,
                Q,
                Y_n,
                Y_d,
                tau=tau,
                mask=masks.trained,
                mask_finite=masks.finite,
                orientation=None if semantic_targets is None else semantic_targets.orientation_label,
                lambda_rej=(loss_weights or {}).get("rejection", self.constraints.config.lambda_rej),
                hybrid_delta=hybrid_delta,
                hybrid_bound=self.hybrid_bound,
                row_weights=row_weights,
            )
        else:
            fit = self._fit(P, Q, Y_n, Y_d, masks.trained, tau, row_weights)
        named = {
            "is_bottom": self._bottoms(P, Q, tau),
            "mask_finite": masks.finite,
            "mask_singular": masks.oriented,
            "tau_train": tau,
            "mask_censored": masks.bottom,
            "mask_trained": masks.trained,
            "weights": loss_weights,
            "row_weights": row_weights,
        }
        return _Arguments((fit, P, Q, Y_n, Y_d), named)

    def _fit(
        self,
        P: Tensor,
        Q: Tensor,
        Y_n: Tensor,
        Y_d: Tensor,
        trained: Tensor | None,
        tau: float | Tensor,
        row_weights: Tensor | None,
    ) -> Tensor:
        if callable(self.fit):
            gated = gate_tuple(P, Q, tau=tau)
            if row_weights is None:
                return self.fit(*gated, Y_n, Y_d, trained)
            if not self._fit_takes_weights:
                raise ValueError(
                    "fit must take row_weights when the loader gives them, its signature does not"
                )
            return self.fit(*gated, Y_n, Y_d, trained, row_weights=row_weights)
        if self.fit == "projective":
            return projective_fit_loss(P, Q, Y_n, Y_d, mask=trained, row_weights=row_weights)
        return implicit_loss(
            P,
            Q,
            Y_n,
            Y_d,
            gamma=self.gamma,
            detach_scale=self.fit == "implicit_detached",
            mask=trained,
            row_weights=row_weights,
        )

    def _bottoms(self, P: Tensor, Q: Tensor, tau: float | Tensor) -> Tensor | None:
        """Return the answers that are bottom, where the hard coverage term needs them."""
        if self.constraints.config.coverage_term != "hard":
            return None
        P, Q = P.detach(), Q.detach()
        return ~(Q.abs() >= tau) | ~torch.isfinite(P) | torch.isinf(Q)


class _Arguments(NamedTuple):
    """What the constraints are called with."""

    tensors: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
    named: dict[str, Any]


class _Masks:
    """The rows of each term; None stands for all of them."""

    def __init__(self, semantic: SemanticTargets | None, Y_d: Tensor) -> None:
        if semantic is None:
            self.trained: Tensor | None = None
            self.finite = Y_d != 0
            self.oriented = self.bottom = ~self.finite
        else:
            self.trained = semantic.mask_trained
            self.finite = semantic.mask_finite
            self.oriented = semantic.mask_oriented
            self.bottom = semantic.mask_semantic


def as_trainer_loss(loss_fn: Callable[..., Any]) -> Callable[..., Any]:
    """Return `loss_fn` in the form in which the trainer calls it.

    An `SCMTrainingLoss` takes a fit term that somebody must have computed: given as it is, it is completed
    by the implicit one, as the guides to zeroproofml write it (which its trainer cannot call).
    """
    if isinstance(loss_fn, SCMTrainingLoss):
        return ProjectiveObjective(loss_fn, fit="implicit", gamma=loss_fn.config.gamma)
    return loss_fn


def in_terms(loss_fn: Callable[..., Any]) -> Callable[..., Any]:
    """Return the form of `loss_fn` that gives `LossTerms`: its method `terms`, or else `loss_fn` itself."""
    terms: Callable[..., Any] = getattr(loss_fn, "terms", loss_fn)
    return terms
