"""Laws of things with a history: a controller, a training that is saved and killed, a store of rows.

Each is a `Machine`: settings, operations, and a run that carries them out on the subject and on a model
of what must come of them. A list of operations is a case like any other, to be stored, made small and tried
again (`machine_property`); for Hypothesis alone the same run is a RuleBasedStateMachine (`state_machine`).
"""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from hypothesis.strategies import SearchStrategy

from harness.robustness.law import BrokenLawError, Case, DoesNotApplyError, Property, Subject
from harness.robustness.same import first_difference


class Run(Protocol):
    """A subject under way, beside the model of it."""

    def do(self, name: str, arguments: Sequence[Any]) -> None:
        """Carry out one operation; BrokenLawError where the subject is not what the model says."""

    def close(self) -> None:
        """Let go of what it holds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """A law over histories.

    operations: what may be done, with where its arguments come from. often: the one that the others are
    about, which is drawn as often as all of them together. longest: operations of a case.
    """

    name: str
    group: int
    law: str
    needs: tuple[str, ...]
    settings: SearchStrategy[dict[str, Any]]
    operations: Mapping[str, tuple[SearchStrategy[Any], ...]]
    start: Callable[[Subject, Mapping[str, Any]], Run]
    often: str
    longest: int


def machine_property(machine: Machine) -> Property:
    """The machine as a property: a case is {"settings", "operations"}, an operation [name, argument, ...]."""
    drawn = {
        name: st.tuples(st.just(name), *arguments).map(list) for name, arguments in machine.operations.items()
    }
    names = [machine.often] * (len(drawn) - 1) + list(drawn)
    any_of = st.sampled_from(names).flatmap(drawn.__getitem__)

    def cases(subject: Subject) -> SearchStrategy[Case]:
        return st.fixed_dictionaries(
            {
                "settings": machine.settings,
                "operations": st.lists(any_of, min_size=1, max_size=machine.longest),
            }
        )

    def check(subject: Subject, case: Case) -> None:
        run = machine.start(subject, case["settings"])
        try:
            for place, (name, *arguments) in enumerate(case["operations"], start=1):
                try:
                    run.do(name, arguments)
                except BrokenLawError as broken:
                    raise BrokenLawError(f"after operation {place}, {name}: {broken}") from None
        finally:
            run.close()

    return Property(
        name=machine.name,
        group=machine.group,
        law=machine.law,
        of="library",
        needs=machine.needs,
        cases=cases,
        check=check,
    )


def state_machine(machine: Machine, subject: Subject) -> type[RuleBasedStateMachine]:
    """The machine over one subject as a class for Hypothesis, a rule for each operation."""

    def begin(self: Any, settings: dict[str, Any]) -> None:
        self.run_under_way = machine.start(subject, settings)

    def teardown(self: Any) -> None:
        if getattr(self, "run_under_way", None) is not None:
            self.run_under_way.close()

    def act(name: str, count: int) -> Callable[..., None]:
        def do(self: Any, **arguments: Any) -> None:
            self.run_under_way.do(name, [arguments[f"x{index}"] for index in range(count)])

        do.__name__ = name
        return do

    members: dict[str, Any] = {"begin": initialize(settings=machine.settings)(begin), "teardown": teardown}
    for name, arguments in machine.operations.items():
        drawn = {f"x{index}": argument for index, argument in enumerate(arguments)}
        members[name] = rule(**drawn)(act(name, len(arguments)))  # type: ignore[call-overload]  # by name
    return type(machine.name, (RuleBasedStateMachine,), members)


# --- the controller of the coverage ---------------------------------------------------------------------

DEAD_BAND = {"reference": 0.02, "unbiased": 0.0}
TARGETS = (0.0, 0.5, 0.9, 0.95, 1.0)
# Coverage times answers over answers is not always the coverage: a gap below this is none.
NO_GAP = 1e-12


def coverages() -> SearchStrategy[float]:
    """Shares: the edges, the usual targets with one ulp to each side of them, and anything between."""
    edges = {0.0, 1.0, 5e-324}
    for target in TARGETS:
        edges |= {target, math.nextafter(target, 0.0), min(1.0, math.nextafter(target, 2.0))}
    return st.sampled_from(sorted(edges)) | st.floats(0, 1)


@st.composite
def controller_settings(draw: st.DrawFn) -> dict[str, Any]:
    """Settings of a controller that has both bounds, and begins between them."""
    low = draw(st.sampled_from([0.0, 0.1, 0.25]))
    high = draw(st.sampled_from([0.25, 1.0, 2.0, 1e6]))
    return {
        "rule": draw(st.sampled_from(["unbiased", "reference"])),
        "target_coverage": draw(st.sampled_from(TARGETS)),
        "learning_rate": draw(st.sampled_from([0.01, 1e-9, 0.5, 3.0, 1e12])),
        "lambda_min": low,
        "lambda_rej_min": 0.0,
        "lambda_max": high,
        "initial_lambda": draw(st.sampled_from([low, high, 0.5 * (low + high)])),
        "momentum": draw(st.sampled_from([0.0, 0.0, 0.5, 0.95])),
        "warmup_steps": draw(st.sampled_from([0, 0, 2])),
        "update_frequency": draw(st.sampled_from([1, 1, 3])),
        "cumulative_steps": 0,
    }


class ControllerRun:
    """A controller that is told coverages, saved and loaded, beside one that was never interrupted."""

    def __init__(self, subject: Subject, settings: Mapping[str, Any]) -> None:
        self._make = lambda: subject.make_controller(dict(settings))
        self._settings = settings
        self._controller = self._make()
        self._told: list[tuple[float, int]] = []
        self._saved: tuple[Any, int] | None = None
        self._twin: Any = None  # from the first load on

    def do(self, name: str, arguments: Sequence[Any]) -> None:
        """tell(coverage, answers), not_a_number(which), save(), load(), move(): save and load at once."""
        if name in ("save", "move"):
            self._saved = (self._controller.state_dict(), len(self._told))
        if name in ("load", "move"):
            self._load()
        elif name != "save":
            coverage, answers = arguments if name == "tell" else (float(arguments[0]), 7)
            self._tell(coverage, answers)

    def close(self) -> None:
        """Nothing is held."""

    def _load(self) -> None:
        if self._saved is None:
            return
        state, told = self._saved
        del self._told[told:]
        self._controller = self._make()
        self._controller.load_state_dict(state)
        self._twin = self._make()
        for coverage, answers in self._told:
            self._twin.observe(coverage, answers)
        self._compare()

    def _tell(self, coverage: float, answers: int) -> None:
        before = float(self._controller.lambda_rej)
        self._controller.observe(coverage, answers)
        self._told.append((coverage, answers))
        after = float(self._controller.lambda_rej)
        low, high = self._settings["lambda_min"], self._settings["lambda_max"]
        bounds = (min(low, high), high)
        if not bounds[0] <= after <= bounds[1]:
            raise BrokenLawError(f"the multiplier must stay in [{low}, {high}], got {after!r}")
        if self._twin is not None:
            self._twin.observe(coverage, answers)
            self._compare()
        if self._settings["update_frequency"] == 1:
            self._check_direction(coverage, before, after)

    def _check_direction(self, coverage: float, before: float, after: float) -> None:
        settings = self._settings
        if not math.isfinite(coverage):
            if after != before:
                raise BrokenLawError(f"coverage {coverage} must move nothing, {before!r} -> {after!r}")
            return
        if settings["momentum"] > 0:  # earlier gaps still move it, as they are asked to
            return
        gap = settings["target_coverage"] - coverage
        if abs(gap) <= NO_GAP:
            if abs(after - before) > settings["learning_rate"] * NO_GAP * 2:
                raise BrokenLawError(f"at its target it must stay, got {before!r} -> {after!r}")
            return
        said = f"with coverage {coverage!r} and target {settings['target_coverage']}"
        if (after - before) * gap < 0:
            raise BrokenLawError(f"{said} it must not move away, got {before!r} -> {after!r}")
        limit = settings["lambda_max"] if gap > 0 else min(settings["lambda_min"], settings["lambda_max"])
        due = len(self._told) > settings["warmup_steps"] and abs(gap) > DEAD_BAND[settings["rule"]] + NO_GAP
        # A step below half an ulp of the multiplier is lost to rounding.
        seen = 0.25 * settings["learning_rate"] * abs(gap) > math.ulp(before)
        if due and seen and before != limit and after == before:
            raise BrokenLawError(f"{said} it must move, and stays at {before!r}")

    def _compare(self) -> None:
        mine, right = float(self._controller.lambda_rej), float(self._twin.lambda_rej)
        if mine != right:
            raise BrokenLawError(
                f"saved and loaded it must go on as one that was not, got {mine!r} and not {right!r}"
            )


CONTROLLER = Machine(
    name="controller_history",
    group=23,
    law="A multiplier stays within its bounds, moves towards its target and rests at it, ignores a coverage "
    "that is not a number, and goes on from its state as if it had never stopped.",
    needs=("make_controller",),
    settings=controller_settings(),
    operations={
        "tell": (coverages(), st.sampled_from([1, 3, 32])),
        "not_a_number": (st.sampled_from(["nan", "inf", "-inf"]),),
        "save": (),
        "load": (),
        "move": (),
    },
    start=ControllerRun,
    often="tell",
    longest=20,
)


# --- a training that is saved, killed and gone on with --------------------------------------------------


class TrainingRun:
    """A training that is interrupted in every way, beside the states of one that never was."""

    def __init__(self, subject: Subject, settings: Mapping[str, Any]) -> None:
        kind = settings["kind"]
        if kind not in subject.trainings:
            raise DoesNotApplyError(f"the subject has no training {kind}")
        self._subject = subject
        self._kind = kind
        self._folder = tempfile.TemporaryDirectory(prefix="law-")
        self._path = Path(self._folder.name) / "checkpoint.pt"
        self._training = subject.make_training(kind)
        self._right: list[Mapping[str, Any]] = []  # by epochs done
        self._uninterrupted = subject.make_training(kind)
        self._done = 0
        self._saved: int | None = None  # epochs done when the checkpoint was written

    def do(self, name: str, arguments: Sequence[Any]) -> None:
        """epoch(), save(), load(), kill(), save_in_epoch(batch), kill_in_epoch(batch)."""
        if name == "epoch":
            self._epoch()
        elif name == "save":
            self._training.save(self._path)
            self._saved = self._done
        elif name == "load":
            self._load()
        elif name == "kill":
            self._kill()
        elif name == "save_in_epoch":
            self._save_in_epoch(arguments[0])
        else:
            self._kill_in_epoch(arguments[0])
        self._compare()

    def close(self) -> None:
        """Remove the checkpoint."""
        self._folder.cleanup()

    def _epoch(self) -> None:
        if self._done < self._subject.training_epochs:
            self._training.epoch()
            self._done += 1

    def _save_in_epoch(self, batch: int) -> None:
        if self._done >= self._subject.training_epochs:
            return
        # Of an epoch that was begun before, fewer batches may be left than were asked for.
        if self._training.epoch(save_at=batch, path=self._path) >= batch:
            self._saved = self._done
        self._done += 1

    def _kill_in_epoch(self, batch: int) -> None:
        if self._done < self._subject.training_epochs:
            with contextlib.suppress(self._subject.killed_error):
                self._training.epoch(kill_at=batch)
        self._kill()

    def _kill(self) -> None:
        self._training = self._subject.make_training(self._kind)
        self._done = 0

    def _load(self) -> None:
        if self._saved is not None:
            self._training.load(self._path)
            self._done = self._saved

    def _compare(self) -> None:
        state = self._training.state()
        if self._training.in_epoch:  # loaded from the middle of one: what it comes to is seen at its end
            return
        while len(self._right) <= self._done:
            if self._right:
                self._uninterrupted.epoch()
            self._right.append(self._uninterrupted.state())
        differs = first_difference(state, self._right[self._done])
        if differs is not None:
            raise BrokenLawError(f"after {self._done} epochs it must be as if never interrupted: {differs}")


def _batch() -> SearchStrategy[int]:
    return st.integers(1, 3)


TRAINER = Machine(
    name="training_history",
    group=26,
    law="However a training is interrupted, in an epoch or between two, what it comes to is bit for bit what "
    "it comes to uninterrupted.",
    needs=("make_training", "trainings", "training_epochs", "killed_error"),
    settings=st.fixed_dictionaries(
        {"kind": st.sampled_from(["adam", "accumulated", "controlled", "near_pole"])}
    ),
    operations={
        "epoch": (),
        "save": (),
        "load": (),
        "kill": (),
        "save_in_epoch": (_batch(),),
        "kill_in_epoch": (_batch(),),
    },
    start=TrainingRun,
    often="epoch",
    longest=10,
)


# --- the store of rows ----------------------------------------------------------------------------------

KEYS = 6


class StoreRun:
    """A folder of rows under writers that come and go, beside the rows that must be in it, or may be."""

    def __init__(self, subject: Subject, settings: Mapping[str, Any]) -> None:
        self._subject = subject
        self._folder = tempfile.TemporaryDirectory(prefix="law-")
        self._rows = Path(self._folder.name) / "rows"
        self._rows.mkdir()
        self._writer: Any = None
        self._name = ""
        self._sure: dict[str, float] = {}  # on the disk
        self._perhaps: dict[str, float] = {}  # taken, and not forced to the disk
        self._many = 0

    def do(self, name: str, arguments: Sequence[Any]) -> None:
        """open(writer), append(key, value), append_many(count), flush, close, kill, half_written."""
        if name == "open":
            self._open(arguments[0])
        elif name == "append":
            self._append(f"k{arguments[0]}", arguments[1])
        elif name == "append_many":
            self._append_many(arguments[0])
        elif name == "half_written":
            self._half_written(*arguments)
        elif name in ("flush", "close") and self._writer is not None:
            getattr(self._writer, name)()
            self._sure |= self._perhaps
            self._perhaps = {}
            if name == "close":
                self._writer = None
        elif name == "kill":
            self._writer = None  # dropped as it is, with whatever waits in it
        self._check()

    def close(self) -> None:
        """Remove the folder."""
        self._folder.cleanup()

    def _open(self, name: str) -> None:
        if self._writer is None:
            self._writer, self._name = self._subject.open_store(self._rows, name), name

    def _append(self, key: str, value: float) -> None:
        if self._writer is None:
            self._open("driver")
        held = key in self._sure or key in self._perhaps
        try:
            self._writer.append(key, value)
        except ValueError as error:
            if not held:
                raise BrokenLawError(f"a new key must be taken, {key} was refused: {error}") from None
            return
        if held:
            raise BrokenLawError(f"a key must be taken once, {key} was taken again")
        self._perhaps[key] = value

    def _append_many(self, count: int) -> None:
        if self._writer is None:
            self._open("driver")
        self._many += 1
        pairs = {f"many{self._many}.{index}": float(index) for index in range(count)}
        self._writer.append_all(pairs.items())
        self._sure |= self._perhaps | pairs
        self._perhaps = {}

    def _half_written(self, name: str, share: float) -> None:
        """What a writer that was killed in its flush leaves: a part of a file, beside its name."""
        if self._writer is not None and self._name == name:
            return  # its own file under way is not another's to write
        whole = sorted(self._rows.glob("*.parquet"))
        content = whole[-1].read_bytes() if whole else b"PAR1 and no more"
        half = self._rows / f"{name}-{len(whole):05d}.parquet.tmp"
        half.write_bytes(content[: int(len(content) * share)])

    def _check(self) -> None:
        found: dict[str, float] = {}
        for key, value in self._subject.read_store(self._rows):
            if key in found:
                raise BrokenLawError(f"a key must be stored once, {key} is there twice")
            found[key] = value
        lost = sorted(set(self._sure) - set(found))
        if lost:
            raise BrokenLawError(f"what was flushed must be read, {len(lost)} are lost, such as {lost[0]}")
        invented = sorted(set(found) - set(self._sure) - set(self._perhaps))
        if invented:
            raise BrokenLawError(f"no row may be read that was not taken, got {invented[0]}")
        for key, value in found.items():
            right = self._sure.get(key, self._perhaps.get(key))
            if first_difference(value, right) is not None:
                raise BrokenLawError(f"the value of {key} must be {right!r}, got {value!r}")
        # What is on the disk stays there; what is not, dies with its writer.
        self._sure = found
        self._perhaps = {
            key: value
            for key, value in self._perhaps.items()
            if self._writer is not None and key not in found
        }


STORE = Machine(
    name="store_history",
    group=28,
    law="Whatever is appended, flushed, killed, left half written and opened again: every flushed row is "
    "read once, with its value, no other is, and no key is taken twice.",
    needs=("open_store", "read_store"),
    settings=st.just({}),
    operations={
        "open": (st.sampled_from(["driver", "later"]),),
        "append": (
            st.integers(0, KEYS - 1),
            st.sampled_from([0.0, -0.0, 1.5, math.inf, math.nan, 5e-324]),
        ),
        "append_many": (st.sampled_from([2, 3, 499, 501]),),
        "flush": (),
        "close": (),
        "kill": (),
        "half_written": (st.sampled_from(["driver", "later"]), st.sampled_from([0.0, 0.5, 0.99])),
    },
    start=StoreRun,
    often="append",
    longest=12,
)

MACHINES: tuple[Machine, ...] = (CONTROLLER, TRAINER, STORE)
