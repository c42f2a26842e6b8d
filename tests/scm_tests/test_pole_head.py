"""The head that scores poles: its shapes and settings, and that it is trained."""

from __future__ import annotations

import math

import pytest
import torch
from torch.func import functional_call, grad, stack_module_state, vmap

from scm.layers.pole_head import ACTIVATIONS, PoleHead, PoleHeadConfig
from scm.losses.pole import pole_loss, pole_targets


def head(input_dim=1, seed=0, **settings):
    torch.manual_seed(seed)
    return PoleHead(input_dim, PoleHeadConfig(**settings)).double()


def features(*shape, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1


@pytest.mark.parametrize("shape", [(1,), (7, 1), (0, 1), (2, 3, 1)])
@pytest.mark.parametrize("use_basis", [True, False])
def test_a_logit_comes_out_for_every_row_of_features(shape, use_basis):
    """(..., input_dim) gives (...), for one feature and for several."""
    assert head(use_basis=use_basis)(features(*shape)).shape == shape[:-1]
    wide = torch.cat([features(*shape)] * 4, dim=-1)
    assert head(4, use_basis=use_basis)(wide).shape == shape[:-1]


def test_every_weight_is_a_parameter_and_training_moves_it():
    """The head's weights are in parameters(), get a gradient, and learn where a known pole is."""
    model = head(use_residual=True)
    names = {"hidden.weight", "hidden.bias", "out.weight", "out.bias", "residual.weight"}
    assert {name for name, _ in model.named_parameters()} == names
    x = features(64, 1)
    targets = pole_targets(x[:, 0], q_abs=(x[:, 0] - 0.4).abs(), proximity_threshold=0.2)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        loss = pole_loss(model(x), targets)
        loss.backward()
        assert all((parameter.grad != 0).all() for parameter in model.parameters())
        optimizer.step()
    moved = zip(before, model.parameters(), strict=True)
    assert all((old != new).all() for old, new in moved)
    told = torch.sigmoid(model(torch.tensor([[-0.8], [0.0], [0.4], [0.9]], dtype=torch.float64)))
    assert (told > 0.5).tolist() == [False, False, True, False]


@pytest.mark.parametrize(
    "setting, values",
    [
        ("use_basis", (True, False)),
        ("basis_degree", (2, 3)),
        ("domain", ((-1.0, 1.0), (0.0, 1.0))),
        ("activation", tuple(ACTIVATIONS)),
        ("hidden_dim", (8, 16)),
        ("use_residual", (True, False)),
        ("dropout_rate", (0.0, 0.5)),
    ],
)
def test_every_setting_of_the_network_changes_it(setting, values):
    """From one seed, two values give different answers in training."""
    x = features(9, 1)
    answers = []
    for value in values:
        model = head(**{setting: value})
        torch.manual_seed(7)
        answers.append(model(x))
    assert all(not torch.equal(answers[0], other) for other in answers[1:])


def test_scores_are_probabilities_unless_the_config_says_otherwise():
    """`score` is σ of the logit, or the logit."""
    x = features(5, 1)
    assert torch.equal(head().score(x), torch.sigmoid(head()(x)))
    assert torch.equal(head(normalize_output=False).score(x), head()(x))


def test_the_loss_of_the_head_follows_its_config():
    """Threshold, teacher's weight and normalisation are those of the config; without sources it is 0."""
    x, q_abs = features(8, 1), torch.linspace(0.0, 0.7, 8, dtype=torch.float64)
    teacher = torch.tensor([1.0, math.nan] * 4, dtype=torch.float64)
    for settings in ({}, {"teacher_weight": 0.8}, {"proximity_threshold": 0.35}, {"normalize_output": False}):
        model = head(**settings)
        told = {
            name: settings[name] for name in ("teacher_weight", "proximity_threshold") if name in settings
        }
        expected = pole_loss(
            model(x),
            pole_targets(x[:, 0], teacher=teacher, q_abs=q_abs, **told),
            form="squared",
            normalize_output=settings.get("normalize_output", True),
        )
        assert torch.equal(model.loss(x, teacher=teacher, q_abs=q_abs, form="squared"), expected)
    assert head().loss(x).item() == 0.0
    assert head().loss(x, tags=torch.ones(8)).item() > 0.0


def test_regularisation_is_half_the_squares_of_the_weights_without_the_biases():
    """weight_decay/2·Σw² over all linear maps; 0 without weight decay."""
    model = head(use_residual=True, weight_decay=0.3)
    weights = (model.hidden.weight, model.out.weight, model.residual.weight)
    expected = 0.15 * sum(weight.square().sum().item() for weight in weights)
    assert model.regularisation().item() == pytest.approx(expected)
    model.regularisation().backward()
    assert torch.allclose(model.out.weight.grad, 0.3 * model.out.weight)
    assert model.out.bias.grad is None
    assert head(weight_decay=0.0).regularisation().item() == 0.0


@pytest.mark.parametrize("settings", [{}, {"use_basis": False, "use_residual": True, "activation": "silu"}])
def test_gradients_are_those_of_finite_differences(settings):
    """By features and by weights."""
    model = head(2, **settings)
    params = dict(model.named_parameters())
    inputs = (features(3, 2).requires_grad_(), *params.values())
    assert torch.autograd.gradcheck(
        lambda x, *weights: functional_call(model, dict(zip(params, weights, strict=True)), (x,)), inputs
    )


@pytest.mark.parametrize("use_basis", [True, False])
def test_heads_stack_and_vectorise(use_basis):
    """A vmapped stack gives the logits and gradients of each head alone, and has no buffers."""
    models = [head(3, seed, use_basis=use_basis) for seed in range(3)]
    x = features(4, 3)
    params, buffers = stack_module_state(models)
    assert not buffers
    grads = vmap(grad(lambda p: functional_call(models[0], p, (x,)).square().sum()))(params)
    for k, model in enumerate(models):
        model(x).square().sum().backward()
        for name, parameter in model.named_parameters():
            assert torch.allclose(grads[name][k], parameter.grad), name


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: PoleHead(0), "input_dim must be >= 1"),
        (lambda: PoleHeadConfig(hidden_dim=0), "hidden_dim must be >= 1"),
        (lambda: PoleHeadConfig(basis_degree=0), "basis_degree must be >= 1"),
        (lambda: PoleHeadConfig(activation="gelu"), "activation must be one of tanh, relu, silu"),
        (lambda: PoleHeadConfig(dropout_rate=1.0), r"dropout_rate must be in \[0, 1\)"),
        (lambda: PoleHeadConfig(teacher_weight=1.5), r"teacher_weight must be in \[0, 1\]"),
        (lambda: PoleHeadConfig(proximity_threshold=0.0), "proximity_threshold must be finite and > 0"),
        (lambda: PoleHeadConfig(weight_decay=math.nan), "weight_decay must be finite and >= 0"),
        (lambda: PoleHeadConfig(domain=(1.0, -1.0)), "domain must be two finite numbers"),
        (lambda: PoleHead(2)(torch.ones(3, 1)), "last dimension of features must be 2"),
    ],
)
def test_bad_arguments_are_refused(build, message):
    """Each refusal names the rule and the value."""
    with pytest.raises(ValueError, match=message):
        build()
