"""A run as Markdown for a pull request: the verdict, the best configs, what to be careful about.

The numbers are those of `run_view`. Every text is escaped, so that a name makes no link, no mention, no
element and no cell of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from reports.drawing import short
from reports.escaping import escape_markdown
from reports.run_page import RunFolder
from reports.run_verdict import verdict
from reports.run_view import leaderboard_entries

MOST_IN_TABLE = 10


def render_markdown(run: RunFolder) -> str:
    """Verdict, table of the ten best configs and warnings, as Markdown that ends with a newline."""
    said = verdict(run.parts.leaderboard, run.parts.rows)
    lines = [f"### Run {escape_markdown(run.name)}", ""]
    if said is None:
        return "\n".join([*lines, escape_markdown(run.problems.get("leaderboard", "")), ""])
    lines += [escape_markdown(said["sentence"]), ""]
    lines += _table(leaderboard_entries(run.parts.leaderboard) or {})
    warnings = list(said["warnings"])
    warnings += [run.problems[name] for name in ("rows", "provenance") if run.problems.get(name)]
    if warnings:
        lines += ["**Careful:**", "", *(f"- {escape_markdown(warning)}" for warning in warnings), ""]
    return "\n".join(lines)


def _table(listed: Mapping[str, Any]) -> list[str]:
    if not listed.get("entries"):
        return []
    metrics = listed["metrics"]
    heads = ["rank", *(["90 %", "P(best)"] if listed["has_ranks"] else []), "front", "config"]
    heads += [escape_markdown(name.replace("_", " ")) for name in metrics] + ["NaN", "trials"]
    right = [head not in ("config",) for head in heads]
    lines = [_row(heads), _row(["---:" if is_right else "---" for is_right in right])]
    for entry in listed["entries"][:MOST_IN_TABLE]:
        if entry["heading"]:
            note = f"*{escape_markdown(entry['heading'])}:*"
            lines.append(_row([note if head == "config" else "" for head in heads]))
        cells = [str(entry["rank"])]
        if listed["has_ranks"]:
            known = entry["rank_low"] is not None
            cells.append(f"{entry['rank_low']} to {entry['rank_high']}" if known else "–")
            cells.append("–" if entry["p_best"] is None else f"{100 * entry['p_best']:.0f} %")
        cells += [str(entry["front"]), escape_markdown(entry["config_id"])]
        for mean, std in entry["spreads"]:
            cells.append(short(mean) + (f" ± {short(std)}" if math.isfinite(std) else ""))
        lines.append(_row([*cells, str(entry["nan_count"]), str(entry["n_trials"])]))
    left_out = len(listed["entries"]) - MOST_IN_TABLE + listed["left_out"]
    return [*lines, "", *([f"{left_out} more configs can be ranked.", ""] if left_out > 0 else [])]


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
