"""Layers that record their denominators: an epoch's numbers, saturating gradients, all answers by name."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call, grad, stack_module_state, vmap

from scm.core.tags import TRTag
from scm.layers.hybrid_rational import FullyIntegratedRational, HybridTRRational, NearPoleStatistics
from scm.layers.pole_head import PoleHead
from scm.layers.tr_rational import TRRational
from scm.losses.quotient import quotient_loss
from scm.losses.training import LossConfig, SCMTrainingLoss
from scm.training.config import TrainingConfig
from scm.training.hybrid_schedule import HybridGradientSchedule, SaturationHysteresis
from scm.training.loader import TensorBatches
from scm.training.objective import ProjectiveObjective
from scm.training.targets import lift_sentinel_targets, lift_targets
from scm.training.trainer import SCMTrainer

F64 = torch.float64
ALWAYS = HybridGradientSchedule(
    delta_init=0.25, delta_final=0.25, transition_epochs=0, adaptive_delta=False, schedule_type="linear"
)


def tensor(values):
    return torch.tensor(values, dtype=F64)


def hybrid(theta, phi, **settings):
    """A float64 layer with these coefficients; phi begins at k = 1."""
    layer = HybridTRRational(len(theta) - 1, len(phi), **settings).double()
    layer.load_state_dict({"rational.theta": tensor(theta), "rational.phi": tensor(phi)})
    return layer


sizes = st.lists(
    st.one_of(st.floats(-10, 10, width=32), st.sampled_from([0.0, 0.1, -0.1, math.nan, math.inf, -math.inf])),
    max_size=12,
)


# --- what is recorded -----------------------------------------------------------------------------


@settings(max_examples=60)
@given(st.lists(sizes, min_size=1, max_size=4))
def test_an_epochs_numbers_are_those_of_all_its_denominators(batches):
    """Extremes, mean, counts and the newest batch's quantiles are numpy's over the finite |Q|, each once."""
    statistics = NearPoleStatistics(pole_threshold=0.1)
    for batch in batches:
        statistics.record(tensor(batch), 0.05)
    found = statistics.statistics()
    every = np.abs(np.concatenate([np.asarray(batch, dtype=np.float64) for batch in batches]))
    finite = every[np.isfinite(every)]
    assert found["total_gradient_calls"] == every.size
    assert found["not_finite_count"] == every.size - finite.size
    assert found["near_pole_count"] == (finite <= 0.1).sum()
    assert found["saturating_activations"] == (finite <= 0.05).sum()
    assert found["mask_real_activations"] == every.size - finite.size
    if finite.size:
        assert found["q_min"] == finite.min()
        assert found["q_max"] == finite.max()
        assert found["q_mean"] == pytest.approx(finite.mean())
        assert found["near_pole_ratio"] == pytest.approx((finite <= 0.1).mean())
    else:
        assert math.isnan(found["q_min"])
    seen = [batch for batch in batches if batch]
    assert found["batches"] == len(seen)
    if not seen:
        return
    last = np.abs(np.asarray(seen[-1], dtype=np.float64))
    last = last[np.isfinite(last)]
    names = ("q_min_batch", "q_mean_batch", "q_median_batch", "q_p10", "q_p50", "q_p90")
    if not last.size:
        assert all(math.isnan(found[name]) for name in names)
        return
    expected = [last.min(), last.mean(), np.median(last), *np.quantile(last, [0.1, 0.5, 0.9])]
    assert [found[name] for name in names] == pytest.approx(expected)
    g = 1.0 / np.maximum(last, 1e-18)
    assert [found[f"g_p{n}"] for n in (10, 50, 90)] == pytest.approx(np.quantile(g, [0.1, 0.5, 0.9]))
    assert found["near_pole_ratio_batch"] == pytest.approx((last <= 0.1).mean())


def test_the_layer_records_what_its_forward_pass_computed_once():
    """Each denominator of a training pass counts once, by way of the tuple as by way of the value."""
    layer = hybrid([1.0], [-1.0])
    layer.begin_epoch(0)
    x = tensor([0.0, 0.95, 1.0, 3.0])
    layer(x)
    layer.value_and_tag(x)[0][:2].sum().backward()
    found = layer.get_hybrid_statistics()
    assert found["total_gradient_calls"] == 8
    assert (found["q_min"], found["q_max"]) == (0.0, 2.0)
    assert found["near_pole_ratio"] == found["near_pole_ratio_layer"] == 0.5
    assert found["mask_real_activations"] == 2  # the two zeros
    assert found["q_min_current"] == found["q_min_epoch"] == 0.0
    assert found["current_epoch"] == 0


def test_evaluation_transforms_and_untracked_layers_record_nothing():
    """Only training passes outside of `torch.func` transforms count, and only where tracking is on."""
    layer, silent = hybrid([1.0], [-1.0]), hybrid([1.0], [-1.0], track_Q_values=False)
    silent(tensor([0.5]))
    grad(lambda x: layer(x)[0].sum() + layer.value_and_tag(x)[0].sum())(tensor([0.5]))
    layer.eval()
    layer(tensor([0.5]))
    for each in (layer, silent):
        assert each.get_hybrid_statistics()["total_gradient_calls"] == 0


def test_an_epoch_begins_empty_and_the_ones_before_stay_in_the_history():
    """Numbers are of the epoch under way; beginning it again changes nothing; memory is bounded."""
    statistics = NearPoleStatistics()
    for epoch, sizes in enumerate([[1.0, 0.05], [], [3.0]]):
        statistics.begin_epoch(epoch)
        statistics.record(tensor(sizes))
    statistics.begin_epoch(2)
    assert statistics.statistics()["q_min"] == 3.0
    statistics.begin_epoch(3)
    assert math.isnan(statistics.statistics()["q_min"])
    assert all(math.isnan(value) for value in statistics.telemetry().values())
    history = statistics.history()
    assert history["q_min"] == [0.05, 3.0]
    assert history["q_max"] == [1.0, 3.0]
    assert history["near_pole_count"] == [1.0, 0.0]
    assert history["total_count"] == [2.0, 1.0]
    for epoch in range(4, 1200):
        statistics.begin_epoch(epoch)
        statistics.record(tensor([1.0]))
    assert len(statistics.history()["q_min"]) == 1024


def test_telemetry_is_plain_numbers_of_the_epoch():
    """Every value is a float that a row can hold."""
    statistics = NearPoleStatistics(name="first_layer")
    statistics.record(tensor([0.05, 1.0]), 0.07)
    told = statistics.telemetry()
    names = {"q_min", "q_max", "q_mean", "ratio", "saturating_ratio", "flip_rate"}
    assert set(told) == {f"first_layer_{name}" for name in names}
    assert all(isinstance(value, float) for value in told.values())
    assert told["first_layer_saturating_ratio"] == told["first_layer_ratio"] == 0.5


def test_flips_are_counted_with_the_hysteresis():
    """SAT begins at or below q_on, lasts in the band, ends at or above q_off; every change is one flip."""
    statistics = NearPoleStatistics(hysteresis=SaturationHysteresis(q_on=0.1, q_off=0.3))
    states = []
    for q in (1.0, 0.1, 0.2, 0.3, 0.2, 0.05, math.nan):
        statistics.record(tensor([q, q]))
        states.append(statistics.statistics()["saturating_state"])
    assert states == [0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0]
    assert statistics.statistics()["policy_flip_count"] == 3
    assert statistics.telemetry()["near_pole_flip_rate"] == 3 / 7


@settings(max_examples=30)
@given(st.lists(sizes, min_size=2, max_size=5), st.integers(0, 3))
def test_state_taken_anywhere_goes_on_as_if_uninterrupted(batches, cut):
    """Saving and loading between two batches changes no number."""

    def make():
        return NearPoleStatistics(hysteresis=SaturationHysteresis(q_on=0.5, q_off=1.0))

    straight, first, second = make(), make(), make()
    for index, batch in enumerate(batches):
        if index == cut:
            second.load_state_dict(first.state_dict())
            first = second
        for statistics in (straight, first):
            statistics.begin_epoch(index // 2)
            statistics.record(tensor(batch))
    assert first.statistics() == pytest.approx(straight.statistics(), nan_ok=True)
    assert first.history() == straight.history()


@given(sizes, sizes)
def test_the_order_of_rows_does_not_matter(batch, other):
    """Statistics of a batch are those of its rows in any order."""
    straight, turned = NearPoleStatistics(), NearPoleStatistics()
    straight.record(tensor(batch + other))
    turned.record(tensor((batch + other)[::-1]))
    assert straight.statistics() == pytest.approx(turned.statistics(), nan_ok=True)


# --- gradients ------------------------------------------------------------------------------------


@given(st.floats(-3, 3), st.floats(1e-3, 1.0), st.booleans(), st.sampled_from([1.0, 0.1]))
def test_gradients_saturate_within_the_radius_and_are_exact_beyond(p, q, negative, bound):
    """sign(Q)/√(Q²+b²) and −P/(Q²+b²) within it, 1/Q and −P/Q² outside; the value is P/Q in both."""
    q = -q if negative else q
    layer = hybrid([p], [q - 1.0], hybrid_schedule=ALWAYS, hybrid_bound=bound)
    P, Q = (item.detach().requires_grad_() for item in layer(tensor([1.0])))
    value, tag = layer.quotient(P, Q)
    assert tag.item() == TRTag.REAL
    q = Q.item()
    assert value.item() == pytest.approx(p / q)
    value.sum().backward()
    if abs(q) <= 0.25:
        square = q * q + bound * bound
        expected = (math.copysign(1.0, q) / math.sqrt(square), -p / square)
    else:
        expected = (1.0 / q, -p / q**2)
    assert (P.grad.item(), Q.grad.item()) == pytest.approx(expected)


def test_gradients_saturate_inside_of_transforms_too():
    """`grad` and `vmap` give the gradients that backward gives, and leave no tensor of theirs behind."""
    layer = hybrid([1.0, 0.5], [-1.0], hybrid_schedule=HybridGradientSchedule(delta_init=0.5))
    x = tensor([0.2, 0.8, 0.99]).requires_grad_()
    layer.value_and_tag(x)[0].sum().backward()
    delta = layer.hybrid_delta
    inside = vmap(grad(lambda row: layer.value_and_tag(row)[0].sum()))(x.detach().unsqueeze(0))
    assert torch.allclose(inside[0], x.grad)
    assert layer.hybrid_delta is delta


def test_the_radius_is_the_schedules_for_the_epoch_and_the_batch():
    """None while the schedule warms up; then its own, widened where the batch comes near a pole."""
    schedule = HybridGradientSchedule(warmup_epochs=1, transition_epochs=0, delta_init=0.1, delta_final=0.01)
    layer = hybrid([1.0], [-1.0], hybrid_schedule=schedule)
    layer(tensor([0.0]))
    assert layer.hybrid_delta is None
    assert layer.get_hybrid_statistics()["mode_description"] == "warmup"
    layer.begin_epoch(1)
    layer(tensor([0.0, 0.95]))
    assert float(layer.hybrid_delta) == pytest.approx(0.01 * 0.1 / 0.05)
    found = layer.get_hybrid_statistics()
    assert found["local_threshold"] == pytest.approx(0.02)
    assert found["mode_description"] == "converged"
    layer(tensor([0.99]))
    assert layer.get_hybrid_statistics()["saturating_activations"] == 1
    layer(tensor([]))
    assert layer.hybrid_delta == 0.01
    assert hybrid([1.0], [-1.0]).get_hybrid_statistics()["mode_description"] == "mask_real"


def test_the_losses_take_the_radius_and_the_penalty_from_the_layer():
    """With a radius a row at an exact pole moves the coefficients; without one it does not."""
    grads = {}
    for name, schedule in (("hybrid", ALWAYS), ("mask-real", None)):
        layer = hybrid([1.0], [-1.0], hybrid_schedule=schedule, lambda_rej=0.5)
        P, Q = layer(tensor([1.0]))
        loss = quotient_loss(
            P,
            Q,
            *lift_targets(tensor([2.0])),
            lambda_rej=layer.lambda_rej,
            hybrid_delta=layer.hybrid_delta,
        )
        assert loss.item() == 0.5
        loss.backward()
        grads[name] = layer.rational.phi.grad.item()
    assert grads["mask-real"] == 0.0
    assert grads["hybrid"] != 0.0


def test_the_hybrid_layer_says_what_its_rational_layer_says():
    """Regularisation, capability and the shared names are those of the layer inside."""
    layer = hybrid([1.0], [2.0], alpha_phi=0.1)
    assert layer.regularisation().item() == pytest.approx(0.2)
    assert layer.bottom_capability(0.1) == "reachable"
    assert [name for name, _ in layer.named_parameters()] == ["rational.theta", "rational.phi"]
    assert not list(layer.buffers())


# --- in a training --------------------------------------------------------------------------------


def test_the_statistics_go_along_with_a_trainer_epoch_by_epoch(tmp_path):
    """As a companion they begin with each epoch, say its numbers, and go on from a checkpoint."""
    x = torch.linspace(-1, 1, 48)
    targets = lift_sentinel_targets(1.0 / (x - 0.3))

    def make(hook=None):
        layer = HybridTRRational(1, 1, pole_threshold=0.5)
        return SCMTrainer(
            layer,
            torch.optim.Adam(layer.parameters(), lr=0.1),
            ProjectiveObjective(SCMTrainingLoss(LossConfig(lambda_rej=0.0))),
            TensorBatches(x, targets, batch_size=16, generator=torch.Generator().manual_seed(0)),
            config=TrainingConfig(max_epochs=30, log_hook=hook, log_interval=1, learning_rate=0.1),
            companions=[layer.statistics],
        )

    def save(record):
        if record["step"] == 50:
            trainer.save_checkpoint(tmp_path / "middle")

    trainer = make(save)
    told = []
    for _ in trainer.epochs():
        found = trainer.model.get_hybrid_statistics()
        assert found["total_gradient_calls"] == 48
        told.append(trainer.telemetry())
    assert told[0]["near_pole_ratio"] == 0.0  # Q begins near 1 everywhere
    assert told[-1]["near_pole_ratio"] > 0.1
    assert told[-1]["near_pole_q_min"] < 0.2
    assert len(trainer.model.statistics.history()["q_min"]) == 29
    resumed = make()
    resumed.load_checkpoint(tmp_path / "middle")
    resumed.fit()
    assert resumed.telemetry() == pytest.approx(trainer.telemetry(), nan_ok=True)
    assert torch.equal(resumed.model.rational.phi, trainer.model.rational.phi)


# --- everything by name ---------------------------------------------------------------------------


def integrated(**settings):
    torch.manual_seed(0)
    return FullyIntegratedRational(
        HybridTRRational(2, 2, **settings), tag_head=nn.Linear(1, 4), pole_head=PoleHead()
    )


@pytest.mark.parametrize("rational", [TRRational(1, 1), HybridTRRational(1, 1)], ids=["plain", "hybrid"])
@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (0,)])
def test_everything_known_of_an_argument_comes_out_by_name(rational, shape):
    """All seven entries are there in the shape of x, Q_abs always, in training and evaluation."""
    model = FullyIntegratedRational(rational, tag_head=nn.Linear(1, 4), pole_head=PoleHead())
    for training in (True, False):
        found = model.train(training).forward_fully_integrated(torch.ones(shape))
        names = {"output", "tag", "tag_logits", "pole_score", "pole_probability", "Q_value", "Q_abs"}
        assert set(found) == names
        assert found["tag_logits"].shape == (*shape, 4)
        assert all(found[name].shape == shape for name in names - {"tag_logits"})
        assert torch.equal(found["Q_abs"], found["Q_value"].abs())
        assert torch.equal(found["pole_probability"], torch.sigmoid(found["pole_score"]))


def test_the_heads_of_the_integrated_layer_are_trained_with_it():
    """Every weight of the three parts is a parameter and moves under a loss of all entries."""
    model = integrated()
    x = torch.linspace(-1, 1, 16)
    found = model.forward_fully_integrated(x)
    total = found["output"].square().sum() + found["pole_score"].sum() + found["tag_logits"].square().sum()
    total.backward()
    names = {name.split(".")[0] for name, _ in model.named_parameters()}
    assert names == {"rational", "tag_head", "pole_head"}
    assert all((parameter.grad != 0).any() for parameter in model.parameters())
    assert model.rational.get_hybrid_statistics()["total_gradient_calls"] == 16
    assert model.bottom_capability(0.1) == "reachable"


def test_integrated_layers_stack_and_vectorise():
    """A vmapped stack answers what each layer answers, by name."""
    models = [integrated() for _ in range(3)]
    for k, model in enumerate(models):
        nn.init.constant_(model.pole_head.out.bias, float(k))
    x = torch.linspace(-1, 1, 5)
    params, buffers = stack_module_state(models)
    assert not buffers
    P, Q, named = vmap(lambda parameters: functional_call(models[0], parameters, (x,)))(params)
    for k, model in enumerate(models):
        expected = model(x)
        assert torch.allclose(P[k], expected[0])
        assert torch.allclose(Q[k], expected[1])
        assert all(torch.allclose(named[name][k], expected[2][name], atol=1e-6) for name in named)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_step_path_never_waits_for_the_device():
    """On CUDA, answering, recording and shrinking raise nothing where every wait is an error."""
    layer = HybridTRRational(
        3,
        2,
        output_dim=2,
        hybrid_schedule=HybridGradientSchedule(),
        hysteresis=SaturationHysteresis(q_on=0.1, q_off=0.3),
        enable_coprime_regularizer=True,
        lambda_coprime=0.1,
        l1_projection=0.5,
    ).cuda()
    x = torch.rand(32, 2, device="cuda")
    optimizer = torch.optim.Adam(layer.parameters(), fused=True)
    layer.rational.project_after(optimizer)

    def step(epoch):
        layer.begin_epoch(epoch)
        value, tag = layer.value_and_tag(x)
        loss = torch.where(tag == TRTag.REAL, value, 0.0).square().mean() + layer.regularisation()
        loss.backward()
        optimizer.step()

    step(0)  # state moves to the device once
    torch.cuda.set_sync_debug_mode("error")
    try:
        for epoch in (0, 0, 1):
            step(epoch)
        distance = layer.rational.estimate_distance(x)
        q_min = layer.rational.compute_q_min(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(distance).all()
    assert layer.get_hybrid_statistics()["total_gradient_calls"] == 64
    assert q_min.item() == pytest.approx(float(layer.rational(x)[1].detach().abs().min()))


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: NearPoleStatistics(pole_threshold=0.0), "pole_threshold must be finite and > 0"),
        (lambda: HybridTRRational(1, 1, pole_threshold=math.nan), "pole_threshold must be finite"),
        (lambda: HybridTRRational(1, 1, hybrid_bound=0.0), "hybrid_bound must be finite and > 0"),
        (
            lambda: FullyIntegratedRational(
                TRRational(1, 1, output_dim=2), tag_head=nn.Identity(), pole_head=nn.Identity()
            ),
            "rational must act on elements",
        ),
    ],
)
def test_bad_arguments_are_refused(build, message):
    """Each refusal names the rule and the value."""
    with pytest.raises(ValueError, match=message):
        build()
