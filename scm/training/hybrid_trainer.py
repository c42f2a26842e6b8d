"""Two ready-made trainers of quotients: masked where there is no value, and with gradients around poles.

Decided here: what such a training says of itself. What it is made of is decided in `hybrid_parts`; the loop,
checkpoints and records are those of `scm.training.trainer.SCMTrainer`, which is composed and not changed.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from scm.layers.hybrid_rational import HybridTRRational
from scm.training.adaptive_loss import CoverageController
from scm.training.feed import Feeder, LossCall
from scm.training.hybrid_parts import (
    HybridTrainingConfig,
    TrainerConfig,
    held_rows,
    make_controller,
    make_exploration_config,
    make_hybrid_parts,
    make_objective,
    make_optimizer,
    make_safe_step,
    make_training_config,
    sampled_rows,
)
from scm.training.hybrid_schedule import HybridScheduleCompanion
from scm.training.near_pole import NearPoleBatches, NearPoleFeedback
from scm.training.pole_exploration import ExploringBatches, PoleExploration
from scm.training.records import EpochReport
from scm.training.targets import SemanticTargets
from scm.training.trainer import SCMTrainer
from scm.training.validation import validate_model

__all__ = ["HybridTrainer", "HybridTrainingConfig", "Trainer", "TrainerConfig"]


class _ComposedTrainer:
    """An `SCMTrainer` with its parts, and what is said of the training; the two below say which parts."""

    def __init__(
        self,
        config: TrainerConfig,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        train_loader: Iterable[Any],
        *,
        loss: Callable[..., Any],
        controller: CoverageController | None,
        parts: Sequence[Any],
        val_loader: Iterable[Any] | None,
        scheduler: Any | None,
        log_hook: Callable[[Mapping[str, Any]], object] | None,
        say: Callable[[str], object],
    ) -> None:
        self.config = config
        self.controller = controller
        self._parts = tuple(parts)
        self._loss = loss
        self._say = say
        self._log_hook = log_hook
        self._ending = _EarlyEnd(config)
        self._history = _History(lambda: self.lambda_rej)
        due = log_hook is not None or config.verbose
        training = make_training_config(config, val_loader=val_loader, log_hook=self._log if due else None)
        # The history last: it is told what the others have learned of the epoch.
        along: list[Any] = [controller] if controller is not None else []
        along += [*parts, self._ending, self._history]
        self.training = SCMTrainer(
            model,
            optimizer,
            loss,
            train_loader,
            scheduler=scheduler,
            config=training,
            companions=along,
        )

    @property
    def model(self) -> nn.Module:
        """The model that is trained."""
        return self.training.model

    @property
    def status(self) -> str:
        """ "running", or how the training ended: "completed", "stopped", "diverged"."""
        return "stopped" if self._ending.due and self.training.status == "running" else self.training.status

    @property
    def lambda_rej(self) -> float:
        """The weight of the coverage term now; waits for the device."""
        controller = self.controller
        return self.config.initial_lambda if controller is None else float(controller.adaptive.lambda_rej)

    @property
    def history(self) -> list[dict[str, float]]:
        """What each epoch said: losses, coverage, lambda_rej, and what it cost; `epoch` counts from 0."""
        return self._history.epochs

    @property
    def bench_history(self) -> list[dict[str, float | int]]:
        """By epoch, in ms a batch: avg_step_ms, data_time_ms (waits for data), optim_time_ms; and batches."""
        return self.training.bench_history

    def train(self) -> dict[str, list[float]]:
        """Train to the end, from where it stands; return loss, coverage and lambda_rej of every epoch."""
        if not self._ending.due:
            for report in self.training.epochs():
                if self.config.verbose:
                    self._say_epoch(report)
                if self._ending.due:
                    break
        return {name: [epoch[name] for epoch in self.history] for name in ("loss", "coverage", "lambda_rej")}

    fit = train

    def evaluate(self, loader: Iterable[Any] | None = None) -> dict[str, float]:
        """Return the metrics on `loader` (default: the val_loader), decoded strictly at tau_infer.

        loss: mean over rows of the training's own loss, in which an answer without a value costs lambda_rej.
        coverage: the share of answers that have one. ValueError without a loader, or rows in it.
        """
        loader = self.training.config.val_loader if loader is None else loader
        if loader is None:
            raise ValueError("evaluate needs a loader, or a trainer with a val_loader, got neither")
        loss = LossCall(self._loss)
        known = {
            "tau": self.config.tau_train,
            "epoch": self.training.current_epoch,
            "global_step": self.training.global_step,
            "loss_weights": {"rejection": self.lambda_rej},
        }
        found = validate_model(
            self.model,
            loss,
            Feeder(loss, self.training.device, unreachable=False),
            loader,
            known=known,
            tau_infer=self.config.tau_infer,
            forward=self.model,
            reducers={},
        )
        if found is None:
            raise ValueError("evaluate needs at least one row that may be trained, got none")
        return found[0]

    def get_training_summary(self) -> dict[str, Any]:
        """Return how the training went, as plain values; waits for the device.

        status, epochs_trained, global_steps, final_metrics (the newest epoch's), bench_history,
        coverage_enforcement (target_coverage, lambda_rej, and the controller's statistics),
        model_statistics (parameters, and what layers say of theirs), telemetry (what all parts say, by
        name); with a hybrid schedule also gradient_modes (epochs by mode), warmup_epochs,
        transition_complete and, with a hysteresis, policy_thresholds.
        """
        telemetry = self.training.telemetry()
        said = {} if self.controller is None else self.controller.adaptive.get_statistics()
        return {
            "status": self.status,
            "epochs_trained": self.training.current_epoch,
            "global_steps": self.training.global_step,
            "final_metrics": dict(self.history[-1]) if self.history else {},
            "bench_history": [dict(bench) for bench in self.bench_history],
            "coverage_enforcement": {
                "enforced": self.controller is not None,
                "target_coverage": self.config.target_coverage,
                "lambda_rej": self.lambda_rej,
                **said,
            },
            "model_statistics": _model_statistics(self.model),
            "telemetry": telemetry,
            **self._schedule_summary(),
        }

    def save_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Write everything that going on needs, the state of every part and all generators, atomically."""
        self.training.save_checkpoint(path)

    def load_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Go on from `path`, as `SCMTrainer.load_checkpoint` does; nothing in the file is run."""
        self.training.load_checkpoint(path)

    def _schedule_summary(self) -> dict[str, Any]:
        schedules = [part for part in self._parts if isinstance(part, HybridScheduleCompanion)]
        if not schedules:
            return {}
        schedule, hysteresis = schedules[0].schedule, schedules[0].hysteresis
        epochs = self.training.current_epoch
        modes = Counter(schedule.mode(epoch) for epoch in range(epochs))
        summary: dict[str, Any] = {
            "gradient_modes": dict(modes),
            "warmup_epochs": schedule.warmup_epochs,
            "transition_complete": epochs > 0 and schedule.mode(epochs - 1) == "converged",
        }
        if hysteresis is not None:
            summary["policy_thresholds"] = asdict(hysteresis)
        return summary

    def _log(self, record: Mapping[str, Any]) -> None:
        """Hand a record on; said as a line as well where that is asked for."""
        if self._log_hook is not None:
            self._log_hook(record)
        if self.config.verbose and record["phase"] == "train":
            metrics = record["metrics"]
            self._say(
                f"  step {record['step']}: loss {_shown(metrics['loss'])}, "
                f"coverage {_shown(metrics['coverage'])}"
            )

    def _say_epoch(self, report: EpochReport) -> None:
        epoch, bench = self.history[-1], report.bench
        named = ("loss", "val_loss", "coverage", "val_coverage", "lambda_rej")
        told = ", ".join(f"{name} {_shown(epoch[name])}" for name in named if name in epoch)
        self._say(f"Epoch {report.epoch + 1}/{self.config.max_epochs}: {told}")
        self._say(
            f"Bench: step {bench['avg_step_ms']:.1f} ms, data {bench['data_time_ms']:.1f} ms, "
            f"optim {bench['optim_time_ms']:.1f} ms, {bench['batches']} batches"
        )


class Trainer(_ComposedTrainer):
    """Train a quotient on those of its answers that have a value, with coverage held by an adaptive weight.

    The loss is half the square of P/Q - y where |Q| >= tau_train and the target is a number; an answer
    without a value costs lambda_rej and has no gradient (mask-REAL); a soft coverage term, weighed by
    lambda_rej as well, brings coverage to its target. model answers (P, Q) or (P, Q, named tensors); batches
    are those of `SCMTrainer`. Without an optimizer, Adam at config.learning_rate. loss_fn takes the place of
    the loss; companions go along besides. With config.verbose, `say` gets lines.

    Differs from zeroproof 0.1.0 (`TRTrainer`): its weights change; the data wait is measured; checkpoints
    hold everything and can be read back.
    """

    def __init__(
        self,
        model: nn.Module,
        train_loader: Iterable[Any],
        *,
        val_loader: Iterable[Any] | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        scheduler: Any | None = None,
        config: TrainerConfig | None = None,
        loss_fn: Callable[..., Any] | None = None,
        companions: Sequence[Any] = (),
        log_hook: Callable[[Mapping[str, Any]], object] | None = None,
        say: Callable[[str], object] = print,
    ) -> None:
        config = TrainerConfig() if config is None else config
        optimizer = make_optimizer(config, model) if optimizer is None else optimizer
        super().__init__(
            config,
            model,
            optimizer,
            train_loader,
            loss=make_objective(config) if loss_fn is None else loss_fn,
            controller=make_controller(config),
            parts=[*companions, *([make_safe_step(config, optimizer)] if config.use_safe_lr else [])],
            val_loader=val_loader,
            scheduler=scheduler,
            log_hook=log_hook,
            say=say,
        )


class HybridTrainer(_ComposedTrainer):
    """A `Trainer` that also learns around poles, with the parts that its `HybridTrainingConfig` turns on.

    Gradients that saturate within a radius of a pole (instead of none there), rows near poles drawn more
    often, points beside poles explored (label_points: points shaped as the inputs -> their targets), tags and
    pole scores learned beside the quotient, coverage enforced. Rational layers inside of the model take part:
    those that keep statistics tell them, weights that have a regulariser are regularised, an L1 projection
    follows each step.

    Differs from zeroproof 0.1.0 (`HybridTRTrainer`): all parts are made once, before the first step; the
    schedule is told to the loss, in every micro-batch; what an epoch has learned is read before it is
    cleared; any weight can be reached by a gradient. Data wait and checkpoints as for `Trainer`.
    """

    def __init__(
        self,
        model: nn.Module,
        train_loader: Iterable[Any],
        *,
        val_loader: Iterable[Any] | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        scheduler: Any | None = None,
        config: HybridTrainingConfig | None = None,
        label_points: Callable[[Tensor], SemanticTargets] | None = None,
        loss_fn: Callable[..., Any] | None = None,
        companions: Sequence[Any] = (),
        log_hook: Callable[[Mapping[str, Any]], object] | None = None,
        say: Callable[[str], object] = print,
    ) -> None:
        config = HybridTrainingConfig() if config is None else config
        optimizer = make_optimizer(config, model) if optimizer is None else optimizer
        train_loader = sampled_rows(config, train_loader)
        parts: list[Any] = [*companions]
        if isinstance(train_loader, NearPoleBatches):
            parts.append(NearPoleFeedback(train_loader))
        if label_points is not None:
            exploration = PoleExploration(label_points, make_exploration_config(config))
            train_loader = ExploringBatches(held_rows(train_loader), exploration)
            parts.append(exploration)
        parts += make_hybrid_parts(config, model, optimizer)
        super().__init__(
            config,
            model,
            optimizer,
            train_loader,
            loss=make_objective(config) if loss_fn is None else loss_fn,
            controller=make_controller(config),
            parts=parts,
            val_loader=val_loader,
            scheduler=scheduler,
            log_hook=log_hook,
            say=say,
        )


def _model_statistics(model: nn.Module) -> dict[str, Any]:
    """How many parameters there are, and what layers with statistics of their own say, by their names."""
    layers = {
        name or type(model).__name__: layer.get_hybrid_statistics()
        for name, layer in model.named_modules()
        if isinstance(layer, HybridTRRational)
    }
    parameters = list(model.parameters())
    counts = {
        "parameters": sum(item.numel() for item in parameters),
        "trained_parameters": sum(item.numel() for item in parameters if item.requires_grad),
    }
    return {**counts, "layers": layers} if layers else counts


def _shown(value: float | None) -> str:
    return "nan" if value is None else f"{value:.4g}"  # a record has None for what is not finite


class _EarlyEnd:
    """Whether a training should end, because its loss has not fallen for too long."""

    name = "early_end"

    def __init__(self, config: TrainerConfig) -> None:
        self._config = config
        self._lowest = math.inf
        self._waited = 0  # epochs

    @property
    def due(self) -> bool:
        return self._config.early_stopping and self._waited >= self._config.patience

    def after_epoch(self, report: EpochReport) -> None:
        loss = report.train["loss"] if report.val is None else report.val["val_loss"]
        if loss < self._lowest - self._config.min_delta:
            self._lowest, self._waited = loss, 0
        else:
            self._waited += 1

    def state_dict(self) -> dict[str, Any]:
        return {"lowest": self._lowest, "waited": self._waited}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._lowest, self._waited = float(state["lowest"]), int(state["waited"])


class _History:
    """What each epoch said, as one mapping of numbers."""

    name = "history"

    def __init__(self, lambda_rej: Callable[[], float]) -> None:
        self._lambda_rej = lambda_rej
        self.epochs: list[dict[str, float]] = []

    def after_epoch(self, report: EpochReport) -> None:
        bench = {name: float(value) for name, value in report.bench.items()}
        told = {**report.train, **(report.val or {}), **bench}
        self.epochs.append({**told, "lambda_rej": self._lambda_rej()})

    def state_dict(self) -> dict[str, Any]:
        return {"epochs": [dict(epoch) for epoch in self.epochs]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.epochs = [dict(epoch) for epoch in state["epochs"]]
