"""Laws of lifting targets to tuples: group 22."""

from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import strategies as st

from harness.robustness.edge_values import any_values, batches, finite_values
from harness.robustness.law import BrokenLawError, Case, Property, Subject, library_law
from harness.robustness.tensors import on, same

FIELDS = ("Y_n", "Y_d", "mask_finite", "mask_bottom", "orientation_label", "bottom_kind")

WORDS = {  # status: Y_n (None: the value), Y_d, finite, bottom, orientation
    "finite": (None, 1, True, False, 0),
    "bottom": (1, 0, False, True, 0),
    "censored_below": (-1, 0, False, True, -1),
    "censored_above": (1, 0, False, True, 1),
    "domain_invalid": (1, 0, False, True, 0),
    "missing": (0, 1, False, False, 0),
    "fault": (1, 0, False, True, 0),
}


def _lifting_is_total(subject: Subject, case: Case) -> None:
    (values,) = on(subject, case, "values")
    Y_n, Y_d = subject.lift(values)
    if (Y_n.shape, Y_n.dtype, Y_d.shape, Y_d.dtype) != (values.shape, values.dtype) * 2:
        raise BrokenLawError(f"{values.dtype} is lifted to {Y_n.dtype} and {Y_d.dtype} of {tuple(Y_n.shape)}")
    if not bool((Y_n.isfinite() & ((Y_d == 0) | (Y_d == 1)) & ((Y_n != 0) | (Y_d != 0))).all()):
        raise BrokenLawError(f"lifted to {Y_n.tolist()} over {Y_d.tolist()}")


def _lifting_can_be_undone(subject: Subject, case: Case) -> None:
    (values,) = on(subject, case, "values")
    Y_n, Y_d = subject.lift(values)
    back = torch.where(Y_d == 1, Y_n, torch.copysign(torch.full_like(Y_n, math.inf), Y_n))
    known = ~values.isnan()
    signs = torch.signbit(back) == torch.signbit(values)
    if not bool(((back == values) & signs)[known].all()):
        raise BrokenLawError(f"{values.tolist()} is lifted to what reads {back.tolist()}")
    if not bool((Y_d[values.isnan()] == 0).all()):
        raise BrokenLawError("a NaN is lifted to a number")


def _lifting_is_odd(subject: Subject, case: Case) -> None:
    (values,) = on(subject, case, "values")
    (Y_n, Y_d), (minus_n, minus_d) = subject.lift(values), subject.lift(-values)
    known = ~values.isnan()
    if not same(minus_n[known], -Y_n[known]) or not same(minus_d, Y_d):
        raise BrokenLawError(
            f"of {(-values).tolist()} it is {minus_n.tolist()}, of its negative {Y_n.tolist()}"
        )


def _arrays_lift_as_tensors_do(subject: Subject, case: Case) -> None:
    values = case["values"]
    for name, tensor, array in zip(
        ("Y_n", "Y_d"), subject.lift(values), subject.lift(values.numpy()), strict=True
    ):
        if not same(tensor, torch.from_numpy(array)) or array.dtype != values.numpy().dtype:
            raise BrokenLawError(f"{name} of an array is {array.tolist()}, of a tensor {tensor.tolist()}")


def _words_say_what_a_row_is(subject: Subject, case: Case) -> None:
    (values,) = on(subject, case, "values")
    lifted = subject.lift_words(values, case["words"])
    for row, word in enumerate(case["words"]):
        n, d, finite, bottom, orientation = WORDS[word]
        expected = (float(values[row]) if n is None else n, d, finite, bottom, orientation)
        got = tuple(getattr(lifted, field)[row].item() for field in FIELDS[:5])
        if got != expected:
            raise BrokenLawError(f"{word!r} with {float(values[row])} is {got}, not {expected}")


def _payloads_never_show(subject: Subject, case: Case) -> None:
    (values,) = on(subject, case, "values")
    finite = torch.tensor(
        [word == "finite" for word in case["words"]], dtype=torch.bool, device=values.device
    )
    plain, spoilt = (
        subject.lift_words(torch.where(finite, values, payload), case["words"])
        for payload in (0.5, case["payload"])
    )
    for field in FIELDS:
        if not same(getattr(plain, field), getattr(spoilt, field)):
            raise BrokenLawError(f"{field} shows the payload {case['payload']} of a row without a number")


def _law(name: str, law: str, cases: Any, check: Any, needs: tuple[str, ...] = ("lift",)) -> Property:
    return library_law(name, 22, law, needs, cases, check)


def _values(subject: Subject) -> Any:
    return batches(subject.dtypes, {"values": "any"}, least=0)


def _arrays(subject: Subject) -> Any:
    held = [dtype for dtype in subject.dtypes if dtype != torch.bfloat16]  # NumPy has none
    return batches(held or [torch.float32], {"values": "any"}, least=0)


def _labelled(subject: Subject) -> Any:
    statuses = [word for word in WORDS if word in subject.statuses]

    @st.composite
    def draw_case(draw: st.DrawFn) -> dict[str, Any]:
        dtype = draw(st.sampled_from(list(subject.dtypes)))
        row = st.tuples(st.sampled_from(statuses), finite_values(dtype))
        rows = draw(st.lists(row, max_size=6))
        return {
            "values": torch.tensor([value for _, value in rows], dtype=dtype),
            "words": [word for word, _ in rows],
            "payload": draw(any_values(dtype)),
        }

    return draw_case()


TARGET_LAWS: list[Property] = [
    _law(
        "lifting_is_total",
        "Any target is lifted to finite tuples, Y_d 0 or 1, never (0, 0), in its own shape and dtype.",
        _values,
        _lifting_is_total,
    ),
    _law(
        "lifting_can_be_undone",
        "Finite targets and infinities come back from their tuples, signs of zeros too; NaN is a bottom.",
        _values,
        _lifting_can_be_undone,
    ),
    _law("lifting_is_odd", "The tuple of -y is (-Y_n, Y_d).", _values, _lifting_is_odd),
    _law(
        "arrays_lift_as_tensors_do",
        "NumPy arrays are lifted as tensors are.",
        _arrays,
        _arrays_lift_as_tensors_do,
    ),
    _law(
        "words_say_what_a_row_is",
        "Each status gives the tuple, the masks and the orientation of its row of the table of statuses.",
        _labelled,
        _words_say_what_a_row_is,
        ("lift_words", "statuses"),
    ),
    _law(
        "payloads_never_show",
        "What stands in a row without a number shows in no field.",
        _labelled,
        _payloads_never_show,
        ("lift_words", "statuses"),
    ),
]
