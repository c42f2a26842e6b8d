"""Rescaling of tuples: the recorded cases, and the unit circle."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scm.autodiff.projective import GaugePolicy, ProjectiveNormalize, renormalize

UNIT = [GaugePolicy.UNIT_L2_PROJECTIVE, "angular_unit_circle"]


def test_renormalize_matches_the_recorded_cases(vector_group, decode_numbers):
    """Values, gradients with the norm stopped, and the unit-circle form are the recorded ones."""
    for case in vector_group("renormalize"):
        case = decode_numbers(case)
        N, D = (torch.tensor(case[name], dtype=torch.float64, requires_grad=True) for name in "ND")
        n, d = renormalize(N, D, case["gamma"])
        (n.sum() + 2 * d.sum()).backward()
        expected = case["expected"]
        unit = ProjectiveNormalize("unit_l2_projective")(N.detach(), D.detach())
        for got, name in [
            (n, "N"),
            (d, "D"),
            (N.grad, "grad_N_of_sumN_plus_2sumD"),
            (D.grad, "grad_D"),
            (torch.stack(unit), "unit_l2"),
        ]:
            np.testing.assert_allclose(
                got.detach().numpy(), expected[name], rtol=1e-12, atol=0, err_msg=f"{case['id']}: {name}"
            )


@settings(deadline=None)
@given(*[st.floats(-(2.0**100), 2.0**100, width=32)] * 2)
def test_the_unit_form_lies_on_the_circle_and_keeps_the_answer(p, q):
    """Float32 tuples up to 2^100 land on the unit circle, on their own ray; the zero tuple stays."""
    pair = torch.tensor([p]), torch.tensor([q])
    for policy in UNIT:
        n, d = (x.item() for x in ProjectiveNormalize(policy)(*pair))
        length = math.hypot(p, q)
        if length == 0:
            assert (n, d) == (0, 0)
        elif length > 1e-30:
            assert math.hypot(n, d) == pytest.approx(1, rel=1e-6)
            assert (n * length, d * length) == (
                pytest.approx(p, rel=1e-6, abs=length * 1e-6),
                pytest.approx(q, rel=1e-6, abs=length * 1e-6),
            )


def test_the_unit_form_has_the_derivative_of_its_norm():
    """Attached, a step along the ray changes nothing; gradients agree with finite differences."""
    N = torch.tensor([0.3, -2.0], dtype=torch.float64, requires_grad=True)
    D = torch.tensor([0.7, 1e-3], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ProjectiveNormalize("unit_l2_projective", gamma=0.1), (N, D))
    n, d = ProjectiveNormalize("unit_l2_projective")(N, D)
    g_n, g_d = torch.autograd.grad((n + 3 * d).sum(), (N, D))
    assert (g_n * N + g_d * D).abs().max().item() < 1e-15


def test_the_zero_tuple_has_a_finite_gradient():
    """A zero tuple neither becomes nan nor sends one back."""
    N, D = torch.zeros(2, requires_grad=True), torch.tensor([0.0, 1.0], requires_grad=True)
    n, d = ProjectiveNormalize("unit_l2_projective")(N, D)
    gradients = torch.autograd.grad((n + d).sum(), (N, D))
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)


def test_the_norm_can_be_stopped():
    """With a stop, each member's gradient is the plain quotient's."""
    N, D = torch.tensor([3.0], requires_grad=True), torch.tensor([4.0], requires_grad=True)
    n, _ = ProjectiveNormalize("unit_l2_projective", stop_gradient=torch.Tensor.detach)(N, D)
    assert torch.autograd.grad(n, N)[0].item() == pytest.approx(0.2)


def test_the_canonical_form_is_the_tuple_itself():
    """The default policy hands both tensors through."""
    pair = torch.ones(2), torch.zeros(2)
    got = ProjectiveNormalize()(*pair)
    assert got[0] is pair[0]
    assert got[1] is pair[1]


def test_float32_magnitudes_do_not_overflow():
    """Squares of float32 members are formed in float64."""
    big = torch.tensor([1e30])
    n, d = renormalize(big, big)
    assert n.item() == pytest.approx(math.sqrt(0.5), rel=1e-6)
    assert d.dtype == torch.float32


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ProjectiveNormalize("polar"), "policy must be one of"),
        (lambda: ProjectiveNormalize(gamma=-1.0), "gamma must be finite and >= 0"),
        (lambda: renormalize(torch.ones(1), torch.ones(1), math.nan), "gamma must be finite and >= 0"),
    ],
    ids=["policy", "negative gamma", "nan gamma"],
)
def test_bad_arguments_are_refused(call, message):
    """An unknown policy and a gamma that is no number are refused."""
    with pytest.raises(ValueError, match=message):
        call()
