"""Recording: the operations that torch's own tracer sees, without the imports that it brings."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor, fx
from torch.func import vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves

from scm.packed.program import for_all
from scm.packed.recording import DependsOnValuesError, record

WEIGHT = torch.linspace(-1.0, 1.0, 12).view(4, 3)


def _dense(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    made = torch.relu(x @ w) * torch.tensor([1.0, -2.0, 3.0])
    return made, made.sum(-1).sigmoid()


def _several(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    left, right = (x @ w).split([1, 2], dim=-1)
    largest, where = right.max(dim=-1)
    return left.squeeze(-1) + largest, torch.where(where > 0, largest, torch.zeros_like(largest))


def _with_constants(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    return x @ (w + WEIGHT) + torch.arange(3), (x @ WEIGHT).cumsum(-1)


class Cubed(torch.autograd.Function):
    """An operation with a gradient of its own, as the gradient policies have."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**3

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient * 2.0 * ctx.saved_tensors[0]


def _own_gradient(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    return (Cubed.apply(x @ w).sum(-1),)


def _with_gradients(held: dict[str, Tensor]) -> dict[str, Tensor]:
    (cubes,) = _own_gradient(held["x"], held["w"])
    return {"loss": cubes.mean()}


@pytest.mark.parametrize("function", [_dense, _several, _with_constants, _own_gradient])
def test_a_recording_has_the_operations_and_forms_that_make_fx_finds(function):
    inputs = (torch.randn(7, 5, 4), torch.randn(7, 4, 3))

    def of_all(*tensors: Tensor) -> tuple[Tensor, ...]:
        return vmap(function)(*tensors)

    made, right = record(of_all, inputs), make_fx(of_all)(*inputs)
    assert _operations(made) == _operations(right)
    others = (torch.randn(7, 5, 4), torch.randn(7, 4, 3))
    for found, told in zip(made(*others), vmap(function)(*others), strict=True):
        assert torch.equal(found, told)


def _operations(module: fx.GraphModule) -> list[tuple]:
    """What is called, and the forms of what comes of it."""
    called = [node for node in module.graph.nodes if node.op == "call_function"]
    return [(node.target, *map(_form, tree_leaves(node.meta["val"]))) for node in called]


def _form(value: Tensor) -> tuple:
    return tuple(value.shape), value.dtype, value.stride()


def test_gradients_are_those_of_each_trial_by_itself():
    """One backward pass for all, against ``torch.func``'s of each; a parameter without a part has none."""
    held = {"x": torch.randn(4, 5, 4), "w": torch.randn(4, 4, 3), "idle": torch.randn(4, 2)}
    own = for_all(_with_gradients, {"gradient.w": "w", "gradient.idle": "idle"})(held)
    for trial in range(4):
        one = {name: item[trial] for name, item in held.items()}
        right = torch.func.grad(lambda w, one=one: _with_gradients({**one, "w": w})["loss"])(one["w"])
        torch.testing.assert_close(own["gradient.w"][trial], right)
    assert torch.equal(own["gradient.idle"], torch.zeros(4, 2))
    assert not any(item.requires_grad for item in own.values())


def test_a_recording_keeps_no_memory_of_what_it_saw():
    made = record(lambda x: ((x * 2).cos(),), (torch.randn(1000),))
    assert all(node.meta["val"].is_meta for node in made.graph.nodes if node.op != "output")
    assert all(node.meta["device"] == torch.device("cpu") for node in made.graph.nodes if node.op != "output")


def test_what_inputs_decide_cannot_be_asked_for_and_what_they_do_not_can():
    x = torch.randn(3)
    with pytest.raises(DependsOnValuesError):
        record(lambda x: (x * x.sum().item(),), (x,))
    with pytest.raises(DependsOnValuesError):
        record(lambda x: (x * torch.rand(()).item(),), (x,))
    made = record(lambda x: (x * torch.tensor(2.5).item(),), (x,))
    assert torch.equal(made(x)[0], x * 2.5)


def test_an_output_may_be_an_input_or_a_constant():
    held = torch.ones(2)
    made = record(lambda x: (x, held), (torch.zeros(2),))
    x = torch.randn(2)
    assert torch.equal(made(x)[0], x)
    assert torch.equal(made(x)[1], held)


IMPORTS = """
import sys, torch
from torch import nn
from scm.packed.program import Known, trace_program
def step(held):
    return {"loss": (torch.tanh(held["x"] @ held["w"]) - 1.0).square().mean()}
held = {"x": torch.randn(6, 5, 4), "w": torch.randn(6, 4, 3)}
gradients = {"gradient.w": "w"}
trace_program(step, held, {"x": Known.BATCH, "w": Known.PLACE}, gradients=gradients, joined=gradients)
print(*[name for name in ("torch._dynamo", "torch._inductor", "sympy") if name in sys.modules])
"""


def test_to_trace_imports_no_compiler():
    """A second of every worker's start, and more memory than a small sweep needs."""
    ran = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == []


def test_what_is_written_into_a_tensor_of_its_own_is_recorded_as_made_anew() -> None:
    """The graph writes nowhere, so that it can be run for many trials, and gives what the function gives."""

    def function(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        made = x @ w
        before = made + 1.0
        made.masked_fill_(made < 0, 0.5).mul_(2.0)
        return made, before

    given = (torch.linspace(-2.0, 2.0, 8).view(2, 4), WEIGHT)
    graph = record(function, given)
    targets = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    assert not any(target._schema.is_mutable for target in targets)
    for one, other in zip(graph(*given), function(*given), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "function",
    [lambda x, w: (x.mul_(2.0) @ w,), lambda x, w: ((made := x @ w), made.view(-1).add_(1.0))],
    ids=["an input", "memory of another"],
)
def test_what_is_written_into_the_tensors_of_others_is_recorded_as_it_is(function) -> None:
    """Made anew, the other would not see it: such a function is left to be refused."""
    graph = record(function, (torch.ones(2, 4), WEIGHT))
    targets = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    assert any(target._schema.is_mutable for target in targets)
