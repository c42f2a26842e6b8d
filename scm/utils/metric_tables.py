"""Metric-log records as tables: wide and long rows, and summaries per group. Reads and writes nothing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

METRIC_LOG_RESERVED_KEYS = frozenset(
    {"schema_name", "schema_version", "record_type", "phase", "step", "epoch", "metrics", "context"}
)


def metric_log_records_to_wide_rows(
    records: Iterable[Mapping[str, Any]],
    *,
    metric_prefix: str = "metric_",
    context_prefix: str = "context_",
) -> list[dict[str, Any]]:
    """One row per record: header, context_<name> and metric_<name>; nested names are joined by "."."""
    rows = []
    for record in records:
        row = _header(record, context_prefix)
        row.update({f"{metric_prefix}{name}": value for name, value in _flat(_metrics_of(record))})
        rows.append(row)
    return rows


def metric_log_records_to_long_rows(
    records: Iterable[Mapping[str, Any]], *, context_prefix: str = "context_"
) -> list[dict[str, Any]]:
    """One row per record and metric, with the header fields and context beside "metric" and "value"."""
    return [
        {**_header(record, context_prefix), "metric": name, "value": value}
        for record in records
        for name, value in _flat(_metrics_of(record))
    ]


def aggregate_metric_log_records(
    records: Iterable[Mapping[str, Any]], *, group_by: Sequence[str] = ("phase",)
) -> list[dict[str, Any]]:
    """Summaries per group and metric, in the order of first appearance.

    Each holds the group's fields, metric, count, mean, std (of the sample; None for one value), min, max,
    first and latest. Only numbers count; None (a value that was not finite), lists, texts and bools do not.
    A group field is looked up in the record, then in its context.
    """
    groups: dict[tuple[Any, ...], list[float]] = {}
    for record in records:
        key = tuple(_field(record, name) for name in group_by)
        for name, value in _flat(_metrics_of(record)):
            if is_number(value):
                groups.setdefault((*key, name), []).append(value)
    return [
        {**dict(zip(group_by, key, strict=True)), "metric": name, **_summary(values)}
        for (*key, name), values in groups.items()
    ]


def is_number(value: Any) -> bool:
    """Whether a plain value counts as a metric: an int or float, and not a bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _metrics_of(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """The record's metrics; those of a line that is not of the schema are its own fields."""
    metrics = record.get("metrics")
    if isinstance(metrics, Mapping):
        return metrics
    return {name: value for name, value in record.items() if name not in METRIC_LOG_RESERVED_KEYS}


def _header(record: Mapping[str, Any], context_prefix: str) -> dict[str, Any]:
    row = {
        name: record[name]
        for name in sorted(METRIC_LOG_RESERVED_KEYS - {"metrics", "context"})
        if name in record
    }
    row.update({f"{context_prefix}{name}": value for name, value in _flat(record.get("context") or {})})
    return row


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            pairs += _flat(value, f"{prefix}{name}.")
        else:
            pairs.append((f"{prefix}{name}", value))
    return pairs


def _field(record: Mapping[str, Any], name: str) -> Any:
    value = record.get(name)
    if value is None:
        value = (record.get("context") or {}).get(name)
    # A list cannot be a key of a dictionary, its text can.
    return repr(value) if isinstance(value, (list, dict)) else value


def _summary(values: Sequence[float]) -> dict[str, Any]:
    count = len(values)
    mean = _mean(values)
    # hypot scales its arguments, so that squares of large deviations do not overflow.
    std = math.hypot(*(x - mean for x in values)) / math.sqrt(count - 1) if count > 1 else None
    return {
        "count": count,
        "mean": mean,
        "std": std,
        "min": min(values),
        "max": max(values),
        "first": values[0],
        "latest": values[-1],
    }


def _mean(values: Sequence[float]) -> float:
    try:
        return math.fsum(values) / len(values)
    except OverflowError:  # the sum is out of range although the mean is not
        return math.fsum(x / len(values) for x in values)
