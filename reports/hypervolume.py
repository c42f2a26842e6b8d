"""How much of the objectives' space a run has covered: the hypervolume of its feasible configs.

Each objective is put between the best (0) and the worst (1) that is compared with, by its logarithm where it
spans more than a factor of 30, and the volume is what the configs dominate up to a tenth beyond the worst,
as a share of all there is. Two runs compare only within the same bounds, which `bounds_of` takes of both.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import moocore
import numpy as np
import pyarrow as pa

from reports.aggregate import Floats
from reports.metrics import ROBUSTNESS, parse_metric
from reports.ranking import RANKED_BY_KEY

REFERENCE = 1.1
_LOG_FROM = 30.0

Bounds = Mapping[str, tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Hypervolume:
    """The share of the volume, of how many configs, and the best and worst value of each objective.

    growth: the share after each config, in the order that was given; empty without one.
    """

    share: float
    configs: int
    bounds: Bounds
    growth: tuple[float, ...] = ()


def run_hypervolume(
    leaderboard: pa.Table, *, bounds: Bounds | None = None, order: Sequence[str] | None = None
) -> Hypervolume:
    """The hypervolume of a leaderboard's feasible configs over the objectives that it was ranked by.

    order: config_ids, first the one that was known first; those that are not feasible add nothing. Raises
    ValueError where no config is feasible with a finite value in every objective, where the leaderboard does
    not say its objectives, and for bounds that lack one of them.
    """
    points = _objectives(leaderboard)
    if not points:
        raise ValueError("a hypervolume needs a feasible config with finite objectives, got none")
    names = ranked_by(leaderboard)
    chosen = bounds_of(leaderboard) if bounds is None else bounds
    for name in names:
        if name not in chosen:
            raise ValueError(f"bounds must hold {name}, got {', '.join(chosen)}")
    placed = {key: _place(values, names, chosen) for key, values in points.items()}
    share = _share(np.array(list(placed.values())))
    growth: list[float] = []
    if order is not None:
        held: list[Floats] = []
        for key in order:
            if key in placed:
                held.append(placed[key])
            growth.append(_share(np.array(held)) if held else 0.0)
    return Hypervolume(share, len(placed), {name: chosen[name] for name in names}, tuple(growth))


def bounds_of(*leaderboards: pa.Table) -> dict[str, tuple[float, float]]:
    """The best and the worst value of each objective among the feasible configs of all leaderboards.

    Raises ValueError where they were ranked by different objectives.
    """
    names = ranked_by(leaderboards[0])
    for other in leaderboards[1:]:
        if ranked_by(other) != names:
            raise ValueError(
                f"leaderboards must be ranked by the same objectives, got {', '.join(names)} and "
                f"{', '.join(ranked_by(other))}"
            )
    values = np.array([point for board in leaderboards for point in _objectives(board).values()])
    if not len(values):
        return dict.fromkeys(names, (0.0, 0.0))
    return {
        name: (float(values[:, place].min()), float(values[:, place].max()))
        for place, name in enumerate(names)
    }


def ranked_by(leaderboard: pa.Table) -> list[str]:
    """The objectives that a leaderboard was ranked by; ValueError where it does not say."""
    said = json.loads((leaderboard.schema.metadata or {}).get(RANKED_BY_KEY, b"{}"))
    if not said.get("by"):
        raise ValueError("the leaderboard does not say what it was ranked by: rank the run again")
    return list(said["by"])


def _objectives(leaderboard: pa.Table) -> dict[str, list[float]]:
    """By config_id, the objectives of the feasible configs that have them all, lower being better."""
    names = ranked_by(leaderboard)
    columns = [_column(leaderboard, name) for name in names]
    found = {}
    for entry in leaderboard.select(["config_id", "feasible", *columns]).to_pylist():
        values = [
            _signed(name, math.nan if entry[column] is None else entry[column])
            for name, column in zip(names, columns, strict=True)
        ]
        if entry["feasible"] and all(map(math.isfinite, values)):
            found[entry["config_id"]] = values
    return found


def _column(leaderboard: pa.Table, name: str) -> str:
    column = name if name == ROBUSTNESS else f"{name}_mean"
    if column not in leaderboard.column_names:
        raise ValueError(f"the leaderboard holds no {column}: rank the run again")
    return column


def _signed(name: str, value: float) -> float:
    try:
        direction = parse_metric(name).direction
    except ValueError:  # a task's own metric; the leaderboard says its name, not its direction
        direction = "lower"
    return -value if direction == "higher" else value


def _place(values: Sequence[float], names: Sequence[str], bounds: Bounds) -> Floats:
    placed = np.zeros(len(names))
    for place, (value, name) in enumerate(zip(values, names, strict=True)):
        best, worst = bounds[name]
        if best > 0 and worst / best > _LOG_FROM:
            value, best, worst = (math.log(max(each, 1e-300)) for each in (value, best, worst))
        span = worst - best
        placed[place] = (value - best) / span if span > 0 else 0.0 if value <= best else REFERENCE
    return placed


def _share(points: Floats) -> float:
    inside = np.clip(points, 0.0, REFERENCE)
    volume = moocore.hypervolume(inside, ref=np.full(points.shape[1], REFERENCE))
    return min(1.0, float(volume) / REFERENCE ** points.shape[1])
