"""Files that are whole or not there, whatever kills their writer."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import subprocess
import sys
import textwrap
import time
from datetime import datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from reports import fragments
from reports.fragments import RunReadError, write_json_atomically, write_table_atomically
from reports.rows import RowWriter, read_rows
from reports.schema import PACKAGE_KEY, SCHEMA_VERSION, VERSION_KEY, row_schema

WRITE_ROWS = """
    import os, signal, sys
    from pathlib import Path
    import pyarrow.parquet as pq
    from reports import fragments
    from reports.rows import RowWriter
    from reports.schema import row_schema

    def row(i):
        return dict(run_id="r", task="t", config_id=str(i), trial_id=f"{i}-s0", seed=0, status="completed")

    writer = RowWriter(Path(sys.argv[1]) / "rows", "driver", row_schema({}))
"""


def run_script(body: str, folder: Path) -> subprocess.Popen[str]:
    code = textwrap.dedent(WRITE_ROWS) + textwrap.dedent(body)
    return subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True, cwd=Path.cwd()
    )


@pytest.mark.parametrize("moment", ["half_written", "before_rename"])
def test_a_writer_killed_in_mid_flush_leaves_the_earlier_fragment(tmp_path, moment):
    """SIGKILL between the first byte and the rename costs the rows of that flush and no others."""
    script = run_script(
        f"""
        for i in range(3):
            writer.append(row(i))
        writer.flush()

        def half_written(table, handle, **options):
            handle.write(b"PAR1" + bytes(1000))
            handle.flush()
            os.kill(os.getpid(), signal.SIGKILL)

        def before_rename(source, target):
            os.kill(os.getpid(), signal.SIGKILL)

        if "{moment}" == "half_written":
            pq.write_table = half_written
        else:
            os.replace = before_rename
        writer.append(row(3))
        writer.flush()
        """,
        tmp_path,
    )
    script.communicate(timeout=60)
    assert script.returncode == -signal.SIGKILL
    assert list((tmp_path / "rows").glob("*.tmp"))
    assert read_rows(tmp_path).column("trial_id").to_pylist() == ["0-s0", "1-s0", "2-s0"]


def test_a_writer_killed_at_any_moment_leaves_what_it_had_flushed(tmp_path):
    """A process killed while it writes leaves a readable run that holds at least the announced rows."""
    script = run_script(
        """
        for i in range(100_000):
            writer.append(row(i))
            if i % 20 == 0:
                writer.flush()
                print(i, flush=True)
        """,
        tmp_path,
    )
    assert script.stdout is not None
    announced = [script.stdout.readline() for _ in range(3)]
    time.sleep(0.0137)
    os.kill(script.pid, signal.SIGKILL)
    rest, _ = script.communicate(timeout=60)
    last = int(("".join(announced) + rest).split("\n")[-2])
    ids = read_rows(tmp_path).column("trial_id").to_pylist()
    assert len(ids) > last
    assert ids == [f"{i}-s0" for i in range(len(ids))]


def test_the_next_writer_of_a_killed_one_goes_on(tmp_path, schema, make_row):
    """After a kill, a writer of the same name removes the half-written file and keeps every whole one."""
    folder = tmp_path / "rows"
    with RowWriter(folder, "driver", schema) as first:
        first.append(make_row("a"))
    (folder / "driver-00001.parquet.tmp").write_bytes(b"PAR1 half")
    (folder / "other-00001.parquet.tmp").write_bytes(b"another writer's, at work")
    with RowWriter(folder, "driver", schema) as second:
        second.append(make_row("b"))
    assert sorted(path.name for path in folder.iterdir()) == [
        "driver-00000.parquet",
        "driver-00001.parquet",
        "other-00001.parquet.tmp",
    ]
    assert read_rows(tmp_path).column("config_id").to_pylist() == ["a", "b"]


def test_a_flush_that_fails_leaves_the_earlier_file_and_no_litter(tmp_path, monkeypatch):
    """A full disk in the middle of a write raises, and the reader sees what was there before."""
    path = tmp_path / "table.parquet"
    write_table_atomically(pa.table({"x": [1]}), path)

    def full_disk(table: pa.Table, handle: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fragments.pq, "write_table", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_table_atomically(pa.table({"x": [2]}), path)
    assert pq.read_table(path).column("x").to_pylist() == [1]
    assert [entry.name for entry in tmp_path.iterdir()] == ["table.parquet"]


def test_rows_of_a_failed_flush_come_with_the_next(tmp_path, schema, make_row, monkeypatch):
    """A row is not forgotten because the disk was full when it was first written."""
    writer = RowWriter(tmp_path / "rows", "driver", schema)

    def full_disk(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(fragments.os, "replace", full_disk)
        with pytest.raises(OSError, match="No space left"):
            writer.append(make_row("a"))
    writer.close()
    assert read_rows(tmp_path).column("config_id").to_pylist() == ["a"]


def test_fragments_roll_over_and_lose_nothing(tmp_path, schema, make_row, monkeypatch):
    """A long run is several files, each of at most the stated size, holding every row once."""
    monkeypatch.setattr(fragments, "FRAGMENT_ROWS", 10)
    with RowWriter(tmp_path / "rows", "driver", schema) as writer:
        for index in range(27):
            writer.append(make_row(f"{index:05d}"))
    sizes = [pq.read_metadata(path).num_rows for path in sorted((tmp_path / "rows").iterdir())]
    assert sizes == [10, 10, 7]
    assert read_rows(tmp_path).column("config_id").to_pylist() == [f"{index:05d}" for index in range(27)]


def test_a_row_is_on_the_disk_when_append_returns(tmp_path, schema, make_row):
    """Where flushing is cheap, there is no moment in which a finished trial exists in memory alone."""
    writer = RowWriter(tmp_path / "rows", "driver", schema)
    writer.append(make_row("a"))
    assert len(read_rows(tmp_path)) == 1


def test_rows_that_come_together_are_written_together(tmp_path, schema, make_row, monkeypatch):
    """One flush for each fragment; none grows past its size, as what it takes to write one would with it.

    Of a batch with a wrong row, what came before is kept.
    """
    monkeypatch.setattr(fragments, "FRAGMENT_ROWS", 3)
    written: list[int] = []
    write = fragments.write_table_atomically
    monkeypatch.setattr(
        fragments,
        "write_table_atomically",
        lambda table, path: (written.append(len(table)), write(table, path)),
    )
    writer = RowWriter(tmp_path / "rows", "driver", schema)
    writer.append_all(make_row(name) for name in "abcde")
    assert written == [3, 2]
    assert read_rows(tmp_path).column("config_id").to_pylist() == list("abcde")
    with pytest.raises(ValueError, match="a row may be written once"):
        writer.append_all([make_row("f", **{"metric.hits": 1.0}), make_row("a"), make_row("g")])
    rows = read_rows(tmp_path)
    assert rows.column("config_id").to_pylist() == list("abcdef")
    assert rows.column("metric.hits").to_pylist()[:3] == [None] * 3
    assert rows.column("metric.hits").to_pylist()[-1] == 1.0
    assert max(written) == 3


def test_where_flushing_is_dear_a_row_waits_at_most_a_second(tmp_path, schema, make_row, monkeypatch):
    """On a slow disk rows are gathered, and written when a second has passed."""
    clock = {"now": 100.0}
    monkeypatch.setattr(fragments.time, "monotonic", lambda: clock["now"])
    writer = RowWriter(tmp_path / "rows", "driver", schema)
    writer.append(make_row("a"))
    writer._flush_cost_s = 0.3
    clock["now"] += 0.6
    writer.append(make_row("b"))
    assert len(read_rows(tmp_path)) == 1
    writer.flush_if_due()
    assert len(read_rows(tmp_path)) == 1
    clock["now"] += 0.5
    writer.flush_if_due()
    assert len(read_rows(tmp_path)) == 2


def test_files_are_zstd_with_checksums_and_say_who_wrote_them(tmp_path, schema, make_row):
    """Compression, schema version and package version stand in the file itself."""
    with RowWriter(tmp_path / "rows", "driver", schema) as writer:
        writer.append(make_row())
    path = tmp_path / "rows" / "driver-00000.parquet"
    group = pq.read_metadata(path).row_group(0)
    assert {group.column(index).compression for index in range(group.num_columns)} == {"ZSTD"}
    metadata = pq.read_schema(path).metadata
    assert metadata[VERSION_KEY] == str(SCHEMA_VERSION).encode()
    assert metadata[PACKAGE_KEY]


def test_a_flipped_bit_is_noticed(tmp_path, schema, make_row):
    """A number that changed on the disk is an error that names the file, also where it still decodes."""
    values = np.random.default_rng(0).random(50)
    with RowWriter(tmp_path / "rows", "driver", schema) as writer:
        for index, value in enumerate(values):
            writer.append(make_row(f"{index}", accepted_error=value))
    path = tmp_path / "rows" / "driver-00000.parquet"
    content = bytearray(path.read_bytes())
    content[content.index(values[25].tobytes())] ^= 1  # random numbers are stored as they are
    path.write_bytes(content)
    unchecked = pq.read_table(path).column("accepted_error").to_numpy()
    assert (unchecked != values).sum() == 1
    with pytest.raises(RunReadError, match=r"driver-00000.*checksum"):
        read_rows(tmp_path)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("epochs", 1.5, "column epochs must be int64, got 1.5 of type float"),
        ("epochs", True, "column epochs must be int64, got True of type bool"),
        ("loss", "low", "column loss must be double, got 'low' of type str"),
        ("loss", True, "column loss must be double"),
        ("task", 3, "column task must be string, got 3"),
        ("config.restore_best", 1, "column config.restore_best must be bool, got 1"),
        ("started_at", "now", "column started_at must be timestamp"),
        ("started_at", datetime(2024, 1, 1), "must be a time with its zone"),
        ("run_id", None, "column run_id must have a value in every row"),
        ("learning_rate", 1.0, "unknown column learning_rate; did you mean config.learning_rate?"),
        ("acepted_error", 1.0, "unknown column acepted_error; did you mean accepted_error?"),
        ("status", "complete", "status must be one of .*; did you mean completed?"),
    ],
)
def test_a_wrong_value_is_refused_and_changes_nothing(tmp_path, schema, make_row, column, value, message):
    """Types are those of the schema, names are known ones; a refused row leaves the writer as it was."""
    with RowWriter(tmp_path / "rows", "driver", schema) as writer:
        with pytest.raises(ValueError, match=message):
            writer.append(make_row("a") | {"metric.new": 1.0, column: value})
        assert writer.schema.names == schema.names
        writer.append(make_row("a"))
    assert len(read_rows(tmp_path)) == 1


def test_an_int_is_taken_as_a_float_and_numpy_scalars_as_their_values(tmp_path, schema, make_row):
    """The one conversion is int to float; a NumPy scalar counts as the Python value it holds."""
    with RowWriter(tmp_path / "rows", "driver", schema) as writer:
        writer.append(make_row("a", loss=3, epochs=np.int32(7), accepted_error=np.float32(0.5)))
    row = read_rows(tmp_path).to_pylist()[0]
    assert (row["loss"], row["epochs"], row["accepted_error"]) == (3.0, 7, 0.5)


def test_a_closed_writer_takes_no_rows(tmp_path, schema, make_row):
    """A row appended after close would never be written; it raises instead."""
    writer = RowWriter(tmp_path / "rows", "driver", schema)
    writer.close()
    with pytest.raises(ValueError, match="is closed"):
        writer.append(make_row())


@pytest.mark.parametrize("writer_id", ["", "../up", "a b", ".hidden"])
def test_a_writer_id_that_is_no_file_name_is_refused(tmp_path, writer_id):
    """The id names files, and must not lead out of the folder or hide them."""
    with pytest.raises(ValueError, match="writer_id must be"):
        RowWriter(tmp_path, writer_id, row_schema({}))


def test_json_refuses_nan_and_keeps_the_earlier_file(tmp_path):
    """A value that JSON does not know raises, and the file is as it was."""
    path = tmp_path / "x.json"
    write_json_atomically({"a": 1}, path)
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json_atomically({"a": math.nan}, path)
    assert path.read_text() == '{\n  "a": 1\n}\n'


@pytest.mark.parametrize("operator", ["!=", "not <="])
def test_a_filter_does_not_pass_over_nan(tmp_path, operator):
    """All numbers of a file are 0 and one is NaN, which statistics leave out: `x != 0` still finds it."""
    write_table_atomically(pa.table({"n": [1, 2], "x": [0.0, float("nan")]}), tmp_path / "a.parquet")
    x = pc.field("x")
    kept = pq.read_table(tmp_path, filters=x != 0.0 if operator == "!=" else ~(x <= 0.0))
    assert kept.column("n").to_pylist() == [2]


def test_a_flip_in_the_footer_raises_nothing_but_a_read_error(tmp_path):
    """The name of a column that is no text any more is damage as any other."""
    path = tmp_path / "a.parquet"
    write_table_atomically(pa.table({"loss": [1.0]}, metadata=row_schema({}).metadata), path)
    content = path.read_bytes()
    for at in range(content.index(b"loss"), len(content)):
        path.write_bytes(content[:at] + bytes([content[at] ^ 0x80]) + content[at + 1 :])
        with contextlib.suppress(RunReadError):
            fragments.read_fragment(path, kind="rows")
