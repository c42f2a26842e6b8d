"""Drawing rows near poles more often: what is drawn, what undoes it, what it learns from, how it resumes."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scm.training.loader import TensorBatches
from scm.training.near_pole import NearPoleBatches, NearPoleFeedback
from scm.training.sampler import AdaptiveSamplerConfig
from scm.training.targets import STATUS_CODES, SemanticTargets, lift_semantic_targets
from scm.training.trainer import SCMTrainer, TrainingConfig

POLE = 0.3


def pole_rows(rows: int = 40) -> tuple[Tensor, SemanticTargets]:
    """y = 1 / (x - 0.3) on a grid, the rows nearest to the pole without a value."""
    x = torch.linspace(-1, 1, rows, dtype=torch.float64)
    codes = torch.where((x - POLE).abs() < 0.06, STATUS_CODES["bottom"], STATUS_CODES["finite"])
    return x[:, None], lift_semantic_targets(1 / (x - POLE), codes)


def batches(rows: int = 40, *, seed: int = 0, correct: bool = False, **config: Any) -> NearPoleBatches:
    settings = {"batch_size": 8, "normalized": True, "gamma": 1.0, **config}
    return NearPoleBatches(*pole_rows(rows), AdaptiveSamplerConfig(**settings), seed=seed, correct=correct)


def drawn(loader: NearPoleBatches) -> Tensor:
    """The rows of one epoch."""
    return torch.cat([batch[2]["indices"] for batch in loader])


def test_batches_are_the_rows_that_they_name():
    """Inputs and every field of the targets are those of the rows at the indices, also in a short batch."""
    loader = batches(rows=37)
    seen = 0
    for x, targets, extras in loader:
        indices = extras["indices"]
        assert torch.equal(x, loader.inputs[indices])
        expected = loader.targets.index(indices)
        for name in ("Y_n", "Y_d", "mask_finite", "mask_bottom", "mask_trained", "mask_semantic"):
            assert torch.equal(getattr(targets, name), getattr(expected, name)), name
        assert set(extras) == {"indices"}
        seen += len(x)
    assert seen == 37
    assert len(loader) == 5


def test_rows_that_nothing_is_known_of_are_drawn_alike():
    """Before the first answer all weights are 1, bottoms included."""
    assert torch.equal(batches().sampler.weights, torch.ones(40))


def test_finite_rows_near_a_pole_are_drawn_more_often():
    """So are bottoms that the model answers; what is answered as it should be keeps its weight."""
    loader = batches(alpha=4.0, beta=0.02)
    x, bottom = loader.inputs[:, 0], loader.targets.mask_semantic
    q = torch.where(x > 0, x - POLE, 1.0)
    q[bottom.nonzero()[0]] = 1.0
    loader.observe(q, torch.arange(40))
    weights = loader.sampler.weights
    near = (q.abs() < 0.1) & ~bottom
    assert near.sum() >= 2
    assert (weights[near] > 1.04).all()
    assert weights[bottom.nonzero()[0]] > 4.9
    assert (weights[(q.abs() > 0.3) & ~bottom] < 1.001).all()
    counts = torch.bincount(torch.cat([drawn(loader) for _ in range(400)]), minlength=40) / 400
    assert torch.allclose(counts, (weights / weights.mean()).double().to(counts.dtype), atol=0.35)


def test_importance_weights_give_the_plain_mean_back():
    """The mean of weight times loss over what is drawn estimates the mean over all rows."""
    loader = batches(alpha=8.0, correct=True, beta=0.1)
    loss = 0.1 / ((loader.inputs[:, 0] - POLE).abs() + 0.1)  # larger near the pole, as losses are
    loader.observe(loader.inputs[:, 0] - POLE, torch.arange(40))
    plain, weighted, count = 0.0, 0.0, 0
    for _ in range(200):
        for _, _, extras in loader:
            rows = loss[extras["indices"]]
            plain += float(rows.sum())
            weighted += float((extras["row_weights"] * rows).sum())
            count += len(rows)
    assert weighted / count == pytest.approx(float(loss.mean()), abs=0.01)
    assert abs(plain / count - float(loss.mean())) > 0.02


def test_a_row_that_comes_twice_counts_once_with_its_larger_probability():
    """Sampling with replacement puts a row into a batch twice; the order of the two does not matter."""
    one, other = batches(gamma=0.5), batches(gamma=0.5)
    q, rows = torch.tensor([0.0, 1.0, 0.5]), torch.tensor([3, 3, 4])
    one.observe(q, rows)
    other.observe(q.flip(0), rows.flip(0))
    assert torch.equal(one.sampler.weights, other.sampler.weights)
    assert one.sampler.weights[3] == 2.0


def test_the_first_answer_counts_whole_and_later_ones_by_the_memory():
    """After one epoch weights mean something, however long the memory is."""
    loader = batches(gamma=0.25, beta=1e-3)
    row = torch.tensor([0])
    loader.observe(torch.zeros(1), row)
    assert loader.sampler.weights[0] == 2.0
    loader.observe(torch.ones(1), row)
    assert loader.sampler.weights[0] == pytest.approx(1.75)


def test_denominators_that_are_not_numbers_are_certain_poles():
    """They decode as bottom; weights stay finite for ever after."""
    loader = batches()
    finite = int(loader.targets.mask_finite.nonzero()[0])
    loader.observe(torch.tensor([math.nan]), torch.tensor([finite]))
    assert loader.sampler.weights[finite] == 2.0
    loader.observe(torch.full((40,), math.inf), torch.arange(40))
    assert torch.isfinite(loader.sampler.weights).all()


def test_rows_that_may_not_be_trained_are_never_preferred():
    """Missing and fault rows keep weight 1, whatever the model answers on them."""
    x = torch.zeros(4, 1)
    labels = ["finite", "missing", "fault", "bottom"]
    loader = NearPoleBatches(
        x, lift_semantic_targets(torch.zeros(4), labels), AdaptiveSamplerConfig(gamma=1.0, normalized=True)
    )
    for q in (0.0, 1.0):
        loader.observe(torch.full((4,), q), torch.arange(4))
        assert loader.sampler.weights[1:3].tolist() == [1.0, 1.0]
    assert loader.sampler.weights[3] > 1.9


def test_the_smallest_of_several_denominators_counts():
    """A row of several outputs is as near to a pole as the nearest of them; one bottom makes it one."""
    values = torch.zeros(2, 2)
    codes = torch.tensor([[0, 0], [0, STATUS_CODES["bottom"]]])
    loader = NearPoleBatches(
        torch.zeros(2, 1),
        lift_semantic_targets(values, codes),
        AdaptiveSamplerConfig(gamma=1.0, normalized=True, tau_train=0.0),
    )
    loader.observe(torch.tensor([[1.0, 0.0], [1.0, -0.0]]), torch.arange(2))
    assert loader.sampler.weights.tolist() == [2.0, 1.0]


@pytest.mark.parametrize("correct", [False, True])
@pytest.mark.parametrize("read", [0, 1, 3, 5])
def test_an_epoch_goes_on_where_it_was_left(read, correct):
    """After any batch, also the last: the rows that were left, their weights, and the epoch after."""
    loader = batches(correct=correct)
    loader.observe(loader.inputs[:, 0] - POLE, torch.arange(40))

    def epoch(iterator: Any) -> list[Any]:
        return [{name: part.tolist() for name, part in batch[2].items()} for batch in iterator]

    iterator = iter(loader)
    for _ in range(read):
        next(iterator)
    loader.observe(torch.zeros(4), torch.arange(4))  # acts on the next epoch alone
    state = loader.state_dict()
    expected = (epoch(iterator) if read else []) + epoch(loader)
    restored = batches(correct=correct, seed=9)
    restored.load_state_dict(state)
    assert (epoch(restored) if read else []) + epoch(restored) == expected


def test_the_same_seed_draws_the_same_rows_and_nothing_else_moves():
    """The global stream is left alone."""
    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert torch.equal(drawn(batches(seed=5)), drawn(batches(seed=5)))
    assert not torch.equal(drawn(batches(seed=5)), drawn(batches(seed=6)))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"rows": 39}, "rows must be as saved"),
        ({"batch_size": 4}, "batch_size must be as saved"),
        ({"drop_last": True}, "drop_last must be as saved"),
        ({"correct": True}, "correct must be as saved"),
    ],
)
def test_a_state_of_other_batches_is_refused(change, message):
    """Each refusal names what differs."""
    with pytest.raises(ValueError, match=message):
        batches(**change).load_state_dict(batches().state_dict())


# --- in a training ----------------------------------------------------------------------------------


class Line(nn.Module):
    """P = a + b x, Q = c + d x, of length 1."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(1, 2, dtype=torch.float64)
        with torch.no_grad():
            self.line.weight.copy_(torch.tensor([[0.1], [0.5]]))
            self.line.bias.copy_(torch.tensor([0.5, 0.1]))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        P, Q = nn.functional.normalize(self.line(x), dim=-1).unbind(-1)
        return P, Q


def cross(outputs: Any, lifted: Any, *, semantic_targets: SemanticTargets) -> Tensor:
    """The mean squared cross product."""
    (P, Q), (Y_n, Y_d) = outputs, lifted
    return ((P * Y_d - Q * Y_n).square() / (Y_n.square() + Y_d.square())).mean()


def training(loader: Any, *, epochs: int = 3, feedback: bool = True, **fields: Any) -> SCMTrainer:
    model = Line()
    companions = [NearPoleFeedback(loader)] if feedback else []
    config = TrainingConfig(max_epochs=epochs, coverage_threshold=0.0, **fields)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return SCMTrainer(model, optimizer, cross, loader, config=config, companions=companions)


def test_a_training_teaches_its_sampler_where_the_poles_are():
    """Each row's weight follows from the model's own |Q| on it, and rows near its zero are drawn more."""
    trainer = training(batches(alpha=4.0, beta=0.05), epochs=12)
    trainer.fit()
    loader = trainer.train_loader
    with torch.no_grad():
        q = trainer.model(loader.inputs)[1].abs()
    finite = loader.targets.mask_finite
    weights = loader.sampler.weights.double()
    nearest = q[finite] <= q[finite].quantile(0.1)
    assert weights[finite][nearest].mean() > 1.3 * weights[finite][q[finite] > 0.5].mean()
    said = trainer.telemetry()
    assert 0 < said["sampling_effective_share"] < 1
    assert said["sampling_weight_max"] > 1


def test_before_it_has_learned_anything_all_rows_are_worth_the_same():
    """What it says then is said of equal weights."""
    assert NearPoleFeedback(batches()).telemetry() == {
        "sampling_effective_share": 1.0,
        "sampling_weight_max": 1.0,
    }


def test_near_pole_rows_change_the_training():
    """The gradients are others than those of rows drawn alike."""
    near, alike = training(batches(alpha=4.0)), training(batches(alpha=4.0), feedback=False)
    near.fit()
    alike.fit()
    assert not torch.equal(near.model.line.weight, alike.model.line.weight)


@pytest.mark.parametrize("correct", [False, True])
@pytest.mark.parametrize("stop_at", [3, 7, 10])
def test_a_training_resumes_bit_for_bit_in_mid_epoch(tmp_path, stop_at, correct):
    """Weights, draws and what the sampler knows are those of a training that was never interrupted."""

    def weighed(outputs: Any, lifted: Any, *, semantic_targets: Any, row_weights: Any = None) -> Tensor:
        (P, Q), (Y_n, Y_d) = outputs, lifted
        loss = (P * Y_d - Q * Y_n).square() / (Y_n.square() + Y_d.square())
        return (loss if row_weights is None else loss * row_weights).mean()

    def make(**fields: Any) -> SCMTrainer:
        model = Line()
        loader = batches(alpha=3.0, correct=correct)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
        config = TrainingConfig(max_epochs=4, coverage_threshold=0.0, seed=1, **fields)
        return SCMTrainer(
            model, optimizer, weighed, loader, config=config, companions=[NearPoleFeedback(loader)]
        )

    def save(record: Any) -> None:
        if record["step"] == stop_at:
            whole.save_checkpoint(tmp_path / "mid.pt")

    whole = make(log_hook=save)
    whole.fit()
    resumed = make(log_hook=lambda record: None)
    resumed.load_checkpoint(tmp_path / "mid.pt")
    resumed.fit()
    assert torch.equal(resumed.model.line.weight, whole.model.line.weight)
    assert torch.equal(resumed.train_loader.sampler.weights, whole.train_loader.sampler.weights)
    assert torch.equal(drawn(resumed.train_loader), drawn(whole.train_loader))
    assert resumed.train_history == whole.train_history


def test_a_loader_that_does_not_name_its_rows_is_refused():
    """Otherwise nothing would ever be learned of them, and nobody would notice."""
    plain = TensorBatches(*pole_rows(), 8)
    trainer = SCMTrainer(
        model := Line(),
        torch.optim.SGD(model.parameters(), lr=0.1),
        cross,
        plain,
        config=TrainingConfig(coverage_threshold=0.0),
        companions=[NearPoleFeedback(batches())],
    )
    with pytest.raises(ValueError, match="needs batches with"):
        trainer.fit()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_step_path_never_waits_for_the_device():
    """On CUDA, taking in answers raises nothing where every wait is an error."""
    loader = NearPoleBatches(*pole_rows(), AdaptiveSamplerConfig(), device="cuda")
    feedback = NearPoleFeedback(loader)
    iterator = iter(loader)
    first = next(iterator)
    q = first[0][:, 0]
    moment = SimpleNamespace(fed=SimpleNamespace(extras=first[2]), outputs=(q, q), found={})
    torch.cuda.set_sync_debug_mode("error")
    try:
        feedback.after_backward(moment)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert loader.sampler.weights.device.type == "cuda"
    assert float(loader.sampler.weights.max()) > 1.0
