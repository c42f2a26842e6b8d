"""The error of a model's answers against their share, as the threshold on |Q| lets more of them through.

One curve per trained model, on a split: it starts where every sound answer is given, and each further point
leaves out those with the smallest |Q|. A threshold that orders answers well has a curve that falls with
coverage; one that does not has a flat one. Which split, and who is told, is decided elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from scm.data import Split
from scm.trial import Decoded
from trainables.scoring import raw_scores, scores_together

if TYPE_CHECKING:
    from scm.trial_config import TrialConfig
    from trainables.tasks.protocol import Task

LEVELS = 12
FEW_LEVELS = 5  # where each point is a call of the task's metrics, at the end of every trial
CURVE_KEYS = ("curve_coverage", "curve_error", "curve_area")
_MOST_KEPT = 0.95  # the last point keeps a twentieth of the answers; of fewer, an error says little
_ELEMENTS = 2_000_000  # that are scored at once

Point = tuple[float, float]


def smallest_tau(dtype: torch.dtype) -> float:
    """A threshold that rejects Q = 0 alone, and denormal numbers."""
    return float(torch.finfo(dtype).tiny)


def empty_curve() -> dict[str, Any]:
    """The columns of a model of which no curve is known."""
    return {"curve_coverage": None, "curve_error": None, "curve_area": math.nan}


def curve_columns(points: Iterable[Point]) -> dict[str, Any]:
    """A curve as columns of a row: coverages, growing, the error at each, and the mean error over them."""
    coverage, error = risk_curve(points)
    if not coverage:
        return empty_curve()
    return dict(zip(CURVE_KEYS, (coverage, error, curve_area(coverage, error)), strict=True))


def risk_points(
    task: Task,
    split: Split,
    configs: Sequence[TrialConfig],
    decoded: Decoded,
    *,
    levels: int | None = None,
) -> list[list[Point]]:
    """(coverage, accepted_error) of each of many models at `levels` thresholds on its own |Q|.

    Without `levels` there are `LEVELS` of them where the task scores many models in one call, else
    `FEW_LEVELS`. decoded: their answers on the split at `smallest_tau`, the models before the rows. A model
    whose answers the task cannot score has no points.
    """
    if levels is None:
        levels = LEVELS if scores_together(task) else FEW_LEVELS
    taus = _taus(decoded, levels)
    pairs = [(model, tau) for model, own in enumerate(taus) for tau in own]
    found: list[list[Point]] = [[] for _ in configs]
    at_once = max(1, _ELEMENTS // max(1, decoded.decoded[0].numel()))
    for first in range(0, len(pairs), at_once):
        part = pairs[first : first + at_once]
        answers = _at(decoded, part)
        scores = raw_scores(task, split, [configs[model] for model, _ in part], answers)
        shares = 1.0 - answers.bottom.flatten(1).to(torch.float64).mean(1)
        for (model, _), score, share in zip(part, scores, shares.tolist(), strict=True):
            error = score.get("accepted_error") if isinstance(score, dict) else None
            if isinstance(error, (int, float)):  # of 3,000 dicts, checking all is dearer than making them
                found[model].append((share, float(error)))
    return found


def risk_curve(points: Iterable[Point]) -> tuple[list[float], list[float]]:
    """Coverages, growing, and the error at each; points without an error say nothing and are left out.

    Of several points of one coverage the largest error stands: a threshold cannot choose among them.

    >>> risk_curve([(1.0, 2.0), (0.5, 1.0), (0.5, 1.5), (0.1, float("nan"))])
    ([0.5, 1.0], [1.5, 2.0])
    """
    worst: dict[float, float] = {}
    for coverage, error in points:
        if not (math.isnan(coverage) or math.isnan(error)):
            worst[coverage] = max(error, worst.get(coverage, -math.inf))
    coverages = sorted(worst)
    return coverages, [worst[coverage] for coverage in coverages]


def curve_area(coverage: Sequence[float], error: Sequence[float]) -> float:
    """The mean error over the coverages that a curve spans (trapezoids over its width); NaN without points.

    >>> curve_area([0.5, 1.0], [1.0, 2.0])
    1.5
    """
    if not coverage:
        return math.nan
    x, y = np.asarray(coverage, dtype=np.float64), np.asarray(error, dtype=np.float64)
    if x[-1] == x[0]:
        return float(y.mean())
    with np.errstate(over="ignore"):
        return float(np.sum(np.diff(x) / (x[-1] - x[0]) * (y[1:] / 2 + y[:-1] / 2)))


def _taus(decoded: Decoded, levels: int) -> list[list[float]]:
    """The thresholds of each model: quantiles of the |Q| of its answers, each of them one that occurs."""
    bottom = decoded.bottom.flatten(1)
    # Sorted together: a call of np.quantile for each model takes longer than scoring them all.
    placed = decoded.q_abs.flatten(1).to(torch.float64).masked_fill(bottom, math.inf).sort(1).values.numpy()
    answered = (~bottom).sum(1).numpy()
    shares = np.linspace(0.0, _MOST_KEPT, levels)
    places = np.floor(shares * np.maximum(answered - 1, 0)[:, None] + 1e-9).astype(np.int64)
    chosen = np.take_along_axis(placed, places, axis=1)
    return [np.unique(own).tolist() if count else [] for own, count in zip(chosen, answered, strict=True)]


def _at(decoded: Decoded, pairs: Sequence[tuple[int, float]]) -> Decoded:
    """The answers of each pair's model that have |Q| at its threshold or above."""
    place = torch.tensor([model for model, _ in pairs])
    taus = torch.tensor([tau for _, tau in pairs], dtype=torch.float64)
    values, bottom, fault, q_abs = (item.index_select(0, place) for item in decoded[:4])
    taus = taus.view(-1, *[1] * (q_abs.ndim - 1))
    bottom = bottom | (q_abs.to(torch.float64) < taus)
    hidden = bottom.view(*bottom.shape, *[1] * (values.ndim - bottom.ndim))  # one |Q| for all of a vector
    numerator = None if decoded.numerator is None else decoded.numerator.index_select(0, place)
    return Decoded(values.masked_fill(hidden, math.nan), bottom, fault, q_abs, numerator)
