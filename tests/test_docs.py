"""The documents: their Python runs, their plans parse, and they name everything there is."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
from ruamel import yaml

from harness.cli.main import COMMANDS, help_text
from harness.plan import Plan, load_plan, plan_space
from reports.schema import BASE_COLUMNS
from search_spaces.named import SPACES
from trainables.tasks.registry import TASKS
from trainables.tasks.table import TableParams, parse_table_params

ROOT = Path(__file__).resolve().parents[1]
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BY_NAME = pytest.mark.parametrize("path", DOCS, ids=[path.name for path in DOCS])


def blocks(path: Path, language: str) -> list[str]:
    """The fenced blocks of one language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), re.M | re.S)


@BY_NAME
def test_the_python_of_a_document_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of one document, run one after another in an empty folder, raise nothing."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "document"}
    for number, source in enumerate(blocks(path, "python"), 1):
        exec(compile(source, f"{path.name}, block {number}", "exec"), names)
    assert path.stat().st_size


@pytest.mark.parametrize("number", [0, 1])
def test_the_plans_of_the_documents_are_plans(number: int, tmp_path: Path) -> None:
    """A plan shown in the documents parses, and its space can be drawn from."""
    text = blocks(ROOT / "docs" / "plans.md", "yaml")[number]
    path = tmp_path / "plan.yaml"
    path.write_text(text if "task:" in text else f"task: {{name: dose}}\n{text}", encoding="utf-8")
    space = plan_space(load_plan(path))
    assert space.validate(space.sample([0.5] * len(space.dimensions))) is None


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda path: path.name)
def test_the_example_plans_are_plans(path: Path) -> None:
    """Every plan under examples/ parses, and asks for at least 24 configs with two seeds."""
    plan = load_plan(path)
    assert plan.search.configs >= 24
    assert len(plan.seeds) >= 2


def test_every_key_of_a_plan_is_explained() -> None:
    """docs/plans.md names every section of a plan and every key in it."""
    text = (ROOT / "docs" / "plans.md").read_text(encoding="utf-8")
    keys = set(Plan.model_fields)
    for field in Plan.model_fields.values():
        for kind in getattr(field.annotation, "__args__", (field.annotation,)):
            keys |= set(getattr(kind, "model_fields", {}))
    assert sorted(key for key in keys if f"{key}:" not in text) == []


def test_the_parameters_of_the_table_task_are_explained() -> None:
    """The plan in docs/tasks.md names every parameter of `table`, and no other."""
    shown = yaml.YAML(typ="safe").load(blocks(ROOT / "docs" / "tasks.md", "yaml")[0])["task"]
    assert set(shown) - {"name"} == {field.name for field in dataclasses.fields(TableParams)}
    assert parse_table_params({key: value for key, value in shown.items() if key != "name"})


def test_every_column_task_space_and_command_is_named() -> None:
    """What can be asked for by name stands in a document under that name."""
    texts = {path.name: path.read_text(encoding="utf-8") for path in DOCS}
    assert [column.name for column in BASE_COLUMNS if f"`{column.name}`" not in texts["rows.md"]] == []
    assert [task for task in TASKS if f"`{task}`" not in texts["tasks.md"]] == []
    assert [command for command in COMMANDS if f"scm-harness {command}" not in "".join(texts.values())] == []
    assert [space for space in SPACES if space not in texts["plans.md"] + texts["README.md"]] == []


def test_the_exit_codes_of_the_documents_are_those_of_the_help() -> None:
    """docs/plans.md and `--help` list the same exit codes."""
    documented = set(
        re.findall(r"^\| (\d+) \|", (ROOT / "docs" / "plans.md").read_text(encoding="utf-8"), re.M)
    )
    help_codes = help_text().split("exit codes:")[1]
    assert documented == set(re.findall(r"\b(\d{1,3}) (?=[a-z])", help_codes))


@BY_NAME
def test_links_lead_somewhere(path: Path) -> None:
    """A relative link of a document names a file that exists."""
    links = re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text(encoding="utf-8"))
    assert [link for link in links if not (path.parent / link).exists()] == []
