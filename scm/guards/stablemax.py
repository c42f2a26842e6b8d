"""Stablemax, a softmax without an exponential, and cross-entropies on it for grids with rare classes.

Decided here: how logits become a loss, what each class weighs, and what is said of logits that are not
finite. How logits are bounded is decided in `scm.guards.bounds`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from scm.guards.bounds import BOUND_FORMS, bound, check_limit
from scm.losses.rowwise import check_at_least_zero

_LARGEST = 1000.0  # |logit| beyond which stablemax is flat
_TINY = 1e-10
_KEPT_STATS = 100
_SHOWN_STATS = 5
_CERTAIN = 1e-7


def stablemax(x: Tensor) -> Tensor:
    """Return s(x) elementwise, in the dtype of x: 1/(1-x) below 0, x+1 above, of x clamped to [-1000, 1000].

    Lies in [1/1001, 1001]; NaN counts as 0. The gradient is finite for every x, 0 beyond the clamp.

    Differs from the recorded form: each branch sees its own half only, so that the gradient at x = 1 is 1 in
    float32 too (there it is NaN, 0 times an infinite slope); half dtypes are computed in float32; there is no
    epsilon, which changed no digit.
    """
    return _stablemax(_widened(x)).to(x.dtype)


def log_stablemax(x: Tensor, dim: int = -1) -> Tensor:
    """Return log(s / (sum of s over dim + 1e-10)), in the shape and dtype of x; finite for every x."""
    s = _stablemax(_widened(x))
    return (s.log() - (s.sum(dim, keepdim=True) + _TINY).log()).to(x.dtype)


def softmax_entropy(logits: Tensor, dim: int = -1) -> Tensor:
    """Return the entropy of softmax(logits) over `dim`, in nats; finite, as its gradient is, in every dtype.

    Half dtypes are computed and returned in float32. A logit of -inf is a class of probability 0; where all
    are, or one is +inf or NaN, there is no distribution and the entropy is NaN.

    The usual -(p * p.log()).sum() is NaN as soon as a probability rounds to 0.
    """
    log_p = torch.log_softmax(_widened(logits), dim)
    p = log_p.exp()
    return -(p * log_p.clamp(min=torch.finfo(log_p.dtype).min)).sum(dim)


def reference_class_weights(
    counts: Tensor, bg_weight_cap: float, fg_weight_cap: float, min_class_weight: float
) -> Tensor:
    """Return the recorded weights (C,) for the pixels of each class: rarest foreground fg cap, commonest 1.

    Two faults of the law: a class without pixels is the rarest of all, so that all that are there weigh about
    1 and less than a background with a cap above that; and one pixel more can turn nine weights of 3 into one
    of 1 and eight of 5. `smooth_class_weights` has neither.
    """
    freq = counts / (counts.sum() + 1e-6)
    rarity = 1.0 / (freq[1:] + 1e-6)
    background = freq.new_full((1,), bg_weight_cap)
    if not len(rarity):
        return background
    low, high = rarity.min(), rarity.max()
    scaled = 1.0 + (fg_weight_cap - 1.0) * (rarity - low) / (high - low + 1e-6)
    scaled = torch.where(high > low, scaled, 0.5 * (1.0 + fg_weight_cap))
    return torch.cat([background, scaled.clamp(min=min_class_weight).clamp(max=fg_weight_cap)])


def smooth_class_weights(
    counts: Tensor, bg_weight_cap: float, fg_weight_cap: float, min_class_weight: float
) -> Tensor:
    """Return weights (C,) that fall with the root of a class's frequency; a mean pixel weighs 1 before caps.

    The background obeys the same law and its own cap. A class without pixels changes no other weight and has
    weight 1, which nothing uses; its first pixel among n moves the others by 1/sqrt(n) of themselves at most.
    """
    freq = counts / counts.sum().clamp(min=1)
    present = counts > 0
    root = freq.sqrt()
    raw = torch.where(present, 1.0 / (root.sum().clamp(min=_TINY) * torch.where(present, root, 1.0)), 1.0)
    foreground = raw[1:].clamp(min=min_class_weight).clamp(max=fg_weight_cap)
    return torch.cat([raw[:1].clamp(max=bg_weight_cap), foreground])


ClassWeights = Callable[[Tensor, float, float, float], Tensor]
CLASS_WEIGHTINGS: dict[str, ClassWeights] = {
    "reference": reference_class_weights,
    "smooth": smooth_class_weights,
}
REDUCTIONS = ("mean", "canvas_mean", "sum", "none")
OUT_OF_RANGE = ("raise", "ignore")


class _StablemaxLoss(nn.Module, ABC):
    """What both losses share; they differ in what a pixel weighs."""

    def __init__(
        self,
        *,
        bg_weight_cap: float,
        fg_weight_cap: float,
        min_class_weight: float,
        reduction: str,
        ignore_index: int,
        logit_clamp_max: float | Tensor | None,
        logit_clamp_form: str,
        class_weighting: str,
        out_of_range: str,
        track_nan_telemetry: bool,
    ) -> None:
        super().__init__()
        check_limit("bg_weight_cap", bg_weight_cap)
        check_limit("fg_weight_cap", fg_weight_cap)
        check_at_least_zero("min_class_weight", min_class_weight)
        _check_one_of("reduction", reduction, REDUCTIONS)
        _check_one_of("class_weighting", class_weighting, CLASS_WEIGHTINGS)
        _check_one_of("out_of_range", out_of_range, OUT_OF_RANGE)
        _check_one_of("logit_clamp_form", logit_clamp_form, BOUND_FORMS)
        if not isinstance(logit_clamp_max, Tensor) and logit_clamp_max is not None:
            if logit_clamp_max <= 0:
                logit_clamp_max = None
            else:
                check_limit("logit_clamp_max", logit_clamp_max)
        self.bg_weight_cap = bg_weight_cap
        self.fg_weight_cap = fg_weight_cap
        self.min_class_weight = min_class_weight
        self.reduction = reduction
        self.ignore_index = ignore_index
        self.logit_clamp_max = logit_clamp_max
        self.logit_clamp_form = logit_clamp_form
        self.class_weighting = class_weighting
        self.out_of_range = out_of_range
        self.track_nan_telemetry = track_nan_telemetry
        self._telemetry = LogitTelemetry()
        self._strays = _StrayTargets()

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of logits (B, C, ...) for class indices (B, ...), reduced as the loss was told."""
        if logits.ndim < 2 or targets.shape != logits.shape[:1] + logits.shape[2:]:
            raise ValueError(
                "targets must have the shape of logits without its second dimension, got logits "
                f"{tuple(logits.shape)} and targets {tuple(targets.shape)}"
            )
        classes = logits.shape[1]
        inside = (targets >= 0) & (targets < classes)
        counted = targets != self.ignore_index
        valid = inside & counted
        if self.out_of_range == "raise":
            self._strays.check(counted & ~inside, targets, classes)
        pixels = logits.movedim(1, -1)
        if self.track_nan_telemetry:
            self._telemetry.observe(pixels, valid)
        return self._reduced(self._pixel_losses(pixels, targets, valid), valid)

    def class_weights(self, targets: Tensor, classes: int) -> Tensor:
        """Return the weight of each class (C,), float32, from the valid targets of one batch."""
        valid = (targets >= 0) & (targets < classes) & (targets != self.ignore_index)
        return self._class_weights(torch.where(valid, targets, 0), valid, classes)

    def get_nan_telemetry(self) -> dict[str, Any]:
        """Say how often raw logits were not finite; waits for the device.

        nan_rate (share of the batches), total_batches, batches_with_nan, total_nan_count and
        max_nan_per_batch (pixels), and last_nan_logit_stats, the newest 5 such batches: min and max of the
        finite logits in those pixels, has_inf, has_nan_input, num_nan. Before the first batch nan_rate is 0
        and a message says so.
        """
        return self._telemetry.read()

    def reset_nan_telemetry(self) -> None:
        """Forget what was counted."""
        self._telemetry = LogitTelemetry()

    @abstractmethod
    def _pixel_weights(self, class_weight: Tensor, probability: Tensor) -> Tensor:
        """Return what each pixel weighs, from the weight of its class and the probability it was given."""

    def _pixel_losses(self, pixels: Tensor, targets: Tensor, valid: Tensor) -> Tensor:
        # Pixels that do not count are masked before anything is computed of them: a NaN there stays there.
        raw = torch.where(valid[..., None], pixels, 0.0)
        if self.logit_clamp_max is not None:
            raw = bound(raw, self.logit_clamp_max, self.logit_clamp_form)
        s = _stablemax(_widened(raw))
        index = torch.where(valid, targets, 0)
        of_target = s.gather(-1, index[..., None]).squeeze(-1)
        total = s.sum(-1)
        cross_entropy = (total + _TINY).log() - of_target.log()
        weights = self._class_weights(index, valid, pixels.shape[-1]).to(s.dtype)
        losses = self._pixel_weights(weights[index], of_target / total) * cross_entropy
        return torch.where(valid, losses, 0.0)

    def _class_weights(self, index: Tensor, valid: Tensor, classes: int) -> Tensor:
        counts = index.new_zeros(classes).scatter_add(0, index.flatten(), valid.flatten().to(index.dtype))
        law = CLASS_WEIGHTINGS[self.class_weighting]
        return law(counts.float(), self.bg_weight_cap, self.fg_weight_cap, self.min_class_weight)

    def _reduced(self, losses: Tensor, valid: Tensor) -> Tensor:
        if self.reduction == "none":
            return losses
        if self.reduction == "sum":
            return losses.sum()
        if self.reduction == "canvas_mean":
            return losses.sum() / max(losses.numel(), 1)
        return losses.sum() / valid.sum().clamp(min=1)


class WeightedStablemaxLoss(_StablemaxLoss):
    """Class-weighted cross-entropy on stablemax: of logits (B, C, ...) for class indices (B, ...).

    bg_weight_cap, fg_weight_cap, min_class_weight: bounds of the class weights; class 0 is the background.
    class_weighting: "reference", the recorded law, or "smooth", which has none of its jumps: choose that.
    reduction: "mean" over the valid pixels, "canvas_mean" over all (padding dilutes it: 3x3 cells on a 30x30
    canvas count a hundredth), "sum", "none" (B, ...). With no valid pixel each is 0, in its shape.
    logit_clamp_max: bound of the logits (None or <= 0: none), in the form of `bound`. "hard" is the recorded
    one, and a logit beyond it can never come back: choose "straight_through", which has the same values, or
    "soft". A clamp also keeps the loss above a floor: 0.00345 at 50 with ten classes.
    out_of_range: a target that is neither a class nor ignore_index is a ValueError ("raise"), or takes no
    part ("ignore"). On an accelerator, finding out at once would wait for it: there such pixels take no part
    and the ValueError comes with one of the next calls.
    track_nan_telemetry: count logits that are not finite, as they come, before bound and substitution;
    nothing waits until `get_nan_telemetry`. The loss itself takes NaN for 0, without a gradient there.

    The loss is of dtype float64 for float64 logits and float32 for others. Raises ValueError for a setting
    out of its range.

    Differs from the recorded loss: gradients are finite in float32, so nothing is cast to float64; "none" is
    in the dtype of the loss and keeps its shape when no pixel is valid; targets out of range are not taken
    for the nearest class; telemetry can fire; the mean over the canvas, which its totals take, has a name.
    """

    def __init__(
        self,
        bg_weight_cap: float = 1.0,
        fg_weight_cap: float = 10.0,
        min_class_weight: float = 0.1,
        reduction: str = "mean",
        ignore_index: int = -100,
        logit_clamp_max: float | Tensor | None = 50.0,
        *,
        logit_clamp_form: str = "hard",
        class_weighting: str = "reference",
        out_of_range: str = "raise",
        track_nan_telemetry: bool = False,
    ) -> None:
        super().__init__(
            bg_weight_cap=bg_weight_cap,
            fg_weight_cap=fg_weight_cap,
            min_class_weight=min_class_weight,
            reduction=reduction,
            ignore_index=ignore_index,
            logit_clamp_max=logit_clamp_max,
            logit_clamp_form=logit_clamp_form,
            class_weighting=class_weighting,
            out_of_range=out_of_range,
            track_nan_telemetry=track_nan_telemetry,
        )

    def _pixel_weights(self, class_weight: Tensor, probability: Tensor) -> Tensor:
        return class_weight


class FocalWeightedStablemaxLoss(_StablemaxLoss):
    """`WeightedStablemaxLoss` in which a pixel with probability p for its class weighs (1 - p)^gamma of it.

    gamma >= 0, a number or a 0-d tensor; the gradient flows through p. All else is as there, except for the
    caps of the class weights.
    """

    def __init__(
        self,
        bg_weight_cap: float = 2.0,
        fg_weight_cap: float = 5.0,
        gamma: float | Tensor = 2.0,
        min_class_weight: float = 0.1,
        reduction: str = "mean",
        ignore_index: int = -100,
        logit_clamp_max: float | Tensor | None = 50.0,
        *,
        logit_clamp_form: str = "hard",
        class_weighting: str = "reference",
        out_of_range: str = "raise",
        track_nan_telemetry: bool = False,
    ) -> None:
        check_at_least_zero("gamma", gamma)
        super().__init__(
            bg_weight_cap=bg_weight_cap,
            fg_weight_cap=fg_weight_cap,
            min_class_weight=min_class_weight,
            reduction=reduction,
            ignore_index=ignore_index,
            logit_clamp_max=logit_clamp_max,
            logit_clamp_form=logit_clamp_form,
            class_weighting=class_weighting,
            out_of_range=out_of_range,
            track_nan_telemetry=track_nan_telemetry,
        )
        self.gamma = gamma

    def _pixel_weights(self, class_weight: Tensor, probability: Tensor) -> Tensor:
        # Kept from 0 and 1, where a gamma below 1 has an infinite slope.
        return class_weight * (1.0 - probability.clamp(_CERTAIN, 1.0 - _CERTAIN)) ** self.gamma


class LogitTelemetry:
    """Counts batches whose logits are not finite, on their device, in bounded memory."""

    def __init__(self) -> None:
        self._batches = 0
        self._counts: Tensor | None = None  # batches with such pixels, pixels, most pixels in one batch
        self._stats: Tensor | None = None  # of the newest such batches, one row each, oldest overwritten

    def observe(self, pixels: Tensor, valid: Tensor) -> None:
        """Take in raw logits (..., C) where `valid` (...); nothing is read back."""
        values = pixels.detach()
        values = values if values.dtype == torch.float64 else values.float()
        if self._counts is None or self._stats is None:
            self._counts = torch.zeros(3, dtype=torch.int64, device=values.device)
            self._stats = torch.zeros((_KEPT_STATS, 5), dtype=torch.float64, device=values.device)
        finite = values.isfinite()
        bad = valid & ~finite.all(-1)
        number = bad.sum()
        counts = self._counts
        place = (counts[:1] % _KEPT_STATS).detach()
        entry = _stats_of(values, finite, bad, number)
        kept = self._stats.index_select(0, place)
        self._stats = self._stats.index_copy(0, place, torch.where(number > 0, entry, kept))
        self._counts = torch.stack([counts[0] + (number > 0), counts[1] + number, counts[2].maximum(number)])
        self._batches += 1

    def read(self) -> dict[str, Any]:
        """Return the counters and the newest entries; see `WeightedStablemaxLoss.get_nan_telemetry`."""
        if self._counts is None or self._stats is None:
            return {"nan_rate": 0.0, "message": "no batch was counted"}
        batches, pixels, most = self._counts.tolist()
        table = self._stats.tolist()
        newest = range(max(0, batches - min(_SHOWN_STATS, _KEPT_STATS)), batches)
        return {
            "nan_rate": batches / self._batches,
            "total_batches": self._batches,
            "batches_with_nan": batches,
            "total_nan_count": pixels,
            "max_nan_per_batch": most,
            "last_nan_logit_stats": [_named_stats(table[i % _KEPT_STATS]) for i in newest],
        }


class _StrayTargets:
    """Refuses targets out of range: on the CPU at once, elsewhere as soon as their count has arrived."""

    def __init__(self) -> None:
        self._total: Tensor | None = None
        self._arrived: Tensor | None = None  # in pinned memory, written to by the device when it gets there

    def check(self, stray: Tensor, targets: Tensor, classes: int) -> None:
        if stray.device.type == "cpu":
            if bool(stray.any()):
                got = int(targets[stray][0])
                raise ValueError(f"targets must be in [0, {classes}) or ignore_index, got {got}")
            return
        if self._arrived is None:
            self._arrived = torch.zeros((), dtype=torch.int64, pin_memory=True)
        # The count only grows: read before the newest has arrived, it is the one of an earlier call.
        if int(self._arrived):
            raise ValueError(
                f"targets must be in [0, {classes}) or ignore_index, got {int(self._arrived)} others so far"
            )
        count = stray.sum()
        self._total = count if self._total is None else self._total + count
        self._arrived.copy_(self._total, non_blocking=True)


def _widened(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _stablemax(x: Tensor) -> Tensor:
    x = x.clamp(-_LARGEST, _LARGEST)
    x = torch.where(x.isnan(), 0.0, x)
    return torch.where(x < 0, 1.0 / (1.0 - x.clamp(max=0)), x.clamp(min=0) + 1.0)


def _stats_of(values: Tensor, finite: Tensor, bad: Tensor, number: Tensor) -> Tensor:
    """Return min, max, has_inf, has_nan and the number of the bad pixels as one row (1, 5)."""
    seen = bad[..., None] & finite
    some = seen.any()
    infinite = torch.full((), float("inf"), dtype=values.dtype, device=values.device)
    low = torch.where(some, torch.where(seen, values, infinite).amin(), torch.nan)
    high = torch.where(some, torch.where(seen, values, -infinite).amax(), torch.nan)
    has_inf = (bad[..., None] & values.isinf()).any()
    has_nan = (bad[..., None] & values.isnan()).any()
    return torch.stack([item.double() for item in (low, high, has_inf, has_nan, number)])[None]


def _named_stats(row: list[float]) -> dict[str, Any]:
    low, high, has_inf, has_nan, number = row
    return {
        "min": low,
        "max": high,
        "has_inf": bool(has_inf),
        "has_nan_input": bool(has_nan),
        "num_nan": int(number),
    }


def _check_one_of(name: str, value: str, known: Any) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {name}={value!r}")
