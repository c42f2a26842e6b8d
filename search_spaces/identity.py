"""What makes two configs the same: one canonical text per config, and its hash.

The text does not depend on key order, on the machine, on the process, or on whether a number was written 1 or
1.0.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

CONFIG_ID_DIGITS = 12
SCENARIO_DIGITS = 8
_AS_IT_IS = frozenset({bool, int, str})


def canonical_json(config: Mapping[str, Any]) -> str:
    """ASCII JSON with sorted keys and no spaces, equal for configs that hold equal values.

    Whole floats are written as integers (1.0 and -0.0 as 1 and 0), other floats with the fewest digits that
    read back to the same double. Raises ValueError, naming the key, for NaN, infinities and values that are
    not plain.

    >>> canonical_json({"b": 1.0, "a": [0.1, None, True]})
    '{"a":[0.1,null,true],"b":1}'
    """
    plain = _canonical(config, "config")
    return json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def config_id(config: Mapping[str, Any]) -> str:
    """The first 12 hexadecimal digits of the SHA-256 of the canonical text, the same on every machine."""
    return hashlib.sha256(canonical_json(config).encode("ascii")).hexdigest()[:CONFIG_ID_DIGITS]


def trial_id(config_id: str, seed: int) -> str:
    """The name of a config trained with one seed.

    >>> trial_id("0123456789ab", 3)
    '0123456789ab-s3'
    """
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ValueError(f"seed must be an integer, got {seed=!r}")
    return f"{config_id}-s{seed}"


def scenario_name(task: str, params: Mapping[str, Any]) -> str:
    """The name of a task with these parameters: the task's alone where it has none, else with their hash.

    >>> scenario_name("dose", {}), scenario_name("dose", {"size": "quick"})
    ('dose', 'dose-b4f74e00')
    """
    return f"{task}-{config_id(params)[:SCENARIO_DIGITS]}" if params else task


def _canonical(value: object, where: str) -> Any:
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{where} must be finite, got {value!r}")
        return int(value) if value.is_integer() else float(value)
    if isinstance(value, Mapping):
        held = {}
        for key, item in value.items():
            if not isinstance(key, str):
                raise ValueError(f"{where} must have text keys, got {key!r}")
            # Nearly all values are these; a place for the message is made up for the others alone.
            if item is None or type(item) in _AS_IT_IS:
                held[key] = item
            else:
                held[key] = _canonical(item, f"{where}[{key!r}]")
        return held
    if isinstance(value, list | tuple):
        return [_canonical(item, f"{where}[{i}]") for i, item in enumerate(value)]
    raise ValueError(f"{where} must be a number, text, true, false, null, list or mapping, got {value!r}")
