"""The default fit term: the angle between two projective tuples."""

from __future__ import annotations

import torch
from torch import Tensor

from scm.autodiff.policies import gate_tuple
from scm.losses.rowwise import TINY, Reduced, as_rows_of, mask_and_weights, mean_over, reduce_rows
from scm.losses.tuples import in_given_units, is_wide, safe_pair


def projective_fit_loss(
    P: Tensor,
    Q: Tensor,
    Y_n: Tensor,
    Y_d: Tensor,
    *,
    mask: Tensor | None = None,
    row_weights: Tensor | None = None,
) -> Tensor:
    """Return the mean of sin^2 of the angle between the lines through (P, Q) and (Y_n, Y_d), in [0, 1].

    That is ``(P*Y_d - Q*Y_n)^2 / ((P^2 + Q^2) * (Y_n^2 + Y_d^2))``: unchanged under (P, Q) -> c*(P, Q), the
    same for both orientations of a bottom (where it is Q^2/(P^2 + Q^2)), and bounded for every tuple. (0, 0)
    stands for no value at all and costs 1; its gradient is 0, and the margin term moves it.

    mask: rows to average over (bool, expands to the rows), all by default; over no rows the loss is 0.
    row_weights: (rows,), the mean is weighted by them. The targets get no gradient. 0-d, in the
    wider dtype of P and Q (at least float32).
    """
    P, Q = gate_tuple(P, Q)
    mask, weights = mask_and_weights(mask, row_weights, P, Q, Y_n, Y_d)
    return reduce_rows(_sine_squared, P, Q, Y_n, Y_d, mask, weights)


def _sine_squared(
    P: Tensor,
    Q: Tensor,
    Y_n: Tensor,
    Y_d: Tensor,
    mask: Tensor | None,
    weights: Tensor | None,
    *,
    with_gradients: bool,
) -> Reduced:
    wide = is_wide(P, Q, Y_n, Y_d)
    p, q, scale, smallest = safe_pair(P, Q, wide=wide)
    y, d = safe_pair(Y_n, Y_d, wide=True)[:2] if wide else (Y_n, Y_d)
    cross = torch.addcmul(p * d, q, y, value=-1)
    dot = torch.addcmul(p * y, q, d)
    squared = cross * cross
    product = torch.addcmul(squared, dot, dot) + TINY  # (P^2 + Q^2) * (Y_n^2 + Y_d^2)
    loss, share = mean_over((squared + TINY) / product, mask, weights)
    loss = loss.to(loss_dtype(P, Q))
    if not with_gradients:
        return Reduced(loss)
    length = torch.addcmul(p * p, q, q).clamp(min=smallest)
    slope = cross * dot / product / length * (2 * share)
    gradients = (
        as_rows_of(in_given_units(slope * q, scale), mask, P),
        as_rows_of(in_given_units(slope * -p, scale), mask, Q),
    )
    return Reduced(loss, gradients)


def loss_dtype(P: Tensor, Q: Tensor) -> torch.dtype:
    """Return the dtype of a loss of P and Q: theirs, but at least float32."""
    if P.dtype == Q.dtype == torch.float32:
        return torch.float32
    return torch.promote_types(torch.promote_types(P.dtype, Q.dtype), torch.float32)
