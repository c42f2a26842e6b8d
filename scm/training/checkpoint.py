"""Checkpoints as files: written whole or not at all, read without running code, refused with reasons.

What a training keeps is decided in the trainer; here is how it gets to a disk and back, and what must agree
before anything of it is used.
"""

from __future__ import annotations

import io
import os
import pickle
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SCHEMA_NAME = "scm.training.checkpoint"
SCHEMA_VERSION = 1


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or that belongs to something else; the message says which."""


def write_checkpoint(path: str | os.PathLike[str], payload: Mapping[str, Any]) -> None:
    """Write the payload so that `path` holds either what it held before, or all of the new file.

    The file is written beside, flushed to the disk and renamed. Raises OSError when the folder is missing or
    full; no part of a file is left behind then.
    """
    target = Path(path)
    content = {"schema_name": SCHEMA_NAME, "schema_version": SCHEMA_VERSION, **payload}
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
    beside = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, target)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    _flush_folder(target.parent)


def _flush_folder(folder: Path) -> None:
    """Make the new name itself survive a power cut, where the system can open folders."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_checkpoint(path: str | os.PathLike[str], map_location: torch.device | str = "cpu") -> dict[str, Any]:
    """Read a payload that `write_checkpoint` wrote; nothing in the file is run.

    Raises FileNotFoundError when there is none, CheckpointError when it is truncated, damaged, holds objects
    other than tensors and plain values, or is of another kind or version.
    """
    target = Path(path)
    if not target.is_file():
        raise FileNotFoundError(f"no checkpoint at {target}")
    held = target.read_bytes()
    try:
        _check_sums(held)
        # From memory: torch reads a cut file with errors of the system, which would pass for the disk's own.
        content = torch.load(io.BytesIO(held), map_location=map_location, weights_only=True)
    except (
        pickle.UnpicklingError,
        zipfile.BadZipFile,
        EOFError,
        RuntimeError,
        ValueError,
        KeyError,
    ) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"checkpoint {target} cannot be read, it is truncated or damaged: {reason}"
        ) from error
    if not isinstance(content, dict) or content.get("schema_name") != SCHEMA_NAME:
        found = content.get("schema_name") if isinstance(content, dict) else type(content).__name__
        raise CheckpointError(f"checkpoint {target} must be of {SCHEMA_NAME}, got {found!r}")
    if content.get("schema_version") != SCHEMA_VERSION:
        version = content.get("schema_version")
        raise CheckpointError(
            f"checkpoint {target} must have schema_version {SCHEMA_VERSION}, got {version!r}"
        )
    return content


def _check_sums(held: bytes) -> None:
    """Raise ValueError when a member does not have its checksum, which torch writes and does not read."""
    with zipfile.ZipFile(io.BytesIO(held)) as archive:
        if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
            raise ValueError("its members must be stored as they are")
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"{damaged} does not have its checksum")


def check_identity(saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Raise CheckpointError that names every field in which the two differ."""
    names = sorted({*saved, *current})
    differing = [
        f"{name} (saved {saved.get(name)!r}, now {current.get(name)!r})"
        for name in names
        if saved.get(name) != current.get(name)
    ]
    if differing:
        raise CheckpointError(f"the checkpoint was written under another config: {', '.join(differing)}")


def check_shapes(saved: Mapping[str, Tensor], current: Mapping[str, Tensor], *, owner: str) -> None:
    """Raise CheckpointError that names the tensors that are missing, unexpected, or of another shape."""
    missing = sorted(set(current) - set(saved))
    unexpected = sorted(set(saved) - set(current))
    shapes = [
        f"{name} (saved {tuple(saved[name].shape)}, now {tuple(current[name].shape)})"
        for name in current
        if name in saved
        and isinstance(saved[name], Tensor)
        and isinstance(current[name], Tensor)
        and saved[name].shape != current[name].shape
    ]
    found = [
        f"{word} {', '.join(names)}"
        for word, names in (("missing", missing), ("unexpected", unexpected), ("other shapes:", shapes))
        if names
    ]
    if found:
        raise CheckpointError(f"the checkpoint is of another {owner}: {'; '.join(found)}")
