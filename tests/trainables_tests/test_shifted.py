"""Shifted data: true labels where a task draws them, honest parts of the test split where it does not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from scm.trial import decode_split
from trainables.shifted import LEAST_ROWS, answer_split, make_shifted
from trainables.tasks.protocol import POLE_DISTANCE, TaskError, task_shifts
from trainables.tasks.registry import make_task
from trainables.tasks.rf_data import response
from trainables.tasks.rr_ik_data import damped_step
from trainables.trained import Trained, train_models

ROOT = Path(__file__).parents[2]
SPECS: dict[str, dict[str, Any]] = {
    "own_task:LensTask": {"params": {"rows": 90}, "base_dir": str(ROOT / "examples")},
    "dose": {"params": {"n_train": 200, "n_val": 60, "n_test": 200}, "base_dir": "."},
    "rf": {"params": {"n_train": 24, "n_val": 8, "n_test": 16}, "base_dir": "."},
    "rr_ik": {"params": {"n_train": 300, "n_val": 100, "n_test": 200}, "base_dir": "."},
    "table": {
        "params": {
            "data": "data/gbsg2.csv",
            "inputs": ["horTh", "age", "tsize", "pnodes"],
            "target": "time",
            "status": {"column": "cens", "values": {"1": "finite", "0": "censored_above"}},
        },
        "base_dir": str(ROOT),
    },
}
_trained: dict[str, Trained] = {}


def trained_of(name: str) -> Trained:
    """A model of one epoch, trained once."""
    if name not in _trained:
        spec = {"name": name, **SPECS[name]}
        (ended,) = train_models(spec, [("c-s3", {"max_epochs": 1, "hidden_width": 8}, 3)]).values()
        assert isinstance(ended, Trained), ended
        _trained[name] = ended
    return _trained[name]


@pytest.mark.parametrize("name", SPECS)
def test_every_task_has_the_three_shifts_and_begins_without(name: str) -> None:
    """Nearer to the pole, beyond the range, with noise; step 0 is not shifted and has no level."""
    shifted = make_shifted(trained_of(name))
    assert {item.shift for item in shifted} == {"near_pole", "longer_range", "noise"}
    assert {item.made_by for item in shifted} == {"data" if name == "table" else "task"}
    for shift in ("near_pole", "longer_range", "noise"):
        steps = [item for item in shifted if item.shift == shift]
        assert [item.step for item in steps] == list(range(len(steps)))
        assert [item.level is None for item in steps] == [True] + [False] * (len(steps) - 1)
        assert len(steps) >= 2


@pytest.mark.parametrize("name", SPECS)
def test_shifts_are_the_same_at_every_call(name: str) -> None:
    """Equal seeds give equal data."""
    one, other = make_shifted(trained_of(name)), make_shifted(trained_of(name))
    assert [item.split.digest() for item in one] == [item.split.digest() for item in other]


@pytest.mark.parametrize("name", [name for name in SPECS if name != "rf"])
def test_the_pole_comes_nearer_with_every_step(name: str) -> None:
    """The median distance of the rows that are no bottoms falls from step to step."""
    medians = []
    for item in make_shifted(trained_of(name)):
        if item.shift == "near_pole":
            distance = item.split.extras[POLE_DISTANCE]
            medians.append(float(distance[distance > 0].median()))
    assert medians == sorted(medians, reverse=True)


def test_shifted_labels_are_the_truth() -> None:
    """Arms, resonators, lenses and curves are labelled by their own equations, of inputs without noise."""
    for item in make_shifted(trained_of("rr_ik")):
        pose = item.split.extras["pose"].numpy()
        assert np.allclose(damped_step(pose[:, :2], pose[:, 2:]), item.split.extras["value"].numpy())
        assert np.abs(pose[:, 1]).max() <= np.pi
    for item in make_shifted(trained_of("rf")):
        if item.shift != "noise":
            h = response(*(10 ** item.split.inputs.numpy().astype(np.float64)).T)
            value = item.split.extras["value"].numpy()
            assert np.allclose(np.abs(h), np.linalg.norm(value, axis=1), rtol=2e-3)
            assert np.allclose(1 / np.abs(h), item.split.extras[POLE_DISTANCE], rtol=2e-3)
    for item in make_shifted(trained_of("dose")):
        inside = item.split.extras["label"] == 1
        assert bool(((item.split.extras[POLE_DISTANCE] > 0) <= inside).all())
    for item in make_shifted(trained_of("own_task:LensTask")):
        bottom = item.split.targets.mask_semantic
        assert torch.equal(bottom, item.split.extras[POLE_DISTANCE] < 0.05)


def test_the_rows_of_a_table_are_parts_of_its_test_split() -> None:
    """Hold-outs choose rows and change none; noise changes numbers of columns that have more than two."""
    trained = trained_of("table")
    test = trained.splits["test"]
    rows = {tuple(row) for row in test.inputs.tolist()}
    for item in make_shifted(trained):
        assert int(item.split.targets.mask_finite.sum()) >= LEAST_ROWS
        if item.shift == "noise":
            moved = (item.split.inputs != test.inputs).any(dim=0)
            two = torch.tensor([len(column.unique()) <= 2 for column in trained.splits["train"].inputs.T])
            assert bool((moved == (~two if item.step else torch.zeros_like(two))).all())
        else:
            assert {tuple(row) for row in item.split.inputs.tolist()} <= rows
        if item.shift == "near_pole":
            assert int(item.split.targets.mask_semantic.sum()) == int(test.targets.mask_semantic.sum())


@pytest.mark.parametrize("name", SPECS)
def test_a_model_is_scored_as_its_trial_was(name: str) -> None:
    """On the test split, coverage and errors are those of the trial's row."""
    trained = trained_of(name)
    answered = answer_split(trained, trained.splits["test"])
    for metric, value in answered.metrics.items():
        assert value == pytest.approx(trained.outcome[f"test_{metric}"], nan_ok=True), metric
    decoded = decode_split(trained.model, trained.splits["test"], tau_infer=trained.settings.tau_infer)
    assert np.array_equal(answered.bottom, decoded.bottom.reshape(len(decoded.bottom), -1).any(1).numpy())
    coverages = [coverage for coverage, _ in answered.curve]
    assert coverages == sorted(coverages, reverse=True)
    assert coverages[0] == pytest.approx(1.0)


def test_a_row_that_is_a_fault_is_the_least_certain() -> None:
    """NaN in an output is no large |Q|, and the curve never accepts it."""
    trained = trained_of("table")

    class Faulty(torch.nn.Module):
        def __init__(self, model: torch.nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            P, Q = self.model(inputs)[:2]
            return P, torch.where(torch.arange(len(Q)) == 2, torch.nan, Q)

    answered = answer_split(replace(trained, model=Faulty(trained.model)), trained.splits["test"])
    assert answered.certainty[2] == -1
    assert bool(answered.bottom[2])
    assert max(coverage for coverage, _ in answered.curve) < 1


def test_inputs_that_are_no_numbers_are_not_shifted() -> None:
    """There is the test split alone, said as such."""
    trained = trained_of("table")
    test = trained.splits["test"]
    whole = replace(
        trained, splits={**trained.splits, "test": replace(test, inputs=test.inputs.to(torch.int64))}
    )
    (only,) = make_shifted(whole)
    assert (only.shift, only.step, only.level, only.made_by) == ("none", 0, None, "data")


def test_a_task_without_the_method_has_no_shifts_of_its_own() -> None:
    """It is optional."""
    assert task_shifts(SimpleNamespace(name="plain"), 0, trained_of("table").splits["test"]) is None


SPLIT = make_task("own_task:LensTask", {"rows": 90}, ROOT / "examples").splits(0)["test"]
FAR = replace(SPLIT, extras={**SPLIT.extras, POLE_DISTANCE: -SPLIT.extras[POLE_DISTANCE]})


@pytest.mark.parametrize(
    "shifts, message",
    [
        ([SPLIT], "lens: shifts\\(seed\\) must return a mapping, got list"),
        ({"noise": []}, "must hold sequences of \\(level, Split\\), got noise=\\[\\]"),
        ({"noise": [SPLIT]}, "the shift 'noise' must hold pairs \\(level, Split\\)"),
        ({"noise": [(float("nan"), SPLIT)]}, "level of the shift 'noise' must be a finite number, got nan"),
        (
            {"noise": [(1, replace(SPLIT, inputs=SPLIT.inputs[:, :1]))]},
            "level 1 must have inputs as the test",
        ),
        ({"noise": [(1, replace(SPLIT, inputs=SPLIT.inputs / 0))]}, "must have finite inputs"),
        ({"near_pole": [(1, FAR)]}, "must have one pole_distance >= 0 a row"),
    ],
    ids=["list", "empty", "no pair", "level", "shape", "inputs", "distance"],
)
def test_what_is_no_shift_is_refused(shifts: Any, message: str) -> None:
    """One line that says what there must be, and what there is."""
    task = SimpleNamespace(name="lens", shifts=lambda seed: shifts)
    with pytest.raises(TaskError, match=message):
        task_shifts(task, 0, SPLIT)
