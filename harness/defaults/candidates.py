"""What a run proposes: its best configs, the current default, and whether the run holds enough to go on.

Nothing is trained here. A run that says too little is refused with everything that it lacks, a line each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from harness.errors import (
    EXIT_NOTHING_COMPLETED,
    EXIT_RUN_FOLDER,
    EXIT_THIN_EVIDENCE,
    UserError,
    one_line,
)
from harness.plan import Plan, check_scalar, load_plan
from harness.proposals import full_config, task_identity
from harness.robustness.examined import PLAN_FILE, config_of_entry
from harness.sweep import task_spec
from harness.task_errors import task_errors_told
from harness.yaml_text import read_yaml
from reports.fragments import RunReadError
from reports.metrics import Metric
from reports.ranking import rank
from reports.rows import read_rows
from search_spaces.identity import config_id
from trainables.configs import resolve_and_activate
from trainables.loading import load_task

LEAST_CONFIGS = 2
LEAST_RUN_SEEDS = 2
# Without these a row cannot be held against abstaining everywhere, nor its data against those of today.
_NEEDED = ("charged_error", "trivial_error", "coverage", "nan_count", "data_digest")


@dataclass(frozen=True, slots=True)
class Candidate:
    """A config under consideration: full, with its identity in the run's scenario.

    rank: in the run's leaderboard, None for one that is not in it. origin: where it comes from. prior: what
    the run said of it, its mean objective, signed so that lower is better; infinite where the run said
    nothing.
    """

    config_id: str
    config: Mapping[str, Any]
    rank: int | None
    origin: str
    prior: float = math.inf


@dataclass(frozen=True, slots=True)
class Candidates:
    """What a run proposes. `held` has the current default first, then the run's best configs in order."""

    run: str
    plan: Plan
    held: tuple[Candidate, ...]
    run_seeds: tuple[int, ...]
    data_digests: Mapping[int, str]
    notes: tuple[str, ...] = ()

    @property
    def current(self) -> Candidate:
        """The config that stays the default unless the evidence says otherwise."""
        return self.held[0]

    def identify(self, config: Mapping[str, Any]) -> str:
        """The config_id of a full config in the run's scenario."""
        return config_id({**task_identity(self.plan), **resolve_and_activate(config)[1]})


def find_candidates(folder: Path, *, top: int, current: Path | None, objective: Metric) -> Candidates:
    """Read a run and the current default; UserError says exactly what is missing.

    `current` names a file of a config (flat, or under the key `config`, as `scm-harness defaults` writes);
    without it the current default is what the run's plan trains without a search.
    """
    plan = _read_plan(folder)
    rows, leaderboard = _read_ranked(folder, plan, objective)
    ranked = leaderboard.to_pylist()
    feasible = [entry for entry in ranked if entry["feasible"]]
    if not feasible:
        reasons = [f"{entry['config_id']}: {entry['why']}" for entry in ranked[:5]]
        raise UserError(
            f"{folder}: none of its {len(ranked)} configs is feasible, so there is no candidate",
            EXIT_NOTHING_COMPLETED,
            more=reasons,
        )
    lacking = _lacking(plan, ranked, feasible)
    if lacking:
        raise UserError(f"{folder} is too thin a ground for a default", EXIT_THIN_EVIDENCE, more=lacking)
    digests = _check_data(folder, plan, rows)
    config, origin = _read_current(current, plan) if current else (full_config(plan.config)[0], _OF_PLAN)
    named = config_id({**task_identity(plan), **resolve_and_activate(config)[1]})
    places = {entry["config_id"]: entry["rank"] for entry in ranked}
    held = [Candidate(named, config, places.get(named), origin)]
    held += [
        Candidate(entry["config_id"], config_of_entry(entry), entry["rank"], why, _mean(entry, objective))
        for entry, why in _best(feasible, objective)
        if entry["config_id"] != named
    ][:top]
    chosen = {candidate.config_id for candidate in held}
    stopped = sum(entry["n_stopped"] > 0 for entry in feasible if entry["config_id"] in chosen)
    notes: list[str] = []
    if stopped:
        notes.append(
            f"{stopped} of the candidates were stopped early in the run; they are trained to their end here"
        )
    if len(held) - 1 < top:
        notes.append(
            f"the run has {len(held) - 1} candidates besides the current default, {top} were asked for"
        )
    return Candidates(folder.resolve().name, plan, tuple(held), tuple(plan.seeds), digests, tuple(notes))


_OF_PLAN = "the project's defaults, with what the run's plan fixes"


def _read_plan(folder: Path) -> Plan:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such run folder", EXIT_RUN_FOLDER)
    if not (folder / PLAN_FILE).is_file():
        raise UserError(f"{folder} is no run: it holds no {PLAN_FILE}", EXIT_RUN_FOLDER)
    try:
        return load_plan(folder / PLAN_FILE)
    except UserError as error:
        raise UserError(
            f"{folder} was left by another version: its plan cannot be trained by this one; sweep it again",
            EXIT_RUN_FOLDER,
            more=error.lines,
        ) from None


def _read_ranked(folder: Path, plan: Plan, objective: Metric) -> tuple[pa.Table, pa.Table]:
    from harness.cli.rank import make_options

    try:
        rows = read_rows(folder)
    except RunReadError as error:
        raise UserError(one_line(error), EXIT_RUN_FOLDER) from None
    missing = [name for name in dict.fromkeys((*_NEEDED, objective.name)) if name not in rows.column_names]
    if missing:
        raise UserError(
            f"{folder} is a run of an older kind or another task: its rows have no {', '.join(missing)}; "
            "sweep it again",
            EXIT_RUN_FOLDER,
        )
    try:
        return rows, rank(rows, make_options(folder, {}))
    except ValueError as error:
        raise UserError(f"{folder}: {one_line(error)}", EXIT_RUN_FOLDER) from None


def _lacking(
    plan: Plan, ranked: Sequence[Mapping[str, Any]], feasible: Sequence[Mapping[str, Any]]
) -> list[str]:
    lacking = []
    if len(ranked) < LEAST_CONFIGS:
        lacking.append(f"configs: it has {len(ranked)}, and a choice needs at least {LEAST_CONFIGS}")
    if len(plan.seeds) < LEAST_RUN_SEEDS:
        lacking.append(
            f"seeds: its configs were trained with {len(plan.seeds)}, and a ranking that saw no spread over "
            f"seeds needs at least {LEAST_RUN_SEEDS}"
        )
    if all(entry["beats_abstaining"] is False for entry in feasible):
        lacking.append(
            f"a config worth anything: none of the {len(feasible)} feasible ones answers better than "
            "abstaining everywhere would"
        )
    return lacking


def _best(feasible: Sequence[Mapping[str, Any]], objective: Metric) -> list[tuple[Mapping[str, Any], str]]:
    """Those that beat abstaining, with where each stands: of the leaderboard and of the objective in turn.

    The leaderboard weighs what the objective does not, and may have its best config far down.
    """
    worth = [entry for entry in feasible if entry["beats_abstaining"] is not False]
    by_objective = sorted(worth, key=lambda entry: _mean(entry, objective))
    best: dict[str, tuple[Mapping[str, Any], str]] = {}
    for place, (first, second) in enumerate(zip(worth, by_objective, strict=True), 1):
        best.setdefault(first["config_id"], (first, f"rank {first['rank']} of the run"))
        best.setdefault(second["config_id"], (second, f"number {place} of the run by {objective.name}"))
    return list(best.values())


def _mean(entry: Mapping[str, Any], objective: Metric) -> float:
    value = entry.get(f"{objective.name}_mean")
    if not isinstance(value, float) or not math.isfinite(value):
        return math.inf
    return value if objective.direction == "lower" else -value


def _check_data(folder: Path, plan: Plan, rows: pa.Table) -> dict[int, str]:
    """Refuse a run whose data are no longer those of today; give the digests by seed."""
    digests: dict[int, str] = {}
    for row in rows.select(["seed", "data_digest"]).to_pylist():
        if row["data_digest"] is not None:
            digests.setdefault(row["seed"], row["data_digest"])
    for seed in list(digests)[:2]:
        with task_errors_told(plan.task.name):
            found = load_task(task_spec(plan), seed).data_digest
        if found != digests[seed]:
            raise UserError(
                f"{folder}: the data of task {plan.task.name} have changed since the run (seed {seed}: "
                f"digest {found[:12]} now, {digests[seed][:12]} in its rows); sweep it again",
                EXIT_RUN_FOLDER,
            )
    return digests


def _read_current(path: Path, plan: Plan) -> tuple[dict[str, Any], str]:
    values = read_yaml(path).values
    if not isinstance(values, Mapping):
        raise UserError(f"{path}: a config is a mapping of knobs, got {type(values).__name__}")
    config = values.get("config", values)
    if not isinstance(config, Mapping):
        raise UserError(f"{path}: config must be a mapping of knobs, got {config!r}")
    task = values.get("task") if "config" in values else None
    name = task.get("name") if isinstance(task, Mapping) else task
    if name is not None and name != plan.task.name:
        raise UserError(f"{path}: it is a config of task {name!r}, and the run is one of {plan.task.name!r}")
    try:
        for value in config.values():
            check_scalar(value)
        return resolve_and_activate(config)[0], str(path)
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: config: {one_line(error)}") from None
