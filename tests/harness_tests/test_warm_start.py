"""A local Ray's workers import what trials need while the driver gets ready, and trials use those workers."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.environment import ray_session
from harness.plan import ResourcesSection
from harness.warm_start import is_warm_start, noted, wait_for_warm_workers, warm_start_settings


@pytest.mark.parametrize(
    ("resources", "trials", "warm"),
    [
        ({}, 4, True),
        ({}, 3, False),
        ({"cpus_per_trial": 0.5}, 9, True),
        ({"cpus_per_trial": 2}, 9, False),
        ({"max_concurrent": 1}, 9, False),
        ({"gpus_per_trial": 1}, 9, False),
    ],
)
def test_workers_are_warm_where_each_of_them_will_be_used(
    resources: dict[str, float], trials: int, warm: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    assert is_warm_start(ResourcesSection(**resources), trials) is warm


COUNTED = """
import sys
from pathlib import Path
import ray
from harness.environment import RayStart
from harness.plan import load_plan
from harness.sweep import run_sweep

end = RayStart.end

def count(start):
    notes = [len(list(start._scratch.glob(f"*.{word}"))) for word in ("begun", "ended")]
    print(int(ray.cluster_resources()["CPU"]), *notes)
    end(start)

RayStart.end = count
run_sweep(load_plan(Path(sys.argv[1])), Path(sys.argv[2]))
"""


def test_a_sweep_runs_in_the_workers_that_were_warm(write_plan: Callable[..., Path], tmp_path: Path):
    """Every process that Ray starts notes that it imports: a second set of workers would show."""
    command = [sys.executable, "-c", COUNTED, str(write_plan()), str(tmp_path / "run")]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    cpus, begun, ended = map(int, ran.stdout.split())
    assert begun == ended == cpus > 0


def test_an_import_that_fails_is_noted_as_ended(tmp_path: Path):
    settings = warm_start_settings(tmp_path)
    with pytest.raises(ImportError), noted(settings):
        raise ImportError("no such thing")
    assert len(list(tmp_path.glob("*.ended"))) == 1
    with noted({}):  # in any other process it leaves no trace
        pass
    assert len(list(tmp_path.iterdir())) == 2


def test_the_driver_waits_for_workers_until_the_last_has_ended(tmp_path: Path):
    for worker in (1, 2):
        (tmp_path / f"{worker}.begun").touch()
    (tmp_path / "1.ended").touch()
    waiting = threading.Thread(target=wait_for_warm_workers, args=(tmp_path, 2))
    waiting.start()
    time.sleep(0.1)
    assert waiting.is_alive()
    (tmp_path / "2.ended").touch()
    waiting.join(10.0)
    assert not waiting.is_alive()


def test_the_driver_does_not_wait_for_workers_that_never_begin(tmp_path: Path):
    """A Ray that does not let its workers import first is only slower: in the end the driver goes on."""
    waiting = threading.Thread(target=wait_for_warm_workers, args=(tmp_path, 2), daemon=True)
    waiting.start()
    waiting.join(15.0)  # less than it would wait for one that has begun
    assert not waiting.is_alive()
    assert list(tmp_path.iterdir()) == []


def test_a_start_that_fails_is_an_error_of_whoever_waits_for_it(monkeypatch: pytest.MonkeyPatch):
    def refuse(**options: object) -> None:
        raise RuntimeError("no room for it")

    monkeypatch.setattr("ray.init", refuse)
    monkeypatch.setattr("ray.is_initialized", lambda: False)  # other tests may have left one running
    monkeypatch.setattr("ray.shutdown", lambda: None)
    with pytest.raises(RuntimeError, match="no room"), ray_session(ResourcesSection(), None):
        pass
