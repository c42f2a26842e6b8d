"""The rational layer: its tuple, tags and gradients, what bounds and shrinks it, where its poles are."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.func import functional_call, grad, stack_module_state, vmap

from scm.core.tags import TagPolicy, TRTag
from scm.layers.basis import ChebyshevBasis, CustomBasis, MonomialBasis
from scm.layers.tr_rational import TRRational, real_quotient
from scm.losses.projective import projective_fit_loss
from scm.losses.quotient import quotient_loss
from scm.training.adaptive_loss import AdaptiveLambda, AdaptiveLossConfig
from scm.training.targets import lift_targets

F64 = torch.float64
BASES = {
    "monomial": MonomialBasis(),
    "chebyshev": ChebyshevBasis(),
    "chebyshev on a domain": ChebyshevBasis(domain=(-1.0, 3.0)),
    "custom": CustomBasis(lambda x, d: torch.stack([x**k for k in range(d + 1)], -1)),
}
each_basis = pytest.mark.parametrize("basis", BASES.values(), ids=BASES.keys())
numbers = st.floats(-2.0, 2.0)


def tensor(values):
    return torch.tensor(values, dtype=F64)


def rational(theta, phi, **settings):
    """A float64 layer with these coefficients; phi begins at k = 1."""
    theta, phi = tensor(theta), tensor(phi)
    layer = TRRational(theta.shape[-1] - 1, phi.shape[-1], **settings).double()
    layer.load_state_dict({"theta": theta, "phi": phi})
    return layer


class Recorder:
    """A policy that keeps what it is told."""

    lambda_rej = 0.75

    def __init__(self):
        self.told = []

    def report(self, tags):
        self.told.append(tags.tolist())


# --- the tuple ------------------------------------------------------------------------------------


@given(st.lists(numbers, min_size=1, max_size=5), st.lists(numbers, min_size=1, max_size=4), numbers)
def test_monomials_give_polynomials_with_a_leading_one(theta, phi, x):
    """P and Q are numpy's polynomials, the constant of Q being 1."""
    P, Q = rational(theta, phi)(tensor([x]))
    np.testing.assert_allclose(P.detach(), [np.polyval(theta[::-1], x)], rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(Q.detach(), [np.polyval([*phi[::-1], 1.0], x)], rtol=1e-12, atol=1e-12)


@given(
    st.lists(numbers, min_size=1, max_size=6),
    st.lists(numbers, min_size=1, max_size=5),
    numbers,
    st.tuples(st.floats(-5, 5), st.floats(0.1, 5)),
)
def test_chebyshev_columns_are_numpys_on_the_domain(theta, phi, x, where):
    """P and Q are numpy's Chebyshev series of the domain, inside of it and beyond."""
    domain = (where[0], where[0] + where[1])
    x = where[0] + where[1] * x
    P, Q = rational(theta, phi, basis=ChebyshevBasis(domain=domain))(tensor([x]))
    for got, coefficients in ((P, theta), (Q, [1.0, *phi])):
        expected = np.polynomial.Chebyshev(coefficients, domain=domain)(x)
        np.testing.assert_allclose(got.detach(), [expected], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 3)])
def test_elements_are_answered_alone_in_any_shape(shape, dtype):
    """Without output_dim the tuple has the shape and dtype of x, and each element its own answer."""
    layer = TRRational(2, 2).to(dtype)
    x = torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(0))
    P, Q = layer(x)
    assert P.shape == Q.shape == shape
    assert P.dtype == Q.dtype == dtype
    flat_P, flat_Q = layer(x.reshape(-1))
    assert torch.equal(P.reshape(-1), flat_P)
    assert torch.equal(Q.reshape(-1), flat_Q)


def test_outputs_have_coefficients_of_their_own_and_may_share_the_denominators():
    """Each output is the layer of its coefficients, of its own argument or of one for all."""
    theta, phi = [[1.0, 2.0], [0.5, -1.0], [0.0, 3.0]], [[0.5], [-0.25], [2.0]]
    layer = rational(theta, phi, output_dim=3)
    x = tensor([[0.1, 0.2, 0.3], [-1.0, 2.0, 0.7]])
    shared = rational(theta, [0.5], output_dim=3, shared_Q=True)
    for o in range(3):
        single = rational(theta[o], phi[o])
        for args, own in ((x, x[:, o]), (x[:, 1:2], x[:, 1])):
            for got, expected in zip(layer(args), single(own), strict=True):
                assert torch.allclose(got[:, o], expected)
        assert torch.equal(shared(x[:, 1:2])[1][:, o], shared(x[:, 1:2])[1][:, 0])
        assert torch.allclose(shared(x)[1][:, o], 1.0 + 0.5 * x[:, o])
    assert shared.phi.shape == (1,)
    P, Q = shared(x[:, :1])
    assert P.shape == Q.shape == (2, 3)


def test_other_names_of_settings_say_the_same():
    """degree_p, degree_q and lambda_reg are d_p, d_q and alpha_phi."""
    layer = TRRational(degree_p=3, degree_q=2, lambda_reg=0.5)
    assert (layer.d_p, layer.d_q, layer.alpha_phi) == (3, 2, 0.5)
    assert TRRational(3, 2).alpha_phi == 1e-3


def test_coefficients_start_alternating_without_random_numbers():
    """The start is the documented one, and draws nothing from torch's generator."""
    before = torch.get_rng_state()
    layer = TRRational(2, 3)
    assert torch.equal(torch.get_rng_state(), before)
    c, d = 0.1 * math.sqrt(3 / 3), 0.01 * math.sqrt(3 / 3)
    assert layer.theta.tolist() == pytest.approx([-c, c, -c])
    assert layer.phi.tolist() == pytest.approx([-d, d, -d])


@each_basis
def test_a_row_that_is_no_number_leaves_the_others_and_the_coefficients_alone(basis):
    """NaN, infinite and overflowing arguments give (NaN, NaN), no gradient, and change no other row."""
    layer = TRRational(3, 2, basis).double()
    clean = tensor([0.3, 0.7]).requires_grad_()
    (layer(clean)[0] * layer(clean)[1]).sum().backward()
    expected = [layer.theta.grad.clone(), layer.phi.grad.clone(), clean.grad]
    layer.zero_grad()
    x = tensor([math.nan, 0.3, math.inf, 0.7, 1e300]).requires_grad_()
    P, Q = layer(x)
    bad = torch.tensor([True, False, True, False, True])
    assert torch.isnan(P[bad]).all()
    assert torch.isnan(Q[bad]).all()
    assert torch.equal(P[~bad], layer(clean)[0])
    (P * Q)[~bad].sum().backward(retain_graph=True)
    assert torch.equal(layer.theta.grad, expected[0])
    assert torch.equal(layer.phi.grad, expected[1])
    layer.zero_grad()
    (P * Q).sum().backward()  # the sum is NaN; the coefficients do not hear of it
    assert torch.isfinite(layer.theta.grad).all()
    assert torch.isfinite(layer.phi.grad).all()
    assert (x.grad[bad] == 0).all()


# --- values, tags and gradients -------------------------------------------------------------------


def test_values_and_tags_at_and_around_an_exact_pole():
    """1 − x is exactly 0 at 1: an infinity of the sign of P, PHI where P is 0 too, numbers beside it."""
    x = tensor([0.5, 1.0, math.nextafter(1.0, 2.0), math.nan])
    value, tag = rational([2.0], [-1.0]).value_and_tag(x)
    assert tag.tolist() == [TRTag.REAL, TRTag.PINF, TRTag.REAL, TRTag.PHI]
    assert value[0] == 4.0
    assert value[2] == -2.0 / 2.0**-52
    assert torch.isnan(value[[1, 3]]).all()
    assert rational([-2.0], [-1.0]).value_and_tag(x)[1][1] == TRTag.NINF
    assert rational([1.0, -1.0], [-1.0]).value_and_tag(x)[1][1] == TRTag.PHI
    guarded = rational([2.0], [-1.0], tag_policy=TagPolicy(tau_Q_on=0.6))
    assert guarded.value_and_tag(x)[1].tolist() == [TRTag.PINF, TRTag.PINF, TRTag.NINF, TRTag.PHI]


def test_only_real_answers_send_a_gradient_and_none_of_them_a_nan():
    """At a pole the gradient is 0; at Q so small that P/Q² overflows as well; elsewhere it is exact."""
    P = torch.tensor([1.0, 1.0, 1.0, math.nan, 3.0], requires_grad=True)
    Q = torch.tensor([0.0, 1e-30, -2.0, 1.0, 4.0], requires_grad=True)
    value, tag = real_quotient(P, Q)
    assert tag.tolist() == [TRTag.PINF, TRTag.REAL, TRTag.REAL, TRTag.PHI, TRTag.REAL]
    assert value[1] == 1e30
    value[tag == TRTag.REAL].sum().backward()
    assert P.grad.tolist() == pytest.approx([0.0, 0.0, -0.5, 0.0, 0.25])
    assert Q.grad.tolist() == pytest.approx([0.0, 0.0, -0.25, 0.0, -3.0 / 16.0])


@given(numbers, st.floats(0.2, 3.0), st.booleans())
def test_the_derivative_by_a_negative_denominator_has_the_right_sign(p, q, negative):
    """∂(p/q)/∂q = −p/q², whatever the sign of q."""
    q = -q if negative else q
    P, Q = tensor([p]), tensor([q]).requires_grad_()
    real_quotient(P, Q)[0].sum().backward()
    assert Q.grad.item() == pytest.approx(-p / q**2)


def test_derivatives_of_quotients_are_the_recorded_exact_ones(vector_group):
    """In both operands and for both signs of q, where the recorded reference has the sign of one wrong."""
    cases = vector_group("transreal_division_gradient")
    assert any(case["q"] < 0 for case in cases)
    for case in cases:
        P, Q = tensor(case["p"]).requires_grad_(), tensor(case["q"]).requires_grad_()
        real_quotient(P, Q)[0].backward()
        assert (P.grad.item(), Q.grad.item()) == pytest.approx(
            (case["exact"]["dp"], case["exact"]["dq"]), rel=1e-12
        )


def test_thousands_of_quotients_in_a_row_have_a_gradient():
    """The backward pass does not recurse: a chain of 4000 divisions is differentiated."""
    value = x = tensor([1.0]).requires_grad_()
    divisor = tensor([-1.0])
    for _ in range(4000):
        value, _ = real_quotient(value, divisor)
    value.sum().backward()
    assert x.grad.item() == 1.0


@each_basis
@pytest.mark.parametrize("output", [None, 2])
def test_gradients_are_those_of_finite_differences(basis, output):
    """Of the tuple and of the quotient, by coefficients and argument, negative denominators included."""
    generator = torch.Generator().manual_seed(3)
    layer = TRRational(3, 2, basis, output_dim=output).double()
    x = 0.6 + 0.2 * torch.rand(2, 1 if output is None else output, generator=generator, dtype=F64)

    def run(x, theta, phi):
        P, Q = functional_call(layer, {"theta": theta, "phi": phi}, (x,))
        return P, Q, layer.quotient(P, Q)[0]

    theta = torch.randn(layer.theta.shape, generator=generator, dtype=F64)
    toward = basis(tensor([0.7]), 2)[0, 1:].expand(layer.phi.shape)
    for sign in (1.0, -1.0):
        phi = sign * 4.0 * toward / toward.square().sum(dim=-1, keepdim=True)
        assert (sign * run(x, theta, phi)[1] > 0.5).all()
        arguments = tuple(item.detach().clone().requires_grad_() for item in (x, theta, phi))
        assert torch.autograd.gradcheck(run, arguments)


@pytest.mark.parametrize("scale", ["mask-real", "projective"])
def test_the_data_loss_reaches_every_coefficient(scale):
    """No coefficient keeps a zero gradient, with the quotient's loss as with the projective one."""
    layer = TRRational(3, 2).double()
    x = torch.linspace(-1, 1, 9, dtype=F64)
    P, Q = layer(x)
    Y = lift_targets(1.0 / (x - 0.3))
    loss = quotient_loss(P, Q, *Y) if scale == "mask-real" else projective_fit_loss(P, Q, *Y)
    loss.backward()
    assert (layer.theta.grad != 0).all()
    assert (layer.phi.grad != 0).all()


@pytest.mark.parametrize("basis", ["monomial", "chebyshev"])
def test_a_pole_is_learnt_from_the_documented_start(basis):
    """From the deterministic start the layer finds the pole of 1/(x − 0.3), also by way of negative Q."""
    x = torch.linspace(-1, 1, 64, dtype=F64)
    layer = TRRational(1, 1, BASES[basis]).double()
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
    Y = lift_targets(1.0 / (x - 0.3))
    for _ in range(300):
        optimizer.zero_grad()
        P, Q = layer(x)
        projective_fit_loss(P, Q, *Y).backward()
        optimizer.step()
    value, tag = layer.value_and_tag(tensor([-0.5, 0.2, 0.4, 0.9]))
    assert (tag == TRTag.REAL).all()
    assert torch.allclose(value, 1.0 / (tensor([-0.5, 0.2, 0.4, 0.9]) - 0.3), rtol=0.1)
    assert layer.estimate_distance(tensor([0.2])).item() == pytest.approx(0.1, abs=0.02)


# --- the controller -------------------------------------------------------------------------------


def test_an_attached_policy_is_told_the_tags_of_training_passes_and_says_the_penalty():
    """Once a pass, in training alone; lambda_rej is the policy's, and the constant without one."""
    policy = Recorder()
    layer = rational([1.0], [-1.0], adaptive_loss_policy=policy, lambda_rej=0.25)
    layer(tensor([1.0, 2.0]))
    layer.value_and_tag(tensor([0.0]))
    layer.eval()
    layer(tensor([5.0]))
    assert policy.told == [[TRTag.PINF, TRTag.REAL], [TRTag.REAL]]
    assert layer.lambda_rej == 0.75
    assert rational([1.0], [-1.0], lambda_rej=0.25).lambda_rej == 0.25


def test_the_penalty_of_an_adaptive_policy_rises_where_the_layer_covers_too_little():
    """`AdaptiveLambda` follows the tags it is told of, and the loss of the next pass is weighed by it."""
    policy = AdaptiveLambda(AdaptiveLossConfig(target_coverage=0.9, learning_rate=1.0, initial_lambda=1.0))
    layer = rational(
        [1.0], [-1.0], adaptive_loss_policy=policy, tag_policy=TagPolicy(tau_Q_on=0.1), lambda_rej=5.0
    )
    x = tensor([0.95, 1.0, 1.05, 3.0])  # three of four are within the guard band of the pole at 1
    before = layer.lambda_rej
    P, Q = layer(x)
    assert before == 1.0
    assert layer.lambda_rej > before
    assert policy.tracker.batch_coverage == 0.25
    loss = quotient_loss(P[:3], Q[:3], *lift_targets(x[:3]), tau=0.1, lambda_rej=layer.lambda_rej)
    assert loss.item() == pytest.approx(float(layer.lambda_rej))
    for _ in range(5):
        layer(tensor([3.0, 4.0]))
    assert layer.lambda_rej < 1.0


def test_nothing_is_handed_out_of_a_transform():
    """Inside of `grad` and `vmap` no tags are told: their tensors end with the transform."""
    layer = rational([1.0, 1.0], [-1.0], adaptive_loss_policy=Recorder())
    grad(lambda x: layer(x)[0].sum())(tensor([0.5]))
    vmap(lambda x: layer(x)[0])(tensor([[0.5]]))
    assert layer.adaptive_loss_policy.told == []


# --- what keeps coefficients small ----------------------------------------------------------------


def test_regularisation_is_the_documented_sum():
    """alpha/2·|φ|² and, where enabled, the closeness of P and Q to common zeros at five points."""
    theta, phi = [0.5, -1.0], [0.25, 2.0]
    squares = 0.5 * 0.1 * (0.25**2 + 4.0)
    assert rational(theta, phi, alpha_phi=0.1).regularisation().item() == pytest.approx(squares)
    off = rational(theta, phi, alpha_phi=0.1, lambda_coprime=3.0)
    assert off.regularisation().item() == pytest.approx(squares)
    on = rational(theta, phi, alpha_phi=0.1, lambda_coprime=3.0, enable_coprime_regularizer=True)
    closeness = sum(
        1.0 / ((1.0 + abs(0.5 - x)) * (1.0 + abs(1.0 + 0.25 * x + 2.0 * x * x)))
        for x in (-0.9, -0.3, 0.0, 0.3, 0.9)
    )
    assert on.regularisation().item() == pytest.approx(squares + 3.0 * closeness)
    on.regularisation().backward()
    assert (on.theta.grad != 0).all()
    assert (on.phi.grad != 0).all()


def test_regularisation_looks_at_the_domain_of_the_basis():
    """The five points lie in the domain: the same coefficients on another domain give the same penalty."""
    settings = {"lambda_coprime": 1.0, "enable_coprime_regularizer": True, "output_dim": 2}
    theta, phi = [[0.5, 1.0], [1.0, 0.0]], [[0.2], [0.1]]
    here = rational(theta, phi, basis=ChebyshevBasis(), **settings)
    there = rational(theta, phi, basis=ChebyshevBasis(domain=(10.0, 30.0)), **settings)
    assert here.regularisation().item() == pytest.approx(there.regularisation().item())


@given(st.lists(st.lists(numbers, min_size=2, max_size=2), min_size=1, max_size=3), st.floats(0.1, 3.0))
def test_projection_bounds_the_size_of_each_output_and_keeps_smaller_ones(phi, bound):
    """|φ|₁ is at most the bound, directions are kept, and projecting twice is projecting once."""
    layer = rational([[1.0]] * len(phi), phi, output_dim=len(phi), l1_projection=bound)
    layer.project_()
    for before, after in zip(phi, layer.phi.tolist(), strict=True):
        size = sum(abs(c) for c in before)
        factor = min(1.0, bound / size) if size else 1.0
        assert after == pytest.approx([factor * c for c in before])
    once = layer.phi.detach().clone()
    layer.project_()
    assert torch.allclose(layer.phi, once)


def test_training_goes_on_after_a_projection():
    """The step after a projection is that of an optimizer that finds its coefficients smaller, no other."""
    layer = rational([1.0, -1.0], [3.0, -2.0], l1_projection=0.5)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
    handle = layer.project_after(optimizer)
    x = torch.linspace(-1, 1, 9, dtype=F64)
    Y = lift_targets(x.exp())
    for _ in range(20):
        optimizer.zero_grad()
        P, Q = layer(x)
        before = copy.deepcopy(layer)
        loss = projective_fit_loss(P, Q, *Y)
        loss.backward()
        again = projective_fit_loss(*before(x), *Y)
        again.backward()
        assert torch.equal(layer.phi.grad, before.phi.grad)  # the forward pass projects nothing
        optimizer.step()
        assert layer.phi.abs().sum() <= 0.5 * (1 + 1e-12)
        assert (layer.get_q_values(x) >= 0.5 * (1 - 1e-12)).all()
    handle.remove()
    with torch.no_grad():
        layer.phi.fill_(3.0)
    optimizer.step()
    assert layer.phi.abs().sum() > 1.0
    TRRational(1, 1).project_()  # without a bound nothing happens


# --- poles and contracts --------------------------------------------------------------------------


def test_the_pole_interfaces_say_what_they_promise():
    """|Q|, its minimum and Newton's distance, where Q is a number, 0, and no number."""
    layer = rational([1.0], [-1.0])
    xs = tensor([0.0, 1.0, 3.0, math.nan])
    assert layer.get_q_values(xs).tolist() == [1.0, 0.0, 2.0, 0.0]
    assert layer.compute_q_min(xs[[0, 2, 3]]).item() == 1.0
    assert layer.compute_q_min(xs[[3]]).item() == math.inf
    assert layer.compute_q_min(tensor([])).item() == math.inf
    assert layer.estimate_distance(xs).tolist() == [1.0, 0.0, 2.0, 0.0]
    flat = rational([1.0], [0.0])
    assert flat.estimate_distance(tensor([0.5])).item() == pytest.approx(1e12)
    assert layer.bottom_capability(1e-6) == "reachable"


@each_basis
@settings(max_examples=25)
@given(st.lists(numbers, min_size=3, max_size=3), numbers)
def test_the_distance_uses_the_derivative_itself(basis, phi, x):
    """It agrees with |Q| over a central difference of Q."""
    layer = rational([1.0], phi, basis=basis)
    points = tensor([x - 1e-5, x, x + 1e-5])
    low, Q, high = (q.item() for q in layer(points)[1])
    slope = abs(high - low) / 2e-5
    assume(slope > 1e-2)
    assert layer.estimate_distance(tensor([x])).item() == pytest.approx(abs(Q) / slope, rel=1e-4, abs=1e-9)


def test_distances_of_several_outputs_are_each_their_own():
    """With one argument for all outputs, each distance is by its own slope."""
    layer = rational([[1.0], [1.0]], [[-1.0], [-0.5]], output_dim=2)
    assert layer.estimate_distance(tensor([[0.0], [1.5]])).tolist() == [[1.0, 2.0], [0.5, 0.5]]


@pytest.mark.parametrize("basis", [MonomialBasis(domain=(-1.5, 1.0)), ChebyshevBasis(domain=(-1.0, 3.0))])
@settings(max_examples=40)
@given(
    st.lists(numbers, min_size=4, max_size=4),
    st.lists(st.floats(-0.6, 0.6), min_size=2, max_size=2),
    st.floats(0.0, 1.0),
    st.sampled_from([None, 0.05, 0.5]),
)
def test_a_contract_bounds_every_value_and_derivative_it_names(basis, theta, phi, place, floor):
    """In the domain, where |Q| is above the floor, nothing exceeds the contract."""
    layer = rational(theta, phi, basis=basis)
    contract = layer.get_layer_contract(floor)
    low, high = basis.domain
    x = tensor([low + place * (high - low)])

    def value(weights):
        P, Q = functional_call(layer, {"theta": weights[:4], "phi": weights[4:]}, (x,))
        return (P / Q).squeeze()

    weights = tensor([*theta, *phi])
    Q = layer(x)[1]
    assume(Q.abs().item() >= max(contract.q_floor, 1e-9))
    slack = 1 + 1e-9
    assert value(weights).abs() <= contract.y_max * slack + 1e-12
    assert torch.func.grad(value)(weights).abs().max() <= contract.G_max * slack + 1e-12
    assert torch.autograd.functional.hessian(value, weights).abs().max() <= contract.H_max * slack + 1e-12
    columns, slopes = basis(x, 3), torch.autograd.functional.jacobian(lambda held: basis(held, 3)[0], x)
    assert columns.abs().max() <= contract.B_k * slack
    assert slopes.abs().max() <= contract.H_k * slack


def test_a_contract_is_finite_exactly_where_the_coefficients_keep_poles_away():
    """1 − B·|φ|₁ > 0 is a floor; where it is not, all bounds that depend on Q are infinite."""
    safe = rational([1.0, 2.0], [0.25, -0.25]).get_layer_contract()
    assert (safe.q_floor, safe.B_k, safe.H_k, safe.y_max) == (0.5, 1.0, 2.0, 6.0)
    assert (safe.G_max, safe.H_max) == (12.0, 48.0)
    open_ = rational([1.0], [2.0]).get_layer_contract()
    assert open_.G_max == open_.H_max == open_.y_max == math.inf
    assert open_.q_floor == 0.0


def test_local_scales_and_the_rounding_policy():
    """1 + B·|φ|₁ and 1 + B·|θ|₁; thresholds are ulps of them, and off is twice on."""
    layer = rational([1.0, -2.0], [0.5, 0.25])
    scales = layer.estimate_local_scales()
    assert (scales.q.item(), scales.p.item()) == (1.75, 4.0)
    policy = layer.rounding_policy()
    assert float(policy.tau_Q_on) == pytest.approx(4.0 * 2.0**-52 * 1.75)
    assert float(policy.tau_Q_off) == pytest.approx(2.0 * float(policy.tau_Q_on))
    P, Q = tensor([1.0, 1.0]), tensor([1e-16, 1e-14])
    assert real_quotient(P, Q, policy)[1].tolist() == [TRTag.PINF, TRTag.REAL]


# --- many at once ---------------------------------------------------------------------------------


@pytest.mark.parametrize("basis", ["monomial", "chebyshev on a domain"])
def test_layers_stack_and_vectorise(basis):
    """A vmapped stack gives the values and gradients of each layer alone, and has no buffers."""
    layers = [rational([1.0, k, -0.5], [0.5 * k, -0.3], basis=BASES[basis]) for k in (1.0, 2.0, 3.0)]
    x = tensor([0.3, 1.0, math.nan, -0.7])
    params, buffers = stack_module_state(layers)
    assert not buffers

    def loss(parameters):
        P, Q = functional_call(layers[0], parameters, (x,))
        value, tag = layers[0].quotient(P, Q)
        return torch.where(tag == TRTag.REAL, value, 0.0).square().sum()

    grads = vmap(grad(loss))(params)
    for k, layer in enumerate(layers):
        value, tag = layer.value_and_tag(x)
        torch.where(tag == TRTag.REAL, value, 0.0).square().sum().backward()
        assert torch.allclose(grads["theta"][k], layer.theta.grad)
        assert torch.allclose(grads["phi"][k], layer.phi.grad)


def test_no_operation_is_repeated_for_each_sample():
    """A thousand rows run as many operations as one, and leave as many nodes to the backward pass."""

    def operations(rows):
        layer = TRRational(3, 2)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            value, _ = layer.value_and_tag(torch.linspace(-1, 1, rows))
            value.sum().backward()
        return sum(event.count for event in profile.key_averages() if event.key.startswith("aten::"))

    operations(2)
    assert operations(1000) == operations(2)


@pytest.mark.parametrize(
    "build, error, message",
    [
        (lambda: TRRational(), TypeError, r"d_p \(or degree_p\) must be an int"),
        (lambda: TRRational(1), TypeError, r"d_q \(or degree_q\) must be an int"),
        (lambda: TRRational(True, 1), TypeError, "d_p .* must be an int, got True"),
        (lambda: TRRational(1, 0), ValueError, "d_q must be >= 1, got d_q=0"),
        (lambda: TRRational(-1, 1), ValueError, "d_p must be >= 0"),
        (lambda: TRRational(1, 1, degree_p=2), ValueError, "d_p and degree_p .* must agree, got 1 and 2"),
        (lambda: TRRational(1, 1, alpha_phi=0.0, lambda_reg=1.0), ValueError, "must agree, got 0.0 and 1.0"),
        (lambda: TRRational(1, 1, alpha_phi=-1.0), ValueError, "alpha_phi must be finite and >= 0"),
        (lambda: TRRational(1, 1, lambda_coprime=math.nan), ValueError, "lambda_coprime must be finite"),
        (lambda: TRRational(1, 1, lambda_rej=-0.1), ValueError, "lambda_rej must be finite and >= 0"),
        (lambda: TRRational(1, 1, l1_projection=0.0), ValueError, "l1_projection must be None or"),
        (lambda: TRRational(1, 1, output_dim=0), ValueError, "output_dim must be None or >= 1"),
        (lambda: TRRational(1, 1, shared_Q=True), ValueError, "shared_Q needs output_dim"),
        (lambda: TRRational(1, 1, output_dim=3)(torch.ones(2, 2)), ValueError, "last dimension of x must be"),
        (lambda: TRRational(1, 1)(torch.ones(2, dtype=torch.int64)), TypeError, "real floating-point"),
        (lambda: TRRational(1, 1)(torch.ones(2, dtype=torch.complex64)), TypeError, "real floating-point"),
        (lambda: TRRational(1, 1).bottom_capability(0.0), ValueError, "tau_infer must be finite and > 0"),
        (lambda: TRRational(1, 1).get_layer_contract(0.0), ValueError, "q_floor must be None or > 0"),
        (lambda: TRRational(1, 1, BASES["custom"]).get_layer_contract(), ValueError, "basis with a bound"),
        (lambda: TRRational(1, 1, BASES["custom"]).estimate_local_scales(), ValueError, "basis with a bound"),
        (lambda: ChebyshevBasis(domain=(1.0, 1.0)), ValueError, "domain must be two finite numbers"),
        (lambda: MonomialBasis(domain=(0.0, math.inf)), ValueError, "domain must be two finite numbers"),
    ],
)
def test_bad_arguments_are_refused(build, error, message):
    """Each refusal names the rule and the value."""
    with pytest.raises(error, match=message):
        build()


@given(st.floats(-1e3, 1e3), st.floats(1e-2, 1e3), st.integers(0, 6), st.sampled_from([torch.float32, F64]))
def test_a_basis_with_a_domain_tells_finite_columns_from_others(low, width, degree, dtype):
    """Whatever it calls the largest argument is finite in all columns, and lets the whole domain in."""
    basis = ChebyshevBasis(domain=(low, low + width))
    limit = basis.largest_argument(degree, dtype)
    if limit is None:
        return
    assert limit >= max(abs(low), abs(low + width))
    ends = torch.nextafter(torch.tensor([limit, -limit], dtype=F64), torch.zeros(2, dtype=F64)).to(dtype)
    ends = torch.where(ends.abs() > limit, torch.nextafter(ends, torch.zeros_like(ends)), ends)
    assert torch.isfinite(basis(ends, degree)).all()
