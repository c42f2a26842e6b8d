"""`scm-harness compare RUN_A RUN_B`: what differs between two runs, pair by pair of trials."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.cli.arguments import TOP, CommandParser, parse_top
from harness.cli.rank import PLAN_FILE, make_options
from harness.errors import EXIT_BAD_INPUT, EXIT_OK, EXIT_RUN_FOLDER, UserError

if TYPE_CHECKING:
    from reports.comparison import ComparedRun

FORMATS = ("text", "md", "html")


def make_parser() -> CommandParser:
    """The options of the command."""
    parser = CommandParser(
        "compare",
        "Compare run B with run A: the configs both have, paired by seed; what changed in plan, versions and "
        "data; how the ranks moved. Writes nothing into the runs. Exit codes: 0 compared, 2 bad input, "
        "4 a run is missing or unreadable.",
    )
    add = parser.add_argument
    add("a", type=Path, metavar="RUN_A", help="the run folder that is compared with")
    add("b", type=Path, metavar="RUN_B", help="the run folder that is looked at")
    add("--format", choices=FORMATS, default="text", help="text, md (Markdown) or html (default text)")
    add("--out", type=Path, metavar="FILE", help="write there instead of to the standard output")
    add("--top", type=parse_top, default=TOP, metavar="N", help=f"configs to show, or all (default {TOP})")
    add("--level", type=_level, default=0.9, metavar="L", help="of the intervals (default 0.9)")
    add("--json", action="store_true", help="print the comparison as JSON, NaN as null")
    return parser


def main(argv: Sequence[str]) -> int:
    """Compare two runs; what was found goes to the standard output, or to a file."""
    options = make_parser().parse_args(argv)
    if options.json and options.format != "text":
        raise UserError(f"--json and --format {options.format} ask for two forms: give one of them")
    one, other = read_compared(options.a, options.b)

    from reports.comparison import compare_runs, comparison_values

    comparison = compare_runs(one, other, level=options.level)
    if options.json:
        text = json.dumps(comparison_values(comparison), allow_nan=False) + "\n"
    elif options.format == "html":
        from reports.comparison_page import render_page

        text = render_page(comparison, options.top)
    else:
        from reports.comparison_text import render_markdown, render_text

        text = (render_text if options.format == "text" else render_markdown)(comparison, options.top)
    if options.out is None:
        print(text, end="")
    else:
        _write(options.out, text)
    return EXIT_OK


def read_compared(a: Path, b: Path) -> tuple[ComparedRun, ComparedRun]:
    """Both runs, ranked by the rules of A's plan, each over the seeds of its own.

    Raises UserError with code 4 for a folder that is no readable run, and with code 2 where rows cannot be
    ranked. A plan that cannot be read is left out: rows can be compared without it.
    """
    from reports.comparison import ComparedRun
    from reports.fragments import RunReadError
    from reports.pages import read_mapping_part
    from reports.provenance import PROVENANCE_FILE
    from reports.ranking import rank
    from reports.robustness_scores import read_robustness
    from reports.rows import read_rows

    folders = (a, b)
    try:
        rows = [read_rows(folder) for folder in folders]
        robustness = [read_robustness(folder) for folder in folders]
    except RunReadError as error:
        raise UserError(str(error), EXIT_RUN_FOLDER) from None
    rules = make_options(a, {})
    runs = []
    for folder, held, scores in zip(folders, rows, robustness, strict=True):
        try:
            own = rules if folder == a else replace(rules, seeds=make_options(folder, {}).seeds)
            leaderboard = rank(held, own, scores)
        except ValueError as error:
            raise UserError(f"{folder} cannot be ranked as {a} is: {error}", EXIT_BAD_INPUT) from None
        runs.append(
            ComparedRun(
                path=str(folder),
                rows=held,
                leaderboard=leaderboard,
                plan=_read_plan(folder),
                provenance=read_mapping_part(folder / PROVENANCE_FILE)[0],
            )
        )
    return runs[0], runs[1]


def _read_plan(folder: Path) -> Mapping[str, Any] | None:
    """The plan's plain values, whatever version wrote it; None where there is none."""
    if not (folder / PLAN_FILE).is_file():
        return None
    from harness.yaml_text import read_yaml

    try:
        values = read_yaml(folder / PLAN_FILE).values
    except UserError:
        return None
    return values if isinstance(values, Mapping) else None


def _write(path: Path, text: str) -> None:
    """Write the file whole or not at all."""
    beside = path.with_name(path.name + ".tmp")
    try:
        beside.write_text(text, encoding="utf-8", errors="backslashreplace")
        os.replace(beside, path)
    except OSError as error:
        raise UserError(f"--out {path} cannot be written: {error.strerror or error}") from None
    finally:
        beside.unlink(missing_ok=True)


def _level(text: str) -> float:
    try:
        level = float(text)
    except ValueError:
        level = -1.0
    if not 0.0 < level < 1.0:
        raise argparse.ArgumentTypeError(f"must be a number between 0 and 1, got {text!r}")
    return level
