"""`scm-harness rank RUN`: judge the rows of a run anew, print the best configs, write its leaderboard.

What several runs are ranked by is decided in `harness.cli.rank_scenarios`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.cli.arguments import TOP, CommandParser, parse_top
from harness.errors import EXIT_BAD_INPUT, EXIT_NOTHING_COMPLETED, EXIT_OK, EXIT_RUN_FOLDER, UserError

if TYPE_CHECKING:
    import pyarrow as pa

    from reports.ranking import RankingOptions

PLAN_FILE = "plan.yaml"


def make_parser() -> CommandParser:
    """The options of the command; what is not given is taken from the run's plan."""
    parser = CommandParser(
        "rank",
        "Rank the configs of a run: constraints first, then Pareto fronts. Writes leaderboard.parquet. Of "
        "several runs, rank the settings that all their scenarios (tasks and data) have tried.",
    )
    add = parser.add_argument
    add("runs", type=Path, nargs="+", metavar="RUN", help="the run folder, or several")
    add(
        "--by",
        action="append",
        type=_names,
        metavar="METRIC[,METRIC...]",
        help="objectives of the fronts; a task's own metric needs its direction, as in metric.hits:higher; "
        "robustness is what `scm-harness robustness RUN` measured",
    )
    add("--top", type=parse_top, default=TOP, metavar="N", help=f"configs to print, or all (default {TOP})")
    add("--nan-budget", type=int, metavar="N", help="non-finite values that a config may have met")
    add("--failed-budget", type=int, metavar="N", help="trials of a config that may go wrong (default 0)")
    add("--target-coverage", type=float, metavar="C", help="one target for all, not each config's own")
    add(
        "--step-time-tolerance",
        type=float,
        metavar="SHARE",
        help="step times this close count as equal (default 0.05)",
    )
    add("--json", action="store_true", help="print the whole leaderboard as JSON, NaN as null")
    add(
        "--reference",
        metavar="SETTINGS",
        help="of several runs: the settings_id that figures are relative to (default: those of the first "
        "plan's config where all runs tried them, else the median)",
    )
    add("--out", type=Path, metavar="FILE", help="of several runs: write their leaderboard here, as Parquet")
    return parser


def main(argv: Sequence[str]) -> int:
    """Rank a run; the ranking goes to stdout, and to the run's leaderboard.parquet."""
    parser = make_parser()
    options = parser.parse_args(argv)
    given = {
        "by": [name for names in options.by for name in names] if options.by else None,
        "nan_budget": options.nan_budget,
        "failed_budget": options.failed_budget,
        "target_coverage": options.target_coverage,
        "step_time_tolerance": options.step_time_tolerance,
    }
    shown = {"top": options.top, "as_json": options.json}
    if len(options.runs) > 1:
        from harness.cli.rank_scenarios import run_several

        return run_several(options.runs, given, **shown, reference=options.reference, out=options.out)
    for name in ("reference", "out"):
        if getattr(options, name) is not None:
            parser.error(f"--{name} is for several runs, got one")
    return run(options.runs[0], **given, **shown)


def run(
    folder: Path,
    *,
    by: Sequence[str] | None = None,
    top: int | None = TOP,
    nan_budget: int | None = None,
    failed_budget: int | None = None,
    target_coverage: float | None = None,
    step_time_tolerance: float | None = None,
    as_json: bool = False,
) -> int:
    """Rank the run in `folder`, write its leaderboard, print it, return the exit code.

    Raises UserError with code 4 where the folder is no readable run or cannot be written, and with code 2
    for an option that the rows do not bear. Code 5 is returned where no config has a measured trial.
    """
    from reports.fragments import RunReadError
    from reports.large_runs import rank_run
    from reports.ranking import run_totals, write_leaderboard
    from reports.robustness_scores import read_robustness
    from reports.rows import find_rows
    from reports.text import render_leaderboard

    given = {
        "by": None if by is None else tuple(by),
        "nan_budget": nan_budget,
        "failed_budget": failed_budget,
        "target_coverage": target_coverage,
        "step_time_tolerance": step_time_tolerance,
    }
    try:
        find_rows(folder)
        robustness = read_robustness(folder)
        leaderboard = rank_run(folder, make_options(folder, given), robustness)
    except RunReadError as error:
        raise UserError(str(error), EXIT_RUN_FOLDER) from None
    except ValueError as error:
        raise UserError(str(error), EXIT_BAD_INPUT) from None

    print(json.dumps(plain_rows(leaderboard)) if as_json else render_leaderboard(leaderboard, top))
    try:
        write_leaderboard(folder, leaderboard)
    except OSError as error:
        raise UserError(f"cannot write the leaderboard: {error}", EXIT_RUN_FOLDER) from None
    totals = run_totals(leaderboard)
    return EXIT_OK if totals["n_completed"] + totals["n_stopped"] else EXIT_NOTHING_COMPLETED


def make_options(folder: Path, given: dict[str, Any]) -> RankingOptions:
    """How the run is judged: what was given, else what its plan says, else the defaults.

    The plan's seeds are those that every config must have; an interrupted run may lack one altogether.
    """
    from reports.ranking import RankingOptions

    chosen: dict[str, Any] = {}
    if (folder / PLAN_FILE).is_file():
        from harness.plan import load_judging

        plan = load_judging(folder / PLAN_FILE)
        chosen = {"nan_budget": plan.ranking.nan_budget, "seeds": tuple(plan.seeds)}
        if plan.ranking.by is not None:
            chosen["by"] = tuple(plan.ranking.by)
    chosen |= {name: value for name, value in given.items() if value is not None}
    return RankingOptions(**chosen)


def plain_rows(leaderboard: pa.Table) -> list[dict[str, Any]]:
    """The leaderboard as values that JSON knows: what is not finite becomes None."""
    return [
        {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in entry.items()
        }
        for entry in leaderboard.to_pylist()
    ]


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]
