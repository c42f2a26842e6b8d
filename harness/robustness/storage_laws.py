"""Laws of files: what was written is read, a filter keeps what Python would, and damage is told."""

from __future__ import annotations

import math
import operator
import struct
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from harness.robustness.law import BrokenLawError, Case, Property, Subject, library_law
from harness.robustness.same import first_difference

# --- 27: Parquet ----------------------------------------------------------------------------------------

EDGES = (
    0.0,
    -0.0,
    math.nan,
    math.inf,
    -math.inf,
    5e-324,
    -5e-324,
    2.2250738585072014e-308,
    1.7976931348623157e308,
    1.0,
)
OPERATORS: Mapping[str, Callable[[Any, Any], bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}

_floats = st.sampled_from(EDGES) | st.floats(width=64)


def _columns(*, least: int = 0) -> SearchStrategy[dict[str, Any]]:
    """Columns of a few rows, drawn row by row, so that a row can be left out of a case."""
    # Any bits are a float: NaN with every payload and sign among them.
    bits = _floats.map(_bits_of) | st.integers(-(2**63), 2**63 - 1)
    whole = st.integers(-(2**63), 2**63 - 1)
    others = st.tuples(
        st.booleans(), st.none() | st.text(max_size=5), st.none() | st.booleans(), st.none() | whole
    )
    # A plain row is four choices: Hypothesis takes out of a case at most five that follow each other.
    row = st.tuples(bits, st.just((False, None, None, None)) | others)
    rows = st.lists(row.map(lambda drawn: (drawn[0], *drawn[1])), min_size=least, max_size=8)
    return st.tuples(rows, st.text(max_size=8)).map(lambda drawn: _by_column(*drawn))


def _by_column(rows: Sequence[tuple[Any, ...]], note: str) -> dict[str, Any]:
    bits, missing, text, flag, count = ([row[place] for row in rows] for place in range(5))
    x = torch.tensor(bits, dtype=torch.int64).view(torch.float64)
    return {"x": x, "missing": missing, "text": text, "flag": flag, "count": count, "note": note}


def _bits_of(value: float) -> int:
    return int(struct.unpack("q", struct.pack("d", value))[0])


def _table(columns: Mapping[str, Any], first: int = 0) -> Any:
    import pyarrow as pa

    from reports.schema import row_schema

    stamp = {**row_schema({}).metadata, b"note": columns["note"].encode()}
    schema = pa.schema(
        [
            pa.field("n", pa.int64(), nullable=False, metadata={"meaning": columns["note"], "unit": "rows"}),
            pa.field("x", pa.float64()),
            pa.field("text", pa.string()),
            pa.field("flag", pa.bool_()),
            pa.field("count", pa.int64()),
        ],
        metadata=stamp,
    )
    rows = len(columns["missing"])
    arrays = [
        pa.array(range(first, first + rows), type=pa.int64()),
        pa.array(columns["x"].numpy(), mask=torch.tensor(columns["missing"], dtype=torch.bool).numpy()),
        *(pa.array(columns[name], type=schema.field(name).type) for name in ("text", "flag", "count")),
    ]
    return pa.Table.from_arrays(arrays, schema=schema)


def _float_bits(table: Any) -> list[int | None]:
    import pyarrow as pa

    column = table.column("x").combine_chunks()
    chunk = column.chunk(0) if isinstance(column, pa.ChunkedArray) else column
    if not len(chunk):
        return []
    bits = chunk.fill_null(0.0).to_numpy().view("int64").tolist()
    return [bit if there else None for bit, there in zip(bits, chunk.is_valid().to_pylist(), strict=True)]


def _survives_writing(subject: Subject, case: Case) -> None:
    table = _table(case)
    with tempfile.TemporaryDirectory(prefix="law-") as folder:
        path = Path(folder) / "a.parquet"
        subject.write_table(table, path)
        back = subject.read_table(path)
    differs = _table_difference(back, table)
    if differs is not None:
        raise BrokenLawError(f"what is read must be what was written: {differs}")


def _table_difference(back: Any, table: Any) -> str | None:
    if not back.schema.equals(table.schema, check_metadata=True):
        return "the schema or its metadata is another"
    bits = first_difference(_float_bits(back), _float_bits(table))
    if bits is not None:
        return f"a float {bits}"
    for name in ("n", "text", "flag", "count"):
        differs = first_difference(back.column(name).to_pylist(), table.column(name).to_pylist())
        if differs is not None:
            return f"{name} {differs}"
    return None


@st.composite
def _filters(draw: st.DrawFn) -> dict[str, Any]:
    parts = draw(st.lists(_columns(least=1), min_size=1, max_size=3))
    held = [value for part in parts for value in part["x"].tolist()]
    usual = st.floats(allow_nan=False)
    finite_edges = st.sampled_from([edge for edge in EDGES if edge == edge])
    there = [value for value in held if value == value]
    value = draw(st.sampled_from(there) | usual if there else finite_edges | usual)
    return {"parts": parts, "operator": draw(st.sampled_from(sorted(OPERATORS))), "value": value}


def _filter_is_pythons(subject: Subject, case: Case) -> None:
    right: list[int] = []
    with tempfile.TemporaryDirectory(prefix="law-") as folder:
        first = 0
        for number, part in enumerate(case["parts"]):
            subject.write_table(_table(part, first), Path(folder) / f"{number}.parquet")
            for value, missing in zip(part["x"].tolist(), part["missing"], strict=True):
                if not missing and OPERATORS[case["operator"]](value, case["value"]):
                    right.append(first)
                first += 1
        found = subject.read_where(Path(folder), "x", case["operator"], case["value"])
    if found != right:
        raise BrokenLawError(
            f"x {case['operator']} {case['value']!r} must keep rows {right}, it keeps {found}"
        )


def _damages(subject: Subject) -> SearchStrategy[Case]:
    return st.fixed_dictionaries(
        {
            "columns": _columns(least=1),
            # From the start, where the values are, or from the end, where the file says what it holds.
            "at": st.integers(0, 300) | st.integers(-300, -1),
            "bit": st.integers(-1, 7),  # -1: the file ends there
        }
    )


def _damage_is_told(subject: Subject, case: Case) -> None:
    table = _table(case["columns"])
    with tempfile.TemporaryDirectory(prefix="law-") as folder:
        path = Path(folder) / "a.parquet"
        subject.write_table(table, path)
        whole = path.read_bytes()
        content = bytearray(whole)
        at = case["at"] % len(content)
        if case["bit"] < 0:
            del content[at:]
        else:
            content[at] ^= 1 << case["bit"]
        path.write_bytes(content)
        try:
            back = subject.read_table(path)
        except subject.read_refusal:
            return
    footer = len(whole) - 8 - struct.unpack("<I", whole[-8:-4])[0]
    if case["bit"] >= 0 and at >= footer:
        return  # it has no checksum in Parquet: a name or a note in it may be read as another
    differs = _table_difference(back, table)
    if differs is not None:
        raise BrokenLawError(f"a file damaged at byte {at} must be refused, or read as it was: {differs}")


STORAGE_LAWS: tuple[Property, ...] = (
    library_law(
        "parquet_keeps_every_bit",
        27,
        "Schema, metadata, nulls and the bits of every float survive writing and reading.",
        ("write_table", "read_table"),
        lambda subject: _columns(),
        _survives_writing,
    ),
    library_law(
        "filter_is_pythons",
        27,
        "The rows that a filter handed to the Parquet reader keeps are those that Python's comparison keeps.",
        ("write_table", "read_where"),
        lambda subject: _filters(),
        _filter_is_pythons,
    ),
    library_law(
        "damage_is_told",
        27,
        "A file that was cut short, or has one bit of its values flipped, is refused or reads as it was; a "
        "flip in its footer is refused or read, and nothing else is raised.",
        ("write_table", "read_table", "read_refusal"),
        _damages,
        _damage_is_told,
    ),
)
