"""Per-epoch history: open to any metric, read back in order, once per trial and epoch."""

from __future__ import annotations

import math

import pytest

from reports.fragments import RunReadError
from reports.history import HistoryWriter, read_history
from reports.schema import history_schema


def epoch_row(trial_id: str, epoch: int, **metrics: float) -> dict[str, object]:
    return {"trial_id": trial_id, "config_id": trial_id[0], "seed": 0, "epoch": epoch, **metrics}


def test_history_is_read_by_trial_and_epoch(tmp_path):
    """Rows of trials that ran at the same time come back sorted, whatever metrics each had."""
    with HistoryWriter(tmp_path / "history", "driver", history_schema(["loss"])) as writer:
        writer.append(epoch_row("b-s0", 1, loss=2))
        writer.append(epoch_row("a-s0", 1, loss=4.0, lr=0.1))
        writer.append(epoch_row("b-s0", 2, loss=1.0))
        writer.append(epoch_row("a-s0", 2, loss=math.inf))
    table = read_history(tmp_path)
    assert table.column("trial_id").to_pylist() == ["a-s0", "a-s0", "b-s0", "b-s0"]
    assert table.column("epoch").to_pylist() == [1, 2, 1, 2]
    assert table.column("loss").to_pylist() == [4.0, math.inf, 2.0, 1.0]
    assert [str(value) for value in table.column("lr").to_pylist()] == ["0.1", "nan", "nan", "nan"]


def test_a_trial_that_started_again_counts_with_its_later_epochs(tmp_path):
    """A restarted trial repeats epochs; the later report of each is kept, also from a later writer."""
    with HistoryWriter(tmp_path / "history", "driver", history_schema()) as writer:
        writer.append(epoch_row("a-s0", 1, loss=9.0))
        writer.append(epoch_row("a-s0", 2, loss=8.0))
        writer.append(epoch_row("a-s0", 1, loss=3.0))
    with HistoryWriter(tmp_path / "history", "driver", history_schema()) as later:
        later.append(epoch_row("a-s0", 2, loss=2.0))
    assert read_history(tmp_path).column("loss").to_pylist() == [3.0, 2.0]


def test_a_metric_that_is_no_number_is_refused(tmp_path):
    """History holds numbers; a text in it is an error that names the column."""
    writer = HistoryWriter(tmp_path / "history", "driver", history_schema())
    with pytest.raises(ValueError, match="column note must be double, got 'x'"):
        writer.append({**epoch_row("a-s0", 1), "note": "x"})


def test_a_run_without_history_says_so(tmp_path):
    """A folder without history is named, and rows in place of history are refused."""
    with pytest.raises(RunReadError, match="holds no history/"):
        read_history(tmp_path)
    (tmp_path / "history").mkdir()
    with pytest.raises(RunReadError, match="holds no history"):
        read_history(tmp_path)
