"""A process that trains a pack, saves it at the end of every epoch, and is killed in the middle of one.

The parent asks for it with `start_killed_worker`, kills it with SIGKILL while a step of an epoch is under
way, and gets what the worker had saved. What becomes of the saves is the caller's.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch

from scm.packed.engine import PackedTrainer
from scm.training.checkpoint import read_checkpoint, write_checkpoint
from scm.training.trainer import SCMTrainer
from trainables.lane_states import AloneState, LaneState
from trainables.loading import load_task
from trainables.packed_trial import Load, Member, PackRun, Shelf

State = LaneState | AloneState
_IN_EPOCH = "in the middle of epoch"


class WorkerError(RuntimeError):
    """The worker was not killed in the middle of an epoch; the message says what happened instead."""


@dataclass(frozen=True, slots=True)
class WorkerJob:
    """What a worker trains: (trial_id, config, seed) each, up to the epoch (from 0) in which it is killed."""

    spec: Mapping[str, Any]
    members: Sequence[tuple[str, Mapping[str, Any], int]]
    epoch: int
    device: str
    threads: int


class KilledWorker:
    """A worker under way; `saves` waits for it. A context: what is left of it goes when the block ends."""

    def __init__(self, job: WorkerJob) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="scm-worker-")
        self._job = job
        folder = Path(self._folder.name)
        (folder / "job.json").write_text(json.dumps(asdict(job), default=str), encoding="utf-8")
        self._errors = open(folder / "errors.txt", "w+", encoding="utf-8")  # noqa: SIM115, closed below
        path = os.pathsep.join(item for item in (*sys.path, os.environ.get("PYTHONPATH", "")) if item)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "trainables.killed_worker", str(folder)],
            stdout=subprocess.PIPE,
            stderr=self._errors,
            stdin=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
        )

    def __enter__(self) -> KilledWorker:
        return self

    def __exit__(self, *told: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._errors.close()
        self._folder.cleanup()

    def saves(self, limit_s: float) -> dict[int, dict[str, State]]:
        """Kill the worker when it is in the middle of its epoch; return what it had saved, by epochs trained.

        Raises WorkerError where it ended otherwise, or took longer than `limit_s`.
        """
        said = self._said(limit_s)
        if not said.startswith(_IN_EPOCH):
            raise WorkerError(self._what_happened(said, limit_s))
        self._process.send_signal(signal.SIGKILL)
        code = self._process.wait()
        if code != -signal.SIGKILL:
            raise WorkerError(f"the worker should have died of SIGKILL, it ended with {code}")
        found = sorted(Path(self._folder.name).glob("epoch_*.pt"))
        return {int(path.stem.partition("_")[2]): read_states(path) for path in found}

    def _said(self, limit_s: float) -> str:
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], limit_s)
        return self._process.stdout.readline() if ready else ""

    def _what_happened(self, said: str, limit_s: float) -> str:
        if said:
            return f"the worker was not killed: {said.strip()}"
        code = self._process.poll()
        if code is None:
            return (
                f"the worker did not reach the middle of epoch {self._job.epoch + 1} within {limit_s:.0f} s"
            )
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines()
        return f"the worker ended with {code}: {lines[-1] if lines else 'it said nothing'}"


def write_states(path: Path, states: Mapping[str, State]) -> None:
    """Write where trials stand, by trial_id, whole or not at all; reading it runs nothing."""
    held: dict[str, Any] = {}
    for trial_id, state in states.items():
        if isinstance(state, AloneState):
            files = torch.frombuffer(bytearray(state.files), dtype=torch.uint8)
            held[trial_id] = {"files": files, "note": state.note}
        else:
            held[trial_id] = {
                "lane": dict(state.lane),
                "held": {name: torch.from_numpy(np.array(item)) for name, item in state.held.items()},
                "optimizer": {
                    name: torch.from_numpy(np.array(item)) for name, item in state.optimizer.items()
                },
                "best": None if state.best is None else torch.from_numpy(np.array(state.best)),
                "spent_s": state.spent_s,
            }
    write_checkpoint(path, {"states": held})


def read_states(path: Path) -> dict[str, State]:
    """Read what `write_states` wrote; raises as `read_checkpoint` does."""
    states: dict[str, State] = {}
    for trial_id, held in read_checkpoint(path)["states"].items():
        if "files" in held:
            states[trial_id] = AloneState(held["files"].numpy().tobytes(), held["note"])
        else:
            states[trial_id] = LaneState(
                held["lane"],
                {name: item.numpy() for name, item in held["held"].items()},
                {name: item.numpy() for name, item in held["optimizer"].items()},
                None if held["best"] is None else held["best"].numpy(),
                held["spent_s"],
            )
    return states


# --- in the worker ------------------------------------------------------------------------------------


def main(argv: Sequence[str]) -> int:
    """Train the job of the folder that is named, and wait in the middle of its epoch to be killed."""
    folder = Path(argv[0])
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    torch.set_num_threads(job["threads"])
    members = [Member(trial_id, config, seed) for trial_id, config, seed in job["members"]]

    def load(seed: int) -> Any:
        held = load_task(job["spec"], seed)
        return held.task, held.splits

    shelf = Shelf()
    states: dict[str, State] = {}
    for epoch in range(job["epoch"] + 1):
        if epoch == job["epoch"]:
            _wait_in_epoch(epoch)
        states = _train_epoch(members, load, job["device"], shelf, epoch, states)
        members = [member for member in members if member.trial_id in states]
        if not members:
            print(f"all trials had ended after epoch {epoch + 1}", flush=True)
            return 0
        write_states(folder / f"epoch_{epoch + 1}.pt", states)
    print(f"epoch {job['epoch'] + 1} was over before", flush=True)
    return 0


def _train_epoch(
    members: Sequence[Member],
    load: Load,
    device: str,
    shelf: Shelf,
    epoch: int,
    states: Mapping[str, State],
) -> dict[str, State]:
    those = [
        Member(item.trial_id, item.config, item.seed, until=epoch + 1, state=states.get(item.trial_id))
        for item in members
    ]
    reached: dict[str, State] = {}
    run = PackRun(those, load, device, shelf=shelf)
    while not run.done:
        for told in run.step():
            if told.state is not None:
                reached[told.trial_id] = told.state
    return reached


def _wait_in_epoch(epoch: int) -> None:
    """From now on: when half the micro-batches of an epoch are trained, say so and wait for the end."""
    of_pack, alone = PackedTrainer._micro_batch.__code__, SCMTrainer._accumulate.__code__
    done = 0

    def look(frame: FrameType, event: str, arg: object) -> None:
        nonlocal done
        if event != "return" or frame.f_code not in (of_pack, alone):
            return
        done += 1
        held = frame.f_locals
        together = frame.f_code is of_pack
        of_epoch = held["seats"].shared.micro_batches if together else len(held["self"].train_loader)
        if done >= max(1, of_epoch // 2):
            print(f"{_IN_EPOCH} {epoch + 1}", flush=True)
            while True:
                signal.pause()

    # Called at every return of a function: a clock might miss an epoch that takes a millisecond.
    sys.setprofile(look)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
