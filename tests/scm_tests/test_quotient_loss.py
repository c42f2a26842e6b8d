"""The loss on P/Q against finite differences and exact values, at poles, and over whole trainings."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import grad, vmap

from scm.autodiff.policies import GradientPolicy, gradient_policy
from scm.core import TRTag, tags_of_tuples
from scm.data import Split
from scm.losses.quotient import BASES, LARGEST, quotient_loss
from scm.models import make_model
from scm.training.companion import Moment
from scm.training.targets import lift_semantic_targets
from scm.trial import decode_split, make_trainer
from scm.trial_config import TrialConfig

F64 = torch.float64
BIG = 3e38

anything = st.floats(allow_nan=False, allow_infinity=False) | st.sampled_from(
    [0.0, -0.0, 1e-45, -1e-45, 1e-20, BIG, -BIG, 1.7e308, -1.7e308]
)
moderate = st.floats(-8, 8).map(lambda x: round(x, 3))
off_zero = moderate.filter(lambda x: abs(x) >= 1e-3)


def tensor(*values: float, dtype: torch.dtype = F64) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def loss_and_gradients(
    P: Tensor, Q: Tensor, *args: Tensor, **keywords: object
) -> tuple[Tensor, Tensor, Tensor]:
    P, Q = P.clone().requires_grad_(), Q.clone().requires_grad_()
    loss = quotient_loss(P, Q, *args, **keywords)
    return (loss.detach(), *torch.autograd.grad(loss, (P, Q)))


def test_gradients_of_a_quotient_match_the_recorded_ones(vector_group):
    """Both derivatives of p/q are the mathematical ones, also where the denominator is negative."""
    for case in vector_group("transreal_division_gradient"):
        p, q = case["p"], case["q"]
        target = tensor(p / q - 1.0)  # the residual is 1, so that the loss has the quotient's own gradient
        _, by_p, by_q = loss_and_gradients(tensor(p), tensor(q), target, tensor(1.0))
        assert by_p.item() == pytest.approx(case["exact"]["dp"], rel=1e-12)
        assert by_q.item() == pytest.approx(case["exact"]["dq"], rel=1e-12)


@pytest.mark.parametrize("base", BASES)
def test_gradients_are_those_of_finite_differences(base):
    """In P and Q, for both signs of the denominator, for numbers, infinities and bottoms together."""
    drawn = torch.Generator().manual_seed(3)
    P, Q, Y_n = torch.randn(3, 24, generator=drawn, dtype=F64).unbind(0)
    Q = torch.where(Q.abs() < 0.2, Q.sign() * 0.2, Q)
    assert int((Q < 0).sum()) > 5
    finite = torch.arange(24) % 4 != 0
    side = torch.where(finite, 0, torch.arange(24) % 3 - 1)
    keywords = {"mask_finite": finite, "orientation": side, "lambda_rej": 0.7, "base": base}
    keywords["mask"] = torch.arange(24) % 5 != 1

    def loss(p: Tensor, q: Tensor) -> Tensor:
        return quotient_loss(p, q, Y_n, torch.ones_like(Y_n), **keywords)

    inputs = (P.requires_grad_(), Q.requires_grad_())
    assert torch.autograd.gradcheck(loss, inputs)
    assert torch.autograd.gradgradcheck(loss, inputs)


@pytest.mark.parametrize(
    "base, cost", [("mse", lambda r: r * r / 2), ("mae", abs), ("huber", lambda r: 0.5 * (abs(r) - 0.25))]
)
def test_a_number_costs_the_base_loss_of_its_residual(base, cost):
    """mse is half the square, mae the absolute value, huber linear beyond its bound: not another mse."""
    loss = quotient_loss(tensor(6.0), tensor(-2.0), tensor(1.0), tensor(2.0), base=base, huber_delta=0.5)
    assert loss.item() == pytest.approx(cost(-3.5))


@pytest.mark.parametrize("residual", [-3.5, -0.2, 0.2, 3.5])
def test_huber_is_symmetric_and_linear_beyond_its_bound(residual):
    """Below the target as above it: the slope is the residual, and at most the bound, 1 by default."""
    for keywords, delta in (({}, 1.0), ({"huber_delta": 0.5}, 0.5)):
        loss, by_p, by_q = loss_and_gradients(
            tensor(2.0 + residual), tensor(1.0), tensor(2.0), tensor(1.0), base="huber", **keywords
        )
        slope = max(-delta, min(delta, residual))
        assert loss.item() == pytest.approx(abs(slope) * (abs(residual) - abs(slope) / 2))
        assert by_p.item() == pytest.approx(slope)
        assert by_q.item() == pytest.approx(-slope * (2.0 + residual))


def test_an_answer_at_the_threshold_has_a_value():
    """As in strict decoding: |Q| equal to tau is accepted, the next number below it is not."""
    below = math.nextafter(0.1, 0.0)
    P, Q = tensor(1.0, 1.0, 1.0, 1.0), tensor(0.1, -0.1, below, -below)
    Y_n, Y_d = torch.zeros_like(P), torch.ones_like(P)
    _, by_p, _ = loss_and_gradients(P, Q, Y_n, Y_d, tau=0.1)
    assert (by_p != 0).tolist() == [True, True, False, False]


def test_a_quotient_beyond_the_largest_number_is_no_value():
    """P and Q may be finite where their quotient is not; then the answer is a bottom, and trains nothing."""
    P, Q = (torch.tensor([x], requires_grad=True) for x in (1e30, 1e-30))
    loss = quotient_loss(P, Q, torch.zeros(1), torch.ones(1), lambda_rej=0.25)
    assert loss.item() == 0.25
    assert [g.item() for g in torch.autograd.grad(loss, (P, Q))] == [0.0, 0.0]


def test_the_given_mask_says_which_targets_are_numbers():
    """Whatever the tuple looks like: a row that the mask leaves out is pulled to where no value is."""
    rows = tensor(2.0, 2.0), tensor(0.5, 0.5), tensor(0.0, 0.0), tensor(1.0, 1.0)
    mask = torch.tensor([True, False])
    loss, _, by_q = loss_and_gradients(*rows, mask_finite=mask, orientation=torch.tensor([0, 0]))
    assert loss.item() == pytest.approx((4.0**2 / 2 + 0.5) / 2)
    assert by_q[1].item() == pytest.approx(1 / 2)


def test_a_bottom_of_the_gate_is_one_of_the_loss():
    """A policy that stops gradients at bottoms stops those below tau; without a tau, below 1e-4."""
    P, Q = tensor(1.0, 1.0, 1.0), tensor(0.3, 1e-3, 1e-5)
    Y_n, Y_d = tensor(1.0, 1.0, 1.0), tensor(0.0, 0.0, 0.0)
    for tau, passes in ((None, [True, True, False]), (0.1, [True, False, False])):
        with gradient_policy(GradientPolicy.PROJECT, tau=1e-12):
            _, _, by_q = loss_and_gradients(P, Q, Y_n, Y_d, tau=tau)
        assert (by_q != 0).tolist() == passes


@pytest.mark.parametrize("q", [1e-310, -1e-310, 5e-324])
@pytest.mark.parametrize("target", [1.0, -1.0])
def test_a_numerator_of_zero_over_next_to_nothing_has_finite_gradients(q, target):
    """The quotient is 0 and its slope beyond every number: the slope in Q is their product, 0."""
    loss, by_p, by_q = loss_and_gradients(tensor(0.0), tensor(q), tensor(target), tensor(1.0))
    assert loss.item() == pytest.approx(0.5)
    assert by_p.isfinite().item()
    assert by_p.item() * target * q <= 0
    assert by_q.item() == 0


@pytest.mark.parametrize("p", [BIG, -BIG])
@pytest.mark.parametrize("bound", [1e-12, torch.tensor(1e-12)], ids=["number", "tensor"])
def test_saturated_gradients_count_a_residual_up_to_its_largest(p, bound):
    """Their slope is at most the largest residual, on both sides of the target."""
    keywords = {"hybrid_delta": 0.1, "hybrid_bound": bound, "tau": 0.0}
    for q in (1e-12, -1e-12):
        _, by_p, _ = loss_and_gradients(tensor(p), tensor(q), tensor(0.0), tensor(1.0), **keywords)
        expected = math.copysign(LARGEST, p) / math.hypot(1e-12, 1e-12)
        assert by_p.item() == pytest.approx(expected, rel=1e-6)


def test_the_default_bound_of_saturated_gradients_is_one():
    """h is sqrt(Q^2 + 1)."""
    p, q, t = 2.0, 0.05, 0.3
    _, by_p, by_q = loss_and_gradients(tensor(p), tensor(q), tensor(t), tensor(1.0), hybrid_delta=0.1)
    h = math.sqrt(q * q + 1)
    residual = (p - q * t) / h
    assert by_p.item() == pytest.approx(residual / h)
    assert by_q.item() == pytest.approx(-residual * p / (h * h))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, F64], ids=str)
def test_the_loss_is_of_single_precision_at_least(dtype):
    """Its own arithmetic is in double precision, and does not show in the dtype of the loss."""
    P, Q = (torch.ones(2, dtype=dtype, requires_grad=True) for _ in "PQ")
    loss = quotient_loss(P, Q, torch.zeros(2, dtype=dtype), torch.ones(2, dtype=dtype))
    assert loss.dtype == (F64 if dtype == F64 else torch.float32)
    assert [g.dtype for g in torch.autograd.grad(loss, (P, Q))] == [dtype, dtype]


def test_an_answer_without_value_costs_the_rejection_and_trains_nothing():
    """Mask-REAL: at poles, below the threshold, and where nothing is a number, on a target that is one."""
    P = tensor(1.0, -1.0, 0.0, 1.0, math.nan, math.inf, 1.0)
    Q = tensor(0.0, -0.0, 0.0, 0.05, 1.0, 1.0, math.nan)
    Y_n, Y_d = torch.zeros_like(P), torch.ones_like(P)
    loss, by_p, by_q = loss_and_gradients(P, Q, Y_n, Y_d, tau=0.1, lambda_rej=0.3)
    assert loss.item() == pytest.approx(0.3)
    assert by_p.tolist() == by_q.tolist() == [0.0] * 7


def test_tags_say_which_answers_have_a_value():
    """Given tags take the place of the threshold; without either, every finite quotient has a value."""
    P, Q, Y_n, Y_d = tensor(1.0, 1.0), tensor(0.5, 0.5), tensor(0.0, 0.0), tensor(1.0, 1.0)
    tags = torch.tensor([TRTag.REAL, TRTag.PINF], dtype=torch.int8)
    loss, by_p, _ = loss_and_gradients(P, Q, Y_n, Y_d, tags=tags, lambda_rej=10.0)
    assert loss.item() == pytest.approx((2.0 + 10.0) / 2)
    assert by_p.tolist() == [2.0, 0.0]
    assert quotient_loss(P, Q, Y_n, Y_d, lambda_rej=10.0).item() == pytest.approx(2.0)
    algebraic = quotient_loss(P, Q, Y_n, Y_d, tags=tags_of_tuples(P, Q), lambda_rej=10.0)
    assert algebraic.item() == pytest.approx(2.0)


def test_a_target_without_value_draws_q_to_zero_and_p_to_its_side():
    """The orientation term has a gradient, at exact poles too, and none where there is no orientation."""
    P = tensor(-0.5, -0.5, 2.0, -0.5, -0.5)
    Q = tensor(0.25, 0.0, -0.25, 0.25, -0.25)
    side = torch.tensor([1, 1, 1, -1, 0])
    finite = torch.zeros(5, dtype=torch.bool)
    loss, by_p, by_q = loss_and_gradients(
        P, Q, torch.ones(5), torch.zeros(5), mask_finite=finite, orientation=side, lambda_rej=2.0
    )
    distances = [0.25 + 1.5, 1.5, 0.25, 0.25 + 0.5, 0.25]
    assert loss.item() == pytest.approx(2.0 * sum(distances) / 5)
    assert (5 * by_p / 2.0).tolist() == [-1.0, -1.0, 0.0, 1.0, 0.0]
    assert (5 * by_q / 2.0).tolist() == [1.0, 0.0, -1.0, 1.0, -1.0]


def test_sentinels_have_the_side_of_their_numerator():
    """Without masks, Y_d = 0 is no number, and the sign of Y_n is its orientation."""
    P, Q = tensor(0.5, 0.5), tensor(0.25, 0.25)
    implied = quotient_loss(P, Q, tensor(-1.0, 3.0), tensor(0.0, 1.0))
    said = quotient_loss(
        P,
        Q,
        tensor(-1.0, 3.0),
        tensor(0.0, 1.0),
        mask_finite=torch.tensor([False, True]),
        orientation=torch.tensor([-1, 0]),
    )
    assert implied.item() == said.item() == pytest.approx((0.25 + 1.5 + 0.5) / 2)


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
@pytest.mark.parametrize("hybrid_delta", [None, 0.5])
@given(rows=st.lists(st.tuples(anything, anything, anything, st.integers(-1, 2)), min_size=1, max_size=5))
@example(rows=[(BIG, 1e-45, -BIG, 2), (0.0, 1e-45, BIG, 2), (BIG, BIG, 0.0, 1), (1.0, 0.0, 1.0, 2)])
def test_values_and_gradients_are_finite_for_all_finite_tuples(dtype, hybrid_delta, rows):
    """Nothing overflows or becomes nan, whatever the magnitudes, at exact poles as elsewhere."""
    P, Q, Y_n, status = (tensor(*column) for column in zip(*rows, strict=True))
    finite = status == 2
    largest = torch.finfo(dtype).max
    found = loss_and_gradients(
        *(x.clamp(-largest, largest).to(dtype) for x in (P, Q, Y_n)),
        finite.to(dtype),
        orientation=torch.where(finite, 0, status),
        hybrid_delta=hybrid_delta,
        hybrid_bound=0.1,
    )
    assert all(bool(part.isfinite().all()) for part in found)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 0.0], ids=str)
@pytest.mark.parametrize("member", [0, 1], ids=["P", "Q"])
@pytest.mark.parametrize("hybrid_delta", [None, 0.2])
def test_a_bad_row_leaves_the_others_as_they_were(bad, member, hybrid_delta):
    """Gradients to the bit, and the loss of the others is what the mean holds of them."""
    pair = [torch.linspace(1, -1, 8, dtype=F64), torch.linspace(-0.7, 0.8, 8, dtype=F64)]
    status = torch.arange(8) % 4 != 0
    targets = (torch.linspace(-2, 2, 8, dtype=F64), status.to(F64))
    clean = loss_and_gradients(*pair, *targets, hybrid_delta=hybrid_delta)
    for row in range(8):
        spoiled = [x.clone() for x in pair]
        spoiled[member][row] = bad
        found = loss_and_gradients(*spoiled, *targets, hybrid_delta=hybrid_delta)
        others = torch.arange(8) != row
        assert torch.equal(found[1][others], clean[1][others])
        assert torch.equal(found[2][others], clean[2][others])
        alone = quotient_loss(*(x[row] for x in spoiled), *(y[row] for y in targets))
        was = quotient_loss(*(x[row] for x in pair), *(y[row] for y in targets))
        assert found[0].item() == pytest.approx((clean[0] + (alone - was) / 8).item())


@given(moderate, off_zero, moderate, st.sampled_from(list(BASES)), st.sampled_from([0.1, 1.0]))
@example(p=1.0, q=0.005, t=100.0, base="mse", bound=1.0)
@example(p=1.0, q=-0.005, t=-100.0, base="mse", bound=1.0)
def test_saturated_gradients_never_point_the_other_way(p, q, t, base, bound):
    """Each has the sign of the exact one, for denominators of both signs, and is no larger."""
    targets = (tensor(t), tensor(1.0))
    _, by_p, by_q = loss_and_gradients(tensor(p), tensor(q), *targets, base=base)
    _, near_p, near_q = loss_and_gradients(
        tensor(p), tensor(q), *targets, base=base, hybrid_delta=10.0, hybrid_bound=bound
    )
    if abs(p / q - t) > 1e-9:
        assert near_p.sign().item() == by_p.sign().item()
        assert near_q.sign().item() == by_q.sign().item()
    assert abs(near_p.item()) <= abs(by_p.item()) * (1 + 1e-9) + 1e-9
    assert abs(near_q.item()) <= abs(by_q.item()) * (1 + 1e-9) + 1e-9


@pytest.mark.parametrize("base", BASES)
def test_saturated_gradients_tend_to_the_exact_ones(base):
    """As the bound goes to 0, at denominators of both signs."""
    P, Q, Y_n = tensor(1.0, -0.5, 2.0, 0.3), tensor(0.01, 0.01, -0.01, -0.003), tensor(90.0, -3.0, 1.0, 2.0)
    exact = loss_and_gradients(P, Q, Y_n, torch.ones(4, dtype=F64), base=base)
    near = loss_and_gradients(
        P, Q, Y_n, torch.ones(4, dtype=F64), base=base, hybrid_delta=0.01, hybrid_bound=1e-8
    )
    for of_exact, of_near in zip(exact, near, strict=True):
        torch.testing.assert_close(of_near, of_exact, rtol=1e-9, atol=0.0)


def test_saturated_gradients_are_the_formulas_that_are_promised():
    """g*sign(Q)/h and -g*P/h^2 with g at the saturated residual; the value stays what it was."""
    p, q, t, b = -0.7, -0.02, 3.0, 0.5
    loss, by_p, by_q = loss_and_gradients(
        tensor(p), tensor(q), tensor(t), tensor(1.0), hybrid_delta=0.02, hybrid_bound=b
    )
    h = math.hypot(q, b)
    g = -(p - q * t) / h
    assert loss.item() == pytest.approx((p / q - t) ** 2 / 2)
    assert by_p.item() == pytest.approx(-g / h)
    assert by_q.item() == pytest.approx(-g * p / h**2)


@pytest.mark.parametrize("tau", [None, 1e-3])
def test_a_pole_has_a_bounded_gradient_on_the_side_of_its_sign_bit(tau):
    """Continuous up to Q = 0 from either side, where Mask-REAL has none; the step moves Q away from 0."""
    targets = (tensor(2.0), tensor(1.0))
    keywords = {"hybrid_delta": 1e-2, "hybrid_bound": 0.5, "tau": tau}
    for zero, close in ((0.0, 1e-12), (-0.0, -1e-12)):
        _, at_p, at_q = loss_and_gradients(tensor(0.7), tensor(zero), *targets, **keywords)
        _, by_p, by_q = loss_and_gradients(tensor(0.7), tensor(close), *targets, **keywords)
        assert at_p.item() == pytest.approx(by_p.item()) != 0
        assert at_q.item() == pytest.approx(by_q.item())
        assert math.copysign(1.0, -at_q.item()) == math.copysign(1.0, zero)


def test_outside_of_the_radius_and_without_one_gradients_are_exact():
    """|Q| above hybrid_delta, hybrid_delta None and a tensor below 0 are the same training."""
    rows = (tensor(1.0, 1.0), tensor(0.3, 0.1), tensor(0.0, 5.0), tensor(1.0, 1.0))
    exact = loss_and_gradients(*rows)
    nowhere = loss_and_gradients(*rows, hybrid_delta=torch.tensor(-1.0))
    partly = loss_and_gradients(*rows, hybrid_delta=torch.tensor(0.2))
    assert all(torch.equal(a, b) for a, b in zip(exact, nowhere, strict=True))
    assert partly[1][0] == exact[1][0]
    assert partly[1][1] != exact[1][1]


def test_a_stack_of_trials_trains_each_as_if_alone():
    """Thresholds, weights, radii and bounds of their own in one vmap(grad)."""
    drawn = torch.Generator().manual_seed(5)
    P, Q, Y_n = torch.randn(3, 3, 40, generator=drawn, dtype=F64).unbind(0)
    Y_d = (torch.rand(40, generator=drawn, dtype=F64) > 0.3).to(F64)
    settings = {
        "tau": tensor(1e-3, 0.1, 0.4),
        "lambda_rej": tensor(0.1, 1.0, 3.0),
        "hybrid_delta": tensor(-1.0, 0.3, 0.8),
        "hybrid_bound": tensor(1.0, 0.5, 0.1),
        "huber_delta": tensor(0.5, 1.0, 2.0),
    }

    def loss(p: Tensor, q: Tensor, y: Tensor, own: dict[str, Tensor]) -> Tensor:
        return quotient_loss(p, q, y, Y_d, base="huber", **own)

    by_p, by_q = vmap(grad(loss, argnums=(0, 1)))(P, Q, Y_n, settings)
    for k in range(3):
        own = {name: column[k].item() for name, column in settings.items()}
        own["hybrid_delta"] = None if own["hybrid_delta"] < 0 else own["hybrid_delta"]
        _, alone_p, alone_q = loss_and_gradients(P[k], Q[k], Y_n[k], Y_d, base="huber", **own)
        torch.testing.assert_close(by_p[k], alone_p)
        torch.testing.assert_close(by_q[k], alone_q)


def test_rows_outside_of_the_mask_and_empty_batches_cost_nothing():
    """Nothing to average over is 0 with gradients of 0; one denominator may serve several numerators."""
    for P, mask in ((tensor(1.0, 2.0), torch.tensor([False, False])), (tensor(), None)):
        loss, by_p, _ = loss_and_gradients(P, torch.ones_like(P), P * 0, P * 0 + 1, mask=mask)
        assert loss.item() == 0.0
        assert not by_p.any()
    P, Q = torch.ones(2, 3, dtype=F64), torch.full((2, 1), 2.0, dtype=F64)
    _, by_p, by_q = loss_and_gradients(P, Q, torch.zeros(2, 3, dtype=F64), torch.ones(2, 3, dtype=F64))
    torch.testing.assert_close(by_p, torch.full((2, 3), 0.25 / 6, dtype=F64))
    torch.testing.assert_close(by_q, torch.full((2, 1), -0.125 / 2, dtype=F64))


def test_row_weights_make_a_weighted_mean():
    """A row of weight 2 counts as two and a row of weight 0 is not there, in the value and in gradients."""
    rows = (tensor(1.0, -0.5, 2.0), tensor(0.5, -0.25, 1.0), tensor(0.0, -1.0, 1.0), tensor(1.0, 0.0, 1.0))
    loss, by_p, by_q = loss_and_gradients(*rows, row_weights=tensor(2.0, 1.0, 0.0))
    repeated = [x[[0, 0, 1]] for x in rows]
    expected, each_p, each_q = loss_and_gradients(*repeated)
    assert loss.item() == pytest.approx(expected.item())
    for weighted, each in ((by_p, each_p), (by_q, each_q)):
        torch.testing.assert_close(weighted, torch.stack([each[0] + each[1], each[2], each[2] * 0]))


def test_a_residual_counts_up_to_its_largest():
    """Beyond, the row costs no more, and its gradient still points the right way."""
    loss, by_p, by_q = loss_and_gradients(tensor(BIG), tensor(1e-10), tensor(0.0), tensor(1.0))
    assert loss.item() == pytest.approx(LARGEST**2 / 2)
    assert by_p.item() > 0
    assert by_q.item() < 0


@pytest.mark.parametrize(
    "keywords, message",
    [
        ({"base": "square"}, "base must be one of mse, mae, huber, got base='square'"),
        ({"lambda_rej": -1.0}, "lambda_rej must be finite and >= 0, got lambda_rej=-1.0"),
        ({"tau": math.nan}, "tau must be finite and >= 0, got tau=nan"),
        ({"huber_delta": 0.0}, "huber_delta must be finite and > 0, got huber_delta=0.0"),
        ({"hybrid_delta": -0.1}, "hybrid_delta must be finite and >= 0, got hybrid_delta=-0.1"),
        ({"huber_delta": math.inf}, "huber_delta must be finite and > 0, got huber_delta=inf"),
        ({"hybrid_bound": 0.0}, "hybrid_bound must be finite and > 0, got hybrid_bound=0.0"),
        ({"mask": torch.ones(3)}, "mask must expand to shape"),
        ({"tags": torch.zeros(3)}, "tags must expand to shape"),
    ],
)
def test_bad_arguments_are_refused(keywords, message):
    """The error names the rule, the argument and the value."""
    with pytest.raises(ValueError, match=message):
        quotient_loss(tensor(1.0, 2.0), tensor(1.0, 2.0), tensor(0.0, 0.0), tensor(1.0, 1.0), **keywords)


def test_the_loss_reaches_every_parameter_of_numerator_and_denominator():
    """One gradient step moves both layers of both networks, with denominators of both signs."""
    torch.manual_seed(0)
    networks = [nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)).double() for _ in "PQ"]
    x = torch.linspace(-1, 1, 40, dtype=F64)[:, None]
    P, Q = (network(x) for network in networks)
    assert bool((Q < 0).any())
    assert bool((Q > 0).any())
    quotient_loss(P, Q, 1 / (x - 0.3), torch.ones_like(x), tau=1e-3).backward()
    for network in networks:
        for parameter in network.parameters():
            assert parameter.grad is not None
            assert bool((parameter.grad != 0).any())


def rows_beside_the_pole(gap: float) -> Split:
    """y = 1/(x - 0.3) for x in [-1, 1], without those that are nearer to the pole than `gap`."""
    x = torch.linspace(-1, 1, 96)[:, None]
    x = x[(x[:, 0] - 0.3).abs() > gap]
    return Split(x, lift_semantic_targets(1 / (x[:, 0] - 0.3), torch.zeros(len(x), dtype=torch.int64)))


def trained(config: TrialConfig, seed: int, hybrid_delta: float | None = None) -> tuple[float, list[bool]]:
    """The mean held-out error of a training on the quotient, and which parameters it changed."""

    class Told:
        def before_forward(self, moment: Moment) -> None:
            moment.facts["hybrid_delta"] = hybrid_delta

    train, held_out = rows_beside_the_pole(0.1), rows_beside_the_pole(0.2)
    trainer = make_trainer(config, seed, lambda: make_model(config, 1), train, None, companions=[Told()])
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    trainer.fit()
    assert trainer.status == "completed"
    decoded = decode_split(trainer.model, held_out, tau_infer=config.tau_infer)
    assert not decoded.bottom.any()
    changed = [bool((a != b).any()) for a, b in zip(before, trainer.model.parameters(), strict=True)]
    return (decoded.decoded - held_out.targets.Y_n).abs().mean().item(), changed


QUOTIENT = TrialConfig(
    fit="quotient",
    max_epochs=400,
    batch_size=96,
    hidden_width=16,
    hidden_depth=1,
    tuple_norm="none",
    learning_rate=0.03,
    tau_train_min=1e-2,
    tau_train_max=1e-2,
    lambda_rej=1.0,
    lambda_sign=0.0,
)


def test_a_model_learns_a_pole_from_the_quotient_and_every_parameter_moves():
    """Held-out y = 1/(x - 0.3), whose mean size is 2, is met to 5 %; no weight stays where it was."""
    error, changed = trained(QUOTIENT, seed=1)
    assert error < 0.1
    assert len(changed) == 4
    assert all(changed)


def test_saturated_gradients_bring_a_pole_across_the_rows_that_block_it():
    """P and Q linear in x can say 1/(x - 0.3) exactly: masked, the pole stays on its side of the rows."""
    linear = dataclasses.replace(QUOTIENT, hidden_depth=0)
    assert trained(linear, seed=1)[0] > 0.2
    assert trained(linear, seed=1, hybrid_delta=1.0)[0] < 0.02
