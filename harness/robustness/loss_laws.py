"""Laws of losses: groups 1 to 9 and 19 to 21.

A loss is a 0-d mean over the rows of a batch. What the subject's attributes are is said in
`trainables.subject.LibrarySubject`; which laws exist, in `properties`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from harness.robustness.edge_values import NOT_FINITE, TAU_TRAIN, batches, reversed_rows
from harness.robustness.law import BrokenLawError, Case, Property, Subject, library_law
from harness.robustness.tensors import (
    ORDINARY,
    ROWS,
    close,
    eps,
    gradients_of,
    leaves,
    number,
    on,
    rows_to_try,
    same,
    within,
)

TERMS: dict[str, Callable[..., dict[str, Tensor]]] = {
    "fit_loss": lambda s, P, Q, Y_n, Y_d, mask: {"fit": s.fit_loss(P, Q, Y_n, Y_d)},
    "implicit_loss": lambda s, P, Q, Y_n, Y_d, mask: {
        "implicit": s.implicit_loss(P, Q, Y_n, Y_d, 1e-9, False),
        "implicit, detached": s.implicit_loss(P, Q, Y_n, Y_d, 1e-9, True),
    },
    "margin_loss": lambda s, P, Q, Y_n, Y_d, mask: {
        "margin": s.margin_loss(Q, TAU_TRAIN, mask, "population"),
        "margin, conditional": s.margin_loss(Q, 0.3, mask, "conditional"),
    },
    "sign_loss": lambda s, P, Q, Y_n, Y_d, mask: {
        "sign": s.sign_loss(P, Q, Y_n, Y_d, 1e-9, None),
        "sign of all": s.sign_loss(P, Q, Y_n, Y_d, 1e-9, torch.ones_like(mask)),
    },
    "soft_coverage_loss": lambda s, P, Q, Y_n, Y_d, mask: {
        "soft coverage": s.soft_coverage_loss(Q, TAU_TRAIN, 1e-2, 0.95)
    },
    "ranked_coverage_loss": lambda s, P, Q, Y_n, Y_d, mask: {
        "ranked coverage": s.ranked_coverage_loss(Q, TAU_TRAIN, 1e-2, 0.95)
    },
    "separation_losses": lambda s, P, Q, Y_n, Y_d, mask: dict(
        zip(("push_down", "push_up"), s.separation_losses(Q, ~mask), strict=True)
    ),
    "training_loss": lambda s, P, Q, Y_n, Y_d, mask: {"total": s.training_loss(P, Q, Y_n, Y_d, mask)},
}
"""By the attribute that it needs, what a term of the objective costs: one or more losses by name."""


def _all_terms(subject: Subject, rows: tuple[Tensor, ...], leave: tuple[str, ...] = ()) -> dict[str, Tensor]:
    losses: dict[str, Tensor] = {}
    for attribute, term in TERMS.items():
        if attribute not in leave and getattr(subject, attribute, None) is not None:
            losses.update(term(subject, *rows))
    return losses


# --- 1, 2, 3, 21: finite and bounded -------------------------------------------------------------


def _is_finite(term: str, subject: Subject, case: Case) -> None:
    for name, loss in TERMS[term](subject, *on(subject, case, "P", "Q", "Y_n", "Y_d", "mask")).items():
        if not math.isfinite(number(loss)):
            raise BrokenLawError(f"{name} is {number(loss)}")


def _has_finite_gradients(term: str, subject: Subject, case: Case) -> None:
    P, Q = leaves(subject, case, "P", "Q")
    for name, loss in TERMS[term](subject, P, Q, *on(subject, case, "Y_n", "Y_d", "mask")).items():
        for member, gradient in zip("PQ", gradients_of(loss, P, Q), strict=True):
            if not gradient.isfinite().all():
                raise BrokenLawError(f"the gradient of {name} on {member} is {gradient.tolist()}")


def _fit_is_bounded(subject: Subject, case: Case) -> None:
    loss = subject.fit_loss(*on(subject, case, "P", "Q", "Y_n", "Y_d"))
    within("the fit", number(loss), 0.0, 2.0)


def _implicit_is_bounded(subject: Subject, case: Case) -> None:
    for name, loss in TERMS["implicit_loss"](
        subject, *on(subject, case, "P", "Q", "Y_n", "Y_d", "mask")
    ).items():
        within(name, number(loss), 0.0, subject.implicit_bound * (1 + 1e-6))


def _sign_is_bounded(subject: Subject, case: Case) -> None:
    rows = on(subject, case, "P", "Q", "Y_n", "Y_d")
    for mask in (None, *on(subject, case, "mask")):
        loss = subject.sign_loss(*rows, case["gamma"], mask)
        within("the sign loss", number(loss), 0.0, 2.0 * (1 + 4 * eps(loss)))


def _sign_has_finite_gradients(subject: Subject, case: Case) -> None:
    P, Q = leaves(subject, case, "P", "Q")
    loss = subject.sign_loss(P, Q, *on(subject, case, "Y_n", "Y_d"), case["gamma"], torch.ones_like(P) > 0)
    for member, gradient in zip("PQ", gradients_of(loss, P, Q), strict=True):
        if not gradient.isfinite().all():
            raise BrokenLawError(f"the gradient of the sign loss on {member} is {gradient.tolist()}")


# --- 4 to 7: symmetries and exactness ------------------------------------------------------------


def _scaled_exactly(subject: Subject, case: Case) -> tuple[list[Tensor], list[Tensor]]:
    """The rows that a power of two scales without rounding, before and after."""
    P, Q, Y_n, Y_d = on(subject, case, "P", "Q", "Y_n", "Y_d")
    s = 2.0 ** case["exponent"]
    exact = (P * s / s == P) & (Q * s / s == Q) & (P * s).isfinite() & (Q * s).isfinite()
    plain = [member[exact] for member in (P, Q, Y_n, Y_d)]
    return plain, [plain[0] * s, plain[1] * s, *plain[2:]]


def _fit_ignores_the_scale(subject: Subject, case: Case) -> None:
    plain, scaled = _scaled_exactly(subject, case)
    if plain[0].numel():
        a, b = number(subject.fit_loss(*plain)), number(subject.fit_loss(*scaled))
        if not close(a, b, relative=1e-5, absolute=1e-9):
            raise BrokenLawError(f"scaled by 2^{case['exponent']} the fit is {b:.9g}, before it was {a:.9g}")


def _implicit_ignores_the_scale_far_from_gamma(subject: Subject, case: Case) -> None:
    plain, scaled = _scaled_exactly(subject, case)

    def far(P: Tensor, Q: Tensor, Y_n: Tensor, Y_d: Tensor) -> Tensor:
        return (Q * Y_d).double().square() + (P * Y_n).double().square() > 1e-4  # gamma is 1e-9

    kept = far(*plain) & far(*scaled) & (plain[0].abs() < 1e6) & (plain[1].abs() < 1e6)
    kept = kept & (scaled[0].abs() < 1e6) & (scaled[1].abs() < 1e6)
    if bool(kept.any()):
        a, b = (
            number(subject.implicit_loss(*(x[kept] for x in rows), 1e-9, False)) for rows in (plain, scaled)
        )
        if not close(a, b, relative=1e-3, absolute=1e-9):
            raise BrokenLawError(f"scaled by 2^{case['exponent']} the loss is {b:.9g}, before it was {a:.9g}")


def _fits(subject: Subject) -> dict[str, Callable[..., Tensor]]:
    fits: dict[str, Callable[..., Tensor]] = {"fit": subject.fit_loss}
    if getattr(subject, "implicit_loss", None) is not None:
        fits["implicit"] = lambda *rows: subject.implicit_loss(*rows, 1e-9, False)
    return fits


def _fits_know_no_sign(subject: Subject, case: Case) -> None:
    P, Q, Y_n, Y_d = on(subject, case, "P", "Q", "Y_n", "Y_d")
    for name, fit in _fits(subject).items():
        plain = fit(P, Q, Y_n, Y_d)
        for change, rows in (
            ("(-P, -Q)", (-P, -Q, Y_n, Y_d)),
            ("(-P, Q) and (-Y_n, Y_d)", (-P, Q, -Y_n, Y_d)),
        ):
            if not same(plain, fit(*rows)):
                raise BrokenLawError(f"with {change} {name} is {number(fit(*rows))}, not {number(plain)}")


def _terms_ignore_the_order(subject: Subject, case: Case) -> None:
    rows = tuple(on(subject, case, "P", "Q", "Y_n", "Y_d", "mask"))
    order = reversed_rows(len(rows[0]), case["turn"])
    turned = _all_terms(subject, tuple(x[order] for x in rows))
    for name, loss in _all_terms(subject, rows).items():
        # Shortfalls of coverage are differences of sums: what rounds there is of order 1.
        tolerance = 32 * eps(rows[1])
        if not close(number(loss), number(turned[name]), relative=tolerance, absolute=tolerance):
            raise BrokenLawError(
                f"{name} is {number(turned[name]):.9g} in another order, not {number(loss):.9g}"
            )


def _gradients_follow_their_rows(subject: Subject, case: Case) -> None:
    order = reversed_rows(len(case["P"]), case["turn"])
    rest = on(subject, case, "Y_n", "Y_d", "mask")
    P, Q = leaves(subject, case, "P", "Q")
    p, q = (x.detach()[order].requires_grad_() for x in (P, Q))
    of_sums = ("soft_coverage_loss", "ranked_coverage_loss", "training_loss")
    turned = _all_terms(subject, (p, q, *(x[order] for x in rest)), of_sums)
    for name, loss in _all_terms(subject, (P, Q, *rest), of_sums).items():
        pairs = zip(gradients_of(loss, P, Q), gradients_of(turned[name], p, q), strict=True)
        for member, (plain, other) in zip("PQ", pairs, strict=True):
            if not torch.allclose(plain[order], other, rtol=32 * eps(P), atol=0.0, equal_nan=True):
                raise BrokenLawError(f"the gradient of {name} on {member} does not follow its rows")


def _means_ignore_repetition(subject: Subject, case: Case) -> None:
    rows = tuple(on(subject, case, "P", "Q", "Y_n", "Y_d", "mask"))
    twice = _all_terms(subject, tuple(torch.cat([x, x]) for x in rows))
    for name, loss in _all_terms(subject, rows).items():
        tolerance = 32 * eps(rows[1])
        if not close(number(loss), number(twice[name]), relative=tolerance, absolute=tolerance):
            raise BrokenLawError(
                f"{name} of every row twice is {number(twice[name]):.9g}, not {number(loss):.9g}"
            )


def _multiples_of_the_target_cost_nothing(subject: Subject, case: Case) -> None:
    Y_n, Y_d = on(subject, case, "Y_n", "Y_d")
    s = 2.0 ** case["exponent"]
    kept = (Y_n * s / s == Y_n) & (Y_d * s / s == Y_d) & (Y_n * s).isfinite()
    Y_n, Y_d = Y_n[kept], Y_d[kept]
    if Y_n.numel():
        for name, fit in _fits(subject).items():
            value = number(fit(Y_n * s, Y_d * s, Y_n, Y_d))
            if not abs(value) <= 16 * eps(Y_n) ** 2:
                raise BrokenLawError(f"{name} of 2^{case['exponent']} times the target is {value}, not 0")


# --- 8, 9: a low loss means something ------------------------------------------------------------


def _low_fit_means_close(subject: Subject, case: Case) -> None:
    P, Q, Y_n, Y_d = on(subject, case, "P", "Q", "Y_n", "Y_d")
    for row in range(len(P)):
        p, q, y = (float(x[row]) for x in (P, Q, Y_n))
        if float(Y_d[row]) != 1.0 or q == 0.0 or not math.isfinite(p / q):
            continue
        loss = number(subject.fit_loss(*(x[row : row + 1] for x in (P, Q, Y_n, Y_d))))
        if not loss < 1e-8:
            continue
        answer = p / q
        # sin of the angle between (answer, 1) and (y, 1) is their difference over both lengths.
        allowed = 2 * math.sqrt(loss + 1e-14) * math.hypot(1, answer) * math.hypot(1, y)
        if not abs(answer - y) <= allowed:
            raise BrokenLawError(
                f"a loss of {loss:.3g} allows for {allowed:.3g}, but {p:.9g}/{q:.9g} is "
                f"{abs(answer - y):.3g} away from {y:.9g}"
            )


def _origin_is_not_rewarded(subject: Subject, case: Case) -> None:
    plain, scaled = _scaled_exactly(subject, case)
    if not plain[0].numel():
        return
    before = number(subject.fit_loss(*plain))
    origin = [torch.zeros_like(x) for x in plain[:2]]
    for what, rows in ((f"2^{case['exponent']} times (P, Q)", scaled), ("(0, 0)", [*origin, *plain[2:]])):
        after = number(subject.fit_loss(*rows))
        if not after >= before * (1 - 1e-4) - 1e-9:
            raise BrokenLawError(f"{what} costs {after:.9g}, less than (P, Q) with {before:.9g}")


# --- 19, 20: isolation ---------------------------------------------------------------------------


def _masked_rows_leak_nothing(term: str, subject: Subject, case: Case) -> None:
    bad, mask = on(subject, case, "bad", "mask")
    Y_n, Y_d = on(subject, case, "Y_n", "Y_d")
    results = []
    for spoilt in (torch.ones_like(bad), bad):
        P, Q = (torch.where(mask, x, spoilt).requires_grad_() for x in on(subject, case, "P", "Q"))
        loss = _masked_loss(term, subject, P, Q, Y_n, Y_d, mask)
        results.append((loss, *gradients_of(loss, P, Q)))
    (plain, *slopes), (loss, *spoilt_slopes) = results
    if not same(plain, loss):
        raise BrokenLawError(f"it is {number(loss):.9g} with and {number(plain):.9g} without what is masked")
    for member, slope, spoilt_slope in zip("PQ", slopes, spoilt_slopes, strict=True):
        if not same(slope[mask], spoilt_slope[mask]):
            raise BrokenLawError(f"what is masked changes the gradient of other rows on {member}")
        if not bool((spoilt_slope[~mask] == 0).all()):
            raise BrokenLawError(f"a masked row has the gradient {spoilt_slope[~mask].tolist()} on {member}")


def _masked_loss(
    term: str, subject: Subject, P: Tensor, Q: Tensor, Y_n: Tensor, Y_d: Tensor, mask: Tensor
) -> Tensor:
    if term == "margin_loss":
        return subject.margin_loss(Q, 0.3, mask, "population") + subject.margin_loss(
            Q, 0.3, mask, "conditional"
        )
    if term == "sign_loss":
        return subject.sign_loss(P, Q, Y_n, Y_d, 1e-9, mask)
    return subject.masked_fit_loss(P, Q, Y_n, Y_d, mask)


def _groups_are_kept_apart(subject: Subject, case: Case) -> None:
    Q, mask = on(subject, case, "Q", "mask")
    for spoilt, other in ((mask, 1), (~mask, 0)):  # of (push_down, push_up)
        if not bool(spoilt.any()):
            continue
        results = []
        for value in (1.0, case["value"]):
            held = torch.tensor(value, dtype=torch.float64).to(Q)  # too large a number is infinite there
            q = torch.where(spoilt, held, Q).requires_grad_()
            loss = subject.separation_losses(q, mask)[other]
            results.append((loss, gradients_of(loss, q)[0][~spoilt]))
        (plain, slope), (loss, spoilt_slope) = results
        name = ("push_down", "push_up")[other]
        if not math.isfinite(number(loss)) or not same(plain, loss):
            raise BrokenLawError(
                f"{name} is {number(loss)} for {case['value']} in the other group, else {number(plain)}"
            )
        if not same(slope, spoilt_slope):
            raise BrokenLawError(f"{case['value']} in the other group changes the gradient of {name}")


def _a_bad_row_stays_alone(subject: Subject, case: Case) -> None:
    rest = on(subject, case, "Y_n", "Y_d", "mask")
    place = case["turn"] % len(case["P"])
    others = torch.arange(len(case["P"]), device=subject.device) != place
    # By itself the soft coverage is a mean of all rows; in the objective it is protected.
    leave = ("soft_coverage_loss", "ranked_coverage_loss", "training_loss")
    results = []
    for value in (0.5, case["value"]):
        P, Q = leaves(subject, case, "P", "Q")
        with torch.no_grad():
            P[place] = value
            Q[place] = value
        losses = _all_terms(subject, (P, Q, *rest), leave)
        results.append({name: gradients_of(loss, P, Q) for name, loss in losses.items()})
    for name, slopes in results[0].items():
        for member, slope, spoilt in zip("PQ", slopes, results[1][name], strict=True):
            if not same(slope[others], spoilt[others]):
                raise BrokenLawError(
                    f"{case['value']} in row {place} changes other rows' gradient of {name} on {member}"
                )


# --- the table -----------------------------------------------------------------------------------

_TURN = {"turn": st.integers(0, 5)}
_GAMMA = {"gamma": st.sampled_from([1e-9, 0.0])}
_SCALE = {"exponent": st.integers(-100, 100)}
_DOWN = {"exponent": st.integers(-100, -1)}
_BAD = {"value": st.sampled_from([*NOT_FINITE])}


def _separated(subject: Subject) -> Any:
    values = st.sampled_from([*NOT_FINITE, *(torch.finfo(dtype).max for dtype in subject.dtypes), 2e19])
    return batches(subject.dtypes, {"Q": "ordinary", "mask": "flag"}, plain={"value": values})


_TERM_WORDS = {
    "fit_loss": "the fit",
    "implicit_loss": "the implicit loss, attached and detached,",
    "margin_loss": "the margin loss",
    "sign_loss": "the sign loss",
    "soft_coverage_loss": "the soft coverage loss",
    "ranked_coverage_loss": "the ranked coverage loss",
    "separation_losses": "each separation loss",
    "training_loss": "the whole objective",
}

LOSS_LAWS: list[Property] = [
    *(
        library_law(
            f"{term}_is_finite",
            1,
            f"For finite rows {words} is finite.",
            term,
            rows_to_try(),
            partial(_is_finite, term),
        )
        for term, words in _TERM_WORDS.items()
        if term != "sign_loss"
    ),
    *(
        library_law(
            f"{term}_has_finite_gradients",
            2,
            f"For finite rows {words} has finite gradients.",
            term,
            rows_to_try(),
            partial(_has_finite_gradients, term),
        )
        for term, words in _TERM_WORDS.items()
        if term != "sign_loss"
    ),
    library_law(
        "fit_loss_is_bounded",
        3,
        "For finite rows the fit is in [0, 2].",
        "fit_loss",
        rows_to_try(),
        _fit_is_bounded,
    ),
    library_law(
        "implicit_loss_is_bounded",
        3,
        "For finite rows the implicit loss is in [0, its stated bound].",
        ("implicit_loss", "implicit_bound"),
        rows_to_try(),
        _implicit_is_bounded,
    ),
    library_law(
        "fit_loss_ignores_the_scale",
        4,
        "(P, Q) and s(P, Q) have the same fit, wherever s(P, Q) is representable.",
        "fit_loss",
        rows_to_try(plain=_SCALE),
        _fit_ignores_the_scale,
    ),
    library_law(
        "implicit_loss_ignores_the_scale_far_from_gamma",
        4,
        "(P, Q) and s(P, Q) have the same implicit loss where gamma is negligible beside its denominator.",
        "implicit_loss",
        lambda subject: batches(subject.dtypes, ORDINARY, plain={"exponent": st.integers(-10, 10)}),
        _implicit_ignores_the_scale_far_from_gamma,
    ),
    library_law(
        "fit_losses_know_no_sign",
        5,
        "Fits of (-P, -Q), and of (-P, Q) to (-Y_n, Y_d), are those of (P, Q) to (Y_n, Y_d), bit for bit.",
        "fit_loss",
        rows_to_try(),
        _fits_know_no_sign,
    ),
    library_law(
        "losses_ignore_the_order",
        6,
        "No loss depends on the order of rows.",
        "fit_loss",
        rows_to_try(plain=_TURN),
        _terms_ignore_the_order,
    ),
    library_law(
        "gradients_follow_their_rows",
        6,
        "In another order every row keeps its gradient.",
        "fit_loss",
        rows_to_try(plain=_TURN),
        _gradients_follow_their_rows,
    ),
    library_law(
        "losses_ignore_repetition",
        6,
        "A batch with every row twice costs what the batch does.",
        "fit_loss",
        rows_to_try(ORDINARY),
        _means_ignore_repetition,
    ),
    library_law(
        "multiples_of_the_target_cost_nothing",
        7,
        "Every positive multiple of the target has a fit of 0.",
        "fit_loss",
        lambda subject: batches(
            subject.dtypes, {"Y_n,Y_d": "ordinary target"}, plain={"exponent": st.integers(-10, 10)}
        ),
        _multiples_of_the_target_cost_nothing,
    ),
    library_law(
        "low_fit_means_close",
        8,
        "A fit below 1e-8 means that the decoded answer is as close to the target as the angle says.",
        "fit_loss",
        rows_to_try(),
        _low_fit_means_close,
    ),
    library_law(
        "origin_is_not_rewarded",
        9,
        "Shrinking (P, Q) towards (0, 0), and (0, 0) itself, never lowers the fit.",
        "fit_loss",
        rows_to_try(plain=_DOWN),
        _origin_is_not_rewarded,
    ),
    *(
        library_law(
            f"{term}_leaks_no_masked_row",
            19,
            f"Whatever a masked row holds, {words} and all gradients are as if it held 1, and its own are 0.",
            term,
            rows_to_try({**ROWS, "bad": "bad"}),
            partial(_masked_rows_leak_nothing, term),
        )
        for term, words in (
            ("margin_loss", "the margin loss"),
            ("sign_loss", "the sign loss"),
            ("masked_fit_loss", "the fit"),
        )
    ),
    library_law(
        "separation_keeps_groups_apart",
        20,
        "What one group holds changes neither loss nor gradient of the other.",
        "separation_losses",
        _separated,
        _groups_are_kept_apart,
    ),
    library_law(
        "a_bad_row_stays_alone",
        20,
        "A row that is not finite changes no other row's gradient, of any loss that is a mean of rows.",
        "fit_loss",
        rows_to_try(plain={**_TURN, **_BAD}),
        _a_bad_row_stays_alone,
    ),
    library_law(
        "sign_loss_is_bounded",
        21,
        "For finite rows the sign loss is in [0, 2], with gamma = 0 too.",
        "sign_loss",
        rows_to_try(plain=_GAMMA),
        _sign_is_bounded,
    ),
    library_law(
        "sign_loss_has_finite_gradients",
        21,
        "For finite rows the sign loss has finite gradients, with gamma = 0 too.",
        "sign_loss",
        rows_to_try(plain=_GAMMA),
        _sign_has_finite_gradients,
    ),
]
