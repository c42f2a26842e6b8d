"""What the guards of a model's gates look at: its gate logits and the one number it gives each row.

A model names them ("stop_logits", "clue_count" among its named tensors); for one that answers plain (P, Q)
they are the acceptance of the row: how far |Q| is above the threshold.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from scm.training.companion import Moment


RAW_OUTPUTS = "raw_outputs"  # in `Moment.found`: what the model gave, where a guard has bounded it since


def named_tensor(outputs: Any, name: str) -> Tensor | None:
    """Return the tensor that the model gives under `name`, as in (P, Q, named); None without one."""
    if isinstance(outputs, (tuple, list)) and len(outputs) > 2 and isinstance(outputs[2], dict):
        return outputs[2].get(name)
    return None


def gate_logits(moment: Moment, temperature: float | Tensor) -> Tensor:
    """Return the gate logits of a micro-batch, (B, ...), as the model gave them, before any bound.

    They are its "stop_logits", or else (|Q| - tau) / temperature. Raises ValueError without either.
    """
    outputs = moment.found.get(RAW_OUTPUTS, moment.outputs)
    logits = named_tensor(outputs, "stop_logits")
    if logits is not None:
        return logits
    return (_size(_denominator(outputs, "stop_logits")) - moment.facts["tau"]) / temperature


def row_scalar(moment: Moment) -> Tensor:
    """Return one number per row, (B,): the model's "clue_count", or else the mean of |Q| over its outputs.

    As the model gave them, before any bound. Raises ValueError without either.
    """
    outputs = moment.found.get(RAW_OUTPUTS, moment.outputs)
    count = named_tensor(outputs, "clue_count")
    if count is not None:
        return count.flatten(1).mean(1) if count.ndim > 1 else count
    size = _size(_denominator(outputs, "clue_count"))
    return size.flatten(1).mean(1) if size.ndim > 1 else size


def trained_rows(moment: Moment) -> Tensor | None:
    """Return which rows may be trained, (B,) bool: those with an output that is; None where all are."""
    semantic = moment.fed.semantic
    if semantic is None:
        return None
    trained: Tensor = semantic.mask_trained
    return trained.flatten(1).any(1) if trained.ndim > 1 else trained


def _denominator(outputs: Any, name: str) -> Tensor:
    if isinstance(outputs, (tuple, list)) and len(outputs) > 1 and isinstance(outputs[1], Tensor):
        return outputs[1]
    raise ValueError(
        f"outputs must be (P, Q) or name {name!r} for this guard to act on, got {type(outputs).__name__}"
    )


def _size(Q: Tensor) -> Tensor:
    """|Q| with the one-sided derivative at 0, so that exact zeros can be pushed out."""
    return Q * torch.copysign(torch.ones_like(Q), Q.detach())
