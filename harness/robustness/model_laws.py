"""What must hold of a trained model and of the task that it serves, with the inputs that it is tried on.

Inputs are rows of the training data, moved: within their ranges and far beyond, one unit in the last place
to each side, to the edge values of floating point, and to where the model changes from answering to not
answering. The subject is a `trainables.stressed.StressedModel`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import Tensor

from harness.robustness.law import BrokenLawError, Case, DoesNotApplyError, Property, Subject
from trainables.stressed import PRECISIONS, TRAINED_STATUSES, code_of, row_bytes

MOST_ROWS = 6
MOST_OF_ITS_OWN = 8  # numbers of a row that are drawn apart
_EDGES = (0.0, -0.0, 1.0, -1.0, 5e-324, 1e-45, 1.2e-38, 1e19, -1e19, 2e19, 3.4e38, -3.4e38)
_FACTORS = (1.0, -1.0, 10.0, 1e3, 1e-3)
_GROUP = 31  # behind those of the library's laws


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


def _inputs(subject: Subject) -> SearchStrategy[Case]:
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


# --- its loss ----------------------------------------------------------------------------------------------


def loss_cases(subject: Subject) -> SearchStrategy[Case]:
    """Training rows with answers (P, Q) at zero, the thresholds and between, and targets of every status."""
    P, Q = subject.tuples(subject.rows[:1])
    scalar_q = Q.numel()
    shape = subject.target_shape
    if tuple(P.shape[1:]) != shape:
        raise DoesNotApplyError(f"P of shape {tuple(P.shape[1:])} and targets of shape {shape} are not alike")
    count = math.prod(shape)
    config = subject.config
    edges = (
        0.0,
        config.tau_infer,
        config.tau_train_min,
        config.tau_train_max,
        1.0,
        -1.0,
        -config.tau_train_min,
    )
    largest = subject.largest_target
    denominators = st.sampled_from(edges) | st.floats(-2.0, 2.0, width=32)
    numerators = st.sampled_from((0.0, 1.0, -1.0, largest)) | st.floats(-largest, largest)
    targets = st.sampled_from((0.0, 1.0, -1.0, largest, -largest)) | st.floats(-largest, largest)
    row = st.fixed_dictionaries(
        {
            "place": st.integers(0, len(subject.rows) - 1),
            "P": _filled(numerators, count),
            "Q": _filled(denominators, scalar_q),
            "value": _filled(targets, count),
            "status": _filled(st.sampled_from(TRAINED_STATUSES), count),
        }
    )

    def build(rows: list[dict[str, Any]]) -> dict[str, Any]:
        status = torch.tensor([[code_of(word) for word in one["status"]] for one in rows])
        value = torch.tensor([one["value"] for one in rows], dtype=subject.dtype)
        return {
            "inputs": subject.rows[[one["place"] for one in rows]],
            "P": torch.tensor([one["P"] for one in rows], dtype=subject.dtype).reshape(-1, *shape),
            "Q": torch.tensor([one["Q"] for one in rows], dtype=subject.dtype).reshape(-1, *Q.shape[1:]),
            "value": value.reshape(-1, *shape),
            "status": status.reshape(-1, *shape),
        }

    return st.lists(row, min_size=1, max_size=MOST_ROWS).map(build)


def _filled(values: SearchStrategy[Any], count: int) -> SearchStrategy[list[Any]]:
    """Lists of `count` values; of many, one fills the list but for a few others at its beginning."""
    if count <= MOST_OF_ITS_OWN:
        return st.lists(values, min_size=count, max_size=count)
    few = st.lists(values, min_size=1, max_size=MOST_OF_ITS_OWN)
    return few.map(lambda held: [*held, *[held[-1]] * (count - len(held))])


def check_loss_finite(subject: Subject, case: Case) -> None:
    """No tuple of ordinary size makes the loss or its gradients anything but finite."""
    said = subject.loss_of_tuples(case["inputs"], case["P"], case["Q"], case["value"], case["status"])
    if not math.isfinite(said.value):
        raise BrokenLawError(f"the loss must be finite, got {said.value:g} at {_where(case)}")
    for name, gradient in zip("PQ", said.gradients, strict=True):
        if not bool(gradient.isfinite().all()):
            raise BrokenLawError(
                f"the gradient of the loss must be finite, got that of {name} at {_where(case)}"
            )


def _where(case: Case) -> str:
    at = (
        int(case["Q"].abs().flatten(1).amin(1).argmin())
        if case["Q"].ndim > 1
        else int(case["Q"].abs().argmin())
    )
    return f"P={case['P'][at].tolist()}, Q={case['Q'][at].tolist()}"


# --- its metrics ------------------------------------------------------------------------------------------


def decoded_cases(subject: Subject) -> SearchStrategy[Case]:
    """Some rows of the val split, with what a model might have answered to them."""
    answer = subject.val_answer
    total = len(answer.bottom)
    if answer.decoded.shape != answer.bottom.shape:
        raise DoesNotApplyError("several answers share a denominator")
    per_row = answer.bottom[0].numel()
    numbers = st.sampled_from((0.0, 1.0, -1.0, 1e3)) | st.floats(-1e4, 1e4, width=32)
    row = st.tuples(
        st.integers(0, total - 1),
        st.lists(st.tuples(st.booleans(), numbers), min_size=per_row, max_size=per_row),
    )

    def build(rows: list[tuple[int, list[tuple[bool, float]]]]) -> dict[str, Any]:
        shape = (-1, *answer.bottom.shape[1:])
        return {
            "rows": torch.tensor([place for place, _ in rows]),
            "bottom": torch.tensor([[b for b, _ in cells] for _, cells in rows]).reshape(shape),
            "decoded": torch.tensor(
                [[number for _, number in cells] for _, cells in rows], dtype=answer.decoded.dtype
            ).reshape(shape),
        }

    return st.lists(row, min_size=1, max_size=MOST_ROWS, unique_by=lambda one: one[0]).map(build)


def check_metrics_total(subject: Subject, case: Case) -> None:
    """Whatever was answered, the task scores it: rates in [0, 1], errors that are no negative numbers."""
    found = subject.metrics(case["decoded"], case["bottom"], case["decoded"], case["rows"])
    for name in ("false_accept_rate", "false_reject_rate"):
        value = found.get(name, math.nan)
        if not (math.isnan(value) or 0.0 <= value <= 1.0):
            raise BrokenLawError(f"{name} must lie in [0, 1], got {value:g}")
    for name in ("accepted_error", "charged_error"):
        if found[name] < 0:
            raise BrokenLawError(f"{name} must be >= 0, got {found[name]:g}")
    if math.isnan(found["charged_error"]) and bool(subject.finite_of_val[case["rows"]].any()):
        raise BrokenLawError("charged_error must be a number where a row is finite, got nan")


def check_metrics_ignore_bottoms(subject: Subject, case: Case) -> None:
    """What stands where nothing was answered scores nothing; only its sign, the direction, may be read."""
    decoded, bottom = case["decoded"], case["bottom"]
    sign = torch.where(decoded < 0, -1.0, 1.0).to(decoded.dtype)
    one = subject.metrics(decoded, bottom, torch.where(bottom, sign, decoded), case["rows"])
    other = subject.metrics(decoded, bottom, torch.where(bottom, 1e3 * sign, decoded), case["rows"])
    for name in ("accepted_error", "charged_error"):
        same = one[name] == other[name] or (math.isnan(one[name]) and math.isnan(other[name]))
        if not same:
            raise BrokenLawError(
                f"{name} must not depend on P at a bottom, got {one[name]:g} and {other[name]:g}"
            )


def check_accepted_bottoms_are_seen(subject: Subject, case: Case) -> None:
    """Refusing every row is a false reject of each finite one and a false accept of none."""
    every = torch.ones_like(case["bottom"])
    found = subject.metrics(case["decoded"], every, torch.zeros_like(case["decoded"]), case["rows"])
    accept, reject = found.get("false_accept_rate", math.nan), found.get("false_reject_rate", math.nan)
    if not (math.isnan(accept) or accept == 0.0):
        raise BrokenLawError(f"false_accept_rate of no answer must be 0, got {accept:g}")
    if not (math.isnan(reject) or reject == 1.0):
        raise BrokenLawError(f"false_reject_rate of no answer must be 1, got {reject:g}")
    if math.isfinite(found["accepted_error"]):
        raise BrokenLawError(f"accepted_error of no answer must be NaN, got {found['accepted_error']:g}")


def check_truth_scores_best(subject: Subject, case: Case) -> None:
    """Answering the label of every finite row, and refusing the others, is charged no more than this."""
    rows = case["rows"]
    truth = subject.val_truth[rows]
    if truth.shape != case["bottom"].shape:
        raise DoesNotApplyError("targets are not of the shape of answers")
    refused = truth.isnan()
    best = subject.metrics(truth.nan_to_num(nan=0.0), refused, truth.nan_to_num(nan=1.0), rows)
    found = subject.metrics(case["decoded"], case["bottom"], case["decoded"], rows)
    slack = 1e-5 * (1.0 + abs(found["charged_error"]))
    if best["charged_error"] > found["charged_error"] + slack:
        raise BrokenLawError(
            f"charged_error of the right answers must be the least, got {best['charged_error']:g}, and "
            f"{found['charged_error']:g} of others"
        )


# --- its splits --------------------------------------------------------------------------------------------


_PAIRS = (("train", "val"), ("train", "test"), ("val", "test"))


def shared_rows(subject: Subject) -> list[dict[str, Any]]:
    """Rows that stand in two splits, where there are more than chance makes.

    Rows that are equal by chance occur inside a split as well: as many rows of another may occur in the first
    of a pair as of its own do more than once, with three standard deviations to spare.
    """
    return list(subject.once("shared_rows", lambda: _shared_rows(subject)))


def _shared_rows(subject: Subject) -> list[dict[str, Any]]:
    held = {name: row_bytes(subject.splits[name]) for name in ("train", "val", "test")}
    return [case for first, name in _PAIRS for case in _shared_by(subject, held, first, name)]


def _shared_by(
    subject: Subject, held: Mapping[str, list[bytes]], first: str, name: str
) -> list[dict[str, Any]]:
    one, other = subject.splits[first], subject.splits[name]
    counts = Counter(held[first])
    places = {row: place for place, row in reversed(list(enumerate(held[first])))}
    repeated = sum(count for count in counts.values() if count > 1) / len(one)
    shared = [(places[row], place) for place, row in enumerate(held[name]) if row in places]
    expected = repeated * len(other)
    if len(shared) <= expected + 3.0 * math.sqrt(expected + 1.0):
        return []
    return [
        {
            "first": first,
            "split": name,
            "inputs": torch.stack([one.inputs[at], other.inputs[place]]),
            "Y_n": torch.stack([one.targets.Y_n[at], other.targets.Y_n[place]]),
            "rows": torch.tensor([at, place]),
        }
        for at, place in shared
    ]


def split_cases(subject: Subject) -> SearchStrategy[Case]:
    """A shared row where there is one, else the first row of the val split."""
    found = shared_rows(subject)
    if found:
        return st.sampled_from(found)
    val = subject.splits["val"]
    return st.just({"first": "train", "split": "val", "inputs": val.inputs[:1], "Y_n": val.targets.Y_n[:1]})


def check_splits_apart(subject: Subject, case: Case) -> None:
    """No row to train on is one to judge by, and none to choose by is one to report."""
    for other in shared_rows(subject):
        same_pair = (other["first"], other["split"]) == (case["first"], case["split"])
        if same_pair and torch.equal(other["inputs"][-1], case["inputs"][-1]):
            place = other["rows"].tolist()
            raise BrokenLawError(
                f"the splits must be disjoint, got row {place[0]} of {case['first']} again as row {place[1]} "
                f"of {case['split']}, more often than equal rows occur within {case['first']}"
            )


def leaking_columns(subject: Subject) -> list[dict[str, Any]]:
    """Inputs that give a label of the val split away.

    Those that are a target, up to a factor and a shift, on all of its finite rows; and those that have one
    value wherever the target is finite and another wherever it is a bottom (missing ones, such as padding,
    may well show among the inputs). Only where there are `_LEAST_VALUES`
    different targets, or rows of either kind: of fewer, an input may be the label by chance.
    """
    return list(subject.once("leaking_columns", lambda: _leaking_columns(subject)))


_LEAST_VALUES = 8
_LABELS = {"target": "a linear function of target", "status": "whether there is a bottom at target"}


def _leaking_columns(subject: Subject) -> list[dict[str, Any]]:
    split = subject.splits["val"]
    inputs = split.inputs.to(torch.float64).flatten(1)
    values = split.targets.Y_n.reshape(len(split), -1).to(torch.float64)
    finite = split.targets.mask_finite.reshape(len(split), -1)
    bottom = split.targets.mask_bottom.reshape(len(split), -1)
    found = []
    for output in range(values.shape[1]):
        rows = finite[:, output].nonzero().squeeze(1)
        columns = [("target", *held) for held in _same_as_target(inputs, values[:, output], rows)]
        columns += [
            ("status", *held) for held in _same_as_status(inputs, finite[:, output], bottom[:, output])
        ]
        for label, column, ends in columns:
            place = {"label": label, "column": column, "output": output}
            found.append(place | {"inputs": split.inputs[ends], "Y_n": split.targets.Y_n[ends]})
    return found


def _same_as_target(inputs: Tensor, values: Tensor, rows: Tensor) -> list[tuple[int, Tensor]]:
    """Columns that are the target on these rows, with the two rows farthest apart."""
    value = values[rows]
    if len(value.unique()) < _LEAST_VALUES:
        return []
    ends = rows[torch.stack([value.argmin(), value.argmax()])]
    held = inputs[rows] - inputs[rows].mean(0)
    value = value - value.mean()
    alike = (held.T @ value).abs() / (held.norm(dim=0) * value.norm())
    # NaN, of a constant column, is not.
    return [(column, ends) for column in (alike > 1 - 1e-9).nonzero().squeeze(1).tolist()]


def _same_as_status(inputs: Tensor, finite: Tensor, bottom: Tensor) -> list[tuple[int, Tensor]]:
    """Columns of one value on the finite rows and another on the bottoms, with a row of each."""
    if min(int(finite.sum()), int(bottom.sum())) < _LEAST_VALUES:
        return []
    ends = torch.stack([finite.to(torch.int8).argmax(), bottom.to(torch.int8).argmax()])
    first, second = inputs[ends]
    same = (inputs[finite] == first).all(0) & (inputs[bottom] == second).all(0) & (first != second)
    return [(column, ends) for column in same.nonzero().squeeze(1).tolist()]


def column_cases(subject: Subject) -> SearchStrategy[Case]:
    """A column that is the label where there is one, else the first."""
    if not subject.is_float:
        raise DoesNotApplyError("inputs that are no floats are not compared with targets")
    found = leaking_columns(subject)
    return st.sampled_from(found) if found else st.just({"label": "target", "column": 0, "output": 0})


def check_label_not_an_input(subject: Subject, case: Case) -> None:
    """No input gives the answer away."""
    keys = ("label", "column", "output")
    for other in leaking_columns(subject):
        if all(other[key] == case[key] for key in keys):
            raise BrokenLawError(
                f"no input may hold the label, got input {case['column']} {_LABELS[case['label']]} "
                f"{case['output']} on the val split"
            )


def check_splits_repeat(subject: Subject, case: Case) -> None:
    """The same seed gives the same data."""
    again = subject.splits_again()
    for name, split in subject.splits.items():
        if split.digest() != again[name].digest():
            raise BrokenLawError(
                f"splits(seed) must repeat itself, got another {name} split for the same seed"
            )


def _law(
    name: str,
    law: str,
    cases: Callable[[Subject], SearchStrategy[Case]],
    check: Callable[[Subject, Case], None],
    needs: tuple[str, ...] = (),
) -> Property:
    return Property(name=name, group=_GROUP, law=law, of="model", cases=cases, check=check, needs=needs)


MODEL_LAWS: Mapping[str, Property] = {
    item.name: item
    for item in (
        _law(
            "answers_are_finite_or_bottom",
            "Every answer is P/Q with |Q| >= tau_infer and finite, or bottom without a payload.",
            _inputs,
            check_finite_or_bottom,
        ),
        _law(
            "nan_inputs_are_bottom",
            "A row with a NaN among its inputs is bottom.",
            nan_inputs,
            check_nan_is_bottom,
        ),
        _law(
            "batches_do_not_matter",
            "A row is answered alike alone, in any order and beside any others.",
            _inputs,
            check_batch_does_not_matter,
        ),
        _law(
            "asked_twice_answers_the_same", "The same rows get the same answers.", _inputs, check_asked_twice
        ),
        _law(
            "bottoms_grow_with_tau",
            "A larger tau_infer refuses more and changes no other answer.",
            with_thresholds,
            check_bottoms_grow,
        ),
        _law(
            "other_precisions_stay_finite",
            "In half, bfloat16 and double precision, what is accepted is finite.",
            in_precisions,
            check_other_precision,
        ),
        _law(
            "own_decode_is_strict",
            "The task's decode accepts nothing below tau_infer and nothing that is not finite.",
            tuples_to_try,
            check_own_decode,
            needs=("own_decode",),
        ),
        _law(
            "loss_is_finite",
            "The training loss and its gradients are finite at every tuple, Q = 0 included.",
            loss_cases,
            check_loss_finite,
        ),
        _law(
            "metrics_are_total",
            "Whatever was answered or refused, the task scores it.",
            decoded_cases,
            check_metrics_total,
        ),
        _law(
            "metrics_ignore_bottoms",
            "P at a bottom changes no error.",
            decoded_cases,
            check_metrics_ignore_bottoms,
        ),
        _law(
            "refusing_all_is_seen",
            "Who answers nothing has rejected every finite row, and has no error.",
            decoded_cases,
            check_accepted_bottoms_are_seen,
        ),
        _law(
            "right_answers_score_best",
            "No answers are charged less than the labels themselves.",
            decoded_cases,
            check_truth_scores_best,
        ),
        _law(
            "splits_are_disjoint",
            "No row is in two splits, beyond what chance makes.",
            split_cases,
            check_splits_apart,
        ),
        _law("labels_are_no_inputs", "No input is the label.", column_cases, check_label_not_an_input),
        _law(
            "splits_repeat",
            "The same seed gives the same splits.",
            lambda subject: st.just({"seed": subject.trained.seed}),
            check_splits_repeat,
        ),
    )
}
