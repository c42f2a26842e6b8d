"""What a task is: the few methods that a trial calls, and the errors that bad data raise.

Which tasks exist is decided in `trainables.tasks.registry`; how a trial uses one, in `trainables.trial`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from numbers import Real
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor, nn

    from scm.data import Split
    from scm.guards.symmetry import Symmetry
    from scm.losses.terms import LossTerms
    from scm.trial import Decoded
    from scm.trial_config import TrialConfig

# As `Task.make_loss` says.
LossFn = Callable[..., "Tensor | LossTerms"]

SPLIT_NAMES: tuple[str, ...] = ("train", "val", "test")
REQUIRED_METRICS: tuple[str, ...] = ("accepted_error", "charged_error")

# What a message says is missing from an object that is no task yet.
_METHODS: dict[str, str] = {
    "splits": "splits(seed)",
    "build_model": "build_model(config)",
    "make_loss": "make_loss(config)",
    "metrics": "metrics(decoded, split, config)",
}
_TEXTS: tuple[str, ...] = ("name", "error_unit")


class TaskError(ValueError):
    """A task, its parameters or its data break a stated rule; the message is one line for the user."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class Task(Protocol):
    """One learning problem: data splits, a model builder, a loss, and metrics in the target's unit.

    A task is deterministic: the same seed gives the same splits, and nothing that a trial does with a task
    changes what the next trial gets from it (one task object serves many trials of one process).

    It may also have a method ``symmetries()``, which maps names to `scm.guards.symmetry.Symmetry`: what may
    be done to inputs with a known effect on the right answers. `lambda_equivariance` needs it.

    And a method ``pack_metrics(decoded, split, configs)``, which scores many trials at once: every tensor of
    `decoded` has the trials before the rows, `configs` is theirs, and it returns a list of what `metrics`
    would return for each. Without it, `metrics` is called trial by trial, which in a pack of small models
    may take longer than the training.
    """

    name: str
    error_unit: str

    def splits(self, seed: int) -> Mapping[str, Split]:
        """Give the splits "train", "val" and "test", disjoint, for the trials of this seed."""
        ...

    def build_model(self, config: TrialConfig) -> nn.Module:
        """Build a fresh model that maps inputs (B, ...) to a tuple (P, Q); drawn from the global generator,
        which the trainer has seeded."""
        ...

    def make_loss(self, config: TrialConfig) -> LossFn | None:
        """Give a loss, or None to take the one that the config describes.

        The loss is called as loss(outputs, (Y_n, Y_d), **facts) and returns a 0-d tensor; of the facts tau,
        inputs, targets, semantic_targets, loss_weights, epoch and global_step it is told those that its
        signature names. `scm.trial.make_training_loss(config, fit)` changes the fit term alone.
        """
        ...

    def metrics(self, decoded: Decoded, split: Split, config: TrialConfig) -> dict[str, float]:
        """Score decoded answers against a split, in target units; holds at least `REQUIRED_METRICS`."""
        ...


def check_task(task: object, where: str) -> None:
    """Raise `TaskError` naming the first thing that `task` lacks to be a `Task`; `where` names the task.

    >>> check_task(object(), "my_module:thing")
    Traceback (most recent call last):
    trainables.tasks.protocol.TaskError: my_module:thing is no task: it lacks the text attribute 'name'
    """
    for text in _TEXTS:
        if not isinstance(getattr(task, text, None), str):
            raise TaskError(f"{where} is no task: it lacks the text attribute {text!r}")
    for method, usage in _METHODS.items():
        if not callable(getattr(task, method, None)):
            raise TaskError(f"{where} is no task: it lacks the method {usage}")


def task_symmetries(task: object) -> Mapping[str, Symmetry] | None:
    """Give what the task's `symmetries()` does, None where it has none; `TaskError` for anything else."""
    method = getattr(task, "symmetries", None)
    if method is None:
        return None
    from scm.guards.symmetry import Symmetry  # torch loads here, where a model is about to be trained

    where = getattr(task, "name", type(task).__name__)
    found = method() if callable(method) else method
    if not isinstance(found, Mapping):
        raise TaskError(f"{where}: symmetries() must return a mapping, got {type(found).__name__}")
    for name, item in found.items():
        if not isinstance(item, Symmetry):
            raise TaskError(
                f"{where}: symmetries() must hold scm.guards.symmetry.Symmetry, got {name}={item!r}"
            )
    return found


def check_splits(splits: object, where: str) -> None:
    """Raise `TaskError` unless `splits` maps train, val and test to splits with rows of finite inputs."""
    from scm.data import Split  # torch loads here, where data are at hand anyway

    if not isinstance(splits, Mapping):
        raise TaskError(f"{where}: splits(seed) must return a mapping, got {type(splits).__name__}")
    for name in SPLIT_NAMES:
        if name not in splits:
            raise TaskError(f"{where}: splits(seed) must hold {name!r}, got {sorted(map(str, splits))}")
        split = splits[name]
        if not isinstance(split, Split):
            raise TaskError(
                f"{where}: the split {name!r} must be a scm.data.Split, got {type(split).__name__}"
            )
        if len(split) == 0:
            raise TaskError(f"{where}: the split {name!r} must have at least one row, got 0")
        if split.inputs.is_floating_point() and not bool(split.inputs.isfinite().all()):
            raise TaskError(f"{where}: the inputs of the split {name!r} must be finite")


def check_metrics(metrics: object, where: str) -> None:
    """Raise `TaskError` unless `metrics` is a dict that holds `REQUIRED_METRICS` as numbers."""
    if not isinstance(metrics, dict):
        raise TaskError(f"{where}: metrics(...) must return a dict, got {type(metrics).__name__}")
    for name in REQUIRED_METRICS:
        if name not in metrics:
            raise TaskError(f"{where}: metrics(...) must hold {name!r}, got {sorted(map(str, metrics))}")
    for name, value in metrics.items():
        if not isinstance(value, Real):
            raise TaskError(f"{where}: metrics(...) must hold numbers, got {name}={value!r}")


def check_params(task: str, params: Mapping[str, Any], known: Iterable[str]) -> None:
    """Raise `TaskError` naming the first parameter that the task does not know, and the nearest that it does.

    >>> check_params("table", {"inptus": []}, ["inputs", "target"])
    Traceback (most recent call last):
    trainables.tasks.protocol.TaskError: unknown parameter 'inptus' of the task 'table'; did you mean ...
    """
    names = list(known)
    for name in params:
        if name not in names:
            raise TaskError(f"unknown parameter {name!r} of the task {task!r}{nearest(str(name), names)}")


def nearest(name: str, known: Iterable[str]) -> str:
    """Say, as the tail of a message, which known name is nearest, and what is known."""
    names = list(known)
    close = get_close_matches(name, names, n=1, cutoff=0.5)
    if not close:  # 'nh4' should still find 'NH4.mg.per.L'
        close = [other for other in names if name and name.lower() in other.lower()][:1]
    guess = f"; did you mean {close[0]!r}?" if close else ";"
    shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    return f"{guess} known: {shown}"


def data_digest(splits: Mapping[str, Split]) -> str:
    """Give the sha256 of the data of all three splits, in hex: what a row's `data_digest` holds."""
    digest = hashlib.sha256()
    for name in SPLIT_NAMES:
        digest.update(f"{name}={splits[name].digest()};".encode())
    return digest.hexdigest()
