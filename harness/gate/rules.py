"""What a gate asks of each metric, and how sure it must be: plain numbers, checked once.

How they are read from a suite's file is decided in `suite`; what follows from them, in `decision`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

COMPARISONS = ("difference", "log_ratio")
DIRECTIONS = ("lower", "higher")


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricRule:
    """How one metric is compared between a baseline and a candidate, and how much worse is too much.

    compare     "difference": harm is the difference of the values; "log_ratio": of their logarithms
    worse       the direction in which the metric gets worse, "lower" or "higher"
    margin      harm that is still acceptable: in the metric's unit, or as a logarithm of a ratio
    floor       mean harm up to which nothing fails, however sure it is
    tail_guard  for shares near 1: where the baseline misses less than the margin, the margin is what it
                misses (a coverage of 99.8 % may fall to 99.6 %), but a tenth of `margin` at least
    """

    metric: str
    compare: str
    worse: str
    margin: float
    floor: float = 0.0
    tail_guard: bool = False

    def __post_init__(self) -> None:
        for name, known in (("compare", COMPARISONS), ("worse", DIRECTIONS)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} of {self.metric} must be {' or '.join(known)}, got {getattr(self, name)!r}"
                )
        if not (0.0 < self.margin < math.inf):
            raise ValueError(f"margin of {self.metric} must be > 0 and finite, got {self.margin}")
        if not (0.0 <= self.floor < self.margin):
            raise ValueError(
                f"floor of {self.metric} must be >= 0 and below its margin {self.margin}, got {self.floor}"
            )
        if self.tail_guard and (self.compare, self.worse) != ("difference", "lower"):
            raise ValueError(
                f"tail_guard of {self.metric} is for a share that is better higher, compared by difference"
            )


FIVE_PERCENT = math.log(1.05)
DEFAULT_RULES = (
    MetricRule(metric="coverage", compare="difference", worse="lower", margin=0.01, tail_guard=True),
    MetricRule(metric="accepted_error", compare="log_ratio", worse="higher", margin=FIVE_PERCENT),
    MetricRule(
        metric="step_time_ms",
        compare="log_ratio",
        worse="higher",
        margin=FIVE_PERCENT,
        floor=math.log(1.01),
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class GateRules:
    """What a gate decides by.

    metrics        a rule for each metric
    alpha          chance of a false FAIL of the whole gate that the tests are built for, over all looks
    alpha_pass     chance that one metric passes whose true harm is its margin, over all looks
    looks          numbers of seeds at which the gate decides, growing; it ends at the first that decides
    nan_allowance  unmasked non-finite values that a scenario may meet; 0 but for a baseline that has some
    """

    metrics: tuple[MetricRule, ...] = DEFAULT_RULES
    alpha: float = 0.005
    alpha_pass: float = 0.05
    looks: tuple[int, ...] = (5, 10, 20)
    nan_allowance: int = 0

    def __post_init__(self) -> None:
        if not self.metrics:
            raise ValueError("metrics must name at least one metric, got none")
        names = [rule.metric for rule in self.metrics]
        if len(set(names)) < len(names):
            raise ValueError(f"metrics must name each metric once, got {', '.join(names)}")
        for name in ("alpha", "alpha_pass"):
            if not 0.0 < getattr(self, name) < 0.5:
                raise ValueError(f"{name} must lie between 0 and 0.5, got {getattr(self, name)}")
        if not self.looks or self.looks[0] < 1 or list(self.looks) != sorted(set(self.looks)):
            raise ValueError(f"looks must be growing numbers of seeds >= 1, got {list(self.looks)}")
        if self.nan_allowance < 0:
            raise ValueError(f"nan_allowance must be >= 0, got {self.nan_allowance}")

    def rule_of(self, metric: str) -> MetricRule:
        """The rule of a metric; ValueError where there is none."""
        for rule in self.metrics:
            if rule.metric == metric:
                return rule
        known = ", ".join(rule.metric for rule in self.metrics)
        raise ValueError(f"no rule for the metric {metric!r} (known: {known})")

    @property
    def alpha_of_a_look(self) -> float:
        """The share of `alpha` that each look has."""
        return self.alpha / len(self.looks)

    @property
    def alpha_pass_of_a_look(self) -> float:
        """The share of `alpha_pass` that each look has: one that may look again must be surer each time."""
        return self.alpha_pass / len(self.looks)
