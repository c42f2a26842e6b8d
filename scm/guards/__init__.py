"""Guards of a training's stability: each usable alone, or composed in `SCMTrainer` by settings."""

from __future__ import annotations

from scm.guards.bounds import bound, check_gain, gain_at, saturation_penalty, soft_clamp_logits
from scm.guards.stablemax import (
    FocalWeightedStablemaxLoss,
    WeightedStablemaxLoss,
    log_stablemax,
    softmax_entropy,
    stablemax,
)

__all__ = [
    "FocalWeightedStablemaxLoss",
    "WeightedStablemaxLoss",
    "bound",
    "check_gain",
    "gain_at",
    "log_stablemax",
    "saturation_penalty",
    "soft_clamp_logits",
    "softmax_entropy",
    "stablemax",
]
