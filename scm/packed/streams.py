"""What a trial draws while it trains, epoch by epoch, as it would draw it alone.

Orders and thresholds depend on a trial's seed and on nothing else, so trials of one seed share them. Which
streams there are is decided in `scm.trial`; what they are used for, by the callers.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor

from scm.seeding import generator

_KEPT_BYTES = 64 * 2**20


class EpochStream:
    """What one stream of every seed gives in each epoch: drawn once, kept while there is room.

    draw: called with the seed's generator, once an epoch, in order. Epochs may be asked for in any order;
    one that is no longer kept is drawn again from the beginning.
    """

    def __init__(self, stream: str, draw: Callable[[torch.Generator], Tensor]) -> None:
        self._stream = stream
        self._draw = draw
        self._kept: OrderedDict[tuple[int, int], Tensor] = OrderedDict()
        self._bytes = 0
        self._next: dict[
            int, tuple[int, torch.Generator]
        ] = {}  # by seed: the epoch that comes, and its source

    def of(self, seed: int, epoch: int) -> Tensor:
        """Return what the trials of `seed` draw in `epoch`; not to be written to."""
        held = self._kept.get((seed, epoch))
        if held is not None:
            self._kept.move_to_end((seed, epoch))
            return held
        place, source = self._next.get(seed, (0, None))
        if source is None or place > epoch:
            place, source = 0, generator(seed, self._stream)
        drawn = self._draw(source)
        for _ in range(epoch - place):
            drawn = self._draw(source)
        self._next[seed] = (epoch + 1, source)
        self._keep((seed, epoch), drawn)
        return drawn

    def _keep(self, key: tuple[int, int], drawn: Tensor) -> None:
        self._kept[key] = drawn
        self._bytes += drawn.numel() * drawn.element_size()
        while self._bytes > _KEPT_BYTES and len(self._kept) > 1:
            _, dropped = self._kept.popitem(last=False)
            self._bytes -= dropped.numel() * dropped.element_size()


def row_orders(rows: int) -> EpochStream:
    """Return the orders of `rows` rows, int64 (rows,): those of `TensorBatches`, "order"."""
    return EpochStream("order", lambda source: torch.randperm(rows, generator=source))


def threshold_shares(steps: int) -> EpochStream:
    """Return where between its bounds each of an epoch's thresholds lies, float64 (steps,): stream "tau".

    They are the draws of `perturbed_threshold`, which takes one number a step from its generator.
    """
    return EpochStream("tau", lambda source: torch.rand(steps, generator=source).double())


def thresholds(low: Tensor, high: Tensor, shares: Tensor) -> Tensor:
    """Return low + (high - low)·share, never outside of the bounds, as `perturbed_threshold` does it.

    low, high: (trials,) float64. shares: (steps, trials). Returns (steps, trials).
    """
    return torch.minimum(torch.maximum(low + (high - low) * shares, low), high)
