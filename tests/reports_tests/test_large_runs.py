"""The leaderboard of a run that is read in pieces: the one that its rows would have in memory."""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reports import large_runs
from reports.evidence import RANK_COLUMNS
from reports.fragments import RunReadError, write_table_atomically
from reports.large_runs import rank_run
from reports.ranking import MOST_WEIGHED, WHOLE_RUN_KEY, RankingOptions, rank, run_totals
from reports.rows import read_rows
from reports.schema import row_schema
from reports.text import render_leaderboard

KNOBS = {
    "learning_rate": "float64",
    "hidden_width": "int64",
    "optimizer": "string",
    "restore_best": "bool",
    "momentum": "float64",
}
SCHEMA = row_schema(KNOBS, ["metric.hits"])
HEX = tuple(f"{number * 7919:012x}" for number in range(40))


def row(config: str, seed: int = 0, **changes: Any) -> dict[str, Any]:
    """A completed trial; `changes` may hold knobs as `config.<knob>`."""
    base = {
        "run_id": "r",
        "task": "toy",
        "config_id": config,
        "trial_id": f"{config}-s{seed}",
        "seed": seed,
        "status": "completed",
        "nan_count": 0,
        "coverage": 0.95,
        "target_coverage": 0.95,
        "accepted_error": 1.0,
        "charged_error": 1.0,
        "trivial_error": 2.0,
        "step_time_ms": 2.0,
        "config.learning_rate": 1e-3,
        "config.hidden_width": 8,
        "config.optimizer": "adam",
        "config.restore_best": False,
    }
    return base | changes


def write_run(
    folder: Path, *fragments: list[dict[str, Any]], schema: pa.Schema = SCHEMA, **options: Any
) -> Path:
    """A run of these fragments; `options` go to the writer of the Parquet files."""
    (folder / "rows").mkdir(parents=True)
    for number, rows in enumerate(fragments):
        table = pa.Table.from_pylist(rows, schema=schema)
        path = folder / "rows" / f"driver-{number:05d}.parquet"
        if options:
            pq.write_table(table, path, write_page_checksum=True, **options)
        else:
            write_table_atomically(table, path)
    return folder


def in_pieces(
    run: Path, options: RankingOptions | None = None, scores: pa.Table | None = None, **how: Any
) -> pa.Table:
    return rank_run(run, options, scores, large_rows=0, **how)


def check_same(
    run: Path, options: RankingOptions | None = None, scores: pa.Table | None = None, most: int = 10_000
) -> None:
    """Every cell of the best configs is that of the ranking in memory."""
    whole = rank(read_rows(run), options, scores)
    found = in_pieces(run, options, scores, most=most)
    assert found.schema.equals(whole.schema)
    if most < MOST_WEIGHED:  # how sure a rank is depends on the configs that are weighed beside it
        found, whole = found.drop_columns(RANK_COLUMNS), whole.drop_columns(RANK_COLUMNS)
    assert repr(found.to_pylist()) == repr(whole.slice(0, most).to_pylist())
    totals, expected = run_totals(found), run_totals(whole)
    assert totals | {"ruled_out": []} == expected
    assert bool(totals["ruled_out"]) == (len(found) < len(whole) and expected["feasible"] < len(whole))


@pytest.fixture
def little_pieces(monkeypatch):
    """Pieces of few rows and columns, as if the files were large."""
    monkeypatch.setattr(large_runs, "PIECE_ROWS", 8)
    monkeypatch.setattr(large_runs, "BATCH_ROWS", 3)
    monkeypatch.setattr(large_runs, "BATCH_COLUMNS", 2)


errors = st.sampled_from([0.0, 0.1, 0.5, 0.50001, 0.9, 1.0, 1e6, 1.7e308, math.nan, math.inf, None])
measured = st.fixed_dictionaries(
    {
        "status": st.sampled_from(["completed", "completed", "completed", "stopped", "diverged", "failed"]),
        "error": st.sampled_from(["", "no data"]),
        "nan_count": st.sampled_from([0, 0, 0, 1, 5, None]),
        "coverage": st.sampled_from([0.0, 0.5, 0.94, 0.95, 1.0, math.nan]),
        "target_coverage": st.sampled_from([0.5, 0.95]),
        "accepted_error": errors,
        "charged_error": errors,
        "trivial_error": st.sampled_from([0.5, 1.0, math.nan]),
        "step_time_ms": st.sampled_from([0.1, 1.0, 1.01, 2.0]),
        "metric.hits": st.sampled_from([1.0, 2.0, math.nan]),
    }
)
runs = st.lists(st.lists(measured, min_size=1, max_size=3), min_size=1, max_size=12)
options = st.builds(
    RankingOptions,
    nan_budget=st.sampled_from([0, 3]),
    failed_budget=st.integers(0, 2),
    by=st.sampled_from(
        [
            ("coverage_shortfall", "accepted_error", "step_time_ms"),
            ("charged_error",),
            ("coverage", "metric.hits:higher", "accepted_error", "step_time_ms"),
            ("accepted_error", "robustness"),
        ]
    ),
    target_coverage=st.sampled_from([None, 0.9]),
    seeds=st.sampled_from([None, (0, 1, 2), (1, 70_000)]),
)
ids = st.sampled_from([HEX, tuple(f"c{number}" for number in range(40)), (*HEX[:2], "x" * 12, *HEX[3:])])


def scores_of(configs: tuple[str, ...]) -> pa.Table:
    """A robustness for some configs, one of which is of no run; one has none after all."""
    names = [*configs[:3], "of another run", "0" * 12, configs[4]]
    values = [0.5, 0.9, 0.9, 0.1, 0.2, None]
    return pa.table({"config_id": names, "robustness": values, "low": values, "high": values})


@settings(deadline=None, max_examples=40)
@given(run=runs, options=options, ids=ids, most=st.integers(1, 13), data=st.data())
def test_the_leaderboard_is_that_of_the_rows_in_memory(run, options, ids, most, data):
    """To the last bit: whatever went wrong, whatever is asked, however many configs are held."""
    rows = [
        row(ids[config], seed, **said) for config, all_ in enumerate(run) for seed, said in enumerate(all_)
    ]
    rows = data.draw(st.permutations(rows))
    cut = data.draw(st.integers(1, len(rows)))
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(large_runs, "PIECE_ROWS", data.draw(st.sampled_from([4, 100])))
        patch.setattr(large_runs, "BATCH_ROWS", 3)
        patch.setattr(large_runs, "BATCH_COLUMNS", 5)
        fragments = [part for part in (rows[:cut], rows[cut:]) if part]
        check_same(write_run(Path(folder) / "run", *fragments), options, scores_of(ids), most)


def test_many_configs_have_the_places_and_numbers_that_they_have_in_memory(tmp_path):
    """A few thousand configs in files of several row groups, held in part."""
    draw = np.random.default_rng(0)
    rows = []
    for config in range(3000):
        name, level = f"{config * 1_000_003:012x}", draw.normal()
        for seed in range(3):
            error = float(np.exp(level + 0.1 * draw.normal()))
            rows.append(
                row(
                    name,
                    seed,
                    status="failed" if draw.random() < 0.01 else "completed",
                    accepted_error=error,
                    coverage=round(float(np.clip(0.94 + 0.04 * draw.normal(), 0, 1)), 2),
                    step_time_ms=float(np.exp(draw.normal())),
                    **{"config.hidden_width": config, "config.learning_rate": level},
                )
            )
    rows = [rows[index] for index in draw.permutation(len(rows))]
    run = write_run(tmp_path / "run", rows[:5000], rows[5000:], row_group_size=700)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(large_runs, "PIECE_ROWS", 1000)
        for most in (1, 50, 2900, 10_000):
            check_same(run, most=most)


def test_how_the_rows_lie_in_files_changes_nothing(tmp_path, little_pieces):
    """One file or many, in whatever order: the same bits."""
    draw = np.random.default_rng(1)
    rows = [
        row(HEX[c], seed, accepted_error=float(draw.lognormal(0, 8))) for c in range(9) for seed in range(5)
    ]
    one = in_pieces(write_run(tmp_path / "one", rows))
    mixed = [rows[index] for index in draw.permutation(len(rows))]
    many = in_pieces(write_run(tmp_path / "many", *(mixed[start : start + 4] for start in range(0, 45, 4))))
    assert repr(one.to_pylist()) == repr(many.to_pylist())


def test_fragments_may_lack_columns_and_differ_in_types(tmp_path, little_pieces):
    """What an older fragment does not have is null, and a whole number beside broken ones is one of them."""
    older = pa.schema(
        [f for f in SCHEMA if f.name not in ("metric.hits", "config.momentum")], metadata=SCHEMA.metadata
    )
    place = older.get_field_index("config.hidden_width")
    older = older.set(place, pa.field("config.hidden_width", pa.float64()))
    run = write_run(tmp_path / "run", [row(HEX[0], 0, **{"metric.hits": 2.0}), row(HEX[1], 0)])
    table = pa.Table.from_pylist([row(HEX[0], 1), row(HEX[1], 1)], schema=older)
    write_table_atomically(table, run / "rows" / "older.parquet")
    check_same(run)
    with pytest.raises(ValueError, match=r"the rows hold no metric metric\.miss"):
        in_pieces(run, RankingOptions(by=("metric.miss:lower",)))


def test_a_config_that_is_left_out_is_counted_with_its_reason(tmp_path):
    """The leaderboard ends where it is told to; what it leaves out stands in numbers below the table."""
    sound = [row(HEX[config], seed) for config in range(5) for seed in (0, 1)]
    wrong = [row(HEX[5], 0), row(HEX[6], 0, status="failed"), row(HEX[6], 1, status="diverged", nan_count=3)]
    run = write_run(tmp_path / "run", sound, wrong)
    board = in_pieces(run, most=2)
    assert board.column("config_id").to_pylist() == list(HEX[:2])
    said = json.loads(board.schema.metadata[WHOLE_RUN_KEY])
    assert (said["configs"], said["feasible"], said["n_trials"], said["n_missing"]) == (7, 5, 13, 1)
    assert (said["n_completed"], said["n_failed"], said["n_diverged"], said["n_stopped"]) == (11, 1, 1, 0)
    assert [(met["why"], met["configs"], met["such_as"]) for met in said["ruled_out"]] == [
        ("trials failed", 1, HEX[6]),
        ("trials diverged", 1, HEX[6]),
        ("trials missing", 1, HEX[5]),
        ("more non-finite values than 0", 1, HEX[6]),
    ]
    text = render_leaderboard(board, 1)
    assert text.startswith("7 configs, 5 feasible; 13 trials: 11 completed, 1 diverged, 1 failed; 1 missing")
    assert "     1 more configs in the leaderboard\n     3 more that are not in the leaderboard" in text
    assert text.endswith(f"       1  more non-finite values than 0, such as {HEX[6]}")
    assert f"ruled out: 2 of 7 configs\n       1  trials failed, such as {HEX[6]}" in text


def test_a_leaderboard_with_room_for_all_is_whole(tmp_path):
    """Then every ruled-out config has its own line and reason, and nothing is said of a whole beside it."""
    run = write_run(tmp_path / "run", [row(HEX[0]), row(HEX[1], status="failed", error="no data")])
    board = in_pieces(run, most=2)
    assert WHOLE_RUN_KEY not in board.schema.metadata
    assert board.column("why").to_pylist() == ["", "seed 0 failed (no data)"]
    assert run_totals(board)["ruled_out"] == []


def test_the_number_of_rows_picks_the_way(tmp_path, monkeypatch):
    """Up to the stated number a run is ranked in memory, and its leaderboard holds every config."""
    run = write_run(tmp_path / "run", [row(HEX[config]) for config in range(4)])
    assert len(rank_run(run, most=2)) == 4
    assert len(rank_run(run, most=2, large_rows=4)) == 4
    assert len(rank_run(run, most=2, large_rows=3)) == 2
    monkeypatch.setattr(large_runs, "LARGE_ROWS", 3)
    assert len(rank_run(run, most=2)) == 2


PAIR = [row(HEX[0], 0), row(HEX[0], 1)]
NAMED = [row("a", 0), row("a", 1)]


@pytest.mark.parametrize(
    ("fragments", "error", "message"),
    [
        ((PAIR, PAIR[1:]), RunReadError, f"1 trial_id more than once, such as {HEX[0]}-s1"),
        ((NAMED, NAMED[:1]), RunReadError, "1 trial_id more than once, such as a-s0"),
        (([row(HEX[0], 12)], [row(HEX[0], 12)]), RunReadError, f"more than once, such as {HEX[0]}-s12"),
        (
            (PAIR, [row(HEX[1], task="other")]),
            ValueError,
            "different tasks cannot be compared, got toy, other",
        ),
        (
            (PAIR, [row(HEX[1], status="complete")]),
            ValueError,
            "status must be one of .* did you mean completed",
        ),
        (
            (PAIR, [row(HEX[0], 2, **{"config.learning_rate": 2e-3})]),
            ValueError,
            r"value of config\.learning_rate",
        ),
        (
            (PAIR, [row(HEX[0], 2, **{"config.hidden_width": 9})]),
            ValueError,
            r"value of config\.hidden_width",
        ),
        ((PAIR, [row(HEX[0], 2, **{"config.optimizer": "sgd"})]), ValueError, r"value of config\.optimizer"),
        (
            (PAIR, [row(HEX[0], 2, **{"config.restore_best": True})]),
            ValueError,
            r"value of config\.restore_best",
        ),
        (
            (PAIR, [row(HEX[0], 2, **{"config.momentum": 0.0})]),
            ValueError,
            rf"config {HEX[0]} must have one value",
        ),
        ((NAMED, [row("a", 2, **{"config.optimizer": None})]), ValueError, r"config a must have one value"),
    ],
)
@pytest.mark.parametrize("most", [1, 100], ids=["not held", "held"])
def test_rows_that_cannot_be_judged_together_are_refused(
    tmp_path, little_pieces, fragments, error, message, most
):
    """As in memory, also where the configs that they concern would not be in the leaderboard."""
    better = [row(HEX[9], seed, accepted_error=0.1) for seed in range(3)]
    run = write_run(tmp_path / "run", *fragments, better)
    with pytest.raises(error, match=message):
        in_pieces(run, most=most)


def test_the_lowest_bits_and_the_highest_tell_configs_apart(tmp_path):
    """Values that differ in one bit, wherever it stands, are of different configs."""
    bits = np.float64(0.1).view(np.uint64)
    for place in (0, 1, 20, 31, 32, 45, 51, 52, 61):
        other = float((bits ^ np.uint64(1 << place)).view(np.float64))
        rows = [row(HEX[0], seed, **{"config.momentum": v}) for seed, v in enumerate((0.1, other))]
        with pytest.raises(ValueError, match=r"must have one value of config\.momentum"):
            in_pieces(write_run(tmp_path / str(place), rows))


def test_configs_that_only_seem_to_differ_are_compared_by_their_values(tmp_path, monkeypatch):
    """Numbers that are made of knobs are a first sight; rows, fetched from wherever they are, decide."""
    monkeypatch.setattr(
        large_runs, "fingerprint", lambda table, names: np.arange(len(table), dtype=np.uint64)
    )
    monkeypatch.setattr(large_runs, "LEADERBOARD_CONFIGS", 2)
    fragments = [[row(HEX[c], 0), row(HEX[5 + c], c)] for c in range(5)] + [
        [row(HEX[c], 1)] for c in range(5)
    ]
    check_same(write_run(tmp_path / "run", *fragments))
    differs = row(HEX[4], 2, **{"config.optimizer": "sgd"})
    with pytest.raises(ValueError, match=rf"config {HEX[4]} must have one value of config\.optimizer"):
        in_pieces(write_run(tmp_path / "other", *fragments, [row(HEX[8], 9)], [differs]))


def flip(path: Path, column: str, group: int = 0) -> None:
    """Flips a bit in the last byte of a column's pages."""
    chunk = pq.ParquetFile(path).metadata.row_group(group)
    place = next(
        chunk.column(i) for i in range(chunk.num_columns) if chunk.column(i).path_in_schema == column
    )
    start = min(offset for offset in (place.data_page_offset, place.dictionary_page_offset) if offset)
    data = bytearray(path.read_bytes())
    data[start + place.total_compressed_size - 1] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("column", ["accepted_error", "config_id", "config.learning_rate", "val_loss"])
@pytest.mark.parametrize("size", ["small", "large"])
def test_a_flipped_bit_is_told_with_the_file(tmp_path, monkeypatch, column, size):
    """Of a column that decides, of a knob, and of one that the leaderboard shows."""
    if size == "large":
        monkeypatch.setattr(large_runs, "PIECE_ROWS", 2)
    draw = np.random.default_rng(2)
    rows = [row(HEX[c], val_loss=draw.random(), accepted_error=draw.random()) for c in range(8)]
    rows = [entry | {"config.learning_rate": draw.random()} for entry in rows]
    run = write_run(tmp_path / "run", rows[:4], rows[4:], row_group_size=2)
    flip(run / "rows" / "driver-00001.parquet", column, group=1)
    with pytest.raises(RunReadError, match=r"driver-00001\.parquet cannot be read as Parquet"):
        in_pieces(run)


def test_files_that_are_no_rows_are_refused(tmp_path):
    """Cut short, of another kind, or of types that do not fit: each is named."""
    run = write_run(tmp_path / "run", PAIR)
    other = run / "rows" / "other.parquet"
    table = pa.Table.from_pylist([row(HEX[1])], schema=SCHEMA)
    pq.write_table(table.replace_schema_metadata({}), other)
    with pytest.raises(RunReadError, match=r"other\.parquet does not hold rows"):
        in_pieces(run)
    other.write_bytes((run / "rows" / "driver-00000.parquet").read_bytes()[:-9])
    with pytest.raises(RunReadError, match=r"other\.parquet cannot be read as Parquet"):
        in_pieces(run)
    place = SCHEMA.get_field_index("seed")
    text = table.set_column(place, pa.field("seed", pa.string()), pa.array(["0"]))
    write_table_atomically(text, other)
    with pytest.raises(RunReadError, match=r"other\.parquet does not fit the fragments before it"):
        in_pieces(run)
    other.unlink()
    write_table_atomically(table.drop_columns(["coverage"]), run / "rows" / "driver-00000.parquet")
    with pytest.raises(ValueError, match="rows must have the columns coverage"):
        in_pieces(run)


def test_a_file_that_grows_meanwhile_is_told(tmp_path, monkeypatch):
    """A run that goes on rewrites its last fragment; two parts of one reading would not be of one run."""
    run = write_run(tmp_path / "run", PAIR)
    footers = large_runs.read_footers(run / "rows", kind="rows")
    table = pa.Table.from_pylist([*PAIR, row(HEX[1])], schema=SCHEMA)
    write_table_atomically(table, run / "rows" / "driver-00000.parquet")
    monkeypatch.setattr(large_runs, "read_footers", lambda folder, kind: footers)
    with pytest.raises(RunReadError, match=r"driver-00000\.parquet changed while it was read"):
        in_pieces(run)


def test_seeds_that_do_not_fit_into_a_key_are_taken_as_they_are(tmp_path, little_pieces):
    """Negative and very large seeds, and trial ids of another form, are ranked as in memory."""
    rows = [row(HEX[c], seed, accepted_error=1.0 + c) for c in range(4) for seed in (-1, 3, 70_000)]
    check_same(write_run(tmp_path / "seeds", rows))
    rows = [entry | {"trial_id": f"{entry['trial_id']} again", "seed": 3} for entry in rows]
    check_same(write_run(tmp_path / "ids", rows))
