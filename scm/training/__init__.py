"""How one model is trained: targets, thresholds, curricula, sampling, the trainer."""

from __future__ import annotations

from scm.training.companion import Companion, Moment
from scm.training.curriculum import LinearRamp, LossWeightsCurriculum
from scm.training.gap import perturbed_threshold
from scm.training.hybrid_trainer import HybridTrainer, HybridTrainingConfig, Trainer, TrainerConfig
from scm.training.sampler import AdaptiveSampler, AdaptiveSamplerConfig
from scm.training.targets import SemanticTargets, lift_semantic_targets, lift_targets
from scm.training.trainer import EpochReport, SCMTrainer, TrainingConfig

__all__ = [
    "AdaptiveSampler",
    "AdaptiveSamplerConfig",
    "Companion",
    "EpochReport",
    "HybridTrainer",
    "HybridTrainingConfig",
    "LinearRamp",
    "LossWeightsCurriculum",
    "Moment",
    "SCMTrainer",
    "SemanticTargets",
    "Trainer",
    "TrainerConfig",
    "TrainingConfig",
    "lift_semantic_targets",
    "lift_targets",
    "perturbed_threshold",
]
