"""Workers of a local Ray that import what trials need while Ray and the driver still get ready.

Ray starts a worker for each CPU as soon as it can, and lets it import modules first. It takes such a worker
for busy until that is done, and would start another one for a trial that comes earlier: so the driver waits.
The workers say how far they are by files in a folder of the run.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from harness.plan import ResourcesSection

_FOLDER = "SCM_HARNESS_WARM_FOLDER"
TUNE_VARIABLES = {"PL_DISABLE_FORK": "1"}
"""What Tune gives to every actor."""
_BEGUN, _ENDED = ".begun", ".ended"
_BEGIN_S, _GO_ON_S = 2.0, 20.0


def is_warm_start(resources: ResourcesSection, trials: int) -> bool:
    """Whether workers import ahead: where fewer are used than there are CPUs, others would do so in vain."""
    one_a_cpu = resources.cpus_per_trial <= 1 and not resources.gpus_per_trial
    return one_a_cpu and resources.max_concurrent is None and trials >= (os.cpu_count() or 1)


def warm_start_settings(folder: Path) -> dict[str, str]:
    """Return the environment in which Ray is to start, to have warm workers that note in `folder`."""
    return {
        _FOLDER: str(folder),
        "RAY_preload_python_modules": "harness.warm_worker",
        # An idle worker is one too many for Ray as soon as a trial has reserved its CPU.
        "RAY_idle_worker_killing_time_threshold_ms": "30000",
        **TUNE_VARIABLES,
    }


@contextlib.contextmanager
def workers_as_they_are() -> Iterator[None]:
    """Let Tune use the workers that are there, where it has what decides that under these names.

    It gives its actors variables of their own, for which Ray starts other workers. Those of a warm start have
    them already: `TUNE_VARIABLES`, and all that this process has.
    """
    from ray.tune.execution import class_cache

    none: dict[str, Any] = {"DEFAULT_ENV_VARS": {}, "ENV_VARS_TO_PROPAGATE": set()}
    before = {name: getattr(class_cache, name) for name in none if hasattr(class_cache, name)}
    for name in before:
        setattr(class_cache, name, none[name])
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(class_cache, name, value)


def wait_for_warm_workers(folder: Path, workers: int) -> None:
    """Return when so many workers have ended to import, and where none begins or goes on."""
    seen, seen_s = (0, 0), time.monotonic()
    while (now := (_count(folder, _BEGUN), _count(folder, _ENDED)))[1] < workers:
        if now != seen:
            seen, seen_s = now, time.monotonic()
        if time.monotonic() - seen_s > (_GO_ON_S if now[0] else _BEGIN_S):
            return
        time.sleep(0.01)


def _count(folder: Path, suffix: str) -> int:
    return sum(1 for _ in folder.glob(f"*{suffix}"))


@contextlib.contextmanager
def noted(environment: Mapping[str, str] = os.environ) -> Iterator[None]:
    """In a worker: note that it begins to import, and that it has ended, whatever comes of it."""
    folder = Path(environment.get(_FOLDER, ""))
    if not environment.get(_FOLDER) or not folder.is_dir():
        yield
        return
    (folder / f"{os.getpid()}{_BEGUN}").touch()
    try:
        yield
    finally:
        (folder / f"{os.getpid()}{_ENDED}").touch()
