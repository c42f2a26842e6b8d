"""What the page of a run says, as plain data: verdict, leaderboard, and the numbers of every figure.

Only arithmetic and choice here. Tables come as they were read; a table that is not there is None, and what
would be made of it is None too. How numbers become lines is in `drawing`, how they look in the templates,
how anybody finds the same numbers in the files in `run_queries`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from reports.metrics import ROBUSTNESS
from reports.robustness_view import answer, matrix, number, ordered_configs, text
from reports.run_verdict import (
    floats_of,
    name_of,
    page_totals,
    ranked_by,
    sequence,
    verdict,
)
from reports.schema import CONFIG_PREFIX, config_columns

Rows = Sequence[Mapping[str, Any]]

# Bounds that keep the page of a run of any size small; what is left out is counted on the page.
MOST_LISTED = 20
MOST_RULED_OUT = 12
MOST_POINTS = 250
MOST_AXES = 10
MOST_LINES = 50
MOST_CURVES = 6  # more lines in one picture are not told apart
MOST_EPOCHS = 20
MOST_KNOBS = 15
MOST_FOREST_CONFIGS = 120  # a forest of a thousand configs takes minutes
MOST_NAN_CONFIGS = 24
MOST_MATRIX_CONFIGS = 3
FAR_BEYOND = 1000.0  # times the median: a point there would press all others together

NAN_KINDS = ("loss", "gradient", "output", "parameter")
IMPORTANT_FOR = ("charged_error", "accepted_error", "loss")  # the first that the rows hold
CURVE_COLUMNS = ("curve_coverage", "curve_error", "curve_area")
NEEDED_OF_LEADERBOARD = ("rank", "feasible", "front", "why", "config_id", "n_trials", "nan_count")
# What is drawn of the history: column, what it is called, its unit, the range where it has one.
HISTORY_PANELS: tuple[tuple[str, str, str, tuple[float, float] | None], ...] = (
    ("loss", "training loss", "", None),
    ("val_loss", "validation loss", "", None),
    ("coverage", "coverage", "share", (0.0, 1.0)),
    ("accepted_error", "accepted error", "task's unit", None),
)
# How a config is drawn: the best of their front, others that are worth something, those that are not.
# The style of what is no use is grey, that of what is ruled out the colour of a warning.
KIND_STYLES = (0, 2, 5, 1)
KINDS = ("front 1", "other fronts", "no better than abstaining", "ruled out")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunParts:
    """What could be read of a run folder; None for what could not."""

    leaderboard: pa.Table | None = None
    rows: pa.Table | None = None
    history: pa.Table | None = None
    robustness: Mapping[str, Rows | None] | None = None
    provenance: Mapping[str, Any] | None = None
    plan: str | None = None


def run_view(parts: RunParts) -> dict[str, Any]:
    """Everything the page shows; a figure whose table is not there is None."""
    board, rows = parts.leaderboard, parts.rows
    shown = best_configs(board, rows)
    importance = knob_shares(rows)
    return {
        "verdict": verdict(board, rows),
        "listed": leaderboard_entries(board),
        "scatter": error_by_coverage(board),
        "knobs": parallel_knobs(board, importance),
        "importance": importance,
        "targets": coverage_by_target(board),
        "curves": risk_curves(rows, shown),
        "nans": nan_map(rows, parts.history),
        "learning": learning_curves(parts.history, shown),
        "configs": [{"config_id": name_of(name), "style": index} for index, name in enumerate(shown)],
        "robustness": robustness_part(parts.robustness),
        "provenance": provenance(parts.provenance, rows),
        "plan": parts.plan,
    }


def leaderboard_entries(board: pa.Table | None) -> dict[str, Any] | None:
    """The best configs with mean and spread of what they are judged by; those ruled out with why."""
    if board is None:
        return None
    names = {*board.column_names}
    wanted = [*sequence(ranked_by(board).get("by")), "coverage", "accepted_error", "charged_error"]
    metrics = [name for name in dict.fromkeys(map(str, wanted)) if f"{name}_mean" in names][:8]
    feasible = board.filter(board.column("feasible"))
    ruled_out = board.filter(pc.invert(board.column("feasible")))
    entries, was = [], None
    for entry in feasible.slice(0, MOST_LISTED).to_pylist():
        worthless = entry.get("beats_abstaining") is False
        entries.append(
            {
                "rank": entry["rank"],
                "front": entry["front"],
                "config_id": name_of(entry["config_id"]),
                "heading": _heading(was, worthless, entry),
                "rank_low": entry.get("rank_low"),
                "rank_high": entry.get("rank_high"),
                "p_best": entry.get("p_best"),
                "spreads": [
                    (number(entry[f"{name}_mean"]), number(entry.get(f"{name}_std"))) for name in metrics
                ],
                "robustness": number(entry.get(ROBUSTNESS)),
                "nan_count": entry["nan_count"],
                "n_trials": entry["n_trials"],
            }
        )
        was = worthless
    first = feasible.slice(0, 1).to_pylist()
    totals = page_totals(board)
    return {
        "metrics": metrics,
        "entries": entries,
        "left_out": max(0, totals["feasible"] - len(entries)),
        "has_ranks": any(entry["rank_low"] is not None for entry in entries),
        "has_robustness": any(math.isfinite(entry["robustness"]) for entry in entries),
        "ruled_out": [
            {"config_id": name_of(entry["config_id"]), "why": text(entry["why"])}
            for entry in ruled_out.slice(0, MOST_RULED_OUT).select(["config_id", "why"]).to_pylist()
        ],
        "ruled_out_left": max(
            0, totals["configs"] - totals["feasible"] - min(len(ruled_out), MOST_RULED_OUT)
        ),
        "best_knobs": [
            (name_of(name.removeprefix(CONFIG_PREFIX)), said_value(first[0][name]))
            for name in varying_knobs(board)
            if first[0][name] is not None
        ]
        if first
        else [],
    }


def error_by_coverage(board: pa.Table | None) -> dict[str, Any] | None:
    """Of each config mean coverage, mean error of its answers and step time (`size`), its front and its kind.

    Configs without both numbers are counted as `unplaced`; of very many the best ranked are taken. Those
    `beyond` a thousand times the median lie at `top` in the picture, so that the others can be told apart.
    """
    return _points(board, "coverage", "accepted_error", size="step_time_ms")


def coverage_by_target(board: pa.Table | None) -> dict[str, Any] | None:
    """Of each config the coverage asked for and the mean that was reached, with what it ranges over."""
    return _points(board, "target_coverage", "coverage", spread=True)


def parallel_knobs(
    board: pa.Table | None, importance: Mapping[str, Any] | None = None
) -> dict[str, Any] | None:
    """The best configs as lines through the knobs that vary, those that mattered most first.

    `axes` have a value per config, None where the knob is not used; `lines` say which config it is.
    """
    if board is None:
        return None
    varying = varying_knobs(board)
    share = {entry["knob"]: entry["share"] for entry in (importance or {}).get("entries", ()) if importance}
    distinct = {name: pc.count_distinct(board.column(name), mode="all").as_py() for name in varying}
    order = sorted(
        varying, key=lambda name: (-share.get(name.removeprefix(CONFIG_PREFIX), -1.0), -distinct[name], name)
    )
    held = board.slice(0, MOST_LINES).select(
        ["rank", "config_id", "feasible", "front", *_present(board, "beats_abstaining"), *order[:MOST_AXES]]
    )
    entries = held.to_pylist()
    return {
        "lines": [
            {
                "rank": entry["rank"],
                "config_id": name_of(entry["config_id"]),
                "kind": kind_of(entry),
                "style": KIND_STYLES[kind_of(entry)],
            }
            for entry in entries
        ],
        "axes": [
            {
                "name": name_of(name.removeprefix(CONFIG_PREFIX)),
                "column": name,
                "values": [_axis_value(entry[name]) for entry in entries],
            }
            for name in order[:MOST_AXES]
        ],
        "axes_left_out": [name_of(name.removeprefix(CONFIG_PREFIX)) for name in order[MOST_AXES:]],
        "left_out": max(0, page_totals(board)["configs"] - len(entries)),
    }


def knob_shares(rows: pa.Table | None) -> dict[str, Any] | None:
    """The share of each knob in what the configs' error went along with, as `reports.importance` finds it.

    Where it cannot be told, `entries` is empty and `why` says why.
    """
    if rows is None:
        return None
    metric = next((name for name in IMPORTANT_FOR if name in rows.column_names), IMPORTANT_FOR[0])
    why, found = "", []
    try:
        # Not before it is needed: it loads optuna.
        from reports.importance import knob_importance

        found = knob_importance(forest_rows(rows), metric, seed=0)
    except (ImportError, RuntimeError) as error:  # it, or the library that grows its forests, is not there
        why = f"it cannot be computed here: {text(error)}"
    except ValueError as error:
        why = text(error)
    configs = pc.count_distinct(rows.column("config_id")).as_py()
    return {
        "metric": metric,
        "configs": configs,
        "sampled": min(configs, MOST_FOREST_CONFIGS),
        "entries": [
            {
                "knob": name_of(one.knob),
                "share": number(one.share),
                "low": number(one.low),
                "high": number(one.high),
                "values": one.values,
                "noise": number(getattr(one, "noise", None)),
            }
            for one in found[:MOST_KNOBS]
        ],
        "left_out": max(0, len(found) - MOST_KNOBS),
        "why": why or ("" if found else "no knob has a share"),
    }


def forest_rows(rows: pa.Table) -> pa.Table:
    """The rows of which the importance of knobs is computed: all, or those of evenly many of the config ids.

    Ids are hashes, so that every so-many-th in their order is a sample that prefers none.
    """
    ids = sorted(name for name in pc.unique(rows.column("config_id")).to_pylist() if name is not None)
    if len(ids) <= MOST_FOREST_CONFIGS:
        return rows
    return rows.filter(pc.is_in(rows.column("config_id"), pa.array(_thinned(ids, MOST_FOREST_CONFIGS))))


def risk_curves(rows: pa.Table | None, configs: Sequence[str]) -> dict[str, Any] | None:
    """Error against coverage of the best configs: the curve of each one's first seed, and its mean area.

    Curves of several seeds have no common thresholds. `why` says why there is none.
    """
    if rows is None:
        return None
    lacking = [name for name in CURVE_COLUMNS[:2] if name not in rows.column_names]
    if lacking:
        return {"series": [], "why": f"the rows hold no {' and no '.join(lacking)}"}
    wanted = ["config_id", "seed", *_present(rows, *CURVE_COLUMNS)]
    held = rows.filter(pc.is_in(rows.column("config_id"), pa.array(configs, pa.string())))
    entries = held.select(wanted).to_pylist()
    series = []
    for style, config in enumerate(configs):
        own = [entry for entry in entries if entry["config_id"] == config]
        drawn = sorted((entry for entry in own if entry["curve_coverage"]), key=lambda one: one["seed"])
        if not drawn:
            continue
        steps = _thinned(range(len(drawn[0]["curve_coverage"])), MOST_EPOCHS)
        errors = drawn[0]["curve_error"] or []
        areas = [number(entry.get("curve_area")) for entry in own]
        finite = [area for area in areas if math.isfinite(area)]
        series.append(
            {
                "name": name_of(config),
                "style": style,
                "seed": drawn[0]["seed"],
                "x": [number(drawn[0]["curve_coverage"][step]) for step in steps],
                "values": [number(errors[step]) if step < len(errors) else None for step in steps],
                "area": sum(finite) / len(finite) if finite else math.nan,
                "seeds": len(finite),
            }
        )
    return {"series": series, "why": "" if series else "no trial of the best configs has a curve"}


def nan_map(rows: pa.Table | None, history: pa.Table | None) -> dict[str, Any] | None:
    """Which configs met non-finite values: of which kind (from the rows) and in which epochs (the history).

    The history counts since the training began, so an epoch's own are what it counts more than the one
    before. `epochs` are the ends of the bins in which they are summed.
    """
    if rows is None or "nan_count" not in rows.column_names:
        return None
    kinds = _present(rows, *(f"nan_{kind}" for kind in NAN_KINDS))
    met = rows.filter(pc.greater(pc.fill_null(rows.column("nan_count"), 0), 0))
    entries = met.select(
        ["config_id", "seed", "nan_count", *_present(rows, "nan_origin"), *kinds]
    ).to_pylist()
    configs: dict[str, dict[str, Any]] = {}
    for entry in entries:
        own = configs.setdefault(
            entry["config_id"],
            {
                "config_id": name_of(entry["config_id"]),
                "total": 0,
                "kinds": dict.fromkeys(NAN_KINDS, 0),
                "seeds": [],
                "origins": [],
                "counts": [],
                "first": None,
            },
        )
        own["total"] += entry["nan_count"]
        own["seeds"].append(entry["seed"])
        if entry.get("nan_origin"):
            own["origins"].append(text(entry["nan_origin"]))
        for kind in NAN_KINDS:
            own["kinds"][kind] += entry.get(f"nan_{kind}") or 0
    order = sorted(configs, key=lambda name: (-configs[name]["total"], name))
    shown = order[:MOST_NAN_CONFIGS]
    ends = _count_by_epoch(history, shown, configs)
    for name in shown:
        configs[name]["seeds"] = sorted(set(configs[name]["seeds"]))
        configs[name]["origins"] = list(dict.fromkeys(configs[name]["origins"]))[:3]
    return {
        "configs": [configs[name] for name in shown],
        "epochs": ends,
        "left_out": len(order) - len(shown),
        "trials": len(entries),
        "total": sum(entry["nan_count"] for entry in entries),
    }


def learning_curves(history: pa.Table | None, configs: Sequence[str]) -> list[dict[str, Any]] | None:
    """Loss and coverage of the best configs over epochs: the mean over seeds, and what they range over."""
    if history is None:
        return None
    names = _present(history, *(column for column, *_ in HISTORY_PANELS))
    held = history.filter(pc.is_in(history.column("config_id"), pa.array(configs, pa.string())))
    entries = held.select(["config_id", "epoch", *names]).to_pylist()
    by_config: dict[str, dict[int, list[Mapping[str, Any]]]] = {}
    for entry in entries:
        by_config.setdefault(entry["config_id"], {}).setdefault(entry["epoch"], []).append(entry)
    panels = []
    for column, title, unit, bounds in HISTORY_PANELS:
        if column not in names:
            continue
        series = []
        for style, config in enumerate(configs):
            epochs = by_config.get(config, {})
            steps = _thinned(sorted(epochs), MOST_EPOCHS)
            if not steps:
                continue
            spreads = [_spread(entry[column] for entry in epochs[step]) for step in steps]
            means, lows, highs = (list(part) for part in zip(*spreads, strict=True))
            series.append(
                {
                    "name": name_of(config),
                    "style": style,
                    "x": steps,
                    "values": means,
                    "low": lows,
                    "high": highs,
                }
            )
        panels.append({"column": column, "title": title, "unit": unit, "range": bounds, "series": series})
    return panels


def robustness_part(parts: Mapping[str, Rows | None] | None) -> dict[str, Any] | None:
    """The scores and the matrix of the most robust configs, from the run's robustness folder."""
    if parts is None:
        return None
    configs = ordered_configs(parts)
    shown = configs[:MOST_MATRIX_CONFIGS]
    return {
        "answer": answer(parts, shown),
        "matrix": matrix(parts.get("cells"), shown),
        "configs": [{"config_id": name, "style": index} for index, name in enumerate(shown)],
        "left_out": len(configs) - len(shown),
    }


def provenance(said: Mapping[str, Any] | None, rows: pa.Table | None) -> list[tuple[str, str]]:
    """What the run says of itself, and what its rows say: data, machines, versions, as pairs of text."""
    pairs = []
    for name, value in (said or {}).items():
        if isinstance(value, Mapping | list):
            value = json.dumps(value, sort_keys=True, default=str)
        pairs.append((text(name), text(value)))
    if rows is not None:
        for name in ("task", "scenario", "searcher", "data_digest", "plan_digest", "device", "device_name"):
            if name in rows.column_names:
                values = sorted({text(value) for value in pc.unique(rows.column(name)).to_pylist()} - {""})
                if values:
                    more = f" and {len(values) - 3} more" if len(values) > 3 else ""
                    pairs.append((f"{name} of the rows", text(", ".join(values[:3]) + more)))
    return pairs


def best_configs(board: pa.Table | None, rows: pa.Table | None) -> list[str]:
    """The configs that lines are drawn of: the best ranked, or without a leaderboard the first by name."""
    if board is not None:
        ids = board.filter(board.column("feasible")).column("config_id").slice(0, MOST_CURVES).to_pylist()
        return list(dict.fromkeys(ids))
    if rows is not None:
        ids = sorted(name for name in pc.unique(rows.column("config_id")).to_pylist() if name is not None)
        return ids[:MOST_CURVES]
    return []


def varying_knobs(board: pa.Table) -> list[str]:
    """The config columns that are not the same in every config."""
    return [
        name
        for name in config_columns(board)
        if pc.count_distinct(board.column(name), mode="all").as_py() > 1
    ]


def kind_of(entry: Mapping[str, Any]) -> int:
    """Which of `KINDS` a config of the leaderboard is."""
    if not entry["feasible"]:
        return 3
    if entry.get("beats_abstaining") is False:
        return 2
    return 0 if entry["front"] == 1 else 1


def said_value(value: Any) -> str:
    """The value of a knob as text, numbers in as many digits as they need, at most six."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"{value:.6g}" if isinstance(value, float) else name_of(value)


def _points(
    board: pa.Table | None, x: str, y: str, *, spread: bool = False, size: str = ""
) -> dict[str, Any] | None:
    if board is None:
        return None
    lacking = [f"{name}_mean" for name in (x, y) if f"{name}_mean" not in board.column_names]
    if lacking:
        nothing = {"points": [], "left_out": 0, "unplaced": len(board), "top": math.inf, "beyond": 0}
        return {**nothing, "sizes": None, "why": f"there is no {lacking[0]}"}
    wanted = ["rank", "config_id", "feasible", "front", "n_trials", f"{x}_mean", f"{y}_mean"]
    wanted += _present(board, "beats_abstaining", f"{y}_min", f"{y}_max", *([f"{size}_mean"] if size else []))
    places = np.isfinite(floats_of(board, f"{x}_mean")) & np.isfinite(floats_of(board, f"{y}_mean"))
    placed = board.filter(pa.array(places))
    points = []
    for entry in placed.slice(0, MOST_POINTS).select(wanted).to_pylist():
        point = {
            "rank": entry["rank"],
            "config_id": name_of(entry["config_id"]),
            "front": entry["front"],
            "kind": kind_of(entry),
            "x": float(entry[f"{x}_mean"]),
            "y": float(entry[f"{y}_mean"]),
        }
        if spread:
            point |= {"low": number(entry.get(f"{y}_min")), "high": number(entry.get(f"{y}_max"))}
        if size:
            point["size"] = number(entry.get(f"{size}_mean"))
        points.append(point)
    sizes = [point["size"] for point in points if math.isfinite(point.get("size", math.nan))]
    whole = page_totals(board)["configs"]
    unplaced = int((~places).sum())
    heights = sorted(point["y"] for point in points)
    limit = FAR_BEYOND * heights[len(heights) // 2] if heights else math.inf
    inside = [height for height in heights if height <= limit] if limit > 0 else heights
    return {
        "points": points,
        "left_out": whole - len(points) - unplaced,
        "unplaced": unplaced,
        "top": 1.5 * inside[-1] if len(inside) < len(heights) else math.inf,
        "beyond": len(heights) - len(inside),
        "sizes": (min(sizes), max(sizes)) if sizes else None,
        "why": "" if points else f"no config has both {x} and {y}",
    }


def _count_by_epoch(
    history: pa.Table | None, shown: Sequence[str], configs: Mapping[str, dict[str, Any]]
) -> list[int]:
    """Fill `counts` (per bin of epochs) and `first` of the shown configs; the ends of the bins."""
    if history is None or "nan_count" not in history.column_names or not shown:
        return []
    held = history.filter(pc.is_in(history.column("config_id"), pa.array(shown, pa.string())))
    if not len(held):
        return []
    last = pc.max(held.column("epoch")).as_py()
    wide = max(1, math.ceil(last / MOST_EPOCHS))
    bins = math.ceil(last / wide)
    for name in shown:
        configs[name]["counts"] = [0] * bins
    so_far: dict[str, int] = {}
    keys = [("trial_id", "ascending"), ("epoch", "ascending")]
    for entry in held.select(["config_id", "trial_id", "epoch", "nan_count"]).sort_by(keys).to_pylist():
        counted = number(entry["nan_count"])
        if not math.isfinite(counted):
            continue
        new = int(counted) - so_far.get(entry["trial_id"], 0)
        so_far[entry["trial_id"]] = int(counted)
        if new > 0:
            own = configs[entry["config_id"]]
            own["counts"][min(bins - 1, max(0, entry["epoch"] - 1) // wide)] += new
            own["first"] = entry["epoch"] if own["first"] is None else min(own["first"], entry["epoch"])
    return [min(last, (index + 1) * wide) for index in range(bins)]


def _heading(was: bool | None, now: bool, entry: Mapping[str, Any]) -> str:
    """What stands between two configs where from here on they are of another kind."""
    if now and not was:
        cost = number(entry.get("trivial_error_mean"))
        return "no better than abstaining everywhere" + (
            f", which has a charged error of {cost:.4g}" if math.isfinite(cost) else ""
        )
    return "with trials that went wrong" if was and not now else ""


def _axis_value(value: Any) -> float | str | None:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return float(value)
    return None if value is None else name_of(value)[:18]


def _spread(values: Iterable[Any]) -> tuple[float | None, float | None, float | None]:
    """Mean, least and largest: None of nothing, and a mean that is not finite where a value is not."""
    held = [number(value) for value in values if value is not None]
    if not held:
        return None, None, None
    finite = [value for value in held if math.isfinite(value)]
    return sum(held) / len(held), min(finite, default=None), max(finite, default=None)


def _thinned(steps: Sequence[Any], most: int) -> list[Any]:
    """At most so many of the steps, evenly apart, the first and the last among them."""
    if len(steps) <= most:
        return list(steps)
    return [steps[round(index * (len(steps) - 1) / (most - 1))] for index in range(most)]


def _present(table: pa.Table, *names: str) -> list[str]:
    return [name for name in names if name in table.column_names]
