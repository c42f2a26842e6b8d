"""What a gate prints and writes: it says what the decision says, and names that bite are inert in it."""

from __future__ import annotations

import json
import re
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reports.gate_outputs import (
    MOST_ANNOTATIONS,
    MOST_SUMMARY_BYTES,
    SCHEMA_VERSION,
    gate_json,
    render_annotations,
    render_junit,
    render_markdown,
    render_terminal,
)

HOSTILE = "a\r\n::error title=x::y\x1b[2J<script>alert(1)</script>|`%0A,@everyone [x](http://e.vil)\ud800"


def cell(**told: Any) -> dict[str, Any]:
    usual = {
        "scenario": "gbsg2",
        "metric": "coverage",
        "n": 10,
        "planned": 10,
        "base": 0.8,
        "candidate": 0.77,
        "harm": 0.03,
        "low": 0.029,
        "high": 0.031,
        "margin": 0.01,
        "compare": "difference",
        "p": 1e-6,
        "p_sign": None,
        "verdict": "FAIL",
        "why": "surely worse (p = 1e-06)",
        "exact": False,
        "stored": False,
        "rebase": False,
    }
    return {**usual, **told}


def nan_cell(**told: Any) -> dict[str, Any]:
    usual = {
        "scenario": "gbsg2",
        "values": 0,
        "checks": 300,
        "base_values": 0,
        "base_checks": 300,
        "bound": 0.01,
        "p": None,
        "verdict": "PASS",
        "why": "none in 300 checks",
        "first": "",
    }
    return {**usual, **told}


def view(cells: list[dict[str, Any]], **told: Any) -> dict[str, Any]:
    verdicts = [item["verdict"] for item in cells]
    worst = next((name for name in ("FAIL", "INCONCLUSIVE") if name in verdicts), "PASS")
    usual = {
        "suite": "own",
        "candidate": "abc",
        "baseline": "v0001",
        "commands": {"again": "scm-harness gate run --suite suite.yaml"},
        "notes": [],
        "verdict": worst,
        "cells": cells,
        "nan_cells": [nan_cell()],
        "warnings": [],
        "missing": [],
        "rebase": [],
        "look": 10,
        "seeds_next": None,
    }
    return {**usual, **told}


MIXED = [
    cell(scenario="a", verdict="PASS", harm=0.0, why="bit-identical"),
    cell(scenario="b", verdict="INCONCLUSIVE", harm=0.005, why="neither within the margin nor surely worse"),
    cell(scenario="c", harm=0.02),
    cell(scenario="d", harm=0.2),
    cell(scenario="e", metric="step_time_ms", compare="log_ratio", verdict="WARN", why="of another sitting"),
]


def test_the_terminal_says_the_verdict_first_and_the_worst_on_top():
    lines = render_terminal(view(MIXED)).splitlines()
    assert lines[0].startswith(
        "FAIL: 2 of 6 checks fail, first d: coverage (suite own, 10 seeds, abc against"
    )
    assert [line.split()[1] for line in lines[3:9]] == ["d", "c", "b", "e", "a", "gbsg2"]
    assert "  again: scm-harness gate run --suite suite.yaml" in lines


def test_a_ratio_is_a_percentage_and_what_is_unknown_a_dash():
    text = render_terminal(
        view(
            [
                cell(compare="log_ratio", harm=0.0953101798, low=None, high=None, margin=0.048790164),
                cell(metric="accepted_error", base=None, candidate=None, harm=None),
            ]
        )
    )
    assert "+10.0% worse" in text
    assert "5.0%" in text
    assert re.search(r"accepted_error +none +none +- ", text)


@pytest.mark.parametrize("render", [render_terminal, render_markdown, render_junit, gate_json])
@pytest.mark.parametrize("verdict", ["PASS", "FAIL", "INCONCLUSIVE"])
def test_every_way_out_says_each_verdict(render, verdict):
    assert verdict in render(view([cell(verdict=verdict)])) or render is render_junit


def test_hostile_names_are_inert():
    bad = view(
        [cell(scenario=HOSTILE, why=HOSTILE)],
        suite=HOSTILE,
        notes=[HOSTILE],
        missing=[HOSTILE],
        rebase=[HOSTILE],
        warnings=[HOSTILE],
        commands={"again": HOSTILE},
    )
    terminal, markdown = render_terminal(bad), render_markdown(bad)
    assert "\x1b" not in terminal
    assert not any(line.startswith("::") for line in terminal.splitlines())
    assert "<" not in markdown
    assert "](" not in re.sub(r"\\.", "", markdown)
    assert "@everyone" not in markdown
    assert "://" not in markdown
    table = [line for line in markdown.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in table} == {11}
    for line in render_annotations(bad):
        assert re.fullmatch(r"::(error|warning|notice) title=[^:,\r\n]*::[^\r\n]*", line), line
    assert ElementTree.fromstring(render_junit(bad)).tag == "testsuites"
    assert json.loads(gate_json(bad))["suite"] == HOSTILE


@given(st.text(max_size=30))
def test_any_name_leaves_each_format_readable(name):
    held = view([cell(scenario=name, why=name, metric=name)], missing=[name], notes=[name])
    ElementTree.fromstring(render_junit(held))
    lines = render_terminal(held).splitlines()
    assert len(lines) == len(render_terminal(view([cell()], missing=["x"], notes=["x"])).splitlines())
    table = [line for line in render_markdown(held).splitlines() if line.startswith("|")]
    assert len(table) == 4
    assert all(line.isprintable() for line in render_annotations(held))
    assert json.loads(gate_json(held))["cells"][0]["scenario"] == name


def test_annotations_are_few_and_the_worst_first():
    many = [cell(scenario=f"s{i}", harm=0.02 + 0.001 * i) for i in range(30)]
    lines = render_annotations(view(many, rebase=["x"]))
    assert len(lines) == MOST_ANNOTATIONS
    assert lines[0].startswith("::error title=gate s29%3A coverage::")
    assert "(and 21 more, see the gate's table)" in lines[-1]
    assert render_annotations(view([cell(verdict="PASS")])) == []


def test_junit_has_a_case_for_each_check_and_counts_them():
    held = view(MIXED, missing=["f: coverage of 2 of 10 seeds"])
    root = ElementTree.fromstring(render_junit(held))
    (suite,) = root
    assert {name: suite.get(name) for name in ("tests", "failures", "errors", "skipped")} == {
        "tests": "7",
        "failures": "2",
        "errors": "1",
        "skipped": "2",
    }
    assert len(suite.findall("testcase")) == 7
    assert len(suite.findall("testcase/failure")) == 2
    assert len(suite.findall("testcase/skipped")) == 2
    assert len(suite.findall("testcase/error")) == 1


def test_a_summary_stays_below_what_github_takes():
    many = [cell(scenario=f"s{i}", why="x" * 500) for i in range(3000)]
    text = render_markdown(view(many))
    assert len(text.encode()) <= MOST_SUMMARY_BYTES
    assert re.search(r"\d+ more rows are left out", text)
    assert "**commands**" in text


def test_json_is_strict_and_says_its_version():
    held = json.loads(gate_json(view(MIXED)), parse_constant=pytest.fail)
    assert held["schema_version"] == SCHEMA_VERSION
    assert held["cells"] == MIXED
    with pytest.raises(ValueError, match="Out of range"):
        gate_json(view([cell(harm=float("nan"))]))


def test_long_lists_are_cut_and_counted():
    text = render_terminal(view([cell()], notes=[f"note {i}" for i in range(50)]))
    assert "and 30 more" in text
    assert "note 20" not in text
