"""The companions that a pack can take along: those whose state is tensors, carried from step to step.

They are the very objects of `scm.guards`: made anew in each traced step, given the state of the step before,
and asked for it afterwards. Coverage control, whose object counts in plain numbers, is in `control`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scm.guards.budget import BudgetGuard
from scm.guards.range import RangeGuard, SaturationGuard
from scm.guards.spread import SpreadGuard, projective_residual
from scm.trial_config import TrialConfig

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Carried:
    """A kind of companion, and its state as tensors by name: float64, and zeros before any step.

    new: makes one from a config whose numbers may be tensors. nest: the companion's own `state_dict` of the
    tensors and of the number of steps in the epoch; flatten: the tensors of its `state_dict`. fresh: what
    begins anew with each epoch.
    """

    name: str
    is_on: Callable[[TrialConfig], bool]
    new: Callable[[Any], Any]
    zeros: Mapping[str, tuple[int, ...]]
    nest: Callable[[State, int], dict[str, Any]]
    flatten: Callable[[Mapping[str, Any]], dict[str, Tensor]]
    fresh: tuple[str, ...]

    def make(self, config: Any, held: Mapping[str, Tensor]) -> Any:
        """Make the companion of one trial in the state that `held` has of it."""
        companion = self.new(config)
        companion.load_state_dict(self.nest(self.own(held), 0))
        return companion

    def own(self, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return this companion's part of all that is carried."""
        return {name: held[f"carried.{self.name}.{name}"] for name in self.zeros}

    def read(self, companion: Any) -> dict[str, Tensor]:
        """Return the state of a companion after a step."""
        return self.flatten(companion.state_dict())

    def telemetry(self, config: TrialConfig, state: State, steps: int) -> dict[str, float]:
        """Return what the companion of one trial says, in this state, after so many steps of the epoch."""
        companion = self.new(config)
        if steps:
            companion.load_state_dict(self.nest(state, steps))
        return dict(companion.telemetry())

    def first(self) -> dict[str, Tensor]:
        """Return the state of one trial before any step, by the names of a traced step."""
        return {
            f"carried.{self.name}.{name}": torch.zeros(shape, dtype=torch.float64)
            for name, shape in self.zeros.items()
        }


def _saturation(config: Any) -> SaturationGuard:
    soft = config.coverage_term != "hard"
    temperature = config.coverage_temperature if soft else TrialConfig().coverage_temperature
    return SaturationGuard(config.lambda_saturation, config.saturation_threshold, temperature=temperature)


def _budget(config: Any) -> BudgetGuard:
    names = ("margin", "sign", "push_down", "push_up", "saturation", "spread")
    weights = {name: getattr(config, f"lambda_{name}") for name in names}
    weights["rejection"] = config.lambda_rej
    floor = 0.0 if config.cap_currency == "reference" else config.cap_floor
    return BudgetGuard(config.cap_ratio, currency=config.cap_currency, floor=floor, weights=weights)


def _numbers(state: State, steps: int) -> dict[str, Any]:
    return {"numbers": state["numbers"]}


CARRIED: tuple[Carried, ...] = (
    Carried(
        name="range",
        is_on=lambda config: config.output_bound is not None,
        new=lambda config: RangeGuard(config.output_bound, config.output_bound_form),
        zeros={"numbers": (3,)},
        nest=_numbers,
        flatten=dict,
        fresh=("numbers",),
    ),
    Carried(
        name="saturation",
        is_on=lambda config: config.lambda_saturation > 0,
        new=_saturation,
        zeros={"numbers": (3,)},
        nest=_numbers,
        flatten=dict,
        fresh=("numbers",),
    ),
    Carried(
        name="spread",
        is_on=lambda config: config.lambda_spread > 0,
        new=lambda config: SpreadGuard(
            config.lambda_spread, config.target_spread, difficulty=projective_residual
        ),
        zeros={"held": (2,), "terms": (), "moments": (6,)},
        nest=lambda state, steps: {
            "running": {"held": state["held"]},
            "batches": steps,
            "terms": state["terms"],
            "moments": state["moments"],
        },
        flatten=lambda state: {
            "held": state["running"]["held"],
            "terms": state["terms"],
            "moments": state["moments"],
        },
        fresh=("terms", "moments"),
    ),
    Carried(
        name="budget",
        is_on=lambda config: config.cap_ratio is not None,
        new=_budget,
        zeros={"sums": (5,), "counts": (2,)},
        nest=lambda state, steps: {"sums": state["sums"], "counts": state["counts"]},
        flatten=dict,
        fresh=("sums",),
    ),
)
"""In the order in which `scm.trial.make_companions` calls them."""
