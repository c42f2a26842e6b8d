"""Where values that are not finite come from: one pass over a bad batch under hooks, read from front to back.

Only for a diagnosis: hooks are there during the pass and nowhere else, and every look waits for the device.
What is done about such values is decided in `scm.guards.finite`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from scm.losses.terms import LossTerms

_NAMED = 3  # parameters that a text names; the others are counted


@dataclass(frozen=True)
class Origin:
    """The first thing that was not finite, and what it reached.

    kind: "parameter", "inputs", "module" (the first whose outputs are not finite while its inputs are),
    "term" (of the loss), "gradient", or "unknown" (a second pass met only finite values). name: of the
    module, the terms or the parameters. text: all of it in a line.
    """

    kind: str
    name: str
    text: str

    def __str__(self) -> str:
        return self.text


def find_origin(model: nn.Module, run: Callable[[], Tensor | LossTerms]) -> Origin:
    """Say where non-finite values of a forward and backward pass come from.

    run: calls `model` on the batch and returns its loss, a 0-d tensor or `LossTerms`, which are named. It is
    called once, with hooks on every module; gradients are computed but not left in the parameters. What the
    pass draws or counts itself is the caller's to put back.
    """
    bad = [name for name, parameter in model.named_parameters() if not _is_finite(parameter)]
    if bad:
        return Origin("parameter", bad[0], f"parameter {_listed(bad)}, before the step")
    trace = _Trace(model)
    try:
        with torch.enable_grad():
            loss = run()
            terms = _named_terms(loss)
            spoiled = [name for name, term in terms.items() if not _is_finite(term)]
            if not spoiled:
                return _gradient_origin(model, terms, trace)
            origin = trace.forward_origin(spoiled)
            if origin is not None:
                return origin
            return Origin("term", spoiled[0], f"loss term {', '.join(spoiled)}, from finite outputs")
    finally:
        trace.remove()


def named_tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of nested outputs with its name: P and Q of a tuple, keys of mappings, positions."""
    if isinstance(value, Tensor):
        yield name or "output", value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from named_tensors(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, (tuple, list)):
        pair = not name and 2 <= len(value) <= 3 and all(isinstance(item, Tensor) for item in value[:2])
        for index, item in enumerate(value):
            own = "PQ"[index] if pair and index < 2 else str(index)
            inner = "" if pair and index == 2 and isinstance(item, Mapping) else own
            yield from named_tensors(item, f"{name}.{own}" if name else inner)


def _named_terms(loss: Tensor | LossTerms) -> dict[str, Tensor]:
    if isinstance(loss, LossTerms):
        return {"task": loss.task, **loss.auxiliaries}
    return {"loss": loss}


def _is_finite(tensor: Tensor) -> bool:
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    return bool(torch.isfinite(tensor.detach()).all())


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


@dataclass
class _Visit:
    """One call of a module: whether what went in and came out was finite, forwards and backwards.

    The gradients are None where no gradient passed.
    """

    name: str
    module: nn.Module
    inputs: bool
    outputs: bool
    spoiled: list[str]
    gradient_in: bool | None = None  # with respect to the inputs: what the backward pass of the module gives
    gradient_out: bool | None = None  # with respect to the outputs: what it is given


@dataclass
class _Trace:
    """The calls of all modules of `model`, in the order in which they end; a module ends before its owner."""

    model: nn.Module
    visits: list[_Visit] = field(default_factory=list)
    _handles: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name, module in self.model.named_modules():
            self._handles.append(module.register_forward_hook(self._hook(name), with_kwargs=True))

    def remove(self) -> None:
        """Take all hooks away."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _hook(self, name: str) -> Callable[..., None]:
        def note(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            given = [tensor for _, tensor in (*named_tensors(args), *named_tensors(kwargs))]
            made = list(named_tensors(output))
            visit = _Visit(
                name,
                module,
                all(_is_finite(tensor) for tensor in given),
                all(_is_finite(tensor) for _, tensor in made),
                [part for part, tensor in made if not _is_finite(tensor)],
            )
            self.visits.append(visit)
            for tensor in given:
                self._follow(tensor, visit, "gradient_in")
            for _, tensor in made:
                self._follow(tensor, visit, "gradient_out")

        return note

    def _follow(self, tensor: Tensor, visit: _Visit, side: str) -> None:
        """Have the gradient of `tensor` noted when it comes by."""
        if not tensor.requires_grad:
            return

        def note(gradient: Tensor) -> None:
            setattr(visit, side, getattr(visit, side) is not False and _is_finite(gradient))

        self._handles.append(tensor.register_hook(note))

    def forward_origin(self, spoiled: list[str]) -> Origin | None:
        """Return the first module that made non-finite of finite, or the inputs; None where all is finite."""
        reached = f"; loss term {', '.join(spoiled)}"
        for visit in self.visits:
            if visit.inputs and not visit.outputs:
                parts = f" in {', '.join(visit.spoiled)}" if visit.spoiled != ["output"] else ""
                return Origin("module", visit.name, f"{_called(visit)}, from finite inputs{parts}{reached}")
        if any(visit.module is self.model and not visit.inputs for visit in self.visits):
            return Origin("inputs", "inputs", f"inputs of the model{reached}")
        return None

    def forget_gradients(self) -> None:
        """Begin anew with what the backward pass of one term shows."""
        for visit in self.visits:
            visit.gradient_in = visit.gradient_out = None

    def backward_origin(self, own: Callable[[nn.Module], bool]) -> _Visit | None:
        """Return the first module, in the order of the backward pass, that made non-finite of finite.

        own: whether a module's own parameters got a gradient that is not finite. Of a module and what it
        holds, what it holds is named.
        """
        making = [
            visit
            for visit in self.visits
            if visit.gradient_out and (visit.gradient_in is False or own(visit.module))
        ]
        inner = [
            visit
            for visit in making
            if not any(other is not visit and _holds(visit.module, other.module) for other in making)
        ]
        return inner[-1] if inner else None


def _gradient_origin(model: nn.Module, terms: dict[str, Tensor], trace: _Trace) -> Origin:
    """Name the term whose gradient is not finite, the module that it arises in, and what it reaches."""
    named = {name: item for name, item in model.named_parameters() if item.requires_grad}
    trained = [(name, term) for name, term in terms.items() if term.requires_grad]
    for index, (term_name, term) in enumerate(trained):
        trace.forget_gradients()
        gradients = torch.autograd.grad(
            term, list(named.values()), retain_graph=index < len(trained) - 1, allow_unused=True
        )
        bad = [
            name
            for name, gradient in zip(named, gradients, strict=True)
            if gradient is not None and not _is_finite(gradient.to_dense())
        ]
        if not bad:
            continue
        spoiled = {id(named[name]) for name in bad}
        visit = trace.backward_origin(lambda module: _has_own(module, spoiled))  # noqa: B023
        reached = f"gradient of loss term {term_name} at {_listed(bad)}"
        if visit is not None and not visit.inputs:
            return Origin("inputs", "inputs", f"inputs of the model; {reached}")
        if visit is not None:
            return Origin("gradient", visit.name, f"backward pass of {_called(visit)}; {reached}")
        behind = next((item for item in reversed(trace.visits) if item.gradient_out is False), None)
        if behind is None or behind.module is model:
            return Origin("gradient", term_name, f"backward pass of the loss; {reached}")
        return Origin("gradient", behind.name, f"backward pass behind {_called(behind)}; {reached}")
    return Origin("unknown", "", "not found: a second pass over the batch was finite")


def _has_own(module: nn.Module, spoiled: set[int]) -> bool:
    return any(id(parameter) in spoiled for parameter in module.parameters(recurse=False))


def _holds(module: nn.Module, other: nn.Module) -> bool:
    return module is not other and any(held is other for held in module.modules())


def _called(visit: _Visit) -> str:
    kind = type(visit.module).__name__
    return f"module {visit.name} ({kind})" if visit.name else f"the model itself ({kind})"
