"""The page of a robustness run: one HTML file made from the Parquet files beside it, and from nothing else.

It runs no script and asks for nothing over the network, and its Content-Security-Policy says so. Numbers are
chosen in `robustness_view`, drawn in `drawing`; every text is escaped.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reports.drawing import Chart, Series, draw_lines, short
from reports.pages import Rows, read_mapping_part, read_part, render_template, write_page_file
from reports.robustness_view import page_view

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
    said, problems["provenance"] = read_mapping_part(folder / PROVENANCE_FILE)
    page = render_page(page_view(parts, said), problems, title=_title(folder.resolve()))
    path = folder / PAGE_FILE
    write_page_file(path, page)
    return path


def render_page(view: Mapping[str, Any], problems: Mapping[str, str], *, title: str) -> str:
    """The page as HTML; `problems` says of each part why it is not there, empty where it is."""
    return render_template(
        "robustness.html",
        view=view,
        problems=problems,
        parts=PARTS,
        title=title,
        fault_charts=[_fault_charts(figure) for figure in view["faults"] or ()],
        shift_charts=[_shift_charts(figure) for figure in view["shifts"] or ()],
    )


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
