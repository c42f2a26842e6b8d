"""The order of configs from what is known of each: constraints first, then kinds, Pareto fronts and ties.

Arrays in, arrays out; where their numbers come from is decided in `ranking`, how sure an order is, in
`evidence`.
"""

from __future__ import annotations

from dataclasses import dataclass

import moocore
import numpy as np

from reports.aggregate import Bools, Floats, Ints

KINDS = 5


@dataclass(frozen=True, slots=True)
class Standing:
    """What orders configs; every array has one entry per config, lower being better.

    feasible      whether the constraints are met; those that do not meet them come last, and have no front
    number_wrong  trials that went wrong, within the budget where feasible
    kind          0 to 4: the fronts of one kind come before those of the next
    objectives    (configs, objectives), without NaN, as they are compared in the fronts
    ties          (configs, ties), what decides inside a front, the first column first
    """

    feasible: Bools
    number_wrong: Ints
    kind: Ints
    objectives: Floats
    ties: Floats


def order_configs(standing: Standing) -> tuple[Ints, Ints]:
    """The front of each config (from 1; 0 for one that is not feasible), and the configs in their order.

    Configs that nothing tells apart stand in the order in which they are given.
    """
    front = np.zeros(len(standing.feasible), dtype=np.int64)
    for kind in range(KINDS):
        those = standing.feasible & (standing.kind == kind)
        if those.any():
            front[those] = front.max() + 1 + pareto_fronts(standing.objectives[those])
    # The last key of lexsort decides first, and it is stable.
    keys = (*standing.ties.T[::-1], standing.number_wrong, front, ~standing.feasible)
    return front, np.lexsort(keys)


def pareto_fronts(points: Floats) -> Ints:
    """The front of every point, lower being better in every column: 0 where no point dominates it.

    `points` is (n, objectives) and may hold infinities, not NaN (ValueError). Equal points share a front.

    >>> pareto_fronts(np.array([[1.0, 2.0], [2.0, 1.0], [2.0, 2.0]])).tolist()
    [0, 0, 1]
    """
    if np.isnan(points).any():
        raise ValueError("points must not hold NaN; write a missing value as inf")
    # Dominance depends on order alone; dense ranks are exact and know no infinity.
    ranks = [np.unique(column, return_inverse=True)[1].astype(np.float64) for column in points.T]
    return np.asarray(moocore.pareto_rank(np.column_stack(ranks)), dtype=np.int64)
