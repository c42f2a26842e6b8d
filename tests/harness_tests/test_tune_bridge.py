"""What the driver makes of what Ray tells it, without a Ray."""

from __future__ import annotations

from typing import Any

import pytest
import ray

from harness.jobs import Report, Segment, TrialSpec
from harness.segments import Parcel
from harness.tune_bridge import DriverLink

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
