"""The confirmed default against the best of a sweep: regret on fresh seeds, and whether its figure is true.

A sweep trains 24 configs with two seeds each. "Naive" takes the config with the lowest mean validation error
of the sweep and reports that error. "Confirmed" is what `scm-harness defaults` does with the same sweep, by
the very functions of `harness.defaults.decide`: the best five and the current default on fresh seeds and a
second scenario, neighbours, confirmation, report. Where that keeps the current default, its regret is that of
the current default.

    flat    sixteen of 24 configs within 1 % of the best, the others 10 % to 60 % worse; every seed shifts a
            training by 4 %, every split of the data by another 2 %. The current default is any of them
    cliff   configs along one knob; the error falls by 3 % a step towards an edge, beyond which it is six
            times as large. Where the edge lies differs from seed to seed: the best config on most seeds falls
            off on one of eight. The current default is some steps from the edge
    dose    the task of that name: errors of 24 configs, drawn from a space, trained in packs with 20 seeds or
            more on two draws of the data, once; repetitions draw seeds from this table, which is the truth.
            The current default is that of the project

Regret is the mean over scenarios of the logarithm of the test error over that of the best config, each the
mean over all seeds there are; the figure is the median over seeds. Two regrets that differ by less than the
decision's own tie margin (1 % of the error) count as equal: what ties stays as it is, on purpose.

    python benchmarks/defaults_regret.py --quick     under a minute on two cores
    python benchmarks/defaults_regret.py             40 seeds and longer trainings for the table

Targets, on each: the regret of the confirmed default is no larger than that of the naive one in at least 95 %
of 200 repetitions; the 90 % interval of the figure that is reported with it holds the truth in at least 90 %.

Exits 1 when a target is missed, 2 for arguments that cannot be right, 130 when interrupted.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from benchmark_arguments import file_to_write, positive

from harness.defaults import session
from harness.defaults.decide import STEP, Rules, choose, confirm, figure, on_cliff, scores_of
from reports.metrics import parse_metric

Floats = npt.NDArray[np.float64]
CONFIGS, SCENARIOS, SWEEP_SEEDS, TOP = 24, ("first", "second"), 2, 5
REPETITIONS = 200
NO_LARGER, COVERED = 0.95, 0.90
ERROR = parse_metric("charged_error")


class Landscape(Protocol):
    """Configs with known errors. `draw` trains them: errors (configs, scenarios, seeds) on both splits."""

    name: str

    def new(self, rng: np.random.Generator) -> None: ...

    def draw(self, configs: Sequence[int], seeds: int, rng: np.random.Generator) -> tuple[Floats, Floats]: ...

    def current(self, rng: np.random.Generator) -> int: ...

    def neighbours(self, config: int) -> list[int]: ...

    @property
    def truth(self) -> Floats:
        """Mean test errors (configs, scenarios)."""
        ...

    @property
    def log_truth(self) -> Floats:
        """Means of the logarithm of test errors (configs, scenarios)."""
        ...

    @property
    def median(self) -> Floats:
        """Medians of test errors (configs, scenarios)."""
        ...


class Flat:
    """Many near-ties, and noise that is larger than what lies between them."""

    name = "flat"
    seed_noise, split_noise = 0.04, 0.02

    def new(self, rng: np.random.Generator) -> None:
        """Draw other errors."""
        close, far = rng.uniform(0.0, 0.01, 16), rng.uniform(0.1, 0.6, CONFIGS - 16)
        self._log = rng.permutation(np.concatenate([close, far]))[:, None] + np.array([0.0, 1.0])
        self._order = np.arange(CONFIGS)

    def draw(self, configs: Sequence[int], seeds: int, rng: np.random.Generator) -> tuple[Floats, Floats]:
        """Errors with the noise of a seed, which both splits share, and that of each split."""
        shape = (len(configs), len(SCENARIOS), seeds)
        trained = self._log[list(configs)][:, :, None] + rng.normal(0.0, self.seed_noise, shape)
        val, test = (trained + rng.normal(0.0, self.split_noise, shape) for _ in range(2))
        return np.exp(val), np.exp(test)

    def current(self, rng: np.random.Generator) -> int:
        """Any of them."""
        return int(rng.integers(CONFIGS))

    def neighbours(self, config: int) -> list[int]:
        """None: the configs are in no order."""
        return []

    @property
    def truth(self) -> Floats:
        """Of errors that are the exponential of a normal variable."""
        return np.exp(self._log + 0.5 * (self.seed_noise**2 + self.split_noise**2))

    @property
    def log_truth(self) -> Floats:
        """What they were drawn around."""
        return self._log

    @property
    def median(self) -> Floats:
        """That of the exponential of a normal variable."""
        return np.exp(self._log)


class Cliff:
    """One knob with an edge that is not at the same place for every seed."""

    name = "cliff"
    seed_noise, split_noise = 0.02, 0.01
    slope, fall = 0.03, math.log(6.0)

    def new(self, rng: np.random.Generator) -> None:
        """Put the edge elsewhere."""
        self._edge = int(rng.integers(8, CONFIGS - 2))  # the last config that mostly stands
        below = self._edge - np.arange(CONFIGS)
        self._log = np.where(below >= 0, self.slope * below, 0.0)[:, None] + np.array([0.0, -0.5])
        # Beyond the edge all fall; on it one training of eight does, before it none.
        self._falls = np.select([below < 0, below == 0, below == 1], [1.0, 0.125, 0.0], 0.0)

    def draw(self, configs: Sequence[int], seeds: int, rng: np.random.Generator) -> tuple[Floats, Floats]:
        """A training falls or stands as a whole: both of its splits do."""
        shape = (len(configs), len(SCENARIOS), seeds)
        fallen = rng.random(shape) < self._falls[list(configs)][:, None, None]
        trained = self._log[list(configs)][:, :, None] + rng.normal(0.0, self.seed_noise, shape)
        trained = trained + self.fall * fallen
        val, test = (trained + rng.normal(0.0, self.split_noise, shape) for _ in range(2))
        return np.exp(val), np.exp(test)

    def current(self, rng: np.random.Generator) -> int:
        """Somewhere on the safe side, some steps from the edge."""
        return self._edge - int(rng.integers(1, 8))

    def neighbours(self, config: int) -> list[int]:
        """One step to either side."""
        return [near for near in (config - 1, config + 1) if 0 <= near < CONFIGS]

    @property
    def truth(self) -> Floats:
        """With the share of trainings that fall."""
        risen = 1.0 + self._falls[:, None] * (math.exp(self.fall) - 1.0)
        return np.exp(self._log + 0.5 * (self.seed_noise**2 + self.split_noise**2)) * risen

    @property
    def log_truth(self) -> Floats:
        """With the share of trainings that fall."""
        return self._log + self.fall * self._falls[:, None]

    @property
    def median(self) -> Floats:
        """Of those that stand, as much higher as some fall; where all fall, of those."""
        stand = np.where(self._falls < 1.0, 1.0 - self._falls, 1.0)
        noise = math.hypot(self.seed_noise, self.split_noise)
        moved = np.array([NormalDist(0.0, noise).inv_cdf(0.5 / share) for share in stand])
        return np.exp(self._log + (moved + self.fall * (self._falls == 1.0))[:, None])


class Table:
    """Recorded errors: a training is a draw from those with the same config and scenario."""

    name = "dose"

    def __init__(self, val: Floats, test: Floats) -> None:
        self._val, self._test = val, test  # (configs, scenarios, seeds)

    def new(self, rng: np.random.Generator) -> None:
        """The table stays as it is."""

    def draw(self, configs: Sequence[int], seeds: int, rng: np.random.Generator) -> tuple[Floats, Floats]:
        """The same recorded seeds for every config, as paired trainings have."""
        places = rng.integers(self._val.shape[2], size=(len(SCENARIOS), seeds))
        rows = list(configs)
        val, test = (
            np.stack([held[rows, which][:, places[which]] for which in range(len(SCENARIOS))], axis=1)
            for held in (self._val, self._test)
        )
        return val, test

    def current(self, rng: np.random.Generator) -> int:
        """The project's default stands first."""
        return 0

    def neighbours(self, config: int) -> list[int]:
        """None were recorded."""
        return []

    @property
    def truth(self) -> Floats:
        """Means over the recorded seeds."""
        return np.asarray(self._test.mean(axis=2))

    @property
    def log_truth(self) -> Floats:
        """Means of the logarithm over the recorded seeds."""
        return np.asarray(np.log(self._test).mean(axis=2))

    @property
    def median(self) -> Floats:
        """Of the recorded seeds, which are all there are."""
        return np.asarray(np.median(self._test, axis=2))


@dataclass(frozen=True, slots=True)
class Repetition:
    """One sweep and what both made of it."""

    naive_regret: float
    confirmed_regret: float
    kept: bool
    covered: tuple[bool, ...]
    bias: float
    naive_bias: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of all repetitions on one landscape; regrets and biases as shares of the error."""

    landscape: str
    repetitions: int
    no_larger: float
    smaller: float
    covered: float
    kept: float
    naive_regret: float
    confirmed_regret: float
    naive_bias: float
    confirmed_bias: float

    @property
    def met(self) -> bool:
        """Whether both targets are met."""
        return self.no_larger >= NO_LARGER and self.covered >= COVERED


def repeat(landscape: Landscape, rng: np.random.Generator, seeds: int, rules: Rules) -> Repetition:
    """Sweep, choose both ways, and hold both against the truth."""
    landscape.new(rng)
    current = landscape.current(rng)
    swept, _ = landscape.draw(range(CONFIGS), SWEEP_SEEDS, rng)
    swept_mean = swept[:, 0].mean(axis=1)  # the run is a sweep of one scenario
    naive = int(swept_mean.argmin())
    picked = confirmed(landscape, swept_mean, current, rng, seeds, rules)
    _, test = landscape.draw([picked], seeds, rng)
    told = [figure(test[0, which], level=rules.level) for which in range(len(SCENARIOS))]
    truth, regret = landscape.truth, (landscape.log_truth - landscape.log_truth.min(axis=0)).mean(axis=1)
    best, median = regret.min(), landscape.median[picked]
    return Repetition(
        naive_regret=float(regret[naive] - best),
        confirmed_regret=float(regret[picked] - best),
        kept=picked == current,
        covered=tuple(one.low <= median[which] <= one.high for which, one in enumerate(told)),
        bias=float(np.mean([one.median / median[which] for which, one in enumerate(told)])) - 1.0,
        naive_bias=float(swept_mean[naive] / truth[naive, 0]) - 1.0,
    )


def confirmed(
    landscape: Landscape,
    swept_mean: Floats,
    current: int,
    rng: np.random.Generator,
    seeds: int,
    rules: Rules,
) -> int:
    """What the session does, with draws in place of trainings."""
    best = [int(index) for index in np.argsort(swept_mean, kind="stable") if index != current][:TOP]
    held = [current, *best]
    val, _ = landscape.draw(held, session.CHOICE_SEEDS, rng)
    scenarios = np.repeat(SCENARIOS, session.CHOICE_SEEDS).tolist()
    scores = scores_of(_blocks(val), scenarios, ERROR, 0)
    choice = choose(
        scores,
        scenarios,
        current=0,
        eligible=np.ones(len(held), dtype=bool),
        prior=[float(swept_mean[index]) for index in held],
        cost=[(0.0,)] * len(held),
        rules=rules,
    )
    for index in choice.challengers[: session.CHALLENGERS]:
        if not _stands_on_cliff(landscape, held[index], val[index, 0], rng, rules):
            return held[index] if takes_over(landscape, current, held[index], rng, seeds, rules) else current
    return current


def takes_over(
    landscape: Landscape, current: int, candidate: int, rng: np.random.Generator, seeds: int, rules: Rules
) -> bool:
    """Look once, twice, three times, each time at more seeds, until it is decided."""
    drawn = np.empty((2, len(SCENARIOS), 0))
    for look in rules.looks:
        more, _ = landscape.draw([current, candidate], look * seeds - drawn.shape[2], rng)
        drawn = np.concatenate([drawn, more], axis=2)
        scores = scores_of(_blocks(drawn), np.repeat(SCENARIOS, drawn.shape[2]).tolist(), ERROR, 0)
        confirmation = confirm(scores[0], scores[1], rules=rules)
        if not confirmation.open:
            break
    return confirmation.change


def _stands_on_cliff(
    landscape: Landscape, config: int, own: Floats, rng: np.random.Generator, rules: Rules
) -> bool:
    near = landscape.neighbours(config)
    if not near:
        return False
    val, _ = landscape.draw(near, session.NEIGHBOUR_SEEDS, rng)
    covered, worth = np.ones(session.NEIGHBOUR_SEEDS), np.zeros(session.NEIGHBOUR_SEEDS, dtype=bool)
    return any(
        on_cliff(
            np.log(own),
            np.log(val[place, 0]),
            kind=STEP,
            broken="",
            worthless=worth,
            own_worthless=worth,
            coverage=covered,
            own_coverage=covered,
            rules=rules,
        )
        for place in range(len(near))
    )


def _blocks(values: Floats) -> Floats:
    """(configs, scenarios, seeds) as (configs, blocks), the blocks scenario by scenario."""
    return values.reshape(len(values), -1)


def run_landscape(landscape: Landscape, repetitions: int, seeds: int, seed: int) -> Outcome:
    """Repeat, and sum up."""
    rng, rules = np.random.default_rng(seed), Rules()
    found = [repeat(landscape, rng, seeds, rules) for _ in range(repetitions)]
    apart = np.array([one.confirmed_regret - one.naive_regret for one in found])
    margin = rules.tie_margin

    def mean(of: Callable[[Repetition], float]) -> float:
        return float(np.mean([of(one) for one in found]))

    return Outcome(
        landscape=landscape.name,
        repetitions=repetitions,
        no_larger=float((apart <= margin).mean()),
        smaller=float((apart < -margin).mean()),
        covered=mean(lambda one: float(np.mean(one.covered))),
        kept=mean(lambda one: float(one.kept)),
        naive_regret=mean(lambda one: one.naive_regret),
        confirmed_regret=mean(lambda one: one.confirmed_regret),
        naive_bias=mean(lambda one: one.naive_bias),
        confirmed_bias=mean(lambda one: one.bias),
    )


# --- the table of the dose task ----------------------------------------------------------------------


def make_table(folder: Path, seeds: int, rows: int, epochs: int) -> tuple[Floats, Floats, float]:
    """Train the table, or read what an earlier call left in the folder; returns also the seconds it took."""
    path = folder / f"dose-{CONFIGS}x{len(SCENARIOS)}x{seeds}-{rows}rows-{epochs}epochs.npz"
    if path.is_file():
        with np.load(path, allow_pickle=False) as held:
            return held["val"], held["test"], 0.0
    started = time.perf_counter()
    val, test = _train_table(seeds, rows, epochs)
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, val=val, test=test)
    return val, test, time.perf_counter() - started


def _train_table(seeds: int, rows: int, epochs: int) -> tuple[Floats, Floats]:
    from harness.defaults.confirm import Bench, measure
    from harness.defaults.scenarios import Scenario

    configs = dose_configs(epochs)
    names = {f"config{index:02d}": config for index, config in enumerate(configs)}
    params = {"n_train": rows, "n_val": rows, "n_test": 2 * rows}
    scenarios = [
        Scenario(name, {"name": "dose", "params": {**params, "data_seed": place}, "base_dir": "."}, "")
        for place, name in enumerate(SCENARIOS)
    ]
    measured = measure(names, scenarios, range(seeds), bench=Bench("cpu", _quiet), what="dose")
    shape = (CONFIGS, len(SCENARIOS), seeds)
    val, test = (measured.figures(name).reshape(shape) for name in ("charged_error", "test_charged_error"))
    return val, test


def dose_configs(epochs: int) -> list[dict[str, Any]]:
    """The project's default first, then a Sobol sequence of a space around what the task suggests."""
    from search_spaces.domains import Choice, Float
    from search_spaces.space import Space
    from trainables.configs import resolve_config
    from trainables.tasks.dose import SUGGESTED

    space = Space(
        "around",
        {
            "learning_rate": Float(1e-3, 3e-2, log=True),
            "lambda_sign": Float(1.0, 20.0, log=True),
            "lambda_margin": Float(1e-3, 1.0, log=True),
            "tau_infer": Float(0.05, 0.45),
            "weight_decay": Float(1e-6, 1e-2, log=True),
            "batch_size": Choice((64,)),
        },
    )
    from scipy.stats import qmc

    points = qmc.Sobol(len(space.dimensions), seed=0).random(32)[: CONFIGS - 1]
    configs = [resolve_config({"max_epochs": epochs, "batch_size": 64})]
    for point in points:
        drawn = space.sample(point.tolist())
        thresholds = {"tau_train_min": drawn["tau_infer"], "tau_train_max": drawn["tau_infer"]}
        configs.append(resolve_config({**SUGGESTED, **drawn, **thresholds, "max_epochs": epochs}))
    return configs


def _quiet(text: str) -> None:
    return None


# --- the command -------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Run all landscapes, print the table, say which targets were missed."""
    parser = argparse.ArgumentParser(description="The confirmed default against the best of a sweep.")
    parser.add_argument("--quick", action="store_true", help="a smaller table of the dose task")
    parser.add_argument("--repetitions", type=positive, default=REPETITIONS)
    parser.add_argument("--table", type=Path, metavar="FOLDER", help="keep the table of the dose task here")
    parser.add_argument("--json", type=file_to_write, metavar="PATH")
    options = parser.parse_args(argv)
    started = time.perf_counter()
    size = (
        {"seeds": 20, "rows": 1500, "epochs": 12}
        if options.quick
        else {"seeds": 40, "rows": 3000, "epochs": 20}
    )
    with tempfile.TemporaryDirectory() as temporary:
        val, test, trained_s = make_table(options.table or Path(temporary), **size)
    landscapes: list[Landscape] = [Flat(), Cliff(), Table(val, test)]
    outcomes = [
        run_landscape(landscape, options.repetitions, seeds=10, seed=place)
        for place, landscape in enumerate(landscapes)
    ]
    print(f"{CONFIGS * len(SCENARIOS) * size['seeds']} trainings of dose in {trained_s:.0f} s")
    print(
        "landscape  regret: no larger  smaller   naive  confirmed   default kept   "
        "figure: truth covered  bias  naive bias"
    )
    for one in outcomes:
        print(
            f"{one.landscape:<9}  {one.no_larger:>17.1%} {one.smaller:>8.1%} {one.naive_regret:>7.2%} "
            f"{one.confirmed_regret:>10.2%} {one.kept:>14.0%} {one.covered:>23.1%} "
            f"{one.confirmed_bias:>+6.2%} {one.naive_bias:>+11.2%}  {'ok' if one.met else 'MISSED'}"
        )
    print(
        f"targets: no larger in {NO_LARGER:.0%}, truth covered in {COVERED:.0%} of {options.repetitions} "
        f"repetitions; {time.perf_counter() - started:.0f} s"
    )
    if options.json is not None:
        options.json.write_text(
            json.dumps([asdict(one) | {"met": one.met} for one in outcomes], indent=2) + "\n"
        )
    return 0 if all(one.met for one in outcomes) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
