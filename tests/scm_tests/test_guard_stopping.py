"""The terms of a stop head: the recorded numbers, and that every weight of theirs acts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from scm.guards.stablemax import FocalWeightedStablemaxLoss
from scm.guards.stopping import SparsityRegularization, SparsityTerms

# What the recorded model builds it with.
RLAN = {"min_clues": 2.5, "min_clue_weight": 5.0, "ponder_weight": 0.02, "entropy_ponder_weight": 0.02}


def assert_recorded(actual: Tensor, expected: Any, name: str) -> None:
    torch.testing.assert_close(
        actual.detach().double(),
        torch.tensor(expected, dtype=torch.float64),
        rtol=2e-5,
        atol=2e-6,
        equal_nan=True,
        msg=lambda text: f"{name}: {text}",
    )


def test_terms_are_the_recorded_ones(guard_vectors):
    """Total, samples, parts and gradient, save for one sample with a variance term."""
    cases = guard_vectors["sparsity"]
    assert len(cases) > 20
    for case in cases:
        if case["name"] == "batch_of_one_on":
            continue
        logits = torch.tensor(case["stop_logits"], requires_grad=True)
        maps = None if case["attention_maps"] is None else torch.tensor(case["attention_maps"])
        terms = SparsityRegularization(**case["params"])(logits, maps)
        out = case["out"]
        assert_recorded(terms.total, out["total"], case["name"])
        assert_recorded(terms.per_sample, out["per_sample"], case["name"])
        (gradient,) = torch.autograd.grad(terms.total, logits)
        assert_recorded(gradient, out["grad_of_total"], case["name"])
        parts = terms.components()
        assert set(parts) == set(out["components"])
        for name, expected in out["components"].items():
            # Recorded as 0 where its weight was 0; ours is a measurement.
            if name != "stop_logit_excess" or case["params"].get("saturation_weight"):
                assert_recorded(parts[name], expected, f"{case['name']} {name}")


def test_one_sample_leaves_the_variance_term_out(guard_vectors):
    """The recorded total is NaN there, with NaN gradients."""
    (case,) = [case for case in guard_vectors["sparsity"] if case["name"] == "batch_of_one_on"]
    logits = torch.tensor(case["stop_logits"], requires_grad=True)
    for form in ("hinge", "pairwise"):
        terms = SparsityRegularization(**case["params"], variance_form=form)(logits)
        assert terms.variance_penalty.item() == 0.0
        assert_recorded(terms.total, case["out"]["scalar_when_per_sample"], form)
        (gradient,) = torch.autograd.grad(terms.total, logits)
        assert gradient.isfinite().all()
        assert (gradient != 0).any()


def test_a_total_by_samples_has_every_term_in_it(guard_vectors):
    """Shared terms and samples added apart are the intended total: variance and saturation are in it."""
    for case in guard_vectors["rlan_total"]:
        given, out, weight = case["inputs"], case["out"], case["lambda_sparsity"]
        logits, targets = torch.tensor(given["logits"]), torch.tensor(given["targets"])
        terms = SparsityRegularization(
            **RLAN,
            variance_weight=case["clue_variance_weight"],
            saturation_weight=case["stop_saturation_weight"],
        )(torch.tensor(given["stop_logits"]), torch.tensor(given["attention_maps"]))
        canvas = FocalWeightedStablemaxLoss(reduction="canvas_mean")(logits, targets)
        task = canvas + weight * terms.per_sample.mean()
        assert_recorded(task, out["task_loss"], case["name"])
        assert_recorded(terms.base_pondering + terms.entropy_pondering, out["sparsity_loss"], case["name"])
        intended = case["intended"]
        assert_recorded(terms.variance_penalty, intended["variance_penalty"], case["name"])
        assert_recorded(terms.saturation_penalty, intended["saturation_penalty"], case["name"])
        others = out["total_loss"] - out["task_loss"] - weight * out["sparsity_loss"]
        assert_recorded(task + weight * terms.shared + others, intended["total_loss"], case["name"])
    assert out["total_loss"] < intended["total_loss"] - 0.5  # what the recorded total had left out


WEIGHTS = {
    "min_clues": (1.0, 2.0),
    "ponder_weight": (0.1, 0.2),
    "min_clue_weight": (1.0, 2.0),
    "entropy_ponder_weight": (0.05, 0.1),
    "variance_weight": (0.0, 1.0),
    "target_variance": (0.5, 0.9),
    "saturation_weight": (0.0, 1.0),
    "saturation_threshold": (5.0, 2.0),
}


def by_samples(terms: SparsityTerms) -> Tensor:
    """Add the terms as one does who weighs samples apart."""
    return terms.shared + (terms.per_sample * torch.tensor([0.5, 1.5, 1.0])).mean()


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("total", [by_samples, lambda terms: terms.total], ids=["by samples", "at once"])
@pytest.mark.parametrize("as_tensor", [False, True], ids=["number", "tensor"])
def test_every_weight_changes_the_loss_and_its_gradient(name, total, as_tensor):
    """However the terms are added up, and whether the weight is a number or a 0-d tensor."""
    generator = torch.Generator().manual_seed(0)
    maps = torch.rand((3, 4, 3, 3), generator=generator)
    maps = maps / maps.sum((2, 3), keepdim=True)
    start = torch.randn((3, 4), generator=generator) + torch.tensor([[2.0], [0.0], [6.0]])
    found = []
    for value in WEIGHTS[name]:
        settings: dict[str, Any] = {"variance_weight": 1.0, "saturation_weight": 1.0, "target_variance": 3.0}
        settings[name] = torch.tensor(value) if as_tensor else value
        logits = start.clone().requires_grad_()
        loss = total(SparsityRegularization(**settings)(logits, maps))
        (gradient,) = torch.autograd.grad(loss, logits)
        found.append((loss, gradient))
    assert found[0][0] != found[1][0]
    # Moving a met hinge changes no slope: thresholds show in the value.
    assert name in ("target_variance", "min_clues") or not torch.equal(found[0][1], found[1][1])


def test_exact_collapse_is_left_in_the_form_that_can():
    """The recorded hinge has no gradient where all samples are alike, the pairwise form parts them."""
    for form, moves in (("hinge", False), ("pairwise", True)):
        logits = torch.full((4, 6), 1.4388, requires_grad=True)
        terms = SparsityRegularization(variance_weight=1.0, variance_form=form)(logits)
        assert terms.variance_penalty.item() == pytest.approx(0.5)
        (gradient,) = torch.autograd.grad(terms.variance_penalty, logits)
        assert bool((gradient != 0).any()) is moves


def test_terms_are_vectorised_over_trials():
    """vmap over logits and a weight per trial gives what each trial gives alone."""
    logits = torch.randn((3, 5, 4), generator=torch.Generator().manual_seed(0)) * 4
    weight = torch.tensor([0.0, 0.5, 2.0])

    def total(z: Tensor, w: Any) -> Tensor:
        made = SparsityRegularization(variance_weight=w, saturation_weight=w, variance_form="pairwise")
        return made(z).total

    together = torch.vmap(total)(logits, weight)
    for trial in range(3):
        torch.testing.assert_close(together[trial], total(logits[trial], float(weight[trial])))


BAD: dict[str, Any] = {
    "weight": (lambda: SparsityRegularization(ponder_weight=-0.1), "ponder_weight must be finite and >= 0"),
    "threshold": (
        lambda: SparsityRegularization(saturation_threshold=float("nan")),
        "saturation_threshold must be finite and >= 0",
    ),
    "form": (
        lambda: SparsityRegularization(variance_form="jittered"),
        "variance_form must be one of hinge, pairwise, got variance_form='jittered'",
    ),
    "logits": (lambda: SparsityRegularization()(torch.zeros(3)), r"stop_logits must be \(B, K\)"),
    "maps": (
        lambda: SparsityRegularization()(torch.zeros(3, 2), torch.zeros(3, 1, 4, 4)),
        r"attention_maps must be \(B, K, H, W\) of stop_logits \(3, 2\)",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_refused(name):
    """The message says which argument breaks which rule."""
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call()
