"""How a loss over rows becomes one node of the autograd graph.

A kernel computes a reduced loss and, from the same intermediate values, its gradients. Written this way a
loss is a few dozen small operations instead of three times as many graph nodes, its masks act by `where` on
values and gradients (never by multiplication, so a NaN row stays alone), and its gradients are bounded by
construction. The formulas are decided in the modules of the single losses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Reduced(NamedTuple):
    """What a kernel returns: the loss, its gradients in its first arguments, and parts of it for the log."""

    loss: Tensor
    gradients: Sequence[Tensor | None] = ()
    parts: Sequence[Tensor] = ()


Kernel = Callable[..., Reduced]
"""Called as ``kernel(*arguments, with_gradients=bool)``; without, `Reduced.gradients` may be empty."""

TINY = 1e-250
"""Added where 0/0 could arise, in float64 arithmetic whose regular values lie far above."""


def reduce_rows(kernel: Kernel, *arguments: Any) -> Tensor:
    """Return the kernel's loss, differentiable (also twice, also under ``torch.func``) through the kernel.

    arguments: tensors, numbers or None. The kernel says of how many of the first arguments it returns
    gradients; the other arguments get none.
    """
    return reduce_terms(kernel, *arguments)[0]


def reduce_terms(kernel: Kernel, *arguments: Any) -> tuple[Tensor, ...]:
    """Return the kernel's loss as `reduce_rows` does, followed by its parts, which have no gradient."""
    outputs: tuple[Tensor, ...]
    if torch._C._are_functorch_transforms_active():
        outputs = _Transformed.apply(kernel, *arguments)
    elif torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in arguments):
        outputs = _Eager.apply(kernel, *arguments)
    else:
        loss, _, parts = kernel(*arguments, with_gradients=False)
        outputs = (loss, *parts)
    return outputs


class WeightedTerm(NamedTuple):
    """One kernel of a weighted sum. operands: which of the shared inputs its first arguments are."""

    weight: float | Tensor
    kernel: Kernel
    operands: tuple[int, ...]
    arguments: tuple[Any, ...]


def reduce_weighted(inputs: Sequence[Tensor], terms: Sequence[WeightedTerm]) -> tuple[Tensor, ...]:
    """Return the weighted sum of several kernels of shared inputs as one node, followed by each loss."""
    layout: list[tuple[Kernel, tuple[int, ...], int, int]] = []
    arguments: list[Any] = list(inputs)
    for weight, kernel, operands, rest in terms:
        layout.append((kernel, operands, len(arguments), len(arguments) + 1 + len(rest)))
        arguments += (weight, *rest)
    return reduce_terms(partial(_weighted_sum, len(inputs), layout), *arguments)


def _weighted_sum(
    n_inputs: int,
    layout: Sequence[tuple[Kernel, tuple[int, ...], int, int]],
    *arguments: Any,
    with_gradients: bool,
) -> Reduced:
    total: Tensor | None = None
    gradients: list[Tensor | None] = [None] * n_inputs
    parts = []
    for kernel, operands, start, stop in layout:
        weight: float | Tensor = arguments[start]
        inputs = [arguments[i] for i in operands]
        loss, slopes, _ = kernel(*inputs, *arguments[start + 1 : stop], with_gradients=with_gradients)
        total = _plus(total, loss, weight)
        parts.append(loss)
        for i, slope in zip(operands, slopes, strict=False):
            if slope is not None:
                gradients[i] = _plus(gradients[i], slope, weight)
    assert total is not None
    if total is parts[0]:  # the part will be marked as one without a gradient, the total must not be
        total = total.clone()
    return Reduced(total, gradients, parts)


def _plus(total: Tensor | None, value: Tensor, weight: float | Tensor) -> Tensor:
    if isinstance(weight, Tensor):
        weighted = value * weight
        return weighted if total is None else total + weighted
    if total is None:
        return value if weight == 1 else value * weight
    return torch.add(total, value, alpha=weight)


class _Eager(torch.autograd.Function):
    """Keeps the gradients that the forward pass has computed."""

    @staticmethod
    def forward(ctx: Any, kernel: Kernel, *arguments: Any) -> tuple[Tensor, ...]:
        loss, gradients, parts = kernel(*arguments, with_gradients=True)
        _save(ctx, kernel, arguments, gradients, parts)
        return (loss, *parts)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Any, ...]:
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
    def forward(kernel: Kernel, *arguments: Any) -> tuple[Tensor, ...]:
        loss, _, parts = kernel(*arguments, with_gradients=False)
        return (loss, *parts)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _save(ctx, inputs[0], inputs[1:], (), output[1:])

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Any, ...]:
        return _pulled_back(ctx, upstream, _recomputed(ctx, ctx.saved_tensors))


def _save(
    ctx: Any,
    kernel: Kernel,
    arguments: Sequence[Any],
    gradients: Sequence[Tensor | None],
    parts: Sequence[Tensor],
) -> None:
    ctx.mark_non_differentiable(*parts)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*(a if isinstance(a, Tensor) else None for a in arguments), *gradients)
    ctx.constants = tuple(None if isinstance(a, Tensor) else a for a in arguments)
    ctx.n_arguments = len(arguments)
    ctx.kernel = kernel


def _recomputed(ctx: Any, saved: Sequence[Any]) -> Sequence[Tensor | None]:
    arguments = [t if c is None else c for t, c in zip(saved, ctx.constants, strict=False)]
    gradients: Sequence[Tensor | None] = ctx.kernel(*arguments, with_gradients=True).gradients
    return gradients


def _pulled_back(ctx: Any, upstream: Tensor | None, gradients: Sequence[Tensor | None]) -> tuple[Any, ...]:
    if upstream is None:
        return (None,) * (ctx.n_arguments + 1)
    needed = ctx.needs_input_grad[1:]
    pulled = [upstream * g if needed[i] and g is not None else None for i, g in enumerate(gradients)]
    return (None, *pulled, *([None] * (ctx.n_arguments - len(pulled))))


def mean_over(
    values: Tensor, mask: Tensor | None, weights: Tensor | None = None
) -> tuple[Tensor, Tensor | float]:
    """Return the mean of `values` over the rows of `mask` (0 over no rows), and what one row weighs in it.

    weights: of the rows, in the shape of `values`, and `mask` is what `rows_that_count` made of it. What a
    row weighs is then a tensor of that shape.
    """
    if weights is not None:
        weights, one_over = normalized(weights if mask is None else torch.where(mask, weights, 0.0), values)
        return (torch.where(weights != 0, values, 0.0) * weights).sum() * one_over, weights * one_over
    if mask is None:
        one = 1.0 / max(values.numel(), 1)
        return values.sum() * one, one
    share = mask.sum().clamp(min=1).to(values.dtype).reciprocal()
    return torch.where(mask, values, 0.0).sum() * share, share


def as_rows_of(gradient: Tensor, mask: Tensor | None, like: Tensor) -> Tensor:
    """Return the gradient with 0 outside of `mask`, in the shape and dtype of the tensor it belongs to.

    What is too large for that dtype is its largest number.
    """
    if mask is not None:
        gradient = torch.where(mask, gradient, 0.0)
    if gradient.shape != like.shape:
        gradient = gradient.sum_to_size(like.shape)
    largest = torch.finfo(like.dtype).max
    if largest < torch.finfo(gradient.dtype).max:
        gradient = gradient.clamp(-largest, largest)
    return gradient.to(like.dtype)


def mask_and_weights(
    mask: Tensor | None, row_weights: Tensor | None, *operands: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Return both in the shape that the operands broadcast to, the mask without the rows of weight 0."""
    if mask is None and row_weights is None:
        return None, None
    like = torch.broadcast_tensors(*operands)[0]
    weights = weights_of_rows(row_weights, like)
    return rows_that_count(None if mask is None else bool_mask("mask", mask, like), weights), weights


def rows_that_count(mask: Tensor | None, weights: Tensor | None) -> Tensor | None:
    """Return `mask` without the rows of weight 0: such a row is no row, even where it is not finite."""
    if weights is None:
        return mask
    return weights != 0 if mask is None else mask & (weights != 0)


def normalized(weights: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return `weights` in the dtype of `like`, and one over their sum (1 where that is 0)."""
    weights = weights.to(like.dtype)
    total = weights.sum()
    return weights, torch.where(total > 0, total, 1.0).reciprocal()


def weights_of_rows(row_weights: Tensor | None, like: Tensor) -> Tensor | None:
    """Return weights, one a row, in the shape of `like`, whose first dimension is the rows.

    ValueError for another number of rows. The values (finite, >= 0) are trusted, never read.
    """
    if row_weights is None or row_weights.shape == like.shape:
        return row_weights
    if row_weights.ndim != 1 or not like.ndim or len(row_weights) != len(like):
        raise ValueError(
            f"row_weights must have one entry a row of {tuple(like.shape)}, got {tuple(row_weights.shape)}"
        )
    return row_weights.reshape(-1, *([1] * (like.ndim - 1))).expand(like.shape)


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
