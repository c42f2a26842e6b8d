"""What an ended trial leaves on the disk: its row with everything that was said, and its history."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from harness.jobs import EndedTrial, TrialSpec
from harness.plan import load_plan
from harness.sink import RunSink
from reports.history import read_history
from reports.rows import read_rows


@pytest.mark.parametrize("said", [{}, {"telemetry.finite_rollbacks": 2.0}], ids=["off", "on"])
def test_telemetry_reaches_row_and_history(
    write_plan: Callable[..., Path], tmp_path: Path, said: dict[str, float]
) -> None:
    """Where something says it, there is a column; nothing else that an outcome holds becomes one."""
    run = tmp_path / "run"
    sink = RunSink(run, load_plan(write_plan()), run_id="r", provenance={}, data_digests={0: "d"})
    trial = TrialSpec(trial_id="c-s0", config_id="c", seed=0, cohort=0, config={"max_epochs": 1})
    outcome = {"status": "diverged", "nan_origin": "micro-batch 3: inputs", "metric.hits": 1.0, "other": 1.0}
    history = {1: {"loss": 0.5, **said}}
    sink.write(EndedTrial(trial, {**outcome, **said}, history))
    sink.close()
    (row,) = read_rows(run).to_pylist()
    (epoch,) = read_history(run).to_pylist()
    assert row["nan_origin"] == "micro-batch 3: inputs"
    assert row["metric.hits"] == 1.0
    assert "other" not in row
    for held in (row, epoch):
        assert {name: held[name] for name in held if name.startswith("telemetry.")} == said
