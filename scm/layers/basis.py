"""Basis functions: how one feature becomes the columns that a rational head weighs.

What the columns are used for is decided in `projective_rational` and `scm_rational`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


class BasisFunction:
    """Turns x of shape (...) into columns of shape (..., degree + 1), one for each basis function."""

    def __call__(self, x: Tensor, degree: int) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} must define __call__(x, degree)")

    def largest_argument(self, degree: int, dtype: torch.dtype) -> float | None:
        """Largest |x| whose columns are all finite in `dtype`; None where that has no closed form."""
        return None


@dataclass(frozen=True)
class MonomialBasis(BasisFunction):
    """Columns 1, x, x², ... x^degree.

    >>> MonomialBasis()(torch.tensor([2.0, -1.0]), 2).tolist()
    [[1.0, 2.0, 4.0], [1.0, -1.0, 1.0]]
    """

    def __call__(self, x: Tensor, degree: int) -> Tensor:
        columns = [torch.ones_like(x)]
        for _ in range(degree):
            columns.append(columns[-1] * x)
        return torch.stack(columns, dim=-1)

    def largest_argument(self, degree: int, dtype: torch.dtype) -> float | None:
        """The degree-th root of the largest finite number, kept a rounding error of each factor below it."""
        return _root_of_largest(degree, dtype)


@dataclass(frozen=True)
class ChebyshevBasis(BasisFunction):
    """Columns T_0(x) ... T_degree(x) of the first kind, by T_{k+1} = 2x·T_k − T_{k−1}; x is not rescaled."""

    def __call__(self, x: Tensor, degree: int) -> Tensor:
        columns = [torch.ones_like(x)]
        if degree >= 1:
            columns.append(x)
        for _ in range(degree - 1):
            columns.append(2.0 * x * columns[-1] - columns[-2])
        return torch.stack(columns, dim=-1)

    def largest_argument(self, degree: int, dtype: torch.dtype) -> float | None:
        """The |x| up to which |2x|^degree >= |T_degree(x)| stays finite: at most twice too small."""
        root = _root_of_largest(degree, dtype)
        return root if degree <= 1 else 0.5 * root


@dataclass(frozen=True)
class CustomBasis(BasisFunction):
    """Columns of a caller's function `fn(x, degree)`, which must return shape (..., degree + 1)."""

    fn: Callable[[Tensor, int], Tensor]

    def __call__(self, x: Tensor, degree: int) -> Tensor:
        columns = self.fn(x, degree)
        expected = (*x.shape, degree + 1)
        if tuple(columns.shape) != expected:
            raise ValueError(
                f"a basis must return shape (..., degree + 1) = {expected}, got {tuple(columns.shape)}"
            )
        return columns


def _root_of_largest(degree: int, dtype: torch.dtype) -> float:
    """A little less than the `degree`-th root of the largest finite number, so that its power is finite."""
    info = torch.finfo(dtype)
    if degree <= 1:
        return float(info.max)
    # The factors round in `dtype`; the root itself is off by up to |log max|·ε of float64.
    return float(info.max) ** (1.0 / degree) * (1.0 - 4.0 * degree * float(info.eps) - 1e-12)
