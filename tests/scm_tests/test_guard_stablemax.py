"""Stablemax and its losses: the recorded numbers, and what the recorded code got wrong."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from scm.guards.stablemax import (
    CLASS_WEIGHTINGS,
    FocalWeightedStablemaxLoss,
    WeightedStablemaxLoss,
    log_stablemax,
    reference_class_weights,
    smooth_class_weights,
    softmax_entropy,
    stablemax,
)

NAN, INF = float("nan"), float("inf")
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
LOSSES: dict[str, Any] = {
    "weighted_stablemax": WeightedStablemaxLoss,
    "focal_weighted_stablemax": FocalWeightedStablemaxLoss,
}
EITHER = pytest.mark.parametrize("loss", LOSSES.values(), ids=list(LOSSES))


def assert_recorded(actual: Tensor, expected: Any, dtype: str, name: str) -> None:
    tolerance = {"rtol": 1e-12, "atol": 0.0} if dtype == "float64" else {"rtol": 2e-5, "atol": 2e-6}
    torch.testing.assert_close(
        actual.detach().double(),
        torch.tensor(expected, dtype=torch.float64),
        equal_nan=True,
        msg=lambda text: f"{name}: {text}",
        **tolerance,
    )


def gradient_of(value: Tensor, x: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(value, x)
    return gradient


# --- stablemax --------------------------------------------------------------------------------------


def test_stablemax_is_the_recorded_one(guard_vectors):
    """Values in both precisions, and gradients, save for the one that was NaN."""
    for case in guard_vectors["stablemax"]:
        x = torch.tensor(case["x"], dtype=getattr(torch, case["dtype"]), requires_grad=True)
        s = stablemax(x)
        assert_recorded(s, case["out"], case["dtype"], case["name"])
        recorded = [1.0 if math.isnan(slope) else slope for slope in case["upstream_grad_of_sum"]]
        assert_recorded(gradient_of(s.sum(), x), recorded, case["dtype"], case["name"])


def test_log_stablemax_is_the_recorded_one(guard_vectors):
    """Over any dimension, with gradients."""
    for case in guard_vectors["log_stablemax"]:
        x = torch.tensor(case["x"], dtype=getattr(torch, case["dtype"]), requires_grad=True)
        logs = log_stablemax(x, case["dim"])
        assert_recorded(logs, case["out"], case["dtype"], case["name"])
        if "upstream_grad_of_col0_sum" in case:
            slope = gradient_of(logs[..., 0].sum(), x)
            assert_recorded(slope, case["upstream_grad_of_col0_sum"], case["dtype"], case["name"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gradient_at_a_logit_of_one_is_one(dtype):
    """The branch that is not taken has an infinite slope there in float32: it must not be differentiated."""
    x = torch.tensor([1.0, 0.0, -0.0, -1.0], dtype=dtype, requires_grad=True)
    assert gradient_of(stablemax(x).sum(), x).tolist() == [1.0, 1.0, 1.0, 0.25]
    assert gradient_of(log_stablemax(x)[0], x).isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(data=st.lists(st.floats(width=16), min_size=2, max_size=8))
def test_stablemax_is_finite_with_its_gradient_for_every_number(dtype, data):
    """NaN and infinities too; the result is in the dtype of the logits."""
    x = torch.tensor(data, dtype=dtype, requires_grad=True)
    s, logs = stablemax(x), log_stablemax(x)
    assert s.dtype == logs.dtype == dtype
    assert ((s.double() > 9.9e-4) & (s.double() < 1002)).all()
    assert ((logs <= 0) & logs.isfinite()).all()
    assert gradient_of(logs[0], x).isfinite().all()


@given(
    x=st.lists(st.floats(-900, 900, width=32), min_size=2, max_size=6), shift=st.floats(0.125, 50, width=32)
)
def test_a_larger_logit_is_more_probable(x, shift):
    """Stablemax orders classes as their logits do."""
    logits = torch.tensor(x)
    assert stablemax(logits + shift).ge(stablemax(logits)).all()
    probability = log_stablemax(logits).exp()
    assert probability.sum() == pytest.approx(1.0, abs=1e-5)


# --- where NaN comes from ---------------------------------------------------------------------------


def extreme_logits(dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.rand((64, 10), generator=generator) * 170 - 90).to(dtype).requires_grad_()


@pytest.mark.parametrize("clamp", [50.0, 0.0], ids=["clamped", "not clamped"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@EITHER
def test_extreme_logits_do_no_harm_to_a_loss_without_an_exponential(loss, dtype, clamp):
    """Logits in [-90, 80] give a finite loss and finite gradients in every dtype, clamped or not."""
    logits = extreme_logits(dtype)
    targets = torch.arange(64) % 10
    value = loss(logit_clamp_max=clamp)(logits, targets)
    assert value.isfinite()
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert gradient_of(value, logits).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_they_do_to_an_unshifted_softmax_and_to_its_entropy(dtype):
    """The mechanisms that are real: exp overflows, and p log p is NaN once a p is 0. Ours is finite."""
    logits = extreme_logits(dtype)
    overflowing = (logits.exp() / logits.exp().sum(-1, keepdim=True)).log()[:, 0].mean()
    assert not gradient_of(overflowing, logits).isfinite().all()
    p = logits.softmax(-1)
    assert (p * p.log()).sum(-1).isnan().any()

    shifted = torch.log_softmax(logits.float(), -1)[:, 0].mean()
    assert gradient_of(shifted, logits).isfinite().all()
    entropy = softmax_entropy(logits)
    assert entropy.dtype == torch.float32
    assert ((entropy >= 0) & (entropy <= math.log(10) + 1e-5)).all()
    assert gradient_of(entropy.sum(), logits).isfinite().all()


def test_entropy_knows_masked_classes():
    """Half of four classes masked by -inf leave log 2, with a finite gradient."""
    logits = torch.tensor([0.0, -INF, 0.0, -INF], requires_grad=True)
    entropy = softmax_entropy(logits)
    assert entropy.item() == pytest.approx(math.log(2))
    assert gradient_of(entropy, logits).isfinite().all()
    assert softmax_entropy(torch.tensor([0.0, NAN])).isnan()


# --- the losses -------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", LOSSES)
def test_losses_are_the_recorded_ones(guard_vectors, group):
    """Every reduction, the class weights and the gradient; where nothing is valid, in the right shape."""
    cases = [
        case for case in guard_vectors[group] if "out" in case and case["name"] != "targets_out_of_range"
    ]
    assert len(cases) > 20
    for case in cases:
        logits = torch.tensor(case["logits"], dtype=getattr(torch, case["dtype"]), requires_grad=True)
        targets, out = torch.tensor(case["targets"]), case["out"]
        for reduction in ("mean", "sum", "none"):
            loss = LOSSES[group](**case["params"], reduction=reduction)
            expected = out[reduction]
            if reduction == "none" and out["class_weights"] is None:
                expected = torch.zeros(targets.shape).tolist()
            assert_recorded(loss(logits, targets), expected, case["dtype"], case["name"])
        if out["class_weights"] is not None:
            weights = loss.class_weights(targets, logits.shape[1])
            assert_recorded(weights, out["class_weights"], "float32", case["name"])
        if out["grad_of_mean"] is not None:
            mean = LOSSES[group](**case["params"])(logits, targets)
            assert_recorded(gradient_of(mean, logits), out["grad_of_mean"], case["dtype"], case["name"])


@EITHER
def test_a_mean_over_the_canvas_is_diluted_by_padding(loss):
    """3x3 cells on a 30x30 canvas count a hundredth; the valid mean does not know of the canvas."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn((1, 10, 30, 30), generator=generator)
    targets = torch.full((1, 30, 30), -100)
    targets[:, :3, :3] = torch.arange(9).reshape(3, 3)
    valid = loss()(logits, targets)
    canvas = loss(reduction="canvas_mean")(logits, targets)
    assert canvas.item() == pytest.approx(valid.item() / 100, rel=1e-5)
    alone = loss()(logits[..., :3, :3], targets[..., :3, :3])
    assert valid.item() == pytest.approx(alone.item(), rel=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "canvas_mean", "sum", "none"])
@EITHER
def test_with_nothing_valid_the_loss_is_zero_in_its_shape(loss, reduction):
    """It belongs to the graph, so that a backward pass gives zeros, not an error."""
    logits = torch.full((2, 3, 4, 5), NAN, requires_grad=True)
    value = loss(reduction=reduction)(logits, torch.full((2, 4, 5), -100))
    assert value.shape == ((2, 4, 5) if reduction == "none" else ())
    assert (value == 0).all()
    assert (gradient_of(value.sum(), logits) == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@EITHER
def test_pixel_losses_are_in_the_dtype_of_the_loss(loss, dtype):
    """Half and double logits are no error, under autocast neither."""
    logits = torch.randn((2, 4, 3), dtype=torch.float32).to(dtype).requires_grad_()
    targets = torch.tensor([[0, 1, -100], [3, 2, 1]])
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    for context in (torch.autocast("cpu", enabled=False), torch.autocast("cpu", dtype=torch.bfloat16)):
        with context:
            value = loss(reduction="none")(logits, targets)
        assert value.dtype == expected
        assert value[0, 2] == 0
        assert gradient_of(value.sum(), logits).isfinite().all()


@EITHER
def test_ignored_pixels_have_no_part_in_anything(loss):
    """What stands there, NaN or a class far off, changes neither loss nor weights nor gradients."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn((2, 5, 6), generator=generator)
    targets = torch.randint(5, (2, 6), generator=generator)
    targets[0, :2] = -100
    other = logits.clone()
    other[0, :, 0], other[0, :, 1] = NAN, 1e9
    results = []
    for values in (logits, other):
        values.requires_grad_()
        value = loss()(values, targets)
        results.append((value, gradient_of(value, values)))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert (results[1][1][0, :, :2] == 0).all()


@EITHER
def test_a_class_may_be_the_one_that_is_ignored(loss):
    """ignore_index = 0 leaves the background out, and its weight with it."""
    logits = torch.randn((1, 3, 4), generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([[0, 1, 2, 1]])
    value = loss(ignore_index=0, reduction="none")(logits, targets)
    assert value[0, 0] == 0
    assert (value[0, 1:] > 0).all()


@EITHER
def test_a_target_that_is_no_class_is_refused_or_left_out_but_never_another_class(loss):
    """Colour 10 of ten is not colour 9: an error that names it, or a pixel without part."""
    logits = torch.randn((1, 10, 4), generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([[10, 1, -3, 5]])
    with pytest.raises(ValueError, match=r"targets must be in \[0, 10\) or ignore_index, got 10"):
        loss()(logits, targets)
    left_out = loss(out_of_range="ignore", reduction="none")(logits, targets)
    assert left_out[0, [0, 2]].tolist() == [0.0, 0.0]
    marked = loss(reduction="none")(logits, torch.tensor([[-100, 1, -100, 5]]))
    assert torch.equal(left_out, marked)


def test_focal_gradients_flow_through_the_probability():
    """The factor is no constant; at gamma 0 it is 1 and both losses are one."""
    logits = torch.tensor([[2.0, 0.0, -1.0]], requires_grad=True)
    targets = torch.tensor([0])
    caps = {"bg_weight_cap": 1.0, "fg_weight_cap": 10.0}
    p = log_stablemax(logits)[0, 0].exp()
    focal = FocalWeightedStablemaxLoss(**caps)(logits, targets)
    slope = gradient_of(focal, logits)
    expected = (1 - p) ** 2 * -p.log()
    torch.testing.assert_close(focal, expected, rtol=1e-5, atol=0.0)
    torch.testing.assert_close(slope, gradient_of(expected, logits), rtol=1e-4, atol=1e-6)
    flat = FocalWeightedStablemaxLoss(**caps, gamma=0.0)(logits, targets)
    assert flat.item() == WeightedStablemaxLoss(**caps)(logits, targets).item()


@given(gamma=st.floats(0.0, 5.0), seed=st.integers(0, 10))
def test_gamma_may_be_a_tensor(gamma, seed):
    """So that the trials of a pack may differ in it."""
    logits = torch.randn((1, 3, 4), generator=torch.Generator().manual_seed(seed))
    targets = torch.tensor([[0, 1, 2, 0]])
    by_number = FocalWeightedStablemaxLoss(gamma=gamma)(logits, targets)
    by_tensor = FocalWeightedStablemaxLoss(gamma=torch.tensor(gamma))(logits, targets)
    torch.testing.assert_close(by_number, by_tensor)


@EITHER
def test_losses_are_vectorised_over_trials(loss):
    """vmap over logits and targets gives what each trial gives alone, gradients included."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn((3, 2, 4, 5), generator=generator) * 40
    targets = torch.randint(4, (3, 2, 5), generator=generator)
    made = loss(out_of_range="ignore", logit_clamp_form="straight_through")
    together = torch.vmap(torch.func.grad_and_value(made))(logits, targets)
    for trial in range(3):
        alone = torch.func.grad_and_value(made)(logits[trial], targets[trial])
        torch.testing.assert_close(together[0][trial], alone[0])
        torch.testing.assert_close(together[1][trial], alone[1])


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "reduction": ({"reduction": "median"}, "reduction must be one of mean, canvas_mean, sum, none, got"),
    "clamp": ({"logit_clamp_max": NAN}, "logit_clamp_max must be finite and > 0, got logit_clamp_max=nan"),
    "clamp form": (
        {"logit_clamp_form": "clip"},
        "logit_clamp_form must be one of hard, soft, straight_through",
    ),
    "weighting": ({"class_weighting": "sqrt"}, "class_weighting must be one of reference, smooth, got"),
    "out of range": ({"out_of_range": "clamp"}, "out_of_range must be one of raise, ignore, got"),
    "cap": ({"fg_weight_cap": 0.0}, "fg_weight_cap must be finite and > 0, got fg_weight_cap=0.0"),
    "least": ({"min_class_weight": -1.0}, "min_class_weight must be finite and >= 0"),
}


@pytest.mark.parametrize("name", BAD)
@EITHER
def test_bad_settings_are_refused(loss, name):
    """The message says which argument breaks which rule."""
    settings, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        loss(**settings)


@EITHER
def test_targets_of_another_shape_are_refused(loss):
    """Logits (B, C, ...) go with targets (B, ...)."""
    with pytest.raises(ValueError, match="targets must have the shape of logits without its second"):
        loss()(torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.int64))


def test_a_negative_gamma_is_refused():
    """It would weigh certain pixels most."""
    with pytest.raises(ValueError, match="gamma must be finite and >= 0"):
        FocalWeightedStablemaxLoss(gamma=-1.0)


# --- the clamp --------------------------------------------------------------------------------------


def recovered(form: str, clamp: float = 50.0, steps: int = 400) -> tuple[float, float]:
    """Train a model that is surely wrong; return its accuracy and the first step's largest gradient."""
    features = torch.eye(4)
    targets = torch.tensor([0, 1, 2, 3])
    model = nn.Linear(4, 4, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.full((4, 4), -90.0) + 170.0 * torch.eye(4).roll(1, 0))
    loss = WeightedStablemaxLoss(logit_clamp_max=clamp, logit_clamp_form=form)
    optimizer = torch.optim.Adam(model.parameters(), lr=1.0)
    first = 0.0
    for step in range(steps):
        optimizer.zero_grad()
        loss(model(features), targets).backward()
        assert model.weight.grad is not None
        first = float(model.weight.grad.abs().max()) if step == 0 else first
        optimizer.step()
    return float((model(features).argmax(1) == targets).float().mean()), first


def test_a_hard_clamp_freezes_what_is_surely_wrong():
    """True class at -90, a wrong one at +80: the gradient is exactly 0, and nothing is ever learned."""
    assert recovered("hard", steps=20) == (0.0, 0.0)


@pytest.mark.parametrize("form", ["soft", "straight_through"])
def test_a_clamp_that_keeps_the_gradient_lets_it_recover(form):
    """As the unclamped loss does."""
    accuracy, first = recovered(form)
    assert accuracy == 1.0
    assert first > 0
    assert recovered("hard", clamp=0.0)[0] == 1.0


@EITHER
def test_a_straight_through_clamp_has_the_recorded_values(loss):
    """It differs from the hard one in gradients alone."""
    logits = extreme_logits(torch.float32)
    targets = torch.arange(64) % 10
    hard, through = (loss(logit_clamp_form=form)(logits, targets) for form in ("hard", "straight_through"))
    assert torch.equal(hard, through)
    assert (gradient_of(hard, logits)[logits.abs() > 50] == 0).all()
    assert (gradient_of(through, logits)[logits.abs() > 50] != 0).all()


@pytest.mark.parametrize(
    "clamp, right, wrong",
    [(50.0, 0.003454, 7.8671), (0.0, 8.982e-6, 13.8175)],
    ids=["clamped", "not clamped"],
)
def test_the_surest_answer_costs_more_than_nothing_and_no_more_than_so_much(clamp, right, wrong):
    """However large the one logit is that stands out of ten: a cap on other terms may count on the floor."""
    loss = WeightedStablemaxLoss(logit_clamp_max=clamp, bg_weight_cap=1.0)
    logits = torch.full((1, 10, 1), -1e6, dtype=torch.float64)
    logits[0, 0] = 1e6
    assert loss(logits, torch.tensor([[0]])).item() == pytest.approx(right, rel=1e-3)
    # The weight of the one class that is there is 1 under the recorded law, up to its rounding.
    assert loss(logits, torch.tensor([[1]])).item() == pytest.approx(wrong, rel=1e-4)


@pytest.mark.parametrize("off", [0.0, -1.0, None])
def test_a_clamp_can_be_left_out(off):
    """None, 0 and below leave logits as they are."""
    logits = extreme_logits(torch.float32)
    targets = torch.arange(64) % 10
    loose = WeightedStablemaxLoss(logit_clamp_max=off)(logits, targets)
    assert torch.equal(loose, WeightedStablemaxLoss(logit_clamp_max=1000.0)(logits, targets))
    assert not torch.equal(loose, WeightedStablemaxLoss()(logits, targets))


# --- class weights ----------------------------------------------------------------------------------


def weights(law: str, counts: list[int]) -> list[float]:
    return CLASS_WEIGHTINGS[law](torch.tensor(counts).float(), 2.0, 5.0, 0.1).tolist()


def test_a_class_that_is_absent_changes_no_weight():
    """The recorded law gives every colour that is there about 1, below a background of 2; ours does not."""
    with_absent, without = [80, 15, 5, *[0] * 7], [80, 15, 5]
    reference = weights("reference", with_absent)
    assert reference[0] == 2.0
    assert reference[1:3] == pytest.approx([1.0, 1.0], abs=1e-3)
    smooth = weights("smooth", with_absent)
    assert smooth[:3] == pytest.approx(weights("smooth", without))
    assert smooth[0] < 1 < smooth[1] < smooth[2]


def test_one_pixel_more_moves_no_weight_far():
    """Nine equal colours and one pixel: the recorded law jumps from 3 to 1 and 5, ours moves by a percent."""
    before, after = [0, *[10] * 9], [0, 11, *[10] * 8]
    assert weights("reference", before)[1:] == pytest.approx([3.0] * 9, abs=1e-2)
    assert weights("reference", after)[1:] == pytest.approx([1.0, *[5.0] * 8], abs=1e-2)
    assert weights("smooth", after)[1:] == pytest.approx(weights("smooth", before)[1:], rel=0.05)


@given(
    counts=st.lists(st.integers(0, 10_000), min_size=2, max_size=10).filter(lambda c: sum(c) > 0),
    at=st.integers(0, 9),
)
def test_smooth_weights_fall_with_frequency_and_keep_the_scale_of_the_loss(counts, at):
    """Before caps a mean pixel weighs 1, rarer classes more; the first pixel of one moves others little."""
    law = smooth_class_weights(torch.tensor(counts).float(), 1e9, 1e9, 0.0)
    n = sum(counts)
    assert sum(w * c for w, c in zip(law.tolist(), counts, strict=True)) / n == pytest.approx(1.0, rel=1e-4)
    present = [(c, w) for c, w in zip(counts, law.tolist(), strict=True) if c]
    assert all(w >= v * (1 - 1e-5) for c, w in present for d, v in present if c < d)
    at %= len(counts)
    if counts[at] == 0:
        more = [c + (i == at) for i, c in enumerate(counts)]
        moved = smooth_class_weights(torch.tensor(more).float(), 1e9, 1e9, 0.0)
        others = torch.tensor([i != at and c > 0 for i, c in enumerate(counts)])
        assert ((moved / law - 1).abs()[others] <= 1 / math.sqrt(n) + 1e-4).all()


@pytest.mark.parametrize("law", CLASS_WEIGHTINGS)
@given(counts=st.lists(st.integers(0, 1000), min_size=1, max_size=10))
def test_class_weights_keep_their_bounds(law, counts):
    """Whatever is on the canvas, also nothing: the background below its cap, others between two bounds."""
    got = CLASS_WEIGHTINGS[law](torch.tensor(counts).float(), 2.0, 5.0, 0.1)
    assert got.shape == (len(counts),)
    assert 0 < got[0] <= 2.0
    assert ((got[1:] >= 0.1) & (got[1:] <= 5.0)).all()


def test_the_reference_law_of_background_alone():
    """Every foreground class is as rare as another: the middle of 1 and its cap."""
    law = reference_class_weights(torch.tensor([7.0, 0.0, 0.0]), 2.0, 5.0, 0.1)
    assert law.tolist() == [2.0, 3.0, 3.0]


# --- telemetry --------------------------------------------------------------------------------------


@EITHER
def test_telemetry_sees_logits_that_the_loss_survives(loss):
    """An all-NaN batch costs log 10 without a gradient: only a count before any substitution tells."""
    made = loss(bg_weight_cap=1.0, track_nan_telemetry=True, class_weighting="smooth")
    targets = torch.tensor([[1, 1]])
    assert made.get_nan_telemetry() == {"nan_rate": 0.0, "message": "no batch was counted"}
    made(torch.zeros(1, 10, 2), targets)
    broken = torch.full((1, 10, 2), NAN, requires_grad=True)
    value = made(broken, targets)
    assert value.isfinite()
    assert (gradient_of(value, broken) == 0).all()
    mixed = torch.zeros(1, 10, 2)
    mixed[0, 3, 1], mixed[0, 0, 1], mixed[0, 5, 0] = INF, -7.0, 1e6  # only the second pixel is not finite
    made(mixed, targets)
    said = made.get_nan_telemetry()
    assert said["nan_rate"] == pytest.approx(2 / 3)
    assert (said["total_batches"], said["batches_with_nan"]) == (3, 2)
    assert (said["total_nan_count"], said["max_nan_per_batch"]) == (3, 2)
    all_nan, one_inf = said["last_nan_logit_stats"]
    assert math.isnan(all_nan.pop("min"))
    assert math.isnan(all_nan.pop("max"))
    assert all_nan == {"has_inf": False, "has_nan_input": True, "num_nan": 2}
    assert one_inf == {"min": -7.0, "max": 0.0, "has_inf": True, "has_nan_input": False, "num_nan": 1}
    made.reset_nan_telemetry()
    assert "message" in made.get_nan_telemetry()


def test_telemetry_passes_over_what_is_not_valid():
    """NaN where nothing is asked for is no news; without the setting nothing is counted."""
    made = WeightedStablemaxLoss(track_nan_telemetry=True)
    logits = torch.zeros(1, 3, 2)
    logits[..., 0] = NAN
    made(logits, torch.tensor([[-100, 1]]))
    assert made.get_nan_telemetry()["nan_rate"] == 0.0
    untracked = WeightedStablemaxLoss()
    untracked(logits, torch.tensor([[1, 1]]))
    assert "message" in untracked.get_nan_telemetry()


def test_telemetry_is_bounded_and_shows_the_newest():
    """Of 250 bad batches the counters know all, the entries are the last five."""
    made = WeightedStablemaxLoss(track_nan_telemetry=True)
    targets = torch.tensor([[1]])
    for batch in range(250):
        logits = torch.full((1, 3, 1), float(batch))
        logits[0, 0] = NAN
        made(logits, targets)
    said = made.get_nan_telemetry()
    assert said["batches_with_nan"] == 250
    assert [entry["max"] for entry in said["last_nan_logit_stats"]] == [245.0, 246.0, 247.0, 248.0, 249.0]
    assert made._telemetry._stats is not None
    assert made._telemetry._stats.shape == (100, 5)


# --- devices ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["hard", "soft", "straight_through"])
@pytest.mark.parametrize("law", CLASS_WEIGHTINGS)
@pytest.mark.parametrize("reduction", ["mean", "canvas_mean", "sum", "none"])
@EITHER
def test_the_loss_never_reads_a_device(loss, form, law, reduction):
    """Tensors without values serve it, telemetry included: nothing in it can wait for an accelerator."""
    logits = torch.zeros((2, 10, 4, 4), device="meta", requires_grad=True)
    targets = torch.zeros((2, 4, 4), dtype=torch.int64, device="meta")
    made = loss(
        logit_clamp_form=form,
        class_weighting=law,
        reduction=reduction,
        out_of_range="ignore",
        track_nan_telemetry=True,
    )
    value = made(logits, targets)
    assert value.shape == (targets.shape if reduction == "none" else ())
    value.sum().backward()
    assert logits.grad is not None
    assert logits.grad.shape == logits.shape


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@EITHER
def test_on_a_gpu_a_stray_target_is_refused_without_waiting(loss):
    """The loss of the CPU, no synchronisation in a step; a stray target is told of with a later call."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn((2, 10, 5, 5), generator=generator) * 40
    targets = torch.randint(10, (2, 5, 5), generator=generator)
    made, here = loss(track_nan_telemetry=True), loss()
    strayed = targets.clone()
    strayed[0, 0, 0] = 10
    on_device, right, stray = logits.cuda().requires_grad_(), targets.cuda(), strayed.cuda()
    made(on_device, right).backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        value = made(on_device, right)
        value.backward()
        made(on_device, stray)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert value.item() == pytest.approx(here(logits, targets).item(), rel=1e-5)
    torch.cuda.synchronize()
    with pytest.raises(ValueError, match=r"targets must be in \[0, 10\) or ignore_index, got 1 others"):
        made(on_device, right)
    assert made.get_nan_telemetry()["nan_rate"] == 0.0
