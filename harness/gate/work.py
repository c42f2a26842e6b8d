"""The work of a gate: its trainings and launches in every arm, as far as they are not there yet.

What is asked for, and what follows from it, is decided in `session`; where it is kept, in `kept`.
"""

from __future__ import annotations

import random
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from harness.errors import UserError, one_line
from harness.gate.arm_rows import ArmStore, Key, row_place
from harness.gate.arms import (
    Arm,
    Worker,
    WorkerLostError,
)
from harness.gate.codes import EXIT_INCOMPLETE
from harness.gate.fingerprint import usable_cores
from harness.gate.pool import Answer, Job, Pool
from harness.gate.suite import Suite

LAUNCH_TIMEOUT_S = 600.0


Say = Callable[[str], None]


class Work:
    """The trainings and launches of a gate's arms, and where they are kept."""

    def __init__(
        self,
        suite: Suite,
        arms: Sequence[Arm],
        stores: Mapping[str, ArmStore],
        hellos: Mapping[str, Mapping[str, Any]],
        say: Say,
    ) -> None:
        self.suite = suite
        self.arms = arms
        self.stores = stores
        self.trained = 0
        self.lost: list[str] = []
        self.reused = sum(len(store.taken.rows) for store in stores.values())
        cores = (
            len(arms) if suite.device != "cpu" else usable_cores()
        )  # a GPU trains one at a time, in each arm
        self.pool = Pool(arms, cores=cores, timeout_s=suite.timeout_s)
        self._say = say
        self._places = {
            name: row_place(told, stores[name].taken.origin, suite.device) for name, told in hellos.items()
        }
        self._sitting = uuid.uuid4().hex[:8]

    def check_kept(self) -> None:
        """Refuse to go on with rows that were measured on other data than there are now."""
        kept = {
            (arm.name, key): row["data_digest"]
            for arm in self.arms
            for key, row in self.stores[arm.name].taken.rows.items()
            if row.get("data_digest") is not None
        }
        if not kept:
            return
        self._say(f"{len(kept)} rows were there already")
        jobs = [Job(name, key, {**self._request(name, key), "ask": "digest"}) for name, key in kept]
        changed: list[str] = []

        def compare(answer: Answer) -> None:
            job, found = answer.job, (answer.told or {}).get("data_digest")
            if found is not None and found != kept[job.arm, job.key]:
                changed.append(f"scenario {job.key[0]!r}, seed {job.key[1]}")

        self.pool.run(jobs, compare)
        if changed:
            raise UserError(
                f"the data have changed since rows of {changed[0]} were trained; name another --out",
                EXIT_INCOMPLETE,
            )

    def train(self, seeds: Sequence[int]) -> None:
        """Train every scenario with every one of these seeds in every arm, as far as it is not there."""
        jobs = []
        for seed in seeds:
            for scenario in self.suite.scenarios:
                for arm in self.arms:
                    key = (scenario.name, seed)
                    if key not in self.stores[arm.name].taken.rows:
                        request = {**self._request(arm.name, key), "ask": "train"}
                        jobs.append(Job(arm.name, key, request))
        if not jobs:
            return
        counter = Counter(f"training {len(jobs)} trials", len(jobs), self._say)

        def take(answer: Answer) -> None:
            name, key = answer.job.arm, answer.job.key
            counter.step()
            if answer.told is None:
                self.lost.append(
                    f"{name}: trial of {key[0]!r} with seed {key[1]} was lost: {one_line(answer.lost)}"
                )
                self._say(self.lost[-1])
                return
            told = answer.told
            if "error" in told:
                told = {"outcome": {"status": "failed", "error": told["error"]}}
            arm = next(arm for arm in self.arms if arm.name == name)
            scenario = next(one for one in arm.suite.scenarios if one.name == key[0])
            asked = next(one for one in self.suite.scenarios if one.name == key[0])
            # The question is that of the suite, wherever an arm finds its files.
            self.stores[name].add(replace(scenario, params=asked.params), key[1], told, self._places[name])
            self.trained += 1

        self.pool.run(jobs, take)
        counter.close()

    def time(self, seeds: Sequence[int]) -> None:
        """Launch what times steps: the arms back to back for each seed, by lot which first.

        A launch times each scenario once, in an order that is the same for both arms.
        """
        if not self.suite.times_steps:
            return
        wanted = [
            (seed, keys) for seed in seeds for keys in [self._untimed(seed)] for _ in range(self._short(keys))
        ]
        if not wanted:
            return
        lot = random.Random(f"{self.suite.name} {len(seeds)}")
        lot.shuffle(wanted)
        counter = Counter(f"timing {len(wanted)} launches of each arm", len(wanted), self._say)
        for number, (_, keys) in enumerate(wanted):
            keys = lot.sample(keys, len(keys))
            made = []
            for place, arm in enumerate(lot.sample(self.arms, len(self.arms))):
                at = datetime.now(UTC)
                made.append((arm.name, place, at, self._launch(arm, keys)))
            counter.step()
            pair = f"{self._sitting}-{len(seeds)}-{number}"
            for key in keys:
                if all(key in times for _, _, _, times in made):
                    for name, place, at, times in made:
                        self.stores[name].add_launch(*key, pair, place, times[key], at)
        counter.close()

    def _untimed(self, seed: int) -> list[Key]:
        """The scenarios that have a row with a seed in every arm, and not all their launches."""
        keys = [(scenario.name, seed) for scenario in self.suite.scenarios]
        return [
            key
            for key in keys
            if all(key in store.taken.rows for store in self.stores.values()) and self._short([key])
        ]

    def _short(self, keys: Sequence[Key]) -> int:
        """How many launches the one of these that has fewest lacks; 0 for none."""
        taken = [store.taken.launches for store in self.stores.values()]
        had = [len(set.intersection(*(set(found.get(key, {})) for found in taken))) for key in keys]
        return max((self.suite.launches - number for number in had), default=0)

    def _launch(self, arm: Arm, keys: Sequence[Key]) -> dict[Key, float]:
        """The median steps of some scenarios in one process; what failed is said, and not among them."""
        times: dict[Key, float] = {}
        try:
            with Worker(arm) as worker:
                for key in keys:
                    request = {**self._request(arm.name, key), "ask": "time", "steps": self.suite.steps}
                    told = worker.ask(request, LAUNCH_TIMEOUT_S)
                    if "error" in told:
                        self._say(f"{arm.name}: launch of {key[0]!r} with seed {key[1]}: {told['error']}")
                    else:
                        times[key] = float(told["step_time_ms"])
        except WorkerLostError as error:
            self._say(f"{arm.name}: a launch was lost: {one_line(error)}")
        return times

    def _request(self, name: str, key: Key) -> dict[str, Any]:
        arm = next(arm for arm in self.arms if arm.name == name)
        scenario = next(one for one in arm.suite.scenarios if one.name == key[0])
        return {"spec": scenario.spec, "config": scenario.config, "seed": key[1], "device": self.suite.device}


class Counter:
    """Says how far a long piece of work is: on a terminal as it goes on, elsewhere when it is done."""

    def __init__(self, what: str, total: int, say: Say) -> None:
        self._what, self._total, self._say = what, total, say
        self._done = 0
        self._started_s = time.monotonic()
        self._shown_s = self._started_s

    def step(self) -> None:
        """One more is done."""
        self._done += 1
        now = time.monotonic()
        if sys.stderr.isatty() and now - self._shown_s > 5.0 and self._done < self._total:
            self._shown_s = now
            self._say(f"{self._what}: {self._done} done")

    def close(self) -> None:
        """All are done."""
        self._say(f"{self._what}: {time.monotonic() - self._started_s:.1f} s")
