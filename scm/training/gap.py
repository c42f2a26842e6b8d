"""The training threshold tau: drawn anew for each batch, so that no single boundary is learned by heart."""

from __future__ import annotations

import math

import torch


def perturbed_threshold(tau_min: float, tau_max: float, *, generator: torch.Generator | None = None) -> float:
    """Return one draw from [tau_min, tau_max], bounds included, never outside of them.

    generator: where the draw comes from, torch's global CPU generator by default. No random number is
    used when the bounds are equal. Raises ValueError unless both are finite and tau_min <= tau_max.

    Differs from zeroproofml 0.6.1, whose draws it repeats: scaled in float64 and clipped (theirs, rounded to
    float32, can fall below tau_min), and a generator of one's own leaves shuffling and dropout alone.
    """
    if not (math.isfinite(tau_min) and math.isfinite(tau_max) and tau_min <= tau_max):
        raise ValueError(f"tau_min must be <= tau_max and both finite, got {tau_min=}, {tau_max=}")
    if tau_min == tau_max:
        return float(tau_min)
    device = "cpu" if generator is None else generator.device
    share = torch.rand((), dtype=torch.float32, generator=generator, device=device).item()
    return min(max(tau_min + (tau_max - tau_min) * share, float(tau_min)), float(tau_max))
