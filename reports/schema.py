"""What a row of a run is called, typed and measured in: one table of columns, and the schemas made from it.

How rows reach the disk is decided in `rows` and `fragments`; which columns decide a ranking, in `ranking`.

Missing values have two spellings, and they differ. NaN in a measured float column says that there was no
finite value to report (a diverged loss, the error of a model that accepted nothing). Null says that the
question does not apply: a knob that is inactive under this config, a column that this trial cannot have.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import pyarrow as pa

SCHEMA_VERSION = 1

KIND_KEY = b"scm_harness.kind"
VERSION_KEY = b"scm_harness.schema_version"
PACKAGE_KEY = b"scm_harness.version"

TRIAL_STATUSES = ("completed", "stopped", "diverged", "failed")
CONFIG_PREFIX = "config."
METRIC_PREFIXES = ("metric.", "test_metric.")
TELEMETRY_PREFIX = "telemetry."
OPEN_PREFIXES = (*METRIC_PREFIXES, TELEMETRY_PREFIX)
"""Columns of a row that only the task, or what goes along with a training, knows by name; all are float64."""

TYPES: dict[str, pa.DataType] = {
    "float64": pa.float64(),
    "int64": pa.int64(),
    "string": pa.string(),
    "bool": pa.bool_(),
    "timestamp": pa.timestamp("us", tz="UTC"),
    "floats": pa.list_(pa.float64()),
}


@dataclass(frozen=True, slots=True)
class Column:
    """A column that every row has: its type by name, what it means, and in which unit."""

    name: str
    type_name: str
    meaning: str
    unit: str = ""
    required: bool = False


IDENTITY_COLUMNS: tuple[Column, ...] = (
    Column("run_id", "string", "the run that the row belongs to", required=True),
    Column("task", "string", "the learning problem", required=True),
    Column("config_id", "string", "hash of the config in its canonical form", required=True),
    Column("trial_id", "string", "config_id and seed, unique in a run", required=True),
    Column("seed", "int64", "seed of the splits, the weights and the shuffling", required=True),
    Column("cohort", "int64", "the search's batch that proposed the config"),
    Column("searcher", "string", "the search algorithm that proposed the config"),
    Column("scenario", "string", "the task with its parameters: its name, and a hash where it has some"),
    Column("settings_id", "string", "hash of the config without its task, the same in every scenario"),
)

OUTCOME_COLUMNS: tuple[Column, ...] = (
    Column("status", "string", "completed, stopped, diverged or failed", required=True),
    Column("stop_reason", "string", "why a stopped or diverged trial ended"),
    Column("nan_origin", "string", "where the first non-finite loss or gradient came from, else empty"),
    Column("error", "string", "the message of a failed trial, else empty"),
    Column("epochs", "int64", "epochs trained", "epochs"),
    Column("parameters", "int64", "weights of the model", "weights"),
    Column("nan_count", "int64", "non-finite values met, all kinds", "values"),
    Column("nan_loss", "int64", "non-finite losses", "values"),
    Column("nan_gradient", "int64", "non-finite gradients", "values"),
    Column("nan_output", "int64", "non-finite outputs that are faults, not bottoms", "values"),
    Column("nan_parameter", "int64", "non-finite parameters", "values"),
    Column("step_time_ms", "float64", "one optimiser step, median after warm-up, measured alone", "ms"),
    Column("duration_s", "float64", "the whole trial", "s"),
    Column("loss", "float64", "training loss of the last epoch"),
    Column("val_loss", "float64", "validation loss of the last epoch"),
)

_DECODED_METRICS: tuple[Column, ...] = (
    Column("coverage", "float64", "share of samples whose decoded output is finite at tau_infer", "share"),
    Column("accepted_error", "float64", "mean error of the accepted answers", "task's unit"),
    Column("charged_error", "float64", "mean error, an abstention paying the baseline's", "task's unit"),
    Column("false_accept_rate", "float64", "accepted, among those labelled bottom", "share"),
    Column("false_reject_rate", "float64", "rejected, among those labelled finite", "share"),
    Column("trivial_error", "float64", "charged_error of abstaining everywhere", "task's unit"),
)

METRIC_COLUMNS: tuple[Column, ...] = (
    Column("target_coverage", "float64", "the coverage asked for", "share"),
    *(Column(c.name, c.type_name, f"{c.meaning}; validation split", c.unit) for c in _DECODED_METRICS),
    *(Column(f"test_{c.name}", c.type_name, f"{c.meaning}; test split", c.unit) for c in _DECODED_METRICS),
    Column("curve_coverage", "floats", "coverages at thresholds on |Q|, growing; validation split", "share"),
    Column("curve_error", "floats", "accepted_error at each of them", "task's unit"),
    Column("curve_area", "float64", "mean of that error over the coverages of the curve", "task's unit"),
)

PROVENANCE_COLUMNS: tuple[Column, ...] = (
    Column("commit", "string", "commit of scm-harness, null outside a repository"),
    Column("scm_harness_version", "string", "version of scm-harness"),
    Column("torch_version", "string", "version of torch"),
    Column("ray_version", "string", "version of Ray"),
    Column("python_version", "string", "version of Python"),
    Column("hostname", "string", "machine that ran the trial"),
    Column("device", "string", "cpu or cuda"),
    Column("device_name", "string", "processor or accelerator by name"),
    Column("started_at", "timestamp", "start of the trial, UTC"),
    Column("data_digest", "string", "sha256 of the task's data"),
    Column("plan_digest", "string", "sha256 of the resolved plan"),
)

# Null in all of them but pack_note: a trial that was no part of a pack.
PACK_COLUMNS: tuple[Column, ...] = (
    Column("pack_id", "string", "the pack that the trial was last part of"),
    Column("pack_size", "int64", "trials that this pack began with", "trials"),
    Column("pack_step_time_ms", "float64", "one step of this pack over its trials, median over epochs", "ms"),
    Column("pack_note", "string", "why the trial was trained alone instead of in a pack, else empty"),
)

BASE_COLUMNS: tuple[Column, ...] = (
    *IDENTITY_COLUMNS,
    *OUTCOME_COLUMNS,
    *PACK_COLUMNS,
    *METRIC_COLUMNS,
    *PROVENANCE_COLUMNS,
)

HISTORY_COLUMNS: tuple[Column, ...] = (
    Column("trial_id", "string", "the trial", required=True),
    Column("config_id", "string", "its config", required=True),
    Column("seed", "int64", "its seed", required=True),
    Column("epoch", "int64", "epochs trained so far", "epochs", required=True),
)

MEASURED_FLOATS = frozenset(c.name for c in OUTCOME_COLUMNS + METRIC_COLUMNS if c.type_name == "float64")


def row_schema(
    config_types: Mapping[str, str], extra_metrics: Mapping[str, str] | Iterable[str] = ()
) -> pa.Schema:
    """The schema of a run's rows: every base column, `config.<knob>` for every knob, and extra metrics.

    `config_types` maps a knob to "float64", "int64", "string" or "bool". `extra_metrics` names columns that
    start with one of `OPEN_PREFIXES`; they are float64, and a row may bring more of them later.

    Raises ValueError for an unknown type and for an extra metric without its prefix.

    >>> row_schema({"learning_rate": "float64"}).field("config.learning_rate").type
    DataType(double)
    """
    fields = [_column_field(column) for column in BASE_COLUMNS]
    for knob, type_name in config_types.items():
        fields.append(pa.field(f"{CONFIG_PREFIX}{knob}", parse_type(type_name, f"config.{knob}")))
    for name in extra_metrics:
        if not name.startswith(OPEN_PREFIXES):
            raise ValueError(
                f"an extra metric must start with one of {', '.join(OPEN_PREFIXES)}, got {name=}"
            )
        fields.append(pa.field(name, pa.float64()))
    return _stamped(fields, "rows")


def history_schema(metrics: Iterable[str] = ()) -> pa.Schema:
    """The schema of a run's per-epoch history: trial, config, seed, epoch, and float64 metrics."""
    fields = [_column_field(column) for column in HISTORY_COLUMNS]
    known = {field.name for field in fields}
    fields += [pa.field(name, pa.float64()) for name in dict.fromkeys(metrics) if name not in known]
    return _stamped(fields, "history")


def stamped_schema(columns: Iterable[Column], kind: str) -> pa.Schema:
    """The schema of files of this kind that have these columns; it says what each means."""
    return _stamped([_column_field(column) for column in columns], kind)


def parse_type(type_name: str, column: str) -> pa.DataType:
    """The Arrow type of that name; ValueError naming the column and the known types if there is none."""
    if type_name not in TYPES:
        raise ValueError(f"type of {column} must be one of {', '.join(TYPES)}, got {type_name=}")
    return TYPES[type_name]


def missing_columns(table: pa.Table | pa.Schema) -> list[str]:
    """The columns that every row should have and these do not, in the order of the schema.

    >>> missing_columns(row_schema({}))
    []
    """
    present = set(_names(table))
    return [column.name for column in BASE_COLUMNS if column.name not in present]


def config_columns(table: pa.Table | pa.Schema) -> list[str]:
    """The `config.<knob>` columns, in the order of the table."""
    return [name for name in _names(table) if name.startswith(CONFIG_PREFIX)]


def nearest_name(name: str, known: Iterable[str]) -> str:
    """Ends an error message: which known name was perhaps meant, or nothing.

    >>> nearest_name("acepted_error", ["accepted_error", "loss"])
    '; did you mean accepted_error?'
    """
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def _names(table: pa.Table | pa.Schema) -> list[str]:
    return table.names if isinstance(table, pa.Schema) else table.column_names


def _column_field(column: Column) -> pa.Field:
    metadata = {"meaning": column.meaning, "unit": column.unit}
    return pa.field(column.name, TYPES[column.type_name], nullable=not column.required, metadata=metadata)


def _stamped(fields: list[pa.Field], kind: str) -> pa.Schema:
    names = [field.name for field in fields]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"columns of a schema must be unique, got {twice} twice")
    return pa.schema(fields, metadata={KIND_KEY: kind.encode(), VERSION_KEY: str(SCHEMA_VERSION).encode()})
