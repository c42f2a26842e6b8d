"""The hybrid gradient schedule: recorded radii, the batch's own radius, hysteresis, what is said of it."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from scm.losses.training import LossConfig, SCMTrainingLoss
from scm.training.hybrid_schedule import (
    HybridGradientSchedule,
    HybridScheduleCompanion,
    SaturationHysteresis,
    widened_delta,
)
from scm.training.loader import TensorBatches
from scm.training.objective import ProjectiveObjective
from scm.training.targets import lift_sentinel_targets
from scm.training.trainer import SCMTrainer, TrainingConfig

INF, NAN = math.inf, math.nan
radii = st.floats(1e-8, 1.0)


def schedule(**fields: Any) -> HybridGradientSchedule:
    return HybridGradientSchedule(**{"adaptive_delta": False, **fields})


def moment(q: list[float] | torch.Tensor) -> SimpleNamespace:
    """A micro-batch with these denominators."""
    denominators = torch.as_tensor(q, dtype=torch.float64)
    return SimpleNamespace(outputs=(torch.ones_like(denominators), denominators), facts={})


def run(companion: HybridScheduleCompanion, q: list[float], epoch: int = 0) -> Any:
    """Put one micro-batch through all moments; the radius that the loss is told."""
    companion.begin_epoch(epoch, {})
    now = moment(q)
    companion.before_forward(now)
    companion.after_forward(now)
    told = now.facts["hybrid_delta"]
    companion.after_backward(now)
    return told


def test_radii_and_modes_are_those_recorded(vector_group):
    """Every type of schedule, epochs 0 to 60, with and without warm-up, transition and floor."""
    compared = 0
    for case in vector_group("hybrid_gradient_schedule"):
        made = HybridGradientSchedule(**case["config"])
        for epoch, expected in enumerate(case["expected"]):
            delta = made.delta(epoch)
            assert (delta is None) == (expected is None), (case["id"], epoch)
            if expected is not None:
                assert delta == pytest.approx(expected, rel=1e-12), (case["id"], epoch)
            assert made.mode(epoch) == case["modes"][epoch], (case["id"], epoch)
            compared += 1
    assert compared == 8 * 61


@given(
    st.sampled_from(["linear", "cosine", "exponential"]),
    radii,
    radii,
    st.integers(0, 5),
    st.integers(0, 8),
    st.integers(0, 20),
    st.none() | st.floats(allow_nan=True, allow_infinity=True),
)
def test_a_radius_stays_between_its_ends(kind, first, last, warmup, transition, epoch, q_min):
    """Masked in the warm-up, then within the two ends; a batch widens it up to twice the first at most."""
    made = HybridGradientSchedule(
        schedule_type=kind,
        delta_init=first,
        delta_final=last,
        warmup_epochs=warmup,
        transition_epochs=transition,
    )
    plain, adapted = made.delta(epoch), made.delta(epoch, q_min)
    if epoch < warmup:
        assert plain is None
        assert adapted is None
        return
    assert min(first, last) * (1 - 1e-9) <= plain <= max(first, last) * (1 + 1e-9)
    assert adapted >= min(plain, 2 * first)
    assert adapted <= max(plain, 2 * first)


def test_a_small_denominator_widens_the_radius():
    """By 0.1 / |Q| below 0.1, up to twice delta_init; 0 and what is not finite say nothing."""
    made = HybridGradientSchedule(delta_init=1e-2, delta_final=1e-4, transition_epochs=0)
    assert made.delta(0) == 1e-4
    assert made.delta(0, 0.5) == 1e-4
    assert made.delta(0, 0.01) == pytest.approx(1e-3)
    assert made.delta(0, 1e-9) == pytest.approx(2e-2)
    for nothing in (None, 0.0, NAN, INF, -1.0):
        assert made.delta(0, nothing) == 1e-4
    assert schedule(delta_final=1e-4, transition_epochs=0).delta(0, 0.01) == 1e-4


@given(radii, st.floats(allow_nan=True, allow_infinity=True, width=64), radii, radii)
def test_tensors_give_what_numbers_give(base, q_min, widest, least):
    """The form without a wait for the device agrees with plain numbers, whatever the denominator."""
    expected = widened_delta(base, q_min, widest=widest, least=least)
    got = widened_delta(base, torch.tensor(q_min, dtype=torch.float64), widest=widest, least=least)
    assert isinstance(got, torch.Tensor)
    assert float(got) == pytest.approx(expected, rel=1e-9)


def test_many_radii_can_be_computed_in_one_call():
    """The pure form maps over trials: one radius each."""
    base, q_min = torch.tensor([1e-4, 1e-4, 1e-3]), torch.tensor([0.01, 0.5, 1e-9])
    got = torch.func.vmap(lambda b, q: widened_delta(b, q, widest=2e-2, least=1e-8))(base, q_min)
    torch.testing.assert_close(got, torch.tensor([1e-3, 1e-4, 2e-2]))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"warmup_epochs": -1}, "warmup_epochs must be >= 0"),
        ({"transition_epochs": -1}, "transition_epochs must be >= 0"),
        ({"delta_init": 0.0}, "delta_init must be finite and > 0"),
        ({"delta_final": -1e-6}, "delta_final must be finite and > 0"),
        ({"delta_final": INF}, "delta_final must be finite and > 0"),
        ({"min_delta": NAN}, "min_delta must be finite and > 0"),
        ({"schedule_type": "step"}, "schedule_type must be one of linear, cosine, exponential, got 'step'"),
    ],
)
def test_schedules_refuse_what_they_cannot_do(fields, message):
    """Each refusal names the rule and the value."""
    with pytest.raises(ValueError, match=message):
        HybridGradientSchedule(**fields)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"warmup_epochs": 1.5}, "warmup_epochs must be an int"),
        ({"transition_epochs": True}, "transition_epochs must be an int"),
        ({"delta_init": "1e-2"}, "delta_init must be a number"),
        ({"adaptive_delta": 1}, "adaptive_delta must be a bool"),
        ({"enable": None}, "enable must be a bool"),
    ],
)
def test_schedules_refuse_other_types(fields, message):
    """A value that would have to be guessed is refused."""
    with pytest.raises(TypeError, match=message):
        HybridGradientSchedule(**fields)


# --- the companion ----------------------------------------------------------------------------------


def test_the_loss_is_told_the_epochs_radius():
    """None while poles are masked, then the schedule's radius, widened by the very batch it is for."""
    companion = HybridScheduleCompanion(
        HybridGradientSchedule(warmup_epochs=2, delta_init=1e-2, delta_final=1e-4, transition_epochs=2)
    )
    assert run(companion, [1.0, 0.01], epoch=1) is None
    assert float(run(companion, [1.0, -0.5], epoch=2)) == pytest.approx(1e-2)
    assert float(run(companion, [1.0, 0.5], epoch=4)) == pytest.approx(1e-4)
    assert float(run(companion, [1.0, -0.01], epoch=4)) == pytest.approx(1e-3)
    assert float(run(companion, [1.0, NAN, INF], epoch=4)) == pytest.approx(1e-4)


def test_statistics_are_of_the_epoch_and_stay_until_the_next_one():
    """Each denominator counts once, what is not finite not at all, and reading does not clear."""
    companion = HybridScheduleCompanion(schedule(delta_init=0.05, delta_final=0.05), near_pole=0.1)
    for q in ([1.0, 0.05, -0.08, NAN], [0.5, -0.03], [2.0]):
        run(companion, q)
    for _ in range(2):
        said = companion.telemetry()
        assert said["hybrid_delta"] == pytest.approx(0.05)
        assert said["hybrid_q_min"] == 0.03
        assert said["hybrid_saturated_share"] == pytest.approx(2 / 6)
        assert said["near_pole_share"] == pytest.approx(3 / 6)
        assert said["hybrid_flip_rate"] == 0.0
    run(companion, [4.0, 3.0], epoch=1)
    assert companion.telemetry()["hybrid_q_min"] == 3.0
    assert companion.telemetry()["near_pole_share"] == 0.0


def test_before_an_epoch_nothing_is_known():
    """Without a micro-batch, shares are NaN, not 0."""
    said = HybridScheduleCompanion(schedule()).telemetry()
    assert said["hybrid_delta"] == 0.0
    assert math.isnan(said["near_pole_share"])
    assert math.isnan(said["hybrid_q_min"])


def test_while_poles_are_masked_nothing_counts_as_saturated():
    """The share is of what the radius reached; in the warm-up there is none."""
    companion = HybridScheduleCompanion(schedule(warmup_epochs=1))
    run(companion, [0.0, 1.0])
    said = companion.telemetry()
    assert said["hybrid_saturated_share"] == 0.0
    assert said["hybrid_delta"] == 0.0
    assert said["near_pole_share"] == 0.5


def test_many_micro_batches_are_counted_exactly():
    """Put aside and counted in runs of equal sizes, the numbers are those of all denominators together."""
    drawn = torch.Generator().manual_seed(0)
    companion = HybridScheduleCompanion(schedule(delta_init=0.2, delta_final=0.2, transition_epochs=0))
    batches = [torch.rand(n, generator=drawn, dtype=torch.float64) for n in [7] * 70 + [3, 7, 7, 5]]
    for q in batches:
        run(companion, q)
    q = torch.cat(batches)
    said = companion.telemetry()
    assert said["hybrid_q_min"] == float(q.min())
    assert said["hybrid_saturated_share"] == pytest.approx(float((q <= 0.2).double().mean()))
    assert said["near_pole_share"] == pytest.approx(float((q <= 0.1).double().mean()))


def test_a_restored_companion_goes_on_in_mid_epoch():
    """Statistics, state of the hysteresis and flip count are those of an uninterrupted epoch."""
    hysteresis = SaturationHysteresis(q_on=0.1, q_off=0.3)
    batches = [[0.05] * 4, [0.2] * 4, [0.5] * 4, [0.05] * 3, [0.9]]

    def fresh() -> HybridScheduleCompanion:
        return HybridScheduleCompanion(HybridGradientSchedule(), hysteresis=hysteresis)

    whole, first, second = fresh(), fresh(), fresh()
    told = [run(whole, q) for q in batches]
    for q in batches[:2]:
        run(first, q)
    second.load_state_dict(first.state_dict())
    assert [float(run(second, q)) for q in batches[2:]] == [float(delta) for delta in told[2:]]
    assert second.telemetry() == whole.telemetry()


def test_gradients_saturate_only_once_batches_come_near_a_pole():
    """With a hysteresis the radius holds nothing until q is small, and then until q is large again."""
    companion = HybridScheduleCompanion(
        schedule(delta_init=0.01, delta_final=0.01), hysteresis=SaturationHysteresis(q_on=0.1, q_off=0.3)
    )
    seen = [1.0, 0.2, 0.05, 0.2, 0.2, 0.5, 0.2]
    told = [float(run(companion, [q] * 4)) for q in seen]
    assert [delta > 0 for delta in told] == [False, False, False, True, True, True, False]
    assert companion.telemetry()["hybrid_flip_rate"] == pytest.approx(2 / 7)


def test_gradient_sizes_alone_can_begin_and_hold_saturation():
    """A bound on 1/|Q| begins it before the one on |Q| does, and keeps it from ending."""
    hysteresis = SaturationHysteresis(q_on=1e-6, q_off=1e-5, g_on=100.0, g_off=10.0)
    outside, inside = torch.tensor(False), torch.tensor(True)
    assert hysteresis.next_state(outside, torch.full((4,), 0.005))
    assert not hysteresis.next_state(outside, torch.full((4,), 0.05))
    assert hysteresis.next_state(inside, torch.full((4,), 0.05))
    assert not hysteresis.next_state(inside, torch.full((4,), 0.5))


def test_denominators_that_are_not_finite_leave_the_hysteresis_where_it_is():
    """They say nothing of the distance to a pole."""
    hysteresis = SaturationHysteresis(q_on=0.1, q_off=0.3)
    for inside in (True, False):
        after = hysteresis.next_state(torch.tensor(inside), torch.tensor([NAN, INF]))
        assert bool(after) == inside


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"q_on": 0.3, "q_off": 0.1}, "q_on must be <= q_off"),
        ({"q_on": 0.0, "q_off": 0.1}, "q_on must be finite and > 0"),
        ({"q_on": 0.1, "q_off": 0.3, "g_on": 1.0, "g_off": 2.0}, "g_off must be <= g_on"),
        ({"q_on": 0.1, "q_off": 0.3, "g_on": NAN}, "g_on must be finite and > 0"),
    ],
)
def test_hysteresis_refuses_thresholds_that_cross(fields, message):
    """Each refusal names the rule and the value."""
    with pytest.raises(ValueError, match=message):
        SaturationHysteresis(**fields)


def test_a_model_without_denominators_is_refused():
    """A radius on |Q| means nothing for a model that answers one tensor."""
    companion = HybridScheduleCompanion(schedule())
    companion.begin_epoch(0, {})
    now = SimpleNamespace(outputs=torch.ones(3), facts={})
    companion.before_forward(now)
    with pytest.raises(TypeError, match=r"outputs must be \(P, Q\)"):
        companion.after_forward(now)


def test_a_near_pole_of_zero_is_refused():
    """No denominator could be near."""
    with pytest.raises(ValueError, match="near_pole must be finite and > 0"):
        HybridScheduleCompanion(schedule(), near_pole=0.0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_step_path_never_waits_for_the_device():
    """On CUDA, telling radii and counting raise nothing where every wait is an error."""
    companion = HybridScheduleCompanion(
        HybridGradientSchedule(), hysteresis=SaturationHysteresis(q_on=0.1, q_off=0.3)
    )
    q = torch.rand(16, device="cuda")
    run(companion, q)  # state moves to the device once
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            now = SimpleNamespace(outputs=(q, q), facts={})
            companion.before_forward(now)
            companion.after_forward(now)
            companion.after_backward(now)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert companion.telemetry()["hybrid_q_min"] == pytest.approx(float(q.min()))


# --- in a training ----------------------------------------------------------------------------------


class Tuple(nn.Module):
    """Four rows of the same P = 1, each with its own Q as a weight."""

    def __init__(self, q: list[float]) -> None:
        super().__init__()
        self.q = nn.Parameter(torch.tensor(q, dtype=torch.float64))

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(self.q), self.q


def trained(schedule_: HybridGradientSchedule | None, *, epochs: int = 1, **more: Any) -> SCMTrainer:
    """Train Q = 1e-3, -1e-3, 0.5 and -0.5 towards P/Q = 2 by the quotient alone, at a threshold of 0.01."""
    model = Tuple([1e-3, -1e-3, 0.5, -0.5])
    nothing = LossConfig(lambda_margin=0.0, lambda_sign=0.0, lambda_rej=0.0)
    data = TensorBatches(
        torch.arange(4), lift_sentinel_targets(torch.full((4,), 2.0, dtype=torch.float64)), 4
    )
    companions = [] if schedule_ is None else [HybridScheduleCompanion(schedule_, **more)]
    trainer = SCMTrainer(
        model,
        torch.optim.SGD(model.parameters(), lr=0.01),
        ProjectiveObjective(SCMTrainingLoss(nothing), fit="quotient"),
        data,
        config=TrainingConfig(
            max_epochs=epochs, tau_train_min=0.01, tau_train_max=0.01, coverage_threshold=0.0
        ),
        companions=companions,
    )
    trainer.fit()
    return trainer


def moved(trainer: SCMTrainer) -> list[bool]:
    """Which of the four denominators have moved."""
    begun = torch.tensor([1e-3, -1e-3, 0.5, -0.5], dtype=torch.float64)
    return (trainer.model.q.detach() != begun).tolist()


def test_the_schedule_reaches_the_gradients():
    """Rows at the pole are masked without it and move with it; those away from poles train alike."""
    plain = trained(None)
    hybrid = trained(schedule(delta_init=0.05, delta_final=0.05))
    assert moved(plain) == [False, False, False, True]  # 1 / 0.5 is right already
    assert moved(hybrid) == [True, True, False, True]
    assert hybrid.model.q[3] == plain.model.q[3]
    said = hybrid.telemetry()
    assert said["hybrid_saturated_share"] == 0.5
    assert said["near_pole_share"] == 0.5
    assert said["hybrid_q_min"] == pytest.approx(1e-3)


def test_while_it_warms_up_a_training_is_one_without_it():
    """Masked poles train as they do where nobody asked for a schedule; what follows differs."""
    short = trained(schedule(warmup_epochs=2, delta_init=0.05), epochs=2)
    assert torch.equal(short.model.q, trained(None, epochs=2).model.q)
    longer = trained(schedule(warmup_epochs=2, delta_init=0.05), epochs=3)
    assert moved(longer)[:2] == [True, True]


def test_a_hysteresis_that_is_never_entered_is_a_training_without_the_schedule():
    """A radius that holds nothing masks poles as no radius does."""
    far = SaturationHysteresis(q_on=1e-9, q_off=1e-8)
    held = trained(schedule(delta_init=0.05), epochs=3, hysteresis=far)
    assert torch.equal(held.model.q, trained(None, epochs=3).model.q)
    entered = trained(
        schedule(delta_init=0.05), epochs=3, hysteresis=SaturationHysteresis(q_on=0.1, q_off=0.2)
    )
    assert moved(entered)[:2] == [True, True]
