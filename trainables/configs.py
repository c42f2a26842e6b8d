"""Flat configs with every default filled in, and the column type of each knob.

What a knob is, its default and its rules are decided in `scm.trial_config`; this needs no torch either.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from scm.trial_config import KNOBS, TrialConfig

_COLUMN_TYPES = {"float": "float64", "int": "int64", "str": "string", "bool": "bool"}

# The type of the column `config.<name>` of each knob, in the words of Arrow.
KNOB_TYPES: dict[str, str] = {name: _COLUMN_TYPES[knob.type] for name, knob in KNOBS.items()}


def is_task_key(name: str) -> bool:
    """Tell whether a key of a flat config belongs to the task and not to the training."""
    return name == "task" or name.startswith("task.")


def resolve_config(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Fill in the default of every knob that `flat` does not name; keys of the task are kept as they are.

    Raises ValueError or TypeError for an unknown knob or a value that breaks its rule.

    >>> resolve_config({"max_epochs": 3, "task.data": "a.csv"})["task.data"]
    'a.csv'
    """
    return parse_config(flat)[1]


def parse_config(flat: Mapping[str, Any]) -> tuple[TrialConfig, dict[str, Any]]:
    """Give a config as a training takes it, and as `resolve_config` gives it; raises as that does."""
    config = TrialConfig.from_flat(flat)
    resolved: dict[str, Any] = dict(config.to_flat())
    resolved.update({name: value for name, value in flat.items() if is_task_key(name)})
    return config, resolved


def resolve_and_activate(flat: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Give what `resolve_config` and `active_knobs` give, looking at each value once; raises as they do."""
    _, resolved = parse_config(flat)
    return resolved, {name: resolved[name] for name in KNOBS if KNOBS[name].is_active(resolved)}


def active_knobs(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Give those knobs of a config that change its training, defaults filled in (no beta1 under sgd).

    Raises as `resolve_config` does.
    """
    return dict(TrialConfig.from_flat(flat).active())
