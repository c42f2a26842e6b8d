"""The task `dose`: log10 IC50 from a noisy dose-response curve, or on which side of the doses it lies.

Curves whose IC50 lies outside the doses are bottoms with an orientation: (P, Q) turns through Q = 0, and the
sign of P there says below or above. What curves are and how calls are scored is in `dose_data`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from scm.data import Split
from scm.models import make_model
from scm.training.targets import STATUS_CODES, lift_semantic_targets
from scm.trial import Decoded
from trainables.metrics import pack_metrics
from trainables.tasks.dose_data import (
    ABOVE,
    BELOW,
    IN_RANGE,
    LOG_HIGH,
    LOG_LOW,
    SLOPES,
    DoseRows,
    distance_to_bottom,
    draw_dose_rows,
    draw_dose_rows_near_limits,
    many_three_way_scores,
)
from trainables.tasks.generated import (
    SHIFTED_ROWS,
    DrawnData,
    DrawnSplits,
    check_real,
    parse_drawn_data,
    shifted_levels,
    with_pole_distance,
)
from trainables.tasks.protocol import TaskError

if TYPE_CHECKING:
    from scm.trial_config import TrialConfig
    from trainables.tasks.protocol import LossFn, Shifts

SIZES: dict[str, tuple[int, int, int]] = {"quick": (5_000, 1_000, 4_000), "paper": (200_000, 20_000, 30_000)}
NO_CALL = -1
_CENTRE = (LOG_LOW + LOG_HIGH) / 2
_STATUS_OF_CLASS = {BELOW: "censored_below", IN_RANGE: "finite", ABOVE: "censored_above"}

# Chosen on validation data. In-range targets span -1.8 to 1.8 units, so a unit-length tuple has |Q| > 0.48
# there and 0 at a bottom; the threshold lies half-way, in the gap that separates the regimes.
# lambda_sign has to beat the fit term. That one, sin^2 of the angle, is as content with a bottom at the wrong
# end of the circle, where its curvature is 2 and that of the orientation term -lambda_sign, halved for flat
# curves, of which every fourth is labelled above. Below 4, whole trials end with all bottoms on one side
# (macro-F1 0.41-0.57 at three of four seeds with 0.1 and separation weights of 1, which pull to Q = 0 too).
SUGGESTED: dict[str, float | int | str] = {
    "learning_rate": 5e-3,
    "lr_schedule": "cosine",
    "batch_size": 64,
    "max_epochs": 30,
    "tau_train_min": 0.25,
    "tau_train_max": 0.25,
    "tau_infer": 0.25,
    "lambda_sign": 6.0,
    "lambda_margin": 0.0,
    "lambda_rej": 0.0,
    "target_coverage": 0.3,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class DoseParams:
    """What the task reads besides sizes and seeds: how many decades of IC50 make one unit of P/Q."""

    data: DrawnData
    decades_per_unit: float = 1.0


def make_dose_task(params: Mapping[str, Any]) -> DoseTask:
    """Make the task; `TaskError` says in one line which parameter is wrong."""
    data = parse_drawn_data("dose", params, SIZES, own=("decades_per_unit",))
    decades = params.get("decades_per_unit", 1.0)
    check_real("decades_per_unit", decades, above=0.0)
    return DoseTask(DoseParams(data=data, decades_per_unit=float(decades)))


class DoseTask:
    """Ten responses in, (P, Q) out; P/Q is (log10 IC50 + 7) / `decades_per_unit`, errors are in decades.

    Inputs are the responses alone (the doses are the same for all curves), each standardised with the
    training split's mean and deviation. The test split holds the three regimes in equal numbers.
    `Split.extras`: `value` (log10 IC50, the bound of a censored curve; float64), `status` (code), `label`
    (class 0, 1, 2).
    """

    name = "dose"
    error_unit = "log10 IC50"
    suggested: Mapping[str, Any] = SUGGESTED

    def __init__(self, params: DoseParams) -> None:
        self.params = params
        self._drawn = DrawnSplits(params.data, self._draw)

    def splits(self, seed: int) -> Mapping[str, Split]:
        """Draw the splits, from the data seed or, with `redraw_data`, from the trial's seed."""
        return self._drawn.splits(seed)

    def shifts(self, seed: int) -> Shifts:
        """Curves nearer to the limits of the doses (decades), steeper (Hill slope) and noisier (response)."""
        data, count = self.params.data, min(self.params.data.n_test, SHIFTED_ROWS)
        centre, scale = self._scale(self._draw_rows("train", data.n_train, seed))

        def split_of(part: str, draw: Callable[..., DoseRows], **how: Any) -> Split:
            rows = draw(count, rng=data.stream("dose", f"shift {part}", seed), **how)
            return with_pole_distance(self._make_split(rows, centre, scale), distance_to_bottom(rows))

        def near(within: float) -> Split:
            return split_of(f"near {within}", draw_dose_rows_near_limits, within=within)

        def steep(slope: float) -> Split:
            return split_of(f"slope {slope}", draw_dose_rows, balanced=True, slopes=(SLOPES[1], slope))

        def noisy(noise: float) -> Split:
            return split_of(f"noise {noise}", draw_dose_rows, balanced=True, noise=noise)

        unshifted = split_of("none", draw_dose_rows, balanced=True)
        return {
            "near_pole": shifted_levels(unshifted, (1.0, 0.5, 0.2, 0.05), near),
            "longer_range": shifted_levels(unshifted, (2.0, 3.0, 4.0), steep),
            "noise": shifted_levels(unshifted, (0.1, 0.2, 0.4), noisy),
        }

    def build_model(self, config: TrialConfig) -> nn.Module:
        """Build the config's head on the ten responses."""
        return make_model(config, 10, 1)

    def make_loss(self, config: TrialConfig) -> LossFn | None:
        """Take the config's own loss."""
        return None

    def metrics(self, decoded: Decoded, split: Split, config: TrialConfig) -> dict[str, float]:
        """Score calls and values: the standard metrics in decades, and those of `three_way_scores`.

        An in-range curve called out of range is charged the error of answering the middle of the doses.
        `finite_mae` is over curves in range and called so; `direction_macro_f1` over curves out of range, by
        the sign of P alone. A fault is a call of no class, and so is a bottom with P = 0.
        """
        one = Decoded(*(item[None] for item in decoded if item is not None))
        return self.pack_metrics(one, split, [config])[0]

    def pack_metrics(
        self, decoded: Decoded, split: Split, configs: Sequence[TrialConfig]
    ) -> list[dict[str, float]]:
        """Score many trials at once; of `decoded`, every tensor has the trials before the rows."""
        value, status = split.extras["value"], split.extras["status"]
        predicted = decoded.decoded.to(value.dtype) * self.params.decades_per_unit + _CENTRE
        accepted = ~decoded.bottom
        standard = pack_metrics(predicted, accepted, value, status, baseline=_CENTRE)

        truth = split.extras["label"].numpy()
        outside = truth != IN_RANGE
        calls = many_three_way_scores(truth, self.calls(decoded).numpy())
        directions = many_three_way_scores(truth[outside], _side(decoded).numpy()[:, outside])
        both = (split.extras["label"] == IN_RANGE) & accepted
        error = torch.where(both, (predicted - value).abs(), 0.0).sum(1) / both.sum(1)  # nan: 0 over no curve
        return [
            {
                **scores,
                **called,
                "finite_mae": mae,
                "direction_macro_f1": (direction["f1_c0"] + direction["f1_c2"]) / 2,
            }
            for scores, called, mae, direction in zip(
                standard, calls, error.tolist(), directions, strict=True
            )
        ]

    def calls(self, decoded: Decoded) -> Tensor:
        """Call curves 0 below, 1 in range or 2 above, by |Q| < tau_infer and the sign of P; -1 is no call."""
        called = torch.where(decoded.bottom, _side(decoded), IN_RANGE)
        return torch.where(decoded.fault, NO_CALL, called)

    def _draw(self, seed: int) -> dict[str, Split]:
        counts = zip(("train", "val", "test"), self.params.data.sizes, strict=True)
        rows = {part: self._draw_rows(part, count, seed) for part, count in counts}
        centre, scale = self._scale(rows["train"])
        return {part: self._make_split(drawn, centre, scale) for part, drawn in rows.items()}

    def _draw_rows(self, part: str, count: int, seed: int) -> DoseRows:
        stream = self.params.data.stream("dose", part, seed)
        return draw_dose_rows(count, stream, balanced=part == "test")

    def _scale(self, train: DoseRows) -> tuple[np.ndarray, np.ndarray]:
        responses = train.x[:, 1::2].astype(np.float64)
        centre, scale = responses.mean(axis=0), responses.std(axis=0)
        # A training split of one curve has no spread.
        scale[scale == 0.0] = 1.0
        return centre, scale

    def _make_split(self, rows: DoseRows, centre: np.ndarray, scale: np.ndarray) -> Split:
        inputs = torch.from_numpy((rows.x[:, 1::2] - centre) / scale).to(torch.float32)
        label = torch.from_numpy(rows.y[:, 1]).to(torch.int64)
        codes = torch.tensor([STATUS_CODES[_STATUS_OF_CLASS[kind]] for kind in (BELOW, IN_RANGE, ABOVE)])
        value = torch.from_numpy(rows.y[:, 2]).to(torch.float64)
        units = ((value - _CENTRE) / self.params.decades_per_unit).to(torch.float32)
        return Split(
            inputs=inputs,
            targets=lift_semantic_targets(units, codes[label]),
            extras={"value": value, "status": codes[label], "label": label},
        )


def _side(decoded: Decoded) -> Tensor:
    if decoded.numerator is None:
        raise TaskError("the task 'dose' needs the numerators of decoded answers, got none")
    sign = torch.where(decoded.fault, 0.0, decoded.numerator.sign())
    return torch.where(sign < 0, BELOW, torch.where(sign > 0, ABOVE, NO_CALL))
