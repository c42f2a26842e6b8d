"""Which pieces of which trials run next: batches from the searcher, segments between rungs, packs, retries.

All decisions of a sweep are made here, in the driver and without Ray, from what trials reported and never
from when they did: the same plan gives the same rows with one worker or many, interrupted or not.

A trial runs as segments. A segment trains from one rung to the next (without halving, from start to end) and
gives back the trial's state and what its outcome would be if it ended there; a trial that waits for the rest
of its batch holds no worker, and a worker that is lost costs one segment of each trial that it had.

Segments that may train as one model go to a worker together, as a pack. Which ones do is decided by what is
ready, and changes when a trial runs, never what it gives: batches, rungs and retries are those of trials.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from harness.errors import UserError, nearest
from harness.halving import Decision, RungBoard

FlatConfig = Mapping[str, Any]
EpochMetrics = Mapping[str, float]
KnownTrial = tuple[Mapping[str, Any], Mapping[int, EpochMetrics]]

# Outcomes that ended on their own terms: their last metric stands for them at the rungs they did not reach.
ENDED_WELL = ("completed", "stopped")
HALVED = "halving"
# After a pack was lost, its trials run in packs so many times smaller: who brings workers down is soon alone.
_SHRINK = 8
ANY_NUMBER = 2**31


@dataclass(frozen=True, slots=True)
class TrialSpec:
    """One trial: a config with every knob filled in, and a seed."""

    trial_id: str
    config_id: str
    seed: int
    cohort: int
    config: FlatConfig
    active: FlatConfig | None = None  # the knobs that change the training, where they are known


@dataclass(slots=True)
class Segment:
    """A piece of a trial for a worker: from `state` (None: its start) until an epoch (None: its end).

    start    epochs behind it, which `state` holds
    attempt  how often it was lost while it had a worker for itself
    most     how many may share a pack with it
    pack     the number of the pack that it was handed out in
    shared   how many segments that pack has
    alone    whether it is trained by itself, and not as a pack of one, in which sums are rounded otherwise
    """

    trial: TrialSpec
    until: int | None
    state: Any
    start: int = 0
    attempt: int = 0
    most: int = ANY_NUMBER
    pack: int = -1
    shared: int = 1
    alone: bool = False


@dataclass(frozen=True, slots=True)
class Packing:
    """How segments are put together: at most `size` to a pack, for so many workers.

    `key` says of a trial what those of its pack must have in common with it, None where it trains alone.
    """

    size: int = 1
    workers: int = 1
    key: Callable[[TrialSpec], Hashable | None] = field(default=lambda trial: None)

    def __post_init__(self) -> None:
        for name in ("size", "workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {name}={getattr(self, name)}")


@dataclass(frozen=True, slots=True)
class Report:
    """What a segment said: its epochs, and at its end the outcome; `state` when the trial could go on."""

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
    key: Hashable | None = None
    epochs: dict[int, EpochMetrics] = field(default_factory=dict)
    paused: Report | None = None
    started_at: Any = None
    ended: EndedTrial | None = None

    @property
    def epoch(self) -> int:
        return max(self.epochs, default=0)


@dataclass(slots=True)
class _Batch:
    """The trials of one batch: by trial_id, by config and seed, and how many of them have not ended."""

    trials: dict[str, _Progress]
    by_config: dict[tuple[str, int], _Progress]
    under_way: int


class JobBoard:
    """Hands out packs of segments and takes in what became of each; every trial ends once, by `on_ended`.

    `known` holds row and history of trials that ended in an earlier part of the run: they are taken in when
    their batch opens, without a segment. `on_ended(trial, replayed)` is called once for every trial;
    `on_epoch(trial, said)` for every epoch of a worker's report, again where a lost segment is run again.

    A search that does not learn is asked ahead for as many batches as fill a pack for every worker.
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
        packing: Packing | None = None,
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
        self._packing = packing or Packing()
        self._alone: set[Hashable] = set()  # what was found to share no pack
        self._trials: dict[str, _Progress] = {}  # of the batches that are open
        self._open: dict[int, _Batch] = {}
        self._ready: list[Segment] = []
        self._drawn_out = False
        self._packs = 0
        self._running: dict[int, int] = {}  # by pack, how many of its segments have not ended

    @property
    def finished(self) -> bool:
        """Whether every batch has been drawn and every trial has ended."""
        return self._drawn_out and not self._open

    @property
    def running(self) -> int:
        """How many trials are with a worker."""
        return sum(self._running.values())

    def next_pack(self) -> list[Segment]:
        """The segments that one worker should run now, together; none when there is nothing to run now."""
        size = self._packing.size
        wanted = size * self._packing.workers if size > 1 else 1
        while len(self._ready) < wanted and not self._drawn_out and not (self._proposer.waits and self._open):
            self._open_batch()
        if not self._ready:
            return []
        pack = self._choose_pack()
        chosen = {id(segment) for segment in pack}
        self._ready = [segment for segment in self._ready if id(segment) not in chosen]
        for segment in pack:
            segment.pack, segment.shared = self._packs, len(pack)
            segment.alone = self._trials[segment.trial.trial_id].key is None
        self._running[self._packs] = len(pack)
        self._packs += 1
        return pack

    def _leave_pack(self, segment: Segment) -> None:
        self._running[segment.pack] -= 1
        if not self._running[segment.pack]:
            del self._running[segment.pack]

    def _choose_pack(self) -> list[Segment]:
        """The oldest segment and those that may share its pack, as many as leave idle workers their part."""
        first = min(self._ready, key=lambda one: one.trial.cohort)
        key = self._company(first)
        if key is None:
            return [first]
        company = [segment for segment in self._ready if self._company(segment) == key]
        company.sort(key=lambda one: (one is not first, one.trial.cohort))
        size = min(self._packing.size, first.most)
        idle = max(1, self._packing.workers - len(self._running))
        rounds = math.ceil(len(self._ready) / (size * idle))
        fair = math.ceil(len(self._ready) / (rounds * idle))
        packs = math.ceil(len(company) / min(size, fair))
        return company[: math.ceil(len(company) / packs)]

    def _company(self, segment: Segment) -> Hashable | None:
        """What the segments of a pack have in common; None for one that runs alone."""
        key = self._trials[segment.trial.trial_id].key
        if key is None or key in self._alone or segment.most == 1 or self._packing.size == 1:
            return None
        return (key, segment.start, segment.until, segment.most)

    def reported(self, segment: Segment, report: Report) -> None:
        """Take in what a segment said; a report without outcome says how far it is and that it goes on."""
        progress = self._trials[segment.trial.trial_id]
        for said in report.epochs:
            progress.epochs[int(said["epoch"])] = said
            if self._on_epoch is not None:
                self._on_epoch(progress.spec, said)
        if report.outcome is None:
            return
        progress.started_at = progress.started_at or report.place.get("started_at")
        self._leave_pack(segment)
        if report.outcome.get("pack_note") and progress.key is not None:
            self._alone.add(progress.key)
        if report.state is None:
            self._end(progress, report.outcome, report.place)
        else:
            progress.paused = report
            self._pause(progress)

    def lost(self, segment: Segment, error: str) -> None:
        """Take in that a segment ended without a report (a worker died): it runs again, or has failed.

        Of a pack nobody knows who was to blame: its segments run again in smaller ones, and at last alone,
        before one of them has failed.
        """
        progress = self._trials[segment.trial.trial_id]
        self._leave_pack(segment)
        if segment.shared > 1:
            self._ready.insert(0, replace(segment, most=max(1, segment.shared // _SHRINK)))
            return
        if segment.attempt < self._retries:
            self._ready.insert(0, replace(segment, attempt=segment.attempt + 1, most=1))
            return
        text = f"lost {segment.attempt + 1} times, the last time: {error}"
        self._end(progress, self._failed(segment.trial, text), {})

    def _open_batch(self) -> None:
        specs = self._proposer.next_batch()
        if not specs:
            self._drawn_out = True
            return
        cohort = specs[0].cohort
        keys: dict[str, Hashable | None] = {}
        batch = _Batch({}, {}, len(specs))
        for spec in specs:
            if spec.config_id not in keys:
                keys[spec.config_id] = self._packing.key(spec)
            progress = _Progress(spec, keys[spec.config_id])
            batch.trials[spec.trial_id] = batch.by_config[spec.config_id, spec.seed] = progress
        self._trials.update(batch.trials)
        self._open[cohort] = batch
        if self._rungs is not None:
            self._rungs.open_cohort(cohort, batch.by_config)
        for trial_id, progress in batch.trials.items():
            if trial_id not in self._known:
                self._ready.append(Segment(progress.spec, self._next_rung(0), None))
        for trial_id, progress in batch.trials.items():
            if trial_id in self._known:
                self._replay(progress, self._known.pop(trial_id))
        self._close_if_over(cohort)

    def _replay(self, progress: _Progress, known: KnownTrial) -> None:
        """Take in a trial of an earlier part of the run, as the rung board would have heard of it then."""
        spec = progress.spec
        row, history = known
        progress.epochs = dict(history)
        self._note_end(progress, EndedTrial(spec, row, history), replayed=True)
        if self._rungs is None:
            return
        halved = str(row.get("stop_reason") or "").startswith(HALVED)
        for rung in self._rungs.rungs:
            if rung < progress.epoch or (halved and rung == progress.epoch):
                value = self._value_at(progress, rung)
                self._follow(self._rungs.report(spec.cohort, spec.config_id, spec.seed, rung, value))
        if not halved:
            self._leave_rungs(progress)
        progress.epochs = {}

    def _pause(self, progress: _Progress) -> None:
        assert self._rungs is not None
        spec, epoch = progress.spec, progress.epoch
        value = self._value_at(progress, epoch)
        self._follow(self._rungs.report(spec.cohort, spec.config_id, spec.seed, epoch, value))

    def _follow(self, decisions: Sequence[Decision]) -> None:
        """Let paused trials go on or end, as the rung board decided."""
        for decision in decisions:
            batch = self._open.get(decision.cohort)
            if batch is None:  # the last of them has ended meanwhile
                return
            progress = batch.by_config[decision.config_id, decision.seed]
            paused = progress.paused
            if paused is None or decision.action == "wait":
                continue
            progress.paused = None
            if decision.action == "continue":
                epoch = progress.epoch
                # One that came back with the reason why it shares no pack has the state of one alone.
                most = 1 if paused.outcome and paused.outcome.get("pack_note") else ANY_NUMBER
                self._ready.append(
                    Segment(progress.spec, self._next_rung(epoch), paused.state, start=epoch, most=most)
                )
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
        self._note_end(progress, EndedTrial(progress.spec, outcome, progress.epochs, place))
        if self._rungs is not None and not left_rungs:
            self._leave_rungs(progress)
        progress.epochs = {}  # long sweeps should not carry it along
        self._close_if_over(progress.spec.cohort)

    def _note_end(self, progress: _Progress, ended: EndedTrial, *, replayed: bool = False) -> None:
        self._on_ended(ended, replayed)
        progress.ended = replace(ended, history={})
        self._open[progress.spec.cohort].under_way -= 1

    def _leave_rungs(self, progress: _Progress) -> None:
        assert self._rungs is not None
        assert progress.ended is not None
        spec = progress.spec
        well = progress.ended.outcome["status"] in ENDED_WELL
        value = self._value_at(progress, progress.epoch) if well else None
        self._follow(self._rungs.leave(spec.cohort, spec.config_id, spec.seed, value))

    def _close_if_over(self, cohort: int) -> None:
        batch = self._open.get(cohort)
        if batch is None or batch.under_way:
            return
        del self._open[cohort]
        if self._rungs is not None:
            self._rungs.close_cohort(cohort)
        ended = {trial_id: one.ended for trial_id, one in batch.trials.items() if one.ended is not None}
        self._proposer.batch_ended(cohort, ended)
        for trial_id in batch.trials:
            del self._trials[trial_id]

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
