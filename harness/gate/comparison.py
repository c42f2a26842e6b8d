"""From the rows of two arms to what the decision is made of: pairs by scenario and seed, counts of NaN.

Rows that answer different questions, or had different data, are refused here; rows that are missing or whose
trial failed leave a gap, which no verdict passes over.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness.errors import UserError
from harness.gate.arm_rows import CHECKS, QUESTION, ArmRows, Key, failed_rows
from harness.gate.codes import EXIT_BASELINE
from harness.gate.decision import NanCount, Pairs
from harness.gate.rules import GateRules, MetricRule
from harness.gate.suite import STEP_TIME
from reports.schema import CONFIG_PREFIX

# What differs between two arms that trained the same: who ran it, when, where, and how long it took.
NOT_OF_THE_TRAINING = frozenset(
    {
        "run_id",
        "commit",
        "scm_harness_version",
        "hostname",
        "ray_version",
        "started_at",
        "step_time_ms",
        "duration_s",
        "launch_step_ms",
        "plan_digest",
        "searcher",
        "cohort",
        "device_name",
        CHECKS,
    }
)
SHOWN_SEEDS = 3


@dataclass(frozen=True, slots=True)
class Comparison:
    """What two arms have to say to each other over some scenarios and seeds."""

    pairs: tuple[Pairs, ...]
    nans: tuple[NanCount, ...]
    notes: tuple[str, ...]


def compare_arms(
    base: ArmRows,
    candidate: ArmRows,
    rules: GateRules,
    *,
    scenarios: Sequence[str],
    seeds: Sequence[int],
) -> Comparison:
    """Pair what both arms have of these scenarios and seeds; a `UserError` where rows do not compare."""
    keys = [(scenario, seed) for scenario in scenarios for seed in seeds]
    check_same_questions(base, candidate, keys)
    pairs = [
        pair_values(base, candidate, rule, scenario, seeds)
        for scenario in scenarios
        for rule in rules.metrics
    ]
    nans = [count_nans(base, candidate, scenario, seeds) for scenario in scenarios]
    unknown = [
        f"no row of either arm has a finite {rule.metric}"
        for rule in rules.metrics
        if rule.metric != STEP_TIME and not any(is_measured(arm, rule.metric) for arm in (base, candidate))
    ]
    return Comparison(tuple(pairs), tuple(nans), (*unknown, *make_notes(base, candidate, keys)))


def check_same_questions(base: ArmRows, candidate: ArmRows, keys: Iterable[Key]) -> None:
    """Refuse rows whose settings, data or libraries differ; each difference is said once."""
    found: dict[str, None] = {}
    for key in keys:
        there, here = base.rows.get(key), candidate.rows.get(key)
        if there is None or here is None:
            continue
        for column, what in (
            (QUESTION, "task or pinned config"),
            ("task", "task"),
            ("data_digest", "data"),
            ("torch_version", "torch"),
            ("device", "device"),
            ("device_name", "processor"),
        ):
            was, now = there.get(column), here.get(column)
            if was != now and was is not None and now is not None:
                shown = f"{was} in the baseline, {now} in the candidate"
                found[f"scenario {key[0]!r}: {what} differs ({shown})"] = None
                break
    if found:
        lines = list(found)
        raise UserError(
            f"baseline {base.source} does not compare with the candidate",
            EXIT_BASELINE,
            [*lines, "accept a new baseline for what has changed: scm-harness gate accept"],
        )


def pair_values(
    base: ArmRows, candidate: ArmRows, rule: MetricRule, scenario: str, seeds: Sequence[int]
) -> Pairs:
    """The values of one metric of those seeds that have a good row in both arms.

    A value that is not there or not finite is NaN, and a result: a model that accepts nothing has no error.
    Where no row of either arm has a finite value of the metric, there is nothing to compare: all is missing.
    """
    if rule.metric == STEP_TIME:
        return pair_times(base, candidate, scenario, seeds)
    found = []
    if is_measured(base, rule.metric) or is_measured(candidate, rule.metric):
        for seed in seeds:
            there, here = base.rows.get((scenario, seed)), candidate.rows.get((scenario, seed))
            if is_good(there) and is_good(here):
                found.append((seed, value_of(there, rule.metric), value_of(here, rule.metric)))
    return make_pairs(scenario, rule.metric, found, len(seeds), stored=False)


def is_good(row: Mapping[str, Any] | None) -> bool:
    """Whether there is a row whose trial did not fail."""
    return row is not None and row.get("status") != "failed"


def is_measured(arm: ArmRows, metric: str) -> bool:
    """Whether some row of an arm has a finite value of a metric."""
    return any(measured(row, metric) is not None for row in arm.rows.values())


def value_of(row: Mapping[str, Any] | None, metric: str) -> float:
    """The finite value of a metric in a row, else NaN."""
    value = measured(row, metric)
    return math.nan if value is None else value


def pair_times(base: ArmRows, candidate: ArmRows, scenario: str, seeds: Sequence[int]) -> Pairs:
    """Step times: of launches made back to back where both arms have them, else those that are stored."""
    together, apart = [], []
    for seed in seeds:
        key = (scenario, seed)
        there, here = base.launches.get(key, {}), candidate.launches.get(key, {})
        common = sorted(there.keys() & here.keys() - {"stored"})
        if common:
            together.append(
                (
                    seed,
                    statistics.median(there[name] for name in common),
                    statistics.median(here[name] for name in common),
                )
            )
        was, now = launch_time(base, key), launch_time(candidate, key)
        if was is not None and now is not None:
            apart.append((seed, was, now))
    if together or not apart:
        return make_pairs(scenario, STEP_TIME, together, len(seeds), stored=False)
    return make_pairs(scenario, STEP_TIME, apart, len(seeds), stored=True)


def launch_time(arm: ArmRows, key: Key) -> float | None:
    """The median launch of a scenario and seed, or what its row says of its training."""
    found = arm.launches.get(key)
    if found:
        return statistics.median(found.values())
    return measured(arm.rows.get(key), STEP_TIME)


def make_pairs(
    scenario: str, metric: str, found: Sequence[tuple[int, float, float]], planned: int, *, stored: bool
) -> Pairs:
    """Pairs from (seed, baseline, candidate)."""
    return Pairs(
        scenario=scenario,
        metric=metric,
        seeds=tuple(seed for seed, _, _ in found),
        base=tuple(there for _, there, _ in found),
        candidate=tuple(here for _, _, here in found),
        planned=planned,
        stored=stored,
    )


def measured(row: Mapping[str, Any] | None, metric: str) -> float | None:
    """The finite value of a metric in a row of a trial that did not fail, else None."""
    if row is None or not is_good(row):
        return None
    value = row.get(metric)
    if value is None or isinstance(value, str) or not math.isfinite(value):
        return None
    return float(value)


def count_nans(base: ArmRows, candidate: ArmRows, scenario: str, seeds: Sequence[int]) -> NanCount:
    """How many unmasked non-finite values each arm met, and how many values it looked at."""
    there = [row for seed in seeds if (row := base.rows.get((scenario, seed))) is not None]
    here = [row for seed in seeds if (row := candidate.rows.get((scenario, seed))) is not None]
    return NanCount(
        scenario=scenario,
        values=sum(int(row.get("nan_count") or 0) for row in here),
        checks=sum(looked_at(row) for row in here),
        base_values=sum(int(row.get("nan_count") or 0) for row in there),
        base_checks=sum(looked_at(row) for row in there),
        first=first_nan(here),
    )


def looked_at(row: Mapping[str, Any]) -> int:
    """How many values a trial looked at: every output of every epoch, or at least one for each epoch."""
    return max(int(row.get(CHECKS) or 0), int(row.get("epochs") or 0), int(row.get("nan_count") or 0))


def first_nan(rows: Sequence[Mapping[str, Any]]) -> str:
    """Where the first non-finite value of these rows came from, in words; empty where there is none."""
    for row in rows:
        if int(row.get("nan_count") or 0):
            kinds = ("loss", "gradient", "output", "parameter")
            parts = [f"{row[f'nan_{kind}']} in {kind}s" for kind in kinds if row.get(f"nan_{kind}")]
            origin = f", first {row['nan_origin']}" if row.get("nan_origin") else ""
            return f"seed {row['seed']}: {', '.join(parts) or row['nan_count']}{origin}"
    return ""


def make_notes(base: ArmRows, candidate: ArmRows, keys: Sequence[Key]) -> Iterable[str]:
    """What a reader should know beside the verdict: failures, equal rows, knobs that differ."""
    for arm, name in ((base, "baseline"), (candidate, "candidate")):
        failures = list(failed_rows(arm, keys))
        for (scenario, seed), error in failures[:SHOWN_SEEDS]:
            yield f"{name}: trial of {scenario!r} with seed {seed} failed: {error}"
        if len(failures) > SHOWN_SEEDS:
            yield f"{name}: {len(failures) - SHOWN_SEEDS} more trials failed"
    code = base.origin.get("code")
    if code is not None and code == candidate.origin.get("code"):
        yield f"both arms train with the same code ({code[:8]})"
    both = [key for key in keys if key in base.rows and key in candidate.rows]
    equal = [key for key in both if same_row(base.rows[key], candidate.rows[key])]
    if both and len(equal) == len(both):
        yield f"all {len(both)} rows are bit-identical in both arms, times apart"
    elif equal:
        yield f"{len(equal)} of {len(both)} rows are bit-identical in both arms, times apart"
    changes: dict[str, None] = {}
    for key in both:
        for name, was, now in knob_changes(base.rows[key], candidate.rows[key]):
            changes[f"scenario {key[0]!r}: {name} was {was}, is {now}"] = None
    yield from changes


def same_row(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two trials came to the same, bit for bit, in what both say: older code has fewer columns."""
    names = (one.keys() & other.keys()) - NOT_OF_THE_TRAINING
    return all(same_value(one.get(name), other.get(name)) for name in names)


def same_value(one: Any, other: Any) -> bool:
    """Whether two values are equal; NaN is NaN, and an absent value is what a row without one holds."""
    if isinstance(one, float) and isinstance(other, float):
        return one == other or (math.isnan(one) and math.isnan(other))
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same_value, one, other))
    absent = (None, "")
    if isinstance(one, float) and math.isnan(one):
        return other in absent
    if isinstance(other, float) and math.isnan(other):
        return one in absent
    return bool(one == other) or (one in absent and other in absent)


def knob_changes(one: Mapping[str, Any], other: Mapping[str, Any]) -> Iterable[tuple[str, Any, Any]]:
    """The active knobs that two rows differ in."""
    for name in sorted(one.keys() | other.keys()):
        if name.startswith(CONFIG_PREFIX) and one.get(name) != other.get(name):
            yield name.removeprefix(CONFIG_PREFIX), one.get(name), other.get(name)
