"""The separation terms: denominators of bottoms go down, those of finite rows go up."""

from __future__ import annotations

from torch import Tensor

from scm.autodiff.policies import gate_denominator
from scm.losses.margin import above_kernel, below_kernel
from scm.losses.rowwise import bool_mask, check_at_least_zero, reduce_rows, rows_that_count, weights_of_rows


def scm_separation_losses(
    Q: Tensor,
    *,
    mask_censored: Tensor,
    tau_bot: float | Tensor = 1e-2,
    tau_finite: float | Tensor = 5e-2,
    mask_finite: Tensor | None = None,
    row_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (push_down, push_up): the means of ``relu(|Q| - tau_bot)^2`` and ``relu(tau_finite - |Q|)^2``.

    mask_censored: rows of the first mean; mask_finite: rows of the second, all others by default. Both
    expand to Q. row_weights: (rows,), the means are weighted by them. A group without rows
    costs 0. tau_finite >= tau_bot >= 0 (ValueError).

    Differs from zeroproofml 0.6.1: a value that is not finite in one group reaches neither the other group's
    loss nor any other row's gradient; rows that mask_finite names are pushed out of an exact zero.
    """
    check_thresholds(tau_bot, tau_finite)
    down = bool_mask("mask_censored", mask_censored, Q)
    up = ~down if mask_finite is None else bool_mask("mask_finite", mask_finite, Q)
    Q = gate_denominator(Q)
    weights = weights_of_rows(row_weights, Q)
    zeros_leave = mask_finite is not None
    return (
        reduce_rows(above_kernel, Q, tau_bot, rows_that_count(down, weights), True, weights),
        reduce_rows(below_kernel, Q, tau_finite, rows_that_count(up, weights), True, zeros_leave, weights),
    )


def check_thresholds(tau_bot: float | Tensor, tau_finite: float | Tensor) -> None:
    """Raise ValueError unless 0 <= tau_bot <= tau_finite, as far as both are plain numbers."""
    check_at_least_zero("tau_bot", tau_bot)
    check_at_least_zero("tau_finite", tau_finite)
    if not isinstance(tau_bot, Tensor) and not isinstance(tau_finite, Tensor) and tau_finite < tau_bot:
        raise ValueError(f"tau_finite must be >= tau_bot, got {tau_finite=}, {tau_bot=}")
