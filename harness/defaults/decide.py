"""Which config is the default: the whole decision, as functions of arrays of figures.

A block is one (scenario, seed) pair; figures of two configs in one block were measured with equal data and
seed. Nothing here trains, reads or writes: what is measured is decided in `confirm`, in which order the steps
follow in `session`.

    choose    which configs are worth confirming, by worst-scenario regret, then mean rank; ties go to the
              current default, what the seeds do not tell apart goes by the run's order, equals by cost
    on_cliff  whether a config stands where one step of one knob breaks it
    confirm   whether the candidate takes the current default's place, on blocks that chose nothing
    figure    a median over seeds with its interval, for the report
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from reports.evidence import Interval, improvement_chance, paired_difference
from reports.metrics import Metric

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

DIFFERENCE, LOG_RATIO = "difference", "log_ratio"
STEP, OPTION = "step", "option"
_SMALLEST_SHARE = 1e-9  # of the middle figure: an error of 0 has no logarithm


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What the decision is made by.

    level        of every interval, two-sided
    looks        how often the confirmation may look, and at how many times its seeds; the looks share the
                 error that `level` allows
    resamples    of every bootstrap, drawn from `seed`
    tie_margin   a config at most this much worse than the leader (at the upper bound) ties with it: a share
                 of the error, or a difference of shares
    cliff        a step that multiplies the error by more than this, and with every seed, is a cliff
    kept_share   ... or that leaves less than this share of the coverage
    """

    level: float = 0.9
    looks: tuple[int, ...] = (1, 2, 4)
    resamples: int = 1000
    seed: int = 0
    tie_margin: float = 0.01
    cliff: float = 1.5
    kept_share: float = 0.5

    def __post_init__(self) -> None:
        if not 0.0 < self.level < 1.0:
            raise ValueError(f"level must lie in (0, 1), got {self.level}")
        if not self.looks or self.looks[0] < 1 or list(self.looks) != sorted(set(self.looks)):
            raise ValueError(f"looks must grow from 1 or more, got {self.looks}")
        if self.resamples < 100:
            raise ValueError(f"resamples must be >= 100, got {self.resamples}")
        if not self.tie_margin >= 0.0:
            raise ValueError(f"tie_margin must be >= 0, got {self.tie_margin}")
        if not self.cliff > 1.0:
            raise ValueError(f"cliff must be > 1, got {self.cliff}")
        if not 0.0 <= self.kept_share <= 1.0:
            raise ValueError(f"kept_share must lie in [0, 1], got {self.kept_share}")

    @property
    def look_level(self) -> float:
        """The level of what a look may err in."""
        return 1.0 - (1.0 - self.level) / len(self.looks)

    @property
    def test_level(self) -> float:
        """The level of each of the two intervals that decide at a look."""
        return 1.0 - (1.0 - self.look_level) / 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Guard:
    """A figure in which the candidate must not fail; `margin` is what may be lost.

    `compare` is "difference", or "log_ratio" with the margin as a ratio (1.05: five per cent worse).
    `direction`: whether the better value is the "lower" or the "higher" one; of ratios it is the lower.
    `by_median`: the harm is the median over blocks with the sign test's interval, for clocks, which now and
    then are far off; else the mean with Student's.
    """

    name: str
    compare: str
    margin: float
    direction: str = "lower"
    by_median: bool = False

    def __post_init__(self) -> None:
        least = 1.0 if self.compare == LOG_RATIO else 0.0
        if not least <= self.margin < math.inf:
            raise ValueError(
                f"the margin of {self.name} must be >= {least:g} "
                f"({'a ratio' if least else 'a difference'}), got {self.margin}"
            )

    @property
    def limit(self) -> float:
        """The margin in the unit of harm."""
        return math.log(self.margin) if self.compare == LOG_RATIO else self.margin


@dataclass(frozen=True, slots=True)
class GuardPairs:
    """What both arms measured of a guarded figure in each block."""

    guard: Guard
    scenarios: Sequence[str]
    current: Floats
    candidate: Floats


@dataclass(frozen=True, slots=True)
class Judged:
    """What came of one guard in one scenario; harm: how much worse the candidate is, in the guard's unit."""

    guard: Guard
    scenario: str
    harm: Interval
    failed: bool


@dataclass(frozen=True, slots=True)
class Choice:
    """What the choice stage came to.

    challengers: configs that are worth confirming, the first one first; none where the current default leads
    or ties. leader: the config with the least worst-scenario regret, None where no config is eligible. regret
    (configs, scenarios), mean_rank and apart (the paired difference to the leader) are NaN or None for a
    config that is not eligible. why: one sentence.
    """

    challengers: tuple[int, ...]
    leader: int | None
    tied: tuple[int, ...]
    regret: Floats
    mean_rank: Floats
    apart: tuple[Interval | None, ...]
    why: str


@dataclass(frozen=True, slots=True)
class Confirmation:
    """Whether the candidate takes the current default's place.

    chance: of being better in a block. apart: the mean of candidate - current over blocks, in scores.

    open: nothing speaks against the candidate but that there are too few blocks, so that more may decide.
    """

    change: bool
    open: bool
    why: str
    chance: Interval | None
    apart: Interval | None
    judged: tuple[Judged, ...] = ()


@dataclass(frozen=True, slots=True)
class Figure:
    """A figure over n seeds: the median with its interval, and the mean beside it.

    What is not finite counts as worse than anything, and the mean is then NaN.
    """

    median: float
    low: float
    high: float
    mean: float
    n: int
    not_finite: int = 0


def compare_of(metric: Metric) -> str:
    """How two values of a metric are compared: shares by their difference, errors by their ratio."""
    return DIFFERENCE if metric.unit == "share" else LOG_RATIO


def scores_of(values: Floats, scenarios: Sequence[str], metric: Metric, reference: int) -> Floats:
    """Figures (configs, blocks) as scores that compare across scenarios: lower is better, 0 is the reference.

    A share's score is its difference to the reference's mean in the scenario, an error's the logarithm of its
    ratio to the reference's geometric mean there; a figure that may be negative is divided by the reference's
    mean size. Where the reference has no finite figure, the median over all configs stands for it. What is
    not finite is NaN.
    """
    values = np.where(np.isfinite(values), values, np.nan)
    scores = np.full(values.shape, np.nan)
    names = np.asarray(scenarios)
    for name in dict.fromkeys(scenarios):
        block = values[:, names == name]
        if not np.isfinite(block).any():
            continue
        own = block[reference][np.isfinite(block[reference])]
        own = own if own.size else np.array([np.nanmedian(block)])
        if compare_of(metric) == DIFFERENCE:
            found = block - own.mean()
        elif np.nanmin(block) >= 0.0:
            floor = max(float(np.nanmedian(block)) * _SMALLEST_SHARE, np.finfo(np.float64).tiny)
            found = np.log(np.maximum(block, floor)) - np.log(np.maximum(own, floor)).mean()
        else:
            found = (block - own.mean()) / max(float(np.abs(own).mean()), np.finfo(np.float64).tiny)
        scores[:, names == name] = found if metric.direction == "lower" else -found
    return scores


def choose(
    scores: Floats,
    scenarios: Sequence[str],
    *,
    current: int,
    eligible: Bools,
    prior: Sequence[float],
    cost: Sequence[tuple[float, ...]],
    rules: Rules,
) -> Choice:
    """Order the configs that are worth confirming, on scores (configs, blocks) as `scores_of` gives them.

    `eligible`: which configs met their constraints in every block; a score of theirs is finite. The leader
    has the least regret in its worst scenario. A config that is at most the tie margin behind it ties, and if
    the current default does, nothing is worth confirming. Of those that the seeds do not tell apart from the
    leader the first is that with the best `prior` (what the run said, lower is better: of many nearly equal
    configs the one that led by luck here is no better a guess); of those that tie with it, the cheapest. The
    others follow, in the order of the prior, then of regret.
    """
    configs, names = len(scores), np.asarray(scenarios)
    kinds = list(dict.fromkeys(scenarios))
    regret = np.full((configs, len(kinds)), np.nan)
    mean_rank = np.full(configs, np.nan)
    those = [int(index) for index in np.flatnonzero(eligible)]
    if not those:
        return Choice((), None, (), regret, mean_rank, (None,) * configs, "no config met its constraints")
    means = np.stack([scores[those][:, names == name].mean(axis=1) for name in kinds], axis=1)
    regret[those] = means - means.min(axis=0)
    below = (scores[those][:, None, :] > scores[those][None, :, :]).sum(axis=1)
    level = (scores[those][:, None, :] == scores[those][None, :, :]).sum(axis=1)
    mean_rank[those] = (below + (level + 1) / 2).mean(axis=1)

    def by_regret(index: int) -> tuple[Any, ...]:
        return (regret[index].max(), mean_rank[index], index != current, cost[index], index)

    leader = min(those, key=by_regret)
    apart = tuple(
        _paired(scores[leader], scores[index], rules) if eligible[index] else None for index in range(configs)
    )
    tied = tuple(index for index in those if index == leader or _high(apart[index]) <= rules.tie_margin)
    if current in tied:
        why = "the current default leads" if current == leader else "the current default ties with the leader"
        return Choice((), leader, tied, regret, mean_rank, apart, f"{why} on the seeds of the choice")
    better = [
        index
        for index in those
        if not eligible[current] or float((scores[index] - scores[current]).mean()) < 0.0
    ]
    alike = [index for index in better if index in tied or _low(apart[index]) <= 0.0]
    alike.sort(key=lambda index: (prior[index], by_regret(index)))
    equal = [
        index
        for index in alike
        if index == alike[0] or _paired(scores[alike[0]], scores[index], rules).high <= rules.tie_margin
    ]
    equal.sort(key=lambda index: (cost[index], alike.index(index)))
    rest = sorted(set(better) - set(alike), key=by_regret)
    order = (*equal[:1], *(index for index in alike if index not in equal[:1]), *rest)
    told = f"{len(better)} of {configs - 1} configs did better than the current default"
    return Choice(order, leader, tied, regret, mean_rank, apart, f"{told} on the seeds of the choice")


def on_cliff(
    own: Floats,
    neighbour: Floats,
    *,
    kind: str,
    broken: str,
    worthless: Bools,
    own_worthless: Bools,
    coverage: Floats,
    own_coverage: Floats,
    rules: Rules,
) -> str:
    """Say why a config stands on a cliff towards one neighbour; empty where it does not.

    `own`, `own_coverage` and `own_worthless` are of all the config's trainings, the others of the
    neighbour's; all of one scenario. `broken` says what went wrong with the neighbour (a failed or diverged
    training, a non-finite value), which counts for every kind. That a step is worse counts only where each of
    its trainings is worse than every one of the config, since trainings of one config differ as well: by more
    than the rule's ratio on average, by losing most of the coverage, or by becoming `worthless` (no better
    than abstaining everywhere). What another option of a choice costs is no cliff: nobody steps from one
    optimizer to another by accident.
    """
    if broken:
        return broken
    if kind == OPTION or not neighbour.min() > own.max():
        return ""
    more = float(neighbour.mean() - own.mean())
    if more > math.log(rules.cliff):
        return f"the error is {math.exp(more):.3g} times as large"
    if coverage.max() < rules.kept_share * own_coverage.min():
        return f"coverage falls from {own_coverage.mean():.3g} to {coverage.mean():.3g}"
    if np.all(worthless) and not np.any(own_worthless):
        return "it is no better than abstaining everywhere"
    return ""


def confirm(
    current: Floats,
    candidate: Floats,
    *,
    guards: Sequence[GuardPairs] = (),
    current_trouble: str = "",
    candidate_trouble: str = "",
    rules: Rules,
) -> Confirmation:
    """Decide on scores (blocks,) of both arms from seeds that chose nothing; the blocks of all looks so far.

    The candidate takes over when it is shown to be better, and fails in no guarded figure in any scenario.
    Shown is either that its chance to be better in a block is above one half, or that its mean score is
    lower: a default that is as good in most blocks and far worse in some loses by the second alone. Each has
    half of the error of a look. A candidate that broke a constraint never takes over; where the current
    default broke one and the candidate did not, it does.
    """
    if candidate_trouble:
        why = f"the candidate broke a constraint: {candidate_trouble}"
        return Confirmation(False, False, why, None, None)
    if current_trouble:
        why = f"the current default broke a constraint, and the candidate none: {current_trouble}"
        return Confirmation(True, False, why, None, None)
    level = rules.test_level
    chance = improvement_chance(current, candidate, resamples=rules.resamples, seed=rules.seed, level=level)
    apart = paired_difference(current, candidate, resamples=rules.resamples, seed=rules.seed, level=level)
    judged = tuple(result for pairs in guards for result in judge(pairs, rules))
    failed = failures(judged)
    wins, lower = chance.low > 0.5, apart.high < 0.0
    told = f"a chance of {chance.mean:.2f} (lower bound {chance.low:.2f}) over {chance.n} blocks"
    if not wins and lower:
        told = f"a mean score of {apart.mean:.3g} (upper bound {apart.high:.3g}) over {apart.n} blocks"
    if (wins or lower) and not failed:
        why = f"better than the current default with {told}, and worse in no guarded figure of any scenario"
        return Confirmation(True, False, why, chance, apart, judged)
    unshown = f"better than the current default with {told}: not above 0.5, nor is the mean score lower"
    reasons = failed if wins or lower else [unshown, *failed]
    is_open = not failed and (chance.high > 0.5 or apart.low < 0.0)
    return Confirmation(False, is_open, "; ".join(reasons), chance, apart, judged)


def judge(pairs: GuardPairs, rules: Rules) -> list[Judged]:
    """Hold a guarded figure of the candidate against that of the current default, scenario by scenario.

    It fails where the harm is beyond the margin and its whole interval above 0. A figure that the candidate
    alone lacks fails; one that neither has is left out.
    """
    names = np.asarray(pairs.scenarios)
    judged = []
    for name in dict.fromkeys(pairs.scenarios):
        current, candidate = pairs.current[names == name], pairs.candidate[names == name]
        harm = _harm(pairs.guard, current, candidate)
        if not harm.size:
            continue
        found = _harm_interval(harm, pairs.guard, rules)
        judged.append(Judged(pairs.guard, name, found, found.mean > pairs.guard.limit and found.low > 0.0))
    return judged


def failures(judged: Sequence[Judged]) -> list[str]:
    """What failed, in a clause each."""
    return [
        f"{result.guard.name} is worse in {result.scenario}: {_harm_text(result)}"
        for result in judged
        if result.failed
    ]


def figure(values: Floats, *, level: float = 0.9) -> Figure:
    """The median over seeds, with the narrowest pair of seeds' values that holds the true median this often.

    The pair is that of the sign test: it holds its level whatever the figures' distribution, where an
    interval of the mean misses the rare training that goes wrong. Fewer than five seeds do not suffice for
    90 %, and have no interval (NaN).

    >>> figure(np.array([3.0, 1.0, 2.0, 5.0, 4.0]))
    Figure(median=3.0, low=1.0, high=5.0, mean=3.0, n=5, not_finite=0)
    """
    held = np.asarray(values, dtype=np.float64)
    finite = np.isfinite(held)
    ordered = np.sort(np.where(finite, held, np.inf))
    n, broken = int(held.size), int((~finite).sum())
    if not n:
        return Figure(math.nan, math.nan, math.nan, math.nan, 0)
    mean = math.nan if broken else float(ordered.mean())
    middle = [float(ordered[(n - 1) // 2]), float(ordered[n // 2])]
    out = _outside(n, level)
    low, high = (math.nan, math.nan) if out is None else (float(ordered[out]), float(ordered[n - 1 - out]))
    return Figure(0.5 * (middle[0] + middle[1]), low, high, mean, n, broken)


def _outside(n: int, level: float) -> int | None:
    """How many of n values may lie on either side of an interval for the median; None where not even 0 do."""
    below, out = 0.0, None
    for count in range(n // 2 + 1):
        below += math.comb(n, count) / 2.0**n
        if below > (1.0 - level) / 2.0:
            break
        out = count
    return out


def seeds_for_chance(chance: float, blocks_per_seed: int, *, level: float, most: int = 1000) -> int | None:
    """How many seeds would show that this chance is above one half; None where not even `most` do."""
    for seeds in range(1, most + 1):
        blocks = seeds * blocks_per_seed
        if _is_shown(round(chance * blocks), blocks, level):
            return seeds
    return None


def losses_to_flip(chance: Interval, level: float) -> int:
    """How many more blocks would have to be lost for the chance not to be shown to be above one half."""
    won = round(chance.mean * chance.n)
    return next((lost for lost in range(1, won) if not _is_shown(won - lost, chance.n, level)), won)


def _is_shown(won: int, blocks: int, level: float) -> bool:
    outcomes = np.where(np.arange(blocks) < won, 0.0, 2.0)
    return improvement_chance(np.ones(blocks), outcomes, level=level).low > 0.5


def _paired(base: Floats, other: Floats, rules: Rules) -> Interval:
    return paired_difference(base, other, resamples=rules.resamples, seed=rules.seed, level=rules.level)


def _high(interval: Interval | None) -> float:
    return math.inf if interval is None else interval.high


def _low(interval: Interval | None) -> float:
    return math.inf if interval is None else interval.low


def _harm(guard: Guard, current: Floats, candidate: Floats) -> Floats:
    """How much worse the candidate is in each block that says it, infinite where it alone has no figure."""
    with np.errstate(divide="ignore", invalid="ignore"):
        if guard.compare == LOG_RATIO:
            harm = np.where(candidate == current, 0.0, np.log(candidate) - np.log(current))
        else:
            harm = candidate - current if guard.direction == "lower" else current - candidate
    harm = np.where(np.isnan(current) & ~np.isnan(candidate), 0.0, harm)
    harm = np.where(np.isnan(candidate) & ~np.isnan(current), np.inf, harm)
    return np.asarray(harm[~np.isnan(harm)])


def _harm_interval(harm: Floats, guard: Guard, rules: Rules) -> Interval:
    n = int(harm.size)
    if not np.isfinite(harm).all():
        worst = math.inf if np.any(harm == np.inf) else -math.inf
        return Interval(worst, worst, worst, n)
    if guard.by_median:
        found = figure(harm, level=rules.level)
        low, high = (value if math.isfinite(value) else math.nan for value in (found.low, found.high))
        return Interval(found.median, low, high, n)
    return _student(harm, rules.level) if n > 1 else Interval(float(harm[0]), math.nan, math.nan, 1)


def _student(values: Floats, level: float) -> Interval:
    from scipy.stats import t

    scale = float(np.abs(values).max()) or 1.0  # the square of an error of 1e200 is no number
    mean, error = float(values.mean()), scale * float((values / scale).std(ddof=1)) / math.sqrt(values.size)
    half = float(t.ppf(0.5 + level / 2.0, values.size - 1)) * error
    return Interval(mean, mean - half, mean + half, int(values.size))


def _harm_text(result: Judged) -> str:
    if not math.isfinite(result.harm.mean):
        return "it has none"
    if result.guard.compare == LOG_RATIO:
        return f"{math.exp(result.harm.mean):.3g} times as large (at most {result.guard.margin:g} is allowed)"
    return f"by {result.harm.mean:.3g} (at most {result.guard.margin:g} is allowed)"
