"""How a command reads its arguments: argparse, with usage errors raised as one-line `UserError`s.

argparse rather than a framework: it costs nothing to start, and its errors can be made the one line that
every other error of this command line is.
"""

from __future__ import annotations

import argparse
from typing import NoReturn

from harness.errors import EXIT_BAD_INPUT, UserError

TOP = 10


class CommandParser(argparse.ArgumentParser):
    """An argument parser that raises `UserError` (exit code 2) where argparse would print and exit."""

    def __init__(self, command: str, description: str) -> None:
        super().__init__(prog=f"scm-harness {command}", description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message} (see {self.prog} --help)", EXIT_BAD_INPUT)


def parse_count(text: str) -> int:
    """How many of something: a positive number."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text!r}")
    return int(text)


def parse_top(text: str) -> int | None:
    """How many configs to print: a positive number, or all (None)."""
    if text == "all":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive number or all, got {text!r}")
    return int(text)
