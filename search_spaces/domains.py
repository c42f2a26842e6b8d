"""What one knob may be: a range of floats or integers, a choice between plain values, or one fixed value.

A domain knows its own values and how a coordinate in [0, 1] becomes one of them. When a knob is active, and
how the values of two knobs are ordered, is decided by the space (`search_spaces.space`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeGuard

from search_spaces.errors import SpaceError, nearest_hint

PlainValue: TypeAlias = bool | int | float | str | None
Conditions: TypeAlias = Mapping[str, tuple[PlainValue, ...]]

# Sampled floats carry this many significant digits: `exp` and `log` may differ in the last bit between two
# machines, and a config must have the same identity on both.
SIGNIFICANT_DIGITS = 8


@dataclass(frozen=True, slots=True)
class Float:
    """Every float of [low, high]; with `log`, equal ratios are equally likely (low must then be > 0)."""

    low: float
    high: float
    log: bool = False
    when: Conditions = field(default_factory=dict)

    def __post_init__(self) -> None:
        problems = _range_problems(self.low, self.high, self.log, kinds=(int, float), noun="a number")
        _finish(self, problems, low=float, high=float)

    @property
    def has_axis(self) -> bool:
        """Whether a point of the unit cube needs a coordinate for this domain."""
        return True

    def value(self, u: float, low: float = -math.inf, high: float = math.inf) -> float:
        """The value at coordinate `u` in [0, 1] of the part of the range that lies in [low, high]."""
        low, high = max(self.low, low), min(self.high, high)
        if self.log:
            raw = math.exp(math.log(low) + u * (math.log(high) - math.log(low)))
        else:
            raw = low * (1.0 - u) + high * u
        return min(max(float(f"{raw:.{SIGNIFICANT_DIGITS}g}"), low), high)

    def spread(self, points: int, low: float = -math.inf, high: float = math.inf) -> list[float]:
        """At most `points` distinct values, evenly spaced on the domain's scale, both ends among them."""
        return list(dict.fromkeys(self.value(u, low, high) for u in _ticks(points)))

    def largest_at_most(self, limit: float) -> float | None:
        """The largest value not above `limit`; None where there is none."""
        return min(self.high, limit) if self.low <= limit else None

    def smallest_at_least(self, limit: float) -> float | None:
        """The smallest value not below `limit`; None where there is none."""
        return max(self.low, limit) if limit <= self.high else None

    def problem_with(self, value: object) -> str | None:
        """Why `value` is not of this domain, or None."""
        if not _is_number(value) or not math.isfinite(value):
            return f"must be a finite number, got {value!r}"
        return (
            None if self.low <= value <= self.high else f"must be in [{self.low}, {self.high}], got {value!r}"
        )

    def to_plain(self) -> dict[str, Any]:
        """The mapping that a plan would write."""
        return _plain_range("float", self)

    def __str__(self) -> str:
        return f"float {self.low:g} .. {self.high:g}{' (log)' if self.log else ''}"


@dataclass(frozen=True, slots=True)
class Int:
    """Every integer of [low, high]; with `log`, equal ratios are equally likely (low must then be >= 1)."""

    low: int
    high: int
    log: bool = False
    when: Conditions = field(default_factory=dict)

    def __post_init__(self) -> None:
        _finish(self, _range_problems(self.low, self.high, self.log, kinds=(int,), noun="an integer"))

    @property
    def has_axis(self) -> bool:
        """Whether a point of the unit cube needs a coordinate for this domain."""
        return True

    def value(self, u: float, low: float = -math.inf, high: float = math.inf) -> int:
        """The value at coordinate `u` in [0, 1] of the part of the range that lies in [low, high]."""
        first, last = self._within(low, high)
        if self.log:
            raw = math.exp(math.log(first) + u * (math.log(last + 1) - math.log(first)))
        else:
            raw = first + u * (last + 1 - first)
        # A hair above: an exact integer must not fall to the one below on a machine that rounds otherwise.
        return min(max(math.floor(raw + 1e-9 * max(1.0, abs(raw))), first), last)

    def spread(self, points: int, low: float = -math.inf, high: float = math.inf) -> list[int]:
        """At most `points` distinct values, evenly spaced on the domain's scale, both ends among them."""
        first, last = self._within(low, high)
        if last - first + 1 <= points:
            return list(range(first, last + 1))
        scale = Float(float(first), float(last), self.log)
        return list(dict.fromkeys(round(scale.value(u)) for u in _ticks(points)))

    def largest_at_most(self, limit: float) -> int | None:
        """The largest value not above `limit`; None where there is none."""
        return self._within(-math.inf, limit)[1] if self.low <= limit else None

    def smallest_at_least(self, limit: float) -> int | None:
        """The smallest value not below `limit`; None where there is none."""
        return self._within(limit, math.inf)[0] if limit <= self.high else None

    def problem_with(self, value: object) -> str | None:
        """Why `value` is not of this domain, or None."""
        if not isinstance(value, int) or isinstance(value, bool):
            return f"must be an integer, got {value!r}"
        return (
            None if self.low <= value <= self.high else f"must be in [{self.low}, {self.high}], got {value!r}"
        )

    def to_plain(self) -> dict[str, Any]:
        """The mapping that a plan would write."""
        return _plain_range("int", self)

    def _within(self, low: float, high: float) -> tuple[int, int]:
        first = self.low if low <= self.low else math.ceil(low)
        last = self.high if high >= self.high else math.floor(high)
        return first, last

    def __str__(self) -> str:
        return f"int {self.low} .. {self.high}{' (log)' if self.log else ''}"


@dataclass(frozen=True, slots=True)
class Choice:
    """One of the given plain values, None may be one; 1 and 1.0 are the same, True is another."""

    options: tuple[PlainValue, ...]
    when: Conditions = field(default_factory=dict)

    def __post_init__(self) -> None:
        problems = []
        if not isinstance(self.options, list | tuple):
            problems.append(f"options must be a list, got {self.options!r}")
        elif not self.options:
            problems.append("options must not be empty")
        else:
            problems += [p for p in map(_plain_problem, self.options) if p]
            keys = [value_key(option) for option in self.options]
            twice = [o for i, o in enumerate(self.options) if keys.index(keys[i]) < i]
            problems += [f"options must differ, got {option!r} twice" for option in twice]
        _finish(self, problems, options=tuple)

    @property
    def has_axis(self) -> bool:
        """Whether a point of the unit cube needs a coordinate for this domain."""
        return True

    def value(self, u: float, low: float = -math.inf, high: float = math.inf) -> PlainValue:
        """The option at coordinate `u` in [0, 1] of those in [low, high], all equally likely."""
        options = self._within(low, high)
        return options[min(int(u * len(options)), len(options) - 1)]

    def spread(self, points: int, low: float = -math.inf, high: float = math.inf) -> list[PlainValue]:
        """Every option, whatever `points` says: between options there is nothing to thin out."""
        return list(self._within(low, high))

    def largest_at_most(self, limit: float) -> float | None:
        """The largest option not above `limit`; None where there is none."""
        return max(filter(_is_number, self._within(-math.inf, limit)), default=None)

    def smallest_at_least(self, limit: float) -> float | None:
        """The smallest option not below `limit`; None where there is none."""
        return min(filter(_is_number, self._within(limit, math.inf)), default=None)

    def problem_with(self, value: object) -> str | None:
        """Why `value` is not of this domain, or None."""
        if any(same_value(value, option) for option in self.options):
            return None
        hint = ""
        if isinstance(value, str):
            hint = " " + nearest_hint(value, [str(option) for option in self.options])
        return f"must be one of {list(self.options)}, got {value!r}{hint}"

    def to_plain(self) -> dict[str, Any]:
        """The mapping that a plan would write."""
        return {"type": "choice", "options": list(self.options), **_plain_when(self.when)}

    def _within(self, low: float, high: float) -> tuple[PlainValue, ...]:
        if low == -math.inf and high == math.inf:
            return self.options
        return tuple(option for option in self.options if low <= option <= high)  # type: ignore[operator]

    def __str__(self) -> str:
        return "choice " + " | ".join(
            str(option).lower() if option is None else str(option) for option in self.options
        )


@dataclass(frozen=True, slots=True)
class Const:
    """Exactly one plain value; it takes no coordinate."""

    constant: PlainValue
    when: Conditions = field(default_factory=dict)

    def __post_init__(self) -> None:
        _finish(self, [p for p in [_plain_problem(self.constant)] if p])

    @property
    def has_axis(self) -> bool:
        """Whether a point of the unit cube needs a coordinate for this domain."""
        return False

    def value(self, u: float, low: float = -math.inf, high: float = math.inf) -> PlainValue:
        """The constant, whatever the coordinate."""
        return self.constant

    def spread(self, points: int, low: float = -math.inf, high: float = math.inf) -> list[PlainValue]:
        """The constant alone."""
        return [self.constant]

    def largest_at_most(self, limit: float) -> float | None:
        """The constant where it is not above `limit`; else None."""
        return self.constant if self.constant <= limit else None  # type: ignore[operator,return-value]

    def smallest_at_least(self, limit: float) -> float | None:
        """The constant where it is not below `limit`; else None."""
        return self.constant if self.constant >= limit else None  # type: ignore[operator,return-value]

    def problem_with(self, value: object) -> str | None:
        """Why `value` is not of this domain, or None."""
        return None if same_value(value, self.constant) else f"must be {self.constant!r}, got {value!r}"

    def to_plain(self) -> dict[str, Any]:
        """The mapping that a plan would write."""
        return {"type": "const", "value": self.constant, **_plain_when(self.when)}

    def __str__(self) -> str:
        return f"const {self.constant!r}"


Domain: TypeAlias = Float | Int | Choice | Const

# type -> (class, keys that must be there, keys that may be there, keys already decided by the type)
KINDS: dict[str, tuple[type, tuple[str, ...], tuple[str, ...], dict[str, Any]]] = {
    "float": (Float, ("low", "high"), ("log", "when"), {}),
    "log-float": (Float, ("low", "high"), ("when",), {"log": True}),
    "int": (Int, ("low", "high"), ("log", "when"), {}),
    "log-int": (Int, ("low", "high"), ("when",), {"log": True}),
    "choice": (Choice, ("options",), ("when",), {}),
    "const": (Const, ("value",), ("when",), {}),
}


def parse_domain(plain: object) -> Domain:
    """The domain that a plan writes as `{type: float, low: 1e-4, high: 1e-2, log: true}`.

    A bare list is a choice and a bare value is a constant. Raises SpaceError with every problem found.
    """
    if isinstance(plain, Float | Int | Choice | Const):
        return plain
    if isinstance(plain, list | tuple):
        return Choice(tuple(plain))
    if not isinstance(plain, Mapping):
        return Const(plain)  # type: ignore[arg-type]
    if "type" not in plain:
        raise SpaceError([f"type is missing (known: {', '.join(KINDS)})"])
    kind = plain["type"]
    if not isinstance(kind, str) or kind not in KINDS:
        raise SpaceError([f"unknown type {kind!r} {nearest_hint(str(kind), KINDS)}"])
    cls, needed, optional, decided = KINDS[kind]
    given = {key: value for key, value in plain.items() if key != "type"}
    known = (*needed, *optional)
    problems = [f"unknown key {key!r} {nearest_hint(str(key), known)}" for key in given if key not in known]
    problems += [f"{key} is missing" for key in needed if key not in given]
    if problems:
        raise SpaceError(problems)
    if "value" in given:
        given["constant"] = given.pop("value")
    if given.get("when") is None:
        given.pop("when", None)
    return cls(**given, **decided)


def value_key(value: object) -> tuple[str, object]:
    """What two plain values share exactly when they are the same setting: 1 and 1.0 do, 1 and True do not."""
    if isinstance(value, bool):
        return "bool", value
    if isinstance(value, int | float):
        return "number", value
    return ("text" if isinstance(value, str) else type(value).__name__), value


def same_value(left: object, right: object) -> bool:
    """Whether two plain values are the same setting."""
    return value_key(left) == value_key(right)


def numeric_bounds(domain: Domain) -> tuple[float, float] | None:
    """The smallest and largest value of a domain of numbers; None where its values have no order."""
    if isinstance(domain, Float | Int):
        return domain.low, domain.high
    values = domain.options if isinstance(domain, Choice) else (domain.constant,)
    numbers = [value for value in values if _is_number(value)]
    return (min(numbers), max(numbers)) if len(numbers) == len(values) else None


def _ticks(points: int) -> list[float]:
    if points < 1:
        raise ValueError(f"points must be >= 1, got {points=}")
    return [0.5] if points == 1 else [i / (points - 1) for i in range(points)]


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _fits(value: int) -> bool:
    """Whether an integer can be written to a row."""
    return -(2**63) <= value < 2**63


def _plain_problem(value: object) -> str | None:
    if value is None or isinstance(value, bool | str):
        return None
    if isinstance(value, int):
        return None if _fits(value) else f"an integer must fit into 64 bits, got {value!r}"
    if isinstance(value, float):
        return None if math.isfinite(value) else f"a value must be finite, got {value!r}"
    return f"a value must be a number, text, true, false or null, got {value!r}"


def _range_problems(low: object, high: object, log: object, kinds: tuple[type, ...], noun: str) -> list[str]:
    problems = []
    for name, bound in (("low", low), ("high", high)):
        if not isinstance(bound, kinds) or isinstance(bound, bool):
            problems.append(f"{name} must be {noun}, got {bound!r}")
        elif isinstance(bound, int) and not _fits(bound):
            problems.append(f"{name} must fit into 64 bits, got {bound!r}")
        elif not math.isfinite(bound):  # type: ignore[arg-type]
            problems.append(f"{name} must be finite, got {bound!r}")
    if not isinstance(log, bool):
        problems.append(f"log must be true or false, got {log!r}")
    if problems:
        return problems
    if low == high:  # a knob that cannot vary is a constant and is written as one
        problems.append(f"low must be < high, got {low=}, {high=}; for one value write type: const")
    elif low > high:  # type: ignore[operator]
        problems.append(f"low must be < high, got {low=}, {high=}")
    if log and low <= 0:  # type: ignore[operator]
        problems.append(f"low must be > 0 on a log scale, got {low=}")
    return problems


def _parse_when(when: object) -> tuple[dict[str, tuple[PlainValue, ...]], list[str]]:
    if not isinstance(when, Mapping):
        return {}, [f"when must map a knob to its values, got {when!r}"]
    parsed: dict[str, tuple[PlainValue, ...]] = {}
    problems = []
    for parent, values in when.items():
        allowed = tuple(values) if isinstance(values, list | tuple) else (values,)
        if not allowed:
            problems.append(f"when {parent}: at least one value is needed")
        problems += [f"when {parent}: {problem}" for problem in map(_plain_problem, allowed) if problem]
        parsed[str(parent)] = allowed
    return parsed, problems


def _finish(domain: Any, problems: Sequence[str], **convert: Any) -> None:
    """Raise what is wrong, or store the fields in their one form (tuples, floats)."""
    when, when_problems = _parse_when(domain.when)
    if problems or when_problems:
        raise SpaceError([*problems, *when_problems])
    object.__setattr__(domain, "when", when)
    for name, kind in convert.items():
        object.__setattr__(domain, name, kind(getattr(domain, name)))


def _plain_when(when: Conditions) -> dict[str, Any]:
    return {"when": {parent: list(values) for parent, values in when.items()}} if when else {}


def _plain_range(kind: str, domain: Float | Int) -> dict[str, Any]:
    log = {"log": True} if domain.log else {}
    return {"type": kind, "low": domain.low, "high": domain.high, **log, **_plain_when(domain.when)}


def satisfied(when: Conditions, config: Mapping[str, Any]) -> bool:
    """Whether every knob that `when` names is in `config` with one of the values given for it."""
    return all(parent in config and _among(config[parent], values) for parent, values in when.items())


def _among(value: object, values: Iterable[object]) -> bool:
    return any(same_value(value, other) for other in values)
