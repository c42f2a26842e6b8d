"""The page of a run with figures that answer to the mouse: the same page, with plotly and its data inlined.

The data stand in a script element of type application/json, which is never run, with every character that
could end it escaped. Two scripts run, plotly's and `interactive.js`; the policy of the page names their
hashes, and lets no request leave. plotly is an optional extra, `scm-harness[pages]`.
"""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from reports.drawing import short
from reports.pages import is_known, render_template
from reports.run_page import RunFolder, page_values
from reports.run_view import KINDS, run_view
from reports.visible import visible

SCRIPT_FILE = Path(__file__).with_name("templates") / "interactive.js"
# plotly makes style elements without text and fills them rule by rule, which a policy lets pass that knows
# the hash of no text at all.
EMPTY_STYLE = ""
# The style of maps, which the page has none of, is made by plotly only where no element has its id.
_STYLE_OF_MAPS = re.compile(r'!document\.getElementById\("([0-9a-f]{64})"\)')


class PlotlyMissingError(RuntimeError):
    """plotly is not installed; the message says how to get it."""


def render_interactive(run: RunFolder) -> str:
    """The page of the run as HTML with plotly inside; PlotlyMissingError where it is not installed."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise PlotlyMissingError(
            "--interactive needs plotly >= 6, which is not installed: pip install 'scm-harness[pages]'"
        ) from None
    view = run_view(run.parts)
    plotly, script = get_plotlyjs(), SCRIPT_FILE.read_text(encoding="utf-8")
    return render_template(
        "run_interactive.html",
        scripts=[plotly, script],
        styles=[EMPTY_STYLE],
        style_attributes=True,  # as for the exponents of ticks
        styled=_STYLE_OF_MAPS.findall(plotly)[:1],
        data=Markup(inert_json(interactive_figures(view))),
        **page_values(run, view),
    )


def interactive_figures(view: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The figures as plain data: a name, a title, the traces with what is said of each point, axes.

    Every text is escaped for plotly, which reads a little HTML in the texts that it shows.
    """
    figures = []
    for name, title, x, y in (
        ("scatter", "Accepted error against coverage", "coverage", "accepted error"),
        ("targets", "Coverage against target", "target coverage", "coverage"),
    ):
        held = view[name]
        if held is None or not held["points"]:
            continue
        traces = []
        for kind, label in enumerate(KINDS):
            own = [point for point in held["points"] if point["kind"] == kind]
            if own:
                traces.append(
                    {
                        "name": label,
                        "style": kind,
                        "mode": "markers",
                        "x": [_number(point["x"]) for point in own],
                        "y": [_number(point["y"]) for point in own],
                        "text": [
                            shown(
                                f"{point['config_id']}, rank {point['rank']}, front {point['front']}"
                                + (f", {short(point['size'])} ms" if is_known(point.get("size")) else "")
                            )
                            for point in own
                        ],
                    }
                )
        log = name == "scatter" and _wide([point["y"] for point in held["points"]])
        figures.append(
            {"name": name, "title": title, "x": x, "y": y, "log": log, "ticks": None, "traces": traces}
        )
    if view["knobs"] is not None and view["knobs"]["axes"]:
        figures.append(_knobs_figure(view["knobs"]))
    for panel in view["learning"] or ():
        figures.append(
            {
                "name": f"learning-{len(figures)}",
                "title": shown(f"{panel['title']} by epoch"),
                "x": "epoch",
                "y": shown(panel["title"]),
                "log": panel["range"] is None
                and _wide([value for item in panel["series"] for value in item["values"]]),
                "ticks": None,
                "traces": [
                    {
                        "name": shown(item["name"]),
                        "style": item["style"],
                        "mode": "lines+markers",
                        "x": list(item["x"]),
                        "y": [_number(value) for value in item["values"]],
                        "text": [
                            shown(f"{item['name']}: {low} to {high}")
                            for low, high in zip(item["low"], item["high"], strict=True)
                        ],
                    }
                    for item in panel["series"]
                ],
            }
        )
    return figures


def inert_json(value: Any) -> str:
    """The value as JSON that can stand in an element of HTML: nothing in it ends the element or opens one.

    >>> inert_json({"a": "</script>&"})
    '{"a":"\\\\u003c/script\\\\u003e\\\\u0026"}'
    """
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))  # ASCII alone
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def shown(text: str) -> str:
    """A text that plotly shows as it is."""
    return html.escape(str(visible(text)))


def _knobs_figure(figure: Mapping[str, Any]) -> dict[str, Any]:
    """Parallel axes as lines over the axes' numbers, each axis from 0 to 1, its values in the hover text.

    plotly's own parallel coordinates make code at run time, which the policy of the page does not allow.
    """
    axes = figure["axes"]
    scaled = [_scaled(axis["values"]) for axis in axes]
    traces = []
    for index, line in enumerate(figure["lines"]):
        traces.append(
            {
                "name": shown(f"{line['rank']}: {line['config_id']}"),
                "style": line["kind"],
                "mode": "lines+markers",
                "x": list(range(len(axes))),
                "y": [column[index] for column in scaled],
                "text": [
                    shown(
                        f"{line['config_id']}, rank {line['rank']}: {axis['name']} = "
                        f"{'not used' if axis['values'][index] is None else axis['values'][index]}"
                    )
                    for axis in axes
                ],
            }
        )
    return {
        "name": "knobs",
        "title": "Knobs of the best configs",
        "x": "",
        "y": "from the least to the largest value",
        "log": False,
        "ticks": [shown(axis["name"]) for axis in axes],
        "traces": traces,
    }


def _scaled(values: Sequence[float | str | None]) -> list[float | None]:
    known = [value for value in values if value is not None]
    if any(isinstance(value, str) for value in known):
        names = sorted({str(value) for value in known})
        return [None if v is None else names.index(str(v)) / max(1, len(names) - 1) for v in values]
    numbers = [float(value) for value in known if math.isfinite(float(value))]
    if not numbers:
        return [None for _ in values]
    log = _wide(numbers)
    low, high = (math.log(end) if log else end for end in (min(numbers), max(numbers)))
    scaled: list[float | None] = []
    for value in values:
        if value is None or not math.isfinite(float(value)):
            scaled.append(None)
        else:
            at = math.log(float(value)) if log else float(value)
            scaled.append((at - low) / (high - low) if high > low else 0.5)
    return scaled


def _wide(values: Sequence[float | None]) -> bool:
    """Whether values are positive and so far apart that their logarithm is drawn."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    return bool(known) and min(known) > 0 and max(known) / min(known) > 30


def _number(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
