"""Counting coverage: what trackers say, that they agree with a naive count, and the recorded behaviour."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scm.core.tags import TRTag
from scm.training import coverage as coverage_module
from scm.training.coverage import (
    AGGREGATE_MODES,
    CoverageEnforcementPolicy,
    CoverageMetrics,
    CoverageTracker,
    MultiOutputCoverageTracker,
    count_bottoms,
    count_tags,
    summed_counts,
)

Cases = Callable[[str], list[dict[str, Any]]]
Decode = Callable[[Any], Any]

batches_of_tags = st.lists(st.lists(st.sampled_from(list(TRTag)), max_size=8), max_size=12)
windows = st.one_of(st.none(), st.integers(1, 5))


def tags(counts: Sequence[int]) -> list[TRTag]:
    """Tags in the order of their codes, as often as counted."""
    return [TRTag(code) for code, count in enumerate(counts) for _ in range(count)]


def share(batch: Sequence[int]) -> float:
    """The coverage of a list of tags, counted naively."""
    return batch.count(TRTag.REAL) / len(batch) if batch else 1.0


def joined(batches: Sequence[Sequence[TRTag]]) -> list[TRTag]:
    """All tags of some batches."""
    return [tag for batch in batches for tag in batch]


# --- the recorded behaviour ------------------------------------------------------------------------------


def test_trackers_say_what_is_recorded(vector_group: Cases, decode_numbers: Decode) -> None:
    """Statistics before and after every update, of all batches and of windows; shares of tags."""
    checked = 0
    for case in vector_group("coverage_tracker"):
        if "quirk" in case or "expected" in case:
            continue
        tracker = CoverageTracker(case["target_coverage"], case["window_size"])
        expected = decode_numbers(case["expected_before_and_after_each"])
        for number, counts in enumerate([None, *case["tag_counts"]]):
            if counts is not None:
                tracker.update(tags(counts))
            found = tracker.get_statistics()
            assert found["tag_distribution"].pop("n_bottom") == 0
            for name, value in expected[number].items():
                wanted = value if value is None else pytest.approx(value, rel=1e-12, abs=0.0)
                assert found[name] == wanted, (case["id"], number, name)
            assert set(found) == set(expected[number])
            if counts is not None:
                shares = tracker.cumulative.tag_shares
                wanted = case["expected_cumulative_proportions"][number - 1]
                assert {name: shares[name] for name in wanted} == pytest.approx(wanted, rel=1e-12)
            checked += 1
    assert checked > 80


def test_a_recorded_bad_target_is_refused(vector_group: Cases, decode_numbers: Decode) -> None:
    """Targets outside of [0, 1], nan among them."""
    bad = [case for case in vector_group("coverage_tracker") if case["id"].startswith("bad_target")]
    assert len(bad) == 3
    for case in bad:
        with pytest.raises(ValueError, match="target_coverage must be in"):
            CoverageTracker(decode_numbers(case["target_coverage"]))


def test_a_bottom_is_counted_as_an_answer_of_its_own_tag(vector_group: Cases) -> None:
    """The recorded tracker counts it in the total alone; coverage is the same."""
    (case,) = [case for case in vector_group("coverage_tracker") if case["id"] == "bottom_tag"]
    tracker = CoverageTracker(case["target_coverage"])
    for counts, expected in zip(case["tag_counts"], case["expected_before_and_after_each"][1:], strict=True):
        tracker.update(tags(counts))
        found = tracker.get_statistics()
        assert found["current_coverage"] == pytest.approx(expected["current_coverage"], rel=1e-12)
        assert found["total_samples"] == expected["total_samples"] == sum(found["tag_distribution"].values())
    assert tracker.tag_distribution["n_bottom"] > 0


def test_several_outputs_aggregate_as_recorded(vector_group: Cases) -> None:
    """The recorded mean is that of the outputs' coverages, under that name here; min and max as there."""
    modes = {"mean": "mean_of_outputs", "min": "min", "max": "max"}
    cases = {case["id"]: case for case in vector_group("multi_output_coverage_tracker")}
    for name, mode in modes.items():
        case = cases[name]
        tracker = MultiOutputCoverageTracker(case["n_outputs"], case["target_coverage"], mode)
        for counts, expected in zip(case["tag_counts"], case["expected"], strict=True):
            tracker.update([tags(own) for own in counts])
            assert tracker.coverage == pytest.approx(expected["coverage"], rel=1e-12)
            assert tracker.coverage_gap == pytest.approx(expected["gap"], rel=1e-12)
            assert tracker.get_per_output_coverage() == pytest.approx(expected["per_output"], rel=1e-12)


def test_the_recorded_epoch_controller(vector_group: Cases, decode_numbers: Decode) -> None:
    """Every call gives what is recorded, the direction included."""
    for case in vector_group("coverage_enforcement"):
        case = decode_numbers(case)
        policy = CoverageEnforcementPolicy(case["target"])
        found = policy.enforce(case["coverage"], case["lambda"], case["near_pole_coverage"])
        for name, value in case["expected"].items():
            assert getattr(found, name) == (value if value is None else pytest.approx(value, rel=1e-12))


# --- laws -----------------------------------------------------------------------------------------------


@given(batches=batches_of_tags, window=windows)
def test_a_tracker_says_what_a_naive_count_says(batches: list[list[TRTag]], window: int | None) -> None:
    """Batch, cumulative and window coverage, and counts, are those of the lists themselves."""
    tracker = CoverageTracker(0.9, window)
    for number, batch in enumerate(batches, start=1):
        tracker.update(batch)
        seen = batches[:number]
        assert tracker.batch_coverage == share(batch)
        assert tracker.cumulative_coverage == share(joined(seen))
        assert tracker.window_coverage == (None if window is None else share(joined(seen[-window:])))
        assert tracker.coverage == share(joined(seen if window is None else seen[-window:]))
    found = joined(batches)
    assert list(tracker.tag_distribution.values()) == [found.count(tag) for tag in TRTag]


@given(batches=batches_of_tags, window=windows)
def test_tensors_of_codes_count_as_tags_do(batches: list[list[TRTag]], window: int | None) -> None:
    """Whatever the integer type and shape; and a bool tensor says which answers are bottom."""
    by_tags, by_codes, by_mask = (CoverageTracker(0.9, window) for _ in range(3))
    for number, batch in enumerate(batches):
        by_tags.update(batch)
        dtype = (torch.int8, torch.int64, torch.uint8)[number % 3]
        codes = torch.tensor([int(tag) for tag in batch], dtype=dtype)
        by_codes.update(codes.reshape(-1, 2) if len(batch) % 2 == 0 else codes)
        by_mask.update(codes != TRTag.REAL)
    assert by_codes.get_statistics() == by_tags.get_statistics()
    assert by_mask.coverage == by_tags.coverage
    assert by_mask.cumulative == CoverageMetrics(
        n_real=by_tags.cumulative.n_real, n_bottom=by_tags.cumulative.total - by_tags.cumulative.n_real
    )


@given(
    pairs=st.lists(st.tuples(*[st.lists(st.sampled_from(list(TRTag)), max_size=5)] * 3), max_size=8),
    window=windows,
)
def test_merged_workers_are_one_that_saw_all(pairs: list[Any], window: int | None) -> None:
    """Trackers fed the parts of every batch merge to the one fed the whole, in any order, and go on alike."""
    workers = [CoverageTracker(0.9, window) for _ in range(3)]
    whole = CoverageTracker(0.9, window)
    for parts in pairs:
        for worker, part in zip(workers, parts, strict=True):
            worker.update(part)
        whole.update(joined(parts))
    one, two = copy.deepcopy(workers[0]), copy.deepcopy(workers[2])
    for worker in workers[1:]:
        one.merge(worker)
    for worker in (workers[1], workers[0]):
        two.merge(worker)
    assert one.get_statistics() == two.get_statistics() == whole.get_statistics()
    for merged in (one, whole):
        merged.update([TRTag.PHI])
    assert one.get_statistics() == whole.get_statistics()


def test_a_worker_that_saw_fewer_batches_is_joined_to_the_newest() -> None:
    """Windows are aligned at their ends; the older batches of the longer one stay, as far as it reaches."""
    long, short = CoverageTracker(0.9, 3), CoverageTracker(0.9, 3)
    for real in (0, 1, 1, 0):
        long.update([TRTag.REAL] * real + [TRTag.PHI] * (1 - real))
    short.update([TRTag.REAL] * 5)
    long.merge(short)
    assert long.window == CoverageMetrics(n_real=7, n_phi=1)
    assert long.batch == CoverageMetrics(n_real=5, n_phi=1)
    assert long.cumulative.total == 9


@given(batches=batches_of_tags, window=windows, cut=st.integers(0, 12))
@settings(max_examples=50)
def test_a_tracker_goes_on_from_its_state(batches: list[list[TRTag]], window: int | None, cut: int) -> None:
    """Saved after any batch and loaded into a fresh tracker, it says the same ever after."""
    through, before, after = (CoverageTracker(0.9, window) for _ in range(3))
    for batch in batches:
        through.update(batch)
    for batch in batches[:cut]:
        before.update(batch)
    after.load_state_dict(before.state_dict())
    for batch in batches[cut:]:
        after.update(batch)
    assert after.get_statistics() == through.get_statistics()


@given(batches=st.lists(st.lists(st.integers(0, 9), min_size=2, max_size=2), min_size=1, max_size=6))
def test_the_mean_over_outputs_weighs_answers(batches: list[list[int]]) -> None:
    """An output of many answers weighs as much more as it has; the mean is the share of all answers."""
    tracker = MultiOutputCoverageTracker(2, 0.9)
    for one, other in batches:
        tracker.update([[TRTag.REAL] * one, [TRTag.PHI] * other])
    ones, others = (sum(column) for column in zip(*batches, strict=True))
    assert tracker.coverage == (ones / (ones + others) if ones + others else 1.0)


# --- what a tracker costs -------------------------------------------------------------------------------


def test_memory_is_bounded_by_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """After any number of batches, no more is kept than the window's counts."""
    tracker = CoverageTracker(0.9, 4)
    for _ in range(200):
        tracker.update([TRTag.REAL])
    assert len(tracker.state_dict()["window"]) == 4
    plain = CoverageTracker(0.9)
    for _ in range(200):
        plain.update([TRTag.REAL])
    assert plain.state_dict()["window"] == []


@pytest.mark.parametrize("window", [2, 64])
def test_an_update_adds_one_batch_and_takes_one_away(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many sums for a long window as for a short one: nothing is added up again."""
    tracker = CoverageTracker(0.9, window)
    for _ in range(100):
        tracker.update([TRTag.REAL])
    sums = 0

    def counted(*counts: Any) -> Any:
        nonlocal sums
        sums += 1
        return summed_counts(*counts)

    monkeypatch.setattr(coverage_module, "summed_counts", counted)
    tracker.update([TRTag.PHI])
    assert sums == 4  # into the batch, into all, into the window, out of the window


def test_what_a_device_counted_is_read_when_asked_for() -> None:
    """Counts of a device, which here is "meta" and has no values, are taken without looking at them."""
    tracker = CoverageTracker(0.9, 3)
    for _ in range(5):
        tracker.update(torch.zeros(7, dtype=torch.int8, device="meta"))
        tracker.update(torch.zeros(7, dtype=torch.bool, device="meta"))
    counts = count_tags(torch.zeros(3, dtype=torch.int64, device="meta"))
    assert isinstance(counts, torch.Tensor)
    assert counts.shape == (6,)
    with pytest.raises(RuntimeError, match="meta"):
        tracker.get_statistics()


@pytest.mark.parametrize("window", [None, 1, 2])
@pytest.mark.parametrize("read_between", [False, True])
def test_counts_that_stayed_on_a_device_are_those_of_the_host(window: int | None, read_between: bool) -> None:
    """Sums, windows and what falls out of them, whether somebody looked in between or not."""
    batches = [[5, 1, 0, 2, 1], [0, 0, 3, 0, 0], [7, 0, 0, 0, 0], [1, 1, 1, 1, 1]]
    there, here = CoverageTracker(0.9, window), CoverageTracker(0.9, window)
    for batch in batches:
        there.update_counts(torch.tensor([*batch, 0]))  # as a device gives them: nobody has read them
        here.update_counts((*batch, 0))
        if read_between:
            assert there.get_statistics() == here.get_statistics()
    assert there.get_statistics() == here.get_statistics()
    assert there.state_dict() == here.state_dict()


@pytest.mark.parametrize("masked", [False, True])
def test_a_device_counts_bottoms_as_the_host_does(masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The two ways of counting agree; here the host counts both ways, told that it is a device."""
    bottom = torch.tensor([[True, False], [False, False], [True, True]])
    mask = torch.tensor([[True], [False], [True]]) if masked else None
    here = count_bottoms(bottom, mask)

    class Elsewhere(torch.Tensor):
        device = torch.device("meta")

    there = count_bottoms(bottom.as_subclass(Elsewhere), mask)
    assert isinstance(there, torch.Tensor)
    assert tuple(there.tolist()) == here
    assert here == ((1, 0, 0, 0, 3, 0) if masked else (3, 0, 0, 0, 3, 0))


# --- what is refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"window_size": 0}, ValueError, "window_size must be >= 1, got window_size=0"),
        ({"window_size": -3}, ValueError, "window_size must be >= 1"),
        ({"window_size": 2.0}, TypeError, "window_size must be an int"),
        ({"window_size": True}, TypeError, "window_size must be an int"),
        ({"target_coverage": 1.5}, ValueError, "target_coverage must be in"),
    ],
    ids=["window 0", "negative window", "float window", "bool window", "target"],
)
def test_settings_that_cannot_be_right_are_refused(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    """A window that would hold nothing is an error at the call, not a coverage pinned to 1."""
    with pytest.raises(error, match=message):
        CoverageTracker(**arguments)


@pytest.mark.parametrize(
    ("answers", "error"),
    [
        ([TRTag.REAL, 7], ValueError),
        (["real"], ValueError),
        ([None], ValueError),
        (torch.tensor([0, 9]), ValueError),
        (torch.tensor([-1]), ValueError),
        (torch.tensor([0.0]), TypeError),
    ],
    ids=["code", "word", "none", "tensor", "negative", "float"],
)
def test_what_is_no_tag_is_refused(answers: Any, error: type[Exception]) -> None:
    """It is not counted in silence as an answer that is not REAL."""
    tracker = CoverageTracker()
    with pytest.raises(error, match="answers must be tags"):
        tracker.update(answers)
    assert tracker.cumulative.total == 0


def test_of_another_kind_nothing_is_taken_up() -> None:
    """Merging and loading want the same target, window, outputs and mode."""
    tracker = CoverageTracker(0.9, 3)
    for other in (CoverageTracker(0.8, 3), CoverageTracker(0.9, 4), CoverageTracker(0.9)):
        with pytest.raises(ValueError, match="in both"):
            tracker.merge(other)
        with pytest.raises(ValueError, match="in both"):
            tracker.load_state_dict(other.state_dict())
    outputs = MultiOutputCoverageTracker(2)
    for more in (MultiOutputCoverageTracker(3), MultiOutputCoverageTracker(2, aggregate_mode="min")):
        with pytest.raises(ValueError, match="in both"):
            outputs.merge(more)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_outputs": 0}, "n_outputs must be >= 1"),
        ({"n_outputs": 2, "aggregate_mode": "median"}, "aggregate_mode must be one of mean, mean_of_outputs"),
        ({"n_outputs": 2, "target_coverage": -1.0}, "target_coverage must be in"),
    ],
    ids=["outputs", "mode", "target"],
)
def test_several_outputs_are_checked_when_built(arguments: dict[str, Any], message: str) -> None:
    """An unknown mode is refused before anything is counted."""
    with pytest.raises(ValueError, match=message):
        MultiOutputCoverageTracker(**arguments)


@pytest.mark.parametrize(
    "answers", [[[TRTag.REAL]], torch.zeros(4, 3, dtype=torch.int8), torch.zeros(4, dtype=torch.int8)]
)
def test_every_output_must_be_told(answers: Any) -> None:
    """Two outputs, and the answers of one, of three, or of none in particular."""
    with pytest.raises(ValueError, match="answers must be"):
        MultiOutputCoverageTracker(2).update(answers)


@pytest.mark.parametrize("mode", AGGREGATE_MODES)
def test_outputs_have_a_state_and_merge(mode: str) -> None:
    """Going on from a state, and adding a worker, is as if one had seen everything."""
    codes = torch.tensor([[0, 3], [1, 0], [0, 0], [2, 4]])
    whole, worker, again = (MultiOutputCoverageTracker(2, 0.9, mode) for _ in range(3))
    whole.update(codes)
    worker.update(codes[:3])
    again.load_state_dict(worker.state_dict())
    other = MultiOutputCoverageTracker(2, 0.9, mode)
    other.update(codes[3:])
    again.merge(other)
    assert again.coverage == whole.coverage
    assert again.get_per_output_coverage() == [0.5, 0.5]
    again.reset()
    assert again.coverage == 1.0


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [("n_real", -1, ValueError), ("n_phi", 1.0, TypeError), ("n_bottom", True, TypeError)],
    ids=["negative", "float", "bool"],
)
def test_counts_are_counts(field: str, value: Any, error: type[Exception]) -> None:
    """Whole numbers, 0 or more."""
    with pytest.raises(error, match=f"{field} must be"):
        CoverageMetrics(**{field: value})


# --- counts and the epoch controller --------------------------------------------------------------------


def test_no_answers_are_covered() -> None:
    """Coverage 1, all of them REAL, nothing rejected."""
    none = CoverageMetrics()
    assert (none.coverage, none.rejection_rate, none.total) == (1.0, 0.0, 0)
    assert none.tag_shares == {"REAL": 1.0, "PINF": 0.0, "NINF": 0.0, "PHI": 0.0, "BOTTOM": 0.0}
    assert CoverageMetrics(n_real=1, n_pinf=1) + none == CoverageMetrics(n_real=1, n_pinf=1)


def test_bottoms_outside_of_a_mask_do_not_count() -> None:
    """Neither as bottoms nor as answers."""
    bottom, mask = torch.tensor([True, True, False, False]), torch.tensor([True, False, True, True])
    assert count_bottoms(bottom, mask) == (2, 0, 0, 0, 1, 0)
    assert count_bottoms(bottom) == (2, 0, 0, 0, 2, 0)


def test_workers_counts_add_up_on_hosts_and_devices() -> None:
    """Plain numbers and tensors; of no worker there is no sum."""
    plain = (3, 0, 0, 0, 1, 0)
    assert summed_counts(plain, plain) == (6, 0, 0, 0, 2, 0)
    held = torch.tensor(plain)
    found = summed_counts(held, held)
    assert isinstance(found, torch.Tensor)
    assert found.tolist() == [6, 0, 0, 0, 2, 0]
    assert summed_counts(held, plain) == (6, 0, 0, 0, 2, 0)
    with pytest.raises(ValueError, match="at least one worker"):
        summed_counts()


def test_the_epoch_controller_counts_its_interventions() -> None:
    """A change of more than a fifth; within the dead band, and for nan, nothing changes."""
    policy = CoverageEnforcementPolicy(0.9)
    assert policy.enforce(1.0, 0.1).intervention_triggered is False
    large = policy.enforce(0.0, 0.2)
    assert (large.new_lambda, large.intervention_count) == (pytest.approx(0.155), 1)
    for coverage in (0.9, 0.885, math.nan):
        still = policy.enforce(coverage, 0.2)
        assert (still.new_lambda, still.lambda_updated) == (0.2, False)
    again = CoverageEnforcementPolicy(0.9)
    again.load_state_dict(policy.state_dict())
    assert again.intervention_count == 1


@pytest.mark.parametrize(
    "arguments",
    [
        {"target_coverage": 2.0},
        {"near_pole_target": math.nan},
        {"dead_band": -0.1},
        {"increase_rate": math.inf},
        {"min_lambda": 2.0, "max_lambda": 1.0},
    ],
    ids=["target", "near pole", "dead band", "rate", "order"],
)
def test_the_epoch_controller_s_settings_are_checked(arguments: dict[str, float]) -> None:
    """Shares in [0, 1], all others finite and >= 0, bounds in order; the first one that is not is named."""
    with pytest.raises(ValueError, match=f"{next(iter(arguments))} must be"):
        CoverageEnforcementPolicy(**arguments)


@pytest.mark.parametrize("name", ["dead_band", "increase_rate", "decrease_rate", "min_lambda", "max_lambda"])
def test_each_number_of_the_epoch_controller_is_checked_by_name(name: str) -> None:
    """Zero is a number like any other; below it, and without end, none is."""
    for value in (-0.1, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"{name} must be finite and >= 0, got {name}="):
            CoverageEnforcementPolicy(**{name: value})
    CoverageEnforcementPolicy(**{"min_lambda": 0.0, name: 0.0})


def test_the_epoch_controller_keeps_to_its_formula() -> None:
    """Defaults, the edges of the dead band and of an intervention, both bounds, and what poles lack."""
    policy = CoverageEnforcementPolicy()
    assert policy.enforce(0.9, 1.0).coverage_gap == 0
    assert policy.enforce(1.0, 9.99).new_lambda == 10.0  # the cap
    assert policy.enforce(0.0, 0.11).new_lambda == 0.1  # the floor
    exact = CoverageEnforcementPolicy(0.75, 0.5, 0.25, 2.0, 0.5, 1.0, 1.0)
    assert exact.enforce(0.5, 1.0).lambda_updated is False  # a gap of just the dead band
    assert exact.enforce(0.25, 1.0).new_lambda == 1.0  # bounds that leave one value
    near = CoverageEnforcementPolicy(0.75, 0.5, 0.0, 2.0, 0.5, 0.0, 10.0)
    assert near.enforce(1.0, 1.0, 0.5).new_lambda == pytest.approx(1.05)
    assert near.enforce(1.0, 1.0, 0.25).new_lambda == pytest.approx(1.05 + 0.025)
    assert near.enforce(0.5, 1.0, 0.25).new_lambda == pytest.approx(1.0 - 0.0125 + 0.025)
    assert near.enforce(0.75, 1.0, 0.25).new_lambda == 1.0
    step = CoverageEnforcementPolicy(0.0, 0.0, 0.0, 2.0, 0.0, 0.0, 10.0)
    assert step.enforce(1.0, 1.0).intervention_triggered is False  # 0.2 of 1.0 is not more than a fifth
    assert step.enforce(1.0, 0.5).intervention_triggered is True
