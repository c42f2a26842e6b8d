"""Domain shift of trained models: rows for every level, whatever a task does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness.robustness.shift import measure_shift
from reports.robustness_shift import SHIFT_COLUMNS, read_shift, write_shift
from trainables.tasks.registry import make_task
from trainables.trained import Trained, make_trained, train_models

EXAMPLES = Path(__file__).parents[2] / "examples"
SPEC = {"name": "own_task:LensTask", "params": {"rows": 90}, "base_dir": str(EXAMPLES)}
TAU = 0.05


class Lens(nn.Module):
    """The lens equation itself: P = d, Q = (d - f), to unit length; exact, with its pole where it is."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        distance, focal = inputs.unbind(-1)
        p, q = nn.functional.normalize(torch.stack([distance, distance - focal], dim=-1), dim=-1).unbind(-1)
        return p, q


@pytest.fixture(scope="module")
def trained() -> Trained:
    """A model of one epoch; tests put others in its place."""
    (ended,) = train_models(
        SPEC, [("c0-s0", {"max_epochs": 1, "tau_infer": TAU, "tau_train_min": TAU, "tau_train_max": TAU}, 0)]
    ).values()
    assert isinstance(ended, Trained)
    return ended


def by_place(rows: list[dict[str, Any]]) -> Mapping[tuple[str, int], dict[str, Any]]:
    return {(row["shift"], row["step"]): row for row in rows}


def test_the_right_model_abstains_near_the_pole_and_not_elsewhere(trained: Trained) -> None:
    """Its |Q| orders rows as their distance does, bottoms are where they are labelled, at every level."""
    rows = by_place(measure_shift({"c0-s0": replace(trained, model=Lens())}))
    for (shift, _), row in rows.items():
        if shift != "noise":
            assert row["pole_correlation"] > 0.7 or row["near_rows"] == row["rows"]
            assert row["bottoms_far"] in (None, 0.0)
            assert row["bottom_auc"] in (None, pytest.approx(1.0, abs=0.02))
            assert row["accepted_error"] < 1e-3
    assert rows["near_pole", 3]["coverage"] < 0.5 < rows["near_pole", 0]["coverage"]
    assert rows["longer_range", 3]["coverage"] == 1.0
    assert rows["longer_range", 3]["labelled_bottom"] == 0
    assert rows["noise", 3]["charged_error"] > rows["noise", 1]["charged_error"] > 0


def test_a_model_that_never_abstains_is_told_from_one_that_does(trained: Trained) -> None:
    """With |Q| the same everywhere, abstention is in no place: half of all pairs are in the wrong order."""

    class Constant(Lens):
        def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
            return inputs[:, 0], torch.ones(len(inputs))

    rows = by_place(measure_shift({"c0-s0": replace(trained, model=Constant())}))
    first = rows["near_pole", 0]
    assert first["bottom_auc"] == 0.5
    assert (first["coverage"], first["bottoms_near"], first["false_accept_rate"]) == (1.0, 0.0, 1.0)
    assert first["pole_correlation"] != first["pole_correlation"]
    assert len(first["curve_coverage"]) == 1


def test_every_row_fits_the_schema(trained: Trained, tmp_path: Path) -> None:
    """Rows are written and read back; each has its config, trial, model and seed."""
    rows = measure_shift({"c0-s0": trained})
    write_shift(tmp_path, rows)
    table = read_shift(tmp_path)
    assert table.column_names == [column.name for column in SHIFT_COLUMNS]
    assert {row["config_id"] for row in rows} == {"c0"}
    assert {row["model_digest"] for row in rows} == {trained.digest}
    assert len(rows) == 12


def test_a_task_that_raises_leaves_a_row_and_the_other_models(trained: Trained) -> None:
    """A shift that cannot be drawn, and a level that cannot be scored, say why; the rest is measured."""
    no_shifts = make_task(SPEC["name"], SPEC["params"], EXAMPLES)
    no_shifts.shifts = lambda seed: 1 / 0  # type: ignore[attr-defined]
    no_scores = make_task(SPEC["name"], SPEC["params"], EXAMPLES)
    scored = no_scores.metrics

    def metrics(decoded: Any, split: Any, config: Any) -> dict[str, float]:
        if len(split) == 300 and bool(split.inputs[:, 0].max() > 20):
            raise RuntimeError("too far")
        return scored(decoded, split, config)

    no_scores.metrics = metrics  # type: ignore[method-assign]
    said: list[str] = []
    rows = measure_shift(
        {"a-s0": replace(trained, task=no_shifts), "b-s0": replace(trained, task=no_scores), "c-s0": trained},
        on_model=said.append,
    )
    assert said == ["a-s0", "b-s0", "c-s0"]
    (only,) = [row for row in rows if row["config_id"] == "a"]
    assert "ZeroDivisionError" in only["error"]
    wrong = [(row["shift"], row["step"]) for row in rows if row["config_id"] == "b" and row["error"]]
    assert wrong == [("longer_range", 3)]
    assert not any(row["error"] for row in rows if row["config_id"] == "c")


def test_the_same_model_has_the_same_rows(trained: Trained) -> None:
    """Built anew from its weights, it is measured alike, bit for bit."""
    again = make_trained(SPEC, trained.config, trained.seed, trained.model.state_dict())
    assert repr(measure_shift({"c0-s0": trained})) == repr(measure_shift({"c0-s0": again}))
