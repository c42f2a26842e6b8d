"""Trials of one task trained together: as one vectorised model those that can be, the others one by one.

The training itself is `scm.packed`'s and, for a trial alone, `trainables.trial`'s. Decided here: which trials
become one model, what each of them says (as it would alone, but for the rounding of sums), and that whatever
stands in the way of training together makes trials train alone, with the reason in `pack_note`.
"""

from __future__ import annotations

import os
import re
import tempfile
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import nn

from scm.data import Split
from scm.packed.eligibility import IN_LOSS, OWN
from scm.packed.engine import PackedTrainer, Programs
from scm.packed.lanes import Entrant, FirstModels, NotPackable, PackTrial
from scm.packed.reports import PackEpoch
from scm.trial import Decoded
from scm.trial_config import KNOBS, TrialConfig
from trainables.configs import parse_config
from trainables.curves import curve_columns, risk_points, smallest_tau
from trainables.lane_states import (
    AloneState,
    LaneState,
    joined_state,
    pack_folder,
    split_state,
    unpack_folder,
)
from trainables.scoring import NAN, score_many
from trainables.step_timing import step_parts, time_parts
from trainables.tasks.protocol import Task
from trainables.trial import (
    TELEMETRY_PREFIX,
    TrialRun,
    abstaining,
    check_device,
    empty_outcome,
    error_line,
    failed_outcome,
)

Load = Callable[[int], tuple[Task, Mapping[str, Split]]]
"""The task and its splits for a seed."""

# Traced programs that a process keeps; a space of many widths has as many kinds of pack.
_KEPT_PROGRAMS = 64
# A trial takes its weights, gradients, up to three rows of optimizer state and the best epoch's weights.
_ROWS_OF_WEIGHTS = 6
_SHARE_OF_MEMORY = 0.25

# Terms that are there or not in all of a pack, because they carry something from step to step.
_WITH_A_STATE = ("lambda_saturation", "lambda_spread")


@dataclass(frozen=True, slots=True)
class Member:
    """A trial for a pack: from `state` (None: its start) until an epoch (None: its end).

    alone: it is trained by itself, whatever it could be part of.
    """

    trial_id: str
    config: Mapping[str, Any]
    seed: int
    until: int | None = None
    state: LaneState | AloneState | None = None
    alone: bool = False


@dataclass(frozen=True, slots=True)
class Told:
    """What one trial said: the numbers of an epoch (empty: none), and where it ended its outcome.

    state: of a trial that reached its `until` and could go on; its outcome is then the one it would have.
    model: of a trial that has ended, where models are kept and it had one, with the weights it ended with.
    """

    trial_id: str
    said: Mapping[str, Any]
    outcome: Mapping[str, Any] | None = None
    state: LaneState | AloneState | None = None
    model: nn.Module | None = None


@dataclass
class Shelf:
    """What a process keeps of one task from pack to pack: nothing that changes what a trial comes to.

    task: the one whose loss is traced; programs: traced steps; refused: kinds of trials that could not be
    traced, with the reason; step_times: of the parts of a step, by what they consist of.
    """

    task: Task | None = None
    programs: Programs = field(default_factory=dict)
    refused: dict[Hashable, str] = field(default_factory=dict)
    step_times: dict[Hashable, float] = field(default_factory=dict)

    def tidy(self) -> None:
        """Let the oldest programs go where there are too many."""
        while len(self.programs) > _KEPT_PROGRAMS:
            del self.programs[next(iter(self.programs))]


class PackRun:
    """Trials under way together: step them epoch by epoch until `done`.

    members: trials with names of their own. load: gives task and splits of a seed; what it raises is the
    outcome of the seed's trials. pack_id: names the pack in outcomes. keep_models: whether each trial's model
    is told at its end. Raises `DeviceError` at once when the device is absent, and nothing else: a trial that
    raises has failed, and no other with it.

    Outcomes have the keys of `TrialRun.outcome` and four more: `pack_id`, `pack_size` and `pack_step_time_ms`
    (the pack's step over its size) where the trial was part of a pack, else None, and `pack_note`, why it was
    not, or empty. `step_time_ms` is in any case that of the config alone: for a trial of a pack it is the
    time of forward and backward pass and that of the optimizer's step, each measured when a trial has ended,
    in a brief training alone that does the same there.
    """

    def __init__(
        self,
        members: Sequence[Member],
        load: Load,
        device: str = "cpu",
        *,
        pack_id: str = "pack",
        shelf: Shelf | None = None,
        keep_models: bool = False,
    ) -> None:
        check_device(device)
        self.device = device
        self.keep_models = keep_models
        self.pack_id = pack_id
        self.shelf = Shelf() if shelf is None else shelf
        self._load = load
        self._told: list[Told] = []
        self._units: deque[_Together | _Alone] = deque()
        self._packs = 0
        sources: dict[int, _Source | BaseException] = {}
        for member in members:
            if member.seed not in sources:
                sources[member.seed] = self._source(member.seed)
        self._seat([self._look_at(member, sources[member.seed]) for member in members])

    @property
    def done(self) -> bool:
        """Whether every trial has ended or waits at its `until`."""
        return not self._units and not self._told

    def step(self) -> list[Told]:
        """Train an epoch of some of the trials, and return what they said; RuntimeError when all are done."""
        if self.done:
            raise RuntimeError("step() must not be called on a pack that is done")
        while not self._told and self._units:
            unit = self._units[0]
            try:
                self._told = unit.step()
            except NotPackable as error:
                self._part(unit, error.reason)
            # Whatever stops a pack, its trials are trained alone: what is their own fault shows there.
            except Exception as error:
                self._part(unit, f"the pack failed: {error_line(error)}")
            else:
                if unit.done:
                    self._units.popleft()
        told, self._told = self._told, []
        self.shelf.tidy()
        return told

    def _part(self, unit: _Together | _Alone, reason: str) -> None:
        """Train the trials of a pack alone that have not ended, from their beginning."""
        assert isinstance(unit, _Together)  # of one alone, everything is an outcome
        self._units.popleft()
        self.shelf.refused[unit.signature] = reason
        self._units.extendleft(_Alone(self, seat, reason) for seat in reversed(unit.seats))

    def _source(self, seed: int) -> _Source | BaseException:
        try:
            task, splits = self._load(seed)
        except (Exception, SystemExit) as error:  # a task that raises is an outcome of each of its trials
            return error
        if self.shelf.task is None:
            self.shelf.task = task
        return _Source(task, splits, FirstModels(task.build_model))

    def _look_at(self, member: Member, source: _Source | BaseException) -> _Seat | None:
        if isinstance(source, BaseException):
            self._told.append(Told(member.trial_id, {}, failed_outcome(source, member.config)))
            return None
        seat = _Seat(member, source.task, source.splits)
        if isinstance(member.state, AloneState):
            seat.note = member.state.note
            return seat
        if member.alone:
            return seat
        try:
            config, seat.config = parse_config(member.config)
            trial = PackTrial(config, member.seed, member.trial_id)
            seat.entrant = source.first_models.look_at(trial, source.splits)
        except (Exception, SystemExit):  # it fails the same way alone, and says so in its outcome
            return seat
        seat.note = seat.entrant.reason or self.shelf.refused.get(seat.entrant.signature, "")
        return seat

    def _seat(self, seats: Sequence[_Seat | None]) -> None:
        """Make packs of those that can be one, and let the others follow alone."""
        kinds: dict[Hashable, list[_Seat]] = {}
        alone: list[_Seat] = []
        for seat in seats:
            if seat is None:
                continue
            if seat.entrant is None or seat.note:
                alone.append(seat)
            else:
                kinds.setdefault(seat.entrant.signature, []).append(seat)
        many = len(kinds) > 1
        for kind in kinds.values():
            entrant = kind[0].entrant
            assert entrant is not None
            packs = -(-len(kind) // lanes_that_fit(entrant, self.device))
            size = -(-len(kind) // packs)
            for first in range(0, len(kind), size):
                name = f"{self.pack_id}.{self._packs}" if many or packs > 1 else self.pack_id
                self._packs += 1
                self._units.append(_Together(self, kind[first : first + size], name))
        self._units.extend(_Alone(self, seat, seat.note) for seat in alone)

    def step_time_alone(self, seat: _Seat) -> float:
        """The step time of a trial's config alone, each part measured once for all that do the same there."""
        assert seat.entrant is not None
        times, parts = self.shelf.step_times, step_parts(seat.entrant, self.device)
        if any(part not in times for part in parts):
            config, seed = seat.entrant.trial.config, seat.member.seed
            measured = time_parts(seat.task, config, seed, seat.splits["train"], self.device)
            for part, time_ms in zip(parts, measured, strict=True):
                times.setdefault(part, time_ms)
        return sum(times[part] for part in parts)


class _Source(NamedTuple):
    """What the trials of one seed are trained on, and what is built for them."""

    task: Task
    splits: Mapping[str, Split]
    first_models: FirstModels


@dataclass
class _Seat:
    """A trial with what it needs: its task, its data, and what was seen of its model."""

    member: Member
    task: Task
    splits: Mapping[str, Split]
    config: Mapping[str, Any] = field(default_factory=dict)
    entrant: Entrant | None = None
    note: str = ""
    said: Mapping[str, Any] = field(default_factory=dict)
    step_ms: list[float] = field(default_factory=list)
    spent_s: float = 0.0
    parameters: int = 0


class _Together:
    """Trials that are one model."""

    def __init__(self, run: PackRun, seats: list[_Seat], name: str) -> None:
        self.seats = seats  # those that have not ended
        self.name = name
        self.size = len(seats)
        entrant = seats[0].entrant
        assert entrant is not None
        self.signature = entrant.signature
        self._run = run
        self._trainer: PackedTrainer | None = None
        self._epochs: Iterator[PackEpoch] = iter(())

    @property
    def done(self) -> bool:
        return not self.seats

    def step(self) -> list[Told]:
        """Train one epoch of all."""
        begun = time.perf_counter()
        trainer = self._trainer or self._make_trainer()
        epoch = next(self._epochs)
        failed = self._take_epoch(trainer, epoch)
        spent_s = (time.perf_counter() - begun) / len(self.seats)
        for seat in self.seats:
            seat.spent_s += spent_s
            seat.step_ms.append(epoch.step_ms)
        told = self._end_some(trainer, failed)
        ended = {one.trial_id for one in told if one.outcome is not None}
        self.seats = [seat for seat in self.seats if seat.member.trial_id not in ended]
        return told

    def _make_trainer(self) -> PackedTrainer:
        run, task = self._run, self._run.shelf.task
        assert task is not None
        splits = {seat.member.seed: seat.splits for seat in self.seats}
        loss_of = task.make_loss
        trainer = PackedTrainer(
            (),
            task.build_model,
            splits.__getitem__,
            device=run.device,
            loss_of=loss_of,
            programs=run.shelf.programs,
        )
        states = [seat.member.state for seat in self.seats if isinstance(seat.member.state, LaneState)]
        if states:
            trainer.load_state_dict(joined_state(states))
        for seat in self.seats:
            assert seat.entrant is not None
            seat.parameters = sum(item.numel() for item in seat.entrant.model.parameters())
            if isinstance(seat.member.state, LaneState):
                seat.spent_s = seat.member.state.spent_s
            else:
                trainer.refill(seat.entrant)
        self._trainer, self._epochs = trainer, trainer.epochs()
        return trainer

    def _take_epoch(self, trainer: PackedTrainer, epoch: PackEpoch) -> dict[str, str]:
        """Note what each trial's epoch says; return by trial what a task said that failed to score it."""
        measured = self._measure("val", self.seats)
        columns = (epoch.epoch, epoch.loss, epoch.val_loss, epoch.nan_count, epoch.learning_rate)
        told = dict(zip(epoch.keys, zip(*columns, trainer.telemetry(), strict=True), strict=True))
        failed: dict[str, str] = {}
        for seat in self.seats:
            key = seat.member.trial_id
            found = measured[key]
            if isinstance(found, BaseException):
                failed[key] = error_line(found)
                continue
            number, loss, val_loss, nan_count, rate, telemetry = told[key]
            metrics, coverage = found
            seat.said = {
                "epoch": number + 1,
                "loss": loss,
                "val_loss": val_loss,
                "coverage": coverage,
                **metrics,
                "nan_count": nan_count,
                "lr": rate,
                "step_time_ms": NAN,  # nothing inside of a pack is measured alone
                **{f"{TELEMETRY_PREFIX}{name}": value for name, value in telemetry.items()},
            }
        return failed

    def _end_some(self, trainer: PackedTrainer, failed: Mapping[str, str]) -> list[Told]:
        """Return what all said, with outcomes of those that have ended, or reached the epoch to pause at."""
        ending: list[_Seat] = []
        pausing: dict[str, _Seat] = {}
        for seat in self.seats:
            key = seat.member.trial_id
            if key in failed:
                continue
            if trainer.lane(key).status != "running":
                ending.append(seat)
            elif seat.member.until is not None and seat.said["epoch"] >= seat.member.until:
                pausing[key] = seat
        states = split_state(trainer.state_dict()) if pausing else {}
        outcomes: dict[str, Mapping[str, Any]] = {}
        if ending or pausing:
            those = [*ending, *pausing.values()]
            tested = self._measure("test", those)
            trivial = {name: self._measure(name, those, abstain=True) for name in ("val", "test")}
            curves = self._curves(those)
            for seat in those:
                key = seat.member.trial_id
                trivial_errors = {
                    f"{prefix}trivial_error": _charged_error(trivial[name][key])
                    for name, prefix in (("val", ""), ("test", "test_"))
                }
                outcomes[key] = self._outcome(seat, tested[key]) | trivial_errors | curves[key]
        told = []
        for seat in self.seats:
            key = seat.member.trial_id
            if key in failed:
                outcome = self._counted(seat) | {"status": "failed", "error": failed[key]}
                told.append(Told(key, {}, outcome))
                trainer.stop(key, "failed")
            elif key in pausing:
                state = replace(states[key], spent_s=seat.spent_s)
                told.append(Told(key, seat.said, outcomes[key], state))
                trainer.stop(key, "paused")
            else:
                kept = trainer.model_of(key) if key in outcomes and self._run.keep_models else None
                told.append(Told(key, seat.said, outcomes.get(key), model=kept))
        return told

    def _outcome(self, seat: _Seat, tested: tuple[dict[str, float], float] | BaseException) -> dict[str, Any]:
        assert self._trainer is not None
        outcome = self._counted(seat)
        if isinstance(tested, BaseException):
            return outcome | {"status": "failed", "error": error_line(tested)}
        lane = self._trainer.lane(seat.member.trial_id)
        metrics, coverage = tested
        own = {name: seat.said[name] for name in seat.said if name not in _OF_AN_EPOCH}
        paused = lane.status == "running"
        return (
            outcome
            | own
            | {"test_coverage": coverage, **{f"test_{name}": value for name, value in metrics.items()}}
            | {
                "status": "stopped" if paused else lane.status,
                "stop_reason": f"paused at epoch {seat.said['epoch']}" if paused else lane.stop_reason,
                "step_time_ms": self._run.step_time_alone(seat),
            }
        )

    def _counted(self, seat: _Seat) -> dict[str, Any]:
        """Give an outcome with what is known without scoring, as `TrialRun` does."""
        assert self._trainer is not None
        lane = self._trainer.lane(seat.member.trial_id)
        return empty_outcome(seat.config) | {
            **{f"nan_{kind}": count for kind, count in lane.nan_counts.items()},
            "nan_count": sum(lane.nan_counts.values()),
            "nan_origin": lane.nan_origin,
            "loss": seat.said.get("loss", NAN),
            "val_loss": seat.said.get("val_loss", NAN),
            "epochs": seat.said.get("epoch", 0),
            "parameters": seat.parameters,
            "duration_s": seat.spent_s,
            "pack_id": self.name,
            "pack_size": self.size,
            "pack_step_time_ms": median(seat.step_ms) if seat.step_ms else NAN,
            "pack_note": "",
        }

    def _measure(
        self, name: str, seats: Sequence[_Seat], *, abstain: bool = False
    ) -> dict[str, tuple[dict[str, float], float] | BaseException]:
        """Score the answers of some trials on a split: metrics by column and coverage, or what was raised.

        With `abstain`, score what models that abstain everywhere would answer.
        """
        assert self._trainer is not None
        answers = self._trainer.decode(name)
        decoded = Decoded(*answers[1:])
        if abstain:
            decoded = abstaining(decoded)
        places = {key: place for place, key in enumerate(answers.keys)}
        coverage = (1.0 - answers.bottom.flatten(1).to(torch.float64).mean(1)).tolist()
        measured: dict[str, tuple[dict[str, float], float] | BaseException] = {}
        for alike in _of_one_split(seats, name):
            rows = [places[seat.member.trial_id] for seat in alike]
            place = torch.tensor(rows)
            own = Decoded(*(item.index_select(0, place) for item in decoded if item is not None))
            scored = score_many(alike[0].task, alike[0].splits[name], _configs(alike), own)
            for seat, row, found in zip(alike, rows, scored, strict=True):
                key = seat.member.trial_id
                measured[key] = found if isinstance(found, BaseException) else (found, coverage[row])
        return measured

    def _curves(self, seats: Sequence[_Seat]) -> dict[str, dict[str, Any]]:
        """Return of some trials the curve of error against coverage on the validation split, as columns."""
        assert self._trainer is not None
        assert seats[0].entrant is not None
        weights = next(seats[0].entrant.model.parameters())
        answers = self._trainer.decode("val", tau=smallest_tau(weights.dtype))
        places = {key: place for place, key in enumerate(answers.keys)}
        curves: dict[str, dict[str, Any]] = {}
        for alike in _of_one_split(seats, "val"):
            place = torch.tensor([places[seat.member.trial_id] for seat in alike])
            own = Decoded(*(item.index_select(0, place) for item in answers[1:]))
            points = risk_points(alike[0].task, alike[0].splits["val"], _configs(alike), own)
            for seat, found in zip(alike, points, strict=True):
                curves[seat.member.trial_id] = curve_columns(found)
        return curves


def _of_one_split(seats: Sequence[_Seat], name: str) -> list[list[_Seat]]:
    """Return trials in groups that are scored on the same split."""
    by_split: dict[int, list[_Seat]] = {}
    for seat in seats:
        by_split.setdefault(id(seat.splits[name]), []).append(seat)
    return list(by_split.values())


def _configs(seats: Sequence[_Seat]) -> list[TrialConfig]:
    return [seat.entrant.trial.config for seat in seats if seat.entrant is not None]


def _charged_error(measured: tuple[dict[str, float], float] | BaseException) -> float:
    return NAN if isinstance(measured, BaseException) else measured[0]["charged_error"]


# What an epoch says beside what an outcome does.
_OF_AN_EPOCH = ("epoch", "lr", "step_time_ms", "nan_count", "loss", "val_loss")


class _Alone:
    """A trial that trains by itself."""

    def __init__(self, run: PackRun, seat: _Seat, note: str) -> None:
        self.done = False
        self._pack = run
        self._seat = seat
        self._note = note
        self._run: TrialRun | None = None

    def step(self) -> list[Told]:
        """Train one epoch."""
        member = self._seat.member
        run = self._run or self._begin()
        said = {} if run.done else run.step()
        if run.done:
            self.done = True
            kept = run.model if self._pack.keep_models else None
            return [Told(member.trial_id, said, self._outcome(run), model=kept)]
        if member.until is None or said["epoch"] < member.until:
            return [Told(member.trial_id, said)]
        self.done = True
        with tempfile.TemporaryDirectory(prefix="scm-state-") as folder:
            run.save(Path(folder))
            state = AloneState(pack_folder(Path(folder)), self._note)
        run.stop(f"paused at epoch {said['epoch']}")
        return [Told(member.trial_id, said, self._outcome(run), state)]

    def _begin(self) -> TrialRun:
        seat, member = self._seat, self._seat.member
        self._run = run = TrialRun(
            seat.task, member.config, member.seed, self._pack.device, splits=seat.splits
        )
        if isinstance(member.state, AloneState):
            with tempfile.TemporaryDirectory(prefix="scm-state-") as folder:
                unpack_folder(member.state.files, Path(folder))
                run.load(Path(folder))
        return run

    def _outcome(self, run: TrialRun) -> dict[str, Any]:
        own = {"pack_id": None, "pack_size": None, "pack_step_time_ms": None, "pack_note": self._note}
        return run.outcome() | own


# --- what may be one model, and how many of it --------------------------------------------------------


def pack_key(active: Mapping[str, Any]) -> Hashable:
    """Return what must be equal of the knobs of trials that may be one model: those that make up a step.

    active: the knobs that change anything, by name. Whether the trials are one model in the end is seen when
    their models are built.
    """
    parts: list[tuple[str, Any]] = [("finite_action", active.get("finite_action"))]
    for name, value in sorted(active.items()):
        if name not in IN_LOSS:
            parts += [] if name in OWN else [(name, value)]
        elif KNOBS[name].optional:
            parts.append((name, value is None))
        elif name in _WITH_A_STATE:
            parts.append((name, value == 0))
    return tuple(parts)


def lanes_that_fit(entrant: Entrant, device: str) -> int:
    """How many trials of a model fit into a quarter of the memory that is free now, at least 1."""
    weights = sum(item.numel() * item.element_size() for item in entrant.model.parameters())
    if device.startswith("cuda"):
        free, _ = torch.cuda.mem_get_info(device)
    else:
        free = _available_memory()
    return max(1, int(_SHARE_OF_MEMORY * free / (_ROWS_OF_WEIGHTS * max(1, weights))))


def _available_memory() -> int:
    """Bytes that processes of this machine can still have; all there are where the system does not say."""
    try:
        said = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(encoding="ascii"))
    except OSError:
        said = None
    if said is not None:
        return 1024 * int(said[1])
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
