"""What a training says of its micro-batches, kept on the device until somebody asks.

Losses and outputs of the steps are put aside as they are; every so many steps they become one row of numbers
a micro-batch, in a few calls for all of them together, still without the host waiting. Means and extremes of
an epoch are exact over its samples, not means over batches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scm.gradients import is_finite

METRICS = (
    "loss",
    "coverage",
    "tau_train",
    "bottom_frac",
    "denom_abs_min",
    "denom_abs_mean",
    "denom_abs_available",
)
_PENDING_BATCHES = 64
_PENDING_ELEMENTS = 2**20  # outputs held back at most, in elements
_COLUMNS = ("loss", "tau", "rows", "samples", "bottoms", "abs_min", "abs_sum", "abs_count", "bad_outputs")


@dataclass(frozen=True)
class EpochReport:
    """What one epoch says when it is over.

    train, val: metrics, exact over the epoch's samples; `val` (names begin with "val_") is None without
    validation. bench: milliseconds a batch. nan_counts: since the training began. status: "running", or how
    the training ended with this epoch: "completed", "stopped", "diverged".
    """

    epoch: int
    train: dict[str, float]
    val: dict[str, float] | None
    bench: dict[str, float | int]
    nan_counts: dict[str, int]
    status: str


@dataclass
class _Pending:
    loss: Tensor
    numerator: Tensor | None
    denominator: Tensor | None
    tau: float
    rows: int


class EpochRecords:
    """The micro-batches of one epoch, as rows of numbers; `add` never waits for the device."""

    def __init__(self) -> None:
        self._pending: list[_Pending] = []
        self._pending_elements = 0
        self._tables: list[Tensor] = []

    def add(self, loss: Tensor, outputs: Any, tau: float, rows: int) -> None:
        """Put one micro-batch aside. `outputs` is what the model gave: a tensor, or (P, Q, ...)."""
        numerator, denominator = split_outputs(outputs)
        held = _Pending(loss, numerator, denominator, tau, rows)
        self._pending.append(held)
        self._pending_elements += 0 if numerator is None else numerator.numel()
        if len(self._pending) >= _PENDING_BATCHES or self._pending_elements >= _PENDING_ELEMENTS:
            self._flush()

    def table(self) -> Tensor:
        """Return all rows so far, (micro-batches, columns) in float64 on the device of the losses."""
        self._flush()
        if len(self._tables) > 1:
            self._tables = [torch.cat(self._tables)]
        return self._tables[0] if self._tables else torch.zeros(0, len(_COLUMNS), dtype=torch.float64)

    def load_table(self, table: Tensor) -> None:
        """Begin with the rows that an interrupted epoch had."""
        self._pending.clear()
        self._pending_elements = 0
        self._tables = [table] if len(table) else []

    def last(self) -> dict[str, float]:
        """Return the metrics of the newest micro-batch; waits for the device."""
        self._flush()
        return row_metrics(self._tables[-1][-1].tolist())

    def _flush(self) -> None:
        """Turn what was put aside into rows: runs of equal shapes together, in order."""
        start = 0
        while start < len(self._pending):
            stop = start + 1
            while stop < len(self._pending) and _alike(self._pending[start], self._pending[stop]):
                stop += 1
            self._tables.append(_rows(self._pending[start:stop]))
            start = stop
        self._pending.clear()
        self._pending_elements = 0


def split_outputs(outputs: Any) -> tuple[Tensor | None, Tensor | None]:
    """Return (P, Q) of a model's outputs, detached: (values, None) of a tensor, (None, None) of the rest."""
    if isinstance(outputs, Tensor):
        return outputs.detach(), None
    if isinstance(outputs, (tuple, list)) and len(outputs) >= 2:
        numerator, denominator = outputs[0], outputs[1]
        if isinstance(numerator, Tensor) and isinstance(denominator, Tensor):
            return numerator.detach(), denominator.detach()
    return None, None


def _alike(one: _Pending, other: _Pending) -> bool:
    return _form(one.numerator) == _form(other.numerator) and _form(one.denominator) == _form(
        other.denominator
    )


def _form(tensor: Tensor | None) -> tuple[torch.Size, torch.dtype] | None:
    return None if tensor is None else (tensor.shape, tensor.dtype)


def _rows(alike: list[_Pending]) -> Tensor:
    losses = torch.stack([held.loss for held in alike]).to(torch.float64)
    device = losses.device
    told = torch.tensor([[held.tau, float(held.rows)] for held in alike], dtype=torch.float64, device=device)
    counted = torch.zeros(len(alike), 6, dtype=torch.float64, device=device)
    counted[:, 0] = told[:, 1]
    counted[:, 2] = math.inf
    if alike[0].numerator is not None:
        numerators = torch.stack([held.numerator for held in alike if held.numerator is not None])
        denominators = None
        if alike[0].denominator is not None:
            denominators = torch.stack([held.denominator for held in alike if held.denominator is not None])
        counted = count_answers(numerators, denominators, told[:, 0]).to(device)
    return torch.cat([losses[:, None], told, counted], dim=1)


def count_answers(numerators: Tensor, denominators: Tensor | None, taus: Tensor) -> Tensor:
    """Return (K, 6): samples, bottoms, min |Q|, sum |Q|, number of finite |Q|, samples with bad outputs.

    numerators, denominators: the answers of K micro-batches, (K, samples, ...); taus: (K,), their thresholds.
    """
    numerators = _widened(numerators)
    good = is_finite(numerators)
    if denominators is None:
        bottom = bad = ~good
        smallest = torch.full((len(numerators),), math.inf, device=numerators.device)
        total = count = torch.zeros_like(smallest)
    else:
        denominators = _widened(denominators)
        size = denominators.abs()
        finite = is_finite(size)
        smallest = torch.where(finite, size, math.inf).flatten(1).amin(1)
        total = torch.where(finite, size, 0.0).flatten(1).to(torch.float64).sum(1)
        count = finite.flatten(1).sum(1)
        good, finite, size = _same_rank(good, finite, size)
        bad = ~(good & finite)
        taus = taus.to(device=size.device, dtype=size.dtype).reshape(-1, *([1] * (size.ndim - 1)))
        bottom = bad | (size < taus) | ~_quotient_is_finite(numerators, denominators)
    if bottom.ndim > 2:
        bottom, bad = bottom.any(-1), bad.any(-1)
    bottom, bad = bottom.flatten(1), bad.flatten(1)
    samples = torch.full((len(bottom),), float(bottom.shape[1]), device=bottom.device)
    columns = (samples, bottom.sum(1), smallest, total, count, bad.sum(1))
    return torch.stack([column.to(torch.float64) for column in columns], dim=1)


def _widened(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _same_rank(good: Tensor, finite: Tensor, size: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Reduce the numerators' mask to the denominators' rank: one denominator may serve several outputs."""
    while good.ndim > finite.ndim:
        good = good.all(-1)
    return good, finite, size


def _quotient_is_finite(numerators: Tensor, denominators: Tensor) -> Tensor:
    rank = denominators.ndim
    while denominators.ndim < numerators.ndim:
        denominators = denominators.unsqueeze(-1)
    quotient = is_finite(numerators / denominators)
    while quotient.ndim > rank:
        quotient = quotient.all(-1)
    return quotient


def row_metrics(row: list[float]) -> dict[str, float]:
    """Return the metrics of one micro-batch from its row of numbers."""
    held = dict(zip(_COLUMNS, row, strict=True))
    bottom_frac = held["bottoms"] / held["samples"] if held["samples"] else 0.0
    available = held["abs_count"] > 0
    return {
        "loss": held["loss"],
        "coverage": 1.0 - bottom_frac,
        "tau_train": held["tau"],
        "bottom_frac": bottom_frac,
        "denom_abs_min": held["abs_min"] if available else math.nan,
        "denom_abs_mean": held["abs_sum"] / held["abs_count"] if available else math.nan,
        "denom_abs_available": float(available),
    }


def epoch_metrics(table: list[list[float]]) -> dict[str, float]:
    """Return an epoch's metrics, exact over its samples.

    The loss is the mean over the rows of those micro-batches whose loss was finite (nan if there is none),
    the threshold the mean over micro-batches.
    """
    columns = dict(zip(_COLUMNS, zip(*table, strict=True), strict=True))
    weighed = [(loss, rows) for loss, rows in zip(columns["loss"], columns["rows"], strict=True)]
    finite = [(loss, rows) for loss, rows in weighed if math.isfinite(loss)]
    rows = sum(rows for _, rows in finite)
    summed = [
        sum(loss * rows for loss, rows in finite) / rows if rows else math.nan,
        sum(columns["tau"]) / len(table),
        float(sum(columns["rows"])),
        float(sum(columns["samples"])),
        float(sum(columns["bottoms"])),
        min(columns["abs_min"]),
        float(sum(columns["abs_sum"])),
        float(sum(columns["abs_count"])),
        float(sum(columns["bad_outputs"])),
    ]
    return row_metrics(summed)


def counts_of(table: list[list[float]]) -> dict[str, int]:
    """Return how many micro-batches had a non-finite loss, and how many samples a non-finite output."""
    loss, bad = _COLUMNS.index("loss"), _COLUMNS.index("bad_outputs")
    return {
        "loss": sum(not math.isfinite(row[loss]) for row in table),
        "output": int(sum(row[bad] for row in table)),
    }
