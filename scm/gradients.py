"""All gradients of a model at once: grouped for the fused passes, checked, clipped.

What is done with gradients that are not finite is decided in `scm.training.guard` and `scm.guards.finite`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

Groups = Sequence[Sequence[Tensor]]


def flag_non_finite(groups: Groups, found: Tensor, one: Tensor) -> None:
    """Add to the flag `found`, 0-d float32, where a tensor of `by_kind` groups is not finite; never waits.

    one: a 0-d float32 1 on the flag's device. The tensors are not changed.
    """
    for group in groups:
        there = group[0].device
        flag = found if there == found.device else found.to(there)
        # GradScaler's own kernel: one pass over all gradients, where isfinite() takes one call for each.
        torch._amp_foreach_non_finite_check_and_unscale_(list(group), flag, one.to(there))
        if flag is not found:
            found += flag.to(found.device)


def is_finite(values: Tensor) -> Tensor:
    """Return where real numbers are finite: `torch.isfinite` in fewer operations."""
    return values.abs() < torch.inf


def by_kind(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Group tensors by device and dtype, as the fused passes want them; sparse ones by their values."""
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        if tensor.is_sparse:
            tensor = tensor._values()
        key = (tensor.device, tensor.dtype)
        held = groups.get(key)
        if held is None:
            groups[key] = [tensor]
        else:
            held.append(tensor)
    return list(groups.values())


def clip_by_norm(gradients: Sequence[Tensor], limit: float) -> None:
    """Scale all gradients in place so that the norm of them together is at most `limit`; never waits."""
    # In float64, where squares of float32 gradients do not overflow: a norm of inf would clip them to 0.
    norms = [torch.stack(torch._foreach_norm(group, 2, dtype=torch.float64)) for group in by_kind(gradients)]
    home = norms[0].device
    total = torch.linalg.vector_norm(torch.cat([norm.to(home) for norm in norms]))
    factor = (limit / (total + 1e-12)).clamp(max=1.0)
    for group in by_kind(gradients):
        torch._foreach_mul_(group, factor.to(group[0].device, group[0].dtype))


def count_non_finite(tensors: Iterable[Tensor]) -> int:
    """Return how many values of all tensors are not finite; waits for the device once."""
    counts = [(~torch.isfinite(tensor)).sum() for tensor in tensors]
    return (
        int(torch.stack([count.cpu() if len(counts) == 1 else count for count in counts]).sum())
        if counts
        else 0
    )
