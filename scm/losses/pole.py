"""What a head that scores poles should say, how wrong it is, and how often it was right.

The head is `scm.layers.pole_head`; which rows and sources a training uses is decided in
`scm.training.pole_loss`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from scm.core.tags import TRTag
from scm.losses.rowwise import (
    Reduced,
    as_rows_of,
    mean_over,
    reduce_rows,
    rows_that_count,
    weights_of_rows,
)

TAG_WEIGHT = 0.5


class PoleTargets(NamedTuple):
    """Per row: 1 near a pole, else 0 (or what the teacher says), and the weight; 0 where nothing is known."""

    target: Tensor
    weight: Tensor


def pole_targets(
    like: Tensor,
    *,
    teacher: Tensor | None = None,
    q_abs: Tensor | None = None,
    tags: Tensor | None = None,
    teacher_weight: float | Tensor = 0.5,
    proximity_threshold: float | Tensor = 0.1,
) -> PoleTargets:
    """Return what the scores `like` should be, row by row from the best source that knows the row.

    First the teacher, in [0, 1] and NaN where it says nothing (weight teacher_weight); then |Q| <
    proximity_threshold, where |Q| is not NaN (weight 1 − teacher_weight); then tag != REAL (weight 0.5). All
    have the shape of the scores, and none of them gets a gradient.

    Differs from zeroproof 0.1.0: a source that does not know a row leaves it to the next one.
    """
    target: Tensor | None = None
    weight: Tensor | None = None
    if tags is not None:
        target = (tags != TRTag.REAL).to(like.dtype)
        weight = torch.full_like(like, TAG_WEIGHT)
    if q_abs is not None:
        size = q_abs.detach()  # known where it equals itself: NaN does not
        target, weight = _preferred(
            size == size, (size < proximity_threshold).to(like.dtype), 1.0 - teacher_weight, target, weight
        )
    if teacher is not None:
        said = teacher.detach().to(like.dtype)
        target, weight = _preferred(said == said, said, teacher_weight, target, weight)
    if target is None or weight is None:
        return PoleTargets(torch.zeros_like(like), torch.zeros_like(like))
    return PoleTargets(target, weight)


def _preferred(
    known: Tensor, said: Tensor, its_weight: float | Tensor, target: Tensor | None, weight: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return what a source says where it knows, with its weight, and elsewhere what was there, or 0."""
    none = torch.zeros((), dtype=said.dtype, device=said.device)
    return (
        torch.where(known, said, none if target is None else target),
        torch.where(known, its_weight, none if weight is None else weight),
    )


def _bce(logits: Tensor, target: Tensor, normalized: bool) -> tuple[Tensor, Tensor]:
    # -log σ(-z) - t·z is -t·log σ(z) - (1-t)·log σ(-z), without the log of a 0.
    return -functional.logsigmoid(-logits) - target * logits, torch.sigmoid(logits) - target


def _squared(logits: Tensor, target: Tensor, normalized: bool) -> tuple[Tensor, Tensor]:
    if not normalized:
        return (logits - target).square(), 2.0 * (logits - target)
    score = torch.sigmoid(logits)
    error = score - target
    return error.square(), 2.0 * error * score * (1.0 - score)


FORMS: Mapping[str, Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor]]] = MappingProxyType(
    {"bce": _bce, "squared": _squared}
)
"""By name: logits, targets and whether scores are probabilities -> loss of each row, and its derivative."""


def pole_loss(
    logits: Tensor,
    targets: PoleTargets,
    *,
    form: str = "bce",
    normalize_output: bool = True,
    row_weights: Tensor | None = None,
) -> Tensor:
    """Return the mean over the rows that something is known of, of weight · loss, 0-d; 0 without such rows.

    form: "bce", the cross-entropy between target and σ(logit), or "squared", (score − target)² with the score
    σ(logit), or the logit itself without `normalize_output`. row_weights weigh rows against each other in the
    mean. A logit that is not finite has no loss and no gradient.

    Differs from zeroproof 0.1.0: "bce" is the default, and cross-entropy; there that name is the square.
    """
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form=}")
    weights = weights_of_rows(row_weights, logits)
    return reduce_rows(_pole, logits, *targets, weights, form, normalize_output)


def _pole(
    logits: Tensor,
    target: Tensor,
    weight: Tensor,
    row_weights: Tensor | None,
    form: str,
    normalized: bool,
    *,
    with_gradients: bool,
) -> Reduced:
    known = torch.isfinite(logits) & (weight > 0)
    counted = rows_that_count(known, row_weights)
    costs, slopes = FORMS[form](torch.where(known, logits, 0.0), torch.where(known, target, 0.0), normalized)
    loss, share = mean_over(costs * weight, counted, row_weights)
    if not with_gradients:
        return Reduced(loss)
    return Reduced(loss, (as_rows_of(slopes * weight * share, counted, logits),))


@dataclass
class PoleCounts:
    """How often a head and its targets agreed, on the device; counts of several batches add up."""

    table: Tensor  # (4,) int64: true and false positives, true and false negatives

    @classmethod
    def none(cls, device: torch.device | str = "cpu") -> PoleCounts:
        """No rows yet."""
        return cls(torch.zeros(4, dtype=torch.int64, device=device))

    @classmethod
    def of(cls, logits: Tensor, targets: PoleTargets, *, threshold: float = 0.5) -> PoleCounts:
        """Count the rows something is known of: σ(logit) >= threshold against target >= 0.5; no wait.

        A logit that is NaN says "no pole". ValueError for a threshold outside of (0, 1).
        """
        if not 0.0 < threshold < 1.0:
            raise ValueError(f"threshold must be in (0, 1), got {threshold=}")
        said = logits.detach() >= math.log(threshold / (1.0 - threshold))
        true = targets.target >= 0.5
        known = targets.weight > 0
        parts = (said & true, said & ~true, ~said & ~true, ~said & true)
        return cls(torch.stack([(part & known).sum() for part in parts]))

    def __add__(self, other: PoleCounts) -> PoleCounts:
        return PoleCounts(self.table.to(other.table.device) + other.table)

    def metrics(self) -> dict[str, float]:
        """Return accuracy, precision, recall, f1, pole_rate (of the targets) and the four counts; waits.

        A share of nothing is 0.
        """
        tp, fp, tn, fn = (float(count) for count in self.table.tolist())
        return {
            "accuracy": _share(tp + tn, tp + fp + tn + fn),
            "precision": _share(tp, tp + fp),
            "recall": _share(tp, tp + fn),
            "f1": _share(2.0 * tp, 2.0 * tp + fp + fn),
            "pole_rate": _share(tp + fn, tp + fp + tn + fn),
            "true_positives": tp,
            "false_positives": fp,
            "true_negatives": tn,
            "false_negatives": fn,
        }


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
