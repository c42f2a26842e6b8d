"""The fit term of the field: the squared cross product over the squares of its two sides."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from scm.autodiff.policies import gate_tuple
from scm.losses.projective import loss_dtype
from scm.losses.rowwise import (
    TINY,
    Reduced,
    as_rows_of,
    check_at_least_zero,
    mask_and_weights,
    mean_over,
    reduce_rows,
)
from scm.losses.tuples import in_given_units, is_negligible, is_wide, safe_pair

LARGEST = 1e6
"""No row costs more: beyond, the denominator is a fixed share of what it is at a right angle."""


def implicit_loss(
    P: Tensor,
    Q: Tensor,
    Y_n: Tensor,
    Y_d: Tensor,
    gamma: float | Tensor = 1e-9,
    *,
    detach_scale: bool = False,
    mask: Tensor | None = None,
    row_weights: Tensor | None = None,
) -> Tensor:
    """Return the mean of ``(P*Y_d - Q*Y_n)^2 / (Q^2*Y_d^2 + P^2*Y_n^2 + gamma)``, at most 1e6 per row.

    gamma: finite and >= 0. detach_scale: no gradient through the denominator. mask: rows to average over
    (bool, expands to the rows), all by default; over no rows the loss is 0. row_weights: (rows,), the mean is
    weighted by them. Targets get no gradient.

    Differs from zeroproofml 0.6.1, whose value it has everywhere else: bounded (by 1e6 instead of 1/gamma)
    where the denominator vanishes, finite with finite gradients for all finite tuples and targets, 0 for an
    empty batch; a row that is not finite makes the loss nan, but no other row's gradient. At (0, 0) value
    and gradient are 0, as there; `projective_fit_loss` has neither that defect nor a preferred scale.
    """
    check_at_least_zero("gamma", gamma)
    P, Q = gate_tuple(P, Q)
    mask, weights = mask_and_weights(mask, row_weights, P, Q, Y_n, Y_d)
    return reduce_rows(_implicit, P, Q, Y_n, Y_d, gamma, detach_scale, mask, weights)


def _implicit(
    P: Tensor,
    Q: Tensor,
    Y_n: Tensor,
    Y_d: Tensor,
    gamma: float | Tensor,
    detach_scale: bool,
    mask: Tensor | None,
    weights: Tensor | None,
    *,
    with_gradients: bool,
) -> Reduced:
    p, q, y, d, added, scale = _in_safe_units(P, Q, Y_n, Y_d, gamma)
    n_side, d_side = p * y, q * d
    cross = torch.addcmul(p * d, q, y, value=-1)
    dot = n_side + d_side
    squared = cross * cross
    sides = torch.addcmul(d_side * d_side, n_side, n_side) + added
    floor = torch.addcmul(squared, dot, dot).mul(1.0 / LARGEST)
    denominator = torch.maximum(sides, floor)
    if is_negligible(gamma):
        denominator = denominator.clamp(min=TINY)
    ratio = cross / denominator
    loss, share = mean_over(ratio * cross, mask, weights)
    loss = loss.to(loss_dtype(P, Q))
    if not with_gradients:
        return Reduced(loss)
    by_p, by_q = d, y
    if not detach_scale:
        is_floor = floor > sides
        turn = dot / torch.addcmul(p * p, q, q)  # 0/0 at the origin, which lies above the floor
        by_p = torch.where(is_floor, turn * q, torch.addcmul(d, ratio * n_side, y, value=-1))
        by_q = torch.where(is_floor, turn * p, torch.addcmul(y, ratio * d_side, d))
    # The cross product comes last: it may be denormal, and no product before it is.
    weight = (2 * share) / denominator
    slope_p, slope_q = in_given_units(weight * by_p, scale), in_given_units(weight * by_q, scale)
    if scale is not None or is_negligible(gamma):  # at the origin an infinite slope would meet a cross of 0
        slope_p, slope_q = _bounded(slope_p, slope_p), _bounded(slope_q, slope_q)
    gradients = (
        as_rows_of(_bounded(slope_p * cross, P), mask, P),
        as_rows_of(_bounded(slope_q * -cross, Q), mask, Q),
    )
    return Reduced(loss, gradients)


def _in_safe_units(
    P: Tensor, Q: Tensor, Y_n: Tensor, Y_d: Tensor, gamma: float | Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, float | Tensor, Tensor | None]:
    if not is_wide(P, Q, Y_n, Y_d):
        return P.double(), Q.double(), Y_n.double(), Y_d.double(), gamma, None
    root = gamma.sqrt() if isinstance(gamma, Tensor) else math.sqrt(gamma)
    y, d, target_scale, _ = safe_pair(Y_n, Y_d, wide=True)
    assert target_scale is not None
    p, q, scale, _ = safe_pair(P, Q, wide=True, at_least=root / target_scale)
    assert scale is not None
    return p, q, y, d, (root / scale / target_scale).square(), scale


def _bounded(gradient: Tensor, like: Tensor) -> Tensor:
    """Keep a gradient inside the range of its dtype (nan stays); reached only below magnitudes of 1e-20."""
    largest = torch.finfo(like.dtype).max / 2
    return gradient.clamp(-largest, largest)
