"""What the backward pass may do: policies at bottoms, projective normalisation."""

from __future__ import annotations

from scm.autodiff.policies import (
    GradientPolicy,
    apply_policy,
    get_policy,
    gradient_policy,
    policies_disabled,
    register_policy,
)
from scm.autodiff.projective import GaugePolicy, ProjectiveNormalize, renormalize

__all__ = [
    "GaugePolicy",
    "GradientPolicy",
    "ProjectiveNormalize",
    "apply_policy",
    "get_policy",
    "gradient_policy",
    "policies_disabled",
    "register_policy",
    "renormalize",
]
