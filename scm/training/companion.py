"""What goes along with a training: controllers, schedules, guards and their telemetry, at fixed moments.

A companion is any object with some of the methods of `Companion`; the trainer calls those that it has, in the
order in which the companions were given. The loop itself is decided in `trainer`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from torch import nn

from scm.losses.terms import LossTerms

if TYPE_CHECKING:
    from scm.training.feed import Fed
    from scm.training.records import EpochReport


@dataclass
class Moment:
    """One micro-batch under way; a companion may replace `outputs`, the entries of `facts`, and `terms`.

    facts: what a loss function is told by name (tau, epoch, global_step, loss_weights, and what companions
    add). outputs: as the model gave them, (P, Q) or (P, Q, named tensors); None before the forward pass.
    terms: the loss in its parts; None before the loss is computed.
    """

    model: nn.Module
    fed: Fed
    facts: dict[str, Any]
    outputs: Any = None
    terms: LossTerms | None = None
    found: dict[str, Any] = field(default_factory=dict)  # what companions tell one another


class Companion(Protocol):
    """All that a companion may have; none of it is required."""

    def begin_epoch(self, epoch: int, facts: dict[str, Any]) -> None:
        """Look at or change the facts of the epoch that begins."""

    def before_forward(self, moment: Moment) -> None:
        """Look at or change the facts of the micro-batch."""

    def after_forward(self, moment: Moment) -> None:
        """Look at the raw outputs, or replace them by bounded ones."""

    def after_loss(self, moment: Moment) -> None:
        """Add terms to the loss, or scale those that are there."""

    def after_backward(self, moment: Moment) -> None:
        """Learn from the micro-batch; never waits for the device."""

    def after_epoch(self, report: EpochReport) -> None:
        """Learn from the epoch, validation included."""

    def telemetry(self) -> Mapping[str, float]:
        """Say by name what became of the training so far; asked once an epoch, may wait for the device."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return what going on needs, as tensors and plain values."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
