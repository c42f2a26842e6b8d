"""Sweeps from plan to ranked rows, on a Ray of two CPUs in this process."""

from __future__ import annotations

import gc
import json
import shutil
import tracemalloc
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

from harness.cli.main import main
from harness.errors import EXIT_NOTHING_COMPLETED, EXIT_OK, EXIT_RUN_FOLDER
from harness.jobs import EndedTrial, Packing, Report
from harness.plan import load_plan, plan_digest
from harness.progress import Tally
from harness.proposals import SearchProposer
from harness.sink import RunSink
from harness.sweep import make_board, run_sweep
from reports.fragments import FRAGMENT_ROWS
from reports.history import read_history
from reports.rows import RowWriter, read_rows
from reports.schema import missing_columns
from search_spaces.identity import scenario_name
from trainables.trial import empty_outcome

OWN_TASK = """
import os
import signal

from trainables.tasks.dose import make_dose_task


def failing(params):
    task = make_dose_task({})
    build = task.build_model

    def build_model(config):
        if config.learning_rate > params["limit"]:
            raise RuntimeError("this model cannot be built")
        return build(config)

    task.build_model = build_model
    return task


def killing(params):
    task = make_dose_task({})
    build = task.build_model

    def build_model(config):
        flag = params["flag"]
        if params["always"] or not os.path.exists(flag):
            open(flag, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        return build(config)

    task.build_model = build_model
    return task
"""


@pytest.mark.usefixtures("local_ray")
def test_a_sweep_from_the_command_line(
    write_plan: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every trial is a row with every column, its history is there, the ranking is printed and written."""
    plan, out = write_plan(), tmp_path / "runs" / "out"
    assert main(["sweep", str(plan), "--out", str(out), "--top", "2", "--log-every", "2"]) == EXIT_OK
    said = capsys.readouterr()
    assert said.out.startswith("4 configs")
    assert "8/8 trials" in said.err
    for epoch, times in ((1, 0), (2, 8), (3, 0), (4, 8)):
        assert said.err.count(f" epoch {epoch}/4, loss ") == times
    rows = read_rows(out)
    assert len(rows) == 8
    assert missing_columns(rows) == []
    assert set(rows.column("status").to_pylist()) == {"completed"}
    assert set(rows.column("epochs").to_pylist()) == {4}
    assert len(set(rows.column("data_digest").to_pylist())) == 1
    assert set(rows.column("plan_digest").to_pylist()) == {plan_digest(load_plan(plan))}
    assert None not in rows.column("node_id").to_pylist()
    assert None not in rows.column("started_at").to_pylist()
    assert sorted(rows.column("config.hidden_width").to_pylist()) == [8] * 8
    assert len(set(rows.column("settings_id").to_pylist())) == 4
    assert set(rows.column("scenario").to_pylist()) == {scenario_name("table", load_plan(plan).task.params)}
    history = read_history(out)
    assert len(history) == 8 * 4
    assert plan_digest(load_plan(out / "plan.yaml")) == plan_digest(load_plan(plan))
    assert json.loads((out / "provenance.json").read_text())["run_id"] == rows.column("run_id")[0].as_py()
    assert (out / "leaderboard.parquet").is_file()
    assert main(["sweep", str(plan), "--out", str(out)]) == EXIT_RUN_FOLDER


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize(
    "search",
    [
        pytest.param({"algorithm": "random", "configs": 6, "batch": 3}, marks=pytest.mark.slow),
        {"algorithm": "tpe", "configs": 6, "batch": 3, "startup": 2},
    ],
    ids=["random", "tpe"],
)
def test_rows_do_not_depend_on_how_many_run_at_once(
    search: dict[str, Any], write_plan: Callable[..., Path], tmp_path: Path, comparable: Callable[..., Any]
) -> None:
    """One trial at a time or two, with halving: the same rows, clocks apart."""
    halving = {"rungs": [1, 2], "eta": 2}
    for concurrent in (1, 2):
        plan = write_plan(search=search, halving=halving, resources={"max_concurrent": concurrent})
        run_sweep(load_plan(plan), tmp_path / f"out{concurrent}")
    one, two = comparable(tmp_path / "out1"), comparable(tmp_path / "out2")
    assert one == two
    assert {row["status"] for row in one} == {"completed", "stopped"}
    assert {row["epochs"] for row in one} == {1, 2, 4}
    assert all(row["stop_reason"] == f"halving at epoch {row['epochs']}" for row in one if row["epochs"] < 4)


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_a_task_that_raises_is_a_row(write_plan: Callable[..., Path], tmp_path: Path) -> None:
    """A config whose model cannot be built fails with its message; the others are ranked before it."""
    (tmp_path / "own_failing_task.py").write_text(OWN_TASK, encoding="utf-8")
    plan = write_plan(
        task={"name": "own_failing_task:failing", "limit": 5e-3},
        space={"learning_rate": {"type": "choice", "options": [1e-3, 1e-2]}},
        search={"algorithm": "grid", "configs": 2},
        config={"max_epochs": 1},
    )
    out = tmp_path / "out"
    assert main(["sweep", str(plan), "--out", str(out)]) == EXIT_OK
    rows = read_rows(out).to_pylist()
    assert len(rows) == 4
    for row in rows:
        failed = row["config.learning_rate"] > 5e-3
        assert (row["status"] == "failed") == failed
        assert ("this model cannot be built" in row["error"]) == failed


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("always", [False, True])
def test_a_worker_that_is_killed_costs_no_row(
    always: bool, write_plan: Callable[..., Path], tmp_path: Path
) -> None:
    """A trial whose process died runs again; one that dies every time is a failed row with the reason."""
    module = f"own_killing_task_{always}"
    (tmp_path / f"{module}.py").write_text(OWN_TASK, encoding="utf-8")
    plan = write_plan(
        task={"name": f"{module}:killing", "flag": str(tmp_path / "killed"), "always": always},
        space={"learning_rate": {"type": "choice", "options": [1e-3]}},
        search={"algorithm": "grid", "configs": 1},
        config={"max_epochs": 1},
        resources={"retries": 1},
        seeds=[0],
    )
    out = tmp_path / "out"
    assert main(["sweep", str(plan), "--out", str(out)]) == (EXIT_NOTHING_COMPLETED if always else EXIT_OK)
    (row,) = read_rows(out).to_pylist()
    assert row["status"] == ("failed" if always else "completed")
    assert (tmp_path / "killed").exists()
    if always:
        assert "lost 2 times" in row["error"]


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_a_disk_that_fails_ends_the_sweep_with_one_line(
    write_plan: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A row that cannot be written stops the run with exit code 4; rows before it stay, and it can go on."""
    append_all = RowWriter.append_all
    plan, out = write_plan(packs={"size": 2}, resources={"max_concurrent": 1}), tmp_path / "out"

    def append_once(self: RowWriter, rows: Iterable[Mapping[str, Any]]) -> None:
        if any((out / "rows").glob("*.parquet")):
            raise OSError(28, "No space left on device")
        append_all(self, rows)

    with monkeypatch.context() as patch:
        patch.setattr(RowWriter, "append_all", append_once)
        assert main(["sweep", str(plan), "--out", str(out)]) == EXIT_RUN_FOLDER
    assert "No space left on device" in capsys.readouterr().err.splitlines()[-1]
    assert len(read_rows(out)) == 2
    assert main(["sweep", str(plan), "--out", str(out), "--resume"]) == EXIT_OK
    assert len(read_rows(out)) == 8


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_a_run_folder_that_vanishes_is_one_line(
    write_plan: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Someone who removes the folder under a running sweep is told so, without a traceback."""
    plan, out = write_plan(), tmp_path / "out"

    def remove(self: RunSink, ended: EndedTrial) -> None:
        shutil.rmtree(out, ignore_errors=True)
        self._history.append({"trial_id": "t", "config_id": "c", "seed": 0, "epoch": 1})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunSink, "write", remove)
        assert main(["sweep", str(plan), "--out", str(out)]) == EXIT_RUN_FOLDER
    assert "cannot be written: No such file or directory" in capsys.readouterr().err.splitlines()[-1]


def test_a_config_that_has_ended_leaves_its_names_and_little_else(
    write_plan: Callable[..., Path], tmp_path: Path
) -> None:
    """Board, search, tally and sink keep less than 500 bytes of each: half a gigabyte of a million."""
    space = {"domains": {"learning_rate": {"type": "float", "low": 1e-4, "high": 1e-2}}}
    search = {"algorithm": "random", "configs": 3 * FRAGMENT_ROWS, "batch": FRAGMENT_ROWS}
    plan = load_plan(write_plan(space=space, search=search, seeds=[0]))
    sink = RunSink(tmp_path / "run", plan, run_id="r", provenance={}, data_digests={})
    tally = Tally(plan.search.configs, plan.seeds)
    packing = Packing(size=FRAGMENT_ROWS, key=lambda trial: "one")
    board = make_board(plan, SearchProposer(plan), sink, tally, {}, packing=packing)

    def run_pack() -> int:
        """Report a whole pack, whose rows fill a fragment; return the bytes that are held afterwards."""
        for segment in board.next_pack():
            outcome = empty_outcome(segment.trial.config) | {"status": "completed"}
            board.reported(segment, Report([{"epoch": 1, "val_loss": 1.0}], outcome))
        sink.flush()
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    first, _, last = (run_pack() for _ in range(3))
    tracemalloc.stop()
    assert tally.done == 3 * FRAGMENT_ROWS
    assert (last - first) / (2 * FRAGMENT_ROWS) < 500


def test_the_same_settings_are_recognised_in_another_scenario(
    write_plan: Callable[..., Path], tmp_path: Path
) -> None:
    """Two tasks share no config_id and no scenario; what their configs share is the id of the settings."""
    tasks: list[dict[str, Any]] = [{"name": "dose"}, {"name": "dose", "size": "quick"}]
    runs = []
    for index, task in enumerate(tasks):
        plan = load_plan(write_plan(f"{index}.yaml", task=task))
        sink = RunSink(tmp_path / str(index), plan, run_id="r", provenance={}, data_digests={})
        proposer = SearchProposer(plan)
        specs = [*proposer.next_batch(), *proposer.next_batch()]
        runs.append([sink.row(EndedTrial(spec, {"status": "completed"}, {}, {})) for spec in specs])
    one, other = ({name: [row[name] for row in run] for name in run[0]} for run in runs)
    assert one["settings_id"] == other["settings_id"]
    assert len(set(one["settings_id"])) == 4
    assert not set(one["config_id"]) & set(other["config_id"])
    assert set(one["scenario"]) == {"dose"}
    assert set(other["scenario"]) == {"dose-b4f74e00"}
