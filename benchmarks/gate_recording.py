"""Noise for `gate_calibration`: what trainings that should agree differ by, recorded on this machine.

Coverage and error: each scenario is trained twice with each seed, once with a learning rate that is larger by
one part in a million. That is what a harmless change of code does: sums are rounded otherwise, and the
training drifts apart as far as it does. Step times: launches of two processes of the same code, back to back
in random order, each timing every scenario.
"""

from __future__ import annotations

import csv
import json
import random
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from reports.provenance import gather_provenance
from trainables.trained import Trained, train_models

ROOT = Path(__file__).resolve().parents[1]
FOLDER = Path(__file__).with_name("gate_noise")
NOISE_FILE, ORIGIN_FILE = "pairs.csv", "origin.json"
SEEDS, LAUNCHES = 200, 60
HARMLESS = 1e-6
TRAINED = ("coverage", "accepted_error")
STEP_TIME = "step_time_ms"
STEPS = 200
COLUMNS = ("scenario", "metric", "number", "first", "second")

_TAUS = {"tau_infer": 0.1, "tau_train_min": 0.1, "tau_train_max": 0.2}


def table(
    data: str, inputs: list[str], target: str, column: str, values: Mapping[str, str]
) -> dict[str, Any]:
    """The task of an example's data, with a logarithmic target."""
    params = {
        "data": str(ROOT / "data" / data),
        "inputs": inputs,
        "target": target,
        "target_transform": "log",
        "status": {"column": column, "values": dict(values)},
    }
    return {"name": "table", "params": params, "base_dir": str(ROOT)}


SCENARIOS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "nh4": (
        table(
            "nh4.csv",
            ["Week", "Date.On"],
            "NH4.mg.per.L",
            "Censored",
            {"TRUE": "censored_below", "FALSE": "finite"},
        ),
        {
            "max_epochs": 30,
            "coverage_term": "soft",
            "target_coverage": 0.6,
            "learning_rate": 0.01,
            "lr_schedule": "cosine",
            "clip_norm": 1.0,
            **_TAUS,
        },
    ),
    "gbsg2": (
        table(
            "gbsg2.csv",
            ["age", "tsize", "pnodes", "progrec", "estrec"],
            "time",
            "cens",
            {"1": "finite", "0": "censored_above"},
        ),
        {
            "max_epochs": 20,
            "coverage_term": "soft",
            "target_coverage": 0.5,
            "learning_rate": 0.001,
            **_TAUS,
        },
    ),
    "dose": (
        {
            "name": "dose",
            "params": {"n_train": 1000, "n_val": 1000, "n_test": 200},
            "base_dir": str(ROOT),
        },
        {
            "max_epochs": 10,
            "batch_size": 64,
            "learning_rate": 0.003,
            "lr_schedule": "cosine",
            "clip_norm": 1.0,
            **_TAUS,
        },
    ),
}


@dataclass(frozen=True, slots=True)
class Pair:
    """What two trainings, or two launches, that should agree say of one metric."""

    scenario: str
    metric: str
    number: int
    first: float
    second: float


def record(folder: Path = FOLDER, *, seeds: int = SEEDS, launches: int = LAUNCHES) -> None:
    """Record pairs of trainings and of launches into `folder`, with what they were recorded on."""
    torch.set_num_threads(1)
    pairs = [*train_pairs(seeds), *time_pairs(launches)]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / NOISE_FILE).open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for pair in pairs:
            writer.writerow(
                [pair.scenario, pair.metric, pair.number, f"{pair.first:.6g}", f"{pair.second:.6g}"]
            )
    origin = {
        "command": "python benchmarks/gate_calibration.py --record",
        "recorded_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "harmless_change": f"learning_rate * (1 + {HARMLESS:g})",
        "seeds": seeds,
        "launches": launches,
        "steps": STEPS,
        "processor": processor(),
        **{name: value for name, value in gather_provenance().items() if name != "hostname"},
    }
    (folder / ORIGIN_FILE).write_text(json.dumps(origin, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def train_pairs(seeds: int) -> Iterator[Pair]:
    """Every scenario twice with each seed."""
    for name, (spec, config) in SCENARIOS.items():
        trials = [
            (f"{arm}-{seed}", {**config, "learning_rate": config["learning_rate"] * factor}, seed)
            for seed in range(seeds)
            for arm, factor in (("first", 1.0), ("second", 1.0 + HARMLESS))
        ]
        trained = train_models(spec, trials)
        for seed in range(seeds):
            said = [outcome(trained[f"{arm}-{seed}"]) for arm in ("first", "second")]
            for metric in TRAINED:
                yield Pair(name, metric, seed, said[0][metric], said[1][metric])


def outcome(trained: Trained | Mapping[str, Any]) -> Mapping[str, Any]:
    """How a trial ended."""
    return trained.outcome if isinstance(trained, Trained) else trained


def time_pairs(launches: int) -> Iterator[Pair]:
    """Launches of the same code back to back, by lot which is called the first."""
    lot = random.Random(0)
    for number in range(launches):
        arms = lot.sample(["first", "second"], 2)
        times = {arm: launch() for arm in arms}
        for name in SCENARIOS:
            yield Pair(name, STEP_TIME, number, times["first"][name], times["second"][name])


def launch() -> dict[str, float]:
    """The median step of every scenario, in ms, by a process of its own: the worker of the gate."""
    requests = [
        {"ask": "time", "spec": spec, "config": config, "seed": 0, "steps": STEPS}
        for spec, config in SCENARIOS.values()
    ]
    done = subprocess.run(
        [sys.executable, str(ROOT / "harness" / "gate" / "launch.py")],
        input="".join(json.dumps(request) + "\n" for request in requests),
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
    )
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    return {name: answer["step_time_ms"] for name, answer in zip(SCENARIOS, answers, strict=True)}


def processor() -> str:
    """The processor by name, as far as the system says it."""
    try:
        told = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return "unknown"
    names = [line.partition(":")[2].strip() for line in told.splitlines() if line.startswith("model name")]
    return names[0] if names else "unknown"


def read_pairs(folder: Path = FOLDER) -> list[Pair]:
    """What was recorded; ValueError naming the file where it is not what `record` writes."""
    path = folder / NOISE_FILE
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.reader(file)
        if tuple(next(reader, ())) != COLUMNS:
            raise ValueError(f"{path} must have the columns {', '.join(COLUMNS)}")
        return [
            Pair(scenario, metric, int(number), float(first), float(second))
            for scenario, metric, number, first, second in reader
        ]
