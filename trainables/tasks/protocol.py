"""What a task is: the few methods that a trial calls, and the errors that bad data raise.

Which tasks exist is decided in `trainables.tasks.registry`; how a trial uses one, in `trainables.trial`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
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
    may take longer than the training, and the curve of error against coverage has five points, not twelve.

    And a method ``decode(P, Q, tau_infer)``, where those who use the model decode by rules of the task's
    own: it returns answers and which of them are accepted (bool). Trials are scored by strict decoding with
    or without it; `scm-harness robustness` tries that it accepts nothing that strict decoding refuses.

    And a method ``shifts(seed)``, which maps names to sequences of ``(level, Split)``: data further and
    further from those of training, drawn anew, with the true labels. Each sequence is in the order of growing
    shift; `level` is a number that grows or falls with it, in a unit of the task's own, and None where the
    split is not shifted, which may stand first (else the test split does). A split may hold the extra
    `pole_distance` (N,): how far each row is from the nearest pole, 0 on it, in any unit. Without the method,
    `trainables.shifted` makes shifts of the test split alone.
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


Shifts = Mapping[str, "Sequence[tuple[float | None, Split]]"]
POLE_DISTANCE = "pole_distance"


def task_shifts(task: object, seed: int, like: Split) -> Shifts | None:
    """Give what the task's `shifts(seed)` does, None where it has none; `TaskError` for anything else.

    `like` is a split of the task: shifted inputs must have its shape and its type.
    """
    method = getattr(task, "shifts", None)
    if method is None:
        return None
    from scm.data import Split  # torch loads here, where data are at hand anyway

    where = getattr(task, "name", type(task).__name__)
    found = method(seed)
    if not isinstance(found, Mapping):
        raise TaskError(f"{where}: shifts(seed) must return a mapping, got {type(found).__name__}")
    for name, levels in found.items():
        if not isinstance(levels, Sequence) or isinstance(levels, str) or not levels:
            raise TaskError(
                f"{where}: shifts(seed) must hold sequences of (level, Split), got {name}={levels!r}"
            )
        for item in levels:
            if not isinstance(item, tuple) or len(item) != 2 or not isinstance(item[1], Split):
                raise TaskError(f"{where}: the shift {name!r} must hold pairs (level, Split), got {item!r}")
            level, split = item
            if level is not None and not (isinstance(level, Real) and math.isfinite(level)):
                raise TaskError(
                    f"{where}: a level of the shift {name!r} must be a finite number, got {level!r}"
                )
            _check_shifted(split, like, f"{where}: the shift {name!r} at level {level}")
    return found


def _check_shifted(split: Split, like: Split, where: str) -> None:
    if len(split) == 0:
        raise TaskError(f"{where} must have at least one row, got 0")
    shape, asked = tuple(split.inputs.shape[1:]), tuple(like.inputs.shape[1:])
    if shape != asked or split.inputs.dtype != like.inputs.dtype:
        raise TaskError(
            f"{where} must have inputs as the test split has, {asked} {like.inputs.dtype}, "
            f"got {shape} {split.inputs.dtype}"
        )
    if split.inputs.is_floating_point() and not bool(split.inputs.isfinite().all()):
        raise TaskError(f"{where} must have finite inputs")
    distance = split.extras.get(POLE_DISTANCE)
    if distance is None:
        return
    if distance.shape != (len(split),) or not bool((distance >= 0).all()):
        raise TaskError(
            f"{where} must have one {POLE_DISTANCE} >= 0 a row, got the shape {tuple(distance.shape)}, "
            f"the least {float(distance.min())}"
        )


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
