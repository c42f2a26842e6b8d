"""The objective over whole models: many trials as one, and rows that are bad."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, stack_module_state, vmap

from scm.autodiff.policies import POLICY_CODES, GradientPolicy, gradient_policy
from scm.losses.training import LossConfig, SCMTrainingLoss
from scm.models import make_model
from scm.seeding import seeded_init
from scm.training.objective import FITS, ProjectiveObjective
from scm.training.targets import SemanticTargets, lift_semantic_targets
from scm.trial_config import TrialConfig

ALL = list(GradientPolicy)
# One value a trial.
TAUS = torch.tensor([0.1, 0.3, 0.5, 0.7], dtype=torch.float64)
TARGETS = torch.tensor([0.5, 0.8, 0.95, 1.0], dtype=torch.float64)
WEIGHTS = torch.tensor([0.5, 20.0, 40.0, 80.0], dtype=torch.float64)
READS = ("item", "tolist", "__bool__", "__float__", "__int__", "cpu", "numpy")


def make_rows() -> tuple[Tensor, SemanticTargets]:
    """Inputs and targets of every status."""
    drawn = torch.Generator().manual_seed(1)
    x = torch.randn(28, 3, dtype=torch.float64, generator=drawn)
    return x, lift_semantic_targets(3 * x.sum(1), torch.arange(28) % 7)


def make_models(head: str) -> list[torch.nn.Module]:
    models = []
    for seed in range(len(ALL)):
        with seeded_init(seed, "init"):
            models.append(make_model(TrialConfig(head=head, hidden_width=6, dtype="float64"), 3))
    return models


def objective_of(fit: str, coverage_term: str, target: Any) -> ProjectiveObjective:
    config = LossConfig(coverage_term=coverage_term, target_coverage=target, tau_bottom=0.05, tau_finite=0.6)
    return ProjectiveObjective(SCMTrainingLoss(config), fit=fit)


def weights_of(weight: Any) -> dict[str, Any]:
    return dict.fromkeys(("fit", "margin", "sign", "rejection", "push_down", "push_up"), weight)


@pytest.mark.parametrize("head", ["pattern", "multihead", "angular"])
@pytest.mark.parametrize("coverage_term", ["soft", "hard"])
@pytest.mark.parametrize("fit", FITS)
def test_a_stack_of_trials_trains_each_as_if_alone(
    fit: str, coverage_term: str, head: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Thresholds, targets, weights and policies of their own, in one vmap(grad) that reads no value back."""
    models, (x, targets) = make_models(head), make_rows()
    lifted = (targets.Y_n, targets.Y_d)
    stacked, _ = stack_module_state(models)
    codes = torch.tensor([POLICY_CODES[policy] for policy in ALL])

    def loss(parameters: Any, tau: Tensor, target: Tensor, weight: Tensor, code: Tensor) -> Tensor:
        with gradient_policy(code, tau=tau):
            outputs = functional_call(models[0], parameters, (x,))
            objective = objective_of(fit, coverage_term, target)
            return objective(
                outputs, lifted, tau=tau, semantic_targets=targets, loss_weights=weights_of(weight)
            )

    with monkeypatch.context() as patched:
        for name in READS:
            patched.setattr(Tensor, name, _refused(name))
        gradients = vmap(grad(loss))(stacked, TAUS, TARGETS, WEIGHTS, codes)

    for k, model in enumerate(models):
        tau, target, weight = (column[k].item() for column in (TAUS, TARGETS, WEIGHTS))
        with gradient_policy(ALL[k], tau=tau):
            objective_of(fit, coverage_term, target)(
                model(x), lifted, tau=tau, semantic_targets=targets, loss_weights=weights_of(weight)
            ).backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(gradients[name][k], parameter.grad, rtol=1e-9, atol=1e-11)


def _refused(name: str) -> Callable[..., Any]:
    def read(*_: Any, **__: Any) -> Any:
        raise AssertionError(f"Tensor.{name} reads a value back")

    return read


@pytest.mark.parametrize("around", ["forward", "backward"])
def test_policies_act_on_a_fit_of_ones_own(around: str) -> None:
    """Four policies are four gradients of a plain function, wherever the context stands."""

    def squared(P: Tensor, Q: Tensor, Y_n: Tensor, Y_d: Tensor, mask: Tensor | None) -> Tensor:
        return 10 * (P * Y_d - Q * Y_n).square().sum()

    Y_n, Y_d = torch.tensor([1.0, 2.0, -3.0]), torch.ones(3)
    objective = ProjectiveObjective(SCMTrainingLoss(), fit=squared)
    found = {}
    for policy in ALL:
        P = torch.tensor([1.0, 0.02, 0.01], requires_grad=True)
        Q = torch.tensor([0.5, 0.01, -0.01], requires_grad=True)
        with gradient_policy(policy) if around == "forward" else contextlib.nullcontext():
            loss = objective((P, Q), (Y_n, Y_d), tau=0.1, loss_weights={"margin": 0.0, "sign": 0.0})
        with gradient_policy(policy):
            loss.backward()
        assert P.grad is not None
        found[policy] = P.grad.tolist()
    full = found[GradientPolicy.PASSTHROUGH]
    assert full[0] == 10.0
    assert full[2] != 0
    assert found[GradientPolicy.CLAMP] == [1.0, 0.0, 0.0]
    assert found[GradientPolicy.PROJECT] == [full[0], 0.0, 0.0]
    assert found[GradientPolicy.REJECT] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("member", ["P", "Q"])
@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_bad_row_leaves_the_others_gradients_as_they_were(
    dtype: torch.dtype, fit: str, member: str, bad: float
) -> None:
    """Every other row's gradient is the same to the bit, whatever the bad row's status."""
    targets = lift_semantic_targets(torch.linspace(-2, 2, 14, dtype=dtype), torch.arange(14) % 7)
    objective = objective_of(fit, "hard", 0.95)

    def gradients(row: int | None) -> Tensor:
        pair = {"P": torch.linspace(1, -1, 14, dtype=dtype), "Q": torch.linspace(-0.1, 0.5, 14, dtype=dtype)}
        if row is not None:
            pair[member][row] = bad
        P, Q = (x.requires_grad_() for x in pair.values())
        objective(
            (P, Q),
            (targets.Y_n, targets.Y_d),
            tau=0.1,
            semantic_targets=targets,
            loss_weights=weights_of(1.0),
        ).backward()
        assert P.grad is not None
        assert Q.grad is not None
        return torch.stack((P.grad, Q.grad))

    clean = gradients(None)
    for row in range(7):
        others = torch.arange(14) != row
        assert torch.equal(gradients(row)[:, others], clean[:, others])
