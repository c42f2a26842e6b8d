"""What every task of the table keeps: honest splits, a model that trains, and scores that cannot be gamed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scm.data import Split
from scm.trial import decode_split
from scm.trial_config import TrialConfig
from trainables.tasks.protocol import REQUIRED_METRICS, SPLIT_NAMES, Task, check_task
from trainables.tasks.registry import TASKS, make_task
from trainables.trial import TrialRun

ROOT = Path(__file__).parents[2]
# Parameters that make each task small enough for a test; a new line of TASKS needs one here.
PARAMS: dict[str, dict[str, Any]] = {
    "table": {
        "data": "data/gbsg2.csv",
        "inputs": ["horTh", "age", "menostat", "tsize", "tgrade", "pnodes", "progrec", "estrec"],
        "target": "time",
        "target_transform": "log",
        "status": {"column": "cens", "values": {"1": "finite", "0": "censored_above"}},
    },
    "dose": {"n_train": 200, "n_val": 60, "n_test": 90},
    "rf": {"n_train": 24, "n_val": 8, "n_test": 16},
    "rr_ik": {"n_train": 300, "n_val": 100, "n_test": 100},
    "grid": {"data": "data/grids.json"},
}
_made: dict[str, Task] = {}


@pytest.fixture(params=list(TASKS))
def task(request: pytest.FixtureRequest) -> Task:
    """Every task of the table, made once."""
    name = request.param
    if name not in _made:
        _made[name] = make_task(name, PARAMS[name], ROOT)
    return _made[name]


def config_of(task: Task, **knobs: Any) -> TrialConfig:
    """The knobs that a task suggests where it does, with some changed."""
    return TrialConfig.from_flat({**getattr(task, "suggested", {}), **knobs})


class Fixed(nn.Module):
    """A model whose numerator and denominator are given numbers, whatever the inputs."""

    def __init__(self, shapes: tuple[torch.Size, torch.Size], p: float, q: float) -> None:
        super().__init__()
        self.shapes, self.p, self.q = shapes, p, q
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        rows = inputs.shape[0]
        p, q = (inputs.new_full((rows, *shape[1:]), 1.0) for shape in self.shapes)
        return p * self.p, q * self.q


def fixed_like(task: Task, split: Split, p: float, q: float) -> Fixed:
    with torch.no_grad():
        outputs = task.build_model(config_of(task))(split.inputs[:2])
    return Fixed((outputs[0].shape, outputs[1].shape), p, q)


def scores_of(task: Task, model: nn.Module, name: str = "val") -> dict[str, float]:
    split, config = task.splits(0)[name], config_of(task)
    with torch.no_grad():
        return task.metrics(decode_split(model, split, tau_infer=config.tau_infer), split, config)


def test_task_keeps_the_protocol(task: Task) -> None:
    """Name, unit and methods are there."""
    check_task(task, task.name)


def test_splits_are_finite_of_one_form_and_hold_different_rows(task: Task) -> None:
    """Inputs are finite floats of one shape, and no row of one split is in another."""
    splits = task.splits(0)
    assert tuple(splits) == SPLIT_NAMES
    assert len({(split.inputs.shape[1:], split.inputs.dtype) for split in splits.values()}) == 1
    rows: list[set[bytes]] = []
    for split in splits.values():
        assert split.inputs.is_floating_point()
        assert bool(split.inputs.isfinite().all())
        assert len(split.targets) == len(split) > 0
        assert bool(split.targets.mask_finite.any())
        whole = torch.cat(
            [split.inputs.flatten(1), split.targets.Y_n.reshape(len(split), -1).to(split.inputs)], dim=1
        )
        rows.append({row.numpy().tobytes() for row in whole})
    train, val, test = rows
    assert not (train & val) | (train & test) | (val & test)


def test_same_seed_gives_the_same_data_from_a_fresh_task(task: Task) -> None:
    """Neither the process nor torch's global generator decides what the data are."""
    torch.rand(3)
    fresh = make_task(task.name, PARAMS[task.name], ROOT).splits(1)
    for name, split in task.splits(1).items():
        assert split.digest() == fresh[name].digest()


def test_model_answers_a_tuple_for_each_row(task: Task) -> None:
    """P and Q have a row for each row, and P the shape of a target."""
    split = task.splits(0)["val"]
    outputs = task.build_model(config_of(task))(split.inputs[:5])
    assert outputs[0].shape == split.targets.Y_n[:5].shape
    assert outputs[1].shape[0] == 5
    assert all(bool(output.isfinite().all()) for output in outputs[:2])


def test_one_epoch_trains_and_is_scored(task: Task) -> None:
    """The weights move, the loss is finite, and the outcome holds both errors on both held-out splits."""
    run = TrialRun(task, config_of(task, max_epochs=1).to_flat(), 0)
    assert run._trainer is not None, run.outcome()["error"]
    before = [parameter.detach().clone() for parameter in run._trainer.model.parameters()]
    said = run.step()
    outcome = run.outcome()
    assert outcome["status"] == "completed", outcome["error"]
    assert math.isfinite(said["loss"])
    after = run._trainer.model.parameters()
    assert any(not torch.equal(one, other) for one, other in zip(before, after, strict=True))
    for name in REQUIRED_METRICS:
        assert name in outcome
        assert f"test_{name}" in outcome
    assert math.isfinite(outcome["charged_error"])


def test_always_abstaining_is_charged_and_answers_nothing(task: Task) -> None:
    """A model that rejects every row has no accepted error, and no lower charged error than a constant."""
    split = task.splits(0)["val"]
    scores = scores_of(task, fixed_like(task, split, 1.0, 0.0))
    assert math.isnan(scores["accepted_error"])
    value = split.extras["value"][split.targets.mask_finite].to(torch.float64)
    # The constant that is best in hindsight: nothing that was fitted on training rows alone can be below it.
    best = float((value - value.median(dim=0).values).abs().mean())
    assert scores["charged_error"] >= best - 1e-9


def test_answering_garbage_is_charged(task: Task) -> None:
    """A model whose answers are far off looks much worse than one that abstains."""
    split = task.splits(0)["val"]
    abstains = scores_of(task, fixed_like(task, split, 1.0, 0.0))["charged_error"]
    for p in (1e4, -1e4):
        garbage = scores_of(task, fixed_like(task, split, p, 1.0))
        if p > 0 or garbage["accepted_error"] > 0:
            assert garbage["charged_error"] >= abstains
    assert (
        max(scores_of(task, fixed_like(task, split, p, 1.0))["charged_error"] for p in (1e4, -1e4))
        > 3 * abstains
    )
