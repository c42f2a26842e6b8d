"""Representatives of a projective answer (P, Q): which multiple of a tuple stands for P/Q.

Only rescaling is decided here; what a tuple decodes to is decided in `scm.inference`.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

StopGradient = Callable[[Tensor], Tensor]


class GaugePolicy(enum.Enum):
    """Which representative a tuple is replaced by."""

    CANONICAL_DENOMINATOR = "canonical_denominator"
    UNIT_L2_PROJECTIVE = "unit_l2_projective"
    ANGULAR_UNIT_CIRCLE = "angular_unit_circle"


def renormalize(
    numerator: Tensor,
    denominator: Tensor,
    gamma: float = 1e-9,
    stop_gradient: StopGradient | None = None,
) -> tuple[Tensor, Tensor]:
    """Divide both members by ``sqrt(N^2 + D^2) + gamma``, whose gradient is stopped.

    gamma: finite and >= 0. stop_gradient: what stops it, ``Tensor.detach`` by default.
    Types below float64 form the squares in float64, so float32 tuples do not overflow up to 1e38.
    """
    _check_gamma(gamma)
    stop = Tensor.detach if stop_gradient is None else stop_gradient
    norm = stop(_norm(numerator, denominator)) + gamma
    return _divide(numerator, norm), _divide(denominator, norm)


@dataclass(frozen=True)
class ProjectiveNormalize:
    """Replace a tuple by the representative that `policy` names.

    canonical_denominator: the tuple itself. unit_l2_projective and angular_unit_circle: the tuple on the
    unit circle, with the gradient of the norm (stopped when `stop_gradient` is given); (0, 0) stays.
    """

    policy: GaugePolicy | str = GaugePolicy.CANONICAL_DENOMINATOR
    gamma: float = 0.0
    stop_gradient: StopGradient | None = None

    def __post_init__(self) -> None:
        known = [policy.value for policy in GaugePolicy]
        value = self.policy.value if isinstance(self.policy, GaugePolicy) else self.policy
        if value not in known:
            raise ValueError(f"policy must be one of {known}, got {self.policy!r}")
        object.__setattr__(self, "policy", GaugePolicy(value))
        _check_gamma(self.gamma)

    def __call__(self, numerator: Tensor, denominator: Tensor) -> tuple[Tensor, Tensor]:
        """Return the representative, in the shapes and dtypes given."""
        if self.policy is GaugePolicy.CANONICAL_DENOMINATOR:
            return numerator, denominator
        # The square root has no derivative at 0; the zero tuple takes another branch, not a nan.
        squared = _wide(numerator).square() + _wide(denominator).square()
        is_zero = squared == 0
        norm = torch.where(is_zero, 1.0, squared).sqrt()
        norm = torch.where(is_zero, 1.0, norm + self.gamma)
        if self.stop_gradient is not None:
            norm = self.stop_gradient(norm)
        return tuple(torch.where(is_zero, 0.0, _divide(member, norm)) for member in (numerator, denominator))  # type: ignore[return-value]


def _norm(numerator: Tensor, denominator: Tensor) -> Tensor:
    return (_wide(numerator).square() + _wide(denominator).square()).sqrt()


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.double()


def _divide(member: Tensor, norm: Tensor) -> Tensor:
    return (_wide(member) / norm).to(member.dtype)


def _check_gamma(gamma: float) -> None:
    if not (math.isfinite(gamma) and gamma >= 0):
        raise ValueError(f"gamma must be finite and >= 0, got {gamma=}")
