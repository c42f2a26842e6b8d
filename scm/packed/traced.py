"""The programs of a pack: which function is traced for how many rows, and with which examples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from scm.packed.batches import COLUMNS
from scm.packed.functions import LossOf, TrialFunctions
from scm.packed.lanes import NotPackable
from scm.packed.program import Known, PerTrial, Program, ProgramError, first_apart, trace_program
from scm.packed.seats import Seats, Shared
from scm.packed.toolchain import ToolchainError
from scm.packed.words import LoweringError

Programs = dict[Any, Program]
"""Traced programs by what they are of: good for any pack of the same process."""

_EXAMPLES = 6  # trials that a program is traced and checked with


class TracedPack:
    """Makes the programs of a pack when they are asked for, and finds those that were made before.

    model: one of the pack's, for its structure; train and eval are told apart. Raises NotPackable, of the
    pack's first trial, with the reason why a function cannot be batched.
    """

    def __init__(
        self,
        shared: Shared,
        model: nn.Module,
        still_model: nn.Module,
        loss_of: LossOf | None,
        programs: Programs,
        *,
        compiled: bool,
        native: bool = False,
    ) -> None:
        self._shared = shared
        self._model = model.to("meta").train()
        self._still_model = still_model.to("meta").eval()
        self._loss_of = loss_of
        self._programs = programs
        self._compiled = compiled
        self._native = native

    def train(self, rows: int, seats: Seats) -> Program:
        """Return the program of a micro-batch of so many rows: loss, P, Q, carried states and gradients."""
        own = self.functions(seats, self._model)
        return self._program("train", rows, seats, own.train, own.known(), own.gradients)

    def still(self, kind: str, rows: int, seats: Seats) -> Program:
        """Return the program of "validate" (loss, P, Q) or of "answer" (P, Q) on so many held-out rows."""
        own = self.functions(seats, self._still_model)
        function = own.validate if kind == "validate" else own.answer
        return self._program(kind, rows, seats, function, own.known_still(), {})

    def functions(self, seats: Seats, model: nn.Module | None = None) -> TrialFunctions:
        """Return the functions of one trial, of those that are seated."""
        layout = self._shared.layout
        model = self._model if model is None else model
        names = tuple(layout.shapes), layout.fixed
        return TrialFunctions(self._shared.config, model, *names, self._loss_of, seats.form)

    def _program(
        self,
        kind: str,
        rows: int,
        seats: Seats,
        function: PerTrial,
        known: Mapping[str, Known],
        gradients: Mapping[str, str],
    ) -> Program:
        compiles = self._compiled and kind == "train"
        shared = self._shared
        key = (
            kind,
            rows,
            seats.form,
            shared.signature,
            self._loss_of,
            str(shared.device),
            compiles,
            self._native,
        )
        held = self._programs.get(key)
        if held is None:
            example = _example(seats, rows, known)
            try:
                held = trace_program(
                    function, example, known, gradients=gradients, joined=gradients, in_place=not compiles
                )
            except ProgramError as error:
                raise NotPackable(seats.lanes[0].trial.key, str(error)) from error
            if compiles:
                held = held.compiled(dynamic=True)
            elif self._native:
                held = _as_native(held, example)
            self._programs[key] = held
        return held


def _as_native(program: Program, example: Mapping[str, Tensor]) -> Program:
    """Return the program as machine code; as it is, where it cannot be written so or comes out otherwise."""
    native = program.native()
    try:
        found = native.run(example)
    except (LoweringError, ToolchainError):
        return program
    return native if first_apart(found, program.run(example)) is None else program


def _example(seats: Seats, rows: int, known: Mapping[str, Known]) -> dict[str, Tensor]:
    """Return the arguments of a few trials on some of their rows, no two of them alike."""
    device, dtype = seats.shared.device, seats.shared.layout.dtype
    trials = torch.arange(_EXAMPLES)
    place = trials % len(seats)
    where = place.to(device)
    picked = (torch.arange(rows) + trials[:, None]) % seats.shared.rows
    held: dict[str, Tensor] = dict(seats.train.gather(picked, COLUMNS, trials=place))
    # Trials of one seed begin alike: a program that took one for the other would not be found out.
    apart = 1.0 + 0.01 * trials.to(device, dtype)
    held |= seats.named_parameters(seats.weights.index_select(0, where) * apart[:, None])
    held |= {name: item.index_select(0, where) for name, item in seats.numbers.items()}
    kept = {name: item for name, item in seats.held.items() if name in known}
    held |= {name: item.index_select(0, where) for name, item in kept.items()}
    held["tau"] = held["tau_train_max"].to(dtype)
    held["epoch"] = held["global_step"] = trials.to(device)
    return {name: held[name] for name in known}
