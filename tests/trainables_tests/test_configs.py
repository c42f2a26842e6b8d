"""Flat configs are complete and typed before anything runs."""

from __future__ import annotations

import subprocess
import sys

import pytest

from scm.trial_config import KNOBS, TrialConfig
from trainables.configs import KNOB_TYPES, resolve_config


def test_every_default_is_filled_in_and_task_keys_stay() -> None:
    """What the plan leaves out takes its default; what belongs to the task passes through."""
    resolved = resolve_config({"max_epochs": 3, "task": "table", "task.data": "a.csv"})
    assert resolved == TrialConfig(max_epochs=3).to_flat() | {"task": "table", "task.data": "a.csv"}
    assert resolve_config(resolved) == resolved


def test_unknown_knob_names_the_nearest() -> None:
    """A misspelt knob is refused with what was probably meant."""
    with pytest.raises(ValueError, match="unknown knob 'learning_rat'; did you mean 'learning_rate'"):
        resolve_config({"learning_rat": 1e-3})


def test_every_knob_has_a_column_type_that_its_default_fits() -> None:
    """A row can hold every knob as a typed column."""
    kinds = {"float64": float, "int64": int, "string": str, "bool": bool}
    assert set(KNOB_TYPES) == set(KNOBS)
    for name, value in TrialConfig().to_flat().items():
        assert value is None or type(value) is kinds[KNOB_TYPES[name]]


def test_names_and_configs_are_known_without_torch_or_ray() -> None:
    """Listing tasks and filling in configs stays light enough for the command line."""
    code = (
        "import sys, trainables.configs, trainables.tasks.registry\n"
        "assert not {'torch', 'ray'} & set(sys.modules), 'heavy'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
