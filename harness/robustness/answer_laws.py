"""What must hold of a trained model's answers, and of a task's own decoding of them.

Inputs are rows of the training data, moved: within their ranges and far beyond, one unit in the last place
to each side, to the edge values of floating point, and to where the model changes from answering to not
answering. The subject is a `trainables.stressed.StressedModel`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import Tensor

from harness.robustness.law import BrokenLawError, Case, DoesNotApplyError, Subject
from trainables.stressed import PRECISIONS

MOST_ROWS = 6
_EDGES = (0.0, -0.0, 1.0, -1.0, 5e-324, 1e-45, 1.2e-38, 1e19, -1e19, 2e19, 3.4e38, -3.4e38)
_FACTORS = (1.0, -1.0, 10.0, 1e3, 1e-3)


# --- rows to try ------------------------------------------------------------------------------------


def rows_to_try(subject: Subject, *, most: int = MOST_ROWS, extra: tuple[float, ...] = ()) -> Any:
    """Batches of 1 to `most` rows; `extra` are further values that an input may be given."""
    known = subject.rows
    places = st.integers(0, len(known) - 1)
    if not subject.is_float:
        return st.lists(places, min_size=1, max_size=most).map(lambda held: known[held])
    edge_rows = subject.edge_rows
    columns = known.flatten(1).shape[1]
    low, high = subject.ranges
    top = torch.finfo(subject.dtype).max

    def value(column: int) -> SearchStrategy[float]:
        lowest, highest = float(low[column]), float(high[column])
        return st.one_of(
            st.sampled_from((lowest, highest, *_EDGES, *extra)),
            st.floats(min(lowest, highest), max(lowest, highest)),
            st.floats(-top, top, allow_nan=False),
        )

    move = st.integers(0, columns - 1).flatmap(lambda column: st.tuples(st.just(column), value(column)))
    start = st.one_of(
        places.map(lambda place: known[place]),
        st.integers(0, len(edge_rows) - 1).map(lambda place: edge_rows[place]),
    )
    row = st.tuples(
        start,
        st.sampled_from(_FACTORS),
        st.sampled_from((0, 1, -1)),
        st.lists(move, max_size=min(3, columns)),
    )

    def build(drawn: list[tuple[Tensor, float, int, list[tuple[int, float]]]]) -> Tensor:
        made = []
        for first, factor, ulps, moves in drawn:
            held = (first.to(subject.dtype) * factor).reshape(-1).clone()
            for column, moved in moves:
                held[column] = moved
            if ulps:
                held = torch.nextafter(held, torch.full_like(held, math.inf * ulps))
            made.append(held.nan_to_num(nan=math.nan, posinf=top, neginf=-top).reshape(first.shape))
        return torch.stack(made)

    return st.lists(row, min_size=1, max_size=most).map(build)


def inputs_to_try(subject: Subject) -> SearchStrategy[Case]:
    return st.fixed_dictionaries({"inputs": rows_to_try(subject)})


def _spread(held: Tensor, like: Tensor) -> Tensor:
    """What is said of denominators, in the shape of the numerators that share them."""
    return held.reshape(*held.shape, *[1] * (like.ndim - held.ndim)).expand_as(like)


# --- what it answers --------------------------------------------------------------------------------


def check_finite_or_bottom(subject: Subject, case: Case) -> None:
    """Accepted: |Q| >= tau_infer and P/Q finite; bottom: no payload."""
    P, Q, decoded, bottom = subject.answer(case["inputs"])
    wide = _spread(bottom, decoded)
    if not bool(decoded[wide].isnan().all()):
        raise BrokenLawError("a bottom must carry no answer, got a number there")
    if not bool(decoded[~wide].isfinite().all()):
        raise BrokenLawError("an accepted answer must be finite, got one that is not")
    if bool((Q[~bottom].abs() < subject.tau_infer).any()):
        raise BrokenLawError(f"an accepted answer must have |Q| >= {subject.tau_infer:g}")
    quotient = P / _spread(Q, P)
    if not torch.equal(quotient[~wide], decoded[~wide]):
        raise BrokenLawError("an accepted answer must be P/Q, got another number")


def nan_inputs(subject: Subject) -> SearchStrategy[Case]:
    """Rows of which at least the first has a NaN somewhere."""
    if not subject.is_float:
        raise DoesNotApplyError("inputs that are no floats hold no NaN")
    columns = subject.rows.flatten(1).shape[1]

    def spoil(held: tuple[Tensor, int]) -> dict[str, Any]:
        inputs = held[0].clone()
        inputs.flatten(1)[0, held[1]] = math.nan
        return {"inputs": inputs}

    return st.tuples(rows_to_try(subject), st.integers(0, columns - 1)).map(spoil)


def check_nan_is_bottom(subject: Subject, case: Case) -> None:
    """Where an input is NaN there is no answer."""
    inputs = case["inputs"]
    has_nan = inputs.flatten(1).isnan().any(1)
    bottom = subject.answer(inputs).bottom
    refused = bottom.flatten(1).all(1) if bottom.ndim > 1 else bottom
    if not bool(refused[has_nan].all()):
        raise BrokenLawError("a row with a NaN among its inputs must be bottom, got an answer")


def check_batch_does_not_matter(subject: Subject, case: Case) -> None:
    """One by one, in another order and twice over, each row has the same answer."""
    inputs = case["inputs"]
    together = subject.answer(inputs)
    apart = [subject.answer(row) for row in inputs.split(1)]
    backwards = subject.answer(inputs.flip(0))
    twice = subject.answer(torch.cat([inputs, inputs]))
    ways = {
        "one by one": _joined(apart),
        "in the opposite order": tuple(item.flip(0) for item in backwards),
        "beside themselves": tuple(item[: len(inputs)] for item in twice),
    }
    for name, (P, Q, decoded, bottom) in ways.items():
        flipped = bottom != together.bottom
        # At the threshold the last place of a sum decides.
        near = _close(Q.abs(), torch.full_like(Q, subject.tau_infer)) | _huge(together.P, Q)
        if bool((flipped & ~near).any()):
            raise BrokenLawError(f"rows must be answered alike {name}, got another set of bottoms")
        both = _spread(~(bottom | together.bottom) & (Q.abs() >= 0.05), decoded)
        # A sum is rounded as its largest terms are, of which the largest P of a batch gives an idea.
        size = P[both].abs().max() if bool(both.any()) else P.new_ones(())
        if not bool(_close(decoded, together.decoded, size)[both].all()):
            raise BrokenLawError(f"rows must be answered alike {name}, got other answers")


def _joined(parts: list[Any]) -> tuple[Tensor, ...]:
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def _close(one: Tensor, other: Tensor, size: Tensor | float = 1.0) -> Tensor:
    wide = 1e-3 if one.dtype == torch.float32 else 1e-6
    return (one - other).abs() <= wide * (other.abs() + torch.as_tensor(size).clamp_min(1.0))


def _huge(P: Tensor, Q: Tensor) -> Tensor:
    """Where a quotient may or may not overflow by the rounding of a sum."""
    limit = torch.finfo(P.dtype).max / 1e4
    big = (P.abs() > limit) | P.isnan()
    return (big.flatten(Q.ndim).any(-1) if P.ndim > Q.ndim else big) | (Q.abs() > limit) | Q.isnan()


def check_asked_twice(subject: Subject, case: Case) -> None:
    """The model draws nothing and keeps nothing."""
    first, second = subject.answer(case["inputs"]), subject.answer(case["inputs"])
    for one, other in zip(first, second, strict=True):
        if not torch.equal(one.nan_to_num(nan=0.5), other.nan_to_num(nan=0.5)):
            raise BrokenLawError("the same rows must get the same answers, got others the second time")


def with_thresholds(subject: Subject) -> SearchStrategy[Case]:
    """Rows, and a factor by which the threshold grows."""
    factors = st.sampled_from((1.0, 1.0 + 1e-6, 2.0, 1e3, 1e6)) | st.floats(1.0, 1e9)
    return st.fixed_dictionaries({"inputs": rows_to_try(subject), "factor": factors})


def check_bottoms_grow(subject: Subject, case: Case) -> None:
    """A larger threshold refuses at least what a smaller one does, and leaves the other answers alone."""
    P, Q, decoded, bottom = subject.answer(case["inputs"])
    more, larger = subject.decode(P, Q, subject.config.tau_infer * case["factor"])
    if bool((bottom & ~larger).any()):
        raise BrokenLawError("what is bottom must stay bottom under a larger tau_infer, got an answer")
    kept = _spread(~larger, decoded)
    if not torch.equal(more[kept], decoded[kept]):
        raise BrokenLawError("a larger tau_infer must change no answer that it leaves, got another")


def in_precisions(subject: Subject) -> SearchStrategy[Case]:
    """Rows, and a precision to run the model in."""
    names = []
    for name in PRECISIONS:
        try:
            subject.answer_in(name, subject.rows[:1])
        except (RuntimeError, TypeError, ValueError, NotImplementedError):  # no such kernel, or no such cast
            continue
        names.append(name)
    if not names:
        raise DoesNotApplyError("the model runs in no other precision")
    return st.fixed_dictionaries({"precision": st.sampled_from(names), "inputs": rows_to_try(subject)})


def check_other_precision(subject: Subject, case: Case) -> None:
    """Overflow in a narrower type becomes bottom, never an answer."""
    P, Q, decoded, bottom = subject.answer_in(case["precision"], case["inputs"])
    del P, Q
    wide = _spread(bottom, decoded)
    if not bool(decoded[~wide].isfinite().all()):
        raise BrokenLawError(f"accepted answers in {case['precision']} must be finite, got one that is not")
    if not bool(decoded[wide].isnan().all()):
        raise BrokenLawError(f"a bottom in {case['precision']} must carry no answer, got a number")


# --- the task's own decoding ---------------------------------------------------------------------------


def tuples_to_try(subject: Subject) -> SearchStrategy[Case]:
    """Tuples (P, Q) with |Q| at, below and above the threshold, zeros, and what is not finite."""
    tau = subject.tau_infer
    exact = torch.tensor(tau, dtype=subject.dtype)
    below = float(torch.nextafter(exact, torch.zeros_like(exact)))
    above = float(torch.nextafter(exact, torch.full_like(exact, math.inf)))
    top = float(torch.finfo(subject.dtype).max)
    edges = (
        0.0,
        tau,
        below,
        above,
        1.0,
        -tau,
        -below,
        -0.0,
        tau / 2,
        5e-324,
        top,
        math.inf,
        -math.inf,
        math.nan,
    )
    numbers = st.sampled_from((1.0, 0.0, -1.0, 2e19, top, math.inf, math.nan)) | st.floats(-1e6, 1e6)
    pair = st.tuples(numbers, st.sampled_from(edges) | st.floats(-10.0, 10.0))
    return st.lists(pair, min_size=1, max_size=MOST_ROWS).map(
        lambda pairs: {
            "P": torch.tensor([p for p, _ in pairs], dtype=subject.dtype),
            "Q": torch.tensor([q for _, q in pairs], dtype=subject.dtype),
        }
    )


def check_own_decode(subject: Subject, case: Case) -> None:
    """What the task accepts, strict decoding accepts, and with the same answer."""
    P, Q = case["P"], case["Q"]
    answers, accepted = subject.own_decode(P, Q, subject.tau_infer)
    decoded, bottom = subject.decode(P, Q)
    wrong = accepted.to(torch.bool) & bottom
    if bool(wrong.any()):
        at = int(wrong.nonzero()[0])
        raise BrokenLawError(
            f"decode must refuse |Q| < {subject.tau_infer:g} and what is not finite, "
            f"got P={float(P[at]):g}, Q={float(Q[at]):g} accepted"
        )
    both = accepted.to(torch.bool) & ~bottom
    if not bool(torch.isclose(answers[both].to(decoded.dtype), decoded[both], rtol=1e-5, atol=0.0).all()):
        raise BrokenLawError("decode must answer P/Q, got another number")
