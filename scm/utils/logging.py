"""Metric logs: one strict JSON object per line, written as it happens and read back as plain records.

What is logged, and when, is decided by the trainer. Turning records into tables and summaries is done in
`scm.utils.metric_tables`.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import os
import re
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from torch import Tensor

from scm.utils.metric_tables import (
    METRIC_LOG_RESERVED_KEYS,
    aggregate_metric_log_records,
    is_number,
    metric_log_records_to_long_rows,
    metric_log_records_to_wide_rows,
)

__all__ = [
    "METRIC_LOG_RESERVED_KEYS",
    "METRIC_LOG_SCHEMA_NAME",
    "METRIC_LOG_SCHEMA_VERSION",
    "JsonlLogger",
    "TensorBoardLogger",
    "TruncatedLogWarning",
    "aggregate_metric_log_records",
    "aggregate_metric_logs",
    "jsonl_to_dataframe",
    "metric_log_record",
    "metric_log_records_to_long_rows",
    "metric_log_records_to_wide_rows",
    "plain_values",
    "read_jsonl",
    "read_metric_log_runs",
]

METRIC_LOG_SCHEMA_NAME = "zeroproofml.metric_log"
METRIC_LOG_SCHEMA_VERSION = 1
MetricLogInput = str | Path | Sequence[str | Path] | Mapping[str, str | Path]

_SEED_PART = re.compile(r"(?:^|_)(?:seed_|quick_s)(\d+)$")


class TruncatedLogWarning(UserWarning):
    """The last line of a log ends in the middle of a record, as a killed writer leaves it."""


def metric_log_record(
    metrics: Mapping[str, Any],
    *,
    phase: str,
    step: int | None = None,
    epoch: int | None = None,
    context: Mapping[str, Any] | None = None,
    record_type: str = "metric",
    mirror: bool = True,
) -> dict[str, Any]:
    """One record of schema zeroproofml.metric_log version 1, ready for strict JSON.

    Non-finite numbers become None, tensors and arrays numbers or lists. Metrics whose names are not reserved
    are repeated at top level unless `mirror` is False (readers here use `metrics` alone). ValueError for an
    empty phase or record type.
    """
    for name, value in (("phase", phase), ("record_type", record_type)):
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{name} must be a string that is not empty, got {value!r}")
    plain = plain_values(metrics)
    record: dict[str, Any] = {
        "schema_name": METRIC_LOG_SCHEMA_NAME,
        "schema_version": METRIC_LOG_SCHEMA_VERSION,
        "record_type": record_type,
        "phase": phase,
        "metrics": plain,
    }
    if step is not None:
        record["step"] = int(step)
    if epoch is not None:
        record["epoch"] = int(epoch)
    if context is not None:
        record["context"] = plain_values(context)
    if mirror:
        record.update({name: value for name, value in plain.items() if name not in METRIC_LOG_RESERVED_KEYS})
    return record


def plain_values(value: Any) -> Any:
    """`value` as strict JSON can say it: non-finite numbers are None, tensors lists, dataclasses dicts.

    TypeError for what has no such form (a complex number, a model).
    """
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, Enum):
        return plain_values(value.value)
    if isinstance(value, (int, np.integer)):
        return int(value)
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, np.bool_):
        return bool(value)
    if isinstance(value, Tensor):
        return plain_values(value.detach().cpu().tolist())
    if isinstance(value, np.ndarray):
        return plain_values(value.tolist())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: plain_values(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain_values(item) for key, item in value.items()}
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, (list, tuple, set, frozenset)):
        items = sorted(value, key=repr) if isinstance(value, (set, frozenset)) else value
        return [plain_values(item) for item in items]
    raise TypeError(f"a metric must be a number, text, list, mapping or tensor, got {type(value).__name__}")


class JsonlLogger:
    """Appends one JSON line per call, keys sorted, on disk when the call returns; may be used as `log_hook`.

    The file is opened at the first record, with its parent folders, and kept open; a record that a killed
    writer left unfinished at its end is cut off with a TruncatedLogWarning, so that it cannot spoil the next
    one. `run_id` is added to each record's context, `timestamps` adds "time" (seconds since 1970, read from
    `clock`), `fsync` waits for the device after each record. May be pickled: the copy reopens the file.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        run_id: str | None = None,
        timestamps: bool = False,
        fsync: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._file: BinaryIO | None = None
        self.path = Path(path)
        self.run_id = run_id
        self.timestamps = timestamps
        self.fsync = fsync
        self._clock = clock

    def __call__(self, metrics: Mapping[str, Any]) -> None:
        """Write one record; TypeError for values that JSON has no form for, and then nothing is written."""
        record = plain_values(metrics)
        if self.run_id is not None:
            record["context"] = {**(record.get("context") or {}), "run_id": self.run_id}
        if self.timestamps:
            record["time"] = self._clock()
        line = json.dumps(record, sort_keys=True, allow_nan=False) + "\n"
        file = self._opened()
        file.write(line.encode("utf-8"))
        if self.fsync:
            os.fsync(file.fileno())

    def close(self) -> None:
        """Close the file; a later record opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> JsonlLogger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}

    def _opened(self) -> BinaryIO:
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _cut_unfinished_line(self.path)
            # Unbuffered and in append mode: a record is one write, so two writers never mix within a line.
            self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115
        return self._file


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """The records of one log, in order; blank lines are passed over.

    A last line without its newline that is no JSON is left out with a TruncatedLogWarning. Any other line
    that is not a JSON object (NaN and Infinity are not JSON) is a ValueError that names file and line.
    """
    source = Path(path)
    records: list[dict[str, Any]] = []
    lines = source.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode("utf-8"), parse_constant=_refuse_constant)
        except ValueError as error:
            if number == len(lines):
                warnings.warn(
                    f"{source}:{number}: the last record is unfinished and left out",
                    TruncatedLogWarning,
                    stacklevel=2,
                )
                break
            raise ValueError(f"{source}:{number}: not a JSON record: {error}") from error
        if not isinstance(record, dict):
            raise ValueError(f"{source}:{number}: a record must be an object, got {type(record).__name__}")
        records.append(record)
    return records


def read_metric_log_runs(
    logs: MetricLogInput,
    *,
    label_key: str = "run_id",
    source_key: str | None = "source_path",
    infer_seed: bool = True,
) -> list[dict[str, Any]]:
    """The records of one or more logs, each with its run in its context.

    `logs` is a path, a sequence of paths, or a mapping from label to path. Without a label the file's stem
    is used, with as many parent folders before it as make the labels differ. The context gains `label_key`,
    `source_key` (unless None) and, where a part of the path is named seed_N or quick_sN, "seed"; what a
    record says itself is kept.
    """
    records = []
    for label, path in _labelled(logs):
        added: dict[str, Any] = {label_key: label}
        if source_key is not None:
            added[source_key] = str(path)
        seed = _seed_of(path) if infer_seed else None
        if seed is not None:
            added["seed"] = seed
        for record in read_jsonl(path):
            records.append({**record, "context": {**added, **(record.get("context") or {})}})
    return records


def aggregate_metric_logs(
    logs: MetricLogInput,
    *,
    group_by: Sequence[str] = ("phase",),
    label_key: str = "run_id",
    source_key: str | None = "source_path",
    infer_seed: bool = True,
) -> list[dict[str, Any]]:
    """`aggregate_metric_log_records` of `read_metric_log_runs`."""
    records = read_metric_log_runs(logs, label_key=label_key, source_key=source_key, infer_seed=infer_seed)
    return aggregate_metric_log_records(records, group_by=group_by)


def jsonl_to_dataframe(path: str | Path) -> Any:
    """One log as a pandas DataFrame, a row per record; ImportError names what to install."""
    pandas = _import_optional("pandas", "jsonl_to_dataframe", "pandas")
    return pandas.DataFrame(read_jsonl(path))


class TensorBoardLogger:
    """Writes the finite numbers of each record as TensorBoard scalars, named phase/metric.

    The step is the record's `step_key`, else its "step", else its "epoch", else a count of calls. Needs
    tensorboardX or torch.utils.tensorboard; ImportError says what to install.
    """

    def __init__(self, log_dir: str | Path, *, step_key: str | None = None) -> None:
        self._writer = _summary_writer()(str(log_dir))
        self._step_key = step_key
        self._calls = 0

    def __call__(self, metrics: Mapping[str, Any]) -> None:
        """Write one record."""
        record = plain_values(metrics)
        step = self._step(record)
        self._calls += 1
        phase = record.get("phase")
        named = record.get("metrics")
        values = named if isinstance(named, Mapping) else record
        for name, value in values.items():
            if name in METRIC_LOG_RESERVED_KEYS or not is_number(value):
                continue
            self._writer.add_scalar(f"{phase}/{name}" if phase else name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()

    def __enter__(self) -> TensorBoardLogger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _step(self, record: Mapping[str, Any]) -> int:
        keys = ("step", "epoch") if self._step_key is None else (self._step_key,)
        nested = record.get("metrics")
        for key in keys:
            for place in (record, nested if isinstance(nested, Mapping) else {}):
                if is_number(place.get(key)):
                    return int(place[key])
        if self._step_key is not None:
            raise ValueError(f"a record must hold step_key={self._step_key!r}, got {sorted(record)}")
        return self._calls


def _cut_unfinished_line(path: Path) -> None:
    if not path.exists() or path.stat().st_size == 0:
        return
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        if file.read(1) == b"\n":
            return
        file.seek(0)
        content = file.read()
        end = content.rfind(b"\n") + 1
        tail = content[end:]
        try:
            json.loads(tail)
        except ValueError:
            warnings.warn(
                f"{path}: cut off {len(tail)} bytes of an unfinished record",
                TruncatedLogWarning,
                stacklevel=4,
            )
            file.truncate(end)
        else:
            file.write(b"\n")


def _refuse_constant(word: str) -> float:
    raise ValueError(f"the literal {word} is not JSON")


def _labelled(logs: MetricLogInput) -> Iterable[tuple[str, Path]]:
    if isinstance(logs, Mapping):
        return [(str(label), Path(path)) for label, path in logs.items()]
    paths = [Path(logs)] if isinstance(logs, (str, Path)) else [Path(path) for path in logs]
    if len(set(paths)) != len(paths):
        raise ValueError(f"each log must be named once, got {[str(path) for path in paths]}")
    depth = 1
    names = [path.with_suffix("") for path in paths]
    longest = max((len(name.parts) for name in names), default=1)
    while len({name.parts[-depth:] for name in names}) < len(names) and depth < longest:
        depth += 1
    labels = ["/".join(name.parts[-depth:]) for name in names]
    return zip(labels, paths, strict=True)


def _seed_of(path: Path) -> int | None:
    for part in reversed((*path.parts[:-1], path.stem)):
        match = _SEED_PART.search(part)
        if match:
            return int(match.group(1))
    return None


def _summary_writer() -> Any:
    for module in ("tensorboardX", "torch.utils.tensorboard"):
        try:
            return importlib.import_module(module).SummaryWriter
        except ImportError:
            continue
    raise ImportError("TensorBoardLogger needs tensorboardX or tensorboard: pip install tensorboardX")


def _import_optional(module: str, what: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{what} needs {package}: pip install {package}") from error
