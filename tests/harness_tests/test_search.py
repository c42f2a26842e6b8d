"""Searchers: generations without duplicates, the same every time, and away from the diverging region."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from harness.objectives import Objective
from harness.search import SEARCHERS, make_searcher, sobol_points
from search_spaces.domains import Choice, Const, Float, Int
from search_spaces.identity import config_id
from search_spaces.named import SPACES
from search_spaces.ordering import LessEqual
from search_spaces.space import Space

CUBE = Space("cube", {f"x{i}": Float(0.0, 1.0) for i in range(3)})
MIXED = Space(
    "mixed",
    {
        "kind": Choice(("a", "b", None)),
        "low": Float(1e-4, 1.0, log=True),
        "high": Float(1e-3, 1.0, log=True),
        "depth": Int(1, 4, when={"kind": ("a",)}),
        "width": Int(4, 64, log=True),
    },
    [LessEqual("low", "high")],
)
LEARNERS = ["tpe", "nsga2"]
SAMPLERS = ["random", "sobol", *LEARNERS]


def cliff(config):
    """The toy: NaN beyond x0 = 0.6 and the optimum, -0.6, at that very edge."""
    if config["x0"] > 0.6:
        return math.nan
    return -config["x0"] + (config["x1"] - 0.3) ** 2 + (config["x2"] - 0.7) ** 2


def judge(config):
    """Two objectives for MIXED, some of them not finite."""
    if config["kind"] == "b" and config["low"] > 0.1:
        return Objective((math.nan, math.nan))
    return Objective((min(1.0, config["low"]), config["high"] + config.get("depth", 2) / config["width"]))


def run(searcher, objective, *, backwards=False):
    """All batches of a searcher that is told what `objective` says."""
    batches = []
    while batch := searcher.next_batch():
        batches.append(batch)
        results = [(config_id(config), objective(config)) for config in batch]
        searcher.tell(reversed(results) if backwards else results)
    return batches


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_searcher_gives_as_many_different_valid_configs_as_asked(name):
    """Batches of the asked size, every config valid, none twice."""
    searcher = make_searcher(name, MIXED, 30, seed=3, batch=8)
    batches = run(searcher, judge)
    assert [len(batch) for batch in batches] == [8, 8, 8, 6]
    configs = [config for batch in batches for config in batch]
    for config in configs:
        MIXED.validate(config)
    assert len({config_id(config) for config in configs}) == 30
    assert searcher.next_batch() == []
    assert searcher.cohort == 3


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_searcher_is_a_function_of_its_seed_and_the_results(name):
    """Same seed and results, same configs, in whatever order results come; another seed gives others."""
    first = run(make_searcher(name, MIXED, 24, seed=1), judge)
    assert run(make_searcher(name, MIXED, 24, seed=1), judge, backwards=True) == first
    assert run(make_searcher(name, MIXED, 24, seed=2), judge) != first


@pytest.mark.parametrize("name", LEARNERS)
def test_results_steer_a_searcher_that_learns(name):
    """Other results give other configs after the first batches."""
    first = run(make_searcher(name, MIXED, 40), judge)
    second = run(make_searcher(name, MIXED, 40), lambda config: Objective((0.0, -config["high"])))
    assert first[0] == second[0]
    assert first != second


@pytest.mark.parametrize("hash_seed", ["0", "1"])
def test_another_process_draws_the_same(hash_seed):
    """Neither process nor hash seed changes what TPE and NSGA-II draw."""
    program = (
        "import json, sys\n"
        "from harness.search import make_searcher\n"
        "from harness.objectives import Objective\n"
        "from search_spaces.identity import config_id\n"
        "from search_spaces.named import SPACES\n"
        "ids = []\n"
        "for name in ('tpe', 'nsga2', 'sobol'):\n"
        "    searcher = make_searcher(name, SPACES['default'], 20, seed=5, batch=5)\n"
        "    while batch := searcher.next_batch():\n"
        "        ids += map(config_id, batch)\n"
        "        searcher.tell([(config_id(c), Objective((0.1, c['learning_rate']))) for c in batch])\n"
        "print(json.dumps(ids))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=True,
    )
    here = []
    for name in ("tpe", "nsga2", "sobol"):
        batches = run(
            make_searcher(name, SPACES["default"], 20, seed=5, batch=5),
            lambda config: Objective((0.1, config["learning_rate"])),
        )
        here += [config_id(config) for batch in batches for config in batch]
    assert json.loads(done.stdout) == here


@pytest.mark.parametrize("batch", [1, 8])
def test_tpe_stays_out_of_the_region_where_training_diverges(batch):
    """Less than 35 % of the last 50 of 150 configs are NaN, and the optimum at the edge is found."""
    late, best = [], []
    for seed in range(5):
        searcher = make_searcher("tpe", CUBE, 150, seed=seed, batch=batch, scalarisation="total")
        values = [
            cliff(config)
            for drawn in run(searcher, lambda config: Objective((cliff(config),)))
            for config in drawn
        ]
        late.append(sum(map(math.isnan, values[-50:])) / 50)
        best.append(min(value for value in values if not math.isnan(value)))
    assert sum(late) / len(late) < 0.35
    assert sum(best) / len(best) < -0.58


@pytest.mark.parametrize("name", LEARNERS)
def test_nothing_is_left_running_and_no_result_is_told_as_failed(name):
    """Every config drawn is a complete trial of the study with finite numbers, NaN or not."""
    searcher = make_searcher(name, MIXED, 32)
    run(searcher, lambda config: Objective((math.nan, 1.0)) if config["low"] < 0.05 else judge(config))
    trials = searcher._study.trials
    complete = [trial for trial in trials if trial.state.name == "COMPLETE"]
    assert len(complete) == 32
    assert all(math.isfinite(value) for trial in complete for value in trial.values)
    assert {trial.state.name for trial in trials} <= {"COMPLETE", "FAIL"}
    assert all(trial.values is None for trial in trials if trial.state.name == "FAIL")


@pytest.mark.parametrize("name", LEARNERS)
def test_a_searcher_survives_that_nothing_is_finite(name):
    """When every training diverges the search goes on to the end."""
    assert (
        len(run(make_searcher(name, MIXED, 20), lambda config: Objective((math.nan, math.nan), 7, True))) == 3
    )


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_small_space_ends_early_and_gives_each_config_once(name):
    """Where the space has six configs, six are given, however many were asked for."""
    space = Space("six", {"a": Choice((1, 2, 3)), "b": Choice((True, False))})
    batches = run(
        make_searcher(name, space, 50, batch=4), lambda config: Objective((0.0, float(config["a"])))
    )
    assert sorted(config["a"] for batch in batches for config in batch) == [1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("name", sorted(SEARCHERS))
def test_a_space_of_constants_gives_its_only_config(name):
    """Nothing varies: one batch of one config."""
    searcher = make_searcher(name, Space("one", {"a": Const(1)}), 5)
    assert run(searcher, lambda config: Objective((0.0, 0.0))) == [[{"a": 1}]]


def test_a_grid_is_covered_in_batches():
    """The grid's configs, in order, in batches; values per range are an option."""
    space = Space("small", {"a": Choice((1, 2)), "x": Float(0.0, 1.0)})
    batches = run(
        make_searcher("grid", space, 10, batch=4, points_per_range=4), lambda config: Objective((0.0,))
    )
    assert [config for batch in batches for config in batch] == list(space.grid(4))
    assert [len(batch) for batch in batches] == [4, 4]


def test_a_grid_that_would_be_cut_is_refused():
    """More grid than count: an error that says what to do, found without walking a huge grid."""
    with pytest.raises(
        ValueError, match=r"the grid of 'default' .* has more than 24 configs; ask for more configs"
    ):
        make_searcher("grid", SPACES["default"], 24)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("finished", [0, 5, 8, 11, 24])
def test_a_resumed_search_goes_on_where_it_stopped(name, finished):
    """Told the stored results before the rest, a new searcher draws what an uninterrupted one did."""
    whole = run(make_searcher(name, MIXED, 24, seed=4), judge)
    stored = [config_id(config) for batch in whole for config in batch][:finished]
    searcher = make_searcher(name, MIXED, 24, seed=4)
    again = []
    while batch := searcher.next_batch():
        again.append(batch)
        results = [(config_id(config), judge(config)) for config in batch]
        for known in (True, False):
            searcher.tell([result for result in results if (result[0] in stored) is known])
    assert again == whole


def test_sobol_fills_the_cube_evenly():
    """Of the first 16 points each sixteenth of every axis holds exactly one."""
    points = [point for point, _ in zip(sobol_points(5, seed=9), range(16), strict=False)]
    for axis in range(5):
        assert sorted(int(point[axis] * 16) for point in points) == list(range(16))


@pytest.mark.parametrize("name", LEARNERS)
def test_a_learner_waits_for_all_results(name):
    """The next batch before the last is told, and results of strangers, are errors."""
    searcher = make_searcher(name, MIXED, 24)
    batch = searcher.next_batch()
    searcher.tell([(config_id(batch[0]), judge(batch[0]))])
    with pytest.raises(ValueError, match="all results must be told before the next batch, missing"):
        searcher.next_batch()
    with pytest.raises(ValueError, match="results must be of configs drawn here"):
        searcher.tell([("0123456789ab", judge(batch[0]))])


def test_a_searcher_that_does_not_learn_need_not_wait():
    """Random and grid batches may be drawn ahead of their results."""
    searcher = make_searcher("random", MIXED, 16)
    assert searcher.next_batch() != searcher.next_batch()


def test_nsga2_refuses_another_number_of_objectives():
    """One value where two are minimised is an error at once, not in the middle of a generation."""
    searcher = make_searcher("nsga2", MIXED, 8)
    with pytest.raises(ValueError, match="an objective must have 2 values"):
        searcher.tell([(config_id(searcher.next_batch()[0]), Objective((1.0,)))])


BAD = {
    "name": (("tpee", {}), r"unknown search algorithm 'tpee' \(did you mean 'tpe'\?\)"),
    "count": (("random", {"count": 0}), "count must be an integer >= 1, got count=0"),
    "batch": (("random", {"batch": 0}), "batch must be an integer >= 1"),
    "seed": (("tpe", {"seed": -1}), "seed must be an integer >= 0"),
    "large seed": (("sobol", {"seed": 2**32}), r"seed must be < 2\*\*32"),
    "scalarisation": (("tpe", {"scalarisation": "total_"}), r"\(did you mean 'total'\?\)"),
    "startup": (("tpe", {"startup": 0}), "startup must be >= 1"),
    "one objective": (("nsga2", {"objectives": 1}), "objectives must be >= 2 for nsga2"),
}


@pytest.mark.parametrize("arguments, message", BAD.values(), ids=BAD)
def test_bad_settings_are_refused(arguments, message):
    """Settings out of range name the rule and the value."""
    name, options = arguments
    with pytest.raises(ValueError, match=message):
        make_searcher(name, MIXED, **{"count": 8, **options})
