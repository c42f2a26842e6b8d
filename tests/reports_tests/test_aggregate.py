"""One row per config: what its trials did, and how far they lie apart."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest

from reports.aggregate import aggregate_configs
from reports.schema import TRIAL_STATUSES


def test_counts_and_spread_over_seeds(make_rows, make_row):
    """Counts are by status; mean, sample std, min and max are those of the seeds."""
    errors = [1.0, 2.0, 4.0]
    rows = [make_row("a", seed, accepted_error=error) for seed, error in enumerate(errors)]
    entry = aggregate_configs(make_rows(rows)).to_pylist()[0]
    assert (entry["n_trials"], entry["n_completed"], entry["n_missing"]) == (3, 3, 0)
    assert entry["accepted_error_mean"] == pytest.approx(statistics.mean(errors))
    assert entry["accepted_error_std"] == pytest.approx(statistics.stdev(errors))
    assert (entry["accepted_error_min"], entry["accepted_error_max"]) == (1.0, 4.0)


@pytest.mark.parametrize("status", TRIAL_STATUSES)
def test_each_status_has_its_count(make_rows, make_row, status):
    """However a trial ended, it is in exactly one count of its config."""
    entry = aggregate_configs(make_rows([make_row("a", status=status), make_row("b")])).to_pylist()[0]
    assert {name: entry[f"n_{name}"] for name in TRIAL_STATUSES} == {
        name: int(name == status) for name in TRIAL_STATUSES
    }


def test_what_is_not_finite_is_left_out_of_the_spread_and_shown_where_nothing_is_left(make_rows, make_row):
    """The mean is over finite values; with none it is NaN, and a spread of one value is null."""
    rows = [
        make_row("a", 0, accepted_error=math.nan),
        make_row("a", 1, accepted_error=3.0),
        make_row("b", 0, accepted_error=math.nan),
        make_row("b", 1, accepted_error=math.inf),
    ]
    one, none = aggregate_configs(make_rows(rows)).to_pylist()
    assert (one["accepted_error_mean"], one["accepted_error_std"]) == (3.0, None)
    assert math.isnan(none["accepted_error_mean"])
    assert none["accepted_error_std"] is None
    assert math.isnan(none["accepted_error_min"])
    assert math.isnan(none["accepted_error_max"])


def test_shortfall_is_against_the_trials_own_target_or_the_stated_one(make_rows, make_row):
    """A config that asked for little has no shortfall, unless all are held to one target."""
    rows = make_rows([make_row("a", coverage=0.6, target_coverage=0.5), make_row("b", coverage=0.8)])
    own = aggregate_configs(rows).column("coverage_shortfall_mean").to_pylist()
    stated = aggregate_configs(rows, target_coverage=0.9).column("coverage_shortfall_mean").to_pylist()
    assert own == pytest.approx([0.0, 0.15])
    assert stated == pytest.approx([0.3, 0.1])


def test_a_seed_that_a_config_lacks_is_counted(make_rows, make_row):
    """Seeds are expected as the others have them, or as stated."""
    rows = make_rows([make_row("a", 0), make_row("a", 1), make_row("b", 1)])
    assert aggregate_configs(rows).column("n_missing").to_pylist() == [0, 1]
    assert aggregate_configs(rows, seeds=[0, 1, 2]).column("n_missing").to_pylist() == [1, 2]
    assert aggregate_configs(rows, seeds=[1]).column("n_missing").to_pylist() == [0, 0]


def test_knobs_are_carried_with_their_types(make_rows, make_row):
    """The leaderboard says what each config was, nulls included."""
    rows = make_rows([make_row("a", knobs={"momentum": 0.5}), make_row("b")])
    table = aggregate_configs(rows)
    assert table.column("config.momentum").to_pylist() == [0.5, None]
    for name in ("config.hidden_width", "config.optimizer", "config.restore_best"):
        assert table.schema.field(name).type == rows.schema.field(name).type


def test_the_order_of_rows_does_not_matter_to_the_last_bit(make_rows, make_row):
    """Sums are taken in one order, so that a mean is the same number whoever wrote first."""
    generator = np.random.default_rng(0)
    rows = [
        make_row(config, seed, accepted_error=float(generator.lognormal(0, 8)))
        for config in "abc"
        for seed in range(9)
    ]
    first = repr(aggregate_configs(make_rows(rows)).to_pylist())
    for _ in range(5):
        shuffled = [rows[index] for index in generator.permutation(len(rows))]
        assert repr(aggregate_configs(make_rows(shuffled)).to_pylist()) == first


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"knobs": {"hidden_width": 16}}, r"config a must have one value of config\.hidden_width"),
        ({"knobs": {"optimizer": None}}, r"one value of config\.optimizer"),
        ({"task": "other"}, "different tasks cannot be compared, got toy, other"),
        ({"status": "complete"}, "status must be one of .* did you mean completed"),
    ],
)
def test_rows_that_cannot_be_judged_together_are_refused(make_rows, make_row, change, message):
    """One id for two configs, two tasks, or an unknown ending would make a false comparison."""
    with pytest.raises(ValueError, match=message):
        aggregate_configs(make_rows([make_row("a", 0), make_row("a", 1, **change)]))


def test_no_rows_and_missing_columns_are_refused(make_rows, make_row):
    """Nothing to judge, or nothing to judge by, is an error that says what is missing."""
    with pytest.raises(ValueError, match="at least one row"):
        aggregate_configs(make_rows([]))
    with pytest.raises(ValueError, match="must have the columns coverage, nan_count"):
        aggregate_configs(make_rows([make_row()]).drop_columns(["coverage", "nan_count"]))
