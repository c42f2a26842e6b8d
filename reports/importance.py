"""Which knobs a metric of a run went along with: fANOVA over a random forest (Hutter et al., ICML 2014).

It describes the configs that were drawn, and decides nothing: a knob that was drawn in a narrow range, or
whose effect the search had already found, looks unimportant, and with few configs the forest sees patterns in
noise. The shares are therefore computed with several forests, and come with their range.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from reports.aggregate import Floats, group_trials
from reports.schema import CONFIG_PREFIX, config_columns, nearest_name

LEAST_CONFIGS = 8
FORESTS = 4
TREES = 64
_LOG_FROM = 30.0  # a span above which a positive knob counts by its logarithm
_BINS = 4
INACTIVE = "inactive"


class ImportanceUnavailableError(RuntimeError):
    """The library that grows the forests is not installed; the message says how to get it."""


@dataclass(frozen=True, slots=True)
class Importance:
    """What a knob goes along with by itself: a share of the variance of the metric's ranks.

    low, high: the smallest and the largest share over the forests. values: how many different ones there are.
    """

    knob: str
    share: float
    low: float
    high: float
    values: int


def knob_importance(rows: pa.Table, metric: str, *, seed: int = 0) -> list[Importance]:
    """The knobs that vary in these rows, the most important first; equal rows and seeds give equal shares.

    A config counts once, by the mean of `metric` over its seeds, and by the rank of that among configs: the
    size of a disaster should not hide what matters among the good. Configs without a finite value are left
    out. A knob that is inactive in some configs counts by quarters of its range and "inactive".

    Raises ValueError for a metric that the rows do not hold, for fewer than `LEAST_CONFIGS` configs with a
    value, and where nothing varies; ImportanceUnavailableError without scikit-learn.
    """
    trials = group_trials(rows)
    known = trials.spread_columns()
    if metric not in known:
        raise ValueError(f"the rows hold no metric {metric}{nearest_name(metric, known)}")
    configs = trials.aggregate()
    means = configs.column(f"{metric}_mean").to_numpy()
    there = np.flatnonzero(np.isfinite(means))
    if len(there) < LEAST_CONFIGS:
        raise ValueError(
            f"importance needs at least {LEAST_CONFIGS} configs with a finite {metric}, got {len(there)}"
        )
    ranks = np.unique(means[there], return_inverse=True)[1].astype(np.float64)
    held = configs.take(pa.array(there))
    knobs = {
        name.removeprefix(CONFIG_PREFIX): values
        for name in config_columns(held)
        if len(set(map(_key, values := held.column(name).to_pylist()))) > 1
    }
    if not knobs:
        raise ValueError("importance needs a knob that varies, and every config has the same")
    if len(set(ranks)) == 1:
        raise ValueError(f"importance needs a {metric} that varies, and every config has the same")
    shares = [_forest_shares(knobs, ranks, seed + place) for place in range(FORESTS)]
    found = [
        Importance(
            knob,
            float(np.mean([share[knob] for share in shares])),
            min(share[knob] for share in shares),
            max(share[knob] for share in shares),
            len(set(map(_key, values))),
        )
        for knob, values in knobs.items()
    ]
    return sorted(found, key=lambda item: (-item.share, item.knob))


def _forest_shares(knobs: Mapping[str, Sequence[Any]], ranks: Floats, seed: int) -> dict[str, float]:
    try:
        import sklearn.ensemble  # noqa: F401  (optuna's evaluator imports it without saying how to get it)
    except ImportError:
        raise ImportanceUnavailableError(
            "importance needs scikit-learn: pip install 'scm-harness[pages]'"
        ) from None
    import optuna
    from optuna.trial import create_trial

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    columns = {name: _as_parameter(values) for name, values in knobs.items()}
    distributions = {name: distribution for name, (distribution, _) in columns.items()}
    study = optuna.create_study()
    study.add_trials(
        [
            create_trial(
                value=float(rank),
                params={name: values[place] for name, (_, values) in columns.items()},
                distributions=distributions,
            )
            for place, rank in enumerate(ranks)
        ]
    )
    evaluator = optuna.importance.FanovaImportanceEvaluator(n_trees=TREES, seed=seed)
    shares = evaluator.evaluate(study)
    return {name: float(shares[name]) if math.isfinite(shares[name]) else 0.0 for name in knobs}


def _as_parameter(values: Sequence[Any]) -> tuple[Any, list[Any]]:
    """A knob's values as optuna takes them, and how they are distributed."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    told = [value for value in values if value is not None]
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in told)
    if not numbers:
        texts = [INACTIVE if value is None else str(value) for value in values]
        return CategoricalDistribution(sorted(set(texts))), texts
    held = np.asarray(told, dtype=np.float64)
    if held.min() > 0 and held.max() / held.min() > _LOG_FROM:
        held = np.log(held)
    if len(told) == len(values):
        return FloatDistribution(float(held.min()), float(held.max())), held.tolist()
    edges = np.quantile(held, np.arange(1, _BINS) / _BINS)
    bins = iter(np.searchsorted(edges, held, side="left").tolist())
    texts = [INACTIVE if value is None else f"quarter {next(bins) + 1}" for value in values]
    return CategoricalDistribution(sorted(set(texts))), texts


def _key(value: Any) -> str:
    """What tells values of a knob apart: 1 and 1.0 are the same, true and 1 are not."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return repr(value)
    return repr(float(value))
