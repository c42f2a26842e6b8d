"""Inject every known way in which a training fails into a tiny one, and show what the guards make of it.

Nineteen failures (`failures`) and the six outcomes that were expected of the published remedies,
measured on the task `grid` (`grid_outcomes`). Each is measured without the guard, with it, and twice where
nothing is injected, so that a guard is also seen to change nothing of a healthy training: bit for bit, or
within the tolerance that its target states. Where a published remedy does not work, or a published cause is
none, its numbers stand beside ours. Fixed seeds, one thread; the default runs three seeds, and every target
must hold at each of them.

    python benchmarks/failure_modes.py [--quick] [--ids ID [ID ...]] [--device cpu|cuda]
                                       [--json PATH] [--parquet PATH] [--markdown PATH]

--markdown writes the tables; in a file that holds the lines <!-- measured --> and <!-- end -->, between them.

Exit code 0 when every target is met, 1 when one is missed, 2 when nothing can be measured: the device is not
there, or the example puzzles are not.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from benchmark_arguments import device, file_to_write
from failures import FAILURES
from failures.measuring import Case, Found, Setting
from grid_outcomes import OUTCOMES, grid_task
from marked_page import write_between_marks

from reports.fragments import write_table_atomically
from trainables.tasks.protocol import TaskError

CASES: dict[str, Case] = {case.id: case for case in (*FAILURES, *OUTCOMES)}
SEEDS = (0, 1, 2)
GROUPS = {"failure": "Injected failures", "outcome": "Expected outcomes, on the task `grid`"}

SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("group", pa.string(), nullable=False),
        pa.field("seed", pa.int64(), nullable=False),
        pa.field("trigger", pa.string(), nullable=False),
        pa.field("mechanism", pa.string(), nullable=False),
        pa.field("measure", pa.string(), nullable=False),
        pa.field("unit", pa.string(), nullable=False),
        pa.field("clean_measure", pa.string(), nullable=False),
        pa.field("guard", pa.string(), nullable=False),
        pa.field("reference", pa.string(), nullable=False),
        pa.field("without_guard", pa.float64(), nullable=False),
        pa.field("reference_rule", pa.float64()),  # null: there is none to compare with
        pa.field("with_guard", pa.float64(), nullable=False),
        pa.field("clean", pa.float64(), nullable=False),
        pa.field("clean_with_guard", pa.float64(), nullable=False),
        pa.field("clean_change", pa.float64(), nullable=False),
        pa.field("more", pa.map_(pa.string(), pa.float64()), nullable=False),
        pa.field("targets", pa.list_(pa.string()), nullable=False),
        pa.field("missed", pa.list_(pa.string()), nullable=False),
        pa.field("met", pa.bool_(), nullable=False),
        pa.field("device", pa.string(), nullable=False),
        pa.field("torch", pa.string(), nullable=False),
        pa.field("seconds", pa.float64(), nullable=False),
    ]
)
_NUMBERS = ("without_guard", "reference_rule", "with_guard", "clean", "clean_with_guard", "clean_change")


@dataclass(frozen=True, slots=True)
class Measured:
    """What one case came to at one seed."""

    case: Case
    setting: Setting
    found: Found
    seconds: float

    @property
    def missed(self) -> list[str]:
        """The targets that do not hold."""
        return [str(target) for target in self.case.targets if not target.holds(self.found)]

    def row(self) -> dict[str, Any]:
        """The row, with the columns of `SCHEMA`."""
        case, found = self.case, self.found
        texts = ("id", "group", "trigger", "mechanism", "measure", "unit", "guard", "reference")
        return {
            **{name: getattr(case, name) for name in texts},
            "clean_measure": case.clean_measure or case.measure,
            "seed": self.setting.seed,
            **{name: _optional(getattr(found, name)) for name in _NUMBERS},
            "more": {name: float(value) for name, value in found.more.items()},
            "targets": [str(target) for target in case.targets],
            "missed": self.missed,
            "met": not self.missed,
            "device": str(self.setting.device),
            "torch": torch.__version__,
            "seconds": self.seconds,
        }


def run_cases(cases: Iterable[Case], seeds: Sequence[int], device: torch.device) -> list[Measured]:
    """Measure the cases one after the other, each at every seed."""
    measured = []
    for case in cases:
        for seed in seeds:
            setting = Setting(seed, device)
            begun = time.perf_counter()
            found = case.run(setting)
            measured.append(Measured(case, setting, found, time.perf_counter() - begun))
    return measured


def write_parquet(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write one row for each case and seed, with the columns of `SCHEMA`."""
    listed = [{**row, "more": list(row["more"].items())} for row in rows]
    write_table_atomically(pa.Table.from_pylist(listed, schema=SCHEMA), path)


# --- as text -------------------------------------------------------------------------------------


def render(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table for a terminal: one line a case, over its seeds, and one for each target that was missed."""
    names = ("without", "reference", "with guard", "clean", "guard on", "change")
    lines = [f"{'id':<10}" + "".join(f"{name:>23}" for name in names) + f"{'s':>7}"]
    for case_id, group in _by_case(rows).items():
        spans = "".join(f"{_span(row[name] for row in group):>23}" for name in _NUMBERS)
        met = "met" if all(row["met"] for row in group) else "MISSED"
        lines.append(f"{case_id:<10}{spans}{sum(row['seconds'] for row in group):>7.1f}  {met}")
        lines += [f"    seed {row['seed']}: {text}" for row in group for text in row["missed"]]
    return "\n".join(lines)


def render_markdown(rows: Sequence[Mapping[str, Any]], duration_s: float) -> str:
    """The tables for the documents: the numbers by group, then what stands behind each row."""
    seeds = sorted({row["seed"] for row in rows})
    told = f"seeds {', '.join(map(str, seeds))}" if len(seeds) > 1 else f"seed {seeds[0]}"
    machine = f"torch {rows[0]['torch']} on {rows[0]['device']}, one thread"
    blocks = [f"Measured with {machine}, {told}, in {duration_s:.0f} s."]
    for name, title in GROUPS.items():
        held = [row for row in rows if row["group"] == name]
        if held:
            blocks += [f"## {title}", _numbers_table(held)]
    blocks += ["## Behind the rows", _words_table(rows)]
    return "\n\n".join(blocks) + "\n"


def _numbers_table(rows: Sequence[Mapping[str, Any]]) -> str:
    head = (
        "id",
        "measured",
        "without the guard",
        "published remedy",
        "with the guard",
        "clean",
        "clean, guard on",
        "change",
        "targets",
    )
    lines = [_line(head), _line(["---"] * len(head))]
    for case_id, group in _by_case(rows).items():
        what = group[0]["measure"] + (f", {group[0]['unit']}" if group[0]["unit"] else "")
        spans = [_span(row[name] for row in group) for name in _NUMBERS]
        met = "met" if all(row["met"] for row in group) else "**missed**"
        lines.append(_line([case_id, what, *spans, met]))
    return "\n".join(lines)


def _words_table(rows: Sequence[Mapping[str, Any]]) -> str:
    head = ("id", "what is done", "why it fails", "guard", "published", "clean", "also measured")
    lines = [_line(head), _line(["---"] * len(head))]
    for case_id, group in _by_case(rows).items():
        first = group[0]
        clean = "" if first["clean_measure"] == first["measure"] else first["clean_measure"]
        more = [f"{name} {_span(row['more'][name] for row in group)}" for name in first["more"]]
        words = (first["trigger"], first["mechanism"], first["guard"], first["reference"], clean)
        lines.append(_line([case_id, *words, "; ".join(more)]))
    return "\n".join(lines)


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _by_case(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    grouped: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        grouped.setdefault(row["id"], []).append(row)
    return grouped


def _span(values: Iterable[float | None]) -> str:
    """One number where all are alike to three digits, else the smallest and the largest; nan where one is."""
    held = [value for value in values if value is not None]
    if not held:
        return ""
    if any(map(math.isnan, held)):
        return "nan"
    low, high = f"{min(held):.3g}", f"{max(held):.3g}"
    return low if low == high else f"{low} to {high}"


def _optional(value: float | None) -> float | None:
    return None if value is None else float(value)


def _strict(value: Any) -> Any:
    """The same value with None for every float that JSON has no word for."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _strict(held) for key, held in value.items()}
    return [_strict(held) for held in value] if isinstance(value, list) else value


# --- the command ---------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; return its exit code."""
    arguments = _parser().parse_args(argv)
    cases = [CASES[name] for name in arguments.ids]
    if any(case.group == "outcome" for case in cases):
        try:
            grid_task()
        except TaskError as error:
            print(error, file=sys.stderr)
            return 2
    torch.set_num_threads(1)
    torch.backends.cudnn.deterministic = True  # else two runs that should be the same are not
    begun = time.perf_counter()
    measured = run_cases(cases, SEEDS[:1] if arguments.quick else SEEDS, torch.device(arguments.device))
    duration_s = time.perf_counter() - begun
    rows = [item.row() for item in measured]
    print(render(rows))
    print(f"{len(rows)} rows in {duration_s:.0f} s, torch {torch.__version__}, {arguments.device}, 1 thread")
    if arguments.json:
        document = _strict({"torch": torch.__version__, "duration_s": duration_s, "rows": rows})
        text = json.dumps(document, indent=2, allow_nan=False)
        arguments.json.write_text(text + "\n", encoding="utf-8")
    if arguments.parquet:
        write_parquet(rows, arguments.parquet)
    if arguments.markdown:
        write_between_marks(render_markdown(rows, duration_s), arguments.markdown)
    return 0 if all(row["met"] for row in rows) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_targets_text(), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one seed instead of three")
    parser.add_argument("--ids", nargs="+", choices=list(CASES), default=list(CASES), metavar="ID")
    parser.add_argument("--device", type=device, default="cpu", help="cpu, or cuda[:i]; default cpu")
    parser.add_argument("--json", type=file_to_write, help="write every row to this file")
    parser.add_argument("--parquet", type=file_to_write, help="write every row to this file, typed")
    parser.add_argument("--markdown", type=file_to_write, help="write the tables to this file")
    return parser


def _targets_text() -> str:
    lines = ["targets, each at every seed:"]
    for case in CASES.values():
        lines.append(f"    {case.id:<10} {', '.join(map(str, case.targets))}")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
