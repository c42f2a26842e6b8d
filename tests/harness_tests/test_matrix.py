"""The fault matrix: whole, the same at every call, beside plain trainings; and guards that matter."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.robustness import matrix as matrix_module
from harness.robustness.faults import FAULTS, parse_faults
from harness.robustness.matrix import recovery, run_matrix
from reports.robustness_cells import NOT_APPLICABLE, cells_table, retained_quality, score_cells
from trainables.killed_worker import KilledWorker, WorkerError, WorkerJob
from trainables.trained import Trained, train_models
from trainables.trial import DeviceError

SMALL: dict[str, Any] = {
    "max_epochs": 6,
    "batch_size": 8,
    "hidden_width": 8,
    "hidden_depth": 1,
    "learning_rate": 0.01,
    "target_coverage": 0.5,
}
CONFIGS = {"a": SMALL, "b": {**SMALL, "clip_norm": 1.0}}
Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A censored table of 80 rows."""
    folder = tmp_path_factory.mktemp("data")
    lines = ["x,z,y,censored"]
    for i in range(80):
        x, z = i / 80, (i * 7 % 11) / 11
        lines.append(f"{x:.4f},{z:.4f},{0.5 + x - 0.3 * z:.4f},{'low' if i % 5 == 0 else 'no'}")
    (folder / "data.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    params = {
        "data": "data.csv",
        "inputs": ["x", "z"],
        "target": "y",
        "status": {"column": "censored", "values": {"low": "censored_below", "no": "finite"}},
    }
    return {"name": "table", "params": params, "base_dir": str(folder)}


@pytest.fixture(scope="module")
def cells(spec: dict[str, Any]) -> Rows:
    """Every fault at its highest severity, for two configs and two seeds."""
    return list(run_matrix(spec, CONFIGS, [0, 1], parse_faults("all:high")))


def without_times(rows: Rows) -> str:
    """Rows as text, so that NaN equals itself, without what a clock says."""
    return repr([{name: value for name, value in row.items() if name != "duration_s"} for row in rows])


def test_every_cell_is_there_and_none_failed(cells: Rows) -> None:
    """Faults, configs and seeds in order, each cell with all of its columns."""
    keys = [(row["fault"], row["config_id"], row["seed"]) for row in cells]
    assert keys == [(fault, config, seed) for fault in FAULTS for config in "ab" for seed in (0, 1)]
    assert {row["status"] for row in cells} <= {"completed", "diverged"}
    assert {row["error"] for row in cells} == {""}
    assert {row["pack_note"] for row in cells} == {""}
    table = cells_table(cells)
    assert table.column("retained").null_count == 0
    scores = score_cells(table).to_pylist()
    assert [(row["config_id"], row["n_cells"], row["n_missing"]) for row in scores] == [
        ("a", 30, 0),
        ("b", 30, 0),
    ]
    for row in cells:
        assert row["retained"] == retained_quality(row)


def test_clean_twins_are_plain_trainings(cells: Rows, spec: dict[str, Any]) -> None:
    """What a cell is compared with is bit for bit what a training without any fault measures."""
    trials = [(f"{config}-s{seed}", flat, seed) for config, flat in CONFIGS.items() for seed in (0, 1)]
    plain = train_models(spec, trials)
    for row in cells:
        held = plain[row["trial_id"]]
        assert isinstance(held, Trained)
        for name in ("coverage", "charged_error", "test_charged_error", "test_false_accept_rate"):
            assert repr(row[f"clean_{name}"]) == repr(held.outcome[name])


def test_each_fault_leaves_its_mark(cells: Rows) -> None:
    """Trainings end with other weights, but for a threshold's and a worker's; counts tell what was met."""
    by_fault = {name: [row for row in cells if row["fault"] == name] for name in FAULTS}
    for name, rows in by_fault.items():
        same = name in ("tau_mismatch", "killed_worker")
        assert {row["same_weights"] for row in rows} == {same}, name
        assert all(
            (row["recovered"] is None) == (FAULTS[name].span == "whole") for row in rows if not same
        ), name
    for name in (
        "nonfinite_inputs",
        "nonfinite_labels",
        "poisoned_batches",
        "extreme_logits",
        "half_overflow",
    ):
        assert all(row["nan_count"] > 0 for row in by_fault[name]), name
    for name in ("outlier_inputs", "label_flips", "duplicated_batches", "reordered_batches", "rate_spikes"):
        assert all(row["nan_count"] == 0 for row in by_fault[name]), name
    assert all(row["coverage"] < row["clean_coverage"] for row in by_fault["tau_mismatch"])


def test_a_killed_worker_is_gone_on_with_bit_for_bit(cells: Rows) -> None:
    """Killed in mid-epoch 4 and gone on with from its start, a trial ends as if nothing had been."""
    for row in (row for row in cells if row["fault"] == "killed_worker"):
        assert row["same_weights"] is True
        assert row["recovered"] is True
        assert row["epochs_to_recover"] == 4  # killed in epoch 4, with nothing of it saved
        assert row["charged_error"] == row["clean_charged_error"]


def test_the_matrix_is_the_same_at_every_call(spec: dict[str, Any]) -> None:
    """Two calls, and a call for fewer faults, give the same cells."""
    faults = parse_faults("poisoned_batches:low,gradient_spikes:high,rate_spikes:middle")
    told: list[str] = []
    one = list(run_matrix(spec, CONFIGS, [0], faults, on_cell=told.append))
    assert told == ["clean", "poisoned_batches:low", "gradient_spikes:high", "rate_spikes:middle"]
    assert without_times(list(run_matrix(spec, CONFIGS, [0], faults))) == without_times(one)


def test_trials_that_train_alone_have_cells_too(spec: dict[str, Any]) -> None:
    """A config that no pack takes is trained alone, which its cells say; a sampler draws as it learns."""
    alone = {**SMALL, "finite_action": "roll_back"}
    near = {**SMALL, "sampling": "near_pole"}
    faults = parse_faults("poisoned_batches:low,label_flips:low,rate_spikes:low,extreme_logits:high")
    rows = list(run_matrix(spec, {"alone": alone, "near": near}, [0], faults))
    by_key = {(row["config_id"], row["fault"]): row for row in rows}
    for fault in ("poisoned_batches", "label_flips", "rate_spikes", "extreme_logits"):
        assert by_key["alone", fault]["status"] == "completed", by_key["alone", fault]
        assert "roll_back" in by_key["alone", fault]["pack_note"]
    assert by_key["near", "label_flips"]["status"] == "completed"
    for fault in ("poisoned_batches", "extreme_logits"):
        row = by_key["near", fault]
        assert row["status"] == NOT_APPLICABLE
        assert "sampling='near_pole'" in row["reason"]
        assert math.isnan(row["retained"])


def test_what_fails_is_a_row_and_the_others_run(spec: dict[str, Any]) -> None:
    """A config that is none fails in its own cells, with its message; a task that raises in all of them."""
    faults = parse_faults("label_flips:low,tau_mismatch:low")
    rows = list(run_matrix(spec, {"bad": {**SMALL, "learning_rate": -1.0}, "good": SMALL}, [0], faults))
    assert {(row["config_id"], row["status"]) for row in rows} == {("bad", "failed"), ("good", "completed")}
    assert all("learning_rate must be > 0" in row["error"] for row in rows if row["config_id"] == "bad")
    broken = {**spec, "params": {**spec["params"], "data": "absent.csv"}}
    rows = list(run_matrix(broken, {"a": SMALL}, [0], faults))
    assert [row["status"] for row in rows] == ["failed", "failed"]
    assert all("absent.csv" in row["error"] and row["retained"] == 0.0 for row in rows)


def test_a_fault_that_raises_ends_no_other(spec: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A cell whose fault cannot be made has failed with what was raised."""

    def broken(*told: Any) -> Any:
        raise RuntimeError("the fault itself is broken")

    monkeypatch.setattr(matrix_module._Matrix, "_hits", broken)
    rows = list(run_matrix(spec, {"a": SMALL}, [0], parse_faults("poisoned_batches:low,label_flips:low")))
    assert {row["fault"]: row["status"] for row in rows} == {
        "poisoned_batches": "failed",
        "label_flips": "completed",
    }
    assert "the fault itself is broken" in rows[0]["error"]


def test_data_without_bottoms_have_none_to_flip(spec: dict[str, Any]) -> None:
    """The cell does not apply, with the reason, and its config has the score of the others."""
    params = {name: value for name, value in spec["params"].items() if name != "status"}
    faults = parse_faults("label_flips:low,rate_spikes:low")
    rows = list(run_matrix({**spec, "params": params}, {"a": SMALL}, [0], faults))
    assert [row["status"] for row in rows] == [NOT_APPLICABLE, "completed"]
    assert "no training row has a bottom to flip" in rows[0]["reason"]
    (score,) = score_cells(cells_table(rows)).to_pylist()
    assert score["robustness"] == rows[1]["retained"]


@pytest.mark.parametrize("epochs", [1, 2])
def test_a_training_may_be_as_short_as_the_fault(spec: dict[str, Any], epochs: int) -> None:
    """With one epoch nothing can recover; no fault trains longer than its config asks for."""
    rows = list(run_matrix(spec, {"a": {**SMALL, "max_epochs": epochs}}, [0], parse_faults("all:low")))
    assert len(rows) == len(FAULTS)
    for row in rows:
        assert (row["status"], row["epochs"]) == ("completed", epochs), row
        if row["span"] == "window":
            assert row["window_first"] == row["window_last"] == 1
            assert (row["recovered"] is None) == (epochs == 1)


def test_no_faults_are_no_cells_and_an_absent_device_is_an_error(spec: dict[str, Any]) -> None:
    """Nothing is trained for nothing; a device is not quietly exchanged."""
    assert list(run_matrix(spec, CONFIGS, [0], [])) == []
    with pytest.raises(DeviceError, match="device must be cpu"):
        list(run_matrix(spec, CONFIGS, [0], parse_faults("all"), device="tpu"))


def test_guards_matter(spec: dict[str, Any]) -> None:
    """Leaving bad steps out survives poisoned batches, where ending at the first does not; and a clipped
    gradient stays beside its clean twin through spikes that move a plain one away."""
    configs = {"skips": SMALL, "ends": {**SMALL, "nonfinite_budget": 0}}
    rows = list(run_matrix(spec, configs, [0, 1], parse_faults("poisoned_batches:middle")))
    status = {(row["config_id"], row["status"]) for row in rows}
    assert status == {("skips", "completed"), ("ends", "diverged")}
    assert all(row["retained"] == 0.0 for row in rows if row["config_id"] == "ends")
    plain = {**SMALL, "optimizer": "sgd", "learning_rate": 0.05}
    configs = {"plain": plain, "clipped": {**plain, "clip_norm": 0.1}}
    moved: dict[str, list[float]] = {"plain": [], "clipped": []}
    for row in run_matrix(spec, configs, [0, 1], parse_faults("gradient_spikes:high")):
        moved[row["config_id"]].append(abs(row["charged_error"] / row["clean_charged_error"] - 1.0))
    assert max(moved["clipped"]) < 0.02
    assert min(moved["plain"]) > 0.1


@pytest.mark.parametrize(
    ("own", "last", "expected"),
    [
        ([1.0, 5.0, 1.0, 1.05], 2, (True, 1)),
        ([1.0, 1.0, 1.0, 1.0], 2, (True, 0)),
        ([1.0, 5.0, 1.0, 2.0], 2, (False, None)),
        ([1.0, 5.0, math.nan, 1.0], 2, (True, 2)),
        ([1.0, 5.0], 2, (False, None)),
    ],
    ids=["after an epoch", "never away", "away again", "through NaN", "ended there"],
)
def test_recovery_lasts_to_the_end(own: list[float], last: int, expected: tuple[bool, int | None]) -> None:
    """Who comes back and goes again has not recovered."""
    said = {epoch: {"charged_error": value} for epoch, value in enumerate(own, 1)}
    twin = {epoch: {"charged_error": 1.0} for epoch in range(1, 5)}
    assert recovery(said, twin, last) == expected
    assert recovery(said, twin, last, ended_well=False) == (False, None)


@pytest.fixture
def make_job(spec: dict[str, Any]) -> Callable[..., WorkerJob]:
    """A worker's job of one trial."""

    def make(epoch: int, **config: Any) -> WorkerJob:
        return WorkerJob(spec, [("a-s0", {**SMALL, **config}, 0)], epoch, "cpu", 1)

    return make


def test_a_worker_is_killed_in_the_middle_of_its_epoch(make_job: Callable[..., WorkerJob]) -> None:
    """What it saved is of the epochs before, and a trial alone is saved as one of a pack is."""
    with KilledWorker(make_job(2, finite_action="roll_back")) as worker:
        saves = worker.saves(120.0)
    assert sorted(saves) == [1, 2]
    assert worker._process.returncode == -9


def test_a_worker_that_is_not_killed_is_an_error(make_job: Callable[..., WorkerJob], tmp_path: Path) -> None:
    """One that fails says why; one whose trials have ended before says so."""
    job = make_job(2)
    broken = WorkerJob({**job.spec, "base_dir": str(tmp_path)}, job.members, 2, "cpu", 1)
    with KilledWorker(broken) as worker, pytest.raises(WorkerError, match="all trials had ended"):
        worker.saves(120.0)
