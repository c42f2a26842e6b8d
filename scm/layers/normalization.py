"""Normalisation and softmax over tensors that hold bottoms: each answers a value and a bottom mask.

What gradients do at bottoms is decided in `scm.autodiff.policies`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from scm.autodiff.policies import GradientPolicy
from scm.layers.gating import gate_output


class SCMNorm(nn.Module):
    """Centres and scales each feature over dimension 0, counting only the entries that are not bottom.

    y = (x − mean)/√(variance + eps), with the variance of the population. A feature without two different
    entries has no scale: all of it is bottom. `deterministic` forms the sums in float64, so that the order
    in which a device adds changes nothing that float32 could show. The registered policy name is "scm_norm".

    Differs from zeroproofml 0.6.1: works under `torch.no_grad()`, non-finite entries join the bottoms
    instead of spoiling their feature, and bottoms hold 0 and not NaN.
    """

    def __init__(
        self,
        deterministic: bool = True,
        eps: float = 0.0,
        gradient_policy: GradientPolicy | None = None,
    ) -> None:
        super().__init__()
        if not (math.isfinite(eps) and eps >= 0.0):
            raise ValueError(f"eps must be finite and >= 0, got {eps=}")
        self.deterministic = deterministic
        self.eps = float(eps)
        self.gradient_policy = gradient_policy

    def forward(self, x: Tensor, bottom_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map x (B, ...) and a mask of its shape (None: none) to the scaled values and the bottoms' mask."""
        if x.ndim == 0:
            raise ValueError("x must have a batch dimension, got a scalar")
        bottom = _bottoms_of(x, ~torch.isfinite(x), bottom_mask)
        values = torch.where(bottom, torch.zeros_like(x), x)
        wide = values.double() if self.deterministic else values
        count = (~bottom).sum(dim=0)
        divisor = count.clamp_min(1).to(wide.dtype)
        mean = wide.sum(dim=0) / divisor
        centred = torch.where(bottom, torch.zeros_like(wide), wide - mean)
        variance = centred.square().sum(dim=0) / divisor
        flat = _without_spread(x, bottom) | ~(variance > 0) | ~torch.isfinite(variance)
        scale = torch.where(flat, torch.ones_like(variance), variance + self.eps).sqrt()
        bottom = bottom | flat
        scaled = torch.where(bottom, torch.zeros_like(wide), centred / scale).to(x.dtype)
        return gate_output(scaled, bottom, "scm_norm", self.gradient_policy), bottom


class SCMSoftmax(nn.Module):
    """Softmax over the last dimension; a row with a bottom is one-hot at the largest of its other logits.

    Answers probabilities and a mask of the rows that held a bottom. NaN and +inf are bottoms, −inf is a
    class of probability 0. A row without any other logit has no class: it is all 0. The registered policy
    name is "scm_softmax".

    Differs from zeroproofml 0.6.1: works under `torch.no_grad()`, and non-finite logits are bottoms instead
    of rows of NaN.
    """

    def __init__(self, gradient_policy: GradientPolicy | None = None) -> None:
        super().__init__()
        self.gradient_policy = gradient_policy

    def forward(self, logits: Tensor, bottom_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map logits (..., C) and a mask of their shape (None: none) to (..., C) and the row mask (...)."""
        if logits.ndim == 0:
            raise ValueError("logits must have a class dimension, got a scalar")
        bottom = _bottoms_of(logits, torch.isnan(logits) | (logits == math.inf), bottom_mask)
        possible = ~bottom & (logits > -math.inf)
        row_bottom = bottom.any(dim=-1) | ~possible.any(dim=-1)
        usable = torch.where(row_bottom.unsqueeze(-1), torch.zeros_like(logits), logits)
        soft = torch.softmax(usable, dim=-1)
        best = torch.where(possible, logits, torch.full_like(logits, -math.inf)).argmax(dim=-1, keepdim=True)
        classes = torch.arange(logits.shape[-1], device=logits.device)
        one_hot = ((classes == best) & possible).to(logits.dtype)
        out = torch.where(row_bottom.unsqueeze(-1), one_hot, soft)
        wide_mask = row_bottom.unsqueeze(-1).expand_as(out)
        return gate_output(out, wide_mask, "scm_softmax", self.gradient_policy), row_bottom


def _bottoms_of(x: Tensor, own: Tensor, given: Tensor | None) -> Tensor:
    if not x.is_floating_point():
        raise TypeError(f"x must be real floating point, got {x.dtype}")
    if given is None:
        return own
    if given.shape != x.shape:
        raise ValueError(f"bottom_mask must have shape {tuple(x.shape)}, got {tuple(given.shape)}")
    return own | given.to(torch.bool)


def _without_spread(x: Tensor, bottom: Tensor) -> Tensor:
    # By the entries themselves: the variance of equal numbers need not round to 0.
    low = torch.where(bottom, torch.full_like(x, math.inf), x).amin(dim=0)
    high = torch.where(bottom, torch.full_like(x, -math.inf), x).amax(dim=0)
    return ~(low < high)
