"""Measuring for a default: configs trained on (scenario, seed) blocks, and their step times, interleaved.

Which configs, seeds and scenarios, and what is made of the figures, is decided elsewhere.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch

from harness.defaults.decide import Bools, Floats
from harness.defaults.scenarios import Scenario
from search_spaces.identity import trial_id
from trainables.configs import parse_config
from trainables.loading import load_task
from trainables.packed_trial import Shelf
from trainables.step_timing import time_parts
from trainables.trained import Trained, train_models

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Measured:
    """What configs came to in blocks: outcomes by (config, block), in the order of `configs` and `blocks`."""

    configs: tuple[str, ...]
    blocks: tuple[tuple[str, int], ...]
    outcomes: Mapping[tuple[str, str, int], Mapping[str, Any]]

    @property
    def scenarios(self) -> list[str]:
        """The scenario of each block."""
        return [scenario for scenario, _ in self.blocks]

    @property
    def seeds(self) -> list[int]:
        """The seeds of all blocks, each once."""
        return list(dict.fromkeys(seed for _, seed in self.blocks))

    def joined(self, more: Measured) -> Measured:
        """These and further blocks of the same configs."""
        return Measured(self.configs, (*self.blocks, *more.blocks), {**self.outcomes, **more.outcomes})

    def figures(self, name: str) -> Floats:
        """One column of the outcomes, (configs, blocks), NaN where it is missing."""
        return np.array(
            [
                [_number(self.outcome(config, block).get(name)) for block in self.blocks]
                for config in self.configs
            ]
        )

    def outcome(self, config: str, block: tuple[str, int]) -> Mapping[str, Any]:
        """How one config's trial of one block ended."""
        return self.outcomes[(config, *block)]

    def trouble(self, config: str, needed: Sequence[str]) -> str:
        """Which constraints a config broke in which blocks; empty where it broke none.

        A trial must have ended well, have met no non-finite value, and have a finite figure for each metric
        of `needed`.
        """
        broken: dict[str, list[str]] = {}
        for scenario, seed in self.blocks:
            problem = _trouble(self.outcome(config, (scenario, seed)), needed)
            if problem:
                broken.setdefault(problem, []).append(f"{scenario} seed {seed}")
        return "; ".join(f"{problem} ({_some(places)})" for problem, places in broken.items())

    def worthless(self, prefix: str = "") -> Bools:
        """Where a config is no better than abstaining everywhere, (configs, blocks); False where unknown."""
        charged, trivial = self.figures(f"{prefix}charged_error"), self.figures(f"{prefix}trivial_error")
        with np.errstate(invalid="ignore"):
            return np.asarray(charged >= trivial) & np.isfinite(trivial)


@dataclass(frozen=True, slots=True)
class Bench:
    """Where trainings run, whom to tell of them, and what is kept of each scenario's task between them."""

    device: str
    say: Say
    shelves: dict[str, Shelf] = field(default_factory=dict)

    def shelf(self, scenario: Scenario) -> Shelf:
        """What is kept of a scenario's task: traced programs, which change nothing that comes out."""
        return self.shelves.setdefault(scenario.name, Shelf())


def measure(
    configs: Mapping[str, Mapping[str, Any]],
    scenarios: Sequence[Scenario],
    seeds: Sequence[int],
    *,
    bench: Bench,
    what: str,
) -> Measured:
    """Train every config with every seed on every scenario, as packs where they can be; no model is kept."""
    outcomes: dict[tuple[str, str, int], Mapping[str, Any]] = {}
    for scenario in scenarios:
        trials = [(trial_id(name, seed), config, seed) for name, config in configs.items() for seed in seeds]
        text = f"{what}: {len(trials)} trainings on {scenario.name}"
        bench.say(text)
        with one_thread():
            ended = train_models(
                scenario.spec,
                trials,
                device=bench.device,
                on_epoch=partial(bench.say, text),
                shelf=bench.shelf(scenario),
            )
        for name in configs:
            for seed in seeds:
                one = ended[trial_id(name, seed)]
                outcomes[name, scenario.name, seed] = one.outcome if isinstance(one, Trained) else one
    blocks = tuple((scenario.name, seed) for scenario in scenarios for seed in seeds)
    return Measured(tuple(configs), blocks, outcomes)


def measure_step_times(
    configs: Mapping[str, Mapping[str, Any]],
    scenario: Scenario,
    seed: int,
    *,
    rounds: int,
    bench: Bench,
) -> dict[str, Floats]:
    """The step time of each config alone, in ms, once a round: brief trainings of all, in a new order each.

    What slows the machine down for a while then slows all of them alike. NaN where a training raises.
    """
    loaded = load_task(scenario.spec, seed)
    order = random.Random(seed)
    times: dict[str, list[float]] = {name: [] for name in configs}
    names = list(configs)
    with one_thread():
        for number in range(rounds):
            bench.say(f"step times: round {number + 1} of {rounds}")
            order.shuffle(names)
            for name in names:
                config, _ = parse_config(configs[name])
                parts = time_parts(loaded.task, config, seed, loaded.splits["train"], bench.device)
                times[name].append(sum(parts))
    return {name: np.array(found) for name, found in times.items()}


@contextmanager
def one_thread() -> Iterator[None]:
    """Train as a sweep's workers do: with one thread sums are rounded alike, and step times compare."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _trouble(outcome: Mapping[str, Any], needed: Sequence[str]) -> str:
    if outcome["status"] == "failed":
        return f"a training failed: {outcome['error'] or 'it gave no reason'}"
    if outcome["status"] == "diverged":
        return f"a training diverged: {outcome['stop_reason'] or outcome['nan_origin']}"
    if outcome["nan_count"]:
        origin = f" ({outcome['nan_origin']})" if outcome.get("nan_origin") else ""
        return f"non-finite values were met{origin}"
    lacking = [name for name in needed if not math.isfinite(_number(outcome.get(name)))]
    return f"without a finite {', '.join(lacking)}" if lacking else ""


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def _some(places: list[str]) -> str:
    return ", ".join(places[:3]) + (f" and {len(places) - 3} more" if len(places) > 3 else "")
