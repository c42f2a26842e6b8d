"""What the page of a robustness run says, as plain data: the answer, broken laws, figures, tables.

Only arithmetic and choice here. Rows come as dictionaries, as they were read; what a file lacks is None and
said as missing. How numbers become lines is in `drawing`, how they look in the templates.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
Rows = Sequence[Row]

MOST_CONFIGS = 6  # more lines in one picture are not told apart; the files hold the others
MOST_BROKEN = 24
MOST_CHARACTERS = 400
MOST_OF_MANY = 80  # of a message that stands there many times: of a cell, of a verdict
SEVERITIES = ("low", "middle", "high")
ENDED_WELL = ("completed", "stopped")
VERDICTS = ("broken", "error", "holds", "not_applicable")
# What is drawn of cells and of shifts: column, what it is called, its unit, the range where it has one.
Panel = tuple[str, str, str, tuple[float, float] | None]
CELL_PANELS: tuple[Panel, ...] = (
    ("retained", "retained quality", "share", (0.0, 1.0)),
    ("charged_error", "charged error", "task's unit", None),
    ("coverage", "coverage", "share", (0.0, 1.0)),
)
SHIFT_PANELS: tuple[Panel, ...] = (
    ("coverage", "coverage", "share", (0.0, 1.0)),
    ("charged_error", "charged error", "task's unit", None),
)
UNSHIFTED_LABEL, CLEAN_LABEL = "none", "clean"


def page_view(parts: Mapping[str, Rows | None], said: Mapping[str, Any] | None) -> dict[str, Any]:
    """Everything the page shows. parts: rows of verdicts, counterexamples, cells, scores and shift."""
    configs = ordered_configs(parts)
    shown = configs[:MOST_CONFIGS]
    return {
        "answer": answer(parts, shown),
        "left_out": len(configs) - len(shown),
        "configs": [{"config_id": config, "style": index} for index, config in enumerate(shown)],
        "broken": broken_laws(parts.get("counterexamples")),
        "verdicts": verdict_table(parts.get("verdicts")),
        "faults": fault_figures(parts.get("cells"), shown),
        "matrix": matrix(parts.get("cells"), shown),
        "shifts": shift_figures(parts.get("shift"), shown),
        "abstention": abstention(parts.get("shift"), shown),
        "provenance": provenance(said),
        "command": command_of(said),
    }


def ordered_configs(parts: Mapping[str, Rows | None]) -> list[str]:
    """All configs that any part names: the most robust first, those without a score last, by id."""
    scores = {row["config_id"]: number(row.get("robustness")) for row in parts.get("scores") or ()}
    names = {
        row["config_id"]
        for rows in parts.values()
        for row in rows or ()
        if isinstance(row.get("config_id"), str) and row["config_id"]
    }

    def key(name: str) -> tuple[float, str]:
        score = scores.get(name, math.nan)
        return (math.inf if math.isnan(score) else -score, name)

    return sorted(names, key=key)


def answer(parts: Mapping[str, Rows | None], configs: Sequence[str]) -> list[dict[str, Any]]:
    """One entry per config: score, interval, adversarial cell, laws broken and tried, cells gone wrong."""
    scores = {row["config_id"]: row for row in parts.get("scores") or ()}
    verdicts = parts.get("verdicts")
    entries = []
    for config in configs:
        score: Row = scores.get(config, {})
        own = [row for row in verdicts or () if row.get("config_id") == config]
        fault, severity = score.get("adversarial_fault"), score.get("adversarial_severity")
        entries.append(
            {
                "config_id": config,
                "robustness": number(score.get("robustness")),
                "low": number(score.get("low")),
                "high": number(score.get("high")),
                "adversarial": f"{fault}:{severity}" if fault else None,
                "adversarial_retained": number(score.get("adversarial_retained")),
                "recovered_share": number(score.get("recovered_share")),
                "n_failed": score.get("n_failed"),
                "n_measured": score.get("n_measured"),
                "broken": None if verdicts is None else sorted(_names(own, "broken")),
                "tried": len(_names(own, "broken") | _names(own, "holds")),
            }
        )
    return entries


def broken_laws(counterexamples: Rows | None) -> dict[str, Any] | None:
    """The laws that are broken, each with its smallest case and the command that replays it."""
    if counterexamples is None:
        return None
    entries = [
        {
            "id": text(row.get("id")),
            "property": text(row.get("property")),
            "law": text(row.get("law")),
            "message": text(row.get("message")),
            "shown": text(row.get("shown")),
            "config_id": text(row.get("config_id")),
            "trial_id": text(row.get("trial_id")),
            "status": text(row.get("status")),
            "command": text(row.get("replay") or row.get("command"))
            or f"scm-harness replay {shlex.quote(str(row.get('id')))}",
        }
        for row in counterexamples
    ]
    entries.sort(key=lambda entry: (entry["property"], entry["config_id"], entry["trial_id"], entry["id"]))
    return {"shown": entries[:MOST_BROKEN], "left_out": max(0, len(entries) - MOST_BROKEN)}


def verdict_table(verdicts: Rows | None) -> list[dict[str, Any]] | None:
    """Of each property, on how many models it holds, is broken, does not apply or could not be tried."""
    if verdicts is None:
        return None
    counted: dict[str, dict[str, Any]] = {}
    for row in verdicts:
        name = text(row.get("property"))
        entry = counted.setdefault(name, {"property": name, **dict.fromkeys(VERDICTS, 0), "why": ""})
        status = row.get("status")
        if status in VERDICTS:
            entry[status] += 1
        if status in ("error", "not_applicable") and not entry["why"]:
            entry["why"] = text(row.get("message"))[: 2 * MOST_OF_MANY]
    return sorted(counted.values(), key=lambda entry: (-entry["broken"], -entry["error"], entry["property"]))


def fault_figures(cells: Rows | None, configs: Sequence[str]) -> list[dict[str, Any]] | None:
    """Degradation curves: per fault and panel, per config the mean over seeds at each severity, with range.

    The first place is the clean twin. A cell that does not apply is None; one whose number is not finite (a
    failed one has no error) makes its mean NaN.
    """
    if cells is None:
        return None
    figures = []
    for fault in _in_order(row["fault"] for row in cells):
        own = [row for row in cells if row["fault"] == fault]
        severities = sorted({row["severity"] for row in own}, key=_severity_place)
        panels = []
        for column, title, unit, bounds in CELL_PANELS:
            series = []
            for index, config in enumerate(configs):
                held = [
                    row for row in own if row["config_id"] == config and row["status"] != "not_applicable"
                ]
                if not held:
                    continue
                clean = [row.get(f"clean_{column}") for row in held if f"clean_{column}" in row]
                steps = [_spread(clean) if clean else _spread([])]
                steps += [
                    _spread([row.get(column) for row in held if row["severity"] == severity])
                    for severity in severities
                ]
                series.append(_series(config, index, steps))
            panels.append({"title": title, "unit": unit, "range": bounds, "series": series})
        figures.append(
            {
                "name": fault,
                "labels": [CLEAN_LABEL, *severities],
                "panels": panels,
                "not_applicable": sorted(
                    {text(row.get("reason")) for row in own if row["status"] == "not_applicable"}
                ),
            }
        )
    return [figure for figure in figures if any(panel["series"] for panel in figure["panels"])] + [
        figure for figure in figures if not any(panel["series"] for panel in figure["panels"])
    ]


def matrix(cells: Rows | None, configs: Sequence[str]) -> list[dict[str, Any]] | None:
    """The matrix: a row per fault and severity, an entry per config with what became of its seeds."""
    if cells is None:
        return None
    rows = []
    for fault in _in_order(row["fault"] for row in cells):
        own = [row for row in cells if row["fault"] == fault]
        for severity in sorted({row["severity"] for row in own}, key=_severity_place):
            here = [row for row in own if row["severity"] == severity]
            entries = [_cell([row for row in here if row["config_id"] == config]) for config in configs]
            strengths = {row.get("strength") for row in here} - {None}
            rows.append(
                {
                    "fault": fault,
                    "severity": severity,
                    "strength": number(strengths.pop()) if len(strengths) == 1 else None,
                    "cells": entries,
                }
            )
    return rows


def shift_figures(shift: Rows | None, configs: Sequence[str]) -> list[dict[str, Any]] | None:
    """Per shift: coverage and error by level, and error against coverage without shift and at its end."""
    if shift is None:
        return None
    figures = []
    for name in _in_order(row["shift"] for row in shift):
        own = [row for row in shift if row["shift"] == name]
        steps = sorted({row["step"] for row in own})
        levels = {row["step"]: row.get("level") for row in own}
        panels = []
        for column, title, unit, bounds in SHIFT_PANELS:
            series = []
            for index, config in enumerate(configs):
                held = [row for row in own if row["config_id"] == config]
                if held:
                    spreads = [
                        _spread([row.get(column) for row in held if row["step"] == step]) for step in steps
                    ]
                    series.append(_series(config, index, spreads))
            panels.append({"title": title, "unit": unit, "range": bounds, "series": series})
        figures.append(
            {
                "name": name,
                "made_by": sorted({text(row.get("made_by")) for row in own}),
                "levels": [levels[step] for step in steps],
                "panels": panels if len(steps) > 1 else [],
                "curves": [
                    {"step": step, "level": levels[step], "series": _risk_series(own, step, configs)}
                    for step in dict.fromkeys((steps[0], steps[-1]))
                ],
                "errors": sorted({text(row["error"]) for row in own if row.get("error")}),
                "unit": ", ".join(sorted({text(row.get("error_unit")) for row in own} - {""})),
            }
        )
    return figures


def abstention(shift: Rows | None, configs: Sequence[str]) -> list[dict[str, Any]] | None:
    """Where bottoms are: per config, shift and level the means over seeds of what tells near from far."""
    if shift is None:
        return None
    columns = (
        "coverage",
        "accepted_error",
        "charged_error",
        "false_accept_rate",
        "false_reject_rate",
        "curve_area",
        "bottom_auc",
        "pole_correlation",
        "bottoms_near",
        "bottoms_far",
    )
    entries = []
    for config in configs:
        for name in _in_order(row["shift"] for row in shift):
            own = [row for row in shift if row["config_id"] == config and row["shift"] == name]
            for step in sorted({row["step"] for row in own}):
                here = [row for row in own if row["step"] == step]
                means = {column: _spread([row.get(column) for row in here])[0] for column in columns}
                level = here[0].get("level")
                entries.append({"config_id": config, "shift": name, "step": step, "level": level, **means})
    return entries


def provenance(said: Mapping[str, Any] | None) -> list[tuple[str, str]] | None:
    """What robustness.json says, as pairs of text; nested values as JSON."""
    if said is None:
        return None
    pairs = []
    for name, value in said.items():
        if isinstance(value, Mapping | list):
            value = json.dumps(value, sort_keys=True, default=str)
        pairs.append((text(name), text(value)))
    return pairs


def command_of(said: Mapping[str, Any] | None) -> str:
    """The command that made the folder, empty where it is not known."""
    held = (said or {}).get("command")
    if isinstance(held, list):
        return shlex.join(map(str, held))
    return text(held)


def number(value: Any) -> float:
    """A number as float; NaN for anything else."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def text(value: Any) -> str:
    """A value as one line of at most 400 characters; empty for None."""
    line = "" if value is None else " ".join(str(value).split())
    return line if len(line) <= MOST_CHARACTERS else line[: MOST_CHARACTERS - 1] + "…"


def _cell(here: Rows) -> dict[str, Any] | None:
    if not here:
        return None
    held = [row for row in here if row["status"] != "not_applicable"]
    if not held:
        return {"applies": False, "why": text(here[0].get("reason"))}
    recovered = [row["recovered"] for row in held if row.get("recovered") is not None]
    epochs = [row["epochs_to_recover"] for row in held if row.get("epochs_to_recover") is not None]
    kinds = {
        kind: sum(row.get(f"nan_{kind}") or 0 for row in held)
        for kind in ("loss", "gradient", "output", "parameter")
    }
    return {
        "applies": True,
        "retained": _spread([row.get("retained") for row in held])[0],
        "coverage": _spread([row.get("coverage") for row in held])[0],
        "accepted_error": _spread([row.get("accepted_error") for row in held])[0],
        "seeds": len(held),
        "wrong": sum(row["status"] not in ENDED_WELL for row in held),
        "nan_count": sum(row.get("nan_count") or 0 for row in held),
        "nan_kinds": {kind: count for kind, count in kinds.items() if count},
        "recovered": sum(recovered) if recovered else None,
        "asked": len(recovered),
        "epochs_to_recover": sum(epochs) / len(epochs) if epochs else None,
        "error": next((text(row["error"])[:MOST_OF_MANY] for row in held if row.get("error")), ""),
    }


def _risk_series(own: Rows, step: int, configs: Sequence[str]) -> list[dict[str, Any]]:
    """Of each config the curve of its first seed: curves of several seeds have no common thresholds."""
    series = []
    for index, config in enumerate(configs):
        held = [row for row in own if row["config_id"] == config and row["step"] == step]
        held = sorted((row for row in held if row.get("curve_coverage")), key=lambda row: row["seed"])
        if held:
            first = held[0]
            series.append(
                {
                    "name": config,
                    "style": index,
                    "x": list(first["curve_coverage"]),
                    "values": list(first["curve_error"]),
                    "area": number(first.get("curve_area")),
                }
            )
    return series


def _series(name: str, style: int, steps: Sequence[tuple[float | None, ...]]) -> dict[str, Any]:
    means, lows, highs = (list(column) for column in zip(*steps, strict=True))
    return {"name": name, "style": style, "values": means, "low": lows, "high": highs}


def _spread(values: Iterable[Any]) -> tuple[float | None, float | None, float | None]:
    """Mean, least and largest: None of nothing, and a mean that is not finite where a value is not."""
    held = [number(value) for value in values if value is not None]
    if not held:
        return None, None, None
    finite = [value for value in held if math.isfinite(value)]
    mean = sum(held) / len(held)
    return mean, min(finite, default=None), max(finite, default=None)


def _names(rows: Rows, status: str) -> set[str]:
    return {text(row.get("property")) for row in rows if row.get("status") == status}


def _in_order(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def _severity_place(name: str) -> tuple[int, str]:
    return (SEVERITIES.index(name) if name in SEVERITIES else len(SEVERITIES)), name
