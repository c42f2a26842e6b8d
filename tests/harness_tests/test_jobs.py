"""The job board without Ray: every trial ends once, and no order of events changes a result."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from typing import Any

import pytest

from harness.errors import UserError
from harness.halving import RungBoard
from harness.jobs import EndedTrial, JobBoard, Packing, Report, Segment, TrialSpec

MAX_EPOCHS = 9
NAN = float("nan")


class ListProposer:
    """Batches from a list of worths; a learning one remembers what it was told, in order."""

    def __init__(
        self, batches: list[list[float]], seeds: tuple[int, ...] = (0, 1), waits: bool = True
    ) -> None:
        self.waits = waits
        self.told: list[tuple[int, list[tuple[str, str, int]]]] = []
        self._seeds = seeds
        self._batches = list(enumerate(batches))

    def next_batch(self) -> list[TrialSpec]:
        if not self._batches:
            return []
        cohort, worths = self._batches.pop(0)
        return [
            TrialSpec(f"c{cohort}{index}-s{seed}", f"c{cohort}{index}", seed, cohort, {"worth": worth})
            for index, worth in enumerate(worths)
            for seed in self._seeds
        ]

    def batch_ended(self, cohort: int, ended: Mapping[str, EndedTrial]) -> None:
        said = [(one.trial.trial_id, one.outcome["status"], one.outcome["epochs"]) for one in ended.values()]
        self.told.append((cohort, sorted(said)))


def train(segment: Segment) -> Report:
    """What a worker would report: the metric is the worth, from the second epoch on if it is not finite."""
    start = int(segment.state or b"0")
    worth = segment.trial.config["worth"]
    until = min(segment.until or MAX_EPOCHS, MAX_EPOCHS)
    epochs = [
        {"epoch": float(epoch), "val_loss": 1.0 if epoch == 1 else worth + segment.trial.seed / 100}
        for epoch in range(start + 1, until + 1)
    ]
    ended = until == MAX_EPOCHS
    outcome = {
        "status": "completed" if ended else "stopped",
        "stop_reason": "" if ended else f"halving at epoch {until}",
        "epochs": until,
    }
    return Report(epochs, outcome, None if ended else str(until).encode())


def run_board(
    batches: list[list[float]],
    *,
    workers: int = 1,
    seed: int = 0,
    halving: bool = True,
    known: Mapping[str, Any] | None = None,
    loses: float = 0.0,
    retries: int = 100,
    stop_after: int | None = None,
    waits: bool = True,
    packing: Packing | None = None,
) -> tuple[dict[str, EndedTrial], ListProposer, list[str]]:
    """Run a board to its end with workers that finish in a random order, some of which are lost.

    A worker reports the segments of its pack one after another; what it has not reported is lost with it.
    """
    order = random.Random(seed)
    ended: dict[str, EndedTrial] = {}
    fresh: list[str] = []

    def on_ended(one: EndedTrial, replayed: bool) -> None:
        assert one.trial.trial_id not in ended
        ended[one.trial.trial_id] = one
        if not replayed:
            fresh.append(one.trial.trial_id)

    proposer = ListProposer(batches, waits=waits)
    board = JobBoard(
        proposer,
        on_ended=on_ended,
        failed=lambda trial, error: {"status": "failed", "stop_reason": "", "epochs": 0, "error": error},
        rungs=RungBoard([2, 4], eta=2) if halving else None,
        retries=retries,
        known=known,
        packing=packing,
    )
    busy: list[list[Segment]] = []
    while not board.finished:
        while len(busy) < workers and (pack := board.next_pack()):
            assert {(one.start, one.until, one.shared) for one in pack} == {
                (pack[0].start, pack[0].until, len(pack))
            }
            busy.append(pack)
        assert board.running == sum(map(len, busy))
        if board.finished:
            break
        pack = busy.pop(order.randrange(len(busy)))
        if order.random() < loses:
            for segment in pack:
                board.lost(segment, "node died")
        else:
            segment = pack.pop(order.randrange(len(pack)))
            board.reported(segment, train(segment))
            busy += [pack] if pack else []
        if stop_after is not None and len(fresh) >= stop_after:
            break
    return ended, proposer, fresh


def summary(ended: Mapping[str, EndedTrial]) -> dict[str, tuple[str, int, tuple[tuple[int, float], ...]]]:
    return {
        trial_id: (
            str(one.outcome["status"]),
            int(one.outcome["epochs"]),
            tuple((epoch, said["val_loss"]) for epoch, said in sorted(one.history.items())),
        )
        for trial_id, one in ended.items()
    }


WORTHS = [[0.5, 0.1, 0.9, 0.3], [0.2, 0.8], [0.7, 0.6, 0.4]]


def test_every_reported_epoch_is_told_once() -> None:
    """In the order of a trial's epochs, across rungs; epochs of an earlier part of the run are not."""
    told: list[tuple[str, int]] = []
    board = JobBoard(
        ListProposer([[0.1, 0.2]], seeds=(0,)),
        on_ended=lambda one, replayed: None,
        failed=lambda trial, error: {},
        rungs=RungBoard([2], eta=2),
        known={"c01-s0": ({"status": "completed", "epochs": 9}, {9: {"epoch": 9.0, "val_loss": 0.2}})},
        on_epoch=lambda trial, said: told.append((trial.trial_id, int(said["epoch"]))),
    )
    while pack := board.next_pack():
        for segment in pack:
            board.reported(segment, train(segment))
    assert told == [("c00-s0", epoch) for epoch in range(1, MAX_EPOCHS + 1)]


@pytest.mark.parametrize("waits", [True, False])
@pytest.mark.parametrize("halving", [True, False])
def test_results_do_not_depend_on_workers_or_order(halving: bool, waits: bool) -> None:
    """One worker or five, in whatever order they finish, losing segments or not: the same ends."""
    reference, told, _ = run_board(WORTHS, halving=halving, waits=waits)
    for seed in range(20):
        ended, proposer, _ = run_board(
            WORTHS, halving=halving, workers=1 + seed % 5, seed=seed, loses=0.2 * (seed % 3), waits=waits
        )
        assert summary(ended) == summary(reference)
        assert sorted(proposer.told) == told.told


@pytest.mark.parametrize("waits", [True, False])
@pytest.mark.parametrize("halving", [True, False])
def test_results_do_not_depend_on_packs(halving: bool, waits: bool) -> None:
    """Packs of any size and kind, for any number of workers, losing some: the same ends as one by one."""
    reference, told, _ = run_board(WORTHS, halving=halving, waits=waits)
    for seed in range(24):
        kinds = 1 + seed % 3
        packing = Packing(
            size=1 + seed % 7,
            workers=1 + seed % 4,
            key=lambda trial, kinds=kinds: int(10 * trial.config["worth"]) % kinds or None,  # some alone
        )
        ended, proposer, _ = run_board(
            WORTHS,
            halving=halving,
            waits=waits,
            packing=packing,
            workers=packing.workers,
            seed=seed,
            loses=0.15 * (seed % 3),
        )
        assert summary(ended) == summary(reference)
        assert sorted(proposer.told) == told.told


def packs_of(board: JobBoard) -> list[list[str]]:
    """All packs that the board gives while nothing is reported, as trial ids."""
    packs = []
    while pack := board.next_pack():
        packs.append([segment.trial.trial_id for segment in pack])
    return packs


def board_of(
    batches: list[list[float]], packing: Packing, *, waits: bool = True, retries: int = 0
) -> JobBoard:
    return JobBoard(
        ListProposer(batches, seeds=(0,), waits=waits),
        on_ended=lambda one, replayed: None,
        failed=lambda trial, error: {"status": "failed", "epochs": 0},
        packing=packing,
        retries=retries,
    )


@pytest.mark.parametrize(
    ("trials", "size", "workers", "sizes"),
    [
        (8, 8, 1, [8]),
        (8, 8, 2, [4, 4]),  # no worker goes without
        (9, 4, 2, [3, 3, 3]),  # full packs and a rest of one would take as long
        (3, 128, 2, [2, 1]),
        (3, 1, 2, [1, 1, 1]),
    ],
)
def test_packs_are_even_and_leave_no_worker_out(
    trials: int, size: int, workers: int, sizes: list[int]
) -> None:
    """At most `size` trials to a pack, and the ready trials spread over all workers."""
    packing = Packing(size=size, workers=workers, key=lambda trial: "same")
    assert [len(pack) for pack in packs_of(board_of([[0.1] * trials], packing))] == sizes


def test_only_trials_of_one_key_share_a_pack() -> None:
    """What the key tells apart trains apart, and what has none trains alone."""
    packing = Packing(size=8, key=lambda trial: int(trial.config["worth"]) or None)
    packs = packs_of(board_of([[1.1, 2.1, 0.1, 1.2, 2.2, 0.2, 1.3]], packing))
    assert packs == [["c00-s0", "c03-s0", "c06-s0"], ["c01-s0", "c04-s0"], ["c02-s0"], ["c05-s0"]]


def test_a_search_that_does_not_learn_fills_packs_from_many_batches() -> None:
    """As many batches are drawn ahead as fill a pack for every worker; a search that learns stays in one."""
    packing = Packing(size=6, workers=2, key=lambda trial: "same")
    for waits, sizes in ((False, [6, 5, 5]), (True, [2, 2])):
        board = board_of([[0.1] * 4 for _ in range(4)], packing, waits=waits)
        assert [len(pack) for pack in packs_of(board)] == sizes


def test_a_lost_pack_runs_again_in_smaller_ones_and_at_last_alone() -> None:
    """Whoever brings the worker down each time fails alone, and nobody else does for having been with it."""
    board = board_of([[0.5] * 63 + [0.1]], Packing(size=64, key=lambda trial: "same"), retries=1)
    shared: dict[int, int] = {}
    failed: list[str] = []
    board._on_ended = lambda one, replayed: (  # type: ignore[assignment]
        failed.append(one.trial.trial_id) if one.outcome["status"] == "failed" else None
    )
    while pack := board.next_pack():
        kills = any(segment.trial.config["worth"] == 0.1 for segment in pack)
        shared[len(pack)] = shared.get(len(pack), 0) + kills
        for segment in pack:
            if kills:
                board.lost(segment, "killed")
            else:
                board.reported(segment, train(segment))
    assert failed == ["c063-s0"]
    assert shared == {64: 1, 8: 1, 1: 2}


def test_what_was_found_to_share_no_pack_is_not_packed_again() -> None:
    """A worker that says why a trial trains alone spares the next ones of its kind the attempt."""
    board = board_of([[0.5] * 4, [0.5] * 4], Packing(size=4, key=lambda trial: "same"))
    for segment in board.next_pack():
        report = train(segment)
        assert report.outcome is not None
        board.reported(segment, Report(report.epochs, {**report.outcome, "pack_note": "it draws"}))
    assert [len(pack) for pack in packs_of(board)] == [1, 1, 1, 1]


@pytest.mark.parametrize("name", ["size", "workers"])
def test_packing_refuses_less_than_one(name: str) -> None:
    """A pack holds a trial, and somebody trains it."""
    with pytest.raises(ValueError, match=f"{name} must be >= 1, got {name}=0"):
        Packing(**{name: 0})


def test_halving_keeps_the_best_and_stops_the_rest() -> None:
    """Of four configs two pass the first rung and one the second, judged by the mean over seeds."""
    ended, _, _ = run_board([[0.5, 0.1, 0.9, 0.3]])
    epochs = {one.trial.config_id: one.outcome["epochs"] for one in ended.values()}
    assert epochs == {"c00": 2, "c01": 9, "c02": 2, "c03": 4}


def test_a_metric_that_is_not_finite_never_passes_a_rung() -> None:
    """Alone, among its like or among finite ones: NaN and infinity stop where they are first compared."""
    for worths in ([NAN], [NAN, NAN, NAN], [math.inf, 0.5, NAN]):
        ended, _, _ = run_board([worths], workers=3)
        for one in ended.values():
            if not math.isfinite(one.trial.config["worth"]):
                assert one.outcome["epochs"] == 2


@pytest.mark.parametrize("halving", [True, False])
@pytest.mark.parametrize("stop_after", [1, 3, 7, 12, 17])
def test_an_interrupted_run_continued_is_the_uninterrupted_one(halving: bool, stop_after: int) -> None:
    """Known trials are taken in again without running, and the rest ends as it would have."""
    reference, _, _ = run_board(WORTHS, halving=halving)
    part, _, _ = run_board(WORTHS, halving=halving, stop_after=stop_after, workers=2, seed=stop_after)
    known = {trial_id: (one.outcome, one.history) for trial_id, one in part.items()}
    ended, _, fresh = run_board(WORTHS, halving=halving, known=known, workers=3, seed=1)
    assert summary(ended) == summary(reference)
    assert not set(fresh) & set(known)
    assert len(fresh) + len(known) == len(reference)


def test_a_segment_lost_too_often_is_a_failed_trial() -> None:
    """After the retries the trial fails with the last error, its batch goes on, and no trial is missing."""
    ended, proposer, _ = run_board(WORTHS, loses=1.0, retries=2)
    assert {one.outcome["status"] for one in ended.values()} == {"failed"}
    assert all("lost 3 times" in one.outcome["error"] for one in ended.values())
    assert len(ended) == 18
    assert [cohort for cohort, _ in proposer.told] == [0, 1, 2]


def test_a_lost_segment_runs_again_from_its_own_start() -> None:
    """A retry has the state and the rung of the segment that was lost, not the trial's beginning."""
    proposer = ListProposer([[0.1]], seeds=(0,))
    ended: list[EndedTrial] = []
    board = JobBoard(
        proposer,
        on_ended=lambda one, replayed: ended.append(one),
        failed=lambda trial, error: {},
        rungs=RungBoard([2], eta=2),
        retries=1,
    )
    (first,) = board.next_pack()
    board.reported(first, train(first))
    (second,) = board.next_pack()
    assert (second.state, second.until) == (b"2", None)
    board.lost(second, "node died")
    (again,) = board.next_pack()
    assert (again.state, again.until, again.attempt) == (b"2", None, 1)
    board.reported(again, train(again))
    assert board.next_pack() == []
    assert board.finished
    assert [one.outcome["epochs"] for one in ended] == [9]


def test_a_search_that_learns_waits_for_the_batch() -> None:
    """The next batch is drawn when all of this one has ended; other searches fill idle workers with it."""
    for waits, first_batches in ((True, {0}), (False, {0, 1})):
        board = JobBoard(
            ListProposer([[0.1], [0.2]], seeds=(0,), waits=waits),
            on_ended=lambda one, replayed: None,
            failed=lambda trial, error: {},
        )
        drawn = []
        while pack := board.next_pack():
            drawn += [segment.trial.cohort for segment in pack]
        assert set(drawn) == first_batches


def play_rung(metrics: Mapping[str, float], nan_budget: int = 0) -> EndedTrial | None:
    """A lone trial that reports these numbers at its rung; how it ended, or None where it went on."""
    ended: list[EndedTrial] = []
    board = JobBoard(
        ListProposer([[0.5]], seeds=(0,)),
        on_ended=lambda one, replayed: ended.append(one),
        failed=lambda trial, error: {"status": "failed", "epochs": 0},
        rungs=RungBoard([2], eta=2),
        nan_budget=nan_budget,
    )
    (segment,) = board.next_pack()
    outcome = {"status": "stopped", "stop_reason": "halving at epoch 2", "epochs": 2}
    board.reported(segment, Report([{"epoch": 2.0, **metrics}], outcome, b"state"))
    return ended[0] if ended else None


def test_nan_met_in_training_stop_a_trial_at_its_first_rung() -> None:
    """A training passes over steps that are NaN and its metric stays finite: over the budget it stops."""
    assert play_rung({"val_loss": 0.5, "nan_count": 0}) is None
    assert play_rung({"val_loss": 0.5, "nan_count": 3}) is not None
    assert play_rung({"val_loss": 0.5, "nan_count": 3}, nan_budget=3) is None


def test_a_metric_that_no_epoch_reports_is_named() -> None:
    """A misspelt metric of a task would stop every trial at its first rung; it ends the sweep instead."""
    with pytest.raises(
        UserError, match="halving.metric: no epoch reports 'val_loss', did you mean 'vall_loss'"
    ):
        play_rung({"vall_loss": 0.5})
