"""How a default is decided, on arrays: who leads, what ties, what is a cliff, when it changes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.defaults.decide import (
    DIFFERENCE,
    LOG_RATIO,
    OPTION,
    STEP,
    Choice,
    Confirmation,
    Guard,
    GuardPairs,
    Rules,
    choose,
    confirm,
    figure,
    losses_to_flip,
    on_cliff,
    scores_of,
    seeds_for_chance,
)
from reports.evidence import improvement_chance
from reports.metrics import parse_metric

RULES = Rules(resamples=200)
ERROR, SHARE = parse_metric("charged_error"), parse_metric("coverage")
SCENARIOS = ["a"] * 5 + ["b"] * 5
NOISE = np.random.default_rng(0).normal(0.0, 0.02, (6, 10))


def chosen(means: list[float], **how: Any) -> Choice:
    """The choice among configs with these scores and a little noise; the current default stands first."""
    scores = np.array(means)[:, None] + NOISE[: len(means)]
    asked: dict[str, Any] = {
        "current": 0,
        "eligible": np.ones(len(means), dtype=bool),
        "prior": [math.inf, *range(len(means) - 1)],
        "cost": [(0.0,)] * len(means),
        "rules": RULES,
    }
    return choose(scores, SCENARIOS, **{**asked, **how})


def test_what_is_better_is_worth_confirming_best_first() -> None:
    """Configs that the seeds tell apart stand in the order of their regret, and worse ones not at all."""
    choice = chosen([0.0, -0.3, -0.6, 0.5])
    assert choice.leader == 2
    assert choice.challengers == (2, 1)
    assert choice.regret[2].tolist() == [0.0, 0.0]


def test_a_current_default_that_leads_or_ties_stays() -> None:
    """Nothing is worth confirming then, not even a config that is better by less than the margin."""
    assert chosen([0.0, 0.2, 0.3]).challengers == ()
    scores = np.zeros((2, 10))
    scores[1] = -0.005
    tie = choose(
        scores,
        SCENARIOS,
        current=0,
        eligible=np.array([True, True]),
        prior=[0.0, 0.0],
        cost=[(0.0,), (0.0,)],
        rules=RULES,
    )
    assert tie.leader == 1
    assert tie.tied == (0, 1)
    assert tie.challengers == ()
    assert "ties" in tie.why


def test_what_the_seeds_do_not_tell_apart_goes_by_the_run_and_equals_by_cost() -> None:
    """Of near-equal configs the run's best is first; of equal ones the cheapest."""
    choice = chosen([0.0, -0.5, -0.501, -0.2], prior=[math.inf, 2.0, 1.0, 0.0])
    assert choice.challengers[:2] == (2, 1)
    scores = np.zeros((3, 10))
    scores[1:] = -0.5
    for cost, first in (([(0.0,), (5.0,), (1.0,)], 2), ([(0.0,), (1.0,), (5.0,)], 1)):
        equal = choose(
            scores,
            SCENARIOS,
            current=0,
            eligible=np.ones(3, dtype=bool),
            prior=[math.inf, 1.0, 2.0],
            cost=cost,
            rules=RULES,
        )
        assert equal.challengers[0] == first


def test_the_worst_scenario_decides_who_leads() -> None:
    """A config that is best on average but bad in one scenario does not lead."""
    scores = np.zeros((3, 10)) + NOISE[:3]
    scores[1, :5] -= 2.0
    scores[1, 5:] += 1.0
    scores[2] -= 0.4
    choice = choose(
        scores,
        SCENARIOS,
        current=0,
        eligible=np.ones(3, dtype=bool),
        prior=[0.0] * 3,
        cost=[(0.0,)] * 3,
        rules=RULES,
    )
    assert choice.regret[1].max() == pytest.approx(1.4, abs=0.1)
    assert choice.regret[2].max() == pytest.approx(1.6, abs=0.1)
    assert choice.leader == 1
    scores[1, 5:] += 1.0
    assert (
        choose(
            scores,
            SCENARIOS,
            current=0,
            eligible=np.ones(3, dtype=bool),
            prior=[0.0] * 3,
            cost=[(0.0,)] * 3,
            rules=RULES,
        ).leader
        == 2
    )


def test_a_config_that_broke_a_constraint_neither_leads_nor_challenges() -> None:
    """Its scores may be NaN; where the current default broke one, every other config may challenge."""
    scores = np.array([0.0, -1.0, 0.3])[:, None] + NOISE[:3]
    scores[1] = np.nan
    asked: dict[str, Any] = {"current": 0, "prior": [0.0] * 3, "cost": [(0.0,)] * 3, "rules": RULES}
    eligible = np.array([True, False, True])
    assert choose(scores, SCENARIOS, eligible=eligible, **asked).challengers == ()
    scores[0] = np.nan
    eligible = np.array([False, False, True])
    assert choose(scores, SCENARIOS, eligible=eligible, **asked).challengers == (2,)
    none = choose(scores, SCENARIOS, eligible=np.zeros(3, dtype=bool), **asked)
    assert none.leader is None
    assert none.challengers == ()


def beside(own: float, neighbour: float, **how: Any) -> str:
    """Why it is a cliff from trainings with these mean scores to two of a neighbour."""
    asked: dict[str, Any] = {
        "kind": STEP,
        "broken": "",
        "worthless": np.zeros(2, dtype=bool),
        "own_worthless": np.zeros(4, dtype=bool),
        "coverage": np.full(2, 0.9),
        "own_coverage": np.full(4, 0.9),
        "rules": RULES,
    }
    spread = np.array([-0.1, 0.0, 0.05, 0.05])
    return on_cliff(own + spread, neighbour + np.array([0.0, 0.02]), **{**asked, **how})


def test_a_cliff_is_worse_with_every_seed_and_by_much() -> None:
    """Half as much error again, half of the coverage gone, worth nothing, or a training that breaks."""
    assert beside(0.0, 0.3) == ""
    assert "1.68 times" in beside(0.0, 0.51)
    assert "coverage falls from 0.9 to 0.2" in beside(0.0, 0.3, coverage=np.full(2, 0.2))
    assert "abstaining" in beside(0.0, 0.3, worthless=np.ones(2, dtype=bool))
    assert beside(0.0, 0.3, worthless=np.ones(2, dtype=bool), own_worthless=np.ones(4, dtype=bool)) == ""
    assert beside(0.0, -0.3, broken="a training diverged") == "a training diverged"
    assert beside(0.0, 9.0, kind=OPTION) == ""
    assert beside(0.0, 9.0, kind=OPTION, broken="non-finite values were met")


def test_a_step_within_the_spread_of_the_own_trainings_is_no_cliff() -> None:
    """A training of a config that is itself as bad as its neighbour says that seeds do this, not the step."""
    own, neighbour = np.array([0.0, 0.0, 0.0, 2.0]), np.array([1.5, 1.6])
    no = np.zeros(2, dtype=bool)
    covered = np.ones(2)
    assert not on_cliff(
        own,
        neighbour,
        kind=STEP,
        broken="",
        worthless=no,
        own_worthless=no,
        coverage=covered,
        own_coverage=covered,
        rules=RULES,
    )


def decided(better_in: int, blocks: int = 20, guards: Any = (), **trouble: str) -> Confirmation:
    """The confirmation of a candidate that wins this many blocks."""
    candidate = np.where(np.arange(blocks) < better_in, -0.2, 0.2)
    return confirm(np.zeros(blocks), candidate, guards=guards, rules=RULES, **trouble)


def test_the_default_changes_only_when_the_chance_is_shown() -> None:
    """The lower bound at the level of a look is above one half, or the next look is open, or it is over."""
    assert decided(20).change
    assert decided(16).change
    undecided = decided(13)
    assert not undecided.change
    assert undecided.open
    lost = decided(3)
    assert not lost.change
    assert not lost.open
    assert decided(10, 10).chance is not None
    assert RULES.look_level == pytest.approx(1 - 0.1 / 3)


@given(st.integers(0, 40), st.integers(1, 40))
def test_more_wins_never_make_a_change_less_likely(won: int, blocks: int) -> None:
    """What changes with some wins changes with one more."""
    won = min(won, blocks - 1)
    if decided(won, blocks).change:
        assert decided(won + 1, blocks).change


def test_equal_arms_hardly_ever_change_the_default() -> None:
    """Of candidates that are the same as the current default, at most 5 % take over in all looks together."""
    draws, taken = np.random.default_rng(1), 0
    for _ in range(400):
        base, other = draws.normal(size=(2, 80))
        for look in RULES.looks:
            found = confirm(base[: 20 * look], other[: 20 * look], rules=RULES)
            if not found.open:
                break
        taken += found.change
    assert taken / 400 <= 0.05


def guarded(current: Any, candidate: Any, **how: Any) -> Confirmation:
    """A candidate that is better in every block, with one guarded figure."""
    guard = Guard(**{"name": "figure", "compare": DIFFERENCE, "margin": 0.01, **how})
    pairs = GuardPairs(guard, SCENARIOS, np.asarray(current, dtype=float), np.asarray(candidate, dtype=float))
    return confirm(np.zeros(10), np.full(10, -1.0), guards=[pairs], rules=RULES)


def test_a_guard_that_fails_in_one_scenario_keeps_the_default() -> None:
    """Harm beyond the margin that the seeds show; less, or noise alone, does not fail."""
    flat = np.full(10, 0.5)
    worse_in_b = np.where(np.arange(10) < 5, 0.5, 0.53) + NOISE[0] * 0.1
    kept = guarded(flat, worse_in_b)
    assert not kept.change
    assert not kept.open
    assert "figure is worse in b" in kept.why
    assert [result.failed for result in kept.judged] == [False, True]
    assert guarded(flat, flat + 0.005).change
    assert guarded(flat, flat + NOISE[0] * 5).change
    assert guarded(worse_in_b, flat, direction="higher").change is False


def test_a_ratio_is_guarded_as_a_ratio() -> None:
    """Twice the step time fails a guard of 1.5 times; 1.4 times does not."""
    flat = np.full(10, 2.0)
    how = {"compare": LOG_RATIO, "margin": 1.5}
    assert "2 times as large" in guarded(flat, 2 * flat, **how).why
    assert guarded(flat, 1.4 * flat, **how).change


def test_a_figure_that_the_candidate_alone_lacks_fails() -> None:
    """One that neither arm has is left out; one that only the current default lacks is no loss."""
    flat, none = np.full(10, 0.5), np.full(10, np.nan)
    assert not guarded(flat, none).change
    assert guarded(none, flat).change
    assert guarded(none, none).judged == ()


def test_constraints_decide_before_any_score() -> None:
    """A candidate that broke one never takes over; a current default that did is replaced."""
    assert not decided(20, candidate_trouble="a training failed").change
    assert decided(0, current_trouble="non-finite values were met").change
    assert not decided(20, candidate_trouble="x", current_trouble="y").change


def test_scores_compare_across_scenarios() -> None:
    """Errors by ratio whatever their unit, shares by difference, the reference at 0 in each scenario."""
    values = np.array([[1.0] * 5 + [1000.0] * 5, [2.0] * 5 + [2000.0] * 5])
    scores = scores_of(values, SCENARIOS, ERROR, 0)
    assert scores[0].tolist() == [0.0] * 10
    assert scores[1] == pytest.approx(math.log(2.0))
    shares = scores_of(np.array([[0.5] * 10, [0.6] * 10]), SCENARIOS, SHARE, 0)
    assert shares[1] == pytest.approx(-0.1)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf], ids=["nan", "inf", "minus inf"])
def test_scores_of_what_is_not_finite_are_nan_and_no_others(bad: float) -> None:
    """One block of the reference that is not finite does not spoil the scores of the rest."""
    values = np.ones((3, 10))
    values[0, 0] = bad
    values[2] = 0.0
    scores = scores_of(values, SCENARIOS, ERROR, 0)
    assert np.isnan(scores[0, 0])
    assert np.isfinite(scores[1:]).all()
    values[:, 1] = bad
    assert np.isnan(scores_of(values, SCENARIOS, ERROR, 0)[:, 1]).all()
    values[0] = bad
    assert np.isfinite(scores_of(values, SCENARIOS, ERROR, 0)[1:, 2:]).all()
    assert (scores[2] < scores[1]).all()


@given(st.lists(st.floats(-1e6, 1e6), min_size=5, max_size=40))
def test_a_figure_is_inside_its_interval_and_does_not_depend_on_the_order(values: list[float]) -> None:
    """low <= median <= high, all within what was measured."""
    found = figure(np.array(values))
    assert min(values) <= found.low <= found.median <= found.high <= max(values)
    assert figure(np.array(values[::-1])) == found


@pytest.mark.parametrize("seeds", [5, 8, 10, 20])
def test_the_interval_of_a_figure_holds_its_level_for_skewed_figures(seeds: int) -> None:
    """With one training of twelve gone wrong a hundredfold, the true median is inside in at least 90 %."""
    draws = np.random.default_rng(2)
    held = 0
    for _ in range(600):
        values = np.exp(draws.normal(size=seeds)) * np.where(draws.random(seeds) < 1 / 12, 100.0, 1.0)
        found = figure(values)
        held += found.low <= TRUE_MEDIAN <= found.high
    assert held / 600 >= 0.9


TRUE_MEDIAN = float(
    np.median(
        np.exp(np.random.default_rng(3).normal(size=400_000))
        * np.where(np.random.default_rng(4).random(400_000) < 1 / 12, 100.0, 1.0)
    )
)


def test_a_figure_counts_what_is_not_finite_as_the_worst() -> None:
    """The median stays, the mean is unknown, and the count is told; too few values have no interval."""
    found = figure(np.array([1.0, 2.0, np.nan, 4.0, np.inf]))
    assert (found.median, found.low, found.high, found.not_finite) == (4.0, 1.0, math.inf, 2)
    assert math.isnan(found.mean)
    few = figure(np.array([1.0, 2.0, 3.0, 4.0]))
    assert few.median == 2.5
    assert math.isnan(few.low)


def test_what_would_change_the_decision_is_what_would() -> None:
    """The seeds that are named show the chance, one less does not; so with the blocks that must be lost."""
    needed = seeds_for_chance(0.7, 2, level=RULES.look_level)
    assert needed is not None
    won = np.where(np.arange(2 * needed) < round(1.4 * needed), 0.0, 2.0)
    assert improvement_chance(np.ones(2 * needed), won, level=RULES.look_level).low > 0.5
    assert seeds_for_chance(0.5, 2, level=RULES.look_level) is None
    chance = decided(20).chance
    assert chance is not None
    lost = losses_to_flip(chance, RULES.look_level)
    assert decided(20 - lost + 1).change
    assert not decided(20 - lost).change


@pytest.mark.parametrize(
    "how, message",
    [
        ({"level": 1.0}, "level must lie in"),
        ({"looks": (2, 1)}, "looks must grow"),
        ({"resamples": 10}, "resamples must be >= 100"),
        ({"tie_margin": math.nan}, "tie_margin must be >= 0"),
        ({"cliff": 1.0}, "cliff must be > 1"),
        ({"kept_share": 2.0}, "kept_share must lie in"),
    ],
    ids=["level", "looks", "resamples", "margin", "cliff", "share"],
)
def test_rules_that_decide_nothing_are_refused(how: dict[str, Any], message: str) -> None:
    """The rule, the argument and the value are named."""
    with pytest.raises(ValueError, match=message):
        Rules(**how)


def test_a_guard_without_room_for_its_margin_is_refused() -> None:
    """A ratio below 1 and a negative difference would ask for an improvement."""
    with pytest.raises(ValueError, match="must be >= 1"):
        Guard(name="step_time_ms", compare=LOG_RATIO, margin=0.9)
    with pytest.raises(ValueError, match="must be >= 0"):
        Guard(name="coverage", compare=DIFFERENCE, margin=-0.1)
