"""Settings over several scenarios: rows of one or more runs to one ranking of what all scenarios have tried.

A scenario is a task with its parameters; settings are a config without its task (`scenario` and `settings_id`
of a row). Figures of different scenarios have no common unit, so each is taken within its scenario: shares by
their difference, errors and times by the logarithm of their ratio; a ratio counts alike wherever it is met.
What is reported is relative to a reference of the scenario; no choice of it changes the order, since it moves
all settings of a scenario alike.

What rules settings out is what rules a config out (`reports.ranking`), in any scenario; so does having no
trial in one. The others fall into Pareto fronts over the means over scenarios, each weighing the same.
Inside a front the regret in the worst scenario decides, of the metrics that break ties in their order: by how
much the settings are behind the best of that scenario. How sure a rank is comes from drawing blocks, each a
(scenario, seed) pair, from those of all scenarios together: settings whose place differs from scenario to
scenario are less sure of it, though every seed agrees.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from reports.aggregate import Bools, Floats, Ints, Trials, group_trials
from reports.evidence import RANK_COLUMNS, RESAMPLES, Blocks, resample_ranks
from reports.fronts import Standing, order_configs
from reports.metrics import ROBUSTNESS, Metric
from reports.ranking import MOST_WEIGHED, NAN_COUNT, RankingOptions, rank
from reports.schema import CONFIG_PREFIX, config_columns

SCENARIOS_KEY = b"scm_harness.scenarios"
DIFFERENCE, LOG_RATIO = "difference", "log ratio"
# A value below this share of the scenario's median counts as this share: an error of 0 is no infinite gain.
LEAST_RATIO = 1e-6
SAME_DIGITS = 10  # logarithms and shares that differ by less than rounding makes of equal ones are equal


def rank_scenarios(
    tables: Sequence[pa.Table],
    options: RankingOptions | None = None,
    *,
    seeds: Mapping[str, Sequence[int]] | None = None,
    reference: str | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> pa.Table:
    """The settings of all these rows once each, best first, whatever the order of the tables and their rows.

    `seeds` names those that every config must have in a scenario; without, `options.seeds`, else all seeds of
    the scenario's rows. `reference`: the settings_id that figures are relative to; where it is None, unknown
    or ruled out, the median over the settings that are not. `resamples` and `seed` are those of the draws of
    blocks, where there are too many to take each.

    Columns: rank (from 1), feasible, front, beats_abstaining (in every scenario), why, settings_id; rank_low,
    rank_high, p_best, p_front, as `reports.ranking.rank` has them, over (scenario, seed) blocks; mean_rank
    and worst_rank, over the ranks by the same rules among the settings that are not ruled out, scenario by
    scenario; for each objective `<metric>`, the mean over scenarios relative to the reference (a difference,
    or the logarithm of a ratio; lower is better), `<metric>_regret`, how far behind the best of its worst
    scenario, and that scenario, `<metric>_worst`; n_trials, n_missing, nan_count; for each scenario
    `<metric>@<scenario>`, the plain mean over its seeds, and `config_id@<scenario>`, by which its rows are
    found; `config.<knob>`. Figures of settings that were ruled out are null. The metadata hold, under
    `SCENARIOS_KEY` as JSON, the scenarios, how each metric was compared, the objectives and the reference.

    Raises ValueError where no settings were tried in all scenarios, where one scenario and seed has data of
    two kinds, where the objectives name robustness (which is measured within one run), and as
    `reports.ranking.rank` does.
    """
    options = options or RankingOptions()
    if any(metric.name == ROBUSTNESS for metric in (*options.objectives, *options.ties)):
        raise ValueError(
            "robustness is measured within one run; settings cannot be ranked by it over several"
        )
    rows = _with_settings(tables)
    held = [_judge(name, rows, options, seeds) for name in sorted(set(rows.column("scenario").to_pylist()))]
    every = sorted(set().union(*(one.place for one in held)))
    shared = [settings for settings in every if all(settings in one.place for one in held)]
    if not shared:
        number = ", ".join(f"{one.name} ({len(one.place)})" for one in held)
        raise ValueError(
            f"no settings were tried in all of the {len(held)} scenarios {number}; give the runs the same "
            "space and a search that does not learn (random, sobol or grid) with the same seed"
        )
    feasible = np.asarray([all(one.allows(settings) for one in held) for settings in every])
    figures = _Figures.of_scenarios(held, options, [every[at] for at in np.flatnonzero(feasible)])
    return _leaderboard(held, figures, every, options, reference, (resamples, seed))


# --- rows to scenarios ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Judged:
    """One scenario: its trials, grouped by settings, and its own leaderboard, a dict of values per settings.

    place: where settings stand among the configs of `trials`.
    """

    name: str
    trials: Trials
    place: dict[str, int]
    board: dict[str, dict[str, Any]]

    def allows(self, settings: str) -> bool:
        """Whether the settings were tried here and met the constraints."""
        return settings in self.board and bool(self.board[settings]["feasible"])


def _with_settings(tables: Sequence[pa.Table]) -> pa.Table:
    """All rows in one table, the settings in place of the config: scenario and settings_id are never null."""
    if not tables:
        raise ValueError("there must be at least one table of rows, got none")
    lacking = [table for table in tables if "config_id" not in table.column_names]
    if lacking:
        raise ValueError("rows must have the column config_id, and lack it")
    try:
        rows = pa.concat_tables(tables, promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise ValueError(f"the runs' rows must have columns of the same types: {error}") from None
    if len(rows) == 0:
        raise ValueError("there must be at least one row, got none")
    task = rows.column("task") if "task" in rows.column_names else pa.nulls(len(rows), pa.string())
    named = rows.column("scenario") if "scenario" in rows.column_names else task
    scenario = pc.fill_null(pc.coalesce(named, task), "task")
    known = "settings_id" in rows.column_names and rows.column("settings_id").null_count == 0
    settings = rows.column("settings_id") if known else _settings_of_knobs(rows)
    return (
        _put(_put(rows, "scenario", scenario), "config_id_there", rows.column("config_id"))
        .drop_columns([name for name in ("settings_id", "config_id") if name in rows.column_names])
        .append_column("config_id", settings)
        .combine_chunks()
    )


def _settings_of_knobs(rows: pa.Table) -> pa.Array:
    """An id of the knobs of each row, for rows that were written before they had one."""
    names = config_columns(rows)
    ids = []
    for entry in rows.select(names).to_pylist():
        told = {name.removeprefix(CONFIG_PREFIX): v for name, v in sorted(entry.items()) if v is not None}
        ids.append(hashlib.sha256(json.dumps(told).encode()).hexdigest()[:12])
    return pa.array(ids, pa.string())


def _put(rows: pa.Table, name: str, values: pa.Array | pa.ChunkedArray) -> pa.Table:
    if name in rows.column_names:
        return rows.set_column(rows.column_names.index(name), name, values)
    return rows.append_column(name, values)


def _judge(
    name: str, rows: pa.Table, options: RankingOptions, seeds: Mapping[str, Sequence[int]] | None
) -> _Judged:
    own = rows.filter(pc.equal(rows.column("scenario"), name))
    _check_same_data(name, own)
    wanted = (seeds or {}).get(name, options.seeds)
    options = replace(options, seeds=None if wanted is None else tuple(wanted))
    trials = group_trials(own, target_coverage=options.target_coverage, seeds=options.seeds)
    ids = trials.rows.column("config_id").take(pa.array(trials.starts)).to_pylist()
    board = {entry["config_id"]: entry for entry in rank(own, options).to_pylist()}
    return _Judged(name, trials, {settings: index for index, settings in enumerate(ids)}, board)


def _check_same_data(name: str, rows: pa.Table) -> None:
    if "data_digest" not in rows.column_names:
        return
    known = rows.filter(pc.is_valid(rows.column("data_digest"))).select(["seed", "data_digest"])
    counts = known.group_by("seed").aggregate([("data_digest", "count_distinct")])
    several = counts.filter(pc.greater(counts.column("data_digest_count_distinct"), 1))
    if len(several):
        raise ValueError(
            f"scenario {name} must have the same data in all its rows, got several data_digest for seed "
            f"{min(several.column('seed').to_pylist())}: rows of different data need different scenarios"
        )


# --- scenarios to an order ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Figures:
    """What orders the settings that met the constraints, block by block; blocks are those of all scenarios.

    owner         (blocks,) the scenario of each
    values        of each metric, (settings, blocks), lower being better, infinite where a trial went wrong
    compared      how each metric is compared
    floor         of each metric that is compared by its logarithm, (scenarios,), what counts as least
    gained        (settings, blocks) how much better than no answer at all, NaN where unknown
    number_wrong  (settings,) trials that went wrong, within the budget
    nan_count     (settings,)
    """

    settings: list[str]
    options: RankingOptions
    owner: Ints
    values: dict[str, Floats]
    compared: dict[str, str]
    floor: dict[str, Floats]
    gained: Floats
    number_wrong: Ints
    nan_count: Ints

    @classmethod
    def of_scenarios(cls, held: Sequence[_Judged], options: RankingOptions, settings: list[str]) -> _Figures:
        """The figures of these settings, which every scenario holds."""
        metrics = {m.name: m for m in (*options.objectives, *options.ties) if m is not NAN_COUNT}
        owner: list[Ints] = []
        parts: dict[str, list[Floats]] = {name: [] for name in metrics}
        gained = []
        number_wrong = np.zeros(len(settings), dtype=np.int64)
        for index, one in enumerate(held):
            trials, places = one.trials, np.asarray([one.place[name] for name in settings], dtype=np.int64)
            blocks = Blocks.of_trials(trials, places)
            owner.append(np.full(blocks.number, index))
            wrong = _went_wrong(trials, options)
            number_wrong += (trials.count(wrong) + trials.missing())[places]
            for name, metric in metrics.items():
                found = trials.floats(name) if metric.direction == "lower" else -trials.floats(name)
                found = np.where(wrong | ~np.isfinite(found), np.inf, found)
                parts[name].append(blocks.spread(found, missing=np.inf))
            gained.append(blocks.spread(_gained(trials), missing=np.nan))
        owners = np.concatenate(owner)
        values = {name: np.concatenate(part, axis=1) for name, part in parts.items()}
        compared = {name: _compare_of(metric, values[name]) for name, metric in metrics.items()}
        return cls(
            settings=settings,
            options=options,
            owner=owners,
            values=values,
            compared=compared,
            floor={name: _floors(values[name], owners, len(held)) for name in metrics},
            gained=np.concatenate(gained, axis=1),
            number_wrong=number_wrong,
            nan_count=np.asarray(
                [sum(one.board[name]["nan_count"] for one in held) for name in settings], dtype=np.int64
            ),
        )

    def first(self, number: int, order: Ints) -> _Figures:
        """The figures of the first settings of an order alone."""
        those = order[:number]
        return replace(
            self,
            settings=[self.settings[index] for index in those],
            values={name: values[those] for name, values in self.values.items()},
            gained=self.gained[those],
            number_wrong=self.number_wrong[those],
            nan_count=self.nan_count[those],
        )

    def within(self, name: str, drawn: Ints, scenario: int) -> Floats:
        """The mean of a metric over the drawn blocks of a scenario, (settings,), as it is compared."""
        mean = Blocks.mean(self.values[name], np.where(self.owner == scenario, drawn, 0))
        if self.compared[name] == DIFFERENCE:
            return mean
        return np.asarray(np.log(np.maximum(mean, self.floor[name][scenario])))

    def stand(self, drawn: Ints) -> Standing:
        """What orders the settings when the blocks are drawn so many times.

        A scenario weighs as much as the share of its blocks that was drawn; one without any is left out.
        """
        sizes = np.bincount(self.owner)
        share = np.bincount(self.owner, weights=drawn) / sizes
        there = [int(index) for index in np.flatnonzero(share > 0)]
        weight = share[there]
        means: dict[str, Floats] = {}
        regrets: dict[str, Floats] = {NAN_COUNT.name: self.nan_count.astype(np.float64)}
        for name in self.values:
            within = np.column_stack([self.within(name, drawn, index) for index in there])
            behind = _behind_best(within)
            # What every setting shares, the unit among it, is left out: it would decide how ties are rounded.
            means[name] = np.round(behind @ weight / weight.sum(), SAME_DIGITS)
            if name == "step_time_ms" and self.options.step_time_tolerance:  # its grid stands fast
                means[name] = within @ weight / weight.sum()
            regrets[name] = np.round(behind.max(axis=1), SAME_DIGITS)
        signs = [Blocks.sign(self.gained, np.where(self.owner == index, drawn, 0)) for index in there]
        worthless = np.any([sign == 0 for sign in signs], axis=0)
        return Standing(
            feasible=np.ones(len(self.settings), dtype=bool),
            number_wrong=self.number_wrong,
            kind=np.where(self.number_wrong > 0, 4, 2 * worthless).astype(np.int64),
            objectives=[
                self._as_compared(metric.name, means[metric.name]) for metric in self.options.objectives
            ],
            ties=[regrets[metric.name] for metric in self.options.ties],
        )

    def _as_compared(self, name: str, mean: Floats) -> Floats:
        """Step times in one cell of the grid are equal, as in the ranking of a run."""
        tolerance = self.options.step_time_tolerance
        if name != "step_time_ms" or tolerance == 0.0:
            return mean
        return np.asarray(np.floor(mean / np.log1p(tolerance)))


def _went_wrong(trials: Trials, options: RankingOptions) -> Bools:
    """Which trials count as gone wrong, as `reports.ranking` says it."""
    wrong = trials.status_is("failed") | trials.status_is("diverged") | trials.is_null("nan_count")
    for metric in options.objectives:
        wrong = wrong | ~np.isfinite(trials.floats(metric.name))
    return wrong


def _gained(trials: Trials) -> Floats:
    """By how much each trial is better than no answer at all, NaN where it does not know."""
    if not {"charged_error", "trivial_error"} <= set(trials.rows.column_names):
        return np.full(len(trials.rows), np.nan)
    charged, trivial = trials.floats("charged_error"), trials.floats("trivial_error")
    with np.errstate(over="ignore", invalid="ignore"):
        return np.where(~np.isnan(charged) & np.isfinite(trivial), trivial - charged, np.nan)


def _compare_of(metric: Metric, values: Floats) -> str:
    """How a metric is compared between scenarios: ratios of what has a size, differences of the rest."""
    finite = values[np.isfinite(values)]
    sized = metric.unit not in ("share", "score") and metric.direction == "lower"
    return LOG_RATIO if sized and bool(np.all(finite >= 0.0)) else DIFFERENCE


def _floors(values: Floats, owner: Ints, scenarios: int) -> Floats:
    floors = np.ones(scenarios)
    for index in range(scenarios):
        here = values[:, owner == index]
        positive = here[np.isfinite(here) & (here > 0.0)]
        if len(positive):
            floors[index] = max(LEAST_RATIO * float(np.median(positive)), np.finfo(np.float64).tiny)
    return floors


def _behind_best(within: Floats) -> Floats:
    """By how much settings are behind the best of each scenario, (settings, scenarios)."""
    if not len(within):
        return within
    best = within.min(axis=0)
    with np.errstate(invalid="ignore"):
        return np.where(within == best, 0.0, within - best)


# --- an order to a table ------------------------------------------------------------------------------------


def _leaderboard(
    held: Sequence[_Judged],
    figures: _Figures,
    every: list[str],
    options: RankingOptions,
    reference: str | None,
    drawing: tuple[int, int],
) -> pa.Table:
    blocks = len(figures.owner)
    ones = np.ones(blocks, dtype=np.int64)
    standing = figures.stand(ones)
    ranks = _ranks_within(figures, held)
    # What all regrets leave open, the mean rank decides, and then the id.
    standing = replace(standing, ties=[*standing.ties, ranks.mean(axis=1)])
    front, order = order_configs(standing)

    good = [figures.settings[index] for index in order]
    bad = sorted(set(every) - set(good), key=lambda name: (_number_bad(held, name), name))
    listed = [*good, *bad]
    number = len(good)

    def padded(values: Any, kind: pa.DataType) -> pa.Array:
        return pa.array([*np.asarray(values).tolist(), *[None] * len(bad)], kind)

    columns: dict[str, pa.Array] = {
        "rank": pa.array(range(1, len(listed) + 1), pa.int64()),
        "feasible": pa.array([True] * number + [False] * len(bad)),
        "front": padded(front[order], pa.int64()),
        "beats_abstaining": pa.array([_beats(held, name) for name in listed], pa.bool_()),
        "why": pa.array([""] * number + [_reasons(held, name) for name in bad]),
        "settings_id": pa.array(listed),
    }
    weighed = min(number, MOST_WEIGHED)
    first = figures.first(weighed, order)
    sure = resample_ranks(
        lambda drawn: order_configs(first.stand(drawn)),
        configs=weighed,
        blocks=blocks,
        resamples=drawing[0],
        seed=drawing[1],
    )
    for name in RANK_COLUMNS:
        found = sure.column(name).to_pylist()
        columns[name] = pa.array([*found, *[None] * (len(listed) - weighed)], sure.schema.field(name).type)
    columns["mean_rank"] = padded(ranks.mean(axis=1)[order], pa.float64())
    columns["worst_rank"] = padded(ranks.max(axis=1, initial=0)[order], pa.int64())

    names = [one.name for one in held]
    chosen = reference if reference in figures.settings else None
    for metric in options.objectives:
        within = np.column_stack([figures.within(metric.name, ones, index) for index in range(len(held))])
        regret = _behind_best(within)
        relative = (within - _reference_of(within, figures.settings, chosen)).mean(axis=1)
        columns[metric.name] = padded(relative[order], pa.float64())
        columns[f"{metric.name}_regret"] = padded(regret.max(axis=1)[order], pa.float64())
        worst = [names[index] for index in regret.argmax(axis=1)[order]] if number else []
        columns[f"{metric.name}_worst"] = pa.array([*worst, *[None] * len(bad)], pa.string())
    for count in ("n_trials", "n_missing", "nan_count"):
        totals = [sum(one.board[name][count] for one in held if name in one.board) for name in listed]
        columns[count] = pa.array(totals, pa.int64())
    for one in held:
        for metric in options.objectives:
            found = [one.board.get(name, {}).get(f"{metric.name}_mean") for name in listed]
            columns[f"{metric.name}@{one.name}"] = pa.array(found, pa.float64())
        there = one.trials.rows.column("config_id_there")
        ids = [
            there[int(one.trials.starts[one.place[name]])].as_py() if name in one.place else None
            for name in listed
        ]
        columns[f"config_id@{one.name}"] = pa.array(ids, pa.string())
    columns |= _knobs(held, listed)
    said = {
        "scenarios": names,
        "seeds": {one.name: list(one.trials.seeds) for one in held},
        "by": [metric.name for metric in options.objectives],
        "ties": [metric.name for metric in options.ties],
        "compared": figures.compared,
        "reference": chosen,
        "nan_budget": options.nan_budget,
        "failed_budget": options.failed_budget,
        "target_coverage": options.target_coverage,
        "step_time_tolerance": options.step_time_tolerance,
    }
    return pa.table(columns).replace_schema_metadata({SCENARIOS_KEY: json.dumps(said).encode()})


def _ranks_within(figures: _Figures, held: Sequence[_Judged]) -> Ints:
    """The rank of each of the settings in each scenario, (settings, scenarios), by the same rules."""
    ranks = np.empty((len(figures.settings), len(held)), dtype=np.int64)
    for index in range(len(held)):
        _, order = order_configs(figures.stand((figures.owner == index).astype(np.int64)))
        ranks[order, index] = np.arange(1, len(order) + 1)
    return ranks


def _reference_of(within: Floats, settings: list[str], chosen: str | None) -> Floats:
    """What figures are relative to in each scenario."""
    if chosen is not None and np.isfinite(within[settings.index(chosen)]).all():
        return within[settings.index(chosen)]
    finite = np.where(np.isfinite(within), within, np.nan)
    known = np.isfinite(within).any(axis=0)
    reference = np.zeros(within.shape[1])
    if known.any():
        reference[known] = np.nanmedian(finite[:, known], axis=0)
    return reference


def _number_bad(held: Sequence[_Judged], settings: str) -> int:
    return sum(not one.allows(settings) for one in held)


def _beats(held: Sequence[_Judged], settings: str) -> bool | None:
    """Whether settings are worth more than no answer in every scenario that knows; null where none does."""
    known = [one.board[settings]["beats_abstaining"] for one in held if settings in one.board]
    known = [value for value in known if value is not None]
    return all(known) if known else None


def _reasons(held: Sequence[_Judged], settings: str) -> str:
    said = []
    for one in held:
        if settings not in one.board:
            said.append(f"{one.name}: no trial")
        elif not one.allows(settings):
            said.append(f"{one.name}: {one.board[settings]['why']}")
    return "; ".join(said)


def _knobs(held: Sequence[_Judged], listed: list[str]) -> dict[str, pa.Array]:
    """The knobs of the settings, from the first scenario that has them."""
    columns: dict[str, pa.Array] = {}
    for one in held:
        for name in config_columns(one.trials.rows):
            if name in columns:
                continue
            values = [
                next((other.board[entry][name] for other in held if entry in other.board), None)
                for entry in listed
            ]
            columns[name] = pa.array(values, one.trials.rows.schema.field(name).type)
    return columns
