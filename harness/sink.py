"""Where ended trials go: one row each, and their history, written by the driver alone."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from harness.jobs import EndedTrial
from harness.plan import Plan, plan_digest
from harness.proposals import full_config
from harness.run_folder import unwritable
from reports.history import HISTORY_FOLDER, HistoryWriter
from reports.provenance import row_provenance
from reports.rows import ROWS_FOLDER, RowWriter
from reports.schema import BASE_COLUMNS, CONFIG_PREFIX, OPEN_PREFIXES, history_schema, row_schema
from search_spaces.identity import config_id, scenario_name
from trainables.configs import KNOB_TYPES

WRITER = "driver"
NODE_COLUMN = "node_id"
LATEST_S = 1.0
_OUTCOME_COLUMNS = {column.name for column in BASE_COLUMNS}


class RunSink:
    """Writes rows and history of a run.

    Trials that end together are written together, and what was taken is on the disk within `LATEST_S` of the
    next call of `flush_if_due`; earlier, unless the writing would take more than a tenth of the time.
    """

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
        self._scenario = scenario_name(plan.task.name, plan.task.params)
        self._data_digests = data_digests
        schema = row_schema(KNOB_TYPES).append(pa.field(NODE_COLUMN, pa.string()))
        self._rows = RowWriter(out / ROWS_FOLDER, WRITER, schema)
        self._history = HistoryWriter(out / HISTORY_FOLDER, WRITER, history_schema())
        self._taken: list[EndedTrial] = []
        self._written_s = -LATEST_S
        self._cost_s = 0.0

    def write(self, ended: EndedTrial) -> None:
        """Take in a trial; it is written with those that end about now."""
        self._taken.append(ended)

    def flush_if_due(self) -> None:
        """Write what was taken, now or soon."""
        if self._taken and time.monotonic() - self._written_s >= min(10 * self._cost_s, LATEST_S):
            self.flush()

    def flush(self) -> None:
        """Write what was taken: the history first, so that no row stands without that which it came from."""
        if not self._taken:
            return
        started_s = time.monotonic()
        self._history.append_all(
            {
                **said,
                "trial_id": ended.trial.trial_id,
                "config_id": ended.trial.config_id,
                "seed": ended.trial.seed,
                "epoch": epoch,
            }
            for ended in self._taken
            for epoch, said in sorted(ended.history.items())
        )
        # Out of the list as they are written: a row that fails is not tried again when the run is closed.
        taken, self._taken = self._taken, []
        self._rows.append_all(map(self.row, taken))
        self._written_s = time.monotonic()
        self._cost_s = self._written_s - started_s

    def row(self, ended: EndedTrial) -> dict[str, Any]:
        """The row of an ended trial: who it is, how it ended, with which knobs, from where."""
        trial = ended.trial
        outcome = {
            name: value
            for name, value in ended.outcome.items()
            if name in _OUTCOME_COLUMNS or name.startswith(OPEN_PREFIXES)
        }
        active = full_config(trial.config)[1] if trial.active is None else trial.active
        knobs = {f"{CONFIG_PREFIX}{name}": value for name, value in active.items() if name in KNOB_TYPES}
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
            "scenario": self._scenario,
            "settings_id": config_id(active),
            "plan_digest": self._plan_digest,
        }

    def close(self) -> None:
        """Write what waits; a `UserError` where that is not possible."""
        try:
            self.flush()
            self._history.close()
            self._rows.close()
        except OSError as error:
            raise unwritable(self._out, error) from None
