"""A part of a task's data, as tensors: the rows to train on, to validate on or to test on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType

import torch
from torch import Tensor

from scm.training.targets import SemanticTargets


@dataclass(frozen=True)
class Split:
    """Rows of one part of the data: inputs (N, ...), their lifted targets, and what else a task keeps.

    Each of `extras` holds one entry a row, (N, ...), for metrics; training does not read them. Raises
    TypeError for targets that are not lifted, ValueError when the numbers of rows differ.
    """

    inputs: Tensor
    targets: SemanticTargets
    extras: Mapping[str, Tensor] = field(default_factory=lambda: MappingProxyType({}))

    def __post_init__(self) -> None:
        rows = len(self)
        if not isinstance(self.targets, SemanticTargets):
            raise TypeError(
                "targets must be what lift_semantic_targets(values, statuses) returns, "
                f"got {type(self.targets).__name__}"
            )
        if len(self.targets) != rows:
            raise ValueError(f"targets must have one entry a row, got {len(self.targets)} for {rows} rows")
        for name, extra in self.extras.items():
            if extra.ndim == 0 or extra.shape[0] != rows:
                shape = tuple(extra.shape)
                raise ValueError(f"extras must have one entry a row, got {name} {shape} for {rows} rows")

    def __len__(self) -> int:
        return int(self.inputs.shape[0])

    def take(self, rows: Tensor) -> Split:
        """Return the rows at these positions (int64), in this order."""
        extras = {name: extra[rows] for name, extra in self.extras.items()}
        return Split(self.inputs[rows], self.targets.index(rows), extras)

    def digest(self) -> str:
        """Return the SHA-256 of names, dtypes, shapes and bytes: equal for equal data on every machine."""
        hashed = hashlib.sha256()
        for name, tensor in self._named_tensors():
            hashed.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            hashed.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
        return hashed.hexdigest()

    def _named_tensors(self) -> list[tuple[str, Tensor]]:
        named = [("inputs", self.inputs)]
        named += [(f"targets.{item.name}", getattr(self.targets, item.name)) for item in fields(self.targets)]
        named += [(f"extras.{name}", self.extras[name]) for name in sorted(self.extras)]
        return named
