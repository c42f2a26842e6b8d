"""`scm-harness replay ID`: try a case that broke a law again, with the stored model and today's code."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path

from harness.cli.arguments import CommandParser
from harness.errors import EXIT_FINDINGS, EXIT_OK, EXIT_RUN_FOLDER, UserError, one_line

PATTERN = "**/counterexamples.parquet"


def make_parser() -> CommandParser:
    """The options of the command."""
    parser = CommandParser(
        "replay",
        "Try a counterexample of `scm-harness robustness` again. Exit code 1 when it still fails, 0 when it "
        "is fixed.",
    )
    parser.add_argument("id", metavar="ID", help="the counterexample's id, as it was printed")
    parser.add_argument(
        "--in",
        dest="folder",
        type=Path,
        metavar="DIR",
        help="the folder that holds counterexamples.parquet (default: looked for below runs/)",
    )
    parser.add_argument("--device", default="cpu", metavar="D", help="cpu or cuda (default cpu)")
    return parser


def main(argv: Sequence[str]) -> int:
    """Replay one counterexample; what came of it goes to stdout."""
    options = make_parser().parse_args(argv)

    from reports.fragments import RunReadError
    from reports.robustness_findings import find_counterexample

    folder = options.folder if options.folder is not None else _look_for(options.id)
    try:
        row = find_counterexample(folder, options.id)
    except RunReadError as error:
        raise UserError(one_line(error)) from None

    from harness.robustness.law import DoesNotApplyError
    from harness.robustness.stress import replay
    from harness.task_errors import task_errors_told
    from trainables.trained import CheckpointError

    try:
        with task_errors_told(row["task"]), contextlib.redirect_stdout(sys.stderr):
            try:
                said = replay(row, folder, options.device)
            except (CheckpointError, FileNotFoundError) as error:
                raise UserError(one_line(error)) from None
            except DoesNotApplyError as error:
                raise UserError(f"{options.id} cannot be tried again: {one_line(error)}") from None
    finally:
        sys.stdout.flush()
    print(f"{row['property']}: {row['law']}")
    print(f"  model {row['model_digest']} ({row['trial_id']}), case: {row['shown']}")
    if said is None:
        print(f"fixed: {options.id} does not break the law any more")
        return EXIT_OK
    print(f"still fails: {said}")
    return EXIT_FINDINGS


def _look_for(name: str) -> Path:
    """The folder below runs/ whose counterexamples have this id."""
    from reports.fragments import RunReadError
    from reports.robustness_findings import find_counterexample

    looked = sorted(path.parent for path in Path("runs").glob(PATTERN))
    for folder in looked:
        try:
            find_counterexample(folder, name)
        except RunReadError:
            continue
        return folder
    where = f"{len(looked)} folders below runs/" if looked else "runs/, where there are none"
    raise UserError(
        f"no counterexample {name!r} in {where}; name its folder by --in DIR",
        EXIT_RUN_FOLDER if not looked else 2,
    )
