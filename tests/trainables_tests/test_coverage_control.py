"""The benchmark of coverage control: which weight is the one chosen by hand, and when it says no."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from scm.training.targets import STATUS_CODES
from scm.trial_config import TrialConfig

TARGETS = (0.80, 0.90, 0.95)


@pytest.fixture
def bench(load_benchmark: Callable[[str], ModuleType]) -> ModuleType:
    """The benchmark's module."""
    return load_benchmark("coverage_control")


@pytest.fixture
def made(bench: ModuleType) -> Callable[..., Any]:
    """Make up a run whose last third of three epochs is one epoch of this coverage and error."""

    def make(arm: str, target: float, coverage: float, error: float = 1.0, **others: Any) -> Any:
        values = {"val_coverage": [0.0, 0.0, coverage], "status": "completed", "seed": 0, **others}
        return bench.Run(
            problem="poles",
            arm=arm,
            target=target,
            untrained=0.5,
            coverage=[0.0, 0.0, coverage],
            accepted_error=[9.0, 9.0, error],
            multiplier=[0.0, 0.0, 0.5],
            **values,
        )

    return make


def all_good(made: Callable[..., Any]) -> list[Any]:
    """Runs in which a fixed weight of 1 holds all targets, one of 0.3 two, and control costs least."""
    runs = [made("no weight", 0.8, 0.2)]
    for target in TARGETS:
        runs.append(made("unbiased", target, target, 1.0))
        runs.append(made("ranked 0.3", target, 0.9, 1.5))
        runs.append(made("ranked 1", target, 0.97, 2.0))
        runs.append(made("ranked 3", target, 1.0, 3.0))
    return runs


def test_by_hand_is_the_smallest_weight_that_holds_every_target(
    bench: ModuleType, made: Callable[..., Any]
) -> None:
    """And for a single target the smallest that holds that one."""
    runs, grid = all_good(made), (3.0, 0.3, 1.0)
    assert bench.hand_chosen(runs, "ranked", grid) == "ranked 1"
    assert bench.hand_chosen(runs, "ranked", grid, (0.9,)) == "ranked 0.3"
    assert bench.hand_chosen(runs, "ranked", (0.3,)) is None
    assert bench.hand_chosen(runs, "soft", grid) is None


def test_a_weight_is_chosen_by_validation_and_judged_by_test_data(
    bench: ModuleType, made: Callable[..., Any]
) -> None:
    """What only the test split shows is not known to who chooses."""
    run = made("ranked 1", 0.9, 0.5, val_coverage=[0.0, 0.0, 0.9])
    assert run.seems_to_hold
    assert not run.holds


@pytest.mark.parametrize(
    ("spoil", "missed"),
    [
        ({}, []),
        ({"arm": "no weight", "target": 0.8, "coverage": 0.6}, ["coverage stays below 0.5"]),
        ({"arm": "unbiased", "target": 0.9, "coverage": 0.87}, ["coverage >= 0.88"]),
        ({"arm": "unbiased", "target": 0.95, "coverage": 0.95, "error": 9.0}, ["accepted error below"]),
        (
            {"arm": "unbiased", "target": 0.8, "coverage": 0.8, "status": "diverged"},
            ["coverage >= 0.78", "accepted error below"],
        ),
    ],
    ids=["good", "no collapse", "short", "dear", "diverged"],
)
def test_one_bad_run_misses_its_target(
    bench: ModuleType, made: Callable[..., Any], spoil: dict[str, Any], missed: list[str]
) -> None:
    """Each target is missed by one more run alone, whatever the others are; nan never holds."""
    runs = all_good(made) + ([made(seed=1, **spoil)] if spoil else [])
    report = bench.report_problem("poles", runs, bench.AMOUNTS["quick"])
    failed = [check["what"] for check in report["checks"] if not check["holds"]]
    assert len(failed) == len(missed)
    assert all(what.startswith(words) for what, words in zip(failed, missed, strict=True))
    text = bench.render(report)
    assert text.count("MISS") == len(missed)
    assert "by hand" in text


@pytest.mark.parametrize(("coverage", "code"), [(0.95, 0), (0.5, 1)])
def test_the_exit_code_says_whether_all_targets_hold(
    bench: ModuleType,
    made: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    coverage: float,
    code: int,
) -> None:
    """And what was measured is written as strict JSON, nan as null."""
    runs = [*all_good(made), made("unbiased", 0.95, coverage, seed=1)]
    runs[0].accepted_error[0] = math.nan
    monkeypatch.setattr(bench, "run_jobs", lambda jobs, workers: runs)
    out = tmp_path / "found.json"
    assert bench.main(["--quick", "--problems", "poles", "--json", str(out)]) == code
    document = json.loads(out.read_text(encoding="utf-8"))
    assert document["runs"][0]["accepted_error"][0] is None
    assert document["problems"][0]["by_hand"] == {"ranked": "ranked 1"}


@pytest.mark.parametrize(
    "argv", [["--workers", "0"], ["--problems", "rf"], ["--json", "/no/such/folder/x.json"], ["--slow"]]
)
def test_arguments_that_cannot_be_right_are_refused(bench: ModuleType, argv: Sequence[str]) -> None:
    """Before anything is trained."""
    with pytest.raises(SystemExit) as refused:
        bench.main(argv)
    assert refused.value.code == 2


def test_every_arm_differs_from_the_controlled_one_in_its_weight_alone(bench: ModuleType) -> None:
    """Of the quick run; each is trained for every target and seed, without a weight once a seed."""
    jobs = bench.make_jobs(["dose"], bench.AMOUNTS["quick"])
    assert len(jobs) == len(set(map(repr, jobs))) == 3 * (1 + 3 * 4)
    for job in jobs:
        assert set(job.knobs) <= {"lambda_rej", "coverage_term", "coverage_control"}
        assert job.knobs["coverage_term"] == "ranked"
    (controlled,) = {tuple(job.knobs.items()) for job in jobs if job.arm == "unbiased"}
    assert dict(controlled)["lambda_rej"] == TrialConfig().lambda_rej


def test_poles_lie_where_the_task_says(bench: ModuleType) -> None:
    """A quarter of the rows is within reach of the threshold, rows by the line are bottoms, seeds differ."""
    task = bench.PolesTask()
    splits = task.splits(0)
    assert {part: len(split) for part, split in splits.items()} == dict(task.sizes)
    train = splits["train"]
    within = train.extras["value"].abs() < 4.9
    assert 0.15 < float(within.double().mean()) < 0.3
    bottom = train.extras["status"] == STATUS_CODES["bottom"]
    assert torch.equal(bottom, train.targets.mask_bottom)
    assert float(train.extras["value"][bottom].abs().min()) > 90
    assert float(train.extras["value"][~bottom].abs().max()) < 101
    assert not torch.equal(train.inputs, task.splits(1)["train"].inputs)
    assert torch.equal(train.inputs, bench.PolesTask().splits(0)["train"].inputs)


def test_a_run_measures_every_epoch(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Coverage on both splits, the accepted error, and the weight as it was then; fixed ones stay."""
    monkeypatch.setattr(bench.PolesTask, "sizes", {"train": 128, "val": 32, "test": 64})
    short = bench.Problem(bench.PolesTask, {**bench.PROBLEMS["poles"].config, "max_epochs": 3}, False)
    monkeypatch.setattr(bench, "PROBLEMS", {"poles": short})
    knobs = {"coverage_term": "ranked", "coverage_control": "unbiased", "control_warmup_steps": 0}
    controlled = bench.run_job(bench.Job("poles", "unbiased", 0.9, 0, knobs))
    fixed = bench.run_job(
        bench.Job("poles", "ranked 1", 0.9, 0, {"coverage_term": "ranked", "lambda_rej": 1.0})
    )
    for run in (controlled, fixed):
        assert run.status == "completed"
        for column in (run.coverage, run.val_coverage, run.accepted_error, run.multiplier):
            assert len(column) == 3
        assert run.held_coverage == run.worst_coverage == run.coverage[-1]
    assert fixed.multiplier == [1.0] * 3
    assert len(set(controlled.multiplier)) == 3
    assert controlled.untrained == fixed.untrained
