"""What the tasks with generated data share: sizes by name, where each split's randomness comes from, and
which splits are kept.

The problems themselves are in `dose`, `rf` and `rr_ik`, each with a `_data` module that draws its rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from scm.seeding import seed_for
from trainables.tasks.protocol import POLE_DISTANCE, TaskError, check_params, nearest

if TYPE_CHECKING:
    from scm.data import Split

SHIFTED_ROWS = 1_000  # the most rows of a shifted split: enough for a share to within 0.016
_COMMON = ("size", "n_train", "n_val", "n_test", "data_seed", "redraw_data")


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawnData:
    """How much is drawn, and from which seed; valid once built.

    `data_seed` fixes the data for all trials, so that trials of a sweep differ in training alone. With
    `redraw_data` each trial's seed draws data of its own instead, so that the spread over seeds is the spread
    over data as well; selection on validation then sees another draw at each seed.
    """

    n_train: int
    n_val: int
    n_test: int
    data_seed: int = 0
    redraw_data: bool = False

    def __post_init__(self) -> None:
        for name in ("n_train", "n_val", "n_test"):
            check_count(name, getattr(self, name), least=1)
        check_count("data_seed", self.data_seed, least=0)
        if not isinstance(self.redraw_data, bool):
            raise TaskError(f"redraw_data must be true or false, got {self.redraw_data!r}")

    @property
    def sizes(self) -> tuple[int, int, int]:
        return self.n_train, self.n_val, self.n_test

    def seed_of(self, trial_seed: int) -> int:
        """The seed of the data that a trial of `trial_seed` sees."""
        return seed_for(trial_seed, f"data {self.data_seed}") if self.redraw_data else self.data_seed

    def stream(self, task: str, part: str, trial_seed: int) -> np.random.Generator:
        """An independent generator per task, part and data seed: no two splits ever share draws."""
        return np.random.default_rng(seed_for(self.seed_of(trial_seed), f"{task} {part}"))


class DrawnSplits:
    """The splits of one generated task, drawn when a seed first asks for them.

    `draw` makes the splits of a trial's seed. Only those drawn last are kept: a sweep over many seeds must
    not fill the memory.
    """

    def __init__(self, data: DrawnData, draw: Callable[[int], dict[str, Split]]) -> None:
        self._data, self._draw = data, draw
        self._kept: dict[int, dict[str, Split]] = {}

    def splits(self, seed: int) -> Mapping[str, Split]:
        """The splits that a trial of this seed sees; trials with the same data get the same objects."""
        key = self._data.seed_of(seed)
        if key not in self._kept:
            self._kept = {key: self._draw(seed)}
        return self._kept[key]


def with_pole_distance(split: Split, distance: npt.NDArray[np.float64]) -> Split:
    """The split with the extra `pole_distance` (N,), float64."""
    held = {**split.extras, POLE_DISTANCE: torch.from_numpy(np.array(distance, dtype=np.float64))}
    return replace(split, extras=held)


def shifted_levels(
    unshifted: Split, levels: Iterable[float], make: Callable[[float], Split]
) -> list[tuple[float | None, Split]]:
    """A shift as `Task` has it: the data that are not shifted, then what `make` makes of each level."""
    return [(None, unshifted), *((level, make(level)) for level in levels)]


def parse_drawn_data(
    task: str, params: Mapping[str, Any], sizes: Mapping[str, tuple[int, int, int]], own: tuple[str, ...] = ()
) -> DrawnData:
    """Read the common parameters of a generated task; `TaskError` names the first that is wrong.

    `size` names one of `sizes` ("quick" when absent); n_train, n_val and n_test replace its numbers one by
    one. `own` are the parameters that the task itself reads.
    """
    check_params(task, params, (*_COMMON, *own))
    size = params.get("size", "quick")
    check_choice("size", size, tuple(sizes))
    counts = dict(zip(("n_train", "n_val", "n_test"), sizes[size], strict=True))
    return DrawnData(**{**counts, **{key: params[key] for key in params if key in _COMMON[1:]}})


def check_count(name: str, value: object, *, least: int) -> None:
    """Raise `TaskError` unless `value` is a whole number of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise TaskError(f"{name} must be a whole number >= {least}, got {value!r}")


def check_choice(name: str, value: object, known: tuple[str, ...]) -> None:
    """Raise `TaskError` unless `value` is one of the `known` words."""
    if value not in known:
        raise TaskError(f"unknown {name} {value!r}{nearest(str(value), known)}")


def check_real(name: str, value: object, *, above: float) -> None:
    """Raise `TaskError` unless `value` is a finite number greater than `above`."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not above < value < float("inf"):
        raise TaskError(f"{name} must be a number > {above}, got {value!r}")
