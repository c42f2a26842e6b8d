"""`scm-harness gate`: does a change make training worse? Run, check rows, accept a baseline, plan seeds."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, date, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.cli.arguments import CommandParser
from harness.errors import EXIT_BAD_INPUT, EXIT_INTERRUPTED, UserError, nearest, one_line
from harness.gate.codes import (
    EXIT_BASELINE,
    EXIT_INCOMPLETE,
    EXIT_INCONCLUSIVE,
    EXIT_PASS,
    EXIT_REGRESSION,
    MEANINGS,
)

if TYPE_CHECKING:
    from harness.gate.arm_rows import ArmRows
    from harness.gate.rules import GateRules, MetricRule
    from harness.gate.session import Anchor, GateResult
    from harness.gate.suite import Suite

RUNS = Path("runs") / "gate"
ON_INCONCLUSIVE = ("fail", "warn", "pass")
CODES = "exit codes: " + "; ".join(f"{code} {text}" for code, text in MEANINGS.items()) + "; 130 interrupted"


def run_parser() -> CommandParser:
    """The options of `gate run`."""
    parser = make_parser("run", "Train a suite with this code and with a baseline, seed by seed, and decide.")
    add = parser.add_argument
    add("--suite", type=Path, required=True, metavar="SUITE.yaml", help="what is trained, and the margins")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--against", metavar="REF", help="the baseline is a commit of the suite's repository")
    group.add_argument(
        "--baseline-python", type=Path, metavar="PATH", help="the baseline is what this interpreter has"
    )
    group.add_argument(
        "--record",
        action="store_true",
        help="train every seed of this code and compare with nothing: rows for `gate accept`",
    )
    add(
        "--any-baseline",
        action="store_true",
        help="a stored baseline where one fits this machine, else --against where that commit is there, "
        "else this code against itself, and say which",
    )
    add_baselines(parser)
    add("--out", type=Path, metavar="DIR", help="where rows are kept (default: runs/gate/NAME of the suite)")
    add_output_options(parser)
    return parser


def check_parser() -> CommandParser:
    """The options of `gate check`."""
    parser = make_parser("check", "Decide on rows that are there already; nothing is trained.")
    add = parser.add_argument
    what = "the folder of a gate, of one of its arms, of a baseline or of a sweep, or a Parquet file of rows"
    add("--baseline", type=Path, required=True, metavar="B", help=what)
    add("--candidate", type=Path, required=True, metavar="C", help="the same")
    add("--suite", type=Path, metavar="SUITE.yaml", help="margins and scenarios (default: the usual margins)")
    add_output_options(parser)
    return parser


def accept_parser() -> CommandParser:
    """The options of `gate accept`."""
    parser = make_parser(
        "accept", "Make the rows of a gate's candidate the next version of the stored baseline."
    )
    add = parser.add_argument
    add("--reason", required=True, metavar="TEXT", help="why; it is kept in the manifest")
    add("--suite", type=Path, metavar="SUITE.yaml", help="the suite (default: that of --out)")
    add("--out", type=Path, metavar="DIR", help="the gate's folder (default: as `gate run` chooses it)")
    add_baselines(parser)
    add("--expires", type=parse_date, metavar="YYYY-MM-DD", help="accepted until this day, and not after it")
    add("--release", action="store_true", help="also the last release, which later candidates are held to")
    add("--approver", metavar="NAME", help="who accepts (default: git's user.name)")
    return parser


def plan_parser() -> CommandParser:
    """The options of `gate plan`."""
    parser = make_parser("plan", "Say how many seeds a suite needs, from the spread of rows that are there.")
    add = parser.add_argument
    add("--suite", type=Path, required=True, metavar="SUITE.yaml", help="scenarios and margins")
    add(
        "--baseline",
        type=Path,
        metavar="B",
        help="rows of the baseline (default: those of the gate's folder)",
    )
    add("--candidate", type=Path, metavar="C", help="rows of the candidate")
    add("--out", type=Path, metavar="DIR", help="the gate's folder (default: as `gate run` chooses it)")
    add("--power", type=parse_power, default=0.9, metavar="P", help="chance to be right (default 0.9)")
    return parser


def make_parser(name: str, description: str) -> CommandParser:
    """A parser whose help ends with the exit codes."""
    parser = CommandParser(f"gate {name}", description)
    parser.epilog = CODES
    return parser


def add_baselines(parser: argparse.ArgumentParser) -> None:
    """Where what was accepted is stored."""
    parser.add_argument(
        "--baselines",
        type=Path,
        metavar="DIR",
        help="stored baselines (default: baselines/ beside the suite)",
    )


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """Where the verdict is written, and what an open one means."""
    add = parser.add_argument
    add(
        "--on-inconclusive",
        choices=ON_INCONCLUSIVE,
        default="fail",
        help="when the evidence does not decide: fail (exit 3), warn or pass (exit 0); default fail",
    )
    add("--json", type=Path, metavar="PATH", help="write the decision as JSON")
    add("--junit", type=Path, metavar="PATH", help="write it as JUnit XML")
    add(
        "--summary",
        type=Path,
        metavar="PATH",
        help="append it as Markdown (default: $GITHUB_STEP_SUMMARY where that is set)",
    )


def main(argv: Sequence[str]) -> int:
    """Run `gate run`, `check`, `accept` or `plan`; the verdict goes to stdout, progress to stderr."""
    arguments = list(argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(help_text())
        return EXIT_PASS if arguments else EXIT_BAD_INPUT
    name, *rest = arguments
    if name not in ACTIONS:
        raise UserError(f"unknown action gate {name!r}{nearest(name, ACTIONS)} (known: {', '.join(ACTIONS)})")
    return ACTIONS[name](rest)


def help_text() -> str:
    """What `gate --help` prints."""
    return "\n".join(
        [
            "usage: scm-harness gate ACTION [OPTIONS]",
            "",
            "Does a change make training worse? Pass, fail, or not decided yet.",
            "",
            "actions:",
            "  run     train a suite with this code and with a baseline, and decide",
            "  check   decide on rows that are there already; starts without torch",
            "  accept  make the candidate of the last run the next stored baseline",
            "  plan    how many seeds a suite needs",
            "",
            CODES,
            "",
            "scm-harness gate ACTION --help says more about one action.",
        ]
    )


def main_run(argv: Sequence[str]) -> int:
    """`gate run`."""
    options = run_parser().parse_args(argv)
    if options.any_baseline and (options.baseline_python is not None or options.record):
        raise UserError("--any-baseline goes with --against or alone, not with --baseline-python or --record")

    from harness.environment import terminate_as_interrupt
    from harness.gate.session import GateOptions, run_gate
    from harness.gate.suite import load_suite

    suite = load_suite(options.suite)
    out = options.out if options.out is not None else RUNS / suite.name
    given = GateOptions(
        out=out,
        against=options.against,
        baseline_python=options.baseline_python,
        any_baseline=options.any_baseline,
        baselines=options.baselines,
        record=options.record,
    )
    try:
        with terminate_as_interrupt():
            result = run_gate(suite, given, say_progress)
    except KeyboardInterrupt:
        again = command_line("gate", "run", *argv)
        print(f"interrupted: finished rows are kept in {out}; go on with: {again}", file=sys.stderr)
        return EXIT_INTERRUPTED
    if given.record:
        print(
            f"recorded {len(suite.scenarios)} scenarios with {len(suite.seeds)} seeds in "
            f"{result.candidate_folder}"
        )
        print("no verdict: nothing was compared")
        print(f"accept them: {accept_command(options, 'first baseline')}")
        return EXIT_PASS
    return tell(result_views(result, argv, options), options, run_code(result, options.on_inconclusive))


def main_check(argv: Sequence[str]) -> int:
    """`gate check`."""
    options = check_parser().parse_args(argv)

    from harness.gate.comparison import compare_arms
    from harness.gate.rules import GateRules
    from harness.gate.session import make_anchor, told_arm
    from harness.gate.sources import check_same_machine, planned_seeds, reached_look, read_side

    suite = None
    if options.suite is not None:
        from harness.gate.suite import load_suite

        suite = load_suite(options.suite)
    base = read_side(options.baseline, name="baseline")
    candidate = read_side(options.candidate, name="candidate")
    check_same_machine(base, candidate)
    rules = GateRules() if suite is None else suite.rules
    if suite is None:
        rules = replace(rules, metrics=measured_rules(rules, base, candidate))
        scenarios = list(dict.fromkeys([*base.scenarios, *candidate.scenarios]))
        seeds = planned_seeds(base, candidate, scenarios, rules.looks)
    else:
        scenarios = [one.name for one in suite.scenarios]
        check_asked(suite, candidate)
        seeds = list(suite.seeds[: max(rules.looks[0], reached_look(candidate, scenarios, rules.looks))])
    found = compare_arms(base, candidate, rules, scenarios=scenarios, seeds=seeds)
    anchor = make_anchor("baseline", told_arm(base), found, rules, len(seeds))
    view = make_view(
        anchor,
        suite=suite.name if suite is not None else "rows",
        candidate=told_arm(candidate),
        commands={"again": command_line("gate", "check", *argv)},
    )
    return tell([view], options, verdict_code([anchor], options.on_inconclusive))


def measured_rules(rules: GateRules, base: ArmRows, candidate: ArmRows) -> tuple[MetricRule, ...]:
    """The usual metrics, without those that no row of either side has: nobody asked for them."""
    from harness.gate.comparison import launch_time, measured
    from harness.gate.suite import STEP_TIME

    found = []
    for rule in rules.metrics:
        values = (
            launch_time(arm, key) if rule.metric == STEP_TIME else measured(row, rule.metric)
            for arm in (base, candidate)
            for key, row in arm.rows.items()
        )
        if any(value is not None for value in values):
            found.append(rule)
    if not found:
        names = ", ".join(rule.metric for rule in rules.metrics)
        raise UserError(f"no row of either side has any of {names}", EXIT_INCOMPLETE)
    return tuple(found)


def check_asked(suite: Suite, rows: ArmRows) -> None:
    """Refuse rows that answer other questions than the suite asks now."""
    from harness.gate.arm_rows import QUESTION

    for one in suite.scenarios:
        for seed in rows.seeds(one.name):
            asked = rows.rows[one.name, seed].get(QUESTION)
            if asked is not None and asked != one.question:
                raise UserError(
                    f"scenario {one.name!r} of {rows.source} has another task or pinned config than the "
                    "suite; run the gate again",
                    EXIT_BASELINE,
                )


def main_accept(argv: Sequence[str]) -> int:
    """`gate accept`."""
    options = accept_parser().parse_args(argv)
    if not options.reason.strip():
        raise UserError("--reason must say why, got an empty text")

    from harness.gate.accepting import accept
    from harness.gate.baselines import MANIFEST_FILE
    from harness.gate.suite import load_suite

    out = options.out if options.out is not None else find_out(options.suite)
    suite_path = options.suite if options.suite is not None else session_suite(out)
    version = accept(
        load_suite(suite_path),
        out,
        root=options.baselines,
        reason=one_line(options.reason),
        expires=options.expires,
        release=options.release,
        approver=options.approver,
        today=datetime.now(UTC).date(),
    )
    said = version.said
    print(f"accepted as {version.name}: {version.path}")
    print(
        f"  {len(said['config'])} scenarios, {len(said['seeds'])} seeds, code {said['code'][:8]}, "
        f"by {said['approver']}: {said['reason']}"
    )
    if said["expires"]:
        print(f"  until {said['expires']}: after that day the gate has no baseline (exit {EXIT_BASELINE})")
    print(
        "commit both: "
        + shlex.join(["git", "add", str(version.path), str(version.path.parent / MANIFEST_FILE)])
    )
    return EXIT_PASS


def find_out(suite_path: Path | None) -> Path:
    """The folder of the gate that is meant: that of the suite, or the only one there is."""
    if suite_path is not None:
        from harness.gate.suite import load_suite

        return RUNS / load_suite(suite_path).name
    found = sorted(path.parent for path in RUNS.glob("*/session.json"))
    if len(found) == 1:
        return found[0]
    which = f": {', '.join(map(str, found))}" if found else ""
    raise UserError(f"say which gate is meant by --suite or --out; {len(found)} are in {RUNS}{which}")


def session_suite(out: Path) -> Path:
    """The suite file that a gate's folder was made from."""
    from harness.gate.kept import read_session
    from harness.gate.suite import shown_path

    return shown_path(Path(str(read_session(out).get("suite_path"))))


def main_plan(argv: Sequence[str]) -> int:
    """`gate plan`."""
    options = plan_parser().parse_args(argv)
    if options.baseline is not None and options.candidate is None:
        raise UserError("--baseline goes with --candidate: the spread is that of their differences")

    from harness.gate.planning import plan_text
    from harness.gate.suite import load_suite

    suite = load_suite(options.suite)
    print(plan_text(suite, *pilot_arms(options, suite.name), power=options.power))
    return EXIT_PASS


def pilot_arms(options: argparse.Namespace, name: str) -> tuple[ArmRows | None, ArmRows]:
    """The rows whose spread is that of the pilot: those named, or the arms of the gate's folder."""
    from harness.gate.kept import read_session
    from harness.gate.sources import read_side

    if options.candidate is not None:
        base = None if options.baseline is None else read_side(options.baseline, name="baseline")
        return base, read_side(options.candidate, name="candidate")
    out = options.out if options.out is not None else RUNS / name
    arms = read_session(out)["arms"]
    candidate = read_side(out / arms["candidate"], name="candidate")
    baseline = read_side(out / arms["baseline"], name="baseline") if "baseline" in arms else None
    return baseline, candidate


def result_views(
    result: GateResult, argv: Sequence[str], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """The decisions of a gate as plain data, one for each baseline that was compared with."""
    commands = {
        "again": command_line("gate", "run", *argv),
        "accept": accept_command(options, "why this is right"),
    }
    notes = [*result.notes, *accepted_lines(result)]
    if not result.anchors:  # nothing compared, and just this code was accepted
        for note in notes:
            say_progress(note)
    views: list[dict[str, Any]] = []
    for anchor in result.anchors:
        view = make_view(
            anchor,
            suite=f"{result.suite.name}, {anchor.name}" if views else result.suite.name,
            candidate=result.candidate,
            commands={} if views else commands,
            notes=notes,
        )
        said = {note for earlier in views for note in earlier["notes"]}
        views.append({**view, "notes": [note for note in view["notes"] if note not in said]})
    return views


def make_view(
    anchor: Anchor, *, suite: str, candidate: str, commands: dict[str, str], notes: Sequence[str] = ()
) -> dict[str, Any]:
    """A decision as plain data, as `reports.gate_outputs` takes it."""
    from harness.gate.decision import decision_view

    baseline = anchor.label if anchor.name == "baseline" else f"{anchor.name} {anchor.label}"
    return decision_view(
        anchor.decision,
        suite=suite,
        candidate=candidate,
        baseline=baseline,
        commands=commands,
        notes=[*notes, *anchor.notes],
    )


def run_code(result: GateResult, on_inconclusive: str) -> int:
    """The exit code of `gate run`: that of its verdicts, unless just this code was accepted with a reason."""
    code = verdict_code(result.anchors, on_inconclusive)
    return EXIT_PASS if result.accepted is not None and result.candidate_is_whole else code


def verdict_code(anchors: Sequence[Anchor], on_inconclusive: str) -> int:
    """The exit code of some decisions: a proven regression first, then rows that are missing, then doubt."""
    decisions = [anchor.decision for anchor in anchors]
    if any(one.verdict == "FAIL" for one in decisions):
        return EXIT_REGRESSION
    if any(one.missing for one in decisions):
        return EXIT_INCOMPLETE
    if any(one.verdict != "PASS" for one in decisions):
        return EXIT_INCONCLUSIVE if on_inconclusive == "fail" else EXIT_PASS
    return EXIT_PASS


def accepted_lines(result: GateResult) -> list[str]:
    """What is said where just this code was accepted before."""
    if result.accepted is None:
        return []
    said = result.accepted.said
    return [
        f"this code was accepted as {result.accepted.name} by {said['approver']} "
        f"({one_line(said['reason'])}): what differs from the older baseline is no failure"
    ]


def tell(views: Sequence[dict[str, Any]], options: argparse.Namespace, code: int) -> int:
    """Print the decisions, write them where it was asked for, and return the exit code."""
    from harness.gate.merged import merged_json, merged_junit
    from reports.gate_outputs import (
        MOST_ANNOTATIONS,
        render_annotations,
        render_markdown,
        render_terminal,
    )

    for view in views:
        print(render_terminal(view))
    is_open = any(view["verdict"] == "INCONCLUSIVE" for view in views)
    if code == EXIT_PASS and is_open:
        print(f"not decided, and taken for a pass: --on-inconclusive {options.on_inconclusive}")
    print(f"exit code {code}: {MEANINGS[code]}")
    if os.environ.get("GITHUB_ACTIONS") == "true":
        lines = dict.fromkeys(line for view in views for line in render_annotations(view))
        for line in list(lines)[:MOST_ANNOTATIONS]:
            print(line)
        if is_open and options.on_inconclusive == "warn":
            print("::warning title=gate::the evidence does not decide; see the table of the gate")
    summary = options.summary or os.environ.get("GITHUB_STEP_SUMMARY")
    outputs: list[tuple[Path | None, Callable[[], str], str]] = [
        (options.json, lambda: merged_json(views, exit_code=code), "w"),
        (options.junit, lambda: merged_junit(views), "w"),
        (Path(summary) if summary else None, lambda: "\n\n".join(map(render_markdown, views)) + "\n", "a"),
    ]
    for path, render, mode in outputs:
        if path is not None:
            write_output(path, render(), mode)
    return code


def write_output(path: Path, text: str, mode: str) -> None:
    """Write or append a text; a `UserError` where that is not possible."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, mode, encoding="utf-8") as handle:
            handle.write(text)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from None


def accept_command(options: argparse.Namespace, reason: str) -> str:
    """The command that accepts what a run has trained."""
    words = ["gate", "accept", "--suite", str(options.suite)]
    for name in ("out", "baselines"):
        if getattr(options, name) is not None:
            words += [f"--{name}", str(getattr(options, name))]
    return command_line(*words, "--reason", reason)


def command_line(*words: str) -> str:
    """A command as it is typed."""
    return shlex.join(["scm-harness", *map(str, words)])


def say_progress(text: str) -> None:
    """One line of progress, without what would move a terminal's cursor."""
    from reports.gate_outputs import plain

    print(plain(text), file=sys.stderr, flush=True)


def parse_date(text: str) -> date:
    """A day, as 2027-01-31."""
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a day as 2027-01-31, got {text!r}") from None


def parse_power(text: str) -> float:
    """A chance above one half and below 1."""
    try:
        power = float(text)
    except ValueError:
        power = float("nan")
    if not 0.5 <= power < 1:
        raise argparse.ArgumentTypeError(f"must be a number from 0.5 to below 1, got {text!r}")
    return power


ACTIONS: dict[str, Callable[[Sequence[str]], int]] = {
    "run": main_run,
    "check": main_check,
    "accept": main_accept,
    "plan": main_plan,
}
