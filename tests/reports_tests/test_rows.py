"""Rows of a run: written once, read as one table, by every reader of Parquet."""

from __future__ import annotations

import math
from datetime import UTC, datetime

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from reports.fragments import RunReadError
from reports.rows import RowWriter, read_rows
from reports.schema import SCHEMA_VERSION, VERSION_KEY, missing_columns, row_schema


@pytest.fixture
def run(tmp_path, schema, make_row):
    """A run of three trials: a sound one, one with inactive and unset knobs, one that failed early."""
    with RowWriter(tmp_path / "rows", "driver", schema) as writer:
        writer.append(make_row("a", knobs={"momentum": 0.9, "gradient_policy": "clamp"}))
        writer.append(make_row("b", accepted_error=math.nan, knobs={"hidden_width": None}))
        writer.append(
            {
                "run_id": "r",
                "task": "toy",
                "config_id": "c",
                "trial_id": "c-s0",
                "seed": 0,
                "status": "failed",
                "error": "TaskError: no target",
            }
        )
    return tmp_path


EXPECTED_MOMENTUM = [0.9, None, None]
EXPECTED_WIDTH = [8, None, None]
EXPECTED_POLICY = ["clamp", None, None]


def test_pyarrow_reads_the_rows(run):
    """Every promised column is there; NaN and null keep their two meanings."""
    table = read_rows(run)
    assert missing_columns(table) == []
    assert table.column("config.momentum").to_pylist() == EXPECTED_MOMENTUM
    assert table.column("config.hidden_width").to_pylist() == EXPECTED_WIDTH
    assert table.column("config.gradient_policy").to_pylist() == EXPECTED_POLICY
    errors = table.column("accepted_error")
    assert errors.null_count == 0
    assert [math.isnan(value) for value in errors.to_pylist()] == [False, True, True]
    assert table.column("epochs").to_pylist() == [20, 20, None]
    assert table.column("started_at")[0].as_py() == datetime(2024, 5, 1, 12, 0, 0, 250, tzinfo=UTC)


def test_pandas_reads_the_rows(run):
    """pandas reads a fragment unchanged, types and nulls included."""
    pandas = pytest.importorskip("pandas")
    frame = pandas.read_parquet(run / "rows" / "driver-00000.parquet")
    assert frame["config_id"].tolist() == ["a", "b", "c"]
    assert frame["config.momentum"].isna().tolist() == [False, True, True]
    assert frame["config.gradient_policy"].isna().tolist() == [False, True, True]
    assert frame["accepted_error"].isna().tolist() == [False, True, True]
    assert frame["config.restore_best"][0] is False or not frame["config.restore_best"][0]
    assert str(frame["started_at"].dtype) == "datetime64[us, UTC]"


def test_polars_reads_the_rows(run):
    """Polars reads the folder unchanged and tells NaN from null."""
    polars = pytest.importorskip("polars")
    frame = polars.read_parquet(run / "rows" / "*.parquet")
    assert frame["config.momentum"].to_list() == EXPECTED_MOMENTUM
    assert frame["config.hidden_width"].to_list() == EXPECTED_WIDTH
    assert frame["config.gradient_policy"].to_list() == EXPECTED_POLICY
    assert frame["accepted_error"].null_count() == 0
    assert frame["accepted_error"].is_nan().to_list() == [False, True, True]


def test_duckdb_reads_the_rows(run):
    """DuckDB reads the folder unchanged and tells NaN from null."""
    duckdb = pytest.importorskip("duckdb")
    query = """
        select "config.momentum", "config.hidden_width", "config.gradient_policy", isnan(accepted_error)
        from read_parquet(?) order by config_id
    """
    with duckdb.connect() as connection:
        found = connection.execute(query, [str(run / "rows" / "*.parquet")]).fetchall()
        rows = connection.execute("select * from read_parquet(?)", [str(run / "rows" / "*.parquet")])
        started = [
            row[[column[0] for column in rows.description].index("started_at")] for row in rows.fetchall()
        ]
    assert started == read_rows(run).column("started_at").to_pylist()
    assert found == list(
        zip(EXPECTED_MOMENTUM, EXPECTED_WIDTH, EXPECTED_POLICY, [False, True, True], strict=True)
    )


def test_a_trial_is_written_once_also_by_a_later_writer(tmp_path, schema, make_row):
    """A second row of a trial is refused, in the same process and after a restart."""
    with RowWriter(tmp_path / "rows", "driver", schema) as writer:
        writer.append(make_row("a"))
        with pytest.raises(ValueError, match="written once, got trial_id=a-s0 again"):
            writer.append(make_row("a"))
    with (
        RowWriter(tmp_path / "rows", "resumed", schema) as later,
        pytest.raises(ValueError, match="written once, got trial_id=a-s0 again"),
    ):
        later.append(make_row("a"))
    assert len(read_rows(tmp_path)) == 1


def test_two_writers_that_wrote_one_trial_are_noticed(tmp_path, schema, make_row):
    """A trial_id in two fragments is an error that names it: one of the rows must be false."""
    first = RowWriter(tmp_path / "rows", "one", schema)
    second = RowWriter(tmp_path / "rows", "two", schema)
    for writer in (first, second):
        writer.append(make_row("a"))
        writer.close()
    with pytest.raises(RunReadError, match="more than once, such as a-s0"):
        read_rows(tmp_path)


def test_a_metric_of_the_task_may_come_later(tmp_path, schema, make_row):
    """A metric column appears with the first row that has it; rows without it hold NaN, also across files."""
    with RowWriter(tmp_path / "rows", "one", schema) as writer:
        writer.append(make_row("a"))
        writer.append(make_row("b") | {"metric.f1": 1, "test_metric.f1": 0.5})
        writer.append(make_row("c"))
    table = read_rows(tmp_path)
    assert table.column("metric.f1").type == pa.float64()
    assert [str(value) for value in table.column("metric.f1").to_pylist()] == ["nan", "1.0", "nan"]


def test_telemetry_may_come_with_any_row(tmp_path, schema, make_row):
    """What goes along with some trials only is a number in their rows and null, not NaN, in the others."""
    with RowWriter(tmp_path / "rows", "one", schema) as writer:
        writer.append(make_row("a"))
        writer.append(make_row("b") | {"telemetry.control_weight": 2})
        writer.append(make_row("c") | {"telemetry.control_weight": float("nan")})
    column = read_rows(tmp_path).column("telemetry.control_weight")
    assert column.type == pa.float64()
    assert [str(value) for value in column.to_pylist()] == ["None", "2.0", "nan"]


def test_fragments_of_different_schemas_become_one_table(tmp_path, make_row):
    """A knob that only one fragment has is null in the others; an int column beside a float one is float."""
    knobs = {
        "learning_rate": "float64",
        "optimizer": "string",
        "hidden_width": "int64",
        "restore_best": "bool",
    }
    with RowWriter(tmp_path / "rows", "one", row_schema(knobs)) as writer:
        writer.append(make_row("a"))
    with RowWriter(
        tmp_path / "rows", "two", row_schema(knobs | {"hidden_width": "float64", "g": "string"})
    ) as writer:
        writer.append(make_row("b", knobs={"g": "x"}))
    table = read_rows(tmp_path)
    assert table.column("config.g").to_pylist() == [None, "x"]
    assert table.column("config.hidden_width").to_pylist() == [8.0, 8.0]


def test_fragments_that_contradict_each_other_are_named(tmp_path, make_row):
    """A column that is text in one file and a number in another cannot be one column."""
    for name, kind, value in (("one", "string", "x"), ("two", "bool", True)):
        knobs = {
            "learning_rate": "float64",
            "optimizer": "string",
            "hidden_width": "int64",
            "restore_best": "bool",
        }
        with RowWriter(tmp_path / "rows", name, row_schema(knobs | {"g": kind})) as writer:
            writer.append(make_row(name, knobs={"g": value}))
    with pytest.raises(RunReadError, match=r"two-00000\.parquet does not fit"):
        read_rows(tmp_path)


def test_half_written_files_are_not_read(run):
    """What a writer has not finished is not there for a reader."""
    (run / "rows" / "driver-00001.parquet.tmp").write_bytes(b"PAR1")
    assert len(read_rows(run)) == 3


def test_what_is_no_run_is_named(tmp_path):
    """A missing folder, a file, a folder without rows and one with no fragment each say what they are."""
    with pytest.raises(RunReadError, match="nowhere does not exist"):
        read_rows(tmp_path / "nowhere")
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(RunReadError, match="file is not a folder"):
        read_rows(file)
    with pytest.raises(RunReadError, match="not a run folder"):
        read_rows(tmp_path)
    (tmp_path / "rows").mkdir()
    with pytest.raises(RunReadError, match="holds no rows"):
        read_rows(tmp_path)


@pytest.mark.parametrize("content", [b"", b"PAR1", b"not parquet at all"], ids=["empty", "stub", "text"])
def test_a_file_that_is_not_parquet_is_named(run, content):
    """A damaged fragment is an error with its path, never a gap in the rows."""
    (run / "rows" / "zzz.parquet").write_bytes(content)
    with pytest.raises(RunReadError, match=r"zzz\.parquet cannot be read as Parquet") as caught:
        read_rows(run)
    assert "\n" not in str(caught.value)


def test_a_foreign_parquet_file_is_named(run):
    """Parquet that this program did not write as rows is refused, not merged."""
    pq.write_table(pa.table({"trial_id": ["x"]}), run / "rows" / "zzz.parquet")
    with pytest.raises(RunReadError, match=r"zzz\.parquet does not hold rows"):
        read_rows(run)


def test_rows_of_a_later_schema_are_refused(run):
    """Columns may have changed their meaning since; a newer file is not guessed at."""
    path = run / "rows" / "driver-00000.parquet"
    table = pq.read_table(path)
    newer = table.replace_schema_metadata({**table.schema.metadata, VERSION_KEY: str(SCHEMA_VERSION + 1)})
    pq.write_table(newer, path)
    with pytest.raises(RunReadError, match=f"schema version {SCHEMA_VERSION + 1}"):
        read_rows(run)
