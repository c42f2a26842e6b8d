"""Basis functions: how one feature becomes the columns that a rational head weighs.

What the columns are used for is decided in `projective_rational`, `scm_rational` and `tr_rational`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


class BasisFunction(ABC):
    """Turns x of shape (...) into columns of shape (..., degree + 1), one for each basis function."""

    @abstractmethod
    def __call__(self, x: Tensor, degree: int) -> Tensor:
        """Return the columns of x up to this degree."""

    def largest_argument(self, degree: int, dtype: torch.dtype) -> float | None:
        """Largest |x| whose columns are all finite in `dtype`; None where that has no closed form."""
        return None

    def bound(self, degree: int) -> float | None:
        """Largest |column| on the basis's domain; None where that has no closed form."""
        return None

    def slope_bound(self, degree: int) -> float | None:
        """Largest derivative of a column by x, in size, on the basis's domain; None as above."""
        return None


@dataclass(frozen=True)
class MonomialBasis(BasisFunction):
    """Columns 1, x, x², ... x^degree; `domain` only says where the bounds hold.

    >>> MonomialBasis()(torch.tensor([2.0, -1.0]), 2).tolist()
    [[1.0, 2.0, 4.0], [1.0, -1.0, 1.0]]
    """

    domain: tuple[float, float] = (-1.0, 1.0)

    def __post_init__(self) -> None:
        _check_domain(self.domain)

    def __call__(self, x: Tensor, degree: int) -> Tensor:
        columns = [torch.ones_like(x)]
        for _ in range(degree):
            columns.append(columns[-1] * x)
        return torch.stack(columns, dim=-1)

    def largest_argument(self, degree: int, dtype: torch.dtype) -> float | None:
        """The degree-th root of the largest finite number, kept a rounding error of each factor below it."""
        return _root_of_largest(degree, dtype)

    def bound(self, degree: int) -> float:
        """The power of the end farther from 0 that is largest."""
        return max(1.0, self._radius() ** degree)

    def slope_bound(self, degree: int) -> float:
        """The derivative that is largest at that end."""
        return max((k * self._radius() ** (k - 1) for k in range(1, degree + 1)), default=0.0)

    def _radius(self) -> float:
        return max(abs(end) for end in self.domain)


@dataclass(frozen=True)
class ChebyshevBasis(BasisFunction):
    """Columns T_0(t) ... T_degree(t) of the first kind, by T_{k+1} = 2t·T_k − T_{k−1}.

    t is x mapped from `domain` onto [-1, 1], where no column is larger than 1.

    >>> ChebyshevBasis(domain=(0.0, 4.0))(torch.tensor([4.0, 2.0]), 2).tolist()
    [[1.0, 1.0, 1.0], [1.0, 0.0, -1.0]]
    """

    domain: tuple[float, float] = (-1.0, 1.0)

    def __post_init__(self) -> None:
        _check_domain(self.domain)

    def __call__(self, x: Tensor, degree: int) -> Tensor:
        middle, half = self._middle_and_half()
        t = x if (middle, half) == (0.0, 1.0) else (x - middle) / half
        columns = [torch.ones_like(t)]
        if degree >= 1:
            columns.append(t)
        for _ in range(degree - 1):
            columns.append(2.0 * t * columns[-1] - columns[-2])
        return torch.stack(columns, dim=-1)

    def largest_argument(self, degree: int, dtype: torch.dtype) -> float | None:
        """The |x| up to which |2t|^degree >= |T_degree(t)| stays finite: at most twice too small.

        None where the domain lies so far from 0 that no bound on |x| would leave room for it.
        """
        root = _root_of_largest(degree, dtype)
        largest_t = root if degree <= 1 else 0.5 * root
        middle, half = self._middle_and_half()
        if (middle, half) == (0.0, 1.0):
            return largest_t
        # x − middle must be finite as well; it and the division round.
        reach = min(largest_t * half, float(torch.finfo(dtype).max))
        limit = reach * (1.0 - 4.0 * float(torch.finfo(dtype).eps)) - abs(middle)
        return limit if limit >= max(abs(end) for end in self.domain) else None

    def bound(self, degree: int) -> float:
        """1: |T_k| <= 1 on the domain."""
        return 1.0

    def slope_bound(self, degree: int) -> float:
        """degree² at the ends of the domain, by the slope of the map."""
        return degree**2 / self._middle_and_half()[1]

    def _middle_and_half(self) -> tuple[float, float]:
        low, high = self.domain
        return 0.5 * (low + high), 0.5 * (high - low)


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


def finite_columns(basis: BasisFunction, x: Tensor, degree: int) -> tuple[Tensor, Tensor]:
    """Columns of the basis, with 0 for x where a column would not be finite, and where they are true."""
    limit = basis.largest_argument(degree, x.dtype)
    if limit is None:
        # A basis of the caller: only evaluating it tells where it overflows, and an infinite column that
        # is merely masked would still send NaN to x.
        with torch.no_grad():
            usable = torch.isfinite(x) & torch.isfinite(basis(x, degree)).all(dim=-1)
    else:
        usable = x.abs() <= limit
    return basis(torch.where(usable, x, torch.zeros_like(x)), degree), usable


def _check_domain(domain: tuple[float, float]) -> None:
    low, high = domain
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"domain must be two finite numbers in ascending order, got {domain=}")


def _root_of_largest(degree: int, dtype: torch.dtype) -> float:
    """A little less than the `degree`-th root of the largest finite number, so that its power is finite."""
    info = torch.finfo(dtype)
    if degree <= 1:
        return float(info.max)
    # The factors round in `dtype`; the root itself is off by up to |log max|·ε of float64.
    return float(info.max) ** (1.0 / degree) * (1.0 - 4.0 * degree * float(info.eps) - 1e-12)
