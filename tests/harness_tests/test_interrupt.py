"""Signals from outside: the process ends soon, keeps its rows and says how to go on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.errors import EXIT_INTERRUPTED
from reports.rows import read_rows


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "group"),
    [(signal.SIGINT, True), (signal.SIGTERM, False), (signal.SIGTERM, True)],
    ids=["Ctrl-C in a terminal", "kill", "kill of the group, Ray included"],
)
def test_a_signal_ends_a_sweep_cleanly(
    number: signal.Signals, group: bool, write_plan: Callable[..., Path], tmp_path: Path
) -> None:
    """Exit code 130, every finished row kept, and what to type to go on; also where Ray was ended with it."""
    plan = write_plan(search={"configs": 2000, "batch": 8}, config={"max_epochs": 20})
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-m", "harness.cli", "sweep", str(plan), "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        wait_until(lambda: any((out / "rows").glob("*.parquet")), process, 120.0)
        (os.killpg if group else os.kill)(process.pid, number)
        said, errors = process.communicate(timeout=90)
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()
    assert process.returncode == EXIT_INTERRUPTED, errors
    assert said == ""
    assert "Traceback" not in errors
    rows = read_rows(out)
    assert set(rows.column("status").to_pylist()) <= {"completed", "diverged", "stopped"}
    if group and number == signal.SIGTERM:
        return  # nothing can be said any more
    last = errors.splitlines()[-1]
    assert last.startswith(f"interrupted: {len(rows)} rows kept in {out}")
    assert last.endswith(f"scm-harness sweep {plan} --out {out} --resume")


def wait_until(holds: Callable[[], bool], process: subprocess.Popen[str], seconds: float) -> None:
    """Wait for a condition while the process runs; fail with what it said when it ended before."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.1)
