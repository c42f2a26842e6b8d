"""Steps that run as machine code on the CPU: which threads compute which trials, and where their numbers lie.

What is computed is a traced graph's (`lowering`); how text becomes machine code is decided in `toolchain`.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx

from scm.packed.lowering import lower_graph
from scm.packed.places import Form
from scm.packed.toolchain import load_library
from scm.packed.words import LoweringError

Step = Callable[[int, int, Any, Any, int], None]


class NativeGraph:
    """A graph of many trials as machine code, made for the way in which its inputs lie when they are known.

    lanes: the number of trials that it was traced with; outputs and joined: places among its results of what
    a call returns, and of what it writes side by side into a matrix. Raises LoweringError for a graph that
    cannot be written as C; ToolchainError where nothing is compiled.
    """

    def __init__(
        self,
        graph: fx.Graph,
        constant: Callable[[str], Any],
        lanes: int,
        outputs: Sequence[int],
        joined: Sequence[int],
    ) -> None:
        self._graph, self._constant, self._lanes = graph, constant, lanes
        self._joined = tuple(joined)
        nodes = list(graph.nodes)
        results = nodes[-1].args[0]
        metas = [results[place].meta["val"] for place in outputs]
        self._outputs = [(tuple(value.shape[1:]), value.dtype) for value in metas]
        self._made: dict[tuple[Form, ...], tuple[Step, int]] = {}

    def step_for(self, inputs: Sequence[Tensor]) -> tuple[Step, int]:
        """Return the function of inputs that lie like these, and the bytes that each thread lends it."""
        forms = tuple(Form.of(item) for item in inputs)
        if forms not in self._made:
            if any(item.device.type != "cpu" for item in inputs):
                raise LoweringError("inputs that are not on the CPU")
            lowered = lower_graph(self._graph, self._constant, self._lanes, forms, self._joined)
            function = load_library(lowered.text).step
            function.argtypes = (ctypes.c_long, ctypes.c_long, *[ctypes.c_void_p] * 3)
            function.restype = None
            self._made[forms] = (function, lowered.scratch)
        return self._made[forms]

    def outputs_for(self, lanes: int) -> list[Tensor]:
        """Return memory for what a call returns."""
        return [torch.empty((lanes, *shape), dtype=dtype) for shape, dtype in self._outputs]

    def bind(self, lanes: int, told: Sequence[Tensor], into: Tensor | None) -> NativeBound:
        """Take what is known of `lanes` trials before the step, and the matrix."""
        return NativeBound(self, lanes, told, into)


class NativeBound:
    """A native graph of some trials, called with what only the step knows and what was known of the batch.

    means: after a call, one number a trial, finite where its row of the matrix is; None without a matrix.
    """

    means: Tensor | None = None

    def __init__(self, graph: NativeGraph, lanes: int, told: Sequence[Tensor], into: Tensor | None) -> None:
        self._graph, self._lanes = graph, lanes
        # Their memory must live as long as this. Multiples of the number of trials are among them.
        self._told = [item for item in told if isinstance(item, Tensor)]
        self._into = [] if into is None else [into]
        if into is not None:
            self.means = torch.empty(lanes, dtype=into.dtype)
            self._into.append(self.means)
        self._step: Step | None = None
        self._shares = row_shares(lanes)

    def __call__(self, states: Sequence[Tensor], batch: Sequence[Tensor]) -> tuple[Tensor, ...]:
        given = [*states, *batch]
        if self._step is None:
            self._prepare(given)
        made = self._graph.outputs_for(self._lanes)
        at, place = self._at, len(given)
        for number, item in enumerate(given):
            at[number] = item.data_ptr()
        for number, item in enumerate(made, start=place + len(self._told)):
            at[number] = item.data_ptr()
        run_shares(self._step, self._shares, at, self._by, self._scratch)
        return tuple(made)

    def _prepare(self, given: Sequence[Tensor]) -> None:
        inputs = [*given, *self._told]
        self._step, size = self._graph.step_for(inputs)
        every = [*inputs, *self._graph.outputs_for(self._lanes), *self._into]
        self._at = (ctypes.c_void_p * len(every))(*(item.data_ptr() for item in every))
        self._by = (ctypes.c_long * len(every))(*(item.stride(0) * item.element_size() for item in every))
        # One piece of memory a thread, each beginning with a line of the cache.
        self._memory = torch.empty(len(self._shares) * (size + 64) + 64, dtype=torch.uint8)
        begin = -(-self._memory.data_ptr() // 64) * 64
        self._scratch = [begin + number * (-(-size // 64) * 64) for number in range(len(self._shares))]


def row_shares(lanes: int) -> list[tuple[int, int]]:
    """Part rows, one a trial, among torch's threads."""
    threads = max(1, min(torch.get_num_threads(), lanes // 4))
    ends = [lanes * number // threads for number in range(threads + 1)]
    return list(itertools.pairwise(ends))


def run_shares(
    step: Any, shares: Sequence[tuple[int, int]], at: Any, by: Any, scratch: Sequence[int]
) -> None:
    """Call a function for the trials of each share, all but the first in other threads."""
    if len(shares) == 1:
        step(*shares[0], at, by, scratch[0])
        return
    pool = _pool(len(shares) - 1)
    others = [
        pool.submit(step, first, last, at, by, room)
        for (first, last), room in zip(shares[1:], scratch[1:], strict=True)
    ]
    step(*shares[0], at, by, scratch[0])
    for other in others:
        other.result()


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="pack")
