"""The neighbours of a config: one knob, one step, within bounds and orders; what a held-out scenario is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.defaults.decide import OPTION, STEP
from harness.defaults.neighbours import MOST, THRESHOLDS, Neighbour, find_neighbours
from harness.defaults.scenarios import HELD_OUT, find_held_out, run_scenario
from harness.errors import UserError
from harness.plan import load_plan
from search_spaces.named import SPACES
from search_spaces.space import Space
from trainables.configs import resolve_and_activate, resolve_config
from trainables.tasks.registry import TASKS

SPACE = Space.from_plain(
    {
        "domains": {
            "learning_rate": {"type": "log-float", "low": 1e-4, "high": 1e-2},
            "beta1": {"type": "float", "low": 0.8, "high": 0.95},
            "hidden_depth": {"type": "int", "low": 1, "high": 3},
            "hidden_width": {"type": "log-int", "low": 8, "high": 128},
            "batch_size": [16, 32, 128],
            "clip_norm": [None, 0.1, 1.0],
            "optimizer": ["adam", "sgd"],
            "momentum": {"type": "float", "low": 0.5, "high": 0.9, "when": {"optimizer": ["sgd"]}},
        }
    }
)


def around(**knobs: Any) -> dict[str, list[Any]]:
    """The neighbours' values by knob."""
    found: dict[str, list[Any]] = {}
    for one in find_neighbours(resolve_config(knobs), SPACE)[0]:
        found.setdefault(one.knob, []).append(one.after)
    return found


def test_every_knob_moves_by_its_own_step() -> None:
    """Ratios, tenths of a range, whole numbers, the next number of a choice, and other options."""
    found = around(learning_rate=1e-3, beta1=0.9, tau_infer=1e-4, tau_train_min=1e-3, tau_train_max=1e-2)
    assert found["learning_rate"] == [5e-4, 2e-3]
    assert found["beta1"] == pytest.approx([0.885, 0.915])
    assert found["hidden_depth"] == [1, 3]
    assert found["hidden_width"] == [32, 128]
    assert found["batch_size"] == [16, 128]
    assert found["clip_norm"] == [0.1, 1.0]
    assert found["optimizer"] == ["sgd"]
    assert found["tau_infer"] == pytest.approx([1e-4 / 3, 3e-4])
    assert found["tau_train_min"] == pytest.approx([1e-3 / 3, 3e-3])
    assert "momentum" not in found  # adam has none


def test_a_step_stays_within_bounds_and_orders() -> None:
    """At a bound there is no neighbour beyond; a threshold stops where the next one stands."""
    found = around(learning_rate=8e-3, hidden_depth=3, tau_infer=1e-3, tau_train_min=2e-3, tau_train_max=2e-3)
    assert found["learning_rate"] == [4e-3, 1e-2]
    assert found["hidden_depth"] == [2]
    assert found["tau_infer"] == pytest.approx([1e-3 / 3, 2e-3])
    assert found["tau_train_min"] == [1e-3]
    assert found["tau_train_max"] == pytest.approx([6e-3])


def test_numbers_of_a_choice_are_steps_and_none_is_an_option() -> None:
    """From 0.1 the clip norm steps to 1.0, and may be turned off."""
    kinds = {
        (one.after, one.kind)
        for one in find_neighbours(resolve_config({"clip_norm": 0.1}), SPACE)[0]
        if one.knob == "clip_norm"
    }
    assert kinds == {(1.0, STEP), (None, OPTION)}


@given(st.lists(st.floats(0.0, 1.0), min_size=60, max_size=60), st.integers(1, MOST))
def test_neighbours_of_any_config_train_and_differ_in_one_knob(point: list[float], most: int) -> None:
    """Each is taken by a training, trains otherwise than the config and than the others, and is counted."""
    space = SPACES["default"]
    config = resolve_config(space.sample(point[: len(space.dimensions)]))
    found, left_out = find_neighbours(config, space, most=most)
    assert len(found) <= most
    assert left_out == 0 or len(found) == most
    trained = [resolve_and_activate(config)[1]]
    for one in found:
        differing = [knob for knob in config if one.config[knob] != config[knob]]
        assert differing == [one.knob]
        active = resolve_and_activate(one.config)[1]
        assert active not in trained
        trained.append(active)
    ranks = [0 if one.knob in THRESHOLDS else 1 if one.kind == STEP else 2 for one in found]
    assert ranks == sorted(ranks)


def test_the_same_config_has_the_same_neighbours() -> None:
    """In the same order, so that what is left out does not change from call to call."""
    config = resolve_config({})
    first: tuple[list[Neighbour], int] = find_neighbours(config, SPACE)
    assert first == find_neighbours(config, SPACE)


def test_every_task_of_the_project_says_what_is_held_out() -> None:
    """A task that is added must say how other data are had, or the command could not be used with it."""
    assert set(HELD_OUT) == set(TASKS)


@pytest.mark.parametrize("name, seed", [("dose", "data_seed"), ("rf", "data_seed"), ("table", "split_seed")])
def test_held_out_data_are_other_data(name: str, seed: str, write_plan: Callable[..., Path]) -> None:
    """One parameter differs, the task accepts it, and the training rows are others."""
    from trainables.loading import load_task

    task = {} if name == "table" else {"task": {"name": name, "n_train": 60, "n_val": 40, "n_test": 40}}
    plan = load_plan(write_plan(**task))
    own = run_scenario(plan)
    (held,), sentence = find_held_out(plan, (), [5])
    assert {
        key for key in held.spec["params"] if held.spec["params"][key] != own.spec["params"].get(key)
    } == {seed}
    assert held.held_out
    assert held.name != own.name
    assert held.what in sentence
    assert load_task(held.spec, 5).data_digest != load_task(own.spec, 5).data_digest


def test_a_task_whose_splits_come_from_the_seed_needs_no_more(tmp_path: Path) -> None:
    """Fresh seeds are other data there, which is said; one whose seeds share a split is refused."""
    root = Path(__file__).resolve().parents[2]
    text = "task: {name: 'own_task:LensTask', rows: 40}\nspace: tau_ranges\n"
    path = tmp_path / "plan.yaml"
    path.write_text(text + f"base_dir: {root / 'examples'}\n", encoding="utf-8")
    scenarios, sentence = find_held_out(load_plan(path), (), [2, 3])
    assert scenarios == []
    assert "by the seed" in sentence

    (tmp_path / "one_split.py").write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(root / 'examples')!r})\n"
        "from own_task import LensTask\n"
        "class OneSplit(LensTask):\n"
        "    def splits(self, seed):\n"
        "        return super().splits(0)\n",
        encoding="utf-8",
    )
    path.write_text("task: {name: 'one_split:OneSplit'}\nspace: tau_ranges\n", encoding="utf-8")
    with pytest.raises(UserError, match="can be held out"):
        find_held_out(load_plan(path), (), [2, 3])
    assert find_held_out(load_plan(path), ("none",), [2, 3])[0] == []
