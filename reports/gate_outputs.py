"""A gate's decision as a terminal, a pull request, a CI log and a machine read it: markup only.

What is decided, and the plain data that all of these take (`decision_view`), is in `harness.gate.decision`.
Names come from files that others wrote: each way out escapes what could act in it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any
from xml.etree import ElementTree

from reports.escaping import escape_markdown

View = Mapping[str, Any]

SCHEMA_VERSION = 1
MOST_ANNOTATIONS = 10  # GitHub shows no more of one kind in a step
MOST_SUMMARY_BYTES = 1_000_000  # GitHub refuses a step summary above 1 MiB
MOST_LISTED = 20
WORST_FIRST = {"FAIL": 0, "INCONCLUSIVE": 1, "WARN": 2, "PASS": 3}
NAN_METRIC = "non-finite values"
_GAP = "  "


def gate_json(view: View) -> str:
    """The decision as strict JSON of a stated version: no NaN, keys sorted."""
    values = {"schema_version": SCHEMA_VERSION, **view}
    return json.dumps(values, indent=2, sort_keys=True, allow_nan=False) + "\n"


# --- a terminal ---------------------------------------------------------------------------------------


def render_terminal(view: View) -> str:
    """The verdict, a line per scenario and metric, worst first, then what should be read; no colours."""
    lines = [plain(_headline(view)), ""]
    table = [_HEAD, *([plain(text) for text in _cells(cell)] for cell in _worst_first(view))]
    widths = [max(len(row[place]) for row in table) for place in range(len(_HEAD))]
    for row in table:
        cells = [
            cell.ljust(width) if place in _LEFT else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(_GAP.join(cells).rstrip())
    for title, said in _remarks(view):
        lines += ["", f"{title}:", *(f"  {plain(text)}" for text in said)]
    return "\n".join(lines) + "\n"


def plain(text: str) -> str:
    """The text on one line, without what a terminal would act on.

    >>> plain("a\\x1b[2Jb\\n::error::c")
    'a?[2Jb ::error::c'
    """
    return "".join(
        letter if letter.isprintable() else " " if letter in "\n\t" else "?" for letter in str(text)
    )


# --- Markdown -----------------------------------------------------------------------------------------


def render_markdown(view: View) -> str:
    """The decision for a step summary or a comment: verdict, table, remarks, commands; below 1 MB.

    Rows that would not fit are left out from the end, where the passes are, and counted.
    """
    head = [f"### {_MARKS[view['verdict']]} {escape_markdown(_headline(view))}", ""]
    tail: list[str] = []
    for title, said in _remarks(view):
        tail += ["", f"**{title}**", "", *(f"- {escape_markdown(text)}" for text in said)]
    rows = [_row(_HEAD), "|" + "---|" * len(_HEAD)]
    rows += [_row([escape_markdown(text) for text in _cells(cell)]) for cell in _worst_first(view)]
    room = MOST_SUMMARY_BYTES - sum(len(line.encode()) + 1 for line in (*head, *tail))
    held: list[str] = []
    for row in rows:
        room -= len(row.encode()) + 1
        if room < 200:
            held.append("")
            held.append(f"{len(rows) - len(held) + 1} more rows are left out")
            break
        held.append(row)
    text = "\n".join([*head, *held, *tail]) + "\n"
    return text.encode()[:MOST_SUMMARY_BYTES].decode(errors="ignore")


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


_MARKS = {"PASS": "✅", "FAIL": "❌", "INCONCLUSIVE": "⚠️"}


# --- annotations of a CI job ------------------------------------------------------------------------------


def render_annotations(view: View) -> list[str]:
    """GitHub's lines for what did not pass, worst first, at most `MOST_ANNOTATIONS` of them.

    A failure is an error, doubt and what is missing a warning, a baseline that is out of date a notice.
    """
    found: list[tuple[str, str, str]] = []
    for cell in _worst_first(view):
        kind = {"FAIL": "error", "INCONCLUSIVE": "warning", "WARN": "warning"}.get(cell["verdict"])
        if kind is not None:
            found.append((kind, f"{cell['scenario']}: {_metric(cell)}", f"{_change(cell)}: {cell['why']}"))
    found += [("warning", "missing", text) for text in view["missing"]]
    found += [("notice", "better than the baseline", f"{text}: take a new one") for text in view["rebase"]]
    rest = len(found) - MOST_ANNOTATIONS
    lines = [
        f"::{kind} title={_property(f'gate {title}')}::{_data(text)}"
        for kind, title, text in found[:MOST_ANNOTATIONS]
    ]
    if rest > 0:
        kind, title, text = found[MOST_ANNOTATIONS - 1]
        more = f"{text} (and {rest} more, see the gate's table)"
        lines[-1] = f"::{kind} title={_property(f'gate {title}')}::{_data(more)}"
    return lines


def _data(text: str) -> str:
    """What GitHub reads as the message: no end of line begins another command."""
    cleaned = "".join(letter if letter.isprintable() or letter in "\r\n" else "?" for letter in text)
    return cleaned.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")


# --- JUnit --------------------------------------------------------------------------------------------


def render_junit(view: View) -> str:
    """The decision as JUnit XML: a test case per scenario and metric.

    What fails is a failure, doubt is skipped with its reason, what is missing is an error.
    """
    cells = _worst_first(view)
    counts = {
        "tests": len(cells) + len(view["missing"]),
        "failures": sum(cell["verdict"] == "FAIL" for cell in cells),
        "errors": len(view["missing"]),
        "skipped": sum(cell["verdict"] in ("INCONCLUSIVE", "WARN") for cell in cells),
    }
    told = {name: str(number) for name, number in counts.items()}
    root = ElementTree.Element("testsuites", told)
    suite = ElementTree.SubElement(root, "testsuite", {"name": _xml(f"gate {view['suite']}"), **told})
    for cell in cells:
        case = ElementTree.SubElement(
            suite,
            "testcase",
            {"classname": _xml(cell["scenario"]), "name": _xml(_metric(cell)), "time": "0"},
        )
        text = _xml(f"{_change(cell)}: {cell['why']}")
        if cell["verdict"] == "FAIL":
            failure = ElementTree.SubElement(case, "failure", {"type": "regression", "message": text})
            failure.text = _xml("\n".join(f"{name}: {command}" for name, command in view["commands"].items()))
        elif cell["verdict"] != "PASS":
            ElementTree.SubElement(case, "skipped", {"message": text})
    for text in view["missing"]:
        case = ElementTree.SubElement(
            suite, "testcase", {"classname": "missing", "name": _xml(text), "time": "0"}
        )
        ElementTree.SubElement(case, "error", {"type": "missing", "message": _xml(text)})
    body = ElementTree.tostring(root, encoding="unicode")
    return "<?xml version='1.0' encoding='utf-8'?>\n" + body + "\n"


def _xml(text: str) -> str:
    """The text without the characters that XML cannot hold; escaping is the writer's."""
    return "".join(
        letter
        if letter in "\t\n\r"
        or " " <= letter <= "\ud7ff"
        or "\ue000" <= letter <= "\ufffd"
        or letter > "\uffff"
        else "?"
        for letter in text
    )


# --- what all of them say -------------------------------------------------------------------------------


_HEAD = [
    "verdict",
    "scenario",
    "metric",
    "baseline",
    "candidate",
    "change",
    "interval",
    "margin",
    "seeds",
    "why",
]
_LEFT = {0, 1, 2, 9}


def _headline(view: View) -> str:
    cells = _worst_first(view)
    failed = [cell for cell in cells if cell["verdict"] == "FAIL"]
    unsure = [cell for cell in cells if cell["verdict"] == "INCONCLUSIVE"]
    scenarios = {cell["scenario"] for cell in cells}
    said = {
        "PASS": f"all {len(cells)} checks of {len(scenarios)} scenarios pass",
        "FAIL": f"{len(failed)} of {len(cells)} checks fail, first {_first(failed)}",
        "INCONCLUSIVE": f"{len(unsure)} of {len(cells)} checks are not decided",
    }[view["verdict"]]
    if view["missing"]:
        said += f"; {len(view['missing'])} are not complete"
    return (
        f"{view['verdict']}: {said} (suite {view['suite']}, {view['look']} seeds, "
        f"{view['candidate']} against {view['baseline']})"
    )


def _first(cells: Sequence[View]) -> str:
    return f"{cells[0]['scenario']}: {_metric(cells[0])}" if cells else "none"


def _worst_first(view: View) -> list[View]:
    """All cells: failures, then doubt, warnings, passes; those of non-finite values before others."""
    cells = [*view["nan_cells"], *view["cells"]]
    return sorted(cells, key=lambda cell: (WORST_FIRST[cell["verdict"]], -_excess(cell)))


def _excess(cell: View) -> float:
    """By how many margins a cell is worse; non-finite values weigh more than any."""
    if "metric" not in cell:
        return math.inf if cell["values"] else -math.inf
    return -math.inf if cell["harm"] is None else cell["harm"] / cell["margin"]


def _metric(cell: View) -> str:
    return str(cell.get("metric", NAN_METRIC))


def _cells(cell: View) -> list[str]:
    """One row of the table."""
    if "metric" not in cell:
        bound = "-" if cell["bound"] is None else f"< {cell['bound']:.1g} a check"
        return [
            cell["verdict"],
            cell["scenario"],
            NAN_METRIC,
            str(cell["base_values"]),
            str(cell["values"]),
            f"{cell['values'] - cell['base_values']:+d}",
            bound,
            "0",
            "-",
            cell["why"],
        ]
    seeds = str(cell["n"]) if cell["n"] == cell["planned"] else f"{cell['n']} of {cell['planned']}"
    return [
        cell["verdict"],
        cell["scenario"],
        cell["metric"],
        _number(cell["base"]),
        _number(cell["candidate"]),
        _change(cell),
        _interval(cell),
        _harm(cell["margin"], cell, signed=False),
        seeds,
        cell["why"],
    ]


def _change(cell: View) -> str:
    """The mean harm, positive being worse."""
    if "metric" not in cell:
        return f"{cell['values']} of {cell['checks']}"
    harm = cell["harm"] or 0.0
    return _harm(cell["harm"], cell) + (" worse" if harm > 0 else " better" if harm < 0 else "")


def _interval(cell: View) -> str:
    if cell["low"] is None or cell["high"] is None:
        return "-"
    return f"{_harm(cell['low'], cell)} to {_harm(cell['high'], cell)}"


def _harm(value: float | None, cell: View, *, signed: bool = True) -> str:
    if value is None:
        return "-"
    sign = "+" if signed else ""
    if cell["compare"] == "log_ratio":
        return f"{math.expm1(min(value, 50.0)):{sign}.1%}"
    return f"{value:{sign}.3g}" if value else "0"


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.4g}"


def _remarks(view: View) -> list[tuple[str, Sequence[str]]]:
    """What should be read besides the table, by title; long lists are cut and counted."""
    rebase = [f"{text} is better by more than its margin" for text in view["rebase"]]
    more = [f"{view['seeds_next']} seeds would be looked at next"] if view["seeds_next"] is not None else []
    commands = [f"{name}: {command}" for name, command in view["commands"].items()]
    parts: list[tuple[str, Sequence[str]]] = [
        ("missing", view["missing"]),
        ("warnings", view["warnings"]),
        ("a new baseline should be accepted", rebase),
        ("more seeds", more),
        ("notes", view.get("notes", [])),
        ("commands", commands),
    ]
    return [(title, _cut(list(said))) for title, said in parts if said]


def _cut(said: list[str]) -> list[str]:
    rest = len(said) - MOST_LISTED
    return said if rest <= 0 else [*said[:MOST_LISTED], f"and {rest} more"]
