"""The clock of a training: which steps its step time is the median of."""

from __future__ import annotations

import math

import pytest
import torch

from scm.training.bench import WARM_UP_STEPS, StepClock

SLOW_FIRST = [0.9, 0.004, 0.002, 0.003, 0.005]  # seconds


@pytest.mark.parametrize(
    ("steps_s", "expected_ms"),
    [
        ([], math.nan),
        ([0.9], 900.0),
        ([0.9, 0.004], 4.0),
        ([0.9, 0.004, 0.002], 3.0),
        (SLOW_FIRST, 3.5),
        ([*SLOW_FIRST, 0.001], 1.0),
        ([*SLOW_FIRST, 0.001, 0.007, 0.008], 7.0),
    ],
    ids=lambda value: f"{len(value)} steps" if isinstance(value, list) else "",
)
def test_a_short_training_has_a_step_time_too(steps_s: list[float], expected_ms: float) -> None:
    """Steps after the warm-up count; without any, all but the first; else the only one."""
    assert len(SLOW_FIRST) == WARM_UP_STEPS
    clock = StepClock(torch.device("cpu"))
    for step_s in steps_s:
        clock.end_batch(0.0, step_s, 0.0, stepped=True)
    assert clock.step_time_ms == pytest.approx(expected_ms, nan_ok=True)


def test_a_group_is_one_step() -> None:
    """The work of all micro-batches of a group is one step, also of one that the epoch's end cuts short."""
    clock = StepClock(torch.device("cpu"))
    for stepped in (False, True, False):
        clock.end_batch(5.0, 0.25, 0.0, stepped=stepped)
    assert clock.step_time_ms == 500.0
    clock.add_flush(0.5)
    assert clock.step_time_ms == 750.0
