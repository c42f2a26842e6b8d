"""Laws of the gradient policies: group 32."""

from __future__ import annotations

import math

import torch
from hypothesis import strategies as st

from harness.robustness.edge_values import NOT_FINITE, batches
from harness.robustness.law import BrokenLawError, Case, Property, Subject, library_law
from harness.robustness.tensors import (
    ORDINARY,
    gradients_of,
    leaves,
    on,
    same,
)

_WORDS = st.sampled_from(["project", "clamp", "reject", "pass"])


def _policies_treat_numbers(subject: Subject, case: Case) -> None:
    g, bottom, word = case["gradient"], case["bottom"], case["policy"]
    got = subject.apply_policy(g, bottom, word)
    if word == "pass":
        expected = g
    elif word == "reject" or bottom:
        expected = 0.0
    else:
        expected = g if word == "project" or math.isnan(g) else max(-1.0, min(1.0, g))
    if not (got == expected or (math.isnan(got) and math.isnan(expected))):
        raise BrokenLawError(
            f"{word} makes {got} of a gradient of {g} where bottom is {bottom}, not {expected}"
        )


def _policies_reach_tuples(subject: Subject, case: Case) -> None:
    word, tau = case["policy"], case["tau"]
    rest = on(subject, case, "Y_n", "Y_d")
    P, Q = leaves(subject, case, "P", "Q")
    plain = gradients_of(subject.fit_loss(P, Q, *rest), P, Q)
    p, q = leaves(subject, case, "P", "Q")
    with subject.policy(word, tau):
        got = gradients_of(subject.fit_loss(p, q, *rest), p, q)
    bottom = Q.detach().abs() < tau
    for member, free, gated in zip("PQ", plain, got, strict=True):
        expected = {
            "pass": free,
            "project": torch.where(bottom, 0.0, free),
            "clamp": torch.where(bottom, 0.0, free.clamp(-1, 1)),
            "reject": torch.zeros_like(free),
        }[word]
        if not same(gated, expected):
            raise BrokenLawError(
                f"under {word} the gradient on {member} is {gated.tolist()}, not {expected.tolist()}"
            )


POLICY_LAWS: list[Property] = [
    library_law(
        "policies_treat_gradients",
        32,
        "Each policy makes of a gradient what its row of the table of policies says.",
        "apply_policy",
        lambda subject: st.fixed_dictionaries(
            {
                "gradient": st.floats() | st.sampled_from([0.0, 1.0, -1.0, 2.0, *NOT_FINITE]),
                "bottom": st.booleans(),
                "policy": _WORDS,
            }
        ),
        _policies_treat_numbers,
    ),
    library_law(
        "policies_reach_tuples",
        32,
        "Under a policy the gradients on P and Q of a fit are what the policy makes of them.",
        ("policy", "fit_loss"),
        lambda subject: batches(subject.dtypes, ORDINARY, near=("tau",), plain={"policy": _WORDS}),
        _policies_reach_tuples,
    ),
]
