"""`scm-harness tasks`: the tasks that a plan can name, each with one line on what it is."""

from __future__ import annotations

from collections.abc import Sequence

from harness.cli.arguments import CommandParser
from harness.errors import EXIT_OK


def main(argv: Sequence[str]) -> int:
    """Print one line for each task; results go to stdout."""
    CommandParser("tasks", "List the tasks that a plan can name under task.name.").parse_args(argv)

    from trainables.tasks.registry import TASKS

    own = "module:attribute"
    width = max(map(len, (*TASKS, own)))
    for name, entry in TASKS.items():
        print(f"{name:<{width}}  {entry.summary}")
    print(f"{own:<{width}}  one of your own: an object of the task protocol, or what makes one")
    return EXIT_OK
