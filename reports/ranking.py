"""From rows to ranked configs, by pure functions of a table: what rules a config out, what orders the rest.

A config is judged by all its trials. It is ruled out (`feasible` false, the reason in `why`) when more than
`failed_budget` of its trials went wrong: are missing, failed, diverged, or without a finite value in an
objective; and when its trials met more than `nan_budget` non-finite values together. A stopped trial counts
with what it reached. The remaining configs fall into Pareto fronts over the means of the objectives. A trial
that went wrong pays the worst there is in every objective, so a config never gains by one. Configs whose
charged_error is no less than what abstaining everywhere would cost are worth nothing, however fast they are
or much they answer: their fronts come after those of the others, and before those of configs with trials
that went wrong within the budget. Ruled-out configs stay in the table, below all.

In the fronts, step times in the same cell of a geometric grid (ratio 1 + `step_time_tolerance`) are equal:
the noise of a clock should not make a config optimal. The grid is fixed, since a tolerance between pairs is
not transitive, and one relative to the fastest would let a third config change how two compare. Two times on
either side of a grid line do count as different.

Robustness is a property of a config, measured after the run by `scm-harness robustness`. Where it is an
objective, configs without a score form fronts of their own, behind those of all configs with one: that
nobody examined them neither rules them out nor lets them stand above one that was.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from reports.aggregate import Bools, Floats, Ints, Trials, group_trials
from reports.evidence import RANK_COLUMNS, Blocks, resample_ranks
from reports.fragments import write_table_atomically
from reports.metrics import ROBUSTNESS, SHORTFALL, Metric, parse_metric
from reports.order import Standing, order_configs
from reports.robustness_scores import INTERVAL
from reports.schema import nearest_name

LEADERBOARD_FILE = "leaderboard.parquet"
RANKED_BY_KEY = b"scm_harness.ranked_by"
NAN_COUNT = Metric("nan_count", "lower", "values")
# Configs whose ranks are drawn anew from their seeds; those below them keep their places.
MOST_WEIGHED = 200
# Of a failed trial's message, what fits on a line beside the rest.
ERROR_CHARACTERS = 80


@dataclass(frozen=True, slots=True, kw_only=True)
class RankingOptions:
    """How configs are judged: what is allowed, what is an objective, what breaks a tie.

    nan_budget           non-finite values that a config's trials may have met together
    failed_budget        trials of a config that may go wrong
    by                   objectives of the fronts, as `reports.metrics.parse_metric` reads them
    tie_break            order inside a front: objectives and "nan_count"; None for the objectives as in `by`,
                         with nan_count before step_time_ms, or at the end
    target_coverage      one target for all configs; None measures each by the target it was trained for
    step_time_tolerance  width of the cells in which step times are equal, as a share; 0 for none
    seeds                seeds that every config must have; None for every seed in the table
    """

    nan_budget: int = 0
    failed_budget: int = 0
    by: tuple[str, ...] = (SHORTFALL, "accepted_error", "step_time_ms")
    tie_break: tuple[str, ...] | None = None
    target_coverage: float | None = None
    step_time_tolerance: float = 0.05
    seeds: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("nan_budget", "failed_budget"):
            value = getattr(self, name)
            if not value >= 0:
                raise ValueError(f"{name} must be >= 0, got {name}={value}")
        if not self.by:
            raise ValueError("by must name at least one metric, got none")
        names = [metric.name for metric in self.objectives]
        if len(set(names)) != len(names):
            raise ValueError(f"by must name each metric once, got {', '.join(self.by)}")
        _ = self.ties  # parsed here so that a wrong name is refused here
        if self.target_coverage is not None and not 0.0 <= self.target_coverage <= 1.0:
            raise ValueError(f"target_coverage must lie in [0, 1], got {self.target_coverage}")
        if not 0.0 <= self.step_time_tolerance < float("inf"):
            raise ValueError(f"step_time_tolerance must be >= 0 and finite, got {self.step_time_tolerance}")

    @property
    def objectives(self) -> tuple[Metric, ...]:
        """The metrics named by `by`."""
        return tuple(parse_metric(text) for text in self.by)

    @property
    def ties(self) -> tuple[Metric, ...]:
        """The metrics that order a front, first the one that decides first."""
        if self.tie_break is not None:
            return tuple(NAN_COUNT if text == "nan_count" else parse_metric(text) for text in self.tie_break)
        metrics = list(self.objectives)
        times = [index for index, metric in enumerate(metrics) if metric.name == "step_time_ms"]
        metrics.insert(times[0] if times else len(metrics), NAN_COUNT)
        return tuple(metrics)


def rank(
    rows: pa.Table, options: RankingOptions | None = None, robustness: pa.Table | None = None
) -> pa.Table:
    """The leaderboard: every config of the rows once, best first, whatever the order of the rows.

    Columns: rank (from 1), feasible, front (from 1; null for a config ruled out), beats_abstaining (whether
    its mean charged_error is less than its mean trivial_error; null where the rows do not say), why (empty
    where feasible); rank_low, rank_high, p_best and p_front, how sure that is (`reports.evidence`; null for
    all but the first `MOST_WEIGHED` and for runs of one seed); with `robustness` (as
    `reports.robustness_scores.read_robustness` gives it) robustness, robustness_low and robustness_high, NaN
    for a config without a score; then those of `reports.aggregate.aggregate_configs`. Inside a front, configs
    with fewer trials gone wrong come first, then `options.ties` decide, then config_id; ruled-out configs
    follow in the same order.

    Raises ValueError where the rows lack a column that the options name, where they name robustness and there
    is none, and as `aggregate_configs` does.
    """
    options = options or RankingOptions()
    trials = group_trials(rows, target_coverage=options.target_coverage, seeds=options.seeds)
    _check_metrics(trials, options, robustness)
    scores = _scores_of(trials, robustness)
    wrong = _find_wrong(trials, options)
    gone_wrong = np.logical_or.reduce([mask for _, mask in wrong])
    number_wrong = trials.count(gone_wrong) + trials.missing()
    nan_count = trials.count(trials.nan_counts())
    feasible = (number_wrong <= options.failed_budget) & (nan_count <= options.nan_budget)

    charged: dict[str, Floats] = {NAN_COUNT.name: nan_count.astype(np.float64)}
    for metric in (*options.objectives, *options.ties):
        if metric.name == ROBUSTNESS:
            charged[metric.name] = np.where(np.isfinite(scores[ROBUSTNESS]), -scores[ROBUSTNESS], np.inf)
        elif metric.name not in charged:
            charged[metric.name] = _charged_mean(trials, metric, gone_wrong)
    unscored = np.zeros(trials.configs, dtype=bool)
    if any(metric.name == ROBUSTNESS for metric in options.objectives):
        unscored = np.isinf(charged[ROBUSTNESS])
    beats = _beats_abstaining(trials)
    standing = _stand(charged, options, feasible, number_wrong, beats, unscored)
    front, order = order_configs(standing)

    why = _reasons(trials, wrong, nan_count, feasible, options)
    columns: dict[str, pa.Array | pa.ChunkedArray] = {
        "rank": pa.array(np.arange(1, trials.configs + 1)),
        "feasible": pa.array(feasible[order]),
        "front": pa.array(front[order], mask=~feasible[order]),
        "beats_abstaining": pa.array(beats[order] != 0, mask=np.isnan(beats[order])),
        "why": pa.array([why[index] for index in order], type=pa.string()),
    }
    columns |= _confidence(trials, options, charged, gone_wrong, standing, order)
    if robustness is not None:
        columns |= {name: pa.array(values[order]) for name, values in scores.items()}
    configs = trials.aggregate().take(pa.array(order))
    columns |= {name: configs.column(name) for name in configs.column_names}
    return pa.table(columns).replace_schema_metadata({RANKED_BY_KEY: _ranked_by(options)})


def write_leaderboard(run: Path, leaderboard: pa.Table) -> Path:
    """Writes the run's `leaderboard.parquet`, whole or not at all, and returns its path."""
    path = Path(run) / LEADERBOARD_FILE
    write_table_atomically(leaderboard, path)
    return path


def _check_metrics(trials: Trials, options: RankingOptions, robustness: pa.Table | None) -> None:
    known = trials.spread_columns()
    for metric in (*options.objectives, *options.ties):
        if metric.name == ROBUSTNESS:
            if robustness is None:
                raise ValueError("no config has a robustness yet: run `scm-harness robustness RUN` first")
        elif metric is not NAN_COUNT and metric.name not in known:
            raise ValueError(f"the rows hold no metric {metric.name}{nearest_name(metric.name, known)}")


def _scores_of(trials: Trials, robustness: pa.Table | None) -> dict[str, Floats]:
    """Score and interval of each config, NaN for one that has none."""
    named = {ROBUSTNESS: ROBUSTNESS, **{name: f"{ROBUSTNESS}_{name}" for name in INTERVAL}}
    scores = {name: np.full(trials.configs, np.nan) for name in named.values()}
    if robustness is None:
        return scores
    ids = trials.rows.column("config_id").take(pa.array(trials.starts)).to_pylist()
    place = {config_id: index for index, config_id in enumerate(ids)}
    for entry in robustness.to_pylist():
        if entry["config_id"] in place:
            for column, name in named.items():
                if entry[column] is not None:
                    scores[name][place[entry["config_id"]]] = entry[column]
    return scores


def _find_wrong(trials: Trials, options: RankingOptions) -> list[tuple[str, Bools]]:
    """What went wrong in which trial, each trial under its first reason."""
    failed, diverged = trials.status_is("failed"), trials.status_is("diverged")
    ended_badly = failed | diverged
    found = [("failed", failed), ("diverged", diverged)]
    found.append(("without a nan_count", trials.is_null("nan_count") & ~ended_badly))
    for metric in options.objectives:
        if metric.name == ROBUSTNESS:
            continue
        found.append(
            (f"without a finite {metric.name}", ~np.isfinite(trials.floats(metric.name)) & ~ended_badly)
        )
    return found


def _charged(trials: Trials, metric: Metric, gone_wrong: Bools) -> Floats:
    """The metric of each trial, lower being better, infinite where it went wrong."""
    values = trials.floats(metric.name)
    if metric.direction == "higher":
        values = -values
    return np.where(gone_wrong | ~np.isfinite(values), np.inf, values)


def _charged_mean(trials: Trials, metric: Metric, gone_wrong: Bools) -> Floats:
    values = _charged(trials, metric, gone_wrong)
    with np.errstate(over="ignore"):  # a mean of values near the largest float is as bad as the worst
        mean = trials.total(values) / trials.counts
    return np.where(trials.missing() > 0, np.inf, mean)


def _beats_abstaining(trials: Trials) -> Floats:
    """1 for a config that is worth more than no answer at all, 0 for one that is not, NaN where unknown.

    It is judged by its trials that know both errors; an infinite charged_error is known.
    """
    gained = _gained(trials)
    known = ~np.isnan(gained)
    with np.errstate(over="ignore", invalid="ignore"):
        total = trials.total(np.where(known, gained, 0.0))
    return np.where(trials.count(known) > 0, (total > 0).astype(np.float64), np.nan)


def _gained(trials: Trials) -> Floats:
    """By how much each trial is better than no answer at all, NaN where it does not know."""
    if not {"charged_error", "trivial_error"} <= set(trials.rows.column_names):
        return np.full(len(trials.rows), np.nan)
    charged, trivial = trials.floats("charged_error"), trials.floats("trivial_error")
    known = ~np.isnan(charged) & np.isfinite(trivial)
    with np.errstate(over="ignore", invalid="ignore"):
        return np.where(known, trivial - charged, np.nan)


def _stand(
    charged: dict[str, Floats],
    options: RankingOptions,
    feasible: Bools,
    number_wrong: Ints,
    beats: Floats,
    unscored: Bools,
) -> Standing:
    """What orders the configs, from the means of their metrics."""
    compared = [_as_compared(charged[metric.name], metric, options) for metric in options.objectives]
    return Standing(
        feasible=feasible,
        number_wrong=number_wrong,
        kind=np.where(number_wrong > 0, 4, 2 * (beats == 0) + unscored).astype(np.int64),
        objectives=np.column_stack(compared),
        ties=np.column_stack([charged[metric.name] for metric in options.ties]),
    )


def _confidence(
    trials: Trials,
    options: RankingOptions,
    charged: dict[str, Floats],
    gone_wrong: Bools,
    standing: Standing,
    order: Ints,
) -> dict[str, pa.Array]:
    """The columns that say how sure the ranks of the first configs are; null for all others."""
    first = order[: min(MOST_WEIGHED, int(standing.feasible.sum()))]
    blocks = Blocks.of_trials(trials, first)
    by_seed: dict[str, Floats] = {}
    for metric in {*options.objectives, *options.ties}:
        if metric.name in (ROBUSTNESS, NAN_COUNT.name):
            by_seed[metric.name] = np.broadcast_to(charged[metric.name][first, None], blocks.shape)
        else:
            by_seed[metric.name] = blocks.spread(_charged(trials, metric, gone_wrong), missing=np.inf)
    gained = blocks.spread(_gained(trials), missing=np.nan)

    def stand(drawn: Ints) -> Standing:
        held = {name: blocks.mean(values, drawn) for name, values in by_seed.items()}
        unscored = standing.kind[first] % 2 == 1
        beats = blocks.sign(gained, drawn)
        wrong = standing.number_wrong[first]
        return _stand(held, options, np.ones(len(first), dtype=bool), wrong, beats, unscored)

    found = resample_ranks(stand, configs=len(first), blocks=blocks.number)
    place = np.full(trials.configs, -1)
    place[first] = np.arange(len(first))
    indices = pa.array(place[order], mask=place[order] < 0)
    return {name: found.column(name).combine_chunks().take(indices) for name in RANK_COLUMNS}


def _as_compared(values: Floats, metric: Metric, options: RankingOptions) -> Floats:
    if metric.name != "step_time_ms" or options.step_time_tolerance == 0.0:
        return values
    # A time of 0 is faster than any other: log gives -inf, a cell of its own.
    with np.errstate(divide="ignore"):
        return np.floor(np.log(np.maximum(values, 0.0)) / np.log1p(options.step_time_tolerance))


def _reasons(
    trials: Trials, wrong: list[tuple[str, Bools]], nan_count: Ints, feasible: Bools, options: RankingOptions
) -> list[str]:
    seeds = trials.rows.column("seed").to_pylist()
    errors = trials.rows.column("error").to_pylist() if "error" in trials.rows.column_names else None
    missing = trials.missing()
    by_config: dict[int, list[str]] = {int(config): [] for config in np.flatnonzero(~feasible)}
    owner = np.repeat(np.arange(trials.configs), trials.counts)
    for what, mask in wrong:
        found: dict[int, list[int]] = {}
        for trial in np.flatnonzero(mask & ~feasible[owner]):
            found.setdefault(int(owner[trial]), []).append(int(trial))
        for config, indices in found.items():
            text = f"{_seeds([seeds[index] for index in indices])} {what}"
            message = errors[indices[0]] if errors and what == "failed" else None
            by_config[config].append(text + (f" ({_one_line(message)})" if message else ""))
    for config, reasons in by_config.items():
        if missing[config]:
            reasons.append(f"{_seeds(trials.missing_seeds(config))} missing")
        if nan_count[config] > options.nan_budget:
            reasons.append(f"{nan_count[config]} non-finite values (budget {options.nan_budget})")
    return ["; ".join(by_config.get(config, [])) for config in range(trials.configs)]


def _seeds(seeds: list[int]) -> str:
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"


def _one_line(message: str) -> str:
    line = " ".join(message.split())
    return line if len(line) <= ERROR_CHARACTERS else line[: ERROR_CHARACTERS - 1] + "…"


def _ranked_by(options: RankingOptions) -> bytes:
    said = {
        "by": [metric.name for metric in options.objectives],
        "ties": [metric.name for metric in options.ties],
        "nan_budget": options.nan_budget,
        "failed_budget": options.failed_budget,
        "target_coverage": options.target_coverage,
        "step_time_tolerance": options.step_time_tolerance,
    }
    return json.dumps(said).encode()
