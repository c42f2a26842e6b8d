"""Targets as projective tuples (Y_n, Y_d), and which rows may train what.

A finite target y is (y, 1), an infinite one (+-1, 0). Why a target is not a number is said by its status:
seven of them, as words or as integer codes. What a loss makes of the masks is decided in `scm.losses`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

STATUSES: tuple[str, ...] = (
    "finite",
    "bottom",
    "censored_below",
    "censored_above",
    "domain_invalid",
    "missing",
    "fault",
)
STATUS_CODES: Mapping[str, int] = MappingProxyType({name: code for code, name in enumerate(STATUSES)})

NOT_BOTTOM, FAULT, SEMANTIC = 0, 1, 2
"""The values of `SemanticTargets.bottom_kind`."""

# One row per status, in the order of STATUSES: Y_n and Y_d of rows without a value, then the masks.
_FILL_N = (0, 1, -1, 1, 1, 0, 1)
_FILL_D = (1, 0, 0, 0, 0, 1, 0)
_ORIENTATION = (0, 0, -1, 1, 0, 0, 0)
_KIND = (NOT_BOTTOM, SEMANTIC, SEMANTIC, SEMANTIC, SEMANTIC, NOT_BOTTOM, FAULT)
_FINITE = STATUS_CODES["finite"]


@dataclass(frozen=True)
class SemanticTargets:
    """Lifted targets with what is known of each row; all fields have the shape of the values.

    Y_n, Y_d: the tuple, in the dtype of the values. mask_finite: the row has a number. mask_bottom: it has
    none, for any reason but being missing. orientation_label: -1 below, +1 above, 0 unknown (int64).
    bottom_kind: 0 not a bottom, 1 fault, 2 semantic (int64).

    A fault row carries (1, 0) and a missing row (0, 1), as in zeroproofml 0.6.1, but neither is in
    `mask_trained`: losses must use the masks, not the tuple, to tell what a row is.
    """

    Y_n: Any
    Y_d: Any
    mask_finite: Any
    mask_bottom: Any
    orientation_label: Any
    bottom_kind: Any

    @cached_property
    def mask_trained(self) -> Any:
        """Rows that a loss may learn from: finite or a semantic bottom; fault and missing are not."""
        return self.mask_finite | (self.bottom_kind == SEMANTIC)

    @cached_property
    def mask_oriented(self) -> Any:
        """Rows whose bottom has a direction, the only ones that an orientation loss may see."""
        return self.orientation_label != 0

    @cached_property
    def mask_semantic(self) -> Any:
        """Rows whose right answer is bottom."""
        return self.bottom_kind == SEMANTIC

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> SemanticTargets:
        """Return the targets on `device`; `dtype` changes Y_n and Y_d alone."""
        tuple_, flags = self._fields()[:2], self._fields()[2:]
        return SemanticTargets(
            *(field.to(device=device, dtype=dtype) for field in tuple_),
            *(field.to(device=device) for field in flags),
        )

    def index(self, rows: Any) -> SemanticTargets:
        """Return the selected rows: an int64 tensor of positions, a bool mask, a slice."""
        fields = self._fields()
        if isinstance(rows, Tensor) and rows.dtype in (torch.int64, torch.int32) and rows.ndim == 1:
            return SemanticTargets(*(field.index_select(0, rows) for field in fields))
        return SemanticTargets(*(field[rows] for field in fields))

    def __len__(self) -> int:
        return int(self.Y_n.shape[0])

    def _fields(self) -> tuple[Any, ...]:
        return (
            self.Y_n,
            self.Y_d,
            self.mask_finite,
            self.mask_bottom,
            self.orientation_label,
            self.bottom_kind,
        )


def lift_targets(targets: Any) -> tuple[Any, Any]:
    """Return (Y_n, Y_d): finite y is (y, 1), +-inf is (+-1, 0), nan is (1, 0); shape and dtype are kept.

    targets: a tensor or a NumPy array; anything else is a TypeError. The tuple cannot say that a nan has no
    direction: `lift_sentinel_targets` can, and its `mask_oriented` keeps nan out of the orientation loss.
    """
    if isinstance(targets, Tensor):
        finite = targets.isfinite()
        direction = torch.where(targets == -torch.inf, -1, 1).to(targets.dtype)
        return torch.where(finite, targets, direction), finite.to(targets.dtype)
    if isinstance(targets, np.ndarray):
        is_number = np.isfinite(targets)
        fill = np.where(targets == -np.inf, -1, 1).astype(targets.dtype)
        return np.where(is_number, targets, fill), is_number.astype(targets.dtype)
    raise TypeError(f"targets must be a torch.Tensor or numpy.ndarray, got {type(targets).__name__}")


def lift_sentinel_targets(targets: Tensor) -> SemanticTargets:
    """Read sentinels as statuses: +inf is censored above, -inf below, nan a bottom without direction."""
    if not isinstance(targets, Tensor):
        raise TypeError(f"targets must be a torch.Tensor, got {type(targets).__name__}")
    codes = torch.where(targets.isnan(), STATUS_CODES["bottom"], _FINITE)
    codes = torch.where(targets == torch.inf, STATUS_CODES["censored_above"], codes)
    codes = torch.where(targets == -torch.inf, STATUS_CODES["censored_below"], codes)
    return _from_codes(targets, codes)


def lift_semantic_targets(targets: Any, status_labels: Any) -> SemanticTargets:
    """Return the targets with their statuses; payloads of rows that are not finite are ignored (may be nan).

    targets: a tensor or NumPy array. status_labels: of exactly the same shape, either words of `STATUSES`
    (a str for 0-d targets, else nested sequences) or their integer codes (an integer tensor or array).

    Integer codes on an accelerator are not read back: there, a code out of range is the device's error, and
    a finite status on a non-finite value shows as a nan. Everywhere else both are a ValueError, as are
    unknown words and shapes that differ. Labels of other types are a TypeError.
    """
    if isinstance(targets, np.ndarray):
        lifted = lift_semantic_targets(torch.from_numpy(np.array(targets)), status_labels)
        return SemanticTargets(*(field.numpy() for field in lifted._fields()))
    if not isinstance(targets, Tensor):
        raise TypeError(f"targets must be a torch.Tensor or numpy.ndarray, got {type(targets).__name__}")
    codes = _integer_codes(status_labels)
    if codes is None:
        codes = _codes_of_words(status_labels, tuple(targets.shape))
    elif tuple(codes.shape) != tuple(targets.shape):
        raise ValueError(
            f"status_labels must have the shape of targets {tuple(targets.shape)}, got {tuple(codes.shape)}"
        )
    if codes.device.type == "cpu":
        _check_codes(codes)
        if targets.device.type == "cpu" and bool(((codes == _FINITE) & ~targets.isfinite()).any()):
            raise ValueError("status 'finite' needs a finite value, got nan or inf")
    return _from_codes(targets, codes.to(targets.device))


def _from_codes(targets: Tensor, codes: Tensor) -> SemanticTargets:
    codes = codes.to(torch.int64)
    fill_n, fill_d, orientation, kind = _tables(str(targets.device), targets.dtype)
    finite = codes == _FINITE
    kinds = kind[codes]
    return SemanticTargets(
        Y_n=torch.where(finite, targets, fill_n[codes]),
        Y_d=fill_d[codes],
        mask_finite=finite,
        mask_bottom=kinds != NOT_BOTTOM,
        orientation_label=orientation[codes],
        bottom_kind=kinds,
    )


@lru_cache(maxsize=16)
def _tables(device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # Kept per device, because building them there would wait for the copy at every call.
    return (
        torch.tensor(_FILL_N, dtype=dtype, device=device),
        torch.tensor(_FILL_D, dtype=dtype, device=device),
        torch.tensor(_ORIENTATION, device=device),
        torch.tensor(_KIND, device=device),
    )


def _integer_codes(labels: Any) -> Tensor | None:
    """Return integer labels as a tensor, or None when they are not an integer tensor or array."""
    if isinstance(labels, np.ndarray) and labels.dtype.kind in "iu":
        return torch.from_numpy(np.array(labels, dtype=np.int64))
    if isinstance(labels, Tensor):
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise TypeError(f"status_labels must be words or integer codes, got dtype {labels.dtype}")
        return labels
    return None


def _check_codes(codes: Tensor) -> None:
    if codes.numel() == 0:
        return
    low, high = int(codes.min()), int(codes.max())
    if low < 0 or high >= len(STATUSES):
        raise ValueError(f"status codes must be in 0..{len(STATUSES) - 1}, got {low if low < 0 else high}")


def _codes_of_words(labels: Any, shape: tuple[int, ...]) -> Tensor:
    if isinstance(labels, str):
        if shape != ():
            raise ValueError(f"status_labels must have the shape of targets {shape}, got one str")
        return torch.tensor(_code(labels))
    if hasattr(labels, "tolist"):
        labels = labels.tolist()
    codes: list[int] = []
    _collect(labels, shape, codes)
    return torch.tensor(codes, dtype=torch.int64).reshape(shape)


def _collect(labels: Any, shape: tuple[int, ...], codes: list[int]) -> None:
    if isinstance(labels, str):
        if shape:
            raise ValueError(f"status_labels must have the shape of targets: {shape} missing at {labels!r}")
        codes.append(_code(labels))
        return
    if not isinstance(labels, (list, tuple)):
        raise TypeError(f"status_labels must be words or an integer tensor of codes, got {labels!r}")
    if not shape or len(labels) != shape[0]:
        raise ValueError(
            f"status_labels must have the shape of targets: {shape[:1] or 'a single word'} expected, "
            f"got {len(labels)} entries"
        )
    for label in labels:
        _collect(label, shape[1:], codes)


def _code(word: str) -> int:
    try:
        return STATUS_CODES[word]
    except KeyError:
        raise ValueError(f"status must be one of {list(STATUSES)}, got {word!r}") from None
