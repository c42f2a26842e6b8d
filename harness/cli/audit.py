"""`scm-harness audit PLAN.yaml`: name the knobs of a plan that do nothing, before a sweep."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from harness.cli.arguments import CommandParser
from harness.errors import EXIT_FINDINGS, EXIT_OK


def make_parser() -> CommandParser:
    """The options of the command."""
    parser = CommandParser(
        "audit",
        "Train a plan's task on few rows with one knob moved at a time, and name the knobs that change "
        "nothing. Exit code 1 when there are any.",
    )
    parser.add_argument("plan", type=Path, metavar="PLAN.yaml", help="the plan to audit")
    parser.add_argument(
        "--draws", type=_draws, default=3, metavar="N", help="configs that each knob is moved in (default 3)"
    )
    parser.add_argument("--json", action="store_true", help="print every verdict as JSON")
    return parser


def main(argv: Sequence[str]) -> int:
    """Audit the plan; verdicts go to stdout, progress to stderr."""
    options = make_parser().parse_args(argv)

    from harness.plan import load_plan
    from harness.yaml_text import read_yaml

    plan = load_plan(options.plan)
    given = read_yaml(options.plan).values.get("config") or {}

    from harness.audit import audit_plan, lines_of

    terminal = sys.stderr.isatty()

    def say(knob: str) -> None:
        if terminal:
            print(f"\r\x1b[Kauditing {knob}", end="", file=sys.stderr, flush=True)

    audit = audit_plan(plan, list(given), draws=options.draws, on_knob=say)
    if terminal:
        print("\r\x1b[K", end="", file=sys.stderr)
    if options.json:
        print(json.dumps([asdict(item) for item in audit.verdicts]))
    else:
        count = len(audit.verdicts)
        print(
            f"{count} knobs, {len(audit.findings)} to look at; {audit.trainings} trainings on "
            f"{audit.rows} rows, up to {audit.draws} draws a knob\n"
        )
        for line in lines_of(audit):
            print(line)
    return EXIT_FINDINGS if audit.findings else EXIT_OK


def _draws(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 64:
        raise argparse.ArgumentTypeError(f"must be a number from 1 to 64, got {text!r}")
    return int(text)
