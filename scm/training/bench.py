"""How long a training's parts take: waiting for data, a whole batch, the optimizer, one optimizer step.

Nothing here decides what is trained. Times come from a monotonic clock; on CUDA the optimizer steps are timed
by events on the device, read once an epoch, because a host clock would only time the launches.
"""

from __future__ import annotations

import time
from collections import deque
from statistics import median

import torch

WARM_UP_STEPS = 5  # the first steps allocate optimizer state and fill caches
# Of a training that ends before, the first step alone is left out: it is by far the slowest.
_KEPT_STEPS = 1024
_EVENTS_PER_EPOCH = 128


class StepClock:
    """Collect the times of one training, epoch by epoch.

    A *batch* runs from asking the loader to the end of the batch's work, logging left out. A *step* is the
    work of one optimizer step, with the forward and backward passes of its whole group, without the waits
    for data.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._step_ms: deque[float] = deque(maxlen=_KEPT_STEPS)
        self._warm_up_ms: list[float] = []
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._begun: torch.cuda.Event | None = None
        self._group_s = 0.0
        self.begin_epoch()

    def begin_epoch(self) -> None:
        """Forget the sums of the epoch before; the times of single steps are kept."""
        self._batches = 0
        self._data_s = self._work_s = self._optim_s = 0.0
        self._events.clear()

    def begin_work(self) -> float:
        """Return the time now; on CUDA, mark the begin of a group on the device as well."""
        if self._on_cuda and self._begun is None and len(self._events) < _EVENTS_PER_EPOCH:
            self._begun = torch.cuda.Event(enable_timing=True)
            self._begun.record()
        return time.perf_counter()

    def end_batch(self, data_s: float, work_s: float, optim_s: float, *, stepped: bool) -> None:
        """Add one batch: its wait, its work, the optimizer's part of that; `stepped` ends a group."""
        self._batches += 1
        self._data_s += data_s
        self._work_s += work_s
        self._optim_s += optim_s
        self._group_s += work_s
        if stepped:
            self._end_step()

    def add_flush(self, work_s: float) -> None:
        """Add the optimizer step of a group that the end of the epoch cut short."""
        self._work_s += work_s
        self._optim_s += work_s
        self._group_s += work_s
        self._end_step()

    def _end_step(self) -> None:
        if not self._on_cuda:
            self._keep(1e3 * self._group_s)
        elif self._begun is not None:
            ended = torch.cuda.Event(enable_timing=True)
            ended.record()
            self._events.append((self._begun, ended))
            self._begun = None
        self._group_s = 0.0

    def _keep(self, step_ms: float) -> None:
        if len(self._warm_up_ms) < WARM_UP_STEPS:
            self._warm_up_ms.append(step_ms)
        else:
            self._step_ms.append(step_ms)

    def end_epoch(self, epoch: int) -> dict[str, float | int]:
        """Return the epoch's means a batch, in milliseconds, and the number of its batches."""
        if self._events:
            self._events[-1][1].synchronize()
            for begun, ended in self._events:
                self._keep(begun.elapsed_time(ended))
        count = max(1, self._batches)
        return {
            "epoch": epoch,
            "avg_step_ms": 1e3 * (self._data_s + self._work_s) / count,
            "data_time_ms": 1e3 * self._data_s / count,
            "optim_time_ms": 1e3 * self._optim_s / count,
            "batches": self._batches,
        }

    @property
    def step_time_ms(self) -> float:
        """The median time of one optimizer step after warm-up, in milliseconds.

        Of a training that is shorter than the warm-up, the median without its first step, or its only step;
        nan before there is one.
        """
        kept = self._step_ms or self._warm_up_ms[1:] or self._warm_up_ms
        return median(kept) if kept else float("nan")
