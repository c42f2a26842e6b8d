"""Ways in which a training fails, each injected into a tiny one: without a guard, with it, and with neither.

A case is measured by one function, which trains or evaluates the same small thing several times: with the
failure and no guard, with the failure and the guard, and twice without the failure. Where somebody published
a remedy that does not work, it is measured as well. What is made of the numbers is decided in
`failure_modes`.
"""

from __future__ import annotations

from failures import (
    class_weights,
    clue_counts,
    constant_answers,
    equivariance,
    extra_terms,
    gates,
    held_out,
    large_logits,
    monitors,
    not_finite,
)
from failures.measuring import Case

FAILURES: tuple[Case, ...] = (
    *large_logits.CASES,
    *not_finite.CASES,
    *extra_terms.CASES,
    *equivariance.CASES,
    *clue_counts.CASES,
    *gates.CASES,
    *held_out.CASES,
    *class_weights.CASES,
    *monitors.CASES,
    *constant_answers.CASES,
)
