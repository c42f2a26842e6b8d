"""A leaderboard over several scenarios as plain text: markup only, nothing is computed or decided here."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from reports.scenarios import LOG_RATIO, SCENARIOS_KEY
from reports.schema import CONFIG_PREFIX, config_columns
from reports.text import SURE_FROM, WIDTH, column_width, format_number, left_out, wrap

GAP = "  "


def render_scenarios(table: pa.Table, top: int | None = 10, sources: Mapping[str, str] | None = None) -> str:
    """What `reports.scenarios.rank_scenarios` returned, as lines of at most 120 columns.

    First the scenarios, by number, each with what `sources` says of where its rows are from; then how figures
    compare, the `top` best settings (all for None), the knobs of the best, and the settings that were ruled
    out (`top` of them), each with its reason. A figure is relative to the reference; behind it stands by how
    much the settings are behind the best of the scenario that is their worst, and which that is. Ids and
    names are never cut.
    """
    if top is not None and top < 0:
        raise ValueError(f"top must be >= 0, got {top=}")
    said = json.loads(table.schema.metadata[SCENARIOS_KEY])
    feasible = table.filter(table.column("feasible"))
    ruled_out = table.filter(pc.invert(table.column("feasible")))
    lines = [*_summary(table, len(feasible), said, sources or {}), ""]
    if len(feasible):
        lines += _table(feasible.slice(0, top).to_pylist(), said)
        lines += left_out(len(feasible), top, "more settings")
        if top != 0:
            lines += ["", *_knobs(table, feasible.slice(0, 1).to_pylist()[0])]
    else:
        lines.append("no settings met the constraints in every scenario")
    if len(ruled_out):
        lines += ["", f"ruled out: {len(ruled_out)} of {len(table)} settings"]
        for entry in ruled_out.slice(0, top).select(["rank", "settings_id", "why"]).to_pylist():
            head = f"{entry['rank']:>4}{GAP}{entry['settings_id']}{GAP}"
            lines += wrap(entry["why"], first=head, rest=" " * len(head))
        lines += left_out(len(ruled_out), top, "more ruled out")
    return "\n".join(lines)


def _summary(table: pa.Table, feasible: int, said: dict[str, Any], sources: Mapping[str, str]) -> list[str]:
    number, trials = len(said["scenarios"]), pc.sum(table.column("n_trials")).as_py()
    lines = [f"{len(table)} settings, {feasible} feasible in all of {number} scenarios; {trials} trials"]
    for number, name in enumerate(said["scenarios"], start=1):
        there = len(table) - table.column(f"config_id@{name}").null_count
        seeds = ", ".join(map(str, said["seeds"][name]))
        source = f", {sources[name]}" if name in sources else ""
        lines += wrap(
            f"{name}{source}: {there} settings, seeds {seeds}", first=f"{number:>4}  ", rest=" " * 6
        )
    told = f"settings {said['reference']}" if said["reference"] else "the median of the settings"
    ratios = [name for name in said["by"] if said["compared"][name] == LOG_RATIO]
    kinds = f", of {', '.join(ratios)} in percent" if ratios else ""
    lines += wrap(
        f"figures: differences to {told}{kinds}, the mean over scenarios; (behind the best of the settings' "
        "worst scenario, and which)"
    )
    lines += wrap(
        f"fronts over {', '.join(said['by'])}; ties by what is in brackets, of {', '.join(said['ties'])}, "
        f"then by the mean of the ranks; nan_count at most {said['nan_budget']}"
    )
    if table.column("rank_low").null_count < len(table):
        blocks = sum(map(len, said["seeds"].values()))
        few = "" if blocks >= SURE_FROM else f", which are few: {SURE_FROM} and more would say more"
        lines += wrap(
            f"in 90%, best: where a rank lies, and how often first, by drawing {blocks} blocks of scenario "
            f"and seed{few}"
        )
    return lines


def _table(entries: list[dict[str, Any]], said: dict[str, Any]) -> list[str]:
    columns = [["rank", *(str(entry["rank"]) for entry in entries)]]
    if any(entry["rank_low"] is not None for entry in entries):
        columns.append(["in 90%", *map(_range, entries)])
        columns.append(["best", *("-" if e["p_best"] is None else f"{e['p_best']:.0%}" for e in entries)])
    columns.append(["front", *(str(entry["front"]) for entry in entries)])
    columns.append(["settings", *(entry["settings_id"] for entry in entries)])
    width = sum(column_width(column) + len(GAP) for column in columns)
    below = []
    for metric in said["by"]:
        column = [metric, *(_figure(entry, metric, said) for entry in entries)]
        if width + column_width(column) <= WIDTH:
            columns.append(column)
            width += column_width(column) + len(GAP)
        else:
            below.append(metric)
    lines = []
    for index in range(len(entries) + 1):
        cells = [
            column[index].ljust(column_width(column))
            if column[0] == "settings"
            else column[index].rjust(column_width(column))
            for column in columns
        ]
        lines += _heading(entries[index - 2] if index > 1 else {}, entries[index - 1]) if index else []
        lines.append(GAP.join(cells).rstrip())
        if index and below:
            told = [f"{metric}={_figure(entries[index - 1], metric, said)}" for metric in below]
            lines += wrap(GAP.join(told), first=" " * 6, rest=" " * 6)
    return lines


def _heading(above: dict[str, Any], entry: dict[str, Any]) -> list[str]:
    was, now = above.get("beats_abstaining") is False, entry.get("beats_abstaining") is False
    if now and not was:
        return ["      no better than abstaining everywhere, in at least one scenario:"]
    return ["      with trials that went wrong:"] if was and not now else []


def _figure(entry: dict[str, Any], metric: str, said: dict[str, Any]) -> str:
    ratio = said["compared"][metric] == LOG_RATIO
    text = _signed(entry[metric], ratio)
    regret = entry[f"{metric}_regret"]
    if regret == 0.0:
        return f"{text} (best)"
    number = said["scenarios"].index(entry[f"{metric}_worst"]) + 1
    return f"{text} ({_signed(regret, ratio)} in {number})"


def _signed(value: float, ratio: bool) -> str:
    if not math.isfinite(value):
        return "-"
    if not ratio:
        return f"{value:+.3g}" if value else "0"
    factor = math.exp(min(value, 700.0))
    return f"{100.0 * (factor - 1.0):+.1f}%" if 0.1 <= factor < 10.0 else f"x{factor:.3g}"


def _range(entry: dict[str, Any]) -> str:
    low, high = entry["rank_low"], entry["rank_high"]
    return "-" if low is None else str(low) if low == high else f"{low}-{high}"


def _knobs(table: pa.Table, entry: dict[str, Any]) -> list[str]:
    """The knobs of the best settings that are not the same in all, by name."""
    told = []
    for name in config_columns(table):
        if entry[name] is not None and pc.count_distinct(table.column(name), mode="all").as_py() > 1:
            value = entry[name]
            text = format_number(value) if isinstance(value, float) else str(value)
            text = text.lower() if isinstance(value, bool) else text
            told.append(f"{name.removeprefix(CONFIG_PREFIX)}={text}")
    head = f"settings {entry['settings_id']} (rank {entry['rank']}):"
    return [head, *wrap(" ".join(told), first="    ", rest="    ")] if told else [head]
