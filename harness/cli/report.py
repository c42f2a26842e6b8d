"""`scm-harness report RUN`: write one offline page of a run, or print a summary for a pull request."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from harness.cli.arguments import CommandParser
from harness.errors import EXIT_ENVIRONMENT, EXIT_OK, EXIT_RUN_FOLDER, UserError

FORMATS = ("html", "md")


def make_parser() -> CommandParser:
    """The options of the command."""
    parser = CommandParser(
        "report",
        "Write one HTML file that needs no network and no script: verdict, leaderboard, figures, and how to "
        "find each number in the run's files. Exit code 4 where RUN is no run or the file cannot be written, "
        "6 where --interactive needs a plotly that is not installed.",
    )
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="the run folder")
    add(
        "--format",
        choices=FORMATS,
        default="html",
        help="html: a page (default); md: verdict and best configs for a pull request, printed",
    )
    add("--interactive", action="store_true", help="add figures that answer to the mouse, by plotly (5 MB)")
    add(
        "--out",
        type=Path,
        metavar="PATH",
        help="the file to write (default RUN/report.html; Markdown is printed)",
    )
    return parser


def main(argv: Sequence[str]) -> int:
    """Write the report of a run; its path, or its Markdown, goes to stdout."""
    options = make_parser().parse_args(argv)
    return run(options.run, form=options.format, interactive=options.interactive, out=options.out)


def run(folder: Path, *, form: str = "html", interactive: bool = False, out: Path | None = None) -> int:
    """Write the report of the run in `folder` and return the exit code.

    Raises UserError with code 4 where the folder is no run or the file cannot be written, with code 6 where
    plotly is missing.
    """
    if interactive and form != "html":
        raise UserError(f"--interactive needs --format html, got --format {form}")

    from reports.fragments import RunReadError
    from reports.run_page import PAGE_FILE, read_run, render_run, write_run_page

    try:
        held = read_run(folder)
    except RunReadError as error:
        raise UserError(str(error), EXIT_RUN_FOLDER) from None
    if form == "md":
        from reports.run_markdown import render_markdown

        page = render_markdown(held)
        if out is None:
            print(page, end="")
            return EXIT_OK
    elif interactive:
        from reports.run_interactive import PlotlyMissingError, render_interactive

        try:
            page = render_interactive(held)
        except PlotlyMissingError as error:
            raise UserError(str(error), EXIT_ENVIRONMENT) from None
    else:
        page = render_run(held)
    path = folder / PAGE_FILE if out is None else out
    if path.is_dir():
        raise UserError(f"cannot write the report: {path} is a folder", EXIT_RUN_FOLDER)
    try:
        write_run_page(page, path)
    except OSError as error:
        raise UserError(f"cannot write the report: {error}", EXIT_RUN_FOLDER) from None
    print(f"page: {path}" if form == "html" else f"report: {path}")
    return EXIT_OK
