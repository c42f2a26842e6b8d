"""Interim: the objective of a projective head, as a loss function of the trainer."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def as_trainer_loss(loss_fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return `loss_fn` in the form in which the trainer calls it."""
    return loss_fn
