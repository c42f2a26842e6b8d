"""What is examined: from a run folder, a config file or a checkpoint to configs, seeds and trained models.

A run keeps rows and no weights: its best configs are trained again with the run's seeds, which gives the same
models on the same kind of machine; where a model says otherwise than its row, that is said.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from harness.errors import EXIT_NOTHING_COMPLETED, EXIT_RUN_FOLDER, UserError, nearest, one_line
from harness.plan import Plan, check_scalar, load_plan
from harness.proposals import task_identity
from harness.sweep import task_spec
from harness.task_errors import task_errors_told
from harness.yaml_text import read_yaml
from reports.fragments import RunReadError
from reports.ranking import rank
from reports.rows import read_rows
from reports.schema import CONFIG_PREFIX
from search_spaces.identity import config_id, trial_id
from trainables.configs import resolve_and_activate, resolve_config
from trainables.loading import load_task
from trainables.trained import (
    CheckpointError,
    Trained,
    make_trained,
    read_trained,
    read_weights,
    train_models,
)

PLAN_FILE = "plan.yaml"
CONFIG_KEYS = ("task", "config", "seeds")
# Of what a row and a model trained again are compared in.
_COMPARED = ("coverage", "accepted_error", "charged_error", "val_loss")
_TOLERANCE = 1e-4


@dataclass(frozen=True, slots=True)
class Examined:
    """Configs of one task, by config_id, with the seeds to train them with.

    given: a model that was there already, by trial_id. rows: what a run says of these trials. name: of the
    run, file or checkpoint. notes: what the user should know of the choice.
    """

    name: str
    spec: Mapping[str, Any]
    configs: Mapping[str, Mapping[str, Any]]
    seeds: tuple[int, ...]
    given: Mapping[str, Trained] = field(default_factory=dict)
    rows: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def find_examined(
    target: Path, *, top: int | None, seeds: int, plan: Path | None = None, device: str = "cpu"
) -> Examined:
    """What a target names: the `top` best configs of a run folder, a config's file, or a checkpoint.

    seeds: how many to train each config with; a run's own come first, then the smallest that are free.
    plan: says of a checkpoint of a training under way what task and config it is of. Raises UserError for a
    target that is none of them, with the exit code for what is wrong with it.
    """
    if not target.exists():
        raise UserError(f"{target}: no such run folder, config file or checkpoint")
    if not target.is_dir() and target.suffix not in (".yaml", ".yml"):
        return _of_checkpoint(target, seeds, plan, device)
    found = _of_run(target, top, seeds) if target.is_dir() else _of_config(target, seeds)
    with task_errors_told(found.spec["name"]):  # before anything is written
        load_task(found.spec, found.seeds[0])
    return found


def train_examined(
    examined: Examined, device: str = "cpu", on_epoch: Callable[[], None] = lambda: None
) -> dict[str, Trained | Mapping[str, Any]]:
    """Train every config with every seed, but for models that are given; one that failed is its outcome."""
    trials = [
        (name, config, seed)
        for config_id_, config in examined.configs.items()
        for seed in examined.seeds
        if (name := trial_id(config_id_, seed)) not in examined.given
    ]
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as a sweep's workers: sums are rounded alike
    try:
        return {**examined.given, **train_models(examined.spec, trials, device=device, on_epoch=on_epoch)}
    finally:
        torch.set_num_threads(before)


def differences(examined: Examined, trained: Mapping[str, Trained | Mapping[str, Any]]) -> list[str]:
    """Say of models trained again where they are not those of the run's rows."""
    said = []
    for name, row in examined.rows.items():
        model = trained.get(name)
        if not isinstance(model, Trained):
            continue
        if row.get("status") == "stopped":
            said.append(
                f"{name} was stopped at epoch {row.get('epochs')} of the run, and is trained to its end here"
            )
            continue
        apart = [key for key in _COMPARED if _apart(row.get(key), model.outcome.get(key))]
        if apart:
            key = apart[0]
            said.append(
                f"{name} says otherwise than its row (another machine, other versions or data?): "
                f"{key} {model.outcome.get(key):.6g}, in the row {row.get(key):.6g}"
            )
    return said


def _apart(one: Any, other: Any) -> bool:
    if not isinstance(one, float) or not isinstance(other, float):
        return False
    if math.isnan(one) or math.isnan(other):
        return math.isnan(one) != math.isnan(other)
    return not math.isclose(one, other, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE)


# --- a run folder ------------------------------------------------------------------------------------


def _of_run(folder: Path, top: int | None, seeds: int) -> Examined:
    from harness.cli.rank import make_options

    if not (folder / PLAN_FILE).is_file():
        raise UserError(f"{folder} is no run: it holds no {PLAN_FILE}", EXIT_RUN_FOLDER)
    plan = load_plan(folder / PLAN_FILE)
    try:
        rows = read_rows(folder)
        leaderboard = rank(rows, make_options(folder, {}))
    except RunReadError as error:
        raise UserError(one_line(error), EXIT_RUN_FOLDER) from None
    except ValueError as error:
        raise UserError(f"{folder}: {one_line(error)}") from None
    ranked = [entry for entry in leaderboard.to_pylist() if entry["feasible"]]
    if not ranked:
        raise UserError(
            f"no config of {folder} is feasible, so there is none to examine", EXIT_NOTHING_COMPLETED
        )
    chosen = ranked if top is None else ranked[:top]
    held = rows.to_pylist()
    configs = {entry["config_id"]: config_of_entry(entry) for entry in chosen}
    own = tuple(plan.seeds)
    few = () if top is None or len(chosen) == top else (f"the run has {len(chosen)} feasible configs",)
    return Examined(
        name=folder.resolve().name,
        spec=task_spec(plan),
        configs=configs,
        seeds=enough_seeds(own, seeds),
        rows={row["trial_id"]: row for row in held if row["config_id"] in configs},
        notes=few,
    )


def config_of_entry(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a leaderboard's entry; knobs that are null there do nothing under it."""
    given = {
        name.removeprefix(CONFIG_PREFIX): value
        for name, value in entry.items()
        if name.startswith(CONFIG_PREFIX) and value is not None
    }
    return resolve_config(given)


def enough_seeds(own: Sequence[int], count: int) -> tuple[int, ...]:
    """The first `count` of these seeds, and where there are fewer, the smallest other numbers.

    >>> enough_seeds([3], 3), enough_seeds([5, 6, 7], 2)
    ((3, 0, 1), (5, 6))
    """
    more = (seed for seed in range(len(own) + count) if seed not in own)
    return (*own[:count], *(next(more) for _ in range(count - len(own))))


# --- a config's file ---------------------------------------------------------------------------------


def _of_config(path: Path, seeds: int) -> Examined:
    values = read_yaml(path).values
    if not isinstance(values, Mapping):
        raise UserError(
            f"{path}: a config is a mapping with {', '.join(CONFIG_KEYS)}, got {type(values).__name__}"
        )
    if "space" in values:
        return _of_plan(load_plan(path), path.stem, seeds)
    for name in values:
        if name not in CONFIG_KEYS:
            hint = nearest(str(name), CONFIG_KEYS)
            raise UserError(f"{path}: unknown key {name!r}{hint} (known: {', '.join(CONFIG_KEYS)})")
    task, config, own = values.get("task"), values.get("config", {}), values.get("seeds", [0])
    if isinstance(task, str):
        task = {"name": task}
    if not isinstance(task, Mapping) or not isinstance(task.get("name"), str):
        raise UserError(f"{path}: task must be a mapping with a name, got {task!r}")
    if not isinstance(config, Mapping):
        raise UserError(f"{path}: config must be a mapping of knobs, got {config!r}")
    if not isinstance(own, list) or not own or not all(type(seed) is int and seed >= 0 for seed in own):
        raise UserError(f"{path}: seeds must be a list of whole numbers >= 0, got {own!r}")
    try:
        for value in config.values():
            check_scalar(value)
        full, active = resolve_and_activate(config)
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: config: {one_line(error)}") from None
    params = {str(key): value for key, value in task.items() if key != "name"}
    spec = {"name": task["name"], "params": params, "base_dir": str(path.resolve().parent)}
    named = config_id(
        {"task": task["name"], **{f"task.{key}": value for key, value in params.items()}, **active}
    )
    return Examined(path.stem, spec, {named: full}, enough_seeds(own, seeds))


def _of_plan(plan: Plan, name: str, seeds: int) -> Examined:
    """The config that a plan trains without a search: what it fixes, and the default of all else."""
    full, active = resolve_and_activate(plan.config)
    named = config_id({**task_identity(plan), **active})
    note = f"{name} is a plan: examined is what it fixes, with the defaults of what it varies"
    return Examined(name, task_spec(plan), {named: full}, enough_seeds(plan.seeds, seeds), notes=(note,))


# --- a checkpoint ------------------------------------------------------------------------------------


def _of_checkpoint(path: Path, seeds: int, plan_path: Path | None, device: str) -> Examined:
    try:
        if plan_path is None:
            with task_errors_told(str(path)):
                trained = _read_or_say(path, device)
        else:
            plan = load_plan(plan_path)
            full, _ = resolve_and_activate(plan.config)
            weights = read_weights(path)
            with task_errors_told(plan.task.name):
                trained = _fit_or_say(task_spec(plan), full, plan.seeds[0], weights, device)
    except CheckpointError as error:
        raise UserError(one_line(error)) from None
    spec, (full, active) = trained.spec, resolve_and_activate(trained.config)
    identity = {"task": spec["name"], **{f"task.{key}": value for key, value in spec["params"].items()}}
    named = config_id({**identity, **active})
    own = enough_seeds((trained.seed,), seeds)
    return Examined(path.stem, spec, {named: full}, own, given={trial_id(named, trained.seed): trained})


def _read_or_say(path: Path, device: str) -> Trained:
    try:
        return read_trained(path, device)
    except CheckpointError as error:
        text = one_line(error)
        if "that of a training under way" in text:
            text += "; --plan PLAN.yaml says of which task and config it is"
        raise UserError(text) from None


def _fit_or_say(
    spec: Mapping[str, Any], config: Mapping[str, Any], seed: int, weights: Mapping[str, Any], device: str
) -> Trained:
    try:
        return make_trained(spec, config, seed, weights, device=device)
    except CheckpointError as error:
        raise UserError(one_line(error)) from None
