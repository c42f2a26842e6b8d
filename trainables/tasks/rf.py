"""The task `rf`: the complex response of resonators, tested on sharper resonances than training shows.

Training and validation know qualities Q up to 30, the test goes to `quality_max`. No label is a bottom. What
resonators are and how peaks are scored is in `rf_data`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from scm.data import Split
from scm.models import make_model
from scm.training.targets import STATUS_CODES, lift_semantic_targets
from scm.trial import decode_split
from trainables.metrics import standard_metrics
from trainables.tasks.generated import (
    SHIFTED_ROWS,
    DrawnData,
    DrawnSplits,
    check_choice,
    check_count,
    check_real,
    parse_drawn_data,
    shifted_levels,
    with_pole_distance,
)
from trainables.tasks.protocol import TaskError
from trainables.tasks.rf_data import (
    QUALITY_SEEN,
    Complexes,
    Filters,
    Floats,
    draw_filters,
    draw_peak_points,
    draw_points,
    encode_points,
    encode_response,
    peak_scores,
    pole_distance,
)
from trainables.tasks.shared_denominator import (
    answered_rows,
    make_network,
    mean_or_nan,
    row_fit_training_loss,
    squared_errors,
    unit_rows,
)

if TYPE_CHECKING:
    from scm.trial import Decoded
    from scm.trial_config import TrialConfig
    from trainables.tasks.protocol import LossFn, Shifts

# Numbers of filters; each is probed at `points_per_filter` frequencies.
SIZES: dict[str, tuple[int, int, int]] = {"quick": (256, 64, 256), "paper": (2_048, 512, 1_024)}
STRUCTURES: tuple[str, ...] = ("power_law", "network", "free")

# Chosen on validation data. The exponents have to travel as far as 2, in a few thousand steps.
SUGGESTED: dict[str, float | int | str] = {
    "learning_rate": 0.1,
    "lr_schedule": "cosine",
    "batch_size": 256,
    "max_epochs": 20,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ResonatorParams:
    """What the task reads besides sizes (in filters) and seeds.

    `structure` says what makes the coefficients of the second-order response: "power_law" (exp of a linear
    map of log w0 and log Q), "network" (exp of a network of the config's width and depth), or none ("free":
    the config's own head on the three inputs, which knows nothing of resonators). `focus` draws half of the
    points near the resonance.
    """

    data: DrawnData
    structure: str = "power_law"
    quality_max: float = 500.0
    points_per_filter: int = 64
    focus: bool = False


def make_rf_task(params: Mapping[str, Any]) -> ResonatorTask:
    """Make the task; `TaskError` says in one line which parameter is wrong."""
    own = ("structure", "quality_max", "points_per_filter", "focus")
    typed: dict[str, Any] = {name: params[name] for name in own if name in params}
    data = parse_drawn_data("rf", params, SIZES, own=own)
    check_choice("structure", typed.get("structure", "power_law"), STRUCTURES)
    check_real("quality_max", typed.get("quality_max", 500.0), above=QUALITY_SEEN)
    check_count("points_per_filter", typed.get("points_per_filter", 64), least=1)
    if not isinstance(typed.get("focus", False), bool):
        raise TaskError(f"focus must be true or false, got {typed['focus']!r}")
    return ResonatorTask(ResonatorParams(data=data, **typed))


class ResonatorTask:
    """log10 of (w, w0, Q) in, real and imaginary part of H(jw) out as (P, Q), (B, 2) over one denominator.

    `Split.extras`: `value` (Re, Im; float64), `status` (codes, all finite), `quality` (of the row's filter).
    """

    name = "rf"
    error_unit = "response"
    suggested: Mapping[str, Any] = SUGGESTED

    def __init__(self, params: ResonatorParams) -> None:
        self.params = params
        self._drawn = DrawnSplits(params.data, self._draw)

    def splits(self, seed: int) -> Mapping[str, Split]:
        """Draw the splits, from the data seed or, with `redraw_data`, from the trial's seed."""
        return self._drawn.splits(seed)

    def shifts(self, seed: int) -> Shifts:
        """Sharper resonances (quality, probed at their peaks), filters and probes of a wider range (factor),
        and inputs read with noise (decades). What is not shifted has qualities that training knows."""
        data = self.params.data

        def points(part: str, wider: float = 1.0) -> Floats:
            filters = draw_filters(
                SHIFTED_ROWS // 8, QUALITY_SEEN, data.stream("rf", f"shift {part} filters", seed), wider=wider
            )
            stream = data.stream("rf", f"shift {part} points", seed)
            return draw_points(filters, 8, stream, focus=self.params.focus, wider=wider)

        def split_of(points: Floats) -> Split:
            return with_pole_distance(_make_split(points), pole_distance(points))

        def near(quality: float) -> Split:
            stream = data.stream("rf", f"shift near {quality}", seed)
            return split_of(draw_peak_points(SHIFTED_ROWS, quality, stream))

        def noisy(noise: float) -> Split:
            clean = split_of(points(f"noise {noise}"))
            drawn = data.stream("rf", f"shift noise {noise}", seed).normal(0.0, noise, clean.inputs.shape)
            return replace(clean, inputs=clean.inputs + torch.from_numpy(drawn.astype(np.float32)))

        unshifted = split_of(points("none"))
        return {
            "near_pole": shifted_levels(unshifted, (30.0, 100.0, 300.0, 1_000.0), near),
            "longer_range": shifted_levels(
                unshifted, (2.0, 5.0, 10.0), lambda wider: split_of(points(f"wider {wider}", wider))
            ),
            "noise": shifted_levels(unshifted, (0.01, 0.03, 0.1), noisy),
        }

    def build_model(self, config: TrialConfig) -> nn.Module:
        """Build the network of the structure; its width and depth, if it has any, are the config's."""
        if self.params.structure == "free":
            return make_model(config, 3, 2)
        depth = 0 if self.params.structure == "power_law" else config.hidden_depth
        return Resonator(config.hidden_width, depth)

    def make_loss(self, config: TrialConfig) -> LossFn | None:
        """Fit rows as a whole where both parts share a denominator; else take the config's own loss."""
        return None if self.params.structure == "free" else row_fit_training_loss(config)

    def metrics(self, decoded: Decoded, split: Split, config: TrialConfig) -> dict[str, float]:
        """Score responses; `charged_` metrics count every row, a rejected one as if it had answered zero.

        Besides the standard metrics (mean absolute error per part): `mse`, `in_band_mse` (Q <= 30),
        `extrapolation_mse` (Q > 30; nan where there are none) over answered rows and the same three charged,
        what answering zero everywhere gives, `coverage_rate` and `strict_trigger_rate` (its complement).
        """
        value, status = split.extras["value"], split.extras["status"]
        predicted = decoded.decoded.to(value.dtype)
        accepted = answered_rows(decoded)
        scores = standard_metrics(predicted, accepted, value, status, baseline=0.0)
        error, charged, zero_error = squared_errors(predicted, value, accepted)
        seen = split.extras["quality"] <= QUALITY_SEEN
        parts = {"mse": torch.ones_like(seen), "in_band_mse": seen, "extrapolation_mse": ~seen}
        for part, rows in parts.items():
            scores[part] = mean_or_nan(error[rows & accepted])
            scores[f"charged_{part}"] = mean_or_nan(charged[rows])
            scores[f"predict_zero_{part}"] = mean_or_nan(zero_error[rows])
        scores["coverage_rate"] = mean_or_nan(accepted.to(torch.float64))
        scores["strict_trigger_rate"] = 1.0 - scores["coverage_rate"]
        return scores

    def test_filters(self, seed: int) -> Filters:
        """The filters of the test split, whose peaks `score_peaks` judges."""
        data = self.params.data
        return draw_filters(data.n_test, self.params.quality_max, data.stream("rf", "test filters", seed))

    def score_peaks(
        self, model: nn.Module, tau_infer: float, seed: int, *, count: int = 2048
    ) -> dict[str, float]:
        """Judge the peaks of the test filters (see `rf_data.peak_scores`) as the model answers strictly."""

        def predict(points: Floats) -> Complexes:
            answer = decode_split(model, _make_split(points), tau_infer=tau_infer).decoded
            real, imaginary = answer.to(torch.float64).unbind(dim=-1)
            return np.asarray(torch.complex(real, imaginary))

        return peak_scores(predict, self.test_filters(seed), count=count)

    def _draw(self, seed: int) -> dict[str, Split]:
        data, made = self.params.data, {}
        for part, count in zip(("train", "val", "test"), data.sizes, strict=True):
            top = self.params.quality_max if part == "test" else QUALITY_SEEN
            filters = draw_filters(count, top, data.stream("rf", f"{part} filters", seed))
            points = draw_points(
                filters,
                self.params.points_per_filter,
                data.stream("rf", f"{part} points", seed),
                focus=self.params.focus,
            )
            made[part] = _make_split(points)
        return made


class Resonator(nn.Module):
    """H(s) = p / (b0 + b1 s + s^2) at s = jw; p, b0, b1 = exp of a linear map or network of (ln w0, ln Q).

    The answer is p conj(D) / |D|^2: two numerators over one denominator, as unit-length rows. A row's Q is
    |D| / sqrt(|p|^2 + |D|^2) > 0, about 1 / |H| at a peak.
    """

    def __init__(self, hidden_width: int, hidden_depth: int) -> None:
        super().__init__()
        self.net = make_network(2, hidden_width, hidden_depth, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map (B, 3) inputs to P and Q, both (B, 2)."""
        logs = x * math.log(10.0)
        # Within these bounds no square overflows in float32, whatever a step did to the weights.
        p, b0, b1 = self.net(logs[..., 1:]).clamp(-30.0, 30.0).exp().unbind(dim=-1)
        w = logs[..., 0].exp()
        real, imaginary = b0 - w.square(), b1 * w
        P = torch.stack([p * real, -p * imaginary], dim=-1)
        return unit_rows(P, (real.square() + imaginary.square()).unsqueeze(-1))


def _make_split(points: Floats) -> Split:
    value = torch.from_numpy(encode_response(points))
    status = torch.full(value.shape, STATUS_CODES["finite"])
    return Split(
        inputs=torch.from_numpy(encode_points(points)),
        targets=lift_semantic_targets(value, status),
        extras={
            "value": value.to(torch.float64),
            "status": status,
            "quality": torch.from_numpy(points[:, 2].copy()),
        },
    )
