"""What a sweep says while it runs: a live view on a terminal, plain lines elsewhere; always to stderr."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from harness.jobs import EndedTrial, EpochMetrics, TrialSpec

REDRAW_S = 0.25
LINE_S = 10.0
STATUSES = ("completed", "stopped", "diverged", "failed")
EPOCH_METRICS = ("loss", "val_loss", "coverage", "accepted_error", "charged_error", "step_time_ms")


@dataclass(slots=True)
class Tally:
    """How far a sweep is, counted from trials as they end; arithmetic only."""

    total: int
    seeds: Sequence[int]
    metric: str = "charged_error"  # the one that a model cannot make small by abstaining
    clock: Callable[[], float] = time.monotonic
    running: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    replayed: int = 0
    started_s: float | None = None
    best: tuple[float, str] | None = None
    _values: dict[str, list[float]] = field(default_factory=dict)

    @property
    def done(self) -> int:
        """Trials that have ended, those of an earlier part of the run among them."""
        return sum(self.counts.values())

    def start(self) -> None:
        """The first trial is about to start: times are counted from here."""
        self.started_s = self.clock()

    def add(self, ended: EndedTrial, *, replayed: bool = False) -> None:
        """Count a trial; a config is compared with the best once all its seeds have ended."""
        status = str(ended.outcome["status"])
        self.counts[status] += 1
        self.replayed += replayed
        value = ended.outcome.get(self.metric)
        worth = float(value) if value is not None and status in ("completed", "stopped") else math.nan
        values = self._values.setdefault(ended.trial.config_id, [])
        values.append(worth)
        if len(values) == len(self.seeds):
            mean = math.fsum(self._values.pop(ended.trial.config_id)) / len(self.seeds)
            if math.isfinite(mean) and (self.best is None or mean < self.best[0]):
                self.best = (mean, ended.trial.config_id)

    def seconds_left(self) -> float | None:
        """How long the rest will take at the pace so far; None before the first trial has ended."""
        fresh = self.done - self.replayed
        if self.started_s is None or fresh <= 0:
            return None
        return (self.clock() - self.started_s) / fresh * max(self.total - self.done, 0)

    def line(self) -> str:
        """All of it as one line of text."""
        parts = [f"{self.done}/{self.total} trials", f"{self.running} running"]
        parts += [f"{self.counts[status]} {status}" for status in STATUSES[1:] if self.counts[status]]
        left = self.seconds_left()
        if left is not None and self.done < self.total:
            parts.append(f"{format_seconds(left)} left")
        if self.best is not None:
            parts.append(f"best {self.metric} {self.best[0]:.4g} ({self.best[1]})")
        return ", ".join(parts)


class Display:
    """Shows a tally while a sweep runs: a `with` block around it, and `tick` whenever there is time."""

    def __init__(self, tally: Tally, stream: TextIO, *, title: str = "sweep") -> None:
        self._tally = tally
        self._title = title
        self._console = Console(file=stream)
        self._live: Live | None = None
        self._shown_s = -math.inf
        self._last = ""

    def say(self, text: str) -> None:
        """One line that stays."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def tick(self) -> None:
        """Show the tally again if the last time is long enough ago."""
        now = self._tally.clock()
        if now - self._shown_s < (REDRAW_S if self._live is not None else LINE_S):
            return
        self._shown_s = now
        self._show()

    def __enter__(self) -> Display:
        if self._console.is_terminal:
            self._live = Live(self._view(), console=self._console, auto_refresh=False, transient=True)
            self._live.start()
        self._shown_s = self._tally.clock()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
        self._show()

    def _show(self) -> None:
        if self._live is not None:
            self._live.update(self._view(), refresh=True)
            return
        line = self._tally.line()
        if line != self._last:
            self._last = line
            self.say(f"{self._title}: {line}")

    def _view(self) -> Table:
        tally = self._tally
        grid = Table.grid(padding=(0, 1))
        for _ in range(3):
            grid.add_column(no_wrap=True)
        bar = ProgressBar(total=max(tally.total, 1), completed=tally.done, width=16)
        grid.add_row(self._title, bar, tally.line())
        return grid


class EpochLog:
    """Says how each trial does, one line every so many of its epochs; history is written in any case."""

    def __init__(self, every: int, say: Callable[[str], None]) -> None:
        self._every = every
        self._say = say

    def __call__(self, trial: TrialSpec, said: EpochMetrics) -> None:
        """Say an epoch that is due."""
        if int(said["epoch"]) % self._every == 0:
            self._say(epoch_line(trial, said))


def epoch_line(trial: TrialSpec, said: EpochMetrics) -> str:
    """What an epoch said, as one line: where the trial stands, its losses, coverage, errors and step time.

    What was not measured, and is NaN, is left out.
    """
    of = trial.config.get("max_epochs", "?")
    parts = [f"{trial.trial_id} epoch {int(said['epoch'])}/{of}"]
    parts += [
        f"{name} {said[name]:.4g}" for name in EPOCH_METRICS if name in said and not math.isnan(said[name])
    ]
    if said.get("nan_count"):
        parts.append(f"{int(said['nan_count'])} non-finite")
    return ", ".join(parts)


def format_seconds(seconds: float) -> str:
    """A duration as people say it.

    >>> format_seconds(5), format_seconds(75), format_seconds(7300)
    ('5 s', '1 min 15 s', '2 h 1 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
