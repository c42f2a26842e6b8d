"""How many seeds a gate needs: the published table, and what a simulation says."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.gate.decision import INCONCLUSIVE, PASS, Pairs, decide
from harness.gate.power import pass_chance, seeds_needed
from harness.gate.rules import GateRules, MetricRule

RULES = GateRules(
    looks=(5,), metrics=(MetricRule(metric="m", compare="difference", worse="higher", margin=1.0),)
)


@pytest.mark.parametrize(
    "spread, seeds",
    [
        (0.5, [4, 4, 5, 6]),
        (0.75, [6, 7, 8, 11]),
        (1.0, [8, 11, 13, 18]),
        (1.33, [13, 17, 21, 30]),
        (2.0, [27, 36, 45, 65]),
        (3.0, [58, 79, 99, 144]),
    ],
)
def test_seeds_of_the_noncentral_t(spread, seeds):
    """Sample sizes of a one-sided paired t test of non-inferiority at 5 %, for 80, 90, 95 and 99 %."""
    assert [seeds_needed(spread, power) for power in (0.8, 0.9, 0.95, 0.99)] == seeds


@pytest.mark.parametrize(
    "spread, seeds, harm", [(1.0, 8, 0.0), (0.7, 5, 0.0), (1.5, 12, 0.5), (1.0, 10, 1.0)]
)
def test_the_gate_passes_as_often_as_it_is_said_to(spread, seeds, harm):
    """At a harm equal to the margin, in one of twenty."""
    source = np.random.default_rng(1)
    repetitions = 1500
    passed = 0
    for found in source.normal(harm, spread, (repetitions, seeds)):
        held = decide(
            [
                Pairs(
                    scenario="s",
                    metric="m",
                    seeds=tuple(range(seeds)),
                    base=(0.0,) * seeds,
                    candidate=tuple(found),
                    planned=seeds,
                )
            ],
            [],
            RULES,
            look=seeds,
        )
        passed += held.verdict == PASS
        assert held.verdict in (PASS, INCONCLUSIVE, "FAIL")
    assert passed / repetitions == pytest.approx(pass_chance(seeds, spread, harm=harm), abs=0.04)


@given(st.floats(0.01, 5.0), st.integers(1, 50))
def test_more_to_pass_and_more_spread_need_more_seeds(spread, cells):
    assert seeds_needed(spread, 0.9, cells) <= seeds_needed(spread, 0.9, cells + 1)
    assert seeds_needed(spread, 0.9, cells) <= seeds_needed(2 * spread, 0.9, cells)
    needed = seeds_needed(spread, 0.9, cells)
    assert pass_chance(needed, spread) >= 1 - 0.1 / cells
    assert needed == 4 or pass_chance(needed - 1, spread) < 1 - 0.1 / cells


def test_no_spread_needs_the_fewest():
    assert seeds_needed(0.0, 0.99, 20) == 4
    assert pass_chance(3, 0.0) == 0.0
    assert pass_chance(10, 1e-6) == 1.0


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda: seeds_needed(-1.0, 0.9), "sd_over_margin must be >= 0"),
        (lambda: seeds_needed(float("nan"), 0.9), "sd_over_margin must be >= 0"),
        (lambda: seeds_needed(1.0, 1.0), "power must lie between 0 and 1"),
        (lambda: seeds_needed(1.0, 0.9, 0), "cells must be >= 1"),
        (lambda: seeds_needed(1e9, 0.9), "a wider margin would need fewer"),
    ],
)
def test_bad_arguments_name_the_rule(make, said):
    with pytest.raises(ValueError, match=said):
        make()
