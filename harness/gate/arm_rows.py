"""What one arm came to: its rows and launches, in a folder while a gate runs and as plain data afterwards.

A row is that of a run, with four columns more. Launches are kept apart, as they are made after the training;
where a gate made those of both arms back to back, they have the same `pair`.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa

from harness.gate.suite import Scenario
from reports.fragments import FragmentWriter, RunReadError, read_fragments, write_json_atomically
from reports.provenance import row_provenance
from reports.rows import ROWS_FOLDER, RowWriter, read_rows
from reports.schema import BASE_COLUMNS, CONFIG_PREFIX, OPEN_PREFIXES, Column, row_schema, stamped_schema
from search_spaces.identity import config_id, scenario_name, trial_id
from trainables.configs import KNOB_TYPES

ARM_FILE = "arm.json"
LAUNCHES_FOLDER = "launches"
LAUNCHES_KIND = "launches"
WRITER = "gate"
SCENARIO = "gate_scenario"
QUESTION = "gate_question"
CHECKS = "gate_checks"
LAUNCH_MS = "launch_step_ms"

GATE_FIELDS = (
    pa.field(SCENARIO, pa.string()),
    pa.field(QUESTION, pa.string()),
    pa.field(CHECKS, pa.int64()),
)
LAUNCH_COLUMNS = (
    Column("scenario", "string", "the suite's scenario", required=True),
    Column("seed", "int64", "the seed whose row the launch goes with", required=True),
    Column(
        "pair", "string", "the same for the launches of both arms that were made back to back", required=True
    ),
    Column("place", "int64", "0 for the first launch of the pair, 1 for the second"),
    Column("step_time_ms", "float64", "median step of the launch", "ms"),
    Column("started_at", "timestamp", "when the launch began, UTC"),
)
_OUTCOME_COLUMNS = {column.name for column in BASE_COLUMNS}

Key = tuple[str, int]
"""A scenario and a seed: the unit of a gate."""


@dataclass(frozen=True)
class ArmRows:
    """The rows of an arm by scenario and seed, its launches (ms by pair), and what is known of its origin.

    source: where it was read from, for messages. origin: `arm.json`, or what a baseline says of itself.
    """

    source: str
    rows: Mapping[Key, Mapping[str, Any]]
    launches: Mapping[Key, Mapping[str, float]] = field(default_factory=dict)
    origin: Mapping[str, Any] = field(default_factory=dict)

    @property
    def scenarios(self) -> list[str]:
        """The scenarios that have rows, in order."""
        return list(dict.fromkeys(scenario for scenario, _ in self.rows))

    def seeds(self, scenario: str) -> list[int]:
        """The seeds of a scenario, in order."""
        return sorted(seed for name, seed in self.rows if name == scenario)


class ArmStore:
    """The folder of an arm under way: rows and launches are on the disk when `add` returns."""

    def __init__(self, folder: Path, origin: Mapping[str, Any]) -> None:
        self.folder = folder
        self._origin = dict(origin)
        schema = row_schema(KNOB_TYPES)
        for extra in GATE_FIELDS:
            schema = schema.append(extra)
        folder.mkdir(parents=True, exist_ok=True)
        write_json_atomically(self._origin, folder / ARM_FILE)
        read = read_arm_folder(folder)
        self._rows = dict(read.rows)
        self._launches = {key: dict(found) for key, found in read.launches.items()}
        self._columns = {*schema.names}
        self._writer = RowWriter(folder / ROWS_FOLDER, WRITER, schema)
        self._launch_writer = FragmentWriter(
            folder / LAUNCHES_FOLDER,
            WRITER,
            stamped_schema(LAUNCH_COLUMNS, LAUNCHES_KIND),
            key=("scenario", "seed", "pair"),
            fill_nan=lambda name: True,
            open_type=lambda name: None,
        )

    @property
    def taken(self) -> ArmRows:
        """Everything that is there."""
        return ArmRows(str(self.folder), dict(self._rows), dict(self._launches), self._origin)

    def add(self, scenario: Scenario, seed: int, told: Mapping[str, Any], place: Mapping[str, Any]) -> None:
        """Write the row of a trial that a worker told of."""
        row = gate_row(scenario, seed, told, {**place, "run_id": self._origin["digest"]})
        row = {name: value for name, value in row.items() if name in self._columns or is_open(name)}
        self._writer.append(row)
        self._writer.flush()
        self._rows[scenario.name, seed] = row

    def add_launch(self, scenario: str, seed: int, pair: str, place: int, ms: float, at: datetime) -> None:
        """Write a launch."""
        self._launch_writer.append(
            {
                "scenario": scenario,
                "seed": seed,
                "pair": pair,
                "place": place,
                "step_time_ms": ms,
                "started_at": at,
            }
        )
        self._launch_writer.flush()
        self._launches.setdefault((scenario, seed), {})[pair] = ms

    def close(self) -> None:
        """Let go of the folder."""
        self._writer.close()
        self._launch_writer.close()


def is_open(name: str) -> bool:
    """Whether a column may come with any row."""
    return name.startswith(OPEN_PREFIXES)


def gate_row(
    scenario: Scenario, seed: int, told: Mapping[str, Any], place: Mapping[str, Any]
) -> dict[str, Any]:
    """The row of a trial: what a worker told of it, who it is, and where it ran."""
    active = {name: value for name, value in told.get("active", {}).items() if name in KNOB_TYPES}
    params = {f"task.{name}": value for name, value in scenario.params.items()}
    identity = config_id({"task": scenario.task, **params, **(active or scenario.config)})
    outcome = {
        name: value
        for name, value in told["outcome"].items()
        if name in _OUTCOME_COLUMNS or name.startswith(OPEN_PREFIXES)
    }
    return {
        **outcome,
        **{f"{CONFIG_PREFIX}{name}": value for name, value in active.items()},
        **place,
        "task": scenario.task,
        "scenario": scenario_name(scenario.task, scenario.params),
        "settings_id": config_id(active or scenario.config),
        "config_id": identity,
        "trial_id": trial_id(identity, seed),
        "seed": seed,
        "searcher": WRITER,
        "data_digest": told.get("data_digest"),
        "started_at": datetime.now(UTC),
        SCENARIO: scenario.name,
        QUESTION: scenario.question,
        CHECKS: int(told.get("checks", 0)),
    }


def row_place(told: Mapping[str, Any], origin: Mapping[str, Any], device: str) -> dict[str, Any]:
    """The columns of a row that are the same for all rows of an arm: code, versions, machine."""
    return {
        **row_provenance(told.get("provenance", {})),
        "commit": origin.get("commit"),
        "torch_version": told["torch"],
        "python_version": told["python"],
        "device": device.partition(":")[0],
        "device_name": origin["fingerprint"]["device"] if device != "cpu" else origin["fingerprint"]["cpu"],
        "plan_digest": origin["question"],
    }


def read_arm_folder(folder: Path) -> ArmRows:
    """What an arm's folder holds; `RunReadError` where a file in it is damaged."""
    try:
        origin = json.loads((folder / ARM_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunReadError(f"{folder / ARM_FILE} cannot be read: {error}") from None
    if not isinstance(origin, dict):
        raise RunReadError(f"{folder / ARM_FILE} must hold a mapping, got a {type(origin).__name__}")
    rows: dict[Key, Mapping[str, Any]] = {}
    if any((folder / ROWS_FOLDER).glob("*.parquet")):
        rows = keyed_rows(read_rows(folder), str(folder))
    launches: dict[Key, dict[str, float]] = {}
    if any((folder / LAUNCHES_FOLDER).glob("*.parquet")):
        for told in read_fragments(folder / LAUNCHES_FOLDER, kind=LAUNCHES_KIND).to_pylist():
            ms = told["step_time_ms"]
            if ms is not None and math.isfinite(ms):
                launches.setdefault((told["scenario"], told["seed"]), {})[told["pair"]] = ms
    return ArmRows(str(folder), rows, launches, origin)


def keyed_rows(table: pa.Table, source: str) -> dict[Key, Mapping[str, Any]]:
    """The rows of a table by scenario and seed; `RunReadError` where two rows have both in common.

    Rows of a run that no gate made have a scenario for each of its configs.
    """
    keyed: dict[Key, Mapping[str, Any]] = {}
    for row in table.to_pylist():
        name = row.get(SCENARIO)
        if name is None:
            name = f"{row.get('scenario') or row['task']} {row['config_id']}"
        key = (str(name), int(row["seed"]))
        if key in keyed:
            raise RunReadError(f"{source} holds scenario {key[0]!r} with seed {key[1]} more than once")
        keyed[key] = row
    return keyed


def merged_table(taken: ArmRows, seeds: Sequence[int]) -> pa.Table:
    """Rows with the median of their launches, as a baseline keeps them: no column that is empty or of a host.

    The table has the schema's stamps; which rows it holds is decided by the caller's seeds.
    """
    kept = [
        {
            **{name: value for name, value in row.items() if name not in ("hostname", "started_at")},
            **launch_cells(taken, key),
        }
        for key, row in sorted(taken.rows.items())
        if key[1] in set(seeds)
    ]
    schema = row_schema(KNOB_TYPES)
    fields = [*GATE_FIELDS, pa.field(LAUNCH_MS, pa.float64())]
    names = dict.fromkeys(name for row in kept for name, value in row.items() if value is not None)
    extra = [pa.field(name, pa.float64()) for name in names if name not in schema.names and is_open(name)]
    whole = pa.schema([*schema, *fields, *extra], metadata=schema.metadata)
    # Without what each column means: it would be most of the file, and reports.schema says it.
    used = [item.remove_metadata() for item in whole if item.name in names or not item.nullable]
    return pa.Table.from_pylist(kept, schema=pa.schema(used, metadata=schema.metadata))


def launch_cells(taken: ArmRows, key: Key) -> dict[str, Any]:
    """What a baseline keeps of the launches of a scenario and seed."""
    found = taken.launches.get(key)
    if not found:
        return {}
    return {LAUNCH_MS: statistics.median(found.values())}


def stored_launches(rows: Mapping[Key, Mapping[str, Any]]) -> dict[Key, dict[str, float]]:
    """The launches that rows of a baseline carry, their median standing for them."""
    found: dict[Key, dict[str, float]] = {}
    for key, row in rows.items():
        ms = row.get(LAUNCH_MS)
        if isinstance(ms, float) and math.isfinite(ms):
            found[key] = {"stored": ms}
    return found


def failed_rows(taken: ArmRows, keys: Sequence[Key]) -> Iterator[tuple[Key, str]]:
    """Those of the keys whose trial failed, with its message."""
    for key in keys:
        row = taken.rows.get(key)
        if row is not None and row.get("status") == "failed":
            yield key, str(row.get("error") or "no message")


def arm_digest(values: Mapping[str, Any]) -> str:
    """12 hex characters, equal for arms whose rows are the same."""
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
