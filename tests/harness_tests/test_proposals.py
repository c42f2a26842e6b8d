"""From a search to trials: every seed of every config, each config once, and what the search is told."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from harness.environment import trials_on_node
from harness.errors import UserError
from harness.jobs import EndedTrial, TrialSpec
from harness.objectives import Objective
from harness.plan import ResourcesSection, load_plan
from harness.proposals import SearchProposer
from trainables.configs import KNOB_TYPES, resolve_config


def end(spec: TrialSpec, **outcome: Any) -> EndedTrial:
    good = {
        "status": "completed",
        "coverage": 0.9,
        "target_coverage": 0.95,
        "accepted_error": 1.0,
        "nan_count": 0,
    }
    return EndedTrial(spec, good | outcome, {})


def test_every_config_with_every_seed_and_every_knob(write_plan: Callable[..., Path]) -> None:
    """A batch is configs times seeds, and a trial's config names every knob."""
    proposer = SearchProposer(load_plan(write_plan(seeds=[3, 5])))
    first, second = proposer.next_batch(), proposer.next_batch()
    assert proposer.next_batch() == []
    assert [spec.cohort for spec in first + second] == [0] * 4 + [1] * 4
    assert [spec.seed for spec in first] == [3, 5, 3, 5]
    assert len({spec.trial_id for spec in first + second}) == 8
    assert set(first[0].config) == set(KNOB_TYPES)


def test_a_batch_drawn_ahead_is_the_one_that_would_be_drawn(write_plan: Callable[..., Path]) -> None:
    plan = load_plan(write_plan())
    ahead, right = SearchProposer(plan), SearchProposer(plan)
    ahead.draw_ahead()
    for _ in range(3):
        assert ahead.next_batch() == right.next_batch()


@pytest.mark.parametrize("algorithm", ["random", "tpe"])
def test_the_defaults_are_trained_beside_what_is_drawn(
    algorithm: str, write_plan: Callable[..., Path]
) -> None:
    """Asked for, the first batch holds the config of no search at all, once; the search is not told of it."""
    search = {"algorithm": algorithm, "configs": 4, "batch": 2, "with_defaults": True}
    proposer = SearchProposer(load_plan(write_plan(search=search, config={"max_epochs": 2}, seeds=[0, 1])))
    first = proposer.next_batch()
    assert len(first) == 2 + 2 * 2
    assert first[0].config == resolve_config({"max_epochs": 2})
    proposer.batch_ended(0, {spec.trial_id: end(spec) for spec in first})
    second = proposer.next_batch()
    assert len(second) == 2 * 2
    assert not {spec.config_id for spec in first} & {spec.config_id for spec in second}


def test_a_fixed_knob_holds_for_every_config(write_plan: Callable[..., Path]) -> None:
    """The target asked for is every config's, also of those whose coverage term does not train towards it."""
    plan = write_plan(
        space=["coverage_targets"],
        config={"target_coverage": 0.6, "max_epochs": 1},
        search={"algorithm": "random", "configs": 8, "batch": 8},
    )
    specs = SearchProposer(load_plan(plan)).next_batch()
    assert {spec.config["coverage_term"] for spec in specs} == {"soft", "hard"}
    assert {spec.config["target_coverage"] for spec in specs} == {0.6}


def test_configs_that_differ_in_inert_knobs_are_trained_once(write_plan: Callable[..., Path]) -> None:
    """Momentum does nothing under adam: four points of the grid are two configs."""
    space = {
        "momentum": {"type": "choice", "options": [0.1, 0.9]},
        "learning_rate": {"type": "choice", "options": [1e-3, 1e-2]},
    }
    plan = load_plan(
        write_plan(space=space, search={"algorithm": "grid", "configs": 4, "batch": 1}, seeds=[0])
    )
    proposer = SearchProposer(plan)
    drawn = []
    while batch := proposer.next_batch():
        drawn += batch
    assert sorted(spec.config["learning_rate"] for spec in drawn) == [1e-3, 1e-2]


def test_the_identity_of_a_config_is_its_task_and_its_active_knobs(write_plan: Callable[..., Path]) -> None:
    """Another task, or another value of a knob that acts, is another config; the search's seed is not."""
    one = SearchProposer(load_plan(write_plan()))
    config = one.next_batch()[0].config
    other_search = SearchProposer(load_plan(write_plan(search={"configs": 2, "seed": 9})))
    other_task = SearchProposer(load_plan(write_plan(task={"name": "dose"})))
    assert other_search.config_id(config) == one.config_id(config)
    assert other_task.config_id(config) != one.config_id(config)
    assert one.config_id({**config, "beta1": 0.5}) != one.config_id(config)
    assert one.config_id({**config, "momentum": 0.5}) == one.config_id(config)


@pytest.mark.parametrize(
    ("outcome", "feasible"),
    [
        ({}, True),
        ({"accepted_error": float("nan")}, False),
        ({"status": "diverged"}, False),
        ({"status": "failed"}, False),
        ({"nan_count": 1}, False),
    ],
)
def test_one_bad_seed_is_told_to_the_search(
    outcome: dict[str, Any], feasible: bool, write_plan: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The search hears of every config of a batch, and one bad seed makes a config a bad one."""
    proposer = SearchProposer(load_plan(write_plan(search={"algorithm": "tpe", "configs": 4, "batch": 2})))
    assert proposer.waits
    told: dict[str, Objective] = {}
    monkeypatch.setattr(proposer._searcher, "tell", lambda results: told.update(results))
    batch = proposer.next_batch()
    ended = {spec.trial_id: end(spec, **(outcome if spec is batch[-1] else {})) for spec in batch}
    proposer.batch_ended(0, ended)
    good, judged = told.values()
    assert good.feasible
    assert judged.feasible == feasible
    assert good.values == (pytest.approx(0.05), 1.0)


@pytest.mark.parametrize(
    ("has", "asks", "fits"),
    [
        ({"CPU": 2.0}, {"cpus_per_trial": 1}, 2),
        ({"CPU": 2.0}, {"cpus_per_trial": 0.1}, 20),
        ({"CPU": 2.0}, {"cpus_per_trial": 3}, 0),
        ({"CPU": 16.0}, {"cpus_per_trial": 1, "gpus_per_trial": 1}, 0),
        ({"CPU": 16.0, "GPU": 1.0}, {"cpus_per_trial": 1, "gpus_per_trial": 0.25}, 4),
    ],
)
def test_how_many_trials_a_node_holds(has: dict[str, float], asks: dict[str, float], fits: int) -> None:
    """The scarcer of CPUs and GPUs decides."""
    assert trials_on_node(has, ResourcesSection(**asks)) == fits  # type: ignore[arg-type]


def test_an_objective_may_say_its_direction(write_plan: Callable[..., Path]) -> None:
    """`metric.hits:lower` reads the column metric.hits; a metric that no trial has is named."""
    search = {"algorithm": "nsga2", "configs": 2, "batch": 2}
    search["objectives"] = ["coverage_shortfall", "metric.hits:lower"]
    proposer = SearchProposer(load_plan(write_plan(search=search)))
    specs = proposer.next_batch()
    proposer.batch_ended(0, {spec.trial_id: end(spec, **{"metric.hits": 1.0}) for spec in specs})
    assert proposer.next_batch() == []
    other = SearchProposer(load_plan(write_plan(search=search)))
    specs = other.next_batch()
    with pytest.raises(UserError, match="search.objectives: no trial reports the metric 'metric.hits'"):
        other.batch_ended(0, {spec.trial_id: end(spec) for spec in specs})


class CountedSearcher:
    """Three batches, of which the second holds nothing new, and what it was told of them."""

    def __init__(self, learns: bool) -> None:
        self.learns = learns
        self.cohort = -1
        self.told: list[str] = []
        self._batches = [
            [{"optimizer": "adam", "momentum": 0.5}],
            [{"optimizer": "adam", "momentum": 0.7}],
            [{"optimizer": "adam", "momentum": 0.9}, {"optimizer": "sgd", "momentum": 0.9}],
        ]

    def next_batch(self) -> list[dict[str, Any]]:
        self.cohort += 1
        return self._batches.pop(0) if self._batches else []

    def tell(self, results: Iterable[tuple[str, Objective]]) -> None:
        self.told += [name for name, _ in results]


@pytest.mark.parametrize(("learns", "told"), [(True, [1, 2, 4]), (False, [0, 0, 0])])
def test_a_config_drawn_again_is_trained_once_and_told_every_time(
    learns: bool, told: list[int], write_plan: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A search that learns is told each of its draws; one that does not is told nothing."""
    searcher = CountedSearcher(learns)
    monkeypatch.setattr("harness.proposals.make_plan_searcher", lambda plan: searcher)
    proposer = SearchProposer(load_plan(write_plan(space=["optimizer"], seeds=[0], config={"max_epochs": 1})))
    counts = []
    one = proposer.next_batch()
    proposer.batch_ended(0, {spec.trial_id: end(spec) for spec in one})
    counts.append(len(searcher.told))
    two = proposer.next_batch()
    counts.append(len(searcher.told))
    proposer.batch_ended(2, {spec.trial_id: end(spec) for spec in two})
    counts.append(len(searcher.told))
    assert [spec.config["optimizer"] for spec in [*one, *two]] == ["adam", "sgd"]
    assert counts == told
    assert len(set(searcher.told)) == len(searcher.told)
