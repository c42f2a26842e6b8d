"""Equivariance as a loss: the recorded cases, the laws of the distances, and terms that do nothing."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from scm.guards.consistency import (
    REFERENCE_EPSILON,
    AugmentationEquivarianceLoss,
    EquivarianceGuard,
    GroupMarginalizedNLLLoss,
    OutputEquivarianceLoss,
    compared,
    draws_in_training,
    evaluating,
    global_context,
    line_distance,
    positional_context,
)
from scm.guards.degenerate import DegenerateTermDetector, responds
from scm.guards.symmetry import D4, make_symmetries, unchanged
from scm.losses.terms import LossTerms
from scm.training.config import TrainingConfig
from scm.training.targets import lift_semantic_targets
from scm.training.trainer import SCMTrainer

NAN = math.nan
F64 = torch.float64


def seeded(seed: int = 0) -> torch.Generator:
    """A generator of its own."""
    return torch.Generator().manual_seed(seed)


# --- recorded cases of outputs -------------------------------------------------------------------


class Recorded:
    """The recorded model: the scores of a cell depend on its colour and on its place."""

    def __init__(self, case: dict[str, Any]) -> None:
        self.places, self.colours = torch.tensor(case["P"]), torch.tensor(case["Q"])

    def __call__(self, grids: Tensor) -> Tensor:
        return self.colours[:, grids].transpose(0, 1) + self.places


@pytest.fixture
def recorded_outputs(guard_vectors: dict[str, Any]) -> list[dict[str, Any]]:
    """The recorded comparisons of outputs."""
    cases = guard_vectors["output_equivariance"]
    assert len(cases) == 12
    return cases


def compare_recorded(case: dict[str, Any], *, epsilon: float, names: list[str]) -> tuple[Any, Tensor]:
    """Compare as the recorded case did; the result, and the gradient in the original's scores."""
    loss = OutputEquivarianceLoss(distance=case["loss_type"], epsilon=epsilon, views=4, trains="original")
    original = torch.tensor(case["original_logits"], requires_grad=True)
    mask = None if case["target_mask"] is None else torch.tensor(case["target_mask"])
    found = loss(Recorded(case), torch.tensor(case["test_inputs"]), original, mask=mask, names=names)
    found.loss.backward()
    return found, original.grad


def test_outputs_are_compared_as_recorded(recorded_outputs) -> None:
    """Loss, gradient and each view's own loss, with and without a mask, for small and large scores."""
    for case in recorded_outputs:
        found, gradient = compare_recorded(case, epsilon=REFERENCE_EPSILON, names=case["augmentations"])
        expected = case["out"]
        assert found.loss.item() == pytest.approx(expected["loss"], rel=2e-5, abs=2e-6), case["name"]
        recorded = torch.tensor(expected["grad_original_logits"])
        assert torch.allclose(gradient, recorded, rtol=2e-4, atol=2e-6), case["name"]
        if case["target_mask"] is None:  # recorded without the mask, ours are averaged as the loss is
            for name, value in expected["per_aug"].items():
                assert found.per_view[name].item() == pytest.approx(value, rel=2e-5, abs=2e-6), case["name"]


def test_an_answer_that_is_surely_wrong_keeps_its_gradient() -> None:
    """Within the reference's logarithms 1e-8 is added: beyond it nothing pulls the answer back."""
    surely = torch.zeros(1, 3, 2, 2)
    surely[:, 0] = 60.0
    other = surely.roll(1, dims=1)

    def gradient(epsilon: float) -> Tensor:
        scores = surely.clone().requires_grad_()
        loss = OutputEquivarianceLoss(epsilon=epsilon, trains="original")
        loss(lambda grids: other, torch.zeros(1, 2, 2), scores, names=["rotate_90"]).loss.backward()
        return scores.grad.abs().max().item()

    assert gradient(REFERENCE_EPSILON) < 1e-15
    assert gradient(0.0) == pytest.approx(1 / 4)  # a mean over four cells


def test_classes_that_are_excluded_cost_nothing() -> None:
    """A score of -inf in all views: no nan, in the loss or in the gradient."""
    scores = torch.randn(2, 3, 2, 2, generator=seeded())
    scores[:, 1] = -math.inf
    scores.requires_grad_()
    views = scores.detach().flip(0)
    views.requires_grad_()
    loss = OutputEquivarianceLoss(trains="both")
    found = loss(lambda grids: views, torch.zeros(2, 2, 2), scores, names=["flip_h"])
    found.loss.backward()
    assert found.loss > 0
    assert bool(torch.isfinite(scores.grad).all() & torch.isfinite(views.grad).all())


@pytest.mark.parametrize("distance", ["kl", "l2"])
@pytest.mark.parametrize("trains", ["original", "views", "both"])
@pytest.mark.parametrize("paired", [False, True], ids=["classes", "pairs"])
def test_over_no_place_the_loss_is_zero(distance, trains, paired) -> None:
    """An empty mask: 0 with a graph, for classes and for pairs."""
    weight = torch.ones((), requires_grad=True)

    def model(grids: Tensor) -> Any:
        scores = weight * torch.randn(len(grids), 3, 2, 2)
        return (scores[:, 0], scores[:, 1]) if paired else scores

    loss = OutputEquivarianceLoss(distance=distance, trains=trains)
    found = loss(model, torch.zeros(2, 2, 2), mask=torch.zeros(2, 2, 2, dtype=torch.bool), names=["flip_v"])
    assert found.loss.item() == 0.0
    found.loss.backward()
    assert weight.grad.item() == 0.0


# --- what is compared ----------------------------------------------------------------------------


def test_what_is_compared_is_told_by_shape_and_name() -> None:
    """Scores, named scores, scores over one gate, pairs, and pairs that share a denominator."""
    scores, gate = torch.randn(2, 10, 3, 3), torch.rand(2)
    assert compared(scores) is scores
    assert compared((scores, gate)) is scores
    assert compared((gate, gate, {"class_logits": scores})) is scores
    P, Q = compared((gate, 2 * gate, {"attention": scores}))
    assert torch.equal(Q, 2 * P)
    P, Q = compared((torch.ones(2, 3), gate))
    assert torch.equal(Q, gate.unsqueeze(1).expand(2, 3))
    with pytest.raises(TypeError, match="outputs must be a tensor, \\(P, Q\\) or \\(P, Q, named\\), got str"):
        compared("scores")


finite = st.floats(-1e4, 1e4, allow_subnormal=False)
angles = st.floats(-10.0, 10.0)


@given(angles, angles, st.floats(1e-3, 1e3), st.floats(1e-3, 1e3), st.sampled_from([-1.0, 1.0]))
def test_lines_have_a_distance_that_length_and_sign_do_not_change(
    one, other, length, other_length, sign
) -> None:
    """The squared sine, and minus the logarithm of the squared cosine."""
    pairs = [torch.tensor([math.sin(a), math.cos(a)], dtype=F64) for a in (one, other)]
    longer = (pairs[0] * length * sign, pairs[1] * other_length)
    sine = math.sin(one - other) ** 2
    l2 = line_distance(*longer[0], *longer[1], distance="l2")
    kl = line_distance(*longer[0], *longer[1], distance="kl")
    assert l2.item() == pytest.approx(sine, abs=1e-9)
    assert kl.item() == pytest.approx(-math.log((math.cos(one - other) ** 2 + 1e-6) / (1 + 1e-6)), abs=1e-7)
    assert l2.item() == line_distance(*longer[1], *longer[0], distance="l2").item()


@pytest.mark.parametrize("distance, most", [("l2", 1.0), ("kl", 13.8155)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, F64], ids=str)
def test_lines_of_any_size_have_a_finite_distance_and_gradient(distance, most, dtype) -> None:
    """Pairs whose squares overflow or vanish, equal pairs, opposite ones, and no pair at all."""
    top = torch.finfo(dtype).max
    low = torch.finfo(dtype).tiny
    P = torch.tensor([top, low, 0.0, 1.0, 0.0, -2.0], dtype=dtype, requires_grad=True)
    Q = torch.tensor([top, low, 0.0, 0.0, 1.0, 4.0], dtype=dtype, requires_grad=True)
    other_P, other_Q = P.detach().clone(), Q.detach().clone()
    other_P[3:5], other_Q[3:5] = Q.detach()[3:5], P.detach()[3:5]
    found = line_distance(P, Q, other_P, other_Q, distance=distance)
    assert found.tolist() == pytest.approx([0.0, 0.0, most, most, most, 0.0], rel=5e-3)
    assert bool((found >= 0).all())
    found.sum().backward()
    assert bool(torch.isfinite(P.grad).all() & torch.isfinite(Q.grad).all())


def negated(x: Tensor) -> Tensor:
    """Mirror inputs at the origin."""
    return -x


def turned_sign(outputs: Any) -> Any:
    """What an odd function answers to the mirrored input, taken back."""
    return (-outputs[0], outputs[1], *outputs[2:])


ODD = make_symmetries({"mirror": (negated, negated, turned_sign)}, torch.ones(1, 1))


@pytest.mark.parametrize("distance", ["kl", "l2"])
def test_pairs_of_an_odd_function_agree_and_others_do_not(distance) -> None:
    """1/x as (1, x), whatever the length and the sign of the pair; x + 1 is not odd."""
    x = torch.tensor([[0.5], [-2.0], [0.0]])
    loss = OutputEquivarianceLoss(ODD, distance=distance, views=1)
    odd = loss(lambda rows: (torch.ones(len(rows)), rows[:, 0]), x)
    scaled = loss(lambda rows: (5 * rows[:, 0].sign().add(0.5).sign(), 5 * rows[:, 0].abs()), x[:2])
    assert odd.loss.item() == scaled.loss.item() == 0.0
    other = loss(lambda rows: (rows[:, 0] + 1, torch.ones(len(rows))), x)
    assert other.loss.item() > 0.3
    assert other.per_view == {"mirror": other.loss}


# --- views ---------------------------------------------------------------------------------------


def test_views_are_drawn_by_the_generator_alone() -> None:
    """Equal seeds give equal views, from all seven; the global generators stay where they are."""

    def drawn(seed: int, count: int = 2) -> list[str]:
        loss = OutputEquivarianceLoss(generator=seeded(seed), views=count)
        return [item.name for _ in range(20) for item in loss.drawn()]

    before = torch.get_rng_state()
    assert drawn(3) == drawn(3) != drawn(4)
    assert torch.equal(torch.get_rng_state(), before)
    assert set(drawn(3)) == set(D4) - {"identity"}
    assert sorted(drawn(0, count=7)[:7]) == sorted(set(D4) - {"identity"})


@pytest.mark.parametrize("views", [0, -1, 8])
def test_a_number_of_views_that_there_are_not_is_refused(views) -> None:
    """The identity is none: it would compare an answer with itself."""
    with pytest.raises(ValueError, match=f"views must be in \\[1, 7\\].* got views={views}"):
        OutputEquivarianceLoss(views=views)
    with pytest.raises(ValueError, match="views must be in \\[1, 1\\]"):
        OutputEquivarianceLoss(ODD, views=2)


def test_other_arguments_are_refused_by_name() -> None:
    """A distance that is not known, an epsilon below 0, a view that is none of the symmetries."""
    with pytest.raises(ValueError, match="distance must be one of kl, l2, got distance='cosine'"):
        OutputEquivarianceLoss(distance="cosine")
    with pytest.raises(ValueError, match="trains must be one of original, views, both, got trains='all'"):
        OutputEquivarianceLoss(trains="all")
    with pytest.raises(ValueError, match="epsilon must be finite and >= 0"):
        OutputEquivarianceLoss(epsilon=-1e-8)
    with pytest.raises(ValueError, match="unknown symmetry 'identity'.* known: rotate_90"):
        OutputEquivarianceLoss()(lambda grids: grids, torch.zeros(1, 2, 2), names=["identity"])


class Cells(nn.Module):
    """A classifier of grids cell by cell, blind to places, with dropout and batch statistics."""

    def __init__(self, dropout: float = 0.5) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, 16, 1)
        self.norm = nn.BatchNorm2d(16)
        self.drop = nn.Dropout(dropout)
        self.head = nn.Conv2d(16, 3, 1)

    def forward(self, grids: Tensor) -> Tensor:
        """Map (B, H, W) to scores (B, 3, H, W)."""
        return self.head(self.drop(torch.relu(self.norm(self.embed(grids.unsqueeze(1))))))


def test_noise_of_training_is_not_taken_for_a_lack_of_symmetry() -> None:
    """A model that is blind to places is equivariant; in training mode its dropout hides that."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        model = Cells()
        grids = torch.randn(4, 5, 5)
        model.drop.eval()  # a layer that somebody has put into a mode of its own
        outputs = model(grids)
        noisy = OutputEquivarianceLoss(evaluate=False)
        model.drop.train()
        assert noisy(model, grids, model(grids), names=["rotate_90"]).loss.item() > 1e-2
        modes = {name: module.training for name, module in model.named_modules()}
        statistics = model.norm.running_mean.clone()
        found = OutputEquivarianceLoss()(model, grids, outputs, names=["rotate_90", "transpose"])
        assert found.loss.item() == pytest.approx(0.0, abs=1e-6)
        assert modes == {name: module.training for name, module in model.named_modules()}
        assert torch.equal(model.norm.running_mean, statistics)
    assert found.loss.requires_grad


def test_layers_that_draw_are_found_where_they_are() -> None:
    """Dropout of attention and recurrent layers as well; without any, outputs need not be made again."""
    assert draws_in_training(nn.GRU(2, 2, num_layers=2, dropout=0.1))
    assert draws_in_training(nn.MultiheadAttention(4, 2, dropout=0.1))
    assert not draws_in_training(nn.Sequential(nn.Linear(2, 2), nn.GRU(2, 2), nn.LayerNorm(2)))
    calls = []  # whether each call of the model has a graph

    class Counted(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(torch.is_grad_enabled())
            return super().forward(x)

    model = Counted(3, 3)
    grids = torch.randn(2, 3, 3, generator=seeded())
    OutputEquivarianceLoss(views=3, trains="original")(model, grids, model(grids))
    assert calls == [True, False]  # all views at once


def test_views_answered_together_are_those_answered_one_by_one() -> None:
    """Parts of an answer are told apart by rows; what has no rows goes to every view; oblong grids differ."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        net = nn.Linear(6, 6).double()

    class Named(nn.Module):
        def forward(self, grids: Tensor) -> Any:
            scores = net(grids.flatten(1)).view(-1, 1, *grids.shape[1:])
            return (
                scores[:, 0],
                scores[:, 0].cos(),
                {"class_logits": scores.repeat(1, 2, 1, 1), "weight": net.weight},
            )

    grids = torch.randn(4, 2, 3, dtype=F64, generator=seeded())
    names = ["rotate_180", "flip_h", "flip_v"]
    model = Named()
    together = OutputEquivarianceLoss()(model, grids, names=names)
    apart = OutputEquivarianceLoss()(lambda x: model(x), grids, names=names)  # not known to be in eval mode
    assert together.loss.item() == pytest.approx(apart.loss.item(), rel=1e-12)
    assert together.per_view.keys() == apart.per_view.keys() == set(names)
    turned = OutputEquivarianceLoss()(model, grids, names=["rotate_90", "flip_h"])  # (3, 2) beside (2, 3)
    assert turned.per_view["flip_h"].item() == pytest.approx(together.per_view["flip_h"].item(), rel=1e-12)


def test_modes_come_back_when_the_model_raises() -> None:
    """The block ends as it began."""
    model = nn.Sequential(nn.Dropout(), nn.Dropout())
    model[1].eval()

    def stopped() -> None:
        with evaluating(model):
            assert not any(module.training for module in model.modules())
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        stopped()
    assert [module.training for module in model.modules()] == [True, True, False]


def test_the_gradient_reaches_the_answers_that_are_to_be_trained() -> None:
    """Of both it is that of the distance itself, by finite differences; of one side each, its two parts."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        classes = nn.Sequential(nn.Flatten(), nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    grids = torch.randn(3, 3, 3, dtype=F64, generator=seeded())
    invariant = make_symmetries(
        {name: (item.forward, item.inverse, unchanged) for name, item in D4.items()}, grids
    )

    def pairs(x: Tensor) -> tuple[Tensor, Tensor]:
        scores = classes(x)
        return scores[:, 0], scores[:, 1]

    weight = classes[1].weight
    for model in (classes, pairs):
        for distance in ("kl", "l2"):

            def value(trains: str, model: Any = model, distance: str = distance) -> Tensor:
                loss = OutputEquivarianceLoss(invariant, distance=distance, trains=trains)
                return loss(model, grids, names=["rotate_90", "flip_h"]).loss

            values = {trains: value(trains) for trains in ("original", "views", "both")}
            assert len({item.item() for item in values.values()}) == 1
            assert values["both"].item() > 0
            one, other, both = (torch.autograd.grad(item, weight)[0] for item in values.values())
            with torch.no_grad():
                weight[0, 0] += 1e-5
                up = value("both").item()
                weight[0, 0] -= 2e-5
                down = value("both").item()
                weight[0, 0] += 1e-5
            assert both[0, 0].item() == pytest.approx((up - down) / 2e-5, rel=1e-4, abs=1e-9)
            assert torch.allclose(one + other, both)
            assert one.abs().max() > 1e-6
            assert other.abs().max() > 1e-6


# --- contexts ------------------------------------------------------------------------------------


def test_changes_of_weights_are_compared_as_recorded(guard_vectors: dict[str, Any]) -> None:
    """Different, scaled, negated, zero and no changes; the identical ones are exactly 0 in ours."""

    def keys(context: Any) -> dict[str, Tensor]:
        held = torch.tensor(context)
        return {"k1": held[:, :4].reshape(-1, 2, 2), "k2": held[:, 4:8].reshape(-1, 2, 2)}

    names = []
    for case in guard_vectors["weight_equivariance"]:
        augmented = {name: keys(context) for name, context in case["augmented"].items()}
        found = AugmentationEquivarianceLoss()(keys(case["original_context"]), augmented)
        assert found.loss.item() == pytest.approx(case["out"]["loss"], rel=2e-5, abs=2e-6), case["name"]
        for name, value in case["out"]["per_aug"].items():
            assert found.per_view[name].item() == pytest.approx(value, rel=2e-5, abs=2e-6), case["name"]
        if case["name"] == "identical":
            assert found.loss.item() == 0.0
        names.append(case["name"])
    assert {"identical", "zero_delta", "empty"} <= set(names)


@pytest.mark.parametrize("size", [1e-12, 1e-6, 1.0, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_equal_changes_cost_nothing_however_small_they_are(size, dtype) -> None:
    """The reference's added 1e-8 makes small ones cost 9e-6 and more, its rounding large ones less than 0."""
    context = {"head": size * torch.randn(5, 4, generator=seeded(), dtype=dtype)}
    loss = AugmentationEquivarianceLoss()
    assert loss(context, {"flip_h": context}).loss.item() == 0.0
    added = 1 - functional.cosine_similarity(context["head"], context["head"]).mean().item()
    assert size > 1e-6 or added > 0.01 or dtype == F64 or added == 0.0
    opposite = {"head": -context["head"]}
    assert loss(context, {"flip_h": opposite}).loss.item() == pytest.approx(0.7 * 2)


def test_changes_of_zero_have_a_finite_gradient() -> None:
    """Zero against zero costs nothing, zero against something the full cosine; the original is a target."""
    zero, some = torch.zeros(2, 3, requires_grad=True), torch.ones(2, 3, requires_grad=True)
    loss = AugmentationEquivarianceLoss()
    assert loss({"a": zero}, {"t": {"a": zero}}).loss.item() == 0.0
    found = loss({"a": some}, {"t": {"a": zero}})
    assert found.loss.item() == pytest.approx(0.3 * 3 + 0.7)
    found.loss.backward()
    assert some.grad is None
    assert bool(torch.isfinite(zero.grad).all())
    with pytest.raises(ValueError, match="'t' must hold the keys \\['a'\\], got \\['b'\\]"):
        loss({"a": some}, {"t": {"b": some}})


def test_contexts_that_keep_places_differ_between_orientations() -> None:
    """The published fix pools globally, and transforms features: its contexts agree, and train nothing."""
    features = torch.randn(3, 8, 5, 5, generator=seeded(), dtype=F64, requires_grad=True)
    loss = AugmentationEquivarianceLoss()

    def found(context: Any) -> Tensor:
        views = {
            name: {"c": context(item.apply(features))} for name, item in D4.items() if name != "identity"
        }
        return loss({"c": context(features)}, views).loss

    inert = found(global_context)
    assert inert.item() < 1e-12
    (gradient,) = torch.autograd.grad(inert, features)
    assert gradient.abs().max() < 1e-12
    acting = found(positional_context)
    assert acting.item() > 1e-2
    (gradient,) = torch.autograd.grad(acting, features)
    assert gradient.abs().max() > 1e-6
    apart = torch.stack([positional_context(item.apply(features)) for item in D4.values()])
    gaps = torch.cdist(apart.flatten(1), apart.flatten(1)) + torch.eye(8, dtype=F64)
    assert gaps.min() > 0.05


def test_inputs_that_are_encoded_again_show_a_lack_of_symmetry_through_any_pool() -> None:
    """Transforming the inputs instead of the features is the other way out; a symmetric encoder has none."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        encoder = nn.Conv2d(1, 6, 3, padding=1).double()
    grids = torch.randn(4, 1, 6, 6, generator=seeded(), dtype=F64)
    loss = AugmentationEquivarianceLoss()

    def found() -> float:
        def context(x: Tensor) -> dict[str, Tensor]:
            return {"c": global_context(torch.relu(encoder(x)))}

        return loss(context(grids), {"rotate_90": context(D4["rotate_90"].apply(grids))}).loss.item()

    assert found() > 1e-4
    with torch.no_grad():
        weight = encoder.weight
        weight.copy_(torch.stack([item.apply(weight) for item in D4.values()]).mean(0))
    assert found() < 1e-12


@pytest.mark.parametrize("shape", [(1, 4), (4, 1), (1, 1), (2, 3, 1, 5)])
def test_contexts_of_narrow_features_are_finite(shape) -> None:
    """One row or column has no direction to weigh by; features that are constant keep their value."""
    assert torch.allclose(positional_context(torch.full(shape, 2.0)), torch.full(shape[:-2], 2.0))


# --- all views together --------------------------------------------------------------------------


def test_the_views_probability_of_the_target_is_averaged() -> None:
    """Against the plain formula, masked targets passed over; every view is trained."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Unflatten(1, (1, 3)), nn.Conv2d(1, 4, 3, padding=1)).double()
    grids = torch.randn(2, 3, 3, dtype=F64, generator=seeded())
    targets = torch.randint(0, 4, (2, 3, 3), generator=seeded())
    targets[0, 1] = -100
    names = ["rotate_90", "flip_v"]
    found = GroupMarginalizedNLLLoss()(model, grids, targets, names=names)
    shares = [model(grids).softmax(1)]
    shares += [D4[name].inverse(model(D4[name].forward(grids))).softmax(1) for name in names]
    chosen = torch.stack(shares).mean(0).gather(1, targets.clamp(min=0).unsqueeze(1))[:, 0]
    expected = -chosen.log()[targets != -100].mean()
    assert found.loss.item() == pytest.approx(expected.item())
    assert list(found.per_view) == ["identity", *names]
    gradient, plain = (torch.autograd.grad(loss, model[1].weight)[0] for loss in (found.loss, expected))
    assert torch.allclose(gradient, plain)
    nothing = GroupMarginalizedNLLLoss()(model, grids, torch.full_like(targets, -100), names=names)
    assert nothing.loss.item() == 0.0
    nothing.loss.backward()


def test_a_target_that_no_view_believes_in_keeps_its_gradient() -> None:
    """Probabilities below what a float holds are averaged as logarithms."""
    scores = torch.tensor([[200.0, 0.0]]).reshape(1, 2, 1, 1).requires_grad_()
    found = GroupMarginalizedNLLLoss(views=1)(
        lambda grids: scores, torch.zeros(1, 1, 1), torch.ones(1, 1, 1, dtype=torch.int64), names=["flip_h"]
    )
    found.loss.backward()
    assert found.loss.item() == pytest.approx(200.0)
    assert scores.grad.flatten().tolist() == pytest.approx([1.0, -1.0], rel=1e-5)
    with pytest.raises(TypeError, match="outputs must hold class scores, got pairs"):
        GroupMarginalizedNLLLoss()(
            lambda grids: (grids[:, 0, 0],) * 2, torch.zeros(1, 1, 1), torch.zeros(1, dtype=torch.int64)
        )


# --- terms that do nothing -----------------------------------------------------------------------


def watch(terms: list[Tensor], *, patience: int = 3, total: float = 1.0, **more: Any) -> dict[str, str]:
    """What a detector says of one term over so many steps."""
    detector = DegenerateTermDetector(patience=patience)
    for term in terms:
        detector.observe("term", term, torch.tensor(total), **more)
    found = detector.findings()
    assert detector.findings() == {}  # once
    assert detector.found() == list(found)
    return found


def leaf(value: float) -> Tensor:
    """A term with a graph."""
    return torch.tensor(value, requires_grad=True)


@pytest.mark.parametrize(
    "values, total, reason",
    [
        ([0.0, 0.0, 0.0], 1.0, "is zero for 3 steps"),
        ([1e-7, -1e-7, 6e-8], 1.0, "is zero for 3 steps"),  # rounding that a bound of 1e-10 would let pass
        ([1e-7, -1e-7, 6e-8], 1e-3, None),  # beside a small loss that is a term like any other
        ([0.0, 0.0, 0.1], 1.0, None),
        ([0.0, 0.0, 0.1, 0.0, 0.0, 0.0], 1.0, "is zero for 3 steps"),
        ([0.0, 0.0, 0.0, 0.1], 1.0, "is zero for 3 steps"),
        ([0.7, 0.7, 0.7, 0.7], 1.0, "is constant for 3 steps"),
        ([0.7, 0.7, 0.7, 0.8], 1.0, None),
        ([0.7, 0.8, 0.9, 1.0], 1.0, None),
        ([NAN, NAN, NAN, NAN], 1.0, None),
    ],
)
def test_terms_that_do_nothing_are_found_with_a_reason(values, total, reason) -> None:
    """Relative to the total, over consecutive steps."""
    found = watch([leaf(value) for value in values], total=total)
    assert found == ({} if reason is None else {"term": reason})


def test_terms_without_a_gradient_are_found() -> None:
    """Those without a graph, and those whose gradient was measured as 0."""
    moving = [0.1, 0.2, 0.3]
    assert watch([torch.tensor(v) for v in moving]) == {"term": "has no gradient for 3 steps"}
    gone = {"gradient_norm": torch.tensor(0.0)}
    assert watch([leaf(v) for v in moving], **gone) == {"term": "has no gradient for 3 steps"}
    assert watch([leaf(v) for v in moving], gradient_norm=torch.tensor(1e-9)) == {}


def test_a_detector_goes_on_from_its_state() -> None:
    """Counts, the last value, and what has been told already."""
    one, other = DegenerateTermDetector(patience=4), DegenerateTermDetector(patience=4)
    for _ in range(3):
        one.observe("a", leaf(0.5), torch.tensor(1.0))
    other.load_state_dict(one.state_dict())
    assert other.findings() == {}
    for _ in range(2):
        other.observe("a", leaf(0.5), torch.tensor(1.0))
    assert other.findings() == {"a": "is constant for 4 steps"}
    one.load_state_dict(other.state_dict())
    assert (one.findings(), one.found()) == ({}, ["a"])
    with pytest.raises(ValueError, match="patience must be >= 1, got patience=0"):
        DegenerateTermDetector(patience=0)


def test_a_term_that_no_input_moves_is_told_from_one_that_answers() -> None:
    """The published term on features, before any training: no input gives it anything but rounding."""
    features = torch.randn(4, 6, 5, 5, generator=seeded())
    loss = AugmentationEquivarianceLoss()

    def term(context: Any) -> Any:
        return lambda x: loss({"c": context(x)}, {"t": {"c": context(D4["rotate_90"].apply(x))}}).loss

    assert not responds(term(global_context), features, generator=seeded())
    assert responds(term(positional_context), features, generator=seeded())


# --- in the trainer ------------------------------------------------------------------------------


class Reciprocal(nn.Module):
    """A small network to one (P, Q)."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            self.net = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 2)).double()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map (B, 1) to two (B,)."""
        return self.net(x).unbind(-1)


def fit(outputs: Any, lifted: Any) -> LossTerms:
    """The squared sine to the target's line."""
    return LossTerms(line_distance(*outputs[:2], *lifted, distance="l2").mean())


def batches(low: float = 0.2) -> list[tuple[Tensor, Tensor]]:
    """1/x on one side of its pole."""
    x = torch.linspace(low, 2.0, 48, dtype=F64)[torch.randperm(48, generator=seeded())].unsqueeze(1)
    return list(zip(x.split(16), (1 / x[:, 0]).split(16), strict=True))


def make_trainer(guard: EquivarianceGuard | None, *, epochs: int = 3, loader: Any = None, **more: Any) -> Any:
    """A trainer of 1/x on the positive side."""
    model = Reciprocal()
    config = TrainingConfig(max_epochs=epochs, coverage_threshold=0.0, **more)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    companions = [] if guard is None else [guard]
    return SCMTrainer(
        model, optimizer, fit, batches() if loader is None else loader, config=config, companions=companions
    )


def make_guard(weight: float = 1.0, **more: Any) -> EquivarianceGuard:
    """A guard that knows the function to be odd."""
    return EquivarianceGuard(OutputEquivarianceLoss(ODD, views=1, generator=seeded(1), **more), weight)


@pytest.mark.parametrize("distance", ["kl", "l2"])
def test_what_is_known_to_be_alike_is_learned_where_no_data_are(distance) -> None:
    """Trained right of the pole alone: with the guard the answers left of it are right as well."""
    x = -torch.linspace(0.3, 1.8, 50, dtype=F64).unsqueeze(1)

    def error(trainer: SCMTrainer) -> float:
        trainer.fit()
        with torch.no_grad():
            return line_distance(*trainer.model(x), torch.ones(50), x[:, 0], distance="l2").mean().item()

    guarded = make_trainer(make_guard(distance=distance), epochs=40)
    assert error(guarded) < 0.02 < 0.15 < error(make_trainer(None, epochs=40))
    said = guarded.telemetry()
    assert 0 < said["equivariance_loss"] < 0.02
    assert said["equivariance_degenerate"] == 0.0


def test_the_references_gradient_spoils_what_the_labels_had_taught() -> None:
    """It pulls answers with labels towards those without, where every input is seen one way round."""
    x = torch.linspace(0.3, 1.8, 50, dtype=F64).unsqueeze(1)

    def error(guard: EquivarianceGuard | None) -> float:
        trainer = make_trainer(guard, epochs=40)
        trainer.fit()
        with torch.no_grad():
            return line_distance(*trainer.model(x), torch.ones(50), x[:, 0], distance="l2").mean().item()

    assert error(None) < 0.005
    assert error(make_guard(trains="views", distance="kl")) < 0.005
    assert error(make_guard(trains="original", distance="kl")) > 0.05


def test_a_guard_of_no_weight_trains_as_without_it() -> None:
    """The views change nothing: no statistics, no generator of the training."""
    guarded, plain = make_trainer(make_guard(0.0)), make_trainer(None)
    guarded.fit()
    plain.fit()
    assert torch.equal(guarded.model.net[0].weight, plain.model.net[0].weight)
    assert guarded.telemetry()["equivariance_loss"] > 0


def test_a_term_that_cannot_train_is_reported() -> None:
    """Symmetries under which every answer is alike: the telemetry says so, and the guard says why."""
    nothing = make_symmetries({"nothing": (lambda x: x, lambda x: x)}, torch.ones(1, 1))
    guard = EquivarianceGuard(OutputEquivarianceLoss(nothing, views=1), 1.0)
    trainer = make_trainer(guard, epochs=8)
    trainer.fit()
    assert trainer.telemetry() == {"equivariance_loss": 0.0, "equivariance_degenerate": 1.0}
    assert guard.reason == "is zero for 24 steps"
    assert trainer.telemetry()["equivariance_degenerate"] == 1.0


def test_a_training_with_views_goes_on_bit_for_bit(tmp_path) -> None:
    """Interrupted in mid-epoch: the views drawn next, the mean and the detector are in the checkpoint."""

    def guard() -> EquivarianceGuard:
        turns = make_symmetries(
            {
                f"times {k}": (
                    lambda x, k=k: k * x,
                    lambda x, k=k: x / k,
                    lambda out, k=k: (out[0] * k, out[1]),
                )
                for k in (-1.0, 2.0, 0.5)
            },
            torch.ones(1, 1),
        )
        return EquivarianceGuard(OutputEquivarianceLoss(turns, views=1, generator=seeded(5)), 1.0)

    def keep(record: Any) -> None:
        if record["step"] == 5:
            whole.save_checkpoint(tmp_path / "mid.pt")

    whole = make_trainer(guard(), log_hook=keep, log_interval=1)
    whole.fit()
    resumed = make_trainer(guard(), log_hook=lambda record: None, log_interval=1)
    resumed.load_checkpoint(tmp_path / "mid.pt")
    resumed.fit()
    assert resumed.telemetry() == whole.telemetry()
    assert torch.equal(resumed.model.net[0].weight, whole.model.net[0].weight)


def test_rows_that_are_not_trained_take_no_part() -> None:
    """A row labelled missing: its answer to the mirrored input may be anything."""
    x, y = batches()[0]
    labels = ["finite"] * 15 + ["missing"]

    class Spoiled(Reciprocal):
        def forward(self, rows: Tensor) -> tuple[Tensor, Tensor]:
            P, Q = super().forward(rows)
            return torch.where(torch.arange(len(rows)) == 15, 1e6 * rows[:, 0], P), Q

    def masked(outputs: Any, lifted: Any, *, semantic_targets: Any) -> LossTerms:
        keep = semantic_targets.mask_trained
        return LossTerms(line_distance(*outputs, *lifted, distance="l2")[keep].mean())

    losses = []
    for model in (Spoiled(), Reciprocal()):
        guard = make_guard()
        config = TrainingConfig(max_epochs=1, coverage_threshold=0.0)
        loader = [(x, lift_semantic_targets(y, labels))]
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        trainer = SCMTrainer(model, optimizer, masked, loader, config=config, companions=[guard])
        trainer.fit()
        losses.append(trainer.telemetry()["equivariance_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


def test_views_run_in_half_precision_where_the_training_does() -> None:
    """Under autocast the model's own layers give half precision; the term is in full."""
    seen = []

    class Told(Reciprocal):
        def forward(self, rows: Tensor) -> tuple[Tensor, Tensor]:
            P, Q = self.net.float()(rows.float()).unbind(-1)
            seen.append(P.dtype)
            return P, Q

    model = Told()
    guard = EquivarianceGuard(OutputEquivarianceLoss(ODD, views=1), 1.0, amp_dtype=torch.bfloat16)
    config = TrainingConfig(max_epochs=1, coverage_threshold=0.0, mixed_precision=True)
    optimizer = torch.optim.SGD(model.float().parameters(), lr=1e-2)
    trainer = SCMTrainer(model, optimizer, fit, batches()[:1], config=config, companions=[guard])
    trainer.fit()
    assert seen == [torch.bfloat16, torch.bfloat16]
    assert trainer.telemetry()["equivariance_loss"] > 0


# --- on a GPU ------------------------------------------------------------------------------------

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class Unread:
    """Batches on the device, during which nothing may be read back from it."""

    def __init__(self, batches: list[tuple[Tensor, Tensor]]) -> None:
        self.batches = [(x.cuda(), y.cuda()) for x, y in batches]

    def __iter__(self) -> Any:
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield from self.batches
        finally:
            torch.cuda.set_sync_debug_mode("default")


@needs_gpu
@pytest.mark.parametrize("trains", ["original", "views", "both"])
@pytest.mark.parametrize("distance", ["kl", "l2"])
def test_on_a_gpu_views_are_compared_without_waiting(distance, trains) -> None:
    """The weights and the telemetry of the CPU; the detector counts on the device."""
    said, weights = [], []
    for device, loader in (("cpu", batches()), ("cuda", Unread(batches()))):
        model = Reciprocal().to(device)
        config = TrainingConfig(max_epochs=3, coverage_threshold=0.0, device=device)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, fused=True)
        guard = make_guard(distance=distance, trains=trains)
        trainer = SCMTrainer(model, optimizer, fit, loader, config=config, companions=[guard])
        trainer.fit()
        said.append(trainer.telemetry())
        weights.append(model.net[0].weight.detach().cpu())
    assert said[1] == pytest.approx(said[0], rel=1e-6)
    assert torch.allclose(weights[1], weights[0], rtol=1e-6)


@needs_gpu
def test_on_a_gpu_classes_and_contexts_are_those_of_the_cpu() -> None:
    """Scores of grids, a mask, marginalised views and both pools."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Unflatten(1, (1, 5)), nn.Conv2d(1, 4, 3, padding=1)).double()
    grids = torch.randn(3, 5, 5, dtype=F64, generator=seeded())
    targets = torch.randint(0, 4, (3, 5, 5), generator=seeded())

    def found(device: str) -> list[float]:
        model.to(device)
        x, y = grids.to(device), targets.to(device)
        losses = [
            OutputEquivarianceLoss(generator=seeded(), distance=distance)(model, x, mask=y > 0).loss
            for distance in ("kl", "l2")
        ]
        losses.append(GroupMarginalizedNLLLoss(generator=seeded())(model, x, y).loss)
        losses += [pool(model(x)).square().sum() for pool in (global_context, positional_context)]
        return [loss.item() for loss in losses]

    assert found("cuda") == pytest.approx(found("cpu"), rel=1e-9)
