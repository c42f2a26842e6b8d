"""The calibration of the gate: what it plays is what was recorded, and a bad recording is refused."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from harness.gate.decision import FAIL, PASS


@pytest.fixture
def calibration(load_benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return load_benchmark("gate_calibration")


def quiet(calibration: ModuleType, spread: float = 0.0) -> dict[tuple[str, str], np.ndarray]:
    """A recording of one scenario in which both arms differ by normal noise, as a share of each margin."""
    source = np.random.default_rng(0)
    found = {}
    for rule in calibration.RULES.metrics:
        noise = source.normal(0.0, spread * rule.margin, (40, 2))
        found["s", rule.metric] = np.exp(noise) if rule.compare == "log_ratio" else 0.5 + noise
    return found


def test_the_recording_that_is_there_has_all_that_is_played(calibration: ModuleType) -> None:
    """Every scenario and metric, more pairs than the last look has seeds; a model may accept nothing."""
    recorded = calibration.by_metric(calibration.read_pairs())
    assert {metric for _, metric in recorded} == {rule.metric for rule in calibration.RULES.metrics}
    assert all(len(pairs) >= calibration.RULES.looks[-1] for pairs in recorded.values())
    assert all((np.isnan(pairs) | (pairs >= 0)).all() for pairs in recorded.values())


def test_without_noise_no_change_passes_and_every_harm_fails(calibration: ModuleType) -> None:
    """At the first look, and a harm of the size of a margin as well."""
    played = calibration.play_all(quiet(calibration), 4)
    for one in played:
        assert one.counts == {PASS if one.question.startswith("no change") else FAIL: one.gates}
        assert one.seeds == one.gates * calibration.RULES.looks[0]
    assert all(met for met, _ in calibration.check_targets(played))


def test_noise_as_large_as_the_margins_misses_a_target(calibration: ModuleType) -> None:
    """What is as loud as twice its margin hides a harm of that size."""
    played = calibration.play_all(quiet(calibration, 2.0), 4)
    met = dict(
        zip(
            ["quiet", "lost", "slow", "metric", "gate", "loud"],
            calibration.check_targets(played),
            strict=True,
        )
    )
    assert not met["slow"][0]
    assert "MISSED" in met["slow"][1]
    assert any("INCONCLUSIVE" in line for line in calibration.gates_table(played))


def test_arms_are_drawn_pair_by_pair(calibration: ModuleType) -> None:
    """A seed's values of both arms are one recorded pair, coverage and error of the same training."""
    pairs = np.column_stack([np.arange(40.0), np.arange(40.0) + 0.5]) + 1.0
    recorded = {("s", rule.metric): pairs for rule in calibration.RULES.metrics}
    arms = calibration.draw(recorded, np.random.default_rng(1))
    for base, candidate in arms.values():
        assert set(np.abs(base - candidate)) == {0.5}
    assert np.array_equal(arms["s", "coverage"][0], arms["s", "accepted_error"][0])
    assert not np.array_equal(arms["s", "coverage"][0], arms["s", "step_time_ms"][0])


def test_unrelated_trainings_are_those_recorded_in_other_pairs(calibration: ModuleType) -> None:
    """Coverage and error still come from the same training, launches stay the pairs that they are."""
    pairs = np.column_stack([np.arange(40.0), np.arange(40.0) + 0.5])
    recorded = {("s", rule.metric): pairs for rule in calibration.RULES.metrics}
    found = calibration.unrelated(recorded)
    assert np.array_equal(found["s", "step_time_ms"], pairs)
    assert np.array_equal(found["s", "coverage"], found["s", "accepted_error"])
    assert np.array_equal(np.sort(found["s", "coverage"], axis=0), pairs)
    assert not np.array_equal(found["s", "coverage"], pairs)


def write(folder: Path, rows: list[list[object]]) -> Path:
    with (folder / "pairs.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return folder


def test_a_recording_that_is_none_is_refused(calibration: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must have the columns scenario, metric, number, first, second"):
        calibration.read_pairs(write(tmp_path, [["a", "b"]]))
    head = ["scenario", "metric", "number", "first", "second"]
    with pytest.raises(ValueError, match="the recording is empty"):
        calibration.by_metric(calibration.read_pairs(write(tmp_path, [head])))
    few = calibration.read_pairs(write(tmp_path, [head, ["s", "coverage", 0, 0.5, 0.5]]))
    with pytest.raises(ValueError, match="too few pairs of coverage of s"):
        calibration.by_metric(few)
