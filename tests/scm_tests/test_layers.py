"""Projective heads and the rational layer: formulas, capabilities, bottoms and what gradients do there."""

from __future__ import annotations

import contextlib
import math
import threading

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import functional_call, grad, stack_module_state, vmap

from scm.autodiff.policies import GradientPolicy, gradient_policy, policies_disabled
from scm.layers import (
    AngularProjectiveHead,
    ChebyshevBasis,
    CustomBasis,
    MonomialBasis,
    ProjectiveRationalMultiHead,
    ProjectiveRRModelConfig,
    RRProjectiveRationalModel,
    SCMRationalLayer,
)

F64 = torch.float64
BASES = {"monomial": MonomialBasis(), "chebyshev": ChebyshevBasis()}


def tensor(values):
    return torch.tensor(values, dtype=F64)


def multihead(case):
    head = ProjectiveRationalMultiHead(
        len(case["num_weights"]),
        len(case["num_weights"][0]) - 1,
        len(case["den_weights"]) - 1,
        q_anchor=case["q_anchor"],
        q_param=case["q_param"],
        q_min=case["q_min"],
    ).double()
    head.load_state_dict(
        {"num_weights": tensor(case["num_weights"]), "den_weights": tensor(case["den_weights"])}
    )
    return head


def rational(numerator, denominator, **kwargs):
    layer = SCMRationalLayer(len(numerator) - 1, len(denominator) - 1, **kwargs).double()
    layer.load_state_dict({"numerator": tensor(numerator), "denominator": tensor(denominator)})
    return layer


# --- recorded cases -------------------------------------------------------------------------------


def test_multihead_gives_the_recorded_tuples_and_capabilities(vector_group):
    """P, the shared Q and the answer to every threshold are those recorded."""
    cases = vector_group("projective_rational_multihead")
    assert cases
    for case in cases:
        head = multihead(case)
        P, Q = head(tensor(case["z_num"]), tensor(case["z_den"]))
        np.testing.assert_allclose(P.detach(), case["expected"]["P"], rtol=1e-12, atol=0)
        np.testing.assert_allclose(Q.detach(), case["expected"]["Q"], rtol=1e-12, atol=0)
        for tau, expected in case["expected"]["bottom_capability"].items():
            assert head.bottom_capability(float(tau)) == expected, (case["id"], tau)


def test_capability_refuses_what_is_no_threshold(vector_group, decode_numbers):
    """Both heads answer or refuse every recorded threshold as recorded, strings and bools included."""
    cases = decode_numbers(vector_group("bottom_capability_errors"))
    assert cases
    for case in cases:
        for head, expected in (
            (ProjectiveRationalMultiHead(1, 1, 1), case["expected"]),
            (AngularProjectiveHead(2), case["angular"]),
        ):
            if isinstance(expected, dict):
                with pytest.raises({"ValueError": ValueError, "TypeError": TypeError}[expected["raises"]]):
                    head.bottom_capability(case["tau_infer"])
            else:
                assert head.bottom_capability(case["tau_infer"]) == expected


@pytest.mark.parametrize("how", ["context at forward", "context at backward", "argument"])
def test_rational_layer_gives_the_recorded_values_masks_and_gradients(vector_group, decode_numbers, how):
    """Values, bottoms and coefficient gradients are those recorded, wherever the policy is named."""
    cases = decode_numbers(vector_group("scm_rational_layer"))
    assert cases
    for case in cases:
        policy = GradientPolicy(case["policy"])
        layer = rational(
            case["numerator"],
            case["denominator"],
            basis=BASES[case["basis"]],
            singular_epsilon=case["singular_epsilon"],
            gradient_policy=policy if how == "argument" else None,
        )
        weights, expected = tensor(case["loss_weights"]), case["expected"]
        if how == "context at forward":
            with gradient_policy(policy):
                y, bottom = layer(tensor(case["x"]))
            (weights * y).sum().backward()
        elif how == "context at backward":
            y, bottom = layer(tensor(case["x"]))
            with gradient_policy(policy):
                (weights * y).sum().backward()
        else:
            y, bottom = layer(tensor(case["x"]))
            (weights * y).sum().backward()
        assert bottom.tolist() == expected["bottom_mask"]
        close = {"rtol": 1e-11, "atol": 1e-300}
        np.testing.assert_allclose(y.detach(), expected["output"], **close)
        np.testing.assert_allclose(layer.numerator.grad, expected["grad_numerator"], **close)
        np.testing.assert_allclose(layer.denominator.grad, expected["grad_denominator"], **close)


# --- the rational layer ---------------------------------------------------------------------------


@given(
    st.lists(st.floats(-3, 3), min_size=1, max_size=4),
    st.lists(st.floats(-3, 3), min_size=1, max_size=4),
    st.lists(st.floats(-50, 50), min_size=1, max_size=8),
    st.sampled_from(["monomial", "chebyshev"]),
)
def test_rational_layer_agrees_with_multiprecision(numerator, denominator, x, name):
    """Where the layer has a value it is P/Q to within the rounding that cancellation explains."""

    def column(value, k):
        value = mpmath.mpf(value)
        if name == "monomial":
            return value**k
        previous, this = mpmath.mpf(1), value
        for _ in range(k):
            previous, this = this, 2 * value * this - previous
        return previous

    layer = rational(numerator, denominator, basis=BASES[name])
    y, bottom = layer(tensor(x))
    with mpmath.workdps(60):
        for value, got, is_bottom in zip(x, y.tolist(), bottom.tolist(), strict=True):
            P = mpmath.fsum(c * column(value, k) for k, c in enumerate(numerator))
            Q = mpmath.fsum(c * column(value, k) for k, c in enumerate(denominator))
            size_P = mpmath.fsum(abs(c) * (2 * abs(value) + 1) ** k for k, c in enumerate(numerator))
            size_Q = mpmath.fsum(abs(c) * (2 * abs(value) + 1) ** k for k, c in enumerate(denominator))
            slack = mpmath.mpf(64 * 2.0**-53)
            if is_bottom:
                assert abs(Q) <= 1e-6 + slack * size_Q
                assert got == 0.0
            else:
                error_Q = slack * size_Q
                if abs(Q) > 2 * error_Q:
                    bound = (slack * size_P + abs(P / Q) * error_Q) / (abs(Q) - error_Q) + slack * abs(P / Q)
                    assert abs(got - P / Q) <= bound + mpmath.mpf(1e-320)


def test_threshold_itself_is_accepted_and_one_ulp_below_is_not():
    """The layer draws the line where strict decoding draws it: |Q| = epsilon has a value."""
    epsilon = 2.0**-10
    layer = rational([1.0], [0.0, 1.0], singular_epsilon=epsilon)
    x = tensor([epsilon, -epsilon, math.nextafter(epsilon, 0.0)])
    assert layer(x)[1].tolist() == [False, False, True]
    assert layer(tensor([0.4, 0.6]), tau=0.5)[1].tolist() == [True, False]
    assert rational([1.0], [0.0, 1.0], singular_epsilon=0.0)(tensor([0.0]))[1].item()


def test_the_basis_is_evaluated_once_a_forward_pass():
    """Where a basis says up to which argument it is finite, its columns are computed once for P and Q."""

    class Counted(MonomialBasis):
        calls = 0

        def __call__(self, x, degree):
            Counted.calls += 1
            return super().__call__(x, degree)

    SCMRationalLayer(3, 2, basis=Counted())(torch.ones(4))
    assert Counted.calls == 1


def test_quotients_and_slopes_that_overflow_are_bottoms():
    """A value or a derivative that float32 cannot hold is a bottom, not an infinity."""
    layer = SCMRationalLayer(1, 1, singular_epsilon=0.0)
    layer.load_state_dict({"numerator": torch.tensor([1e30, 0.0]), "denominator": torch.tensor([0.0, 1.0])})
    y, bottom = layer(torch.tensor([1e-10, 1e-5, 1.0]))
    assert bottom.tolist() == [True, True, False]
    y.sum().backward()
    assert torch.isfinite(layer.numerator.grad).all()
    assert torch.isfinite(layer.denominator.grad).all()


def test_small_squares_do_not_make_a_bottom():
    """1e-150 over 1e-200 is a number with a finite slope, although the square of Q underflows."""
    layer = rational([1e-150], [1e-200], singular_epsilon=0.0)
    y, bottom = layer(tensor([0.0]))
    assert not bottom.item()
    assert y.item() == pytest.approx(1e50)


@pytest.mark.parametrize(
    "basis",
    [
        MonomialBasis(),
        ChebyshevBasis(),
        CustomBasis(lambda x, d: torch.stack([x**k for k in range(d + 1)], -1)),
    ],
    ids=["monomial", "chebyshev", "custom"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_that_overflow_send_zero_and_not_nan_to_their_input(basis, dtype):
    """Input gradients are finite everywhere and 0 at bottoms, so that no NaN reaches a layer below."""
    layer = SCMRationalLayer(4, 3, basis=basis).to(dtype)
    huge = torch.finfo(dtype).max
    x = torch.tensor([0.5, huge, math.nan, -math.inf, huge**0.3], dtype=dtype, requires_grad=True)
    y, bottom = layer(x)
    y.sum().backward()
    assert bottom[:4].tolist() == [False, True, True, True]
    assert torch.isfinite(x.grad).all()
    assert (x.grad[1:4] == 0).all()
    assert x.grad[0] != 0


def test_a_bad_row_leaves_the_gradients_of_the_others_alone():
    """Coefficient gradients with a NaN row are those without it."""
    layer = rational([1.0, 2.0], [1.0, 0.5])
    layer(tensor([0.3, 0.7]))[0].sum().backward()
    alone = layer.numerator.grad.clone(), layer.denominator.grad.clone()
    layer.zero_grad()
    layer(tensor([0.3, math.nan, 0.7, 1e308, -2.0]))[0].sum().backward()
    assert torch.equal(layer.numerator.grad, alone[0])
    assert torch.equal(layer.denominator.grad, alone[1])


def test_passthrough_reaches_bottoms_where_the_surrogate_is_asked_for():
    """With the surrogate PASSTHROUGH moves coefficients at bottoms, by the gradient of P over ±epsilon."""
    x = tensor([1.0, -1.0])
    grads = {}
    for policy in GradientPolicy:
        layer = rational([2.0], [1e-8], singular_epsilon=0.1, surrogate_at_bottoms=True)
        with gradient_policy(policy):
            y, bottom = layer(x)
        assert bottom.all()
        assert (y == 0).all()
        y.sum().backward()
        grads[policy] = (layer.numerator.grad.item(), layer.denominator.grad.item())
    assert grads[GradientPolicy.PASSTHROUGH] == pytest.approx((2 / 0.1, -2 * 2.0 / 0.1**2))
    for policy in (GradientPolicy.CLAMP, GradientPolicy.PROJECT, GradientPolicy.REJECT):
        assert grads[policy] == (0.0, 0.0)


def test_default_policy_is_the_registered_one_with_and_without_policies():
    """Outside of contexts and inside `policies_disabled()` the layer's default, PROJECT, is in force."""
    x = tensor([0.5, 2.0])
    results = []
    for context in (None, policies_disabled()):
        layer = rational([3.0, 1.0], [1.0, -0.5], singular_epsilon=1e-6)
        if context is None:
            layer(x)[0].sum().backward()
        else:
            with context:
                layer(x)[0].sum().backward()
        results.append(layer.numerator.grad)
    assert torch.equal(results[0], results[1])
    assert torch.allclose(results[0], tensor([1 / 0.75, 0.5 / 0.75]))


def test_a_context_around_backward_reaches_the_threads_that_compute_gradients():
    """As on CUDA, where hooks run on other threads: the forward thread's context counts while it is open."""
    for context, expected in ((gradient_policy(GradientPolicy.REJECT), 0.0), (None, 1.0)):
        layer = rational([1.0], [1.0])
        y, _ = layer(tensor([2.0]))
        worker = threading.Thread(target=y.sum().backward)
        with context or contextlib.nullcontext():
            worker.start()
            worker.join()
        assert layer.numerator.grad.item() == expected


@given(st.permutations(range(6)))
@settings(max_examples=20)
def test_rational_layer_commutes_with_permutations_of_rows(order):
    """Each element is decided alone."""
    layer = rational([1.0, -2.0, 0.5], [1.0, -1.0])
    x = tensor([0.0, 1.0, math.nan, 0.5, 1e300, -3.0])
    y, bottom = layer(x)
    y_p, bottom_p = layer(x[list(order)])
    assert torch.equal(y_p, y[list(order)])
    assert torch.equal(bottom_p, bottom[list(order)])


def test_projective_tuple_says_fault_where_the_input_is_one():
    """The raw tuple is what the quotient is made of, and NaN where x is not finite."""
    layer = rational([1.0, 2.0], [0.0, 1.0])
    P, Q = layer.projective(tensor([0.0, 3.0, math.inf]))
    assert P[:2].tolist() == [1.0, 7.0]
    assert Q[:2].tolist() == [0.0, 3.0]
    assert torch.isnan(P[2])
    assert torch.isnan(Q[2])


def test_rational_layer_works_without_gradients_and_on_empty_batches():
    """Neither `no_grad` nor a batch of no rows is special."""
    layer = rational([1.0], [1.0])
    with torch.no_grad():
        y, _ = layer(tensor([1.0, 2.0]))
    assert y.tolist() == [1.0, 1.0]
    assert layer(torch.empty(0, 3, dtype=F64))[0].shape == (0, 3)


def test_rational_layers_stack_and_vectorise():
    """A vmapped stack of layers gives the values and gradients of each layer alone, policies included."""
    layers = [rational([1.0, k], [1.0, -0.5 * k]) for k in (1.0, 2.0, 3.0)]
    x = tensor([0.3, 1.0, 2.0, math.nan])
    params, _ = stack_module_state(layers)

    def loss(parameters):
        y, bottom = functional_call(layers[0], parameters, (x,))
        return y.sum(), bottom

    with gradient_policy(GradientPolicy.PROJECT):
        grads, bottoms = vmap(grad(loss, has_aux=True))(params)
    for k, layer in enumerate(layers):
        y, bottom = layer(x)
        y.sum().backward()
        assert torch.equal(bottoms[k], bottom)
        assert torch.allclose(grads["numerator"][k], layer.numerator.grad)
        assert torch.allclose(grads["denominator"][k], layer.denominator.grad)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64])
def test_rational_layer_refuses_input_without_an_order(dtype):
    """Complex and integer inputs are a TypeError."""
    with pytest.raises(TypeError, match="real floating-point"):
        SCMRationalLayer(1, 1)(torch.ones(2, dtype=dtype))


# --- bases ----------------------------------------------------------------------------------------


@given(st.floats(-2, 2), st.integers(0, 6))
def test_bases_are_their_textbook_functions(x, degree):
    """Columns are x^k and cos(k·arccos x) continued, by an independent evaluation."""
    monomials = MonomialBasis()(tensor([x]), degree)[0]
    chebyshev = ChebyshevBasis()(tensor([x]), degree)[0]
    np.testing.assert_allclose(
        monomials, np.vander([x], degree + 1, increasing=True)[0], rtol=1e-13, atol=1e-300
    )
    expected = [np.polynomial.chebyshev.chebval(x, [0] * k + [1]) for k in range(degree + 1)]
    np.testing.assert_allclose(chebyshev, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("basis", BASES.values(), ids=BASES.keys())
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("degree", [0, 1, 2, 5])
def test_columns_up_to_the_largest_argument_are_finite(basis, dtype, degree):
    """What a basis promises to be finite is finite, in every dtype."""
    limit = torch.tensor([basis.largest_argument(degree, dtype)], dtype=torch.float64).to(dtype)
    assert limit.item() > 1.0
    assert torch.isfinite(basis(torch.nextafter(limit.double(), tensor([0.0])).to(dtype), degree)).all()


def test_custom_basis_must_return_its_columns():
    """A basis of the wrong shape is an error that names both shapes."""
    with pytest.raises(ValueError, match=r"\(2, 3\), got \(2,\)"):
        CustomBasis(lambda x, degree: x)(torch.ones(2), 2)


# --- heads ----------------------------------------------------------------------------------------


def test_capability_is_judged_in_the_dtype_of_the_weights():
    """A bound that rounds to the threshold reaches it: 1e-3 in float16 is not below 1e-3."""
    head = ProjectiveRationalMultiHead(1, 1, 1, q_anchor="none", q_param="softplus", q_min=1e-3)
    just_above = math.nextafter(1e-3, 1.0)
    assert head.double().bottom_capability(just_above) == "reachable"
    assert head.half().bottom_capability(just_above) == "unreachable_by_construction"


def test_unreachable_denominators_stay_above_the_bound_even_where_softplus_underflows():
    """What is called unreachable holds in float32 for the most extreme features."""
    head = ProjectiveRationalMultiHead(1, 1, 1, q_anchor="none", q_param="softplus", q_min=1e-2)
    torch.nn.init.constant_(head.den_weights, -1e4)
    _, Q = head(torch.zeros(3, 1), torch.tensor([0.0, 1e3, 1e6]))
    assert (torch.tensor(1e-2) <= Q).all()


def test_rr_model_shapes_and_pole_logit():
    """Two outputs of (B, O), and a logit (B, 1) where it is asked for."""
    x = torch.randn(5, 4)
    P, Q = RRProjectiveRationalModel(ProjectiveRRModelConfig())(x)
    assert P.shape == Q.shape == (5, 2)
    assert torch.equal(Q[:, 0], Q[:, 1])
    assert RRProjectiveRationalModel(ProjectiveRRModelConfig(enable_pole_head=True))(x)[2].shape == (5, 1)
    model = RRProjectiveRationalModel(ProjectiveRRModelConfig(q_param="softplus"))
    assert model.bottom_capability(0.5) == "unreachable_by_construction"


def test_angular_head_stands_on_the_unit_circle():
    """P² + Q² = 1, and the angle that is returned is the one decoded."""
    head = AngularProjectiveHead(3, 2, theta_scale=2.5).double()
    P, Q, theta = head(torch.randn(7, 3, dtype=F64), return_theta=True)
    assert torch.allclose(P.square() + Q.square(), torch.ones_like(P))
    assert torch.allclose(torch.atan2(Q.sin() * 0 + Q, P), torch.atan2(theta.sin(), theta.cos()))
    assert len(head(torch.randn(2, 3, dtype=F64))) == 2


def test_angular_head_keeps_no_tensor_of_batch_times_outputs_times_inputs():
    """What is saved for the backward pass grows with B·(O + I), not with B·O·I."""
    head = AngularProjectiveHead(64, 64)
    sizes = []

    def pack(saved):
        sizes.append(saved.numel())
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        head(torch.randn(32, 64, requires_grad=True))
    assert max(sizes) <= 64 * 64


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: ProjectiveRationalMultiHead(0, 1, 1), "output_dim must be >= 1"),
        (lambda: ProjectiveRationalMultiHead(1, -1, 1), "numerator_degree must be >= 0"),
        (lambda: ProjectiveRationalMultiHead(1, 1, -1), "denominator_degree must be >= 0"),
        (lambda: ProjectiveRationalMultiHead(1, 1, 1, q_anchor="two"), "q_anchor must be one of"),
        (lambda: ProjectiveRationalMultiHead(1, 1, 1, q_param="exp"), "q_param must be one of"),
        (lambda: ProjectiveRationalMultiHead(1, 1, 1, q_min=-1.0), "q_min must be finite and >= 0"),
        (lambda: ProjectiveRationalMultiHead(1, 1, 1, q_min=math.nan), "q_min must be finite and >= 0"),
        (
            lambda: ProjectiveRationalMultiHead(2, 1, 1)(torch.ones(3, 1), torch.ones(3)),
            "z_num must have shape",
        ),
        (
            lambda: ProjectiveRationalMultiHead(2, 1, 1)(torch.ones(3, 2), torch.ones(2)),
            "z_den must have shape",
        ),
        (lambda: ProjectiveRationalMultiHead(1, 1, 1)(torch.ones(3, 1), torch.ones(3, 2)), "z_den must have"),
        (lambda: ProjectiveRRModelConfig(input_dim=0), "input_dim must be >= 1"),
        (lambda: ProjectiveRRModelConfig(output_dim=0), "output_dim must be >= 1"),
        (lambda: ProjectiveRRModelConfig(hidden_dims=(4, 0)), "hidden_dims must all be >= 1"),
        (lambda: ProjectiveRRModelConfig(q_anchor="x"), "q_anchor must be one of"),
        (lambda: AngularProjectiveHead(0), "input_dim must be >= 1"),
        (lambda: AngularProjectiveHead(1, 0), "output_dim must be >= 1"),
        (lambda: AngularProjectiveHead(1, theta_scale=0.0), "theta_scale must be finite and not 0"),
        (lambda: SCMRationalLayer(-1, 1), "numerator_degree must be >= 0"),
        (lambda: SCMRationalLayer(1, 1, singular_epsilon=-1.0), "singular_epsilon must be finite and >= 0"),
        (lambda: SCMRationalLayer(1, 1, singular_epsilon=math.inf), "singular_epsilon must be finite"),
    ],
)
def test_layers_refuse_bad_arguments(build, message):
    """Each refusal names the rule and the value."""
    with pytest.raises(ValueError, match=message):
        build()
