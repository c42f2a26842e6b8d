"""A gate under way: which seeds are trained when, what is used again, compared with, and planned."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest

from harness.cli.gate import make_view, verdict_code
from harness.errors import UserError
from harness.gate import session
from harness.gate.arm_rows import ArmRows, read_arm_folder
from harness.gate.arms import Arm
from harness.gate.codes import (
    EXIT_BASELINE,
    EXIT_INCOMPLETE,
    EXIT_INCONCLUSIVE,
    EXIT_PASS,
    EXIT_REGRESSION,
)
from harness.gate.comparison import compare_arms
from harness.gate.decision import GateDecision
from harness.gate.kept import open_store
from harness.gate.merged import merged_json, merged_junit
from harness.gate.planning import plan_needs, plan_text
from harness.gate.power import seeds_needed
from harness.gate.rules import GateRules, MetricRule
from harness.gate.session import (
    ChosenBaseline,
    GateOptions,
    choose_baseline,
    make_anchor,
    take_looks,
    with_itself,
)
from harness.gate.suite import Suite, load_suite

sys.path.insert(0, str(Path(__file__).parent))
from gate_rows import HERE, make_scenario, plant_arm

COVERAGE = MetricRule(metric="coverage", compare="difference", worse="lower", margin=0.01)
RULES = GateRules(metrics=(COVERAGE,), looks=(4, 6, 8))
Figures = Callable[[str, int], Mapping[str, Any] | None]


def suite_of(tmp_path: Path, rules: GateRules = RULES) -> Suite:
    """A suite of one scenario that is planted and never trained."""
    return Suite(
        name="suite",
        path=tmp_path / "suite.yaml",
        scenarios=(make_scenario(),),
        seeds=tuple(range(rules.looks[-1])),
        rules=rules,
        launches=1,
        steps=100,
        device="cpu",
        timeout_s=10.0,
    )


class Planted:
    """Work that takes its rows from figures instead of training, and notes which seeds it was asked for."""

    def __init__(self, tmp_path: Path, **figures: Figures) -> None:
        self.asked: list[tuple[int, ...]] = []
        self._arms = {
            name: read_arm_folder(plant_arm(tmp_path, name, of, seeds=range(8)))
            for name, of in figures.items()
        }

    @property
    def stores(self) -> dict[str, Any]:
        """The arms, with the seeds that were asked for so far."""
        seeds = {seed for asked in self.asked for seed in asked}
        return {
            name: SimpleNamespace(
                taken=replace(arm, rows={key: row for key, row in arm.rows.items() if key[1] in seeds})
            )
            for name, arm in self._arms.items()
        }

    def train(self, seeds: Sequence[int]) -> None:
        """Note the seeds."""
        self.asked.append(tuple(seeds))


def test_seeds_are_added_while_the_evidence_does_not_decide(tmp_path: Path) -> None:
    """Looks follow each other until one decides; the last one leaves it open."""
    chosen = ChosenBaseline(arm=SimpleNamespace())  # type: ignore[arg-type]
    suite = suite_of(tmp_path)
    flat: Figures = lambda _, seed: {}  # noqa: E731
    open_ones = Planted(
        tmp_path / "a", baseline=flat, candidate=lambda _, seed: {"coverage": 0.8 + 0.05 * (-1) ** seed}
    )
    (anchor,) = take_looks(suite, chosen, open_ones, print)  # type: ignore[arg-type]
    assert [len(asked) for asked in open_ones.asked] == [4, 6, 8]
    assert anchor.decision.verdict == "INCONCLUSIVE"
    same = Planted(tmp_path / "b", baseline=flat, candidate=flat)
    (anchor,) = take_looks(suite, chosen, same, print)  # type: ignore[arg-type]
    assert same.asked == [(0, 1, 2, 3)]
    assert (anchor.decision.verdict, anchor.decision.look) == ("PASS", 4)


def test_more_seeds_do_not_help_where_rows_are_missing(tmp_path: Path) -> None:
    """The gate ends at the look at which a trial failed."""
    chosen = ChosenBaseline(arm=SimpleNamespace())  # type: ignore[arg-type]
    work = Planted(
        tmp_path,
        baseline=lambda _, seed: {},
        candidate=lambda _, seed: {"status": "failed", "error": "boom"} if seed == 1 else {},
    )
    (anchor,) = take_looks(suite_of(tmp_path), chosen, work, print)  # type: ignore[arg-type]
    assert len(work.asked) == 1
    assert anchor.decision.missing
    assert "candidate: trial of 'one' with seed 1 failed: boom" in anchor.notes


def stored_rows(tmp_path: Path, name: str, figures: Figures, seeds: int = 8) -> ArmRows:
    """A stored baseline with that many seeds."""
    planted = read_arm_folder(plant_arm(tmp_path, name, figures, seeds=range(seeds)))
    return replace(planted, origin={**planted.origin, "config": planted.origin["questions"]})


def test_a_stored_baseline_is_looked_at_as_far_as_it_reaches(tmp_path: Path) -> None:
    """With six seeds of it, no eight are trained."""
    stored = stored_rows(tmp_path, "stored", lambda _, seed: {}, seeds=6)
    work = Planted(tmp_path, candidate=lambda _, seed: {"coverage": 0.8 + 0.05 * (-1) ** seed})
    chosen = ChosenBaseline(stored=(("previous", stored),))
    take_looks(suite_of(tmp_path), chosen, work, print)  # type: ignore[arg-type]
    assert [len(asked) for asked in work.asked] == [4, 6]


def test_a_candidate_is_decided_on_against_both_anchors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step within the margin from the previous version fails where it adds up since the release."""
    given: list[GateRules] = []
    decide = session.decide

    def note(pairs: Any, nans: Any, rules: GateRules, *, look: int) -> GateDecision:
        given.append(rules)
        return decide(pairs, nans, rules, look=look)

    monkeypatch.setattr(session, "decide", note)
    level = lambda value: lambda _, seed: {"coverage": value + 1e-4 * math.sin(seed)}  # noqa: E731
    anchors = (
        ("previous", stored_rows(tmp_path, "previous", level(0.795))),
        ("release", stored_rows(tmp_path, "release", level(0.85))),
    )
    work = Planted(tmp_path, candidate=level(0.79))
    rules = replace(RULES, nan_allowance=3)
    chosen = ChosenBaseline(stored=anchors, nan_allowance=1)
    found = take_looks(suite_of(tmp_path, rules), chosen, work, print)  # type: ignore[arg-type]
    assert [(one.name, one.decision.verdict) for one in found] == [("previous", "PASS"), ("release", "FAIL")]
    assert {one.alpha for one in given} == {RULES.alpha / 2}
    assert {one.nan_allowance for one in given} == {1}


def test_a_release_without_a_scenario_is_not_asked_for_it(tmp_path: Path) -> None:
    """A scenario that is newer than the release is compared with the previous version alone."""
    other = make_scenario("one", max_epochs=9)
    planted = read_arm_folder(
        plant_arm(tmp_path, "release", lambda _, seed: {}, scenarios=[other], seeds=range(8))
    )
    release = replace(planted, origin={**planted.origin, "config": planted.origin["questions"]})
    anchors = (("previous", stored_rows(tmp_path, "previous", lambda _, seed: {})), ("release", release))
    work = Planted(tmp_path, candidate=lambda _, seed: {})
    found = take_looks(suite_of(tmp_path), ChosenBaseline(stored=anchors), work, print)  # type: ignore[arg-type]
    assert [one.name for one in found] == ["previous"]


def test_a_release_of_fewer_seeds_is_compared_on_those(tmp_path: Path) -> None:
    """It is no gap that a release was made of four seeds where six are looked at now."""
    anchors = (
        ("previous", stored_rows(tmp_path, "previous", lambda _, seed: {})),
        ("release", stored_rows(tmp_path, "release", lambda _, seed: {}, seeds=4)),
    )
    work = Planted(tmp_path, candidate=lambda _, seed: {"coverage": 0.8 + 0.05 * (-1) ** seed})
    found = take_looks(suite_of(tmp_path), ChosenBaseline(stored=anchors), work, print)  # type: ignore[arg-type]
    assert [len(asked) for asked in work.asked] == [4, 6, 8]
    assert not any(one.decision.missing for one in found)
    assert found[1].decision.cells[0].n == 4


@pytest.mark.parametrize(
    ("options", "commit", "expected"),
    [
        ({"any_baseline": True}, None, "no stored baseline fits this machine"),
        ({"any_baseline": True, "against": "HEAD~1"}, None, "and commit HEAD~1 is not here"),
    ],
    ids=["nothing", "a shallow clone"],
)
def test_any_baseline_is_at_last_the_code_itself(
    options: dict[str, Any],
    commit: str | None,
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And the note says that this proves the machinery alone."""
    import contextlib

    monkeypatch.setattr(session, "find_commit", lambda path, reference: commit)
    with contextlib.ExitStack() as stack:
        given = GateOptions(out=tmp_path / "out", **options)
        chosen = choose_baseline(suite_of(tmp_path), given, tmp_path / "baselines", HERE, stack)
    assert chosen.arm is not None
    assert chosen.arm.name == "baseline"
    assert expected in chosen.notes[0]
    assert chosen.notes[0].endswith("which proves the machinery and nothing about a change")
    assert with_itself(suite_of(tmp_path), "why").arm == chosen.arm


def test_without_a_baseline_there_is_a_line_that_says_how_to_make_one(tmp_path: Path) -> None:
    """Exit code 4, the machine, and the commands."""
    import contextlib

    with contextlib.ExitStack() as stack, pytest.raises(UserError) as caught:
        choose_baseline(suite_of(tmp_path), GateOptions(out=tmp_path), tmp_path / "baselines", HERE, stack)
    assert caught.value.exit_code == EXIT_BASELINE
    said = str(caught.value)
    assert "has no baseline in" in said
    assert "a processor" in said
    assert "--record" in said


SUITE = """
name: mine
scenarios:
  - {name: a, task: {name: table, data: data.csv, inputs: [x], target: y}, config: {max_epochs: 2}}
"""


def test_rows_are_used_again_only_where_nothing_that_decides_them_has_changed(tmp_path: Path) -> None:
    """Code, torch, machine, pinned knobs, data: each gives another folder; margins and looks do not."""
    (tmp_path / "data.csv").write_text("x,y\n1,2\n", encoding="utf-8")
    told = {
        "code": "c",
        "python": "3.11.7",
        "torch": "2",
        "threads": 1,
        "provenance": {"numpy_version": "2"},
    }

    def folder(text: str = SUITE, here: Any = HERE, **changed: Any) -> str:
        (tmp_path / "suite.yaml").write_text(text, encoding="utf-8")
        suite = load_suite(tmp_path / "suite.yaml")
        arm = Arm(name="candidate", label="this", python="python", path=(), root=None, suite=suite)
        store = open_store(tmp_path / "out", arm, {**told, **changed}, here)
        store.close()
        return store.folder.name

    first = folder()
    assert first == folder()
    assert first == folder(SUITE + "metrics: {coverage: {margin: 0.3}}\nlooks: [4]\n")
    others = [
        folder(code="d"),
        folder(torch="3"),
        folder(python="3.12.1"),
        folder(provenance={"numpy_version": "3"}),
        folder(here=replace(HERE, cpu="another")),
        folder(SUITE.replace("max_epochs: 2", "max_epochs: 3")),
    ]
    (tmp_path / "data.csv").write_text("x,y\n1,3\n", encoding="utf-8")
    others.append(folder())
    assert len({first, *others}) == 8


@pytest.mark.parametrize(
    ("figures", "on_inconclusive", "code"),
    [
        (lambda _, seed: {}, "fail", EXIT_PASS),
        (lambda _, seed: {"coverage": 0.5 + 1e-3 * seed}, "pass", EXIT_REGRESSION),
        (lambda _, seed: None if seed == 1 else {"coverage": 0.5 + 1e-3 * seed}, "pass", EXIT_REGRESSION),
        (lambda _, seed: None if seed == 1 else {}, "pass", EXIT_INCOMPLETE),
        (lambda _, seed: {"coverage": 0.8 + 0.05 * (-1) ** seed}, "fail", EXIT_INCONCLUSIVE),
        (lambda _, seed: {"coverage": 0.8 + 0.05 * (-1) ** seed}, "warn", EXIT_PASS),
    ],
    ids=["pass", "worse", "worse and missing", "missing", "open", "open and let pass"],
)
def test_a_proven_regression_goes_before_what_is_missing_and_that_before_doubt(
    figures: Figures, on_inconclusive: str, code: int, tmp_path: Path
) -> None:
    """Exit codes, the gravest first; what is missing is never let pass."""
    anchor = anchor_of(tmp_path, figures)
    assert verdict_code([anchor], on_inconclusive) == code


def anchor_of(tmp_path: Path, figures: Figures) -> session.Anchor:
    """The decision on a planted candidate, at eight seeds."""
    base = read_arm_folder(plant_arm(tmp_path, "base", lambda _, seed: {}, seeds=range(8)))
    candidate = read_arm_folder(plant_arm(tmp_path, "candidate", figures, seeds=range(8)))
    found = compare_arms(base, candidate, RULES, scenarios=["one"], seeds=range(8))
    return make_anchor("baseline", "base", found, RULES, 8)


def test_decisions_are_put_together_in_one_file_each(tmp_path: Path) -> None:
    """JSON that any parser takes, JUnit whose totals are those of its parts."""
    anchor = anchor_of(tmp_path, lambda _, seed: {"coverage": math.nan})
    views = [make_view(anchor, suite=name, candidate="c", commands={}) for name in ("one", "two")]
    told = json.loads(merged_json(views, exit_code=1), parse_constant=pytest.fail)
    assert told["verdict"] == "FAIL"
    assert [one["suite"] for one in told["decisions"]] == ["one", "two"]
    root = ElementTree.fromstring(merged_junit(views))
    assert root.get("tests") == str(sum(int(suite.get("tests", "0")) for suite in root))
    assert [suite.get("name") for suite in root] == ["gate one", "gate two"]
    assert root.get("failures") == "2"


def test_seeds_are_planned_from_the_spread_of_the_pilot(tmp_path: Path) -> None:
    """Paired differences where there are two arms, √2 times the spread over seeds where there is one."""
    base = read_arm_folder(plant_arm(tmp_path, "base", lambda _, seed: {"coverage": 0.8}, seeds=range(8)))
    noisy = read_arm_folder(
        plant_arm(tmp_path, "noisy", lambda _, seed: {"coverage": 0.8 + 0.01 * (-1) ** seed}, seeds=range(8))
    )
    suite = suite_of(tmp_path)
    (need,) = plan_needs(suite, base, noisy, power=0.9)
    assert need.paired == pytest.approx(0.01 * math.sqrt(8 / 7) / 0.01)
    assert need.unrelated == pytest.approx(math.sqrt(2) * need.paired)
    assert need.seeds_paired == seeds_needed(need.paired, 0.9, alpha_pass=RULES.alpha_pass_of_a_look)
    assert need.seeds_unrelated is not None
    assert need.seeds_unrelated > need.seeds_paired
    text = plan_text(suite, None, noisy, power=0.9)
    assert "changes that train anew" in text
    assert "too few" in text
    few = read_arm_folder(plant_arm(tmp_path, "few", lambda _, seed: {}, seeds=range(2)))
    with pytest.raises(UserError, match="has fewer than 3 rows of every scenario: run the gate first"):
        plan_text(suite, None, few, power=0.9)
