"""Laws of trainings: the multiplier that follows the coverage, packs, micro-batches and going on.

Histories of operations are in `machines`. Where a default of ours cannot satisfy a law, it is stated for the
setting that does, and the limit is in docs/robustness_laws.md.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import Tensor

from harness.robustness.law import BrokenLawError, Case, Property, Subject, library_law
from harness.robustness.same import first_difference, same_bits

SEEDS = st.integers(0, 7)

# --- 23: controllers ------------------------------------------------------------------------------------


@st.composite
def _unwindings(draw: st.DrawFn) -> dict[str, Any]:
    high = draw(st.sampled_from([0.5, 1.0, 2.0]))
    return {
        "low": draw(st.sampled_from([0.0, 0.1])),
        "high": high,
        "rate": draw(st.sampled_from([0.01, 0.1, 1.0])),
        "momentum": draw(st.sampled_from([0.0, 0.5, 0.9])),
        "target": draw(st.sampled_from([0.5, 0.9])),
        "gap": draw(st.sampled_from([0.05, 0.1, -0.1, 0.5, -0.5])),
        "saturated": draw(st.integers(0, 300)),
    }


def _unwinds(subject: Subject, case: Case) -> None:
    """From one bound to the other under a gap of one size, whatever was asked for at the bound before."""
    low, high, target = case["low"], case["high"], case["target"]
    coverage = min(1.0, max(0.0, target - case["gap"]))
    gap = target - coverage
    controller = subject.make_controller(
        {
            "rule": "unbiased",
            "target_coverage": target,
            "learning_rate": case["rate"],
            "lambda_min": low,
            "lambda_max": high,
            "initial_lambda": low if gap > 0 else high,
            "momentum": case["momentum"],
        }
    )
    for _ in range(case["saturated"]):
        controller.observe(1.0 if gap > 0 else 0.0)
    steps = math.ceil((high - low) / (case["rate"] * abs(gap))) + 1  # one for the rounding of the sum
    for _ in range(steps):
        controller.observe(coverage)
    other = high if gap > 0 else low
    if float(controller.lambda_rej) != other:
        raise BrokenLawError(
            f"after {case['saturated']} batches at one bound it must reach {other} within {steps}, "
            f"and is at {float(controller.lambda_rej)!r}"
        )


@st.composite
def _balanced_noise(draw: st.DrawFn) -> dict[str, Any]:
    # Deviations in sixty-fourths, so that their sum is exactly 0.
    half = draw(st.lists(st.integers(1, 16), min_size=1, max_size=20))
    noise = draw(st.permutations([*half, *(-deviation for deviation in half)]))
    return {"noise": list(noise), "rate": draw(st.sampled_from([0.01, 0.1, 1.0]))}


def rests_in_noise(rule: str) -> Callable[[Subject, Case], None]:
    """The check that coverages which are right on average leave a rule's multiplier where it was."""

    def check(subject: Subject, case: Case) -> None:
        controller = subject.make_controller(
            {
                "rule": rule,
                "target_coverage": 0.5,
                "learning_rate": case["rate"],
                "initial_lambda": 1000.0,  # no bound is near
                "cumulative_steps": 0,
            }
        )
        for deviation in case["noise"]:
            controller.observe(0.5 + deviation / 64)
        moved = float(controller.lambda_rej) - 1000.0
        if abs(moved) > 1e-9:
            raise BrokenLawError(
                f"noise around the target must leave it where it was, it moved by {moved:.6g}"
            )

    return check


def unbiased_in_noise(rule: str) -> Property:
    """The law of zero-mean noise for one rule; of the rules of this project, "unbiased" satisfies it."""
    return Property(
        name="controller_is_unbiased_in_noise",
        group=23,
        law="Coverages that are right on average leave the multiplier where it was, in any order.",
        of="library",
        needs=("make_controller",),
        cases=lambda subject: _balanced_noise(),
        check=rests_in_noise(rule),
    )


# --- 24: packs ------------------------------------------------------------------------------------------

LANES = 3  # of one pack: another number would be traced anew
TOLERANCES = {"float64": 1e-9, "float32": 2e-3}
"""How far a pack's weights may be from those of a training alone, relative to the largest of their tensor."""

_RATES = st.sampled_from([1e-4, 1e-3, 1e-2, 0.1, 0.3])


@st.composite
def _packs(draw: st.DrawFn) -> dict[str, Any]:
    config = st.fixed_dictionaries(
        {
            "learning_rate": _RATES,
            "optimizer": st.sampled_from(["sgd", "adam"]),
            "weight_decay": st.sampled_from([0.0, 0.1]),
        }
    )
    dtype = draw(st.sampled_from(sorted(TOLERANCES)))
    members = [{"seed": draw(SEEDS), "config": {**draw(config), "dtype": dtype}} for _ in range(LANES)]
    return {"members": members, "bad": draw(st.integers(0, LANES - 1))}


def _pack_is_single(subject: Subject, case: Case) -> None:
    members = case["members"]
    tolerance = TOLERANCES[members[0]["config"]["dtype"]]
    for place, (found, member) in enumerate(zip(subject.train_pack(members), members, strict=True)):
        for name, right in subject.train_alone(member).items():
            off = _relative_distance(found[name], right)
            if not off <= tolerance:
                raise BrokenLawError(
                    f"{name} of member {place} must be as alone within {tolerance}, it is off by {off:.3g}"
                )


def _relative_distance(one: Tensor, right: Tensor) -> float:
    scale = float(right.abs().max()) if right.numel() else 1.0
    if not math.isfinite(scale):
        return 0.0 if same_bits(one, right) else math.inf
    return float((one - right).abs().max()) / max(scale, 1e-300) if right.numel() else 0.0


def _neighbours_stay(subject: Subject, case: Case) -> None:
    members, bad = case["members"], case["bad"]
    spoiled = [
        {**member, "seed": member["seed"] + subject.spoiled} if place == bad else member
        for place, member in enumerate(members)
    ]
    clean, found = subject.train_pack(members), subject.train_pack(spoiled)
    for place in range(len(members)):
        differs = None if place == bad else first_difference(found[place], clean[place])
        if differs is not None:
            raise BrokenLawError(f"with NaN in the data of member {bad}, {differs} in member {place}")


# --- 25: micro-batches ----------------------------------------------------------------------------------


@st.composite
def _partitions(draw: st.DrawFn, rows: int) -> dict[str, Any]:
    order = draw(st.permutations(range(rows)))
    cuts = sorted(draw(st.sets(st.integers(1, rows - 1), max_size=rows - 1)))
    ends = [*cuts, rows]
    parts = [list(order[start:end]) for start, end in zip([0, *cuts], ends, strict=True)]
    return {"seed": draw(SEEDS), "parts": parts}


def _parts_are_the_whole(subject: Subject, case: Case) -> None:
    parts = case["parts"]
    rows = sum(map(len, parts))
    whole = subject.batch_gradient(case["seed"], [row for part in parts for row in part])
    weighted = sum(len(part) * subject.batch_gradient(case["seed"], part) for part in parts) / rows
    off = float((weighted - whole).abs().max())
    if not off <= 1e-9:
        raise BrokenLawError(
            f"the gradients of parts of {', '.join(map(str, map(len, parts)))} rows, weighted by them, "
            f"must be that of all, they are off by {off:.3g}"
        )


def _accumulations(subject: Subject) -> SearchStrategy[Case]:
    config = st.fixed_dictionaries(
        {
            "optimizer": st.sampled_from(["sgd", "adam"]),
            "learning_rate": st.sampled_from([1e-3, 0.1]),
            "max_epochs": st.integers(1, 3),
        }
    )
    sizes = st.integers(1, subject.rows_of_a_batch - 1)
    return st.fixed_dictionaries({"seed": SEEDS, "batch_size": sizes, "config": config})


def _accumulated_is_full(subject: Subject, case: Case) -> None:
    rows, size = subject.rows_of_a_batch, case["batch_size"]
    whole = subject.train_in_micro_batches(case["seed"], rows, case["config"])
    found = subject.train_in_micro_batches(case["seed"], size, case["config"])
    off = max(_relative_distance(found[name], right) for name, right in whole.items())
    # Adam divides by the size of a gradient, which makes roundings of gradients near 0 as large as steps.
    tolerance = 1e-9 if case["config"]["optimizer"] == "sgd" else 1e-6
    if not off <= tolerance:
        raise BrokenLawError(
            f"{rows} rows in micro-batches of {size} must train as at once, the weights are off by {off:.3g}"
        )


# --- 26: resuming ---------------------------------------------------------------------------------------


def _resumptions(subject: Subject) -> SearchStrategy[Case]:
    return st.fixed_dictionaries(
        {
            "kind": st.sampled_from(subject.trainings),
            "epochs": st.integers(1, subject.training_epochs // 2),
            "batch": st.integers(0, 2),  # saved after so many more micro-batches; 0: between two epochs
        }
    )


def _resumed_is_uninterrupted(subject: Subject, case: Case) -> None:
    """2 N epochs equal N, saved, loaded into new objects, and N more."""
    whole = subject.make_training(case["kind"])
    first = subject.make_training(case["kind"])
    for _ in range(2 * case["epochs"]):
        whole.epoch()
    for _ in range(case["epochs"]):
        first.epoch()
    with tempfile.TemporaryDirectory(prefix="law-") as folder:
        path = Path(folder) / "checkpoint.pt"
        if case["batch"]:
            first.epoch(save_at=case["batch"], path=path)
        else:
            first.save(path)
        again = subject.make_training(case["kind"])
        again.load(path)
    for _ in range(case["epochs"]):
        again.epoch()
    differs = first_difference(again.state(), whole.state())
    if differs is not None:
        raise BrokenLawError(f"resumed after {case['epochs']} epochs it must come to the same: {differs}")


TRAINING_LAWS: tuple[Property, ...] = (
    library_law(
        "controller_unwinds",
        23,
        "From one bound to the other a multiplier takes (hi - lo) / (rate * gap) steps at most, however long "
        "it was held at the first.",
        ("make_controller",),
        lambda subject: _unwindings(),
        _unwinds,
    ),
    unbiased_in_noise("unbiased"),
    library_law(
        "pack_is_single_training",
        24,
        "Every member of a pack comes to what it comes to alone, with its own rate, optimizer and data.",
        ("train_pack", "train_alone"),
        lambda subject: _packs(),
        _pack_is_single,
    ),
    library_law(
        "bad_member_leaves_neighbours",
        24,
        "A member whose data hold a NaN leaves its neighbours bit-identical.",
        ("train_pack", "spoiled"),
        lambda subject: _packs(),
        _neighbours_stay,
    ),
    library_law(
        "gradients_of_parts_are_the_whole",
        25,
        "Gradients of the parts of a batch, weighted by their rows, are the gradient of the batch.",
        ("batch_gradient", "rows_of_a_batch"),
        lambda subject: _partitions(subject.rows_of_a_batch),
        _parts_are_the_whole,
    ),
    library_law(
        "accumulation_is_the_full_batch",
        25,
        "A step over micro-batches, the last one short, is the step of the full batch.",
        ("train_in_micro_batches", "rows_of_a_batch"),
        _accumulations,
        _accumulated_is_full,
    ),
    library_law(
        "resumed_is_uninterrupted",
        26,
        "2 N epochs are N epochs, saved, loaded into new objects, and N more, bit for bit.",
        ("make_training", "trainings", "training_epochs"),
        _resumptions,
        _resumed_is_uninterrupted,
    ),
)
