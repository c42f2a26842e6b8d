"""Cells of the fault matrix as a table, and what they come to: one robustness score per config.

A cell is one config trained with one seed under one fault at one severity, beside its clean twin: the same
config and seed without the fault. How faults are made is decided in `harness.robustness.faults`.

Retained quality of a cell, in [0, 1], is a product of three factors, each in [0, 1]:

    error      min(1, min(clean charged_error, trivial_error) / charged_error)
    coverage   min(1, coverage / max(clean coverage, target_coverage))
    refusal    min(1, (1 - false_accept_rate) / (1 - clean false_accept_rate)); 1 where the clean twin refused
               no bottom or there is none

`trivial_error` is what abstaining everywhere costs. So a config that abstains everywhere has nothing for its
coverage to be measured by, or loses it, and gets 0; one whose clean training is worse than abstaining cannot
have 1; one that answers where it should refuse loses its refusal. A cell is 0 where the trial failed or
diverged, where its clean twin did or answered nothing, and where a number that is needed is not finite. A
cell that does not apply is left out; one that is missing counts as 0.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from reports.fragments import read_fragment, write_table_atomically
from reports.schema import Column, nearest_name, stamped_schema

CELLS_FILE = "cells.parquet"
SCORES_FILE = "scores.parquet"
NOT_APPLICABLE = "not_applicable"
CELL_STATUSES = ("completed", "stopped", "diverged", "failed", NOT_APPLICABLE)
ENDED_WELL = ("completed", "stopped")
SEVERITIES = ("low", "middle", "high")
INTERVAL = 0.95

_SCORED = ("coverage", "accepted_error", "charged_error", "false_accept_rate", "false_reject_rate")
_MEANINGS: dict[str, tuple[str, str]] = {
    "coverage": ("share of samples whose decoded output is finite at tau_infer", "share"),
    "accepted_error": ("mean error of the accepted answers", "task's unit"),
    "charged_error": ("mean error, an abstention paying the baseline's", "task's unit"),
    "false_accept_rate": ("accepted, among those labelled bottom", "share"),
    "false_reject_rate": ("rejected, among those labelled finite", "share"),
}
_SPLITS = (("", "validation split"), ("test_", "test split"))


def _measured(whose: str, prefix: str) -> tuple[Column, ...]:
    return tuple(
        Column(
            f"{prefix}{before}{name}", "float64", f"{whose}{_MEANINGS[name][0]}; {split}", _MEANINGS[name][1]
        )
        for before, split in _SPLITS
        for name in _SCORED
    )


CELL_COLUMNS: tuple[Column, ...] = (
    Column("task", "string", "the learning problem", required=True),
    Column("config_id", "string", "hash of the config", required=True),
    Column("trial_id", "string", "config_id and seed", required=True),
    Column("seed", "int64", "seed of the trial and of where the fault falls", required=True),
    Column("fault", "string", "what was done to the training", required=True),
    Column("severity", "string", "low, middle or high", required=True),
    Column("strength", "float64", "the severity as a number, in the fault's own unit"),
    Column("span", "string", "whole: as long as the training; window: some epochs, then it ends"),
    Column("window_first", "int64", "the first epoch with the fault, from 1; null for a whole one", "epochs"),
    Column("window_last", "int64", "the last epoch with the fault; null for a whole one", "epochs"),
    Column("status", "string", "completed, stopped, diverged, failed or not_applicable", required=True),
    Column("reason", "string", "why it does not apply, or why a stopped or diverged trial ended, else empty"),
    Column("error", "string", "the message of a failed cell, else empty"),
    Column("epochs", "int64", "epochs trained", "epochs"),
    Column("nan_count", "int64", "non-finite values met, all kinds", "values"),
    Column("nan_loss", "int64", "non-finite losses", "values"),
    Column("nan_gradient", "int64", "steps left out for a non-finite gradient alone", "values"),
    Column("nan_output", "int64", "non-finite outputs that are faults, not bottoms", "values"),
    Column("nan_parameter", "int64", "non-finite parameters", "values"),
    Column("target_coverage", "float64", "the coverage asked for", "share"),
    *_measured("", ""),
    Column(
        "trivial_error", "float64", "charged error of abstaining everywhere; validation split", "task's unit"
    ),
    Column(
        "test_trivial_error", "float64", "charged error of abstaining everywhere; test split", "task's unit"
    ),
    Column("clean_status", "string", "how the clean twin ended"),
    Column("clean_nan_count", "int64", "non-finite values that the clean twin met", "values"),
    *_measured("of the clean twin: ", "clean_"),
    Column("recovered", "bool", "whether it came back to its clean twin; null where the fault never ends"),
    Column(
        "epochs_to_recover", "int64", "epochs after the fault until then; null where it did not", "epochs"
    ),
    Column("same_weights", "bool", "whether it ended with the clean twin's weights, bit for bit"),
    Column("retained", "float64", "retained quality; validation split", "share"),
    Column("test_retained", "float64", "retained quality; test split", "share"),
    Column("pack_note", "string", "why the trial was trained alone instead of in a pack, else empty"),
    Column("device", "string", "cpu or cuda"),
    Column("data_digest", "string", "sha256 of the task's data"),
    Column("planned", "string", "faults with their severities, and seeds, that the matrix has; JSON"),
    Column("duration_s", "float64", "the trial's share of the time", "s"),
)

SCORE_COLUMNS: tuple[Column, ...] = (
    Column("config_id", "string", "hash of the config", required=True),
    Column("robustness", "float64", "mean retained quality over faults, of means over severities", "share"),
    Column("low", "float64", "lower end of its interval; NaN for a single seed", "share"),
    Column("high", "float64", "upper end of its interval; NaN for a single seed", "share"),
    Column("test_robustness", "float64", "the same of the test split, for reports alone", "share"),
    Column(
        "recovered_share", "float64", "recovered, among the cells whose fault ends; NaN without any", "share"
    ),
    Column("adversarial_fault", "string", "the fault that leaves least of the clean twins' quality"),
    Column("adversarial_severity", "string", "its severity"),
    Column("adversarial_retained", "float64", "its retained quality, mean over seeds", "share"),
    Column("n_cells", "int64", "cells planned", "cells"),
    Column("n_measured", "int64", "cells that were trained, failed ones among them", "cells"),
    Column("n_failed", "int64", "cells that failed or diverged", "cells"),
    Column("n_missing", "int64", "cells planned that are not there, which count as 0", "cells"),
    Column("n_not_applicable", "int64", "cells left out, because their fault does not apply", "cells"),
    Column("n_seeds", "int64", "seeds", "seeds"),
    Column("n_faults", "int64", "faults that apply", "faults"),
)

Cell = Mapping[str, Any]
Floats = npt.NDArray[np.float64]


def cell_schema() -> pa.Schema:
    """The columns of cells, with what they mean and in which unit."""
    return stamped_schema(CELL_COLUMNS, "cells")


def score_schema() -> pa.Schema:
    """The columns of scores, with what they mean and in which unit."""
    return stamped_schema(SCORE_COLUMNS, "scores")


def write_cells(folder: Path, rows: Iterable[Cell]) -> Path:
    """Write cells into the folder, whole or not at all; ValueError for a column or status that is none."""
    return _write(folder, CELLS_FILE, cells_table(rows))


def cells_table(rows: Iterable[Cell]) -> pa.Table:
    """Cells as a table; what a cell does not say is null. ValueError for a column or status that is none."""
    schema, held = cell_schema(), [dict(row) for row in rows]
    for row in held:
        for name in row:
            if name not in schema.names:
                near = nearest_name(name, schema.names)
                raise ValueError(f"a cell must have the columns of cell_schema(), got {name!r}{near}")
        if row.get("status") not in CELL_STATUSES:
            raise ValueError(f"status must be one of {', '.join(CELL_STATUSES)}, got {row.get('status')!r}")
    return pa.Table.from_pylist(held, schema=schema)


def read_cells(folder: Path) -> pa.Table:
    """The cells of a folder; RunReadError naming the file that is missing or is anything else."""
    return read_fragment(Path(folder) / CELLS_FILE, kind="cells")


def write_scores(folder: Path, scores: pa.Table) -> Path:
    """Write what `score_cells` returned into the folder, whole or not at all."""
    return _write(folder, SCORES_FILE, scores.cast(score_schema()))


def read_scores(folder: Path) -> pa.Table:
    """The scores of a folder; RunReadError naming the file that is missing or is anything else."""
    return read_fragment(Path(folder) / SCORES_FILE, kind="scores")


def retained_quality(cell: Cell, *, test: bool = False) -> float:
    """The retained quality of a cell, as this module says it; NaN for one that does not apply.

    test: of the test split instead of the validation split.

    >>> clean = {"clean_status": "completed", "clean_charged_error": 2.0, "clean_coverage": 0.5}
    >>> retained_quality({**clean, "status": "completed", "charged_error": 4.0, "coverage": 0.5})
    0.5
    """
    if cell["status"] == NOT_APPLICABLE:
        return math.nan
    before = "test_" if test else ""

    def told(name: str) -> float:
        value = cell.get(name)
        return math.nan if value is None else float(value)

    error, clean_error = told(f"{before}charged_error"), told(f"clean_{before}charged_error")
    coverage, clean_coverage = told(f"{before}coverage"), told(f"clean_{before}coverage")
    if cell["status"] not in ENDED_WELL or cell.get("clean_status") not in ENDED_WELL:
        return 0.0
    if not all(map(math.isfinite, (error, clean_error, coverage, clean_coverage))) or clean_coverage <= 0:
        return 0.0
    best = min(clean_error, _or(told(f"{before}trivial_error"), math.inf))
    asked = max(clean_coverage, _or(told("target_coverage"), 0.0))
    refused = 1.0 - told(f"{before}false_accept_rate")
    clean_refused = 1.0 - told(f"clean_{before}false_accept_rate")
    refusal = 1.0
    if clean_refused > 0:  # not where it is NaN either
        refusal = _share(refused, clean_refused)
    return (1.0 if error <= best else _share(best, error)) * _share(coverage, asked) * refusal


def clean_quality(cell: Cell) -> float:
    """The retained quality of the clean twin itself, validation split: what a harmless fault leaves."""
    twin = {name.removeprefix("clean_"): value for name, value in cell.items() if name.startswith("clean_")}
    return retained_quality({**cell, **twin})


def score_cells(cells: pa.Table, *, resamples: int = 2000, seed: int = 0) -> pa.Table:
    """One row per config, ordered by config_id: `SCORE_COLUMNS`.

    `robustness` is the mean over faults of the mean over severities of the mean over seeds of the retained
    quality on the validation split. What is planned (`planned` of any cell) and missing counts as 0, and what
    does not apply is left out of its mean; a config to which nothing applies has NaN.

    low, high: a bootstrap interval of 95 %, widened to hold the score. Seeds are drawn as blocks, the same in
    all faults, and so are faults: it says what other seeds and other faults of the kind might have given.
    NaN where there is one seed, which says nothing of others. The adversarial cell is the fault and severity
    that leave the least share of the clean twins' own quality, mean over seeds; of several, the mildest.

    Order of the rows makes no difference. Raises ValueError for a cell that is there twice, and for cells
    that lack a column.
    """
    lacking = [
        name
        for name in ("config_id", "fault", "severity", "seed", "status")
        if name not in cells.column_names
    ]
    if lacking:
        raise ValueError(f"cells must have the columns {', '.join(lacking)}, and lack them")
    by_config: dict[str, list[Cell]] = {}
    for cell in cells.to_pylist():
        by_config.setdefault(cell["config_id"], []).append(cell)
    planned = _Planned.of([cell for held in by_config.values() for cell in held])
    rows = [
        _score(config_id, planned, by_config[config_id], resamples, seed) for config_id in sorted(by_config)
    ]
    return pa.Table.from_pylist(rows, schema=score_schema())


def planned_text(faults: Mapping[str, Sequence[str]], seeds: Sequence[int]) -> str:
    """What the column `planned` says: severities by fault, and seeds."""
    held = {name: list(severities) for name, severities in faults.items()}
    return json.dumps({"faults": held, "seeds": sorted(seeds)}, sort_keys=True)


@dataclass(frozen=True, slots=True)
class _Planned:
    """The cells that every config should have."""

    severities: Mapping[str, Sequence[str]]  # by fault, mildest first
    seeds: Sequence[int]

    @classmethod
    def of(cls, cells: Sequence[Cell]) -> _Planned:
        """What the cells say was planned, and what they are themselves."""
        pairs: set[tuple[str, str]] = set()
        seeds: set[int] = set()
        for text in {cell.get("planned") for cell in cells}:
            if text:
                told = json.loads(text)
                pairs |= {(fault, name) for fault, names in told["faults"].items() for name in names}
                seeds |= set(told["seeds"])
        pairs |= {(cell["fault"], cell["severity"]) for cell in cells}
        seeds |= {cell["seed"] for cell in cells}
        severities: dict[str, list[str]] = {}
        for fault, severity in sorted(pairs, key=lambda pair: (pair[0], _place(pair[1]))):
            severities.setdefault(fault, []).append(severity)
        return cls(severities, sorted(seeds))


def _place(severity: str) -> tuple[int, str]:
    known = SEVERITIES.index(severity) if severity in SEVERITIES else len(SEVERITIES)
    return known, severity


def _score(
    config_id: str, planned: _Planned, cells: Sequence[Cell], resamples: int, seed: int
) -> dict[str, Any]:
    found: dict[tuple[str, str, int], Cell] = {}
    for cell in cells:
        key = (cell["fault"], cell["severity"], cell["seed"])
        if key in found:
            fault, severity, number = key
            raise ValueError(
                f"a cell must be there once, got config {config_id}, {fault}:{severity}, seed {number} twice"
            )
        found[key] = cell
    grids = {
        test: _grid(planned, {key: retained_quality(cell, test=test) for key, cell in found.items()})
        for test in (False, True)
    }
    left = {key: _left(cell) for key, cell in found.items()}
    low, high = _interval(grids[False], resamples, seed)
    score = _mean_of_faults(grids[False])
    recovered = [cell["recovered"] for cell in cells if cell.get("recovered") is not None]
    adversarial = _adversarial(planned, grids[False], _grid(planned, left))
    applies = [name for name, grid in zip(planned.severities, grids[False], strict=True) if _applies(grid)]
    n_cells = sum(map(len, planned.severities.values())) * len(planned.seeds)
    left_out = sum(cell["status"] == NOT_APPLICABLE for cell in cells)
    return {
        "config_id": config_id,
        "robustness": score,
        "low": min(low, score),  # NaN stays, where there is no interval
        "high": max(high, score),
        "test_robustness": _mean_of_faults(grids[True]),
        "recovered_share": float(np.mean(recovered)) if recovered else math.nan,
        "adversarial_fault": adversarial[0],
        "adversarial_severity": adversarial[1],
        "adversarial_retained": adversarial[2],
        "n_cells": n_cells,
        "n_measured": len(cells) - left_out,
        "n_failed": sum(cell["status"] in ("failed", "diverged") for cell in cells),
        "n_missing": n_cells - len(cells),
        "n_not_applicable": left_out,
        "n_seeds": len(planned.seeds),
        "n_faults": len(applies),
    }


def _grid(planned: _Planned, retained: Mapping[tuple[str, str, int], float]) -> list[Floats]:
    """Of each fault, (severities, seeds): what is missing is 0, what does not apply NaN."""
    return [
        np.array(
            [[retained.get((fault, name, number), 0.0) for number in planned.seeds] for name in severities]
        )
        for fault, severities in planned.severities.items()
    ]


def _applies(grid: Floats) -> bool:
    return not bool(np.isnan(grid).all())


def _mean_of_faults(grids: Sequence[Floats]) -> float:
    means = [_mean(np.array([_mean(row) for row in grid])) for grid in grids]
    return _mean(np.array(means))


def _mean(values: Floats) -> float:
    """The mean of those that are numbers; NaN where none is."""
    kept = values[~np.isnan(values)]
    return float(kept.mean()) if len(kept) else math.nan


def _interval(grids: Sequence[Floats], resamples: int, seed: int) -> tuple[float, float]:
    """The ends of the bootstrap interval; NaN for a single seed, and where nothing applies."""
    held = [grid for grid in grids if _applies(grid)]
    if not held or held[0].shape[1] < 2 or resamples < 1:
        return math.nan, math.nan
    source = np.random.default_rng(seed)
    seeds = held[0].shape[1]
    drawn_seeds = source.integers(seeds, size=(resamples, seeds))
    drawn_faults = source.integers(len(held), size=(resamples, len(held)))
    by_fault = np.stack([_means_of_draws(grid, drawn_seeds) for grid in held], axis=1)  # (resamples, faults)
    picked = np.take_along_axis(by_fault, drawn_faults, axis=1)
    scores = _nan_mean(picked, axis=1)
    scores = scores[~np.isnan(scores)]
    if not len(scores):
        return math.nan, math.nan
    edge = 50.0 * (1.0 - INTERVAL)
    low, high = np.percentile(scores, [edge, 100.0 - edge])
    return float(low), float(high)


def _means_of_draws(grid: Floats, drawn: npt.NDArray[np.int64]) -> Floats:
    """The mean over severities of the mean over the drawn seeds, one a draw."""
    return _nan_mean(_nan_mean(grid[:, drawn], axis=2), axis=0)  # of (severities, draws, seeds)


def _nan_mean(values: Floats, axis: int) -> Floats:
    there = ~np.isnan(values)
    counts = there.sum(axis=axis)
    sums = np.where(there, values, 0.0).sum(axis=axis)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def _left(cell: Cell) -> float:
    """What a fault left of the quality that its clean twin has; NaN where it does not apply."""
    retained = retained_quality(cell)
    return retained if math.isnan(retained) else _share(retained, clean_quality(cell))


def _adversarial(
    planned: _Planned, retained: Sequence[Floats], left: Sequence[Floats]
) -> tuple[str | None, str | None, float]:
    """Fault, severity and mean retained quality of the cell that leaves least; None where none applies."""
    worst: tuple[float, tuple[int, str], str, str, float] | None = None
    faults = zip(planned.severities.items(), retained, left, strict=True)
    for (fault, severities), retained_here, left_here in faults:
        for place, name in enumerate(severities):
            mean = _mean(left_here[place])
            if not math.isnan(mean):
                found = (mean, _place(name), fault, name, _mean(retained_here[place]))
                worst = found if worst is None else min(worst, found)
    return (None, None, math.nan) if worst is None else (worst[2], worst[3], worst[4])


def _share(part: float, whole: float) -> float:
    """part / whole within [0, 1]; 0 where that is no number."""
    if not (part >= 0 and whole > 0):
        return 0.0
    return min(1.0, part / whole)


def _or(value: float, otherwise: float) -> float:
    return value if math.isfinite(value) else otherwise


def _write(folder: Path, name: str, table: pa.Table) -> Path:
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_table_atomically(table, folder / name)
    return folder / name
