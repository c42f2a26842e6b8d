"""The page of a run: one HTML file made from the Parquet files of its folder, and from nothing else.

What is shown is decided in `run_view`, where it is drawn in `drawing`; this reads the files, says of each one
that is missing or damaged why, and puts the three together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from reports.drawing import (
    Axis,
    Chart,
    Parallel,
    Point,
    Scatter,
    Series,
    draw_lines,
    draw_parallel,
    draw_scatter,
    draw_strip,
    short,
)
from reports.fragments import RunReadError, fragment_paths
from reports.history import HISTORY_FOLDER, read_history
from reports.pages import (
    is_known,
    read_mapping_part,
    read_part,
    read_table_part,
    render_template,
    write_page_file,
)
from reports.provenance import PROVENANCE_FILE
from reports.ranking import LEADERBOARD_FILE
from reports.robustness_page import RUN_PART as ROBUSTNESS_FOLDER
from reports.rows import ROWS_FOLDER, read_rows
from reports.run_queries import queries
from reports.run_view import KIND_STYLES, KINDS, NEEDED_OF_LEADERBOARD, RunParts, run_view

PAGE_FILE = "report.html"
PLAN_FILE = "plan.yaml"
ROBUSTNESS_PARTS = ("scores", "cells")
# What is read whole into memory at most; the figures of a larger run are left to its queries.
MOST_ROWS = 200_000
MOST_HISTORY = 5_000_000
MOST_PLAN = 12_000


@dataclass(frozen=True, slots=True)
class RunFolder:
    """What a run folder holds: its parts, and of each part that is not there why."""

    name: str
    parts: RunParts
    problems: Mapping[str, str] = field(default_factory=dict)


def read_run(folder: Path) -> RunFolder:
    """Read what there is of a run; RunReadError where the folder is none of a run.

    What is missing or cannot be read is None in the parts and said in `problems`.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise RunReadError(f"{folder} is not a folder" if folder.exists() else f"{folder} does not exist")
    if not (folder / ROWS_FOLDER).is_dir():
        raise RunReadError(f"{folder} is not a run folder: it holds no {ROWS_FOLDER}/")
    problems: dict[str, str] = {}
    rows, problems["rows"] = _read_tables(folder, ROWS_FOLDER, MOST_ROWS, read_rows)
    history, problems["history"] = _read_tables(folder, HISTORY_FOLDER, MOST_HISTORY, read_history)
    board, problems["leaderboard"] = _read_leaderboard(folder / LEADERBOARD_FILE)
    said, problems["provenance"] = read_mapping_part(folder / PROVENANCE_FILE)
    plan, problems["plan"] = _read_plan(folder / PLAN_FILE)
    robustness = None
    if (folder / ROBUSTNESS_FOLDER).is_dir():
        robustness = {}
        for name in ROBUSTNESS_PARTS:
            robustness[name], problems[name] = read_part(folder / ROBUSTNESS_FOLDER / f"{name}.parquet")
    parts = RunParts(
        leaderboard=board, rows=rows, history=history, robustness=robustness, provenance=said, plan=plan
    )
    return RunFolder(folder.resolve().name, parts, problems)


def render_run(run: RunFolder, view: Mapping[str, Any] | None = None) -> str:
    """The page of the run as HTML, without any script; `view` where `run_view` was called already."""
    view = run_view(run.parts) if view is None else view
    return render_template("run.html", **page_values(run, view))


def write_run_page(page: str, path: Path) -> None:
    """Replace the file at `path` by the page, whole or not at all."""
    write_page_file(path, page)


def page_values(run: RunFolder, view: Mapping[str, Any]) -> dict[str, Any]:
    """What the template of a run needs: the view, what is missing, and where everything is drawn."""
    return {
        "view": view,
        "title": run.name,
        "problems": {"scores": "", "cells": "", **run.problems},
        "queries": queries(view),
        "kinds": list(zip(KINDS, KIND_STYLES, strict=True)),
        "scatter_chart": _draw_points(view["scatter"], "accepted error against coverage"),
        "targets_chart": _draw_points(view["targets"], "coverage against what was asked for", share=True),
        "parallel_chart": _draw_knobs(view["knobs"]),
        "curves_chart": _draw_curves(view["curves"]),
        "learning": [_draw_learning(panel) for panel in view["learning"] or ()],
        "strips": _draw_strips(view["nans"]),
    }


def _read_tables(folder: Path, name: str, most: int, read: Any) -> tuple[pa.Table | None, str]:
    """The rows or the history of a run, and why not; the footers say first whether they are too many."""
    try:
        count = sum(pq.ParquetFile(path).metadata.num_rows for path in fragment_paths(folder / name))
        if count > most:
            return None, f"{name}/ holds {count} rows, more than the {most} that a page is made of"
        return read(folder), ""
    except RunReadError as error:
        return None, str(error)
    except (pa.ArrowException, OSError, ValueError) as error:
        return None, f"{name}/ cannot be read as Parquet: {' '.join(str(error).split())}"


def _read_leaderboard(path: Path) -> tuple[pa.Table | None, str]:
    table, problem = read_table_part(path)
    if table is None:
        return None, f"{problem}; `scm-harness rank RUN` writes it"
    lacking = [name for name in NEEDED_OF_LEADERBOARD if name not in table.column_names]
    if lacking:
        return None, f"{path.name} lacks {', '.join(lacking)}; `scm-harness rank RUN` writes it anew"
    return table, ""


def _read_plan(path: Path) -> tuple[str | None, str]:
    if not path.is_file():
        return None, f"{path.name} is missing"
    try:
        plan = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        return None, f"{path.name} cannot be read: {' '.join(str(error).split())}"
    return (plan if len(plan) <= MOST_PLAN else plan[:MOST_PLAN] + "\n… (cut here)"), ""


def _draw_points(figure: Mapping[str, Any] | None, title: str, *, share: bool = False) -> Scatter | None:
    if figure is None or not figure["points"]:
        return None
    # The best are drawn last, so that they lie above the others.
    top = figure["top"]
    points = [
        Point(
            x=point["x"],
            y=min(point["y"], top),
            style=KIND_STYLES[point["kind"]],
            marked=point["rank"] == 1,
            text=f"{point['config_id']}, rank {point['rank']}: {short(point['x'])}, {short(point['y'])}"
            + (f", {short(point['size'])} ms" if is_known(point.get("size")) else ""),
            size=point.get("size"),
            y_low=point.get("low"),
            y_high=point.get("high"),
        )
        for point in reversed(figure["points"])
    ]
    if share:
        return draw_scatter(title, points, x_range=(0.0, 1.0), y_range=(0.0, 1.0), diagonal=True)
    # Coverages are near 1 more often than not; the axis begins at the tenth below the least of them.
    low = min(0.9, math.floor(10 * min(point.x for point in points) - 1e-9) / 10)
    return draw_scatter(title, points, x_range=(max(0.0, low), 1.0))


def _draw_knobs(figure: Mapping[str, Any] | None) -> Parallel | None:
    if figure is None or not figure["axes"]:
        return None
    axes = [Axis(name=axis["name"], values=axis["values"]) for axis in figure["axes"]]
    return draw_parallel("knobs of the configs", axes)


def _draw_curves(figure: Mapping[str, Any] | None) -> Chart | None:
    if figure is None or not figure["series"]:
        return None
    series = [
        Series(name=item["name"], style=item["style"], values=item["values"], x=item["x"])
        for item in figure["series"]
    ]
    return draw_lines("error of the answers against coverage", series)


def _draw_learning(panel: Mapping[str, Any]) -> Chart:
    last = max((step for item in panel["series"] for step in item["x"]), default=1)
    return draw_lines(
        f"{panel['title']} by epoch",
        [Series(**item) for item in panel["series"]],
        x_range=(0.0, float(max(1, last))),
        y_range=panel["range"],
    )


def _draw_strips(figure: Mapping[str, Any] | None) -> list[list[Any]]:
    if figure is None:
        return []
    ends = figure["epochs"]
    texts = [
        f"epoch {end}" if end - before == 1 else f"epochs {before + 1} to {end}"
        for before, end in zip([0, *ends], ends, strict=False)
    ]
    return [
        draw_strip(
            config["counts"],
            [f"{when}: {count}" for when, count in zip(texts, config["counts"], strict=True)]
            if config["counts"]
            else [],
        )
        for config in figure["configs"]
    ]
