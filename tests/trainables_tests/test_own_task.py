"""The worked example of a user's own task holds what it shows, and so do the plans beside it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ruamel.yaml import YAML

from scm.training.targets import STATUS_CODES
from trainables.packed_trial import Member, PackRun
from trainables.tasks.protocol import TaskError
from trainables.tasks.registry import make_task
from trainables.trial import make_splits, run_trial

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_example_trains_from_the_folder_of_its_plan() -> None:
    """`own_task:LensTask` is found beside the plan, trains, and brings a column of its own."""
    task = make_task("own_task:LensTask", {"rows": 200}, EXAMPLES)
    config = {"max_epochs": 60, "learning_rate": 1e-2, "tau_infer": 0.05, "tau_train_min": 0.05}
    outcome = run_trial(task, config | {"tau_train_max": 0.05, "lambda_push_down": 1.0}, 0)
    assert outcome["status"] == "completed"
    assert 0 <= outcome["metric.right_side"] <= 1
    assert outcome["test_charged_error"] < 3.0


def test_example_trains_in_packs_as_it_does_alone() -> None:
    """A head that `normalize` puts on the unit circle, as users write it, is no reason to train alone."""
    task = make_task("own_task:LensTask", {"rows": 120}, EXAMPLES)
    splits = make_splits(task, 0)
    base = {"max_epochs": 3, "hidden_width": 8, "dtype": "float64"}
    configs = {"a": base, "b": {**base, "learning_rate": 0.01}}
    run = PackRun([Member(name, config, 0) for name, config in configs.items()], lambda seed: (task, splits))
    outcomes = {}
    while not run.done:
        outcomes |= {told.trial_id: told.outcome for told in run.step() if told.outcome is not None}
    for name, config in configs.items():
        assert outcomes[name]["pack_note"] == ""
        assert outcomes[name]["val_loss"] == pytest.approx(run_trial(task, config, 0)["val_loss"], rel=1e-9)


def test_example_draws_new_data_for_each_seed_and_the_same_for_the_same() -> None:
    """Its splits are drawn from the trial's seed."""
    task = make_task("own_task:LensTask", {}, EXAMPLES)
    one, again, other = (task.splits(seed)["train"].digest() for seed in (0, 0, 1))
    assert one == again
    assert one != other


def test_example_labels_the_focus_bottom() -> None:
    """Rows without an image have no value, and all others satisfy the lens equation."""
    split = make_task("own_task:LensTask", {}, EXAMPLES).splits(0)["train"]
    distance, focal = split.inputs.unbind(-1)
    none = split.extras["status"] == STATUS_CODES["bottom"]
    assert 0 < int(none.sum()) < len(split) // 4
    residual = 1 / (split.extras["value"] * focal) + 1 / distance - 1 / focal
    assert torch.allclose(residual[~none], torch.zeros(int((~none).sum())), atol=1e-5)


def test_example_refuses_what_it_does_not_know() -> None:
    """A misspelt or absurd parameter is one line."""
    with pytest.raises(TaskError, match="unknown parameter 'row' of the task 'lens'; did you mean 'rows'"):
        make_task("own_task:LensTask", {"row": 3}, EXAMPLES)
    with pytest.raises(TaskError, match="rows must be a whole number >= 30, got 3"):
        make_task("own_task:LensTask", {"rows": 3}, EXAMPLES)


@pytest.mark.parametrize("plan", ["nh4", "gbsg2", "own_task"])
def test_example_plan_names_a_task_that_can_be_made(plan: str) -> None:
    """Files and modules are found from the plan's folder; a sweep is large enough to rank."""
    words = YAML(typ="safe").load((EXAMPLES / f"{plan}.yaml").read_text(encoding="utf-8"))
    task = words["task"]
    made = make_task(task.pop("name"), task, EXAMPLES)
    assert len(made.splits(0)["train"]) > 50
    assert words["search"]["configs"] >= 24
    assert len(words["seeds"]) >= 2
