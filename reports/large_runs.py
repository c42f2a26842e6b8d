"""The leaderboard of a run of any size: of a large one without ever holding its rows.

The rows are read twice, a piece at a time. The first pass keeps a few numbers of each trial, what
`reports.ranking.judge_trials` says of it; these are put in the order of config and seed, summed, and judged
as those of a small run are, by the same functions in the same order, so that a config has the same place and
the same numbers to the last bit, whatever the order of the fragments and the number of threads. The second
pass reads every column of the best configs alone.

What a fragment may be and what is refused is decided in `fragments`, `rows` and `aggregate`, how configs are
judged in `ranking`. pyarrow reads the files, as DuckDB does not verify the checksums of their pages.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from reports.aggregate import (
    NEEDED_COLUMNS,
    Floats,
    Ints,
    Outcomes,
    check_columns,
    check_one_task,
    check_rows,
    count_missing,
    group_trials,
    spread_columns,
)
from reports.fragments import UNREADABLE, Footer, RunReadError, merge_schemas, read_footers, unreadable
from reports.metrics import ROBUSTNESS, SHORTFALL
from reports.ranking import (
    WHOLE_RUN_KEY,
    Decision,
    Judged,
    RankingOptions,
    check_metrics,
    decide,
    judge_configs,
    judge_trials,
    make_leaderboard,
    rank,
    reasons,
    spread_scores,
    trial_value_types,
)
from reports.rows import find_rows, read_rows
from reports.schema import TRIAL_STATUSES, config_columns
from reports.trial_keys import (
    HexIds,
    Ids,
    TextIds,
    UnusualIdsError,
    fingerprint,
)

LARGE_ROWS = 100_000
LEADERBOARD_CONFIGS = 10_000
# Rows that are looked at together, and files that are read together by one thread until they have as many.
PIECE_ROWS = 65_536
MOST_THREADS = 4
# Of a large file, what a thread holds at a time: rows and columns that fit into the cache of a processor (all
# columns at once take twice the time), and bytes of each column as they lie in the file.
BATCH_ROWS = 32_768
BATCH_COLUMNS = 8
READ_BYTES = 1 << 17
# Identity columns that a ranking of the best configs may ask for, where the rows have them.
KEPT_COLUMNS = ("task", "scenario", "settings_id", "error")

Result = TypeVar("Result")


def rank_run(
    run: Path,
    options: RankingOptions | None = None,
    robustness: pa.Table | None = None,
    *,
    large_rows: int | None = None,
    most: int = LEADERBOARD_CONFIGS,
) -> pa.Table:
    """The leaderboard of the run folder, as `reports.ranking.rank` makes it of the run's rows.

    For a run of more than `large_rows` rows (None: LARGE_ROWS) it ends after the `most` best configs,
    ruled-out ones only where fewer are feasible; each has the rank, the front and the numbers that it would
    have in the whole. What the run holds beside them is counted (`reports.ranking.run_totals`).

    Raises RunReadError as `reports.rows.read_rows`, and ValueError as `rank`. Damage in a column that a large
    run is not ranked by is not seen.
    """
    options = options or RankingOptions()
    footers = read_footers(find_rows(run), kind="rows")
    if sum(footer.rows for footer in footers) <= (LARGE_ROWS if large_rows is None else large_rows):
        return rank(read_rows(run), options, robustness)
    schema = merge_schemas(footers)
    check_columns(schema)
    check_metrics(schema, options, robustness)
    pieces = _pieces(footers)
    survey = _survey(pieces, schema, options, run)
    judged = _judge(survey, options, robustness)
    decision = decide(judged, options, most)
    held = np.sort(decision.order)
    rows = _read_configs(survey, held, pieces, schema)
    trials = group_trials(rows, target_coverage=options.target_coverage, seeds=survey.seeds)
    leaderboard = make_leaderboard(
        trials,
        judged.take(held),
        Decision(decision.feasible[held], decision.front[held], np.searchsorted(held, decision.order)),
        options,
        robustness,
    )
    if len(held) == len(judged.missing):
        return leaderboard
    totals = _totals(survey, judged, decision, options)
    metadata = {**leaderboard.schema.metadata, WHOLE_RUN_KEY: json.dumps(totals).encode()}
    return leaderboard.replace_schema_metadata(metadata)


@dataclass(frozen=True, slots=True)
class _Part:
    """Row groups of one fragment, the first of whose rows is row `start` of the run."""

    footer: Footer
    groups: tuple[int, ...]
    start: int

    @property
    def stop(self) -> int:
        return self.start + sum(self.footer.groups[group] for group in self.groups)


_Piece = list[_Part]  # what one thread reads at a time; its rows follow one another


@dataclass(slots=True)
class _Survey:
    """What is known of the run after the first pass: arrays per trial as the files have them, and an order.

    order   the trials ordered by config_id, seed and trial_id
    starts  (configs,) where in that order the trials of each config begin; counts, how many they are
    """

    values: dict[str, npt.NDArray[Any]]
    order: Ints
    starts: Ints
    counts: Ints
    missing: Ints
    seeds: tuple[int, ...]
    statuses: Counter[str]
    ids: Ids

    def take(self, name: str) -> npt.NDArray[Any]:
        """The values of that name, config by config; they are given up, and cannot be asked for again."""
        return self.values.pop(name)[self.order]

    def positions(self, configs: Ints) -> Ints:
        """Which rows of the run, by number, are of these configs."""
        spans = [self.order[self.starts[c] : self.starts[c] + self.counts[c]] for c in configs]
        return np.sort(np.concatenate(spans))


def _pieces(footers: Sequence[Footer]) -> list[_Piece]:
    """All row groups of all fragments in order, small fragments side by side."""
    pieces: list[_Piece] = []
    start, open_rows = 0, PIECE_ROWS
    for footer in footers:
        for groups in _bundles(footer.groups):
            part = _Part(footer, groups, start)
            start, rows = part.stop, part.stop - part.start
            if open_rows + rows > PIECE_ROWS:
                pieces.append([])
                open_rows = 0
            pieces[-1].append(part)
            open_rows += rows
    return pieces


def _bundles(rows: Sequence[int]) -> list[tuple[int, ...]]:
    """Which row groups are read together: as many as make a piece; a file is not opened for each."""
    bundles: list[list[int]] = []
    held = PIECE_ROWS
    for group, number in enumerate(rows):
        if held + number > PIECE_ROWS:
            bundles.append([])
            held = 0
        bundles[-1].append(group)
        held += number
    return [tuple(bundle) for bundle in bundles]


def _column_groups(piece: _Piece, columns: Sequence[str]) -> list[Sequence[str]]:
    """The columns that are read together: few of a large file, all of small ones."""
    if all(_is_small(part.footer) for part in piece):  # to open a file anew costs more than it saves
        return [columns]
    return [columns[start : start + BATCH_COLUMNS] for start in range(0, len(columns), BATCH_COLUMNS)]


def _is_small(footer: Footer) -> bool:
    return footer.rows <= PIECE_ROWS


def _tables(
    parts: Sequence[_Part], schema: pa.Schema, columns: Sequence[str]
) -> Iterator[tuple[slice, pa.Table]]:
    """The rows of the parts with these columns, some ten thousand at a time, and their numbers in the run.

    Their types are those of the schema; text, ids apart, may be encoded by a dictionary.
    """
    wanted = pa.schema([schema.field(name) for name in columns])
    waiting: list[pa.Table] = []
    at = 0
    for part in parts:
        if waiting and part.start != at + sum(map(len, waiting)):  # parts between them are left out
            yield slice(at, at + sum(map(len, waiting))), pa.concat_tables(waiting)
            waiting = []
        at = at if waiting else part.start
        for batch in _batches(part, columns):
            waiting.append(_typed(batch, wanted))
            rows = sum(map(len, waiting))
            if rows >= BATCH_ROWS:
                yield slice(at, at + rows), pa.concat_tables(waiting)
                at, waiting = at + rows, []
    if waiting:
        yield slice(at, at + sum(map(len, waiting))), pa.concat_tables(waiting)


def _batches(part: _Part, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    path, known = part.footer.path, set(part.footer.schema.names)
    present = [name for name in columns if name in known]
    # One read for a small file, else as much as is looked at: a large one has columns of many megabytes.
    small = _is_small(part.footer)
    texts = {one.name for one in part.footer.schema if one.type == pa.string()} - {"config_id", "trial_id"}
    rows = 0
    try:
        with pq.ParquetFile(
            pa.BufferReader(path.read_bytes()) if small else path,
            page_checksum_verification=True,
            buffer_size=0 if small else READ_BYTES,
            # Few texts, met again and again, cost less as numbers; ids are all different.
            read_dictionary=[name for name in present if name in texts],
        ) as file:
            if file.metadata.num_rows != part.footer.rows or file.num_row_groups != len(part.footer.groups):
                raise RunReadError(f"{path} changed while it was read: rank the run again when it has ended")
            groups = list(part.groups)
            for batch in file.iter_batches(BATCH_ROWS, row_groups=groups, columns=present, use_threads=False):
                rows += len(batch)
                yield batch
    except UNREADABLE as error:
        raise unreadable(path, error) from error
    if rows != part.stop - part.start:
        raise RunReadError(f"{path} says that it holds {part.stop - part.start} rows, and holds {rows}")


def _typed(batch: pa.RecordBatch, wanted: pa.Schema) -> pa.Table:
    known = set(batch.schema.names)
    columns = []
    for one in wanted:
        column = batch.column(one.name) if one.name in known else pa.nulls(len(batch), one.type)
        as_it_is = column.type == one.type or pa.types.is_dictionary(column.type)
        columns.append(column if as_it_is else column.cast(one.type))
    return pa.Table.from_arrays(columns, names=wanted.names)


def _in_threads(work: Callable[[_Piece], Result], pieces: Sequence[_Piece]) -> list[Result]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = min(MOST_THREADS, cores, len(pieces))
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(work, pieces))


def _survey(pieces: Sequence[_Piece], schema: pa.Schema, options: RankingOptions, run: Path) -> _Survey:
    """Reads the columns that decide, of every row, and checks what must hold in all of them."""
    try:
        return _survey_with(HexIds(), pieces, schema, options, run)
    except UnusualIdsError:
        return _survey_with(TextIds(), pieces, schema, options, run)


def _survey_with(
    ids: Ids, pieces: Sequence[_Piece], schema: pa.Schema, options: RankingOptions, run: Path
) -> _Survey:
    rows = pieces[-1][-1].stop
    values = {name: np.empty(rows, dtype=kind) for name, kind in trial_value_types(schema, options).items()}
    ids.open(rows)
    columns = _deciding_columns(schema, options)

    def read(piece: _Piece) -> tuple[dict[str | None, None], Counter[str]]:
        tasks: dict[str | None, None] = {}
        statuses: Counter[str] = Counter()
        for here, table in _tables(piece, schema, columns):
            check_rows(table)
            if "task" in columns:
                tasks.update(dict.fromkeys(pc.unique(table.column("task")).to_pylist()))
            counted = pc.value_counts(table.column("status"))
            statuses.update({entry["values"].as_py(): entry["counts"].as_py() for entry in counted})
            ids.put(here, table)
            for name, numbers in judge_trials(Outcomes(table, options.target_coverage), options).items():
                values[name][here] = numbers
        return tasks, statuses

    found = _in_threads(read, pieces)
    check_one_task(list(dict.fromkeys(task for tasks, _ in found for task in tasks)))
    statuses = sum((counted for _, counted in found), Counter[str]())
    grouped = ids.group(run)
    seeds = (
        sorted(set(np.unique(grouped.seeds).tolist()))
        if options.seeds is None
        else sorted(set(options.seeds))
    )
    return _Survey(
        values=values,
        order=grouped.order,
        starts=grouped.starts,
        counts=np.diff(np.append(grouped.starts, rows)),
        missing=count_missing(grouped.seeds, grouped.starts, seeds),
        seeds=tuple(seeds),
        statuses=statuses,
        ids=ids,
    )


def _deciding_columns(schema: pa.Schema, options: RankingOptions) -> list[str]:
    """The columns that the place of a config depends on."""
    metrics = {metric.name for metric in (*options.objectives, *options.ties)}
    wanted = {*NEEDED_COLUMNS, *metrics, "task", "charged_error", "trivial_error"}
    return [name for name in schema.names if name in wanted]


def _leaderboard_columns(schema: pa.Schema) -> list[str]:
    """The columns that the row of a config in the leaderboard is made of."""
    wanted = {*NEEDED_COLUMNS, *KEPT_COLUMNS, SHORTFALL, *spread_columns(schema), *config_columns(schema)}
    return [name for name in schema.names if name in wanted]


def _read_configs(survey: _Survey, held: Ints, pieces: Sequence[_Piece], schema: pa.Schema) -> pa.Table:
    """The rows of the held configs, with what a leaderboard is made of.

    Raises ValueError where a config_id of the run stands for two configs, as `reports.aggregate.group_trials`
    does. As the knobs of all rows cannot be held together, a number that they come to is, by which the rows
    of a config are compared; the rows of those that differ in it are then compared as they are.
    """
    knobs = config_columns(schema)
    fingerprints = np.zeros(len(survey.order), dtype=np.uint64)

    def look(here: slice, table: pa.Table) -> None:
        present = set(table.column_names)
        fingerprints[here] += fingerprint(table, [name for name in knobs if name in present])

    rows = _read_positions(pieces, schema, _leaderboard_columns(schema), survey.positions(held), knobs, look)
    ordered = fingerprints[survey.order]
    low = np.minimum.reduceat(ordered, survey.starts)
    differing = np.flatnonzero(np.maximum.reduceat(ordered, survey.starts) != low)
    columns = [name for name in schema.names if name in {*NEEDED_COLUMNS, *knobs}]
    for start in range(0, len(differing), LEADERBOARD_CONFIGS):
        those = survey.positions(differing[start : start + LEADERBOARD_CONFIGS])
        group_trials(_read_positions(pieces, schema, columns, those))
    return rows


def _read_positions(
    pieces: Sequence[_Piece],
    schema: pa.Schema,
    columns: Sequence[str],
    positions: Ints,
    all_of: Sequence[str] = (),
    look: Callable[[slice, pa.Table], None] | None = None,
) -> pa.Table:
    """The rows of the run with these numbers, which ascend.

    `look` is handed the columns `all_of`, of all rows, and perhaps others with them, some rows and columns at
    a time; nothing else is read that holds none of the rows.
    """
    wanted = pa.schema([(name, schema.field(name).type) for name in columns])
    ordered = [*all_of, *(name for name in columns if name not in all_of)]

    def span(rows: slice) -> Ints:
        return positions[np.searchsorted(positions, rows.start) : np.searchsorted(positions, rows.stop)]

    def read(piece: _Piece) -> pa.Table:
        has_some = len(span(slice(piece[0].start, piece[-1].stop))) > 0
        found: dict[str, pa.ChunkedArray] = {}
        for group in _column_groups(piece, ordered if has_some else all_of):
            types = pa.schema([schema.field(name) for name in group]).remove_metadata()
            taken = [types.empty_table()]
            parts = [part for part in piece if look or len(span(slice(part.start, part.stop)))]
            for here, table in _tables(parts, schema, group) if group else ():
                if look is not None:
                    look(here, table)
                rows = span(here) - here.start
                if len(rows):
                    taken.append(table.take(pa.array(rows)).cast(types))
            held = pa.concat_tables(taken)
            found |= dict(zip(held.column_names, held.columns, strict=True))
        return (
            pa.table([found[name] for name in columns], schema=wanted) if has_some else wanted.empty_table()
        )

    return pa.concat_tables(_in_threads(read, pieces))


def _judge(survey: _Survey, options: RankingOptions, robustness: pa.Table | None) -> Judged:
    scores: Floats = np.full(len(survey.starts), np.nan)
    if robustness is not None:
        places = survey.ids.places(robustness.column("config_id").to_pylist())
        scores = spread_scores(robustness.column(ROBUSTNESS), places, len(survey.starts))
    return judge_configs(survey.take, survey.starts, survey.counts, survey.missing, scores, options)


def _totals(survey: _Survey, judged: Judged, decision: Decision, options: RankingOptions) -> dict[str, Any]:
    ruled_out = []
    bit = judged.wrong.dtype.type
    met = [(f"trials {what}", judged.wrong >> bit(n) & bit(1)) for n, what in enumerate(reasons(options))]
    met.append(("trials missing", judged.missing > 0))
    met.append((f"more non-finite values than {options.nan_budget}", judged.nan_count > options.nan_budget))
    for why, mask in met:
        configs = np.flatnonzero(~decision.feasible & (mask != 0))
        if len(configs):
            ruled_out.append({"why": why, "configs": len(configs), "such_as": survey.ids.name(configs[0])})
    return {
        "configs": len(survey.starts),
        "feasible": int(np.count_nonzero(decision.feasible)),
        "n_trials": int(survey.counts.sum()),
        **{f"n_{status}": survey.statuses[status] for status in TRIAL_STATUSES},
        "n_missing": int(survey.missing.sum()),
        "ruled_out": ruled_out,
    }
