"""One actor runs job after job, and each as if it were the first."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from ray.tune import PlacementGroupFactory

from trainables import ray_trainable
from trainables.loading import load_task
from trainables.ray_trainable import SCMTrainable
from trainables.tasks.registry import make_task
from trainables.trial import HISTORY_KEYS, DeviceError, run_trial

TIMES = ("step_time_ms", "duration_s")


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    """A trainable sets the threads of its process; give them back."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def job(nh4: dict[str, Any]) -> dict[str, Any]:
    """A short job on the ammonium data."""
    folder = Path(nh4["data"]).parent
    return {
        "config": {"max_epochs": 2},
        "seed": 0,
        "task": {"name": "table", "params": nh4 | {"data": "nh4.csv"}, "base_dir": str(folder)},
        "device": "cpu",
        "trial_id": "abc-s0",
    }


def finish(trainable: SCMTrainable) -> dict[str, Any]:
    """Step to the end; the last result."""
    for _ in range(100):
        result = trainable.step()
        if result["done"]:
            return result
    raise AssertionError("the trial never ended")


def comparable(outcome: Mapping[str, Any]) -> str:
    return json.dumps({key: value for key, value in outcome.items() if key not in TIMES})


def test_each_step_is_an_epoch_and_the_last_brings_the_outcome(job: dict[str, Any]) -> None:
    """Numbers at the top for schedulers, history for the file, the outcome once."""
    trainable = SCMTrainable({"job": job})
    first = trainable.step()
    assert set(HISTORY_KEYS) <= set(first)
    assert (first["epoch"], first["done"], first["outcome"], first["provenance"]) == (1, False, None, None)
    assert first["history"]["val_loss"] == first["val_loss"]
    last = trainable.step()
    assert (last["epoch"], last["done"]) == (2, True)
    assert last["outcome"]["status"] == "completed"
    assert len(last["provenance"]["data_digest"]) == 64
    assert last["provenance"]["device"] == "cpu"


def test_outcome_equals_that_of_a_trial_run_without_ray(job: dict[str, Any]) -> None:
    """Ray changes nothing about a training."""
    outcome = finish(SCMTrainable({"job": job}))["outcome"]
    task = make_task("table", job["task"]["params"], Path(job["task"]["base_dir"]))
    assert comparable(outcome) == comparable(run_trial(task, job["config"], 0))


def test_job_ends_alike_whatever_ran_in_its_actor_before(job: dict[str, Any]) -> None:
    """The same job before and after another one, in one actor: nothing has leaked."""
    other = job | {"config": {"max_epochs": 3, "learning_rate": 0.5, "dtype": "float64"}, "seed": 9}
    trainable = SCMTrainable({"job": job})
    before = finish(trainable)["outcome"]
    assert trainable.reset_config({"job": other})
    finish(trainable)
    assert trainable.reset_config({"job": job})
    assert comparable(before) == comparable(finish(trainable)["outcome"])


def test_job_stopped_midway_leaves_nothing_to_the_next(job: dict[str, Any]) -> None:
    """A scheduler may end a trial at any epoch; the actor takes the next from its start."""
    expected = finish(SCMTrainable({"job": job}))["outcome"]
    trainable = SCMTrainable({"job": job | {"seed": 5}})
    trainable.step()
    assert trainable.reset_config({"job": job})
    assert comparable(expected) == comparable(finish(trainable)["outcome"])


def test_restored_actor_ends_as_the_lost_one_would_have(job: dict[str, Any], tmp_path: Path) -> None:
    """A trial moved to another node after an epoch loses nothing, to the bit."""
    config = {"max_epochs": 4, "lr_schedule": "linear"}
    expected = finish(SCMTrainable({"job": job | {"config": config}}))["outcome"]
    lost = SCMTrainable({"job": job | {"config": config}})
    lost.step()
    lost.save_checkpoint(str(tmp_path))
    moved = SCMTrainable({"job": job | {"config": config}})
    moved.load_checkpoint(str(tmp_path))
    assert comparable(expected) == comparable(finish(moved)["outcome"])


def test_task_that_cannot_be_made_is_a_failed_outcome_and_the_actor_goes_on(
    job: dict[str, Any], tmp_path: Path
) -> None:
    """The file is gone on this node: one row says so, and the next job runs."""
    trainable = SCMTrainable({"job": job | {"task": job["task"] | {"base_dir": str(tmp_path)}}})
    result = trainable.step()
    assert result["done"]
    assert result["history"] == {}
    assert result["outcome"]["status"] == "failed"
    assert result["outcome"]["error"].startswith("TaskError: the data file must exist")
    trainable.save_checkpoint(str(tmp_path))
    trainable.load_checkpoint(str(tmp_path))
    assert trainable.reset_config({"job": job})
    assert finish(trainable)["outcome"]["status"] == "completed"


def test_training_that_cannot_start_is_a_failed_outcome(job: dict[str, Any]) -> None:
    """An unknown knob is a row with its name."""
    result = SCMTrainable({"job": job | {"config": {"learning_rat": 1.0}}}).step()
    assert result["done"]
    assert "unknown knob 'learning_rat'" in result["outcome"]["error"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_absent_gpu_is_an_error_at_setup_and_at_reset(job: dict[str, Any]) -> None:
    """No trial of the job can run here, so none pretends to."""
    with pytest.raises(DeviceError, match="a GPU was asked for"):
        SCMTrainable({"job": job | {"device": "cuda"}})
    trainable = SCMTrainable({"job": job})
    with pytest.raises(DeviceError, match="a GPU was asked for"):
        trainable.reset_config({"job": job | {"device": "cuda"}})


@pytest.mark.parametrize("cpus, threads", [(0.5, 1), (1, 1), (2, 2), (2.5, 2)])
def test_threads_are_the_whole_cpus_of_the_trials_share(cpus: float, threads: int) -> None:
    """Two trials of one CPU each do not fight for two cores with two threads each."""
    assert ray_trainable.thread_share(PlacementGroupFactory([{"CPU": cpus}])) == threads


def test_data_are_loaded_once_until_the_file_changes(write_csv: Any) -> None:
    """One process reads a file once for all its trials of a seed, and again when its content is another."""
    x = [float(i) for i in range(20)]
    spec = {
        "name": "table",
        "params": {"data": write_csv(x=x, y=x), "inputs": ["x"], "target": "y"},
        "base_dir": "/",
    }
    first = load_task(spec, 0)
    assert load_task(spec, 0) is first
    write_csv(x=x, y=[2.5 * value for value in x])
    assert load_task(spec, 0).data_digest != first.data_digest
