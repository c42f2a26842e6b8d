"""A sweep on a cluster of two nodes, one of which is removed while trials run on it."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from harness.errors import EXIT_OK
from reports.fragments import RunReadError
from reports.rows import read_rows

# A trial takes long enough for the other node to take one too, and to be caught in the middle of one.
SLOW_TASK = """
import time

from trainables.tasks.dose import make_dose_task


def slow(params):
    task = make_dose_task({})
    metrics = task.metrics

    def slow_metrics(decoded, split, config):
        time.sleep(0.1)
        return metrics(decoded, split, config)

    task.metrics = slow_metrics
    return task
"""


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A head and a second node of one CPU each, in a temporary folder of their own."""
    from ray.cluster_utils import Cluster

    with tempfile.TemporaryDirectory(prefix="scm-c-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        monkeypatch.setenv("RAY_TMPDIR", folder)
        monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        try:
            yield made
        finally:
            made.shutdown()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray's own, while processes of its nodes are taken down
def test_trials_run_on_both_nodes_and_a_lost_node_costs_no_row(
    cluster: Any, write_plan: Callable[..., Path], tmp_path: Path
) -> None:
    """Both nodes write rows; with one removed in mid-run the other runs the rest, each trial exactly once."""
    second = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    (tmp_path / "own_slow_task.py").write_text(SLOW_TASK, encoding="utf-8")
    plan = write_plan(
        task={"name": "own_slow_task:slow"},
        space={"learning_rate": {"type": "log-float", "low": 1e-4, "high": 1e-2}},
        search={"algorithm": "sobol", "configs": 12, "batch": 4},
        config={"max_epochs": 3, "batch_size": 256},
        halving={"rungs": [1], "eta": 2},
    )
    out = tmp_path / "out"
    sweep = [sys.executable, "-m", "harness.cli", "sweep", str(plan), "--out", str(out)]
    process = subprocess.Popen(
        [*sweep, "--address", cluster.address], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + 120
        while second.node_id not in nodes_of(out):
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.1)
        before = len(read_rows(out))
        cluster.remove_node(second, allow_graceful=False)
        said, errors = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()
    assert process.returncode == EXIT_OK, errors
    assert "12 configs" in said
    rows = read_rows(out)
    assert before < 24
    assert len(rows) == 24
    assert len(set(rows.column("trial_id").to_pylist())) == 24
    assert set(rows.column("status").to_pylist()) == {"completed", "stopped"}
    assert len(nodes_of(out)) == 2


def nodes_of(out: Path) -> set[str]:
    """The nodes that have written rows so far."""
    try:
        return set(read_rows(out).column("node_id").to_pylist())
    except RunReadError:
        return set()
