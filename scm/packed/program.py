"""One trial's computation, traced once, as a program of a few batched operations for any number of trials.

`torch.func.vmap` decides what the operations are; here they are recorded (`recording`), freed of what
computes nothing, parted into what can be computed ahead for many steps at once and what must wait for the
step, and called without the layers in between, which cost four fifths of a small model's time. What is
computed is decided by the function that is given; there is no second formula of anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import IntEnum
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, fx
from torch.func import vmap

from scm.packed.graphs import (
    Buffer,
    attribute,
    free_lanes,
    is_view,
    is_zeros,
    join_results,
    plan_buffers,
    quicken,
    simplify,
    write_in_place,
)
from scm.packed.native import NativeGraph
from scm.packed.recording import DependsOnValuesError, record

PerTrial = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
"""Inputs of one trial by name -> outputs of one trial by name."""
AllTrials = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
"""The same of many trials, which are the first dimension of everything."""


class ProgramError(ValueError):
    """A function that cannot be made a program; the message says why, in words for a report."""


class BoundStep(Protocol):
    """A program of some trials: called with what only the step knows, and with one of `prepare_batches`.

    means: after a call, perhaps one number a trial that is finite where all is that was joined.
    """

    means: Tensor | None

    def __call__(self, states: Sequence[Tensor], batch: Sequence[Tensor]) -> tuple[Tensor, ...]: ...


class Known(IntEnum):
    """When the value of an input is known."""

    ALWAYS = 0  # a constant of the program
    PACK = 1  # before the epoch, one value a trial
    BATCH = 2  # before the epoch, one value a trial and step
    PLACE = 3  # in the step, but it lies where it always lay
    STEP = 4  # in the step


_RANDOM = ("bernoulli", "rand", "normal", "dropout", "uniform", "multinomial", "exponential")
# Numbers of trials to trace with: primes, so that whatever is a multiple of one counts trials.
_TRACED = (97, 101, 103, 107, 109, 113)


class Program:
    """A traced function of many trials; `bind` makes it callable for some, again and again.

    Inputs are tensors by name whose first dimension is the trials; those known a batch have the steps before
    it. `joined` names the outputs that each call writes, flattened and side by side, into the matrix that
    `bind` is given; `outputs` names the others, which a call returns. The number of trials may be another one
    at every `bind`.
    """

    def __init__(self, traced: fx.GraphModule, names: _Names, lanes: int) -> None:
        self.names = names
        self.outputs = names.returned
        self.joined = names.joined
        parts = _Parts(traced, names)
        self._traced, self._lanes = traced, lanes
        self._whole = parts.whole
        self.step_inputs = parts.step_inputs
        self.pack_inputs = parts.pack_inputs
        self.batch_inputs = parts.batch_inputs
        self._pack_graph = _module(traced, parts.pack)
        self._batch_graph = _module(traced, parts.batches)
        self._buffers: list[Buffer] = []
        self._memory: tuple[int, list[Tensor]] | None = None  # of the newest number of trials
        self._native: NativeGraph | None = None
        if parts.writes:
            write_in_place(parts.step)
            self._buffers = plan_buffers(parts.step, lanes)
        self._step_graph = _module(traced, parts.step)
        self._forward: Callable[..., tuple[Tensor, ...]] = self._step_graph.forward

    @property
    def operations(self) -> int:
        """How many operations a step makes."""
        return sum(node.op == "call_function" for node in self._step_graph.graph.nodes)

    @property
    def is_native(self) -> bool:
        """Whether a step is machine code."""
        return self._native is not None

    def bind(self, lanes: int, held: Mapping[str, Tensor], into: Tensor | None = None) -> BoundStep:
        """Take everything that is known of `lanes` trials before the step, by name; see `Bound`.

        into: (lanes, width), where the joined outputs are written. What of `held` is known in the step is
        looked at where it lies, in every step anew.
        """
        told = self._pack_graph.forward(lanes, *(held[name] for name in self.pack_inputs))
        if self._native is not None:
            return self._native.bind(lanes, told, into)
        targets = [] if into is None else [into]
        if self._memory is None or self._memory[0] != lanes:
            self._memory = (lanes, [buffer.make(lanes) for buffer in self._buffers])
        return Bound(self._forward, lanes, [*told, *targets, *self._memory[1]])

    def prepare_batches(self, held: Mapping[str, Tensor], lanes: int, steps: int) -> list[tuple[Tensor, ...]]:
        """Return what a step takes of what is known a batch, for each of the steps.

        held: of batch inputs (steps, trials, ...), of pack inputs (trials, ...).
        """
        told = []
        for name, known in self.batch_inputs:
            value = held[name]
            if known is Known.PACK:
                value = value.expand(steps, *value.shape)
            told.append(value.flatten(0, 1))
        made = self._batch_graph.forward(lanes * steps, *told)
        if self._native is not None:
            made = [item.contiguous() for item in made]
        by_step = [item.unflatten(0, (steps, -1)).unbind(0) for item in made]
        return list(zip(*by_step, strict=True)) if by_step else [()] * steps

    def run(self, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Compute everything for one step: the slow way, where nothing is repeated."""
        lanes = len(next(iter(held.values())))
        forms = [held[source] for source in self.joined.values()]
        into = torch.cat([form.flatten(1) for form in forms], dim=1) if forms else None
        bound = self.bind(lanes, held, into)
        ahead = {
            name: held[name].unsqueeze(0) if known is Known.BATCH else held[name]
            for name, known in self.batch_inputs
        }
        batch = self.prepare_batches(ahead, lanes, 1)[0]
        made = bound([held[name] for name in self.step_inputs], batch)
        found = dict(zip(self.outputs, made, strict=True))
        if into is not None:
            parts = into.split([form[0].numel() for form in forms], dim=1)
            found |= {
                name: part.view_as(form) for name, part, form in zip(self.joined, parts, forms, strict=True)
            }
        return found

    def compiled(self, **options: Any) -> Program:
        """Return the same program with its step compiled by ``torch.compile``."""
        other = object.__new__(Program)
        other.__dict__.update(self.__dict__)
        other._forward = torch.compile(self._step_graph.forward, **options)
        return other

    def native(self) -> Program:
        """Return the same program with its step as machine code; LoweringError where it has no such form."""
        other = object.__new__(Program)
        other.__dict__.update(self.__dict__)
        results = list(self.names.outputs)
        joined = [results.index(name) for name in self.joined]
        outputs = [results.index(name) for name in self.outputs]

        def constant(name: str) -> Any:
            return attribute(self._traced, name)

        other._native = NativeGraph(self._whole, constant, self._lanes, outputs, joined)
        return other


class Bound:
    """A program of some trials: called with what only the step knows, and with one of `prepare_batches`."""

    means: Tensor | None = None

    def __init__(
        self, forward: Callable[..., tuple[Tensor, ...]], lanes: int, told: Sequence[Tensor]
    ) -> None:
        self._forward, self._lanes, self._told = forward, lanes, told

    def __call__(self, states: Sequence[Tensor], batch: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return self._forward(self._lanes, *states, *batch, *self._told)


def trace_program(
    function: PerTrial,
    example: Mapping[str, Tensor],
    known: Mapping[str, Known],
    *,
    gradients: Mapping[str, str] | None = None,
    joined: Mapping[str, str] | None = None,
    in_place: bool = True,
) -> Program:
    """Trace `function` of one trial; `example` holds its inputs for some trials, at least 6.

    gradients: further outputs, each the gradient of the output "loss" by the named input. joined: outputs
    that are to be written into one matrix, in this order, and an input of the form of each.
    in_place: whether memory is planned by hand (a compiler does it better itself).

    Raises ProgramError, with the reason, for a function that `vmap` cannot run, that draws random numbers or
    changes its inputs, or whose program would not agree with it.
    """
    # Whatever stops vmap, the tracer or what is made of its graph is a reason to train the trial alone, and
    # comes as many types, other ones with every torch.
    try:
        return _traced(for_all(function, gradients or {}), example, known, joined or {}, in_place)
    except ProgramError:
        raise
    except Exception as error:
        raise ProgramError(_why(error)) from error


def _traced(
    of_all: AllTrials,
    example: Mapping[str, Tensor],
    known: Mapping[str, Known],
    joined: Mapping[str, str],
    in_place: bool,
) -> Program:
    lanes = _number_to_trace(example.values())
    rows = torch.arange(lanes) % len(next(iter(example.values())))
    traced = [value.index_select(0, rows.to(value.device)) for value in example.values()]
    names = list(example)
    outputs: list[str] = []

    def of_tensors(*values: Tensor) -> tuple[Tensor, ...]:
        made = of_all(dict(zip(names, values, strict=True)))
        outputs[:] = list(made)
        return tuple(made.values())

    module = record(of_tensors, traced)
    _check_pure(module.graph)
    simplify(module, lanes)
    free_lanes(module.graph, lanes)
    told = _Names(tuple(names), tuple(outputs), dict(known), dict(joined), in_place)
    program = Program(module, told, lanes)
    _check_agrees(program, of_all, example)
    return program


def for_all(function: PerTrial, gradients: Mapping[str, str]) -> AllTrials:
    """Return a function of one trial as one of many, with gradients of its "loss", each by an input.

    No trial's loss depends on another's inputs, so that one backward pass is everybody's; ``torch.func.grad``
    would import the compiler, a second in every process.
    """

    def of_all(held: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if not gradients:
            return dict(vmap(function)(held))
        with torch.enable_grad():
            sources = {name: held[name].detach().requires_grad_() for name in gradients.values()}
            made = dict(vmap(function)({**held, **sources}))
            found = torch.autograd.grad(made["loss"].sum(), list(sources.values()), materialize_grads=True)
        made = {name: item.detach() for name, item in made.items()}
        return made | dict(zip(gradients, found, strict=True))

    return of_all


def _why(error: Exception) -> str:
    text = " ".join(str(error).split())
    asks = ".item()" in text or "data-dependent" in text or "Boolean value" in text
    if asks or isinstance(error, DependsOnValuesError):
        return "its control flow depends on the values of tensors"
    if "randomness" in text:
        return "it draws random numbers"
    if "in-place" in text or "inplace" in text or "match the broadcast shape" in text:
        return "it changes tensors in place, as running statistics are changed"
    return f"{type(error).__name__}: {text[:200]}"


def _number_to_trace(values: Iterable[Tensor]) -> int:
    sizes = {size for value in values for size in value.shape[1:]}
    return next(lanes for lanes in _TRACED if all(size % lanes for size in sizes if size))


def _check_pure(graph: fx.Graph) -> None:
    for node in graph.nodes:
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        name = node.target._schema.name
        if any(word in name for word in _RANDOM):
            raise ProgramError(f"it draws random numbers ({name})")
        if node.target._schema.is_mutable:
            raise ProgramError(f"it changes tensors in place, as running statistics are changed ({name})")


def _check_agrees(program: Program, of_all: AllTrials, example: Mapping[str, Tensor]) -> None:
    """Compare the program with what it was traced of, for numbers of trials that were not traced."""
    count = len(next(iter(example.values())))
    for lanes in (2, min(count, 5)):
        held = {name: value[:lanes] for name, value in example.items()}
        found, right = program.run(held), of_all(held)
        name = first_apart(found, right)
        if name is not None:
            raise ProgramError(f"its batched form does not agree with it in {name!r}")


def first_apart(found: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> str | None:
    """Name an output in which two programs differ by more than the rounding of sums; None where none does.

    What is rounded in single precision stays so when it ends in double: a loss of a model in single precision
    is held to that one.
    """
    kinds = {item.dtype for item in right.values() if item.is_floating_point()}
    tolerance = 1e-9 if kinds <= {torch.float64} else 1e-4
    for name, item in right.items():
        if not _alike(found[name], item, tolerance):
            return name
    return None


def _alike(found: Tensor, right: Tensor, tolerance: float) -> bool:
    if found.shape != right.shape or found.dtype != right.dtype:
        return False
    if not right.is_floating_point():
        return torch.equal(found, right)
    return torch.allclose(found, right, rtol=tolerance, atol=tolerance, equal_nan=True)


# --- what is known early is computed early ----------------------------------------------------------


class _Names(NamedTuple):
    """What a traced function's inputs and outputs are called, when inputs are known, where outputs go."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    known: dict[str, Known]
    joined: dict[str, str]
    writes: bool

    @property
    def returned(self) -> tuple[str, ...]:
        """The outputs that a call returns."""
        return tuple(name for name in self.outputs if name not in self.joined)


class _Parts:
    """A graph in three: what is computed a pack, what a batch, and what a step; each takes `lanes` first."""

    def __init__(self, traced: fx.GraphModule, names: _Names) -> None:
        placeholders = [node for node in traced.graph.nodes if node.op == "placeholder"]
        self._lanes, held = placeholders[0], placeholders[1:]
        self._names = dict(zip(held, names.inputs, strict=True))
        self._known = names.known
        self._traced = traced
        self.writes = names.writes
        when = self._when()
        made = next(node for node in traced.graph.nodes if node.op == "output").args[0]
        results = dict(zip(names.outputs, made, strict=True))
        for name in names.joined:
            if when[results[name]] < Known.STEP or is_zeros(results[name]):
                raise ProgramError(f"its output {name!r} depends on nothing that a step changes")

        late = {node for node, moment in when.items() if moment is Known.STEP}
        used = [item for node in traced.graph.nodes if node in late for item in node.all_input_nodes]
        used = list(dict.fromkeys([*used, *results.values()]))
        states = [node for node in used if node in self._names and node in late]
        batch = [node for node in used if when[node] is Known.BATCH]
        pack = [node for node in used if when[node] in (Known.PACK, Known.PLACE) and node is not self._lanes]
        self.step_inputs = tuple(self._names[node] for node in states)
        self.step = self._step([*states, *batch, *pack], results, names)
        self.whole = self._part([*states, *batch, *pack], list(results.values()))[0]
        sources = self._sources(pack)
        self.pack_inputs = tuple(self._names[node] for node in sources)
        self.pack = self._part(sources, pack)[0]
        sources = self._sources(batch)
        self.batch_inputs = tuple((self._names[node], self._known[self._names[node]]) for node in sources)
        self.batches = self._part(sources, batch)[0]

    def _when(self) -> dict[fx.Node, Known]:
        when: dict[fx.Node, Known] = {}
        for node in self._traced.graph.nodes:
            if node is self._lanes:
                when[node] = Known.PACK
            elif node in self._names:
                when[node] = self._known[self._names[node]]
            elif node.op == "call_function":
                latest = max((when[item] for item in node.all_input_nodes), default=Known.ALWAYS)
                stays = is_view(node) and when[node.args[0]] is Known.PLACE
                when[node] = Known.STEP if latest is Known.PLACE and not stays else latest
            elif node.op == "get_attr":
                when[node] = Known.ALWAYS
        return when

    def _sources(self, nodes: Sequence[fx.Node]) -> list[fx.Node]:
        """Return the inputs that the nodes are computed from."""
        open_, seen = list(nodes), set(nodes)
        while open_:
            for item in open_.pop().all_input_nodes:
                if item not in seen:
                    seen.add(item)
                    open_.append(item)
        return [node for node in self._names if node in seen]

    def _step(self, sources: Sequence[fx.Node], results: Mapping[str, fx.Node], names: _Names) -> fx.Graph:
        """Make the step's graph: after what it is given comes the matrix that it writes to."""
        part, copied = self._part(sources, list(results.values()))
        output = next(node for node in part.nodes if node.op == "output")
        output.args = (tuple(copied[results[name]] for name in names.returned),)
        if names.joined:
            last_input = [node for node in part.nodes if node.op == "placeholder"][-1]
            with part.inserting_after(last_input):
                matrix = part.placeholder("joined")
            join_results(part, [copied[results[name]] for name in names.joined], matrix)
        return part

    def _part(
        self, sources: Sequence[fx.Node], results: Sequence[fx.Node]
    ) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
        """Make the graph from `sources` to `results`, in the order of the whole; also what became what."""
        part = fx.Graph()
        copied: dict[fx.Node, fx.Node] = {self._lanes: part.placeholder("lanes")}
        for number, node in enumerate(sources):
            copied[node] = part.placeholder(f"given_{number}")
            copied[node].meta = dict(node.meta)
        wanted: set[fx.Node] = set()
        open_ = [node for node in results if node not in copied]
        while open_:
            node = open_.pop()
            if node not in wanted:
                wanted.add(node)
                open_ += [item for item in node.all_input_nodes if item not in copied]
        for node in self._traced.graph.nodes:
            if node in wanted:
                copied[node] = part.node_copy(node, copied.__getitem__)
        part.output(tuple(copied[node] for node in results))
        return part, copied


def _module(traced: fx.GraphModule, graph: fx.Graph) -> fx.GraphModule:
    """Return a graph as something to call, with the constants of the traced module."""
    quicken(graph)
    names = [node.target for node in graph.nodes if node.op == "get_attr"]
    return fx.GraphModule({name: attribute(traced, name) for name in names}, graph)
