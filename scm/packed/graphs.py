"""What is done to a traced graph before it is called thousands of times: nothing of it changes a value.

What is traced, and which part of a graph is computed when, is decided in `program`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten


def meta_of(node: Any) -> Any:
    """Return what the tracer knows of a node's value: a tensor of its form, or several; None of nothing."""
    return node.meta.get("val") if isinstance(node, fx.Node) else None


def device_of(node: Any) -> torch.device | None:
    """Return where a node's value lies; None of no tensor."""
    return node.meta.get("device") if isinstance(node, fx.Node) else None


def attribute(module: fx.GraphModule, target: str) -> Any:
    """Return what a ``get_attr`` node of the module's graph reads."""
    held: Any = module
    for part in target.split("."):
        held = getattr(held, part)
    return held


# --- what computes nothing goes ---------------------------------------------------------------------


def simplify(module: fx.GraphModule, lanes: int) -> None:
    """Drop what nobody reads, what is computed twice, and what changes nothing; compute what is constant.

    What has the form of the traced number of trials is not constant: another number has another form.
    """
    graph = module.graph
    graph.eliminate_dead_code()
    for _ in range(3):  # each pass shows the next one something
        for node in list(graph.nodes):
            if node.op == "call_function":
                same = _equivalent(node)
                if same is not None:
                    node.replace_all_uses_with(same)
                    graph.erase_node(node)
        _merge_equal(graph)
        graph.eliminate_dead_code()
    _fold_constants(module, lanes)
    graph.eliminate_dead_code()


def _same_form(node: fx.Node, other: fx.Node, *, anywhere: bool = False) -> bool:
    one, two = meta_of(node), meta_of(other)
    if not isinstance(one, Tensor) or not isinstance(two, Tensor):
        return False
    return (
        one.shape == two.shape
        and one.dtype == two.dtype
        and (anywhere or device_of(node) == device_of(other))
    )


_VIEWS = (
    aten.expand.default,
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.detach.default,
    aten.alias.default,
    aten._to_copy.default,
    aten.clone.default,
)


_COPIES = (aten._to_copy.default, aten.clone.default)


def _equivalent(node: fx.Node) -> fx.Node | None:
    """Return another node with the very value of this one, None where there is none."""
    target, arguments = node.target, node.args
    source = arguments[0] if arguments else None
    if not isinstance(source, fx.Node):
        if target is aten.mul.Tensor and isinstance(arguments[1], fx.Node):
            return _times_one(node, arguments[1], source)
        return None
    if target in _VIEWS and _same_form(node, source):
        return source
    if target in _COPIES and _same_form(node, source, anywhere=True):
        return source  # what would be taken to the host stays, and nothing waits for it
    if target in (aten.mul.Scalar, aten.mul.Tensor, aten.div.Tensor) and len(arguments) == 2:
        other = arguments[1]
        if target is not aten.div.Tensor and isinstance(other, fx.Node):
            return _times_one(node, source, other) or _times_one(node, other, source)
        return source if not isinstance(other, fx.Node) and other == 1 and _same_form(node, source) else None
    if target is aten.pow.Tensor_Scalar and arguments[1] == 1 and _same_form(node, source):
        return source
    if target is aten.transpose.int and source.target is aten.transpose.int:
        inner = source.args[0]
        if set(arguments[1:]) == set(source.args[1:]) and isinstance(inner, fx.Node):
            return inner
    if target is aten.view.default and source.target in (aten.view.default, aten._unsafe_view.default):
        inner = source.args[0]
        if isinstance(inner, fx.Node) and _same_form(node, inner):
            return inner
    return None


def _times_one(node: fx.Node, factor: fx.Node, other: Any) -> fx.Node | None:
    """Return `factor` where `other` is 1 everywhere and the product has the factor's form."""
    ones = _is_ones(other) if isinstance(other, fx.Node) else other == 1
    return factor if ones and _same_form(node, factor) else None


def _is_ones(node: fx.Node) -> bool:
    if node.target is aten.ones_like.default:
        return True
    passes = (*_VIEWS, aten.unsqueeze.default)
    return node.target in passes and isinstance(node.args[0], fx.Node) and _is_ones(node.args[0])


def _merge_equal(graph: fx.Graph) -> None:
    seen: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        key = (node.target, _frozen(node.args), _frozen(node.kwargs))
        held = seen.setdefault(key, node)
        if held is not node:
            node.replace_all_uses_with(held)
            graph.erase_node(node)


def _frozen(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(_frozen(item) for item in value)
    if isinstance(value, dict):
        return tuple((name, _frozen(item)) for name, item in value.items())
    if isinstance(value, float):
        return ("float", math.copysign(1.0, value), repr(value))  # 0.0 is not -0.0, 1.0 is not 1
    return (type(value).__name__, value)


def _fold_constants(module: fx.GraphModule, lanes: int) -> None:
    """Compute what depends on no input and no number of trials, and keep it as a constant of the module."""
    graph = module.graph
    values: dict[fx.Node, Any] = {}
    for node in list(graph.nodes):
        if node.op == "get_attr":
            values[node] = attribute(module, node.target)
        if node.op != "call_function" or any(item not in values for item in node.all_input_nodes):
            continue
        # Such are the zeros that a backward pass makes where an output of a policy is not read.
        if any(_counts_lanes(item, lanes) for item in tree_leaves((node.args, node.kwargs))):
            continue
        value = node.target(*fx.map_arg(node.args, values.__getitem__), **node.kwargs)
        values[node] = value
        if not isinstance(value, Tensor) or all(user in values for user in node.users):
            continue
        name = f"constant_{len(values)}"
        module.register_buffer(name, value)
        with graph.inserting_before(node):
            held = graph.get_attr(name)
        held.meta.update(node.meta)
        node.replace_all_uses_with(held)
        values[held] = value


# --- the number of trials becomes an argument -------------------------------------------------------


def free_lanes(graph: fx.Graph, lanes: int) -> None:
    """Replace every multiple of the traced number of trials by the same multiple of an input."""
    first = next(iter(graph.nodes))
    with graph.inserting_before(first):
        count = graph.placeholder("lanes")
    made: dict[int, fx.Node] = {1: count}

    def freed(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [freed(item) for item in value]
        if not _counts_lanes(value, lanes):
            return value
        multiple = value // lanes
        if multiple not in made:
            with graph.inserting_after(count):
                made[multiple] = graph.call_function(operator.mul, (count, multiple))
        return made[multiple]

    for node in list(graph.nodes):
        if node.op == "call_function" and node.target is not operator.mul:
            node.args = tuple(freed(item) for item in node.args)
            node.kwargs = {name: freed(item) for name, item in node.kwargs.items()}


def _counts_lanes(value: Any, lanes: int) -> bool:
    """Whether an argument is a multiple of the traced number of trials, and so stands for that number."""
    return isinstance(value, int) and not isinstance(value, bool) and value != 0 and value % lanes == 0


# --- results take the place of what nobody reads any more -------------------------------------------


def _threshold_(gradient: Tensor, x: Tensor, threshold: float) -> Tensor:
    held: Tensor = aten.threshold_backward.grad_input(gradient, x, threshold, grad_input=gradient)
    return held


# Elementwise operations that may write into an operand, which operands those are, and how.
_IN_PLACE: Mapping[Any, tuple[tuple[int, ...], Callable[..., Any]]] = {
    aten.add.Tensor: ((0, 1), Tensor.add_),
    aten.sub.Tensor: ((0,), Tensor.sub_),
    aten.mul.Tensor: ((0, 1), Tensor.mul_),
    aten.mul.Scalar: ((0,), Tensor.mul_),
    aten.div.Tensor: ((0,), Tensor.div_),
    aten.addcmul.default: ((0,), Tensor.addcmul_),
    aten.relu.default: ((0,), Tensor.relu_),
    aten.neg.default: ((0,), Tensor.neg_),
    aten.abs.default: ((0,), Tensor.abs_),
    aten.sqrt.default: ((0,), Tensor.sqrt_),
    aten.rsqrt.default: ((0,), Tensor.rsqrt_),
    aten.sigmoid.default: ((0,), Tensor.sigmoid_),
    aten.tanh.default: ((0,), Tensor.tanh_),
    aten.clamp.default: ((0,), Tensor.clamp_),
    aten.copysign.Tensor: ((0,), Tensor.copysign_),
    aten.threshold_backward.default: ((0,), _threshold_),
}


_WRITERS = frozenset(write for _, write in _IN_PLACE.values()) | {Tensor.copy_}


class Memory:
    """Whose memory the nodes of a graph show, and how long it is read.

    A root is a node that makes a tensor of its own; a node that is no root of this graph's has None.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.order = {node: place for place, node in enumerate(graph.nodes)}
        self.root: dict[fx.Node, fx.Node | None] = {}
        self.last: dict[fx.Node, int] = {}  # by root
        for node in graph.nodes:
            self.root[node] = self._root_of(node)
            for item in node.all_input_nodes:
                root = self.root[item]
                if root is not None:
                    self.last[root] = max(self.last.get(root, 0), self.order[node])

    def _root_of(self, node: fx.Node) -> fx.Node | None:
        if node.op != "call_function":
            return None
        if node.target in _WRITERS:
            return self.root[node.args[0]]  # type: ignore[index]
        if not _may_be_view(node):
            return node
        # The number of trials is an input of many views, and no memory.
        sources = {self.root[item] for item in node.all_input_nodes if meta_of(item) is not None}
        if len(sources) == 1:
            return sources.pop()
        for source in sources - {None}:  # too tangled to say: held to the end
            assert source is not None
            self.last[source] = len(self.order)
        return None

    def ends_at(self, node: fx.Node, operand: fx.Node) -> bool:
        """Say whether `node` is the last to read the operand's memory, and reads it as this operand alone."""
        root = self.root[operand]
        if root is None or self.last[root] != self.order[node]:
            return False
        return all(item is operand or self.root[item] is not root for item in node.all_input_nodes)

    def take_over(self, node: fx.Node, operand: fx.Node) -> None:
        """Note that `node` writes its result into the operand's memory."""
        root = self.root[operand]
        assert root is not None
        self.last[root] = max(self.last[root], self.last.get(node, 0))
        self.root.update({other: root for other, held in self.root.items() if held is node})


def write_in_place(graph: fx.Graph) -> None:
    """Let an operation write into an operand that it is the last to read: what is warm stays small."""
    memory = Memory(graph)
    for node in list(graph.nodes):
        places, write = _IN_PLACE.get(node.target, ((), None)) if node.op == "call_function" else ((), None)
        for place in places:
            operand = node.args[place]
            if not isinstance(operand, fx.Node) or not memory.ends_at(node, operand):
                continue
            root = memory.root[operand]
            assert root is not None
            if not _same_form(node, operand) or not _same_form(operand, root):
                continue
            rest = [item for index, item in enumerate(node.args) if index != place]
            node.target, node.args = write, (operand, *rest)
            memory.take_over(node, operand)
            break


@dataclass(frozen=True)
class Buffer:
    """Memory that a graph uses again at every call: (multiple of the trials, *rest)."""

    multiple: int
    rest: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def make(self, lanes: int) -> Tensor:
        """Return the memory for so many trials."""
        return torch.empty(self.multiple * lanes, *self.rest, dtype=self.dtype, device=self.device)


def plan_buffers(graph: fx.Graph, lanes: int) -> list[Buffer]:
    """Give results that do not leave the graph memory that is kept from call to call.

    lanes: the number of trials that the graph was traced with. The buffers become the graph's last inputs.
    """
    memory = Memory(graph)
    leaving: dict[int, list[fx.Node]] = {}
    for root, place in memory.last.items():
        leaving.setdefault(place, []).append(root)
    end = len(memory.order) - 1
    buffers: list[Buffer] = []
    holders: list[fx.Node] = []
    free: dict[Buffer, list[int]] = {}
    taken: dict[fx.Node, int] = {}
    last_input = [node for node in graph.nodes if node.op == "placeholder"][-1]
    for node in list(graph.nodes):
        own = memory.root[node] is node
        form = _buffer_of(node, lanes) if own else None
        if form is not None and memory.last.get(node, end) < end:
            if free.get(form):
                number = free[form].pop()
            else:
                number = len(buffers)
                buffers.append(form)
                with graph.inserting_after(last_input):
                    last_input = graph.placeholder(f"buffer_{number}")
                holders.append(last_input)
            taken[node] = number
            _write_into(node, holders[number])
        for root in leaving.get(memory.order[node], ()):
            if root in taken:
                free.setdefault(buffers[taken[root]], []).append(taken[root])
    return buffers


def _buffer_of(node: fx.Node, lanes: int) -> Buffer | None:
    value = meta_of(node)
    known = node.op == "call_function" and (node.target in _INTO or node.target is aten._to_copy.default)
    device = device_of(node)
    if not known or device is None or not value.ndim or value.shape[0] % lanes:
        return None
    if node.target is aten._to_copy.default and not _changes_dtype_alone(node):
        return None
    return Buffer(value.shape[0] // lanes, tuple(value.shape[1:]), value.dtype, device)


def _changes_dtype_alone(node: fx.Node) -> bool:
    if not set(node.kwargs) <= {"dtype", "layout", "device"}:
        return False
    device, layout = node.kwargs.get("device"), node.kwargs.get("layout", torch.strided)
    stays = device is None or device_of(node.args[0]) == device
    return stays and layout is torch.strided and "dtype" in node.kwargs


def _write_into(node: fx.Node, holder: fx.Node) -> None:
    if node.target is aten._to_copy.default:
        node.target, node.args, node.kwargs = Tensor.copy_, (holder, node.args[0]), {}
    else:
        node.target = _INTO[node.target]
        node.kwargs = {**node.kwargs, "out": holder}


def join_results(graph: fx.Graph, results: Sequence[fx.Node], matrix: fx.Node) -> None:
    """Write results side by side, each flattened to a row a trial, into a given matrix, as the last thing."""
    nodes = list(graph.nodes)
    lanes, output = nodes[0], nodes[-1]
    with graph.inserting_before(output):
        flat = [graph.call_function(Tensor.reshape, (node, lanes, -1)) for node in results]
        graph.call_function(torch.cat, (flat, 1), {"out": matrix})


PURE_VIEWS = frozenset(
    {
        aten.view.default,
        aten.expand.default,
        aten.transpose.int,
        aten.permute.default,
        aten.t.default,
        aten.unsqueeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.select.int,
        aten.slice.Tensor,
        aten.detach.default,
        aten.alias.default,
    }
)
"""Operations that surely show their operand's memory."""


def is_view(node: fx.Node) -> bool:
    """Say whether the node surely shows its operand's memory, so that what is written there shows in it."""
    return node.op == "call_function" and node.target in PURE_VIEWS


def is_zeros(node: fx.Node) -> bool:
    """Say whether the node's value is surely 0 everywhere, whatever the inputs are."""
    return node.op == "call_function" and node.target in (
        aten.zeros_like.default,
        aten.new_zeros.default,
        aten.zeros.default,
    )


def _may_be_view(node: fx.Node) -> bool:
    target = node.target
    if target is operator.getitem:
        return True
    if target is aten._unsafe_view.default or not isinstance(target, torch._ops.OpOverload):
        return True
    return any(item.alias_info is not None for item in target._schema.returns) or not target._schema.returns


# --- torch's own functions are called directly ------------------------------------------------------


def quicken(graph: fx.Graph) -> None:
    """Have nodes call torch's own function where it is the same: an overload's call costs 1.5 us more."""
    for node in graph.nodes:
        if node.op == "call_function":
            _quicken(node)


def _quicken(node: fx.Node) -> None:
    target = node.target
    if target is aten._to_copy.default and _changes_dtype_alone(node):
        node.target, node.kwargs = Tensor.to, {"dtype": node.kwargs["dtype"]}
    elif target in _QUICK:
        node.target = _QUICK[target]
    elif isinstance(target, torch._ops.OpOverload):
        name = target._schema.name.removeprefix("aten::")
        if name in _PLAIN and callable(getattr(torch, name, None)):
            node.target = getattr(torch, name)


_QUICK: Mapping[Any, Callable[..., Any]] = {
    aten.view.default: Tensor.view,
    aten._unsafe_view.default: Tensor.reshape,
    aten.expand.default: Tensor.expand,
}
# Functions of torch that take what the overloads of their name take, in the same order.
_PLAIN = frozenset(
    [
        "abs",
        "acos",
        "add",
        "addcdiv",
        "addcmul",
        "amax",
        "amin",
        "any",
        "all",
        "asin",
        "atan2",
        "bitwise_and",
        "bitwise_not",
        "bitwise_or",
        "bmm",
        "baddbmm",
        "cat",
        "ceil",
        "clamp",
        "clamp_min",
        "clamp_max",
        "copysign",
        "cos",
        "cumsum",
        "div",
        "eq",
        "erf",
        "exp",
        "exp2",
        "floor",
        "ge",
        "gt",
        "isinf",
        "isnan",
        "le",
        "log",
        "log1p",
        "log2",
        "logical_and",
        "logical_not",
        "logical_or",
        "lt",
        "matmul",
        "maximum",
        "mean",
        "minimum",
        "mul",
        "ne",
        "neg",
        "permute",
        "pow",
        "reciprocal",
        "relu",
        "rsqrt",
        "rsub",
        "select",
        "sigmoid",
        "sign",
        "sin",
        "split",
        "sqrt",
        "square",
        "squeeze",
        "stack",
        "sub",
        "sum",
        "tanh",
        "transpose",
        "unbind",
        "unsqueeze",
        "where",
        "logsumexp",
        "gather",
        "sort",
        "slice_copy",
    ]
)


# Operations that may write into given memory, and torch's function that takes it as `out`.
_INTO: Mapping[Any, Callable[..., Any]] = {
    aten.bmm.default: torch.bmm,
    aten.add.Tensor: torch.add,
    aten.sub.Tensor: torch.sub,
    aten.mul.Tensor: torch.mul,
    aten.mul.Scalar: torch.mul,
    aten.div.Tensor: torch.div,
    aten.addcmul.default: torch.addcmul,
    aten.where.self: torch.where,
    aten.abs.default: torch.abs,
    aten.neg.default: torch.neg,
    aten.sqrt.default: torch.sqrt,
    aten.rsqrt.default: torch.rsqrt,
    aten.reciprocal.default: torch.reciprocal,
    aten.sigmoid.default: torch.sigmoid,
    aten.tanh.default: torch.tanh,
    aten.exp.default: torch.exp,
    aten.log.default: torch.log,
    aten.sin.default: torch.sin,
    aten.cos.default: torch.cos,
    aten.clamp.default: torch.clamp,
    aten.copysign.Tensor: torch.copysign,
    aten.maximum.default: torch.maximum,
    aten.minimum.default: torch.minimum,
    aten.pow.Tensor_Scalar: torch.pow,
    aten.eq.Tensor: torch.eq,
    aten.eq.Scalar: torch.eq,
    aten.ne.Tensor: torch.ne,
    aten.ne.Scalar: torch.ne,
    aten.ge.Tensor: torch.ge,
    aten.gt.Tensor: torch.gt,
    aten.lt.Tensor: torch.lt,
    aten.le.Tensor: torch.le,
    aten.gt.Scalar: torch.gt,
    aten.bitwise_and.Tensor: torch.bitwise_and,
    aten.bitwise_or.Tensor: torch.bitwise_or,
    aten.bitwise_not.default: torch.bitwise_not,
    aten.cat.default: torch.cat,
    aten.sum.dim_IntList: torch.sum,
}
