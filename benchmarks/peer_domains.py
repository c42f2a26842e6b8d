"""Sweep the benchmark tasks; compare the best configs with zeroproofml 0.6.1 and with predicting zero.

For each task a sweep at one data seed picks a config by its validation metrics. That config is then trained
again with seeds that the sweep has not used, each drawing data and weights of its own, and what is reported
is how these trials do on their test data: mean, standard deviation and worst. Every target must hold at the
worst seed. Abstention is charged throughout: a rejected row costs what the trivial answer would.

    python benchmarks/peer_domains.py --quick            under two minutes on two cores
    python benchmarks/peer_domains.py                    more candidates and seeds, and models with less of
                                                         the structure that the tasks bring
    python benchmarks/peer_domains.py --paper            the sizes of the published runs

The numbers of the peer were measured once, by running its published defaults at paper size with one seed, on
its own draws of the same problems; for rf it is the best model of its benchmark, a plain MLP.

Exits 1 when a target is missed, 2 for arguments that cannot be right, 130 when interrupted.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from benchmark_arguments import file_to_write, positive

from harness.environment import ray_session
from harness.plan import ResourcesSection, load_plan
from harness.sweep import run_sweep
from reports.rows import read_rows
from search_spaces.domains import Choice, Float
from search_spaces.space import Space
from trainables.tasks import dose, rf, rr_ik

Row = dict[str, Any]
# What a sweep needs: the values of a plan, and a name for its run; gives the rows of the run.
Runner = Callable[[Mapping[str, Any], str], list[Row]]

REPORT_SEEDS_FROM = 1_000


@dataclass(frozen=True, slots=True)
class Target:
    """A bound that a test value must keep at every reported seed."""

    name: str
    limit: float
    at_least: bool = False

    def holds(self, values: Sequence[float]) -> bool:
        """Whether there are values and every one keeps the bound; nan never does."""
        kept = [value >= self.limit if self.at_least else value < self.limit for value in values]
        return bool(kept) and all(kept)

    def __str__(self) -> str:
        return f"{self.name} {'>=' if self.at_least else '<'} {self.limit:g}"


@dataclass(frozen=True, slots=True)
class Variant:
    """Another model of the same task, trained at the reported seeds to compare with; without targets."""

    params: Mapping[str, Any]
    config: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Domain:
    """One task: where it is searched, what picks the config, and what is compared with what."""

    task: str
    suggested: Mapping[str, Any]
    space: Space
    score: Callable[[Row], float]  # of the validation metrics of a row; the smallest wins
    values: tuple[str, ...]  # test values that are reported, the first against peer and trivial answer
    peer: str
    peer_value: float
    trivial: str  # the test value of the trivial answer, or a number as text
    targets: Mapping[str, tuple[Target, ...]]  # by size
    paper: Mapping[str, Any]  # what the paper size holds fixed in a config
    max_weights: float = math.inf
    variants: Mapping[str, Variant] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Amount:
    """How much is run."""

    size: str
    candidates: int
    sweep_seeds: int
    report_seeds: int
    with_variants: bool


AMOUNTS: dict[str, Amount] = {
    "quick": Amount("quick", candidates=4, sweep_seeds=1, report_seeds=3, with_variants=False),
    "default": Amount("quick", candidates=12, sweep_seeds=2, report_seeds=5, with_variants=True),
    "paper": Amount("paper", candidates=4, sweep_seeds=1, report_seeds=3, with_variants=True),
}


def _dose_score(row: Row) -> float:
    """The selection score of the published runs: (1 - macro-F1) + 0.05 min(20, error), 10 for no error."""
    error = row["metric.finite_mae"]
    return float(1.0 - row["metric.macro_f1"] + 0.05 * min(20.0, error if math.isfinite(error) else 10.0))


def _charged_score(row: Row) -> float:
    return float(row["metric.charged_mse"])


def _dose_targets(macro_f1: float) -> tuple[Target, ...]:
    return Target("macro_f1", macro_f1, at_least=True), Target("parameters", 6_001)


# A share of what answering zero costs on the same rows: the bound that luck with the test data cannot move.
_RR_IK_TARGETS = Target("charged_mse", 0.44), Target("share_of_trivial", 0.1)
_RF_TARGETS = Target("charged_extrapolation_mse", 16.9), Target("share_of_trivial", 0.1)

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
        values=(
            "macro_f1",
            "finite_mae",
            "false_censored_rate_on_in_range",
            "false_in_range_rate_on_censored",
            "charged_error",
            "parameters",
        ),
        peer="SCM flagship",
        peer_value=0.1894,
        trivial="0.1905",  # macro-F1 of calling every curve above, the most frequent class
        targets={"quick": _dose_targets(0.88), "paper": _dose_targets(0.90)},
        paper={"batch_size": 512},
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
        values=(
            "charged_mse",
            "charged_error",
            "success_rate",
            *(f"charged_mse_{bucket}" for bucket in rr_ik.BUCKET_NAMES),
            "predict_zero_mse",
            "parameters",
        ),
        peer="SCM preset basic",
        peer_value=739.1,
        trivial="predict_zero_mse",
        targets={"quick": _RR_IK_TARGETS, "paper": _RR_IK_TARGETS},
        paper={"batch_size": 256},
        variants={
            "config's own head": Variant(
                {"structure": "free"}, {"head": "multihead", "q_param": "softplus", "max_epochs": 40}
            )
        },
    ),
    "rf": Domain(
        task="rf",
        suggested=rf.SUGGESTED,
        space=Space(
            "rf",
            {"learning_rate": Float(0.05, 0.2, log=True), "batch_size": Choice((256, 512))},
        ),
        score=_charged_score,
        values=(
            "charged_extrapolation_mse",
            "in_band_mse",
            "charged_mse",
            "coverage_rate",
            "predict_zero_extrapolation_mse",
            "parameters",
        ),
        peer="MLP-Deep, its best",
        peer_value=16.94,
        trivial="predict_zero_extrapolation_mse",
        targets={"quick": _RF_TARGETS, "paper": _RF_TARGETS},
        paper={"batch_size": 1024},
        variants={"network coefficients": Variant({"structure": "network"}, {"learning_rate": 3e-3})},
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark, print its table, and return 0 if every target holds, else 1; 130 if interrupted."""
    arguments = _parser().parse_args(argv)
    try:
        document = run_domains(arguments.domains, arguments.run, arguments.workers)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    print(render(document))
    if arguments.json:
        text = json.dumps(strict_numbers(document), indent=2, default=str, allow_nan=False)
        arguments.json.write_text(text + "\n", encoding="utf-8")
    return 0 if all(result["passed"] for result in document["domains"]) else 1


def run_domains(tasks: Sequence[str], amount_name: str, workers: int | None) -> dict[str, Any]:
    """Run the benchmark's tasks one after the other, `workers` trials at once (None: one per core)."""
    amount = AMOUNTS[amount_name]
    started = time.perf_counter()
    resources = ResourcesSection(max_concurrent=workers)
    with tempfile.TemporaryDirectory(prefix="scm-") as folder, ray_session(resources, None):

        def run(values: Mapping[str, Any], name: str) -> list[Row]:
            return sweep_rows(values, Path(folder) / name, resources)

        results = [run_domain(DOMAINS[name], amount, run) for name in tasks]
    return {
        "run": amount_name,
        "size": amount.size,
        "duration_s": time.perf_counter() - started,
        "domains": results,
    }


def run_domain(domain: Domain, amount: Amount, run: Runner) -> dict[str, Any]:
    """Sweep a task, pick a config by validation, and report it on test data of fresh seeds."""
    started = time.perf_counter()
    swept = run(sweep_plan(domain, amount), f"{domain.task}-sweep")
    best = pick_config(domain, swept)
    result: dict[str, Any] = {"task": domain.task, "swept": len(swept), "passed": False}
    if best is None:
        return result | {"error": "no config completed its trials", "sweep": swept}
    rows = run(report_plan(domain, amount, best, {}), f"{domain.task}-report")
    test = tested_values(domain, rows)
    targets = [
        {"target": str(target), "holds": target.holds(test[target.name])}
        for target in domain.targets[amount.size]
    ]
    variants: dict[str, dict[str, list[float]]] = {}
    for name, variant in domain.variants.items() if amount.with_variants else ():
        config = {**domain.suggested, **_fixed(domain, amount), **variant.config}
        plan = report_plan(domain, amount, config, variant.params)
        variants[name] = tested_values(domain, run(plan, f"{domain.task}-{len(variants)}"))
    return result | {
        "config": best,
        "test": test,
        "targets": targets,
        "passed": all(target["holds"] for target in targets),
        "peer": {"what": domain.peer, "value": domain.peer_value},
        "variants": variants,
        "duration_s": time.perf_counter() - started,
        "sweep": swept,
        "reported": rows,
    }


def sweep_plan(domain: Domain, amount: Amount) -> dict[str, Any]:
    """The plan of the sweep: Sobol points of the task's space, all else as suggested, one data seed."""
    fixed = _fixed(domain, amount)
    varying = {name: kind for name, kind in domain.space.domains.items() if name not in fixed}
    suggested = {name: value for name, value in domain.suggested.items() if name not in varying}
    return {
        "task": {"name": domain.task, "size": amount.size},
        "space": {name: kind.to_plain() for name, kind in varying.items()},
        "config": suggested | fixed,
        "search": {"algorithm": "sobol", "configs": amount.candidates, "seed": 0},
        "seeds": list(range(amount.sweep_seeds)),
    }


def report_plan(
    domain: Domain, amount: Amount, config: Mapping[str, Any], params: Mapping[str, Any]
) -> dict[str, Any]:
    """The plan of one config with fresh seeds, each of which draws its own data."""
    epochs = config["max_epochs"]
    return {
        "task": {"name": domain.task, "size": amount.size, "redraw_data": True, **params},
        "space": {"max_epochs": {"type": "choice", "options": [epochs]}},
        "config": {name: value for name, value in config.items() if name != "max_epochs"},
        "search": {"algorithm": "random", "configs": 1, "seed": 0},
        "seeds": list(range(REPORT_SEEDS_FROM, REPORT_SEEDS_FROM + amount.report_seeds)),
    }


def sweep_rows(values: Mapping[str, Any], out: Path, resources: ResourcesSection) -> list[Row]:
    """Run a plan as `scm-harness sweep` does, in the Ray that is running, and give the rows of its run."""
    file = out.with_suffix(".yaml")
    file.write_text(json.dumps(values), encoding="utf-8")  # JSON is YAML
    plan = load_plan(file).model_copy(update={"resources": resources})
    if run_sweep(plan, out).interrupted:
        raise KeyboardInterrupt
    rows: list[Row] = read_rows(out).to_pylist()
    return sorted(rows, key=lambda row: str(row["trial_id"]))


def pick_config(domain: Domain, rows: Sequence[Row]) -> dict[str, Any] | None:
    """The config with the smallest mean validation score; one that failed a trial or is too large is out."""
    scores: dict[str, list[float]] = {}
    for row in rows:
        allowed = row["status"] == "completed" and row["parameters"] <= domain.max_weights
        score = domain.score(row) if allowed else math.inf
        scores.setdefault(row["config_id"], []).append(score if math.isfinite(score) else math.inf)
    best = min(scores, key=lambda config_id: fmean(scores[config_id]))
    if not math.isfinite(fmean(scores[best])):
        return None
    row = next(row for row in rows if row["config_id"] == best)
    names = {**domain.suggested, **domain.space.domains}
    return {name: row[f"config.{name}"] for name in names}


def tested_values(domain: Domain, rows: Sequence[Row]) -> dict[str, list[float]]:
    """The test values of a task by name, one per row; nan where a trial did not get that far."""
    test = {name: [_tested(row, name) for row in rows] for name in domain.values}
    if domain.trivial in test:
        pairs = zip(test[domain.values[0]], test[domain.trivial], strict=True)
        test["share_of_trivial"] = [value / trivial for value, trivial in pairs]
    return test


def render(document: Mapping[str, Any]) -> str:
    """The table of all domains, with a line for each target."""
    lines = [f"{'task':<6} {'test value':<34} {'mean':>11} {'sd':>9} {'worst':>11}   peer / trivial answer"]
    for result in document["domains"]:
        lines += _render_domain(result, document["size"])
    what = f"{document['run']} run at {document['size']} size"
    lines.append(f"{what}, {document['duration_s']:.0f} s; test data of fresh seeds")
    return "\n".join(lines)


def strict_numbers(value: Any) -> Any:
    """The same document with None for every float that JSON has no word for (nan and the infinities)."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: strict_numbers(held) for key, held in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict_numbers(held) for held in value]
    return value


def _render_domain(result: Mapping[str, Any], size: str) -> list[str]:
    if "error" in result:
        return [f"{result['task']:<6} {result['error']}"]
    domain, test, lines = DOMAINS[result["task"]], result["test"], []
    rising = {target.name for target in domain.targets[size] if target.at_least} | {
        "success_rate",
        "coverage_rate",
    }
    for name, values in test.items():
        note = ""
        if name == domain.values[0]:
            trivial = f"{np.mean(test[domain.trivial]):.4g}" if domain.trivial in test else domain.trivial
            note = f"   {domain.peer_value:g} ({domain.peer}) / {trivial}"
        lines.append(f"{result['task']:<6} {name:<34} {_summary(values, name in rising)}{note}")
    for label, variant in result["variants"].items():
        name = domain.values[0]
        lines.append(
            f"{result['task']:<6} {name + ':':<34} {_summary(variant[name], name in rising)}   {label}"
        )
    for target in result["targets"]:
        lines.append(f"       {'ok  ' if target['holds'] else 'MISS'} {target['target']} at every seed")
    return lines


def _summary(values: Sequence[float], rising: bool) -> str:
    # NumPy's, because the ones of `statistics` raise for nan.
    spread = np.std(values, ddof=1) if len(values) > 1 else math.nan
    worst = math.nan if any(map(math.isnan, values)) else min(values) if rising else max(values)
    return f"{np.mean(values):>11.4g} {spread:>9.2g} {worst:>11.4g}"


def _fixed(domain: Domain, amount: Amount) -> dict[str, Any]:
    return dict(domain.paper) if amount.size == "paper" else {}


def _tested(row: Row, name: str) -> float:
    for column in (f"test_metric.{name}", f"test_{name}", name):
        if row.get(column) is not None:
            return float(row[column])
    return math.nan


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_targets_text(), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    size = parser.add_mutually_exclusive_group()
    to_run: dict[str, Any] = {"dest": "run", "action": "store_const", "default": "default"}
    size.add_argument("--quick", const="quick", help="few candidates and seeds", **to_run)
    size.add_argument("--paper", const="paper", help="the sizes of the published runs", **to_run)
    parser.add_argument("--domains", nargs="+", choices=list(DOMAINS), default=list(DOMAINS))
    parser.add_argument("--workers", type=positive, help="trials at once (default: one per core)")
    parser.add_argument("--json", type=file_to_write, help="write everything that was measured here")
    return parser


def _targets_text() -> str:
    lines = [
        "targets, each at every reported seed (share_of_trivial: of what the trivial answer costs there):"
    ]
    for name, domain in DOMAINS.items():
        for size, targets in domain.targets.items():
            lines.append(f"    {name:<6} {size:<6} {', '.join(map(str, targets))}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
