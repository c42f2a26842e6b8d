"""Stored baselines: one small Parquet file for each accepted version, and a manifest that says who and why.

    BASELINES/<suite>/<fingerprint>/v0007.parquet
    BASELINES/<suite>/<fingerprint>/manifest.json

They are made to be committed. A version is never changed; the next is written beside it.
"""

from __future__ import annotations

import getpass
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

from harness.errors import UserError, one_line
from harness.gate.arm_rows import ArmRows, keyed_rows, merged_table, stored_launches
from harness.gate.codes import EXIT_BASELINE
from harness.gate.fingerprint import Fingerprint, fingerprint_differences, parse_fingerprint
from reports.fragments import RunReadError, read_fragment, write_json_atomically, write_table_atomically
from reports.provenance import ask_git

MANIFEST_FILE = "manifest.json"
MANIFEST_VERSION = 1
FOLDER = "baselines"
PACKAGES = ("scm_harness_version", "torch_version", "ray_version", "numpy_version", "python_version")


@dataclass(frozen=True, slots=True)
class Version:
    """One accepted version: what the manifest says of it, and where its rows are."""

    said: Mapping[str, Any]
    path: Path

    @property
    def name(self) -> str:
        """As in v0007."""
        return f"v{self.said['version']:04d}"


@dataclass(frozen=True, slots=True)
class Manifest:
    """The versions of a suite on one kind of machine, the oldest first."""

    folder: Path
    suite: str
    fingerprint: Fingerprint
    versions: tuple[Version, ...]

    @property
    def nan_allowance(self) -> int | None:
        """What the last version allows; None where there is none."""
        return int(self.versions[-1].said["nan_allowance"]) if self.versions else None


def baselines_root(suite_path: Path) -> Path:
    """Where a suite's baselines lie unless said otherwise: beside it."""
    return suite_path.parent / FOLDER


def read_manifest(folder: Path) -> Manifest:
    """The manifest in a folder; a `UserError` with the code for baselines where it is missing or damaged."""
    path = folder / MANIFEST_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["schema_version"] != MANIFEST_VERSION:
            raise ValueError(
                f"schema_version must be {MANIFEST_VERSION} here, got {values['schema_version']!r}"
            )
        fingerprint = parse_fingerprint(values["fingerprint"])
        versions = tuple(read_version(folder, said) for said in values["versions"])
        return Manifest(folder, str(values["suite"]), fingerprint, versions)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}", EXIT_BASELINE) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is no manifest of baselines: {type(error).__name__}: {one_line(error)}", EXIT_BASELINE
        ) from None


def read_version(folder: Path, said: Mapping[str, Any]) -> Version:
    """One entry of a manifest, checked; ValueError names what is wrong with it."""
    texts, numbers = ("file", "sha256", "code", "subject", "reason"), ("version", "nan_allowance")
    for name in (*texts, *numbers):
        kind = str if name in texts else int
        if not isinstance(said[name], kind) or isinstance(said[name], bool):
            raise ValueError(f"{name} of a version must be {kind.__name__}, got {said[name]!r}")
    if Path(said["file"]).name != said["file"]:
        raise ValueError(f"file of a version must be a name in its folder, got {said['file']!r}")
    if said.get("expires") is not None:
        date.fromisoformat(said["expires"])
    return Version(said, folder / said["file"])


def suite_manifests(root: Path, suite: str) -> list[Manifest]:
    """The manifests of a suite, for whatever machine."""
    return [read_manifest(path.parent) for path in sorted((root / suite).glob(f"*/{MANIFEST_FILE}"))]


def find_manifest(root: Path, suite: str, here: Fingerprint) -> Manifest | None:
    """The manifest of a suite for this kind of machine, None where there is none."""
    folder = root / suite / here.identity
    if not (folder / MANIFEST_FILE).is_file():
        return None
    manifest = read_manifest(folder)
    differences = fingerprint_differences(manifest.fingerprint, here)
    if differences:  # a folder that was renamed, or a hash that collides
        raise UserError(f"{folder} was measured elsewhere: {'; '.join(differences)}", EXIT_BASELINE)
    return manifest if manifest.versions else None


def no_baseline(root: Path, suite: str, suite_path: Path, here: Fingerprint) -> UserError:
    """What to say where a suite has no baseline for this machine: what there is, and what would help."""
    others = [one for one in suite_manifests(root, suite) if one.versions]
    make = f"scm-harness gate run --suite {suite_path} --record"
    help_line = (
        f"make one: {make}, then scm-harness gate accept --suite {suite_path} --reason TEXT; "
        "or compare with a commit: --against REF"
    )
    if not others:
        return UserError(
            f"suite {suite} has no baseline in {root}",
            EXIT_BASELINE,
            [f"this machine: {told_fingerprint(here)}", help_line],
        )
    nearest = min(others, key=lambda one: len(fingerprint_differences(one.fingerprint, here)))
    differences = "; ".join(fingerprint_differences(nearest.fingerprint, here))
    return UserError(
        f"suite {suite} has no baseline for this machine ({here.identity})",
        EXIT_BASELINE,
        [f"the nearest of {len(others)} is {nearest.folder.name}, which differs: {differences}", help_line],
    )


def told_fingerprint(here: Fingerprint) -> str:
    """A fingerprint in one line."""
    return ", ".join(f"{name} {value}" for name, value in here.to_plain().items())


def check_expiry(version: Version, today: date) -> None:
    """Refuse a version that was accepted for a time which is over."""
    until = version.said.get("expires")
    if until is not None and today > date.fromisoformat(until):
        raise UserError(
            f"baseline {version.name} was accepted until {until} ({one_line(version.said['reason'])}): "
            "mend what it allowed, or accept again with a reason",
            EXIT_BASELINE,
        )


def read_baseline(manifest: Manifest, version: Version) -> ArmRows:
    """The rows of a version; a `UserError` where they are not those that were accepted."""
    try:
        digest = hashlib.sha256(version.path.read_bytes()).hexdigest()
        if digest != version.said["sha256"]:
            raise RunReadError(f"{version.path} is not the file that its manifest names (sha256 differs)")
        rows = keyed_rows(read_fragment(version.path, kind="rows"), str(version.path))
    except FileNotFoundError:
        raise UserError(f"{version.path} is named by its manifest and missing", EXIT_BASELINE) from None
    except (OSError, RunReadError) as error:
        raise UserError(one_line(error), EXIT_BASELINE) from None
    origin = {
        **version.said,
        "suite": manifest.suite,
        "fingerprint": manifest.fingerprint.to_plain(),
        "label": f"{version.name} ({one_line(version.said['reason'])[:60]})",
    }
    return ArmRows(str(version.path), rows, stored_launches(rows), origin)


def anchors(manifest: Manifest) -> list[tuple[str, Version]]:
    """What a candidate is compared with: the previous version, and the last release where that is another."""
    previous = manifest.versions[-1]
    releases = [one for one in manifest.versions if one.said.get("release")]
    found = [("previous", previous)]
    if releases and releases[-1] is not previous:
        found.append(("release", releases[-1]))
    return found


def accepted_as(root: Path, suite: str, subject: str, today: date) -> Version | None:
    """The version, on whatever machine, in which just this code with these settings was accepted, if any."""
    for manifest in suite_manifests(root, suite):
        for version in reversed(manifest.versions):
            until = version.said.get("expires")
            if version.said["subject"] == subject and (until is None or today <= date.fromisoformat(until)):
                return version
    return None


def write_baseline(
    root: Path,
    taken: ArmRows,
    seeds: Sequence[int],
    *,
    nan_allowance: int,
    reason: str,
    expires: date | None,
    release: bool,
    approver: str,
) -> Version:
    """Write the rows of a candidate as the next version of its suite on its machine, and its manifest."""
    origin = taken.origin
    here = parse_fingerprint(origin["fingerprint"])
    folder = root / origin["suite"] / here.identity
    manifest = read_manifest(folder) if (folder / MANIFEST_FILE).is_file() else None
    before = [dict(one.said) for one in manifest.versions] if manifest else []
    number = before[-1]["version"] + 1 if before else 1
    path = folder / f"v{number:04d}.parquet"
    folder.mkdir(parents=True, exist_ok=True)
    write_table_atomically(merged_table(taken, seeds), path)
    said = {
        "version": number,
        "file": path.name,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "reason": reason,
        "approver": approver,
        "expires": None if expires is None else expires.isoformat(),
        "release": release,
        "nan_allowance": nan_allowance,
        "commit": origin.get("commit"),
        "commit_dirty": origin.get("commit_dirty"),
        "code": origin["code"],
        "subject": origin["subject"],
        "config": {name: origin["questions"][name] for name in taken.scenarios},
        "seeds": sorted({seed for _, seed in taken.rows if seed in set(seeds)}),
        "packages": {name: origin.get("packages", {}).get(name) for name in PACKAGES},
        "threads": origin.get("threads"),
    }
    write_json_atomically(
        {
            "schema_version": MANIFEST_VERSION,
            "suite": origin["suite"],
            "fingerprint": here.to_plain(),
            "versions": [*before, said],
        },
        folder / MANIFEST_FILE,
    )
    return Version(said, path)


def who_approves(folder: Path) -> str:
    """Who accepts, unless said: git's user, else the system's."""
    name = ask_git(folder, "config", "user.name")
    if name:
        return one_line(name)
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "unknown"
