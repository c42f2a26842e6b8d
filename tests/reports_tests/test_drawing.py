"""Geometry of charts: where values lie, what is a gap, which scale is taken."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from reports.drawing import (
    BOTTOM,
    HEIGHT,
    LEFT,
    MARK_SCALES,
    RIGHT,
    SCATTER_HEIGHT,
    SCATTER_WIDTH,
    TOP,
    WIDTH,
    Axis,
    Point,
    Series,
    draw_lines,
    draw_parallel,
    draw_scatter,
    draw_strip,
    log_ticks,
    mark_scales,
    nice_ticks,
    short,
)

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


FINITE = st.floats(allow_nan=False, allow_infinity=False)


@given(st.lists(st.tuples(FINITE, FINITE, ANY), min_size=1, max_size=8), st.booleans())
@example([(5e-324, 1.7e308, None), (1.0, -1.7e308, 0.0)], False)
@example([(1.0, 5e-324, None), (1.0, 1e-310, None)], False)
@example([(1.0, 1e-310, None), (1.0, 1.7e308, None)], True)
def test_every_point_of_a_scatter_lies_in_the_picture(values, bounded):
    """Whatever finite numbers they have; the ends of a range that are not finite are left out."""
    points = [Point(x=x, y=y, text="p", style=9, y_low=end, y_high=y) for x, y, end in values]
    chart = draw_scatter("t", points, x_range=(0.0, 1.0) if bounded else None, diagonal=True)
    assert len(chart.dots) == len(points)
    for dot in chart.dots:
        assert LEFT <= dot.x <= SCATTER_WIDTH - RIGHT
        assert TOP <= dot.y <= SCATTER_HEIGHT - BOTTOM
        assert all(end is None or TOP <= end <= SCATTER_HEIGHT - BOTTOM for end in (dot.low, dot.high))
        assert 0 <= dot.style < 6
    assert all(math.isfinite(tick.at) for tick in (*chart.x_ticks, *chart.y_ticks))


def test_a_scatter_keeps_the_order_of_its_points():
    """Further right for a larger x, higher for a larger y; a wide span by its logarithm."""
    points = [Point(x=x, y=y, text="") for x, y in ((0.1, 1.0), (0.2, 100.0), (0.3, 10_000.0))]
    chart = draw_scatter("t", points)
    assert [dot.x for dot in chart.dots] == sorted(dot.x for dot in chart.dots)
    ys = [dot.y for dot in chart.dots]
    assert ys == sorted(ys, reverse=True)
    assert ys[0] - ys[1] == pytest.approx(ys[1] - ys[2], abs=0.2)
    assert (chart.log_x, chart.log_y) == (False, True)


def test_a_scatter_refuses_what_has_no_place():
    """Who calls counts the points that are not finite, and says so."""
    with pytest.raises(ValueError, match="a point must be finite, got x=nan, y=1"):
        draw_scatter("t", [Point(x=math.nan, y=1.0, text="")])


def test_a_diagonal_goes_from_corner_to_corner_of_equal_ranges():
    """And is not drawn where the ranges have nothing in common."""
    chart = draw_scatter(
        "t", [Point(x=0.5, y=0.5, text="")], x_range=(0.0, 1.0), y_range=(0.0, 1.0), diagonal=True
    )
    ends = [float(number) for number in re.findall(r"[-\d.]+", chart.guide)]
    assert ends == [LEFT, SCATTER_HEIGHT - BOTTOM, SCATTER_WIDTH - RIGHT, TOP]
    apart = draw_scatter("t", [Point(x=0.5, y=50.0, text="")], x_range=(0.0, 1.0), diagonal=True)
    assert apart.guide == ""


@given(st.lists(st.lists(ANY | st.sampled_from(["adam", "sgd"]), min_size=3, max_size=3), max_size=5))
@example([[5e-324, 1.7e308, 1.0]])
def test_every_line_goes_through_every_parallel_axis(columns):
    """Whatever the values: numbers, texts, both, none."""
    chart = draw_parallel("t", [Axis(name="k", values=column) for column in columns])
    assert len(chart.paths) == (3 if columns else 0)
    for path in chart.paths:
        assert path.count("M") + path.count("L") == len(columns)
        assert all(math.isfinite(float(number)) for number in re.findall(r"[-\d.e+]+|nan|inf", path))


def test_a_line_without_a_value_goes_below_the_axis():
    """To a place that is named, and only where there is such a line."""
    chart = draw_parallel(
        "t", [Axis(name="momentum", values=[0.5, None]), Axis(name="optimizer", values=["sgd", "adam"])]
    )
    momentum, optimizer = chart.axes
    assert momentum.unused is not None
    assert momentum.unused > chart.bottom
    assert chart.paths[1].startswith(f"M{momentum.x:g} {momentum.unused:g}")
    assert optimizer.unused is None
    assert [tick.label for tick in optimizer.ticks] == ["adam", "sgd"]
    assert optimizer.ticks[0].at > optimizer.ticks[1].at


def test_parallel_axes_must_have_the_same_lines():
    """One value each."""
    with pytest.raises(ValueError, match=r"one value per line, got \[1, 2\]"):
        draw_parallel("t", [Axis(name="a", values=[1.0]), Axis(name="b", values=[1.0, 2.0])])


def test_a_strip_has_the_cells_that_hold_something():
    """Where each begins, and its share of the largest."""
    parts = draw_strip([0, 5, 0, 10], ["a", "b", "c", "d"], width=40.0)
    assert [(part.x, part.share, part.text) for part in parts] == [(10.0, 0.5, "b"), (30.0, 1.0, "d")]
    assert draw_strip([], []) == draw_strip([0], ["a"]) == []


@given(st.floats(1e-300, 1e290), st.floats(1.0, 1e9))
def test_ticks_of_a_logarithm_are_few_and_within(low, factor):
    """In order, between the ends."""
    ticks = log_ticks(low, low * factor, 6)
    assert len(ticks) <= 6
    assert ticks == sorted(ticks)
    assert all(low <= tick <= low * factor for tick in ticks)


@given(st.lists(ANY, max_size=8))
@example([5e-324, 1.7e308])
def test_a_larger_number_makes_a_larger_mark(sizes):
    """Within bounds for whatever there is; what is no positive number has the usual size."""
    scales = mark_scales(sizes)
    assert len(scales) == len(sizes)
    assert all(MARK_SCALES[0] <= scale <= MARK_SCALES[1] for scale in scales)
    positive = [
        (size, scale)
        for size, scale in zip(sizes, scales, strict=True)
        if size is not None and math.isfinite(size) and size > 0
    ]
    assert [scale for _, scale in sorted(positive)] == sorted(scale for _, scale in positive)
    assert len(positive) == len(sizes) or 1.0 in scales


def test_a_point_is_drawn_in_the_size_of_its_third_number():
    """The least and the largest take the ends of the range."""
    points = [Point(x=0.1, y=1.0, text="", size=2.0), Point(x=0.2, y=1.0, text="", size=8.0)]
    assert [dot.scale for dot in draw_scatter("t", points).dots] == list(MARK_SCALES)
