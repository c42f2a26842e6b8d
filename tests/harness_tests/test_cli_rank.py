"""`scm-harness rank` from a folder of rows to a printed ranking and a leaderboard file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from harness.cli.main import main
from reports import large_runs
from reports.rows import RowWriter, read_rows
from reports.schema import row_schema

PLAN = """
task: {name: table, data: x.csv, inputs: [a], target: b}
space: [optimizer]
seeds: [0, 1, 2]
ranking: {nan_budget: 4, by: [accepted_error]}
"""


def row(config_id: str, seed: int, **changes: Any) -> dict[str, Any]:
    base = {
        "run_id": "r",
        "task": "toy",
        "config_id": config_id,
        "trial_id": f"{config_id}-s{seed}",
        "seed": seed,
        "status": "completed",
        "nan_count": 0,
        "coverage": 0.95,
        "target_coverage": 0.95,
        "accepted_error": 1.0,
        "step_time_ms": 2.0,
        "config.learning_rate": 1e-3,
    }
    return base | changes


def write_run(folder: Path, rows: list[dict[str, Any]]) -> Path:
    with RowWriter(folder / "rows", "driver", row_schema({"learning_rate": "float64"})) as writer:
        for item in rows:
            writer.append(item)
    return folder


@pytest.fixture
def run(tmp_path):
    """A run of three configs with two seeds: a worse one, a better one, one with NaNs."""
    rows = [row("aaa", seed) for seed in (0, 1)]
    rows += [row("bbb", seed, accepted_error=0.5) for seed in (0, 1)]
    rows += [row("ccc", seed, accepted_error=0.1, nan_count=2 * seed) for seed in (0, 1)]
    return write_run(tmp_path / "run", rows)


def ranking_of(folder: Path) -> list[str]:
    return pq.read_table(folder / "leaderboard.parquet").column("config_id").to_pylist()


def test_rank_prints_and_writes_the_leaderboard(run, capsys):
    """The best config is on top, the ruled-out one has its reason, and the file says the same."""
    assert main(["rank", str(run)]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert err == ""
    assert lines[0] == "3 configs, 2 feasible; 6 trials: 6 completed"
    ranked = [line.split()[:5] for line in lines if line[:4].split() in (["1"], ["2"])]
    assert ranked == [["1", "1", "100%", "1", "bbb"], ["2", "2", "0%", "2", "aaa"]]
    assert lines[-1] == "   3  ccc  2 non-finite values (budget 0)"
    assert ranking_of(run) == ["bbb", "aaa", "ccc"]


def test_options_reach_the_ranking(run, capsys):
    """A NaN budget lets the third config in, `--by` and `--top` do what they say."""
    assert main(["rank", str(run), "--nan-budget", "2", "--by", "accepted_error,loss"]) == 0
    assert "seeds 0, 1 without a finite loss" in capsys.readouterr().out
    assert main(["rank", str(run), "--nan-budget", "2", "--by", "accepted_error", "--top", "1"]) == 0
    assert "2 more configs" in capsys.readouterr().out
    assert ranking_of(run) == ["ccc", "bbb", "aaa"]


def test_json_is_the_whole_leaderboard(run, capsys):
    """What a program reads is every config with every column, without NaN."""
    assert main(["rank", str(run), "--json", "--top", "1"]) == 0
    entries = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert [entry["config_id"] for entry in entries] == ["bbb", "aaa", "ccc"]
    assert entries[0]["accepted_error_mean"] == 0.5
    assert entries[0]["loss_mean"] is None


def test_the_runs_plan_is_the_default(run, capsys):
    """Without options a run is judged as its plan says, seeds that never ran included; options win."""
    (run / "plan.yaml").write_text(PLAN)
    assert main(["rank", str(run)]) == 0
    assert "ccc  seed 2 missing" in capsys.readouterr().out
    assert main(["rank", str(run), "--failed-budget", "1"]) == 0
    assert "nan_count at most 4" in capsys.readouterr().out
    assert main(["rank", str(run), "--failed-budget", "1", "--nan-budget", "0"]) == 0
    assert "2 non-finite values (budget 0)" in capsys.readouterr().out


def test_a_run_of_an_older_version_stays_rankable(run, capsys):
    """Of the run's plan only what judges rows is read: knobs that are unknown by now do not matter."""
    (run / "plan.yaml").write_text(PLAN + "config: {knob_of_old: 3}\nhalving: {rungs: no}\n")
    assert main(["rank", str(run)]) == 0
    assert "ccc  seed 2 missing" in capsys.readouterr().out
    (run / "plan.yaml").write_text(PLAN.replace("[accepted_error]", "[]"))
    assert main(["rank", str(run)]) == 2
    assert f"{run / 'plan.yaml'}:5:30: ranking.by: list should" in capsys.readouterr().err


def test_a_run_in_which_nothing_completed_has_its_own_code(tmp_path, capsys):
    """Failed trials are ranked and shown; the exit code says that there is nothing to choose from."""
    run = write_run(tmp_path / "run", [row("aaa", 0, status="failed", error="boom")])
    assert main(["rank", str(run)]) == 5
    assert "seed 0 failed (boom)" in capsys.readouterr().out
    assert ranking_of(run) == ["aaa"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--by", "acepted_error"], "unknown metric acepted_error; did you mean accepted_error?"),
        (["--by", "metric.hits:higher"], "the rows hold no metric metric.hits"),
        (["--by", "test_coverage"], "not on the test split"),
        (["--by", ","], "by must name at least one metric"),
        (["--nan-budget=-1"], "nan_budget must be >= 0"),
        (["--top", "0"], "must be a positive number or all"),
        (["--top", "few"], "must be a positive number or all"),
        (["--target-coverage", "2"], "target_coverage must lie in [0, 1]"),
        (["--tpo", "3"], "unrecognized arguments"),
    ],
)
def test_a_wrong_option_is_one_line_and_code_2(run, capsys, arguments, message):
    """What cannot be ranked by is named in one line, and no leaderboard is written."""
    assert main(["rank", str(run), *arguments]) == 2
    check_one_line(capsys.readouterr(), message)
    assert not (run / "leaderboard.parquet").exists()


def missing(folder: Path) -> None:
    """There is nothing at the path."""


def a_file(folder: Path) -> None:
    folder.write_text("rows")


def not_a_run(folder: Path) -> None:
    folder.mkdir()


def no_rows(folder: Path) -> None:
    (folder / "rows").mkdir(parents=True)


def corrupt(folder: Path) -> None:
    write_run(folder, [row("aaa", 0)])
    path = folder / "rows" / "driver-00000.parquet"
    path.write_bytes(path.read_bytes()[:-20])


def foreign(folder: Path) -> None:
    write_run(folder, [row("aaa", 0)])
    table = read_rows(folder).replace_schema_metadata({})
    pq.write_table(table, folder / "rows" / "other.parquet")


def repeated(folder: Path) -> None:
    write_run(folder, [row("aaa", 0)])
    fragment = folder / "rows" / "driver-00000.parquet"
    (folder / "rows" / "copy.parquet").write_bytes(fragment.read_bytes())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (missing, "does not exist"),
        (a_file, "is not a folder"),
        (not_a_run, "is not a run folder"),
        (no_rows, "holds no rows"),
        (corrupt, "driver-00000.parquet cannot be read as Parquet"),
        (foreign, "other.parquet does not hold rows"),
        (repeated, "more than once, such as aaa-s0"),
    ],
)
def test_what_is_no_run_is_one_line_and_code_4(tmp_path, capsys, make, message):
    """A path that holds no sound rows is named in one line; nothing is written there."""
    folder = tmp_path / "run"
    make(folder)
    assert main(["rank", str(folder)]) == 4
    check_one_line(capsys.readouterr(), message)
    assert not (folder / "leaderboard.parquet").exists()


def test_a_leaderboard_that_cannot_be_written_is_still_printed(run, capsys):
    """The ranking is shown; that it could not be kept is an error with its code, and leaves no litter."""
    (run / "leaderboard.parquet").mkdir()
    assert main(["rank", str(run)]) == 4
    out, err = capsys.readouterr()
    assert "bbb" in out
    assert err.startswith("error: cannot write the leaderboard")
    assert not list(run.glob("*.tmp"))


def test_rank_starts_without_torch_and_ray(run):
    """Ranking a finished run does not wait for a training library, also where its plan is read."""
    (run / "plan.yaml").write_text(PLAN)
    code = f"""
import sys
from harness.cli.main import main
code = main(["rank", {str(run)!r}])
heavy = [name for name in ("torch", "ray", "scipy", "optuna") if name in sys.modules]
sys.exit(f"imported {{heavy}}" if heavy else code)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_large_run_is_ranked_in_pieces_to_the_same_table(run, capsys, monkeypatch):
    """What is printed and written does not tell how the rows were read; nothing heavy is loaded for it."""
    assert main(["rank", str(run), "--top", "1"]) == 0
    whole, written = capsys.readouterr().out, (run / "leaderboard.parquet").read_bytes()
    monkeypatch.setattr(large_runs, "LARGE_ROWS", 0)
    assert main(["rank", str(run), "--top", "1"]) == 0
    assert capsys.readouterr().out == whole
    assert (run / "leaderboard.parquet").read_bytes() == written
    code = f"""
import sys
from harness.cli.main import main
from reports import large_runs
large_runs.LARGE_ROWS = 0
code = main(["rank", {str(run)!r}])
heavy = [name for name in ("torch", "ray", "scipy", "optuna") if name in sys.modules]
sys.exit(f"imported {{heavy}}" if heavy else code)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_large_run_in_which_nothing_completed_has_its_own_code(tmp_path, capsys, monkeypatch):
    """Trials are counted over the whole run, not over the configs that the leaderboard holds."""
    monkeypatch.setattr(large_runs, "LARGE_ROWS", 0)
    rows = [row(f"c{number}", 0, status="failed", error="boom") for number in range(3)]
    monkeypatch.setattr(large_runs.rank_run, "__kwdefaults__", {"large_rows": None, "most": 1})
    assert main(["rank", str(write_run(tmp_path / "bad", rows))]) == 5
    assert "3  trials failed, such as c0" in capsys.readouterr().out
    good = write_run(tmp_path / "good", [row("a", 0), row("b", 0, status="failed")])
    assert main(["rank", str(good)]) == 0
    assert ranking_of(good) == ["a"]


def write_scores(run: Path, columns: dict[str, list[Any]]) -> Path:
    path = run / "robustness" / "scores.parquet"
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def test_robustness_that_was_measured_is_shown_and_can_decide(run, capsys):
    """A run's scores stand in its leaderboard; with --by they order it, unexamined configs last."""
    columns = {"config_id": ["aaa", "bbb"], "robustness": [0.9, 0.4], "low": [0.8, 0.3], "high": [0.95, 0.5]}
    write_scores(run, columns)
    assert main(["rank", str(run)]) == 0
    assert "0.4[0.3,0.5]" in capsys.readouterr().out.replace("0.4 [0.3, 0.5]", "0.4[0.3,0.5]")
    assert ranking_of(run) == ["bbb", "aaa", "ccc"]
    assert main(["rank", str(run), "--by", "robustness", "--nan-budget", "2"]) == 0
    assert ranking_of(run) == ["aaa", "bbb", "ccc"]
    board = pq.read_table(run / "leaderboard.parquet")
    assert board.column("robustness").to_pylist()[:2] == [0.9, 0.4]
    assert board.column("feasible").to_pylist() == [True, True, True]


def test_robustness_that_was_not_measured_is_one_line(run, capsys):
    """The line says which command measures it."""
    assert main(["rank", str(run), "--by", "robustness"]) == 2
    check_one_line(
        capsys.readouterr(), "no config has a robustness yet: run `scm-harness robustness RUN` first"
    )


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"config_id": ["a"]}, "scores.parquet holds no column robustness"),
        ({"config_id": ["a"], "robustness": ["x"], "low": [0.0], "high": [0.0]}, "does not hold scores"),
        ({"config_id": ["a", "a"], "robustness": [0.0] * 2, "low": [0.0] * 2, "high": [0.0] * 2}, "twice"),
        (None, "scores.parquet cannot be read as Parquet"),
    ],
    ids=["column", "type", "twice", "corrupt"],
)
def test_scores_that_are_none_are_one_line_and_code_4(run, capsys, columns, message):
    """A file of scores that cannot be what it should be is named, not passed over."""
    path = write_scores(run, columns or {"x": [1]})
    if columns is None:
        path.write_bytes(path.read_bytes()[:-9])
    assert main(["rank", str(run)]) == 4
    check_one_line(capsys.readouterr(), message)


def check_one_line(captured: Any, message: str) -> None:
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1
