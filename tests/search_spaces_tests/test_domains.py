"""Domains: their values, their coordinates, and what is refused."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from search_spaces.domains import Choice, Const, Float, Int, parse_domain, same_value
from search_spaces.errors import SpaceError

UNIT = st.floats(0.0, 1.0)
DOMAINS = {
    "float": Float(-2.0, 3.0),
    "log-float": Float(1e-6, 10.0, log=True),
    "tiny": Float(1e-300, 1e-299, log=True),
    "narrow": Float(1.0, 1.0 + 1e-12),
    "int": Int(-3, 4),
    "log-int": Int(1, 1000, log=True),
    "choice": Choice((None, "a", True, 1, 2.5)),
    "const": Const(None),
}


@pytest.mark.parametrize("domain", DOMAINS.values(), ids=DOMAINS)
@given(u=UNIT)
def test_every_coordinate_gives_a_value_of_the_domain(domain, u):
    """No coordinate of [0, 1] leads out of a domain, and the same one always gives the same value."""
    value = domain.value(u)
    assert domain.problem_with(value) is None
    assert same_value(domain.value(u), value)


@pytest.mark.parametrize("name", ["float", "log-float", "int", "log-int"])
@given(u=UNIT, v=UNIT)
def test_ranges_grow_with_the_coordinate(name, u, v):
    """A larger coordinate never gives a smaller value."""
    low, high = sorted((u, v))
    assert DOMAINS[name].value(low) <= DOMAINS[name].value(high)


@pytest.mark.parametrize("name", ["float", "log-float", "int", "log-int"])
@given(u=UNIT, bounds=st.tuples(UNIT, UNIT))
def test_a_narrowed_range_is_kept(name, u, bounds):
    """Whatever part of a range is left, the value lies in it."""
    domain = DOMAINS[name]
    low, high = sorted(domain.value(bound) for bound in bounds)
    assert low <= domain.value(u, low, high) <= high


def test_both_ends_of_a_range_are_reached():
    """The coordinates 0 and 1 give exactly the bounds."""
    for domain in (Float(0.1, 0.7), Float(1e-4, 0.3, log=True), Int(2, 9), Int(3, 300, log=True)):
        assert (domain.value(0.0), domain.value(1.0)) == (domain.low, domain.high)


def test_every_integer_is_drawn_equally_often():
    """A linear integer range cuts [0, 1] into equal parts."""
    drawn = [Int(0, 3).value(i / 1000) for i in range(1000)]
    assert [drawn.count(value) for value in range(4)] == [250] * 4


def test_a_log_range_gives_every_decade_the_same_share():
    """Half of a log range of two decades lies below its geometric mean."""
    assert Float(1e-4, 1e-2, log=True).value(0.5) == pytest.approx(1e-3)
    drawn = [Int(1, 99, log=True).value(i / 1000) for i in range(1000)]
    assert sum(value < 10 for value in drawn) == 500


def test_sampled_floats_do_not_hang_on_the_last_bit():
    """A sampled float has eight digits at most, so that two machines whose exp differs give one config."""
    assert Float(1e-4, 1e-2, log=True).value(1 / 3) == 0.00046415888


def test_none_and_booleans_are_values_of_their_own():
    """None may be chosen; True is not 1, while 1 and 1.0 are one value."""
    choice = Choice((None, True, 1))
    assert choice.problem_with(None) is None
    assert Choice((True,)).problem_with(1) is not None
    assert Choice((1,)).problem_with(1.0) is None


def test_spread_holds_the_ends_and_no_value_twice():
    """A grid over a range has its ends and, for few integers, each of them once."""
    assert Float(0.0, 1.0).spread(3) == [0.0, 0.5, 1.0]
    assert Float(1e-4, 1e-2, log=True).spread(3) == [1e-4, 1e-3, 1e-2]
    assert Int(1, 3).spread(10) == [1, 2, 3]
    assert Int(1, 100, log=True).spread(3) == [1, 10, 100]
    assert Float(0.0, 1.0).spread(1) == [0.5]
    assert Choice(("a", None)).spread(1) == ["a", None]


BAD = {
    "inverted": (lambda: Float(2.0, 1.0), "low must be < high, got low=2.0, high=1.0"),
    "one value": (lambda: Float(1.0, 1.0), "for one value write type: const"),
    "infinite": (lambda: Float(0.0, math.inf), "high must be finite"),
    "nan": (lambda: Float(math.nan, 1.0), "low must be finite"),
    "log of zero": (lambda: Float(0.0, 1.0, log=True), "low must be > 0 on a log scale"),
    "log of negative int": (lambda: Int(-1, 1, log=True), "low must be > 0 on a log scale"),
    "float in int": (lambda: Int(1.5, 3), "low must be an integer, got 1.5"),
    "bool in float": (lambda: Float(False, 1.0), "low must be a number, got False"),
    "text bound": (lambda: Float("1e-4", 1.0), "low must be a number, got '1e-4'"),
    "log not bool": (lambda: Float(1.0, 2.0, log="yes"), "log must be true or false"),
    "no options": (lambda: Choice(()), "options must not be empty"),
    "twice": (lambda: Choice((1, 1.0)), "options must differ, got 1.0 twice"),
    "text as options": (lambda: Choice("adam"), "options must be a list, got 'adam'"),
    "nan option": (lambda: Choice((math.nan,)), "a value must be finite"),
    "nested option": (lambda: Choice(([1],)), "a value must be a number, text, true, false or null"),
    "infinite const": (lambda: Const(math.inf), "a value must be finite"),
    "empty condition": (lambda: Int(1, 2, when={"a": []}), "when a: at least one value is needed"),
    "condition list": (lambda: Int(1, 2, when=["a"]), "when must map a knob to its values"),
    "no type": (lambda: parse_domain({"low": 1}), "type is missing"),
    "bad type": (lambda: parse_domain({"type": "flaot"}), r"unknown type 'flaot' \(did you mean 'float'\?\)"),
    "bad key": (
        lambda: parse_domain({"type": "float", "low": 0.1, "hihg": 2}),
        r"unknown key 'hihg' \(did you mean 'high'\?\); high is missing",
    ),
}


@pytest.mark.parametrize("make, message", BAD.values(), ids=BAD)
def test_a_bad_domain_is_refused_with_the_rule_and_the_value(make, message):
    """What cannot be a domain says why, as a ValueError."""
    with pytest.raises(SpaceError, match=message):
        make()


def test_all_problems_of_a_domain_are_told_at_once():
    """Two mistakes give two problems."""
    with pytest.raises(SpaceError) as caught:
        Float("a", math.inf)
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize("domain", DOMAINS.values(), ids=DOMAINS)
def test_a_domain_survives_being_written(domain):
    """The plain form reads back to an equal domain."""
    assert parse_domain(domain.to_plain()) == domain


def test_short_plain_forms():
    """A list is a choice, a bare value a constant, and log-float is a float on a log scale."""
    assert parse_domain([1, None]) == Choice((1, None))
    assert parse_domain("adam") == Const("adam")
    assert parse_domain({"type": "log-float", "low": 1, "high": 2}) == Float(1.0, 2.0, log=True)
    assert parse_domain({"type": "log-int", "low": 1, "high": 2}) == Int(1, 2, log=True)
    assert parse_domain({"type": "int", "low": 1, "high": 2, "when": {"a": "x"}}).when == {"a": ("x",)}
