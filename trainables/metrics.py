"""How answers are scored when a model may abstain: errors of what it answered, and what abstaining costs.

Pure arithmetic on tensors in target units; the decoding is in `scm.trial`, the units are the task's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from scm.training.targets import STATUS_CODES

_FINITE = STATUS_CODES["finite"]
_BELOW = STATUS_CODES["censored_below"]
_ABOVE = STATUS_CODES["censored_above"]
_BOTTOMS = (STATUS_CODES["bottom"], _BELOW, _ABOVE, STATUS_CODES["domain_invalid"])


def standard_metrics(
    prediction: Tensor,
    accepted: Tensor,
    value: Tensor,
    status: Tensor,
    *,
    baseline: Tensor | float,
) -> dict[str, float]:
    """Score predictions so that neither abstaining nor answering garbage looks good.

    `prediction`, `accepted` (bool), `value` and `status` (codes of `STATUS_CODES`) share the shape (N,) or
    (N, O); an `accepted` of shape (N,) holds for all outputs of a row. `value` is the label of a finite row
    and the bound of a censored one (NaN: no bound known). `baseline` is the trivial answer, a number or (O,).

    - accepted_error: mean over the accepted finite rows of |prediction - value| and over the accepted
      censored rows of what the prediction oversteps the bound by; NaN when nothing that counts was accepted.
    - charged_error: every finite row pays, its |prediction - value| if accepted, |baseline - value| if not.
    - false_accept_rate: the accepted share of the rows labelled bottom or censored; NaN without such rows.
    - false_reject_rate: the rejected share of the finite rows; NaN without such rows.

    An accepted prediction that is not finite costs infinity.
    """
    if accepted.ndim < value.ndim:
        accepted = accepted.unsqueeze(-1)
    return pack_metrics(
        prediction[None], accepted.expand(value.shape)[None], value, status, baseline=baseline
    )[0]


def pack_metrics(
    prediction: Tensor,
    accepted: Tensor,
    value: Tensor,
    status: Tensor,
    *,
    baseline: Tensor | float,
) -> list[dict[str, float]]:
    """Score the predictions of many trials on the same rows as `standard_metrics` scores those of one.

    `prediction` has the trials before the shape of `value`, and so has `accepted`, which may lack the last
    dimension.
    """
    if prediction.shape[1:] != value.shape or status.shape != value.shape:
        raise ValueError(
            "prediction, value and status must have one shape, got "
            f"{tuple(prediction.shape[1:])=}, {tuple(value.shape)=}, {tuple(status.shape)=}"
        )
    if accepted.ndim < prediction.ndim:
        accepted = accepted.unsqueeze(-1)
    accepted = accepted.expand(prediction.shape)
    predicted = prediction.to(torch.float64)
    value = value.to(torch.float64)
    finite = status == _FINITE
    bottom = torch.isin(status, torch.tensor(_BOTTOMS, device=status.device))

    sign = (status == _BELOW).to(torch.float64) - (status == _ABOVE).to(torch.float64)
    apart = predicted - value
    error = torch.where(finite, apart.abs(), (sign * apart).clamp_min(0.0))
    error = error.nan_to_num(nan=torch.inf, posinf=torch.inf)
    bounded = (sign != 0) & value.isfinite()

    counted = accepted & (finite | bounded)
    trivial = (torch.as_tensor(baseline, dtype=torch.float64, device=value.device) - value).abs()
    charged = torch.where(accepted, error, trivial)
    zero = error.new_zeros(())
    columns = (
        torch.where(counted, error, zero),
        counted,
        torch.where(finite, charged, zero),
        accepted & bottom,
        ~accepted & finite,
    )
    summed = torch.stack([column.flatten(1).sum(1).to(torch.float64) for column in columns], dim=1)
    both = torch.stack([finite.sum(), bottom.sum()]).to(torch.float64)
    # The only wait for the device.
    told = torch.cat([summed, both.expand(len(summed), -1)], dim=1).tolist()
    return [
        {
            "accepted_error": _ratio(error_sum, count),
            "charged_error": _ratio(charge, finite_count),
            "false_accept_rate": _ratio(wrongly_in, bottom_count),
            "false_reject_rate": _ratio(wrongly_out, finite_count),
        }
        for error_sum, count, charge, wrongly_in, wrongly_out, finite_count, bottom_count in told
    ]


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else float("nan")
