"""What a training must remember, so that going on equals never having stopped.

Weights and moments are the smaller part: the generators, the place in the epoch, gradients of a group under
way, and what the epoch has counted so far belong to it as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from scm.training.checkpoint import CheckpointError, check_identity, check_shapes
from scm.training.random_state import OwnRandomState

if TYPE_CHECKING:
    from scm.training.trainer import SCMTrainer

_PLAIN = (
    "current_epoch",
    "global_step",
    "optimizer_steps",
    "status",
    "stop_reason",
    "nan_origin",
    "best_epoch",
    "best_val_loss",
    "_coverage_bad_epochs",
    "_position",
    "_group_count",
    "_group_rows",
    "_group_weight",
)
_HISTORIES = ("train_history", "val_history", "bench_history")


def trainer_state(trainer: SCMTrainer) -> dict[str, Any]:
    """Return everything a checkpoint holds, as tensors and plain values."""
    return {
        "identity": _identity(trainer),
        "model": trainer.model.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "scheduler": None if trainer.scheduler is None else trainer.scheduler.state_dict(),
        "scaler": None if trainer.scaler is None else trainer.scaler.state_dict(),
        "guard": trainer._guard.state_dict(),
        "controllers": {name: held.state_dict() for name, held in trainer.controllers.items()},
        "random": trainer._random.state(),
        "tau_generator": trainer._tau_generator.get_state(),
        "loader": _loader_state(trainer),
        "progress": {name: getattr(trainer, name) for name in _PLAIN},
        "gradients": _gradients(trainer) if trainer._group_count else {},
        "epoch_table": trainer._records.table().cpu(),
        "epoch_facts": trainer._epoch_facts if trainer._companions.begin_epoch else None,
        "thresholds": list(trainer.last_thresholds),
        "histories": {name: list(getattr(trainer, name)) for name in _HISTORIES},
        "nan_counts": dict(trainer.nan_counts),
        "best_state": trainer._best_state,
        "last_state": trainer._last_state,
    }


def put_trainer_state(trainer: SCMTrainer, content: Mapping[str, Any]) -> None:
    """Make the trainer the one that `content` was taken of; nothing is changed when it does not fit."""
    _check(trainer, content)
    _put_loader_state(trainer, content["loader"])  # first, because it may find that the data are others
    trainer.model.load_state_dict(content["model"])
    trainer.optimizer.load_state_dict(content["optimizer"])
    if trainer.scheduler is not None:
        trainer.scheduler.load_state_dict(content["scheduler"])
        if content["progress"]["optimizer_steps"]:
            # Torch warns of a schedule that steps before the optimizer ever did; it did, in another process.
            trainer.optimizer._opt_called = True  # type: ignore[attr-defined]
    if trainer.scaler is not None:
        trainer.scaler.load_state_dict(content["scaler"])
    trainer._guard.load_state_dict(content["guard"])
    for name, held in trainer.controllers.items():
        held.load_state_dict(content["controllers"][name])
    trainer._random.put(content["random"])
    trainer._tau_generator.set_state(content["tau_generator"])
    for name in _PLAIN:
        setattr(trainer, name, content["progress"][name])
    for name in _HISTORIES:
        setattr(trainer, name, list(content["histories"][name]))
    _put_gradients(trainer, content["gradients"])
    trainer._records.load_table(content["epoch_table"].to(trainer.device))
    trainer._epoch_facts = content.get("epoch_facts")
    trainer.last_thresholds.clear()
    trainer.last_thresholds.extend(content["thresholds"])
    trainer.nan_counts = dict(content["nan_counts"])
    trainer._best_state = content["best_state"]
    trainer._last_state = content["last_state"]


def load_model_weights(model: nn.Module, content: Mapping[str, Any]) -> None:
    """Load the weights of a checkpoint into `model`; CheckpointError when they are another model's."""
    check_shapes(content["model"], model.state_dict(), owner="model")
    model.load_state_dict(content["model"])


def _identity(trainer: SCMTrainer) -> dict[str, Any]:
    scheduler = trainer.scheduler
    return {
        **trainer.config.identity(),
        "optimizer": type(trainer.optimizer).__name__,
        "scheduler": None if scheduler is None else type(scheduler).__name__,
        "loader_keeps_its_place": _keeps_its_place(trainer.train_loader),
        "controllers": sorted(trainer.controllers),
    }


def _check(trainer: SCMTrainer, content: Mapping[str, Any]) -> None:
    check_identity(content["identity"], _identity(trainer))
    check_shapes(content["model"], trainer.model.state_dict(), owner="model")
    saved = [len(group["params"]) for group in content["optimizer"]["param_groups"]]
    current = [len(group["params"]) for group in trainer.optimizer.param_groups]
    if saved != current:
        raise CheckpointError(
            f"the checkpoint is of another optimizer: groups of {saved}, now {current} parameters"
        )


def _parameters(trainer: SCMTrainer) -> list[Tensor]:
    return [parameter for group in trainer.optimizer.param_groups for parameter in group["params"]]


def _gradients(trainer: SCMTrainer) -> dict[int, Tensor]:
    held = enumerate(_parameters(trainer))
    return {index: parameter.grad for index, parameter in held if parameter.grad is not None}


def _put_gradients(trainer: SCMTrainer, gradients: Mapping[int, Tensor]) -> None:
    for index, parameter in enumerate(_parameters(trainer)):
        saved = gradients.get(index)
        parameter.grad = None if saved is None else saved.to(parameter.device)


# --- loaders that do not keep their place themselves ------------------------------------------------


def _keeps_its_place(loader: Any) -> bool:
    return hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")


def _loader_state(trainer: SCMTrainer) -> dict[str, Any]:
    loader: Any = trainer.train_loader
    if _keeps_its_place(loader):
        state: dict[str, Any] = loader.state_dict()
        return state
    return trainer._loader_start or _epoch_begin(loader, trainer._random)


def _put_loader_state(trainer: SCMTrainer, state: dict[str, Any]) -> None:
    loader: Any = trainer.train_loader
    if not _keeps_its_place(loader):
        trainer._loader_start = state
        return
    try:
        loader.load_state_dict(state)
    except ValueError as error:
        raise CheckpointError(f"the checkpoint is of other data: {error}") from error


def _epoch_begin(loader: Iterable[Any], random: OwnRandomState) -> dict[str, Any]:
    """Return what the order of an epoch that begins now would come from."""
    return {"random": random.state(), "generators": [held.get_state() for held in _generators(loader)]}


def replayed(
    loader: Iterable[Any], random: OwnRandomState, start: dict[str, Any] | None, position: int
) -> tuple[dict[str, Any], Iterator[Any]]:
    """Iterate over a loader from batch `position` of an epoch; also return what the epoch began with.

    An epoch under way is begun again from the generators' states at its `start`, and the batches that were
    trained are read and passed over, so that a shuffling DataLoader gives the same order and the rows that
    were left. Raises CheckpointError when the loader has fewer batches.
    """
    if start is None:
        return _epoch_begin(loader, random), iter(loader)
    generators = _generators(loader)
    if len(start["generators"]) != len(generators):
        saved = len(start["generators"])
        raise CheckpointError(f"the loader must have {saved} generators as saved, got {len(generators)}")
    for held, state in zip(generators, start["generators"], strict=True):
        held.set_state(state.cpu())
    now = random.state()
    if position:
        random.put(start["random"])
    iterator = iter(loader)
    for read in range(position):
        if next(iterator, None) is None:
            raise CheckpointError(
                f"the loader ended after {read} batches, the saved epoch had reached {position}"
            )
    if position:
        random.put(now)
    return start, iterator


def _generators(loader: Any) -> list[torch.Generator]:
    """Return the generators that a DataLoader's order comes from, each once."""
    sampler = getattr(loader, "sampler", None)
    batch_sampler = getattr(loader, "batch_sampler", None)
    owners = (loader, sampler, batch_sampler, getattr(batch_sampler, "sampler", None))
    found: dict[int, torch.Generator] = {}
    for owner in owners:
        held = getattr(owner, "generator", None)
        if isinstance(held, torch.Generator):
            found[id(held)] = held
    return list(found.values())
