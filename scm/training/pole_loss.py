"""The companion that trains a model's "pole_score" beside its task, and tells how good the scores are.

The loss is `scm.losses.pole`, the head `scm.layers.pole_head`; which models have one, `scm.models` decides.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from scm.guards.gates import RAW_OUTPUTS, named_tensor
from scm.losses.coverage import check_share
from scm.losses.pole import FORMS, PoleCounts, PoleTargets, pole_loss, pole_targets

if TYPE_CHECKING:
    from scm.training.companion import Moment

_PENDING_BATCHES = 64
METRICS = ("accuracy", "precision", "recall", "f1")


class PoleLossTerm:
    """Add lambda_pole times the pole loss of the model's "pole_score", and tell how good the scores are.

    The data are the teacher where they call a row bottom: its target is 1. Of the other rows |Q| is asked
    (of several outputs the smallest one), in the gauge of the model. Rows labelled missing or fault are left
    out.

    telemetry, of the newest epoch: pole_loss (mean over micro-batches, unweighted), pole_accuracy,
    pole_precision, pole_recall, pole_f1 (threshold 0.5 of the probability), pole_rate (share of targets >=
    0.5).
    """

    name = "pole_loss"

    def __init__(
        self,
        lambda_pole: float | Tensor,
        *,
        proximity_threshold: float | Tensor = 0.1,
        teacher_weight: float | Tensor = 0.5,
        form: str = "bce",
    ) -> None:
        if form not in FORMS:
            raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form=}")
        for name, value in (("lambda_pole", lambda_pole), ("proximity_threshold", proximity_threshold)):
            if not isinstance(value, Tensor) and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be finite and > 0, got {name}={value!r}")
        check_share("teacher_weight", teacher_weight)
        self.lambda_pole = lambda_pole
        self.proximity_threshold = proximity_threshold
        self.teacher_weight = teacher_weight
        self.form = form
        self._forget()

    def _forget(self) -> None:
        self._counts: PoleCounts | None = None
        self._loss: Tensor | None = None
        self._batches = 0
        self._pending: list[tuple[Tensor, PoleTargets, Tensor]] = []

    def begin_epoch(self, epoch: int, facts: dict[str, Any]) -> None:
        """Begin the counts of an epoch."""
        self._forget()

    def after_loss(self, moment: Moment) -> None:
        """Add the term; ValueError where the model gives no "pole_score"."""
        assert moment.terms is not None
        logits = named_tensor(moment.outputs, "pole_score")
        if logits is None:
            raise ValueError(
                "lambda_pole > 0 needs a model that answers (P, Q, named tensors) with a 'pole_score' (B,), "
                f"got {type(moment.outputs).__name__} without it"
            )
        targets = self._targets(logits, moment)
        loss = pole_loss(logits, targets, form=self.form, row_weights=moment.row_weights)
        moment.terms.auxiliaries["pole"] = self.lambda_pole * loss
        self._pending.append((logits.detach(), targets, loss.detach()))
        self._batches += 1
        if len(self._pending) >= _PENDING_BATCHES:
            self._flush()

    def telemetry(self) -> dict[str, float]:
        """Return the numbers of the newest epoch; NaN before there is one."""
        self._flush()
        if self._counts is None or self._loss is None:
            return dict.fromkeys(("pole_loss", *(f"pole_{name}" for name in METRICS), "pole_rate"), math.nan)
        metrics = self._counts.metrics()
        told = {f"pole_{name}": metrics[name] for name in METRICS}
        return {"pole_loss": float(self._loss) / self._batches, **told, "pole_rate": metrics["pole_rate"]}

    def state_dict(self) -> dict[str, Any]:
        """Return the counts of the epoch under way."""
        self._flush()
        return {
            "table": None if self._counts is None else self._counts.table.cpu().clone(),
            "loss": None if self._loss is None else self._loss.cpu().clone(),
            "batches": self._batches,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""
        self._pending = []
        self._counts = None if state["table"] is None else PoleCounts(state["table"].clone())
        self._loss = None if state["loss"] is None else state["loss"].clone()
        self._batches = int(state["batches"])

    def _flush(self) -> None:
        """Count what was put aside, in a few calls for all of it together."""
        if not self._pending:
            return
        logits, targets, losses = zip(*self._pending, strict=True)
        together = PoleTargets(*(torch.cat(column) for column in zip(*targets, strict=True)))
        counts, loss = PoleCounts.of(torch.cat(logits), together), torch.stack(losses).double().sum()
        self._counts = counts if self._counts is None else self._counts + counts
        self._loss = loss if self._loss is None else self._loss.to(loss.device) + loss
        self._pending = []

    def _targets(self, logits: Tensor, moment: Moment) -> PoleTargets:
        Q = moment.found.get(RAW_OUTPUTS, moment.outputs)[1].detach()
        semantic = moment.fed.semantic
        bottom = moment.fed.lifted[1] == 0 if semantic is None else semantic.mask_semantic
        targets = pole_targets(
            logits,
            teacher=torch.where(_any_output(bottom), 1.0, math.nan),
            q_abs=Q.abs() if Q.ndim == 1 else Q.abs().flatten(start_dim=1).amin(dim=1),
            teacher_weight=self.teacher_weight,
            proximity_threshold=self.proximity_threshold,
        )
        if semantic is None:
            return targets
        trained = _any_output(semantic.mask_trained)
        return targets._replace(weight=torch.where(trained, targets.weight, 0.0))


def _any_output(mask: Tensor) -> Tensor:
    """(B, ...) as (B,): the rows of which one output is in the mask."""
    return mask if mask.ndim == 1 else mask.flatten(start_dim=1).any(dim=1)
