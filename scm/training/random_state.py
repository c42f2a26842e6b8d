"""The global random states of a process: taken down, put back, and kept apart for one training.

Which draws belong to a training is decided by the trainer; named streams are made in `scm.seeding`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from scm.seeding import generator, seed_for

RandomState = dict[str, Any]
"""The states as tensors and plain values, so that a checkpoint may be read without unpickling code."""


class _States(NamedTuple):
    """The states as their generators give and take them, which costs a fifth of the plain form."""

    torch: Tensor
    cuda: Tensor | None
    numpy: Any
    python: tuple[Any, ...]


def _take(device: torch.device) -> _States:
    """Return the states of torch's (CPU, and `device` if it is CUDA), NumPy's and Python's generators."""
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return _States(torch.get_rng_state(), cuda, np.random.get_state(legacy=True), random.getstate())


def _put(states: _States, device: torch.device) -> None:
    torch.set_rng_state(states.torch)
    if device.type == "cuda" and states.cuda is not None:
        torch.cuda.set_rng_state(states.cuda, device)
    np.random.set_state(states.numpy)
    random.setstate(states.python)


def _seeded(seed: int, stream: str, device: torch.device) -> _States:
    """Return the global states that a training with this seed begins with; nothing is changed."""
    cuda = generator(seed, stream, device).get_state() if device.type == "cuda" else None
    numpy = np.random.RandomState(seed_for(seed, f"{stream}/numpy") % 2**32).get_state(legacy=True)
    python = random.Random(seed_for(seed, f"{stream}/python")).getstate()
    return _States(generator(seed, stream).get_state(), cuda, numpy, python)


def _plain(states: _States) -> RandomState:
    name, keys, position, has_gauss, gauss = states.numpy
    version, words, next_gauss = states.python
    return {
        "torch": states.torch,
        "cuda": states.cuda,
        "numpy": {
            "name": str(name),
            "keys": torch.from_numpy(np.asarray(keys).astype(np.int64)),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "gauss": float(gauss),
        },
        "python": {"version": version, "words": torch.tensor(words), "next_gauss": next_gauss},
    }


def _from_plain(state: Mapping[str, Any]) -> _States:
    cuda, numpy, python = state["cuda"], state["numpy"], state["python"]
    keys = numpy["keys"].cpu().numpy().astype(np.uint32)
    return _States(
        state["torch"].cpu(),
        None if cuda is None else cuda.cpu(),
        (numpy["name"], keys, numpy["position"], numpy["has_gauss"], numpy["gauss"]),
        (python["version"], tuple(python["words"].tolist()), python["next_gauss"]),
    )


class OwnRandomState:
    """Global random states that belong to one training: in place while it works, out of sight otherwise.

    Without a seed there is nothing to keep apart: the training draws from the process's own states.
    """

    def __init__(self, seed: int | None, device: torch.device) -> None:
        self._device = device
        self._kept = None if seed is None else _seeded(seed, "model", device)
        self._inside = False

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Exchange the process's states for the training's own during the block."""
        if self._kept is None:
            yield
            return
        outer = _take(self._device)
        _put(self._kept, self._device)
        self._inside = True
        try:
            yield
        finally:
            self._inside = False
            self._kept = _take(self._device)
            _put(outer, self._device)

    def state(self) -> RandomState:
        """Return the training's states as they are now, inside the block or out of it."""
        if self._kept is None or self._inside:
            return _plain(_take(self._device))
        return _plain(self._kept)

    def put(self, state: Mapping[str, Any]) -> None:
        """Make `state` the training's, inside the block or out of it."""
        if self._kept is None or self._inside:
            _put(_from_plain(state), self._device)
        else:
            self._kept = _from_plain(state)


@contextmanager
def unmoved_random_state(device: torch.device) -> Iterator[None]:
    """Put the global states back as they were when the block ends."""
    before = _take(device)
    try:
        yield
    finally:
        _put(before, device)
