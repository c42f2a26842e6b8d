"""What a searcher is told about a config: the rows of its seeds become one objective, small is good.

A failed trial, a metric that is not finite and a NaN count over the budget are told as what they are, worse
than any finite result. Nothing is left out: a searcher that is not told about the diverging region converges
into it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness.errors import nearest

DEFAULT_METRICS = ("coverage_shortfall", "accepted_error")

# Above every finite result on the scale of `told_values`: |symlog| stays below 710 for every double.
OVER_BUDGET = 1_000.0
NOT_FINITE = 2_000.0

SHORTFALL_STEP = 0.05
SHORTFALL_WEIGHT = 10.0


@dataclass(frozen=True, slots=True)
class Objective:
    """What a config was worth: one value per objective, all minimised, and whether they can be believed.

    `nan_count` is how many non-finite values its trials met together beyond the budget.
    """

    values: tuple[float, ...]
    nan_count: int = 0
    failed: bool = False

    @property
    def finite(self) -> bool:
        """Whether every trial ended well and every value is a finite number."""
        return not self.failed and all(map(math.isfinite, self.values))

    @property
    def feasible(self) -> bool:
        """Whether the config may be ranked: finite, and no NaN beyond the budget."""
        return self.finite and self.nan_count == 0


def objective_of_rows(
    rows: Sequence[Mapping[str, Any]], metrics: Sequence[str] = DEFAULT_METRICS, nan_budget: int = 0
) -> Objective:
    """The objective of one config from the rows of all its seeds: the mean of each metric over the seeds.

    A failed or diverged trial makes the config failed, a seed without a finite metric makes the mean NaN.
    `coverage_shortfall` is computed from a row's `coverage` and `target_coverage`; other metrics are columns.
    ValueError names one that a trial which ended well does not have.
    """
    if not rows:
        raise ValueError("rows must hold at least one trial of the config, got none")
    failed = any(row["status"] in ("failed", "diverged") for row in rows)
    values = tuple(math.nan if failed else _mean([row_metric(row, name) for row in rows]) for name in metrics)
    counts = [row.get("nan_count") for row in rows]
    if any(count is None or not count >= 0 for count in counts):
        failed = True  # a trial that cannot say how many NaN it met did not end well
    met = sum(int(count) for count in counts if count is not None and count >= 0)
    return Objective(values, nan_count=max(0, met - nan_budget), failed=failed)


def row_metric(row: Mapping[str, Any], name: str) -> float:
    """One metric of a row, NaN where the row has no value for it."""
    if name == "coverage_shortfall":
        coverage, target = row_metric(row, "coverage"), row_metric(row, "target_coverage")
        return max(0.0, target - coverage) if math.isfinite(coverage) and math.isfinite(target) else math.nan
    if name not in row:
        known = [column for column, value in row.items() if isinstance(value, int | float)]
        raise ValueError(f"no trial reports the metric {name!r}{nearest(name, known)}")
    return math.nan if row[name] is None else float(row[name])


def symlog(value: float) -> float:
    """The logarithm of 1 + |value| with the sign of value: keeps the order, at most 710 in size."""
    return math.copysign(math.log1p(abs(value)), value)


def squash(value: float) -> float:
    """A number of (0, 1) that grows with `value`, whatever its unit."""
    scaled = symlog(value)
    return 0.5 + 0.5 * scaled / (1.0 + abs(scaled))


def lexicographic(values: Sequence[float]) -> float:
    """Coverage shortfall in steps of 0.05 first, then the error, which never outweighs a step.

    `values` is (shortfall, error, ...); several errors count with the mean of their squashed values. Raises
    ValueError for a shortfall outside [0, 1].
    """
    shortfall, errors = _split(values)
    steps = math.floor(shortfall / SHORTFALL_STEP + 1e-9)
    return steps + (math.fsum(map(squash, errors)) / len(errors) if errors else shortfall)


def weighted(values: Sequence[float]) -> float:
    """The error on the scale of `symlog` plus 10 times the shortfall; `values` is (shortfall, error, ...)."""
    shortfall, errors = _split(values)
    return SHORTFALL_WEIGHT * shortfall + _mean(map(symlog, errors or [0.0]))


def total(values: Sequence[float]) -> float:
    """The mean of the values on the scale of `symlog`: for objectives that hold no coverage shortfall."""
    return _mean(map(symlog, values))


SCALARISATIONS: dict[str, Callable[[Sequence[float]], float]] = {
    "lexicographic": lexicographic,
    "weighted": weighted,
    "total": total,
}


def told_values(objective: Objective) -> tuple[float, ...]:
    """Finite numbers, one per objective, in true order: feasible < over the NaN budget < not finite.

    Searchers that compare or split by order (TPE, NSGA-II) lose nothing by the scale, and no result, past or
    to come, is worse than one that is not finite.
    """
    return tuple(_told(symlog(value) if objective.finite else 0.0, objective) for value in objective.values)


def told_scalar(objective: Objective, scalarise: Callable[[Sequence[float]], float] = lexicographic) -> float:
    """The same as `told_values` for a searcher of a single objective."""
    return _told(scalarise(objective.values) if objective.finite else 0.0, objective)


def _split(values: Sequence[float]) -> tuple[float, list[float]]:
    shortfall, *errors = values
    if not 0.0 <= shortfall <= 1.0:
        raise ValueError(f"the first value must be a coverage shortfall in [0, 1], got {values=}")
    return shortfall, errors


def _told(value: float, objective: Objective) -> float:
    if not objective.finite:
        return NOT_FINITE
    return OVER_BUDGET + math.log1p(objective.nan_count) if objective.nan_count else value


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    if not all(map(math.isfinite, numbers)):
        return math.nan
    return math.fsum(number / len(numbers) for number in numbers)
