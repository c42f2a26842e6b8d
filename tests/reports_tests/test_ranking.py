"""Ranking: what is ruled out, what dominates what, and that nothing gains by going wrong."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reports.evidence import RANK_COLUMNS
from reports.ranking import MOST_WEIGHED, RANKED_BY_KEY, RankingOptions, rank, write_leaderboard

SEEDS = (0, 1)
ROW_TYPES = pa.schema(
    [
        ("config_id", pa.string()),
        ("trial_id", pa.string()),
        ("seed", pa.int64()),
        ("status", pa.string()),
        ("error", pa.string()),
        ("nan_count", pa.int64()),
        ("coverage", pa.float64()),
        ("target_coverage", pa.float64()),
        ("accepted_error", pa.float64()),
        ("charged_error", pa.float64()),
        ("trivial_error", pa.float64()),
        ("step_time_ms", pa.float64()),
    ]
)


def row(config_id: str, seed: int = 0, **changes: Any) -> dict[str, Any]:
    base = {
        "config_id": config_id,
        "trial_id": f"{config_id}-s{seed}",
        "seed": seed,
        "status": "completed",
        "error": "",
        "nan_count": 0,
        "coverage": 0.95,
        "target_coverage": 0.95,
        "accepted_error": 1.0,
        "step_time_ms": 2.0,
    }
    return base | changes


def table_of(rows: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(rows, schema=ROW_TYPES)


def ranked(rows: list[dict[str, Any]], **options: Any) -> dict[str, dict[str, Any]]:
    entries = rank(table_of(rows), RankingOptions(**options)).to_pylist()
    return {entry["config_id"]: entry for entry in entries}


def order(rows: list[dict[str, Any]], **options: Any) -> str:
    return "".join(ranked(rows, **options))


def test_a_dominated_config_stands_in_a_later_front():
    """Better in one objective and equal in the rest is better; better in one and worse in one is not."""
    found = ranked(
        [row("a"), row("b", accepted_error=0.5, step_time_ms=4.0), row("c", accepted_error=1.5), row("d")]
    )
    assert {name: entry["front"] for name, entry in found.items()} == {"a": 1, "b": 1, "c": 2, "d": 1}
    assert "".join(found) == "badc"
    assert [entry["rank"] for entry in found.values()] == [1, 2, 3, 4]


def test_ties_are_broken_in_the_stated_order():
    """Inside a front: shortfall, error, NaN count, step time, then config_id."""
    front = [
        row("e", step_time_ms=2.00001),
        row("d", nan_count=1),
        row("c", accepted_error=0.5, step_time_ms=9.0, nan_count=3),
        row("b", coverage=0.9, accepted_error=0.1),
        row("a"),
    ]
    assert order(front, nan_budget=3) == "caedb"
    assert order(front, nan_budget=3, tie_break=("accepted_error", "step_time_ms")) == "bcade"
    assert order(front, nan_budget=3, by=("accepted_error",)) == "bcaed"


def test_what_is_no_better_than_abstaining_stands_below_all_that_is():
    """Neither speed nor coverage lifts garbage, or a model that answers nothing, over an honest config."""
    abstains = {"accepted_error": 0.1, "coverage": 0.95, "charged_error": 2.0, "trivial_error": 2.0}
    found = ranked(
        [
            row("a", charged_error=9.0, trivial_error=2.0, step_time_ms=0.1, accepted_error=0.1),
            row("b", **abstains),
            row("c", charged_error=1.9, trivial_error=2.0, step_time_ms=9.0, accepted_error=3.0),
            row("d", charged_error=math.inf, trivial_error=2.0, step_time_ms=0.01, accepted_error=0.0),
            row("e", accepted_error=9.0, step_time_ms=9.0),  # of an earlier version, which does not know
        ]
    )
    assert "".join(found) in ("cedba", "cedab")
    assert {name: entry["beats_abstaining"] for name, entry in found.items()} == {
        "a": False,
        "b": False,
        "c": True,
        "d": False,
        "e": None,
    }
    assert found["d"]["front"] > found["e"]["front"]


def test_a_nan_rules_a_config_out_and_says_why():
    """With no budget one non-finite value is too many, however good the rest."""
    found = ranked([row("a", nan_count=1, accepted_error=0.0), row("b")])
    assert list(found) == ["b", "a"]
    assert (found["a"]["feasible"], found["a"]["front"]) == (False, None)
    assert found["a"]["why"] == "1 non-finite values (budget 0)"
    assert (found["b"]["feasible"], found["b"]["why"]) == (True, "")


def test_the_nan_budget_is_for_all_trials_of_a_config_together():
    """Two trials with one NaN each are within a budget of two, and not of one."""
    rows = [row("a", seed, nan_count=1) for seed in SEEDS]
    assert ranked(rows, nan_budget=2)["a"]["feasible"]
    assert not ranked(rows, nan_budget=1)["a"]["feasible"]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"status": "failed", "error": "TaskError:\n no data"}, "seed 1 failed (TaskError: no data)"),
        ({"status": "diverged"}, "seed 1 diverged"),
        ({"accepted_error": math.nan, "coverage": 0.0}, "seed 1 without a finite accepted_error"),
        ({"accepted_error": None}, "seed 1 without a finite accepted_error"),
        ({"accepted_error": -math.inf}, "seed 1 without a finite accepted_error"),
        ({"coverage": math.nan}, "seed 1 without a finite coverage_shortfall"),
        ({"step_time_ms": math.nan}, "seed 1 without a finite step_time_ms"),
        ({"nan_count": None}, "seed 1 without a nan_count"),
        ({"seed": 2}, "seed 1 missing"),
    ],
)
def test_a_trial_that_went_wrong_rules_its_config_out(change, why):
    """Each way to go wrong puts the config below a worse sound one, with its reason."""
    sound = [row("z", seed, accepted_error=9.0, coverage=0.1, step_time_ms=9.0) for seed in SEEDS]
    good_but_for_one = [row("a", 0), row("a", 1) | change]
    found = ranked([*good_but_for_one, *sound], seeds=SEEDS)
    assert list(found) == ["z", "a"]
    assert found["a"]["why"] == why


def test_a_long_error_message_is_cut_and_stays_one_line():
    """The reason is read in a table; a traceback in it would break the line."""
    why = ranked([row("a", status="failed", error="x\n" * 500)])["a"]["why"]
    assert "\n" not in why
    assert len(why) < 120
    assert why.endswith("…)")


def test_a_stopped_trial_counts_with_what_it_reached():
    """Stopping early is no failure: the config is compared by what was measured."""
    found = ranked([row("a", status="stopped", accepted_error=0.5), row("b")])
    assert list(found) == ["a", "b"]
    assert found["a"]["feasible"]


def test_a_model_that_answers_nothing_is_never_first():
    """Abstaining everywhere is fast and makes no error; it is ruled out all the same."""
    abstains = row("a", coverage=0.0, accepted_error=math.nan, step_time_ms=0.01)
    assert order([abstains, row("b", accepted_error=1e9, coverage=0.01, step_time_ms=1e9)]) == "ba"


def test_an_allowed_failure_still_costs_every_objective():
    """Within the failed budget a config stays in the order, behind every sound one."""
    rows = [
        row("a", 0, accepted_error=0.0, step_time_ms=0.1),
        row("a", 1, status="failed"),
        row("b", 0, accepted_error=5.0),
        row("b", 1, accepted_error=5.0),
    ]
    found = ranked(rows, failed_budget=1)
    assert list(found) == ["b", "a"]
    assert found["a"]["feasible"]
    assert (found["b"]["front"], found["a"]["front"]) == (1, 2)


def test_an_allowed_gap_costs_as_much_as_a_failure():
    """A seed that never ran, within the failed budget, is not better than one that failed."""
    rows = [
        row("a", 0, accepted_error=0.0),
        row("b", 0),
        row("b", 1),
        row("c", 0),
        row("c", 1, status="failed"),
    ]
    found = ranked(rows, failed_budget=1)
    assert list(found) == ["b", "a", "c"]
    assert [entry["front"] for entry in found.values()] == [1, 2, 2]


def test_ruled_out_configs_with_less_wrong_come_first():
    """Below the feasible ones, one bad trial is still better than two."""
    rows = [row("a", seed, status="failed") for seed in SEEDS]
    rows += [row("b", 0, status="failed"), row("b", 1)]
    assert order(rows) == "ba"


def test_step_times_in_one_cell_are_equal_in_the_fronts():
    """A difference that is a clock's noise makes no config optimal; a real one does."""
    noisy = [row("a", step_time_ms=2.0), row("b", step_time_ms=1.995, accepted_error=1.5)]
    assert [entry["front"] for entry in ranked(noisy).values()] == [1, 2]
    assert [entry["front"] for entry in ranked(noisy, step_time_tolerance=0.0).values()] == [1, 1]
    faster = [row("a", step_time_ms=2.0), row("b", step_time_ms=1.0, accepted_error=1.5)]
    assert [entry["front"] for entry in ranked(faster).values()] == [1, 1]


def test_one_target_for_all_takes_the_gain_from_asking_for_little():
    """A config that lowered its own target is first by its own measure and not by a common one."""
    modest = row("a", coverage=0.5, target_coverage=0.5, accepted_error=0.9)
    rows = [modest, row("b")]
    assert order(rows) == "ab"
    assert order(rows, target_coverage=0.95) == "ba"


def test_a_higher_metric_can_be_an_objective():
    """Coverage is better when higher; so is a task's own metric with its direction stated."""
    rows = [row("a", coverage=0.8), row("b", coverage=0.9)]
    assert order(rows, by=("coverage",)) == "ba"
    table = table_of(rows).append_column("metric.hits", pa.array([3.0, 1.0]))
    options = RankingOptions(by=("metric.hits:higher",))
    assert rank(table, options).column("config_id").to_pylist() == ["a", "b"]


def test_configs_can_be_ranked_by_telemetry():
    """A trial in which nothing says it has no value to compare; its config is ruled out, not left out."""
    table = table_of([row("a"), row("b"), row("c")])
    table = table.append_column("telemetry.share", pa.array([0.4, 0.2, None]))
    board = rank(table, RankingOptions(by=("telemetry.share:lower",)))
    assert board.column("config_id").to_pylist() == ["b", "a", "c"]
    assert board.column("feasible").to_pylist() == [True, True, False]
    assert "telemetry.share" in board.column("why").to_pylist()[2]


def test_a_metric_that_the_rows_lack_is_named():
    """A known metric without a column is an error that names it."""
    with pytest.raises(ValueError, match="rows hold no metric val_loss"):
        rank(table_of([row("a")]), RankingOptions(by=("val_loss",)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nan_budget": -1}, "nan_budget must be >= 0, got nan_budget=-1"),
        ({"failed_budget": -1}, "failed_budget must be >= 0"),
        ({"by": ()}, "by must name at least one metric"),
        ({"by": ("loss", "loss")}, "by must name each metric once"),
        ({"by": ("los",)}, "unknown metric los; did you mean loss"),
        ({"tie_break": ("test_accepted_error",)}, "not on the test split"),
        ({"target_coverage": 1.5}, r"target_coverage must lie in \[0, 1\]"),
        ({"target_coverage": math.nan}, r"target_coverage must lie in \[0, 1\]"),
        ({"step_time_tolerance": -0.1}, "step_time_tolerance must be >= 0"),
        ({"step_time_tolerance": math.nan}, "step_time_tolerance must be >= 0"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    """Budgets, names and targets are checked when the options are made."""
    with pytest.raises(ValueError, match=message):
        RankingOptions(**options)


def test_the_leaderboard_is_written_with_how_it_was_ranked(tmp_path):
    """The file holds every config, and its metadata the rules by which it is ordered."""
    leaderboard = rank(table_of([row("a"), row("b", status="failed")]), RankingOptions(nan_budget=3))
    path = write_leaderboard(tmp_path, leaderboard)
    assert [entry.name for entry in tmp_path.iterdir()] == ["leaderboard.parquet"]
    stored = pq.read_table(path)
    assert stored.column("config_id").to_pylist() == ["a", "b"]
    said = json.loads(stored.schema.metadata[RANKED_BY_KEY])
    assert said["nan_budget"] == 3
    assert said["by"] == ["coverage_shortfall", "accepted_error", "step_time_ms"]


numbers = st.sampled_from([0.0, 0.1, 0.5, 0.50001, 0.9, 1.0, 3.0, 1e6])
measured = st.fixed_dictionaries(
    {
        "status": st.sampled_from(["completed", "completed", "completed", "stopped", "diverged", "failed"]),
        "nan_count": st.sampled_from([0, 0, 0, 1, 5]),
        "coverage": st.sampled_from([0.0, 0.5, 0.94, 0.95, 1.0]),
        "target_coverage": st.sampled_from([0.5, 0.95]),
        "accepted_error": numbers | st.just(math.nan),
        "charged_error": numbers | st.sampled_from([math.nan, math.inf]),
        "trivial_error": st.sampled_from([0.5, 1.0, math.nan]),
        "step_time_ms": numbers,
    }
)
runs = st.lists(st.lists(measured, min_size=2, max_size=3), min_size=1, max_size=6)
budgets = st.fixed_dictionaries(
    {
        "nan_budget": st.sampled_from([0, 3]),
        "failed_budget": st.integers(0, 2),
        "step_time_tolerance": st.sampled_from([0.0, 0.05]),
        "seeds": st.just((0, 1, 2)),
    }
)


def rows_of(run: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return [
        row(f"c{config}", seed, **outcome)
        for config, outcomes in enumerate(run)
        for seed, outcome in enumerate(outcomes)
    ]


@settings(deadline=None, max_examples=100)
@given(run=runs, options=budgets, data=st.data())
def test_the_order_of_the_rows_changes_nothing(run, options, data):
    """The leaderboard is the same, value for value, in whatever order trials ended."""
    rows = rows_of(run)
    first = rank(table_of(rows), RankingOptions(**options)).to_pylist()
    shuffled = rank(table_of(data.draw(st.permutations(rows))), RankingOptions(**options)).to_pylist()
    assert repr(shuffled) == repr(first)


@settings(deadline=None, max_examples=100)
@given(run=runs, options=budgets)
def test_every_config_appears_once_and_sound_ones_stand_above(run, options):
    """Nothing is hidden: each config has one rank, the feasible ones first, each ruled-out one a reason."""
    entries = rank(table_of(rows_of(run)), RankingOptions(**options)).to_pylist()
    assert sorted(entry["config_id"] for entry in entries) == sorted(f"c{index}" for index in range(len(run)))
    feasible = [entry["feasible"] for entry in entries]
    assert feasible == sorted(feasible, reverse=True)
    assert all(bool(entry["why"]) != entry["feasible"] for entry in entries)
    fronts = [entry["front"] for entry in entries if entry["feasible"]]
    assert fronts == sorted(fronts)


def test_means_that_overflow_are_the_worst_and_no_warning():
    """Values near the largest float are ranked behind all others, also where two add up beyond it."""
    rows = [row("a", seed, accepted_error=1.7e308) for seed in SEEDS]
    rows += [row("b", seed, accepted_error=1e3) for seed in SEEDS]
    assert order(rows, by=("accepted_error",)) == "ba"


def scored(scores: dict[str, float | None]) -> pa.Table:
    """Robustness by config, with an interval of a tenth to each side."""
    held = [
        {
            "config_id": name,
            "robustness": score,
            "low": None if score is None else score - 0.1,
            "high": None if score is None else score + 0.1,
        }
        for name, score in scores.items()
    ]
    schema = pa.schema(
        [("config_id", pa.string()), *((n, pa.float64()) for n in ("robustness", "low", "high"))]
    )
    return pa.Table.from_pylist(held, schema=schema)


def test_robustness_is_a_column_wherever_it_was_measured():
    """It stands in the leaderboard without being asked for; a config that nobody examined has NaN."""
    rows = table_of([row(name) for name in "ab"])
    entries = rank(rows, robustness=scored({"b": 0.8, "not in the run": 0.1})).to_pylist()
    held = {entry["config_id"]: entry for entry in entries}
    assert held["b"]["robustness"] == 0.8
    assert held["b"]["robustness_low"] == pytest.approx(0.7)
    assert math.isnan(held["a"]["robustness"])
    assert all(entry["feasible"] for entry in entries)
    assert "robustness" not in rank(rows).column_names


def test_the_more_robust_config_stands_first_when_asked():
    """Higher is better, and a score that is not finite is none."""
    rows = table_of([row(name) for name in "abcd"])
    scores = scored({"a": 0.2, "b": 0.9, "c": float("nan"), "d": None})
    entries = rank(rows, RankingOptions(by=("robustness",)), scores).to_pylist()
    assert [entry["config_id"] for entry in entries] == ["b", "a", "c", "d"]
    assert [entry["front"] for entry in entries] == [1, 2, 3, 3]
    assert [entry["why"] for entry in entries] == [""] * 4


@given(
    st.lists(st.tuples(st.none() | st.floats(0, 1), st.floats(0, 2), st.booleans()), min_size=1, max_size=8)
)
def test_no_config_without_a_score_stands_above_one_with(drawn):
    """Whatever else it is good at; what is ruled out stays below both."""
    rows, scores = [], {}
    for index, (score, error, failed) in enumerate(drawn):
        name = f"c{index}"
        rows.append(row(name, accepted_error=error, status="failed" if failed else "completed"))
        scores[name] = score
    options = RankingOptions(by=("accepted_error", "robustness"))
    entries = rank(table_of(rows), options, scored(scores)).to_pylist()
    order = [
        (not entry["feasible"], math.isnan(entry["robustness"])) for entry in entries if entry["feasible"]
    ]
    assert order == sorted(order)
    fronts = [entry["front"] for entry in entries if entry["feasible"]]
    assert fronts == sorted(fronts)
    assert sorted(entry["config_id"] for entry in entries) == sorted(scores)


def test_robustness_that_was_not_measured_cannot_be_an_objective():
    """The message says what to run."""
    with pytest.raises(
        ValueError, match="no config has a robustness yet: run `scm-harness robustness RUN` first"
    ):
        rank(table_of([row("a")]), RankingOptions(by=("robustness",)))


# --- how sure a rank is -------------------------------------------------------------------------------


def confidence(table: pa.Table) -> list[tuple]:
    names = ("config_id", *RANK_COLUMNS)
    return list(zip(*(table.column(name).to_pylist() for name in names), strict=True))


@given(st.randoms(use_true_random=False))
def test_the_order_of_rows_changes_no_confidence(random):
    rows = table_of(
        [
            row(f"c{config}", seed, accepted_error=error, step_time_ms=1.0)
            for config, errors in enumerate([(1.0, 2.0, 3.0), (2.0, 2.0, 2.0), (3.0, 1.0, 2.5)])
            for seed, error in enumerate(errors)
        ]
    )
    turned = list(range(len(rows)))
    random.shuffle(turned)
    assert confidence(rank(rows.take(turned))) == confidence(rank(rows))


def test_a_run_of_one_seed_says_nothing_of_its_ranks():
    held = rank(table_of([row("a"), row("b")]))
    assert [held.column(name).null_count for name in RANK_COLUMNS] == [2, 2, 2, 2]


def test_what_is_ruled_out_has_no_rank_to_be_sure_of():
    held = rank(table_of([row(name, seed, nan_count=int(name == "b")) for name in "ab" for seed in range(3)]))
    assert confidence(held) == [("a", 1, 1, 1.0, 1.0), ("b", None, None, None, None)]


def test_a_config_that_wins_by_one_seed_is_not_surely_first():
    errors = {"lucky": (0.1, 2.0, 2.0, 2.0, 2.0), "steady": (1.8, 1.8, 1.8, 1.8, 1.8)}
    held = rank(
        table_of(
            [row(name, seed, accepted_error=e) for name, es in errors.items() for seed, e in enumerate(es)]
        )
    )
    first = held.to_pylist()[0]
    assert first["config_id"] == "lucky"
    assert (first["rank_low"], first["rank_high"]) == (1, 2)
    assert first["p_best"] == pytest.approx(1 - (4 / 5) ** 5)


def test_two_hundred_configs_are_weighed_in_no_time_and_the_others_not_at_all():
    source = np.random.default_rng(0)
    held = rank(
        table_of(
            [
                row(f"c{config:03}", seed, accepted_error=float(error))
                for config in range(MOST_WEIGHED + 5)
                for seed, error in enumerate(source.uniform(1, 2, 7))
            ]
        )
    )
    assert held.column("rank_low").null_count == 5
    assert held.column("p_best").slice(0, MOST_WEIGHED).null_count == 0
