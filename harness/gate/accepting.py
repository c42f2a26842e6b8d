"""Accepting a candidate: its rows become the next version of the stored baseline, if they are whole."""

from __future__ import annotations

from datetime import date
from pathlib import Path

from harness.errors import UserError, one_line
from harness.gate.arm_rows import ArmRows, read_arm_folder
from harness.gate.baselines import (
    MANIFEST_FILE,
    Version,
    baselines_root,
    read_manifest,
    who_approves,
    write_baseline,
)
from harness.gate.codes import EXIT_BASELINE, EXIT_INCOMPLETE, EXIT_REGRESSION, EXIT_USAGE
from harness.gate.fingerprint import parse_fingerprint
from harness.gate.kept import read_session
from harness.gate.suite import Suite
from reports.fragments import RunReadError


def accept(
    suite: Suite,
    out: Path,
    *,
    root: Path | None,
    reason: str,
    expires: date | None,
    release: bool,
    approver: str | None,
    today: date,
) -> Version:
    """Write the candidate of the gate in `out` as the next version; a `UserError` where it may not be one.

    The allowance for non-finite values falls to what the candidate met, and never rises.
    """
    if expires is not None and expires < today:
        raise UserError(f"--expires must be today or later, got {expires.isoformat()}", EXIT_USAGE)
    if release and expires is not None:
        raise UserError("--release holds until the next one: it goes without --expires", EXIT_USAGE)
    taken = read_candidate(suite, out)
    seeds = whole_seeds(suite, taken, out)
    values = sum(int(row.get("nan_count") or 0) for (_, seed), row in taken.rows.items() if seed in seeds)
    root = root if root is not None else baselines_root(suite.path)
    allowed = suite.rules.nan_allowance
    before = root / suite.name / parse_fingerprint(taken.origin["fingerprint"]).identity
    if (before / MANIFEST_FILE).is_file():
        last = read_manifest(before).nan_allowance
        allowed = allowed if last is None else min(allowed, last)
    if values > allowed:
        raise UserError(
            f"the candidate met {values} non-finite values and {allowed} are allowed; the allowance may only "
            "fall",
            EXIT_REGRESSION,
        )
    try:
        return write_baseline(
            root,
            taken,
            sorted(seeds),
            nan_allowance=min(allowed, values),
            reason=reason,
            expires=expires,
            release=release,
            approver=one_line(approver) if approver else who_approves(suite.path.resolve().parent),
        )
    except OSError as error:
        raise UserError(f"{root} cannot be written: {error.strerror or error}", EXIT_BASELINE) from None


def read_candidate(suite: Suite, out: Path) -> ArmRows:
    """The rows of the candidate that the gate in `out` trained last, which must be of this suite."""
    session = read_session(out)
    if session.get("suite") != suite.name:
        raise UserError(
            f"{out} is the gate of suite {session.get('suite')!r}, not of {suite.name!r}", EXIT_USAGE
        )
    try:
        taken = read_arm_folder(out / session["arms"]["candidate"])
    except RunReadError as error:
        raise UserError(one_line(error), EXIT_INCOMPLETE) from None
    asked = taken.origin.get("questions", {})
    for one in suite.scenarios:
        if asked.get(one.name) != one.question:
            raise UserError(
                f"scenario {one.name!r} has changed since {out} was trained; run the gate again",
                EXIT_INCOMPLETE,
            )
    return taken


def whole_seeds(suite: Suite, taken: ArmRows, out: Path) -> set[int]:
    """The seeds that every scenario has a good row of; a `UserError` where they are too few, naming a gap."""
    gaps: dict[tuple[str, str], list[int]] = {}
    for seed in suite.seeds[: suite.rules.looks[0]]:
        for one in suite.scenarios:
            if gap := what_is_missing(suite, taken, one.name, seed):
                gaps.setdefault((one.name, gap), []).append(seed)
    if gaps:
        lines = [
            f"scenario {name!r}, seed {', '.join(map(str, seeds))}: {gap}"
            for (name, gap), seeds in gaps.items()
        ]
        raise UserError(f"{out} is not whole: {lines[0]}", EXIT_INCOMPLETE, lines[1:10])
    return {
        seed
        for seed in suite.seeds
        if not any(what_is_missing(suite, taken, one.name, seed) for one in suite.scenarios)
    }


def what_is_missing(suite: Suite, taken: ArmRows, scenario: str, seed: int) -> str:
    """Why a scenario and seed cannot be part of a baseline; empty where they can."""
    row = taken.rows.get((scenario, seed))
    if row is None:
        return "no row"
    if row.get("status") == "failed":
        return f"its trial failed: {one_line(row.get('error') or 'no message')}"
    if suite.times_steps and (scenario, seed) not in taken.launches:
        return "no launch that times its steps"
    return ""
