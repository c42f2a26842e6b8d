"""Where two plain values differ: dotted paths, with what stands there on either side."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any


class _Absent:
    def __repr__(self) -> str:
        return "absent"


ABSENT = _Absent()


@dataclass(frozen=True, slots=True)
class Change:
    """A dotted path at which two mappings differ; `ABSENT` where one of them has nothing there."""

    key: str
    one: Any
    other: Any

    def texts(self) -> tuple[str, str]:
        """Both sides as JSON, or the word absent."""
        return _text(self.one), _text(self.other)


def find_changes(one: Any, other: Any, prefix: str = "") -> list[Change]:
    """Every place below `prefix` at which two plain values differ, by path; 1, 1.0 and true are different.

    >>> find_changes({"a": {"b": 1, "c": 2}}, {"a": {"b": 1.5}})
    [Change(key='a.b', one=1, other=1.5), Change(key='a.c', one=2, other=absent)]
    """
    return sorted(_differing(one, other, prefix), key=lambda change: change.key)


def _differing(one: Any, other: Any, prefix: str) -> Iterator[Change]:
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        for key in {**one, **other}:
            if key in one and key in other:
                yield from _differing(one[key], other[key], f"{prefix}{key}.")
            else:
                yield Change(f"{prefix}{key}", one.get(key, ABSENT), other.get(key, ABSENT))
    elif one != other or type(one) is not type(other):
        yield Change(prefix.removesuffix("."), one, other)


def _text(value: Any) -> str:
    return repr(value) if value is ABSENT else json.dumps(value, ensure_ascii=False, default=str)
