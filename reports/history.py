"""The history of a run: what each trial said after each epoch, for curves and for judging early stops."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from reports.fragments import FragmentWriter, RunReadError, read_fragments
from reports.schema import HISTORY_COLUMNS

HISTORY_FOLDER = "history"
_IDENTITY = frozenset(column.name for column in HISTORY_COLUMNS)


class HistoryWriter(FragmentWriter):
    """Writes a run's history into `folder` (RUN/history), flushed at most once a second.

    A row has trial_id, config_id, seed and epoch; every other column is a float64 metric and may come with
    any row. A trial that starts again may repeat its epochs: the later row counts when they are read.
    """

    def __init__(self, folder: Path, writer_id: str, schema: pa.Schema) -> None:
        super().__init__(
            folder,
            writer_id,
            schema,
            key=(),
            fill_nan=lambda column: column not in _IDENTITY,
            open_type=lambda column: pa.float64(),
            flush_every_append=False,
        )


def read_history(run: Path) -> pa.Table:
    """The run's history, one row per trial and epoch, ordered by trial_id and epoch.

    Raises RunReadError, naming the folder or file, where there is none or a file is not a whole fragment.
    """
    folder = Path(run) / HISTORY_FOLDER
    if not folder.is_dir():
        raise RunReadError(f"{run} holds no {HISTORY_FOLDER}/")
    table = read_fragments(folder, kind="history")
    trial = pc.rank(table.column("trial_id").combine_chunks(), tiebreaker="dense").to_numpy()
    epoch = table.column("epoch").to_numpy()
    order = np.lexsort((np.arange(len(table)), epoch, trial))
    last = np.ones(len(order), dtype=bool)
    last[:-1] = (np.diff(trial[order].astype(np.int64)) != 0) | (np.diff(epoch[order]) != 0)
    return table.take(pa.array(order[last]))
