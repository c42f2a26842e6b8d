"""Monitors behind a clamp."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from failures.measuring import (
    UNCHANGED,
    Case,
    Found,
    Setting,
    Target,
    largest_difference,
    train_guarded,
)
from scm.guards.range import RangeGuard
from scm.training.trainer import SCMTrainer


class _Scaled(nn.Module):
    """A large or small multiple of a bent line."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.line = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * torch.tanh(self.line(x)).squeeze(-1)


def _monitored(setting: Setting, scale: float, *, guard: bool) -> tuple[SCMTrainer, float]:
    """Train one epoch with a bound of 1; return the trainer, and what a monitor within the loss saw."""
    seen = 0.0

    def loss(outputs: Tensor, lifted: tuple[Tensor, Tensor]) -> Tensor:
        nonlocal seen
        seen = max(seen, float(outputs.detach().abs().max()))
        return (outputs - lifted[0]).square().mean()

    rows = setting.normal(256, 4)
    labels = 0.1 * rows[:, 0].tanh()
    batches = list(zip(rows.split(32), labels.split(32), strict=True))
    watching = [RangeGuard(1.0, "soft")] if guard else []
    model = setting.make(lambda: _Scaled(scale))
    return train_guarded(model, loss, batches, setting, companions=watching), seen


def monitor_behind_a_clamp(setting: Setting) -> Found:
    """F9: the same training watched behind the bound and before it."""
    trainer, behind = _monitored(setting, 100.0, guard=True)
    clean, clean_seen = _monitored(setting, 0.4, guard=False)  # below the knee of the bound
    guarded, _ = _monitored(setting, 0.4, guard=True)
    return Found(
        without_guard=behind,
        with_guard=trainer.telemetry()["range_max_abs"],
        clean=clean_seen,
        clean_with_guard=guarded.telemetry()["range_max_abs"],
        clean_change=largest_difference(clean.model.parameters(), guarded.model.parameters()),
        more={"share_of_values_beyond": trainer.telemetry()["range_over_share"]},
    )


CASES: tuple[Case, ...] = (
    Case(
        id="F9",
        trigger="outputs of about 100, bounded to 1 for the loss, and a monitor",
        mechanism="a monitor behind a bound sees the bound",
        measure="largest value that the monitor saw",
        unit="",
        guard="RangeGuard, which measures before it bounds",
        run=monitor_behind_a_clamp,
        targets=(
            Target("without_guard", "<=", 1.0),
            Target("with_guard", ">=", 10.0),
            UNCHANGED,
        ),
    ),
)
