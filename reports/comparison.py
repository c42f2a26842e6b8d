"""Two runs beside each other: which configs both have, what each seed's pair of trials says, what changed.

Pure functions of tables and plain values. A is the run that is compared with, B the one that is looked at:
every difference is B against A. A difference is paired by config and seed, averaged over configs within each
seed, and the seeds are the repetitions of its interval: two configs of one seed share its split and are not
two independent witnesses. How it is told is decided in `comparison_text` and `comparison_page`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from reports.aggregate import Floats
from reports.changes import ABSENT, Change, find_changes
from reports.evidence import LEVEL, paired_difference
from reports.hypervolume import bounds_of, run_hypervolume
from reports.matching import Pairs, count_trials, match_configs, pair_trials
from reports.ranking import RANKED_BY_KEY
from reports.schema import METRIC_COLUMNS, METRIC_PREFIXES, OUTCOME_COLUMNS, TRIAL_STATUSES
from reports.text import SURE_FROM

TOP = 10
MOST_CONFIGS = 200
_Ranks = dict[str, tuple[int, str]]
ENDED_WELL = ("completed", "stopped")
# Of a run's provenance, what names the run and not the code or the machine.
_OF_THE_RUN = ("run_id", "started_at", "finished_at")
# Columns of the rows that say where a run came from, where its provenance.json is gone.
_PROVENANCE_OF_ROWS = ("commit", "scm_harness_version", "torch_version", "ray_version", "python_version")


@dataclass(frozen=True, slots=True)
class Compared:
    """One metric that pairs are compared by. ratio: by B / A, else by B - A; lower: less is better.

    advisory: it was measured in two sittings, and says little by itself.
    """

    name: str
    ratio: bool
    lower: bool
    unit: str
    advisory: bool = False


_Columns = list[tuple[Compared, Floats, Floats]]

METRICS: tuple[Compared, ...] = (
    Compared("coverage", False, False, "share"),
    Compared("accepted_error", True, True, "B / A"),
    Compared("charged_error", True, True, "B / A"),
    Compared("curve_area", True, True, "B / A"),
    Compared("step_time_ms", True, True, "B / A", advisory=True),
)


@dataclass(frozen=True, slots=True)
class ComparedRun:
    """What is looked at of a run: its rows, its leaderboard, and its plan and provenance as plain values.

    plan and provenance are None where the folder has none.
    """

    path: str
    rows: pa.Table
    leaderboard: pa.Table
    plan: Mapping[str, Any] | None = None
    provenance: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class RunFacts:
    """How large a run is, and how its trials ended."""

    path: str
    task: str
    configs: int
    trials: int
    seeds: tuple[int, ...]
    statuses: dict[str, int]
    nan_count: int


@dataclass(frozen=True, slots=True)
class Difference:
    """How a metric differs, B against A: a ratio (B / A) or a difference (B - A), with its interval.

    a, b: means over the pairs. low, high: NaN where there is one seed. n: seeds; pairs: of trials with a
    value on both sides (for a ratio a positive one, or an equal one); lacking: the other pairs. verdict:
    "better" or "worse" where the interval leaves no room for no difference, else "".
    """

    metric: str
    ratio: bool
    unit: str
    advisory: bool
    a: float
    b: float
    value: float
    low: float
    high: float
    n: int
    pairs: int
    lacking: int
    verdict: str


@dataclass(frozen=True, slots=True)
class StatusChange:
    """Trials of one status in A and another in B: how many, and the first of them by A's trial_id."""

    a: str
    b: str
    trials: int
    example: str
    error: str


@dataclass(frozen=True, slots=True)
class ConfigPair:
    """One config that both runs have, with its ranks in the whole leaderboards, and why it was ruled out."""

    config_a: str
    config_b: str
    rank_a: int
    rank_b: int
    why_a: str
    why_b: str
    seeds: int
    nan_a: int
    nan_b: int
    differences: tuple[Difference, ...]


@dataclass(frozen=True, slots=True)
class Digests:
    """The data of a seed on both sides."""

    seed: int
    a: str
    b: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Everything that is said of two runs, B against A.

    matched_by: "config_id", "settings_id" or "knobs". same_data: whether the data of every common seed are
    equal, None where the rows do not say. tau: Kendall's, of the order of the common configs; NaN below two.
    hypervolume_a, hypervolume_b: of all feasible configs of each run, between the best and the worst of both;
    NaN where a run has none.
    identical: pairs whose trials say the same of everything but times. only_a, only_b: configs of one run,
    best first. ambiguous: configs whose knobs are those of another of their run, as far as both runs know
    them; they are not paired. went_wrong, came_right: trials that ended well in A alone, in B alone.
    configs: the `MOST_CONFIGS` common ones that stand highest in either run.
    """

    a: RunFacts
    b: RunFacts
    summary: str = ""
    cautions: tuple[str, ...] = ()
    same_task: bool
    same_data: bool | None
    matched_by: str
    common: int
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    ambiguous: int
    pairs: int
    unpaired_a: int
    unpaired_b: int
    identical: int
    differences: tuple[Difference, ...]
    nan_a: int
    nan_b: int
    nan_more: int
    nan_fewer: int
    status_changes: tuple[StatusChange, ...]
    went_wrong: int
    came_right: int
    ranked_by: tuple[str, ...]
    tau: float
    hypervolume_a: float
    hypervolume_b: float
    top: int
    top_shared: int
    configs: tuple[ConfigPair, ...]
    plan_known: bool
    plan_changes: tuple[Change, ...]
    provenance_changes: tuple[Change, ...]
    data_changes: tuple[Digests, ...]
    level: float = LEVEL


def compare_runs(a: ComparedRun, b: ComparedRun, *, level: float = LEVEL, top: int = TOP) -> Comparison:
    """Compare B with A. `top`: of how many of the best configs it is counted whether both runs have them.

    Configs are the same by `config_id` where task and data are the same and any id is common, else by
    `settings_id`, else by the knobs that both runs know. Raises ValueError for a level outside (0, 1).
    """
    if not 0.0 < level < 1.0:
        raise ValueError(f"level must lie between 0 and 1, got {level}")
    tasks = tuple(_first_text(run.rows, "task") for run in (a, b))
    same_data, data_changes = _compare_data(a.rows, b.rows)
    matched = match_configs(a.rows, b.rows, by_id=tasks[0] == tasks[1] and same_data is not False)
    pairs = pair_trials(a.rows, b.rows, matched.pairs)
    statuses = _status_changes(pairs, a.rows, b.rows)
    nans = [_integers(rows, "nan_count")[at] for rows, at in ((a.rows, pairs.a), (b.rows, pairs.b))]
    ranks_a, ranks_b = _ranks(a.leaderboard), _ranks(b.leaderboard)
    common_a, common_b = {one for one, _ in matched.pairs}, {other for _, other in matched.pairs}
    leaders = [_leaders(run.leaderboard, top) for run in (a, b)]
    volumes = _hypervolumes(a.leaderboard, b.leaderboard)
    plan_known = a.plan is not None and b.plan is not None
    told = [_provenance(run) for run in (a, b)]
    comparison = Comparison(
        a=_facts(a),
        b=_facts(b),
        same_task=tasks[0] == tasks[1],
        same_data=same_data,
        matched_by=matched.by,
        common=len(matched.pairs),
        only_a=tuple(config for config in ranks_a if config not in common_a),
        only_b=tuple(config for config in ranks_b if config not in common_b),
        ambiguous=matched.ambiguous,
        pairs=len(pairs.a),
        unpaired_a=count_trials(a.rows, common_a) - len(pairs.a),
        unpaired_b=count_trials(b.rows, common_b) - len(pairs.b),
        identical=int(_identical(a.rows, b.rows, pairs).sum()),
        differences=_differences(a.rows, b.rows, pairs, level),
        nan_a=int(nans[0].sum()),
        nan_b=int(nans[1].sum()),
        nan_more=int((nans[1] > nans[0]).sum()),
        nan_fewer=int((nans[1] < nans[0]).sum()),
        status_changes=statuses,
        went_wrong=sum(one.trials for one in statuses if one.a in ENDED_WELL and one.b not in ENDED_WELL),
        came_right=sum(one.trials for one in statuses if one.a not in ENDED_WELL and one.b in ENDED_WELL),
        ranked_by=_ranked_by(a.leaderboard),
        tau=_tau([(ranks_a[one][0], ranks_b[other][0]) for one, other in matched.pairs]),
        hypervolume_a=volumes[0],
        hypervolume_b=volumes[1],
        top=top,
        top_shared=sum(one in leaders[0] and other in leaders[1] for one, other in matched.pairs),
        configs=_config_pairs(a, b, matched.pairs, pairs, (ranks_a, ranks_b), level),
        plan_known=plan_known,
        plan_changes=tuple(find_changes(a.plan, b.plan)) if plan_known else (),
        provenance_changes=tuple(find_changes(told[0], told[1])),
        data_changes=data_changes,
        level=level,
    )
    return replace(comparison, summary=_summary(comparison), cautions=_cautions(comparison))


def _hypervolumes(a: pa.Table, b: pa.Table) -> tuple[float, float]:
    """The hypervolume of both runs within the bounds of both."""
    try:
        bounds = bounds_of(a, b)
        return run_hypervolume(a, bounds=bounds).share, run_hypervolume(b, bounds=bounds).share
    except ValueError:  # no config with finite objectives, or other objectives
        return math.nan, math.nan


def comparison_values(comparison: Comparison) -> dict[str, Any]:
    """The comparison as values that JSON knows: NaN is null, the absent side of a change is left out."""
    values = {
        name: _plain(value)
        for name, value in asdict(comparison).items()
        if name not in ("plan_changes", "provenance_changes")
    }
    for name in ("plan_changes", "provenance_changes"):
        values[name] = [
            {"key": change.key}
            | {
                side: _plain(value)
                for side, value in (("a", change.one), ("b", change.other))
                if value is not ABSENT
            }
            for change in getattr(comparison, name)
        ]
    return values


# --- pairs of trials --------------------------------------------------------------------------------------


def _identical(a: pa.Table, b: pa.Table, pairs: Pairs) -> npt.NDArray[np.bool_]:
    """Which pairs say the same of everything that is measured but times."""
    alike = np.ones(len(pairs.a), dtype=bool)
    for field in a.schema:
        if field.name not in b.column_names or not _is_told(field.name):
            continue
        if pa.types.is_string(field.type):
            one, other = (
                rows.column(field.name).take(pa.array(at)).to_pylist()
                for rows, at in ((a, pairs.a), (b, pairs.b))
            )
            alike &= np.array([(x or "") == (y or "") for x, y in zip(one, other, strict=True)], dtype=bool)
        elif not pa.types.is_list(field.type):
            x, y = _floats(a, field.name)[pairs.a], _floats(b, field.name)[pairs.b]
            alike &= (x == y) | (np.isnan(x) & np.isnan(y))
    return alike


def _is_told(name: str) -> bool:
    measured = (column.name for column in (*OUTCOME_COLUMNS, *METRIC_COLUMNS))
    return name not in ("step_time_ms", "duration_s") and (
        name in measured or name.startswith(METRIC_PREFIXES)
    )


def _status_changes(pairs: Pairs, a: pa.Table, b: pa.Table) -> tuple[StatusChange, ...]:
    """What went wrong in B first, then by how many."""
    one, other = (rows.column("status").to_pylist() for rows in (a, b))
    found: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for row_a, row_b in zip(pairs.a.tolist(), pairs.b.tolist(), strict=True):
        if one[row_a] != other[row_b]:
            found.setdefault((one[row_a], other[row_b]), []).append((row_a, row_b))
    changes = []
    for (before, after), places in found.items():
        row_a, row_b = places[0]
        rows, at = (b, row_b) if after not in ENDED_WELL else (a, row_a)
        said = [_cell(rows, name, at) for name in ("error", "stop_reason")]
        example = str(_cell(a, "trial_id", row_a))
        changes.append(StatusChange(before, after, len(places), example, next(filter(None, said), "")))
    return tuple(sorted(changes, key=lambda one: (-TRIAL_STATUSES.index(one.b), -one.trials, one.a)))


def _cell(rows: pa.Table, name: str, at: int) -> str:
    value = rows.column(name)[at].as_py() if name in rows.column_names else None
    return "" if value is None else str(value)


# --- differences ------------------------------------------------------------------------------------------


def _differences(
    a: pa.Table, b: pa.Table, pairs: Pairs, level: float, columns: _Columns | None = None
) -> tuple[Difference, ...]:
    """Of every metric that both runs have."""
    held = _columns(a, b) if columns is None else columns
    return tuple(
        _difference(metric, one[pairs.a], other[pairs.b], pairs.seed, level) for metric, one, other in held
    )


def _columns(a: pa.Table, b: pa.Table) -> _Columns:
    return [
        (metric, _floats(a, metric.name), _floats(b, metric.name))
        for metric in METRICS
        if metric.name in a.column_names and metric.name in b.column_names
    ]


def _difference(
    metric: Compared, a: Floats, b: Floats, seed: npt.NDArray[np.int64], level: float
) -> Difference:
    with np.errstate(all="ignore"):
        # Equal values are no difference also where a ratio has no meaning (0 and 0).
        apart = np.where(a == b, 0.0, np.log(b) - np.log(a)) if metric.ratio else b - a
    known = np.isfinite(apart) & np.isfinite(a) & np.isfinite(b)
    seeds, place = np.unique(seed[known], return_inverse=True)
    nothing = (math.nan,) * 5
    mean_a, mean_b, value, low, high = nothing
    verdict = ""
    if len(seeds):
        blocks = np.bincount(place, weights=apart[known]) / np.bincount(place)
        found = paired_difference(np.zeros(len(blocks)), blocks, level=level)
        mean_a, mean_b = float(a[known].mean()), float(b[known].mean())
        value, low, high = found.mean, found.low, found.high
        if low > 0 or high < 0:
            verdict = "better" if (high < 0) == metric.lower else "worse"
        if metric.ratio:
            with np.errstate(over="ignore"):
                value, low, high = (float(np.exp(bound)) for bound in (value, low, high))
    return Difference(
        metric=metric.name,
        ratio=metric.ratio,
        unit=metric.unit,
        advisory=metric.advisory,
        a=mean_a,
        b=mean_b,
        value=value,
        low=low,
        high=high,
        n=len(seeds),
        pairs=int(known.sum()),
        lacking=int((~known).sum()),
        verdict=verdict,
    )


def _config_pairs(
    a: ComparedRun,
    b: ComparedRun,
    configs: Sequence[tuple[str, str]],
    pairs: Pairs,
    ranks: tuple[_Ranks, _Ranks],
    level: float,
) -> tuple[ConfigPair, ...]:
    held = _columns(a.rows, b.rows)
    nan_a, nan_b = _integers(a.rows, "nan_count"), _integers(b.rows, "nan_count")
    ranked = sorted(
        (min(ranks[0][one][0], ranks[1][other][0]), ranks[0][one][0], place)
        for place, (one, other) in enumerate(configs)
    )
    found = []
    for _, _, place in ranked[:MOST_CONFIGS]:
        one, other = configs[place]
        own = pairs.of(place)
        found.append(
            ConfigPair(
                config_a=one,
                config_b=other,
                rank_a=ranks[0][one][0],
                rank_b=ranks[1][other][0],
                why_a=ranks[0][one][1],
                why_b=ranks[1][other][1],
                seeds=len(own.a),
                nan_a=int(nan_a[own.a].sum()),
                nan_b=int(nan_b[own.b].sum()),
                differences=_differences(a.rows, b.rows, own, level, held),
            )
        )
    return tuple(found)


# --- ranks ------------------------------------------------------------------------------------------------


def _ranks(leaderboard: pa.Table) -> _Ranks:
    """Rank and why it was ruled out, by config, best first."""
    columns = (leaderboard.column(name).to_pylist() for name in ("config_id", "rank", "why"))
    return {
        config: (rank, why) for config, rank, why in sorted(zip(*columns, strict=True), key=lambda x: x[1])
    }


def _leaders(leaderboard: pa.Table, top: int) -> set[str]:
    """The best configs that are not ruled out."""
    feasible = leaderboard.filter(leaderboard.column("feasible"))
    return set(feasible.sort_by("rank").slice(0, top).column("config_id").to_pylist())


def _tau(ranks: Sequence[tuple[int, int]]) -> float:
    if len(ranks) < 2:
        return math.nan
    from scipy.stats import kendalltau

    return float(kendalltau(*zip(*ranks, strict=True)).statistic)


def _ranked_by(leaderboard: pa.Table) -> tuple[str, ...]:
    said = json.loads((leaderboard.schema.metadata or {}).get(RANKED_BY_KEY, b"{}"))
    return tuple(said.get("by", ()))


# --- where the runs came from -----------------------------------------------------------------------------


def _facts(run: ComparedRun) -> RunFacts:
    status = run.rows.column("status").to_pylist()
    return RunFacts(
        path=run.path,
        task=_first_text(run.rows, "task"),
        configs=len(run.leaderboard),
        trials=len(run.rows),
        seeds=tuple(sorted(set(run.rows.column("seed").to_pylist()))),
        statuses={name: status.count(name) for name in TRIAL_STATUSES if name in status},
        nan_count=int(_integers(run.rows, "nan_count").sum()),
    )


def _compare_data(a: pa.Table, b: pa.Table) -> tuple[bool | None, tuple[Digests, ...]]:
    """Whether the data of the common seeds are the same, and the seeds whose data are not."""
    one, other = _digests(a), _digests(b)
    both = sorted(one.keys() & other.keys())
    changes = tuple(Digests(seed, one[seed], other[seed]) for seed in both if one[seed] != other[seed])
    return (not changes if both else None), changes


def _digests(rows: pa.Table) -> dict[int, str]:
    if "data_digest" not in rows.column_names:
        return {}
    told = zip(rows.column("seed").to_pylist(), rows.column("data_digest").to_pylist(), strict=True)
    return {seed: digest for seed, digest in told if digest is not None}


def _provenance(run: ComparedRun) -> dict[str, Any]:
    """What provenance.json says, without what names the run; what the rows say where there is none."""
    if run.provenance is not None:
        return {name: value for name, value in run.provenance.items() if name not in _OF_THE_RUN}
    told = {}
    for name in _PROVENANCE_OF_ROWS:
        if name in run.rows.column_names:
            values = sorted(map(str, filter(None, pc.unique(run.rows.column(name)).to_pylist())))
            told[name] = ", ".join(values) if values else None
    return told


def _first_text(rows: pa.Table, name: str) -> str:
    return _cell(rows, name, 0) if len(rows) else ""


# --- what it comes to -------------------------------------------------------------------------------------


def _summary(told: Comparison) -> str:
    """One or two sentences that say what the difference is."""
    if not told.common:
        return "The runs have no config in common: nothing can be compared, config by config."
    if not told.pairs:
        return (
            f"The runs share {_counted(told.common, 'config')} and no seed of any: no trials can be paired."
        )
    where = f"{_counted(told.common, 'common config')}, {_counted(told.pairs, 'pair')} of trials"
    if told.identical == told.pairs:
        return f"No difference: {where}, and in both runs each says the same, times apart."
    clauses = []
    if told.went_wrong:
        clauses.append(f"{_counted(told.went_wrong, 'trial')} that ended well in A went wrong in B")
    if told.nan_b > told.nan_a:
        clauses.append(f"B met {told.nan_b} non-finite values, A {told.nan_a}")
    sure = [one for one in told.differences if one.verdict and not one.advisory]
    clauses += [
        f"{one.metric} is {one.verdict} in B, {difference_text(one)}"
        for one in sorted(sure, key=lambda one: one.verdict != "worse")
    ]
    if told.came_right:
        clauses.append(f"{_counted(told.came_right, 'trial')} that went wrong in A ended well in B")
    if told.nan_b < told.nan_a:
        clauses.append(f"B met {told.nan_b} non-finite values, A {told.nan_a}")
    seeds = max((one.n for one in told.differences), default=0)
    if not sure:
        clauses.append(
            "coverage and errors differ by no more than seeds do"
            if seeds > 1
            else "coverage and errors differ, and one seed cannot say whether by chance"
        )
    start = "The runs are of different data, so that what differs may be the data. " * (
        told.same_data is False
    )
    return f"{start}B against A ({where}): {'; '.join(clauses)}."


def difference_text(one: Difference) -> str:
    """A difference with its interval: +0.012 (0.003 to 0.021), or x 0.97 (0.95 to 0.99)."""
    if math.isnan(one.value):
        return "-"
    sign = "x " if one.ratio else "+" if one.value > 0 else ""
    value = f"{sign}{one.value:.4g}"
    if math.isnan(one.low):
        return value
    return f"{value} ({one.low:.4g} to {one.high:.4g})"


def _cautions(told: Comparison) -> tuple[str, ...]:
    said = []
    if not told.same_task:
        said.append(f"the tasks differ ({told.a.task} and {told.b.task}): errors are in different units")
    elif told.same_data is False:
        said.append("the data differ: a difference of errors says nothing of the code or the settings alone")
    elif told.same_data is None:
        said.append("the rows do not say whether both runs had the same data")
    if told.matched_by != "config_id" and told.common:
        what = "their settings" if told.matched_by == "settings_id" else "the knobs that both runs know"
        said.append(f"configs are the same by {what}, not by config_id")
    if told.ambiguous:
        said.append(f"{_counted(told.ambiguous, 'config')} could not be told apart and are not paired")
    if told.pairs:
        seeds = max((one.n for one in told.differences), default=0)
        if seeds < SURE_FROM:
            said.append(
                f"{_counted(seeds, 'seed')} {'is' if seeds == 1 else 'are'} few: "
                + (
                    "there is no interval"
                    if seeds < 2
                    else "intervals are wide, and more seeds would say more"
                )
            )
        if any(one.metric == "step_time_ms" and one.pairs for one in told.differences):
            said.append(
                "step times are of two sittings: another machine or load looks like another speed of the code"
            )
    lacking = [one for one in told.differences if one.lacking and one.pairs]
    if lacking:
        counts = ", ".join(f"{one.metric} {one.lacking}" for one in lacking)
        said.append(f"pairs without a value on both sides are left out of a difference: {counts}")
    if told.unpaired_a or told.unpaired_b:
        said.append(
            f"trials of common configs without a partner: {told.unpaired_a} in A, {told.unpaired_b} in B"
        )
    if not told.plan_known:
        said.append("a run has no readable plan.yaml: what changed in the plan is not known")
    return tuple(said)


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _floats(rows: pa.Table, name: str) -> Floats:
    column = pc.fill_null(pc.cast(rows.column(name), pa.float64()), math.nan)
    return np.asarray(column.to_numpy(), dtype=np.float64)


def _integers(rows: pa.Table, name: str) -> npt.NDArray[np.int64]:
    if name not in rows.column_names:
        return np.zeros(len(rows), dtype=np.int64)
    return np.asarray(pc.fill_null(rows.column(name), 0).to_numpy(), dtype=np.int64)


def _plain(value: Any) -> Any:
    """The value as JSON knows it."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)
