"""Companions of a training: called at their moments, told of by name, kept in checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scm.data import Split
from scm.losses.terms import LossTerms
from scm.losses.training import LossConfig, SCMTrainingLoss
from scm.training.companion import Companions, Moment
from scm.training.loader import TensorBatches
from scm.training.objective import ProjectiveObjective
from scm.training.targets import SemanticTargets, lift_semantic_targets
from scm.training.trainer import SCMTrainer, TrainingConfig
from scm.trial import decode_split

NAN = float("nan")
ROWS, BATCH = 22, 4  # six micro-batches an epoch, the last one short


class Head(nn.Module):
    """P and Q of a hidden layer with dropout, and on demand further outputs by name."""

    def __init__(self, *, named: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(2, 6)
        self.dropout = nn.Dropout(0.2)
        self.last = nn.Linear(6, 3)
        self.named = named

    def forward(self, x: Tensor) -> Any:
        P, Q, stop = self.last(self.dropout(torch.tanh(self.first(x)))).unbind(-1)
        return (P, Q, {"stop_logits": stop[:, None]}) if self.named else (P, Q)


def rows() -> tuple[Tensor, SemanticTargets]:
    """Inputs and targets of every status."""
    drawn = torch.Generator().manual_seed(3)
    x = torch.randn(ROWS, 2, generator=drawn)
    return x, lift_semantic_targets(x.sum(1), torch.arange(ROWS) % 7)


def objective(**config: Any) -> ProjectiveObjective:
    settings: dict[str, Any] = {"coverage_term": "soft", "lambda_push_up": 0.3, "lambda_push_down": 0.2}
    return ProjectiveObjective(SCMTrainingLoss(LossConfig(**{**settings, **config})))


def trainer_with(
    *companions: Any, loss: Any = None, model: nn.Module | None = None, loader: Any = None, **fields: Any
) -> SCMTrainer:
    """A trainer with momentum and thresholds that are drawn; equal arguments give equal trainings."""
    if model is None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = Head()
    x, targets = rows()
    if loader is None:
        loader = TensorBatches(x, targets, BATCH, generator=torch.Generator().manual_seed(5))
    settings: dict[str, Any] = {
        "max_epochs": 2,
        "coverage_threshold": 0.0,
        "tau_train_min": 1e-3,
        "tau_train_max": 0.2,
        "val_loader": [(x, targets)],
        "seed": 4,
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return SCMTrainer(
        model,
        optimizer,
        objective() if loss is None else loss,
        loader,
        config=TrainingConfig(**{**settings, **fields}),
        companions=companions,
    )


def weights_of(trainer: SCMTrainer) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


class Diary:
    """Writes down every moment, and what could be seen at it."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def begin_epoch(self, epoch: int, facts: dict[str, Any]) -> None:
        assert facts["epoch"] == epoch
        self.seen.append("begin_epoch")

    def before_forward(self, moment: Moment) -> None:
        assert moment.outputs is None
        self.seen.append("before_forward")

    def after_forward(self, moment: Moment) -> None:
        assert moment.terms is None
        assert len(moment.outputs) == 2
        self.seen.append("after_forward")

    def after_loss(self, moment: Moment) -> None:
        assert moment.terms is not None
        assert all(parameter.grad is None for parameter in moment.model.parameters())
        self.seen.append("after_loss")

    def after_backward(self, moment: Moment) -> None:
        assert all(parameter.grad is not None for parameter in moment.model.parameters())
        self.seen.append("after_backward")

    def after_epoch(self, report: Any) -> None:
        assert report.val is not None
        self.seen.append("after_epoch")


def test_moments_come_in_order() -> None:
    """Four for each micro-batch, two for each epoch, validation before the last of them."""
    diary = Diary()
    trainer_with(diary).fit()
    steps = ["before_forward", "after_forward", "after_loss", "after_backward"]
    assert diary.seen == (["begin_epoch"] + 6 * steps + ["after_epoch"]) * 2


@pytest.mark.parametrize("companions", [(Diary(),), (object(),)], ids=["looking", "without moments"])
def test_looking_changes_nothing(companions: tuple[Any, ...]) -> None:
    """A companion that only looks leaves the training as it would have been, to the last bit."""
    alone, accompanied = trainer_with(), trainer_with(*companions)
    assert alone.fit() == accompanied.fit()
    assert torch.equal(weights_of(alone), weights_of(accompanied))
    assert alone.val_history == accompanied.val_history


def test_a_training_without_companions_has_no_moments() -> None:
    """What has nothing to say in a step is not asked in it."""
    assert not Companions().in_steps
    assert not Companions([object()]).in_steps
    assert Companions([Diary()]).in_steps


def test_facts_of_an_epoch_reach_loss_and_validation_and_those_of_a_batch_end_with_it() -> None:
    """What begin_epoch sets holds for the epoch; what before_forward sets, for one micro-batch."""
    told: list[tuple[Any, Any]] = []

    class Schedule:
        def begin_epoch(self, epoch: int, facts: dict[str, Any]) -> None:
            facts["hybrid_delta"] = 0.5 + epoch

        def before_forward(self, moment: Moment) -> None:
            if moment.facts["global_step"] == 2:
                moment.facts["loss_weights"] = {"margin": 0.0}

    def loss(outputs: Any, lifted: Any, *, hybrid_delta: Any, loss_weights: Any) -> Tensor:
        told.append((hybrid_delta, loss_weights))
        return (outputs[0] - lifted[0]).square().mean()

    x, _ = rows()
    finite = TensorBatches(x, lift_semantic_targets(x.sum(1), torch.zeros(ROWS, dtype=torch.int64)), BATCH)
    trainer_with(Schedule(), loss=loss, loader=finite, val_loader=list(finite)[:1]).fit()
    assert [delta for delta, _ in told] == [0.5] * 7 + [1.5] * 7
    assert [weights for _, weights in told[:3]] == [None, {"margin": 0.0}, None]


def test_optional_facts_are_none_without_anyone_to_give_them() -> None:
    """A loss may name them in any training; one that takes ``**facts`` is told of them where they are."""
    told: list[dict[str, Any]] = []

    def named(outputs: Any, lifted: Any, *, row_weights: Any, hybrid_delta: Any) -> Tensor:
        told.append({"row_weights": row_weights, "hybrid_delta": hybrid_delta})
        return (outputs[0] - lifted[0]).square().mean()

    def any_of_them(outputs: Any, lifted: Any, **facts: Any) -> Tensor:
        told.append(facts)
        return (outputs[0] - lifted[0]).square().mean()

    x = torch.ones(2, 2)
    for loss in (named, any_of_them):
        trainer_with(loss=loss, loader=[(x, x[:, 0])], val_loader=None, max_epochs=1).fit()
    assert told[0] == {"row_weights": None, "hybrid_delta": None}
    assert not {"row_weights", "hybrid_delta"} & set(told[1])


# --- what a companion may change --------------------------------------------------------------------


def test_replaced_outputs_go_to_the_loss_and_the_records_keep_the_model_s() -> None:
    """What bounds an output cannot hide from the metrics what the model gave."""

    class Bound:
        def after_forward(self, moment: Moment) -> None:
            P, Q = moment.outputs
            moment.outputs = (P.nan_to_num(), Q)

    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return torch.full_like(x[:, 0], NAN), self.w + x[:, 0]

    trainer = trainer_with(Bound(), model=Broken(), val_loader=None, max_epochs=1)
    logs = trainer.fit()
    assert all(log["loss"] == log["loss"] for log in logs)
    assert all(log["coverage"] == 0.0 for log in logs)
    assert trainer.nan_counts["output"] == ROWS


def test_a_term_may_be_added_and_scaled() -> None:
    """Whatever stands in the terms after the last companion is what is trained."""

    class Decay:
        def after_loss(self, moment: Moment) -> None:
            assert moment.terms is not None
            size = sum(parameter.square().sum() for parameter in moment.model.parameters())
            moment.terms.auxiliaries["decay"] = 0.01 * size

    class Twice:
        def after_loss(self, moment: Moment) -> None:
            assert moment.terms is not None
            moment.terms.task = 2 * moment.terms.task

    def loss(outputs: Any, lifted: Any, *, semantic_targets: SemanticTargets) -> Tensor:
        return (outputs[0] - lifted[0]).square()[semantic_targets.mask_trained].mean()

    model = Head().double().eval()
    x, targets = rows()
    x, targets = x.double(), targets.to(dtype=torch.float64)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    model.dropout.p = 0.0
    value = 2 * loss(model(x), (targets.Y_n, targets.Y_d), semantic_targets=targets)
    value = value + 0.01 * sum(parameter.square().sum() for parameter in model.parameters())
    expected = torch.autograd.grad(value, list(model.parameters()))
    trainer = trainer_with(
        Decay(), Twice(), loss=loss, model=model, loader=[(x, targets)], val_loader=None, max_epochs=1
    )
    logs = trainer.fit()
    assert logs[0]["loss"] == pytest.approx(value.item())
    for parameter, old, gradient in zip(model.parameters(), before, expected, strict=True):
        torch.testing.assert_close(parameter.detach(), old - 0.1 * gradient)


# --- the loss in its parts --------------------------------------------------------------------------


class NeedsTerms:
    """Looks at the terms, and keeps their names."""

    needs_terms = True

    def __init__(self) -> None:
        self.names: set[str] = set()

    def after_loss(self, moment: Moment) -> None:
        assert moment.terms is not None
        self.names = set(moment.terms.auxiliaries)


@pytest.mark.parametrize(
    ("config", "names"),
    [
        ({}, {"margin", "sign", "rejection", "push_down", "push_up"}),
        ({"coverage_term": "hard", "lambda_sign": 0.0}, {"margin", "rejection", "push_down", "push_up"}),
        ({"lambda_margin": 0.0, "lambda_rej": 0.0, "lambda_push_up": 0.0}, {"sign", "push_down"}),
    ],
    ids=["all", "a measured coverage", "some without a weight"],
)
def test_the_terms_of_the_objective_sum_to_it(config: dict[str, Any], names: set[str]) -> None:
    """Value and gradients in parts are those of the fused call, up to the order of the sums."""
    fused, parts = trainer_with(loss=objective(**config)), NeedsTerms()
    apart = trainer_with(parts, loss=objective(**config))
    one, other = fused.fit(), apart.fit()
    assert parts.names == names
    for left, right in zip(one, other, strict=True):
        assert left["loss"] == pytest.approx(right["loss"], rel=1e-5)
    torch.testing.assert_close(weights_of(fused), weights_of(apart), rtol=1e-4, atol=1e-6)


def test_a_loss_may_return_its_terms() -> None:
    """The total of them is trained, in training and validation, with and without companions."""

    def total(outputs: Any, lifted: Any, *, semantic_targets: SemanticTargets) -> Tensor:
        terms = in_terms(outputs, lifted, semantic_targets=semantic_targets)
        return terms.task + terms.auxiliaries["small"]

    def in_terms(outputs: Any, lifted: Any, *, semantic_targets: SemanticTargets) -> LossTerms:
        fit = (outputs[0] - lifted[0]).square()[semantic_targets.mask_trained].mean()
        return LossTerms(fit, {"small": outputs[0].square().mean()})

    one = trainer_with(loss=total)
    one.fit()
    for companions in ((), (Diary(),), (NeedsTerms(),)):
        other = trainer_with(*companions, loss=in_terms)
        other.fit()
        assert torch.equal(weights_of(one), weights_of(other))
        assert one.val_history == other.val_history


def test_a_loss_without_terms_is_refused_where_they_are_needed() -> None:
    """The message names what to return, and who asks for it."""

    def plain(outputs: Any, lifted: Any, **facts: Any) -> Tensor:
        return outputs[0].square().mean()

    trainer = trainer_with(NeedsTerms(), loss=plain, val_loader=None)
    with pytest.raises(
        ValueError, match=r"LossTerms\(task, auxiliaries\), .* because NeedsTerms .* got Tensor"
    ):
        trainer.fit()


class Share:
    """Keeps the auxiliaries' gradient at a share of the whole, and remembers the norms."""

    needs_terms = True
    currency = "gradient"

    def __init__(self, factor: Any = None) -> None:
        self.norms: list[tuple[Tensor, Tensor]] = []
        self.factor = factor

    def auxiliary_factor(self, task_norm: Tensor, auxiliary_norm: Tensor) -> Tensor:
        self.norms.append((task_norm, auxiliary_norm))
        if self.factor is not None:
            return torch.tensor(self.factor, dtype=torch.float64)
        return (0.25 / 0.75 * task_norm / auxiliary_norm).clamp(max=1.0)


class Conflict(nn.Module):
    """Two weights: the task pulls at one, the other term, a hundred times harder, at both."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0, 1.0], dtype=torch.float64))
        self.unused = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.w * x, torch.ones_like(x)


def conflicting(outputs: Any, lifted: Any) -> LossTerms:
    return LossTerms(
        outputs[0][:, 0].mean(), {"other": 60 * outputs[0][:, 0].mean(), "one": 80 * outputs[0][:, 1].mean()}
    )


def conflict_step(*companions: Any, batches: int = 1, loss: Any = conflicting, **fields: Any) -> Tensor:
    """The step that the weights take, in units of the learning rate."""
    model = Conflict()
    x = torch.ones(3, 2, dtype=torch.float64)
    loader = [(x[: 3 - index], x[: 3 - index, 0]) for index in range(batches)]
    before = model.w.detach().clone()
    trainer_with(
        *companions, loss=loss, model=model, loader=loader, val_loader=None, max_epochs=1, **fields
    ).fit()
    return (before - model.w.detach()) / 0.1


def test_a_share_of_the_gradient_is_kept_exactly() -> None:
    """Norms are of the task's and of all auxiliaries' gradient; their factor scales these alone."""
    share = Share()
    step = conflict_step(share)
    task, auxiliary = (float(norm) for norm in share.norms[0])
    assert (task, auxiliary) == pytest.approx((1.0, 100.0))
    factor = 1 / 300
    torch.testing.assert_close(step, torch.tensor([1 + 60 * factor, 80 * factor], dtype=torch.float64))
    assert factor * auxiliary / (task + factor * auxiliary) == pytest.approx(0.25)


@pytest.mark.parametrize("fields", [{}, {"gradient_accumulation_steps": 2}], ids=["single", "in groups"])
def test_a_factor_of_one_changes_nothing(fields: dict[str, Any]) -> None:
    """Two backward passes are one, in groups of unequal micro-batches too."""
    plain = conflict_step(batches=2, **fields)
    torch.testing.assert_close(conflict_step(Share(1.0), batches=2, **fields), plain)


def test_a_factor_of_zero_silences_terms_that_are_not_finite() -> None:
    """The task trains on as if they were not there."""

    def spoiled(outputs: Any, lifted: Any) -> LossTerms:
        P = outputs[0]
        # A finite value, whose gradient is not.
        return LossTerms(P[:, 0].mean(), {"bad": (P[:, 1] * 0).sqrt().sum()})

    step = conflict_step(Share(0.0), loss=spoiled)
    torch.testing.assert_close(step, torch.tensor([1.0, 0.0], dtype=torch.float64))


def test_a_share_of_the_gradient_under_mixed_precision() -> None:
    """Norms and steps are those of the outputs' own precision."""
    share = Share()
    step = conflict_step(share, mixed_precision=True)
    assert float(share.norms[0][1]) == pytest.approx(100.0, rel=1e-2)
    assert float(step[1]) == pytest.approx(80 / 300, rel=1e-2)


# --- names ------------------------------------------------------------------------------------------


class Says:
    """Says one number, and remembers another."""

    def __init__(self, said: Mapping[str, float], **attributes: Any) -> None:
        self.said = said
        for name, value in attributes.items():
            setattr(self, name, value)

    def telemetry(self) -> Mapping[str, float]:
        return self.said


class Counts:
    """Counts micro-batches, and lets the count weigh in the loss."""

    def __init__(self, name: str = "count", *, says: bool = True) -> None:
        self.name = name
        self.says = says
        self.epoch_began_at = self.count = 0

    def begin_epoch(self, epoch: int, facts: dict[str, Any]) -> None:
        self.epoch_began_at = self.count
        facts["loss_weights"] = {"margin": 1.0 + self.count}

    def before_forward(self, moment: Moment) -> None:
        self.count += 1
        weights = {**moment.facts["loss_weights"], "sign": 0.1 * (self.count - self.epoch_began_at)}
        moment.facts["loss_weights"] = weights

    def telemetry(self) -> dict[str, float]:
        return {f"{self.name}_batches": self.count} if self.says else {}

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "epoch_began_at": self.epoch_began_at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count, self.epoch_began_at = state["count"], state["epoch_began_at"]


def test_telemetry_of_all_is_merged_by_name() -> None:
    """Numbers are plain floats, under the companions' own names."""
    trainer = trainer_with(Says({"a": 1, "b": torch.tensor(2.0)}), Diary(), Says({"c": NAN}))
    said = trainer.telemetry()
    assert {name: type(value) for name, value in said.items()} == dict.fromkeys("abc", float)
    assert (said["a"], said["b"]) == (1.0, 2.0)
    assert trainer_with().telemetry() == {}


@pytest.mark.parametrize(
    ("companions", "message"),
    [
        (
            (Says({"a": 1}), Says({"a": 2})),
            "telemetry must have names of its own, got 'a' from Says and Says",
        ),
        ((Counts(), Counts(says=False)), "names of their own, got two with name='count'"),
        ((Share(), Share()), "one companion at most may scale gradients, got Share and Share"),
        ((Says({}, currency="gradient"),), "currency='gradient' must have needs_terms=True, Says has not"),
    ],
    ids=["telemetry", "state", "currencies", "currency without terms"],
)
def test_companions_that_cannot_go_together_are_refused(companions: tuple[Any, ...], message: str) -> None:
    """At once, not after an epoch."""
    with pytest.raises(ValueError, match=message):
        trainer_with(*companions)


def test_a_companion_may_not_take_the_loss_s_place_in_a_checkpoint() -> None:
    """A loss with a state of its own is kept as "loss_fn"."""

    class Loss:
        def __call__(self, outputs: Any, lifted: Any) -> Tensor:
            raise AssertionError

        def state_dict(self) -> dict[str, Any]:
            return {}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            raise AssertionError

    with pytest.raises(ValueError, match="name of its own, got name='loss_fn'"):
        trainer_with(Counts("loss_fn"), loss=Loss())


# --- going on ---------------------------------------------------------------------------------------


class InterruptedTrainingError(Exception):
    """The process was killed, so to say."""


@pytest.mark.parametrize("at", [2, 6, 9], ids=["first epoch", "between", "second epoch"])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_an_interrupted_training_goes_on_with_its_companions(
    at: int, accumulation: int, tmp_path: Path
) -> None:
    """Weights, validation and telemetry end as if nothing had happened, bit for bit."""
    fields = {"gradient_accumulation_steps": accumulation}
    whole = trainer_with(Counts(), Counts("other"), **fields)
    whole.fit()

    def interrupt(record: Mapping[str, Any]) -> None:
        if record["phase"] == "train" and record["step"] == at:
            broken.save_checkpoint(tmp_path / "state.pt")
            raise InterruptedTrainingError

    broken = trainer_with(Counts(), Counts("other"), log_hook=interrupt, **fields)
    with pytest.raises(InterruptedTrainingError):
        broken.fit()
    resumed = trainer_with(Counts(), Counts("other"), **fields)
    resumed.load_checkpoint(tmp_path / "state.pt")
    resumed.fit()
    assert torch.equal(weights_of(whole), weights_of(resumed))
    assert whole.val_history == resumed.val_history
    assert whole.telemetry() == resumed.telemetry() == {"count_batches": 12.0, "other_batches": 12.0}


# --- outputs by name --------------------------------------------------------------------------------


@pytest.mark.parametrize("mixed", [False, True], ids=["full", "mixed precision"])
def test_outputs_by_name_go_everywhere(mixed: bool) -> None:
    """Training, validation, metrics and decoding take (P, Q, named); the named ones are widened as well."""
    seen: list[Any] = []

    class Look:
        def after_forward(self, moment: Moment) -> None:
            seen.append(moment.outputs[2]["stop_logits"])

    trainers = []
    for named in (False, True):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = Head(named=named)
        trainers.append(trainer_with(*([Look()] if named else []), model=model, mixed_precision=mixed))
        trainers[-1].fit()
    pair, named_too = trainers
    assert torch.equal(weights_of(pair), weights_of(named_too))
    assert pair.val_history == named_too.val_history
    assert {tensor.dtype for tensor in seen} == {torch.float32}
    x, targets = rows()
    decoded = [decode_split(item.model, Split(x, targets), tau_infer=1e-6).decoded for item in trainers]
    assert torch.equal(decoded[0].nan_to_num(), decoded[1].nan_to_num())
