"""The arrows between the rooms: harness uses the three beside it, trainables uses scm, and nothing else."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("scm", "search_spaces", "trainables", "reports", "harness")
ARROWS = {
    "scm": set(),
    "search_spaces": set(),
    "reports": set(),
    "trainables": {"scm"},
    "harness": {"search_spaces", "trainables", "reports"},
}
# What a room may not load, however deep inside it the import stands.
FORBIDDEN = {
    "scm": {"ray", "pyarrow", "pydantic"},
    "search_spaces": {"ray", "torch", "pyarrow"},
    "reports": {"ray", "torch"},
    "trainables": {"pydantic"},
    "harness": set(),
}


def imported_roots(path: Path) -> set[str]:
    """Name the top-level packages that a file imports, wherever the import stands in it."""
    roots: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            roots.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            roots.add(node.module.partition(".")[0])
    return roots


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_along_its_arrows(room: str) -> None:
    """No file imports a room that has no arrow from its own, nor a library that its room must do without."""
    wrong = {
        str(path.relative_to(ROOT)): sorted(bad)
        for path in (ROOT / room).rglob("*.py")
        if (bad := imported_roots(path) & ((set(ROOMS) - {room} - ARROWS[room]) | FORBIDDEN[room]))
    }
    assert wrong == {}


def test_the_arrow_check_sees_an_import_inside_a_function(tmp_path: Path) -> None:
    """An import hidden in a function body counts like one at the top of the file."""
    source = tmp_path / "module.py"
    source.write_text("def f():\n    from harness.plan import Plan\n    import ray.tune\n", encoding="utf-8")
    assert imported_roots(source) == {"harness", "ray"}


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import harness.cli.main", {"torch", "ray", "pyarrow"}),
        ("import reports.ranking, reports.text", {"torch", "ray"}),
        ("import search_spaces.named", {"torch", "ray", "pyarrow"}),
        ("import scm.trial_config", {"torch", "ray"}),
    ],
    ids=["command line", "reports", "search_spaces", "trial_config"],
)
def test_what_must_start_fast_loads_no_heavy_library(statement: str, absent: set[str]) -> None:
    """`--help`, ranking and plans start without torch and Ray."""
    code = f"import sys\n{statement}\nprint(*sorted({absent!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == []
