"""Training compared with what is held out."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from failures.measuring import (
    TOLERATED,
    UNCHANGED,
    Case,
    Found,
    Setting,
    Target,
    largest_difference,
    train_guarded,
)
from scm.guards.gap import GapWatch, normalised_entropy
from scm.seeding import generator
from scm.training.loader import TensorBatches
from scm.training.targets import lift_semantic_targets
from scm.training.trainer import SCMTrainer


class _Attends(nn.Module):
    """Attend to one of nine cells, with Gumbel noise in training mode, at a temperature."""

    def __init__(self, temperature: float, noise: float) -> None:
        super().__init__()
        self.temperature = temperature
        self.noise = noise
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.value = nn.Linear(9, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        scores = self.scale * x
        if self.training and self.noise:
            scores = scores - self.noise * torch.empty_like(scores).exponential_().log()
        attention = (scores / self.temperature).softmax(dim=-1)
        P, Q = self.value(attention * x).unbind(-1)
        return P, Q, {"attention": attention.view(-1, 1, 3, 3)}


def _largest_of_nine(setting: Setting, stream: str, rows: int = 256) -> TensorBatches:
    x = torch.rand((rows, 9), generator=generator(setting.seed, stream)).to(setting.device)
    targets = lift_semantic_targets(x.amax(1), torch.zeros(rows, dtype=torch.int64, device=x.device))
    return TensorBatches(x, targets, 32, generator=generator(setting.seed, "order"))


def _fit_of_pairs(outputs: Any, lifted: tuple[Tensor, Tensor]) -> Tensor:
    return (outputs[0] - lifted[0]).square().mean() + (outputs[1] - 1.0).square().mean()


def _train_attention(
    setting: Setting, temperature: float, noise: float, *, watch: bool = True
) -> tuple[SCMTrainer, float]:
    """Train for two epochs; return the trainer and the ratio of entropies, held-out mode to training mode."""
    model = setting.make(lambda: _Attends(temperature, noise))
    train, held_out = _largest_of_nine(setting, "train"), _largest_of_nine(setting, "held out")
    watching = [GapWatch(model, train, held_out)] if watch else []
    trainer = train_guarded(model, _fit_of_pairs, train, setting, companions=watching, max_epochs=2)
    entropies = []
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(setting.seed)
        for training in (False, True):
            model.train(training)
            attention = model(train.inputs)[2]["attention"]
            entropies.append(float(normalised_entropy(attention, axes=2).mean()))
    return trainer, entropies[0] / entropies[1]


def noise_in_training_mode(setting: Setting) -> Found:
    """F7: attention that is sampled in training and not when it is asked."""
    temperatures = (1.0, 0.5, 0.1, 0.05)
    noisy = {t: _train_attention(setting, t, 1.0) for t in temperatures}
    quiet = {t: _train_attention(setting, t, 0.0) for t in temperatures}
    unwatched, ratio = _train_attention(setting, 0.1, 0.0, watch=False)
    watched = quiet[0.1][0]
    return Found(
        without_guard=noisy[0.1][1],
        with_guard=quiet[0.1][1],
        clean=ratio,
        clean_with_guard=quiet[0.1][1],
        clean_change=largest_difference(unwatched.model.parameters(), watched.model.parameters()),
        more={
            **{f"ratio_at_temperature_{t:g}": found[1] for t, found in noisy.items()},
            "largest_ratio_without_noise": max(found[1] for found in quiet.values()),
            "gap_entropy_mode": noisy[0.1][0].telemetry()["gap_entropy_mode"],
            "gap_entropy_mode_without_noise": watched.telemetry()["gap_entropy_mode"],
        },
    )


def _reference_entropy(weights: Tensor) -> Tensor:
    """The published measure: every weight counts as 1e-6 at least."""
    kept = weights.clamp(min=1e-6)
    return -(kept * kept.log()).sum()


def sharp_on_two_canvases(setting: Setting) -> Found:
    """F7b: the same attention, on all of one cell, on canvases of two sizes; and an ordinary one."""
    sharp = {side: torch.zeros(side, side, device=setting.device) for side in (3, 10, 30)}
    for canvas in sharp.values():
        canvas[1, 1] = 1.0
    ordinary = setting.normal(100).softmax(-1)
    published = {side: float(_reference_entropy(canvas)) for side, canvas in sharp.items()}
    ours = {side: float(normalised_entropy(canvas, axes=2)) for side, canvas in sharp.items()}
    clean = float(_reference_entropy(ordinary)) / math.log(100)
    guarded = float(normalised_entropy(ordinary))
    return Found(
        without_guard=published[30] / published[10],
        with_guard=ours[30] - ours[10],
        clean=clean,
        clean_with_guard=guarded,
        clean_change=abs(clean - guarded),
        more={"ratio_30_to_3": published[30] / published[3], "difference_30_to_3": ours[30] - ours[3]},
    )


CASES: tuple[Case, ...] = (
    Case(
        id="F7",
        trigger="Gumbel noise on attention in training mode alone, temperature 0.1",
        mechanism="attention is sampled in training and not when it is asked",
        measure="entropy in eval mode / in training mode",
        unit="",
        guard="no noise; GapWatch names the part that the mode makes (gap_entropy_mode)",
        run=noise_in_training_mode,
        targets=(
            Target("without_guard", ">=", 2.0),
            Target("gap_entropy_mode", ">=", 0.1),
            Target("with_guard", "==", 1.0),
            Target("largest_ratio_without_noise", "==", 1.0),
            Target("gap_entropy_mode_without_noise", "==", 0.0),
            UNCHANGED,
        ),
    ),
    Case(
        id="F7b",
        trigger="attention on one cell alone, on canvases of 10x10 and 30x30",
        mechanism="an entropy of weights of 1e-6 at least grows with the canvas: the gap is the measure's",
        measure="ratio without the guard, difference with it",
        unit="",
        guard="normalised_entropy, compared as a difference",
        clean_measure="normalised entropy of ordinary attention",
        run=sharp_on_two_canvases,
        targets=(
            Target("without_guard", ">=", 9.0),
            Target("with_guard", "==", 0.0),
            Target("difference_30_to_3", "==", 0.0),
            TOLERATED,
        ),
    ),
)
