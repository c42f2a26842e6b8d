"""What every test stands on: one thread per process, and no colour or usage reports from the libraries."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, settings

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

# How long an example takes says how busy the machine is, not whether the law holds. A change is judged in CI
# by the same examples as the one before it; new ones are tried wherever the tests run otherwise.
settings.register_profile(
    "house",
    deadline=None,
    derandomize=bool(os.environ.get("CI")),
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("house")


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)
