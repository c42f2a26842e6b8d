"""The objective: a fit term plus the weighted constraint terms, with a breakdown for the log.

What each term is, is decided in its own module; here, which terms run, with which weight, and that the gate
on (P, Q) is put once for all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scm.autodiff.policies import gate_tuple
from scm.losses.coverage import (
    check_share,
    ranked_coverage_kernel,
    rejection_loss,
    soft_coverage_kernel,
)
from scm.losses.margin import above_kernel, below_kernel
from scm.losses.rowwise import (
    Kernel,
    WeightedTerm,
    bool_mask,
    check_at_least_zero,
    reduce_rows,
    reduce_weighted,
    rows_that_count,
    weights_of_rows,
)
from scm.losses.separation import check_thresholds
from scm.losses.sign import sign_kernel
from scm.losses.terms import LossTerms

TERMS = ("fit", "margin", "sign", "rejection", "push_down", "push_up")
GATED_TERMS = frozenset({"margin", "sign", "push_down", "push_up"})
COVERAGE_TERMS = ("hard", "soft", "ranked")

Weight = float | Tensor


@dataclass(frozen=True)
class LossConfig:
    """Weights and thresholds of the objective; numbers are checked, tensors (one per trial) are trusted.

    gamma: of the sign term's norms. tau_train: |Q| that the margin asks for and the soft coverage counts
    from. epsilon_sing: |Y_d| up to which a target is singular. lambda_rej weighs whichever coverage term
    `coverage_term` selects: "hard" measures, "soft" trains, at `coverage_temperature`, "ranked" trains the
    target share with the largest |Q|, which it wants `coverage_temperature` above tau_train. lambda_push_down
    and lambda_push_up weigh the separation of bottoms (|Q| below tau_bottom) and finite rows (above
    tau_finite).
    """

    gamma: float = 1e-9
    tau_train: Weight = 1e-4
    epsilon_sing: float = 1e-3
    lambda_margin: Weight = 0.1
    lambda_sign: Weight = 1.0
    lambda_rej: Weight = 0.01
    target_coverage: Weight = 0.95
    coverage_term: str = "hard"
    coverage_temperature: Weight = 1e-2
    lambda_push_down: Weight = 0.0
    lambda_push_up: Weight = 0.0
    tau_bottom: Weight = 1e-2
    tau_finite: Weight = 5e-2

    def __post_init__(self) -> None:
        for name in (
            "gamma",
            "tau_train",
            "epsilon_sing",
            "lambda_margin",
            "lambda_sign",
            "lambda_rej",
            "coverage_temperature",
            "lambda_push_down",
            "lambda_push_up",
        ):
            check_at_least_zero(name, getattr(self, name))
        check_share("target_coverage", self.target_coverage)
        check_thresholds(self.tau_bottom, self.tau_finite)
        if not isinstance(self.coverage_temperature, Tensor) and self.coverage_temperature == 0:
            raise ValueError("coverage_temperature must be > 0, got coverage_temperature=0")
        if self.coverage_term not in COVERAGE_TERMS:
            raise ValueError(f"coverage_term must be one of {COVERAGE_TERMS}, got {self.coverage_term!r}")


class SCMTrainingLoss:
    """``fit + lambda_margin*margin + lambda_sign*sign + lambda_rej*coverage``, and separation if weighted."""

    def __init__(self, config: LossConfig | None = None) -> None:
        self.config = LossConfig() if config is None else config

    def __call__(
        self,
        fit_loss: Tensor,
        P: Tensor,
        Q: Tensor,
        Y_n: Tensor,
        Y_d: Tensor,
        *,
        is_bottom: Tensor | None = None,
        mask_finite: Tensor | None = None,
        mask_singular: Tensor | None = None,
        tau_train: Weight | None = None,
        mask_censored: Tensor | None = None,
        mask_trained: Tensor | None = None,
        target_coverage: Weight | None = None,
        weights: Mapping[str, Weight] | None = None,
        row_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted total, 0-d, and every term unweighted and detached (nothing is read back).

        is_bottom: answers that are bottom, for the hard coverage term (0 without it). mask_finite: rows with
        a number, for margin and push_up (all, and all but the censored, without it). mask_singular: rows
        with an orientation (default: |Y_d| <= epsilon_sing). mask_censored: rows whose answer is bottom, for
        push_down (default: the singular ones). mask_trained: rows that the coverage terms count (all).
        tau_train, target_coverage: override the config. weights: override the lambdas by the name of the
        term: fit (1 by default), margin, sign, rejection, push_down, push_up; others are a ValueError.
        row_weights: (rows,), every mean over rows becomes a weighted one: a row of weight 2 counts as two,
        one of weight 0 not at all, and scaling all weights changes nothing (so importance weights are
        normalised over the batch). The fit is given weighted already.

        A term whose weight is the plain number 0 is not computed and reads 0 in the breakdown. A
        denominator that is not finite counts as 0 in the coverage terms.
        """
        lambdas = self._lambdas(weights)
        rows = _Rows(mask_finite, mask_singular, mask_censored, mask_trained, row_weights)
        tau, target = self._thresholds(tau_train, target_coverage)
        terms = self._terms(lambdas, rows, (P, Q, Y_n, Y_d), tau, target)

        parts = {"fit": fit_loss.detach()}
        total = _weighted(fit_loss, lambdas["fit"])
        if terms:
            constraints, *losses = reduce_weighted(_operands(terms, P, Q, tau), list(terms.values()))
            total = total + constraints
            parts.update(zip(terms, losses, strict=True))
        measured = self._measured_coverage(lambdas, is_bottom, target, row_weights)
        if measured is not None:
            # A measurement without a gradient: it is no part of the node above.
            parts["rejection"] = measured
            total = total + measured * lambdas["rejection"]
        return total, _breakdown(parts, total)

    def terms(
        self,
        fit_loss: Tensor,
        P: Tensor,
        Q: Tensor,
        Y_n: Tensor,
        Y_d: Tensor,
        *,
        is_bottom: Tensor | None = None,
        mask_finite: Tensor | None = None,
        mask_singular: Tensor | None = None,
        tau_train: Weight | None = None,
        mask_censored: Tensor | None = None,
        mask_trained: Tensor | None = None,
        target_coverage: Weight | None = None,
        weights: Mapping[str, Weight] | None = None,
        row_weights: Tensor | None = None,
    ) -> LossTerms:
        """Return the same sum in its parts: the fit as the task, and by name the terms with a weight.

        Every term has a graph of its own, so that they can be scaled or differentiated apart; one call of
        the object itself costs less.
        """
        lambdas = self._lambdas(weights)
        rows = _Rows(mask_finite, mask_singular, mask_censored, mask_trained, row_weights)
        tau, target = self._thresholds(tau_train, target_coverage)
        terms = self._terms(lambdas, rows, (P, Q, Y_n, Y_d), tau, target)
        inputs = _operands(terms, P, Q, tau)
        auxiliaries = {
            name: _weighted(
                reduce_rows(term.kernel, *(inputs[i] for i in term.operands), *term.arguments), term.weight
            )
            for name, term in terms.items()
        }
        measured = self._measured_coverage(lambdas, is_bottom, target, row_weights)
        if measured is not None:
            auxiliaries["rejection"] = measured * lambdas["rejection"]
        return LossTerms(_weighted(fit_loss, lambdas["fit"]), auxiliaries)

    def _thresholds(self, tau_train: Weight | None, target_coverage: Weight | None) -> tuple[Weight, Weight]:
        tau = self.config.tau_train if tau_train is None else tau_train
        target = self.config.target_coverage if target_coverage is None else target_coverage
        check_at_least_zero("tau_train", tau)
        check_share("target_coverage", target)
        return tau, target

    def _measured_coverage(
        self,
        lambdas: Mapping[str, Weight],
        is_bottom: Tensor | None,
        target: Weight,
        row_weights: Tensor | None,
    ) -> Tensor | None:
        if self.config.coverage_term != "hard" or _is(0, lambdas["rejection"]) or is_bottom is None:
            return None
        return rejection_loss(is_bottom, target, row_weights=row_weights)

    def _lambdas(self, weights: Mapping[str, Weight] | None) -> dict[str, Weight]:
        config = self.config
        lambdas: dict[str, Weight] = {
            "fit": 1.0,
            "margin": config.lambda_margin,
            "sign": config.lambda_sign,
            "rejection": config.lambda_rej,
            "push_down": config.lambda_push_down,
            "push_up": config.lambda_push_up,
        }
        for term, weight in (weights or {}).items():
            if term not in lambdas:
                raise ValueError(f"weights must name terms of {list(TERMS)}, got {term!r}")
            check_at_least_zero(f"weights[{term!r}]", weight)
            lambdas[term] = weight
        return lambdas

    def _terms(
        self,
        lambdas: Mapping[str, Weight],
        rows: _Rows,
        tuples: tuple[Tensor, Tensor, Tensor, Tensor],
        tau: Weight,
        target: Weight,
    ) -> dict[str, WeightedTerm]:
        """Return the terms with a weight and a gradient; their inputs are (gated P, gated Q, free Q)."""
        config = self.config
        P, Q, Y_n, Y_d = tuples
        terms: dict[str, WeightedTerm] = {}

        def add(term: str, kernel: Kernel, operands: tuple[int, ...], *arguments: Any) -> None:
            terms[term] = WeightedTerm(lambdas[term], kernel, operands, arguments)

        finite = None if rows.finite is None else bool_mask("mask_finite", rows.finite, Q)
        weights = weights_of_rows(rows.weights, Q)
        if not _is(0, lambdas["sign"]):
            singular = rows.singular if rows.singular is not None else Y_d.abs() <= config.epsilon_sing
            if singular.shape != P.shape or singular.dtype != torch.bool:
                singular = bool_mask("mask_singular", singular, torch.broadcast_tensors(P, Q, Y_n, Y_d)[0])
            own = weights_of_rows(rows.weights, singular)  # P may have more outputs than Q
            add("sign", sign_kernel, (0, 1), Y_n, Y_d, config.gamma, rows_that_count(singular, own), own)
        if not _is(0, lambdas["margin"]):
            counted = rows_that_count(finite, weights)
            add("margin", below_kernel, (1,), tau, counted, False, finite is not None, weights)
        if config.coverage_term == "soft" and not _is(0, lambdas["rejection"]):
            trained = None if rows.trained is None else bool_mask("mask_trained", rows.trained, Q)
            # Ungated, and a denominator that is not a number must not take all others' gradient with it.
            add(
                "rejection",
                soft_coverage_kernel,
                (2,),
                tau,
                config.coverage_temperature,
                target,
                rows_that_count(trained, weights),
                True,
                weights,
            )
        if config.coverage_term == "ranked" and not _is(0, lambdas["rejection"]):
            trained = None if rows.trained is None else bool_mask("mask_trained", rows.trained, Q)
            margin, counted = config.coverage_temperature, rows_that_count(trained, weights)
            add("rejection", ranked_coverage_kernel, (2,), tau, margin, target, counted, weights)
        if not (_is(0, lambdas["push_down"]) and _is(0, lambdas["push_up"])):
            censored = next(
                m for m in (rows.censored, rows.singular, Y_d.abs() <= config.epsilon_sing) if m is not None
            )
            censored = bool_mask("mask_censored", censored, Q)
            if not _is(0, lambdas["push_down"]):
                counted = rows_that_count(censored, weights)
                add("push_down", above_kernel, (1,), config.tau_bottom, counted, True, weights)
            if not _is(0, lambdas["push_up"]):
                counted = rows_that_count(~censored if finite is None else finite, weights)
                add(
                    "push_up",
                    below_kernel,
                    (1,),
                    config.tau_finite,
                    counted,
                    True,
                    finite is not None,
                    weights,
                )
        return terms


class _Rows(NamedTuple):
    """The masks and the weights of a call, as given."""

    finite: Tensor | None
    singular: Tensor | None
    censored: Tensor | None
    trained: Tensor | None
    weights: Tensor | None


def _operands(terms: Mapping[str, WeightedTerm], P: Tensor, Q: Tensor, tau: Weight) -> tuple[Tensor, ...]:
    """Return what the terms' kernels take: (gated P, gated Q, free Q)."""
    gated = any(term in GATED_TERMS for term in terms)
    return (*(gate_tuple(P, Q, tau=tau) if gated else (P, Q)), Q)


def _weighted(term: Tensor, weight: Weight) -> Tensor:
    return term if _is(1, weight) else term * weight


def _breakdown(parts: dict[str, Tensor], total: Tensor) -> dict[str, Tensor]:
    for term in ("margin", "sign", "rejection"):
        if term not in parts:
            parts[term] = torch.zeros_like(parts["fit"])
    parts["total"] = total.detach()
    return parts


def _is(number: int, weight: Weight) -> bool:
    return not isinstance(weight, Tensor) and weight == number
