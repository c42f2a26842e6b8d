"""A traced step written as C: everything of one trial, then the next, in the nearest of the caches.

What is computed is the graph's; here it is only said in another language, operation by operation, with
where each value lies. What a graph is, and when it is asked for, is decided in `program`; the building
blocks, in `cblocks`. An operation that has no words here is a `LoweringError`, and the graph runs as it is.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from scm.packed.cblocks import VECTOR, prelude
from scm.packed.graphs import PURE_VIEWS, meta_of
from scm.packed.places import (
    Arena,
    Form,
    Place,
    as_turned,
    coalesced,
    dense_strides,
    literal_place,
    ordered,
    split_dims,
    spread_strides,
    viewed,
    weight_of,
    without_dim,
)
from scm.packed.words import C_TYPES, POINTWISE, LoweringError, cast_text, named, number_text, power_text

aten = torch.ops.aten


_WORTH_TURNING = 256  # numbers of a matrix


@dataclass(frozen=True)
class Lowered:
    """A step as C. text: defines ``step``; scratch: bytes that each thread lends it."""

    text: str
    scratch: int


def lower_graph(
    graph: fx.Graph,
    constant: Callable[[str], Any],
    lanes: int,
    inputs: Sequence[Form],
    joined: Sequence[int],
) -> Lowered:
    """Write a graph as the C function ``step``; LoweringError where that cannot be.

    lanes: the number of trials that it was traced with. inputs: of those of its placeholders that are
    tensors; the others are numbers of trials. joined: which of its results go side by side into a matrix;
    the others are outputs.

    ``void step(long first, long last, char **at, const long *by, char *scratch)`` computes the trials from
    `first` to `last`; `at` has the addresses of inputs, outputs, the matrix and, if there is one, of a number
    a trial that is finite where all of its row is; `by` has what lies between two trials there, in bytes.
    """
    writer = _Writer(graph, constant, lanes)
    return writer.write(inputs, joined)


class _Writer:
    def __init__(self, graph: fx.Graph, constant: Callable[[str], Any], lanes: int) -> None:
        self.graph, self.constant, self.lanes = graph, constant, lanes
        self.lines: list[str] = []
        self.held: dict[fx.Node, Any] = {}
        self.dest: dict[fx.Node, Place] = {}
        self.arena = Arena()

    def write(self, inputs: Sequence[Form], joined: Sequence[int]) -> Lowered:
        nodes = list(self.graph.nodes)
        placeholders = [node for node in nodes if node.op == "placeholder" and meta_of(node) is not None]
        results = list(_given(nodes[-1])[0])
        if len(inputs) != len(placeholders):
            raise LoweringError(f"{len(placeholders)} inputs, {len(inputs)} forms")
        names = [f"in{number}" for number in range(len(inputs))]
        places = [Place(name, *self._form(form)) for name, form in zip(names, inputs, strict=True)]
        self.held.update(zip(placeholders, places, strict=True))
        addresses = [(place.kind, place.pointer) for place in places]
        ends = self._ends(results, set(joined), addresses)
        last_use = self._last_uses(nodes)
        for place, node in enumerate(nodes):
            if node.op == "get_attr":
                self.held[node] = self._constant(node)
            elif node.op == "call_function":
                self.lines.append(f"    /* {node.name} */")
                self.held[node] = self._call(node)
            for gone in last_use.get(place, ()):
                self.arena.release(gone)
        for node, end in zip(results, ends, strict=True):
            made = self._of(node)
            if made.pointer != end.pointer or made.offset != end.offset:
                self._copy(made, end)
        if joined:
            end = max((ends[number] for number in joined), key=lambda item: item.offset)
            width, kind = end.offset + end.size, end.kind
            if kind not in VECTOR:
                raise LoweringError(f"a matrix of {kind}")
            addresses.append((kind, "mean"))
            self.lines.append(
                f"    *mean = finite_mean_{kind}(row, {width}, {number_text(0.5 / width, kind)});"
            )
        return Lowered(self._text(addresses), self.arena.bytes)

    def _form(self, form: Form) -> tuple[torch.dtype, tuple[int, ...], tuple[int, ...]]:
        if form.dtype not in C_TYPES:
            raise LoweringError(f"numbers of {form.dtype}")
        return form.dtype, form.shape, form.strides

    def _ends(
        self, results: Sequence[fx.Node], joined: set[int], addresses: list[tuple[str, str]]
    ) -> list[Place]:
        """Say where each result goes; what only such a result shows is computed right there."""
        ends: dict[int, Place] = {}
        for number, node in enumerate(results):
            if number not in joined:
                _, dtype, shape = self._meta(node)
                addresses.append((C_TYPES[dtype], f"out{number}"))
                ends[number] = Place(f"out{number}", dtype, shape, dense_strides(shape))
        at = 0
        for number in sorted(joined):
            _, dtype, shape = self._meta(results[number])
            if not at:
                addresses.append((C_TYPES[dtype], "row"))
            ends[number] = Place("row", dtype, shape, dense_strides(shape), at)
            at += math.prod(shape)
        for number, node in enumerate(results):
            source = node
            while source.target in _PLAIN_VIEWS and isinstance(_given(source)[0], fx.Node):
                source = _given(source)[0]
            end = ends[number]
            _, dtype, shape = self._meta(source)
            if source.op == "call_function" and source not in self.dest and dtype == end.dtype:
                self.dest[source] = replace(end, shape=shape, strides=dense_strides(shape))
        return [ends[number] for number in range(len(results))]

    def _last_uses(self, nodes: Sequence[fx.Node]) -> dict[int, list[str]]:
        """Return after which node which memory is free: names of arrays, by the place of the node."""
        order = {node: place for place, node in enumerate(nodes)}
        last: dict[fx.Node, int] = {}
        for node in reversed(nodes):  # a view holds what it shows
            end = max([last.get(node, order[node]), *(order[user] for user in node.users)])
            last[node] = end
            if node.op == "call_function" and _shows(node):
                for item in node.all_input_nodes:
                    last[item] = max(last.get(item, 0), end)
        free: dict[int, list[str]] = {}
        for node, place in last.items():
            if node.op == "call_function":
                free.setdefault(place, []).append(_name(node))
        return free

    def _text(self, addresses: Sequence[tuple[str, str]]) -> str:
        begun = [
            f"    {kind} *{name} = ({kind} *)(at[{number}] + lane * by[{number}]);"
            for number, (kind, name) in enumerate(addresses)
        ]
        return "\n".join(
            [
                prelude(),
                "void step(long first, long last, char **at, const long *by, char *scratch) {",
                "  for (long lane = first; lane < last; ++lane) {",
                *begun,
                *self.arena.declarations(),
                *self.lines,
                "  }",
                "}",
                "",
            ]
        )

    # --- values -------------------------------------------------------------------------------------

    def _meta(self, node: fx.Node) -> tuple[bool, torch.dtype, tuple[int, ...]]:
        """Return of a node's value whether every trial has its own, its dtype, and its shape for one."""
        value = meta_of(node)
        if not isinstance(value, Tensor) or value.dtype not in C_TYPES:
            raise LoweringError(f"a value of {node.target}")
        shape = tuple(value.shape)
        own = bool(shape) and shape[0] == self.lanes
        if any(size % self.lanes == 0 for size in shape[own:] if size):
            raise LoweringError(f"{node.target} mixes trials with rows")
        return own, value.dtype, shape[own:]

    def _of(self, item: Any) -> Place:
        held = self.held[item]
        if not isinstance(held, Place):
            raise LoweringError(f"a value of {item.target}")
        return held

    def _constant(self, node: fx.Node) -> Place:
        value = self.constant(str(node.target))
        if not isinstance(value, Tensor) or value.numel() != 1 or value.dtype not in C_TYPES:
            raise LoweringError("a constant of several numbers")
        shape = tuple(value.shape)
        return literal_place(value.item(), value.dtype, shape)

    def _result(self, node: fx.Node, like: Place | None = None) -> Place:
        """Return a place for a node's value: where it is to go, or new memory that lies as `like` does."""
        if node in self.dest:
            return self.dest[node]
        _, dtype, shape = self._meta(node)
        order = list(range(len(shape)))
        if like is not None and len(like.shape) == len(shape):
            order = sorted(order, key=lambda d: (-like.strides[d] if like.shape[d] > 1 else -math.inf, d))
        strides, step = [0] * len(shape), 1
        for dim in reversed(order):
            strides[dim] = step
            step *= shape[dim]
        self.arena.take(_name(node), C_TYPES[dtype], step * dtype.itemsize)
        return Place(_name(node), dtype, shape, tuple(strides))

    # --- operations ---------------------------------------------------------------------------------

    def _call(self, node: fx.Node) -> Any:
        target = node.target
        if target is operator.mul and not isinstance(meta_of(node), Tensor):
            return None  # a multiple of the number of trials, for shapes, which are known here
        if target in _VIEWS:
            return self._view(node)
        if target in POINTWISE:
            return self._pointwise(node)
        handler = _OTHERS.get(target)
        if handler is None:
            raise LoweringError(f"no words for {target}")
        return handler(self, node)

    def _pointwise(self, node: fx.Node) -> Place:
        words = POINTWISE[node.target]
        _, dtype, shape = self._meta(node)
        operands = [self.held[item] for item in _given(node) if isinstance(item, fx.Node)]
        kind = C_TYPES[dtype if words.as_result else self._common(node)]
        given = []
        for item in _given(node):
            if isinstance(item, fx.Node):
                given.append(self._of(item))
            else:
                given.append(item)
        told = {name: value for name, value in node.kwargs.items() if value is not None}
        if set(told) - words.options:
            raise LoweringError(f"{node.target} with {sorted(told)}")

        def say(numbers: Sequence[Any]) -> str:
            texts = iter(numbers)
            said = []
            for place, item in enumerate(given):
                if isinstance(item, Place):
                    held = next(texts)
                    said.append(held if place in words.as_is else cast_text(held, item.kind, kind))
                else:
                    said.append(item if item is None else number_text(item, kind))
            return words.say(kind, *said, **told)

        like = max((item for item in operands if item.shape == shape), key=weight_of, default=None)
        result = self._result(node, like)
        self._loop(result, [self._alongside(node, item, result) for item in operands], say)
        for number in range(len(operands)):
            self.arena.release(f"{_name(node)}_{number}")
        return result

    def _alongside(self, node: fx.Node, operand: Place, result: Place) -> Place:
        """Turn a matrix that lies the other way than the result: read as it is, it costs ten times more."""
        turned = replace(result, dtype=operand.dtype)
        if operand.shape != result.shape or operand.kind not in VECTOR or operand.size < _WORTH_TURNING:
            return operand
        if as_turned(operand, turned) is None:
            return operand
        name = next(
            name for name in (f"{_name(node)}_{number}" for number in range(9)) if not self.arena.holds(name)
        )
        self.arena.take(name, operand.kind, operand.size * operand.dtype.itemsize)
        beside = replace(turned, pointer=name, offset=0)
        self._copy(operand, beside)
        return beside

    def _common(self, node: fx.Node) -> torch.dtype:
        """Return the dtype in which operands are compared, as torch promotes them."""
        values = [meta_of(item) if isinstance(item, fx.Node) else item for item in _given(node)]
        plain = [
            torch.empty(item.shape, dtype=item.dtype, device="meta") if isinstance(item, Tensor) else item
            for item in values
        ]
        if len(plain) == 1:
            only: torch.dtype = plain[0].dtype
            return only
        return torch.result_type(plain[0], plain[1])

    def _loop(self, result: Place, operands: Sequence[Place], say: Callable[[Sequence[str]], str]) -> None:
        """Write result[...] = say(operands[...]) for all of its numbers, in the order in which they lie."""
        steps = [result.strides, *(spread_strides(item, result.shape) for item in operands)]
        dims = [dim for dim, size in enumerate(result.shape) if size > 1]
        dims.sort(key=lambda dim: -result.strides[dim])
        loops: list[tuple[int, list[int]]] = []
        for dim in dims:
            size, own = result.shape[dim], [item[dim] for item in steps]
            if loops and all(outer == size * inner for outer, inner in zip(loops[-1][1], own, strict=True)):
                loops[-1] = (loops[-1][0] * size, own)
            else:
                loops.append((size, own))
        names = [f"i{number}" for number in range(len(loops))]

        def index(which: int) -> str:
            terms = [
                f"{name} * {own[which]}" if own[which] != 1 else name
                for name, (_, own) in zip(names, loops, strict=True)
                if own[which]
            ]
            return " + ".join(terms) or "0"

        said = say([item.at(index(number + 1)) for number, item in enumerate(operands)])
        heads = [
            f"for (long {name} = 0; {name} < {size}; ++{name})"
            for name, (size, _) in zip(names, loops, strict=True)
        ]
        if heads:
            self.lines += [f"    {head}" for head in heads[:-1]]
            self.lines += ['    _Pragma("GCC ivdep")', f"    {heads[-1]}"]
        self.lines.append(f"      {result.at(index(0))} = {said};")

    def _copy(self, source: Place, to: Place) -> None:
        """Write a value somewhere else; squares of numbers that lie the other way are turned as such."""
        source = replace(source, shape=to.shape) if source.shape != to.shape else source
        turned = as_turned(source, to)
        if turned is not None and to.kind in VECTOR:
            rows, columns, step, step_to = turned
            self.lines.append(
                f"    turn_{to.kind}({rows}, {columns}, {source.start}, {step}, {to.start}, {step_to});"
            )
            return
        self._loop(to, [source], lambda numbers: cast_text(numbers[0], source.kind, to.kind))

    # --- views --------------------------------------------------------------------------------------

    def _view(self, node: fx.Node) -> Place:
        source, target = self._of(_given(node)[0]), node.target
        own, _, shape = self._meta(node)
        source_own, _, _ = self._meta(_given(node)[0])
        if own != source_own:
            if own and source.literal is not None:  # what all trials share, one for each
                return replace(source, shape=shape, strides=(0,) * len(shape))
            raise LoweringError(f"{target} over trials")
        rank = len(meta_of(_given(node)[0]).shape)

        def dim_of(value: Any, size: int = rank) -> int:
            dim = value % size - source_own
            if dim < 0:
                raise LoweringError(f"{target} over trials")
            return int(dim)

        if target in (aten.detach.default, aten.alias.default):
            return source
        if target is aten.expand.default:
            return replace(source, shape=shape, strides=spread_strides(source, shape))
        if target is aten.transpose.int:
            one, two = (dim_of(item) for item in _given(node)[1:])
            order = list(range(len(shape)))
            order[one], order[two] = two, one
            return ordered(source, order)
        if target is aten.permute.default:
            dims = [item % rank for item in _given(node)[1]]
            if source_own and dims[0] != 0:
                raise LoweringError(f"{target} over trials")
            return ordered(source, [dim - source_own for dim in dims[source_own:]])
        if target is aten.select.int:
            dim, at = dim_of(_given(node)[1]), int(_given(node)[2])
            at = at % source.shape[dim]
            return without_dim(replace(source, offset=source.offset + at * source.strides[dim]), dim)
        if target is aten.slice.Tensor:
            return self._slice(node, source, dim_of)
        return viewed(source, shape) or self._materialized(node, source, shape)

    def _slice(self, node: fx.Node, source: Place, dim_of: Callable[[Any], int]) -> Place:
        told = [*_given(node)[1:], *[None] * 4]
        dim_given, start, _, step = (0 if told[0] is None else told[0]), told[1], told[2], told[3] or 1
        _, _, shape = self._meta(node)
        if dim_given == 0 and self._meta(_given(node)[0])[0]:
            if shape == source.shape and not start:
                return source
            raise LoweringError("slice over trials")
        dim = dim_of(dim_given)
        first = 0 if start is None else int(start)
        first = first + source.shape[dim] if first < 0 else min(first, source.shape[dim])
        strides = tuple(item * (step if place == dim else 1) for place, item in enumerate(source.strides))
        return replace(
            source, shape=shape, strides=strides, offset=source.offset + first * source.strides[dim]
        )

    def _materialized(self, node: fx.Node, source: Place, shape: tuple[int, ...]) -> Place:
        """Lay a value out anew, where a view of it as it lies has no steps."""
        self.arena.take(_name(node), source.kind, source.size * source.dtype.itemsize)
        made = Place(_name(node), source.dtype, source.shape, dense_strides(source.shape))
        self._copy(source, made)
        return replace(made, shape=shape, strides=dense_strides(shape))

    def _split(self, node: fx.Node) -> list[Place]:
        source = self._of(_given(node)[0])
        own, _, _ = self._meta(_given(node)[0])
        value = meta_of(_given(node)[0])
        dim = (int(_given(node)[2]) if len(_given(node)) > 2 else 0) % value.ndim - own
        if dim < 0:
            raise LoweringError("split over trials")
        parts, at = [], 0
        for part in meta_of(node):
            size = part.shape[dim + own]
            shape = tuple(size if place == dim else old for place, old in enumerate(source.shape))
            parts.append(replace(source, shape=shape, offset=source.offset + at * source.strides[dim]))
            at += size
        return parts

    def _unbind(self, node: fx.Node) -> list[Place]:
        source = self._of(_given(node)[0])
        own, _, _ = self._meta(_given(node)[0])
        value = meta_of(_given(node)[0])
        dim = (int(_given(node)[1]) if len(_given(node)) > 1 else 0) % value.ndim - own
        if dim < 0:
            raise LoweringError("unbind over trials")
        return [
            without_dim(replace(source, offset=source.offset + at * source.strides[dim]), dim)
            for at in range(source.shape[dim])
        ]

    def _item(self, node: fx.Node) -> Place:
        parts = self.held[_given(node)[0]]
        if not isinstance(parts, list):
            raise LoweringError("an item of a value")
        part: Place = parts[_given(node)[1]]
        return part

    # --- values that are made anew ------------------------------------------------------------------

    def _full(self, node: fx.Node) -> Place:
        _, dtype, shape = self._meta(node)
        value = _given(node)[-1] if node.target in (aten.full_like.default, aten.new_full.default) else None
        if value is None:
            value = 1 if node.target in (aten.ones_like.default, aten.new_ones.default) else 0
        return literal_place(value, dtype, shape)

    def _slice_backward(self, node: fx.Node) -> Place:
        """Zeros, but for the slice that a gradient is of."""
        source, _, dim, start, end, step = _given(node)
        own, dtype, shape = self._meta(node)
        dim = dim % (len(shape) + own) - own
        part = self._of(source)
        result = self._result(node, None)
        self._copy(literal_place(0, dtype, shape), result)
        if dim < 0:
            if part.shape != shape:
                raise LoweringError("slice_backward over trials")
            self._copy(part, result)
            return result
        first = range(shape[dim])[start:end:step]
        strides = tuple(item * (step if place == dim else 1) for place, item in enumerate(result.strides))
        if len(first):
            offset = result.offset + first[0] * result.strides[dim]
            self._copy(part, replace(result, shape=part.shape, strides=strides, offset=offset))
        return result

    def _cat(self, node: fx.Node) -> Place:
        own, _, shape = self._meta(node)
        stacked = node.target is aten.stack.default
        parts = [self._of(item) for item in _given(node)[0]]
        rank = len(shape) + own
        dim = (int(_given(node)[1]) if len(_given(node)) > 1 else 0) % rank - own
        if dim < 0:
            raise LoweringError(f"{node.target} over trials")
        if stacked:
            parts = [
                replace(
                    part,
                    shape=(*part.shape[:dim], 1, *part.shape[dim:]),
                    strides=(*part.strides[:dim], 0, *part.strides[dim:]),
                )
                for part in parts
            ]
        # Part after part: each lies in one piece, whatever the dimension.
        far = tuple(1 + shape[dim] * math.prod(shape) if place == dim else 0 for place in range(len(shape)))
        model = max(parts, key=weight_of)
        like = Place("", model.dtype, shape, tuple(a + b for a, b in zip(model.strides, far, strict=True)))
        result = self._result(node, like)
        at = 0
        for part in parts:
            size = part.shape[dim]
            into = replace(result, shape=part.shape, offset=result.offset + at * result.strides[dim])
            self._copy(part, into)
            at += size
        return result

    def _sum(self, node: fx.Node) -> Place:
        source = self._of(_given(node)[0])
        own, dtype, _ = self._meta(node)
        rank = len(source.shape) + own
        given = _given(node)[1] if len(_given(node)) > 1 else None
        dims = sorted(item % rank - own for item in given) if given else list(range(len(source.shape)))
        if (dims and dims[0] < 0) or (not given and own):
            raise LoweringError("a sum over trials")
        kept_dims = [dim for dim in range(len(source.shape)) if dim not in dims]
        result = self._result(node)
        flat = replace(
            result,
            shape=tuple(source.shape[dim] for dim in kept_dims),
            strides=dense_strides([source.shape[dim] for dim in kept_dims]),
        )
        lying = ordered(source, [*kept_dims, *dims])
        kind, length = C_TYPES[dtype], math.prod(source.shape[dim] for dim in dims)
        outer, inner = split_dims(lying, len(kept_dims))
        along = coalesced(inner)
        rows = coalesced(outer)
        plain = source.literal is None and source.dtype == dtype and kind in VECTOR
        if plain and along is not None and along[1] == 1 and rows is not None:
            count, step = rows
            self.lines.append(f"    row_sums_{kind}({count}, {length}, {lying.start}, {step}, {flat.start});")
            return result
        # The numbers of one result lie apart: all results take one number each, again and again.
        self._loop(flat, [], lambda _: "0")
        steps = [(source.shape[dim], source.strides[dim]) for dim in dims]
        self._fold(flat, outer, steps, lambda a, b: f"{a} + ({kind}){b}")
        return result

    def _mean(self, node: fx.Node) -> Place:
        result = self._sum(node)
        number = f"(({result.kind}){self._of(_given(node)[0]).size // max(result.size, 1)})"
        self._loop(result, [result], lambda numbers: f"{numbers[0]} / {number}")
        return result

    def _fold(
        self, flat: Place, part: Place, dims: Sequence[tuple[int, int]], say: Callable[[str, str], str]
    ) -> None:
        """Take the numbers of `part` into `flat`, and those of all its neighbours along `dims`."""
        names = [f"r{number}" for number in range(len(dims))]
        self.lines += [
            f"    for (long {name} = 0; {name} < {size}; ++{name}) {{"
            for name, (size, _) in zip(names, dims, strict=True)
        ]
        moved = " + ".join(f"{name} * {step}" for name, (_, step) in zip(names, dims, strict=True)) or "0"
        if part.literal is None:
            self.lines.append(f"    const {part.kind} *there = {part.start} + {moved};")
        there = replace(part, pointer="there", offset=0)
        self._loop(flat, [flat, there], lambda numbers: say(*numbers))
        self.lines.append("    " + "}" * len(dims))

    def _max(self, node: fx.Node) -> list[Place]:
        """The largest number along a dimension; where it is, nobody may ask."""
        source, dim = self._of(_given(node)[0]), int(_given(node)[1])
        own, dtype, _ = self._meta(_given(node)[0])
        if any(_given(user)[1] != 0 for user in node.users) or source.kind not in VECTOR:
            raise LoweringError(f"the places that {node.target} finds")
        dim = dim % (len(source.shape) + own) - own
        if dim < 0:
            raise LoweringError(f"{node.target} over trials")
        first = without_dim(source, dim)
        self.arena.take(_name(node), source.kind, max(first.size, 1) * dtype.itemsize)
        flat = Place(_name(node), dtype, first.shape, dense_strides(first.shape))
        self._copy(first, flat)
        steps = [(source.shape[dim], source.strides[dim])]
        self._fold(flat, first, steps, lambda a, b: f"larger_{flat.kind}({a}, larger_{flat.kind}({b}, {a}))")
        shape = tuple(meta_of(node)[0].shape[own:])
        return [replace(flat, shape=shape, strides=dense_strides(shape))]

    # --- products -----------------------------------------------------------------------------------

    def _product(self, node: fx.Node) -> Place:
        one, two = (self._of(item) for item in _given(node))
        _, dtype, _ = self._meta(node)
        kind = C_TYPES[dtype]
        if kind not in VECTOR:
            raise LoweringError(f"a product of {dtype}")
        (rows, inner), columns = one.shape, two.shape[1]
        if rows * columns == 1 and all(item.literal is None for item in (one, two)):
            steps = one.strides[1], two.strides[0]
            if inner == 1 or steps == (1, 1):
                result = self._result(node)
                self.lines.append(f"    {result.at('0')} = dot_{kind}({one.start}, {two.start}, {inner});")
                return result
        plain = _Product(rows, inner, columns, one, two)
        turned = _Product(columns, inner, rows, ordered(two, [1, 0]), ordered(one, [1, 0]))
        end = self.dest.get(node)
        wishes = self._wishes(node)
        costs = plain.cost(kind, turns=False), turned.cost(kind, turns=end is not None)
        if costs[0] + wishes[1] <= costs[1] + wishes[0]:
            return self._multiply(node, plain, self._product_result(node, end, plain, (0, 1)), kind)
        result = self._product_result(node, end, turned, (1, 0))
        made = self._multiply(node, turned, ordered(result, [1, 0]), kind)
        return ordered(made, [1, 0]) if end is None else result

    def _wishes(self, node: fx.Node) -> tuple[float, float]:
        """Return what turning costs those who read this beside values that lie row after row, or turned."""
        wishes = [0.0, 0.0]
        for user in node.users:
            if user.target not in POINTWISE:
                continue
            for other in user.all_input_nodes:
                held = self.held.get(other)
                if other is not node and isinstance(held, Place) and weight_of(held) == 2 == len(held.shape):
                    wishes[held.strides[1] != 1] += 0.5 * held.size
        return wishes[0], wishes[1]

    def _product_result(
        self, node: fx.Node, end: Place | None, product: _Product, order: tuple[int, int]
    ) -> Place:
        if end is not None:
            return end
        like_strides = (product.columns, 1)
        _, dtype, shape = self._meta(node)
        like = Place("", dtype, shape, tuple(like_strides[item] for item in order))
        return self._result(node, like)

    def _multiply(self, node: fx.Node, product: _Product, result: Place, kind: str) -> Place:
        """Write the product into `result`, (rows, columns), by way of rows of whole vectors where need be."""
        lanes = VECTOR[kind]
        padded = -(-product.columns // lanes) * lanes
        left, right, dtype = product.left, product.right, result.dtype
        if left.literal is not None or right.literal is not None:
            raise LoweringError("a product with a constant")
        packed, step = right.start, right.strides[0]
        room, beside = f"{_name(node)}_packed", f"{_name(node)}_made"
        if product.packs(kind):
            self.arena.take(room, kind, product.inner * padded * dtype.itemsize)
            if padded != product.columns:
                self.lines.append(f"    memset({room}, 0, sizeof({kind}) * {product.inner * padded});")
            self._copy(right, Place(room, dtype, (product.inner, product.columns), (padded, 1)))
            packed, step = room, padded
        made = result
        if padded != product.columns or result.strides[1] != 1:
            self.arena.take(beside, kind, product.rows * padded * dtype.itemsize)
            made = Place(beside, dtype, (product.rows, product.columns), (padded, 1))
        steps = f"{left.strides[0]}, {left.strides[1]}"
        self.lines.append(
            f"    product_{kind}({product.rows}, {padded}, {product.inner}, {left.start}, {steps},"
            f" {packed}, {step}, {made.start}, {made.strides[0]});"
        )
        if made is not result:
            self._copy(made, result)
        self.arena.release(room)
        self.arena.release(beside)
        return result


@dataclass(frozen=True)
class _Product:
    """One way to compute a product: (rows, inner) numbers, times rows of (inner, columns)."""

    rows: int
    inner: int
    columns: int
    left: Place
    right: Place

    def packs(self, kind: str) -> bool:
        """Say whether the right side must be laid out anew."""
        return self.right.strides[1] != 1 or bool(self.columns % VECTOR[kind])

    def cost(self, kind: str, *, turns: bool) -> float:
        """Return about how many cycles it takes."""
        vectors = -(-self.columns // VECTOR[kind])
        cost = 0.6 * self.rows * self.inner * vectors
        if self.packs(kind):
            cost += self.inner * self.columns * (0.3 if self.right.strides[1] == 1 else 0.6)
        if turns:
            cost += self.rows * self.columns * 0.5
        elif self.columns % VECTOR[kind]:
            cost += self.rows * self.columns * 0.3
        return cost


def _given(node: fx.Node) -> Any:
    """Return what a node is called with."""
    return node.args


def _name(node: fx.Node) -> str:
    """Name a node's memory: nodes are called after operations, as functions of C are."""
    return f"v_{node.name}"


def _shows(node: fx.Node) -> bool:
    return node.target in _VIEWS or node.target in (
        aten.split.Tensor,
        aten.split_with_sizes.default,
        aten.unbind.int,
        aten.max.dim,
        operator.getitem,
    )


def _power_of_number(writer: _Writer, node: fx.Node) -> Place:
    """A power whose exponent is known: squares are products, as torch computes them."""
    source, exponent = writer._of(_given(node)[0]), _given(node)[1]
    said: Mapping[Any, Callable[[str], str]] = {
        1: lambda x: x,
        2: lambda x: f"{x} * {x}",
        3: lambda x: f"{x} * {x} * {x}",
        -1: lambda x: f"1 / {x}",
        0.5: lambda x: f"{named('sqrt', kind)}({x})",
    }
    result = writer._result(node, source)
    kind = result.kind
    say = said.get(exponent, lambda x: power_text(kind, x, number_text(exponent, kind)))
    writer._loop(result, [source], lambda numbers: say(f"(({kind}){numbers[0]})"))
    return result


_VIEWS = PURE_VIEWS | {aten._unsafe_view.default, aten.reshape.default}
# Those under which numbers stay in their order.
_PLAIN_VIEWS = frozenset(
    {
        aten.view.default,
        aten._unsafe_view.default,
        aten.reshape.default,
        aten.unsqueeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.detach.default,
        aten.alias.default,
    }
)
_OTHERS: Mapping[Any, Callable[[_Writer, fx.Node], Any]] = {
    aten.bmm.default: _Writer._product,
    aten.sum.dim_IntList: _Writer._sum,
    aten.mean.dim: _Writer._mean,
    aten.max.dim: _Writer._max,
    aten.cat.default: _Writer._cat,
    aten.stack.default: _Writer._cat,
    aten.split.Tensor: _Writer._split,
    aten.split_with_sizes.default: _Writer._split,
    aten.unbind.int: _Writer._unbind,
    operator.getitem: _Writer._item,
    aten.pow.Tensor_Scalar: _power_of_number,
    aten.slice_backward.default: _Writer._slice_backward,
    aten.zeros_like.default: _Writer._full,
    aten.ones_like.default: _Writer._full,
    aten.full_like.default: _Writer._full,
    aten.new_zeros.default: _Writer._full,
    aten.new_ones.default: _Writer._full,
    aten.new_full.default: _Writer._full,
}
