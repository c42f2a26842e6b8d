"""What the models of a pack answer on held-out rows, decoded strictly, each at its own threshold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from scm.inference.strict import InferenceConfig, strict_inference
from scm.training.validation import validation_metrics
from scm.trial import Decoded


class PackDecoded(NamedTuple):
    """The strict answers of every trial on a split, on the CPU: `Decoded` with the trials before the rows."""

    keys: tuple[str, ...]
    decoded: Tensor
    bottom: Tensor
    fault: Tensor
    q_abs: Tensor
    numerator: Tensor

    @classmethod
    def joined(cls, keys: tuple[str, ...], parts: Sequence[tuple[Tensor, ...]]) -> PackDecoded:
        """Join what `decode_rows` gave of parts of the rows."""
        columns = (torch.cat(column, dim=1) for column in zip(*parts, strict=True))
        return cls(keys, *(column.cpu() for column in columns))

    def of(self, key: str) -> Decoded:
        """Return the answers of one trial."""
        place = self.keys.index(key)
        return Decoded(*(column[place] for column in self[1:]))


class Validated(NamedTuple):
    """What the validation of one trial found, batch by batch: see `validation_numbers`."""

    table: list[list[float]]
    sizes: list[int]
    tau_infer: float
    loss: float
    coverage: float
    faults: int

    def metrics(self) -> dict[str, float]:
        """Return what `scm.training.validation` says of the same batches."""
        return validation_metrics(self.table, self.sizes, self.tau_infer)


def validated_trials(numbers: Tensor, sizes: list[int], taus: Sequence[float]) -> list[Validated]:
    """Return each trial's validation from what `validation_numbers` gave, (trials, batches, 7)."""
    rows = torch.tensor(sizes, dtype=torch.float64, device=numbers.device)
    losses = numbers[..., 0]
    finite = torch.isfinite(losses)
    # Batch after batch, as `validation_metrics` adds them: the sum is the same to the last bit.
    weighed: Tensor = sum(torch.where(finite, losses * rows, 0.0).unbind(1), start=losses.new_zeros(()))
    weight = (finite * rows).sum(1)
    # 0 over no finite batch is nan, as it is there.
    told = torch.stack([weighed / weight, 1.0 - numbers[..., 2].sum(1) / numbers[..., 1].sum(1)], dim=1)
    faults = numbers[..., 6].sum(1).tolist()
    held = zip(numbers.tolist(), taus, told.tolist(), faults, strict=True)
    return [Validated(table, sizes, tau, own[0], own[1], int(bad)) for table, tau, own, bad in held]


def decode_rows(P: Tensor, Q: Tensor, taus: Sequence[float]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return decoded, bottom, fault, |Q| and P of answers (trials, rows, ...), each trial at its own tau."""
    distinct = dict.fromkeys(taus)
    parts = []
    places = []
    for tau in distinct:
        own = [place for place, its in enumerate(taus) if its == tau]
        where = torch.tensor(own, device=P.device)
        held = (P, Q) if len(own) == len(taus) else (P.index_select(0, where), Q.index_select(0, where))
        result = strict_inference(*held, InferenceConfig(tau_infer=tau))
        parts.append((result.decoded, result.bottom_mask, result.fault_mask))
        places.append(where)
    if len(parts) == 1:
        return (*parts[0], Q.abs(), P)
    back = torch.cat(places).argsort()
    columns = zip(*parts, strict=True)
    decoded, bottom, fault = (torch.cat(column).index_select(0, back) for column in columns)
    return decoded, bottom, fault, Q.abs(), P


def validation_numbers(loss: Tensor, P: Tensor, Q: Tensor, bottom: Tensor, fault: Tensor) -> Tensor:
    """Return of each trial what `scm.training.validation` makes of a batch: (trials, 7) float64.

    Loss, samples, bottoms, least |Q|, sum of |Q|, number of finite |Q|, samples with bad outputs.
    """
    size = Q.abs().flatten(1)
    finite = torch.isfinite(size)
    if bottom.ndim > 2:
        bottom, fault = bottom.any(-1), fault.any(-1)
    bottom, fault = bottom.flatten(1), fault.flatten(1)
    columns = (
        loss,
        torch.full_like(loss, float(bottom.shape[1])),
        bottom.sum(1),
        torch.where(finite, size, math.inf).amin(1),
        torch.where(finite, size, 0.0).double().sum(1),
        finite.sum(1),
        fault.sum(1),
    )
    return torch.stack([column.double() for column in columns], dim=1)
