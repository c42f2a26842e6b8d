"""How a layer's output consults the gradient policies: one gate per output tensor.

The policy is the layer's own, else the one in force at the forward pass, else (so that a context around
`backward()` alone acts as well) the one in force at the backward pass, else the layer's registered default.
The policies themselves are decided in `scm.autodiff.policies`.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor

from scm.autodiff.policies import (
    GradientPolicy,
    apply_policy_tensor,
    clamp_limit,
    gate_gradients,
    has_active_policy,
    is_transformed,
    policy_in_force,
    remember_late_gate,
)


def gate_output(output: Tensor, bottom: Tensor, layer: str, policy: GradientPolicy | None = None) -> Tensor:
    """Return `output` with a backward pass that applies the policy of `layer`; `bottom` has its shape.

    Inside ``torch.func`` transforms, where a backward pass cannot be told from a forward one, the policy in
    force at the call is taken.
    """
    if policy is not None or has_active_policy() or is_transformed():
        return gate_gradients(output, bottom, policy_in_force(layer) if policy is None else policy)
    if not (torch.is_grad_enabled() and output.requires_grad):
        return output
    gate = _LateOutputGate(bottom, layer)
    remember_late_gate(gate)
    gated = output.view_as(output)
    gated.register_hook(gate)
    return gated


class _LateOutputGate:
    """A hook whose policy is known when ``backward()`` runs."""

    __slots__ = ("__weakref__", "bottom", "layer", "limit", "setting", "thread")

    def __init__(self, bottom: Tensor, layer: str) -> None:
        self.bottom = bottom
        self.layer = layer
        self.limit = clamp_limit()
        self.thread = threading.get_ident()
        # Written by contexts that open on the forward pass's thread: the threads on which CUDA gradients are
        # computed see no context variable.
        self.setting: Any = None

    def __call__(self, gradient: Tensor | None) -> Tensor | None:
        if gradient is None:
            return None
        policy = policy_in_force(self.layer)
        told = self.setting
        if threading.get_ident() != self.thread and told is not None and told.policy is not None:
            policy = told.policy
        return apply_policy_tensor(gradient, self.bottom, policy, limit=self.limit)
