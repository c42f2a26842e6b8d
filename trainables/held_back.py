"""A calibration split: rows of the training split that are held back, so that nothing else has used them.

A threshold that is chosen on the rows that trained the model is too sure, on those that chose the config or
that it is reported on it is not honest. What is chosen on them is decided in `scm.inference.calibration`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from scm.data import Split
from scm.inference.calibration import GaugeMismatchError, check_unit_tuples
from scm.seeding import generator
from trainables.trained import Trained

CALIBRATION = "calibration"
_BATCH = 4_096


def hold_back(splits: Mapping[str, Split], seed: int, *, share: float) -> dict[str, Split]:
    """The splits with a `share` of the training rows moved to the split "calibration", drawn by the seed.

    Rows with a value and rows without are held back in proportion. Each split keeps its rows' order.
    """
    if not 0.0 < share < 1.0:
        raise ValueError(f"share must lie in (0, 1), got {share=}")
    train = splits["train"]
    has_value = train.targets.mask_finite.reshape(len(train), -1).any(dim=1)
    draws = generator(seed, CALIBRATION)
    held = torch.zeros(len(train), dtype=torch.bool)
    for group in (has_value, ~has_value):
        rows = torch.nonzero(group).reshape(-1)
        shuffled = rows[torch.randperm(len(rows), generator=draws)]
        held[shuffled[: round(share * len(rows))]] = True
    kept, back = torch.nonzero(~held).reshape(-1), torch.nonzero(held).reshape(-1)
    return {**splits, "train": train.take(kept), CALIBRATION: train.take(back)}


def denominators(trained: Trained, split: Split) -> tuple[Tensor, Tensor, str]:
    """|Q| of the outputs whose right answer is known, whether each has a value, and the gauge: all flat.

    Rows that are missing or faults have no right answer, and are left out. The gauge is "unit" where
    P² + Q² = 1 holds for every output of the split, else "raw".
    """
    weight = next(trained.model.parameters())
    inputs = split.inputs.to(weight.dtype) if split.inputs.is_floating_point() else split.inputs
    parts: list[tuple[Tensor, Tensor]] = []
    with torch.no_grad():
        for rows in inputs.split(_BATCH):
            P, Q = trained.model(rows.to(weight.device))[:2]
            parts.append((P.cpu(), Q.cpu()))
    numerators, found = (torch.cat(part) for part in zip(*parts, strict=True))
    finite, known = split.targets.mask_finite, split.targets.mask_trained
    if found.shape != finite.shape:  # one denominator for a row of several outputs
        finite = finite.reshape(len(split), -1).any(dim=1).reshape(found.shape)
        known = known.reshape(len(split), -1).any(dim=1).reshape(found.shape)
    try:
        check_unit_tuples(numerators, found)
        gauge = "unit"
    except GaugeMismatchError:
        gauge = "raw"
    return found.abs()[known], finite[known], gauge
