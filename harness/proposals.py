"""From a plan's search to trials: each batch of configs with every seed, and back from rows to objectives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from harness.errors import UserError, one_line
from harness.jobs import EndedTrial, TrialSpec
from harness.objectives import Objective, objective_of_rows
from harness.plan import Plan, plan_space
from harness.search import Searcher, make_searcher
from reports.metrics import parse_metric
from search_spaces.identity import config_id, trial_id
from trainables.configs import resolve_and_activate


class SearchProposer:
    """Draws the batches of a plan's search, a trial per config and seed, and tells the searcher the results.

    Two draws that differ only in knobs without effect are one config: it is trained once, and both are told.
    A search that does not learn is told nothing: what stays here of its configs is that they were drawn.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._searcher = make_plan_searcher(plan)
        self._metrics = [parse_metric(text).name for text in plan.search.objectives]
        self._identity = task_identity(plan)
        self._untold: dict[str, str] = {}  # what a searcher that learns calls a config -> config_id
        self._objectives: dict[str, Objective] = {}  # for such a searcher, which may draw a config again
        self._known: set[str] = set()
        self._ahead: list[TrialSpec] | None = None

    @property
    def waits(self) -> bool:
        """Whether a batch must have ended before the next one can be drawn."""
        return self._searcher.learns

    def draw_ahead(self) -> None:
        """Draw the first batch now, while there is time; `next_batch` will give it."""
        self._ahead = self.next_batch()

    def next_batch(self) -> list[TrialSpec]:
        """The trials of the next batch that holds a new config; none when all configs have been drawn."""
        if self._ahead is not None:
            ahead, self._ahead = self._ahead, None
            return ahead
        while configs := self._searcher.next_batch():
            cohort = self._searcher.cohort
            specs: list[TrialSpec] = []
            if self._plan.search.with_defaults and not self._known:
                specs += self._new_trials(*full_config(self._plan.config), cohort)[1]
            for drawn in configs:
                # A fixed knob holds for every config, also where the space would not have drawn it.
                full, active = full_config({**self._plan.config, **drawn})
                identity, new = self._new_trials(full, active, cohort)
                if self.waits:
                    self._untold[config_id(drawn)] = identity
                specs += new
            if specs:
                return specs
            self._tell()
        return []

    def _new_trials(
        self, config: dict[str, Any], active: dict[str, Any], cohort: int
    ) -> tuple[str, list[TrialSpec]]:
        """The identity of a config, and a trial for each seed of one that no batch has held yet."""
        identity = self._identify(active)
        if identity in self._known:
            return identity, []
        self._known.add(identity)
        return identity, [
            TrialSpec(trial_id(identity, seed), identity, seed, cohort, config, active)
            for seed in self._plan.seeds
        ]

    def batch_ended(self, cohort: int, ended: Mapping[str, EndedTrial]) -> None:
        """Tell the searcher what every config of a batch was worth, over all its seeds."""
        rows: dict[str, list[Mapping[str, Any]]] = {}
        for one in ended.values():
            rows.setdefault(one.trial.config_id, []).append(one.outcome)
        for identity, outcomes in rows.items():
            budget = self._plan.ranking.nan_budget
            try:
                objective = objective_of_rows(outcomes, self._metrics, budget)
            except ValueError as error:
                raise UserError(f"search.objectives: {one_line(error)}") from None
            if self.waits:
                self._objectives[identity] = objective
        self._tell()

    def config_id(self, config: Mapping[str, Any]) -> str:
        """The identity of a config: its task and the knobs that change its training."""
        return self._identify(full_config(config)[1])

    def _identify(self, active: Mapping[str, Any]) -> str:
        return config_id({**self._identity, **active})

    def _tell(self) -> None:
        self._searcher.tell((name, self._objectives[identity]) for name, identity in self._untold.items())
        self._untold.clear()


def make_plan_searcher(plan: Plan) -> Searcher:
    """The searcher that a plan names, with the options that it reads; a `UserError` where they do not fit."""
    search = plan.search
    options: dict[str, dict[str, Any]] = {
        "grid": {"points_per_range": search.points_per_range},
        "tpe": {"startup": search.startup, "scalarisation": search.scalarisation},
        "nsga2": {"objectives": len(search.objectives)},
    }
    try:
        return make_searcher(
            search.algorithm,
            plan_space(plan),
            search.configs,
            seed=search.seed,
            batch=search.batch,
            **options.get(search.algorithm, {}),
        )
    except ValueError as error:
        raise UserError(f"search: {one_line(error)}") from None


def task_identity(plan: Plan) -> dict[str, Any]:
    """The part of a config's identity that says what is learned."""
    return {"task": plan.task.name, **{f"task.{name}": value for name, value in plan.task.params.items()}}


def full_config(drawn: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A drawn config with every default filled in, and those of its knobs that change its training.

    One that no training accepts stays as it is, and fails.
    """
    try:
        return resolve_and_activate(drawn)
    except (ValueError, TypeError):
        return dict(drawn), dict(drawn)
