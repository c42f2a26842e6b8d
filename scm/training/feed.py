"""From what a loader gives to what model and loss are called with.

Decided here: which rows may be trained at all, and which of the trainer's facts a loss function is told.
What a label means is decided in `scm.training.targets`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from scm.layers.capability import check_tau_infer
from scm.losses.terms import LossTerms
from scm.training.targets import SemanticTargets, lift_semantic_targets, lift_sentinel_targets, lift_targets

FACTS = (
    "tau",
    "inputs",
    "targets",
    "epoch",
    "global_step",
    "loss_weights",
    "semantic_targets",
    "row_weights",
    "hybrid_delta",
)
"""What a loss function may ask for by name; the last two are None where no loader or companion gives them."""

_OPTIONAL = ("row_weights", "hybrid_delta")

_UNREACHABLE = "unreachable_by_construction"
_NOTHING: Mapping[str, Tensor] = MappingProxyType({})


class Fed(NamedTuple):
    """One batch, ready: `targets` as the loader gave them, `lifted` as (Y_n, Y_d), `rows` of the inputs.

    extras: what the loader says of each row besides, by name: "row_weights" (floats, importance weights),
    "indices" (where in the data the row is), and whatever companions of its own look for.
    """

    inputs: Any
    targets: Any
    lifted: tuple[Tensor, Tensor]
    semantic: SemanticTargets | None
    rows: int
    extras: Mapping[str, Tensor] = _NOTHING


class LossCall:
    """A loss function, and which of `FACTS` its signature takes.

    A function that cannot be inspected, or that takes ``**kwargs``, is told all of them, the optional ones
    (row_weights, hybrid_delta) where there are any. Its first two
    parameters are outputs and lifted targets, whatever they are called. A batch with row weights is a
    ValueError for a function that does not take them: trained without, they would not be missed.
    """

    def __init__(self, function: Callable[..., Tensor | LossTerms]) -> None:
        self.function = function
        taken, named, takes_any = _keyword_names(function)
        self.names_semantic_targets = "semantic_targets" in named
        self.takes_any = takes_any
        self._named = named
        self.facts = tuple(fact for fact in FACTS if fact in named or (takes_any and fact not in taken))

    def __call__(self, outputs: Any, fed: Fed, known: Mapping[str, Any]) -> Any:
        """Return what the function returns; `known` holds tau, epoch, global_step and loss_weights."""
        if fed.extras and "row_weights" in fed.extras and "row_weights" not in self.facts:
            raise ValueError(
                "loss_fn must take row_weights when the loader gives them: name it in its signature and "
                "average by them, or take a loader that draws every row alike"
            )
        told: dict[str, Any] = {}
        for fact in self.facts:
            if fact == "inputs":
                told[fact] = fed.inputs
            elif fact == "targets":
                told[fact] = fed.targets
            elif fact == "semantic_targets":
                told[fact] = fed.semantic
            elif fact in _OPTIONAL:
                held = known.get(fact)
                held = fed.extras.get(fact) if held is None else held
                if held is not None or fact in self._named:
                    told[fact] = held
            else:
                told[fact] = known[fact]
        return self.function(outputs, fed.lifted, **told)


def _keyword_names(function: Callable[..., Any]) -> tuple[frozenset[str], frozenset[str], bool]:
    """Return the names of the first two parameters, those of the others, and whether any name is taken."""
    try:
        # The call of a module takes anything; what it hands it to is its forward().
        asked = function.forward if isinstance(function, nn.Module) else function
        parameters = inspect.signature(asked).parameters.values()
    except (TypeError, ValueError):
        return frozenset(), frozenset(), True
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    taken = frozenset([item.name for item in parameters if item.kind in positional][:2])
    nameable = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    named = frozenset(item.name for item in parameters if item.kind in nameable)
    return taken, named - taken, any(item.kind is item.VAR_KEYWORD for item in parameters)


class Feeder:
    """Prepare batches for one model and one loss.

    Takes (x, y), where nan and infinite y are bottoms; (x, y, labels), labels as strings or integer codes;
    (x, SemanticTargets). A dict after any of these holds what else is said of each row (see `Fed.extras`);
    (x, SemanticTargets, w), w a float tensor, is short for {"row_weights": w}. Anything else is a TypeError,
    and a tensor that has not one entry a row a ValueError. Rows whose status is missing or fault are never
    trained: a loss that names `semantic_targets` masks them, one that takes ``**kwargs`` without naming it
    does not get to see them, and for any other loss a batch with such rows is a ValueError.
    """

    def __init__(self, loss: LossCall, device: torch.device, *, unreachable: bool) -> None:
        self._loss = loss
        self._device = device
        self._unreachable = unreachable

    def prepare(self, batch: Any) -> Fed | None:
        """Return the batch on the device, lifted; None when it has no row that may be trained."""
        extras = _NOTHING
        if isinstance(batch, (tuple, list)) and len(batch) > 2:
            batch, extras = self._without_extras(batch)
        inputs, targets, semantic = self._parts(batch)
        if semantic is None:
            lifted = _lifted(targets)
            if self._unreachable and bool((lifted[1] == 0).any()):
                raise ValueError(_UNREACHABLE_MESSAGE)
            told = lift_sentinel_targets(targets) if self._loss.names_semantic_targets else None
            rows = _rows(inputs, targets)
            return Fed(inputs, targets, lifted, told, rows, _checked(extras, rows))
        if self._unreachable and bool(semantic.mask_bottom.any()):
            raise ValueError(_UNREACHABLE_MESSAGE)
        rows = _rows(inputs, semantic.Y_n)
        extras = _checked(extras, rows)
        if not self._loss.names_semantic_targets:
            kept = self._trainable_rows(semantic)
            if kept is not None:
                rows = len(kept)
                if not rows:
                    return None
                extras = {name: item.index_select(0, kept) for name, item in extras.items()}
                semantic = semantic.index(kept)
                inputs = inputs.index_select(0, kept)
                targets = targets.index_select(0, kept) if isinstance(targets, Tensor) else semantic
        return Fed(inputs, targets, (semantic.Y_n, semantic.Y_d), semantic, rows, extras)

    def _without_extras(self, batch: Sequence[Any]) -> tuple[Sequence[Any], Mapping[str, Tensor]]:
        """Take off what is said of each row besides, moved to the device."""
        last = batch[-1]
        if isinstance(last, Mapping):
            return batch[:-1], _moved(dict(last), self._device)
        weights = isinstance(last, Tensor) and last.is_floating_point()
        if len(batch) == 3 and weights and isinstance(batch[1], SemanticTargets):
            return batch[:-1], {"row_weights": _moved(last, self._device)}
        return batch, _NOTHING

    def _parts(self, batch: Any) -> tuple[Any, Any, SemanticTargets | None]:
        if not isinstance(batch, (tuple, list)) or len(batch) not in (2, 3):
            shape = f"{len(batch)} entries" if isinstance(batch, (tuple, list)) else type(batch).__name__
            raise TypeError(
                "a batch must be (x, y), (x, y, labels) or (x, SemanticTargets), each perhaps with a dict of "
                f"tensors after it, got {shape}"
            )
        inputs, targets = _moved(batch[0], self._device), batch[1]
        if isinstance(targets, SemanticTargets):
            if len(batch) == 3:
                raise TypeError(
                    "a batch with SemanticTargets must be (x, SemanticTargets), got a third entry that is "
                    f"neither a dict of tensors nor a float tensor of row weights: {type(batch[2]).__name__}"
                )
            if targets.Y_n.device != self._device:
                targets = targets.to(self._device)
            return inputs, targets, targets
        if not isinstance(targets, Tensor):
            raise TypeError(f"targets must be a tensor or SemanticTargets, got {type(targets).__name__}")
        targets = _moved(targets, self._device)
        if len(batch) == 2:
            return inputs, targets, None
        labels = batch[2]
        if isinstance(labels, Tensor):
            labels = labels.to(self._device)
        return inputs, targets, lift_semantic_targets(targets, labels)

    def _trainable_rows(self, semantic: SemanticTargets) -> Tensor | None:
        """Return the indices of the rows to keep; None when it is all of them."""
        trained = semantic.mask_trained
        if bool(trained.all()):
            return None
        if not self._loss.takes_any:
            raise ValueError(
                "loss_fn must take semantic_targets when rows are labelled missing or fault: "
                "name it in its signature and mask the loss by semantic_targets.mask_trained, "
                "or leave those rows out of the data"
            )
        per_row = trained.flatten(1) if trained.ndim > 1 else trained[:, None]
        kept = per_row.any(1)
        if bool((per_row.any(1) != per_row.all(1)).any()):
            raise ValueError(
                "loss_fn must name semantic_targets when only some outputs of a row are missing or fault"
            )
        return kept.nonzero().squeeze(1)


_UNREACHABLE_MESSAGE = (
    "the targets hold bottoms, but the model's head cannot reach |Q| < tau_infer by construction; "
    "change the head, or set allow_bottom_unreachable=True if those labels are outside of the task"
)


def _lifted(targets: Tensor) -> tuple[Tensor, Tensor]:
    """`lift_targets`, in two operations where a look at the values is free and shows that all are finite."""
    # On the CPU a sum can be read without waiting; it is finite only if every term is. Lifting element by
    # element takes a tenth of a small model's step.
    if targets.device.type == "cpu" and targets.is_floating_point() and math.isfinite(targets.sum().item()):
        return targets, torch.ones_like(targets)
    return lift_targets(targets)


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value if value.device == device else value.to(device, non_blocking=True)
    if isinstance(value, (tuple, list)):
        return type(value)(_moved(item, device) for item in value)
    if isinstance(value, dict):
        return {name: _moved(item, device) for name, item in value.items()}
    return value


def _checked(extras: Mapping[str, Any], rows: int) -> Mapping[str, Tensor]:
    for name, held in extras.items():
        if not isinstance(held, Tensor):
            raise TypeError(f"what a batch says of its rows must be tensors, got {name}={held!r}")
        if not held.ndim or len(held) != rows:
            raise ValueError(f"{name} must have one entry a row ({rows}), got shape {tuple(held.shape)}")
    weights = extras.get("row_weights")
    if weights is not None and not (weights.ndim == 1 and weights.is_floating_point()):
        raise ValueError(
            f"row_weights must be floats of shape ({rows},), got {weights.dtype} {tuple(weights.shape)}"
        )
    return extras


def _rows(inputs: Any, targets: Tensor) -> int:
    held = inputs if isinstance(inputs, Tensor) else targets
    return int(held.shape[0]) if held.ndim else 1


def bottom_is_unreachable(model: nn.Module, tau_infer: float) -> bool:
    """Tell whether the model, or a module in it, says that it cannot answer bottom at `tau_infer`.

    Raises ValueError when a `bottom_capability` answers with a word that is not known.
    """
    tau_infer = check_tau_infer(tau_infer)
    return any(answer == _UNREACHABLE for answer in _capabilities(model, tau_infer))


def _capabilities(model: nn.Module, tau_infer: float) -> Iterator[str]:
    own = getattr(model, "bottom_capability", None)
    asked = [model] if callable(own) else list(model.modules())
    for module in asked:
        method = getattr(module, "bottom_capability", None)
        if not callable(method):
            continue
        answer = method(tau_infer)
        if answer not in ("reachable", _UNREACHABLE):
            raise ValueError(
                f"bottom_capability must answer reachable or {_UNREACHABLE}, got {answer!r} "
                f"of {type(module).__name__}"
            )
        yield answer
