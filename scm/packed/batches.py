"""The rows of many trials, gathered for many steps at once, from data that lie on the device once.

Trials of one seed share their data, and all seeds of a task may. What order the rows come in is decided in
`streams`; what a row means, in `scm.training.targets`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields

import torch
from torch import Tensor

from scm.data import Split
from scm.training.targets import SemanticTargets

_FIELDS = tuple(item.name for item in fields(SemanticTargets))
_DERIVED = ("mask_trained", "mask_oriented", "mask_semantic")
COLUMNS: tuple[str, ...] = ("inputs", *_FIELDS, *_DERIVED)
"""What is known of each row, by name."""


class StackedSplit:
    """One split of every trial, as columns (rows of all distinct data, ...), each distinct split once.

    Raises ValueError for splits of unequal shapes.
    """

    def __init__(self, splits: Sequence[Split], dtype: torch.dtype, device: torch.device) -> None:
        distinct = {id(split): split for split in splits}
        places = {key: place for place, key in enumerate(distinct)}
        forms = {split_form(split) for split in distinct.values()}
        if len(forms) != 1:
            raise ValueError(f"the splits of a pack must have one shape, got {sorted(map(str, forms))}")
        self.rows = len(splits[0])
        self.place = torch.tensor([places[id(split)] for split in splits])  # of each trial's data
        parts = [split_columns(split, dtype) for split in distinct.values()]
        self.columns: dict[str, Tensor] = {
            name: (torch.cat([part[name] for part in parts]) if len(parts) > 1 else parts[0][name]).to(device)
            for name in COLUMNS
        }
        self.device = device

    def gather(
        self, rows: Tensor, names: Iterable[str], *, trials: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return columns of the rows (..., trials, n), positions in each trial's own split, in that shape.

        trials: which ones, all by default.
        """
        place = self.place if trials is None else self.place[trials]
        offset = place * self.rows
        flat = (rows + offset[:, None]).flatten().to(self.device)
        return {name: self.columns[name].index_select(0, flat).unflatten(0, rows.shape) for name in names}

    def row_bytes(self, names: Iterable[str]) -> int:
        """Return what one row of these columns takes."""
        return sum(self.columns[name][0].numel() * self.columns[name].element_size() for name in names)


def split_columns(split: Split, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return what training reads of a split, by the names of `COLUMNS`; floats in `dtype`."""
    targets = split.targets.to(dtype=dtype)
    inputs = split.inputs.to(dtype) if split.inputs.is_floating_point() else split.inputs
    return {"inputs": inputs, **{name: getattr(targets, name) for name in (*_FIELDS, *_DERIVED)}}


def split_form(split: Split) -> tuple[object, ...]:
    """Return what must be equal of splits whose trials are trained as one."""
    inputs, labels = split.inputs, split.targets.Y_n
    return (tuple(inputs.shape), str(inputs.dtype), tuple(labels.shape))


def semantic_targets(columns: Mapping[str, Tensor]) -> SemanticTargets:
    """Return the targets that columns hold, with what is derived of them."""
    targets = SemanticTargets(*(columns[name] for name in _FIELDS))
    # Where a cached property keeps its value; the class itself would compute it again for each batch.
    targets.__dict__.update({name: columns[name] for name in _DERIVED})
    return targets
