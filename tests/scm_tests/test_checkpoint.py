"""Checkpoints: what follows one equals what would have followed, and what is no checkpoint is refused."""

from __future__ import annotations

import copy
import os
import random
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from scm.losses.training import LossConfig, SCMTrainingLoss
from scm.training import checkpoint as checkpoint_module
from scm.training.checkpoint import CheckpointError, read_checkpoint, write_checkpoint
from scm.training.loader import TensorBatches
from scm.training.objective import ProjectiveObjective
from scm.training.sampler import AdaptiveSampler, AdaptiveSamplerConfig
from scm.training.targets import lift_semantic_targets
from scm.training.trainer import SCMTrainer, TrainingConfig

ROWS, BATCH = 22, 4  # six micro-batches an epoch, the last one short
EPOCHS = 3


class Head(nn.Module):
    """A head with everything that has state: weights, batch statistics, dropout."""

    def __init__(self, hidden: int = 5, dropout: float = 0.2) -> None:
        super().__init__()
        self.first = nn.Linear(2, hidden)
        self.norm = nn.BatchNorm1d(hidden)
        self.dropout = nn.Dropout(dropout)
        self.last = nn.Linear(hidden, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        P, Q = self.last(self.dropout(torch.relu(self.norm(self.first(x))))).unbind(-1)
        return P, Q


class InterruptedTrainingError(Exception):
    """The process was killed, so to say."""


OPTIMIZERS: dict[str, Any] = {
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2),
    "fused adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "nesterov": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.5),
}
SCHEDULERS: dict[str, Any] = {
    "none": (None, "per_optimizer_update"),
    "cosine": (lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 20), "per_optimizer_update"),
    "exponential": (lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.7), "per_epoch"),
    "plateau": (lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0), "per_validation_metric"),
}


class NoisyRows(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """Rows that are disturbed by all three global generators when they are read."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        noise = random.random() + float(np.random.rand()) + torch.rand(()).item()
        return self.x[row] + 0.1 * noise, self.y[row]


LOADERS = ("resident", "adaptive", "list", "own generator", "global generator")


def make_rows() -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, values, and statuses of which some are bottoms, missing and faults."""
    drawn = torch.Generator().manual_seed(2)
    x = torch.randn(ROWS, 2, generator=drawn)
    codes = torch.randint(0, 7, (ROWS,), generator=drawn) * (torch.rand(ROWS, generator=drawn) < 0.3)
    return x, x.sum(1), codes


def make_loader(kind: str) -> Any:
    """Train batches: resident, a plain list, or a shuffling DataLoader with or without its own generator."""
    x, y, codes = make_rows()
    if kind == "resident":
        order = torch.Generator().manual_seed(7)
        return TensorBatches(x, lift_semantic_targets(y, codes), BATCH, generator=order)
    if kind == "adaptive":
        sampler = AdaptiveSampler(
            torch.utils.data.TensorDataset(x, y), AdaptiveSamplerConfig(batch_size=BATCH)
        )
        sampler.update(torch.linspace(0, 1, ROWS))
        return sampler
    if kind == "list":
        return [(a, b) for a, b in zip(x.split(BATCH), y.split(BATCH), strict=True)]
    own = torch.Generator().manual_seed(7) if kind == "own generator" else None
    return torch.utils.data.DataLoader(NoisyRows(x, y), batch_size=BATCH, shuffle=True, generator=own)


def make_trainer(settings: dict[str, Any], **fields: Any) -> SCMTrainer:
    """The trainer that `settings` describe, as a fresh process would build it."""
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    model = Head()
    optimizer = OPTIMIZERS[settings["optimizer"]](model.parameters())
    make_scheduler, cadence = SCHEDULERS[settings["scheduler"]]
    x, y, codes = make_rows()
    config = TrainingConfig(
        **{
            "max_epochs": EPOCHS,
            "gradient_accumulation_steps": settings["accumulation"],
            "mixed_precision": settings["amp"],
            "tau_train_min": 1e-3,
            "tau_train_max": 0.2,
            "gradient_policy": settings["policy"],
            "coverage_threshold": 0.0,
            "scheduler_cadence": cadence,
            "val_loader": [(x, lift_semantic_targets(y, codes))],
            "seed": settings["seed"],
            "clip_norm": 1.0,
            "restore_best": True,
            **fields,
        }
    )
    stack = SCMTrainingLoss(LossConfig(coverage_term="soft", lambda_push_up=0.1))
    return SCMTrainer(
        model,
        optimizer,
        ProjectiveObjective(stack),
        make_loader(settings["loader"]),
        scheduler=None if make_scheduler is None else make_scheduler(optimizer),
        config=config,
    )


def state_of(trainer: SCMTrainer) -> dict[str, Any]:
    """Everything that must agree, bit for bit."""
    return {
        "model": trainer.model.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "scheduler": trainer.scheduler and trainer.scheduler.state_dict(),
        "train": trainer.train_history,
        "val": trainer.val_history,
        "thresholds": list(trainer.last_thresholds),
        "counts": (trainer.nan_counts, trainer.optimizer_steps, trainer.global_step, trainer.current_epoch),
        "status": (trainer.status, trainer.best_epoch, trainer.best_val_loss),
        "random": trainer._random.state(),
    }


def assert_equal(one: Any, other: Any, where: str = "") -> None:
    """Equal in structure, values and bits."""
    if isinstance(one, Tensor):
        assert torch.equal(one.nan_to_num(7.25), other.nan_to_num(7.25)), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for name in one:
            assert_equal(one[name], other[name], f"{where}.{name}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for index, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_equal(a, b, f"{where}[{index}]")
    else:
        assert one == other or (one != one and other != other), (where, one, other)


def train_to_the_end(trainer: SCMTrainer) -> dict[str, Any]:
    trainer.fit()
    return state_of(trainer)


def train_interrupted(settings: dict[str, Any], path: Path, after: int) -> dict[str, Any]:
    """Save after `after` micro-batches, be killed, and go on in what might be another process."""
    done = 0

    def interrupt(record: Any) -> None:
        nonlocal done
        done += record["phase"] == "train"
        if done == after:
            trainer.save_checkpoint(path)
            raise InterruptedTrainingError

    trainer = make_trainer(settings, log_hook=interrupt)
    with pytest.raises(InterruptedTrainingError):
        trainer.fit()
    resumed = make_trainer(settings)
    torch.rand(100)  # another process will not have drawn the same
    resumed.load_checkpoint(path)
    return train_to_the_end(resumed)


DEFAULTS: dict[str, Any] = {
    "optimizer": "adam",
    "scheduler": "exponential",
    "accumulation": 2,
    "amp": False,
    "policy": None,
    "loader": "resident",
    "seed": 5,
}

CHOICES = st.fixed_dictionaries(
    {
        "optimizer": st.sampled_from(sorted(OPTIMIZERS)),
        "scheduler": st.sampled_from(sorted(SCHEDULERS)),
        "accumulation": st.sampled_from([1, 2, 4]),
        "amp": st.booleans(),
        "policy": st.sampled_from([None, "clamp", "project", "reject", "pass"]),
        "loader": st.sampled_from(sorted(LOADERS)),
        "seed": st.sampled_from([None, 5]),
    }
)
AFTER = st.integers(1, 6 * EPOCHS)


def check_resumption(choices: dict[str, Any], after: int, folder: Path) -> None:
    """After any micro-batch, in mid-epoch and mid-group too: the same bits in the end."""
    expected = train_to_the_end(make_trainer(choices))
    assert_equal(train_interrupted(choices, folder / "c.pt", after), expected)


@example(choices={**DEFAULTS, "loader": "adaptive"}, after=9)
@example(choices={**DEFAULTS, "accumulation": 1}, after=6)  # nothing is left of the epoch but its end
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(choices=CHOICES, after=AFTER)
def test_interrupted_and_resumed_equals_uninterrupted(
    choices: dict[str, Any], after: int, tmp_path: Path
) -> None:
    """A few of the many combinations of what has state."""
    check_resumption(choices, after, tmp_path)


@pytest.mark.slow
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(choices=CHOICES, after=AFTER)
def test_interrupted_and_resumed_equals_uninterrupted_widely(
    choices: dict[str, Any], after: int, tmp_path: Path
) -> None:
    """Many combinations of what has state."""
    check_resumption(choices, after, tmp_path)


@pytest.mark.parametrize("loader", sorted(LOADERS))
@pytest.mark.parametrize("seed", [None, 5])
def test_every_epoch_may_be_the_last_before_a_pause(loader: str, seed: int | None, tmp_path: Path) -> None:
    """Saved between epochs, each epoch by a trainer of its own: the same bits in the end."""
    choices = {**DEFAULTS, "loader": loader, "seed": seed}
    expected = train_to_the_end(make_trainer(choices))
    path = tmp_path / "c.pt"
    first = make_trainer(choices)
    next(first.epochs())
    first.save_checkpoint(path)
    for _ in range(EPOCHS - 1):
        trainer = make_trainer(choices)
        trainer.load_checkpoint(path)
        next(trainer.epochs())
        trainer.save_checkpoint(path)
    assert_equal(state_of(trainer), expected)


def test_a_training_may_be_extended(tmp_path: Path) -> None:
    """Two epochs, saved, and one more by a larger max_epochs equal three at once, without a warning."""
    expected = train_to_the_end(make_trainer(DEFAULTS))
    short = make_trainer(DEFAULTS, max_epochs=2)
    short.fit()
    short.save_checkpoint(tmp_path / "c.pt")
    longer = make_trainer(DEFAULTS)
    longer.load_checkpoint(tmp_path / "c.pt")
    assert_equal(train_to_the_end(longer), expected)


def test_what_has_stopped_stays_stopped(tmp_path: Path) -> None:
    """A training that ended for its coverage does not go on because it was loaded."""
    tau = {"tau_infer": 5.0, "tau_train_min": 5.0, "tau_train_max": 5.0}
    fields: dict[str, Any] = {"coverage_threshold": 1.0, "coverage_patience": 1, **tau}
    trainer = make_trainer(DEFAULTS, **fields)
    trainer.fit()
    assert trainer.status == "stopped"
    trainer.save_checkpoint(tmp_path / "c.pt")
    loaded = make_trainer(DEFAULTS, **fields)
    loaded.load_checkpoint(tmp_path / "c.pt")
    assert loaded.status == "stopped"
    assert loaded.fit() == []


def test_controllers_are_part_of_a_checkpoint(tmp_path: Path) -> None:
    """What is registered with state_dict and load_state_dict is saved and comes back."""

    class Controller:
        def __init__(self, value: float) -> None:
            self.value = value

        def state_dict(self) -> dict[str, float]:
            return {"value": self.value}

        def load_state_dict(self, state: dict[str, float]) -> None:
            self.value = state["value"]

    saved, loaded = make_trainer(DEFAULTS), make_trainer(DEFAULTS)
    saved.controllers["lambda"], loaded.controllers["lambda"] = Controller(3.5), Controller(0.0)
    saved.save_checkpoint(tmp_path / "c.pt")
    loaded.load_checkpoint(tmp_path / "c.pt")
    assert loaded.controllers["lambda"].value == 3.5
    with pytest.raises(CheckpointError, match="controllers"):
        make_trainer(DEFAULTS).load_checkpoint(tmp_path / "c.pt")


# --- what is refused -----------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint of an epoch of DEFAULTS."""
    trainer = make_trainer(DEFAULTS)
    next(trainer.epochs())
    trainer.save_checkpoint(tmp_path / "c.pt")
    return tmp_path / "c.pt"


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    """FileNotFoundError, with the path."""
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*absent\.pt"):
        make_trainer(DEFAULTS).load_checkpoint(tmp_path / "absent.pt")


@pytest.mark.parametrize("kept", [0, 10, 1000, -20], ids=["empty", "stub", "cut early", "cut late"])
def test_a_truncated_file_is_refused(saved: Path, kept: int) -> None:
    """Half a checkpoint is no checkpoint."""
    content = saved.read_bytes()
    saved.write_bytes(content[:kept])
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        make_trainer(DEFAULTS).load_checkpoint(saved)


@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.9])
def test_a_flipped_bit_is_refused(saved: Path, share: float) -> None:
    """A checkpoint is what was written, or an error: weights that a disk has changed are not trained on."""
    content = bytearray(saved.read_bytes())
    with zipfile.ZipFile(saved) as archive:
        members = [info for info in archive.infolist() if info.file_size]
    member = members[int(share * len(members))]
    place = content.index(zipfile.ZipFile(saved).read(member), member.header_offset)
    content[place] ^= 1
    saved.write_bytes(content)
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        make_trainer(DEFAULTS).load_checkpoint(saved)


def test_a_damaged_table_of_contents_is_refused(saved: Path) -> None:
    """Whichever of its bytes is changed, where there is an error it is a CheckpointError."""
    content = saved.read_bytes()
    refused = 0
    for place in range(content.index(b"PK\x01\x02"), len(content), 7):
        changed = bytearray(content)
        changed[place] ^= 0x08
        saved.write_bytes(changed)
        try:
            read_checkpoint(saved)
        except CheckpointError:
            refused += 1
    assert refused > 100


def test_a_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    """Objects other than tensors and plain values are not unpickled."""
    torch.save({"schema_name": checkpoint_module.SCHEMA_NAME, "model": Head()}, tmp_path / "c.pt")
    with pytest.raises(CheckpointError, match="cannot be read"):
        make_trainer(DEFAULTS).load_checkpoint(tmp_path / "c.pt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"weights": torch.zeros(2)}, "must be of scm.training.checkpoint, got None"),
        ([1, 2], "must be of scm.training.checkpoint, got 'list'"),
        (
            {"schema_name": "scm.training.checkpoint", "schema_version": 99},
            "must have schema_version 1, got 99",
        ),
    ],
    ids=["kind", "list", "version"],
)
def test_another_kind_of_file_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    """Kind and version are checked before anything is used."""
    torch.save(content, tmp_path / "c.pt")
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(tmp_path / "c.pt")


def test_another_config_is_refused_by_its_fields(saved: Path) -> None:
    """Every differing field is named with both values; nothing has been loaded."""
    other = make_trainer({**DEFAULTS, "accumulation": 4, "optimizer": "rmsprop"}, clip_norm=2.0)
    before = copy.deepcopy(state_of(other))
    message = (
        r"clip_norm \(saved 1.0, now 2.0\), gradient_accumulation_steps \(saved 2, now 4\), optimizer \("
    )
    with pytest.raises(CheckpointError, match=message):
        other.load_checkpoint(saved)
    assert_equal(state_of(other), before)


def test_other_shapes_are_refused_by_name(saved: Path) -> None:
    """The tensors that do not fit are named."""
    trainer = make_trainer(DEFAULTS)
    trainer.model.last = nn.Linear(5, 3)
    trainer.model.extra = nn.Linear(1, 1)
    message = (
        r"another model: missing extra.bias, extra.weight; other shapes: last.weight \(saved \(2, 5\), now"
    )
    with pytest.raises(CheckpointError, match=message):
        trainer.load_checkpoint(saved)


def test_other_data_are_refused(saved: Path) -> None:
    """A place in an epoch of other batches would be no place."""
    trainer = make_trainer(DEFAULTS)
    x, y, codes = make_rows()
    order = torch.Generator()
    trainer.train_loader = TensorBatches(x, lift_semantic_targets(y, codes), BATCH + 1, generator=order)
    before = copy.deepcopy(state_of(trainer))
    with pytest.raises(CheckpointError, match="of other data: batch_size must be as saved"):
        trainer.load_checkpoint(saved)
    assert_equal(state_of(trainer), before)


def test_a_loader_with_fewer_batches_is_refused(tmp_path: Path) -> None:
    """Replaying an epoch to a place that does not exist is an error, not a short epoch."""
    choices = {**DEFAULTS, "loader": "list"}
    trainer = make_trainer(choices, log_hook=lambda _: trainer.save_checkpoint(tmp_path / "c.pt"))
    trainer._train_epoch(0, trainer._facts(0))
    shorter = make_trainer(choices)
    shorter.train_loader = shorter.train_loader[:2]
    shorter.load_checkpoint(tmp_path / "c.pt")
    with pytest.raises(CheckpointError, match="ended after 2 batches"):
        shorter.fit()


# --- writing -------------------------------------------------------------------------------------


def test_a_failed_write_leaves_the_old_checkpoint(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is replaced whole or not at all, and nothing is left beside it."""
    before = saved.read_bytes()

    def fail(content: Any, file: Any) -> None:
        file.write(b"half of it")
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoint_module.torch, "save", fail)
    with pytest.raises(OSError, match="no space left"):
        write_checkpoint(saved, {})
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


_SAVE_FOR_EVER = """
import sys, torch
from scm.training.checkpoint import write_checkpoint
print("ready", flush=True)
for number in range(10**9):
    write_checkpoint(sys.argv[1], {"numbers": torch.full((200_000,), float(number))})
"""


def test_a_kill_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    """Killed while it writes without end, a process leaves the last checkpoint whole."""
    path = tmp_path / "c.pt"
    with subprocess.Popen(
        [sys.executable, "-c", _SAVE_FOR_EVER, str(path)], stdout=subprocess.PIPE, env={**os.environ}
    ) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"ready\n"
        deadline = time.monotonic() + 30
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.2)
        writer.send_signal(signal.SIGKILL)
    numbers = read_checkpoint(path)["numbers"]
    assert len(numbers) == 200_000
    assert bool((numbers == numbers[0]).all())


def test_the_weights_alone_may_be_loaded(saved: Path) -> None:
    """load_model_state takes weights, and nothing of the training."""
    trainer = make_trainer(DEFAULTS, clip_norm=None)
    trainer.load_model_state(saved)
    assert_equal(trainer.model.state_dict(), read_checkpoint(saved)["model"])
    assert trainer.current_epoch == 0


@pytest.fixture(autouse=True)
def _global_generators() -> Iterator[None]:
    states = (torch.get_rng_state(), np.random.get_state(), random.getstate())
    yield
    torch.set_rng_state(states[0])
    np.random.set_state(states[1])
    random.setstate(states[2])
