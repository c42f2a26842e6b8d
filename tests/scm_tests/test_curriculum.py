"""Ramps and the weights that they override."""

from __future__ import annotations

import copy
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scm.training.curriculum import LinearRamp, LossWeightsCurriculum


def test_linear_ramp_matches_the_recorded_cases(vector_group, decode_numbers):
    """Every recorded ramp has the recorded value at each epoch; a nan end point is refused instead."""
    for case in vector_group("linear_ramp"):
        ends = (decode_numbers(case["start_value"]), decode_numbers(case["end_value"]))
        arguments = (*ends, case["start_epoch"], case["end_epoch"])
        if "raises" in case["expected"] or case.get("quirk"):
            with pytest.raises(ValueError, match="must be"):
                LinearRamp(*arguments)
            continue
        ramp = LinearRamp(*arguments)
        assert [ramp.value(epoch) for epoch in case["epochs"]] == pytest.approx(
            case["expected"], rel=1e-15, abs=0
        ), case["id"]


def test_curriculum_matches_the_recorded_cases(vector_group):
    """Ramps override base weights by name; base weights without a ramp stay."""
    for case in vector_group("loss_weights_curriculum"):
        ramps = {name: LinearRamp(*arguments) for name, arguments in case["ramps"].items()}
        weights = LossWeightsCurriculum(ramps).weights(case["epoch"], case["base"])
        assert weights == pytest.approx(case["expected"], rel=1e-15, abs=0), case["id"]


def test_base_weights_are_copied():
    """What a caller does to the weights reaches neither the base nor the curriculum."""
    base, ramps = {"fit": 1.0}, {"sign": LinearRamp(0.0, 1.0)}
    curriculum = LossWeightsCurriculum(ramps)
    ramps["margin"] = LinearRamp(0.0, 1.0)
    curriculum.weights(0, base)["fit"] = 9.0
    assert base == {"fit": 1.0}
    assert curriculum.weights(5) == {"sign": 1.0}


@given(st.floats(-10, 10), st.floats(-10, 10), st.integers(-5, 5), st.integers(0, 10), st.integers(-10, 20))
def test_a_ramp_stays_between_its_ends(start, end, first, length, epoch):
    """No epoch has a value outside of the two end values, up to rounding."""
    value = LinearRamp(start, end, first, first + length).value(epoch)
    assert min(start, end) - 1e-14 * 10 <= value <= max(start, end) + 1e-14 * 10


def test_curricula_travel():
    """A curriculum can be pickled and copied, as a config that is sent to a worker must be."""
    curriculum = LossWeightsCurriculum({"sign": LinearRamp(0.0, 1.0, 2, 4)})
    assert pickle.loads(pickle.dumps(curriculum)) == curriculum
    assert copy.deepcopy(curriculum) == curriculum


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: LinearRamp(0.0, float("inf")), ValueError, "end_value must be finite"),
        (lambda: LinearRamp(float("nan"), 1.0), ValueError, "start_value must be finite"),
        (
            lambda: LinearRamp(0.0, 1.0, 3, 2),
            ValueError,
            "end_epoch must be >= start_epoch=3, got end_epoch=2",
        ),
        (lambda: LossWeightsCurriculum({"": LinearRamp(0.0, 1.0)}), ValueError, "named by non-empty str"),
        (lambda: LossWeightsCurriculum({"sign": 1.0}), TypeError, "must be a LinearRamp, got float"),
    ],
    ids=["infinite end", "nan start", "epochs inverted", "no name", "no ramp"],
)
def test_bad_ramps_are_refused(make, error, message):
    """A ramp that could give no weight is refused when it is made."""
    with pytest.raises(error, match=message):
        make()
