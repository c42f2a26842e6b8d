"""From a model's (P, Q) and a batch's targets to one scalar: the fit term and the constraints together.

Which rows each term may see is decided here, from the statuses; what the terms are, in `scm.losses`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scm.autodiff.policies import gate_tuple
from scm.losses.implicit import implicit_loss
from scm.losses.projective import projective_fit_loss
from scm.losses.terms import LossTerms
from scm.losses.training import SCMTrainingLoss
from scm.training.targets import SemanticTargets

FITS = ("projective", "implicit", "implicit_detached")

FitLoss = Callable[[Tensor, Tensor, Tensor, Tensor, "Tensor | None"], Tensor]
"""A fit term of one's own: (P, Q, Y_n, Y_d, mask of the trained rows or None for all) -> 0-d tensor.

Gradient policies act on the P and Q that it is given, at the batch's threshold.
"""


class ProjectiveObjective:
    """The trainer's loss function for heads that answer (P, Q).

    fit: "projective" (bounded, unchanged by scaling the tuple), "implicit", or "implicit_detached" (no
    gradient through its scale), or a function of one's own (`FitLoss`). Rows labelled missing or fault take
    part in no term; the margin sees finite rows, the orientation term those with a direction, push_down those
    whose right answer is bottom.
    """

    def __init__(
        self, constraints: SCMTrainingLoss, *, fit: str | FitLoss = "projective", gamma: float = 1e-9
    ) -> None:
        if not callable(fit) and fit not in FITS:
            raise ValueError(f"fit must be one of {', '.join(FITS)}, got {fit=}")
        self.constraints = constraints
        self.fit = fit
        self.gamma = gamma

    def __call__(
        self,
        outputs: tuple[Tensor, Tensor],
        lifted: tuple[Tensor, Tensor],
        *,
        tau: float | Tensor,
        semantic_targets: SemanticTargets | None = None,
        loss_weights: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """Return the weighted sum, 0-d. `loss_weights` override the lambdas by the names of the terms.

        Without `semantic_targets` every row is trained, and those with Y_d = 0 are bottoms with a direction.
        """
        held = self._arguments(outputs, lifted, tau, semantic_targets, loss_weights)
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
    ) -> LossTerms:
        """Return the same sum in its parts: the fit is the task, the constraints by name are beside it."""
        held = self._arguments(outputs, lifted, tau, semantic_targets, loss_weights)
        return self.constraints.terms(*held.tensors, **held.named)

    def _arguments(
        self,
        outputs: tuple[Tensor, Tensor],
        lifted: tuple[Tensor, Tensor],
        tau: float | Tensor,
        semantic_targets: SemanticTargets | None,
        loss_weights: Mapping[str, Any] | None,
    ) -> _Arguments:
        P, Q = outputs[0], outputs[1]
        Y_n, Y_d = lifted
        masks = _Masks(semantic_targets, Y_d)
        fit = self._fit(P, Q, Y_n, Y_d, masks.trained, tau)
        named = {
            "is_bottom": self._bottoms(P, Q, tau),
            "mask_finite": masks.finite,
            "mask_singular": masks.oriented,
            "tau_train": tau,
            "mask_censored": masks.bottom,
            "mask_trained": masks.trained,
            "weights": loss_weights,
        }
        return _Arguments((fit, P, Q, Y_n, Y_d), named)

    def _fit(
        self, P: Tensor, Q: Tensor, Y_n: Tensor, Y_d: Tensor, trained: Tensor | None, tau: float | Tensor
    ) -> Tensor:
        if callable(self.fit):
            return self.fit(*gate_tuple(P, Q, tau=tau), Y_n, Y_d, trained)
        if self.fit == "projective":
            return projective_fit_loss(P, Q, Y_n, Y_d, mask=trained)
        detached = self.fit == "implicit_detached"
        return implicit_loss(P, Q, Y_n, Y_d, gamma=self.gamma, detach_scale=detached, mask=trained)

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
