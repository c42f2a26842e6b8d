"""Is a candidate worse than its baseline? Three verdicts from pairs of trainings with equal seeds, purely.

Who trained them is decided in `session`, what is asked of each metric in `rules`; nothing here reads a file.

The unit is the pair: the same scenario, data and seed trained by both arms. Its harm is how much worse the
candidate is. With m the mean harm of n seeds, se its standard error and D the margin, a metric of a scenario

- PASSes where m + t(n-1, 1 - a) * se < D, a being this look's share of alpha_pass: worse by less than the
  margin, at that confidence;
- FAILs where it does not pass, m is above the floor, and P(t(n-1) > m / se) is small enough by Holm's rule
  over all scenarios and metrics of the gate, at this look's share of alpha;
- is INCONCLUSIVE otherwise, and below four seeds, unless both arms agree bit for bit.

The gate passes where every metric of every scenario does: an intersection-union test, whose chance to pass a
regression of the size of a margin is at most alpha_pass without any correction. Harms of few seeds are
tested by flipping their signs too, and the larger of both chances counts, wherever that test could reach the
significance that is asked for (its smallest chance is 2**-n).

A value that is not finite is a result: a candidate without one (it accepted nothing) where the baseline has
one is harmed more than in any other pair, as a baseline without one is the worse; without one in both, equal.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from harness.gate.rules import GateRules, MetricRule

Floats = npt.NDArray[np.float64]

PASS, FAIL, INCONCLUSIVE = "PASS", "FAIL", "INCONCLUSIVE"
WARN = "WARN"  # of timings of another sitting: said, and decides nothing
VERDICTS = (PASS, FAIL, INCONCLUSIVE)
LEAST_SEEDS = 4
MOST_FLIPPED = 12  # seeds up to which all signs are tried: 4,096 of them
_WORST = 10.0  # times the margin: the least harm of a pair in which the candidate alone has no finite value
_TAIL = 0.1
_ROUNDING = 1e-9  # of a margin: a harm that differs from it by less is the margin


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    """One metric of one scenario: what both arms say for the same seeds, of `planned` that were to be run.

    stored: timings of another sitting, which drift with the machine; they may warn and decide nothing.
    Raises ValueError where the three do not have one value a seed, or a seed stands there twice.
    """

    scenario: str
    metric: str
    seeds: tuple[int, ...]
    base: tuple[float, ...]
    candidate: tuple[float, ...]
    planned: int
    stored: bool = False

    def __post_init__(self) -> None:
        if not len(self.seeds) == len(self.base) == len(self.candidate):
            raise ValueError(
                f"{self.scenario}, {self.metric}: seeds, base and candidate must be equally many, "
                f"got {len(self.seeds)}, {len(self.base)}, {len(self.candidate)}"
            )
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"{self.scenario}, {self.metric}: seeds must differ, got {list(self.seeds)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class NanCount:
    """Unmasked non-finite values of a scenario, among how many that were looked at, in both arms.

    first: where the candidate met its first one, so that it can be found again.
    """

    scenario: str
    values: int
    checks: int
    base_values: int
    base_checks: int
    first: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """The verdict on one metric of one scenario.

    base, candidate  means over the finite values of each arm, NaN where there are none
    harm, low, high  mean harm and its interval of two sides, of which `high` is what must stay below the
                     margin to pass, in the rule's unit
    p, p_sign        chance of such a harm where there is none, by the t test and by flipping signs; NaN where
                     it was not computed
    exact            both arms agree bit for bit
    rebase           better by more than the margin: the baseline should be taken anew, or the next regression
                     of that size goes unseen
    """

    scenario: str
    metric: str
    n: int
    planned: int
    base: float
    candidate: float
    harm: float
    low: float
    high: float
    margin: float
    compare: str
    p: float
    p_sign: float
    verdict: str
    why: str
    exact: bool
    stored: bool
    rebase: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class NanCell:
    """The verdict on the non-finite values of one scenario.

    bound: with none met, the rate of them that is excluded at 95 %. p: chance of so many, given the rate of
    the baseline; NaN where it has none, and the first one fails.
    """

    scenario: str
    values: int
    checks: int
    base_values: int
    base_checks: int
    bound: float
    p: float
    verdict: str
    why: str
    first: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GateDecision:
    """What a gate came to.

    warnings: what decides nothing and should be read: timings of another sitting, and metrics that pass
    though the candidate has no finite value in a seed. missing: what should be there and is not; with any of
    it the verdict is never PASS. rebase: metrics whose baseline is out of date for the better. look: seeds
    that were decided on; seeds_next: how many to look at next, None where more of them would not help.
    """

    verdict: str
    cells: tuple[Cell, ...]
    nan_cells: tuple[NanCell, ...]
    warnings: tuple[str, ...]
    missing: tuple[str, ...]
    rebase: tuple[str, ...]
    look: int
    seeds_next: int | None


def decide(pairs: Sequence[Pairs], nans: Sequence[NanCount], rules: GateRules, *, look: int) -> GateDecision:
    """The gate's verdict on what `look` seeds of each scenario say.

    The order of seeds, pairs and scenarios changes nothing. Raises ValueError for a metric without a rule,
    for a scenario and metric that stand there twice, and for nothing to decide on.
    """
    if not pairs:
        raise ValueError("pairs must hold at least one metric of one scenario, got none")
    names = [(item.scenario, item.metric) for item in pairs]
    if len(set(names)) < len(names):
        raise ValueError("pairs must hold each metric of a scenario once")
    cells = judge_cells(pairs, rules)
    nan_cells = [judge_nans(item, rules, scenarios=len(nans)) for item in nans]
    missing = tuple(
        f"{item.scenario}: {item.metric} of {item.planned - len(item.seeds)} of {item.planned} seeds"
        for item in pairs
        if len(item.seeds) < item.planned
    )
    counted = [cell.verdict for cell in cells if not cell.stored] + [cell.verdict for cell in nan_cells]
    if FAIL in counted:
        verdict = FAIL
    elif missing or INCONCLUSIVE in counted:
        verdict = INCONCLUSIVE
    else:
        verdict = PASS
    later = [seeds for seeds in rules.looks if seeds > look]
    more = verdict == INCONCLUSIVE and not missing and INCONCLUSIVE in [cell.verdict for cell in cells]
    return GateDecision(
        verdict=verdict,
        cells=tuple(cells),
        nan_cells=tuple(nan_cells),
        warnings=tuple(
            f"{cell.scenario}: {cell.metric} {cell.why}"
            for cell, item in zip(cells, pairs, strict=True)
            if cell.verdict == WARN or (cell.verdict == PASS and lost_seeds(item))
        ),
        missing=missing,
        rebase=tuple(f"{cell.scenario}: {cell.metric}" for cell in cells if cell.rebase),
        look=look,
        seeds_next=later[0] if later and more else None,
    )


# --- one metric of one scenario ---------------------------------------------------------------------


def harms(pairs: Pairs, rule: MetricRule) -> Floats:
    """How much worse the candidate is in each pair: (seeds,), finite, in the unit of the rule's margin.

    A ratio to 0 is as one to the smallest positive number.
    """
    base, candidate = np.asarray(pairs.base, dtype=float), np.asarray(pairs.candidate, dtype=float)
    with np.errstate(all="ignore"):
        if rule.compare == "log_ratio":
            tiny = np.finfo(float).tiny
            found = np.log(np.maximum(candidate, tiny)) - np.log(np.maximum(base, tiny))
        else:
            found = candidate - base
        if rule.worse == "lower":
            found = -found
    known = np.isfinite(base) & np.isfinite(candidate)
    found = np.where(np.isfinite(base) | np.isfinite(candidate), found, 0.0)
    finite = found[known & np.isfinite(found)]
    worst = max(_WORST * rule.margin, 2.0 * float(np.abs(finite).max(initial=0.0)))
    found = np.where(np.isfinite(base) & ~np.isfinite(candidate), worst, found)
    return np.where(~np.isfinite(base) & np.isfinite(candidate), -worst, found)


def lost_seeds(pairs: Pairs) -> int:
    """The seeds in which the baseline has a finite value and the candidate has none."""
    return sum(
        math.isfinite(base) and not math.isfinite(candidate)
        for base, candidate in zip(pairs.base, pairs.candidate, strict=True)
    )


def margin_of(pairs: Pairs, rule: MetricRule) -> float:
    """The margin that holds for these pairs; smaller than the rule's where `tail_guard` says so."""
    finite = [value for value in pairs.base if math.isfinite(value)]
    if not rule.tail_guard or not finite:
        return rule.margin
    return min(rule.margin, max(_TAIL * rule.margin, 1.0 - math.fsum(finite) / len(finite)))


def sign_flip_chance(found: Floats) -> float:
    """The chance of a mean so large where each harm might as well have the other sign, over all signs.

    >>> sign_flip_chance(np.array([1.0, 2.0, 3.0]))
    0.125
    """
    flips = 1 - 2 * ((np.arange(2 ** len(found))[:, None] >> np.arange(len(found))) & 1)
    sums = flips @ found
    # The observed sum is among them; rounding must not count it out.
    return float(np.mean(sums >= found.sum() - 1e-12 * np.abs(found).sum()))


def judge_cells(pairs: Sequence[Pairs], rules: GateRules) -> list[Cell]:
    """The verdicts on all metrics, in the order of the pairs; Holm's rule ties them together."""
    tests = [_Tested.make(item, rules, tests=len(pairs)) for item in pairs]
    significant = _holm([test.chance if test.decides else math.inf for test in tests], rules.alpha_of_a_look)
    return [test.cell(rules, fails) for test, fails in zip(tests, significant, strict=True)]


def _holm(chances: Sequence[float], alpha: float) -> list[bool]:
    """Which of the chances are significant together; an infinite one is no test."""
    number = sum(math.isfinite(chance) for chance in chances)
    found = [False] * len(chances)
    for place, index in enumerate(sorted(range(len(chances)), key=chances.__getitem__)):
        if not chances[index] <= alpha / max(1, number - place):
            break
        found[index] = True
    return found


@dataclass(frozen=True, slots=True)
class _Tested:
    """What the numbers of one metric of one scenario say, before they are judged together."""

    pairs: Pairs
    rule: MetricRule
    margin: float
    mean: float
    error: float
    reach: float  # of the interval to each side
    p: float
    p_sign: float
    exact: bool

    @classmethod
    def make(cls, pairs: Pairs, rules: GateRules, *, tests: int) -> _Tested:
        from scipy.stats import t

        rule = rules.rule_of(pairs.metric)
        found = harms(pairs, rule)
        n = len(found)
        mean = math.fsum(found) / n if n else math.nan
        # Equal harms have no spread, which rounding in their mean must not hide.
        same = n > 0 and bool((found == found[0]).all())
        error = 0.0 if same else float(np.std(found, ddof=1) / math.sqrt(n)) if n > 1 else math.nan
        p = p_sign = math.nan
        reach = math.nan
        if n > 1:
            reach = float(t.ppf(1.0 - rules.alpha_pass_of_a_look, n - 1)) * error
            if error > 0:
                p = float(t.sf(mean / error, n - 1))
            # The larger chance counts where flipped signs could be as sure as the strictest test must be.
            if error > 0 and n <= MOST_FLIPPED and 2.0**-n <= rules.alpha_of_a_look / tests:
                p_sign = sign_flip_chance(found)
        exact = n > 0 and all(_same(one, two) for one, two in zip(pairs.base, pairs.candidate, strict=True))
        return cls(pairs, rule, margin_of(pairs, rule), mean, error, reach, p, p_sign, exact)

    @property
    def decides(self) -> bool:
        """Whether statistics may decide: enough seeds with a spread, measured in one sitting."""
        return not self.pairs.stored and len(self.pairs.seeds) >= LEAST_SEEDS and self.error > 0

    @property
    def chance(self) -> float:
        """The chance that counts."""
        return self.p if math.isnan(self.p_sign) else max(self.p, self.p_sign)

    def cell(self, rules: GateRules, significant: bool) -> Cell:
        """The verdict, given whether Holm's rule calls the harm significant."""
        verdict, why = self._verdict(significant)
        if lost := lost_seeds(self.pairs):
            why = f"{why}; {lost} of {len(self.pairs.seeds)} seeds have no finite value any more"
        n = len(self.pairs.seeds)
        low, high = self.mean - self.reach, self.mean + self.reach
        enough = n >= LEAST_SEEDS and not self.pairs.stored
        return Cell(
            scenario=self.pairs.scenario,
            metric=self.pairs.metric,
            n=n,
            planned=self.pairs.planned,
            base=_finite_mean(self.pairs.base),
            candidate=_finite_mean(self.pairs.candidate),
            harm=self.mean,
            low=low,
            high=high,
            margin=self.margin,
            compare=self.rule.compare,
            p=self.p,
            p_sign=self.p_sign,
            verdict=verdict,
            why=why,
            exact=self.exact,
            stored=self.pairs.stored,
            rebase=enough and high < -self.rule.margin,
        )

    def _verdict(self, significant: bool) -> tuple[str, str]:
        n, planned = len(self.pairs.seeds), self.pairs.planned
        if n == 0:
            return (WARN if self.pairs.stored else INCONCLUSIVE), "no seed has a value in both arms"
        if self.pairs.stored:
            if self.mean > self.margin:
                return WARN, "is worse by more than the margin, by timings of another sitting: not decided on"
            return PASS, "by timings of another sitting: not decided on"
        if n < planned:
            # What is missing may be what fails: of the rest only harm is believed.
            return (
                (FAIL, self._said("worse"))
                if self._is_worse(significant)
                else (
                    INCONCLUSIVE,
                    f"{planned - n} of {planned} seeds are missing",
                )
            )
        if self.exact:
            return PASS, "bit-identical"
        if n < LEAST_SEEDS:
            return INCONCLUSIVE, f"{n} seeds are too few: at least {LEAST_SEEDS} are needed"
        if self.error == 0:
            if self.mean < self.margin * (1.0 - _ROUNDING):
                return PASS, "worse by less than the margin, the same in every seed"
            if self.mean > self.rule.floor:
                return FAIL, "worse by the margin or more, the same in every seed"
        if self.mean + self.reach < self.margin * (1.0 - _ROUNDING):
            return PASS, "worse by less than the margin" if self.mean > 0 else "not worse"
        if self._is_worse(significant):
            return FAIL, self._said("worse")
        return INCONCLUSIVE, "neither within the margin nor surely worse"

    def _is_worse(self, significant: bool) -> bool:
        return self.decides and significant and self.mean > self.rule.floor

    def _said(self, what: str) -> str:
        return f"surely {what} (p = {self.chance:.2g})"


def _same(one: float, two: float) -> bool:
    return one == two or (math.isnan(one) and math.isnan(two))


def _finite_mean(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return math.fsum(finite) / len(finite) if finite else math.nan


# --- non-finite values --------------------------------------------------------------------------------


def judge_nans(count: NanCount, rules: GateRules, *, scenarios: int = 1) -> NanCell:
    """The verdict on a scenario's non-finite values: none are tolerated beyond what was accepted.

    Where the baseline has some, the candidate fails when it has more than are allowed and so many would be
    rare at the baseline's rate: conditional on the sum of both, X is binomial with the share of the checks.
    """
    for name in ("values", "checks", "base_values", "base_checks"):
        if getattr(count, name) < 0:
            raise ValueError(f"{name} of {count.scenario} must be >= 0, got {getattr(count, name)}")
    chance = math.nan
    where = f"; {count.first}" if count.first else ""
    if count.values == 0:
        verdict = PASS if count.checks else INCONCLUSIVE
        why = f"none in {count.checks:,} checks" if count.checks else "nothing was checked"
    elif count.values <= rules.nan_allowance:
        verdict, why = PASS, f"{count.values} of {rules.nan_allowance} that were accepted{where}"
    elif count.base_values == 0:
        verdict, why = FAIL, f"{count.values}, and the baseline has none{where}"
    else:
        from scipy.stats import binom

        checks = max(1, count.checks), max(1, count.base_checks)
        both = count.values + count.base_values
        chance = float(binom.sf(count.values - 1, both, checks[0] / sum(checks)))
        if chance <= rules.alpha_of_a_look / scenarios:
            verdict, why = FAIL, f"{count.values}, too many beside {count.base_values} of the baseline{where}"
        elif count.values * checks[1] <= count.base_values * checks[0]:
            verdict, why = PASS, f"{count.values}, no more often than in the baseline{where}"
        else:
            verdict, why = INCONCLUSIVE, f"{count.values} beside {count.base_values} of the baseline{where}"
    return NanCell(
        scenario=count.scenario,
        values=count.values,
        checks=count.checks,
        base_values=count.base_values,
        base_checks=count.base_checks,
        bound=excluded_rate(count.checks) if count.values == 0 else math.nan,
        p=chance,
        verdict=verdict,
        why=why,
        first=count.first,
    )


def excluded_rate(checks: int, confidence: float = 0.95) -> float:
    """The rate of non-finite values that `checks` without one exclude; about 3 / checks at 95 %.

    >>> round(excluded_rate(299), 4)
    0.01
    """
    return 1.0 if checks == 0 else -math.expm1(math.log(1.0 - confidence) / checks)


# --- one training per arm -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class OneRun:
    """What a single training per arm says of a share: a hint, never a verdict but INCONCLUSIVE.

    drop: by how much the share fell, with its interval (Newcombe's hybrid score, 90 %) on as many rows as
    are worth that many independent ones.
    """

    drop: float
    low: float
    high: float
    verdict: str
    why: str


def one_run(base: float, candidate: float, rows: int, *, margin: float, correlation: float = 0.0) -> OneRun:
    """Compare two shares of one training each, over `rows` rows that agree with `correlation` (0 to 1).

    Seeds differ by more than the rows of one training show, so nothing passes or fails by it. Raises
    ValueError for a share outside [0, 1], no rows, or a correlation outside [0, 1].
    """
    for name, share in (("base", base), ("candidate", candidate), ("correlation", correlation)):
        if not 0.0 <= share <= 1.0:
            raise ValueError(f"{name} must lie in [0, 1], got {share}")
    if rows < 1:
        raise ValueError(f"rows must be >= 1, got {rows}")
    worth = rows / (1.0 + (rows - 1) * correlation)
    (base_low, base_high), (low, high) = _wilson(base, worth), _wilson(candidate, worth)
    drop = base - candidate
    bottom = drop - math.hypot(base - base_low, high - candidate)
    top = drop + math.hypot(base_high - base, candidate - low)
    said = "within" if top < margin else "beyond" if bottom > margin else "around"
    why = f"one training per arm decides nothing; the drop is {said} the margin on {worth:.0f} rows"
    return OneRun(drop, bottom, top, INCONCLUSIVE, why)


def _wilson(share: float, n: float, z: float = 1.6448536269514722) -> tuple[float, float]:
    """Wilson's score interval, 90 % of two sides."""
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


# --- as plain data ------------------------------------------------------------------------------------


def decision_view(
    decision: GateDecision,
    *,
    suite: str,
    candidate: str,
    baseline: str,
    commands: Mapping[str, str],
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """The decision as plain values, for what is printed and written; None where a number is not finite."""
    held: dict[str, Any] = _plain(asdict(decision))
    return {
        "suite": suite,
        "candidate": candidate,
        "baseline": baseline,
        "commands": dict(commands),
        "notes": list(notes),
        **held,
    }


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
