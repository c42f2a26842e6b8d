"""Rational layers that know how near to their poles they have been.

Decided here: what is recorded of the denominators of an epoch, and layers that hand it out. How far around a
pole gradients saturate is decided in `scm.training.hybrid_schedule`, what a tag is in `scm.core.tags`.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from scm.autodiff.policies import is_transformed
from scm.core.tags import TRTag
from scm.layers.basis import BasisFunction
from scm.layers.capability import BottomCapability
from scm.layers.tr_rational import TRRational, real_quotient

_SUMS = ("count", "near", "not_finite", "saturating", "masked", "sum")
_BATCH = ("min", "mean", "p10", "p50", "p90", "g_p10", "g_p50", "g_p90", "near_ratio")
_QUANTILES = (0.1, 0.5, 0.9)
_KEPT_EPOCHS = 1024
_SMALLEST = 1e-18  # of a |Q| whose reciprocal is taken


class GradientSchedule(Protocol):
    """The radius on |Q| within which gradients saturate; `HybridGradientSchedule` is one."""

    def delta(self, epoch: int, q_min: float | Tensor | None = None) -> float | Tensor | None:
        """Return the radius, None where poles are masked."""
        ...

    def mode(self, epoch: int) -> str:
        """Return a word for what gradients do in the epoch."""
        ...


class Hysteresis(Protocol):
    """When gradients saturate at all; `SaturationHysteresis` is one."""

    def next_state(self, inside: Tensor, sizes: Tensor) -> Tensor:
        """Return whether they do after a batch with the |Q| `sizes`, as a 0-d bool tensor."""
        ...


class NearPoleStatistics:
    """What the denominators of an epoch were like; a companion of a training, which begins its epochs.

    Every denominator counts once. Adding a batch never waits for the device; asking does. Denominators that
    are not finite are counted apart and enter no other number. near: |Q| <= pole_threshold. With
    `hysteresis`, the changes of its state are counted over the whole training. `name` begins the names of
    its telemetry, and is that of its state in a checkpoint.

    Differs from zeroproof 0.1.0: |Q| is recorded, and once; memory does not grow with the training; and an
    epoch's numbers stay until the next epoch begins.
    """

    def __init__(
        self,
        *,
        pole_threshold: float = 0.1,
        hysteresis: Hysteresis | None = None,
        name: str = "near_pole",
    ) -> None:
        if not (math.isfinite(pole_threshold) and pole_threshold > 0.0):
            raise ValueError(f"pole_threshold must be finite and > 0, got {pole_threshold=}")
        self.pole_threshold = float(pole_threshold)
        self.hysteresis = hysteresis
        self.name = name
        self.epoch = -1
        self.batches = 0
        self._closed: deque[Tensor] = deque(maxlen=_KEPT_EPOCHS)
        self._inside = torch.zeros((), dtype=torch.bool)
        self._flips = torch.zeros((), dtype=torch.int64)
        self._judged = 0
        self._open(torch.device("cpu"))

    def _open(self, device: torch.device) -> None:
        self._sums = torch.zeros(len(_SUMS), dtype=torch.float64, device=device)
        self._extremes = torch.full((2,), math.inf, dtype=torch.float64, device=device)
        self._extremes[1:].fill_(-math.inf)  # an assignment would copy the number there and wait
        self._batch = torch.full((len(_BATCH),), math.nan, dtype=torch.float64, device=device)

    # --- recording ------------------------------------------------------------------------------------

    def begin_epoch(self, epoch: int, facts: dict[str, Any] | None = None) -> None:
        """Close the epoch before and begin an empty one, unless it is the one under way (when resuming)."""
        if epoch == self.epoch:
            return
        if self.batches:
            self._closed.append(torch.cat([self._extremes, self._sums]))
        self.epoch, self.batches = epoch, 0
        self._open(self._sums.device)

    @torch.no_grad()
    def record(self, Q: Tensor, delta: float | Tensor | None = None) -> None:
        """Add one batch of denominators; `delta` is the radius within which its gradients saturate, if any.

        Denominators outside of it whose gradient is masked are those that are 0 or not finite.
        """
        size = Q.detach().abs().flatten().to(torch.float64)
        if not size.numel():
            return
        if self._sums.device != size.device:
            self._to(size.device)
        finite = torch.isfinite(size)
        near = finite & (size <= self.pole_threshold)
        saturating = finite & (size <= (-1.0 if delta is None else delta))
        masked = ~saturating & (~finite | (size == 0))
        known = torch.where(finite, size, 0.0)
        counted = (finite, near, ~finite, saturating, masked)
        batch = torch.stack([item.sum().to(torch.float64) for item in counted] + [known.sum()])
        ordered = torch.where(finite, size, math.inf).sort().values
        low, high = ordered[0], torch.where(finite, size, -math.inf).amax()
        self._sums += batch
        self._extremes = torch.stack(
            [torch.minimum(self._extremes[0], low), torch.maximum(self._extremes[1], high)]
        )
        # In the order of the sizes the reciprocals descend: their quantiles lie from the other end.
        last = (batch[0] - 1.0).clamp_min(0.0)
        places = torch.stack([share * last for share in _QUANTILES])
        q, g = _between(ordered, places), _between(1.0 / ordered.clamp_min(_SMALLEST), last - places)
        row = torch.stack([low, batch[5] / batch[0], *q, *g, batch[1] / batch[0]])
        self._batch = torch.where(batch[0] > 0, row, math.nan)
        self.batches += 1
        self._judge(size)

    def _judge(self, size: Tensor) -> None:
        if self.hysteresis is not None:
            inside = self.hysteresis.next_state(self._inside, size)
            self._flips = self._flips + (inside != self._inside)
            self._inside = inside
            self._judged += 1

    def _to(self, device: torch.device) -> None:
        for name in ("_sums", "_extremes", "_batch", "_inside", "_flips"):
            setattr(self, name, getattr(self, name).to(device))

    # --- asking ---------------------------------------------------------------------------------------

    def statistics(self) -> dict[str, float]:
        """Return all numbers by name; waits for the device.

        Of the epoch (NaN where nothing was recorded): q_min, q_max, q_mean, total_gradient_calls (the
        denominators), not_finite_count, saturating_activations, mask_real_activations, saturating_ratio,
        near_pole_count, near_pole_ratio, batches. Of the newest batch: q_min_batch, q_mean_batch,
        q_median_batch, q_p10, q_p50, q_p90, g_p10, g_p50, g_p90 (g = 1/max(|Q|, 1e-18)),
        near_pole_ratio_batch. Of the training: policy_flip_count, flip_rate (a batch), saturating_state (0 or
        1).
        """
        told = torch.cat([self._extremes, self._sums, self._batch]).tolist()
        low, high = told[:2]
        sums = dict(zip(_SUMS, told[2:], strict=False))
        batch = dict(zip(_BATCH, told[2 + len(_SUMS) :], strict=True))
        finite = sums["count"]
        total = finite + sums["not_finite"]
        flips = int(self._flips)
        return {
            "q_min": low if finite else math.nan,
            "q_max": high if finite else math.nan,
            "q_mean": sums["sum"] / finite if finite else math.nan,
            "total_gradient_calls": total,
            "not_finite_count": sums["not_finite"],
            "saturating_activations": sums["saturating"],
            "mask_real_activations": sums["masked"],
            "saturating_ratio": sums["saturating"] / total if total else math.nan,
            "near_pole_count": sums["near"],
            "near_pole_ratio": sums["near"] / finite if finite else math.nan,
            "batches": float(self.batches),
            "q_min_batch": batch["min"],
            "q_mean_batch": batch["mean"],
            "q_median_batch": batch["p50"],
            **{f"q_{name}": batch[name] for name in ("p10", "p50", "p90")},
            **{name: batch[name] for name in ("g_p10", "g_p50", "g_p90")},
            "near_pole_ratio_batch": batch["near_ratio"],
            "policy_flip_count": float(flips),
            "flip_rate": flips / self._judged if self._judged else math.nan,
            "saturating_state": float(self._inside),
        }

    def telemetry(self) -> dict[str, float]:
        """Return <name>_q_min, _q_max, _q_mean, _ratio, _saturating_ratio and _flip_rate, for a row."""
        found = self.statistics()
        names = {
            "q_min": "q_min",
            "q_max": "q_max",
            "q_mean": "q_mean",
            "ratio": "near_pole_ratio",
            "saturating_ratio": "saturating_ratio",
            "flip_rate": "flip_rate",
        }
        return {f"{self.name}_{short}": found[name] for short, name in names.items()}

    def history(self) -> dict[str, list[float]]:
        """Return q_min, q_max, near_pole_count and total_count of the last 1024 epochs that were closed."""
        rows = torch.stack(list(self._closed)).tolist() if self._closed else []
        place = {name: 2 + index for index, name in enumerate(_SUMS)}
        return {
            "q_min": [row[0] for row in rows],
            "q_max": [row[1] for row in rows],
            "near_pole_count": [row[place["near"]] for row in rows],
            "total_count": [row[place["count"]] + row[place["not_finite"]] for row in rows],
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the epoch under way and those closed, as tensors and plain values."""
        return {
            "epoch": self.epoch,
            "batches": self.batches,
            "sums": self._sums.cpu().clone(),
            "extremes": self._extremes.cpu().clone(),
            "batch": self._batch.cpu().clone(),
            "closed": [row.cpu().clone() for row in self._closed],
            "inside": bool(self._inside),
            "flips": int(self._flips),
            "judged": self._judged,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.epoch, self.batches = int(state["epoch"]), int(state["batches"])
        self._sums, self._extremes = state["sums"].clone(), state["extremes"].clone()
        self._batch = state["batch"].clone()
        self._closed = deque((row.clone() for row in state["closed"]), maxlen=_KEPT_EPOCHS)
        self._inside = torch.tensor(bool(state["inside"]))
        self._flips = torch.tensor(int(state["flips"]))
        self._judged = int(state["judged"])


class HybridTRRational(nn.Module):
    """A `TRRational` that records its denominators, and whose gradients saturate near its poles.

    Takes what `TRRational` takes. In training mode every pass is recorded in `statistics` (save inside of
    ``torch.func`` transforms), which as a companion of a trainer begins its epochs; without one,
    `begin_epoch` does. `hybrid_schedule` says within which |Q| gradients saturate in an epoch; without one
    they never do. track_Q_values=False records nothing.

    Differs from zeroproof 0.1.0: what is recorded is what the forward pass computed.
    """

    def __init__(
        self,
        d_p: int | None = None,
        d_q: int | None = None,
        basis: BasisFunction | None = None,
        *,
        hybrid_schedule: GradientSchedule | None = None,
        hybrid_bound: float = 1.0,
        track_Q_values: bool = True,
        pole_threshold: float = 0.1,
        hysteresis: Hysteresis | None = None,
        **rational: Any,
    ) -> None:
        super().__init__()
        if not (math.isfinite(hybrid_bound) and hybrid_bound > 0.0):
            raise ValueError(f"hybrid_bound must be finite and > 0, got {hybrid_bound=}")
        self.rational = TRRational(d_p, d_q, basis, **rational)
        self.hybrid_schedule = hybrid_schedule
        self.hybrid_bound = float(hybrid_bound)
        self.track_Q_values = track_Q_values
        self.statistics = NearPoleStatistics(pole_threshold=pole_threshold, hysteresis=hysteresis)
        self._delta: float | Tensor | None = None

    def begin_epoch(self, epoch: int) -> None:
        """Begin the statistics of an epoch; the schedule goes by its number, 0 until one has begun."""
        self.statistics.begin_epoch(epoch)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What `TRRational` answers, recorded."""
        P, Q = self.rational(x)
        if not is_transformed():
            self._delta = self._radius(Q)
            if self.training and self.track_Q_values:
                self.statistics.record(Q, self._delta)
        return P, Q

    def value_and_tag(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map x to what `quotient` makes of its tuple."""
        return self.quotient(*self(x))

    def quotient(self, P: Tensor, Q: Tensor) -> tuple[Tensor, Tensor]:
        """Return P/Q, NaN where it is not REAL, and the codes of `TRTag`.

        Only REAL answers send a gradient. Within the radius of the schedule it is that of a quotient that
        saturates: sign(Q)/√(Q² + b²) in P and −P/(Q² + b²) in Q, b = hybrid_bound, instead of 1/Q and −P/Q².
        """
        value, tag = real_quotient(P, Q, self.rational.tag_policy)
        delta = self._radius(Q)
        if delta is None:
            return value, tag
        near = (tag == TRTag.REAL) & (Q.detach().abs() <= delta)
        p, q = torch.where(near, P, torch.zeros_like(P)), torch.where(near, Q, torch.ones_like(Q))
        size = (q.detach().square() + self.hybrid_bound**2).rsqrt()
        surrogate = p * torch.copysign(size, q.detach()) - p.detach() * size.square() * q
        return torch.where(near, value.detach() + surrogate - surrogate.detach(), value), tag

    @property
    def hybrid_delta(self) -> float | Tensor | None:
        """The radius for the newest pass, as losses take it; None where gradients do not saturate."""
        return self._delta

    @property
    def lambda_rej(self) -> float | Tensor:
        """What the rational layer says."""
        return self.rational.lambda_rej

    def regularisation(self) -> Tensor:
        """What the rational layer says, 0-d."""
        return self.rational.regularisation()

    def bottom_capability(self, tau_infer: float) -> BottomCapability:
        """What the rational layer answers."""
        return self.rational.bottom_capability(tau_infer)

    def get_hybrid_statistics(self) -> dict[str, Any]:
        """Return the statistics of `NearPoleStatistics`, and of the schedule; waits for the device.

        Besides: current_epoch, local_threshold (the radius of the newest pass, or None), mode_description,
        and under their other names q_min_epoch, q_min_current (q_min_batch) and near_pole_ratio_layer.
        """
        found = self.statistics.statistics()
        schedule = self.hybrid_schedule
        return {
            **found,
            "current_epoch": self._epoch(),
            "local_threshold": None if self._delta is None else float(self._delta),
            "mode_description": "mask_real" if schedule is None else schedule.mode(self._epoch()),
            "q_min_epoch": found["q_min"],
            "q_min_current": found["q_min_batch"],
            "near_pole_ratio_layer": found["near_pole_ratio"],
        }

    def _epoch(self) -> int:
        return max(self.statistics.epoch, 0)

    @torch.no_grad()
    def _radius(self, Q: Tensor) -> float | Tensor | None:
        if self.hybrid_schedule is None:
            return None
        if not Q.numel():
            return self.hybrid_schedule.delta(self._epoch())
        size = Q.detach().abs()
        q_min = torch.where(torch.isfinite(size), size, math.inf).amin()
        return self.hybrid_schedule.delta(self._epoch(), q_min)


class FullyIntegratedRational(nn.Module):
    """A rational layer beside a head that names the tag of its answers and one that scores poles.

    Both heads take the argument itself as their one feature, (..., 1), and answer logits: (..., 4) and (...).
    """

    def __init__(
        self, rational: TRRational | HybridTRRational, *, tag_head: nn.Module, pole_head: nn.Module
    ) -> None:
        super().__init__()
        inner = rational.rational if isinstance(rational, HybridTRRational) else rational
        if inner.output_dim is not None:
            raise ValueError(f"rational must act on elements (output_dim None), got {inner.output_dim=}")
        self.rational = rational
        self.tag_head = tag_head
        self.pole_head = pole_head

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Map x to P and Q of its shape, and to "tag_logits" (..., 4) and "pole_score" (...) by name."""
        P, Q = self.rational(x)
        features = x.unsqueeze(-1)
        return P, Q, {"tag_logits": self.tag_head(features), "pole_score": self.pole_head(features)}

    def forward_fully_integrated(self, x: Tensor) -> dict[str, Tensor]:
        """Map x to everything that is known of it, by name, in its shape.

        output (NaN where not REAL), tag, tag_logits (..., 4), pole_score (logits), pole_probability, Q_value,
        Q_abs.

        Differs from zeroproof 0.1.0: Q_value and Q_abs are always there.
        """
        P, Q, named = self(x)
        output, tag = self.rational.quotient(P, Q)
        probability = torch.sigmoid(named["pole_score"])
        return {
            "output": output,
            "tag": tag,
            **named,
            "pole_probability": probability,
            "Q_value": Q,
            "Q_abs": Q.abs(),
        }

    def bottom_capability(self, tau_infer: float) -> BottomCapability:
        """What the rational layer answers."""
        return self.rational.bottom_capability(tau_infer)


def _between(ordered: Tensor, places: Tensor) -> Tensor:
    """The values at fractional places of an ordered tensor, linear between neighbours; never waits."""
    below = places.floor()
    left, right = torch.take(ordered, below.long()), torch.take(ordered, places.ceil().long())
    return torch.where(left == right, left, torch.lerp(left, right, places - below))
