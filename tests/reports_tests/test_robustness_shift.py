"""The arithmetic of shifts against independent references, and their file."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from reports.fragments import RunReadError
from reports.robustness_shift import (
    lower_auc,
    rank_correlation,
    read_shift,
    share_of,
    shift_schema,
    write_shift,
)

NUMBERS = st.floats(-10, 10).map(lambda value: round(value, 1))  # coarse, so that there are ties


def row(**changes: Any) -> dict[str, Any]:
    base = {
        "config_id": "c",
        "trial_id": "c-s0",
        "seed": 0,
        "model_digest": "d",
        "shift": "noise",
        "made_by": "task",
        "step": 1,
        "level": 0.1,
        "rows": 10,
        "labelled_bottom": 0,
        "tau_infer": 1e-3,
        "error_unit": "m",
        "coverage": 0.5,
        "accepted_error": math.nan,
        "curve_coverage": [0.5, 1.0],
        "curve_error": [1.0, 2.0],
    }
    return base | changes


@given(st.lists(st.tuples(NUMBERS, st.booleans()), min_size=2, max_size=30))
def test_auc_is_that_of_mann_and_whitney(pairs):
    """The chance that a marked row is the smaller one, ties counting half, as SciPy's U gives it."""
    values, marked = (np.array(side) for side in zip(*pairs, strict=True))
    found = lower_auc(values, marked)
    if marked.all() or not marked.any():
        assert math.isnan(found)
        return
    u = stats.mannwhitneyu(values[~marked], values[marked]).statistic
    assert found == pytest.approx(u / (marked.sum() * (~marked).sum()))


@given(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=2, max_size=30))
def test_rank_correlation_is_spearmans(pairs):
    """As SciPy computes it; NaN where a side does not vary."""
    x, y = (np.array(side) for side in zip(*pairs, strict=True))
    found = rank_correlation(x, y)
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        assert math.isnan(found)
    else:
        assert found == pytest.approx(stats.spearmanr(x, y).statistic)


def test_a_share_of_nothing_is_none():
    """NaN, not 0."""
    assert share_of([True, False, True], [True, True, False]) == 0.5
    assert math.isnan(share_of([True], [False]))


def test_shifts_survive_their_file(tmp_path: Path):
    """NaN and null stay apart, curves are lists, every column says what it means."""
    write_shift(tmp_path, [row(), row(step=0, level=None, bottom_auc=0.5)])
    back = read_shift(tmp_path).to_pylist()
    assert [entry["level"] for entry in back] == [0.1, None]
    assert math.isnan(back[0]["accepted_error"])
    assert back[0]["bottom_auc"] is None
    assert back[0]["curve_error"] == [1.0, 2.0]
    assert all(field.metadata[b"meaning"] for field in shift_schema())


def test_a_column_that_is_none_is_refused(tmp_path: Path):
    """The nearest known one is named, and nothing is written."""
    with pytest.raises(ValueError, match="unknown column coverag of a shift; did you mean coverage"):
        write_shift(tmp_path, [row(coverag=1.0)])
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_no_shift_is_named(tmp_path: Path):
    """Another Parquet file under its name is an error of one line."""
    pq.write_table(
        read_shift(write_shift(tmp_path, [row()]).parent).replace_schema_metadata({}), tmp_path / "x"
    )
    (tmp_path / "x").rename(tmp_path / "shift.parquet")
    with pytest.raises(RunReadError, match="does not hold robustness_shift"):
        read_shift(tmp_path)
