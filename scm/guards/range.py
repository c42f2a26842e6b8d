"""Range guards of a training: outputs are bounded for the loss, and gates are kept where they can move.

Both measure what the model gave, before any bound: a monitor behind a bound never sees anything. What a bound
lets through is decided in `scm.guards.bounds`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from scm.guards.bounds import BOUND_FORMS, bound, check_limit, saturation_penalty
from scm.guards.gates import RAW_OUTPUTS, gate_logits, trained_rows
from scm.losses.rowwise import check_at_least_zero

if TYPE_CHECKING:
    from scm.training.companion import Moment


class RangeGuard:
    """Bounds what the loss sees of the outputs, or of P and Q, to [-limit, limit]; forms as in `bound`.

    Validation, decoding and metrics see the model's own outputs; named tensors are left alone. Telemetry of
    the epoch so far, measured before the bound: range_max_abs, the largest value (a NaN counts as 0), and
    range_over_share, the share of values beyond the limit.

    Raises ValueError for a limit that is not above 0, or another form.
    """

    def __init__(self, limit: float | Tensor, form: str = "soft") -> None:
        check_limit("limit", limit)
        if form not in BOUND_FORMS:
            raise ValueError(f"form must be one of {', '.join(BOUND_FORMS)}, got {form=}")
        self.limit = limit
        self.form = form
        self._seen = _Seen()

    def begin_epoch(self, epoch: int, facts: dict[str, Any]) -> None:
        """Count anew."""
        self._seen = _Seen()

    def after_forward(self, moment: Moment) -> None:
        """Put bounded outputs in the place of the raw ones, which are kept in `found`."""
        raw = moment.outputs
        moment.found[RAW_OUTPUTS] = raw
        if isinstance(raw, Tensor):
            moment.outputs = self._bounded(raw)
        else:
            moment.outputs = (*(self._bounded(item) for item in raw[:2]), *raw[2:])

    def telemetry(self) -> dict[str, float]:
        """Return the two numbers, nan before the first batch."""
        return self._seen.named("range_max_abs", "range_over_share")

    def state_dict(self) -> dict[str, Any]:
        """Return what was seen in the epoch under way."""
        return self._seen.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on counting from `state_dict`."""
        self._seen.load_state_dict(state)

    def _bounded(self, x: Tensor) -> Tensor:
        self._seen.add(x, self.limit, None)
        return bound(x, self.limit, self.form)


class SaturationGuard:
    """Adds weight * mean relu(|z| - threshold) to the loss, as the term "saturation", for the gate logits z.

    They are the model's "stop_logits", or else (|Q| - tau) / temperature, in rows that may be trained. With
    a weight of 0, a plain number, only measures. Telemetry of the epoch so far: saturation_max, the largest
    |z|, and saturation_share, the share of logits beyond the threshold.

    Raises ValueError for a weight or threshold below 0, or a temperature that is not above 0.
    """

    def __init__(
        self, weight: float | Tensor, threshold: float | Tensor = 5.0, *, temperature: float | Tensor = 1e-2
    ) -> None:
        check_at_least_zero("weight", weight)
        check_at_least_zero("threshold", threshold)
        check_limit("temperature", temperature)
        self.weight = weight
        self.threshold = threshold
        self.temperature = temperature
        self._seen = _Seen()

    def begin_epoch(self, epoch: int, facts: dict[str, Any]) -> None:
        """Count anew."""
        self._seen = _Seen()

    def after_loss(self, moment: Moment) -> None:
        """Add the term."""
        logits = gate_logits(moment, self.temperature)
        mask = trained_rows(moment)
        if mask is not None:
            mask = mask.reshape(-1, *[1] * (logits.ndim - 1)).expand(logits.shape)
        self._seen.add(logits, self.threshold, mask)
        if isinstance(self.weight, Tensor) or self.weight > 0:
            assert moment.terms is not None
            moment.terms.auxiliaries["saturation"] = self.weight * saturation_penalty(
                logits, self.threshold, mask=mask
            )

    def telemetry(self) -> dict[str, float]:
        """Return the two numbers, nan before the first batch."""
        return self._seen.named("saturation_max", "saturation_share")

    def state_dict(self) -> dict[str, Any]:
        """Return what was seen in the epoch under way."""
        return self._seen.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on counting from `state_dict`."""
        self._seen.load_state_dict(state)


class _Seen:
    """The largest |value| of an epoch and the share of values beyond a limit, kept on their device."""

    def __init__(self) -> None:
        self._numbers: Tensor | None = None  # float64: largest, number beyond, number of all

    def add(self, values: Tensor, limit: float | Tensor, mask: Tensor | None) -> None:
        """Take in values, those of `mask` (their own shape) where one is given."""
        size = values.detach().abs().nan_to_num(nan=0.0, posinf=float("inf"))
        if mask is not None:
            size = torch.where(mask, size, 0.0)
        beyond = size > limit
        count = beyond.new_full((), size.numel(), dtype=torch.int64) if mask is None else mask.sum()
        fresh = torch.stack([item.double() for item in (size.max(), beyond.sum(), count)])
        if self._numbers is None:
            self._numbers = fresh
        else:
            held = self._numbers.to(fresh.device)
            self._numbers = torch.cat([held[:1].maximum(fresh[:1]), held[1:] + fresh[1:]])

    def named(self, largest: str, share: str) -> dict[str, float]:
        if self._numbers is None:
            return {largest: math.nan, share: math.nan}
        size, beyond, count = self._numbers.tolist()
        return {largest: size, share: beyond / count if count else math.nan}

    def state_dict(self) -> dict[str, Any]:
        return {"numbers": None if self._numbers is None else self._numbers.cpu().clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._numbers = None if state["numbers"] is None else state["numbers"].clone()
