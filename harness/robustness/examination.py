"""One examination: models trained, laws tried, faults injected, data shifted, and what came of it written.

Its parts are a table; one that raises is said, and the others go on.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa

from harness.errors import EXIT_RUN_FOLDER, UserError, one_line
from harness.robustness.examined import Examined, differences, train_examined
from harness.robustness.faults import Fault
from harness.robustness.law import Property
from harness.robustness.matrix import run_matrix
from harness.robustness.profiles import Profile
from harness.robustness.shift import measure_shift
from harness.robustness.stress import Findings, stress_models
from reports.fragments import write_json_atomically
from reports.provenance import gather_provenance
from reports.robustness_cells import cells_table, score_cells, write_cells, write_scores
from reports.robustness_page import write_page
from reports.robustness_shift import write_shift
from trainables.trained import Trained
from trainables.trial import error_line

PROVENANCE_FILE = "robustness.json"


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked for: the laws and faults, how hard, from which seed, where to, on which device."""

    profile: Profile
    laws: Sequence[Property]
    faults: Sequence[Fault]
    seed: int
    out: Path
    device: str
    command: str
    shift: bool = True


@dataclass(slots=True)
class Examination:
    """What an examination found; `trouble` names the parts that raised, with what."""

    request: Request
    examined: Examined
    trained: dict[str, Trained | Mapping[str, Any]]
    findings: Findings
    notes: list[str] = field(default_factory=list)
    cells: pa.Table | None = None
    scores: pa.Table | None = None
    shift_rows: int = 0
    trouble: dict[str, str] = field(default_factory=dict)
    page: Path | None = None

    @property
    def models(self) -> dict[str, Trained]:
        """The trials that left a model."""
        return {name: model for name, model in self.trained.items() if isinstance(model, Trained)}


def examine(
    examined: Examined, request: Request, *, say: Callable[[str], None] = lambda text: None
) -> Examination:
    """Train, stress, inject, shift, score, and write the page; what ended is written whatever comes later.

    `say` is told what is being done, often. Raises UserError where the folder cannot be written.
    """
    folder = request.out
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_provenance(folder, examined, request)
        say("training")
        trained = train_examined(examined, request.device, lambda: say("training"))
        examination = Examination(request, examined, trained, Findings(folder))
        examination.notes += [*examined.notes, *differences(examined, trained)]
        for name, run_part in PARTS.items():
            try:
                run_part(examination, say)
            except (KeyboardInterrupt, OSError, UserError):
                raise
            except Exception as error:  # of a task, or of one part: what the others find is worth having
                examination.trouble[name] = one_line(error_line(error))
        examination.page = write_page(folder)
    except OSError as error:
        said = f"{error.strerror or error}: {error.filename}" if error.filename else one_line(error)
        raise UserError(f"{folder} cannot be written: {said}", EXIT_RUN_FOLDER) from None
    return examination


def _try_laws(held: Examination, say: Callable[[str], None]) -> None:
    if not held.request.laws:
        return
    stress_models(
        held.trained,
        held.request.laws,
        held.findings,
        task=str(held.examined.spec["name"]),
        examples=held.request.profile.examples,
        seed=held.request.seed,
        on_law=lambda trial_id, law: say(f"{trial_id}: {law}"),
    )


def _inject_faults(held: Examination, say: Callable[[str], None]) -> None:
    if not held.request.faults:
        return
    rows: list[dict[str, Any]] = []
    examined = held.examined
    try:
        for row in run_matrix(
            examined.spec,
            examined.configs,
            examined.seeds,
            held.request.faults,
            device=held.request.device,
            on_cell=lambda cell: say(f"fault {cell}"),
        ):
            rows.append(row)
    finally:
        if rows:
            write_cells(held.request.out, rows)
    held.cells = cells_table(rows)
    held.scores = score_cells(held.cells)
    write_scores(held.request.out, held.scores)


def _shift_data(held: Examination, say: Callable[[str], None]) -> None:
    if not held.request.shift or not held.models:
        return
    rows = measure_shift(held.models, on_model=lambda name: say(f"{name}: domain shift"))
    write_shift(held.request.out, rows)
    held.shift_rows = len(rows)


PARTS: dict[str, Callable[[Examination, Callable[[str], None]], None]] = {
    "properties": _try_laws,
    "faults": _inject_faults,
    "shift": _shift_data,
}


def _write_provenance(folder: Path, examined: Examined, request: Request) -> None:
    from hypothesis import __version__ as hypothesis_version

    said = {
        "command": request.command,
        "examined": examined.name,
        "task": str(examined.spec["name"]),
        "configs": list(examined.configs),
        "seeds": list(examined.seeds),
        "profile": request.profile.name,
        "examples": request.profile.examples,
        "properties": [law.name for law in request.laws],
        "faults": [fault.name for fault in request.faults],
        "seed": request.seed,
        "device": request.device,
        "hypothesis_version": hypothesis_version,
        "started_at": datetime.now(UTC).isoformat(),
        **gather_provenance(),
    }
    write_json_atomically(said, folder / PROVENANCE_FILE)


def printer(terminal: bool) -> Callable[[str], None]:
    """Says what is being done on one line of a terminal, over what it said before; nothing elsewhere."""

    def say(text: str) -> None:
        if terminal:
            print(f"\r\x1b[K{text[:100]}", end="", file=sys.stderr, flush=True)

    return say
