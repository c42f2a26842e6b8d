"""The recorded behaviour of the reference system, as plain numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

_VECTORS = Path(__file__).parent / "data" / "vectors_scm.json"
_GUARD_VECTORS = Path(__file__).parent / "data" / "vectors_rlan.json"
_WORDS = {"inf": float("inf"), "-inf": float("-inf"), "nan": float("nan")}


def _decode(value: Any) -> Any:
    if isinstance(value, str):
        return _WORDS.get(value, value)
    if isinstance(value, list):
        return [_decode(item) for item in value]
    if isinstance(value, dict):
        return {key: _decode(item) for key, item in value.items()}
    return value


@pytest.fixture(scope="session")
def decode_numbers() -> Callable[[Any], Any]:
    """Turn the words "inf", "-inf" and "nan" of a recorded case into floats, at any depth."""
    return _decode


@pytest.fixture(scope="session")
def vector_group() -> Callable[[str], list[dict[str, Any]]]:
    """Read the recorded cases of one group; numbers still as written (see `decode_numbers`)."""
    groups = json.loads(_VECTORS.read_text(encoding="utf-8"))["groups"]

    def read(name: str) -> list[dict[str, Any]]:
        return list(groups[name]["cases"])

    return read


@pytest.fixture(scope="session")
def guard_vectors() -> dict[str, Any]:
    """Read what is recorded of the stability guards, by group; "nan", "inf" and "-inf" are floats."""
    vectors: dict[str, Any] = _decode(json.loads(_GUARD_VECTORS.read_text(encoding="utf-8")))
    return vectors
