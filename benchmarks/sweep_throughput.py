"""Time whole sweeps: packs against trials alone, and against Ray Tune around zeroproofml's trainer.

All on one machine in one run, on data/gbsg2.csv (five covariates, censored times are bottoms): a ReLU network
5-64-64-2, Adam, batches of 32, 20 epochs, each epoch validated; learning rate, beta1 and two loss weights
differ from config to config. Every arm is a process of its own, timed from its start to its end.

    throughput  configs per second on 1,024 configs of
                  usual  the peer's usual way: a function trainable, its SCMTrainer fed by a DataLoader
                  best   the peer's best way: a class trainable, actors reused, batches by indexing, targets
                         lifted once, the fused optimizer, no log files
                  alone  `scm-harness sweep` with `packs: {size: 1}`
                  packs  `scm-harness sweep` as it is, the median of three; the first compiles its C
                Packs train all 1,024. The others train a few, which are extended to 1,024 at the rate of
                their second half; what one more config takes is told beside, of packs too. Targets for
                packs, start of workers included: 100 times the usual way, 25 times the best (50 is what we
                would like), 15 times trials alone; on a GPU, 8,192 configs in packs of 4,096, 300 times the
                best way there. The best way trains configs that packs train as well, from the same weights
                in the same order; validation loss and coverage of its trials and of all other trials of
                packs must be distributed alike (Kolmogorov-Smirnov, alpha 0.01 each). The losses are the
                same formula on both sides, and one threshold of 0.1 serves training, validation and
                inference. Beside it, what Ray Tune takes in its best way for trials that train nothing.
    limit       the time of a pack's step over that of its matrix products alone (torch.bmm at the same
                shapes, forward and backward, in the same process; one thread), for batches of 32, 128 and 512
                and packs of 1 to 1,024. Target on a CPU: at most 2.0 from 32 trials on (1.5 is what we would
                like) in the form in which sweeps run; some packs also as operations of torch one by one,
                which is what sweeps do where there is no C compiler, and under torch.compile.
    scale       sweeps of 64 to 8,192 configs, the faster of two of each. Targets: the time that a config more
                takes, from one size to the next and the start of workers apart, is within 20 % of itself;
                peak memory of the driver grows by less than 2 kB a config from the first size to the last,
                the run folder by less than 5 kB. The quick sizes are too small for the first two. At the
                first size no pack is full, and what full packs report at once is taken once: what a config
                adds from the later sizes on is told beside.

    python benchmarks/sweep_throughput.py --quick     under three minutes on two cores
    python benchmarks/sweep_throughput.py

Exit code 0 when all targets are met, 1 when one is missed, 2 when something cannot be measured: zeroproofml
is not installed, the device is not there, or an arm failed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from benchmark_arguments import file_to_write
from peer_sweeps import (
    FIXED,
    KS_OF,
    SEED,
    SHAPE,
    TASK,
    NotMeasuredError,
    run_best,
    run_nothing,
    run_usual,
)
from scipy import stats
from torch import Tensor

from reports.rows import read_rows
from scm.data import Split
from scm.models import make_model
from scm.packed import PackedTrainer, PackTrial
from scm.packed.toolchain import CACHE_VARIABLE
from scm.training.targets import STATUSES, lift_semantic_targets
from scm.trial_config import TrialConfig

TOTALS = {"cpu": 1024, "cuda": 8192}
ALPHA = 0.01

DOMAINS: dict[str, Any] = {
    "learning_rate": {"type": "float", "low": 3e-4, "high": 1e-2, "log": True},
    "beta1": {"type": "float", "low": 0.8, "high": 0.95},
    "lambda_margin": {"type": "float", "low": 0.01, "high": 1.0, "log": True},
    "lambda_sign": {"type": "float", "low": 0.1, "high": 3.0, "log": True},
}


@dataclass(frozen=True, slots=True)
class Amount:
    """How much is measured; `packs`: how often the sweep in packs is run, whose median time counts."""

    packs: int
    usual: int
    best: int
    alone: int
    nothing: int
    limit: tuple[tuple[int, int], ...]  # batch size, trials
    other_forms: tuple[tuple[int, int], ...]
    rounds: int
    scale: tuple[int, ...]
    repeats: int  # of each size, the fastest counts


_PACKS = (1, 4, 16, 32, 64, 128, 256, 512, 1024)
AMOUNTS = {
    "quick": Amount(1, 8, 64, 32, 8, ((32, 32), (32, 128), (128, 32)), (), 5, (64, 512), 1),
    "full": Amount(
        3,
        64,
        128,
        128,
        8,
        tuple(itertools.product((32, 128, 512), _PACKS)),
        tuple(itertools.product((32, 128), (32, 128, 512))),
        9,
        (64, 2048, 4096, 8192),
        2,
    ),
}


@dataclass(frozen=True, slots=True)
class Target:
    """A measured number and the bound that it must keep."""

    name: str
    value: float
    limit: float
    at_least: bool = False

    @property
    def met(self) -> bool:
        """Whether the bound is kept; nan never keeps one."""
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def plain(self) -> dict[str, Any]:
        """The target for a file, with null for what is no number."""
        return {**asdict(self), "value": or_null(self.value), "met": self.met}

    def __str__(self) -> str:
        sign = ">=" if self.at_least else "<="
        return f"{self.name}: {self.value:.3g} {sign} {self.limit:g} {'met' if self.met else 'MISSED'}"


@dataclass(frozen=True, slots=True)
class Found:
    """What one part of the benchmark found: its table, its numbers, its targets."""

    lines: list[str]
    numbers: dict[str, Any]
    targets: list[Target] = field(default_factory=list)

    def markdown(self, part: str) -> list[str]:
        """A heading, the tables, and the targets."""
        targets = [f"- {target}" for target in self.targets]
        return [f"## {part}", "", *self.lines, *([""] if targets else []), *targets]


# --- sweeps as processes --------------------------------------------------------------------------------


def make_plan(configs: int, device: str, packs: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The values of a plan that trains so many configs; without `packs` it says nothing about them."""
    plan: dict[str, Any] = {
        "task": TASK,
        "space": {"domains": DOMAINS},
        "config": FIXED,
        "search": {"algorithm": "random", "configs": configs},
        "seeds": [SEED],
    }
    if packs is not None:
        plan["packs"] = dict(packs)
    if device == "cuda":
        plan["resources"] = {"gpus_per_trial": 1}
    return plan


def run_process(arguments: Sequence[str], log: Path) -> float:
    """Run a process of this Python to its end; return the seconds it took.

    NotMeasuredError where it fails.
    """
    begun = time.perf_counter()
    own = {**os.environ, CACHE_VARIABLE: str(log.parent / "native")}  # nothing is compiled beforehand
    with log.open("w", encoding="utf-8") as said:
        code = subprocess.run(
            [sys.executable, *arguments], stdout=subprocess.DEVNULL, stderr=said, env=own, check=False
        ).returncode
    if code != 0:
        last = [line for line in log.read_text(encoding="utf-8").splitlines() if line.strip()][-3:]
        raise NotMeasuredError(f"{' '.join(arguments[:3])} ... ended with {code}: {' / '.join(last)}")
    return time.perf_counter() - begun


def run_arm(arm: str, task: Mapping[str, Any], folder: Path) -> tuple[float, dict[str, Any]]:
    """Run one of `ARMS` as a process; return its seconds and what it said."""
    asked, said = folder / f"{arm}.asked.json", folder / f"{arm}.said.json"
    asked.write_text(json.dumps(task), encoding="utf-8")
    seconds = run_process([__file__, "--arm", arm, str(asked), str(said)], folder / f"{arm}.log")
    return seconds, json.loads(said.read_text(encoding="utf-8"))


def run_command(plan: Mapping[str, Any], name: str, folder: Path) -> tuple[float, list[dict[str, Any]]]:
    """Run `scm-harness sweep` as a user does; return its seconds and its rows, the earliest first."""
    file, out = folder / f"{name}.yaml", folder / name
    file.write_text(json.dumps(plan), encoding="utf-8")  # JSON is YAML
    arguments = ["-m", "harness.cli", "sweep", str(file), "--out", str(out), "--top", "1"]
    seconds = run_process(arguments, folder / f"{name}.log")
    rows = sorted(read_rows(out).to_pylist(), key=lambda row: row["started_at"])
    bad = [row for row in rows if row["status"] != "completed"]
    if bad or len(rows) != plan["search"]["configs"]:
        reason = bad[0]["error"] or bad[0]["stop_reason"] if bad else f"{len(rows)} rows"
        raise NotMeasuredError(f"not every trial of {name} was trained to its end: {reason}")
    return seconds, rows


def run_sized(asked: Mapping[str, Any]) -> dict[str, Any]:
    """A sweep in this process, which is then its driver alone; says when it ended and its peak memory."""
    from harness.plan import load_plan
    from harness.sweep import run_sweep

    run_sweep(load_plan(Path(asked["plan"])), Path(asked["out"]))
    ended = time.time()
    status = Path("/proc/self/status").read_text(encoding="ascii")
    peak_kib = next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:"))
    return {"ended": ended, "peak_bytes": 1024 * int(peak_kib)}


ARMS: Mapping[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "usual": run_usual,
    "best": run_best,
    "nothing": run_nothing,
    "sized": run_sized,
}


# --- throughput -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Rate:
    """How fast an arm is: the seconds for the `measured` configs, and for one more once it is under way."""

    arm: str
    total: int
    measured: int
    wall_s: float
    more_s: float

    @property
    def per_s(self) -> float:
        """Configs per second when `total` are trained, the start of process and workers included."""
        added_s = (self.total - self.measured) * self.more_s if self.measured < self.total else 0.0
        return self.total / (self.wall_s + added_s)


def extended_rate(arm: str, total: int, wall_s: float, stamps: Sequence[float]) -> Rate:
    """Tell from the second half of an arm's configs how long one more takes.

    stamps: a time for each config, ascending, of the same moment of each.
    """
    half = (len(stamps) - 1) // 2
    more_s = (stamps[-1] - stamps[half]) / (len(stamps) - 1 - half)
    return Rate(arm, total, len(stamps), wall_s, more_s)


def seconds_one_more(rows: Sequence[Mapping[str, Any]], workers: int) -> float:
    """How long one more config of a packed sweep takes, told from when its packs began.

    A worker's pack begins where its one before it ended; the first of each, which is traced, does not count.
    nan for too few packs.
    """
    begun: dict[str, list[float]] = {}
    for row in rows:
        begun.setdefault(row["pack_id"] or row["trial_id"], []).append(row["started_at"].timestamp())
    packs = sorted(begun.values())[workers:]
    laps = [(later[0] - pack[0]) / len(pack) for pack, later in zip(packs, packs[workers:], strict=False)]
    return median(laps) / workers if laps else math.nan


def measure_throughput(amount: Amount, device: str, folder: Path) -> Found:
    """Run the arms, and compare what the peer's best way and packs came to."""
    total = TOTALS[device]
    in_packs = make_plan(total, device, {"size": 4096} if device == "cuda" else None)
    say(f"packs: {total} configs")
    first_s, rows = run_command(in_packs, "packs0", folder)
    configs = [{name: row[f"config.{name}"] for name in DOMAINS} for row in rows]

    say(f"alone: {amount.alone} configs")
    wall_s, alone_rows = run_command(make_plan(amount.alone, device, {"size": 1}), "alone", folder)
    alone = extended_rate("alone", total, wall_s, [row["started_at"].timestamp() for row in alone_rows])
    say(f"best: {amount.best} configs")
    wall_s, said = run_arm("best", {"device": device, "configs": configs[: amount.best]}, folder)
    best = extended_rate("best", total, wall_s, said["ends"])
    say(f"usual: {amount.usual} configs")
    wall_s, usual_said = run_arm("usual", {"device": device, "configs": configs[: amount.usual]}, folder)
    usual = extended_rate("usual", total, wall_s, usual_said["ends"])

    say(f"nothing: {amount.nothing} configs")
    nothing_s, _ = run_arm("nothing", {"device": device, "configs": configs[: amount.nothing]}, folder)

    walls_s = [first_s]  # the others between the first and the rest: all see the same machine
    for number in range(1, amount.packs):
        say(f"packs: {total} configs once more")
        walls_s.append(run_command(in_packs, f"packs{number}", folder)[0])
    workers = 1 if device == "cuda" else os.cpu_count() or 1
    packed = Rate("packs", total, total, median(walls_s), seconds_one_more(rows, workers))
    rates = [usual, best, alone, packed]
    targets = [
        Target(f"packs over {rate.arm}", packed.per_s / rate.per_s, limit, at_least=True)
        for rate, limit in throughput_limits(device, usual, best, alone)
    ]
    alike = compare_outcomes(said["values"], rows)
    targets += [
        Target(f"Kolmogorov-Smirnov p of {name}", found["p"], ALPHA, at_least=True)
        for name, found in alike.items()
    ]
    numbers = {
        "rates": [{**asdict(rate), "more_s": or_null(rate.more_s), "per_s": rate.per_s} for rate in rates],
        "packs_wall_s": walls_s,
        "nothing_wall_s": nothing_s,
        "packed_trials": sum(row["pack_id"] is not None for row in rows),
        "alike": alike,
    }
    floor = (
        f"Ray Tune around {amount.nothing} trials that train nothing takes {nothing_s:.1f} s;"
        f" 25 times the best way is {total} configs in {total / best.per_s / 25:.1f} s."
    )
    return Found([*render_rates(rates), "", floor, "", *render_alike(alike)], numbers, targets)


def throughput_limits(device: str, usual: Rate, best: Rate, alone: Rate) -> list[tuple[Rate, float]]:
    """How many times faster than which arm packs must be."""
    return [(best, 300.0)] if device == "cuda" else [(usual, 100.0), (best, 25.0), (alone, 15.0)]


def compare_outcomes(
    peer: Sequence[Mapping[str, float]], rows: Sequence[Mapping[str, Any]]
) -> dict[str, dict[str, float]]:
    """Test whether the peer's trials and those of packs with other configs came to the same.

    peer: of the configs of the first rows. Their differences, config by config, are told beside.
    """
    alike = {}
    for name in KS_OF:
        own = [row[name] for row in rows]
        theirs = [trial[name] for trial in peer]
        tested = stats.ks_2samp(theirs, own[len(peer) :])
        apart = [abs(one - other) for one, other in zip(theirs, own, strict=False)]
        alike[name] = {
            "p": float(tested.pvalue),
            "distance": float(tested.statistic),
            "median_peer": median(theirs),
            "median_packs": median(own[len(peer) :]),
            "median_apart": median(apart),
        }
    return alike


def render_rates(rates: Sequence[Rate]) -> list[str]:
    """The table of the arms."""
    fastest = rates[-1]
    rows = [
        [
            rate.arm,
            str(rate.measured),
            f"{rate.wall_s:.1f}",
            f"{rate.per_s:.3g}",
            f"{fastest.per_s / rate.per_s:.1f}",
            f"{1e3 * rate.more_s:.1f}",
            f"{rate.more_s / fastest.more_s:.1f}",
        ]
        for rate in rates
    ]
    return table(
        ["arm", "configs", "wall s", "configs/s", "packs: times", "ms one more", "packs: times"], rows
    )


def render_alike(alike: Mapping[str, Mapping[str, float]]) -> list[str]:
    """The table of the comparison of outcomes."""
    rows = [
        [
            name,
            f"{found['distance']:.3f}",
            f"{found['p']:.3f}",
            f"{found['median_peer']:.4f}",
            f"{found['median_packs']:.4f}",
            f"{found['median_apart']:.2g}",
        ]
        for name, found in alike.items()
    ]
    head = ["of validation", "KS distance", "p", "median, best", "median, packs", "apart in the median"]
    return table(head, rows)


# --- the physical limit ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Step:
    """A pack's step and its products, per trial in microseconds, each the least of the rounds."""

    batch_size: int
    trials: int
    form: str
    step_us: float
    products_us: float

    @property
    def ratio(self) -> float:
        """How many times as long as its products a step takes."""
        return self.step_us / self.products_us


# How a pack's steps are made: as in a sweep, from operations of torch one by one, by torch.compile.
FORMS: Mapping[str, Mapping[str, bool]] = {
    "sweep": {},
    "torch": {"native": False},
    "compile": {"compiled": True},
}


class Products:
    """The matrix products of one step of a pack: three forward, three for weights, two for inputs."""

    def __init__(self, trials: int, rows: int, device: str) -> None:
        made = torch.Generator(device=device).manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(trials, *shape, generator=made, device=device)

        pairs = list(itertools.pairwise(SHAPE))
        self.steps: list[tuple[Tensor, Tensor, Tensor]] = []
        for place, (wide, out) in enumerate(pairs):
            x, weight, slope = draw(rows, wide), draw(out, wide), draw(rows, out)
            self._add(x, weight.transpose(1, 2))
            self._add(slope.transpose(1, 2), x)
            if place > 0:
                self._add(slope, weight)

    def _add(self, one: Tensor, other: Tensor) -> None:
        self.steps.append((one, other, torch.bmm(one, other)))

    def run(self) -> None:
        """Compute them once, into memory that is there."""
        for one, other, out in self.steps:
            torch.bmm(one, other, out=out)


def measure_limit(amount: Amount, device: str, folder: Path) -> Found:
    """Time packs of synthetic rows against their products."""
    del folder
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as a sweep's workers have it
    try:
        programs: dict[Any, Any] = {}
        steps = [
            time_pack(*case, form, device, amount.rounds, programs)
            for form in FORMS
            if form != "compile" or can_compile(device)
            for case in (amount.limit if form == "sweep" else amount.other_forms)
        ]
    finally:
        torch.set_num_threads(before)
    ratios = [step.ratio for step in steps if step.form == "sweep" and step.trials >= 32]
    targets = []
    if ratios and device == "cpu":
        targets.append(Target("step over products, the worst from 32 trials on", max(ratios), 2.0))
    numbers = {"steps": [{**asdict(step), "ratio": step.ratio} for step in steps]}
    return Found(render_limit(steps), numbers, targets)


def can_compile(device: str) -> bool:
    """Whether torch.compile finds a compiler for the device."""
    return device == "cuda" or shutil.which(os.environ.get("CXX", "g++")) is not None


def time_pack(rows: int, trials: int, form: str, device: str, rounds: int, programs: dict[Any, Any]) -> Step:
    """Train a pack for a few epochs, and compute its products in between; the least time of each counts."""
    say(f"limit: batch {rows}, {trials} trials, {form}")
    steps = max(2, min(16, 2**16 // (rows * trials)))
    drawn = torch.Generator().manual_seed(0)
    count = rows * steps
    codes = torch.where(torch.rand(count, generator=drawn) < 0.44, STATUSES.index("censored_above"), 0)
    y = torch.randn(count, generator=drawn)
    split = Split(torch.randn(count, SHAPE[0], generator=drawn), lift_semantic_targets(y, codes), {})
    fixed = {**FIXED, "batch_size": rows, "max_epochs": rounds + 1}
    pack = PackedTrainer(
        [
            PackTrial(TrialConfig(**fixed, learning_rate=1e-4 * (1 + place / trials)), SEED, str(place))
            for place in range(trials)
        ],
        lambda config: make_model(config, SHAPE[0]),
        lambda seed: {"train": split},
        device=device,
        programs=programs,
        **FORMS[form],
    )
    products = Products(trials, rows, device)
    step_us, products_us = [], []
    for epoch in pack.epochs():
        step_us.append(1e3 * epoch.step_ms)
        products_us.append(time_products(products, steps, device) / trials)
    return Step(rows, trials, form, min(step_us[1:]), min(products_us[1:]))


def time_products(products: Products, steps: int, device: str) -> float:
    """The microseconds of a step's products, the mean of so many steps."""
    if device == "cuda":
        torch.cuda.synchronize()
    begun = time.perf_counter()
    for _ in range(steps):
        products.run()
    if device == "cuda":
        torch.cuda.synchronize()
    return 1e6 * (time.perf_counter() - begun) / steps


def render_limit(steps: Sequence[Step]) -> list[str]:
    """The table of the steps, a line for each pack, and their plot."""
    found = {(step.batch_size, step.trials, step.form): step for step in steps}
    own = [step for step in steps if step.form == "sweep"]
    rows = []
    for step in own:
        row = [str(step.batch_size), str(step.trials), f"{step.products_us:.1f}"]
        for form in FORMS:
            timed = found.get((step.batch_size, step.trials, form))
            row += ["", ""] if timed is None else [f"{timed.step_us:.1f}", f"{timed.ratio:.2f}"]
        rows.append(row)
    head = ["batch", "trials", "products us", *(name for form in FORMS for name in (f"{form} us", "ratio"))]
    return [*table(head, rows), *render_plot(own)]


def render_plot(steps: Sequence[Step]) -> list[str]:
    """Ratios from 4 trials on, a line a batch size, as a Mermaid chart; nothing for too few of them."""
    steps = [step for step in steps if step.trials >= 4]
    trials = sorted({step.trials for step in steps})
    batches = sorted({step.batch_size for step in steps})
    found = {(step.batch_size, step.trials): step.ratio for step in steps}
    if len(trials) < 3 or len(found) < len(trials) * len(batches):
        return []
    top = math.ceil(max(found.values()))
    lines = [f"    line [{', '.join(f'{found[batch, k]:.2f}' for k in trials)}]" for batch in batches]
    return [
        "",
        "```mermaid",
        "xychart-beta",
        f'    title "step over its products; from the top: batch {", ".join(map(str, batches))}"',
        f'    x-axis "trials in a pack" [{", ".join(map(str, trials))}]',
        f'    y-axis "ratio" 0 --> {top}',
        *lines,
        "```",
    ]


# --- scale ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Sized:
    """A sweep of `configs`: seconds in all, seconds from its first trial's start on, memory and disk."""

    configs: int
    wall_s: float
    work_s: float
    peak_bytes: int
    disk_bytes: int


def measure_scale(amount: Amount, device: str, folder: Path) -> Found:
    """Sweep ever more configs, each number in a process and a folder of its own."""
    sizes = [configs for configs in amount.scale for _ in range(amount.repeats)]
    runs = [sized_sweep(configs, device, folder) for configs in sizes]
    found = [min((run for run in runs if run.configs == size), key=_work) for size in amount.scale]
    last = found[-1]
    slopes = [
        (two.work_s - one.work_s) / (two.configs - one.configs) for one, two in itertools.pairwise(found)
    ]
    growth = memory_growth(runs)
    targets = [Target("kB on disk a config", last.disk_bytes / last.configs / 1e3, 5.0)]
    if len(slopes) > 1:
        targets += [
            Target("largest over smallest time a further config", spread(slopes), 1.2),
            Target("kB of the driver's memory a config", growth[0] / 1e3, 2.0),
        ]
    numbers = {
        "sweeps": [asdict(one) for one in runs],
        "further_config_s": slopes,
        "driver_bytes_per_config": growth,
    }
    return Found(render_scale(found, slopes, growth), numbers, targets)


def memory_growth(runs: Sequence[Sized]) -> list[float]:
    """Bytes that a config more adds to the driver's peak, from each size but the last to the last."""
    # Of the repeats the least: now and then two packs end together, and one holds the reports of both.
    peaks: dict[int, int] = {}
    for run in runs:
        peaks[run.configs] = min(run.peak_bytes, peaks.get(run.configs, run.peak_bytes))
    *sizes, last = sorted(peaks)
    return [(peaks[last] - peaks[size]) / (last - size) for size in sizes]


def _work(run: Sized) -> float:
    return run.work_s


def spread(values: Sequence[float]) -> float:
    """The largest over the smallest; nan where one is not positive."""
    return max(values) / min(values) if min(values) > 0 else math.nan


def sized_sweep(configs: int, device: str, folder: Path) -> Sized:
    """Run a sweep of so many configs."""
    say(f"scale: {configs} configs")
    plan, out = folder / f"scale{configs}.yaml", folder / f"scale{configs}"
    plan.write_text(json.dumps(make_plan(configs, device)), encoding="utf-8")
    wall_s, said = run_arm("sized", {"plan": str(plan), "out": str(out)}, folder)
    starts = read_rows(out).column("started_at").to_pylist()
    disk_bytes = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    shutil.rmtree(out)
    return Sized(
        configs, wall_s, said["ended"] - min(starts).timestamp(), int(said["peak_bytes"]), disk_bytes
    )


def render_scale(found: Sequence[Sized], slopes: Sequence[float], growth: Sequence[float]) -> list[str]:
    """The table of the sizes, and where the driver's memory grows."""
    rows = [
        [
            str(one.configs),
            f"{one.wall_s:.1f}",
            f"{1e3 * one.wall_s / one.configs:.1f}",
            "" if slope is None else f"{1e3 * slope:.2f}",
            f"{one.peak_bytes / 1e6:.1f}",
            f"{one.disk_bytes / one.configs / 1e3:.2f}",
        ]
        for one, slope in zip(found, [None, *slopes], strict=True)
    ]
    head = ["configs", "wall s", "ms a config", "ms a further config", "driver MB", "disk kB a config"]
    told = ", ".join(f"{kept / 1e3:.1f} from {one.configs}" for one, kept in zip(found, growth, strict=False))
    return [*table(head, rows), "", f"kB that a config adds to the driver's memory: {told}."]


PARTS: Mapping[str, Callable[[Amount, str, Path], Found]] = {
    "throughput": measure_throughput,
    "limit": measure_limit,
    "scale": measure_scale,
}


# --- the command ----------------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table in Markdown that reads well as it is."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [head, ["-" * (width - 1) + ":" for width in widths], *rows]
    return [
        f"| {' | '.join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))} |"
        for line in lines
    ]


def or_null(value: float) -> float | None:
    """The number as a file can hold it."""
    return value if math.isfinite(value) else None


def say(text: str) -> None:
    """Tell how far the benchmark is."""
    print(text, file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; return its exit code."""
    options = _parser().parse_args(argv)
    if options.arm is not None:
        return _run_arm(*options.arm)
    parts = tuple(PARTS) if options.part == "all" else (options.part,)
    if "throughput" in parts and find_spec("zeroproofml") is None:
        print("zeroproofml is not installed: pip install 'scm-harness[peer]'", file=sys.stderr)
        return 2
    amount = AMOUNTS["quick" if options.quick else "full"]
    about = machine(options.device)
    head = ", ".join(f"{name} {value}" for name, value in about.items())
    print(head)
    found: dict[str, Found] = {}
    with tempfile.TemporaryDirectory(prefix="scm-bench-") as folder:
        try:
            for part in parts:
                found[part] = PARTS[part](amount, options.device, Path(folder))
                print("\n" + "\n".join(found[part].markdown(part)), flush=True)
        except NotMeasuredError as error:
            print(error, file=sys.stderr)
            return 2
    if options.markdown is not None:
        told = [line for part, one in found.items() for line in ["", *one.markdown(part)]]
        title = "# What `python benchmarks/sweep_throughput.py` measured"
        options.markdown.write_text("\n".join([title, "", head, *told]) + "\n", encoding="utf-8")
    if options.json is not None:
        payload = {
            **about,
            **{
                part: {**one.numbers, "targets": [target.plain() for target in one.targets]}
                for part, one in found.items()
            },
        }
        options.json.write_text(json.dumps(payload, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return 0 if all(target.met for one in found.values() for target in one.targets) else 1


def machine(device: str) -> dict[str, Any]:
    """What the numbers were measured on."""
    return {
        "torch": torch.__version__,
        "ray": version("ray") if find_spec("ray") else "none",
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
    }


def _run_arm(arm: str, asked: str, said: str) -> int:
    warnings.simplefilter("ignore", DeprecationWarning)  # the peer's package, on its own modules
    made = ARMS[arm](json.loads(Path(asked).read_text(encoding="utf-8")))
    Path(said).write_text(json.dumps(made), encoding="utf-8")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="few configs and sizes: a check, not a measurement"
    )
    parser.add_argument("--part", choices=(*PARTS, "all"), default="all", help="what to measure")
    parser.add_argument(
        "--device", type=_device, default="cpu", help="cpu (the default), or cuda, which must be there"
    )
    parser.add_argument("--json", type=file_to_write, help="write the numbers to this file as well")
    parser.add_argument("--markdown", type=file_to_write, help="write the tables to this file as well")
    # How the benchmark starts an arm in a process of its own: its name, a file to read, a file to write.
    parser.add_argument("--arm", nargs=3, help=argparse.SUPPRESS)
    return parser


def _device(text: str) -> str:
    if text not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"must be cpu or cuda, got {text!r}")
    if text == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("there is no cuda here")
    return text


if __name__ == "__main__":
    raise SystemExit(main())
