"""The robustness of configs as a ranking takes it: read from what `scm-harness robustness` left in a run.

How a score is made of cells, and what the columns of the file mean, is decided in `robustness_cells`.
"""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from reports.fragments import RunReadError
from reports.metrics import ROBUSTNESS
from reports.schema import nearest_name

SCORES_FILE = Path("robustness") / "scores.parquet"
INTERVAL = ("low", "high")


def read_robustness(run: Path) -> pa.Table | None:
    """config_id, robustness, low and high (float64 each) of a run's scored configs; None without the file.

    Raises RunReadError naming the file where it cannot be read, lacks a column, or scores a config twice.
    """
    path = Path(run) / SCORES_FILE
    if not path.exists():
        return None
    try:
        with pq.ParquetFile(pa.BufferReader(path.read_bytes()), page_checksum_verification=True) as file:
            table = file.read(use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise RunReadError(f"{path} cannot be read as Parquet: {' '.join(str(error).split())}") from error
    wanted = pa.schema(
        [("config_id", pa.string()), *((name, pa.float64()) for name in (ROBUSTNESS, *INTERVAL))]
    )
    for name in wanted.names:
        if name not in table.column_names:
            raise RunReadError(f"{path} holds no column {name}{nearest_name(name, table.column_names)}")
    try:
        scores = table.select(wanted.names).cast(wanted)
    except pa.ArrowException as error:
        raise RunReadError(f"{path} does not hold scores: {' '.join(str(error).split())}") from error
    ids = scores.column("config_id").to_pylist()
    if len(set(ids)) != len(ids):
        raise RunReadError(f"{path} must score each config once, got one twice")
    return scores
