"""The command `gate`: every exit code by a real call, what is kept, what is refused, hostile names."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from harness.cli.main import main
from harness.errors import EXIT_INTERRUPTED
from harness.gate.arm_rows import ArmStore, read_arm_folder
from harness.gate.codes import (
    EXIT_BASELINE,
    EXIT_INCOMPLETE,
    EXIT_INCONCLUSIVE,
    EXIT_PASS,
    EXIT_REGRESSION,
    EXIT_USAGE,
)

sys.path.insert(0, str(Path(__file__).parent))
from gate_rows import HERE, make_scenario, plant_arm

# A name that a terminal, a page, a table, a log of GitHub or a shell could act on.
HOSTILE = "a|b `c` <img src=x onerror=alert(1)>\x1b[2J\r\n::error::d"
TAME = "tau_infer: 1e-5"
WILD = "tau_infer: 1.0, tau_train_min: 1.0, tau_train_max: 1.5"
LOOKS = [4, 6]


def write_defaults(folder: Path, knobs: str) -> None:
    """The file whose config is under test."""
    (folder / "defaults.yaml").write_text(
        "task: {name: dose, n_train: 200, n_val: 200, n_test: 50}\n"
        f"config: {{max_epochs: 2, hidden_width: 8, hidden_depth: 1, {knobs}}}\n",
        encoding="utf-8",
    )


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a suite of one hostile scenario, its rows recorded and accepted as a baseline."""
    folder = tmp_path_factory.mktemp("gate")
    write_defaults(folder, TAME)
    (folder / "suite.yaml").write_text(
        f"name: mine\nscenarios: [{{name: {json.dumps(HOSTILE)}, defaults: defaults.yaml}}]\n"
        f"metrics: {{coverage: {{margin: 0.02}}}}\nlooks: {LOOKS}\n",
        encoding="utf-8",
    )
    suite, out = str(folder / "suite.yaml"), str(folder / "out")
    assert main(["gate", "run", "--suite", suite, "--record", "--out", out]) == EXIT_PASS
    assert main(["gate", "accept", "--suite", suite, "--out", out, "--reason", "the first"]) == EXIT_PASS
    return folder


@pytest.fixture
def place(recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that folder to stand in, outside of GitHub."""
    folder = tmp_path / "place"
    shutil.copytree(recorded, folder)
    monkeypatch.chdir(folder)
    monkeypatch.delenv("GITHUB_ACTIONS", raising=False)
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    return folder


@pytest.fixture
def _greeted(recorded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arms that say what the recorded one said, without a process that says it again."""
    (folder,) = (recorded / "out").glob("candidate-*")
    origin = read_arm_folder(folder).origin
    told = {
        **{name: origin["fingerprint"][name] for name in ("capability", "device", "torch")},
        "python": origin["packages"]["python_version"],
        "code": origin["code"],
        "threads": 1,
        "provenance": origin["packages"],
    }
    monkeypatch.setattr("harness.gate.session.greet", lambda arm: told)


@pytest.fixture(autouse=True)
def _not_on_github(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GITHUB_ACTIONS", raising=False)
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)


def test_the_same_code_passes_bit_for_bit(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An A/A gate against the stored baseline, trained anew: exit 0, every row equal, every output inert."""
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(place / "summary.md"))
    asked = ["--out", "again", "--json", "o/gate.json", "--junit", "o/junit.xml"]
    assert main(["gate", "run", "--suite", "suite.yaml", *asked]) == EXIT_PASS
    said, progress = capsys.readouterr()
    assert "all 4 rows are bit-identical in both arms, times apart" in said
    assert said.rstrip().endswith("exit code 0: pass")
    assert "look 1 of 2" in progress
    told = json.loads((place / "o" / "gate.json").read_text(encoding="utf-8"))
    assert (told["verdict"], told["exit_code"]) == ("PASS", 0)
    check_inert(said + progress, place / "o" / "junit.xml", place / "summary.md")


def check_inert(said: str, junit: Path, summary: Path) -> None:
    """Nothing of the hostile name acts where it is shown."""
    assert "\x1b" not in said
    assert not any(line.startswith("::error::d") for line in said.splitlines())
    read = ElementTree.parse(junit).getroot()
    assert [element.tag for element in read.iter() if element.tag == "img"] == []
    assert any(
        "alert(1)" in (element.get("name") or "") + (element.get("classname") or "")
        for element in read.iter()
    )
    text = summary.read_text(encoding="utf-8")
    assert "<img" not in text
    assert "\x1b" not in text
    rows = [line for line in text.splitlines() if "onerror" in line and line.startswith("|")]
    assert rows
    assert len({line.replace("\\|", "").count("|") for line in rows}) == 1


@pytest.mark.usefixtures("_greeted")
def test_a_planted_regression_fails_also_when_it_was_interrupted(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Defaults that abstain more: exit 130 when stopped, rows kept and used, and then exit 1."""
    write_defaults(place, WILD)
    argv = [
        "gate",
        "run",
        "--suite",
        "suite.yaml",
        "--out",
        "new",
        "--junit",
        "junit.xml",
        "--summary",
        "s.md",
    ]
    add, added = ArmStore.add, []

    def add_two(self: ArmStore, *given: Any) -> None:
        if len(added) == 2:
            raise KeyboardInterrupt
        added.append(given[1])
        add(self, *given)

    with monkeypatch.context() as patched:
        patched.setattr(ArmStore, "add", add_two)
        assert main(argv) == EXIT_INTERRUPTED
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(
        "interrupted: finished rows are kept in new; go on with: scm-harness gate run --suite"
    )
    assert main(argv) == EXIT_REGRESSION
    said, progress = capsys.readouterr()
    assert "2 rows were there already" in progress
    assert "training 2 trials" in progress
    assert "tau_infer was 1e-05, is 1.0" in said
    assert "exit code 1: regression" in said
    check_inert(said + progress, place / "junit.xml", place / "s.md")
    (folder,) = (place / "new").glob("candidate-*")
    assert sorted(seed for _, seed in read_arm_folder(folder).rows) == [0, 1, 2, 3]


@pytest.mark.usefixtures("_greeted")
def test_a_baseline_that_does_not_fit_is_no_baseline(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of another machine, expired, damaged, missing: exit 4, with what differs and what to do."""
    (folder,) = (place / "baselines" / "mine").iterdir()
    manifest = folder / "manifest.json"
    values = json.loads(manifest.read_text(encoding="utf-8"))
    run = ["gate", "run", "--suite", "suite.yaml", "--out", "out"]

    def refused(*expected: str) -> None:
        assert main(run) == EXIT_BASELINE
        said = capsys.readouterr().err
        assert [text for text in expected if text not in said] == []

    values["versions"][0]["expires"] = "2020-01-31"
    manifest.write_text(json.dumps(values), encoding="utf-8")
    refused("baseline v0001 was accepted until 2020-01-31 (the first)", "accept again")
    values["versions"][0]["expires"] = None
    values["versions"][0]["sha256"] = "0" * 64
    manifest.write_text(json.dumps(values), encoding="utf-8")
    refused("v0001.parquet is not the file that its manifest names")
    values["fingerprint"]["cpu"] = "another"
    manifest.write_text(json.dumps(values), encoding="utf-8")
    folder.rename(folder.with_name("x86_64-cpu-00000000"))
    refused(
        "has no baseline for this machine", "which differs: cpu: another there, ", "--record", "--against REF"
    )


def written(tmp_path: Path, text: str) -> str:
    path = tmp_path / "suite.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


USAGE: dict[str, tuple[list[str], str]] = {
    "no action": ([], ""),
    "unknown action": (
        ["rum"],
        "unknown action gate 'rum', did you mean 'run'? (known: run, check, accept, plan)",
    ),
    "no suite": (["run"], "the following arguments are required: --suite"),
    "missing suite": (["run", "--suite", "none.yaml"], "none.yaml: no such file"),
    "two baselines": (["run", "--suite", "s", "--against", "a", "--record"], "not allowed with argument"),
    "any and record": (
        ["run", "--suite", "s", "--record", "--any-baseline"],
        "--any-baseline goes with --against",
    ),
    "on-inconclusive": (["run", "--suite", "s", "--on-inconclusive", "skip"], "invalid choice: 'skip'"),
    "no candidate": (["check", "--baseline", "b"], "the following arguments are required: --candidate"),
    "no reason": (["accept"], "the following arguments are required: --reason"),
    "empty reason": (["accept", "--reason", " "], "--reason must say why, got an empty text"),
    "bad day": (["accept", "--reason", "r", "--expires", "soon"], "must be a day as 2027-01-31, got 'soon'"),
    "no gate": (
        ["accept", "--reason", "r"],
        "say which gate is meant by --suite or --out; 0 are in runs/gate",
    ),
    "power": (["plan", "--suite", "s", "--power", "2"], "must be a number from 0.5 to below 1, got '2'"),
    "half a pilot": (["plan", "--suite", "s", "--baseline", "b"], "--baseline goes with --candidate"),
}


@pytest.mark.parametrize("case", USAGE, ids=list(USAGE))
def test_bad_usage_is_one_line_and_exit_2(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is wrong with the command line, before anything is loaded or trained."""
    monkeypatch.chdir(tmp_path)
    argv, expected = USAGE[case]
    assert main(["gate", *argv]) == EXIT_USAGE
    said = capsys.readouterr().err
    assert expected in said
    assert len(said.splitlines()) <= 1


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A gate does not write into a folder that holds other things."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine", encoding="utf-8")
    suite = written(tmp_path, "scenarios: [{name: a, task: {name: dose}}]\n")
    assert main(["gate", "run", "--suite", suite, "--out", str(tmp_path / "out")]) == EXIT_USAGE
    assert "is not empty and not the folder of a gate" in capsys.readouterr().err


def test_a_task_that_cannot_be_made_is_bad_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is said with its scenario before anything is trained."""
    suite = written(tmp_path, "scenarios: [{name: a, task: {name: dose, n_trian: 3}}]\n")
    assert main(["gate", "run", "--suite", suite, "--out", str(tmp_path / "out"), "--record"]) == EXIT_USAGE
    assert (
        "scenario 'a': TaskError: unknown parameter 'n_trian' of the task 'dose'" in capsys.readouterr().err
    )


def check(base: Path, candidate: Path, *more: str) -> int:
    return main(["gate", "check", "--baseline", str(base), "--candidate", str(candidate), *more])


def level(value: float, **more: Any) -> Callable[[str, int], Mapping[str, Any]]:
    """Coverage that differs a little from seed to seed, around a value."""
    return lambda scenario, seed: {"coverage": value + 0.001 * math.sin(seed), **more}


def test_rows_that_are_there_are_decided_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`check` passes what is as good, fails what is worse, and leaves open what scatters: exits 0, 1, 3."""
    base = plant_arm(tmp_path, "base", level(0.8))
    assert check(base, plant_arm(tmp_path, "same", level(0.8))) == EXIT_PASS
    assert "bit-identical" in capsys.readouterr().out
    assert check(base, plant_arm(tmp_path, "worse", level(0.7))) == EXIT_REGRESSION
    capsys.readouterr()
    scattered = plant_arm(
        tmp_path, "scattered", lambda scenario, seed: {"coverage": 0.8 + 0.05 * (-1) ** seed}
    )
    assert check(base, scattered) == EXIT_INCONCLUSIVE
    assert "exit code 3: inconclusive" in capsys.readouterr().out
    for choice in ("warn", "pass"):
        assert check(base, scattered, "--on-inconclusive", choice) == EXIT_PASS
        assert f"not decided, and taken for a pass: --on-inconclusive {choice}" in capsys.readouterr().out


def test_unmasked_values_that_are_not_finite_fail_at_once(tmp_path: Path) -> None:
    """One of them, in one trial, is a regression."""
    base = plant_arm(tmp_path, "base", level(0.8))
    one = plant_arm(
        tmp_path, "one", lambda _, seed: {"nan_count": int(seed == 3), "nan_loss": int(seed == 3)}
    )
    assert check(base, one) == EXIT_REGRESSION


@pytest.mark.parametrize(
    "figures",
    [
        lambda scenario, seed: None if seed == 2 else {},
        lambda scenario, seed: {"status": "failed", "error": "boom"} if seed == 2 else {},
    ],
    ids=["no row", "failed"],
)
@pytest.mark.parametrize("swapped", [False, True], ids=["in the candidate", "in the baseline"])
def test_what_is_missing_never_passes(
    figures: Callable[[str, int], Any], swapped: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A row that is not there, failed, or has no figure: exit 5, whatever the others say."""
    arms = [plant_arm(tmp_path, "whole", level(0.8)), plant_arm(tmp_path, "gap", figures)]
    assert check(*(arms[::-1] if swapped else arms)) == EXIT_INCOMPLETE
    assert "exit code 5: incomplete" in capsys.readouterr().out


def test_a_scenario_that_is_missing_never_passes(tmp_path: Path) -> None:
    """Neither one that only the baseline has."""
    both = [make_scenario("one"), make_scenario("two")]
    base = plant_arm(tmp_path, "base", level(0.8), scenarios=both)
    assert check(base, plant_arm(tmp_path, "half", level(0.8), scenarios=both[:1])) == EXIT_INCOMPLETE


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"data": "other data"}, "data differs"),
        ({"scenarios": [make_scenario("one", max_epochs=9)]}, "task or pinned config differs"),
        ({"fingerprint": {**HERE.to_plain(), "cpu": "another"}}, "cpu: a processor there, another here"),
    ],
    ids=["data", "config", "machine"],
)
def test_rows_that_do_not_compare_are_refused(
    given: dict[str, Any], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Other data, another pinned config, another machine: exit 4, naming what differs."""
    base = plant_arm(tmp_path, "base", level(0.8))
    assert check(base, plant_arm(tmp_path, "other", level(0.8), **given)) == EXIT_BASELINE
    assert expected in capsys.readouterr().err


def test_stored_times_only_warn_and_paired_ones_decide(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Half as fast is a regression where the launches were made back to back, and a warning where not."""
    base = plant_arm(tmp_path, "base", level(0.8), launch_ms=lambda _, seed: 1.0 + 0.001 * seed)
    slow = plant_arm(tmp_path, "slow", level(0.8), launch_ms=lambda _, seed: 2.0 + 0.001 * seed)
    assert check(base, slow) == EXIT_REGRESSION
    apart = plant_arm(
        tmp_path, "apart", level(0.8), launch_ms=lambda _, seed: 2.0 + 0.001 * seed, pairs="later"
    )
    capsys.readouterr()
    assert check(base, apart) == EXIT_PASS
    assert "warn" in capsys.readouterr().out.lower()


def test_what_is_no_run_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder or file that holds no rows: exit 4 for the baseline, 5 for the candidate."""
    base = plant_arm(tmp_path, "base", level(0.8))
    (tmp_path / "empty").mkdir()
    assert check(base, tmp_path / "empty") == EXIT_INCOMPLETE
    assert check(tmp_path / "none", base) == EXIT_BASELINE
    text = tmp_path / "rows.parquet"
    text.write_text("not Parquet", encoding="utf-8")
    assert check(base, text) == EXIT_INCOMPLETE
    said = capsys.readouterr().err
    assert "is neither a gate's folder, nor a baseline's, nor a run" in said
    assert "does not exist" in said
    assert "cannot be read as Parquet" in said
