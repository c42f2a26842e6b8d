"""The folder of a gate: which suite it is of, what its arms trained, and that one gate writes it at once.

An arm's folder is named by everything that decides its rows, so that rows of other code, settings or
libraries are never used again.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from harness.errors import UserError, one_line
from harness.gate.arm_rows import ArmStore, arm_digest
from harness.gate.arms import (
    Arm,
    data_file,
)
from harness.gate.codes import EXIT_INCOMPLETE, EXIT_USAGE
from harness.gate.fingerprint import Fingerprint
from harness.gate.suite import Suite, suite_values
from reports.fragments import RunReadError, write_json_atomically

SESSION_FILE = "session.json"


LOCK_FILE = ".lock"


SESSION_VERSION = 1


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
