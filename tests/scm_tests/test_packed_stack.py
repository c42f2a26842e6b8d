"""Models as rows, and what makes two of them alike."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

from scm.models import make_model
from scm.packed.stack import Layout, fingerprint
from scm.trial_config import TrialConfig


class Scaled(nn.Module):
    """A model with a frozen parameter, a buffer, and a parameter without dimensions."""

    def __init__(self, power: float = 2.0) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.frozen = nn.Parameter(torch.ones(4), requires_grad=False)
        self.register_buffer("centre", torch.arange(3.0))
        self.power = power


def test_a_row_holds_every_trained_parameter_and_comes_back():
    model, other = Scaled(), Scaled()
    layout = Layout(model)
    assert layout.size == 3 * 2 + 2 + 1
    assert set(layout.fixed) == {"frozen", "centre"}
    layout.put_row(other, layout.row_of(model))
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


def test_views_show_the_rows_that_they_are_of():
    models = [Scaled() for _ in range(3)]
    layout = Layout(models[0])
    rows = torch.stack([layout.row_of(model) for model in models])
    views = layout.views(rows)
    assert views["linear.weight"].shape == (3, 2, 3)
    assert views["scale"].shape == (3,)
    for place, model in enumerate(models):
        assert torch.equal(views["linear.weight"][place], model.linear.weight)
    rows.zero_()
    assert all(bool((view == 0).all()) for view in views.values())


@pytest.mark.parametrize(
    ("model", "rule"),
    [
        (nn.ReLU(), "must have a parameter that requires gradients"),
        (nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2).double()]), "must have one dtype"),
    ],
)
def test_models_that_make_no_rows_are_refused(model, rule):
    with pytest.raises(ValueError, match=rule):
        Layout(model)


@pytest.mark.parametrize(
    "make",
    [
        Scaled,
        lambda: make_model(TrialConfig(), 5),
        lambda: make_model(TrialConfig(head="multihead", basis="chebyshev"), 5, 2),
        lambda: make_model(TrialConfig(head="tr_rational", lambda_tag=0.1), 5),
        lambda: nn.TransformerEncoderLayer(8, 2),
    ],
)
def test_models_that_differ_in_their_weights_alone_are_alike(make):
    assert fingerprint(make()) == fingerprint(make())
    assert hash(fingerprint(make())) == hash(fingerprint(make()))


class _Opaque:
    """Holds nothing that can be looked into."""

    __slots__ = ()


def _with(module: nn.Module, **held: object) -> nn.Module:
    for name, value in held.items():
        setattr(module, name, value)
    return module


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda: nn.Linear(2, 3), lambda: nn.Linear(2, 3, bias=False)),
        (lambda: nn.Linear(2, 3), lambda: nn.Linear(2, 4)),
        (lambda: nn.Linear(2, 3), lambda: nn.Linear(2, 3).double()),
        (lambda: nn.Dropout(0.1), lambda: nn.Dropout(0.2)),
        (lambda: nn.Sequential(nn.ReLU()), lambda: nn.Sequential(nn.Tanh())),
        (lambda: nn.Linear(2, 3), lambda: nn.Linear(2, 3).eval()),
        (lambda: Scaled(2.0), lambda: Scaled(2)),
        (
            lambda: make_model(TrialConfig(head="multihead", q_param="softplus", q_min=0.1), 5),
            lambda: make_model(TrialConfig(head="multihead", q_param="softplus", q_min=0.2), 5),
        ),
        (
            lambda: make_model(TrialConfig(tuple_norm="unit"), 5),
            lambda: make_model(TrialConfig(tuple_norm="none"), 5),
        ),
        (
            lambda: _with(nn.ReLU(), act=functools.partial(torch.clamp, min=0.0)),
            lambda: _with(nn.ReLU(), act=functools.partial(torch.clamp, min=1.0)),
        ),
        (lambda: _with(nn.ReLU(), act=lambda x: x), lambda: _with(nn.ReLU(), act=lambda x: -x)),
        (lambda: _with(nn.ReLU(), held=_Opaque()), lambda: _with(nn.ReLU(), held=_Opaque())),
        (lambda: _with(nn.ReLU(), held={"a": [1, 2]}), lambda: _with(nn.ReLU(), held={"a": [1, 3]})),
        (lambda: _with(nn.ReLU(), held=0.0), lambda: _with(nn.ReLU(), held=-0.0)),
    ],
)
def test_models_that_compute_something_else_are_not_alike(one, other):
    """What cannot be looked into is never taken for alike."""
    first, second = one(), other()
    assert fingerprint(first) != fingerprint(second)


def test_closures_are_told_apart_by_what_they_hold():
    def scaled(factor: float) -> nn.Module:
        return _with(nn.ReLU(), act=lambda x: factor * x)

    assert fingerprint(scaled(2.0)) == fingerprint(scaled(2.0))
    assert fingerprint(scaled(2.0)) != fingerprint(scaled(3.0))
