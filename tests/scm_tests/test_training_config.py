"""What the trainer is told: accepted, converted or refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from scm.autodiff.policies import GradientPolicy
from scm.training.config import TrainingConfig

ERRORS = {"ValueError": ValueError, "TypeError": TypeError}


def test_recorded_constructor_calls(vector_group: Callable[[str], list[dict[str, Any]]]) -> None:
    """Every recorded call is accepted, or refused with the recorded type of error."""
    for case in vector_group("training_config_validation"):
        if case["expected"] == "ok":
            TrainingConfig(**case["kwargs"])
        else:
            with pytest.raises(ERRORS[case["expected"]["raises"]]):
                TrainingConfig(**case["kwargs"])


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"clip_norm": 0.0}, ValueError),
        ({"clip_norm": float("inf")}, ValueError),
        ({"nonfinite_budget": -1}, ValueError),
        ({"nonfinite_budget": 1.5}, TypeError),
        ({"seed": 1.0}, TypeError),
        ({"seed": True}, TypeError),
        ({"log_interval": 0}, ValueError),
        ({"restore_best": 1}, TypeError),
        ({"restore_best": True}, ValueError),
        ({"accumulation_weighting": "rows"}, ValueError),
        ({"amp_dtype": torch.float32}, ValueError),
        ({"gradient_policy": "clip"}, ValueError),
        ({"gradient_policy": 3}, TypeError),
        ({"log_hook": "log.jsonl"}, TypeError),
        ({"use_amp": 1}, TypeError),
        ({"tau_train_max": float("nan")}, ValueError),
    ],
    ids=lambda value: repr(value) if isinstance(value, dict) else "",
)
def test_further_fields_are_checked(fields: dict[str, Any], error: type[Exception]) -> None:
    """What the peer has no field for is checked as strictly."""
    with pytest.raises(error, match=next(iter(fields))):
        TrainingConfig(**fields)


def test_plain_values_become_what_they_name() -> None:
    """Policies and devices may be given by name, use_amp overrides mixed_precision, weights are copied."""
    weights = {"margin": 2}
    config = TrainingConfig(
        gradient_policy="project", device="cpu", use_amp=True, loss_weights=weights, learning_rate="0.1"
    )
    weights["margin"] = 5
    assert config.gradient_policy is GradientPolicy.PROJECT
    assert config.device == torch.device("cpu")
    assert config.mixed_precision
    assert config.loss_weights == {"margin": 2.0}
    assert config.learning_rate == 0.1


def test_positions_of_the_fields_are_those_of_the_peer() -> None:
    """Scripts that pass the first fields by position mean the same ones."""
    config = TrainingConfig(1e-3, 5, 2, False, None, torch.bfloat16, 1e-4, 2e-4, 1e-6)
    assert (config.max_epochs, config.gradient_accumulation_steps) == (5, 2)
    assert (config.tau_train_min, config.tau_train_max, config.tau_infer) == (1e-4, 2e-4, 1e-6)
