"""YAML files as plain values, with the place of each so that an error can name file, line and column."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from harness.errors import UserError, one_line

KeyPath = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Document:
    """One YAML file: its values as plain Python ones, and where each key and value stands (from 1)."""

    path: Path
    values: Any
    key_places: Mapping[KeyPath, tuple[int, int]] = field(default_factory=dict)
    value_places: Mapping[KeyPath, tuple[int, int]] = field(default_factory=dict)

    def value_at(self, at: KeyPath) -> Any:
        """The plain value at a path, or None where there is none."""
        node = self.values
        for part in at:
            in_list = isinstance(node, list) and isinstance(part, int) and part < len(node)
            if not in_list and not (isinstance(node, dict) and part in node):
                return None
            node = node[part]
        return node

    def place(self, at: KeyPath, *, key: bool = False) -> str:
        """`file:line:column` of the value (or its key) at the path, or of the nearest part that is there."""
        for stop in range(len(at), -1, -1):
            part = at[:stop]
            first, second = (
                (self.key_places, self.value_places) if key else (self.value_places, self.key_places)
            )
            found = first.get(part) or second.get(part)
            if found is not None:
                return f"{self.path}:{found[0]}:{found[1]}"
        return f"{self.path}:1:1"


def read_yaml(path: Path) -> Document:
    """Read one YAML 1.2 file; a missing, unreadable or malformed one is a `UserError` with its place."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    keys: dict[KeyPath, tuple[int, int]] = {}
    values: dict[KeyPath, tuple[int, int]] = {}
    try:
        plain = to_plain(YAML(typ="rt", pure=True).load(text), (), keys, values)
    except RecursionError:
        raise UserError(f"{path}: nested too deeply, or an anchor that holds itself") from None
    except DuplicateKeyError as error:
        raise UserError(f"{marked_place(path, error)}: {one_line(error.problem)}") from None
    except MarkedYAMLError as error:
        raise UserError(
            f"{marked_place(path, error)}: not YAML: {one_line(error.problem or error)}"
        ) from None
    except YAMLError as error:
        raise UserError(f"{path}: not YAML: {one_line(error)}") from None
    except Exception as error:  # a tag or a form that does not fit: !!int x, 2001-99-99, a list in a key
        raise UserError(f"{path}: a value cannot be read: {one_line(error)}") from None
    return Document(path, plain, keys, values)


def marked_place(path: Path, error: MarkedYAMLError) -> str:
    """`file:line:column` of a YAML error."""
    mark = error.problem_mark or error.context_mark
    return f"{path}:{mark.line + 1}:{mark.column + 1}" if mark is not None else str(path)


def to_plain(
    node: Any,
    at: KeyPath,
    keys: dict[KeyPath, tuple[int, int]],
    values: dict[KeyPath, tuple[int, int]],
) -> Any:
    """The node as dict, list, str, int, float, bool or None; places met on the way go into the two maps."""
    if isinstance(node, CommentedMap):
        plain = {}
        for key, value in node.items():
            inner = (*at, plain_scalar(key))
            if key in node.lc.data:
                line, column, value_line, value_column = node.lc.data[key]
                keys[inner] = (line + 1, column + 1)
                values[inner] = (value_line + 1, value_column + 1)
            else:  # merged in by <<, it has no place of its own
                keys[inner] = values[inner] = values.get(at, (1, 1))
            plain[inner[-1]] = to_plain(value, inner, keys, values)
        return plain
    if isinstance(node, CommentedSeq):
        for index in range(len(node)):
            line, column = node.lc.item(index)
            values[(*at, index)] = (line + 1, column + 1)
        return [to_plain(value, (*at, index), keys, values) for index, value in enumerate(node)]
    return plain_scalar(node)


def plain_scalar(value: Any) -> Any:
    """A YAML scalar without the wrapper that remembers how it was written."""
    if isinstance(value, bool) or value is None:
        return value
    if type(value).__name__ == "ScalarBoolean":
        return bool(value)
    for kind in (int, float, str):
        if isinstance(value, kind):
            return kind(value)
    return str(value)  # dates: kept as they are spelled


def write_yaml(values: Any) -> str:
    """The values as YAML text that `read_yaml` reads back unchanged."""
    yaml = YAML(typ="rt", pure=True)
    yaml.default_flow_style = False
    yaml.width = 100
    stream = io.StringIO()
    yaml.dump(yaml_values(values), stream)
    return stream.getvalue()


def yaml_values(values: Any) -> Any:
    """The values with each short list of scalars marked to be written on one line."""
    if isinstance(values, Mapping):
        return {key: yaml_values(value) for key, value in values.items()}
    if isinstance(values, Sequence) and not isinstance(values, str):
        items = CommentedSeq([yaml_values(value) for value in values])
        if not any(isinstance(value, Mapping | CommentedSeq) for value in items):
            items.fa.set_flow_style()
        return items
    return values
