"""Orders and thresholds of packs: the draws of a training alone, bit for bit."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scm.packed.streams import EpochStream, row_orders, threshold_shares, thresholds
from scm.seeding import generator
from scm.training.gap import perturbed_threshold
from scm.training.loader import TensorBatches
from scm.training.targets import lift_semantic_targets


@given(
    st.lists(
        st.tuples(st.integers(0, 9), st.floats(1e-6, 1e-3), st.floats(0.0, 1e-2)), min_size=1, max_size=4
    ),
    st.integers(1, 40),
)
@settings(max_examples=30)
def test_thresholds_are_those_of_a_training_alone(trials, steps):
    """One draw a step from the trial's own generator, also where many steps are drawn at once."""
    stream = threshold_shares(steps)
    low = torch.tensor([low for _, low, _ in trials], dtype=torch.float64)
    high = torch.tensor([low + more for _, low, more in trials], dtype=torch.float64)
    sources = [generator(seed, "tau") for seed, _, _ in trials]
    for epoch in range(3):
        found = thresholds(low, high, torch.stack([stream.of(seed, epoch) for seed, _, _ in trials], dim=1))
        for place, source in enumerate(sources):
            if low[place] == high[place]:
                assert set(found[:, place].tolist()) == {low[place].item()}
                continue
            own = [
                perturbed_threshold(low[place].item(), high[place].item(), generator=source)
                for _ in range(steps)
            ]
            assert found[:, place].tolist() == own


def test_orders_are_those_of_a_loader():
    data = torch.arange(30, dtype=torch.float64)
    targets = lift_semantic_targets(data, torch.zeros(30, dtype=torch.int64))
    stream = row_orders(30)
    loader = TensorBatches(data, targets, 7, generator=generator(3, "order"))
    for epoch in range(3):
        assert torch.equal(torch.cat([inputs for inputs, _ in loader]), data[stream.of(3, epoch)])


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 6)), max_size=30))
@settings(max_examples=30)
def test_epochs_may_be_asked_for_in_any_order(asked):
    """A trial that enters late, or goes on from a checkpoint, draws what it always would have drawn."""
    stream = row_orders(11)
    for seed, epoch in asked:
        source = generator(seed, "order")
        drawn = [torch.randperm(11, generator=source) for _ in range(epoch + 1)]
        assert torch.equal(stream.of(seed, epoch), drawn[-1])


def test_what_is_no_longer_kept_is_drawn_again():
    """Memory is bounded: large draws leave, and come back the same."""
    stream = EpochStream("order", lambda source: torch.rand(2**21, generator=source).double())
    first = stream.of(0, 0).clone()
    for epoch in range(1, 6):
        stream.of(0, epoch)
    assert len(stream._kept) < 6
    assert torch.equal(stream.of(0, 0), first)
