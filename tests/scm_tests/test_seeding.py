"""One seed a trial, one stream a purpose."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scm.seeding import generator, seed_for, seeded_init


def test_seeds_are_the_same_on_every_machine() -> None:
    """Recorded values: a change here would change every trial ever run."""
    assert seed_for(0, "init") == 925402481798332886
    assert seed_for(1, "order") == 2917395015611456668


@given(st.integers(-(2**70), 2**70), st.text(min_size=1, max_size=20))
def test_seeds_are_taken_by_every_library(seed: int, stream: str) -> None:
    """A seed lies in [0, 2**63) and a generator takes it."""
    value = seed_for(seed, stream)
    assert 0 <= value < 2**63
    assert torch.Generator().manual_seed(value).initial_seed() == value


@given(st.integers(0, 2**32), st.integers(0, 2**32), st.sampled_from(["init", "order", "tau"]))
def test_streams_and_seeds_are_unrelated(seed: int, other: int, stream: str) -> None:
    """Another stream, or another trial, begins elsewhere."""
    assert seed_for(seed, stream) != seed_for(seed, f"{stream}x")
    assert (seed_for(seed, stream) == seed_for(other, stream)) == (seed == other)


def test_streams_do_not_move_each_other() -> None:
    """However much one stream draws, the other's draws stay as they are."""
    order, tau = generator(3, "order"), generator(3, "tau")
    torch.rand(1000, generator=order)
    assert torch.equal(torch.rand(5, generator=tau), torch.rand(5, generator=generator(3, "tau")))


def test_seeded_init_gives_equal_weights_and_leaves_no_trace() -> None:
    """Inside, modules start from the seed; outside, the global stream goes on as if nothing had been."""
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    with seeded_init(7, "init"):
        first = torch.nn.Linear(3, 3)
    assert torch.equal(torch.rand(3), expected)
    with seeded_init(7, "init"):
        second = torch.nn.Linear(3, 3)
    with seeded_init(8, "init"):
        third = torch.nn.Linear(3, 3)
    assert torch.equal(first.weight, second.weight)
    assert not torch.equal(first.weight, third.weight)


@pytest.mark.parametrize(
    ("seed", "stream", "error"),
    [(1.0, "a", TypeError), (True, "a", TypeError), (1, 2, TypeError), (1, "", ValueError)],
)
def test_what_is_no_seed_is_refused(seed: Any, stream: Any, error: type[Exception]) -> None:
    """A seed is an int, a stream has a name."""
    with pytest.raises(error):
        seed_for(seed, stream)
