"""How many seeds a gate needs, from the spread of a pilot: exact for normal harms, by the noncentral t."""

from __future__ import annotations

import functools
import math

from harness.gate.decision import LEAST_SEEDS

MOST_SEEDS = 10_000_000


@functools.lru_cache(maxsize=4096)
def pass_chance(seeds: int, sd_over_margin: float, *, harm: float = 0.0, alpha_pass: float = 0.05) -> float:
    """The chance that one metric passes with so many seeds.

    sd_over_margin: standard deviation of a pair's harm over the margin. harm: the true mean harm over the
    margin; 0 for a candidate that is no different. alpha_pass: that of a look. With m the mean harm of n
    seeds and se its error, (m - D) / se is noncentral t, and the metric passes where it is below
    -t(n-1, 1 - alpha_pass).
    """
    _check(sd_over_margin)
    if seeds < LEAST_SEEDS:
        return 0.0
    if sd_over_margin == 0:
        return float(harm < 1.0)
    from scipy.stats import nct, t

    bar = float(t.ppf(1.0 - alpha_pass, seeds - 1))
    # The upper tail of the mirrored variable: the lower one loses its digits far out.
    away = (1.0 - harm) * math.sqrt(seeds) / sd_over_margin
    if away > 35.0:  # scipy's noncentral t has no value there, and there is nothing to compute
        return 1.0
    return float(nct.sf(bar, seeds - 1, away))


def seeds_needed(sd_over_margin: float, power: float, cells: int = 1, *, alpha_pass: float = 0.05) -> int:
    """Seeds with which a candidate that is no different passes all of `cells` metrics with chance `power`.

    Each metric is sized for 1 - (1 - power) / cells, since all of them must pass. At least `LEAST_SEEDS`.
    Raises ValueError for a spread that is negative or not finite, a power outside (0, 1), no cells, and where
    more than `MOST_SEEDS` would be needed.

    >>> [seeds_needed(1.0, power) for power in (0.8, 0.9, 0.95, 0.99)]
    [8, 11, 13, 18]
    """
    _check(sd_over_margin)
    if not 0.0 < power < 1.0:
        raise ValueError(f"power must lie between 0 and 1, got {power}")
    if cells < 1:
        raise ValueError(f"cells must be >= 1, got {cells}")
    asked = 1.0 - (1.0 - power) / cells

    def is_enough(seeds: int) -> bool:
        return pass_chance(seeds, sd_over_margin, alpha_pass=alpha_pass) >= asked

    low, high = LEAST_SEEDS - 1, LEAST_SEEDS
    while not is_enough(high):
        if high >= MOST_SEEDS:
            raise ValueError(
                f"more than {MOST_SEEDS} seeds are needed where a pair's harm spreads over "
                f"{sd_over_margin:g} margins; a wider margin would need fewer"
            )
        low, high = high, min(2 * high, MOST_SEEDS)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_enough(middle) else (middle, high)
    return high


def _check(sd_over_margin: float) -> None:
    if not 0.0 <= sd_over_margin < math.inf:
        raise ValueError(f"sd_over_margin must be >= 0 and finite, got {sd_over_margin}")
