"""The training threshold's draws."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scm.training.gap import perturbed_threshold


def test_draws_match_the_recorded_ranges(vector_group, decode_numbers):
    """Every draw is the recorded one to within float32; a range that float32 cannot hold is kept as well."""
    for case in vector_group("perturbed_threshold"):
        low, high = decode_numbers(case["tau_min"]), decode_numbers(case["tau_max"])
        if "raises" in case["expected"]:
            with pytest.raises(ValueError, match="tau_min must be <= tau_max"):
                perturbed_threshold(low, high)
            continue
        generator = torch.Generator().manual_seed(case["torch_seed"])
        draws = [perturbed_threshold(low, high, generator=generator) for _ in range(case["expected"]["n"])]
        assert all(low <= draw <= high for draw in draws), case["id"]
        assert (len(set(draws)) > 1) == case["expected"]["distinct"], case["id"]
        recorded = case["expected"]["seeded_draws"]
        assert draws[: len(recorded)] == pytest.approx(recorded, rel=3e-7), case["id"]
        mean = math.fsum(draws) / len(draws)
        spread = 4 * (high - low) / math.sqrt(12 * len(draws))
        assert abs(mean - (low + high) / 2) <= spread + 1e-12, case["id"]


def test_equal_bounds_use_no_random_number():
    """A fixed threshold leaves both generators where they are."""
    generator = torch.Generator().manual_seed(1)
    before, before_global = generator.get_state(), torch.get_rng_state()
    assert perturbed_threshold(1e-4, 1e-4, generator=generator) == 1e-4
    assert perturbed_threshold(1e-4, 1e-4) == 1e-4
    assert torch.equal(generator.get_state(), before)
    assert torch.equal(torch.get_rng_state(), before_global)


def test_own_generator_leaves_the_global_one_alone():
    """Shuffling and dropout do not notice that thresholds are drawn."""
    before = torch.get_rng_state()
    draws = [perturbed_threshold(0.0, 1.0, generator=torch.Generator().manual_seed(7)) for _ in range(2)]
    assert draws[0] == draws[1]
    assert torch.equal(torch.get_rng_state(), before)


def test_without_a_generator_the_global_seed_decides():
    """Calls of the field's form follow torch.manual_seed."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        first = perturbed_threshold(0.0, 1.0)
        torch.manual_seed(3)
        assert perturbed_threshold(0.0, 1.0) == first


@settings(deadline=None)
@given(st.floats(0, 1), st.floats(0, 1), st.integers(0, 2**31))
def test_a_draw_never_leaves_its_bounds(a, b, seed):
    """For every pair of bounds, however close, the draw is one of the numbers between them."""
    low, high = min(a, b), max(a, b)
    draw = perturbed_threshold(low, high, generator=torch.Generator().manual_seed(seed))
    assert isinstance(draw, float)
    assert low <= draw <= high


@pytest.mark.parametrize("bounds", [(math.nan, 1.0), (0.0, math.nan), (0.0, math.inf), (2.0, 1.0)])
def test_bad_bounds_are_refused(bounds):
    """Bounds that are no interval of numbers are refused."""
    with pytest.raises(ValueError, match="tau_min must be <= tau_max and both finite"):
        perturbed_threshold(*bounds)
