"""Bounds on values that must be able to come back: three forms, and a penalty in their place.

A bound is a pure function on tensors. Which values of a training are bounded, and what is measured before
that, is decided in `scm.guards.range`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from scm.losses.rowwise import check_at_least_zero

BoundFunction = Callable[[Tensor, "float | Tensor"], Tensor]


def bound(x: Tensor, limit: float | Tensor, form: str = "soft") -> Tensor:
    """Return `x` bounded to [-limit, limit] in its shape and dtype; limit > 0, a number or a 0-d tensor.

    form, and the gradient that it lets through:
    "hard"              x.clamp: 1 up to and at the limit, exactly 0 beyond it, so that what is beyond stays.
    "soft"              x up to half the limit, then along a hyperbola towards the limit: continuous, never
                        above 1, and limit^2 / 4x^2 far out, not 0 before x is some 1e20.
    "straight_through"  the value of "hard" with gradient 1 everywhere.

    NaN stays NaN and infinities become the limit. Raises ValueError for another form, or a number that is
    not above 0 and finite.
    """
    if form not in BOUND_FORMS:
        raise ValueError(f"form must be one of {', '.join(BOUND_FORMS)}, got {form=}")
    check_limit("limit", limit)
    return BOUND_FORMS[form](x, limit.to(x.dtype) if isinstance(limit, Tensor) else limit)


def soft_clamp_logits(x: Tensor, threshold: float = 50.0, max_val: float = 100.0) -> Tensor:
    """Return the recorded soft clamp: x up to `threshold`, then a tanh towards `max_val`.

    Its slope jumps from 1 to 2 at the threshold, falls exponentially and is exactly 0 in float32 some 240
    units above it. `bound(x, limit, "soft")` has neither fault: choose that one. Raises ValueError unless
    0 < threshold < max_val.
    """
    if not 0 < threshold < max_val < math.inf:
        raise ValueError(f"threshold must be > 0 and < max_val, got {threshold=}, {max_val=}")
    room = max_val - threshold
    beyond = x.abs() > threshold
    far = torch.where(beyond, x, max_val)
    bent = far.sign() * (threshold + room * torch.tanh((far.abs() - threshold) * (2.0 / room)))
    return torch.where(beyond, bent, x)


def gain_at(function: Callable[[Tensor], Tensor], points: Tensor) -> Tensor:
    """Return the derivative of an elementwise function at `points`, in their shape.

    >>> gain_at(lambda x: bound(x, 50.0, "hard"), torch.tensor([0.0, 80.0])).tolist()
    [1.0, 0.0]
    """
    points = points.detach().clone().requires_grad_()
    with torch.enable_grad():
        (gain,) = torch.autograd.grad(function(points).sum(), points)
    return gain


def check_gain(function: Callable[[Tensor], Tensor], points: Tensor) -> None:
    """Raise ValueError where an elementwise function has a gradient of 0, or none that is finite.

    points: the values from which a training must be able to come back. Reads the device; for use before a
    training or in a test, not in a step.
    """
    gain = gain_at(function, points)
    dead = ~(gain.isfinite() & (gain != 0))
    if bool(dead.any()):
        where, got = float(points[dead][0]), float(gain[dead][0])
        raise ValueError(
            f"the gradient must be finite and not 0 where values must come back, got {got} at {where}"
        )


def saturation_penalty(
    logits: Tensor, threshold: float | Tensor = 5.0, *, mask: Tensor | None = None
) -> Tensor:
    """Return the mean of relu(|logits| - threshold), 0-d; its gradient does not fade with the distance.

    mask: bool, expands to the logits; entries outside of it count neither here nor there, and with none the
    penalty is 0. Logits that are not finite make it so. ValueError for a threshold below 0.

    A gate behind a squash (6·tanh(z/6)) never leaves it: penalise what goes into the squash.
    """
    check_at_least_zero("threshold", threshold)
    excess = torch.relu(logits.abs() - threshold)
    if mask is None:
        return excess.sum() / max(excess.numel(), 1)
    mask = mask.expand(excess.shape)
    return torch.where(mask, excess, 0.0).sum() / mask.sum().clamp(min=1)


def check_limit(name: str, value: float | Tensor) -> None:
    """Raise ValueError unless a plain number is finite and > 0; tensors are trusted, never read."""
    if not isinstance(value, Tensor) and not 0 < value < math.inf:
        raise ValueError(f"{name} must be finite and > 0, got {name}={value!r}")


def _hard(x: Tensor, limit: float | Tensor) -> Tensor:
    return torch.clamp(x, -limit, limit)  # type: ignore[arg-type]


def _soft(x: Tensor, limit: float | Tensor) -> Tensor:
    knee = 0.5 * limit
    beyond = x.abs() > knee
    # The branch that is not taken sees the limit, so that NaN and 0 send no NaN back. The hyperbola is limit
    # minus a quotient: as a quotient that tends to 1, its gradient would be lost to rounding.
    far = torch.where(beyond, x, limit)
    return torch.where(beyond, far.sign() * limit - knee * (knee / far), x)


def _straight_through(x: Tensor, limit: float | Tensor) -> Tensor:
    bounded: Tensor = _StraightThrough.apply(x, limit)
    return bounded


class _StraightThrough(torch.autograd.Function):
    """Clamp with gradient 1. The usual x + (clamp(x) - x).detach() makes NaN of infinities."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, limit: float | Tensor) -> Tensor:
        return _hard(x, limit)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        return upstream, None


BOUND_FORMS: dict[str, BoundFunction] = {
    "hard": _hard,
    "soft": _soft,
    "straight_through": _straight_through,
}
