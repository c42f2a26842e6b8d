"""Scores in which neither abstaining nor answering garbage looks good."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scm.training.targets import STATUS_CODES, STATUSES
from trainables.metrics import standard_metrics


def codes(*labels: str) -> torch.Tensor:
    return torch.tensor([STATUS_CODES[label] for label in labels])


def floats(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def bools(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.bool)


def test_finite_rows_pay_their_error_or_the_baselines() -> None:
    """Accepted: off by 1 and 3. Rejected: the baseline 5 is off by 4 from 9."""
    scores = standard_metrics(
        floats(2, 7, math.nan),
        bools(1, 1, 0),
        floats(1, 4, 9),
        codes("finite", "finite", "finite"),
        baseline=5.0,
    )
    assert scores["accepted_error"] == pytest.approx((1 + 3) / 2)
    assert scores["charged_error"] == pytest.approx((1 + 3 + 4) / 3)
    assert scores["false_reject_rate"] == pytest.approx(1 / 3)
    assert math.isnan(scores["false_accept_rate"])


@pytest.mark.parametrize(
    "label, answer, violation",
    [
        ("censored_below", 5.0, 2.0),
        ("censored_below", 1.0, 0.0),
        ("censored_above", 1.0, 2.0),
        ("censored_above", 5.0, 0.0),
    ],
)
def test_accepted_censored_row_pays_what_it_oversteps_its_bound_by(
    label: str, answer: float, violation: float
) -> None:
    """Below a bound of 3 every answer up to 3 is right, above it every answer from 3 on."""
    scores = standard_metrics(floats(answer), bools(1), floats(3), codes(label), baseline=0.0)
    assert scores["accepted_error"] == violation
    assert scores["false_accept_rate"] == 1.0
    assert math.isnan(scores["charged_error"])


def test_rows_without_a_value_count_in_no_error() -> None:
    """Missing rows, semantic bottoms and censored rows without a bound have no error to pay."""
    labels = codes("finite", "missing", "bottom", "censored_above", "domain_invalid", "fault")
    value = floats(1, math.nan, math.nan, math.nan, math.nan, math.nan)
    scores = standard_metrics(
        torch.full((6,), 3.0), torch.ones(6, dtype=torch.bool), value, labels, baseline=0.0
    )
    assert scores["accepted_error"] == 2.0
    assert scores["charged_error"] == 2.0
    assert scores["false_accept_rate"] == 1.0


def test_accepted_answer_that_is_not_finite_costs_infinity() -> None:
    """An overflow on the way to target units is no answer, and is not passed over as NaN would be."""
    for answer in (math.inf, math.nan):
        scores = standard_metrics(
            floats(answer, 1), bools(1, 1), floats(1, 1), codes("finite", "finite"), baseline=0.0
        )
        assert scores["accepted_error"] == math.inf
        assert scores["charged_error"] == math.inf


def test_one_mask_holds_for_all_outputs_of_a_row() -> None:
    """A head with one denominator accepts or rejects its outputs together; the baseline is one per output."""
    value = floats(1, 10, 2, 20).reshape(2, 2)
    scores = standard_metrics(
        value + 1, bools(1, 0), value, torch.full((2, 2), STATUS_CODES["finite"]), baseline=floats(0, 0)
    )
    assert scores["accepted_error"] == 1.0
    assert scores["charged_error"] == pytest.approx((1 + 1 + 2 + 20) / 4)
    assert scores["false_reject_rate"] == 0.5


def test_shapes_must_agree() -> None:
    """A prediction of another shape is refused instead of being broadcast."""
    with pytest.raises(ValueError, match="must have one shape"):
        standard_metrics(floats(1), bools(1, 1), floats(1, 2), codes("finite", "finite"), baseline=0.0)


@st.composite
def answered_rows(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    size = draw(st.integers(1, 12))
    number = st.floats(-1e6, 1e6)
    value = draw(st.lists(number, min_size=size, max_size=size))
    labels = draw(st.lists(st.sampled_from(STATUSES), min_size=size, max_size=size))
    answers = draw(st.lists(number, min_size=size, max_size=size))
    return floats(*answers), floats(*value), codes(*labels)


@settings(max_examples=60, deadline=None)
@given(answered_rows(), st.floats(-1e6, 1e6))
def test_rejecting_everything_is_charged_as_the_baseline_answering_everything(
    rows: tuple[torch.Tensor, torch.Tensor, torch.Tensor], baseline: float
) -> None:
    """Abstention is never cheaper than the trivial answer: the two charged errors are one number."""
    answers, value, status = rows
    nothing = torch.zeros(len(value), dtype=torch.bool)
    abstains = standard_metrics(answers, nothing, value, status, baseline=baseline)["charged_error"]
    trivial = standard_metrics(torch.full_like(value, baseline), ~nothing, value, status, baseline=0.0)
    assert abstains == pytest.approx(trivial["charged_error"], nan_ok=True)
