"""A trained model for use elsewhere: its weights as safetensors, and the record of its threshold beside them.

    FOLDER/model.safetensors   weights; in its metadata the task, the config, the seed and the digests
    FOLDER/calibration.json    the frozen threshold (`scm.inference.calibration.CalibrationRecord`)

Neither file runs anything when it is read, and each is refused where it is damaged, changed, or not of the
other.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from scm.inference.calibration import CalibrationRecord, calibrated_decode
from scm.inference.strict import InferenceResult
from scm.training.checkpoint import CheckpointError
from trainables.trained import Trained, make_trained

MODEL_FILE = "model.safetensors"
RECORD_FILE = "calibration.json"
FORMAT = "scm_harness.exported"
VERSION = "1"


@dataclass(frozen=True, eq=False)
class Exported:
    """A model with the threshold that was calibrated for it."""

    trained: Trained
    record: CalibrationRecord

    def answer(self, inputs: Tensor) -> InferenceResult:
        """Decode the model's answers to inputs (N, ...) in the task's form, with the frozen threshold."""
        weight = next(self.trained.model.parameters())
        given = inputs.to(weight.dtype) if inputs.is_floating_point() else inputs
        with torch.no_grad():
            P, Q = self.trained.model(given.to(weight.device))[:2]
        return calibrated_decode(P, Q, self.record, gauge=self.record.gauge)


def write_exported(folder: str | os.PathLike[str], trained: Trained, record: CalibrationRecord) -> Path:
    """Write a model and its record into a folder, made where it is missing; return the folder.

    Raises OSError where it cannot be written; a file is there whole or not at all.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    # Copies: weights that share memory cannot be stored, and a view would store all that it is a view of.
    weights = {
        name: item.detach().cpu().contiguous().clone() for name, item in trained.model.state_dict().items()
    }
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "spec": json.dumps(dict(trained.spec), sort_keys=True, default=str),
        "config": json.dumps(dict(trained.config), sort_keys=True, allow_nan=False),
        "seed": str(trained.seed),
        "data_digest": trained.data_digest,
        "model_digest": trained.digest,
        "calibration_digest": record.digest,
    }
    _write_whole(target / RECORD_FILE, (record.to_json() + "\n").encode())
    _write_whole(target / MODEL_FILE, safetensors.torch.save(weights, metadata=metadata))
    return target


def read_exported(
    folder: str | os.PathLike[str], *, base_dir: str | os.PathLike[str] | None = None, device: str = "cpu"
) -> Exported:
    """Read what `write_exported` wrote; the task builds the model, so its data must be there.

    `base_dir`: the folder that the task's relative paths start from, where it is another than at the export.
    Raises FileNotFoundError; CheckpointError for weights that are damaged, changed, of another kind or
    version, not of this record, or of other shapes than the model that the task builds now; CalibrationError
    for a record that was changed; and whatever the task raises.
    """
    source = Path(folder)
    for name in (MODEL_FILE, RECORD_FILE):
        if not (source / name).is_file():
            raise FileNotFoundError(f"{source} is no exported model: it holds no {name}")
    weights, metadata = _read_weights(source / MODEL_FILE)
    record = CalibrationRecord.from_json((source / RECORD_FILE).read_text(encoding="utf-8"))
    if metadata["calibration_digest"] != record.digest:
        raise CheckpointError(f"{source}: {RECORD_FILE} is not the record that {MODEL_FILE} was written with")
    spec = json.loads(metadata["spec"])
    if base_dir is not None:
        spec["base_dir"] = str(base_dir)
    trained = make_trained(
        spec, json.loads(metadata["config"]), int(metadata["seed"]), weights, device=device
    )
    if trained.digest != metadata["model_digest"]:
        raise CheckpointError(f"{source / MODEL_FILE}: its weights are not those that were written")
    return Exported(trained, record)


def _read_weights(path: Path) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no mapping
    except (safetensors.SafetensorError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read, it is truncated or damaged: {error}") from error
    if metadata.get("format") != FORMAT:
        raise CheckpointError(f"{path} must be of {FORMAT}, got {metadata.get('format')!r}")
    if metadata.get("version") != VERSION:
        raise CheckpointError(f"{path} must have version {VERSION}, got {metadata.get('version')!r}")
    needed = ("spec", "config", "seed", "model_digest", "calibration_digest")
    missing = [name for name in needed if name not in metadata]
    if missing:
        raise CheckpointError(f"{path} must say {', '.join(needed)}; it says nothing of {', '.join(missing)}")
    return weights, metadata


def _write_whole(path: Path, content: bytes) -> None:
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
