"""A head that emits its tuple on the unit circle, so that a threshold on |Q| means an angle."""

from __future__ import annotations

import math

from torch import Tensor, nn

from scm.layers.capability import BottomCapability, check_tau_infer


class AngularProjectiveHead(nn.Module):
    """(P, Q) = (cos θ, sin θ) with θ = theta_scale·(W h + b): the tuple has norm 1 whatever the weights are.

    The linear map is one matrix product; zeroproofml 0.6.1 spends O(B·O·I) memory on it.
    """

    def __init__(self, input_dim: int, output_dim: int = 1, *, theta_scale: float = 1.0) -> None:
        super().__init__()
        if input_dim < 1:
            raise ValueError(f"input_dim must be >= 1, got {input_dim=}")
        if output_dim < 1:
            raise ValueError(f"output_dim must be >= 1, got {output_dim=}")
        if not (math.isfinite(theta_scale) and theta_scale != 0.0):
            raise ValueError(f"theta_scale must be finite and not 0, got {theta_scale=}")
        self.theta_scale = float(theta_scale)
        self.theta = nn.Linear(input_dim, output_dim)

    def forward(
        self, features: Tensor, *, return_theta: bool = False
    ) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]:
        """Map features (..., input_dim) to P and Q (..., output_dim), and the angle in radians if asked."""
        theta = self.theta_scale * self.theta(features)
        if return_theta:
            return theta.cos(), theta.sin(), theta
        return theta.cos(), theta.sin()

    def bottom_capability(self, tau_infer: float) -> BottomCapability:
        """Always "reachable": sin θ crosses 0; the threshold is checked all the same."""
        check_tau_infer(tau_infer)
        return "reachable"
