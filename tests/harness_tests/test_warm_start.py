"""A local Ray's workers import what trials need while the driver gets ready, and trials use those workers."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.environment import RayStart, ray_session
from harness.plan import ResourcesSection, load_plan
from harness.sweep import run_sweep
from harness.warm_start import is_warm_start, noted, wait_for_warm_workers, warm_start_settings


@pytest.mark.parametrize(
    ("resources", "warm"),
    [
        ({}, True),
        ({"cpus_per_trial": 0.5}, True),
        ({"cpus_per_trial": 2}, False),
        ({"max_concurrent": 1}, False),
        ({"gpus_per_trial": 1}, False),
    ],
)
def test_workers_are_warm_where_each_of_them_will_be_used(resources, warm):
    assert is_warm_start(ResourcesSection(**resources)) is warm


def test_a_sweep_runs_in_the_workers_that_were_warm(
    write_plan: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Every process that Ray starts notes that it imports: a second set of workers would show."""
    found: dict[str, int] = {}
    end = RayStart.end

    def count(start: RayStart) -> None:
        import ray

        found["cpus"] = int(ray.cluster_resources()["CPU"])
        found["workers"] = len(list(start._scratch.glob("*.begun")))
        found["ended"] = len(list(start._scratch.glob("*.ended")))
        end(start)

    monkeypatch.setattr(RayStart, "end", count)
    run_sweep(load_plan(write_plan()), tmp_path / "run")
    assert found["cpus"] == found["workers"] == found["ended"] > 0


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
    """A Ray that does not let its workers import first is only slower."""
    wait_for_warm_workers(tmp_path, 2)


def test_a_start_that_fails_is_an_error_of_whoever_waits_for_it(monkeypatch: pytest.MonkeyPatch):
    def refuse(**options: object) -> None:
        raise RuntimeError("no room for it")

    monkeypatch.setattr("ray.init", refuse)
    with pytest.raises(RuntimeError, match="no room"), ray_session(ResourcesSection(), None):
        pass
