"""The table of failures: what its rows hold, when it says no, and that the documents show its rows."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

ROOT = Path(__file__).parents[2]
IDS = (
    *("F1a", "F1b", "F1c", "F1d", "F1e", "F2", "F2b", "F2c", "F2d", "F3", "F4", "F5", "F5b", "F6", "F7"),
    *("F7b", "F8", "F9", "F10"),
    *(f"outcome_{number}" for number in range(1, 7)),
)
# Those that train nothing, or next to nothing.
FAST = ("F1a", "F1b", "F1c", "F1d", "F2d", "F4", "F7b", "F9", "F10")


@pytest.fixture
def bench(load_benchmark: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The benchmark's module, beside which its cases lie."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return load_benchmark("failure_modes")


@pytest.fixture
def make_target(bench: ModuleType) -> Callable[..., Any]:
    """The class of the cases' targets."""
    from failures.measuring import Target

    return Target


@pytest.fixture
def made_up(
    bench: ModuleType, make_target: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., None]:
    """Have every case come to the same numbers at once, and ask that the guard's is 1."""

    def put(**numbers: Any) -> None:
        held = {"without_guard": 0.0, "with_guard": 1.0, "clean": 1.0, "clean_with_guard": 1.0}
        found = bench.Found(**{**held, "clean_change": 0.0, **numbers})
        target = make_target("with_guard", "==", 1.0)
        for name, case in bench.CASES.items():
            replaced = replace(case, run=lambda setting: found, targets=(target,))
            monkeypatch.setitem(bench.CASES, name, replaced)

    return put


def test_every_failure_and_every_outcome_is_a_case(bench: ModuleType) -> None:
    """Nineteen and six; each says what is done, why it fails and what guards, and asks for both arms."""
    assert tuple(bench.CASES) == IDS
    for case in bench.CASES.values():
        assert all((case.trigger, case.mechanism, case.measure, case.guard, case.run.__doc__))
        asked = {target.name for target in case.targets}
        assert {"with_guard"} <= asked
        assert asked & {"clean_change", "clean_with_guard"}, case.id


@pytest.mark.parametrize("name", FAST)
def test_a_case_holds_when_measured(bench: ModuleType, name: str) -> None:
    """The failure is there without the guard and not with it, and the healthy run is the same."""
    [measured] = bench.run_cases([bench.CASES[name]], [3], torch.device("cpu"))
    assert measured.missed == []
    assert measured.row()["id"] == name


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in IDS if name not in FAST])
def test_a_case_that_trains_holds_when_measured(bench: ModuleType, name: str) -> None:
    """As above, for those that train for longer."""
    [measured] = bench.run_cases([bench.CASES[name]], bench.SEEDS[:1], torch.device("cpu"))
    assert measured.missed == []


def test_the_same_seed_measures_the_same(bench: ModuleType) -> None:
    """Two runs agree in every number, whatever was drawn in between."""
    case, device = bench.CASES["F4"], torch.device("cpu")
    [first] = bench.run_cases([case], [0], device)
    torch.randn(7)
    [again] = bench.run_cases([case], [0], device)
    assert first.found == again.found


@pytest.mark.parametrize(
    ("value", "rule", "limit", "beside", "holds"),
    [
        (1.0, "==", 1.0, "", True),
        (1.1, "==", 1.0, "", False),
        (0.9, ">=", -0.2, "clean", True),
        (0.7, ">=", -0.2, "clean", False),
        (math.nan, "<=", 1.0, "", False),
        (math.nan, ">=", 1.0, "", False),
        (math.nan, "is nan", 0.0, "", True),
        (0.0, "is nan", 0.0, "", False),
    ],
)
def test_a_target_holds_where_its_number_keeps_the_bound(
    bench: ModuleType,
    make_target: Callable[..., Any],
    value: float,
    rule: str,
    limit: float,
    beside: str,
    holds: bool,
) -> None:
    """Against a number, or beside another one; nan keeps no bound but that it is nan."""
    found = bench.Found(
        without_guard=0.0, with_guard=value, clean=1.0, clean_with_guard=1.0, clean_change=0.0
    )
    assert make_target("with_guard", rule, limit, beside).holds(found) is holds


def test_a_number_that_was_not_measured_keeps_no_bound(
    bench: ModuleType, make_target: Callable[..., Any]
) -> None:
    """A published remedy that is asked for and absent is a miss."""
    found = bench.Found(without_guard=0.0, with_guard=0.0, clean=0.0, clean_with_guard=0.0, clean_change=0.0)
    assert not make_target("reference_rule", "<=", 1.0).holds(found)


@pytest.mark.parametrize(("with_guard", "code"), [(1.0, 0), (0.0, 1), (math.nan, 1)])
def test_the_exit_code_says_whether_every_target_is_met(
    bench: ModuleType,
    made_up: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    with_guard: float,
    code: int,
) -> None:
    """One missed target is enough for 1, and is named with its seed."""
    made_up(with_guard=with_guard)
    assert bench.main(["--quick"]) == code
    told = capsys.readouterr().out
    assert ("MISSED" in told) is (code == 1)
    assert ("seed 0: with_guard == 1" in told) is (code == 1)
    assert all(re.search(rf"^{name} ", told, re.M) for name in IDS)


def test_the_parquet_has_one_typed_row_for_each_case_and_seed(
    bench: ModuleType, made_up: Callable[..., None], tmp_path: Path
) -> None:
    """With the declared schema; a measured nan is nan, and a remedy that nobody published is null."""
    made_up(without_guard=math.nan, more={"passed_over": 3.0})
    file = tmp_path / "rows.parquet"
    assert bench.main(["--parquet", str(file)]) == 0
    table = pq.read_table(file, page_checksum_verification=True)
    assert table.schema.equals(bench.SCHEMA)
    pairs = list(zip(table["id"].to_pylist(), table["seed"].to_pylist(), strict=True))
    assert pairs == [(name, seed) for name in IDS for seed in bench.SEEDS]
    assert all(math.isnan(value) for value in table["without_guard"].to_pylist())
    assert table["reference_rule"].null_count == table.num_rows
    assert table["more"].to_pylist()[0] == [("passed_over", 3.0)]
    assert set(table["group"].to_pylist()) == {"failure", "outcome"}
    assert pa.types.is_boolean(table.schema.field("met").type)


def test_the_json_is_strict(bench: ModuleType, made_up: Callable[..., None], tmp_path: Path) -> None:
    """Numbers that JSON has no word for are null, so that every parser reads the file."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    made_up(without_guard=math.nan, more={"first": math.inf})
    file = tmp_path / "out.json"
    assert bench.main(["--quick", "--ids", "F2", "F10", "--json", str(file)]) == 0
    rows = json.loads(file.read_text(encoding="utf-8"), parse_constant=refuse)["rows"]
    assert [row["id"] for row in rows] == ["F2", "F10"]
    assert rows[0]["without_guard"] is None
    assert rows[0]["more"] == {"first": None}
    assert rows[0]["met"] is True


def test_the_tables_go_between_the_marks_of_a_page(
    bench: ModuleType, made_up: Callable[..., None], tmp_path: Path
) -> None:
    """What a person wrote around them stays; a second run replaces the first; a file without marks is new."""
    made_up()
    page = tmp_path / "page.md"
    page.write_text("Before.\n\n<!-- measured -->\nOF LAST TIME\n<!-- end -->\n\nAfter.\n", encoding="utf-8")
    assert bench.main(["--quick", "--markdown", str(page)]) == 0
    assert bench.main(["--quick", "--markdown", str(page)]) == 0
    text = page.read_text(encoding="utf-8")
    assert text.startswith("Before.\n\n<!-- measured -->\n\nMeasured with torch")
    assert text.endswith("<!-- end -->\n\nAfter.\n")
    assert "OF LAST TIME" not in text
    assert _documented(text) == [*IDS, *IDS]
    fresh = tmp_path / "fresh.md"
    assert bench.main(["--quick", "--ids", "F3", "--markdown", str(fresh)]) == 0
    assert _documented(fresh.read_text(encoding="utf-8")) == ["F3", "F3"]


def test_the_document_shows_the_rows_that_there_are(bench: ModuleType) -> None:
    """docs/failure_modes.md has every case in both of its tables, in order, all targets met at every seed."""
    text = (ROOT / "docs" / "failure_modes.md").read_text(encoding="utf-8")
    assert _documented(text) == [*IDS, *IDS]
    assert "missed" not in text
    assert f"seeds {', '.join(map(str, bench.SEEDS))}" in text
    for case in bench.CASES.values():
        assert f"| {case.id} | {case.trigger} | {case.mechanism} | {case.guard} |" in text


def _documented(text: str) -> list[str]:
    return re.findall(r"^\| (F\d+\w?|outcome_\d) \|", text, re.M)


def test_a_span_shows_how_far_seeds_differ(bench: ModuleType) -> None:
    """One number where three digits are alike, both ends where not, and nan where one seed had it."""
    assert bench._span([0.5, 0.50001]) == "0.5"
    assert bench._span([0.25, 0.75, 0.5]) == "0.25 to 0.75"
    assert bench._span([0.25, math.nan]) == "nan"
    assert bench._span([None, None]) == ""


def test_without_the_puzzles_there_are_no_outcomes(
    bench: ModuleType,
    made_up: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The missing file is named, and is no missed target; the failures can be had without it."""
    import grid_outcomes

    made_up()
    monkeypatch.setattr(grid_outcomes, "DATA", tmp_path / "absent.json")
    grid_outcomes.grid_task.cache_clear()
    assert bench.main(["--quick"]) == 2
    assert "cannot read" in capsys.readouterr().err
    assert bench.main(["--quick", "--ids", "F1a"]) == 0


def test_the_help_states_the_targets(bench: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever asks what the benchmark wants is told every bound of every case, and the exit codes."""
    with pytest.raises(SystemExit):
        bench.main(["--help"])
    told = capsys.readouterr().out
    for case in bench.CASES.values():
        assert ", ".join(map(str, case.targets)) in told
    assert "Exit code" in told
