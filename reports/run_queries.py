"""For every figure of a run's page the SQL that finds its numbers in the run's files.

The statements are for DuckDB, run inside of the run's folder; they name no path outside of it. What a figure
leaves out for want of room they do not leave out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

BOARD = "'leaderboard.parquet'"
ROWS = "read_parquet('rows/*.parquet', union_by_name = true)"
# A trial that began anew may tell an epoch twice; the later telling counts.
HISTORY = "read_parquet('history/*.parquet', union_by_name = true, filename = true, file_row_number = true)"
CELLS = "'robustness/cells.parquet'"


def queries(view: Mapping[str, Any]) -> dict[str, str]:
    """By the name of the figure the statement that gives its numbers."""
    told = (
        f"(select * from {HISTORY} qualify row_number() over "
        "(partition by trial_id, epoch order by filename desc, file_row_number desc) = 1)"
    )
    listed = view["listed"] or {}
    metrics = [f"{quoted(name + '_mean')}, {quoted(name + '_std')}" for name in listed.get("metrics", ())]
    best = f"(select config_id from {BOARD} where feasible order by rank limit 6)"
    panels = [panel["column"] for panel in view["learning"] or ()]
    spread = ", ".join(f"avg({name}), min({name}), max({name})" for name in map(quoted, panels))
    axes = [quoted(axis["column"]) for axis in (view["knobs"] or {}).get("axes", ())]
    return {
        "verdict": "select feasible, beats_abstaining, count(*), sum(n_trials), min(rank) "
        f"from {BOARD} group by all order by 1 desc, 2 desc",
        "listed": _select(["rank", "front", "config_id", *metrics, "nan_count", "n_trials", "why"])
        + f" from {BOARD} order by rank",
        "scatter": "select rank, config_id, front, coverage_mean, accepted_error_mean, step_time_ms_mean "
        f"from {BOARD} order by rank",
        "targets": "select rank, config_id, target_coverage_mean, coverage_mean, coverage_min, coverage_max "
        f"from {BOARD} order by rank",
        "knobs": _select(["rank", "config_id", *axes]) + f" from {BOARD} order by rank",
        "importance": importance_command((view["importance"] or {}).get("metric", "charged_error")),
        "curves": f"select config_id, seed, curve_coverage, curve_error, curve_area from {ROWS} "
        f"where config_id in {best} order by 1, 2",
        "nans": "select config_id, sum(nan_count), sum(nan_loss), sum(nan_gradient), sum(nan_output), "
        f"sum(nan_parameter) from {ROWS} where nan_count > 0 group by all order by 2 desc, 1",
        "nan_epochs": "select config_id, epoch, sum(met) from (select config_id, epoch, nan_count - "
        "coalesce(lag(nan_count) over (partition by trial_id order by epoch), 0) as met "
        f"from {told}) where met > 0 group by all order by 1, 2",
        "learning": f"select config_id, epoch{', ' + spread if spread else ''} from {told} "
        f"where config_id in {best} group by all order by 1, 2",
        "robustness": f"select config_id, fault, severity, avg(retained) from {CELLS} "
        "where status <> 'not_applicable' group by all order by 1, 2, 3",
    }


def importance_command(metric: str) -> str:
    """What prints the importance of the knobs; not SQL, since a forest is fitted."""
    return (
        'python -c "from reports.importance import knob_importance; from reports.rows import read_rows; '
        "from reports.run_view import forest_rows; "
        f"print(*knob_importance(forest_rows(read_rows('.')), '{metric}', seed=0), sep=chr(10))\""
    )


def quoted(name: str) -> str:
    """The name as an identifier of SQL.

    >>> quoted('config.a"b')
    '"config.a""b"'
    """
    return '"' + name.replace('"', '""') + '"'


def _select(columns: Sequence[str]) -> str:
    return f"select {', '.join(columns)}"
