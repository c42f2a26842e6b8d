"""What a model answers on held-out rows, decoded as production decodes: strictly, at tau_infer.

Every number is exact over all samples of the loader, whatever its batches are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from scm.inference.strict import InferenceConfig, strict_inference
from scm.losses.terms import LossTerms
from scm.training.feed import Fed, Feeder, LossCall
from scm.training.records import split_outputs

Reducer = Callable[[list[tuple[float, int]]], float]


def validate_model(
    model: nn.Module,
    loss: LossCall,
    feeder: Feeder,
    loader: Iterable[Any],
    *,
    known: dict[str, Any],
    tau_infer: float,
    forward: Callable[[Any], Any],
    reducers: Mapping[str, Reducer],
) -> tuple[dict[str, float], int] | None:
    """Return the metrics, and how many samples had a non-finite output; None when the loader gave no row.

    loss: mean over rows of the finite batch losses (nan if there is none). coverage: share of samples that
    strict decoding at `tau_infer` accepts; a sample of several outputs counts as one. denom_abs_min,
    denom_abs_mean: over all finite |Q|. `reducers` replace a metric by their value of its (value, rows) by
    batch. The model is in eval mode meanwhile, and afterwards in the mode it was in.
    """
    strict = InferenceConfig(tau_infer=tau_infer)
    rows: list[Tensor] = []
    sizes: list[int] = []
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            for batch in loader:
                fed = feeder.prepare(batch)
                if fed is None or fed.rows == 0:
                    continue
                rows.append(_batch_row(forward, loss, fed, known, strict))
                sizes.append(fed.rows)
    finally:
        model.train(was_training)
    if not rows:
        return None
    table = torch.stack(rows).tolist()
    metrics = validation_metrics(table, sizes, tau_infer)
    for name, reducer in reducers.items():
        singles = [
            (validation_metrics([row], [size], tau_infer), size)
            for row, size in zip(table, sizes, strict=True)
        ]
        metrics[name] = float(reducer([(single[name], size) for single, size in singles if name in single]))
    return metrics, int(sum(row[6] for row in table))


def _batch_row(
    forward: Callable[[Any], Any], loss: LossCall, fed: Fed, known: dict[str, Any], strict: InferenceConfig
) -> Tensor:
    """Return loss, samples, bottoms, min |Q|, sum |Q|, number of finite |Q|, samples with bad outputs."""
    outputs = forward(fed.inputs)
    value = loss(outputs, fed, known)
    if isinstance(value, LossTerms):
        value = value.total()
    numerator, denominator = split_outputs(outputs)
    if numerator is None:
        return torch.tensor([float(value), fed.rows, 0.0, math.inf, 0.0, 0.0, 0.0], dtype=torch.float64)
    size = torch.full((1,), math.inf, device=numerator.device)
    if denominator is None:
        bottom = fault = ~torch.isfinite(numerator)
        finite = torch.zeros(1, dtype=torch.bool, device=numerator.device)
    else:
        result = strict_inference(numerator, denominator, strict)
        bottom, fault = result.bottom_mask, result.fault_mask
        size = denominator.abs().flatten()
        finite = torch.isfinite(size)
    if bottom.ndim > 1:
        bottom, fault = bottom.any(-1), fault.any(-1)
    numbers = (
        value,
        torch.tensor(float(bottom.numel())),
        bottom.sum(),
        torch.where(finite, size, math.inf).amin(),
        torch.where(finite, size, 0.0).to(torch.float64).sum(),
        finite.sum(),
        fault.sum(),
    )
    return torch.stack([number.to(device=numerator.device, dtype=torch.float64) for number in numbers])


def validation_metrics(table: list[list[float]], sizes: list[int], tau_infer: float) -> dict[str, float]:
    """Return the metrics of batches of these sizes: of each its loss, samples, bottoms, and the least |Q|,
    their sum and number, and samples with bad outputs.
    """
    losses, samples, bottoms, smallest, sums, counts, _ = (
        list(column) for column in zip(*table, strict=True)
    )
    finite = [(loss, size) for loss, size in zip(losses, sizes, strict=True) if math.isfinite(loss)]
    weight = sum(size for _, size in finite)
    bottom_frac = sum(bottoms) / sum(samples) if sum(samples) else 0.0
    available = sum(counts) > 0
    return {
        "loss": sum(loss * size for loss, size in finite) / weight if weight else math.nan,
        "coverage": 1.0 - bottom_frac,
        "tau_eval": tau_infer,
        "bottom_frac": bottom_frac,
        "denom_abs_min": min(smallest) if available else math.nan,
        "denom_abs_mean": sum(sums) / sum(counts) if available else math.nan,
        "denom_abs_available": float(available),
    }
