"""Strict decoding: what has a value, what is bottom and why; the wrapper and the censored pattern."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import nn
from torch.func import grad, vmap

from scm.inference import (
    InferenceConfig,
    SCMInferenceWrapper,
    decode_strict_censored_3way,
    strict_inference,
    strict_inference_numpy,
    threshold_in,
)

F64 = torch.float64
NAN, INF = math.nan, math.inf
SPECIAL = st.sampled_from([0.0, -0.0, NAN, INF, -INF, 1e-6, -1e-6, 5e-324, 1.7e308, 1e-300])
NUMBERS = st.one_of(st.floats(), st.floats(-1e-5, 1e-5), SPECIAL)
PAIRS = st.integers(1, 8).flatmap(
    lambda n: st.tuples(*(hnp.arrays(np.float64, n, elements=NUMBERS) for _ in range(2)))
)
TAUS = st.floats(1e-9, 1e3)


def tensor(values):
    return torch.tensor(values, dtype=F64)


# --- recorded cases -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_decoding_gives_the_recorded_values_and_masks(vector_group, decode_numbers, kind):
    """Every mask, code and value is the recorded one for tensors and for arrays."""
    cases = decode_numbers(vector_group("strict_inference"))
    assert cases
    make = tensor if kind == "torch" else np.array
    for case in cases:
        expected = case["expected"]
        if "raises" in expected:
            with pytest.raises(ValueError):
                InferenceConfig(tau_infer=case["tau_infer"], tau_train=case["tau_train"])
            continue
        config = InferenceConfig(tau_infer=case["tau_infer"], tau_train=case["tau_train"])
        result = strict_inference(make(case["P"]), make(case["Q"]), config)
        decoded, bottom, gap = result
        assert list(decoded.shape) == expected["shape"]
        assert bottom.tolist() == expected["bottom_mask"]
        assert gap.tolist() == expected["gap_mask"]
        assert result.fault_mask.tolist() == expected["fault_mask"]
        assert result.semantic_mask.tolist() == expected["semantic_bottom_mask"]
        assert result.bottom_provenance.tolist() == expected["bottom_provenance"]
        for got, want in zip(decoded.reshape(-1).tolist(), expected["decoded_flat"], strict=True):
            assert math.isnan(got) if want == "bottom" else got == pytest.approx(want, rel=1e-15)


def test_censored_decoding_gives_the_recorded_classes(vector_group, decode_numbers):
    """Classes and values are those recorded, but a quotient that overflows is a bottom and not infinity."""
    (case,) = decode_numbers(vector_group("decode_strict_censored_3way"))
    assert "quirk" in case
    result = decode_strict_censored_3way(tensor(case["P"]), tensor(case["Q"]), tau_infer=case["tau_infer"])
    expected = case["expected"]
    assert result.class_id.tolist() == expected["class_id"]
    assert result.bottom_mask.tolist() == [*expected["bottom_mask"][:-1], True]
    for got, want in zip(result.decoded.tolist(), [*expected["decoded"][:-1], "bottom"], strict=True):
        assert math.isnan(got) if want == "bottom" else got == pytest.approx(want, rel=1e-15)


# --- laws -----------------------------------------------------------------------------------------


@given(PAIRS, TAUS, st.floats(1, 100))
def test_bottom_exactly_where_the_rule_says(pair, tau, factor):
    """Bottom iff |Q| < tau or P, Q or P/Q is not finite; else the value is the IEEE quotient."""
    P, Q = pair
    config = InferenceConfig(tau_infer=tau, tau_train=tau * factor)
    result = strict_inference(torch.from_numpy(P), torch.from_numpy(Q), config)
    with np.errstate(all="ignore"):
        quotient = P / Q
        semantic = np.abs(Q) < tau
        fault = ~np.isfinite(P) | ~np.isfinite(Q) | (~semantic & ~np.isfinite(quotient))
        bottom = semantic | fault
        gap = ~bottom & (np.abs(Q) < tau * factor)
    np.testing.assert_array_equal(result.bottom_mask, bottom)
    np.testing.assert_array_equal(result.semantic_bottom_mask, semantic)
    np.testing.assert_array_equal(result.fault_mask, fault)
    np.testing.assert_array_equal(result.gap_mask, gap)
    np.testing.assert_array_equal(result.bottom_provenance, fault + 2 * semantic)
    np.testing.assert_array_equal(result.decoded, np.where(bottom, np.nan, quotient))


@given(PAIRS, TAUS, st.randoms(use_true_random=False))
def test_decoding_commutes_with_permutations(pair, tau, random):
    """Each row is decided alone."""
    P, Q = (torch.from_numpy(part) for part in pair)
    order = list(range(len(P)))
    random.shuffle(order)
    config = InferenceConfig(tau_infer=tau, tau_train=2 * tau)
    plain = strict_inference(P, Q, config).fields()
    permuted = strict_inference(P[order], Q[order], config).fields()
    for a, b in zip(plain, permuted, strict=True):
        assert torch.equal(
            torch.nan_to_num(a[order].double(), nan=-7.0), torch.nan_to_num(b.double(), nan=-7.0)
        )


@given(PAIRS, TAUS, TAUS)
def test_a_larger_threshold_never_accepts_more(pair, one, other):
    """Accepted at the larger threshold implies accepted at the smaller, with the same value."""
    P, Q = (torch.from_numpy(part) for part in pair)
    low, high = sorted((one, other))
    loose, tight = (strict_inference(P, Q, InferenceConfig(tau_infer=tau)) for tau in (low, high))
    assert not (loose.bottom_mask & ~tight.bottom_mask).any()
    accepted = ~tight.bottom_mask
    assert torch.equal(loose.decoded[accepted], tight.decoded[accepted])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("tau", [1e-3, 2.5e-2, 1e-6, 1.0])
def test_the_threshold_itself_is_accepted_and_one_ulp_below_is_not(dtype, tau):
    """In the dtype of Q, the number nearest to tau has a value and its lower neighbour has none."""
    edge = torch.tensor(tau, dtype=dtype)
    below = torch.nextafter(edge, torch.zeros_like(edge))
    Q = torch.stack([edge, -edge, below, -below])
    result = strict_inference(torch.zeros_like(Q), Q, InferenceConfig(tau_infer=tau))
    assert result.bottom_mask.tolist() == [False, False, True, True]
    assert threshold_in(tau, dtype) == edge.item()


@pytest.mark.parametrize(
    "dtype, tau, message",
    [
        (torch.float32, 1e-60, "must not round to 0 in torch.float32"),
        (torch.float16, 1e-9, "must not round to 0 in torch.float16"),
        (torch.float16, 1e6, "must not exceed"),
        (torch.complex64, 1e-60, "must not round to 0 in torch.float32"),
    ],
)
def test_a_threshold_that_the_dtype_cannot_hold_is_refused(dtype, tau, message):
    """A gate that could not tell the boundary from zero, or would never open, is an error."""
    with pytest.raises(ValueError, match=message):
        strict_inference(
            torch.ones(2, dtype=dtype), torch.ones(2, dtype=dtype), InferenceConfig(tau_infer=tau)
        )


# --- shapes, kinds, gradients ---------------------------------------------------------------------


def test_vector_numerators_share_the_fate_of_their_denominator():
    """One NaN among a row's numerators makes the whole row bottom; masks have Q's shape."""
    P = tensor([[1.0, 2.0], [NAN, 2.0], [3.0, 4.0]])
    result = strict_inference(P, tensor([2.0, 1.0, 0.0]))
    assert result.bottom_mask.tolist() == [False, True, True]
    assert result.decoded[0].tolist() == [0.5, 1.0]
    assert torch.isnan(result.decoded[1:]).all()
    assert strict_inference(torch.ones(3, 2), torch.ones(3, 1)).bottom_mask.shape == (3, 2)
    assert strict_inference(torch.ones(3), torch.tensor(0.0)).bottom_mask.shape == ()


def test_validity_factors_gate_like_denominators():
    """A further denominator below its threshold is a semantic bottom, a non-finite one a fault."""
    P = Q = torch.ones(4)
    V = torch.tensor([1.0, 1e-4, NAN, 1e-9])
    result = strict_inference(P, Q, validity_factors=(V, V.abs()), validity_taus=[1e-6, 1e-3])
    assert result.bottom_provenance.tolist() == [0, 2, 1, 2]
    assert strict_inference(P, Q, validity_factors=V).bottom_mask.tolist() == [False, False, True, True]
    assert strict_inference(P, Q, validity_factors=V.unsqueeze(1)).bottom_mask.sum() == 2
    arrays = strict_inference(P.numpy(), Q.numpy(), validity_factors=V.numpy())
    assert arrays.bottom_mask.tolist() == [False, False, True, True]


def test_a_validity_factor_at_its_threshold_is_accepted():
    """As a denominator is: the next number below is a semantic bottom, and so is an exact zero."""
    tau = 0.125
    V = tensor([tau, -tau, math.nextafter(tau, 0.0), 0.0])
    result = strict_inference(torch.ones(4), torch.ones(4), validity_factors=V, validity_taus=tau)
    assert result.bottom_mask.tolist() == [False, False, True, True]


def test_only_a_last_dimension_of_one_is_dropped_from_a_validity_factor():
    """One factor a row, as a column; any other further dimension is an error."""
    P = Q = torch.ones(2, 3)
    column = torch.tensor([[[1.0], [0.0], [1.0]], [[1.0], [1.0], [0.0]]])
    expected = [[False, True, False], [False, False, True]]
    assert strict_inference(P, Q, validity_factors=column).bottom_mask.tolist() == expected
    assert strict_inference(P, Q, validity_factors=column[..., 0]).bottom_mask.tolist() == expected
    assert strict_inference(P, Q, validity_factors=torch.ones(2, 1)).bottom_mask.sum() == 0
    with pytest.raises(ValueError, match="a validity factor must have the shape of Q"):
        strict_inference(P, Q, validity_factors=torch.ones(2, 3, 2))


def test_codes_and_thresholds_have_one_type():
    """Codes are int64 and thresholds floats, whatever they were computed or given as."""
    result = strict_inference(tensor([1.0, NAN]), tensor([0.0, 0.0]))
    assert result.bottom_provenance.dtype == torch.int64
    assert result.bottom_provenance.tolist() == [2, 3]
    config = InferenceConfig(tau_infer=1, tau_train=2, numerical_hazard_threshold=0)
    for name in ("tau_infer", "tau_train", "numerical_hazard_threshold", "provenance_fault_threshold"):
        assert type(getattr(config, name)) is float, name
    assert config.numerical_hazard_threshold == 0.0


@pytest.mark.parametrize("arrays", [False, True])
def test_arrays_gate_by_the_same_thresholds(arrays):
    """The defaults and the given thresholds of validity factors hold for arrays as for tensors."""
    P = Q = torch.ones(3)
    V = torch.tensor([1.0, 1e-3, 1e-7])
    if arrays:
        P, Q, V = P.numpy(), Q.numpy(), V.numpy()
    assert strict_inference(P, Q, validity_factors=V).bottom_mask.tolist() == [False, False, True]
    given = strict_inference(P, Q, validity_factors=V, validity_taus=1e-2)
    assert given.bottom_mask.tolist() == [False, True, True]
    if arrays:
        assert strict_inference_numpy(P, Q, validity_factors=V).bottom_mask.tolist() == [False, False, True]


def test_a_threshold_of_a_validity_factor_is_rounded_to_its_dtype():
    """The number that 0.1 is in the factor's dtype is accepted, whatever the dtype of Q is."""
    V = torch.tensor([0.1], dtype=torch.float32)
    result = strict_inference(tensor([1.0]), tensor([1.0]), validity_factors=V, validity_taus=0.1)
    assert not result.bottom_mask.any()


def test_the_gap_begins_below_tau_train_as_the_dtype_of_q_has_it():
    """|Q| that is the number nearest to tau_train is not in the gap, in any dtype."""
    for dtype in (torch.float32, torch.float64):
        Q = torch.tensor([0.1, 0.09], dtype=dtype)
        result = strict_inference(torch.ones_like(Q), Q, InferenceConfig(tau_train=0.1))
        assert result.gap_mask.tolist() == [False, True]


def test_the_provenance_fields_take_the_words_of_older_callers():
    """Each of the four words is accepted, and none changes a result."""
    P, Q = tensor([1.0, NAN]), tensor([0.0, 1.0])
    for provenance in ("off", "experimental"):
        for representation in ("split_masks", "bottom_provenance"):
            config = InferenceConfig(provenance=provenance, provenance_representation=representation)
            assert strict_inference(P, Q, config).bottom_provenance.tolist() == [2, 1]


def test_both_names_of_the_hazard_threshold_say_the_same():
    """Whichever of the two was given."""
    for name in ("numerical_hazard_threshold", "provenance_fault_threshold"):
        config = InferenceConfig(**{name: 0.25})
        assert config.numerical_hazard_threshold == config.provenance_fault_threshold == 0.25


def test_numpy_arrays_of_any_layout_are_decoded():
    """Read-only, reversed, foreign-endian and integer arrays give arrays."""
    P = np.arange(4.0)[::-1]
    P.flags.writeable = False
    result = strict_inference_numpy(P, np.array([1, 2, 4, 0], dtype=">i4"))
    assert isinstance(result.decoded, np.ndarray)
    assert result.decoded[:3].tolist() == [3.0, 1.0, 0.25]
    assert result.bottom_mask.tolist() == [False, False, False, True]


def test_mixed_dtypes_gate_in_the_dtype_of_q():
    """A float32 numerator over a float64 denominator decodes in float64."""
    result = strict_inference(torch.ones(1), tensor([3.0]))
    assert result.decoded.dtype == F64
    assert result.decoded.item() == pytest.approx(1 / 3, rel=1e-15)


def test_gradients_at_bottoms_are_zero_and_not_nan():
    """Accepted rows have the derivative of the quotient; bottoms have 0, whatever made them bottom."""
    P = tensor([1.0, 2.0, NAN, 1e308, 3.0]).requires_grad_()
    Q = tensor([2.0, 0.0, 1.0, 1e-3, INF]).requires_grad_()
    result = strict_inference(P, Q)
    torch.where(result.bottom_mask, 0.0, result.decoded).sum().backward()
    assert P.grad.tolist() == [0.5, 0.0, 0.0, 0.0, 0.0]
    assert Q.grad[[0, 1, 2, 4]].tolist() == [-0.25, 0.0, 0.0, 0.0]


def test_decoding_vectorises():
    """Under vmap and grad each member is decoded as it is alone."""
    P = torch.randn(3, 5, dtype=F64, generator=torch.Generator().manual_seed(0))
    Q = P.roll(1) * 1e-6

    def loss(p, q):
        result = strict_inference(p, q)
        return torch.nan_to_num(result.decoded).sum()

    together = vmap(grad(loss))(P, Q)
    for k in range(3):
        assert torch.equal(together[k], grad(loss)(P[k], Q[k]))
    bottoms = vmap(lambda p, q: strict_inference(p, q).bottom_mask)(P, Q)
    assert torch.equal(bottoms, strict_inference(P, Q).bottom_mask)


def test_results_travel_between_processes():
    """A pickled result has all its parts."""
    result = strict_inference(tensor([1.0, 2.0]), tensor([1.0, 0.0]))
    again = pickle.loads(pickle.dumps(result))
    assert len(again) == 3
    assert again.bottom_provenance.tolist() == result.bottom_provenance.tolist()
    assert again.hazard_mask.tolist() == [False, False]
    assert "bottom_provenance" in repr(again)


def test_hazard_threshold_flags_accepted_rows_near_the_singular_set():
    """Both names of the threshold set one flag; bottoms are never flagged."""
    Q = torch.tensor([1.0, 1e-3, 0.0])
    for name in ("numerical_hazard_threshold", "provenance_fault_threshold"):
        result = strict_inference(torch.ones(3), Q, InferenceConfig(**{name: 1e-2}))
        assert result.hazard_mask.tolist() == [False, True, False]


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: InferenceConfig(tau_infer=True), TypeError, "tau_infer must be a number"),
        (lambda: InferenceConfig(tau_train=INF), ValueError, "tau_train must be finite"),
        (lambda: InferenceConfig(provenance="on"), ValueError, "provenance must be one of"),
        (
            lambda: InferenceConfig(provenance_representation="x"),
            ValueError,
            "provenance_representation must",
        ),
        (
            lambda: InferenceConfig(numerical_hazard_threshold=-1.0),
            ValueError,
            "numerical_hazard_threshold must",
        ),
        (
            lambda: InferenceConfig(numerical_hazard_threshold=0.1, provenance_fault_threshold=0.2),
            ValueError,
            "must agree, got 0.1 and 0.2",
        ),
        (lambda: strict_inference([1.0], [1.0]), TypeError, "got list, list"),
        (lambda: strict_inference(torch.ones(1), np.ones(1)), TypeError, "got Tensor, ndarray"),
        (lambda: strict_inference(torch.ones(3), torch.ones(3, 2)), ValueError, r"got \(3,\) and \(3, 2\)"),
        (lambda: strict_inference(torch.ones(3, 2), torch.ones(2)), ValueError, r"got \(3, 2\) and \(2,\)"),
        (
            lambda: strict_inference(torch.ones(3), torch.ones(3), validity_factors=torch.ones(2)),
            ValueError,
            "validity factor must have the shape of Q",
        ),
        (
            lambda: strict_inference(torch.ones(3), torch.ones(3), validity_factors=torch.ones(3, 3)),
            ValueError,
            "validity factor must have the shape of Q",
        ),
        (
            lambda: strict_inference(
                torch.ones(1), torch.ones(1), validity_factors=torch.ones(1), validity_taus=[1e-6, 1e-6]
            ),
            ValueError,
            "validity_taus must be one number or one per",
        ),
        (
            lambda: strict_inference(
                torch.ones(1), torch.ones(1), validity_factors=torch.ones(1), validity_taus=0.0
            ),
            ValueError,
            "must be finite and > 0",
        ),
    ],
)
def test_decoding_refuses_bad_arguments(call, error, message):
    """Each refusal names the rule and what was given."""
    with pytest.raises(error, match=message):
        call()


# --- the wrapper ----------------------------------------------------------------------------------


class Returning(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


def test_wrapper_trains_on_the_tuple_and_answers_decoded():
    """Train mode gives the model's own output; eval mode the decoded one, extra outputs left out."""
    model = Returning(lambda x: (x[:, 0], x[:, 1], x[:, :1]))
    wrapper = SCMInferenceWrapper(model, config=InferenceConfig(tau_infer=0.5))
    x = torch.tensor([[1.0, 2.0], [1.0, 0.4]])
    assert len(wrapper(x)) == 3
    result = wrapper.eval()(x)
    assert result.bottom_mask.tolist() == [False, True]
    assert result.decoded[0] == 0.5


@pytest.mark.parametrize("training", [True, False])
def test_wrapper_hands_its_arguments_on(training):
    """By position and by name, in both modes; without a config it decodes with the default one."""

    class Scaled(nn.Module):
        def forward(self, x, factor, *, shift=0.0):
            return x * factor + shift, torch.ones_like(x)

    wrapper = SCMInferenceWrapper(Scaled()).train(training)
    outputs = wrapper(tensor([1.0, 2.0]), 3.0, shift=0.5)
    assert outputs[0].tolist() == [3.5, 6.5]
    assert wrapper.config == InferenceConfig()
    assert SCMInferenceWrapper(Scaled(), InferenceConfig(tau_infer=0.5)).config.tau_infer == 0.5


def test_wrapper_takes_a_second_denominator_and_further_arguments():
    """(x, Q_valid) gates by both denominators; in train mode the model sees x alone."""
    wrapper = SCMInferenceWrapper(
        Returning(lambda x, *rest: (x[:, 0], x[:, 1])), InferenceConfig(tau_infer=0.1)
    )
    x, valid = torch.ones(3, 2), torch.tensor([1.0, 0.05, NAN])
    assert len(wrapper((x, valid))) == 2
    assert wrapper.eval()((x, valid)).bottom_provenance.tolist() == [0, 2, 1]
    assert not wrapper(x, "more").bottom_mask.any()


@pytest.mark.parametrize(
    "output", [{"P": 1}, (torch.ones(1),), (torch.ones(1), 2.0)], ids=["dict", "one", "float"]
)
def test_wrapper_refuses_a_model_without_a_tuple(output):
    """A model that does not return (P, Q) is named as such when it is decoded."""
    with pytest.raises(TypeError, match="the model must return"):
        SCMInferenceWrapper(Returning(lambda x: output)).eval()(torch.ones(1))


# --- the censored pattern -------------------------------------------------------------------------


def three_way(P, Q, **kwargs):
    return decode_strict_censored_3way(tensor(P), tensor(Q), tau_infer=1e-6, **kwargs)


def test_semantic_bottoms_point_where_their_numerator_points():
    """The sign of P decides, zero counts as above, and the sign of a tiny Q has no say."""
    result = three_way([1.0, -1.0, 0.0, -1.0], [0.0, 1e-9, 0.0, -1e-9])
    assert result.class_id.tolist() == [2, 0, 2, 0]
    assert result.bottom_mask.all()


def test_orientation_signals_replace_the_sign_and_reach_faults():
    """Below, in range and above are signal < 0, = 0 and > 0; accepted rows stay in range."""
    signal = tensor([-1.0, 0.0, 2.0, 5.0, -3.0])
    result = three_way([1.0, 1.0, NAN, 1.0, INF], [0.0, 0.0, 1.0, 1.0, 0.0], orientation_signal=signal)
    assert result.class_id.tolist() == [0, 1, 2, 1, 0]


def test_direction_logits_decide_at_semantic_bottoms_only():
    """The larger logit wins over sign and signal; at a pure fault and where accepted it has no say."""
    logits = tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    result = three_way([-1.0, 1.0, NAN, 1.0], [0.0, 0.0, 1.0, 1.0], direction_logits=logits)
    assert result.class_id.tolist() == [2, 0, 1, 1]


@pytest.mark.parametrize("tau", [1e-3, 0.5])
def test_the_pattern_decodes_with_the_threshold_it_is_given(tau):
    """|Q| at it is in range, the next number below it is not; classes are int64 however they were found."""
    P, Q = tensor([1.0, 1.0, -1.0]), tensor([tau, math.nextafter(tau, 0.0), math.nextafter(tau, 0.0)])
    signal = torch.tensor([0.0, 1.0, -1.0], dtype=torch.float32)
    logits = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    for told in ({}, {"orientation_signal": signal}, {"direction_logits": logits}):
        result = decode_strict_censored_3way(P, Q, tau, **told)
        assert result.bottom_mask.tolist() == [False, True, True]
        assert result.class_id.tolist() == [1, 2, 0]
        assert result.class_id.dtype == torch.int64


def test_direction_logits_are_of_every_answer():
    """Their last dimension is the direction, however many the others are."""
    logits = torch.tensor([[[0.0, 1.0], [1.0, 0.0], [1.0, 0.0]], [[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]])
    result = decode_strict_censored_3way(torch.ones(2, 3), torch.zeros(2, 3), 1e-6, direction_logits=logits)
    assert result.class_id.tolist() == [[2, 0, 0], [0, 2, 2]]


def test_masks_of_an_earlier_decoding_reach_every_part_of_the_result():
    """Rows that validity factors rejected are bottoms here too, with NaN and without a value."""
    P, Q = [1.0, 1.0, -1.0, 1.0], [1.0, 0.0, 1.0, 1.0]
    earlier = torch.tensor([False, False, True, False])
    fault = torch.tensor([True, True, False, False])
    by_masks = three_way(P, Q, semantic_bottom_mask=earlier, fault_mask=fault)
    by_codes = three_way(P, Q, bottom_provenance=torch.tensor([1, 3, 2, 0]))
    for result in (by_masks, by_codes):
        assert result.bottom_mask.tolist() == [True, True, True, False]
        assert torch.isnan(result.decoded).tolist() == [True, True, True, False]
        assert result.class_id.tolist() == [1, 1, 0, 1]


@given(PAIRS, st.sampled_from([np.float32, np.float64]))
def test_accepted_rows_are_finite_and_in_range(pair, dtype):
    """Whatever the tuple, what is not bottom has a finite value and class 1."""
    with np.errstate(over="ignore"):
        P, Q = (torch.from_numpy(part.astype(dtype)) for part in pair)
    result = decode_strict_censored_3way(P, Q, tau_infer=1e-6)
    assert torch.isfinite(result.decoded[~result.bottom_mask]).all()
    assert (result.class_id[~result.bottom_mask] == 1).all()
    assert torch.isnan(result.decoded[result.bottom_mask]).all()


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"direction_logits": torch.ones(2)}, r"direction_logits must have shape \(2, 2\), got \(2,\)"),
        ({"orientation_signal": torch.ones(3)}, "orientation_signal must have the shape of P"),
        ({"fault_mask": torch.ones(1, dtype=torch.bool)}, "fault_mask must have the shape of P"),
        (
            {"semantic_bottom_mask": torch.ones(1, dtype=torch.bool)},
            "semantic_bottom_mask must have the shape",
        ),
        ({"bottom_provenance": torch.ones(1, dtype=torch.int64)}, "bottom_provenance must have the shape"),
    ],
)
def test_censored_decoding_refuses_shapes_that_do_not_fit(kwargs, message):
    """Each refusal names the argument and both shapes."""
    with pytest.raises(ValueError, match=message):
        three_way([1.0, 1.0], [1.0, 1.0], **kwargs)


def test_censored_decoding_refuses_numerators_of_another_shape():
    """P and Q share one shape here."""
    with pytest.raises(ValueError, match=r"P and Q must have one shape, got \(2, 1\) and \(2,\)"):
        decode_strict_censored_3way(torch.ones(2, 1), torch.ones(2), tau_infer=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_quotient_that_overflows_is_bottom_and_has_no_gradient(dtype: torch.dtype) -> None:
    """What is refused pulls nothing, and leaves the other rows their own gradients."""
    largest = torch.finfo(dtype).max
    P = torch.tensor([largest / 2, 3.0], dtype=dtype, requires_grad=True)
    Q = torch.tensor([1e-6, 2.0], dtype=dtype, requires_grad=True)
    decoded, bottom, _ = strict_inference(P, Q, InferenceConfig(tau_infer=1e-9))
    assert bottom.tolist() == [True, False]
    torch.where(bottom, 0.0, decoded).sum().backward()
    assert P.grad is not None
    assert Q.grad is not None
    assert P.grad.tolist() == [0.0, 0.5]
    assert Q.grad.tolist() == [0.0, -0.75]
