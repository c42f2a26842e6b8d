"""What a task says of its symmetries, and the guards that act on it through a whole trial."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from scm.guards.symmetry import D4
from trainables.tasks.protocol import TaskError, task_symmetries
from trainables.tasks.registry import TASKS, make_task
from trainables.tasks.rr_ik import make_rr_ik_task
from trainables.trial import run_trial

DATA = Path(__file__).parents[2] / "data"
ARM: dict[str, Any] = {"n_train": 90, "n_val": 30, "n_test": 30, "structure": "free"}


def test_a_task_without_the_method_has_no_symmetries() -> None:
    """It is optional: nothing is asked of those that do not have it."""
    assert task_symmetries(SimpleNamespace(name="plain")) is None


@pytest.mark.parametrize(
    "symmetries, message",
    [
        (lambda: [D4["flip_h"]], "grids: symmetries\\(\\) must return a mapping, got list"),
        (lambda: {"flip": "flip_h"}, "grids: symmetries\\(\\) must hold .*Symmetry, got flip='flip_h'"),
    ],
    ids=["list", "names"],
)
def test_anything_but_symmetries_by_name_is_refused(symmetries: Any, message: str) -> None:
    """One line that says what there must be, and what there is."""
    with pytest.raises(TaskError, match=message):
        task_symmetries(SimpleNamespace(name="grids", symmetries=symmetries))


def test_symmetries_may_be_a_method_or_a_mapping() -> None:
    """Both are taken as they are."""
    for held in (dict(D4), lambda: dict(D4)):
        assert task_symmetries(SimpleNamespace(name="grids", symmetries=held)) == dict(D4)


def test_equivariance_without_symmetries_fails_with_its_reason(nh4: dict[str, Any]) -> None:
    """A trial is a row that says what the task lacks; nothing trains as if the weight were not there."""
    outcome = run_trial(make_task("table", nh4, DATA), {"max_epochs": 1, "lambda_equivariance": 0.1}, 0)
    assert outcome["status"] == "failed"
    assert "lambda_equivariance needs a task with a method symmetries()" in outcome["error"]


def test_more_views_than_there_are_symmetries_fail_with_their_number() -> None:
    """Clipped, two values of the knob would be one training."""
    config = {"max_epochs": 1, "lambda_equivariance": 0.1, "equivariance_views": 4}
    outcome = run_trial(make_rr_ik_task(ARM), config, 0)
    assert outcome["status"] == "failed"
    assert "equivariance_views must be <= 3" in outcome["error"]
    assert "got equivariance_views=4" in outcome["error"]


GUARDED: dict[str, dict[str, Any]] = {
    "loss": {"cap_ratio": 0.05, "lambda_equivariance": 10.0},
    "gradient": {"cap_ratio": 0.05, "cap_currency": "gradient", "lambda_equivariance": 10.0},
    "reference": {"cap_ratio": 0.05, "cap_currency": "reference", "lambda_equivariance": 10.0},
    "watched": {"gap_watch": True, "lambda_equivariance": 1.0, "equivariance_distance": "l2"},
}


@pytest.mark.parametrize("task", ["rr_ik", "grid"])
@pytest.mark.parametrize("config", GUARDED.values(), ids=GUARDED)
def test_guards_act_on_tasks_with_symmetries_and_tell_of_it(task: str, config: dict[str, Any]) -> None:
    """Pairs and classes, every currency: telemetry becomes columns, and shares are what they should be."""
    params = {"rr_ik": ARM, "grid": {"data": "grids.json"}}[task]
    outcome = run_trial(make_task(task, params, DATA), {"max_epochs": 2, "hidden_width": 8, **config}, 0)
    assert outcome["status"] == "completed", outcome["error"]
    said = {name.removeprefix("telemetry."): value for name, value in outcome.items() if "telemetry." in name}
    assert said["equivariance_loss"] > 0
    assert said["equivariance_degenerate"] == 0.0
    if "gap_watch" in config:
        assert said["gap_trusted"] in (0.0, 1.0)
        assert math.isfinite(said["gap_score"])
        assert math.isfinite(said["gap_entropy"]) == (task == "grid")
    elif config.get("cap_currency") == "reference":
        assert said["cap_factor"] < 1.0
    else:
        assert said["cap_active_share"] > 0
        assert said["cap_share_after"] <= 0.05 + 1e-6


@pytest.mark.parametrize("name", ["rr_ik", "grid"])
def test_shipped_tasks_say_symmetries_that_undo_themselves(name: str) -> None:
    """Tried on rows of their own by the trainer; every other task has none."""
    params = {"rr_ik": ARM, "grid": {"data": "grids.json"}}[name]
    found = task_symmetries(make_task(name, params, DATA))
    assert found
    assert {"table", "dose", "rf"} < set(TASKS)
    task = make_task("dose", {"n_train": 30, "n_val": 30, "n_test": 30}, DATA)
    assert task_symmetries(task) is None
