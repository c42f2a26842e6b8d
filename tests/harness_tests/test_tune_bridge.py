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

    def next_segment(self) -> Segment:
        return SEGMENT

    def reported(self, segment: Segment, report: Report) -> None:
        self.told.append(report.state)

    def lost(self, segment: Segment, error: str) -> None:
        self.told.append(error)


def link_of(board: Board) -> DriverLink:
    link = DriverLink(board, lambda segment: Parcel({"trial_id": "a-s0"}, 1, None), lambda: None)  # type: ignore[arg-type]
    link.next_parcel("tune-1")
    return link


def test_a_state_that_went_away_with_its_node_is_a_lost_segment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The segment runs again instead of ending the sweep; what Tune says of it afterwards counts no more."""

    def gone(reference: object) -> bytes:
        raise ray.exceptions.OwnerDiedError("00", None, "")

    monkeypatch.setattr(ray, "get", gone)
    board = Board()
    link = link_of(board)
    link.reported("tune-1", Report([], {"status": "stopped"}, "reference"))
    link.lost("tune-1", "its worker ended without a report")
    assert board.told == ["its state was lost with its node (OwnerDiedError)"]


def test_a_state_reaches_the_board_as_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference of a report is exchanged for what it stands for."""
    monkeypatch.setattr(ray, "get", lambda reference: b"state")
    board = Board()
    link_of(board).reported("tune-1", Report([], {"status": "stopped"}, "reference"))
    assert board.told == [b"state"]
