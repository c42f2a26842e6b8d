"""`scm-harness tasks`: the tasks that a plan can name, each with its first line of documentation."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

from harness.cli.arguments import CommandParser
from harness.errors import EXIT_OK


def main(argv: Sequence[str]) -> int:
    """Print one line for each task; results go to stdout."""
    CommandParser("tasks", "List the tasks that a plan can name under task.name.").parse_args(argv)

    from trainables.tasks.registry import TASKS

    width = max(map(len, TASKS))
    for name, make in TASKS.items():
        summary = (inspect.getdoc(make) or "").partition("\n")[0]
        print(f"{name:<{width}}  {summary}")
    print(
        "module:attribute"
        + "  an object of the task protocol, or a function that makes one from its parameters"
    )
    return EXIT_OK
