"""A table becomes splits of standardised rows; whatever is wrong with it is said in one line."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest
import torch

from scm.training.targets import STATUS_CODES
from scm.trial import Decoded
from scm.trial_config import TrialConfig
from trainables.tasks.protocol import TaskError
from trainables.tasks.table import TableTask, make_table_task
from trainables.tasks.table_data import label_key, stratified_split

WriteCsv = Callable[..., str]
CONFIG = TrialConfig()
X = [float(i) for i in range(20)]
Y = [float(i + 1) for i in range(20)]


def table(write_csv: WriteCsv, columns: dict[str, list[Any]] | None = None, **params: Any) -> TableTask:
    data = write_csv(**(columns or {"x": X, "y": Y}))
    return make_table_task({"data": data, "inputs": ["x"], "target": "y"} | params)


def decoded_as(task: TableTask, name: str, prediction: torch.Tensor, bottom: torch.Tensor) -> Decoded:
    """Answers given in target units, as a model would have decoded them."""
    units = prediction.log() if task.params.target_transform == "log" else prediction
    answers = torch.where(bottom, torch.nan, (units - task._centre) / task._scale)
    return Decoded(
        decoded=answers, bottom=bottom, fault=torch.zeros_like(bottom), q_abs=torch.ones_like(answers)
    )


def test_nh4_splits_hold_every_row_once_with_each_status_in_proportion(nh4: dict[str, Any]) -> None:
    """102 rows, 45 below the detection limit: 60/20/20, and censored rows at the same share in each split."""
    splits = make_table_task(nh4).splits(0)
    sizes = {name: len(split) for name, split in splits.items()}
    assert sum(sizes.values()) == 102
    assert sizes["train"] == 61
    overall = sum(int(s.targets.mask_bottom.sum()) for s in splits.values())
    for split in splits.values():
        share = float(split.targets.mask_bottom.double().mean())
        assert share == pytest.approx(overall / 102, abs=0.06)
        assert set(split.targets.orientation_label.unique().tolist()) == {-1, 0}


def test_gbsg2_encodes_categories_and_orients_censoring_upwards(gbsg2: dict[str, Any]) -> None:
    """Five numbers, and 2 + 2 + 3 levels; a patient still free of recurrence is censored above."""
    task = make_table_task(gbsg2)
    assert task.features == [
        "horTh=no", "horTh=yes", "age", "menostat=Post", "menostat=Pre", "tsize",
        "tgrade=I", "tgrade=II", "tgrade=III", "pnodes", "progrec", "estrec",
    ]  # fmt: skip
    train = task.splits(0)["train"]
    assert train.inputs.shape == (len(train), 12)
    assert set(train.targets.orientation_label.unique().tolist()) == {0, 1}


def test_scales_are_those_of_the_training_split_alone(write_csv: WriteCsv) -> None:
    """Changing the rows of val and test changes nothing of what training sees."""
    fold = ["train"] * 10 + ["val"] * 5 + ["test"] * 5
    plain = table(write_csv, {"x": X, "y": Y, "fold": fold}, split={"column": "fold"}).splits(0)["train"]
    wild_x, wild_y = X[:10] + [1e6] * 10, Y[:10] + [-1e6] * 10
    wild = table(write_csv, {"x": wild_x, "y": wild_y, "fold": fold}, split={"column": "fold"}).splits(0)
    assert torch.equal(plain.inputs, wild["train"].inputs)
    assert torch.equal(plain.targets.Y_n, wild["train"].targets.Y_n)
    assert float(wild["train"].inputs.mean()) == pytest.approx(0, abs=1e-6)
    assert float(wild["train"].inputs.std(correction=0)) == pytest.approx(1, abs=1e-6)


def test_split_depends_on_split_seed_and_not_on_the_trials_seed(write_csv: WriteCsv) -> None:
    """All seeds of a sweep see the same rows; another split_seed deals them anew."""
    one, other = table(write_csv), table(write_csv, split_seed=1)
    assert torch.equal(one.splits(0)["val"].inputs, one.splits(7)["val"].inputs)
    assert not torch.equal(one.splits(0)["val"].inputs, other.splits(0)["val"].inputs)


def test_split_column_decides_through_its_map(write_csv: WriteCsv) -> None:
    """Numbers in a file may name the splits, as the plan says."""
    columns = {"x": X, "y": Y, "k": [0] * 12 + [1] * 4 + [2] * 4}
    task = table(write_csv, columns, split={"column": "k", "values": {0: "train", 1: "val", 2: "test"}})
    assert {name: len(split) for name, split in task.splits(0).items()} == {"train": 12, "val": 4, "test": 4}


def test_unseen_category_is_all_zeros(write_csv: WriteCsv) -> None:
    """A level that stands in the test split alone gets no feature and no made-up neighbour."""
    columns = {
        "x": ["a", "b"] * 6 + ["a"] * 4 + ["new"] * 4,
        "y": Y,
        "k": ["train"] * 12 + ["val"] * 4 + ["test"] * 4,
    }
    task = table(write_csv, columns, split={"column": "k"})
    assert task.features == ["x=a", "x=b"]
    assert torch.equal(task.splits(0)["test"].inputs, torch.zeros(4, 2))


def test_booleans_and_dates_become_numbers(write_csv: WriteCsv) -> None:
    """A date counts days and a boolean is 0 or 1, both standardised."""
    days = [f"2020-01-{day:02d}" for day in range(1, 21)]
    columns = {"x": days, "b": ["true", "false"] * 10, "y": Y}
    task = table(write_csv, columns, inputs=["x", "b"])
    inputs = torch.cat([split.inputs for split in task.splits(0).values()])
    assert task.features == ["x", "b"]
    assert len(inputs[:, 0].unique()) == 20
    assert len(inputs[:, 1].unique()) == 2


def test_number_may_be_declared_a_category(write_csv: WriteCsv) -> None:
    """`types` overrules what the file's type says."""
    task = table(write_csv, {"x": [1, 2] * 10, "y": Y}, types={"x": "categorical"})
    assert task.features == ["x=1", "x=2"]


def test_missing_input_is_the_training_mean_under_mean(write_csv: WriteCsv) -> None:
    """A number that is not there is 0 once standardised; a missing category has no level."""
    columns = {
        "x": [None, *X[1:]],
        "c": [None] + ["a", "b"] * 9 + ["a"],
        "y": Y,
        "k": ["train"] * 16 + ["val", "test"] * 2,
    }
    task = table(write_csv, columns, inputs=["x", "c"], missing_inputs="mean", split={"column": "k"})
    assert task.splits(0)["train"].inputs[0].tolist() == [0.0, 0.0, 0.0]


def test_rows_with_a_missing_input_go_under_drop(write_csv: WriteCsv) -> None:
    """The row is in no split."""
    task = table(write_csv, {"x": [None, "nan", *X[2:]], "y": Y}, missing_inputs="drop")
    assert sum(len(split) for split in task.splits(0).values()) == 18


def test_missing_target_has_the_status_missing_and_censored_keeps_its_own(write_csv: WriteCsv) -> None:
    """An empty cell is no label to train on; a censored row needs no value to be censored."""
    columns = {
        "x": X,
        "y": [None, None, *Y[2:]],
        "s": ["ok", "cut"] + ["ok"] * 18,
        "k": ["train"] * 16 + ["val", "test"] * 2,
    }
    status = {"column": "s", "values": {"ok": "finite", "cut": "censored_above"}}
    train = table(write_csv, columns, status=status, split={"column": "k"}).splits(0)["train"]
    assert train.extras["status"][:2].tolist() == [STATUS_CODES["missing"], STATUS_CODES["censored_above"]]
    assert train.targets.mask_trained[:2].tolist() == [False, True]
    assert math.isnan(train.extras["value"][1])


def test_parquet_and_csv_of_one_table_give_equal_splits(gbsg2: dict[str, Any], tmp_path: Path) -> None:
    """The file's format changes no number."""
    pq.write_table(pacsv.read_csv(gbsg2["data"]), tmp_path / "gbsg2.parquet")
    same = make_table_task(gbsg2 | {"data": str(tmp_path / "gbsg2.parquet")}).splits(0)
    for name, split in make_table_task(gbsg2).splits(0).items():
        assert split.digest() == same[name].digest()


def test_several_targets_have_a_status_each(write_csv: WriteCsv) -> None:
    """Two outputs: (N, 2) targets, a status column per target, a two-output model, metrics over elements."""
    columns = {"x": X, "y": Y, "z": Y[::-1], "s": ["ok"] * 19 + ["cut"], "t": ["ok"] * 20}
    status = {"column": ["s", "t"], "values": {"ok": "finite", "cut": "censored_below"}}
    task = table(write_csv, columns, target=["y", "z"], status=status)
    splits = task.splits(0)
    assert splits["train"].targets.Y_n.shape == (12, 2)
    assert sum(int(split.targets.mask_bottom.sum()) for split in splits.values()) == 1
    p, q = task.build_model(CONFIG)(splits["val"].inputs)
    assert p.shape == q.shape == (4, 2)
    exact = decoded_as(task, "val", splits["val"].extras["value"], torch.zeros(4, 2, dtype=torch.bool))
    scores = task.metrics(exact, splits["val"], CONFIG)
    assert scores["accepted_error"] == pytest.approx(0, abs=1e-9)


def test_errors_are_in_target_units_and_bounds_count(nh4: dict[str, Any]) -> None:
    """Answering 0.1 everywhere costs |0.1 - y| on finite rows and 0.1 - bound above a detection limit."""
    task = make_table_task(nh4)
    split = task.splits(0)["val"]
    value, below = split.extras["value"], split.targets.mask_bottom
    answers = torch.full((len(split),), 0.1, dtype=torch.float64)
    scores = task.metrics(decoded_as(task, "val", answers, torch.zeros_like(below)), split, CONFIG)
    expected = torch.where(below, (0.1 - value).clamp_min(0), (0.1 - value).abs())
    assert scores["accepted_error"] == pytest.approx(float(expected.mean()))
    assert scores["charged_error"] == pytest.approx(float((0.1 - value[~below]).abs().mean()))
    assert scores["false_accept_rate"] == 1.0
    assert scores["false_reject_rate"] == 0.0


def test_abstention_is_charged_the_training_median(nh4: dict[str, Any]) -> None:
    """Rejecting every row costs what answering the median of the finite training rows costs."""
    task = make_table_task(nh4)
    train, test = task.splits(0)["train"], task.splits(0)["test"]
    median = np.median(train.extras["value"][train.targets.mask_finite].numpy())
    bottom = torch.ones(len(test), dtype=torch.bool)
    scores = task.metrics(decoded_as(task, "test", torch.ones(len(test)), bottom), test, CONFIG)
    value = test.extras["value"][test.targets.mask_finite]
    assert scores["charged_error"] == pytest.approx(float((value - median).abs().mean()))
    assert math.isnan(scores["accepted_error"])
    assert scores["false_reject_rate"] == 1.0


def test_constant_input_and_target_stay_finite(write_csv: WriteCsv) -> None:
    """A deviation of zero divides nothing."""
    splits = table(write_csv, {"x": [3.0] * 20, "y": [7.0] * 20}).splits(0)
    assert torch.equal(splits["train"].inputs, torch.zeros(12, 1))
    assert torch.equal(splits["train"].targets.Y_n, torch.zeros(12))


@pytest.mark.parametrize("rows", [3, 4, 7, 50, 101])
def test_rows_are_dealt_once_and_in_proportion(rows: int) -> None:
    """Sizes are within one row of the shares, whatever the strata."""
    strata = np.arange(rows) % 3 == 0
    dealt = stratified_split(strata.astype(int), (0.6, 0.2, 0.2), np.random.default_rng(0))
    assert sorted(np.concatenate(list(dealt.values())).tolist()) == list(range(rows))
    for name, share in (("train", 0.6), ("val", 0.2), ("test", 0.2)):
        assert abs(len(dealt[name]) - share * rows) <= 1


def test_labels_match_across_spellings() -> None:
    """TRUE, True and true are one label, and so are 1, "1" and 1.0; text is not folded otherwise."""
    assert {label_key(True), label_key("TRUE"), label_key("true ")} == {"true"}
    assert {label_key(1), label_key("1"), label_key(1.0)} == {"1"}
    assert {label_key(None), label_key("NA"), label_key("")} == {""}
    assert label_key("Yes") != label_key("yes")


STATUS = {"column": "s", "values": {"ok": "finite", "cut": "censored_below"}}
FOLD = {"k": ["train"] * 12 + ["val"] * 4 + ["test"] * 4}
BAD: dict[str, tuple[dict[str, list[Any]], dict[str, Any], str]] = {
    "unknown parameter": ({}, {"inptus": ["x"]}, "unknown parameter 'inptus'.*did you mean 'inputs'"),
    "no target given": ({}, {"target": None}, "needs the parameter 'target'"),
    "no inputs": ({}, {"inputs": []}, "inputs must name at least one column"),
    "inputs of another type": ({}, {"inputs": 3}, "inputs must be a column name or a list of them, got 3"),
    "input named twice": ({}, {"inputs": ["x", "x"]}, "inputs must name each column once"),
    "target among inputs": ({}, {"inputs": ["x", "y"]}, "inputs must not hold the target column, got 'y'"),
    "file without the target": ({}, {"target": "yy"}, "target must be a column of data.csv, got 'yy'.*'y'"),
    "unknown input": ({}, {"inputs": ["xx"]}, "inputs must be a column of data.csv, got 'xx'.*'x'"),
    "unknown status column": ({}, {"status": STATUS}, "status.column must be a column of data.csv, got 's'"),
    "status without values": ({}, {"status": {"column": "y"}}, "status needs 'values'"),
    "unknown key of status": (
        {},
        {"status": {"colum": "y", "values": {}}},
        "status.colum; did you mean 'column'",
    ),
    "unknown status label": (
        {"s": ["ok"] * 20},
        {"status": {"column": "s", "values": {"ok": "finit"}}},
        "unknown status 'finit' for the value 'ok'.*did you mean 'finite'",
    ),
    "status value not in the map": (
        {"s": ["ok"] * 19 + ["cuts"]},
        {"status": STATUS},
        "must be in its map, got 'cuts' in row 20; did you mean 'cut'",
    ),
    "status value with two meanings": (
        {"s": ["true"] * 20},
        {"status": {"column": "s", "values": {"TRUE": "finite", "true": "missing"}}},
        "must give a value one meaning, got two for 'true'",
    ),
    "row without a status": (
        {"s": ["ok"] * 19 + [None]},
        {"status": STATUS},
        "must have a status, got none.*row 20",
    ),
    "unknown split": (
        {"k": ["train"] * 19 + ["tset"]},
        {"split": {"column": "k"}},
        "got 'tset'.*mean 'test'",
    ),
    "unknown split in the map": (
        FOLD,
        {"split": {"column": "k", "values": {"train": "fit"}}},
        "unknown split 'fit'.*known: train, val, test",
    ),
    "row without a split": (
        {"k": ["train"] * 19 + [None]},
        {"split": {"column": "k"}},
        "must have a split.*row 20",
    ),
    "split without val": (
        {"k": ["train"] * 19 + ["test"]},
        {"split": {"column": "k"}},
        "val split.*too few rows",
    ),
    "NaN input": ({"x": [*X[:19], "nan"]}, {}, "inputs must be finite, got no value .*column 'x', row 20"),
    "empty input": ({"x": [*X[:19], None]}, {}, "inputs must be finite, got no value .*column 'x', row 20"),
    "infinite input": (
        {"x": [*X[:19], "inf"]},
        {"missing_inputs": "mean"},
        "inputs must be finite, got inf in column 'x', row 20",
    ),
    "text among numbers": (
        {"x": [*X[:19], "<3"]},
        {"types": {"x": "numeric"}},
        "column 'x' must hold numbers, got '<3' in row 20",
    ),
    "text as target": ({"y": [*Y[:19], "<3"]}, {}, "column 'y' must hold numbers, got '<3' in row 20"),
    "text as date": ({"x": ["soon"] * 20}, {"types": {"x": "date"}}, "column 'x' must hold dates"),
    "too many levels": (
        {"x": [f"id{i}" for i in range(20)]},
        {"max_levels": 5},
        "at most max_levels=5 levels, got 12",
    ),
    "input missing in training": (
        {"x": [None] * 12 + X[12:], **FOLD},
        {"missing_inputs": "mean", "split": {"column": "k"}},
        "input 'x' must have a value in the training split",
    ),
    "every row lacks an input": ({"x": [None] * 20}, {"missing_inputs": "drop"}, "drop must leave rows"),
    "all rows missing": ({"y": [None] * 20}, {}, "target 'y' must have values, got none in 20 rows"),
    "no finite row in training": (
        {"y": [None] * 12 + Y[12:], **FOLD},
        {"split": {"column": "k"}},
        "train split must have a finite row",
    ),
    "no finite row in val": (
        {"y": Y[:12] + [None] * 4 + Y[16:], **FOLD},
        {"split": {"column": "k"}},
        "val split must have a finite row",
    ),
    "infinite target": ({"y": [*Y[:19], "inf"]}, {}, "finite target 'y' must be finite, got inf in row 20"),
    "log of zero": ({"y": [0.0, *Y[1:]]}, {"target_transform": "log"}, "log needs 'y' > 0, got 0.0 in row 1"),
    "too few rows": ({"x": [1.0, 2.0], "y": [1.0, 2.0]}, {}, "too few rows: train"),
    "unknown transform": (
        {},
        {"target_transform": "lgo"},
        "unknown target_transform 'lgo'.*did you mean 'log'",
    ),
    "unknown rule": (
        {},
        {"missing_inputs": "skip"},
        "unknown missing_inputs 'skip'.*known: error, mean, drop",
    ),
    "unknown type": (
        {},
        {"types": {"x": "number"}},
        "unknown type of 'x' 'number'.*known: numeric",
    ),
    "type of no input": ({}, {"types": {"z": "date"}}, "types must name inputs, got 'z'"),
    "fractions that do not sum": ({}, {"fractions": [0.5, 0.2, 0.2]}, "fractions must sum to 1"),
    "two fractions": ({}, {"fractions": [0.5, 0.5]}, "fractions must be three shares"),
    "fractions as text": ({}, {"fractions": "half"}, "fractions must be three numbers"),
    "negative split seed": ({}, {"split_seed": -1}, "split_seed must be >= 0, got -1"),
    "split seed as text": ({}, {"split_seed": "0"}, "split_seed must be a whole number, got '0'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_table_is_one_line_that_names_rule_and_value(case: str, write_csv: WriteCsv) -> None:
    """Each way to be wrong says what is asked for, what came instead, and the nearest good name."""
    columns, params, message = BAD[case]
    with pytest.raises(TaskError, match=message) as caught:
        table(write_csv, {"x": X, "y": Y} | columns, **params)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("nh3.csv", None, "the data file must exist, got .*nh3.csv; did you mean 'nh4.csv'"),
        ("empty.csv", "", "got the empty file"),
        ("header.csv", "x,y\n", "got .*header.csv with a header alone"),
        ("ragged.csv", "x,y\n1,2\n1,2,3\n", "cannot read .*ragged.csv"),
        ("twice.csv", "x,x,y\n1,2,3\n", "column names must be unique, got 'x'"),
        ("table.xls", "x", "must end in .csv, .tsv, .parquet or .pq"),
        ("not.parquet", "x,y\n1,2\n", "cannot read .*not.parquet"),
    ],
)
def test_bad_file_is_one_line(name: str, text: str | None, message: str, tmp_path: Path) -> None:
    """A file that is absent, empty, broken or of another kind is named with its path."""
    (tmp_path / "nh4.csv").write_text("x,y\n1,2\n", encoding="utf-8")
    if text is not None:
        (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(TaskError, match=message) as caught:
        make_table_task({"data": str(tmp_path / name), "inputs": ["x"], "target": "y"})
    assert "\n" not in str(caught.value)


def test_empty_parquet_is_refused(tmp_path: Path) -> None:
    """No rows is no data, in either format."""
    pq.write_table(pa.table({"x": pa.array([], pa.float64())}), tmp_path / "empty.parquet")
    with pytest.raises(TaskError, match="must hold rows"):
        make_table_task({"data": str(tmp_path / "empty.parquet"), "inputs": ["x"], "target": "y"})


def test_a_target_far_outside_the_training_range_is_refused(write_csv: WriteCsv) -> None:
    """Scaled by the training rows it would be infinite for the model; the row of the file is named."""
    columns = {"x": X, "y": [*Y[:18], 1e300, 1.0], "s": ["train"] * 16 + ["val", "test"] * 2}
    with pytest.raises(TaskError, match=r"must stay within float32 .* got 1e\+300 in row 19"):
        table(write_csv, columns, split={"column": "s"})


def test_a_column_that_has_no_text_is_no_category(tmp_path: Path) -> None:
    """A list in a cell is refused also where the plan says that it is a category."""
    pq.write_table(pa.table({"x": [[1, 2]] * 20, "y": Y}), tmp_path / "lists.parquet")
    params = {"data": str(tmp_path / "lists.parquet"), "inputs": "x", "target": "y"}
    with pytest.raises(TaskError, match="column 'x' must hold text, got the type list"):
        make_table_task(params | {"types": {"x": "categorical"}})


def test_column_names_in_another_encoding_are_refused(tmp_path: Path) -> None:
    """A header that is not UTF-8 is said to be that."""
    (tmp_path / "latin.csv").write_bytes("größe,y\n1,2\n".encode("latin-1"))
    with pytest.raises(TaskError, match="names of the columns must be UTF-8, got b'gr"):
        make_table_task({"data": str(tmp_path / "latin.csv"), "inputs": "x", "target": "y"})
