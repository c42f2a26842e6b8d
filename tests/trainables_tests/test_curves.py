"""Curves of error against coverage: what thresholds on |Q| do to the answers of models."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scm.data import Split
from scm.training.targets import lift_semantic_targets
from scm.trial import Decoded
from scm.trial_config import TrialConfig
from trainables.curves import (
    CURVE_KEYS,
    FEW_LEVELS,
    LEVELS,
    curve_area,
    curve_columns,
    empty_curve,
    risk_curve,
    risk_points,
    smallest_tau,
)
from trainables.metrics import pack_metrics, standard_metrics

CONFIG = TrialConfig()


class Known:
    """A task whose error is known: answers against 0; `together` says whether it scores many at once."""

    name, error_unit = "known", "m"

    def __init__(self, together: bool) -> None:
        if together:
            self.pack_metrics = self._pack_metrics

    def metrics(self, decoded: Decoded, split: Split, config: TrialConfig) -> dict[str, float]:
        return standard_metrics(
            decoded.decoded, ~decoded.bottom, torch.zeros(len(split)), torch.zeros(len(split)), baseline=1.0
        )

    def _pack_metrics(self, decoded: Decoded, split: Split, configs: Any) -> list[dict[str, float]]:
        zeros = torch.zeros(len(split))
        return pack_metrics(decoded.decoded, ~decoded.bottom, zeros, zeros, baseline=1.0)


def split_of(rows: int) -> Split:
    zeros = torch.zeros(rows, dtype=torch.float64)
    return Split(zeros[:, None], lift_semantic_targets(zeros, torch.zeros(rows, dtype=torch.int64)))


def answers(errors: Any, q_abs: Any, fault: Any = None) -> Decoded:
    """One model, whose error in each row is known."""
    values = torch.as_tensor(errors, dtype=torch.float64)
    q = torch.as_tensor(q_abs, dtype=torch.float64)
    bad = torch.zeros(len(q), dtype=torch.bool) if fault is None else torch.as_tensor(fault)
    bottom = (q < smallest_tau(q.dtype)) | bad
    return Decoded(
        *(item[None] for item in (values.masked_fill(bottom, math.nan), bottom, bad, q, values * q))
    )


def points_of(held: Decoded, *, together: bool = True, levels: int = LEVELS) -> list[tuple[float, float]]:
    rows = held.decoded.shape[1]
    return risk_points(Known(together), split_of(rows), [CONFIG] * len(held.decoded), held, levels=levels)[0]


NUMBERS = st.floats(0.0, 10.0)
ROWS = st.lists(st.tuples(NUMBERS, st.floats(0.0, 2.0)), min_size=1, max_size=40)


@given(ROWS)
def test_each_point_is_the_mean_error_of_the_rows_it_lets_through(rows):
    errors, q = (np.array(side) for side in zip(*rows, strict=True))
    sound = q >= smallest_tau(torch.float64)
    for share, error in points_of(answers(errors, q)):
        through = [sound & (q >= tau) for tau in q[sound]]
        means = [errors[kept].mean() for kept in through if np.isclose(kept.mean(), share)]
        assert any(error == pytest.approx(mean) for mean in means)


@given(ROWS)
def test_scoring_many_at_once_changes_nothing(rows):
    errors, q = zip(*rows, strict=True)
    together, alone = points_of(answers(errors, q)), points_of(answers(errors, q), together=False)
    assert [share for share, _ in together] == [share for share, _ in alone]
    assert [error for _, error in together] == pytest.approx([error for _, error in alone], nan_ok=True)


def test_a_task_that_scores_one_by_one_is_asked_a_few_times():
    """Its metrics may be slow, and every trial ends with a curve."""
    q = np.linspace(0.1, 2.0, 100)
    asked = Known(together=False)
    found = risk_points(asked, split_of(100), [CONFIG], answers(2.0 - q, q))[0]
    assert len(found) == FEW_LEVELS
    assert (found[0][0], found[-1][0]) == (1.0, pytest.approx(0.06))


@given(ROWS, st.randoms(use_true_random=False))
def test_the_order_of_rows_changes_nothing(rows, random):
    turned = list(rows)
    random.shuffle(turned)
    one, other = (points_of(answers(*zip(*each, strict=True))) for each in (rows, turned))
    assert [share for share, _ in one] == [share for share, _ in other]
    assert [error for _, error in one] == pytest.approx([error for _, error in other], nan_ok=True)


def test_a_threshold_that_orders_answers_well_has_a_falling_curve():
    """The first point gives every answer, the last the surest twentieth."""
    q = np.linspace(0.1, 2.0, 200)
    coverage, error = risk_curve(points_of(answers(2.0 - q, q)))
    assert (coverage[0], coverage[-1]) == (pytest.approx(0.055), 1.0)
    assert len(coverage) == LEVELS
    assert error == sorted(error)
    worse, best = (curve_columns(points_of(answers(err, q)))["curve_area"] for err in (q, 2.0 - q))
    assert best < worse


def test_models_beside_each_other_do_not_meet():
    one, two = answers([1.0, 2.0], [1.0, 0.5]), answers([5.0, 7.0], [0.1, 0.2])
    both = Decoded(*(torch.cat(pair) for pair in zip(one, two, strict=True)))
    found = risk_points(Known(True), split_of(2), [CONFIG, CONFIG], both)
    assert found == [points_of(one), points_of(two)]


def test_faults_and_what_is_not_finite_have_no_threshold():
    held = answers([1.0, 1.0, 1.0], [1.0, math.inf, 0.5], [False, True, False])
    assert points_of(held) == [(pytest.approx(2 / 3), 1.0)]
    nothing = answers([1.0], [math.nan], [True])
    assert points_of(nothing) == []


def test_a_model_that_the_task_cannot_score_has_no_curve():
    class Refuses(Known):
        def metrics(self, decoded: Decoded, split: Split, config: TrialConfig) -> dict[str, float]:
            raise ValueError("no")

    found = risk_points(Refuses(False), split_of(2), [CONFIG], answers([1.0, 2.0], [1.0, 0.5]))
    assert found == [[]]
    assert curve_columns(found[0]) | {"curve_area": None} == empty_curve() | {"curve_area": None}
    assert tuple(empty_curve()) == CURVE_KEYS


def test_many_models_are_scored_in_parts(monkeypatch):
    monkeypatch.setattr("trainables.curves._ELEMENTS", 5)
    q = np.linspace(0.1, 2.0, 20)
    held = points_of(answers(q, q))
    monkeypatch.undo()
    assert held == points_of(answers(q, q))


@given(st.lists(st.tuples(st.floats(0.01, 1), st.floats(0, 5)), min_size=1, max_size=20))
def test_the_area_is_a_mean_between_the_extremes(points):
    """The trapezoids over the curve's own width, as NumPy sums them."""
    coverage, error = risk_curve(points)
    area = curve_area(coverage, error)
    assert coverage == sorted(set(coverage))
    assert min(error) - 1e-9 <= area <= max(error) + 1e-9
    width = coverage[-1] - coverage[0]
    if width > 1e-6:
        assert area == pytest.approx(np.trapezoid(error, coverage) / width)


def test_points_without_an_error_are_left_out():
    """What was answered nowhere has no error; an infinite one stays what it is."""
    assert risk_curve([(0.0, math.nan), (1.0, math.inf)]) == ([1.0], [math.inf])
    assert math.isnan(curve_area(*risk_curve([(0.0, math.nan)])))
    assert curve_area([0.5, 1.0], [1.0, math.inf]) == math.inf


@given(st.floats(0.0, 5.0), st.lists(st.floats(0.01, 2.0), min_size=1, max_size=30))
def test_of_a_constant_error_the_area_is_that_error_and_coverage_grows(error, q):
    """Whatever the order is that |Q| puts answers in."""
    told = curve_columns(points_of(answers([error] * len(q), q)))
    assert told["curve_area"] == pytest.approx(error)
    assert told["curve_coverage"] == sorted(set(told["curve_coverage"]))
    assert told["curve_coverage"][-1] == 1.0


@pytest.mark.parametrize("shape", [(), (2,), (3, 4, 5)])
def test_answers_of_any_shape_over_one_denominator_have_a_curve(shape):
    """A row is hidden whole, be its answer a number, a vector or a grid of scores."""

    class Shaped(Known):
        def metrics(self, decoded: Decoded, split: Split, config: TrialConfig) -> dict[str, float]:
            kept = decoded.decoded[~decoded.bottom]
            assert kept.isfinite().all()
            assert decoded.decoded[decoded.bottom].isnan().all()
            return {"accepted_error": float(kept.mean()), "charged_error": 0.0}

    q = torch.linspace(0.1, 1.0, 20, dtype=torch.float64)[None]
    values = torch.ones(1, 20, *shape, dtype=torch.float64)
    none = torch.zeros(1, 20, dtype=torch.bool)
    (points,) = risk_points(Shaped(False), split_of(20), [CONFIG], Decoded(values, none, none, q, values))
    assert [error for _, error in points] == [1.0] * FEW_LEVELS
