"""What searchers are told: the order of the truth, in finite numbers."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.objectives import (
    SCALARISATIONS,
    Objective,
    objective_of_rows,
    squash,
    symlog,
    told_scalar,
    told_values,
)

FINITE = st.floats(allow_nan=False, allow_infinity=False)
SHORTFALLS = st.floats(0.0, 1.0)
NAN = math.nan


def row(**changes):
    """A row of a trial that ended well."""
    plain = {
        "status": "completed",
        "coverage": 0.9,
        "target_coverage": 0.95,
        "nan_count": 0,
        "accepted_error": 0.5,
    }
    return {**plain, **changes}


def test_the_mean_over_seeds_is_told():
    """Two seeds count with their means; the surplus of one does not pay for the other's shortfall."""
    objective = objective_of_rows([row(coverage=0.85), row(coverage=1.0, accepted_error=1.5)])
    assert objective.values == pytest.approx((0.05, 1.0))
    assert objective.feasible


@pytest.mark.parametrize("status", ["failed", "diverged"])
def test_one_seed_that_did_not_end_well_makes_the_config_failed(status):
    """A good seed beside a failed one changes nothing."""
    objective = objective_of_rows([row(accepted_error=0.01), row(status=status, accepted_error=0.01)])
    assert objective.failed
    assert not objective.finite


@pytest.mark.parametrize("value", [NAN, math.inf, None], ids=["nan", "inf", "null"])
def test_one_seed_without_a_finite_metric_is_not_averaged_away(value):
    """Seeds [nan, nan, nan, nan, 0.01] are not told as 0.01."""
    objective = objective_of_rows([row(accepted_error=value)] * 4 + [row(accepted_error=0.01)])
    assert math.isnan(objective.values[1])
    assert not objective.finite


def test_nan_counts_of_all_seeds_are_held_against_the_budget():
    """A config's trials meet NaN together, as in the ranking; a stopped trial counts as any other."""
    rows = [row(nan_count=2), row(nan_count=3, status="stopped")]
    assert objective_of_rows(rows).nan_count == 5
    assert objective_of_rows(rows, nan_budget=4).nan_count == 1
    assert objective_of_rows(rows, nan_budget=5).feasible


def test_a_row_that_cannot_say_its_nan_count_did_not_end_well():
    """No count is not a count of zero."""
    assert objective_of_rows([row(nan_count=None)]).failed


def test_a_metric_that_is_not_there_is_an_error():
    """A misspelt metric is named, with the columns that there are."""
    with pytest.raises(ValueError, match="no trial reports the metric 'charged_eror', did you mean"):
        objective_of_rows([row()], metrics=["charged_eror"])
    with pytest.raises(ValueError, match="at least one trial"):
        objective_of_rows([])


@given(st.lists(st.tuples(FINITE, FINITE), min_size=1, max_size=4), st.integers(1, 10**9))
def test_every_told_number_is_finite_and_in_true_order(values, nan_count):
    """Feasible before over-budget before not finite, for every double and every scalarisation."""
    for pair in values:
        good, over = Objective(pair), Objective(pair, nan_count=nan_count)
        bad, lost = Objective((NAN, pair[1])), Objective(pair, failed=True)
        for a, b, c, d in zip(*map(told_values, (good, over, bad, lost)), strict=True):
            assert a < b < c == d < math.inf
    for scalarise in SCALARISATIONS.values():
        shortfall, error = min(1.0, abs(values[0][0])), abs(values[0][1])
        good, over = Objective((shortfall, error)), Objective((shortfall, error), nan_count=nan_count)
        bad = Objective((shortfall, math.inf))
        assert (
            told_scalar(good, scalarise)
            < told_scalar(over, scalarise)
            < told_scalar(bad, scalarise)
            < math.inf
        )


@given(FINITE, FINITE)
def test_scales_keep_the_order(left, right):
    """symlog and squash never turn two values round."""
    low, high = sorted((left, right))
    assert symlog(low) <= symlog(high) < 1000
    assert 0 <= squash(low) <= squash(high) <= 1


@given(SHORTFALLS, st.floats(0, 1e300), st.floats(0, 1e300), st.sampled_from(sorted(SCALARISATIONS)))
def test_less_error_is_never_told_as_worse(shortfall, one, other, name):
    """At equal coverage every scalarisation follows the error."""
    low, high = sorted((one, other))
    scalarise = SCALARISATIONS[name]
    assert scalarise((shortfall, low)) <= scalarise((shortfall, high))


def test_lexicographic_does_not_depend_on_the_unit_of_the_error():
    """A step of coverage outweighs any error; below a step the error decides."""
    scalarise = SCALARISATIONS["lexicographic"]
    assert scalarise((0.0, 1e12)) < scalarise((0.05, 1e-12))
    assert scalarise((0.04, 1e-3)) < scalarise((0.0, 2e-3))
    assert scalarise((0.1, 2.0)) < scalarise((0.15, 1.0))


def test_one_objective_is_its_own_scalar():
    """A single metric is followed as it is, and a lone shortfall too."""
    assert (
        SCALARISATIONS["total"]((0.1,)) < SCALARISATIONS["total"]((0.11,)) < SCALARISATIONS["total"]((3.0,))
    )
    for scalarise in SCALARISATIONS.values():
        assert scalarise((0.1,)) < scalarise((0.11,)) < scalarise((1.0,))


@pytest.mark.parametrize("name", ["lexicographic", "weighted"])
def test_what_is_not_a_shortfall_is_not_taken_for_one(name):
    """An error in the first place would be weighed as coverage: refused."""
    with pytest.raises(ValueError, match="the first value must be a coverage shortfall"):
        SCALARISATIONS[name]((7.5, 0.1))


def test_a_trial_that_failed_need_not_have_the_metric():
    """A task's own metric is unknown in a trial that never got to it; the config is told as failed."""
    row = {"status": "failed", "nan_count": 0}
    objective = objective_of_rows([row], ["metric.hits"])
    assert objective.failed
    assert not objective.finite
