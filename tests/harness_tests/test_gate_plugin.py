"""The pytest plugin and the files for CI: a gate as tests, and pipelines whose commands exist."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from harness.cli.gate import run_parser

ROOT = Path(__file__).resolve().parents[2]
CI_FILES = sorted((ROOT / "examples" / "ci").glob("*.yml"))
SUITE = """
name: mine
scenarios:
  - name: "a|b [c] \\x1b[2J"
    task: {name: dose, n_train: 200, n_val: 200, n_test: 50}
    config: {max_epochs: 2, hidden_width: 8, hidden_depth: 1}
metrics: {coverage: {margin: 0.02}}
looks: [4]
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a suite and a test of somebody's own."""
    (tmp_path / "suite.yaml").write_text(SUITE, encoding="utf-8")
    (tmp_path / "test_own.py").write_text("def test_own():\n    pass\n", encoding="utf-8")
    return tmp_path


def run_pytest(place: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """pytest in a process of its own, with the plugin, without its cache, warnings being errors."""
    code = (
        "import sys, pytest\n"
        "from importlib.metadata import entry_points\n"
        "known = any(point.name == 'harness.pytest_gate' for point in entry_points(group='pytest11'))\n"
        "plugin = [] if known else ['-p', 'harness.pytest_gate']\n"
        "sys.exit(pytest.main([*plugin, '-p', 'no:cacheprovider', '--strict-markers', '-W', 'error', "
        "*sys.argv[1:]]))"
    )
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        cwd=place,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )


def test_the_tests_of_a_suite_are_collected_beside_the_others(place: Path) -> None:
    """One for each scenario and metric, one for its non-finite values, one for the whole; none is run."""
    done = run_pytest(place, "--collect-only", "-q", "--scm-gate", "suite.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.rpartition("::")[2] for line in done.stdout.splitlines() if "::" in line] == [
        "test_own",
        "a|b [c] ?[2J[coverage]",
        "a|b [c] ?[2J[non-finite values]",
        "whole",
    ]
    assert not (place / "runs").exists()


def test_the_mark_selects_and_deselects_them(place: Path) -> None:
    """`-m "not scm_gate"` leaves the gate out, and it is then not run."""
    done = run_pytest(place, "-q", "--scm-gate", "suite.yaml", "-m", "not scm_gate")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed, 3 deselected" in done.stdout


def test_without_the_option_the_plugin_does_nothing(place: Path) -> None:
    """Nothing is collected, loaded or written by it."""
    (place / "test_own.py").write_text(
        "import sys\n\ndef test_own():\n"
        "    assert not {'torch', 'ray', 'pyarrow', 'pydantic', 'numpy'} & set(sys.modules)\n",
        encoding="utf-8",
    )
    done = run_pytest(place, "-q", "-p", "harness.pytest_gate")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout


def test_a_bad_suite_ends_pytest_with_its_mistakes(place: Path) -> None:
    """As a usage error, with file, line and column."""
    (place / "suite.yaml").write_text("scenarios: []\n", encoding="utf-8")
    done = run_pytest(place, "-q", "--scm-gate", "suite.yaml")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "suite.yaml:1:12: scenarios: list should have at least 1 item" in done.stderr


@pytest.mark.slow
def test_a_gate_runs_as_tests(place: Path) -> None:
    """Against itself all pass; without a baseline all fail, with the line that says what to do."""
    done = run_pytest(place, "-rA", "--scm-gate", "suite.yaml", "--scm-gate-any-baseline", "-m", "scm_gate")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 passed" in done.stdout
    assert "\x1b[2J" not in done.stdout
    done = run_pytest(place, "--scm-gate", "suite.yaml", "-m", "scm_gate")
    assert done.returncode == 1
    assert "3 failed" in done.stdout
    assert "error: suite mine has no baseline in" in done.stdout
    assert "Traceback" not in done.stdout


def commands_of(node: Any) -> list[str]:
    """Every text of a pipeline's file, which may hold a command."""
    if isinstance(node, dict):
        return [text for value in node.values() for text in commands_of(value)]
    if isinstance(node, list):
        return [text for value in node for text in commands_of(value)]
    return [node] if isinstance(node, str) else []


@pytest.mark.parametrize("path", CI_FILES, ids=lambda path: path.name)
def test_the_pipelines_parse_and_their_commands_exist(path: Path) -> None:
    """Every `scm-harness gate run` in examples/ci is one that the command line takes."""
    values = YAML(typ="safe").load(path.read_text(encoding="utf-8"))
    found = [text for text in commands_of(values) if text.startswith("scm-harness gate run")]
    assert len(found) == 1
    words = shlex.split(re.sub(r"\$(\w+|\{[^}]*\})", "x", found[0]))
    options = run_parser().parse_args(words[3:])
    assert options.against == "x"
    assert options.on_inconclusive == "warn"
    assert options.junit is not None


def test_the_pipelines_are_these() -> None:
    """One for GitHub, with jobs, and one for GitLab, with scripts."""
    assert [path.name for path in CI_FILES] == ["github-gate.yml", "gitlab-gate.yml"]
    github, gitlab = (YAML(typ="safe").load(path.read_text(encoding="utf-8")) for path in CI_FILES)
    steps = github["jobs"]["gate"]["steps"]
    assert all("uses" in step or "run" in step for step in steps)
    assert github["permissions"] == {"contents": "read"}
    # What a pull request may choose goes through the environment, never into the text of a script.
    assert not any("${{" in step.get("run", "") for step in steps)
    assert gitlab["gate"]["artifacts"]["reports"]["junit"] == "gate-junit.xml"
