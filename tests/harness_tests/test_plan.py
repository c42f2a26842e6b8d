"""Plans: every mistake at once with its place, every default written back, one digest for one set of rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from harness.errors import EXIT_BAD_INPUT, UserError
from harness.plan import load_plan, plan_differences, plan_digest, plan_space, plan_text
from harness.proposals import SearchProposer
from trainables.configs import KNOB_TYPES, resolve_config

HEAD = "task: {name: table, data: data.csv, inputs: [x], target: y}\n"


def problems(tmp_path: Path, text: str) -> list[str]:
    path = tmp_path / "bad.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        load_plan(path)
    assert caught.value.exit_code == EXIT_BAD_INPUT
    return [line.removeprefix(f"{path}:") for line in caught.value.lines]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (HEAD + "space: [optimizer]\nserch: {}\n", ["3:1: unknown key 'serch', did you mean 'search'?"]),
        (
            HEAD + "space: [optimizer]\nsearch: {confgs: 3}\n",
            ["3:10: unknown key 'search.confgs', did you mean"],
        ),
        (HEAD + "space: [optimiser]\n", ["2:9: unknown space 'optimiser' (did you mean 'optimizer'?)"]),
        (HEAD, ["1:1: 'space' is missing"]),
        ("", ["1:1: plan: a plan is a mapping with at least `task` and `space`"]),
        (
            HEAD + "space: [optimizer]\nseeds: [1, 1]\n",
            ["3:8: seeds must differ from one another, got [1, 1]"],
        ),
        (HEAD + "space: [optimizer]\nseeds: []\n", ["3:8: seeds: list should have at least 1 item"]),
        (
            HEAD + "space: [optimizer]\nsearch: {configs: 0}\n",
            ["3:19: search.configs: input should be greater"],
        ),
        (
            HEAD + "space: [optimizer]\nsearch: {configs: '3'}\n",
            ["3:19: search.configs: input should be a valid"],
        ),
        (
            HEAD + "space: [optimizer]\nconfig: {max_epoch: 3}\n",
            ["3:10: unknown knob 'max_epoch', did you mean"],
        ),
        (HEAD + "space: [optimizer]\nconfig: {max_epochs: 0}\n", ["3:22: max_epochs must be >= 1"]),
        (HEAD + "space: [optimizer]\nconfig: {max_epochs: 2.5}\n", ["3:22: max_epochs must be of type int"]),
        (
            HEAD + "space: [optimizer]\nconfig: {tau_train_min: 0.2, tau_train_max: 0.1}\n",
            ["3:45: tau_train_min <= tau_train_max must hold, got 0.2 > 0.1"],
        ),
        (
            HEAD + "space:\n  tau_infer: {type: float, low: 1e-2, high: 1e-3, log: true}\n",
            ["3:14: tau_infer: low must be < high"],
        ),
        (
            HEAD + "space:\n  optimizer: {type: choice, options: []}\n",
            ["3:14: optimizer: options must not be empty"],
        ),
        (HEAD + "space: {}\n", ["2:8: "]),
        (HEAD + "space:\n  lr: {type: float, low: 1e-4, high: 1e-2}\n", ["3:7: unknown knob 'lr'"]),
        (
            HEAD + "space: [optimizer]\nhalving: {rungs: [3, 2]}\n",
            ["3:18: halving.rungs: rungs must increase"],
        ),
        (
            HEAD + "space: [optimizer]\nhalving: {rungs: [1], metric: val_los}\n",
            ["3:31: no epoch reports 'val_los', did you mean 'val_loss'?"],
        ),
        (
            HEAD + "space: [optimizer]\nranking: {by: [test_coverage]}\n",
            ["3:16: configs are chosen on the validation"],
        ),
        (
            HEAD + "space: [optimizer]\nsearch: {algorithm: tpe, objectives: [coverage]}\n",
            ["3:39: an objective must be better when lower", "3:38: scalarisation 'lexicographic' needs"],
        ),
        (
            HEAD + "space: [optimizer]\nranking: {by: [robustness]}\n",
            ["3:16: robustness is measured after a sweep"],
        ),
        (HEAD + "space: [optimizer\n", ["3:1: not YAML"]),
        (
            HEAD + "space: [optimizer]\nsearch: {algorithm: randm}\n",
            ["3:21: unknown search algorithm 'randm', did you mean 'random'? (known: random, grid"],
        ),
        (
            HEAD + "space: {use: [optimizer], override: {hidden_width: [8]}}\n",
            ["2:52: unknown knob 'hidden_width' (known: optimizer, "],
        ),
        (
            HEAD + "space: [optimizer]\nsearch: {algorithm: grid, configs: 4}\n",
            ["3:36: the grid of 'optimizer' with 3 values per range has more than 4 configs"],
        ),
        (
            HEAD + "space: [optimizer]\nsearch: {algorithm: nsga2, objectives: [coverage_shortfall]}\n",
            ["3:40: nsga2 needs at least 2 objectives, got 1"],
        ),
        (
            HEAD + "space: [optimizer]\nsearch: {points_per_range: 1000000000, batch: 99999999999}\n",
            ["3:28: search.points_per_range", "3:47: search.batch"],
        ),
        (
            HEAD + "space: [optimizer]\nconfig: {learning_rate: .nan, beta1: [1], batch_size: 1.5}\n",
            ["3:25: config.learning_rate: must be a finite number", "3:38: config.beta1: must be"],
        ),
        (
            HEAD + "space: [optimizer]\nconfig: {max_epochs: 100000000000000000000}\n",
            ["3:22: config.max_epochs: must fit into 64 bits"],
        ),
        (HEAD + "space: [optimizer]\nconfig: {optimizer: adm}\n", ["3:21: optimizer must be one of adam"]),
        (
            HEAD + "space: [tau_ranges]\nconfig: {tau_infer: 0.9}\n",
            ["3:21: tau_infer has no value <= 0.3, which tau_train_min would need"],
        ),
        (HEAD + "space: 5\n", ["2:8: a space must be a name, a list of names or a mapping, got 5"]),
        (HEAD + "space: [tau_ranges, [x]]\n", ["2:22: unknown space ['x']"]),
        (HEAD + "space: {domains: [1]}\n", ["2:18: domains must map at least one knob"]),
        (HEAD + "space: {use: [tau_ranges], constraints: a < b}\n", ["2:8: a constraint must read 'a <= b'"]),
        (HEAD + "space: {use: [tau_ranges], constraints: 5}\n", ["2:8: a constraint must read 'a <= b'"]),
        (
            HEAD + "space: {max_epochs: {type: int, low: 1, high: 100000000000000000000}}\n",
            ["2:21: max_epochs: high must fit into 64 bits"],
        ),
        (
            HEAD + "space: [optimizer]\nranking: {by: [coverage, 'coverage:higher']}\n",
            ["3:26: a metric must be named once, got 'coverage' again"],
        ),
        (
            HEAD + "space: [optimizer]\nresources: {cpus_per_trial: 1e-9, gpus_per_trial: 1.5}\n",
            [
                "3:29: resources.cpus_per_trial: input",
                "3:51: resources.gpus_per_trial: must be a whole number",
            ],
        ),
        (
            HEAD + "space: [optimizer]\nresources: {cpus_per_trial: 0.33333}\n",
            ["3:29: resources.cpus_per_trial: must have at most 4 decimals"],
        ),
        ("task: {name: table, split_seed: .nan}\nspace: [optimizer]\n", ["1:7: task: must be a finite"]),
        ("a: &a {b: *a}\n" + HEAD + "space: [optimizer]\n", ["1:1: unknown key 'a'"]),
        (HEAD + "space: [optimizer]\nspace: [tau_ranges]\n", ["3:1: found duplicate key"]),
        (
            HEAD + "spaces: [optimizer]\nseeds: [-1]\nsearch: {batch: many}\n",
            ["1:1: 'space' is missing", "4:17: search.batch", "3:9: seeds.0", "2:1: unknown key 'spaces'"],
        ),
    ],
)
def test_every_mistake_is_a_line_with_its_place(tmp_path: Path, text: str, expected: list[str]) -> None:
    """One line for each mistake, all of them at once, each with line, column and what would be right."""
    found = problems(tmp_path, text)
    assert len(found) == len(expected), found
    for part in expected:
        assert any(line.startswith(part) for line in found), (part, found)


def test_defaults_are_written_back_and_parse_to_the_same_plan(write_plan: Callable[..., Path]) -> None:
    """The resolved text holds every knob, as domain or value, and parses to the plan it came from."""
    path = write_plan(halving={"rungs": [1, 2]})
    plan = load_plan(path)
    again = path.parent / "elsewhere" / "plan.yaml"
    again.parent.mkdir()
    again.write_text(plan_text(plan), encoding="utf-8")
    assert load_plan(again) == plan
    assert plan_digest(load_plan(again)) == plan_digest(plan)
    assert {*plan.config, *plan.space["domains"]} == set(KNOB_TYPES)  # type: ignore[index]
    assert plan.base_dir == str(path.parent)


def test_the_digest_changes_with_the_rows_and_with_nothing_else(write_plan: Callable[..., Path]) -> None:
    """How many trials run at once leaves the digest; a seed, a domain or a knob changes it, and is named."""
    plan = load_plan(write_plan())
    same = load_plan(write_plan("same.yaml", resources={"max_concurrent": 1, "retries": 9}))
    assert plan_digest(same) == plan_digest(plan)
    assert plan_differences(same, plan) == []
    other = load_plan(write_plan("other.yaml", seeds=[0, 2], config={"max_epochs": 5}))
    assert plan_digest(other) != plan_digest(plan)
    assert "seeds" in plan_differences(plan, other)
    assert "config.max_epochs" in plan_differences(plan, other)


def test_orders_between_knobs_hold_even_where_the_space_does_not_name_them(
    write_plan: Callable[..., Path],
) -> None:
    """A space that varies one threshold alone draws only configs that a training accepts."""
    plan = load_plan(
        write_plan(space={"tau_train_max": {"type": "float", "low": 1e-6, "high": 1e-2, "log": True}})
    )
    space = plan_space(plan)
    for u in (0.0, 0.3, 1.0):
        config = space.sample([u])
        assert resolve_config(config)["tau_train_max"] >= config["tau_train_min"]  # type: ignore[operator]


def test_a_knob_in_config_is_held_fixed_though_the_space_varies_it(write_plan: Callable[..., Path]) -> None:
    """`config` wins over the space, and the knob is no dimension of the search any more."""
    plan = load_plan(write_plan(config={"max_epochs": 2, "tau_infer": 1e-3}))
    space = plan_space(plan)
    assert "tau_infer" not in space.dimensions
    assert space.sample([0.5] * len(space.dimensions))["tau_infer"] == 1e-3


def test_keys_that_are_merged_in_have_their_parents_place(tmp_path: Path) -> None:
    """YAML's << brings keys without a place of their own; what is wrong with them is still one line."""
    found = problems(tmp_path, HEAD + "space: [optimizer]\nconfig: {<<: {max_epochs: 0}, batch_size: 16}\n")
    assert len(found) == 1
    assert found[0].startswith("3:9: max_epochs must be >= 1")


def test_an_anchor_that_holds_itself_is_one_line(tmp_path: Path) -> None:
    """A document without an end is refused as such."""
    (tmp_path / "bad.yaml").write_text("task: &t\n  name: &n [*n]\n  data: *t\n", encoding="utf-8")
    with pytest.raises(UserError, match="nested too deeply|task"):
        load_plan(tmp_path / "bad.yaml")


def test_keys_of_a_task_are_text(tmp_path: Path) -> None:
    """A map from true, 0 and 1 means the same in the plan, in the run folder and in a config's identity."""
    text = "task: {name: table, status: {column: c, values: {TRUE: finite, 0: bottom}}}\nspace: [optimizer]\n"
    (tmp_path / "plan.yaml").write_text(text, encoding="utf-8")
    plan = load_plan(tmp_path / "plan.yaml")
    assert plan.task.params["status"]["values"] == {"true": "finite", "0": "bottom"}
    (tmp_path / "again.yaml").write_text(plan_text(plan), encoding="utf-8")
    assert load_plan(tmp_path / "again.yaml").task.params == plan.task.params
    assert SearchProposer(plan).next_batch()


@pytest.mark.parametrize(
    "value",
    ["!!int task", "!!float x", "2001-99-99", "{? [a] : 1}", "{? {b: [2]} : 3}"],
    ids=["int", "float", "date", "list as a key", "map as a key"],
)
def test_a_value_that_cannot_be_made_is_one_line(tmp_path: Path, value: str) -> None:
    """Where the tag of a value or its form does not fit it, the plan is refused and nothing is raised."""
    found = problems(tmp_path, HEAD + f"space: [optimizer]\nconfig: {value}\n")
    assert len(found) == 1
    assert "\n" not in found[0]
