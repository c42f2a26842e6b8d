"""Two gradients where there was one: the task's and that of everything beside it, joined under a factor.

What the factor is, is decided by the companion that is asked for it; which terms there are, by the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from scm.losses.terms import LossTerms

_Gradients = list[Tensor | None]


def backward_apart(
    terms: LossTerms,
    parameters: Sequence[Tensor],
    seed: Tensor,
    factor: Callable[[Tensor, Tensor], Tensor],
) -> None:
    """Add ``seed * (task's gradient + factor * auxiliaries' gradient)`` to the parameters' gradients.

    seed: 0-d, what the backward passes begin with. factor: called with the norms of the two gradients over
    all parameters together, in units of a seed of 1, float64 and 0-d, on the parameters' first device;
    returns a 0-d tensor. Where it is 0, a gradient that is not finite adds nothing. Never waits.

    Gates of a gradient policy act on each of the two gradients, not on their sum.
    """
    held = [parameter.grad for parameter in parameters]
    auxiliary = torch.stack([term.to(terms.task) for term in terms.auxiliaries.values()]).sum()
    task_gradients = _gradients(terms.task, parameters, seed, retain=True)
    auxiliary_gradients = _gradients(auxiliary, parameters, seed, retain=False)
    share = factor(_norm(task_gradients, seed), _norm(auxiliary_gradients, seed))
    for parameter, *parts in zip(parameters, held, task_gradients, auxiliary_gradients, strict=True):
        before, by_task, by_auxiliary = parts
        if by_auxiliary is not None:
            scale = share.to(by_auxiliary.device, by_auxiliary.dtype)
            by_auxiliary = torch.where(scale == 0, 0.0, by_auxiliary.to_dense() * scale)
        parameter.grad = _sum(_sum(before, by_task), by_auxiliary)


def _gradients(loss: Tensor, parameters: Sequence[Tensor], seed: Tensor, *, retain: bool) -> _Gradients:
    """Run a backward pass into empty buffers, so that hooks of the parameters see it as any other."""
    for parameter in parameters:
        parameter.grad = None
    if loss.requires_grad:
        loss.backward(gradient=seed.to(loss), retain_graph=retain)
    return [parameter.grad for parameter in parameters]


def _norm(gradients: _Gradients, seed: Tensor) -> Tensor:
    """In float64, where squares of float32 gradients neither overflow nor vanish."""
    held = [gradient.to_dense() for gradient in gradients if gradient is not None]
    if not held:
        return torch.zeros((), dtype=torch.float64, device=seed.device)
    home = held[0].device
    norms = [torch.linalg.vector_norm(gradient, dtype=torch.float64).to(home) for gradient in held]
    return torch.linalg.vector_norm(torch.stack(norms)) / seed.to(norms[0])


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is None or other is None:
        return other if one is None else one
    return one + other
