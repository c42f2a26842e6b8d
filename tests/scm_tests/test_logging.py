"""Metric logs: records, files that survive a killed writer, and tables."""

from __future__ import annotations

import enum
import json
import math
import multiprocessing
import pickle
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scm.utils import logging as logs
from scm.utils.logging import (
    JsonlLogger,
    TensorBoardLogger,
    TruncatedLogWarning,
    aggregate_metric_log_records,
    aggregate_metric_logs,
    jsonl_to_dataframe,
    metric_log_record,
    metric_log_records_to_long_rows,
    metric_log_records_to_wide_rows,
    plain_values,
    read_jsonl,
    read_metric_log_runs,
)

JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**60), 2**60), st.floats(allow_nan=False), st.text()),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(), inner, max_size=3)),
    max_leaves=8,
)


@dataclass
class Point:
    x: float
    y: torch.Tensor


class Colour(enum.Enum):
    RED = "red"


# --- records --------------------------------------------------------------------------------------


def test_records_are_the_recorded_ones(vector_group, decode_numbers):
    """Schema fields, mirrored metrics and nulls are those recorded; an empty phase is refused."""
    for case in vector_group("metric_log_record"):
        given_fields = {key: case[key] for key in ("phase", "step", "epoch", "context") if key in case}
        metrics = decode_numbers(case["metrics"])
        if "raises" in case["expected"]:
            with pytest.raises(ValueError, match="phase must be a string that is not empty"):
                metric_log_record(metrics, **given_fields)
        else:
            assert metric_log_record(metrics, **given_fields) == case["expected"]


def test_records_need_not_hold_each_metric_twice():
    """Without the mirror a metric stands under `metrics` only."""
    record = metric_log_record({"loss": 1.0}, phase="train", mirror=False)
    assert "loss" not in record
    assert record["metrics"] == {"loss": 1.0}
    with pytest.raises(ValueError, match="record_type must be a string"):
        metric_log_record({}, phase="train", record_type=" ")


def test_values_become_what_json_can_say():
    """Tensors, arrays, dataclasses, paths, enums and sets have a plain form; non-finite numbers are None."""
    plain = plain_values(
        {
            "tensor": torch.tensor([1.0, math.nan]),
            "scalar": torch.tensor(3),
            "array": np.array([[1, 2]]),
            "float32": np.float32(0.5),
            "bool": np.bool_(True),
            "point": Point(math.inf, torch.tensor(1.0)),
            "path": Path("a/b"),
            "colour": Colour.RED,
            "set": {2, 1},
            5: "key",
        }
    )
    assert plain == {
        "tensor": [1.0, None],
        "scalar": 3,
        "array": [[1, 2]],
        "float32": 0.5,
        "bool": True,
        "point": {"x": None, "y": 1.0},
        "path": "a/b",
        "colour": "red",
        "set": [1, 2],
        "5": "key",
    }
    with pytest.raises(TypeError, match="got complex"):
        plain_values({"z": 1j})


# --- the file -------------------------------------------------------------------------------------


@given(st.lists(st.dictionaries(st.text(), JSON, max_size=4), max_size=4))
def test_what_is_logged_is_what_is_read(tmp_path_factory, records):
    """Any record comes back equal (non-finite numbers as None), in order, each on a line of its own."""
    path = tmp_path_factory.mktemp("log") / "deep" / "metrics.jsonl"
    with JsonlLogger(path) as log:
        for record in records:
            log(record)
    if not records:
        assert not path.exists()
        return
    assert read_jsonl(path) == [plain_values(record) for record in records]
    for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
        assert line == json.dumps(json.loads(line), sort_keys=True)


def test_records_are_on_disk_when_the_call_returns(tmp_path):
    """A reader sees each record at once, and a second logger appends."""
    log = JsonlLogger(tmp_path / "a.jsonl", fsync=True)
    log({"a": 1})
    assert read_jsonl(log.path) == [{"a": 1}]
    with JsonlLogger(log.path) as other:
        other({"a": 2})
    log({"a": 3})
    log.close()
    log({"a": 4})
    log.close()
    assert [record["a"] for record in read_jsonl(log.path)] == [1, 2, 3, 4]


def test_run_id_and_time_are_added_where_asked(tmp_path):
    """The context keeps what it had; the clock is the caller's."""
    with JsonlLogger(tmp_path / "a.jsonl", run_id="r7", timestamps=True, clock=lambda: 12.5) as log:
        log(metric_log_record({"loss": 1.0}, phase="train", context={"seed": 3}))
        log({"loss": 2.0})
    first, second = read_jsonl(log.path)
    assert first["context"] == {"seed": 3, "run_id": "r7"}
    assert second == {"loss": 2.0, "context": {"run_id": "r7"}, "time": 12.5}


def test_a_record_that_json_has_no_form_for_leaves_the_file_as_it_was(tmp_path):
    """Nothing is written when a value is refused."""
    with JsonlLogger(tmp_path / "a.jsonl") as log:
        log({"a": 1})
        with pytest.raises(TypeError):
            log({"a": object()})
        log({"a": 2})
    assert [record["a"] for record in read_jsonl(log.path)] == [1, 2]


def _log_from_child(log):
    log({"from": "child"})
    log.close()


def test_loggers_travel_between_processes(tmp_path):
    """A pickled logger with an open file appends to the same file, also from another process."""
    log = JsonlLogger(tmp_path / "a.jsonl", run_id="r")
    log({"from": "parent"})
    again = pickle.loads(pickle.dumps(log))
    again({"from": "copy"})
    again.close()
    child = multiprocessing.get_context("fork").Process(target=_log_from_child, args=(log,))
    child.start()
    child.join()
    log.close()
    assert [record["from"] for record in read_jsonl(log.path)] == ["parent", "copy", "child"]


@pytest.mark.parametrize(
    "tail, kept", [(b'{"a": 2', 1), (b'{"a": "\xc3', 1), (b'{"a": 2}', 2)], ids=["half", "half char", "whole"]
)
def test_an_unfinished_last_record_is_left_out_and_cut_off(tmp_path, tail, kept):
    """A killed writer's half line is passed over by readers and cannot spoil the next record."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n' + tail)
    log = JsonlLogger(path)
    if kept == 1:
        with pytest.warns(TruncatedLogWarning, match=r"a\.jsonl:2: the last record is unfinished"):
            assert read_jsonl(path) == [{"a": 1}]
        with pytest.warns(TruncatedLogWarning, match="cut off"):
            log({"a": 9})
    else:
        assert len(read_jsonl(path)) == 2
        log({"a": 9})
    log.close()
    assert [record["a"] for record in read_jsonl(path)] == [1, 2, 9][:kept] + [9] * (kept == 1) + [9] * (
        kept == 2
    )


@pytest.mark.parametrize(
    "line, message",
    [
        (b'{"a": 1', r"a\.jsonl:3: not a JSON record"),
        (b'{"a": NaN}', r"a\.jsonl:3: not a JSON record: the literal NaN"),
        (b"[1]", r"a\.jsonl:3: a record must be an object, got list"),
        (b'{"a": "\xff"}', r"a\.jsonl:3: not a JSON record"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, message):
    """A line that is no record is an error with file and line number, blank lines counted."""
    path = tmp_path / "a.jsonl"
    for rest in (b'{"a": 2}\n', b""):
        path.write_bytes(b'{"a": 1}\n\n' + line + b"\n" + rest)
        with pytest.raises(ValueError, match=message):
            read_jsonl(path)


# --- runs and tables ------------------------------------------------------------------------------


@pytest.fixture
def two_runs(tmp_path):
    """Two logs of equal name, under seed_3 and quick_s4."""
    paths = []
    for folder, losses in (("seed_3", [1.0, 2.0, 6.0]), ("quick_s4", [5.0])):
        path = tmp_path / folder / "metrics.jsonl"
        with JsonlLogger(path) as log:
            for step, loss in enumerate(losses):
                metrics = {
                    "loss": loss,
                    "bad": math.nan,
                    "flag": True,
                    "grad": {"norm": loss * 2},
                    "v": [1, 2],
                }
                log(metric_log_record(metrics, phase="train", step=step, epoch=0, context={"who": "me"}))
            log(metric_log_record({"loss": 9.0}, phase="eval", epoch=0))
        paths.append(path)
    return paths


def test_runs_are_told_apart_by_as_much_of_their_path_as_it_takes(two_runs):
    """Labels, sources and seeds join the context, and what a record says itself is kept."""
    records = read_metric_log_runs(two_runs)
    assert [r["context"]["run_id"] for r in records] == ["seed_3/metrics"] * 4 + ["quick_s4/metrics"] * 2
    assert {r["context"]["seed"] for r in records} == {3, 4}
    assert records[0]["context"]["who"] == "me"
    assert records[0]["context"]["source_path"] == str(two_runs[0])
    (first, *_) = read_metric_log_runs(two_runs[0], source_key=None, infer_seed=False)
    assert first["context"] == {"who": "me", "run_id": "metrics"}
    named = read_metric_log_runs({"mine": two_runs[1]}, label_key="label")
    assert named[0]["context"]["label"] == "mine"
    with pytest.raises(ValueError, match="each log must be named once"):
        read_metric_log_runs([two_runs[0], two_runs[0]])


def test_summaries_are_those_of_the_numbers_in_each_group(two_runs):
    """Counts, means, deviations and ends by group; nulls, flags and lists are no numbers."""
    records = read_metric_log_runs(two_runs)
    summaries = {(s["phase"], s["metric"]): s for s in aggregate_metric_log_records(records)}
    assert set(summaries) == {("train", "loss"), ("train", "grad.norm"), ("eval", "loss")}
    train = summaries["train", "loss"]
    values = [1.0, 2.0, 6.0, 5.0]
    assert train["count"] == 4
    assert train["mean"] == pytest.approx(statistics.mean(values))
    assert train["std"] == pytest.approx(statistics.stdev(values))
    assert (train["min"], train["max"], train["first"], train["latest"]) == (1.0, 6.0, 1.0, 5.0)
    by_seed = aggregate_metric_logs(two_runs, group_by=("seed", "phase"))
    assert [(s["seed"], s["std"]) for s in by_seed if s["metric"] == "loss" and s["count"] == 1] == [
        (3, None),
        (4, None),
        (4, None),
    ]


def test_summaries_of_huge_numbers_do_not_overflow_and_list_keys_group():
    """Means and deviations hold where sums and squares would not; a list groups by its text."""
    records = [{"metrics": {"x": x, "y": 1.5e308}, "tags": ["a"]} for x in (1e300, -1e300, 3.0)]
    x, y = aggregate_metric_log_records(records, group_by=("tags",))
    assert x["mean"] == 1.0
    assert x["std"] == pytest.approx(1e300)
    assert y["mean"] == pytest.approx(1.5e308)
    assert x["tags"] == "['a']"


def test_wide_and_long_rows_hold_the_same_values(two_runs):
    """Wide rows have a column per metric, long rows a row per metric; nested names join with a dot."""
    records = read_metric_log_runs(two_runs)
    wide, long = metric_log_records_to_wide_rows(records), metric_log_records_to_long_rows(records)
    assert len(wide) == len(records)
    assert wide[0]["metric_grad.norm"] == 2.0
    assert wide[0]["context_seed"] == 3
    assert wide[0]["step"] == 0
    from_wide = [
        (k.removeprefix("metric_"), v) for row in wide for k, v in row.items() if k.startswith("metric_")
    ]
    assert from_wide == [(row["metric"], row["value"]) for row in long]
    assert all("context_run_id" in row and "phase" in row for row in long)


def test_lines_of_other_schemas_have_tables_too():
    """A line without `metrics` is its own metrics."""
    assert metric_log_records_to_wide_rows([{"step": 1, "loss": 2.0}]) == [{"step": 1, "metric_loss": 2.0}]


def test_dataframes_have_a_row_per_record(two_runs):
    """Columns are the top-level fields."""
    frame = jsonl_to_dataframe(two_runs[0])
    assert frame["loss"].tolist() == [1.0, 2.0, 6.0, 9.0]


def test_absent_packages_are_named(two_runs, tmp_path, monkeypatch):
    """Without pandas or TensorBoard the error says what to install."""
    for name in ("pandas", "tensorboardX", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match="pip install pandas"):
        jsonl_to_dataframe(two_runs[0])
    with pytest.raises(ImportError, match="pip install tensorboardX"):
        TensorBoardLogger(tmp_path)


class RecordingWriter:
    def __init__(self, folder):
        self.folder, self.scalars, self.closed = folder, [], False

    def add_scalar(self, name, value, step):
        self.scalars.append((name, value, step))

    def flush(self):
        pass

    def close(self):
        self.closed = True


def test_tensorboard_gets_finite_numbers_by_phase_and_step(monkeypatch, tmp_path):
    """Names carry the phase; the step is the record's, else its epoch, else a count of calls."""
    monkeypatch.setattr(logs, "_summary_writer", lambda: RecordingWriter)
    with TensorBoardLogger(tmp_path) as log:
        log(metric_log_record({"loss": 1.0, "bad": math.nan, "flag": True}, phase="train", step=7, epoch=1))
        log(metric_log_record({"loss": 2.0}, phase="eval", epoch=3))
        log({"loss": 3.0})
    writer = log._writer
    assert writer.scalars == [("train/loss", 1.0, 7), ("eval/loss", 2.0, 3), ("loss", 3.0, 2)]
    assert writer.closed
    log = TensorBoardLogger(tmp_path, step_key="epoch")
    log(metric_log_record({"loss": 1.0, "epoch": 5.0}, phase="eval"))
    assert log._writer.scalars == [("eval/loss", 1.0, 5)]
    with pytest.raises(ValueError, match="must hold step_key='epoch'"):
        log({"loss": 1.0})


def test_tensorboard_files_are_written(tmp_path):
    """With the real writer an event file appears."""
    pytest.importorskip("tensorboardX")
    with TensorBoardLogger(tmp_path) as log:
        log({"loss": 1.0, "step": 0})
    assert any(path.name.startswith("events.") for path in tmp_path.iterdir())
