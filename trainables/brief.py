"""A training on few rows, and everything that it says: what tells two configs apart without a sweep.

Which configs are compared, and what a difference means, is decided in `harness.audit`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from scm.data import Split
from scm.guards.liveness import TermWatch
from scm.trial_config import TrialConfig
from trainables.tasks.protocol import Task
from trainables.trial import TrialRun, make_task_trainer

Splits = Mapping[str, Split]

# What a config says of itself, and what a clock says: neither shows that a knob acts.
_NO_EVIDENCE = frozenset({"target_coverage", "lr", "step_time_ms", "duration_s", "epoch"})
_TELEMETRY = "telemetry."


@dataclass(frozen=True)
class Evidence:
    """What one brief training left: how it ended, what it measured epoch by epoch, and its telemetry."""

    status: str
    stop_reason: str
    error: str
    numbers: Mapping[str, float]
    telemetry: Mapping[str, float]

    def differs(self, other: Evidence, tolerance: float) -> bool:
        """Whether the trainings ended otherwise, or measured anything that differs beyond `tolerance`."""
        ended = (self.status, self.stop_reason, self.error) != (other.status, other.stop_reason, other.error)
        return ended or _apart(self.numbers, other.numbers, tolerance)

    def tells_other(self, other: Evidence, tolerance: float) -> bool:
        """Whether the telemetry differs."""
        return _apart(self.telemetry, other.telemetry, tolerance)


def train_briefly(task: Task, config: Mapping[str, Any], seed: int, splits: Splits) -> Evidence:
    """Train one config on the given splits to its end, on the CPU; a training that fails is evidence too."""
    run = TrialRun(task, config, seed, splits=splits)
    numbers: dict[str, float] = {}
    while not run.done:
        said = run.step()
        numbers |= {f"{name}@{said['epoch']}": float(value) for name, value in _kept(said).items()}
    outcome = run.outcome()
    for name, value in _kept(outcome).items():
        if isinstance(value, (int, float)):
            numbers[name] = float(value)
    telemetry = {
        name: float(value)
        for name, value in outcome.items()
        if name.startswith(_TELEMETRY) and value is not None
    }
    return Evidence(outcome["status"], outcome["stop_reason"], outcome["error"], numbers, telemetry)


def watch_terms(task: Task, config: Mapping[str, Any], seed: int, splits: Splits) -> dict[str, str]:
    """Train one config; return the weighted terms of its loss, with why where one did nothing in any step.

    Raises whatever the task or the training raises. Of a loss of the task's own that does not give its terms,
    only the whole is seen, and the terms that guards add.
    """
    settings = TrialConfig.from_flat(config)
    loss = task.make_loss(settings)
    steps = settings.max_epochs * -(-len(splits["train"]) // settings.batch_size)
    watch = TermWatch(max(1, steps - 1), needs_terms=loss is None or hasattr(loss, "terms"))
    make_task_trainer(task, settings, seed, splits["train"], None, companions=[watch]).fit()
    return watch.told()


def brief_splits(splits: Splits, rows: int, seed: int) -> dict[str, Split]:
    """At most `rows` rows of each split, drawn with the seed and in their order; bottoms stay among them."""
    return {name: _few(split, rows, seed) for name, split in splits.items()}


def poisoned_splits(splits: Splits) -> dict[str, Split]:
    """The splits with every fifth training row's inputs NaN; ValueError for inputs that are no floats."""
    train = splits["train"]
    if not train.inputs.is_floating_point():
        raise ValueError(f"inputs must be floating point to hold NaN, got {train.inputs.dtype}")
    inputs = train.inputs.clone()
    inputs[::5] = math.nan
    return {**splits, "train": Split(inputs, train.targets, train.extras)}


def _few(split: Split, rows: int, seed: int) -> Split:
    if len(split) <= rows:
        return split
    drawn = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))[:rows]
    kept = drawn.sort().values
    extras = {name: extra[kept] for name, extra in split.extras.items()}
    return Split(split.inputs[kept], split.targets.index(kept), extras)


def _kept(said: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value
        for name, value in said.items()
        if name not in _NO_EVIDENCE and not name.startswith(_TELEMETRY)
    }


def _apart(one: Mapping[str, float], other: Mapping[str, float], tolerance: float) -> bool:
    return one.keys() != other.keys() or any(
        _differ(value, other[name], tolerance) for name, value in one.items()
    )


def _differ(one: float, other: float, tolerance: float) -> bool:
    if math.isnan(one) or math.isnan(other):
        return math.isnan(one) != math.isnan(other)
    return one != other and not abs(one - other) <= tolerance * max(abs(one), abs(other))
