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
from scm.losses.pole import FORMS, PoleCounts, PoleTargets, pole_loss, pole_targets

if TYPE_CHECKING:
    from scm.training.companion import Moment

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
        self.lambda_pole = lambda_pole
        self.proximity_threshold = proximity_threshold
        self.teacher_weight = teacher_weight
        self.form = form
        self._forget()

    def _forget(self) -> None:
        self._counts = PoleCounts.none()
        self._loss = torch.zeros((), dtype=torch.float64)
        self._batches = 0

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
        weights = moment.facts.get("row_weights")
        weights = moment.fed.extras.get("row_weights") if weights is None else weights
        loss = pole_loss(logits, targets, form=self.form, row_weights=weights)
        moment.terms.auxiliaries["pole"] = self.lambda_pole * loss
        self._counts = self._counts + PoleCounts.of(logits, targets)
        self._loss = self._loss.to(loss.device) + loss.detach()
        self._batches += 1

    def telemetry(self) -> dict[str, float]:
        """Return the numbers of the newest epoch; NaN before there is one."""
        if not self._batches:
            return dict.fromkeys(("pole_loss", *(f"pole_{name}" for name in METRICS), "pole_rate"), math.nan)
        metrics = self._counts.metrics()
        told = {f"pole_{name}": metrics[name] for name in METRICS}
        return {"pole_loss": float(self._loss) / self._batches, **told, "pole_rate": metrics["pole_rate"]}

    def state_dict(self) -> dict[str, Any]:
        """Return the counts of the epoch under way."""
        return {
            "table": self._counts.table.cpu().clone(),
            "loss": self._loss.cpu().clone(),
            "batches": self._batches,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""
        self._counts = PoleCounts(state["table"].clone())
        self._loss, self._batches = state["loss"].clone(), int(state["batches"])

    def _targets(self, logits: Tensor, moment: Moment) -> PoleTargets:
        Q = moment.found.get(RAW_OUTPUTS, moment.outputs)[1].detach()
        q_abs = _per_row(Q.abs()).amin(dim=-1)
        semantic = moment.fed.semantic
        bottom = moment.fed.lifted[1] == 0 if semantic is None else semantic.mask_semantic
        teacher = torch.where(_per_row(bottom).any(dim=-1), 1.0, math.nan)
        targets = pole_targets(
            logits,
            teacher=teacher,
            q_abs=q_abs,
            teacher_weight=self.teacher_weight,
            proximity_threshold=self.proximity_threshold,
        )
        if semantic is None:
            return targets
        trained = _per_row(semantic.mask_trained).any(dim=-1)
        return targets._replace(weight=torch.where(trained, targets.weight, 0.0))


def _per_row(tensor: Tensor) -> Tensor:
    """(B, ...) as (B, n)."""
    return tensor.unsqueeze(-1) if tensor.ndim == 1 else tensor.flatten(start_dim=1)
