"""Spaces: what is drawn is valid, by construction; what cannot be a space says why."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from search_spaces.domains import Choice, Const, Float, Int, satisfied
from search_spaces.errors import SpaceError
from search_spaces.ordering import LessEqual
from search_spaces.space import Space, compose

LADDER = Space(
    "ladder",
    {
        "top": Float(0.5, 4.0),
        "low": Float(1e-3, 10.0, log=True),
        "steps": Int(1, 20),
        "level": Choice((1, 2, 3)),
        "kind": Choice(("plain", "deep")),
        "depth": Int(1, 3, when={"kind": ("deep",)}),
        "fine": Choice((False, True), when={"kind": ("deep",), "depth_on": (True,)}),
        "depth_on": Choice((True, False), when={"kind": ("deep",)}),
    },
    [LessEqual("low", "steps"), LessEqual("steps", "top"), LessEqual("level", "top")],
)


def points(space: Space) -> st.SearchStrategy[list[float]]:
    """Points of the unit cube of a space."""
    return st.lists(st.floats(0.0, 1.0), min_size=len(space.dimensions), max_size=len(space.dimensions))


@given(points(LADDER))
def test_every_point_gives_a_valid_config(point):
    """Whatever the point: the config is valid, ordered, and the same each time."""
    config = LADDER.sample(point)
    LADDER.validate(config)
    assert config["low"] <= config["steps"] <= config["top"]
    assert config["level"] <= config["top"]
    assert LADDER.sample(point) == config


@given(points(LADDER))
def test_conditional_knobs_are_there_exactly_when_active(point):
    """A knob is in a config if and only if its condition holds there."""
    config = LADDER.sample(point)
    for name, domain in LADDER.domains.items():
        assert (name in config) == satisfied(domain.when, config)


@given(points(LADDER), st.floats(0.0, 1.0))
def test_the_coordinate_of_an_inactive_knob_is_not_read(point, other):
    """Moving along the axis of a knob that is not active leaves the config as it is."""
    config = LADDER.sample(point)
    for axis, name in enumerate(LADDER.dimensions):
        if name not in config:
            assert LADDER.sample([*point[:axis], other, *point[axis + 1 :]]) == config


def test_bounds_of_a_chain_are_narrowed_so_that_everyone_finds_a_value():
    """low <= steps <= top with top at most 4 and steps whole: low reaches 4 and no further."""
    assert LADDER._bounds["low"] == (1e-3, 4.0)
    assert LADDER._bounds["steps"] == (1, 4)
    assert LADDER._bounds["top"] == (1, 4.0)


def test_the_larger_value_is_drawn_from_what_the_smaller_leaves():
    """The documented mapping: a from its range, then b from its range above a, on b's scale."""
    space = Space("pair", {"a": Float(0.0, 1.0), "b": Float(0.0, 1.0)}, [LessEqual("a", "b")])
    assert space.sample([0.5, 0.5]) == {"a": 0.5, "b": 0.75}
    assert space.sample([1.0, 0.0]) == {"a": 1.0, "b": 1.0}


@pytest.mark.parametrize("points_per_range", [1, 2, 3])
def test_a_grid_holds_valid_configs_each_once(points_per_range):
    """The grid has no duplicate and no config that the space would refuse."""
    configs = list(LADDER.grid(points_per_range))
    for config in configs:
        LADDER.validate(config)
    assert len({tuple(config.items()) for config in configs}) == len(configs)


def test_a_grid_covers_every_combination():
    """Options times values, with conditional knobs only where they are active."""
    space = Space(
        "small",
        {
            "a": Choice(("x", "y")),
            "b": Float(0.0, 1.0, when={"a": ("x",)}),
            "c": Int(0, 1),
        },
    )
    assert list(space.grid(3)) == [
        {"a": a, **({} if b is None else {"b": b}), "c": c}
        for a, bs in (("x", (0.0, 0.5, 1.0)), ("y", (None,)))
        for b in bs
        for c in (0, 1)
    ]


def test_a_space_of_constants_has_one_config():
    """Nothing varies: no dimension, one config."""
    space = Space("fixed", {"a": Const(1), "b": Const(None)})
    assert space.dimensions == ()
    assert space.sample([]) == {"a": 1, "b": None}
    assert list(space.grid(5)) == [{"a": 1, "b": None}]


@pytest.mark.parametrize("point", [[0.5], [0.5] * 9, [math.nan] + [0.5] * 7, [1.5] + [0.5] * 7])
def test_a_point_outside_the_cube_is_refused(point):
    """Too few or too many coordinates, NaN and values beyond [0, 1] are errors."""
    with pytest.raises(ValueError, match=r"coordinate"):
        LADDER.sample(point)


A, B = Float(0.0, 1.0), Float(2.0, 3.0)
BAD = {
    "empty": (lambda: Space("s", {}), "space 's' must have at least one knob"),
    "unknown parent": (
        lambda: Space("s", {"optimizer": Choice(("sgd",)), "m": Float(0, 1, when={"optimiser": ("sgd",)})}),
        r"m: condition on unknown knob 'optimiser' \(did you mean 'optimizer'\?\)",
    ),
    "unknown option": (
        lambda: Space("s", {"o": Choice(("sgd", "adam")), "m": Float(0, 1, when={"o": ("sdg",)})}),
        r"m: condition on o: unknown option 'sdg' \(did you mean 'sgd'\?\)",
    ),
    "condition on a range": (
        lambda: Space("s", {"a": A, "m": Float(0, 1, when={"a": (0.5,)})}),
        "only a choice can be asked for",
    ),
    "cyclic conditions": (
        lambda: Space("s", {"a": Choice((1,), when={"b": (1,)}), "b": Choice((1,), when={"a": (1,)})}),
        "go round in a circle: . -> . -> .",
    ),
    "own condition": (lambda: Space("s", {"a": Choice((1, 2), when={"a": (1,)})}), "circle: a -> a"),
    "cyclic orders": (
        lambda: Space("s", {"a": A, "b": A}, [LessEqual("a", "b"), LessEqual("b", "a")]),
        "circle",
    ),
    "impossible order": (
        lambda: Space("s", {"low": B, "high": A}, [LessEqual("low", "high")]),
        "low has no value <= 1",
    ),
    "impossible order, told once": (
        lambda: Space(
            "s", {"low": B, "mid": A, "high": A}, [LessEqual("low", "mid"), LessEqual("mid", "high")]
        ),
        r"^low has no value <= 1, which mid would need \(constraints: [^;]*\)$",
    ),
    "a number too large for a row": (lambda: Space("s", {"a": Int(1, 2**63)}), "high must fit into 64 bits"),
    "a value too large for a row": (lambda: Space("s", {"a": Const(-(2**64))}), "must fit into 64 bits"),
    "impossible whole number": (
        lambda: Space("s", {"x": Float(0.2, 5.0), "n": Const(0)}, [LessEqual("x", "n")]),
        "x has no value <= 0",
    ),
    "order on an unknown knob": (
        lambda: Space("s", {"tau_min": A}, [LessEqual("tau_min", "tau_mix")]),
        r"unknown knob 'tau_mix' \(did you mean 'tau_min'\?\)",
    ),
    "order on text": (
        lambda: Space("s", {"a": A, "b": Choice(("x", "y"))}, [LessEqual("a", "b")]),
        "constraint a <= b: b must be numeric",
    ),
}


@pytest.mark.parametrize("make, message", BAD.values(), ids=BAD)
def test_a_bad_space_is_refused_when_built(make, message):
    """Nothing that could fail while sampling gets past the constructor."""
    with pytest.raises(SpaceError, match=message):
        make()


def test_all_problems_of_a_plain_space_are_told_at_once():
    """Each bad knob, key and constraint gives its own problem."""
    with pytest.raises(SpaceError) as caught:
        Space.from_plain(
            {
                "domains": {"a": {"type": "float", "low": 2, "high": 1}, "b": [], "c": {"type": "in"}},
                "constraint": [],
                "constraints": ["a < b"],
            }
        )
    assert [problem.split()[0] for problem in caught.value.problems] == ["unknown", "a:", "b:", "c:", "a"]


def test_a_space_survives_being_written():
    """The plain form reads back to an equal space that draws the same configs."""
    again = Space.from_plain(LADDER.to_plain())
    assert again == LADDER
    assert again.sample([0.3] * 8) == LADDER.sample([0.3] * 8)


BAD_CONFIGS = {
    "unknown": ({"tpo": 1.0}, r"unknown knob 'tpo' \(did you mean 'top'\?\)"),
    "missing": ({"top": None}, "top must be a finite number"),
    "outside": ({"steps": 21}, r"steps must be in \[1, 20\], got 21"),
    "not whole": ({"steps": 2.0}, "steps must be an integer"),
    "inactive": ({"depth": 1}, "depth acts only when kind is deep"),
    "option": (
        {"kind": "dep"},
        r"kind must be one of \['plain', 'deep'\], got 'dep' \(did you mean 'deep'\?\)",
    ),
    "order": ({"low": 3.0}, "low <= steps must hold, got 3.0 > 2"),
}


@pytest.mark.parametrize("change, message", BAD_CONFIGS.values(), ids=BAD_CONFIGS)
def test_validate_names_the_bad_knob(change, message):
    """A config that the space cannot give is refused with knob and rule."""
    good = {"top": 3.0, "low": 1.0, "steps": 2, "level": 1, "kind": "plain"}
    LADDER.validate(good)
    with pytest.raises(SpaceError, match=message):
        LADDER.validate({**good, **change})


def test_validate_misses_nothing_that_is_missing():
    """An active knob without a value is an error."""
    with pytest.raises(SpaceError, match="low is missing; top is missing"):
        LADDER.validate({"steps": 2, "level": 1, "kind": "plain"})


def test_compose_joins_knobs_and_orders():
    """All knobs, all constraints; a knob defined alike in both is one knob."""
    one = Space("one", {"a": A, "c": Const(1)})
    two = Space("two", {"b": A, "c": Const(1), "d": A}, [LessEqual("b", "d")])
    both = compose(one, two)
    assert tuple(both.domains) == ("a", "c", "b", "d")
    assert both.constraints == two.constraints


def test_compose_refuses_two_meanings_of_one_knob():
    """A conflicting redefinition names the knob and both spaces."""
    with pytest.raises(SpaceError, match=r"a is .* in space 'one' and .* in space 'two'"):
        compose(Space("one", {"a": A}), Space("two", {"a": B}))


def test_override_changes_what_it_says_and_keeps_conditions():
    """A part of a domain may be changed alone; the condition stays."""
    space = LADDER.override({"depth": {"high": 2}, "low": {"type": "float", "low": 0.1, "high": 0.2}})
    assert space.domains["depth"] == Int(1, 2, when={"kind": ("deep",)})
    assert space.domains["low"] == Float(0.1, 0.2)
    assert LADDER.domains["depth"] == Int(1, 3, when={"kind": ("deep",)})


def test_override_names_unknown_knobs_and_bad_domains_together():
    """Every problem of an override is told at once."""
    with pytest.raises(SpaceError) as caught:
        LADDER.override({"dept": 1, "low": {"low": 20}, "kind": []})
    text = "|".join(caught.value.problems)
    assert "unknown knob 'dept' (did you mean 'depth'?)" in text
    assert "low: low must be < high" in text
    assert "kind: options must not be empty" in text


def test_fixing_a_choice_takes_out_what_can_no_longer_be_active():
    """With kind fixed to plain, the knobs that act only when deep leave the space."""
    space = LADDER.with_fixed({"kind": "plain"})
    assert "depth" not in space.domains
    assert "fine" not in space.domains
    assert space.sample([0.5] * len(space.dimensions))["kind"] == "plain"


def test_a_fixed_knob_takes_part_in_orders():
    """A constant bounds the knobs beside it, and one that leaves them nothing is an error."""
    space = LADDER.with_fixed({"steps": 2})
    assert space.sample([1.0] * len(space.dimensions))["low"] == 2.0
    with pytest.raises(SpaceError, match="steps has no value <= 4"):
        LADDER.with_fixed({"steps": 5})


def test_a_value_given_to_a_knob_that_is_never_active_is_an_error():
    """Asking for a setting that would change nothing is refused, not dropped."""
    with pytest.raises(SpaceError, match="depth acts only when kind is deep, which is never so here"):
        LADDER.with_fixed({"kind": "plain", "depth": 2})


def test_fixing_a_knob_that_is_not_in_the_space_adds_it():
    """Further fixed settings become part of every config."""
    assert LADDER.with_fixed({"epochs": 3}).sample([0.0] * 8)["epochs"] == 3
