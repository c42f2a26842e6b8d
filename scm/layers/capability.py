"""Whether a head can say bottom at all, judged from how its denominator is built and not from data."""

from __future__ import annotations

import math
from typing import Literal

import torch

BottomCapability = Literal["reachable", "unreachable_by_construction"]


def check_tau_infer(tau_infer: object) -> float:
    """The threshold as a float: finite and > 0, else ValueError; bools and non-numbers are TypeError.

    Strings that spell a number are read ("1e-6"), because plans written as YAML 1.1 carry them.
    """
    if isinstance(tau_infer, bool) or not isinstance(tau_infer, (int, float, str)):
        raise TypeError(f"tau_infer must be a number, got {tau_infer!r}")
    try:
        value = float(tau_infer)
    except ValueError as error:
        raise TypeError(f"tau_infer must be a number, got {tau_infer!r}") from error
    if not (math.isfinite(value) and value > 0.0):
        raise ValueError(f"tau_infer must be finite and > 0, got {tau_infer=}")
    return value


def denominator_capability(
    tau_infer: object, *, lower_bound: float | None, dtype: torch.dtype
) -> BottomCapability:
    """Answer "unreachable_by_construction" iff no denominator below `tau_infer` can be computed in `dtype`.

    `lower_bound` is what the construction guarantees for Q (None: nothing). Bound and threshold are both
    rounded to `dtype` first, because that is where strict decoding compares them.
    """
    tau = check_tau_infer(tau_infer)
    if lower_bound is None:
        return "reachable"
    bound_there = torch.tensor(lower_bound, dtype=dtype)
    tau_there = torch.tensor(tau, dtype=dtype)
    if bool(bound_there > 0) and bool(bound_there >= tau_there):
        return "unreachable_by_construction"
    return "reachable"
