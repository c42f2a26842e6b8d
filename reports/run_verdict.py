"""The first lines of a run's page: how many configs are worth something, which is best, how sure that is.

As numbers, as one sentence, and as what to be careful about. The figures below are made in `run_view`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from reports.hypervolume import run_hypervolume
from reports.ranking import RANKED_BY_KEY, WHOLE_RUN_KEY
from reports.robustness_view import number, text
from reports.schema import TRIAL_STATUSES

FEW_SEEDS = 3
MOST_NAME = 60


def verdict(board: pa.Table | None, rows: pa.Table | None = None) -> dict[str, Any] | None:
    """The answer: how many configs there are, how many are worth something, which is best, what was ruled
    out and why, in numbers and as one `sentence`; and what to be careful about, as `warnings`."""
    if board is None:
        return None
    totals = page_totals(board)
    feasible = board.filter(board.column("feasible"))
    beats = column_of(feasible, "beats_abstaining")
    beating = (
        None
        if beats is None or not any(known is not None for known in beats)
        else sum(known is True for known in beats)
    )
    said = ranked_by(board)
    result: dict[str, Any] = {
        **totals,
        "listed": len(board),
        "ended": {name: totals[f"n_{name}"] for name in TRIAL_STATUSES if totals[f"n_{name}"]},
        "beating": beating,
        "best": None,
        "ruled_out": _reasons(board, said),
        "objectives": [str(name) for name in sequence(said.get("by"))],
    }
    if len(feasible):
        best = feasible.slice(0, 1).to_pylist()[0]
        result["best"] = {
            "config_id": name_of(best["config_id"]),
            "beats_abstaining": best.get("beats_abstaining"),
            "rank_low": best.get("rank_low"),
            "rank_high": best.get("rank_high"),
            "p_best": best.get("p_best"),
            "n_trials": best["n_trials"],
            "n_completed": best.get("n_completed"),
            "coverage": number(best.get("coverage_mean")),
            "accepted_error": number(best.get("accepted_error_mean")),
            "charged_error": number(best.get("charged_error_mean")),
            "trivial_error": number(best.get("trivial_error_mean")),
        }
    result["hypervolume"] = _hypervolume(board)
    result["sentence"] = _sentence(result)
    result["warnings"] = _warnings(result, board, rows)
    return result


def _hypervolume(board: pa.Table) -> float | None:
    """The share of the objectives' space that the run's configs dominate; None where nothing can be said."""
    try:
        return run_hypervolume(board).share
    except ValueError:  # no config has finite objectives, or a leaderboard of another age
        return None


def ranked_by(board: pa.Table) -> dict[str, Any]:
    """How the leaderboard was ranked, as it says itself; empty where it does not, or not legibly."""
    return _metadata(board, RANKED_BY_KEY)


def name_of(value: Any) -> str:
    """A name as one line of at most 60 characters."""
    line = text(value)
    return line if len(line) <= MOST_NAME else line[: MOST_NAME - 1] + "…"


def page_totals(board: pa.Table) -> dict[str, int]:
    """How many configs and trials the run has: as the leaderboard counts, or says where it lists not all."""
    whole = _metadata(board, WHOLE_RUN_KEY)
    counted = {
        "configs": len(board),
        "feasible": pc.sum(board.column("feasible")).as_py() or 0,
        **{
            name: (pc.sum(board.column(name)).as_py() or 0) if name in board.column_names else 0
            for name in ("n_trials", *(f"n_{status}" for status in TRIAL_STATUSES), "n_missing")
        },
    }
    said = {name: whole[name] for name in counted if isinstance(whole.get(name), int)}
    return counted | said


def _metadata(board: pa.Table, key: bytes) -> dict[str, Any]:
    try:
        said = json.loads((board.schema.metadata or {}).get(key, b"{}"))
    except (ValueError, RecursionError):
        return {}
    return said if isinstance(said, dict) else {}


def _reasons(board: pa.Table, said: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Why configs were ruled out, and how many; a config may have several reasons."""
    ruled_out = board.filter(pc.invert(board.column("feasible")))
    if not len(ruled_out):
        return []
    budget = said.get("nan_budget", 0)
    met = np.nan_to_num(floats_of(ruled_out, "nan_count")) > (budget if isinstance(budget, int) else 0)
    found = {"non-finite values": met}
    for column, what in (("n_failed", "failed"), ("n_diverged", "diverged"), ("n_missing", "missing")):
        if column in ruled_out.column_names:
            found[f"trials {what}"] = np.nan_to_num(floats_of(ruled_out, column)) > 0
    found["no finite value to compare"] = ~np.logical_or.reduce([*found.values()])
    counted = [{"reason": reason, "configs": int(mask.sum())} for reason, mask in found.items()]
    return [entry for entry in counted if entry["configs"]]


def _sentence(said: Mapping[str, Any]) -> str:
    ruled_out = said["configs"] - said["feasible"]
    first = f"Of {many(said['configs'], 'config')}, {said['feasible']} can be ranked"
    if said["beating"] is not None:
        least = "at least " if said["listed"] < said["configs"] else ""
        first += f" and {least}{said['beating'] or 'none'} beat{'s' if said['beating'] == 1 else ''} "
        first += "abstaining everywhere"
    parts = [first + "."]
    best = said["best"]
    if best is None:
        parts.append("There is no best one.")
    else:
        where = ""
        if best["rank_low"] is not None and best["rank_high"] is not None:
            low, high = best["rank_low"], best["rank_high"]
            lies = f"nearly always {low}" if low == high else f"between {low} and {high}"
            where = f", its rank {lies} when seeds are drawn anew"
            if best["p_best"] is not None:
                where += f" and first in {100 * best['p_best']:.0f} % of the draws"
        parts.append(f"Ranked first is {best['config_id']}{where}.")
    if ruled_out:
        several = len(said["ruled_out"]) > 1
        why = ", ".join(
            entry["reason"] + (f" ({entry['configs']})" if several else "") for entry in said["ruled_out"]
        )
        is_or_are = "is" if ruled_out == 1 else "are"
        parts.append(f"{many(ruled_out, 'config')} {is_or_are} ruled out{': ' + why if why else ''}.")
    else:
        parts.append("None was ruled out.")
    return " ".join(parts)


def _warnings(said: Mapping[str, Any], board: pa.Table, rows: pa.Table | None) -> list[str]:
    found = []
    best = said["best"]
    if best is None:
        found.append("No config can be ranked: nothing here is fit for use.")
    else:
        if best["beats_abstaining"] is False:
            found.append("The config ranked first is no better than abstaining everywhere: do not use it.")
        if best["n_trials"] < FEW_SEEDS:
            found.append(
                f"{many(best['n_trials'], 'seed')} per config: who is first may be luck. "
                "Confirm the best ones on fresh seeds."
            )
        if best["n_completed"] == 0:
            found.append(
                "No trial of the config ranked first ran to its end: it is judged by where it stopped."
            )
        if best["rank_low"] is None:
            found.append(
                "The leaderboard does not say how sure its ranks are: rank anew with scm-harness rank."
            )
        elif best["rank_high"] is not None and best["rank_high"] > 1:
            found.append(
                f"The config ranked first cannot be told apart from those up to rank {best['rank_high']}."
            )
    if said["n_missing"]:
        found.append(f"{many(said['n_missing'], 'trial')} missing: the run is not whole.")
    if rows is not None and len(rows) != said["n_trials"]:
        found.append(
            f"The leaderboard counts {many(said['n_trials'], 'trial')}, the rows are {len(rows)}: "
            "rank anew with scm-harness rank."
        )
    return found


def column_of(table: pa.Table, name: str) -> list[Any] | None:
    """The values of a column, None where the table has none of that name."""
    return table.column(name).to_pylist() if name in table.column_names else None


def sequence(value: Any) -> Sequence[Any]:
    """The value where it is a list; nothing where it is anything else."""
    return value if isinstance(value, list) else ()


def many(count: int, what: str) -> str:
    """A number of things, in words.

    >>> many(1, "seed"), many(2, "seed")
    ('1 seed', '2 seeds')
    """
    return f"{count} {what}{'' if count == 1 else 's'}"


def floats_of(table: pa.Table, name: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    """A column as numbers, null as NaN."""
    column = pc.fill_null(pc.cast(table.column(name), pa.float64()), float("nan"))
    return np.asarray(column.to_numpy(), dtype=np.float64)
