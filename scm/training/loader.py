"""Batches of tensors that already lie where the model is: no workers, no collation, no copy a step.

What order the rows come in is decided by a generator that the caller gives; what a batch is used for, by the
trainer. The position inside an epoch and the order are part of the state, so an interrupted epoch goes on
with the very rows that it would have seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from scm.training.targets import SemanticTargets

_BLOCK_BYTES = 64 * 2**20  # rows are gathered this many bytes at a time: few calls, and little extra memory


_FIELDS = tuple(item.name for item in fields(SemanticTargets))
_DERIVED = (
    "mask_trained",
    "mask_oriented",
    "mask_semantic",
)  # computed once for all rows, then gathered along


class TensorBatches:
    """Iterate over (inputs, SemanticTargets) in batches, again and again, from tensors kept on one device.

    `inputs` is (N, ...), `targets` has N entries. With a `generator` (on the CPU, so that every device sees
    the same order) each epoch takes its own permutation from it; without one the rows come as they stand.
    The last batch may be short, unless `drop_last`. A batch is a view of a block of gathered rows: writing
    into it does not change the data. Raises ValueError for no rows, for unequal numbers of rows, for
    batch_size < 1, and when `drop_last` would leave no batch.
    """

    def __init__(
        self,
        inputs: Tensor,
        targets: SemanticTargets,
        batch_size: int,
        generator: torch.Generator | None = None,
        device: str | torch.device | None = None,
        drop_last: bool = False,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be >= 1, got {batch_size=}")
        if len(targets) != len(inputs):
            raise ValueError(f"targets must have one entry a row, got {len(targets)} for {len(inputs)} rows")
        if len(inputs) == 0:
            raise ValueError("inputs must have at least one row, got 0")
        if drop_last and len(inputs) < batch_size:
            raise ValueError(f"drop_last leaves no batch, got {batch_size=} and {len(inputs)} rows")
        if generator is not None and generator.device.type != "cpu":
            raise ValueError(f"generator must be on the CPU, got {generator.device}")
        self.device = torch.device(inputs.device if device is None else device)
        self.inputs = inputs.to(self.device)
        self.targets = targets.to(self.device)
        self.batch_size = batch_size
        self.generator = generator
        self.drop_last = drop_last
        self._columns = [self.inputs, *(getattr(self.targets, name) for name in (*_FIELDS, *_DERIVED))]
        self._position = 0  # batches handed out in the epoch under way
        self._resume = False
        self._order_state = generator.get_state() if generator is not None else None

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""
        full, rest = divmod(self.rows, self.batch_size)
        return full if self.drop_last or not rest else full + 1

    @property
    def rows(self) -> int:
        """The number of rows that the data hold."""
        return int(self.inputs.shape[0])

    def __iter__(self) -> Iterator[tuple[Tensor, SemanticTargets]]:
        start = self._position if self._resume else 0
        self._resume = False
        self._position = start
        for batch in self.in_order(self._next_order(), start):
            self._position += 1
            yield batch
        self._position = 0
        self._order_state = self.generator.get_state() if self.generator is not None else None

    def in_order(self, order: Tensor | None, start: int = 0) -> Iterator[tuple[Tensor, SemanticTargets]]:
        """Yield an epoch's batches, from batch `start` on, of the rows `order` (None: as they stand).

        order: positions (rows,) on the data's device, int64. Neither place nor generator is moved.
        """
        count = len(self)
        for first in range(start, count, self._batches_per_block):
            last = min(first + self._batches_per_block, count)
            for batch in self._block(order, first, last):
                yield batch[0], _targets_of(batch[1:])

    def state_dict(self) -> dict[str, Any]:
        """Return the place in the epoch under way, and the generator as it was when that epoch began."""
        return {
            "rows": self.rows,
            "batch_size": self.batch_size,
            "drop_last": self.drop_last,
            "position": self._position,
            "order_state": None if self._order_state is None else self._order_state.clone(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on, at the next iteration, from where `state` was taken.

        Raises ValueError when the state is of other data or batches, or of another way of ordering.
        """
        for name in ("rows", "batch_size", "drop_last"):
            if state[name] != getattr(self, name):
                raise ValueError(f"{name} must be as saved ({state[name]}), got {getattr(self, name)}")
        saved = state["order_state"]
        if (saved is None) != (self.generator is None):
            raise ValueError(
                f"order must be {'fixed' if saved is None else 'drawn'} as saved, this loader's is not"
            )
        if self.generator is not None:
            self.generator.set_state(saved.cpu())
            self._order_state = saved.cpu().clone()
        self._position = int(state["position"])
        self._resume = self._position > 0

    def _next_order(self) -> Tensor | None:
        if self.generator is None:
            return None
        self._order_state = self.generator.get_state()
        return torch.randperm(self.rows, generator=self.generator).to(self.device)

    @property
    def _batches_per_block(self) -> int:
        row_bytes = sum(column[0].numel() * column.element_size() for column in self._columns)
        return max(1, _BLOCK_BYTES // max(1, row_bytes * self.batch_size))

    def _block(self, order: Tensor | None, first: int, last: int) -> Iterator[tuple[Tensor, ...]]:
        """Yield the batches [first, last): one gather and one split a column, whatever their number."""
        begin, end = first * self.batch_size, min(last * self.batch_size, self.rows)
        if order is None:
            gathered = [column[begin:end] for column in self._columns]
        else:
            rows = order[begin:end]
            gathered = [column.index_select(0, rows) for column in self._columns]
        return zip(*(column.split(self.batch_size) for column in gathered), strict=True)


def _targets_of(columns: tuple[Tensor, ...]) -> SemanticTargets:
    targets = SemanticTargets(*columns[: len(_FIELDS)])
    # Where a cached property keeps its value; the class itself would compute it again for each batch.
    targets.__dict__.update(zip(_DERIVED, columns[len(_FIELDS) :], strict=True))
    return targets
