"""The losses against the recorded cases, independent formulas, and the laws that hold for every tuple."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scm.autodiff.policies import GradientPolicy, gradient_policy, policies_disabled
from scm.losses.coverage import coverage, ranked_coverage_loss, rejection_loss, soft_coverage_loss
from scm.losses.implicit import LARGEST, implicit_loss
from scm.losses.margin import margin_loss
from scm.losses.pole import pole_loss, pole_targets
from scm.losses.projective import projective_fit_loss
from scm.losses.quotient import quotient_loss
from scm.losses.separation import scm_separation_losses
from scm.losses.sign import sign_consistency_loss
from scm.losses.training import LossConfig, SCMTrainingLoss
from scm.training.targets import lift_semantic_targets

pytestmark = pytest.mark.filterwarnings("error")
F64 = torch.float64


def _tensor(values, dtype=F64, requires_grad=False):
    return torch.tensor(values, dtype=dtype, requires_grad=requires_grad)


def _mask(values):
    return None if values is None else torch.tensor(values)


def _check(case, group_tolerance, got, expected, what):
    rtol, atol = group_tolerance
    np.testing.assert_allclose(
        np.asarray(got), np.asarray(expected), rtol=rtol, atol=atol, err_msg=f"{case['id']}: {what}"
    )


def _run(case, loss_of, *leaves):
    """Return value and gradients of a case, or check that it raises."""
    name = case["expected"].get("raises")
    if name:
        with pytest.raises({"ValueError": ValueError, "TypeError": TypeError}[name]):
            loss_of(*leaves)
        return None
    loss = loss_of(*leaves)
    loss.backward()
    return loss.item(), [leaf.grad for leaf in leaves]


# Recorded cases in which the reference is wrong; the test named beside each shows what is right.
BETTER = {
    "zero_target_small_Q/attached",  # test_no_row_of_the_implicit_loss_costs_more_than_its_bound
    "zero_target_small_Q/detached",
    "pole_target_small_P/attached",
    "pole_target_small_P/detached",
    "huge_overflow/attached",  # test_implicit_loss_is_right_where_squares_overflow
    "huge_overflow/detached",
    "huge_target/attached",
    "huge_target/detached",
    "inf_P/detached",  # test_a_row_that_is_not_finite_stays_alone
    "nan_Q/detached",
    "gamma_zero_origin/attached",  # test_losses_and_gradients_are_finite_at_special_tuples
    "gamma_zero_origin/detached",
    "empty/attached",  # test_an_empty_batch_costs_nothing
    "empty/detached",
    "zero_Q_population",  # test_exact_zeros_are_pushed_out
    "zero_Q_conditional",
    "gamma_zero_origin",  # test_losses_and_gradients_are_finite_at_special_tuples
    "tiny_P",
    "empty",  # test_an_empty_batch_costs_nothing
    "target_out_of_range",  # test_bad_arguments_are_refused
    "zero_Q",  # test_exact_zeros_are_pushed_out
    "nan_in_censored",  # test_separation_keeps_the_groups_apart
    "inf_in_finite",
}


def _cases(vector_group, name):
    for case in vector_group(name):
        if case["id"] in BETTER:
            assert "quirk" in case, f"{case['id']} is not marked as a defect of the reference"
            continue
        yield case


def test_implicit_loss_matches_the_recorded_cases(vector_group, decode_numbers):
    """Values and gradients are the recorded ones, attached and detached."""
    for case in _cases(vector_group, "implicit_loss"):
        case = decode_numbers(case)
        P, Q = _tensor(case["P"], requires_grad=True), _tensor(case["Q"], requires_grad=True)
        Y_n, Y_d = _tensor(case["Y_n"]), _tensor(case["Y_d"])
        keywords = {"gamma": case["gamma"], "detach_scale": case["detach_scale"]}
        result = _run(case, lambda p, q, y=Y_n, d=Y_d, k=keywords: implicit_loss(p, q, y, d, **k), P, Q)
        if result is not None:
            _check(case, (1e-11, 0), result[0], case["expected"]["value"], "value")
            _check(case, (1e-11, 0), result[1][0], case["expected"]["grad_P"], "grad_P")
            _check(case, (1e-11, 0), result[1][1], case["expected"]["grad_Q"], "grad_Q")


def test_margin_loss_matches_the_recorded_cases(vector_group, decode_numbers):
    """Values and gradients are the recorded ones for both reductions and all masks."""
    for case in _cases(vector_group, "margin_loss"):
        case = decode_numbers(case)
        Q = _tensor(case["Q"], requires_grad=True)
        mask, tau, reduction = _mask(case["mask_finite"]), case["tau_train"], case["reduction"]
        result = _run(case, lambda q, m=mask, t=tau, r=reduction: margin_loss(q, t, m, reduction=r), Q)
        if result is not None:
            _check(case, (1e-12, 0), result[0], case["expected"]["value"], "value")
            _check(case, (1e-12, 0), result[1][0], case["expected"]["grad_Q"], "grad_Q")


def test_sign_loss_matches_the_recorded_cases(vector_group, decode_numbers):
    """Values and gradients are the recorded ones, with the given and the default mask."""
    for case in _cases(vector_group, "sign_consistency_loss"):
        case = decode_numbers(case)
        P, Q = _tensor(case["P"], requires_grad=True), _tensor(case["Q"], requires_grad=True)
        arguments = (_tensor(case["Y_n"]), _tensor(case["Y_d"]), case["gamma"], _mask(case["mask_singular"]))
        epsilon = case["epsilon_sing"]
        result = _run(case, lambda p, q, a=arguments, e=epsilon: sign_consistency_loss(p, q, *a, e), P, Q)
        if result is not None:
            _check(case, (1e-10, 1e-15), result[0], case["expected"]["value"], "value")
            _check(case, (1e-10, 1e-15), result[1][0], case["expected"]["grad_P"], "grad_P")
            _check(case, (1e-10, 1e-15), result[1][1], case["expected"]["grad_Q"], "grad_Q")


def test_hard_coverage_matches_the_recorded_cases(vector_group, decode_numbers):
    """Coverage and rejection are the recorded numbers, in float32 and without a gradient."""
    for case in _cases(vector_group, "coverage_and_rejection_hard"):
        case = decode_numbers(case)
        bottom = torch.tensor(case["is_bottom"])
        policy = None if case["policy"] is None else GradientPolicy(case["policy"])
        share = coverage(torch.zeros(len(bottom)), bottom, policy=policy)
        rejection = rejection_loss(bottom, case["target_coverage"], policy=policy)
        _check(case, (2e-7, 1e-9), share, case["expected"]["coverage"], "coverage")
        _check(case, (2e-7, 1e-9), rejection, case["expected"]["rejection"], "rejection")
        assert (share.dtype, rejection.dtype) == (torch.float32, torch.float32)
        assert not rejection.requires_grad


def test_soft_coverage_matches_the_recorded_cases(vector_group, decode_numbers):
    """Values and gradients are the recorded ones."""
    for case in _cases(vector_group, "soft_coverage_loss"):
        case = decode_numbers(case)
        Q = _tensor(case["Q"], requires_grad=True)
        arguments = (case["tau"], case["temperature"], case["target"], case["mode"])
        result = _run(case, lambda q, a=arguments: soft_coverage_loss(q, *a), Q)
        if result is not None:
            _check(case, (1e-12, 0), result[0], case["expected"]["value"], "value")
            _check(case, (1e-12, 0), result[1][0], case["expected"]["grad_Q"], "grad_Q")


def test_separation_matches_the_recorded_cases(vector_group, decode_numbers):
    """Both means and the gradients of their sum are the recorded ones."""
    for case in _cases(vector_group, "scm_separation_losses"):
        case = decode_numbers(case)
        Q = _tensor(case["Q"], requires_grad=True)
        keywords = {"tau_bot": case["tau_bot"], "tau_finite": case["tau_finite"]}
        mask = torch.tensor(case["mask_censored"])
        result = _run(
            case, lambda q, m=mask, k=keywords: sum(scm_separation_losses(q, mask_censored=m, **k)), Q
        )
        if result is not None:
            down, up = scm_separation_losses(Q, mask_censored=mask, **keywords)
            _check(case, (1e-12, 0), down.item(), case["expected"]["push_down"], "push_down")
            _check(case, (1e-12, 0), up.item(), case["expected"]["push_up"], "push_up")
            _check(case, (1e-12, 0), result[1][0], case["expected"]["grad_Q"], "grad_Q")


def test_training_loss_matches_the_recorded_cases(vector_group, decode_numbers):
    """Total, breakdown and gradients are the recorded ones."""
    for case in vector_group("scm_training_loss"):
        case = decode_numbers(case)
        if "raises" in case["expected"]:
            with pytest.raises(ValueError):
                LossConfig(**case["config"])
            continue
        config = LossConfig(**case["config"])
        P, Q = _tensor(case["P"], requires_grad=True), _tensor(case["Q"], requires_grad=True)
        Y_n, Y_d = _tensor(case["Y_n"]), _tensor(case["Y_d"])
        total, parts = SCMTrainingLoss(config)(
            implicit_loss(P, Q, Y_n, Y_d, gamma=config.gamma),
            P,
            Q,
            Y_n,
            Y_d,
            is_bottom=_mask(case["is_bottom"]),
            mask_finite=_mask(case["mask_finite"]),
            mask_singular=_mask(case["mask_singular"]),
            tau_train=case["tau_train"],
        )
        total.backward()
        _check(case, (1e-7, 1e-12), total.item(), case["expected"]["total"], "total")
        assert set(parts) == set(case["expected"]["breakdown"]), case["id"]
        for term, expected in case["expected"]["breakdown"].items():
            _check(case, (1e-7, 1e-12), parts[term], expected, term)
        _check(case, (1e-7, 1e-12), P.grad, case["expected"]["grad_P"], "grad_P")
        _check(case, (1e-7, 1e-12), Q.grad, case["expected"]["grad_Q"], "grad_Q")


# --- independent formulas -------------------------------------------------------------------------


def _batch(n=40, dtype=F64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 7, (n,), generator=generator)
    targets = lift_semantic_targets(torch.randn(n, generator=generator, dtype=dtype) * 3, codes)
    P = torch.randn(n, generator=generator, dtype=dtype, requires_grad=True)
    Q = (torch.randn(n, generator=generator, dtype=dtype) * 0.3).requires_grad_()
    return P, Q, targets


def _sine_squared(p, q, y, d):
    """sin^2 of the angle between two pairs of numbers, in 60 digits."""
    with mpmath.workdps(60):
        p, q, y, d = (mpmath.mpf(float(x)) for x in (p, q, y, d))
        return float((p * d - q * y) ** 2 / ((p * p + q * q) * (y * y + d * d)))


@pytest.mark.parametrize("magnitude", [1e-30, 1e-8, 1.0, 1e8, 1e30], ids=str)
@pytest.mark.parametrize("target", [0.0, 1e-30, 0.7, -3.0, 1e30], ids=str)
def test_projective_fit_is_the_angle_at_every_magnitude(magnitude, target):
    """Float32 values agree with 60-digit arithmetic for tuples and targets from 1e-30 to 1e30."""
    for p, q in [(0.3, 0.4), (-1.0, 2.0), (1.0, 1e-6), (1e-6, 1.0), (0.0, -1.0), (1.0, 0.0)]:
        for Y_n, Y_d in [(target, 1.0), (1.0, 0.0), (-1.0, 0.0)]:
            tuples = [_tensor([x], torch.float32) for x in (p * magnitude, q * magnitude, Y_n, Y_d)]
            got = projective_fit_loss(*tuples).item()
            assert got == pytest.approx(_sine_squared(*tuples), rel=1e-6, abs=1e-37)


def test_fit_and_sign_agree_with_numpy():
    """The masked means are those of the plain formulas, evaluated without any of the library's helpers."""
    P, Q, targets = _batch()
    p, q, y, d = (x.detach().numpy() for x in (P, Q, targets.Y_n, targets.Y_d))
    trained = targets.mask_trained.numpy()
    sine = (p * d - q * y) ** 2 / ((p * p + q * q) * (y * y + d * d))
    ratio = (p * d - q * y) ** 2 / ((q * d) ** 2 + (p * y) ** 2 + 1e-9)
    cosine = (p * y + q * d) / np.sqrt((p * p + q * q + 1e-9) * (y * y + d * d + 1e-9))
    lifted = (targets.Y_n, targets.Y_d)
    fit = projective_fit_loss(P, Q, *lifted, mask=targets.mask_trained)
    assert fit.item() == pytest.approx(sine[trained].mean(), rel=1e-13)
    implicit = implicit_loss(P, Q, *lifted, mask=targets.mask_trained)
    assert implicit.item() == pytest.approx(np.minimum(ratio, LARGEST)[trained].mean(), rel=1e-13)
    sign = sign_consistency_loss(P, Q, *lifted, mask_singular=targets.mask_oriented)
    assert sign.item() == pytest.approx(np.where(targets.mask_oriented, 1 - cosine, 0).mean(), rel=1e-13)


FITS = [projective_fit_loss, implicit_loss]
TUPLE_LOSSES = [*FITS, sign_consistency_loss]


@pytest.mark.parametrize("loss", TUPLE_LOSSES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_are_the_derivatives(loss, masked):
    """First and second derivatives agree with finite differences, for both formulations of the targets."""
    P, Q, targets = _batch(9)
    keywords = {}
    if masked:
        name = "mask_singular" if loss is sign_consistency_loss else "mask"
        keywords = {name: targets.mask_trained}

    def value(p, q):
        return loss(p, q, targets.Y_n, targets.Y_d, **keywords)

    assert torch.autograd.gradcheck(value, (P, Q))
    assert torch.autograd.gradgradcheck(value, (P, Q))


def test_gradients_of_denominator_terms_are_the_derivatives():
    """Margin, soft coverage and separation agree with finite differences, away from their kinks."""
    _, Q, targets = _batch(9)
    censored = targets.mask_bottom
    for value in (
        lambda q: margin_loss(q, 0.25, targets.mask_finite),
        lambda q: margin_loss(q, 0.25, targets.mask_finite, reduction="conditional"),
        lambda q: soft_coverage_loss(q, 0.2, 0.1, 0.9),
        lambda q: soft_coverage_loss(q, 0.2, 0.1, 0.9, mask=targets.mask_trained),
        lambda q: sum(scm_separation_losses(q, mask_censored=censored, tau_bot=0.1, tau_finite=0.4)),
    ):
        assert torch.autograd.gradcheck(value, (Q,))


def test_gradient_of_the_bounded_part_of_the_implicit_loss_is_its_derivative():
    """Where the denominator is at its floor, the gradient is that of the floored value."""
    P = _tensor([1.0, 2.0, -1.5], requires_grad=True)
    Q = _tensor([1e-4, -5e-4, 2e-4], requires_grad=True)
    zeros, ones = torch.zeros(3, dtype=F64), torch.ones(3, dtype=F64)

    def value(p, q):
        return implicit_loss(p, q, zeros, ones) / LARGEST

    assert value(P, Q).item() == pytest.approx(1.0, rel=1e-6)
    assert torch.autograd.gradcheck(value, (P, Q), eps=1e-9, atol=1e-4)


# --- laws -----------------------------------------------------------------------------------------


def _members(dtype):
    width = 32 if dtype == torch.float32 else 64
    largest = torch.finfo(dtype).max
    special = [
        0.0,
        -0.0,
        torch.finfo(dtype).tiny,
        torch.finfo(dtype).tiny / 1024,
        1e-30,
        1e30,
        largest,
        -largest,
    ]
    return st.one_of(
        st.sampled_from(special),
        st.floats(allow_nan=False, allow_infinity=False, width=width),
        st.floats(-2, 2, width=width),
    )


@st.composite
def _tuples(draw, dtype, targets_up_to=1e30):
    n = draw(st.integers(1, 5))
    members = _members(dtype)
    P = draw(st.lists(members, min_size=n, max_size=n))
    Q = draw(st.lists(members, min_size=n, max_size=n))
    values = draw(
        st.lists(
            st.one_of(st.floats(-3, 3, width=32), st.sampled_from([0.0, targets_up_to, -targets_up_to])),
            min_size=n,
            max_size=n,
        )
    )
    codes = draw(st.lists(st.integers(0, 6), min_size=n, max_size=n))
    targets = lift_semantic_targets(torch.tensor(values, dtype=dtype), torch.tensor(codes))
    return (
        torch.tensor(P, dtype=dtype, requires_grad=True),
        torch.tensor(Q, dtype=dtype, requires_grad=True),
        targets,
    )


def _every_loss(P, Q, targets, gamma=1e-9):
    lifted = (P, Q, targets.Y_n, targets.Y_d)
    down, up = scm_separation_losses(Q, mask_censored=targets.mask_bottom)
    return {
        "projective": projective_fit_loss(*lifted, mask=targets.mask_trained),
        "projective over all": projective_fit_loss(*lifted),
        "implicit": implicit_loss(*lifted, gamma=gamma, mask=targets.mask_trained),
        "implicit over all": implicit_loss(*lifted, gamma=gamma),
        "implicit detached": implicit_loss(*lifted, gamma=gamma, detach_scale=True),
        "margin": margin_loss(Q, 1e-4, targets.mask_finite),
        "margin conditional": margin_loss(Q, 0.3, targets.mask_finite, reduction="conditional"),
        "sign": sign_consistency_loss(*lifted, gamma=gamma),
        "sign over all": sign_consistency_loss(*lifted, gamma=gamma, mask_singular=torch.ones_like(P) > 0),
        "soft coverage": soft_coverage_loss(Q, 1e-4, 1e-2, 0.95),
        "push_down": down,
        "push_up": up,
        "total": SCMTrainingLoss(LossConfig(coverage_term="soft", lambda_push_down=1.0, lambda_push_up=1.0))(
            projective_fit_loss(*lifted),
            *lifted,
            mask_finite=targets.mask_finite,
            mask_singular=targets.mask_oriented,
        )[0],
    }


def _check_finite(P, Q, targets, gamma):
    for name, loss in _every_loss(P, Q, targets, gamma).items():
        gradients = torch.autograd.grad(loss, (P, Q), allow_unused=True)
        assert math.isfinite(loss.item()), (name, loss)
        assert loss.item() >= 0, (name, loss)
        for gradient in gradients:
            assert gradient is None or bool(gradient.isfinite().all()), (name, gradient)


@settings(deadline=None, max_examples=120)
@given(_tuples(torch.float32), st.sampled_from([1e-9, 0.0, 0.5]))
def test_losses_and_gradients_are_finite_in_float32(batch, gamma):
    """For every finite tuple, zero, denormal or huge, all losses and gradients are finite."""
    _check_finite(*batch, gamma)


@settings(deadline=None, max_examples=120)
@given(_tuples(F64, 1e300), st.sampled_from([1e-9, 0.0, 0.5]))
def test_losses_and_gradients_are_finite_in_float64(batch, gamma):
    """The same in float64, whose squares cannot be formed in a wider type."""
    _check_finite(*batch, gamma)


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
@pytest.mark.parametrize("detach_scale", [False, True])
def test_the_largest_targets_have_finite_gradients(dtype, detach_scale):
    """Targets at the end of the range, in whose units gamma is next to nothing, against special tuples."""
    largest, tiny = torch.finfo(dtype).max, torch.finfo(dtype).tiny
    members = torch.tensor([0.0, -0.0, tiny / 1024, tiny, 1.0, largest], dtype=dtype)
    P, Q = (x.flatten().requires_grad_() for x in torch.meshgrid(members, members, indexing="ij"))
    loss = implicit_loss(P, Q, torch.full_like(P, largest), torch.ones_like(Q), detach_scale=detach_scale)
    assert bool(loss.isfinite())
    assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(loss, (P, Q)))


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
@pytest.mark.parametrize("gamma", [0.0, 1e-9])
def test_losses_and_gradients_are_finite_at_special_tuples(dtype, gamma):
    """All pairs of special members, among them the origin with gamma = 0, are finite against every status."""
    largest, tiny = torch.finfo(dtype).max, torch.finfo(dtype).tiny
    special = [0.0, -0.0, tiny / 1024, tiny, 1e-30, 1e-20, 1.0, 1e20, 1e30, largest]
    members = torch.tensor(special, dtype=dtype)
    P, Q, codes = torch.meshgrid(members, members, torch.arange(7, dtype=dtype), indexing="ij")
    P, Q = P.flatten().requires_grad_(), Q.flatten().requires_grad_()
    for value in (0.0, 2.0, 1e30):
        targets = lift_semantic_targets(torch.full_like(P, value).detach(), codes.flatten().long())
        _check_finite(P, Q, targets, gamma)


@settings(deadline=None, max_examples=80)
@given(
    st.tuples(*[st.floats(-2, 2, width=32).filter(lambda x: abs(x) > 1e-3)] * 2),
    st.floats(-5, 5, width=32),
    st.floats(-30, 30),
    st.sampled_from([-1.0, 1.0]),
)
def test_projective_fit_does_not_know_the_scale(pair, target, exponent, sign):
    """In float32, (P, Q) and c*(P, Q) cost the same for c of both signs from 1e-30 to 1e30."""
    c = sign * 10.0**exponent
    P, Q = (_tensor([x], torch.float32) for x in pair)
    for Y_n, Y_d in ((target, 1.0), (1.0, 0.0)):
        Y_n, Y_d = _tensor([Y_n], torch.float32), _tensor([Y_d], torch.float32)
        scaled = (_tensor([x * c], torch.float32) for x in pair)
        expected = projective_fit_loss(P, Q, Y_n, Y_d).item()
        assert projective_fit_loss(*scaled, Y_n, Y_d).item() == pytest.approx(expected, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("target", [0.0, 1.0, -1e30, 1e30])
def test_projective_fit_is_bounded_near_the_pole(target):
    """As Q goes to 0 the loss stays in [0, 1] and so does P times its gradient."""
    P = torch.ones(8, requires_grad=True)
    Q = torch.tensor([1e-3, 1e-6, 1e-12, 1e-20, 1e-30, 1e-38, 1e-45, 0.0], requires_grad=True)
    loss = projective_fit_loss(P, Q, torch.full((8,), target), torch.ones(8))
    gradients = torch.autograd.grad(loss, (P, Q))
    assert 0 <= loss.item() <= 1
    assert all(bool((gradient.abs() <= 1).all()) for gradient in gradients)


def test_no_row_of_the_implicit_loss_costs_more_than_its_bound():
    """A zero target at a pole, or a bottom at P = 0, costs 1e6 at most, and its gradient points back."""
    for P, Q, Y_n, Y_d in [(1.0, 1e-7, 0.0, 1.0), (1e-7, 1.0, 1.0, 0.0), (1e30, 0.0, 0.0, 1.0)]:
        p, q = (_tensor([x], requires_grad=True) for x in (P, Q))
        loss = implicit_loss(p, q, _tensor([Y_n]), _tensor([Y_d]))
        loss.backward()
        assert 0.999 * LARGEST <= loss.item() <= LARGEST * (1 + 1e-12)
        assert max(abs(p.grad.item()), abs(q.grad.item())) < 1e7


def test_implicit_loss_is_right_where_squares_overflow():
    """1e160 is no different from 1, and a target of 1e300 is a target."""
    big = _tensor([1e160], requires_grad=True)
    one = _tensor([1.0])
    loss = implicit_loss(big, _tensor([2e160]), one, one)
    assert loss.item() == pytest.approx(0.2, rel=1e-12)
    loss.backward()
    assert big.grad.item() == pytest.approx(-0.48e-160, rel=1e-12)
    assert implicit_loss(one, one, _tensor([1e300]), one).item() == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["P", "Q", "both"])
def test_a_row_that_is_not_finite_stays_alone(dtype, bad, where):
    """The other rows' gradients are bit for bit those of the batch in which the row is an ordinary one."""
    gradients = []
    for value in (0.5, bad):
        P, Q, targets = _batch(12, dtype)
        with torch.no_grad():
            if where != "Q":
                P[3] = value
            if where != "P":
                Q[3] = value
        losses = _every_loss(P, Q, targets)
        del losses["soft coverage"]  # by itself a mean of all rows; inside of the total it is protected
        if where != "P":
            del losses["total"]
        gradients.append(
            {name: torch.autograd.grad(x, (P, Q), allow_unused=True) for name, x in losses.items()}
        )
    others = torch.arange(12) != 3
    for name, ordinary in gradients[0].items():
        for a, b in zip(ordinary, gradients[1][name], strict=True):
            assert (a is None and b is None) or torch.equal(a[others], b[others]), name


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_masked_row_that_is_not_finite_is_as_if_it_were_absent(bad):
    """Rows outside of the masks change neither the loss nor any gradient, their own included."""
    P, Q, targets = _batch(30)
    ignored = ~targets.mask_trained
    assert bool(ignored.any())
    with torch.no_grad():
        P[ignored] = bad
        Q[ignored] = bad
    lifted = (P, Q, targets.Y_n, targets.Y_d)
    kept = [x.detach()[~ignored].requires_grad_() for x in (P, Q)]
    kept_targets = targets.index(~ignored)
    config = LossConfig(coverage_term="soft", lambda_push_down=1.0, lambda_push_up=1.0)

    def total(p, q, t):
        fit = projective_fit_loss(p, q, t.Y_n, t.Y_d, mask=t.mask_trained)
        fit = fit + implicit_loss(p, q, t.Y_n, t.Y_d, mask=t.mask_trained)
        weights = {"sign": 0.0, "margin": 0.0}  # these two average over the population, ignored rows included
        return SCMTrainingLoss(config)(
            fit,
            p,
            q,
            t.Y_n,
            t.Y_d,
            mask_finite=t.mask_finite,
            mask_censored=t.mask_semantic,
            mask_trained=t.mask_trained,
            weights=weights,
        )[0]

    with_rows, without = total(P, Q, targets), total(*kept, kept_targets)
    assert with_rows.item() == pytest.approx(without.item(), rel=1e-12)
    expected = torch.autograd.grad(without, kept)
    for gradient, other in zip(torch.autograd.grad(with_rows, (P, Q)), expected, strict=True):
        torch.testing.assert_close(gradient[~ignored], other, rtol=1e-12, atol=0)
        assert bool((gradient[ignored] == 0).all())
    sign = sign_consistency_loss(*lifted, mask_singular=targets.mask_oriented)
    margin = margin_loss(Q, 0.3, targets.mask_finite)
    for gradient in torch.autograd.grad(sign + margin, (P, Q)):
        assert bool(gradient.isfinite().all())
        assert bool((gradient[ignored] == 0).all())


def test_a_bad_denominator_leaves_the_soft_coverage_of_the_others():
    """Inside of the objective, a Q that is not finite is a row that is not covered, not a nan for all."""
    Q = _tensor([0.01, math.nan, 0.02, math.inf], requires_grad=True)
    P, Y_n, Y_d = torch.ones(4, dtype=F64), torch.zeros(4, dtype=F64), torch.ones(4, dtype=F64)
    loss = SCMTrainingLoss(LossConfig(coverage_term="soft", lambda_margin=0.0, lambda_sign=0.0))
    _, parts = loss(torch.zeros((), dtype=F64), P, Q, Y_n, Y_d, tau_train=0.0)
    covered = 1 / (1 + np.exp(-np.array([1.0, 2.0])))
    assert parts["rejection"].item() == pytest.approx((0.95 - covered.sum() / 4) ** 2, rel=1e-12)
    total, _ = loss(torch.zeros((), dtype=F64), P, Q, Y_n, Y_d, tau_train=0.0)
    (gradient,) = torch.autograd.grad(total, Q)
    assert bool(gradient.isfinite().all())
    assert bool((gradient[[0, 2]] < 0).all())


def test_separation_keeps_the_groups_apart():
    """A nan among the censored leaves the finite rows' loss and gradient as they are."""
    Q = _tensor([math.nan, 0.01], requires_grad=True)
    down, up = scm_separation_losses(Q, mask_censored=torch.tensor([True, False]))
    assert math.isnan(down.item())
    assert up.item() == pytest.approx(0.0016, rel=1e-12)
    assert torch.autograd.grad(up, Q)[0].tolist() == [0.0, pytest.approx(-0.08)]
    Q = _tensor([0.5, math.inf], requires_grad=True)
    down, up = scm_separation_losses(Q, mask_censored=torch.tensor([True, False]))
    assert (down.item(), up.item()) == (pytest.approx(0.49**2), 0.0)
    assert torch.autograd.grad(down + up, Q)[0].tolist() == [pytest.approx(0.98), 0.0]


@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_exact_zeros_are_pushed_out(zero):
    """Rows known to be finite leave Q = 0 by the one-sided derivative, to the side of the sign bit."""
    outward = -math.copysign(1.0, zero)  # a descent step goes against the gradient
    Q = _tensor([zero, 1.0], requires_grad=True)
    finite = torch.tensor([True, True])
    (margin,) = torch.autograd.grad(margin_loss(Q, 1e-4, finite), Q)
    assert margin[0].item() == pytest.approx(outward * 1e-4, rel=1e-12)
    assert torch.autograd.grad(margin_loss(Q, 1e-4), Q)[0].tolist() == [0.0, 0.0]  # it may be a bottom
    (soft,) = torch.autograd.grad(soft_coverage_loss(Q, 0.1, 0.1, 0.95), Q)
    assert soft[0].item() * outward > 0.01
    masks = {"mask_censored": Q > 0.5, "mask_finite": Q < 0.5}
    (up,) = torch.autograd.grad(scm_separation_losses(Q, **masks)[1], Q)
    assert up[0].item() == pytest.approx(outward * 0.1, rel=1e-12)


def test_a_bottom_without_orientation_is_fitted_from_either_side():
    """The fit of a bottom is even in P and Q, and pulls |Q| down without choosing a sign of P."""
    Y_n, Y_d = torch.ones(1, dtype=F64), torch.zeros(1, dtype=F64)
    for loss in FITS:
        values, pulls = [], []
        for s in (1, -1):
            for r in (1, -1):
                P, Q = _tensor([0.8 * s], requires_grad=True), _tensor([0.5 * r], requires_grad=True)
                value = loss(P, Q, Y_n, Y_d)
                p, q = torch.autograd.grad(value, (P, Q))
                values.append(value.item())
                pulls.append((p.item() * s, q.item() * r))
        assert len(set(values)) == 1
        assert len(set(pulls)) == 1
        assert pulls[0][1] > 0  # |Q| goes down
        assert pulls[0][0] < 0  # |P| goes up, on its own side


def test_orientation_is_trained_only_where_there_is_one():
    """With the mask of the statuses, only censored rows have a gradient of the sign loss."""
    codes = torch.arange(7)
    targets = lift_semantic_targets(torch.ones(7, dtype=F64), codes)
    P, Q = _tensor([-0.5] * 7, requires_grad=True), _tensor([0.4] * 7, requires_grad=True)
    loss = sign_consistency_loss(P, Q, targets.Y_n, targets.Y_d, mask_singular=targets.mask_oriented)
    (gradient,) = torch.autograd.grad(loss, P)
    assert (gradient != 0).tolist() == [False, False, True, True, False, False, False]


def _empty():
    P, Q = (torch.zeros(0, dtype=F64, requires_grad=True) for _ in range(2))
    return P, Q, lift_semantic_targets(torch.zeros(0, dtype=F64), torch.zeros(0, dtype=torch.int64))


def test_an_empty_batch_costs_nothing():
    """All losses of no rows are 0 with empty gradients; the coverage of no rows is 1."""
    P, Q, targets = _empty()
    for name, loss in _every_loss(P, Q, targets).items():
        assert loss.item() == 0, name
        gradients = torch.autograd.grad(loss, (P, Q), allow_unused=True)
        assert all(gradient is None or gradient.shape == (0,) for gradient in gradients), name
    nobody = torch.zeros(0, dtype=torch.bool)
    assert coverage(P, nobody).item() == 1
    assert rejection_loss(nobody).item() == 0


def test_an_empty_group_costs_nothing():
    """Means over no selected row are 0 with zero gradients, not nan."""
    P, Q, targets = _batch(5)
    nobody = torch.zeros(5, dtype=torch.bool)
    lifted = (P, Q, targets.Y_n, targets.Y_d)
    for loss in (
        projective_fit_loss(*lifted, mask=nobody),
        implicit_loss(*lifted, mask=nobody),
        sign_consistency_loss(*lifted, mask_singular=nobody),
        margin_loss(Q, 0.5, nobody, reduction="conditional"),
        soft_coverage_loss(Q, 0.1, 0.1, 0.9, mask=nobody),
        scm_separation_losses(Q, mask_censored=nobody)[0],
        scm_separation_losses(Q, mask_censored=~nobody)[1],
    ):
        assert loss.item() == 0
        for gradient in torch.autograd.grad(loss, (P, Q), allow_unused=True):
            assert gradient is None or bool((gradient == 0).all())


def test_origin_costs_as_much_as_the_worst_answer():
    """(0, 0) answers nothing: the projective fit charges it like a right angle instead of nothing."""
    zero = torch.zeros(1, requires_grad=True)
    loss = projective_fit_loss(zero, zero, torch.tensor([3.0]), torch.ones(1))
    assert loss.item() == 1
    assert torch.autograd.grad(loss, zero)[0].item() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, F64], ids=str)
def test_losses_keep_at_least_single_precision(dtype):
    """Half precision tuples give float32 fit losses and gradients of their own dtype."""
    P, Q, targets = _batch(8)
    P, Q = (x.detach().to(dtype).requires_grad_() for x in (P, Q))
    targets = targets.to(dtype=torch.float32 if dtype != F64 else F64)
    for loss in (projective_fit_loss, implicit_loss, sign_consistency_loss):
        value = loss(P, Q, targets.Y_n, targets.Y_d)
        assert value.dtype == (F64 if dtype == F64 else torch.float32)
        assert torch.autograd.grad(value, P)[0].dtype == dtype


def test_shapes_broadcast():
    """Targets shared by several outputs, and a denominator shared by several numerators, broadcast."""
    P = torch.randn(4, 3, dtype=F64, requires_grad=True)
    Q = torch.randn(4, 1, dtype=F64, requires_grad=True)
    Y_n, Y_d = torch.randn(4, 1, dtype=F64), torch.ones(4, 1, dtype=F64)
    for loss in TUPLE_LOSSES:
        wide = [x.detach().expand(4, 3).clone().requires_grad_() for x in (P, Q, Y_n, Y_d)]
        value, expected = loss(P, Q, Y_n, Y_d), loss(*wide)
        assert value.item() == pytest.approx(expected.item(), rel=1e-13)
        p, q = torch.autograd.grad(value, (P, Q), materialize_grads=True)
        wide_p, wide_q = torch.autograd.grad(expected, wide[:2], materialize_grads=True)
        torch.testing.assert_close(p, wide_p)
        torch.testing.assert_close(q, wide_q.sum(1, keepdim=True))


@pytest.mark.parametrize("member", range(4), ids=["P", "Q", "Y_n", "Y_d"])
@pytest.mark.parametrize(
    "loss_fn",
    [projective_fit_loss, implicit_loss, quotient_loss, sign_consistency_loss],
    ids=lambda loss_fn: loss_fn.__name__,
)
def test_masks_and_weights_are_of_the_rows_whichever_member_has_them(loss_fn, member):
    """Three members may be one number for all rows: what counts is the shape that all four make."""
    members = [_tensor([0.5]), _tensor([2.0]), _tensor([1.0]), _tensor([1.5])]
    members[member] = _tensor([0.3, -1.2, 0.8, 2.5])
    keyword = "mask_singular" if loss_fn is sign_consistency_loss else "mask"
    rows = {keyword: _mask([True, False, True, True]), "row_weights": _tensor([1.0, 5.0, 0.0, 2.0])}
    wide = [one.expand(4).clone() for one in members]
    assert loss_fn(*members, **rows).item() == pytest.approx(loss_fn(*wide, **rows).item(), rel=1e-13)


FAR = 1e200


@pytest.mark.parametrize("member", range(4), ids=["P", "Q", "Y_n", "Y_d"])
@pytest.mark.parametrize(
    ("loss_fn", "expected"),
    [
        (projective_fit_loss, 1 / 2),  # the sine of 45 degrees, squared
        (implicit_loss, 1.0),
        (sign_consistency_loss, 1 - math.sqrt(1 / 2)),
    ],
    ids=["projective", "implicit", "sign"],
)
def test_one_double_member_is_enough_to_need_safe_units(loss_fn, expected, member):
    """A square of 1e200 is no double: with the others in single precision the loss is right all the same."""
    members = [torch.ones(1) for _ in range(4)]
    members[member] = _tensor([FAR])  # one tuple lies along an axis, the other along the diagonal
    P, Q = (one.requires_grad_() for one in members[:2])
    keywords = {"mask_singular": _mask([True])} if loss_fn is sign_consistency_loss else {}
    loss = loss_fn(P, Q, *members[2:], **keywords)
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, (P, Q)))


@pytest.mark.parametrize("loss_fn", [projective_fit_loss, sign_consistency_loss], ids=["projective", "sign"])
@pytest.mark.parametrize("size", [1.0, 1e-18, 1e-24, 1e-30], ids=str)
def test_small_tuples_in_single_precision_have_their_exact_gradient(loss_fn, size):
    """It grows like one over the size; a floor acts only where that leaves the range of the dtype."""
    keywords = {"gamma": 0.0, "mask_singular": _mask([True])} if loss_fn is sign_consistency_loss else {}
    target = _tensor([1.0]), _tensor([0.5])

    def gradients(p, q, *lifted):
        loss = loss_fn(p, q, *lifted, **keywords)
        return torch.autograd.grad(loss, (p, q))

    narrow = [torch.tensor([x * size], requires_grad=True) for x in (0.6, 0.8)]
    unit = [_tensor([x], requires_grad=True) for x in (0.6, 0.8)]
    found = gradients(*narrow, *(t.float() for t in target))
    for got, expected in zip(found, gradients(*unit, *target), strict=True):
        assert got.item() * size == pytest.approx(expected.item(), rel=1e-4)


def test_default_thresholds_are_the_documented_ones():
    """margin asks for |Q| >= 1e-4, and the sign term takes |Y_d| <= 1e-3 for singular."""
    Q = _tensor([2e-5, 5e-5, 2e-4])
    expected = ((1e-4 - 2e-5) ** 2 + (1e-4 - 5e-5) ** 2) / 3
    assert margin_loss(Q).item() == pytest.approx(expected, rel=1e-12)
    Y_d = _tensor([1e-3, 1.1e-3])
    P, Q, Y_n = _tensor([-1.0, -1.0]), _tensor([0.0, 0.0]), _tensor([1.0, 1.0])
    assert sign_consistency_loss(P, Q, Y_n, Y_d).item() == pytest.approx((2.0 + 0.0) / 2, rel=1e-5)


META = {
    "projective": lambda P, Q, Y: projective_fit_loss(P, Q, Y, Y),
    "implicit": lambda P, Q, Y: implicit_loss(P, Q, Y, Y),
    "quotient": lambda P, Q, Y: quotient_loss(P, Q, Y, Y, tau=0.1, hybrid_delta=0.1),
    "sign": lambda P, Q, Y: sign_consistency_loss(P, Q, Y, Y),
    "margin": lambda P, Q, Y: margin_loss(Q, 0.1, Y > 0),
    "soft coverage": lambda P, Q, Y: soft_coverage_loss(Q, 0.1, 0.1, 0.9, mask=Y > 0),
    "ranked coverage": lambda P, Q, Y: ranked_coverage_loss(Q, 0.1, 0.1, 0.9),
    "ranked, masked": lambda P, Q, Y: ranked_coverage_loss(Q, 0.1, 0.1, 0.9, mask=Y > 0),
    "separation": lambda P, Q, Y: sum(scm_separation_losses(Q, mask_censored=Y > 0)),
    "pole": lambda P, Q, Y: pole_loss(P, pole_targets(P, teacher=Y, q_abs=Q.abs(), tags=Y > 0)),
}


@pytest.mark.parametrize("name", META)
def test_losses_stay_on_the_device_of_the_tuples(name):
    """The device "meta" has no values: whoever made a tensor elsewhere, or read one, would fail there."""
    P, Q = (torch.ones(4, device="meta", requires_grad=True) for _ in "PQ")
    loss = META[name](P, Q, torch.ones(4, device="meta"))
    assert loss.device.type == "meta"
    for gradient in torch.autograd.grad(loss, (P, Q), allow_unused=True):
        assert gradient is None or gradient.device.type == "meta"


# --- the objective --------------------------------------------------------------------------------


def _objective(P, Q, targets, config=None, **keywords):
    fit = projective_fit_loss(P, Q, targets.Y_n, targets.Y_d, mask=targets.mask_trained)
    return SCMTrainingLoss(config)(fit, P, Q, targets.Y_n, targets.Y_d, **keywords)


def test_total_is_the_weighted_sum_of_the_single_losses():
    """Each term and each gradient is that of its own function, times its weight."""
    P, Q, targets = _batch()
    config = LossConfig(
        tau_train=0.2,
        lambda_margin=0.7,
        lambda_sign=0.3,
        lambda_rej=2.0,
        coverage_term="soft",
        coverage_temperature=0.1,
        lambda_push_down=0.4,
        lambda_push_up=0.9,
        tau_bottom=0.05,
        tau_finite=0.3,
    )
    total, parts = _objective(
        P,
        Q,
        targets,
        config,
        mask_finite=targets.mask_finite,
        mask_singular=targets.mask_oriented,
        mask_censored=targets.mask_semantic,
        mask_trained=targets.mask_trained,
        weights={"fit": 1.5},
    )
    lifted = (P, Q, targets.Y_n, targets.Y_d)
    down, up = scm_separation_losses(
        Q, mask_censored=targets.mask_semantic, mask_finite=targets.mask_finite, tau_bot=0.05, tau_finite=0.3
    )
    single = {
        "fit": (1.5, projective_fit_loss(*lifted, mask=targets.mask_trained)),
        "margin": (0.7, margin_loss(Q, 0.2, targets.mask_finite)),
        "sign": (0.3, sign_consistency_loss(*lifted, mask_singular=targets.mask_oriented)),
        "rejection": (2.0, soft_coverage_loss(Q, 0.2, 0.1, 0.95, mask=targets.mask_trained)),
        "push_down": (0.4, down),
        "push_up": (0.9, up),
    }
    assert set(parts) == {*single, "total"}
    for term, (_, loss) in single.items():
        assert parts[term].item() == pytest.approx(loss.item(), rel=1e-13), term
        assert not parts[term].requires_grad
    expected = sum(weight * loss for weight, loss in single.values())
    assert total.item() == pytest.approx(expected.item(), rel=1e-13)
    got = torch.autograd.grad(total, (P, Q))
    for gradient, other in zip(got, torch.autograd.grad(expected, (P, Q)), strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-12, atol=1e-15)


def test_a_weight_of_zero_leaves_the_term_out():
    """A term without weight is not computed, whatever its rows hold, and reads 0."""
    P, Q, targets = _batch()
    with torch.no_grad():
        Q[0] = math.nan
    nothing = {"margin": 0.0, "sign": 0.0, "rejection": 0.0}
    fit = torch.ones((), dtype=F64, requires_grad=True)
    total, parts = SCMTrainingLoss()(fit, P, Q, targets.Y_n, targets.Y_d, weights=nothing)
    assert total.item() == 1
    assert {term: value.item() for term, value in parts.items()} == {
        "fit": 1,
        "margin": 0,
        "sign": 0,
        "rejection": 0,
        "total": 1,
    }


@pytest.mark.parametrize("coverage_term", ["hard", "soft", "ranked"])
def test_the_hard_coverage_is_measured_only_where_it_is_the_term(coverage_term):
    """The answers that are bottom are for the hard term: no other one is replaced or added to by it."""
    P, Q, targets = _batch()
    config = LossConfig(coverage_term=coverage_term, tau_train=0.5, coverage_temperature=0.1, lambda_rej=3.0)
    bottom = torch.ones_like(Q, dtype=torch.bool)
    total, parts = _objective(P, Q, targets, config, is_bottom=bottom)
    without, known = _objective(P, Q, targets, config)
    if coverage_term == "hard":
        assert parts["rejection"].item() == pytest.approx(0.95**2, rel=1e-6)
        assert known["rejection"].item() == 0
        assert total.item() == pytest.approx(without.item() + 3 * 0.95**2, rel=1e-6)
    else:
        assert parts["rejection"].item() == known["rejection"].item() > 0
        assert total.item() == without.item()


def test_a_hard_coverage_without_weight_is_not_measured():
    """It reads 0 and adds nothing, as every term whose weight is 0."""
    P, Q, targets = _batch()
    bottom = torch.ones_like(Q, dtype=torch.bool)
    total, parts = _objective(P, Q, targets, is_bottom=bottom, weights={"rejection": 0.0})
    assert parts["rejection"].item() == 0
    assert total.item() == _objective(P, Q, targets)[0].item()


@pytest.mark.parametrize("weighted", ["push_down", "push_up"])
def test_of_the_separation_only_what_has_a_weight_is_computed(weighted):
    """A group without weight is not in the breakdown, whatever its rows hold."""
    P, Q, targets = _batch()
    _, parts = _objective(P, Q, targets, weights={weighted: 1.0})
    assert {"push_down", "push_up"} & set(parts) == {weighted}


GATED = {"margin": 1.0, "sign": 1.0, "push_down": 1.0, "push_up": 1.0}


@pytest.mark.parametrize("term", [*GATED, "rejection"])
def test_each_term_alone_is_gated_or_free(term):
    """Under REJECT the gradients of all terms but the coverage are 0, also of a term that is alone."""
    P, Q = (_tensor([0.3, -0.2, 0.4], requires_grad=True) for _ in "PQ")
    Y_n, Y_d = _tensor([-1.0, 1.0, 0.5]), _tensor([0.0, 0.0, 1.0])
    config = LossConfig(coverage_term="soft", tau_train=0.5, coverage_temperature=0.1, tau_finite=0.5)
    only = {"fit": 0.0, "margin": 0.0, "sign": 0.0, "rejection": 0.0, term: 1.0}

    def pull(policy):
        with gradient_policy(policy):
            total, _ = SCMTrainingLoss(config)(_tensor(0.0), P, Q, Y_n, Y_d, weights=only)
            gradients = torch.autograd.grad(total, (P, Q), materialize_grads=True)
        return sum(g.abs().sum().item() for g in gradients)

    assert pull(GradientPolicy.PASSTHROUGH) > 0
    assert (pull(GradientPolicy.REJECT) > 0) == (term == "rejection")


def test_terms_are_gated_at_their_own_threshold():
    """A bottom of the margin is |Q| below tau_train, not below the threshold of the context."""
    Q = _tensor([0.3, 0.6], requires_grad=True)
    P, Y_n, Y_d = _tensor([1.0, 1.0], requires_grad=True), _tensor([-1.0, -1.0]), _tensor([0.0, 0.0])
    objective = SCMTrainingLoss(LossConfig(tau_train=0.5))
    only_sign = {"fit": 0.0, "margin": 0.0, "rejection": 0.0, "sign": 1.0}
    with gradient_policy(GradientPolicy.PROJECT, tau=1e-6):
        margin = torch.autograd.grad(margin_loss(Q, 0.5), Q)[0]
        whole = objective(_tensor(0.0), P, Q, Y_n, Y_d, weights=only_sign)[0]
        in_parts = objective.terms(_tensor(0.0), P, Q, Y_n, Y_d, weights=only_sign).total()
        for total in (whole, in_parts):
            by_p, by_q = torch.autograd.grad(total, (P, Q))
            assert (by_p[0], by_q[0]) == (0, 0)
            assert by_p[1] != 0
    assert margin.tolist() == [0, 0]
    assert torch.autograd.grad(margin_loss(Q, 0.5), Q)[0][0] != 0  # outside of any context


@pytest.mark.parametrize("how", ["integers", "one a row"])
def test_masks_of_the_objective_expand_to_its_rows(how):
    """Masks may be integers, and one entry may stand for all outputs of a row."""
    P, Q = torch.randn(2, 3, 2, generator=torch.Generator().manual_seed(0), dtype=F64).unbind(0)
    Y_n, Y_d = torch.ones(3, 2, dtype=F64), torch.tensor([[0.0], [1.0], [0.0]], dtype=F64).expand(3, 2)
    given = _mask([[1], [0], [1]]) if how == "integers" else _mask([[True], [False], [True]])
    exact = given.bool().expand(3, 2)
    config = LossConfig(lambda_push_down=1.0, lambda_push_up=1.0, tau_finite=0.5, lambda_sign=1.0)

    def total(mask):
        masks = {"mask_finite": ~mask.bool(), "mask_singular": mask, "mask_censored": mask}
        return SCMTrainingLoss(config)(_tensor(0.0), P, Q, Y_n, Y_d, **masks)[0].item()

    assert total(given) == pytest.approx(total(exact), rel=1e-14)


def test_the_parts_of_the_objective_follow_what_the_call_overrides():
    """Weights, target coverage and row weights act on the parts as they do on the total."""
    P, Q, targets = _batch()
    bottom = torch.arange(len(Q)) % 2 == 0
    overrides = {
        "is_bottom": bottom,
        "weights": {"fit": 2.0, "margin": 5.0, "sign": 0.5, "rejection": 7.0},
        "target_coverage": 0.8,
        "row_weights": torch.linspace(0.1, 3.0, len(Q), dtype=F64),
    }
    fit = projective_fit_loss(P, Q, targets.Y_n, targets.Y_d)
    objective, lifted = SCMTrainingLoss(LossConfig(tau_train=0.5)), (P, Q, targets.Y_n, targets.Y_d)
    total, breakdown = objective(fit, *lifted, **overrides)
    parts = objective.terms(fit, *lifted, **overrides)
    assert parts.task.item() == pytest.approx(2.0 * fit.item(), rel=1e-14)
    for term, value in parts.auxiliaries.items():
        assert value.item() == pytest.approx(overrides["weights"][term] * breakdown[term].item(), rel=1e-6)
    covered = (overrides["row_weights"] * ~bottom).sum() / overrides["row_weights"].sum()
    assert breakdown["rejection"].item() == pytest.approx((0.8 - covered.item()) ** 2, rel=1e-5)
    assert parts.total().item() == pytest.approx(total.item(), rel=1e-6)


@pytest.mark.parametrize("term", ["margin", "push_up"])
@pytest.mark.parametrize("named", [False, True])
def test_an_exact_zero_leaves_where_a_mask_says_that_it_is_finite(term, named):
    """In the objective as in the single losses: without a mask nothing says that the zero is wrong."""
    P, Y_n, Y_d = _tensor([1.0]), _tensor([1.0]), _tensor([1.0])
    Q = _tensor([0.0], requires_grad=True)
    only = {"fit": 0.0, "margin": 0.0, "sign": 0.0, "rejection": 0.0, term: 1.0}
    mask = {"mask_finite": _mask([True])} if named else {}
    with policies_disabled():
        total, _ = SCMTrainingLoss(LossConfig(tau_train=0.1))(
            _tensor(0.0), P, Q, Y_n, Y_d, weights=only, **mask
        )
        assert (torch.autograd.grad(total, Q)[0].item() < 0) == named


@pytest.mark.parametrize("term", ["soft", "ranked"])
@pytest.mark.parametrize("masked", [False, True])
def test_row_weights_reach_the_coverage_terms_of_the_objective(term, masked):
    """The term is its own function of the same weights and rows."""
    P, Q, targets = _batch()
    weights = torch.linspace(0.0, 2.0, len(Q), dtype=F64)
    rows = {"mask_trained": targets.mask_trained} if masked else {}
    config = LossConfig(coverage_term=term, tau_train=1.5, coverage_temperature=0.5, target_coverage=0.9)
    _, parts = _objective(P, Q, targets, config, row_weights=weights, **rows)
    alone = soft_coverage_loss if term == "soft" else ranked_coverage_loss
    mask = targets.mask_trained if masked else None
    expected = alone(Q, 1.5, 0.5, 0.9, mask=mask, row_weights=weights)
    assert parts["rejection"].item() == pytest.approx(expected.item(), rel=1e-13)
    assert expected > 0


def test_a_coverage_of_one_row_is_its_own():
    """The soft coverage over a mask that leaves one row, against its formula."""
    Q = _tensor([0.3, 5.0, 5.0])
    loss = soft_coverage_loss(Q, 0.5, 0.1, 0.9, mask=_mask([True, False, False]))
    assert loss.item() == pytest.approx((0.9 - 1 / (1 + math.exp(2.0))) ** 2, rel=1e-12)


def test_push_up_alone_needs_no_masks():
    """Groups that are not given are read off the targets."""
    P, Q, targets = _batch()
    config = LossConfig(lambda_push_up=1.0, lambda_sign=0.0)
    _, parts = _objective(P, Q, targets, config)
    assert parts["push_up"].item() == pytest.approx(
        scm_separation_losses(Q, mask_censored=targets.Y_d == 0)[1].item(), rel=1e-13
    )


def test_hard_and_soft_coverage_differ_in_that_one_trains():
    """The hard term has no gradient on Q at all, the soft one raises coverage."""
    P, Q, targets = _batch()
    keywords = {"weights": {"fit": 0.0, "margin": 0.0, "sign": 0.0, "rejection": 1.0}}
    bottom = Q.detach().abs() < 0.5
    hard, _ = _objective(P, Q, targets, LossConfig(), is_bottom=bottom, **keywords)
    assert hard.item() > 0
    assert bool((torch.autograd.grad(hard, Q)[0] == 0).all())
    soft, _ = _objective(P, Q, targets, LossConfig(coverage_term="soft", tau_train=0.5), **keywords)
    assert bool((torch.autograd.grad(soft, Q)[0] * Q < 0).any())


SETTINGS = {
    "tau": torch.tensor([0.05, 0.2, 0.4], dtype=F64),
    "target": torch.tensor([0.9, 0.5, 0.99], dtype=F64),
    "margin": torch.tensor([0.1, 0.0, 3.0], dtype=F64),
    "sign": torch.tensor([1.0, 0.5, 0.0], dtype=F64),
    "rejection": torch.tensor([0.3, 1.0, 2.0], dtype=F64),
}


@pytest.mark.parametrize("fit_loss", FITS, ids=lambda f: f.__name__)
def test_a_vectorised_stack_of_trials_equals_single_trials(fit_loss):
    """Under vmap(grad), with a threshold, target and weights per trial, each trial trains as if alone."""
    targets = _batch(20)[2]
    P = torch.randn(3, 20, dtype=F64)
    Q = torch.randn(3, 20, dtype=F64) * 0.3
    P[1, 4] = math.nan  # one trial's nan must not reach its neighbours
    config = LossConfig(coverage_term="soft", lambda_push_down=0.5, lambda_push_up=0.5)

    def objective(p, q, setting):
        fit = fit_loss(p, q, targets.Y_n, targets.Y_d, mask=targets.mask_trained)
        total, parts = SCMTrainingLoss(config)(
            fit,
            p,
            q,
            targets.Y_n,
            targets.Y_d,
            mask_finite=targets.mask_finite,
            mask_singular=targets.mask_oriented,
            tau_train=setting["tau"],
            target_coverage=setting["target"],
            weights={term: setting[term] for term in ("margin", "sign", "rejection")},
        )
        return total, parts

    stacked, parts = torch.func.vmap(torch.func.grad(objective, argnums=(0, 1), has_aux=True))(P, Q, SETTINGS)
    for k in range(3):
        p, q = P[k].clone().requires_grad_(), Q[k].clone().requires_grad_()
        total, single = objective(p, q, {name: value[k] for name, value in SETTINGS.items()})
        for gradient, alone in zip(stacked, torch.autograd.grad(total, (p, q)), strict=True):
            torch.testing.assert_close(gradient[k], alone, rtol=1e-12, atol=1e-15, equal_nan=True)
        for term, value in single.items():
            torch.testing.assert_close(parts[term][k], value, rtol=1e-12, atol=0, equal_nan=True)


def test_second_derivatives_work_under_transforms():
    """The Hessian through torch.func is that of ordinary double differentiation."""
    P, Q, targets = _batch(5)

    def value(p):
        return projective_fit_loss(p, Q.detach(), targets.Y_n, targets.Y_d)

    got = torch.func.jacrev(torch.func.grad(value))(P.detach())
    expected = torch.autograd.functional.hessian(value, P.detach())
    torch.testing.assert_close(got, expected)


ONE = torch.ones(1)
TWO = torch.ones(2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: implicit_loss(ONE, ONE, ONE, ONE, gamma=-1.0),
            "gamma must be finite and >= 0, got gamma=-1.0",
        ),
        (lambda: implicit_loss(ONE, ONE, ONE, ONE, mask=TWO > 0), "mask must expand to shape"),
        (lambda: projective_fit_loss(ONE, ONE, ONE, ONE, mask=TWO > 0), "mask must expand to shape"),
        (lambda: margin_loss(ONE, math.inf), "tau_train must be finite"),
        (lambda: margin_loss(ONE, reduction="mean"), "reduction must be one of"),  # type: ignore[arg-type]
        (lambda: sign_consistency_loss(ONE, ONE, ONE, ONE, math.nan), "gamma must be finite"),
        (lambda: sign_consistency_loss(ONE, ONE, ONE, ONE, epsilon_sing=-1.0), "epsilon_sing must be finite"),
        (
            lambda: sign_consistency_loss(ONE, ONE, ONE, ONE, 0.0, TWO > 0),
            "mask_singular must expand to shape",
        ),
        (
            lambda: rejection_loss(ONE > 0, 1.5),
            r"target_coverage must be in \[0, 1\], got target_coverage=1.5",
        ),
        (lambda: rejection_loss(ONE > 0, math.nan), "target_coverage must be in"),
        (lambda: soft_coverage_loss(ONE, 0.1, 0.0, 0.9), "temperature must be > 0"),
        (lambda: soft_coverage_loss(ONE, 0.1, math.nan, 0.9), "temperature must be finite"),
        (lambda: soft_coverage_loss(ONE, 0.1, 0.1, 0.9, "over"), "mode must be 'under'"),
        (lambda: scm_separation_losses(ONE, mask_censored=TWO > 0), "mask_censored must expand to shape"),
        (
            lambda: scm_separation_losses(ONE, mask_censored=ONE > 0, tau_bot=0.2, tau_finite=0.1),
            "tau_finite must be >= tau_bot",
        ),
        *(
            (lambda name=name: LossConfig(**{name: -1.0}), f"{name} must be")
            for name in (
                *("gamma", "tau_train", "epsilon_sing", "lambda_margin", "lambda_sign", "lambda_rej"),
                *("coverage_temperature", "lambda_push_down", "lambda_push_up", "target_coverage"),
            )
        ),
        (lambda: LossConfig(coverage_term="both"), "coverage_term must be one of"),
        (lambda: LossConfig(coverage_temperature=0.0), "coverage_temperature must be > 0"),
        (lambda: LossConfig(lambda_sign=-1.0), "lambda_sign must be finite and >= 0"),
        (lambda: LossConfig(lambda_push_up=math.nan), "lambda_push_up must be finite"),
        (lambda: LossConfig(tau_bottom=0.2), "tau_finite must be >= tau_bot"),
        (lambda: SCMTrainingLoss()(ONE[0], ONE, ONE, ONE, ONE, weights={"sing": 1.0}), "must name terms of"),
        (
            lambda: SCMTrainingLoss()(ONE[0], ONE, ONE, ONE, ONE, weights={"sign": -1.0}),
            "'sign'.*finite and >= 0",
        ),
        (lambda: SCMTrainingLoss()(ONE[0], ONE, ONE, ONE, ONE, tau_train=-1.0), "tau_train must be finite"),
        (
            lambda: SCMTrainingLoss()(ONE[0], ONE, ONE, ONE, ONE, target_coverage=2.0),
            "target_coverage must be in",
        ),
    ],
)
def test_bad_arguments_are_refused(call, message):
    """Each bad argument is refused by name, rule and value."""
    with pytest.raises(ValueError, match=message):
        call()


def test_complex_tuples_are_refused():
    """The orientation of a complex tuple is not defined here."""
    with pytest.raises(TypeError, match="must be real"):
        sign_consistency_loss(ONE.to(torch.complex64), ONE, ONE, ONE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_gradient_too_large_for_its_dtype_is_the_largest_number_there(dtype: torch.dtype) -> None:
    """At the origin, with gamma 0, the orientation term is steeper than half precision can say."""
    P = torch.zeros(1, dtype=dtype, requires_grad=True)
    Q = torch.zeros(1, dtype=dtype, requires_grad=True)
    zero, one = torch.zeros(1, dtype=dtype), torch.ones(1, dtype=dtype)
    sign_consistency_loss(P, Q, zero, one, 0.0, torch.tensor([True])).backward()
    assert P.grad is not None
    assert Q.grad is not None
    assert bool(P.grad.isfinite().all())
    assert bool(Q.grad.isfinite().all())
    assert float(Q.grad) < 0
