"""A gate's suite: every mistake at once with its place, defaults, and what makes two scenarios the same."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

from harness.errors import EXIT_BAD_INPUT, UserError
from harness.gate.rules import DEFAULT_RULES, GateRules
from harness.gate.suite import MetricSection, ScenarioSection, Suite, SuiteFile, TimeSection, load_suite

ROOT = Path(__file__).resolve().parents[2]
ONE = "scenarios:\n  - {name: a, task: {name: dose}}\n"


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "suite.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def problems(tmp_path: Path, text: str) -> list[str]:
    path = written(tmp_path, text)
    with pytest.raises(UserError) as caught:
        load_suite(path)
    assert caught.value.exit_code == EXIT_BAD_INPUT
    return [line.removeprefix(f"{path}:") for line in caught.value.lines]


BAD: dict[str, tuple[str, list[str]]] = {
    "empty": ("", ["1:1: suite: a suite is a mapping with at least `scenarios`"]),
    "a list": ("- a\n", ["suite: a suite is a mapping"]),
    "no scenarios": ("seeds: 0\n", ["1:1: 'scenarios' is missing"]),
    "none of them": ("scenarios: []\n", ["1:12: scenarios: list should have at least 1 item"]),
    "unknown key": (
        ONE + "metric: {}\n",
        ["3:1: unknown key 'metric', did you mean 'metrics'? (known: name, "],
    ),
    "unknown key of a scenario": (
        "scenarios:\n  - {name: a, tsk: {name: dose}}\n",
        ["2:15: unknown key 'scenarios.0.tsk', did you mean 'task'? (known: name, task, plan, defaults,"],
    ),
    "unknown key of a metric": (
        ONE + "metrics: {coverage: {margn: 0.1}}\n",
        ["3:22: unknown key 'metrics.coverage.margn', did you mean 'margin'?"],
    ),
    "no source": ("scenarios: [{name: a}]\n", ["a scenario needs one of `task`, `plan` and `defaults`"]),
    "two sources": (
        "scenarios: [{name: a, task: {name: dose}, plan: p.yaml}]\n",
        ["a scenario has `plan` alone, or `task` or `defaults` or both"],
    ),
    "same name": (
        "scenarios: [{name: a, task: {name: dose}}, {name: a, task: {name: rf}}]\n",
        ["1:12: scenarios: names of scenarios must differ, got 'a' twice"],
    ),
    "same training": (
        "scenarios:\n  - {name: a, task: {name: dose}}\n  - {name: b, task: {name: dose}}\n",
        ["3:5: scenario 'b' trains the same as 'a'"],
    ),
    "unknown knob": (
        "scenarios: [{name: a, task: {name: dose}, config: {tau_infr: 0.1}}]\n",
        ["1:52: unknown knob 'tau_infr', did you mean 'tau_infer'?"],
    ),
    "bad knob": (
        "scenarios: [{name: a, task: {name: dose}, config: {tau_infer: -1.0}}]\n",
        ["1:63: tau_infer must be"],
    ),
    "no such plan": ("scenarios: [{name: a, plan: none.yaml}]\n", ["1:29: ", "none.yaml: no such file"]),
    "no such defaults": (
        "scenarios: [{name: a, defaults: none.yaml}]\n",
        ["1:33: ", "none.yaml: no such file"],
    ),
    "looks": (ONE + "looks: [10, 5]\n", ["3:8: looks must increase, got [10, 5]"]),
    "no looks": (ONE + "looks: []\n", ["3:8: looks: list should have at least 1 item"]),
    "few seeds": (ONE + "seeds: [1, 2]\nlooks: [5]\n", ["seeds must be at least as many", "got 2 for 5"]),
    "seeds twice": (ONE + "seeds: [1, 1]\nlooks: [2]\n", ["seeds must differ from one another, got [1, 1]"]),
    "margin 0": (
        ONE + "metrics: {coverage: {margin: 0}}\n",
        ["3:30: metrics.coverage.margin: input should be greater than 0, got 0"],
    ),
    "margin text": (
        ONE + "metrics: {coverage: {margin: 1 point}}\n",
        ["3:30: metrics.coverage.margin: input should be a valid number, got '1 point'"],
    ),
    "floor": (
        ONE + "metrics: {coverage: {floor: -1.0}}\n",
        ["3:29: metrics.coverage.floor: input should be"],
    ),
    "no metrics": (ONE + "metrics: {}\n", ["3:10: metrics must name at least one, got none"]),
    "unknown metric": (
        ONE + "metrics: {covrage: {margin: 0.1}}\n",
        ["3:11: unknown metric 'covrage', did you mean 'coverage'? (known: accepted_error, "],
    ),
    "shortfall": (ONE + "metrics: {coverage_shortfall: {margin: 0.1}}\n", ["gate `coverage`"]),
    "no margin": (
        ONE + "metrics: {charged_error: {}}\n",
        ["'charged_error' has no default margin: say `margin`"],
    ),
    "own metric": (
        ONE + "metrics: {metric.hits: {margin: 1}}\n",
        ["3:24: metric 'metric.hits' needs `worse` and `compare`"],
    ),
    "wrong way": (
        ONE + "metrics: {false_reject_rate: {margin: 0.1, worse: lower}}\n",
        ["metric false_reject_rate is better lower, got worse: lower"],
    ),
    "steps": (
        ONE + "time: {steps: 3}\n",
        ["3:15: time.steps: input should be greater than or equal to 20, got 3"],
    ),
    "allowance": (
        ONE + "nan_allowance: -1\n",
        ["3:16: nan_allowance: input should be greater than or equal to 0"],
    ),
    "alpha": (ONE + "alpha: 1\n", ["3:8: alpha: input should be less than 0.5, got 1"]),
    "device": (ONE + "device: tpu\n", ["3:9: device: string should match pattern"]),
    "name": (ONE + "name: ../up\n", ["3:7: name: must be 1 to 64 letters, digits"]),
    "long scenario": (
        "scenarios: [{name: " + "a" * 101 + ", task: {name: dose}}]\n",
        ["at most 100 characters"],
    ),
    "all at once": (
        ONE + "looks: [10, 5]\nalpha: 2\nseed: 1\n",
        ["3:8: looks", "4:8: alpha", "5:1: unknown key 'seed', did you mean 'seeds'?"],
    ),
}


@pytest.mark.parametrize("case", BAD, ids=list(BAD))
def test_a_bad_suite_is_refused_with_every_mistake_and_its_place(case: str, tmp_path: Path) -> None:
    """One line for each mistake: file, line and column, the key, what is wrong and what would be right."""
    text, expected = BAD[case]
    said = "\n".join(problems(tmp_path, text))
    assert [part for part in expected if part not in said] == []


def test_a_suite_says_little_and_means_the_defaults(tmp_path: Path) -> None:
    """Three metrics, their margins, looks of 5, 10 and 20 seeds; a part of a rule changes that part alone."""
    suite = load_suite(written(tmp_path, ONE))
    assert suite.rules == GateRules(metrics=tuple(DEFAULT_RULES))
    assert suite.seeds == tuple(range(20))
    assert suite.name == "suite"
    suite = load_suite(
        written(tmp_path, ONE + "metrics: {coverage: {margin: 0.03}}\nseeds: 100\nlooks: [4]\n")
    )
    (rule,) = suite.rules.metrics
    assert (rule.metric, rule.margin, rule.worse) == ("coverage", 0.03, "lower")
    assert suite.seeds == (100, 101, 102, 103)
    assert not suite.times_steps


def test_a_margin_of_a_ratio_is_a_share(tmp_path: Path) -> None:
    """0.1 is ten per cent, as the table shows it; margins of differences are in the metric's unit."""
    text = ONE + "metrics: {coverage: {margin: 0.1}, val_loss: {margin: 0.1}, step_time_ms: {floor: 0.02}}\n"
    rules = {rule.metric: rule for rule in load_suite(written(tmp_path, text)).rules.metrics}
    assert rules["coverage"].margin == 0.1
    assert rules["val_loss"].margin == math.log1p(0.1)
    assert (rules["step_time_ms"].margin, rules["step_time_ms"].floor) == (math.log(1.05), math.log1p(0.02))


def test_a_metric_beyond_the_usual_ones_takes_its_direction_from_the_ranking(tmp_path: Path) -> None:
    """Shares are compared by their difference, other figures by their ratio; test metrics like the others."""
    text = (
        ONE + "metrics: {test_coverage: {margin: 0.02}, val_loss: {margin: 0.1}, metric.mse: {margin: 0.1}}\n"
    )
    rules = {
        rule.metric: (rule.worse, rule.compare) for rule in load_suite(written(tmp_path, text)).rules.metrics
    }
    assert rules == {
        "test_coverage": ("lower", "difference"),
        "val_loss": ("higher", "log_ratio"),
        "metric.mse": ("higher", "log_ratio"),
    }


def sources(tmp_path: Path, scenario: str) -> Suite:
    (tmp_path / "plan.yaml").write_text(
        "task: {name: dose, rows: 200}\nspace: [optimizer]\nconfig: {max_epochs: 3}\n", encoding="utf-8"
    )
    (tmp_path / "defaults.yaml").write_text(
        "task: {name: dose}\nconfig: {max_epochs: 4, tau_infer: 1e-5}\nrecord: {rule: any}\n",
        encoding="utf-8",
    )
    return load_suite(written(tmp_path, f"scenarios: [{{name: a, {scenario}}}]\n"))


def test_a_scenario_comes_from_a_plan_or_from_defaults(tmp_path: Path) -> None:
    """A plan gives its task and the knobs that it writes down; a file of defaults what is under test."""
    (one,) = sources(tmp_path, "plan: plan.yaml, config: {batch_size: 8}").scenarios
    assert (one.task, one.params, one.config) == ("dose", {"rows": 200}, {"max_epochs": 3, "batch_size": 8})
    (one,) = sources(tmp_path, "defaults: defaults.yaml, config: {max_epochs: 2}").scenarios
    assert one.config == {"max_epochs": 2, "tau_infer": 1e-5}
    assert one.pinned == {"max_epochs": 2}


def test_what_is_under_test_is_no_part_of_the_question(tmp_path: Path) -> None:
    """Another file of defaults is another answer to the question; another pinned knob is another question."""
    (before,) = sources(tmp_path, "defaults: defaults.yaml").scenarios
    (tmp_path / "defaults.yaml").write_text(
        "task: {name: dose}\nconfig: {tau_infer: 2e-5}\n", encoding="utf-8"
    )
    (after,) = load_suite(tmp_path / "suite.yaml").scenarios
    assert before.config != after.config
    assert before.question == after.question
    (pinned,) = sources(tmp_path, "defaults: defaults.yaml, config: {tau_infer: 2e-5}").scenarios
    assert pinned.question != before.question


def test_the_mistakes_of_a_scenario_s_files_have_both_places(tmp_path: Path) -> None:
    """A bad plan or file of defaults is named with the line of the suite and with its own."""
    (tmp_path / "defaults.yaml").write_text("config: {tau_infr: 1}\n", encoding="utf-8")
    (line,) = problems(tmp_path, "scenarios: [{name: a, defaults: defaults.yaml}]\n")
    assert line.startswith("1:33: ")
    assert line.endswith("defaults.yaml:1:10: unknown knob 'tau_infr', did you mean 'tau_infer'?")
    (tmp_path / "defaults.yaml").write_text("config: {tau_infer: 0.1}\n", encoding="utf-8")
    (line,) = problems(tmp_path, "scenarios: [{name: a, defaults: defaults.yaml}]\n")
    assert line == "1:33: defaults.yaml names no task, and neither does the scenario"


def test_the_suite_of_the_project_is_one() -> None:
    """examples/gate/suite.yaml parses."""
    suite = load_suite(ROOT / "examples" / "gate" / "suite.yaml")
    assert {one.task for one in suite.scenarios} == {"table", "dose"}


def test_the_suite_of_the_document_is_one_and_shows_every_key(tmp_path: Path) -> None:
    """The first YAML of docs/gate.md parses where its files are, and names every key of a suite."""
    text = (ROOT / "docs" / "gate.md").read_text(encoding="utf-8")
    shown = re.findall(r"^```yaml\n(.*?)^```", text, re.M | re.S)[0]
    suite = load_suite(written(tmp_path, shown.replace("base_dir: .", f"base_dir: {ROOT / 'docs'}")))
    assert [one.task for one in suite.scenarios] == ["table", "table"]
    assert suite.scenarios[1].config["max_epochs"] == 10
    keys = set(SuiteFile.model_fields)
    for model in (ScenarioSection, MetricSection, TimeSection):
        keys |= set(model.model_fields)
    assert sorted(key for key in keys - {"tail_guard"} if f"{key}:" not in text) == []
    assert "tail_guard" in text


def test_a_suite_is_read_without_torch() -> None:
    """Parsing loads neither torch nor Ray."""
    code = (
        "import sys\nfrom pathlib import Path\nfrom harness.gate.suite import load_suite\n"
        f"load_suite(Path({str(ROOT / 'examples' / 'gate' / 'suite.yaml')!r}))\n"
        "import harness.cli.gate, harness.gate.sources, harness.gate.accepting\n"
        "print(*sorted({'torch', 'ray'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == []
