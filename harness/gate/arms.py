"""The two arms of a gate: which interpreter and which code each is, and the workers that run them.

The candidate is the code that runs the gate. The baseline is another interpreter with packages of its own, a
commit of the repository that holds the suite (laid out in a temporary folder; the repository is not touched),
or the candidate once more. What a worker does is in `launch`.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import harness
from harness.errors import UserError, one_line
from harness.gate.codes import EXIT_BASELINE, EXIT_INCOMPLETE, EXIT_USAGE
from harness.gate.suite import Scenario, Suite, read_defaults
from reports.provenance import ask_git

LAUNCH = Path(__file__).with_name("launch.py")
CODE_ROOT = Path(harness.__file__).resolve().parents[1]
DATA = "data"  # the parameter of a task that names a file, by convention
START_TIMEOUT_S = 300.0
GIT_TIMEOUT_S = 120.0
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "NUMEXPR_NUM_THREADS": "1",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One arm: its interpreter, the folders its packages come from (none: those installed), its scenarios.

    root: where the packages must then be found; None where they may be anywhere.
    """

    name: str
    label: str
    python: str
    path: tuple[Path, ...]
    root: Path | None
    suite: Suite
    commit: str | None = None


class WorkerLostError(Exception):
    """A worker ended, or was ended, without an answer; the message says what it said last."""


class Worker:
    """A process of an arm that answers one request at a time."""

    def __init__(self, arm: Arm) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (closed in `close`)
        self._rest = b""
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment |= {**ONE_THREAD, "PYTHONHASHSEED": "0", "PYTHONSAFEPATH": "1"}
        environment["PYTHONDONTWRITEBYTECODE"] = "1"
        environment["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        if arm.path:
            environment["PYTHONPATH"] = os.pathsep.join(map(str, arm.path))
        try:
            self._process = subprocess.Popen(
                [arm.python, str(LAUNCH)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                env=environment,
                start_new_session=True,  # Ctrl-C is for the gate, which ends its workers
            )
        except OSError as error:
            self._log.close()
            raise WorkerLostError(f"{arm.python} cannot be started: {error.strerror}") from None

    def ask(self, request: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        """The answer to a request; `WorkerLostError` where none comes in time; the worker has then gone."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request, default=str).encode() + b"\n")
            self._process.stdin.flush()
            line = self._read_line(timeout_s)
        except OSError:
            raise WorkerLostError(self._last_words()) from None
        try:
            answer = json.loads(line)
        except ValueError:
            raise WorkerLostError(f"an answer that is not JSON: {one_line(line[:200])}") from None
        return dict(answer)

    def kill(self) -> None:
        """End the process, from whatever thread; who waits for its answer is told that it died."""
        if self._process.poll() is None:
            self._process.kill()

    def close(self) -> None:
        """End the process and let go of it."""
        self.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            with contextlib.suppress(OSError):
                if stream is not None:
                    stream.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read_line(self, timeout_s: float) -> bytes:
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        give_up_s = time.monotonic() + timeout_s
        while b"\n" not in self._rest:
            left_s = give_up_s - time.monotonic()
            if left_s <= 0 or not select.select([descriptor], [], [], left_s)[0]:
                self._process.kill()
                raise WorkerLostError(f"no answer within {timeout_s:g} s")
            read = os.read(descriptor, 1 << 16)
            if not read:
                raise WorkerLostError(self._last_words())
            self._rest += read
        line, self._rest = self._rest.split(b"\n", 1)
        return line

    def _last_words(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=5.0)
        code = self._process.poll()
        with contextlib.suppress(OSError, ValueError):
            self._log.seek(0)
            lines = self._log.read().decode(errors="replace").splitlines()
            said = next((one_line(line) for line in reversed(lines) if line.strip()), "")
            return f"the worker ended with code {code}" + (f": {said[:300]}" if said else "")
        return f"the worker ended with code {code}"


def greet(arm: Arm) -> dict[str, Any]:
    """What an arm says about itself (`launch.answer_hello`); a `UserError` where it cannot train."""
    files = sorted({str(path) for one in arm.suite.scenarios for path in own_modules(one)})
    code = EXIT_BASELINE if arm.name == "baseline" else EXIT_INCOMPLETE
    try:
        with Worker(arm) as worker:
            told = worker.ask({"ask": "hello", "device": arm.suite.device, "files": files}, START_TIMEOUT_S)
            if "error" in told:
                raise UserError(f"{arm.name} ({arm.label}) cannot train: {told['error']}", code)
            if arm.root is not None and Path(told["root"]) != arm.root:
                raise UserError(
                    f"{arm.name} ({arm.label}) must run the code in {arm.root}, got that in {told['root']}",
                    code,
                )
            check_tasks(arm, worker)
    except WorkerLostError as error:
        raise UserError(f"{arm.name} ({arm.label}) cannot train: {one_line(error)}", code) from None
    return told


def check_tasks(arm: Arm, worker: Worker) -> None:
    """Refuse an arm whose tasks cannot be made or cannot load their data, each with its reason."""
    lines = []
    for one in arm.suite.scenarios:
        request = {"ask": "digest", "spec": one.spec, "seed": arm.suite.seeds[0]}
        told = worker.ask(request, arm.suite.timeout_s)
        if "error" in told:
            lines.append(f"{arm.name} ({arm.label}), scenario {one.name!r}: {told['error']}")
    if lines:
        code = EXIT_BASELINE if arm.name == "baseline" else EXIT_USAGE
        raise UserError(lines[0], code, lines[1:])


def own_modules(scenario: Scenario) -> list[Path]:
    """The user's own code that a scenario names; empty where its task is one of the project's."""
    if ":" not in scenario.task:
        return []
    module = scenario.task.partition(":")[0]
    path = scenario.base_dir.joinpath(*module.split(".")).with_suffix(".py")
    return [path] if path.is_file() else []


def data_file(scenario: Scenario) -> Path | None:
    """The file that a scenario's task reads, by the convention that its parameter is called `data`."""
    data = scenario.params.get(DATA)
    path = scenario.base_dir / Path(data).expanduser() if isinstance(data, str) else None
    return path if path is not None and path.is_file() else None


def candidate_arm(suite: Suite) -> Arm:
    """The code that runs the gate."""
    return Arm(
        name="candidate",
        label="this code",
        python=sys.executable,
        path=(CODE_ROOT, *user_path()),
        root=CODE_ROOT,
        suite=suite,
    )


def self_arm(suite: Suite) -> Arm:
    """The candidate once more, as its own baseline."""
    return replace(candidate_arm(suite), name="baseline", label="this code again")


def python_arm(suite: Suite, python: Path) -> Arm:
    """Another interpreter with the packages installed for it."""
    found = shutil.which(str(python))
    if found is None:
        raise UserError(f"--baseline-python must be a Python interpreter, got {str(python)!r}", EXIT_BASELINE)
    # Its own name is kept: that of a virtual environment is a link which says where the packages are.
    return Arm(
        name="baseline",
        label=str(python),
        python=os.path.abspath(found),
        path=user_path(),
        root=None,
        suite=suite,
    )


@contextlib.contextmanager
def commit_arm(suite: Suite, reference: str) -> Iterator[Arm]:
    """A commit of the repository that holds the suite, laid out in a folder for the time of a `with` block.

    Code, tasks, data and files of defaults are those of the commit; scenarios, margins and seeds those of the
    suite as it is now. A data file that the commit does not hold is taken from where it is now.
    """
    top = repository_of(suite.path)
    commit = find_commit(suite.path, reference)
    if top is None or commit is None:
        raise UserError(
            f"--against must name a commit of the repository around {suite.path}, got {reference!r}",
            EXIT_BASELINE,
        )
    folder = Path(tempfile.mkdtemp(prefix="scm-gate-"))
    try:
        lay_out(top, commit, folder)
        label = f"{reference} ({commit[:10]})" if not commit.startswith(reference) else commit[:10]
        scenarios = tuple(moved_scenario(one, top, folder, label) for one in suite.scenarios)
        is_project = all((folder / name / "__init__.py").is_file() for name in ("scm", "trainables"))
        root = folder.resolve() if is_project else CODE_ROOT
        yield Arm(
            name="baseline",
            label=label,
            python=sys.executable,
            path=(
                *((root,) if is_project else (folder.resolve(), CODE_ROOT)),
                *(moved_path(path, top, folder) for path in user_path()),
            ),
            root=root,
            suite=suite.with_arm("baseline", scenarios),
            commit=commit,
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def moved_scenario(scenario: Scenario, top: Path, folder: Path, label: str) -> Scenario:
    """A scenario with its files as they are in a folder that stands for a repository."""
    moved = replace(scenario, base_dir=moved_path(scenario.base_dir, top, folder))
    data = scenario.params.get(DATA)
    if isinstance(data, str):
        there = moved.base_dir / Path(data).expanduser()
        here = scenario.base_dir / Path(data).expanduser()
        if not there.exists() and here.exists():
            moved = replace(moved, params={**scenario.params, DATA: str(here.resolve())})
    if scenario.defaults is None:
        return moved
    path = moved_path(scenario.defaults, top, folder)
    if not path.is_file():
        shown = os.path.relpath(scenario.defaults, top)
        raise UserError(
            f"scenario {scenario.name!r}: {label} holds no {shown}; there is no earlier default to compare "
            "with",
            EXIT_BASELINE,
        )
    return replace(moved, tested=read_defaults(path)[0], defaults=path)


def moved_path(path: Path, top: Path, folder: Path) -> Path:
    """The path below `folder` that `path` has below `top`; one outside of `top` stays."""
    try:
        return folder.resolve() / path.resolve().relative_to(top.resolve())
    except ValueError:
        return path


def repository_of(path: Path) -> Path | None:
    """The top folder of the git repository around a file, None where there is none."""
    said = ask_git(path.resolve().parent, "rev-parse", "--show-toplevel")
    return Path(said) if said else None


def find_commit(path: Path, reference: str) -> str | None:
    """The full name of a commit of the repository around a file, None where it is not there."""
    if not reference or reference.startswith("-"):
        return None
    parent = path.resolve().parent
    return ask_git(parent, "rev-parse", "--verify", "--quiet", f"{reference}^{{commit}}") or None


def lay_out(top: Path, commit: str, folder: Path) -> None:
    """Write the files of a commit into a folder."""
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            ["git", "-C", str(top), "archive", "--format=tar", commit], stdout=subprocess.PIPE, stderr=said
        )
        assert process.stdout is not None
        try:
            with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
                archive.extractall(folder, filter="data")
            process.stdout.read()  # what pads the end
            failed = process.wait(timeout=GIT_TIMEOUT_S) != 0
            reason = ""
        except (tarfile.TarError, OSError, subprocess.TimeoutExpired) as error:
            failed, reason = True, one_line(error)
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
            process.stdout.close()
        if failed:
            said.seek(0)
            reason = one_line(said.read().decode(errors="replace")) or reason
            raise UserError(f"commit {commit[:10]} cannot be laid out: {reason}", EXIT_BASELINE)


def user_path() -> tuple[Path, ...]:
    """What the user's PYTHONPATH names besides this code: where tasks of theirs may come from."""
    entries = [Path(text) for text in os.environ.get("PYTHONPATH", "").split(os.pathsep) if text]
    return tuple(path.resolve() for path in entries if path.resolve() != CODE_ROOT)
