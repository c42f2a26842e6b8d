"""Heads that emit a numerator per output and one shared denominator, both polynomials of learned features.

Thresholds and decoding are decided in `scm.inference`; the losses that act on (P, Q) in `scm.losses`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from scm.layers.basis import BasisFunction, MonomialBasis
from scm.layers.capability import BottomCapability, denominator_capability

Q_ANCHORS = ("ones", "none")
Q_PARAMS = ("none", "softplus")


class ProjectiveRationalMultiHead(nn.Module):
    """A numerator polynomial per output, P[b,o] = Σ_k num_weights[o,k]·ψ_k(z_num[b,o]), over one shared Q[b].

    Q = δ, or 1 + δ with `q_anchor="ones"`, where δ is d = Σ_k den_weights[k]·ψ_k(z_den[b]), or
    softplus(d) + q_min with `q_param="softplus"`.
    Weights start as N(0, 0.01²).
    """

    def __init__(
        self,
        output_dim: int,
        numerator_degree: int,
        denominator_degree: int,
        *,
        basis: BasisFunction | None = None,
        q_anchor: str = "ones",
        q_param: str = "none",
        q_min: float = 0.0,
    ) -> None:
        super().__init__()
        if output_dim < 1:
            raise ValueError(f"output_dim must be >= 1, got {output_dim=}")
        check_degrees(numerator_degree, denominator_degree)
        check_denominator_options(q_anchor, q_param, q_min)
        self.output_dim = output_dim
        self.numerator_degree = numerator_degree
        self.denominator_degree = denominator_degree
        self.basis = MonomialBasis() if basis is None else basis
        self.q_anchor = q_anchor
        self.q_param = q_param
        self.q_min = float(q_min)
        self.num_weights = nn.Parameter(1e-2 * torch.randn(output_dim, numerator_degree + 1))
        self.den_weights = nn.Parameter(1e-2 * torch.randn(denominator_degree + 1))

    def forward(self, z_num: Tensor, z_den: Tensor) -> tuple[Tensor, Tensor]:
        """Map z_num (B, O) and z_den (B,) or (B, 1) to P and Q, both (B, O)."""
        self._check_shapes(z_num, z_den)
        numerator = (self.basis(z_num, self.numerator_degree) * self.num_weights).sum(dim=-1)
        feature = z_den.reshape(z_num.shape[0])
        delta = self.basis(feature, self.denominator_degree) @ self.den_weights
        if self.q_param == "softplus":
            delta = functional.softplus(delta) + self.q_min
        denominator = 1.0 + delta if self.q_anchor == "ones" else delta
        return numerator, denominator.unsqueeze(-1).expand_as(numerator)

    def bottom_capability(self, tau_infer: float) -> BottomCapability:
        """Whether any input can give |Q| < tau_infer; TypeError or ValueError for a tau that is no threshold.

        Unlike zeroproofml 0.6.1 the guarantee and the threshold are compared in the dtype of the weights.
        """
        bounded = self.q_param == "softplus"
        bound = self.q_min + (1.0 if self.q_anchor == "ones" else 0.0) if bounded else None
        return denominator_capability(tau_infer, lower_bound=bound, dtype=self.den_weights.dtype)

    def _check_shapes(self, z_num: Tensor, z_den: Tensor) -> None:
        if z_num.ndim != 2 or z_num.shape[1] != self.output_dim:
            raise ValueError(f"z_num must have shape (B, {self.output_dim}), got {tuple(z_num.shape)}")
        if tuple(z_den.shape) not in {(z_num.shape[0],), (z_num.shape[0], 1)}:
            raise ValueError(
                f"z_den must have shape (B,) or (B, 1) with B = {z_num.shape[0]}, got {tuple(z_den.shape)}"
            )


@dataclass(frozen=True)
class ProjectiveRRModelConfig:
    """What `RRProjectiveRationalModel` needs to know; values are checked once, here."""

    input_dim: int = 4
    output_dim: int = 2
    hidden_dims: tuple[int, ...] = (64, 64)
    numerator_degree: int = 3
    denominator_degree: int = 2
    q_anchor: Literal["ones", "none"] | str = "ones"
    q_param: Literal["none", "softplus"] | str = "none"
    q_min: float = 0.0
    basis: BasisFunction = field(default_factory=MonomialBasis)
    enable_pole_head: bool = False

    def __post_init__(self) -> None:
        if self.input_dim < 1:
            raise ValueError(f"input_dim must be >= 1, got {self.input_dim}")
        if self.output_dim < 1:
            raise ValueError(f"output_dim must be >= 1, got {self.output_dim}")
        if any(width < 1 for width in self.hidden_dims):
            raise ValueError(f"hidden_dims must all be >= 1, got {self.hidden_dims}")
        check_degrees(self.numerator_degree, self.denominator_degree)
        check_denominator_options(self.q_anchor, self.q_param, self.q_min)


class RRProjectiveRationalModel(nn.Module):
    """A ReLU network over one shared feature layer [z_den | z_num] and a `ProjectiveRationalMultiHead`.

    With `enable_pole_head` a third output is returned: the logit (B, 1) that the input is near a pole.
    """

    def __init__(self, config: ProjectiveRRModelConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone, width = relu_network(config.input_dim, config.hidden_dims)
        self.feature_head = nn.Linear(width, 1 + config.output_dim)
        self.pole_head = nn.Linear(width, 1) if config.enable_pole_head else None
        self.rational_head = ProjectiveRationalMultiHead(
            config.output_dim,
            config.numerator_degree,
            config.denominator_degree,
            basis=config.basis,
            q_anchor=config.q_anchor,
            q_param=config.q_param,
            q_min=config.q_min,
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]:
        """Map x (B, input_dim) to P and Q (B, output_dim), and the pole logit where it is enabled."""
        hidden = self.backbone(x)
        features = self.feature_head(hidden)
        numerator, denominator = self.rational_head(features[:, 1:], features[:, :1])
        if self.pole_head is None:
            return numerator, denominator
        return numerator, denominator, self.pole_head(hidden)

    def bottom_capability(self, tau_infer: float) -> BottomCapability:
        """What the rational head answers."""
        return self.rational_head.bottom_capability(tau_infer)


def relu_network(input_dim: int, hidden_dims: tuple[int, ...]) -> tuple[nn.Sequential, int]:
    """Linear-ReLU pairs of the given widths, and the width of the last (input_dim if there are none)."""
    layers: list[nn.Module] = []
    width = input_dim
    for hidden in hidden_dims:
        layers += [nn.Linear(width, hidden), nn.ReLU()]
        width = hidden
    return nn.Sequential(*layers), width


def check_degrees(numerator_degree: int, denominator_degree: int) -> None:
    """Raise ValueError unless both polynomial degrees are >= 0."""
    if numerator_degree < 0:
        raise ValueError(f"numerator_degree must be >= 0, got {numerator_degree=}")
    if denominator_degree < 0:
        raise ValueError(f"denominator_degree must be >= 0, got {denominator_degree=}")


def check_denominator_options(q_anchor: str, q_param: str, q_min: float) -> None:
    """Raise ValueError unless the options name a known construction and q_min is finite and >= 0."""
    if q_anchor not in Q_ANCHORS:
        raise ValueError(f"q_anchor must be one of {Q_ANCHORS}, got {q_anchor=}")
    if q_param not in Q_PARAMS:
        raise ValueError(f"q_param must be one of {Q_PARAMS}, got {q_param=}")
    if not (math.isfinite(q_min) and q_min >= 0.0):
        raise ValueError(f"q_min must be finite and >= 0, got {q_min=}")
