"""What the driver makes of what Ray tells it, and what Ray's Tune keeps of a sweep."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.tune.experiment import Trial

from harness.jobs import Report, Segment, TrialSpec
from harness.plan import load_plan
from harness.proposals import full_config
from harness.segments import PackTrainable, Parcel
from harness.sweep import make_parcel, run_sweep
from harness.tune_bridge import DriverCallback, DriverLink

SEGMENT = Segment(TrialSpec("a-s0", "a", 0, 0, {}), until=1, state=None)


class Board:
    """Gives one segment, and remembers what it was told of it."""

    finished = False

    def __init__(self) -> None:
        self.told: list[Any] = []

    def next_pack(self) -> list[Segment]:
        return [SEGMENT]

    def reported(self, segment: Segment, report: Report) -> None:
        self.told.append(report.state)

    def lost(self, segment: Segment, error: str) -> None:
        self.told.append(error)


def link_of(board: Board) -> DriverLink:
    link = DriverLink(board, lambda segments: Parcel("p", {}, "cpu", ()), lambda: None)  # type: ignore[arg-type]
    link.next_parcel("tune-1")
    return link


def test_a_report_that_went_away_with_its_node_is_a_lost_pack(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its segments run again instead of ending the sweep; what comes of it afterwards counts no more."""

    def gone(reference: object) -> bytes:
        raise ray.exceptions.OwnerDiedError("00", None, "")

    monkeypatch.setattr(ray, "get", gone)
    board = Board()
    link = link_of(board)
    link.reported("tune-1", "reference")
    link.lost("tune-1", "its worker ended without a report")
    assert board.told == ["its report was lost with its node (OwnerDiedError)"]
    monkeypatch.setattr(ray, "get", lambda reference: {"a-s0": Report([], {"status": "completed"})})
    link.reported("tune-1", "a later reference")
    assert len(board.told) == 1


def test_reports_reach_the_board_and_the_rest_of_a_pack_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference is exchanged for what it stands for; who has reported is not lost with the worker."""
    other = Segment(TrialSpec("b-s0", "b", 0, 0, {}), until=1, state=None)
    monkeypatch.setattr(
        ray, "get", lambda reference: {"a-s0": Report([], {"status": "stopped"}, "state"), "b-s0": Report([])}
    )
    board = Board()
    monkeypatch.setattr(board, "next_pack", lambda: [SEGMENT, other])
    link = link_of(board)
    link.reported("tune-1", "reference")
    assert board.told == ["state", None]
    link.lost("tune-1", "its worker died")
    link.lost("tune-1", "and Tune says so again")
    assert board.told == ["state", None, "its worker died"]


@pytest.mark.usefixtures("local_ray")
def test_a_worker_sends_no_member_of_its_pack_back(write_plan: Callable[..., Path]) -> None:
    """Tune puts the config of a trial into every result, and keeps it: a million configs would add up."""
    plan = load_plan(write_plan())
    config, active = full_config(plan.config)
    spec = TrialSpec("a-s0", "a", 0, 0, config, active)
    parcel = make_parcel(plan, [Segment(spec, until=None, state=None, alone=True)])
    worker = PackTrainable({"parcel": parcel})
    assert worker.train()["config"]["parcel"].members == ()
    worker.stop()


@pytest.mark.usefixtures("local_ray")
def test_tune_keeps_no_trial_that_has_ended(
    write_plan: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trial that trains alone is one of Tune's, and leaves nothing of that size behind."""
    seen: weakref.WeakSet[Trial] = weakref.WeakSet()
    counts = []
    complete = DriverCallback.on_trial_complete

    def counted(callback: DriverCallback, trial: Trial, **info: Any) -> None:
        complete(callback, trial=trial, **info)
        seen.add(trial)
        gc.collect()
        counts.append(len(seen))

    monkeypatch.setattr(DriverCallback, "on_trial_complete", counted)
    plan = write_plan(
        search={"algorithm": "random", "configs": 12, "batch": 12}, seeds=[0], packs={"size": 1}
    )
    assert run_sweep(load_plan(plan), tmp_path / "run").rows == 12
    assert len(counts) == 12
    assert max(counts) <= 4  # of two workers
