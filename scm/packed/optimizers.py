"""Optimizers of many models at once: one row of weights a trial, and a trial's own settings for each row.

Every rule is torch's own. On the CPU each row goes through the fused kernel that `torch.optim` calls, which
costs least there without a compiler; else all rows take one step in a few operations, and nothing waits.
What a learning rate is in which epoch, and which trial takes a step at all, is decided by the caller.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from scm.packed.row_kernels import RowKernel, rule_library
from scm.packed.toolchain import ToolchainError
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


Rule = Callable[..., None]
"""A step of all rows at once, in place: of tensors and plain flags, so that it may be compiled."""


def _column(values: Tensor, like: Tensor) -> Tensor:
    """Return one number a row, (rows,) float64, as a column in the dtype of the weights."""
    return values.to(like.dtype).unsqueeze(1)


def adam_rows(
    weights: Tensor,
    gradients: Tensor,
    first: Tensor,
    second: Tensor,
    steps: Tensor,
    rates: Tensor,
    beta1: Tensor,
    beta2: Tensor,
    decay: Tensor,
    taken: Tensor | None,
    *,
    decoupled: bool,
    decays: bool,
) -> None:
    """A step of Adam, or of AdamW (`decoupled`); what is said of a row is (rows,) float64.

    In a row that is not `taken` the gradient counts as 0, the rate is 0 and nothing is forgotten.
    """
    gain1, gain2, keep2 = 1.0 - beta1, 1.0 - beta2, beta2
    if taken is not None:
        gradients = torch.where(taken[:, None], gradients, 0.0)
        rates, gain1, gain2 = (torch.where(taken, item, 0.0) for item in (rates, gain1, gain2))
        keep2 = torch.where(taken, keep2, 1.0)
    steps += 1 if taken is None else taken
    if decays and decoupled:
        weights.mul_(_column(1.0 - rates * decay, weights))
    elif decays:
        gradients = torch.addcmul(gradients, weights, _column(decay, weights))
    first.lerp_(gradients, _column(gain1, weights))
    second.mul_(_column(keep2, weights)).addcmul_(gradients, gradients * _column(gain2, weights))
    counted = steps.clamp(min=1).double()
    size = rates / (1.0 - beta1**counted)
    spread = (1.0 - beta2**counted).sqrt()
    weights.sub_(first / (second.sqrt() / _column(spread, weights) + EPSILON) * _column(size, weights))


def sgd_rows(
    weights: Tensor,
    gradients: Tensor,
    velocity: Tensor | None,
    steps: Tensor,
    rates: Tensor,
    momentum: Tensor,
    nesterov: Tensor,
    decay: Tensor,
    taken: Tensor | None,
    *,
    decays: bool,
) -> None:
    """A step of gradient descent; `velocity` None: no row has momentum. nesterov: bool (rows,)."""
    if taken is not None:
        gradients = torch.where(taken[:, None], gradients, 0.0)
        rates = torch.where(taken, rates, 0.0)
    if decays:
        gradients = torch.addcmul(gradients, weights, _column(decay, weights))
    if velocity is not None:
        kept = _column(momentum, weights)
        moved = torch.where(steps[:, None] > 0, torch.addcmul(gradients, velocity, kept), gradients)
        velocity.copy_(moved if taken is None else torch.where(taken[:, None], moved, velocity))
        ahead = torch.where(nesterov[:, None], torch.addcmul(gradients, velocity, kept), velocity)
        gradients = torch.where(kept > 0, ahead, gradients)
    steps += 1 if taken is None else taken
    weights.sub_(gradients * _column(rates, weights))


def rmsprop_rows(
    weights: Tensor,
    gradients: Tensor,
    square: Tensor,
    velocity: Tensor | None,
    rates: Tensor,
    momentum: Tensor,
    decay: Tensor,
    taken: Tensor | None,
    *,
    decays: bool,
) -> None:
    """A step of RMSprop; `velocity` None: no row has momentum."""
    if taken is not None:
        gradients = torch.where(taken[:, None], gradients, 0.0)
        rates = torch.where(taken, rates, 0.0)
    if decays:
        gradients = torch.addcmul(gradients, weights, _column(decay, weights))
    if taken is None:
        square.mul_(SMOOTHING).addcmul_(gradients, gradients, value=1.0 - SMOOTHING)
    else:
        moved = (square * SMOOTHING).addcmul_(gradients, gradients, value=1.0 - SMOOTHING)
        square.copy_(torch.where(taken[:, None], moved, square))
    ahead = gradients / (square.sqrt() + EPSILON)
    if velocity is not None:
        kept = _column(momentum, weights)
        moved = torch.addcmul(ahead, velocity, kept)
        velocity.copy_(moved if taken is None else torch.where(taken[:, None], moved, velocity))
        ahead = torch.where(kept > 0, velocity, ahead)
    weights.sub_(ahead * _column(rates, weights))


class _RowOptimizer:
    """What all of them hold: weights, state, and the numbers of each row by name, (rows,) float64."""

    def __init__(
        self, weights: Tensor, settings: Sequence[TrialConfig], way: Way, names: Sequence[str], rule: Rule
    ) -> None:
        self.weights = weights
        self.state: State = {}
        self._by_row = way.by_row
        self._native = way.native
        self._kernel_of_rows: RowKernel | None = None
        self._rule = _compiled(rule) if way.compiled else rule
        self._numbers = {name: self._of_rows(getattr(item, name) for item in settings) for name in names}
        self._rates = torch.zeros(len(weights), dtype=torch.float64, device=weights.device)
        self._decays = any(item.weight_decay for item in settings)

    def set_rates(self, rates: Sequence[float]) -> None:
        """Take the learning rates of the rows, until told others."""
        self._rates.copy_(self._of_rows(rates))

    def _machine(self, rule: str, tensors: Sequence[Tensor | None], told: int = 0) -> RowKernel:
        """Return the rule as machine code, made at the first step."""
        if self._kernel_of_rows is None:
            options = {"epsilon": EPSILON, "smoothing": SMOOTHING}
            self._kernel_of_rows = RowKernel(rule, self.weights, tensors, told, **options)
        return self._kernel_of_rows

    def _of_rows(self, values: Iterable[float]) -> Tensor:
        return torch.tensor(list(values), dtype=torch.float64, device=self.weights.device)

    def _count(self, name: str = "steps") -> Tensor:
        like = {"dtype": torch.float32, "device": self.weights.device}
        return self.state.setdefault(name, torch.zeros(len(self.weights), **like))  # type: ignore[call-overload]

    def _zeros(self, name: str) -> Tensor:
        return self.state.setdefault(name, torch.zeros_like(self.weights))


class Adam(_RowOptimizer):
    """Adam of many rows; `decoupled` is AdamW."""

    def __init__(
        self, weights: Tensor, settings: Sequence[TrialConfig], way: Way, *, decoupled: bool
    ) -> None:
        super().__init__(weights, settings, way, ("beta1", "beta2", "weight_decay"), adam_rows)
        self.decoupled = decoupled
        self._first, self._second, self._steps = self._zeros("first"), self._zeros("second"), self._count()
        self._kernel: Callable[..., Any] = torch._fused_adamw_ if decoupled else torch._fused_adam_
        self._settings = [(item.beta1, item.beta2, item.weight_decay) for item in settings]
        self._calls = _RowCalls(weights, self._call)

    def set_rates(self, rates: Sequence[float]) -> None:
        super().set_rates(rates)
        if self._by_row:
            self._calls.sort([(rate, *own) for rate, own in zip(rates, self._settings, strict=True)])

    def step(self, gradients: Tensor, taken: Tensor | None = None) -> None:
        first, second, steps = self._first, self._second, self._steps
        beta1, beta2, decay = self._numbers.values()
        if self._native:
            held = (first, second, steps, self._rates, beta1, beta2, decay)
            self._machine("adam", held, int(self.decoupled)).step(gradients, taken)
            return
        if self._by_row:
            steps += 1 if taken is None else taken
            self._calls.make((gradients, first, second, steps), taken)
            return
        told = (self.weights, gradients, first, second, steps, self._rates, beta1, beta2, decay, taken)
        self._rule(*told, decoupled=self.decoupled, decays=self._decays)

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
        none: list[Tensor] = []
        matrices = (weights, gradients, first, second, none, steps)
        told = {"lr": rate, "beta1": beta1, "beta2": beta2, "weight_decay": decay, "eps": EPSILON}
        return functools.partial(self._kernel, *matrices, **told, amsgrad=False, maximize=False)


class SGD(_RowOptimizer):
    """Stochastic gradient descent of many rows, with momentum (also Nesterov's) where a row has any."""

    def __init__(self, weights: Tensor, settings: Sequence[TrialConfig], way: Way) -> None:
        super().__init__(weights, settings, way, ("momentum", "weight_decay"), sgd_rows)
        self._settings = [(item.momentum, item.weight_decay, item.nesterov) for item in settings]
        self._steps = self._count()
        self._velocity = self._zeros("velocity") if any(item.momentum for item in settings) else None
        self._nesterov = torch.tensor([item.nesterov for item in settings], device=weights.device)
        self._calls = _RowCalls(weights, self._call)

    def set_rates(self, rates: Sequence[float]) -> None:
        super().set_rates(rates)
        self._kinds = [(rate, *own) for rate, own in zip(rates, self._settings, strict=True)]
        self._begun: list[bool] = []

    def step(self, gradients: Tensor, taken: Tensor | None = None) -> None:
        velocity, steps = self._velocity, self._steps
        momentum, decay = self._numbers.values()
        if self._native:
            held = (velocity, steps, self._rates, momentum, decay, self._nesterov)
            self._machine("sgd", held).step(gradients, taken)
            return
        if self._by_row:
            if not self._begun or not all(self._begun):  # the first step of a row begins its velocity
                self._begun = (steps > 0).tolist()
                kinds = zip(self._kinds, self._begun, strict=True)
                self._calls.sort([(*kind, begun) for kind, begun in kinds])
            steps += 1 if taken is None else taken
            self._calls.make((gradients, gradients if velocity is None else velocity), taken)
            return
        told = (self.weights, gradients, velocity, steps, self._rates, momentum, self._nesterov, decay)
        self._rule(*told, taken, decays=self._decays)

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


class RMSprop(_RowOptimizer):
    """RMSprop of many rows, with momentum where a row has any; torch has no fused kernel of it."""

    def __init__(self, weights: Tensor, settings: Sequence[TrialConfig], way: Way) -> None:
        super().__init__(weights, settings, way, ("momentum", "weight_decay"), rmsprop_rows)
        self._square = self._zeros("square")
        self._velocity = self._zeros("velocity") if any(item.momentum for item in settings) else None

    def step(self, gradients: Tensor, taken: Tensor | None = None) -> None:
        momentum, decay = self._numbers.values()
        if self._native:
            held = (self._square, self._velocity, self._rates, momentum, decay)
            self._machine("rmsprop", held).step(gradients, taken)
            return
        told = (self.weights, gradients, self._square, self._velocity, self._rates, momentum, decay, taken)
        self._rule(*told, decays=self._decays)


class Way(NamedTuple):
    """How steps are taken: row by row through torch's fused kernels, or all at once, perhaps compiled.

    native: row by row as machine code instead, see `row_kernels`.
    """

    by_row: bool
    compiled: bool = False
    native: bool = False


def has_native_way() -> bool:
    """Say whether steps can be taken as machine code here."""
    try:
        rule_library(EPSILON, SMOOTHING)
    except ToolchainError:
        return False
    return True


def usual_way(device: torch.device, *, compiled: bool = False, native: bool = False) -> Way:
    """Return the way that costs least on a device; `native` is for the CPU."""
    return Way(device.type == "cpu" and not compiled and not native, compiled, native)


@functools.lru_cache(maxsize=8)
def _compiled(rule: Rule) -> Rule:
    made: Rule = torch.compile(rule, dynamic=True)
    return made


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


def _adam(weights: Tensor, settings: Sequence[TrialConfig], way: Way) -> RowOptimizer:
    return Adam(weights, settings, way, decoupled=False)


def _adamw(weights: Tensor, settings: Sequence[TrialConfig], way: Way) -> RowOptimizer:
    return Adam(weights, settings, way, decoupled=True)


ROW_OPTIMIZERS: Mapping[str, Callable[[Tensor, Sequence[TrialConfig], Way], RowOptimizer]] = {
    "adam": _adam,
    "adamw": _adamw,
    "sgd": SGD,
    "rmsprop": RMSprop,
}
"""By the config's word: the optimizer of rows with these settings, and how it takes its steps."""


class PackOptimizer:
    """The optimizers of a pack: neighbouring rows with one rule share one `RowOptimizer`.

    states: what each row's optimizer remembers of another arrangement of the rows, {} for a new row.
    """

    def __init__(
        self,
        weights: Tensor,
        settings: Sequence[TrialConfig],
        states: Sequence[State],
        way: Way | None = None,
    ) -> None:
        way = usual_way(weights.device) if way is None else way
        self._runs: list[tuple[slice, RowOptimizer]] = []
        start = 0
        for kind, run in itertools.groupby(settings, key=lambda item: item.optimizer):
            own = list(run)
            where = slice(start, start + len(own))
            made = ROW_OPTIMIZERS[kind](weights[where], own, way)
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
