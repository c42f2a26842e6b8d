"""Terms of a loss that do nothing: found while they train, or asked beforehand whether inputs move them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from scm.losses.rowwise import check_at_least_zero


class DegenerateTermDetector:
    """Finds terms that are weighed and do nothing: 0, constant, or without a gradient, for `patience` steps.

    Zero is at most `tolerance` of the total loss: a term of 1e-7 that rounding keeps from 0 is one. Constant
    is the same value but for rounding. `observe` never waits for the device; `findings` does. A term whose
    weight is 0 should not be shown.
    """

    def __init__(self, *, patience: int = 20, tolerance: float = 1e-6) -> None:
        if patience < 1:
            raise ValueError(f"patience must be >= 1, got {patience=}")
        check_at_least_zero("tolerance", tolerance)
        self.patience = patience
        self.tolerance = tolerance
        self._seen: dict[str, _Watched] = {}

    def observe(self, name: str, term: Tensor, total: Tensor, *, gradient_norm: Tensor | None = None) -> None:
        """Look at one step: the weighted term and the whole loss, 0-d; the norm of its gradient, if known."""
        value, whole = term.detach().to(torch.float64), total.detach().abs().to(torch.float64)
        held = self._seen.get(name)
        if held is None:
            held = self._seen[name] = _Watched(torch.zeros(6, dtype=torch.float64, device=value.device))
        rounding = 8 * torch.finfo(term.dtype).eps
        is_zero = value.abs() <= self.tolerance * whole
        is_same = (held.previous - value).abs() <= rounding * value.abs()
        no_gradient = torch.zeros_like(is_zero) if gradient_norm is None else gradient_norm == 0
        if not term.requires_grad:
            no_gradient = torch.ones_like(is_zero)
        run = torch.stack([is_zero, is_same, no_gradient])
        runs = torch.where(run, held.runs + 1, 0.0)
        held.table = torch.cat([runs, torch.maximum(held.longest, runs)])
        held.previous = value

    def findings(self) -> dict[str, str]:
        """Return by name what was found since this was asked last: every term is told once, with a reason."""
        found = {}
        for name, held in self._seen.items():
            if held.told:
                continue
            longest = held.longest.tolist()
            for steps, reason in zip(longest, _REASONS, strict=True):
                if steps >= self.patience:
                    found[name] = f"{reason} for {int(steps)} steps"
                    held.told = True
                    break
        return found

    def found(self) -> list[str]:
        """Return the names of all terms that `findings` has told so far."""
        return [name for name, held in self._seen.items() if held.told]

    def state_dict(self) -> dict[str, Any]:
        """Return what the counts go on from."""
        return {
            name: {"table": held.table.clone(), "previous": held.previous.clone(), "told": held.told}
            for name, held in self._seen.items()
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self._seen = {name: _Watched(**item) for name, item in state.items()}


_REASONS = ("is zero", "is constant", "has no gradient")


class _Watched:
    """The newest runs and the longest ones of one term, on its device."""

    def __init__(self, table: Tensor, previous: Tensor | None = None, told: bool = False) -> None:
        self.table = table
        self.previous = torch.full((), math.nan, device=table.device) if previous is None else previous
        self.told = told

    @property
    def runs(self) -> Tensor:
        return self.table[:3]

    @property
    def longest(self) -> Tensor:
        return self.table[3:]


def responds(
    term: Callable[[Tensor], Tensor],
    inputs: Tensor,
    *,
    generator: torch.Generator | None = None,
    tolerance: float = 1e-6,
) -> bool:
    """Say whether a term is anything but 0, here or on inputs whose numbers are shuffled within each row.

    A term that is not, is one that no input moves: something in it does not depend on what it should. For
    terms that are 0 where nothing is wrong, on models that are not trained yet.
    """
    order = torch.randperm(inputs[0].numel(), generator=generator).to(inputs.device)
    shuffled = inputs.flatten(1)[:, order].reshape(inputs.shape)
    with torch.no_grad():
        values = torch.stack([term(inputs), term(shuffled)])
    return bool((values.abs() > tolerance).any())
