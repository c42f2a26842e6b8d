"""`scm-harness rank RUN RUN ...`: rank the settings that the scenarios of several runs have all tried."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.cli.arguments import TOP
from harness.cli.rank import PLAN_FILE, make_options, plain_rows
from harness.errors import EXIT_BAD_INPUT, EXIT_NOTHING_COMPLETED, EXIT_OK, EXIT_RUN_FOLDER, UserError

if TYPE_CHECKING:
    import pyarrow as pa

    from reports.ranking import RankingOptions


def run_several(
    folders: Sequence[Path],
    given: Mapping[str, Any],
    *,
    top: int | None = TOP,
    as_json: bool = False,
    reference: str | None = None,
    out: Path | None = None,
) -> int:
    """Rank the settings of these runs over their scenarios, print them, write them to `out` if given.

    `given` is what the command line says of `RankingOptions`. The runs' own leaderboards stay as they are.
    Raises UserError with code 4 where a folder is no readable run or `out` cannot be written, and with code 2
    where the runs cannot be ranked together. Code 5 is returned where no trial was measured.
    """
    from reports.fragments import RunReadError, write_table_atomically
    from reports.rows import read_rows
    from reports.scenarios import rank_scenarios
    from reports.scenarios_text import render_scenarios

    same = {path.resolve() for path in folders}
    if len(same) < len(folders):
        raise UserError("each run must be named once, got one of them twice", EXIT_BAD_INPUT)
    try:
        tables = [_with_scenario(folder, read_rows(folder)) for folder in folders]
    except RunReadError as error:
        raise UserError(str(error), EXIT_RUN_FOLDER) from None
    options, seeds = _judging(folders, tables, given)
    known = {entry for table in tables for entry in _settings(table)}
    if reference is not None and reference not in known:
        raise UserError(f"--reference must be a settings_id of the runs, got {reference}", EXIT_BAD_INPUT)
    try:
        leaderboard = rank_scenarios(
            tables, options, seeds=seeds, reference=reference or _settings_of_plan(folders[0])
        )
    except ValueError as error:
        raise UserError(str(error), EXIT_BAD_INPUT) from None
    sources: dict[str, str] = {}
    for folder, table in zip(folders, tables, strict=True):
        for name in table.column("scenario").unique().to_pylist():
            sources[name] = f"{sources[name]} and {folder}" if name in sources else str(folder)
    print(json.dumps(plain_rows(leaderboard)) if as_json else render_scenarios(leaderboard, top, sources))
    if out is not None:
        try:
            write_table_atomically(leaderboard, out)
        except OSError as error:
            raise UserError(f"cannot write the leaderboard: {error}", EXIT_RUN_FOLDER) from None
    statuses = {status for table in tables for status in table.column("status").unique().to_pylist()}
    return EXIT_OK if statuses & {"completed", "stopped"} else EXIT_NOTHING_COMPLETED


def _with_scenario(folder: Path, rows: pa.Table) -> pa.Table:
    """The rows with their scenario; those of an earlier version have that of the run's plan."""
    import pyarrow as pa
    import pyarrow.compute as pc

    known = rows.column("scenario") if "scenario" in rows.column_names else pa.nulls(len(rows), pa.string())
    if known.null_count and (folder / PLAN_FILE).is_file():
        from harness.plan import load_trained
        from search_spaces.identity import scenario_name

        task = load_trained(folder / PLAN_FILE).task
        known = pc.fill_null(known, scenario_name(task.name, task.params))
    if "scenario" in rows.column_names:
        rows = rows.drop_columns("scenario")
    return rows.append_column("scenario", known)


def _judging(
    folders: Sequence[Path], tables: Sequence[pa.Table], given: Mapping[str, Any]
) -> tuple[RankingOptions, dict[str, tuple[int, ...]]]:
    """How all runs are judged, and the seeds that each scenario should have.

    What was not given is taken from the plans, which must agree about it.
    """
    from dataclasses import replace

    told = {
        name: tuple(value) if name == "by" else value for name, value in given.items() if value is not None
    }
    try:
        each = [make_options(folder, told) for folder in folders]
    except ValueError as error:
        raise UserError(str(error), EXIT_BAD_INPUT) from None
    for name, option in (("nan_budget", "--nan-budget"), ("by", "--by")):
        values = {getattr(options, name) for options in each}
        if len(values) > 1:
            said = " and ".join(sorted(", ".join(v) if isinstance(v, tuple) else str(v) for v in values))
            raise UserError(
                f"the plans of the runs must agree how they are judged, got {name} {said}; give {option}",
                EXIT_BAD_INPUT,
            )
    seeds: dict[str, set[int]] = {}
    for table, options in zip(tables, each, strict=True):
        for name in table.column("scenario").unique().to_pylist():
            found = options.seeds or table.column("seed").unique().to_pylist()
            seeds.setdefault(name or str(table.column("task")[0]), set()).update(found)
    return replace(each[0], seeds=None), {name: tuple(sorted(found)) for name, found in seeds.items()}


def _settings(table: pa.Table) -> list[str]:
    return table.column("settings_id").unique().to_pylist() if "settings_id" in table.column_names else []


def _settings_of_plan(folder: Path) -> str | None:
    """The settings_id of the plan's own config, with which a search may begin; None where there is none."""
    if not (folder / PLAN_FILE).is_file():
        return None
    from harness.plan import load_trained
    from search_spaces.identity import config_id
    from trainables.configs import active_knobs

    try:
        return config_id(active_knobs(load_trained(folder / PLAN_FILE).config))
    except (ValueError, TypeError):  # of a version with other knobs
        return None
