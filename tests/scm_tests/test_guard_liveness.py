"""Weights that act are told from weights that are read and then dropped on the way."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from scm.guards.liveness import dead_weights, weight_liveness

X = torch.linspace(-1.0, 1.0, 8, dtype=torch.float64)[:, None]


def make_model() -> nn.Linear:
    model = nn.Linear(1, 1).double()
    with torch.no_grad():
        model.weight.fill_(0.7)
        model.bias.fill_(-0.2)
    return model


TERMS = {
    "fit": lambda out: (out - 1.0).square().mean(),
    "spread": lambda out: torch.relu(2.0 - out.std()),
    "measured": lambda out: (out.detach() > 0).double().mean(),
    "dropped": lambda out: 0.0 * out.sum(),
}


def evaluate(model: nn.Module, weights: dict[str, float]) -> Tensor:
    out = model(X)
    return torch.stack([weights[name] * term(out) for name, term in TERMS.items()]).sum()


@given(st.fixed_dictionaries({name: st.just(0.0) | st.floats(0.01, 100.0) for name in TERMS}))
def test_only_weights_that_change_nothing_are_dead(weights):
    """Whatever the weights are, 0 included, the dropped term alone is dead; the hard one does not train."""
    model = make_model()
    found = weight_liveness(lambda w: evaluate(model, w), weights, model.parameters(), tolerance=1e-12)
    assert {name for name, item in found.items() if not item.alive} == {"dropped"}
    assert {name for name, item in found.items() if not item.trains} == {"measured", "dropped"}


def test_a_term_lost_on_the_way_is_found():
    """A composed loss that forgets one of its parts (as a known implementation did) has a dead weight."""

    def forgetful(weights):
        out = make_model()(X)
        return weights["task"] * out.square().mean() + min(0.0, weights["variance"])

    assert dead_weights(forgetful, {"task": 1.0, "variance": 1000.0}, []) == ["variance"]


def test_no_gradient_is_a_gradient_of_zero():
    """A parameter that a weight alone connects to the loss shows that the weight acts."""
    free = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)

    def loss(weights):
        return weights["on"] * free if weights["on"] else torch.zeros((), dtype=torch.float64)

    assert weight_liveness(loss, {"on": 0.0}, [free])["on"].trains


@pytest.mark.parametrize(
    ("loss", "weights", "words"),
    [
        (lambda weights: torch.rand(()), {"a": 1.0}, "same loss and gradients"),
        (lambda weights: torch.tensor(float("nan")), {"a": 1.0}, "must be finite"),
        (lambda weights: torch.ones(()), {}, "at least one weight"),
    ],
    ids=["random", "nan", "none"],
)
def test_what_cannot_be_compared_is_refused(loss, weights, words):
    """Noise would make every weight look alive, and nan none."""
    with pytest.raises(ValueError, match=words):
        weight_liveness(loss, weights, [])
