"""The command line: finds the command that was named, loads it, runs it, and turns errors into exit codes.

A command is a module with `main(argv) -> int` and one line in `COMMANDS`. Modules are loaded when their
command is called, so that `--help` and the commands that only read Parquet start without torch and Ray.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import io
import os
import signal
import sys
from collections.abc import Sequence
from typing import NamedTuple, NoReturn

from harness.errors import EXIT_BAD_INPUT, EXIT_INTERRUPTED, EXIT_OK, UserError, nearest


class Command(NamedTuple):
    """Where a command lives, and the line that `--help` shows for it."""

    module: str
    summary: str


COMMANDS: dict[str, Command] = {
    "sweep": Command("harness.cli.sweep", "run a plan: draw configs, train them, write rows, rank them"),
    "audit": Command("harness.cli.audit", "name the knobs of a plan that do nothing, before it is run"),
    "rank": Command("harness.cli.rank", "rank the configs of a run"),
    "report": Command("harness.cli.report", "write a page of a run that needs no network, or Markdown"),
    "compare": Command("harness.cli.compare", "say what differs between two runs, pair by pair of trials"),
    "defaults": Command(
        "harness.cli.defaults", "confirm the best configs of a run on fresh seeds, and write the default"
    ),
    "robustness": Command(
        "harness.cli.robustness",
        "try laws, faults and shifted data on the best configs of a run, or on a model",
    ),
    "replay": Command("harness.cli.replay", "try a case that broke a law again"),
    "gate": Command("harness.cli.gate", "say whether a change makes training worse"),
    "spaces": Command("harness.cli.spaces", "list the named search spaces and what each varies"),
    "tasks": Command("harness.cli.tasks", "list the tasks that a plan can name"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; errors of the user are printed, one line each, to stderr."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        code = run_command(arguments)
        sys.stdout.flush()  # here, where a reader that has gone can still be dealt with
        return code
    except UserError as error:
        for line in error.lines:
            print(f"error: {line}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader (head, less) has gone. What is buffered can no longer be delivered; without this,
        # the interpreter would complain about it once more while shutting down.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK


def run_command(arguments: list[str]) -> int:
    """Dispatch to the command named first; an unknown one is a `UserError` naming the nearest."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(help_text())
        return EXIT_OK if arguments else EXIT_BAD_INPUT
    if arguments[0] == "--version":
        from reports.provenance import installed_version

        print(f"scm-harness {installed_version('scm-harness')}")
        return EXIT_OK
    name, *rest = arguments
    command = COMMANDS.get(name)
    if command is None:
        raise UserError(f"unknown command {name!r}{nearest(name, COMMANDS)} (known: {', '.join(COMMANDS)})")
    module = importlib.import_module(command.module)
    try:
        return int(module.main(rest))
    except SystemExit as stop:  # argparse's --help
        if stop.code == signal.SIGTERM:  # Ray leaves so when it is terminated while it starts
            raise KeyboardInterrupt from None
        return stop.code if isinstance(stop.code, int) else EXIT_BAD_INPUT


def help_text() -> str:
    """What `--help` prints: the commands with their summaries, and the exit codes."""
    width = max(map(len, COMMANDS))
    lines = [
        "usage: scm-harness COMMAND [OPTIONS]",
        "",
        "Find, prove and guard the training settings of models",
    ]
    lines += ["that may answer bottom.", "", "commands:"]
    lines += [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    lines += ["", "scm-harness COMMAND --help says more about one command."]
    lines += [
        "",
        "exit codes: 0 done; 1 found something (audit, robustness, replay, gate); 2 bad input (usage, plan,",
        "space, data, checkpoint); 3 the evidence does not decide (defaults, gate); 4 run folder missing,",
        "not empty, unwritable or not a run, baseline missing or not comparable (gate); 5 finished, but no",
        "config has a completed trial; 6 the environment cannot give what was asked (GPU, address);",
        "130 interrupted, finished rows kept.",
    ]
    return "\n".join(lines)


def entry() -> None:
    """The console script `scm-harness`."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that has no ± gets a question mark
    leave(main())


def leave(code: int) -> NoReturn:
    """End the process when its exit handlers have run: to take torch and Ray apart takes half a second."""
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # whoever read it has gone, or it is closed
            stream.flush()
    os._exit(code)
