"""Held-back rows, thresholds on them, and models written with their record and read back."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from scm.inference.calibration import CalibrationError, CalibrationRecord
from scm.training.checkpoint import CheckpointError
from trainables.exported import MODEL_FILE, RECORD_FILE, read_exported, write_exported
from trainables.held_back import CALIBRATION, calibrate_together, denominators, hold_back
from trainables.loading import load_task
from trainables.trained import Trained, train_models

SPEC = {"name": "dose", "params": {"n_train": 200, "n_val": 50, "n_test": 60}, "base_dir": "."}
CONFIG = {"max_epochs": 2, "hidden_width": 8, "tau_train_min": 0.3, "tau_train_max": 0.3, "tau_infer": 0.1}


@pytest.fixture(scope="module")
def models() -> list[Trained]:
    """Two models of one config, trained without their held-back rows."""
    found = train_models(
        SPEC,
        [(f"s{seed}", CONFIG, seed) for seed in (3, 4)],
        deal=lambda splits, seed: hold_back(splits, seed, share=0.2),
    )
    trained = [one for one in found.values() if isinstance(one, Trained)]
    assert len(trained) == 2
    return trained


@pytest.fixture(scope="module")
def record(models: list[Trained]) -> CalibrationRecord:
    return calibrate_together(models, max_false_reject=0.1, tau_max=0.3)


@pytest.fixture
def exported(models: list[Trained], record: CalibrationRecord, tmp_path: Path) -> Path:
    return write_exported(tmp_path / "model", models[0], record)


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_held_back_rows_leave_the_training_split_and_nothing_else_changes(share: float) -> None:
    """No row is lost or in both, rows with a value are held back in proportion, the seed decides which."""
    splits = load_task(SPEC, 0).splits
    dealt = hold_back(splits, 7, share=share)
    assert len(dealt["train"]) + len(dealt[CALIBRATION]) == len(splits["train"])
    assert dealt["val"] is splits["val"]
    assert dealt["test"] is splits["test"]
    rows = [tuple(row) for name in ("train", CALIBRATION) for row in dealt[name].inputs.tolist()]
    assert sorted(rows) == sorted(tuple(row) for row in splits["train"].inputs.tolist())
    finite = splits["train"].targets.mask_finite.sum()
    assert abs(int(dealt[CALIBRATION].targets.mask_finite.sum()) - share * int(finite)) <= 1
    assert hold_back(splits, 7, share=share)[CALIBRATION].digest() == dealt[CALIBRATION].digest()
    assert hold_back(splits, 8, share=share)[CALIBRATION].digest() != dealt[CALIBRATION].digest()


def test_a_share_that_leaves_one_split_empty_is_refused() -> None:
    """All or nothing is no split."""
    with pytest.raises(ValueError, match="share must lie in"):
        hold_back(load_task(SPEC, 0).splits, 0, share=1.0)


def test_a_model_does_not_see_what_is_held_back(models: list[Trained]) -> None:
    """Its training split is the smaller one; the digest of its data stays that of the task."""
    for model in models:
        assert len(model.splits["train"]) == 160
        assert len(model.splits[CALIBRATION]) == 40
        assert model.data_digest == load_task(SPEC, model.seed).data_digest


def test_the_threshold_of_models_together_keeps_its_bound_and_limit(
    models: list[Trained], record: CalibrationRecord
) -> None:
    """At most a tenth of the held-back rows with a value is rejected; the limit holds where more could be."""
    q_abs = torch.cat([denominators(model, model.splits[CALIBRATION])[0] for model in models])
    in_range = torch.cat([denominators(model, model.splits[CALIBRATION])[1] for model in models])
    rejected = (q_abs[in_range] < record.tau_infer).double().mean()
    assert float(rejected) <= 0.1
    assert record.counts["in_range"] == int(in_range.sum())
    assert record.split == CALIBRATION
    assert record.gauge == "unit"
    low = calibrate_together(models, max_false_reject=0.1, tau_max=1e-4)
    assert low.tau_infer <= 1e-4
    assert low.tau_infer == pytest.approx(1e-4)


def test_too_few_held_back_rows_are_refused(models: list[Trained]) -> None:
    """A rate on a handful of rows is no rate."""
    few = [
        replace(model, splits={**model.splits, CALIBRATION: model.splits[CALIBRATION].take(torch.arange(4))})
        for model in models
    ]
    with pytest.raises(CalibrationError, match="too few, at least 20"):
        calibrate_together(few, max_false_reject=0.1, tau_max=0.3)


def test_rows_that_are_reported_on_cannot_calibrate(models: list[Trained]) -> None:
    """The test split under another name is found by what it holds."""
    for name in ("val", "test"):
        same = replace(models[0], splits={**models[0].splits, CALIBRATION: models[0].splits[name]})
        with pytest.raises(CalibrationError, match=f"split '{name}' are reported on"):
            calibrate_together([models[1], same], max_false_reject=0.1, tau_max=0.3)


def test_an_exported_model_answers_as_the_one_that_was_written(
    models: list[Trained], record: CalibrationRecord, exported: Path
) -> None:
    """Weights bit for bit, config, seed, record; its answers are bottom below the frozen threshold."""
    read = read_exported(exported)
    assert read.trained.digest == models[0].digest
    assert read.trained.config == models[0].config
    assert read.trained.seed == models[0].seed
    assert read.record == record
    inputs = models[0].splits["test"].inputs
    with torch.no_grad():
        P, Q = models[0].model(inputs)[:2]
    answers = read.answer(inputs)
    assert torch.equal(answers.bottom_mask, Q.abs() < record.tau_infer)
    accepted = ~answers.bottom_mask
    assert torch.equal(answers.decoded[accepted], (P / Q)[accepted])


def test_an_exported_model_is_plain_safetensors(models: list[Trained], exported: Path) -> None:
    """Any reader of the format has the weights, without this project."""
    weights = safetensors.torch.load_file(exported / MODEL_FILE)
    assert set(weights) == set(models[0].model.state_dict())


def _resize(folder: Path) -> None:
    _rewrite(
        folder,
        lambda weights: {name: item.repeat(2, *[1] * (item.ndim - 1)) for name, item in weights.items()},
    )


def _rename(folder: Path) -> None:
    _rewrite(folder, lambda weights: {f"x{name}": item for name, item in weights.items()})


def _change(folder: Path) -> None:
    _rewrite(folder, lambda weights: {name: item + 1 for name, item in weights.items()})


def _rewrite(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    with safetensors.safe_open(folder / MODEL_FILE, framework="pt") as file:
        metadata = file.metadata()
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    safetensors.torch.save_file(change(weights), folder / MODEL_FILE, metadata=metadata)


def _cut(folder: Path) -> None:
    held = (folder / MODEL_FILE).read_bytes()
    (folder / MODEL_FILE).write_bytes(held[: len(held) // 2])


def _foreign(folder: Path) -> None:
    safetensors.torch.save_file({"weight": torch.ones(1)}, folder / MODEL_FILE)


def _other_record(folder: Path) -> None:
    record = CalibrationRecord.from_json((folder / RECORD_FILE).read_text(encoding="utf-8"))
    (folder / RECORD_FILE).write_text(replace(record, tau_infer=0.25).to_json(), encoding="utf-8")


def _edited_record(folder: Path) -> None:
    plain = json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))
    (folder / RECORD_FILE).write_text(json.dumps({**plain, "tau_infer": 0.25}), encoding="utf-8")


@pytest.mark.parametrize(
    "damage, error, message",
    [
        (_resize, CheckpointError, "other shapes"),
        (_rename, CheckpointError, "missing"),
        (_change, CheckpointError, "not those that were written"),
        (_cut, CheckpointError, "truncated or damaged"),
        (_foreign, CheckpointError, "must be of scm_harness.exported"),
        (_other_record, CheckpointError, "is not the record"),
        (_edited_record, CalibrationError, "altered after it was written"),
        (lambda folder: (folder / RECORD_FILE).unlink(), FileNotFoundError, "holds no calibration.json"),
    ],
    ids=["shapes", "names", "values", "cut", "foreign", "other record", "edited record", "no record"],
)
def test_a_model_that_is_not_the_one_that_was_written_is_refused(
    damage: Callable[[Path], None], error: type[Exception], message: str, exported: Path
) -> None:
    """Whatever was done to either file, it is named, and no model comes back."""
    damage(exported)
    with pytest.raises(error, match=message):
        read_exported(exported)
