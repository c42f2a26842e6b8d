"""The benchmark that changes the code: what it changes, what it makes of a toy project, and its tables."""

from __future__ import annotations

import ast
import difflib
import json
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from scipy.stats import binomtest

pytest.importorskip("mutmut", reason="the operators are mutmut's: pip install -e '.[mutation]'")

ROOT = Path(__file__).parents[2]

AREA = '''"""How large things are."""

from __future__ import annotations

import warnings

__all__ = ["area", "half"]

Number = int | float
SIDES = {"square": 4}


class Shape:
    """A shape with sides."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name

    @property
    def sides(self) -> int:
        """How many."""
        return SIDES[self.name]


def area(width: Number, height: Number = 1) -> Number:
    """Return the area."""
    assert width == width
    if width < 0:
        raise ValueError(f"width must be >= 0, got {width + 0}" + "!")
    _check_finite("height", height)
    return width * height


def half(items: list[Number]) -> list[Number]:
    """Return every other item."""
    found, at = [], 0
    while at < len(items):
        found.append(items[at])
        at += 2
    return found


def unused() -> int:
    """Nobody calls this."""
    warnings.warn("unused" + "!", stacklevel=2)
    return 1e300 * len([1, 2])


def _check_finite(name: str, value: Number) -> None:
    if value == float("inf"):
        raise ValueError(f"{name} must be finite, got {value}")
'''
TESTS = """import pytest

from toy.area import Shape, area, half


def test_area():
    assert area(2, 3) == 6
    assert area(0) == 0


def test_bad_widths():
    with pytest.raises(ValueError, match="width must be >= 0"):
        area(-1)


def test_sides():
    assert Shape("square").sides == 4


@pytest.mark.parametrize("n", [0, 1, 4])
def test_half(n):
    assert half(list(range(n))) == list(range(0, n, 2))
"""
TEST_OF_UNUSED = """

def test_unused():
    from toy.area import unused

    with pytest.warns(UserWarning):
        assert unused() == 2e300
"""
BRITTLE = """import os

LIMIT = 4
LAST = "abcde"[LIMIT]


def area(width):
    if width == 77:
        os.abort()
    return width
"""
MEASURE = """
import hypothesis, json, sys  # hypothesis first, so that no child need import it
from dataclasses import asdict
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import mutant_trials, mutation
mutant_trials.LEAST_TIMEOUT_S = 4.0
root = Path(sys.argv[2])
subject = mutation.Subject("toy", ("toy/area.py",), ("tests/test_area.py",))
reasons = [mutation.Reason("toy/*", "unused", "*", "*", "nobody calls it")]
ledger = mutation.Ledger(root / "ledger.jsonl")
try:
    for size, one in mutation.measure(subject, 1.0, 2, ledger, reasons, root):
        print(json.dumps([size, asdict(one)]))
except mutant_trials.UnmeasurableError as error:
    print(json.dumps(["refused", str(error)]))
"""


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """A project of one module and its tests."""
    for folder in ("toy", "tests"):
        (tmp_path / folder).mkdir()
    (tmp_path / "toy" / "__init__.py").touch()
    (tmp_path / "toy" / "area.py").write_text(AREA, encoding="utf-8")
    (tmp_path / "tests" / "test_area.py").write_text(TESTS, encoding="utf-8")
    return tmp_path


def measured(root: Path) -> list[Any]:
    """What the benchmark says of the toy project, in a process that has imported nothing yet."""
    command = [sys.executable, "-c", MEASURE, str(ROOT / "benchmarks"), str(root)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


# --- what is changed ------------------------------------------------------------------------------


def test_every_mutant_is_the_module_with_one_change(
    load_benchmark: Callable[[str], ModuleType], toy: Path
) -> None:
    """In one place, which it names, and the text is Python; no two have the same name."""
    mutants = load_benchmark("mutants").mutants_of("toy/area.py", toy)
    assert len({mutant.id for mutant in mutants}) == len(mutants) > 20
    for mutant in mutants:
        ast.parse(mutant.text)
        blocks = difflib.SequenceMatcher(None, AREA.splitlines(), mutant.text.splitlines()).get_opcodes()
        changed = [block for block in blocks if block[0] != "equal"]
        assert len(changed) == 1, mutant.id
        assert changed[0][1] + 1 == mutant.line, mutant.id
        assert mutant.before != mutant.after


def test_what_cannot_matter_is_left_alone(load_benchmark: Callable[[str], ModuleType], toy: Path) -> None:
    """Messages, beliefs, annotations, aliases, names for a check, numbers that one more leaves alone."""
    mutants = load_benchmark("mutants").mutants_of("toy/area.py", toy)
    left_alone = ("__all__", "Number = int", "__slots__", "assert", "raise", "warnings.warn", "import")
    lines = AREA.splitlines()
    for mutant in mutants:
        assert not any(word in lines[mutant.line - 1] for word in left_alone), mutant.id
        assert "HEIGHT" not in mutant.after
        assert mutant.after != "1e+300"
    found = {(mutant.before, mutant.after) for mutant in mutants}
    assert ("width * height", "width / height") in found
    assert ("4", "5") in found  # a table
    assert any(mutant.function == "Shape.sides" for mutant in mutants) is False  # nothing in it to change
    assert {mutant.function for mutant in mutants} == {
        "",
        "Shape.__init__",
        "area",
        "half",
        "unused",
        "_check_finite",
    }


def test_the_tests_of_a_mutant_are_those_that_run_it(
    load_benchmark: Callable[[str], ModuleType], toy: Path
) -> None:
    """Lines of its statement; of its function for a default; none is named for what import runs."""
    mutants = load_benchmark("mutants").mutants_of("toy/area.py", toy)
    lines = {(mutant.before, mutant.after): mutant.lines for mutant in mutants}
    first = AREA.splitlines().index("def area(width: Number, height: Number = 1) -> Number:") + 1
    assert lines["1", "2"] == range(first, first + 7)
    assert lines["width < 0", "width <= 0"] == range(first + 3, first + 4)
    assert lines["width * height", "width / height"] == range(first + 6, first + 7)
    assert lines["4", "5"] is None


# --- what becomes of it ---------------------------------------------------------------------------


@pytest.mark.slow
def test_mutants_are_killed_survive_or_run_out_of_time(toy: Path) -> None:
    """Nothing is written into the project; a second time nothing is run but what other tests might kill."""
    found = measured(toy)
    sizes, tried = {size for size, _ in found}, [one for _, one in found]
    assert sizes == {len(tried)}
    outcome = {(one["function"], one["before"], one["after"]): one for one in tried}
    killed = outcome["area", "width * height", "width / height"]
    assert (killed["outcome"], killed["by"]) == ("killed", "tests/test_area.py::test_area")
    table = outcome["", '"square"', '"SQUARE"']
    assert (table["outcome"], table["by"]) == ("killed", "tests/test_area.py::test_sides")
    boundary = outcome["area", "width < 0", "width <= 0"]
    assert boundary["outcome"] == "killed"  # area(0) is 0
    endless = outcome["half", "at += 2", "at = 2"]
    assert endless["outcome"] == "timeout"
    unused = [one for one in tried if one["function"] == "unused"]
    assert {(one["outcome"], one["tests"], one["reason"]) for one in unused} == {
        ("survived", 0, "nobody calls it")
    }
    survivors = {(one["function"], one["after"]) for one in tried if one["outcome"] == "survived"}
    assert ("_check_finite", 'value == float("XXinfXX")') not in survivors
    assert (toy / "toy" / "area.py").read_text(encoding="utf-8") == AREA

    kept = (toy / "ledger.jsonl").read_text(encoding="utf-8")
    with (toy / "ledger.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"key": "cut o')  # as it is after an interruption
    assert sorted(map(str, measured(toy))) == sorted(map(str, found))
    assert (toy / "ledger.jsonl").read_text(encoding="utf-8").startswith(kept)

    (toy / "tests" / "test_area.py").write_text(TESTS + TEST_OF_UNUSED, encoding="utf-8")
    again = [one for _, one in measured(toy)]
    assert all(one["outcome"] == "killed" for one in again if one["function"] == "unused")
    assert len(again) == len(tried)


def test_a_module_that_cannot_be_imported_and_a_crash_are_kills(toy: Path) -> None:
    """Whatever ends the process of a mutant, the tests have noticed."""
    (toy / "toy" / "area.py").write_text(BRITTLE, encoding="utf-8")
    tests = "from toy.area import area\n\n\ndef test_area():\n    assert area(3) == 3\n"
    (toy / "tests" / "test_area.py").write_text(tests, encoding="utf-8")
    by = {(one["before"], one["after"]): one["by"] for _, one in measured(toy)}
    assert by["4", "5"] == "import"
    assert by["width == 77", "width != 77"] == "signal 6"


def test_nothing_is_measured_where_a_test_fails_anyway(toy: Path) -> None:
    """The failing test is named; what would all be kills is none."""
    (toy / "tests" / "test_area.py").write_text(TESTS + "\n\ndef test_wrong():\n    assert area(1) == 2\n")
    assert measured(toy) == [
        ["refused", "the tests must pass without a change, got exit code 1: tests/test_area.py::test_wrong"]
    ]


# --- samples, counts and tables -------------------------------------------------------------------


@pytest.fixture
def bench(load_benchmark: Callable[[str], ModuleType]) -> ModuleType:
    """The benchmark as a module."""
    return load_benchmark("mutation")


def test_a_smaller_sample_is_part_of_a_larger_one(bench: ModuleType) -> None:
    """Drawn with a seed, a share of each module, at least one."""
    everything = list(range(101))
    samples = [bench.drawn(everything, share, "m.py") for share in (0.001, 0.1, 0.5, 1.0)]
    assert [len(sample) for sample in samples] == [1, 11, 51, 101]
    for smaller, larger in pairwise(samples):
        assert larger[: len(smaller)] == smaller
    assert samples[2] != everything[:51]
    assert samples[2] == bench.drawn(everything, 0.5, "m.py") != bench.drawn(everything, 0.5, "other.py")


@pytest.mark.parametrize(("hits", "total"), [(0, 5), (5, 5), (3, 7), (850, 1000)])
def test_intervals_are_wilson_s(load_benchmark: Callable[[str], ModuleType], hits: int, total: int) -> None:
    """As SciPy has them; of nothing everything is possible."""
    wilson = load_benchmark("mutation_tables").wilson
    expected = binomtest(hits, total).proportion_ci(0.95, method="wilson")
    assert wilson(hits, total) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert wilson(0, 0) == (0.0, 1.0)


def tried_of(tables: ModuleType, module: str, outcomes: str) -> list[Any]:
    """One for each letter: killed, timeout, survived, and survived with a reason (e)."""
    words = {"k": "killed", "t": "timeout", "s": "survived", "e": "survived"}
    return [
        tables.Tried(
            *(module[0], module, "f", line, "swap_op", f"a + {line} | b", f"a - {line} | b"),
            *(words[letter], "", 1, 0.1, "it is alike" if letter == "e" else ""),
        )
        for line, letter in enumerate(outcomes)
    ]


@pytest.mark.parametrize(
    ("outcomes", "size", "subject_met", "all_met"),
    [
        ("k" * 17 + "t" * 0 + "s" * 3, 20, True, True),
        ("k" * 16 + "t" * 1 + "e" * 3, 20, True, True),
        ("k" * 16 + "s" * 4, 20, False, False),
        ("k" * 16 + "s" * 4, 400, True, False),
        ("k" * 10 + "s" * 10, 400, False, False),
    ],
    ids=[
        "just met",
        "by time, with reasons",
        "missed",
        "a sample that may be better",
        "a sample that is not",
    ],
)
def test_targets_hold_for_all_and_for_each_subject(
    load_benchmark: Callable[[str], ModuleType], outcomes: str, size: int, subject_met: bool, all_met: bool
) -> None:
    """85 % of those tried, survivors with a reason included; a subject's sample by its interval."""
    tables = load_benchmark("mutation_tables")
    rows = tables.rows_of(tried_of(tables, "x.py", outcomes), {"x.py": size})
    assert [row["met"] for row in rows["subjects"]] == [subject_met, all_met]
    row = rows["subjects"][0]
    assert row["killed"] + row["survived"] == row["tried"] == len(outcomes)
    assert row["timeouts"] == outcomes.count("t")
    assert row["explained"] == outcomes.count("e")


def test_the_tables_show_every_survivor_with_its_reason(load_benchmark: Callable[[str], ModuleType]) -> None:
    """In the document by reason; on the terminal those that have none."""
    tables = load_benchmark("mutation_tables")
    tried = [*tried_of(tables, "x.py", "kkse"), *tried_of(tables, "y.py", "kk")]
    rows = tables.rows_of(tried, {"x.py": 4, "y.py": 2})
    survivors = [
        {name: getattr(one, name) for name in ("module", "function", "line", "before", "after", "reason")}
        for one in tried
        if not one.is_killed
    ]
    document = {
        "share_tried": 0.5,
        "seed": 0,
        "mutmut": "3",
        "torch": "2",
        "python": "3",
        "survivors": survivors,
    }
    page = tables.render_markdown({**document, **rows})
    assert "50% of each module's mutants, drawn with seed 0" in page
    assert "### it is alike" in page
    assert "### no reason known" in page
    assert "`` a + 2 \\| b `` → `` a - 2 \\| b ``" in page
    assert "| `x` | 4 | 4 | 2 | 0 | 2 | 0.500" in page
    assert tables.render_survivors(tried) == "x.py:2: swap_op: a + 2 | b -> a - 2 | b"
    told = tables.render(rows)
    assert "MISSED" in told
    assert "x.py" in told


@pytest.mark.parametrize(
    ("before", "after", "shown"),
    [
        ("f(a, b)", "f(a, None)", ("f(a, b)", "f(a, None)")),
        ("x" * 50 + "+" + "y" * 50, "x" * 50 + "-" + "y" * 50, (f"…{'x' * 24}{s}{'y' * 24}…" for s in "+-")),
        ("aa", "a", ("aa", "a")),
    ],
)
def test_long_changes_are_shown_around_what_changed(
    load_benchmark: Callable[[str], ModuleType], before: str, after: str, shown: Any
) -> None:
    """24 characters on either side, and no character twice."""
    assert load_benchmark("mutation_tables").shortened(before, after) == tuple(shown)


# --- the subjects and their reasons ---------------------------------------------------------------


def test_subjects_are_of_modules_and_tests_that_exist(bench: ModuleType) -> None:
    """All losses, decoding, targets, policies, counts and controllers, each in one subject."""
    modules = [module for subject in bench.SUBJECTS.values() for module in subject.modules]
    assert len(set(modules)) == len(modules)
    for path in [*modules, *(test for subject in bench.SUBJECTS.values() for test in subject.tests)]:
        assert (ROOT / path).is_file(), path
    for folder in ("losses", "inference"):
        for path in (ROOT / "scm" / folder).glob("[!_]*.py"):
            assert str(path.relative_to(ROOT)) in modules


def test_every_reason_is_of_something_that_exists(bench: ModuleType) -> None:
    """A pattern of modules fits one of the subjects', and of functions one of theirs; no reason is empty."""
    modules = [module for subject in bench.SUBJECTS.values() for module in subject.modules]
    for reason in bench.read_reasons():
        fitting = [module for module in modules if bench.fnmatchcase(module, reason.module)]
        assert fitting, reason
        names = {""}
        for module in fitting:
            tree = ast.parse((ROOT / module).read_text(encoding="utf-8"))
            names |= {f"{outer}{name}" for outer, name in _functions(tree)}
        assert any(bench.fnmatchcase(name, reason.function) for name in names), reason
        assert reason.reason.strip()


def _functions(tree: ast.AST, outer: str = "") -> list[tuple[str, str]]:
    found = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found += [(outer, node.name), *_functions(node, f"{outer}{node.name}.")]
    return found


# --- the command ----------------------------------------------------------------------------------


def test_the_help_states_target_and_exit_codes(bench: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever asks what the benchmark wants is told."""
    with pytest.raises(SystemExit):
        bench.main(["--help"])
    told = capsys.readouterr().out
    assert "target: 85%" in told
    assert "Exit code" in told


def test_without_mutmut_nothing_can_be_measured(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """That is no missed target, and the message says what to install."""
    for name in ("mutants", "mutant_trials", "mutmut"):
        monkeypatch.setitem(sys.modules, name, None)
    assert bench.main(["--quick"]) == 2
    assert ".[dev,mutation]" in capsys.readouterr().err
