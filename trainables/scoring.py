"""How a task's metrics become columns of rows, for one model and for many at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from scm.data import Split
from scm.trial import Decoded
from trainables.tasks.protocol import Task, TaskError, check_metrics

if TYPE_CHECKING:
    from scm.trial_config import TrialConfig

STANDARD_METRICS: tuple[str, ...] = (
    "accepted_error",
    "charged_error",
    "false_accept_rate",
    "false_reject_rate",
)
NAN = float("nan")


def metric_columns(metrics: object, where: str) -> dict[str, float]:
    """Name what a task measured as the columns of a row do; `TaskError` where it is not what it must be."""
    check_metrics(metrics, where)
    assert isinstance(metrics, dict)
    columns = {
        key if key in STANDARD_METRICS else f"metric.{key}": float(value) for key, value in metrics.items()
    }
    for key in STANDARD_METRICS:
        columns.setdefault(key, NAN)
    return columns


def score_many(
    task: Task, split: Split, configs: Sequence[TrialConfig], decoded: Decoded
) -> list[dict[str, float] | BaseException]:
    """Score the answers of many models on one split as columns of rows.

    `decoded` has the models before the rows. What the task raises for one of them is its entry, and so is the
    `TaskError` for what is no metrics.
    """
    found: list[dict[str, float] | BaseException] = []
    for metrics in raw_scores(task, split, configs, decoded):
        try:
            found.append(
                metrics if isinstance(metrics, BaseException) else metric_columns(metrics, task.name)
            )
        except TaskError as error:
            found.append(error)
    return found


def raw_scores(task: Task, split: Split, configs: Sequence[TrialConfig], decoded: Decoded) -> list[object]:
    """What the task says of the answers of many models, unchecked; in one call where it has a method for it.

    `decoded` has the models before the rows. What the task raises for one of them is its entry.
    """
    together = _pack_metrics(task)
    if together is not None:
        try:
            many = list(together(decoded, split, configs))
        except (Exception, SystemExit):  # one of them may be at fault: below it is seen which
            many = []
        if len(many) == len(configs):
            return many
    found: list[object] = []
    for place, config in enumerate(configs):
        try:
            own = Decoded(*(item[place] for item in decoded if item is not None))
            found.append(task.metrics(own, split, config))
        except (Exception, SystemExit) as error:  # what a task raises is the outcome of that trial
            found.append(error)
    return found


def scores_together(task: Task) -> bool:
    """Whether many models are scored in one call; each costs one otherwise."""
    return _pack_metrics(task) is not None


def _pack_metrics(task: Task) -> Callable[..., Sequence[object]] | None:
    """The task's `pack_metrics`; None where it has none, or one that knows nothing of its `metrics`.

    Who takes a task and gives it other metrics, in a subclass, on the object or around it, has not said how
    many models are scored by those.
    """
    if _depth(task, "metrics") < _depth(task, "pack_metrics"):
        return None
    return getattr(task, "pack_metrics", None)


def _depth(task: Task, name: str) -> int:
    """How far a method is from the object: 0 on it, 1 in its class, and so on, farthest in another object."""
    if name in getattr(task, "__dict__", {}):
        return 0
    for depth, kind in enumerate(type(task).__mro__, start=1):
        if name in vars(kind):
            return depth
    return len(type(task).__mro__) + 1
