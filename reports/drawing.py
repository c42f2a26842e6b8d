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
SCATTER_WIDTH, SCATTER_HEIGHT = 420.0, 270.0
AXIS_GAP, PARALLEL_HEIGHT, PARALLEL_TOP, PARALLEL_BOTTOM = 104.0, 300.0, 44.0, 36.0
MARK_SCALES = (0.8, 2.0)
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One point of a scatter: where it is, its style, what is said of it, what y ranges over, and a third
    number that its size tells (None: it has none)."""

    x: float
    y: float
    text: str
    style: int = 0
    marked: bool = False
    y_low: float | None = None
    y_high: float | None = None
    size: float | None = None


@dataclass(frozen=True, slots=True)
class Dot:
    """A placed point; `low` and `high` are the ends of its range, None where it has none; `scale` is how many
    times the usual its mark is wide."""

    x: float
    y: float
    text: str
    style: int
    marked: bool
    low: float | None
    high: float | None
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class Scatter:
    """Everything that a template needs to draw points, and a line to compare them with."""

    title: str
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]
    dots: Sequence[Dot]
    guide: str
    log_x: bool
    log_y: bool
    width: float = SCATTER_WIDTH
    height: float = SCATTER_HEIGHT
    left: float = LEFT
    right: float = SCATTER_WIDTH - RIGHT
    top: float = TOP
    bottom: float = SCATTER_HEIGHT - BOTTOM


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """One of several parallel axes: its name, and the value of every line on it (None: the line has none)."""

    name: str
    values: Sequence[float | str | None]


@dataclass(frozen=True, slots=True)
class PlacedAxis:
    """A parallel axis, where it stands, and its ticks; `unused` is the place of lines without a value."""

    name: str
    x: float
    ticks: Sequence[Tick]
    log: bool
    unused: float | None


@dataclass(frozen=True, slots=True)
class Parallel:
    """Axes beside each other, and the path of every line through them."""

    title: str
    axes: Sequence[PlacedAxis]
    paths: Sequence[str]
    width: float
    height: float
    top: float
    bottom: float


@dataclass(frozen=True, slots=True)
class Strip:
    """A part of a strip: where it begins, how wide it is, its share of the largest, what is said of it."""

    x: float
    width: float
    share: float
    text: str


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


def draw_scatter(
    title: str,
    points: Sequence[Point],
    *,
    x_range: tuple[float, float] | None = None,
    y_range: tuple[float, float] | None = None,
    diagonal: bool = False,
) -> Scatter:
    """Place points by two numbers each; an axis without a range is as long as its values need.

    An axis whose positive values span more than a factor of 30 is logarithmic. `diagonal` adds the line on
    which x equals y. Raises ValueError for a point that is not finite: it has no place.
    """
    for point in points:
        if not (math.isfinite(point.x) and math.isfinite(point.y)):
            raise ValueError(f"a point must be finite, got x={point.x}, y={point.y}")
    ends = [end for point in points for end in (point.y_low, point.y_high) if end is not None]
    xs = _span([point.x for point in points], x_range)
    ys = _span([*(point.y for point in points), *filter(math.isfinite, ends)], y_range)
    right, bottom = SCATTER_WIDTH - RIGHT, SCATTER_HEIGHT - BOTTOM

    def across(value: float) -> float:
        return round(xs.place(value, LEFT, right), 1)

    def up(value: float) -> float:
        return round(ys.place(value, bottom, TOP), 1)

    dots = [
        Dot(
            across(point.x),
            up(point.y),
            point.text,
            point.style % STYLES,
            point.marked,
            up(point.y_low) if point.y_low is not None and _is_finite(point.y_low) else None,
            up(point.y_high) if point.y_high is not None and _is_finite(point.y_high) else None,
            scale,
        )
        for point, scale in zip(points, mark_scales([point.size for point in points]), strict=True)
    ]
    guide = ""
    if diagonal:
        low = max(xs.bounds[0], ys.bounds[0])
        high = min(xs.bounds[1], ys.bounds[1])
        if low < high:
            guide = f"M{across(low)} {up(low)}L{across(high)} {up(high)}"
    return Scatter(
        title=title,
        x_ticks=[Tick(across(value), label) for value, label in xs.ticks],
        y_ticks=[Tick(up(value), label) for value, label in ys.ticks],
        dots=dots,
        guide=guide,
        log_x=xs.log,
        log_y=ys.log,
    )


def mark_scales(sizes: Sequence[float | None]) -> list[float]:
    """How many times the usual each mark is wide: from the least number to the largest, by its logarithm.

    1 where there is no positive number, and everywhere where all are alike.

    >>> mark_scales([1.0, 10.0, 100.0, None])
    [0.8, 1.4, 2.0, 1.0]
    """
    logs = [
        math.log(size) if size is not None and _is_finite(size) and size > 0 else math.nan for size in sizes
    ]
    known = [at for at in logs if math.isfinite(at)]
    if not known or min(known) == max(known):
        return [1.0] * len(logs)
    return [
        round(_place(at, (min(known), max(known)), *MARK_SCALES), 2) if math.isfinite(at) else 1.0
        for at in logs
    ]


def draw_parallel(title: str, axes: Sequence[Axis]) -> Parallel:
    """Place lines through parallel axes; every axis must have one value per line (ValueError).

    An axis of numbers is linear or logarithmic, one with a text has its texts in their order. A line without
    a value, or with one that is not finite, goes below the axis, to a place of its own.
    """
    if len({len(axis.values) for axis in axes}) > 1:
        raise ValueError(f"axes must have one value per line, got {[len(axis.values) for axis in axes]}")
    bottom = PARALLEL_HEIGHT - PARALLEL_BOTTOM
    unused = PARALLEL_HEIGHT - PARALLEL_BOTTOM / 2
    placed, heights = [], []
    for index, axis in enumerate(axes):
        values = [value if isinstance(value, str) or _is_finite(value) else None for value in axis.values]
        numbers = [value for value in values if isinstance(value, int | float)]
        if len(numbers) < sum(value is not None for value in values):
            names = sorted({str(value) for value in values if value is not None})
            span = _Span((0.0, max(1.0, len(names) - 1.0)), [], False)
            where = [None if value is None else float(names.index(str(value))) for value in values]
            ticks: Sequence[tuple[float, str]] = [(float(at), name) for at, name in enumerate(names)]
        else:
            span = _span(numbers, None)
            where = [None if value is None else float(value) for value in values]
            ticks = span.ticks
        placed.append(
            PlacedAxis(
                axis.name,
                AXIS_GAP * (index + 0.5),
                [Tick(round(span.place(at, bottom, PARALLEL_TOP), 1), label) for at, label in ticks],
                span.log,
                unused if any(value is None for value in values) else None,
            )
        )
        heights.append(
            [unused if at is None else round(span.place(at, bottom, PARALLEL_TOP), 1) for at in where]
        )
    lines = len(axes[0].values) if axes else 0
    paths = [
        "".join(
            f"{'L' if index else 'M'}{axis.x:g} {heights[index][line]:g}" for index, axis in enumerate(placed)
        )
        for line in range(lines)
    ]
    return Parallel(title, placed, paths, AXIS_GAP * max(1, len(axes)), PARALLEL_HEIGHT, PARALLEL_TOP, bottom)


def draw_strip(
    counts: Sequence[float], texts: Sequence[str], width: float = 240.0, most: float | None = None
) -> list[Strip]:
    """The parts of a strip of equally wide cells that hold something, each with its share of the largest."""
    wide = width / max(1, len(counts))
    top = max([*counts, 0.0]) if most is None else most
    return [
        Strip(round(index * wide, 1), round(max(1.0, wide - 0.5), 1), min(1.0, count / top), text)
        for index, (count, text) in enumerate(zip(counts, texts, strict=True))
        if count > 0 and top > 0
    ]


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


def log_ticks(low: float, high: float, most: int) -> list[float]:
    """At most `most` numbers from low to high, both positive: 1, 2, 5 times powers of ten, or powers alone.

    >>> log_ticks(300.0, 20000.0, 6)
    [500.0, 1000.0, 2000.0, 5000.0, 10000.0, 20000.0]
    """
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for factors, every in (
        ((1, 2, 5), 1),
        ((1,), 1),
        *(((1,), step) for step in (2, 5, 10, 20, 50, 100, 200)),
    ):
        powers = [power for power in range(first, last + 1) if power % every == 0]
        ticks = [float(f"{factor}e{power}") for power in powers for factor in factors]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) <= most:
            return ticks
    return []


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


@dataclass(frozen=True, slots=True)
class _Span:
    """The range of an axis with its ticks, and whether it is logarithmic."""

    bounds: tuple[float, float]
    ticks: Sequence[tuple[float, str]]
    log: bool

    def place(self, value: float, first: float, last: float) -> float:
        """Where the value lies between two places."""
        if not self.log:
            return _place(value, self.bounds, first, last)
        low, high = (math.log10(bound) for bound in self.bounds)
        return _place(math.log10(max(value, self.bounds[0])), (low, high), first, last)


def _span(values: Sequence[float], asked: tuple[float, float] | None) -> _Span:
    """As long as the values need, with a little room at both ends."""
    if asked is not None:
        return _Span(asked, [(at, short(at)) for at in nice_ticks(*asked, 6)], False)
    known = [max(-_LARGEST, min(_LARGEST, value)) for value in values]
    if not known:
        return _span([], (0.0, 1.0))
    low, high = min(known), max(known)
    if low > 0 and high / low > _LOG_FROM:
        bounds = (max(_SMALLEST, low) / 1.2, high * 1.2)
        return _Span(bounds, [(at, short(at)) for at in log_ticks(*bounds, 6)], True)
    room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    bounds = (low - room if low < 0 or low > room else min(low, 0.0), high + room)
    return _Span(bounds, [(at, short(at)) for at in nice_ticks(*bounds, 6)], False)


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


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
