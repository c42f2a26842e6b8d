"""Steps as machine code: the values of the graph, whatever it is made of and however its inputs lie."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from scm.data import Split
from scm.models import make_model
from scm.packed import PackedTrainer, PackTrial, row_kernels, toolchain
from scm.packed.optimizers import PackOptimizer, Way
from scm.packed.program import Known, trace_program
from scm.packed.toolchain import ToolchainError, has_compiler, load_library
from scm.packed.words import LoweringError
from scm.training.targets import lift_semantic_targets
from scm.trial_config import TrialConfig

pytestmark = pytest.mark.skipif(not has_compiler(), reason="there is no C compiler")

SPECIAL = [0.0, -0.0, 1.0, -2.5, 3.5, math.inf, -math.inf, math.nan, 1e-310, 0.5, -0.5, 7.25]


def as_both(function, held: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Run a function of one trial as machine code, and under vmap."""
    program = trace_program(function, held, dict.fromkeys(held, Known.STEP), in_place=False)
    return program.native().run(held), vmap(function)(held)


def assert_same(found: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> None:
    assert found.keys() == right.keys()
    for name, item in right.items():
        torch.testing.assert_close(found[name], item, rtol=1e-12, atol=1e-14, equal_nan=True)


POINTWISE = {
    "sums and products": lambda x, y: x * y + (x - 2 * y) / 3 - torch.add(x, y, alpha=-2),
    "relu": lambda x, y: torch.relu(x),
    "clamps": lambda x, y: x.clamp(-1, 2) + y.clamp(min=0) + x.clamp(max=0.25),
    "clamp to values": lambda x, y: torch.clamp(x, min=y, max=y + 1),
    "larger and smaller": lambda x, y: torch.maximum(x, y) + 3 * torch.minimum(x, y),
    "where": lambda x, y: torch.where(x > y, x, torch.where(x.isnan(), y, -1.0)),
    "powers": lambda x, y: x**2 + x**3 + (y.abs() + 1) ** 0.5 + (y.abs() + 1) ** 1.7,
    "roots": lambda x, y: x.abs().sqrt() + (y.abs() + 1).rsqrt() + (y.abs() + 1).reciprocal(),
    "exponentials": lambda x, y: x.sigmoid() + x.clamp(-3, 3).exp() + y.clamp(0, 3).log1p() + x.tanh(),
    "angles": lambda x, y: x.clamp(-9, 9).sin() + y.clamp(-9, 9).cos() + torch.atan2(x, y),
    "signs": lambda x, y: torch.copysign(x, y) + x.sign().nan_to_num(),
    "comparisons": lambda x, y: ((x <= y) & (x != 0)).double() + ((x == y) | ~(y >= 1)).double(),
    "what is finite": lambda x, y: x.isfinite().double() + y.isinf().double() * 2 + x.isnan().double() * 4,
    "replacements": lambda x, y: x.nan_to_num(nan=2.0, posinf=1.0, neginf=-1.0) + y.nan_to_num(nan=0.5),
    "remainders": lambda x, y: torch.remainder(x.clamp(-8, 8), 3.0),
    "other dtypes": lambda x, y: (x.float() * 2).double() + (y > 0).to(torch.int64).double(),
}


@pytest.mark.parametrize("rows", [1, 5, 16, 23])
@pytest.mark.parametrize("name", POINTWISE)
def test_each_operation_says_what_torch_says_also_of_what_is_no_number(name, rows):
    source = torch.Generator().manual_seed(rows)

    def draw() -> Tensor:
        return torch.tensor(SPECIAL)[torch.randint(len(SPECIAL), (6, rows), generator=source)].double()

    held = {"x": draw(), "y": draw()}
    assert_same(*as_both(lambda held: {"z": POINTWISE[name](held["x"], held["y"])}, held))


SHAPES = {
    "sums": lambda x: (x.sum(0), x.sum(1, keepdim=True), x.sum(), x.t().sum(0), x.mean(0), x.mean()),
    "largest": lambda x: (x.max(0).values, x.max(1, keepdim=True).values * 2, x.max(-1)[0]),
    "parts": lambda x: (x[1], x[:, 2:4] * 2, x[..., None].squeeze(-1), x.unbind(1)[0]),
    "splits": lambda x: tuple(part * 2 for part in x.split(3, dim=1)),
    "joined": lambda x: (torch.cat([x, x.sin()], dim=1), torch.stack([x, 2 * x], dim=1), torch.cat([x, x])),
    "seen otherwise": lambda x: (x.t().reshape(-1), x.reshape(-1, 2), x.flatten().reshape(x.shape).t() * 3),
    "spread": lambda x: (x + x.sum(0), x * x.sum(1, keepdim=True), x.sum(0).expand(3, -1) + 1),
    "constants": lambda x: (x + torch.ones_like(x), x.new_full((2,), 3.0) * x[0, 0], x * torch.zeros_like(x)),
    "products": lambda x: (
        x @ x.t(),
        x.t() @ x,
        x @ x[:3].t(),
        x[:2] @ x.t(),
        x[:1] @ x.t(),
        x[:1] @ x[1:2].t(),
    ),
}


@pytest.mark.parametrize("shape", [(6, 6), (18, 16), (6, 40), (33, 6)])
@pytest.mark.parametrize("name", SHAPES)
def test_however_values_lie_each_is_read_where_it_is(name, shape):
    source = torch.Generator().manual_seed(3)
    held = {"x": torch.randn(6, *shape, generator=source, dtype=torch.float64)}

    def function(held: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {str(number): item.clone() for number, item in enumerate(SHAPES[name](held["x"]))}

    assert_same(*as_both(function, held))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("rows", "widths"), [(32, (5, 64, 64, 2)), (7, (3, 10, 1)), (17, (20, 16, 33, 3))])
def test_layers_and_their_gradients_are_those_of_torch(rows, widths, dtype):
    layers = [item for pair in itertools.pairwise(widths) for item in (nn.Linear(*pair), nn.ReLU())]
    model = nn.Sequential(*layers[:-1]).to(dtype)
    names = [name for name, _ in model.named_parameters()]

    def step(held: Mapping[str, Tensor]) -> dict[str, Tensor]:
        def cost(parameters: dict[str, Tensor]) -> Tensor:
            answer = functional_call(model, parameters, (held["inputs"],))
            return (answer - held["y"]).square().mean()

        gradients, loss = grad_and_value(cost)({name: held[name] for name in names})
        return {"loss": loss, **{f"gradient.{name}": item for name, item in gradients.items()}}

    source = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(6, *shape, generator=source, dtype=torch.float64).to(dtype)

    held = {name: draw(*item.shape) * 0.4 for name, item in model.named_parameters()}
    held |= {"inputs": draw(rows, widths[0]), "y": draw(rows, widths[-1])}
    known = dict.fromkeys(names, Known.PLACE) | dict.fromkeys(("inputs", "y"), Known.BATCH)
    joined = {f"gradient.{name}": name for name in names}
    native = trace_program(step, held, known, joined=joined, in_place=False).native()
    found, right = native.run(held), vmap(step)(held)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    for name, item in right.items():
        torch.testing.assert_close(found[name], item, rtol=tolerance, atol=tolerance)
    for trial in range(6):  # no bit depends on who else is there
        alone = native.run({name: item[trial : trial + 1] for name, item in held.items()})
        assert all(torch.equal(alone[name][0], item[trial]) for name, item in found.items())


def test_threads_share_the_trials():
    held = {"x": torch.randn(26, 9, dtype=torch.float64)}
    program = trace_program(
        lambda held: {"y": held["x"].sin() * held["x"].sum()}, held, {"x": Known.STEP}, in_place=False
    ).native()
    before = torch.get_num_threads()
    try:
        made = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            made.append(program.run(held)["y"])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*made)


def test_what_has_no_words_is_refused():
    held = {"x": torch.randn(6, 9)}
    program = trace_program(lambda held: {"y": held["x"].sort().values}, held, {"x": Known.STEP})
    with pytest.raises(LoweringError, match="sort"):
        program.native().run(held)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "rmsprop"])
def test_rows_take_the_steps_that_torch_takes_and_only_those_that_are_taken(optimizer):
    extra = [
        {},
        {"weight_decay": 0.1},
        {"momentum": 0.9},
        {"momentum": 0.8, "nesterov": True, "weight_decay": 0.01},
        {"beta1": 0.5, "beta2": 0.9},
    ]
    configs = [
        TrialConfig(
            optimizer=optimizer, **{k: v for k, v in item.items() if k != "nesterov" or optimizer == "sgd"}
        )
        for item in extra
    ]
    source = torch.Generator().manual_seed(1)
    first = torch.randn(len(configs), 37, generator=source, dtype=torch.float64)
    held = [first.clone(), first.clone()]
    ways = (Way(by_row=False, native=True), Way(by_row=False))
    both = [
        PackOptimizer(own, configs, [{}] * len(configs), way) for own, way in zip(held, ways, strict=True)
    ]
    for number in range(8):
        gradients = torch.randn(len(configs), 37, generator=source, dtype=torch.float64)
        taken = None if number % 3 else torch.arange(len(configs)) % 4 != number % 4
        if taken is not None:
            gradients[~taken] = math.nan
        for own in both:
            own.set_rates([0.01 * (1 + number)] * len(configs))
            own.step(gradients.clone(), taken)
        torch.testing.assert_close(*held, rtol=1e-12, atol=1e-14)
    for config, one, two in zip(configs, *(own.states() for own in both), strict=True):
        looked_at = [name for name in one if name != "velocity" or config.momentum]
        assert_same({name: one[name] for name in looked_at}, {name: two[name] for name in looked_at})


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "rmsprop"])
def test_what_fades_of_a_gradient_that_has_ended_fades_to_zero(optimizer):
    """Subnormal numbers would stay for ever and be slow; no weight feels that they are gone."""
    mix = {"beta1": 0.5, "beta2": 0.7} if optimizer.startswith("adam") else {"momentum": 0.5}
    config = TrialConfig(optimizer=optimizer, **mix)
    ways = (Way(by_row=False, native=True), Way(by_row=False))
    held = [torch.ones(1, 37), torch.ones(1, 37)]
    both = [PackOptimizer(own, [config], [{}], way) for own, way in zip(held, ways, strict=True)]
    for number in range(300):
        gradients = torch.full((1, 37), 1e-2 if number < 3 else 0.0)
        for own in both:
            own.set_rates([0.01])
            own.step(gradients.clone())
    torch.testing.assert_close(*held, rtol=1e-6, atol=0.0)
    for state in both[0].states()[0].values():
        assert bool(((state == 0) | (state.abs() >= torch.finfo(state.dtype).tiny)).all())
    (fading,) = {"first", "velocity"} & both[0].states()[0].keys()
    assert not both[0].states()[0][fading].any()


def test_a_text_is_compiled_once_on_a_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(toolchain, "_folder", lambda: tmp_path)
    text = "int answer(void) { return 41; }\n"
    load_library.cache_clear()
    try:
        assert load_library(text).answer() == 41
        (library,) = tmp_path.glob("*.so")
        made = library.stat().st_mtime_ns
        load_library.cache_clear()
        assert load_library(text).answer() == 41
        assert library.stat().st_mtime_ns == made
        assert [item.name for item in tmp_path.iterdir()] == [library.name]
        with pytest.raises(ToolchainError, match="error"):
            load_library("no C")
        assert [item.name for item in tmp_path.iterdir()] == [library.name]
    finally:
        load_library.cache_clear()


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="there are no owners of files here")
@pytest.mark.parametrize("mode", [0o777, 0o770, 0o722])
def test_libraries_are_not_taken_from_where_others_can_put_them(tmp_path, monkeypatch, mode):
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(mode)
    monkeypatch.setenv(toolchain.CACHE_VARIABLE, str(shared))
    toolchain._folder.cache_clear()
    load_library.cache_clear()
    try:
        load_library("int one(void) { return 1; }\n")
        assert not list(shared.iterdir())
    finally:
        toolchain._folder.cache_clear()
        load_library.cache_clear()


def test_where_nothing_can_be_compiled_packs_run_all_the_same(monkeypatch):
    def refuse(text: str) -> None:
        raise ToolchainError("there is no compiler")

    monkeypatch.setattr(row_kernels, "load_library", refuse)
    targets = lift_semantic_targets(torch.randn(8), torch.zeros(8, dtype=torch.int64))
    split = Split(torch.randn(8, 2), targets)
    config = TrialConfig(max_epochs=2, hidden_width=4)
    pack = PackedTrainer(
        [PackTrial(config, 0, "one")], lambda own: make_model(own, 2), lambda _: {"train": split}
    )
    assert [epoch.status for epoch in pack.epochs()] == [["running"], ["completed"]]
    assert not pack.machine_code
