"""The models a trial config asks for: shapes, gauges, knobs that act, stacking."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import functional_call, grad, stack_module_state, vmap

from scm.models import BASES, HEADS, NAMED_HEADS, make_model
from scm.trial_config import KNOBS, TrialConfig

INPUTS = 3


def build(seed=0, output_dim=1, input_dim=INPUTS, **knobs):
    torch.manual_seed(seed)
    return make_model(TrialConfig(**{"hidden_width": 8, **knobs}), input_dim, output_dim)


def batch(rows=6, seed=0, dtype=torch.float32):
    return torch.randn(rows, INPUTS, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def test_every_head_a_config_may_name_can_be_built():
    """The table of heads and the choices of the knob are the same."""
    assert tuple(HEADS) == KNOBS["head"].choices


def test_every_basis_a_config_may_name_is_there():
    """The table of bases and the choices of the knob are the same."""
    assert tuple(BASES) == KNOBS["basis"].choices


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("norm", ["unit", "none"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_outputs_have_the_promised_shapes_and_dtype(head, norm, dtype):
    """(B,) for one output and (B, O) for more, in the config's dtype, whatever dtype comes in."""
    for output_dim, shape in ((1, (6,)), (2, (6, 2))):
        P, Q = build(head=head, tuple_norm=norm, dtype=dtype, output_dim=output_dim)(batch())
        assert P.shape == Q.shape == shape
        assert P.dtype == Q.dtype == getattr(torch, dtype)


@pytest.mark.parametrize("head", HEADS)
@settings(max_examples=20)
@given(st.integers(0, 100), st.floats(1e-6, 1e6))
def test_the_unit_gauge_is_unit_for_weights_of_any_size(head, seed, scale):
    """P² + Q² = 1 for every row, however large or small the raw tuple is."""
    model = build(seed=seed, head=head, tuple_norm="unit", dtype="float64", output_dim=2)
    for parameter in model.head.parameters():
        parameter.data.mul_(scale)
    P, Q = model(batch(dtype=torch.float64))
    assert torch.allclose(P.square() + Q.square(), torch.ones_like(P), rtol=1e-12)
    assert model.gauge == "unit"


def test_the_raw_gauge_is_what_the_head_emits():
    """Without the norm, scaling the last layer scales the tuple; with it, nothing changes."""
    for norm, factor in (("none", 4.0), ("unit", 1.0)):
        model = build(tuple_norm=norm)
        P, Q = model(batch())
        for parameter in model.head.parameters():
            parameter.data.mul_(4.0)
        P4, Q4 = model(batch())
        assert torch.allclose(P4, factor * P, rtol=1e-6)
        assert torch.allclose(Q4, factor * Q, rtol=1e-6)
        assert model.gauge == {"none": "raw", "unit": "unit"}[norm]


@pytest.mark.parametrize("head", HEADS)
def test_a_bad_row_stays_its_own_affair(head):
    """A NaN input makes its own tuple non-finite and no other; a zero tuple stays zero."""
    model = build(head=head)
    x = batch()
    clean = model(x)
    x[2, 1] = math.nan
    spoilt = model(x)
    keep = torch.arange(6) != 2
    for a, b in zip(clean, spoilt, strict=True):
        assert torch.equal(a[keep], b[keep])
        assert not torch.isfinite(b[2])


def test_zero_tuples_and_their_gradients_are_finite():
    """P = Q = 0 stays (0, 0) under the norm, and sends no NaN back."""
    model = build()
    for parameter in model.head.parameters():
        parameter.data.zero_()
    P, Q = model(batch())
    assert (P == 0).all()
    assert (Q == 0).all()
    (P + Q).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize(
    "name, values, base",
    [
        ("hidden_width", (4, 8), {}),
        ("hidden_depth", (0, 2), {}),
        ("tuple_norm", ("unit", "none"), {}),
        ("head", ("pattern", "multihead", "angular", "tr_rational"), {}),
        ("dtype", ("float32", "float64"), {}),
        ("q_anchor", ("none", "ones"), {"head": "multihead"}),
        ("q_param", ("none", "softplus"), {"head": "multihead"}),
        ("q_min", (0.0, 0.5), {"head": "multihead", "q_param": "softplus"}),
        ("numerator_degree", (1, 3), {"head": "multihead"}),
        ("denominator_degree", (1, 2), {"head": "multihead"}),
        ("basis", ("monomial", "chebyshev"), {"head": "multihead"}),
        ("numerator_degree", (1, 3), {"head": "tr_rational"}),
        ("denominator_degree", (1, 2), {"head": "tr_rational"}),
        ("basis", ("monomial", "chebyshev"), {"head": "tr_rational"}),
        ("tuple_norm", ("unit", "none"), {"head": "tr_rational"}),
    ],
)
def test_every_model_knob_changes_the_model(name, values, base):
    """From one seed, two values of a knob give different functions."""
    outputs = []
    for value in values:
        P, Q = build(**{**base, name: value})(batch())
        outputs.append(torch.stack([P, Q]).double().detach())
    assert all(not torch.equal(outputs[0], other) for other in outputs[1:])


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("norm", ["unit", "none"])
def test_stacked_models_are_the_models(head, norm):
    """A vmapped stack gives each model's outputs and gradients, so that trials can be trained as one."""
    models = [
        build(seed=seed, head=head, tuple_norm=norm, dtype="float64", output_dim=2) for seed in range(3)
    ]
    x = batch(dtype=torch.float64)
    params, buffers = stack_module_state(models)
    assert not buffers

    def loss(parameters):
        P, Q = functional_call(models[0], parameters, (x,))
        return (P * Q).sum() + P.square().sum()

    grads = vmap(grad(loss))(params)
    for k, model in enumerate(models):
        P, Q = model(x)
        ((P * Q).sum() + P.square().sum()).backward()
        for name, parameter in model.named_parameters():
            assert torch.allclose(grads[name][k], parameter.grad, rtol=1e-9, atol=1e-12), name


NAMED = {"lambda_tag": 0.1, "lambda_pole": 0.1}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("output_dim", [1, 2])
def test_outputs_are_named_exactly_where_their_losses_weigh(head, output_dim):
    """(P, Q) alone by default; tag logits and pole scores of the rows follow, each by its own weight."""
    plain = build(head=head, output_dim=output_dim)
    assert len(plain(batch())) == 2
    assert plain.named_heads is None
    for asked, names in (
        (NAMED, {"tag_logits", "pole_score"}),
        ({"lambda_tag": 0.1}, {"tag_logits"}),
        ({"lambda_pole": 0.1}, {"pole_score"}),
    ):
        P, Q, named = build(head=head, output_dim=output_dim, **asked)(batch())
        assert set(named) == names <= set(NAMED_HEADS)
        assert torch.equal(P, plain(batch())[0])  # the weights are the same: named heads are drawn last
        assert torch.equal(Q, plain(batch())[1])
        shapes = {"tag_logits": (6, 4), "pole_score": (6,)}
        assert all(named[name].shape == shapes[name] for name in names)


def test_named_heads_are_parameters_and_pull_at_the_network():
    """Their weights are trained with the others, and their losses reach the layers below."""
    model = build(dtype="float64", **NAMED)
    named = model(batch(dtype=torch.float64))[2]
    (named["tag_logits"].square().sum() + named["pole_score"].square().sum()).backward()
    assert any(name.startswith("named_heads.pole_score.") for name, _ in model.named_parameters())
    touched = {name: parameter.grad is not None for name, parameter in model.named_parameters()}
    assert all(there == (not name.startswith("head.")) for name, there in touched.items())


@pytest.mark.parametrize("head", HEADS)
def test_stacked_models_with_named_heads_are_the_models(head):
    """Named outputs and their gradients go through vmap as P and Q do, without buffers."""
    models = [build(seed=seed, head=head, dtype="float64", **NAMED) for seed in range(3)]
    x = batch(dtype=torch.float64)
    params, buffers = stack_module_state(models)
    assert not buffers

    def total(outputs):
        P, Q, named = outputs
        return (P * Q).sum() + named["tag_logits"].logsumexp(-1).sum() + named["pole_score"].square().sum()

    grads = vmap(grad(lambda p: total(functional_call(models[0], p, (x,)))))(params)
    for k, model in enumerate(models):
        total(model(x)).backward()
        for name, parameter in model.named_parameters():
            assert torch.allclose(grads[name][k], parameter.grad, rtol=1e-9, atol=1e-12), name


@given(st.permutations(range(6)), st.sampled_from(sorted(HEADS)))
@settings(max_examples=20)
def test_models_commute_with_permutations_of_rows(order, head):
    """Each row is answered alone."""
    model = build(head=head, dtype="float64")
    x = batch(dtype=torch.float64)
    for straight, permuted in zip(model(x), model(x[list(order)]), strict=True):
        assert torch.allclose(permuted, straight[list(order)], rtol=1e-12)


def test_inputs_of_more_or_fewer_dimensions_are_rows():
    """(B, 3, 1) holds rows of three numbers, (B,) rows of one, and there may be no rows."""
    model = build()
    assert torch.equal(model(batch().unsqueeze(-1))[0], model(batch())[0])
    assert build(input_dim=1)(torch.ones(4))[0].shape == (4,)
    assert model(torch.empty(0, INPUTS))[0].shape == (0,)


def test_capability_knows_what_the_norm_does_to_a_bounded_denominator():
    """Q ≥ 1 by construction is unreachable in the raw gauge, and reachable once a large P may shrink it."""
    bounded = {"head": "multihead", "q_param": "softplus", "q_anchor": "ones"}
    assert build(tuple_norm="none", **bounded).bottom_capability(0.5) == "unreachable_by_construction"
    assert build(tuple_norm="unit", **bounded).bottom_capability(0.5) == "reachable"
    assert build().bottom_capability(0.5) == "reachable"
    with pytest.raises(ValueError, match="tau_infer must be finite and > 0"):
        build().bottom_capability(0.0)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: build(input_dim=0), "input_dim must be >= 1"),
        (lambda: build(output_dim=0), "output_dim must be >= 1"),
        (lambda: build()(torch.ones(2, 4)), r"a row of x must hold 3 numbers, got shape \(2, 4\)"),
    ],
)
def test_models_refuse_bad_dimensions(call, message):
    """Each refusal names the rule and the value."""
    with pytest.raises(ValueError, match=message):
        call()
