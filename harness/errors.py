"""What a user is told when a command cannot do what was asked, and the exit code that goes with it.

Everything a user can get wrong is raised as `UserError`; the command line prints its lines and returns its
code. An exception of any other type is a defect of this project and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

EXIT_OK = 0
EXIT_FINDINGS = 1  # an audit found knobs that do nothing, an examination broken laws
EXIT_BAD_INPUT = 2  # usage, plan, space, data, checkpoint
EXIT_THIN_EVIDENCE = 3  # too few configs, seeds or data to decide by
EXIT_RUN_FOLDER = 4  # missing, not empty, unwritable, or not a run
EXIT_NOTHING_COMPLETED = 5  # the run finished and no config has a completed trial
EXIT_ENVIRONMENT = 6  # a GPU, an address or memory that is not there
EXIT_INTERRUPTED = 130  # stopped by the user; finished rows are kept


class UserError(Exception):
    """A mistake or a lack that the user can act on: one line for each, and an exit code."""

    def __init__(self, message: str, exit_code: int = EXIT_BAD_INPUT, more: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.lines: tuple[str, ...] = tuple(one_line(text) for text in (message, *more))
        self.exit_code = exit_code

    def __str__(self) -> str:
        return "; ".join(self.lines)


def one_line(text: object) -> str:
    """The text without line breaks, so that a message stays one line whatever a library put in it."""
    return " ".join(str(text).split())


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint `, did you mean 'x'?`, for the known name closest to `name`, or nothing when none is close."""
    close = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.6)
    return f", did you mean {close[0]!r}?" if close else ""
