"""Batches of resident tensors: the order, the place in an epoch, and the rows themselves."""

from __future__ import annotations

from itertools import chain
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scm.data import Split
from scm.training import loader as loader_module
from scm.training.loader import TensorBatches
from scm.training.targets import SemanticTargets, lift_semantic_targets


def make_targets(rows: int) -> SemanticTargets:
    """Targets that tell which row they are of, with all statuses in turn."""
    return lift_semantic_targets(torch.arange(rows, dtype=torch.float64), torch.arange(rows) % 7)


def make_batches(rows: int, batch_size: int, seed: int | None = 0, **more: Any) -> TensorBatches:
    """Batches of rows 0, 1, 2, ...; shuffled unless `seed` is None."""
    drawn = None if seed is None else torch.Generator().manual_seed(seed)
    inputs = torch.arange(rows, dtype=torch.float64)[:, None]
    return TensorBatches(inputs, make_targets(rows), batch_size, generator=drawn, **more)


def rows_of(batches: Any) -> list[list[int]]:
    """The row numbers of every batch."""
    return [[int(row) for row in inputs[:, 0]] for inputs, _ in batches]


@given(st.integers(1, 40), st.integers(1, 12), st.booleans())
def test_an_epoch_holds_every_row_once(rows: int, batch_size: int, shuffled: bool) -> None:
    """Whatever the sizes: all rows, full batches, and a short one at the end."""
    batches = make_batches(rows, batch_size, 0 if shuffled else None)
    epoch = rows_of(batches)
    assert sorted(chain(*epoch)) == list(range(rows))
    assert len(epoch) == len(batches)
    assert all(len(batch) == batch_size for batch in epoch[:-1])
    if not shuffled:
        assert list(chain(*epoch)) == list(range(rows))


def test_targets_come_along_with_their_rows() -> None:
    """Every field and every derived mask of a batch is that of its rows."""
    whole = make_targets(30)
    for inputs, targets in make_batches(30, 8):
        expected = whole.index(inputs[:, 0].long())
        for name in ("Y_n", "Y_d", "mask_finite", "mask_bottom", "orientation_label", "bottom_kind"):
            assert torch.equal(getattr(targets, name), getattr(expected, name))
        for name in ("mask_trained", "mask_oriented", "mask_semantic"):
            assert torch.equal(getattr(targets, name), getattr(expected, name))


def test_epochs_differ_and_seeds_repeat() -> None:
    """Each epoch has its own order; the same generator gives the same epochs."""
    one, other = make_batches(50, 7, 3), make_batches(50, 7, 3)
    first, second = rows_of(one), rows_of(one)
    assert first != second
    assert [rows_of(other), rows_of(other)] == [first, second]
    assert rows_of(make_batches(50, 7, 4)) != first


def test_the_global_stream_is_not_touched() -> None:
    """Shuffling draws from the generator that was given, and from nowhere else."""
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    rows_of(make_batches(50, 7))
    assert torch.equal(torch.rand(3), expected)


@given(st.integers(2, 30), st.integers(1, 9), st.integers(0, 40), st.booleans())
def test_an_interrupted_epoch_goes_on_with_the_rows_that_were_left(
    rows: int, batch_size: int, stop: int, shuffled: bool
) -> None:
    """Interrupted after any batch and resumed elsewhere: the same batches, in this epoch and the next."""
    seed = 0 if shuffled else None
    whole = make_batches(rows, batch_size, seed)
    epochs = [rows_of(whole), rows_of(whole)]
    stop = min(stop, len(whole))

    interrupted = make_batches(rows, batch_size, seed)
    iterator = iter(interrupted)
    seen = [[int(row) for row in next(iterator)[0][:, 0]] for _ in range(stop)]
    resumed = make_batches(rows, batch_size, None if seed is None else 99)
    resumed.load_state_dict(interrupted.state_dict())
    if stop:
        assert seen + rows_of(resumed) == epochs[0]
        assert rows_of(resumed) == epochs[1]
    else:
        assert [rows_of(resumed), rows_of(resumed)] == epochs


def test_an_abandoned_epoch_is_not_taken_up_by_itself() -> None:
    """Breaking out of a loop and iterating anew begins a new epoch."""
    batches = make_batches(20, 4)
    for _ in batches:
        break
    assert len(rows_of(batches)) == 5


def test_rows_are_gathered_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Data larger than a block come in the same order as data within one."""
    expected = rows_of(make_batches(50, 7))
    monkeypatch.setattr(loader_module, "_BLOCK_BYTES", 1000)
    assert rows_of(make_batches(50, 7)) == expected


def test_drop_last_leaves_the_short_batch_out() -> None:
    """Only full batches remain."""
    assert [len(batch) for batch in rows_of(make_batches(10, 4, drop_last=True))] == [4, 4]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "batch_size must be >= 1"),
        ({"rows": 0}, "at least one row"),
        ({"batch_size": 9, "drop_last": True}, "drop_last leaves no batch"),
    ],
    ids=["size", "empty", "drop_last"],
)
def test_what_gives_no_batches_is_refused(change: dict[str, Any], message: str) -> None:
    """Mistakes are seen when the loader is made, not when a training finds nothing to train on."""
    with pytest.raises(ValueError, match=message):
        make_batches(**{"rows": 5, "batch_size": 2, **change})


def test_unequal_rows_are_refused() -> None:
    """Inputs and targets belong together row by row."""
    with pytest.raises(ValueError, match="one entry a row, got 4 for 5 rows"):
        TensorBatches(torch.zeros(5, 1), make_targets(4), 2)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (make_batches(6, 2), "rows must be as saved"),
        (make_batches(5, 3), "batch_size must be as saved"),
        (make_batches(5, 2, None), "order must be drawn"),
    ],
    ids=["rows", "batch_size", "order"],
)
def test_the_state_of_another_loader_is_refused(other: TensorBatches, message: str) -> None:
    """A place in other data is no place in these."""
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(make_batches(5, 2).state_dict())


def test_a_split_knows_its_content() -> None:
    """The digest changes with any value, dtype, status or extra, and with nothing else."""
    split = Split(torch.arange(6.0).reshape(3, 2), make_targets(3), {"weight": torch.ones(3)})
    same = Split(torch.arange(6.0).reshape(3, 2), make_targets(3), {"weight": torch.ones(3)})
    assert split.digest() == same.digest()
    assert len(split) == 3
    others = [
        Split(torch.arange(6.0).reshape(3, 2) + 1, make_targets(3), {"weight": torch.ones(3)}),
        Split(torch.arange(6.0).reshape(3, 2).double(), make_targets(3), {"weight": torch.ones(3)}),
        Split(torch.arange(6.0).reshape(3, 2), make_targets(4).index(torch.tensor([1, 2, 3])), split.extras),
        Split(torch.arange(6.0).reshape(3, 2), make_targets(3), {"mass": torch.ones(3)}),
        Split(torch.arange(6.0).reshape(3, 2), make_targets(3)),
    ]
    assert len({split.digest(), *(other.digest() for other in others)}) == 6


def test_a_split_refuses_parts_of_other_lengths() -> None:
    """Inputs, targets and extras have one entry a row."""
    with pytest.raises(TypeError, match=r"targets must be what lift_semantic_targets.* returns, got Tensor"):
        Split(torch.zeros(5, 2), torch.zeros(5))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="targets must have one entry a row"):
        Split(torch.zeros(3, 2), make_targets(4))
    with pytest.raises(ValueError, match=r"got weight \(2,\) for 3 rows"):
        Split(torch.zeros(3, 2), make_targets(3), {"weight": torch.ones(2)})
