"""Successive halving as a pure board: who goes on at each rung, given what every trial of a cohort reported.

A cohort halves on its own and in step: at a rung the board waits for every config of the cohort that got
there, then lets the best `ceil(n / eta)` of those n go on. A config counts with the mean over its seeds, and
its seeds go on or stop together. A metric that is not finite, and a trial that failed, make the config the
worst there is: it never passes that rung, not even when nobody else does. Nothing here knows Ray, time or the
order of arrival.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal, TypeAlias

Action: TypeAlias = Literal["continue", "stop", "wait"]
TrialKey: TypeAlias = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Decision:
    """What one trial is to do now; "wait" is followed by another decision for it in a later answer."""

    cohort: int
    config_id: str
    seed: int
    action: Action


@dataclass(slots=True)
class _Trial:
    """What the board knows of one trial; `values[r]` is what it was worth at rung r."""

    values: dict[int, float] = field(default_factory=dict)
    waits_at: int | None = None
    passed: int = 0  # rungs behind it
    stopped: bool = False
    left: bool = False


@dataclass(slots=True)
class _Cohort:
    members: dict[str, dict[int, _Trial]]
    entrants: set[str]
    awaited: set[TrialKey]  # of the entrants, those whose value at the rung is still to come
    rung: int = 0  # the rung that is still to be decided


class RungBoard:
    """Decides, for each cohort, which trials go on at each rung.

    `rungs` are epochs, strictly increasing; `mode` says whether a small ("min") or a large ("max") value is
    good. A trial's value at a rung is the first that it reports at that epoch or later.
    """

    def __init__(self, rungs: Sequence[int], eta: int = 3, mode: Literal["min", "max"] = "min") -> None:
        rungs = tuple(rungs)
        if not rungs or rungs[0] < 1 or any(b <= a for a, b in pairwise(rungs)):
            raise ValueError(f"rungs must be epochs >= 1 that increase, got rungs={list(rungs)}")
        if eta < 2:
            raise ValueError(f"eta must be >= 2, got {eta=}")
        if mode not in ("min", "max"):
            raise ValueError(f"mode must be 'min' or 'max', got {mode=}")
        self.rungs: tuple[int, ...] = rungs
        self.eta = eta
        self.mode = mode
        self._cohorts: dict[int, _Cohort] = {}

    def open_cohort(self, cohort: int, members: Iterable[TrialKey]) -> None:
        """Announce all trials `(config_id, seed)` of a cohort, before any of them reports."""
        if cohort in self._cohorts:
            raise ValueError(f"a cohort can be opened once, got {cohort=} again")
        trials: dict[str, dict[int, _Trial]] = {}
        for config_id, seed in members:
            seeds = trials.setdefault(config_id, {})
            if seed in seeds:
                raise ValueError(f"members must differ, got {(config_id, seed)} twice in {cohort=}")
            seeds[seed] = _Trial()
        if not trials:
            raise ValueError(f"a cohort must have members, got none for {cohort=}")
        everyone = {(config_id, seed) for config_id, seeds in trials.items() for seed in seeds}
        self._cohorts[cohort] = _Cohort(trials, set(trials), everyone)

    def close_cohort(self, cohort: int) -> None:
        """Forget a cohort whose trials have all ended."""
        self._state(cohort)
        del self._cohorts[cohort]

    def report(
        self, cohort: int, config_id: str, seed: int, epoch: int, value: float | None
    ) -> list[Decision]:
        """Take in the metric after `epoch`; gives the reporter's decision, then those of trials that waited.

        A report that repeats what is known (a trial that was restarted after a node was lost) changes
        nothing. None counts as not finite.
        """
        trial = self._trial(cohort, config_id, seed)
        if trial.left:
            raise ValueError(f"a trial that left cannot report, got {config_id=}, {seed=}, {epoch=}")
        number = math.nan if value is None else float(value)
        reached = [r for r, rung in enumerate(self.rungs) if rung <= epoch]
        for r in reached:
            trial.values.setdefault(r, number)
        if not trial.stopped and len(reached) > trial.passed:
            trial.waits_at = trial.passed
        freed = self._settle(cohort, config_id, seed)
        own = self._decision(cohort, config_id, seed)
        return [
            own,
            *(decision for decision in freed if (decision.config_id, decision.seed) != (config_id, seed)),
        ]

    def leave(self, cohort: int, config_id: str, seed: int, value: float | None = None) -> list[Decision]:
        """Take in that a trial ended by itself; gives the decisions for the trials that waited for it.

        `value` is its last metric where it ended well: it stands for it at the rungs ahead. None says that it
        failed, which makes its config the worst at the next rung that it did not reach.
        """
        trial = self._trial(cohort, config_id, seed)
        if not trial.left:
            trial.left = True
            trial.waits_at = None
            number = math.nan if value is None else float(value)
            for r in range(len(self.rungs)):
                trial.values.setdefault(r, number)
        return self._settle(cohort, config_id, seed)

    def awaited(self, cohort: int) -> list[TrialKey]:
        """The trials, sorted, that must still report or leave before the cohort's next rung is decided."""
        return sorted(self._state(cohort).awaited)

    def _settle(self, cohort: int, config_id: str, seed: int) -> list[Decision]:
        """Decide what the news of one trial allows; gives a decision for all who waited and do no longer."""
        state = self._state(cohort)
        if state.rung in self._trial(cohort, config_id, seed).values:
            state.awaited.discard((config_id, seed))
        # Until the last value of a rung is there, a trial's news concern its own config alone.
        decides = state.rung < len(self.rungs) and not state.awaited
        concerned = sorted(state.members) if decides else [config_id]
        waiting = [
            (c, s) for c in concerned for s, t in sorted(state.members[c].items()) if t.waits_at is not None
        ]
        while state.rung < len(self.rungs) and not state.awaited:
            go_on = self._survivors(state)
            for entrant in state.entrants:
                for trial in state.members[entrant].values():
                    trial.stopped = entrant not in go_on
                    trial.passed += not trial.stopped
            state.entrants = go_on
            state.rung += 1
            self._renew_waits(state)
        self._stop_the_doomed(state, concerned)
        return [d for d in (self._decision(cohort, c, s) for c, s in waiting) if d.action != "wait"]

    def _survivors(self, state: _Cohort) -> set[str]:
        worth = {config_id: self._worth(state, config_id) for config_id in state.entrants}
        finite = [config_id for config_id in state.entrants if math.isfinite(worth[config_id])]
        places = math.ceil(len(state.entrants) / self.eta)
        return set(sorted(finite, key=lambda config_id: (worth[config_id], config_id))[:places])

    def _worth(self, state: _Cohort, config_id: str) -> float:
        """The mean over the seeds, small is good; infinite where a seed has no finite value."""
        values = [trial.values[state.rung] for _, trial in sorted(state.members[config_id].items())]
        if not all(map(math.isfinite, values)):
            return math.inf
        # Divided first: the sum of two large finite values may overflow, and a mean of finite values is
        # finite.
        mean = math.fsum(value / len(values) for value in values)
        return mean if self.mode == "min" else -mean

    def _renew_waits(self, state: _Cohort) -> None:
        """After a rung: who reported beyond the next one waits there, the others go on or are gone."""
        state.awaited = {
            (c, s)
            for c in (state.entrants if state.rung < len(self.rungs) else ())
            for s, trial in state.members[c].items()
            if state.rung not in trial.values
        }
        for seeds in state.members.values():
            for trial in seeds.values():
                there = (
                    not trial.stopped
                    and not trial.left
                    and trial.passed == state.rung
                    and state.rung in trial.values
                )
                trial.waits_at = state.rung if there else None

    def _stop_the_doomed(self, state: _Cohort, concerned: Sequence[str]) -> None:
        """End the waiting trials of configs with a seed that has no finite value at this rung."""
        if state.rung >= len(self.rungs):
            return
        for config_id in state.entrants.intersection(concerned):
            seeds = state.members[config_id].values()
            if any(not math.isfinite(trial.values.get(state.rung, 0.0)) for trial in seeds):
                for trial in seeds:
                    if trial.waits_at is not None:
                        trial.waits_at, trial.stopped = None, True

    def _decision(self, cohort: int, config_id: str, seed: int) -> Decision:
        trial = self._trial(cohort, config_id, seed)
        action: Action = "stop" if trial.stopped else "wait" if trial.waits_at is not None else "continue"
        return Decision(cohort, config_id, seed, action)

    def _state(self, cohort: int) -> _Cohort:
        if cohort not in self._cohorts:
            raise ValueError(f"a cohort must be opened first, got {cohort=}; open: {sorted(self._cohorts)}")
        return self._cohorts[cohort]

    def _trial(self, cohort: int, config_id: str, seed: int) -> _Trial:
        trial = self._state(cohort).members.get(config_id, {}).get(seed)
        if trial is None:
            raise ValueError(f"a trial must be a member of its cohort, got {cohort=}, {config_id=}, {seed=}")
        return trial
