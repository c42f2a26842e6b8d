"""Guards of a training's stability: each usable alone, or composed in `SCMTrainer` by settings."""

from __future__ import annotations

from scm.guards.bounds import bound, check_gain, gain_at, saturation_penalty, soft_clamp_logits
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

__all__ = [
    "FocalWeightedStablemaxLoss",
    "RangeGuard",
    "RunningSpread",
    "SaturationGuard",
    "SparsityRegularization",
    "SparsityTerms",
    "SpreadGuard",
    "WeightedStablemaxLoss",
    "bound",
    "check_gain",
    "gain_at",
    "log_stablemax",
    "pairwise_spread",
    "relevance",
    "saturation_penalty",
    "soft_clamp_logits",
    "softmax_entropy",
    "spread_loss",
    "stablemax",
]
