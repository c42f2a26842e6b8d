"""The rows of a run: what a trial says when it ends, written once and read as one table."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from reports.fragments import FragmentWriter, RunReadError, read_fragments
from reports.schema import MEASURED_FLOATS, METRIC_PREFIXES, OPEN_PREFIXES, TRIAL_STATUSES, nearest_name

ROWS_FOLDER = "rows"


class RowWriter(FragmentWriter):
    """Writes a run's rows into `folder` (RUN/rows); a trial_id is written once in the life of the folder.

    Columns are those of the schema (`reports.schema.row_schema`); `metric.<name>`, `test_metric.<name>`
    and `telemetry.<name>` may come with any row, as only the task and what its config turns on know them. A
    measured float that a row lacks is stored as NaN, anything else that it lacks (telemetry of what was
    turned off) as null; run_id, task, config_id, trial_id, seed and status must be there.
    One writer_id belongs to one writer at a time; a later writer of that name goes on after its fragments.
    """

    def __init__(self, folder: Path, writer_id: str, schema: pa.Schema) -> None:
        super().__init__(
            folder, writer_id, schema, key=("trial_id",), fill_nan=_is_measured, open_type=_metric_type
        )

    def _take(self, row: Mapping[str, Any]) -> None:
        """Takes one row, as `append` and `append_all` do; ValueError also for a status that is none."""
        status = row.get("status")
        if status is not None and status not in TRIAL_STATUSES:
            near = nearest_name(str(status), TRIAL_STATUSES)
            raise ValueError(f"status must be one of {', '.join(TRIAL_STATUSES)}, got {status=}{near}")
        super()._take(row)


def read_rows(run: Path) -> pa.Table:
    """Every row of the run folder, in one table with the columns of all fragments.

    Raises RunReadError, naming the folder or file, where there is no run, no row, a file that is not a whole
    fragment of rows, or a trial_id that occurs twice.
    """
    table = read_fragments(find_rows(run), kind="rows")
    check_trial_ids(table.column("trial_id"), run)
    return table


def find_rows(run: Path) -> Path:
    """The folder of the run's rows; RunReadError naming what is not there."""
    run = Path(run)
    if not run.is_dir():
        raise RunReadError(f"{run} is not a folder" if run.exists() else f"{run} does not exist")
    if not (run / ROWS_FOLDER).is_dir():
        raise RunReadError(f"{run} is not a run folder: it holds no {ROWS_FOLDER}/")
    return run / ROWS_FOLDER


def check_trial_ids(ids: pa.ChunkedArray, run: Path) -> None:
    """RunReadError naming the run where one of these occurs twice."""
    if pc.count_distinct(ids).as_py() != len(ids):
        counts = pc.value_counts(ids)
        twice = pc.filter(counts.field("values"), pc.greater(counts.field("counts"), 1))
        raise RunReadError(f"{run} holds {len(twice)} trial_id more than once, such as {twice[0].as_py()}")


def _is_measured(column: str) -> bool:
    return column in MEASURED_FLOATS or column.startswith(METRIC_PREFIXES)


def _metric_type(column: str) -> pa.DataType | None:
    return pa.float64() if column.startswith(OPEN_PREFIXES) else None
