"""Parquet files that are whole or not there, and the writer that adds rows to a folder of them.

A fragment is one file of one writer. It is written beside its name with the suffix `.tmp`, forced to the
disk, and renamed over the earlier fragment; a process killed at any moment leaves the earlier one readable.
What the columns mean is decided in `schema`.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from reports.schema import KIND_KEY, PACKAGE_KEY, SCHEMA_VERSION, VERSION_KEY, nearest_name

FRAGMENT_ROWS = 500
# A flush that costs less than this is made at every append; a dearer one at most every FLUSH_INTERVAL_S.
CHEAP_FLUSH_S = 0.25
FLUSH_INTERVAL_S = 1.0
# Python types whose values need no conversion, by column type.
_USUAL: tuple[tuple[Callable[[pa.DataType], bool], type], ...] = (
    (pa.types.is_floating, float),
    (pa.types.is_integer, int),
    (pa.types.is_boolean, bool),
    (pa.types.is_string, str),
)
# What pyarrow raises for a file that is not whole Parquet; the last of a damaged column name.
UNREADABLE = (pa.ArrowException, OSError, UnicodeDecodeError)


class RunReadError(ValueError):
    """A run folder, or a file in it, that cannot be read as what it should be; the message names it."""


@dataclass(frozen=True, slots=True)
class Footer:
    """A fragment by what stands at its end: its columns, and the number of rows of each of its row groups."""

    path: Path
    schema: pa.Schema
    groups: tuple[int, ...]

    @property
    def rows(self) -> int:
        """How many rows the fragment has."""
        return sum(self.groups)


class FragmentWriter:
    """Appends typed rows to a folder; what was flushed survives the death of the process.

    The writer rewrites its current fragment while it holds fewer than 500 rows, then opens the next one.
    `append` flushes at once where that is cheap, else at most once a second (`flush_if_due` does the same
    from a clock, for rows that wait while no other row comes); `append_all`, `flush` and `close` always do.

    key         columns whose values together may occur once in the folder; () for no such rule
    fill_nan    says of a float column whether a missing value is NaN (measured) or null
    open_type   says which type a column unknown to the schema gets, or None to refuse it
    """

    def __init__(
        self,
        folder: Path,
        writer_id: str,
        schema: pa.Schema,
        *,
        key: tuple[str, ...],
        fill_nan: Callable[[str], bool],
        open_type: Callable[[str], pa.DataType | None],
        flush_every_append: bool = True,
    ) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", writer_id):
            raise ValueError(
                f"writer_id must be letters, digits, '_', '-' or '.', as it names files, got {writer_id=}"
            )
        self._folder = Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._writer_id = writer_id
        self._schema = _with_package_version(schema)
        self._key = key
        self._fill_nan = fill_nan
        self._open_type = open_type
        self._flush_every_append = flush_every_append
        self._cells = {field.name: self._cell(field) for field in self._schema}
        self._rows: list[list[Any]] = []  # of the current fragment, flushed ones included
        self._unflushed = 0
        self._flush_cost_s = 0.0
        self._flushed_at_s = -float("inf")
        self._closed = False
        self._number = self._first_free_number()
        self._seen = self._written_keys() if key else set()

    @property
    def schema(self) -> pa.Schema:
        """The schema of the next flush; it grows when a row brings a column that may be added."""
        return self._schema

    def append(self, row: Mapping[str, Any]) -> None:
        """Takes one row; it is on the disk when this returns, or within a second of the next call.

        Raises ValueError for an unknown column (naming the nearest known one), a value of another type than
        the column's (an int is taken as a float, nothing else is converted), a missing required value, and a
        key that the folder already holds. A refused row changes nothing.
        """
        self._take(row)
        cheap = self._flush_every_append and self._flush_cost_s < CHEAP_FLUSH_S
        if cheap or len(self._rows) >= FRAGMENT_ROWS:
            self.flush()
        else:
            self.flush_if_due()

    def append_all(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Takes rows that came together, and flushes whenever a fragment is full and when all are taken.

        A row that is refused, as by `append`, raises; those before it are taken, and on the disk.
        """
        try:
            for row in rows:
                self._take(row)
                # What Parquet needs to write a file grows with its rows, and is never given back.
                if len(self._rows) >= FRAGMENT_ROWS:
                    self.flush()
        finally:
            self.flush()

    def flush_if_due(self) -> None:
        """Flushes when rows wait and the last flush is a second or more ago."""
        if self._unflushed and time.monotonic() - self._flushed_at_s >= FLUSH_INTERVAL_S:
            self.flush()

    def flush(self) -> None:
        """Puts every appended row on the disk before it returns; an OSError leaves the earlier file whole."""
        if not self._unflushed:
            return
        started_s = time.monotonic()
        columns = zip(*self._rows, strict=True)
        arrays = [pa.array(column, type=f.type) for f, column in zip(self._schema, columns, strict=True)]
        table = pa.Table.from_arrays(arrays, schema=self._schema)
        write_table_atomically(table, self._fragment(self._number))
        self._unflushed = 0
        if len(self._rows) >= FRAGMENT_ROWS:
            self._rows = []
            self._number += 1
        self._flushed_at_s = time.monotonic()
        self._flush_cost_s = self._flushed_at_s - started_s

    def close(self) -> None:
        """Flushes what waits; the writer takes no more rows."""
        self.flush()
        self._closed = True

    def __enter__(self) -> FragmentWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _take(self, row: Mapping[str, Any]) -> None:
        if self._closed:
            raise ValueError(f"writer {self._writer_id} is closed; rows must be appended before close()")
        cells = self._cells
        opened = {name: self._opened(name) for name in row if name not in cells}
        if opened:
            cells = cells | {name: self._cell(field) for name, field in opened.items()}
        typed = []
        for name, (usual, missing, field) in cells.items():
            value = row.get(name)
            typed.append(value if type(value) is usual else self._parse_value(field, value, missing))
        if self._key:
            key = tuple(typed[self._schema.get_field_index(name)] for name in self._key)
            if key in self._seen:
                shown = ", ".join(f"{name}={value}" for name, value in zip(self._key, key, strict=True))
                raise ValueError(f"a row may be written once, got {shown} again")
            self._seen.add(key)
        for name, field in opened.items():
            self._schema = self._schema.append(field)
            for taken in self._rows:
                taken.append(cells[name][1])
        self._cells = cells
        self._rows.append(typed)
        self._unflushed += 1

    def _opened(self, name: str) -> pa.Field:
        kind = self._open_type(name)
        if kind is None:
            raise ValueError(f"unknown column {name}{nearest_name(name, self._schema.names)}")
        return pa.field(name, kind)

    def _cell(self, field: pa.Field) -> tuple[type | None, Any, pa.Field]:
        """What a column's values are: the Python type that needs no look, what stands for none, the field."""
        usual = next((kind for holds, kind in _USUAL if holds(field.type)), None)
        missing = float("nan") if pa.types.is_floating(field.type) and self._fill_nan(field.name) else None
        return usual, missing, field

    def _parse_value(self, field: pa.Field, value: Any, missing: Any) -> Any:
        if isinstance(value, np.generic):
            value = value.item()
        if value is None:
            if not field.nullable:
                raise ValueError(f"column {field.name} must have a value in every row, got None")
            return missing
        return check_value(field, value)

    def _fragment(self, number: int) -> Path:
        return self._folder / f"{self._writer_id}-{number:05d}.parquet"

    def _first_free_number(self) -> int:
        pattern = re.compile(re.escape(self._writer_id) + r"-(\d{5,})\.parquet(\.tmp)?")
        numbers = [-1]
        for path in self._folder.iterdir():
            found = pattern.fullmatch(path.name)
            if found and found.group(2):
                path.unlink()  # what a killed writer of this name left half written
            elif found:
                numbers.append(int(found.group(1)))
        return max(numbers) + 1

    def _written_keys(self) -> set[tuple[Any, ...]]:
        keys: set[tuple[Any, ...]] = set()
        for path in fragment_paths(self._folder):
            table = read_fragment(path, kind=self._schema.metadata[KIND_KEY].decode(), columns=self._key)
            keys.update(zip(*(table.column(name).to_pylist() for name in self._key), strict=True))
        return keys


def check_value(field: pa.Field, value: Any) -> Any:
    """The value as the column stores it; ValueError naming column and value if it is of another type."""
    kind = field.type
    if pa.types.is_floating(kind) and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if pa.types.is_integer(kind) and isinstance(value, int) and not isinstance(value, bool):
        return value
    if pa.types.is_boolean(kind) and isinstance(value, bool):
        return value
    if pa.types.is_string(kind) and isinstance(value, str):
        return value
    if pa.types.is_list(kind) and isinstance(value, list | tuple):
        inner = pa.field(field.name, kind.value_type)
        return [check_value(inner, item) for item in value]
    if pa.types.is_timestamp(kind) and isinstance(value, datetime):
        if value.utcoffset() is None:
            raise ValueError(f"column {field.name} must be a time with its zone, got {value!r}")
        return value
    raise ValueError(f"column {field.name} must be {kind}, got {value!r} of type {type(value).__name__}")


def write_table_atomically(table: pa.Table, path: Path) -> None:
    """Replaces `path` by the table as zstd Parquet with page checksums; a reader never sees a part of it.

    Columns of floats have no statistics. Those of Parquet leave NaN out, and a reader that is handed a filter
    such as `x != 0` would pass over every row of a file in which all numbers are 0, NaN among them.
    """
    described = [field.name for field in table.schema if not pa.types.is_floating(field.type)]

    def write(handle: Any) -> None:
        pq.write_table(
            table, handle, compression="zstd", write_page_checksum=True, write_statistics=described or False
        )

    _replace_atomically(path, write)


def write_json_atomically(value: Any, path: Path) -> None:
    """Replaces `path` by the value as indented JSON; a reader never sees a part of it."""
    write_text_atomically(json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n", path)


def write_text_atomically(text: str, path: Path) -> None:
    """Replaces `path` by the text as UTF-8; a reader never sees a part of it."""
    _replace_atomically(path, lambda handle: handle.write(text.encode()))


def fragment_paths(folder: Path) -> list[Path]:
    """The folder's fragments by name; half-written ones (`.tmp`) are not among them."""
    return sorted(folder.glob("*.parquet"))


def read_fragment(path: Path, *, kind: str, columns: Iterable[str] | None = None) -> pa.Table:
    """One fragment of that kind ("rows", "history"); RunReadError naming the file if it is anything else."""
    try:
        # Opened as a file, not as a data set: that machinery costs more than the small files themselves.
        source = pa.BufferReader(path.read_bytes())
        with pq.ParquetFile(source, page_checksum_verification=True) as file:
            table = file.read(columns=None if columns is None else list(columns), use_threads=True)
    except UNREADABLE as error:
        raise unreadable(path, error) from error
    _check_stamp(path, table.schema, kind)
    return table


def read_footer(path: Path, *, kind: str) -> Footer:
    """What a fragment of that kind says of itself at its end; errors as for `read_fragment`.

    >>> Footer(Path("part.parquet"), pa.schema([]), (3, 4)).rows
    7
    """
    try:
        with pq.ParquetFile(path) as file:
            groups = tuple(file.metadata.row_group(index).num_rows for index in range(file.num_row_groups))
            schema = file.schema_arrow
    except UNREADABLE as error:
        raise unreadable(path, error) from error
    _check_stamp(path, schema, kind)
    return Footer(path, schema, groups)


def read_footers(folder: Path, *, kind: str) -> list[Footer]:
    """The footer of every fragment of the folder, by name; RunReadError also where there is none."""
    footers: list[Footer] = []
    for path in fragment_paths(folder):
        footer = read_footer(path, kind=kind)
        # One schema for all fragments that are alike: twenty thousand of them would fill the memory.
        if footers and footer.schema.equals(footers[-1].schema):
            footer = replace(footer, schema=footers[-1].schema)
        footers.append(footer)
    if not footers:
        raise RunReadError(f"{folder} holds no {kind}")
    return footers


def merge_schemas(footers: Iterable[Footer]) -> pa.Schema:
    """The columns of all fragments together; RunReadError for a column whose types do not fit."""
    merged: pa.Schema | None = None
    last: pa.Schema | None = None
    for footer in footers:
        if footer.schema is not last:  # most fragments of a run are alike, and merging is dear
            merged = _merge_fragment(merged, footer.schema, footer.path)
            last = footer.schema
    if merged is None:
        raise ValueError("there must be at least one fragment, got none")
    return merged


def unreadable(path: Path, error: BaseException) -> RunReadError:
    """The error of a file that is not whole Parquet; the message names it."""
    return RunReadError(f"{path} cannot be read as Parquet: {' '.join(str(error).split())}")


def _check_stamp(path: Path, schema: pa.Schema, kind: str) -> None:
    stamp = schema.metadata or {}
    if stamp.get(KIND_KEY) != kind.encode():
        raise RunReadError(f"{path} does not hold {kind} written by scm-harness")
    version = stamp.get(VERSION_KEY, b"").decode(errors="replace")
    if not version.isdigit() or int(version) > SCHEMA_VERSION:
        raise RunReadError(
            f"{path} has schema version {version or 'none'}, this scm-harness reads up to {SCHEMA_VERSION}"
        )


def read_fragments(folder: Path, *, kind: str) -> pa.Table:
    """Every fragment of the folder as one table with the columns of all, null where a fragment lacks one.

    Raises RunReadError for a fragment that cannot be read or whose column has a type that does not fit the
    others' (int beside float is float).
    """
    tables: list[pa.Table] = []
    merged: pa.Schema | None = None
    for path in fragment_paths(folder):
        table = read_fragment(path, kind=kind)
        merged = _merge_fragment(merged, table.schema, path)
        tables.append(table)
    if merged is None:
        raise RunReadError(f"{folder} holds no {kind}")
    return pa.concat_tables(tables, promote_options="permissive").replace_schema_metadata(merged.metadata)


def _merge_fragment(merged: pa.Schema | None, schema: pa.Schema, path: Path) -> pa.Schema:
    if merged is None:
        return schema
    try:
        both = pa.unify_schemas([merged, schema], promote_options="permissive")
    except pa.ArrowException as error:
        reason = " ".join(str(error).split())
        raise RunReadError(f"{path} does not fit the fragments before it: {reason}") from error
    return both.with_metadata(merged.metadata)


def _replace_atomically(path: Path, write: Callable[[Any], Any]) -> None:
    beside = path.with_name(path.name + ".tmp")
    try:
        with open(beside, "wb") as handle:
            write(handle)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    # The rename itself is on the disk only when the folder is.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _with_package_version(schema: pa.Schema) -> pa.Schema:
    try:
        version = metadata.version("scm-harness")
    except metadata.PackageNotFoundError:
        version = "unknown"
    return schema.with_metadata({**(schema.metadata or {}), PACKAGE_KEY: version.encode()})
