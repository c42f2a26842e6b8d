"""Laws of what decides between configs: order is irrelevant, harm never helps, the worse change nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from harness.robustness.law import BrokenLawError, Case, Property, Subject, library_law

# --- 30: what decides -----------------------------------------------------------------------------------

TRIALS = 3
# What a trial has met stays met: no harm takes a non-finite value back.
HARMS: Mapping[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "covers less": lambda row: {"coverage": row["coverage"] / 2},
    "errs more": lambda row: {"accepted_error": 2 * row["accepted_error"] + 0.25},
    "is slower": lambda row: {"step_time_ms": 2 * row["step_time_ms"] + 0.25},
    "meets a NaN": lambda row: {"nan_count": row["nan_count"] + 1},
    "has no error to tell": lambda row: {"accepted_error": math.nan},
    "overflows": lambda row: {"accepted_error": math.inf},
    "diverges": lambda row: {"status": "diverged", "nan_count": row["nan_count"] + 11},
    "abstains": lambda row: {"coverage": 0.0, "accepted_error": math.nan},
    "fails uncounted": lambda row: {
        "status": "failed",
        "nan_count": row["nan_count"] or None,
        "step_time_ms": math.nan,
    },
    "fails": lambda row: {"status": "failed", "coverage": math.nan, "accepted_error": math.nan},
}

# Values in quarters of small size, so that a mean is the same in whatever order it is added up.
_outcomes = st.fixed_dictionaries(
    {
        "status": st.sampled_from(["completed", "completed", "completed", "stopped", "diverged", "failed"]),
        "nan_count": st.sampled_from([0, 0, 0, 1, 5]),
        "coverage": st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]),
        "target_coverage": st.sampled_from([0.5, 1.0]),
        "accepted_error": st.sampled_from([0.0, 0.25, 0.5, 1.0, 3.0, 1024.0, math.nan]),
        "step_time_ms": st.sampled_from([0.25, 1.0, 1.0, 4.0]),
    }
)


def _runs(subject: Subject) -> SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(
        {
            "run": st.lists(st.lists(_outcomes, min_size=TRIALS, max_size=TRIALS), min_size=1, max_size=6),
            "options": st.fixed_dictionaries(
                {
                    "nan_budget": st.sampled_from([0, 3]),
                    "failed_budget": st.integers(0, 2),
                    "step_time_tolerance": st.sampled_from([0.0, 0.05]),
                }
            ),
        }
    )


def rows_of(run: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """The rows of a run: of config number c and trial number s, with seed s."""
    return [
        {"config_id": f"c{config}", "trial_id": f"c{config}-s{seed}", "seed": seed, **outcome}
        for config, outcomes in enumerate(run)
        for seed, outcome in enumerate(outcomes)
    ]


def _ranked(subject: Subject, rows: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> list[Any]:
    return [
        (entry["config_id"], entry["rank"], entry["feasible"], entry["front"])
        for entry in subject.rank(rows, options)
    ]


@st.composite
def _reordered(draw: st.DrawFn, subject: Subject) -> dict[str, Any]:
    case = draw(_runs(subject))
    count = len(case["run"]) * TRIALS
    return {
        **case,
        "order": list(draw(st.permutations(range(count)))),
        "seeds": list(draw(st.permutations(range(TRIALS)))),
    }


def _order_is_irrelevant(subject: Subject, case: Case) -> None:
    rows = rows_of(case["run"])
    right = _ranked(subject, rows, case["options"])
    if _ranked(subject, [rows[place] for place in case["order"]], case["options"]) != right:
        raise BrokenLawError("the order of the rows must not matter, it does")
    other_seeds = rows_of([[outcomes[place] for place in case["seeds"]] for outcomes in case["run"]])
    if _ranked(subject, other_seeds, case["options"]) != right:
        raise BrokenLawError("which seed came to what must not matter, it does")


@st.composite
def _harmed(draw: st.DrawFn, subject: Subject) -> dict[str, Any]:
    case = draw(_runs(subject))
    return {
        **case,
        "config": draw(st.integers(0, len(case["run"]) - 1)),
        "trials": draw(st.sampled_from([*([trial] for trial in range(TRIALS)), list(range(TRIALS))])),
        "harm": draw(st.sampled_from(sorted(HARMS))),
    }


def _harm_never_helps(subject: Subject, case: Case) -> None:
    name = f"c{case['config']}"
    rows = rows_of(case["run"])
    changed = [
        {**row, **HARMS[case["harm"]](row)}
        if row["config_id"] == name and row["seed"] in case["trials"]
        else row
        for row in rows
    ]
    before, after = (
        {entry[0]: entry for entry in _ranked(subject, some, case["options"])}[name]
        for some in (rows, changed)
    )
    if after[1] < before[1] or (after[2] and not before[2]):
        raise BrokenLawError(
            f"{name} must not gain by harm, got {after[1]} instead of {before[1]} where it {case['harm']}"
        )


def _worse_changes_nothing(subject: Subject, case: Case) -> None:
    """Sound, and in every objective worse than any other: it is behind all, and the others stay as they were.

    With no budget for trials that went wrong: a config that has some, and is within it, is as bad as can be.
    """
    run, options = case["run"], {**case["options"], "failed_budget": 0}
    rows = rows_of(run)
    worse = {
        "status": "completed",
        "nan_count": 0,
        "coverage": 0.0,
        "target_coverage": 1.0,
        "accepted_error": 4096.0,
        "step_time_ms": 64.0,
    }
    right = [(entry[0], entry[2], entry[3]) for entry in _ranked(subject, rows, options)]
    found = [
        (entry[0], entry[2], entry[3])
        for entry in _ranked(subject, [*rows, *rows_of([*run, [worse] * TRIALS])[len(rows) :]], options)
        if entry[0] != f"c{len(run)}"
    ]
    if found != right:
        raise BrokenLawError(f"a worse config must leave the others as they were, {right} became {found}")


RANKING_LAWS: tuple[Property, ...] = (
    library_law(
        "order_is_irrelevant",
        30,
        "Neither the order of the rows nor which seed came to what changes the ranking.",
        ("rank",),
        lambda subject: _reordered(subject),
        _order_is_irrelevant,
    ),
    library_law(
        "harm_never_helps",
        30,
        "Harm added to a config never improves its rank, nor makes it feasible.",
        ("rank",),
        lambda subject: _harmed(subject),
        _harm_never_helps,
    ),
    library_law(
        "worse_config_changes_nothing",
        30,
        "Adding a config that is worse than all others leaves their order and their fronts.",
        ("rank",),
        _runs,
        _worse_changes_nothing,
    ),
)
