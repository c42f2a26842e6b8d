"""How a loss over rows becomes one node of the autograd graph.

A kernel computes a reduced loss and, from the same intermediate values, its gradients. Written this way a
loss is a few dozen small operations instead of three times as many graph nodes, its masks act by `where` on
values and gradients (never by multiplication, so a NaN row stays alone), and its gradients are bounded by
construction. The formulas are decided in the modules of the single losses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Kernel = Callable[..., tuple[Tensor, Sequence[Tensor]]]
"""``kernel(*arguments, with_gradients=bool)`` returns the loss and the gradients of its first arguments."""

TINY = 1e-250
"""Added where 0/0 could arise, in float64 arithmetic whose regular values lie far above."""


def reduce_rows(kernel: Kernel, *arguments: Any) -> Tensor:
    """Return the kernel's loss, differentiable (also twice, also under ``torch.func``) through the kernel.

    arguments: tensors, numbers or None. The kernel says of how many of the first arguments it returns
    gradients; the other arguments get none.
    """
    if torch._C._are_functorch_transforms_active():
        loss: Tensor = _Transformed.apply(kernel, *arguments)
        return loss
    if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in arguments):
        loss = _Eager.apply(kernel, *arguments)
        return loss
    return kernel(*arguments, with_gradients=False)[0]


class _Eager(torch.autograd.Function):
    """Keeps the gradients that the forward pass has computed."""

    @staticmethod
    def forward(ctx: Any, kernel: Kernel, *arguments: Any) -> Tensor:
        loss, gradients = kernel(*arguments, with_gradients=True)
        _save(ctx, kernel, arguments, gradients)
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        if torch.is_grad_enabled():  # someone differentiates twice: the gradients need a graph of their own
            return _pulled_back(ctx, upstream, _recomputed(ctx, saved))
        return _pulled_back(ctx, upstream, saved[ctx.n_arguments :])


class _Transformed(torch.autograd.Function):
    """The form that ``torch.func`` transforms accept; it computes the gradients in the backward pass.

    Outside of transforms `_Eager` is used, because this form costs 25 us more per call.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(kernel: Kernel, *arguments: Any) -> Tensor:
        return kernel(*arguments, with_gradients=False)[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _save(ctx, inputs[0], inputs[1:], ())

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        return _pulled_back(ctx, upstream, _recomputed(ctx, ctx.saved_tensors))


def _save(ctx: Any, kernel: Kernel, arguments: Sequence[Any], gradients: Sequence[Tensor]) -> None:
    ctx.save_for_backward(*(a if isinstance(a, Tensor) else None for a in arguments), *gradients)
    ctx.constants = tuple(None if isinstance(a, Tensor) else a for a in arguments)
    ctx.n_arguments = len(arguments)
    ctx.kernel = kernel


def _recomputed(ctx: Any, saved: Sequence[Any]) -> Sequence[Tensor]:
    arguments = [t if c is None else c for t, c in zip(saved, ctx.constants, strict=False)]
    gradients: Sequence[Tensor] = ctx.kernel(*arguments, with_gradients=True)[1]
    return gradients


def _pulled_back(ctx: Any, upstream: Tensor, gradients: Sequence[Tensor]) -> tuple[Any, ...]:
    needed = ctx.needs_input_grad[1:]
    pulled = [upstream * g if needed[i] else None for i, g in enumerate(gradients)]
    return (None, *pulled, *([None] * (ctx.n_arguments - len(pulled))))


def mean_over(values: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | float]:
    """Return the mean of `values` over the rows of `mask` (0 over no rows), and what one row weighs in it."""
    if mask is None:
        share: Tensor | float = 1.0 / max(values.numel(), 1)
    else:
        values = torch.where(mask, values, 0.0)
        share = mask.sum().clamp(min=1).to(values.dtype).reciprocal()
    return values.sum() * share, share


def as_rows_of(gradient: Tensor, mask: Tensor | None, like: Tensor) -> Tensor:
    """Return the gradient with 0 outside of `mask`, in the shape and dtype of the tensor it belongs to."""
    if mask is not None:
        gradient = torch.where(mask, gradient, 0.0)
    if gradient.shape != like.shape:
        gradient = gradient.sum_to_size(like.shape)
    return gradient.to(like.dtype)


def check_at_least_zero(name: str, value: float | Tensor) -> None:
    """Raise ValueError unless a plain number is finite and >= 0; tensors are trusted, never read."""
    if not isinstance(value, Tensor) and not 0 <= value < float("inf"):
        raise ValueError(f"{name} must be finite and >= 0, got {name}={value!r}")


def bool_mask(name: str, mask: Tensor, like: Tensor) -> Tensor:
    """Return `mask` as bool in the shape of `like`; a shape that does not expand to it is a ValueError."""
    mask = mask if mask.dtype == torch.bool else mask.to(torch.bool)
    if mask.shape == like.shape:
        return mask
    try:
        return mask.expand(like.shape)
    except RuntimeError as error:
        raise ValueError(
            f"{name} must expand to shape {tuple(like.shape)}, got shape {tuple(mask.shape)}"
        ) from error
