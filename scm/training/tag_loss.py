"""The tag-aware loss: cross-entropy between what an answer is and what a head of the model says it is.

What a tag is, and which tag a tuple has, is decided in `scm.core.tags`; what a status means, in
`scm.training.targets`. Four classes, in the order of `TRTag`: REAL, PINF, NINF, PHI. BOTTOM counts as PHI:
both are without value and without a side.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from scm.core.tags import TagPolicy, TRTag, reduce_tags, tags_of_tuples, tags_of_values
from scm.guards.gates import RAW_OUTPUTS, named_tensor
from scm.losses.coverage import check_share
from scm.losses.rowwise import check_at_least_zero, mean_over, rows_that_count, weights_of_rows
from scm.training.targets import STATUS_CODES, SemanticTargets

if TYPE_CHECKING:
    from scm.training.companion import Moment

TAG_CLASSES = ("REAL", "PINF", "NINF", "PHI")
LABELS = ("model", "data")
NO_LABEL = -1
"""The code of a row that has no label: it takes no part in the loss."""

_NOT_REAL_FACTOR = 2.0
_HIGH_COVERAGE = 0.98
_LARGEST_FACTOR = 4.0
_OF_STATUS: Mapping[str, int] = {
    "finite": TRTag.REAL,
    "bottom": TRTag.PHI,
    "censored_below": TRTag.NINF,
    "censored_above": TRTag.PINF,
    "domain_invalid": TRTag.PHI,
    "missing": NO_LABEL,
    "fault": NO_LABEL,
}


def compute_tag_loss(
    labels: Tensor | SemanticTargets,
    tag_logits: Tensor,
    weight: float | Tensor = 0.05,
    adaptive_weight: bool = False,
    coverage: float | Tensor | None = None,
    *,
    row_weights: Tensor | None = None,
) -> Tensor:
    """Return weight times the mean cross-entropy of the labelled rows, those that are not REAL counted twice.

    labels: (...) tags, -1 where there is none, or the data's statuses (`tags_of_statuses`). tag_logits:
    (..., 4). weight: with `adaptive_weight`, that of `adaptive_tag_weight` at `coverage`, which must then be
    given. row_weights: (rows,), the mean is weighted by them. 0-d, at least float32; 0 without labelled rows.
    No row alters another's gradient, whatever it holds.

    Raises ValueError for shapes that do not fit and, on the CPU, for other labels (elsewhere and under
    transforms they are not read back).

    Differs from zeroproof 0.1.0: true softmax and logarithm, so that no class is without gradient and a
    confident mistake costs what it is worth; labels may be the data's; BOTTOM is a label; coverage is not
    silently left out.
    """
    if isinstance(labels, SemanticTargets):
        labels = tags_of_statuses(labels)
    check_at_least_zero("weight", weight)
    _check_shapes(labels, tag_logits)
    _check_labels(labels)
    if adaptive_weight:
        if coverage is None:
            raise ValueError("coverage must be given with adaptive_weight, got coverage=None")
        weight = adaptive_tag_weight(weight, coverage)
    return _cross_entropy(labels, tag_logits, row_weights) * weight


def adaptive_tag_weight(
    weight: float | Tensor, coverage: float | Tensor, *, max_weight: float | Tensor | None = None
) -> float | Tensor:
    """Return `weight` up to a coverage of 0.98, rising from there to `max_weight` (default: 4 times) at 1.

    A model that rejects next to nothing gets to see what it rejects all the more.
    """
    check_share("coverage", coverage)
    largest = _LARGEST_FACTOR * weight if max_weight is None else max_weight
    share = (coverage - _HIGH_COVERAGE) / (1.0 - _HIGH_COVERAGE)
    share = share.clamp(0.0, 1.0) if isinstance(share, Tensor) else min(max(share, 0.0), 1.0)
    return weight + share * (largest - weight)


def tags_of_statuses(statuses: SemanticTargets | Tensor) -> Tensor:
    """Return what the data say that the answers are, int8, -1 for rows that are missing or a fault.

    finite is REAL, censored_above PINF, censored_below NINF, bottom and domain_invalid PHI. statuses: the
    targets, or a tensor of status codes.
    """
    if isinstance(statuses, Tensor):
        return _status_table(str(statuses.device))[statuses.to(torch.int64)]
    side = statuses.orientation_label
    tags = torch.where(side > 0, TRTag.PINF, torch.where(side < 0, TRTag.NINF, TRTag.PHI))
    tags = torch.where(statuses.mask_finite, TRTag.REAL, tags)
    return torch.where(statuses.mask_trained, tags, NO_LABEL).to(torch.int8)


def tags_of_rows(tags: Tensor) -> Tensor:
    """Return one label a row, (B,), from those of its outputs (B, ...): the tag of their strict sum.

    A row with an output that has no label has none.
    """
    if tags.ndim <= 1:
        return tags
    flat = tags.flatten(1)
    return torch.where((flat == NO_LABEL).any(1), NO_LABEL, reduce_tags(flat, dim=1))


def tag_accuracy(labels: Tensor | SemanticTargets, tag_logits: Tensor) -> Tensor:
    """Return the share of labelled rows whose largest logit is that of their tag, 0-d; 0 without any."""
    hits, count = _hits(*_labelled(labels, tag_logits))
    return hits / count.clamp(min=1)


def tag_confusion(labels: Tensor | SemanticTargets, tag_logits: Tensor) -> Tensor:
    """Return how often each tag (row) was called each class (column), (4, 4) int64, in order of the codes."""
    labels, tag_logits = _labelled(labels, tag_logits)
    classes, known = _classes(labels.flatten())
    said = tag_logits.flatten(0, -2).argmax(-1)
    size = len(TAG_CLASSES)
    counts = torch.zeros(size * size, dtype=torch.int64, device=labels.device)
    return counts.scatter_add(0, classes * size + said, known.to(torch.int64)).view(size, size)


class TagPredictionHead(nn.Module):
    """Features (..., input_dim) to the logits of the four tags (..., 4), through one ReLU layer.

    Differs from zeroproof 0.1.0: weights are drawn (from torch's global generator) instead of being alike in
    pairs, which no training could tell apart.
    """

    def __init__(self, input_dim: int, hidden_dim: int = 8) -> None:
        super().__init__()
        for name, value in (("input_dim", input_dim), ("hidden_dim", hidden_dim)):
            if value < 1:
                raise ValueError(f"{name} must be >= 1, got {name}={value!r}")
        self.hidden = nn.Linear(input_dim, hidden_dim)
        self.logits = nn.Linear(hidden_dim, len(TAG_CLASSES))

    def forward(self, features: Tensor) -> Tensor:
        """Return the logits, in the order of `TRTag`."""
        logits: Tensor = self.logits(functional.relu(self.hidden(features)))
        return logits


class TagLossTerm:
    """Adds weight * tag loss to the loss, as the term "tag", for the model's named output "tag_logits".

    labels: "data", the tags of the targets, or "model", those of its own (P, Q) at the micro-batch's tau,
    from which the head learns to describe and nothing more; for logits of (B, 4) beside several outputs, the
    row's (`tags_of_rows`). Rows that are missing or a fault have no label in either. With `adaptive` the
    weight is `adaptive_tag_weight` at the share of labelled rows whose own tag is REAL. Row weights that the
    loader gives weigh the rows.

    Telemetry of the epoch so far, over labelled rows, nan before there are any: tag_loss, the mean
    cross-entropy that the weight multiplies, and tag_accuracy.

    Raises ValueError for a weight below 0, for other labels, and where the model gives no "tag_logits".
    """

    def __init__(self, weight: float | Tensor, *, labels: str = "data", adaptive: bool = False) -> None:
        check_at_least_zero("weight", weight)
        if labels not in LABELS:
            raise ValueError(f"labels must be one of {', '.join(LABELS)}, got {labels=}")
        self.weight = weight
        self.labels = labels
        self.adaptive = adaptive
        self._seen: Tensor | None = None  # float64, of the epoch: summed loss, hits, labelled rows

    def begin_epoch(self, epoch: int, facts: dict[str, Any]) -> None:
        """Count anew."""
        self._seen = None

    def after_loss(self, moment: Moment) -> None:
        """Add the term."""
        logits = named_tensor(moment.outputs, "tag_logits")
        if logits is None:
            raise ValueError(
                'a tag loss needs the named output "tag_logits": the model must answer '
                f'(P, Q, {{"tag_logits": (B, 4)}}), got {_described(moment.outputs)}'
            )
        truth = _data_tags(moment, logits)
        own = torch.where(truth == NO_LABEL, NO_LABEL, _model_tags(moment, logits))
        labels = truth if self.labels == "data" else own
        _check_shapes(labels, logits)
        loss = _cross_entropy(labels, logits, moment.row_weights)
        weight = self.weight
        if self.adaptive:
            counted = (own != NO_LABEL).sum()
            real = (own == TRTag.REAL).sum()
            weight = adaptive_tag_weight(weight, torch.where(counted > 0, real / counted.clamp(min=1), 1.0))
        assert moment.terms is not None
        moment.terms.auxiliaries["tag"] = loss * weight
        self._count(labels, logits.detach(), loss.detach())

    def telemetry(self) -> dict[str, float]:
        """Return both numbers; waits for the device."""
        if self._seen is None:
            return {"tag_loss": math.nan, "tag_accuracy": math.nan}
        loss, hits, rows = self._seen.tolist()
        return {
            "tag_loss": loss / rows if rows else math.nan,
            "tag_accuracy": hits / rows if rows else math.nan,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return what was seen in the epoch under way."""
        return {"seen": None if self._seen is None else self._seen.cpu().clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on counting from `state_dict`."""
        self._seen = None if state["seen"] is None else state["seen"].clone()

    def _count(self, labels: Tensor, logits: Tensor, loss: Tensor) -> None:
        hits, rows = _hits(labels, logits)
        summed = torch.where(rows > 0, loss * rows, 0.0)
        fresh = torch.stack([item.double() for item in (summed, hits, rows)])
        self._seen = fresh if self._seen is None else self._seen.to(fresh.device) + fresh


def _cross_entropy(labels: Tensor, tag_logits: Tensor, row_weights: Tensor | None) -> Tensor:
    """Return the mean over labelled rows, 0 over none; labels and logits of fitting shapes."""
    classes, known = _classes(labels)
    # Replaced before the softmax: a nan in a row without a label would be a nan in the gradient.
    logits = torch.where(known.unsqueeze(-1), tag_logits, 0.0)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    costs = -functional.log_softmax(logits, dim=-1).gather(-1, classes.unsqueeze(-1)).squeeze(-1)
    costs = torch.where(labels == TRTag.REAL, 1.0, _NOT_REAL_FACTOR) * costs
    weights = weights_of_rows(row_weights, costs)
    return mean_over(costs, rows_that_count(known, weights), weights)[0]


def _classes(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the classes, int64, 0 where there is no label, and where there is one."""
    known = labels != NO_LABEL
    classes = torch.where(labels == TRTag.BOTTOM, TRTag.PHI, labels.to(torch.int64))
    return torch.where(known, classes, 0), known


def _hits(labels: Tensor, tag_logits: Tensor) -> tuple[Tensor, Tensor]:
    classes, known = _classes(labels)
    return ((tag_logits.argmax(-1) == classes) & known).sum(), known.sum()


def _labelled(labels: Tensor | SemanticTargets, tag_logits: Tensor) -> tuple[Tensor, Tensor]:
    tags = tags_of_statuses(labels) if isinstance(labels, SemanticTargets) else labels
    _check_shapes(tags, tag_logits)
    _check_labels(tags)
    return tags, tag_logits.detach()


def _check_shapes(labels: Tensor, tag_logits: Tensor) -> None:
    if tuple(tag_logits.shape) != (*labels.shape, len(TAG_CLASSES)):
        raise ValueError(
            f"tag_logits must have the shape of the labels and one dimension of {len(TAG_CLASSES)} more, "
            f"got {tuple(tag_logits.shape)} and {tuple(labels.shape)}"
        )


def _check_labels(labels: Tensor) -> None:
    if labels.dtype == torch.bool or labels.is_floating_point() or labels.is_complex():
        raise TypeError(f"labels must be integer codes of tags, got dtype {labels.dtype}")
    if labels.device.type != "cpu" or torch._C._are_functorch_transforms_active() or labels.numel() == 0:
        return
    low, high = (int(bound) for bound in labels.aminmax())
    if low < NO_LABEL or high > TRTag.BOTTOM:
        wrong = low if low < NO_LABEL else high
        raise ValueError(f"labels must be tags 0..{int(TRTag.BOTTOM)}, or {NO_LABEL} for none, got {wrong}")


@lru_cache(maxsize=16)
def _status_table(device: str) -> Tensor:
    codes = sorted(STATUS_CODES, key=STATUS_CODES.__getitem__)
    return torch.tensor([_OF_STATUS[status] for status in codes], dtype=torch.int8, device=device)


def _data_tags(moment: Moment, logits: Tensor) -> Tensor:
    fed = moment.fed
    # A loss that names no semantic targets is fed sentinels, or rows with a status and none to leave out.
    tags = tags_of_values(fed.targets) if fed.semantic is None else tags_of_statuses(fed.semantic)
    return _fitted(tags, logits)


def _model_tags(moment: Moment, logits: Tensor) -> Tensor:
    P, Q = moment.found.get(RAW_OUTPUTS, moment.outputs)[:2]
    return _fitted(tags_of_tuples(P, Q, TagPolicy(tau_Q_on=moment.facts["tau"])), logits)


def _fitted(tags: Tensor, logits: Tensor) -> Tensor:
    """Return one tag for each group of logits: the outputs' own, or the row's."""
    return tags if tags.ndim < logits.ndim else tags_of_rows(tags)


def _described(outputs: Any) -> str:
    if isinstance(outputs, (tuple, list)) and len(outputs) > 2 and isinstance(outputs[2], dict):
        return f"one that names {sorted(outputs[2])}"
    return "one without named outputs"
