"""Parts of a library with a bug in each, which the laws of `harness.robustness.properties` must find."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from trainables.subject import LibrarySubject, own_subject

own: Any = own_subject()


class Plant(NamedTuple):
    """Which part is replaced, by what, and the laws that must see it."""

    part: str
    bug: Any
    laws: tuple[str, ...]


# --- losses -----------------------------------------------------------------------------------------


def divides(P: Tensor, Q: Tensor, Y_n: Tensor, Y_d: Tensor) -> Tensor:
    return ((P / Q - Y_n / Y_d) ** 2).mean()


def divides_under_a_mask(P: Tensor, Q: Tensor, Y_n: Tensor, Y_d: Tensor, mask: Tensor) -> Tensor:
    return ((P / Q - Y_n / Y_d) ** 2 * mask).mean()


def first_row(P: Tensor, Q: Tensor, Y_n: Tensor, Y_d: Tensor) -> Tensor:
    return own.fit_loss(P[:1], Q[:1], Y_n[:1], Y_d[:1])


def nothing(P: Tensor, Q: Tensor, Y_n: Tensor, Y_d: Tensor) -> Tensor:
    return 0 * own.fit_loss(P, Q, Y_n, Y_d)


def summed(P: Tensor, Q: Tensor, Y_n: Tensor, Y_d: Tensor) -> Tensor:
    return own.fit_loss(P, Q, Y_n, Y_d) * len(P)


def offset(P: Tensor, Q: Tensor, Y_n: Tensor, Y_d: Tensor) -> Tensor:
    return own.fit_loss(P, Q, Y_n, Y_d) + 0.1


def rewards_the_origin(P: Tensor, Q: Tensor, Y_n: Tensor, Y_d: Tensor) -> Tensor:
    return own.fit_loss(P, Q, Y_n, Y_d) * (P * P + Q * Q).mean().clamp(max=1)


def drops_a_sign(P: Tensor, Q: Tensor, Y_n: Tensor, Y_d: Tensor) -> Tensor:
    return own.fit_loss(P, Q.abs(), Y_n, Y_d)


def squares(P: Tensor, Q: Tensor, Y_n: Tensor, Y_d: Tensor, gamma: float, detach_scale: bool) -> Tensor:
    scale = Q**2 * Y_d**2 + P**2 * Y_n**2 + gamma
    return ((P * Y_d - Q * Y_n) ** 2 / (scale.detach() if detach_scale else scale)).mean()


def large_gamma(P: Tensor, Q: Tensor, Y_n: Tensor, Y_d: Tensor, gamma: float, detach_scale: bool) -> Tensor:
    return own.implicit_loss(P, Q, Y_n, Y_d, 0.1, detach_scale)


def leaks_into_the_mean(P: Tensor, Q: Tensor, Y_n: Tensor, Y_d: Tensor, mask: Tensor) -> Tensor:
    return own.fit_loss(P * mask, Q * mask, Y_n, Y_d)


def masks_by_multiplication(Q: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    return (Q.abs() * mask).sum(), (torch.relu(0.5 - Q.abs()) * ~mask).sum()


def separates_by_dividing(Q: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    return torch.where(mask, 1 / Q.abs(), 0.0).sum(), torch.where(mask, 0.0, 1 / Q.abs()).sum()


def naive_cosine(
    P: Tensor, Q: Tensor, Y_n: Tensor, Y_d: Tensor, gamma: float = 1e-9, mask: Tensor | None = None
) -> Tensor:
    lengths = (P * P + Q * Q + gamma).rsqrt() * (Y_n * Y_n + Y_d * Y_d + gamma).rsqrt()
    return ((1 - (P * Y_n + Q * Y_d) * lengths) * (1 if mask is None else mask)).mean()


def margin_by_multiplication(Q: Tensor, tau: float, mask: Tensor, reduction: str) -> Tensor:
    rows = torch.relu(tau - Q.abs()) ** 2 * mask
    return rows.mean() if reduction == "population" else rows.sum() / mask.sum().clamp_min(1)


def margin_by_division(Q: Tensor, tau: float, mask: Tensor, reduction: str) -> Tensor:
    return torch.where(mask, torch.relu(tau / Q.abs() - 1.0), 0.0).mean()


def by_roots(Q: Tensor, tau: float, temperature: float, target: float) -> Tensor:
    return torch.relu(target - torch.sigmoid(((Q * Q).sqrt() - tau) / temperature).mean()) ** 2


def grows_with_q(Q: Tensor, tau: float, temperature: float, target: float) -> Tensor:
    return own.soft_coverage_loss(Q, tau, temperature, target) + (Q.abs() ** 2).mean()


def pushes_inward(Q: Tensor, tau: float, temperature: float, target: float) -> Tensor:
    return -own.soft_coverage_loss(Q, tau, temperature, target)


def weighs_by_size(Q: Tensor, tau: float, temperature: float, target: float) -> Tensor:
    reached = torch.sigmoid((Q.abs() - tau) / temperature).mean()
    return torch.relu(target - reached) ** 2 * (1 + Q.abs().mean())


def ranks_by_division(Q: Tensor, tau: float, margin: float, target: float) -> Tensor:
    return torch.relu(tau / Q.abs() - 1.0).mean() * target


def trains_by_dividing(P: Tensor, Q: Tensor, Y_n: Tensor, Y_d: Tensor, mask: Tensor) -> Tensor:
    return divides_under_a_mask(P, Q, Y_n, Y_d, mask)


# --- decoding ----------------------------------------------------------------------------------------


def altered(found: Any, **masks: Any) -> SimpleNamespace:
    names = ("decoded", "bottom_mask", "gap_mask", "fault_mask", "semantic_bottom_mask")
    return SimpleNamespace(**{name: masks.get(name, getattr(found, name)) for name in names})


def accepts_all(P: Any, Q: Any, tau: float, tau_train: float | None = None) -> Any:
    found = own.decode(P, Q, tau, tau_train)
    none = found.bottom_mask & False
    answers = (torch.as_tensor(P) / torch.as_tensor(Q)) if isinstance(P, Tensor) else found.decoded
    return altered(
        found, decoded=answers, bottom_mask=none, gap_mask=none, fault_mask=none, semantic_bottom_mask=none
    )


def rejects_the_threshold(P: Any, Q: Any, tau: float, tau_train: float | None = None) -> Any:
    found, wrong = own.decode(P, Q, tau, tau_train), abs(Q) <= tau
    return altered(
        found,
        bottom_mask=found.bottom_mask | wrong,
        semantic_bottom_mask=found.semantic_bottom_mask | wrong,
    )


def rejects_negative(P: Any, Q: Any, tau: float, tau_train: float | None = None) -> Any:
    found, wrong = own.decode(P, Q, tau, tau_train), Q < 0
    return altered(
        found,
        bottom_mask=found.bottom_mask | wrong,
        gap_mask=found.gap_mask & ~wrong,
        semantic_bottom_mask=found.semantic_bottom_mask | wrong,
    )


def asks_the_batch(P: Any, Q: Any, tau: float, tau_train: float | None = None) -> Any:
    many = len(Q) > 1 if Q.ndim else False
    return own.decode(P, Q, 2 * tau if many else tau, tau_train)


def gap_without_bottoms_out(P: Any, Q: Any, tau: float, tau_train: float | None = None) -> Any:
    return altered(own.decode(P, Q, tau, tau_train), gap_mask=abs(Q) < (tau_train or 0.0))


def divides_before_it_masks(P: Any, Q: Any, tau: float, tau_train: float | None = None) -> Any:
    found = own.decode(P, Q, tau, tau_train)
    if not isinstance(P, Tensor):
        return found
    return altered(found, decoded=torch.where(found.bottom_mask, math.nan, P / Q))


def other_for_arrays(P: Any, Q: Any, tau: float, tau_train: float | None = None) -> Any:
    return own.decode(P, Q, tau if isinstance(P, Tensor) else 2 * tau, tau_train)


def falls_with_tau(P: Any, Q: Any, tau: float, tau_train: float | None = None) -> Any:
    return own.decode(P, Q, min(1e-3, 1e-6 / tau), tau_train)


def sweep_backwards(q_abs: Tensor, in_range: Tensor, taus: Any) -> Any:
    return {name: list(held)[::-1] for name, held in own.sweep(q_abs, in_range, taus).items()}


def sweep_by_comparison(q_abs: Tensor, in_range: Tensor, taus: Any) -> Any:
    rate = [float((q_abs < tau).double().mean()) for tau in taus]
    return {**own.sweep(q_abs, in_range, taus), "bottom_rate": rate}


def share_of_one_less(bottom: Tensor) -> Tensor:
    return 1 - bottom.double().sum() / (len(bottom) - 1)


def two_sided(bottom: Tensor, target: float) -> Tensor:
    return (target - own.coverage(bottom)) ** 2


# --- targets, layers, policies ---------------------------------------------------------------------------


def lifts_plainly(values: Any) -> Any:
    return values, torch.ones_like(values) if isinstance(values, Tensor) else values == values


def lifts_sizes(values: Any) -> Any:
    Y_n, Y_d = own.lift(values)
    return abs(Y_n), Y_d


def lifts_arrays_otherwise(values: Any) -> Any:
    Y_n, Y_d = own.lift(values)
    return (Y_n, Y_d) if isinstance(values, Tensor) else (Y_n, Y_d * 2)


def misses_nothing(values: Any, words: Any) -> Any:
    return own.lift_words(values, ["finite" if word == "missing" else word for word in words])


class Around(nn.Module):
    """A module of the library with something done to what it gives."""

    def __init__(self, inner: nn.Module, how: Callable[..., Any]) -> None:
        super().__init__()
        self.inner, self.how = inner, how

    def forward(self, x: Tensor) -> Any:
        return self.how(x, *self.inner(x))


def around(make: Callable[..., nn.Module], how: Callable[..., Any]) -> Callable[..., nn.Module]:
    return lambda *given, **named: Around(make(*given, **named), how)


PLANTS: dict[str, Plant] = {
    "divides": Plant(
        "fit_loss",
        divides,
        (
            "fit_loss_is_finite",
            "fit_loss_has_finite_gradients",
            "fit_loss_is_bounded",
            "multiples_of_the_target_cost_nothing",
        ),
    ),
    "first_row": Plant("fit_loss", first_row, ("losses_ignore_the_order", "gradients_follow_their_rows")),
    "nothing": Plant("fit_loss", nothing, ("low_fit_means_close",)),
    "summed": Plant("fit_loss", summed, ("losses_ignore_repetition",)),
    "offset": Plant("fit_loss", offset, ("multiples_of_the_target_cost_nothing",)),
    "rewards_the_origin": Plant(
        "fit_loss",
        rewards_the_origin,
        ("fit_loss_ignores_the_scale", "origin_is_not_rewarded", "a_bad_row_stays_alone"),
    ),
    "drops_a_sign": Plant("fit_loss", drops_a_sign, ("fit_losses_know_no_sign",)),
    "squares": Plant(
        "implicit_loss",
        squares,
        ("implicit_loss_is_finite", "implicit_loss_has_finite_gradients", "implicit_loss_is_bounded"),
    ),
    "large_gamma": Plant("implicit_loss", large_gamma, ("implicit_loss_ignores_the_scale_far_from_gamma",)),
    "leaks_into_the_mean": Plant(
        "masked_fit_loss", leaks_into_the_mean, ("masked_fit_loss_leaks_no_masked_row",)
    ),
    "masks_by_multiplication": Plant(
        "separation_losses", masks_by_multiplication, ("separation_keeps_groups_apart",)
    ),
    "separates_by_dividing": Plant(
        "separation_losses",
        separates_by_dividing,
        ("separation_losses_is_finite", "separation_losses_has_finite_gradients"),
    ),
    "naive_cosine": Plant(
        "sign_loss",
        naive_cosine,
        ("sign_loss_is_bounded", "sign_loss_has_finite_gradients", "sign_loss_leaks_no_masked_row"),
    ),
    "margin_by_multiplication": Plant(
        "margin_loss", margin_by_multiplication, ("margin_loss_leaks_no_masked_row",)
    ),
    "margin_by_division": Plant(
        "margin_loss", margin_by_division, ("margin_loss_is_finite", "margin_loss_has_finite_gradients")
    ),
    "by_roots": Plant("soft_coverage_loss", by_roots, ("soft_coverage_loss_has_finite_gradients",)),
    "grows_with_q": Plant(
        "soft_coverage_loss",
        grows_with_q,
        ("soft_coverage_loss_is_finite", "coverage_terms_are_bounded", "coverage_terms_never_push_inward"),
    ),
    "pushes_inward": Plant(
        "soft_coverage_loss",
        pushes_inward,
        ("coverage_terms_grow_with_tau", "coverage_terms_never_push_inward"),
    ),
    "weighs_by_size": Plant("soft_coverage_loss", weighs_by_size, ("coverage_terms_push_zeros_out",)),
    "ranks_by_division": Plant(
        "ranked_coverage_loss",
        ranks_by_division,
        ("ranked_coverage_loss_is_finite", "ranked_coverage_loss_has_finite_gradients"),
    ),
    "trains_by_dividing": Plant(
        "training_loss",
        trains_by_dividing,
        ("training_loss_is_finite", "training_loss_has_finite_gradients"),
    ),
    "accepts_all": Plant("decode", accepts_all, ("accepted_answers_are_finite",)),
    "rejects_the_threshold": Plant("decode", rejects_the_threshold, ("bottom_is_where_the_rule_says",)),
    "rejects_negative": Plant("decode", rejects_negative, ("decoding_knows_signs",)),
    "asks_the_batch": Plant("decode", asks_the_batch, ("rows_are_decided_alone",)),
    "gap_without_bottoms_out": Plant("decode", gap_without_bottoms_out, ("masks_partition_the_batch",)),
    "divides_before_it_masks": Plant("decode", divides_before_it_masks, ("bottoms_have_no_gradient",)),
    "other_for_arrays": Plant("decode", other_for_arrays, ("arrays_decode_as_tensors_do",)),
    "falls_with_tau": Plant("decode", falls_with_tau, ("bottoms_grow_with_tau",)),
    "ungauged": Plant("answer", own.decode, ("answers_ignore_the_scale",)),
    "sweep_backwards": Plant(
        "sweep", sweep_backwards, ("sweep_is_monotone", "sweep_counts_what_decoding_rejects")
    ),
    "sweep_by_comparison": Plant("sweep", sweep_by_comparison, ("sweep_rejects_what_is_not_finite",)),
    "share_of_one_less": Plant(
        "coverage",
        share_of_one_less,
        ("coverage_is_the_share_of_answers", "coverage_is_in_range_for_any_batch"),
    ),
    "two_sided": Plant("rejection_loss", two_sided, ("rejection_is_the_squared_shortfall",)),
    "lifts_plainly": Plant("lift", lifts_plainly, ("lifting_is_total", "lifting_can_be_undone")),
    "lifts_sizes": Plant("lift", lifts_sizes, ("lifting_is_odd",)),
    "lifts_arrays_otherwise": Plant("lift", lifts_arrays_otherwise, ("arrays_lift_as_tensors_do",)),
    "misses_nothing": Plant("lift_words", misses_nothing, ("words_say_what_a_row_is", "payloads_never_show")),
    "no_bottoms": Plant(
        "rational_layer",
        around(own.rational_layer, lambda x, y, bottom: (y, bottom & False)),
        ("rational_layer_is_finite_or_bottom",),
    ),
    "slope_of_nan": Plant(
        "rational_layer",
        around(own.rational_layer, lambda x, y, bottom: (y.nan_to_num(0.0) * (x / x), bottom)),
        ("rational_layer_has_finite_gradients",),
    ),
    "one_output": Plant(
        "multi_head",
        around(own.multi_head, lambda x, P, Q, *more: (P[..., :1], Q * 0)),
        ("multi_head_has_its_shapes", "unreachable_bottoms_are_not_reached"),
    ),
    "off_the_circle": Plant(
        "angular_head",
        around(own.angular_head, lambda x, P, Q, *more: (2 * P, 2 * Q)),
        ("angular_head_is_on_the_circle",),
    ),
    "norm_without_bottoms": Plant(
        "norm",
        around(own.norm, lambda x, y, bottom: (y, bottom & False)),
        ("norm_is_finite_or_bottom",),
    ),
    "sums_to_two": Plant(
        "softmax",
        around(own.softmax, lambda x, y, bottom: (2 * y, bottom)),
        ("softmax_is_a_distribution_or_bottom",),
    ),
    "passes_all": Plant(
        "apply_policy", lambda gradient, bottom, word: gradient, ("policies_treat_gradients",)
    ),
    "one_policy": Plant("policy", lambda word, tau: own.policy("pass", tau), ("policies_reach_tuples",)),
}


def planted(name: str) -> LibrarySubject:
    """Our own library with one of its parts replaced by a broken one."""
    from dataclasses import replace

    found: LibrarySubject = replace(own, **{PLANTS[name].part: PLANTS[name].bug})
    return found
