"""The global random states of a process: taken down, put back, and kept apart for one training.

Which draws belong to a training is decided by the trainer; named streams are made in `scm.seeding`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scm.seeding import generator, seed_for

RandomState = dict[str, Any]


def take_random_state(device: torch.device) -> RandomState:
    """Return the states of torch's (CPU, and `device` if it is CUDA), NumPy's and Python's generators.

    Only tensors and plain values, so that a checkpoint may be read without unpickling code.
    """
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return _plain(torch.get_rng_state(), cuda, np.random.get_state(legacy=True), random.getstate())


def put_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Put back what `take_random_state` returned."""
    torch.set_rng_state(state["torch"].cpu())
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
    held = state["numpy"]
    keys = held["keys"].cpu().numpy().astype(np.uint32)
    np.random.set_state((held["name"], keys, held["position"], held["has_gauss"], held["gauss"]))
    held = state["python"]
    random.setstate((held["version"], tuple(held["words"].tolist()), held["next_gauss"]))


def seeded_random_state(seed: int, stream: str, device: torch.device) -> RandomState:
    """Return the global states that a training with this seed begins with; nothing is changed."""
    cuda = generator(seed, stream, device).get_state() if device.type == "cuda" else None
    numpy = np.random.RandomState(seed_for(seed, f"{stream}/numpy") % 2**32).get_state(legacy=True)
    python = random.Random(seed_for(seed, f"{stream}/python")).getstate()
    return _plain(generator(seed, stream).get_state(), cuda, numpy, python)


def _plain(cpu: Tensor, cuda: Tensor | None, numpy: Any, python: tuple[Any, ...]) -> RandomState:
    name, keys, position, has_gauss, gauss = numpy
    version, words, next_gauss = python
    return {
        "torch": cpu,
        "cuda": cuda,
        "numpy": {
            "name": str(name),
            "keys": torch.from_numpy(np.asarray(keys).astype(np.int64)),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "gauss": float(gauss),
        },
        "python": {"version": version, "words": torch.tensor(words), "next_gauss": next_gauss},
    }


class OwnRandomState:
    """Global random states that belong to one training: in place while it works, out of sight otherwise.

    Without a seed there is nothing to keep apart: the training draws from the process's own states.
    """

    def __init__(self, seed: int | None, device: torch.device) -> None:
        self._device = device
        self._kept = None if seed is None else seeded_random_state(seed, "model", device)
        self._inside = False

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Exchange the process's states for the training's own during the block."""
        if self._kept is None:
            yield
            return
        outer = take_random_state(self._device)
        put_random_state(self._kept, self._device)
        self._inside = True
        try:
            yield
        finally:
            self._inside = False
            self._kept = take_random_state(self._device)
            put_random_state(outer, self._device)

    def state(self) -> RandomState:
        """Return the training's states as they are now, inside the block or out of it."""
        if self._kept is None or self._inside:
            return take_random_state(self._device)
        return self._kept

    def put(self, state: Mapping[str, Any]) -> None:
        """Make `state` the training's, inside the block or out of it."""
        if self._kept is None or self._inside:
            put_random_state(state, self._device)
        else:
            self._kept = dict(state)


@contextmanager
def unmoved_random_state(device: torch.device) -> Iterator[None]:
    """Put the global states back as they were when the block ends."""
    before = take_random_state(device)
    try:
        yield
    finally:
        put_random_state(before, device)
