"""`scm-harness sweep PLAN.yaml`: run a plan from its configs to its ranked rows."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from harness.cli.arguments import TOP, CommandParser, parse_count, parse_top
from harness.errors import EXIT_INTERRUPTED


def make_parser() -> CommandParser:
    """The options of the command."""
    parser = CommandParser(
        "sweep", "Draw configs from a plan's space, train each with every seed, rank them."
    )
    parser.add_argument("plan", type=Path, metavar="PLAN.yaml", help="the plan to run")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="the run folder (default: runs/NAME of the plan)"
    )
    parser.add_argument(
        "--address", metavar="ADDR", help="join the Ray cluster at host:port; without it, a local one"
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on with the run in DIR: only what is missing runs"
    )
    parser.add_argument(
        "--top", type=parse_top, default=TOP, metavar="N", help=f"configs to print, or all (default {TOP})"
    )
    parser.add_argument(
        "--log-every",
        type=parse_count,
        metavar="N",
        help="also print how each trial does, every N of its epochs (default: only how the sweep does; "
        "the history of every epoch is in the run folder)",
    )
    return parser


def main(argv: Sequence[str]) -> int:
    """Run the sweep; the ranking goes to stdout, progress and errors to stderr."""
    options = make_parser().parse_args(argv)

    from harness.plan import load_plan

    plan = load_plan(options.plan)
    out = options.out if options.out is not None else Path("runs") / options.plan.stem

    from harness.sweep import run_sweep

    result = run_sweep(plan, out, address=options.address, resume=options.resume, log_every=options.log_every)
    if result.interrupted:
        again = f"scm-harness sweep {options.plan} --out {out} --resume"
        print(f"interrupted: {result.rows} rows kept in {out}; go on with: {again}", file=sys.stderr)
        return EXIT_INTERRUPTED

    from harness.cli.rank import run

    return run(out, top=options.top)
