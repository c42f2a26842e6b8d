"""A sweep from plan to rows: check everything, make the folder, run what is missing, write every trial."""

from __future__ import annotations

import contextlib
import sys
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.environment import check_address, check_device, starting_ray, terminate_as_interrupt
from harness.errors import EXIT_RUN_FOLDER, UserError
from harness.halving import RungBoard
from harness.jobs import EndedTrial, JobBoard, Packing, Segment, TrialSpec
from harness.packing import make_packing
from harness.plan import Plan
from harness.progress import Display, EpochLog, Tally
from harness.proposals import SearchProposer
from harness.run_folder import (
    WrittenTrial,
    check_folder,
    create_run,
    locked,
    read_run_id,
    read_written,
    unwritable,
)
from harness.sink import RunSink
from harness.task_errors import task_errors_told
from reports.provenance import gather_provenance

if TYPE_CHECKING:
    from harness.segments import Parcel


@dataclass(frozen=True, slots=True)
class SweepResult:
    """What a sweep left: its folder, how many rows are in it, whether the user interrupted it."""

    out: Path
    rows: int
    interrupted: bool


def run_sweep(
    plan: Plan,
    out: Path,
    address: str | None = None,
    resume: bool = False,
    log_every: int | None = None,
) -> SweepResult:
    """Run a plan into a run folder; with `resume`, only the trials that the folder does not hold yet.

    With `log_every`, each trial also says how it does every so many of its epochs, on stderr.
    Raises UserError, before anything is written, where the folder, the data, the device or the address do not
    allow it. Trials that fail do not raise: they are rows.
    """
    check_folder(out, plan, resume=resume)
    proposer = SearchProposer(plan)
    check_device(plan.resources, address)
    if address is not None:
        check_address(address)
    with contextlib.ExitStack() as stack:
        stack.enter_context(terminate_as_interrupt())
        trials = (plan.search.configs + plan.search.with_defaults) * len(plan.seeds)
        ray_start = stack.enter_context(starting_ray(plan.resources, address, trials=trials))
        data_digests, rows = check_data(plan)

        from harness.tune_bridge import run_packs

        proposer.draw_ahead()
        session = ray_start.session()
        provenance = gather_provenance()
        if not resume:
            create_run(out, plan, provenance)
        stack.enter_context(locked(out))
        written = read_written(out)
        check_same_data(written, data_digests, out)
        sink = RunSink(out, plan, run_id=read_run_id(out), provenance=provenance, data_digests=data_digests)
        stack.callback(sink.close)
        tally = Tally(trials, plan.seeds)
        display = stack.enter_context(Display(tally, sys.stderr, title=out.name))
        on_epoch = None if log_every is None else EpochLog(log_every, display.say)
        notes = PackNotes(display.say)
        packing = make_packing(plan, session.concurrency, rows)
        board = make_board(
            plan, proposer, sink, tally, written, on_epoch=on_epoch, packing=packing, notes=notes
        )

        def on_event() -> None:
            sink.flush_if_due()
            tally.running = board.running
            display.tick()

        display.say(opening_line(plan, out, session.concurrency, len(written)))
        tally.start()
        try:
            finished = run_packs(
                board,
                lambda segments: make_parcel(plan, segments),
                session,
                plan.resources,
                on_event=on_event,
            )
        except OSError as error:
            raise unwritable(out, error) from None
        if finished:
            tally.total = tally.done  # a space may hold fewer configs than were asked for
        return SweepResult(out, tally.done, interrupted=not finished)


def opening_line(plan: Plan, out: Path, concurrency: int, written: int) -> str:
    """What a sweep is about to do, in one line."""
    defaults = " and the defaults" if plan.search.with_defaults else ""
    what = f"{plan.search.configs} configs ({plan.search.algorithm}){defaults} x {len(plan.seeds)} seeds"
    kept = f", {written} trials there already" if written else ""
    return f"{out.name}: {what}, {concurrency} at once, into {out}{kept}"


def check_data(plan: Plan) -> tuple[dict[int, str], int]:
    """Load the task's data for every seed, as a worker will; give digests by seed, and how many rows train.

    What the task raises becomes a `UserError`.
    """
    from trainables.loading import load_task

    digests, rows = {}, 0
    for seed in plan.seeds:
        with task_errors_told(plan.task.name):
            loaded = load_task(task_spec(plan), seed)
            digests[seed], rows = loaded.data_digest, len(loaded.splits["train"])
    return digests, rows


def check_same_data(written: Mapping[str, WrittenTrial], digests: Mapping[int, str], out: Path) -> None:
    """Refuse to go on with a run whose rows were measured on other data."""
    for trial in written.values():
        seed, digest = trial.row["seed"], trial.row["data_digest"]
        if digest is not None and digest != digests.get(seed):
            raise UserError(
                f"the data have changed since {out} was begun (seed {seed}); start a new run", EXIT_RUN_FOLDER
            )


def make_board(
    plan: Plan,
    proposer: SearchProposer,
    sink: RunSink,
    tally: Tally,
    written: Mapping[str, WrittenTrial],
    *,
    on_epoch: EpochLog | None = None,
    packing: Packing | None = None,
    notes: PackNotes | None = None,
) -> JobBoard:
    """The board of a plan: rows go to the sink; trials that were written before are taken in as they are."""

    def on_ended(ended: EndedTrial, replayed: bool) -> None:
        if not replayed:
            sink.write(ended)
            if notes is not None:
                notes.add(ended)
        tally.add(ended, replayed=replayed)

    halving = plan.halving
    return JobBoard(
        proposer,
        on_ended=on_ended,
        failed=failed_trial,
        rungs=RungBoard(halving.rungs, halving.eta, halving.mode) if halving else None,
        rung_metric=halving.metric if halving else "val_loss",
        nan_budget=plan.ranking.nan_budget,
        retries=plan.resources.retries,
        known={trial_id: (trial.row, trial.history) for trial_id, trial in written.items()},
        on_epoch=on_epoch,
        packing=packing,
    )


class PackNotes:
    """Says once of every reason that makes trials train alone that there are such trials."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._said: set[str] = set()

    def add(self, ended: EndedTrial) -> None:
        """Say why a trial was trained alone, where that is news."""
        note = ended.outcome.get("pack_note")
        if note and note not in self._said:
            self._said.add(note)
            self._say(f"some trials train alone instead of in packs: {note}")


def failed_trial(trial: TrialSpec, error: str) -> dict[str, Any]:
    """The outcome of a trial whose worker was lost too often."""
    from trainables.trial import failed_outcome

    return failed_outcome(RuntimeError(error), config=trial.config)


def task_spec(plan: Plan) -> dict[str, Any]:
    """The task in the words of a job."""
    return {"name": plan.task.name, "params": plan.task.params, "base_dir": plan.base_dir}


def make_parcel(plan: Plan, segments: list[Segment]) -> Parcel:
    """Segments as a worker takes them."""
    from harness.segments import Parcel
    from trainables.packed_trial import Member

    members = [
        Member(one.trial.trial_id, one.trial.config, one.trial.seed, one.until, one.state, alone=one.alone)
        for one in segments
    ]
    device = "cuda" if plan.resources.gpus_per_trial else "cpu"
    return Parcel(f"p{uuid.uuid4().hex[:11]}", task_spec(plan), device, members)
