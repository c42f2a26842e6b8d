"""A space: named knobs with their domains, conditions between them and orders between their values.

One function turns coordinates into a config (`Space.assemble`), so random, Sobol, grid and model-based search
can only ever draw configs that are valid. It walks the knobs so that each comes after those it depends on:

- a knob whose `when` does not hold is left out, and its coordinate is not read;
- a constrained knob takes its coordinate as a share of what is left: for `a <= b`, a is drawn from the part
  of its range that leaves b a value, then b from its range above a, on b's own scale (linear or log). Each
  coordinate is read at most once and nothing is drawn again, so the config is a pure function of the point.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from search_spaces.domains import Choice, Const, Domain, PlainValue, parse_domain, same_value, satisfied
from search_spaces.errors import SpaceError, nearest_hint
from search_spaces.ordering import (
    LessEqual,
    assembly_order,
    feasible_bounds,
    listed_constraints,
    parse_constraint,
    reference_problems,
)

Config = dict[str, PlainValue]


class Space:
    """What may vary in a sweep; immutable, and valid once built.

    Raises SpaceError, with every problem that was found, for a condition on an unknown knob or option, an
    order that leaves a knob without a value, and conditions or constraints that go round in a circle.
    """

    __slots__ = (
        "_bounds",
        "_order",
        "_smaller",
        "constraints",
        "description",
        "dimensions",
        "domains",
        "name",
    )

    def __init__(
        self,
        name: str,
        domains: Mapping[str, Domain],
        constraints: Iterable[LessEqual] = (),
        *,
        description: str = "",
    ) -> None:
        if not domains:
            raise SpaceError([f"space {name!r} must have at least one knob"])
        self.name = name
        self.description = description
        self.domains: Mapping[str, Domain] = dict(domains)
        self.constraints: tuple[LessEqual, ...] = tuple(dict.fromkeys(constraints))
        problems = reference_problems(self.domains, self.constraints)
        if problems:
            raise SpaceError(problems)
        self._order = assembly_order(self.domains, self.constraints)
        self._bounds = feasible_bounds(self.domains, self.constraints, self._order)
        self._smaller = {k: [c.smaller for c in self.constraints if c.larger == k] for k in self._order}
        self.dimensions: tuple[str, ...] = tuple(k for k, domain in self.domains.items() if domain.has_axis)

    def assemble(self, coordinate: Callable[[str], float]) -> Config:
        """The valid config at `coordinate(knob)` in [0, 1], which is asked for active knobs only."""
        config: Config = {}
        for name in self._order:
            domain = self.domains[name]
            if satisfied(domain.when, config):
                u = coordinate(name) if domain.has_axis else 0.0
                config[name] = domain.value(u, *self._limits(name, config))
        return self._declared_order(config)

    def sample(self, point: Sequence[float]) -> Config:
        """The valid config at a point of the unit cube, one coordinate in [0, 1] per name in `dimensions`."""
        if len(point) != len(self.dimensions):
            raise ValueError(f"a point must have {len(self.dimensions)} coordinates, got {len(point)}")
        coordinates = {name: float(u) for name, u in zip(self.dimensions, point, strict=True)}
        for name, u in coordinates.items():
            if not 0.0 <= u <= 1.0:
                raise ValueError(f"a coordinate must be in [0, 1], got {name}={u}")
        return self.assemble(coordinates.__getitem__)

    def grid(self, points_per_range: int) -> Iterator[Config]:
        """Every config of at most `points_per_range` values per range and all options, each config once."""
        if points_per_range < 1:
            raise ValueError(f"points_per_range must be >= 1, got {points_per_range=}")
        return self._grid(points_per_range, 0, {})

    def validate(self, config: Mapping[str, Any]) -> None:
        """Raise SpaceError, with every problem, where `config` is not one that this space can give."""
        problems = [
            f"unknown knob {k!r} {nearest_hint(str(k), self.domains)}"
            for k in config
            if k not in self.domains
        ]
        active: dict[str, Any] = {}
        for name in self._order:
            domain = self.domains[name]
            if not satisfied(domain.when, active):
                if name in config:
                    problems.append(f"{name} acts only when {condition_text(domain)}")
                continue
            if name not in config:
                problems.append(f"{name} is missing")
                continue
            active[name] = config[name]
            problem = domain.problem_with(config[name])
            if problem:
                problems.append(f"{name} {problem}")
        for constraint in self.constraints:
            smaller, larger = active.get(constraint.smaller), active.get(constraint.larger)
            if isinstance(smaller, int | float) and isinstance(larger, int | float) and smaller > larger:
                problems.append(f"{constraint} must hold, got {smaller!r} > {larger!r}")
        if problems:
            raise SpaceError(problems)

    def override(self, changes: Mapping[str, Any], *, name: str | None = None) -> Space:
        """This space with other domains for some of its knobs, each a domain or its plain form.

        A mapping without `type` changes only the keys it gives; a knob keeps its condition unless one is
        given. Where a choice is narrowed, knobs that can no longer be active leave the space. Raises
        SpaceError for a knob that is not here, or one that is given a domain and can never be active.
        """
        problems = [
            f"unknown knob {k!r} {nearest_hint(str(k), self.domains)}: override changes knobs of the spaces "
            "used, domains adds others"
            for k in changes
            if k not in self.domains
        ]
        domains = dict(self.domains)
        for knob, change in changes.items():
            if knob in self.domains:
                try:
                    domains[knob] = _changed(self.domains[knob], change)
                except SpaceError as error:
                    problems += [f"{knob}: {problem}" for problem in error.problems]
        if problems:
            raise SpaceError(problems)
        return self._with_reachable(domains, kept=changes, name=name or self.name)

    def with_fixed(self, values: Mapping[str, PlainValue]) -> Space:
        """This space with the given knobs fixed; one that was not in it is added, so orders hold for it."""
        known = {k: Const(v) for k, v in values.items() if k in self.domains}
        domains = {**self.domains, **{k: Const(v) for k, v in values.items() if k not in self.domains}}
        widened = Space(self.name, domains, self.constraints, description=self.description)
        return widened.override(known) if known else widened

    def to_plain(self) -> dict[str, Any]:
        """Lists, mappings and plain values that `from_plain` reads back to an equal space."""
        plain: dict[str, Any] = {"name": self.name}
        if self.description:
            plain["description"] = self.description
        plain["domains"] = {name: domain.to_plain() for name, domain in self.domains.items()}
        if self.constraints:
            plain["constraints"] = [str(constraint) for constraint in self.constraints]
        return plain

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Space:
        """The space written as `{name, description, domains, constraints}`; only domains must be there."""
        known = ("name", "description", "domains", "constraints")
        problems = [
            f"unknown key {key!r} {nearest_hint(str(key), known)}" for key in plain if key not in known
        ]
        given = plain.get("domains")
        if not isinstance(given, Mapping) or not given:
            raise SpaceError([*problems, f"domains must map at least one knob to its domain, got {given!r}"])
        domains: dict[str, Domain] = {}
        for name, value in given.items():
            try:
                domains[str(name)] = parse_domain(value)
            except SpaceError as error:
                problems += [f"{name}: {problem}" for problem in error.problems]
        constraints = []
        for text in listed_constraints(plain.get("constraints")):
            try:
                constraints.append(parse_constraint(text))
            except SpaceError as error:
                problems += error.problems
        if problems:
            # Knobs that did not parse would be reported again as unknown: leave the references for the next
            # try.
            raise SpaceError(problems)
        name, description = str(plain.get("name") or "custom"), str(plain.get("description") or "")
        return cls(name, domains, constraints, description=description)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Space):
            return NotImplemented
        return self.to_plain() == other.to_plain()

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Space({self.name!r}, {len(self.domains)} knobs, {len(self.dimensions)} dimensions)"

    def _limits(self, name: str, config: Mapping[str, Any]) -> tuple[float, float]:
        low, high = self._bounds.get(name, (-math.inf, math.inf))
        return max([low, *(config[other] for other in self._smaller[name] if other in config)]), high

    def _grid(self, points: int, position: int, config: Config) -> Iterator[Config]:
        if position == len(self._order):
            yield self._declared_order(config)
            return
        name = self._order[position]
        domain = self.domains[name]
        if not satisfied(domain.when, config):
            yield from self._grid(points, position + 1, config)
            return
        for value in domain.spread(points, *self._limits(name, config)):
            yield from self._grid(points, position + 1, {**config, name: value})

    def _declared_order(self, config: Config) -> Config:
        return {name: config[name] for name in self.domains if name in config}

    def _with_reachable(self, domains: dict[str, Domain], kept: Iterable[str], name: str) -> Space:
        """The space of `domains` after conditions were cut to the options their parents still have."""
        changed = True
        while changed:
            changed = False
            for knob, domain in list(domains.items()):
                when = {
                    parent: _still_possible(values, domains.get(parent))
                    for parent, values in domain.when.items()
                }
                if any(not values for values in when.values()):
                    if knob in kept:
                        raise SpaceError(
                            [f"{knob} acts only when {condition_text(domain)}, which is never so here"]
                        )
                    del domains[knob]
                    changed = True
                elif when != domain.when:
                    domains[knob] = parse_domain({**domain.to_plain(), "when": when})
        constraints = [c for c in self.constraints if c.smaller in domains and c.larger in domains]
        return Space(name, domains, constraints, description=self.description)


def compose(*spaces: Space, name: str = "composed", description: str = "") -> Space:
    """One space with the knobs and constraints of all; SpaceError names a knob that two define otherwise."""
    domains: dict[str, Domain] = {}
    owner: dict[str, str] = {}
    problems = []
    for space in spaces:
        for knob, domain in space.domains.items():
            if knob in domains and domains[knob] != domain:
                problems.append(
                    f"{knob} is {domains[knob]} in space {owner[knob]!r} and {domain} in space {space.name!r}"
                )
            else:
                domains[knob] = domain
                owner.setdefault(knob, space.name)
    if problems:
        raise SpaceError(problems)
    constraints = [constraint for space in spaces for constraint in space.constraints]
    return Space(name, domains, constraints, description=description)


def condition_text(domain: Domain) -> str:
    """The condition of a domain in words, empty where it has none.

    >>> condition_text(Const(1, when={"optimizer": ("sgd", "rmsprop")}))
    'optimizer is sgd or rmsprop'
    """
    parts = [f"{parent} is {' or '.join(map(str, values))}" for parent, values in domain.when.items()]
    return " and ".join(parts)


def _changed(old: Domain, change: Any) -> Domain:
    if isinstance(change, Mapping):
        plain = {**old.to_plain(), **change} if "type" not in change else dict(change)
    else:
        plain = parse_domain(change).to_plain()
    if "when" not in plain and old.when:
        plain["when"] = old.when
    return parse_domain(plain)


def _still_possible(values: Iterable[PlainValue], parent: Domain | None) -> tuple[PlainValue, ...]:
    if parent is None:
        return ()
    if not isinstance(parent, Choice | Const):
        return tuple(values)  # the space's own check says that only a choice can be asked for
    options = parent.options if isinstance(parent, Choice) else (parent.constant,)
    return tuple(value for value in values if any(same_value(value, option) for option in options))
