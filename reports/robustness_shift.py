"""What the shifts of a robustness run are called and measured in, and the arithmetic of their curves.

Which data are shifted how is decided by the tasks; what a model answers on them, by whoever writes the rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from reports.fragments import read_fragment, write_table_atomically
from reports.schema import Column, nearest_name, stamped_schema

SHIFT_FILE = "shift.parquet"
SHIFT_KIND = "robustness_shift"
Floats = npt.NDArray[np.float64]

SHIFT_COLUMNS: tuple[Column, ...] = (
    Column("config_id", "string", "the config", required=True),
    Column("trial_id", "string", "config_id and seed", required=True),
    Column("seed", "int64", "its seed", required=True),
    Column("model_digest", "string", "digest of the model's weights", required=True),
    Column("shift", "string", "near_pole, longer_range, noise, a task's own, or none", required=True),
    Column("made_by", "string", "task: drawn anew by the task; data: made of its test split", required=True),
    Column("step", "int64", "place of the level in its shift, 0 for data not shifted", required=True),
    Column("level", "float64", "how far the data are shifted; null at step 0", "shift's own"),
    Column("rows", "int64", "rows asked about", "rows", required=True),
    Column("labelled_bottom", "int64", "those whose right answer is bottom", "rows", required=True),
    Column("tau_infer", "float64", "the threshold of the answers", "|Q|", required=True),
    Column("error_unit", "string", "the task's unit of errors", required=True),
    Column("coverage", "float64", "share of samples whose decoded output is finite at tau_infer", "share"),
    Column("accepted_error", "float64", "mean error of the accepted answers", "task's unit"),
    Column("charged_error", "float64", "mean error, an abstention paying the baseline's", "task's unit"),
    Column("false_accept_rate", "float64", "accepted, among those labelled bottom", "share"),
    Column("false_reject_rate", "float64", "rejected, among those labelled finite", "share"),
    Column("curve_coverage", "floats", "coverages at thresholds on |Q|, growing", "share"),
    Column("curve_error", "floats", "accepted_error at each of them", "task's unit"),
    Column("curve_area", "float64", "mean of that error over the coverages of the curve", "task's unit"),
    Column(
        "bottom_auc", "float64", "chance that a labelled bottom has the smaller |Q|; null without", "share"
    ),
    Column("pole_correlation", "float64", "rank correlation of |Q| and distance to the pole; null without"),
    Column("near_within", "float64", "distance up to which a row counts as near a pole; null without"),
    Column("near_rows", "int64", "rows that near; null without", "rows"),
    Column("bottoms_near", "float64", "bottoms, among rows near a pole", "share"),
    Column("bottoms_far", "float64", "bottoms, among all other rows", "share"),
    Column("error", "string", "what the task raised instead of an answer, else empty"),
)


def shift_schema() -> pa.Schema:
    """The schema of shift.parquet; NaN is a figure that is not finite, null one that does not apply."""
    return stamped_schema(SHIFT_COLUMNS, SHIFT_KIND)


def write_shift(folder: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write `shift.parquet` in a robustness folder, whole or not at all; ValueError for an unknown column."""
    schema, held = shift_schema(), [dict(row) for row in rows]
    for row in held:
        for name in row:
            if name not in schema.names:
                raise ValueError(f"unknown column {name} of a shift{nearest_name(name, schema.names)}")
    path = Path(folder) / SHIFT_FILE
    write_table_atomically(pa.Table.from_pylist(held, schema=schema), path)
    return path


def read_shift(folder: Path) -> pa.Table:
    """Read `shift.parquet` of a robustness folder; `RunReadError` where it is no such file."""
    return read_fragment(Path(folder) / SHIFT_FILE, kind=SHIFT_KIND)


def lower_auc(values: npt.ArrayLike, marked: npt.ArrayLike) -> float:
    """The chance that a marked row has the smaller value of two, ties counting half; NaN without both kinds.

    >>> lower_auc([0.1, 0.2, 0.9], [True, False, False])
    1.0
    """
    mask = np.asarray(marked, dtype=bool)
    inside, outside = int(mask.sum()), int((~mask).sum())
    if not inside or not outside:
        return float("nan")
    places = _ranks(-np.asarray(values, dtype=np.float64))
    return float((places[mask].sum() - inside * (inside + 1) / 2) / (inside * outside))


def rank_correlation(x: npt.ArrayLike, y: npt.ArrayLike) -> float:
    """Spearman's rank correlation; NaN where either side does not vary.

    >>> rank_correlation([1.0, 2.0, 3.0], [10.0, 20.0, 25.0])
    1.0
    """
    first, second = (_ranks(np.asarray(values, dtype=np.float64)) for values in (x, y))
    first, second = first - first.mean(), second - second.mean()
    size = float(np.sqrt((first**2).sum() * (second**2).sum()))
    return float(np.clip((first * second).sum() / size, -1.0, 1.0)) if size > 0 else float("nan")


def share_of(part: npt.ArrayLike, whole: npt.ArrayLike) -> float:
    """The share of the rows of `whole` that are in `part`; NaN without such rows."""
    among = np.asarray(whole, dtype=bool)
    return float(np.asarray(part, dtype=bool)[among].mean()) if among.any() else float("nan")


def _ranks(values: Floats) -> Floats:
    """Ranks from 1, equal values sharing their mean rank."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray((last - (counts - 1) / 2)[place.reshape(-1)], dtype=np.float64)
