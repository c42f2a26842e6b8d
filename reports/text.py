"""A leaderboard as plain text for a terminal or a log: markup only, nothing is computed or decided here."""

from __future__ import annotations

import json
import math
import textwrap
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from reports.metrics import ROBUSTNESS, SHORTFALL
from reports.ranking import RANKED_BY_KEY, run_totals
from reports.schema import CONFIG_PREFIX, TRIAL_STATUSES, config_columns

WIDTH = 120
GAP = "  "
INDENT = " " * 13  # under the config's id, so that its knobs read as a part of it
DEFAULT_METRICS = (SHORTFALL, "accepted_error", "step_time_ms")
SURE_FROM = 5  # seeds from which on an interval of ranks roughly holds what it promises
KNOBS_IN_TABLE = 6  # more than that below every config would bury the numbers; the best one alone shows them


def render_leaderboard(table: pa.Table, top: int | None = 10) -> str:
    """A leaderboard as lines of at most 120 columns, the last without a newline.

    First what was run and how it was ranked, then the `top` best configs (all for None), each with where its
    rank lies in 90 % of draws of seeds, how often it is the best there, and mean ± std over seeds; those that
    are no better than abstaining everywhere below a line that says so; the knobs that are not the same in
    every config stand below each config, or, when there are many, below the table for the best one. Then the
    configs that were ruled out (`top` of them), each with its reason. What is left out is counted. Of a large
    run, whose leaderboard holds the best configs alone, it is said how many each reason ruled out. Ids and
    names are never cut.
    """
    if len(table) == 0:
        return "no configs"
    if top is not None and top < 0:
        raise ValueError(f"top must be >= 0, got {top=}")
    feasible = table.filter(table.column("feasible"))
    ruled_out = table.filter(pc.invert(table.column("feasible")))
    totals = run_totals(table)
    lines = [*_summary(table, totals), ""]
    if len(feasible):
        knobs = _varying_knobs(table)
        few = len(knobs) <= KNOBS_IN_TABLE
        lines += _table(feasible.slice(0, top), _shown_metrics(table), knobs if few else [])
        lines += left_out(len(feasible), top, "more configs in the leaderboard")
        lines += left_out(totals["feasible"], len(feasible), "more that are not in the leaderboard")
        if not few and top != 0:
            lines += ["", *_knobs_of(feasible.slice(0, 1).to_pylist()[0], knobs)]
    else:
        lines.append("no config is feasible")
    if totals["feasible"] < totals["configs"]:
        lines += ["", f"ruled out: {totals['configs'] - totals['feasible']} of {totals['configs']} configs"]
        for met in totals["ruled_out"]:
            lines += wrap(f"{met['configs']:>8}{GAP}{met['why']}, such as {met['such_as']}", rest=" " * 10)
        for entry in ruled_out.slice(0, top).select(["rank", "config_id", "why"]).to_pylist():
            head = f"{entry['rank']:>4}{GAP}{entry['config_id']}{GAP}"
            lines += wrap(entry["why"], first=head, rest=" " * len(head))
        lines += left_out(len(ruled_out), top, "more ruled out")
    return "\n".join(lines)


def format_number(value: float | int | None) -> str:
    """A number in at most four significant digits; "-" for what does not apply.

    >>> format_number(0.000123456), format_number(12345.6), format_number(48), format_number(None)
    ('0.0001235', '1.235e+04', '48', '-')
    """
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _summary(table: pa.Table, totals: dict[str, Any]) -> list[str]:
    ended = [(status, totals[f"n_{status}"]) for status in TRIAL_STATUSES]
    counts = ", ".join(f"{number} {status}" for status, number in ended if number)
    missing = totals["n_missing"]
    text = (
        f"{totals['configs']} configs, {totals['feasible']} feasible; {totals['n_trials']} trials: {counts}"
    )
    lines = wrap(text + (f"; {missing} missing" if missing else ""))
    said = _ranked_by(table)
    if said:
        text = f"fronts over {', '.join(said['by'])}; ties by {', '.join([*said['ties'], 'config_id'])}"
        lines += wrap(f"{text}; nan_count at most {said['nan_budget']}")
    if "rank_low" in table.column_names and table.column("rank_low").null_count < len(table):
        seeds = max(
            map(
                sum,
                zip(*(table.column(f"n_{what}").to_pylist() for what in ("trials", "missing")), strict=True),
            )
        )
        few = "" if seeds >= SURE_FROM else f", which are few: {SURE_FROM} and more would say more"
        lines += wrap(f"in 90%, best: where a rank lies, and how often first, by drawing {seeds} seeds{few}")
    return lines


def _table(configs: pa.Table, metrics: list[str], knobs: list[str]) -> list[str]:
    entries = configs.to_pylist()
    columns = [
        ["rank", *(str(entry["rank"]) for entry in entries)],
        *_confidence(entries),
        ["front", *(str(entry["front"]) for entry in entries)],
        ["config", *(entry["config_id"] for entry in entries)],
        ["nan_count", *(str(entry["nan_count"]) for entry in entries)],
        ["trials", *(str(entry["n_trials"]) for entry in entries)],
    ]
    width = sum(column_width(column) + len(GAP) for column in columns) - len(GAP)
    below: list[str] = []  # metrics for which the line has no room stand before the knobs
    for metric in metrics:
        column = [metric, *(_spread(entry, metric) for entry in entries)]
        if width + column_width(column) + len(GAP) <= WIDTH:
            columns.insert(-2, column)
            width += column_width(column) + len(GAP)
        else:
            below.append(metric)
    lines = []
    for row in range(len(entries) + 1):
        cells = []
        for column in columns:
            left = column[0] == "config"  # the id; all else are numbers
            cells.append(
                column[row].ljust(column_width(column)) if left else column[row].rjust(column_width(column))
            )
        lines += _heading(entries[row - 2] if row > 1 else {}, entries[row - 1]) if row else []
        lines.append(GAP.join(cells).rstrip())
        if row:
            entry = entries[row - 1]
            said = [f"{metric}={_spread(entry, metric).replace(' ', '')}" for metric in below]
            said += [_knob(name, entry[name]) for name in knobs if entry[name] is not None]
            if said:
                lines += wrap(" ".join(said), first=INDENT, rest=INDENT)
    return lines


def _confidence(entries: list[dict[str, Any]]) -> list[list[str]]:
    """The columns that say how sure the ranks are; none of a run of one seed."""
    if not any(entry.get("rank_low") for entry in entries):
        return []
    ranges, chances = ["in 90%"], ["best"]
    for entry in entries:
        low, high, best = entry["rank_low"], entry["rank_high"], entry["p_best"]
        ranges.append("-" if low is None else str(low) if low == high else f"{low}-{high}")
        chances.append("-" if best is None else f"{best:.0%}")
    return [ranges, chances]


def _heading(above: dict[str, Any], entry: dict[str, Any]) -> list[str]:
    """The line that stands between two configs where from here on they are of another kind."""
    was, now = above.get("beats_abstaining") is False, entry.get("beats_abstaining") is False
    if now and not was:
        cost = format_number(entry["trivial_error_mean"])
        return [f"      no better than abstaining everywhere, which has a charged_error of {cost}:"]
    if was and not now:
        return ["      with trials that went wrong:"]
    return []


def _knobs_of(entry: dict[str, Any], knobs: list[str]) -> list[str]:
    """The knobs of one config in full, named by its rank and id."""
    said = " ".join(_knob(name, entry[name]) for name in knobs if entry[name] is not None)
    return [f"config {entry['config_id']} (rank {entry['rank']}):", *wrap(said, first="    ", rest="    ")]


def _shown_metrics(table: pa.Table) -> list[str]:
    by = _ranked_by(table).get("by", list(DEFAULT_METRICS))
    names = [*by, *(name for name in ("coverage", ROBUSTNESS) if name not in by)]
    known = {*table.column_names}
    return [name for name in names if f"{name}_mean" in known or (name == ROBUSTNESS and name in known)]


def _varying_knobs(table: pa.Table) -> list[str]:
    return [
        name
        for name in config_columns(table)
        if pc.count_distinct(table.column(name), mode="all").as_py() > 1
    ]


def _ranked_by(table: pa.Table) -> dict[str, Any]:
    metadata = table.schema.metadata or {}
    said = json.loads(metadata.get(RANKED_BY_KEY, b"{}"))
    return dict(said)


def _spread(entry: dict[str, Any], metric: str) -> str:
    if metric == ROBUSTNESS:
        return _interval(entry)
    mean, std = entry[f"{metric}_mean"], entry[f"{metric}_std"]
    if std is None or mean is None or math.isnan(mean):
        return format_number(mean)
    return f"{format_number(mean)} ± {std:.2g}"


def _interval(entry: dict[str, Any]) -> str:
    score, low, high = (entry[f"{ROBUSTNESS}{end}"] for end in ("", "_low", "_high"))
    if math.isnan(score):
        return "-"
    return f"{score:.3g}" if math.isnan(low) or math.isnan(high) else f"{score:.3g} [{low:.2g}, {high:.2g}]"


def _knob(name: str, value: Any) -> str:
    text = format_number(value) if isinstance(value, float) else str(value).lower()
    return f"{name.removeprefix(CONFIG_PREFIX)}={value if isinstance(value, str) else text}"


def column_width(column: list[str]) -> int:
    """How wide the widest cell is."""
    return max(map(len, column))


def left_out(number: int, top: int | None, what: str) -> list[str]:
    """The line that counts what is not shown of `number`, none where all of it is."""
    rest = 0 if top is None else number - top
    return [f"     {rest} {what}"] if rest > 0 else []


def wrap(text: str, first: str = "", rest: str = "    ") -> list[str]:
    """The text on lines of at most `WIDTH` columns, words whole; `first` and `rest` stand before them."""
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=first,
        subsequent_indent=rest,
        break_long_words=False,
        break_on_hyphens=False,
    )
