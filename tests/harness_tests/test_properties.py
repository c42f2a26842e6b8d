"""The laws of a library: ours keeps them all, and each of them finds a bug that is planted for it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

from harness.robustness.profiles import PROFILES
from harness.robustness.properties import PROPERTIES
from harness.robustness.search import BROKEN, HOLDS, try_property
from trainables.subject import own_subject

sys.path.insert(0, str(Path(__file__).parent))
from planted_library import PLANTS, planted

SMOKE = PROFILES["smoke"].examples
MANY = PROFILES[os.environ.get("SCM_HARNESS_PROFILE", "ci")].examples
PLANTED = [(name, law) for name, plant in PLANTS.items() for law in plant.laws]


@pytest.mark.parametrize("name", PROPERTIES)
def test_our_library_keeps_the_law(name: str) -> None:
    """On as many cases as the smallest profile has."""
    found = try_property(PROPERTIES[name], own_subject(), examples=SMOKE)
    assert found.status == HOLDS, f"{found.message}: {found.case}"


@pytest.mark.slow
@pytest.mark.parametrize("name", PROPERTIES)
def test_our_library_keeps_the_law_on_many_cases(name: str) -> None:
    """On those of the profile for CI, or of SCM_HARNESS_PROFILE, drawn from another seed."""
    found = try_property(PROPERTIES[name], own_subject(), examples=MANY, seed_of_cases=1)
    assert found.status == HOLDS, f"{found.message}: {found.case}"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", PROPERTIES)
def test_our_library_keeps_the_law_on_a_gpu(name: str) -> None:
    """The same laws, with tensors on the device."""
    found = try_property(PROPERTIES[name], own_subject("cuda"), examples=SMOKE)
    assert found.status in (HOLDS, "not_applicable"), f"{found.message}: {found.case}"


def test_a_bug_is_planted_for_every_law() -> None:
    """No law is without a proof that it can fail."""
    assert {law for _, law in PLANTED} == set(PROPERTIES)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of dividing by zero
@pytest.mark.parametrize(("bug", "law"), PLANTED)
def test_each_law_finds_its_bug(bug: str, law: str) -> None:
    """Within a few dozen cases, by one of a few rows."""
    found = try_property(PROPERTIES[law], planted(bug), examples=100)
    assert found.status == BROKEN, found.message
    assert found.case is not None
    rows = [len(value) for value in found.case.values() if isinstance(value, torch.Tensor) and value.ndim]
    assert max(rows, default=0) <= 8
