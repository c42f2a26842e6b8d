"""Transforms of inputs and their way back: the recorded symmetries of the square, and groups of one's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from scm.guards.symmetry import (
    D4,
    D4_ALIASES,
    Symmetry,
    check_symmetries,
    d4,
    make_symmetries,
    select,
    then_table,
    unchanged,
)

NINE = torch.arange(9).view(1, 3, 3)
NAMES = list(D4)


def test_the_square_acts_as_recorded(guard_vectors: dict[str, Any]) -> None:
    """Each id on a square and on an oblong grid, and its inverse."""
    for case in guard_vectors["d4"]["by_id"]:
        symmetry = d4(case["id"])
        assert symmetry is d4(case["name"])
        grid = torch.tensor(case["grid"])
        assert symmetry.apply(grid).tolist() == case["out"], case["name"]
        assert symmetry.inverse(grid).tolist() == case["inverse_of_grid"], case["name"]
        assert torch.equal(d4(case["inverse_id"]).apply(grid), symmetry.inverse(grid))


def test_the_square_composes_as_recorded(guard_vectors: dict[str, Any]) -> None:
    """The table of "first a, then b"."""
    assert then_table(D4, NINE) == guard_vectors["d4"]["then_table"]


def test_all_eight_names_act_and_no_other_is_taken_for_the_identity(guard_vectors: dict[str, Any]) -> None:
    """The reference's losses know five names and do nothing for any other, the other helper all eight."""
    for case in guard_vectors["d4"]["by_name"]:
        grid = torch.tensor(case["grid"])
        if case["name"] == "not_a_transform":
            with pytest.raises(
                ValueError, match="unknown symmetry 'not_a_transform'.* known: identity, rotate_90"
            ):
                d4(case["name"])
        else:
            assert d4(case["name"]).apply(grid).tolist() == case["acw_helper"]["forward"], case["name"]
            assert d4(case["name"]).inverse(grid).tolist() == case["acw_helper"]["inverse"], case["name"]


@pytest.mark.parametrize("name", ["flip_g", "", None, 8, -1, True], ids=repr)
def test_unknown_symmetries_are_refused(name: Any) -> None:
    """Names that are near, empty or none, and ids outside of the eight."""
    with pytest.raises(ValueError, match="unknown symmetry"):
        d4(name)


def test_a_near_name_is_suggested() -> None:
    """The message names the nearest and all that are known."""
    with pytest.raises(ValueError, match="did you mean 'rotate_90'\\? known: identity"):
        select(D4, ["flip_h", "rotate90"])
    assert select(D4, ["flip_h", *D4_ALIASES]) == ("flip_h", *D4_ALIASES.values())


@given(
    st.sampled_from(NAMES),
    st.sampled_from(NAMES),
    st.integers(1, 4),
    st.integers(1, 5),
    st.sampled_from([(), (2,), (2, 3)]),
)
def test_a_symmetry_is_undone_on_grids_of_any_shape(first, second, height, width, leading) -> None:
    """One after another, whatever axes stand before the last two; nothing is lost or made up."""
    grid = torch.arange(height * width * max(1, torch.Size(leading).numel())).view(*leading, height, width)
    moved = D4[second].apply(D4[first].apply(grid))
    assert moved.is_contiguous()
    assert torch.equal(D4[first].undo(D4[second].undo(moved)), grid)
    assert moved.flatten().sort().values.tolist() == grid.flatten().tolist()


def test_an_answer_in_parts_is_restored_in_its_parts() -> None:
    """A tuple of tensors, and named tensors beside it."""
    turned = NINE.rot90(1, (-2, -1))
    P, Q, named = D4["rotate_90"].undo((turned, 2 * turned, {"attention": 3 * turned}))
    assert torch.equal(P, NINE)
    assert torch.equal(Q, 2 * NINE)
    assert torch.equal(named["attention"], 3 * NINE)
    with pytest.raises(TypeError, match="outputs must be tensors in tuples, lists or mappings, got str"):
        D4["rotate_90"].undo("turned")


def negated(x: Tensor) -> Tensor:
    """Mirror inputs at the origin."""
    return -x


def test_a_group_of_ones_own_says_how_answers_are_restored() -> None:
    """A function that is odd: its answer changes sign with its input; an even one's does not."""
    sample = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    odd = make_symmetries({"mirror": (negated, negated, lambda outputs: (-outputs[0], outputs[1]))}, sample)
    even = make_symmetries({"mirror": (negated, negated, unchanged)}, sample)
    P, Q = torch.ones(2), torch.full((2,), 3.0)
    assert torch.equal(odd["mirror"].undo((P, Q))[0], -P)
    assert torch.equal(odd["mirror"].undo((P, Q))[1], Q)
    assert even["mirror"].undo((P, Q)) == (P, Q)
    assert torch.equal(odd["mirror"].apply(sample), -sample)


@pytest.mark.parametrize(
    "inverse",
    [unchanged, lambda x: x - 1.01, lambda x: x[:, :1], lambda x: x.double()],
    ids=["none", "another shift", "another shape", "another dtype"],
)
def test_an_inverse_that_does_not_undo_is_refused(inverse) -> None:
    """Tried on a sample when the group is made, not met in training."""
    with pytest.raises(ValueError, match="inverse of the symmetry 'shift' must undo it"):
        make_symmetries({"shift": (lambda x: x + 1, inverse)}, torch.zeros(3, 2))


def test_an_empty_group_is_refused_and_rounding_is_not() -> None:
    """A rotation by an angle comes back with rounding errors."""
    with pytest.raises(ValueError, match="symmetries must hold at least one"):
        make_symmetries({}, NINE)
    angle = torch.tensor(0.3)
    turn = torch.stack([torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])])
    sample = torch.randn(5, 2, generator=torch.Generator().manual_seed(1))
    check_symmetries({"turn": Symmetry("turn", lambda x: x @ turn.T, lambda x: x @ turn)}, sample)


def test_a_set_that_is_no_group_has_no_table() -> None:
    """Two quarter turns are a half turn, which is missing; and a sample must tell the members apart."""
    with pytest.raises(ValueError, match="'rotate_90' then 'rotate_90' is none of them"):
        then_table({name: D4[name] for name in ("identity", "rotate_90")}, NINE)
    with pytest.raises(ValueError, match="sample must show the symmetries apart"):
        then_table(D4, torch.zeros(1, 3, 3))
