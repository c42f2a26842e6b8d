"""Gates that are sure."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from failures.measuring import (
    UNCHANGED,
    Case,
    Found,
    Setting,
    Target,
    largest_difference,
    number,
)
from scm.guards.bounds import saturation_penalty


def _raw(z: Tensor) -> Tensor:
    return z


def _squashed(z: Tensor) -> Tensor:
    return 6.0 * torch.tanh(z / 6.0)


def _train_gate(
    start: Tensor,
    squash: Callable[[Tensor], Tensor],
    penalise: Callable[[Tensor], Tensor],
    weight: float,
    *,
    learning_rate: float = 0.5,
    steps: int = 600,
) -> tuple[float, Tensor]:
    """Train gates towards the opposite of their signs; return the task's loss and what they became."""
    z = start.clone().requires_grad_()
    wanted = (start < 0).to(start.dtype)
    optimizer = torch.optim.Adam([z], lr=learning_rate)
    for _ in range(steps):
        task = (squash(z).sigmoid() - wanted).square().mean()
        loss = task + weight * saturation_penalty(penalise(z), 5.0) if weight else task
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    task = (squash(z).sigmoid() - wanted).square().mean()
    return number(task), z.detach()


def saturated_gates(setting: Setting) -> Found:
    """F6: stop logits where a sigmoid has no slope left, and a penalty before and behind a squash."""
    start = torch.tensor([-90.0, 80.0, -90.0, 80.0], device=setting.device)
    stuck, z = _train_gate(start, _raw, _raw, 0.0)
    recovered, guarded = _train_gate(start, _raw, _raw, 0.5)
    ordinary = 0.5 * start.sign()
    clean = [_train_gate(ordinary, _raw, _raw, weight, learning_rate=0.05, steps=60) for weight in (0.0, 0.5)]
    return Found(
        without_guard=stuck,
        reference_rule=_train_gate(start, _squashed, _squashed, 0.5)[0],
        with_guard=recovered,
        clean=clean[0][0],
        clean_with_guard=clean[1][0],
        clean_change=largest_difference([clean[0][1]], [clean[1][1]]),
        more={
            "largest_logit": float(z.abs().max()),
            "largest_logit_with_guard": float(guarded.abs().max()),
            "penalty_before_the_squash": _train_gate(start, _squashed, _raw, 0.5)[0],
        },
    )


CASES: tuple[Case, ...] = (
    Case(
        id="F6",
        trigger="stop logits of -90 and 80 that should be the opposite; 600 steps",
        mechanism="a sigmoid has no slope there, in float32 exactly none",
        measure="task loss",
        unit="",
        guard="saturation_penalty of the raw logits",
        reference="the penalty behind a squash 6 tanh(z / 6), which never leaves it",
        run=saturated_gates,
        targets=(
            Target("without_guard", ">=", 0.9),
            Target("reference_rule", ">=", 0.9),
            Target("with_guard", "<=", 0.01),
            Target("penalty_before_the_squash", "<=", 0.01),
            UNCHANGED,
        ),
    ),
)
