"""Loss weights as functions of the epoch. What a weight multiplies is decided by the loss."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class LinearRamp:
    """A value that is `start_value` up to `start_epoch`, `end_value` from `end_epoch` on, linear between.

    Differs from zeroproofml 0.6.1: values that are not finite are a ValueError, not a nan weight.
    """

    start_value: float
    end_value: float
    start_epoch: int = 0
    end_epoch: int = 1

    def __post_init__(self) -> None:
        for name in ("start_value", "end_value"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} must be finite, got {getattr(self, name)!r}")
        if self.end_epoch < self.start_epoch:
            raise ValueError(
                f"end_epoch must be >= start_epoch={self.start_epoch}, got end_epoch={self.end_epoch}"
            )

    def value(self, epoch: int) -> float:
        """Return the value at a 0-based epoch, which may lie outside of the ramp."""
        if epoch <= self.start_epoch:
            return float(self.start_value)
        if epoch >= self.end_epoch:
            return float(self.end_value)
        share = (epoch - self.start_epoch) / (self.end_epoch - self.start_epoch)
        return self.start_value + (self.end_value - self.start_value) * share


@dataclass(frozen=True)
class LossWeightsCurriculum:
    """Ramps by the name of the weight that they set."""

    ramps: Mapping[str, LinearRamp]

    def __post_init__(self) -> None:
        for name, ramp in self.ramps.items():
            if not isinstance(name, str) or not name:
                raise ValueError(f"ramps must be named by non-empty str, got {name!r}")
            if not isinstance(ramp, LinearRamp):
                raise TypeError(f"ramps[{name!r}] must be a LinearRamp, got {type(ramp).__name__}")
        object.__setattr__(self, "ramps", dict(self.ramps))

    def weights(self, epoch: int, base: Mapping[str, float] | None = None) -> dict[str, float]:
        """Return the weights at a 0-based epoch: a copy of `base`, in which the ramps override by name."""
        return {**(base or {}), **{name: ramp.value(epoch) for name, ramp in self.ramps.items()}}
