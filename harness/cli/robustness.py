"""`scm-harness robustness TARGET`: prove configs on singular inputs, injected faults and shifted data."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from harness.cli.arguments import CommandParser, parse_top
from harness.errors import EXIT_ENVIRONMENT, EXIT_FINDINGS, EXIT_OK, UserError

TOP = 3
FOLDER = "robustness"


def make_parser() -> CommandParser:
    """The options of the command."""
    parser = CommandParser(
        "robustness",
        "Train the best configs of a run (or one config, or take a trained model), try laws on their models, "
        "train them under faults, shift their data. Exit code 1 when a law is broken.",
    )
    add = parser.add_argument
    add(
        "target",
        type=Path,
        nargs="?",
        metavar="RUN|CONFIG|CHECKPOINT",
        help="a run folder, a YAML file of a config (or a plan), or a checkpoint",
    )
    add("--top", type=parse_top, default=TOP, metavar="N", help=f"configs of a run, or all (default {TOP})")
    add("--profile", default="smoke", metavar="NAME", help="smoke, ci or nightly: how hard (default smoke)")
    add(
        "--faults",
        metavar="NAMES",
        help="all, none, or faults with commas between, as in label_flips,rate_spikes:high (default: as the "
        "profile says)",
    )
    add("--properties", default="all", metavar="NAMES", help="all, none, or laws with commas between")
    add("--no-shift", action="store_true", help="leave the domain shift out")
    add("--seed", type=_seed, default=0, metavar="S", help="of the cases that are drawn (default 0)")
    add("--out", type=Path, metavar="DIR", help=f"folder for what is found (default RUN/{FOLDER})")
    add("--plan", type=Path, metavar="PLAN.yaml", help="task and config of a checkpoint of a training")
    add("--device", default="cpu", metavar="D", help="cpu or cuda (default cpu)")
    add("--list", action="store_true", help="list properties and faults, and do nothing else")
    return parser


def main(argv: Sequence[str]) -> int:
    """Examine the target; results go to stdout, progress to stderr."""
    options = make_parser().parse_args(argv)
    if options.list:
        return _list()
    if options.target is None:
        raise UserError("scm-harness robustness: name a run folder, a config file or a checkpoint")

    from harness.robustness.profiles import parse_profile

    profile = parse_profile(options.profile)

    from harness.robustness.examined import find_examined
    from harness.robustness.faults import parse_faults
    from harness.robustness.stress import parse_properties
    from trainables.trial import DeviceError, check_device

    faults = parse_faults(profile.faults if options.faults is None else options.faults)
    laws = [] if options.properties == "none" else parse_properties(options.properties)
    try:
        check_device(options.device)
    except DeviceError as error:
        raise UserError(str(error), EXIT_ENVIRONMENT) from None
    examined = find_examined(
        options.target, top=options.top, seeds=profile.seeds, plan=options.plan, device=options.device
    )
    out = options.out
    if out is None:
        is_run = options.target.is_dir()
        out = options.target / FOLDER if is_run else Path("runs") / f"{examined.name}-{FOLDER}"

    from harness.robustness.examination import Request, examine, printer
    from harness.robustness.told import lines_of

    request = Request(
        profile=profile,
        laws=laws,
        faults=faults,
        seed=options.seed,
        out=out,
        device=options.device,
        command=shlex.join(["scm-harness", "robustness", *map(str, argv)]),
        shift=not options.no_shift,
    )
    say = printer(sys.stderr.isatty())
    try:
        examination = examine(examined, request, say=say)
    finally:
        say("")
    for line in lines_of(examination):
        print(line)
    return EXIT_FINDINGS if examination.findings.broken or examination.trouble else EXIT_OK


def _list() -> int:
    from harness.robustness.faults import FAULTS
    from harness.robustness.model_laws import MODEL_LAWS

    width = max(map(len, [*MODEL_LAWS, *FAULTS]))
    print("properties of a trained model and its task:")
    for name, law in MODEL_LAWS.items():
        print(f"  {name:<{width}}  {law.law}")
    print("\nfaults of a training:")
    for name, fault in FAULTS.items():
        print(f"  {name:<{width}}  {fault.summary} ({', '.join(fault.severities)})")
    return EXIT_OK


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**31:
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 to 2^31 - 1, got {text!r}")
    return int(text)
