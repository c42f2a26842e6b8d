"""What is not finite: found where it arises, kept from the weights, counted; no trace of looking for it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from scm.guards.finite import FINITE_ACTIONS, FiniteGuard, FiniteWatch, Snapshot
from scm.guards.origin import find_origin, named_tensors
from scm.losses.terms import LossTerms
from scm.training.companion import Moment
from scm.training.trainer import SCMTrainer, TrainingConfig

NAN, INF = float("nan"), float("inf")
BATCHES, POISONED = 64, (3, 17, 30, 31, 50)


class Classes(nn.Module):
    """Two layers; `between` is what the second one is given of the first one's outputs."""

    def __init__(self, between: Callable[[Tensor], Tensor] = torch.relu) -> None:
        super().__init__()
        self.first = nn.Linear(2, 16)
        self.between = between
        self.last = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(self.first(x)))


def make_model(between: Callable[[Tensor], Tensor] = torch.relu) -> Classes:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Classes(between)


def make_batches(count: int, poison: float | None) -> list[tuple[Tensor, Tensor]]:
    """Two classes on two sides of a line; one number of each poisoned batch is `poison`."""
    drawn = torch.Generator().manual_seed(1)
    made = []
    for index in range(count):
        x = torch.randn(32, 2, generator=drawn)
        y = (x[:, 0] + 0.5 * x[:, 1] > 0).long()
        if poison is not None and index in POISONED:
            x[5, 1] = poison
        made.append((x, y))
    return made


def accuracy(model: nn.Module) -> float:
    correct = total = 0.0
    for x, y in make_batches(10, None):
        correct += float((model(x).argmax(1) == y).sum())
        total += len(x)
    return correct / total


def rooted(h: Tensor) -> Tensor:
    """A relu; beyond 1000 the backward pass of a root that is not taken divides 0 by 0."""
    near = h.abs() <= 1e3
    root = (near * (h.square() + 1)).sqrt()
    return torch.where(near, torch.relu(h) + 0 * root, torch.relu(h))


def by_hand(
    model: nn.Module, batches: list[tuple[Tensor, Tensor]], *, sanitize: bool = False, check: str = "none"
) -> tuple[int, nn.Module]:
    """A plain loop that skips steps at a loss that is not finite, or none; also how many it skipped."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    skipped = 0
    for x, y in batches:
        logits = model(x)
        loss = functional.cross_entropy(logits.nan_to_num() if sanitize else logits, y)
        optimizer.zero_grad()
        if check == "loss" and not bool(torch.isfinite(loss)):
            skipped += 1
            continue
        loss.backward()
        optimizer.step()
    return skipped, model


def guarded(
    model: nn.Module,
    batches: list[tuple[Tensor, Tensor]],
    *,
    sanitize: bool = False,
    group: int = 1,
    **settings: Any,
) -> FiniteGuard:
    """The same loop around a `FiniteGuard`."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    guard = FiniteGuard(model, optimizer, **settings)

    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        logits = guard.probe(model(x))
        return functional.cross_entropy(logits.nan_to_num() if sanitize else logits, y)

    for index, (x, y) in enumerate(batches):
        guard.backward(loss_of(x, y), again=lambda x=x, y=y: loss_of(x, y))
        if (index + 1) % group == 0:
            guard.step()
        if guard.stopped:
            break
    return guard


def is_finite(model: nn.Module) -> bool:
    return all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


FAR = 1e6  # finite, and far outside of the batches that are not poisoned

# The poison, what stands between the layers, whether the loss is given sanitised logits, what a check of the
# loss alone sees of five bad batches, and where they come from.
FAILURES: dict[str, tuple[float, Callable[[Tensor], Tensor], bool, int, str]] = {
    "a NaN in the inputs": (NAN, torch.relu, False, 5, "inputs of the model; loss term loss"),
    "an infinity in the inputs": (INF, torch.relu, False, 5, "inputs of the model; loss term loss"),
    "a sanitised NaN": (NAN, torch.relu, True, 0, "inputs of the model; gradient of loss term loss"),
    "a NaN in the backward pass alone": (FAR, rooted, False, 0, "backward pass behind module first (Linear)"),
}
BY_FAILURE = pytest.mark.parametrize("failure", FAILURES)


@BY_FAILURE
def test_without_a_guard_weights_are_lost(failure: str) -> None:
    """One bad step, and the model is no better than chance; a check of the loss may see none of five."""
    poison, between, sanitize, seen, _ = FAILURES[failure]
    batches = make_batches(BATCHES, poison)
    _, model = by_hand(make_model(between), batches, sanitize=sanitize)
    assert not is_finite(model)
    assert accuracy(model) < 0.6
    skipped, checked = by_hand(make_model(between), batches, sanitize=sanitize, check="loss")
    if seen:
        assert skipped == seen
    else:  # it sees the first of them only when it is too late
        assert not is_finite(checked)


@BY_FAILURE
@pytest.mark.parametrize("action", ["skip_step", "skip_micro_batch", "roll_back"])
def test_with_the_guard_every_bad_step_is_left_out(failure: str, action: str) -> None:
    """Five of five, nothing else, and the model is as good as one that never met them."""
    poison, between, sanitize, _, origin = FAILURES[failure]
    model = make_model(between)
    guard = guarded(model, make_batches(BATCHES, poison), sanitize=sanitize, action=action)
    assert guard.telemetry()["finite_skipped_steps"] == len(POISONED)
    assert guard.telemetry()["finite_longest_streak"] == 2  # batches 30 and 31
    assert is_finite(model)
    _, clean = by_hand(make_model(between), make_batches(BATCHES, None))
    assert accuracy(clean) > 0.95
    assert accuracy(model) > accuracy(clean) - 0.02
    assert guard.nan_origin.startswith(origin)


@BY_FAILURE
def test_raw_outputs_are_seen_before_they_are_sanitised(failure: str) -> None:
    """A probe of what the model gave counts the batches that a clamp or substitution would hide."""
    poison, between, sanitize, _, _ = FAILURES[failure]
    guard = guarded(make_model(between), make_batches(BATCHES, poison), sanitize=sanitize)
    expected = len(POISONED) if poison != FAR else 0
    # The diagnosis of the first one looks again.
    assert guard.telemetry()["finite_raw_output"] == expected + (1 if expected else 0)


@pytest.mark.parametrize("action", FINITE_ACTIONS)
def test_a_clean_run_is_the_same_with_the_guard(action: str) -> None:
    """To the last bit, groups of micro-batches included."""
    _, plain = by_hand(make_model(), make_batches(BATCHES, None))
    model = make_model()
    guard = guarded(model, make_batches(BATCHES, None), action=action)
    assert same_weights(plain, model)
    assert guard.nan_origin == guard.stop_reason == ""
    assert guard.telemetry()["finite_skipped_steps"] == 0


def test_of_a_group_only_the_bad_micro_batch_is_left_out() -> None:
    """70 micro-batches in groups of 7, five of them bad: 65 of 65 good ones count, in 10 of 10 steps."""
    batches = make_batches(70, NAN)
    guard = guarded(make_model(), batches, group=7, action="skip_micro_batch")
    assert guard.telemetry()["finite_bad_micro_batches"] == 5
    assert guard.telemetry()["finite_skipped_steps"] == 0
    whole = guarded(make_model(), batches, group=7, action="skip_step")
    assert whole.telemetry()["finite_skipped_steps"] == 4  # of 10; two bad ones share a group


def test_what_is_left_of_a_group_trains_as_the_mean_over_it() -> None:
    """The step is that of the group without its bad micro-batch, to the bit."""
    batches = make_batches(7, NAN)
    model, alone = make_model(), make_model()
    guarded(model, batches, group=7, action="skip_micro_batch")
    guarded(alone, [batch for index, batch in enumerate(batches) if index not in POISONED], group=6)
    assert same_weights(model, alone)


# --- limits -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "steps", "reason"),
    [
        ({"action": "stop"}, 1, "1 steps in a row"),
        ({"action": "stop", "streak": 3}, 3, "3 steps in a row"),
        ({"action": "skip_step", "streak": 2}, 2, "2 steps in a row"),
        ({"action": "skip_step", "budget": 3}, 4, "4 steps had a non-finite"),
        ({"action": "skip_micro_batch", "budget": 2}, 3, "3 micro-batches had a non-finite"),
        ({"action": "skip_micro_batch", "streak": 2}, 2, "2 micro-batches in a row"),
        ({"action": "roll_back", "budget": 5}, 6, "6 steps had a non-finite"),
    ],
    ids=lambda value: str(value),
)
def test_limits_end_a_training(settings: dict[str, Any], steps: int, reason: str) -> None:
    """By how many bad ones there were in a row, or in all."""
    batches = [(torch.full((4, 2), NAN), torch.zeros(4, dtype=torch.int64))] * 20
    guard = guarded(make_model(), batches, **settings)
    assert guard.stopped
    assert guard.stop_reason.startswith(reason)
    assert max(guard.watch.skipped_steps, int(guard.telemetry().get("finite_bad_micro_batches", 0))) == steps


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FiniteWatch("skip"), "finite_action must be one of skip_step, .*, got 'skip'"),
        (lambda: FiniteWatch("stop", streak=0), "finite_streak must be >= 1 or None, got streak=0"),
        (lambda: guarded(make_model(), [], budget=-1), "budget must be >= 0, got budget=-1"),
        (
            lambda: guarded(make_model(), [], action="roll_back", snapshot_steps=0),
            "snapshot_steps must be >= 1",
        ),
        (lambda: TrainingConfig(finite_action="none"), "finite_action must be one of"),
        (lambda: TrainingConfig(finite_streak=0), "finite_streak must be >= 1"),
        (lambda: TrainingConfig(snapshot_steps=0), "snapshot_steps must be >= 1"),
    ],
    ids=[
        "action",
        "streak",
        "budget",
        "snapshots",
        "config's action",
        "config's streak",
        "config's snapshots",
    ],
)
def test_settings_out_of_range_are_refused(make: Callable[[], Any], message: str) -> None:
    """By rule, name and value."""
    with pytest.raises(ValueError, match=message):
        make()


# --- where it comes from ----------------------------------------------------------------------------


class Function(nn.Module):
    """A function as a module, so that it has a name."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Spoiled(torch.autograd.Function):
    """A finite value with a gradient that is not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * NAN


def stack_of(function: Callable[[Tensor], Tensor]) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        inner = nn.Sequential(nn.Linear(3, 3), Function(function))
        return nn.Sequential(nn.Linear(2, 3), inner, nn.Linear(3, 1))


def spoiled_weight(model: nn.Sequential) -> None:
    with torch.no_grad():
        model[2].weight[0, 1] = INF


def spread(P: Tensor) -> LossTerms:
    return LossTerms(P.mean(), {"margin": P.square().mean(), "push": P.abs().mean()})


ORIGINS: dict[str, tuple[Any, ...]] = {
    "a weight": (torch.relu, spread, spoiled_weight, False, "parameter", "2.weight"),
    "inputs": (torch.relu, spread, None, True, "inputs", "inputs"),
    "a module": (torch.log, spread, None, False, "module", "1.1"),
    "a module after sanitised inputs": (
        lambda h: h.nan_to_num().log(),
        spread,
        None,
        False,
        "module",
        "1.1",
    ),
    "a term": (
        torch.relu,
        lambda P: LossTerms(P.mean(), {"fine": P.sum(), "margin": P.sum() / 0}),
        None,
        False,
        "term",
        "margin",
    ),
    "a module's gradient": (Spoiled.apply, spread, None, False, "gradient", "1.1"),
    "a where's gradient": (lambda h: rooted(1e6 * h), spread, None, False, "gradient", "1.1"),
    "a term's gradient": (
        torch.relu,
        lambda P: LossTerms(P.mean(), {"fine": P.sum(), "margin": Spoiled.apply(P).mean()}),
        None,
        False,
        "gradient",
        "margin",
    ),
    "nothing": (torch.relu, spread, None, False, "unknown", ""),
}


@pytest.mark.parametrize("case", ORIGINS)
def test_the_first_thing_that_is_not_finite_is_named(case: str) -> None:
    """The innermost module, the term, the inputs or the parameter in which it began; no hook stays behind."""
    function, loss_of, spoil, nan_inputs, kind, name = ORIGINS[case]
    model = stack_of(function)
    if spoil is not None:
        spoil(model)
    x = torch.linspace(-1, 1, 8).reshape(4, 2)
    if nan_inputs:
        x[0, 0] = NAN
    origin = find_origin(model, lambda: loss_of(model(x)))
    assert (origin.kind, origin.name) == (kind, name)
    assert name in str(origin)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_the_text_of_an_origin_names_term_and_parameters() -> None:
    """What was reached is said too: the terms, or the first parameters and how many more."""
    x = torch.ones(4, 2)
    model = stack_of(Spoiled.apply)
    text = str(find_origin(model, lambda: spread(model(x))))
    assert text == (
        "backward pass of module 1.1 (Function); "
        "gradient of loss term task at 0.weight, 0.bias, 1.0.weight and 1 more"
    )
    model = stack_of(torch.log)
    text = str(find_origin(model, lambda: spread(model(-x * 100))))
    assert text.startswith("module 1.1 (Function), from finite inputs; loss term task, margin, push")


def test_outputs_have_names() -> None:
    """P and Q, what a model calls its other outputs, and positions where nothing has a name."""
    one = torch.zeros(1)
    assert [name for name, _ in named_tensors(one)] == ["output"]
    assert [name for name, _ in named_tensors((one, one))] == ["P", "Q"]
    assert [name for name, _ in named_tensors((one, one, {"stop_logits": one}))] == ["P", "Q", "stop_logits"]
    assert [name for name, _ in named_tensors({"a": [one, {"b": one}]})] == ["a.0", "a.1.b"]
    assert [name for name, _ in named_tensors([one] * 4)] == ["0", "1", "2", "3"]


# --- inside of the trainer --------------------------------------------------------------------------


class Tuple(nn.Module):
    """P and Q by way of statistics, of the batch or the row, and dropout; logits by name, NaN where asked."""

    def __init__(self, *, batch_statistics: bool = True) -> None:
        super().__init__()
        self.first = nn.Linear(2, 6)
        self.norm = nn.BatchNorm1d(6) if batch_statistics else nn.LayerNorm(6)
        self.dropout = nn.Dropout(0.2)
        self.last = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Any:
        P, Q, stop = self.last(self.dropout(torch.tanh(self.norm(self.first(x))))).unbind(-1)
        return P, Q, {"stop_logits": torch.where(x[:, 0] == FAR, NAN, stop)[:, None]}


def loss_in_terms(outputs: Any, lifted: Any) -> LossTerms:
    P, Q, named = outputs
    fit = (P - Q * lifted[0]).square().mean()
    return LossTerms(fit, {"stop": 0.01 * named["stop_logits"].nan_to_num().square().mean()})


def tuple_batches(count: int, bad: Mapping[int, float] | None = None) -> list[tuple[Tensor, Tensor]]:
    drawn = torch.Generator().manual_seed(1)
    made = []
    for index in range(count):
        x = torch.randn(8, 2, generator=drawn)
        y = x.sum(1)
        if bad and index in bad:
            x[3, 0] = bad[index]
        made.append((x, y))
    return made


def trainer_of(
    batches: list[Any],
    *companions: Any,
    loss: Any = loss_in_terms,
    batch_statistics: bool = False,
    **fields: Any,
) -> SCMTrainer:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Tuple(batch_statistics=batch_statistics)
    config = TrainingConfig(**{"coverage_threshold": 0.0, "seed": 3, "nonfinite_budget": 20, **fields})
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, fused=True)
    return SCMTrainer(model, optimizer, loss, batches, config=config, companions=companions)


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("action", FINITE_ACTIONS)
def test_a_clean_training_is_the_same_under_every_action(action: str, accumulation: int) -> None:
    """Weights, batch statistics and metrics, to the last bit."""
    fields = {"gradient_accumulation_steps": accumulation, "max_epochs": 2}
    plain = trainer_of(tuple_batches(10), batch_statistics=True, **fields)
    other = trainer_of(tuple_batches(10), finite_action=action, batch_statistics=True, **fields)
    assert plain.fit() == other.fit()
    for one, two in zip(plain.model.state_dict().values(), other.model.state_dict().values(), strict=True):
        assert torch.equal(one, two)
    assert other.nan_origin == ""
    expected = {"finite_skipped_steps", "finite_longest_streak"}
    said = other.telemetry()
    if action == "skip_step":
        assert said == {}
    else:
        assert expected <= set(said)
        assert not any(said.values())


def test_the_trainer_leaves_a_bad_micro_batch_out_of_its_group() -> None:
    """65 of 65 good ones in 10 of 10 steps, where leaving out whole steps takes 6."""
    bad = dict.fromkeys(POISONED, NAN)
    fields = {"gradient_accumulation_steps": 7, "batch_statistics": True}
    trainer = trainer_of(tuple_batches(70, bad), finite_action="skip_micro_batch", **fields)
    trainer.fit()
    assert trainer.optimizer_steps == 10
    assert trainer.telemetry()["finite_bad_micro_batches"] == 5
    assert trainer.nan_counts["loss"] == 5
    assert trainer.status == "completed"
    plain = trainer_of(tuple_batches(70, bad), **fields)
    plain.fit()
    assert plain.optimizer_steps == 6


def test_what_is_left_of_a_trainer_s_group_is_a_mean_over_its_rows() -> None:
    """Rows weigh as without the bad micro-batch, unequal micro-batches included."""

    def loss(outputs: Any, lifted: Any) -> Tensor:
        return (outputs[0] - lifted[0]).square().mean()

    class Line(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor([0.5, -0.5], dtype=torch.float64))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x @ self.w, torch.ones_like(x[:, 0])

    def weights(batches: list[Any], **fields: Any) -> Tensor:
        model = Line()
        config = TrainingConfig(coverage_threshold=0.0, gradient_accumulation_steps=3, **fields)
        SCMTrainer(model, torch.optim.SGD(model.parameters(), lr=0.1), loss, batches, config=config).fit()
        return model.w.detach()

    x = torch.randn(9, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    batches = [(part, part.sum(1)) for part in x.split([4, 2, 3])]
    for bad in range(3):
        spoiled = [(part.clone(), y) for part, y in batches]
        spoiled[bad][0][0, 0] = NAN
        kept = torch.cat([part for index, (part, _) in enumerate(batches) if index != bad])
        expected = weights([(kept, kept.sum(1))])
        torch.testing.assert_close(weights(spoiled, finite_action="skip_micro_batch"), expected)


def test_a_group_of_bad_micro_batches_takes_no_step() -> None:
    """Neither do weights move nor is a step counted; the next group starts afresh."""
    bad = dict.fromkeys((0, 1), NAN)
    fields = {"gradient_accumulation_steps": 2, "finite_action": "skip_micro_batch"}
    trainer = trainer_of(tuple_batches(2, bad), **fields)
    before = copy.deepcopy(list(trainer.model.parameters()))
    trainer.fit()
    assert trainer.optimizer_steps == 0
    pairs = zip(before, trainer.model.parameters(), strict=True)
    assert all(torch.equal(one, two) for one, two in pairs)
    assert trainer.telemetry()["finite_skipped_steps"] == 1
    assert trainer.telemetry()["finite_longest_streak"] == 2


ENDS: list[tuple[dict[str, Any], int, str]] = [
    ({"finite_action": "stop"}, 3, "a step had a non-finite loss or gradient"),
    ({"finite_action": "stop", "finite_streak": 2}, 6, "2 steps in a row had a non-finite loss or gradient"),
    ({"finite_streak": 3}, 7, "3 steps in a row had a non-finite loss or gradient"),
    ({"finite_action": "skip_micro_batch", "nonfinite_budget": 1}, 5, "2 micro-batches had a non-finite"),
    ({"finite_action": "skip_micro_batch", "finite_streak": 2}, 6, "2 micro-batches in a row had"),
    ({"finite_action": "roll_back", "nonfinite_budget": 2}, 6, "3 steps had a non-finite loss or gradient"),
]


@pytest.mark.parametrize(("fields", "step", "reason"), ENDS, ids=lambda value: str(value))
def test_a_training_diverges_at_its_limit(fields: dict[str, Any], step: int, reason: str) -> None:
    """In mid-epoch, with the reason, and with the origin of the first bad step."""
    bad = dict.fromkeys((2, 4, 5, 6), NAN)
    trainer = trainer_of(tuple_batches(12, bad), **fields)
    trainer.fit()
    assert (trainer.status, trainer.global_step) == ("diverged", step)
    assert trainer.stop_reason.startswith(reason)
    assert trainer.nan_origin == "micro-batch 3: inputs of the model; loss term task"
    assert is_finite(trainer.model)


def test_the_default_names_the_origin_too() -> None:
    """Nothing needs to be turned on for a diverged training to say where it began."""
    trainer = trainer_of(tuple_batches(3, {1: NAN}))
    trainer.fit()
    assert trainer.status == "completed"
    assert trainer.nan_origin.startswith("micro-batch 2: inputs of the model")
    assert trainer.telemetry() == {}


def test_looking_for_the_origin_leaves_no_trace() -> None:
    """Weights, statistics, random draws, companions and the loss end as if nobody had looked."""

    class Counts:
        def __init__(self) -> None:
            self.count = 0

        def after_forward(self, moment: Moment) -> None:
            self.count += 1

        def state_dict(self) -> dict[str, Any]:
            return {"count": self.count}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.count = state["count"]

    ended = []
    for looks in (True, False):
        counts = Counts()
        fields = {"finite_action": "roll_back", "finite_streak": 9, "max_epochs": 2}
        trainer = trainer_of(tuple_batches(6, {2: NAN}), counts, **fields)
        if not looks:
            trainer.nan_origin = "known"
        logs = trainer.fit()
        ended.append((logs, trainer.model.state_dict(), counts.count, trainer.telemetry()))
    (logs, state, count, said), (other_logs, other_state, other_count, other_said) = ended
    assert str(logs) == str(other_logs)
    assert (count, said) == (other_count, other_said)
    for one, two in zip(state.values(), other_state.values(), strict=True):
        assert torch.equal(one.nan_to_num(1e9), two.nan_to_num(1e9))


def test_raw_outputs_are_counted_by_name_before_a_companion_replaces_them() -> None:
    """Ten batches, the logits of two are NaN, and what bounds outputs hides it from the loss."""

    class Bound:
        def after_forward(self, moment: Moment) -> None:
            P, Q, named = moment.outputs
            moment.outputs = (P, Q, {"stop_logits": named["stop_logits"].nan_to_num()})

    bad = dict.fromkeys((2, 6), FAR)
    trainer = trainer_of(tuple_batches(10, bad), Bound(), finite_action="skip_micro_batch")
    trainer.fit()
    raw = {name: count for name, count in trainer.telemetry().items() if name.startswith("finite_raw")}
    assert raw == {"finite_raw_P": 0.0, "finite_raw_Q": 0.0, "finite_raw_stop_logits": 2.0}


def test_companions_learn_of_bad_micro_batches_too() -> None:
    """after_backward comes for each of them."""
    seen: list[bool] = []

    class Look:
        def after_backward(self, moment: Moment) -> None:
            assert moment.terms is not None
            seen.append(bool(torch.isfinite(moment.terms.task.detach())))

    trainer_of(tuple_batches(3, {1: NAN}), Look()).fit()
    assert seen == [True, False, True]


# --- without waiting ---------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulation", [1, 2, 5])
def test_flags_that_stay_on_the_device_decide_alike(accumulation: int) -> None:
    """Where the host does not look, the same micro-batches are left out, to the same weights and counts."""
    bad = dict.fromkeys((1, 2, 3, 8), NAN)
    fields = {"finite_action": "skip_micro_batch", "gradient_accumulation_steps": accumulation}
    ended = []
    for waits in (True, False):
        trainer = trainer_of(tuple_batches(12, bad), max_epochs=2, batch_statistics=True, **fields)
        trainer.nan_origin = "known"  # found by the host alone
        assert trainer._gate is not None
        trainer._gate.waits = waits
        trainer.fit()
        ended.append((trainer.model.state_dict(), trainer.telemetry(), trainer.nan_counts, trainer.status))
    (state, *counts), (other_state, *other_counts) = ended
    assert counts == other_counts
    assert counts[0]["finite_bad_micro_batches"] == 8
    assert counts[0]["finite_longest_streak"] == 3
    for one, two in zip(state.values(), other_state.values(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=0)


def test_the_origin_is_looked_for_once_the_host_knows_that_there_is_one() -> None:
    """A bad micro-batch that only the device noticed makes the host look at the next one."""
    trainer = trainer_of(tuple_batches(4, {1: NAN}), max_epochs=2, finite_action="skip_micro_batch")
    assert trainer._gate is not None
    trainer._gate.waits = False
    epochs = trainer.epochs()
    next(epochs)
    assert trainer.nan_origin == ""
    next(epochs)
    assert trainer.nan_origin.startswith("micro-batch 6: inputs of the model")
    assert trainer.telemetry()["finite_bad_micro_batches"] == 2


class Unread:
    """Batches during which nothing may be read back from the device."""

    def __init__(self, batches: list[tuple[Tensor, Tensor]]) -> None:
        self.batches = [(x.cuda(), y.cuda()) for x, y in batches]

    def __iter__(self) -> Any:
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield from self.batches
        finally:
            torch.cuda.set_sync_debug_mode("default")


class Scales:
    """Scales the auxiliaries' gradient, and counts on the device."""

    needs_terms = True
    currency = "gradient"

    def __init__(self) -> None:
        self.seen: Tensor | float = math.nan

    def auxiliary_factor(self, task_norm: Tensor, auxiliary_norm: Tensor) -> Tensor:
        return (task_norm / auxiliary_norm).clamp(max=1.0)

    def after_backward(self, moment: Moment) -> None:
        assert moment.terms is not None
        self.seen = moment.terms.task.detach()

    def telemetry(self) -> dict[str, float]:
        return {"task": float(self.seen)}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("companions", [0, 1])
@pytest.mark.parametrize("action", ["skip_step", "skip_micro_batch"])
def test_nothing_is_read_back_inside_of_an_epoch(action: str, companions: int) -> None:
    """Neither bad micro-batches nor what goes along with a training make the host wait; as on the CPU."""
    bad = dict.fromkeys((1, 2, 3), NAN)
    ended = []
    for device in ("cuda", "cpu"):
        batches = tuple_batches(8, bad)
        trainer = trainer_of(
            Unread(batches) if device == "cuda" else batches,  # type: ignore[arg-type]
            *[Scales()] * companions,
            finite_action=action,
            device=device,
            gradient_accumulation_steps=2,
        )
        trainer.model.dropout.p = 0.0
        trainer.fit()
        ended.append(([item.detach().cpu() for item in trainer.model.parameters()], trainer.nan_counts))
    (weights, counts), (expected, expected_counts) = ended
    assert counts == expected_counts
    for one, two in zip(weights, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_rolling_back_on_a_gpu() -> None:
    """Weights and fused moments return, and the training goes on; where it began is named."""
    bad = dict.fromkeys((8, 9, 10), NAN)
    batches = [(x.cuda(), y.cuda()) for x, y in tuple_batches(14, bad)]
    trainer = trainer_of(
        batches, finite_action="roll_back", snapshot_steps=3, device="cuda", batch_statistics=True
    )
    trainer.fit()
    assert trainer.status == "completed"
    assert trainer.telemetry()["finite_rollbacks"] == 1
    assert trainer.nan_origin.startswith("micro-batch 9: inputs of the model")
    assert is_finite(trainer.model)


# --- going back -------------------------------------------------------------------------------------


def exploding(outputs: Any, lifted: Any, *, global_step: int) -> Tensor:
    """A finite loss and gradient at the twentieth step, of such a size that no later loss is finite."""
    P, Q, _ = outputs
    fit = (P - Q * lifted[0]).square().mean()
    return 1e25 * P.mean() if global_step == 20 else fit


def explosive_trainer(**fields: Any) -> SCMTrainer:
    """Plain descent, which takes the huge step as it is."""
    trainer = trainer_of(tuple_batches(100), loss=exploding, **fields)
    model = trainer.model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.5)
    return SCMTrainer(model, optimizer, exploding, tuple_batches(100), config=trainer.config)


def test_rolling_back_survives_a_step_that_skipping_does_not() -> None:
    """One huge finite step, after which every loss overflows: skipping diverges, going back trains on."""
    lost = explosive_trainer(nonfinite_budget=10)
    lost.fit()
    assert lost.status == "diverged"
    saved = explosive_trainer(nonfinite_budget=10, finite_action="roll_back", snapshot_steps=5)
    logs = saved.fit()
    assert saved.status == "completed"
    assert saved.telemetry()["finite_rollbacks"] == 1
    assert saved.telemetry()["finite_longest_streak"] == 3
    assert sum(log["loss"] for log in logs[-20:]) < 0.5 * sum(log["loss"] for log in logs[:15])
    clean = trainer_of(tuple_batches(100))
    assert logs[-1]["loss"] < clean.fit()[0]["loss"]


@pytest.mark.parametrize("kind", ["adam", "sgd", "rmsprop"])
def test_a_snapshot_holds_weights_buffers_and_moments(kind: str) -> None:
    """All of them are put back to the bit, as they were before the last good step that was due."""
    kinds: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
        "adam": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
        "sgd": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
        "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5),
    }
    model = Tuple()
    optimizer = kinds[kind](model.parameters())
    snapshot = Snapshot(model, optimizer, every=3)
    seen: list[tuple[Any, Any]] = []

    def states() -> tuple[Any, Any]:
        return copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict()["state"])

    for x, y in tuple_batches(9):
        loss = loss_in_terms(model(x), (y, torch.ones_like(y))).total()
        optimizer.zero_grad()
        loss.backward()
        seen.append(states())
        snapshot.before_good_step()
        optimizer.step()

    # Copies were made before the first, the fourth and the seventh step.
    assert snapshot.put_back()
    (weights, moments), (expected, expected_moments) = states(), seen[6]
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
    for index, held in expected_moments.items():
        assert all(torch.equal(moments[index][name], held[name]) for name in held if held[name] is not None)


def test_there_is_nothing_to_return_to_before_a_good_step() -> None:
    """A training whose first steps are bad has lost nothing yet."""
    model = Tuple()
    before = copy.deepcopy(model.state_dict())
    assert not Snapshot(model, torch.optim.SGD(model.parameters())).put_back()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    "fields", [{"finite_action": "skip_micro_batch"}, {"finite_action": "roll_back", "snapshot_steps": 1}]
)
def test_statistics_that_a_bad_batch_spoiled_come_back(fields: dict[str, Any]) -> None:
    """A skipped step leaves NaN in batch statistics, which weights would never show; these mend them."""
    bad = dict.fromkeys((8, 9, 10), NAN)
    skipped = trainer_of(tuple_batches(12, bad), batch_statistics=True)
    skipped.fit()
    assert skipped.stop_reason == "12 parameters are not finite"
    mended = trainer_of(tuple_batches(12, bad), batch_statistics=True, **fields)
    mended.fit()
    assert mended.status == "completed"
    assert is_finite(mended.model)
    assert torch.isfinite(mended.model.norm.running_mean).all()
    assert mended.model.norm.num_batches_tracked == 12 - 3


def test_statistics_come_back_in_any_training() -> None:
    """Also where the model is called twice for a micro-batch, and where it is looked at in between."""
    model = Tuple()
    guard = FiniteGuard(model, torch.optim.SGD(model.parameters(), lr=0.1), action="skip_micro_batch")
    for index, (x, y) in enumerate(tuple_batches(6, {2: NAN, 5: NAN})):
        loss = sum(loss_in_terms(model(part), (y, torch.ones_like(y))).total() for part in (x, -x))
        with torch.no_grad():
            model.eval()(x)
            model.train()
        assert guard.backward(loss, again=lambda x=x, y=y: loss_in_terms(model(x), (y, y)).total()) == (
            index not in (2, 5)
        )
        guard.step()
    assert torch.isfinite(model.norm.running_mean).all()
    assert model.norm.num_batches_tracked == 8


# --- going on ---------------------------------------------------------------------------------------


class InterruptedTrainingError(Exception):
    """The process was killed, so to say."""


@pytest.mark.parametrize("at", range(3, 12))
@pytest.mark.parametrize("action", ["skip_micro_batch", "roll_back"])
def test_an_interrupted_training_goes_on_with_its_guard(action: str, at: int, tmp_path: Path) -> None:
    """Counts, streaks and the copy to return to are in the checkpoint, inside of a group as well."""
    bad = dict.fromkeys((4, 5, 6, 7), NAN)
    fields = {
        "finite_action": action,
        "finite_streak": 2 if action == "roll_back" else None,
        "snapshot_steps": 2,
        "gradient_accumulation_steps": 2,
        "max_epochs": 2,
    }
    whole = trainer_of(tuple_batches(9, bad), **fields)
    whole.fit()

    def interrupt(record: Mapping[str, Any]) -> None:
        if record["step"] == at:
            broken.save_checkpoint(tmp_path / "state.pt")
            raise InterruptedTrainingError

    broken = trainer_of(tuple_batches(9, bad), log_hook=interrupt, **fields)
    with pytest.raises(InterruptedTrainingError):
        broken.fit()
    resumed = trainer_of(tuple_batches(9, bad), **fields)
    resumed.load_checkpoint(tmp_path / "state.pt")
    resumed.fit()
    assert whole.telemetry() == resumed.telemetry()
    assert whole.nan_origin == resumed.nan_origin
    assert whole.nan_counts == resumed.nan_counts
    for one, two in zip(whole.model.state_dict().values(), resumed.model.state_dict().values(), strict=True):
        assert torch.equal(one.nan_to_num(1e9), two.nan_to_num(1e9))
