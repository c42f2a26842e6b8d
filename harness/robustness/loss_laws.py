"""Laws of losses and of the coverage terms: groups 1 to 9 and 17 to 21, and the gradient policies (32).

A loss is a 0-d mean over the rows of a batch. What the subject's attributes are is said in
`trainables.subject.LibrarySubject`; which laws exist, in `properties`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from harness.robustness.edge_values import NOT_FINITE, TAU_TRAIN, batches, reversed_rows
from harness.robustness.law import BrokenLawError, Case, Property, Subject

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

ROWS = {"P": "finite", "Q": "finite", "Y_n,Y_d": "target", "mask": "flag"}
ORDINARY = {"P": "ordinary", "Q": "ordinary", "Y_n,Y_d": "ordinary target", "mask": "flag"}


# --- what every law does -------------------------------------------------------------------------


def on(subject: Subject, case: Case, *names: str) -> list[Tensor]:
    """The tensors of a case on the subject's device."""
    return [case[name].to(subject.device) for name in names]


def leaves(subject: Subject, case: Case, *names: str) -> list[Tensor]:
    """The same, each a leaf that can have a gradient."""
    return [tensor.clone().requires_grad_() for tensor in on(subject, case, *names)]


def gradients_of(loss: Tensor, *of: Tensor) -> list[Tensor]:
    """Gradients of a loss, zeros where it has none."""
    if not loss.requires_grad:
        return [torch.zeros_like(leaf) for leaf in of]
    # Kept, because several losses of one call may share what they were computed from.
    found = torch.autograd.grad(loss, of, allow_unused=True, materialize_grads=True, retain_graph=True)
    return list(found)


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors agree bit for bit, NaN with NaN and 0 with -0."""
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


def close(a: float, b: float, *, relative: float, absolute: float = 0.0) -> bool:
    """Whether two numbers agree; two NaN do, for what is not finite is another law's."""
    return (a != a and b != b) or a == b or abs(a - b) <= relative * max(abs(a), abs(b)) + absolute


def _eps(tensor: Tensor) -> float:
    return float(torch.finfo(tensor.dtype).eps)


def _number(loss: Tensor) -> float:
    return float(loss.detach())


def _all_terms(subject: Subject, rows: tuple[Tensor, ...], leave: tuple[str, ...] = ()) -> dict[str, Tensor]:
    losses: dict[str, Tensor] = {}
    for attribute, term in TERMS.items():
        if attribute not in leave and getattr(subject, attribute, None) is not None:
            losses.update(term(subject, *rows))
    return losses


def _rows(columns: Mapping[str, str] = ROWS, **keywords: Any) -> Callable[[Subject], Any]:
    return lambda subject: batches(subject.dtypes, columns, **keywords)


# --- 1, 2, 3, 21: finite and bounded -------------------------------------------------------------


def _is_finite(term: str, subject: Subject, case: Case) -> None:
    for name, loss in TERMS[term](subject, *on(subject, case, "P", "Q", "Y_n", "Y_d", "mask")).items():
        if not math.isfinite(_number(loss)):
            raise BrokenLawError(f"{name} is {_number(loss)}")


def _has_finite_gradients(term: str, subject: Subject, case: Case) -> None:
    P, Q = leaves(subject, case, "P", "Q")
    for name, loss in TERMS[term](subject, P, Q, *on(subject, case, "Y_n", "Y_d", "mask")).items():
        for member, gradient in zip("PQ", gradients_of(loss, P, Q), strict=True):
            if not gradient.isfinite().all():
                raise BrokenLawError(f"the gradient of {name} on {member} is {gradient.tolist()}")


def _within(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise BrokenLawError(f"{name} must be in [{low:g}, {high:g}], got {value:.9g}")


def _fit_is_bounded(subject: Subject, case: Case) -> None:
    loss = subject.fit_loss(*on(subject, case, "P", "Q", "Y_n", "Y_d"))
    _within("the fit", _number(loss), 0.0, 2.0)


def _implicit_is_bounded(subject: Subject, case: Case) -> None:
    for name, loss in TERMS["implicit_loss"](
        subject, *on(subject, case, "P", "Q", "Y_n", "Y_d", "mask")
    ).items():
        _within(name, _number(loss), 0.0, subject.implicit_bound * (1 + 1e-6))


def _sign_is_bounded(subject: Subject, case: Case) -> None:
    rows = on(subject, case, "P", "Q", "Y_n", "Y_d")
    for mask in (None, *on(subject, case, "mask")):
        loss = subject.sign_loss(*rows, case["gamma"], mask)
        _within("the sign loss", _number(loss), 0.0, 2.0 * (1 + 4 * _eps(loss)))


def _sign_has_finite_gradients(subject: Subject, case: Case) -> None:
    P, Q = leaves(subject, case, "P", "Q")
    loss = subject.sign_loss(P, Q, *on(subject, case, "Y_n", "Y_d"), case["gamma"], torch.ones_like(P) > 0)
    for member, gradient in zip("PQ", gradients_of(loss, P, Q), strict=True):
        if not gradient.isfinite().all():
            raise BrokenLawError(f"the gradient of the sign loss on {member} is {gradient.tolist()}")


def _coverage_terms_are_bounded(subject: Subject, case: Case) -> None:
    (Q,) = on(subject, case, "Q")
    for name in ("soft_coverage_loss", "ranked_coverage_loss"):
        loss = getattr(subject, name, None)
        if loss is not None:
            value = _number(loss(Q, case["tau"], case["temperature"], case["target"]))
            _within(name, value, 0.0, 1.0)


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
        a, b = _number(subject.fit_loss(*plain)), _number(subject.fit_loss(*scaled))
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
            _number(subject.implicit_loss(*(x[kept] for x in rows), 1e-9, False)) for rows in (plain, scaled)
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
                raise BrokenLawError(f"with {change} {name} is {_number(fit(*rows))}, not {_number(plain)}")


def _terms_ignore_the_order(subject: Subject, case: Case) -> None:
    rows = tuple(on(subject, case, "P", "Q", "Y_n", "Y_d", "mask"))
    order = reversed_rows(len(rows[0]), case["turn"])
    turned = _all_terms(subject, tuple(x[order] for x in rows))
    for name, loss in _all_terms(subject, rows).items():
        # Shortfalls of coverage are differences of sums: what rounds there is of order 1.
        tolerance = 32 * _eps(rows[1])
        if not close(_number(loss), _number(turned[name]), relative=tolerance, absolute=tolerance):
            raise BrokenLawError(
                f"{name} is {_number(turned[name]):.9g} in another order, not {_number(loss):.9g}"
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
            if not torch.allclose(plain[order], other, rtol=32 * _eps(P), atol=0.0, equal_nan=True):
                raise BrokenLawError(f"the gradient of {name} on {member} does not follow its rows")


def _means_ignore_repetition(subject: Subject, case: Case) -> None:
    rows = tuple(on(subject, case, "P", "Q", "Y_n", "Y_d", "mask"))
    twice = _all_terms(subject, tuple(torch.cat([x, x]) for x in rows))
    for name, loss in _all_terms(subject, rows).items():
        tolerance = 32 * _eps(rows[1])
        if not close(_number(loss), _number(twice[name]), relative=tolerance, absolute=tolerance):
            raise BrokenLawError(
                f"{name} of every row twice is {_number(twice[name]):.9g}, not {_number(loss):.9g}"
            )


def _multiples_of_the_target_cost_nothing(subject: Subject, case: Case) -> None:
    Y_n, Y_d = on(subject, case, "Y_n", "Y_d")
    s = 2.0 ** case["exponent"]
    kept = (Y_n * s / s == Y_n) & (Y_d * s / s == Y_d) & (Y_n * s).isfinite()
    Y_n, Y_d = Y_n[kept], Y_d[kept]
    if Y_n.numel():
        for name, fit in _fits(subject).items():
            value = _number(fit(Y_n * s, Y_d * s, Y_n, Y_d))
            if not abs(value) <= 16 * _eps(Y_n) ** 2:
                raise BrokenLawError(f"{name} of 2^{case['exponent']} times the target is {value}, not 0")


# --- 8, 9: a low loss means something ------------------------------------------------------------


def _low_fit_means_close(subject: Subject, case: Case) -> None:
    P, Q, Y_n, Y_d = on(subject, case, "P", "Q", "Y_n", "Y_d")
    for row in range(len(P)):
        p, q, y = (float(x[row]) for x in (P, Q, Y_n))
        if float(Y_d[row]) != 1.0 or q == 0.0 or not math.isfinite(p / q):
            continue
        loss = _number(subject.fit_loss(*(x[row : row + 1] for x in (P, Q, Y_n, Y_d))))
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
    before = _number(subject.fit_loss(*plain))
    origin = [torch.zeros_like(x) for x in plain[:2]]
    for what, rows in ((f"2^{case['exponent']} times (P, Q)", scaled), ("(0, 0)", [*origin, *plain[2:]])):
        after = _number(subject.fit_loss(*rows))
        if not after >= before * (1 - 1e-4) - 1e-9:
            raise BrokenLawError(f"{what} costs {after:.9g}, less than (P, Q) with {before:.9g}")


# --- 17, 18: coverage ----------------------------------------------------------------------------


def _coverage_is_the_share(subject: Subject, case: Case) -> None:
    (bottom,) = on(subject, case, "bottom")
    got = _number(subject.coverage(bottom))
    expected = 1.0 - float(bottom.double().mean())
    if not abs(got - expected) <= 1e-6:
        raise BrokenLawError(f"the coverage is {got}, the share of rows that are no bottoms {expected}")
    halves = [half for half in (bottom[: case["cut"]], bottom[case["cut"] :]) if half.numel()]
    merged = sum(_number(subject.coverage(half)) * half.numel() for half in halves) / bottom.numel()
    if not abs(got - merged) <= 1e-6:
        raise BrokenLawError(f"the coverage is {got}, of its parts, by their sizes, {merged}")


def _coverage_is_a_share(subject: Subject, case: Case) -> None:
    (bottom,) = on(subject, case, "bottom")
    _within("coverage", _number(subject.coverage(bottom)), 0.0, 1.0)


def _rejection_is_the_shortfall(subject: Subject, case: Case) -> None:
    (bottom,) = on(subject, case, "bottom")
    got = _number(subject.rejection_loss(bottom, case["target"]))
    share = 1.0 - (float(bottom.double().mean()) if bottom.numel() else 0.0)
    expected = max(case["target"] - share, 0.0) ** 2
    if not abs(got - expected) <= 1e-6:
        raise BrokenLawError(f"the rejection loss is {got}, the squared shortfall {expected}")


def _coverage_terms(subject: Subject) -> list[str]:
    names = ("soft_coverage_loss", "ranked_coverage_loss")
    return [name for name in names if getattr(subject, name, None) is not None]


def _coverage_terms_grow_with_tau(subject: Subject, case: Case) -> None:
    (Q,) = on(subject, case, "Q")
    for name in _coverage_terms(subject):
        loss = getattr(subject, name)
        low, high = (
            _number(loss(Q, case[tau], case["temperature"], case["target"])) for tau in ("tau", "tau_high")
        )
        if not low <= high + 16 * _eps(Q):
            raise BrokenLawError(f"{name} falls from {low:.9g} to {high:.9g} as tau grows")


def _coverage_terms_never_push_inward(subject: Subject, case: Case) -> None:
    (Q,) = leaves(subject, case, "Q")
    for name in _coverage_terms(subject):
        (slope,) = gradients_of(
            getattr(subject, name)(Q, case["tau"], case["temperature"], case["target"]), Q
        )
        inward = slope * torch.copysign(torch.ones_like(Q), Q).detach() > 0
        if bool(inward.any()):
            raise BrokenLawError(f"{name} pushes |Q| towards 0: gradient {slope.tolist()}")


def _coverage_terms_push_zeros_out(subject: Subject, case: Case) -> None:
    Q = torch.full((case["rows"],), case["zero"], dtype=case["like"].dtype, device=subject.device)
    Q.requires_grad_()
    for name in _coverage_terms(subject):
        (slope,) = gradients_of(getattr(subject, name)(Q, 0.1, 0.1, 0.95), Q)
        if not slope.abs().max() > 0:
            raise BrokenLawError(f"{name} leaves {case['zero']} where it is")


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
        raise BrokenLawError(
            f"it is {_number(loss):.9g} with and {_number(plain):.9g} without what is masked"
        )
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
        if not math.isfinite(_number(loss)) or not same(plain, loss):
            raise BrokenLawError(
                f"{name} is {_number(loss)} for {case['value']} in the other group, else {_number(plain)}"
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


# --- 32: gradient policies -----------------------------------------------------------------------


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


# --- the table -----------------------------------------------------------------------------------

_WORDS = st.sampled_from(["project", "clamp", "reject", "pass"])
_TURN = {"turn": st.integers(0, 5)}
_GAMMA = {"gamma": st.sampled_from([1e-9, 0.0])}
_SCALE = {"exponent": st.integers(-100, 100)}
_DOWN = {"exponent": st.integers(-100, -1)}
_SHARE = {"target": st.sampled_from([0.95, 0.5, 1.0, 0.0]) | st.floats(0, 1)}
_SHARES = {**_SHARE, "temperature": st.sampled_from([1e-2, 0.1, 1.0])}
_BAD = {"value": st.sampled_from([*NOT_FINITE])}


def _law(name: str, group: int, law: str, needs: Any, cases: Any, check: Any) -> Property:
    needs = (needs,) if isinstance(needs, str) else tuple(needs)
    return Property(name=name, group=group, law=law, of="library", needs=needs, cases=cases, check=check)


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
        _law(
            f"{term}_is_finite",
            1,
            f"For finite rows {words} is finite.",
            term,
            _rows(),
            partial(_is_finite, term),
        )
        for term, words in _TERM_WORDS.items()
        if term != "sign_loss"
    ),
    *(
        _law(
            f"{term}_has_finite_gradients",
            2,
            f"For finite rows {words} has finite gradients.",
            term,
            _rows(),
            partial(_has_finite_gradients, term),
        )
        for term, words in _TERM_WORDS.items()
        if term != "sign_loss"
    ),
    _law(
        "fit_loss_is_bounded",
        3,
        "For finite rows the fit is in [0, 2].",
        "fit_loss",
        _rows(),
        _fit_is_bounded,
    ),
    _law(
        "implicit_loss_is_bounded",
        3,
        "For finite rows the implicit loss is in [0, its stated bound].",
        ("implicit_loss", "implicit_bound"),
        _rows(),
        _implicit_is_bounded,
    ),
    _law(
        "fit_loss_ignores_the_scale",
        4,
        "(P, Q) and s(P, Q) have the same fit, wherever s(P, Q) is representable.",
        "fit_loss",
        _rows(plain=_SCALE),
        _fit_ignores_the_scale,
    ),
    _law(
        "implicit_loss_ignores_the_scale_far_from_gamma",
        4,
        "(P, Q) and s(P, Q) have the same implicit loss where gamma is negligible beside its denominator.",
        "implicit_loss",
        lambda subject: batches(subject.dtypes, ORDINARY, plain={"exponent": st.integers(-10, 10)}),
        _implicit_ignores_the_scale_far_from_gamma,
    ),
    _law(
        "fit_losses_know_no_sign",
        5,
        "Fits of (-P, -Q), and of (-P, Q) to (-Y_n, Y_d), are those of (P, Q) to (Y_n, Y_d), bit for bit.",
        "fit_loss",
        _rows(),
        _fits_know_no_sign,
    ),
    _law(
        "losses_ignore_the_order",
        6,
        "No loss depends on the order of rows.",
        "fit_loss",
        _rows(plain=_TURN),
        _terms_ignore_the_order,
    ),
    _law(
        "gradients_follow_their_rows",
        6,
        "In another order every row keeps its gradient.",
        "fit_loss",
        _rows(plain=_TURN),
        _gradients_follow_their_rows,
    ),
    _law(
        "losses_ignore_repetition",
        6,
        "A batch with every row twice costs what the batch does.",
        "fit_loss",
        _rows(ORDINARY),
        _means_ignore_repetition,
    ),
    _law(
        "multiples_of_the_target_cost_nothing",
        7,
        "Every positive multiple of the target has a fit of 0.",
        "fit_loss",
        lambda subject: batches(
            subject.dtypes, {"Y_n,Y_d": "ordinary target"}, plain={"exponent": st.integers(-10, 10)}
        ),
        _multiples_of_the_target_cost_nothing,
    ),
    _law(
        "low_fit_means_close",
        8,
        "A fit below 1e-8 means that the decoded answer is as close to the target as the angle says.",
        "fit_loss",
        _rows(),
        _low_fit_means_close,
    ),
    _law(
        "origin_is_not_rewarded",
        9,
        "Shrinking (P, Q) towards (0, 0), and (0, 0) itself, never lowers the fit.",
        "fit_loss",
        _rows(plain=_DOWN),
        _origin_is_not_rewarded,
    ),
    _law(
        "coverage_is_the_share_of_answers",
        17,
        "Coverage is 1 - mean(bottom), and that of merged batches the mean of theirs, weighted by rows.",
        "coverage",
        lambda subject: batches(subject.dtypes, {"bottom": "flag"}, plain={"cut": st.integers(0, 6)}),
        _coverage_is_the_share,
    ),
    _law(
        "coverage_is_in_range_for_any_batch",
        17,
        "Coverage is in [0, 1], for an empty batch too.",
        "coverage",
        lambda subject: batches(subject.dtypes, {"bottom": "flag"}, least=0),
        _coverage_is_a_share,
    ),
    _law(
        "rejection_is_the_squared_shortfall",
        17,
        "The rejection loss is relu(target - coverage)^2, for an empty batch too.",
        "rejection_loss",
        lambda subject: batches(subject.dtypes, {"bottom": "flag"}, plain=_SHARE, least=0),
        _rejection_is_the_shortfall,
    ),
    _law(
        "coverage_terms_are_bounded",
        18,
        "Soft and ranked coverage losses of finite rows are in [0, 1].",
        "soft_coverage_loss",
        _rows({"Q": "finite"}, near=("tau",), plain=_SHARES),
        _coverage_terms_are_bounded,
    ),
    _law(
        "coverage_terms_grow_with_tau",
        18,
        "A larger threshold never lowers a coverage loss.",
        "soft_coverage_loss",
        _rows({"Q": "finite"}, near=("tau", "tau_high"), plain=_SHARES),
        _coverage_terms_grow_with_tau,
    ),
    _law(
        "coverage_terms_never_push_inward",
        18,
        "The gradient of a coverage loss never pushes |Q| towards 0.",
        "soft_coverage_loss",
        _rows({"Q": "finite"}, near=("tau",), plain=_SHARES),
        _coverage_terms_never_push_inward,
    ),
    _law(
        "coverage_terms_push_zeros_out",
        18,
        "Where coverage is missing, the gradient of a coverage loss moves an exact zero.",
        "soft_coverage_loss",
        lambda subject: batches(
            subject.dtypes,
            {"like": "ordinary"},
            plain={"rows": st.integers(1, 4), "zero": st.sampled_from([0.0, -0.0])},
            most=1,
        ),
        _coverage_terms_push_zeros_out,
    ),
    *(
        _law(
            f"{term}_leaks_no_masked_row",
            19,
            f"Whatever a masked row holds, {words} and all gradients are as if it held 1, and its own are 0.",
            term,
            _rows({**ROWS, "bad": "bad"}),
            partial(_masked_rows_leak_nothing, term),
        )
        for term, words in (
            ("margin_loss", "the margin loss"),
            ("sign_loss", "the sign loss"),
            ("masked_fit_loss", "the fit"),
        )
    ),
    _law(
        "separation_keeps_groups_apart",
        20,
        "What one group holds changes neither loss nor gradient of the other.",
        "separation_losses",
        _separated,
        _groups_are_kept_apart,
    ),
    _law(
        "a_bad_row_stays_alone",
        20,
        "A row that is not finite changes no other row's gradient, of any loss that is a mean of rows.",
        "fit_loss",
        _rows(plain={**_TURN, **_BAD}),
        _a_bad_row_stays_alone,
    ),
    _law(
        "sign_loss_is_bounded",
        21,
        "For finite rows the sign loss is in [0, 2], with gamma = 0 too.",
        "sign_loss",
        _rows(plain=_GAMMA),
        _sign_is_bounded,
    ),
    _law(
        "sign_loss_has_finite_gradients",
        21,
        "For finite rows the sign loss has finite gradients, with gamma = 0 too.",
        "sign_loss",
        _rows(plain=_GAMMA),
        _sign_has_finite_gradients,
    ),
    _law(
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
    _law(
        "policies_reach_tuples",
        32,
        "Under a policy the gradients on P and Q of a fit are what the policy makes of them.",
        ("policy", "fit_loss"),
        lambda subject: batches(subject.dtypes, ORDINARY, near=("tau",), plain={"policy": _WORDS}),
        _policies_reach_tuples,
    ),
]
