"""What laws are tried on: values at the edges of every dtype, mixed with random ones, in batches.

Most inputs that break something are of one kind (2e19, whose square leaves float32; one ulp below a
threshold; the smallest denormal), and random floats never meet them. Values are drawn as plain numbers, row
by row, and become tensors at the end: that is fast, and a case is made small by dropping rows and then making
numbers plain. Laws are elsewhere; here is nothing but numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
"""All that laws are tried in, the plainest first: a case is made small towards it."""

TAU_INFER, TAU_TRAIN = 1e-6, 1e-4
LARGEST_BATCH = 6
NOT_FINITE = (math.nan, math.inf, -math.inf)

Values = st.SearchStrategy[float]

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_PLAIN = (0.0, 1.0, -1.0, 2.0, 0.5, 3.0)
_MAGNITUDES = (
    1e-3,
    0.00195,
    1e-8,
    1e-20,
    1e-30,
    1e-150,
    300.0,
    1e5,
    1e10,
    1e19,
    2e19,
    1e30,
    1e38,
    1e155,
    1e300,
)


def rounded(value: float, dtype: torch.dtype) -> float:
    """The nearest number of the dtype."""
    return float(torch.tensor(value, dtype=dtype))


def ulps(value: float, dtype: torch.dtype) -> tuple[float, float, float]:
    """The number of the dtype nearest to `value` (finite), and its neighbours below and above.

    >>> ulps(1.0, torch.bfloat16)
    (1.0, 0.99609375, 1.0078125)
    """
    held = torch.tensor([abs(value)], dtype=dtype)
    bits = held.view(_BITS[held.element_size()])
    nearest, inward, outward = (
        float((bits + step).view(dtype)) if bits + step >= 0 else 0.0 for step in (0, -1, 1)
    )
    if nearest == 0.0:
        inward = -outward
    if math.copysign(1.0, value) < 0:
        return -nearest, -outward, -inward
    return nearest, inward, outward


@lru_cache(maxsize=512)
def edge_values(dtype: torch.dtype, around: tuple[float, ...] = ()) -> tuple[float, ...]:
    """Finite numbers of the dtype at which something changes, both signs, the plainest first.

    Zero and signed zero, denormals, the smallest normal number, 1 and the usual thresholds with an ulp to
    each side, magnitudes whose squares or products leave the dtype, the largest number, and `around` with an
    ulp to each side.
    """
    limits = torch.finfo(dtype)
    smallest = ulps(0.0, dtype)[2]
    sizes = [*_PLAIN, -0.0]
    for value in (*around, 1.0, TAU_INFER, TAU_TRAIN):
        sizes += ulps(value, dtype)
    sizes += [smallest, limits.tiny / 2, *ulps(limits.tiny, dtype)]
    sizes += [rounded(value, dtype) for value in _MAGNITUDES]
    sizes += [math.sqrt(limits.max), limits.max / 2, limits.max]
    both = [rounded(size * sign, dtype) for size in sizes for sign in (1.0, -1.0)]
    return tuple(
        {(value, math.copysign(1.0, value)): value for value in both if math.isfinite(value)}.values()
    )


@lru_cache(maxsize=512)
def finite_values(dtype: torch.dtype, around: tuple[float, ...] = ()) -> Values:
    """Edge values mixed with any finite number and with numbers of order 1; all are of the dtype."""
    if around:  # what is named is met often: half of all edges are of the table alone
        named = [value for near in around for value in ulps(near, dtype)]
        return st.one_of(
            st.sampled_from(edge_values(dtype, around)),
            st.sampled_from([sign * value for value in named for sign in (1.0, -1.0)]),
            _random(dtype),
        )
    return st.one_of(st.sampled_from(edge_values(dtype)), ordinary_values(dtype), _random(dtype))


@lru_cache(maxsize=512)
def any_values(dtype: torch.dtype, around: tuple[float, ...] = ()) -> Values:
    """Finite values, NaN and both infinities."""
    return st.one_of(finite_values(dtype, around), st.sampled_from(NOT_FINITE))


@lru_cache(maxsize=64)
def ordinary_values(dtype: torch.dtype, size: float = 2.0) -> Values:
    """Zeros, whole numbers and random numbers in [-size, size]."""
    plain = [value for value in (*_PLAIN, -0.0, TAU_TRAIN, 1e-3) if abs(value) <= size]
    return st.one_of(
        st.sampled_from([rounded(value, dtype) for value in plain]),
        st.floats(-size, size, width=16 if dtype == torch.float16 else 32),
    )


def _of_width(dtype: torch.dtype) -> Values:
    if dtype == torch.float16:
        return st.floats(allow_nan=False, allow_infinity=False, width=16)
    if dtype == torch.float64:
        return st.floats(allow_nan=False, allow_infinity=False, width=64)
    return st.floats(allow_nan=False, allow_infinity=False, width=32)


def _random(dtype: torch.dtype) -> Values:
    values = _of_width(dtype)
    if dtype == torch.bfloat16:
        largest = torch.finfo(dtype).max
        return values.map(lambda value: min(max(value, -largest), largest))
    return values


thresholds: Values = st.one_of(
    st.sampled_from([1.0, TAU_INFER, TAU_TRAIN, 1e-3, 2.5e-2, 0.5]), st.floats(TAU_INFER, 10.0)
)
"""Thresholds of |Q|; every dtype can hold them."""


@lru_cache(maxsize=64)
def lifted_targets(dtype: torch.dtype, ordinary: bool = False) -> st.SearchStrategy[tuple[float, float]]:
    """(Y_n, Y_d) of finite targets and of bottoms on both sides."""
    values = ordinary_values(dtype) if ordinary else finite_values(dtype)
    return st.one_of(values.map(lambda y: (y, 1.0)), st.sampled_from([(1.0, 0.0), (-1.0, 0.0)]))


Column = Callable[[torch.dtype, tuple[float, ...]], st.SearchStrategy[Any]]

COLUMNS: dict[str, Column] = {
    "finite": finite_values,
    "any": any_values,
    "ordinary": lambda dtype, around: ordinary_values(dtype),
    "target": lambda dtype, around: lifted_targets(dtype),
    "ordinary target": lambda dtype, around: lifted_targets(dtype, True),
    "flag": lambda dtype, around: st.booleans(),
    "bad": lambda dtype, around: st.sampled_from([*NOT_FINITE, torch.finfo(dtype).max]),
}
"""Kinds of columns by name; a target is two columns."""


def batches(
    dtypes: Sequence[torch.dtype],
    columns: Mapping[str, str],
    *,
    near: Sequence[str] = (),
    plain: Mapping[str, st.SearchStrategy[Any]] | None = None,
    least: int = 1,
    most: int = LARGEST_BATCH,
) -> st.SearchStrategy[dict[str, Any]]:
    """Batches of `least` to `most` rows as tensors by name, some rows twice, in one of the dtypes.

    columns: name to a kind of `COLUMNS`; a name with a comma ("Y_n,Y_d") gets the parts of its kind. near:
    names of thresholds that are drawn as well, ascending, and around which values of the columns are drawn.
    plain: what else a case holds. Flags become bool tensors.
    """
    return _batches(
        tuple(dtypes), tuple(columns.items()), tuple(near), tuple((plain or {}).items()), least, most
    )


@st.composite
def _batches(
    draw: st.DrawFn,
    dtypes: tuple[torch.dtype, ...],
    columns: tuple[tuple[str, str], ...],
    near: tuple[str, ...],
    plain: tuple[tuple[str, st.SearchStrategy[Any]], ...],
    least: int,
    most: int,
) -> dict[str, Any]:
    dtype = draw(st.sampled_from(dtypes))
    around = tuple(sorted(draw(thresholds) for _ in near))
    case: dict[str, Any] = dict(zip(near, around, strict=True))
    for name, values in plain:
        case[name] = draw(values)
    kinds = [COLUMNS[kind](dtype, around) for _, kind in columns]
    rows = draw(st.lists(st.tuples(*kinds), min_size=least, max_size=most))
    rows = rows + rows[: draw(st.integers(0, 2))]  # duplicated rows
    for place, (name, kind) in enumerate(columns):
        held = [row[place] for row in rows]
        parts = name.split(",")
        if len(parts) > 1:
            columns_of = zip(*held, strict=True) if held else [()] * len(parts)
            for part, numbers in zip(parts, columns_of, strict=True):
                case[part] = torch.tensor(numbers, dtype=dtype)
        else:
            case[name] = torch.tensor(held, dtype=torch.bool if kind == "flag" else dtype)
    return case


def matrices(rows: st.SearchStrategy[float], width: int, dtype: torch.dtype) -> st.SearchStrategy[Tensor]:
    """Tensors (rows, width) of 1 to `LARGEST_BATCH` rows."""
    return st.lists(st.tuples(*[rows] * width), min_size=1, max_size=LARGEST_BATCH).map(
        lambda held: torch.tensor(held, dtype=dtype)
    )


def reversed_rows(count: int, turn: int) -> list[int]:
    """An order of `count` rows that is another one for every turn: reversed, then rotated."""
    order = list(range(count))[::-1]
    return order[turn % max(count, 1) :] + order[: turn % max(count, 1)]
