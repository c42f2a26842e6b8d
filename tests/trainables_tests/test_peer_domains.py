"""The comparison with the peer: what picks a config, what is reported, and when the benchmark says no."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from trainables.configs import resolve_config
from trainables.tasks.dose_data import draw_dose_rows, three_way_scores


@pytest.fixture
def bench(load_benchmark: Callable[[str], ModuleType]) -> ModuleType:
    """The benchmark's module."""
    return load_benchmark("peer_domains")


def _row(config_id: str, *, val: float, test: float, **others: Any) -> dict[str, Any]:
    config = resolve_config({"learning_rate": {"a": 0.01, "b": 0.02}.get(config_id, 0.03)})
    return {
        "config_id": config_id,
        "status": "completed",
        "parameters": 9,
        "metric.charged_mse": val,
        "test_metric.charged_extrapolation_mse": test,
        "test_metric.predict_zero_extrapolation_mse": 20.0,
        **{f"config.{name}": value for name, value in config.items()},
        **others,
    }


class _Runs:
    """Answers the plans of a benchmark with rows made up beforehand, and keeps the plans."""

    def __init__(self, swept: list[dict[str, Any]], reported: list[dict[str, Any]]) -> None:
        self.rows = {"rf-sweep": swept, "rf-report": reported}
        self.plans: dict[str, Mapping[str, Any]] = {}

    def __call__(self, values: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
        self.plans[name] = values
        return self.rows[name]


def test_the_config_is_picked_by_validation_and_reported_on_fresh_seeds_and_data(bench: ModuleType) -> None:
    """The best test error of the sweep does not count; the reported seeds are new and draw their own data."""
    runs = _Runs(
        swept=[_row("a", val=0.5, test=0.0), _row("b", val=0.1, test=9.0)],
        reported=[_row("b", val=0.1, test=1.0), _row("b", val=0.1, test=1.5)],
    )
    result = bench.run_domain(bench.DOMAINS["rf"], bench.AMOUNTS["quick"], runs)
    assert result["config"]["learning_rate"] == 0.02
    assert result["test"]["charged_extrapolation_mse"] == [1.0, 1.5]
    assert result["passed"] is True
    report = runs.plans["rf-report"]
    assert report["task"]["redraw_data"] is True
    assert report["config"]["learning_rate"] == 0.02
    assert not set(report["seeds"]) & set(runs.plans["rf-sweep"]["seeds"])


@pytest.mark.parametrize("worst", [17.0, 2.5, math.nan], ids=["bound", "share of zero", "nan"])
def test_one_bad_seed_misses_the_target(bench: ModuleType, worst: float) -> None:
    """A target must hold at every seed, whatever the mean; a trial without a result misses it."""
    runs = _Runs([_row("a", val=0.1, test=0.0)], [_row("a", val=0.1, test=x) for x in (0.0, 0.0, worst)])
    result = bench.run_domain(bench.DOMAINS["rf"], bench.AMOUNTS["quick"], runs)
    assert result["passed"] is False
    assert "MISS" in bench.render({"run": "quick", "size": "quick", "duration_s": 1.0, "domains": [result]})


def test_the_trivial_answer_of_dose_is_the_best_constant_call(bench: ModuleType) -> None:
    """No call that is the same for every curve scores better than what the table prints as trivial."""
    label = draw_dose_rows(60_000, np.random.default_rng(0), balanced=True).y[:, 1]
    constant = [three_way_scores(label, np.full(label.size, call))["macro_f1"] for call in range(3)]
    assert float(bench.DOMAINS["dose"].trivial) == pytest.approx(max(constant), abs=0.002)


def test_configs_that_failed_a_trial_or_are_too_large_are_out(bench: ModuleType) -> None:
    """A config is not picked for the seeds that it survived, nor beyond its allowance of weights."""
    domain = bench.DOMAINS["rf"]
    good = [_row("a", val=0.5, test=1.0), _row("a", val=0.6, test=1.0)]
    lucky = [_row("b", val=0.0, test=1.0), _row("b", val=0.0, test=1.0, status="diverged")]
    assert bench.pick_config(domain, [*good, *lucky])["learning_rate"] == 0.01
    assert bench.pick_config(domain, lucky) is None
    dose = bench.DOMAINS["dose"]
    scores = {"metric.macro_f1": 0.9, "metric.finite_mae": 0.1}
    large = _row("a", val=0.0, test=0.0, **scores) | {"parameters": 6_001}
    assert bench.pick_config(dose, [large]) is None


def test_without_a_completed_config_the_benchmark_says_so(bench: ModuleType) -> None:
    """A sweep in which everything failed is a miss with a line, not a crash."""
    runs = _Runs([_row("a", val=math.nan, test=math.nan, status="failed")], [])
    result = bench.run_domain(bench.DOMAINS["rf"], bench.AMOUNTS["quick"], runs)
    assert result["passed"] is False
    assert "no config completed" in bench.render(
        {"run": "quick", "size": "quick", "duration_s": 1.0, "domains": [result]}
    )


@pytest.fixture
def made_up(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> _Runs:
    """A benchmark whose sweeps end at once with made up rows; one variant's trial has no result."""
    runs = _Runs([_row("a", val=0.1, test=0.0)], [_row("a", val=0.1, test=x) for x in (0.5, 1.5)])
    runs.rows["rf-0"] = [_row("a", val=math.inf, test=math.nan)]
    monkeypatch.setattr(bench, "ray_session", lambda resources, address: contextlib.nullcontext())
    monkeypatch.setattr(bench, "sweep_rows", lambda values, out, resources: runs(values, out.name))
    return runs


def test_the_exit_code_says_whether_every_target_holds(
    bench: ModuleType, made_up: _Runs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same rows give 0 with the stated targets, and 1 once a target is out of reach."""
    assert bench.main(["--quick", "--domains", "rf"]) == 0
    assert "MISS" not in capsys.readouterr().out
    unreachable = {"quick": (bench.Target("charged_extrapolation_mse", 1e-9),)}
    monkeypatch.setitem(bench.DOMAINS, "rf", replace(bench.DOMAINS["rf"], targets=unreachable))
    assert bench.main(["--quick", "--domains", "rf"]) == 1
    assert "MISS charged_extrapolation_mse < 1e-09" in capsys.readouterr().out


def test_the_json_is_strict(bench: ModuleType, made_up: _Runs, tmp_path: Path) -> None:
    """Numbers that JSON has no word for are null, so that every parser reads the file."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    file = tmp_path / "out.json"
    assert bench.main(["--domains", "rf", "--json", str(file)]) == 0
    document = json.loads(file.read_text(encoding="utf-8"), parse_constant=refuse)
    [result] = document["domains"]
    assert result["test"]["charged_extrapolation_mse"] == [0.5, 1.5]
    assert result["variants"]["network coefficients"]["charged_extrapolation_mse"] == [None]
    assert document["run"] == "default"


def test_the_help_states_the_targets(bench: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever asks what the benchmark wants is told the bounds of every task and size."""
    with pytest.raises(SystemExit):
        bench.main(["--help"])
    told = capsys.readouterr().out
    for domain in bench.DOMAINS.values():
        for targets in domain.targets.values():
            assert all(str(target) in told for target in targets)


def test_an_interrupted_benchmark_says_so(
    bench: ModuleType, made_up: _Runs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C ends with the shell's code for it and a line, not with a traceback."""

    def interrupted(*_: Any) -> list[dict[str, Any]]:
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "sweep_rows", interrupted)
    assert bench.main(["--quick"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize("size", ["quick", "default", "paper"])
@pytest.mark.parametrize("task", ["dose", "rr_ik", "rf"])
def test_the_plans_are_valid_plans(bench: ModuleType, tmp_path: Path, task: str, size: str) -> None:
    """What the benchmark asks for is what `scm-harness sweep` takes, with every candidate trainable."""
    from harness.plan import load_plan, plan_space

    domain, amount = bench.DOMAINS[task], bench.AMOUNTS[size]
    fixed = dict(domain.suggested)
    plans = {
        "sweep": bench.sweep_plan(domain, amount),
        "report": bench.report_plan(domain, amount, fixed, {}),
        **{
            f"variant {number}": bench.report_plan(domain, amount, fixed | variant.config, variant.params)
            for number, variant in enumerate(domain.variants.values())
        },
    }
    for name, values in plans.items():
        file = tmp_path / f"{name}.yaml"
        file.write_text(bench.json.dumps(values), encoding="utf-8")
        plan = load_plan(file)
        space = plan_space(plan)
        config = space.sample([0.3] * len(space.dimensions))
        assert config.items() <= resolve_config(config).items()
