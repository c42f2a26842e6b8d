"""Normalisation and softmax around bottoms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch.func import grad, vmap

from scm.autodiff.policies import GradientPolicy, gradient_policy
from scm.layers.normalization import SCMNorm, SCMSoftmax

F64 = torch.float64
VALUES = st.one_of(st.floats(-100, 100), st.just(math.nan), st.just(math.inf))
TABLES = hnp.arrays(np.float64, st.tuples(st.integers(1, 6), st.integers(1, 4)), elements=VALUES)


@given(TABLES, st.sampled_from([0.0, 1e-3]), st.booleans())
def test_norm_agrees_with_numpy_over_the_finite_entries(x, eps, deterministic):
    """Each feature is scaled by the statistics of its finite entries; bottoms are 0 and marked."""
    y, bottom = SCMNorm(eps=eps, deterministic=deterministic)(torch.from_numpy(x))
    assert torch.isfinite(y).all()
    assert (y[bottom] == 0).all()
    for j in range(x.shape[1]):
        finite = np.isfinite(x[:, j])
        values = x[finite, j]
        if len(np.unique(values)) < 2 or np.var(values) == 0:
            assert bottom[:, j].all()
            continue
        assert bottom[:, j].tolist() == (~finite).tolist()
        expected = (values - values.mean()) / np.sqrt(values.var() + eps)
        spread = np.abs(values).max() / np.sqrt(values.var() + eps)
        np.testing.assert_allclose(y[finite, j], expected, rtol=1e-9, atol=1e-14 * (1 + spread) ** 3)


def test_norm_marks_features_without_spread_and_masked_entries():
    """Equal entries have no scale whatever eps is, also where their variance rounds away from 0."""
    x = torch.tensor([[0.1, 1.0], [0.1, 2.0], [0.1, 9.0]], dtype=F64)
    mask = torch.tensor([[False, False], [False, False], [False, True]])
    for deterministic in (True, False):
        _, bottom = SCMNorm(deterministic, eps=1e-5)(x, mask)
        assert bottom.tolist() == [[True, False], [True, False], [True, True]]


def test_norm_sums_in_float64_where_asked_to_be_deterministic():
    """A float32 column with a large mean keeps its shape, and every order of rows gives the same values."""
    x = (torch.arange(1000.0) % 7 + 1e5).unsqueeze(1)
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(0))
    y, _ = SCMNorm()(x)
    y_permuted, _ = SCMNorm()(x[order])
    assert torch.equal(y_permuted, y[order])
    exact = (x.double() - x.double().mean()) / x.double().std(correction=0)
    assert (y.double() - exact).abs().max() < 1e-6
    assert (SCMNorm(deterministic=False)(x)[0].double() - exact).abs().max() > 1e-6


@given(hnp.arrays(np.float64, st.tuples(st.integers(1, 5), st.integers(1, 4)), elements=VALUES))
def test_softmax_is_a_distribution_or_a_choice(x):
    """Clean rows are softmax; a row with a bottom is one-hot at its best other logit, or empty."""
    p, bottom = SCMSoftmax()(torch.from_numpy(x))
    for row, probabilities, is_bottom in zip(x, p.tolist(), bottom.tolist(), strict=True):
        finite = np.isfinite(row)
        assert is_bottom == (not finite.all())
        if not is_bottom:
            expected = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
            np.testing.assert_allclose(probabilities, expected, rtol=1e-12)
        elif finite.any():
            best = int(np.argmax(np.where(finite, row, -np.inf)))
            assert probabilities == [float(k == best) for k in range(len(row))]
        else:
            assert probabilities == [0.0] * len(row)


def test_softmax_honours_the_mask_and_takes_minus_infinity_as_impossible():
    """A masked logit makes its row a choice among the others; −inf is a probability of 0 and no bottom."""
    logits = torch.tensor([[5.0, 1.0, 2.0], [-math.inf, 0.0, 0.0], [-math.inf] * 3])
    mask = torch.tensor([[True, False, False], [False] * 3, [False] * 3])
    p, bottom = SCMSoftmax()(logits, mask)
    assert bottom.tolist() == [True, False, True]
    assert p.tolist() == [[0.0, 0.0, 1.0], [0.0, 0.5, 0.5], [0.0, 0.0, 0.0]]


@pytest.mark.parametrize("layer", [SCMNorm(), SCMSoftmax()], ids=["norm", "softmax"])
def test_layers_work_without_gradients(layer):
    """`no_grad`, inference mode and inputs that need no gradient all give the values of a normal pass."""
    x = torch.tensor([[1.0, 2.0], [3.0, 1.0], [math.nan, 4.0]])
    expected, _ = layer(x)
    with torch.no_grad():
        assert torch.equal(layer(x.clone().requires_grad_())[0], expected)
    with torch.inference_mode():
        assert torch.equal(layer(x.clone())[0], expected)


@pytest.mark.parametrize("layer", [SCMNorm(), SCMSoftmax()], ids=["norm", "softmax"])
@pytest.mark.parametrize("late", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("policy", list(GradientPolicy))
def test_policies_act_on_the_gradient_wherever_the_context_stands(layer, late, policy):
    """REJECT stops everything; CLAMP bounds what enters by 1; input gradients are never NaN."""
    x = torch.tensor([[1.0, 2.0], [3.0, 1.0], [math.nan, 4.0], [0.5, 7.0]], dtype=F64, requires_grad=True)
    weights = torch.tensor([[50.0, 1.0], [-2.0, 3.0], [9.0, 9.0], [0.1, -9.0]], dtype=F64)
    if late:
        y, bottom = layer(x)
        with gradient_policy(policy):
            (weights * y).sum().backward()
    else:
        with gradient_policy(policy):
            y, bottom = layer(x)
        (weights * y).sum().backward()
    reference = x.detach().clone().requires_grad_()
    wide = bottom if bottom.shape == x.shape else bottom.unsqueeze(-1).expand_as(x)
    incoming = {
        GradientPolicy.CLAMP: torch.where(wide, 0.0, weights.clamp(-1, 1)),
        GradientPolicy.PROJECT: torch.where(wide, 0.0, weights),
        GradientPolicy.REJECT: torch.zeros_like(weights),
        GradientPolicy.PASSTHROUGH: weights,
    }[policy]
    with gradient_policy(GradientPolicy.PASSTHROUGH):
        layer(reference)[0].backward(incoming)
    assert torch.isfinite(x.grad).all()
    assert torch.allclose(x.grad, reference.grad, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("layer", [SCMNorm(eps=0.1), SCMSoftmax()], ids=["norm", "softmax"])
def test_gradients_are_those_of_finite_differences(layer):
    """Where nothing is clamped, the derivative is the true one."""
    x = torch.tensor([[1.0, 2.0], [3.0, -1.0], [0.3, 0.4]], dtype=F64, requires_grad=True)
    with gradient_policy(GradientPolicy.PASSTHROUGH):
        assert torch.autograd.gradcheck(lambda value: layer(value)[0], (x,))


@pytest.mark.parametrize("layer", [SCMNorm(), SCMSoftmax()], ids=["norm", "softmax"])
def test_layers_vectorise(layer):
    """Under vmap of grad each member's gradient is what it is alone."""
    x = torch.randn(4, 3, 2, dtype=F64, generator=torch.Generator().manual_seed(1))
    x[0, 0, 0] = math.nan

    def loss(value):
        y, _ = layer(value)
        return (y * y.detach().cos()).sum() + y[0].sum()

    together = vmap(grad(loss))(x)
    for k in range(len(x)):
        assert torch.allclose(together[k], grad(loss)(x[k]))


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: SCMNorm(eps=-1.0), ValueError, "eps must be finite and >= 0"),
        (lambda: SCMNorm(eps=math.nan), ValueError, "eps must be finite and >= 0"),
        (lambda: SCMNorm()(torch.tensor(1.0)), ValueError, "batch dimension"),
        (lambda: SCMNorm()(torch.ones(2, dtype=torch.int64)), TypeError, "real floating point"),
        (
            lambda: SCMNorm()(torch.ones(2), torch.ones(3, dtype=torch.bool)),
            ValueError,
            "bottom_mask must have",
        ),
        (lambda: SCMSoftmax()(torch.tensor(1.0)), ValueError, "class dimension"),
        (
            lambda: SCMSoftmax()(torch.ones(2), torch.ones(1, dtype=torch.bool)),
            ValueError,
            "bottom_mask must",
        ),
        (lambda: SCMSoftmax()(torch.ones(2, dtype=torch.complex64)), TypeError, "real floating point"),
    ],
)
def test_normalisation_refuses_bad_arguments(call, error, message):
    """Each refusal names the rule."""
    with pytest.raises(error, match=message):
        call()
