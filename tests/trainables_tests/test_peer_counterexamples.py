"""The table of what the laws find in the peer library, and when it counts as complete."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from harness.robustness.properties import PROPERTIES

pytest.importorskip("zeroproofml")
pytestmark = pytest.mark.peer
ROOT = Path(__file__).parents[2]


@pytest.fixture
def bench(load_benchmark: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The benchmark, beside which its adapter lies, with a few laws alone."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    module = load_benchmark("peer_counterexamples")
    names = ("implicit_loss_is_bounded", "coverage_is_in_range_for_any_batch", "decoding_knows_signs")
    monkeypatch.setattr(module, "PROPERTIES", {name: PROPERTIES[name] for name in names})
    monkeypatch.setattr(module, "KNOWN", {group: module.KNOWN[group] for group in (3, 17)})
    return module


def test_known_counterexamples_are_found_and_shown(
    bench: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 0, a line for each law, and the verdicts as JSON and Markdown."""
    paths = tmp_path / "found.json", tmp_path / "found.md"
    assert bench.main(["--quick", "--json", str(paths[0]), "--markdown", str(paths[1])]) == 0
    said = capsys.readouterr().out
    assert "| 17 | `coverage_is_in_range_for_any_batch` | broken |" in said
    assert "1 laws hold, 2 are broken" in said
    held = json.loads(paths[0].read_text())
    assert [law["status"] for law in held["laws"]] == ["broken", "broken", "holds"]
    assert held["missed"] == []
    assert "| law |" in paths[1].read_text()


def test_a_known_counterexample_that_is_not_found_is_an_error(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 1, naming the group."""
    monkeypatch.setitem(bench.KNOWN, 13, ("signs are lost", ("decoding_knows_signs",)))
    assert bench.main(["--quick"]) == 1
    assert "known counterexample not found: group 13: signs are lost" in capsys.readouterr().out


def test_what_breaks_and_was_not_known_is_said(bench: ModuleType) -> None:
    """It belongs to no group of the known ones."""
    law = replace(PROPERTIES["decoding_knows_signs"], group=99)
    found = [bench.Found(law, "broken", "", "", 0.0)]
    assert bench.unknown(found) == ["decoding_knows_signs"]
