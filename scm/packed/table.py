"""What the micro-batches of an epoch come to, for all trials of a pack in a few passes.

What is counted of an answer is decided in `scm.training.records`; here it is summed by trial.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from scm.gradients import is_finite
from scm.training.records import count_answers, row_metrics

_PENDING_ELEMENTS = 2**21  # outputs held back at most, in elements


class EpochSums(NamedTuple):
    """One trial's epoch, summed over its micro-batches."""

    loss: float  # times rows, where it was finite
    finite_rows: float  # of micro-batches with a finite loss
    bad_losses: float
    tau: float
    micro_batches: float
    rows: float
    samples: float
    bottoms: float
    abs_sum: float
    abs_count: float
    bad_outputs: float  # samples
    bad_numerators: float  # micro-batches with one
    bad_denominators: float
    abs_min: float

    @property
    def mean_loss(self) -> float:
        """The mean over the rows of those micro-batches whose loss was finite, nan without one."""
        return self.loss / self.finite_rows if self.finite_rows else math.nan

    @property
    def coverage(self) -> float:
        return 1.0 - (self.bottoms / self.samples if self.samples else 0.0)

    def metrics(self) -> dict[str, float]:
        """Return what `scm.training.records.epoch_metrics` says of the same micro-batches."""
        batches = self.micro_batches
        row = (self.mean_loss, self.tau / batches if batches else math.nan, self.rows, self.samples)
        more = (self.bottoms, self.abs_min, self.abs_sum, self.abs_count, self.bad_outputs)
        return row_metrics([*row, *more])


class _Pending(NamedTuple):
    loss: Tensor
    P: Tensor
    Q: Tensor
    tau: Tensor
    alive: Tensor | None


class EpochTable:
    """Losses and answers of an epoch's micro-batches, put aside as they are and summed now and then."""

    def __init__(self, lanes: int, device: torch.device) -> None:
        self._sums = torch.zeros(lanes, len(EpochSums._fields), dtype=torch.float64, device=device)
        self._sums[:, -1] = math.inf
        self._pending: list[_Pending] = []
        self._elements = 0

    def add(self, loss: Tensor, P: Tensor, Q: Tensor, tau: Tensor, alive: Tensor | None) -> None:
        """Put one micro-batch of every trial aside: loss and tau (trials,), P and Q (trials, samples, ...).

        alive: for which trials it counts, None for all.
        """
        if self._pending and (P.shape != self._pending[0].P.shape or self._elements > _PENDING_ELEMENTS):
            self._flush()
        self._pending.append(_Pending(loss, P, Q, tau, alive))
        self._elements += P.numel()

    def sums(self) -> list[EpochSums]:
        """Return the epoch of each trial; waits for the device."""
        self._flush()
        return [EpochSums(*row) for row in self._sums.tolist()]

    def _flush(self) -> None:
        if not self._pending:
            return
        held, self._pending, self._elements = self._pending, [], 0
        loss = torch.stack([item.loss for item in held]).double()
        P, Q = torch.stack([item.P for item in held]), torch.stack([item.Q for item in held])
        tau = torch.stack([item.tau for item in held])
        finite = is_finite(loss)
        found = count_answers(P.flatten(0, 1), Q.flatten(0, 1), tau.flatten()).unflatten(0, loss.shape)
        rows = float(P.shape[2])
        ones = torch.ones_like(loss)
        columns = [torch.where(finite, loss, 0.0) * rows, finite * rows, ~finite, tau, ones, ones * rows]
        columns += [found[..., place] for place in (0, 1, 3, 4, 5)]
        columns += [_has_bad(P), _has_bad(Q)]
        numbers = torch.stack([column.double() for column in columns], dim=2)
        least = found[..., 2]
        if any(item.alive is not None for item in held):
            everyone = torch.ones_like(finite[0])
            alive = torch.stack([everyone if item.alive is None else item.alive for item in held])
            numbers = torch.where(alive[..., None], numbers, 0.0)
            least = torch.where(alive, least, math.inf)
        self._sums[:, :-1] += numbers.sum(0)
        self._sums[:, -1] = torch.minimum(self._sums[:, -1], least.amin(0))


def _has_bad(x: Tensor) -> Tensor:
    # The largest number is nan where any is, and infinite where any is.
    return ~is_finite(x.abs().flatten(2).amax(2))
