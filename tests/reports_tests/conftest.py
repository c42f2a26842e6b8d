"""Made-up rows: what a trial of a small run would say, without training one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pytest

from reports.schema import row_schema

KNOBS = {
    "learning_rate": "float64",
    "optimizer": "string",
    "momentum": "float64",
    "gradient_policy": "string",
    "hidden_width": "int64",
    "restore_best": "bool",
}


def made_up_row(config_id: str = "a", seed: int = 0, **changes: Any) -> dict[str, Any]:
    """A completed trial without fault; keyword arguments replace values, `knobs` the config's."""
    knobs = {"learning_rate": 1e-3, "optimizer": "adam", "hidden_width": 8, "restore_best": False}
    knobs |= changes.pop("knobs", {})
    row = {
        "run_id": "r",
        "task": "toy",
        "config_id": config_id,
        "trial_id": f"{config_id}-s{seed}",
        "seed": seed,
        "cohort": 0,
        "searcher": "random",
        "status": "completed",
        "epochs": 20,
        "nan_count": 0,
        "coverage": 0.95,
        "target_coverage": 0.95,
        "accepted_error": 1.0,
        "step_time_ms": 2.0,
        "started_at": datetime(2024, 5, 1, 12, 0, 0, 250, tzinfo=UTC),
        **{f"config.{name}": value for name, value in knobs.items()},
    }
    return row | changes


@pytest.fixture
def schema() -> pa.Schema:
    return row_schema(KNOBS)


@pytest.fixture
def make_row() -> Callable[..., dict[str, Any]]:
    return made_up_row


@pytest.fixture
def make_rows(schema: pa.Schema) -> Callable[..., pa.Table]:
    """A table of rows as `read_rows` would return it."""

    def make(rows: Iterable[Mapping[str, Any]]) -> pa.Table:
        return pa.Table.from_pylist([dict(row) for row in rows], schema=schema)

    return make
