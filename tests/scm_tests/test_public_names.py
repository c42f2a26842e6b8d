"""The names under which the training system is known, each where a script for the peer looks for it."""

from __future__ import annotations

import importlib

import pytest

NAMES: dict[str, str] = {
    "scm.core": "TRTag TagPolicy",
    "scm.training": "SCMTrainer TrainingConfig lift_targets lift_semantic_targets SemanticTargets "
    "perturbed_threshold LinearRamp LossWeightsCurriculum AdaptiveSampler AdaptiveSamplerConfig "
    "Companion Moment",
    "scm.training.tag_loss": "compute_tag_loss TagPredictionHead",
    "scm.training.companion": "Companion Moment",
    "scm.training.hybrid_trainer": "HybridTrainer HybridTrainingConfig Trainer TrainerConfig",
    "scm.training.hybrid_schedule": "HybridGradientSchedule HybridScheduleCompanion SaturationHysteresis",
    "scm.training.near_pole": "NearPoleBatches NearPoleFeedback",
    "scm.training.trainer": "SCMTrainer TrainingConfig",
    "scm.training.targets": "lift_targets lift_semantic_targets SemanticTargets",
    "scm.training.gap": "perturbed_threshold",
    "scm.training.curriculum": "LinearRamp LossWeightsCurriculum",
    "scm.training.sampler": "AdaptiveSampler AdaptiveSamplerConfig",
    "scm.losses": "LossConfig SCMTrainingLoss implicit_loss margin_loss sign_consistency_loss rejection_loss "
    "coverage soft_coverage_loss scm_separation_losses projective_fit_loss LossTerms",
    "scm.losses.implicit": "implicit_loss",
    "scm.losses.quotient": "quotient_loss",
    "scm.losses.margin": "margin_loss",
    "scm.losses.sign": "sign_consistency_loss",
    "scm.losses.coverage": "coverage rejection_loss soft_coverage_loss ranked_coverage_loss",
    "scm.training.coverage": "CoverageTracker MultiOutputCoverageTracker CoverageMetrics "
    "CoverageEnforcementPolicy",
    "scm.training.adaptive_loss": "AdaptiveLossConfig AdaptiveLambda create_adaptive_loss CoverageController",
    "scm.losses.separation": "scm_separation_losses",
    "scm.autodiff.policies": "GradientPolicy GradientPolicyConfig gradient_policy register_policy get_policy "
    "apply_policy apply_policy_vector",
    "scm.autodiff.projective": "renormalize ProjectiveNormalize",
    "scm.layers": "ProjectiveRationalMultiHead RRProjectiveRationalModel ProjectiveRRModelConfig "
    "SCMRationalLayer SCMNorm SCMSoftmax MonomialBasis ChebyshevBasis AngularProjectiveHead "
    "TRRational HybridTRRational FullyIntegratedRational PoleHead PoleHeadConfig",
    "scm.layers.tr_rational": "TRRational LayerContract",
    "scm.layers.hybrid_rational": "HybridTRRational FullyIntegratedRational NearPoleStatistics",
    "scm.layers.pole_head": "PoleHead PoleHeadConfig",
    "scm.losses.pole": "pole_loss pole_targets PoleCounts PoleTargets",
    "scm.layers.projective_rational": "ProjectiveRationalMultiHead RRProjectiveRationalModel "
    "ProjectiveRRModelConfig",
    "scm.layers.scm_rational": "SCMRationalLayer MonomialBasis ChebyshevBasis",
    "scm.layers.normalization": "SCMNorm SCMSoftmax",
    "scm.layers.angular_projective": "AngularProjectiveHead",
    "scm.guards": "stablemax log_stablemax WeightedStablemaxLoss FocalWeightedStablemaxLoss bound "
    "saturation_penalty spread_loss SparsityRegularization RangeGuard SaturationGuard SpreadGuard "
    "meta_loss_cap Budget GradientBudget BudgetGuard OutputEquivarianceLoss AugmentationEquivarianceLoss "
    "GroupMarginalizedNLLLoss DegenerateTermDetector EquivarianceGuard Symmetry GapMonitor GapWatch "
    "normalised_entropy consensus FiniteGuard find_origin",
    "scm.inference": "strict_inference InferenceConfig SCMInferenceWrapper decode_strict_censored_3way "
    "calibrate",
    "scm.metrics": "tau_infer_sweep_from_q_abs",
    "scm.utils.logging": "JsonlLogger read_jsonl jsonl_to_dataframe TensorBoardLogger",
}


@pytest.mark.parametrize("module", sorted(NAMES))
def test_names_are_where_scripts_look_for_them(module: str) -> None:
    """Every name can be imported, and is the same object wherever it is imported from."""
    found = importlib.import_module(module)
    for name in NAMES[module].split():
        assert hasattr(found, name), f"{module}.{name}"
        home = importlib.import_module(getattr(found, name).__module__)
        assert getattr(home, name) is getattr(found, name), f"{module}.{name}"


@pytest.mark.parametrize("module", sorted(NAMES))
def test_what_packages_offer_is_what_they_list(module: str) -> None:
    """`__all__`, where there is one, names what can be imported and every name that is due."""
    found = importlib.import_module(module)
    listed = getattr(found, "__all__", None)
    if listed is not None:
        assert set(NAMES[module].split()) <= set(listed)
        assert all(hasattr(found, name) for name in listed)
