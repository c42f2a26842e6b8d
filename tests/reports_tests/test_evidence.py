"""How sure a ranking or a difference is: what it must agree with, and what must not change it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as stn
from scipy import stats

from reports.evidence import draws, improvement_chance, paired_difference, resample_ranks

VALUES = st.floats(-1e6, 1e6)
BLOCKS = st.integers(1, 30)


@st.composite
def two_arms(draw: st.DrawFn, least: int = 1) -> tuple[np.ndarray, np.ndarray]:
    n = draw(st.integers(least, 30))
    return draw(stn.arrays(float, n, elements=VALUES)), draw(stn.arrays(float, n, elements=VALUES))


@given(two_arms(), st.integers(-1000, 1000))
def test_a_constant_of_both_arms_changes_no_difference(arms, constant):
    base, candidate = arms
    one, other = paired_difference(base, candidate), paired_difference(base + constant, candidate + constant)
    assert (one.mean, one.low, one.high) == pytest.approx(
        (other.mean, other.low, other.high), rel=1e-9, abs=1e-6, nan_ok=True
    )


@given(two_arms(least=2))
def test_an_interval_holds_its_mean_and_turns_with_the_arms(arms):
    base, candidate = arms
    found, turned = paired_difference(base, candidate), paired_difference(candidate, base)
    scale = 1e-9 * (1 + np.abs(base).max() + np.abs(candidate).max())
    assert found.low - scale <= found.mean <= found.high + scale
    assert found.mean == pytest.approx(-turned.mean, abs=scale)


def test_one_block_has_no_interval():
    found = paired_difference([1.0], [3.0])
    assert (found.mean, found.n) == (2.0, 1)
    assert math.isnan(found.low)
    assert math.isnan(found.high)


def test_many_blocks_agree_with_scipys_bootstrap():
    source = np.random.default_rng(1)
    base, candidate = source.gamma(2.0, 1.0, 60), source.gamma(2.2, 1.0, 60)
    found = paired_difference(base, candidate, resamples=20_000)
    right = stats.bootstrap(
        (candidate - base,),
        np.mean,
        confidence_level=0.9,
        n_resamples=20_000,
        method="percentile",
        rng=np.random.default_rng(2),
    ).confidence_interval
    assert (found.low, found.high) == pytest.approx((right.low, right.high), abs=0.04)


@pytest.mark.parametrize("blocks", [3, 5, 10, 20])
def test_ninety_percent_of_intervals_hold_the_truth(blocks):
    """Of normal and of skewed blocks, few or many; the skewed ones a little less often."""
    source = np.random.default_rng(0)
    held = {"normal": 0, "skewed": 0}
    repetitions = 300
    for _ in range(repetitions):
        for name, found in (
            ("normal", source.normal(0.3, 1.0, blocks)),
            ("skewed", source.exponential(1.0, blocks)),
        ):
            truth = 0.3 if name == "normal" else 1.0
            interval = paired_difference(np.zeros(blocks), found, resamples=400)
            held[name] += interval.low <= truth <= interval.high
    assert held["normal"] >= 0.86 * repetitions  # 0.90 less 2.3 standard errors
    assert held["skewed"] >= 0.78 * repetitions


@given(two_arms())
def test_an_improvement_is_that_of_an_exact_binomial_where_nothing_is_equal(arms):
    base, candidate = arms
    found = improvement_chance(base, candidate)
    n, won = len(base), int(np.sum(candidate < base))
    if np.all(base != candidate):
        right = stats.binomtest(won, n).proportion_ci(0.9, method="exact")
        assert (found.low, found.high) == pytest.approx((right.low, right.high), abs=1e-9)
    assert 0.0 <= found.low <= found.mean <= found.high <= 1.0
    other = improvement_chance(candidate, base)
    assert found.mean == pytest.approx(1.0 - other.mean)
    assert found.low == pytest.approx(1.0 - other.high, abs=1e-9)


def test_four_wins_of_four_are_no_proof_and_five_are():
    assert improvement_chance([1.0] * 4, [0.0] * 4).low < 0.5
    assert improvement_chance([1.0] * 5, [0.0] * 5).low > 0.5
    assert improvement_chance([math.inf] * 5, [0.0] * 5).mean == 1.0
    assert improvement_chance([math.inf] * 5, [math.inf] * 5).mean == 0.5


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda: paired_difference([], []), "equally many, and some"),
        (lambda: paired_difference([1.0], [1.0, 2.0]), "equally many"),
        (lambda: paired_difference([math.nan, 1.0], [1.0, 2.0]), "finite values, got nan"),
        (lambda: paired_difference([1.0, 1.0], [1.0, math.inf]), "finite values, got inf"),
        (lambda: paired_difference([1.0], [1.0], level=1.0), "level must lie between 0 and 1"),
        (lambda: improvement_chance([], []), "equally many, and some"),
        (lambda: improvement_chance([math.nan], [1.0]), "must not hold NaN"),
        (lambda: improvement_chance([1.0], [1.0], level=0.0), "level must lie"),
    ],
)
def test_bad_arguments_name_the_rule(make, said):
    with pytest.raises(ValueError, match=said):
        make()


@pytest.mark.parametrize("blocks", range(1, 12))
def test_the_draws_of_blocks_are_all_there_are(blocks):
    found = list(draws(blocks, 500, 0))
    assert sum(chance for _, chance in found) == pytest.approx(1.0)
    assert all(drawn.sum() == blocks for drawn, _ in found)
    mean = sum(chance * drawn for drawn, chance in found)
    assert mean == pytest.approx(np.ones(blocks), abs=0.2 if blocks > 6 else 1e-9)


def test_ranks_are_resampled_as_by_hand():
    """Two configs that win a seed each, and one that loses both."""
    values = np.array([[1.0, 4.0], [3.0, 3.0], [9.0, 9.0]])

    def arrange(drawn: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        mean = values @ drawn / drawn.sum()
        return stats.rankdata(mean, method="min").astype(np.int64), np.argsort(mean, kind="stable")

    found = resample_ranks(arrange, configs=3, blocks=2).to_pydict()
    assert found == {
        "rank_low": [1, 1, 3],
        "rank_high": [2, 2, 3],
        "p_best": [0.75, 0.25, 0.0],
        "p_front": [0.75, 0.25, 0.0],
    }
