"""The audit names the knobs that do nothing, and only those."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from harness.audit import (
    ACTS,
    ALIKE,
    DEAD,
    FAILS,
    IDLE,
    MEASURES,
    NEVER_ACTIVE,
    ON_FAULTS,
    UNTRIED,
    Audit,
    KnobVerdict,
    audit_plan,
    lines_of,
)
from harness.cli.main import main
from harness.errors import EXIT_BAD_INPUT, EXIT_FINDINGS, EXIT_OK
from harness.plan import load_plan
from harness.yaml_text import read_yaml

OWN_TASK = """
import torch
from torch import nn
from scm.data import Split
from scm.training.targets import lift_semantic_targets

class Fixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(1, 2)

    def forward(self, x):
        P, Q = self.linear(x.to(self.linear.weight.dtype)).unbind(-1)
        return P, Q

class Task:
    name, error_unit = "own", "1"

    def splits(self, seed):
        made = {}
        for name, start in (("train", 0.0), ("val", 0.3), ("test", 0.6)):
            x = torch.linspace(start, start + 2.0, 40)[:, None]
            made[name] = Split(x, lift_semantic_targets(1.0 + x[:, 0], torch.zeros(40, dtype=torch.int64)))
        return made

    def build_model(self, config):
        if config.hidden_width == 13:
            raise RuntimeError("thirteen is not a width")
        return Fixed()  # whatever the config says

    def make_loss(self, config):
        return None

    def metrics(self, decoded, split, config):
        error = (decoded.decoded - split.targets.Y_n).abs()
        seen = error[~decoded.bottom]
        mean = float(seen.mean()) if len(seen) else float("nan")
        return {"accepted_error": mean, "charged_error": float(error.nan_to_num(1.0).mean())}

TASK = Task()
"""


def audit_of(path: Path, **options: Any) -> Audit:
    given = read_yaml(path).values.get("config") or {}
    return audit_plan(load_plan(path), list(given), **options)


def verdicts(audit: Audit, where: str = "space") -> dict[str, str]:
    return {item.knob: item.verdict for item in audit.verdicts if item.where == where}


def only(audit: Audit) -> KnobVerdict:
    (item,) = (item for item in audit.verdicts if item.where == "space")
    return item


@pytest.fixture
def own_plan(write_plan, tmp_path, monkeypatch):
    """A function that writes a plan of a task whose model ignores its config."""
    (tmp_path / "audited_task.py").write_text(OWN_TASK, encoding="utf-8")
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "audited_task", raising=False)

    def write(space: Any, **config: Any) -> Path:
        return write_plan(
            task={"name": "audited_task:TASK"},
            space=space,
            config={"max_epochs": 3, "batch_size": 8, **config},
        )

    return write


def test_a_knob_that_nothing_reads_is_dead(own_plan):
    """A model that ignores its width leaves a dead knob; the learning rate beside it acts."""
    space = {
        "hidden_width": {"type": "int", "low": 2, "high": 8},
        "learning_rate": {"type": "float", "low": 1e-3, "high": 1e-1, "log": True},
    }
    audit = audit_of(own_plan(space))
    assert verdicts(audit) == {"hidden_width": DEAD, "learning_rate": ACTS}
    assert "hidden_width" in {item.knob for item in audit.findings}
    assert "learning_rate" not in {item.knob for item in audit.findings}


def test_options_that_train_alike_are_named(own_plan):
    """`pass` lets every gradient through, as no policy does: the pair is named, the other options are not."""
    space = {"gradient_policy": {"type": "choice", "options": [None, "pass", "reject"]}}
    item = only(audit_of(own_plan(space)))
    assert item.verdict == ALIKE
    assert item.detail.startswith("None trains as 'pass' in")


def test_a_knob_that_other_knobs_make_inactive_is_named(own_plan):
    """beta1 varies, and the plan fixes an optimizer that has none."""
    space = {"beta1": {"type": "float", "low": 0.5, "high": 0.9}}
    item = only(audit_of(own_plan(space, optimizer="sgd")))
    assert item.verdict == DEAD
    assert "makes it inactive" in item.detail


def test_a_knob_that_no_draw_has_is_named(own_plan):
    """A condition on one option of very many leaves the knob out of every draw looked at."""
    space = {
        "numerator_degree": {"type": "choice", "options": list(range(300))},  # inactive: none is trained
        "beta1": {"type": "float", "low": 0.5, "high": 0.9, "when": {"numerator_degree": [299]}},
    }
    found = {item.knob: item for item in audit_of(own_plan(space), draws=1).verdicts}
    assert found["beta1"].verdict == NEVER_ACTIVE
    assert found["beta1"].detail == "acts only when numerator_degree is 299, which no draw has"


def test_a_knob_that_acts_on_faults_alone_is_not_called_dead(own_plan):
    """How many bad steps are allowed shows where there are some; the audit brings them."""
    space = {"nonfinite_budget": {"type": "int", "low": 0, "high": 50}}
    assert verdicts(audit_of(own_plan(space))) == {"nonfinite_budget": ON_FAULTS}


def test_what_a_plan_fixes_is_compared_with_its_default(own_plan):
    """A fixed knob that does nothing is dead; one that says the default, or acts, is not reported."""
    path = own_plan(
        {"learning_rate": {"type": "float", "low": 1e-3, "high": 1e-1}},
        hidden_depth=5,
        optimizer="sgd",
        weight_decay=0.0,
    )
    found = {item.knob: item for item in audit_of(path).verdicts if item.where == "config"}
    assert {knob: item.verdict for knob, item in found.items()} == {
        "max_epochs": ACTS,
        "batch_size": ACTS,
        "hidden_depth": DEAD,
        "optimizer": ACTS,
    }
    assert found["hidden_depth"].detail.startswith("5 trains as the default 2 does")


def test_a_knob_that_others_pin_is_not_called_dead(own_plan):
    """Three thresholds fixed at one value: the default of the first would break the order of all."""
    space = {"learning_rate": {"type": "float", "low": 1e-3, "high": 1e-1}}
    path = own_plan(space, tau_infer=0.2, tau_train_min=0.2, tau_train_max=0.2)
    found = verdicts(audit_of(path), "config")
    assert found["tau_train_min"] == found["tau_train_max"] == UNTRIED


def test_a_value_that_fails_is_named_with_its_message(own_plan):
    """One value of a knob that makes the task raise is a finding of its own kind."""
    space = {"hidden_width": {"type": "choice", "options": [8, 13]}}
    item = only(audit_of(own_plan(space)))
    assert item.verdict == FAILS
    assert "thirteen is not a width" in item.detail


def test_a_term_that_is_weighed_and_idle_is_named(own_plan):
    """No row of the data has a direction, so whatever the sign term weighs, it is zero in every step."""
    space = {"learning_rate": {"type": "float", "low": 1e-3, "high": 1e-1}}
    assert verdicts(audit_of(own_plan(space, lambda_margin=0.0)), "term")["sign"] == IDLE
    assert "sign" not in verdicts(audit_of(own_plan(space, lambda_margin=0.0, lambda_sign=0.0)), "term")


def test_an_audit_repeats_itself(write_plan):
    """The same plan gives the same verdicts and trains as often."""
    path = write_plan(space=["coverage_targets"], config={"max_epochs": 2, "hidden_width": 4})
    first, second = audit_of(path, draws=1), audit_of(path, draws=1)
    assert first == second
    assert first.trainings > 0
    assert set(verdicts(first).values()) <= {ACTS, ON_FAULTS, ALIKE, DEAD, NEVER_ACTIVE, MEASURES}


def test_the_text_names_findings_first(own_plan):
    """What must be looked at stands on top, a line each; knobs that act are listed below."""
    space = {
        "learning_rate": {"type": "float", "low": 1e-3, "high": 1e-1},
        "hidden_width": {"type": "int", "low": 2, "high": 8},
    }
    dead, *acting = lines_of(audit_of(own_plan(space, lambda_sign=0.0, lambda_margin=0.0)))
    assert dead.split()[:2] == ["dead", "hidden_width"]
    assert acting[-1].split()[0] == "acts"
    assert "learning_rate" in acting[-1]


def test_the_command_prints_verdicts_and_exits_by_them(own_plan, capsys):
    """Exit code 1 when a knob does nothing, 0 when all act; --json gives every verdict."""
    dead = own_plan({"hidden_width": {"type": "int", "low": 2, "high": 8}})
    assert main(["audit", str(dead), "--draws", "1"]) == EXIT_FINDINGS
    assert "dead" in capsys.readouterr().out
    live = own_plan(
        {"learning_rate": {"type": "float", "low": 1e-3, "high": 1e-1}}, lambda_sign=0.0, lambda_margin=0.0
    )
    assert main(["audit", str(live), "--draws", "1", "--json"]) == EXIT_OK
    printed = json.loads(capsys.readouterr().out)
    assert {"knob": "learning_rate", "where": "space", "verdict": "acts", "detail": ""} in printed


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere.yaml"], "no such file"),
        (["PLAN", "--draws", "0"], "must be a number from 1 to 64"),
        (["PLAN", "--rows", "3"], "unrecognized arguments"),
    ],
    ids=["no plan", "no draws", "unknown option"],
)
def test_bad_arguments_are_one_line(arguments, words, write_plan, capsys):
    """Bad input is exit code 2 and one line on stderr."""
    plan = str(write_plan())
    assert main(["audit", *(plan if word == "PLAN" else word for word in arguments)]) == EXIT_BAD_INPUT
    told = capsys.readouterr()
    assert words in told.err
    assert told.err.count("\n") == 1
    assert told.out == ""


def test_a_task_that_cannot_be_loaded_is_one_line(write_plan, capsys):
    """The audit reads the plan's data, and says what is wrong with them as a sweep does."""
    plan = write_plan(task={"name": "table", "data": "none.csv", "inputs": ["x"], "target": "y"})
    assert main(["audit", str(plan)]) == EXIT_BAD_INPUT
    assert capsys.readouterr().err.startswith("error: task: ")
