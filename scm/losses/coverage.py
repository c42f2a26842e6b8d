"""The coverage terms: how often the model may answer bottom. The hard one measures, the others train."""

from __future__ import annotations

import torch
from torch import Tensor

from scm.autodiff.policies import POLICY_CODES, GradientPolicy, policy_in_force
from scm.losses.rowwise import (
    Reduced,
    as_rows_of,
    bool_mask,
    check_at_least_zero,
    normalized,
    reduce_rows,
    rows_that_count,
    weights_of_rows,
)


def coverage(outputs: Tensor, is_bottom: Tensor, *, policy: GradientPolicy | None = None) -> Tensor:
    """Return the share of entries that are not bottom: 0-d float32, detached; 1 for no entries.

    outputs and policy are accepted for the signature of the field; a mask has no gradient to treat.
    """
    return 1.0 - _bottom_share(is_bottom)


def rejection_loss(
    is_bottom: Tensor,
    target_coverage: float | Tensor = 0.95,
    *,
    policy: GradientPolicy | None = None,
    row_weights: Tensor | None = None,
) -> Tensor:
    """Return ``relu(target_coverage - coverage)^2``, 0-d float32: a measurement, it has no gradient.

    target_coverage: in [0, 1] (ValueError; zeroproofml 0.6.1 does not check). Under the policy REJECT the
    loss is 0. An empty mask has coverage 1. row_weights: (rows,), the share is weighted by
    them. `soft_coverage_loss` is the form that trains.
    """
    check_share("target_coverage", target_coverage)
    in_force = policy_in_force("rejection_loss") if policy is None else policy
    shortfall = (target_coverage - (1.0 - _bottom_share(is_bottom, row_weights))).clamp(min=0)
    if isinstance(in_force, Tensor):
        shortfall = torch.where(in_force == POLICY_CODES[GradientPolicy.REJECT], 0.0, shortfall)
    elif in_force is GradientPolicy.REJECT:
        return torch.zeros_like(shortfall)
    return shortfall * shortfall


def soft_coverage_loss(
    Q: Tensor,
    tau: float | Tensor,
    temperature: float | Tensor,
    target: float | Tensor,
    mode: str = "under",
    *,
    mask: Tensor | None = None,
    row_weights: Tensor | None = None,
) -> Tensor:
    """Return ``relu(target - mean(sigmoid((|Q| - tau) / temperature)))^2``, which trains coverage.

    tau >= 0, temperature > 0, target in [0, 1]; mode: only "under". mask: entries to count, all by default;
    with none the loss is 0. row_weights: (rows,), the mean is weighted by them. Never gated:
    under the policy REJECT a model learns through this term alone.

    Differs from zeroproofml 0.6.1: at Q = 0 the gradient is the one-sided derivative, so that exact zeros
    are pushed out, to the side of their sign bit. A nan in a counted entry makes loss and gradients nan.
    """
    if mode != "under":
        raise ValueError(f"mode must be 'under', got {mode=}")
    check_at_least_zero("tau", tau)
    check_at_least_zero("temperature", temperature)
    if not isinstance(temperature, Tensor) and temperature == 0:
        raise ValueError(f"temperature must be > 0, got {temperature=}")
    check_share("target", target)
    weights = weights_of_rows(row_weights, Q)
    mask = rows_that_count(mask, weights)
    return reduce_rows(soft_coverage_kernel, Q, tau, temperature, target, mask, False, weights)


def soft_coverage_kernel(
    Q: Tensor,
    tau: float | Tensor,
    temperature: float | Tensor,
    target: float | Tensor,
    mask: Tensor | None,
    nonfinite_is_bottom: bool = False,
    weights: Tensor | None = None,
    *,
    with_gradients: bool,
) -> Reduced:
    """Kernel of the squared shortfall; `nonfinite_is_bottom`: such a row is not covered, instead of nan."""
    accepted = torch.sigmoid((Q.abs() - tau) / temperature)
    if nonfinite_is_bottom:
        accepted = torch.where(Q.isfinite(), accepted, 0.0)
    if weights is not None:
        return _weighted_shortfall(Q, accepted, temperature, target, mask, weights, with_gradients)
    if mask is None:
        share: Tensor | float = 1.0 / max(Q.numel(), 1)
        missing = target if Q.numel() else 0.0
    else:
        count = mask.sum()
        share = count.clamp(min=1).to(Q.dtype).reciprocal()
        missing = (count > 0).to(Q.dtype) * target  # where() would round a plain target to float32
        accepted = torch.where(mask, accepted, 0.0)
    shortfall = (missing - accepted.sum() * share).clamp(min=0)
    loss = shortfall * shortfall
    if not with_gradients:
        return Reduced(loss)
    slope = torch.copysign(torch.addcmul(accepted, accepted, accepted, value=-1), Q)
    return Reduced(loss, (as_rows_of(slope * (shortfall * (-2.0 * share / temperature)), mask, Q),))


def _weighted_shortfall(
    Q: Tensor,
    accepted: Tensor,
    temperature: float | Tensor,
    target: float | Tensor,
    mask: Tensor | None,
    weights: Tensor,
    with_gradients: bool,
) -> Reduced:
    """The kernel of rows with weights; `mask` is that of `rows_that_count`, and never None."""
    assert mask is not None
    accepted = torch.where(mask, accepted, 0.0)
    weights, one_over = normalized(torch.where(mask, weights, 0.0), accepted)
    missing = mask.any().to(Q.dtype) * target
    shortfall = (missing - (accepted * weights).sum() * one_over).clamp(min=0)
    loss = shortfall * shortfall
    if not with_gradients:
        return Reduced(loss)
    slope = torch.copysign(torch.addcmul(accepted, accepted, accepted, value=-1), Q)
    slope = slope * (shortfall * (-2.0 * one_over / temperature))
    return Reduced(loss, (as_rows_of(slope * weights, mask, Q),))


def ranked_coverage_loss(
    Q: Tensor,
    tau: float | Tensor,
    margin: float | Tensor,
    target: float | Tensor,
    *,
    mask: Tensor | None = None,
    row_weights: Tensor | None = None,
) -> Tensor:
    """Return what the `target` share of rows with the largest |Q| lacks to tau + margin, on average, 0-d.

    A row lacks ``relu(1 - |Q| / (tau + margin))``, in [0, 1]; the mean is over all rows, and of the others
    nothing is asked. The last row asked counts as far as it is needed for the share. tau >= 0, margin > 0,
    target in [0, 1]. mask: entries to count, all by default; with none the loss is 0. row_weights: (rows,),
    shares and mean are weighted by them. A |Q| that is not finite lacks 1, and has no gradient. Never gated.

    Beside `soft_coverage_loss`: a row far below the threshold is pulled as much as one close to it, where the
    sigmoid of a small temperature has no gradient left; pressure ends row by row, not for all at once; and of
    rows that are alike, those on the larger side are pushed out and the others left alone, so that a share
    between none and all of them can be held. Choose this one where something controls its weight.

    >>> Q = torch.tensor([0.9, 0.1, 0.2, 0.0])
    >>> round(float(ranked_coverage_loss(Q, 0.3, 0.1, target=0.5)), 6)  # of 0.9 and 0.2, the latter lacks 1/2
    0.125
    """
    check_at_least_zero("tau", tau)
    check_at_least_zero("margin", margin)
    if not isinstance(margin, Tensor) and margin == 0:
        raise ValueError(f"margin must be > 0, got {margin=}")
    check_share("target", target)
    weights = weights_of_rows(row_weights, Q)
    mask = rows_that_count(None if mask is None else bool_mask("mask", mask, Q), weights)
    return reduce_rows(ranked_coverage_kernel, Q, tau, margin, target, mask, weights)


def ranked_coverage_kernel(
    Q: Tensor,
    tau: float | Tensor,
    margin: float | Tensor,
    target: float | Tensor,
    mask: Tensor | None,
    weights: Tensor | None = None,
    *,
    with_gradients: bool,
) -> Reduced:
    """Kernel of `ranked_coverage_loss`; with weights, `mask` is that of `rows_that_count`."""
    size = torch.where(Q.isfinite(), Q.abs(), 0.0).flatten()
    key = size if mask is None else torch.where(mask.flatten(), size, -1.0)
    ranked, order = key.sort(descending=True)
    asked = _asked_shares(ranked, order, target, mask, weights)
    edge = tau + margin
    lack = (1.0 - ranked / edge).clamp(min=0)
    loss = (asked * lack).sum()
    if not with_gradients:
        return Reduced(loss)
    pull = torch.where(lack > 0, asked / edge, 0.0)
    slope = torch.zeros_like(size).scatter(0, order, pull).view_as(Q)
    slope = torch.where(Q.isfinite(), -torch.copysign(slope, Q), 0.0)
    return Reduced(loss, (as_rows_of(slope, mask, Q),))


def _asked_shares(
    ranked: Tensor, order: Tensor, target: float | Tensor, mask: Tensor | None, weights: Tensor | None
) -> Tensor:
    """Return what each row, from the largest |Q| on, weighs in the mean; 0 beyond the target share."""
    if weights is None:
        before = torch.arange(len(ranked), device=ranked.device, dtype=ranked.dtype)
        if mask is None:
            return (target * len(ranked) - before).clamp(0.0, 1.0) / max(len(ranked), 1)
        count = mask.sum().to(ranked.dtype)
        return (target * count - before).clamp(0.0, 1.0) / count.clamp(min=1.0)
    assert mask is not None
    own, one_over = normalized(torch.where(mask, weights, 0.0).flatten()[order], ranked)
    own = own * one_over
    return torch.minimum((target - (own.cumsum(0) - own)).clamp(min=0), own)


def check_share(name: str, value: float | Tensor) -> None:
    """Raise ValueError unless a plain number lies in [0, 1]; tensors are trusted, never read."""
    if not isinstance(value, Tensor) and not 0 <= value <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {name}={value!r}")


def _bottom_share(is_bottom: Tensor, row_weights: Tensor | None = None) -> Tensor:
    weights = weights_of_rows(row_weights, is_bottom)
    if weights is not None:
        weights = weights.detach().to(torch.float32)
        total = weights.sum()
        return torch.where(is_bottom, weights, 0.0).sum() / torch.where(total > 0, total, 1.0)
    return is_bottom.detach().sum(dtype=torch.float32) / max(is_bottom.numel(), 1)
