"""The numbers of a run's page, as plain data, and that the SQL beside each figure finds the same ones."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pytest
from made_runs import made_history, made_rows, made_run

from reports.hypervolume import run_hypervolume
from reports.ranking import RankingOptions, rank
from reports.run_page import read_run
from reports.run_queries import queries
from reports.run_verdict import verdict
from reports.run_view import (
    MOST_AXES,
    MOST_CURVES,
    MOST_EPOCHS,
    MOST_FOREST_CONFIGS,
    MOST_LISTED,
    MOST_POINTS,
    RunParts,
    coverage_by_target,
    error_by_coverage,
    forest_rows,
    knob_shares,
    leaderboard_entries,
    learning_curves,
    nan_map,
    parallel_knobs,
    risk_curves,
    run_view,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_run(tmp_path_factory.mktemp("runs") / "made")


@pytest.fixture(scope="module")
def parts(folder: Path) -> RunParts:
    return read_run(folder).parts


@pytest.fixture(scope="module")
def view(parts: RunParts) -> dict[str, Any]:
    return run_view(parts)


def board_of(rows: list[dict[str, Any]]) -> pa.Table:
    return rank(pa.Table.from_pylist(rows), RankingOptions())


def test_the_verdict_counts_and_names(parts: RunParts):
    """How many configs, how many are worth something, which is first, what was ruled out and why."""
    said = verdict(parts.leaderboard, parts.rows)
    assert said is not None
    assert (said["configs"], said["feasible"], said["beating"]) == (12, 9, 7)
    assert said["best"]["config_id"] == "c00"
    assert {entry["reason"]: entry["configs"] for entry in said["ruled_out"]} == {
        "non-finite values": 1,
        "trials failed": 1,
        "no finite value to compare": 1,
    }
    assert said["sentence"].startswith("Of 12 configs, 9 can be ranked and 7 beat abstaining everywhere.")
    assert "Ranked first is c00" in said["sentence"]
    assert "3 configs are ruled out: non-finite values (1), " in said["sentence"]
    assert any("2 seeds per config" in warning for warning in said["warnings"])


def test_the_verdict_says_how_much_of_the_objectives_the_run_covers(parts: RunParts):
    """None where no config has them all."""
    board = parts.leaderboard
    said = verdict(board)
    assert said["hypervolume"] == run_hypervolume(board).share
    nobody = board.set_column(
        board.column_names.index("feasible"), "feasible", pa.array([False] * len(board))
    )
    assert verdict(nobody)["hypervolume"] is None


def test_the_verdict_says_how_sure_the_first_rank_is(parts: RunParts):
    """With rank intervals the sentence has them; without, a warning says so."""
    board = parts.leaderboard
    assert board is not None
    for name in ("rank_low", "rank_high", "p_best"):
        if name in board.column_names:
            board = board.drop_columns([name])
    bare = verdict(board)
    assert bare is not None
    assert any("how sure its ranks are" in warning for warning in bare["warnings"])
    numbers = pa.array([1] * len(board))
    sure = board.append_column("rank_low", numbers).append_column("rank_high", pa.array([4] * len(board)))
    said = verdict(sure.append_column("p_best", pa.array([0.625] * len(board))))
    assert said is not None
    assert (
        "its rank between 1 and 4 when seeds are drawn anew and first in 62 % of the draws"
        in said["sentence"]
    )
    assert any("up to rank 4" in warning for warning in said["warnings"])


def test_a_run_in_which_nothing_is_fit_for_use_is_said_to_be_so():
    """No config that can be ranked, and a first one that is no better than abstaining, are warned of."""
    failed = [{**row, "status": "failed", "accepted_error": math.nan} for row in made_rows(configs=2)]
    said = verdict(board_of(failed))
    assert said is not None
    assert said["best"] is None
    assert "There is no best one." in said["sentence"]
    assert any("nothing here is fit for use" in warning for warning in said["warnings"])
    useless = [{**row, "charged_error": 99.0} for row in made_rows(configs=5)]
    said = verdict(board_of(useless))
    assert said is not None
    assert "none beat abstaining" in said["sentence"]
    assert any("do not use it" in warning for warning in said["warnings"])


def test_rows_that_the_leaderboard_does_not_know_are_warned_of(parts: RunParts):
    """A run that went on after it was ranked."""
    assert parts.rows is not None
    said = verdict(parts.leaderboard, parts.rows.slice(0, 5))
    assert said is not None
    assert any("counts 24 trials, the rows are 5" in warning for warning in said["warnings"])


def test_the_leaderboard_has_means_and_what_is_left_out(parts: RunParts):
    """In the order of the ranking, with a line between kinds, and ruled-out configs with their reasons."""
    listed = leaderboard_entries(parts.leaderboard)
    assert listed is not None
    assert [entry["rank"] for entry in listed["entries"]] == list(range(1, 10))
    headings = [entry["heading"] for entry in listed["entries"]]
    assert headings[7].startswith("no better than abstaining everywhere, which has a charged error of 5")
    assert headings[:7] == [""] * 7
    at = listed["metrics"].index("accepted_error")
    assert listed["entries"][0]["spreads"][at] == pytest.approx((1.05, 0.0707), abs=1e-3)
    assert {entry["config_id"] for entry in listed["ruled_out"]} == {"c09", "c10", "c11"}
    assert ("optimizer", "adam") in listed["best_knobs"]
    many = leaderboard_entries(board_of(made_rows(configs=40)))
    assert many is not None
    assert (len(many["entries"]), many["left_out"]) == (MOST_LISTED, 40 - 3 - MOST_LISTED)


def test_points_are_means_with_their_kind(parts: RunParts):
    """What has no finite number is counted, not placed; a value far beyond the others is known as such."""
    figure = error_by_coverage(parts.leaderboard)
    assert figure is not None
    assert figure["unplaced"] == 2  # one failed, one never answered
    first = figure["points"][0]
    assert (first["config_id"], first["kind"], first["rank"]) == ("c00", 0, 1)
    assert first["y"] == pytest.approx(1.05)
    assert parts.leaderboard is not None
    times = {entry["config_id"]: entry["step_time_ms_mean"] for entry in parts.leaderboard.to_pylist()}
    assert all(point["size"] == times[point["config_id"]] for point in figure["points"])
    assert figure["sizes"] == (
        min(point["size"] for point in figure["points"]),
        max(point["size"] for point in figure["points"]),
    )
    assert {point["kind"] for point in figure["points"]} == {0, 1, 2, 3}
    rows = [{**row, "accepted_error": 1e60} if row["config_id"] == "c03" else row for row in made_rows()]
    far = error_by_coverage(board_of(rows))
    assert far is not None
    assert far["beyond"] == 1
    assert far["top"] < 100
    targets = coverage_by_target(parts.leaderboard)
    assert targets is not None
    assert targets["points"][0]["x"] == 0.9
    assert targets["points"][0]["low"] <= targets["points"][0]["y"] <= targets["points"][0]["high"]


def test_very_many_points_are_bounded_by_rank():
    """The best ranked are taken, the others are counted."""
    figure = error_by_coverage(board_of(made_rows(configs=MOST_POINTS + 40)))
    assert figure is not None
    assert len(figure["points"]) == MOST_POINTS
    assert figure["left_out"] + figure["unplaced"] == 40
    assert [point["rank"] for point in figure["points"]] == sorted(p["rank"] for p in figure["points"])


def test_knobs_that_vary_are_axes_the_most_important_first(parts: RunParts):
    """None where a knob is not used; a knob with one value is no axis."""
    figure = parallel_knobs(parts.leaderboard, {"entries": [{"knob": "momentum", "share": 0.5}]})
    assert figure is not None
    assert figure["axes"][0]["name"] == "momentum"
    assert {axis["name"] for axis in figure["axes"]} == {"momentum", "learning_rate", "optimizer"}
    momentum = figure["axes"][0]["values"]
    adam = next(axis for axis in figure["axes"] if axis["name"] == "optimizer")["values"]
    assert all((value is None) == (name == "adam") for value, name in zip(momentum, adam, strict=True))
    assert len(figure["lines"]) == 12
    wide = [{**row, **{f"config.k{i}": float(row["place"]) for i in range(30)}} for row in made_rows()]
    bounded = parallel_knobs(board_of(wide))
    assert bounded is not None
    assert len(bounded["axes"]) == MOST_AXES
    assert len(bounded["axes_left_out"]) == 33 - MOST_AXES


def test_importance_is_asked_for_or_said_to_be_refused(view: dict[str, Any]):
    """Shares with their range, largest first; too few configs give the reason instead."""
    figure = view["importance"]
    assert figure["metric"] == "charged_error"
    shares = [entry["share"] for entry in figure["entries"]]
    assert shares == sorted(shares, reverse=True)
    assert all(entry["low"] <= entry["share"] <= entry["high"] for entry in figure["entries"])
    refused = knob_shares(pa.Table.from_pylist(made_rows(configs=3)))
    assert refused is not None
    assert refused["entries"] == []
    assert "8" in refused["why"]


def test_importance_of_many_configs_is_that_of_a_sample():
    """Whole configs, evenly many by id, the same whatever the order of the rows; few are all taken."""
    rows = pa.Table.from_pylist(made_rows(configs=300))
    held = forest_rows(rows)
    ids = set(held.column("config_id").to_pylist())
    assert len(ids) == MOST_FOREST_CONFIGS
    assert len(held) == 2 * len(ids)
    turned = forest_rows(rows.take(list(reversed(range(len(rows))))))
    assert set(turned.column("config_id").to_pylist()) == ids
    few = rows.slice(0, 20)
    assert forest_rows(few).equals(few)


def test_importance_that_is_not_there_is_said(parts: RunParts, monkeypatch: pytest.MonkeyPatch):
    """Where the module or its library cannot be loaded, the page says so."""
    monkeypatch.setitem(__import__("sys").modules, "reports.importance", None)
    figure = knob_shares(parts.rows)
    assert figure is not None
    assert figure["entries"] == []
    assert figure["why"].startswith("it cannot be computed here")


def test_risk_curves_are_of_the_first_seed_with_the_mean_area(parts: RunParts):
    """Rows without curves are said to have none."""
    figure = risk_curves(parts.rows, ["c00", "c01"])
    assert figure is not None
    assert [item["name"] for item in figure["series"]] == ["c00", "c01"]
    assert figure["series"][0]["x"] == [0.25, 0.5, 0.75, 1.0]
    assert figure["series"][0]["seed"] == 0
    assert figure["series"][0]["area"] == pytest.approx(0.75)
    assert parts.rows is not None
    without = risk_curves(parts.rows.drop_columns(["curve_error"]), ["c00"])
    assert without == {"series": [], "why": "the rows hold no curve_error"}


def test_the_nan_map_says_config_kind_and_epoch(parts: RunParts):
    """Kinds are the rows', epochs the history's, which counts since the beginning."""
    figure = nan_map(parts.rows, parts.history)
    assert figure is not None
    (one,) = figure["configs"]
    assert (one["config_id"], one["total"], one["first"]) == ("c09", 14, 2)
    assert one["kinds"] == {"loss": 2, "gradient": 12, "output": 0, "parameter": 0}
    assert one["counts"] == [0, 6, 0, 8]  # two seeds, 3 values in epoch 2 and 4 in epoch 4
    assert figure["epochs"] == [1, 2, 3, 4]
    blind = nan_map(parts.rows, None)
    assert blind is not None
    assert blind["epochs"] == blind["configs"][0]["counts"] == []


def test_many_epochs_are_summed_in_bins():
    """No more than twenty cells, and nothing is lost."""
    rows = [{**row, "nan_count": 300 if row["config_id"] == "c09" else 0} for row in made_rows()]
    history = [{**row, "nan_count": float(row["epoch"])} for row in made_history(epochs=300)]
    figure = nan_map(pa.Table.from_pylist(rows), pa.Table.from_pylist(history))
    assert figure is not None
    assert len(figure["epochs"]) == MOST_EPOCHS
    assert sum(figure["configs"][0]["counts"]) == 600


def test_learning_curves_are_means_over_seeds_with_their_range(parts: RunParts):
    """Long ones are thinned, with the first and the last epoch kept."""
    panels = learning_curves(parts.history, ["c00", "c01"])
    assert panels is not None
    loss = next(panel for panel in panels if panel["column"] == "loss")
    first = loss["series"][0]
    assert first["x"] == [1, 2, 3, 4]
    assert first["values"][0] == pytest.approx(1.05)
    assert (first["low"][0], first["high"][0]) == pytest.approx((1.0, 1.1))
    long = learning_curves(pa.Table.from_pylist(made_history(epochs=300)), ["c00"])
    assert long is not None
    assert len(long[0]["series"][0]["x"]) == MOST_EPOCHS
    assert (long[0]["series"][0]["x"][0], long[0]["series"][0]["x"][-1]) == (1, 300)


def test_a_view_of_nothing_says_nothing():
    """Without a table there is no figure, and none is made up."""
    view = run_view(RunParts())
    assert {name for name, value in view.items() if value} == set()


def test_the_sql_of_each_figure_finds_its_numbers(
    folder: Path, view: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    """DuckDB, in the run's folder."""
    monkeypatch.chdir(folder)
    told = queries(view)
    ask = {
        name: duckdb.sql(text).fetchall()
        for name, text in told.items()
        if name not in ("importance", "robustness")
    }
    assert sum(count for _, _, count, *_ in ask["verdict"]) == view["verdict"]["configs"]
    assert [row[2] for row in ask["listed"]][:9] == [
        entry["config_id"] for entry in view["listed"]["entries"]
    ]
    places = {row[1]: row[3:] for row in ask["scatter"]}
    assert all(places[p["config_id"]] == (p["x"], p["y"], p["size"]) for p in view["scatter"]["points"])
    reached = {row[1]: row[2:] for row in ask["targets"]}
    assert all(
        reached[p["config_id"]] == (p["x"], p["y"], p["low"], p["high"]) for p in view["targets"]["points"]
    )
    for index, axis in enumerate(view["knobs"]["axes"]):
        assert [row[2 + index] for row in ask["knobs"]] == axis["values"]
    curves = {(row[0], row[1]): row[3] for row in ask["curves"]}
    assert all(curves[item["name"], item["seed"]] == item["values"] for item in view["curves"]["series"])
    assert ask["nans"] == [("c09", 14, 2, 12, 0, 0)]
    assert ask["nan_epochs"] == [("c09", 2, 6.0), ("c09", 4, 8.0)]
    learned = {(row[0], row[1]): row[2:] for row in ask["learning"]}
    for index, panel in enumerate(view["learning"]):
        for item in panel["series"]:
            for epoch, mean, low, high in zip(
                item["x"], item["values"], item["low"], item["high"], strict=True
            ):
                found = learned[item["name"], epoch][3 * index : 3 * index + 3]
                assert found == pytest.approx((mean, low, high))


def test_lines_are_drawn_of_the_best(view: dict[str, Any]):
    """No more than can be told apart, in the order of the ranking."""
    names = [config["config_id"] for config in view["configs"]]
    assert names == [entry["config_id"] for entry in view["listed"]["entries"]][:MOST_CURVES]


def test_the_view_is_plain_data(view: dict[str, Any]):
    """Nothing of it needs this project to be read."""
    assert json.loads(json.dumps(view))["verdict"]["configs"] == 12
