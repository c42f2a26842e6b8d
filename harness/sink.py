"""Where ended trials go: one row each, and their history, written by the driver alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from harness.jobs import EndedTrial
from harness.plan import Plan, plan_digest
from harness.proposals import active_or_all
from harness.run_folder import unwritable
from reports.history import HISTORY_FOLDER, HistoryWriter
from reports.provenance import row_provenance
from reports.rows import ROWS_FOLDER, RowWriter
from reports.schema import BASE_COLUMNS, CONFIG_PREFIX, OPEN_PREFIXES, history_schema, row_schema
from trainables.configs import KNOB_TYPES

WRITER = "driver"
NODE_COLUMN = "node_id"
_OUTCOME_COLUMNS = {column.name for column in BASE_COLUMNS}


class RunSink:
    """Writes rows and history of a run; a row is on the disk before the next trial is looked at."""

    def __init__(
        self,
        out: Path,
        plan: Plan,
        *,
        run_id: str,
        provenance: Mapping[str, Any],
        data_digests: Mapping[int, str],
    ) -> None:
        self._out = out
        self._plan = plan
        self._run_id = run_id
        self._provenance = row_provenance(provenance)
        self._plan_digest = plan_digest(plan)
        self._data_digests = data_digests
        schema = row_schema(KNOB_TYPES).append(pa.field(NODE_COLUMN, pa.string()))
        self._rows = RowWriter(out / ROWS_FOLDER, WRITER, schema)
        self._history = HistoryWriter(out / HISTORY_FOLDER, WRITER, history_schema())

    def write(self, ended: EndedTrial) -> None:
        """Write one trial: its history first, so that a row never stands without the history it came from."""
        trial = ended.trial
        for epoch, said in sorted(ended.history.items()):
            identity = {"trial_id": trial.trial_id, "config_id": trial.config_id, "seed": trial.seed}
            self._history.append({**said, **identity, "epoch": epoch})
        self._history.flush()
        self._rows.append(self.row(ended))

    def row(self, ended: EndedTrial) -> dict[str, Any]:
        """The row of an ended trial: who it is, how it ended, with which knobs, from where."""
        trial = ended.trial
        outcome = {
            name: value
            for name, value in ended.outcome.items()
            if name in _OUTCOME_COLUMNS or name.startswith(OPEN_PREFIXES)
        }
        knobs = {
            f"{CONFIG_PREFIX}{name}": value
            for name, value in active_or_all(trial.config).items()
            if name in KNOB_TYPES
        }
        return {
            **outcome,
            **knobs,
            **self._provenance,
            "data_digest": self._data_digests.get(trial.seed),
            "device": "cuda" if self._plan.resources.gpus_per_trial else "cpu",
            **ended.place,
            "run_id": self._run_id,
            "task": self._plan.task.name,
            "config_id": trial.config_id,
            "trial_id": trial.trial_id,
            "seed": trial.seed,
            "cohort": trial.cohort,
            "searcher": self._plan.search.algorithm,
            "plan_digest": self._plan_digest,
        }

    def close(self) -> None:
        """Write what waits; a `UserError` where that is not possible."""
        try:
            self._history.close()
            self._rows.close()
        except OSError as error:
            raise unwritable(self._out, error) from None
