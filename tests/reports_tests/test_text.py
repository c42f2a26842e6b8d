"""The leaderboard as text: readable in a terminal, complete about what it leaves out."""

from __future__ import annotations

import math
import textwrap

import pyarrow as pa
import pytest

from reports.ranking import RankingOptions, rank
from reports.text import WIDTH, format_number, render_leaderboard

GOLDEN = """
    4 configs, 2 feasible; 7 trials: 6 completed, 1 failed; 1 missing
    fronts over coverage_shortfall, accepted_error, step_time_ms; ties by coverage_shortfall, accepted_error, nan_count,
        step_time_ms, config_id; nan_count at most 0
    in 90%, best: where a rank lies, and how often first, by drawing 2 seeds, which are few: 5 and more would say more

    rank  in 90%  best  front  config  coverage_shortfall  accepted_error  step_time_ms        coverage  nan_count  trials
       1       1  100%      1  a                    0 ± 0      1.5 ± 0.71         2 ± 0        0.95 ± 0          0       2
                 learning_rate=0.001 optimizer=adam restore_best=false
       2       2    0%      1  b           0.025 ± 0.0071         1.5 ± 0       1.5 ± 0  0.925 ± 0.0071          0       2
                 learning_rate=0.01 optimizer=sgd momentum=0.9 restore_best=true

    ruled out: 2 of 4 configs
       3  d  seed 1 missing
       4  c  seed 0 failed (TaskError: no target); 3 non-finite values (budget 0)
"""  # noqa: E501  (a line of the terminal is longer than one of the code)


def golden_rows(make_row):
    other = {"learning_rate": 1e-2, "optimizer": "sgd", "momentum": 0.9, "restore_best": True}
    yield make_row("a", 0)
    yield make_row("a", 1, accepted_error=2.0)
    yield make_row("b", 0, accepted_error=1.5, step_time_ms=1.5, coverage=0.93, knobs=other)
    yield make_row("b", 1, accepted_error=1.5, step_time_ms=1.5, coverage=0.92, knobs=other)
    yield make_row("c", 0, status="failed", error="TaskError: no target")
    yield make_row("c", 1, nan_count=3)
    yield make_row("d", 0)


def test_a_leaderboard_reads_as_it_should(make_rows, make_row):
    """Counts, rules, spread, the knobs that vary and the reasons, in their places."""
    text = render_leaderboard(rank(make_rows(golden_rows(make_row))))
    assert text == textwrap.dedent(GOLDEN).strip("\n")


def test_what_is_no_better_than_abstaining_is_said(make_rows, make_row):
    """A line parts those configs from the ones that are worth something."""
    errors = {"a": 1.0, "b": 3.0, "c": 4.0}
    rows = [make_row(name, charged_error=error, trivial_error=2.0) for name, error in errors.items()]
    lines = render_leaderboard(rank(make_rows(rows))).splitlines()
    (at,) = [index for index, line in enumerate(lines) if "no better than abstaining" in line]
    assert lines[at].endswith("a charged_error of 2:")
    assert [line.split()[2] for line in (lines[at - 1], lines[at + 1], lines[at + 2])] == ["a", "b", "c"]


def test_one_config_has_no_knobs_that_vary(make_rows, make_row):
    """With one trial there is no spread and nothing to compare: one line says it all."""
    text = render_leaderboard(rank(make_rows([make_row("a")])))
    assert text.splitlines()[-1].split() == ["1", "1", "a", "0", "1", "2", "0.95", "0", "1"]
    assert "ruled out" not in text


def test_all_ruled_out_is_said(make_rows, make_row):
    """Where no config is feasible there is no table, and each has its reason."""
    rows = [make_row(name, status="diverged") for name in "ab"]
    lines = render_leaderboard(rank(make_rows(rows))).splitlines()
    assert "no config is feasible" in lines
    assert lines[-2:] == ["   1  a  seed 0 diverged", "   2  b  seed 0 diverged"]


def test_an_empty_leaderboard_is_said(make_rows, make_row):
    """A table without configs renders as a sentence, not as a header alone."""
    assert render_leaderboard(rank(make_rows([make_row("a")])).slice(0, 0)) == "no configs"


def test_what_is_left_out_is_counted(make_rows, make_row):
    """`top` shortens both lists, and each says by how much; None shortens nothing."""
    rows = [make_row(f"f{i}", accepted_error=float(i)) for i in range(5)]
    rows += [make_row(f"x{i}", status="failed") for i in range(4)]
    leaderboard = rank(make_rows(rows))
    short = render_leaderboard(leaderboard, 2)
    assert "f1" in short
    assert "f2" not in short
    assert "3 more configs in the leaderboard" in short
    assert "x1" in short
    assert "x2" not in short
    assert "2 more ruled out" in short
    full = render_leaderboard(leaderboard, None)
    assert all(name in full for name in ("f4", "x3"))
    assert "more" not in full
    with pytest.raises(ValueError, match="top must be >= 0"):
        render_leaderboard(leaderboard, -1)


def test_lines_fit_whatever_is_ranked(make_rows, make_row):
    """Many objectives, long reasons and many knobs wrap; no line is wider than the terminal."""
    by = ("coverage_shortfall", "accepted_error", "charged_error", "false_accept_rate", "false_reject_rate")
    full = {"charged_error": 1 / 3, "false_accept_rate": 1 / 7, "false_reject_rate": 1e-9, "loss": -1 / 3}
    rows = [
        make_row(
            f"{seed_of:012x}",
            seed,
            coverage=1 / (2 + seed),
            knobs={"optimizer": "x" * 40 + str(seed_of)},
            **full,
        )
        for seed_of in range(3)
        for seed in range(40)
    ]
    rows += [make_row("f" * 12, seed, status="failed", error="word " * 50) for seed in range(40)]
    text = render_leaderboard(rank(make_rows(rows), RankingOptions(by=(*by, "loss"))))
    assert max(map(len, text.splitlines())) <= WIDTH
    assert "false_reject_rate" in text
    assert "loss=-0.3333±" in text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (math.nan, "nan"),
        (-math.inf, "-inf"),
        (0.0, "0"),
        (1e-6, "1e-06"),
        (3, "3"),
        (12345.0, "1.234e+04"),
    ],
)
def test_numbers_are_short(value, text):
    """Four digits are what a reader compares; what does not apply is a dash."""
    assert format_number(value) == text


def test_robustness_is_shown_with_its_interval(make_rows, make_row):
    """Where a run was examined, its scores stand beside the metrics, and a dash where there is none."""
    scores = pa.table({"config_id": ["a"], "robustness": [0.8], "low": [0.75], "high": [0.851]})
    lines = render_leaderboard(
        rank(make_rows([make_row("a"), make_row("b")]), robustness=scores)
    ).splitlines()
    head, first, second = lines[-3:]
    assert "robustness" in head
    assert "0.8 [0.75, 0.85]" in first
    assert second.split()[-4:] == ["0.95", "-", "0", "1"]
