"""`scm-harness defaults`: on small runs made without Ray, from rows to a file that a training takes."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from ruamel.yaml import YAML

from harness.cli.defaults import parse_guards, parse_objective
from harness.cli.main import main
from harness.defaults.record import why, would_change
from harness.defaults.session import Request, find_default
from harness.errors import UserError
from harness.jobs import EndedTrial, TrialSpec
from harness.plan import load_plan
from harness.proposals import full_config, task_identity
from harness.run_folder import create_run, read_run_id
from harness.sink import RunSink
from harness.sweep import check_data, task_spec
from harness.yaml_text import write_yaml
from scm.trial import make_training_config
from scm.trial_config import TrialConfig
from search_spaces.identity import config_id, trial_id
from trainables.exported import read_exported
from trainables.trained import Trained, train_models

ROOT = Path(__file__).resolve().parents[2]
ROWS = 240
POOR, GOOD = {"learning_rate": 1e-4}, {"learning_rate": 1e-2}
WILD = {"learning_rate": 1e30, "optimizer": "sgd", "tuple_norm": "none"}
# Thresholds of the same size as the tuples of a default would make every step of them a cliff.
FIXED = {
    "max_epochs": 6,
    "hidden_width": 8,
    "hidden_depth": 1,
    "batch_size": 16,
    "learning_rate": 1e-4,
    "tau_train_min": 1e-2,
    "tau_train_max": 1e-2,
    "tau_infer": 1e-3,
}
MakeRun = Callable[..., Path]


@pytest.fixture(scope="module")
def make_run(tmp_path_factory: pytest.TempPathFactory) -> MakeRun:
    """A function that trains configs in this process and writes a run of them, as a sweep would."""
    folder = tmp_path_factory.mktemp("runs")
    draws = np.random.default_rng(0)
    lines = ["x,z,y,part"]
    for row, (x, z) in enumerate(draws.uniform(size=(ROWS, 2))):
        y = 0.5 + x - 0.3 * z + draws.normal(0.0, 0.02)
        lines.append(f"{x:.4f},{z:.4f},{y:.4f},{('train', 'train', 'train', 'val', 'test')[row % 5]}")
    (folder / "data.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")

    def make(
        name: str, configs: Sequence[Mapping[str, Any]], seeds: Sequence[int] = (0, 1), **task: Any
    ) -> Path:
        plan_path, out = folder / f"{name}.yaml", folder / name
        plan = {
            "task": {"name": "table", "data": "data.csv", "inputs": ["x", "z"], "target": "y", **task},
            "space": {"domains": {"learning_rate": {"type": "log-float", "low": 1e-5, "high": 1e6}}},
            "config": {knob: value for knob, value in FIXED.items() if knob != "learning_rate"},
            "search": {"algorithm": "random", "configs": max(len(configs), 1)},
            "seeds": list(seeds),
        }
        plan_path.write_text(write_yaml(plan), encoding="utf-8")
        loaded = load_plan(plan_path)
        create_run(out, loaded, {})
        digests, _ = check_data(loaded)
        sink = RunSink(out, loaded, run_id=read_run_id(out), provenance={}, data_digests=digests)
        specs = []
        for drawn in configs:
            full, active = full_config({**loaded.config, **drawn})
            named = config_id({**task_identity(loaded), **active})
            specs += [TrialSpec(trial_id(named, seed), named, seed, 0, full, active) for seed in seeds]
        trained = train_models(task_spec(loaded), [(one.trial_id, one.config, one.seed) for one in specs])
        for spec in specs:
            ended = trained[spec.trial_id]
            outcome = ended.outcome if isinstance(ended, Trained) else ended
            sink.write(EndedTrial(spec, outcome, {}))
        sink.close()
        return out

    return make


@pytest.fixture(scope="module")
def run(make_run: MakeRun) -> Path:
    """A run in which one config is far better than the default, one is as poor, and one diverges."""
    return make_run("mine", [GOOD, POOR, WILD])


@pytest.fixture(scope="module")
def current(run: Path) -> Path:
    """A current default that learns too slowly."""
    path = run.parent / "current.yaml"
    path.write_text(write_yaml(FIXED), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def decided(run: Path, current: Path) -> tuple[Path, Path]:
    """The file and the exported model of a decision on that run."""
    out, export = run.parent / "out" / "defaults.yaml", run.parent / "exported"
    options = ["--seeds", "5", "--current", str(current), "--export", str(export)]
    assert main(["defaults", str(run), "--out", str(out), *options]) == 0
    return out, export


def read(path: Path) -> Any:
    return YAML(typ="safe", pure=True).load(path)


def test_a_better_config_takes_over_with_all_its_evidence(decided: tuple[Path, Path], current: Path) -> None:
    """The config is the run's best, and the record holds what the decision rests on."""
    found = read(decided[0])
    assert found["schema"] == {"name": "scm_harness.defaults", "version": 1}
    assert found["config"]["learning_rate"] == GOOD["learning_rate"]
    told = found["decision"]
    assert told["outcome"] == "changed"
    assert told["current"]["origin"] == str(current)
    assert told["changes"]["learning_rate"] == [POOR["learning_rate"], GOOD["learning_rate"]]
    assert told["confirmation"]["chance_to_be_better"]["low"] > 0.5
    assert {guard["failed"] for guard in told["confirmation"]["guards"]} == {False}
    assert {guard["figure"] for guard in told["confirmation"]["guards"]} >= {"step_time_ms", "charged_error"}
    assert len(told["scenarios"]) == 3  # what is held out, and the two
    for figures in told["figures"].values():
        charged = figures["charged_error"]
        assert charged["default"]["high"] < charged["current"]["low"]
        assert charged["default"]["n"] == 5
    assert told["rule"]
    assert told["would_change"]
    assert told["commands"]
    assert told["versions"]["python_version"]
    assert all("data_digest" in told["scenarios"][name] for name in told["figures"])


def test_no_stage_shares_a_seed_with_the_run_or_another(decided: tuple[Path, Path]) -> None:
    """Choice, calibration, confirmation and report are apart; neighbours use seeds of the choice."""
    seeds = read(decided[0])["decision"]["seeds"]
    stages = [seeds[name] for name in ("run", "choice", "calibration", "confirmation", "report")]
    flat = [seed for stage in stages for seed in stage]
    assert len(set(flat)) == len(flat)
    assert set(seeds["neighbours"]) < set(seeds["choice"])


def test_a_config_that_diverges_is_ruled_out_and_told(
    run: Path, decided: tuple[Path, Path], tmp_path: Path
) -> None:
    """It is no candidate; as the current default it is replaced, and the file says why."""
    alternatives = read(decided[0])["decision"]["alternatives"]
    assert len(alternatives) == 2
    wild, out = tmp_path / "wild.yaml", tmp_path / "defaults.yaml"
    wild.write_text(write_yaml({**FIXED, **WILD}), encoding="utf-8")
    options = ["--seeds", "5", "--current", str(wild), "--holdout", "none", "--top", "1"]
    assert main(["defaults", str(run), "--out", str(out), *options]) == 0
    told = read(out)["decision"]
    assert told["outcome"] == "changed"
    assert "the current default broke a constraint" in told["why"]
    assert "ruled_out" in told["alternatives"][0]
    assert told["current"]["broken"]


def test_the_threshold_is_frozen_on_rows_of_its_own(decided: tuple[Path, Path]) -> None:
    """The config's tau_infer is that of the record, whose split is none that chose or reported."""
    found = read(decided[0])
    calibration = found["decision"]["calibration"]
    assert calibration["applied"] is True
    assert found["config"]["tau_infer"] == calibration["tau_infer"] <= found["config"]["tau_train_min"]
    assert calibration["record"]["split"] == "calibration"
    assert calibration["record"]["bound"]["tau_max"] == found["config"]["tau_train_min"]
    assert calibration["seeds"] == found["decision"]["seeds"]["calibration"]


def test_the_config_is_a_training(decided: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every knob is there, TrialConfig takes it, and what the README says makes a TrainingConfig of it."""
    found = read(decided[0])
    config = TrialConfig.from_flat(found["config"])
    assert config.to_flat() == found["config"]
    assert make_training_config(config).tau_infer == found["config"]["tau_infer"]
    blocks = re.findall(
        r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S
    )
    source = next(block for block in blocks if "defaults.yaml" in block)
    assert len([line for line in source.splitlines() if line and "import" not in line]) == 3
    monkeypatch.chdir(decided[0].parent)
    names: dict[str, Any] = {}
    exec(compile(source, "README.md", "exec"), names)
    assert names["training"].learning_rate == GOOD["learning_rate"]


def test_the_export_answers_with_the_frozen_threshold(decided: tuple[Path, Path]) -> None:
    """The model is read back with its record, and rejects what lies below the threshold."""
    exported = read_exported(decided[1])
    assert exported.record.tau_infer == read(decided[0])["config"]["tau_infer"]
    test = exported.trained.splits["test"]
    answers = exported.answer(test.inputs)
    with torch.no_grad():
        _, Q = exported.trained.model(test.inputs)[:2]
    assert torch.equal(answers.bottom_mask, Q.abs() < exported.record.tau_infer)


def test_what_was_decided_is_the_next_current_default(
    run: Path, decided: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Taken as --current it stays: nothing of the run is better, and a tie goes to the current default."""
    out = tmp_path / "again.yaml"
    assert main(["defaults", str(run), "--out", str(out), "--seeds", "5", "--current", str(decided[0])]) == 0
    assert "default kept" in capsys.readouterr().out
    found, before = read(out), read(decided[0])
    assert found["config"] == before["config"]
    assert found["decision"]["changes"] == {}
    assert found["decision"]["calibration"]["applied"] is False


@pytest.mark.slow
def test_the_same_evidence_decides_the_same(
    run: Path, current: Path, decided: tuple[Path, Path], tmp_path: Path
) -> None:
    """Two calls write the same config, choice and figures; only clocks differ."""
    out = tmp_path / "again.yaml"
    assert main(["defaults", str(run), "--out", str(out), "--seeds", "5", "--current", str(current)]) == 0
    first, second = read(decided[0]), read(out)
    for name in ("outcome", "changes", "figures", "neighbours", "calibration", "seeds"):
        assert first["decision"][name] == second["decision"][name]
    assert first["config"] == second["config"]


def test_a_challenger_on_a_cliff_does_not_become_the_default(make_run: MakeRun, current: Path) -> None:
    """A better config of which three times the threshold would leave few answers is found out, and told."""
    steep = {**GOOD, "tau_train_min": 0.95, "tau_train_max": 0.95, "tau_infer": 0.3}
    run = make_run("steep", [steep, POOR])
    request = Request(
        run=run,
        objective=parse_objective("charged_error"),
        seeds=5,
        holdout=("none",),
        current=current,
        guards=(),
    )
    found = find_default(request, lambda text: None)
    assert not found.changed
    assert found.confirmation is None
    (first, second) = found.around  # then that of the current default, as a warning
    assert "tau_infer" in {cliff.neighbour.knob for cliff in first.cliffs}
    assert second.candidate is found.candidates.current
    assert "stood on a cliff" in why(found)
    assert any("without its cliff" in line for line in would_change(found))


def test_a_challenger_that_fails_a_guard_is_passed_over(
    make_run: MakeRun, current: Path, tmp_path: Path
) -> None:
    """A better config of many more weights is not confirmed where weights are guarded; the file says so."""
    run = make_run("wide", [{**GOOD, "hidden_width": 64}, POOR])
    out = tmp_path / "defaults.yaml"
    options = ["--seeds", "5", "--holdout", "none", "--current", str(current), "--guard", "parameters=1.5"]
    assert main(["defaults", str(run), "--out", str(out), *options]) == 0
    told = read(out)["decision"]
    assert told["outcome"] == "kept"
    assert told["confirmation"] is None
    assert "failed in a guarded figure" in told["why"]
    assert "parameters is worse" in told["alternatives"][1]["passed_over"]


def test_a_file_that_cannot_be_written_is_said_at_once(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is trained: a folder in its place, a file as its folder, another ending."""
    (tmp_path / "file").write_text("", encoding="utf-8")
    for out in (tmp_path, tmp_path / "file" / "defaults.yaml", tmp_path / "defaults.txt"):
        assert main(["defaults", str(run), "--out", str(out)]) == 2
        assert "--out" in capsys.readouterr().err


def test_no_held_out_data_is_said_or_asked_for(
    make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where a column says the split, no other deal is made: a plan must name data, or "none" be said."""
    run = make_run("column", [GOOD, POOR], split={"column": "part"})
    out = tmp_path / "defaults.yaml"
    assert main(["defaults", str(run), "--out", str(out), "--seeds", "5"]) == 2
    assert "--holdout PLAN.yaml" in capsys.readouterr().err
    assert not out.exists()
    assert main(["defaults", str(run), "--out", str(out), "--seeds", "5", "--holdout", "none"]) == 0
    assert "only seeds are fresh" in read(out)["decision"]["scenarios"]["held_out"]
    same = ["--holdout", str(run / "plan.yaml")]
    assert main(["defaults", str(run), "--out", str(out), "--seeds", "5", *same]) == 2
    assert "must have data of its own" in capsys.readouterr().err


@pytest.mark.parametrize(
    "configs, seeds, lacking",
    [([GOOD], (0, 1), "configs: it has 1"), ([GOOD, POOR], (0,), "seeds: its configs were trained with 1")],
    ids=["one config", "one seed"],
)
def test_a_thin_run_is_refused_with_what_it_lacks(
    make_run: MakeRun,
    configs: list[Mapping[str, Any]],
    seeds: tuple[int, ...],
    lacking: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Exit code 3, a line for each lack, and no file."""
    run = make_run(f"thin-{len(configs)}-{len(seeds)}", configs, seeds)
    out = tmp_path / "defaults.yaml"
    assert main(["defaults", str(run), "--out", str(out)]) == 3
    assert lacking in capsys.readouterr().err
    assert not out.exists()


def test_a_run_without_a_feasible_config_is_refused(
    make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 5, with why the first of its configs are out."""
    run = make_run("wild", [WILD, {**WILD, "learning_rate": 1e31}])
    rows = pq.read_table(run / "rows").to_pylist()
    assert all(row["nan_count"] or row["status"] != "completed" for row in rows), (
        "the case is not what it says"
    )
    assert main(["defaults", str(run), "--out", str(tmp_path / "defaults.yaml")]) == 5
    assert "none of its 2 configs is feasible" in capsys.readouterr().err


def test_a_run_of_an_older_kind_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows without a column that is needed, and a plan that this version cannot read, are named."""
    from reports.fragments import write_table_atomically

    old = tmp_path / "old"
    shutil.copytree(run, old)
    for path in (old / "rows").glob("*.parquet"):
        table = pq.read_table(path)
        write_table_atomically(table.drop_columns(["trivial_error"]), path)
    assert main(["defaults", str(old), "--out", str(tmp_path / "defaults.yaml")]) == 4
    assert "no trivial_error" in capsys.readouterr().err
    plan = old / "plan.yaml"
    plan.write_text(plan.read_text(encoding="utf-8") + "\nunheard_of: 1\n", encoding="utf-8")
    assert main(["defaults", str(old), "--out", str(tmp_path / "defaults.yaml")]) == 4
    assert "another version" in capsys.readouterr().err
    assert main(["defaults", str(tmp_path / "nowhere"), "--out", str(tmp_path / "defaults.yaml")]) == 4


def test_other_data_than_those_of_the_run_are_refused(
    make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A config chosen on data that are gone cannot be confirmed on others by mistake."""
    run = make_run("changed", [GOOD, POOR])
    data = run.parent / "data.csv"
    text = data.read_text(encoding="utf-8")
    try:
        data.write_text(text.replace("0.5", "0.6"), encoding="utf-8")
        assert main(["defaults", str(run), "--out", str(tmp_path / "defaults.yaml")]) == 4
        assert "have changed since the run" in capsys.readouterr().err
    finally:
        data.write_text(text, encoding="utf-8")


@pytest.mark.parametrize(
    "options, message",
    [
        (["--seeds", "4"], "--seeds must be at least 5"),
        (["--by", "step_time_ms"], "must be measured on the validation and the test split"),
        (["--by", "charged_eror"], "did you mean charged_error"),
        (["--guard", "coverage"], "must read METRIC=MARGIN"),
        (["--guard", "charged_error=0.9"], "must be >= 1"),
        (["--max-false-reject", "1"], "must be a share in [0, 1)"),
        (["--holdout", "none", "--holdout", "x.yaml"], "must stand alone"),
        (["--current", "nowhere.yaml"], "no such file"),
    ],
    ids=["seeds", "objective", "spelling", "guard", "margin", "share", "holdout", "current"],
)
def test_options_that_cannot_be_are_refused_in_one_line(
    run: Path, options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is trained and nothing is written."""
    out = tmp_path / "defaults.yaml"
    assert main(["defaults", str(run), "--out", str(out), *options]) in (2, 3)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert message in said[0]
    assert not out.exists()


@pytest.mark.parametrize(
    "text, message",
    [
        ("config: {learning_rate: -1}\n", "learning_rate must be > 0"),
        ("config: {learing_rate: 1}\n", "did you mean 'learning_rate'"),
        ("task: {name: dose}\nconfig: {learning_rate: 1e-3}\n", "the run is one of 'table'"),
        ("[1, 2]\n", "a config is a mapping of knobs"),
    ],
    ids=["value", "name", "task", "list"],
)
def test_a_current_default_that_is_no_config_is_refused(
    run: Path, text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file and the rule are named."""
    path = tmp_path / "current.yaml"
    path.write_text(text, encoding="utf-8")
    options = ["--out", str(tmp_path / "defaults.yaml"), "--current", str(path)]
    assert main(["defaults", str(run), *options]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert str(path) in said


def test_guards_take_the_direction_of_their_metric() -> None:
    """A share that is better higher is guarded as such; the session's own guards stay beside it."""
    guards = {guard.name: guard for guard in parse_guards(["coverage=0.02", "step_time_ms=2"])}
    assert guards["coverage"].direction == "higher"
    assert guards["step_time_ms"].margin == 2.0
    assert "charged_error" in guards
    assert parse_objective("metric.hits:higher").direction == "higher"
    with pytest.raises(UserError, match="unknown metric"):
        parse_guards(["colour=1"])


def test_the_record_is_plain_json_too(decided: tuple[Path, Path]) -> None:
    """No NaN, no dates, no objects: every value survives a strict writer."""
    found = read(decided[0])
    assert json.loads(json.dumps(found, allow_nan=False)) == found
