"""Ray Tune as the engine of a sweep: one Tune trial for each pack of segments, run by actors that are reused.

What runs next is decided by `harness.jobs.JobBoard`; this module carries packs out and reports back.
Segments instead of Tune's own pausing, because a paused Tune trial needs a checkpoint folder that every node
shares, and Tune's schedulers decide in the order in which results arrive; here a state travels as bytes with
the segment, through Ray itself, so that a sweep runs on nodes that share nothing.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import ray
from ray import tune
from ray.tune.experiment import Trial
from ray.tune.progress_reporter import TrialProgressCallback
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import Searcher

from harness.environment import Session, terminate_as_interrupt
from harness.errors import one_line
from harness.jobs import JobBoard, Report, Segment
from harness.plan import ResourcesSection
from harness.segments import PackTrainable, Parcel
from harness.warm_start import workers_as_they_are

MakeParcel = Callable[[list[Segment]], Parcel]


def run_packs(
    board: JobBoard,
    make_parcel: MakeParcel,
    session: Session,
    resources: ResourcesSection,
    *,
    on_event: Callable[[], None],
) -> bool:
    """Run a board's packs on Ray until it is finished; False when the user interrupted before that.

    `on_event` is called in the driver after every report and about ten times a second in between.
    """
    link = DriverLink(board, make_parcel, on_event)
    trainable = tune.with_resources(
        PackTrainable,
        tune.PlacementGroupFactory(
            [
                {"CPU": resources.cpus_per_trial}
                | ({"GPU": resources.gpus_per_trial} if resources.gpus_per_trial else {})
            ]
        ),
    )
    tuner = tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            search_alg=PackSearcher(link),
            scheduler=WarmActorScheduler(session.concurrency),
            num_samples=-1,
            max_concurrent_trials=session.concurrency,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name=f"sweep-{uuid.uuid4().hex[:8]}",
            storage_path=str(session.scratch / "tune"),
            callbacks=[DriverCallback(link)],
            # States travel with the reports; a checkpoint would keep the last report of every pack, and with
            # it an object of Ray's, to the end of the run.
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            # The board retries, wherever a worker was lost.
            failure_config=tune.FailureConfig(max_failures=0),
            verbose=0,
        ),
    )
    workers = workers_as_they_are() if session.is_warm else nullcontext()
    with quiet_tune(), terminate_as_interrupt(), workers:
        try:
            tuner.fit()
        except Exception:
            if link.failure is not None:  # Tune wraps what its callbacks raise into text
                raise link.failure from None
            raise
    return board.finished


class DriverLink:
    """The driver's board as the searcher and the callback see it; pickled (as Tune does) it is empty."""

    def __init__(self, board: JobBoard, make_parcel: MakeParcel, on_event: Callable[[], None]) -> None:
        self.board = board
        self.failure: Exception | None = None
        self._on_event = on_event
        self._make_parcel = make_parcel
        self._packs: dict[str, tuple[dict[str, Segment], Parcel]] = {}

    def next_parcel(self, tune_id: str) -> Parcel | None:
        """The next pack on its way to its worker, remembered under Tune's name for it."""
        segments = self.board.next_pack()
        if not segments:
            return None
        parcel = self._make_parcel(segments)
        self._packs[tune_id] = ({segment.trial.trial_id: segment for segment in segments}, parcel)
        return parcel

    def reported(self, tune_id: str, reference: Any) -> None:
        """Hand a worker's reports to the board; where they went away with their node, its pack is lost."""
        try:
            reports: dict[str, Report] = ray.get(reference)
        except ray.exceptions.ObjectLostError as error:
            self.lost(tune_id, f"its report was lost with its node ({type(error).__name__})")
            return
        if tune_id not in self._packs:  # an earlier report of it was lost
            return
        segments, parcel = self._packs[tune_id]
        with self._kept_failure():
            for trial_id, report in reports.items():
                segment = segments[trial_id] if report.outcome is None else segments.pop(trial_id)
                self.board.reported(segment, report)
            if not segments:
                self._forget(tune_id, parcel)
            self._on_event()

    def lost(self, tune_id: str, error: str) -> None:
        """Tell the board that the segments of a pack ended without an outcome, if there are any."""
        segments, parcel = self._packs.get(tune_id, ({}, None))
        with self._kept_failure():
            for segment in segments.values():
                self.board.lost(segment, error)
            if parcel is not None:
                self._forget(tune_id, parcel)
            self._on_event()

    def _forget(self, tune_id: str, parcel: Parcel) -> None:
        del self._packs[tune_id]
        parcel.take_members()

    def tick(self) -> None:
        """A turn of Tune's loop has passed."""
        with self._kept_failure():
            self._on_event()

    @contextmanager
    def _kept_failure(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.failure = error
            raise

    def __reduce__(self) -> tuple[Callable[[], object], tuple[()]]:
        return object, ()


class PackSearcher(Searcher):
    """Gives Tune the board's packs; results reach the board through `DriverCallback`, not through this."""

    def __init__(self, link: DriverLink) -> None:
        super().__init__()
        self._link = link

    def suggest(self, trial_id: str) -> Any:
        """The next pack as a Tune config, `FINISHED` when all trials have ended, None to be asked soon."""
        if self._link.board.finished:
            return Searcher.FINISHED
        parcel = self._link.next_parcel(trial_id)
        if parcel is not None:
            return {"parcel": parcel}
        return Searcher.FINISHED if self._link.board.finished else None

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict, **spec: Any) -> bool:
        """Accepted and not used: what is better is the board's business."""
        return True

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        """Nothing: the callback has told the board already."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing: a run goes on from its rows."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: a run goes on from its rows."""


class DriverCallback(TrialProgressCallback):
    """Carries what happens to Tune trials to the board, in the driver.

    Where it finds none of this class, Tune adds one that prints, and keeps every trial to the end of the run.
    """

    def __init__(self, link: DriverLink) -> None:
        super().__init__()
        self._link = link

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Give the trial a last result; to log a failure Tune would fetch one from the node that failed."""
        trial.run_metadata.last_result = {"started": True}

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        """A turn of Tune's loop: lets the display move and waiting rows be written."""
        self._link.tick()

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict, **info: Any
    ) -> None:
        """A report; it is taken out of the result, which Tune keeps as the trial's last."""
        report = result.pop("report", None)
        if report is not None:
            self._link.reported(trial.trial_id, report)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """The actor, its node or its set-up failed."""
        self._link.lost(trial.trial_id, error_text(trial))

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """The end of a Tune trial; segments without an outcome by now count as lost."""
        self._link.lost(trial.trial_id, "its worker ended without a report")


class WarmActorScheduler(FIFOScheduler):
    """First in, first out; actors stay warm between batches, and Tune forgets the trials that have ended.

    Tune keeps one idle actor and stops the others when nothing is pending, as at the end of a batch that must
    be learned from. Starting one again costs seconds, so the cache is told to keep as many as can run.
    """

    def __init__(self, actors: int) -> None:
        super().__init__()
        self._actors = actors

    def choose_trial_to_run(self, tune_controller: Any) -> None:
        """None: Tune then takes what is pending in its order, without a walk over all trials so far."""

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: dict) -> None:
        """Raise the cache's limit once; where Tune has no such cache, batches only start slower."""
        cache = getattr(tune_controller, "_actor_cache", None)
        if self._actors and cache is not None:
            cache.increase_max(trial.placement_group_factory, self._actors)
            self._actors = 0
        forget_ended(tune_controller)


def forget_ended(tune_controller: Any) -> None:
    """Take the trials that have ended out of Tune's collections, where it has them under these names.

    It would keep some 25 kB of each to the end of the run, and then write all of them into one file; a trial
    that trains alone is a whole one of Tune's.
    """
    trials = getattr(tune_controller, "_trials", [])
    ended = {trial for trial in trials if trial.is_finished()}
    trials[:] = [trial for trial in trials if trial not in ended]
    for name in ("_stopped_trials", "_failed_trials", "_trials_to_cache"):
        getattr(tune_controller, name, set()).difference_update(ended)


def error_text(trial: Trial) -> str:
    """The last error of a Tune trial as one line."""
    error: Any = trial.get_pickled_error() or trial.get_error()
    cause = getattr(error, "cause", None) or error
    return f"{type(cause).__name__}: {one_line(cause)}"[:500] if cause is not None else "its worker ended"


@contextmanager
def quiet_tune() -> Iterator[None]:
    """Keep Tune's log off the terminal: what it says of a trial is in the trial's row."""
    loggers = [logging.getLogger(name) for name in ("ray.tune", "ray.train", "ray.air")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
