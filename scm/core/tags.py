"""Tags of answers as tensors of integer codes: what they are, and what becomes of them in sums.

A tag says what a value or a quotient P/Q is: a number (REAL), plus or minus infinity, or without value. Tags
are plain tensors, so that they live on any device and go through ``vmap``; nothing here is global or changes.
What a loss makes of tags is decided in `scm.losses.quotient` and `scm.training.tag_loss`.

Relation to strict decoding: for finite P and Q, and a policy with ``tau_Q_on = tau_infer`` and no previous
tags, an answer is bottom in `scm.inference.strict` exactly where its tag is not REAL. A P or Q that is not
finite is a fault there whatever the quotient is; here 1/inf is 0, hence REAL.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from dataclasses import dataclass

import torch
from torch import Tensor

Threshold = float | Tensor

TAG_DTYPE = torch.int8
"""Of the tags made here; any integer dtype is taken."""

_BAND = 2.0
"""A threshold for leaving a band over the one for entering it, as `TagPolicy.resolve_thresholds` sets it."""


class TRTag(enum.IntEnum):
    """What an answer is. BOTTOM is the absorbing element of wheel arithmetic; no division makes it."""

    REAL = 0
    PINF = 1
    NINF = 2
    PHI = 3
    BOTTOM = 4


class Reduction(enum.Enum):
    """What a sum makes of terms without value: STRICT is without value itself, DROP_NULL leaves them out."""

    STRICT = "strict"
    DROP_NULL = "drop_null"


@dataclass(frozen=True, slots=True)
class TagPolicy:
    """From which |Q| on a quotient has a value; numbers are checked, tensors (one per trial) are trusted.

    A quotient that had a value loses it below tau_Q_on; one without value gets it back at tau_Q_off, which is
    at least tau_Q_on and equal to it by default. Without value it is an infinity where |P| >= tau_P_on and
    P != 0, else PHI. keep_signed_zero: the sign bit of a zero counts for the sign of an infinity; without
    it, both zeros are positive. With no thresholds (the default) the tag is that of the algebra, `P/Q`.

    Differs from zeroproof 0.1.0: thresholds of 0 do not make a quotient by zero REAL, nor 0/0 an infinity;
    fields without effect there (rounding_mode, tau_P_off, ...) are left out; a policy is an argument, never
    a setting of the process.
    """

    tau_Q_on: Threshold = 0.0
    tau_Q_off: Threshold | None = None
    tau_P_on: Threshold = 0.0
    keep_signed_zero: bool = True

    def __post_init__(self) -> None:
        for name in ("tau_Q_on", "tau_Q_off", "tau_P_on"):
            value = getattr(self, name)
            if isinstance(value, int | float) and not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be finite and >= 0, got {name}={value!r}")
        on, off = self.tau_Q_on, self.tau_Q_off
        if isinstance(on, int | float) and isinstance(off, int | float) and off < on:
            raise ValueError(f"tau_Q_off must be >= tau_Q_on, got tau_Q_off={off!r}, tau_Q_on={on!r}")

    def resolve_thresholds(self, ulp: Threshold, scale_Q: Threshold, scale_P: Threshold) -> TagPolicy:
        """Return the policy with ``on = ulp * scale`` and ``off = 2 * on``; ulp is at least 0, scales 1.

        ulp: the relative error of P and Q, a few times the eps of their dtype. scale_Q, scale_P: how large
        their terms may be. nan is a ValueError for numbers.
        """
        ulp = _at_least(0.0, "ulp", ulp)
        on_Q = ulp * _at_least(1.0, "scale_Q", scale_Q)
        on_P = ulp * _at_least(1.0, "scale_P", scale_P)
        return dataclasses.replace(self, tau_Q_on=on_Q, tau_Q_off=_BAND * on_Q, tau_P_on=on_P)


ALGEBRAIC = TagPolicy()
"""No thresholds: a quotient has a value wherever it is finite."""


def tags_of_values(values: Tensor) -> Tensor:
    """Return the tags of IEEE numbers, int8: nan is PHI, infinities are theirs, all others are REAL."""
    _check_real("values", values)
    tags = torch.zeros_like(values, dtype=TAG_DTYPE)
    tags = tags.masked_fill(values.isnan(), TRTag.PHI)
    return tags.masked_fill(values == math.inf, TRTag.PINF).masked_fill(values == -math.inf, TRTag.NINF)


def values_of_tags(values: Tensor, tags: Tensor) -> Tensor:
    """Return IEEE numbers: the value where REAL, the infinities, nan for PHI and BOTTOM.

    Integers become the default floating-point type. Only REAL entries have a gradient.
    """
    _check_real("values", values)
    values = values if values.is_floating_point() else values.to(torch.get_default_dtype())
    values = torch.where(tags == TRTag.REAL, values, math.nan)
    return values.masked_fill(tags == TRTag.PINF, math.inf).masked_fill(tags == TRTag.NINF, -math.inf)


def tags_of_tuples(
    P: Tensor, Q: Tensor, policy: TagPolicy = ALGEBRAIC, previous: Tensor | None = None
) -> Tensor:
    """Return the tags of P/Q, int8, in the common shape of P and Q; the gradient plays no part.

    previous: earlier tags of the same quotients (default: all REAL). Those without value keep their tag while
    |Q| is in the band between the policy's thresholds. Where P or Q is not finite, or the quotient overflows,
    the tag is the one that IEEE division gives, whatever the thresholds.

    Differs from zeroproof 0.1.0: a quotient that overflows is an infinity, not a REAL without finite value.
    """
    _check_real("P", P)
    _check_real("Q", Q)
    P, Q = torch.broadcast_tensors(P.detach(), Q.detach())
    if not policy.keep_signed_zero:
        P, Q = P + 0, Q + 0  # -0 + 0 is +0
    algebraic = tags_of_values(P / Q)
    magnitude, on = Q.abs(), policy.tau_Q_on
    infinity = torch.where(P.signbit() ^ Q.signbit(), TRTag.NINF, TRTag.PINF)
    without = torch.where((P.abs() >= policy.tau_P_on) & (P != 0), infinity, TRTag.PHI).to(TAG_DTYPE)
    tags = torch.where(magnitude < on, without, algebraic)
    if previous is not None:
        off = on if policy.tau_Q_off is None else policy.tau_Q_off
        kept = torch.where(magnitude <= on, without, previous.to(TAG_DTYPE))
        kept = torch.where(magnitude >= off, algebraic, kept)
        tags = torch.where(previous == TRTag.REAL, tags, kept)
    return torch.where(P.isfinite() & Q.isfinite(), tags, algebraic)


def reduce_tags(
    tags: Tensor, reduction: Reduction = Reduction.STRICT, *, dim: int | tuple[int, ...] | None = None
) -> Tensor:
    """Return the tag of a sum over `dim` (default: all of them) from the tags of its terms, int8.

    STRICT: PHI if any is; else BOTTOM if any is; else PHI if both infinities occur; else that infinity; else
    REAL. DROP_NULL looks at the terms that are neither PHI nor BOTTOM; where there were terms and none is
    left, BOTTOM if one was BOTTOM, else PHI. The tag of an empty sum is REAL.
    """
    dims = _dims(tags, dim)
    phi, bottom = (tags == TRTag.PHI).any(dims), (tags == TRTag.BOTTOM).any(dims)
    up, down = (tags == TRTag.PINF).any(dims), (tags == TRTag.NINF).any(dims)
    found = up.to(TAG_DTYPE) * TRTag.PINF + down.to(TAG_DTYPE) * TRTag.NINF  # both: 1 + 2 is the code of PHI
    null = torch.where(phi, TRTag.PHI, TRTag.BOTTOM).to(TAG_DTYPE)
    if reduction is Reduction.STRICT:
        return torch.where(phi | bottom, null, found)
    left = ((tags != TRTag.PHI) & (tags != TRTag.BOTTOM)).any(dims)
    null = torch.where(bottom, TRTag.BOTTOM, TRTag.PHI).to(TAG_DTYPE)
    return torch.where((phi | bottom) & ~left, null, found)


def reduce_sum(
    values: Tensor,
    tags: Tensor,
    reduction: Reduction = Reduction.STRICT,
    *,
    dim: int | tuple[int, ...] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the sum of tagged values over `dim` (default: all) and its tag, which is that of `reduce_tags`.

    The payload of a term that is not REAL is never read and has no gradient. A sum that is not REAL is nan
    and gives no term a gradient (Mask-REAL); a sum that overflows has the infinity's tag.
    """
    _check_real("values", values)
    tags = tags.expand(values.shape)
    dims = _dims(tags, dim)
    total = torch.where(tags == TRTag.REAL, values, 0).sum(dims)
    found = reduce_tags(tags, reduction, dim=dims)
    found = torch.where(found == TRTag.REAL, tags_of_values(total.detach()), found)
    return torch.where(found == TRTag.REAL, total, math.nan), found


def _dims(tags: Tensor, dim: int | tuple[int, ...] | None) -> tuple[int, ...]:
    if dim is None:
        return tuple(range(tags.ndim))
    return dim if isinstance(dim, tuple) else (dim,)


def _at_least(floor: float, name: str, value: Threshold) -> Threshold:
    if isinstance(value, Tensor):
        return value.clamp(min=floor)
    if math.isnan(value):
        raise ValueError(f"{name} must be a number, got {name}={value!r}")
    return max(floor, value)


def _check_real(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor) or tensor.is_complex():
        got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{name} must be a real tensor, got {got}")
