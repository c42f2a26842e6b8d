"""Optimizers of many rows: torch's own steps for every row, and no step where none is to be taken."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from scm.gradients import is_finite
from scm.packed.gradients import FiniteProbe, clip_rows
from scm.packed.optimizers import ROW_OPTIMIZERS, PackOptimizer, Way
from scm.training.guard import StepGuard
from scm.trial import make_optimizer
from scm.trial_config import TrialConfig

STEPS = 6
WIDTH = 7


def config_strategy(kind: st.SearchStrategy[str]) -> st.SearchStrategy[TrialConfig]:
    shares = st.floats(0.0, 0.98)
    return st.builds(
        _config,
        kind,
        st.floats(1e-4, 0.5),
        st.sampled_from([0.0, 0.0, 1e-3, 0.3]),
        st.sampled_from([0.0, 0.3, 0.9]),
        st.booleans(),
        shares,
        shares,
    )


def _config(
    kind: str, rate: float, decay: float, momentum: float, nesterov: bool, b1: float, b2: float
) -> Any:
    told: dict[str, Any] = {"optimizer": kind, "learning_rate": rate, "weight_decay": decay}
    if kind in ("sgd", "rmsprop"):
        told["momentum"] = momentum
        told["nesterov"] = kind == "sgd" and nesterov and momentum > 0
    else:
        told |= {"beta1": b1, "beta2": b2}
    return TrialConfig(**told)


def alone(
    config: TrialConfig, first: Tensor, gradients: Tensor, rates: list[float], taken: list[bool]
) -> Tensor:
    """Return one row's weights after the steps that it takes, by torch's own optimizer."""
    weights = nn.Parameter(first.clone())
    optimizer = make_optimizer(config, [weights])
    for gradient, rate, takes in zip(gradients, rates, taken, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        weights.grad = gradient.clone()
        if takes:
            optimizer.step()
    return weights.detach()


def all_rows(
    configs: list[TrialConfig],
    first: Tensor,
    gradients: Tensor,
    rates: list[list[float]],
    taken: list[list[bool]] | None,
    by_row: bool,
) -> Tensor:
    weights = first.clone()
    optimizer = PackOptimizer(weights, configs, [{} for _ in configs], Way(by_row))
    for step in range(STEPS):
        optimizer.set_rates([own[step] for own in rates])
        took = None if taken is None else torch.tensor([own[step] for own in taken])
        optimizer.step(gradients[:, step].clone(), took)
    return weights


@pytest.mark.parametrize("by_row", [True, False], ids=["row by row", "all rows at once"])
@pytest.mark.parametrize("kind", sorted(ROW_OPTIMIZERS))
@given(data=st.data())
@settings(max_examples=40)
def test_every_row_takes_the_steps_of_torchs_own_optimizer(kind, by_row, data):
    """Whatever the other rows' settings are: rates (which change), decay, momentum and betas are its own."""
    configs = data.draw(st.lists(config_strategy(st.just(kind)), min_size=1, max_size=4))
    seed = data.draw(st.integers(0, 2**20))
    source = torch.Generator().manual_seed(seed)
    first = torch.randn(len(configs), WIDTH, generator=source, dtype=torch.float64)
    gradients = torch.randn(len(configs), STEPS, WIDTH, generator=source, dtype=torch.float64)
    rates = [[item.learning_rate * (1 - step / STEPS) for step in range(STEPS)] for item in configs]
    found = all_rows(configs, first, gradients, rates, None, by_row)
    for row, config in enumerate(configs):
        right = alone(config, first[row], gradients[row], rates[row], [True] * STEPS)
        torch.testing.assert_close(found[row], right, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("by_row", [True, False], ids=["row by row", "all rows at once"])
@given(data=st.data())
@settings(max_examples=60)
def test_a_row_that_takes_no_step_remembers_nothing_of_it(by_row, data):
    """Its gradient may be anything; later steps are those of an optimizer that was never called for it."""
    kinds = st.sampled_from(sorted(ROW_OPTIMIZERS))
    configs = data.draw(st.lists(config_strategy(kinds), min_size=2, max_size=5))
    takes = st.lists(st.booleans(), min_size=STEPS, max_size=STEPS)
    taken = [data.draw(takes) for _ in configs]
    source = torch.Generator().manual_seed(data.draw(st.integers(0, 2**20)))
    first = torch.randn(len(configs), WIDTH, generator=source, dtype=torch.float64)
    gradients = torch.randn(len(configs), STEPS, WIDTH, generator=source, dtype=torch.float64)
    for row, own in enumerate(taken):
        for step, took in enumerate(own):
            if not took:
                gradients[row, step, step % WIDTH] = float("nan") if step % 2 else float("inf")
    rates = [[item.learning_rate] * STEPS for item in configs]
    found = all_rows(configs, first, gradients, rates, taken, by_row)
    for row, config in enumerate(configs):
        right = alone(config, first[row], gradients[row], rates[row], taken[row])
        torch.testing.assert_close(found[row], right, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("by_row", [True, False], ids=["row by row", "all rows at once"])
def test_a_bad_row_leaves_its_neighbours_bit_identical(by_row):
    configs = [_config(kind, 0.1, 0.01, 0.9, False, 0.9, 0.99) for kind in sorted(ROW_OPTIMIZERS) * 2]
    configs.sort(key=lambda item: item.optimizer)
    source = torch.Generator().manual_seed(0)
    first = torch.randn(len(configs), WIDTH, generator=source)
    gradients = torch.randn(len(configs), STEPS, WIDTH, generator=source)
    rates = [[0.1] * STEPS for _ in configs]
    taken = [[True] * STEPS for _ in configs]
    fine = all_rows(configs, first, gradients, rates, taken, by_row)
    for bad in range(len(configs)):
        spoiled, takes = gradients.clone(), [list(own) for own in taken]
        spoiled[bad, 2] = float("nan")
        takes[bad][2] = False
        found = all_rows(configs, first, spoiled, rates, takes, by_row)
        kept = [row for row in range(len(configs)) if row != bad]
        assert torch.equal(found[kept], fine[kept])
        assert torch.isfinite(found[bad]).all()


@pytest.mark.parametrize("by_row", [True, False], ids=["row by row", "all rows at once"])
def test_rows_keep_what_they_remember_when_they_move(by_row):
    """Rows that are put in another order, among others, go on as if they had stayed."""
    configs = [_config(kind, 0.1, 0.01, 0.9, False, 0.9, 0.99) for kind in sorted(ROW_OPTIMIZERS)]
    source = torch.Generator().manual_seed(0)
    first = torch.randn(len(configs), WIDTH, generator=source, dtype=torch.float64)
    gradients = torch.randn(len(configs), STEPS, WIDTH, generator=source, dtype=torch.float64)
    right = all_rows(configs, first, gradients, [[0.1] * STEPS] * len(configs), None, by_row)

    weights = first.clone()
    optimizer = PackOptimizer(weights, configs, [{} for _ in configs], Way(by_row))
    optimizer.set_rates([0.1] * len(configs))
    for step in range(3):
        optimizer.step(gradients[:, step].clone())
    order = [2, 0, 3, 1]
    moved = weights[order]
    states = optimizer.states()
    optimizer = PackOptimizer(
        moved, [configs[row] for row in order], [states[row] for row in order], Way(by_row)
    )
    optimizer.set_rates([0.1] * len(configs))
    for step in range(3, STEPS):
        optimizer.step(gradients[order, step].clone())
    assert torch.equal(moved, right[order])


@given(st.lists(st.floats(0.01, 20.0), min_size=1, max_size=5), st.integers(0, 2**20))
@settings(max_examples=60)
def test_each_row_is_clipped_by_its_own_norm(limits, seed):
    """As `StepGuard` clips a single training, never over several rows; a limit of inf does not clip."""
    source = torch.Generator().manual_seed(seed)
    gradients = torch.randn(len(limits) + 1, WIDTH, generator=source, dtype=torch.float64) * 3
    found = gradients.clone()
    clip_rows(found, torch.tensor([*limits, float("inf")], dtype=torch.float64))
    assert torch.equal(found[-1], gradients[-1])
    for row, limit in enumerate(limits):
        weights = nn.Parameter(torch.zeros(WIDTH, dtype=torch.float64))
        optimizer = torch.optim.SGD([weights], lr=1.0)
        guard = StepGuard(optimizer, torch.device("cpu"), clip_norm=limit, scaler=None, host_must_know=False)
        weights.grad = gradients[row].clone()
        guard.step([weights], 1.0)
        torch.testing.assert_close(found[row], -weights.detach(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 3.0e38, 1e-45])
@pytest.mark.parametrize("place", [0, 4673])
def test_the_probe_tells_rows_with_one_value_that_is_not_finite(value, place):
    """Also where values are so large that their sum would not be."""
    rows = torch.randn(3, 4674)
    rows[1] = 3.0e38 if value == 3.0e38 else rows[1]
    rows[1, place] = value
    found = is_finite(FiniteProbe(4674, torch.float32, torch.device("cpu")).means(rows))
    assert found.tolist() == torch.isfinite(rows).all(1).tolist()
