"""The searchers that learn: TPE and NSGA-II of Optuna, asked and told directly, in memory.

Optuna sees coordinates, not values: one in [0, 1] per range and one category per choice, asked for as the
space is walked, so conditions are define-by-run and every order between values holds (`Space.assemble`).
Every result is told as a finite number (`harness.objectives`), never as failed and never left running.

TPE spends half its mass beyond the edge of a region where training diverges when the best configs lie at that
edge. A proposal whose nearest neighbours mostly gave no feasible result is therefore withdrawn and another is
asked for, a few times; the least suspicious is taken in the end, so no region is closed for good.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence

import numpy as np
import optuna

from harness.objectives import SCALARISATIONS, Objective, told_scalar, told_values
from harness.search import DEFAULT_BATCH, DRAWS_BEFORE_EXHAUSTED, Searcher, check_settings, sobol_points
from search_spaces.domains import Choice
from search_spaces.errors import nearest_hint
from search_spaces.identity import config_id
from search_spaces.space import Config, Space

STARTUP_CONFIGS = 10
NEIGHBOURS = 5
PROPOSALS_PER_CONFIG = 8

Coordinates = dict[str, float]


class OptunaSearcher(Searcher):
    """What TPE and NSGA-II share: the study, a Sobol start, and how proposals are judged."""

    learns = True

    def __init__(
        self,
        space: Space,
        count: int,
        *,
        seed: int,
        batch: int,
        sampler: optuna.samplers.BaseSampler,
        objectives: int,
        startup: int,
    ) -> None:
        super().__init__(space, count, seed=seed, batch=batch)
        # Optuna logs each independently drawn conditional knob as a warning; that is how such knobs are
        # drawn.
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._study = optuna.create_study(directions=["minimize"] * objectives, sampler=sampler)
        self._startup = startup
        self._objectives = objectives if objectives > 1 else None  # one number is made of any
        self._sobol = sobol_points(len(space.dimensions), seed)
        self._generator = np.random.Generator(np.random.PCG64([seed, 1]))
        self._trials: dict[str, optuna.Trial] = {}
        self._coordinates: dict[str, Coordinates] = {}
        self._suspect: dict[str, bool] = {}  # results so far: config_id -> cannot be ranked

    def _check(self, objective: Objective) -> None:
        if self._objectives is not None and len(objective.values) != self._objectives:
            raise ValueError(f"an objective must have {self._objectives} values, got {objective.values}")

    @abstractmethod
    def _told(self, objective: Objective) -> Sequence[float]:
        """What the study is told: finite numbers, one per direction."""

    def _draw(self) -> Iterator[Config]:
        while True:
            config = (
                self._from_points(self._sobol) if len(self.drawn) < self._startup else self._from_sampler()
            )
            if config is None:
                config = self._from_points(self._random_points())
            if config is None:
                return
            yield config

    def _learn(self, results: list[tuple[str, Objective]]) -> None:
        for identity, objective in results:
            self._study.tell(self._trials.pop(identity), list(self._told(objective)))
            self._suspect[identity] = not objective.feasible

    def _from_points(self, points: Iterator[list[float]]) -> Config | None:
        """The config at the next point whose config is new; None when too many in a row were known."""
        for _ in range(DRAWS_BEFORE_EXHAUSTED):
            point = dict(zip(self.space.dimensions, next(points), strict=True))
            if config_id(self.space.assemble(point.__getitem__)) in self.drawn:
                continue
            self._study.enqueue_trial({knob: self._parameter(knob, u) for knob, u in point.items()})
            trial = self._study.ask()
            coordinates: Coordinates = {}
            config = self._walk(trial, coordinates)
            if (
                config_id(config) in self.drawn
            ):  # a coordinate at the edge of a choice was rounded to its centre
                self._withdraw(trial)
                continue
            return self._keep(trial, config, coordinates)
        return None

    def _from_sampler(self) -> Config | None:
        """The least suspicious of the sampler's next proposals; None when all were known."""
        best: tuple[float, optuna.Trial, Config, Coordinates] | None = None
        for _ in range(PROPOSALS_PER_CONFIG):
            trial = self._study.ask()
            coordinates: Coordinates = {}
            config = self._walk(trial, coordinates)
            share = self._suspicion(coordinates)
            if config_id(config) in self.drawn or (best is not None and share >= best[0]):
                self._withdraw(trial)
                continue
            if best is not None:
                self._withdraw(best[1])
            best = (share, trial, config, coordinates)
            if share < 0.5:
                break
        return None if best is None else self._keep(*best[1:])

    def _keep(self, trial: optuna.Trial, config: Config, coordinates: Coordinates) -> Config:
        self._trials[config_id(config)] = trial
        self._coordinates[config_id(config)] = coordinates
        return config

    def _withdraw(self, trial: optuna.Trial) -> None:
        """Forget a proposal that is not tried: Optuna's samplers pass over failed trials."""
        self._study.tell(trial, state=optuna.trial.TrialState.FAIL)

    def _walk(self, trial: optuna.Trial, coordinates: Coordinates) -> Config:
        def coordinate(knob: str) -> float:
            domain = self.space.domains[knob]
            if isinstance(domain, Choice):
                categories = len(domain.options)
                u = (trial.suggest_categorical(knob, list(range(categories))) + 0.5) / categories
            else:
                u = trial.suggest_float(knob, 0.0, 1.0)
            coordinates[knob] = u
            return u

        return self.space.assemble(coordinate)

    def _parameter(self, knob: str, u: float) -> float | int:
        domain = self.space.domains[knob]
        if isinstance(domain, Choice):
            return min(int(u * len(domain.options)), len(domain.options) - 1)
        return u

    def _suspicion(self, coordinates: Coordinates) -> float:
        """The share of the nearest configs tried that cannot be ranked; 0 before there are enough."""
        if len(self._suspect) < NEIGHBOURS or not any(self._suspect.values()):
            return 0.0
        near = sorted(self._suspect, key=lambda identity: (self._distance(coordinates, identity), identity))
        return sum(self._suspect[identity] for identity in near[:NEIGHBOURS]) / NEIGHBOURS

    def _distance(self, coordinates: Coordinates, identity: str) -> float:
        other = self._coordinates[identity]
        square = 0.0
        for knob in self.space.dimensions:
            here, there = coordinates.get(knob), other.get(knob)
            if here is None or there is None:
                square += here is not there
            elif isinstance(self.space.domains[knob], Choice):
                square += here != there
            else:
                square += (here - there) ** 2
        return square

    def _random_points(self) -> Iterator[list[float]]:
        while True:
            yield self._generator.random(len(self.space.dimensions)).tolist()


class TPESearcher(OptunaSearcher):
    """Tree-structured Parzen estimator on one number per config.

    `scalarisation` names how an objective becomes that number. The default, "lexicographic", is coverage
    shortfall in steps of 0.05 first and the squashed error second: TPE reads only the order of what it is
    told, and this order does not depend on the unit of the error. "weighted" adds 10 times the shortfall to
    the error's logarithm; "total" sums objectives that hold no shortfall. Results that are not finite come
    after all others.
    """

    def __init__(
        self,
        space: Space,
        count: int,
        *,
        seed: int = 0,
        batch: int = DEFAULT_BATCH,
        scalarisation: str = "lexicographic",
        startup: int = STARTUP_CONFIGS,
    ) -> None:
        check_settings(count=count, seed=seed, batch=batch)
        if scalarisation not in SCALARISATIONS:
            hint = nearest_hint(scalarisation, SCALARISATIONS)
            raise ValueError(f"unknown scalarisation {scalarisation!r} {hint}")
        if startup < 1:
            raise ValueError(f"startup must be >= 1, got {startup=}")
        self._scalarise = SCALARISATIONS[scalarisation]
        # The first batch is drawn before anything is known: all of it belongs to the startup.
        startup = max(startup, batch)
        sampler = optuna.samplers.TPESampler(seed=seed, multivariate=True, n_startup_trials=startup)
        super().__init__(space, count, seed=seed, batch=batch, sampler=sampler, objectives=1, startup=startup)

    def _told(self, objective: Objective) -> Sequence[float]:
        return (told_scalar(objective, self._scalarise),)


class NSGA2Searcher(OptunaSearcher):
    """NSGA-II on all objectives of a config; a batch is a generation (of 2 configs at least).

    `objectives` is the number of values that an `Objective` holds.
    """

    def __init__(
        self, space: Space, count: int, *, seed: int = 0, batch: int = DEFAULT_BATCH, objectives: int = 2
    ) -> None:
        check_settings(count=count, seed=seed, batch=batch)
        if objectives < 2:
            raise ValueError(f"objectives must be >= 2 for nsga2, got {objectives=}")
        population = max(2, batch)
        sampler = optuna.samplers.NSGAIISampler(seed=seed, population_size=population)
        super().__init__(
            space, count, seed=seed, batch=batch, sampler=sampler, objectives=objectives, startup=population
        )

    def _told(self, objective: Objective) -> Sequence[float]:
        return told_values(objective)
