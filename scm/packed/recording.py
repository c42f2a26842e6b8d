"""What a function does to tensors, recorded as a graph of operations while it runs once.

``torch.fx.experimental.proxy_tensor.make_fx`` records the same; it imports the compiler, a second in every
process, and makes a fake tensor for each operation. Which functions are recorded, and what becomes of a
graph, is decided in `program`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary


class DependsOnValuesError(RuntimeError):
    """The function asked for the value of a tensor that its inputs decide."""


def record(function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor]) -> fx.GraphModule:
    """Call a function of tensors, and return what it did: operations of ``torch.ops.aten``, constants held.

    Every node knows the form of its value (`describe`). Raises DependsOnValuesError, and what the function
    raises.
    """
    recorder = _Recorder()
    for number, item in enumerate(inputs):
        recorder.input(f"input_{number}", item)
    with recorder:
        made = function(*inputs)
    recorder.graph.output(tuple(recorder.node_of(item) for item in made))
    return fx.GraphModule(recorder.constants, recorder.graph)


def describe(node: fx.Node, value: Any) -> None:
    """Note of a node the form of its value, as tensors without memory, and where it lies."""
    tensors = [item for item in tree_leaves(value) if isinstance(item, Tensor)]
    node.meta["val"] = tree_map_only(Tensor, _without_memory, value)
    node.meta["device"] = tensors[0].device if tensors else None


def _without_memory(value: Tensor) -> Tensor:
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


class _Recorder(TorchDispatchMode):
    """Appends every operation to a graph, and computes it as well."""

    def __init__(self) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.constants = nn.Module()
        self._nodes = WeakTensorKeyDictionary()
        self._given: set[fx.Node] = set()  # what depends on an input, or on chance

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: nothing here is compiled, and to tell the compiler so would import it."""
        return False

    def input(self, name: str, value: Tensor) -> None:
        """Take a tensor as an input of the graph."""
        node = self.graph.placeholder(name)
        describe(node, value)
        self._nodes[value] = node
        self._given.add(node)

    def node_of(self, value: Tensor) -> fx.Node:
        """Return the node of a tensor; one that was not made here is a constant."""
        node: fx.Node | None = self._nodes.get(value)
        if node is None:
            name = f"held_{len(list(self.constants.buffers()))}"
            self.constants.register_buffer(name, value)
            node = self.graph.get_attr(name)
            describe(node, value)
            self._nodes[value] = node
        return node

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        # What is made of a number (`torch.tensor(2.0)`) comes by itself, and belongs to nobody else.
        if func is torch.ops.aten.lift_fresh.default:
            func = torch.ops.aten.lift_fresh_copy.default
        nodes = tree_map(self._told, (args, kwargs))
        sources = [item for item in tree_leaves(nodes) if isinstance(item, fx.Node)]
        given = any(item in self._given for item in sources)
        if torch.Tag.data_dependent_output in func.tags:
            if given:
                raise DependsOnValuesError(str(func))
            return func(*args, **kwargs)
        made = func(*args, **kwargs)
        node = self.graph.call_function(self._pure(func, args), *nodes)
        describe(node, made)
        self._keep(made, node, given or torch.Tag.nondeterministic_seeded in func.tags)
        return made

    def _pure(self, func: torch._ops.OpOverload, args: tuple[Any, ...]) -> torch._ops.OpOverload:
        """The operation that gives anew what this one writes into a tensor of the function's own.

        Backward passes write so into what they have just made (that of a norm does). What is written into an
        input, a constant, or memory that another tensor sees as well, stays what it is.
        """
        name, target = func.overloadpacket._qualified_op_name, args[0] if args else None
        if not func._schema.is_mutable or not name.endswith("_") or not isinstance(target, Tensor):
            return func
        packet = getattr(torch.ops.aten, name.removesuffix("_").removeprefix("aten::"), None)
        pure: torch._ops.OpOverload | None = getattr(packet, func._overloadname, None)
        written = self._nodes.get(target)
        own = written is not None and written.op == "call_function"
        if pure is None or not own or self._is_seen_elsewhere(target):
            return func
        return pure

    def _is_seen_elsewhere(self, target: Tensor) -> bool:
        memory = target.untyped_storage().data_ptr()
        return any(
            other is not target and other.untyped_storage().data_ptr() == memory for other in self._nodes
        )

    def _told(self, item: Any) -> Any:
        return self.node_of(item) if isinstance(item, Tensor) else item

    def _keep(self, made: Any, node: fx.Node, given: bool) -> None:
        """Remember whose value is whose; of several, by their place."""
        if given:
            self._given.add(node)
        if isinstance(made, Tensor):
            self._nodes[made] = node
        elif isinstance(made, (list, tuple)):
            for place, item in enumerate(made):
                part = self.graph.call_function(operator.getitem, (node, place))
                describe(part, item)
                self._keep(item, part, given)
