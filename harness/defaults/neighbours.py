"""The neighbours of a config: what it becomes when one knob is one step, or one option, away.

Thresholds move by a factor of three, other numbers on a scale of ratios by two, numbers on a plain scale by a
tenth of their range (whole numbers by at least one), and a choice takes each of its other options (the next
smaller and larger one where they are numbers). Only knobs that act in the config move, and only those that
the run's space varies, and the thresholds. A step stays within the space's bounds and its orders.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from harness.defaults.decide import OPTION, STEP
from search_spaces.domains import Choice, Domain, Float, Int, same_value
from search_spaces.named import SPACES
from search_spaces.space import Space
from trainables.configs import resolve_and_activate

THRESHOLDS = ("tau_infer", "tau_train_min", "tau_train_max")
THRESHOLD_FACTOR = 3.0
FACTOR = 2.0
SHARE_OF_RANGE = 0.1
# These every training asks for, also where the thresholds are not in the run's space.
_ORDERS = SPACES["default"].constraints
MOST = 96
"""Neighbours that are tried of one config; thresholds first, then the other steps, then options."""


@dataclass(frozen=True, slots=True)
class Neighbour:
    """A config that differs from another in one knob. kind: "step" or "option"."""

    knob: str
    kind: str
    before: Any
    after: Any
    config: Mapping[str, Any]


def find_neighbours(
    config: Mapping[str, Any], space: Space, *, most: int = MOST
) -> tuple[list[Neighbour], int]:
    """The neighbours of a full config, and how many more there would be beyond `most`.

    A step that its bound or the order with another knob holds back is shorter; one that is held where it is,
    or that no training accepts, is no neighbour. No two train the same.
    """
    _, own = resolve_and_activate(config)
    seen = [own]
    found: list[Neighbour] = []
    for knob, kind, value in sorted(_moves(config, own, space), key=_priority):
        try:
            full, active = resolve_and_activate({**config, knob: value})
        except (ValueError, TypeError):  # nesterov without momentum, and what else no training accepts
            continue
        if active in seen:
            continue
        seen.append(active)
        found.append(Neighbour(knob, kind, config[knob], value, full))
    return found[:most], max(len(found) - most, 0)


def _priority(move: tuple[str, str, Any]) -> int:
    knob, kind, _ = move
    return 0 if knob in THRESHOLDS else 1 if kind == STEP else 2


def _moves(
    config: Mapping[str, Any], active: Mapping[str, Any], space: Space
) -> Iterator[tuple[str, str, Any]]:
    for knob in dict.fromkeys([*THRESHOLDS, *space.domains]):
        if knob not in active:
            continue
        domain = space.domains.get(knob)
        value = config[knob]
        if knob in THRESHOLDS:
            steps = [value / THRESHOLD_FACTOR, value * THRESHOLD_FACTOR]
            yield from ((knob, STEP, step) for step in _within(knob, value, steps, config, space))
        elif isinstance(domain, Choice):
            yield from _options(knob, value, domain)
        elif isinstance(domain, Float | Int) and _is_number(value):
            steps = _steps(value, domain)
            yield from ((knob, STEP, step) for step in _within(knob, value, steps, config, space))


def _options(knob: str, value: Any, domain: Choice) -> Iterator[tuple[str, str, Any]]:
    numbers: list[Any] = (
        [option for option in domain.options if _is_number(option)] if _is_number(value) else []
    )
    smaller = [number for number in numbers if number < value]
    larger = [number for number in numbers if number > value]
    yield from ((knob, STEP, number) for number in (*sorted(smaller)[-1:], *sorted(larger)[:1]))
    others = [option for option in domain.options if option not in numbers]
    yield from ((knob, OPTION, option) for option in others if not same_value(option, value))


def _steps(value: Any, domain: Float | Int) -> list[Any]:
    if isinstance(domain, Float):
        step = SHARE_OF_RANGE * (domain.high - domain.low)
        return [value / FACTOR, value * FACTOR] if domain.log else [value - step, value + step]
    if domain.log:
        return [min(value - 1, round(value / FACTOR)), max(value + 1, round(value * FACTOR))]
    whole = max(1, round(SHARE_OF_RANGE * (domain.high - domain.low)))
    return [value - whole, value + whole]


def _within(
    knob: str, value: Any, steps: list[Any], config: Mapping[str, Any], space: Space
) -> Iterator[Any]:
    """The steps, held back to the knob's range and to the knobs that must not be smaller or larger."""
    domain: Domain | None = space.domains.get(knob)
    low: float = -math.inf
    high: float = math.inf
    if isinstance(domain, Float | Int) and domain.low <= value <= domain.high:
        low, high = domain.low, domain.high
    for order in [*space.constraints, *_ORDERS]:
        other: Any = config.get(order.larger if order.smaller == knob else order.smaller)
        if not _is_number(other):
            continue
        if order.smaller == knob:
            high = min(high, other)
        elif order.larger == knob:
            low = max(low, other)
    for step in steps:
        held = min(max(step, low), high)
        if held != value:
            bound = held in (low, high)  # rounded, it might lie beyond
            yield round(held) if isinstance(value, int) else held if bound else float(f"{held:.8g}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
