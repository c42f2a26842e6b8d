"""The order of configs from what is known of each: constraints first, then kinds, Pareto fronts and ties.

Arrays in, arrays out; where their numbers come from is decided in `ranking` and `scenarios`. Of very many
points only the first fronts are found.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import moocore
import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

KINDS = 5
# Points looked at together at first, by and by more; and how many points of the last wanted front each is
# held against before it is ranked.
FIRST_CHUNK = 4096
GUARDS = 256


@dataclass(frozen=True, slots=True)
class Standing:
    """What orders configs; every array has one entry per config, lower being better.

    feasible      whether the constraints are met; those that do not meet them come last, and have no front
    number_wrong  trials that went wrong, within the budget where feasible
    kind          0 to 4: the fronts of one kind come before those of the next
    objectives    one array per objective, without NaN, as they are compared in the fronts
    ties          one array per tie-break, the one that decides first in a front first
    """

    feasible: Bools
    number_wrong: Ints
    kind: Ints
    objectives: Sequence[Floats]
    ties: Sequence[Floats]


def order_configs(standing: Standing, most: int | None = None) -> tuple[Ints, Ints]:
    """The front of each config (from 1; 0 for one that is not feasible), and the configs in their order.

    Configs that nothing tells apart stand in the order in which they are given. With `most`, the order ends
    after that many, and the front may be 0 for configs that are not among them.
    """
    feasible = standing.feasible
    front = np.zeros(len(feasible), dtype=np.int64)
    placed = 0
    for kind in range(KINDS):
        those = np.flatnonzero(feasible & (standing.kind == kind))
        wanted = len(feasible) if most is None else most - placed
        if len(those) and wanted > 0:
            points = np.column_stack([values[those] for values in standing.objectives])
            found = pareto_fronts(points) if len(those) <= wanted else first_fronts(points, wanted)
            front[those] = np.where(found >= 0, front.max() + 1 + found, 0)
            placed += int(np.count_nonzero(found >= 0))
    candidates = np.arange(len(feasible))
    if most is not None and placed >= most:
        candidates = np.flatnonzero(front)
    keys = (*reversed(standing.ties), standing.number_wrong, front, ~feasible)
    # The last key of lexsort decides first, and it is stable.
    order = candidates[np.lexsort([key[candidates] for key in keys])]
    return front, order[:most]


def pareto_fronts(points: Floats) -> Ints:
    """The front of every point, lower being better in every column: 0 where no point dominates it.

    `points` is (n, objectives) and may hold infinities, not NaN (ValueError). Equal points share a front.

    >>> pareto_fronts(np.array([[1.0, 2.0], [2.0, 1.0], [2.0, 2.0]])).tolist()
    [0, 0, 1]
    """
    return _fronts_of_ranks(_dense_ranks(points))


def first_fronts(points: Floats, wanted: int) -> Ints:
    """The front of every point in the first fronts, those that hold the best `wanted` points; -1 for others.

    The numbers are those of `pareto_fronts`, and every front is there whole or not at all: the first ones,
    until they hold `wanted` points or more, or all there are. Time and memory do not grow with the fronts
    that are left out.

    >>> first_fronts(np.array([[1.0, 2.0], [2.0, 1.0], [2.0, 2.0], [3.0, 3.0]]), wanted=3).tolist()
    [0, 0, 1, -1]
    """
    if not wanted >= 1:
        raise ValueError(f"wanted must be >= 1, got {wanted=}")
    ranks = _dense_ranks(points)
    fronts = np.full(len(ranks), -1, dtype=np.int64)
    # What dominates a point has a smaller sum of ranks, so stands before it: a front, once found, is final.
    order = np.argsort(ranks.sum(axis=1))
    held = np.zeros(0, dtype=np.int64)  # the points of the fronts that are wanted so far, and of no other
    full = False  # whether these hold as many points as are wanted
    start, size = 0, max(FIRST_CHUNK, wanted)
    while start < len(order):
        those = order[start : start + size]
        start, size = start + size, 2 * size
        if full:
            # Below a point of the last wanted front is a later front, of no interest, whatever is added.
            last = held[fronts[held] == fronts[held].max()]
            those = those[_undominated(ranks[those], ranks[last])]
        held = np.concatenate([held, those])
        found = _fronts_of_ranks(ranks[held])
        below = np.cumsum(np.bincount(found))
        full = bool(below[-1] >= wanted)
        kept = found <= np.searchsorted(below, wanted)
        fronts[held[~kept]] = -1
        held = held[kept]
        fronts[held] = found[kept]
    return fronts


def _dense_ranks(points: Floats) -> Floats:
    if np.isnan(points).any():
        raise ValueError("points must not hold NaN; write a missing value as inf")
    # Dominance depends on order alone; dense ranks are exact and know no infinity.
    ranks = np.empty(points.shape, dtype=np.float64)
    for index, column in enumerate(points.T):
        ranks[:, index] = np.unique(column, return_inverse=True)[1]
    return ranks


def _fronts_of_ranks(ranks: Floats) -> Ints:
    return np.asarray(moocore.pareto_rank(ranks), dtype=np.int64)


def _undominated(points: Floats, guards: Floats) -> Bools:
    """Which points no guard dominates; of many guards only some are asked, so more may be left than need be.

    Points and guards are ranks, and no point has a smaller sum than a guard.
    """
    # First those that dominate much, so that the others have fewer points to be held against.
    reach = np.log(np.maximum(points.max(axis=0) - guards, 0.5)).sum(axis=1)
    asked = guards[np.argsort(-reach, kind="stable")[:GUARDS]]
    columns = [np.ascontiguousarray(column) for column in points.T]
    total = points.sum(axis=1)
    left = np.arange(len(points))
    for guard in asked:
        dominated = total > guard.sum()  # what is nowhere better and not the same
        for column, bound in zip(columns, guard, strict=True):
            dominated &= column >= bound
        if dominated.any():
            rest = ~dominated
            left, total, columns = left[rest], total[rest], [column[rest] for column in columns]
    undominated = np.zeros(len(points), dtype=bool)
    undominated[left] = True
    return undominated
