"""Change the code that decides what a model is told and answers, one thing at a time, and see a test fail.

A change that no test notices is a survivor: a behaviour that nothing holds, or one that nobody can see. The
changes are those of mutmut's operators (`mutants`), each tried in a process of its own that runs the tests
which touch the changed lines (`mutant_trials`). mutmut's own runner is not used: it leaves decorated
functions and tables unchanged, and runs a rewritten copy of the project. Nor is cosmic-ray, which starts
Python and imports torch anew for every change, and makes eleven changes of each arithmetic operator, most of
them type errors.

    python benchmarks/mutation.py [--quick | --share SHARE] [--jobs N] [--subjects NAME [NAME ...]]
                                  [--resume PATH] [--json PATH] [--markdown PATH]

All mutants are tried by default, which takes an hour or two on two cores; --share tries that share of each
module's, drawn with a fixed seed, a smaller one being part of every larger one; --quick is 4 %, in less than
six minutes. Shares killed come with their 95 % Wilson interval. A mutant whose tests run into the time limit
counts as killed, and is told apart as well. With --resume every verdict goes into that file at once; begun
again, the command takes over the killed ones of every module that is unchanged, and the survivors too where
the tests are. --markdown writes the tables; in a file that holds the lines <!-- measured --> and
<!-- end -->, between them. Reasons of survivors are in mutation_survivors.toml.

Exit code 0 when every target is met, 1 when one is missed, 2 when nothing can be measured: mutmut is not
installed, or a test fails without any change.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import random
import sys
import time
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from importlib.metadata import version
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from benchmark_arguments import file_to_write, positive
from marked_page import write_between_marks
from mutation_tables import TARGET, Tried, render, render_markdown, render_survivors, rows_of

if TYPE_CHECKING:
    from mutant_trials import Verdict
    from mutants import Mutant

ROOT = Path(__file__).parents[1]
REASONS = Path(__file__).with_name("mutation_survivors.toml")
SEED = 0
QUICK_SHARE = 0.04


@dataclass(frozen=True, slots=True)
class Subject:
    """Modules that belong together, and the test files that are about them; paths from the root."""

    name: str
    modules: tuple[str, ...]
    tests: tuple[str, ...]


def _subject(name: str, modules: str, tests: str) -> Subject:
    return Subject(
        name,
        tuple(f"scm/{module}.py" for module in modules.split()),
        tuple(f"tests/scm_tests/test_{test}.py" for test in tests.split()),
    )


SUBJECTS: dict[str, Subject] = {
    subject.name: subject
    for subject in (
        _subject(
            "losses",
            "losses/implicit losses/margin losses/pole losses/projective losses/quotient losses/rowwise "
            "losses/separation losses/sign losses/terms losses/training losses/tuples",
            "losses quotient_loss ranked_coverage row_weights pole_loss objective policies known_defects "
            "companions",
        ),
        _subject(
            "coverage",
            "losses/coverage training/coverage",
            "coverage_trackers ranked_coverage losses row_weights objective policies adaptive_loss "
            "known_defects",
        ),
        _subject("targets", "training/targets", "targets feed losses"),
        _subject("policies", "autodiff/policies", "policies layers normalization losses objective"),
        _subject(
            "inference",
            "inference/calibration inference/patterns inference/strict inference/wrapper",
            "inference calibration tau_sweep",
        ),
        _subject(
            "controllers", "training/adaptive_loss training/control_rules", "adaptive_loss known_defects"
        ),
    )
}


@dataclass(frozen=True, slots=True)
class Reason:
    """Why mutants survive: of a module, a function, and a change, each a pattern as for file names."""

    module: str
    function: str
    before: str
    after: str
    reason: str

    def explains(self, mutant: Mutant) -> bool:
        """Say whether the mutant is one of those."""
        pairs = ((getattr(mutant, name), getattr(self, name)) for name in ("module", "function"))
        if not all(fnmatchcase(text, pattern) for text, pattern in pairs):
            return False
        return _matches(mutant.before, self.before) and _matches(mutant.after, self.after)


def _matches(code: str, pattern: str) -> bool:
    """Only the star is special: code is full of brackets."""
    return fnmatchcase(code, pattern.replace("[", "[[]").replace("?", "[?]"))


def read_reasons(path: Path = REASONS) -> list[Reason]:
    """Read the reasons of known survivors."""
    entries = tomllib.loads(path.read_text(encoding="utf-8"))["survivor"]
    return [Reason(**{"function": "*", "before": "*", "after": "*", **entry}) for entry in entries]


def drawn(mutants: Sequence[Mutant], share: float, module: str) -> list[Mutant]:
    """Return that share of a module's mutants, at least one; a smaller share is part of a larger one."""
    order = list(mutants)
    random.Random(f"{SEED}:{module}").shuffle(order)
    return order[: math.ceil(share * len(order))]


# --- measuring -----------------------------------------------------------------------------------


class Ledger:
    """The verdicts that were written down, by what was tried; without a path nothing is kept."""

    def __init__(self, path: Path | None) -> None:
        self._known: dict[str, dict[str, Any]] = {}
        self._file: IO[str] | None = None
        if path is not None:
            if path.exists():
                lines = path.read_text(encoding="utf-8").splitlines()
                for line in lines:
                    entry = _json_or_none(line)  # the last one may be cut off
                    if entry is not None:
                        self._known[entry["key"]] = entry
            self._file = path.open("a", encoding="utf-8")
            self._file.write("\n" if path.stat().st_size else "")

    def find(self, key: str, tests: str) -> dict[str, Any] | None:
        """Return what is known of a mutant; a survivor only of the same tests."""
        entry = self._known.get(key)
        if entry is None or (entry["outcome"] == "survived" and entry["tests_digest"] != tests):
            return None
        return entry

    def note(self, key: str, tests: str, verdict: Verdict) -> None:
        """Write a verdict down at once."""
        if self._file is not None:
            self._file.write(json.dumps({"key": key, "tests_digest": tests, **asdict(verdict)}) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def _json_or_none(line: str) -> dict[str, Any] | None:
    try:
        entry: dict[str, Any] = json.loads(line)
    except json.JSONDecodeError:
        return None
    return entry


def measure(
    subject: Subject, share: float, jobs: int, ledger: Ledger, reasons: Sequence[Reason], root: Path = ROOT
) -> Iterator[tuple[int, Tried]]:
    """Yield every mutant that is tried, each with the number of its module's mutants."""
    from mutant_trials import Verdict, measure_baseline, try_mutants
    from mutants import mutants_of

    tests = _digest(root / name for name in subject.tests)
    sizes: dict[str, int] = {}
    keys: dict[str, str] = {}
    open_ones: list[Mutant] = []

    def tried(mutant: Mutant, verdict: Verdict) -> tuple[int, Tried]:
        told = {name: getattr(mutant, name) for name in _MUTANT_FIELDS}
        known = [reason.reason for reason in reasons if reason.explains(mutant)]
        reason = known[0] if known and verdict.outcome == "survived" else ""
        return sizes[mutant.module], Tried(subject.name, **told, **asdict(verdict), reason=reason)

    for module in subject.modules:
        mutants = mutants_of(module, root)
        sizes[module] = len(mutants)
        digest = _digest([root / module])
        for mutant in drawn(mutants, share, module):
            keys[mutant.id] = f"{digest}:{mutant.id}"
            entry = ledger.find(keys[mutant.id], tests)
            if entry is None:
                open_ones.append(mutant)
            else:
                yield tried(mutant, Verdict(**{name: entry[name] for name in _VERDICT_FIELDS}))
    if open_ones:
        baseline = measure_baseline(subject.modules, subject.tests, root)
        for mutant, verdict in try_mutants(open_ones, baseline, root, jobs=jobs):
            ledger.note(keys[mutant.id], tests, verdict)
            yield tried(mutant, verdict)


_MUTANT_FIELDS = ("module", "function", "line", "operator", "before", "after")
_VERDICT_FIELDS = ("outcome", "by", "tests", "seconds")


def _digest(paths: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


# --- the command ---------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; return its exit code."""
    arguments = _parser().parse_args(argv)
    share = QUICK_SHARE if arguments.quick else arguments.share
    try:
        from mutant_trials import UnmeasurableError, preload
    except ImportError as error:
        print(f"{error}; pip install -e '.[dev,mutation]'", file=sys.stderr)
        return 2
    begun = time.perf_counter()
    ledger = Ledger(arguments.resume)
    tried: list[Tried] = []
    sizes: dict[str, int] = {}
    try:
        preload()
        reasons = read_reasons()
        for name in arguments.subjects:
            for size, one in measure(SUBJECTS[name], share, arguments.jobs, ledger, reasons):
                sizes[one.module] = size
                tried.append(one)
                _tell(name, tried)
    except UnmeasurableError as error:
        print(error, file=sys.stderr)
        return 2
    finally:
        ledger.close()
    duration_s = time.perf_counter() - begun
    document = _document(tried, sizes, share, duration_s)
    print(render(document))
    print(render_survivors(tried))
    print(f"{len(tried)} of {sum(sizes.values())} mutants in {duration_s:.0f} s, {arguments.jobs} at a time")
    if arguments.json:
        arguments.json.write_text(json.dumps(document, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    if arguments.markdown:
        write_between_marks(render_markdown(document), arguments.markdown)
    return 0 if all(row["met"] for row in document["subjects"]) else 1


def _tell(subject: str, tried: Sequence[Tried]) -> None:
    if len(tried) % 50 == 0:
        killed = sum(one.is_killed for one in tried)
        print(f"{subject}: {len(tried)} tried, {killed} killed", file=sys.stderr, flush=True)


def _document(
    tried: Sequence[Tried], sizes: Mapping[str, int], share: float, duration_s: float
) -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "torch": version("torch"),
        "mutmut": version("mutmut"),
        "target": TARGET,
        "seed": SEED,
        "share_tried": share,
        "duration_s": duration_s,
        **rows_of(tried, sizes),
        "survivors": [asdict(one) for one in tried if not one.is_killed],
    }


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be a number in (0, 1], got {text!r}")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_targets_text(), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help=f"the same as --share {QUICK_SHARE}")
    size.add_argument("--share", type=_share, default=1.0, help="of each module's mutants; default 1, all")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--jobs", type=positive, default=cores, help=f"mutants at a time; default {cores}")
    parser.add_argument(
        "--subjects", nargs="+", choices=list(SUBJECTS), default=list(SUBJECTS), metavar="NAME"
    )
    parser.add_argument("--resume", type=file_to_write, help="keep verdicts in this file, and go on from it")
    parser.add_argument("--json", type=file_to_write, help="write every number and survivor to this file")
    parser.add_argument("--markdown", type=file_to_write, help="write the tables to this file")
    return parser


def _targets_text() -> str:
    return (
        f"target: {TARGET:.0%} of the mutants that were tried are killed, of all together and of each of\n"
        f"{', '.join(SUBJECTS)};\n"
        "where not all mutants of a subject were tried, the upper end of its interval counts"
    )


if __name__ == "__main__":
    raise SystemExit(main())
