"""From a CSV or Parquet file to plain arrays: reading, column kinds, encoding, and who is in which split.

Everything that can be wrong with a file is said here, in one line that names rule, column and value.
What the arrays mean for a model (targets, metrics) is decided in `trainables.tasks.table`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from trainables.tasks.protocol import SPLIT_NAMES, TaskError, nearest

KINDS: tuple[str, ...] = ("numeric", "categorical", "boolean", "date")
MISSING_RULES: tuple[str, ...] = ("error", "mean", "drop")
_MISSING_WORDS = frozenset({"", "na", "n/a", "nan", "null"})  # what a CSV reader takes for an empty cell
_MICROSECONDS_PER_DAY = 86_400_000_000


@dataclass(frozen=True, slots=True)
class InputColumn:
    """One input of a table: numbers, NaN where missing (dates as days), or texts, None where missing."""

    name: str
    kind: str
    values: np.ndarray  # (N,) float64, or object for categorical

    @property
    def missing(self) -> np.ndarray:
        """Tell which rows have no value, as (N,) bool."""
        if self.kind == "categorical":
            return np.array([value is None for value in self.values], dtype=bool)
        missing: np.ndarray = np.isnan(self.values)
        return missing


def read_table(path: Path, text_columns: Iterable[str] = ()) -> pa.Table:
    """Read a CSV or Parquet file (told apart by its ending); `text_columns` of a CSV stay text as written.

    Raises `TaskError` for a missing, unreadable, unknown or empty file.
    """
    if not path.is_file():
        near = [item.name for item in sorted(path.parent.glob("*"))] if path.parent.is_dir() else []
        raise TaskError(f"the data file must exist, got {path}{nearest(path.name, near) if near else ''}")
    ending = path.suffix.lower()
    try:
        if ending in (".parquet", ".pq"):
            table = pq.read_table(path)
        elif ending in (".csv", ".tsv"):
            table = pacsv.read_csv(
                path,
                parse_options=pacsv.ParseOptions(delimiter="\t" if ending == ".tsv" else ","),
                convert_options=pacsv.ConvertOptions(
                    column_types=dict.fromkeys(text_columns, pa.string()), strings_can_be_null=True
                ),
            )
        else:
            raise TaskError(f"the data file must end in .csv, .tsv, .parquet or .pq, got {path}")
        names = table.column_names
    except UnicodeDecodeError as error:
        raise TaskError(f"the names of the columns must be UTF-8, got {error.object!r} in {path}") from error
    except (pa.ArrowException, OSError) as error:
        if path.stat().st_size == 0:
            raise TaskError(f"the data file must hold rows, got the empty file {path}") from error
        raise TaskError(f"cannot read {path}: {error}") from error
    if table.num_rows == 0:
        raise TaskError(f"the data file must hold rows, got {path} with a header alone")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise TaskError(f"column names must be unique, got {twice[0]!r} more than once in {path}")
    return table


def check_columns(table: pa.Table, role: str, names: Sequence[str], file: str) -> None:
    """Raise `TaskError` for the first of `names` that the file lacks, with the nearest that it has."""
    for name in names:
        if name not in table.column_names:
            known = [column for column in table.column_names if column]
            raise TaskError(f"{role} must be a column of {file}, got {name!r}{nearest(name, known)}")


def read_input(table: pa.Table, name: str, kind: str | None) -> InputColumn:
    """Take one input column as its `kind`, or as the kind that its type in the file says when None."""
    column = table.column(name)
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    kind = kind or _kind_of(name, column.type)
    if kind == "categorical":
        try:
            texts = column.cast(pa.string()).to_pylist()
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise TaskError(f"column {name!r} must hold text, got the type {column.type}: {error}") from error
        return InputColumn(name, kind, np.array(texts, dtype=object))
    if kind == "date":
        return InputColumn(name, kind, _days(name, column))
    values = to_numbers(name, column)
    infinite = np.flatnonzero(np.isinf(values))
    if infinite.size:
        raise TaskError(
            f"inputs must be finite, got {values[infinite[0]]} in column {name!r}, row {infinite[0] + 1} "
            f"({infinite.size} such rows)"
        )
    return InputColumn(name, kind, values)


def to_numbers(name: str, column: pa.ChunkedArray) -> np.ndarray:
    """Convert a column to float64, NaN where missing; `TaskError` names the first value that is no number."""
    try:
        numbers = column.cast(pa.float64(), safe=False)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        for row, value in enumerate(column.to_pylist()):
            if value is not None and not _is_number(value):
                raise TaskError(
                    f"column {name!r} must hold numbers, got {value!r} in row {row + 1}"
                ) from error
        raise TaskError(f"column {name!r} must hold numbers, got the type {column.type}") from error
    return np.asarray(pc.fill_null(numbers, float("nan")).to_numpy(), dtype=np.float64)


def label_key(value: Any) -> str:
    """Give the text under which a label is looked up, the same for a plan's, a CSV's and a Parquet spelling.

    >>> label_key(True) == label_key("TRUE"), label_key(1) == label_key("1") == label_key(1.0)
    (True, True)
    """
    if value is None:
        return ""
    text = str(value).strip()
    if text.lower() in _MISSING_WORDS:
        return ""
    if text.lower() in ("true", "false"):
        return text.lower()
    try:
        number = float(text)
    except ValueError:
        return text
    return str(int(number)) if number.is_integer() else text


def mapped_labels(
    table: pa.Table, name: str, values: Mapping[str, str], known: Sequence[str], role: str
) -> np.ndarray:
    """Map a column of labels through `values` (keys as the file spells them) to `known` names.

    Returns (N,) texts, "" where the label is missing and `values` does not say what that means.
    """
    lookup: dict[str, str] = {}
    for key, label in values.items():
        if lookup.setdefault(label_key(key), label) != label:
            raise TaskError(
                f"the {role} map of {name!r} must give a value one meaning, got two for {str(key)!r}"
            )
        if label not in known:
            raise TaskError(
                f"unknown {role} {label!r} for the value {str(key)!r} of {name!r}{nearest(str(label), known)}"
            )
    mapped = []
    for row, value in enumerate(table.column(name).to_pylist()):
        key = label_key(value)
        if key in lookup:
            mapped.append(lookup[key])
        elif key == "":
            mapped.append("")
        else:
            raise TaskError(
                f"every value of the {role} column {name!r} must be in its map, got {value!r} in row "
                f"{row + 1}{nearest(key, [str(item) for item in values])}"
            )
    return np.array(mapped, dtype=object)


def keep_rows(columns: Sequence[InputColumn], rule: str) -> np.ndarray:
    """Tell which rows stay under the rule for missing inputs ("error", "mean", "drop"), as (N,) bool."""
    keep = np.ones(len(columns[0].values), dtype=bool)
    for column in columns:
        missing = column.missing
        if not missing.any():
            continue
        if rule == "error":
            raise TaskError(
                f"inputs must be finite, got no value (empty or NaN) in column {column.name!r}, row "
                f"{int(np.flatnonzero(missing)[0]) + 1} ({int(missing.sum())} such rows); "
                "missing_inputs: mean or drop would take them"
            )
        if rule == "drop":
            keep &= ~missing
    if not keep.any():
        raise TaskError("missing_inputs: drop must leave rows, got a table where every row lacks an input")
    return keep


def encode_inputs(
    columns: Sequence[InputColumn], train: np.ndarray, max_levels: int
) -> tuple[np.ndarray, list[str]]:
    """Standardise numbers and one-hot categories, fitted on the rows `train`; (N, D) float64 and D names.

    A missing number becomes the training mean. A missing category, and a level that training has not seen,
    is a row of zeros.
    """
    blocks: list[np.ndarray] = []
    names: list[str] = []
    for column in columns:
        if column.kind == "categorical":
            levels = sorted({value for value in column.values[train] if value is not None})
            if len(levels) > max_levels:
                raise TaskError(
                    f"a categorical input must have at most max_levels={max_levels} levels, got "
                    f"{len(levels)} in column {column.name!r} (such as {levels[0]!r}); is it a number? "
                    f"types: {{{column.name}: numeric}} says so"
                )
            blocks.append((column.values[:, None] == np.array(levels, dtype=object)).astype(np.float64))
            names += [f"{column.name}={level}" for level in levels]
            continue
        centre, scale = fit_scale(column.values[train], f"input {column.name!r}")
        blocks.append(np.nan_to_num((column.values - centre) / scale, nan=0.0)[:, None])
        names.append(column.name)
    encoded = np.concatenate(blocks, axis=1)
    if encoded.shape[1] == 0:
        raise TaskError(
            "the inputs must give at least one feature, got categories without a level in training"
        )
    return encoded, names


def fit_scale(values: np.ndarray, what: str) -> tuple[float, float]:
    """Give mean and standard deviation (1 where all are equal) of the values that are there."""
    present = values[~np.isnan(values)]
    if present.size == 0:
        raise TaskError(f"{what} must have a value in the training split, got none")
    largest = float(np.abs(present).max()) or 1.0
    scaled = present / largest  # so that values near the largest float do not overflow when squared
    scale = float(scaled.std()) * largest
    return float(scaled.mean()) * largest, scale if scale > 1e-12 * largest else 1.0


def stratified_split(
    strata: np.ndarray, fractions: Sequence[float], generator: np.random.Generator
) -> dict[str, np.ndarray]:
    """Deal rows to train, val and test, each stratum in the same proportions; sorted row numbers by name.

    `strata` (N,) holds one integer per row. The sizes over all strata are within one row of N x fraction,
    however small the strata are.
    """
    order = np.concatenate(
        [generator.permutation(np.flatnonzero(strata == stratum)) for stratum in np.unique(strata)]
    )
    # Position i takes the place of i x golden ratio mod 1 among all: every run of positions, and with it
    # every stratum, fills the three intervals in proportion.
    golden = (np.sqrt(5.0) - 1.0) / 2.0
    places = np.argsort(np.argsort((np.arange(order.size) * golden) % 1.0))
    edges = np.cumsum(fractions)[:-1] / np.sum(fractions)
    which = np.searchsorted(np.round(edges * order.size), places, side="right")
    return {name: np.sort(order[which == index]) for index, name in enumerate(SPLIT_NAMES)}


def _kind_of(name: str, kind: pa.DataType) -> str:
    if pa.types.is_boolean(kind):
        return "boolean"
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        return "numeric"
    if pa.types.is_date(kind) or pa.types.is_timestamp(kind):
        return "date"
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return "categorical"
    if pa.types.is_null(kind):
        return "numeric"  # a column without a value; the rule for missing inputs speaks about it
    raise TaskError(
        f"an input must be a number, text, boolean or date, got the type {kind} in column {name!r}"
    )


def _days(name: str, column: pa.ChunkedArray) -> np.ndarray:
    """Convert dates and timestamps to days since 1970-01-01."""
    try:
        instants = column.cast(pa.timestamp("us"))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise TaskError(
            f"column {name!r} must hold dates (YYYY-MM-DD), got {column.type}: {error}"
        ) from error
    return to_numbers(name, instants.cast(pa.int64())) / _MICROSECONDS_PER_DAY


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True
