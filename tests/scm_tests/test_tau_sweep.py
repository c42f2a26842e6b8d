"""Threshold sweeps: rates, laws and files."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scm.inference import InferenceConfig, strict_inference
from scm.metrics import tau_infer_sweep_from_q_abs, tau_infer_sweep_report, write_tau_infer_sweep

ROWS = st.lists(
    st.tuples(
        st.one_of(st.floats(0, 1), st.sampled_from([0.0, 5e-324, 0.1, math.nan, math.inf])), st.booleans()
    ),
    max_size=20,
)
TAUS = st.lists(st.floats(1e-9, 1.5), min_size=1, max_size=8)


def sweep(rows, taus, dtype=torch.float64):
    q = torch.tensor([q for q, _ in rows], dtype=dtype)
    flags = torch.tensor([flag for _, flag in rows], dtype=torch.bool)
    return tau_infer_sweep_from_q_abs(q, is_in_range=flags, taus=taus)


def test_sweep_gives_the_recorded_rates(vector_group, decode_numbers):
    """Rates are those recorded, but for |Q| that is not finite and thresholds that are none."""
    cases = decode_numbers(vector_group("tau_infer_sweep"))
    compared = 0
    for case in cases:
        if case["id"] in {"nonfinite_q", "bad_taus"}:
            continue
        curves = tau_infer_sweep_from_q_abs(
            torch.tensor(case["q_abs"], dtype=torch.float64),
            is_in_range=torch.tensor(case["is_in_range"]),
            taus=case["taus"],
        )
        for name, expected in case["expected"].items():
            np.testing.assert_allclose(curves[name], expected, rtol=1e-15, atol=0, err_msg=case["id"])
        compared += 1
    assert compared == len(cases) - 2


def test_non_finite_denominators_are_bottoms(vector_group, decode_numbers):
    """Where the recorded sweep accepts NaN and infinite |Q|, this one rejects them as decoding does."""
    (case,) = [c for c in decode_numbers(vector_group("tau_infer_sweep")) if c["id"] == "nonfinite_q"]
    q, flags = torch.tensor(case["q_abs"], dtype=torch.float64), torch.tensor(case["is_in_range"])
    curves = tau_infer_sweep_from_q_abs(q, flags, case["taus"])
    assert case["expected"]["bottom_rate"] == [0.25, 0.25]
    assert curves["bottom_rate"] == [0.75, 0.75]
    assert curves["fp_cens"] == [0.0, 0.0]
    assert curves["fn_in"] == [0.5, 0.5]


def test_thresholds_that_are_none_are_refused(vector_group, decode_numbers):
    """NaN, negative and infinite thresholds, which the recorded sweep takes, are errors."""
    (case,) = [c for c in decode_numbers(vector_group("tau_infer_sweep")) if c["id"] == "bad_taus"]
    for tau in case["taus"]:
        with pytest.raises(ValueError, match="taus must be finite and >= 0"):
            tau_infer_sweep_from_q_abs(torch.ones(1), torch.ones(1, dtype=torch.bool), [tau])


@given(ROWS, TAUS, st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
def test_rates_are_those_of_strict_decoding(rows, taus, dtype):
    """At each threshold the rates are what decoding would give, in every dtype."""
    curves = sweep(rows, taus, dtype)
    q = torch.tensor([q for q, _ in rows], dtype=dtype)
    flags = np.array([flag for _, flag in rows], dtype=bool)
    for k, tau in enumerate(taus):
        bottom = strict_inference(torch.zeros_like(q), q, InferenceConfig(tau_infer=tau)).bottom_mask.numpy()
        for name, group, accepted in (("fn_in", flags, False), ("fp_cens", ~flags, True)):
            hits = bottom[group] != accepted
            expected = hits.mean() if group.any() else math.nan
            assert curves[name][k] == pytest.approx(expected, rel=1e-12, nan_ok=True)
        assert curves["bottom_rate"][k] == pytest.approx(
            bottom.mean() if len(rows) else math.nan, rel=1e-12, nan_ok=True
        )


@given(ROWS.filter(lambda rows: len({flag for _, flag in rows}) == 2), TAUS)
def test_rates_are_monotone_in_the_threshold(rows, taus):
    """A larger threshold rejects at least as much, in range and out of it."""
    curves = sweep(rows, sorted(taus))
    assert curves["fn_in"] == sorted(curves["fn_in"])
    assert curves["bottom_rate"] == sorted(curves["bottom_rate"])
    assert curves["fp_cens"] == sorted(curves["fp_cens"], reverse=True)


@given(ROWS, TAUS, st.randoms(use_true_random=False))
def test_the_order_of_rows_does_not_matter(rows, taus, random):
    """Rates of shuffled rows are the same numbers."""
    shuffled = list(rows)
    random.shuffle(shuffled)
    assert repr(sweep(rows, taus)) == repr(sweep(shuffled, taus))


def test_sweep_takes_tensors_of_any_shape():
    """Rows may be laid out in more dimensions."""
    q, flags = torch.rand(4, 3), torch.rand(4, 3) > 0.5
    flat = tau_infer_sweep_from_q_abs(q.reshape(-1), flags.reshape(-1), [0.5])
    assert tau_infer_sweep_from_q_abs(q, flags, [0.5]) == flat


@pytest.mark.parametrize(
    "q, flags, error, message",
    [
        (torch.ones(2), torch.ones(3, dtype=torch.bool), ValueError, "must have one shape"),
        (torch.tensor([-0.5]), torch.ones(1, dtype=torch.bool), ValueError, "q_abs must be >= 0, got -0.5"),
        (torch.ones(2), torch.ones(2), TypeError, "is_in_range must be boolean"),
        (torch.ones(2, dtype=torch.int64), torch.ones(2, dtype=torch.bool), TypeError, "q_abs must be real"),
    ],
)
def test_sweep_refuses_rows_that_cannot_be(q, flags, error, message):
    """Each refusal names the argument."""
    with pytest.raises(error, match=message):
        tau_infer_sweep_from_q_abs(q, flags, [0.1])


def test_files_hold_the_curves_and_their_provenance(tmp_path):
    """The JSON is strict, a rate over no rows is null, and the page has a line per threshold."""
    curves = tau_infer_sweep_from_q_abs(torch.tensor([0.1, 0.2]), torch.tensor([True, True]), [0.15, 0.3])
    payload = write_tau_infer_sweep(tmp_path / "deep", curves, provenance={"split": "val"})
    text = (tmp_path / "deep" / "tau_infer_sweep.json").read_text(encoding="utf-8")
    assert "NaN" not in text
    assert json.loads(text) == payload
    assert payload["curves"]["fp_cens"] == [None, None]
    assert payload["provenance"] == {"split": "val"}
    page = (tmp_path / "deep" / "tau_infer_sweep.md").read_text(encoding="utf-8")
    assert "| 1.500e-01 | 0.500000 | n/a | 0.500000 |" in page
    assert tau_infer_sweep_report(curves, title="Here").startswith("# Here\n")


@pytest.mark.parametrize(
    "curves, message",
    [
        ({"taus": [0.1]}, "missing: fn_in, fp_cens, bottom_rate"),
        ({"taus": [0.1], "fn_in": [], "fp_cens": [0.0], "bottom_rate": [0.0]}, "curves must have one length"),
    ],
)
def test_reports_refuse_curves_that_are_not_whole(curves, message):
    """A missing or short curve is an error and not a short table."""
    with pytest.raises(ValueError, match=message):
        tau_infer_sweep_report(curves)
