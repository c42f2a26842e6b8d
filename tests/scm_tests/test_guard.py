"""The gate before the weights: what is not finite changes nothing, and is counted."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scm.gradients import clip_by_norm, count_non_finite
from scm.training.guard import StepGuard
from scm.training.trainer import SCMTrainer, TrainingConfig

NAN, INF = float("nan"), float("inf")
CPU = torch.device("cpu")


class Line(nn.Module):
    """P = x . w, Q = 1; one weight for each of the two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.5, -0.5], dtype=torch.float64))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x @ self.w, torch.ones(len(x), dtype=x.dtype)


class HiddenGradient(torch.autograd.Function):
    """A finite value with a gradient that is not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return torch.full_like(gradient, NAN)


def fit_loss(outputs: tuple[Tensor, Tensor], lifted: tuple[Tensor, Tensor], *, inputs: Tensor) -> Tensor:
    """Squared error; the first input 100 spoils the gradient, 200 both, 300 the loss only."""
    P, Y = outputs[0], lifted[0]
    kind = inputs[0, 0].item()
    if kind == BAD["gradient"]:
        P = HiddenGradient.apply(P)
    value = (P - Y).square().mean()
    if kind == BAD["loss"]:
        value = value * INF
    return value.detach() * INF + 0 * P.mean() if kind == BAD["finite gradient of a bad loss"] else value


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, foreach=True),
    "fused adamw": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
}
GOOD = torch.tensor([[1.0, 2.0], [3.0, -1.0]], dtype=torch.float64)
BAD = {"gradient": 100.0, "loss": 200.0, "finite gradient of a bad loss": 300.0}


def batch(kind: float | None = None) -> tuple[Tensor, Tensor]:
    """Two rows; `kind` is one of BAD's values."""
    x = GOOD.clone()
    if kind is not None:
        x[0, 0] = kind
    return x, torch.tensor([1.0, -1.0], dtype=torch.float64)


def train(loader: list[Any], optimizer: str = "adam", **fields: Any) -> SCMTrainer:
    """Train on the batches; coverage stops nothing."""
    model = Line()
    config = TrainingConfig(**{"coverage_threshold": 0.0, **fields})
    trainer = SCMTrainer(model, OPTIMIZERS[optimizer](model.parameters()), fit_loss, loader, config=config)
    trainer.fit()
    return trainer


@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
@pytest.mark.parametrize("kind", sorted(BAD))
def test_a_bad_step_leaves_no_trace(optimizer: str, kind: str) -> None:
    """Weights and optimizer state are those of a training that never saw the bad batch."""
    spoiled = train([batch(), batch(BAD[kind]), batch()], optimizer)
    clean = train([batch(), batch()], optimizer)
    assert torch.equal(spoiled.model.w, clean.model.w)
    for one, other in zip(
        spoiled.optimizer.state_dict()["state"].values(),
        clean.optimizer.state_dict()["state"].values(),
        strict=True,
    ):
        assert all(torch.equal(torch.as_tensor(one[name]), torch.as_tensor(other[name])) for name in one)
    counted = "gradient" if kind == "gradient" else "loss"
    assert spoiled.nan_counts == {"loss": 0, "gradient": 0, "output": 0, "parameter": 0, counted: 1}
    assert spoiled.status == "completed"
    assert spoiled.optimizer_steps == 2


def test_a_bad_micro_batch_spoils_its_group_and_no_other() -> None:
    """The whole group is left out; the next one starts afresh."""
    spoiled = train([batch(), batch(BAD["loss"]), batch(), batch()], gradient_accumulation_steps=2)
    clean = train([batch(), batch()], gradient_accumulation_steps=2)
    assert torch.equal(spoiled.model.w, clean.model.w)
    assert spoiled.optimizer_steps == 1


@pytest.mark.parametrize("kind", sorted(BAD))
@pytest.mark.parametrize(("budget", "status"), [(2, "diverged"), (3, "completed")])
def test_more_than_the_budget_of_bad_steps_is_divergence(kind: str, budget: int, status: str) -> None:
    """With three bad steps a budget of two is exceeded at the third, in mid-epoch; three are within three."""
    trainer = train([batch(), *[batch(BAD[kind])] * 3, batch()], nonfinite_budget=budget, max_epochs=1)
    assert trainer.status == status
    if status == "diverged":
        assert trainer.global_step == 4
        assert trainer.stop_reason == "3 steps had a non-finite loss or gradient"
    assert bool(torch.isfinite(trainer.model.w).all())


def test_a_report_says_that_a_training_has_diverged() -> None:
    """The last report carries the status, the counts, and a loss over the finite batches alone."""
    model = Line()
    config = TrainingConfig(max_epochs=5, nonfinite_budget=0, coverage_threshold=0.0)
    loader = [batch(), batch(BAD["loss"])]
    trainer = SCMTrainer(model, OPTIMIZERS["sgd"](model.parameters()), fit_loss, loader, config=config)
    (report,) = trainer.epochs()
    assert report.status == "diverged"
    assert report.nan_counts["loss"] == 1
    assert math.isfinite(report.train["loss"])
    assert list(trainer.epochs()) == []


def test_a_skipped_step_does_not_move_the_scheduler() -> None:
    """One update in three is skipped: the schedule advances by two."""
    model = Line()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    loader = [batch(), batch(BAD["gradient"]), batch()]
    config = TrainingConfig(coverage_threshold=0.0)
    SCMTrainer(model, optimizer, fit_loss, loader, scheduler=scheduler, config=config).fit()
    assert optimizer.param_groups[0]["lr"] == 0.01 * 0.5**2


def test_weights_that_are_not_finite_end_the_training() -> None:
    """A finite gradient times a huge rate overflows: the epoch's end sees it, whatever the budget."""
    model = Line()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e308)
    config = TrainingConfig(max_epochs=3, nonfinite_budget=1000, coverage_threshold=0.0, val_loader=[batch()])
    trainer = SCMTrainer(model, optimizer, fit_loss, [batch()], config=config)
    (report,) = trainer.epochs()
    assert (report.status, report.val) == ("diverged", None)
    assert report.nan_counts["parameter"] == 2
    assert trainer.stop_reason == "2 parameters are not finite"
    assert trainer.nan_origin == "parameter w, after micro-batch 1"


def test_outputs_that_are_not_finite_are_counted_in_training_and_validation() -> None:
    """One sample a row with a non-finite P or Q, whatever the loss makes of it."""
    x, y = batch()
    x[1, 0] = INF

    def careful(outputs: tuple[Tensor, Tensor], lifted: tuple[Tensor, Tensor]) -> Tensor:
        return (outputs[0][:1] - lifted[0][:1]).square().mean()

    model = Line()
    config = TrainingConfig(coverage_threshold=0.0, max_epochs=2, val_loader=[(x, y)])
    trainer = SCMTrainer(model, OPTIMIZERS["sgd"](model.parameters()), careful, [(x, y)], config=config)
    reports = list(trainer.epochs())
    assert [report.nan_counts["output"] for report in reports] == [2, 4]
    assert reports[-1].train["coverage"] == 0.5


# --- the guard itself ----------------------------------------------------------------------------


def make_guard(parameters: list[nn.Parameter], **more: Any) -> StepGuard:
    """A guard of SGD at rate 1."""
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    settings = {"clip_norm": None, "scaler": None, "host_must_know": False, **more}
    return StepGuard(optimizer, CPU, **settings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_gradients_are_divided_by_the_groups_weight(dtype: torch.dtype) -> None:
    """In the dtype of the gradients, not in float32."""
    parameter = nn.Parameter(torch.zeros(2, dtype=dtype))
    parameter.grad = torch.tensor([1.0, 0.3], dtype=dtype)
    expected = -parameter.grad.clone() / 3
    assert make_guard([parameter]).step([parameter], 3.0) is True
    assert torch.equal(parameter.detach(), expected)


def test_parameters_of_several_dtypes_are_checked_together() -> None:
    """A bad gradient in one dtype keeps the step of all others back."""
    parameters = [nn.Parameter(torch.zeros(2, dtype=dtype)) for dtype in (torch.float32, torch.float64)]
    for parameter, value in zip(parameters, (1.0, NAN), strict=True):
        parameter.grad = torch.full_like(parameter, value)
    guard = make_guard(parameters)
    assert guard.step(parameters, 1.0) is False
    assert guard.skips() == {"loss": 0, "gradient": 1}
    assert all(bool((parameter == 0).all()) for parameter in parameters)


@pytest.mark.parametrize("largest", [1e30, 3e38])
def test_gradients_that_are_large_but_finite_pass(largest: float) -> None:
    """The check looks at values, not at a norm that overflows."""
    parameter = nn.Parameter(torch.zeros(3))
    parameter.grad = torch.full((3,), largest)
    assert make_guard([parameter]).step([parameter], 1.0) is True


def test_clipping_takes_large_norms_without_overflow() -> None:
    """Gradients whose squares overflow are clipped to the limit, not to zero or nan."""
    gradients = [torch.full((2,), 1e25), torch.full((2,), 1e25, dtype=torch.float64)]
    clip_by_norm(gradients, 2.0)
    for gradient in gradients:
        assert gradient.tolist() == pytest.approx([1.0, 1.0])


def test_small_gradients_are_not_scaled_up() -> None:
    """Below the limit nothing changes, bit for bit; zeros stay zeros."""
    gradients = [torch.tensor([0.1, 0.2]), torch.zeros(2)]
    expected = [gradient.clone() for gradient in gradients]
    clip_by_norm(gradients, 2.0)
    assert all(torch.equal(*pair) for pair in zip(gradients, expected, strict=True))


def test_a_scale_that_was_too_large_is_not_the_models_fault() -> None:
    """Under a GradScaler an overflow lowers the scale, is counted apart, and the next step is taken."""
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    guard = StepGuard(optimizer, CPU, clip_norm=None, scaler=scaler, host_must_know=False)
    scaler.scale(parameter.sum()).backward()
    parameter.grad.fill_(INF)
    assert guard.step([parameter], 1.0) is False
    assert (guard.skips(), guard.scale_skips, scaler.get_scale()) == ({"loss": 0, "gradient": 0}, 1, 2.0**15)
    parameter.grad = None
    scaler.scale(3 * parameter.sum()).backward()
    assert guard.step([parameter], 1.0) is True
    assert parameter.item() == -3.0


def test_at_the_smallest_scale_a_bad_gradient_counts() -> None:
    """What no scale can save is the model's fault, and so is a loss that is not finite."""
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    guard = StepGuard(optimizer, CPU, clip_norm=1.0, scaler=scaler, host_must_know=False)
    scaler.scale(parameter.sum()).backward()
    parameter.grad.fill_(NAN)
    assert guard.step([parameter], 1.0) is False
    assert guard.skips() == {"loss": 0, "gradient": 1}
    assert guard.watch_loss(torch.tensor(NAN)) is False
    parameter.grad = torch.ones(1)
    assert guard.step([parameter], 1.0) is False
    assert guard.skips() == {"loss": 1, "gradient": 1}
    assert parameter.item() == 0.0


def test_an_optimizer_that_skips_by_itself_needs_no_answer() -> None:
    """The way of fused optimizers on CUDA, run on the CPU: the flag stays there, nothing is stepped."""
    parameter = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.AdamW([parameter], lr=0.5, fused=True)
    guard = StepGuard(optimizer, CPU, clip_norm=1.0, scaler=None, host_must_know=False)
    guard.waits = False
    before = None
    for values in ([1.0, 1.0], [1.0, NAN], [1.0, INF]):
        parameter.grad = torch.tensor(values)
        assert guard.step([parameter], 1.0) is None
        before = parameter.detach().clone() if before is None else before
    assert torch.equal(parameter.detach(), before)
    guard.watch_loss(torch.tensor(NAN))
    parameter.grad = torch.ones(2)
    guard.step([parameter], 1.0)
    assert torch.equal(parameter.detach(), before)
    assert optimizer.state[parameter]["step"].item() == 1
    assert guard.skips() == {"loss": 1, "gradient": 2}
    parameter.grad = torch.ones(2)
    guard.step([parameter], 1.0)
    assert not torch.equal(parameter.detach(), before)
    assert not hasattr(optimizer, "found_inf")


def test_values_that_are_not_finite_are_counted() -> None:
    """Each of them, over all tensors."""
    assert count_non_finite([torch.tensor([1.0, NAN]), torch.tensor([[INF, -INF]])]) == 3
    assert count_non_finite([]) == 0
