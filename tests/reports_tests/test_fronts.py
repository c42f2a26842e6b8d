"""Pareto fronts agree with their definition, also where only the first of them are asked for."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from reports import fronts
from reports.fronts import first_fronts, pareto_fronts


def brute_force_fronts(points: np.ndarray) -> list[int]:
    """Peels one front after another by the definition of dominance."""
    fronts = [-1] * len(points)
    left = set(range(len(points)))
    number = 0
    while left:
        best = {
            i
            for i in left
            if not any((points[j] <= points[i]).all() and (points[j] < points[i]).any() for j in left)
        }
        for index in best:
            fronts[index] = number
        left -= best
        number += 1
    return fronts


@given(
    arrays(
        np.float64,
        array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=12).map(lambda s: (s[0], min(s[1], 4))),
        elements=st.sampled_from([-math.inf, -1.0, 0.0, 0.5, 1.0, 1e300, math.inf]),
    )
)
def test_fronts_are_those_of_the_definition(points):
    """For one to four objectives, infinities and equal points included, fronts agree with brute force."""
    assert pareto_fronts(points).tolist() == brute_force_fronts(points)


def test_fronts_of_many_points_agree_with_the_definition():
    """Also for a few hundred points, correlated as errors and times are."""
    generator = np.random.default_rng(0)
    points = generator.normal(size=(300, 1)) + 0.3 * generator.normal(size=(300, 3))
    assert pareto_fronts(points).tolist() == brute_force_fronts(points)


def test_fronts_refuse_nan_and_take_no_points():
    """NaN has no place in an order; no points have no fronts."""
    with pytest.raises(ValueError, match="must not hold NaN"):
        pareto_fronts(np.array([[1.0, math.nan]]))
    assert pareto_fronts(np.zeros((0, 3))).tolist() == []


def check_first_fronts(points: np.ndarray, wanted: int) -> None:
    """The first fronts are those of all, whole, until there are enough points; the others are not told."""
    whole, first = pareto_fronts(points), first_fronts(points, wanted)
    told = first >= 0
    last = np.searchsorted(np.cumsum(np.bincount(whole)), min(wanted, len(points)))
    assert np.array_equal(told, whole <= last)
    assert np.array_equal(first[told], whole[told])


@settings(deadline=None)
@given(
    arrays(
        np.float64,
        array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=40).map(lambda s: (s[0], min(s[1], 4))),
        elements=st.sampled_from([-math.inf, 0.0, 0.25, 0.5, 1.0, 2.0, math.inf]),
    ),
    st.integers(1, 45),
    st.integers(1, 8),
)
def test_the_first_fronts_are_those_of_all(points, wanted, chunk):
    """However many are wanted, and however the points fall into chunks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fronts, "FIRST_CHUNK", chunk)
        patch.setattr(fronts, "GUARDS", 2)
        check_first_fronts(points, wanted)


@pytest.mark.parametrize("objectives", [1, 2, 3, 5])
def test_the_first_fronts_of_many_points_are_those_of_all(objectives):
    """Among twenty thousand points with many that are equal in one objective."""
    draw = np.random.default_rng(objectives)
    points = draw.normal(size=(20_000, 1)) + draw.normal(size=(20_000, objectives))
    points[:, 0] = np.maximum(points[:, 0], 0.0)
    for wanted in (1, 300, 20_000):
        check_first_fronts(points, wanted)


def test_no_fronts_are_refused():
    """At least one point must be wanted."""
    with pytest.raises(ValueError, match="wanted must be >= 1, got wanted=0"):
        first_fronts(np.zeros((1, 2)), 0)
