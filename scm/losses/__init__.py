"""What a projective model is trained to do: fit, stay away from zero, take sides, cover, separate."""

from __future__ import annotations

from scm.losses.coverage import coverage, ranked_coverage_loss, rejection_loss, soft_coverage_loss
from scm.losses.implicit import implicit_loss
from scm.losses.margin import margin_loss
from scm.losses.projective import projective_fit_loss
from scm.losses.quotient import quotient_loss
from scm.losses.separation import scm_separation_losses
from scm.losses.sign import sign_consistency_loss
from scm.losses.terms import LossTerms
from scm.losses.training import LossConfig, SCMTrainingLoss

__all__ = [
    "LossConfig",
    "LossTerms",
    "SCMTrainingLoss",
    "coverage",
    "implicit_loss",
    "margin_loss",
    "projective_fit_loss",
    "quotient_loss",
    "ranked_coverage_loss",
    "rejection_loss",
    "scm_separation_losses",
    "sign_consistency_loss",
    "soft_coverage_loss",
]
