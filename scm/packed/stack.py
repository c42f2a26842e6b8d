"""Models of equal shapes as rows of one matrix, and what makes two models equal in all but their weights."""

from __future__ import annotations

import dataclasses
import enum
import functools
import types
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Layout:
    """Where each trained parameter of a model lies in a row of numbers, and what of it is not trained.

    Rows hold the parameters that require gradients, in the model's order. `fixed` names its buffers and
    other parameters. Raises ValueError for a model without trained parameters or with several dtypes.
    """

    def __init__(self, model: nn.Module) -> None:
        trained = {name: item for name, item in model.named_parameters() if item.requires_grad}
        if not trained:
            raise ValueError("a model must have a parameter that requires gradients, got none")
        dtypes = {item.dtype for item in trained.values()}
        if len(dtypes) > 1:
            raise ValueError(f"parameters must have one dtype, got {sorted(map(str, dtypes))}")
        self.dtype = dtypes.pop()
        self.shapes: dict[str, torch.Size] = {name: item.shape for name, item in trained.items()}
        self.fixed: tuple[str, ...] = tuple(name for name in _fixed_tensors(model))
        sizes = [item.numel() for item in trained.values()]
        self.size = sum(sizes)
        stops = [sum(sizes[: place + 1]) for place in range(len(sizes))]
        self._spans = dict(zip(self.shapes, zip([0, *stops], stops, strict=False), strict=True))

    def views(self, rows: Tensor) -> dict[str, Tensor]:
        """Return the parameters by name, (rows, *shape), as views of a matrix (rows, size)."""
        return {
            name: rows[:, start:stop].unflatten(1, shape) if shape else rows[:, start]
            for (name, shape), (start, stop) in zip(self.shapes.items(), self._spans.values(), strict=True)
        }

    def row_of(self, model: nn.Module) -> Tensor:
        """Return a copy of a model's trained parameters as one row, (size,)."""
        held = dict(model.named_parameters())
        return torch.cat([held[name].detach().flatten() for name in self.shapes])

    def fixed_of(self, model: nn.Module) -> dict[str, Tensor]:
        """Return what of a model is not trained, by name."""
        return {name: item.detach() for name, item in _fixed_tensors(model).items()}

    def put_row(self, model: nn.Module, row: Tensor) -> None:
        """Give a model the parameters of a row."""
        held = dict(model.named_parameters())
        with torch.no_grad():
            for name, (start, stop) in self._spans.items():
                held[name].copy_(row[start:stop].view_as(held[name]))


def _fixed_tensors(model: nn.Module) -> dict[str, Tensor]:
    frozen = {name: item for name, item in model.named_parameters() if not item.requires_grad}
    return {**frozen, **dict(model.named_buffers())}


def fingerprint(value: Any) -> Any:
    """Return a hashable text of all that a model, or any object, is made of but the values of its tensors.

    Two models of one fingerprint compute the same function of weights and inputs. What cannot be looked into
    is told apart by its identity, so that unlike things are never taken for alike.

    >>> fingerprint(nn.Linear(2, 3)) == fingerprint(nn.Linear(2, 3))
    True
    >>> fingerprint(nn.Dropout(0.1)) == fingerprint(nn.Dropout(0.2))
    False
    """
    return _print(value, {})


def _print(value: Any, seen: dict[int, int]) -> Any:
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
        return (type(value).__name__, repr(value))
    if isinstance(value, (torch.dtype, torch.device, torch.Size, enum.Enum, type)):
        return repr(value)
    if id(value) in seen:
        return ("again", seen[id(value)])
    seen[id(value)] = len(seen)
    if isinstance(value, Tensor):
        return ("tensor", tuple(value.shape), str(value.dtype), value.requires_grad)
    if isinstance(value, Mapping):
        return ("mapping", *((_print(key, seen), _print(item, seen)) for key, item in value.items()))
    if isinstance(value, Sequence):
        return (type(value).__name__, *(_print(item, seen) for item in value))
    if isinstance(value, (set, frozenset)):
        return ("set", *sorted(map(repr, value)))
    if isinstance(value, types.MethodType):
        return ("method", _print(value.__func__, seen), _print(value.__self__, seen))
    if isinstance(value, types.FunctionType):
        closed = tuple(_print(cell.cell_contents, seen) for cell in value.__closure__ or ())
        return ("function", value.__module__, value.__qualname__, id(value.__code__), closed)
    if isinstance(value, types.BuiltinFunctionType):
        return ("function", value.__module__, value.__qualname__)
    return _print_object(value, seen)


def _print_object(value: Any, seen: dict[int, int]) -> Any:
    if isinstance(value, functools.partial):
        return ("partial", *(_print(item, seen) for item in (value.func, value.args, value.keywords)))
    if isinstance(value, nn.Module):
        names: list[str] = [name for name, held in vars(value).items() if held or name not in _USUALLY_EMPTY]
    else:
        names = list(getattr(value, "__dict__", ()))
        for kind in type(value).__mro__:
            slots = kind.__dict__.get("__slots__", ())
            names += [slots] if isinstance(slots, str) else list(slots)
        if not names and not dataclasses.is_dataclass(value):
            return (type(value), id(value))  # whatever it holds is out of sight
    held = ((name, getattr(value, name)) for name in names if hasattr(value, name))
    return (type(value), *((name, _print(item, seen)) for name, item in held))


# The hooks that a module may have.
_USUALLY_EMPTY = frozenset(name for name in vars(nn.Module()) if "hook" in name)
