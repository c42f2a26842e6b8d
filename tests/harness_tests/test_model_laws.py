"""The laws of trained models: all tasks keep them, and each of them can be broken and made small."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness.plan import load_plan
from harness.robustness.model_laws import MODEL_LAWS
from harness.robustness.search import BROKEN, HOLDS, NOT_APPLICABLE, try_property
from scm.data import Split
from scm.training.targets import lift_semantic_targets
from trainables.stressed import StressedModel
from trainables.trained import Trained, train_models

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SHORT = {"max_epochs": 1, "hidden_width": 8}


def table_of(plan: str) -> dict[str, Any]:
    """The task of an example's plan."""
    task = load_plan(EXAMPLES / plan).task
    return {"name": task.name, "params": task.params}


TASKS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dose": ({"name": "dose", "params": {}, "base_dir": "."}, SHORT),
    "rf": ({"name": "rf", "params": {}, "base_dir": "."}, SHORT),
    "rr_ik": ({"name": "rr_ik", "params": {}, "base_dir": "."}, SHORT),
    "grid": (
        {"name": "grid", "params": {"data": "../data/grids.json"}, "base_dir": str(EXAMPLES)},
        SHORT | {"batch_size": 8},
    ),
    "nh4": ({**table_of("nh4.yaml"), "base_dir": str(EXAMPLES)}, SHORT),
    "gbsg2": ({**table_of("gbsg2.yaml"), "base_dir": str(EXAMPLES)}, SHORT),
    "lens": ({"name": "own_task:LensTask", "params": {"rows": 90}, "base_dir": str(EXAMPLES)}, SHORT),
}


def trained(name: str) -> Trained:
    (held,) = train_models(TASKS[name][0], [("a", TASKS[name][1], 0)]).values()
    assert isinstance(held, Trained)
    return held


@pytest.fixture(scope="module")
def lens() -> Trained:
    """A model of the example task, which refuses a third of its rows."""
    held = trained("lens")
    _, Q = StressedModel(held).tuples(held.splits["train"].inputs)
    tau = float(Q.abs().quantile(1 / 3))
    config = {**held.config, "tau_infer": tau, "tau_train_min": tau, "tau_train_max": tau}
    return replace(held, config=config)


@pytest.mark.parametrize("task", sorted(TASKS))
def test_every_task_keeps_every_law(task: str) -> None:
    """On few cases here, on many by the command."""
    subject = StressedModel(trained(task))
    for law in MODEL_LAWS.values():
        found = try_property(law, subject, examples=8)
        assert found.status in (HOLDS, NOT_APPLICABLE), f"{law.name}: {found.message}"


class Wrapped(nn.Module):
    """A model with something done to its inputs or outputs."""

    def __init__(self, model: nn.Module, before: Any = None, after: Any = None) -> None:
        super().__init__()
        self.model, self.before, self.after = model, before, after

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        P, Q = self.model(inputs if self.before is None else self.before(inputs))
        return (P, Q) if self.after is None else self.after(P, Q)


class Altered:
    """A task with some of its methods replaced."""

    def __init__(self, task: Any, **methods: Callable[..., Any]) -> None:
        self._task, self._methods = task, methods

    def __getattr__(self, name: str) -> Any:
        return self._methods.get(name) or getattr(self._task, name)


class Careless(StressedModel):
    """Decoding that refuses nothing."""

    def decode(self, P: Tensor, Q: Tensor, tau: float | None = None) -> tuple[Tensor, Tensor]:
        return P / Q, torch.zeros_like(Q, dtype=torch.bool)


class Inverted(StressedModel):
    """Decoding whose threshold falls where it should grow."""

    def decode(self, P: Tensor, Q: Tensor, tau: float | None = None) -> tuple[Tensor, Tensor]:
        return super().decode(P, Q, None if tau is None else self.config.tau_infer**2 / tau)


def with_model(held: Trained, **what: Any) -> StressedModel:
    return StressedModel(replace(held, model=Wrapped(held.model, **what)))


def with_task(held: Trained, **methods: Callable[..., Any]) -> StressedModel:
    return StressedModel(replace(held, task=Altered(held.task, **methods)))


def with_splits(held: Trained, **splits: Split) -> StressedModel:
    return StressedModel(replace(held, splits={**held.splits, **splits}))


def reads_payload(held: Trained) -> StressedModel:
    def metrics(decoded: Any, split: Split, config: Any) -> Mapping[str, float]:
        error = decoded.numerator.abs().mean().item()
        return held.task.metrics(decoded, split, config) | {"charged_error": error}

    return with_task(held, metrics=metrics)


def answers_zero(held: Trained) -> StressedModel:
    def metrics(decoded: Any, split: Split, config: Any) -> Mapping[str, float]:
        every = decoded._replace(
            decoded=decoded.decoded.nan_to_num(nan=0.0), bottom=torch.zeros_like(decoded.bottom)
        )
        return held.task.metrics(every, split, config)

    return with_task(held, metrics=metrics)


def refuses_few(held: Trained) -> StressedModel:
    def metrics(decoded: Any, split: Split, config: Any) -> Mapping[str, float]:
        if bool(decoded.bottom.all()):
            raise ZeroDivisionError("no answers")
        return held.task.metrics(decoded, split, config)

    return with_task(held, metrics=metrics)


def with_label(held: Trained) -> StressedModel:
    val = held.splits["val"]
    label = val.extras["value"].nan_to_num(nan=0.0)[:, None]
    inputs = torch.cat([val.inputs[:, :1], 3.0 * label + 1.0], dim=1)
    return with_splits(held, val=Split(inputs, val.targets, val.extras))


def with_status(held: Trained) -> StressedModel:
    val = held.splits["val"]
    status = torch.arange(len(val)) % 2  # codes of finite and bottom
    targets = lift_semantic_targets(val.extras["value"].nan_to_num(nan=1.0), status)
    inputs = torch.cat([val.inputs[:, :1], 2.0 + 3.0 * status[:, None]], dim=1)
    return with_splits(held, val=Split(inputs, targets, {**val.extras, "status": status}))


def rewards_garbage(held: Trained) -> StressedModel:
    def metrics(decoded: Any, split: Split, config: Any) -> Mapping[str, float]:
        found = held.task.metrics(decoded, split, config)
        return found | {"charged_error": 1.0 / (1.0 + found["charged_error"])}

    return with_task(held, metrics=metrics)


def charges_nothing(held: Trained) -> StressedModel:
    def metrics(decoded: Any, split: Split, config: Any) -> Mapping[str, float]:
        found = held.task.metrics(decoded, split, config)
        return found | {"charged_error": found["accepted_error"]}

    return with_task(held, metrics=metrics)


def drawn_anew(held: Trained) -> StressedModel:
    calls = iter(range(100, 200))
    return with_task(held, splits=lambda seed: held.task.splits(next(calls)))


def no_sums(P: Tensor, Q: Tensor) -> tuple[Tensor, Tensor]:
    return P - P.mean(), Q


def noise(P: Tensor, Q: Tensor) -> tuple[Tensor, Tensor]:
    return P + torch.rand_like(P), Q


PLANTED: dict[str, Callable[[Trained], StressedModel]] = {
    "answers_are_finite_or_bottom": Careless,
    "nan_inputs_are_bottom": lambda held: with_model(held, before=lambda x: x.nan_to_num(nan=1.0)),
    "batches_do_not_matter": lambda held: with_model(held, after=no_sums),
    "asked_twice_answers_the_same": lambda held: with_model(held, after=noise),
    "bottoms_grow_with_tau": Inverted,
    "other_precisions_stay_finite": lambda held: Careless(
        replace(held, model=Wrapped(held.model, after=lambda P, Q: (1e6 * P, Q)))
    ),
    "own_decode_is_strict": lambda held: with_task(
        held, decode=lambda P, Q, tau: (P / Q, Q.abs() >= tau / 2)
    ),
    "loss_is_finite": lambda held: with_task(
        held,
        make_loss=lambda config: lambda outputs, lifted: (outputs[0] / outputs[1] - lifted[0]).abs().mean(),
    ),
    "metrics_are_total": refuses_few,
    "metrics_ignore_bottoms": reads_payload,
    "refusing_all_is_seen": answers_zero,
    "right_answers_score_best": rewards_garbage,
    "splits_are_disjoint": lambda held: with_splits(held, test=held.splits["train"]),
    "labels_are_no_inputs": with_label,
    "splits_repeat": drawn_anew,
}


def test_a_bug_is_planted_for_every_law() -> None:
    """No law is without a proof that it can fail."""
    assert set(PLANTED) == set(MODEL_LAWS)


@pytest.mark.parametrize("law", sorted(PLANTED))
def test_each_law_finds_its_bug_in_few_rows(law: str, lens: Trained) -> None:
    """What breaks it is found within the smallest profile, and shrunk to at most two rows."""
    found = try_property(MODEL_LAWS[law], PLANTED[law](lens), examples=60)
    assert found.status == BROKEN, found.message
    assert found.case is not None
    rows = [len(value) for value in found.case.values() if isinstance(value, Tensor)]
    # Rows at the threshold may change sides with the size of their batch, and then need company.
    assert max(rows, default=0) <= (3 if law == "bottoms_grow_with_tau" else 2)


@pytest.mark.parametrize(
    ("law", "plant", "message"),
    [
        (
            "splits_are_disjoint",
            lambda held: with_splits(held, test=held.splits["val"]),
            "got row 0 of val again as row 0 of test",
        ),
        ("labels_are_no_inputs", with_status, "got input 1 whether there is a bottom at target"),
        ("metrics_are_total", charges_nothing, "charged_error must be a number"),
    ],
)
def test_other_ways_to_break_a_law_are_found(
    law: str, plant: Callable[[Trained], StressedModel], message: str, lens: Trained
) -> None:
    """A leak between val and test, the status among the inputs, abstentions that are charged nothing."""
    found = try_property(MODEL_LAWS[law], plant(lens), examples=60)
    assert found.status == BROKEN
    assert message in found.message
    assert found.case is not None
    assert max(len(value) for value in found.case.values() if isinstance(value, Tensor)) <= 2


def test_rows_at_the_threshold_lie_on_both_sides_of_it(lens: Trained) -> None:
    """Bisection ends where one more unit in the last place changes the verdict."""
    subject = StressedModel(lens)
    answered = subject.answer(subject.edge_rows)
    assert 0 < int(answered.bottom.sum()) < len(answered.bottom)
    assert float((answered.Q.abs() - subject.tau_infer).abs().max()) < 1e-5
    assert not math.isnan(float(answered.Q.sum()))
