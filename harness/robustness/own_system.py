"""This project's own system as a subject: its trainings, files, plans, ranking and gate, by attribute.

What must hold of them is decided in `system_laws` and `machines`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from harness.errors import UserError
from harness.gate.decision import NanCount, Pairs, decide
from harness.gate.rules import GateRules
from harness.plan import load_plan, plan_text
from reports.fragments import FragmentWriter, RunReadError, read_fragment, write_table_atomically
from reports.ranking import RankingOptions, rank
from reports.rows import RowWriter, read_rows
from reports.schema import row_schema
from trainables import system_subject
from trainables.configs import resolve_config


def own_system(**instead: Any) -> SimpleNamespace:
    """Every attribute that a law of the system needs; those given here take the place of our own.

    Trainings: see `trainables.system_subject`. write_table, read_table (rows of a fragment), read_where (the
    column "n" of a folder's rows that a filter keeps), read_refusal (what reading may raise); open_store,
    read_store ((key, value) pairs); parse_plan, dump_plan, plan_refusal, resolve_flat; rank (rows as
    mappings, options -> entries, best first); decide (pairs and counts as mappings, seeds -> mapping).
    """
    attributes: dict[str, Any] = {
        "make_controller": system_subject.make_controller,
        "train_pack": system_subject.train_pack,
        "train_alone": system_subject.train_alone,
        "spoiled": system_subject.SPOILED,
        "batch_gradient": system_subject.batch_gradient,
        "train_in_micro_batches": system_subject.train_in_micro_batches,
        "rows_of_a_batch": system_subject.ROWS,
        "make_training": system_subject.Training,
        "trainings": tuple(system_subject.TRAININGS),
        "training_epochs": system_subject.TRAINING_EPOCHS,
        "killed_error": system_subject.KilledError,
        "write_table": write_table_atomically,
        "read_table": read_table,
        "read_where": read_where,
        "read_refusal": RunReadError,
        "open_store": RowStore,
        "read_store": read_store,
        "parse_plan": parse_plan,
        "dump_plan": plan_text,
        "plan_refusal": UserError,
        "resolve_flat": resolve_config,
        "rank": rank_rows,
        "decide": decide_pairs,
    }
    return SimpleNamespace(**{**attributes, **instead})


def read_table(path: Path) -> pa.Table:
    """One fragment of rows."""
    return read_fragment(path, kind="rows")


def read_where(folder: Path, column: str, operator: str, value: Any) -> list[int]:
    """The column "n" of those rows of a folder's files that a filter handed to the reader keeps."""
    table = pq.read_table(folder, filters=[(column, operator, value)], columns=["n", column])
    return sorted(table.column("n").to_pylist())


# A few of the columns that rows have, the required ones among them: each costs time in every file.
_STORED = ("run_id", "task", "config_id", "trial_id", "seed", "status", "loss")


class RowStore:
    """The rows of a run as pairs of a key and a number."""

    def __init__(self, folder: Path, name: str) -> None:
        every = row_schema({})
        schema = pa.schema([every.field(column) for column in _STORED], metadata=every.metadata)
        self._writer: FragmentWriter = RowWriter(folder, name, schema)

    def append(self, key: str, value: float) -> None:
        """Take a pair; ValueError for a key that is there."""
        self._writer.append(_row(key, value))

    def append_all(self, pairs: Iterable[tuple[str, float]]) -> None:
        """Take pairs that came together, and put them on the disk."""
        self._writer.append_all(_row(key, value) for key, value in pairs)

    def flush(self) -> None:
        """Put every pair on the disk."""
        self._writer.flush()

    def close(self) -> None:
        """Put every pair on the disk, and take no more."""
        self._writer.close()


def _row(key: str, value: float) -> dict[str, Any]:
    identity = {"run_id": "r", "task": "t", "config_id": key, "trial_id": key, "seed": 0}
    return {**identity, "status": "completed", "loss": value}


def read_store(folder: Path) -> list[tuple[str, float]]:
    """Every pair of the rows in `folder`, by `read_rows`; none where nothing was ever flushed."""
    if not any(folder.glob("*.parquet")):
        return []
    table = read_rows(folder.parent)
    return list(zip(table.column("trial_id").to_pylist(), table.column("loss").to_pylist(), strict=True))


def parse_plan(text: str) -> Any:
    """The plan that a file with this text holds."""
    with tempfile.TemporaryDirectory(prefix="law-") as folder:
        path = Path(folder) / "plan.yaml"
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        return load_plan(path)


def rank_rows(rows: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The leaderboard of rows, as mappings, best first."""
    schema = pa.schema([field for field in row_schema({}) if field.name in rows[0]])
    entries: list[dict[str, Any]] = rank(
        pa.Table.from_pylist(list(rows), schema=schema), RankingOptions(**options)
    ).to_pylist()
    return entries


def decide_pairs(
    pairs: Sequence[Mapping[str, Any]], counts: Sequence[Mapping[str, Any]], look: int
) -> dict[str, Any]:
    """The gate's decision on pairs and counts as mappings, by its default rules, as a mapping."""
    held = [
        Pairs(**{**pair, **{name: tuple(pair[name]) for name in ("seeds", "base", "candidate")}})
        for pair in pairs
    ]
    decision = decide(held, [NanCount(**count) for count in counts], GateRules(), look=look)
    return asdict(decision)
