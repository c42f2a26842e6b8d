"""The two ready-made trainers: that they train, hold coverage, learn around poles, and say how it went."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scm.layers.hybrid_rational import HybridTRRational
from scm.layers.pole_head import PoleHead
from scm.training.checkpoint import CheckpointError, read_checkpoint
from scm.training.hybrid_schedule import HybridScheduleCompanion
from scm.training.hybrid_trainer import HybridTrainer, HybridTrainingConfig, Trainer, TrainerConfig
from scm.training.loader import TensorBatches
from scm.training.near_pole import NearPoleBatches
from scm.training.tag_loss import TagPredictionHead
from scm.training.targets import STATUS_CODES, SemanticTargets, lift_semantic_targets

POLE = 0.3


def label(points: Tensor) -> SemanticTargets:
    """y = 1 / (x - 0.3), without a value within 0.02 of the pole."""
    x = points.flatten()
    codes = torch.where((x - POLE).abs() < 0.02, STATUS_CODES["bottom"], STATUS_CODES["finite"])
    return lift_semantic_targets(1 / (x - POLE), codes)


def rows(count: int = 48, *, batch_size: int = 8, shuffled: bool = True) -> TensorBatches:
    """A grid on [-1, 1]."""
    x = torch.linspace(-1, 1, count, dtype=torch.float64)[:, None]
    order = torch.Generator().manual_seed(0) if shuffled else None
    return TensorBatches(x, label(x), batch_size, generator=order)


class Network(nn.Module):
    """A small network that answers a tuple of length 1, its tags and a pole score."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.body = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh())
            self.tuple = nn.Linear(8, 2)
            self.tags = TagPredictionHead(8)
            self.pole = PoleHead(8)
        self.double()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        features = self.body(x)
        P, Q = nn.functional.normalize(self.tuple(features), dim=-1).unbind(-1)
        return P, Q, {"tag_logits": self.tags(features), "pole_score": self.pole(features)}


class Line(nn.Module):
    """P and Q are linear in x: 1 / (x - 0.3) can be said exactly."""

    def __init__(self, *, pole: float | None = None, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.line = nn.Linear(1, 2).double()
        if pole is not None:
            with torch.no_grad():
                self.line.weight[1], self.line.bias[1] = 0.5, -0.5 * pole

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        P, Q = self.line(x).unbind(-1)
        return P, Q


class Rational(nn.Module):
    """P and Q are polynomials in x."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = HybridTRRational(2, 2).double()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.layer(x.squeeze(-1))


SMALL: dict[str, Any] = {"max_epochs": 4, "learning_rate": 0.01, "tau_train": 0.02, "tau_infer": 1e-3}
EVERYTHING: dict[str, Any] = {
    **SMALL,
    "use_hybrid_gradient": True,
    "hybrid_warmup_epochs": 1,
    "hybrid_transition_epochs": 2,
    "hybrid_delta_init": 0.1,
    "hybrid_delta_final": 0.05,
    "saturation_q_on": 0.5,
    "saturation_q_off": 0.9,
    "sat_shrink_on_ratio": True,
    "sat_shrink_ratio": 0.01,
    "use_tag_loss": True,
    "use_pole_head": True,
    "enforce_coverage": True,
    "adaptive_warmup_steps": 2,
    "adaptive_update_frequency": 1,
    "oversample_near_pole": True,
    "sampling_correction": True,
    "use_safe_lr": True,
    "seed": 3,
}


def hybrid(model: nn.Module | None = None, loader: Any = None, **fields: Any) -> HybridTrainer:
    """A hybrid trainer on the grid; `fields` beside those of `SMALL`."""
    around = {
        name: fields.pop(name) for name in ("val_loader", "label_points", "say", "log_hook") if name in fields
    }
    config = HybridTrainingConfig(**{**SMALL, **fields})
    return HybridTrainer(
        Network() if model is None else model, rows() if loader is None else loader, config=config, **around
    )


def weights_of(trainer: Any) -> Tensor:
    return torch.cat([weight.detach().flatten() for weight in trainer.model.parameters()])


# --- training ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("adaptive", [True, False], ids=["adaptive", "fixed"])
@pytest.mark.parametrize("kind", [Trainer, HybridTrainer])
def test_every_weight_of_a_layer_is_trained(kind, adaptive):
    """The loss of the data reaches both polynomials, whether its price adapts or not."""
    config = HybridTrainingConfig if kind is HybridTrainer else TrainerConfig
    model = Rational()
    begun = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    trainer = kind(model, rows(), config=config(**{**SMALL, "use_adaptive_loss": adaptive}))
    history = trainer.train()
    for name, weight in model.named_parameters():
        assert (weight.detach() != begun[name]).all(), name
    assert history["loss"][-1] < history["loss"][0]
    assert len(history["loss"]) == len(history["coverage"]) == len(history["lambda_rej"]) == 4


def test_every_weight_is_trained_with_everything_on():
    """Tags, pole scores, body and tuple."""
    trainer = hybrid(label_points=label, **EVERYTHING)
    begun = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    trainer.train()
    assert trainer.status == "completed"
    for name, weight in trainer.model.named_parameters():
        assert (weight.detach() != begun[name]).any(), name


def test_the_schedule_reaches_the_gradients_after_its_warm_up():
    """Trainings with and without it are one while poles are masked, and part as soon as they are not."""
    fields = {"use_adaptive_loss": False, "seed": 0}
    hybrid_fields = {"use_hybrid_gradient": True, "hybrid_delta_init": 0.3, "hybrid_warmup_epochs": 2}
    for epochs, same in ((2, True), (3, False)):
        plain = hybrid(Line(pole=0.2), max_epochs=epochs, **fields)
        scheduled = hybrid(Line(pole=0.2), max_epochs=epochs, **fields, **hybrid_fields)
        plain.train()
        scheduled.train()
        assert torch.equal(weights_of(plain), weights_of(scheduled)) == same


def test_an_aggressive_bound_is_steeper():
    """A bound of 0.1 instead of 1 trains otherwise."""
    fields = {"use_hybrid_gradient": True, "hybrid_delta_init": 0.3, "hybrid_warmup_epochs": 0}
    wide, narrow = (hybrid(Line(pole=0.2), hybrid_aggressive=narrow, **fields) for narrow in (False, True))
    wide.train()
    narrow.train()
    assert not torch.equal(weights_of(wide), weights_of(narrow))


def test_parts_are_made_once_and_keep_what_they_know():
    """The companions of the last epoch are those of the first, and count over all of them."""
    trainer = hybrid(label_points=label, **EVERYTHING)
    (schedule,) = [part for part in trainer._parts if isinstance(part, HybridScheduleCompanion)]
    seen = []
    for _ in trainer.training.epochs():
        seen.append(schedule.state_dict()["batches"])
    assert seen == sorted(seen)
    assert seen[0] > 0
    assert trainer.controller.adaptive.step_count == trainer.training.global_step == seen[-1]


def test_what_an_epoch_learned_is_read_before_it_is_cleared():
    """Poles are found and explored, and steps shrink, after epochs that saturated."""
    trainer = hybrid(
        Line(pole=0.2),
        label_points=label,
        use_hybrid_gradient=True,
        hybrid_warmup_epochs=0,
        hybrid_transition_epochs=10,
        hybrid_delta_init=0.5,
        hybrid_delta_final=0.4,
        sat_shrink_on_ratio=True,
        sat_shrink_ratio=0.01,
        sat_shrink_factor=0.25,
    )
    explored, shares = [], []
    for _ in trainer.training.epochs():
        said = trainer.training.telemetry()
        explored.append(said["poles_explored"])
        shares.append(said["step_share"])
    assert explored[0] == 0
    assert max(explored[1:]) >= 1
    assert shares[0] == 1.0
    assert shares[1:] == [0.25] * 3


def test_coverage_is_brought_to_its_target_and_held():
    """A model that begins without a single answer that has a value ends at the target."""

    class Silent(Network):
        def __init__(self) -> None:
            super().__init__()
            with torch.no_grad():
                self.tuple.weight[1].mul_(0.01)
                self.tuple.bias.copy_(torch.tensor([1.0, 0.0]))

    fields = {"max_epochs": 40, "tau_train": 0.2, "tau_infer": 0.2, "adaptive_warmup_steps": 0}
    held = hybrid(Silent(), enforce_coverage=True, target_coverage=0.9, adaptive_update_frequency=1, **fields)
    left = hybrid(Silent(), use_adaptive_loss=False, initial_lambda=0.0, **fields)
    held.train()
    left.train()
    assert left.evaluate(rows())["coverage"] < 0.5
    assert held.history[0]["coverage"] < 0.5
    assert held.evaluate(rows())["coverage"] >= 0.88
    assert min(epoch["coverage"] for epoch in held.history[-8:]) >= 0.85


def wide_gap(points: Tensor) -> SemanticTargets:
    """y = 1 / (x - 0.3), without a value within 0.1 of the pole."""
    x = points.flatten()
    codes = torch.where((x - POLE).abs() < 0.1, STATUS_CODES["bottom"], STATUS_CODES["finite"])
    return lift_semantic_targets(1 / (x - POLE), codes)


def test_saturated_gradients_bring_a_pole_to_where_it_is():
    """Masked, it stays on its side of the rows; under a schedule it is found, to a hundredth."""
    x = torch.linspace(-1, 1, 48, dtype=torch.float64)[:, None]
    fields = {
        "max_epochs": 200,
        "learning_rate": 0.05,
        "tau_infer": 0.02,
        "target_coverage": 0.9,
        "enforce_coverage": True,
        "adaptive_update_frequency": 1,
        "hybrid_warmup_epochs": 0,
        "hybrid_transition_epochs": 150,
        "hybrid_delta_init": 1.0,
        "hybrid_delta_final": 0.1,
    }
    far = (x[:, 0] - POLE).abs() > 0.1
    errors = []
    for use in (False, True):
        trainer = hybrid(Line(), TensorBatches(x, wide_gap(x), 48), use_hybrid_gradient=use, **fields)
        trainer.train()
        with torch.no_grad():
            P, Q = trainer.model(x)
        errors.append(float((P / Q - 1 / (x[:, 0] - POLE))[far].abs().mean()))
    assert errors[0] > 1.0
    assert errors[1] < 0.01


# --- resuming ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop_at", [3, 9, 14, 20])
def test_a_training_with_everything_resumes_bit_for_bit_in_mid_epoch(tmp_path, stop_at):
    """Weights, multiplier, coverage, draws, explored poles and statistics are those without a stop."""
    path = tmp_path / "mid.pt"

    def save(record: Any) -> None:
        if record["step"] == stop_at and record["phase"] == "train":
            whole.save_checkpoint(path)

    fields = {**EVERYTHING, "log_interval": 1, "clip_norm": 1.0}
    whole = hybrid(val_loader=rows(shuffled=False), label_points=label, log_hook=save, **fields)
    whole.train()
    resumed = hybrid(
        val_loader=rows(shuffled=False), label_points=label, log_hook=lambda record: None, **fields
    )
    resumed.load_checkpoint(path)
    resumed.train()
    assert torch.equal(weights_of(whole), weights_of(resumed))
    assert resumed.lambda_rej == whole.lambda_rej
    clocks = {"avg_step_ms", "data_time_ms", "optim_time_ms", "batches"}
    for one, other in zip(whole.history, resumed.history, strict=True):
        assert {k: v for k, v in one.items() if k not in clocks} == {
            k: v for k, v in other.items() if k not in clocks
        }
    assert whole.training.telemetry() == pytest.approx(resumed.training.telemetry(), nan_ok=True)


def test_a_checkpoint_holds_what_going_on_needs_and_runs_no_code(tmp_path):
    """It is read as tensors and plain values; multiplier, coverage and generators are in it."""
    trainer = hybrid(**EVERYTHING)
    trainer.train()
    trainer.save_checkpoint(tmp_path / "end.pt")
    content = read_checkpoint(tmp_path / "end.pt")
    state = content["controllers"]["coverage_controller"]["adaptive"]
    assert state["state"]["multiplier"] == trainer.lambda_rej
    assert state["tracker"]
    assert {"random", "tau_generator"} <= set(content)
    again = hybrid(**EVERYTHING)
    again.load_checkpoint(tmp_path / "end.pt")
    again.load_checkpoint(tmp_path / "end.pt")
    assert again.history == trainer.history
    assert again.status == "completed"


def test_a_checkpoint_of_other_parts_is_refused(tmp_path):
    """A training with a schedule cannot go on from one without."""
    plain = hybrid()
    plain.train()
    plain.save_checkpoint(tmp_path / "plain.pt")
    with pytest.raises(CheckpointError, match="controllers"):
        hybrid(use_hybrid_gradient=True).load_checkpoint(tmp_path / "plain.pt")


# --- what is said -----------------------------------------------------------------------------------


class Slow:
    """A loader that takes its time before each batch."""

    def __init__(self, seconds: float) -> None:
        self.batches = list(rows(shuffled=False))
        self.seconds = seconds

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches:
            time.sleep(self.seconds)
            yield batch


@pytest.mark.parametrize("kind", [Trainer, HybridTrainer])
def test_the_wait_for_data_is_measured(kind):
    """A slow loader shows in data_time_ms, and in the step time, of which it is a part."""
    config = HybridTrainingConfig if kind is HybridTrainer else TrainerConfig
    trainer = kind(Network(), Slow(0.004), config=config(**{**SMALL, "max_epochs": 2}))
    trainer.train()
    for epoch, bench in enumerate(trainer.bench_history):
        assert bench["epoch"] == epoch
        assert bench["batches"] == 6
        assert isinstance(bench["batches"], int)
        assert bench["data_time_ms"] >= 3.9
        assert bench["avg_step_ms"] >= bench["data_time_ms"] + bench["optim_time_ms"]
    assert trainer.history[0]["batches"] == 6.0
    assert trainer.history[1]["data_time_ms"] == trainer.bench_history[1]["data_time_ms"]


def test_a_verbose_training_says_one_bench_line_an_epoch():
    """Beside what the epoch did, and a line every log_interval micro-batches."""
    said: list[str] = []
    records: list[Any] = []
    trainer = hybrid(verbose=True, say=said.append, log_interval=3, max_epochs=2, log_hook=records.append)
    trainer.train()
    bench = [line for line in said if line.startswith("Bench:")]
    assert len(bench) == 2
    assert "ms, data " in bench[0]
    assert bench[0].endswith(", 6 batches")
    assert [line.split(":")[0] for line in said if line.startswith("Epoch")] == ["Epoch 1/2", "Epoch 2/2"]
    assert [line.split(":")[0] for line in said if line.startswith("  step")] == [
        f"  step {step}" for step in (3, 6, 9, 12)
    ]
    assert [record["step"] for record in records] == [3, 6, 9, 12]


def test_a_quiet_training_says_nothing(capsys):
    """Nobody asked."""
    hybrid().train()
    assert capsys.readouterr().out == ""


def test_the_summary_says_how_the_training_went():
    """Plain values, of every part; before the first epoch as well."""
    trainer = hybrid(label_points=label, val_loader=rows(), **EVERYTHING)
    before = trainer.get_training_summary()
    assert before["epochs_trained"] == 0
    assert before["final_metrics"] == {}
    assert before["transition_complete"] is False
    trainer.train()
    summary = trainer.get_training_summary()
    json.dumps(summary)
    assert summary["status"] == "completed"
    assert summary["epochs_trained"] == 4
    assert summary["global_steps"] == sum(bench["batches"] for bench in summary["bench_history"])
    assert summary["final_metrics"]["epoch"] == 3
    assert summary["gradient_modes"] == {"warmup": 1, "transitioning": 2, "converged": 1}
    assert summary["warmup_epochs"] == 1
    assert summary["transition_complete"] is True
    assert summary["policy_thresholds"] == {"q_on": 0.5, "q_off": 0.9, "g_on": None, "g_off": None}
    enforcement = summary["coverage_enforcement"]
    assert enforcement["target_coverage"] == 0.95
    assert enforcement["lambda_rej"] == trainer.lambda_rej
    assert summary["model_statistics"]["parameters"] == weights_of(trainer).numel()
    assert {"near_pole_share", "tag_accuracy", "pole_f1", "sampling_effective_share", "step_share"} <= set(
        summary["telemetry"]
    )


def test_layers_that_know_their_poles_are_in_the_summary():
    """Rational layers take part in the training's epochs, and say what they have seen."""
    trainer = hybrid(Rational())
    trainer.train()
    statistics = trainer.get_training_summary()["model_statistics"]["layers"]["layer"]
    assert statistics["q_min_epoch"] > 0
    assert statistics["batches"] == 6
    assert trainer.training.telemetry()["near_pole_q_min"] == statistics["q_min_epoch"]


def test_evaluation_is_strict_and_prices_answers_without_a_value():
    """Coverage at tau_infer; the loss has no bottom for free."""
    trainer = hybrid(use_adaptive_loss=False, initial_lambda=2.0, tau_train=0.9999, tau_infer=0.9999)
    found = trainer.evaluate(rows())
    assert found["coverage"] < 0.5
    assert found["loss"] > 1.0
    with pytest.raises(ValueError, match="evaluate needs a loader"):
        trainer.evaluate()
    assert hybrid(val_loader=rows()).evaluate()["coverage"] == hybrid().evaluate(rows())["coverage"]


def test_an_early_end_waits_for_its_patience_and_survives_a_checkpoint(tmp_path):
    """A loss that does not fall by min_delta ends the training, and it does not begin again."""
    trainer = hybrid(early_stopping=True, patience=2, min_delta=1e9, max_epochs=9)
    trainer.train()
    assert trainer.status == "stopped"
    assert trainer.training.current_epoch == 3
    trainer.save_checkpoint(tmp_path / "ended.pt")
    again = hybrid(early_stopping=True, patience=2, min_delta=1e9, max_epochs=9)
    again.load_checkpoint(tmp_path / "ended.pt")
    assert again.status == "stopped"
    assert len(again.fit()["loss"]) == 3


# --- settings ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [TrainerConfig, HybridTrainingConfig])
def test_every_setting_is_read(kind):
    """No field is there for nothing: building and training read each of them."""
    read: set[str] = set()
    built: list[Any] = []

    class Watched(kind):  # type: ignore[misc, valid-type]
        def __getattribute__(self, name: str) -> Any:
            if built:  # its own checks read every field, and do not count
                read.add(name)
            return super().__getattribute__(name)

    fields = EVERYTHING if kind is HybridTrainingConfig else SMALL
    for change in ({}, {"enforce_coverage": False}, {"early_stopping": True, "use_safe_lr": True}):
        known = {item.name for item in dataclasses.fields(kind)}
        changed = {**fields, **change, "max_epochs": 1}
        config = Watched(**{name: value for name, value in changed.items() if name in known})
        built.append(config)
        if kind is HybridTrainingConfig:
            HybridTrainer(Network(), rows(), config=config, label_points=label).train()
        else:
            Trainer(Network(), rows(), config=config).train()
        built.clear()
    assert {item.name for item in dataclasses.fields(kind)} - read == set()


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"max_epochs": 0}, "max_epochs must be >= 1"),
        ({"learning_rate": -1.0}, "learning rate"),
        ({"tau_infer": 0.5}, "tau_infer must be <= tau_train_min"),
        ({"target_coverage": 1.5}, r"target_coverage must be .*in \[0, 1\]"),
        ({"initial_lambda": -1.0}, "lambda_rej must be finite and >= 0"),
        ({"adaptive_momentum": 1.0}, "momentum"),
        ({"patience": 0}, "patience must be >= 1"),
        ({"min_delta": math.nan}, "min_delta must be finite and >= 0"),
        ({"safe_lr_floor": 0.0}, r"floor must be in \(0, 1\]"),
        ({"hybrid_schedule_type": "step"}, "schedule_type must be one of"),
        ({"hybrid_delta_init": 0.0}, "delta_init must be finite and > 0"),
        ({"hybrid_pole_exploration_radius": 0.0}, "radius must be finite and > 0"),
        ({"saturation_q_on": 0.1}, "saturation_q_on and _q_off must be given together"),
        ({"sampling_memory": 0.0}, r"gamma must be in \(0, 1\]"),
        ({"pole_sampling_threshold": 0.0}, "beta must be finite and > 0"),
        ({"lambda_tag": -1.0}, "weight must be finite and >= 0"),
        ({"tag_labels": "both"}, "labels must be one of"),
        ({"lambda_pole": 0.0}, "lambda_pole must be finite and > 0"),
        ({"sat_shrink_factor": 0.0}, r"shrink_by must be in \(0, 1\]"),
        ({"enforce_coverage": True, "coverage_dead_band": -0.1}, "dead_band"),
    ],
)
def test_settings_out_of_range_are_refused_before_there_is_a_model(fields, message):
    """Each refusal names the rule and the value."""
    with pytest.raises(ValueError, match=message):
        HybridTrainingConfig(**{**SMALL, **fields})


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"use_hybrid_gradient": 1}, "use_hybrid_gradient must be a bool"),
        ({"verbose": "yes"}, "verbose must be a bool"),
        ({"patience": 1.5}, "patience must be an int"),
        ({"hybrid_warmup_epochs": 0.5}, "warmup_epochs must be an int"),
    ],
)
def test_settings_of_another_type_are_refused(fields, message):
    """A value that would have to be guessed is refused."""
    with pytest.raises(TypeError, match=message):
        HybridTrainingConfig(**fields)


@pytest.mark.parametrize("around", [{"label_points": label}, {"oversample_near_pole": True}])
def test_rows_that_cannot_be_reached_are_refused(around):
    """Sampling and exploration need the rows themselves, not just an iteration over them."""
    with pytest.raises(TypeError, match="needs a train_loader of TensorBatches"):
        hybrid(loader=list(rows()), **around)


def test_a_loader_that_samples_already_is_kept():
    """Its own settings hold."""
    loader = hybrid(oversample_near_pole=True).training.train_loader
    assert isinstance(loader, NearPoleBatches)
    assert hybrid(loader=loader, oversample_near_pole=True).training.train_loader is loader


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_no_part_waits_for_the_device_within_an_epoch():
    """On CUDA, everything together raises nothing in mid-epoch where every wait is an error."""

    class Strict:
        """Makes waits errors from the first micro-batch of an epoch on to the last one."""

        def __init__(self, count: int) -> None:
            self.count = count
            self.met = 0

        def before_forward(self, moment: Any) -> None:
            if self.met >= self.count:  # in the first epoch, state moves to the device
                torch.cuda.set_sync_debug_mode("error")

        def after_backward(self, moment: Any) -> None:
            self.met += 1
            if self.met % self.count == 0:
                torch.cuda.set_sync_debug_mode("default")

    loader = TensorBatches(rows().inputs, rows().targets, 8, device="cuda")
    model = Network().cuda()
    config = HybridTrainingConfig(**{**EVERYTHING, "device": "cuda", "log_interval": 1000})
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, fused=True)
    strict = Strict(len(loader))
    trainer = HybridTrainer(model, loader, config=config, optimizer=optimizer, companions=[strict])
    try:
        trainer.train()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert trainer.status == "completed"
    assert strict.met == 4 * len(loader)
    assert torch.isfinite(weights_of(trainer)).all()
    json.dumps(trainer.get_training_summary())
