"""The loop of a pack: many trials with equal shapes, each trained as `SCMTrainer` would train it alone.

Decided here: the order of things in a step and in an epoch, who enters and who leaves, and when a trial ends.
What a trial computes is put together in `functions` and batched in `program`; what is kept of it, in `seats`;
which trials may share a pack, in `eligibility`.
"""

from __future__ import annotations

import math
import os
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from scm.data import Split
from scm.gradients import is_finite
from scm.packed.answers import PackDecoded, Validated, decode_rows, validated_trials, validation_numbers
from scm.packed.batches import COLUMNS, StackedSplit
from scm.packed.carried import CARRIED
from scm.packed.control import begin_epoch, control_telemetry
from scm.packed.diagnosis import MicroBatch, origin_of
from scm.packed.functions import WEIGHTS, LossOf
from scm.packed.gradients import clip_rows
from scm.packed.lanes import (
    BuildModel,
    Entrant,
    FirstModels,
    Lane,
    NotPackable,
    PackTrial,
    SplitsOf,
    build_first_model,
)
from scm.packed.optimizers import has_native_way
from scm.packed.program import BoundStep, Program
from scm.packed.reports import Judged, PackEpoch
from scm.packed.seats import Marks, Seats, Shared, seated, streak_limit
from scm.packed.streams import row_orders, threshold_shares, thresholds
from scm.packed.table import EpochSums, EpochTable
from scm.packed.traced import Programs, TracedPack
from scm.training.checkpoint import CheckpointError, read_checkpoint, write_checkpoint
from scm.trial import make_curriculum, make_training_loss

_BLOCK_BYTES = 64 * 2**20  # rows are gathered this many bytes at a time
_VALIDATION_ROWS = 4096


class PackedTrainer:
    """Train many trials as one vectorised model, each with its own settings, streams, fate and results.

    A trial of a pack comes to what `make_trainer` makes of the same config, seed and data alone, whatever
    else is in the pack: the same first weights, orders and thresholds, and after each step the same weights
    but for the rounding of sums. A step of one trial that is not finite is not taken, as there; no other
    trial feels it.

    trials: with equal `pack_signature`; NotPackable, which names key and reason, for one that must be
    trained alone. build_model: of a config, drawing from the global generator. splits_of: of a seed, "train"
    and perhaps "val" and others, which `decode` can be asked for. loss_of: the loss of a config, None (or
    returning None) for `make_training_loss`. programs: those traced before in this process, and where new
    ones are put. compiled: whether steps go through ``torch.compile``, which takes half a minute at first.
    native: whether they are written as C and compiled on the CPU, which takes a second for each kind of pack
    that this machine has not seen; steps then take a third of the time. Without a C compiler, and for steps
    that have no such form, they run as else.

    Trials that end leave when the next epoch begins, and those of `refill` enter; until then a trial that
    has ended can be decoded and asked for its model. Nothing waits for a device inside of an epoch.
    """

    def __init__(
        self,
        trials: Sequence[PackTrial | Entrant],
        build_model: BuildModel,
        splits_of: SplitsOf,
        *,
        device: str | torch.device = "cpu",
        loss_of: LossOf | None = None,
        programs: Programs | None = None,
        compiled: bool = False,
        native: bool = True,
    ) -> None:
        self.device = torch.empty(0, device=device).device
        self._build_model = build_model
        self._splits_of = splits_of
        self._loss_of = loss_of
        self._programs = {} if programs is None else programs
        self._compiled = compiled
        self._native = native and not compiled and self.device.type == "cpu" and has_native_way()
        self._begin()
        for trial in trials:
            self.refill(trial)
        self._arrange()

    def _begin(self) -> None:
        self._first_models = FirstModels(self._build_model)
        self._splits: dict[int, Mapping[str, Split]] = {}
        self._waiting: deque[Entrant] = deque()
        self._shared: Shared | None = None
        self._seats: Seats | None = None
        self._best: dict[str, Tensor] = {}  # weights of the best epoch, by key
        self._answers: dict[str, PackDecoded] = {}

    # --- what callers ask and tell ------------------------------------------------------------------

    @property
    def done(self) -> bool:
        """Whether no trial is left to train."""
        return not self._waiting and all(lane.status != "running" for lane in self.lanes)

    @property
    def lanes(self) -> Sequence[Lane]:
        """Where each trial in the pack stands, those that have just ended among them."""
        return () if self._seats is None else self._seats.lanes

    @property
    def keys(self) -> tuple[str, ...]:
        """The trials in the pack, in the order of everything that has one entry a trial."""
        return () if self._seats is None else self._seats.keys

    @property
    def machine_code(self) -> bool:
        """Whether the steps of the trials in the pack run as machine code."""
        if self._seats is None:
            return False
        rows = min(self._seats.shared.config.batch_size, self._seats.shared.rows)
        return self._traced.train(rows, self._seats).is_native

    def lane(self, key: str) -> Lane:
        """Return where a trial of the pack stands; KeyError for one that is not in it."""
        return self.lanes[self._place(key)]

    def look_at(self, trial: PackTrial) -> Entrant:
        """Look at a trial as `refill` does, without taking it in."""
        return self._first_models.look_at(trial, self._splits_for(trial.seed))

    def refill(self, trial: PackTrial | Entrant) -> None:
        """Let a trial enter when the next epoch begins; NotPackable for one that this pack cannot train."""
        entrant = self.look_at(trial) if isinstance(trial, PackTrial) else trial
        key = entrant.trial.key
        if entrant.reason is not None:
            raise NotPackable(key, entrant.reason)
        if self._shared is None:
            self._share(entrant)
        assert self._shared is not None
        if entrant.signature != self._shared.signature:
            raise NotPackable(key, "its shapes, or what its steps consist of, are not those of the pack")
        if key in self.keys or any(key == other.trial.key for other in self._waiting):
            raise ValueError(f"a key must be one trial's alone, got {key!r} twice")
        self._splits.setdefault(entrant.trial.seed, entrant.splits)
        self._waiting.append(entrant)

    def stop(self, key: str, reason: str) -> None:
        """End a trial before its last epoch, as "stopped"; one that has ended stays as it is."""
        lane = self.lane(key)
        if lane.status == "running":
            lane.end("stopped", reason)

    def model_of(self, key: str) -> nn.Module:
        """Return a trial's model, built anew, with its weights of now."""
        assert self._shared is not None
        assert self._seats is not None
        place = self._place(key)
        model = build_first_model(self.lanes[place].trial, self._build_model)
        self._shared.layout.put_row(model, self._seats.weights[place])
        return model.to(self.device)

    def telemetry(self) -> list[dict[str, float]]:
        """Return what the companions of each trial say, by their own names; waits for the device."""
        if self._seats is None:
            return []
        lanes, held, config = self.lanes, self._seats.held, self._seats.shared.config
        said = [lane.finite_telemetry() if lane.config.finite_action == "stop" else {} for lane in lanes]
        for item in CARRIED:
            if item.is_on(config):  # in all of a pack or in none
                states = {name: state.cpu() for name, state in item.own(held).items()}
                for place, lane in enumerate(lanes):
                    own = {name: state[place] for name, state in states.items()}
                    said[place] |= item.telemetry(lane.config, own, lane.epoch_steps)
        if config.coverage_control != "none":
            for own_said, state in zip(said, held["control.state"].tolist(), strict=True):
                own_said |= control_telemetry(state)
        return said

    def decode(self, name: str, *, tau: float | None = None) -> PackDecoded:
        """Return the strict answers of all trials on a split, in its order, each at its own tau_infer.

        With `tau`, all at that one. The weights are those of now: of a trial that has ended with
        `restore_best`, the best ones.
        """
        if tau is not None:
            return self._decode(name, tau)
        if name not in self._answers:
            self._answers[name] = self._decode(name)
        return self._answers[name]

    def epochs(self) -> Iterator[PackEpoch]:
        """Train, one epoch of every trial at a time, until none is left: what is not asked for is not run."""
        while True:
            self._arrange()
            if self._seats is None:
                return
            yield self._run_epoch(self._seats)

    # --- checkpoints --------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return everything that going on bit for bit needs, between two epochs, as tensors and plain values.

        Trials that wait to enter are in it; a trial that has ended is not.
        """
        running = [place for place, lane in enumerate(self.lanes) if lane.status == "running"]
        waiting = [Lane(entrant.trial).state_dict() for entrant in self._waiting]
        state: dict[str, Any] = {"lanes": [], "held": {}, "optimizers": [], "waiting": waiting, "best": {}}
        if self._seats is not None:
            where = torch.tensor(running, dtype=torch.int64, device=self.device)
            held, states = self._seats.held, self._seats.optimizer.states()
            state["lanes"] = [self.lanes[place].state_dict() for place in running]
            state["held"] = {name: item.index_select(0, where).cpu() for name, item in held.items()}
            state["optimizers"] = [
                {name: item.cpu().clone() for name, item in states[place].items()} for place in running
            ]
            state["best"] = {key: item.cpu() for key, item in self._best.items()}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the trials of `state` in the place of the pack's own; NotPackable where they cannot."""
        lanes = [Lane.from_state(item) for item in state["lanes"]]
        waiting = [Lane.from_state(item).trial for item in state["waiting"]]
        self._begin()
        for trial in (*(lane.trial for lane in lanes), *waiting):
            self.refill(trial)
        entering = [self._waiting.popleft() for _ in lanes]
        if entering:
            assert self._shared is not None
            held = {name: item.to(self.device) for name, item in state["held"].items()}
            splits = [entrant.splits for entrant in entering]
            self._take_seats(Seats(self._shared, lanes, held, state["optimizers"], splits))
        self._best = {key: held.to(self.device) for key, held in state["best"].items()}

    def save_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Write `state_dict` to a file, whole or not at all."""
        write_checkpoint(path, {"pack": self.state_dict()})

    def load_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Go on from a file of `save_checkpoint`; CheckpointError when it is damaged or holds no pack."""
        content = read_checkpoint(path)
        if "pack" not in content:
            raise CheckpointError(f"checkpoint {path} must be of a pack, got one of a single training")
        self.load_state_dict(content["pack"])

    # --- who is in the pack -------------------------------------------------------------------------

    def _place(self, key: str) -> int:
        places = {} if self._seats is None else self._seats.places
        if key not in places:
            raise KeyError(f"the pack must hold trial {key!r}, its trials are {', '.join(places) or 'none'}")
        return places[key]

    def _splits_for(self, seed: int) -> Mapping[str, Split]:
        if seed not in self._splits:
            self._splits[seed] = self._splits_of(seed)
        return self._splits[seed]

    def _share(self, entrant: Entrant) -> None:
        """Take from the first trial what is equal in all of them."""
        shared = self._shared = Shared(entrant, self.device, compiled=self._compiled, native=self._native)
        model, still = (build_first_model(entrant.trial, self._build_model) for _ in range(2))
        self._traced = TracedPack(
            shared, model, still, self._loss_of, self._programs, compiled=self._compiled, native=self._native
        )
        self._orders = row_orders(shared.rows)
        self._shares = threshold_shares(shared.micro_batches)

    def _arrange(self) -> None:
        """Let those leave that have ended, and those enter that wait: no arithmetic is spent on the ended."""
        kept = [place for place, lane in enumerate(self.lanes) if lane.status == "running"]
        if len(kept) == len(self.lanes) and not self._waiting:
            return
        entering = list(self._waiting)
        self._waiting.clear()
        assert self._shared is not None
        self._take_seats(seated(self._shared, self._seats, kept, entering))

    def _take_seats(self, seats: Seats | None) -> None:
        self._seats = seats
        self._answers.clear()
        if seats is not None:  # what cannot be packed is found now, before anything is trained
            self._traced.train(min(seats.shared.config.batch_size, seats.shared.rows), seats)

    # --- an epoch -----------------------------------------------------------------------------------

    def _run_epoch(self, seats: Seats) -> PackEpoch:
        begun = time.perf_counter()
        self._answers.clear()
        rates = [lane.learning_rate for lane in seats.lanes]
        seats.optimizer.set_rates(rates)
        with torch.no_grad():
            self._begin_states(seats)
            told = _told_of_epoch(seats)
            table = EpochTable(len(seats), self.device)
            steps = self._train_epoch(seats, told, table)
            sums = table.sums()
            marks = seats.marks()
            bad_parameters = _count_bad_parameters(seats)
            step_ms = 1e3 * (time.perf_counter() - begun) / max(1, steps) / len(seats)
            validated = self._validate(seats, told) if seats.val is not None else None
        judged = []
        for place, lane in enumerate(seats.lanes):
            own, val = sums[place], None if validated is None or bad_parameters[place] else validated[place]
            _count_epoch(lane, own, marks[place], bad_parameters[place], val)
            epoch = lane.epoch
            if lane.status == "running":
                self._judge(seats, place, marks[place].streak, own, val)
            lane.epoch += 1
            if lane.status == "running" and lane.epoch >= lane.config.max_epochs:
                lane.end("completed", "")
            judged.append(Judged(epoch, own, rates[place], val, dict(lane.nan_counts), lane.status))
        self._restore_best(seats)
        seats.looks = self.device.type == "cpu" or seats.must_look()
        return PackEpoch(self.keys, judged, step_ms)

    def _begin_states(self, seats: Seats) -> None:
        """Begin anew what companions count an epoch."""
        if "control.state" in seats.held:
            seats.held["control.state"] = begin_epoch(seats.held["control.state"])
        for item in self._traced.functions(seats).carried:
            for name in item.fresh:
                key = f"carried.{item.name}.{name}"
                seats.held[key] = torch.zeros_like(seats.held[key])

    def _train_epoch(self, seats: Seats, told: Mapping[str, Tensor], table: EpochTable) -> int:
        """Train every micro-batch of the epoch; return the number of optimizer steps."""
        shared, lanes = seats.shared, len(seats)
        size = shared.config.batch_size
        draws = _Draws.of(seats)
        orders = [self._orders.of(lane.trial.seed, lane.epoch) for lane in draws.first(seats.lanes)]
        order = torch.stack(orders)
        taus = self._thresholds(seats)
        given = {**told, **seats.parameters}
        self._group = _Group()
        self._full_steps = steps = done = 0
        for rows, count in ((size, shared.rows // size), (shared.rows % size, 1)):
            if not rows or not count:
                continue
            program = self._traced.train(rows, seats)
            into = [seats.gradients] if seats.spare is None else [seats.gradients, seats.spare]
            bound = [seats.bound(program, given, matrix, (rows, place)) for place, matrix in enumerate(into)]
            names = [name for name, _ in program.batch_inputs if name in COLUMNS]
            at_once = max(1, _BLOCK_BYTES // max(1, seats.train.row_bytes(names) * rows * lanes))
            for first in range(done, done + count, at_once):
                stop = min(first + at_once, done + count)
                begin = first * size
                own = order[:, begin : begin + (stop - first) * rows].unflatten(1, (stop - first, rows))
                block = self._block(seats, program, told, draws, own.transpose(0, 1), taus[first:stop], first)
                for place, ahead in enumerate(program.prepare_batches(block.told, lanes, stop - first)):
                    block.place = place
                    steps += self._micro_batch(seats, program, bound, ahead, block, table)
            done += count
        if self._group.count:
            steps += self._step(seats)
        seats.held["steps"] += self._full_steps
        return steps

    def _block(
        self,
        seats: Seats,
        program: Program,
        told: Mapping[str, Tensor],
        draws: _Draws,
        rows: Tensor,
        taus: Tensor,
        first: int,
    ) -> _Block:
        """Gather what some steps take: `rows` (steps, draws, n) are positions in the data of each draw."""
        names = [name for name, _ in program.batch_inputs]
        columns = [name for name in names if name in COLUMNS]
        drawn = seats.train.gather(rows, columns, trials=torch.tensor(draws.places))
        which = draws.which.to(self.device)
        held = {**told, **{name: item.index_select(1, which) for name, item in drawn.items()}}
        held["tau"] = taus.to(self.device, seats.shared.layout.dtype)
        if "global_step" in names:
            start = torch.tensor([lane.global_step for lane in seats.lanes])
            counted = start + 1 + first + torch.arange(len(rows))[:, None]
            held["global_step"] = counted.to(self.device)
        return _Block(held, draws, rows, taus, taus.to(self.device), first)

    def _thresholds(self, seats: Seats) -> Tensor:
        """Return the epoch's thresholds, (micro-batches, trials) float64, on the CPU."""
        if not seats.draws_tau:
            return seats.low.expand(seats.shared.micro_batches, -1)
        shares = [self._shares.of(lane.trial.seed, lane.epoch) for lane in seats.lanes]
        return thresholds(seats.low, seats.high, torch.stack(shares, dim=1))

    # --- a step -------------------------------------------------------------------------------------

    def _micro_batch(
        self,
        seats: Seats,
        program: Program,
        bound: Sequence[BoundStep],
        ahead: tuple[Tensor, ...],
        block: _Block,
        table: EpochTable,
    ) -> int:
        """Forward and backward pass of a micro-batch; its gradient joins the group's. Returns steps taken."""
        group = self._group
        states = [seats.held[name] for name in program.step_inputs]
        step = bound[1 if group.count else 0]
        made = step(states, ahead)
        loss, P, Q = made[:3]
        if states:
            seats.held.update(zip(program.outputs[3:], made[3:], strict=True))
        rows = int(P.shape[1])
        weight = rows / (group.rows or rows)
        if group.count:
            assert seats.spare is not None
            seats.gradients.add_(seats.spare, alpha=weight)
        group.add(loss, rows, weight, block)
        group.means = step.means if group.count == 1 else None
        table.add(loss, P, Q, block.taus_there[block.place], seats.alive if seats.masked else None)
        if group.count == seats.shared.config.gradient_accumulation_steps:
            return self._step(seats)
        return 0

    def _step(self, seats: Seats) -> int:
        """End the group: every trial takes its step, but for those whose loss or gradient is not finite."""
        group, self._group = self._group, _Group()
        gradients = seats.gradients
        if group.weight != 1.0:
            gradients.div_(group.weight)
        means = seats.shared.probe.means(gradients) if group.means is None else group.means
        if not seats.masked and math.isfinite(torch.cat([means, *group.losses]).sum().item()):
            if seats.clips:
                clip_rows(gradients, seats.clip_limits)
            seats.optimizer.step(gradients)
            self._full_steps += 1
        else:
            self._masked_step(seats, means, group)
        return 1

    def _masked_step(self, seats: Seats, means: Tensor, group: _Group) -> None:
        """The step where some trials may not take it; on a device nobody looks which."""
        held, alive = seats.held, seats.alive
        bad_loss = ~is_finite(torch.stack(group.losses)).all(0)
        bad = (bad_loss | ~is_finite(means)) & alive
        taken = alive & ~bad
        held["loss_skips"] += bad & bad_loss
        held["gradient_skips"] += bad & ~bad_loss
        held["streak"] = torch.where(alive, (held["streak"] + 1) * bad, held["streak"])
        held["longest_streak"] = torch.maximum(held["longest_streak"], held["streak"])
        held["steps"] += taken
        skips = held["loss_skips"] + held["gradient_skips"]
        seats.alive = alive & (skips <= seats.budgets) & (held["streak"] < seats.streak_limits)
        if seats.looks:
            self._find_origins(seats, bad, group)
        if self.device.type == "cpu":
            seats.masked = bool((~seats.alive | (held["streak"] > 0)).any())
        if seats.clips:
            clip_rows(seats.gradients, seats.clip_limits)
        seats.optimizer.step(seats.gradients, taken)

    def _find_origins(self, seats: Seats, bad: Tensor, group: _Group) -> None:
        """Say once of a trial where its first non-finite loss or gradient came from."""
        for place in bad.nonzero().flatten().tolist():
            lane = seats.lanes[place]
            if lane.nan_origin:
                continue
            loss = None if self._loss_of is None else self._loss_of(lane.config)
            loss = make_training_loss(lane.config) if loss is None else loss
            batches = [_alone(seats, block, step, place) for block, step in group.members]
            with torch.enable_grad():
                lane.nan_origin = origin_of(self.model_of(lane.trial.key), loss, lane.config, batches)

    # --- the end of an epoch ------------------------------------------------------------------------

    def _validate(self, seats: Seats, told: Mapping[str, Tensor]) -> list[Validated]:
        """Return what each trial's validation found, and keep the answers for who asks for them next."""
        assert seats.val is not None
        held = dict(told)
        held["tau"] = seats.middle
        ends = (lane.global_step + seats.shared.micro_batches for lane in seats.lanes)
        held["global_step"] = seats.of_lanes(ends, torch.int64)
        tables, sizes, answers = [], [], []
        for rows in torch.arange(seats.val.rows).split(max(seats.shared.config.batch_size, _VALIDATION_ROWS)):
            made = self._still("validate", seats, seats.val, rows, held)
            decoded = decode_rows(made["P"], made["Q"], seats.taus)
            tables.append(validation_numbers(made["loss"], made["P"], made["Q"], *decoded[1:3]))
            sizes.append(len(rows))
            answers.append(decoded)
        self._answers["val"] = PackDecoded.joined(self.keys, answers)
        return validated_trials(torch.stack(tables, dim=1), sizes, seats.taus)

    def _still(
        self, kind: str, seats: Seats, split: StackedSplit, rows: Tensor, held: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Run `validate` or `answer` on rows of a split, some trials at a time where all are too many."""
        program = self._traced.still(kind, len(rows), seats)
        names = [name for name in program.pack_inputs if name in COLUMNS]
        row_bytes = 4 * split.row_bytes(names)  # with what is computed of a row
        share = max(1, _BLOCK_BYTES // max(1, row_bytes * len(rows)))
        if share >= len(seats) and split is seats.val:
            # Held-out rows are the same in every epoch.
            place = (kind, int(rows[0]), len(rows))
            given = seats.kept_rows(place, lambda: split.gather(rows.expand(len(seats), -1), names))
            step = seats.bound(program, {**held, **given, **seats.parameters}, None, place)
            return dict(zip(program.outputs, step((), ()), strict=True))
        parts = []
        for trials in torch.arange(len(seats)).split(share):
            own = slice(int(trials[0]), int(trials[-1]) + 1)
            given = split.gather(rows.expand(len(trials), -1), names, trials=trials)
            given |= {name: item[own] for name, item in held.items() if name in program.pack_inputs}
            given |= seats.named_parameters(seats.weights[own])
            parts.append(program.bind(len(trials), given)((), ()))
        joined = (torch.cat(column) if len(parts) > 1 else column[0] for column in zip(*parts, strict=True))
        return dict(zip(program.outputs, joined, strict=True))

    def _judge(
        self, seats: Seats, place: int, streak: int, sums: EpochSums, validated: Validated | None
    ) -> None:
        """Note the best epoch, and end a trial that has diverged or covers too little for too long."""
        lane = seats.lanes[place]
        config, bad_parameters = lane.config, lane.nan_counts["parameter"]
        if bad_parameters:
            lane.end("diverged", f"{bad_parameters} parameters are not finite")
        elif lane.skipped_steps > config.nonfinite_budget:
            lane.end("diverged", f"{lane.skipped_steps} steps had a non-finite loss or gradient")
        elif streak and streak >= streak_limit(config):
            steps = f"{streak} steps in a row" if streak > 1 else "a step"
            lane.end("diverged", f"{steps} had a non-finite loss or gradient")
        if validated is not None and validated.loss < lane.best_val_loss:
            lane.best_epoch, lane.best_val_loss = lane.epoch, validated.loss
            if config.restore_best:
                self._best[lane.trial.key] = seats.weights[place].clone()
        coverage = sums.coverage if validated is None else validated.coverage
        lane.short_epochs = lane.short_epochs + 1 if coverage < config.coverage_threshold else 0
        if lane.status == "running" and lane.short_epochs >= config.coverage_patience:
            lane.end("stopped", f"coverage below {config.coverage_threshold} for {lane.short_epochs} epochs")

    def _restore_best(self, seats: Seats) -> None:
        """Give trials that have ended, and ask for it, the weights of their best epoch."""
        for place, lane in enumerate(seats.lanes):
            best = self._best.pop(lane.trial.key, None) if lane.status != "running" else None
            if best is not None:
                seats.weights[place] = best
                self._answers.clear()

    def _decode(self, name: str, tau: float | None = None) -> PackDecoded:
        seats = self._seats
        if seats is None:
            raise ValueError("a pack must hold a trial to be decoded, it holds none")
        split = seats.stacked(name)
        told = {**seats.numbers, **seats.fixed()}
        with torch.no_grad():
            made = [
                self._still("answer", seats, split, rows, told)
                for rows in torch.arange(split.rows).split(_VALIDATION_ROWS)
            ]
            taus = seats.taus if tau is None else [tau] * len(seats.taus)
            answers = [decode_rows(item["P"], item["Q"], taus) for item in made]
        return PackDecoded.joined(self.keys, answers)


def _told_of_epoch(seats: Seats) -> dict[str, Tensor]:
    """Return what is known of each trial for the whole epoch, by the names of a step's arguments."""
    told = {**seats.numbers, **seats.fixed()}
    if seats.form.ramped:
        share = seats.of_lanes(lane.weight_share() for lane in seats.lanes)
        told |= {knob: told[knob] * share for knob in WEIGHTS.values()}
    told["epoch"] = seats.of_lanes((lane.epoch for lane in seats.lanes), torch.int64)
    return told


def _count_bad_parameters(seats: Seats) -> list[int]:
    """Return how many of each trial's parameters and buffers are not finite."""
    fine = is_finite(seats.shared.probe.means(seats.weights))
    floats = [held.flatten(1) for held in seats.fixed().values() if held.is_floating_point()]
    for held in floats:
        fine = fine & is_finite(held).all(1)
    if bool(fine.all()):
        return [0] * len(seats)
    counts = [(~torch.isfinite(held)).sum(1) for held in (seats.weights, *floats)]
    return [int(number) for number in torch.stack(counts).sum(0).tolist()]


def _count_epoch(
    lane: Lane, sums: EpochSums, marks: Marks, bad_parameters: int, validated: Validated | None
) -> None:
    """Note what a trial met in an epoch."""
    lane.epoch_steps = int(sums.micro_batches)
    lane.global_step += lane.epoch_steps
    lane.optimizer_steps = marks.steps
    lane.skipped_steps = marks.loss_skips + marks.gradient_skips
    lane.longest_streak = marks.longest_streak
    lane.bad_numerators += int(sums.bad_numerators)
    lane.bad_denominators += int(sums.bad_denominators)
    counts = lane.nan_counts
    counts["loss"] += int(sums.bad_losses)
    counts["output"] += int(sums.bad_outputs) + (0 if validated is None else validated.faults)
    counts["gradient"] = marks.gradient_skips
    counts["parameter"] = bad_parameters
    if lane.optimizer_steps:  # no schedule moves before the first step
        lane.schedule_moves += 1


def _alone(seats: Seats, block: _Block, step: int, place: int) -> MicroBatch:
    """Return one trial's micro-batch."""
    lane = seats.lanes[place]
    rows = block.rows[step, block.draws.which[place]]
    columns = seats.train.gather(rows[None], COLUMNS, trials=torch.tensor([place]))
    curriculum = make_curriculum(lane.config)
    facts = {
        "tau": float(block.taus[step, place]),
        "epoch": lane.epoch,
        "global_step": lane.global_step + 1 + block.first + step,
        "loss_weights": None if curriculum is None else curriculum.weights(lane.epoch),
    }
    return MicroBatch({name: held[0] for name, held in columns.items()}, facts)


class _Draws(NamedTuple):
    """Which trials draw the same rows of the same data: a place of each draw, and of each trial its draw."""

    places: list[int]
    which: Tensor  # (trials,) int64, on the CPU

    @classmethod
    def of(cls, seats: Seats) -> _Draws:
        """Find the draws of the epoch that comes."""
        seen: dict[tuple[int, int, int], int] = {}
        places: list[int] = []
        which = []
        for place, (lane, splits) in enumerate(zip(seats.lanes, seats.splits, strict=True)):
            draw = (lane.trial.seed, lane.epoch, id(splits["train"]))
            if draw not in seen:
                seen[draw] = len(seen)
                places.append(place)
            which.append(seen[draw])
        return cls(places, torch.tensor(which))

    def first(self, lanes: Sequence[Lane]) -> list[Lane]:
        """Return one of the trials of each draw."""
        return [lanes[place] for place in self.places]


@dataclass
class _Block:
    """Some steps' micro-batches: what they are told, which rows, which thresholds, and where they begin."""

    told: Mapping[str, Tensor]
    draws: _Draws
    rows: Tensor  # (steps, draws, n), on the CPU
    taus: Tensor  # (steps, trials) float64, on the CPU
    taus_there: Tensor
    first: int
    place: int = 0  # of the step under way


class _Group:
    """The micro-batches of an optimizer step under way."""

    def __init__(self) -> None:
        self.count = 0
        self.rows = 0  # of the first
        self.weight = 0.0
        self.losses: list[Tensor] = []
        self.means: Tensor | None = None  # of the only one's gradients, where they are known
        self.members: list[tuple[_Block, int]] = []

    def add(self, loss: Tensor, rows: int, weight: float, block: _Block) -> None:
        self.count += 1
        self.rows = self.rows or rows
        self.weight += weight
        self.losses.append(loss)
        self.members.append((block, block.place))
