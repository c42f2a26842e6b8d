"""The task `rr_ik`: the joint step of a planar two-link arm, close to and far from its singular poses.

The damped step is finite everywhere, so no label is a bottom: a model that rejects hard poses is charged for
them. How poses are drawn and split is in `rr_ik_data`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from scm.data import Split
from scm.guards.symmetry import Symmetry
from scm.models import make_model
from scm.training.targets import STATUS_CODES, lift_semantic_targets
from trainables.metrics import standard_metrics
from trainables.tasks.generated import (
    SHIFTED_ROWS,
    DrawnData,
    DrawnSplits,
    check_choice,
    check_real,
    parse_drawn_data,
    shifted_levels,
    with_pole_distance,
)
from trainables.tasks.rr_ik_data import (
    BUCKET_NAMES,
    DAMPING,
    STEP,
    bucket_of,
    damped_step,
    determinant,
    draw_poses,
    draw_poses_near,
    jacobian,
    stratified_split,
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

SIZES: dict[str, tuple[int, int, int]] = {"quick": (6_000, 1_500, 3_000), "paper": (150_000, 10_000, 40_000)}
STRUCTURES: tuple[str, ...] = ("step_linear", "free")

# Chosen on validation data.
SUGGESTED: dict[str, float | int | str] = {
    "learning_rate": 3e-3,
    "lr_schedule": "cosine",
    "batch_size": 64,
    "max_epochs": 20,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmParams:
    """What the task reads besides sizes and seeds.

    `structure` is "step_linear" (numerators linear in the wanted step, one positive denominator) or "free"
    (the config's own head, to which q_anchor and the like belong). `error_weight_cap` bounds the weight by
    which large joint steps count in the fit of "step_linear"; 1 is the plain projective fit.
    """

    data: DrawnData
    structure: str = "step_linear"
    error_weight_cap: float = 4.0


def make_rr_ik_task(params: Mapping[str, Any]) -> ArmTask:
    """Make the task; `TaskError` says in one line which parameter is wrong."""
    data = parse_drawn_data("rr_ik", params, SIZES, own=("structure", "error_weight_cap"))
    structure, cap = params.get("structure", "step_linear"), params.get("error_weight_cap", 4.0)
    check_choice("structure", structure, STRUCTURES)
    check_real("error_weight_cap", cap, above=0.0)
    return ArmTask(ArmParams(data=data, structure=structure, error_weight_cap=float(cap)))


class ArmTask:
    """(theta1, theta2, dx, dy) in, joint steps (radians) out as (P, Q), both (B, 2).

    One set of poses is drawn and dealt into splits that hold the same share of each bucket of |det J|, in
    random order. `Split.extras`: `value` (joint step, float64), `status` (codes, all finite), `pose` (the
    inputs in float64), `bucket` (0 to 4).
    """

    name = "rr_ik"
    error_unit = "rad"
    suggested: Mapping[str, Any] = SUGGESTED

    def __init__(self, params: ArmParams) -> None:
        self.params = params
        self._drawn = DrawnSplits(params.data, self._draw)

    def splits(self, seed: int) -> Mapping[str, Split]:
        """Draw the splits, from the data seed or, with `redraw_data`, from the trial's seed."""
        return self._drawn.splits(seed)

    def build_model(self, config: TrialConfig) -> nn.Module:
        """Build the network of the structure; its width and depth are the config's."""
        if self.params.structure == "free":
            return FreeArm(make_model(config, 6, 2))
        return StepLinearArm(config.hidden_width, config.hidden_depth)

    def make_loss(self, config: TrialConfig) -> LossFn | None:
        """Fit rows as a whole where all components share a denominator; else take the config's own loss."""
        if self.params.structure == "free":
            return None
        return row_fit_training_loss(config, weight_cap=self.params.error_weight_cap)

    def symmetries(self) -> Mapping[str, Symmetry]:
        """Poses mirrored at the base line, wanted steps reversed, and both: joint steps change sign, or not.

        `step_linear` reverses by construction; a head that is free learns it.
        """
        return {
            name: Symmetry(name, signs, signs, restore=_Turned(answer))
            for name, signs, answer in (
                ("mirrored", _Signs(-1.0, -1.0, 1.0, -1.0), -1.0),
                ("reversed", _Signs(1.0, 1.0, -1.0, -1.0), -1.0),
                ("mirrored_reversed", _Signs(-1.0, -1.0, -1.0, 1.0), 1.0),
            )
        }

    def shifts(self, seed: int) -> Shifts:
        """Poses nearer to the singular ones (rad), longer steps (link lengths) and angles and steps read with
        noise (rad and link lengths)."""
        data, count = self.params.data, min(self.params.data.n_test, SHIFTED_ROWS)

        def poses(part: str) -> np.ndarray:
            return draw_poses(count, data.stream("rr_ik", f"shift {part}", seed))

        def split_of(poses: np.ndarray) -> Split:
            sine = determinant(poses[:, :2])
            return with_pole_distance(_make_split(poses, bucket_of(sine)), np.abs(sine))

        def near(within: float) -> Split:
            return split_of(
                draw_poses_near(count, within, data.stream("rr_ik", f"shift near {within}", seed))
            )

        def longer(step: float) -> Split:
            return split_of(poses(f"step {step}") * np.array([1.0, 1.0, step / STEP, step / STEP]))

        def noisy(noise: float) -> Split:
            clean = split_of(poses(f"noise {noise}"))
            drawn = data.stream("rr_ik", f"shift noise of {noise}", seed).normal(0.0, noise, (count, 4))
            return replace(clean, inputs=clean.inputs + torch.from_numpy(drawn.astype(np.float32)))

        unshifted = split_of(poses("none"))
        return {
            "near_pole": shifted_levels(unshifted, (1e-2, 1e-3, 1e-4, 1e-5), near),
            "longer_range": shifted_levels(unshifted, (0.3, 1.0, 3.0), longer),
            "noise": shifted_levels(unshifted, (1e-3, 1e-2, 1e-1), noisy),
        }

    def metrics(self, decoded: Decoded, split: Split, config: TrialConfig) -> dict[str, float]:
        """Score joint steps; `charged_` metrics count every row, a rejected one as if it had answered zero.

        Besides the standard metrics (mean absolute error in radians per joint): `mse`, `mae` over answered
        rows, `success_rate` (their share), `charged_mse`, `predict_zero_mse`, charged MSE and count by bucket
        of |det J|, and the pole metrics of `pole_scores`.
        """
        value, status = split.extras["value"], split.extras["status"]
        predicted = decoded.decoded.to(value.dtype)
        accepted = answered_rows(decoded)
        scores = standard_metrics(predicted, accepted, value, status, baseline=0.0)

        error, charged, zero_error = squared_errors(predicted, value, accepted)
        scores["mse"] = mean_or_nan(error[accepted])
        scores["mae"] = scores["accepted_error"]
        scores["success_rate"] = mean_or_nan(accepted.to(torch.float64))
        scores["charged_mse"] = mean_or_nan(charged)
        scores["predict_zero_mse"] = mean_or_nan(zero_error)
        for number, bucket in enumerate(BUCKET_NAMES):
            rows = split.extras["bucket"] == number
            scores[f"charged_mse_{bucket}"] = mean_or_nan(charged[rows])
            scores[f"rows_{bucket}"] = float(rows.sum())
        return scores | pole_scores(
            split.extras["pose"].numpy(),
            value.numpy(),
            predicted.numpy(),
            accepted.numpy(),
            decoded.q_abs.reshape(len(split), -1).amin(dim=-1).numpy(),
        )

    def _draw(self, seed: int) -> dict[str, Split]:
        data = self.params.data
        poses = draw_poses(sum(data.sizes), data.stream("rr_ik", "poses", seed))
        buckets = bucket_of(determinant(poses[:, :2]))
        parts = stratified_split(buckets, data.sizes, data.stream("rr_ik", "deal", seed))
        names = ("train", "val", "test")
        dealt = dict(zip(names, parts, strict=True))
        return {name: _make_split(poses[rows], buckets[rows]) for name, rows in dealt.items()}


class StepLinearArm(nn.Module):
    """Joint steps as A(theta2) (dx, dy) / q(theta2) in the frame of the first link, q > 0, unit-length rows.

    The step is turned into the frame of the first link, where the answer no longer depends on theta1; the
    network sees theta2 alone, through features that resolve the width of the damped pole.
    """

    def __init__(self, hidden_width: int, hidden_depth: int) -> None:
        super().__init__()
        self.net = make_network(4, hidden_width, hidden_depth, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map (B, 4) inputs to P and Q, both (B, 2)."""
        joint, step = _encode(x)
        out = self.net(joint)
        P = (out[..., :4].unflatten(-1, (2, 2)) * step.unsqueeze(-2)).sum(dim=-1)
        return unit_rows(P, functional.softplus(out[..., 4:]))


class FreeArm(nn.Module):
    """The config's own head on the six features of a pose and its wanted step."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Map (B, 4) inputs to P and Q, both (B, 2), and to what the head names besides."""
        outputs: tuple[Tensor, ...] = self.head(torch.cat(_encode(x), dim=-1))
        return outputs


def pole_scores(
    pose: np.ndarray, truth: np.ndarray, predicted: np.ndarray, answered: np.ndarray, q_abs: np.ndarray
) -> dict[str, float]:
    """How well the poles are placed and passed; nan where too few rows are there to say.

    - pole_location_error: mean distance (rad) of theta2 to the nearest of 0 and +-pi over the hundredth of
      the rows with the smallest |Q|.
    - sign_flip_rate: share of components of answered rows, true size over 1e-3, answered with the wrong
      sign.
    - slope_error: |difference| of the slopes of log |step| over log |det J| between answers and truth, over
      answered rows with 0.02 < |det J| < 0.5.
    - residual_consistency: root mean square over answered rows of the distance (link lengths) between the tip
      motions J dtheta of answer and truth; infinite where an answer is not finite.
    """
    det = np.abs(determinant(pose[:, :2]))
    smallest = np.argsort(q_abs, kind="stable")[: max(1, len(q_abs) // 100)]
    theta2 = np.abs(pose[smallest, 1])
    scores = {"pole_location_error": float(np.minimum(theta2, np.abs(np.pi - theta2)).mean())}
    counted = answered[:, None] & (np.abs(truth) > 1e-3)
    flips = (np.sign(predicted) != np.sign(truth))[counted]
    scores["sign_flip_rate"] = float(flips.mean()) if flips.size else float("nan")
    sizes = np.linalg.norm(truth, axis=1), np.linalg.norm(predicted, axis=1)
    band = answered & (det > 0.02) & (det < 0.5) & (sizes[0] > 0) & (sizes[1] > 0) & np.isfinite(sizes[1])
    if band.sum() > 2:
        true_slope, slope = (np.polyfit(np.log(det[band]), np.log(size[band]), 1)[0] for size in sizes)
        scores["slope_error"] = float(abs(slope - true_slope))
    else:
        scores["slope_error"] = float("nan")
    scores["residual_consistency"] = _tip_error(pose[answered], (predicted - truth)[answered])
    return scores


def _tip_error(pose: np.ndarray, error: np.ndarray) -> float:
    """Root mean square (link lengths) of the tip motions of joint errors, to first order; nan if none."""
    if not len(error):
        return float("nan")
    if not np.isfinite(error).all():
        return float("inf")
    off = (jacobian(pose[:, :2]) @ error[:, :, None])[..., 0]
    return float(np.sqrt((off**2).sum(axis=1).mean()))


def _encode(x: Tensor) -> tuple[Tensor, Tensor]:
    """Features (B, 4) of theta2, and the wanted step (B, 2) in the first link's frame in typical steps."""
    theta1, theta2, dx, dy = x.unbind(dim=-1)
    sine, cosine = theta1.sin(), theta1.cos()
    step = torch.stack([dx * cosine + dy * sine, dy * cosine - dx * sine], dim=-1) / STEP
    bend = theta2.sin() / DAMPING
    # asinh tells apart sines of every size; the last one turns over within the width of the damped pole.
    joint = [theta2.sin(), theta2.cos(), bend.asinh() / 3.0, bend * torch.rsqrt(bend.square() + 1.0)]
    return torch.stack(joint, dim=-1), step


class _Signs:
    """Multiplies the numbers of an input by 1 or -1; undoes itself."""

    def __init__(self, *signs: float) -> None:
        self._signs = signs

    def __call__(self, x: Tensor) -> Tensor:
        # Number by number: a tensor of the signs would have to be copied to a GPU, which waits for it.
        return torch.stack([sign * x[..., i] for i, sign in enumerate(self._signs)], dim=-1)


class _Turned:
    """Multiplies the numerators of an answer by 1 or -1."""

    def __init__(self, sign: float) -> None:
        self._sign = sign

    def __call__(self, outputs: Any) -> Any:
        P, *others = outputs
        return (self._sign * P, *others)


def _make_split(poses: np.ndarray, buckets: np.ndarray) -> Split:
    value = torch.from_numpy(damped_step(poses[:, :2], poses[:, 2:]))
    status = torch.full(value.shape, STATUS_CODES["finite"])
    return Split(
        inputs=torch.from_numpy(poses).to(torch.float32),
        targets=lift_semantic_targets(value.to(torch.float32), status),
        extras={
            "value": value,
            "status": status,
            "pose": torch.from_numpy(poses),
            "bucket": torch.from_numpy(buckets),
        },
    )
