"""The page of a comparison: one HTML file without scripts that asks for nothing over the network.

Its numbers are those of `comparison`, its sections those of `comparison_text`; every text is escaped.
"""

from __future__ import annotations

from collections.abc import Sequence

from reports.comparison import Comparison
from reports.comparison_text import sections_of
from reports.drawing import Chart, Series, draw_lines
from reports.pages import render_template

LEAST_POINTS = 2


def render_page(told: Comparison, top: int | None = 10) -> str:
    """The comparison as HTML, with the ranks of the configs drawn against each other where there are some."""
    return render_template(
        "comparison.html", told=told, sections=sections_of(told, top), moved=rank_chart(told)
    )


def rank_chart(told: Comparison) -> Chart | None:
    """Place in B over place in A of the configs of both that are not ruled out; None below two.

    Places run from 0, the best rank among them, to 1, the last.
    """
    pairs = rank_points(told)
    if len(pairs) < LEAST_POINTS:
        return None
    x, y = (_places(ranks) for ranks in zip(*pairs, strict=True))
    series = (
        Series(name="place in B", style=0, values=y, x=x),
        Series(name="no move", style=1, values=[0.0, 1.0], x=[0.0, 1.0]),
    )
    return draw_lines("place in B by place in A", series, y_range=(0.0, 1.0))


def _places(ranks: Sequence[int]) -> list[float]:
    first, last = min(ranks), max(ranks)
    return [(rank - first) / (last - first) for rank in ranks]


def rank_points(told: Comparison) -> list[tuple[int, int]]:
    """Ranks in A and in B of the configs of both that neither run rules out, in the order of A's."""
    return sorted((pair.rank_a, pair.rank_b) for pair in told.configs if not pair.why_a and not pair.why_b)
