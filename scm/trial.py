"""A whole trial from a flat config and a seed: optimizer, schedule, loss, loaders, trainer, decoding.

Every random stream is made here from the one seed: "init" for the weights, "order" for the rows, and inside
the trainer "tau" for the thresholds and "model" for what the model draws itself. The knobs and their
defaults are decided in `scm.trial_config`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from scm.data import Split
from scm.guards.budget import BudgetGuard
from scm.guards.consistency import EquivarianceGuard, OutputEquivarianceLoss, proper
from scm.guards.gap import GapWatch
from scm.guards.range import RangeGuard, SaturationGuard
from scm.guards.spread import SpreadGuard, projective_residual
from scm.guards.symmetry import Symmetry, check_symmetries
from scm.inference.strict import InferenceConfig, strict_inference
from scm.losses.terms import LossTerms
from scm.losses.training import LossConfig, SCMTrainingLoss
from scm.seeding import generator, seed_for, seeded_init
from scm.training.adaptive_loss import AdaptiveLambda, AdaptiveLossConfig, CoverageController
from scm.training.companion import AnyCompanion
from scm.training.config import TrainingConfig
from scm.training.curriculum import LinearRamp, LossWeightsCurriculum
from scm.training.hybrid_schedule import HybridGradientSchedule, HybridScheduleCompanion
from scm.training.loader import TensorBatches
from scm.training.near_pole import NearPoleBatches, NearPoleFeedback
from scm.training.objective import FitLoss, ProjectiveObjective
from scm.training.pole_loss import PoleLossTerm
from scm.training.sampler import AdaptiveSamplerConfig
from scm.training.tag_loss import TagLossTerm
from scm.training.trainer import SCMTrainer
from scm.trial_config import TrialConfig

DTYPES: dict[str, torch.dtype] = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}
_VALIDATION_ROWS = 4096

LossFn = Callable[..., Tensor | LossTerms]


def make_optimizer(config: TrialConfig, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Make the optimizer that the config names, in its fused form where torch has one."""
    return _OPTIMIZERS[config.optimizer](config, list(parameters))


def _adam(kind: type[torch.optim.Adam]) -> Callable[[TrialConfig, list[nn.Parameter]], torch.optim.Optimizer]:
    def make(config: TrialConfig, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        betas = (config.beta1, config.beta2)
        decay = config.weight_decay
        return kind(parameters, lr=config.learning_rate, betas=betas, weight_decay=decay, fused=True)

    return make


def _sgd(config: TrialConfig, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(
        parameters,
        lr=config.learning_rate,
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
        fused=True,
    )


def _rmsprop(config: TrialConfig, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.RMSprop(
        parameters,
        lr=config.learning_rate,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        foreach=True,
    )


_OPTIMIZERS: dict[str, Callable[[TrialConfig, list[nn.Parameter]], torch.optim.Optimizer]] = {
    "adam": _adam(torch.optim.Adam),
    "adamw": _adam(torch.optim.AdamW),
    "sgd": _sgd,
    "rmsprop": _rmsprop,
}


def make_scheduler(
    config: TrialConfig, optimizer: torch.optim.Optimizer
) -> torch.optim.lr_scheduler.LRScheduler | None:
    """Make the schedule of the learning rate, to be stepped once an epoch; None for a constant one.

    "cosine" and "linear" fall from the learning rate towards 0 at `max_epochs`.
    """
    if config.lr_schedule == "cosine":
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=config.max_epochs)
    if config.lr_schedule == "linear":
        return torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=config.max_epochs, power=1.0)
    return None


def make_training_loss(config: TrialConfig, fit: FitLoss | None = None) -> LossFn:
    """Make the objective: loss(outputs, (Y_n, Y_d), *, tau, semantic_targets, loss_weights) -> 0-d tensor.

    `fit` takes the place of the fit term that the config names.
    """
    constraints = SCMTrainingLoss(
        LossConfig(
            gamma=config.gamma,
            tau_train=config.tau_train_max,
            lambda_margin=config.lambda_margin,
            lambda_sign=config.lambda_sign,
            lambda_rej=config.lambda_rej,
            target_coverage=config.target_coverage,
            coverage_term=config.coverage_term,
            coverage_temperature=config.coverage_temperature,
            lambda_push_down=config.lambda_push_down,
            lambda_push_up=config.lambda_push_up,
            tau_bottom=config.tau_bottom,
            tau_finite=config.tau_finite,
        )
    )
    return ProjectiveObjective(
        constraints,
        fit=config.fit if fit is None else fit,
        gamma=config.gamma,
        hybrid_bound=config.hybrid_bound,
    )


def make_curriculum(config: TrialConfig) -> LossWeightsCurriculum | None:
    """Make the ramp of the constraints' weights from 0 to full over `loss_ramp_epochs`; None without one."""
    if config.loss_ramp_epochs == 0:
        return None
    full: Mapping[str, float] = {
        "margin": config.lambda_margin,
        "sign": config.lambda_sign,
        "rejection": config.lambda_rej,
        "push_down": config.lambda_push_down,
        "push_up": config.lambda_push_up,
    }
    ramps = {
        term: LinearRamp(0.0, weight, start_epoch=0, end_epoch=config.loss_ramp_epochs)
        for term, weight in full.items()
        if weight > 0
    }
    return LossWeightsCurriculum(ramps)


class Around(NamedTuple):
    """What a companion may need to know of the trial besides its config."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    train_loader: Any
    val_loader: Any  # None without a val split
    seed: int
    device: torch.device
    loss_fn: Any = None  # its `term_weights`, by name, are those of terms that no knob weighs
    symmetries: Mapping[str, Symmetry] | None = None  # of the task, where it has any


def make_companions(config: TrialConfig, around: Around) -> list[AnyCompanion]:
    """Make the controllers and guards that the config turns on, in the order in which they are called."""
    made = (make(config, around) for make in _COMPANIONS.values())
    return [companion for companion in made if companion is not None]


def _range_guard(config: TrialConfig, around: Around) -> AnyCompanion | None:
    if config.output_bound is None:
        return None
    return RangeGuard(config.output_bound, config.output_bound_form)


def _saturation_guard(config: TrialConfig, around: Around) -> AnyCompanion | None:
    if config.lambda_saturation == 0:
        return None
    # Under the hard term the temperature is no part of the config: its default stands for it.
    soft = config.coverage_term != "hard"
    temperature = config.coverage_temperature if soft else TrialConfig().coverage_temperature
    return SaturationGuard(config.lambda_saturation, config.saturation_threshold, temperature=temperature)


def _spread_guard(config: TrialConfig, around: Around) -> AnyCompanion | None:
    if config.lambda_spread == 0:
        return None
    return SpreadGuard(config.lambda_spread, config.target_spread, difficulty=projective_residual)


def _tag_loss(config: TrialConfig, around: Around) -> AnyCompanion | None:
    if config.lambda_tag == 0:
        return None
    return TagLossTerm(config.lambda_tag, labels=config.tag_labels, adaptive=config.tag_adaptive)


def _pole_loss(config: TrialConfig, around: Around) -> AnyCompanion | None:
    if config.lambda_pole == 0:
        return None
    return PoleLossTerm(config.lambda_pole, proximity_threshold=config.pole_threshold)


def _equivariance_guard(config: TrialConfig, around: Around) -> AnyCompanion | None:
    if config.lambda_equivariance == 0:
        return None
    symmetries = proper(around.symmetries or {})
    if not symmetries:
        raise ValueError(
            "lambda_equivariance needs a task with a method symmetries(), which says under what its answers "
            f"should be alike, got lambda_equivariance={config.lambda_equivariance!r} without one"
        )
    if config.equivariance_views > len(symmetries):
        raise ValueError(
            f"equivariance_views must be <= {len(symmetries)}, the number of the task's symmetries beside "
            f"the identity, got equivariance_views={config.equivariance_views!r}"
        )
    check_symmetries(symmetries, around.train_loader.inputs[:8])
    amp_dtype = None
    if config.mixed_precision:
        amp_dtype = DTYPES[config.amp_dtype] if around.device.type == "cuda" else torch.bfloat16
    loss = OutputEquivarianceLoss(
        symmetries,
        distance=config.equivariance_distance,
        views=config.equivariance_views,
        generator=generator(around.seed, "equivariance"),
    )
    return EquivarianceGuard(loss, config.lambda_equivariance, amp_dtype=amp_dtype)


def _gap_watch(config: TrialConfig, around: Around) -> AnyCompanion | None:
    if not config.gap_watch:
        return None
    return GapWatch(around.model, around.train_loader, around.val_loader)


def _budget_guard(config: TrialConfig, around: Around) -> AnyCompanion | None:
    if config.cap_ratio is None:
        return None
    weights = {
        "margin": config.lambda_margin,
        "sign": config.lambda_sign,
        "rejection": config.lambda_rej,
        "push_down": config.lambda_push_down,
        "push_up": config.lambda_push_up,
        "saturation": config.lambda_saturation,
        "spread": config.lambda_spread,
        "tag": config.lambda_tag,
        "pole": config.lambda_pole,
        "equivariance": config.lambda_equivariance,
        **getattr(around.loss_fn, "term_weights", {}),
    }
    # The reference's rule has a floor of its own.
    floor = 0.0 if config.cap_currency == "reference" else config.cap_floor
    return BudgetGuard(config.cap_ratio, currency=config.cap_currency, floor=floor, weights=weights)


def _hybrid_schedule(config: TrialConfig, around: Around) -> AnyCompanion | None:
    if config.hybrid_schedule == "none" or config.fit != "quotient":
        return None
    return HybridScheduleCompanion(
        HybridGradientSchedule(
            schedule_type=config.hybrid_schedule,
            warmup_epochs=config.hybrid_warmup_epochs,
            transition_epochs=config.hybrid_transition_epochs,
            delta_init=config.hybrid_delta_init,
            delta_final=config.hybrid_delta_final,
            adaptive_delta=config.hybrid_adaptive_delta,
        )
    )


def _near_pole_feedback(config: TrialConfig, around: Around) -> AnyCompanion | None:
    if not isinstance(around.train_loader, NearPoleBatches):
        return None
    return NearPoleFeedback(around.train_loader)


def _coverage_controller(config: TrialConfig, around: Around) -> AnyCompanion | None:
    if config.coverage_control == "none":
        return None
    adaptive = AdaptiveLossConfig(
        rule=config.coverage_control,
        initial_lambda=config.lambda_rej,
        target_coverage=config.target_coverage,
        learning_rate=config.control_rate,
        lambda_min=config.control_lambda_min,
        lambda_rej_min=config.control_lambda_min,
        lambda_max=config.control_lambda_max,
        momentum=config.control_momentum,
        warmup_steps=config.control_warmup_steps,
        update_frequency=config.control_update_frequency,
        exponential_decay=config.control_decay,
        dead_band=config.control_dead_band,
    )
    return CoverageController(AdaptiveLambda(adaptive))


# One function a family, None where the config does not ask for it. The order is that of the calls: what
# bounds outputs comes before what looks at them, but for what compares them with raw ones; what weighs all
# terms against each other comes after those who add some.
_COMPANIONS: dict[str, Callable[[TrialConfig, Around], AnyCompanion | None]] = {
    "equivariance": _equivariance_guard,
    "range": _range_guard,
    "saturation": _saturation_guard,
    "spread": _spread_guard,
    "tag": _tag_loss,
    "pole": _pole_loss,
    "hybrid": _hybrid_schedule,
    "sampling": _near_pole_feedback,
    "control": _coverage_controller,
    "gap": _gap_watch,
    "budget": _budget_guard,
}


def make_training_config(
    config: TrialConfig,
    *,
    seed: int | None = None,
    device: str | torch.device | None = None,
    val_loader: Iterable[Any] | None = None,
    log_hook: Callable[[Mapping[str, Any]], object] | None = None,
) -> TrainingConfig:
    """Make what a trial's config tells the trainer; what it says of model, loss and data is made elsewhere.

    Raises ValueError for a config with `restore_best` where there is no `val_loader`.
    """
    return TrainingConfig(
        learning_rate=config.learning_rate,
        max_epochs=config.max_epochs,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        mixed_precision=config.mixed_precision,
        amp_dtype=DTYPES[config.amp_dtype],
        tau_train_min=config.tau_train_min,
        tau_train_max=config.tau_train_max,
        tau_infer=config.tau_infer,
        coverage_threshold=config.coverage_threshold,
        coverage_patience=config.coverage_patience,
        gradient_policy=config.gradient_policy,
        log_hook=log_hook,
        val_loader=val_loader,
        device=device,
        loss_curriculum=make_curriculum(config),
        scheduler_cadence="per_epoch",
        clip_norm=config.clip_norm,
        nonfinite_budget=config.nonfinite_budget,
        finite_action=config.finite_action,
        finite_streak=None if config.finite_action == "skip_step" else config.finite_streak,
        seed=seed,
        restore_best=config.restore_best,
    )


def make_trainer(
    config: TrialConfig,
    seed: int,
    build_model: Callable[[], nn.Module],
    train: Split,
    val: Split | None,
    *,
    loss_fn: LossFn | None = None,
    device: str | torch.device = "cpu",
    log_hook: Callable[[Mapping[str, Any]], object] | None = None,
    companions: Sequence[AnyCompanion] = (),
    symmetries: Mapping[str, Symmetry] | None = None,
) -> SCMTrainer:
    """Make the trainer of one trial; equal arguments give bit-equal weights on the same device and software.

    The model is built under the trial's own seed and put into `config.dtype`, as are the data. Without
    `loss_fn` the objective is that of `make_training_loss`. `companions` are called before those that the
    config asks for. `symmetries` are those under which answers should be alike: `lambda_equivariance` needs
    them. Raises what `SCMTrainer` raises, and RuntimeError from torch when the device is absent.
    """
    dtype = DTYPES[config.dtype]
    with seeded_init(seed, "init"):
        model = build_model().to(dtype)
    # Moved before the optimizer is made, which keeps its moments where the weights are.
    model = model.to(device)
    optimizer = make_optimizer(config, model.parameters())
    batches = _train_batches(config, train, seed, device)
    val_batches = None
    if val is not None:
        val_batches = _batches(val, dtype, max(config.batch_size, _VALIDATION_ROWS), device, None)
    loss_fn = make_training_loss(config) if loss_fn is None else loss_fn
    around = Around(model, optimizer, batches, val_batches, seed, torch.device(device), loss_fn, symmetries)
    training = make_training_config(
        config, seed=seed, device=device, val_loader=val_batches, log_hook=log_hook
    )
    return SCMTrainer(
        model,
        optimizer,
        loss_fn,
        batches,
        scheduler=make_scheduler(config, optimizer),
        config=training,
        companions=[*companions, *make_companions(config, around)],
    )


def _train_batches(
    config: TrialConfig, split: Split, seed: int, device: str | torch.device
) -> TensorBatches | NearPoleBatches:
    dtype = DTYPES[config.dtype]
    if config.sampling == "shuffle":
        return _batches(split, dtype, config.batch_size, device, generator(seed, "order"))
    sampler = AdaptiveSamplerConfig(
        tau_train=0.5 * (config.tau_train_min + config.tau_train_max),
        beta=config.sampling_beta,
        gamma=config.sampling_memory,
        alpha=config.sampling_strength,
        batch_size=config.batch_size,
        normalized=True,
    )
    return NearPoleBatches(
        _inputs(split, dtype),
        split.targets.to(dtype=dtype),
        sampler,
        seed=seed_for(seed, "order"),
        correct=config.sampling_correction,
        device=device,
    )


def _inputs(split: Split, dtype: torch.dtype) -> Tensor:
    return split.inputs.to(dtype) if split.inputs.is_floating_point() else split.inputs


def _batches(
    split: Split,
    dtype: torch.dtype,
    batch_size: int,
    device: str | torch.device,
    order: torch.Generator | None,
) -> TensorBatches:
    targets = split.targets.to(dtype=dtype)
    return TensorBatches(_inputs(split, dtype), targets, batch_size, generator=order, device=device)


class Decoded(NamedTuple):
    """What a model answers on a split, on the CPU.

    decoded: P/Q, NaN at bottoms, (N,) or (N, O). bottom, fault, q_abs: in the shape of the denominators.
    numerator: P itself, whose sign is the direction of a bottom; `decode_split` always gives it.
    """

    decoded: Tensor
    bottom: Tensor
    fault: Tensor
    q_abs: Tensor
    numerator: Tensor | None = None


def decode_split(model: nn.Module, split: Split, *, tau_infer: float, batch_size: int = 4096) -> Decoded:
    """Return the model's strict answers on all rows of a split, in their order.

    The model is in eval mode meanwhile, and afterwards in the mode it was in. Raises ValueError for a split
    without rows.
    """
    if len(split) == 0:
        raise ValueError("split must have at least one row, got 0")
    weight = next(model.parameters())
    strict = InferenceConfig(tau_infer=tau_infer)
    inputs = split.inputs.to(weight.dtype) if split.inputs.is_floating_point() else split.inputs
    parts: list[tuple[Tensor, ...]] = []
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            for rows in inputs.split(batch_size):
                P, Q = model(rows.to(weight.device))[:2]
                result = strict_inference(P, Q, strict)
                part = (result.decoded, result.bottom_mask, result.fault_mask, Q.abs(), P)
                parts.append(tuple(item.cpu() for item in part))
    finally:
        model.train(was_training)
    # Joined outside of inference mode: tensors made inside of it may not be used by autograd later.
    return Decoded(*(torch.cat(column) for column in zip(*parts, strict=True)))
