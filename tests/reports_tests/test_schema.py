"""The columns of a row: present, typed, and explained."""

from __future__ import annotations

import pyarrow as pa
import pytest

from reports.schema import (
    BASE_COLUMNS,
    KIND_KEY,
    SCHEMA_VERSION,
    VERSION_KEY,
    config_columns,
    history_schema,
    missing_columns,
    nearest_name,
    row_schema,
)

PROMISED = [
    "run_id",
    "task",
    "config_id",
    "trial_id",
    "seed",
    "cohort",
    "searcher",
    "scenario",
    "settings_id",
    "status",
    "stop_reason",
    "nan_origin",
    "error",
    "coverage",
    "target_coverage",
    "nan_count",
    "nan_loss",
    "nan_gradient",
    "nan_output",
    "nan_parameter",
    "step_time_ms",
    "accepted_error",
    "charged_error",
    "false_accept_rate",
    "false_reject_rate",
    "trivial_error",
    "pack_id",
    "pack_size",
    "pack_step_time_ms",
    "pack_note",
    "loss",
    "val_loss",
    "epochs",
    "duration_s",
    "parameters",
    "test_coverage",
    "test_accepted_error",
    "test_charged_error",
    "test_false_accept_rate",
    "test_false_reject_rate",
    "test_trivial_error",
    "curve_coverage",
    "curve_error",
    "curve_area",
    "commit",
    "scm_harness_version",
    "torch_version",
    "ray_version",
    "python_version",
    "hostname",
    "device",
    "device_name",
    "started_at",
    "data_digest",
    "plan_digest",
]


def test_every_row_has_the_promised_columns_and_no_other():
    """The base schema is the promised vocabulary, each column once."""
    assert sorted(row_schema({}).names) == sorted(PROMISED)


@pytest.mark.parametrize("name", PROMISED)
def test_a_missing_column_is_named(name):
    """Whichever column is left out of a schema, `missing_columns` says which."""
    schema = row_schema({})
    without = schema.remove(schema.get_field_index(name))
    assert missing_columns(without) == [name]
    assert missing_columns(without.empty_table()) == [name]


def test_each_knob_becomes_a_typed_column():
    """`config.<knob>` has the type that was given for the knob."""
    schema = row_schema({"tau_infer": "float64", "epochs": "int64", "optimizer": "string", "amp": "bool"})
    assert config_columns(schema) == ["config.tau_infer", "config.epochs", "config.optimizer", "config.amp"]
    types = [schema.field(name).type for name in config_columns(schema)]
    assert types == [pa.float64(), pa.int64(), pa.string(), pa.bool_()]


def test_an_unknown_type_is_refused_with_the_known_ones():
    """A type that Parquet columns here do not have names the column and what there is."""
    with pytest.raises(ValueError, match=r"type of config\.x must be one of float64, int64.*'float16'"):
        row_schema({"x": "float16"})


def test_an_extra_metric_needs_its_prefix():
    """A task's metric, or a telemetry, cannot take the name of a base column."""
    for name in ("metric.f1", "test_metric.f1", "telemetry.weight"):
        assert row_schema({}, {name: "float64"}).field(name).type == pa.float64()
    with pytest.raises(ValueError, match=r"must start with one of metric\., test_metric\., telemetry\., got"):
        row_schema({}, ["loss"])


def test_a_column_named_twice_is_refused():
    """Two columns of one name could not be told apart by a reader."""
    with pytest.raises(ValueError, match="must be unique"):
        row_schema({}, ["metric.f1", "metric.f1"])


def test_schemas_carry_their_kind_and_version():
    """The metadata says what a file holds, and by which version of these columns."""
    for schema, kind in ((row_schema({}), b"rows"), (history_schema(["loss"]), b"history")):
        assert schema.metadata == {KIND_KEY: kind, VERSION_KEY: str(SCHEMA_VERSION).encode()}


def test_every_column_is_explained():
    """Each field carries its meaning, so that a file explains itself."""
    assert all(column.meaning for column in BASE_COLUMNS)
    assert row_schema({}).field("step_time_ms").metadata[b"unit"] == b"ms"


def test_the_nearest_name_is_offered_only_when_near():
    """A typing error gets a hint, a foreign word none."""
    assert nearest_name("los", ["loss", "seed"]) == "; did you mean loss?"
    assert nearest_name("qqq", ["loss", "seed"]) == ""
