"""From series of numbers to the places of lines, ticks and marks: geometry of small charts, no markup.

What is drawn is decided by who calls; how it looks, in the templates. A value that is not finite is no point
of a line: it is a gap, with a mark at the edge where the value would have gone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 300.0, 176.0
LEFT, RIGHT, TOP, BOTTOM = 46.0, 10.0, 10.0, 24.0
STYLES = 6  # colours, marks and dashes that the templates know
_LOG_FROM = 30.0  # a span of values above which their logarithm is drawn
_LARGEST, _SMALLEST = 1e300, 1e-300  # axes end there, so that no span and no power overflows


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One line: its name, its style, and per x the value with what it ranges over (None: nothing there)."""

    name: str
    style: int
    values: Sequence[float | None]
    low: Sequence[float | None] = ()
    high: Sequence[float | None] = ()
    x: Sequence[float] = ()  # places on the axis; the index of each value without it


@dataclass(frozen=True, slots=True)
class Mark:
    """A point of a line, and what is said of it."""

    x: float
    y: float
    text: str
    off: bool = False  # at the edge, for a value that is not finite


@dataclass(frozen=True, slots=True)
class Line:
    """A drawn series: the path through its points, the outline of its range, its marks."""

    style: int
    path: str
    band: str
    marks: Sequence[Mark]


@dataclass(frozen=True, slots=True)
class Tick:
    """A place on an axis, and its label."""

    at: float
    label: str


@dataclass(frozen=True, slots=True)
class Chart:
    """Everything that a template needs to draw."""

    title: str
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]
    lines: Sequence[Line]
    log: bool
    width: float = WIDTH
    height: float = HEIGHT
    left: float = LEFT
    right: float = WIDTH - RIGHT
    top: float = TOP
    bottom: float = HEIGHT - BOTTOM


def draw_lines(
    title: str,
    series: Sequence[Series],
    *,
    x_labels: Sequence[str] = (),
    x_range: tuple[float, float] | None = None,
    y_range: tuple[float, float] | None = None,
) -> Chart:
    """Place lines over named steps (`x_labels`) or over a range of x; without `y_range` the values decide.

    Positive values that span more than a factor of 30 are drawn on a logarithmic scale.
    """
    known = [
        max(-_LARGEST, min(_LARGEST, value))
        for item in series
        for value in (*item.values, *item.low, *item.high)
        if value is not None and math.isfinite(value)
    ]
    log = y_range is None and bool(known) and min(known) > 0 and max(known) / min(known) > _LOG_FROM
    bounds, y_ticks = _y_axis(known, y_range, log)
    if x_labels:
        x_bounds = (-0.35, len(x_labels) - 0.65)
        x_ticks = [
            Tick(_place(index, x_bounds, LEFT, WIDTH - RIGHT), label) for index, label in enumerate(x_labels)
        ]
    else:
        x_bounds = x_range or (0.0, 1.0)
        x_ticks = [
            Tick(_place(at, x_bounds, LEFT, WIDTH - RIGHT), short(at)) for at in nice_ticks(*x_bounds, 5)
        ]
    lines = [_line(item, x_bounds, bounds, log) for item in series]
    return Chart(
        title=title,
        x_ticks=x_ticks,
        y_ticks=[Tick(_y(value, bounds, log), label) for value, label in y_ticks],
        lines=lines,
        log=log,
    )


def nice_ticks(low: float, high: float, most: int) -> list[float]:
    """At most `most` round numbers (1, 2 or 5 times a power of ten apart) from low to high.

    >>> nice_ticks(0.0, 1.0, 5)
    [0.0, 0.25, 0.5, 0.75, 1.0]
    """
    span = high - low
    if not (span > 0 and math.isfinite(span)):
        return [low]
    power = 10.0 ** math.floor(math.log10(span))
    for step in (0.1, 0.2, 0.25, 0.5, 1.0, 2.0, 2.5, 5.0, 10.0):
        first = math.ceil(low / (step * power) - 1e-9)
        last = math.floor(high / (step * power) + 1e-9)
        if last - first + 1 <= most:
            return [index * step * power for index in range(first, last + 1)]
    return [low, high]


def short(value: float | None) -> str:
    """A number in at most three significant digits; a dash for none.

    >>> short(0.12345), short(12345.0), short(None), short(float("nan")), short(float("inf"))
    ('0.123', '1.23e4', '–', 'NaN', '∞')
    """
    if value is None:
        return "–"
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value != 0 and not 1e-3 <= abs(value) < 1e4:
        digits, power = f"{value:.2e}".split("e")
        return f"{digits.rstrip('0').rstrip('.')}e{int(power)}"
    return f"{value:.4g}" if abs(value) >= 1000 else f"{value:.3g}"


def _y_axis(
    known: Sequence[float], asked: tuple[float, float] | None, log: bool
) -> tuple[tuple[float, float], list[tuple[float, str]]]:
    if asked is not None:
        return asked, [(value, short(value)) for value in nice_ticks(*asked, 5)]
    if log:
        low = math.floor(math.log10(max(_SMALLEST, min(known))))
        high = max(low + 1, math.ceil(math.log10(max(known))))
        powers = range(low, high + 1, max(1, math.ceil((high - low) / 4)))
        return (10.0**low, 10.0**high), [(10.0**power, short(10.0**power)) for power in powers]
    top = max([0.0, *known])
    bottom = min([0.0, *known])
    if top == bottom:
        top = bottom + 1.0
    ticks = nice_ticks(bottom, top * 1.02, 5)
    return (bottom, max(top * 1.05, ticks[-1])), [(value, short(value)) for value in ticks]


def _line(item: Series, x_bounds: tuple[float, float], bounds: tuple[float, float], log: bool) -> Line:
    places = [
        _place(at, x_bounds, LEFT, WIDTH - RIGHT)
        for at in (item.x or [float(i) for i in range(len(item.values))])
    ]
    parts: list[str] = []
    marks: list[Mark] = []
    band_top: list[str] = []
    band_low: list[str] = []
    pen_down = False
    for index, (x, value) in enumerate(zip(places, item.values, strict=True)):
        if value is None:
            pen_down = False
            continue
        said = f"{item.name}: {short(value)}"
        if not math.isfinite(value):
            marks.append(Mark(round(x, 1), TOP, said, off=True))
            pen_down = False
            continue
        y = _y(value, bounds, log)
        low, high = _within(item.low, index), _within(item.high, index)
        if low is not None and high is not None:
            band_top.append(f"{x:.1f},{_y(high, bounds, log):.1f}")
            band_low.append(f"{x:.1f},{_y(low, bounds, log):.1f}")
            if low != high:
                said += f" ({short(low)} to {short(high)})"
        marks.append(Mark(round(x, 1), round(y, 1), said))
        parts.append(f"{'L' if pen_down else 'M'}{x:.1f} {y:.1f}")
        pen_down = True
    band = " ".join([*band_top, *reversed(band_low)]) if len(band_top) > 1 else ""
    return Line(item.style % STYLES, "".join(parts), band, marks)


def _within(values: Sequence[float | None], index: int) -> float | None:
    value = values[index] if index < len(values) else None
    return value if value is not None and math.isfinite(value) else None


def _y(value: float, bounds: tuple[float, float], log: bool) -> float:
    if log:
        value, bounds = math.log10(value), (math.log10(bounds[0]), math.log10(bounds[1]))
    return round(_place(value, bounds, HEIGHT - BOTTOM, TOP), 1)


def _place(value: float, bounds: tuple[float, float], first: float, last: float) -> float:
    """Where a value of `bounds` lies between two places, kept within them."""
    span = bounds[1] - bounds[0]
    share = (value - bounds[0]) / span if span else 0.5
    return first + min(1.0, max(0.0, share)) * (last - first)
