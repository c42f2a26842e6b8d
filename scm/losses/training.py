"""The objective: a fit term plus the weighted constraint terms, with a breakdown for the log.

What each term is, is decided in its own module; here, which terms run, with which weight, and that the gate
on (P, Q) is put once for all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from scm.autodiff.policies import gate_tuple
from scm.losses.coverage import check_share, rejection_loss, soft_coverage_kernel
from scm.losses.margin import above_kernel, below_kernel
from scm.losses.rowwise import bool_mask, check_at_least_zero, reduce_rows
from scm.losses.separation import check_thresholds
from scm.losses.sign import sign_kernel

TERMS = ("fit", "margin", "sign", "rejection", "push_down", "push_up")
COVERAGE_TERMS = ("hard", "soft")

Weight = float | Tensor


@dataclass(frozen=True)
class LossConfig:
    """Weights and thresholds of the objective; numbers are checked, tensors (one per trial) are trusted.

    gamma: of the sign term's norms. tau_train: |Q| that the margin asks for and the soft coverage counts
    from. epsilon_sing: |Y_d| up to which a target is singular. lambda_rej weighs whichever coverage term
    `coverage_term` selects: "hard" measures, "soft" trains, at `coverage_temperature`. lambda_push_down and
    lambda_push_up weigh the separation of bottoms (|Q| below tau_bottom) and finite rows (above tau_finite).
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
            raise ValueError(f"coverage_temperature must be > 0, got coverage_temperature=0")
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
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted total, 0-d, and every term unweighted and detached (nothing is read back).

        is_bottom: answers that are bottom, for the hard coverage term (0 without it). mask_finite: rows with
        a number, for margin and push_up (all, and all but the censored, without it). mask_singular: rows
        with an orientation (default: |Y_d| <= epsilon_sing). mask_censored: rows whose answer is bottom, for
        push_down (default: the singular ones). mask_trained: rows that the soft coverage counts (all).
        tau_train, target_coverage: override the config. weights: override the lambdas by the name of the
        term: fit (1 by default), margin, sign, rejection, push_down, push_up; others are a ValueError.

        A term whose weight is the plain number 0 is not computed and reads 0 in the breakdown. A
        denominator that is not finite counts as 0 in the soft coverage.
        """
        config = self.config
        lambdas = self._lambdas(weights)
        tau = config.tau_train if tau_train is None else tau_train
        if tau_train is not None:
            check_at_least_zero("tau_train", tau_train)
        wants = {term: not _is_zero(weight) for term, weight in lambdas.items()}
        gated_p, gated_q = P, Q
        if wants["margin"] or wants["sign"] or wants["push_down"] or wants["push_up"]:
            gated_p, gated_q = gate_tuple(P, Q, tau=tau)
        terms: dict[str, Tensor] = {"fit": fit_loss}

        if mask_finite is not None:
            mask_finite = bool_mask("mask_finite", mask_finite, Q)
        groups_wanted = wants["push_down"] or (wants["push_up"] and mask_finite is None)
        if mask_singular is None and (wants["sign"] or (groups_wanted and mask_censored is None)):
            mask_singular = Y_d.abs() <= config.epsilon_sing
        if wants["margin"]:
            terms["margin"] = reduce_rows(below_kernel, gated_q, tau, mask_finite, False)
        if wants["sign"]:
            assert mask_singular is not None
            rows = bool_mask("mask_singular", mask_singular, torch.broadcast_tensors(P, Q, Y_n, Y_d)[0])
            terms["sign"] = reduce_rows(sign_kernel, gated_p, gated_q, Y_n, Y_d, config.gamma, rows)
        if wants["rejection"]:
            target = config.target_coverage if target_coverage is None else target_coverage
            coverage_term = self._coverage(Q, tau, target, is_bottom, mask_trained)
            if coverage_term is not None:
                terms["rejection"] = coverage_term
        if wants["push_down"] or wants["push_up"]:
            censored = mask_singular if mask_censored is None else mask_censored
            terms.update(self._separation(gated_q, censored, mask_finite, wants))
        return _weighted_total(terms, lambdas)

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

    def _coverage(
        self, Q: Tensor, tau: Weight, target: Weight, is_bottom: Tensor | None, mask: Tensor | None
    ) -> Tensor | None:
        if self.config.coverage_term == "hard":
            return None if is_bottom is None else rejection_loss(is_bottom, target)
        check_share("target_coverage", target)
        # One denominator that is not a number must not take the gradient of all others with it.
        Q = torch.nan_to_num(Q, nan=0.0, posinf=0.0, neginf=0.0)
        rows = None if mask is None else bool_mask("mask_trained", mask, Q)
        return reduce_rows(soft_coverage_kernel, Q, tau, self.config.coverage_temperature, target, rows)

    def _separation(
        self, Q: Tensor, censored: Tensor | None, finite: Tensor | None, wants: Mapping[str, bool]
    ) -> dict[str, Tensor]:
        config = self.config
        terms: dict[str, Tensor] = {}
        rows = None if censored is None else bool_mask("mask_censored", censored, Q)
        if wants["push_down"]:
            terms["push_down"] = reduce_rows(above_kernel, Q, config.tau_bottom, rows, True)
        if wants["push_up"]:
            if finite is None and rows is not None:
                finite = ~rows
            terms["push_up"] = reduce_rows(below_kernel, Q, config.tau_finite, finite, True)
        return terms


def _weighted_total(
    terms: Mapping[str, Tensor], lambdas: Mapping[str, Weight]
) -> tuple[Tensor, dict[str, Tensor]]:
    total: Tensor | None = None
    for term, value in terms.items():
        weight = lambdas[term]
        if _is_zero(weight):
            continue
        if total is None:
            total = value if _is_one(weight) else value * weight
        elif isinstance(weight, Tensor):
            total = torch.addcmul(total, value, weight) if value.ndim == 0 else total + value * weight
        else:
            total = total.add(value, alpha=weight)
    nothing = torch.zeros_like(terms["fit"].detach())
    if total is None:
        total = terms["fit"] * 0.0
    breakdown = {term: terms[term].detach() if term in terms else nothing for term in TERMS[:4]}
    breakdown.update({term: terms[term].detach() for term in TERMS[4:] if term in terms})
    breakdown["total"] = total.detach()
    return total, breakdown


def _is_zero(weight: Weight) -> bool:
    return not isinstance(weight, Tensor) and weight == 0


def _is_one(weight: Weight) -> bool:
    return not isinstance(weight, Tensor) and weight == 1
