"""Sweeps whose trials train in packs: the rows of a sweep without, whatever happens on the way."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from harness.cli.main import main
from harness.errors import EXIT_INTERRUPTED, EXIT_OK
from harness.jobs import EndedTrial, TrialSpec
from harness.packing import LARGEST_PACK, STEPS_THAT_PAY, expected_epochs, make_packing
from harness.plan import load_plan
from harness.proposals import full_config
from harness.sink import RunSink
from harness.sweep import PackNotes, run_sweep
from reports.history import read_history
from reports.rows import read_rows

SEARCH = {"algorithm": "random", "configs": 6, "batch": 3}
HALVING = {"rungs": [1, 2], "eta": 2}
EXACT = {"max_epochs": 4, "hidden_width": 6, "hidden_depth": 1, "batch_size": 16, "dtype": "float64"}

KILLING_TASK = """
import os
import signal

from trainables.tasks.dose import make_dose_task


def killing(params):
    task = make_dose_task({})
    metrics = task.metrics

    def kill(decoded, split, config):
        flag = params["flag"]
        if not os.path.exists(flag):
            open(flag, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        return metrics(decoded, split, config)

    task.metrics = kill
    return task


def dropping(params):
    import torch

    task = make_dose_task({})
    build = task.build_model

    def build_model(config):
        return torch.nn.Sequential(torch.nn.Dropout(0.1), build(config))

    task.build_model = build_model
    return task
"""


def differences(
    one: list[dict[str, Any]], other: list[dict[str, Any]], tolerance: float = 0.0
) -> list[tuple[Any, ...]]:
    """Where two lists of rows differ beyond the tolerance."""
    assert len(one) == len(other)
    return [
        (left.get("trial_id"), name, left.get(name), right.get(name))
        for left, right in zip(one, other, strict=True)
        for name in left.keys() | right.keys()
        if not same(left.get(name), right.get(name), tolerance)
    ]


def same(one: Any, other: Any, tolerance: float) -> bool:
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(same(*pair, tolerance) for pair in zip(one, other, strict=True))
    if isinstance(one, float) and isinstance(other, float):
        both_nan = math.isnan(one) and math.isnan(other)
        return both_nan or math.isclose(one, other, rel_tol=tolerance, abs_tol=tolerance)
    return bool(one == other)


def sizes(run: Path) -> list[int | None]:
    return sorted(read_rows(run).column("pack_size").to_pylist(), key=lambda size: size or 0)


@pytest.mark.usefixtures("local_ray")
def test_packs_change_no_row(
    write_plan: Callable[..., Path], tmp_path: Path, comparable: Callable[..., Any]
) -> None:
    """With halving and two seeds, in packs and alone: the same rows and histories, to 1e-9 in float64."""
    for name, size in (("packs", 8), ("alone", 1)):
        plan = write_plan(search=SEARCH, halving=HALVING, config=EXACT, packs={"size": size}, seeds=[0, 1])
        run_sweep(load_plan(plan), tmp_path / name)
    packs, alone = tmp_path / "packs", tmp_path / "alone"
    assert None not in sizes(packs)
    assert max(size or 0 for size in sizes(packs)) > 1
    assert set(sizes(alone)) == {None}
    assert {row["pack_note"] for row in read_rows(packs).to_pylist()} == {""}
    assert {row["epochs"] for row in comparable(packs)} == {1, 2, 4}
    assert differences(comparable(packs), comparable(alone), 1e-9) == []
    assert differences(comparable(packs, read_history), comparable(alone, read_history), 1e-9) == []
    for row in read_rows(packs).to_pylist():
        assert 0 < row["step_time_ms"] < math.inf
        assert 0 < row["pack_step_time_ms"] < math.inf


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("algorithm", ["random", "tpe"])
def test_rows_do_not_depend_on_packs_or_workers(
    algorithm: str, write_plan: Callable[..., Path], tmp_path: Path, comparable: Callable[..., Any]
) -> None:
    """Packs of 2, 3 or 64, for one worker or two: the same rows bit by bit, in single precision too."""
    search = {"algorithm": algorithm, "configs": 8, "batch": 4}
    runs = []
    for size, workers in ((2, 2), (3, 1), (64, 2), (64, 1)):
        runs.append(tmp_path / f"{size}-{workers}")
        plan = write_plan(
            search=search,
            halving=HALVING,
            config={**EXACT, "dtype": "float32"},
            packs={"size": size},
            resources={"max_concurrent": workers},
        )
        run_sweep(load_plan(plan), runs[-1])
    for run in runs[1:]:
        assert differences(comparable(run), comparable(runs[0])) == []
        assert differences(comparable(run, read_history), comparable(runs[0], read_history)) == []
    assert sizes(runs[0]) != sizes(runs[3])


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_packs_interrupted_and_resumed_equal_packs_that_were_not(
    write_plan: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    comparable: Callable[..., Any],
) -> None:
    """Ctrl-C between packs and in the middle of a batch: no trial is lost, and none is written twice."""
    import os
    import signal

    plan = str(write_plan(search=SEARCH, halving=HALVING, config=EXACT, packs={"size": 4}))
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(["sweep", plan, "--out", str(whole)]) == EXIT_OK
    write = RunSink.write
    written: list[str] = []

    def write_and_interrupt(self: RunSink, ended: EndedTrial) -> None:
        write(self, ended)
        written.append(ended.trial.trial_id)
        if len(written) == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(RunSink, "write", write_and_interrupt)
        assert main(["sweep", plan, "--out", str(parts)]) == EXIT_INTERRUPTED
    assert 3 <= len(read_rows(parts)) < 12
    assert main(["sweep", plan, "--out", str(parts), "--resume"]) == EXIT_OK
    assert differences(comparable(parts), comparable(whole)) == []
    assert differences(comparable(parts, read_history), comparable(whole, read_history)) == []


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_a_worker_that_is_killed_costs_no_trial_of_its_pack(
    write_plan: Callable[..., Path], tmp_path: Path
) -> None:
    """A pack whose process dies runs again in smaller ones, and every trial of it is a row, once."""
    (tmp_path / "own_pack_killer.py").write_text(KILLING_TASK, encoding="utf-8")
    plan = write_plan(
        task={"name": "own_pack_killer:killing", "flag": str(tmp_path / "killed")},
        space={"learning_rate": {"type": "log-float", "low": 1e-4, "high": 1e-2}},
        search={"algorithm": "sobol", "configs": 8, "batch": 8},
        config={"max_epochs": 1, "batch_size": 256},
        packs={"size": 16},
        resources={"max_concurrent": 1, "retries": 0},
        seeds=[0],
    )
    out = tmp_path / "out"
    assert main(["sweep", str(plan), "--out", str(out)]) == EXIT_OK
    rows = read_rows(out)
    assert (tmp_path / "killed").exists()
    assert set(rows.column("status").to_pylist()) == {"completed"}
    assert len(set(rows.column("trial_id").to_pylist())) == len(rows) == 8


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_why_trials_train_alone_is_said_once_and_stands_in_their_rows(
    write_plan: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model that no pack can train is swept all the same."""
    (tmp_path / "own_dropping_task.py").write_text(KILLING_TASK, encoding="utf-8")
    plan = write_plan(
        task={"name": "own_dropping_task:dropping"},
        space={"learning_rate": {"type": "log-float", "low": 1e-4, "high": 1e-2}},
        search={"algorithm": "sobol", "configs": 4, "batch": 4},
        config={"max_epochs": 1, "batch_size": 256},
        packs={"size": 4},
        seeds=[0],
    )
    out = tmp_path / "out"
    assert main(["sweep", str(plan), "--out", str(out)]) == EXIT_OK
    rows = read_rows(out).to_pylist()
    assert {row["status"] for row in rows} == {"completed"}
    (note,) = {row["pack_note"] for row in rows}
    assert "it draws random numbers" in note
    assert sizes(out) == [None] * 4
    said = [line for line in capsys.readouterr().err.splitlines() if "train alone" in line]
    assert len(said) == 1
    assert note in said[0]


def test_a_reason_is_said_once() -> None:
    """A thousand trials with one reason are one line; no reason is none."""
    said: list[str] = []
    notes = PackNotes(said.append)
    trial = TrialSpec("a-s0", "a", 0, 0, {})
    for note in ("it draws", "", "it draws", "no knob of a pack"):
        notes.add(EndedTrial(trial, {"pack_note": note}, {}))
    notes.add(EndedTrial(trial, {}, {}))
    assert said == [
        "some trials train alone instead of in packs: it draws",
        "some trials train alone instead of in packs: no knob of a pack",
    ]


def spec_of(plan: Any, **changes: Any) -> TrialSpec:
    config, active = full_config({**plan.config, **changes})
    return TrialSpec("a-s0", "a", 0, 0, config, active)


def test_packing_follows_the_plan(write_plan: Callable[..., Path]) -> None:
    """A number packs whatever can be packed, 1 nothing; auto takes as many as the device has use for."""
    for size, expected in ((1, 1), (7, 7), ("auto", LARGEST_PACK["cpu"])):
        plan = load_plan(write_plan(packs={"size": size}))
        packing = make_packing(plan, 2, rows=36)
        assert (packing.size, packing.workers) == (expected, 2)
        assert (packing.key(spec_of(plan)) is None) == (size != 7)


@pytest.mark.parametrize(
    ("changes", "rows", "pays"),
    [
        ({}, 36, False),  # 4 configs x 2 seeds x 4 epochs x 5 steps
        ({"search": {"configs": 256, "batch": 8}}, 36, True),
        ({}, 3000, True),
        ({"search": {"configs": 256, "batch": 8}, "halving": {"rungs": [1], "eta": 100}}, 36, False),
        ({"space": ["model_size"], "search": {"configs": 64, "batch": 8}}, 36, False),  # one model each
    ],
    ids=["few", "many configs", "many rows", "stopped early", "many shapes"],
)
def test_auto_packs_where_tracing_pays(
    changes: Mapping[str, Any], rows: int, pays: bool, write_plan: Callable[..., Path]
) -> None:
    """What a kind of trials trains in the whole sweep decides, told from the plan alone."""
    plan = load_plan(write_plan(**changes))
    shape = {"hidden_width": 11} if changes.get("space") else {}
    packing = make_packing(plan, 2, rows)
    assert (packing.key(spec_of(plan, **shape)) is not None) == pays
    assert STEPS_THAT_PAY > 0


@pytest.mark.parametrize(
    ("halving", "max_epochs", "mean"),
    [
        (None, 20, 20.0),
        ({"rungs": [3, 9], "eta": 3}, 20, 3 + 6 / 3 + 11 / 9),
        ({"rungs": [3, 9], "eta": 3}, 5, 3 + 2 / 3),
        ({"rungs": [3, 9], "eta": 3}, 2, 2.0),
    ],
)
def test_the_mean_trial_ends_where_halving_ends_it(
    halving: dict[str, Any] | None, max_epochs: int, mean: float, write_plan: Callable[..., Path]
) -> None:
    """All train to the first rung, and one in eta from each rung to the next."""
    plan = load_plan(write_plan(halving=halving))
    assert expected_epochs(plan, max_epochs) == pytest.approx(mean)
