"""Second-order resonators: their response, how filters and probing points are drawn, how peaks are scored.

Only NumPy. The task that learns the response and is asked about sharper resonances than it was shown is
`trainables.tasks.rf`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Complexes = npt.NDArray[np.complex128]

W0_RANGE = (0.5, 5.0)
W_RANGE = (0.1, 10.0)
QUALITY_LOW = 2.0
QUALITY_SEEN = 30.0
PEAK_KEPT = 0.9


@dataclass(frozen=True, slots=True)
class Filters:
    """Resonance frequency `w0` (rad/s) and quality factor `quality` of each filter, (F,) each."""

    w0: Floats
    quality: Floats


def response(w: npt.ArrayLike, w0: npt.ArrayLike, quality: npt.ArrayLike) -> Complexes:
    """H(jw) = w0^2 / ((jw)^2 + (w0/Q)(jw) + w0^2), in complex128; inputs broadcast."""
    s, w0 = 1j * np.asarray(w, dtype=np.float64), np.asarray(w0, dtype=np.float64)
    return np.asarray(w0**2 / (s**2 + w0 / np.asarray(quality, dtype=np.float64) * s + w0**2))


def draw_filters(count: int, quality_max: float, rng: np.random.Generator, *, wider: float = 1.0) -> Filters:
    """Draw filters with w0 log-uniform in [0.5 / wider, 5 wider] and Q log-uniform in [2, quality_max]."""
    w0 = _log_uniform(W0_RANGE[0] / wider, W0_RANGE[1] * wider, (count,), rng)
    return Filters(w0, _log_uniform(QUALITY_LOW, quality_max, (count,), rng))


def draw_peak_points(count: int, quality: float, rng: np.random.Generator) -> Floats:
    """Draw (w, w0, Q) rows, (count, 3), of filters of one quality, w within a bandwidth of the resonance."""
    w0 = _log_uniform(W0_RANGE[0], W0_RANGE[1], (count,), rng)
    w = np.clip(w0 * (1.0 + rng.uniform(-1.0, 1.0, size=count) / quality), *W_RANGE)
    return np.column_stack([w, w0, np.full(count, quality)])


def pole_distance(points: Floats) -> Floats:
    """How far (N,) the response's denominator is from 0 at (w, w0, Q) rows, in units of w0^2: 1 / |H|."""
    return np.asarray(1.0 / np.abs(response(points[:, 0], points[:, 1], points[:, 2])))


def draw_points(
    filters: Filters, per_filter: int, rng: np.random.Generator, *, focus: bool = False, wider: float = 1.0
) -> Floats:
    """Draw (w, w0, Q) rows, (F * per_filter, 3), with w log-uniform in [0.1 / wider, 10 wider].

    With `focus`, each point is instead taken near the resonance, N(w0, (w0/Q)^2), with probability one half
    (clipped to the same range).
    """
    shape = (filters.w0.size, per_filter)
    w = _log_uniform(W_RANGE[0] / wider, W_RANGE[1] * wider, shape, rng)
    w0, quality = filters.w0[:, None], filters.quality[:, None]
    if focus:
        near = np.clip(rng.normal(w0, w0 / quality, size=shape), *W_RANGE)
        w = np.where(rng.random(shape) < 0.5, near, w)
    rows = np.broadcast_arrays(w, w0, quality)
    return np.stack([row.ravel() for row in rows], axis=-1)


def encode_points(points: Floats) -> npt.NDArray[np.float32]:
    """Model inputs: log10 of (w, w0, Q), float32."""
    return np.log10(points).astype(np.float32)


def encode_response(points: Floats) -> npt.NDArray[np.float32]:
    """Targets: real and imaginary part of the response at (w, w0, Q) rows, (N, 2), float32."""
    h = response(points[:, 0], points[:, 1], points[:, 2])
    return np.stack([h.real, h.imag], axis=-1).astype(np.float32)


def peak_grid(filters: Filters, count: int = 2048, coarse: int = 256) -> Floats:
    """Frequencies (F, count + coarse): dense within ten bandwidths of each resonance, coarse elsewhere."""
    offsets = np.linspace(-10.0, 10.0, count) / filters.quality[:, None]
    near = np.clip(filters.w0[:, None] * (1.0 + offsets), *W_RANGE)
    far = np.geomspace(*W_RANGE, coarse)
    return np.concatenate([near, np.broadcast_to(far, (filters.w0.size, coarse))], axis=1)


def peak_scores(
    predict: Callable[[Floats], Complexes], filters: Filters, *, count: int = 2048, filters_at_once: int = 32
) -> dict[str, float]:
    """How well predicted peaks keep their height: max |H| predicted over max |H| true, per filter.

    `predict` maps (w, w0, Q) rows to complex responses, nan where it abstains (an abstention is no peak).
    Returns `peak_retention_yield` (share with ratio >= 0.9), `false_peak_hallucination_rate` (ratio above
    1/0.9) and the median and 95th percentile of the ratio.
    """
    ratios = []
    for start in range(0, filters.w0.size, filters_at_once):
        some = slice(start, start + filters_at_once)
        part = Filters(filters.w0[some], filters.quality[some])
        w = peak_grid(part, count)
        columns = np.broadcast_arrays(w, part.w0[:, None], part.quality[:, None])
        points = np.stack([column.ravel() for column in columns], axis=-1)
        height = np.abs(predict(points)).reshape(w.shape)
        true = np.abs(response(*np.moveaxis(points, -1, 0))).reshape(w.shape)
        ratios.append(np.nan_to_num(height, nan=0.0, posinf=np.inf).max(axis=1) / true.max(axis=1))
    ratio = np.concatenate(ratios)
    p50, p95 = np.quantile(ratio, [0.5, 0.95])
    return {
        "peak_retention_yield": float(np.mean(ratio >= PEAK_KEPT)),
        "false_peak_hallucination_rate": float(np.mean(ratio > 1.0 / PEAK_KEPT)),
        "peak_ratio_p50": float(p50),
        "peak_ratio_p95": float(p95),
    }


def _log_uniform(low: float, high: float, shape: tuple[int, ...], rng: np.random.Generator) -> Floats:
    return np.exp(rng.uniform(np.log(low), np.log(high), size=shape))
