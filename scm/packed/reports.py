"""What an epoch of a pack says: one entry a trial, and reports as a single training gives them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from scm.packed.answers import Validated
from scm.packed.table import EpochSums
from scm.training.records import EpochReport


class Judged(NamedTuple):
    """What is known of one trial's epoch when it is over."""

    epoch: int
    sums: EpochSums
    rate: float
    validated: Validated | None
    nan_counts: dict[str, int]
    status: str


class PackEpoch:
    """One epoch of the trials in `keys`. step_ms: of a mean optimizer step, over the number of trials.

    Each property has one entry a trial, in the order of `keys`; `reports` has everything.
    """

    def __init__(self, keys: Sequence[str], judged: Sequence[Judged], step_ms: float) -> None:
        self.keys = tuple(keys)
        self.step_ms = step_ms
        self._judged = judged

    @property
    def epoch(self) -> list[int]:
        """0-based, each trial's own."""
        return [item.epoch for item in self._judged]

    @property
    def status(self) -> list[str]:
        """ "running", or how the trial ended with this epoch: "completed", "stopped", "diverged"."""
        return [item.status for item in self._judged]

    @property
    def loss(self) -> list[float]:
        """The mean over the rows of finite losses."""
        return [item.sums.mean_loss for item in self._judged]

    @property
    def val_loss(self) -> list[float]:
        """nan without a validation."""
        return [_NAN if item.validated is None else item.validated.loss for item in self._judged]

    @property
    def val_coverage(self) -> list[float]:
        """nan without a validation."""
        return [_NAN if item.validated is None else item.validated.coverage for item in self._judged]

    @property
    def learning_rate(self) -> list[float]:
        return [item.rate for item in self._judged]

    @property
    def nan_count(self) -> list[int]:
        """All kinds together, since the trial began."""
        return [sum(item.nan_counts.values()) for item in self._judged]

    @property
    def reports(self) -> Mapping[str, EpochReport]:
        """By key, what `SCMTrainer.epochs` gives, but for `bench`, which has `pack_step_ms`."""
        return _Reports(self)

    def report(self, place: int) -> EpochReport:
        """Return the report of one trial, by its place in `keys`."""
        item = self._judged[place]
        val = None
        if item.validated is not None:
            val = {f"val_{name}": value for name, value in item.validated.metrics().items()}
            val["epoch"] = float(item.epoch)
        bench: dict[str, float | int] = {
            "epoch": item.epoch,
            "pack_step_ms": self.step_ms,
            "batches": int(item.sums.micro_batches),
        }
        train = {**item.sums.metrics(), "lr": item.rate}
        return EpochReport(item.epoch, train, val, bench, dict(item.nan_counts), item.status)


_NAN = float("nan")


class _Reports(Mapping[str, EpochReport]):
    """Reports that are put together when they are asked for."""

    def __init__(self, epoch: PackEpoch) -> None:
        self._epoch = epoch
        self._places = {key: place for place, key in enumerate(epoch.keys)}

    def __getitem__(self, key: str) -> EpochReport:
        return self._epoch.report(self._places[key])

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)
