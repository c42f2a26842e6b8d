"""The models that a trial config can ask for: a ReLU network under one of the heads.

Every model maps inputs (B, ...) to a tuple (P, Q), each (B,) for one output and (B, O) for more. Where the
config weighs a loss of further outputs, these follow by name: (P, Q, {"tag_logits": (B, 4), "pole_score":
(B,)}). Models are plain batched modules without buffers, so that many of equal shapes can be stacked and
vectorised.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from scm.autodiff.projective import ProjectiveNormalize
from scm.layers.angular_projective import AngularProjectiveHead
from scm.layers.basis import BasisFunction, ChebyshevBasis, MonomialBasis
from scm.layers.capability import BottomCapability, denominator_capability
from scm.layers.pole_head import PoleHead, PoleHeadConfig
from scm.layers.projective_rational import ProjectiveRationalMultiHead, relu_network
from scm.layers.tr_rational import TRRational
from scm.training.tag_loss import TagPredictionHead
from scm.trial_config import TrialConfig

BASES: dict[str, BasisFunction] = {"monomial": MonomialBasis(), "chebyshev": ChebyshevBasis()}


class ProjectiveNetwork(nn.Module):
    """A ReLU network, a head over its last layer, and the gauge of the tuple that comes out.

    `gauge` is "unit" where P² + Q² = 1 holds for every output (only a tuple of two zeros stays as it is),
    else "raw"; a threshold on |Q| means something only together with it. Inputs are flattened to
    (B, input_dim), and taken in the dtype of the weights. `named_heads` map the network's last layer to
    further outputs by their names.
    """

    def __init__(
        self,
        backbone: nn.Module,
        head: nn.Module,
        *,
        input_dim: int,
        output_dim: int,
        gauge: str,
        named_heads: Mapping[str, nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.input_dim = input_dim
        self.output_dim = output_dim
        self.gauge = gauge
        policy = "unit_l2_projective" if gauge == "unit" else "canonical_denominator"
        self._normalize = ProjectiveNormalize(policy)
        self.named_heads = nn.ModuleDict(dict(named_heads)) if named_heads else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Map x (B, ...) with input_dim numbers per row to P and Q, and to the named outputs if any."""
        rows = x.unsqueeze(1) if x.ndim == 1 else x.flatten(start_dim=1)
        if rows.shape[1] != self.input_dim:
            raise ValueError(f"a row of x must hold {self.input_dim} numbers, got shape {tuple(x.shape)}")
        features = self.backbone(rows.to(next(self.head.parameters()).dtype))
        P, Q = self.head(features)
        if not isinstance(self.head, AngularProjectiveHead):
            P, Q = self._normalize(P, Q)
        if self.output_dim == 1:
            P, Q = P.squeeze(-1), Q.squeeze(-1)
        if self.named_heads is None:
            return P, Q
        return P, Q, {name: head(features) for name, head in self.named_heads.items()}

    def bottom_capability(self, tau_infer: float) -> BottomCapability:
        """Whether any input can give |Q| < tau_infer in the gauge of this model.

        In the unit gauge always "reachable": a large P makes the normalised Q small, however Q is built.
        """
        if isinstance(self.head, ProjectiveRationalMultiHeadOnFeatures) and self.gauge == "raw":
            return self.head.rational.bottom_capability(tau_infer)
        return denominator_capability(tau_infer, lower_bound=None, dtype=torch.float64)


class PatternHead(nn.Module):
    """One linear layer whose outputs are the numerators, then the denominators, of every output."""

    def __init__(self, input_dim: int, output_dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(input_dim, 2 * output_dim)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Map features (B, input_dim) to P and Q (B, output_dim)."""
        P, Q = self.linear(features).chunk(2, dim=-1)
        return P, Q


class ProjectiveRationalMultiHeadOnFeatures(nn.Module):
    """A linear layer to [z_den | z_num] under a `ProjectiveRationalMultiHead`: the outputs share Q."""

    def __init__(self, input_dim: int, rational: ProjectiveRationalMultiHead) -> None:
        super().__init__()
        self.linear = nn.Linear(input_dim, 1 + rational.output_dim)
        self.rational = rational

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Map features (B, input_dim) to P and Q (B, output_dim)."""
        z = self.linear(features)
        return self.rational(z[:, 1:], z[:, :1])


class TRRationalOnFeatures(nn.Module):
    """A linear layer to one argument per output under a `TRRational`: each output has poles of its own."""

    def __init__(self, input_dim: int, rational: TRRational) -> None:
        super().__init__()
        self.linear = nn.Linear(input_dim, rational.output_dim or 1)
        self.rational = rational

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Map features (B, input_dim) to P and Q (B, output_dim)."""
        P, Q = self.rational(self.linear(features))
        return P, Q


def make_model(config: TrialConfig, input_dim: int, output_dim: int = 1) -> ProjectiveNetwork:
    """Build the model that `config` describes, in its dtype; weights come from torch's global generator.

    ValueError for dimensions below 1 and for a head that is not in `HEADS`.
    """
    if input_dim < 1:
        raise ValueError(f"input_dim must be >= 1, got {input_dim=}")
    if output_dim < 1:
        raise ValueError(f"output_dim must be >= 1, got {output_dim=}")
    if config.head not in HEADS:
        raise ValueError(f"head must be one of {tuple(HEADS)}, got {config.head!r}")
    backbone, width = relu_network(input_dim, (config.hidden_width,) * config.hidden_depth)
    # The angular head stands on the circle by construction, whatever tuple_norm says.
    gauge = "unit" if config.tuple_norm == "unit" or config.head == "angular" else "raw"
    model = ProjectiveNetwork(
        backbone,
        HEADS[config.head](config, width, output_dim),
        input_dim=input_dim,
        output_dim=output_dim,
        gauge=gauge,
        named_heads=_named_heads(config, width),  # after the others, whose weights stay the same
    )
    return model.to(getattr(torch, config.dtype))


def _named_heads(config: TrialConfig, width: int) -> dict[str, nn.Module]:
    made = {name: make(config, width) for name, make in NAMED_HEADS.items()}
    return {name: head for name, head in made.items() if head is not None}


def _pattern(config: TrialConfig, width: int, output_dim: int) -> nn.Module:
    return PatternHead(width, output_dim)


def _multihead(config: TrialConfig, width: int, output_dim: int) -> nn.Module:
    rational = ProjectiveRationalMultiHead(
        output_dim,
        config.numerator_degree,
        config.denominator_degree,
        basis=BASES[config.basis],
        q_anchor=config.q_anchor,
        q_param=config.q_param,
        q_min=config.q_min,
    )
    return ProjectiveRationalMultiHeadOnFeatures(width, rational)


def _angular(config: TrialConfig, width: int, output_dim: int) -> nn.Module:
    return AngularProjectiveHead(width, output_dim)


def _tr_rational(config: TrialConfig, width: int, output_dim: int) -> nn.Module:
    degrees = config.numerator_degree, config.denominator_degree
    return TRRationalOnFeatures(width, TRRational(*degrees, BASES[config.basis], output_dim=output_dim))


HEADS: dict[str, Callable[[TrialConfig, int, int], nn.Module]] = {
    "pattern": _pattern,
    "multihead": _multihead,
    "angular": _angular,
    "tr_rational": _tr_rational,
}


def _tag_logits(config: TrialConfig, width: int) -> nn.Module | None:
    return None if config.lambda_tag == 0 else TagPredictionHead(width)


def _pole_score(config: TrialConfig, width: int) -> nn.Module | None:
    if config.lambda_pole == 0:
        return None
    return PoleHead(width, PoleHeadConfig(use_basis=False, proximity_threshold=config.pole_threshold))


# By the name of the output: its head on the network's last layer, None where the config weighs no loss of it.
NAMED_HEADS: dict[str, Callable[[TrialConfig, int], nn.Module | None]] = {
    "tag_logits": _tag_logits,
    "pole_score": _pole_score,
}
