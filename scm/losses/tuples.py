"""Units in which the arithmetic of tuples neither overflows nor vanishes.

Squares and products of float32 magnitudes fit into float64 with room to spare, so types below it are simply
widened. Float64 tuples are divided by the power of two below their larger member.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_SMALLEST = {torch.float64: 4 * torch.finfo(torch.float64).tiny}
_SMALLEST_NARROW = 4 * torch.finfo(torch.float32).tiny


class Pair(NamedTuple):
    """A pair in safe units. scale: what the members were divided by (None: 1).

    smallest_square: a floor for the sum of the squares that only matters where a gradient, of order
    1/magnitude, would leave the range of the dtype.
    """

    first: Tensor
    second: Tensor
    scale: Tensor | None
    smallest_square: float


def is_wide(*tensors: Tensor) -> bool:
    """Say whether any tensor is float64, so that widening cannot help."""
    return any(t.dtype == torch.float64 for t in tensors)


def safe_pair(first: Tensor, second: Tensor, *, wide: bool, at_least: float | Tensor = 0.0) -> Pair:
    """Return a pair whose squares and products with another safe pair are representable.

    at_least: no smaller scale than this (the square root of a gamma that is added to the squares).
    """
    if not wide:
        return Pair(first.double(), second.double(), None, _SMALLEST_NARROW**2)
    scale = torch.maximum(first.detach().abs(), second.detach().abs()).clamp(min=_SMALLEST[torch.float64])
    if isinstance(at_least, Tensor):
        scale = torch.maximum(scale, at_least)
    elif at_least > 0:
        scale = scale.clamp(min=at_least)
    scale = scale.log2().floor().clamp(max=1023).exp2()  # a power of two, so that scaling rounds nothing
    return Pair(first / scale, second / scale, scale, 1.0)


def is_negligible(gamma: float | Tensor) -> bool:
    """Say whether a gamma may be too small to keep a sum of squares away from 0; a tensor always may."""
    return isinstance(gamma, Tensor) or gamma < 1e-30


def in_given_units(gradient: Tensor, scale: Tensor | None) -> Tensor:
    """Return a gradient with respect to a scaled member as one with respect to the member itself."""
    return gradient if scale is None else gradient / scale
