"""Optimizer steps that are shortened where the quotient is too steep for them; no learning rate is touched.

What a step would be without it, is the optimizer's business; here, what share of it is taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from scm.guards.gates import RAW_OUTPUTS

if TYPE_CHECKING:
    from scm.training.companion import Moment
    from scm.training.records import EpochReport


class SafeStep:
    """Take of every optimizer step the share that the quotient's curvature allows, whatever the optimizer.

    The share is min(1, η_safe / η), η the learning rate and 1 / η_safe = (basis_bound² / q_min²)·(1 + y_max²)
    + alpha: how much the squared residual of P/Q bends, at most, in the coefficients of P and Q. q_min and
    y_max are the smallest |Q| and the largest |P/Q| of those of the group's answers that have a value (|Q| >=
    tau); basis_bound bounds what the coefficients multiply (None: no curvature is looked at); alpha is the
    curvature beside the loss; floor the smallest share, so that training slows near poles and never stands
    still. A step is computed in full and the weights go a share of it: learning rate, schedule and moments
    are as without. A full share is the optimizer's step, bit for bit. Nothing waits for the device; a second
    copy of the weights is kept.

    saturated: the share of answers at poles, asked after each epoch; where it was above `shrink_above`, the
    next epoch's shares are `shrink_by` of what they would be.

    telemetry, of the newest epoch: step_share, the mean; step_share_min; step_floored, the share of steps
    that curvature would have made shorter still.

    Differs from zeroproof 0.1.0: there the learning rate itself is overwritten, for good, and is 0 from the
    first Q = 0 on; and what should shrink it, reads numbers that were cleared before.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        basis_bound: float | None = 1.0,
        alpha: float = 1e-3,
        floor: float = 1e-3,
        saturated: Callable[[], float] | None = None,
        shrink_above: float = 0.3,
        shrink_by: float = 0.5,
    ) -> None:
        if basis_bound is not None and not (math.isfinite(basis_bound) and basis_bound > 0):
            raise ValueError(f"basis_bound must be finite and > 0, or None, got {basis_bound=}")
        if not (math.isfinite(alpha) and alpha >= 0):
            raise ValueError(f"alpha must be finite and >= 0, got {alpha=}")
        for name, share in (("floor", floor), ("shrink_by", shrink_by)):
            if not 0 < share <= 1:
                raise ValueError(f"{name} must be in (0, 1], got {name}={share!r}")
        if not 0 <= shrink_above <= 1:
            raise ValueError(f"shrink_above must be in [0, 1], got {shrink_above=}")
        self.basis_bound = basis_bound
        self.alpha = alpha
        self.floor = floor
        self.shrink_above = shrink_above
        self.shrink_by = shrink_by
        self._saturated = saturated
        self._shrink = 1.0
        self._steepest: Tensor | None = None  # of the group under way, on the device
        self._before: list[
            list[tuple[Tensor, Tensor]]
        ] = []  # by group: weights that move, and where they were
        self._told: Tensor | None = None  # of the epoch: sum of shares, least share, floored steps, steps
        optimizer.register_step_pre_hook(self._keep_weights)
        optimizer.register_step_post_hook(self._shorten)

    def begin_epoch(self, epoch: int, facts: dict[str, Any]) -> None:
        """Count anew."""
        self._told = None

    def after_backward(self, moment: Moment) -> None:
        """Take in how steep the quotient is at the micro-batch's answers."""
        if self.basis_bound is None:
            return
        P, Q = moment.found.get(RAW_OUTPUTS, moment.outputs)[:2]
        steepest = steepness(P, Q, tau=moment.facts["tau"], basis_bound=self.basis_bound) + self.alpha
        held = self._steepest
        self._steepest = steepest if held is None else torch.maximum(held.to(steepest.device), steepest)

    def after_epoch(self, report: EpochReport) -> None:
        """Decide whether the next epoch's steps are shrunk."""
        if self._saturated is not None:
            self._shrink = self.shrink_by if self._saturated() > self.shrink_above else 1.0

    def telemetry(self) -> dict[str, float]:
        """Return the shares of the newest epoch; NaN before there is a step."""
        if self._told is None:
            return dict.fromkeys(("step_share", "step_share_min", "step_floored"), math.nan)
        total, least, floored, steps = self._told.tolist()
        return {"step_share": total / steps, "step_share_min": least, "step_floored": floored / steps}

    def state_dict(self) -> dict[str, Any]:
        """Return what the group and the epoch under way have met."""
        held = {"steepest": self._steepest, "told": self._told}
        copied = {name: None if item is None else item.cpu().clone() for name, item in held.items()}
        return {**copied, "shrink": self._shrink}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""
        self._steepest, self._told = state["steepest"], state["told"]
        self._shrink = float(state["shrink"])

    def _keep_weights(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self._before = [
            [(item, item.detach().clone()) for item in group["params"] if item.grad is not None]
            for group in optimizer.param_groups
        ]

    @torch.no_grad()
    def _shorten(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group, weights in zip(optimizer.param_groups, self._before, strict=True):
            if not weights:
                continue
            allowed = self._allowed(group["lr"], weights[0][0].device)
            share = allowed.clamp(self.floor, 1.0) * self._shrink
            for weight, before in weights:
                weight.lerp_(before, (1.0 - share).to(weight.device, weight.dtype))
            self._tell(share, allowed < self.floor)
        self._before, self._steepest = [], None

    def _allowed(self, rate: float | Tensor, device: torch.device) -> Tensor:
        """What share of a step the curvature allows, float64."""
        if self._steepest is None:
            return torch.ones((), dtype=torch.float64, device=device)
        return 1.0 / (self._steepest.to(device) * rate)

    def _tell(self, share: Tensor, floored: Tensor) -> None:
        told = torch.stack([share, share, floored.to(share.dtype), torch.ones_like(share)])
        if self._told is not None:
            held = self._told.to(told.device)
            told = torch.stack([held[0] + told[0], torch.minimum(held[1], told[1]), *(held[2:] + told[2:])])
        self._told = told


def steepness(P: Tensor, Q: Tensor, *, tau: float | Tensor, basis_bound: float | Tensor = 1.0) -> Tensor:
    """Return (basis_bound² / q_min²)·(1 + y_max²) over the answers with a value (|Q| >= tau), 0-d, float64.

    0 where none has one. Never waits for a device.
    """
    p, q = P.detach().double(), Q.detach().double()
    while q.ndim < p.ndim:
        q = q.unsqueeze(-1)
    ratio = p / q
    known = (q.abs() >= tau) & torch.isfinite(ratio) & torch.isfinite(q)
    smallest = torch.where(known, q.abs(), torch.inf).amin()
    largest = torch.where(known, ratio.abs(), 0.0).amax()
    return (basis_bound / smallest).square() * (1.0 + largest.square())
