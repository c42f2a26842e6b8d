"""Point the laws that our library keeps at zeroproofml 0.6.1, and print the smallest case that breaks each.

The same properties, strategies and search as in the tests, through an adapter (`peer_subject`). Its known
counterexamples are the targets: each must be found. A law that breaks there and is not among them is said.

    python benchmarks/peer_counterexamples.py [--quick] [--json PATH] [--markdown PATH]

--quick tries 200 cases a law, the default 2,000. --markdown writes the table between the lines
<!-- measured --> and <!-- end --> of a file that holds them, else a whole file.

Exit code 0 when every known counterexample is found, 1 when one is missed, 2 where zeroproofml is not there.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata

import torch
from benchmark_arguments import file_to_write
from marked_page import write_between_marks

from harness.robustness.cases import show_case
from harness.robustness.law import Property
from harness.robustness.properties import PROPERTIES
from harness.robustness.search import BROKEN, NOT_APPLICABLE, try_property

EXAMPLES, QUICK_EXAMPLES = 2000, 200
# By group, what is known to fail there; for each, laws of which one at least must break.
KNOWN: dict[int, tuple[str, tuple[str, ...]]] = {
    1: ("losses overflow at 2e19", ("implicit_loss_is_finite", "fit_loss_is_finite")),
    2: ("their gradients are NaN there", ("implicit_loss_has_finite_gradients",)),
    3: ("the implicit loss is not bounded on opposite axes", ("implicit_loss_is_bounded",)),
    4: ("it changes with the scale of a tuple near gamma", ("fit_loss_ignores_the_scale",)),
    8: ("a tiny loss stands for a wrong answer", ("low_fit_means_close",)),
    9: ("collapse to the origin lowers it", ("origin_is_not_rewarded",)),
    14: ("what is accepted depends on the scale of a tuple", ("answers_ignore_the_scale",)),
    17: ("coverage of an empty batch is NaN", ("coverage_is_in_range_for_any_batch",)),
    20: ("a bad row in one group spoils the other's loss", ("separation_keeps_groups_apart",)),
    21: ("the sign loss has NaN gradients at the origin", ("sign_loss_has_finite_gradients",)),
}


@dataclass(frozen=True, slots=True)
class Found:
    """What trying one law on the peer came to."""

    law: Property
    status: str
    message: str
    case: str
    seconds: float


def try_laws(examples: int) -> list[Found]:
    """Try every law that has what it needs; those that do not apply are there as well."""
    from peer_subject import peer_subject

    subject = peer_subject()
    found = []
    for law in PROPERTIES.values():
        begun = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of overflow, which is what is looked for
            verdict = try_property(law, subject, examples=examples)
        case = "" if verdict.case is None else show_case(verdict.case)
        found.append(Found(law, verdict.status, verdict.message, case, time.perf_counter() - begun))
    return found


def missed(found: Sequence[Found]) -> list[str]:
    """The known counterexamples that no law found."""
    broken = {one.law.name for one in found if one.status == BROKEN}
    return [f"group {group}: {what}" for group, (what, laws) in KNOWN.items() if not broken & set(laws)]


def unknown(found: Sequence[Found]) -> list[str]:
    """The laws that break and belong to no group of known counterexamples."""
    return [one.law.name for one in found if one.status == BROKEN and one.law.group not in KNOWN]


def table_of(found: Sequence[Found]) -> str:
    """The laws that apply, as Markdown."""
    lines = ["| group | law | zeroproofml | what happens | smallest case |", "|---|---|---|---|---|"]
    for one in found:
        if one.status != NOT_APPLICABLE:
            cells = [str(one.law.group), f"`{one.law.name}`", one.status, one.message[:90], one.case[:90]]
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Try the laws, print the table, return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_EXAMPLES} cases a law")
    parser.add_argument("--json", type=file_to_write, metavar="PATH", help="write all verdicts as JSON")
    parser.add_argument("--markdown", type=file_to_write, metavar="PATH", help="write the table")
    options = parser.parse_args(argv)
    try:
        version = metadata.version("zeroproofml")
    except metadata.PackageNotFoundError:
        print("zeroproofml is not installed: pip install 'scm-harness[peer]'", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    examples = QUICK_EXAMPLES if options.quick else EXAMPLES
    found = try_laws(examples)
    table = table_of(found)
    print(table)
    counts = {
        status: sum(one.status == status for one in found) for status in ("holds", "broken", NOT_APPLICABLE)
    }
    told = (
        f"zeroproofml {version}, {examples} cases a law: {counts['holds']} laws hold, {counts['broken']} are "
        f"broken, {counts[NOT_APPLICABLE]} do not apply"
    )
    print(f"\n{told}; {sum(one.seconds for one in found):.0f} s")
    for name in unknown(found):
        print(f"broken and in no group of the known ones: {name}")
    gaps = missed(found)
    for gap in gaps:
        print(f"known counterexample not found: {gap}")
    if options.json:
        rows = [
            {
                "law": one.law.name,
                "group": one.law.group,
                "status": one.status,
                "message": one.message,
                "case": one.case,
            }
            for one in found
        ]
        options.json.write_text(
            json.dumps({"version": version, "laws": rows, "missed": gaps}, indent=2) + "\n"
        )
    if options.markdown:
        write_between_marks(f"{told}.\n\n{table}\n", options.markdown)
    return 1 if gaps else 0


if __name__ == "__main__":
    sys.exit(main())
