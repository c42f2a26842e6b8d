"""A run that was interrupted and continued is the run that was not."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.cli.main import main
from harness.errors import EXIT_INTERRUPTED, EXIT_OK, EXIT_RUN_FOLDER
from harness.jobs import EndedTrial
from harness.run_folder import locked
from harness.sink import RunSink
from reports.history import read_history
from reports.rows import read_rows


def stop_after(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """Have the process receive Ctrl-C when this many rows have been written."""
    write = RunSink.write
    written: list[str] = []

    def write_and_interrupt(self: RunSink, ended: EndedTrial) -> None:
        write(self, ended)
        written.append(ended.trial.trial_id)
        if len(written) == rows:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(RunSink, "write", write_and_interrupt)


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("rows", [2, 5])
def test_interrupted_and_resumed_equals_uninterrupted(
    rows: int,
    write_plan: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    comparable: Callable[..., Any],
) -> None:
    """Learning search, halving, two seeds: what was written stays, the rest is added, no trial runs twice."""
    plan = str(
        write_plan(
            search={"algorithm": "tpe", "configs": 6, "batch": 3, "startup": 3},
            halving={"rungs": [1, 2], "eta": 2},
        )
    )
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(["sweep", plan, "--out", str(whole)]) == EXIT_OK
    with monkeypatch.context() as patch:
        stop_after(patch, rows)
        assert main(["sweep", plan, "--out", str(parts)]) == EXIT_INTERRUPTED
    assert f"scm-harness sweep {plan} --out {parts} --resume" in capsys.readouterr().err
    kept = read_rows(parts)
    assert rows <= len(kept) < 12
    assert main(["sweep", plan, "--out", str(parts), "--resume"]) == EXIT_OK
    assert comparable(parts, read_rows) == comparable(whole, read_rows)
    assert comparable(parts, read_history) == comparable(whole, read_history)
    assert set(kept.column("started_at").to_pylist()) <= set(
        read_rows(parts).column("started_at").to_pylist()
    )
    assert len(set(read_rows(parts).column("run_id").to_pylist())) == 1


@pytest.mark.usefixtures("local_ray")
def test_resuming_a_finished_run_runs_nothing_and_refuses_another(
    write_plan: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    comparable: Callable[..., Any],
) -> None:
    """A complete run is ranked again; another plan, other data or a run in use is exit code 4."""
    small = {"search": {"configs": 1}, "seeds": [0], "config": {"max_epochs": 1}}
    plan, out = str(write_plan(**small)), tmp_path / "out"
    assert main(["sweep", plan, "--out", str(out)]) == EXIT_OK
    before = comparable(out, read_rows)
    fragments = sorted((out / "rows").iterdir())
    assert main(["sweep", plan, "--out", str(out), "--resume"]) == EXIT_OK
    assert comparable(out, read_rows) == before
    assert sorted((out / "rows").iterdir()) == fragments
    capsys.readouterr()

    other = str(write_plan("other.yaml", **small | {"seeds": [1]}))
    assert main(["sweep", other, "--out", str(out), "--resume"]) == EXIT_RUN_FOLDER
    assert "differs in seeds" in one_error(capsys)

    with locked(out):
        assert main(["sweep", plan, "--out", str(out), "--resume"]) == EXIT_RUN_FOLDER
    assert "another sweep" in one_error(capsys)

    data = tmp_path / "data.csv"
    data.write_text(data.read_text(encoding="utf-8").replace("0.5000", "0.5001"), encoding="utf-8")
    assert main(["sweep", plan, "--out", str(out), "--resume"]) == EXIT_RUN_FOLDER
    assert "the data have changed" in one_error(capsys)
    assert comparable(out, read_rows) == before


def one_error(capsys: pytest.CaptureFixture[str]) -> str:
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line
