"""Steps that are shortened by curvature: how much, that nothing else moves, and what is said of it."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scm.training.loader import TensorBatches
from scm.training.safe_step import SafeStep, steepness
from scm.training.targets import lift_sentinel_targets
from scm.training.trainer import SCMTrainer, TrainingConfig


def f64(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


class Answers(nn.Module):
    """P = w and Q = q, whatever x is."""

    def __init__(self, q: float) -> None:
        super().__init__()
        self.w = nn.Parameter(f64([1.0, 2.0]))
        self.idle = nn.Parameter(f64([3.0]))
        self.q = q

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        P = self.w.sum() * torch.ones_like(x[:, 0])
        return P, torch.full_like(P, self.q)


def half_square(outputs: Any, lifted: Any) -> Tensor:
    return (outputs[0] - 1.0).square().mean() * 0.5


def trainer_of(
    q: float, *, rate: float = 0.1, adam: bool = False, steps: int = 2, off: bool = False, **safe: Any
) -> SCMTrainer:
    """A training of two steps an epoch; `safe` are the arguments of `SafeStep`, which `off` leaves out."""
    model = Answers(q)
    kind = torch.optim.Adam if adam else torch.optim.SGD
    optimizer = kind(model.parameters(), lr=rate)
    companions = [] if off else [SafeStep(optimizer, **safe)]
    rows = torch.zeros(4, 1, dtype=torch.float64)
    loader = TensorBatches(rows, lift_sentinel_targets(torch.ones(4, dtype=torch.float64)), 2)
    return SCMTrainer(
        model,
        optimizer,
        half_square,
        loader,
        config=TrainingConfig(max_epochs=steps, coverage_threshold=0.0),
        companions=companions,
    )


def test_steepness_is_that_of_the_answers_that_have_a_value():
    """(B / q_min)² (1 + y_max²); small and non-finite denominators have no value and do not count."""
    P = f64([1.0, -2.0, 5.0, math.nan, 1.0])
    Q = f64([0.5, -1.0, 1e-5, 1.0, math.inf])
    assert float(steepness(P, Q, tau=1e-3)) == pytest.approx(4.0 * 5.0)
    assert float(steepness(P, Q, tau=1e-3, basis_bound=3.0)) == pytest.approx(9 * 4.0 * 5.0)
    assert float(steepness(P[2:3], Q[2:3], tau=1e-3)) == 0.0


def test_one_denominator_may_serve_several_outputs():
    """Q (n,) beside P (n, outputs)."""
    assert float(steepness(f64([[1.0, 2.0]]), f64([0.5]), tau=0.1)) == pytest.approx(4.0 * 17.0)


@pytest.mark.parametrize("adam", [False, True])
def test_a_step_goes_the_share_that_curvature_allows(adam):
    """The weights go η_safe / η of the way that the optimizer would have gone, whichever it is."""
    full, short = (trainer_of(0.5, adam=adam, steps=1, off=off) for off in (True, False))
    for trainer in (full, short):
        trainer.train_loader = [next(iter(trainer.train_loader))]
        trainer.fit()
    begun = f64([1.0, 2.0])
    share = 1 / (0.1 * (4.0 * (1 + 36.0) + 1e-3))  # q = 0.5, y = 3 / 0.5
    way = full.model.w.detach() - begun
    torch.testing.assert_close(short.model.w.detach() - begun, share * way)
    assert short.telemetry()["step_share"] == pytest.approx(share)


def test_the_learning_rate_is_never_touched():
    """Nor the optimizer's moments: the base rate is there whenever curvature allows it again."""
    trainer = trainer_of(0.01, adam=True, steps=3)
    trainer.fit()
    assert trainer.optimizer.param_groups[0]["lr"] == 0.1
    assert [row["lr"] for row in trainer.train_history] == [0.1] * 3
    plain = trainer_of(0.01, adam=True, steps=1, off=True)
    plain.train_loader = [next(iter(plain.train_loader))]
    plain.fit()
    again = trainer_of(0.01, adam=True, steps=1)
    again.train_loader = [next(iter(again.train_loader))]
    again.fit()
    held = [next(iter(one.optimizer.state.values()))["exp_avg"] for one in (plain, again)]
    assert torch.equal(*held)


def test_training_never_stands_still():
    """However small a denominator is, a share of the step is left, and it is said that it was the floor."""
    for q in (0.0, 1e-4, 1e-3):
        trainer = trainer_of(q, floor=0.01)
        trainer.fit()
        assert not torch.equal(trainer.model.w.detach(), f64([1.0, 2.0])), q
        floored = trainer.telemetry()["step_floored"]
        assert floored == (1.0 if q >= 1e-4 else 0.0)  # Q = 0 has no value: it says nothing of curvature


def test_a_step_that_curvature_allows_is_the_optimizers_own():
    """Bit for bit."""
    plain, safe = trainer_of(10.0, adam=True, steps=3, off=True), trainer_of(10.0, adam=True, steps=3)
    plain.fit()
    safe.fit()
    assert torch.equal(plain.model.w, safe.model.w)
    assert safe.telemetry() == {"step_share": 1.0, "step_share_min": 1.0, "step_floored": 0.0}
    assert torch.equal(safe.model.idle.detach(), f64([3.0]))


def test_the_steepest_of_a_group_counts():
    """Under accumulation one step follows several micro-batches; the smallest denominator decides."""
    trainer = trainer_of(1.0)
    safe = SafeStep(trainer.optimizer, alpha=0.0)
    for q in (0.5, 2.0):
        outputs = (f64([0.0]), f64([q]))
        safe.after_backward(SimpleNamespace(outputs=outputs, found={}, facts={"tau": 0.1}))
    assert float(safe._allowed(1.0, torch.device("cpu"))) == pytest.approx(0.25)


def test_steps_shrink_in_the_epoch_after_too_many_answers_saturated():
    """The share is asked after the epoch, before it is cleared; below the bound, steps are full again."""
    said = iter([0.5, 0.1, 0.5])
    trainer = trainer_of(10.0, steps=3, basis_bound=None, saturated=lambda: next(said), shrink_by=0.25)
    shares = []
    for _ in trainer.epochs():
        shares.append(trainer.telemetry()["step_share"])
    assert shares == [1.0, 0.25, 1.0]


@pytest.mark.parametrize("stop_at", [1, 2, 3])
def test_it_resumes_in_mid_epoch(tmp_path, stop_at):
    """Weights and telemetry are those of a training that was never interrupted."""

    def make() -> SCMTrainer:
        return trainer_of(0.3, adam=True, steps=3, saturated=lambda: 1.0)

    whole = make()
    whole.config.log_hook = lambda record: (
        whole.save_checkpoint(tmp_path / "mid.pt") if record["step"] == stop_at else None
    )
    whole.fit()
    resumed = make()
    resumed.load_checkpoint(tmp_path / "mid.pt")
    resumed.fit()
    assert torch.equal(whole.model.w, resumed.model.w)
    assert whole.telemetry() == resumed.telemetry()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"basis_bound": 0.0}, "basis_bound must be finite and > 0, or None"),
        ({"alpha": -1.0}, "alpha must be finite and >= 0"),
        ({"floor": 0.0}, r"floor must be in \(0, 1\]"),
        ({"shrink_by": 2.0}, r"shrink_by must be in \(0, 1\]"),
        ({"shrink_above": math.nan}, r"shrink_above must be in \[0, 1\]"),
    ],
)
def test_safe_steps_refuse_what_they_cannot_do(arguments, message):
    """Each refusal names the rule and the value."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    with pytest.raises(ValueError, match=message):
        SafeStep(optimizer, **arguments)
