"""A rational function that answers a value and a bottom mask, never a NaN or an infinity.

The basis is decided in `basis`, what gradients do at bottoms in `scm.autodiff.policies`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from scm.autodiff.policies import GradientPolicy
from scm.layers.basis import BasisFunction, ChebyshevBasis, CustomBasis, MonomialBasis, finite_columns
from scm.layers.capability import BottomCapability, denominator_capability
from scm.layers.gating import gate_output
from scm.layers.projective_rational import check_degrees

__all__ = ["BasisFunction", "ChebyshevBasis", "CustomBasis", "MonomialBasis", "SCMRationalLayer"]


class SCMRationalLayer(nn.Module):
    """y = P(x)/Q(x), elementwise, with learned coefficients of a basis and a mask of the bottoms.

    Coefficients start as N(0, 0.01²) for P and as the constant 1 for Q. The registered policy name is
    "scm_rational" (default PROJECT).

    Differs from zeroproofml 0.6.1: |Q| equal to the threshold is accepted, as strict decoding has it; the
    threshold may be given per call; the basis is evaluated once; magnitudes near the ends of the range are
    judged by what the dtype can hold and not by intermediate squares; and with `surrogate_at_bottoms` the
    policy PASSTHROUGH really lets gradients pass at finite bottoms, as those of P/Q̃, where Q̃ is Q moved out
    to ±threshold. Without it the gradient at bottoms is 0 under every policy.
    """

    def __init__(
        self,
        numerator_degree: int,
        denominator_degree: int,
        basis: BasisFunction | None = None,
        gradient_policy: GradientPolicy | None = None,
        singular_epsilon: float = 1e-6,
        *,
        surrogate_at_bottoms: bool = False,
    ) -> None:
        super().__init__()
        check_degrees(numerator_degree, denominator_degree)
        if not (math.isfinite(singular_epsilon) and singular_epsilon >= 0.0):
            raise ValueError(f"singular_epsilon must be finite and >= 0, got {singular_epsilon=}")
        self.numerator_degree = numerator_degree
        self.denominator_degree = denominator_degree
        self.basis = MonomialBasis() if basis is None else basis
        self.gradient_policy = gradient_policy
        self.singular_epsilon = float(singular_epsilon)
        self.surrogate_at_bottoms = surrogate_at_bottoms
        self.numerator = nn.Parameter(1e-2 * torch.randn(numerator_degree + 1))
        denominator = torch.zeros(denominator_degree + 1)
        denominator[0] = 1.0
        self.denominator = nn.Parameter(denominator)

    def forward(self, x: Tensor, *, tau: float | Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map x (any shape, real floating point) to y and bottom mask of its shape; y is 0 at bottoms.

        Bottom where x, a basis column, P, Q, the quotient or its slope P/Q² is not finite, and where Q = 0
        or |Q| < tau (`singular_epsilon` where None). TypeError for complex or integer x.
        """
        P, Q, usable = self._tuple(x)
        threshold = self.singular_epsilon if tau is None else tau
        singular = (Q == 0) | (Q.abs() < threshold)
        with torch.no_grad():
            divisor = torch.where(singular | ~usable, torch.ones_like(Q), Q)
            quotient = P / divisor
            bottom = singular | ~usable | ~torch.isfinite(quotient) | ~torch.isfinite(quotient / divisor)
        # 0/1 where the answer is bottom: the division's own derivative stays finite there.
        y = torch.where(bottom, torch.zeros_like(P), P) / torch.where(bottom, torch.ones_like(Q), Q)
        if self.surrogate_at_bottoms:
            y = y + _passing(P, Q, bottom & usable, threshold)
        return gate_output(y, bottom, "scm_rational", self.gradient_policy), bottom

    def projective(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The tuple (P, Q) for projective losses; (NaN, NaN) where x or a basis column is not finite."""
        P, Q, usable = self._tuple(x)
        fault = torch.full_like(P, math.nan)
        return torch.where(usable, P, fault), torch.where(usable, Q, fault)

    def bottom_capability(self, tau_infer: float) -> BottomCapability:
        """Always "reachable": nothing bounds Q away from 0; the threshold is checked all the same."""
        return denominator_capability(tau_infer, lower_bound=None, dtype=self.denominator.dtype)

    def _tuple(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """P and Q, finite stand-ins (P of the constant basis) where not usable, and the usable mask."""
        if not x.is_floating_point():
            raise TypeError(f"SCMRationalLayer needs real floating-point input, got {x.dtype}")
        degree = max(self.numerator_degree, self.denominator_degree)
        columns, usable = finite_columns(self.basis, x, degree)
        P = columns[..., : self.numerator_degree + 1] @ self.numerator
        Q = columns[..., : self.denominator_degree + 1] @ self.denominator
        usable = usable & torch.isfinite(P) & torch.isfinite(Q)
        return P, Q, usable


def _passing(P: Tensor, Q: Tensor, where: Tensor, threshold: float | Tensor) -> Tensor:
    """0, with the gradient that P/Q̃ has at `where` (none where that is not finite itself)."""
    sign = torch.where(Q < 0, -torch.ones_like(Q), torch.ones_like(Q))
    with torch.no_grad():
        # Q + shift = ±max(|Q|, threshold), while the derivative with respect to Q stays 1.
        target = sign * torch.maximum(Q.abs(), torch.as_tensor(threshold, dtype=Q.dtype, device=Q.device))
        shift = target - Q
        slope = P / target / target
        ok = where & torch.isfinite(P / target) & torch.isfinite(slope) & torch.isfinite(shift)
    moved = torch.where(ok, Q + shift, torch.ones_like(Q))
    surrogate = torch.where(ok, P, torch.zeros_like(P)) / moved
    return surrogate - surrogate.detach()
