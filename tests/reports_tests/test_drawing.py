"""Geometry of charts: where values lie, what is a gap, which scale is taken."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from reports.drawing import HEIGHT, LEFT, RIGHT, TOP, WIDTH, Series, draw_lines, nice_ticks, short

ANY = st.none() | st.floats(allow_nan=True, allow_infinity=True)


@given(st.lists(ANY, min_size=1, max_size=8), st.booleans())
@example([1.0, 1.0000000000000655e308], False)
@example([-1.7e308, 1.7e308, 5e-324], False)
@example([5e-324, 1e-310], False)
def test_every_mark_lies_in_the_picture(values, bounded):
    """Whatever the values, NaN, infinities and the largest floats among them."""
    series = Series(name="a", style=7, values=values, low=values, high=values)
    labels = [str(index) for index in range(len(values))]
    chart = draw_lines("t", [series], x_labels=labels, y_range=(0.0, 1.0) if bounded else None)
    (line,) = chart.lines
    assert len(line.marks) == sum(value is not None for value in values)
    for mark in line.marks:
        assert LEFT <= mark.x <= WIDTH - RIGHT
        assert TOP <= mark.y <= HEIGHT
    assert all(math.isfinite(float(number)) for number in re.findall(r"[-\d.]+|nan|inf", line.path))
    assert all(math.isfinite(tick.at) for tick in chart.y_ticks)
    assert 0 <= line.style < 6


def test_a_larger_value_lies_higher():
    """The y of a picture grows downwards."""
    chart = draw_lines("t", [Series(name="a", style=0, values=[1.0, 2.0, 3.0])], x_labels="abc")
    heights = [mark.y for mark in chart.lines[0].marks]
    assert heights == sorted(heights, reverse=True)


def test_what_is_not_finite_is_a_gap_with_a_mark():
    """The line stops before it and begins anew after it; the mark stands at the edge."""
    chart = draw_lines(
        "t", [Series(name="a", style=0, values=[1.0, math.inf, 2.0, None, 1.0])], x_labels="abcde"
    )
    (line,) = chart.lines
    assert line.path.count("M") == 3
    assert [mark.off for mark in line.marks] == [False, True, False, False]
    assert line.marks[1].text == "a: ∞"


def test_a_wide_span_is_drawn_by_its_logarithm():
    """More than a factor of 30 between positive values; never with a range that is given."""
    wide = Series(name="a", style=0, values=[1.0, 1000.0])
    chart = draw_lines("t", [wide], x_labels="ab")
    assert chart.log
    assert [tick.label for tick in chart.y_ticks] == ["1", "10", "100", "1000"]
    assert not draw_lines("t", [wide], x_labels="ab", y_range=(0.0, 1.0)).log
    assert not draw_lines("t", [Series(name="a", style=0, values=[0.0, 1000.0])], x_labels="ab").log


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_are_few_and_within(low, span):
    """At most as many as asked, in order, inside of the range."""
    ticks = nice_ticks(low, low + span, 5)
    assert 1 <= len(ticks) <= 5
    assert ticks == sorted(ticks)
    assert all(low - 1e-6 * span - 1e-9 <= tick <= low + span * (1 + 1e-6) + 1e-9 for tick in ticks)


@pytest.mark.parametrize(
    ("value", "said"), [(0.0, "0"), (-0.5, "-0.5"), (1e-9, "1e-9"), (-math.inf, "−∞"), (1234.0, "1234")]
)
def test_numbers_are_short(value, said):
    """Three digits, powers of ten where they are shorter."""
    assert short(value) == said
