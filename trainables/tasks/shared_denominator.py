"""Vector answers over one denominator: a tuple (P1, ..., PO, Q) per row, normalised, fitted and scored as a
whole.

Used by the tasks whose answer is a vector (a joint step, a complex response) with one common pole set.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from scm.autodiff.policies import gate_tuple
from scm.trial import Decoded, make_training_loss

if TYPE_CHECKING:
    from scm.trial_config import TrialConfig
    from trainables.tasks.protocol import LossFn


def row_fit_training_loss(config: TrialConfig, *, weight_cap: float = 1.0) -> LossFn:
    """The config's own objective with `row_fit_loss` as its fit term (the config's `fit` is not read)."""
    return make_training_loss(config, fit=partial(row_fit_loss, weight_cap=weight_cap))


def answered_rows(decoded: Decoded) -> Tensor:
    """Rows (N,) of which every component is answered: half a vector is no answer."""
    return ~decoded.bottom.reshape(decoded.bottom.shape[0], -1).any(dim=-1)


def squared_errors(predicted: Tensor, value: Tensor, accepted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Squared errors (N,), each the mean over a row's components: as answered, as charged, of answering zero.

    What is charged is the answer's error for an `accepted` row and that of answering zero for any other. An
    answer that is not finite is off by infinity.
    """
    of_zero = value.square().mean(dim=-1)
    answered = (predicted - value).square().mean(dim=-1).nan_to_num(nan=torch.inf, posinf=torch.inf)
    return answered, torch.where(accepted, answered, of_zero), of_zero


def mean_or_nan(values: Tensor) -> float:
    """The mean of all values; nan where there are none."""
    return float(values.mean()) if values.numel() else float("nan")


def make_network(inputs: int, hidden_width: int, hidden_depth: int, outputs: int) -> nn.Sequential:
    """Linear layers with SiLU between them; without hidden layers, one linear map."""
    widths = [inputs, *[hidden_width] * hidden_depth]
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.SiLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], outputs))


def unit_rows(P: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Scale (P (B, O), q (B, 1)) to unit length per row and repeat q for each component: both (B, O).

    The length is taken after division by the largest entry, so that no finite row overflows or underflows; a
    row of zeros stays zero.
    """
    whole = torch.cat([P, q], dim=-1)
    top = whole.detach().abs().amax(dim=-1, keepdim=True)
    whole = whole / torch.where(top > 0, top, torch.ones_like(top))
    length = whole.square().sum(dim=-1, keepdim=True)
    whole = whole * torch.rsqrt(torch.where(length > 0, length, torch.ones_like(length)))
    return whole[..., :-1], whole[..., -1:].expand(P.shape)


def row_fit_loss(
    P: Tensor,
    Q: Tensor,
    Y_n: Tensor,
    Y_d: Tensor,
    mask: Tensor | None = None,
    *,
    weight_cap: float = 1.0,
    row_weights: Tensor | None = None,
) -> Tensor:
    """Mean over rows of |P d - q Y|^2 / ((|P|^2 + q^2) (|Y|^2 + d^2)), weighted by the size of the target.

    `P` and `Q` are (B, O) as `unit_rows` gives them (the first column of Q stands for all), `Y_n` and `Y_d`
    (B, O). A row's term is 0 where P / q is its target, never over 1, and does not change under (P, q) ->
    c (P, q). Near the target it is the squared error over (1 + |y|^2)^2, so that large answers hardly count;
    the weight min((1 + |y|^2)^2, weight_cap) gives them back as much as stays bounded.

    `mask` (B, O): rows that are not True throughout do not count. `row_weights` (B,): a row of weight 2
    counts as two.
    """
    P, Q = gate_tuple(P, Q)
    q, d = Q[..., :1], Y_d[..., :1]
    residual = (P * d - q * Y_n).square().sum(dim=-1)
    made = P.square().sum(dim=-1) + q.squeeze(-1).square()
    asked = Y_n.square().sum(dim=-1) + d.squeeze(-1).square()
    tiny = torch.finfo(P.dtype).tiny
    scale = made * asked
    # A row of zeros asks for nothing; clamped, its scale would be squared to 0 on the way back: 0/0.
    term = residual / torch.where(scale > tiny, scale, 1.0)
    term = term * asked.square().clamp_max(weight_cap)
    rows = None if mask is None else mask.all(dim=-1)
    if row_weights is not None:
        weights = row_weights.to(term.dtype)
        weights = weights if rows is None else torch.where(rows, weights, 0.0)
        return torch.where(weights > 0, term * weights, 0.0).sum() / weights.sum().clamp_min(tiny)
    if rows is None:
        return term.mean()
    return torch.where(rows, term, 0.0).sum() / rows.sum().clamp_min(1)
