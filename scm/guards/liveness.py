"""Whether what was configured acts: weights that move the loss or a gradient, terms that are not idle.

For any PyTorch training: nothing here knows what the terms are. When a term counts as idle is decided in
`consistency`; which knobs of a sweep's plan act, by `scm-harness audit`, which trains.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from scm.guards.degenerate import DegenerateTermDetector

if TYPE_CHECKING:
    from scm.training.companion import Moment

Evaluate = Callable[[Mapping[str, float]], Tensor]
"""From weights by name to the 0-d loss of one and the same batch, with its graph."""


@dataclass(frozen=True, slots=True)
class WeightLiveness:
    """What one weight moves: relative changes of the loss and of the gradients' largest entry."""

    name: str
    loss_change: float
    gradient_change: float
    tolerance: float

    @property
    def alive(self) -> bool:
        """Whether either change is beyond rounding."""
        return self.loss_change > self.tolerance or self.gradient_change > self.tolerance

    @property
    def trains(self) -> bool:
        """Whether a gradient changes: a weight that moves the loss alone measures, and trains nothing."""
        return self.gradient_change > self.tolerance


def weight_liveness(
    evaluate: Evaluate,
    weights: Mapping[str, float],
    parameters: Iterable[Tensor],
    *,
    tolerance: float = 1e-9,
) -> dict[str, WeightLiveness]:
    """Move each weight in turn and say what that changes; by name, in the order of `weights`.

    A weight is doubled, one of 0 is set to 1, and the change is taken relative to the larger of the two
    losses (of the two gradients' largest entries). A term that is zero on this batch (a hinge that is met)
    looks dead on it: give a batch on which it should act, or judge by several.

    Raises ValueError when `evaluate` does not give the same loss twice for the same weights (dropout or noise
    that is not seeded), when a loss is not finite, and for no weights.

    >>> x = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    >>> loss = lambda weights: weights["fit"] * x**2 + 0.0 * weights["spread"]
    >>> found = weight_liveness(loss, {"fit": 1.0, "spread": 5.0}, [x])
    >>> [name for name, item in found.items() if not item.alive]
    ['spread']
    """
    if not weights:
        raise ValueError("weights must name at least one weight, got none")
    held = list(parameters)
    base = _measure(evaluate, weights, held)
    again = _measure(evaluate, weights, held)
    if max(_changes(base, again)) > tolerance:
        raise ValueError(
            "evaluate must give the same loss and gradients for the same weights; "
            f"it gave {base[0]!r} and {again[0]!r}: seed what it draws"
        )
    found = {}
    for name, value in weights.items():
        moved = {**weights, name: 2.0 * value if value else 1.0}
        loss_change, gradient_change = _changes(base, _measure(evaluate, moved, held))
        found[name] = WeightLiveness(name, loss_change, gradient_change, tolerance)
    return found


def dead_weights(
    evaluate: Evaluate,
    weights: Mapping[str, float],
    parameters: Iterable[Tensor],
    *,
    tolerance: float = 1e-9,
) -> list[str]:
    """Return the names of the weights that change neither loss nor gradient (see `weight_liveness`)."""
    found = weight_liveness(evaluate, weights, parameters, tolerance=tolerance)
    return [name for name, item in found.items() if not item.alive]


class TermWatch:
    """Watches every weighted term of a training, those of other companions too; a companion of `SCMTrainer`.

    `told()` names all terms, and says of those that were zero, constant or without a gradient for `patience`
    steps in a row which it was. `needs_terms=False` for a loss that comes as one number, whose parts are
    then not seen.
    """

    name = "term_watch"

    def __init__(self, patience: int, *, needs_terms: bool = True) -> None:
        self.needs_terms = needs_terms
        self._detector = DegenerateTermDetector(patience=patience)
        self._names: dict[str, None] = {}

    def after_backward(self, moment: Moment) -> None:
        """Look at the terms of the step, as they were trained."""
        assert moment.terms is not None
        total = moment.terms.total()
        for name, term in {"fit": moment.terms.task, **moment.terms.auxiliaries}.items():
            self._names[name] = None
            self._detector.observe(name, term, total)

    def told(self) -> dict[str, str]:
        """Return all terms by name, with what makes each idle, or "" where it acts; waits for the device."""
        return dict.fromkeys(self._names, "") | self._detector.findings()


_Measured = tuple[float, list[Tensor | None]]


def _measure(evaluate: Evaluate, weights: Mapping[str, float], parameters: list[Tensor]) -> _Measured:
    loss = evaluate(dict(weights))
    value = float(loss.detach())
    if not math.isfinite(value):
        raise ValueError(f"the loss must be finite to be compared, got {value} at {dict(weights)}")
    if not (loss.requires_grad and parameters):
        return value, [None] * len(parameters)
    return value, list(torch.autograd.grad(loss, parameters, allow_unused=True))


def _changes(one: _Measured, other: _Measured) -> tuple[float, float]:
    loss = _relative(abs(one[0] - other[0]), max(abs(one[0]), abs(other[0])))
    moved = size = 0.0
    for left, right in zip(one[1], other[1], strict=True):
        for gradient in (left, right):
            size = max(size, _largest(gradient))
        if left is not None and right is not None:
            moved = max(moved, _largest(left - right))
        elif left is not None or right is not None:  # no gradient is one of 0
            moved = max(moved, _largest(left if left is not None else right))
    return loss, _relative(moved, size)


def _largest(gradient: Tensor | None) -> float:
    return float(gradient.detach().abs().max()) if gradient is not None and gradient.numel() else 0.0


def _relative(change: float, size: float) -> float:
    return change / size if size else 0.0
