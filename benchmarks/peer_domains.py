"""Sweep the benchmark tasks; compare the best configs with zeroproofml 0.6.1 and with predicting zero.

For each task a sweep at one data seed picks a config by its validation metrics; that config is then trained
again with seeds that the sweep has not used, each drawing data and weights of its own, and what is reported
is how these do on their test data: mean, standard deviation and worst. Every target must hold at the worst
seed. Abstention is charged throughout: a rejected row costs what the trivial answer would.

    python benchmarks/peer_domains.py --quick            under two minutes on two cores
    python benchmarks/peer_domains.py                    more candidates and seeds
    python benchmarks/peer_domains.py --paper            the sizes of the published runs

Exits 1 when a target is missed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np

from search_spaces.domains import Choice, Float
from search_spaces.identity import config_id
from search_spaces.space import Space
from trainables.tasks import dose, rf, rr_ik

Config = dict[str, Any]
Row = dict[str, Any]
# What a sweep needs: every config with every seed, trained on a task with these parameters, as rows.
Runner = Callable[["Domain", Mapping[str, Any], Sequence[Config], Sequence[int]], list[Row]]

REPORT_SEEDS_FROM = 1_000


@dataclass(frozen=True, slots=True)
class Target:
    """A bound that a test metric must keep at every reported seed."""

    metric: str
    limit: float
    at_least: bool

    def holds(self, values: Sequence[float]) -> bool:
        """Whether every value keeps the bound; nan never does."""
        kept = [value >= self.limit if self.at_least else value < self.limit for value in values]
        return bool(kept) and all(kept)

    def __str__(self) -> str:
        return f"{self.metric} {'>=' if self.at_least else '<'} {self.limit:g}"


@dataclass(frozen=True, slots=True)
class Domain:
    """One task: where it is searched, what picks the config, and what is compared with what."""

    task: str
    suggested: Mapping[str, Any]
    space: Space
    score: Callable[[Row], float]  # of the validation metrics of a row; the smallest wins
    metrics: tuple[str, ...]  # test metrics that are reported, the first against the peer
    peer: str
    peer_value: float
    trivial: str  # what predicting zero or its like gives: a metric, or a number as text
    targets: Mapping[str, tuple[Target, ...]]  # by size
    paper: Mapping[str, Any] = field(default_factory=dict)  # what the paper size changes in a config
    max_weights: float = math.inf


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is run."""

    size: str
    candidates: int
    sweep_seeds: int
    report_seeds: int


PLANS: dict[str, Plan] = {
    "quick": Plan("quick", candidates=4, sweep_seeds=1, report_seeds=3),
    "default": Plan("quick", candidates=12, sweep_seeds=2, report_seeds=5),
    "paper": Plan("paper", candidates=3, sweep_seeds=1, report_seeds=3),
}


def _dose_score(row: Row) -> float:
    """The selection score of the published runs: (1 - macro-F1) + 0.05 min(20, error), 10 for no error."""
    error = row["metric.finite_mae"]
    return float(1.0 - row["metric.macro_f1"] + 0.05 * min(20.0, error if math.isfinite(error) else 10.0))


def _charged_score(row: Row) -> float:
    return float(row["metric.charged_mse"])


def _dose_targets(macro_f1: float) -> tuple[Target, ...]:
    return Target("macro_f1", macro_f1, at_least=True), Target("parameters", 6_001, at_least=False)


_RR_IK_TARGETS = (
    Target("charged_mse", 0.44, at_least=False),
    Target("charged_share_of_zero", 1.0, at_least=False),
)
_RF_TARGETS = (
    Target("charged_extrapolation_mse", 16.9, at_least=False),
    Target("charged_share_of_zero", 1.0, at_least=False),
)

DOMAINS: dict[str, Domain] = {
    "dose": Domain(
        task="dose",
        suggested=dose.SUGGESTED,
        space=Space(
            "dose",
            {
                "learning_rate": Float(2e-3, 2e-2, log=True),
                "lambda_sign": Float(4.0, 16.0, log=True),
                "hidden_width": Choice((48, 64)),
                "batch_size": Choice((64, 128)),
            },
        ),
        score=_dose_score,
        metrics=(
            "macro_f1",
            "finite_mae",
            "false_censored_rate_on_in_range",
            "false_in_range_rate_on_censored",
            "charged_error",
        ),
        peer="SCM flagship default",
        peer_value=0.1894,
        trivial="1/6",  # macro-F1 of one class for every curve
        targets={"quick": _dose_targets(0.88), "paper": _dose_targets(0.90)},
        paper={"batch_size": 512, "max_epochs": 30},
        max_weights=6_000,
    ),
    "rr_ik": Domain(
        task="rr_ik",
        suggested=rr_ik.SUGGESTED,
        space=Space(
            "rr_ik",
            {
                "learning_rate": Float(1e-3, 1e-2, log=True),
                "hidden_width": Choice((48, 64)),
                "batch_size": Choice((64, 128)),
            },
        ),
        score=_charged_score,
        metrics=("charged_mse", "charged_error", "mse", "success_rate", "charged_mse_b3", "charged_mse_rest"),
        peer="IK SCM preset basic",
        peer_value=739.1,
        trivial="predict_zero_mse",
        targets={"quick": _RR_IK_TARGETS, "paper": _RR_IK_TARGETS},
        paper={"batch_size": 256},
    ),
    "rf": Domain(
        task="rf",
        suggested=rf.SUGGESTED,
        space=Space(
            "rf",
            {"learning_rate": Float(0.05, 0.2, log=True), "batch_size": Choice((256, 512))},
        ),
        score=_charged_score,
        metrics=(
            "charged_extrapolation_mse",
            "extrapolation_mse",
            "in_band_mse",
            "charged_mse",
            "coverage_rate",
        ),
        peer="MLP-Deep-SiLU (its best)",
        peer_value=16.94,
        trivial="predict_zero_extrapolation_mse",
        targets={"quick": _RF_TARGETS, "paper": _RF_TARGETS},
        paper={"batch_size": 1024},
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark, print its table, and return 0 if every target holds, else 1."""
    arguments = _parser().parse_args(argv)
    plan = PLANS["paper" if arguments.paper else "quick" if arguments.quick else "default"]
    started = time.perf_counter()
    with ProcessPoolExecutor(arguments.workers, mp_context=get_context("spawn")) as pool:
        results = [
            run_domain(DOMAINS[name], plan, lambda *what: run_trials(pool, *what))
            for name in arguments.domains
        ]
    document = {"size": plan.size, "duration_s": time.perf_counter() - started, "domains": results}
    print(render(document))
    if arguments.json:
        arguments.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return 0 if all(result["passed"] for result in results) else 1


def run_domain(domain: Domain, plan: Plan, run: Runner) -> dict[str, Any]:
    """Sweep a task, pick a config by validation, and report it on test data of fresh seeds."""
    started = time.perf_counter()
    configs = draw_configs(domain, plan)
    params: dict[str, Any] = {"size": plan.size}
    swept = run(domain, params, configs, range(plan.sweep_seeds))
    best = pick_config(domain, configs, swept)
    result: dict[str, Any] = {"task": domain.task, "size": plan.size, "swept": len(swept), "passed": False}
    if best is None:
        return result | {"error": "no config completed its trials", "sweep": swept}
    seeds = range(REPORT_SEEDS_FROM, REPORT_SEEDS_FROM + plan.report_seeds)
    rows = run(domain, params | {"redraw_data": True}, [best], seeds)
    test = {name: [tested_value(domain, row, name) for row in rows] for name in reported(domain, plan)}
    targets = [
        {"target": str(target), "values": test[target.metric], "holds": target.holds(test[target.metric])}
        for target in domain.targets[plan.size]
    ]
    return result | {
        "config": best,
        "config_id": config_id(best),
        "test": test,
        "targets": targets,
        "passed": all(target["holds"] for target in targets),
        "peer": {"what": domain.peer, "value": domain.peer_value},
        "duration_s": time.perf_counter() - started,
        "sweep": swept,
        "reported": rows,
    }


def draw_configs(domain: Domain, plan: Plan, seed: int = 0) -> list[Config]:
    """The task's suggested config first, then draws from the domain's space with the rest as suggested."""
    changes = dict(domain.paper) if plan.size == "paper" else {}
    rng = np.random.default_rng(seed)
    points = rng.random((plan.candidates - 1, len(domain.space.dimensions))).tolist()
    drawn = [domain.space.sample(point) for point in points]
    return [{**domain.suggested, **config, **changes} for config in ({}, *drawn)]


def pick_config(domain: Domain, configs: Sequence[Config], rows: Sequence[Row]) -> Config | None:
    """The config with the smallest mean validation score; one that failed a trial or is too large is out."""
    scores: dict[str, list[float]] = {}
    for row in rows:
        allowed = row["status"] == "completed" and row["parameters"] <= domain.max_weights
        score = domain.score(row) if allowed else math.inf
        scores.setdefault(row["config_id"], []).append(score if math.isfinite(score) else math.inf)
    best = min(configs, key=lambda config: fmean(scores[config_id(config)]))
    return best if math.isfinite(fmean(scores[config_id(best)])) else None


def reported(domain: Domain, plan: Plan) -> list[str]:
    """Names of all test values that the table or a target needs."""
    needed = [*domain.metrics, *(target.metric for target in domain.targets[plan.size]), "parameters"]
    if not domain.trivial[0].isdigit():
        needed.append(domain.trivial)
    return list(dict.fromkeys(needed))


def tested_value(domain: Domain, row: Row, name: str) -> float:
    """A test value of a row by its short name; nan where the trial did not get that far."""
    if name == "parameters":
        return float(row["parameters"])
    if name == "charged_share_of_zero":
        return tested_value(domain, row, domain.metrics[0]) / tested_value(domain, row, domain.trivial)
    for column in (f"test_{name}", f"test_metric.{name}"):
        if column in row:
            return float(row[column])
    return math.nan


def run_trials(
    pool: ProcessPoolExecutor,
    domain: Domain,
    params: Mapping[str, Any],
    configs: Sequence[Config],
    seeds: Sequence[int],
) -> list[Row]:
    """Train every config with every seed in the pool, one thread each; rows in the order asked for."""
    asked = [(domain.task, dict(params), config, seed) for config in configs for seed in seeds]
    rows = []
    for done, row in enumerate(pool.map(run_one, *zip(*asked, strict=True)), start=1):
        rows.append(row)
        print(
            f"{domain.task}: {done}/{len(asked)} {row['status']} {row['duration_s']:.1f} s", file=sys.stderr
        )
    return rows


def run_one(task: str, params: dict[str, Any], config: Config, seed: int) -> Row:
    """Train one trial in this process, with one thread."""
    import torch

    from trainables.tasks.registry import TASKS
    from trainables.trial import run_trial

    torch.set_num_threads(1)
    outcome = run_trial(TASKS[task](params), config, seed)
    return {"task": task, "config_id": config_id(config), "seed": seed, **outcome}


def render(document: Mapping[str, Any]) -> str:
    """The table of all domains and the line of each target."""
    lines = [f"{'task':<6} {'test metric':<34} {'mean':>11} {'sd':>10} {'worst':>11}  peer / trivial"]
    for result in document["domains"]:
        lines += _render_domain(result)
    lines.append(f"size {document['size']}, {document['duration_s']:.0f} s; every test row counts")
    return "\n".join(lines)


def _render_domain(result: Mapping[str, Any]) -> list[str]:
    if "error" in result:
        return [f"{result['task']:<6} {result['error']}"]
    domain, lines = DOMAINS[result["task"]], []
    for name, values in result["test"].items():
        larger_is_better = any(
            target.metric == name and target.at_least for target in domain.targets[result["size"]]
        )
        worst = min(values) if larger_is_better else max(values)
        spread = stdev(values) if len(values) > 1 else math.nan
        note = ""
        if name == domain.metrics[0]:
            note = f"{domain.peer_value:g} ({domain.peer}) / {_trivial_text(domain, result['test'])}"
        lines.append(
            f"{result['task']:<6} {name:<34} {fmean(values):>11.4g} {spread:>10.2g} {worst:>11.4g}  {note}"
        )
    for target in result["targets"]:
        lines.append(f"       {'ok  ' if target['holds'] else 'MISS'} {target['target']} at every seed")
    return lines


def _trivial_text(domain: Domain, test: Mapping[str, Sequence[float]]) -> str:
    return f"{fmean(test[domain.trivial]):.4g}" if domain.trivial in test else domain.trivial


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="few candidates and seeds")
    size.add_argument("--paper", action="store_true", help="the sizes of the published runs")
    parser.add_argument("--domains", nargs="+", choices=list(DOMAINS), default=list(DOMAINS))
    parser.add_argument(
        "--workers", type=int, default=min(2, os.cpu_count() or 1), help="processes (default %(default)s)"
    )
    parser.add_argument("--json", type=Path, help="write everything that was measured here")
    return parser


if __name__ == "__main__":
    sys.exit(main())
