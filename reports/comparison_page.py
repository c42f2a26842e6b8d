"""The page of a comparison: one HTML file without scripts that asks for nothing over the network.

Its numbers are those of `comparison`, its sections those of `comparison_text`; every text is escaped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from reports.comparison import Comparison
from reports.comparison_text import sections_of
from reports.drawing import Chart, Series, draw_lines
from reports.pages import render_template

LEAST_CURVE = 2


def render_page(told: Comparison, top: int | None = 10) -> str:
    """The comparison as HTML, with the ranks of the configs drawn against each other where there are some."""
    values: dict[str, Any] = {"told": told, "sections": sections_of(told, top), "moved": rank_chart(told)}
    return render_template("comparison.html", **values)


def rank_chart(told: Comparison) -> Chart | None:
    """Rank in B over rank in A of the configs of both, those that are not ruled out; None below two."""
    pairs = rank_points(told)
    if len(pairs) < LEAST_CURVE:
        return None
    last = max(max(pair) for pair in pairs)
    x = [float(one) for one, _ in pairs]
    series: Sequence[Any] = (
        Series(name="rank in B", style=0, values=[float(other) for _, other in pairs], x=x),
        Series(name="no move", style=1, values=[1.0, float(last)], x=[1.0, float(last)]),
    )
    return draw_lines("rank in B by rank in A", series)


def rank_points(told: Comparison) -> list[tuple[int, int]]:
    """Ranks in A and in B of the configs of both that neither run rules out, in the order of A's."""
    return sorted((pair.rank_a, pair.rank_b) for pair in told.configs if not pair.why_a and not pair.why_b)
