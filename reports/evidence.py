"""How sure a ranking or a difference is, from repetitions: blocks of one scenario and seed, drawn anew.

A block is what all configs were asked alike: the same scenario (a task and its data) and the same seed
(split, first weights, shuffling). Configs are compared within blocks, and whole blocks are drawn with
replacement, so that what makes a seed hard for everybody does not count as noise. With few blocks this says
little: of 2 seeds there are three draws, and "90 %" is then the range over both seeds and their mean; from 5
blocks on such intervals of a rank roughly hold what they promise, with 1 there are none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from reports.aggregate import Floats, Ints, Trials

LEVEL = 0.9
RESAMPLES = 1000
# Of so many blocks there are at most 462 draws that differ, and each is weighed by its chance.
MOST_ENUMERATED = 6
RANK_COLUMNS = ("rank_low", "rank_high", "p_best", "p_front")


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over blocks and where it may lie, at the level that was asked for; NaN bounds where unknown.

    n: the blocks that it comes from.
    """

    mean: float
    low: float
    high: float
    n: int


def paired_difference(
    base: npt.ArrayLike,
    candidate: npt.ArrayLike,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
    level: float = LEVEL,
) -> Interval:
    """The mean of candidate - base over blocks, (blocks,) each, with its bootstrap interval.

    The percentiles are widened for few blocks, so that a normal sample's interval is that of Student's t
    (Hesterberg 2015, "expanded percentile"); the bounds are NaN for one block. Raises ValueError where the
    two are not equally many, empty, or not finite, and for a level outside (0, 1).
    """
    difference = _paired(base, candidate, "difference")
    _check_level(level)
    n = len(difference)
    mean = float(difference.mean())
    if n == 1:
        return Interval(mean, math.nan, math.nan, n)
    from scipy.stats import norm, t

    tail = float(norm.cdf(math.sqrt(n / (n - 1)) * t.ppf((1.0 - level) / 2, n - 1)))
    drawn = np.random.default_rng(seed).integers(0, n, (resamples, n))
    means = difference[drawn].mean(axis=1)
    # Widened past the smallest and largest mean that was drawn, an interval ends at these.
    low, high = np.quantile(means, [tail, 1.0 - tail])
    spread = math.sqrt(float(difference.var(ddof=1)) / n) * float(t.ppf((1.0 + level) / 2, n - 1))
    if n < 2 * MOST_ENUMERATED:  # too few for percentiles so far out: the interval of t is wider there
        low, high = min(float(low), mean - spread), max(float(high), mean + spread)
    return Interval(mean, float(low), float(high), n)


def improvement_chance(
    base: npt.ArrayLike,
    candidate: npt.ArrayLike,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
    level: float = LEVEL,
) -> Interval:
    """The chance that the candidate is better (lower) than the base in a block; equal values count half.

    Its interval is the exact one of Clopper and Pearson, since a bootstrap of blocks that all say the same
    has no width: four wins in four blocks leave 0.47 possible, five in five 0.55, at 90 %. `resamples` and
    `seed` are those of the other measures, and change nothing. Values may be infinite. Raises ValueError as
    `paired_difference` does, but for infinities, and for NaN.
    """
    one, other = (np.asarray(values, dtype=np.float64) for values in (base, candidate))
    if one.shape != other.shape or one.ndim != 1 or not len(one):
        raise ValueError(f"base and candidate must be equally many, and some, got {one.shape}, {other.shape}")
    if np.isnan(one).any() or np.isnan(other).any():
        raise ValueError("base and candidate must not hold NaN; write a missing value as inf")
    _check_level(level)
    from scipy.stats import beta

    n = len(one)
    won = float(np.sum(other < one) + 0.5 * np.sum(other == one))
    tail = (1.0 - level) / 2
    low = float(beta.ppf(tail, won, n - won + 1)) if won > 0 else 0.0
    high = float(beta.ppf(1.0 - tail, won + 1, n - won)) if won < n else 1.0
    return Interval(won / n, low, high, n)


# --- ranks ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Blocks:
    """Where the trials of some configs lie in a matrix of configs by blocks.

    trials: their indices among all trials; row, column: the place of each; number: of the blocks.
    """

    trials: Ints
    row: Ints
    column: Ints
    shape: tuple[int, int]

    @classmethod
    def of_trials(cls, trials: Trials, configs: Ints) -> Blocks:
        """The blocks of a run of one task, its seeds, for these configs in this order."""
        place = np.full(trials.configs, -1)
        place[configs] = np.arange(len(configs))
        owner = np.repeat(place, trials.counts)
        held = np.flatnonzero(owner >= 0)
        seeds = trials.rows.column("seed").to_numpy()[held]
        known = np.union1d(np.asarray(trials.seeds, dtype=np.int64), seeds)
        return cls(held, owner[held], np.searchsorted(known, seeds), (len(configs), len(known)))

    @property
    def number(self) -> int:
        """How many blocks there are."""
        return self.shape[1]

    def spread(self, values: Floats, *, missing: float) -> Floats:
        """Values of all trials as (configs, blocks); a mean where a block has several trials of a config."""
        total = np.zeros(self.shape)
        count = np.zeros(self.shape)
        with np.errstate(invalid="ignore", over="ignore"):
            np.add.at(total, (self.row, self.column), values[self.trials])
            np.add.at(count, (self.row, self.column), 1.0)
            return np.where(count > 0, total / np.maximum(count, 1.0), missing)

    @staticmethod
    def mean(values: Floats, drawn: Ints) -> Floats:
        """The mean of each config over blocks that were drawn so many times, (blocks,)."""
        there = drawn > 0
        with np.errstate(over="ignore"):
            return np.asarray(values[:, there] @ drawn[there] / drawn.sum())

    @staticmethod
    def sign(values: Floats, drawn: Ints) -> Floats:
        """1 where the sum over drawn blocks is above 0, else 0, NaN where no drawn block is known."""
        there = drawn > 0
        known = ~np.isnan(values[:, there])
        with np.errstate(over="ignore", invalid="ignore"):
            total = np.where(known, values[:, there], 0.0) @ drawn[there]
        return np.where(known.any(axis=1), (total > 0).astype(np.float64), np.nan)


def resample_ranks(
    arrange: Callable[[Ints], tuple[Ints, Ints]],
    *,
    configs: int,
    blocks: int,
    resamples: int = RESAMPLES,
    seed: int = 0,
    level: float = LEVEL,
) -> pa.Table:
    """How sure the ranks of configs are; `arrange` orders them when blocks are drawn so many times.

    It returns the front of each config (from 1) and the configs best first. Columns, a row per config:
    rank_low and rank_high (int64), between which its rank lies in `level` of the draws; p_best, the share of
    draws in which it is first; p_front, in which it is in the first front. All null below two blocks.
    """
    _check_level(level)
    if blocks < 2 or configs == 0:
        empty = [pa.nulls(configs, kind) for kind in (pa.int64(), pa.int64(), pa.float64(), pa.float64())]
        return pa.table(dict(zip(RANK_COLUMNS, empty, strict=True)))
    ranks, fronts, chances = [], [], []
    for drawn, chance in draws(blocks, resamples, seed):
        front, order = arrange(drawn)
        rank = np.empty(configs, dtype=np.int64)
        rank[order] = np.arange(1, configs + 1)
        ranks.append(rank)
        fronts.append(front == 1)
        chances.append(chance)
    weight = np.asarray(chances)
    held = np.asarray(ranks)
    low, high = (_weighted_quantile(held, weight, at) for at in ((1.0 - level) / 2, (1.0 + level) / 2))
    return pa.table(
        {
            "rank_low": pa.array(low),
            "rank_high": pa.array(high),
            "p_best": pa.array(weight @ (held == 1)),
            "p_front": pa.array(weight @ np.asarray(fronts)),
        }
    )


def draws(blocks: int, resamples: int, seed: int) -> Iterator[tuple[Ints, float]]:
    """How often each block is drawn, (blocks,), and the chance of that; of few blocks, all draws there are.

    >>> [(drawn.tolist(), chance) for drawn, chance in draws(2, 1000, 0)]
    [([2, 0], 0.25), ([1, 1], 0.5), ([0, 2], 0.25)]
    """
    if blocks <= MOST_ENUMERATED:
        for drawn in _shares(blocks, blocks):
            ways = math.factorial(blocks) / math.prod(map(math.factorial, drawn))
            yield np.asarray(drawn), ways / blocks**blocks
        return
    counts = np.random.default_rng(seed).multinomial(blocks, np.full(blocks, 1.0 / blocks), resamples)
    for drawn in counts:
        yield drawn, 1.0 / resamples


def _shares(total: int, parts: int) -> Iterator[tuple[int, ...]]:
    if parts == 1:
        yield (total,)
        return
    for first in range(total, -1, -1):
        for rest in _shares(total - first, parts - 1):
            yield (first, *rest)


def _weighted_quantile(values: Ints, weight: Floats, at: float) -> Ints:
    """Per column, the smallest value up to which lies at least the share `at` of the weight."""
    order = np.argsort(values, axis=0, kind="stable")
    reached = np.cumsum(weight[order], axis=0) >= at - 1e-12
    return np.asarray(
        np.take_along_axis(values, order, axis=0)[reached.argmax(axis=0), np.arange(values.shape[1])]
    )


def _paired(base: npt.ArrayLike, candidate: npt.ArrayLike, what: str) -> Floats:
    one, other = (np.asarray(values, dtype=np.float64) for values in (base, candidate))
    if one.shape != other.shape or one.ndim != 1 or not len(one):
        raise ValueError(
            f"the {what} needs base and candidate equally many, and some, got {one.shape}, {other.shape}"
        )
    found: Floats = other - one
    if not np.isfinite(found).all():
        raise ValueError(f"the {what} needs finite values, got {_first_not_finite(one, other)}")
    return found


def _first_not_finite(*arrays: Floats) -> float:
    values: Sequence[float] = np.concatenate(arrays).tolist()
    return next((value for value in values if not math.isfinite(value)), math.inf)


def _check_level(level: float) -> None:
    if not 0.0 < level < 1.0:
        raise ValueError(f"level must lie between 0 and 1, got {level}")
