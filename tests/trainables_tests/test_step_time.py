"""The timing against the peer: its exit codes, and what its files and its help say."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture
def bench(load_benchmark: Callable[[str], ModuleType]) -> ModuleType:
    """The benchmark's module."""
    return load_benchmark("step_time")


def _measured(bench: ModuleType, us: float) -> Callable[..., list[Any]]:
    """Stand-in for the measurement: ours takes `us` microseconds in both cases, the peer's 1000."""

    def run_cases(*_: Any, **__: Any) -> list[Any]:
        return [
            bench.compare(case, lambda: us, lambda: 1000.0, rounds=3, device="cpu") for case in bench.TARGETS
        ]

    return run_cases


@pytest.mark.parametrize(
    ("us", "code"), [(700.0, 0), (701.0, 1), (901.0, 1)], ids=["met", "one missed", "both missed"]
)
@pytest.mark.usefixtures("with_peer")
def test_the_exit_code_says_whether_both_targets_are_met(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, us: float, code: int
) -> None:
    """One missed target is enough for 1; the file says of each case whether it was met."""
    monkeypatch.setattr(bench, "run_cases", _measured(bench, us))
    file = tmp_path / "out.json"
    assert bench.main(["--quick", "--device", "cpu", "--json", str(file)]) == code
    cases = json.loads(file.read_text(encoding="utf-8"))["cases"]
    assert [case["target"] for case in cases] == list(bench.TARGETS.values())
    assert [case["met"] for case in cases] == [us / 1000 <= target for target in bench.TARGETS.values()]


def test_a_measured_run_misses_targets_out_of_reach(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No step takes no time: with targets of 0 a real run ends with 1."""
    pytest.importorskip("zeroproofml", reason="the peer is an extra")
    monkeypatch.setattr(bench, "TARGETS", dict.fromkeys(bench.TARGETS, 0.0))
    assert bench.main(["--quick", "--device", "cpu"]) == 1


def test_without_the_peer_there_is_nothing_to_compare(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The missing package is named with the way to install it, and is no missed target."""
    monkeypatch.setitem(sys.modules, "zeroproofml", None)
    monkeypatch.setitem(sys.modules, "zeroproofml.losses", None)
    assert bench.main(["--quick"]) == 2
    assert "pip install 'scm-harness[peer]'" in capsys.readouterr().err


def test_the_help_states_the_targets(bench: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever asks what the benchmark wants is told both ratios and the exit codes."""
    with pytest.raises(SystemExit):
        bench.main(["--help"])
    told = capsys.readouterr().out
    assert all(f"{target:.2f}" in told for target in bench.TARGETS.values())
    assert "Exit code" in told
