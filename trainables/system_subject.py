"""The training system as a subject of laws: controllers, packs, micro-batches, resumed trainings, all tiny.

What must hold of them is decided in `harness.robustness.training_laws`; here is only how each is called, so
that another implementation, or one with a planted defect, can stand in its place.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scm.data import Split
from scm.models import make_model
from scm.packed import PackedTrainer, PackTrial
from scm.packed.traced import Programs
from scm.seeding import seeded_init
from scm.training.adaptive_loss import AdaptiveLambda, AdaptiveLossConfig
from scm.training.objective import as_trainer_loss
from scm.training.targets import lift_semantic_targets
from scm.trial import make_trainer, make_training_loss
from scm.trial_config import TrialConfig

Weights = dict[str, Tensor]

ROWS = 10
INPUTS = 3
TRAINING_EPOCHS = 4
TRAINING_BATCHES = 3  # of an epoch of `Training`, the last one short
SPOILED = 1000
"""Added to the seed of a trial of a pack, it gives it the same data with one row that is not a number."""

_SMALL: dict[str, Any] = {"hidden_width": 4, "hidden_depth": 1, "tuple_norm": "unit"}
_PROGRAMS: Programs = {}  # what one pack traces, the next of its kind need not


def make_controller(settings: Mapping[str, Any]) -> AdaptiveLambda:
    """A multiplier that follows the coverage; settings are fields of `AdaptiveLossConfig`."""
    return AdaptiveLambda(AdaptiveLossConfig(**settings))


# --- packs ----------------------------------------------------------------------------------------------


def train_pack(members: Sequence[Mapping[str, Any]]) -> list[Weights]:
    """Train members as one pack, and return the weights that each ended with.

    A member is {"seed", "config"}; configs are of one shape. See `SPOILED`.
    """
    trials = [
        PackTrial(_pack_config(member), member["seed"], str(place)) for place, member in enumerate(members)
    ]
    # Not as machine code: its compilation would take a second for each kind of pack.
    pack = PackedTrainer(trials, _build, _splits_of, programs=_PROGRAMS, native=False)
    ended: dict[str, Weights] = {}
    for _ in pack.epochs():
        for key, lane in zip(pack.keys, pack.lanes, strict=True):
            if lane.status != "running":  # it leaves when the next epoch begins
                held = pack.model_of(key).state_dict()
                ended[key] = {name: item.detach().clone() for name, item in held.items()}
    return [ended[trial.key] for trial in trials]


def train_alone(member: Mapping[str, Any]) -> Weights:
    """Train one member of `train_pack` by itself."""
    config = _pack_config(member)
    trainer = make_trainer(
        config, member["seed"], lambda: _build(config), _splits_of(member["seed"])["train"], None
    )
    trainer.fit()
    return {name: item.detach().clone() for name, item in trainer.model.state_dict().items()}


def _pack_config(member: Mapping[str, Any]) -> TrialConfig:
    return TrialConfig(**{**_SMALL, "batch_size": 4, "max_epochs": 2, **member["config"]})


def _build(config: TrialConfig) -> nn.Module:
    return make_model(config, INPUTS)


def _splits_of(seed: int) -> Mapping[str, Split]:
    inputs, values, statuses = _rows(seed % SPOILED)
    if seed >= SPOILED:
        inputs[1, 0] = math.nan
    return {"train": Split(inputs, lift_semantic_targets(values, statuses))}


def _rows(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, values and statuses; every fifth row has no value."""
    source = torch.Generator().manual_seed(seed)
    inputs = torch.randn(ROWS, INPUTS, generator=source, dtype=torch.float64)
    statuses = torch.tensor([0, 0, 3, 0, 0]).repeat(ROWS // 5)
    return inputs, inputs.sum(1), statuses


# --- micro-batches --------------------------------------------------------------------------------------


def batch_gradient(seed: int, rows: Sequence[int]) -> Tensor:
    """The gradient of the loss on some of `ROWS` rows, all parameters in one row of numbers, in float64."""
    config = TrialConfig(**_SMALL, dtype="float64", lambda_rej=0.0)
    with seeded_init(seed, "init"):
        model = _build(config).to(torch.float64)
    split = _answerable(seed)
    chosen = torch.tensor(list(rows))
    targets = split.targets.Y_n[chosen], split.targets.Y_d[chosen]
    loss = as_trainer_loss(make_training_loss(config))(
        model(split.inputs[chosen]), targets, tau=config.tau_train_min
    )
    assert isinstance(loss, Tensor)
    parts = torch.autograd.grad(loss, list(model.parameters()))
    return torch.cat([part.reshape(-1) for part in parts])


def train_in_micro_batches(seed: int, batch_size: int, config: Mapping[str, Any]) -> Weights:
    """Train with one optimizer step an epoch, its `ROWS` rows in micro-batches of some size, in float64."""
    settings = TrialConfig(
        **{
            **_SMALL,
            "dtype": "float64",
            "lambda_rej": 0.0,  # the coverage term is no mean over rows
            "batch_size": batch_size,
            "gradient_accumulation_steps": math.ceil(ROWS / batch_size),
            **config,
        }
    )
    trainer = make_trainer(settings, seed, lambda: _build(settings), _answerable(seed), None)
    trainer.fit()
    return {name: item.detach().clone() for name, item in trainer.model.state_dict().items()}


def _answerable(seed: int) -> Split:
    """Rows that all have a value: where some have none, no term is a mean over rows."""
    inputs, values, _ = _rows(seed)
    return Split(inputs, lift_semantic_targets(values, torch.zeros(ROWS, dtype=torch.int64)))


# --- resumed trainings ----------------------------------------------------------------------------------


class KilledError(Exception):
    """The process was killed, so to say."""


TRAININGS: dict[str, dict[str, Any]] = {
    "adam": {"optimizer": "adam", "lr_schedule": "cosine"},
    "accumulated": {"optimizer": "sgd", "momentum": 0.9, "gradient_accumulation_steps": 2},
    "controlled": {
        "optimizer": "rmsprop",
        "lr_schedule": "linear",
        "coverage_control": "unbiased",
        "coverage_term": "ranked",
        "control_warmup_steps": 1,
        "control_momentum": 0.5,
    },
    "near_pole": {"optimizer": "adamw", "sampling": "near_pole", "loss_ramp_epochs": 3},
}
"""Trainings by what has a state in them; all draw thresholds, an order of rows, and dropout."""


class Training:
    """A small training of `TRAINING_EPOCHS` epochs, as a new process makes it; `kind` is of `TRAININGS`."""

    def __init__(self, kind: str) -> None:
        config = TrialConfig(
            **{
                "hidden_width": 4,
                "learning_rate": 0.01,
                "batch_size": 4,
                "max_epochs": TRAINING_EPOCHS,
                "tau_train_min": 1e-3,
                "tau_train_max": 0.2,
                **TRAININGS[kind],
            }
        )
        inputs, values, statuses = _rows(3)
        split = Split(inputs, lift_semantic_targets(values, statuses))
        self._hook: Callable[[int], None] = lambda step: None
        self._trainer = make_trainer(config, 0, _DropoutHead, split, split, log_hook=self._heard)

    @property
    def epochs(self) -> int:
        """How many epochs are done."""
        return self._trainer.current_epoch

    @property
    def in_epoch(self) -> bool:
        """Whether an epoch was begun and not ended."""
        return self._trainer._position > 0

    def epoch(
        self, *, save_at: int | None = None, path: Path | None = None, kill_at: int | None = None
    ) -> int:
        """Train to the end of the epoch under way, if any is left; return the micro-batches trained.

        save_at: write a checkpoint to `path` after so many of the micro-batches that are left of it; kill_at:
        raise `KilledError` there.
        """
        heard = 0

        def hook(step: int) -> None:
            nonlocal heard
            heard += 1
            if heard == save_at:
                assert path is not None
                self.save(path)
            if heard == kill_at:
                raise KilledError(f"after {heard} micro-batches")

        self._hook = hook
        try:
            next(self._trainer.epochs(), None)
        finally:
            self._hook = lambda step: None
        return heard

    def save(self, path: Path) -> None:
        """Write a checkpoint."""
        self._trainer.save_checkpoint(path)

    def load(self, path: Path) -> None:
        """Take up a checkpoint."""
        self._trainer.load_checkpoint(path)

    def state(self) -> dict[str, Any]:
        """What the training came to so far, as tensors and plain values."""
        trainer = self._trainer
        weights = {f"model.{name}": item.clone() for name, item in trainer.model.state_dict().items()}
        return {
            **weights,
            "train_history": copy.deepcopy(trainer.train_history),
            "val_history": copy.deepcopy(trainer.val_history),
            "thresholds": list(trainer.last_thresholds),
            "learning_rate": trainer.optimizer.param_groups[0]["lr"],
            "status": trainer.status,
            "telemetry": dict(trainer.telemetry()),
        }

    def _heard(self, record: Mapping[str, Any]) -> None:
        if record.get("phase") == "train":
            self._hook(int(record["step"]))


class _DropoutHead(nn.Module):
    """A model with everything that has a state: weights, batch statistics, dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(INPUTS, 4)
        self.norm = nn.BatchNorm1d(4)
        self.dropout = nn.Dropout(0.2)
        self.last = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        P, Q = self.last(self.dropout(torch.relu(self.norm(self.first(x))))).unbind(-1)
        return P, Q
