"""New rows beside poles: where poles are seen, which points become due and when, and how it resumes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scm.training.loader import TensorBatches
from scm.training.near_pole import NearPoleBatches, NearPoleFeedback
from scm.training.pole_exploration import ExplorationConfig, ExploringBatches, PoleExploration, find_poles
from scm.training.sampler import AdaptiveSamplerConfig
from scm.training.targets import SemanticTargets, lift_semantic_targets
from scm.training.trainer import SCMTrainer, TrainingConfig

POLE = 0.3


def label(points: Tensor) -> SemanticTargets:
    """y = 1 / (x - 0.3)."""
    x = points.flatten()
    return lift_semantic_targets(1 / (x - POLE), torch.zeros(len(x), dtype=torch.int64))


def grid(rows: int = 21) -> tuple[Tensor, SemanticTargets]:
    x = torch.linspace(-1, 1, rows, dtype=torch.float64)[:, None]
    return x, label(x)


def answered(exploration: PoleExploration, x: list[float], q: list[float], epoch: int) -> None:
    """One epoch of one micro-batch with these denominators."""
    inputs, sizes = torch.tensor(x), torch.tensor(q)
    exploration.begin_epoch(epoch, {})
    exploration.after_backward(
        SimpleNamespace(fed=SimpleNamespace(inputs=inputs[:, None]), outputs=(sizes, sizes), found={})
    )
    exploration.after_epoch(SimpleNamespace(epoch=epoch))


def test_a_stretch_of_small_denominators_is_one_pole():
    """The smallest of each stretch, in any order of the inputs; two that are near each other are one."""
    x = torch.tensor([0.4, 0.0, 0.1, 0.2, 0.3, 0.5, 0.8, 0.6, 0.9, 0.95])
    q = torch.tensor([0.5, 0.09, -0.02, 0.05, 0.5, 0.01, 0.08, 0.6, 0.3, 0.03])
    found = find_poles(x, q.abs(), threshold=0.1, radius=0.1)
    assert found == pytest.approx([0.1, 0.5, 0.8, 0.95])
    found = find_poles(x, q.abs(), threshold=0.1, radius=0.2)
    assert found == pytest.approx([0.1, 0.5, 0.95])
    assert find_poles(x, q.abs(), threshold=1e-3, radius=0.1) == []


def test_a_pole_is_explored_in_the_epochs_after_it_was_found():
    """On both sides, for so many epochs; a pole that is known is not found anew beside itself."""
    exploration = PoleExploration(label, ExplorationConfig(radius=0.05, epochs=2))
    seen = []
    for epoch in range(5):
        q = [0.01, 0.9] if epoch < 1 else [0.9, 0.9]
        answered(exploration, [0.3, 0.8], q, epoch)
        exploration.begin_epoch(epoch + 1, {})
        seen.append(exploration.points())
        assert exploration.telemetry() == {"poles_explored": float(bool(seen[-1]))}
    assert seen[0] == pytest.approx([0.25, 0.35])
    assert seen[1] == seen[0]
    assert seen[2:] == [[], [], []]


def test_exploration_ends_with_the_transition():
    """From `until_epoch` on nothing is explored, whatever is found."""
    exploration = PoleExploration(label, ExplorationConfig(epochs=5, until_epoch=2))
    due = []
    for epoch in range(4):
        answered(exploration, [0.3], [0.0], epoch)
        exploration.begin_epoch(epoch + 1, {})
        due.append(len(exploration.points()))
    assert due == [2, 0, 0, 0]


class Line(nn.Module):
    """P = a, Q = b (x - 0.28)."""

    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
        self.q = nn.Parameter(torch.tensor([0.6, -0.168], dtype=torch.float64))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.flatten()
        return self.p.expand_as(x), self.q[0] * x + self.q[1]


def cross(outputs: Any, lifted: Any) -> Tensor:
    (P, Q), (Y_n, Y_d) = outputs, lifted
    return (P * Y_d - Q * Y_n).square().mean()


def training(
    near_pole: bool = False, *, epochs: int = 5, log_hook: Any = None
) -> tuple[SCMTrainer, PoleExploration]:
    exploration = PoleExploration(label, ExplorationConfig(epochs=2, radius=0.02))
    rows: Any = TensorBatches(*grid(), 4, generator=torch.Generator().manual_seed(0))
    companions: list[Any] = [exploration]
    if near_pole:
        rows = NearPoleBatches(*grid(), AdaptiveSamplerConfig(batch_size=4))
        companions.append(NearPoleFeedback(rows))
    model = Line()
    trainer = SCMTrainer(
        model,
        torch.optim.SGD(model.parameters(), lr=0.02),
        cross,
        ExploringBatches(rows, exploration),
        config=TrainingConfig(max_epochs=epochs, coverage_threshold=0.0, log_hook=log_hook),
        companions=companions,
    )
    return trainer, exploration


def test_points_beside_the_pole_are_trained():
    """An epoch after a pole was found has one batch more: both its sides, with the function's own values."""
    trainer, _ = training(epochs=2)
    batches = [report.bench["batches"] for report in trainer.epochs()]
    assert batches == [6, 7]
    found = [batch for batch in trainer.train_loader if len(batch) == 3]
    assert len(found) == 1
    points, targets, _ = found[0]
    assert points.shape == (2, 1)
    assert (points - POLE).abs().max() < 0.1
    assert torch.equal(targets.Y_n, label(points).Y_n)


@pytest.mark.parametrize("near_pole", [False, True])
@pytest.mark.parametrize("stop_at", [2, 6, 12, 13, 14, 19])
def test_a_training_resumes_bit_for_bit_in_mid_epoch(tmp_path, stop_at, near_pole):
    """Also where the loader's rows are through and the points are next, or the last point was trained."""

    def save(record: Any) -> None:
        if record["step"] == stop_at:
            whole.save_checkpoint(tmp_path / "mid.pt")

    whole, _ = training(near_pole, log_hook=save)
    whole.fit()
    resumed, _ = training(near_pole)
    resumed.load_checkpoint(tmp_path / "mid.pt")
    resumed.fit()
    assert torch.equal(resumed.model.q, whole.model.q)
    assert resumed.train_history == whole.train_history
    assert [bench["batches"] for bench in whole.bench_history][1] == 7


def test_inputs_of_several_numbers_are_refused():
    """There a pole has no two sides; near-pole sampling is for them."""
    exploration = PoleExploration(label)
    x = torch.zeros(3, 2)
    with pytest.raises(ValueError, match="poles can be explored where a row is one number"):
        exploration.after_backward(
            SimpleNamespace(fed=SimpleNamespace(inputs=x), outputs=(x[:, 0], x[:, 0]), found={})
        )


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"radius": 0.0}, "radius must be finite and > 0"),
        ({"threshold": float("nan")}, "threshold must be finite and > 0"),
        ({"epochs": 0}, "epochs must be >= 1"),
        ({"until_epoch": -1}, "until_epoch must be >= 0, or None"),
    ],
)
def test_exploration_refuses_what_it_cannot_do(fields, message):
    """Each refusal names the rule and the value."""
    with pytest.raises(ValueError, match=message):
        ExplorationConfig(**fields)
