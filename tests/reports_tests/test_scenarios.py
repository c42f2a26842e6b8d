"""Settings over several scenarios: one scenario is the plain ranking; no unit, order or reference matters."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reports.evidence import RANK_COLUMNS
from reports.ranking import RankingOptions, rank
from reports.scenarios import LOG_RATIO, SCENARIOS_KEY, rank_scenarios

BY_ERROR = RankingOptions(by=("accepted_error",))


def row(settings: str, scenario: str = "one", seed: int = 0, **changes: Any) -> dict[str, Any]:
    """A completed trial without fault; its config_id is another one in every scenario, as in runs."""
    return {
        "task": scenario.partition("-")[0],
        "scenario": scenario,
        "settings_id": settings,
        "config_id": f"{settings}@{scenario}",
        "trial_id": f"{settings}@{scenario}-s{seed}",
        "seed": seed,
        "status": "completed",
        "error": "",
        "nan_count": 0,
        "coverage": 0.95,
        "target_coverage": 0.95,
        "accepted_error": 1.0,
        "step_time_ms": 2.0,
        "data_digest": f"{scenario}{seed}",
        "config.learning_rate": 1e-3,
    } | changes


def rows_of(errors: dict[str, dict[str, list[float]]], **changes: Any) -> list[dict[str, Any]]:
    """Rows from errors by scenario, settings and seed."""
    return [
        row(settings, scenario, seed, accepted_error=error, **changes)
        for scenario, held in errors.items()
        for settings, values in held.items()
        for seed, error in enumerate(values)
    ]


def board_of(rows: list[dict[str, Any]], options: RankingOptions = BY_ERROR, **how: Any) -> dict[str, Any]:
    found = rank_scenarios([pa.Table.from_pylist(rows)], options, **how)
    return {entry["settings_id"]: entry for entry in found.to_pylist()}


ERRORS = st.integers(1, 60).map(lambda value: value / 8)


@st.composite
def runs(draw: st.DrawFn, most_scenarios: int = 3) -> list[dict[str, Any]]:
    """Rows of a few settings in a few scenarios, with a few seeds each."""
    seeds = draw(st.integers(1, 2))
    rows = []
    configs = draw(st.integers(1, 5))
    for scenario in range(draw(st.integers(1, most_scenarios))):
        for index in range(configs):
            rows += [
                row(
                    f"c{index}",
                    f"t{scenario}",
                    seed,
                    accepted_error=draw(ERRORS),
                    step_time_ms=draw(st.sampled_from([1.0, 2.0, 4.0])),
                    coverage=draw(st.sampled_from([0.875, 0.9375, 1.0])),
                )
                for seed in range(seeds)
            ]
    return rows


def sure_of(board: dict[str, Any]) -> list[tuple[Any, ...]]:
    names = ("rank", "front", "mean_rank", "worst_rank", *RANK_COLUMNS)
    return [(settings, *(entry[name] for name in names)) for settings, entry in board.items()]


@settings(max_examples=20)
@given(runs(most_scenarios=1))
def test_of_one_scenario_it_is_the_ranking_of_the_run(rows):
    """The same order, fronts and confidence as `rank` gives, under the settings' names."""
    options = RankingOptions()
    plain = rank(pa.Table.from_pylist(rows), options).to_pylist()
    found = board_of(rows, options)
    assert [f"{settings}@t0" for settings in found] == [entry["config_id"] for entry in plain]
    for one, other in zip(found.values(), plain, strict=True):
        assert one["config_id@t0"] == other["config_id"]
        assert one["accepted_error@t0"] == other["accepted_error_mean"]
        for name in ("rank", "front", "feasible", *RANK_COLUMNS):
            assert one[name] == pytest.approx(other[name]) if one[name] is not None else other[name] is None
        assert one["mean_rank"] == one["worst_rank"] == one["rank"]


@settings(max_examples=20)
@given(runs(), st.randoms(use_true_random=False))
def test_the_order_of_rows_and_tables_does_not_matter(rows, random):
    """Rows in any order, in one table or in several, make one leaderboard, to the bit."""
    whole = rank_scenarios([pa.Table.from_pylist(rows)])
    turned = [*rows]
    random.shuffle(turned)
    cut = random.randint(0, len(rows))
    tables = [pa.Table.from_pylist(part) for part in (turned[:cut], turned[cut:]) if part]
    assert rank_scenarios(tables).equals(whole, check_metadata=True)


@settings(max_examples=20)
@given(runs(), st.integers(-20, 20), st.randoms(use_true_random=False))
def test_the_unit_of_an_error_in_a_scenario_does_not_matter(rows, power, random):
    """In euros or in cents, in one scenario or in all: ratios are the same, and so is the order."""
    scenario = random.choice(sorted({entry["scenario"] for entry in rows}))
    changed = [
        entry | {"accepted_error": entry["accepted_error"] * 2.0**power}
        if entry["scenario"] == scenario
        else entry
        for entry in rows
    ]
    assert [entry[:3] for entry in sure_of(board_of(changed))] == [
        entry[:3] for entry in sure_of(board_of(rows))
    ]


@settings(max_examples=20)
@given(runs(), st.integers(-3, 3))
def test_a_constant_added_to_a_share_does_not_matter(rows, constant):
    """Of differences the level of a scenario is no part."""
    options = RankingOptions(by=("coverage",))
    changed = [
        entry | {"coverage": entry["coverage"] + constant} if entry["scenario"] == "t0" else entry
        for entry in rows
    ]
    assert [entry[0] for entry in sure_of(board_of(changed, options))] == [
        entry[0] for entry in sure_of(board_of(rows, options))
    ]


@settings(max_examples=20)
@given(runs(), st.integers(0, 4))
def test_what_figures_are_relative_to_changes_no_rank(rows, index):
    """The reference moves all figures alike; its own are 0."""
    plain, moved = board_of(rows), board_of(rows, reference=f"c{index}")
    assert sure_of(plain) == sure_of(moved)
    shift = [moved[name]["accepted_error"] - plain[name]["accepted_error"] for name in plain]
    assert shift == pytest.approx([shift[0]] * len(shift))
    if f"c{index}" in moved:
        assert moved[f"c{index}"]["accepted_error"] == 0.0


def test_scenarios_weigh_the_same_whatever_their_seeds_and_units():
    """Half the error in one scenario and twice it in the other is as good as the reference, by hand."""
    rows = rows_of(
        {
            "one": {"ref": [100.0, 100.0], "a": [50.0, 50.0], "b": [80.0, 80.0]},
            "two": {"ref": [0.1] * 4, "a": [0.2] * 4, "b": [0.1] * 4},
        }
    )
    found = board_of(rows, reference="ref")
    assert list(found) == ["b", "ref", "a"] or list(found) == ["b", "a", "ref"]
    assert found["a"]["accepted_error"] == pytest.approx(0.0)
    assert found["b"]["accepted_error"] == pytest.approx(math.log(0.8) / 2)
    assert found["a"]["accepted_error_regret"] == pytest.approx(math.log(2))
    assert found["a"]["accepted_error_worst"] == "two"
    assert (found["a"]["mean_rank"], found["a"]["worst_rank"]) == (2.0, 3)
    assert found["b"]["accepted_error@one"] == 80.0


def test_of_equal_means_the_lesser_regret_leads():
    """Two settings in one front: the one that is nowhere far behind comes first."""
    options = RankingOptions(by=("accepted_error", "coverage"))
    rows = rows_of({"one": {"wild": [1.0], "calm": [2.0]}, "two": {"wild": [9.0], "calm": [4.0]}})
    for entry in rows:
        entry["coverage"] = 0.99 if entry["settings_id"] == "wild" else 0.9
    found = board_of(rows, options)
    assert {entry["front"] for entry in found.values()} == {1}
    assert list(found) == ["calm", "wild"]


def test_settings_that_one_scenario_lacks_are_ruled_out_and_named():
    """However good they are where they were tried."""
    rows = rows_of({"one": {"a": [9.0], "b": [1.0]}, "two": {"a": [9.0]}})
    found = board_of(rows)
    assert list(found) == ["a", "b"]
    assert (found["b"]["feasible"], found["b"]["why"], found["b"]["front"]) == (False, "two: no trial", None)
    assert found["b"]["accepted_error"] is None
    assert found["b"]["config_id@two"] is None


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"status": "failed", "error": "boom"}, "two: seed 1 failed (boom)"),
        ({"status": "diverged"}, "two: seed 1 diverged"),
        ({"nan_count": 3}, "two: 3 non-finite values (budget 0)"),
        ({"accepted_error": math.nan}, "two: seed 1 without a finite accepted_error"),
    ],
)
def test_what_goes_wrong_in_one_scenario_rules_out(change, why):
    """A fault is not averaged away by the scenarios that went well."""
    rows = rows_of({"one": {"a": [1.0, 1.0], "b": [9.0, 9.0]}, "two": {"a": [1.0, 1.0], "b": [9.0, 9.0]}})
    bad = [entry | change if entry["trial_id"] == "a@two-s1" else entry for entry in rows]
    found = board_of(bad)
    assert list(found) == ["b", "a"]
    assert found["a"]["why"] == why
    if "status" in change:
        found = board_of(bad, RankingOptions(by=("accepted_error",), failed_budget=1))
        assert list(found) == ["b", "a"]
        assert found["a"]["feasible"]
        assert found["a"]["front"] == 2


def test_a_seed_that_a_scenario_should_have_and_settings_lack_rules_out():
    """Seeds are those of each scenario; one may have more than another."""
    rows = rows_of({"one": {"a": [1.0, 1.0], "b": [2.0, 2.0]}, "two": {"a": [1.0], "b": [2.0, 2.0]}})
    assert board_of(rows)["a"]["why"] == "two: seed 1 missing"
    found = board_of(rows[:-1], seeds={"one": (0, 1), "two": (0,)})
    assert [entry["feasible"] for entry in found.values()] == [True, True]
    assert board_of(rows, seeds={"one": (0, 1, 2)})["b"]["why"] == "one: seed 2 missing"


def test_what_is_worthless_in_one_scenario_stands_below_what_is_not():
    """Worse than no answer in one of two scenarios, and first by every other figure."""
    worth = {"charged_error": 1.0, "trivial_error": 2.0}
    rows = rows_of({"one": {"a": [1.0], "b": [2.0]}, "two": {"a": [1.0], "b": [2.0]}}, **worth)
    for entry in rows:
        if entry["trial_id"] == "a@two-s0":
            entry["charged_error"] = 3.0
    found = board_of(rows)
    assert list(found) == ["b", "a"]
    assert (found["a"]["beats_abstaining"], found["b"]["beats_abstaining"]) == (False, True)
    assert found["a"]["feasible"]


def test_settings_that_disagree_between_scenarios_are_less_sure_of_their_rank():
    """Every seed agrees within its scenario; that the scenarios do not is what the interval says."""
    alike = {name: {"a": [1.0] * 3, "b": [2.0] * 3} for name in ("one", "two")}
    found = board_of(rows_of(alike))
    assert (found["a"]["rank_low"], found["a"]["rank_high"], found["a"]["p_best"]) == (
        1,
        1,
        pytest.approx(1.0),
    )
    apart = alike | {"two": {"a": [1.5] * 3, "b": [1.0] * 3}}
    found = board_of(rows_of(apart))
    assert (found["a"]["rank_low"], found["a"]["rank_high"]) == (1, 2)
    # Of six drawn blocks, "a" leads unless "two" outweighs ln(2) of "one" against ln(1.5) of its own.
    leads = sum(math.comb(6, k) for k in range(7) if k * math.log(2) > (6 - k) * math.log(1.5)) / 2**6
    assert found["a"]["p_best"] == pytest.approx(leads)


def test_an_error_of_zero_is_no_infinite_gain():
    """Exact in one scenario and hopeless in the other: the hopeless part still counts."""
    found = board_of(
        rows_of({"one": {"a": [0.0], "b": [1.0], "c": [1.0]}, "two": {"a": [1e9], "b": [1.0], "c": [1.0]}})
    )
    assert list(found)[-1] == "a"
    assert all(math.isfinite(entry["accepted_error"]) for entry in found.values())


def test_rows_without_ids_of_their_settings_are_matched_by_their_knobs():
    """Runs of an earlier version: the scenario is the task, and equal knobs are equal settings."""
    rows = rows_of({"one": {"a": [1.0], "b": [2.0]}, "two": {"a": [1.0], "b": [2.0]}})
    old = [
        {key: value for key, value in entry.items() if key not in ("scenario", "settings_id")}
        | {"config.learning_rate": 0.1 if entry["settings_id"] == "a" else 1, "config.x": None}
        for entry in rows
    ]
    found = rank_scenarios([pa.Table.from_pylist(old[:2]), pa.Table.from_pylist(old[2:])], BY_ERROR)
    assert found.column("config_id@one").to_pylist() == ["a@one", "b@one"]
    assert found.column("config_id@two").to_pylist() == ["a@two", "b@two"]
    assert found.column("feasible").to_pylist() == [True, True]


def test_the_table_says_what_was_compared_and_how():
    """The metadata hold what a page or a reader needs to say what the figures are."""
    table = rank_scenarios([pa.Table.from_pylist(rows_of({"one": {"a": [1.0]}, "two": {"a": [2.0]}}))])
    said = json.loads(table.schema.metadata[SCENARIOS_KEY])
    assert said["scenarios"] == ["one", "two"]
    assert said["compared"] == {
        "coverage_shortfall": "difference",
        "accepted_error": LOG_RATIO,
        "step_time_ms": LOG_RATIO,
    }
    assert said["seeds"] == {"one": [0], "two": [0]}
    assert said["reference"] is None


def test_nothing_feasible_is_a_table_that_says_so():
    """Every settings ruled out, each with its reason, and no figure."""
    found = board_of(rows_of({"one": {"a": [1.0]}, "two": {"a": [1.0]}}, nan_count=1))
    assert [entry["feasible"] for entry in found.values()] == [False]
    assert found["a"]["why"] == "one: 1 non-finite values (budget 0); two: 1 non-finite values (budget 0)"
    assert found["a"]["rank_low"] is None


@pytest.mark.parametrize(
    ("tables", "options", "said"),
    [
        ([], {}, "at least one table"),
        ([[row("a", "one")], [row("b", "two")]], {}, r"in all of the 2 scenarios one \(1\), two \(1\)"),
        ([[row("a")], [row("a", data_digest="other")]], {}, "scenario one must have the same data"),
        ([[row("a")]], {"by": ("robustness",)}, "measured within one run"),
        ([[row("a")]], {"by": ("val_loss",)}, "hold no metric val_loss"),
        ([[{"x": 1}]], {}, "must have the column config_id"),
        ([[row("a")], [row("b", seed="x")]], {}, "columns of the same types"),
    ],
    ids=["none", "disjoint", "data", "robustness", "metric", "no ids", "types"],
)
def test_what_cannot_be_ranked_together_is_refused_in_one_line(tables, options, said):
    with pytest.raises(ValueError, match=said) as caught:
        rank_scenarios([pa.Table.from_pylist(rows) for rows in tables], RankingOptions(**options))
    assert "\n" not in str(caught.value)


def test_many_settings_are_ranked_in_a_moment():
    """200 settings in 3 scenarios of 5 seeds, 1000 draws of their blocks."""
    source = np.random.default_rng(0)
    rows = rows_of(
        {
            scenario: {f"c{index:03}": source.uniform(1, 2, 5).tolist() for index in range(205)}
            for scenario in ("one", "two", "three")
        }
    )
    table = rank_scenarios([pa.Table.from_pylist(rows)])
    assert table.column("rank_low").null_count == 5
    assert sum(table.column("p_best").drop_null().to_pylist()) == pytest.approx(1.0)


@pytest.mark.parametrize("power", range(-12, 13, 3))
def test_what_ties_over_scenarios_ties_in_every_unit(power):
    """Better by a ratio here and worse by it there is as good: one front, whatever rounding makes of it."""
    unit = 2.0**power
    board = board_of(
        rows_of(
            {
                "t0": {"a": [3 * unit / 8], "b": [5 * unit / 8], "c": [7 * unit / 8]},
                "t1": {"a": [5 / 8], "b": [3 / 8], "c": [7 / 8]},
                "t2": {"a": [11 / 8], "b": [11 / 8], "c": [13 / 8]},
            }
        )
    )
    assert [(name, entry["front"]) for name, entry in board.items()] == [("a", 1), ("b", 1), ("c", 2)]
