"""Plans small enough to sweep in seconds, and one Ray for all sweeps of this folder."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# A censored table of 60 rows: enough for a few steps in each of a few epochs.
ROWS = 60


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """One embedded Ray with two CPUs; sweeps without an address use it and leave it running."""
    import ray

    folder = tempfile.mkdtemp(prefix="scm-", dir="/tmp")
    ray.init(address="local", num_cpus=2, include_dashboard=False, _temp_dir=folder, log_to_driver=False)
    yield
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def write_plan(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes a plan beside its data; keyword arguments replace whole sections."""
    lines = ["x,z,y,censored"]
    for i in range(ROWS):
        x, z = i / ROWS, (i * 7 % 11) / 11
        lines.append(f"{x:.4f},{z:.4f},{0.5 + x - 0.3 * z:.4f},{'low' if i % 5 == 0 else 'no'}")
    (tmp_path / "data.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")

    def write(name: str = "plan.yaml", **sections: Any) -> Path:
        from harness.yaml_text import write_yaml

        plan: dict[str, Any] = {
            "task": {
                "name": "table",
                "data": "data.csv",
                "inputs": ["x", "z"],
                "target": "y",
                "status": {"column": "censored", "values": {"low": "censored_below", "no": "finite"}},
            },
            "space": ["coverage_targets", "tau_ranges"],
            "config": {"max_epochs": 4, "hidden_width": 8, "hidden_depth": 1, "batch_size": 8},
            "search": {"algorithm": "random", "configs": 4, "batch": 2, "seed": 0},
            "seeds": [0, 1],
        }
        plan.update(sections)
        path = tmp_path / name
        path.write_text(
            write_yaml({key: value for key, value in plan.items() if value is not None}), encoding="utf-8"
        )
        return path

    return write


# What differs between runs that train the same: clocks, places, packs, the run itself, the plan's wording.
OF_THE_RUN = {
    "run_id",
    "step_time_ms",
    "duration_s",
    "started_at",
    "node_id",
    "hostname",
    "commit",
    "plan_digest",
    "pack_id",
    "pack_size",
    "pack_step_time_ms",
}
Rows = list[dict[str, Any]]


@pytest.fixture
def comparable() -> Callable[..., Rows]:
    """A function that reads a run's rows, or its history, in a fixed order, without what differs anyway.

    NaN becomes text, so that it equals itself.
    """
    from reports.rows import read_rows

    def compare(run: Path, read: Callable[[Path], Any] = read_rows) -> Rows:
        rows = sorted(read(run).to_pylist(), key=lambda row: (row["trial_id"], row.get("epoch", 0)))
        return [
            {
                name: "NaN" if isinstance(value, float) and math.isnan(value) else value
                for name, value in row.items()
                if name not in OF_THE_RUN
            }
            for row in rows
        ]

    return compare
