"""The page of a robustness run: one HTML file made from the Parquet files beside it, and from nothing else.

It runs no script and asks for nothing over the network, and its Content-Security-Policy says so. Numbers are
chosen in `robustness_view`, drawn in `drawing`; every text is escaped.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from reports.drawing import Chart, Series, draw_lines, short
from reports.robustness_view import Rows, page_view
from reports.templating import render_template

PAGE_FILE = "report.html"
RUN_PART = "robustness"  # the folder's name inside a run
PROVENANCE_FILE = "robustness.json"
PARTS: dict[str, str] = {
    "scores": "robustness scores",
    "verdicts": "verdicts of the properties",
    "counterexamples": "counterexamples",
    "cells": "cells of the fault matrix",
    "shift": "domain shift",
}


def write_page(folder: Path) -> Path:
    """Write `report.html` into a robustness folder from the files that are there, and return its path.

    A file that is missing or cannot be read is said on the page, in its place.
    """
    folder = Path(folder)
    parts: dict[str, Rows | None] = {}
    problems: dict[str, str] = {}
    for name in PARTS:
        parts[name], problems[name] = read_part(folder / f"{name}.parquet")
    said, problems["provenance"] = read_provenance(folder / PROVENANCE_FILE)
    page = render_page(page_view(parts, said), problems, title=_title(folder.resolve()))
    path = folder / PAGE_FILE
    beside = path.with_name(path.name + ".tmp")
    try:
        beside.write_text(page, encoding="utf-8", errors="backslashreplace")
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    return path


def read_part(path: Path) -> tuple[Rows | None, str]:
    """The rows of a file and why there are none, one of which is empty."""
    if not path.is_file():
        return None, f"{path.name} is missing"
    try:
        with pq.ParquetFile(pa.BufferReader(path.read_bytes()), page_checksum_verification=True) as file:
            return file.read(use_threads=False).to_pylist(), ""
    except (pa.ArrowException, OSError) as error:
        return None, f"{path.name} cannot be read as Parquet: {' '.join(str(error).split())}"


def read_provenance(path: Path) -> tuple[Mapping[str, Any] | None, str]:
    """What robustness.json holds and why there is nothing, one of which is empty."""
    if not path.is_file():
        return None, f"{path.name} is missing"
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        return None, f"{path.name} cannot be read as JSON: {' '.join(str(error).split())}"
    return (said, "") if isinstance(said, dict) else (None, f"{path.name} holds no mapping")


def render_page(view: Mapping[str, Any], problems: Mapping[str, str], *, title: str) -> str:
    """The page as HTML; `problems` says of each part why it is not there, empty where it is."""
    return render_template(
        "robustness.html",
        {
            "view": view,
            "problems": problems,
            "parts": PARTS,
            "title": title,
            "fault_charts": [_fault_charts(figure) for figure in view["faults"] or ()],
            "shift_charts": [_shift_charts(figure) for figure in view["shifts"] or ()],
        },
        filters={"shade": shade},
    )


def shade(share: float | None) -> int:
    """Which of the shades 0 (all lost) to 10 (all kept) a share has; -1 for none.

    >>> shade(0.0), shade(0.449), shade(1.0), shade(None)
    (0, 4, 10, -1)
    """
    if share is None or not math.isfinite(share):
        return -1
    return min(10, max(0, math.floor(share * 10 + 1e-9)))


def _title(folder: Path) -> str:
    """The run that was examined, or the folder itself where it is in none."""
    return folder.parent.name if folder.name == RUN_PART else folder.name


def _fault_charts(figure: Mapping[str, Any]) -> list[Chart]:
    return [
        draw_lines(
            f"{figure['name']}: {panel['title']} by severity",
            [Series(**item) for item in panel["series"]],
            x_labels=figure["labels"],
            y_range=panel["range"],
        )
        for panel in figure["panels"]
    ]


def _shift_charts(figure: Mapping[str, Any]) -> dict[str, list[Chart]]:
    labels = ["none" if level is None else short(level) for level in figure["levels"]]
    levels = [
        draw_lines(
            f"{figure['name']}: {panel['title']} by level",
            [Series(**item) for item in panel["series"]],
            x_labels=labels,
            y_range=panel["range"],
        )
        for panel in figure["panels"]
    ]
    curves = [
        draw_lines(
            f"{figure['name']}: error of the answers against coverage, step {curve['step']}",
            [
                Series(name=item["name"], style=item["style"], values=item["values"], x=item["x"])
                for item in curve["series"]
            ],
        )
        for curve in figure["curves"]
    ]
    return {"levels": levels, "curves": curves}
