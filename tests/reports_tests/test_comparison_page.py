"""A comparison as text, Markdown and a page: the same sections, nothing that acts, nothing that asks."""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pytest

from reports.changes import ABSENT, Change
from reports.comparison import (
    Comparison,
    ConfigPair,
    Difference,
    Digests,
    RunFacts,
    StatusChange,
    comparison_values,
)
from reports.comparison_page import rank_chart, rank_points, render_page
from reports.comparison_text import render_markdown, render_text, sections_of

HOSTILE = "</style></svg><script>alert(1)</script><img src=x onerror=alert(1)>|`@all`\x1b[2J\n# {{7*7}}"


def difference(metric: str, value: float, verdict: str = "", **changes: Any) -> Difference:
    ratio = metric != "coverage"
    made = Difference(
        metric=metric,
        ratio=ratio,
        unit="",
        advisory=metric == "step_time_ms",
        a=0.9,
        b=0.8,
        value=value,
        low=value - 0.01,
        high=value + 0.01,
        n=5,
        pairs=15,
        lacking=0,
        verdict=verdict,
    )
    return replace(made, **changes)


def made(text: str = "name", **changes: Any) -> Comparison:
    facts = RunFacts(text, text, 4, 20, (0, 1, 2, 3, 4), {"completed": 19, "failed": 1}, 3)
    told = (difference("coverage", -0.1, "worse"), difference("accepted_error", 0.9, "better"))
    pairs = tuple(ConfigPair(text, text, rank, 4 - rank, "", "", 5, 0, 0, told) for rank in (1, 2, 3))
    comparison = Comparison(
        a=facts,
        b=facts,
        summary=f"B against A: {text}",
        cautions=(text,),
        same_task=True,
        same_data=False,
        matched_by="config_id",
        common=3,
        only_a=(text,),
        only_b=(),
        ambiguous=0,
        pairs=15,
        unpaired_a=0,
        unpaired_b=0,
        identical=2,
        differences=told,
        nan_a=0,
        nan_b=3,
        nan_more=1,
        nan_fewer=0,
        status_changes=(StatusChange("completed", "failed", 1, text, text),),
        went_wrong=1,
        came_right=0,
        ranked_by=("accepted_error",),
        tau=-1.0,
        hypervolume_a=0.5,
        hypervolume_b=0.25,
        top=10,
        top_shared=3,
        configs=pairs,
        plan_known=True,
        plan_changes=(Change(text, 1, ABSENT), Change("b", text, None)),
        provenance_changes=(Change("commit", text, "x"),),
        data_changes=(Digests(0, text, "e" * 64),),
    )
    return replace(comparison, **changes)


class Elements(HTMLParser):
    """The elements of a page, with the names of their attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: set[tuple[str, tuple[str, ...]]] = set()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.add((tag, tuple(sorted(name for name, _ in attrs))))


@pytest.mark.parametrize("render", [render_text, render_markdown, render_page])
def test_every_form_begins_with_the_summary_and_has_every_section(render):
    """Runs, differences, endings, ranks, configs of one run, plan, versions, data, in that order."""
    told = made()
    text = render(told)
    titles = [section.title for section in sections_of(told)]
    assert len(titles) == 8
    assert sorted(titles, key=text.index) == titles
    assert text.index("B against A: name") < text.index(titles[0])


def test_a_terminal_gets_lines_that_fit_and_columns_that_stand_below_each_other():
    lines = render_text(made()).splitlines()
    assert max(map(len, lines)) <= 120
    head = next(line for line in lines if line.startswith("  metric"))
    row = lines[lines.index(head) + 1]
    assert row.split() == ["coverage", "0.9", "0.8", "-0.1", "-0.11", "to", "-0.09", "5", "15", "worse"]
    assert head.index("seeds") + len("seeds") == row.index(" 5 ") + 2


def test_a_difference_is_marked_where_its_interval_leaves_no_room():
    """In the table of configs by an asterisk; ranks of ruled-out configs say so."""
    out = replace(made().configs[0], why_b="2 non-finite values")
    (section,) = (one for one in sections_of(made(configs=(out,))) if one.title == "Ranks")
    assert section.rows == (("name", "1", "3 (out)", "5", "-0.1*", "x 0.9*"),)


def test_top_limits_what_is_shown_and_says_how_many_there_are():
    (section,) = (one for one in sections_of(made(), 2) if one.title == "Ranks")
    assert len(section.rows) == 2
    assert section.notes[-1] == "the 2 configs that stand highest in either run, of 3"


def test_nothing_in_common_leaves_the_runs_and_what_changed():
    told = made(common=0, pairs=0, configs=(), differences=(), status_changes=())
    assert [one.title for one in sections_of(told)][:2] == ["The runs", "Configs of one run alone"]
    assert rank_chart(told) is None


def test_ranks_are_drawn_of_configs_that_neither_run_rules_out():
    out = replace(made().configs[0], why_a="failed")
    assert rank_points(made(configs=(out, *made().configs[1:]))) == [(2, 2), (3, 1)]
    chart = rank_chart(made())
    assert chart is not None
    marks = [(mark.x, mark.y) for mark in chart.lines[0].marks]
    assert [x for x, _ in marks] == sorted({x for x, _ in marks})
    assert [y for _, y in marks] == sorted({y for _, y in marks})  # the order turned around, and y goes down
    assert chart.left <= marks[0][0] < marks[-1][0] <= chart.right


def test_hostile_texts_are_inert_in_every_form():
    """No element, attribute, control character, table cell, mention or heading comes from a text."""
    plain, page = render_page(made()), render_page(made(HOSTILE))
    assert Elements(page).found <= Elements(plain).found
    assert page.count("<style>") == page.count("</style>") == 1
    assert "\x1b" not in render_text(made(HOSTILE)) + render_markdown(made(HOSTILE))
    markdown = render_markdown(made(HOSTILE))
    assert "<script" not in markdown
    assert "@all" not in markdown
    assert [line for line in markdown.splitlines() if line.startswith("# ")] == []
    assert borders(markdown) == borders(render_markdown(made()))
    assert comparison_values(made(HOSTILE))["summary"].endswith("{{7*7}}")


def borders(markdown: str) -> list[int]:
    """How many borders of cells each line of a table has."""
    return [len(re.findall(r"(?<!\\)\|", line)) for line in markdown.splitlines() if line.startswith("|")]


def test_the_policy_allows_the_pages_own_style_and_nothing_else():
    page = render_page(made())
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    style = re.search(r"<style>(.*?)</style>", page, re.S)
    assert style is not None
    digest = base64.b64encode(hashlib.sha256(style.group(1).encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    assert not re.search(r"https?:|url\(|@import|<script|<link|<iframe", page)
