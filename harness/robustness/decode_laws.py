"""Laws of strict decoding and of the sweep over its threshold: groups 10 to 16.

`decode(P, Q, tau_infer, tau_train)` answers with decoded, bottom_mask, gap_mask, fault_mask and
semantic_bottom_mask; rows are decided one by one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from harness.robustness.edge_values import batches, reversed_rows
from harness.robustness.law import BrokenLawError, Case, Property, Subject, library_law
from harness.robustness.tensors import gradients_of, leaves, on, same

PARTS = ("decoded", "bottom_mask", "gap_mask", "fault_mask", "semantic_bottom_mask")

TUPLES = {"P": "any", "Q": "any"}


def _accepted_is_finite(subject: Subject, case: Case) -> None:
    found = subject.decode(*on(subject, case, "P", "Q"), case["tau"])
    accepted = found.decoded[~found.bottom_mask]
    if not bool(accepted.isfinite().all()):
        raise BrokenLawError(f"accepted answers are {accepted.tolist()}")


def _bottom_is_the_rule(subject: Subject, case: Case) -> None:
    P, Q = on(subject, case, "P", "Q")
    found = subject.decode(P, Q, case["tau"])
    semantic = (Q == 0) | (Q.abs() < torch.tensor(case["tau"], dtype=Q.dtype, device=Q.device))
    quotient = P / Q
    fault = ~P.isfinite() | ~Q.isfinite() | (~semantic & ~quotient.isfinite())
    expected = {
        "bottom_mask": semantic | fault,
        "semantic_bottom_mask": semantic,
        "fault_mask": fault,
        "decoded": torch.where(semantic | fault, math.nan, quotient),
    }
    for part, value in expected.items():
        if not same(getattr(found, part).to(value.dtype), value):
            raise BrokenLawError(f"{part} is {getattr(found, part).tolist()}, by the rule {value.tolist()}")


def _arrays_are_tensors(subject: Subject, case: Case) -> None:
    P, Q = case["P"], case["Q"]
    found, by_array = (subject.decode(p, q, case["tau"]) for p, q in ((P, Q), (P.numpy(), Q.numpy())))
    for part in PARTS:
        held = torch.from_numpy(getattr(by_array, part))
        if not same(held, getattr(found, part)):
            raise BrokenLawError(
                f"{part} of arrays is {held.tolist()}, of tensors {getattr(found, part).tolist()}"
            )


def _bottoms_have_no_gradient(subject: Subject, case: Case) -> None:
    P, Q = leaves(subject, case, "P", "Q")
    found = subject.decode(P, Q, case["tau"])
    answers = torch.where(found.bottom_mask, 0.0, found.decoded)
    for member, gradient in zip("PQ", gradients_of(answers.sum(), P, Q), strict=True):
        if bool(gradient.isnan().any()) or not bool((gradient[found.bottom_mask] == 0).all()):
            raise BrokenLawError(
                f"the gradient on {member} is {gradient.tolist()}, bottoms {found.bottom_mask.tolist()}"
            )


def _bottoms_grow_with_tau(subject: Subject, case: Case) -> None:
    P, Q = on(subject, case, "P", "Q")
    loose, tight = (subject.decode(P, Q, case[name]) for name in ("tau", "tau_high"))
    if bool((loose.bottom_mask & ~tight.bottom_mask).any()):
        raise BrokenLawError(f"tau {case['tau_high']:.9g} accepts what {case['tau']:.9g} rejects")
    kept = ~tight.bottom_mask
    if not same(loose.decoded[kept], tight.decoded[kept]):
        raise BrokenLawError("an accepted answer depends on tau")


def _rates_by_hand(subject: Subject, case: Case) -> dict[str, list[float]]:
    q, in_range = on(subject, case, "Q", "in_range")
    q = q.abs()
    rates: dict[str, list[float]] = {"fn_in": [], "fp_cens": [], "bottom_rate": []}
    for tau in case["taus"]:
        bottom = subject.decode(torch.zeros_like(q), q, tau).bottom_mask
        rates["fn_in"].append(_mean(bottom[in_range]))
        rates["fp_cens"].append(_mean(~bottom[~in_range]))
        rates["bottom_rate"].append(_mean(bottom))
    return rates


def _mean(flags: Tensor) -> float:
    return float(flags.double().mean()) if flags.numel() else math.nan


def _sweep_is_decoding(subject: Subject, case: Case) -> None:
    q, in_range = on(subject, case, "Q", "in_range")
    curves = subject.sweep(q.abs(), in_range, case["taus"])
    for name, expected in _rates_by_hand(subject, case).items():
        for tau, got, rate in zip(case["taus"], curves[name], expected, strict=True):
            if not (abs(got - rate) <= 1e-6 or (math.isnan(got) and math.isnan(rate))):
                raise BrokenLawError(f"at tau {tau:.9g} {name} is {got}, by decoding {rate}")


def _sweep_is_monotone(subject: Subject, case: Case) -> None:
    q, in_range = on(subject, case, "Q", "in_range")
    curves = subject.sweep(q.abs(), in_range, sorted(case["taus"]))
    for name, sign in (("fn_in", 1), ("bottom_rate", 1), ("fp_cens", -1)):
        values = [sign * value for value in curves[name]]
        if any(later < earlier - 1e-6 for earlier, later in itertools.pairwise(values)):
            raise BrokenLawError(f"{name} is {list(curves[name])} for ascending tau")
    turned = reversed_rows(len(q), 1)
    other = subject.sweep(q.abs()[turned], in_range[turned], sorted(case["taus"]))
    if any(
        repr(list(curves[name])) != repr(list(other[name])) for name in ("fn_in", "fp_cens", "bottom_rate")
    ):
        raise BrokenLawError("the rates depend on the order of rows")


def _decoding_knows_signs(subject: Subject, case: Case) -> None:
    P, Q = on(subject, case, "P", "Q")
    plain = subject.decode(P, Q, case["tau"])
    for what, other, sign in (
        ("(-P, -Q)", subject.decode(-P, -Q, case["tau"]), 1),
        ("(-P, Q)", subject.decode(-P, Q, case["tau"]), -1),
    ):
        if not same(plain.bottom_mask, other.bottom_mask) or not same(sign * plain.decoded, other.decoded):
            raise BrokenLawError(f"{what} is {other.decoded.tolist()}, (P, Q) is {plain.decoded.tolist()}")


def _answers_ignore_the_scale(subject: Subject, case: Case) -> None:
    P, Q = on(subject, case, "P", "Q")
    s = case["sign"] * 2.0 ** case["exponent"]
    exact = (P * s / s == P) & (Q * s / s == Q) & (P * s).isfinite() & (Q * s).isfinite()
    # Lengths beyond the square root of the largest number are taken another way, and rounded otherwise.
    width = 4.0 * torch.finfo(P.dtype).eps
    share = Q.double().abs() / torch.hypot(P.double(), Q.double())
    exact &= ~((share - case["tau"]).abs() <= width * case["tau"])
    # Squares that leave float64 send a tuple to (0, 0), as they do in the peer library.
    length = torch.hypot(P.double(), Q.double())
    small, large = torch.minimum(length, length * abs(s)), torch.maximum(length, length * abs(s))
    exact &= ((small > 1e-150) & (large < 1e150)) | (length == 0)
    P, Q = P[exact], Q[exact]
    plain, scaled = subject.answer(P, Q, case["tau"]), subject.answer(P * s, Q * s, case["tau"])
    if not same(plain.bottom_mask, scaled.bottom_mask):
        raise BrokenLawError(
            f"bottoms of {s:g} (P, Q) are {scaled.bottom_mask.tolist()}, "
            f"of (P, Q) {plain.bottom_mask.tolist()}"
        )
    one, other = plain.decoded[~plain.bottom_mask], scaled.decoded[~plain.bottom_mask]
    if not torch.allclose(one, other, rtol=width, atol=float(torch.finfo(P.dtype).tiny)):
        raise BrokenLawError(f"{s:g} (P, Q) is {other.tolist()}, (P, Q) is {one.tolist()}")


def _rows_are_decided_alone(subject: Subject, case: Case) -> None:
    P, Q = on(subject, case, "P", "Q")
    taus = (case["tau"], case["tau_high"])
    whole = subject.decode(P, Q, *taus)
    order = reversed_rows(len(P), case["turn"])
    turned = subject.decode(P[order], Q[order], *taus)
    singles = [subject.decode(P[row : row + 1], Q[row : row + 1], *taus) for row in range(len(P))]
    for part in PARTS:
        held = getattr(whole, part)
        if not same(torch.cat([getattr(single, part) for single in singles]), held):
            raise BrokenLawError(f"{part} of single rows is not that of the batch, {held.tolist()}")
        if not same(getattr(turned, part), held[order]):
            raise BrokenLawError(f"{part} depends on the order of rows")


def _masks_partition_the_batch(subject: Subject, case: Case) -> None:
    P, Q = on(subject, case, "P", "Q")
    found = subject.decode(P, Q, case["tau"], case["tau_high"])
    high = torch.tensor(case["tau_high"], dtype=Q.dtype, device=Q.device)
    gap = ~found.bottom_mask & (Q.abs() < high)
    if not same(found.gap_mask, gap):
        raise BrokenLawError(
            f"the gap is {found.gap_mask.tolist()}, |Q| in [tau_infer, tau_train) is {gap.tolist()}"
        )
    if bool((found.gap_mask & found.bottom_mask).any()):
        raise BrokenLawError("a row is bottom and in the gap")
    if not same(found.bottom_mask, found.fault_mask | found.semantic_bottom_mask):
        raise BrokenLawError("a bottom is neither fault nor semantic, or one of these is no bottom")


# --- the table -----------------------------------------------------------------------------------


def _law(
    name: str, group: int, law: str, cases: Any, check: Any, needs: tuple[str, ...] = ("decode",)
) -> Property:
    return library_law(name, group, law, needs, cases, check)


def _rows(*near: str, **plain: Any) -> Callable[[Subject], Any]:
    return lambda subject: batches(subject.dtypes, TUPLES, near=near, plain=plain)


def _arrays(subject: Subject) -> Any:
    held = [dtype for dtype in subject.dtypes if dtype != torch.bfloat16]  # NumPy has none
    return batches(held or [torch.float32], TUPLES, near=("tau",))


def _swept(kind: str) -> Callable[[Subject], Any]:
    taus = st.lists(st.sampled_from([1.0, 1e-6, 1e-4, 0.5]) | st.floats(1e-6, 10.0), min_size=1, max_size=4)
    return lambda subject: batches(subject.dtypes, {"Q": kind, "in_range": "flag"}, plain={"taus": taus})


DECODE_LAWS: list[Property] = [
    _law(
        "accepted_answers_are_finite",
        10,
        "What is not bottom has a finite value, whatever the tuple holds.",
        _rows("tau"),
        _accepted_is_finite,
    ),
    _law(
        "bottom_is_where_the_rule_says",
        11,
        "Bottom is |Q| < tau, Q = 0 or a P, Q or P/Q that is not finite, its value is NaN, any other P/Q.",
        _rows("tau"),
        _bottom_is_the_rule,
    ),
    _law(
        "arrays_decode_as_tensors_do",
        11,
        "NumPy arrays decode to what tensors decode to.",
        _arrays,
        _arrays_are_tensors,
    ),
    _law(
        "bottoms_have_no_gradient",
        11,
        "The gradient of decoded answers is 0 at bottoms and nowhere NaN.",
        _rows("tau"),
        _bottoms_have_no_gradient,
    ),
    _law(
        "bottoms_grow_with_tau",
        12,
        "A larger threshold rejects what a smaller one does, and leaves accepted answers as they are.",
        _rows("tau", "tau_high"),
        _bottoms_grow_with_tau,
    ),
    _law(
        "sweep_counts_what_decoding_rejects",
        12,
        "The rates of a sweep over thresholds are those of decoding with each.",
        _swept("finite"),
        _sweep_is_decoding,
        ("sweep", "decode"),
    ),
    _law(
        "sweep_rejects_what_is_not_finite",
        12,
        "The same where |Q| is NaN or infinite in some rows.",
        _swept("any"),
        _sweep_is_decoding,
        ("sweep", "decode"),
    ),
    _law(
        "sweep_is_monotone",
        12,
        "With tau fewer rows are accepted, in range and out of it; the order of rows does not matter.",
        _swept("any"),
        _sweep_is_monotone,
        ("sweep",),
    ),
    _law(
        "decoding_knows_signs",
        13,
        "(-P, -Q) decodes to what (P, Q) does, (-P, Q) to its negative, with the same bottoms.",
        _rows("tau"),
        _decoding_knows_signs,
    ),
    _law(
        "answers_ignore_the_scale",
        14,
        "s(P, Q) has the answer of (P, Q), for s of both signs, in the gauge recommended for a threshold.",
        lambda subject: batches(
            subject.dtypes,
            {"P": "finite", "Q": "finite"},
            near=("tau",),
            plain={"exponent": st.integers(-100, 100), "sign": st.sampled_from([1.0, -1.0])},
        ),
        _answers_ignore_the_scale,
        ("answer",),
    ),
    _law(
        "rows_are_decided_alone",
        15,
        "One by one, in any order and next to their likes, rows decode to the same, bit for bit.",
        _rows("tau", "tau_high", turn=st.integers(0, 5)),
        _rows_are_decided_alone,
    ),
    _law(
        "masks_partition_the_batch",
        16,
        "Every row is bottom, in the gap (tau_infer <= |Q| < tau_train) or accepted above it; faults and "
        "semantic bottoms together are the bottoms.",
        _rows("tau", "tau_high"),
        _masks_partition_the_batch,
    ),
]
