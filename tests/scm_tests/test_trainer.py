"""The training loop: what a step does, what an epoch says, and when a training ends."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scm.autodiff.policies import GradientPolicy, gradient_policy
from scm.losses.coverage import soft_coverage_loss
from scm.losses.implicit import implicit_loss
from scm.losses.training import LossConfig, SCMTrainingLoss
from scm.training.curriculum import LinearRamp, LossWeightsCurriculum
from scm.training.loader import TensorBatches
from scm.training.objective import ProjectiveObjective
from scm.training.targets import lift_semantic_targets, lift_sentinel_targets, lift_targets
from scm.training.trainer import SCMTrainer, TrainingConfig

Vectors = Callable[[str], list[dict[str, Any]]]
Decode = Callable[[Any], Any]


class Head(nn.Module):
    """A small pattern head: two hidden layers, two outputs, P and Q."""

    def __init__(self, inputs: int = 2, hidden: int = 6, dropout: float = 0.0) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU()
        )
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(hidden, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        P, Q = self.head(self.dropout(self.backbone(x))).unbind(-1)
        return P, Q


class Constant(nn.Module):
    """Answers P = w * x and Q = q, whatever x is."""

    def __init__(self, q: float = 1.0) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
        self.q = q

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.w * x[:, 0], torch.full_like(x[:, 0], self.q)


def make_head(seed: int = 0, **more: Any) -> Head:
    """A head whose weights depend on the seed alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Head(**more).double()


def make_rows(rows: int = 24, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Inputs (rows, 2) and smooth finite targets."""
    drawn = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 2, generator=drawn, dtype=torch.float64)
    return x, torch.sin(x[:, 0]) + 0.5 * x[:, 1]


def squared(outputs: tuple[Tensor, Tensor], lifted: tuple[Tensor, Tensor]) -> Tensor:
    """The mean squared cross product."""
    (P, Q), (Y_n, Y_d) = outputs, lifted
    return (P * Y_d - Q * Y_n).square().mean()


def make_trainer(
    loader: Any, loss: Any = squared, model: nn.Module | None = None, **fields: Any
) -> SCMTrainer:
    """A trainer with plain SGD; coverage stops nothing unless asked."""
    model = make_head() if model is None else model
    scheduler = fields.pop("scheduler", None)
    optimizer = fields.pop("optimizer", None) or torch.optim.SGD(
        model.parameters(), lr=fields.pop("lr", 0.05)
    )
    config = TrainingConfig(**{"coverage_threshold": 0.0, **fields})
    if callable(scheduler):
        scheduler = scheduler(optimizer)
    return SCMTrainer(model, optimizer, loss, loader, scheduler=scheduler, config=config)


def weights_of(trainer: SCMTrainer) -> Tensor:
    """All weights in one row."""
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


# --- recorded trainings --------------------------------------------------------------------------


def recorded_loss(case: dict[str, Any]) -> Callable[..., Tensor]:
    """The loss that a recorded training used."""
    if case["loss"].startswith("implicit_loss"):

        def plain(outputs: tuple[Tensor, Tensor], lifted: tuple[Tensor, Tensor]) -> Tensor:
            return implicit_loss(*outputs, *lifted)

        return plain
    stack = SCMTrainingLoss(
        LossConfig(tau_train=0.3, lambda_margin=0.5, lambda_sign=0.3, lambda_rej=0.2, target_coverage=0.9)
    )

    def full(
        outputs: tuple[Tensor, Tensor], lifted: tuple[Tensor, Tensor], *, tau: float, semantic_targets: Any
    ) -> Tensor:
        P, Q, Y_n, Y_d = *outputs, *lifted
        if "missing" in case["loss"]:
            kept = semantic_targets.mask_finite | semantic_targets.mask_bottom
            P, Q, Y_n, Y_d = P[kept], Q[kept], Y_n[kept], Y_d[kept]
        fit = implicit_loss(P, Q, Y_n, Y_d)
        bottom = Q.detach().abs() < tau
        return stack(fit, P, Q, Y_n, Y_d, is_bottom=bottom, mask_finite=Y_d != 0, tau_train=tau)[0]

    return full


def recorded_trainer(case: dict[str, Any], loss: Callable[..., Tensor], **fields: Any) -> SCMTrainer:
    """A trainer set up as a recorded training was."""
    model = Head(case["input_dim"], case["hidden"]).double()
    state = {name: torch.tensor(value, dtype=torch.float64) for name, value in case["initial_state"].items()}
    model.load_state_dict(state)
    loader = []
    for batch in case["batches"]:
        parts = tuple(torch.tensor(batch[name], dtype=torch.float64) for name in ("x", "targets"))
        loader.append((*parts, batch["status_labels"]) if "status_labels" in batch else parts)
    return make_trainer(
        loader,
        loss,
        model,
        lr=case["lr"],
        max_epochs=case["epochs"],
        gradient_accumulation_steps=case["gradient_accumulation_steps"],
        tau_train_min=case["tau_train"],
        tau_train_max=case["tau_train"],
        **fields,
    )


def test_recorded_trainings(vector_group: Vectors, decode_numbers: Decode) -> None:
    """Twenty recorded epochs: every metric of every step, and the weights at the end."""
    for case in map(decode_numbers, vector_group("training_trajectory")):
        if "quirk" in case:
            continue
        records: list[dict[str, Any]] = []
        # The recorded trainings weigh micro-batches alike.
        more = {"log_hook": records.append, "accumulation_weighting": "micro_batches"}
        trainer = recorded_trainer(case, recorded_loss(case), **more)
        logs = trainer.fit()
        for name, values in case["expected"]["per_step"].items():
            assert [log[name] for log in logs] == pytest.approx(values, rel=5e-7), (case["id"], name)
        for name, parameter in trainer.model.state_dict().items():
            expected = torch.tensor(case["expected"]["final_state"][name], dtype=torch.float64)
            torch.testing.assert_close(parameter, expected, rtol=1e-7, atol=1e-9)
        first = case["expected"]["first_record"]
        assert records[0].keys() == first.keys()
        assert records[0]["metrics"] == pytest.approx(first["metrics"], rel=5e-7)
        assert (records[0]["step"], records[0]["epoch"], records[0]["phase"]) == (1, 0, "train")
        assert trainer.global_step == case["expected"]["global_step"]


def test_the_recorded_blow_up_does_not_happen_with_the_projective_fit(
    vector_group: Vectors, decode_numbers: Decode
) -> None:
    """Where the peer's first step throws the network onto a plateau, the bounded fit goes on learning."""
    (case,) = (case for case in vector_group("training_trajectory") if "quirk" in case)
    case = decode_numbers(case)
    stack = recorded_loss_stack()
    trainer = recorded_trainer(case, ProjectiveObjective(stack, fit="projective"))
    losses = [log["loss"] for log in trainer.fit()]
    assert case["expected"]["per_step"]["loss"][0] > 19
    assert max(losses) < 2.0
    assert losses[-1] < 0.8 * losses[0]
    assert losses[-1] < 0.5 * case["expected"]["per_step"]["loss"][-1]


def recorded_loss_stack() -> SCMTrainingLoss:
    """The constraints of the recorded trainings."""
    return SCMTrainingLoss(
        LossConfig(tau_train=0.3, lambda_margin=0.5, lambda_sign=0.3, lambda_rej=0.2, target_coverage=0.9)
    )


# --- accumulation, clipping, thresholds ----------------------------------------------------------


@pytest.mark.parametrize("sizes", [[5, 2, 5], [8, 8, 8], [1, 2, 3, 4, 5, 6, 1], [3]])
@pytest.mark.parametrize("steps", [2, 3])
def test_a_group_steps_like_one_batch_of_all_its_rows(sizes: list[int], steps: int) -> None:
    """Whatever the sizes of micro-batches and of the last group: the gradient of the mean over the rows."""
    x, y = make_rows(sum(sizes))
    micro = list(zip(x.split(sizes), y.split(sizes), strict=True))
    groups = [micro[i : i + steps] for i in range(0, len(micro), steps)]
    whole = [(torch.cat([m[0] for m in group]), torch.cat([m[1] for m in group])) for group in groups]
    accumulated = make_trainer(micro, gradient_accumulation_steps=steps, max_epochs=3)
    at_once = make_trainer(whole, max_epochs=3)
    accumulated.fit()
    at_once.fit()
    torch.testing.assert_close(weights_of(accumulated), weights_of(at_once), rtol=1e-12, atol=1e-14)
    assert accumulated.optimizer_steps == at_once.optimizer_steps == 3 * len(groups)


def test_clipping_bounds_the_norm_of_all_gradients_together() -> None:
    """One SGD step at rate 1 moves the weights by the clipped norm, along the gradient."""
    x, y = make_rows()
    free, clipped = (make_trainer([(x, 50 * y)], lr=1.0, clip_norm=limit) for limit in (None, 0.125))
    start = weights_of(free)
    free.fit()
    clipped.fit()
    moved, short = weights_of(free) - start, weights_of(clipped) - start
    assert moved.norm() > 1
    assert short.norm().item() == pytest.approx(0.125)
    torch.testing.assert_close(short / short.norm(), moved / moved.norm())


def test_thresholds_come_from_a_generator_of_their_own() -> None:
    """Draws lie in the range, repeat with the seed, differ with it, and leave the global stream alone."""
    x, y = make_rows()
    loader = [(x, y)] * 20
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(4)
        expected = torch.rand(1)
        torch.manual_seed(4)
        trainer = make_trainer(loader, seed=seed, tau_train_min=1e-4, tau_train_max=2e-4)
        trainer.fit()
        assert torch.equal(torch.rand(1), expected)
        drawn.append(list(trainer.last_thresholds))
    assert drawn[0] == drawn[1] != drawn[2]
    assert all(1e-4 <= tau <= 2e-4 for tau in drawn[0])
    assert len(set(drawn[0])) == 20


# --- what losses and models are told -------------------------------------------------------------


def test_a_loss_is_told_what_it_names() -> None:
    """Signature by signature: only the facts that are named, or all of them for **kwargs."""
    x, y = make_rows(6)
    told: list[dict[str, Any]] = []

    def some(outputs: Any, lifted: Any, *, tau: float, epoch: int, loss_weights: Any) -> Tensor:
        told.append({"tau": tau, "epoch": epoch, "loss_weights": loss_weights})
        return squared(outputs, lifted)

    def everything(outputs: Any, lifted: Any, **facts: Any) -> Tensor:
        told.append(facts)
        return squared(outputs, lifted)

    curriculum = LossWeightsCurriculum({"margin": LinearRamp(0.0, 1.0, 0, 2)})
    make_trainer([(x, y)], some, max_epochs=2, loss_weights={"sign": 3}, loss_curriculum=curriculum).fit()
    assert told == [
        {"tau": 1e-4, "epoch": 0, "loss_weights": {"sign": 3.0, "margin": 0.0}},
        {"tau": 1e-4, "epoch": 1, "loss_weights": {"sign": 3.0, "margin": 0.5}},
    ]
    told.clear()
    make_trainer([(x, y)], everything).fit()
    names = {"tau", "inputs", "targets", "epoch", "global_step", "loss_weights", "semantic_targets"}
    assert told[0].keys() == names
    assert told[0]["global_step"] == 1
    assert told[0]["inputs"] is x
    assert told[0]["targets"] is y


def test_a_loss_module_is_told_what_its_forward_names() -> None:
    """A module's call takes anything, its forward() need not; its own weights train and are saved along."""
    x, y = make_rows(6)
    epochs: list[int] = []

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

        def forward(self, outputs: Any, lifted: Any, *, epoch: int) -> Tensor:
            epochs.append(epoch)
            return self.scale.square() * squared(outputs, lifted)

    model, loss = make_head(), Scaled()
    optimizer = torch.optim.SGD([*model.parameters(), *loss.parameters()], lr=0.05)
    trainer = make_trainer([(x, y)], loss, model, optimizer=optimizer, max_epochs=2)
    trainer.fit()
    assert epochs == [0, 1]
    assert loss.scale.item() < 2.0
    assert trainer.controllers == {"loss_fn": loss}


def test_a_model_left_in_eval_mode_trains_in_training_mode() -> None:
    """Dropout is active in every epoch, also after validation."""
    x, y = make_rows()
    model = make_head(dropout=0.5)
    model.eval()
    modes: list[bool] = []
    model.register_forward_hook(lambda module, _, __: modes.append(module.training))
    make_trainer([(x, y)], model=model, max_epochs=2, val_loader=[(x, y)]).fit()
    assert modes == [True, False, True, False]


def test_a_training_loss_may_be_given_as_the_guides_write_it() -> None:
    """SCMTrainingLoss as loss_fn is completed by the implicit fit."""
    x, y = make_rows()
    y[3] = float("inf")
    stack = recorded_loss_stack()

    def spelled_out(outputs: Any, lifted: Any, *, tau: float) -> Tensor:
        (P, Q), (Y_n, Y_d) = outputs, lifted
        bottom = Q.detach().abs() < tau
        fit = implicit_loss(P, Q, Y_n, Y_d)
        return stack(fit, P, Q, Y_n, Y_d, is_bottom=bottom, mask_finite=Y_d != 0, tau_train=tau)[0]

    short, long = (
        make_trainer([(x, y)], stack, max_epochs=3),
        make_trainer([(x, y)], spelled_out, max_epochs=3),
    )
    for one, other in zip(short.fit(), long.fit(), strict=True):
        assert one == pytest.approx(other, rel=1e-12)
    torch.testing.assert_close(weights_of(short), weights_of(long), rtol=1e-12, atol=1e-14)


def test_a_loss_that_is_no_scalar_is_refused() -> None:
    """A forgotten mean is named, not trained as a sum."""
    x, y = make_rows()
    with pytest.raises(ValueError, match=r"loss_fn must return a scalar, got shape \(24,\)"):
        make_trainer([(x, y)], lambda outputs, lifted: outputs[0] - lifted[0]).fit()


@pytest.mark.parametrize(
    ("returned", "got"), [((torch.zeros(()), {}), "tuple"), (0.5, "float")], ids=["breakdown", "number"]
)
def test_a_loss_that_is_no_tensor_is_refused(returned: Any, got: str) -> None:
    """A breakdown handed on, and a number without its graph, are named for what they are."""
    with pytest.raises(TypeError, match=f"loss_fn must return a scalar tensor or LossTerms, got {got}"):
        make_trainer([make_rows()], lambda outputs, lifted: returned).fit()


# --- gradient policies ---------------------------------------------------------------------------

TAU = 0.33  # some |Q| of the untrained head lie below it, most above


def near_bottoms() -> tuple[Tensor, Tensor]:
    """Rows of which the model of `policy_training` answers some with |Q| below the threshold."""
    return make_rows(40, seed=3)


def policy_training(policy: Any, **fields: Any) -> Tensor:
    """Train where bottoms occur, and gradients of the rows exceed 1; return the weights."""
    stack = SCMTrainingLoss(
        LossConfig(lambda_margin=1.0, lambda_rej=fields.pop("lambda_rej", 0.0), coverage_term="soft")
    )
    tau = {"tau_train_min": TAU, "tau_train_max": TAU}
    loss = ProjectiveObjective(stack, fit="implicit")
    trainer = make_trainer(
        [near_bottoms()],
        loss,
        max_epochs=5,
        lr=5e-3,
        gradient_policy=policy,
        loss_weights={"fit": 100.0},
        **tau,
        **fields,
    )
    trainer.fit()
    assert min(log["coverage"] for log in trainer.train_history) < 1
    return weights_of(trainer)


def test_four_policies_are_four_trainings() -> None:
    """Where bottoms occur, each policy gives other weights; REJECT leaves the start as it was."""
    trained = {policy: policy_training(policy) for policy in GradientPolicy}
    start = weights_of(make_trainer([near_bottoms()]))
    assert torch.equal(trained[GradientPolicy.REJECT], start)
    found = list(trained.values())
    for i, one in enumerate(found):
        assert all(not torch.equal(one, other) for other in found[i + 1 :])


def test_a_loss_scale_changes_no_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a GradScaler CLAMP clamps the gradient of the loss, not the scaled one."""
    expected = {policy: policy_training(policy) for policy in GradientPolicy}
    made = SCMTrainer.__init__

    def with_scaler(self: SCMTrainer, *arguments: Any, **fields: Any) -> None:
        made(self, *arguments, **fields)
        self.scaler = self._guard._scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)

    monkeypatch.setattr(SCMTrainer, "__init__", with_scaler)
    for policy in GradientPolicy:
        torch.testing.assert_close(policy_training(policy), expected[policy], rtol=1e-12, atol=0)


def test_reject_learns_through_coverage_alone() -> None:
    """With soft coverage REJECT moves the weights, and exactly as the coverage term alone would."""

    def coverage_only(outputs: Any, lifted: Any, *, tau: float) -> Tensor:
        return 2.0 * soft_coverage_loss(outputs[1], tau, 1e-2, 0.95)

    start = weights_of(make_trainer([near_bottoms()]))
    rejected = policy_training(GradientPolicy.REJECT, lambda_rej=2.0)
    alone = make_trainer(
        [near_bottoms()], coverage_only, max_epochs=5, lr=5e-3, tau_train_min=TAU, tau_train_max=TAU
    )
    alone.fit()
    assert not torch.equal(rejected, start)
    torch.testing.assert_close(rejected, weights_of(alone), rtol=1e-12, atol=1e-14)


def test_no_policy_is_no_gate_bit_for_bit() -> None:
    """gradient_policy=None trains exactly as passing everything does, and as a loop without a trainer."""
    untouched = policy_training(None)
    assert torch.equal(untouched, policy_training(GradientPolicy.PASSTHROUGH))
    model = make_head()
    optimizer = torch.optim.SGD(model.parameters(), lr=5e-3)
    x, y = near_bottoms()
    Y_n, Y_d = lift_targets(y)
    told = lift_sentinel_targets(y)
    loss = ProjectiveObjective(
        SCMTrainingLoss(LossConfig(lambda_margin=1.0, lambda_rej=0.0, coverage_term="soft")), fit="implicit"
    )
    for _ in range(5):
        optimizer.zero_grad()
        loss(model(x), (Y_n, Y_d), tau=TAU, semantic_targets=told, loss_weights={"fit": 100.0}).backward()
        optimizer.step()
    assert torch.equal(untouched, torch.cat([item.detach().flatten() for item in model.parameters()]))


def test_a_policy_around_the_training_is_in_force() -> None:
    """Without one of its own, the trainer keeps the policy that surrounds fit()."""
    with gradient_policy(GradientPolicy.PROJECT, tau=TAU):
        around = policy_training(None)
    assert torch.equal(around, policy_training(GradientPolicy.PROJECT))
    assert not torch.equal(around, policy_training(None))


# --- epochs, histories, ends ---------------------------------------------------------------------


def test_the_metrics_of_an_epoch_are_exact_over_its_samples() -> None:
    """Unequal batches do not bend means; the smallest |Q| is the smallest."""
    x, y = make_rows(10)
    trainer = make_trainer([(x[:7], y[:7]), (x[7:], y[7:])], lr=1e-12)
    (report,) = trainer.epochs()
    P, Q = trainer.model(x)
    assert report.train["loss"] == pytest.approx(squared((P, Q), lift_targets(y)).item(), rel=1e-9)
    assert report.train["denom_abs_min"] == pytest.approx(Q.abs().min().item(), rel=1e-9)
    assert report.train["denom_abs_mean"] == pytest.approx(Q.abs().mean().item(), rel=1e-9)


def test_coverage_counts_every_kind_of_bottom() -> None:
    """|Q| below tau, and a non-finite P, Q or quotient, are not covered; the peer forgets P."""

    class Given(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(()))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x[:, 0] + 0 * self.w, x[:, 1] + 0 * self.w

    nan, inf = float("nan"), float("inf")
    rows = torch.tensor(
        [[1.0, 1.0], [1.0, 1e-5], [nan, 1.0], [1.0, inf], [3e38, 0.5], [1.0, nan], [0.0, -1.0]]
    )

    def zero(outputs: Any, lifted: Any) -> Tensor:
        return torch.nan_to_num(outputs[0], posinf=0, neginf=0).clamp(-1, 1).sum() * 0.0

    trainer = make_trainer([(rows, torch.zeros(7))], zero, Given())
    (log,) = trainer.fit()
    assert log["coverage"] == pytest.approx(2 / 7)
    assert log["denom_abs_min"] == pytest.approx(1e-5)
    assert trainer.nan_counts["output"] == 3


def test_validation_decodes_strictly_at_tau_infer() -> None:
    """What training counts as bottom, |Q| < tau_train, is covered when it is above tau_infer."""
    x, y = make_rows(8)
    trainer = make_trainer(
        [(x, y)],
        model=Constant(1e-3),
        val_loader=[(x[:5], y[:5]), (x[5:], y[5:])],
        tau_train_min=1e-2,
        tau_train_max=1e-2,
    )
    (report,) = trainer.epochs()
    assert report.train["coverage"] == 0.0
    assert report.val is not None
    assert report.val["val_coverage"] == 1.0
    assert report.val["val_tau_eval"] == 1e-6
    assert report.val["val_denom_abs_mean"] == pytest.approx(1e-3)
    expected = squared(trainer.model(x), lift_targets(y)).item()
    assert report.val["val_loss"] == pytest.approx(expected, rel=1e-12)


def test_validation_does_not_move_the_training() -> None:
    """With and without a shuffling validation loader: the same weights, dropout and all."""
    x, y = make_rows()
    data = torch.utils.data.TensorDataset(x, y)
    trained = []
    for val_loader in (None, torch.utils.data.DataLoader(data, batch_size=5, shuffle=True)):
        torch.manual_seed(0)
        train_loader = torch.utils.data.DataLoader(data, batch_size=5, shuffle=True)
        trainer = make_trainer(
            train_loader, model=make_head(dropout=0.3), max_epochs=3, val_loader=val_loader
        )
        trainer.fit()
        trained.append(weights_of(trainer))
    assert torch.equal(*trained)


@pytest.mark.parametrize("validated", [True, False], ids=["validated", "train only"])
def test_too_little_coverage_stops_a_training(validated: bool) -> None:
    """With a val_loader by its coverage, without one by the epoch's: after `patience` bad epochs."""
    x, y = make_rows()
    trainer = make_trainer(
        [(x, y)],
        model=Constant(1e-7),
        max_epochs=10,
        coverage_threshold=0.5,
        coverage_patience=3,
        val_loader=[(x, y)] if validated else None,
    )
    statuses = [report.status for report in trainer.epochs()]
    assert statuses == ["running", "running", "stopped"]
    assert trainer.status == "stopped"
    assert "coverage below 0.5 for 3 epochs" in trainer.stop_reason
    assert list(trainer.epochs()) == []


def test_enough_coverage_stops_nothing() -> None:
    """A covered training completes."""
    x, y = make_rows()
    trainer = make_trainer([(x, y)], max_epochs=4, coverage_threshold=0.5, coverage_patience=1)
    assert [report.status for report in trainer.epochs()] == ["running"] * 3 + ["completed"]
    assert (trainer.status, trainer.stop_reason) == ("completed", "")


def test_the_best_weights_come_back() -> None:
    """restore_best ends with the weights of the epoch with the lowest validation loss."""
    x, y = make_rows()
    rate = 2.2  # too large: the loss goes down and up again
    seen: list[tuple[float, Tensor]] = []
    trainer = make_trainer([(x, y)], lr=rate, max_epochs=8, val_loader=[(x, y)], restore_best=True)
    last: Tensor | None = None
    for report in trainer.epochs():
        assert report.val is not None
        if report.status == "running":
            last = weights_of(trainer)
            seen.append((report.val["val_loss"], last))
    losses = [log["val_loss"] for log in trainer.val_history]
    best = losses.index(min(losses))
    assert best < 7, "the case must have its best epoch before the last"
    assert trainer.best_epoch == best
    assert torch.equal(weights_of(trainer), seen[best][1])


def test_epochs_run_when_asked_for() -> None:
    """The generator trains one epoch per item, and not ahead."""
    x, y = make_rows()
    trainer = make_trainer([(x, y)], max_epochs=3)
    epochs = trainer.epochs()
    assert next(epochs).epoch == 0
    assert trainer.current_epoch == trainer.global_step == 1
    assert [report.epoch for report in epochs] == [1, 2]
    assert trainer.fit() == []


def test_fit_returns_the_metrics_of_every_micro_batch() -> None:
    """As the peer: one dictionary of seven floats a micro-batch."""
    x, y = make_rows()
    logs = make_trainer([(x, y), (x[:3], y[:3])], max_epochs=2).fit()
    assert len(logs) == 4
    denominators = ["denom_abs_min", "denom_abs_mean", "denom_abs_available"]
    assert list(logs[0]) == ["loss", "coverage", "tau_train", "bottom_frac", *denominators]
    assert all(type(value) is float for log in logs for value in log.values())


def test_a_loader_that_can_be_read_once_only_is_refused() -> None:
    """A generator would train one epoch and then nothing: that is said before the first step."""
    x, y = make_rows()

    def once() -> Iterator[Any]:
        yield x, y

    with pytest.raises(ValueError, match="train_loader can be read once only, and 2 epochs are left"):
        make_trainer(once(), max_epochs=2).fit()
    assert len(make_trainer(once(), max_epochs=1).fit()) == 1


def test_a_validation_that_can_be_read_once_only_is_refused() -> None:
    """A validation of the first epoch alone would judge the others by nothing."""
    x, y = make_rows(6)
    with pytest.raises(ValueError, match="val_loader can be read once only, and 2 epochs are left"):
        make_trainer([(x, y)], val_loader=iter([(x, y)]), max_epochs=2).fit()
    once = make_trainer([(x, y)], val_loader=iter([(x, y)]))
    once.fit()
    assert len(once.val_history) == 1


def test_a_learning_rate_that_trains_nothing_is_said() -> None:
    """The optimizer brings its own rate; another one in the config is a warning, an equal one is not."""
    x, y = make_rows(6)
    with pytest.warns(DeprecationWarning, match=r"learning_rate=0.5 trains nothing, .* \[0.05\]"):
        make_trainer([(x, y)], learning_rate=0.5)
    make_trainer([(x, y)], learning_rate=0.05)


def test_a_loader_that_runs_dry_is_an_error() -> None:
    """A re-iterable that gives nothing the second time does not pass for a training."""
    x, y = make_rows()

    class Dry:
        def __init__(self) -> None:
            self.held = [(x, y)]

        def __iter__(self) -> Iterator[Any]:
            while self.held:
                yield self.held.pop()

    with pytest.raises(ValueError, match="no rows to train on in epoch 1 again"):
        make_trainer(Dry(), max_epochs=2).fit()
    with pytest.raises(ValueError, match="no rows to train on in epoch 0"):
        make_trainer([]).fit()


def test_logging_is_as_dense_as_asked() -> None:
    """log_interval=3: every third micro-batch, with its own metrics; validation always."""
    x, y = make_rows(8)
    dense: list[dict[str, Any]] = []
    sparse: list[dict[str, Any]] = []
    for hook, interval in ((dense.append, 1), (sparse.append, 3)):
        make_trainer(
            [(x, y)] * 4, max_epochs=2, log_hook=hook, log_interval=interval, val_loader=[(x, y)]
        ).fit()
    trained = [record for record in dense if record["phase"] == "train"]
    assert [record for record in sparse if record["phase"] == "train"] == [trained[2], trained[5]]
    assert [r for r in sparse if r["phase"] == "eval"] == [r for r in dense if r["phase"] == "eval"]
    assert [record["step"] for record in dense] == [1, 2, 3, 4, 4, 5, 6, 7, 8, 8]


@pytest.mark.parametrize(("interval", "reads"), [(None, 1), (1, 9), (4, 3), (9, 1)])
def test_metrics_are_read_when_logging_is_due(
    interval: int | None, reads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight micro-batches: their metrics leave the device once at the end, and where a record is due."""
    x, y = make_rows(8)
    told: list[Any] = []
    read: list[Any] = []
    plain = Tensor.tolist

    def counted(tensor: Tensor) -> Any:
        read.append(tensor.shape)
        return plain(tensor)

    fields = {} if interval is None else {"log_hook": told.append, "log_interval": interval}
    trainer = make_trainer([(x, y)] * 8, **fields)
    monkeypatch.setattr(Tensor, "tolist", counted)
    trainer.fit()
    assert len(read) == reads
    assert len(told) == reads - 1


# --- schedulers ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cadence", "steps"),
    [("per_optimizer_update", 4), ("per_batch", 5), ("per_epoch", 2), ("per_validation_metric", 2)],
)
def test_schedulers_step_at_their_cadence(cadence: str, steps: int) -> None:
    """Two epochs of three micro-batches in groups of two; the first batch comes before any update."""
    x, y = make_rows(6)
    trainer = make_trainer(
        list(zip(x.split(2), y.split(2), strict=True)),
        lr=1.0,
        max_epochs=2,
        gradient_accumulation_steps=2,
        scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5),
        scheduler_cadence=cadence,
        val_loader=[(x, y)],
        nonfinite_budget=0,
    )
    trainer.fit()
    assert trainer.optimizer.param_groups[0]["lr"] == 0.5**steps


@pytest.mark.parametrize(("mode", "name"), [("min", "val_loss"), ("max", "val_coverage")])
def test_a_plateau_scheduler_is_told_what_it_minimises(mode: str, name: str) -> None:
    """In mode min the validation loss, in mode max the coverage."""
    x, y = make_rows()
    trainer = make_trainer(
        [(x, y)],
        max_epochs=3,
        scheduler=lambda optimizer: torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode=mode),
        scheduler_cadence="per_validation_metric",
        val_loader=[(x, y)],
    )
    trainer.fit()
    values = [log[name] for log in trainer.val_history]
    assert trainer.scheduler.best == (min(values) if mode == "min" else max(values))


def test_a_scheduler_that_would_never_step_is_said() -> None:
    """A plateau scheduler at another cadence warns; validation cadence without validation is an error."""
    x, y = make_rows()
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau
    with pytest.warns(RuntimeWarning, match="per_validation_metric only"):
        make_trainer([(x, y)], scheduler=plateau)
    with pytest.raises(ValueError, match="needs a val_loader"):
        make_trainer([(x, y)], scheduler=plateau, scheduler_cadence="per_validation_metric")


# --- mixed precision, timing ---------------------------------------------------------------------


def test_mixed_precision_runs_the_model_in_half_and_the_loss_in_full() -> None:
    """On the CPU bfloat16 serves either dtype; the loss sees float32, the weights stay float32."""
    x, y = (part.float() for part in make_rows())
    seen: list[torch.dtype] = []
    model = make_head().float()
    model.head.register_forward_hook(lambda _, __, output: seen.append(output.dtype))

    def loss(outputs: Any, lifted: Any) -> Tensor:
        seen.append(outputs[0].dtype)
        return squared(outputs, lifted)

    trainer = make_trainer([(x, y)], loss, model, mixed_precision=True, max_epochs=30)
    logs = trainer.fit()
    assert seen[:2] == [torch.bfloat16, torch.float32]
    assert trainer.amp_dtype is torch.bfloat16
    assert weights_of(trainer).dtype == torch.float32
    assert logs[-1]["loss"] < 0.5 * logs[0]["loss"]


def test_times_are_measured_where_they_are_spent(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow loader shows in data_time_ms, a slow optimizer in optim_time_ms, both in avg_step_ms."""
    now = [0.0]
    monkeypatch.setattr("scm.training.bench.time.perf_counter", lambda: now[0])
    x, y = make_rows(4)

    class Slow:
        def __iter__(self) -> Iterator[Any]:
            for _ in range(10):
                now[0] += 0.25
                yield x, y

    model = make_head()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.register_step_pre_hook(lambda *_: now.__setitem__(0, now[0] + 0.5))
    model.register_forward_pre_hook(lambda *_: now.__setitem__(0, now[0] + 1.0))
    trainer = make_trainer(Slow(), model=model, optimizer=optimizer, max_epochs=2)
    trainer.fit()
    assert trainer.bench_history == [
        {"epoch": epoch, "avg_step_ms": 1750.0, "data_time_ms": 250.0, "optim_time_ms": 500.0, "batches": 10}
        for epoch in (0, 1)
    ]
    assert trainer.step_time_ms == 1500.0


def test_a_step_time_needs_a_step() -> None:
    """Before the first step there is no step time; after it there is."""
    x, y = make_rows()
    trainer = make_trainer([(x, y)])
    assert math.isnan(trainer.step_time_ms)
    trainer.fit()
    assert trainer.step_time_ms > 0


def test_resident_batches_and_lists_train_alike() -> None:
    """The same rows in the same order give the same weights, however they are served."""
    x, y = make_rows()
    codes = torch.zeros(24, dtype=torch.int64)
    served = make_trainer(TensorBatches(x, lift_semantic_targets(y, codes), 5), max_epochs=2)
    listed = make_trainer(list(zip(x.split(5), y.split(5), strict=True)), max_epochs=2)
    served.fit()
    listed.fit()
    assert torch.equal(weights_of(served), weights_of(listed))
