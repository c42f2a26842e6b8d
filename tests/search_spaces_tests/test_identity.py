"""The identity of a config: equal for equal settings, the same in every process and on every machine."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from search_spaces.identity import canonical_json, config_id, scenario_name, trial_id
from search_spaces.named import SPACES

PLAIN = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
)
CONFIGS = st.dictionaries(st.text(min_size=1), PLAIN, max_size=6)


@given(CONFIGS, st.randoms())
def test_the_order_of_keys_does_not_matter(config, random):
    """A shuffled config has the same text and the same id."""
    items = list(config.items())
    random.shuffle(items)
    assert canonical_json(dict(items)) == canonical_json(config)
    assert config_id(dict(items)) == config_id(config)


@given(CONFIGS)
def test_the_text_reads_back_to_equal_values(config):
    """Nothing of a config is lost in its text."""
    assert json.loads(canonical_json(config)) == config
    assert canonical_json(config).isascii()


@given(st.integers(-(2**53), 2**53))
def test_a_whole_float_and_an_integer_are_one_setting(number):
    """1 and 1.0 give one id, -0.0 and 0 as well."""
    assert config_id({"a": number}) == config_id({"a": float(number)})
    assert config_id({"a": -0.0}) == config_id({"a": 0})


@pytest.mark.parametrize(
    "left, right", [(1, True), (0, False), (1, "1"), (None, "null"), (0.1, 0.1000000001)]
)
def test_different_settings_have_different_ids(left, right):
    """A boolean is not a number, a number is not text, and digits count."""
    assert config_id({"a": left}) != config_id({"a": right})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_numbers_that_are_not_finite_are_refused(value):
    """A config cannot hold NaN or infinities; the message names the key, however deep."""
    with pytest.raises(ValueError, match=r"config\['task'\]\[0\]\['x'\] must be finite"):
        canonical_json({"task": [{"x": value}]})


def test_what_is_not_plain_is_refused():
    """Objects and keys that are not text have no canonical form."""
    with pytest.raises(ValueError, match="must be a number, text"):
        canonical_json({"a": {1, 2}})
    with pytest.raises(ValueError, match="must have text keys, got 1"):
        canonical_json({1: 2})


PINNED = [
    ({}, "44136fa355b3"),
    ({"learning_rate": 1e-3, "optimizer": "adam", "batch_size": 32, "clip_norm": None}, "d425304e2883"),
    ({"nesterov": True, "momentum": 0.9, "weight_decay": 1e-06, "max_epochs": 20.0}, "56d8a0ccf743"),
    (
        {"task.data": "données/é.csv", "task.inputs": ["a", "b"], "tau_infer": 2.2250738585072014e-308},
        "707909f4ffb6",
    ),
]


@pytest.mark.parametrize("config, expected", PINNED, ids=["empty", "plain", "numbers", "nested"])
def test_ids_are_pinned(config, expected):
    """These ids never change: stored rows are found by them."""
    assert config_id(config) == expected


@pytest.mark.parametrize("hash_seed", ["0", "1", "4711"])
def test_another_process_gives_the_same_ids(hash_seed):
    """Neither the process nor its hash seed changes an id or what a point of the cube is."""
    program = (
        "from search_spaces.identity import config_id; from search_spaces.named import SPACES\n"
        "for n, space in SPACES.items(): print(n, config_id(space.sample([0.37] * len(space.dimensions))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=True,
    )
    here = [
        f"{name} {config_id(space.sample([0.37] * len(space.dimensions)))}" for name, space in SPACES.items()
    ]
    assert done.stdout.split("\n")[:-1] == here


def test_a_trial_is_named_by_config_and_seed():
    """The trial id is config_id, then the seed; a seed that is no integer is refused."""
    assert trial_id("0123456789ab", 7) == "0123456789ab-s7"
    with pytest.raises(ValueError, match="seed must be an integer"):
        trial_id("0123456789ab", True)


@given(CONFIGS, CONFIGS)
def test_tasks_with_other_parameters_are_other_scenarios(one, other):
    """A scenario is named by its task and all its parameters; without any, by the task alone."""
    assert (scenario_name("toy", one) == scenario_name("toy", other)) == (one == other or not (one or other))
    assert scenario_name("toy", one).startswith("toy")
    assert (scenario_name("toy", one) == "toy") == (not one)
