"""Values that are not finite, in inputs, outputs and backward passes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from failures.measuring import (
    UNCHANGED,
    Case,
    Found,
    Setting,
    Target,
    largest_difference,
    train_guarded,
)
from scm.training.config import TrainingConfig
from scm.training.trainer import SCMTrainer

_BATCHES, _ROWS = 64, 32
_POISONED = (5, 17, 30, 41, 56)
_Batch = tuple[Tensor, Tensor]


class _Radial(nn.Module):
    """Four scores from the inputs and their learned length, whose root has no slope at 0."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))
        self.body = nn.Sequential(nn.Linear(9, 32), nn.ReLU(), nn.Linear(32, 4))

    def forward(self, x: Tensor) -> Tensor:
        scaled = x * self.scale
        squared = scaled.square().sum(-1, keepdim=True)
        length = torch.where(squared > 0, squared.sqrt(), 0.0)
        scores: Tensor = self.body(torch.cat([scaled, length], dim=-1))
        return scores


def _make_scores() -> nn.Module:
    """Four scores from the inputs."""
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))


@dataclass(frozen=True, slots=True)
class _Problem:
    """Batches of four classes, of which some may be poisoned, and rows that are held out."""

    batches: list[_Batch]
    held_out: _Batch

    @classmethod
    def draw(cls, setting: Setting) -> _Problem:
        rows = setting.normal(_BATCHES * _ROWS + 1024, 8)
        labels = (rows @ setting.normal(8, 4, stream="classes")).argmax(1).float()
        count = _BATCHES * _ROWS
        batches = list(zip(rows[:count].split(_ROWS), labels[:count].split(_ROWS), strict=True))
        return cls(batches, (rows[count:], labels[count:]))

    def poisoned(self, values: Sequence[float]) -> list[_Batch]:
        """Put a value, in turn one of `values`, into all inputs of one row of five batches."""
        batches = list(self.batches)
        for number, place in enumerate(_POISONED):
            rows = batches[place][0].clone()
            rows[3] = values[number % len(values)]
            batches[place] = rows, batches[place][1]
        return batches

    def accuracy(self, model: nn.Module) -> float:
        rows, labels = self.held_out
        with torch.no_grad():
            return float((model(rows).argmax(1) == labels).float().mean())


def _class_loss(scores: Tensor, lifted: tuple[Tensor, Tensor]) -> Tensor:
    return functional.cross_entropy(scores, lifted[0].long())


def _sanitised_loss(scores: Tensor, lifted: tuple[Tensor, Tensor]) -> Tensor:
    """The published order of things: what is not finite becomes 0 before the loss."""
    return _class_loss(torch.where(scores.isfinite(), scores, 0.0), lifted)


def _bare(
    model: nn.Module, loss_fn: Callable[..., Tensor], batches: Sequence[_Batch], *, checks_loss: bool
) -> int:
    """Train in a plain loop, which may pass over losses that are not finite; return how many it did."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    passed_over = 0
    for rows, labels in batches:
        loss = loss_fn(model(rows), (labels, torch.ones_like(labels)))
        if checks_loss and not bool(loss.isfinite()):
            passed_over += 1
            continue
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return passed_over


def _poisoned_training(
    setting: Setting,
    build: Callable[[], nn.Module],
    loss_fn: Callable[..., Tensor],
    poison: Sequence[float],
    *,
    checks_loss: bool,
) -> Found:
    """Train on five poisoned batches of 64: in a plain loop, which may check its loss, and with the guard."""
    problem = _Problem.draw(setting)
    spoiled = problem.poisoned(poison)
    bare, clean = setting.make(build), setting.make(build)
    passed_over = _bare(bare, loss_fn, spoiled, checks_loss=checks_loss)
    _bare(clean, loss_fn, problem.batches, checks_loss=checks_loss)
    action = "skip_micro_batch"  # which also looks at the raw outputs
    guarded, clean_guarded = (
        train_guarded(setting.make(build), loss_fn, batches, setting, finite_action=action)
        for batches in (spoiled, problem.batches)
    )
    telemetry = guarded.telemetry()
    lost = sum(int((~item.isfinite()).sum()) for item in bare.parameters())
    return Found(
        without_guard=problem.accuracy(bare),
        with_guard=problem.accuracy(guarded.model),
        clean=problem.accuracy(clean),
        clean_with_guard=problem.accuracy(clean_guarded.model),
        clean_change=largest_difference(clean.parameters(), clean_guarded.model.parameters()),
        more={
            "lost_weights": float(lost),
            "lost_weights_with_guard": float(guarded.nan_counts["parameter"]),
            "passed_over": float(passed_over),
            "left_out_with_guard": telemetry["finite_bad_micro_batches"],
            "raw_outputs_seen": telemetry["finite_raw_output"],
        },
    )


def poisoned_batches(setting: Setting) -> Found:
    """F2: five batches of 64 hold a row that is not a number, or infinite."""
    return _poisoned_training(setting, _make_scores, _class_loss, (math.nan, math.inf), checks_loss=False)


def sanitised_logits(setting: Setting) -> Found:
    """F2b: the same behind a sanitiser, under which the loss looks healthy."""
    return _poisoned_training(setting, _make_scores, _sanitised_loss, (math.nan, math.inf), checks_loss=True)


def backward_only(setting: Setting) -> Found:
    """F2c: rows of zeros, whose length has a value and no slope."""
    return _poisoned_training(setting, _Radial, _class_loss, (0.0,), checks_loss=True)


_GROUP = 7
_BAD_OF_70 = (6, 20, 33, 45, 58)  # in half of the ten groups one micro-batch is bad, now late, now early


def _used(ledger: nn.Module) -> float:
    """How many micro-batches have moved their weight."""
    (weight,) = ledger.parameters()
    return float((weight != 0).sum())


class _Ledger(nn.Module):
    """One weight a micro-batch, which moves when the micro-batch is used."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(10 * _GROUP))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


def _sum_of_outputs(outputs: Tensor, lifted: tuple[Tensor, Tensor]) -> Tensor:
    return outputs.sum()


def _accumulated_by_the_reference(model: nn.Module, batches: Sequence[_Batch]) -> int:
    """The published loop: a loss that is not finite clears the window, whose end stays where it was."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    steps = 0
    for number, (rows, _) in enumerate(batches, 1):
        loss = model(rows).sum()
        if not bool(loss.isfinite()):
            optimizer.zero_grad()
            continue
        (loss / _GROUP).backward()
        if number % _GROUP == 0:
            optimizer.step()
            optimizer.zero_grad()
            steps += 1
    return steps


def accumulated(setting: Setting) -> Found:
    """F2d: what a bad micro-batch takes with it where seven make a step."""
    count = 10 * _GROUP
    marks = torch.eye(count, device=setting.device)
    batches = [(mark[None], torch.zeros(1, device=setting.device)) for mark in marks]
    spoiled = [
        (rows * math.nan, y) if place in _BAD_OF_70 else (rows, y) for place, (rows, y) in enumerate(batches)
    ]

    def trained(batches: Sequence[_Batch]) -> SCMTrainer:
        model = _Ledger().to(setting.device)
        config = TrainingConfig(
            gradient_accumulation_steps=_GROUP,
            finite_action="skip_micro_batch",
            coverage_threshold=0.0,
            device=setting.device,
        )
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        trainer = SCMTrainer(model, optimizer, _sum_of_outputs, batches, config=config)
        trainer.fit()
        return trainer

    bare, clean = _Ledger().to(setting.device), _Ledger().to(setting.device)
    steps = _accumulated_by_the_reference(bare, spoiled)
    _accumulated_by_the_reference(clean, batches)
    guarded, clean_guarded = trained(spoiled), trained(batches)
    return Found(
        without_guard=_used(bare),
        with_guard=_used(guarded.model),
        clean=_used(clean),
        clean_with_guard=_used(clean_guarded.model),
        clean_change=largest_difference(clean.parameters(), clean_guarded.model.parameters()),
        more={"steps": float(steps), "steps_with_guard": float(guarded.optimizer_steps)},
    )


_LEARNED = Target("with_guard", ">=", -0.02, beside="clean")
_LOST = (Target("without_guard", "<=", 0.35), Target("lost_weights", ">", 0.0))
_KEPT = (_LEARNED, Target("lost_weights_with_guard", "==", 0.0), Target("left_out_with_guard", "==", 5.0))

CASES: tuple[Case, ...] = (
    Case(
        id="F2",
        trigger="five batches of 64 with a row of NaN or infinities",
        mechanism="one step on a gradient that is not finite, and every weight is NaN",
        measure="accuracy on held-out rows",
        unit="share of rows",
        guard="SCMTrainer: loss and gradients are looked at before a step",
        run=poisoned_batches,
        targets=(*_LOST, *_KEPT, UNCHANGED),
    ),
    Case(
        id="F2b",
        trigger="F2, with logits that are not finite replaced by 0, and a check of the loss",
        mechanism="the loss is finite, the gradient is not: the check passes over nothing",
        measure="accuracy on held-out rows",
        unit="share of rows",
        guard="SCMTrainer, which looks at gradients, and at outputs as the model gave them",
        run=sanitised_logits,
        targets=(
            Target("passed_over", "==", 0.0),
            *_LOST,
            *_KEPT,
            Target("raw_outputs_seen", "==", 5.0),
            UNCHANGED,
        ),
    ),
    Case(
        id="F2c",
        trigger="five batches of 64 with a row of zeros under a root, and a check of the loss",
        mechanism="the root has a value at 0 and no slope; the check sees only the batches after the damage",
        measure="accuracy on held-out rows",
        unit="share of rows",
        guard="SCMTrainer, which looks at gradients",
        run=backward_only,
        targets=(Target("passed_over", "==", 58.0), *_LOST, *_KEPT, UNCHANGED),
    ),
    Case(
        id="F2d",
        trigger="five bad micro-batches of 70, seven to a step",
        mechanism="a bad one clears what its window had gathered, and the window ends where it would have",
        measure="good micro-batches that moved a weight",
        unit="of 65",
        guard="SCMTrainer(finite_action='skip_micro_batch')",
        clean_measure="of 70 good ones",
        run=accumulated,
        targets=(
            Target("without_guard", "==", 43.0),
            Target("with_guard", "==", 65.0),
            Target("steps_with_guard", "==", 10.0),
            UNCHANGED,
        ),
    ),
)
