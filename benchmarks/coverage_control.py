"""Bring held-out coverage to a target and hold it there: a controlled weight against weights chosen by hand.

Two tasks, each trained for targets of 0.80, 0.90 and 0.95 and for several seeds, which draw data and weights:

    dose    the task of that name. Two curves of three lie out of range and should be bottom, all alike: left
            to itself a model answers 0.3 of them, and coverage in between is a share of rows that look alike.
    poles   a function with a line of poles, in units in which the threshold lies inside of its values. The
            better the fit, the fewer tuples are above the threshold: left to itself, coverage collapses.

The arms differ in the weight of the coverage term alone: none; fixed, over a grid; and controlled, with the
defaults of `TrialConfig` ("unbiased"; run in full also "reference", and fixed weights of the soft term). All
begin as `lambda_rej` says, and see the training split; coverage is measured on the test split at tau_infer
after every epoch, and is "held" where its mean over the last third of epochs is at least the target - 0.02.

"By hand" is the smallest weight of the grid that holds every target at every seed, by the coverage on the
validation split: the one value that a person would settle on. Beside it stands the smallest that holds each
single target, which takes a search of its own for every target. The cost is the accepted error, the mean over
the last third of epochs.

    python benchmarks/coverage_control.py --quick     under two minutes on two cores
    python benchmarks/coverage_control.py             five seeds, a finer grid, and the other arms

Targets: the coverage of `poles` collapses without a weight; the controlled arm holds every target at every
seed; its accepted error, the mean over targets and seeds, is below that of the weight chosen by hand.

Exits 1 when a target is missed, 2 for arguments that cannot be right, 130 when interrupted.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any, Protocol

import torch
from benchmark_arguments import file_to_write, positive
from torch import nn

from scm.data import Split
from scm.models import make_model
from scm.seeding import generator
from scm.training.targets import STATUS_CODES, lift_semantic_targets
from scm.trial import Decoded, decode_split, make_trainer
from scm.trial_config import TrialConfig
from trainables.metrics import standard_metrics
from trainables.tasks import dose

TARGET_COVERAGES = (0.80, 0.90, 0.95)
TOLERANCE = 0.02
COLLAPSED = 0.5
NO_WEIGHT, BY_HAND = "no weight", "by hand"
_RANKED = {"coverage_term": "ranked"}


class Task(Protocol):
    """What the benchmark asks of a task; those of `trainables.tasks` have more."""

    def splits(self, seed: int) -> Mapping[str, Split]: ...

    def build_model(self, config: TrialConfig) -> nn.Module: ...

    def metrics(self, decoded: Decoded, split: Split, config: TrialConfig) -> dict[str, float]: ...


class PolesTask:
    """y = 4 / (distance to a curved line in the plane) + noise; rows within 0.04 of it are bottoms.

    Inputs are uniform on [-1, 1]^2. A tuple of unit length has |Q| = 1 / sqrt(1 + y^2): with a threshold of
    0.2 only |y| < 4.9 is above it, which a quarter of the rows are.
    """

    sizes: Mapping[str, int] = {"train": 3000, "val": 1000, "test": 4000}

    def splits(self, seed: int) -> Mapping[str, Split]:
        """Draw the splits of a seed."""
        return {part: self._draw(count, generator(seed, part)) for part, count in self.sizes.items()}

    def build_model(self, config: TrialConfig) -> nn.Module:
        """Build the config's head on the two inputs."""
        return make_model(config, 2)

    def metrics(self, decoded: Decoded, split: Split, config: TrialConfig) -> dict[str, float]:
        """Give the standard metrics; a rejected row is charged as the answer 0 would be."""
        value, status = split.extras["value"], split.extras["status"]
        return standard_metrics(decoded.decoded.to(value.dtype), ~decoded.bottom, value, status, baseline=0.0)

    def _draw(self, count: int, drawn: torch.Generator) -> Split:
        x = torch.rand(count, 2, generator=drawn) * 2 - 1
        distance = x[:, 0] - 0.3 * torch.sin(3 * x[:, 1])
        y = 4.0 / distance + 0.05 * torch.randn(count, generator=drawn)
        codes = torch.where(distance.abs() < 0.04, STATUS_CODES["bottom"], STATUS_CODES["finite"])
        return Split(x, lift_semantic_targets(y, codes), {"value": y.double(), "status": codes})


def _dose_task() -> Task:
    return dose.make_dose_task({"redraw_data": True})


@dataclass(frozen=True, slots=True)
class Problem:
    """A task and the config that all arms share; `collapses`: whether coverage must, without a weight."""

    make: Callable[[], Task]
    config: Mapping[str, Any]
    collapses: bool


PROBLEMS: Mapping[str, Problem] = {
    "dose": Problem(
        _dose_task,
        # A third of the threshold is as far above it as answers are asked to be, in both problems.
        {**dose.SUGGESTED, "coverage_temperature": 0.08},
        collapses=False,
    ),
    "poles": Problem(
        PolesTask,
        {
            "learning_rate": 3e-3,
            "lr_schedule": "cosine",
            "batch_size": 64,
            "max_epochs": 30,
            "tau_train_min": 0.2,
            "tau_train_max": 0.2,
            "tau_infer": 0.2,
            "lambda_margin": 0.0,
            "lambda_sign": 0.0,
            "coverage_temperature": 0.07,
        },
        collapses=True,
    ),
}


@dataclass(frozen=True, slots=True)
class Amount:
    """How much is run. grids: fixed weights by coverage term. rules: of control, beside "unbiased"."""

    seeds: int
    grids: Mapping[str, Sequence[float]]
    rules: Sequence[str]


AMOUNTS: Mapping[str, Amount] = {
    "quick": Amount(3, {"ranked": (0.3, 1.0, 3.0)}, ()),
    "full": Amount(
        5,
        {
            "ranked": (0.03, 0.1, 0.3, 1.0, 2.0, 3.0, 5.0, 10.0),
            "soft": (0.1, 0.3, 1.0, 3.0, 10.0, 30.0),
        },
        ("reference",),
    ),
}


@dataclass(frozen=True, slots=True)
class Job:
    """One training: `arm` names what its weight is, `knobs` are what it changes of the problem's config."""

    problem: str
    arm: str
    target: float
    seed: int
    knobs: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Run:
    """What one training says, by epoch: coverage on test and validation data, accepted error, weight.

    `untrained` is the test coverage before the first step.
    """

    problem: str
    arm: str
    target: float
    seed: int
    untrained: float
    coverage: list[float]
    val_coverage: list[float]
    accepted_error: list[float]
    multiplier: list[float]
    status: str

    @property
    def held_coverage(self) -> float:
        """The test coverage over the last third of epochs; nan if the training did not end well."""
        return self._late(self.coverage)

    @property
    def worst_coverage(self) -> float:
        """The smallest one of an epoch of the last third."""
        return min(_last_third(self.coverage), default=math.nan)

    @property
    def late_error(self) -> float:
        """The accepted error over the last third of epochs."""
        return self._late(self.accepted_error)

    @property
    def holds(self) -> bool:
        """Whether the test coverage is where it should be."""
        return self.held_coverage >= self.target - TOLERANCE

    @property
    def seems_to_hold(self) -> bool:
        """The same by the validation split, as somebody sees it who chooses a weight."""
        return self._late(self.val_coverage) >= self.target - TOLERANCE

    def _late(self, values: Sequence[float]) -> float:
        return fmean(_last_third(values)) if self.status == "completed" else math.nan


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark, print its tables, and return 0 if every target holds, else 1; 130 if interrupted."""
    arguments = _parser().parse_args(argv)
    amount = AMOUNTS["quick" if arguments.quick else "full"]
    begun = time.perf_counter()
    try:
        runs = run_jobs(make_jobs(arguments.problems, amount), arguments.workers or os.cpu_count() or 1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    reports = [report_problem(name, runs, amount) for name in arguments.problems]
    duration_s = time.perf_counter() - begun
    print("\n\n".join(render(report) for report in reports))
    print(f"\n{len(runs)} trainings in {duration_s:.0f} s")
    if arguments.json:
        document = {"duration_s": duration_s, "problems": reports, "runs": [asdict(run) for run in runs]}
        text = json.dumps(_strict(document), indent=2, allow_nan=False)
        arguments.json.write_text(text + "\n", encoding="utf-8")
    return 0 if all(check["holds"] for report in reports for check in report["checks"]) else 1


def make_jobs(problems: Iterable[str], amount: Amount) -> list[Job]:
    """List every training of the benchmark."""
    jobs = []
    for problem in problems:
        for seed in range(amount.seeds):
            jobs.append(Job(problem, NO_WEIGHT, TARGET_COVERAGES[0], seed, {**_RANKED, "lambda_rej": 0.0}))
        for target in TARGET_COVERAGES:
            for arm, knobs in _arms(amount).items():
                jobs += [Job(problem, arm, target, seed, knobs) for seed in range(amount.seeds)]
    return jobs


def _arms(amount: Amount) -> dict[str, dict[str, Any]]:
    first = TrialConfig().lambda_rej
    arms: dict[str, dict[str, Any]] = {
        rule: {**_RANKED, "coverage_control": rule, "lambda_rej": first}
        for rule in ("unbiased", *amount.rules)
    }
    for term, grid in amount.grids.items():
        for weight in grid:
            arms[_fixed_arm(term, weight)] = {"coverage_term": term, "lambda_rej": weight}
    return arms


def _fixed_arm(term: str, weight: float) -> str:
    return f"{term} {weight:g}"


def run_jobs(jobs: Sequence[Job], workers: int) -> list[Run]:
    """Train all of them, `workers` at once; the runs come in the order of the jobs."""
    if workers == 1:
        return [run_job(job) for job in jobs]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return list(pool.map(run_job, jobs, chunksize=1))


def run_job(job: Job) -> Run:
    """Train once and measure after every epoch."""
    problem = PROBLEMS[job.problem]
    task = problem.make()
    config = TrialConfig.from_flat({**problem.config, "target_coverage": job.target, **job.knobs})
    splits = task.splits(job.seed)
    trainer = make_trainer(config, job.seed, lambda: task.build_model(config), splits["train"], splits["val"])

    def measured() -> tuple[float, float]:
        decoded = decode_split(trainer.model, splits["test"], tau_infer=config.tau_infer)
        error = task.metrics(decoded, splits["test"], config)["accepted_error"]
        return 1.0 - float(decoded.bottom.double().mean()), error

    untrained, _ = measured()
    rows = []
    for report in trainer.epochs():
        coverage, error = measured()
        val = math.nan if report.val is None else report.val["val_coverage"]
        weight = trainer.telemetry().get("lambda_rej", config.lambda_rej)
        rows.append((coverage, val, error, weight))
    columns = (list(column) for column in zip(*rows, strict=True))
    return Run(job.problem, job.arm, job.target, job.seed, untrained, *columns, trainer.status)


def report_problem(name: str, runs: Sequence[Run], amount: Amount) -> dict[str, Any]:
    """Say of one problem what each arm reached, which weight is the one chosen by hand, and the checks."""
    own = [run for run in runs if run.problem == name]
    arms = list(dict.fromkeys(run.arm for run in own))
    report: dict[str, Any] = {
        "problem": name,
        "arms": {arm: [_summary(own, arm, target) for target in _targets(own, arm)] for arm in arms},
        "by_hand": {term: hand_chosen(own, term, grid) for term, grid in amount.grids.items()},
        "per_target": {
            term: {str(t): hand_chosen(own, term, grid, (t,)) for t in TARGET_COVERAGES}
            for term, grid in amount.grids.items()
        },
    }
    report["checks"] = _checks(name, own, report)
    return report


def hand_chosen(
    runs: Sequence[Run], term: str, grid: Sequence[float], targets: Sequence[float] = TARGET_COVERAGES
) -> str | None:
    """Return the arm of the smallest weight that seems to hold all `targets` at all seeds; None if none."""
    for weight in sorted(grid):
        own = [run for run in runs if run.arm == _fixed_arm(term, weight) and run.target in targets]
        if own and all(run.seems_to_hold for run in own):
            return _fixed_arm(term, weight)
    return None


def mean_error(runs: Sequence[Run], arm: str) -> float:
    """Return the accepted error of an arm, the mean over targets and seeds."""
    return fmean(run.late_error for run in runs if run.arm == arm)


def _targets(runs: Sequence[Run], arm: str) -> list[float]:
    return list(dict.fromkeys(run.target for run in runs if run.arm == arm))


def _summary(runs: Sequence[Run], arm: str, target: float) -> dict[str, Any]:
    own = [run for run in runs if run.arm == arm and run.target == target]
    return {
        "target": target,
        "coverage": [run.held_coverage for run in own],
        "worst_coverage": [run.worst_coverage for run in own],
        "accepted_error": [run.late_error for run in own],
        "multiplier": [run.multiplier[-1] for run in own],
        "untrained": [run.untrained for run in own],
    }


def _checks(name: str, runs: Sequence[Run], report: Mapping[str, Any]) -> list[dict[str, Any]]:
    checks = []
    if PROBLEMS[name].collapses:
        alone = [run for run in runs if run.arm == NO_WEIGHT]
        holds = all(max(_last_third(run.coverage)) < COLLAPSED for run in alone)
        checks.append(_check(f"coverage stays below {COLLAPSED:g} without a weight", holds))
    controlled = [run for run in runs if run.arm == "unbiased"]
    for target in TARGET_COVERAGES:
        own = [run for run in controlled if run.target == target]
        checks.append(
            _check(f"coverage >= {target - TOLERANCE:.2f} at every seed", all(run.holds for run in own))
        )
    for term, arm in report["by_hand"].items():
        # Where no weight of the grid holds all targets, there is none to compare with.
        cheaper = arm is None or mean_error(runs, "unbiased") < mean_error(runs, arm)
        checks.append(_check(f"accepted error below that of {arm or f'{term}: no weight holds'}", cheaper))
    return checks


def _check(what: str, holds: bool) -> dict[str, Any]:
    return {"what": what, "holds": holds}


def render(report: Mapping[str, Any]) -> str:
    """Write the table of one problem, and a line for each check."""
    head = f"{'arm':<12} {'target':>6} {'coverage':>8} {'least':>6} {'worst epoch':>11}"
    lines = [report["problem"], f"{head} {'accepted error':>16} {'weight':>14}   chosen"]
    for arm, summaries in report["arms"].items():
        lines += [_line(arm, summary, _chosen(report, arm, summary["target"])) for summary in summaries]
    lines += [f"{'ok  ' if check['holds'] else 'MISS'} {check['what']}" for check in report["checks"]]
    return "\n".join(lines)


def _chosen(report: Mapping[str, Any], arm: str, target: float) -> str:
    said = [BY_HAND] if arm in report["by_hand"].values() else []
    if any(best.get(str(target)) == arm for best in report["per_target"].values()):
        said.append("for this target")
    return ", ".join(said)


def _line(arm: str, summary: Mapping[str, Any], chosen: str) -> str:
    coverage, error, weight = summary["coverage"], summary["accepted_error"], summary["multiplier"]
    target = "" if arm == NO_WEIGHT else f"{summary['target']:.2f}"
    return (
        f"{arm:<12} {target:>6} {fmean(coverage):>8.3f} {min(coverage):>6.3f} "
        f"{min(summary['worst_coverage']):>11.3f} {fmean(error):>7.3f} ({_range(error, 2)}) "
        f"{fmean(weight):>5.2f} ({_range(weight, 1)})   {chosen}"
    ).rstrip()


def _range(values: Sequence[float], digits: int) -> str:
    return f"{min(values):.{digits}f}-{max(values):.{digits}f}"


def _last_third(values: Sequence[float]) -> Sequence[float]:
    return values[-max(len(values) // 3, 1) :]


def _strict(value: Any) -> Any:
    """Return the same with None for every float that JSON has no word for."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _strict(held) for key, held in value.items()}
    return [_strict(held) for held in value] if isinstance(value, list | tuple) else value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="three seeds and a coarse grid")
    parser.add_argument("--problems", nargs="+", choices=list(PROBLEMS), default=list(PROBLEMS))
    parser.add_argument("--workers", type=positive, help="trainings at once (default: one per core)")
    parser.add_argument("--json", type=file_to_write, help="write everything that was measured here")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
