"""From what a loader gives to what model and loss see: forms of batches, and rows that may not be trained."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scm.losses.training import LossConfig, SCMTrainingLoss
from scm.training.feed import Feeder, LossCall, bottom_is_unreachable
from scm.training.objective import ProjectiveObjective
from scm.training.targets import STATUSES, SemanticTargets, lift_semantic_targets, lift_targets
from scm.training.trainer import SCMTrainer, TrainingConfig

CPU = torch.device("cpu")


def naming(outputs: Any, lifted: Any, *, semantic_targets: Any) -> Tensor:
    """A loss that masks by statuses."""
    return (outputs[0] - lifted[0]).square()[semantic_targets.mask_trained].mean()


def taking_any(outputs: Any, lifted: Any, **facts: Any) -> Tensor:
    """A loss that takes everything and looks at nothing."""
    return (outputs[0] - lifted[0]).square().mean()


def plain(outputs: Any, lifted: Any) -> Tensor:
    """A loss that knows of no statuses."""
    return (outputs[0] - lifted[0]).square().mean()


def feeder(loss: Any, unreachable: bool = False) -> Feeder:
    return Feeder(LossCall(loss), CPU, unreachable=unreachable)


X = torch.arange(14.0).reshape(7, 2)
Y = torch.arange(7.0)
ALL = torch.arange(7)


@pytest.mark.parametrize(
    "labels", [list(STATUSES), ALL, ALL.to(torch.int32)], ids=["words", "codes", "int32 codes"]
)
def test_labels_are_words_or_codes(labels: Any) -> None:
    """Both lift to the same targets, and to those that were lifted before."""
    fed = feeder(naming).prepare((X, Y, labels))
    lifted = lift_semantic_targets(Y, ALL)
    again = feeder(naming).prepare((X, lifted))
    assert fed is not None
    assert again is not None
    for name in ("Y_n", "Y_d", "mask_finite", "mask_bottom", "orientation_label", "bottom_kind"):
        assert torch.equal(getattr(fed.semantic, name), getattr(lifted, name))
    assert again.semantic is lifted
    assert torch.equal(fed.lifted[0], again.lifted[0])


@pytest.mark.parametrize("sentinel", [None, float("nan"), float("inf"), -float("inf")])
def test_plain_targets_are_lifted(sentinel: float | None) -> None:
    """Finite or not, as lift_targets says; the shortcut for finite ones changes nothing."""
    y = Y.clone()
    if sentinel is not None:
        y[3] = sentinel
    fed = feeder(plain).prepare((X, y))
    assert fed is not None
    expected = lift_targets(y)
    assert torch.equal(fed.lifted[0], expected[0])
    assert torch.equal(fed.lifted[1], expected[1])
    assert fed.semantic is None


def test_targets_whose_sum_overflows_are_still_finite() -> None:
    """The shortcut is not fooled in either direction."""
    y = torch.full((7,), 3e38)
    fed = feeder(plain).prepare((X, y))
    assert fed is not None
    assert torch.equal(fed.lifted[1], torch.ones(7))


def calls_them_targets(outputs: Any, targets: Any) -> Tensor:
    """A loss whose parameter has the name of a fact."""
    return (outputs[0] - targets[0]).square().mean()


def calls_them_targets_and_takes_any(outputs: Any, targets: Any, **facts: Any) -> Tensor:
    """The same, told everything else."""
    assert "targets" not in facts
    return calls_them_targets(outputs, targets)


@pytest.mark.parametrize("loss", [calls_them_targets, calls_them_targets_and_takes_any])
def test_the_lifted_targets_may_be_called_targets(loss: Any) -> None:
    """The first two parameters are given by position alone, whatever they are called."""
    fed = feeder(loss).prepare((X, Y))
    assert fed is not None
    facts = {"tau": 1e-4, "epoch": 0, "global_step": 0, "loss_weights": {}}
    assert float(LossCall(loss)((Y, Y), fed, facts)) == 0


@pytest.mark.parametrize(
    "batch",
    [X, (X,), (X, Y, ALL, ALL), (X, [1.0] * 7), {"x": X, "y": Y}, (X, lift_semantic_targets(Y, ALL), ALL)],
    ids=["tensor", "one", "four", "list targets", "mapping", "labels twice"],
)
def test_other_batches_are_refused(batch: Any) -> None:
    """What is no batch is a TypeError that says what would be one."""
    with pytest.raises(TypeError, match="must be"):
        feeder(naming).prepare(batch)


def test_a_loss_that_names_the_statuses_sees_all_rows() -> None:
    """It masks by itself."""
    fed = feeder(naming).prepare((X, Y, ALL))
    assert fed is not None
    assert fed.rows == 7


def test_a_loss_that_takes_anything_sees_no_row_that_may_not_be_trained() -> None:
    """Rows labelled missing or fault are left out before the model runs; the peer trains them as 0."""
    fed = feeder(taking_any).prepare((X, Y, ALL))
    assert fed is not None
    kept = torch.tensor([0, 1, 2, 3, 4])
    assert torch.equal(fed.inputs, X[kept])
    assert torch.equal(fed.targets, Y[kept])
    assert isinstance(fed.semantic, SemanticTargets)
    assert torch.equal(fed.semantic.Y_n, lift_semantic_targets(Y, ALL).Y_n[kept])
    assert feeder(taking_any).prepare((X, Y, torch.full((7,), 5))) is None


@pytest.mark.parametrize("code", [5, 6], ids=["missing", "fault"])
def test_a_loss_without_statuses_refuses_rows_that_may_not_be_trained(code: int) -> None:
    """It could not tell them from finite zeros or from bottoms."""
    codes = torch.zeros(7, dtype=torch.int64)
    codes[2] = code
    with pytest.raises(ValueError, match="loss_fn must take semantic_targets"):
        feeder(plain).prepare((X, Y, codes))
    assert feeder(plain).prepare((X, Y, torch.zeros(7, dtype=torch.int64))) is not None


def test_outputs_that_are_missing_one_by_one_need_masks() -> None:
    """A row whose second output is missing can neither be kept nor left out."""
    codes = torch.zeros(7, 2, dtype=torch.int64)
    codes[3, 1] = 5
    values = torch.zeros(7, 2)
    with pytest.raises(ValueError, match="must name semantic_targets"):
        feeder(taking_any).prepare((X, values, codes))
    codes[3, 0] = 6
    fed = feeder(taking_any).prepare((X, values, codes))
    assert fed is not None
    assert fed.rows == 6


class Line(nn.Module):
    """P = x . w, Q = 1 + x . v."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.5, -0.5]))
        self.v = nn.Parameter(torch.tensor([0.1, 0.1]))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x @ self.w, 1 + x @ self.v


@pytest.mark.parametrize(
    "loss",
    [
        taking_any,
        ProjectiveObjective(SCMTrainingLoss(LossConfig(coverage_term="soft", lambda_push_up=1.0))),
        ProjectiveObjective(
            SCMTrainingLoss(LossConfig(lambda_push_down=1.0, lambda_push_up=1.0)), fit="implicit"
        ),
    ],
    ids=["any", "projective", "implicit"],
)
@pytest.mark.parametrize("code", [5, 6], ids=["missing", "fault"])
def test_values_of_rows_that_may_not_be_trained_do_not_matter(loss: Any, code: int) -> None:
    """Whatever inputs such rows have, the weights are the same."""
    codes = torch.zeros(7, dtype=torch.int64)
    codes[2:4] = code
    trained = []
    for shift in (0.0, 50.0):
        x = X.clone() / 10
        x[2:4] += shift
        model = Line()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        config = TrainingConfig(max_epochs=3, coverage_threshold=0.0)
        SCMTrainer(model, optimizer, loss, [(x, Y, codes)], config=config).fit()
        trained.append(torch.cat([model.w.detach(), model.v.detach()]))
    assert torch.equal(*trained)


class Capable(nn.Module):
    """A module that says what it is told to say."""

    def __init__(self, answer: str) -> None:
        super().__init__()
        self.answer = answer
        self.w = nn.Parameter(torch.zeros(()))

    def bottom_capability(self, tau_infer: float) -> str:
        return self.answer

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x[:, 0] * self.w, torch.ones(len(x))


def test_capabilities_of_modules_are_asked() -> None:
    """The model's own answer counts, else any module's; an unknown word is an error."""
    cannot = Capable("unreachable_by_construction")
    assert bottom_is_unreachable(cannot, 1e-6)
    assert bottom_is_unreachable(nn.Sequential(nn.Linear(1, 1), cannot), 1e-6)
    assert not bottom_is_unreachable(Capable("reachable"), 1e-6)
    assert not bottom_is_unreachable(nn.Linear(1, 1), 1e-6)
    with pytest.raises(ValueError, match="got 'perhaps' of Capable"):
        bottom_is_unreachable(Capable("perhaps"), 1e-6)


@pytest.mark.parametrize("labelled", [True, False])
def test_bottoms_that_a_head_cannot_reach_are_refused(labelled: bool) -> None:
    """Before the first step, unless allowed."""
    y = Y.clone()
    y[1] = float("nan")
    batch = (X, y, ["finite", "bottom", *["finite"] * 5]) if labelled else (X, y)
    calls: list[int] = []

    def loss(outputs: Any, lifted: Any, *, semantic_targets: Any) -> Tensor:
        calls.append(1)
        return outputs[0].square().mean()

    def trainer(**fields: Any) -> SCMTrainer:
        model = Capable("unreachable_by_construction")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        config = TrainingConfig(coverage_threshold=0.0, **fields)
        return SCMTrainer(model, optimizer, loss, [batch], config=config)

    with pytest.raises(ValueError, match="cannot reach"):
        trainer().fit()
    assert calls == []
    assert len(trainer(allow_bottom_unreachable=True).fit()) == 1
