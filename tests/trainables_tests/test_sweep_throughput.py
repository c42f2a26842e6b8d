"""The timing of whole sweeps: exit codes, what files and help say, and that like is compared with like."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from harness.plan import load_plan
from scm.models import make_model
from scm.seeding import generator, seeded_init
from scm.trial import make_trainer
from scm.trial_config import TrialConfig
from trainables.tasks.table import make_table_task

CONFIG = {"learning_rate": 1e-3, "beta1": 0.9, "lambda_margin": 0.1, "lambda_sign": 1.0}


@pytest.fixture
def bench(load_benchmark: Callable[[str], ModuleType]) -> ModuleType:
    """The benchmark's module."""
    return load_benchmark("sweep_throughput")


@pytest.fixture
def peer(load_benchmark: Callable[[str], ModuleType]) -> ModuleType:
    """The peer's ways to train."""
    return load_benchmark("peer_sweeps")


@pytest.fixture
def tiny(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The quick size with hardly anything to do."""
    amount = bench.Amount(2, 2, 3, 3, 2, ((4, 2),), (), 2, (2, 4), 1)
    monkeypatch.setattr(bench, "AMOUNTS", {"quick": amount})
    monkeypatch.setattr(bench, "TOTALS", {"cpu": 8})


def _parts(bench: ModuleType, **values: float) -> dict[str, Callable[..., Any]]:
    """Stand-ins for the parts, each with one target of 2."""

    def part(value: float) -> Callable[..., Any]:
        return lambda *_: bench.Found(["a table"], {"seconds": 1.0}, [bench.Target("ratio", value, 2.0)])

    return {name: part(values.get(name, 1.0)) for name in bench.PARTS}


@pytest.mark.parametrize(
    ("values", "code"),
    [({}, 0), ({"limit": 2.0}, 0), ({"limit": 2.1}, 1), ({"scale": math.nan}, 1)],
    ids=["met", "met exactly", "one missed", "no number"],
)
@pytest.mark.usefixtures("with_peer")
def test_the_exit_code_says_whether_all_targets_are_met(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, values: dict[str, float], code: int
) -> None:
    """One missed target of one part is enough for 1; the file says of each target whether it was met."""
    monkeypatch.setattr(bench, "PARTS", _parts(bench, **values))
    file = tmp_path / "out.json"
    assert bench.main(["--quick", "--json", str(file)]) == code
    written = json.loads(file.read_text(encoding="utf-8"))
    met = {part: written[part]["targets"][0]["met"] for part in bench.PARTS}
    assert met == {part: values.get(part, 1.0) <= 2.0 for part in bench.PARTS}
    assert written["device"] == "cpu"
    assert written["cores"] >= 1


def test_a_single_part_is_run_alone_and_needs_no_peer(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Only the part that was asked for runs, and only the throughput is compared with the peer."""
    monkeypatch.setattr(bench, "PARTS", _parts(bench))
    monkeypatch.setitem(sys.modules, "zeroproofml", None)
    file = tmp_path / "out.json"
    assert bench.main(["--part", "limit", "--json", str(file)]) == 0
    assert set(bench.PARTS) & set(json.loads(file.read_text(encoding="utf-8"))) == {"limit"}


def test_without_the_peer_there_is_nothing_to_compare(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The missing package is named with the way to install it, and is no missed target."""
    monkeypatch.setitem(sys.modules, "zeroproofml", None)
    assert bench.main(["--quick"]) == 2
    assert "pip install 'scm-harness[peer]'" in capsys.readouterr().err


@pytest.mark.usefixtures("with_peer")
def test_an_arm_that_fails_is_no_missed_target(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A process that ends badly is told with its last words, and ends the benchmark with 2."""

    def fail(*_: Any) -> None:
        bench.run_process(["-c", "raise SystemExit('no memory left')"], tmp_path / "log")

    monkeypatch.setattr(bench, "PARTS", {**_parts(bench), "throughput": fail})
    assert bench.main(["--quick"]) == 2
    assert "ended with 1: no memory left" in capsys.readouterr().err


def test_the_help_states_the_targets(bench: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever asks what the benchmark wants is told all bounds and the exit codes."""
    with pytest.raises(SystemExit):
        bench.main(["--help"])
    told = capsys.readouterr().out
    for bound in (
        "100 times",
        "25 times",
        "15 times",
        "300 times",
        "alpha 0.01",
        "at most 2.0",
        "within 20 %",
    ):
        assert bound in told
    assert "Exit code" in told
    assert "--arm" not in told  # for the benchmark itself


# --- throughput -----------------------------------------------------------------------------------------


def test_an_arm_is_extended_at_the_rate_of_its_second_half(bench: ModuleType) -> None:
    """A slow beginning counts once: what is added is as fast as the arm was in the end."""
    stamps = [3.0, 8.0, 9.0, 9.5, 10.0, 10.5]
    rate = bench.extended_rate("best", 106, 12.0, stamps)
    assert rate.more_s == 0.5
    assert rate.per_s == pytest.approx(106 / (12.0 + 100 * 0.5))


def test_an_arm_that_trained_everything_is_not_extended(bench: ModuleType) -> None:
    """Packs are measured from end to end, however fast they are once under way."""
    assert bench.Rate("packs", 1024, 1024, 16.0, 0.001).per_s == 64.0


def test_packs_under_way_are_timed_by_when_the_next_ones_begin(bench: ModuleType) -> None:
    """Two workers, whose packs of 4 take 2 s each after a first one of 9 s."""
    begun = datetime(2000, 1, 1, tzinfo=UTC)
    rows = [
        {"pack_id": f"{worker}.{pack}", "trial_id": "", "started_at": begun + timedelta(seconds=at + worker)}
        for worker in (0, 1)
        for pack, at in enumerate((0.0, 9.0, 11.0, 13.0))
        for _ in range(4)
    ]
    assert bench.seconds_one_more(rows, 2) == pytest.approx(2.0 / 4 / 2)
    assert math.isnan(bench.seconds_one_more(rows[:8], 2))


@pytest.mark.parametrize(("device", "arms"), [("cpu", {"usual", "best", "alone"}), ("cuda", {"best"})])
def test_a_gpu_has_a_target_of_its_own(bench: ModuleType, device: str, arms: set[str]) -> None:
    """The targets of two cores say nothing about a GPU."""
    rates = [bench.Rate(arm, 8, 8, 1.0, 0.1) for arm in ("usual", "best", "alone")]
    assert {rate.arm for rate, _ in bench.throughput_limits(device, *rates)} == arms


@pytest.mark.parametrize(("shift", "alike"), [(0.0, True), (0.5, False)], ids=["alike", "shifted"])
def test_outcomes_that_are_shifted_are_told_apart(bench: ModuleType, shift: float, alike: bool) -> None:
    """The trials of the peer are compared with those of other configs, which the shift sets apart."""
    drawn = torch.Generator().manual_seed(0)
    rows = [dict.fromkeys(bench.KS_OF, float(x)) for x in torch.rand(1024, generator=drawn)]
    peer = [{name: value + shift for name, value in row.items()} for row in rows[:64]]
    found = bench.compare_outcomes(peer, rows)
    for name in bench.KS_OF:
        assert (found[name]["p"] >= bench.ALPHA) is alike
        assert found[name]["median_apart"] == pytest.approx(shift)


def test_the_plans_differ_in_packs_alone(bench: ModuleType, tmp_path: Path) -> None:
    """Packs run as a sweep runs that says nothing of them."""
    plans = []
    for packs in (None, {"size": 1}):
        file = tmp_path / "plan.yaml"
        file.write_text(json.dumps(bench.make_plan(64, "cpu", packs)), encoding="utf-8")
        plans.append(load_plan(file))
    usual, alone = plans
    assert usual.packs == type(usual.packs)()
    assert alone.packs.size == 1
    assert alone.model_copy(update={"packs": usual.packs}) == usual


def test_the_peer_begins_with_the_same_weights(peer: ModuleType) -> None:
    """Both models are one network, drawn in the same order."""
    with seeded_init(peer.SEED):
        ours = make_model(TrialConfig(**peer.FIXED), peer.SHAPE[0])
    with seeded_init(peer.SEED):
        theirs = peer.PatternMLP()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_both_sides_train_the_same(peer: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one config, seed and order the peer's best way and our trainer come to the same numbers."""
    pytest.importorskip("zeroproofml", reason="the peer is an extra")
    monkeypatch.setattr(peer, "EPOCHS", 2)
    config = replace(TrialConfig(**peer.FIXED, **CONFIG), max_epochs=2)
    task = make_table_task({key: value for key, value in peer.TASK.items() if key != "name"})
    splits = task.splits(peer.SEED)
    trainer = make_trainer(
        config, peer.SEED, lambda: task.build_model(config), splits["train"], splits["val"]
    )
    *_, ours = trainer.epochs()
    data = peer.peer_splits()
    train = peer.IndexedBatches(data["train"], "cpu", peer.BATCH_SIZE, generator(peer.SEED, "order"))
    val = peer.IndexedBatches(data["val"], "cpu", len(data["val"].words), None)
    theirs = peer.train_peer(CONFIG, train, val, "cpu", fused=True)
    assert ours.val is not None
    assert theirs["val_loss"] == pytest.approx(ours.val["val_loss"], rel=1e-2)
    assert theirs["coverage"] == pytest.approx(ours.val["val_coverage"], abs=0.01)


@pytest.mark.slow
@pytest.mark.usefixtures("tiny")
def test_all_arms_run_from_end_to_end(bench: ModuleType, tmp_path: Path) -> None:
    """Every arm trains its configs to the end in a process of its own; so few are no measurement."""
    pytest.importorskip("zeroproofml", reason="the peer is an extra")
    file = tmp_path / "out.json"
    assert bench.main(["--quick", "--part", "throughput", "--json", str(file)]) in (0, 1)
    found = json.loads(file.read_text(encoding="utf-8"))["throughput"]
    assert [rate["measured"] for rate in found["rates"]] == [2, 3, 3, 8]
    assert all(rate["per_s"] > 0 for rate in found["rates"])
    assert set(found["alike"]) == set(bench.KS_OF)
    assert found["nothing_wall_s"] > 0


# --- the physical limit, and scale ----------------------------------------------------------------------


def test_the_products_are_those_of_a_step(bench: ModuleType) -> None:
    """Forward, for weights and for inputs; inputs of the first layer need no gradient."""
    products = bench.Products(3, 7, "cpu")
    done = sum(one.shape[1] * one.shape[2] * other.shape[2] for one, other, _ in products.steps)
    layers = 5 * 64 + 64 * 64 + 64 * 2
    assert done == 7 * (3 * layers - 5 * 64)
    assert all(one.shape[0] == other.shape[0] == 3 for one, other, _ in products.steps)


@pytest.mark.usefixtures("tiny")
def test_a_step_takes_longer_than_its_products(bench: ModuleType, tmp_path: Path) -> None:
    """A pack is timed as it trains, by the clock of the pack itself."""
    file = tmp_path / "out.json"
    bench.main(["--quick", "--part", "limit", "--json", str(file)])
    (step,) = json.loads(file.read_text(encoding="utf-8"))["limit"]["steps"]
    assert (step["batch_size"], step["trials"]) == (4, 2)
    assert step["ratio"] > 1


@pytest.mark.parametrize(
    ("work_s", "kept"),
    [((2.0, 12.0, 22.0), True), ((2.0, 12.0, 25.0), False), ((2.0, 12.0, 11.0), False)],
    ids=["flat", "ever slower", "faster than nothing"],
)
def test_the_time_of_a_further_config_must_stay(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, work_s: tuple[float, ...], kept: bool
) -> None:
    """What a sweep takes to start is no part of it; the rest counts a config."""
    sizes = (100, 1100, 2100)
    found = {
        size: bench.Sized(size, 9.0 + work, work, 10**8 + packs + 1000 * size, 4000 * size)
        for size, work, packs in zip(sizes, work_s, (0, 10**6, 10**6), strict=True)
    }
    monkeypatch.setattr(bench, "sized_sweep", lambda configs, *_: found[configs])
    amount = replace(bench.AMOUNTS["full"], scale=sizes)
    measured = bench.measure_scale(amount, "cpu", tmp_path)
    targets = measured.targets
    assert [target.value for target in targets if "kB" in target.name] == [4.0, 1.5]
    assert measured.numbers["driver_bytes_per_config"] == [1500.0, 1000.0]
    (flat,) = [target for target in targets if "kB" not in target.name]
    assert flat.met is kept
