"""What one call of the trainer is told: fields, defaults, rules. What they do is decided in the trainer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from scm.autodiff.policies import GradientPolicy
from scm.guards.finite import check_finite_action

if TYPE_CHECKING:
    from scm.training.curriculum import LossWeightsCurriculum

SCHEDULER_CADENCES = ("per_optimizer_update", "per_batch", "per_epoch", "per_validation_metric")
ACCUMULATION_WEIGHTINGS = ("samples", "micro_batches")
_AMP_DTYPES = (torch.float16, torch.bfloat16)


@dataclass
class TrainingConfig:
    """What `SCMTrainer` is told besides model, optimizer, loss and data; checked when built.

    The fields up to `scheduler_cadence` are those of zeroproofml 0.6.1, in its order. The rest:

    clip_norm: upper bound of the norm of all gradients together, after unscaling; None does not clip.
    nonfinite_budget: how many optimizer steps may be skipped for a non-finite loss or gradient; one more,
        and the training ends as "diverged".
    seed: gives thresholds and what the model draws itself (dropout) streams of their own. None: thresholds
        come from a generator seeded with 0, the model draws from the global generators.
    restore_best: when the training ends, put back the weights of the epoch with the lowest val_loss.
    log_interval: `log_hook` gets every that many-th micro-batch.
    finite_action: what is done about a non-finite loss or gradient, see `scm.guards.finite.FINITE_ACTIONS`.
        Under skip_micro_batch the budget counts micro-batches. roll_back keeps a copy of weights and
        optimizer state, made every `snapshot_steps` good steps.
    finite_streak: how many such steps (or micro-batches) in a row are too many: roll_back returns then, the
        others end the training. None: 3 under roll_back, 1 under stop, no limit otherwise.
    accumulation_weighting: "samples" weighs each micro-batch of a group by its rows, so that the gradient is
        that of the mean over the group's rows; "micro_batches" weighs them alike, as the peer does.

    Thresholds are in units of |Q|. `learning_rate` is a label only: the optimizer brings its own.
    Raises TypeError for a value of another type, ValueError for one out of range.
    """

    learning_rate: float = 1e-3
    max_epochs: int = 1
    gradient_accumulation_steps: int = 1
    mixed_precision: bool = False
    use_amp: bool | None = None
    amp_dtype: torch.dtype = torch.float16
    tau_train_min: float = 1e-4
    tau_train_max: float = 1e-4
    tau_infer: float = 1e-6
    allow_bottom_unreachable: bool = False
    coverage_threshold: float = 0.95
    coverage_patience: int = 3
    gradient_policy: GradientPolicy | str | None = None
    log_hook: Callable[[Mapping[str, Any]], object] | None = None
    val_loader: Iterable[Any] | None = None
    device: torch.device | str | None = None
    loss_weights: Mapping[str, Any] | None = None
    loss_curriculum: LossWeightsCurriculum | None = None
    scheduler_cadence: str = "per_optimizer_update"
    clip_norm: float | None = None
    nonfinite_budget: int = 10
    seed: int | None = None
    restore_best: bool = False
    log_interval: int = 1
    accumulation_weighting: str = "samples"
    finite_action: str = "skip_step"
    finite_streak: int | None = None
    snapshot_steps: int = 50

    def __post_init__(self) -> None:
        for name in ("max_epochs", "gradient_accumulation_steps", "coverage_patience", "log_interval"):
            _check_count(name, getattr(self, name), least=1)
        _check_count("snapshot_steps", self.snapshot_steps, least=1)
        if self.finite_streak is not None:
            _check_count("finite_streak", self.finite_streak, least=1)
        check_finite_action(self.finite_action)
        _check_count("nonfinite_budget", self.nonfinite_budget, least=0)
        for name in ("mixed_precision", "allow_bottom_unreachable", "restore_best"):
            _check_bool(name, getattr(self, name))
        if self.use_amp is not None:
            _check_bool("use_amp", self.use_amp)
            self.mixed_precision = self.use_amp
        if self.amp_dtype not in _AMP_DTYPES:
            raise ValueError(f"amp_dtype must be torch.float16 or torch.bfloat16, got {self.amp_dtype!r}")
        self._check_numbers()
        self._check_choices()
        self.loss_weights = _loss_weights(self.loss_weights)
        if self.restore_best and self.val_loader is None:
            raise ValueError("restore_best needs a val_loader: the best epoch is that of the lowest val_loss")

    def _check_numbers(self) -> None:
        for name in ("learning_rate", "tau_train_min", "tau_train_max", "tau_infer"):
            value = float(getattr(self, name))
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be finite and > 0, got {name}={value!r}")
            setattr(self, name, value)
        if self.tau_train_min > self.tau_train_max:
            values = f"tau_train_min={self.tau_train_min!r}, tau_train_max={self.tau_train_max!r}"
            raise ValueError(f"tau_train_min must be <= tau_train_max, got {values}")
        if self.tau_infer > self.tau_train_min:
            values = f"tau_infer={self.tau_infer!r}, tau_train_min={self.tau_train_min!r}"
            raise ValueError(f"tau_infer must be <= tau_train_min, got {values}")
        share = self.coverage_threshold
        if isinstance(share, bool) or not isinstance(share, (int, float)):
            raise TypeError(f"coverage_threshold must be a number, got coverage_threshold={share!r}")
        if not 0 <= share <= 1:
            raise ValueError(f"coverage_threshold must be in [0, 1], got coverage_threshold={share!r}")
        if self.clip_norm is not None and not (math.isfinite(self.clip_norm) and self.clip_norm > 0):
            raise ValueError(f"clip_norm must be finite and > 0, or None, got clip_norm={self.clip_norm!r}")

    def _check_choices(self) -> None:
        if isinstance(self.gradient_policy, str):
            known = [policy.value for policy in GradientPolicy]
            if self.gradient_policy not in known:
                raise ValueError(
                    f"gradient_policy must be one of {', '.join(known)}, got {self.gradient_policy!r}"
                )
            self.gradient_policy = GradientPolicy(self.gradient_policy)
        if self.gradient_policy is not None and not isinstance(self.gradient_policy, GradientPolicy):
            raise TypeError(f"gradient_policy must be a GradientPolicy, got {self.gradient_policy!r}")
        if self.log_hook is not None and not callable(self.log_hook):
            raise TypeError(f"log_hook must be callable, got {self.log_hook!r}")
        if self.device is not None:
            self.device = torch.device(self.device)
        if self.seed is not None and (isinstance(self.seed, bool) or not isinstance(self.seed, int)):
            raise TypeError(f"seed must be an int or None, got seed={self.seed!r}")
        for name, choices in (
            ("scheduler_cadence", SCHEDULER_CADENCES),
            ("accumulation_weighting", ACCUMULATION_WEIGHTINGS),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")

    def identity(self) -> dict[str, Any]:
        """Return, as plain values, the fields that change what a step does.

        A checkpoint keeps them, and is refused under others. `max_epochs` is not among them: a training may
        be extended.
        """
        policy = self.gradient_policy
        return {
            "gradient_accumulation_steps": self.gradient_accumulation_steps,
            "accumulation_weighting": self.accumulation_weighting,
            "mixed_precision": self.mixed_precision,
            "amp_dtype": str(self.amp_dtype) if self.mixed_precision else None,
            "tau_train_min": self.tau_train_min,
            "tau_train_max": self.tau_train_max,
            "tau_infer": self.tau_infer,
            "coverage_threshold": float(self.coverage_threshold),
            "coverage_patience": self.coverage_patience,
            "gradient_policy": policy.value if isinstance(policy, GradientPolicy) else None,
            "loss_weights": dict(self.loss_weights) if self.loss_weights is not None else None,
            "loss_curriculum": None if self.loss_curriculum is None else repr(self.loss_curriculum),
            "scheduler_cadence": self.scheduler_cadence,
            "clip_norm": self.clip_norm,
            "nonfinite_budget": self.nonfinite_budget,
            "finite_action": self.finite_action,
            "finite_streak": self.finite_streak,
            "snapshot_steps": self.snapshot_steps if self.finite_action == "roll_back" else None,
            "seed": self.seed,
            "restore_best": self.restore_best,
            "validates": self.val_loader is not None,
        }


def _check_count(name: str, value: object, *, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {name}={value!r}")
    if value < least:
        raise ValueError(f"{name} must be >= {least}, got {name}={value!r}")


def _check_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {name}={value!r}")


def _loss_weights(weights: Mapping[str, Any] | None) -> dict[str, float] | None:
    if weights is None:
        return None
    checked = {}
    for name, value in weights.items():
        if not isinstance(name, str):
            raise TypeError(f"loss_weights must be named by str, got {name!r}")
        if not name.strip():
            raise ValueError(f"loss_weights must have names that are not empty, got {name!r}")
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"loss_weights must be numbers, got {name}={value!r}")
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"loss_weights must be finite and >= 0, got {name}={value!r}")
        checked[name] = float(value)
    return checked
