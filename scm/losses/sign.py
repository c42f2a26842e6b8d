"""The orientation term: on which side of infinity a bottom lies."""

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
    bool_mask,
    check_at_least_zero,
    normalized,
    reduce_rows,
    rows_that_count,
    weights_of_rows,
)
from scm.losses.tuples import in_given_units, is_negligible, is_wide, safe_pair


def sign_consistency_loss(
    P: Tensor,
    Q: Tensor,
    Y_n: Tensor,
    Y_d: Tensor,
    gamma: float | Tensor = 1e-9,
    mask_singular: Tensor | None = None,
    epsilon_sing: float = 1e-3,
    *,
    row_weights: Tensor | None = None,
) -> Tensor:
    """Return the mean over ALL entries of ``1 - cos((P, Q), (Y_n, Y_d))`` where singular, of 0 elsewhere.

    mask_singular: the entries that have an orientation (expands to the rows); by default those with
    ``|Y_d| <= epsilon_sing``, which takes every bottom for one at +infinity or -infinity. Pass
    `SemanticTargets.mask_oriented` to leave out bottoms without a direction. gamma, epsilon_sing: finite and
    >= 0. gamma is added to the squared norms, so the gradient is at most 1/sqrt(gamma). Targets get none.
    row_weights: (rows,), the mean is weighted by them.

    Differs from zeroproofml 0.6.1: finite gradients for every finite tuple, also with gamma = 0 and below
    1e-150; 0 for an empty batch; real inputs only (TypeError for complex).
    """
    check_at_least_zero("gamma", gamma)
    check_at_least_zero("epsilon_sing", epsilon_sing)
    if P.is_complex() or Q.is_complex():
        raise TypeError(f"P and Q must be real, got {P.dtype} and {Q.dtype}")
    if mask_singular is None:
        mask_singular = Y_d.abs() <= epsilon_sing
    like = torch.broadcast_tensors(P, Q, Y_n, Y_d)[0]
    weights = weights_of_rows(row_weights, like)
    mask = rows_that_count(bool_mask("mask_singular", mask_singular, like), weights)
    P, Q = gate_tuple(P, Q)
    return reduce_rows(sign_kernel, P, Q, Y_n, Y_d, gamma, mask, weights)


def sign_kernel(
    P: Tensor,
    Q: Tensor,
    Y_n: Tensor,
    Y_d: Tensor,
    gamma: float | Tensor,
    mask: Tensor,
    weights: Tensor | None = None,
    *,
    with_gradients: bool,
) -> Reduced:
    """Kernel of the mean of ``1 - cos`` over all entries, 0 outside of `mask`."""
    wide = is_wide(P, Q, Y_n, Y_d)
    root = gamma.sqrt() if isinstance(gamma, Tensor) else math.sqrt(gamma)
    p, q, scale, smallest = safe_pair(P, Q, wide=wide, at_least=root)
    y, d, target_scale, _ = safe_pair(Y_n, Y_d, wide=wide, at_least=root)
    length = torch.addcmul(p * p, q, q) + (gamma if scale is None else (root / scale).square())
    target = torch.addcmul(y * y, d, d) + (gamma if target_scale is None else (root / target_scale).square())
    if is_negligible(gamma):
        length, target = length.clamp(min=smallest), target.clamp(min=TINY)
    inverse = (length * target).rsqrt()
    cosine = torch.addcmul(p * y, q, d) * inverse
    cost = torch.where(mask, (1.0 - cosine).clamp(min=0), 0.0)
    share: Tensor | float = 1.0 / max(cost.numel(), 1)
    if weights is not None:
        weights, one_over = normalized(weights, cost)
        cost, share = cost * weights, weights * one_over
        loss = (cost.sum() * one_over).to(loss_dtype(P, Q))
    else:
        loss = (cost.sum() * share).to(loss_dtype(P, Q))
    if not with_gradients:
        return Reduced(loss)
    along, inverse = cosine / length * share, inverse * share
    gradients = (
        as_rows_of(in_given_units(torch.addcmul(along * p, inverse, y, value=-1), scale), mask, P),
        as_rows_of(in_given_units(torch.addcmul(along * q, inverse, d, value=-1), scale), mask, Q),
    )
    return Reduced(loss, gradients)
