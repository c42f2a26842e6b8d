"""Where configs come from: searchers that draw a batch, are told what came of it, and draw the next.

A searcher goes by generations. `next_batch` gives configs that were never given before; a searcher that
learns waits for the results of all of them, so what it draws depends on its seed and on the results alone,
never on which trial ended first. A sweep is resumed by telling a new searcher the stored results.
How results become objectives is decided in `harness.objectives`, what may be drawn in `search_spaces`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import ClassVar

import numpy as np

from harness.objectives import Objective
from search_spaces.errors import nearest_hint
from search_spaces.identity import config_id
from search_spaces.space import Config, Space

DEFAULT_BATCH = 8
DEFAULT_POINTS_PER_RANGE = 3

# So many draws in a row that are all known say that the space has no more to give.
DRAWS_BEFORE_EXHAUSTED = 200


class Searcher(ABC):
    """Draws at most `count` different configs, `batch` at a time; deterministic in seed and results."""

    #: Whether the next batch depends on the results of the last, so that it cannot be drawn before.
    learns: ClassVar[bool] = False

    def __init__(self, space: Space, count: int, *, seed: int = 0, batch: int = DEFAULT_BATCH) -> None:
        check_settings(count=count, seed=seed, batch=batch)
        self.space = space
        self.count = count
        self.seed = seed
        self.batch = batch
        self.cohort = -1
        """The number of the batch that was drawn last, from 0."""
        self.drawn: dict[str, None] = {}
        """The id of every config given so far, in the order in which they were given."""
        self._open: dict[str, None] = {}  # of those, the ones whose results are awaited, to learn from them
        self._results: dict[str, Objective] = {}

    def next_batch(self) -> list[Config]:
        """New configs, none of them given before; empty when `count` were given or the space has no more.

        Raises ValueError where the searcher learns and results of the last batch are missing.
        """
        if self._open:
            raise ValueError(
                f"all results must be told before the next batch, missing {', '.join(self._open)}"
            )
        wanted = min(self.batch, self.count - len(self.drawn))
        batch = []
        for identity, config in islice(self._draw_new(), max(0, wanted)):
            self.drawn[identity] = None
            if self.learns:
                self._open[identity] = None
            batch.append(config)
        self.cohort += bool(batch)
        return batch

    def tell(self, results: Iterable[tuple[str, Objective]]) -> None:
        """Take in results by config_id, in any order; those already told change nothing.

        One that does not learn need not be told. Raises ValueError for a config that was not drawn here.
        """
        for identity, objective in results:
            self._check(objective)
            if identity not in self.drawn:
                raise ValueError(f"results must be of configs drawn here, got config_id={identity!r}")
            if identity in self._open:
                del self._open[identity]
                self._results[identity] = objective
        if not self._open and self._results:
            order = [identity for identity in self.drawn if identity in self._results]
            self._learn([(identity, self._results[identity]) for identity in order])
            self._results.clear()

    def _check(self, objective: Objective) -> None:  # noqa: B027 (any objective will do for most)
        """Raise ValueError for an objective that this searcher cannot take."""

    @abstractmethod
    def _draw(self) -> Iterator[Config]:
        """Proposals without end, or until the space is exhausted; known ones among them are passed over."""

    def _learn(self, results: list[tuple[str, Objective]]) -> None:  # noqa: B027 (most have nothing to learn)
        """Take in the results of a whole batch, in the order in which it was drawn."""

    def _draw_new(self) -> Iterator[tuple[str, Config]]:
        known_in_a_row = 0
        for config in self._draw():
            identity = config_id(config)
            known_in_a_row = known_in_a_row + 1 if identity in self.drawn else 0
            if known_in_a_row == 0:
                yield identity, config
            elif known_in_a_row >= DRAWS_BEFORE_EXHAUSTED:
                return


class RandomSearcher(Searcher):
    """Points of the unit cube drawn uniformly."""

    def __init__(self, space: Space, count: int, *, seed: int = 0, batch: int = DEFAULT_BATCH) -> None:
        super().__init__(space, count, seed=seed, batch=batch)
        self._generator = np.random.Generator(np.random.PCG64(seed))

    def _draw(self) -> Iterator[Config]:
        while True:
            yield self.space.sample(self._generator.random(len(self.space.dimensions)).tolist())


class SobolSearcher(Searcher):
    """A scrambled Sobol sequence: covers the cube more evenly than random points."""

    def __init__(self, space: Space, count: int, *, seed: int = 0, batch: int = DEFAULT_BATCH) -> None:
        super().__init__(space, count, seed=seed, batch=batch)
        self._points = sobol_points(len(space.dimensions), seed)

    def _draw(self) -> Iterator[Config]:
        for point in self._points:
            yield self.space.sample(point)


class GridSearcher(Searcher):
    """Every combination of the options and of `points_per_range` values per range.

    Raises ValueError where the grid holds more configs than `count`: a cut grid would leave the first knobs
    without any variation.
    """

    def __init__(
        self,
        space: Space,
        count: int,
        *,
        seed: int = 0,
        batch: int = DEFAULT_BATCH,
        points_per_range: int = DEFAULT_POINTS_PER_RANGE,
    ) -> None:
        super().__init__(space, count, seed=seed, batch=batch)
        check_grid(space, count, points_per_range)
        self._configs = space.grid(points_per_range)

    def _draw(self) -> Iterator[Config]:
        return self._configs


def _make_tpe(space: Space, count: int, **options: object) -> Searcher:
    from harness.optuna_search import TPESearcher  # Optuna is loaded by the sweeps that use it

    return TPESearcher(space, count, **options)  # type: ignore[arg-type]


def _make_nsga2(space: Space, count: int, **options: object) -> Searcher:
    from harness.optuna_search import NSGA2Searcher

    return NSGA2Searcher(space, count, **options)  # type: ignore[arg-type]


SEARCHERS: dict[str, Callable[..., Searcher]] = {
    "random": RandomSearcher,
    "grid": GridSearcher,
    "sobol": SobolSearcher,
    "tpe": _make_tpe,
    "nsga2": _make_nsga2,
}


def make_searcher(
    name: str, space: Space, count: int, seed: int = 0, batch: int = DEFAULT_BATCH, **options: object
) -> Searcher:
    """The searcher called `name` ("random", "grid", "sobol", "tpe", "nsga2") with its own options.

    Raises ValueError for an unknown name, with the nearest known one, and for settings out of range.
    """
    if name not in SEARCHERS:
        raise ValueError(f"unknown search algorithm {name!r} {nearest_hint(name, SEARCHERS)}")
    return SEARCHERS[name](space, count, seed=seed, batch=batch, **options)


def check_settings(*, count: int, seed: int, batch: int) -> None:
    """Raise ValueError unless count and batch are at least 1 and the seed is in [0, 2**32)."""
    for name, value, least in (("count", count, 1), ("batch", batch, 1), ("seed", seed, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be an integer >= {least}, got {name}={value!r}")
    if seed >= 2**32:
        raise ValueError(f"seed must be < 2**32, got {seed=}")


def check_grid(space: Space, count: int, points_per_range: int) -> None:
    """Raise ValueError where the grid of a space holds more than `count` configs."""
    if sum(1 for _ in islice(space.grid(points_per_range), count + 1)) > count:
        raise ValueError(
            f"the grid of {space.name!r} with {points_per_range} values per range has more than {count} "
            "configs; ask for more configs, fewer values per range, or fix knobs"
        )


def sobol_points(dimensions: int, seed: int) -> Iterator[list[float]]:
    """Points of the unit cube of a scrambled Sobol sequence, without end (1 dimension at least is drawn)."""
    from scipy.stats import qmc  # takes a second to load, and most searches do without

    sequence = qmc.Sobol(max(1, dimensions), scramble=True, seed=np.random.Generator(np.random.PCG64(seed)))
    exponent = 0
    yield sequence.random(1)[0, :dimensions].tolist()
    while True:  # blocks that double what there is keep the sequence balanced
        for point in sequence.random(2**exponent):
            yield point[:dimensions].tolist()
        exponent += 1
