"""Plans: every mistake at once with its place, every default written back, one digest for one set of rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from harness.errors import EXIT_BAD_INPUT, UserError
from harness.plan import load_plan, plan_differences, plan_digest, plan_space, plan_text
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
            HEAD + "space: [optimizer]\nsearch: {objectives: [coverage]}\n",
            ["3:23: an objective must be better when lower", "3:22: scalarisation 'lexicographic' needs"],
        ),
        (HEAD + "space: [optimizer\n", ["3:1: not YAML"]),
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
