"""The margin term: denominators of finite rows stay away from zero."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from scm.autodiff.policies import gate_denominator
from scm.losses.rowwise import (
    Reduced,
    bool_mask,
    check_at_least_zero,
    normalized,
    reduce_rows,
    rows_that_count,
    weights_of_rows,
)

MarginReduction = Literal["population", "conditional"]
REDUCTIONS: tuple[MarginReduction, ...] = ("population", "conditional")


def margin_loss(
    Q: Tensor,
    tau_train: float | Tensor = 1e-4,
    mask_finite: Tensor | None = None,
    *,
    reduction: MarginReduction = "population",
    row_weights: Tensor | None = None,
) -> Tensor:
    """Return the mean of ``relu(tau_train - |Q|)^2`` over the finite rows.

    mask_finite: expands to Q; other entries count 0. reduction: "population" divides by all entries,
    "conditional" by the finite ones (at least 1). row_weights: (rows,), the mean is weighted by them. An
    empty Q gives 0.

    Differs from zeroproofml 0.6.1: a row that mask_finite names is pushed out of an exact zero, to the side
    of its sign bit (the gradient there is the one-sided derivative). Without a mask nothing says that the
    zero is wrong, and its gradient is 0, as there.
    """
    check_at_least_zero("tau_train", tau_train)
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {list(REDUCTIONS)}, got {reduction=}")
    mask = None if mask_finite is None else bool_mask("mask_finite", mask_finite, Q)
    Q = gate_denominator(Q, tau=tau_train)
    weights = weights_of_rows(row_weights, Q)
    zeros_leave = mask is not None
    mask = rows_that_count(mask, weights)
    return reduce_rows(below_kernel, Q, tau_train, mask, reduction == "conditional", zeros_leave, weights)


def below_kernel(
    Q: Tensor,
    tau: float | Tensor,
    mask: Tensor | None,
    conditional: bool,
    zeros_leave: bool,
    weights: Tensor | None = None,
    *,
    with_gradients: bool,
) -> Reduced:
    """Kernel of the mean of ``relu(tau - |Q|)^2``; exact zeros are pushed out if `zeros_leave`."""
    excess = (tau - Q.abs()).clamp(min=0)
    loss, share, excess = _mean_square(excess, mask, conditional, weights)
    if not with_gradients:
        return Reduced(loss)
    # copysign, unlike the derivative of |Q|, has no zero at zero.
    outward = torch.copysign(excess, Q) if zeros_leave else excess * Q.sign()
    return Reduced(loss, (outward * (-2.0 * share),))


def above_kernel(
    Q: Tensor,
    tau: float | Tensor,
    mask: Tensor | None,
    conditional: bool,
    weights: Tensor | None = None,
    *,
    with_gradients: bool,
) -> Reduced:
    """Kernel of the mean of ``relu(|Q| - tau)^2``; what is too large to be squared counts as the largest."""
    largest = math.sqrt(torch.finfo(Q.dtype).max / max(Q.numel(), 1)) / 2
    excess = (Q.abs() - tau).clamp(min=0, max=largest)
    loss, share, excess = _mean_square(excess, mask, conditional, weights)
    if not with_gradients:
        return Reduced(loss)
    return Reduced(loss, (torch.copysign(excess, Q) * (2.0 * share),))


def _mean_square(
    excess: Tensor, mask: Tensor | None, conditional: bool, weights: Tensor | None
) -> tuple[Tensor, Tensor | float, Tensor]:
    """Return the mean of the squares, the share of each row in it, and the excess of the rows that count."""
    if mask is not None:
        excess = torch.where(mask, excess, 0.0)
    if weights is not None:
        counted = torch.where(mask, weights, 0.0) if conditional and mask is not None else weights
        one_over = normalized(counted, excess)[1]
        weights = weights.to(excess.dtype)
        return (
            torch.dot((excess * weights).flatten(), excess.flatten()) * one_over,
            weights * one_over,
            excess,
        )
    share: Tensor | float = 1.0 / max(excess.numel(), 1)
    if conditional and mask is not None:
        share = mask.sum().clamp(min=1).to(excess.dtype).reciprocal()
    return torch.dot(excess.flatten(), excess.flatten()) * share, share, excess
