"""The laws of trained models tried on each of them, and the cases that break one kept with their model."""

from __future__ import annotations

import contextlib
import hashlib
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from harness.errors import UserError, nearest, one_line
from harness.robustness.cases import decode_case, encode_case, show_case
from harness.robustness.law import DoesNotApplyError, Property
from harness.robustness.model_laws import MODEL_LAWS
from harness.robustness.search import BROKEN, ERROR, broken_by, plain_seed, try_property
from reports.robustness_findings import write_findings
from trainables.stressed import StressedModel
from trainables.trained import Trained, read_trained, write_trained

MODELS_FOLDER = "models"
FAILS = "fails"
NO_MODEL = "training"
"""The property under which it is said that a trial left no model."""


def parse_properties(text: str) -> list[Property]:
    """The laws named, with commas between, or all; a `UserError` that names the nearest for any other."""
    if text == "all":
        return list(MODEL_LAWS.values())
    chosen = []
    for name in (part.strip() for part in text.split(",") if part.strip()):
        if name not in MODEL_LAWS:
            raise UserError(
                f"unknown property {name!r}{nearest(name, MODEL_LAWS)} (known: {', '.join(MODEL_LAWS)})"
            )
        chosen.append(MODEL_LAWS[name])
    if not chosen:
        raise UserError(f"--properties must name laws or be all, got {text!r}")
    return chosen


class Findings:
    """Verdicts and counterexamples of one examination, on the disk after every model."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.verdicts: list[dict[str, Any]] = []
        self.counterexamples: list[dict[str, Any]] = []

    @property
    def broken(self) -> list[dict[str, Any]]:
        """The verdicts that a law is broken, or could not be tried."""
        return [row for row in self.verdicts if row["status"] in (BROKEN, ERROR)]

    def write(self) -> None:
        """Put all that was found on the disk."""
        write_findings(self.folder, self.verdicts, self.counterexamples)


def stress_models(
    trained: Mapping[str, Trained | Mapping[str, Any]],
    laws: Sequence[Property],
    findings: Findings,
    *,
    task: str,
    examples: int,
    seed: int,
    on_law: Callable[[str, str], None] = lambda trial, law: None,
) -> None:
    """Try every law on every model, by trial_id; a trial without a model has one verdict that says so.

    What was found is written after each model, also when an interrupt or an error ends it. The same models,
    laws, examples and seed give the same verdicts, times apart.
    """
    try:
        for trial_id, model in trained.items():
            config_id, _, number = trial_id.rpartition("-s")
            identity = {"task": task, "config_id": config_id, "trial_id": trial_id, "seed": int(number)}
            if not isinstance(model, Trained):
                findings.verdicts.append(
                    identity
                    | {"property": NO_MODEL, "status": ERROR, "message": f"no model: {model['error']}"}
                )
                continue
            digest = model.digest
            path = findings.folder / MODELS_FOLDER / f"{digest}.pt"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_trained(model, path)
            with contextlib.redirect_stdout(sys.stderr):  # stdout is for results, whatever a task prints
                for row, case in _tried(model, laws, examples, seed, partial(on_law, trial_id)):
                    _note(findings, identity | {"model_digest": digest}, row, case)
            findings.write()
    finally:
        findings.write()


def replay(row: Mapping[str, Any], folder: Path, device: str = "cpu") -> str | None:
    """Try a stored case again, with its weights and today's code: how it fails, None where it is fixed.

    Raises DoesNotApplyError where the law says nothing about the model any more, CheckpointError and whatever
    the task raises where the model cannot be had.
    """
    if row["property"] not in MODEL_LAWS:
        raise DoesNotApplyError(f"there is no property {row['property']!r} any more")
    law = MODEL_LAWS[row["property"]]
    subject = StressedModel(read_trained(folder / str(row["model_file"]), device))
    lacks = [name for name in law.needs if getattr(subject, name, None) is None]
    if lacks:
        raise DoesNotApplyError(f"the model's task has no {', '.join(lacks)} any more")
    return broken_by(law, subject, decode_case(str(row["input"])))


def _tried(
    model: Trained, laws: Sequence[Property], examples: int, seed: int, on_law: Callable[[str], None]
) -> Iterator[tuple[dict[str, Any], Mapping[str, Any] | None]]:
    subject = StressedModel(model)
    for law in laws:
        on_law(law.name)
        cases_seed = plain_seed(seed, law.name, model.digest)
        found = try_property(law, subject, examples=examples, seed_of_cases=cases_seed)
        yield (
            {
                "property": law.name,
                "law": law.law,
                "status": found.status,
                "message": found.message,
                "examples": found.examples,
                "cases_seed": cases_seed,
                "duration_s": found.duration_s,
            },
            found.case,
        )


def _note(
    findings: Findings,
    identity: Mapping[str, Any],
    row: dict[str, Any],
    case: Mapping[str, Any] | None,
) -> None:
    verdict = {**identity, **row}
    if case is not None:
        text = encode_case(case)
        said = "|".join((row["property"], text, identity["model_digest"]))
        name = hashlib.sha256(said.encode()).hexdigest()[:10]
        verdict["counterexample"] = name
        findings.counterexamples.append(
            {
                **identity,
                "id": name,
                **{key: row[key] for key in ("property", "law", "message", "cases_seed")},
                "shown": one_line(show_case(case)),
                "input": text,
                "rows": _rows_of(case),
                "model_file": f"{MODELS_FOLDER}/{identity['model_digest']}.pt",
                "status": FAILS,
                "replay": f"scm-harness replay {name} --in {shlex.quote(str(findings.folder))}",
                "created_at": datetime.now(UTC),
            }
        )
    findings.verdicts.append(verdict)


def _rows_of(case: Mapping[str, Any]) -> int:
    """How many rows of data a case has: the first dimension of its tensors."""
    return max((len(value) for value in case.values() if hasattr(value, "shape") and value.ndim), default=0)
