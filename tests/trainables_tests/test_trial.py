"""A trial ends in an outcome whatever happens, and the same trial ends in the same outcome."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from scm.data import Split
from scm.trial import Decoded
from scm.trial_config import TrialConfig
from trainables.scoring import STANDARD_METRICS
from trainables.tasks.table import TableTask, make_table_task
from trainables.trial import (
    HISTORY_KEYS,
    DeviceError,
    TrialRun,
    check_device,
    error_line,
    failed_outcome,
    run_trial,
)

TIMES = ("step_time_ms", "duration_s")
SHORT = {"max_epochs": 3}


@pytest.fixture(scope="module")
def task() -> TableTask:
    """The ammonium data, read once for this module."""
    root = Path(__file__).parents[2]
    return make_table_task(
        {
            "data": str(root / "data" / "nh4.csv"),
            "inputs": ["Week", "Date.On"],
            "target": "NH4.mg.per.L",
            "target_transform": "log",
            "status": {"column": "Censored", "values": {"TRUE": "censored_below", "FALSE": "finite"}},
        }
    )


class Altered:
    """The table task with some of its methods replaced."""

    def __init__(self, task: TableTask, **methods: Callable[..., Any]) -> None:
        self.task = task
        self.name, self.error_unit = task.name, task.error_unit
        self.methods = methods

    def splits(self, seed: int) -> Mapping[str, Split]:
        return self._call("splits", seed)

    def build_model(self, config: TrialConfig) -> nn.Module:
        return self._call("build_model", config)

    def make_loss(self, config: TrialConfig) -> Any:
        return self._call("make_loss", config)

    def metrics(self, decoded: Decoded, split: Split, config: TrialConfig) -> dict[str, float]:
        return self._call("metrics", decoded, split, config)

    def _call(self, name: str, *arguments: Any) -> Any:
        return self.methods.get(name, getattr(self.task, name))(*arguments)


def same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Tell whether two outcomes are equal to the last bit, times apart."""
    return json.dumps({k: v for k, v in one.items() if k not in TIMES}) == json.dumps(
        {k: v for k, v in other.items() if k not in TIMES}
    )


def test_outcome_holds_every_column_and_finite_losses(task: TableTask) -> None:
    """A completed trial says how it went on both held-out splits, and how large and fast its model was."""
    said: list[dict[str, Any]] = []
    outcome = run_trial(task, SHORT, 0, on_epoch=said.append)
    assert (outcome["status"], outcome["stop_reason"], outcome["error"]) == ("completed", "", "")
    assert outcome["epochs"] == 3
    assert [epoch["epoch"] for epoch in said] == [1, 2, 3]
    assert set(HISTORY_KEYS) <= set(said[0])
    assert all(isinstance(value, (int, float)) for value in said[0].values())
    for name in ("loss", "val_loss", "coverage", "test_coverage", "step_time_ms", "duration_s"):
        assert math.isfinite(outcome[name]), name
    assert outcome["target_coverage"] == TrialConfig().target_coverage
    assert outcome["parameters"] == sum(p.numel() for p in task.build_model(TrialConfig()).parameters())
    assert outcome["nan_count"] == sum(
        outcome[f"nan_{kind}"] for kind in ("loss", "gradient", "output", "parameter")
    )
    assert outcome["val_loss"] == said[-1]["val_loss"]
    assert {f"test_{name}" for name in STANDARD_METRICS} <= set(outcome)


def test_the_trivial_error_is_that_of_a_model_that_abstains_everywhere(task: TableTask) -> None:
    """It is the charged_error of no answer at all, whatever the trained model answers."""
    outcome = run_trial(task, SHORT, 0)
    none = run_trial(task, {**SHORT, "tau_infer": 2.0, "tau_train_min": 2.0, "tau_train_max": 2.0}, 0)
    assert (none["coverage"], none["test_coverage"]) == (0.0, 0.0)
    for prefix in ("", "test_"):
        assert outcome[f"{prefix}trivial_error"] == none[f"{prefix}charged_error"]
        assert outcome[f"{prefix}trivial_error"] == none[f"{prefix}trivial_error"]


def test_a_task_that_cannot_score_abstaining_loses_no_trial(task: TableTask) -> None:
    """What such a model would cost is then unknown, and all else is as it was."""

    def metrics(decoded: Decoded, split: Split, config: TrialConfig) -> dict[str, float]:
        if bool(decoded.bottom.all()):
            raise ValueError("no answers to score")
        return task.metrics(decoded, split, config)

    outcome = run_trial(Altered(task, metrics=metrics), SHORT, 0)
    assert (outcome["status"], outcome["error"]) == ("completed", "")
    assert math.isnan(outcome["trivial_error"])


def test_same_config_and_seed_give_the_same_outcome(task: TableTask) -> None:
    """Whatever ran before, and wherever torch's global generator stands."""
    first = run_trial(task, SHORT, 3)
    torch.rand(17)
    run_trial(task, {"max_epochs": 1, "learning_rate": 0.1}, 4)
    assert same(first, run_trial(task, SHORT, 3))
    assert not same(first, run_trial(task, SHORT, 4))


def test_trial_leaves_the_global_generator_as_it_was(task: TableTask) -> None:
    """Training draws from streams of its own."""
    torch.manual_seed(0)
    expected = torch.get_rng_state()
    run_trial(task, SHORT, 3)
    assert torch.equal(torch.get_rng_state(), expected)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_interrupted_and_resumed_equals_uninterrupted(
    task: TableTask, optimizer: str, tmp_path: Path
) -> None:
    """A trial saved after an epoch and loaded into a fresh one ends as if nothing had happened."""
    config = {"max_epochs": 4, "optimizer": optimizer, "lr_schedule": "cosine", "tau_train_max": 0.1}
    whole = run_trial(task, config, 1)
    broken = TrialRun(task, config, 1)
    broken.step()
    broken.save(tmp_path / "state")
    resumed = TrialRun(task, config, 1)
    resumed.load(tmp_path / "state")
    assert not resumed.done
    while not resumed.done:
        resumed.step()
    assert same(whole, resumed.outcome())


def test_finished_trial_is_loaded_as_finished(task: TableTask, tmp_path: Path) -> None:
    """What was done is not done again."""
    run = TrialRun(task, {"max_epochs": 1}, 1)
    run.step()
    outcome = run.outcome()
    run.save(tmp_path)
    again = TrialRun(task, {"max_epochs": 1}, 1)
    again.load(tmp_path)
    assert again.done
    assert json.dumps(again.outcome()) == json.dumps(outcome)


def test_failed_start_is_loaded_as_failed_and_fails_again_where_it_is_loaded(
    task: TableTask, tmp_path: Path
) -> None:
    """Neither a good nor a bad state turns a failure into something else."""
    broken = Altered(task, build_model=raising)
    TrialRun(broken, SHORT, 0).save(tmp_path / "bad")
    run = TrialRun(task, SHORT, 0)
    run.load(tmp_path / "bad")
    assert (run.done, run.outcome()["status"]) == (True, "failed")
    run = TrialRun(task, SHORT, 0)
    run.step()
    run.save(tmp_path / "good")
    run = TrialRun(broken, SHORT, 0)
    run.load(tmp_path / "good")
    assert (run.done, run.outcome()["status"]) == (True, "failed")


@pytest.mark.parametrize("other", [{"seed": 2}, {"config": {"max_epochs": 2}}], ids=["seed", "config"])
def test_state_of_another_trial_is_refused(task: TableTask, other: dict[str, Any], tmp_path: Path) -> None:
    """A checkpoint is not poured into a trial that it does not belong to."""
    run = TrialRun(task, {"max_epochs": 1}, 1)
    run.step()
    run.save(tmp_path)
    with pytest.raises(ValueError, match=f"must be loaded with its own {next(iter(other))}"):
        TrialRun(task, **({"config": {"max_epochs": 1}, "seed": 1} | other)).load(tmp_path)


def test_stopped_trial_says_why_and_is_measured(task: TableTask) -> None:
    """A scheduler's stop is a status, with the metrics of the weights at that epoch."""
    run = TrialRun(task, {"max_epochs": 5}, 0)
    run.step()
    provisional = run.outcome()
    run.stop("rung 1")
    outcome = run.outcome()
    assert (outcome["status"], outcome["stop_reason"], outcome["epochs"]) == ("stopped", "rung 1", 1)
    assert same(provisional | {"stop_reason": "rung 1"}, outcome)
    with pytest.raises(RuntimeError, match="must not be called on a trial that is done"):
        run.step()


def test_asking_for_an_outcome_midway_changes_nothing(task: TableTask) -> None:
    """A trial that was looked at ends as one that was not."""
    run = TrialRun(task, SHORT, 0)
    run.step()
    assert run.outcome()["status"] == "stopped"
    while not run.done:
        run.step()
    assert same(run.outcome(), run_trial(task, SHORT, 0))


def test_coverage_early_stop_is_stopped_with_a_reason(task: TableTask) -> None:
    """The config's own early stop ends the trial before its last epoch."""
    config = {"max_epochs": 20, "tau_infer": 0.99, "tau_train_min": 0.99, "tau_train_max": 0.99}
    outcome = run_trial(task, config | {"coverage_threshold": 0.99, "coverage_patience": 2}, 0)
    assert outcome["status"] == "stopped"
    assert outcome["epochs"] < 20
    assert "coverage" in outcome["stop_reason"]


class NonFinite(nn.Module):
    """A model whose outputs are NaN in training, or in evaluation."""

    def __init__(self, inner: nn.Module, *, training: bool) -> None:
        super().__init__()
        self.inner, self.when = inner, training

    def forward(self, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        p, q = self.inner(inputs)
        return (p * torch.nan, q) if self.training is self.when else (p, q)


def test_diverging_is_a_status_with_counts(task: TableTask) -> None:
    """NaN losses past the budget end the trial as diverged; the weights and the metrics stay finite."""
    bad = Altered(task, build_model=lambda config: NonFinite(task.build_model(config), training=True))
    outcome = run_trial(bad, {"max_epochs": 20, "nonfinite_budget": 3}, 0)
    assert outcome["status"] == "diverged"
    assert outcome["stop_reason"]
    assert outcome["nan_loss"] > 3
    assert outcome["nan_output"] > 0
    assert outcome["nan_parameter"] == 0
    assert outcome["nan_origin"].startswith(
        "micro-batch 1: the model itself (NonFinite), from finite inputs in P; loss term task"
    )
    assert math.isfinite(outcome["charged_error"])


def test_what_a_config_turns_on_says_how_it_went(task: TableTask) -> None:
    """Its telemetry is in the history of every epoch and in the outcome; without it there is none."""
    bad = Altered(task, build_model=lambda config: NonFinite(task.build_model(config), training=True))
    said: list[dict[str, Any]] = []
    config = {"max_epochs": 20, "nonfinite_budget": 3, "finite_action": "skip_micro_batch"}
    outcome = run_trial(bad, config, 0, on_epoch=said.append)
    assert outcome["status"] == "diverged"
    assert outcome["telemetry.finite_bad_micro_batches"] == 4.0
    assert outcome["telemetry.finite_raw_P"] == 4.0
    assert outcome["telemetry.finite_raw_Q"] == 0.0
    assert [epoch["telemetry.finite_bad_micro_batches"] for epoch in said] == [2.0, 4.0]
    plain = run_trial(task, SHORT, 0, on_epoch=said.append)
    assert plain["nan_origin"] == ""
    assert not [name for name in (*plain, *said[-1]) if name.startswith("telemetry.")]


@pytest.mark.parametrize("action", ["skip_micro_batch", "roll_back"])
def test_interrupted_and_resumed_telemetry_is_that_of_the_uninterrupted(
    task: TableTask, action: str, tmp_path: Path
) -> None:
    """What goes along with a training is saved with it."""
    config = {"max_epochs": 3, "finite_action": action, "gradient_accumulation_steps": 2}
    whole = run_trial(task, config, 1)
    broken = TrialRun(task, config, 1)
    broken.step()
    broken.save(tmp_path)
    resumed = TrialRun(task, config, 1)
    resumed.load(tmp_path)
    while not resumed.done:
        resumed.step()
    assert same(whole, resumed.outcome())


def test_faults_met_in_evaluation_count_as_outputs(task: TableTask) -> None:
    """A model that is finite in training alone has no NaN loss; each val row is a fault each epoch."""
    bad = Altered(task, build_model=lambda config: NonFinite(task.build_model(config), training=False))
    outcome = run_trial(bad, {"max_epochs": 2}, 0)
    assert (outcome["nan_loss"], outcome["nan_gradient"], outcome["nan_parameter"]) == (0, 0, 0)
    assert outcome["nan_output"] == 2 * len(task.splits(0)["val"])
    assert outcome["coverage"] == 0.0


def raising(*_: Any) -> Any:
    raise RuntimeError("first line\nsecond line")


@pytest.mark.parametrize("method", ["splits", "build_model", "make_loss", "metrics"])
def test_task_that_raises_is_a_failed_outcome_with_one_line(task: TableTask, method: str) -> None:
    """Type, message and place of the user's exception; every column is there, and nothing escapes."""
    outcome = run_trial(Altered(task, **{method: raising}), SHORT, 0)
    assert outcome["status"] == "failed"
    assert outcome["error"].startswith("RuntimeError: first line second line (test_trial.py:")
    assert set(outcome) == set(run_trial(task, {"max_epochs": 1}, 0))
    assert outcome["target_coverage"] == TrialConfig().target_coverage


def test_task_that_calls_exit_is_a_failed_outcome(task: TableTask) -> None:
    """sys.exit in a task ends its trial, and not the process that others train in."""
    outcome = run_trial(Altered(task, metrics=lambda *_: sys.exit(0)), {"max_epochs": 1}, 0)
    assert outcome["status"] == "failed"
    assert outcome["error"].startswith("SystemExit: 0 (test_trial.py:")


def test_loss_that_raises_in_a_later_epoch_keeps_the_counts(task: TableTask) -> None:
    """What was trained before the failure is in the row, and no epoch is said twice."""
    calls = {"metrics": 0}

    def metrics(decoded: Decoded, split: Split, config: TrialConfig) -> dict[str, float]:
        calls["metrics"] += 1
        return raising() if calls["metrics"] == 3 else task.metrics(decoded, split, config)

    said: list[dict[str, Any]] = []
    outcome = run_trial(Altered(task, metrics=metrics), {"max_epochs": 5}, 0, on_epoch=said.append)
    assert outcome["status"] == "failed"
    assert [epoch["epoch"] for epoch in said] == [1, 2]
    assert outcome["epochs"] == 2
    assert outcome["loss"] == said[-1]["loss"]


@pytest.mark.parametrize(
    "methods, message",
    [
        ({"splits": lambda seed: {}}, "must hold 'train'"),
        ({"splits": lambda seed: None}, "must return a mapping, got NoneType"),
        (
            {"splits": lambda seed: {"train": 1, "val": 2, "test": 3}},
            "'train' must be a scm.data.Split, got int",
        ),
        ({"metrics": lambda *_: {"accepted_error": 1.0}}, "must hold 'charged_error'"),
        ({"metrics": lambda *_: None}, "must return a dict, got NoneType"),
        (
            {"metrics": lambda *_: {"accepted_error": "1", "charged_error": 1}},
            "must hold numbers, got accepted_error='1'",
        ),
    ],
)
def test_broken_promise_of_a_task_is_named(
    task: TableTask, methods: dict[str, Callable[..., Any]], message: str
) -> None:
    """A method that returns something else than the protocol says is told which and what."""
    outcome = run_trial(Altered(task, **methods), {"max_epochs": 1}, 0)
    assert outcome["status"] == "failed"
    assert message in outcome["error"]


def test_tasks_own_metrics_become_columns_of_both_splits(task: TableTask) -> None:
    """Whatever else a task measures is `metric.<name>` and `test_metric.<name>`."""

    def metrics(*arguments: Any) -> dict[str, float]:
        return task.metrics(*arguments) | {"hits": 0.5}

    said: list[dict[str, Any]] = []
    outcome = run_trial(Altered(task, metrics=metrics), {"max_epochs": 1}, 0, on_epoch=said.append)
    assert outcome["metric.hits"] == outcome["test_metric.hits"] == said[0]["metric.hits"] == 0.5


def test_bad_config_is_a_failed_outcome(task: TableTask) -> None:
    """A knob that no training knows ends the trial before it starts, with its name."""
    outcome = run_trial(task, {"learning_rat": 0.1}, 0)
    assert outcome["status"] == "failed"
    assert "unknown knob 'learning_rat'" in outcome["error"]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_trial_trains_in_the_dtype_of_its_config(task: TableTask, dtype: str) -> None:
    """Data and weights follow the knob."""
    run = TrialRun(task, {"max_epochs": 1, "dtype": dtype}, 0)
    run.step()
    assert run.outcome()["status"] == "completed"
    assert {p.dtype for p in run._trainer.model.parameters()} == {getattr(torch, dtype)}


@pytest.mark.parametrize("device", ["gpu", "cpu:1", "cuda:x", "mps"])
def test_unknown_device_is_refused(device: str) -> None:
    """Only devices that the harness runs on have a name."""
    with pytest.raises(DeviceError, match="device must be cpu, cuda or cuda:<index>"):
        check_device(device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_absent_gpu_is_an_error_and_not_the_cpu(task: TableTask) -> None:
    """A GPU that is asked for and absent is said so, before anything is trained."""
    with pytest.raises(DeviceError, match="a GPU was asked for and torch sees none"):
        TrialRun(task, SHORT, 0, "cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_trial_runs_on_the_gpu(task: TableTask) -> None:
    """The model is where it was asked for, and the outcome is as complete as on the CPU."""
    run = TrialRun(task, SHORT, 0, "cuda")
    while not run.done:
        run.step()
    assert run.outcome()["status"] == "completed"
    assert all(p.device.type == "cuda" for p in run._trainer.model.parameters())


def test_outcome_of_a_trial_that_never_started_has_every_column(task: TableTask) -> None:
    """The row of a task that cannot be made has the columns of one that was trained."""
    outcome = failed_outcome(KeyError("data"), {"target_coverage": 0.5})
    assert set(outcome) == set(run_trial(task, {"max_epochs": 1}, 0))
    assert outcome["target_coverage"] == 0.5
    assert outcome["error"] == "KeyError: 'data'"


def test_long_message_is_cut(task: TableTask) -> None:
    """A row is no place for a page."""
    assert len(error_line(ValueError("x" * 10_000))) == 500
    assert error_line(ValueError()) == "ValueError"


def test_message_can_be_written(task: TableTask) -> None:
    """What no file can hold (half a surrogate pair) is spelled out."""
    assert error_line(ValueError("a \ud800 b")) == "ValueError: a \\ud800 b"
