"""Guards of a training's stability: each usable alone, or composed in `SCMTrainer` by settings."""

from __future__ import annotations

from scm.guards.bounds import bound, check_gain, gain_at, saturation_penalty, soft_clamp_logits
from scm.guards.budget import Budget, BudgetGuard, GradientBudget, gradient_cap, meta_loss_cap
from scm.guards.consistency import (
    AugmentationEquivarianceLoss,
    EquivarianceGuard,
    GroupMarginalizedNLLLoss,
    OutputEquivarianceLoss,
    global_context,
    positional_context,
)
from scm.guards.degenerate import DegenerateTermDetector, responds
from scm.guards.finite import FINITE_ACTIONS, FiniteGuard
from scm.guards.gap import GapMonitor, GapWatch, consensus, normalised_entropy, vote
from scm.guards.origin import find_origin
from scm.guards.range import RangeGuard, SaturationGuard
from scm.guards.spread import RunningSpread, SpreadGuard, pairwise_spread, relevance, spread_loss
from scm.guards.stablemax import (
    FocalWeightedStablemaxLoss,
    WeightedStablemaxLoss,
    log_stablemax,
    softmax_entropy,
    stablemax,
)
from scm.guards.stopping import SparsityRegularization, SparsityTerms
from scm.guards.symmetry import D4, Symmetry, d4, make_symmetries

__all__ = [
    "D4",
    "FINITE_ACTIONS",
    "AugmentationEquivarianceLoss",
    "Budget",
    "BudgetGuard",
    "DegenerateTermDetector",
    "EquivarianceGuard",
    "FiniteGuard",
    "FocalWeightedStablemaxLoss",
    "GapMonitor",
    "GapWatch",
    "GradientBudget",
    "GroupMarginalizedNLLLoss",
    "OutputEquivarianceLoss",
    "RangeGuard",
    "RunningSpread",
    "SaturationGuard",
    "SparsityRegularization",
    "SparsityTerms",
    "SpreadGuard",
    "Symmetry",
    "WeightedStablemaxLoss",
    "bound",
    "check_gain",
    "consensus",
    "d4",
    "find_origin",
    "gain_at",
    "global_context",
    "gradient_cap",
    "log_stablemax",
    "make_symmetries",
    "meta_loss_cap",
    "normalised_entropy",
    "pairwise_spread",
    "positional_context",
    "relevance",
    "responds",
    "saturation_penalty",
    "soft_clamp_logits",
    "softmax_entropy",
    "spread_loss",
    "stablemax",
    "vote",
]
