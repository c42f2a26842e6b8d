"""Which trials of a plan go to a worker together, and whether that pays: a pure function of the plan.

What can be one model in the end is seen by the worker (`trainables.packed_trial`). Whether a trial is packed
or trained alone does not depend on what is ready or where it runs: alone, sums are rounded otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import numpy as np

from harness.jobs import Packing, TrialSpec
from harness.plan import Plan, plan_space
from harness.proposals import full_config

# Per trial and step a pack takes a tenth of the time at 16 trials, and hardly less beyond 128, where it no
# longer fits into a core's cache; a GPU still gains there.
LARGEST_PACK = {"cpu": 128, "cuda": 1024}
# To trace a step takes a worker as long as a trial alone takes for about so many steps.
STEPS_THAT_PAY = 2000
_DRAWS = 256


def make_packing(plan: Plan, workers: int, rows: int) -> Packing:
    """How the trials of a plan are packed; `rows` are those of the training split.

    With `packs.size: auto`, a kind of trial is packed when its steps in the whole sweep, as far as the
    plan's space tells beforehand, are more than `STEPS_THAT_PAY`.
    """
    size = plan.packs.size
    if size == 1:
        return Packing(workers=workers)

    from trainables.packed_trial import pack_key

    def kind(spec: TrialSpec) -> Hashable:
        return pack_key(full_config(spec.config)[1] if spec.active is None else spec.active)

    if size != "auto":
        return Packing(size=size, workers=workers, key=kind)
    expected = ExpectedSteps(plan, rows, pack_key)
    device = "cuda" if plan.resources.gpus_per_trial else "cpu"

    def kind_that_pays(spec: TrialSpec) -> Hashable | None:
        key = kind(spec)
        return key if expected.of(key, spec.config) >= STEPS_THAT_PAY else None

    return Packing(size=LARGEST_PACK[device], workers=workers, key=kind_that_pays)


class ExpectedSteps:
    """How many steps the trials of each kind make in a sweep, told from draws of its space."""

    def __init__(self, plan: Plan, rows: int, key: Callable[[Mapping[str, Any]], Hashable]) -> None:
        self._plan = plan
        self._rows = rows
        self._trials = plan.search.configs * len(plan.seeds)
        self._drawn: dict[Hashable, float] = {}
        space = plan_space(plan)
        points = np.random.Generator(np.random.PCG64(0)).random((_DRAWS, len(space.dimensions)))
        for point in points.tolist():
            config, active = full_config({**plan.config, **space.sample(point)})
            kind = key(active)
            self._drawn[kind] = self._drawn.get(kind, 0.0) + self._steps(config) / _DRAWS

    def of(self, key: Hashable, config: Mapping[str, Any]) -> float:
        """The steps of all trials of a kind; `config` is one. A kind not drawn counts as half a draw."""
        drawn = self._drawn.get(key, 0.5 * self._steps(config) / _DRAWS)
        return self._trials * drawn

    def _steps(self, config: Mapping[str, Any]) -> float:
        """The optimizer steps of one trial, as far as halving lets the mean trial come."""
        try:
            group = config["batch_size"] * config["gradient_accumulation_steps"]
            return math.ceil(self._rows / group) * expected_epochs(self._plan, config["max_epochs"])
        except (KeyError, TypeError, ValueError, ZeroDivisionError):
            return 0.0  # a config that no training accepts


def expected_epochs(plan: Plan, max_epochs: int) -> float:
    """The epochs of a trial, in the mean over all that start.

    With rungs at 3 and 9 and eta 3, of 20 epochs 3 are everybody's, 6 a third's and 11 a ninth's.
    """
    if plan.halving is None:
        return float(max_epochs)
    epochs, share, begun = 0.0, 1.0, 0
    for rung in (*plan.halving.rungs, max_epochs):
        until = min(rung, max_epochs)
        epochs += share * (until - begun)
        share, begun = share / plan.halving.eta, until
    return epochs
