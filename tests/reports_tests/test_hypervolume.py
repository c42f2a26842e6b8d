"""The hypervolume of a run: laws of the measure, and sums by hand."""

from __future__ import annotations

import json
import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as stn

from reports.hypervolume import REFERENCE, bounds_of, run_hypervolume
from reports.ranking import RANKED_BY_KEY

BY = ["coverage_shortfall", "accepted_error"]


def board(points, feasible=None, by=BY) -> pa.Table:
    points = np.asarray(points, dtype=float)
    columns = {
        "config_id": [f"c{place}" for place in range(len(points))],
        "feasible": [True] * len(points) if feasible is None else feasible,
        **{f"{name}_mean": points[:, place] for place, name in enumerate(by)},
    }
    return pa.table(columns).replace_schema_metadata({RANKED_BY_KEY: json.dumps({"by": by}).encode()})


POINTS = stn.arrays(float, st.tuples(st.integers(1, 12), st.just(2)), elements=st.floats(0.0, 1.0))
UNIT = dict.fromkeys(BY, (0.0, 1.0))


@given(POINTS, POINTS)
def test_another_config_never_takes_volume_away(one, two):
    both = run_hypervolume(board(np.vstack([one, two])), bounds=UNIT).share
    assert both >= run_hypervolume(board(one), bounds=UNIT).share - 1e-12
    assert 0.0 <= both <= 1.0


@given(POINTS, st.randoms(use_true_random=False))
def test_growth_ends_with_the_whole_and_never_falls(points, random):
    held = board(points)
    order = held.column("config_id").to_pylist()
    random.shuffle(order)
    found = run_hypervolume(held, bounds=UNIT, order=order)
    assert list(found.growth) == sorted(found.growth)
    assert found.growth[-1] == pytest.approx(found.share)


@given(POINTS)
def test_it_is_the_area_that_is_dominated(points):
    """Against a sum over a grid of cells between the points."""
    found = run_hypervolume(board(points), bounds=UNIT).share
    edges = [np.unique([0.0, REFERENCE, *points[:, axis]]) for axis in range(2)]
    area = 0.0
    for x0, x1 in zip(edges[0][:-1], edges[0][1:], strict=True):
        for y0, y1 in zip(edges[1][:-1], edges[1][1:], strict=True):
            if np.any((points[:, 0] <= x0) & (points[:, 1] <= y0)):
                area += (x1 - x0) * (y1 - y0)
    assert found == pytest.approx(area / REFERENCE**2, abs=1e-9)


def test_what_is_ruled_out_or_not_finite_adds_nothing():
    held = board([[0.5, 0.5], [0.0, 0.0], [0.1, math.nan]], feasible=[True, False, True])
    assert run_hypervolume(held, bounds=UNIT).configs == 1
    assert run_hypervolume(held, bounds=UNIT).share == pytest.approx((0.6 / 1.1) ** 2)


def test_a_metric_that_is_better_higher_counts_the_other_way():
    low, high = (board([[value, 0.5], [0.1, 0.9]], by=["coverage", "accepted_error"]) for value in (0.5, 0.9))
    bounds = bounds_of(low, high)
    assert bounds["coverage"] == (-0.9, -0.1)
    assert run_hypervolume(high, bounds=bounds).share > run_hypervolume(low, bounds=bounds).share


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda: run_hypervolume(board([[math.nan, 1.0]])), "a feasible config with finite objectives"),
        (
            lambda: run_hypervolume(board([[1.0, 1.0]]), bounds={"coverage_shortfall": (0, 1)}),
            "bounds must hold",
        ),
        (lambda: run_hypervolume(board([[1.0, 1.0]]).replace_schema_metadata(None)), "rank the run again"),
        (
            lambda: run_hypervolume(board([[1.0, 1.0]]).drop_columns("accepted_error_mean")),
            "rank the run again",
        ),
        (
            lambda: bounds_of(board([[1.0, 1.0]]), board([[1.0, 1.0]], by=["loss", "accepted_error"])),
            "ranked by the same objectives",
        ),
    ],
)
def test_bad_arguments_name_the_rule(make, said):
    with pytest.raises(ValueError, match=said):
        make()
