"""Whether two values are the same to the last bit: NaN is itself, -0.0 is not 0.0, and 1 is not 1.0."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def first_difference(one: Any, other: Any, at: str = "") -> str | None:
    """Say where two values first differ, None where they are the same; tensors are compared by their bits.

    >>> first_difference({"a": [0.0]}, {"a": [-0.0]})
    'a.0 is 0.0, not -0.0'
    """
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        if list(one) != list(other) and set(one) != set(other):
            return f"{_of(at)}has {', '.join(map(str, one))}, not {', '.join(map(str, other))}"
        found = (first_difference(one[key], other[key], f"{at}.{key}") for key in one)
        return next((said for said in found if said is not None), None)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        if len(one) != len(other):
            return f"{_of(at)}has {len(one)} entries, not {len(other)}"
        pairs = enumerate(zip(one, other, strict=True))
        found = (first_difference(a, b, f"{at}.{index}") for index, (a, b) in pairs)
        return next((said for said in found if said is not None), None)
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        if (one.dtype, one.shape) != (other.dtype, other.shape):
            return f"{_of(at)}is {one.dtype} {tuple(one.shape)}, not {other.dtype} {tuple(other.shape)}"
        if same_bits(one, other):
            return None
        return f"{_of(at)}differs by up to {float((one - other).abs().max()):.3g}"
    if isinstance(one, float) and isinstance(other, float):
        if struct.pack("d", one) == struct.pack("d", other) or (one != one and other != other):
            return None
    elif type(one) is type(other) and one == other:
        return None
    return f"{_of(at)}is {one!r}, not {other!r}"


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one dtype and shape hold the same bytes."""
    flat, right = one.detach().cpu().contiguous().reshape(-1), other.detach().cpu().contiguous().reshape(-1)
    return not flat.numel() or torch.equal(flat.view(torch.uint8), right.view(torch.uint8))


def _of(at: str) -> str:
    return f"{at.removeprefix('.')} " if at else ""
