"""The fault matrix: every config with every seed under every fault at every severity, beside its clean twin.

Decided here: how a trial passes into a fault's window and out of it, what its cell says, and that a cell that
fails is a row and ends no other. What faults there are is decided in `faults`, what they do in
`trainables.faulty`, and what a cell is worth in `reports.robustness_cells`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from harness.robustness.faults import SHARE_OF_MARKED_BATCHES, Fault
from reports.robustness_cells import ENDED_WELL, NOT_APPLICABLE, planned_text, retained_quality
from search_spaces.identity import trial_id as name_trial

if TYPE_CHECKING:
    from torch import nn

    from trainables.killed_worker import KilledWorker
    from trainables.packed_trial import Load, Shelf

NAN = float("nan")
RECOVERED_WITHIN = 0.1
"""A trial has recovered when its validation charged_error is no more than this share above its twin's."""

_COUNTS = ("nan_count", "nan_loss", "nan_gradient", "nan_output", "nan_parameter")
_SCORES = ("coverage", "accepted_error", "charged_error", "false_accept_rate", "false_reject_rate")
_OF_SPLITS = tuple(f"{before}{name}" for before in ("", "test_") for name in _SCORES)
_LEAST_LIMIT_S = 120.0  # a worker imports torch and traces its programs before it trains


def run_matrix(
    spec: Mapping[str, Any],
    configs: Mapping[str, Mapping[str, Any]],
    seeds: Sequence[int],
    faults: Sequence[Fault],
    *,
    device: str = "cpu",
    on_cell: Callable[[str], None] = lambda told: None,
) -> Iterator[dict[str, Any]]:
    """Train all cells, and yield a row for each, with the columns of `reports.robustness_cells.cell_schema`.

    spec: {"name", "params", "base_dir"} of the task; configs: by config_id; on_cell: told "clean" and then
    "fault:severity" before its trials begin. Rows come by fault, severity, config and seed, and are the same
    at every call, `duration_s` apart. Trials of a cell are one pack where they can be.

    Whatever a task, a config or a fault raises is in the rows of its cells: they failed, or do not apply.
    Raises `DeviceError` where the device is absent.
    """
    from trainables.trial import check_device

    check_device(device)
    with ExitStack() as held:
        matrix = _Matrix(spec, configs, seeds, faults, device)
        if faults:
            matrix.start_worker(held)
            on_cell("clean")
            matrix.train_clean()
        for fault in faults:
            for severity, strength in fault.severities.items():
                on_cell(f"{fault.name}:{severity}")
                yield from matrix.cells(fault, severity, strength)


@dataclass
class _Trial:
    """A trial of the matrix: its config as told, and as a training takes it (None: it cannot be one)."""

    trial_id: str
    config_id: str
    seed: int
    config: Mapping[str, Any]
    settings: Any = None


@dataclass
class _Run:
    """What a trial said on its way, and how it ended; `state` while it has not."""

    said: dict[int, Mapping[str, Any]] = field(default_factory=dict)
    outcome: Mapping[str, Any] | None = None
    model: nn.Module | None = None
    state: Any = None


@dataclass
class _Phase:
    """A stretch of training until an epoch (None: the end), on what `load` gives; config: changes of it."""

    until: int | None
    load: Load
    shelf: Shelf
    rate: float = 1.0


class _Matrix:
    def __init__(
        self,
        spec: Mapping[str, Any],
        configs: Mapping[str, Mapping[str, Any]],
        seeds: Sequence[int],
        faults: Sequence[Fault],
        device: str,
    ) -> None:
        from trainables.packed_trial import Shelf

        self.spec, self.device = spec, device
        self.faults = faults
        self.planned = planned_text({fault.name: list(fault.severities) for fault in faults}, seeds)
        self.trials = [
            _Trial(name_trial(config_id, seed), config_id, seed, config)
            for config_id, config in configs.items()
            for seed in seeds
        ]
        self.shelf, self.marked_shelf = Shelf(), Shelf()
        self.twins: dict[str, _Run] = {}
        self.trivial: dict[str, dict[str, float]] = {}
        self._loaded: dict[int, Any] = {}
        self._marked: dict[int, Any] = {}
        self._prefixes: dict[tuple[int, tuple[str, ...]], dict[str, _Run]] = {}
        self._worker: KilledWorker | None = None
        self._worker_epoch = 0
        self._saves: dict[int, dict[str, Any]] | BaseException | None = None
        self._settle_configs()

    def _settle_configs(self) -> None:
        from trainables.configs import parse_config

        for trial in self.trials:
            try:
                trial.settings, trial.config = parse_config(trial.config)
            except (ValueError, TypeError):  # its clean twin fails of it, and says so
                trial.settings = None

    # --- data -------------------------------------------------------------------------------------------

    def _held(self, seed: int) -> Any:
        """Task and splits of a seed, loaded once; raises what the task raises, every time."""
        from trainables.loading import load_task

        if seed not in self._loaded:
            try:
                self._loaded[seed] = load_task(self.spec, seed)
            except (Exception, SystemExit) as error:  # a task that raises is the outcome of its trials
                self._loaded[seed] = error
        held = self._loaded[seed]
        if isinstance(held, BaseException):
            raise held
        return held

    def _clean(self, seed: int) -> Any:
        held = self._held(seed)
        return held.task, held.splits

    def _marked_of(self, seed: int) -> tuple[Any, dict[str, Any]]:
        """The task whose models read marks, one object for all seeds, and splits without a mark."""
        from trainables.faulty import MarkedTask, marked_split

        if seed not in self._marked:
            held = self._held(seed)
            task = next((task for task, _ in self._marked.values()), None) or MarkedTask(held.task)
            splits = {name: marked_split(split) for name, split in held.splits.items()}
            self._marked[seed] = (task, splits)
        found: tuple[Any, dict[str, Any]] = self._marked[seed]
        return found

    # --- trainings --------------------------------------------------------------------------------------

    def train_clean(self) -> None:
        """Train every trial without a fault, as any sweep would."""
        from trainables.faulty import trivial_errors

        self.twins = self._train(self.trials, [_Phase(None, self._clean, self.shelf)])
        for trial in self.trials:
            model = self.twins[trial.trial_id].model
            if model is None or trial.settings is None:
                continue
            try:
                task, splits = self._clean(trial.seed)
                self.trivial[trial.trial_id] = trivial_errors(task, model, splits, trial.settings)
            except (
                Exception,
                SystemExit,
            ):  # a task that cannot score abstaining everywhere has no such error
                continue

    def _train(
        self,
        trials: Sequence[_Trial],
        phases: Iterable[_Phase],
        begun: Mapping[str, _Run] | None = None,
    ) -> dict[str, _Run]:
        """Train through the phases, from where `begun` stands; a trial that has ended is left out."""
        from trainables.faulty import with_rate
        from trainables.packed_trial import Member, PackRun

        runs = {
            trial.trial_id: replace(begun[trial.trial_id], said=dict(begun[trial.trial_id].said))
            if begun and trial.trial_id in begun
            else _Run()
            for trial in trials
        }
        for phase in phases:
            members = []
            for trial in trials:
                run = runs[trial.trial_id]
                if run.outcome is not None:
                    continue
                config, state = dict(trial.config), run.state
                if phase.rate != 1.0:
                    config["learning_rate"] = trial.settings.learning_rate * phase.rate
                    if state is not None:  # before it begins, a trial's rate is its config's
                        state = with_rate(state, phase.rate, config["learning_rate"])
                members.append(Member(trial.trial_id, config, trial.seed, phase.until, state))
            if not members:
                break
            pack = PackRun(members, phase.load, self.device, shelf=phase.shelf, keep_models=True)
            while not pack.done:
                for told in pack.step():
                    run = runs[told.trial_id]
                    if told.said:
                        run.said[told.said["epoch"]] = told.said
                    if told.state is not None:
                        run.state = told.state
                    elif told.outcome is not None:
                        run.outcome, run.model, run.state = told.outcome, told.model, None
            if phase.rate != 1.0:
                for trial in trials:
                    run = runs[trial.trial_id]
                    if run.state is not None:
                        run.state = with_rate(run.state, 1.0 / phase.rate, trial.settings.learning_rate)
        return runs

    def _until(self, trials: Sequence[_Trial], first: int) -> Mapping[str, _Run]:
        """The trials at the beginning of epoch `first` (from 0), trained so far without a fault, once."""
        key = (first, tuple(trial.trial_id for trial in trials))
        if key not in self._prefixes:
            phases = [_Phase(first, self._clean, self.shelf)] if first else []
            self._prefixes[key] = self._train(trials, phases)
        return self._prefixes[key]

    # --- cells ------------------------------------------------------------------------------------------

    def cells(self, fault: Fault, severity: str, strength: float) -> Iterator[dict[str, Any]]:
        """The rows of a fault at a severity, by config and seed."""
        from trainables.trial import error_line

        rows: dict[str, dict[str, Any]] = {}
        kinds: dict[Any, list[_Trial]] = {}
        for trial in self.trials:
            row = rows[trial.trial_id] = self._begin_row(trial, fault, severity, strength)
            twin = self.twins[trial.trial_id]
            if trial.settings is None or trial.seed not in self._loaded or self._failed_to_load(trial.seed):
                outcome = twin.outcome or {}
                row |= {"status": "failed", "error": str(outcome.get("error", "")) or "the clean twin failed"}
                continue
            reason = self._why_not(trial, fault, strength)
            if reason:
                row |= {"status": NOT_APPLICABLE, "reason": reason}
                continue
            kinds.setdefault((trial.settings.max_epochs, trial.settings.batch_size), []).append(trial)
        for trials in kinds.values():
            try:
                runs = self._run_fault(trials, fault, strength)
            except Exception as error:  # of the fault or of this module: these cells fail, and no other
                for trial in trials:
                    rows[trial.trial_id] |= {"status": "failed", "error": error_line(error)}
                continue
            for trial in trials:
                self._end_row(rows[trial.trial_id], trial, fault, runs[trial.trial_id])
        for row in rows.values():
            row["retained"], row["test_retained"] = retained_quality(row), retained_quality(row, test=True)
            yield row

    def _failed_to_load(self, seed: int) -> bool:
        return isinstance(self._loaded[seed], BaseException)

    def _why_not(self, trial: _Trial, fault: Fault, strength: float) -> str:
        """Why a fault does not apply to a trial, empty where it does."""
        from trainables import faulty

        try:
            if fault.how in ("batches", "outputs"):
                faulty.check_batches_known(trial.settings)
            if fault.how == "outputs":
                faulty.check_markable(self._held(trial.seed).task, trial.settings)
                self._marked_of(trial.seed)
            if fault.how == "rows":
                self._spoilt(fault, strength, trial.seed)
            if fault.how == "batches":
                train = self._held(trial.seed).splits["train"]
                batches = faulty.batches_of(train, trial.settings.batch_size, trial.seed, 0)
                faulty.BATCH_FAULTS[fault.does](train, batches, [0], faulty.source_of(fault.name, trial.seed))
        except faulty.InapplicableFaultError as error:
            return str(error)
        except Exception:  # it comes again when the cell is trained, and is an error there
            return ""
        return ""

    def _run_fault(self, trials: Sequence[_Trial], fault: Fault, strength: float) -> dict[str, _Run]:
        if fault.how == "threshold":
            return self._at_other_threshold(trials, strength)
        if fault.how == "worker":
            return self._gone_on(trials, int(strength))
        window = fault.epochs(trials[0].settings.max_epochs)
        if window is None:
            return self._train(trials, [_Phase(None, self._load_spoilt(fault, strength), self.shelf)])
        first, last = window
        phases = [*self._phases_of(trials, fault, strength, first, last)]
        phases.append(_Phase(None, self._clean, self.shelf))
        return self._train(trials, phases, self._until(trials, first))

    def _phases_of(
        self, trials: Sequence[_Trial], fault: Fault, strength: float, first: int, last: int
    ) -> Iterator[_Phase]:
        """The phases of a fault's window, epochs [first, last)."""
        if fault.how == "rate":
            yield _Phase(last, self._clean, self.shelf, rate=strength)
        elif fault.how == "rows":
            yield _Phase(last, self._load_spoilt(fault, strength), self.shelf)
        else:
            seeds = {trial.seed for trial in trials}
            batch_size = trials[0].settings.batch_size
            hits = {seed: self._hits(fault, strength, seed, batch_size, first, last) for seed in seeds}
            for epoch in range(first, last):
                here = {seed: held[epoch] for seed, held in hits.items() if epoch in held}
                if here:
                    load = self._load_hit(fault, strength, here, batch_size, epoch)
                    shelf = self.marked_shelf if fault.how == "outputs" else self.shelf
                    yield _Phase(epoch + 1, load, shelf)
                else:
                    yield _Phase(epoch + 1, self._clean, self.shelf)

    def _hits(
        self, fault: Fault, strength: float, seed: int, batch_size: int, first: int, last: int
    ) -> dict[int, list[int]]:
        """Which batches of which epochs are hit; those of a strong fault hold those of a weaker one."""
        import torch

        from trainables.faulty import source_of

        steps = -(-len(self._held(seed).splits["train"]) // batch_size)
        share = SHARE_OF_MARKED_BATCHES if fault.how == "outputs" else strength
        order = torch.randperm(steps * (last - first), generator=source_of(fault.name, seed)).tolist()
        hits: dict[int, list[int]] = {}
        for place in order[: max(1, round(share * len(order)))]:
            hits.setdefault(first + place // steps, []).append(place % steps)
        return {epoch: sorted(batches) for epoch, batches in hits.items()}

    def _spoilt(self, fault: Fault, strength: float, seed: int) -> Any:
        """The splits of a seed with the training rows that a fault of rows makes."""
        from trainables.faulty import ROW_FAULTS, source_of

        splits = self._held(seed).splits
        train = ROW_FAULTS[fault.does](splits["train"], strength, source_of(fault.name, seed))
        return {**splits, "train": train}

    def _load_spoilt(self, fault: Fault, strength: float) -> Load:
        return lambda seed: (self._held(seed).task, self._spoilt(fault, strength, seed))

    def _load_hit(
        self, fault: Fault, strength: float, hits: Mapping[int, list[int]], batch_size: int, epoch: int
    ) -> Load:
        """Data of one epoch in which some batches are hit."""
        import torch

        from trainables.faulty import BATCH_FAULTS, batches_of, marked_split, source_of

        def load(seed: int) -> Any:
            task, splits = self._clean(seed)
            batches = batches_of(splits["train"], batch_size, seed, epoch)
            hit = hits.get(seed, [])
            if fault.how == "outputs":
                marked_task, marked = self._marked_of(seed)
                rows = torch.cat([batches[batch] for batch in hit]) if hit else None
                train = marked_split(splits["train"], rows, fault.does, int(strength))
                return marked_task, {**marked, "train": train}
            source = source_of(f"{fault.name}.{epoch}", seed)
            train = BATCH_FAULTS[fault.does](splits["train"], batches, hit, source)
            return task, {**splits, "train": train}

        return load

    def _at_other_threshold(self, trials: Sequence[_Trial], share: float) -> dict[str, _Run]:
        """The clean twins, their answers decoded at a threshold between that of the training and 1."""
        from trainables.faulty import answers_at
        from trainables.trial import error_line

        runs = {}
        for trial in trials:
            twin = self.twins[trial.trial_id]
            run = runs[trial.trial_id] = replace(twin)
            if twin.model is None or twin.outcome is None:
                continue
            begun = time.perf_counter()
            task, splits = self._clean(trial.seed)
            # In powers, as thresholds are chosen; 1 is the largest |Q| of a tuple of unit length.
            tau = max(trial.settings.tau_train_max, trial.settings.tau_train_max ** (1.0 - share))
            try:
                told = answers_at(task, twin.model, splits, trial.settings, tau)
                run.outcome = {**twin.outcome, **told, "duration_s": time.perf_counter() - begun}
            except (Exception, SystemExit) as error:  # what a task raises is the cell's
                run.outcome = {**twin.outcome, "status": "failed", "error": error_line(error)}
        return runs

    # --- a worker that is killed ------------------------------------------------------------------------

    def start_worker(self, held: ExitStack) -> None:
        """Start the process to be killed, where a fault asks for it: it trains while the others do."""
        import torch

        from trainables.killed_worker import KilledWorker, WorkerJob

        trials = [trial for trial in self.trials if trial.settings is not None]
        if not trials or all(fault.how != "worker" for fault in self.faults):
            return
        self._worker_epoch = min(trial.settings.max_epochs for trial in trials) // 2
        members = [(trial.trial_id, dict(trial.config), trial.seed) for trial in trials]
        job = WorkerJob(self.spec, members, self._worker_epoch, self.device, torch.get_num_threads())
        try:
            self._worker = held.enter_context(KilledWorker(job))
        except (OSError, TypeError, ValueError) as error:  # no process, or a task that no text can name
            self._saves = error

    def _gone_on(self, trials: Sequence[_Trial], lost: int) -> dict[str, _Run]:
        """The trials, gone on with from what the killed worker saved `lost` epochs before its last save."""
        saves = self._worker_saves()
        begin = max(0, self._worker_epoch - lost)
        states = saves.get(begin, {})
        begun: dict[str, _Run] = {}
        for trial in trials:  # what was said until then is no longer known, as after any crash
            if trial.trial_id in states:
                begun[trial.trial_id] = _Run(state=states[trial.trial_id])
        return self._train(trials, [_Phase(None, self._clean, self.shelf)], begun)

    def _worker_saves(self) -> dict[int, dict[str, Any]]:
        if self._saves is None:
            assert self._worker is not None
            spent = sum(float((run.outcome or {}).get("duration_s", 0.0)) for run in self.twins.values())
            try:
                self._saves = self._worker.saves(_LEAST_LIMIT_S + 20.0 * spent)
            except Exception as error:
                self._saves = error
        if isinstance(self._saves, BaseException):
            raise self._saves
        return self._saves

    # --- rows -------------------------------------------------------------------------------------------

    def _begin_row(self, trial: _Trial, fault: Fault, severity: str, strength: float) -> dict[str, Any]:
        """A row with all that is known before the cell is trained."""
        window = None if trial.settings is None else fault.epochs(trial.settings.max_epochs)
        clean = self.twins[trial.trial_id].outcome or {}
        held = self._loaded.get(trial.seed)
        return {
            "task": str(self.spec["name"]),
            "config_id": trial.config_id,
            "trial_id": trial.trial_id,
            "seed": trial.seed,
            "fault": fault.name,
            "severity": severity,
            "strength": float(strength),
            "span": fault.span,
            "window_first": None if window is None else window[0] + 1,
            "window_last": None if window is None else window[1],
            "reason": "",
            "error": "",
            "target_coverage": float(clean.get("target_coverage", NAN)),
            **dict.fromkeys(_OF_SPLITS, NAN),
            "trivial_error": NAN,
            "test_trivial_error": NAN,
            **self.trivial.get(trial.trial_id, {}),
            "clean_status": clean.get("status"),
            "clean_nan_count": clean.get("nan_count"),
            **{f"clean_{name}": float(clean.get(name, NAN)) for name in _OF_SPLITS},
            "recovered": None,
            "epochs_to_recover": None,
            "same_weights": None,
            "pack_note": "",
            "device": self.device,
            "data_digest": getattr(held, "data_digest", None),
            "planned": self.planned,
            "duration_s": 0.0,
        }

    def _end_row(self, row: dict[str, Any], trial: _Trial, fault: Fault, run: _Run) -> None:
        """Say how the cell ended."""
        from trainables.faulty import same_weights

        assert run.outcome is not None
        outcome, twin = run.outcome, self.twins[trial.trial_id]
        row |= {
            "status": outcome["status"],
            "reason": outcome["stop_reason"],
            "error": outcome["error"],
            "epochs": outcome["epochs"],
            **{name: outcome[name] for name in _COUNTS},
            **{name: float(outcome.get(name, NAN)) for name in _OF_SPLITS},
            "pack_note": outcome.get("pack_note") or "",
            "duration_s": float(outcome["duration_s"]),
        }
        if run.model is not None and twin.model is not None:
            row["same_weights"] = same_weights(run.model, twin.model)
        if fault.how == "worker":
            row["recovered"] = bool(row["same_weights"]) and outcome["status"] == (twin.outcome or {}).get(
                "status"
            )
            if row["recovered"]:
                begin = max(0, self._worker_epoch - int(row["strength"]))
                row["epochs_to_recover"] = self._worker_epoch - begin + 1  # the one under way among them
            elif not row["reason"]:
                row["reason"] = "it did not end as its clean twin did, bit for bit"
        elif row["window_last"] is not None and row["window_last"] < trial.settings.max_epochs:
            row["recovered"], row["epochs_to_recover"] = recovery(
                run.said, twin.said, row["window_last"], ended_well=outcome["status"] in ENDED_WELL
            )


def recovery(
    said: Mapping[int, Mapping[str, Any]],
    twin: Mapping[int, Mapping[str, Any]],
    last: int,
    *,
    ended_well: bool = True,
) -> tuple[bool, int | None]:
    """Whether a trial came back after a fault that ended with epoch `last`, and after how many epochs.

    said, twin: what it and its clean twin said, by epoch from 1. It has come back from the first epoch, from
    the fault's last one on, from which its validation charged_error stays within `RECOVERED_WITHIN` of the
    twin's at the same epoch, to the end. A trial that failed or diverged has not.

    >>> good, bad = {"charged_error": 1.0}, {"charged_error": 9.0}
    >>> recovery({2: bad, 3: good}, {2: good, 3: good}, last=2)
    (True, 1)
    """
    if not ended_well:
        return False, None
    back: int | None = None
    for epoch in sorted(epoch for epoch in said if epoch >= last and epoch in twin):
        own, clean = (float(held[epoch].get("charged_error", NAN)) for held in (said, twin))
        if math.isfinite(own) and own <= (1.0 + RECOVERED_WITHIN) * clean:
            back = epoch if back is None else back
        else:
            back = None
    return (False, None) if back is None else (True, back - last)
