"""Two runs beside each other: which trials are pairs, what the pairs say, what is said of it."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from reports.comparison import ComparedRun, Comparison, compare_runs, comparison_values, difference_text
from reports.ranking import RankingOptions, rank
from reports.schema import row_schema

KNOBS = {"learning_rate": "float64"}
SEEDS = (0, 1, 2, 3, 4, 5)


def made_up_row(config_id: str, seed: int, **changes: Any) -> dict[str, Any]:
    return {
        "run_id": "r",
        "task": "toy",
        "config_id": config_id,
        "trial_id": f"{config_id}-s{seed}",
        "seed": seed,
        "status": "completed",
        "coverage": 0.95,
        "target_coverage": 0.95,
        "step_time_ms": 2.0,
    } | changes


def rows_of(configs: str = "abc", seeds: tuple[int, ...] = SEEDS, **changes: Any) -> list[dict[str, Any]]:
    """Configs that differ in learning rate and error; an error grows a little with the seed."""
    return [
        made_up_row(
            config,
            seed,
            **{
                "accepted_error": 1.0 + place + 0.1 * seed,
                "charged_error": 2.0 + place,
                "trivial_error": 9.0,
                "nan_count": 0,
                "data_digest": "d" * 64,
                "curve_area": 0.5,
                "config.learning_rate": 10.0**-place,
                **changes,
            },
        )
        for place, config in enumerate(configs)
        for seed in seeds
    ]


def run_of(rows: list[dict[str, Any]], **said: Any) -> ComparedRun:
    table = pa.Table.from_pylist(rows, schema=row_schema(KNOBS))
    return ComparedRun("run", table, rank(table, RankingOptions()), **said)


def scaled(rows: list[dict[str, Any]], factor: float) -> list[dict[str, Any]]:
    return [row | {"accepted_error": row["accepted_error"] * factor} for row in rows]


def of(told: Comparison, metric: str) -> Any:
    return next(one for one in told.differences if one.metric == metric)


def test_a_run_does_not_differ_from_itself():
    """Every pair is identical, every interval is a point, the order is the same."""
    run = run_of(rows_of(), plan={"seeds": [0]}, provenance={"run_id": "x"})
    told = compare_runs(run, run)
    assert (told.common, told.pairs, told.identical, told.tau) == (3, 18, 18, 1.0)
    assert told.hypervolume_a == told.hypervolume_b > 0
    assert told.summary.startswith("No difference: 3 common configs, 18 pairs of trials")
    assert [*told.only_a, *told.only_b, *told.status_changes, *told.plan_changes] == []
    assert all((one.value, one.verdict) == (1.0 if one.ratio else 0.0, "") for one in told.differences)


def test_differences_are_paired_by_seed_and_the_seeds_are_the_repetitions():
    """The interval is Student's over the means of each seed, n the seeds, not the pairs."""
    base = rows_of()
    drop = dict(zip(SEEDS, (0.02, 0.03, 0.01, 0.02, 0.04, 0.02), strict=True))
    changed = [row | {"coverage": row["coverage"] - drop[row["seed"]]} for row in base]
    found = of(compare_runs(run_of(base), run_of(changed)), "coverage")
    blocks = -np.array(list(drop.values()))
    low, high = stats.t.interval(0.9, 5, blocks.mean(), stats.sem(blocks))
    assert (found.n, found.pairs, found.verdict) == (6, 18, "worse")
    assert found.value == pytest.approx(blocks.mean())
    assert found.low <= low + 1e-12
    assert found.high >= high - 1e-12
    assert found.high - found.low < 1.2 * (high - low)


@settings(max_examples=15)
@given(st.floats(0.1, 10), st.integers(1, 4))
def test_a_factor_on_every_error_is_the_ratio(factor, seeds):
    """Whatever the errors are; one seed has no interval and so no verdict."""
    schema_rows = rows_of(seeds=tuple(range(seeds)))
    told = compare_runs(*(run_of(rows) for rows in (schema_rows, scaled(schema_rows, factor))))
    found = of(told, "accepted_error")
    assert found.value == pytest.approx(factor)
    assert math.isnan(found.low) == (seeds == 1)
    if seeds > 1:
        assert found.low == pytest.approx(factor)
        if abs(factor - 1) > 1e-6:
            assert found.verdict == ("better" if factor < 1 else "worse")


@settings(max_examples=10)
@given(st.randoms(use_true_random=False))
def test_the_order_of_rows_changes_nothing(random):
    one, other = rows_of("ab", (0, 1)), scaled(rows_of("ab", (0, 1)), 1.1)
    turned = list(other)
    random.shuffle(turned)
    first, second = (comparison_values(compare_runs(run_of(one), run_of(rows))) for rows in (other, turned))
    assert first == second


def test_what_went_wrong_comes_first_in_the_summary():
    """A trial that diverges, and what it met, before errors that got better."""
    changed = scaled(rows_of(), 0.5)
    changed[2] |= {"status": "diverged", "nan_count": 4, "accepted_error": math.nan, "stop_reason": "no loss"}
    told = compare_runs(run_of(rows_of()), run_of(changed))
    assert (told.went_wrong, told.came_right, told.nan_b, told.nan_more) == (1, 0, 4, 1)
    (change,) = told.status_changes
    assert (change.a, change.b, change.trials, change.error) == ("completed", "diverged", 1, "no loss")
    text = told.summary
    assert text.index("went wrong in B") < text.index("accepted_error is better")
    assert of(told, "accepted_error").lacking == 1
    back = compare_runs(run_of(changed), run_of(rows_of()))
    assert (back.went_wrong, back.came_right) == (0, 1)


def test_configs_and_seeds_of_one_run_alone_are_named():
    """Best first, and trials of common configs without a partner are counted."""
    told = compare_runs(run_of(rows_of("abc", (0, 1, 2))), run_of(rows_of("abcd", (1, 2))))
    assert (told.only_a, told.only_b) == ((), ("d",))
    assert (told.pairs, told.unpaired_a, told.unpaired_b) == (6, 3, 0)


def test_other_ids_are_paired_by_settings_and_else_by_knobs():
    """A hash that is made otherwise hides no common config; what differs in one knob alone is no pair."""
    renamed = [
        row | {"config_id": f"x{row['config_id']}", "trial_id": f"x{row['trial_id']}"} for row in rows_of()
    ]
    told = compare_runs(run_of(rows_of()), run_of(renamed))
    assert (told.matched_by, told.common, told.identical) == ("knobs", 3, 18)
    assert told.configs[0].config_b == f"x{told.configs[0].config_a}"
    by_settings = [
        [{**row, "settings_id": row["config_id"][-1]} for row in rows] for rows in (rows_of(), renamed)
    ]
    assert compare_runs(*map(run_of, by_settings)).matched_by == "settings_id"
    other = [row | {"config.learning_rate": 7.0 + ord(row["config_id"][-1])} for row in renamed]
    told = compare_runs(run_of(rows_of()), run_of(other))
    assert told.summary == "The runs have no config in common: nothing can be compared, config by config."


def test_other_data_are_said_before_any_difference():
    """And config ids, which do not know the data, are then not what pairs configs."""
    told = compare_runs(run_of(rows_of()), run_of(rows_of(data_digest="e" * 64)))
    assert (told.same_data, told.matched_by, len(told.data_changes)) == (False, "knobs", len(SEEDS))
    assert "the data differ" in told.cautions[0]
    changed = compare_runs(run_of(rows_of()), run_of(scaled(rows_of(data_digest="e" * 64), 2.0)))
    assert changed.summary.startswith("The runs are of different data")


def test_configs_that_cannot_be_told_apart_are_not_paired():
    """Two ids of the same knobs on one side: which of them is meant is not guessed."""
    twins = [row | {"config.learning_rate": 1.0} for row in rows_of("xy")]
    told = compare_runs(run_of(rows_of("ab")), run_of(twins))
    assert (told.common, told.ambiguous) == (0, 3)


def test_ranks_that_turned_around_have_a_tau_of_minus_one():
    """The same rules for both runs; the best configs of both are counted."""
    flipped = [row | {"accepted_error": 10.0 - row["accepted_error"]} for row in rows_of()]
    told = compare_runs(run_of(rows_of()), run_of(flipped), top=1)
    assert (told.tau, told.top_shared) == (-1.0, 0)
    assert [(pair.rank_a, pair.rank_b) for pair in told.configs] == [(1, 3), (3, 1), (2, 2)]


def test_what_changed_in_plan_and_provenance_is_named():
    """By dotted key; the run's own name is no change; without a plan nothing is claimed."""
    one = run_of(rows_of(), plan={"a": {"b": 1}}, provenance={"run_id": "x", "commit": "c"})
    other = run_of(rows_of(), plan={"a": {"b": 2}}, provenance={"run_id": "y", "commit": "d"})
    told = compare_runs(one, other)
    assert [change.key for change in (*told.plan_changes, *told.provenance_changes)] == ["a.b", "commit"]
    without = compare_runs(one, run_of(rows_of(commit="c")))
    assert not without.plan_known
    assert any("plan.yaml" in text for text in without.cautions)


def test_zero_errors_have_a_ratio_only_to_themselves():
    """0 against 0 is no difference, 0 against 1 is no ratio and is counted."""
    zero, one = rows_of(accepted_error=0.0), rows_of(accepted_error=1.0)
    assert of(compare_runs(run_of(zero), run_of(zero)), "accepted_error").value == 1.0
    found = of(compare_runs(run_of(zero), run_of(one)), "accepted_error")
    assert (found.pairs, found.lacking, difference_text(found)) == (0, 18, "-")


def test_rows_without_the_newer_columns_are_compared_by_what_they_have():
    """A run of an earlier version has no curves; nothing is made up for it."""
    run = run_of(rows_of())
    old = ComparedRun(
        "old", run.rows.drop_columns(["curve_area", "curve_error", "data_digest"]), run.leaderboard
    )
    told = compare_runs(old, run)
    assert [one.metric for one in told.differences] == [
        "coverage",
        "accepted_error",
        "charged_error",
        "step_time_ms",
    ]
    assert (told.same_data, told.identical) == (None, 18)


def test_the_values_are_strict_json():
    """No NaN, no objects; a side that is absent is left out."""
    told = compare_runs(
        run_of(rows_of(seeds=(0,)), plan={"a": 1}), run_of(rows_of(seeds=(0,)), plan={"b": 2})
    )
    back = json.loads(json.dumps(comparison_values(told), allow_nan=False))
    assert back["plan_changes"] == [{"key": "a", "a": 1}, {"key": "b", "b": 2}]
    assert back["differences"][0]["low"] is None
    assert back["summary"] == told.summary


def test_a_level_outside_of_0_and_1_is_refused():
    run = run_of(rows_of())
    with pytest.raises(ValueError, match="level must lie between 0 and 1, got 1"):
        compare_runs(run, run, level=1.0)
