"""One gate from suite to verdict: arms are set up, seeds trained look by look, and what came out is decided.

What is trained is kept in the folder of the gate, by arm and by everything that decides its rows: a gate that
was interrupted goes on where it was, and rows of other code, settings or libraries are never used again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from harness.errors import UserError, one_line
from harness.gate.arm_rows import ArmRows
from harness.gate.arms import (
    Arm,
    candidate_arm,
    commit_arm,
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
from harness.gate.codes import EXIT_BASELINE, EXIT_INCOMPLETE
from harness.gate.comparison import Comparison, compare_arms
from harness.gate.decision import GateDecision, decide
from harness.gate.fingerprint import Fingerprint, machine_fingerprint
from harness.gate.kept import gate_folder, open_store, write_session
from harness.gate.rules import GateRules
from harness.gate.suite import Suite
from harness.gate.work import Say, Work


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
            notes=(*notes, *work.lost),
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
        return stored_baseline(suite, manifest, options)
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


def stored_baseline(suite: Suite, manifest: Manifest, options: GateOptions) -> ChosenBaseline:
    """The anchors of a manifest, read and checked: the previous one must reach to the suite's first look."""
    found = anchors(manifest)
    version = found[0][1]
    check_expiry(version, options.today())
    stored = tuple((name, read_baseline(manifest, version)) for name, version in found)
    first = suite.seeds[: suite.rules.looks[0]]
    for one in suite.scenarios:
        lacking = [seed for seed in first if (one.name, seed) not in stored[0][1].rows]
        if lacking:
            raise UserError(
                f"baseline {version.name} lacks scenario {one.name!r} with seed "
                f"{', '.join(map(str, lacking))}: the suite has grown, record and accept a new one",
                EXIT_BASELINE,
            )
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
        seeds = list(suite.seeds[:look])
        notes: list[str] = []
        if name == "release":
            scenarios, notes = comparable_scenarios(suite, base)
            # What the release was not asked for is no gap: it stays as it was when it was released.
            seeds = [seed for seed in seeds if all((one, seed) in base.rows for one in scenarios)]
            if not scenarios or not seeds:
                continue
        found = compare_arms(base, candidate, rules, scenarios=scenarios, seeds=seeds)
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


def told_arm(rows: ArmRows) -> str:
    """An arm in a few words: what it is, and the commit of its code."""
    label = str(rows.origin.get("label") or rows.source)
    commit = rows.origin.get("commit")
    if not commit or commit[:10] in label:
        return label
    return f"{label} at {commit[:10]}{' with changes' if rows.origin.get('commit_dirty') else ''}"
