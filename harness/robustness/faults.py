"""What may be done to a training, how strongly and how long: one table, read by the matrix, the command line
and the docs. What each of them does is in `trainables.faulty`; what becomes of it, in `matrix`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from harness.errors import UserError, nearest

SEVERITIES = ("low", "middle", "high")
MIDDLE_THIRD = (1 / 3, 2 / 3)

How = Literal["rows", "batches", "outputs", "rate", "threshold", "worker"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One thing that goes wrong in a training.

    summary: what happens. severities: its strength, by name, mildest first; strength: what that number is.
    window: the share of the epochs after which it begins, and after which it ends; None: it lasts from the
    first epoch to the last, and nothing can recover from it. how: rows and batches by the function `does` of
    `trainables.faulty`; outputs by the mark `does` on a tenth of the batches; the others by the matrix.
    """

    name: str
    summary: str
    how: How
    strength: str
    severities: Mapping[str, float]
    window: tuple[float, float] | None = MIDDLE_THIRD
    does: str = ""

    @property
    def span(self) -> str:
        """ "window" for a fault that ends before the training does, else "whole"."""
        return "whole" if self.window is None else "window"

    def epochs(self, max_epochs: int) -> tuple[int, int] | None:
        """The epochs [first, last) of its window, from 0; None for a whole one.

        >>> FAULTS["poisoned_batches"].epochs(20)
        (6, 13)
        """
        if self.window is None:
            return None
        first = min(int(max_epochs * self.window[0]), max_epochs - 1)
        return first, max(first + 1, int(max_epochs * self.window[1]))


def _levels(low: float, middle: float, high: float) -> dict[str, float]:
    return dict(zip(SEVERITIES, (low, middle, high), strict=True))


_TABLE = (
    Fault(
        name="nonfinite_inputs",
        summary="the inputs of some rows are NaN or infinite",
        how="rows",
        does="spoil_inputs",
        strength="share of the rows",
        severities=_levels(0.002, 0.01, 0.05),
    ),
    Fault(
        name="nonfinite_labels",
        summary="the labels of some finite rows are NaN or infinite, and pass for finite",
        how="rows",
        does="spoil_labels",
        strength="share of the finite rows",
        severities=_levels(0.002, 0.01, 0.05),
    ),
    Fault(
        name="poisoned_batches",
        summary="some batches hold a row with inputs that are NaN or infinite",
        how="batches",
        does="poison_batches",
        strength="share of the window's batches",
        severities=_levels(0.03, 0.1, 0.3),
    ),
    Fault(
        name="outlier_inputs",
        summary="the inputs of 2 % of the rows lie far away",
        how="rows",
        does="outlie_inputs",
        strength="deviations",
        severities=_levels(10, 100, 10_000),
        window=None,
    ),
    Fault(
        name="outlier_labels",
        summary="the labels of 2 % of the finite rows lie far away",
        how="rows",
        does="outlie_labels",
        strength="deviations",
        severities=_levels(10, 100, 10_000),
        window=None,
    ),
    Fault(
        name="label_flips",
        summary="some finite rows pass for bottoms, and as many bottoms, in proportion, for finite rows",
        how="rows",
        does="flip_labels",
        strength="share of the rows of each kind",
        severities=_levels(0.02, 0.1, 0.3),
        window=None,
    ),
    Fault(
        name="wrong_status",
        summary="some rows have a wrong status: missing, fault, or the other direction of censoring",
        how="rows",
        does="mistake_status",
        strength="share of the rows",
        severities=_levels(0.02, 0.1, 0.3),
        window=None,
    ),
    Fault(
        name="extreme_logits",
        summary="P and Q are huge in a tenth of the window's batches, at last infinite",
        how="outputs",
        does="scale",
        strength="power of the largest number, in %",
        severities=_levels(30, 60, 105),
    ),
    Fault(
        name="gradient_spikes",
        summary="the gradient of P and Q is many times larger in a tenth of the window's batches",
        how="outputs",
        does="gradient",
        strength="power of 2",
        severities=_levels(3, 10, 20),
    ),
    Fault(
        name="half_overflow",
        summary="P and Q go through float16 in a tenth of the window's batches, scaled up",
        how="outputs",
        does="half",
        strength="power of 2",
        severities=_levels(10, 16, 22),
    ),
    Fault(
        name="rate_spikes",
        summary="the learning rate is many times larger for a fifteenth of the epochs",
        how="rate",
        strength="factor",
        severities=_levels(10, 100, 1000),
        window=(1 / 3, 0.4),
    ),
    Fault(
        name="tau_mismatch",
        summary="answers are decoded at a tau_infer above the thresholds of the training",
        how="threshold",
        strength="share of the way to 1",
        severities=_levels(0.25, 0.5, 0.9),
        window=None,
    ),
    Fault(
        name="duplicated_batches",
        summary="some batches are the one before once more, and their own rows are not seen",
        how="batches",
        does="duplicate_batches",
        strength="share of the window's batches",
        severities=_levels(0.1, 0.3, 1.0),
    ),
    Fault(
        name="reordered_batches",
        summary="the rows of some batches come sorted by label, bottoms last, instead of shuffled",
        how="batches",
        does="sort_batches",
        strength="share of the window's batches",
        severities=_levels(0.1, 0.3, 1.0),
    ),
    Fault(
        name="killed_worker",
        summary="the process is killed in mid-epoch, and the trial goes on from what was saved",
        how="worker",
        strength="whole epochs lost besides",
        severities=_levels(0, 2, 4),
        window=None,
    ),
)

FAULTS: dict[str, Fault] = {fault.name: fault for fault in _TABLE}
SHARE_OF_MARKED_BATCHES = 0.1


def parse_faults(text: str) -> list[Fault]:
    """The faults that a text asks for, in the order of the table, each with the severities asked for.

    "all", "none", or names with commas; "name:severity" and "all:severity" ask for that severity alone.
    Raises UserError for a name or a severity that there is not.

    >>> [(fault.name, list(fault.severities)) for fault in parse_faults("rate_spikes:high,rate_spikes:low")]
    [('rate_spikes', ['low', 'high'])]
    """
    asked: dict[str, set[str]] = {}
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise UserError(f"faults must be all, none, or names of {', '.join(FAULTS)}, got {text!r}")
    if "none" in words:
        if len(words) > 1:
            raise UserError(f"faults must be none alone, or faults, got {text!r}")
        return []
    for word in words:
        name, colon, severity = word.partition(":")
        if name != "all" and name not in FAULTS:
            known = ["all", "none", *FAULTS]
            raise UserError(f"unknown fault {name!r}{nearest(name, known)} (known: {', '.join(known)})")
        if colon and severity not in SEVERITIES:
            raise UserError(
                f"unknown severity {severity!r} of {name}{nearest(severity, SEVERITIES)} "
                f"(known: {', '.join(SEVERITIES)})"
            )
        for each in FAULTS if name == "all" else (name,):
            asked.setdefault(each, set()).update((severity,) if colon else SEVERITIES)
    return [
        replace(
            fault, severities={level: fault.severities[level] for level in SEVERITIES if level in asked[name]}
        )
        for name, fault in FAULTS.items()
        if name in asked
    ]
