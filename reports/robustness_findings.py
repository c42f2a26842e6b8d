"""What trying laws on trained models came to: a verdict for each, and the cases that broke one.

How a law is tried and a case made small is decided in `harness.robustness`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from reports.fragments import RunReadError, read_fragment, write_table_atomically
from reports.schema import Column, nearest_name, stamped_schema

VERDICTS_FILE = "verdicts.parquet"
COUNTEREXAMPLES_FILE = "counterexamples.parquet"
VERDICT_STATUSES = ("holds", "broken", "not_applicable", "error")

VERDICT_COLUMNS: tuple[Column, ...] = (
    Column("task", "string", "the learning problem", required=True),
    Column("config_id", "string", "hash of the config", required=True),
    Column("trial_id", "string", "config_id and seed", required=True),
    Column("seed", "int64", "seed of the trial", required=True),
    Column("model_digest", "string", "of the weights; null where there is no model"),
    Column("property", "string", "the law that was tried", required=True),
    Column("law", "string", "what it says"),
    Column("status", "string", "holds, broken, not_applicable or error", required=True),
    Column("message", "string", "what was found instead, or why it does not apply, else empty"),
    Column("examples", "int64", "cases tried", "cases"),
    Column("cases_seed", "int64", "seed from which cases were drawn"),
    Column("duration_s", "float64", "time that it took", "s"),
    Column("counterexample", "string", "id of the smallest case that breaks it; null where it holds"),
)

COUNTEREXAMPLE_COLUMNS: tuple[Column, ...] = (
    Column("id", "string", "hash of law, case and model: what `scm-harness replay` takes", required=True),
    Column("property", "string", "the law that it breaks", required=True),
    Column("law", "string", "what it says"),
    Column("message", "string", "what was found instead"),
    Column("shown", "string", "the case, for people"),
    Column(
        "input", "string", "the case, bit for bit: JSON, tensors as dtype, shape and bytes", required=True
    ),
    Column("rows", "int64", "rows of data in the case", "rows"),
    Column("task", "string", "the learning problem", required=True),
    Column("config_id", "string", "hash of the config", required=True),
    Column("trial_id", "string", "config_id and seed", required=True),
    Column("seed", "int64", "seed of the trial", required=True),
    Column("cases_seed", "int64", "seed from which cases were drawn"),
    Column("model_digest", "string", "of the weights", required=True),
    Column("model_file", "string", "the model, relative to this file's folder", required=True),
    Column("status", "string", "fails: as it did when it was found", required=True),
    Column("replay", "string", "the command that tries it again"),
    Column("created_at", "timestamp", "when it was found, UTC"),
)


def verdict_schema() -> pa.Schema:
    """The columns of verdicts, with what they mean."""
    return stamped_schema(VERDICT_COLUMNS, "verdicts")


def counterexample_schema() -> pa.Schema:
    """The columns of counterexamples, with what they mean."""
    return stamped_schema(COUNTEREXAMPLE_COLUMNS, "counterexamples")


def write_findings(
    folder: Path, verdicts: Iterable[Mapping[str, Any]], counterexamples: Iterable[Mapping[str, Any]]
) -> None:
    """Write both files of a folder, each whole or not at all, the cases first.

    Raises ValueError for a column or a status that is none.
    """
    held = [dict(row) for row in verdicts]
    for row in held:
        if row.get("status") not in VERDICT_STATUSES:
            raise ValueError(
                f"status must be one of {', '.join(VERDICT_STATUSES)}, got {row.get('status')!r}"
            )
    cases = _table([dict(row) for row in counterexamples], counterexample_schema())
    verdict_table = _table(held, verdict_schema())
    folder.mkdir(parents=True, exist_ok=True)
    write_table_atomically(cases, folder / COUNTEREXAMPLES_FILE)
    write_table_atomically(verdict_table, folder / VERDICTS_FILE)


def read_verdicts(folder: Path) -> pa.Table:
    """The verdicts of a folder; RunReadError naming the file that is missing or is anything else."""
    return read_fragment(Path(folder) / VERDICTS_FILE, kind="verdicts")


def read_counterexamples(folder: Path) -> pa.Table:
    """The counterexamples of a folder; RunReadError naming the file that is missing or is anything else."""
    return read_fragment(Path(folder) / COUNTEREXAMPLES_FILE, kind="counterexamples")


def find_counterexample(folder: Path, name: str) -> dict[str, Any]:
    """The counterexample of that id; RunReadError naming the nearest for one that is not there."""
    held = read_counterexamples(folder).to_pylist()
    for row in held:
        if row["id"] == name:
            return dict(row)
    known = [row["id"] for row in held]
    hint = nearest_name(name, known) or (f"; known: {', '.join(known[:8])}" if known else "; it holds none")
    raise RunReadError(f"{folder / COUNTEREXAMPLES_FILE} holds no counterexample {name!r}{hint}")


def _table(rows: list[dict[str, Any]], schema: pa.Schema) -> pa.Table:
    for row in rows:
        for name in row:
            if name not in schema.names:
                raise ValueError(f"unknown column {name!r}{nearest_name(name, schema.names)}")
    return pa.Table.from_pylist(rows, schema=schema)
