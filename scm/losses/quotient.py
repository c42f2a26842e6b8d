"""The data loss on the quotient itself: numbers are fitted by P/Q, and what has no value trains no fit.

Which answers have a value is decided in `scm.core.tags`; how far around a pole gradients saturate, by the
schedule of `scm.training.hybrid_schedule`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from scm.autodiff.policies import DEFAULT_BOTTOM_TAU, gate_tuple
from scm.core.tags import TRTag
from scm.losses.projective import loss_dtype
from scm.losses.rowwise import (
    Reduced,
    as_rows_of,
    bool_mask,
    check_at_least_zero,
    mask_and_weights,
    mean_over,
    reduce_rows,
)

LARGEST = 1e18
"""A residual or distance counts as no larger, so that the squares of all rows have a sum in float32."""


def quotient_loss(
    P: Tensor,
    Q: Tensor,
    Y_n: Tensor,
    Y_d: Tensor,
    *,
    tags: Tensor | None = None,
    tau: float | Tensor | None = None,
    mask: Tensor | None = None,
    mask_finite: Tensor | None = None,
    orientation: Tensor | None = None,
    base: str = "mse",
    huber_delta: float | Tensor = 1.0,
    lambda_rej: float | Tensor = 1.0,
    hybrid_delta: float | Tensor | None = None,
    hybrid_bound: float | Tensor = 1.0,
    row_weights: Tensor | None = None,
) -> Tensor:
    """Return the mean over rows of the base loss of ``P/Q - Y_n/Y_d``, constant where there is no value.

    - The target is a number and P/Q has a value: the base loss of the residual r, "mse" (r^2/2), "mae" (|r|)
      or "huber" (r^2/2 up to huber_delta, linear beyond), with the exact gradient.
    - The target is a number and P/Q has no value: the constant lambda_rej, without a gradient (Mask-REAL).
    - The target is no number: ``lambda_rej * (|Q| + max(0, 1 - s*P))``, the second term only where the target
      has an orientation s: the distance to the tuples (c*s, 0), c >= 1. It moves Q to 0 and P to its side.
    - P or Q is not finite: the constant lambda_rej, whatever the target.

    tags: of the answers (`tags_of_tuples`); by default P/Q has a value where it does in strict decoding at
    `tau`, or wherever it is finite without `tau`. mask: rows to average over, all by default; over none the
    loss is 0. row_weights: (rows,), the mean is weighted by them. mask_finite: rows whose target is a number
    (default: Y_d != 0). orientation: -1, 0 or 1 of the other rows (default: the sign of Y_n, which takes
    every bottom of `lift_targets` for an infinity; pass `SemanticTargets.orientation_label`). All expand to
    the rows. Targets get no gradient; 0-d, at least float32.

    hybrid_delta: where the target is a number and |Q| <= hybrid_delta, the value is as above, and the
    gradients saturate, whether P/Q has a value or not: with ``h = sqrt(Q^2 + hybrid_bound^2)``,
    ``r = sign(Q)*(P - Q*t)/h`` and g the base loss's derivative at r, they are ``g*sign(Q)/h`` in P and
    ``-g*P/h^2`` in Q, sign(Q) by the sign bit. They tend to the exact ones as hybrid_bound -> 0, never have
    another sign, and are bounded for bounded P. None, and a tensor below 0: nowhere.

    Differs from zeroproof 0.1.0: gradients reach P and Q at all; the one in Q has the right sign for Q < 0;
    the orientation term has a gradient (there ``|sign(P) - s|``); huber is huber; tags decide row by row,
    so that no row alters another's gradient; residuals count up to 1e18. Saturated gradients there keep g at
    the exact residual, which no hybrid_bound bounds, and end where the tag is not REAL.
    """
    _check(base, huber_delta, lambda_rej, tau, hybrid_delta, hybrid_bound)
    P, Q = gate_tuple(P, Q, tau=DEFAULT_BOTTOM_TAU if tau is None else tau)
    rows = torch.broadcast_tensors(P, Q, Y_n, Y_d)[0]
    mask, weights = mask_and_weights(mask, row_weights, rows)
    finite = bool_mask("mask_finite", Y_d != 0 if mask_finite is None else mask_finite, rows)
    has_value = None if tags is None else bool_mask("tags", tags == TRTag.REAL, rows)
    side = Y_n.sign() if orientation is None else orientation.to(rows.dtype)
    return reduce_rows(
        _quotient,
        P,
        Q,
        Y_n,
        Y_d,
        has_value,
        0.0 if tau is None else tau,
        mask,
        finite,
        side,
        base,
        huber_delta,
        lambda_rej,
        hybrid_delta,
        hybrid_bound,
        weights,
    )


def _mse(residual: Tensor, huber_delta: float | Tensor) -> tuple[Tensor, Tensor]:
    return residual.square() * 0.5, residual


def _mae(residual: Tensor, huber_delta: float | Tensor) -> tuple[Tensor, Tensor]:
    return residual.abs(), residual.sign()


def _huber(residual: Tensor, huber_delta: float | Tensor) -> tuple[Tensor, Tensor]:
    slope = residual.clamp(-huber_delta, huber_delta)  # type: ignore[arg-type]
    return slope * (residual - slope * 0.5), slope


BASES: Mapping[str, Callable[[Tensor, float | Tensor], tuple[Tensor, Tensor]]] = MappingProxyType(
    {"mse": _mse, "mae": _mae, "huber": _huber}
)
"""By name: residual and huber's bound -> the loss and its derivative."""


def _check(
    base: str,
    huber_delta: float | Tensor,
    lambda_rej: float | Tensor,
    tau: float | Tensor | None,
    hybrid_delta: float | Tensor | None,
    hybrid_bound: float | Tensor,
) -> None:
    if base not in BASES:
        raise ValueError(f"base must be one of {', '.join(BASES)}, got {base=}")
    check_at_least_zero("lambda_rej", lambda_rej)
    check_at_least_zero("tau", 0.0 if tau is None else tau)
    check_at_least_zero("hybrid_delta", 0.0 if hybrid_delta is None else hybrid_delta)
    for name, value in (("huber_delta", huber_delta), ("hybrid_bound", hybrid_bound)):
        if not isinstance(value, Tensor) and not 0 < value < math.inf:
            raise ValueError(f"{name} must be finite and > 0, got {name}={value!r}")


def _quotient(
    P: Tensor,
    Q: Tensor,
    Y_n: Tensor,
    Y_d: Tensor,
    has_value: Tensor | None,
    tau: float | Tensor,
    mask: Tensor | None,
    finite: Tensor,
    side: Tensor,
    base: str,
    huber_delta: float | Tensor,
    lambda_rej: float | Tensor,
    hybrid_delta: float | Tensor | None,
    hybrid_bound: float | Tensor,
    weights: Tensor | None,
    *,
    with_gradients: bool,
) -> Reduced:
    known = P.isfinite() & Q.isfinite()
    if has_value is None:
        has_value = Q.abs() >= tau
    fitted = finite & known & has_value & (P / Q).isfinite()
    aside = known & ~finite
    # What a row does not use is replaced before the arithmetic, so that no nan or infinity arises in it.
    p, q = torch.where(known, P, 0.0).double(), torch.where(known, Q, 1.0).double()
    target = torch.where(finite, Y_n, 0.0).double() / torch.where(finite, Y_d, 1.0)
    safe = torch.where(fitted, q, 1.0)
    ratio = torch.where(fitted, p, 0.0) / safe
    cost, slope = BASES[base]((ratio - target).clamp(-LARGEST, LARGEST), huber_delta)
    off_side = 1.0 - side * p
    wrong = (side != 0) & (off_side > 0)
    distance = (q.abs() + torch.where(wrong, off_side, 0.0)).clamp(max=LARGEST)
    costs = torch.where(fitted, cost, torch.where(aside, distance * lambda_rej, lambda_rej))
    loss, share = mean_over(costs, mask, weights)
    loss = loss.to(loss_dtype(P, Q))
    if not with_gradients:
        return Reduced(loss)
    by_p = torch.where(fitted, _bounded(slope / safe), 0.0)
    by_q = -by_p * ratio
    if hybrid_delta is not None:
        near = finite & known & (Q.abs() <= hybrid_delta)
        near_q = torch.where(near, q, 1.0)
        inverse = torch.addcmul(_square(hybrid_bound, q), near_q, near_q).rsqrt()
        signed = torch.copysign(inverse, near_q)
        residual = (torch.where(near, p, 0.0) - near_q * target) * signed
        _, slope = BASES[base](residual.clamp(-LARGEST, LARGEST), huber_delta)
        by_p = torch.where(near, slope * signed, by_p)
        by_q = torch.where(near, -slope * p * inverse.square(), by_q)
    by_p = torch.where(aside & wrong, -side * lambda_rej, by_p) * share
    by_q = torch.where(aside, q.sign() * lambda_rej, by_q) * share
    return Reduced(loss, (_as_rows_of(by_p, mask, P), _as_rows_of(by_q, mask, Q)))


def _square(bound: float | Tensor, like: Tensor) -> Tensor:
    if isinstance(bound, Tensor):
        return bound.to(like.dtype).square()
    return torch.full((), bound * bound, dtype=like.dtype, device=like.device)


def _as_rows_of(gradient: Tensor, mask: Tensor | None, like: Tensor) -> Tensor:
    largest = torch.finfo(like.dtype).max / 2
    return as_rows_of(gradient.clamp(-largest, largest), mask, like)


def _bounded(slope: Tensor) -> Tensor:
    """Keep a slope finite, so that its product with a ratio of 0 is 0."""
    return slope.clamp(-1e300, 1e300)
