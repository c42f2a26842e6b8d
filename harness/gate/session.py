"""One gate from suite to verdict: arms are set up, seeds trained look by look, and what came out is decided.

What is trained is kept in the folder of the gate, by arm and by everything that decides its rows: a gate that
was interrupted goes on where it was, and rows of other code, settings or libraries are never used again.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import random
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from harness.errors import UserError, one_line
from harness.gate.arm_rows import ArmRows, ArmStore, Key, arm_digest, row_place
from harness.gate.arms import (
    Arm,
    Worker,
    WorkerLostError,
    candidate_arm,
    commit_arm,
    data_file,
    find_commit,
    greet,
    python_arm,
    self_arm,
)
from harness.gate.baselines import (
    Manifest,
    Version,
    accepted_as,
    anchors,
    baselines_root,
    check_expiry,
    find_manifest,
    no_baseline,
    read_baseline,
)
from harness.gate.codes import EXIT_BASELINE, EXIT_INCOMPLETE, EXIT_USAGE
from harness.gate.comparison import Comparison, compare_arms
from harness.gate.decision import GateDecision, decide
from harness.gate.fingerprint import Fingerprint, machine_fingerprint, usable_cores
from harness.gate.pool import Answer, Job, Pool
from harness.gate.rules import GateRules
from harness.gate.suite import Suite, suite_values
from reports.fragments import RunReadError, write_json_atomically

SESSION_FILE = "session.json"
LOCK_FILE = ".lock"
SESSION_VERSION = 1
LAUNCH_TIMEOUT_S = 600.0
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class GateOptions:
    """What a gate is compared with, and where it writes.

    against: a commit. baseline_python: an interpreter. Neither: the stored baseline. any_baseline: the stored
    one where it fits, else the commit where it is there, else the candidate itself. record: train every seed
    of the candidate, and compare with nothing. wait: for another gate in the same folder, and do not refuse.
    """

    out: Path
    against: str | None = None
    baseline_python: Path | None = None
    any_baseline: bool = False
    baselines: Path | None = None
    record: bool = False
    wait: bool = False
    today: Callable[[], Any] = lambda: datetime.now(UTC).date()


@dataclass(frozen=True, slots=True, kw_only=True)
class Anchor:
    """One baseline that the candidate was compared with, and the decision."""

    name: str
    label: str
    decision: GateDecision
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class GateResult:
    """What came of a gate: a decision for each anchor (none where the candidate was only recorded)."""

    suite: Suite
    anchors: tuple[Anchor, ...]
    notes: tuple[str, ...]
    candidate: str
    candidate_folder: Path
    fingerprint: Fingerprint
    accepted: Version | None
    candidate_is_whole: bool
    trained: int
    reused: int


def run_gate(suite: Suite, options: GateOptions, say: Say) -> GateResult:
    """Train what is missing, look by look, and decide; a `UserError` where there is nothing to decide on."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(gate_folder(options.out, wait=options.wait))
        candidate = candidate_arm(suite)
        told = greet(candidate)
        here = machine_fingerprint(told)
        root = options.baselines if options.baselines is not None else baselines_root(suite.path)
        chosen = choose_baseline(suite, options, root, here, stack)
        arms = [candidate]
        hellos: dict[str, Mapping[str, Any]] = {"candidate": told}
        if chosen.arm is not None:
            try:
                hellos["baseline"] = greet_baseline(chosen.arm, candidate, told)
            except UserError as error:
                if not options.any_baseline:
                    raise
                chosen = with_itself(suite, str(error))
                hellos["baseline"] = told
            assert chosen.arm is not None
            arms.append(chosen.arm)
        stores = {}
        for arm in arms:
            stores[arm.name] = open_store(options.out, arm, hellos[arm.name], here)
            stack.callback(stores[arm.name].close)
        write_session(options.out, suite, stores, hellos)
        work = Work(suite, arms, stores, hellos, say)
        stack.enter_context(work.pool)
        work.check_kept()
        accepted = None
        if chosen.arm is not None:  # a stored baseline is itself what was accepted last
            subject = stores["candidate"].taken.origin["subject"]
            accepted = accepted_as(root, suite.name, subject, options.today())
        decided: tuple[Anchor, ...] = ()
        notes = list(chosen.notes)
        if options.record:
            work.train(suite.seeds)
            work.time(suite.seeds)
            check_recorded(suite, stores["candidate"].taken)
        else:
            try:
                decided = take_looks(suite, chosen, work, say)
            except UserError as error:
                if error.exit_code != EXIT_BASELINE or accepted is None:
                    raise
                notes += error.lines
        return GateResult(
            suite=suite,
            anchors=decided,
            notes=tuple(notes),
            candidate=told_arm(stores["candidate"].taken),
            candidate_folder=stores["candidate"].folder,
            fingerprint=here,
            accepted=accepted,
            candidate_is_whole=not any_missing(suite, stores["candidate"].taken, suite.rules.looks[0]),
            trained=work.trained,
            reused=work.reused,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ChosenBaseline:
    """What the candidate is compared with: an arm that trains beside it, or versions that are stored."""

    arm: Arm | None = None
    stored: tuple[tuple[str, ArmRows], ...] = ()
    nan_allowance: int | None = None
    notes: tuple[str, ...] = ()


def choose_baseline(
    suite: Suite,
    options: GateOptions,
    root: Path,
    here: Fingerprint,
    stack: contextlib.ExitStack,
) -> ChosenBaseline:
    """What to compare with; a `UserError` with the code for baselines where it is not there."""
    if options.record:
        return ChosenBaseline()
    if options.baseline_python is not None:
        return ChosenBaseline(arm=python_arm(suite, options.baseline_python))
    manifest = (
        find_manifest(root, suite.name, here) if options.against is None or options.any_baseline else None
    )
    if manifest is not None:
        return stored_baseline(manifest, options)
    if options.against is None and not options.any_baseline:
        raise no_baseline(root, suite.name, suite.path, here)
    missing = f"no stored baseline fits this machine ({here.identity})"
    if options.against is None:
        return with_itself(suite, missing)
    if not options.any_baseline:
        return ChosenBaseline(arm=stack.enter_context(commit_arm(suite, options.against)))
    if find_commit(suite.path, options.against) is None:
        return with_itself(suite, f"{missing}, and commit {options.against} is not here")
    try:
        arm = stack.enter_context(commit_arm(suite, options.against))
    except UserError as error:
        return with_itself(suite, str(error))
    return ChosenBaseline(arm=arm, notes=(f"{missing}: compared with a commit",))


def with_itself(suite: Suite, why: str) -> ChosenBaseline:
    """The candidate as its own baseline, and a note that this says nothing about a change."""
    note = f"{why}: this code was compared with itself, which proves the machinery and nothing about a change"
    return ChosenBaseline(arm=self_arm(suite), notes=(note,))


def greet_baseline(arm: Arm, candidate: Arm, told: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the baseline's arm says about itself; a `UserError` where it does not compare."""
    if (arm.path, arm.python) == (candidate.path, candidate.python):
        return told  # it would say the same
    said = greet(arm)
    check_same_versions(told, said)
    return said


def stored_baseline(manifest: Manifest, options: GateOptions) -> ChosenBaseline:
    """The anchors of a manifest, read and checked."""
    found = anchors(manifest)
    check_expiry(found[0][1], options.today())
    stored = tuple((name, read_baseline(manifest, version)) for name, version in found)
    return ChosenBaseline(stored=stored, nan_allowance=manifest.nan_allowance)


def check_same_versions(candidate: Mapping[str, Any], baseline: Mapping[str, Any]) -> None:
    """Refuse arms whose libraries or device differ: the code would not be what is compared."""
    differing = [
        f"{name} {baseline[name]} in the baseline, {candidate[name]} in the candidate"
        for name in ("torch", "device", "capability")
        if baseline[name] != candidate[name]
    ]
    minor = [".".join(told["python"].split(".")[:2]) for told in (baseline, candidate)]
    if minor[0] != minor[1]:
        differing.append(f"Python {minor[0]} in the baseline, {minor[1]} in the candidate")
    if differing:
        raise UserError(
            f"the arms do not compare: {'; '.join(differing)}; install the same versions for both",
            EXIT_BASELINE,
        )


def take_looks(suite: Suite, chosen: ChosenBaseline, work: Work, say: Say) -> tuple[Anchor, ...]:
    """Train the seeds of one look after another until the verdict is not open any more."""
    rules = suite.rules
    if chosen.nan_allowance is not None and chosen.nan_allowance < rules.nan_allowance:
        say(f"nan_allowance is {chosen.nan_allowance}, as accepted last: it may only fall")
        rules = replace(rules, nan_allowance=chosen.nan_allowance)
    if len(chosen.stored) > 1:
        # Two comparisons may each raise a false alarm; together they are to do so no more often than one.
        rules = replace(rules, alpha=rules.alpha / len(chosen.stored))
    most = max_look(suite, chosen)
    for look in rules.looks:
        seeds = suite.seeds[:look]
        say(
            f"look {rules.looks.index(look) + 1} of {len(rules.looks)}: {look} seeds of "
            f"{len(suite.scenarios)} scenarios"
        )
        work.train(seeds)
        if suite.times_steps:
            work.time(seeds)
        decided = decide_anchors(suite, chosen, work, rules, look)
        is_open = worst_verdict(decided) == "INCONCLUSIVE" and not any(
            one.decision.missing for one in decided
        )
        if not is_open or look >= most:
            break
    return decided


def max_look(suite: Suite, chosen: ChosenBaseline) -> int:
    """The last look for which the stored baselines have seeds; all looks where both arms train."""
    looks = suite.rules.looks
    if not chosen.stored:
        return looks[-1]
    previous = chosen.stored[0][1]
    had = [
        look
        for look in looks
        if all((one.name, seed) in previous.rows for one in suite.scenarios for seed in suite.seeds[:look])
    ]
    return had[-1] if had else looks[0]


def decide_anchors(
    suite: Suite, chosen: ChosenBaseline, work: Work, rules: GateRules, look: int
) -> tuple[Anchor, ...]:
    """The decision against each anchor."""
    candidate = work.stores["candidate"].taken
    if chosen.arm is not None:
        compared = [("baseline", work.stores["baseline"].taken)]
    else:
        compared = list(chosen.stored)
    decided = []
    for name, base in compared:
        scenarios = [one.name for one in suite.scenarios]
        notes: list[str] = []
        if name == "release":
            scenarios, notes = comparable_scenarios(suite, base)
            if not scenarios:
                continue
        found = compare_arms(base, candidate, rules, scenarios=scenarios, seeds=suite.seeds[:look])
        decided.append(make_anchor(name, told_arm(base), found, rules, look, notes))
    return tuple(decided)


def comparable_scenarios(suite: Suite, release: ArmRows) -> tuple[list[str], list[str]]:
    """The scenarios that a release was asked in the same words, and a note on the others."""
    asked = release.origin.get("config", {})
    same = [one.name for one in suite.scenarios if asked.get(one.name) == one.question]
    other = [one.name for one in suite.scenarios if one.name not in same]
    if not other:
        return same, []
    return same, [f"not compared with the last release, which has no such scenario: {', '.join(other)}"]


def make_anchor(
    name: str, label: str, found: Comparison, rules: GateRules, look: int, notes: Sequence[str] = ()
) -> Anchor:
    """The decision on a comparison, with its notes."""
    decision = decide(found.pairs, found.nans, rules, look=look)
    return Anchor(name=name, label=label, decision=decision, notes=(*found.notes, *notes))


def worst_verdict(decided: Sequence[Anchor]) -> str:
    """FAIL before INCONCLUSIVE before PASS."""
    verdicts = {one.decision.verdict for one in decided}
    return next((verdict for verdict in ("FAIL", "INCONCLUSIVE") if verdict in verdicts), "PASS")


def check_recorded(suite: Suite, taken: ArmRows) -> None:
    """Refuse a recording in which a row is missing or failed."""
    lines = any_missing(suite, taken, suite.rules.looks[-1])
    if lines:
        raise UserError(f"trials are missing or failed: {lines[0]}", EXIT_INCOMPLETE, lines[1:10])


def any_missing(suite: Suite, taken: ArmRows, look: int) -> list[str]:
    """The scenarios and seeds of a look that have no good row, a line for each reason."""
    found: dict[tuple[str, str], list[int]] = {}
    for one in suite.scenarios:
        for seed in suite.seeds[:look]:
            row = taken.rows.get((one.name, seed))
            if row is None or row.get("status") == "failed":
                reason = "no row" if row is None else one_line(row.get("error") or "failed")
                found.setdefault((one.name, reason), []).append(seed)
    return [
        f"scenario {name!r}, seed {', '.join(map(str, seeds))}: {reason}"
        for (name, reason), seeds in found.items()
    ]


class Work:
    """The trainings and launches of a gate's arms, and where they are kept."""

    def __init__(
        self,
        suite: Suite,
        arms: Sequence[Arm],
        stores: Mapping[str, ArmStore],
        hellos: Mapping[str, Mapping[str, Any]],
        say: Say,
    ) -> None:
        self.suite = suite
        self.arms = arms
        self.stores = stores
        self.trained = 0
        self.reused = sum(len(store.taken.rows) for store in stores.values())
        cores = (
            len(arms) if suite.device != "cpu" else usable_cores()
        )  # a GPU trains one at a time, in each arm
        self.pool = Pool(arms, cores=cores, timeout_s=suite.timeout_s)
        self._say = say
        self._places = {
            name: row_place(told, stores[name].taken.origin, suite.device) for name, told in hellos.items()
        }
        self._sitting = uuid.uuid4().hex[:8]

    def check_kept(self) -> None:
        """Refuse to go on with rows that were measured on other data than there are now."""
        kept = {
            (arm.name, key): row["data_digest"]
            for arm in self.arms
            for key, row in self.stores[arm.name].taken.rows.items()
            if row.get("data_digest") is not None
        }
        if not kept:
            return
        self._say(f"{len(kept)} rows were there already")
        jobs = [Job(name, key, {**self._request(name, key), "ask": "digest"}) for name, key in kept]
        changed: list[str] = []

        def compare(answer: Answer) -> None:
            job, found = answer.job, (answer.told or {}).get("data_digest")
            if found is not None and found != kept[job.arm, job.key]:
                changed.append(f"scenario {job.key[0]!r}, seed {job.key[1]}")

        self.pool.run(jobs, compare)
        if changed:
            raise UserError(
                f"the data have changed since rows of {changed[0]} were trained; name another --out",
                EXIT_INCOMPLETE,
            )

    def train(self, seeds: Sequence[int]) -> None:
        """Train every scenario with every one of these seeds in every arm, as far as it is not there."""
        jobs = []
        for seed in seeds:
            for scenario in self.suite.scenarios:
                for arm in self.arms:
                    key = (scenario.name, seed)
                    if key not in self.stores[arm.name].taken.rows:
                        request = {**self._request(arm.name, key), "ask": "train"}
                        jobs.append(Job(arm.name, key, request))
        if not jobs:
            return
        counter = Counter(f"training {len(jobs)} trials", len(jobs), self._say)

        def take(answer: Answer) -> None:
            name, key = answer.job.arm, answer.job.key
            counter.step()
            if answer.told is None:
                self._say(f"{name}: trial of {key[0]!r} with seed {key[1]} was lost: {one_line(answer.lost)}")
                return
            told = answer.told
            if "error" in told:
                told = {"outcome": {"status": "failed", "error": told["error"]}}
            arm = next(arm for arm in self.arms if arm.name == name)
            scenario = next(one for one in arm.suite.scenarios if one.name == key[0])
            asked = next(one for one in self.suite.scenarios if one.name == key[0])
            # The question is that of the suite, wherever an arm finds its files.
            self.stores[name].add(replace(scenario, params=asked.params), key[1], told, self._places[name])
            self.trained += 1

        self.pool.run(jobs, take)
        counter.close()

    def time(self, seeds: Sequence[int]) -> None:
        """Launch what times steps: the arms back to back for each seed, by lot which first.

        A launch times each scenario once, in an order that is the same for both arms.
        """
        if not self.suite.times_steps:
            return
        wanted = [
            (seed, keys) for seed in seeds for keys in [self._untimed(seed)] for _ in range(self._short(keys))
        ]
        if not wanted:
            return
        lot = random.Random(f"{self.suite.name} {len(seeds)}")
        lot.shuffle(wanted)
        counter = Counter(f"timing {len(wanted)} launches of each arm", len(wanted), self._say)
        for number, (_, keys) in enumerate(wanted):
            keys = lot.sample(keys, len(keys))
            made = []
            for place, arm in enumerate(lot.sample(self.arms, len(self.arms))):
                at = datetime.now(UTC)
                made.append((arm.name, place, at, self._launch(arm, keys)))
            counter.step()
            pair = f"{self._sitting}-{len(seeds)}-{number}"
            for key in keys:
                if all(key in times for _, _, _, times in made):
                    for name, place, at, times in made:
                        self.stores[name].add_launch(*key, pair, place, times[key], at)
        counter.close()

    def _untimed(self, seed: int) -> list[Key]:
        """The scenarios that have a row with a seed in every arm, and not all their launches."""
        keys = [(scenario.name, seed) for scenario in self.suite.scenarios]
        return [
            key
            for key in keys
            if all(key in store.taken.rows for store in self.stores.values()) and self._short([key])
        ]

    def _short(self, keys: Sequence[Key]) -> int:
        """How many launches the one of these that has fewest lacks; 0 for none."""
        taken = [store.taken.launches for store in self.stores.values()]
        had = [len(set.intersection(*(set(found.get(key, {})) for found in taken))) for key in keys]
        return max((self.suite.launches - number for number in had), default=0)

    def _launch(self, arm: Arm, keys: Sequence[Key]) -> dict[Key, float]:
        """The median steps of some scenarios in one process; what failed is said, and not among them."""
        times: dict[Key, float] = {}
        try:
            with Worker(arm) as worker:
                for key in keys:
                    request = {**self._request(arm.name, key), "ask": "time", "steps": self.suite.steps}
                    told = worker.ask(request, LAUNCH_TIMEOUT_S)
                    if "error" in told:
                        self._say(f"{arm.name}: launch of {key[0]!r} with seed {key[1]}: {told['error']}")
                    else:
                        times[key] = float(told["step_time_ms"])
        except WorkerLostError as error:
            self._say(f"{arm.name}: a launch was lost: {one_line(error)}")
        return times

    def _request(self, name: str, key: Key) -> dict[str, Any]:
        arm = next(arm for arm in self.arms if arm.name == name)
        scenario = next(one for one in arm.suite.scenarios if one.name == key[0])
        return {"spec": scenario.spec, "config": scenario.config, "seed": key[1], "device": self.suite.device}


class Counter:
    """Says how far a long piece of work is: on a terminal as it goes on, elsewhere when it is done."""

    def __init__(self, what: str, total: int, say: Say) -> None:
        self._what, self._total, self._say = what, total, say
        self._done = 0
        self._started_s = time.monotonic()
        self._shown_s = self._started_s

    def step(self) -> None:
        """One more is done."""
        self._done += 1
        now = time.monotonic()
        if sys.stderr.isatty() and now - self._shown_s > 5.0 and self._done < self._total:
            self._shown_s = now
            self._say(f"{self._what}: {self._done} done")

    def close(self) -> None:
        """All are done."""
        self._say(f"{self._what}: {time.monotonic() - self._started_s:.1f} s")


def open_store(out: Path, arm: Arm, told: Mapping[str, Any], here: Fingerprint) -> ArmStore:
    """The folder of an arm: named by all that decides its rows, so that no others are ever taken for them."""
    asked = arm_digest(suite_values(arm.suite))
    provenance = told.get("provenance", {})
    # What is accepted, on whatever machine: this code with these settings on these data.
    subject = {
        "suite": asked,
        "code": told["code"],
        "files": sorted(
            (one.name, hashlib.sha256(path.read_bytes()).hexdigest())
            for one in arm.suite.scenarios
            if (path := data_file(one)) is not None
        ),
    }
    decides = {
        **subject,
        "python": told["python"],
        "torch": told["torch"],
        "numpy": provenance.get("numpy_version"),
        "fingerprint": here.to_plain(),
    }
    digest = arm_digest(decides)
    origin = {
        "schema_version": SESSION_VERSION,
        "arm": arm.name,
        "label": arm.label,
        "suite": arm.suite.name,
        "digest": digest,
        "question": asked,
        "questions": {one.name: one.question for one in arm.suite.scenarios},
        "code": told["code"],
        "subject": arm_digest(subject),
        "commit": arm.commit or provenance.get("commit"),
        "commit_dirty": False if arm.commit else provenance.get("commit_dirty"),
        "packages": {
            **{name: value for name, value in provenance.items() if name.endswith("_version")},
            "torch_version": told["torch"],
            "python_version": told["python"],
        },
        "threads": told["threads"],
        "fingerprint": here.to_plain(),
    }
    try:
        return ArmStore(out / f"{arm.name}-{digest}", origin)
    except (OSError, RunReadError) as error:
        raise UserError(f"{out / f'{arm.name}-{digest}'}: {one_line(error)}", EXIT_INCOMPLETE) from None


def told_arm(rows: ArmRows) -> str:
    """An arm in a few words: what it is, and the commit of its code."""
    label = str(rows.origin.get("label") or rows.source)
    commit = rows.origin.get("commit")
    if not commit or commit[:10] in label:
        return label
    return f"{label} at {commit[:10]}{' with changes' if rows.origin.get('commit_dirty') else ''}"


def write_session(
    out: Path, suite: Suite, stores: Mapping[str, ArmStore], hellos: Mapping[str, Mapping[str, Any]]
) -> None:
    """Say in the gate's folder which suite it is of and which folders are its arms."""
    values = {
        "schema_version": SESSION_VERSION,
        "suite": suite.name,
        "suite_path": str(suite.path.resolve()),
        "arms": {name: store.folder.name for name, store in stores.items()},
    }
    write_json_atomically(values, out / SESSION_FILE)


def read_session(out: Path) -> dict[str, Any]:
    """What `write_session` wrote; a `UserError` where the folder is not a gate's."""
    path = out / SESSION_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values["arms"]["candidate"], str):
            raise TypeError("arms.candidate must be text")
        return dict(values)
    except OSError:
        raise UserError(
            f"{out} is not the folder of a gate: it holds no {SESSION_FILE}", EXIT_USAGE
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read: {one_line(error)}", EXIT_USAGE) from None


@contextlib.contextmanager
def gate_folder(out: Path, *, wait: bool) -> Iterator[None]:
    """Hold the folder of a gate for the time of a `with` block, making it where it is not there."""
    is_gate = (out / SESSION_FILE).is_file() or (out / LOCK_FILE).is_file()
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file", EXIT_USAGE)
    if out.is_dir() and not is_gate and any(out.iterdir()):
        raise UserError(f"--out {out} is not empty and not the folder of a gate: name another", EXIT_USAGE)
    try:
        out.mkdir(parents=True, exist_ok=True)
        handle = open(out / LOCK_FILE, "w", encoding="utf-8")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror or error}", EXIT_USAGE) from None
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise UserError(f"{out} is being written by another gate", EXIT_INCOMPLETE) from None
        handle.write(f"{os.getpid()}\n")
        handle.flush()
        yield
