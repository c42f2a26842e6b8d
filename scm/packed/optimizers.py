"""Optimizers of many models at once: one row of weights a trial, and a trial's own settings for each row.

Every rule is torch's own. On the CPU each row goes through the fused kernel that `torch.optim` calls, which
costs least there; on other devices all rows take one step in a few operations, and nothing waits. What a
learning rate is in which epoch, and which trial takes a step at all, is decided by the caller.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from scm.trial_config import TrialConfig

EPSILON = 1e-8
"""What Adam and RMSprop add to the root of the mean square: torch's own default, no trial sets it."""
SMOOTHING = 0.99
"""The share of the old mean square in RMSprop's new one, torch's own default."""

State = dict[str, Tensor]
"""What an optimizer remembers, by name; the first dimension is the rows."""


class RowOptimizer(Protocol):
    """One rule on the rows of a matrix of weights, (rows, parameters), which it changes in place."""

    state: State

    def set_rates(self, rates: Sequence[float]) -> None:
        """Take the learning rates of the rows, until told others."""

    def step(self, gradients: Tensor, taken: Tensor | None = None) -> None:
        """Take a step with `gradients`, of the weights' shape and contiguous; may change them.

        taken: bool (rows,), None for all. A row that takes no step keeps weights and state as they are, and
        its gradient may be anything.
        """


class _Columns:
    """Numbers a row as columns (rows, 1), in the dtype of the weights."""

    def __init__(self, weights: Tensor) -> None:
        self._like = {"dtype": weights.dtype, "device": weights.device}

    def __call__(self, values: Tensor | Sequence[float]) -> Tensor:
        if isinstance(values, Tensor):
            return values.to(**self._like).unsqueeze(1)  # type: ignore[call-overload]
        return torch.tensor(list(values), dtype=torch.float64).to(**self._like).unsqueeze(1)  # type: ignore[call-overload]


def _wide(values: Iterable[float], device: torch.device) -> Tensor:
    return torch.tensor(list(values), dtype=torch.float64, device=device)


class Adam:
    """Adam of many rows; `decoupled` is AdamW."""

    def __init__(
        self, weights: Tensor, settings: Sequence[TrialConfig], *, decoupled: bool, by_row: bool | None = None
    ) -> None:
        self.weights = weights
        self.decoupled = decoupled
        self.by_row = weights.device.type == "cpu" if by_row is None else by_row
        rows = len(weights)
        self.state: State = {
            "first": torch.zeros(weights.shape, dtype=weights.dtype, device=weights.device),
            "second": torch.zeros(weights.shape, dtype=weights.dtype, device=weights.device),
            "steps": torch.zeros(rows, dtype=torch.float32, device=weights.device),
        }
        self._kernel: Callable[..., Any] = torch._fused_adamw_ if decoupled else torch._fused_adam_
        self._settings = [(item.beta1, item.beta2, item.weight_decay) for item in settings]
        self._calls = _RowCalls(weights, self._call)
        if not self.by_row:
            column = _Columns(weights)
            beta1, beta2, decay = zip(*self._settings, strict=True)
            self._beta1, self._beta2, self._decay = column(beta1), column(beta2), column(decay)
            self._wide_betas = _wide(beta1, weights.device), _wide(beta2, weights.device)
            self._decays = any(decay)

    def set_rates(self, rates: Sequence[float]) -> None:
        if self.by_row:
            kinds = [(rate, *own) for rate, own in zip(rates, self._settings, strict=True)]
            self._calls.sort(kinds)
            return
        self._rates = _wide(rates, self.weights.device)

    def step(self, gradients: Tensor, taken: Tensor | None = None) -> None:
        if not self.by_row:
            self._step_together(gradients, taken)
            return
        steps = self.state["steps"]
        steps += 1 if taken is None else taken
        self._calls.make((gradients, self.state["first"], self.state["second"], steps), taken)

    def _call(
        self,
        kind: tuple[float, float, float, float],
        weights: list[Tensor],
        gradients: list[Tensor],
        first: list[Tensor],
        second: list[Tensor],
        steps: list[Tensor],
    ) -> Callable[[], Any]:
        rate, beta1, beta2, decay = kind
        told = {"lr": rate, "beta1": beta1, "beta2": beta2, "weight_decay": decay, "eps": EPSILON}
        none: list[Tensor] = []
        matrices = (weights, gradients, first, second, none, steps)
        return functools.partial(self._kernel, *matrices, **told, amsgrad=False, maximize=False)

    def _step_together(self, gradients: Tensor, taken: Tensor | None) -> None:
        weights, first, second, steps = self.weights, *self.state.values()
        column = _Columns(weights)
        rates, keep1, keep2 = self._rates, self._beta1, self._beta2
        if taken is not None:
            # A row that stays where it is has a gradient of 0, a rate of 0 and forgets nothing.
            gradients = torch.where(taken[:, None], gradients, 0.0)
            rates = torch.where(taken, rates, 0.0)
            keep1 = torch.where(taken[:, None], keep1, 1.0)
            keep2 = torch.where(taken[:, None], keep2, 1.0)
        steps += 1 if taken is None else taken
        if self._decays and self.decoupled:
            weights.mul_(1.0 - column(rates) * self._decay)
        elif self._decays:
            gradients = torch.addcmul(gradients, weights, self._decay)
        first.lerp_(gradients, 1.0 - keep1)
        second.mul_(keep2).addcmul_(gradients, gradients * (1.0 - keep2))
        counted = steps.clamp(min=1).double()
        beta1, beta2 = self._wide_betas
        size = rates / (1.0 - beta1**counted)
        spread = (1.0 - beta2**counted).sqrt()
        weights.sub_(first / (second.sqrt() / column(spread) + EPSILON) * column(size))


class SGD:
    """Stochastic gradient descent of many rows, with momentum (also Nesterov's) where a row has any."""

    def __init__(
        self, weights: Tensor, settings: Sequence[TrialConfig], *, by_row: bool | None = None
    ) -> None:
        self.weights = weights
        self.by_row = weights.device.type == "cpu" if by_row is None else by_row
        self._settings = [(item.momentum, item.weight_decay, item.nesterov) for item in settings]
        momentum, decay, nesterov = zip(*self._settings, strict=True)
        self._has_momentum, self._decays = any(momentum), any(decay)
        self.state: State = {"steps": torch.zeros(len(weights), dtype=torch.float32, device=weights.device)}
        if self._has_momentum:
            self.state["velocity"] = torch.zeros(weights.shape, dtype=weights.dtype, device=weights.device)
        self._calls = _RowCalls(weights, self._call)
        if not self.by_row:
            column = _Columns(weights)
            self._momentum, self._decay = column(momentum), column(decay)
            self._nesterov = torch.tensor(nesterov, device=weights.device)[:, None]

    def set_rates(self, rates: Sequence[float]) -> None:
        if self.by_row:
            self._kinds = [(rate, *own) for rate, own in zip(rates, self._settings, strict=True)]
            self._begun: list[bool] | None = None
            return
        self._rates = _wide(rates, self.weights.device)

    def step(self, gradients: Tensor, taken: Tensor | None = None) -> None:
        steps = self.state["steps"]
        if not self.by_row:
            self._step_together(gradients, taken)
            return
        if self._begun is None or not all(self._begun):  # the first step of a row begins its velocity
            self._begun = (steps > 0).tolist()
            kinds = zip(self._kinds, self._begun, strict=True)
            self._calls.sort([(*kind, begun) for kind, begun in kinds])
        steps += 1 if taken is None else taken
        self._calls.make((gradients, self.state.get("velocity", gradients)), taken)

    def _call(
        self,
        kind: tuple[float, float, float, bool, bool],
        weights: list[Tensor],
        gradients: list[Tensor],
        velocity: list[Tensor],
    ) -> Callable[[], Any]:
        rate, momentum, decay, nesterov, begun = kind
        matrices = (weights, gradients, velocity if momentum else [])
        told = {"lr": rate, "momentum": momentum, "weight_decay": decay, "nesterov": nesterov}
        plain = {"dampening": 0.0, "maximize": False, "is_first_step": not begun}
        return functools.partial(torch._fused_sgd_, *matrices, **told, **plain)

    def _step_together(self, gradients: Tensor, taken: Tensor | None) -> None:
        weights, steps = self.weights, self.state["steps"]
        rates = self._rates
        if taken is not None:
            gradients = torch.where(taken[:, None], gradients, 0.0)
            rates = torch.where(taken, rates, 0.0)
        if self._decays:
            gradients = torch.addcmul(gradients, weights, self._decay)
        if self._has_momentum:
            velocity = self.state["velocity"]
            moved = torch.addcmul(gradients, velocity, self._momentum)
            moved = torch.where(steps[:, None] > 0, moved, gradients)
            if taken is not None:
                moved = torch.where(taken[:, None], moved, velocity)
            velocity.copy_(moved)
            ahead = torch.addcmul(gradients, velocity, self._momentum)
            with_velocity = torch.where(self._nesterov, ahead, velocity)
            gradients = torch.where(self._momentum > 0, with_velocity, gradients)
        steps += 1 if taken is None else taken
        weights.sub_(gradients * _Columns(weights)(rates))


class RMSprop:
    """RMSprop of many rows, with momentum where a row has any; torch has no fused kernel of it."""

    def __init__(
        self, weights: Tensor, settings: Sequence[TrialConfig], *, by_row: bool | None = None
    ) -> None:
        self.weights = weights
        column = _Columns(weights)
        self._momentum = column([item.momentum for item in settings])
        self._decay = column([item.weight_decay for item in settings])
        self._has_momentum = any(item.momentum for item in settings)
        self._decays = any(item.weight_decay for item in settings)
        self.state: State = {"square": torch.zeros(weights.shape, dtype=weights.dtype, device=weights.device)}
        if self._has_momentum:
            self.state["velocity"] = torch.zeros_like(self.state["square"])

    def set_rates(self, rates: Sequence[float]) -> None:
        self._rates = _Columns(self.weights)(rates)

    def step(self, gradients: Tensor, taken: Tensor | None = None) -> None:
        weights, square, rates = self.weights, self.state["square"], self._rates
        keep: Tensor | float = SMOOTHING
        momentum = self._momentum
        if taken is not None:
            taken = taken[:, None]
            gradients = torch.where(taken, gradients, 0.0)
            rates = torch.where(taken, rates, 0.0)
            keep = torch.where(taken, torch.full_like(rates, SMOOTHING), 1.0)
        if self._decays:
            gradients = torch.addcmul(gradients, weights, self._decay)
        if isinstance(keep, float):
            square.mul_(keep).addcmul_(gradients, gradients, value=1.0 - keep)
        else:
            square.mul_(keep).addcmul_(gradients, gradients * (1.0 - keep))
        ahead = gradients / (square.sqrt() + EPSILON)
        if self._has_momentum:
            velocity = self.state["velocity"]
            moved = torch.addcmul(ahead, velocity, momentum)
            velocity.copy_(moved if taken is None else torch.where(taken, moved, velocity))
            ahead = torch.where(momentum > 0, velocity, ahead)
        weights.sub_(ahead * rates)


class _RowCalls:
    """The calls of a fused kernel, ready to be made: rows with equal settings share one."""

    def __init__(self, weights: Tensor, call: Callable[..., Callable[[], Any]]) -> None:
        """`call` makes one from what a kind of rows is told, and the lists of its rows of each matrix."""
        self._weights = list(weights.unbind(0))
        self._call = call
        self._matrices: tuple[Tensor, ...] = ()
        self._rows: list[list[Tensor]] = []
        self._groups: dict[Any, list[int]] = {}
        self._calls: list[Callable[[], Any]] | None = None

    def sort(self, kinds: Sequence[Any]) -> None:
        """Take what the kernel is told of each row."""
        self._groups = {}
        for row, kind in enumerate(kinds):
            self._groups.setdefault(kind, []).append(row)
        self._calls = None

    def make(self, matrices: tuple[Tensor, ...], taken: Tensor | None) -> None:
        """Call the kernel with the weights and the rows of `matrices`, for those that are `taken`."""
        held = self._matrices
        if len(matrices) != len(held) or any(a is not b for a, b in zip(matrices, held, strict=True)):
            self._matrices, self._calls = matrices, None
            self._rows = [self._weights, *(list(matrix.unbind(0)) for matrix in matrices)]
        if taken is not None:
            stays = set((~taken).nonzero().flatten().tolist())
            for kind, rows in self._groups.items():
                left = [row for row in rows if row not in stays]
                if left:
                    self._of(kind, left)()
            return
        if self._calls is None:
            self._calls = [self._of(kind, rows) for kind, rows in self._groups.items()]
        for call in self._calls:
            call()

    def _of(self, kind: Any, rows: Sequence[int]) -> Callable[[], Any]:
        return self._call(kind, *([held[row] for row in rows] for held in self._rows))


def _adam(weights: Tensor, settings: Sequence[TrialConfig], by_row: bool | None) -> RowOptimizer:
    return Adam(weights, settings, decoupled=False, by_row=by_row)


def _adamw(weights: Tensor, settings: Sequence[TrialConfig], by_row: bool | None) -> RowOptimizer:
    return Adam(weights, settings, decoupled=True, by_row=by_row)


def _sgd(weights: Tensor, settings: Sequence[TrialConfig], by_row: bool | None) -> RowOptimizer:
    return SGD(weights, settings, by_row=by_row)


def _rmsprop(weights: Tensor, settings: Sequence[TrialConfig], by_row: bool | None) -> RowOptimizer:
    return RMSprop(weights, settings, by_row=by_row)


ROW_OPTIMIZERS: Mapping[str, Callable[[Tensor, Sequence[TrialConfig], bool | None], RowOptimizer]] = {
    "adam": _adam,
    "adamw": _adamw,
    "sgd": _sgd,
    "rmsprop": _rmsprop,
}
"""By the config's word: the weights of rows, their settings, and whether rows are stepped one by one."""


class PackOptimizer:
    """The optimizers of a pack: neighbouring rows with one rule share one `RowOptimizer`.

    states: what each row's optimizer remembers of another arrangement of the rows, {} for a new row.
    """

    def __init__(
        self,
        weights: Tensor,
        settings: Sequence[TrialConfig],
        states: Sequence[State],
        *,
        by_row: bool | None = None,
    ) -> None:
        self._runs: list[tuple[slice, RowOptimizer]] = []
        start = 0
        for kind, run in itertools.groupby(settings, key=lambda item: item.optimizer):
            own = list(run)
            where = slice(start, start + len(own))
            made = ROW_OPTIMIZERS[kind](weights[where], own, by_row)
            for row, state in enumerate(states[where]):
                for name, held in state.items():
                    if name in made.state:
                        made.state[name][row] = held
            self._runs.append((where, made))
            start += len(own)
        self._seen: Tensor | None = None
        self._parts: list[Tensor] = []

    def set_rates(self, rates: Sequence[float]) -> None:
        """Take the learning rates of all rows."""
        for where, optimizer in self._runs:
            optimizer.set_rates(rates[where])

    def step(self, gradients: Tensor, taken: Tensor | None = None) -> None:
        """Take a step of every row, or of those that are `taken`."""
        if gradients is not self._seen:
            self._seen, self._parts = gradients, [gradients[where] for where, _ in self._runs]
        for (where, optimizer), part in zip(self._runs, self._parts, strict=True):
            optimizer.step(part, None if taken is None else taken[where])

    def states(self) -> list[State]:
        """Return what is remembered of each row."""
        return [
            {name: held[row] for name, held in optimizer.state.items()}
            for where, optimizer in self._runs
            for row in range(where.stop - where.start)
        ]
