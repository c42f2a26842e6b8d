"""What a worker does with a segment: train from its state to its rung, and say how that went."""

from __future__ import annotations

import io
import tarfile
import tempfile
import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import ray

from harness.jobs import HALVED, Report
from trainables.ray_trainable import SCMTrainable

REPORT_EVERY_S = 2.0


class Parcel:
    """A segment on its way to a worker: the job as `SCMTrainable` takes it, the epoch to stop at, the state.

    Tune copies, flattens and prints the configs of its trials; a parcel stays one thing with a short name.
    """

    __slots__ = ("job", "state", "until")

    def __init__(self, job: Mapping[str, Any], until: int | None, state: bytes | None) -> None:
        self.job = job
        self.until = until
        self.state = state

    def __deepcopy__(self, memo: dict[int, Any]) -> Parcel:
        return self

    def __repr__(self) -> str:
        return str(self.job["trial_id"])


class SegmentTrainable(SCMTrainable):
    """Trains one segment after another in the same actor, reporting at the end and every few seconds.

    A report for each epoch would cost more than a short epoch does. A segment that ends at a rung gives back
    both the trial's state and its outcome, so that the trial needs no worker to be stopped there.
    """

    def setup(self, config: dict[str, Any]) -> None:
        """Take the first segment."""
        parcel: Parcel = config["parcel"]
        super().setup({"job": parcel.job})
        self._enter(parcel)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take the next segment; always possible."""
        parcel: Parcel = new_config["parcel"]
        super().reset_config({"job": parcel.job})
        self._enter(parcel)
        return True

    def step(self) -> dict[str, Any]:
        """Train until the segment ends or seconds have passed; "report" holds what was said meanwhile."""
        report_at = time.monotonic() + REPORT_EVERY_S
        epochs: list[Mapping[str, float]] = []
        while True:
            said = super().step()
            if said["history"]:
                epochs.append(said["history"])
            if said["done"]:
                return self._ended(Report(epochs, said["outcome"], None, self._place()))
            if self._until is not None and said["epoch"] >= self._until:
                return self._ended(self._paused(epochs))
            if time.monotonic() >= report_at:
                return {"report": Report(epochs), "done": False}

    def _enter(self, parcel: Parcel) -> None:
        self._until = parcel.until
        if parcel.state is not None:
            with tempfile.TemporaryDirectory(prefix="scm-state-") as folder:
                unpack_folder(parcel.state, Path(folder))
                self.load_checkpoint(folder)

    def _paused(self, epochs: list[Mapping[str, float]]) -> Report:
        run = self._run
        assert run is not None
        with tempfile.TemporaryDirectory(prefix="scm-state-") as folder:
            self.save_checkpoint(folder)
            # Beside the report, which must stay small enough to travel with the answer itself: what Ray keeps
            # on this node is lost with it, and Tune cannot go on when that happens to a result.
            state = ray.put(pack_folder(Path(folder)))
        run.stop(f"{HALVED} at epoch {self._until}")
        return Report(epochs, run.outcome(), state, self._place())

    def _ended(self, report: Report) -> dict[str, Any]:
        return {"report": report, "done": True}

    def _place(self) -> dict[str, Any]:
        place = dict(self._provenance)
        if isinstance(place.get("started_at"), str):
            place["started_at"] = datetime.fromisoformat(place["started_at"])
        return {**place, "node_id": ray.get_runtime_context().get_node_id()}


def pack_folder(folder: Path) -> bytes:
    """The files of a folder as bytes."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for path in sorted(folder.iterdir()):
            archive.add(path, arcname=path.name)
    return packed.getvalue()


def unpack_folder(packed: bytes, folder: Path) -> None:
    """Write the files that `pack_folder` packed into a folder."""
    with tarfile.open(fileobj=io.BytesIO(packed), mode="r") as archive:
        archive.extractall(folder, filter="data")
