"""What laws over tensors share: a case on the subject's device, gradients, comparisons, batches of rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from harness.robustness.edge_values import batches
from harness.robustness.law import BrokenLawError, Case, Subject

ROWS = {"P": "finite", "Q": "finite", "Y_n,Y_d": "target", "mask": "flag"}
ORDINARY = {"P": "ordinary", "Q": "ordinary", "Y_n,Y_d": "ordinary target", "mask": "flag"}


def on(subject: Subject, case: Case, *names: str) -> list[Tensor]:
    """The tensors of a case on the subject's device."""
    return [case[name].to(subject.device) for name in names]


def leaves(subject: Subject, case: Case, *names: str) -> list[Tensor]:
    """The same, each a leaf that can have a gradient."""
    return [tensor.clone().requires_grad_() for tensor in on(subject, case, *names)]


def gradients_of(loss: Tensor, *of: Tensor) -> list[Tensor]:
    """Gradients of a loss, zeros where it has none."""
    if not loss.requires_grad:
        return [torch.zeros_like(leaf) for leaf in of]
    # Kept, because several losses of one call may share what they were computed from.
    found = torch.autograd.grad(loss, of, allow_unused=True, materialize_grads=True, retain_graph=True)
    return list(found)


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors agree bit for bit, NaN with NaN and 0 with -0."""
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


def close(a: float, b: float, *, relative: float, absolute: float = 0.0) -> bool:
    """Whether two numbers agree; two NaN do, for what is not finite is another law's."""
    return (a != a and b != b) or a == b or abs(a - b) <= relative * max(abs(a), abs(b)) + absolute


def eps(tensor: Tensor) -> float:
    """The distance from 1 to the next number of its dtype."""
    return float(torch.finfo(tensor.dtype).eps)


def number(loss: Tensor) -> float:
    """A 0-d tensor as a plain number."""
    return float(loss.detach())


def within(name: str, value: float, low: float, high: float) -> None:
    """Raise BrokenLawError for a value outside of [low, high], NaN among them."""
    if not low <= value <= high:
        raise BrokenLawError(f"{name} must be in [{low:g}, {high:g}], got {value:.9g}")


def rows_to_try(columns: Mapping[str, str] = ROWS, **keywords: Any) -> Callable[[Subject], Any]:
    """What draws batches with these columns in the dtypes of a subject."""
    return lambda subject: batches(subject.dtypes, columns, **keywords)
