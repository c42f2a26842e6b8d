"""Tags against the recorded classifications, IEEE arithmetic, strict decoding, and an independent reading."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch.func import vmap

from scm.core import (
    Reduction,
    TagPolicy,
    TRTag,
    reduce_sum,
    reduce_tags,
    tags_of_tuples,
    tags_of_values,
    values_of_tags,
)
from scm.inference.strict import InferenceConfig, strict_inference

F64 = torch.float64
REAL, PINF, NINF, PHI, BOTTOM = TRTag
SPECIAL = [0.0, -0.0, 5e-324, -5e-324, 1e-300, 1.0, -2.5, 1e300, math.inf, -math.inf, math.nan]

numbers = st.floats(width=32) | st.sampled_from([0.0, -0.0, 1e-4, -1e-4, 1e-30, 3e38])
finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
tags_lists = st.lists(st.sampled_from(list(TRTag)), max_size=6)


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=F64)


def codes(*tags: TRTag) -> torch.Tensor:
    return torch.tensor(tags, dtype=torch.int8)


def test_codes_are_the_recorded_ones():
    """The numbers in rows and tensors mean the same as in the reference."""
    assert [(tag.name, int(tag)) for tag in TRTag] == [
        ("REAL", 0),
        ("PINF", 1),
        ("NINF", 2),
        ("PHI", 3),
        ("BOTTOM", 4),
    ]


def test_tags_of_ieee_numbers_and_back():
    """nan is PHI and infinities keep their sign; what is not REAL has no value but the infinity's."""
    values = tensor(1.5, -0.0, math.inf, -math.inf, math.nan)
    tags = tags_of_values(values)
    assert tags.dtype == torch.int8
    assert tags.tolist() == [REAL, REAL, PINF, NINF, PHI]
    back = values_of_tags(tensor(1.5, -0.0, 7.0, 7.0, 7.0), tags)
    assert torch.equal(back.nan_to_num(99.0, 88.0, 77.0), values.nan_to_num(99.0, 88.0, 77.0))
    assert math.copysign(1.0, back[1].item()) == -1.0
    assert values_of_tags(tensor(3.0), codes(BOTTOM)).isnan().all()
    assert values_of_tags(torch.tensor([3]), codes(REAL)).tolist() == [3.0]


@given(st.lists(numbers, min_size=1, max_size=8))
def test_the_bridge_loses_nothing(values):
    """Every IEEE number is what its own tag and payload make of it."""
    given_values = tensor(*values)
    back = values_of_tags(given_values.nan_to_num(1.0, 1.0, 1.0), tags_of_values(given_values))
    expected = torch.where(tags_of_values(given_values) == REAL, given_values, back)
    assert torch.equal(back.isnan(), given_values.isnan())
    assert torch.equal(back.nan_to_num(0.0), expected.nan_to_num(0.0))


def test_only_real_entries_of_values_have_a_gradient():
    """An infinity or a nan made of a tag is a constant."""
    values = tensor(1.0, 2.0, 3.0, 4.0).requires_grad_()
    values_of_tags(values, codes(REAL, PINF, NINF, PHI)).sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [1.0, 0.0, 0.0, 0.0]


def test_guard_bands_match_the_recorded_cases(vector_group, decode_numbers):
    """The tags of the reference, with and without a previous tag, one by one and all at once."""
    cases = [decode_numbers(case) for case in vector_group("tag_policy_classification")]
    policy = TagPolicy(tau_Q_on=1e-3, tau_Q_off=2e-3, tau_P_on=1e-4)
    P = tensor(*(-0.0 if case["P_negative_zero"] else case["P"] for case in cases))
    Q = tensor(*(-0.0 if case["Q_negative_zero"] else case["Q"] for case in cases))
    previous = codes(*(TRTag[case["prev"] or "REAL"] for case in cases))
    found = [TRTag(tag).name for tag in tags_of_tuples(P, Q, policy, previous).tolist()]
    assert found == [case["expected"] for case in cases]
    fresh = [i for i, case in enumerate(cases) if case["prev"] is None]
    assert fresh
    assert torch.equal(
        tags_of_tuples(P[fresh], Q[fresh], policy),
        tags_of_tuples(P[fresh], Q[fresh], policy, codes(*[REAL] * len(fresh))),
    )


@pytest.mark.parametrize("p", SPECIAL)
@pytest.mark.parametrize("q", SPECIAL)
def test_without_thresholds_the_tag_is_that_of_the_quotient(p, q):
    """Zeros of either sign, overflow and what is not finite: as in IEEE division, also after other tags."""
    P, Q = tensor(p), tensor(q)
    expected = tags_of_values(P / Q)
    assert torch.equal(tags_of_tuples(P, Q), expected)
    for tag in TRTag:
        assert torch.equal(tags_of_tuples(P, Q, previous=codes(tag)), expected)


def test_a_quotient_by_zero_is_not_real_and_zero_by_zero_has_no_side():
    """Thresholds of 0 do not turn a pole into a number, and no sign bit makes 0/0 an infinity."""
    P, Q = tensor(1.0, -1.0, 0.0, -0.0), tensor(0.0, 0.0, 0.0, 0.0)
    assert tags_of_tuples(P, Q, TagPolicy()).tolist() == [PINF, NINF, PHI, PHI]
    assert tags_of_tuples(P, Q, TagPolicy(tau_Q_on=1e-3)).tolist() == [PINF, NINF, PHI, PHI]


def test_the_sign_of_a_zero_counts_unless_told_otherwise():
    """1/-0 is minus infinity, or plus infinity where zeros have no sign."""
    P, Q = tensor(1.0, 1.0, -1.0), tensor(-0.0, 0.0, -0.0)
    for on in (0.0, 1e-3):
        signed = TagPolicy(tau_Q_on=on)
        unsigned = TagPolicy(tau_Q_on=on, keep_signed_zero=False)
        assert tags_of_tuples(P, Q, signed).tolist() == [NINF, PINF, PINF]
        assert tags_of_tuples(P, Q, unsigned).tolist() == [PINF, PINF, NINF]


def test_what_is_real_has_a_finite_value_whatever_the_thresholds():
    """A quotient that overflows is the infinity that it becomes."""
    P, Q = torch.tensor([1e38, -1e38]), torch.tensor([1e-3, 1e-3])
    assert tags_of_tuples(P, Q, TagPolicy(tau_Q_on=1e-6)).tolist() == [PINF, NINF]


@given(st.lists(st.tuples(finite, finite), min_size=1, max_size=8), st.sampled_from([1e-6, 1e-3, 0.1, 0.5]))
@example([(1.0, 0.1), (0.0, 0.0), (3e38, 0.2), (1.0, -0.1), (1.0, -0.0)], 0.1)
def test_an_answer_is_bottom_in_strict_decoding_exactly_where_its_tag_is_not_real(pairs, tau):
    """At every finite tuple and every threshold, boundary and overflow included, in both dtypes."""
    for dtype in (torch.float32, F64):
        P, Q = torch.tensor(pairs, dtype=dtype).unbind(1)
        bottom = strict_inference(P, Q, InferenceConfig(tau_infer=tau)).bottom_mask
        assert torch.equal(tags_of_tuples(P, Q, TagPolicy(tau_Q_on=tau)) != REAL, bottom)


def one_tag(p, q, on, off, tau_P, previous):
    """The rule of one quotient, as a person would say it."""
    if not (math.isfinite(p) and math.isfinite(q)) or (p != 0 and q != 0 and abs(p) / abs(q) > 1.7e308):
        return None
    infinity = PINF if math.copysign(1, p) * math.copysign(1, q) > 0 else NINF
    without = infinity if abs(p) >= tau_P and p != 0 else PHI
    if previous is REAL:
        return without if abs(q) < on or q == 0 else REAL
    if abs(q) >= off:
        return REAL
    return without if abs(q) <= on else previous


@given(numbers, numbers, st.sampled_from(list(TRTag)), st.sampled_from([1e-4, 0.1]))
def test_hysteresis_is_the_rule_of_one_quotient(p, q, previous, on):
    """Entering below `on`, leaving at `off`, keeping the tag between."""
    policy = TagPolicy(tau_Q_on=on, tau_Q_off=2 * on, tau_P_on=1e-4)
    expected = one_tag(p, q, on, 2 * on, 1e-4, previous)
    found = tags_of_tuples(tensor(p), tensor(q), policy, codes(previous)).item()
    assert found == (tags_of_values(tensor(p) / tensor(q)).item() if expected is None else expected)


def test_thresholds_and_tags_are_one_per_trial_under_vmap():
    """A stack of trials with thresholds of their own has the tags of each alone."""
    drawn = torch.Generator().manual_seed(0)
    P, Q = torch.randn(2, 3, 50, generator=drawn, dtype=F64).mul(0.1).unbind(0)
    on = tensor(0.0, 0.05, 0.2)
    previous = torch.randint(0, 4, (3, 50), generator=drawn).to(torch.int8)

    def tags(p, q, threshold, before):
        return tags_of_tuples(p, q, TagPolicy(tau_Q_on=threshold, tau_Q_off=2 * threshold), before)

    stacked = vmap(tags)(P, Q, on, previous)
    for k in range(3):
        alone = TagPolicy(tau_Q_on=on[k].item(), tau_Q_off=2 * on[k].item())
        assert torch.equal(stacked[k], tags_of_tuples(P[k], Q[k], alone, previous[k]))


def test_thresholds_follow_the_scales_of_the_polynomials():
    """on = ulp * scale and off = 2 * on, with scales of at least 1 and an ulp of at least 0."""
    policy = TagPolicy(keep_signed_zero=False).resolve_thresholds(1e-3, 4.0, 0.5)
    assert (policy.tau_Q_on, policy.tau_Q_off, policy.tau_P_on) == (4e-3, 8e-3, 1e-3)
    assert policy.keep_signed_zero is False
    assert TagPolicy().resolve_thresholds(-1.0, 4.0, 4.0) == TagPolicy(tau_Q_off=0.0)
    per_trial = TagPolicy().resolve_thresholds(1e-3, tensor(0.1, 3.0), 1.0)
    assert isinstance(per_trial.tau_Q_off, torch.Tensor)
    torch.testing.assert_close(per_trial.tau_Q_off, tensor(2e-3, 6e-3))


def strict_tag(tags):
    """The tag of a strict sum, read off the definition."""
    for tag in (PHI, BOTTOM):
        if tag in tags:
            return tag
    infinities = {tag for tag in tags if tag is not REAL}
    return PHI if len(infinities) == 2 else (infinities or {REAL}).pop()


@given(tags_lists)
def test_reductions_of_tags_are_what_their_definition_says(tags):
    """STRICT and DROP_NULL, from no term to six, along a dimension as over all."""
    kept = [tag for tag in tags if tag not in (PHI, BOTTOM)]
    gone = BOTTOM if BOTTOM in tags else PHI
    expected = {
        Reduction.STRICT: strict_tag(tags),
        Reduction.DROP_NULL: strict_tag(kept) if kept or not tags else gone,
    }
    for reduction, tag in expected.items():
        assert reduce_tags(codes(*tags), reduction).item() == tag
        rows = codes(*tags).repeat(2, 1)
        assert reduce_tags(rows, reduction, dim=1).tolist() == [tag, tag]


def test_a_strict_sum_with_a_bad_term_has_no_value_and_no_gradient():
    """Mask-REAL: what is not REAL trains nothing; the payload of a term without value is never read."""
    values = tensor(1.0, 2.0, math.nan).requires_grad_()
    total, tag = reduce_sum(values, codes(REAL, REAL, PHI))
    assert (tag.item(), total.isnan().item()) == (PHI, True)
    total.backward()
    assert values.grad is not None
    assert values.grad.tolist() == [0.0, 0.0, 0.0]


def test_a_sum_without_the_null_terms_trains_the_others():
    """DROP_NULL is the sum of what has a value; its gradient is 1 there and 0 elsewhere."""
    values = tensor(1.0, 2.0, math.nan).requires_grad_()
    total, tag = reduce_sum(values, codes(REAL, REAL, PHI), Reduction.DROP_NULL)
    assert (tag.item(), total.item()) == (REAL, 3.0)
    total.backward()
    assert values.grad is not None
    assert values.grad.tolist() == [1.0, 1.0, 0.0]


def test_sums_of_nothing_along_a_dimension_and_beyond_the_range():
    """No terms sum to REAL 0; rows keep apart; a sum that overflows is an infinity."""
    total, tag = reduce_sum(tensor(), codes())
    assert (total.item(), tag.item()) == (0.0, REAL)
    total, tag = reduce_sum(
        tensor(1.0, 2.0, 3.0, 4.0).view(2, 2), codes(REAL, REAL, REAL, NINF).view(2, 2), dim=1
    )
    assert tag.tolist() == [REAL, NINF]
    assert total[0].item() == 3.0
    assert reduce_sum(tensor(1.7e308, 1.7e308), codes(REAL, REAL))[1].item() == PINF


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: TagPolicy(tau_Q_on=-1.0), "tau_Q_on must be finite and >= 0, got tau_Q_on=-1.0"),
        (lambda: TagPolicy(tau_P_on=math.nan), "tau_P_on must be finite and >= 0, got tau_P_on=nan"),
        (lambda: TagPolicy(tau_Q_off=math.inf), "tau_Q_off must be finite and >= 0, got tau_Q_off=inf"),
        (lambda: TagPolicy(tau_Q_on=0.2, tau_Q_off=0.1), "tau_Q_off must be >= tau_Q_on, got tau_Q_off=0.1"),
        (lambda: TagPolicy().resolve_thresholds(math.nan, 1, 1), "ulp must be a number, got ulp=nan"),
    ],
)
def test_thresholds_that_mean_nothing_are_refused(make, message):
    """The error names the rule, the argument and the value."""
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("bad", [torch.tensor([1j]), [1.0]], ids=["complex", "list"])
def test_what_is_no_real_tensor_is_refused(bad):
    """Complex numbers have no side of infinity."""
    for call in (
        lambda: tags_of_values(bad),
        lambda: tags_of_tuples(bad, tensor(1.0)),
        lambda: tags_of_tuples(tensor(1.0), bad),
        lambda: reduce_sum(bad, codes(REAL)),
    ):
        with pytest.raises(TypeError, match="must be a real tensor"):
            call()
