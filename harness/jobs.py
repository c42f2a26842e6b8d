"""Which piece of which trial runs next: batches from the searcher, segments between rungs, retries, replays.

All decisions of a sweep are made here, in the driver and without Ray, from what trials reported and never
from when they did: the same plan gives the same rows with one worker or many, interrupted or not.

A trial runs as segments. A segment trains from one rung to the next (without halving, from start to end) and
gives back the trial's state and what its outcome would be if it ended there; a trial that waits for the rest
of its batch holds no worker, and a worker that is lost costs one segment.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from harness.errors import UserError, nearest
from harness.halving import Decision, RungBoard

FlatConfig = Mapping[str, Any]
EpochMetrics = Mapping[str, float]
KnownTrial = tuple[Mapping[str, Any], Mapping[int, EpochMetrics]]

# Outcomes that ended on their own terms: their last metric stands for them at the rungs they did not reach.
ENDED_WELL = ("completed", "stopped")
HALVED = "halving"


@dataclass(frozen=True, slots=True)
class TrialSpec:
    """One trial: a config with every knob filled in, and a seed."""

    trial_id: str
    config_id: str
    seed: int
    cohort: int
    config: FlatConfig


@dataclass(slots=True)
class Segment:
    """A piece of a trial for a worker: from `state` (None: its start) until an epoch (None: its end)."""

    trial: TrialSpec
    until: int | None
    state: bytes | None
    attempt: int = 0


@dataclass(frozen=True, slots=True)
class Report:
    """What a segment said: its epochs, and at its end the outcome; `state` when the trial could go on.

    On the way from a worker the state is a reference, which the driver exchanges for the bytes.
    """

    epochs: Sequence[Mapping[str, float]]
    outcome: Mapping[str, Any] | None = None
    state: Any = None
    place: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class EndedTrial:
    """A trial that has ended: its outcome, its metrics epoch by epoch, and where it ran."""

    trial: TrialSpec
    outcome: Mapping[str, Any]
    history: Mapping[int, EpochMetrics]
    place: Mapping[str, Any] = field(default_factory=dict)


class Proposer(Protocol):
    """Where configs come from, batch by batch, and who learns how a batch turned out."""

    @property
    def waits(self) -> bool:
        """Whether a batch must have ended before the next one can be drawn."""
        ...

    def next_batch(self) -> list[TrialSpec]:
        """The trials of the next batch, or none when all have been drawn."""
        ...

    def batch_ended(self, cohort: int, ended: Mapping[str, EndedTrial]) -> None:
        """Take in how every trial of a batch ended, by trial_id."""
        ...


@dataclass(slots=True)
class _Progress:
    """Where one trial stands."""

    spec: TrialSpec
    epochs: dict[int, EpochMetrics] = field(default_factory=dict)
    paused: Report | None = None
    started_at: Any = None
    ended: EndedTrial | None = None

    @property
    def epoch(self) -> int:
        return max(self.epochs, default=0)


class JobBoard:
    """Hands out segments and takes in what became of them; every trial ends exactly once, through `on_ended`.

    `known` holds row and history of trials that ended in an earlier part of the run: they are taken in when
    their batch opens, without a segment. `on_ended(trial, replayed)` is called once for every trial;
    `on_epoch(trial, said)` for every epoch of a worker's report, again where a lost segment is run again.
    """

    def __init__(
        self,
        proposer: Proposer,
        *,
        on_ended: Callable[[EndedTrial, bool], None],
        failed: Callable[[TrialSpec, str], Mapping[str, Any]],
        rungs: RungBoard | None = None,
        rung_metric: str = "val_loss",
        nan_budget: int = 0,
        retries: int = 0,
        known: Mapping[str, KnownTrial] | None = None,
        on_epoch: Callable[[TrialSpec, EpochMetrics], None] | None = None,
    ) -> None:
        self._proposer = proposer
        self._on_ended = on_ended
        self._failed = failed
        self._rungs = rungs
        self._metric = rung_metric
        self._nan_budget = nan_budget
        self._retries = retries
        self._known = dict(known or {})
        self._on_epoch = on_epoch
        self._trials: dict[str, _Progress] = {}
        self._open: dict[int, dict[str, _Progress]] = {}
        self._ready: list[Segment] = []
        self._drawn_out = False
        self.running = 0

    @property
    def finished(self) -> bool:
        """Whether every batch has been drawn and every trial has ended."""
        return self._drawn_out and not self._open

    def next_segment(self) -> Segment | None:
        """The segment that should run next, or None when there is nothing to run now."""
        while not self._ready and not self._drawn_out and not (self._proposer.waits and self._open):
            self._open_batch()
        if not self._ready:
            return None
        segment = min(self._ready, key=lambda one: one.trial.cohort)
        self._ready.remove(segment)
        self.running += 1
        return segment

    def reported(self, segment: Segment, report: Report) -> None:
        """Take in what a segment said; a report without outcome says how far it is and that it goes on."""
        progress = self._trials[segment.trial.trial_id]
        for said in report.epochs:
            progress.epochs[int(said["epoch"])] = dict(said)
            if self._on_epoch is not None:
                self._on_epoch(progress.spec, said)
        if report.outcome is None:
            return
        progress.started_at = progress.started_at or report.place.get("started_at")
        self.running -= 1
        if report.state is None:
            self._end(progress, report.outcome, report.place)
        else:
            progress.paused = report
            self._pause(progress)

    def lost(self, segment: Segment, error: str) -> None:
        """Take in that a segment ended without a report (a worker died): it runs again, or has failed."""
        progress = self._trials[segment.trial.trial_id]
        self.running -= 1
        if segment.attempt < self._retries:
            retry = Segment(segment.trial, segment.until, segment.state, segment.attempt + 1)
            self._ready.insert(0, retry)
            return
        text = f"lost {segment.attempt + 1} times, the last time: {error}"
        self._end(progress, self._failed(segment.trial, text), {})

    def _open_batch(self) -> None:
        specs = self._proposer.next_batch()
        if not specs:
            self._drawn_out = True
            return
        cohort = specs[0].cohort
        batch = {spec.trial_id: _Progress(spec) for spec in specs}
        self._trials.update(batch)
        self._open[cohort] = batch
        if self._rungs is not None:
            self._rungs.open_cohort(cohort, [(spec.config_id, spec.seed) for spec in specs])
        for trial_id, progress in batch.items():
            if trial_id not in self._known:
                self._ready.append(Segment(progress.spec, self._next_rung(0), None))
        for trial_id, progress in batch.items():
            if trial_id in self._known:
                self._replay(progress, self._known.pop(trial_id))
        self._close_if_over(cohort)

    def _replay(self, progress: _Progress, known: KnownTrial) -> None:
        """Take in a trial of an earlier part of the run, as the rung board would have heard of it then."""
        spec = progress.spec
        row, history = known
        progress.epochs = dict(history)
        progress.ended = EndedTrial(spec, row, history)
        self._on_ended(progress.ended, True)
        if self._rungs is None:
            return
        halved = str(row.get("stop_reason") or "").startswith(HALVED)
        for rung in self._rungs.rungs:
            if rung < progress.epoch or (halved and rung == progress.epoch):
                value = self._value_at(progress, rung)
                self._follow(self._rungs.report(spec.cohort, spec.config_id, spec.seed, rung, value))
        if not halved:
            self._leave_rungs(progress)

    def _pause(self, progress: _Progress) -> None:
        assert self._rungs is not None
        spec, epoch = progress.spec, progress.epoch
        value = self._value_at(progress, epoch)
        self._follow(self._rungs.report(spec.cohort, spec.config_id, spec.seed, epoch, value))

    def _follow(self, decisions: Sequence[Decision]) -> None:
        """Let paused trials go on or end, as the rung board decided."""
        for decision in decisions:
            progress = next(
                one
                for one in self._open[decision.cohort].values()
                if (one.spec.config_id, one.spec.seed) == (decision.config_id, decision.seed)
            )
            paused = progress.paused
            if paused is None or decision.action == "wait":
                continue
            progress.paused = None
            if decision.action == "continue":
                self._ready.append(Segment(progress.spec, self._next_rung(progress.epoch), paused.state))
            else:
                assert paused.outcome is not None
                self._end(progress, paused.outcome, paused.place, left_rungs=True)

    def _end(
        self,
        progress: _Progress,
        outcome: Mapping[str, Any],
        place: Mapping[str, Any],
        *,
        left_rungs: bool = False,
    ) -> None:
        if progress.started_at is not None:
            place = {**place, "started_at": progress.started_at}
        progress.ended = EndedTrial(progress.spec, outcome, progress.epochs, place)
        self._on_ended(progress.ended, False)
        if self._rungs is not None and not left_rungs:
            self._leave_rungs(progress)
        self._close_if_over(progress.spec.cohort)

    def _leave_rungs(self, progress: _Progress) -> None:
        assert self._rungs is not None
        assert progress.ended is not None
        spec = progress.spec
        well = progress.ended.outcome["status"] in ENDED_WELL
        value = self._value_at(progress, progress.epoch) if well else None
        self._follow(self._rungs.leave(spec.cohort, spec.config_id, spec.seed, value))

    def _close_if_over(self, cohort: int) -> None:
        batch = self._open.get(cohort)
        if batch is None or any(progress.ended is None for progress in batch.values()):
            return
        del self._open[cohort]
        ended = {trial_id: one.ended for trial_id, one in batch.items() if one.ended is not None}
        self._proposer.batch_ended(cohort, ended)
        for progress in batch.values():
            progress.epochs = {}  # written to the history by now; long sweeps should not carry it along

    def _next_rung(self, epoch: int) -> int | None:
        if self._rungs is None:
            return None
        return next((rung for rung in self._rungs.rungs if rung > epoch), None)

    def _value_at(self, progress: _Progress, epoch: int) -> float:
        """The metric at a rung; NaN, the worst there is, also for a trial that has met too many NaNs by then.

        The training passes over steps that are not finite, so a metric of clean weights says nothing of them.
        """
        said = progress.epochs.get(epoch, {})
        if said.get("nan_count", 0) > self._nan_budget:
            return math.nan
        if said and self._metric not in said:
            hint = nearest(self._metric, said)
            raise UserError(f"halving.metric: no epoch reports {self._metric!r}{hint}")
        value = said.get(self._metric)
        return math.nan if value is None else float(value)
