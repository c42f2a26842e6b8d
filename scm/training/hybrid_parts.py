"""What the two ready-made trainers are told, and the parts that follow from it.

Which parts go together under which setting is decided here; what each does, in its own module; how they
train, in `scm.training.hybrid_trainer`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import nn

from scm.layers.hybrid_rational import HybridTRRational
from scm.layers.pole_head import PoleHead
from scm.layers.tr_rational import TRRational
from scm.losses.training import LossConfig, SCMTrainingLoss
from scm.seeding import seed_for
from scm.training.adaptive_loss import AdaptiveLambda, AdaptiveLossConfig, CoverageController
from scm.training.companion import Moment
from scm.training.config import TrainingConfig
from scm.training.hybrid_schedule import (
    HybridGradientSchedule,
    HybridScheduleCompanion,
    SaturationHysteresis,
)
from scm.training.loader import TensorBatches
from scm.training.near_pole import NearPoleBatches
from scm.training.objective import ProjectiveObjective
from scm.training.pole_exploration import ExplorationConfig
from scm.training.pole_loss import PoleLossTerm
from scm.training.safe_step import SafeStep
from scm.training.sampler import AdaptiveSamplerConfig
from scm.training.tag_loss import TagLossTerm

_AGGRESSIVE_BOUND = 0.1


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """What both trainers are told besides model, optimizer and data; checked when built.

    max_epochs, learning_rate (of the Adam that is made where no optimizer is given), seed, device, clip_norm
    (None: none), nonfinite_budget, tau_infer: as in `TrainingConfig`. tau_train: |Q| from which an answer has
    a value in training. coverage_margin: how far above tau_train the coverage term wants it.

    use_adaptive_loss: the weight of the coverage term follows the coverage (`AdaptiveLambda`, the recorded
    rule), from initial_lambda on, with lambda_learning_rate and the adaptive_ settings; without, it stays
    initial_lambda. It is also what an answer without a value costs.

    use_safe_lr: steps are shortened by the quotient's curvature (`SafeStep`): safe_lr_basis_bound,
    safe_lr_alpha, safe_lr_floor.

    early_stopping: end after `patience` epochs in which the loss, the validated one where there is a
    val_loader, has not fallen by min_delta.

    log_interval: `log_hook` is called, and with `verbose` a line said, every that many micro-batches; with
    `verbose` also what each epoch did, and what it cost.

    Differs from zeroproof 0.1.0: `batch_size` is the loader's; `lambda_rej` is initial_lambda; nothing is
    printed unless asked for.
    """

    max_epochs: int = 100
    learning_rate: float = 1e-3
    tau_train: float = 1e-4
    tau_infer: float = 1e-6
    target_coverage: float = 0.95
    coverage_margin: float = 1e-2
    initial_lambda: float = 1.0
    use_adaptive_loss: bool = True
    lambda_learning_rate: float = 0.01
    lambda_rej_min: float = 0.1
    adaptive_momentum: float = 0.9
    adaptive_warmup_steps: int = 100
    adaptive_update_frequency: int = 10
    adaptive_exponential_decay: float | None = None
    adaptive_lambda_min: float = 0.1
    adaptive_lambda_max: float | None = None
    use_safe_lr: bool = False
    safe_lr_basis_bound: float = 1.0
    safe_lr_alpha: float = 1e-3
    safe_lr_floor: float = 1e-3
    early_stopping: bool = False
    patience: int = 10
    min_delta: float = 1e-4
    clip_norm: float | None = None
    nonfinite_budget: int = 10
    seed: int | None = None
    device: str | torch.device | None = None
    log_interval: int = 10
    verbose: bool = False

    def __post_init__(self) -> None:
        for item in fields(self):
            if item.type == "bool" and not isinstance(getattr(self, item.name), bool):
                raise TypeError(f"{item.name} must be a bool, got {item.name}={getattr(self, item.name)!r}")
        if isinstance(self.patience, bool) or not isinstance(self.patience, int):
            raise TypeError(f"patience must be an int, got patience={self.patience!r}")
        if self.patience < 1:
            raise ValueError(f"patience must be >= 1, got patience={self.patience!r}")
        if not (math.isfinite(self.min_delta) and self.min_delta >= 0):
            raise ValueError(f"min_delta must be finite and >= 0, got min_delta={self.min_delta!r}")
        # The parts check their own settings: here, before there is a model or data.
        make_training_config(self)
        make_loss_config(self)
        make_controller(self)
        make_safe_step(self, torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=self.learning_rate))


@dataclass(frozen=True, kw_only=True)
class HybridTrainingConfig(TrainerConfig):
    """What `HybridTrainer` is told besides; all of it is off by default, and checked when built.

    use_hybrid_gradient: gradients saturate around poles by a `HybridGradientSchedule` of the hybrid_ fields;
    hybrid_aggressive takes a bound of 0.1 on |Q| instead of 1. saturation_q_on, _q_off, _g_on, _g_off: a
    `SaturationHysteresis`, where the first is given. sat_shrink_on_ratio: an epoch in which a larger share of
    answers than sat_shrink_ratio saturated is followed by one whose steps are sat_shrink_factor of theirs.

    hybrid_pole_exploration_radius, _epochs, hybrid_pole_detection_threshold: see `ExplorationConfig`; poles
    are explored where the trainer is given `label_points`, up to the end of the transition. The threshold
    also says which answers count as near a pole.

    use_tag_loss: the model's "tag_logits" learn `tag_labels` (the data's statuses, or the model's own tags)
    with weight lambda_tag, with tag_loss_adaptive up to four times that near full coverage. use_pole_head:
    its "pole_score" learns where |Q| < pole_proximity_threshold, with weight lambda_pole.

    enforce_coverage: the weight of the coverage term is driven by the unbiased rule instead of the recorded
    one, at coverage_learning_rate, and may rise to max_lambda_for_coverage; coverage_dead_band: how far from
    the target it rests.

    oversample_near_pole: rows near poles are drawn more often (`NearPoleBatches`; the loader must be
    `TensorBatches`), with sampling_strength, sampling_memory and sampling_correction;
    pole_sampling_threshold: how far above tau_train a |Q| still counts as near.

    Differs from zeroproof 0.1.0: what this lacks has no meaning for batched tensors, or did nothing there
    (policies by rounding, anti-illusion metrics, curvature logs, an adaptive grid).
    """

    use_hybrid_gradient: bool = False
    hybrid_warmup_epochs: int = 20
    hybrid_transition_epochs: int = 30
    hybrid_delta_init: float = 1e-2
    hybrid_delta_final: float = 1e-6
    hybrid_min_delta: float = 1e-8
    hybrid_schedule_type: str = "exponential"
    hybrid_adaptive_delta: bool = True
    hybrid_aggressive: bool = False
    saturation_q_on: float | None = None
    saturation_q_off: float | None = None
    saturation_g_on: float | None = None
    saturation_g_off: float | None = None
    sat_shrink_on_ratio: bool = False
    sat_shrink_ratio: float = 0.3
    sat_shrink_factor: float = 0.5
    hybrid_pole_exploration_radius: float = 0.05
    hybrid_pole_exploration_epochs: int = 5
    hybrid_pole_detection_threshold: float = 0.1
    use_tag_loss: bool = False
    lambda_tag: float = 0.05
    tag_labels: str = "data"
    tag_loss_adaptive: bool = True
    use_pole_head: bool = False
    lambda_pole: float = 0.1
    pole_proximity_threshold: float = 0.1
    enforce_coverage: bool = False
    coverage_learning_rate: float = 0.1
    max_lambda_for_coverage: float = 10.0
    coverage_dead_band: float = 0.0
    oversample_near_pole: bool = False
    pole_sampling_threshold: float = 0.1
    sampling_strength: float = 1.0
    sampling_memory: float = 0.3
    sampling_correction: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        make_hysteresis(self)
        make_schedule(self)
        make_exploration_config(self)
        make_sampler_config(self, batch_size=1)
        TagLossTerm(self.lambda_tag, labels=self.tag_labels)
        PoleLossTerm(self.lambda_pole, proximity_threshold=self.pole_proximity_threshold)


def make_training_config(config: TrainerConfig, **around: Any) -> TrainingConfig:
    return TrainingConfig(
        max_epochs=config.max_epochs,
        tau_train_min=config.tau_train,
        tau_train_max=config.tau_train,
        tau_infer=config.tau_infer,
        coverage_threshold=0.0,
        device=config.device,
        clip_norm=config.clip_norm,
        nonfinite_budget=config.nonfinite_budget,
        seed=config.seed,
        log_interval=config.log_interval,
        **around,
    )


def make_loss_config(config: TrainerConfig) -> LossConfig:
    return LossConfig(
        tau_train=config.tau_train,
        lambda_margin=0.0,
        lambda_sign=0.0,
        lambda_rej=config.initial_lambda,
        target_coverage=config.target_coverage,
        coverage_term="ranked",
        coverage_temperature=config.coverage_margin,
    )


def make_controller(config: TrainerConfig) -> CoverageController | None:
    """Make what moves the weight of the coverage term; None where it stays as it is."""
    shared: dict[str, Any] = {
        "initial_lambda": config.initial_lambda,
        "target_coverage": config.target_coverage,
        "warmup_steps": config.adaptive_warmup_steps,
        "update_frequency": config.adaptive_update_frequency,
    }
    if isinstance(config, HybridTrainingConfig) and config.enforce_coverage:
        enforced = AdaptiveLossConfig(
            rule="unbiased",
            learning_rate=config.coverage_learning_rate,
            lambda_max=config.max_lambda_for_coverage,
            dead_band=config.coverage_dead_band,
            **shared,
        )
        return CoverageController(AdaptiveLambda(enforced))
    if not config.use_adaptive_loss:
        return None
    recorded = AdaptiveLossConfig(
        learning_rate=config.lambda_learning_rate,
        lambda_min=config.adaptive_lambda_min,
        lambda_max=config.adaptive_lambda_max,
        lambda_rej_min=config.lambda_rej_min,
        momentum=config.adaptive_momentum,
        exponential_decay=config.adaptive_exponential_decay,
        **shared,
    )
    return CoverageController(AdaptiveLambda(recorded))


def make_objective(config: TrainerConfig) -> ProjectiveObjective:
    aggressive = isinstance(config, HybridTrainingConfig) and config.hybrid_aggressive
    bound = _AGGRESSIVE_BOUND if aggressive else 1.0
    return ProjectiveObjective(SCMTrainingLoss(make_loss_config(config)), fit="quotient", hybrid_bound=bound)


def make_optimizer(config: TrainerConfig, model: nn.Module) -> torch.optim.Optimizer:
    model.to(config.device or "cpu")  # first, so that moments are where the weights are
    return torch.optim.Adam(model.parameters(), lr=config.learning_rate)


def make_hysteresis(config: HybridTrainingConfig) -> SaturationHysteresis | None:
    given = {
        name: getattr(config, f"saturation_{name}")
        for name in ("q_on", "q_off", "g_on", "g_off")
        if getattr(config, f"saturation_{name}") is not None
    }
    if given and ("q_on" not in given or "q_off" not in given):
        raise ValueError(
            f"saturation_q_on and _q_off must be given together, with the other two as well, got {given}"
        )
    return SaturationHysteresis(**given) if given else None


def make_schedule(config: HybridTrainingConfig) -> HybridGradientSchedule:
    return HybridGradientSchedule(
        warmup_epochs=config.hybrid_warmup_epochs,
        transition_epochs=config.hybrid_transition_epochs,
        delta_init=config.hybrid_delta_init,
        delta_final=config.hybrid_delta_final,
        schedule_type=config.hybrid_schedule_type,
        adaptive_delta=config.hybrid_adaptive_delta,
        min_delta=config.hybrid_min_delta,
        enable=config.use_hybrid_gradient,
    )


def make_exploration_config(config: HybridTrainingConfig) -> ExplorationConfig:
    return ExplorationConfig(
        radius=config.hybrid_pole_exploration_radius,
        epochs=config.hybrid_pole_exploration_epochs,
        threshold=config.hybrid_pole_detection_threshold,
        until_epoch=config.hybrid_warmup_epochs + config.hybrid_transition_epochs,
    )


def make_sampler_config(
    config: HybridTrainingConfig, *, batch_size: int, drop_last: bool = False
) -> AdaptiveSamplerConfig:
    return AdaptiveSamplerConfig(
        tau_train=config.tau_train,
        beta=config.pole_sampling_threshold,
        gamma=config.sampling_memory,
        alpha=config.sampling_strength,
        batch_size=batch_size,
        drop_last=drop_last,
        normalized=True,
    )


def sampled_rows(config: HybridTrainingConfig, loader: Iterable[Any]) -> Iterable[Any]:
    """The loader, or its rows drawn by how near they are to poles; a `NearPoleBatches` stays as it is."""
    if not config.oversample_near_pole or isinstance(loader, NearPoleBatches):
        return loader
    if not isinstance(loader, TensorBatches):
        raise TypeError(
            f"oversample_near_pole needs a train_loader of TensorBatches, got {type(loader).__name__}"
        )
    return NearPoleBatches(
        loader.inputs,
        loader.targets,
        make_sampler_config(config, batch_size=loader.batch_size, drop_last=loader.drop_last),
        seed=seed_for(config.seed or 0, "order"),
        correct=config.sampling_correction,
    )


def held_rows(loader: Iterable[Any]) -> TensorBatches | NearPoleBatches:
    if not isinstance(loader, TensorBatches | NearPoleBatches):
        raise TypeError(
            "label_points needs a train_loader of TensorBatches or NearPoleBatches, "
            f"got {type(loader).__name__}"
        )
    return loader


def make_hybrid_parts(
    config: HybridTrainingConfig, model: nn.Module, optimizer: torch.optim.Optimizer
) -> list[Any]:
    """Make the companions of a hybrid training, besides those of its loader and the controller."""
    parts: list[Any] = []
    saturated: Callable[[], float] | None = None
    if config.use_tag_loss:
        parts.append(
            TagLossTerm(config.lambda_tag, labels=config.tag_labels, adaptive=config.tag_loss_adaptive)
        )
    if config.use_pole_head:
        parts.append(PoleLossTerm(config.lambda_pole, proximity_threshold=config.pole_proximity_threshold))
    if config.use_hybrid_gradient:
        near = config.hybrid_pole_detection_threshold
        schedule = HybridScheduleCompanion(
            make_schedule(config), near_pole=near, hysteresis=make_hysteresis(config)
        )
        parts.append(schedule)
        if config.sat_shrink_on_ratio:
            saturated = partial(_saturated_share, schedule)
    if config.use_safe_lr or saturated is not None:
        parts.append(make_safe_step(config, optimizer, saturated=saturated))
    regularised = [layer for layer in model.modules() if isinstance(layer, TRRational | PoleHead)]
    if regularised:
        parts.append(_Regularisation(regularised))
    for layer in regularised:
        if isinstance(layer, TRRational) and layer.l1_projection is not None:
            layer.project_after(optimizer)
    recording = [(name, item) for name, item in model.named_modules() if isinstance(item, HybridTRRational)]
    for name, recorder in recording:
        statistics: Any = recorder.statistics
        if len(recording) > 1:  # each tells its own numbers
            statistics.name = f"near_pole_{name.replace('.', '_')}"
        parts.append(statistics)
    return parts


def make_safe_step(
    config: TrainerConfig,
    optimizer: torch.optim.Optimizer,
    *,
    saturated: Callable[[], float] | None = None,
) -> SafeStep:
    shrink = {}
    if isinstance(config, HybridTrainingConfig):
        shrink = {"shrink_above": config.sat_shrink_ratio, "shrink_by": config.sat_shrink_factor}
    return SafeStep(
        optimizer,
        basis_bound=config.safe_lr_basis_bound if config.use_safe_lr else None,
        alpha=config.safe_lr_alpha,
        floor=config.safe_lr_floor,
        saturated=saturated,
        **shrink,
    )


def _saturated_share(schedule: HybridScheduleCompanion) -> float:
    return schedule.telemetry()["hybrid_saturated_share"]


class _Regularisation:
    """Adds the regularisers of layers to the loss, as the term "regularisation"."""

    def __init__(self, layers: Sequence[TRRational | PoleHead]) -> None:
        self._layers = tuple(layers)

    def after_loss(self, moment: Moment) -> None:
        """Add the term."""
        assert moment.terms is not None
        moment.terms.auxiliaries["regularisation"] = sum(
            (layer.regularisation() for layer in self._layers[1:]), self._layers[0].regularisation()
        )
