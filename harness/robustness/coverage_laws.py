"""Laws of coverage and of the losses that ask for it: groups 17 and 18."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from harness.robustness.edge_values import batches
from harness.robustness.law import BrokenLawError, Case, Property, Subject, library_law
from harness.robustness.tensors import (
    eps,
    gradients_of,
    leaves,
    number,
    on,
    rows_to_try,
    within,
)

_SHARE = {"target": st.sampled_from([0.95, 0.5, 1.0, 0.0]) | st.floats(0, 1)}
_SHARES = {**_SHARE, "temperature": st.sampled_from([1e-2, 0.1, 1.0])}


def _coverage_terms_are_bounded(subject: Subject, case: Case) -> None:
    (Q,) = on(subject, case, "Q")
    for name in ("soft_coverage_loss", "ranked_coverage_loss"):
        loss = getattr(subject, name, None)
        if loss is not None:
            value = number(loss(Q, case["tau"], case["temperature"], case["target"]))
            within(name, value, 0.0, 1.0)


def _coverage_is_the_share(subject: Subject, case: Case) -> None:
    (bottom,) = on(subject, case, "bottom")
    got = number(subject.coverage(bottom))
    expected = 1.0 - float(bottom.double().mean())
    if not abs(got - expected) <= 1e-6:
        raise BrokenLawError(f"the coverage is {got}, the share of rows that are no bottoms {expected}")
    halves = [half for half in (bottom[: case["cut"]], bottom[case["cut"] :]) if half.numel()]
    merged = sum(number(subject.coverage(half)) * half.numel() for half in halves) / bottom.numel()
    if not abs(got - merged) <= 1e-6:
        raise BrokenLawError(f"the coverage is {got}, of its parts, by their sizes, {merged}")


def _coverage_is_a_share(subject: Subject, case: Case) -> None:
    (bottom,) = on(subject, case, "bottom")
    within("coverage", number(subject.coverage(bottom)), 0.0, 1.0)


def _rejection_is_the_shortfall(subject: Subject, case: Case) -> None:
    (bottom,) = on(subject, case, "bottom")
    got = number(subject.rejection_loss(bottom, case["target"]))
    share = 1.0 - (float(bottom.double().mean()) if bottom.numel() else 0.0)
    expected = max(case["target"] - share, 0.0) ** 2
    if not abs(got - expected) <= 1e-6:
        raise BrokenLawError(f"the rejection loss is {got}, the squared shortfall {expected}")


def _coverage_terms(subject: Subject) -> list[str]:
    names = ("soft_coverage_loss", "ranked_coverage_loss")
    return [name for name in names if getattr(subject, name, None) is not None]


def _coverage_terms_grow_with_tau(subject: Subject, case: Case) -> None:
    (Q,) = on(subject, case, "Q")
    for name in _coverage_terms(subject):
        loss = getattr(subject, name)
        low, high = (
            number(loss(Q, case[tau], case["temperature"], case["target"])) for tau in ("tau", "tau_high")
        )
        if not low <= high + 16 * eps(Q):
            raise BrokenLawError(f"{name} falls from {low:.9g} to {high:.9g} as tau grows")


def _coverage_terms_never_push_inward(subject: Subject, case: Case) -> None:
    (Q,) = leaves(subject, case, "Q")
    for name in _coverage_terms(subject):
        (slope,) = gradients_of(
            getattr(subject, name)(Q, case["tau"], case["temperature"], case["target"]), Q
        )
        inward = slope * torch.copysign(torch.ones_like(Q), Q).detach() > 0
        if bool(inward.any()):
            raise BrokenLawError(f"{name} pushes |Q| towards 0: gradient {slope.tolist()}")


def _coverage_terms_push_zeros_out(subject: Subject, case: Case) -> None:
    Q = torch.full((case["rows"],), case["zero"], dtype=case["like"].dtype, device=subject.device)
    Q.requires_grad_()
    for name in _coverage_terms(subject):
        (slope,) = gradients_of(getattr(subject, name)(Q, 0.1, 0.1, 0.95), Q)
        if not slope.abs().max() > 0:
            raise BrokenLawError(f"{name} leaves {case['zero']} where it is")


COVERAGE_LAWS: list[Property] = [
    library_law(
        "coverage_is_the_share_of_answers",
        17,
        "Coverage is 1 - mean(bottom), and that of merged batches the mean of theirs, weighted by rows.",
        "coverage",
        lambda subject: batches(subject.dtypes, {"bottom": "flag"}, plain={"cut": st.integers(0, 6)}),
        _coverage_is_the_share,
    ),
    library_law(
        "coverage_is_in_range_for_any_batch",
        17,
        "Coverage is in [0, 1], for an empty batch too.",
        "coverage",
        lambda subject: batches(subject.dtypes, {"bottom": "flag"}, least=0),
        _coverage_is_a_share,
    ),
    library_law(
        "rejection_is_the_squared_shortfall",
        17,
        "The rejection loss is relu(target - coverage)^2, for an empty batch too.",
        "rejection_loss",
        lambda subject: batches(subject.dtypes, {"bottom": "flag"}, plain=_SHARE, least=0),
        _rejection_is_the_shortfall,
    ),
    library_law(
        "coverage_terms_are_bounded",
        18,
        "Soft and ranked coverage losses of finite rows are in [0, 1].",
        "soft_coverage_loss",
        rows_to_try({"Q": "finite"}, near=("tau",), plain=_SHARES),
        _coverage_terms_are_bounded,
    ),
    library_law(
        "coverage_terms_grow_with_tau",
        18,
        "A larger threshold never lowers a coverage loss.",
        "soft_coverage_loss",
        rows_to_try({"Q": "finite"}, near=("tau", "tau_high"), plain=_SHARES),
        _coverage_terms_grow_with_tau,
    ),
    library_law(
        "coverage_terms_never_push_inward",
        18,
        "The gradient of a coverage loss never pushes |Q| towards 0.",
        "soft_coverage_loss",
        rows_to_try({"Q": "finite"}, near=("tau",), plain=_SHARES),
        _coverage_terms_never_push_inward,
    ),
    library_law(
        "coverage_terms_push_zeros_out",
        18,
        "Where coverage is missing, the gradient of a coverage loss moves an exact zero.",
        "soft_coverage_loss",
        lambda subject: batches(
            subject.dtypes,
            {"like": "ordinary"},
            plain={"rows": st.integers(1, 4), "zero": st.sampled_from([0.0, -0.0])},
            most=1,
        ),
        _coverage_terms_push_zeros_out,
    ),
]
