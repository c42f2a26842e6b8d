"""The spaces that ship: every draw is a training's valid config, and plans ask for them in several ways."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scm.trial_config import KNOBS, TrialConfig
from search_spaces.domains import Choice, Const, Float, Int
from search_spaces.errors import SpaceError
from search_spaces.named import SPACES, named_space, parse_space
from search_spaces.space import Space

EXPECTED = {
    "coverage_targets",
    "tau_ranges",
    "loss_weights",
    "gradient_policy",
    "optimizer",
    "model_size",
    "default",
    "controller",
    "guards",
    "equivariance",
    "pole_head",
    "tag_loss",
    "hybrid",
    "sampling",
}
APART = {
    "controller",
    "guards",
    "equivariance",
    "pole_head",
    "tag_loss",
    "hybrid",
    "sampling",
}  # asked for by name alone
LEFT_OUT = {
    ("gradient_policy", "gradient_policy"): {"pass"},  # trains as null does
    ("coverage_targets", "coverage_term"): {"ranked"},  # the term to be controlled, in a space of its own
    ("controller", "coverage_term"): {"hard"},  # cannot be controlled
    ("controller", "coverage_control"): {"none"},
}
KNOBS_IN_SPACES = [
    (name, knob) for name, space in SPACES.items() if name != "default" for knob in space.domains
]


def test_the_promised_spaces_are_there():
    """One space per subject and their composition, each with a description."""
    assert set(SPACES) == EXPECTED
    assert all(space.description for space in SPACES.values())
    assert set(SPACES["default"].domains) == {knob for name, knob in KNOBS_IN_SPACES if name not in APART}


@pytest.mark.parametrize("name", sorted(EXPECTED))
@settings(max_examples=60)
@given(data=st.data())
def test_every_draw_is_a_valid_training(name, data):
    """Whatever the point, the space and the training's own rules accept the config."""
    space = SPACES[name]
    size = len(space.dimensions)
    config = space.sample(data.draw(st.lists(st.floats(0.0, 1.0), min_size=size, max_size=size)))
    space.validate(config)
    trained = TrialConfig.from_flat(config)
    assert {name: getattr(trained, name) for name in config} == config


@pytest.mark.parametrize("name, knob", KNOBS_IN_SPACES, ids=[knob for _, knob in KNOBS_IN_SPACES])
def test_every_knob_is_one_that_a_training_reads(name, knob):
    """Names, types and options of a space are those of the training's config."""
    domain, field = SPACES[name].domains[knob], KNOBS[knob]
    if isinstance(domain, Float):
        assert field.type == "float"
    elif isinstance(domain, Int):
        assert field.type == "int"
    else:
        assert isinstance(domain, Choice)
        kinds = {"float": (int, float), "int": (int,), "bool": (bool,), "str": (str,)}[field.type]
        for option in domain.options:
            assert isinstance(option, kinds) or (option is None and field.optional)
        if field.type == "str":
            assert set(domain.options) - {None} == set(field.choices) - LEFT_OUT.get((name, knob), set())


@pytest.mark.parametrize("name, knob", KNOBS_IN_SPACES, ids=[knob for _, knob in KNOBS_IN_SPACES])
def test_a_knob_is_drawn_only_where_it_acts(name, knob):
    """The condition of a knob in a space implies the one under which the training reads it."""
    domains = SPACES[name].domains
    for parent, values in KNOBS[knob].active_when.items():
        if parent in domains[knob].when:
            assert all(value in values for value in domains[knob].when[parent])
        else:  # whatever the space draws for the parent, the knob acts
            assert all(value in values for value in domains[parent].spread(3))


def test_thresholds_keep_their_order_at_every_corner():
    """tau_infer <= tau_train_min <= tau_train_max and tau_bottom <= tau_finite, at the corners too."""
    space = SPACES["default"]
    for u in (0.0, 0.5, 1.0):
        for v in (0.0, 1.0):
            point = [u if i % 2 else v for i in range(len(space.dimensions))]
            config = space.sample(point)
            assert config["tau_infer"] <= config["tau_train_min"] <= config["tau_train_max"]
            assert config["tau_bottom"] <= config["tau_finite"]


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_a_named_space_survives_being_written(name):
    """The plain form in a run folder reads back to the same space."""
    assert parse_space(SPACES[name].to_plain()) == SPACES[name]


def test_a_plan_may_name_one_space_or_several():
    """A name, a list of names: their composition."""
    assert parse_space("optimizer") is SPACES["optimizer"]
    both = parse_space(["tau_ranges", "gradient_policy"])
    assert tuple(both.domains) == ("tau_infer", "tau_train_min", "tau_train_max", "gradient_policy")
    assert both.name == "tau_ranges+gradient_policy"


def test_a_plan_may_write_domains():
    """A mapping of knobs is a space of its own."""
    space = parse_space(
        {"learning_rate": {"type": "log-float", "low": 1e-4, "high": 1e-2}, "fit": ["implicit"]}
    )
    assert space.domains == {"learning_rate": Float(1e-4, 1e-2, log=True), "fit": Choice(("implicit",))}


def test_a_plan_may_use_spaces_and_change_them():
    """use, domains, constraints and override work together."""
    space = parse_space(
        {
            "use": ["tau_ranges", "optimizer"],
            "override": {"learning_rate": {"high": 1e-3}, "optimizer": ["adam"]},
            "domains": {"tau_bottom": {"type": "float", "low": 1e-3, "high": 0.1}},
            "constraints": ["tau_bottom <= tau_train_max"],
        }
    )
    assert space.domains["learning_rate"] == Float(1e-4, 1e-3, log=True)
    assert "momentum" not in space.domains
    assert space.domains["beta1"].when == {"optimizer": ("adam",)}
    config = space.sample([1.0] * len(space.dimensions))
    assert config["tau_bottom"] <= config["tau_train_max"]


def test_a_fixed_threshold_bounds_the_others():
    """With tau_train_min fixed, no larger tau_infer is drawn."""
    space = parse_space(["tau_ranges"]).with_fixed({"tau_train_min": 1e-3})
    assert space.domains["tau_train_min"] == Const(1e-3)
    assert space.sample([1.0, 1.0])["tau_infer"] == 1e-3


BAD = {
    "name": ("optimzer", r"unknown space 'optimzer' \(did you mean 'optimizer'\?\)"),
    "names": (["tau_range", "optimizer"], r"unknown space 'tau_range' \(did you mean 'tau_ranges'\?\)"),
    "empty list": ([], "at least one space must be named"),
    "number": (3, "a space must be a name, a list of names or a mapping, got 3"),
    "empty mapping": ({}, "domains must map at least one knob"),
    "empty domain": ({"fit": []}, "fit: options must not be empty"),
    "inverted": (
        {"learning_rate": {"type": "float", "low": 1, "high": 0.1}},
        "learning_rate: low must be < high",
    ),
    "unknown override": (
        {"use": ["optimizer"], "override": {"learning_rat": [1]}},
        r"unknown knob 'learning_rat' \(did you mean 'learning_rate'\?\)",
    ),
    "defined again": (
        {"use": ["optimizer"], "domains": {"learning_rate": [1e-3]}},
        "learning_rate is in the spaces used already; change it under override",
    ),
    "unknown key": ({"use": ["optimizer"], "overide": {}}, r"unknown key 'overide'"),
    "override of nothing": ({"use": "optimizer", "override": [1]}, "override must map knobs to domains"),
}


@pytest.mark.parametrize("plain, message", BAD.values(), ids=BAD)
def test_a_bad_space_in_a_plan_is_told_in_one_line(plain, message):
    """What a plan cannot mean is an error that names the place and the nearest good word."""
    with pytest.raises(SpaceError, match=message) as caught:
        parse_space(plain)
    assert "\n" not in str(caught.value)


def test_an_unknown_name_lists_what_is_known():
    """Where no name is near, all are listed."""
    with pytest.raises(SpaceError, match="known: coverage_targets, tau_ranges"):
        named_space("zzz")


def test_a_space_that_was_read_is_given_back():
    """A Space is passed through."""
    space = Space("mine", {"a": Const(1)})
    assert parse_space(space) is space
