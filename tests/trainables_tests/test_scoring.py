"""Scores of many models: which method of a task gives them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch

from scm.trial import Decoded
from trainables.scoring import score_many

THREE = Decoded(*(torch.ones(3, 2, dtype=torch.float64) for _ in range(5)))
CONFIGS: Sequence[Any] = (1, 2, 3)


def said(value: float) -> dict[str, float]:
    return {"accepted_error": value, "charged_error": value}


class Together:
    """A task that scores many at once, otherwise than each."""

    name = "together"

    def metrics(self, decoded: Decoded, split: Any, config: Any) -> Mapping[str, float]:
        return said(float(config))

    def pack_metrics(self, decoded: Decoded, split: Any, configs: Sequence[Any]) -> list[dict[str, float]]:
        return [said(10.0 * config) for config in configs]


class OtherMetrics(Together):
    def metrics(self, decoded: Decoded, split: Any, config: Any) -> Mapping[str, float]:
        return said(-float(config))


class OtherBoth(OtherMetrics):
    def pack_metrics(self, decoded: Decoded, split: Any, configs: Sequence[Any]) -> list[dict[str, float]]:
        return [said(-10.0 * config) for config in configs]


class Wrapped:
    """Asks another task for what it does not have."""

    def __init__(self, task: Any) -> None:
        self.task = task

    def __getattr__(self, name: str) -> Any:
        return getattr(self.task, name)


class WithMetrics(Wrapped):
    def metrics(self, decoded: Decoded, split: Any, config: Any) -> Mapping[str, float]:
        return said(0.5)


def with_metrics_of_its_own() -> Together:
    task = Together()
    task.metrics = lambda decoded, split, config: said(0.25)
    return task


@pytest.mark.parametrize(
    "task, errors",
    [
        (Together(), [10.0, 20.0, 30.0]),
        (OtherMetrics(), [-1.0, -2.0, -3.0]),
        (OtherBoth(), [-10.0, -20.0, -30.0]),
        (with_metrics_of_its_own(), [0.25] * 3),
        (Wrapped(Together()), [10.0, 20.0, 30.0]),
        (WithMetrics(Together()), [0.5] * 3),
    ],
    ids=["its own", "overridden", "both overridden", "on the object", "wrapped", "wrapped with others"],
)
def test_metrics_that_were_replaced_are_those_that_count(task, errors):
    """A `pack_metrics` that was written for other metrics is not asked."""
    scores = score_many(task, None, CONFIGS, THREE)
    assert [score["accepted_error"] for score in scores] == errors
