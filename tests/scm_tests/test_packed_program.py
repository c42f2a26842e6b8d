"""Programs: the very values of the traced function, for any number of trials, or a reason."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.nn import functional

from scm.packed.program import Known, ProgramError, trace_program


def convolutional() -> nn.Module:
    """A model whose batched form counts trials in more places than the first."""
    return nn.Sequential(
        nn.Conv1d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 5), nn.LayerNorm(5), nn.Linear(5, 1)
    ).double()


def dense() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1)
    ).double()


def training_step(model: nn.Module):
    """A trial's step: parameters, batch, a number of its own -> loss and gradients."""

    def step(held: Mapping[str, Tensor]) -> dict[str, Tensor]:
        parameters = {name: held[name] for name, _ in model.named_parameters()}

        def objective(parameters: dict[str, Tensor]) -> Tensor:
            answer = functional_call(model, parameters, (held["inputs"],)).squeeze(-1)
            cost = functional.smooth_l1_loss(answer, held["targets"].log1p())
            return cost + held["weight"] * answer.square().mean()

        gradients, loss = grad_and_value(objective)(parameters)
        return {"loss": loss, **{f"gradient.{name}": item for name, item in gradients.items()}}

    return step


def arguments(model: nn.Module, lanes: int, seed: int = 0) -> dict[str, Tensor]:
    source = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(lanes, *shape, generator=source, dtype=torch.float64)

    held = {name: draw(*item.shape) * 0.4 for name, item in model.named_parameters()}
    return {**held, "inputs": draw(4, 2, 6), "targets": draw(4).abs(), "weight": draw().abs()}


def known_of(model: nn.Module) -> dict[str, Known]:
    when = {name: Known.PLACE for name, _ in model.named_parameters()}
    return {**when, "inputs": Known.BATCH, "targets": Known.BATCH, "weight": Known.PACK}


def traced(model: nn.Module, **options):
    names = [name for name, _ in model.named_parameters()]
    joined = {f"gradient.{name}": name for name in names}
    return trace_program(training_step(model), arguments(model, 6), known_of(model), joined=joined, **options)


@pytest.mark.parametrize("lanes", [1, 2, 3, 11, 97])
@pytest.mark.parametrize("make", [dense, convolutional])
def test_a_program_gives_what_vmap_gives_for_any_number_of_trials(make, lanes):
    model = make()
    held = arguments(model, lanes, seed=lanes)
    found = traced(model).run(held)
    right = vmap(training_step(model))(held)
    assert found.keys() == right.keys()
    for name, item in right.items():
        torch.testing.assert_close(found[name], item, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("in_place", [True, False], ids=["memory planned", "memory not planned"])
def test_steps_leave_inputs_and_earlier_results_alone(in_place):
    """Memory is used again from call to call, but never an input's, nor that of a result."""
    model = dense()
    program = traced(model, in_place=in_place)
    held = arguments(model, 5)
    before = {name: item.clone() for name, item in held.items()}
    batches = {name: held[name].unsqueeze(0) for name in ("inputs", "targets")}
    ahead = program.prepare_batches({**held, **batches}, 5, 1)[0]
    width = sum(item[0].numel() for name, item in held.items() if name in dict(model.named_parameters()))
    into = torch.empty(5, width, dtype=torch.float64)
    bound = program.bind(5, held, into)
    (first,) = bound((), ahead)
    kept, gradients = first.clone(), into.clone()
    for _ in range(3):
        (again,) = bound((), ahead)
        assert torch.equal(first, kept)
        assert torch.equal(again, first)
        assert torch.equal(into, gradients)
    assert all(torch.equal(held[name], item) for name, item in before.items())


def test_what_lies_in_its_place_is_read_anew_in_every_step():
    """Weights change in place between steps; what was prepared of them shows that."""
    model = dense()
    program = traced(model)
    held = arguments(model, 3)
    width = sum(item.numel() for item in model.parameters())
    into = torch.empty(3, width, dtype=torch.float64)
    bound = program.bind(3, held, into)
    batches = {name: held[name].unsqueeze(0) for name in ("inputs", "targets")}
    ahead = program.prepare_batches({**held, **batches}, 3, 1)[0]
    for name, _ in model.named_parameters():
        held[name].mul_(0.5)
    (loss,) = bound((), ahead)
    right = vmap(training_step(model))(held)
    torch.testing.assert_close(loss, right["loss"], rtol=1e-12, atol=1e-14)


def test_many_steps_are_prepared_at_once():
    """What depends on the batch alone is computed for all steps together, and each step gets its own."""
    model = dense()
    program = traced(model)
    steps = [arguments(model, 4, seed=seed) for seed in range(3)]
    held = dict(steps[0])
    for name in ("inputs", "targets"):
        held[name] = torch.stack([own[name] for own in steps])
    prepared = program.prepare_batches(held, 4, 3)
    into = torch.empty(4, sum(item.numel() for item in model.parameters()), dtype=torch.float64)
    bound = program.bind(4, held, into)
    for own, ahead in zip(steps, prepared, strict=True):
        told = {**steps[0], "inputs": own["inputs"], "targets": own["targets"]}
        torch.testing.assert_close(bound((), ahead)[0], vmap(training_step(model))(told)["loss"])


def test_what_is_known_early_is_no_part_of_a_step():
    """The logarithm of the targets, the view of each bias and the transposed weights wait for no step."""
    program = traced(dense())
    names = [str(node.target) for node in program._step_graph.graph.nodes if node.op == "call_function"]
    assert not any("log1p" in name for name in names)
    assert not any("view" in name and "as" not in name for name in names[: len(names) // 3])
    whole = 3 * 2 * 12  # a generous count of what forward and backward of three layers need
    assert program.operations < whole


def _dropout(held: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {"y": functional.dropout(held["x"], 0.5, training=True)}


def _branching(held: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {"y": held["x"] if held["x"].sum() > 0 else -held["x"]}


def _reading(held: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {"y": held["x"] * held["x"].sum().item()}


def _selecting(held: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {"y": held["x"][held["x"] > 0].sum()}


_TOTAL = torch.zeros(())


def _counting(held: Mapping[str, Tensor]) -> dict[str, Tensor]:
    _TOTAL.add_(held["x"].sum())
    return {"y": held["x"]}


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (_dropout, "random numbers"),
        (_branching, "control flow depends on the values"),
        (_reading, "control flow depends on the values"),
        (_selecting, "depends on the values|RuntimeError"),
        (_counting, "in place"),
    ],
)
def test_what_cannot_be_batched_is_said_with_its_reason(function, reason):
    with pytest.raises(ProgramError, match=reason):
        trace_program(function, {"x": torch.randn(6, 3)}, {"x": Known.STEP})


@pytest.mark.parametrize(
    "place", ["vmap", "record", "_check_pure", "simplify", "free_lanes", "Program", "_check_agrees"]
)
def test_whatever_is_raised_while_a_program_is_made_is_a_reason(place, monkeypatch):
    """In every torch another operation may stop another part; the trials then train alone and say why."""

    def stops(*arguments, **options):
        raise AttributeError("torch.ops has no such operation")

    monkeypatch.setattr(f"scm.packed.program.{place}", stops)
    model = dense()
    with pytest.raises(ProgramError, match="AttributeError: torch.ops has no such operation"):
        trace_program(training_step(model), arguments(model, 6), known_of(model))


def test_an_output_that_no_step_changes_is_refused_where_it_should_be_written():
    """A parameter without a part in the loss: torch's optimizers would leave it alone."""
    model = dense()

    def step(held: Mapping[str, Tensor]) -> dict[str, Tensor]:
        made = training_step(model)(held)
        return {**made, "gradient.idle": torch.zeros_like(held["targets"])}

    held, known = arguments(model, 6), known_of(model)
    with pytest.raises(ProgramError, match=r"gradient\.idle"):
        trace_program(step, held, known, joined={"gradient.idle": "targets"})
