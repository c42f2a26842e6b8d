"""One training loop: batches in, steps taken or refused, what each epoch says out.

Decided here: the order of things in a step and in an epoch, and when a training ends. What a batch is, is
decided in `feed`; which step is refused in `guard`; what is reported in `records` and `validation`; what a
checkpoint keeps in `resume`.
"""

from __future__ import annotations

import copy
import math
import os
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from scm.autodiff.policies import (
    GradientPolicy,
    gradient_policy,
    has_active_policy,
    policies_disabled,
    scaled_gradients,
)
from scm.gradients import count_non_finite
from scm.guards.finite import FiniteWatch, MicroBatchGate, Snapshot, untouched
from scm.guards.origin import find_origin
from scm.losses.terms import LossTerms
from scm.seeding import generator
from scm.training.apart import backward_apart
from scm.training.bench import StepClock
from scm.training.checkpoint import read_checkpoint, write_checkpoint
from scm.training.companion import AnyCompanion, Companions, Moment
from scm.training.config import TrainingConfig
from scm.training.feed import Fed, Feeder, LossCall, bottom_is_unreachable
from scm.training.gap import perturbed_threshold
from scm.training.guard import StepGuard
from scm.training.objective import as_trainer_loss, in_terms
from scm.training.random_state import OwnRandomState, unmoved_random_state
from scm.training.records import EpochRecords, EpochReport, counts_of, epoch_metrics, row_metrics
from scm.training.resume import load_model_weights, put_trainer_state, replayed, trainer_state
from scm.training.schedule import step_after_epoch, usable_scheduler
from scm.training.validation import Reducer, validate_model
from scm.utils.logging import metric_log_record

__all__ = ["EpochReport", "SCMTrainer", "TrainingConfig"]

KEPT_THRESHOLDS = 1024
KEPT_MICRO_BATCHES = 8
NAN_KINDS = ("loss", "gradient", "output", "parameter")
_END = object()


class SCMTrainer:
    """Train a model that answers (P, Q), or (P, Q, named tensors), and say how it went.

    loss_fn(outputs, (Y_n, Y_d), **facts) returns a scalar, or `LossTerms`; of the facts tau, inputs, targets,
    epoch, global_step, loss_weights, semantic_targets, row_weights and hybrid_delta it is told those that its
    signature names. An `SCMTrainingLoss` may be given as it is. Batches: see `scm.training.feed.Feeder`.

    companions: controllers and guards that go along, see `scm.training.companion`; what they say of
    themselves is `telemetry()`.

    A step whose loss or gradient is not finite is not taken: weights and optimizer state stay as they were,
    the kind is counted in `nan_counts`, and more than `config.nonfinite_budget` such steps end the training
    as "diverged"; `config.finite_action` asks for more. `nan_origin` says where the first one came from,
    found by one more pass over its micro-batch (among the last 8 of a group; where only the device knows of
    such steps, in the first epoch after one that had some). The host waits for the device once an epoch and
    where `log_hook` is due; which optimizers need one more wait a step is said in `scm.training.guard`.

    Differs from zeroproofml 0.6.1, beside that: coverage stops a training with and without `val_loader`;
    validation decodes strictly at tau_infer; micro-batches weigh by their rows; rows labelled missing or
    fault are never trained; a skipped step does not move the scheduler; the thresholds have a generator of
    their own; a loader that can be read once only is refused for more than one epoch; checkpoints are atomic
    and hold everything that an uninterrupted training would have known, in mid-epoch too.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss_fn: Callable[..., Tensor | LossTerms],
        train_loader: Iterable[Any],
        *,
        scheduler: Any | None = None,
        config: TrainingConfig | None = None,
        companions: Sequence[AnyCompanion] = (),
    ) -> None:
        self.config = TrainingConfig() if config is None else config
        self.device = torch.empty(0, device=self.config.device or "cpu").device
        self.model = model.to(self.device)
        self.optimizer = optimizer
        self.loss_fn = loss_fn
        self.train_loader = train_loader
        self._check_learning_rate()
        self.scheduler = usable_scheduler(
            scheduler, self.config.scheduler_cadence, validates=self.config.val_loader is not None
        )
        self.controllers: dict[str, Any] = {}  # by name; anything with state_dict and load_state_dict
        if hasattr(loss_fn, "state_dict") and hasattr(loss_fn, "load_state_dict"):
            self.controllers["loss_fn"] = loss_fn
        self._watch = self._make_watch()
        watching: list[Any] = [] if self._watch is None else [self._watch]
        self._companions = Companions([*watching, *companions])  # the watch first: it sees raw outputs
        for name, held in self._companions.stateful().items():
            if name in self.controllers:
                raise ValueError(f"a companion must have a name of its own, got name={name!r}, the loss's")
            self.controllers[name] = held
        self.metric_reducers: dict[str, Reducer] = {}

        loss = as_trainer_loss(loss_fn)
        self._loss = LossCall(loss)
        self._loss_terms = LossCall(in_terms(loss)) if self._companions.needs_terms else self._loss
        unreachable = bottom_is_unreachable(model, self.config.tau_infer)
        unreachable = unreachable and not self.config.allow_bottom_unreachable
        self._feeder = Feeder(self._loss, self.device, unreachable=unreachable)
        self.amp_dtype = self._amp_dtype()
        scaled = self.amp_dtype is torch.float16
        self.scaler = torch.amp.GradScaler("cuda") if scaled else None
        self._gate, self._snapshot = self._make_gate(optimizer)
        follows_steps = self.scheduler is not None and self.config.scheduler_cadence == "per_optimizer_update"
        self._guard = StepGuard(
            optimizer,
            self.device,
            clip_norm=self.config.clip_norm,
            scaler=self.scaler,
            host_must_know=follows_steps or (self._watch is not None and self._watch.limit is not None),
            before_step=None if self._snapshot is None else self._snapshot.before_good_step,
        )
        self._random = OwnRandomState(self.config.seed, self.device)
        self._tau_generator = generator(self.config.seed or 0, "tau")
        self._clock = StepClock(self.device)
        self._begin_history()

    def _make_watch(self) -> FiniteWatch | None:
        """What counts and limits non-finite steps beside the budget; None where nothing else is asked for."""
        action, streak = self.config.finite_action, self.config.finite_streak
        return None if action == "skip_step" and streak is None else FiniteWatch(action, streak=streak)

    def _make_gate(self, optimizer: torch.optim.Optimizer) -> tuple[MicroBatchGate | None, Snapshot | None]:
        if self._watch is None:
            return None, None
        if self.config.finite_action == "skip_micro_batch":
            if self.scaler is not None:
                raise ValueError(
                    "finite_action='skip_micro_batch' needs amp_dtype=torch.bfloat16 or no mixed precision: "
                    "the scale of float16 gradients learns from steps that overflow"
                )
            self._watch.gate = MicroBatchGate(self.model, self.device, waits=self._watch.limit is not None)
        if self.config.finite_action == "roll_back":
            self._watch.snapshot = Snapshot(self.model, optimizer, every=self.config.snapshot_steps)
        return self._watch.gate, self._watch.snapshot

    def _check_learning_rate(self) -> None:
        """Say that a learning rate in the config is not the one that trains, where they differ."""
        told, default = self.config.learning_rate, TrainingConfig.learning_rate
        rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        if told != default and told not in rates:
            warnings.warn(
                f"TrainingConfig.learning_rate={told} trains nothing, the optimizer's own does: {rates}",
                DeprecationWarning,
                stacklevel=3,
            )

    def _begin_history(self) -> None:
        self.current_epoch = 0  # the next one to run, 0-based
        self.global_step = 0  # micro-batches
        self.optimizer_steps = 0  # taken, as far as the host knows
        self.status = "running"
        self.stop_reason = ""
        self.nan_counts = dict.fromkeys(NAN_KINDS, 0)
        self.nan_origin = ""  # where the first non-finite loss or gradient came from
        self.last_thresholds: deque[float] = deque(maxlen=KEPT_THRESHOLDS)
        self.train_history: list[dict[str, float]] = []
        self.val_history: list[dict[str, float]] = []
        self.bench_history: list[dict[str, float | int]] = []
        self.best_epoch: int | None = None
        self.best_val_loss = math.inf
        self._best_state: dict[str, Any] | None = None
        self._last_state: dict[str, Any] | None = None  # what `restore_best` replaced
        self._coverage_bad_epochs = 0
        self._position = 0  # micro-batches of the epoch under way
        self._records = EpochRecords()
        self._loader_start: dict[str, Any] | None = None
        self._epoch_table: list[list[float]] = []
        self._group_count = 0
        self._group_rows = 0  # of the group's first micro-batch
        self._group_weight = 0.0
        # The last of the group under way, kept until a bad one has shown where it comes from.
        self._group: deque[tuple[Fed, dict[str, Any]]] = deque(maxlen=KEPT_MICRO_BATCHES)
        self._parameters: list[Tensor] = []
        self._epoch_facts: dict[str, Any] | None = None  # of the epoch under way, with what companions put in

    def _amp_dtype(self) -> torch.dtype | None:
        """Half precision in use: without CUDA, float16 has no scaler to keep it alive and is bfloat16."""
        if not self.config.mixed_precision:
            return None
        if self.device.type not in ("cpu", "cuda"):
            raise ValueError(f"mixed_precision needs a cpu or cuda device, got {self.device}")
        return self.config.amp_dtype if self.device.type == "cuda" else torch.bfloat16

    # --- running ------------------------------------------------------------------------------------

    def fit(self) -> list[dict[str, float]]:
        """Train to the end; return the metrics of every micro-batch trained by this call, in order."""
        logs: list[dict[str, float]] = []
        for _ in self.epochs():
            logs.extend(row_metrics(row) for row in self._epoch_table)
        return logs

    def epochs(self) -> Iterator[EpochReport]:
        """Train, one epoch at a time: what a caller has not asked for is not run.

        Goes on where the training stands, in mid-epoch too. Ends when max_epochs are done, when coverage has
        been short for too long, or when the training has diverged; nothing more follows then, unless it was
        completed and max_epochs is larger now.
        """
        if self.status == "completed" and self.current_epoch < self.config.max_epochs:
            self._reopen()
        left = self.config.max_epochs - self.current_epoch
        loaders = {"train_loader": self.train_loader, "val_loader": self.config.val_loader}
        for name, loader in loaders.items():
            if left > 1 and self.status == "running" and isinstance(loader, Iterator):
                raise ValueError(
                    f"{name} can be read once only, and {left} epochs are left: "
                    "give a list, a DataLoader or TensorBatches instead of an iterator"
                )
        while self.status == "running" and self.current_epoch < self.config.max_epochs:
            yield self._run_epoch()

    def _reopen(self) -> None:
        self.status, self.stop_reason = "running", ""
        if self._last_state is not None:
            self.model.load_state_dict(self._last_state)
            self._last_state = None

    def _run_epoch(self) -> EpochReport:
        epoch = self.current_epoch
        self.model.train()
        self._clock.begin_epoch()
        with self._random.in_place():
            self._train_epoch(epoch, self._begin_facts(epoch))
        self._epoch_table = self._records.table().tolist()
        if not self._epoch_table:
            again = "again: it can be read once only" if epoch else ""
            raise ValueError(f"train_loader gave no rows to train on in epoch {epoch} {again}".rstrip())
        self._count_epoch()
        train = {**epoch_metrics(self._epoch_table), "lr": self._learning_rate()}
        val = None if self.nan_counts["parameter"] else self.validate()
        if self.optimizer_steps:  # no schedule moves before the first step
            step_after_epoch(self.scheduler, self.config.scheduler_cadence, val)
        self._judge(epoch, train, val)
        bench = self._clock.end_epoch(epoch)
        self.train_history.append({**train, "epoch": float(epoch)})
        self.bench_history.append(bench)
        self._position, self._records, self._loader_start = 0, EpochRecords(), None
        self._epoch_facts = None
        self.current_epoch = epoch + 1
        if self.status == "running" and self.current_epoch >= self.config.max_epochs:
            self.status, self.stop_reason = "completed", ""
        if self.status != "running":
            self._restore_best()
        if val is not None and self.config.log_hook is not None:
            self._log(val, phase="eval", epoch=epoch)
        report = EpochReport(epoch, train, val, bench, dict(self.nan_counts), self.status)
        for learn in self._companions.after_epoch:
            learn(report)
        return report

    def _begin_facts(self, epoch: int) -> dict[str, Any]:
        """Return the facts of an epoch that begins, or of one that is gone on with."""
        if self._epoch_facts is None:
            self._epoch_facts = self._facts(epoch)
            for begin in self._companions.begin_epoch:
                begin(epoch, self._epoch_facts)
        return dict(self._epoch_facts)

    def _facts(self, epoch: int) -> dict[str, Any]:
        weights = self.config.loss_weights
        if self.config.loss_curriculum is not None:
            weights = self.config.loss_curriculum.weights(epoch, weights)
        return {
            "epoch": epoch,
            "global_step": self.global_step,
            "loss_weights": weights,
            "tau": self._tau_mid,
        }

    @property
    def _tau_mid(self) -> float:
        return 0.5 * (self.config.tau_train_min + self.config.tau_train_max)

    # --- one epoch ----------------------------------------------------------------------------------

    def _train_epoch(self, epoch: int, facts: dict[str, Any]) -> None:
        self._parameters = list(self._all_parameters())
        if self._position == 0:
            self._clear_gradients()
        asked = time.perf_counter()
        iterator = self._open_loader()
        with self._ungated():
            while (batch := next(iterator, _END)) is not _END:
                arrived = self._clock.begin_work()
                fed = self._feeder.prepare(batch)
                optim_s, taken = 0.0, None
                trained = fed is not None and fed.rows > 0
                if fed is not None and trained:
                    self._accumulate(fed, facts)
                full = self._group_count == self.config.gradient_accumulation_steps
                if full:
                    begun = time.perf_counter()
                    taken = self._step()
                    optim_s = time.perf_counter() - begun
                self._clock.end_batch(arrived - asked, time.perf_counter() - arrived, optim_s, stepped=full)
                self._position += 1
                if trained:
                    self._after_batch(epoch, refused=taken is False)
                if self.status != "running":
                    return
                asked = time.perf_counter()
            if self._group_count:
                begun = time.perf_counter()
                self._step()
                self._clock.add_flush(time.perf_counter() - begun)

    def _ungated(self) -> AbstractContextManager[None]:
        """Leave no gates in the graph where no policy is asked for, neither here nor around the training."""
        if self.config.gradient_policy is None and not has_active_policy():
            return policies_disabled()
        return nullcontext()

    def _open_loader(self) -> Iterator[Any]:
        """Iterate over the loader, from the batch after the last one trained in this epoch."""
        if hasattr(self.train_loader, "state_dict") and hasattr(self.train_loader, "load_state_dict"):
            if self._position:
                self.train_loader.load_state_dict(self.train_loader.state_dict())
            return iter(self.train_loader)
        self._loader_start, iterator = replayed(
            self.train_loader, self._random, self._loader_start, self._position
        )
        return iterator

    def _accumulate(self, fed: Fed, facts: dict[str, Any]) -> None:
        """Forward and backward pass of one micro-batch; its gradient joins the group's."""
        self.global_step += 1
        low, high = self.config.tau_train_min, self.config.tau_train_max
        tau = perturbed_threshold(low, high, generator=self._tau_generator)
        self.last_thresholds.append(tau)
        facts["tau"], facts["global_step"] = tau, self.global_step
        policy = self.config.gradient_policy
        with (
            nullcontext() if policy is None else gradient_policy(GradientPolicy(policy), tau=tau),
            nullcontext() if self.scaler is None else scaled_gradients(self._loss_scale(self.scaler)),
        ):
            loss, outputs = self._forward_backward(fed, facts)
        self._records.add(loss.detach(), outputs, tau, fed.rows)

    def _loss_scale(self, scaler: torch.amp.GradScaler) -> Tensor:
        scale: Tensor = scaler.scale(torch.ones((), device=self.device))  # get_scale() would wait
        return scale

    def _forward_backward(self, fed: Fed, facts: dict[str, Any]) -> tuple[Tensor, Any]:
        if self._companions.in_steps:
            return self._accompanied(fed, facts)
        outputs = self._forward(fed.inputs)
        loss = _scalar(self._loss(outputs, fed, facts))
        weight = self._join_group(fed, facts)
        if not self._guard.watch_loss(loss):
            self._diagnose(list(self._group)[-1:])
        elif loss.requires_grad:
            self._backward(loss, weight)
        return loss, outputs

    def _accompanied(self, fed: Fed, facts: dict[str, Any]) -> tuple[Tensor, Any]:
        """`_forward_backward` with the companions' moments in between."""
        if self._gate is not None:
            self._gate.begin()
        moment, outputs = self._met(fed, dict(facts), self._loss_terms)
        assert moment.terms is not None
        loss = _scalar(moment.terms.total())
        before = self._group_weight
        weight = self._join_group(fed, facts)
        if self._gate is not None:
            self._through_gate(self._gate, moment.terms, loss, weight, before)
        elif not self._guard.watch_loss(loss):
            self._diagnose(list(self._group)[-1:])
        elif loss.requires_grad:
            self._backward_terms(moment.terms, loss, weight)
        for meet in self._companions.after_backward:
            meet(moment)
        return loss, outputs

    def _met(self, fed: Fed, facts: dict[str, Any], loss: LossCall) -> tuple[Moment, Any]:
        """Run model and loss with the companions' moments; also return the outputs as the model gave them."""
        moment = Moment(self.model, fed, facts)
        for meet in self._companions.before_forward:
            meet(moment)
        outputs = moment.outputs = self._forward(fed.inputs)
        for meet in self._companions.after_forward:
            meet(moment)
        moment.terms = self._terms(loss(moment.outputs, fed, moment.facts))
        for meet in self._companions.after_loss:
            meet(moment)
        return moment, outputs

    def _backward_terms(self, terms: LossTerms, loss: Tensor, weight: float) -> None:
        factor = self._companions.auxiliary_factor
        if factor is None or not terms.auxiliaries:
            self._backward(loss, weight)
            return
        seed = torch.full_like(loss, weight)
        if self.scaler is not None:
            seed = self.scaler.scale(seed)
        backward_apart(terms, self._parameters, seed, factor)

    def _through_gate(
        self, gate: MicroBatchGate, terms: LossTerms, loss: Tensor, weight: float, weight_before: float
    ) -> None:
        """The backward pass where a bad micro-batch is left out of its group; see `MicroBatchGate`."""
        assert self._watch is not None
        if not loss.requires_grad:
            return
        good = gate.join(loss, self._parameters, lambda: self._backward_terms(terms, loss, weight), weight)
        if good is None:
            return
        if not good:
            self._group_weight = weight_before
            self._diagnose(list(self._group)[-1:])
        in_a_row = self._watch.note(not good)
        dropped = gate.known_drops()
        if in_a_row:
            self._diverge(f"{self._watch.streak} micro-batches in a row had a non-finite loss or gradient")
        elif dropped > self.config.nonfinite_budget:
            self._diverge(f"{dropped} micro-batches had a non-finite loss or gradient")

    def _terms(self, loss: Any) -> LossTerms:
        if isinstance(loss, LossTerms):
            return loss
        if self._companions.needs_terms:
            asking = next(item for item in self._companions.members if getattr(item, "needs_terms", False))
            raise ValueError(
                "loss_fn must return scm.losses.terms.LossTerms(task, auxiliaries), or have a method terms "
                f"that does, because {type(asking).__name__} needs the terms apart, got {type(loss).__name__}"
            )
        return LossTerms(_scalar(loss))

    def _join_group(self, fed: Fed, facts: dict[str, Any]) -> float:
        """Count the micro-batch into the group under way; return what it weighs there."""
        if self._guard.waits and not self.nan_origin:  # else nobody looks at them
            self._group.append((fed, dict(facts)))
        by_rows = self.config.accumulation_weighting == "samples"
        self._group_rows = self._group_rows or fed.rows
        # Relative to the first micro-batch, so that groups of equal ones are plain sums, as without weights.
        weight = fed.rows / self._group_rows if by_rows else 1.0
        self._group_weight += weight
        self._group_count += 1
        return weight

    def _backward(self, loss: Tensor, weight: float) -> None:
        if self.scaler is not None:
            self.scaler.scale(loss * weight).backward()
        elif weight == 1.0:
            loss.backward()
        else:
            loss.backward(gradient=torch.full_like(loss, weight))

    def _forward(self, inputs: Any) -> Any:
        """Run the model; under mixed precision it alone runs in half, and its outputs are widened."""
        if self.amp_dtype is None:
            return self.model(inputs)
        with torch.autocast(self.device.type, dtype=self.amp_dtype):
            outputs = self.model(inputs)
        return _widened(outputs)

    def _step(self) -> bool | None:
        """End the group: take its optimizer step, or refuse it. None: only the device knows."""
        # Besides bad steps, those at a scale that was too large and groups that were left out are not taken.
        bad_before = -1 if self.scaler is None and self._gate is None else self._guard.known_skips()
        weight = self._group_weight if self._gate is None else self._gate.end_group(self._group_weight)
        left_out = not isinstance(weight, Tensor) and weight == 0.0
        taken = False if left_out else self._guard.step(self._parameters, weight)
        bad = taken is False and self._guard.known_skips() > bad_before
        if bad:
            self._diagnose(self._group)
        self._group.clear()
        self._clear_gradients()
        self._group_count, self._group_rows, self._group_weight = 0, 0, 0.0
        if taken is not False:
            self.optimizer_steps += 1
            if self.config.scheduler_cadence == "per_optimizer_update" and self.scheduler is not None:
                self.scheduler.step()
        elif bad and self._guard.known_skips() > self.config.nonfinite_budget:
            self._diverge(f"{self._guard.known_skips()} steps had a non-finite loss or gradient")
        if self._watch is not None:
            self._after_watched_step(self._watch, taken, bad)
        return taken

    def _after_watched_step(self, watch: FiniteWatch, taken: bool | None, bad: bool) -> None:
        watch.skipped_steps += taken is False
        if self._gate is not None or (taken is False and not bad):
            return
        if not watch.note(bad):
            return
        if watch.snapshot is not None:
            watch.roll_back()
        elif self.status == "running":
            steps = f"{watch.streak} steps in a row" if watch.streak > 1 else "a step"
            self._diverge(f"{steps} had a non-finite loss or gradient")

    def _diagnose(self, group: Iterable[tuple[Fed, dict[str, Any]]]) -> None:
        """Say once where the first non-finite loss or gradient came from, and leave no trace of looking."""
        if self.nan_origin:
            return
        terms = LossCall(in_terms(self._loss.function))
        policy = self.config.gradient_policy
        states = {name: copy.deepcopy(held.state_dict()) for name, held in self.controllers.items()}
        with unmoved_random_state(self.device), untouched(self.model, self.device):
            for fed, facts in group:

                def again(fed: Fed = fed, facts: dict[str, Any] = facts) -> LossTerms:
                    moment, _ = self._met(fed, dict(facts), terms)
                    assert moment.terms is not None
                    return moment.terms

                with (
                    nullcontext()
                    if policy is None
                    else gradient_policy(GradientPolicy(policy), tau=facts["tau"])
                ):
                    origin = find_origin(self.model, again)
                self.nan_origin = f"micro-batch {facts['global_step']}: {origin}"
                if origin.kind != "unknown":
                    break
        for name, held in self.controllers.items():
            held.load_state_dict(states[name])

    def _after_batch(self, epoch: int, *, refused: bool) -> None:
        by_batch = self.config.scheduler_cadence == "per_batch" and self.optimizer_steps and not refused
        if self.scheduler is not None and by_batch:
            self.scheduler.step()
        hook = self.config.log_hook
        if hook is not None and self.global_step % self.config.log_interval == 0:
            self._log(self._records.last(), phase="train", epoch=epoch)

    def _log(self, metrics: dict[str, float], *, phase: str, epoch: int) -> None:
        assert self.config.log_hook is not None
        self.config.log_hook(metric_log_record(metrics, phase=phase, step=self.global_step, epoch=epoch))

    def _all_parameters(self) -> Iterator[Tensor]:
        for group in self.optimizer.param_groups:
            yield from group["params"]

    def _clear_gradients(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    # --- the end of an epoch ------------------------------------------------------------------------

    def _count_epoch(self) -> None:
        counted = counts_of(self._epoch_table)
        self.nan_counts["loss"] += counted["loss"]
        self.nan_counts["output"] += counted["output"]
        self.nan_counts["gradient"] = self._guard.skips()["gradient"]
        if self._gate is not None:
            self.nan_counts["gradient"] += self._gate.drops()["gradient"]
        state = [*self.model.parameters(), *self.model.buffers()]
        self.nan_counts["parameter"] = count_non_finite(item for item in state if item.is_floating_point())
        if self.nan_counts["parameter"] and not self.nan_origin:
            named = (*self.model.named_parameters(), *self.model.named_buffers())
            bad = next(name for name, item in named if not torch.isfinite(item.detach()).all())
            self.nan_origin = f"parameter {bad}, after micro-batch {self.global_step}"

    def _learning_rate(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    def validate(self) -> dict[str, float] | None:
        """Return the metrics on `val_loader`, decoded strictly at tau_infer; None without one or rows in it.

        The random states are left as they were, so that looking does not change the training.
        """
        if self.config.val_loader is None:
            return None
        facts = {**(self._epoch_facts or self._facts(self.current_epoch)), "tau": self._tau_mid}
        facts["global_step"] = self.global_step
        with unmoved_random_state(self.device):
            found = validate_model(
                self.model,
                self._loss,
                self._feeder,
                self.config.val_loader,
                known=facts,
                tau_infer=self.config.tau_infer,
                forward=self._forward,
                reducers=self.metric_reducers,
            )
        if found is None:
            return None
        metrics, faults = found
        self.nan_counts["output"] += faults
        val = {f"val_{name}": value for name, value in metrics.items()}
        val["epoch"] = float(self.current_epoch)
        return val

    def _judge(self, epoch: int, train: dict[str, float], val: dict[str, float] | None) -> None:
        """Note the best epoch, and end the training if it has diverged or covers too little for too long."""
        skipped = sum(self._guard.skips().values())
        unit = "steps"
        if self._gate is not None:
            skipped, unit = skipped + sum(self._gate.drops().values()), "micro-batches"
        if skipped and not self.nan_origin:
            # Where they came from cannot be seen afterwards: the next one is looked at when it comes.
            self._guard.wait_from_now_on()
            if self._watch is not None:
                self._watch.wait_from_now_on()
        if self.nan_counts["parameter"]:
            self._diverge(f"{self.nan_counts['parameter']} parameters are not finite")
        elif self.status == "running" and skipped > self.config.nonfinite_budget:
            self._diverge(f"{skipped} {unit} had a non-finite loss or gradient")
        if val is not None:
            self.val_history.append(val)
            if val["val_loss"] < self.best_val_loss:
                self.best_epoch, self.best_val_loss = epoch, val["val_loss"]
                if self.config.restore_best:
                    self._best_state = _copied(self.model.state_dict())
        coverage = train["coverage"] if val is None else val["val_coverage"]
        short = coverage < self.config.coverage_threshold
        self._coverage_bad_epochs = self._coverage_bad_epochs + 1 if short else 0
        if self.status == "running" and self._coverage_bad_epochs >= self.config.coverage_patience:
            self.status = "stopped"
            self.stop_reason = (
                f"coverage below {self.config.coverage_threshold} for {self._coverage_bad_epochs} epochs"
            )

    def _diverge(self, reason: str) -> None:
        self.status, self.stop_reason = "diverged", reason

    def _restore_best(self) -> None:
        if self.config.restore_best and self._best_state is not None:
            self._last_state = _copied(self.model.state_dict())
            self.model.load_state_dict(self._best_state)

    # --- what callers ask ---------------------------------------------------------------------------

    @property
    def best_metric(self) -> float | None:
        """The highest validated coverage so far; None before the first validation."""
        return max((val["val_coverage"] for val in self.val_history), default=None)

    @property
    def step_time_ms(self) -> float:
        """The median time of one optimizer step after warm-up, in ms (see `StepClock`); nan before any."""
        return self._clock.step_time_ms

    def telemetry(self) -> dict[str, float]:
        """What companions say of themselves, by their own names; may wait for the device."""
        return self._companions.telemetry()

    def save_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Write everything that going on needs, atomically; from `log_hook` also, in mid-epoch."""
        write_checkpoint(path, trainer_state(self))

    def load_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Take up the training that `path` holds: what follows equals what would have followed there.

        Nothing is changed unless all of it fits. Raises FileNotFoundError, or CheckpointError when the file
        is damaged, of another kind, model or optimizer, or of another config, naming the fields that differ;
        `max_epochs` may be another one.
        """
        put_trainer_state(self, read_checkpoint(path, map_location="cpu"))

    def load_model_state(self, path: str | os.PathLike[str]) -> None:
        """Take the model's weights alone from a checkpoint."""
        load_model_weights(self.model, read_checkpoint(path, map_location="cpu"))


def _scalar(loss: Any) -> Tensor:
    """Return what is trained of what a loss function returned; raises unless that is a scalar."""
    if not isinstance(loss, Tensor):
        if not isinstance(loss, LossTerms):
            raise TypeError(f"loss_fn must return a scalar tensor or LossTerms, got {type(loss).__name__}")
        loss = loss.total()
    if loss.ndim:
        raise ValueError(f"loss_fn must return a scalar, got shape {tuple(loss.shape)}")
    return loss


def _widened(outputs: Any) -> Any:
    if isinstance(outputs, Tensor):
        return outputs.float() if outputs.dtype in (torch.float16, torch.bfloat16) else outputs
    if isinstance(outputs, (tuple, list)):
        return tuple(_widened(item) for item in outputs)
    if isinstance(outputs, dict):
        return {name: _widened(item) for name, item in outputs.items()}
    return outputs


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    return {name: item.detach().clone() if isinstance(item, Tensor) else item for name, item in state.items()}
