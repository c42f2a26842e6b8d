"""Laws of heads and layers (31): finite or bottom for every input, shapes as promised, gradients finite.

A layer with bottoms is a module from x to (y, bottom).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from harness.robustness.edge_values import (
    LARGEST_BATCH,
    any_values,
    matrices,
    ordinary_values,
    ulps,
)
from harness.robustness.law import BrokenLawError, Case, Property, Subject, library_law
from harness.robustness.tensors import gradients_of, on

THRESHOLD = 1e-6  # below which a denominator of a rational layer counts as 0


def _rational_is_finite_or_bottom(subject: Subject, case: Case) -> None:
    x, numerator, denominator = on(subject, case, "x", "numerator", "denominator")
    y, bottom = subject.rational_layer(numerator, denominator)(x)
    if y.shape != x.shape or bottom.shape != x.shape:
        raise BrokenLawError(f"x of {tuple(x.shape)} gives {tuple(y.shape)} and {tuple(bottom.shape)}")
    if not bool(y.isfinite()[~bottom].all()):
        raise BrokenLawError(f"y is {y.tolist()} where bottom is {bottom.tolist()}")
    if not bool(bottom[~x.isfinite()].all()):
        raise BrokenLawError(f"x = {x.tolist()} is not finite and no bottom")
    if case["pole"] is not None:  # (x - pole)^k: no rounding hides that it is 0 there
        at_pole = x == case["pole"]
        if not bool(bottom[at_pole].all()):
            raise BrokenLawError(f"y is {y[at_pole].tolist()} at the pole {case['pole']}")


def _rational_has_finite_gradients(subject: Subject, case: Case) -> None:
    x, numerator, denominator = on(subject, case, "x", "numerator", "denominator")
    x = x.requires_grad_()
    layer = subject.rational_layer(numerator, denominator)
    y, bottom = layer(x)
    slopes = gradients_of(torch.where(bottom, 0.0, y).sum(), x, *layer.parameters())
    if not bool(slopes[0][bottom].eq(0).all()):
        raise BrokenLawError(f"dy/dx at bottoms is {slopes[0][bottom].tolist()}")
    for name, slope in zip(("x", *(name for name, _ in layer.named_parameters())), slopes, strict=True):
        if not bool(slope.isfinite().all()):
            raise BrokenLawError(f"the gradient on {name} is {slope.tolist()}")


def _multi_head_has_its_shapes(subject: Subject, case: Case) -> None:
    z_num, z_den = on(subject, case, "z_num", "z_den")
    head = subject.multi_head(3, case["degree"], case["degree"], "none", 0.0)
    P, Q = head.to(subject.device, z_num.dtype)(z_num, z_den)
    if P.shape != z_num.shape or Q.shape != z_num.shape:
        raise BrokenLawError(f"z_num of {tuple(z_num.shape)} gives {tuple(P.shape)} and {tuple(Q.shape)}")
    if not bool((Q[:, :1] == Q).all()):
        raise BrokenLawError("outputs of a row have different denominators")
    if not bool((P.isfinite() & Q.isfinite()).all()):
        raise BrokenLawError(f"of finite inputs it makes {P.tolist()} and {Q.tolist()}")
    alone = head(z_num[:1], z_den[:1])
    for name, whole, single in (("P", P, alone[0]), ("Q", Q, alone[1])):
        if not torch.allclose(whole[:1], single, rtol=1e-5, atol=1e-6):
            raise BrokenLawError(f"{name} of a row depends on the others")


def _unreachable_bottoms_are_not_reached(subject: Subject, case: Case) -> None:
    z_num, z_den = on(subject, case, "z_num", "z_den")
    head = subject.multi_head(3, 2, case["degree"], "softplus", case["q_min"])
    with torch.no_grad():
        for weight in head.parameters():
            weight.fill_(case["weight"])
    head = head.to(subject.device, z_num.dtype)
    if head.bottom_capability(case["q_min"] * 0.5) != "unreachable_by_construction":
        raise BrokenLawError(f"q_min {case['q_min']} is not above a threshold of half of it")
    Q = head(z_num, z_den)[1]
    if bool((Q.abs() < case["q_min"] * 0.5).any()):
        raise BrokenLawError(f"|Q| is {Q.abs().min().item():.9g}, with q_min {case['q_min']}")


def _angular_head_is_on_the_circle(subject: Subject, case: Case) -> None:
    (x,) = on(subject, case, "x")
    P, Q = subject.angular_head(x.shape[1]).to(subject.device, x.dtype)(x)
    away = ((P.double().square() + Q.double().square()) - 1).abs().max()
    if not away <= 8 * torch.finfo(x.dtype).eps:
        raise BrokenLawError(f"P^2 + Q^2 is {float(away):.3g} away from 1")


def _norm_is_finite_or_bottom(subject: Subject, case: Case) -> None:
    (x,) = on(subject, case, "x")
    x = x.requires_grad_()
    y, bottom = subject.norm()(x)
    if not bool(y[~bottom].isfinite().all()) or not bool(bottom[~x.isfinite()].all()):
        raise BrokenLawError(f"y is {y.tolist()} where bottom is {bottom.tolist()}")
    held = x.detach()[x.detach().isfinite()].abs()
    # A variance is a mean of squares: beyond the root of the largest number it has no slope to give.
    if not bool((held.double() > 0.1 * torch.finfo(x.dtype).max ** 0.5).any()):
        _check_slope(y, bottom, x)


def _softmax_is_a_distribution_or_bottom(subject: Subject, case: Case) -> None:
    (x,) = on(subject, case, "x")
    x = x.requires_grad_()
    y, bottom = subject.softmax()(x)
    total = y.double().sum(dim=-1)
    unit = (total - 1).abs() <= 8 * torch.finfo(x.dtype).eps
    if not bool(((y >= 0) & (y <= 1)).all()) or not bool((unit | (bottom & (total == 0))).all()):
        raise BrokenLawError(f"a row sums to {total.tolist()}, bottoms {bottom.tolist()}")
    unusable = (x.isnan() | (x == math.inf)).any(dim=-1)
    if not bool(bottom[unusable].all()):
        raise BrokenLawError(f"a row with NaN or +inf is no bottom: {bottom.tolist()}")
    _check_slope(y, bottom.unsqueeze(-1).expand_as(y), x)
    with torch.no_grad():
        subject.softmax()(x)


def _check_slope(y: Tensor, bottom: Tensor, x: Tensor) -> None:
    weights = torch.arange(1, y.numel() + 1, dtype=y.dtype, device=y.device).view_as(y) / y.numel()
    (slope,) = gradients_of((torch.where(bottom, 0.0, y) * weights).sum(), x)
    if bool(slope.isnan().any()):
        raise BrokenLawError(f"the gradient on x is {slope.tolist()}")


# --- the table -----------------------------------------------------------------------------------

_FULL = (torch.float32, torch.float64)


def _dtypes(subject: Subject) -> list[torch.dtype]:
    return [dtype for dtype in subject.dtypes if dtype in _FULL] or [torch.float32]


def _law(name: str, law: str, needs: str, cases: Any, check: Any) -> Property:
    return library_law(name, 31, law, needs, cases, check)


@st.composite
def _rationals(draw: st.DrawFn, subject: Subject, far: bool) -> dict[str, Any]:
    """A rational function in the dtype of the layer's own weights, x at its poles and around them."""
    dtype = torch.float32
    pole = draw(st.none() | st.sampled_from([0.0, 1.0, -0.5, 0.25]))
    whole = ordinary_values(dtype)
    if pole is None:
        denominator = draw(st.lists(whole, min_size=2, max_size=4))
        around: tuple[float, ...] = ()
    else:
        denominator = draw(st.sampled_from([[-pole, 1.0], [pole * pole, -2 * pole, 1.0]]))
        around = (pole,)
    near = st.sampled_from([value for value in around for value in ulps(value, dtype)] or [0.0])
    values = (
        any_values(dtype, around)
        if far
        else st.one_of(near, ordinary_values(dtype), st.floats(-1e3, 1e3, width=32))
    )
    return {
        "x": torch.tensor(
            draw(st.lists(st.one_of(near, values), min_size=1, max_size=LARGEST_BATCH)), dtype=dtype
        ),
        "numerator": torch.tensor(draw(st.lists(whole, min_size=1, max_size=3)), dtype=dtype),
        "denominator": torch.tensor(denominator, dtype=dtype),
        "pole": pole,
    }


@st.composite
def _head_inputs(draw: st.DrawFn, subject: Subject) -> dict[str, Any]:
    dtype = draw(st.sampled_from(_dtypes(subject)))
    rows = draw(matrices(ordinary_values(dtype), 4, dtype))
    return {
        "z_num": rows[:, :3],
        "z_den": rows[:, 3],
        "degree": draw(st.integers(1, 4)),
        "q_min": draw(st.sampled_from([0.01, 1e-4, 1.0])),
        "weight": draw(st.sampled_from([0.0, 1.0, -1.0, -100.0, 100.0])),
    }


@st.composite
def _matrix(draw: st.DrawFn, subject: Subject, kind: str) -> dict[str, Any]:
    dtype = draw(st.sampled_from(_dtypes(subject)))
    return {"x": draw(matrices(any_values(dtype) if kind == "any" else ordinary_values(dtype), 3, dtype))}


LAYER_LAWS: list[Property] = [
    _law(
        "rational_layer_is_finite_or_bottom",
        "A rational layer answers a finite number, or bottom: at poles, and at inputs that are not finite.",
        "rational_layer",
        lambda subject: _rationals(subject, far=True),
        _rational_is_finite_or_bottom,
    ),
    _law(
        "rational_layer_has_finite_gradients",
        "At and around poles the gradients of a rational layer are finite, and 0 on an x that gives bottom.",
        "rational_layer",
        lambda subject: _rationals(subject, far=False),
        _rational_has_finite_gradients,
    ),
    _law(
        "multi_head_has_its_shapes",
        "P and Q have the shape of z_num and are finite, the denominator is one for a row, rows are alone.",
        "multi_head",
        _head_inputs,
        _multi_head_has_its_shapes,
    ),
    _law(
        "unreachable_bottoms_are_not_reached",
        "A head that says that no input reaches |Q| < tau has none that does.",
        "multi_head",
        _head_inputs,
        _unreachable_bottoms_are_not_reached,
    ),
    _law(
        "angular_head_is_on_the_circle",
        "Tuples of the angular head have norm 1.",
        "angular_head",
        lambda subject: _matrix(subject, "ordinary"),
        _angular_head_is_on_the_circle,
    ),
    _law(
        "norm_is_finite_or_bottom",
        "Normalising answers finite numbers or bottoms for every input, without NaN in the gradient.",
        "norm",
        lambda subject: _matrix(subject, "any"),
        _norm_is_finite_or_bottom,
    ),
    _law(
        "softmax_is_a_distribution_or_bottom",
        "A row of the softmax is a distribution; with NaN or +inf in it a bottom; no NaN in the gradient.",
        "softmax",
        lambda subject: _matrix(subject, "any"),
        _softmax_is_a_distribution_or_bottom,
    ),
]
