"""Where trials of a pack, and trials alone, stand between two epochs, as what travels to another process."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class LaneState:
    """Where a trial of a pack stands between two epochs, as plain values and arrays that travel well."""

    lane: Mapping[str, Any]
    held: Mapping[str, np.ndarray]
    optimizer: Mapping[str, np.ndarray]
    best: np.ndarray | None
    spent_s: float


@dataclass(frozen=True)
class AloneState:
    """Where a trial that trains alone stands: its files as bytes, and why it trains alone."""

    files: bytes
    note: str


def split_state(state: Mapping[str, Any]) -> dict[str, LaneState]:
    """Return the state of each running trial of a pack, by key."""
    held = {name: item.numpy() for name, item in state["held"].items()}
    states = {}
    for place, lane in enumerate(state["lanes"]):
        best = state["best"].get(lane["key"])
        states[lane["key"]] = LaneState(
            lane,
            {name: item[place].copy() for name, item in held.items()},
            {name: item.numpy() for name, item in state["optimizers"][place].items()},
            None if best is None else best.numpy(),
            0.0,
        )
    return states


def joined_state(states: Sequence[LaneState]) -> dict[str, Any]:
    """Return the state of a pack of these trials, wherever each of them was before."""
    return {
        "lanes": [state.lane for state in states],
        "held": {
            name: torch.from_numpy(np.stack([state.held[name] for state in states]))
            for name in states[0].held
        },
        "optimizers": [
            {name: torch.from_numpy(np.array(item)) for name, item in state.optimizer.items()}
            for state in states
        ],
        "best": {
            state.lane["key"]: torch.from_numpy(np.array(state.best))
            for state in states
            if state.best is not None
        },
        "waiting": [],
    }


def pack_folder(folder: Path) -> bytes:
    """The files of a folder as bytes."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for path in sorted(folder.iterdir()):
            archive.add(path, arcname=path.name)
    return packed.getvalue()


def unpack_folder(packed: bytes, folder: Path) -> None:
    """Write the files that `pack_folder` packed into a folder."""
    with tarfile.open(fileobj=io.BytesIO(packed), mode="r") as archive:
        archive.extractall(folder, filter="data")
