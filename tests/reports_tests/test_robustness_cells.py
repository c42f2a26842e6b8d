"""Cells of the fault matrix: their file, what they are worth, and laws that no score may break."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reports.fragments import RunReadError
from reports.robustness_cells import (
    CELL_STATUSES,
    NOT_APPLICABLE,
    SEVERITIES,
    cell_schema,
    cells_table,
    planned_text,
    read_cells,
    read_scores,
    retained_quality,
    score_cells,
    score_schema,
    write_cells,
    write_scores,
)

FAULTS = ("flips", "poison", "spikes")
Rows = list[dict[str, Any]]


def made_up_cell(**changes: Any) -> dict[str, Any]:
    """A cell that lost nothing."""
    cell: dict[str, Any] = {
        "task": "toy",
        "config_id": "a",
        "trial_id": "a-s0",
        "seed": 0,
        "fault": "poison",
        "severity": "high",
        "status": "completed",
        "clean_status": "completed",
        "trivial_error": 5.0,
        "test_trivial_error": 5.0,
        "target_coverage": 0.5,
        "recovered": True,
    }
    for before in ("", "test_"):
        for whose in ("", "clean_"):
            cell |= {f"{whose}{before}charged_error": 2.0, f"{whose}{before}coverage": 0.8}
            cell[f"{whose}{before}false_accept_rate"] = 0.2
    return cell | changes


def grid(configs: str = "a", seeds: int = 2, **changes: Any) -> Rows:
    """All cells of some configs, with what was planned."""
    planned = planned_text(dict.fromkeys(FAULTS, SEVERITIES), range(seeds))
    return [
        made_up_cell(
            config_id=config,
            trial_id=f"{config}-s{seed}",
            seed=seed,
            fault=fault,
            severity=severity,
            planned=planned,
            **changes,
        )
        for config in configs
        for fault in FAULTS
        for severity in SEVERITIES
        for seed in range(seeds)
    ]


def score(rows: Rows, **told: Any) -> dict[str, Any]:
    """The only score of some cells."""
    (found,) = score_cells(cells_table(rows), resamples=told.get("resamples", 50)).to_pylist()
    return dict(found)


@pytest.mark.parametrize(
    ("changes", "retained"),
    [
        ({}, 1.0),
        ({"charged_error": 4.0}, 0.5),
        ({"charged_error": 1.0}, 1.0),
        ({"coverage": 0.4}, 0.5),
        ({"false_accept_rate": 0.6}, 0.5),
        ({"coverage": 0.0, "charged_error": 5.0, "false_accept_rate": 0.0}, 0.0),
        ({"charged_error": math.inf}, 0.0),
        ({"charged_error": math.nan}, 0.0),
        ({"charged_error": 1e30}, pytest.approx(0.0, abs=1e-20)),
        ({"status": "diverged"}, 0.0),
        ({"status": "failed"}, 0.0),
        ({"clean_status": "diverged"}, 0.0),
        ({"clean_coverage": 0.0, "coverage": 0.0}, 0.0),
        ({"clean_charged_error": 500.0, "charged_error": 500.0}, 0.01),
        ({"clean_coverage": 0.05, "coverage": 0.05}, pytest.approx(0.1)),
        ({"false_accept_rate": math.nan, "clean_false_accept_rate": math.nan}, 1.0),
        ({"charged_error": 0.0, "clean_charged_error": 0.0}, 1.0),
        ({"trivial_error": math.nan}, 1.0),
    ],
    ids=[
        "unharmed",
        "twice the error",
        "half the error",
        "half the coverage",
        "answers bottoms",
        "abstains everywhere",
        "infinite error",
        "no error",
        "garbage",
        "diverged",
        "failed",
        "clean twin diverged",
        "always abstained",
        "always garbage",
        "hardly ever answered",
        "no bottoms",
        "no error at all",
        "trivial error unknown",
    ],
)
def test_retained_quality_rewards_neither_abstaining_nor_garbage(
    changes: dict[str, Any], retained: Any
) -> None:
    """A cell that lost nothing retains 1, one that answers nothing, or anything, near 0."""
    assert retained_quality(made_up_cell(**changes)) == retained


def test_the_test_split_has_a_quality_of_its_own() -> None:
    """The ranking reads the validation split, the report the test split."""
    cell = made_up_cell(test_charged_error=8.0)
    assert (retained_quality(cell), retained_quality(cell, test=True)) == (1.0, 0.25)


def test_cells_and_scores_survive_their_files(tmp_path: Path) -> None:
    """What was written is read back, NaN and null told apart."""
    rows = [*grid(charged_error=math.nan), made_up_cell(config_id="b", recovered=None)]
    write_cells(tmp_path, rows)
    table = read_cells(tmp_path)
    assert table.schema.names == cell_schema().names
    assert math.isnan(table.column("charged_error")[0].as_py())
    assert table.column("recovered")[-1].as_py() is None
    scores = score_cells(table)
    write_scores(tmp_path, scores)
    assert read_scores(tmp_path).column("config_id").to_pylist() == ["a", "b"]
    assert read_scores(tmp_path).schema.names == score_schema().names


def test_what_is_no_file_of_cells_is_refused(tmp_path: Path) -> None:
    """A missing file, a damaged one, and one of scores are each named."""
    with pytest.raises(RunReadError, match=r"cells\.parquet"):
        read_cells(tmp_path)
    (tmp_path / "cells.parquet").write_bytes(b"PAR1")
    with pytest.raises(RunReadError, match="cannot be read as Parquet"):
        read_cells(tmp_path)
    path = write_scores(tmp_path, score_cells(cells_table(grid())))
    path.rename(tmp_path / "cells.parquet")
    with pytest.raises(RunReadError, match="does not hold cells"):
        read_cells(tmp_path)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([made_up_cell(chargd_error=1.0)], "did you mean charged_error"),
        ([made_up_cell(status="done")], "status must be one of completed"),
    ],
    ids=["column", "status"],
)
def test_a_cell_that_is_none_is_refused(rows: Rows, message: str, tmp_path: Path) -> None:
    """Unknown columns and statuses are named, and no file is left."""
    with pytest.raises(ValueError, match=message):
        write_cells(tmp_path, rows)
    assert list(tmp_path.iterdir()) == []


def test_the_same_cell_twice_is_refused() -> None:
    """Two cells of one place would count double."""
    with pytest.raises(ValueError, match="poison:high, seed 0 twice"):
        score_cells(cells_table([made_up_cell(), made_up_cell()]))


def test_no_cells_have_no_scores() -> None:
    """An empty matrix is an empty table, with its columns."""
    assert score_cells(cells_table([])).to_pylist() == []


def test_a_score_names_its_adversarial_cell_and_what_it_counted() -> None:
    """Of equally bad cells the mildest is named; what does not apply is left out of the mean."""
    rows = grid()
    for row in rows:
        if row["fault"] == "spikes":
            row |= {"status": NOT_APPLICABLE}
        if row["fault"] == "flips" and row["severity"] != "low":
            row |= {"status": "diverged", "recovered": False}
    found = score(rows)
    assert (found["adversarial_fault"], found["adversarial_severity"]) == ("flips", "middle")
    assert found["adversarial_retained"] == 0.0
    assert found["robustness"] == pytest.approx((1 / 3 + 1) / 2)
    counts = {name: found[name] for name in ("n_cells", "n_measured", "n_failed", "n_not_applicable")}
    assert counts == {"n_cells": 18, "n_measured": 12, "n_failed": 4, "n_not_applicable": 6}
    assert (found["n_missing"], found["n_faults"], found["n_seeds"]) == (0, 2, 2)


def test_a_harmless_fault_is_not_adversarial_because_the_config_is_bad() -> None:
    """A fault that left the clean twin's own quality is not named before one that did not."""
    rows = grid(clean_charged_error=500.0, charged_error=500.0)
    rows[-1] |= {"charged_error": 600.0}
    assert score(rows)["adversarial_fault"] == "spikes"


def test_one_seed_has_no_interval() -> None:
    """What one seed gives says nothing of others."""
    found = score(grid(seeds=1))
    assert found["robustness"] == 1.0
    assert math.isnan(found["low"])
    assert math.isnan(found["high"])


def test_a_config_to_which_nothing_applies_has_no_score() -> None:
    """No number is made of nothing."""
    found = score(grid(status=NOT_APPLICABLE))
    assert math.isnan(found["robustness"])
    assert found["adversarial_fault"] is None


numbers = st.one_of(st.floats(0, 1e6), st.sampled_from([math.nan, math.inf, 0.0, 1e308, 5e-324]))
shares = st.one_of(st.floats(0, 1), st.just(math.nan))


@st.composite
def tables(draw: st.DrawFn) -> Rows:
    """A matrix of one config with any numbers in it."""
    rows = grid(seeds=draw(st.integers(1, 3)))
    for row in rows:
        row["status"] = draw(st.sampled_from(CELL_STATUSES))
        for name in ("charged_error", "clean_charged_error", "trivial_error"):
            row[name] = draw(numbers)
        for name in ("coverage", "clean_coverage", "false_accept_rate", "clean_false_accept_rate"):
            row[name] = draw(shares)
    return rows


@settings(max_examples=40)
@given(tables())
def test_a_score_is_a_share_within_its_interval(rows: Rows) -> None:
    """Whatever the cells hold, the score lies in [0, 1] and in its interval, or is NaN as a whole."""
    found = score(rows)
    values = [found[name] for name in ("low", "robustness", "high")]
    assert all(math.isnan(value) or 0 <= value <= 1 for value in values)
    if not any(map(math.isnan, values)):
        assert values == sorted(values)


@settings(max_examples=30)
@given(tables(), st.randoms())
def test_the_order_of_cells_makes_no_difference(rows: Rows, random: Any) -> None:
    """A shuffled table has the same scores, interval included."""
    shuffled = random.sample(rows, len(rows))
    one, other = (score_cells(cells_table(held), resamples=20) for held in (rows, shuffled))
    assert repr(one.to_pylist()) == repr(other.to_pylist())


@settings(max_examples=40)
@given(tables(), st.data())
def test_worse_cells_never_raise_a_score(rows: Rows, data: st.DataObject) -> None:
    """More error, less coverage, more answers to bottoms, a divergence: none of them is rewarded."""
    before = score(rows, resamples=1)["robustness"]
    row = data.draw(st.sampled_from(rows))
    if row["status"] == NOT_APPLICABLE:
        return
    kind = data.draw(st.sampled_from(["error", "coverage", "accepts", "diverged", "nan"]))
    if kind == "error":
        row["charged_error"] *= data.draw(st.floats(1, 1e3))
    elif kind == "coverage":
        row["coverage"] *= data.draw(st.floats(0, 1))
    elif kind == "accepts" and not math.isnan(row["false_accept_rate"]):
        row["false_accept_rate"] += (1 - row["false_accept_rate"]) * data.draw(st.floats(0, 1))
    elif kind == "diverged":
        row["status"] = "diverged"
    else:
        row["charged_error"] = math.nan
    assert score(rows, resamples=1)["robustness"] <= before + 1e-12


@settings(max_examples=40)
@given(tables(), st.data())
def test_missing_cells_never_raise_a_score(rows: Rows, data: st.DataObject) -> None:
    """A cell that is lost counts as 0, whichever it was, as long as one is left to say what was planned."""
    measured = [row for row in rows if row["status"] != NOT_APPLICABLE]
    if not measured:
        return
    kept = [row for row in rows if data.draw(st.booleans())] or rows[:1]
    before, after = score(rows, resamples=1), score(kept, resamples=1)
    assert after["n_missing"] == len(rows) - len(kept)
    if not math.isnan(before["robustness"]):
        assert after["robustness"] <= before["robustness"] + 1e-12


def test_cells_that_lack_a_column_are_refused() -> None:
    """A table of something else is named for what it lacks."""
    with pytest.raises(ValueError, match="must have the columns config_id, fault"):
        score_cells(pa.table({"seed": [1], "status": ["completed"], "severity": ["low"]}))
