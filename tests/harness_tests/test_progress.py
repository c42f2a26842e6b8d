"""What a sweep says while it runs: counts, the best config so far, time left; plain lines or a live view."""

from __future__ import annotations

import io

import pytest

from harness.jobs import EndedTrial, TrialSpec
from harness.progress import LINE_S, Display, EpochLog, Tally


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def ended(config: str, seed: int, status: str = "completed", error: float = 1.0) -> EndedTrial:
    trial = TrialSpec(f"{config}-s{seed}", config, seed, 0, {})
    return EndedTrial(trial, {"status": status, "charged_error": error}, {})


def test_counts_and_time_left() -> None:
    """Trials are counted by status, and the rest is timed at the pace of this part of the run."""
    clock = Clock()
    tally = Tally(8, [0, 1], clock=clock)
    tally.add(ended("a", 0), replayed=True)
    tally.add(ended("a", 1), replayed=True)
    assert tally.seconds_left() is None
    tally.start()
    clock.now = 10.0
    tally.add(ended("b", 0, "diverged"))
    tally.add(ended("b", 1, "failed"))
    tally.running = 2
    assert tally.seconds_left() == 20.0
    line = "4/8 trials, 2 running, 1 diverged, 1 failed, 20 s left, best charged_error 1 (a)"
    assert tally.line() == line


@pytest.mark.parametrize(
    ("status", "error"),
    [("completed", float("nan")), ("completed", float("inf")), ("diverged", 0.0), ("failed", 0.0)],
)
def test_a_config_with_a_bad_seed_is_never_the_best(status: str, error: float) -> None:
    """A mean counts once all seeds have ended, and only when all of them are finite and ended well."""
    tally = Tally(4, [0, 1])
    tally.add(ended("a", 0, error=0.1))
    assert tally.best is None
    tally.add(ended("a", 1, status, error))
    assert tally.best is None
    tally.add(ended("b", 0, error=3.0))
    tally.add(ended("b", 1, error=5.0))
    assert tally.best == (4.0, "b")


def test_plain_lines_where_there_is_no_terminal() -> None:
    """A line when something changed, at most every ten seconds, and one at the end."""
    clock, stream = Clock(), io.StringIO()
    tally = Tally(2, [0], clock=clock)
    with Display(tally, stream, title="run") as display:
        tally.add(ended("a", 0))
        display.tick()
        assert stream.getvalue() == ""
        clock.now = LINE_S
        display.tick()
        clock.now = 2 * LINE_S
        display.tick()  # nothing changed
        tally.add(ended("b", 0, error=0.5))
    assert stream.getvalue().splitlines() == [
        "run: 1/2 trials, 0 running, best charged_error 1 (a)",
        "run: 2/2 trials, 0 running, best charged_error 0.5 (b)",
    ]


def test_a_live_view_on_a_terminal() -> None:
    """A terminal shows a bar that is redrawn in place, and keeps the last line."""
    clock, stream = Clock(), Terminal()
    tally = Tally(2, [0], clock=clock)
    with Display(tally, stream, title="run") as display:
        tally.add(ended("a", 0, "diverged"))
        clock.now = 1.0
        display.tick()
        assert "\x1b[" in stream.getvalue()
        assert "1 diverged" in stream.getvalue()
    assert stream.getvalue().rstrip().endswith("run: 1/2 trials, 0 running, 1 diverged")


def test_a_line_every_so_many_epochs_of_a_trial() -> None:
    """Counted by the trial's own epochs; what was not measured is left out, non-finite values are not."""
    said: list[str] = []
    log = EpochLog(2, said.append)
    trial = TrialSpec("a-s0", "a", 0, 0, {"max_epochs": 5})
    for epoch in range(1, 6):
        log(
            trial,
            {
                "epoch": float(epoch),
                "loss": 1 / epoch,
                "val_loss": float("nan"),
                "coverage": 0.9,
                "charged_error": float("inf"),
                "nan_count": float(epoch > 3),
            },
        )
    assert said == [
        "a-s0 epoch 2/5, loss 0.5, coverage 0.9, charged_error inf",
        "a-s0 epoch 4/5, loss 0.25, coverage 0.9, charged_error inf, 1 non-finite",
    ]
