"""What looks good and is not: whatever it is ranked by, no such config stands above an honest one."""

from __future__ import annotations

import math
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reports.ranking import RankingOptions, rank
from reports.scenarios import rank_scenarios

SEEDS = range(5)
TRIVIAL = 10.0  # what no answer at all costs
# Everything that a config could be ranked by and a dishonest one could look good in.
BY = [
    ("coverage_shortfall", "accepted_error", "step_time_ms"),
    ("coverage", "step_time_ms"),
    ("step_time_ms",),
    ("accepted_error",),
    ("charged_error",),
    ("coverage",),
    ("loss", "coverage_shortfall"),
    ("false_accept_rate",),
    ("parameters",),
]


def trial(name: str, seed: int, scenario: str = "toy", **figures: Any) -> dict[str, Any]:
    return {
        "task": scenario,
        "scenario": scenario,
        "settings_id": name,
        "config_id": name,
        "trial_id": f"{name}-s{seed}",
        "seed": seed,
        "status": "completed",
        "error": "",
        "nan_count": 0,
        "target_coverage": 0.9,
        "trivial_error": TRIVIAL,
        "loss": 1.0,
        "parameters": 100,
        "false_accept_rate": 0.1,
    } | figures


# As good as can be in every figure: whoever cheats by what went wrong cheats best so.
PERFECT = {
    "coverage": 1.0,
    "accepted_error": 0.0,
    "charged_error": 0.0,
    "step_time_ms": 1e-3,
    "loss": -1e3,
    "parameters": 1,
    "false_accept_rate": 0.0,
}


def bottom_everywhere(seed: int) -> dict[str, Any]:
    """Answers nothing: makes no error, accepts nothing wrong, and is as fast as can be."""
    return PERFECT | {"coverage": 0.0, "accepted_error": math.nan, "charged_error": TRIVIAL}


def garbage_with_full_coverage(seed: int) -> dict[str, Any]:
    """Answers everything, and is further off than no answer: the best coverage there is."""
    return PERFECT | {"accepted_error": 1e3 * TRIVIAL, "charged_error": 1e3 * TRIVIAL}


def one_nan_in_a_hundred_thousand(seed: int) -> dict[str, Any]:
    """Perfect but for one value of one seed."""
    return PERFECT | {"nan_count": int(seed == 3)}


def three_of_five_seeds_failed(seed: int) -> dict[str, Any]:
    """Perfect in the seeds that it survives."""
    if seed in (0, 2):
        return PERFECT
    return {"status": "failed", "error": "boom", **dict.fromkeys(PERFECT, None), "nan_count": None}


def three_of_five_seeds_diverged(seed: int) -> dict[str, Any]:
    """The same, and the figures of what diverged look well."""
    return PERFECT if seed in (0, 2) else PERFECT | {"status": "diverged", "accepted_error": 0.0}


DISHONEST = {
    cheat.__name__: cheat
    for cheat in (
        bottom_everywhere,
        garbage_with_full_coverage,
        one_nan_in_a_hundred_thousand,
        three_of_five_seeds_failed,
        three_of_five_seeds_diverged,
    )
}


@st.composite
def honest_configs(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Trials of configs that are better than no answer in every seed, and else as bad as they may be."""
    rows = []
    for index in range(draw(st.integers(1, 4))):
        for seed in SEEDS:
            error = draw(st.floats(0.1, 0.99))
            rows.append(
                trial(
                    f"honest{index}",
                    seed,
                    coverage=draw(st.floats(0.01, 1.0)),
                    accepted_error=error * TRIVIAL,
                    charged_error=draw(st.floats(error, 0.999)) * TRIVIAL,
                    step_time_ms=draw(st.floats(0.1, 1e3)),
                )
            )
    return rows


def trials_of(cheat: str, scenario: str = "toy") -> list[dict[str, Any]]:
    return [trial(cheat, seed, scenario, **DISHONEST[cheat](seed)) for seed in SEEDS]


def check_order(board: list[dict[str, Any]], name: str) -> None:
    """Every honest config above every other, and no chance of another to be the best while one is there."""
    honest = [entry["rank"] for entry in board if entry[name].startswith("honest")]
    assert honest == list(range(1, len(honest) + 1))
    for entry in board[len(honest) :]:
        assert not entry["p_best"]
        assert not entry["p_front"]
        assert entry["rank_low"] is None or entry["rank_low"] > len(honest)


@pytest.mark.parametrize("failed_budget", [0, 3])
@pytest.mark.parametrize("by", BY, ids=",".join)
@settings(max_examples=4)
@given(honest_configs())
def test_no_dishonest_config_is_ranked_above_an_honest_one(by, failed_budget, honest):
    """All of them at once, whatever the objectives, also where failures are allowed."""
    rows = [*honest, *(row for cheat in DISHONEST for row in trials_of(cheat))]
    options = RankingOptions(by=by, failed_budget=failed_budget)
    check_order(rank(pa.Table.from_pylist(rows), options).to_pylist(), "config_id")


@pytest.mark.parametrize("cheat", DISHONEST)
@settings(max_examples=3)
@given(honest_configs())
def test_one_scenario_in_which_it_is_dishonest_is_enough(cheat, honest):
    """Perfect in another scenario, a config is not better for it."""
    rows = [entry | {"scenario": name, "task": name} for name in ("one", "two") for entry in honest]
    rows += trials_of(cheat, "one") + [trial(cheat, seed, "two", **PERFECT) for seed in SEEDS]
    for by in (BY[0], BY[1]):
        for failed_budget in (0, 3):
            options = RankingOptions(by=by, failed_budget=failed_budget)
            board = rank_scenarios([pa.Table.from_pylist(rows)], options, resamples=50)
            check_order(board.to_pylist(), "settings_id")


@pytest.mark.parametrize(
    ("cheat", "why"),
    [
        ("bottom_everywhere", "seeds 0, 1, 2, 3, 4 without a finite accepted_error"),
        ("garbage_with_full_coverage", ""),
        ("one_nan_in_a_hundred_thousand", "1 non-finite values (budget 0)"),
        ("three_of_five_seeds_failed", "seeds 1, 3, 4 failed (boom)"),
        ("three_of_five_seeds_diverged", "seeds 1, 3, 4 diverged"),
    ],
)
def test_the_leaderboard_says_what_is_wrong(cheat, why):
    """Ruled out with the reason; garbage is in order, and marked as no better than no answer."""
    honest = [
        trial("honest", seed, coverage=0.02, accepted_error=9.0, charged_error=9.99, step_time_ms=1e3)
        for seed in SEEDS
    ]
    board = rank(pa.Table.from_pylist([*honest, *trials_of(cheat)])).to_pylist()
    assert [entry["config_id"] for entry in board] == ["honest", cheat]
    assert board[1]["why"] == why
    assert board[1]["feasible"] == (why == "")
    assert (board[0]["beats_abstaining"], board[0]["p_best"]) == (True, pytest.approx(1.0))
    if not why:
        assert board[1]["beats_abstaining"] is False
