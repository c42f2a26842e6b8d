"""Where randomness comes from: one seed per trial, one independent stream per purpose.

A trial has one seed. Initialisation, the order of the rows, the training thresholds and what the model
draws itself (dropout) each take a stream of their own, so that changing how much one of them draws leaves
the others as they were. What the streams are used for is decided by the callers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_SEED_BITS = 63  # torch takes seeds up to 2**64 - 1, NumPy and databases are at home up to 2**63 - 1


def seed_for(seed: int, stream: str) -> int:
    """Return the seed of one named stream of a trial: the same on every machine and version of Python.

    The result lies in [0, 2**63). Different streams, and different trial seeds, give unrelated values.
    Raises TypeError if `seed` is not an int or `stream` not a str, ValueError if `stream` is empty.

    >>> seed_for(0, "order") == seed_for(0, "order")
    True
    >>> seed_for(0, "order") == seed_for(0, "tau")
    False
    """
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be an int, got {seed=}")
    if not isinstance(stream, str):
        raise TypeError(f"stream must be a str, got {stream=}")
    if not stream:
        raise ValueError(f"stream must not be empty, got {stream=}")
    digest = hashlib.sha256(f"{seed}\x1f{stream}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> (64 - _SEED_BITS)


def generator(seed: int, stream: str, device: str | torch.device = "cpu") -> torch.Generator:
    """Make the generator of one named stream of a trial, on `device`."""
    made = torch.Generator(device=device)
    made.manual_seed(seed_for(seed, stream))
    return made


@contextmanager
def seeded_init(seed: int, stream: str = "init") -> Iterator[None]:
    """Seed the global generators of the CPU and the GPUs for the block, and put them back when it ends.

    For code that takes no generator, such as the initialisation of `torch.nn` modules.
    """
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    with torch.random.fork_rng(devices=devices):
        # Where there is no GPU, `torch.manual_seed` would take note of where each call came from, for the
        # day on which there is one: that costs more than building a small model.
        torch.default_generator.manual_seed(seed_for(seed, stream))
        if devices:
            torch.cuda.manual_seed_all(seed_for(seed, stream))
        yield
