"""The planar arm: kinematics, damped steps, fair splits, and scores that rejecting poses cannot improve."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from scm.guards.consistency import OutputEquivarianceLoss
from scm.guards.symmetry import check_symmetries
from scm.trial import Decoded
from scm.trial_config import TrialConfig
from trainables.tasks.protocol import SPLIT_NAMES, TaskError
from trainables.tasks.rr_ik import SUGGESTED, StepLinearArm, make_rr_ik_task
from trainables.tasks.rr_ik_data import (
    FAR_SINE,
    bucket_of,
    damped_step,
    determinant,
    draw_poses,
    forward_kinematics,
    jacobian,
    stratified_split,
)
from trainables.trial import run_trial

_VECTORS = Path(__file__).parents[1] / "scm_tests" / "data" / "vectors_scm.json"
SMALL = {"n_train": 600, "n_val": 200, "n_test": 200}
CONFIG = TrialConfig.from_flat(SUGGESTED)


def _cases() -> list[Any]:
    cases = json.loads(_VECTORS.read_text(encoding="utf-8"))["groups"]["bench_rr_ik"]["cases"]
    return [pytest.param(case, id=case["id"]) for case in cases]


def _answers(values: torch.Tensor, rejected: torch.Tensor) -> Decoded:
    bottom = rejected.unsqueeze(-1).expand(values.shape)
    return Decoded(
        decoded=torch.where(bottom, torch.nan, values).to(torch.float32),
        bottom=bottom,
        fault=torch.zeros_like(bottom),
        q_abs=torch.where(bottom, 0.0, 1.0),
        numerator=values,
    )


@pytest.mark.parametrize("case", _cases())
def test_kinematics_match_the_recorded_poses(case: dict[str, Any]) -> None:
    """Tip position, determinant and damped step are those of the reference benchmark."""
    theta, expected = [case["theta1"], case["theta2"]], case["expected"]
    tip = forward_kinematics(theta)
    np.testing.assert_allclose(tip, [expected["x"], expected["y"]], rtol=1e-9, atol=1e-12)
    assert float(determinant(theta)) == pytest.approx(expected["det_J"], rel=1e-9, abs=1e-12)
    step = damped_step(theta, [case["dx"], case["dy"]], case["damping"])
    np.testing.assert_allclose(step, expected["dtheta"], rtol=1e-9, atol=1e-12)


def test_the_jacobian_is_the_derivative_of_the_tip() -> None:
    """Central differences of the tip position give the Jacobian, and its determinant is sin(theta2)."""
    theta, h = np.random.default_rng(0).uniform(-3, 3, size=(50, 2)), 1e-6
    moves = [forward_kinematics(theta + h * e) - forward_kinematics(theta - h * e) for e in np.eye(2)]
    numeric = np.stack(moves, axis=-1) / (2 * h)
    np.testing.assert_allclose(jacobian(theta), numeric, atol=1e-8)
    np.testing.assert_allclose(np.linalg.det(jacobian(theta)), determinant(theta), atol=1e-12)


@pytest.mark.parametrize("damping", [0.0, -1.0, float("nan")], ids=["zero", "negative", "nan"])
def test_a_step_needs_damping(damping: float) -> None:
    """Without damping the step has a pole, and is refused."""
    with pytest.raises(ValueError, match="damping must be > 0"):
        damped_step([0.0, 0.0], [0.1, 0.1], damping)


def test_drawn_poses_have_the_stated_distribution() -> None:
    """Three in ten poses are near-singular, at both poles and exactly on each; steps have deviation 0.1."""
    poses = draw_poses(50_000, np.random.default_rng(1))
    near = np.abs(np.sin(poses[:, 1])) < FAR_SINE
    assert near.mean() == pytest.approx(0.3, abs=0.015)  # one in twenty normal draws falls outside 2e-3
    assert (poses[:, 1] == 0.0).any()
    assert (poses[:, 1] == np.pi).any()
    assert np.abs(poses[:, :2]).max() <= np.pi
    np.testing.assert_allclose(poses[:, 2:].std(axis=0), 0.1, rtol=0.02)
    # The mean square of the steps, and of its buckets, as the reference benchmark draws them.
    square = damped_step(poses[:, :2], poses[:, 2:]) ** 2
    assert square.mean() == pytest.approx(0.335, rel=0.08)


def test_the_order_of_drawn_poses_says_nothing_about_them() -> None:
    """Any stretch of rows holds as many near-singular poses as any other."""
    poses = draw_poses(20_000, np.random.default_rng(2))
    near = np.abs(np.sin(poses[:, 1])) < FAR_SINE
    for part in np.array_split(near, 5):
        assert part.mean() == pytest.approx(0.29, abs=0.03)


def test_buckets_close_below_and_are_open_above() -> None:
    """An edge belongs to the bucket above it, for both signs of the determinant."""
    assert bucket_of([0.0, 9e-6, 1e-5, -1e-4, 5e-4, 1e-3, -1e-2, 1.0]).tolist() == [0, 0, 1, 2, 2, 3, 4, 4]


def test_the_stratified_split_is_disjoint_exact_and_fair() -> None:
    """Parts have the sizes asked for, share no row, and hold each bucket's share to within a row."""
    rng = np.random.default_rng(5)
    buckets = rng.choice(5, size=2_000, p=[0.07, 0.02, 0.14, 0.07, 0.7])
    sizes = (1_300, 200, 500)
    parts = stratified_split(buckets, sizes, rng)
    assert tuple(part.size for part in parts) == sizes
    assert len(np.unique(np.concatenate(parts))) == 2_000
    for part in parts:
        for bucket in range(5):
            expected = part.size * np.mean(buckets == bucket)
            assert abs(np.sum(buckets[part] == bucket) - expected) <= 2
    with pytest.raises(ValueError, match="at most 2000 rows"):
        stratified_split(buckets, (1_900, 200), rng)


def test_a_subset_of_the_training_part_is_as_mixed_as_the_whole() -> None:
    """The first rows of the training part hold the near-singular poses in their overall share."""
    train = make_rr_ik_task({"n_train": 3_000, "n_val": 100, "n_test": 500}).splits(0)["train"]
    near = (train.extras["bucket"] <= 2).to(torch.float64)
    assert float(near[:1_000].mean()) == pytest.approx(float(near.mean()), abs=0.05)


def test_splits_are_fixed_by_the_data_seed_and_disjoint() -> None:
    """Validation is not training; the trial's seed changes data only with `redraw_data`."""
    splits = make_rr_ik_task(SMALL).splits(0)
    assert {name: len(splits[name]) for name in SPLIT_NAMES} == {"train": 600, "val": 200, "test": 200}
    rows = torch.cat([splits[name].inputs for name in SPLIT_NAMES])
    assert len(torch.unique(rows, dim=0)) == 1_000
    assert make_rr_ik_task(SMALL).splits(3)["val"].digest() == splits["val"].digest()
    redrawn = make_rr_ik_task(SMALL | {"redraw_data": True})
    assert redrawn.splits(3)["val"].digest() != redrawn.splits(4)["val"].digest()


def test_the_step_linear_arm_is_linear_in_the_step_and_knows_the_first_link() -> None:
    """Doubling the step doubles the answer; turning arm and step together leaves it as it was."""
    torch.manual_seed(0)
    arm = StepLinearArm(16, 2).to(torch.float64)
    x = torch.from_numpy(draw_poses(64, np.random.default_rng(0)))

    def answer(rows: torch.Tensor) -> torch.Tensor:
        P, Q = arm(rows)
        torch.testing.assert_close(P.square().sum(-1) + Q[:, 0].square(), torch.ones(64, dtype=torch.float64))
        assert bool((Q > 0).all())
        return P / Q

    doubled, turned = x.clone(), x.clone()
    doubled[:, 2:] *= 2
    turn = torch.tensor(0.7)
    turned[:, 0] += turn
    turned[:, 2] = x[:, 2] * turn.cos() - x[:, 3] * turn.sin()
    turned[:, 3] = x[:, 2] * turn.sin() + x[:, 3] * turn.cos()
    torch.testing.assert_close(answer(doubled), 2 * answer(x))
    torch.testing.assert_close(answer(turned), answer(x))


def test_rejecting_hard_rows_does_not_improve_the_charged_error() -> None:
    """Dropping the worst rows lowers the error over answers, and never what is charged below its price."""
    task = make_rr_ik_task(SMALL)
    split = task.splits(0)["test"]
    value = split.extras["value"]
    nothing = torch.zeros(len(split), dtype=torch.bool)
    noisy = value + 0.01
    answered = task.metrics(_answers(noisy, nothing), split, CONFIG)
    hard = value.square().sum(dim=-1) > value.square().sum(dim=-1).median()
    choosy = task.metrics(_answers(noisy, hard), split, CONFIG)
    assert answered["charged_mse"] == pytest.approx(1e-4, rel=1e-2)
    assert answered["success_rate"] == 1.0
    assert choosy["success_rate"] == pytest.approx(0.5)
    assert choosy["mse"] == pytest.approx(1e-4, rel=1e-2)
    assert choosy["charged_mse"] > 100 * answered["charged_mse"]
    assert choosy["charged_error"] > answered["charged_error"]
    silent = task.metrics(_answers(noisy, ~nothing), split, CONFIG)
    assert silent["charged_mse"] == pytest.approx(silent["predict_zero_mse"])
    assert np.isnan(silent["mse"])


def test_bucket_scores_add_up_to_the_whole() -> None:
    """Every row is in one bucket, and the buckets' charged errors average to the overall one."""
    task = make_rr_ik_task(SMALL)
    split = task.splits(0)["test"]
    rejected = torch.arange(len(split)) % 3 == 0
    scores = task.metrics(_answers(split.extras["value"] * 1.1, rejected), split, CONFIG)
    names = ("b0", "b1", "b2", "b3", "rest")
    total = sum(scores[f"rows_{name}"] * np.nan_to_num(scores[f"charged_mse_{name}"]) for name in names)
    assert sum(scores[f"rows_{name}"] for name in names) == len(split)
    assert total / len(split) == pytest.approx(scores["charged_mse"])


def test_exact_answers_have_no_pole_errors() -> None:
    """The truth flips no sign, has the slope of the truth, and moves the tip as it should."""
    task = make_rr_ik_task(SMALL)
    split = task.splits(0)["test"]
    nothing = torch.zeros(len(split), dtype=torch.bool)
    scores = task.metrics(_answers(split.extras["value"], nothing), split, CONFIG)
    assert scores["sign_flip_rate"] == 0.0
    assert scores["slope_error"] == pytest.approx(0.0, abs=1e-5)
    assert scores["residual_consistency"] == pytest.approx(0.0, abs=1e-5)
    flipped = task.metrics(_answers(-split.extras["value"], nothing), split, CONFIG)
    assert flipped["sign_flip_rate"] == 1.0


@pytest.mark.parametrize("garbage", [float("inf"), float("nan"), 1e38], ids=["inf", "nan", "huge"])
def test_answering_garbage_once_looks_bad(garbage: float) -> None:
    """One answer that is not finite costs infinity in every error, without a warning."""
    task = make_rr_ik_task(SMALL)
    split = task.splits(0)["test"]
    values = split.extras["value"].clone()
    values[0] = garbage
    scores = task.metrics(_answers(values, torch.zeros(len(split), dtype=torch.bool)), split, CONFIG)
    for name in ("mse", "charged_mse", "charged_error", "residual_consistency"):
        assert scores[name] > 1e30, name


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"structrue": "free"}, "did you mean 'structure'"),
        ({"structure": "fre"}, "did you mean 'free'"),
        ({"error_weight_cap": -1}, "error_weight_cap must be a number > 0.0, got -1"),
        ({"n_test": True}, "n_test must be a whole number >= 1, got True"),
    ],
    ids=["unknown", "structure", "cap", "bool"],
)
def test_bad_parameters_are_named(params: dict[str, Any], message: str) -> None:
    """Each wrong parameter is one line that names it, its value and what would be right."""
    with pytest.raises(TaskError, match=message):
        make_rr_ik_task(params)


def test_the_damped_step_has_the_symmetries_of_the_task() -> None:
    """Mirrored poses and reversed steps turn the right answer as the task says; another function has none."""
    task = make_rr_ik_task(SMALL)
    pose = task.splits(0)["test"].extras["pose"]
    symmetries = task.symmetries()
    check_symmetries(symmetries, pose)
    loss = OutputEquivarianceLoss(symmetries, distance="l2", views=3)

    def right(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        step = torch.from_numpy(damped_step(x[:, :2].numpy(), x[:, 2:].numpy()))
        return step, torch.ones_like(step)

    assert loss(right, pose).loss.item() < 1e-20
    found = loss(lambda x: (x[:, :2] + 0.1, torch.ones_like(x[:, :2])), pose)
    assert min(found.per_view.values()) > 1e-3


@pytest.mark.slow
def test_few_poses_teach_more_where_symmetries_are_known() -> None:
    """A free head learns three hundred poses by heart: what it gets wrong on others shrinks by a fifth."""
    task = make_rr_ik_task({"n_train": 300, "n_val": 200, "n_test": 2_000, "structure": "free"})
    config = dict(SUGGESTED) | {"max_epochs": 120, "batch_size": 32, "tau_infer": 1e-4}
    known = config | {"lambda_equivariance": 0.3, "equivariance_distance": "l2"}
    plain, guarded = (
        sum(run_trial(task, each, seed)["test_charged_error"] for seed in range(3))
        for each in (config, known)
    )
    assert guarded < 0.8 * plain


@pytest.mark.parametrize("structure", ["step_linear", "free"])
def test_a_short_trial_learns_the_arm(structure: str) -> None:
    """A few epochs are enough to be charged less than answering zero (0.21 rad) would be."""
    task = make_rr_ik_task({"n_train": 1_500, "n_val": 200, "n_test": 400, "structure": structure})
    outcome = run_trial(task, dict(SUGGESTED) | {"max_epochs": 8, "batch_size": 32}, seed=0)
    assert outcome["status"] == "completed", outcome["error"]
    assert outcome["test_charged_error"] < 0.15
    if structure == "step_linear":
        assert outcome["test_metric.charged_mse"] < 0.2 * outcome["test_metric.predict_zero_mse"]
