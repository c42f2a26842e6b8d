"""`scm-harness defaults RUN`: confirm the best configs of a run, and write the default with its record."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from harness.cli.arguments import CommandParser, parse_count
from harness.errors import EXIT_BAD_INPUT, EXIT_ENVIRONMENT, EXIT_OK, UserError

if TYPE_CHECKING:
    from harness.defaults.decide import Guard
    from harness.defaults.session import Found
    from reports.metrics import Metric

TOP = 5
SEEDS = 10
OBJECTIVE = "charged_error"


def make_parser() -> CommandParser:
    """The options of the command."""
    parser = CommandParser(
        "defaults",
        "Train the best configs of a run and the current default again, with fresh seeds and on a held-out "
        "scenario, and write the config that is the default now, with the record of the decision. It changes "
        "only when the evidence says so. Exit code 3 when the evidence is too thin to decide by.",
    )
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="the run folder")
    add("--out", type=Path, required=True, metavar="FILE.yaml", help="where the default and its record go")
    add(
        "--current",
        type=Path,
        metavar="FILE.yaml",
        help="the default of today: a config, or what this command wrote before (default: the project's "
        "defaults, with what the run's plan fixes)",
    )
    add(
        "--top", type=parse_count, default=TOP, metavar="K", help=f"configs of the run to try (default {TOP})"
    )
    add(
        "--seeds",
        type=parse_count,
        default=SEEDS,
        metavar="N",
        help=f"fresh seeds of the confirmation, and as many of the report (default {SEEDS}, at least 5)",
    )
    add(
        "--holdout",
        action="append",
        default=[],
        metavar="PLAN.yaml",
        help="a plan whose task is the held-out scenario (may be repeated), or none; without it the task "
        "deals or draws other data",
    )
    add("--by", default=OBJECTIVE, metavar="METRIC", help=f"the error that decides (default {OBJECTIVE})")
    add(
        "--guard",
        action="append",
        default=[],
        metavar="METRIC=MARGIN",
        help="a figure in which no scenario may lose more than the margin: a ratio for errors and times, a "
        "difference for shares; may be repeated (default coverage_shortfall=0.01, charged_error=1.05, "
        "false_accept_rate=0.05, step_time_ms=2)",
    )
    add(
        "--max-false-reject",
        type=_share,
        metavar="SHARE",
        help="of rows with a value, what the frozen tau_infer may reject (default: what the config rejected "
        "on validation rows)",
    )
    add(
        "--export", type=Path, metavar="FOLDER", help="write a model of the default with its frozen threshold"
    )
    add("--device", default="cpu", metavar="D", help="cpu or cuda (default cpu)")
    return parser


def main(argv: Sequence[str]) -> int:
    """Decide; the decision goes to stdout and to the file, progress to stderr."""
    options = make_parser().parse_args(argv)
    _check_out(options.out, options.export)

    from harness.defaults.record import make_record, record_text, summary_lines
    from harness.defaults.session import Request, find_default
    from harness.robustness.examination import printer
    from reports.fragments import write_text_atomically
    from trainables.trial import DeviceError, check_device

    objective = parse_objective(options.by)
    try:
        check_device(options.device)
    except DeviceError as error:
        raise UserError(str(error), EXIT_ENVIRONMENT) from None
    request = Request(
        run=options.run,
        objective=objective,
        top=options.top,
        seeds=options.seeds,
        holdout=tuple(options.holdout),
        current=options.current,
        guards=parse_guards(options.guard),
        max_false_reject=options.max_false_reject,
        device=options.device,
    )
    say = printer(sys.stderr.isatty())
    try:
        found = find_default(request, say)
    finally:
        say("")
    command = shlex.join(["scm-harness", "defaults", *map(str, argv)])
    text = record_text(make_record(found, commands=[command]))
    try:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(text, options.out)
    except OSError as error:
        raise UserError(f"{options.out} cannot be written: {error}") from None
    for line in summary_lines(found):
        print(line)
    print(f"written to {options.out}")
    if options.export is not None:
        print(_export(found, options.export))
    return EXIT_OK


def parse_objective(text: str) -> Metric:
    """The metric that decides: one that the validation and the test split both have."""
    from reports.metrics import parse_metric

    try:
        metric = parse_metric(text)
    except ValueError as error:
        raise UserError(f"--by: {error}", EXIT_BAD_INPUT) from None
    if not (metric.name in _OF_BOTH_SPLITS or metric.name.startswith("metric.")):
        raise UserError(
            "--by: the metric must be measured on the validation and the test split "
            f"({', '.join(_OF_BOTH_SPLITS)}, or a task's own, as in metric.hits:higher), got {text!r}"
        )
    return metric


_OF_BOTH_SPLITS = ("charged_error", "accepted_error", "coverage", "false_accept_rate", "false_reject_rate")


def parse_guards(texts: Sequence[str]) -> tuple[Guard, ...]:
    """The guards of the session, with those that are given in place of, or beside, its own."""
    from harness.defaults.decide import LOG_RATIO, Guard, compare_of
    from harness.defaults.session import GUARDS, STEP_TIME
    from reports.metrics import parse_metric

    guards = {guard.name: guard for guard in GUARDS}
    for text in texts:
        name, equals, margin = text.partition("=")
        try:
            metric = parse_metric(name)
            if not equals:
                raise ValueError(f"must read METRIC=MARGIN, got {text!r}")
            compare = compare_of(metric)
            if compare == LOG_RATIO and metric.direction == "higher":
                raise ValueError(f"{metric.name} has no ratio that could be guarded: it is better higher")
            guards[metric.name] = Guard(
                name=metric.name,
                compare=compare,
                margin=float(margin),
                direction=metric.direction,
                by_median=metric.name == STEP_TIME,
            )
        except ValueError as error:
            raise UserError(f"--guard: {error}") from None
    return tuple(guards.values())


def _export(found: Found, folder: Path) -> str:
    from trainables.exported import write_exported

    held = found.threshold
    if held is None or held.record is None:
        why = "its threshold was not calibrated" if held is None else held.why_not
        raise UserError(f"no model was exported: {why}")
    seed, trained = next(iter(held.models.items()))
    config = {**trained.config, "tau_infer": held.record.tau_infer}
    try:
        write_exported(folder, replace(trained, config=config), held.record)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error}") from None
    return f"exported to {folder}: the model of seed {seed}, with tau_infer {held.record.tau_infer:.4g}"


def _check_out(out: Path, export: Path | None) -> None:
    if out.is_dir():
        raise UserError(f"--out must be a file, got the folder {out}")
    if out.suffix not in (".yaml", ".yml"):
        raise UserError(f"--out must end in .yaml, got {out}")
    folder = next(parent for parent in out.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):  # said now, not after all trainings
        raise UserError(f"--out {out} cannot be written: {folder} is no folder that may be written to")
    if export is not None and export.exists() and not export.is_dir():
        raise UserError(f"--export must be a folder, got the file {export}")


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value < 1.0:
        raise argparse.ArgumentTypeError(f"must be a share in [0, 1), got {text!r}")
    return value
