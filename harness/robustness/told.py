"""An examination as lines for a terminal: what was examined, what is broken, and what faults cost."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable
from typing import Any

from harness.robustness.examination import Examination
from harness.robustness.search import BROKEN, ERROR, HOLDS, NOT_APPLICABLE

WIDTH = 120


def lines_of(found: Examination) -> list[str]:
    """What `scm-harness robustness` prints, at most 120 columns wide but for commands and ids."""
    models = len(found.models)
    configs, seeds = len(found.examined.configs), len(found.examined.seeds)
    lines = [
        f"{found.examined.name}: {configs} config{'s' * (configs != 1)} x {seeds} seeds, "
        f"{models} trained models, profile {found.request.profile.name}"
    ]
    lines += [line for note in found.notes for line in _wrap(f"note: {note}")]
    lines += _laws(found)
    lines += _faults(found)
    if found.shift_rows:
        lines += ["", f"domain shift: {found.shift_rows} rows in shift.parquet, curves on the page"]
    lines += [
        line for part, text in found.trouble.items() for line in _wrap(f"the part {part} failed: {text}")
    ]
    lines += ["", f"page: {found.page}"]
    return lines


def _laws(found: Examination) -> list[str]:
    verdicts = found.findings.verdicts
    if not verdicts:
        return []
    count = {
        status: sum(row["status"] == status for row in verdicts)
        for status in (HOLDS, BROKEN, NOT_APPLICABLE, ERROR)
    }
    tried = sum(row.get("examples") or 0 for row in verdicts)
    lines = [
        "",
        f"laws: {count[HOLDS]} hold, {count[BROKEN]} broken, {count[NOT_APPLICABLE]} do not apply"
        + (f", {count[ERROR]} could not be tried" if count[ERROR] else "")
        + f" ({tried:,} cases)",
    ]
    cases = {row["id"]: row for row in found.findings.counterexamples}
    for name, rows in _by_property(found.findings.broken).items():
        first = rows[0]
        others = f" and {len(rows) - 1} more" if len(rows) > 1 else ""
        lines += ["", f"  {first['status'].upper()}  {name}  ({first['trial_id']}{others})"]
        lines += _wrap(first.get("law") or "", indent=4)
        lines += _wrap(first["message"], indent=4)
        case = cases.get(first.get("counterexample") or "")
        if case is not None:
            lines += _wrap(f"smallest case: {case['shown']}", indent=4)
            lines += [f"    {case['replay']}"]
    return lines


def _by_property(rows: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    held: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        held.setdefault(row["property"], []).append(row)
    return held


def _faults(found: Examination) -> list[str]:
    if found.scores is None:
        return []
    lines = [
        "",
        "robustness: the share of its quality that a config keeps under faults (interval of 95 %)",
        "",
    ]
    head = ["config", "robustness", "interval", "recovered", "cells", "wrong", "takes the most"]
    table = [head]
    for row in found.scores.to_pylist():
        table.append(
            [
                row["config_id"],
                _number(row["robustness"]),
                f"{_number(row['low'])} to {_number(row['high'])}",
                _share(row["recovered_share"]),
                str(row["n_measured"]),
                str(row["n_failed"]),
                _worst(row),
            ]
        )
    widths = [max(len(line[column]) for line in table) for column in range(len(head))]
    for line in table:
        cells = [cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
        lines.append(("  " + "  ".join(cells)).rstrip())
    return lines


def _worst(row: dict[str, Any]) -> str:
    if not row["adversarial_fault"]:
        return "-"
    kept = _number(row["adversarial_retained"])
    return f"{row['adversarial_fault']}:{row['adversarial_severity']} keeps {kept}"


def _number(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.3f}"


def _share(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{100 * value:.0f} %"


def _wrap(text: str, indent: int = 0) -> list[str]:
    room = " " * indent
    return textwrap.wrap(text, WIDTH, initial_indent=room, subsequent_indent=room, break_long_words=False)
