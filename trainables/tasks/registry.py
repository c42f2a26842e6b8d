"""Which tasks exist: a table with one line per task, and the way from a plan's words to a task object.

A task is loaded when it is made, so that listing the names needs no torch.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainables.tasks.protocol import Task, TaskError, check_task, nearest

# By convention the parameter "data" of every task is a file, relative to the plan's folder.
PATH_PARAMETER = "data"


@dataclass(frozen=True, slots=True)
class TaskEntry:
    """A task of this project: where its factory is, and one line on what it is."""

    factory: str
    summary: str

    def __call__(self, params: Mapping[str, Any]) -> Task:
        """Make the task from its parameters (paths already resolved)."""
        module, _, attribute = self.factory.partition(":")
        task: Task = getattr(importlib.import_module(module), attribute)(params)
        return task


TASKS: dict[str, TaskEntry] = {
    "table": TaskEntry("trainables.tasks.table:make_table_task", "any CSV or Parquet file of your own"),
    "dose": TaskEntry("trainables.tasks.dose:make_dose_task", "censored dose-response curves (generated)"),
    "rf": TaskEntry("trainables.tasks.rf:make_rf_task", "resonators beyond the trained quality (generated)"),
    "rr_ik": TaskEntry(
        "trainables.tasks.rr_ik:make_rr_ik_task", "inverse kinematics of a planar 2R arm (generated)"
    ),
    "grid": TaskEntry("trainables.tasks.grid:make_grid_task", "puzzles of coloured grids (ARC), few shown"),
}


def make_task(name: str, params: Mapping[str, Any], base_dir: Path) -> Task:
    """Make the task that a plan names: a name of `TASKS`, or `module:attribute` for one of the user's own.

    A relative path in the parameter "data" is taken from `base_dir` (the plan's folder), and so are the
    user's modules. Raises `TaskError` when the task is unknown, lacks a method, or refuses its parameters
    or data.
    """
    resolved = _resolve_data(params, base_dir)
    if ":" in name:
        return _make_own_task(name, resolved, base_dir)
    if name not in TASKS:
        raise TaskError(
            f"unknown task {name!r}{nearest(name, TASKS)}; a task of your own is named 'module:attribute'"
        )
    return TASKS[name](resolved)


def _resolve_data(params: Mapping[str, Any], base_dir: Path) -> dict[str, Any]:
    resolved = dict(params)
    data = resolved.get(PATH_PARAMETER)
    if isinstance(data, str):
        resolved[PATH_PARAMETER] = str(base_dir / Path(data).expanduser())
    return resolved


def _make_own_task(name: str, params: Mapping[str, Any], base_dir: Path) -> Task:
    module_name, _, attribute = name.partition(":")
    found = _load_attribute(module_name, attribute, base_dir)
    is_factory = isinstance(found, type) or (callable(found) and not hasattr(found, "splits"))
    if is_factory:
        found = found(params)
    elif params:
        raise TaskError(
            f"{name} is a task object and takes no parameters, got {sorted(params)}; "
            "name a class or a function of one mapping to take them"
        )
    check_task(found, name)
    task: Task = found
    return task


def _load_attribute(module_name: str, attribute: str, base_dir: Path) -> Any:
    if not module_name or not attribute:
        raise TaskError(
            f"a task of your own is named 'module:attribute', got {module_name + ':' + attribute!r}"
        )
    module = _import_from(module_name, base_dir)
    found: Any = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            names = [item for item in vars(module) if not item.startswith("_")]
            raise TaskError(f"module {module_name!r} has no {attribute!r}{nearest(attribute, names)}")
        found = getattr(found, part)
    return found


def _import_from(module_name: str, base_dir: Path) -> Any:
    """Import a module with the plan's folder first on the path, and leave the folder last on it.

    First, so that the user's file wins; last afterwards, so that a `random.py` beside the plan does not
    become everybody's `random`, while the user's own later imports are still found.
    """
    folder = str(base_dir.resolve())
    own_file = base_dir.resolve().joinpath(*module_name.split(".")).with_suffix(".py")
    loaded = sys.modules.get(module_name)
    loaded_file = getattr(loaded, "__file__", None)
    if loaded_file is not None and own_file.is_file() and Path(loaded_file).resolve() != own_file:
        raise TaskError(
            f"module {module_name!r} is already loaded from {loaded_file}; "
            f"rename {own_file} to use it as a task"
        )
    if folder not in sys.path:
        sys.path.append(folder)
    sys.path.insert(0, folder)
    importlib.invalidate_caches()
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module_name.split(".")[0]:
            raise TaskError(f"module {module_name!r} needs {error.name!r}, which is not installed") from error
        raise TaskError(f"no module {module_name!r} in {folder} nor on the Python path") from error
    except Exception as error:  # whatever the user's file does at import is his to see, in one line
        raise TaskError(f"module {module_name!r} fails on import: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(folder)
