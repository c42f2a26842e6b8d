"""The step time of a config alone, for trials that were trained in a pack: its parts, and their times."""

from __future__ import annotations

import time
from collections.abc import Hashable
from dataclasses import replace
from statistics import median

import torch

from scm.data import Split
from scm.packed.eligibility import IN_LOSS
from scm.packed.lanes import Entrant
from scm.training.bench import WARM_UP_STEPS
from scm.training.companion import Moment
from scm.trial_config import TrialConfig
from trainables.scoring import NAN
from trainables.tasks.protocol import Task
from trainables.trial import make_task_trainer

# Steps of a brief training alone, the first of which warm up.
TIMED_STEPS = 18


def step_parts(entrant: Entrant, device: str) -> tuple[Hashable, Hashable]:
    """Return what the two parts of a training step consist of: forward and backward pass, optimizer's step.

    On a GPU, where the one runs while the other is launched, the first is the whole and the second nothing.
    """
    config = entrant.trial.config
    place = (device, torch.get_num_threads())
    weights = tuple((item.shape, item.dtype) for item in entrant.model.parameters())
    optimizer = (config.optimizer, config.momentum == 0, config.clip_norm is None, weights)
    idle = tuple(name for name in sorted(IN_LOSS) if getattr(config, name) == 0)
    passes = (entrant.signature, config.gradient_policy is None, idle)
    if device.startswith("cuda"):
        return (place, passes, optimizer), ()
    return (place, passes), (place, optimizer)


def time_parts(task: Task, config: TrialConfig, seed: int, train: Split, device: str) -> tuple[float, float]:
    """Return the times of the two parts of a step of `step_parts`, in ms, from a brief training.

    It is the training of the config, cut short, and leaves nothing behind. NaN where it raises.
    """
    group = config.batch_size * config.gradient_accumulation_steps
    rows = torch.arange(min(len(train), group * TIMED_STEPS))
    few = Split(
        train.inputs[rows],
        train.targets.index(rows),
        {name: extra[rows] for name, extra in train.extras.items()},
    )
    steps = -(-len(rows) // group)
    brief = replace(
        config,
        max_epochs=-(-TIMED_STEPS // steps),
        coverage_threshold=0.0,
        restore_best=False,
        nonfinite_budget=TIMED_STEPS,
    )
    clock = _PassClock()
    try:
        trainer = make_task_trainer(task, brief, seed, few, None, device=device, companions=[clock])
        for _ in trainer.epochs():
            pass
    except Exception:  # of a task's own model or loss; the trial itself has ended well, and is kept
        return NAN, NAN
    step_ms = trainer.step_time_ms
    if device.startswith("cuda"):
        return step_ms, 0.0
    passes_ms = config.gradient_accumulation_steps * median(
        clock.passes_ms[WARM_UP_STEPS:] or clock.passes_ms[-1:] or [NAN]
    )
    return passes_ms, max(step_ms - passes_ms, 0.0)  # nan stays nan


class _PassClock:
    """A companion that times the forward and backward pass of every micro-batch."""

    def __init__(self) -> None:
        self.passes_ms: list[float] = []
        self._begun = 0.0

    def before_forward(self, moment: Moment) -> None:
        """Begin."""
        self._begun = time.perf_counter()

    def after_backward(self, moment: Moment) -> None:
        """End."""
        self.passes_ms.append(1e3 * (time.perf_counter() - self._begun))
