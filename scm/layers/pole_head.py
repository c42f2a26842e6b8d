"""A small network that scores how near to a pole a rational function is, from features or from x itself.

What it should say, and how wrong it is, is decided in `scm.losses.pole`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor, nn

from scm.layers.basis import ChebyshevBasis
from scm.losses.pole import pole_loss, pole_targets

ACTIVATIONS: MappingProxyType[str, Callable[[], nn.Module]] = MappingProxyType(
    {"tanh": nn.Tanh, "relu": nn.ReLU, "silu": nn.SiLU}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PoleHeadConfig:
    """What a pole head and its loss need to know; valid once built.

    use_basis: the network sees T_1 ... T_basis_degree of each feature instead of the feature; they are
    polynomials of fixed size on `domain` and grow beyond it. use_residual: a linear map of what the network
    sees joins its output. normalize_output: scores are probabilities; without it they are the logits.
    teacher_weight, in [0, 1], is the weight of rows that a teacher labels, 1 − teacher_weight of those judged
    by |Q| < proximity_threshold. weight_decay weighs `PoleHead.regularisation`.
    """

    hidden_dim: int = 16
    use_basis: bool = True
    basis_degree: int = 3
    domain: tuple[float, float] = (-1.0, 1.0)
    activation: str = "tanh"
    dropout_rate: float = 0.0
    teacher_weight: float = 0.5
    proximity_threshold: float = 0.1
    use_residual: bool = False
    normalize_output: bool = True
    weight_decay: float = 1e-3

    def __post_init__(self) -> None:
        if self.hidden_dim < 1:
            raise ValueError(f"hidden_dim must be >= 1, got {self.hidden_dim}")
        if self.basis_degree < 1:
            raise ValueError(f"basis_degree must be >= 1, got {self.basis_degree}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {self.activation!r}")
        rules = [
            ("dropout_rate", 0.0 <= self.dropout_rate < 1.0, "in [0, 1)"),
            ("teacher_weight", 0.0 <= self.teacher_weight <= 1.0, "in [0, 1]"),
            ("proximity_threshold", 0.0 < self.proximity_threshold < math.inf, "finite and > 0"),
            ("weight_decay", 0.0 <= self.weight_decay < math.inf, "finite and >= 0"),
        ]
        for name, holds, rule in rules:
            if not holds:
                raise ValueError(f"{name} must be {rule}, got {getattr(self, name)}")
        ChebyshevBasis(self.domain)


class PoleHead(nn.Module):
    """One hidden layer from features (..., input_dim) to a logit (...): σ of it is "near a pole"."""

    def __init__(self, input_dim: int = 1, config: PoleHeadConfig | None = None) -> None:
        super().__init__()
        if input_dim < 1:
            raise ValueError(f"input_dim must be >= 1, got {input_dim=}")
        self.config = PoleHeadConfig() if config is None else config
        self.input_dim = input_dim
        self.basis = ChebyshevBasis(self.config.domain)
        width = input_dim * (self.config.basis_degree if self.config.use_basis else 1)
        self.hidden = nn.Linear(width, self.config.hidden_dim)
        self.activation = ACTIVATIONS[self.config.activation]()
        self.dropout = nn.Dropout(self.config.dropout_rate) if self.config.dropout_rate > 0.0 else None
        self.out = nn.Linear(self.config.hidden_dim, 1)
        self.residual = nn.Linear(width, 1, bias=False) if self.config.use_residual else None

    def forward(self, features: Tensor) -> Tensor:
        """Map features (..., input_dim) to logits (...); ValueError for another last dimension."""
        if features.ndim == 0 or features.shape[-1] != self.input_dim:
            raise ValueError(
                f"the last dimension of features must be {self.input_dim}, got shape {tuple(features.shape)}"
            )
        seen = features
        if self.config.use_basis:
            # The constant column says nothing that the bias does not.
            seen = self.basis(features, self.config.basis_degree)[..., 1:].flatten(start_dim=-2)
        hidden = self.activation(self.hidden(seen))
        if self.dropout is not None:
            hidden = self.dropout(hidden)
        logits = self.out(hidden)
        if self.residual is not None:
            logits = logits + self.residual(seen)
        return logits.squeeze(-1)

    def score(self, features: Tensor) -> Tensor:
        """Map features to probabilities, or to logits where the config does not normalise."""
        logits = self(features)
        return torch.sigmoid(logits) if self.config.normalize_output else logits

    def loss(
        self,
        features: Tensor,
        *,
        teacher: Tensor | None = None,
        q_abs: Tensor | None = None,
        tags: Tensor | None = None,
        form: str = "bce",
        row_weights: Tensor | None = None,
    ) -> Tensor:
        """Return `pole_loss` of the logits against `pole_targets` of the three sources, 0-d.

        Without any source nothing is known of the rows, and the loss is 0.
        """
        logits = self(features)
        targets = pole_targets(
            logits,
            teacher=teacher,
            q_abs=q_abs,
            tags=tags,
            teacher_weight=self.config.teacher_weight,
            proximity_threshold=self.config.proximity_threshold,
        )
        normalized = self.config.normalize_output
        return pole_loss(logits, targets, form=form, normalize_output=normalized, row_weights=row_weights)

    def regularisation(self) -> Tensor:
        """weight_decay/2 · the sum of the squares of all weights, biases left out; 0-d."""
        layers = [self.hidden, self.out, *([] if self.residual is None else [self.residual])]
        return 0.5 * self.config.weight_decay * torch.stack([w.weight.square().sum() for w in layers]).sum()
