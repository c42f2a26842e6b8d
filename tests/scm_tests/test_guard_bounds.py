"""Bounds: what they let through, what they send back, and the guards of a training that use them."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from scm.data import Split
from scm.guards.bounds import BOUND_FORMS, bound, check_gain, gain_at, saturation_penalty, soft_clamp_logits
from scm.guards.range import RangeGuard, SaturationGuard
from scm.guards.spread import SpreadGuard, projective_residual
from scm.losses.terms import LossTerms
from scm.models import make_model
from scm.training.companion import Moment
from scm.training.targets import STATUS_CODES, lift_semantic_targets
from scm.trial import make_trainer
from scm.trial_config import TrialConfig

NAN, INF = float("nan"), float("inf")
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
FORMS = sorted(BOUND_FORMS)

finite = st.floats(-1e6, 1e6, width=32)
limits = st.floats(0.5, 1e3, width=32)


@pytest.mark.parametrize("form", FORMS)
@given(x=finite, y=finite, limit=limits)
def test_a_bound_holds_keeps_signs_and_order(form, x, y, limit):
    """Nothing leaves [-limit, limit], no value changes sides, and a larger one stays at least as large."""
    values = torch.tensor([x, y])
    bounded = bound(values, limit, form)
    assert (bounded.abs() <= limit).all()
    assert (bounded * values >= 0).all()
    assert bool(bounded[0] <= bounded[1]) or x > y or bool((bounded[0] - bounded[1]).abs() <= 1e-6 * limit)
    inner = values.abs() <= (limit if form != "soft" else 0.5 * limit)
    assert torch.equal(bounded[inner], values[inner])


@given(x=finite, limit=limits)
def test_a_soft_bound_lets_a_gradient_of_at_most_one_through_everywhere(x, limit):
    """However far out a value is, it is pulled back, and never faster than it would be without a bound."""
    (gain,) = gain_at(lambda values: bound(values, limit, "soft"), torch.tensor([x]))
    assert 0 < gain <= 1.0001


GAINS = {  # at 0, below, at and above a limit of 50, and far beyond it
    "hard": [1.0, 1.0, 1.0, 0.0, 0.0, 0.0],
    "soft": [1.0, 1.0, 0.25, 625 / 51**2, 625 / 90**2, 6.25e-10],
    "straight_through": [1.0, 1.0, 1.0, 1.0, 1.0, 1.0],
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_gradients_at_and_beyond_the_limit(form, sign):
    """Only the hard form has none beyond the limit."""
    points = torch.tensor([0.0, 25.0, 50.0, 51.0, 90.0, 1e6]) * sign
    gains = gain_at(lambda x: bound(x, 50.0, form), points)
    torch.testing.assert_close(gains, torch.tensor(GAINS[form]))


def test_where_values_must_come_back_the_form_is_checked_before_the_training():
    """The check names the value at which the gradient is gone."""
    points = torch.tensor([0.0, 80.0, -90.0])
    check_gain(lambda x: bound(x, 50.0, "soft"), points)
    check_gain(lambda x: bound(x, 50.0, "straight_through"), points)
    with pytest.raises(ValueError, match="finite and not 0 .* got 0.0 at 80.0"):
        check_gain(lambda x: bound(x, 50.0, "hard"), points)
    with pytest.raises(ValueError, match="got inf at 0.0"):
        check_gain(torch.sqrt, torch.zeros(1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_a_bound_keeps_the_dtype_and_its_own_whatever_the_limit_is(form, dtype):
    """A limit may be a number or a 0-d tensor of another precision, one per trial of a pack later."""
    x = torch.tensor([-90.0, 0.5, 80.0], dtype=dtype)
    given = [50.0, torch.tensor(50.0), torch.tensor(50.0, dtype=torch.float64)]
    bounded = [bound(x, limit, form) for limit in given]
    assert all(item.dtype == dtype for item in bounded)
    assert torch.equal(bounded[0], bounded[1])
    assert torch.equal(bounded[0], bounded[2])


@pytest.mark.parametrize("form", FORMS)
def test_values_that_are_not_finite_contaminate_nothing(form):
    """Infinities become the limit, NaN stays, and no NaN is sent back to others or for infinities."""
    x = torch.tensor([INF, -INF, NAN, 1.0], requires_grad=True)
    bounded = bound(x, 50.0, form)
    assert bounded[:2].tolist() == [50.0, -50.0]
    assert bounded[2].isnan()
    (gradient,) = torch.autograd.grad(torch.where(x.detach().isnan(), 0.0, bounded).sum(), x)
    assert gradient.isfinite().all()
    assert gradient[2] == 0


@pytest.mark.parametrize("form", FORMS)
def test_each_trial_of_a_pack_has_its_own_limit(form):
    """Bounds and their gradients are vectorised over values and limits together."""
    x, limit = torch.linspace(-9.0, 9.0, 12).reshape(3, 4), torch.tensor([1.0, 2.0, 5.0])
    slope = torch.func.grad(lambda row, at: bound(row, at, form).sum())
    for row in range(3):
        alone = bound(x[row], float(limit[row]), form)
        assert torch.equal(torch.vmap(lambda a, b: bound(a, b, form))(x, limit)[row], alone)
        expected = gain_at(lambda values, row=row: bound(values, float(limit[row]), form), x[row])
        torch.testing.assert_close(torch.vmap(slope)(x, limit)[row], expected)


def test_the_recorded_soft_clamp_is_kept_by_name(guard_vectors):
    """Values and gradients are as recorded: the slope jumps to 2 at the threshold and is 0 far out."""
    (case,) = guard_vectors["soft_clamp_logits"]
    x = torch.tensor(case["x"])
    clamped = soft_clamp_logits(x, case["threshold"], case["max_val"])
    torch.testing.assert_close(clamped, torch.tensor(case["out"]), equal_nan=True, rtol=2e-5, atol=2e-6)
    known = ~x.isnan()
    recorded = torch.tensor(case["upstream_grad_of_sum"])[known]
    torch.testing.assert_close(gain_at(soft_clamp_logits, x)[known], recorded, rtol=2e-5, atol=2e-6)
    assert gain_at(soft_clamp_logits, torch.tensor([50.0, 50.001, 400.0])).tolist() == [
        1.0,
        pytest.approx(2.0),
        0.0,
    ]
    assert gain_at(lambda x: bound(x, 100.0, "soft"), torch.tensor([50.001, 400.0])).tolist() == [
        pytest.approx(1.0, abs=1e-3),
        pytest.approx(2500 / 400**2),
    ]


def test_a_bound_in_the_loss_need_not_undo_a_soft_clamp_in_the_model():
    """Hard, it freezes all that the soft clamp would have let come back; the other forms do not."""
    logits = torch.tensor([60.0, -75.0, 90.0])
    gains = {
        form: gain_at(lambda x, form=form: bound(soft_clamp_logits(x), 50.0, form), logits) for form in FORMS
    }
    assert (gains["hard"] == 0).all()
    assert (gains["soft"] > 0.01).all()
    assert (gains["straight_through"] > 0.01).all()


# --- saturation -------------------------------------------------------------------------------------


def test_saturation_is_the_mean_excess_with_a_gradient_at_any_distance():
    """Its pull on a logit does not fade where that of a sigmoid is 0 exactly."""
    logits = torch.tensor([[-90.0, 80.0], [3.0, -5.0]], requires_grad=True)
    penalty = saturation_penalty(logits, 5.0)
    assert penalty.item() == (85 + 75) / 4
    (gradient,) = torch.autograd.grad(penalty, logits)
    assert gradient.tolist() == [[-0.25, 0.25], [0.0, 0.0]]
    assert gain_at(torch.sigmoid, torch.tensor([-90.0, 80.0])).tolist() == [0.0, 0.0]


def test_saturation_counts_the_rows_it_is_told_to():
    """Rows outside of the mask change neither the value nor a gradient, NaN included; no row costs 0."""
    logits = torch.tensor([[7.0], [NAN], [5.5]], requires_grad=True)
    mask = torch.tensor([[True], [False], [True]])
    penalty = saturation_penalty(logits, 5.0, mask=mask)
    assert penalty.item() == 1.25
    (gradient,) = torch.autograd.grad(penalty, logits)
    assert gradient.flatten().tolist() == [0.5, 0.0, 0.5]
    assert saturation_penalty(logits, 5.0, mask=torch.zeros(3, 1, dtype=torch.bool)) == 0


def train_gate(squash: Any, weight: float, steps: int = 300) -> tuple[float, float]:
    """Train stop logits from -90 and +80 to do the opposite; return the task's loss and the largest |raw|."""
    raw = torch.tensor([-90.0, 80.0, -90.0, 80.0], requires_grad=True)
    wanted = torch.tensor([1.0, 0.0, 1.0, 0.0])
    optimizer = torch.optim.Adam([raw], lr=0.5)
    for _ in range(steps):
        logits = squash(raw)
        loss = ((logits.sigmoid() - wanted) ** 2).mean() + weight * saturation_penalty(raw, 5.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        task = ((squash(raw).sigmoid() - wanted) ** 2).mean()
    return float(task), float(raw.detach().abs().max())


def tanh_squash(raw: Tensor) -> Tensor:
    return 6.0 * torch.tanh(raw / 6.0)


@pytest.mark.parametrize("squash", [nn.Identity(), tanh_squash], ids=["raw", "behind tanh"])
def test_a_saturated_gate_is_stuck_without_a_penalty_and_recovers_with_one(squash):
    """The penalty acts on what goes into a squash: measured behind it, it would be as stuck as the gate."""
    stuck, largest = train_gate(squash, 0.0)
    assert stuck > 0.98
    assert largest == 90.0
    recovered, largest = train_gate(squash, 0.5)
    assert recovered < 0.05
    assert largest < 10
    assert (gain_at(lambda raw: saturation_penalty(tanh_squash(raw), 5.0), torch.tensor([90.0])) == 0).all()


BAD: dict[str, Any] = {
    "limit of zero": (lambda: bound(torch.zeros(1), 0.0), "limit must be finite and > 0, got limit=0.0"),
    "limit nan": (lambda: bound(torch.zeros(1), NAN), "limit must be finite and > 0, got limit=nan"),
    "form": (
        lambda: bound(torch.zeros(1), 1.0, "clip"),
        "form must be one of hard, soft, .* got form='clip'",
    ),
    "threshold above": (
        lambda: soft_clamp_logits(torch.zeros(1), 5.0, 4.0),
        "threshold must be > 0 and < max",
    ),
    "negative threshold": (
        lambda: saturation_penalty(torch.zeros(1), -1.0),
        "threshold must be finite and >= 0",
    ),
    "guard's limit": (lambda: RangeGuard(-1.0), "limit must be finite and > 0, got limit=-1.0"),
    "guard's form": (lambda: RangeGuard(1.0, "clip"), "form must be one of"),
    "guard's weight": (lambda: SaturationGuard(-1.0), "weight must be finite and >= 0"),
    "guard's temperature": (
        lambda: SaturationGuard(1.0, temperature=0.0),
        "temperature must be finite and > 0",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_refused(name):
    """The message says which argument breaks which rule."""
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call()


# --- the guards of a training -----------------------------------------------------------------------


def moment_of(outputs: Any, semantic: Any = None, tau: float = 0.1) -> Moment:
    fed = SimpleNamespace(semantic=semantic, extras={}, rows=2)
    return Moment(nn.Identity(), fed, {"tau": tau}, outputs, LossTerms(torch.zeros(())))  # type: ignore[arg-type]


def test_the_range_guard_bounds_what_the_loss_sees_and_measures_before():
    """A monitor behind the bound would read 2.0 for ever; named tensors are handed on."""
    named = {"attention": torch.tensor([9.0])}
    P, Q = torch.tensor([65.2, -1.0]), torch.tensor([0.5, NAN])
    guard = RangeGuard(2.0, "hard")
    assert all(math.isnan(value) for value in guard.telemetry().values())
    moment = moment_of((P, Q, named))
    guard.after_forward(moment)
    assert moment.outputs[0].tolist() == [2.0, -1.0]
    assert moment.outputs[1][0] == 0.5
    assert moment.outputs[2] is named
    assert moment.found["raw_outputs"][0] is P
    assert guard.telemetry() == {"range_max_abs": pytest.approx(65.2), "range_over_share": 0.25}
    plain = moment_of(torch.tensor([3.0, 1.0]))
    guard.after_forward(plain)
    assert plain.outputs.tolist() == [2.0, 1.0]
    assert guard.telemetry()["range_over_share"] == pytest.approx(2 / 6)
    guard.begin_epoch(1, {})
    assert all(math.isnan(value) for value in guard.telemetry().values())


def test_an_infinite_output_shows_in_the_telemetry():
    """It is bounded, so that no loss would tell."""
    guard = RangeGuard(2.0)
    guard.after_forward(moment_of(torch.tensor([INF, 0.0])))
    assert guard.telemetry() == {"range_max_abs": INF, "range_over_share": 0.5}


def test_the_saturation_guard_looks_at_the_gate_before_any_bound():
    """Its logits are the model's own, or the acceptance of its denominators as the model gave them."""
    Q = torch.tensor([1.0, 0.1, -0.9, 0.0], requires_grad=True)
    moment = moment_of((torch.zeros(4), Q))
    RangeGuard(0.2, "hard").after_forward(moment)
    guard = SaturationGuard(2.0, 5.0, temperature=0.01)
    guard.after_loss(moment)
    assert moment.terms is not None
    term = moment.terms.auxiliaries["saturation"]
    assert term.item() == pytest.approx(2.0 * (85 + 0 + 75 + 5) / 4)
    assert guard.telemetry() == {"saturation_max": pytest.approx(90.0), "saturation_share": 0.75}
    (gradient,) = torch.autograd.grad(term, Q)
    # Large ones come down, whichever side they are on; an exact zero is pushed out.
    assert gradient.tolist() == [50.0, 0.0, -50.0, -50.0]

    stop = moment_of((torch.zeros(2), torch.zeros(2), {"stop_logits": torch.tensor([[-9.0, 1.0]])}))
    guard.after_loss(stop)
    assert stop.terms is not None
    assert stop.terms.auxiliaries["saturation"].item() == pytest.approx(2.0 * 4.0 / 2)


def test_rows_that_may_not_be_trained_have_no_gate():
    """A row labelled fault changes nothing, whatever its denominator is."""
    codes = torch.tensor([STATUS_CODES["finite"], STATUS_CODES["fault"]])
    semantic = lift_semantic_targets(torch.zeros(2), codes)
    moment = moment_of((torch.zeros(2), torch.tensor([1.0, NAN])), semantic)
    guard = SaturationGuard(1.0, 5.0)
    guard.after_loss(moment)
    assert moment.terms is not None
    assert moment.terms.auxiliaries["saturation"].item() == pytest.approx(85.0)
    assert guard.telemetry()["saturation_share"] == 1.0


def test_a_guard_that_finds_no_gate_says_what_it_looked_for():
    """A model of plain logits has neither denominators nor stop logits."""
    with pytest.raises(ValueError, match="outputs must be .* name 'stop_logits'"):
        SaturationGuard(1.0).after_loss(moment_of(torch.zeros(2, 3)))


def accompany(guards: list[Any], device: str, steps: int = 2) -> Tensor:
    """Go through the moments of a few steps with outputs that have no meaning; return the last total."""
    P, Q = (torch.linspace(0.1, 0.9, 8, device=device).requires_grad_() for _ in range(2))
    semantic = SimpleNamespace(mask_trained=torch.ones(8, dtype=torch.bool, device=device))
    fed = SimpleNamespace(semantic=semantic, lifted=(P.detach(), Q.detach()))
    for _ in range(steps):
        moment = Moment(nn.Identity(), fed, {"tau": 0.1}, (P, Q))  # type: ignore[arg-type]
        for guard in guards:
            if hasattr(guard, "after_forward"):
                guard.after_forward(moment)
        moment.terms = LossTerms(moment.outputs[0].sum())
        for guard in guards:
            if hasattr(guard, "after_loss"):
                guard.after_loss(moment)
        moment.terms.total().backward()
    assert set(moment.terms.auxiliaries) == {"saturation", "spread"}
    return moment.terms.total()


def guards() -> list[Any]:
    spread = SpreadGuard(1.0, difficulty=projective_residual)
    return [RangeGuard(0.5, "straight_through"), SaturationGuard(1.0), spread]


def test_guards_never_read_a_device_in_a_step():
    """Tensors without values serve them: nothing in a step can wait for an accelerator."""
    assert accompany(guards(), "meta").shape == ()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_guards_do_as_on_the_cpu_without_waiting():
    """The same total and the same telemetry; no synchronisation in a step."""
    here, there = guards(), guards()
    expected = accompany(here, "cpu")
    accompany(guards(), "cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        total = accompany(there, "cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(total.cpu(), expected)
    for one, other in zip(here, there, strict=True):
        assert one.telemetry() == pytest.approx(other.telemetry(), rel=1e-5, nan_ok=True)


def split(rows: int = 96) -> Split:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.rand((rows, 2), generator=generator) * 2 - 1
    codes = torch.full((rows,), STATUS_CODES["finite"])
    return Split(inputs, lift_semantic_targets(1 / inputs[:, 0], codes))


def weights_after(config: TrialConfig) -> tuple[Tensor, dict[str, float]]:
    trainer = make_trainer(config, 0, lambda: make_model(config, 2), split(), split(32))
    trainer.fit()
    weights = torch.cat([item.detach().flatten() for item in trainer.model.parameters()])
    return weights, trainer.telemetry()


def test_a_bound_that_is_never_reached_changes_no_training():
    """A healthy training is the same to the bit with the guard on, in every form."""
    plain, none = weights_after(TrialConfig(max_epochs=2))
    assert none == {}
    for form in FORMS:
        guarded, said = weights_after(TrialConfig(max_epochs=2, output_bound=4.0, output_bound_form=form))
        assert torch.equal(plain, guarded)
        assert said["range_over_share"] == 0.0
        assert 0 < said["range_max_abs"] <= 1.0


def test_what_a_guard_has_seen_of_an_epoch_is_in_the_checkpoint(tmp_path):
    """A training that was interrupted in mid-epoch says what it would have said without."""
    config = TrialConfig(max_epochs=2, output_bound=0.9, lambda_saturation=0.5, lambda_spread=0.5)

    def make(hook: Any = None) -> Any:
        return make_trainer(config, 0, lambda: make_model(config, 2), split(), None, log_hook=hook)

    whole = make()
    whole.fit()

    class StopError(Exception):
        pass

    first = make(lambda record: None)
    seen = 0

    def stop(record: Any) -> None:
        nonlocal seen
        seen += 1
        if seen == 5:
            first.save_checkpoint(tmp_path / "state.pt")
            raise StopError

    first.config.log_hook = stop
    with pytest.raises(StopError):
        first.fit()
    second = make()
    second.load_checkpoint(tmp_path / "state.pt")
    second.fit()
    assert second.telemetry() == whole.telemetry()
    assert not any(math.isnan(value) for value in whole.telemetry().values())
