"""Terms for a stop head: how many clues a model uses, how surely it stops, how alike it treats its samples.

Decided here: the terms, and what belongs to each sample and what to the batch. How spread and saturation are
measured is decided in `scm.guards.spread` and `scm.guards.bounds`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from scm.guards.bounds import saturation_penalty
from scm.guards.spread import SPREAD_FORMS, spread_loss
from scm.losses.rowwise import check_at_least_zero

_LEAST_ATTENTION = 1e-6


class SparsityTerms(NamedTuple):
    """What `SparsityRegularization` returns; every term already has its weight.

    total: all of it, 0-d, as shared + the mean of per_sample. shared: what belongs to the batch,
    base_pondering + entropy_pondering + variance_penalty + saturation_penalty. per_sample: the min-clue
    penalty of each sample, (B,).

    The rest is for the log: min_clue_penalty and stop_logit_excess are means without their weight;
    stop_prob_std and clues_used_std are nan for one sample.
    """

    total: Tensor
    shared: Tensor
    per_sample: Tensor
    base_pondering: Tensor
    entropy_pondering: Tensor
    variance_penalty: Tensor
    saturation_penalty: Tensor
    min_clue_penalty: Tensor
    stop_logit_excess: Tensor
    expected_clues_used: Tensor
    stop_prob_mean: Tensor
    stop_prob_std: Tensor
    clues_used_std: Tensor

    def components(self) -> dict[str, Tensor]:
        """Return the terms and the numbers for the log by name, detached and on their device."""
        held = self._asdict()
        return {name: held[name].detach() for name in self._fields if name not in _SUMS}


_SUMS = ("total", "shared", "per_sample")


class SparsityRegularization(nn.Module):
    """Regularises stop logits z (B, K), where clue k of a sample is used with probability 1 - sigmoid(z).

    With n the expected number of clues used by a sample, the total is the sum of
    min_clue_weight * mean relu(min_clues - n); ponder_weight * mean n;
    entropy_ponder_weight * mean over samples of the sum over clues of their attention's normalised entropy
    times the probability of use, where attention maps (B, K, H, W) are given;
    variance_weight * relu(target_variance - standard deviation of n), in the form `variance_form` of
    `spread_loss`, left out for one sample (target_variance is a standard deviation; the name is the field's);
    saturation_weight * mean relu(|z| - saturation_threshold).

    Weights and thresholds are numbers >= 0 (ValueError) or 0-d tensors. The form "hinge" is the recorded one,
    which cannot leave exact collapse: choose "pairwise".

    Differs from the recorded class: whoever weighs samples apart adds `shared` and `per_sample` and has the
    variance and saturation terms in it (the recorded scalar dropped them whenever it was asked for samples,
    so that their weights changed nothing); one sample costs no NaN; there is no epsilon, which nothing read.
    """

    def __init__(
        self,
        min_clues: float | Tensor = 1.0,
        ponder_weight: float | Tensor = 0.1,
        min_clue_weight: float | Tensor = 1.0,
        entropy_ponder_weight: float | Tensor = 0.05,
        variance_weight: float | Tensor = 0.0,
        target_variance: float | Tensor = 0.5,
        saturation_weight: float | Tensor = 0.0,
        saturation_threshold: float | Tensor = 5.0,
        *,
        variance_form: str = "hinge",
    ) -> None:
        super().__init__()
        given: dict[str, Any] = {
            "min_clues": min_clues,
            "ponder_weight": ponder_weight,
            "min_clue_weight": min_clue_weight,
            "entropy_ponder_weight": entropy_ponder_weight,
            "variance_weight": variance_weight,
            "target_variance": target_variance,
            "saturation_weight": saturation_weight,
            "saturation_threshold": saturation_threshold,
        }
        for name, value in given.items():
            check_at_least_zero(name, value)
        known = tuple(form for form in SPREAD_FORMS if form != "jittered")  # which needs a generator
        if variance_form not in known:
            raise ValueError(f"variance_form must be one of {', '.join(known)}, got {variance_form=}")
        self.min_clues = min_clues
        self.ponder_weight = ponder_weight
        self.min_clue_weight = min_clue_weight
        self.entropy_ponder_weight = entropy_ponder_weight
        self.variance_weight = variance_weight
        self.target_variance = target_variance
        self.saturation_weight = saturation_weight
        self.saturation_threshold = saturation_threshold
        self.variance_form = variance_form

    def forward(self, stop_logits: Tensor, attention_maps: Tensor | None = None) -> SparsityTerms:
        """Return the terms for stop logits (B, K) and, where given, attention maps (B, K, H, W).

        Logits that are not finite give terms that are not: whether such a step is taken is decided elsewhere.
        """
        _check_shapes(stop_logits, attention_maps)
        stop = stop_logits.sigmoid()
        used = 1.0 - stop
        clues = used.sum(-1)
        zero = torch.zeros_like(clues.sum())

        short = torch.relu(self.min_clues - clues)
        per_sample = self.min_clue_weight * short
        base = self.ponder_weight * clues.mean()
        entropy = zero
        if attention_maps is not None and not _is_off(self.entropy_ponder_weight):
            entropy = self.entropy_ponder_weight * (_entropies(attention_maps) * used).sum(-1).mean()
        variance = zero
        if not _is_off(self.variance_weight):
            shortfall = spread_loss(clues, self.target_variance, form=self.variance_form)
            variance = self.variance_weight * shortfall
        excess = saturation_penalty(stop_logits, self.saturation_threshold)
        saturation = zero if _is_off(self.saturation_weight) else self.saturation_weight * excess
        shared = base + entropy + variance + saturation
        return SparsityTerms(
            total=shared + per_sample.mean(),
            shared=shared,
            per_sample=per_sample,
            base_pondering=base,
            entropy_pondering=entropy,
            variance_penalty=variance,
            saturation_penalty=saturation,
            min_clue_penalty=short.mean(),
            stop_logit_excess=excess.detach(),
            expected_clues_used=clues.detach().mean(),
            stop_prob_mean=stop.detach().mean(),
            stop_prob_std=_std(stop.detach().mean(-1)),
            clues_used_std=_std(clues.detach()),
        )


def _entropies(attention: Tensor) -> Tensor:
    """Return the entropy of each map over its cells, 1 where it is uniform, (B, K)."""
    cells = attention.flatten(2)
    # Kept from 0, where the slope of a log a is infinite.
    kept = cells.clamp(min=_LEAST_ATTENTION)
    return -(kept * kept.log()).sum(-1) / math.log(cells.shape[-1] + _LEAST_ATTENTION)


def _std(values: Tensor) -> Tensor:
    return values.std() if len(values) > 1 else torch.full_like(values.sum(), math.nan)


def _is_off(weight: float | Tensor) -> bool:
    return not isinstance(weight, Tensor) and weight == 0


def _check_shapes(stop_logits: Tensor, attention_maps: Tensor | None) -> None:
    if stop_logits.ndim != 2 or not stop_logits.numel():
        raise ValueError(f"stop_logits must be (B, K) with B, K >= 1, got shape {tuple(stop_logits.shape)}")
    if attention_maps is not None and (
        attention_maps.ndim != 4 or attention_maps.shape[:2] != stop_logits.shape
    ):
        raise ValueError(
            f"attention_maps must be (B, K, H, W) of stop_logits {tuple(stop_logits.shape)}, "
            f"got shape {tuple(attention_maps.shape)}"
        )
