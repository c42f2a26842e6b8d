"""How far around a pole gradients saturate, epoch by epoch, and the companion that says it to the loss.

Decided here: the radius on |Q| as a function of the epoch and of the batch's smallest |Q|, and whether
batches are near enough to a pole for it to act. What a saturating gradient is, is decided by the quotient
loss, which is told "hybrid_delta".
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from scm.training.companion import Moment

SCHEDULE_TYPES = ("linear", "cosine", "exponential")
NEAR_POLE = 0.1
_ADAPT_BELOW = 0.1  # a smallest |Q| under this widens the radius
_WIDEST = 2.0  # times delta_init, however small |Q| becomes
_PENDING_BATCHES = 64
_NOWHERE = -1.0  # no |Q| is that small: a radius within which nothing lies
_COLUMNS = ("delta", "q_min", "saturated", "near", "count")


@dataclass(frozen=True, kw_only=True)
class HybridGradientSchedule:
    """The radius on |Q| within which gradients saturate instead of growing or being masked.

    None up to `warmup_epochs` (poles are masked there: mask-REAL), then from delta_init to delta_final over
    `transition_epochs`, then delta_final; never below min_delta. With `adaptive_delta`, a smallest |Q| of the
    batch under 0.1 widens the radius by 0.1 / |Q|, up to twice delta_init. Radii are in units of |Q|.

    Differs from zeroproof 0.1.0: every field is checked; deltas must be > 0, so that an exponential way from
    one to the other exists.
    """

    warmup_epochs: int = 0
    transition_epochs: int = 20
    delta_init: float = 1e-2
    delta_final: float = 1e-6
    schedule_type: str = "exponential"
    adaptive_delta: bool = True
    min_delta: float = 1e-8
    enable: bool = True

    def __post_init__(self) -> None:
        for name in ("warmup_epochs", "transition_epochs"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an int, got {name}={value!r}")
            if value < 0:
                raise ValueError(f"{name} must be >= 0, got {name}={value!r}")
        for name in ("delta_init", "delta_final", "min_delta"):
            _check_positive(name, getattr(self, name))
        for name in ("adaptive_delta", "enable"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be a bool, got {name}={getattr(self, name)!r}")
        if str(self.schedule_type).lower() not in SCHEDULE_TYPES:
            raise ValueError(
                f"schedule_type must be one of {', '.join(SCHEDULE_TYPES)}, got {self.schedule_type!r}"
            )
        object.__setattr__(self, "schedule_type", self.schedule_type.lower())

    def delta(self, epoch: int, q_min: float | Tensor | None = None) -> float | Tensor | None:
        """Return the radius at a 0-based epoch, None where poles are masked; a tensor where `q_min` is one.

        q_min: the smallest |Q| of the batch, which acts with `adaptive_delta`; unknown (None), 0 or not
        finite, it changes nothing. Never waits for a device.
        """
        base = self._base(epoch)
        if base is None:
            return None
        if self.adaptive_delta and q_min is not None:
            return widened_delta(base, q_min, widest=_WIDEST * self.delta_init, least=self.min_delta)
        return max(base, self.min_delta)

    def mode(self, epoch: int) -> str:
        """Return "disabled", "warmup", "transitioning" or "converged"."""
        if not self.enable:
            return "disabled"
        if epoch < self.warmup_epochs:
            return "warmup"
        return "converged" if epoch >= self.warmup_epochs + self.transition_epochs else "transitioning"

    def _base(self, epoch: int) -> float | None:
        if not self.enable or epoch < self.warmup_epochs:
            return None
        first, last = self.delta_init, self.delta_final
        share = 1.0
        if self.transition_epochs > 0:
            share = min(1.0, (epoch - self.warmup_epochs) / self.transition_epochs)
        if self.schedule_type == "linear":
            return first + (last - first) * share
        if self.schedule_type == "cosine":
            return last + 0.5 * (first - last) * (1.0 + math.cos(math.pi * share))
        return float(first * (last / first) ** share)


def widened_delta(
    base: float | Tensor, q_min: float | Tensor, *, widest: float | Tensor, least: float | Tensor
) -> float | Tensor:
    """Return base * max(1, 0.1 / q_min), at most `widest` and at least `least`; on tensors without a wait.

    A q_min that is 0 or not finite says nothing, and leaves `base`.
    """
    if not any(isinstance(item, Tensor) for item in (base, q_min, widest, least)):
        if q_min > 0 and math.isfinite(q_min):
            base = min(base * max(1.0, _ADAPT_BELOW / q_min), widest)
        return max(base, least)
    smallest = torch.as_tensor(q_min)
    known = (smallest > 0) & torch.isfinite(smallest)
    factor = (_ADAPT_BELOW / torch.where(known, smallest, 1.0)).clamp_min(1.0)
    wider = (base * factor).clamp(max=widest)
    return torch.where(known, wider, base).clamp_min(least)


@dataclass(frozen=True, kw_only=True)
class SaturationHysteresis:
    """When batches are near enough to a pole for gradients to saturate, with a gap against flickering.

    It begins where the 10th percentile of |Q| is <= q_on, or the 90th of 1/|Q| >= g_on; it ends where the
    first is >= q_off and the second <= g_off. None leaves a bound on 1/|Q| out.
    """

    q_on: float
    q_off: float
    g_on: float | None = None
    g_off: float | None = None

    def __post_init__(self) -> None:
        for name in ("q_on", "q_off", "g_on", "g_off"):
            if getattr(self, name) is not None or name[0] == "q":
                _check_positive(name, getattr(self, name))
        if self.q_on > self.q_off:
            raise ValueError(f"q_on must be <= q_off, got q_on={self.q_on!r}, q_off={self.q_off!r}")
        if self.g_on is not None and self.g_off is not None and self.g_off > self.g_on:
            raise ValueError(f"g_off must be <= g_on, got g_off={self.g_off!r}, g_on={self.g_on!r}")

    def next_state(self, inside: Tensor, sizes: Tensor) -> Tensor:
        """Return whether gradients saturate after a batch with the |Q| `sizes` (n,), as a 0-d bool tensor.

        Sizes that are not finite are left out; without any other the state stays. Never waits for a device.
        """
        known = torch.where(torch.isfinite(sizes), sizes, torch.nan)
        q_low = torch.nanquantile(known, 0.1)
        enter, leave = q_low <= self.q_on, q_low >= self.q_off
        if self.g_on is not None or self.g_off is not None:
            g_high = torch.nanquantile(1.0 / known.clamp_min(1e-18), 0.9)
            if self.g_on is not None:
                enter = enter | (g_high >= self.g_on)
            if self.g_off is not None:
                leave = leave & (g_high <= self.g_off)
        return torch.where(inside, ~leave, enter)


class HybridScheduleCompanion:
    """Say the schedule's radius to the loss of every micro-batch, and what share of the answers it reached.

    The fact "hybrid_delta" is the epoch's radius before the forward pass, None where poles are masked; after
    it, the radius widened for this very batch. With a `hysteresis` the radius is negative, so that nothing
    lies within it, until batches come near a pole. near_pole: |Q| up to which an answer counts as near one.

    telemetry: of the epoch, hybrid_delta (mean over micro-batches; 0 where nothing saturated), hybrid_q_min,
    hybrid_saturated_share, near_pole_share; of the whole training, hybrid_flip_rate.

    Differs from zeroproof 0.1.0: the loss is really told; nothing is made anew each step; the statistics of
    an epoch can be read until the next one begins, and a denominator counts once.
    """

    def __init__(
        self,
        schedule: HybridGradientSchedule,
        *,
        near_pole: float = NEAR_POLE,
        hysteresis: SaturationHysteresis | None = None,
    ) -> None:
        _check_positive("near_pole", near_pole)
        self.schedule = schedule
        self.near_pole = near_pole
        self.hysteresis = hysteresis
        self._epoch = -1
        self._pending: list[tuple[Tensor, float | Tensor]] = []
        self._tables: list[Tensor] = []  # of the epoch: one row a micro-batch, on the device
        self._inside = torch.zeros((), dtype=torch.bool)
        self._flips = torch.zeros((), dtype=torch.int64)
        self._batches = 0

    def begin_epoch(self, epoch: int, facts: dict[str, Any]) -> None:
        """Begin the statistics of an epoch, unless it is the one under way (after a resumption)."""
        if epoch != self._epoch:
            self._epoch = epoch
            self._pending, self._tables = [], []

    def before_forward(self, moment: Moment) -> None:
        """Tell the epoch's radius."""
        moment.facts["hybrid_delta"] = self.schedule.delta(self._epoch)

    def after_forward(self, moment: Moment) -> None:
        """Tell the radius for the denominators of this micro-batch."""
        sizes = denominator_sizes(moment.outputs)
        delta = moment.facts["hybrid_delta"]
        if delta is not None and self.schedule.adaptive_delta:
            q_min = torch.where(torch.isfinite(sizes), sizes, torch.inf).amin()
            delta = self.schedule.delta(self._epoch, q_min)
        if delta is not None and self.hysteresis is not None:
            self._inside = self._inside.to(sizes.device)
            if not isinstance(delta, Tensor):
                delta = torch.full((), delta, dtype=sizes.dtype, device=sizes.device)
            delta = torch.where(self._inside, delta, _NOWHERE)
        moment.facts["hybrid_delta"] = delta
        self._pending.append((sizes, _NOWHERE if delta is None else delta))
        if len(self._pending) >= _PENDING_BATCHES:
            self._flush()

    def after_backward(self, moment: Moment) -> None:
        """Let the hysteresis see the micro-batch; it acts on the next one."""
        self._batches += 1
        if self.hysteresis is not None:
            after = self.hysteresis.next_state(self._inside, denominator_sizes(moment.outputs))
            self._flips = self._flips.to(after.device) + (after != self._inside)
            self._inside = after

    def telemetry(self) -> dict[str, float]:
        """Return the numbers of the newest epoch; NaN for shares and minimum before there is one."""
        flips = int(self._flips) / self._batches if self._batches else 0.0
        table = self._table()
        if not len(table):
            unknown = dict.fromkeys(("hybrid_q_min", "hybrid_saturated_share", "near_pole_share"), math.nan)
            return {"hybrid_delta": 0.0, **unknown, "hybrid_flip_rate": flips}
        columns = dict(zip(_COLUMNS, table.T, strict=True))
        numbers = torch.stack(
            [
                columns["delta"].clamp_min(0.0).mean(),
                columns["q_min"].amin(),
                columns["saturated"].sum() / columns["count"].sum(),
                columns["near"].sum() / columns["count"].sum(),
            ]
        ).tolist()
        named = zip(
            ("hybrid_delta", "hybrid_q_min", "hybrid_saturated_share", "near_pole_share"),
            numbers,
            strict=True,
        )
        return {**dict(named), "hybrid_flip_rate": flips}

    def state_dict(self) -> dict[str, Any]:
        """Return the hysteresis and the statistics of the epoch, a new one's or one under way."""
        return {
            "epoch": self._epoch,
            "table": self._table().cpu().clone(),
            "inside": bool(self._inside),
            "flips": int(self._flips),
            "batches": self._batches,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""
        self._epoch = int(state["epoch"])
        self._pending = []
        self._tables = [state["table"].clone()] if len(state["table"]) else []
        self._inside = torch.tensor(bool(state["inside"]))
        self._flips = torch.tensor(int(state["flips"]))
        self._batches = int(state["batches"])

    def _table(self) -> Tensor:
        self._flush()
        if len(self._tables) > 1:
            home = self._tables[-1].device
            self._tables = [torch.cat([table.to(home) for table in self._tables])]
        return self._tables[0] if self._tables else torch.zeros(0, len(_COLUMNS), dtype=torch.float64)

    def _flush(self) -> None:
        """Turn what was put aside into rows, runs of one form in a few calls together."""
        for _, run in itertools.groupby(self._pending, key=_form):
            self._tables.append(self._rows(list(run)))
        self._pending = []

    def _rows(self, alike: list[tuple[Tensor, float | Tensor]]) -> Tensor:
        sizes = torch.stack([held for held, _ in alike])  # (micro-batches, n)
        told = [delta for _, delta in alike if isinstance(delta, Tensor)]
        # Of a plain radius, filled in on the device: a copy from the host would wait.
        deltas = torch.stack(told) if told else torch.full_like(sizes[:, 0], alike[0][1])  # type: ignore[arg-type]
        finite = torch.isfinite(sizes)
        counted = (
            deltas,
            torch.where(finite, sizes, torch.inf).amin(1),
            (finite & (sizes <= deltas[:, None])).sum(1),
            (finite & (sizes <= self.near_pole)).sum(1),
            finite.sum(1),
        )
        return torch.stack([column.to(torch.float64) for column in counted], dim=1)


def _form(held: tuple[Tensor, float | Tensor]) -> tuple[torch.Size, float | None]:
    """What the entries of one run have in common: the shape, and the radius where it is a plain number."""
    sizes, delta = held
    return sizes.shape, None if isinstance(delta, Tensor) else delta


def denominator_sizes(outputs: Any) -> Tensor:
    """Return |Q| of a model's outputs, flat and without a graph; TypeError where they hold no denominator."""
    if isinstance(outputs, (tuple, list)) and len(outputs) >= 2 and isinstance(outputs[1], Tensor):
        return outputs[1].detach().abs().flatten()
    raise TypeError(f"outputs must be (P, Q) or (P, Q, named tensors), got {type(outputs).__name__}")


def _check_positive(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {name}={value!r}")
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be finite and > 0, got {name}={value!r}")
