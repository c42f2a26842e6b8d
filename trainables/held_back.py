"""A calibration split: rows of the training split that are held back, so that nothing else has used them.

A threshold that is chosen on the rows that trained the model is too sure, on those that chose the config or
that it is reported on it is not honest. How it is chosen is decided in `scm.inference.calibration`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from scm.data import Split
from scm.inference.calibration import (
    CalibrationError,
    CalibrationRecord,
    GaugeMismatchError,
    calibrate,
    check_unit_tuples,
)
from scm.seeding import generator
from trainables.trained import Trained

CALIBRATION = "calibration"
LEAST_ROWS = 20
"""Held-back rows with a value, over all models; on fewer a rate says nothing."""
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


def calibrate_together(
    models: Sequence[Trained], *, max_false_reject: float, tau_max: float
) -> CalibrationRecord:
    """One threshold for models of one config, on the held-back rows of all of them together.

    It is the largest, at most `tau_max`, that rejects at most this share of the rows with a value. Raises
    CalibrationError where there are fewer than `LEAST_ROWS` of these, where they are rows that figures are
    told of, or where no threshold keeps the bound.
    """
    found = [denominators(model, model.splits[CALIBRATION]) for model in models]
    q_abs = torch.cat([q for q, _, _ in found])
    in_range = torch.cat([has_value for _, has_value, _ in found])
    rows = int(in_range.sum())
    if rows < LEAST_ROWS:
        raise CalibrationError(
            f"{rows} held-back rows with a value are too few, at least {LEAST_ROWS} are needed"
        )
    gauges = {gauge for _, _, gauge in found}
    digests = [model.splits[CALIBRATION].digest() for model in models]
    for model, digest in zip(models, digests, strict=True):
        for name in ("val", "test"):
            if model.splits[name].digest() == digest:
                raise CalibrationError(f"the rows of split {name!r} are reported on, and cannot calibrate")
    return calibrate(
        q_abs,
        in_range,
        split=CALIBRATION,
        max_false_reject=max_false_reject,
        gauge=gauges.pop() if len(gauges) == 1 else "raw",
        data_hash=hashlib.sha256("".join(digests).encode()).hexdigest(),
        tau_min=min(1e-12, tau_max),
        tau_max=tau_max,
    )


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
