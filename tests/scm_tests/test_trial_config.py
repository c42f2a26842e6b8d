"""The flat config: one home of every knob, its default and its rules."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import Any

import pytest

from scm.trial_config import GIVEN, KNOBS, POSITIVE, Condition, TrialConfig

NAN, INF = float("nan"), float("inf")


def test_a_config_round_trips_through_plain_values() -> None:
    """What to_flat says, from_flat reads back as an equal config."""
    config = TrialConfig(optimizer="sgd", momentum=0.5, clip_norm=2.0, gradient_policy="project")
    assert TrialConfig.from_flat(config.to_flat()) == config
    assert all(value is None or type(value) in (int, float, bool, str) for value in config.to_flat().values())


def test_every_field_is_a_knob_with_its_type_and_default() -> None:
    """The table of knobs and the dataclass cannot disagree."""
    assert list(KNOBS) == [item.name for item in dataclasses.fields(TrialConfig)]
    for item in dataclasses.fields(TrialConfig):
        knob = KNOBS[item.name]
        assert knob.default == item.default
        assert item.type == (f"{knob.type} | None" if knob.optional else knob.type)
        assert (knob.type == "str") == bool(knob.choices)


def test_conditions_name_knobs_and_values_that_exist() -> None:
    """A condition on a value that cannot be chosen would hide the knob for ever."""
    for knob in KNOBS.values():
        for name, values in knob.active_when.items():
            if isinstance(values, Condition):
                assert KNOBS[name].optional if values is GIVEN else KNOBS[name].type in ("float", "int")
                continue
            assert values
            assert all(not KNOBS[name].choices or value in KNOBS[name].choices for value in values)


def test_active_names_the_knobs_that_matter() -> None:
    """Knobs of another optimizer or head are left out, and only those."""
    adam = TrialConfig().active()
    assert "beta1" in adam
    assert "momentum" not in adam
    sgd = TrialConfig(optimizer="sgd", momentum=0.9, head="multihead").active()
    assert {"momentum", "nesterov", "q_anchor", "numerator_degree"} <= set(sgd)
    assert "beta2" not in sgd


def test_a_condition_may_be_a_rule_on_a_number() -> None:
    """A weight of 0 and a value that is not given make what hangs on them inactive."""
    assert [value in POSITIVE for value in (1e-9, 3, 0, 0.0, None)] == [True, True, False, False, False]
    assert [value in GIVEN for value in (0.0, "clamp", None)] == [True, True, False]


def test_keys_of_the_task_are_passed_over() -> None:
    """A flat config may carry what the task is told."""
    flat = {"task": "table", "task.noise": 0.1, "learning_rate": 0.01}
    assert TrialConfig.from_flat(flat) == TrialConfig(learning_rate=0.01)


@pytest.mark.parametrize(
    ("name", "near"),
    [("learning_rte", "learning_rate"), ("tau_trainmin", "tau_train_min"), ("Optimizer", "optimizer")],
)
def test_an_unknown_key_names_the_nearest_knob(name: str, near: str) -> None:
    """A typo is an error that says what was meant."""
    with pytest.raises(ValueError, match=f"unknown knob '{name}'; did you mean '{near}'"):
        TrialConfig.from_flat({name: 1})


def test_a_key_near_to_nothing_lists_all_knobs() -> None:
    """Where nothing is near, all names are given."""
    with pytest.raises(ValueError, match=r"unknown knob 'zzzz'; known: .*tau_infer"):
        TrialConfig.from_flat({"zzzz": 1})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_epochs", 0),
        ("batch_size", -1),
        ("optimizer", "lion"),
        ("learning_rate", 0.0),
        ("learning_rate", NAN),
        ("learning_rate", INF),
        ("weight_decay", -0.1),
        ("beta1", 1.0),
        ("momentum", 1.0),
        ("clip_norm", 0.0),
        ("target_coverage", 1.01),
        ("coverage_threshold", -0.1),
        ("coverage_temperature", 0.0),
        ("gradient_policy", "clip"),
        ("nonfinite_budget", -1),
        ("hidden_width", 0),
        ("denominator_degree", 0),
        ("tau_infer", 0.0),
    ],
)
def test_a_value_out_of_range_is_refused_by_rule_and_value(name: str, value: Any) -> None:
    """The message holds the rule, the argument and the value."""
    with pytest.raises(ValueError, match=f"{name} must be .*, got {name}="):
        TrialConfig(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_epochs", 2.0),
        ("max_epochs", True),
        ("learning_rate", "0.1"),
        ("nesterov", 1),
        ("optimizer", None),
    ],
)
def test_a_value_of_another_type_is_refused(name: str, value: Any) -> None:
    """Nothing is guessed: not 2 from 2.0, 1 from True, or 0.1 from a string."""
    with pytest.raises(TypeError, match=f"{name} must be of type"):
        TrialConfig(**{name: value})


@pytest.mark.parametrize(
    "values",
    [
        {"tau_train_min": 1e-3, "tau_train_max": 1e-4},
        {"tau_infer": 1e-3},
        {"tau_bottom": 1e-1, "tau_finite": 1e-2},
    ],
    ids=["train range", "infer above train", "bottom above finite"],
)
def test_thresholds_are_in_order(values: dict[str, float]) -> None:
    """tau_infer <= tau_train_min <= tau_train_max, and tau_bottom <= tau_finite."""
    with pytest.raises(ValueError, match="must be <="):
        TrialConfig(**values)


def test_an_int_is_taken_where_a_float_is_asked_for() -> None:
    """Plans write 1 for 1.0; the column stays a float."""
    config = TrialConfig(lambda_sign=2)
    assert config.lambda_sign == 2.0
    assert type(config.lambda_sign) is float


def test_the_module_needs_no_torch() -> None:
    """Search spaces and the command line read the knobs before torch is loaded."""
    code = "import sys, scm.trial_config; raise SystemExit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
