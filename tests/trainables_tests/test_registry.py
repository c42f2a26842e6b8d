"""From a plan's words to a task: names of the table, and the user's own modules."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from trainables.tasks.protocol import TaskError
from trainables.tasks.registry import TASKS, make_task

METHODS = {
    "splits": "def splits(self, seed): return {}",
    "build_model": "def build_model(self, config): return None",
    "make_loss": "def make_loss(self, config): return None",
    "metrics": "def metrics(self, decoded, split, config): return {}",
}


@pytest.fixture(autouse=True)
def _path_as_before() -> Iterator[None]:
    """What a test imports from its own folder is gone after it."""
    path, modules = list(sys.path), set(sys.modules)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if name.startswith("mine_"):
            del sys.modules[name]


def write_module(
    folder: Path, name: str, leave_out: str = "", init: str = "def __init__(self, params): pass"
) -> None:
    lines = ["class Mine:", f"    {init}"]
    lines += [f"    {name} = 'mine'" for name in ("name", "error_unit") if name != leave_out]
    lines += [f"    {text}" for method, text in METHODS.items() if method != leave_out]
    (folder / f"{name}.py").write_text("\n".join(lines) + "\n", encoding="utf-8")


def test_relative_data_starts_at_the_plans_folder(nh4: dict[str, Any]) -> None:
    """The same plan works from any working directory."""
    path = Path(nh4["data"])
    task = make_task("table", nh4 | {"data": f"../data/{path.name}"}, path.parents[1] / "examples")
    assert len(task.splits(0)["train"]) == 61


@pytest.mark.parametrize(
    "name, message",
    [
        ("tabel", "unknown task 'tabel'; did you mean 'table'.*known: table"),
        ("zzz", "unknown task 'zzz'; known: table"),
        ("mine_none:Mine", "no module 'mine_none' in "),
        ("mine_ok:Mni", "module 'mine_ok' has no 'Mni'; did you mean 'Mine'"),
        (":Mine", "named 'module:attribute', got ':Mine'"),
        ("mine_ok:", "named 'module:attribute', got 'mine_ok:'"),
    ],
)
def test_unknown_task_names_what_is_known(name: str, message: str, tmp_path: Path) -> None:
    """A name that leads nowhere says so in one line, with the nearest that leads somewhere."""
    write_module(tmp_path, "mine_ok")
    with pytest.raises(TaskError, match=message) as caught:
        make_task(name, {}, tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("leave_out", ["name", "error_unit", *METHODS])
def test_own_task_that_lacks_a_member_is_told_which(leave_out: str, tmp_path: Path) -> None:
    """An object that is no task yet is refused before the sweep, by the name of what is missing."""
    write_module(tmp_path, f"mine_without_{leave_out}", leave_out)
    with pytest.raises(TaskError, match=f"is no task: it lacks the .*{leave_out}"):
        make_task(f"mine_without_{leave_out}:Mine", {}, tmp_path)


def test_own_task_may_be_a_class_a_function_or_an_object(tmp_path: Path) -> None:
    """A class or function is called with the parameters, an object is taken as it is."""
    write_module(tmp_path, "mine_three", init="def __init__(self, params): self.params = params")
    with (tmp_path / "mine_three.py").open("a", encoding="utf-8") as file:
        file.write("def make(params): return Mine(params)\nready = Mine({})\n")
    for attribute in ("Mine", "make"):
        task: Any = make_task(f"mine_three:{attribute}", {"rows": 3}, tmp_path)
        assert task.params == {"rows": 3}
    assert make_task("mine_three:ready", {}, tmp_path).name == "mine"
    with pytest.raises(TaskError, match=r"is a task object and takes no parameters, got .'rows'."):
        make_task("mine_three:ready", {"rows": 3}, tmp_path)


def test_module_that_fails_on_import_is_one_line(tmp_path: Path) -> None:
    """What the user's file raises, and what it lacks, is said without a traceback."""
    (tmp_path / "mine_broken.py").write_text("raise RuntimeError('first\\nsecond')\n", encoding="utf-8")
    (tmp_path / "mine_needy.py").write_text("import mine_not_there.at_all\n", encoding="utf-8")
    with pytest.raises(TaskError, match="'mine_broken' fails on import: RuntimeError: first second"):
        make_task("mine_broken:Mine", {}, tmp_path)
    with pytest.raises(TaskError, match="'mine_needy' needs 'mine_not_there', which is not installed"):
        make_task("mine_needy:Mine", {}, tmp_path)


def test_module_of_one_name_in_two_folders_is_refused(tmp_path: Path) -> None:
    """The second folder's file would be silently ignored: the first is loaded under its name."""
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        write_module(tmp_path / folder, "mine_twice")
    make_task("mine_twice:Mine", {}, tmp_path / "one")
    with pytest.raises(TaskError, match=r"'mine_twice' is already loaded from .*one.*; rename .*two"):
        make_task("mine_twice:Mine", {}, tmp_path / "two")


def test_plans_folder_does_not_shadow_what_is_installed(tmp_path: Path) -> None:
    """A file named like a library, beside the plan, is not taken for the library later."""
    write_module(tmp_path, "mine_shadow")
    (tmp_path / "graphlib.py").write_text("raise RuntimeError('shadowed')\n", encoding="utf-8")
    make_task("mine_shadow:Mine", {}, tmp_path)
    assert sys.path.index(str(tmp_path)) == len(sys.path) - 1


def test_every_line_of_the_table_leads_to_a_factory_with_a_summary() -> None:
    """The names that messages and the command line show can be made."""
    for name, entry in TASKS.items():
        assert entry.summary, name
        with pytest.raises(TaskError, match="unknown parameter 'no_such_parameter'"):
            entry({"no_such_parameter": 1})
