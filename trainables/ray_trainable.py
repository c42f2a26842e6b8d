"""How Ray Tune runs a trial: one job after another in one actor, one epoch a step, one outcome at the end.

What a trial does is decided in `trainables.trial`. Here: what the actor keeps between trials (the data of
`trainables.loading`, threads), and what it must not keep (anything else).
"""

from __future__ import annotations

import platform
import socket
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from ray import tune

from trainables.loading import load_task
from trainables.trial import HISTORY_KEYS, TrialRun, check_device, failed_outcome


class SCMTrainable(tune.Trainable):
    """One trial after another in the same actor; each leaves nothing behind but loaded data.

    The config is {"job": {"config": flat, "seed": int, "task": {"name", "params", "base_dir"}, "device":
    "cpu" or "cuda", "trial_id": str}}. Each step is an epoch. It returns the epoch's numbers at the top level
    and under "history" (empty when the trial ended without finishing the epoch), and "done". With the last
    one the trial's "outcome" and "provenance" are there, and None before.

    A task or a training that raises ends its trial with the outcome "failed"; the actor goes on. A GPU that
    is asked for and absent raises `DeviceError`: no trial of such a job can run here.
    """

    _run: TrialRun | None = None
    _failed: dict[str, Any] | None = None

    def setup(self, config: dict[str, Any]) -> None:
        """Take the first job, on as many threads as Ray has given CPUs."""
        torch.set_num_threads(thread_share(self.trial_resources))
        self._start(config["job"])

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take the next job; always possible."""
        self._start(new_config["job"])
        return True

    def step(self) -> dict[str, Any]:
        """Train one epoch; with the last one, the outcome is there and `done` is true."""
        said: dict[str, Any] = {}
        outcome = self._failed
        if self._run is not None:
            said = {} if self._run.done else self._run.step()
            outcome = self._run.outcome() if self._run.done else None
        numbers = {key: said.get(key, float("nan")) for key in HISTORY_KEYS}
        if outcome is not None:
            numbers["epoch"] = outcome["epochs"]
        return {
            **numbers,
            "history": said,
            "outcome": outcome,
            "provenance": None if outcome is None else dict(self._provenance),
            "done": outcome is not None,
        }

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Write the trial's state into `checkpoint_dir`; a trial that failed at its start has none."""
        if self._run is not None:
            self._run.save(Path(checkpoint_dir))

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Go on from a folder that `save_checkpoint` wrote for the same job."""
        if self._run is not None:
            self._run.load(Path(checkpoint))

    def cleanup(self) -> None:
        """Let go of the model and the trainer; loaded data go with the process."""
        self._run = None

    def _start(self, job: Mapping[str, Any]) -> None:
        device = job.get("device", "cpu")
        check_device(device)
        self._run, self._failed = None, None
        self._provenance = {**place_of_trial(device), "started_at": datetime.now(UTC).isoformat()}
        try:
            loaded = load_task(job["task"], job["seed"])
        except (Exception, SystemExit) as error:  # a task that raises is a row of each of its trials
            self._failed = failed_outcome(error, job["config"])
            return
        self._provenance["data_digest"] = loaded.data_digest
        self._run = TrialRun(loaded.task, job["config"], job["seed"], device, splits=loaded.splits)


def thread_share(resources: Any) -> int:
    """Give the whole CPUs of a trial's share, at least 1 (also outside of Tune, where there is no share)."""
    cpus = resources.head_cpus if resources is not None else 1
    return max(1, int(cpus))


def place_of_trial(device: str) -> dict[str, Any]:
    """Say where this process runs trials, in the words of a row's columns."""
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.processor()
    return {
        "hostname": socket.gethostname(),
        "device": device,
        "device_name": name or platform.machine(),
        "torch_version": torch.__version__,
    }
