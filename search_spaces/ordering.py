"""In which order the knobs of a space are set, and which part of a range an order between values leaves.

Only `a <= b` is known here. Bounds are narrowed once, when the space is built, so that every value that a
smaller knob takes leaves at least one value to the larger: sampling then never has to try again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter

from search_spaces.domains import Choice, Const, Domain, numeric_bounds, same_value
from search_spaces.errors import SpaceError, nearest_hint


@dataclass(frozen=True, slots=True)
class LessEqual:
    """The value of knob `smaller` never exceeds that of knob `larger`, where both are active."""

    smaller: str
    larger: str

    def __str__(self) -> str:
        return f"{self.smaller} <= {self.larger}"


def parse_constraint(text: object) -> LessEqual:
    """The constraint written `tau_train_min <= tau_train_max`; SpaceError where it is not of that form."""
    if isinstance(text, LessEqual):
        return text
    names = [part.strip() for part in text.split("<=")] if isinstance(text, str) else []
    if len(names) != 2 or not all(name.isidentifier() for name in names):
        raise SpaceError([f"a constraint must read 'a <= b' with two knobs, got {text!r}"])
    return LessEqual(*names)


def listed_constraints(plain: object) -> list[object]:
    """What a plan writes under `constraints` as a list: nothing, one of them, or several."""
    if plain is None:
        return []
    return list(plain) if isinstance(plain, list | tuple) else [plain]


def reference_problems(domains: Mapping[str, Domain], constraints: Sequence[LessEqual]) -> list[str]:
    """What conditions and constraints name that is not there, or cannot be compared."""
    problems = []
    for name, domain in domains.items():
        for parent, values in domain.when.items():
            problems += [f"{name}: {problem}" for problem in _condition_problems(parent, values, domains)]
    for constraint in constraints:
        for name in (constraint.smaller, constraint.larger):
            if name not in domains:
                problems.append(
                    f"constraint {constraint}: unknown knob {name!r} {nearest_hint(name, domains)}"
                )
            elif numeric_bounds(domains[name]) is None:
                problems.append(f"constraint {constraint}: {name} must be numeric, got {domains[name]}")
    return problems


def assembly_order(domains: Mapping[str, Domain], constraints: Sequence[LessEqual]) -> tuple[str, ...]:
    """All knobs, each after those it depends on, otherwise as declared; SpaceError names a cycle."""
    before: dict[str, list[str]] = {name: list(domain.when) for name, domain in domains.items()}
    for constraint in constraints:
        before[constraint.larger].append(constraint.smaller)
    try:
        TopologicalSorter(before).prepare()
    except CycleError as cycle:
        raise SpaceError(
            [f"conditions and constraints go round in a circle: {' -> '.join(cycle.args[1])}"]
        ) from None
    order: list[str] = []
    waiting = list(domains)
    while waiting:
        ready = next(name for name in waiting if all(other in order for other in before[name]))
        order.append(ready)
        waiting.remove(ready)
    return tuple(order)


def feasible_bounds(
    domains: Mapping[str, Domain], constraints: Sequence[LessEqual], order: Iterable[str]
) -> dict[str, tuple[float, float]]:
    """Bounds per constrained knob that always leave every knob a value; SpaceError where one has none."""
    knobs = [name for name in order if any(name in (c.smaller, c.larger) for c in constraints)]
    above = {name: [c.larger for c in constraints if c.smaller == name] for name in knobs}
    below = {name: [c.smaller for c in constraints if c.larger == name] for name in knobs}
    high: dict[str, float] = {}
    low: dict[str, float] = {}
    problems = []
    for name in reversed(knobs):
        limit = min((high[other] for other in above[name]), default=math.inf)
        largest = domains[name].largest_at_most(limit)
        if largest is None:
            problems.append(f"{name} has no value <= {limit:g}, which {' and '.join(above[name])} would need")
        high[name] = limit if largest is None else largest
    # A knob without a value leaves others without one: those are no mistakes of their own.
    for name in () if problems else knobs:
        limit = max((low[other] for other in below[name]), default=-math.inf)
        smallest = domains[name].smallest_at_least(limit)
        if smallest is None or smallest > high[name]:
            problems.append(f"{name} has no value >= {limit:g}, which {' and '.join(below[name])} would need")
        low[name] = limit if smallest is None else smallest
    if problems:
        listed = ", ".join(map(str, constraints))
        raise SpaceError([f"{problem} (constraints: {listed})" for problem in problems])
    return {name: (low[name], high[name]) for name in knobs}


def _condition_problems(parent: str, values: Iterable[object], domains: Mapping[str, Domain]) -> list[str]:
    if parent not in domains:
        return [f"condition on unknown knob {parent!r} {nearest_hint(parent, domains)}"]
    domain = domains[parent]
    if not isinstance(domain, Choice | Const):
        return [f"condition on {parent}, which is {domain}; only a choice can be asked for"]
    options = domain.options if isinstance(domain, Choice) else (domain.constant,)
    unknown = [value for value in values if not any(same_value(value, option) for option in options)]
    return [
        f"condition on {parent}: unknown option {value!r} {nearest_hint(str(value), map(str, options))}"
        for value in unknown
    ]
