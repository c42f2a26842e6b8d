"""A loss in its parts: the task's own term and the named, weighted terms beside it.

A loss function may return this instead of a scalar tensor; the trainer trains the total. What scales the
parts is decided by whoever holds them (a budget, a curriculum).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class LossTerms:
    """`task` and `auxiliaries` by name, 0-d tensors with their graphs, every one already weighted."""

    task: Tensor
    auxiliaries: dict[str, Tensor] = field(default_factory=dict)

    def total(self) -> Tensor:
        """Return the sum of all terms, 0-d."""
        total = self.task
        for term in self.auxiliaries.values():
            total = total + term
        return total
