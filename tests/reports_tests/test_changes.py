"""Where two plain values differ."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from reports.changes import ABSENT, Change, find_changes

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from([0.5, 1.0]) | st.text("ab", max_size=2),
    lambda inner: st.dictionaries(st.text("xyz", min_size=1, max_size=2), inner, max_size=3),
    max_leaves=8,
)


@given(PLAIN)
def test_a_value_does_not_differ_from_itself(value):
    assert find_changes(value, value) == []


@given(PLAIN, PLAIN)
def test_changes_turn_around_with_their_sides(one, other):
    turned = [Change(change.key, change.other, change.one) for change in find_changes(other, one)]
    assert find_changes(one, other) == turned


def test_types_count_and_what_is_absent_is_not_null():
    """1 and true differ, and so do nothing there and null there."""
    assert [change.key for change in find_changes({"a": 1}, {"a": True})] == ["a"]
    (change,) = find_changes({"a": {}}, {"a": {"b": None}})
    assert (change.key, change.one, change.other) == ("a.b", ABSENT, None)
    assert change.texts() == ("absent", "null")
