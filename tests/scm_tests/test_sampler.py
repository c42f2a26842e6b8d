"""The adaptive sampler: recorded weights, partial updates, unbiased importance weights, resuming."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import TensorDataset

from scm.training.sampler import (
    AdaptiveSampler,
    AdaptiveSamplerConfig,
    ema_update,
    sampling_weights,
    singularity_prob,
)


def rows(count):
    return TensorDataset(torch.arange(count))


def updated(count=5, **config):
    sampler = AdaptiveSampler(rows(count), AdaptiveSamplerConfig(**config), seed=1)
    q = torch.linspace(0, 1, count)
    sampler.update(q, q < 0.3)
    return sampler


def test_weights_are_those_recorded(vector_group, decode_numbers):
    """Sequences of updates give the recorded weights, and the parts the recorded values."""
    compared = 0
    for case in decode_numbers(vector_group("adaptive_sampler")):
        if "updates" in case:
            sampler = AdaptiveSampler(rows(6), AdaptiveSamplerConfig(**case["config"]))
            for update, expected in zip(case["updates"], case["expected_weights"], strict=True):
                sampler.update(torch.tensor(update["q"]), torch.tensor(update["bottom_mask"]))
                np.testing.assert_allclose(sampler.weights, expected, rtol=1e-6)
        elif case["id"] == "ema_and_weights":
            ema = ema_update(torch.tensor(case["previous"]), torch.tensor(case["current"]), case["gamma"])
            np.testing.assert_allclose(ema, case["expected_ema"], rtol=1e-6)
            given_weights = case["weights_inputs"]
            weights = sampling_weights(
                torch.tensor(given_weights["probabilities"]),
                torch.tensor(given_weights["bottom_mask"]),
                alpha=given_weights["alpha"],
                s_min=given_weights["s_min"],
            )
            np.testing.assert_allclose(weights, case["expected_weights"], rtol=1e-6)
        compared += 1
    assert compared == 5


def test_probabilities_are_those_recorded_but_nan_is_certain(vector_group, decode_numbers):
    """A NaN denominator decodes as bottom: its probability is 1 here, where the recorded one is NaN."""
    (case,) = [c for c in decode_numbers(vector_group("adaptive_sampler")) if c["id"] == "singularity_prob"]
    q = torch.tensor(case["q"], dtype=torch.float64)
    got = singularity_prob(q, case["tau_train"], case["beta"])
    np.testing.assert_allclose(got[:-1], case["expected"][:-1], rtol=1e-12)
    assert math.isnan(case["expected"][-1])
    assert got[-1] == 1.0


def test_normalised_probabilities_use_the_whole_range():
    """Q = 0 is certain, so that a bottom that decodes well goes back to the weight of any other row."""
    q = torch.tensor([0.0, 1e-4, 1.0])
    assert singularity_prob(q, 1e-4)[0] < 0.51
    normalised = singularity_prob(q, 1e-4, normalized=True)
    assert normalised[0] == 1.0
    assert (normalised.diff() < 0).all()
    sampler = AdaptiveSampler(rows(1), AdaptiveSamplerConfig(gamma=1.0, normalized=True))
    sampler.update(torch.zeros(1), torch.ones(1))
    assert sampler.weights.tolist() == [1.0]


def test_a_floor_above_one_acts():
    """Weights start at 1: a floor says something from there on, and levels what is below it."""
    probabilities = torch.tensor([0.0, 0.2, 0.9])
    assert sampling_weights(probabilities, alpha=1.0, s_min=0.9).tolist() == pytest.approx([1.0, 1.2, 1.9])
    assert sampling_weights(probabilities, alpha=1.0, s_min=1.5).tolist() == pytest.approx([1.5, 1.5, 1.9])


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32), min_size=1, max_size=8))
def test_weights_are_finite_whatever_the_denominators(values):
    """NaN and infinite |Q| leave every weight finite and positive, now and after later updates."""
    sampler = AdaptiveSampler(rows(len(values)))
    sampler.update(torch.tensor(values), torch.zeros(len(values)))
    sampler.update(torch.ones(len(values)))
    assert torch.isfinite(sampler.weights).all()
    assert (sampler.weights > 0).all()
    sampler.draw(3)


def test_partial_updates_are_full_updates_of_some_rows():
    """Feeding all rows in two parts is feeding them at once; other rows are untouched."""
    whole, parts = updated(), AdaptiveSampler(rows(5), seed=1)
    q = torch.linspace(0, 1, 5)
    parts.update(q[[4, 0]], (q < 0.3)[[4, 0]], indices=torch.tensor([4, 0]))
    assert parts.weights[1] == 1.0
    parts.update(q[1:4], (q < 0.3)[1:4], indices=torch.arange(1, 4))
    assert torch.equal(parts.weights, whole.weights)


def test_updates_keep_no_graph():
    """Denominators of a training step may be passed as they are."""
    sampler = AdaptiveSampler(rows(3))
    q = torch.ones(3, 1, requires_grad=True)
    sampler.update(q * 2)
    assert not sampler.weights.requires_grad


def test_importance_weights_undo_the_sampling():
    """The expectation of weight·loss over draws is the plain mean, exactly and in a sample."""
    sampler = updated(alpha=5.0, gamma=1.0)
    loss = torch.tensor([1.0, -2.0, 5.0, 0.5, 9.0])
    share = sampler.weights / sampler.weights.sum()
    assert (share * sampler.importance_weights * loss).sum() == pytest.approx(loss.mean().item(), rel=1e-6)
    indices, weights = sampler.draw(20_000)
    assert (weights * loss[indices]).mean() == pytest.approx(loss.mean().item(), abs=0.15)
    counts = torch.bincount(indices, minlength=5) / 20_000
    assert torch.allclose(counts, share, atol=0.015)


def test_draws_leave_the_global_stream_alone():
    """Neither draws nor loaders move torch's global generator, and the seed alone decides them."""
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = [batch[0].tolist() for batch in updated(20)]
    second = [batch[0].tolist() for batch in updated(20)]
    assert torch.equal(torch.get_rng_state(), before)
    assert first == second
    assert sum(len(batch) for batch in first) == 20


def test_loaders_follow_the_configuration_and_overrides():
    """Batch size and drop_last come from the config unless overridden."""
    sampler = updated(7, batch_size=3, drop_last=True)
    assert [len(batch[0]) for batch in sampler] == [3, 3]
    assert [len(batch[0]) for batch in sampler.dataloader(drop_last=False)] == [3, 3, 1]
    assert len(sampler) == 7


def test_a_restored_sampler_draws_what_the_original_draws():
    """Weights and the place in the random stream are part of the state."""
    sampler = updated()
    sampler.draw(3)
    state = sampler.state_dict()
    expected = sampler.draw(50)[0]
    sampler.update(torch.zeros(5))
    restored = AdaptiveSampler(rows(5), seed=99)
    restored.load_state_dict(state)
    assert torch.equal(restored.draw(50)[0], expected)


@pytest.mark.parametrize("read", [0, 1, 3, 4])
def test_an_epoch_goes_on_where_it_was_left(read):
    """After any batch, also the last: the rows that were left, and then the epoch that would have come."""
    sampler = updated(10, batch_size=3)
    iterator = iter(sampler)
    for _ in range(read):
        next(iterator)
    state = sampler.state_dict()
    expected = [batch[0].tolist() for batch in iterator] if read else []
    expected += [batch[0].tolist() for batch in sampler]
    restored = AdaptiveSampler(rows(10), AdaptiveSamplerConfig(batch_size=3), seed=99)
    restored.load_state_dict(state)
    got = [batch[0].tolist() for batch in restored] if read else []
    got += [batch[0].tolist() for batch in restored]
    assert got == expected


def test_an_update_acts_on_the_next_epoch():
    """The rows of an epoch are drawn when it begins."""
    plain, disturbed = updated(30, batch_size=10, gamma=1.0), updated(30, batch_size=10, gamma=1.0)
    expected = [[batch[0].tolist() for batch in plain] for _ in range(2)]
    got = []
    for _ in range(2):
        epoch = []
        for batch in disturbed:
            epoch.append(batch[0].tolist())
            disturbed.update(torch.linspace(0, 1, 30), torch.linspace(0, 1, 30) > 0.1)
        got.append(epoch)
    assert got[0] == expected[0]
    assert got[1] != expected[1]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: AdaptiveSamplerConfig(tau_train=-1.0), "tau_train must be finite and >= 0"),
        (lambda: AdaptiveSamplerConfig(beta=0.0), "beta must be finite and > 0"),
        (lambda: AdaptiveSamplerConfig(gamma=0.0), r"gamma must be in \(0, 1\]"),
        (lambda: AdaptiveSamplerConfig(gamma=math.nan), r"gamma must be in \(0, 1\]"),
        (lambda: AdaptiveSamplerConfig(alpha=-1.0), "alpha must be finite and >= 0"),
        (lambda: AdaptiveSamplerConfig(s_min=0.0), "s_min must be finite and > 0"),
        (lambda: AdaptiveSamplerConfig(batch_size=0), "batch_size must be >= 1"),
        (lambda: AdaptiveSamplerConfig(num_workers=-1), "num_workers must be >= 0"),
        (lambda: AdaptiveSampler(rows(0)), "dataset must have at least one row"),
        (lambda: updated().update(torch.ones(1)), r"q_values must have shape \(5,\) or \(5, 1\), got \(1,\)"),
        (lambda: updated().update(torch.ones(5), torch.ones(1)), "bottom_mask must have shape"),
        (lambda: updated().update(torch.ones(1), indices=torch.tensor([5])), r"indices must be in \[0, 5\)"),
        (lambda: updated().update(torch.ones(1), indices=torch.tensor([-1])), r"indices must be in \[0, 5\)"),
        (
            lambda: updated().update(torch.ones(2), indices=torch.tensor([1, 1])),
            "indices must name each row once",
        ),
        (lambda: updated().update(torch.ones(1), indices=torch.tensor([0.0])), "indices must be int64"),
        (
            lambda: updated(3).load_state_dict(updated(5).state_dict()),
            "sampler state must have 3 rows, got 5",
        ),
        (lambda: updated().load_state_dict({"version": 0}), "sampler state must be of version 3, got 0"),
        (lambda: singularity_prob(torch.ones(1), 1e-4, 0.0), "beta must be > 0"),
        (lambda: ema_update(torch.ones(2), torch.ones(1)), "previous and current must have one shape"),
        (lambda: ema_update(torch.ones(1), torch.ones(1), 2.0), r"gamma must be in \(0, 1\]"),
        (lambda: sampling_weights(torch.ones(2), torch.ones(1)), r"bottom_mask must have shape \(2,\)"),
    ],
)
def test_sampler_refuses_bad_arguments(call, message):
    """Each refusal names the rule and the value."""
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_sampler_takes_tensors_of_any_device():
    """CUDA denominators update a CPU state, and a state may live on CUDA."""
    for device in ("cpu", "cuda"):
        sampler = AdaptiveSampler(rows(4), device=device)
        sampler.update(torch.ones(4, device="cuda"), torch.zeros(4))
        indices, weights = sampler.draw(3)
        assert indices.device.type == weights.device.type == device
