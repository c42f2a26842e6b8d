"""The example data sets as task parameters, small tables made on the spot, and the benchmarks as modules."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

NH4: dict[str, Any] = {
    "data": str(ROOT / "data" / "nh4.csv"),
    "inputs": ["Week", "Date.On"],
    "target": "NH4.mg.per.L",
    "target_transform": "log",
    "status": {"column": "Censored", "values": {"TRUE": "censored_below", "FALSE": "finite"}},
}
GBSG2: dict[str, Any] = {
    "data": str(ROOT / "data" / "gbsg2.csv"),
    "inputs": ["horTh", "age", "menostat", "tsize", "tgrade", "pnodes", "progrec", "estrec"],
    "target": "time",
    "target_transform": "log",
    "status": {"column": "cens", "values": {"1": "finite", "0": "censored_above"}},
}


@pytest.fixture
def nh4() -> dict[str, Any]:
    """Parameters of the task `table` on the ammonium data."""
    return dict(NH4)


@pytest.fixture
def gbsg2() -> dict[str, Any]:
    """Parameters of the task `table` on the breast cancer data."""
    return dict(GBSG2)


@pytest.fixture
def write_csv(tmp_path: Path) -> Callable[..., str]:
    """Write columns given by name as a CSV file; None is an empty cell."""

    def write(name: str = "data.csv", /, **columns: list[Any]) -> str:
        lines = [",".join(columns)]
        for row in zip(*columns.values(), strict=True):
            lines.append(",".join("" if cell is None else str(cell) for cell in row))
        path = tmp_path / name
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def load_benchmark(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Load a script of the folder `benchmarks`, which lies outside of the packages, as a module."""

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.syspath_prepend(ROOT / "benchmarks")  # a script finds what lies beside it
        monkeypatch.setitem(sys.modules, name, module)  # where its dataclasses look up their annotations
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture
def with_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer that can be found and imported, whether installed or not; nothing in it is called."""
    peer = ModuleType("zeroproofml")
    peer.__spec__ = ModuleSpec("zeroproofml", None)
    monkeypatch.setitem(sys.modules, "zeroproofml", peer)
    for part in ("losses", "training"):
        monkeypatch.setitem(sys.modules, f"zeroproofml.{part}", ModuleType(f"zeroproofml.{part}"))
        monkeypatch.setattr(peer, part, None, raising=False)
