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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from reports.aggregate import Bools, Floats, Ints, Outcomes, Trials, group_trials, spread_columns
from reports.evidence import RANK_COLUMNS, Blocks, resample_ranks
from reports.fragments import write_table_atomically
from reports.fronts import Standing, order_configs
from reports.metrics import ROBUSTNESS, SHORTFALL, Metric, parse_metric
from reports.robustness_scores import INTERVAL
from reports.schema import TRIAL_STATUSES, nearest_name

LEADERBOARD_FILE = "leaderboard.parquet"
RANKED_BY_KEY = b"scm_harness.ranked_by"
WHOLE_RUN_KEY = b"scm_harness.whole_run"
NAN_COUNT = Metric("nan_count", "lower", "values")
# What went wrong in a trial, before what its objectives lack; one bit each.
ENDINGS = ("failed", "diverged", "without a nan_count")
MOST_OBJECTIVES = 60  # so that the bits fit in 64
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
        if len(self.by) > MOST_OBJECTIVES:
            raise ValueError(f"by must name at most {MOST_OBJECTIVES} metrics, got {len(self.by)}")
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
    check_metrics(rows.schema, options, robustness)
    values = judge_trials(trials, options)
    scores = find_scores(trials, robustness)
    judged = judge_configs(
        values.__getitem__, trials.starts, trials.counts, trials.missing(), scores[ROBUSTNESS], options
    )
    return make_leaderboard(trials, judged, decide(judged, options), options, robustness)


@dataclass(frozen=True, slots=True)
class Judged:
    """What decides the place of each config: arrays per config, ordered by config_id.

    number_wrong  trials that went wrong, those that are missing among them
    missing       seeds without a trial
    wrong         bits of what went wrong in any of its trials, as `reasons` lists them
    nan_count     non-finite values that its trials met together
    charged       by metric, the mean that it is compared by, lower being better, inf where a trial went wrong
    beats         1 where it is worth more than abstaining everywhere, 0 where it is not, NaN where unknown
    """

    number_wrong: Ints
    missing: Ints
    wrong: npt.NDArray[np.unsignedinteger]
    nan_count: Ints
    charged: dict[str, Floats]
    beats: Floats

    def take(self, configs: Ints) -> Judged:
        """The same of some configs."""
        return Judged(
            number_wrong=self.number_wrong[configs],
            missing=self.missing[configs],
            wrong=self.wrong[configs],
            nan_count=self.nan_count[configs],
            charged={name: values[configs] for name, values in self.charged.items()},
            beats=self.beats[configs],
        )


@dataclass(frozen=True, slots=True)
class Decision:
    """Which configs stand where: `feasible` and `front` (from 1; 0 for none) of each, `order` best first."""

    feasible: Bools
    front: Ints
    order: Ints


def reasons(options: RankingOptions) -> list[str]:
    """What can go wrong in a trial, in the order of the bits of `wrong`."""
    objectives = [metric.name for metric in options.objectives if metric.name != ROBUSTNESS]
    return [*ENDINGS, *(f"without a finite {name}" for name in objectives)]


def trial_value_types(schema: pa.Schema, options: RankingOptions) -> dict[str, npt.DTypeLike]:
    """The arrays that `judge_trials` makes of rows with these columns, by name."""
    bits = np.min_scalar_type((1 << len(reasons(options))) - 1)
    types: dict[str, npt.DTypeLike] = {"wrong": bits, NAN_COUNT.name: np.dtype(np.int64)}
    if {"charged_error", "trivial_error"} <= set(schema.names):
        types["gained"] = np.dtype(np.float64)
    for metric in (*options.objectives, *options.ties):
        if metric.name not in (ROBUSTNESS, NAN_COUNT.name):
            types[metric.name] = np.dtype(np.float64)
    return types


def judge_trials(outcomes: Outcomes, options: RankingOptions) -> dict[str, npt.NDArray[Any]]:
    """What a config is judged by, per trial: each array depends on the trial's own row alone.

    wrong         bits of what went wrong, as `reasons` lists them; 0 where nothing did
    nan_count     0 where the row does not say
    gained        what its charged_error is less than that of abstaining; NaN where the row does not say
    <metric>      of every objective and tie-break, lower being better; inf where the trial went wrong
    """
    types = trial_value_types(outcomes.rows.schema, options)
    failed, diverged = outcomes.status_is("failed"), outcomes.status_is("diverged")
    ended_badly = failed | diverged
    masks = [failed, diverged, outcomes.is_null("nan_count") & ~ended_badly]
    measured = {name: outcomes.floats(name) for name in types if name not in ("wrong", "nan_count", "gained")}
    finite = {name: np.isfinite(values) for name, values in measured.items()}
    masks += [
        ~finite[metric.name] & ~ended_badly for metric in options.objectives if metric.name != ROBUSTNESS
    ]
    wrong = np.zeros(len(failed), dtype=types["wrong"])
    for bit, mask in enumerate(masks):
        wrong |= mask.astype(wrong.dtype) << wrong.dtype.type(bit)
    values: dict[str, npt.NDArray[Any]] = {"wrong": wrong, "nan_count": outcomes.nan_counts()}
    if "gained" in types:
        charged, trivial = outcomes.floats("charged_error"), outcomes.floats("trivial_error")
        known = ~np.isnan(charged) & np.isfinite(trivial)
        with np.errstate(over="ignore", invalid="ignore"):
            values["gained"] = np.where(known, trivial - charged, np.nan)
    higher = {m.name for m in (*options.objectives, *options.ties) if m.direction == "higher"}
    for name, numbers in measured.items():
        signed = -numbers if name in higher else numbers
        values[name] = np.where((wrong != 0) | ~finite[name], np.inf, signed)
    return values


def judge_configs(
    values: Callable[[str], npt.NDArray[Any]],
    starts: Ints,
    counts: Ints,
    missing: Ints,
    robustness: Floats,
    options: RankingOptions,
) -> Judged:
    """What a config is judged by, of what its trials are: sums and means in the order in which they stand.

    `values` gives, once for each name, the array that `judge_trials` made, config by config from `starts` on;
    it is asked for one after the other, so that they need not be held together. `robustness` is NaN for a
    config without a score.
    """
    bits = values("wrong")
    wrong = np.bitwise_or.reduceat(bits, starts)
    number_wrong = np.add.reduceat((bits != 0).astype(np.int64), starts) + missing
    nan_count = np.add.reduceat(values(NAN_COUNT.name), starts)
    charged: dict[str, Floats] = {NAN_COUNT.name: nan_count.astype(np.float64)}
    for metric in (*options.objectives, *options.ties):
        if metric.name in charged:
            continue
        if metric.name == ROBUSTNESS:
            charged[metric.name] = np.where(np.isfinite(robustness), -robustness, np.inf)
            continue
        with np.errstate(over="ignore"):  # a mean of values near the largest float is as bad as the worst
            mean = np.add.reduceat(values(metric.name), starts) / counts
        charged[metric.name] = np.where(missing > 0, np.inf, mean)
    return Judged(
        number_wrong=number_wrong,
        missing=missing,
        wrong=wrong,
        nan_count=nan_count,
        charged=charged,
        beats=_beats_abstaining(values, starts),
    )


def decide(judged: Judged, options: RankingOptions, most: int | None = None) -> Decision:
    """The place of every config; with `most`, of as many, the best, each where it always is.

    With `most`, `order` ends after that many, and `front` may be 0 for configs that are not among them.
    """
    feasible = (judged.number_wrong <= options.failed_budget) & (judged.nan_count <= options.nan_budget)
    compared = [_as_compared(judged.charged[metric.name], metric, options) for metric in options.objectives]
    unscored = np.zeros(len(feasible), dtype=bool)
    if any(metric.name == ROBUSTNESS for metric in options.objectives):
        unscored = np.isinf(judged.charged[ROBUSTNESS])
    standing = Standing(
        feasible=feasible,
        number_wrong=judged.number_wrong,
        kind=np.where(judged.number_wrong > 0, 4, 2 * (judged.beats == 0) + unscored).astype(np.int64),
        objectives=compared,
        ties=[judged.charged[metric.name] for metric in options.ties],
    )
    front, order = order_configs(standing, most)
    return Decision(feasible=feasible, front=front, order=order)


def make_leaderboard(
    trials: Trials,
    judged: Judged,
    decision: Decision,
    options: RankingOptions,
    robustness: pa.Table | None = None,
) -> pa.Table:
    """The leaderboard of these configs, one row each in the order decided; see `rank` for its columns.

    Every column of a leaderboard is put in here, whichever way its configs were judged. Configs of all three
    arguments are the same, ordered by config_id, and best first they are the best of their run.
    """
    order, feasible, front, beats = decision.order, decision.feasible, decision.front, judged.beats
    why = _reasons(trials, judged, feasible, options)
    columns: dict[str, pa.Array | pa.ChunkedArray] = {
        "rank": pa.array(np.arange(1, len(order) + 1)),
        "feasible": pa.array(feasible[order]),
        "front": pa.array(front[order], mask=~feasible[order]),
        "beats_abstaining": pa.array(beats[order] != 0, mask=np.isnan(beats[order])),
        "why": pa.array([why[index] for index in order], type=pa.string()),
    }
    columns |= _confidence(trials, judged, decision, options)
    if robustness is not None:
        scores = find_scores(trials, robustness)
        columns |= {name: pa.array(values[order]) for name, values in scores.items()}
    configs = trials.aggregate().take(pa.array(order))
    columns |= {name: configs.column(name) for name in configs.column_names}
    return pa.table(columns).replace_schema_metadata({RANKED_BY_KEY: _ranked_by(options)})


def _confidence(
    trials: Trials, judged: Judged, decision: Decision, options: RankingOptions
) -> dict[str, pa.Array]:
    """The columns that say how sure the ranks of the first configs are; null for all others."""
    order = decision.order
    first = order[decision.feasible[order]][:MOST_WEIGHED]
    blocks = Blocks.of_trials(trials, first)
    held = judged.take(first)
    values = judge_trials(trials, options)
    by_seed = {
        name: blocks.spread(values[name], missing=np.inf)
        for name in held.charged
        if name not in (ROBUSTNESS, NAN_COUNT.name)
    }
    gained = blocks.spread(values.get("gained", np.full(len(trials.rows), np.nan)), missing=np.nan)

    def arrange(drawn: Ints) -> tuple[Ints, Ints]:
        charged = held.charged | {name: blocks.mean(each, drawn) for name, each in by_seed.items()}
        found = decide(replace(held, charged=charged, beats=blocks.sign(gained, drawn)), options)
        return found.front, found.order

    sure = resample_ranks(arrange, configs=len(first), blocks=blocks.number)
    place = np.full(trials.configs, -1)
    place[first] = np.arange(len(first))
    indices = pa.array(place[order], mask=place[order] < 0)
    return {name: sure.column(name).combine_chunks().take(indices) for name in RANK_COLUMNS}


def run_totals(leaderboard: pa.Table) -> dict[str, Any]:
    """What a leaderboard says of its whole run: configs, feasible, n_trials, n_<status>, n_missing.

    `ruled_out` is empty where the leaderboard holds every config, as its rows then say why. For that of a
    large run (`reports.large_runs`) it lists what ruled configs out: `why`, how many `configs` it met (some
    met several), and the id of one of them as `such_as`.
    """
    said = (leaderboard.schema.metadata or {}).get(WHOLE_RUN_KEY)
    if said is not None:
        return dict(json.loads(said))
    summed = ("n_trials", *(f"n_{status}" for status in TRIAL_STATUSES), "n_missing")
    return {
        "configs": len(leaderboard),
        "feasible": pc.sum(leaderboard.column("feasible")).as_py() or 0,
        **{name: pc.sum(leaderboard.column(name)).as_py() or 0 for name in summed},
        "ruled_out": [],
    }


def write_leaderboard(run: Path, leaderboard: pa.Table) -> Path:
    """Writes the run's `leaderboard.parquet`, whole or not at all, and returns its path."""
    path = Path(run) / LEADERBOARD_FILE
    write_table_atomically(leaderboard, path)
    return path


def check_metrics(schema: pa.Schema, options: RankingOptions, robustness: pa.Table | None) -> None:
    """ValueError where rows with these columns, or the scores, lack a metric that the options name."""
    known = spread_columns(schema)
    for metric in (*options.objectives, *options.ties):
        if metric.name == ROBUSTNESS:
            if robustness is None:
                raise ValueError("no config has a robustness yet: run `scm-harness robustness RUN` first")
        elif metric is not NAN_COUNT and metric.name not in known:
            raise ValueError(f"the rows hold no metric {metric.name}{nearest_name(metric.name, known)}")


def find_scores(trials: Trials, robustness: pa.Table | None) -> dict[str, Floats]:
    """Score and interval of each config, NaN for one that has none."""
    names = (ROBUSTNESS, *(f"{ROBUSTNESS}_{name}" for name in INTERVAL))
    if robustness is None:
        return {name: np.full(trials.configs, np.nan) for name in names}
    ids = trials.rows.column("config_id").take(pa.array(trials.starts)).to_pylist()
    place = {config_id: index for index, config_id in enumerate(ids)}
    places = [place.get(config_id, -1) for config_id in robustness.column("config_id").to_pylist()]
    columns = [robustness.column(name) for name in (ROBUSTNESS, *INTERVAL)]
    return {
        name: spread_scores(column, places, trials.configs)
        for name, column in zip(names, columns, strict=True)
    }


def spread_scores(scores: pa.ChunkedArray, places: Sequence[int], configs: int) -> Floats:
    """The scores as an array over configs, each at its place (-1 for none), NaN elsewhere."""
    spread = np.full(configs, np.nan)
    for score, place in zip(scores.to_pylist(), places, strict=True):
        if place >= 0 and score is not None:
            spread[place] = score
    return spread


def _beats_abstaining(values: Callable[[str], npt.NDArray[Any]], starts: Ints) -> Floats:
    """Judged by the trials that know both errors; an infinite charged_error is known."""
    try:
        gained = values("gained")
    except KeyError:  # rows of a version that measured neither
        return np.full(len(starts), np.nan)
    known = ~np.isnan(gained)
    with np.errstate(over="ignore", invalid="ignore"):
        total = np.add.reduceat(np.where(known, gained, 0.0), starts)
    number = np.add.reduceat(known.astype(np.int64), starts)
    return np.where(number > 0, (total > 0).astype(np.float64), np.nan)


def _as_compared(values: Floats, metric: Metric, options: RankingOptions) -> Floats:
    if metric.name != "step_time_ms" or options.step_time_tolerance == 0.0:
        return values
    # A time of 0 is faster than any other: log gives -inf, a cell of its own.
    with np.errstate(divide="ignore"):
        return np.floor(np.log(np.maximum(values, 0.0)) / np.log1p(options.step_time_tolerance))


def _reasons(trials: Trials, judged: Judged, feasible: Bools, options: RankingOptions) -> list[str]:
    """Why each config is ruled out, each trial under all that went wrong in it; empty for a feasible one."""
    seeds = trials.rows.column("seed").to_pylist()
    errors = trials.rows.column("error").to_pylist() if "error" in trials.rows.column_names else None
    by_config: dict[int, list[str]] = {int(config): [] for config in np.flatnonzero(~feasible)}
    owner = np.repeat(np.arange(trials.configs), trials.counts)
    wrong = judge_trials(trials, options)["wrong"]
    for bit, what in enumerate(reasons(options)):
        found: dict[int, list[int]] = {}
        for trial in np.flatnonzero(
            (wrong >> wrong.dtype.type(bit) & wrong.dtype.type(1)) & ~feasible[owner]
        ):
            found.setdefault(int(owner[trial]), []).append(int(trial))
        for config, indices in found.items():
            text = f"{_seeds([seeds[index] for index in indices])} {what}"
            message = errors[indices[0]] if errors and what == "failed" else None
            by_config[config].append(text + (f" ({_one_line(message)})" if message else ""))
    for config, said in by_config.items():
        if judged.missing[config]:
            said.append(f"{_seeds(trials.missing_seeds(config))} missing")
        if judged.nan_count[config] > options.nan_budget:
            said.append(f"{judged.nan_count[config]} non-finite values (budget {options.nan_budget})")
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
