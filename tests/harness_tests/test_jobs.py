"""The job board without Ray: every trial ends once, and no order of events changes a result."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from typing import Any

import pytest

from harness.errors import UserError
from harness.halving import RungBoard
from harness.jobs import EndedTrial, JobBoard, Report, Segment, TrialSpec

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
) -> tuple[dict[str, EndedTrial], ListProposer, list[str]]:
    """Run a board to its end with workers that finish in a random order, some of whose segments are lost."""
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
    )
    busy: list[Segment] = []
    while not board.finished:
        while len(busy) < workers and (segment := board.next_segment()) is not None:
            busy.append(segment)
        assert board.running == len(busy)
        if board.finished:
            break
        segment = busy.pop(order.randrange(len(busy)))
        if order.random() < loses:
            board.lost(segment, "node died")
        else:
            board.reported(segment, train(segment))
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
    while (segment := board.next_segment()) is not None:
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
    first = board.next_segment()
    assert first is not None
    board.reported(first, train(first))
    second = board.next_segment()
    assert second is not None
    assert (second.state, second.until) == (b"2", None)
    board.lost(second, "node died")
    again = board.next_segment()
    assert again is not None
    assert (again.state, again.until, again.attempt) == (b"2", None, 1)
    board.reported(again, train(again))
    assert board.next_segment() is None
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
        while (segment := board.next_segment()) is not None:
            drawn.append(segment.trial.cohort)
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
    segment = board.next_segment()
    assert segment is not None
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
