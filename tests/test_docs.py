"""The documents: their Python runs, their plans parse, and they name everything there is."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
from ruamel import yaml

from harness.cli.main import COMMANDS, help_text, main
from harness.defaults.record import record_text
from harness.plan import Plan, load_plan, plan_space
from harness.yaml_text import write_yaml
from reports.metrics import METRICS
from reports.robustness_shift import SHIFT_COLUMNS
from reports.schema import BASE_COLUMNS, HISTORY_COLUMNS
from scm.training.targets import STATUSES
from scm.trial_config import KNOBS
from search_spaces.named import SPACES
from trainables.configs import resolve_config
from trainables.tasks.registry import TASKS
from trainables.tasks.table import TableParams, parse_table_params
from trainables.trial import HISTORY_KEYS

ROOT = Path(__file__).resolve().parents[1]
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BY_NAME = pytest.mark.parametrize("path", DOCS, ids=[path.name for path in DOCS])


def blocks(path: Path, language: str) -> list[str]:
    """The fenced blocks of one language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), re.M | re.S)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the examples, with runs/mine, what a small sweep of one of them left, and defaults.yaml.

    What is in a defaults.yaml that a run was decided by, `tests/harness_tests/test_cli_defaults.py` says.
    """
    folder = tmp_path_factory.mktemp("workplace")
    (folder / "examples").symlink_to(ROOT / "examples")
    plan = {
        "task": {"name": "own_task:LensTask", "rows": 60},
        "space": ["coverage_targets", "tau_ranges", "loss_weights", "optimizer"],
        "config": {"max_epochs": 1},
        "search": {"algorithm": "sobol", "configs": 4, "batch": 4},
        "seeds": [0, 1],
        "base_dir": str(ROOT / "examples"),
    }
    (folder / "defaults.yaml").write_text(record_text({"config": resolve_config({})}), encoding="utf-8")
    path = folder / "small.yaml"
    path.write_text(write_yaml(plan), encoding="utf-8")
    assert main(["sweep", str(path), "--out", str(folder / "runs" / "mine")]) == 0
    return folder


@BY_NAME
def test_the_python_of_a_document_runs(path: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of one document, run one after another beside the examples and a run, raise nothing."""
    monkeypatch.chdir(workplace)
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


def test_every_knob_is_explained_with_its_default_and_its_choices() -> None:
    """docs/knobs.md has one row for each knob, in order, and no other."""
    text = (ROOT / "docs" / "knobs.md").read_text(encoding="utf-8")
    shown = re.findall(r"^\| `(\w+)` \| ([^|]*) \| ([^|]*) \|", text, re.M)
    assert [name for name, _, _ in shown] == list(KNOBS)
    for name, default, values in shown:
        knob = KNOBS[name]
        assert yaml.YAML(typ="safe").load(default) == knob.default, name
        assert set(knob.choices) <= set(values.split(", ")), name
        assert knob.optional == ("null" in values), name


def test_every_column_task_space_and_command_is_named() -> None:
    """What can be asked for by name stands in a document under that name."""
    texts = {path.name: path.read_text(encoding="utf-8") for path in DOCS}
    columns = {column.name for column in [*BASE_COLUMNS, *HISTORY_COLUMNS]} | {*HISTORY_KEYS}
    metrics = {name for name in METRICS if not name.startswith("metric.")}
    assert [name for name in columns | metrics if f"`{name}`" not in texts["rows.md"]] == []
    assert [status for status in STATUSES if f"`{status}`" not in texts["tasks.md"]] == []
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


def test_every_column_of_a_shift_is_explained() -> None:
    """docs/robustness.md has one row for each column of shift.parquet, in order, as the schema says it."""
    text = (ROOT / "docs" / "robustness.md").read_text(encoding="utf-8").replace("\\|", "!")
    shown = re.findall(r"^\| `(\w+)` \| [\w ]+ \| ([^|]*) \| ([^|]*) \|$", text, re.M)
    stated = [(c.name, c.meaning.replace("|", "!"), c.unit.replace("|", "!")) for c in SHIFT_COLUMNS]
    assert shown[: len(stated)] == stated
