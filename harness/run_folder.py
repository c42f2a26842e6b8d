"""The run folder: who may write it, what it holds when a sweep starts, and what an earlier part left in it.

Made whole or not at all: plan and provenance are written beside the folder's name and renamed into place. One
sweep at a time writes a folder. How rows are stored is decided in `reports`.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.errors import EXIT_RUN_FOLDER, UserError, one_line
from harness.plan import Plan, load_plan, plan_differences, plan_text
from reports.fragments import RunReadError
from reports.history import HISTORY_FOLDER, read_history
from reports.provenance import PROVENANCE_FILE, write_provenance
from reports.rows import ROWS_FOLDER, read_rows

PLAN_FILE = "plan.yaml"
LOCK_FILE = ".lock"


@dataclass(frozen=True, slots=True)
class WrittenTrial:
    """A trial of an earlier part of a run: its row, and its metrics by epoch."""

    row: Mapping[str, Any]
    history: Mapping[int, Mapping[str, float]]


def check_folder(out: Path, plan: Plan, *, resume: bool) -> None:
    """Refuse a folder that a sweep of this plan may not write; nothing is created."""
    if resume:
        check_resumable(out, plan)
    elif out.is_dir() and any(out.iterdir()):
        hint = "go on with it by --resume, or name another by --out"
        raise UserError(f"run folder {out} is not empty: {hint}", EXIT_RUN_FOLDER)
    elif out.exists() and not out.is_dir():
        raise UserError(f"run folder {out} is a file", EXIT_RUN_FOLDER)
    check_writable(out)


def check_resumable(out: Path, plan: Plan) -> None:
    """Refuse to go on with a folder that is no run, or the run of another plan, naming what differs."""
    if not (out / PLAN_FILE).is_file():
        raise UserError(f"{out} is not a run to go on with: it holds no {PLAN_FILE}", EXIT_RUN_FOLDER)
    try:
        written = load_plan(out / PLAN_FILE)
    except UserError as error:
        raise UserError(f"{out} is not a run to go on with: {error}", EXIT_RUN_FOLDER) from None
    differences = plan_differences(plan, written)
    if differences:
        raise UserError(
            f"{out} is the run of another plan, which differs in {', '.join(differences)}", EXIT_RUN_FOLDER
        )


def check_writable(out: Path) -> None:
    """Refuse a folder that cannot be written, by making and removing a folder where it is to be."""
    place = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    try:
        os.rmdir(tempfile.mkdtemp(prefix=".scm-", dir=place))
    except OSError as error:
        raise unwritable(out, error) from None


def create_run(out: Path, plan: Plan, provenance: Mapping[str, Any]) -> None:
    """Make the run folder with its plan and provenance, or nothing where that fails."""
    beside = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        # An empty folder may be a mount point, or where the user stands: it is filled, not replaced.
        beside = Path(tempfile.mkdtemp(prefix=".new-", dir=out if out.is_dir() else out.absolute().parent))
        beside.chmod(0o755)
        (beside / PLAN_FILE).write_text(plan_text(plan), encoding="utf-8")
        write_provenance(beside, {**provenance, "run_id": uuid.uuid4().hex[:12]})
        if out.is_dir():
            for name in (PROVENANCE_FILE, PLAN_FILE):  # the plan, which makes it a run, last
                (beside / name).rename(out / name)
            beside.rmdir()
        else:
            beside.rename(out)
    except OSError as error:
        if beside is not None:
            shutil.rmtree(beside, ignore_errors=True)
        raise unwritable(out, error) from None


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold the run folder for the time of a `with` block; a second sweep in it is a `UserError`."""
    try:
        handle = open(out / LOCK_FILE, "w", encoding="utf-8")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise unwritable(out, error) from None
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"run folder {out} is being written by another sweep", EXIT_RUN_FOLDER) from None
        yield


def read_run_id(out: Path) -> str:
    """The identity that the run was given when its folder was made; a damaged run is a `UserError`."""
    path = out / PROVENANCE_FILE
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["run_id"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        text = f"{path} does not say which run this is: {type(error).__name__}: {one_line(error)}"
        raise UserError(text, EXIT_RUN_FOLDER) from None


def read_written(out: Path) -> dict[str, WrittenTrial]:
    """Every trial that an earlier part of the run wrote, by trial_id; a damaged run is a `UserError`."""
    if not any((out / ROWS_FOLDER).glob("*.parquet")):
        return {}
    try:
        rows = read_rows(out).to_pylist()
        history: dict[str, dict[int, dict[str, float]]] = {row["trial_id"]: {} for row in rows}
        if any((out / HISTORY_FOLDER).glob("*.parquet")):
            for said in read_history(out).to_pylist():
                trial_id, epoch = said.pop("trial_id"), said.pop("epoch")
                history.setdefault(trial_id, {})[epoch] = said
    except RunReadError as error:
        raise UserError(one_line(error), EXIT_RUN_FOLDER) from None
    return {row["trial_id"]: WrittenTrial(row, history[row["trial_id"]]) for row in rows}


def unwritable(out: Path, error: OSError) -> UserError:
    """What the system says about a run folder that cannot be written, with the path that it is about."""
    said = f"{error.strerror or error}: {error.filename}" if error.filename else one_line(error)
    return UserError(f"run folder {out} cannot be written: {said}", EXIT_RUN_FOLDER)
