"""From one row per trial to one per config: counts of what happened, and every metric with its spread.

What rules a config out and what orders the rest is decided in `ranking`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from reports.metrics import SHORTFALL
from reports.schema import CONFIG_PREFIX, TRIAL_STATUSES, config_columns, nearest_name

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

NEEDED_COLUMNS = ("config_id", "trial_id", "seed", "status", "coverage", "target_coverage", "nan_count")
# Integer outcomes whose mean over seeds says something.
SPREAD_INTEGERS = ("epochs", "parameters")


def aggregate_configs(
    rows: pa.Table, *, target_coverage: float | None = None, seeds: Sequence[int] | None = None
) -> pa.Table:
    """One row per config, ordered by config_id: counts of its trials, its metrics over seeds, its knobs.

    Columns: config_id; n_trials, n_completed, n_stopped, n_diverged, n_failed, n_missing (seeds without a
    trial, of `seeds` or else of all seeds in the table); nan_count, summed over trials; `<metric>_mean`,
    `_std` (of the sample; null below two values), `_min`, `_max` over the trials with a finite value (NaN
    where none has); `config.<knob>`. `target_coverage` replaces the trials' own in coverage_shortfall.

    Raises ValueError where the rows lack a column, hold more than one task or an unknown status, or where
    one config_id stands for two different configs.
    """
    return group_trials(rows, target_coverage=target_coverage, seeds=seeds).aggregate()


@dataclass(frozen=True, slots=True)
class Outcomes:
    """Some rows of a run, as arrays in the order of the rows."""

    rows: pa.Table
    target_coverage: float | None

    def status_is(self, status: str) -> Bools:
        """Which trials ended that way."""
        return np.asarray(pc.equal(self.rows.column("status"), status).to_numpy(), dtype=bool)

    def is_null(self, name: str) -> Bools:
        """Which trials have no value in that column."""
        return np.asarray(self.rows.column(name).is_null().to_numpy(), dtype=bool)

    def floats(self, name: str) -> Floats:
        """The column as float64, null as NaN; `coverage_shortfall` is max(0, target_coverage - coverage)."""
        if name == SHORTFALL and name not in self.rows.column_names:
            if self.target_coverage is None:
                target: Floats | float = self.floats("target_coverage")
            else:
                target = self.target_coverage
            return np.maximum(0.0, target - self.floats("coverage"))
        column = pc.fill_null(pc.cast(self.rows.column(name), pa.float64()), float("nan"))
        return np.asarray(column.to_numpy(), dtype=np.float64)

    def nan_counts(self) -> Ints:
        """nan_count per trial, 0 where the row does not say."""
        return np.asarray(pc.fill_null(self.rows.column("nan_count"), 0).to_numpy(), dtype=np.int64)


@dataclass(frozen=True, slots=True)
class Trials(Outcomes):
    """The rows of a run ordered by config_id, seed and trial_id; arrays here are per trial in that order.

    starts, counts  (configs,) first trial and number of trials of each config, ordered by config_id
    """

    starts: Ints
    counts: Ints
    seeds: tuple[int, ...]

    @property
    def configs(self) -> int:
        """How many configs there are."""
        return len(self.starts)

    def total(self, values: Floats) -> Floats:
        """Sums per config of values per trial."""
        return np.add.reduceat(values, self.starts)

    def count(self, values: Ints | Bools) -> Ints:
        """Sums per config of counts, or of yes and no, per trial."""
        return np.add.reduceat(values.astype(np.int64), self.starts)

    def missing(self) -> Ints:
        """Per config, how many of the seeds that it should have are without a trial."""
        return count_missing(self.rows.column("seed").to_numpy(), self.starts, self.seeds)

    def missing_seeds(self, config: int) -> list[int]:
        """Which seeds the config is without."""
        trials = self.rows.column("seed").slice(self.starts[config], self.counts[config]).to_pylist()
        return sorted(set(self.seeds) - set(trials))

    def aggregate(self) -> pa.Table:
        """See `aggregate_configs`."""
        first = pa.array(self.starts)
        table: dict[str, pa.Array | pa.ChunkedArray] = {
            "config_id": self.rows.column("config_id").take(first),
            "n_trials": pa.array(self.counts),
        }
        for status in TRIAL_STATUSES:
            table[f"n_{status}"] = pa.array(self.count(self.status_is(status)))
        table["n_missing"] = pa.array(self.missing())
        table["nan_count"] = pa.array(self.count(self.nan_counts()))
        for name in self.spread_columns():
            table |= self._spread(name)
        for name in config_columns(self.rows):
            table[name] = self.rows.column(name).take(first)
        return pa.table(table)

    def spread_columns(self) -> list[str]:
        """The columns that are aggregated: coverage_shortfall, then every measured number of the rows."""
        return spread_columns(self.rows.schema)

    def _spread(self, name: str) -> dict[str, pa.Array]:
        values = self.floats(name)
        finite = np.isfinite(values)
        number = self.count(finite)
        has_one, has_two = number > 0, number > 1
        # Values near the largest float overflow in their squares; inf is then the honest spread.
        with np.errstate(over="ignore", invalid="ignore"):
            mean = self.total(np.where(finite, values, 0.0)) / np.maximum(number, 1)
            deviation = np.where(finite, values - np.repeat(mean, self.counts), 0.0)
            std = np.sqrt(self.total(deviation**2) / np.maximum(number - 1, 1))
        low = np.minimum.reduceat(np.where(finite, values, np.inf), self.starts)
        high = np.maximum.reduceat(np.where(finite, values, -np.inf), self.starts)
        return {
            f"{name}_mean": pa.array(np.where(has_one, mean, np.nan)),
            f"{name}_std": pa.array(std, mask=~has_two),
            f"{name}_min": pa.array(np.where(has_one, low, np.nan)),
            f"{name}_max": pa.array(np.where(has_one, high, np.nan)),
        }


def group_trials(
    rows: pa.Table, *, target_coverage: float | None = None, seeds: Sequence[int] | None = None
) -> Trials:
    """The rows grouped by config, in an order that is not theirs; errors as for `aggregate_configs`."""
    check_rows(rows)
    keys = [("config_id", "ascending"), ("seed", "ascending"), ("trial_id", "ascending")]
    rows = rows.take(pc.sort_indices(rows, sort_keys=keys)).combine_chunks()
    config_id = pc.rank(_one_chunk(rows, "config_id"), tiebreaker="dense").to_numpy()
    starts = np.flatnonzero(np.diff(config_id.astype(np.int64), prepend=0))
    counts = np.diff(np.append(starts, len(rows)))
    if seeds is None:
        seeds = sorted(set(pc.unique(rows.column("seed")).to_pylist()))
    _check_one_config_each(rows, starts, counts)
    return Trials(
        rows=rows,
        starts=starts,
        counts=counts,
        target_coverage=target_coverage,
        seeds=tuple(sorted(set(seeds))),
    )


def spread_columns(schema: pa.Schema) -> list[str]:
    """The columns that are aggregated: coverage_shortfall, then every measured number of rows like these."""
    names = [SHORTFALL]
    for field in schema:
        measured = pa.types.is_floating(field.type) or field.name in SPREAD_INTEGERS
        if measured and not field.name.startswith(CONFIG_PREFIX) and field.name != SHORTFALL:
            names.append(field.name)
    return names


def count_missing(seed: Ints, starts: Ints, seeds: Sequence[int]) -> Ints:
    """How many of `seeds` each config lacks; `seed` is that of each trial, sorted config by config."""
    first = np.ones(len(seed), dtype=bool)
    first[1:] = seed[1:] != seed[:-1]
    first[starts] = True
    present = np.add.reduceat((first & np.isin(seed, seeds)).astype(np.int64), starts)
    return np.asarray(len(seeds) - present, dtype=np.int64)


def check_rows(rows: pa.Table) -> None:
    """ValueError unless there are rows of one task, with known statuses and the columns needed here."""
    check_columns(rows.schema)
    if len(rows) == 0:
        raise ValueError("there must be at least one row, got none")
    statuses = pc.unique(rows.column("status")).to_pylist()
    unknown = [status for status in statuses if status not in TRIAL_STATUSES]
    if unknown:
        near = nearest_name(str(unknown[0]), TRIAL_STATUSES)
        raise ValueError(f"status must be one of {', '.join(TRIAL_STATUSES)}, got {unknown[0]!r}{near}")
    if "task" in rows.column_names:
        check_one_task(pc.unique(rows.column("task")).to_pylist())


def check_columns(schema: pa.Schema) -> None:
    """ValueError unless the columns that are needed here are all there."""
    lacking = [name for name in NEEDED_COLUMNS if name not in schema.names]
    if lacking:
        raise ValueError(f"rows must have the columns {', '.join(lacking)}, and lack them")


def check_one_task(tasks: Sequence[str | None]) -> None:
    """ValueError where these, the distinct tasks of some rows, are several."""
    if len(tasks) > 1:
        raise ValueError(f"configs of different tasks cannot be compared, got {', '.join(map(str, tasks))}")


def _check_one_config_each(rows: pa.Table, starts: Ints, counts: Ints) -> None:
    owner = pa.array(np.repeat(starts, counts))
    for name in config_columns(rows):
        column = _one_chunk(rows, name)
        # Codes compare null with null and NaN with NaN, which values do not.
        codes = pc.dictionary_encode(column, null_encoding="encode").indices
        differs = np.flatnonzero(pc.not_equal(codes, codes.take(owner)).to_numpy(zero_copy_only=False))
        if len(differs):
            config_id = rows.column("config_id")[int(differs[0])].as_py()
            raise ValueError(f"config {config_id} must have one value of {name} in all its rows, got several")


def _one_chunk(rows: pa.Table, name: str) -> pa.Array:
    column = rows.column(name).combine_chunks()
    return column.chunk(0) if isinstance(column, pa.ChunkedArray) else column
