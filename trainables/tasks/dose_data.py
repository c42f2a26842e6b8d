"""Noisy dose-response curves whose IC50 may lie outside the measured doses, and how calls are scored.

Only NumPy: what a curve is, how curves are drawn, and the three-way score (below, in range, above).
The task that trains on them is `trainables.tasks.dose`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

BELOW, IN_RANGE, ABOVE = 0, 1, 2
_CLASSES = (BELOW, IN_RANGE, ABOVE)
LOG_DOSES: Floats = np.linspace(-9.0, -5.0, 10)
LOG_LOW, LOG_HIGH = -9.0, -5.0
# Between the regimes lie gaps of 1.4 decades, so that being in range is never a matter of noise.
REGIMES: tuple[tuple[float, float], ...] = ((-13.0, -10.2), (-8.8, -5.2), (-3.8, -1.0))
NULL_SHARE = 0.10
NOISE = 0.05
SLOPES = (0.8, 1.5)


@dataclass(frozen=True, slots=True)
class DoseRows:
    """Curves `x` (N, 20) as interleaved (log10 dose, response), and answers `y` (N, 5), both float32.

    The columns of `y`: log10 IC50, class (0 below, 1 in range, 2 above), log10 IC50 clamped to the doses,
    and the projective target (Y_n, Y_d): (-1, 0) below, (log10 IC50, 1) in range, (+1, 0) above.
    """

    x: npt.NDArray[np.float32]
    y: npt.NDArray[np.float32]


def hill(
    dose: npt.ArrayLike, ic50: npt.ArrayLike, slope: npt.ArrayLike, e_min: npt.ArrayLike, e_max: npt.ArrayLike
) -> Floats:
    """Response E(C) = Emin + (Emax - Emin) / (1 + (C / IC50)^h), in float64."""
    ratio = np.asarray(dose, dtype=np.float64) / np.asarray(ic50, dtype=np.float64)
    low, high = np.asarray(e_min, dtype=np.float64), np.asarray(e_max, dtype=np.float64)
    return np.asarray(low + (high - low) / (1.0 + ratio ** np.asarray(slope, dtype=np.float64)))


def draw_dose_rows(
    count: int,
    rng: np.random.Generator,
    *,
    balanced: bool = False,
    slopes: tuple[float, float] = SLOPES,
    noise: float = NOISE,
) -> DoseRows:
    """Draw `count` curves; `balanced` makes the three regimes equally frequent (to within one curve).

    One curve in ten has no effect at all: it is flat near zero and is labelled above, whatever its regime
    was. It looks like a saturated curve of the regime below, so no rule reaches a macro-F1 over 0.9048.
    """
    regime = rng.permutation(np.arange(count) % 3) if balanced else rng.integers(0, 3, size=count)
    low, high = np.asarray(REGIMES).T
    log_ic50 = rng.uniform(low[regime], high[regime])
    return _observe(log_ic50, regime, rng, slopes=slopes, noise=noise)


def draw_dose_rows_near_limits(count: int, within: float, rng: np.random.Generator) -> DoseRows:
    """Draw `count` curves whose IC50 lies within `within` decades of a limit of the doses, on either side.

    Training leaves a gap there: a curve is in range or not by the rule that says so, not by a wide margin.
    """
    limit = np.where(rng.random(count) < 0.5, LOG_LOW, LOG_HIGH)
    log_ic50 = limit + rng.uniform(-within, within, size=count)
    regime = np.select([log_ic50 < LOG_LOW, log_ic50 <= LOG_HIGH], [BELOW, IN_RANGE], default=ABOVE)
    return _observe(log_ic50, regime, rng, slopes=SLOPES, noise=NOISE)


def distance_to_bottom(rows: DoseRows) -> Floats:
    """Decades (N,) from the IC50 of a curve in range to the nearest limit of the doses; 0 for any other."""
    log_ic50 = rows.y[:, 0].astype(np.float64)
    inside = np.minimum(log_ic50 - LOG_LOW, LOG_HIGH - log_ic50)
    return np.where(rows.y[:, 1] == IN_RANGE, np.maximum(inside, 0.0), 0.0)


def _observe(
    log_ic50: Floats,
    regime: npt.NDArray[np.int64],
    rng: np.random.Generator,
    *,
    slopes: tuple[float, float],
    noise: float,
) -> DoseRows:
    count = log_ic50.size
    slope = rng.uniform(*slopes, size=count)
    e_min = rng.normal(0.0, 0.02, size=count)
    e_max = rng.normal(1.0, 0.02, size=count)
    null = rng.random(count) < NULL_SHARE
    e_max = np.where(null, e_min + rng.normal(0.0, 0.01, size=count), e_max)
    label = np.where(null, ABOVE, regime)

    clean = hill(10.0**LOG_DOSES, 10.0 ** log_ic50[:, None], slope[:, None], e_min[:, None], e_max[:, None])
    observed = clean + rng.normal(0.0, noise, size=clean.shape)
    x = np.stack([np.broadcast_to(LOG_DOSES, clean.shape), observed], axis=-1).reshape(count, -1)

    in_range = label == IN_RANGE
    clamped = np.select([label == BELOW, in_range], [LOG_LOW, log_ic50], default=LOG_HIGH)
    y_n = np.select([label == BELOW, in_range], [-1.0, log_ic50], default=1.0)
    y = np.stack([log_ic50, label, clamped, y_n, in_range], axis=-1)
    return DoseRows(x.astype(np.float32), y.astype(np.float32))


def three_way_scores(truth: npt.ArrayLike, called: npt.ArrayLike) -> dict[str, float]:
    """Precision, recall and F1 of each class, their macro-F1, and the two rates of confusing in and out.

    Classes are 0 below, 1 in range, 2 above; any other called value counts as a call of no class. A class
    that is neither called nor true scores 0. `false_censored_rate_on_in_range` is the share of in-range
    curves called out of range, `false_in_range_rate_on_censored` the reverse; nan where no such curve is.
    """
    t, c = np.asarray(truth).ravel(), np.asarray(called).ravel()
    if t.shape != c.shape:
        raise ValueError(f"truth and called must have equal lengths, got {t.size} and {c.size}")
    return many_three_way_scores(t, c[None])[0]


def many_three_way_scores(truth: npt.ArrayLike, called: npt.ArrayLike) -> list[dict[str, float]]:
    """`three_way_scores` of many callers, (callers, curves), on the same curves, (curves,)."""
    t, c = (
        np.where(np.isin(labels, _CLASSES), labels, len(_CLASSES)).astype(np.int64)
        for labels in (truth, called)
    )
    kinds = len(_CLASSES) + 1
    at = (np.arange(len(c))[:, None] * kinds + t) * kinds + c
    counts = np.bincount(at.ravel(), minlength=len(c) * kinds**2).reshape(len(c), kinds, kinds)
    return [_scores_of_counts(own) for own in counts.tolist()]


def _scores_of_counts(counts: list[list[int]]) -> dict[str, float]:
    """The scores of one caller: `counts` is how many curves of each class (and of none) it called what."""
    true = [float(sum(row)) for row in counts]
    called = [float(sum(column)) for column in zip(*counts, strict=True)]
    scores: dict[str, float] = {}
    for label in _CLASSES:
        hits = float(counts[label][label])
        precision = _share(hits, called[label], empty=0.0)
        recall = _share(hits, true[label], empty=0.0)
        scores[f"prec_c{label}"], scores[f"rec_c{label}"] = precision, recall
        scores[f"f1_c{label}"] = _share(2.0 * precision * recall, precision + recall, empty=0.0)
    scores["macro_f1"] = sum(scores[f"f1_c{label}"] for label in _CLASSES) / 3.0
    nan, inside, hits = float("nan"), true[IN_RANGE], float(counts[IN_RANGE][IN_RANGE])
    scores["false_censored_rate_on_in_range"] = _share(inside - hits, inside, empty=nan)
    scores["false_in_range_rate_on_censored"] = _share(called[IN_RANGE] - hits, sum(true) - inside, empty=nan)
    return scores


def _share(part: float, whole: float, *, empty: float) -> float:
    return part / whole if whole > 0.0 else empty
