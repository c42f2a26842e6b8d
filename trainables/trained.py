"""A trained model with what it was trained on, made from configs, written to a file and read from one.

The file runs nothing when it is read: it names its task, and holds weights and plain values. What is asked of
a trained model is decided elsewhere.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from scm.data import Split
from scm.seeding import seeded_init
from scm.training.checkpoint import CheckpointError, check_shapes, read_checkpoint, write_checkpoint
from scm.trial import DTYPES
from scm.trial_config import TrialConfig
from trainables.configs import resolve_config
from trainables.loading import load_task
from trainables.packed_trial import Member, PackRun, Shelf
from trainables.tasks.protocol import Task

_KIND = "trained"


@dataclass(frozen=True, eq=False)
class Trained:
    """A model at the end of its trial, in eval mode, and everything that it came from.

    spec: {"name", "params", "base_dir"} of the task. config: flat, every default filled in. outcome: of the
    trial that trained it, empty where that is not known.
    """

    spec: Mapping[str, Any]
    task: Task
    splits: Mapping[str, Split]
    data_digest: str
    config: Mapping[str, Any]
    seed: int
    model: nn.Module
    outcome: Mapping[str, Any]

    @property
    def settings(self) -> TrialConfig:
        """The config as the training takes it."""
        return TrialConfig.from_flat(self.config)

    @property
    def digest(self) -> str:
        """16 hex characters, equal for equal weights of models of one form."""
        hashed = hashlib.sha256()
        for name, tensor in self.model.state_dict().items():
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            hashed.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
            hashed.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
        return hashed.hexdigest()[:16]


def train_models(
    spec: Mapping[str, Any],
    trials: Sequence[tuple[str, Mapping[str, Any], int]],
    *,
    device: str = "cpu",
    on_epoch: Callable[[], None] = lambda: None,
    deal: Callable[[Mapping[str, Split], int], Mapping[str, Split]] | None = None,
    shelf: Shelf | None = None,
) -> dict[str, Trained | Mapping[str, Any]]:
    """Train (trial_id, config, seed), as packs where they can be, and return models by trial_id.

    A trial that failed (its task raised) is there with its outcome alone. `deal` makes the splits that a
    seed's trials have from those of the task; `data_digest` is that of the task's. `shelf`: kept by a caller
    that trains the same task again and again.
    """
    loaded: dict[int, Any] = {}

    def load(seed: int) -> tuple[Task, Mapping[str, Split]]:
        if seed not in loaded:
            held = load_task(spec, seed)
            loaded[seed] = held if deal is None else replace(held, splits=deal(held.splits, seed))
        return loaded[seed].task, loaded[seed].splits

    members = [Member(trial_id, config, seed) for trial_id, config, seed in trials]
    by_id = {member.trial_id: member for member in members}
    ended: dict[str, Trained | Mapping[str, Any]] = {}
    run = PackRun(members, load, device, shelf=shelf, keep_models=True)
    while not run.done:
        for told in run.step():
            on_epoch()
            if told.outcome is None:
                continue
            member = by_id[told.trial_id]
            if told.model is None or told.outcome["status"] == "failed":
                ended[told.trial_id] = told.outcome
                continue
            held = loaded[member.seed]
            ended[told.trial_id] = Trained(
                spec=spec,
                task=held.task,
                splits=held.splits,
                data_digest=held.data_digest,
                config=resolve_config(member.config),
                seed=member.seed,
                model=told.model.eval(),
                outcome=told.outcome,
            )
    return ended


def write_trained(trained: Trained, path: str | os.PathLike[str]) -> None:
    """Write a trained model to a file, whole or not at all."""
    content = {
        "spec": json.dumps(dict(trained.spec), default=str),
        "config": dict(trained.config),
        "seed": trained.seed,
        "data_digest": trained.data_digest,
        "model": {name: item.detach().cpu() for name, item in trained.model.state_dict().items()},
    }
    write_checkpoint(path, {_KIND: content})


def read_trained(path: str | os.PathLike[str], device: str = "cpu") -> Trained:
    """Read what `write_trained` wrote, with its task and data loaded anew.

    Raises FileNotFoundError, CheckpointError for a file that is damaged, of another kind, or whose weights do
    not fit the model that its task builds now, and whatever the task raises.
    """
    content = read_checkpoint(path)
    if not isinstance(content.get(_KIND), dict):
        raise CheckpointError(
            f"checkpoint {path} must be of a trained model, got that of a training under way"
        )
    held = content[_KIND]
    spec = json.loads(held["spec"])
    return make_trained(spec, held["config"], held["seed"], held["model"], device=device)


def read_weights(path: str | os.PathLike[str]) -> Mapping[str, torch.Tensor]:
    """The weights in a file of `write_trained` or of a trainer; CheckpointError for any other."""
    content = read_checkpoint(path)
    held = content.get(_KIND, content)
    weights = held.get("model") if isinstance(held, dict) else None
    if not isinstance(weights, dict):
        raise CheckpointError(f"checkpoint {path} must hold a model's weights, got {sorted(content)}")
    return weights


def make_trained(
    spec: Mapping[str, Any],
    config: Mapping[str, Any],
    seed: int,
    weights: Mapping[str, torch.Tensor],
    *,
    device: str = "cpu",
) -> Trained:
    """Build the model of a task and config with these weights; CheckpointError where they do not fit."""
    loaded = load_task(spec, seed)
    resolved = resolve_config(config)
    settings = TrialConfig.from_flat(resolved)
    with seeded_init(seed, "init"):
        model = loaded.task.build_model(settings).to(DTYPES[settings.dtype])
    check_shapes(weights, model.state_dict(), owner="model")
    model.load_state_dict(dict(weights))
    return Trained(
        spec=spec,
        task=loaded.task,
        splits=loaded.splits,
        data_digest=loaded.data_digest,
        config=resolved,
        seed=seed,
        model=model.to(device).eval(),
        outcome={},
    )
