"""When the schedule of the learning rate moves at the end of an epoch, and which schedules never would."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch.optim.lr_scheduler import ReduceLROnPlateau


def usable_scheduler(scheduler: Any | None, cadence: str, *, validates: bool) -> Any | None:
    """Return the scheduler, or None, with a RuntimeWarning, for one that could never be stepped.

    A `ReduceLROnPlateau` needs what a validation says, so the cadence "per_validation_metric"; that cadence
    needs a validation, else ValueError.
    """
    if isinstance(scheduler, ReduceLROnPlateau) and cadence != "per_validation_metric":
        warnings.warn(
            f"ReduceLROnPlateau is stepped per_validation_metric only, not {cadence}; it is left out",
            RuntimeWarning,
            stacklevel=3,
        )
        return None
    if cadence == "per_validation_metric" and scheduler is not None and not validates:
        raise ValueError("scheduler_cadence='per_validation_metric' needs a val_loader")
    return scheduler


def step_after_epoch(scheduler: Any | None, cadence: str, val: Mapping[str, float] | None) -> None:
    """Step the scheduler if its cadence is an epoch, or a validation and there was one."""
    if scheduler is None:
        return
    if cadence == "per_epoch":
        scheduler.step()
    elif cadence == "per_validation_metric" and val is not None:
        if isinstance(scheduler, ReduceLROnPlateau):
            # What it minimises is the loss; asked to maximise, it can only mean coverage.
            scheduler.step(val["val_loss" if scheduler.mode == "min" else "val_coverage"])
        else:
            scheduler.step()
