"""What a worker does with a pack of segments: train each from its state to its rung, and say how it went."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import ray
import torch
from ray import tune

from harness.jobs import HALVED, Report
from trainables.loading import load_task
from trainables.packed_trial import Member, PackRun, Shelf, Told
from trainables.ray_trainable import place_of_trial, thread_share

REPORT_EVERY_S = 2.0


@dataclass(slots=True)
class Parcel:
    """A pack on its way to a worker: the members, what they learn, and where.

    Tune copies, flattens and prints the configs of its trials; a parcel stays one thing with a short name.
    """

    pack_id: str
    task: Mapping[str, Any]
    device: str
    members: Sequence[Member] = field(repr=False)

    def take_members(self) -> Sequence[Member]:
        """Give the members away: Tune sends the config of a trial back with every report, and keeps both."""
        members, self.members = self.members, ()
        return members

    def __deepcopy__(self, memo: dict[int, Any]) -> Parcel:
        return self

    def __repr__(self) -> str:
        return self.pack_id


class PackTrainable(tune.Trainable):
    """Trains one pack after another in the same actor, reporting at its end and every few seconds.

    A report for each epoch would cost more than a short epoch does. A trial that reaches its rung gives back
    both its state and its outcome, so that it needs no worker to be stopped there. What stays between packs
    is loaded data and a shelf for each task, which change nothing that a trial comes to.
    """

    _shelves: dict[str, Shelf]

    def setup(self, config: dict[str, Any]) -> None:
        """Take the first pack, on as many threads as Ray has given CPUs."""
        torch.set_num_threads(thread_share(self.trial_resources))
        self._shelves = {}
        self._enter(config["parcel"])

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take the next pack; always possible."""
        self._enter(new_config["parcel"])
        return True

    def step(self) -> dict[str, Any]:
        """Train until the pack ends or seconds have passed; "report" refers to what was said meanwhile.

        That is a `Report` by trial_id. It lies beside the answer, which must stay small enough to travel by
        itself: what Ray keeps on this node is lost with it, and Tune cannot go on when that happens to a
        result.
        """
        report_at = time.monotonic() + REPORT_EVERY_S
        heard: dict[str, Report] = {}
        while not self._run.done and time.monotonic() < report_at:
            for told in self._run.step():
                self._hear(told, heard)
        return {"report": ray.put(heard), "done": self._run.done}

    def cleanup(self) -> None:
        """Let go of the pack; loaded data go with the process."""
        del self._run

    def _enter(self, parcel: Parcel) -> None:
        spec = parcel.task
        self._digests: dict[int, str] = {}

        def load(seed: int) -> tuple[Any, Any]:
            loaded = load_task(spec, seed)
            self._digests[seed] = loaded.data_digest
            return loaded.task, loaded.splits

        shelf = self._shelves.setdefault(json.dumps(spec, sort_keys=True, default=str), Shelf())
        members = parcel.take_members()
        self._seeds = {member.trial_id: member.seed for member in members}
        self._place = {
            **place_of_trial(parcel.device),
            "started_at": datetime.now(UTC),
            "node_id": ray.get_runtime_context().get_node_id(),
        }
        self._run = PackRun(members, load, parcel.device, pack_id=parcel.pack_id, shelf=shelf)

    def _hear(self, told: Told, heard: dict[str, Report]) -> None:
        """Add what a trial said to its report."""
        before = heard.get(told.trial_id)
        epochs = [*(before.epochs if before else ()), *([told.said] if told.said else ())]
        outcome, place = told.outcome, {}
        if outcome is not None:
            digest = self._digests.get(self._seeds[told.trial_id])
            place = {**self._place, "data_digest": digest}
            if told.state is not None:
                outcome = {**outcome, "stop_reason": f"{HALVED} at epoch {outcome['epochs']}"}
        heard[told.trial_id] = Report(epochs, outcome, told.state, place)
