"""Running tests against mutants: one process each, forked from one that has imported the slow libraries.

The first process holds torch, numpy, scipy, pytest and hypothesis, and nothing of `scm`. A child of it
imports `scm` with one module's text replaced, runs the tests that touch the changed lines, the fastest first,
until one fails, and is gone; no file of the project is written. Which tests touch which lines is measured
once, without a change.

Hypothesis draws few examples, the same ones in each child, and shrinks nothing.
"""

from __future__ import annotations

import contextlib
import gc
import json
import math
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import spec_from_file_location
from pathlib import Path
from types import CodeType, ModuleType
from typing import IO, Any

import pytest
from mutants import Mutant

EXAMPLES = 25
LEAST_TIMEOUT_S = 10.0
KILLED, TIMEOUT, SURVIVED = "killed", "timeout", "survived"

_PROFILE = "mutation"
_TIMES_BASELINE = 5.0
_MEMORY_BYTES = 16 * 2**30
_TICK_S = 0.005


class UnmeasurableError(Exception):
    """The tests do not pass without a change, or could not be run; the message says which."""


@dataclass(frozen=True, slots=True)
class Baseline:
    """The tests without a change: how long each takes, and which of them run each line of each module."""

    seconds: Mapping[str, float]
    tests_by_line: Mapping[str, Mapping[int, frozenset[str]]]

    def tests_for(self, mutant: Mutant) -> list[str]:
        """Return the tests that run the changed lines, the fastest first; all where import runs them."""
        if mutant.lines is None:
            chosen: Iterable[str] = self.seconds
        else:
            by_line = self.tests_by_line.get(mutant.module, {})
            chosen = frozenset().union(*(by_line.get(line, frozenset()) for line in mutant.lines))
        return sorted(chosen, key=lambda test: (self.seconds[test], test))

    def timeout_s(self, tests: Sequence[str]) -> float:
        """Return how long the tests may take against a mutant."""
        return LEAST_TIMEOUT_S + _TIMES_BASELINE * sum(self.seconds[test] for test in tests)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of a mutant. by: the test that failed, "import" where the module could not be imported."""

    outcome: str
    by: str
    tests: int
    seconds: float


def preload() -> None:
    """Import what every child needs, on one thread; `scm` must not be among it."""
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"
    import hypothesis.extra.numpy
    import mpmath
    import scipy.special
    import scipy.stats
    import torch

    torch.set_num_threads(1)
    _ = hypothesis, mpmath, scipy
    if any(name.partition(".")[0] == "scm" for name in sys.modules):
        raise UnmeasurableError("scm must not be imported before its mutants are, and it is")
    gc.collect()
    gc.freeze()  # else each child's first collection copies all that it shares with this process


def measure_baseline(modules: Sequence[str], files: Sequence[str], root: Path) -> Baseline:
    """Run the test files without a change; UnmeasurableError where one of their tests fails."""
    child = _fork(lambda answer: _baseline_in_child(modules, files, root, answer), root)
    code, found = child.wait()
    if code != 0 or not found:
        failed = ", ".join(found.get("failed", [])) if found else ""
        raise UnmeasurableError(f"the tests must pass without a change, got exit code {code}: {failed}")
    lines = {
        module: {int(line): frozenset(tests) for line, tests in by_line.items()}
        for module, by_line in found["lines"].items()
    }
    return Baseline(found["seconds"], lines)


def try_mutants(
    mutants: Iterable[Mutant],
    baseline: Baseline,
    root: Path,
    *,
    jobs: int = 1,
    told: Callable[[Mutant, Verdict], None] = lambda mutant, verdict: None,
) -> Iterator[tuple[Mutant, Verdict]]:
    """Yield every mutant with its verdict as they come, `jobs` at a time."""
    waiting = iter(mutants)
    running: list[tuple[Mutant, list[str], _Child]] = []
    try:
        while True:
            while len(running) < jobs and (mutant := next(waiting, None)) is not None:
                tests = baseline.tests_for(mutant)
                if not tests:
                    yield mutant, Verdict(SURVIVED, "", 0, 0.0)
                    continue
                running.append((mutant, tests, _try_one(mutant, tests, baseline.timeout_s(tests), root)))
            if not running:
                return
            for entry in [entry for entry in running if entry[2].has_ended()]:
                running.remove(entry)
                mutant, tests, child = entry
                yield mutant, _verdict(mutant, tests, child)
            time.sleep(_TICK_S)
    finally:
        for _, _, child in running:
            child.kill()


def _try_one(mutant: Mutant, tests: list[str], timeout_s: float, root: Path) -> _Child:
    text = mutant.text
    return _fork(lambda answer: _mutant_in_child(mutant.module, text, tests, root, answer), root, timeout_s)


def _verdict(mutant: Mutant, tests: list[str], child: _Child) -> Verdict:
    code, found = child.wait()
    seconds = time.perf_counter() - child.begun
    if child.timed_out:
        return Verdict(TIMEOUT, "", len(tests), seconds)
    if code == pytest.ExitCode.OK:
        return Verdict(SURVIVED, "", len(tests), seconds)
    failed = found.get("failed") if found else None
    if failed:
        return Verdict(KILLED, failed[0], len(tests), seconds)
    if code < 0:
        return Verdict(KILLED, f"signal {-code}", len(tests), seconds)
    raise UnmeasurableError(f"the tests of {mutant.id} could not be run, exit code {code}")


# --- in a child --------------------------------------------------------------------------------------


def _baseline_in_child(modules: Sequence[str], files: Sequence[str], root: Path, answer: IO[str]) -> int:
    import coverage

    measured = coverage.Coverage(
        data_file=None, config_file=False, include=[str(root / module) for module in modules]
    )
    watch = _Watch(measured.switch_context)
    measured.start()
    code = _run_pytest(files, [watch], root, stop_at_first=False)
    measured.stop()
    data = measured.get_data()
    lines: dict[str, dict[int, list[str]]] = {}
    for module in modules:
        by_line = data.contexts_by_lineno(str(root / module))
        lines[module] = {line: [test for test in tests if test] for line, tests in by_line.items()}
    json.dump({"seconds": watch.seconds, "failed": watch.failed, "lines": lines}, answer)
    return code


def _mutant_in_child(module: str, text: str, tests: list[str], root: Path, answer: IO[str]) -> int:
    name = module.removesuffix(".py").replace("/", ".")
    sys.meta_path.insert(0, _MutatedFinder(name, root / module, text))
    try:
        __import__(name)
    except Exception:
        json.dump({"failed": ["import"]}, answer)
        return 1
    files = dict.fromkeys(test.partition("::")[0] for test in tests)
    watch = _Watch()
    code = _run_pytest(list(files), [_Selection(tests), watch], root, stop_at_first=True)
    json.dump({"failed": watch.failed}, answer)
    return code


def _run_pytest(files: Sequence[str], plugins: list[object], root: Path, *, stop_at_first: bool) -> int:
    from hypothesis import HealthCheck, Phase, settings

    settings.register_profile(
        _PROFILE,
        max_examples=EXAMPLES,
        derandomize=True,
        database=None,
        deadline=None,
        phases=(Phase.explicit, Phase.generate),
        suppress_health_check=list(HealthCheck),
    )
    with tempfile.TemporaryDirectory() as folder:
        arguments = [
            *(["-x"] if stop_at_first else []),
            "-q",
            "--assert=plain",  # what a failing test would say is not read
            "--no-header",
            "--tb=no",
            f"--rootdir={root}",
            f"--basetemp={folder}/tests",
            "-pno:cacheprovider",
            f"--hypothesis-profile={_PROFILE}",
            *files,
        ]
        return int(pytest.main(arguments, plugins=plugins))


class _Watch:
    """Notes how long each test takes and which failed, and says to `begins` which one begins."""

    def __init__(self, begins: Callable[[str], object] = lambda test: None) -> None:
        self.seconds: dict[str, float] = {}
        self.failed: list[str] = []
        self._begins = begins

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self._begins(item.nodeid)
        begun = time.perf_counter()
        result = yield
        self.seconds[item.nodeid] = time.perf_counter() - begun
        self._begins("")
        return result

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed.append(report.nodeid)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.failed.append(report.nodeid)


class _Selection:
    """Keeps the given tests, in the given order; those that the change has renamed come last."""

    def __init__(self, tests: Sequence[str]) -> None:
        self._order = {test: number for number, test in enumerate(tests)}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        functions = {test.partition("[")[0] for test in self._order}
        kept = [item for item in items if item.nodeid.partition("[")[0] in functions]
        last = len(self._order)
        known = {item.nodeid for item in items}
        renamed = not known.issuperset(self._order)
        kept = [item for item in kept if item.nodeid in self._order or renamed]
        items[:] = sorted(kept, key=lambda item: self._order.get(item.nodeid, last))


class _MutatedFinder(MetaPathFinder):
    """Finds one module with another text than its file's."""

    def __init__(self, name: str, path: Path, text: str) -> None:
        self._name = name
        self._path = path
        self._text = text

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != self._name:
            return None
        loader = _MutatedLoader(name, str(self._path), self._text)
        return spec_from_file_location(name, self._path, loader=loader)


class _MutatedLoader(SourceFileLoader):
    def __init__(self, name: str, path: str, text: str) -> None:
        super().__init__(name, path)
        self._text = text

    def get_code(self, fullname: str) -> CodeType:
        code: CodeType = compile(self._text, self.path, "exec", dont_inherit=True)
        return code


# --- processes ---------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Child:
    """A forked process, its deadline, and the file that it answers in."""

    pid: int
    answer: IO[str]
    begun: float
    timeout_s: float
    timed_out: bool = False
    _status: int | None = field(default=None, repr=False)

    def has_ended(self) -> bool:
        """Say whether it has, after having ended it where its time is over."""
        if self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._status = status
            elif time.perf_counter() - self.begun > self.timeout_s:
                self.timed_out = True
                self.kill()
        return self._status is not None

    def wait(self) -> tuple[int, dict[str, Any]]:
        """Return its exit code (minus the signal that ended it) and its answer, {} where there is none."""
        if self._status is None:
            self._status = os.waitpid(self.pid, 0)[1]
        self.answer.seek(0)
        text = self.answer.read()
        self.answer.close()
        with contextlib.suppress(json.JSONDecodeError):  # it was ended while it wrote
            return os.waitstatus_to_exitcode(self._status), json.loads(text) if text else {}
        return os.waitstatus_to_exitcode(self._status), {}

    def kill(self) -> None:
        """End it and whatever it has started."""
        if self._status is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            self._status = os.waitpid(self.pid, 0)[1]


def _fork(work: Callable[[IO[str]], int], root: Path, timeout_s: float = math.inf) -> _Child:
    """Run `work` in a child, at `root` and silent; its answer is read where it has ended."""
    answer = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        with contextlib.suppress(OSError):  # either of the two does it first
            os.setpgid(pid, pid)
        return _Child(pid, answer, time.perf_counter(), timeout_s)
    code = 1
    try:
        os.setpgid(0, 0)
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, hard))
        if timeout_s < math.inf:  # should the parent be gone before it can end this one
            _, hard = resource.getrlimit(resource.RLIMIT_CPU)
            resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(2 * timeout_s), hard))
        silence = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(silence, stream)
        os.chdir(root)
        sys.path.insert(0, str(root))
        code = work(answer)
        answer.flush()
    except BaseException as error:  # nothing of the parent's may run in the child
        json.dump({"failed": [], "error": repr(error)}, answer)
        answer.flush()
        code = 70
    finally:
        os._exit(code)
