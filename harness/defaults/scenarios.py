"""The scenarios that a default is confirmed on: the run's own, and one whose data chose nothing in the run.

A scenario is a task with its parameters. What a held-out scenario is depends on the task, and is said in
`what`; a task that gives no other data by its parameters needs a plan that names some.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.errors import UserError
from harness.plan import Plan, load_plan
from harness.sweep import task_spec
from harness.task_errors import task_errors_told
from search_spaces.identity import scenario_name
from trainables.loading import load_task

NONE = "none"


@dataclass(frozen=True, slots=True)
class Scenario:
    """One task with its parameters. spec: as jobs name tasks. what: a clause that says what its data are."""

    name: str
    spec: Mapping[str, Any]
    what: str
    held_out: bool = False


def run_scenario(plan: Plan) -> Scenario:
    """The scenario that the run's configs were searched on."""
    name = scenario_name(plan.task.name, plan.task.params)
    return Scenario(name, task_spec(plan), "the run's own task and data")


def find_held_out(plan: Plan, holdout: Sequence[str], seeds: Sequence[int]) -> tuple[list[Scenario], str]:
    """The held-out scenarios, and one sentence on what is held out.

    `holdout` names plans, or is ["none"]; without it the task gives one by its own parameters. `seeds` are
    those that will be trained. Raises UserError where no data can be held out and nobody said "none".
    """
    if list(holdout) == [NONE]:
        return [], "no scenario was held out, by --holdout none: only seeds are fresh"
    if NONE in holdout:
        raise UserError("--holdout none must stand alone, got plans beside it")
    own = run_scenario(plan)
    if holdout:
        found = [_of_plan(Path(path)) for path in holdout]
        names = [own.name, *(scenario.name for scenario in found)]
        for index, scenario in enumerate(found):
            if scenario.name in names[: index + 1]:
                raise UserError(
                    f"--holdout {holdout[index]}: its task and parameters are those of another scenario "
                    f"({scenario.name}); a held-out scenario must have data of its own"
                )
        for scenario in found:
            with task_errors_told(scenario.spec["name"]):
                load_task(scenario.spec, seeds[0])
        return found, "held out: " + ", ".join(f"{item.name} ({item.what})" for item in found)
    make = HELD_OUT.get(plan.task.name)
    made = make(plan.task.params) if make is not None else None
    if made is not None:
        params, what = made
        spec = {**own.spec, "params": params}
        with task_errors_told(plan.task.name):
            load_task(spec, seeds[0])
        return [
            Scenario(scenario_name(plan.task.name, params), spec, what, held_out=True)
        ], f"held out: {what}"
    with task_errors_told(plan.task.name):
        digests = {load_task(own.spec, seed).data_digest for seed in seeds[:2]}
    if len(digests) > 1:
        return [], (
            "the task deals or draws its data by the seed, so every fresh seed is trained and measured on "
            "data that the run did not see; no other scenario was held out"
        )
    raise UserError(
        f"no data of task {plan.task.name} can be held out: all its seeds share one split, and no parameter "
        "deals another; name a plan with other data by --holdout PLAN.yaml, or go without by --holdout none"
    )


def _of_plan(path: Path) -> Scenario:
    plan = load_plan(path)
    name = scenario_name(plan.task.name, plan.task.params)
    return Scenario(name, task_spec(plan), f"the task of {path.name}", held_out=True)


def _other_deal(params: Mapping[str, Any]) -> tuple[dict[str, Any], str] | None:
    if params.get("split") is not None:
        return None  # a split that the data's owner made has a reason, which another deal would not respect
    seed = int(params.get("split_seed", 0))
    return {**params, "split_seed": seed + 1}, (
        f"the same rows, dealt to other splits (split_seed {seed + 1} instead of {seed}); rows that the run "
        "validated on are among them"
    )


def _other_draw(params: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    seed = int(params.get("data_seed", 0))
    return {**params, "data_seed": seed + 1}, f"data drawn anew (data_seed {seed + 1} instead of {seed})"


# Per task: other parameters and what is different, or None where its own parameters give no other data.
HELD_OUT: dict[str, Callable[[Mapping[str, Any]], tuple[dict[str, Any], str] | None]] = {
    "table": _other_deal,
    "grid": _other_deal,
    "dose": _other_draw,
    "rf": _other_draw,
    "rr_ik": _other_draw,
}
