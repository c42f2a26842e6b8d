"""Rows that are there already, read from what holds them: a gate, one of its arms, a sweep, a baseline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from harness.errors import UserError, one_line
from harness.gate.arm_rows import ARM_FILE, ArmRows, keyed_rows, read_arm_folder, stored_launches
from harness.gate.baselines import MANIFEST_FILE, read_baseline, read_manifest
from harness.gate.codes import EXIT_BASELINE, EXIT_INCOMPLETE
from harness.gate.fingerprint import fingerprint_differences, parse_fingerprint
from harness.gate.kept import SESSION_FILE, read_session
from reports.fragments import RunReadError, read_fragment
from reports.rows import ROWS_FOLDER, read_rows


def read_side(path: Path, *, name: str) -> ArmRows:
    """The rows of `--baseline` or `--candidate`; a `UserError` where there are none to be read."""
    code = EXIT_BASELINE if name == "baseline" else EXIT_INCOMPLETE
    try:
        found = read_any(path)
    except (OSError, RunReadError) as error:
        raise UserError(f"--{name}: {one_line(error)}", code) from None
    if not found.rows:
        raise UserError(f"--{name} {path} holds no rows", code)
    return found


def read_any(path: Path) -> ArmRows:
    """The rows that a file or folder holds, by what is in it; `RunReadError` where it holds none."""
    if path.is_file():
        return read_version_file(path)
    if not path.exists():
        raise RunReadError(f"{path} does not exist")
    if (path / SESSION_FILE).is_file():
        return read_arm_folder(path / str(read_session(path)["arms"]["candidate"]))
    if (path / ARM_FILE).is_file():
        return read_arm_folder(path)
    if (path / MANIFEST_FILE).is_file():
        manifest = read_manifest(path)
        if not manifest.versions:
            raise RunReadError(f"{path / MANIFEST_FILE} names no version")
        return read_baseline(manifest, manifest.versions[-1])
    if (path / ROWS_FOLDER).is_dir():
        return ArmRows(str(path), keyed_rows(read_rows(path), str(path)))
    raise RunReadError(f"{path} is neither a gate's folder, nor a baseline's, nor a run")


def read_version_file(path: Path) -> ArmRows:
    """The rows of a Parquet file, with what the manifest beside it says of it."""
    if (path.parent / MANIFEST_FILE).is_file():
        manifest = read_manifest(path.parent)
        for version in manifest.versions:
            if version.path.name == path.name:
                return read_baseline(manifest, version)
    rows = keyed_rows(read_fragment(path, kind="rows"), str(path))
    return ArmRows(str(path), rows, stored_launches(rows))


def check_same_machine(base: ArmRows, candidate: ArmRows) -> None:
    """Refuse rows of different fingerprints, naming what differs."""
    there, here = base.origin.get("fingerprint"), candidate.origin.get("fingerprint")
    if there is None or here is None:
        return
    try:
        differences = fingerprint_differences(parse_fingerprint(there), parse_fingerprint(here))
    except ValueError as error:
        raise UserError(one_line(error), EXIT_BASELINE) from None
    if differences:
        raise UserError(
            f"baseline {base.source} was measured on another machine: {'; '.join(differences)}",
            EXIT_BASELINE,
            ["train both on one: scm-harness gate run --suite SUITE --against REF"],
        )


def planned_seeds(
    base: ArmRows, candidate: ArmRows, scenarios: Sequence[str], looks: Sequence[int]
) -> list[int]:
    """The seeds that rows without a suite are to have: those of the last look that the candidate has reached.

    Both sides' seeds count, so that one which a scenario lacks is missing, and not unasked for.
    """
    seeds = sorted({seed for arm in (base, candidate) for _, seed in arm.rows})
    return seeds[: reached_look(candidate, scenarios, looks)]


def reached_look(candidate: ArmRows, scenarios: Sequence[str], looks: Sequence[int]) -> int:
    """The last look for which some scenario of the candidate has seeds enough; its seeds where none has."""
    most = max((len(candidate.seeds(name)) for name in scenarios), default=0)
    return max((look for look in looks if look <= most), default=max(most, 1))
