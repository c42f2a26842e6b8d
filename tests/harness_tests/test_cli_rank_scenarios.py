"""`scm-harness rank RUN RUN`: from several folders of rows to one ranking of the settings that they share."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from harness.cli.main import main
from reports.rows import RowWriter
from reports.schema import row_schema
from reports.text import WIDTH

ERRORS = {"one": {"aaa": 5.0, "bbb": 4.0, "ccc": 1.0}, "two": {"aaa": 0.02, "bbb": 0.04}}


def write_run(folder: Path, scenario: str, *, old: bool = False, **changes: Any) -> Path:
    """A run of one scenario; `old` rows do not know theirs, nor their settings."""
    with RowWriter(folder / "rows", "driver", row_schema({"learning_rate": "float64"})) as writer:
        for name, error in ERRORS[scenario].items():
            for seed in (0, 1):
                row = {
                    "run_id": scenario,
                    "task": "toy",
                    "scenario": f"toy-{scenario}",
                    "settings_id": name,
                    "config_id": f"{name}{scenario}",
                    "trial_id": f"{name}{scenario}-s{seed}",
                    "seed": seed,
                    "status": "completed",
                    "nan_count": 0,
                    "coverage": 0.95,
                    "target_coverage": 0.95,
                    "accepted_error": error,
                    "step_time_ms": 2.0,
                    "data_digest": scenario,
                    "config.learning_rate": {"aaa": 0.1, "bbb": 0.2, "ccc": 0.3}[name],
                }
                if old:
                    del row["scenario"], row["settings_id"]
                writer.append(row | changes)
    return folder


def write_plan(folder: Path, data: str, **ranking: Any) -> None:
    said = json.dumps(ranking)
    (folder / "plan.yaml").write_text(
        f"task: {{name: table, data: {data}, inputs: [a], target: b}}\n"
        f"space: [optimizer]\nseeds: [0, 1]\nranking: {said}\n"
    )


@pytest.fixture
def runs(tmp_path):
    return [str(write_run(tmp_path / name, name)) for name in ERRORS]


def test_several_runs_are_ranked_by_what_they_share(runs, tmp_path, capsys):
    """Each scenario has its line, shared settings their figures, the others a reason; no run is changed."""
    before = sorted(tmp_path.rglob("*"))
    assert main(["rank", *runs]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert err == ""
    assert max(map(len, lines)) <= WIDTH
    assert lines[0] == "3 settings, 2 feasible in all of 2 scenarios; 10 trials"
    assert lines[1].split() == ["1", "toy-one,", f"{runs[0]}:", "3", "settings,", "seeds", "0,", "1"]
    (first,) = (line for line in lines if line.startswith("   1  ") and "aaa" in line)
    # 5 of 4 and 0.02 of 0.04: the square root of 5/8, to the median of both; a quarter behind in "one".
    assert "(+25.0% in 1)" in first
    assert lines[-1] == "   3  ccc  toy-two: no trial"
    assert sorted(tmp_path.rglob("*")) == before


def test_the_leaderboard_is_written_where_it_is_asked_for(runs, tmp_path, capsys):
    """--out is Parquet with every column, --json the same on stdout; the reference is 0."""
    out = tmp_path / "both.parquet"
    assert (
        main(["rank", *runs, "--reference", "bbb", "--by", "accepted_error", "--json", "--out", str(out)])
        == 0
    )
    entries = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    written = pq.read_table(out).to_pylist()
    assert [entry["settings_id"] for entry in entries] == ["aaa", "bbb", "ccc"]
    assert [entry["accepted_error"] for entry in entries][1:] == [0.0, None]
    assert entries[0]["config_id@toy-two"] == "aaatwo"
    assert [entry["settings_id"] for entry in written] == ["aaa", "bbb", "ccc"]


def test_the_order_of_runs_does_not_matter(runs, capsys):
    assert main(["rank", *runs, "--json"]) == 0
    one = capsys.readouterr().out
    assert main(["rank", *reversed(runs), "--json"]) == 0
    assert capsys.readouterr().out == one


def test_runs_of_an_earlier_version_have_the_scenario_of_their_plan(tmp_path, capsys):
    """Two runs of one task with other data are two scenarios, though their rows do not say so."""
    runs = [write_run(tmp_path / name, name, old=True) for name in ERRORS]
    assert main(["rank", *map(str, runs)]) == 2
    assert "scenario toy must have the same data" in capsys.readouterr().err
    for run in runs:
        write_plan(run, f"{run.name}.csv")
    assert main(["rank", *map(str, runs)]) == 0
    assert "2 feasible in all of 2 scenarios" in capsys.readouterr().out


def test_plans_that_judge_otherwise_must_be_overruled(runs, capsys):
    """Which budget holds is not guessed."""
    write_plan(Path(runs[0]), "a.csv", nan_budget=0)
    write_plan(Path(runs[1]), "b.csv", nan_budget=4)
    assert main(["rank", *runs]) == 2
    assert "got nan_budget 0 and 4; give --nan-budget" in capsys.readouterr().err
    assert main(["rank", *runs, "--nan-budget", "0"]) == 0


def test_a_seed_of_the_plan_that_never_ran_rules_out(runs, capsys):
    """Each scenario has the seeds of its own plan."""
    write_plan(Path(runs[1]), "b.csv")
    plan = Path(runs[1]) / "plan.yaml"
    plan.write_text(plan.read_text().replace("[0, 1]", "[0, 1, 2]"))
    assert main(["rank", *runs]) == 0
    out = capsys.readouterr().out
    assert "aaa  toy-two: seed 2 missing" in out
    assert "no settings met the constraints in every scenario" in out


def test_runs_in_which_nothing_was_measured_have_their_own_code(tmp_path, capsys):
    runs = [str(write_run(tmp_path / name, name, status="failed", error="boom")) for name in ERRORS]
    assert main(["rank", *runs]) == 5
    assert "toy-one: seeds 0, 1 failed (boom); toy-two" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        (lambda runs: [runs[0], runs[0] + "/"], 2, "each run must be named once"),
        (lambda runs: [runs[0], "--out", "x"], 2, "--out is for several runs, got one"),
        (
            lambda runs: [*runs, "--reference", "zzz"],
            2,
            "--reference must be a settings_id of the runs, got zzz",
        ),
        (lambda runs: [*runs, "--by", "robustness"], 2, "robustness is measured within one run"),
        (lambda runs: [*runs, "--by", "acepted_error"], 2, "did you mean accepted_error?"),
        (lambda runs: [*runs, runs[0] + "x"], 4, "onex does not exist"),
        (lambda runs: [*runs, "--out", runs[0]], 4, "cannot write the leaderboard"),
    ],
    ids=["twice", "out of one", "reference", "robustness", "metric", "missing", "out"],
)
def test_what_cannot_be_done_is_one_line(runs, capsys, change, code, said):
    assert main(["rank", *change(runs)]) == code
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


def test_several_runs_are_ranked_without_torch_and_ray(runs):
    """As one run is."""
    write_plan(Path(runs[0]), "a.csv")
    code = f"""
import sys
from harness.cli.main import main
code = main(["rank", *{runs!r}])
heavy = [name for name in ("torch", "ray", "scipy", "optuna") if name in sys.modules]
sys.exit(f"imported {{heavy}}" if heavy else code)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
