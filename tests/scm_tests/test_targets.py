"""Targets: the recorded liftings, the seven statuses, and which rows may train what."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scm.training.targets import (
    STATUS_CODES,
    STATUSES,
    SemanticTargets,
    lift_semantic_targets,
    lift_sentinel_targets,
    lift_targets,
)

FIELDS = ("Y_n", "Y_d", "mask_finite", "mask_bottom", "orientation_label", "bottom_kind")


def _expected_error(case):
    name = case["expected"].get("raises")
    return {"ValueError": ValueError, "TypeError": TypeError}[name] if name else None


def test_lift_targets_matches_the_recorded_cases(vector_group, decode_numbers):
    """Every recorded sentinel becomes the recorded tuple, for tensors and for arrays."""
    for case in vector_group("lift_targets"):
        if case.get("as_python_list"):
            with pytest.raises(TypeError, match="targets must be"):
                lift_targets(case["targets"])
            continue
        values = np.array(decode_numbers(case["targets"]), dtype=np.float64)
        for lifted in (lift_targets(torch.from_numpy(values)), lift_targets(values)):
            for name, got in zip(("Y_n", "Y_d"), lifted, strict=True):
                expected = np.array(decode_numbers(case["expected"][name]))
                np.testing.assert_array_equal(np.asarray(got), expected, err_msg=case["id"])
                assert np.array_equal(np.signbit(np.asarray(got)), np.signbit(expected)), case["id"]


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_lift_targets_keeps_the_dtype(dtype):
    """Of tensors and of arrays, in both members of the tuple."""
    values = [1.5, np.inf, -np.inf, np.nan]
    for lifted in (lift_targets(np.array(values, dtype=dtype)), lift_targets(torch.tensor(values))):
        expected = dtype if isinstance(lifted[0], np.ndarray) else "torch.float32"
        assert {str(member.dtype) for member in lifted} == {expected}
    tensors = lift_targets(torch.tensor(values, dtype=getattr(torch, dtype)))
    assert {str(member.dtype) for member in tensors} == {f"torch.{dtype}"}


def test_targets_move_and_are_selected_as_tensors_are():
    """To a device, to a dtype (the tuple alone), and by positions of any shape, masks and slices."""
    lifted = lift_semantic_targets(torch.arange(4.0), torch.tensor([0, 1, 2, 6]))
    there = lifted.to("meta", torch.float64)
    assert {getattr(there, field).device.type for field in FIELDS} == {"meta"}
    assert (there.Y_n.dtype, there.Y_d.dtype, there.bottom_kind.dtype) == (
        *(torch.float64, torch.float64),
        torch.int64,
    )
    for rows in (torch.tensor([2, 0]), torch.tensor([[3, 1], [0, 0]]), lifted.mask_finite, slice(1, 3)):
        for field in FIELDS:
            assert torch.equal(getattr(lifted.index(rows), field), getattr(lifted, field)[rows])


def test_words_may_come_in_an_array():
    """An array of words is read as the nested lists of the same words are."""
    values = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    words = [["finite", "bottom"], ["fault", "missing"]]
    by_array, by_lists = (lift_semantic_targets(values, labels) for labels in (np.array(words), words))
    for field in FIELDS:
        assert torch.equal(getattr(by_array, field), getattr(by_lists, field)), field


@pytest.mark.parametrize("kind", [np.int8, np.uint16, np.int64])
def test_codes_may_be_of_any_integer_type(kind):
    """Arrays of codes are read as tensors of int64."""
    lifted = lift_semantic_targets(torch.ones(3), np.array([0, 2, 6], dtype=kind))
    assert lifted.bottom_kind.tolist() == [0, 2, 1]
    assert lifted.bottom_kind.dtype == lifted.orientation_label.dtype == torch.int64


def test_no_rows_have_targets_too():
    """Of an empty batch every field is empty and of its own dtype, however the labels are told."""
    for labels in ([], np.array([], dtype=np.int64), torch.tensor([], dtype=torch.int64)):
        lifted = lift_semantic_targets(torch.ones(0), labels)
        assert len(lifted) == 0
        assert (lifted.Y_n.dtype, lifted.bottom_kind.dtype) == (torch.float32, torch.int64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_targets_are_of_the_dtype_and_device_of_the_values(dtype):
    """The device "meta" has no values: what is made elsewhere, or read, would be an error there."""
    values = torch.zeros(5, dtype=dtype, device="meta")
    codes = torch.zeros(5, dtype=torch.int64, device="meta")
    for lifted in (lift_sentinel_targets(values), lift_semantic_targets(values, codes)):
        assert (lifted.Y_n.dtype, lifted.Y_d.dtype) == (dtype, dtype)
        assert {getattr(lifted, field).device.type for field in FIELDS} == {"meta"}


def test_lift_targets_keeps_integers():
    """Integer targets stay integers, and all of them are finite."""
    Y_n, Y_d = lift_targets(torch.tensor([3, -1]))
    assert (Y_n.dtype, Y_d.dtype) == (torch.int64, torch.int64)
    assert Y_n.tolist() == [3, -1]
    assert Y_d.tolist() == [1, 1]


def test_lift_semantic_targets_matches_the_recorded_cases(vector_group, decode_numbers):
    """Every recorded label set gives the recorded fields or the recorded error, as words and as codes."""
    for case in vector_group("lift_semantic_targets"):
        values = torch.tensor(decode_numbers(case["targets"]), dtype=torch.float64)
        error = _expected_error(case)
        if error is not None:
            with pytest.raises(error):
                lift_semantic_targets(values, case["status_labels"])
            continue
        codes = torch.from_numpy(
            np.vectorize(STATUS_CODES.get, otypes=[np.int64])(np.array(case["status_labels"], dtype=object))
        )
        for labels in (case["status_labels"], codes, codes.to(torch.uint8), codes.numpy()):
            lifted = lift_semantic_targets(values, labels)
            for field in FIELDS:
                expected = np.array(decode_numbers(case["expected"][field]))
                got = getattr(lifted, field).numpy()
                np.testing.assert_array_equal(got, expected.astype(got.dtype), err_msg=case["id"])


def test_numpy_targets_give_numpy_fields():
    """Arrays in, arrays out, of the same dtype and shape."""
    values = np.array([[1.5, np.nan]], dtype=np.float32)
    lifted = lift_semantic_targets(values, [["finite", "bottom"]])
    assert all(isinstance(getattr(lifted, field), np.ndarray) for field in FIELDS)
    assert lifted.Y_n.dtype == np.float32
    assert lifted.Y_n.tolist() == [[1.5, 1.0]]


def test_only_finite_rows_and_semantic_bottoms_are_trained():
    """Fault and missing rows are trained as nothing; only censored rows have a direction."""
    lifted = lift_semantic_targets(torch.zeros(7), list(STATUSES))
    assert dict(zip(STATUSES, lifted.mask_trained.tolist(), strict=True)) == {
        "finite": True,
        "bottom": True,
        "censored_below": True,
        "censored_above": True,
        "domain_invalid": True,
        "missing": False,
        "fault": False,
    }
    oriented = [name for name, is_oriented in zip(STATUSES, lifted.mask_oriented, strict=True) if is_oriented]
    assert oriented == ["censored_below", "censored_above"]
    assert not bool((lifted.mask_oriented & ~lifted.mask_semantic).any())


def test_sentinels_read_as_statuses_leave_nan_without_direction():
    """A nan sentinel is a bottom, but unlike in the bare tuple it is no +infinity."""
    y = torch.tensor([2.0, torch.inf, -torch.inf, torch.nan])
    lifted = lift_sentinel_targets(y)
    Y_n, Y_d = lift_targets(y)
    assert torch.equal(lifted.Y_n, Y_n)
    assert torch.equal(lifted.Y_d, Y_d)
    assert lifted.orientation_label.tolist() == [0, 1, -1, 0]
    assert lifted.mask_trained.tolist() == [True] * 4
    with pytest.raises(TypeError, match="targets must be a torch.Tensor"):
        lift_sentinel_targets([1.0])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (torch.tensor([7, 0]), ValueError, "status codes must be in 0..6, got 7"),
        (torch.tensor([-1, 0]), ValueError, "status codes must be in 0..6, got -1"),
        (torch.tensor([0]), ValueError, "must have the shape of targets"),
        (torch.tensor([0.0, 1.0]), TypeError, "words or integer codes"),
        (torch.tensor([True, False]), TypeError, "words or integer codes"),
        ("finite", ValueError, "must have the shape of targets"),
        (["finite", "Finite"], ValueError, "status must be one of"),
        ([0, 1], TypeError, "must be words or an integer tensor"),
        ({"finite"}, TypeError, "must be words or an integer tensor"),
        (torch.tensor([0, 0]), ValueError, "needs a finite value"),
        (["finite", "finite"], ValueError, "needs a finite value"),
    ],
    ids=lambda value: str(value)[:20] if not isinstance(value, type) else value.__name__,
)
def test_bad_labels_are_refused(labels, error, message):
    """Each way of labelling wrongly is refused with the rule it breaks."""
    with pytest.raises(error, match=message):
        lift_semantic_targets(torch.tensor([1.0, torch.nan]), labels)


def test_values_of_another_type_are_refused():
    """Python lists of values are refused rather than guessed a dtype for."""
    with pytest.raises(TypeError, match="targets must be"):
        lift_semantic_targets([1.0], ["finite"])


def _random_targets(n: int = 12) -> SemanticTargets:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(len(STATUSES), (n,), generator=generator)
    return lift_semantic_targets(torch.randn(n, generator=generator), codes)


@pytest.mark.parametrize(
    "rows",
    [torch.tensor([3, 1, 1]), torch.arange(12) % 2 == 0, slice(2, 5)],
    ids=["positions", "mask", "slice"],
)
def test_index_selects_rows_of_every_field(rows):
    """Selecting rows commutes with lifting."""
    lifted = _random_targets()
    part = lifted.index(rows)
    for field in (*FIELDS, "mask_trained", "mask_oriented"):
        assert torch.equal(getattr(part, field), getattr(lifted, field)[rows])
    assert len(part) == len(part.Y_n)


def test_to_changes_the_dtype_of_the_tuple_alone():
    """A dtype moves Y_n and Y_d; masks and labels keep theirs."""
    moved = _random_targets().to("cpu", torch.float64)
    assert (moved.Y_n.dtype, moved.Y_d.dtype) == (torch.float64, torch.float64)
    assert (moved.mask_finite.dtype, moved.bottom_kind.dtype) == (torch.bool, torch.int64)
    assert all(torch.equal(a, b) for a, b in zip(moved.to("cpu")._fields(), moved._fields(), strict=True))


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.tuples(st.sampled_from(STATUSES), st.floats(allow_nan=True, allow_infinity=True, width=32)),
        max_size=20,
    )
)
def test_payloads_of_rows_without_a_number_never_show(rows):
    """Whatever stands in a row that is not finite, the lifted fields are the same."""
    labels = [label for label, _ in rows]
    values = torch.tensor([0.5 if label == "finite" else value for label, value in rows])
    lifted = lift_semantic_targets(values, labels)
    plain = lift_semantic_targets(torch.full_like(values, 0.5), labels)
    for field in FIELDS:
        assert torch.equal(getattr(lifted, field), getattr(plain, field))
    assert not bool((lifted.mask_finite & lifted.mask_bottom).any())
