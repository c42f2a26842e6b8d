"""Where the values of one trial lie: a first number, and how far it is to the next one in each dimension.

Views are arithmetic on these steps. What is computed of values is decided in `lowering`, and how single
numbers are spoken of, in `words`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from scm.packed.words import C_TYPES, LoweringError, number_text


@dataclass(frozen=True)
class Place:
    """Where a value of one trial lies: an expression for its first number, and steps for each dimension.

    literal: the value itself, where it is one number that is known now.
    """

    pointer: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = 0
    literal: str | None = None

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def kind(self) -> str:
        return C_TYPES[self.dtype]

    @property
    def start(self) -> str:
        """The address of its first number."""
        return f"({self.pointer} + {self.offset})" if self.offset else self.pointer

    def at(self, index: str) -> str:
        """Return the number at an index expression, from the first one on."""
        if self.literal is not None:
            return self.literal
        return f"{self.pointer}[{self.offset} + {index}]" if self.offset else f"{self.pointer}[{index}]"


def dense_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the steps of numbers that lie row after row."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


@dataclass(frozen=True)
class Form:
    """What is known of an input or output beside the graph: its steps within one trial."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @classmethod
    def of(cls, value: Tensor) -> Form:
        """Return the form of one trial's part of a tensor."""
        shape, strides = tuple(value.shape[1:]), value.stride()[1:]
        kept = tuple(step if size > 1 else 0 for size, step in zip(shape, strides, strict=True))
        return cls(value.dtype, shape, kept)


def literal_place(value: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> Place:
    text = number_text(value, C_TYPES[dtype])
    return Place("", dtype, shape, (0,) * len(shape), literal=text)


def weight_of(place: Place) -> int:
    """Of operands that could say how a result lies, one that is no view of fewer numbers says it."""
    return sum(1 for size, step in zip(place.shape, place.strides, strict=True) if size > 1 and step)


def spread_strides(place: Place, shape: Sequence[int]) -> tuple[int, ...]:
    """Return the steps of a value that is broadcast to a shape."""
    if place.literal is not None:
        return (0,) * len(shape)
    missing = len(shape) - len(place.shape)
    if missing < 0:
        raise LoweringError("a value of more dimensions than its result")
    own = [
        0 if size == 1 and whole != 1 else step
        for size, step, whole in zip(place.shape, place.strides, shape[missing:], strict=True)
    ]
    return (*[0] * missing, *own)


def ordered(place: Place, order: Sequence[int]) -> Place:
    shape, strides = (tuple(held[dim] for dim in order) for held in (place.shape, place.strides))
    return replace(place, shape=shape, strides=strides)


def without_dim(place: Place, dim: int) -> Place:
    kept = [item for item in range(len(place.shape)) if item != dim]
    return ordered(place, kept)


def split_dims(place: Place, count: int) -> tuple[Place, Place]:
    return (
        replace(place, shape=place.shape[:count], strides=place.strides[:count]),
        replace(place, shape=place.shape[count:], strides=place.strides[count:]),
    )


def coalesced(place: Place) -> tuple[int, int] | None:
    """Return number and step of numbers that lie at equal distances, None for others."""
    dims = [(size, step) for size, step in zip(place.shape, place.strides, strict=True) if size > 1]
    if not dims:
        return 1, 1
    for (_, outer), (size, inner) in itertools.pairwise(dims):
        if outer != size * inner:
            return None
    return math.prod(size for size, _ in dims), dims[-1][1]


def viewed(place: Place, shape: tuple[int, ...]) -> Place | None:
    """Return a value seen in another shape of as many numbers; None where it must be laid out anew."""
    if place.literal is not None:
        return replace(place, shape=shape, strides=(0,) * len(shape))
    old = [(size, step) for size, step in zip(place.shape, place.strides, strict=True) if size != 1]
    strides = [0] * len(shape)
    at = len(old) - 1
    size_left, step = 1, 0
    for dim in reversed(range(len(shape))):
        if shape[dim] == 1:
            continue
        if size_left == 1:
            if at < 0:
                return None
            size_left, step = old[at]
            at -= 1
        strides[dim] = step
        rest = shape[dim]
        while rest > size_left:  # several old dimensions make one
            if rest % size_left or at < 0 or old[at][1] != size_left * step:
                return None
            size_left, at = size_left * old[at][0], at - 1
            step = strides[dim]
        if size_left % rest:
            return None
        size_left //= rest
        step *= rest
    return replace(place, shape=shape, strides=tuple(strides))


def as_turned(source: Place, to: Place) -> tuple[int, int, int, int] | None:
    """Return (rows, columns, step, step of the target) where a copy is the transpose of a matrix."""
    if source.dtype != to.dtype or source.literal is not None or len(to.shape) != 2 or min(to.shape) < 2:
        return None
    for one, two in ((0, 1), (1, 0)):
        if source.strides[two] == 1 and to.strides[one] == 1:
            return to.shape[one], to.shape[two], source.strides[one], to.strides[two]
    return None


class Arena:
    """Memory of a step: pieces that are used again as soon as nobody reads them."""

    def __init__(self) -> None:
        self.bytes = 0
        self._free: dict[int, list[int]] = {}
        self._held: dict[str, tuple[int, int]] = {}
        self._named: list[tuple[str, str, int]] = []

    def take(self, name: str, kind: str, size: int) -> None:
        """Give a piece a name."""
        size = -(-max(size, 1) // 64) * 64
        free = self._free.get(size)
        if free:
            at = free.pop()
        else:
            at = self.bytes
            self.bytes += size
        self._held[name] = (at, size)
        self._named.append((name, kind, at))

    def release(self, name: str) -> None:
        """Let a piece be used again; a name that has none is let be."""
        at, size = self._held.pop(name, (0, 0))
        if size:
            self._free.setdefault(size, []).append(at)

    def holds(self, name: str) -> bool:
        return name in self._held

    def declarations(self) -> list[str]:
        return [f"    {kind} *{name} = ({kind} *)(scratch + {at});" for name, kind, at in self._named]
