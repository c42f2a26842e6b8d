"""Time and memory of `scm-harness rank` on large runs, beside pandas, on rows made up like those of a sweep.

Measured are whole processes, from their start to their end: of ours the command, which also checks every row,
finds the fronts, and writes and prints the leaderboard; of pandas a script that reads the eight columns that
decide and takes means by config with groupby, without fronts, checks or a leaderboard. The rows have the
142 columns of a sweep and stand in files of 500 000; in the last case of 500, as a sweep leaves them.

    python benchmarks/ranking_scale.py [--quick] [--json PATH] [--folder PATH]

Full size: 1 and 10 million rows. Targets: at most 3 s and 30 s, and 2 GB of memory at their peak; with
--quick (100 thousand rows) 5 s and 2 GB, and the leaderboard must be the one of the rows ranked in memory.
The data, 2 GB of it, goes into a temporary folder, in --folder if given, and is removed. Seconds on the
clock say little on a machine that is busy with other work; those of the processors (cpu s) say more there.

Exit code 0 when the targets are met, 1 when one is missed, 2 for a wrong argument.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from ranking_rows import SEEDS, write_rows

from trainables.configs import KNOB_TYPES

CONFIGS_PER_FILE = 100_000
FRAGMENT_CONFIGS = 100  # 500 rows, as reports.fragments writes them
PEAK_MB = 2_000
COLUMNS = (
    "config_id",
    "seed",
    "status",
    "nan_count",
    "coverage",
    "target_coverage",
    "accepted_error",
    "step_time_ms",
)


@dataclass(frozen=True)
class Case:
    """A run to be ranked: its rows, how many configs share a file, and the seconds that it may take."""

    rows: int
    configs_per_file: int
    target_s: float | None
    repeats: int


@dataclass(frozen=True)
class Cost:
    """Of one process: seconds on the clock, seconds of all processors, and the most memory it held."""

    wall_s: float
    cpu_s: float
    peak_mb: float


@dataclass(frozen=True)
class Result:
    """What a case took, the least of its repeats."""

    case: Case
    ours: Cost
    peer: Cost

    @property
    def met(self) -> bool:
        """Whether time and memory are within the targets; without a target of time they are."""
        return self.case.target_s is None or (
            self.ours.wall_s <= self.case.target_s and self.ours.peak_mb <= PEAK_MB
        )


QUICK = (Case(100_000, CONFIGS_PER_FILE, 5.0, 3), Case(20_000, FRAGMENT_CONFIGS, None, 1))
FULL = (
    Case(1_000_000, CONFIGS_PER_FILE, 3.0, 3),
    Case(10_000_000, CONFIGS_PER_FILE, 30.0, 2),
    Case(1_000_000, FRAGMENT_CONFIGS, None, 1),
)


def main(argv: list[str] | None = None) -> int:
    """Make the rows, measure, print the table; the exit code says whether the targets are met."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="100 thousand rows")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures there")
    parser.add_argument("--folder", type=Path, metavar="PATH", help="where the data may lie meanwhile")
    parser.add_argument("--measure", nargs=2, metavar=("WHAT", "RUN"), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.measure:
        what, run = options.measure
        return _measured(MEASURED[what], Path(run))
    for path in (options.folder, options.json and options.json.parent):
        if path and not path.is_dir():
            parser.error(f"there is no folder {path}")
    results = []
    same = True
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} before anything was started here")
    print(f"{'rows':>10} {'files':>6} {'':8} {'wall s':>8} {'cpu s':>8} {'peak MB':>8}  target")
    for case in QUICK if options.quick else FULL:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            run = Path(folder) / "run"
            configs = case.rows // SEEDS
            write_rows(run, configs, configs_per_file=case.configs_per_file, knobs=KNOB_TYPES)
            result = Result(case, _least("ours", run, case), _least("pandas", run, case))
            results.append(result)
            _print(result, len(list((run / "rows").iterdir())))
            if options.quick:
                same &= _is_that_of_memory(run)
    if options.json:
        said = [asdict(result) | {"met": result.met} for result in results]
        options.json.write_text(json.dumps(said, indent=2) + "\n")
    missed = [result for result in results if not result.met]
    if options.quick:
        print(f"the leaderboard is {'' if same else 'NOT '}that of the rows ranked in memory")
    print(f"targets missed: {len(missed)}" if missed else "all targets are met")
    return 1 if missed or not same else 0


def rank_streaming(run: Path) -> None:
    """What the command does, with the rows read in pieces however few they are."""
    from harness.cli.rank import main as rank_main
    from reports import large_runs

    large_runs.LARGE_ROWS = 0
    rank_main([str(run)])


def group_by_pandas(run: Path) -> None:
    """The means of the objectives by config, and what went wrong, without anything else."""
    import pandas as pd

    rows = pd.read_parquet(run / "rows", columns=list(COLUMNS))
    rows["shortfall"] = (rows["target_coverage"] - rows["coverage"]).clip(lower=0)
    rows["wrong"] = rows["status"].isin(["failed", "diverged"])
    kinds = {"shortfall": "mean", "accepted_error": "mean", "step_time_ms": "mean"}
    kinds |= {"nan_count": "sum", "wrong": "sum", "seed": "nunique"}
    table = rows.groupby("config_id", sort=True).agg(kinds)
    best = table[(table["wrong"] == 0) & (table["nan_count"] == 0)]
    print(best.sort_values(["shortfall", "accepted_error", "step_time_ms"]).head(10))


MEASURED: dict[str, Callable[[Path], None]] = {"ours": rank_streaming, "pandas": group_by_pandas}


def _measured(work: Callable[[Path], None], run: Path) -> int:
    work(run)
    # The peak of this program alone; what getrusage says begins with that of the one which started it.
    with open("/proc/self/status", encoding="ascii") as status:
        peak_kb = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    print(json.dumps({"peak_mb": peak_kb / 1000}))
    return 0


def _least(what: str, run: Path, case: Case) -> Cost:
    costs = []
    for _ in range(case.repeats):
        before, started = os.times(), time.perf_counter()
        command = [sys.executable, __file__, "--measure", what, str(run)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        wall_s, after = time.perf_counter() - started, os.times()
        cpu_s = sum(after[2:4]) - sum(before[2:4])
        costs.append(Cost(wall_s, cpu_s, json.loads(done.stdout.splitlines()[-1])["peak_mb"]))
    return min(costs, key=lambda cost: cost.wall_s)


def _is_that_of_memory(run: Path) -> bool:
    import pyarrow.parquet as pq

    from reports.ranking import rank
    from reports.rows import read_rows

    written = pq.read_table(run / "leaderboard.parquet")
    whole = rank(read_rows(run)).slice(0, len(written))
    return repr(written.to_pylist()) == repr(whole.to_pylist())


def _print(result: Result, files: int) -> None:
    case = result.case
    target = "none" if case.target_s is None else f"{case.target_s:g} s, {PEAK_MB} MB"
    for name, cost, said in (("ours", result.ours, target), ("pandas", result.peer, "")):
        missed = "" if result.met or not said else "  MISSED"
        print(
            f"{case.rows:>10} {files:>6} {name:8} {cost.wall_s:8.2f} {cost.cpu_s:8.2f} {cost.peak_mb:8.0f}"
            f"  {said}{missed}".rstrip(),
            flush=True,
        )


if __name__ == "__main__":
    sys.exit(main())
