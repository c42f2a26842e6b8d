"""What became of mutants: counted by subject, module and operator, and as tables.

A share comes with the 95 % Wilson interval. Which mutants are tried, and against which target the shares are
held, is decided in `mutation`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

TARGET = 0.85
_Z = 1.959963984540054  # of 95 %


@dataclass(frozen=True, slots=True)
class Tried:
    """A mutant with what became of it, as plain values."""

    subject: str
    module: str
    function: str
    line: int
    operator: str
    before: str
    after: str
    outcome: str
    by: str
    tests: int
    seconds: float
    reason: str = ""

    @property
    def is_killed(self) -> bool:
        """Whether the tests noticed."""
        return self.outcome != "survived"


def wilson(hits: int, total: int) -> tuple[float, float]:
    """Return the 95 % Wilson interval of a share; (0, 1) of nothing.

    >>> [round(bound, 3) for bound in wilson(9, 10)]
    [0.596, 0.982]
    """
    if not total:
        return 0.0, 1.0
    share, z = hits / total, _Z
    middle = share + z * z / (2 * total)
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def count(name: str, mutants: int, tried: Sequence[Tried], *, has_target: bool) -> dict[str, Any]:
    """Return the row of one group: how many were tried of how many, what became of them, the interval.

    A target is missed where the share killed is below it; where less than all were tried, and not of all
    groups together, only where the whole interval is.
    """
    killed = sum(one.is_killed for one in tried)
    low, high = wilson(killed, len(tried))
    share = killed / len(tried) if tried else math.nan
    is_sample = len(tried) < mutants and name != "all"
    return {
        "name": name,
        "mutants": mutants,
        "tried": len(tried),
        "killed": killed,
        "timeouts": sum(one.outcome == "timeout" for one in tried),
        "survived": len(tried) - killed,
        "explained": sum(bool(one.reason) for one in tried),
        "share": share,
        "low": low,
        "high": high,
        "met": not has_target or (high if is_sample else share) >= TARGET,
    }


def rows_of(tried: Sequence[Tried], sizes: Mapping[str, int]) -> dict[str, list[dict[str, Any]]]:
    """Return the rows by subject (the last one of all), by module and by operator."""

    def group(field: str) -> dict[str, list[Tried]]:
        grouped: dict[str, list[Tried]] = {}
        for one in tried:
            grouped.setdefault(getattr(one, field), []).append(one)
        return grouped

    subjects = []
    for name, own in group("subject").items():
        mutants = sum(sizes[module] for module in {one.module for one in own})
        subjects.append(count(name, mutants, own, has_target=True))
    total = sum(sizes.values())
    subjects.append(count("all", total, tried, has_target=True))
    modules = [count(name, sizes[name], own, has_target=False) for name, own in group("module").items()]
    operators = [
        count(name, len(own), own, has_target=False) for name, own in sorted(group("operator").items())
    ]
    return {"subjects": subjects, "modules": modules, "operators": operators}


# --- as text -------------------------------------------------------------------------------------


def render(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """The tables for a terminal."""
    lines = []
    for title in ("modules", "subjects"):
        lines.append(
            f"{title:<30}{'mutants':>8}{'tried':>7}{'killed':>7}{'timeout':>8}{'survived':>9}"
            f"{'share':>8}  {'95 %':<16}"
        )
        for row in rows[title]:
            met = "" if title == "modules" else "met" if row["met"] else "MISSED"
            lines.append(
                f"{row['name']:<30}{row['mutants']:>8}{row['tried']:>7}{row['killed']:>7}"
                f"{row['timeouts']:>8}{row['survived']:>9}{row['share']:>8.3f}  {_interval(row):<16}{met}"
            )
    return "\n".join(lines)


def render_survivors(tried: Iterable[Tried]) -> str:
    """One line for each survivor that has no reason."""
    lines = [
        f"{one.module}:{one.line}: {one.operator}: {' -> '.join(shortened(one.before, one.after))}"
        for one in tried
        if not one.is_killed and not one.reason
    ]
    return "\n".join(sorted(lines))


def render_markdown(document: Mapping[str, Any]) -> str:
    """The tables for the documents: shares by subject, module and operator, then the survivors."""
    whole = document["share_tried"] == 1
    drawn = f"{document['share_tried']:.0%} of each module's mutants, drawn with seed {document['seed']}"
    told = "all mutants" if whole else drawn
    made_with = f"mutmut {document['mutmut']}, torch {document['torch']}, Python {document['python']}"
    blocks = [f"Measured on {told}, with {made_with}."]
    for title, name in (("Subjects", "subjects"), ("Modules", "modules"), ("Operators", "operators")):
        head = ("", "mutants", "tried", "killed", "by the time limit", "survived", "share", "95 %")
        lines = [_line(head), _line(["---"] * len(head))]
        for row in document[name]:
            numbers = [row[key] for key in ("mutants", "tried", "killed", "timeouts", "survived")]
            share = f"{row['share']:.3f}" + ("" if row["met"] else " **missed**")
            lines.append(_line([f"`{row['name']}`", *map(str, numbers), share, _interval(row)]))
        blocks += [f"## {title}", "\n".join(lines)]
    blocks += ["## Survivors", _survivors_table(document["survivors"])]
    return "\n\n".join(blocks) + "\n"


def _survivors_table(survivors: Sequence[Mapping[str, Any]]) -> str:
    """One line for each reason, with its survivors."""
    by_reason: dict[str, list[Mapping[str, Any]]] = {}
    for one in survivors:
        by_reason.setdefault(one["reason"] or "no reason known: a test is wanting", []).append(one)
    blocks = []
    for reason, own in sorted(by_reason.items()):
        head = ("where", "change")
        lines = [f"### {reason}", "", _line(head), _line(["---"] * len(head))]
        for one in sorted(own, key=lambda one: (one["module"], one["line"])):
            before, after = (_as_code(text) for text in shortened(one["before"], one["after"]))
            lines.append(_line([f"{one['module']}, `{one['function'] or 'table'}`", f"{before} → {after}"]))
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def shortened(before: str, after: str, around: int = 24) -> tuple[str, str]:
    """Return two texts without most of what they begin and end with alike.

    >>> shortened("f(a, b)", "f(a, None)")
    ('f(a, b)', 'f(a, None)')
    """
    start = _alike(before, after)
    end = _alike(before[start:][::-1], after[start:][::-1])
    first, last = max(0, start - around), max(0, end - around)
    return tuple(  # type: ignore[return-value]
        ("…" if first else "") + text[first : len(text) - last] + ("…" if last else "")
        for text in (before, after)
    )


def _alike(one: str, other: str) -> int:
    """How many characters two texts have in common from the first on."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _as_code(text: str) -> str:
    return "`` " + text.replace("|", "\\|") + " ``" if text else "nothing"


def _interval(row: Mapping[str, Any]) -> str:
    return f"{row['low']:.3f} to {row['high']:.3f}"


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"
