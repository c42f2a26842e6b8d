"""The planar arm of two unit links: kinematics, damped steps, how poses are drawn and split.

Only NumPy. Where the arm is stretched or folded (det J = sin theta2 = 0) its plain inverse has a pole; the
damped least-squares step stays finite there, but turns round within a few thousandths of a radian.
The task that learns the step is `trainables.tasks.rr_ik`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

DAMPING = 0.01
NEAR_SHARE = 0.30
NEAR_WIDTH = 1e-3
FAR_SINE = 2e-3
STEP = 0.1
# |det J| from singular to well conditioned; the last bucket is open above.
BUCKET_EDGES: tuple[float, ...] = (0.0, 1e-5, 1e-4, 1e-3, 1e-2)
BUCKET_NAMES: tuple[str, ...] = ("b0", "b1", "b2", "b3", "rest")


def forward_kinematics(theta: npt.ArrayLike) -> Floats:
    """Tip position (..., 2) of an arm with joint angles `theta` (..., 2), in link lengths."""
    theta1, theta12 = _angles(theta)
    return np.stack([np.cos(theta1) + np.cos(theta12), np.sin(theta1) + np.sin(theta12)], axis=-1)


def jacobian(theta: npt.ArrayLike) -> Floats:
    """The derivative (..., 2, 2) of the tip position (rows x, y) by the joint angles (columns)."""
    theta1, theta12 = _angles(theta)
    s1, c1, s12, c12 = np.sin(theta1), np.cos(theta1), np.sin(theta12), np.cos(theta12)
    rows = [np.stack([-s1 - s12, -s12], axis=-1), np.stack([c1 + c12, c12], axis=-1)]
    return np.stack(rows, axis=-2)


def determinant(theta: npt.ArrayLike) -> Floats:
    """det J = sin(theta2), (...,)."""
    return np.sin(np.asarray(theta, dtype=np.float64)[..., 1])


def damped_step(theta: npt.ArrayLike, step: npt.ArrayLike, damping: float = DAMPING) -> Floats:
    """Joint step J^T (J J^T + damping^2 I)^-1 (dx, dy), in radians, (..., 2); needs damping > 0."""
    if not damping > 0:
        raise ValueError(f"damping must be > 0, got {damping=}")
    j = jacobian(theta)
    gram = j @ j.swapaxes(-1, -2) + damping**2 * np.eye(2)
    # A closed 2 x 2 inverse: no factorisation is called once per row.
    a, b, d = gram[..., 0, 0], gram[..., 0, 1], gram[..., 1, 1]
    scale = a * d - b * b
    dx, dy = np.moveaxis(np.asarray(step, dtype=np.float64), -1, 0)
    u, v = (d * dx - b * dy) / scale, (a * dy - b * dx) / scale
    return np.stack([j[..., 0, 0] * u + j[..., 1, 0] * v, j[..., 0, 1] * u + j[..., 1, 1] * v], axis=-1)


def draw_poses(count: int, rng: np.random.Generator) -> Floats:
    """Draw (theta1, theta2, dx, dy), (count, 4), in an order that says nothing about the pose.

    Three in ten poses are near-singular: theta2 within a normal of width 1e-3 round 0 or pi (one of each
    side is exactly singular); the others are uniform with |sin theta2| >= 2e-3. Steps are N(0, 0.1^2).
    """
    near = round(NEAR_SHARE * count)
    folded = np.where(rng.random(near) < 0.5, 0.0, np.pi)
    theta2_near = np.clip(folded + rng.normal(0.0, NEAR_WIDTH, size=near), -np.pi, np.pi)
    theta2_near[:2] = (0.0, np.pi)[: min(near, 2)]
    theta2_far = rng.uniform(-np.pi, np.pi, size=count - near)
    while True:
        close = np.abs(np.sin(theta2_far)) < FAR_SINE
        if not close.any():
            break
        theta2_far[close] = rng.uniform(-np.pi, np.pi, size=int(close.sum()))
    theta2 = rng.permutation(np.concatenate([theta2_near, theta2_far]))
    theta1 = rng.uniform(-np.pi, np.pi, size=count)
    return np.column_stack([theta1, theta2, rng.normal(0.0, STEP, size=(count, 2))])


def draw_poses_near(count: int, within: float, rng: np.random.Generator) -> Floats:
    """Draw (theta1, theta2, dx, dy), (count, 4), with theta2 within `within` radians of 0 or pi."""
    poses = draw_poses(count, rng)
    folded = np.where(rng.random(count) < 0.5, 0.0, np.pi)
    offset = rng.uniform(-within, within, size=count)
    # Angles stay in [-pi, pi], where those of training are.
    poses[:, 1] = np.where(folded > 0.0, np.sign(offset) * np.pi - offset, offset)
    return poses


def bucket_of(det: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """The bucket (0 to 4, see `BUCKET_EDGES`) of each |det J|; a lower edge belongs to its bucket."""
    return np.searchsorted(np.asarray(BUCKET_EDGES[1:]), np.abs(np.asarray(det)), side="right").astype(
        np.int64
    )


def stratified_split(
    buckets: npt.NDArray[np.int64], sizes: tuple[int, ...], rng: np.random.Generator
) -> tuple[npt.NDArray[np.int64], ...]:
    """Disjoint row indices of the given sizes, each with the buckets in their overall proportions.

    The rows of a bucket are spread evenly over a line, all buckets over the same one, and the line is cut at
    `sizes`: each part holds its share of a bucket to within two rows. Within a part the order is random.
    """
    if sum(sizes) > buckets.size:
        raise ValueError(f"sizes must add up to at most {buckets.size} rows, got {sizes=}")
    shuffled = rng.permutation(buckets.size)
    spread = np.empty(buckets.size)
    for bucket in np.unique(buckets):
        rows = shuffled[buckets[shuffled] == bucket]
        spread[rows] = (np.arange(rows.size) + rng.random()) / rows.size
    dealt = np.argsort(spread, kind="stable")
    ends = np.cumsum(sizes)
    return tuple(rng.permutation(dealt[end - size : end]) for size, end in zip(sizes, ends, strict=True))


def _angles(theta: npt.ArrayLike) -> tuple[Floats, Floats]:
    joints = np.asarray(theta, dtype=np.float64)
    return joints[..., 0], joints[..., 0] + joints[..., 1]
