"""Choosing tau_infer on held-out data, the record of the choice, and decoding through it."""

from __future__ import annotations

import copy
import json
import math
import pickle
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import scm
from scm.inference import (
    CalibratedHead,
    CalibrationError,
    CalibrationRecord,
    GaugeMismatchError,
    UncalibratedWarning,
    calibrate,
    calibrated_decode,
    strict_inference,
)
from scm.inference.calibration import SCHEMA_VERSION

DTYPES = st.sampled_from([torch.float32, torch.float64])
LEVELS = st.one_of(st.floats(0, 1, width=32), st.sampled_from([0.0, 0.1, 0.1, 0.5, math.nan, math.inf]))
ROWS = st.lists(st.tuples(LEVELS, st.booleans()), min_size=2, max_size=25).filter(
    lambda rows: len({flag for _, flag in rows}) == 2
)
BOUNDS = st.one_of(st.floats(0, 0.99), st.sampled_from([0.0, 0.1, 0.29, 0.5]))


def split_of(rows, dtype=torch.float64):
    return torch.tensor([q for q, _ in rows], dtype=dtype), torch.tensor([flag for _, flag in rows])


def rates(q, in_range, tau):
    """False-accept and false-reject rates by the rule itself, in NumPy."""
    q, in_range = q.numpy(), in_range.numpy()
    accepted = np.isfinite(q) & (q >= np.asarray(tau, dtype=q.dtype))
    return accepted[~in_range].mean(), (~accepted[in_range]).mean()


def record(**changes):
    q, flags = torch.tensor([0.01, 0.02, 0.3, 0.5]), torch.tensor([False, False, True, True])
    return calibrate(q, flags, **{"split": "val", "max_false_accept": 0.0, **changes})


def unit_tuples(angles):
    return torch.cos(angles), torch.sin(angles)


# --- the choice -----------------------------------------------------------------------------------


@given(ROWS, BOUNDS, DTYPES)
def test_the_smallest_threshold_that_meets_a_false_accept_bound(rows, bound, dtype):
    """The bound holds on the split, and fails at every smaller threshold at which a decision changes."""
    q, in_range = split_of(rows, dtype)
    chosen = calibrate(q, in_range, split="val", max_false_accept=bound)
    tau = chosen.tau_infer
    accepts, rejects = rates(q, in_range, tau)
    assert accepts <= bound
    assert chosen.false_accept_rate == pytest.approx(accepts)
    assert chosen.false_reject_rate == pytest.approx(rejects)
    below = np.nextafter(np.asarray(tau, dtype=q.numpy().dtype), 0)
    if below >= chosen.bound["tau_min"]:
        assert rates(q, in_range, below)[0] > bound


@given(ROWS, BOUNDS, DTYPES)
def test_the_largest_threshold_that_meets_a_false_reject_bound(rows, bound, dtype):
    """The bound holds on the split and fails one ulp above; where it cannot hold, the error says what can."""
    q, in_range = split_of(rows, dtype)
    floor = np.asarray(1e-12, dtype=q.numpy().dtype)
    least = rates(q, in_range, floor)[1]
    if least > bound:
        with pytest.raises(CalibrationError, match=f"the best within reach is {least:.6g} "):
            calibrate(q, in_range, split="val", max_false_reject=bound)
        return
    chosen = calibrate(q, in_range, split="val", max_false_reject=bound)
    assert rates(q, in_range, chosen.tau_infer)[1] <= bound
    above = np.nextafter(np.asarray(chosen.tau_infer, dtype=q.numpy().dtype), np.inf)
    assert rates(q, in_range, above)[1] > bound


@given(ROWS, BOUNDS, st.randoms(use_true_random=False))
def test_the_order_of_rows_does_not_matter(rows, bound, random):
    """Shuffled rows give the same threshold and counts."""
    shuffled = list(rows)
    random.shuffle(shuffled)
    one, other = (calibrate(*split_of(r), split="val", max_false_accept=bound) for r in (rows, shuffled))
    assert (one.tau_infer, one.counts, one.curve) == (other.tau_infer, other.counts, other.curve)


@given(ROWS, BOUNDS)
def test_the_record_counts_what_decoding_does(rows, bound):
    """Strict decoding with the chosen threshold makes exactly the recorded errors on the split."""
    q, in_range = split_of(rows)
    chosen = calibrate(q, in_range, split="val", max_false_accept=bound)
    bottom = strict_inference(torch.ones_like(q) * 1e-300, q, chosen.inference_config()).bottom_mask
    assert int((~bottom & ~in_range).sum()) == chosen.counts["false_accepts"]
    assert int((bottom & in_range).sum()) == chosen.counts["false_rejects"]
    at = chosen.curve["taus"].index(chosen.tau_infer)
    assert chosen.curve["fp_cens"][at] == pytest.approx(chosen.false_accept_rate, abs=1e-12)
    assert chosen.curve["fn_in"][at] == pytest.approx(chosen.false_reject_rate, abs=1e-12)


def test_ties_are_rejected_or_accepted_together():
    """Of three censored rows at one |Q| either all or none are accepted."""
    q = torch.tensor([0.2, 0.2, 0.2, 0.1, 0.9], dtype=torch.float64)
    flags = torch.tensor([False, False, False, False, True])
    assert calibrate(q, flags, split="val", max_false_accept=0.5).tau_infer == math.nextafter(0.2, 1)
    assert calibrate(q, flags, split="val", max_false_accept=0.75).tau_infer == math.nextafter(0.1, 1)


def test_a_whole_number_of_rows_is_allowed_whatever_the_product_rounds_to():
    """0.29 of 100 rows are 29, although 0.29·100 is below 29."""
    q = torch.arange(1, 101, dtype=torch.float64) / 100
    chosen = calibrate(q, torch.ones(100, dtype=torch.bool), split="val", max_false_reject=0.29)
    assert chosen.counts["false_rejects"] == 29


def test_both_bounds_hold_or_the_error_names_what_is_within_reach():
    """With two bounds the smallest threshold for the first must meet the second."""
    q = torch.tensor([0.1, 0.2, 0.15, 0.5], dtype=torch.float64)
    flags = torch.tensor([False, False, True, True])
    both = {"split": "val", "max_false_accept": 0.0}
    assert calibrate(q, flags, max_false_reject=0.5, **both).tau_infer == math.nextafter(0.2, 1)
    with pytest.raises(
        CalibrationError, match=r"best false-reject rate within reach is 0\.5, at tau_infer=0\.2"
    ):
        calibrate(q, flags, max_false_reject=0.4, **both)


def test_confidence_leaves_room_for_chance():
    """Of 59 clean rows, 0 errors just show a rate below 5 % with confidence 95 %; of 58 they do not."""
    for rows, enough in ((59, True), (58, False)):
        q = torch.cat([torch.zeros(rows), torch.ones(1)])
        flags = torch.arange(rows + 1) == rows
        ask = {"split": "val", "max_false_accept": 0.05, "confidence": 0.95}
        if enough:
            assert calibrate(q, flags, **ask).counts["false_accepts"] == 0
        else:
            with pytest.raises(
                CalibrationError, match=r"needs at least 59 rows; the best within reach is 0\.0503"
            ):
                calibrate(q, flags, **ask)
    with pytest.raises(CalibrationError, match="needs a bound above 0"):
        calibrate(q, flags, split="val", max_false_accept=0.0, confidence=0.9)


def test_confidence_allows_what_the_binomial_limit_allows():
    """The number of allowed errors is the largest whose exact one-sided limit is within the bound."""
    from scipy.stats import beta

    total, bound, confidence = 400, 0.1, 0.9
    q = torch.linspace(0.1, 0.9, total, dtype=torch.float64)
    chosen = calibrate(
        q, torch.zeros(total, dtype=torch.bool), split="val", max_false_accept=bound, confidence=confidence
    )
    errors = chosen.counts["false_accepts"]
    limits = [beta.ppf(confidence, k + 1, total - k) for k in (errors, errors + 1)]
    assert limits[0] <= bound < limits[1]


@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("bound", [0.03, 0.1, 0.5])
@pytest.mark.parametrize("total", [30, 61, 250])
@pytest.mark.parametrize("side", ["accept", "reject"])
def test_as_many_errors_as_the_binomial_law_allows(side, total, bound, confidence):
    """The largest k with P(X <= k) <= 1 - confidence, and no more than the bound itself; by SciPy's law."""
    from scipy.stats import binom

    by_chance = np.flatnonzero(binom.cdf(np.arange(total + 1), total, bound) <= 1 - confidence)
    allowed = min(by_chance.max(initial=-1), math.floor(bound * total + 1e-9))
    q = torch.linspace(0.1, 0.9, total, dtype=torch.float64)
    flags = torch.full((total,), side == "reject")
    ask = {"split": "val", f"max_false_{side}": bound, "confidence": confidence}
    if allowed < 0:
        with pytest.raises(
            CalibrationError, match=f"{total} .* rows cannot show max_false_{side} <= {bound}"
        ):
            calibrate(q, flags, **ask)
    else:
        assert calibrate(q, flags, **ask).counts[f"false_{side}s"] == allowed


@pytest.mark.parametrize("confidence", [0.0, 1.0, -0.5, math.nan])
def test_a_confidence_lies_between_zero_and_one(confidence):
    """At the ends it would ask for nothing, or for more than any number of rows can show."""
    with pytest.raises(ValueError, match=r"confidence must be in \(0, 1\), got confidence="):
        record(confidence=confidence)


def test_a_product_that_rounds_up_allows_no_row_too_many():
    """6 * 0.8333333333333333 rounds to 5, and 5 of 6 are more than that bound."""
    bound, q = 0.8333333333333333, torch.linspace(0.1, 0.9, 6, dtype=torch.float64)
    assert (int(bound * 6), bound < 5 / 6) == (5, True)
    for side in ("accept", "reject"):
        flags = torch.full((6,), side == "reject")
        chosen = calibrate(q, flags, split="val", **{f"max_false_{side}": bound})
        assert chosen.counts[f"false_{side}s"] == 4


def test_what_is_within_reach_of_both_bounds_is_counted():
    """With the smallest threshold that meets the first bound, 2 of 4 in-range rows are lost."""
    q = torch.tensor([0.3, 0.1, 0.2, 0.4, 0.5])
    flags = torch.tensor([False, True, True, True, True])
    with pytest.raises(
        CalibrationError, match="false-accept rate <= 0.0 and a .* <= 0.25: .* within reach is 0.5,"
    ):
        calibrate(q, flags, split="val", max_false_accept=0.0, max_false_reject=0.25)
    assert calibrate(q, flags, split="val", max_false_accept=0.0, max_false_reject=0.5).counts == {
        "total": 5,
        "in_range": 4,
        "censored": 1,
        "non_finite": 0,
        "false_accepts": 0,
        "false_rejects": 2,
    }


def test_denominators_that_are_not_finite_are_counted():
    """NaN and both infinities, of either kind of row."""
    q = torch.tensor([math.nan, math.inf, 0.5, 0.1])
    chosen = calibrate(q, torch.tensor([True, False, True, False]), split="val", max_false_accept=0.5)
    assert (chosen.counts["non_finite"], chosen.counts["total"]) == (2, 4)


def test_confidence_tightens_the_second_bound_as_well():
    """With both bounds the second is held to its exact limit too: 58 clean rows cannot show 5 %."""
    q = torch.cat([torch.zeros(100), torch.ones(58)])
    flags = torch.arange(158) >= 100
    ask = {"split": "val", "max_false_accept": 0.05, "max_false_reject": 0.05}
    assert calibrate(q, flags, **ask).counts["false_rejects"] == 0
    with pytest.raises(CalibrationError, match="58 in-range rows cannot show max_false_reject <= 0.05"):
        calibrate(q, flags, **ask, confidence=0.95)


def test_the_curve_is_geometric_from_the_smallest_to_the_largest_denominator():
    """41 thresholds with equal ratios, and the chosen one among them; a rate over no rows is None."""
    q = torch.tensor([0.0, 0.01, 0.02, 0.3, 0.5, math.nan, math.inf], dtype=torch.float64)
    flags = torch.tensor([False, False, False, True, True, True, False])
    chosen = calibrate(q, flags, split="val", max_false_accept=0.25, gauge="raw")
    taus = [tau for tau in chosen.curve["taus"] if tau != chosen.tau_infer]
    grid = np.exp(np.linspace(np.log(0.01), np.log(0.5), 41))
    assert np.abs(np.subtract.outer(taus, grid)).min(axis=1).max() < 1e-12
    assert 40 <= len(taus) <= 41
    assert (min(taus), max(taus)) == (pytest.approx(0.01), pytest.approx(0.5))
    assert chosen.tau_infer in chosen.curve["taus"]
    assert list(chosen.curve["taus"]) == sorted(chosen.curve["taus"])
    nobody = calibrate(q[:3], flags[:3], split="val", max_false_accept=0.0)
    assert None in nobody.curve["fn_in"]
    assert None not in nobody.curve["fp_cens"]


def test_the_bound_with_confidence_holds_in_the_population():
    """Over many splits the true rate exceeds the bound about as rarely as promised."""
    generator = torch.Generator().manual_seed(0)
    bound, confidence, exceeded, splits = 0.2, 0.8, 0, 300
    flags = torch.zeros(60, dtype=torch.bool)
    for _ in range(splits):
        q = torch.rand(60, generator=generator, dtype=torch.float64)
        tau = calibrate(q, flags, split="val", max_false_accept=bound, confidence=confidence).tau_infer
        exceeded += (1.0 - tau) > bound  # the true false-accept rate of a uniform |Q|
    assert exceeded / splits <= 1 - confidence + 3 * math.sqrt(0.2 * 0.8 / splits)


def test_thresholds_stay_above_the_floor():
    """Where every censored row has Q = 0 the floor is chosen, rounded to the dtype of |Q|."""
    q, flags = torch.tensor([0.0, 0.0, 0.5]), torch.tensor([False, False, True])
    chosen = calibrate(q, flags, split="val", max_false_accept=0.0, tau_min=1e-4)
    assert chosen.tau_infer == float(np.float32(1e-4))
    assert chosen.dtype == "float32"


def test_the_largest_number_of_a_dtype_cannot_be_rejected():
    """A censored row at the top of the range makes the bound infeasible, and the error says so."""
    q = torch.tensor([torch.finfo(torch.float32).max, 0.5])
    with pytest.raises(CalibrationError, match=r"no finite tau_infer .* best within reach is 1 at"):
        calibrate(q, torch.tensor([False, True]), split="val", max_false_accept=0.5, gauge="raw")


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"max_false_accept": None}, ValueError, "needs max_false_accept or max_false_reject, got neither"),
        ({"max_false_accept": 1.0}, ValueError, r"max_false_accept must be in \[0, 1\), got 1.0"),
        ({"max_false_accept": math.nan}, ValueError, r"max_false_accept must be in \[0, 1\)"),
        ({"max_false_reject": -0.1}, ValueError, r"max_false_reject must be in \[0, 1\)"),
        ({"confidence": 1.0}, ValueError, r"confidence must be in \(0, 1\)"),
        ({"tau_min": 0.0}, ValueError, "tau_min must be finite and > 0"),
        ({"tau_min": 1e-60}, ValueError, "must not round to 0 in torch.float32"),
        ({"gauge": "metric"}, ValueError, "gauge must be one of"),
        ({"split": ""}, ValueError, "split must be a string that is not empty"),
    ],
)
def test_calibration_refuses_bad_arguments(changes, error, message):
    """Each refusal names the rule and the value."""
    with pytest.raises(error, match=message):
        record(**changes)


def test_calibration_needs_rows_of_the_kind_it_bounds():
    """A rate over no rows is not met but refused."""
    q = torch.tensor([0.1, 0.2])
    with pytest.raises(CalibrationError, match="needs censored rows"):
        calibrate(q, torch.tensor([True, True]), split="val", max_false_accept=0.1)
    with pytest.raises(CalibrationError, match="needs in-range rows"):
        calibrate(q, torch.tensor([False, False]), split="val", max_false_reject=0.1)


def test_denominators_above_one_are_not_of_the_unit_gauge():
    """|Q| = 2 cannot come from a unit tuple; it is taken in the raw gauge."""
    q, flags = torch.tensor([0.1, 2.0]), torch.tensor([False, True])
    with pytest.raises(GaugeMismatchError, match=r"got 2\.0"):
        calibrate(q, flags, split="val", max_false_accept=0.0)
    assert calibrate(q, flags, split="val", max_false_accept=0.0, gauge="raw").gauge == "raw"


# --- the record -----------------------------------------------------------------------------------


@given(ROWS, BOUNDS, DTYPES)
def test_records_survive_json_pickle_and_copy(rows, bound, dtype):
    """What is read back is equal in every field, and the text is strict JSON."""
    chosen = calibrate(*split_of(rows, dtype), split="val", max_false_accept=bound)
    text = chosen.to_json()
    json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    for again in (
        CalibrationRecord.from_json(text),
        pickle.loads(pickle.dumps(chosen)),
        copy.deepcopy(chosen),
    ):
        assert again == chosen
        assert hash(again) == hash(chosen)
        assert again.digest == chosen.digest


def test_records_are_read_only_and_hash_by_what_they_say():
    """Counts, bound and curve cannot be written to; equal records hash alike and others do not."""
    one, same, other = record(), record(), record(split="test")
    for held in (one.counts, one.bound, one.curve):
        with pytest.raises(TypeError):
            held["total"] = 1
    assert hash(one) == hash(same) != hash(other)
    assert len({one, same, other}) == 2


def test_a_record_without_a_digest_is_refused():
    """As one with another digest is."""
    payload = json.loads(record().to_json())
    del payload["digest"]
    with pytest.raises(CalibrationError, match="it says digest None"):
        CalibrationRecord.from_json(json.dumps(payload))


def test_the_bounds_that_were_asked_for_are_in_the_record():
    """By name, None where nothing was asked."""
    assert dict(record(max_false_reject=0.75, confidence=0.5, max_false_accept=0.75, tau_min=1e-3).bound) == {
        "max_false_accept": 0.75,
        "max_false_reject": 0.75,
        "confidence": 0.5,
        "tau_min": 1e-3,
    }
    assert dict(record().bound) == {
        "max_false_accept": 0.0,
        "max_false_reject": None,
        "confidence": None,
        "tau_min": 1e-12,
    }


def test_a_record_is_one_canonical_line():
    """Sorted keys, no spaces, no literal that JSON does not have: the digest depends on nothing else."""
    text = record().to_json()
    assert text == json.dumps(json.loads(text), sort_keys=True, separators=(",", ":"), allow_nan=False)


def test_records_say_who_made_them_and_cannot_be_changed():
    """The version is recorded, and neither fields nor counts can be assigned."""
    chosen = record()
    assert chosen.created_by == f"scm-harness {scm.__version__}"
    assert chosen.schema_version == SCHEMA_VERSION
    with pytest.raises(AttributeError):
        chosen.tau_infer = 0.5
    with pytest.raises(TypeError):
        chosen.counts["total"] = 0


@pytest.mark.parametrize(
    "field, value",
    [
        ("tau_infer", 0.25),
        ("split", "test"),
        ("gauge", "raw"),
        ("data_hash", "0" * 64),
        ("created_by", "someone else"),
        ("counts", {**record().counts, "false_accepts": 1}),
        ("bound", {**record().bound, "max_false_accept": 0.5}),
        ("digest", "0" * 64),
    ],
)
def test_altered_records_are_refused(field, value):
    """Every field is covered by the digest."""
    payload = json.loads(record().to_json())
    payload[field] = value
    with pytest.raises(CalibrationError, match="was altered"):
        CalibrationRecord.from_json(json.dumps(payload))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda p: p.pop("gauge"), r"missing \['gauge'\]"),
        (lambda p: p.update(colour="red"), r"unknown \['colour'\]"),
        (lambda p: p.update(schema_version=99), "schema_version must be 1, got 99"),
        (lambda p: p.pop("schema_name"), "schema 'scm_harness.calibration'"),
        (lambda p: p.update(tau_infer=-1.0), "tau_infer must be a finite float > 0"),
        (lambda p: p.update(tau_infer=True), "tau_infer must be a finite float > 0"),
        (lambda p: p.update(tau_infer=0.1), "tau_infer must be representable in float32"),
        (lambda p: p.update(dtype="int64"), "dtype must name a floating-point dtype"),
        (lambda p: p.update(gauge="metric"), "gauge must be one of"),
        (lambda p: p["counts"].update(total=-1), "counts must be ints >= 0, got total=-1"),
        (lambda p: p["counts"].pop("total"), "counts must have exactly the entries"),
        (lambda p: p.update(curve=[]), "curve must have exactly the entries"),
    ],
)
def test_records_that_are_not_whole_are_refused(change, message):
    """Each refusal names the field."""
    payload = json.loads(record().to_json())
    change(payload)
    with pytest.raises(CalibrationError, match=message):
        CalibrationRecord.from_json(json.dumps(payload))


@pytest.mark.parametrize(
    "text, message",
    [("{", "must be JSON"), ("[1]", "must be an object"), ('{"tau_infer": NaN}', "got the literal NaN")],
)
def test_text_that_is_no_record_is_refused(text, message):
    """Broken JSON, other JSON and Python's extension of JSON are errors."""
    with pytest.raises(CalibrationError, match=message):
        CalibrationRecord.from_json(text)


def test_reports_on_the_calibration_split_are_refused():
    """By name, and by content where another name is given to the same rows."""
    chosen = record(data_hash="abc")
    chosen.check_not_reported_on("test")
    chosen.check_not_reported_on("test", data_hash="def")
    with pytest.raises(CalibrationError, match="chosen on split 'val'"):
        chosen.check_not_reported_on("val")
    with pytest.raises(CalibrationError, match="holds the very rows of 'val'"):
        chosen.check_not_reported_on("test", data_hash="abc")


def test_the_data_hash_tells_other_rows_apart():
    """Without a given digest, values and labels are hashed; a tensor is hashed by its content."""
    q, flags = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([False, True, True])
    hashes = {
        calibrate(a, b, split="val", max_false_accept=0.0).data_hash
        for a, b in ((q, flags), (q + 0.1, flags), (q, flags.flip(0)))
    }
    assert len(hashes) == 3
    inputs = torch.arange(6.0).reshape(2, 3)
    assert record(data_hash=inputs) == record(data_hash=inputs.clone())
    assert record(data_hash=inputs).data_hash != record(data_hash=inputs.T).data_hash


# --- decoding through a record --------------------------------------------------------------------


def test_decoding_uses_the_recorded_threshold():
    """Rows at the threshold are accepted, one ulp below it they are not."""
    chosen = record(gauge="raw")
    edge = torch.tensor(chosen.tau_infer)
    Q = torch.stack([edge, torch.nextafter(edge, torch.tensor(0.0))])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = calibrated_decode(torch.ones(2), Q, chosen, gauge="raw", tau_train=0.5)
    assert result.bottom_mask.tolist() == [False, True]
    assert result.gap_mask.tolist() == [True, False]


def test_decoding_without_a_record_says_so():
    """An uncalibrated decoding works with the default or a given threshold, and warns."""
    P, Q = unit_tuples(torch.tensor([0.5, 1e-3]))
    with pytest.warns(UncalibratedWarning, match="tau_infer=1e-06, which was not chosen"):
        assert not calibrated_decode(P, Q, None, gauge="unit").bottom_mask.any()
    with pytest.warns(UncalibratedWarning, match=r"tau_infer=0\.01"):
        result = calibrated_decode(P, Q, None, gauge="unit", tau_infer=0.01)
    assert result.bottom_mask.tolist() == [False, True]


@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_tuples_of_another_gauge_are_refused(kind):
    """By what the caller says, and by the norms where the caller says unit; bottoms of any gauge pass."""
    P, Q = unit_tuples(torch.tensor([0.5, 1.0], dtype=torch.float64))
    zero_and_faults = (torch.tensor([0.0, math.nan, 1.0]), torch.tensor([0.0, 1.0, math.inf]))
    if kind == "numpy":
        P, Q = P.numpy(), Q.numpy()
        zero_and_faults = tuple(part.numpy() for part in zero_and_faults)
    chosen = record()
    with pytest.raises(
        GaugeMismatchError, match="chosen for tuples of gauge 'unit', got tuples of gauge 'raw'"
    ):
        calibrated_decode(P, Q, chosen, gauge="raw")
    with pytest.raises(GaugeMismatchError, match=r"2 of 2 that do not, the first with norm 3"):
        calibrated_decode(3 * P, 3 * Q, chosen, gauge="unit")
    assert calibrated_decode(*zero_and_faults, chosen, gauge="unit").bottom_mask.all()


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: calibrated_decode(torch.ones(1), torch.ones(1), None, gauge="x"), "gauge must be one of"),
        (
            lambda: calibrated_decode(torch.ones(1), torch.zeros(1), record(), gauge="unit", tau_infer=0.1),
            "the record decides tau_infer",
        ),
        (
            lambda: calibrated_decode(torch.ones(2, 2), torch.zeros(2), record(), gauge="unit"),
            "must have P and Q of one shape",
        ),
        (lambda: CalibratedHead(nn.Identity(), record(), gauge="raw"), "got a model of gauge 'raw'"),
        (lambda: CalibratedHead(nn.Identity(), None, gauge="x"), "gauge must be one of"),
    ],
)
def test_decoding_refuses_bad_arguments(call, message):
    """Each refusal names the rule."""
    with pytest.raises(ValueError, match=message):
        call()


def test_a_calibrated_head_is_its_model_and_its_record():
    """The head answers decoded values, and warns where nobody chose its threshold."""

    class Circle(nn.Module):
        def forward(self, angles):
            return unit_tuples(angles)

    angles = torch.tensor([0.5, 1e-3])
    head = CalibratedHead(Circle(), record(), gauge="unit")
    assert head(angles).bottom_mask.tolist() == [False, True]
    with pytest.warns(UncalibratedWarning):
        CalibratedHead(Circle(), None, gauge="unit")(angles)


@pytest.mark.parametrize("recorded", [True, False])
def test_the_gap_to_the_training_threshold_is_flagged(recorded):
    """With a record and without one; accepted tuples below tau_train are in it."""
    P, Q = unit_tuples(torch.tensor([0.3, 0.1]).double())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UncalibratedWarning)
        chosen = record() if recorded else None
        own = {} if recorded else {"tau_infer": 0.01}
        found = calibrated_decode(P, Q, chosen, gauge="unit", tau_train=0.2, **own)
        usual = calibrated_decode(P, Q, None, gauge="unit", tau_train=0.2)
    for result in (found, usual):
        assert result.bottom_mask.tolist() == [False, False]
        assert result.gap_mask.tolist() == [False, True]


def test_a_calibrated_head_hands_its_arguments_on():
    """By position and by name."""

    class Scaled(nn.Module):
        def forward(self, angles, factor, *, shift=0.0):
            return unit_tuples(angles * factor + shift)

    head = CalibratedHead(Scaled(), record(), gauge="unit")
    result = head(torch.tensor([0.1]), 2.0, shift=0.5)
    assert result.decoded.item() == pytest.approx(1 / math.tan(0.7))


def test_a_largest_threshold_holds_for_either_bound() -> None:
    """Below it as without it; where the bound asks for more, it is cut or, for false accepts, refused."""
    q_abs = torch.linspace(0.01, 1.0, 100)
    in_range = q_abs > 0.5
    free = calibrate(q_abs, in_range, split="cal", max_false_reject=0.1)
    assert "tau_max" not in free.bound
    assert (
        calibrate(q_abs, in_range, split="cal", max_false_reject=0.1, tau_max=0.9).tau_infer == free.tau_infer
    )
    held = calibrate(q_abs, in_range, split="cal", max_false_reject=0.1, tau_max=0.1)
    assert held.tau_infer <= 0.1
    assert held.tau_infer == pytest.approx(0.1)
    assert held.counts["false_rejects"] == 0
    assert held.bound["tau_max"] == 0.1
    assert CalibrationRecord.from_json(held.to_json()) == held
    with pytest.raises(CalibrationError, match="no tau_infer <= 0.2 has a false-accept rate"):
        calibrate(q_abs, in_range, split="cal", max_false_accept=0.1, tau_max=0.2)
    with pytest.raises(ValueError, match="tau_max must be finite and >= tau_min"):
        calibrate(q_abs, in_range, split="cal", max_false_reject=0.1, tau_max=1e-13)
