"""What must hold of the task that a trained model serves: its loss, its metrics, its splits.

The subject is a `trainables.stressed.StressedModel`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import Tensor

from harness.robustness.answer_laws import MOST_ROWS
from harness.robustness.law import BrokenLawError, Case, DoesNotApplyError, Subject
from trainables.stressed import TRAINED_STATUSES, code_of, row_bytes

MOST_OF_ITS_OWN = 8  # numbers of a row that are drawn apart


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
