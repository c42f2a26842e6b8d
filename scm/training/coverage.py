"""How often a model answers: batch by batch, over a window of batches, and since the beginning.

What a tag is, is decided in `scm.core.tags`; what is done about too little coverage, in
`scm.training.adaptive_loss`. Here it is counted. One update costs the same however many came before it, and
what comes from a device stays there until somebody reads.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scm.core.tags import TRTag
from scm.losses.coverage import check_share

AGGREGATE_MODES = ("mean", "mean_of_outputs", "min", "max")
_TAGS = tuple(TRTag)
_NOTHING = (0,) * (len(_TAGS) + 1)
_COUNTED = tuple(f"n_{tag.name.lower()}" for tag in _TAGS)

TagCounts = tuple[int, ...] | Tensor
"""How many answers had each tag, in order of the codes, and last how many had none: plain numbers, or (6,)
int64 on a device that was not waited for."""


@dataclass(frozen=True, slots=True)
class CoverageMetrics:
    """How many answers had which tag; counts of several batches are added with ``+``.

    >>> CoverageMetrics(n_real=3, n_bottom=1).coverage
    0.75
    """

    n_real: int = 0
    n_pinf: int = 0
    n_ninf: int = 0
    n_phi: int = 0
    n_bottom: int = 0

    def __post_init__(self) -> None:
        for name in _COUNTED:
            count = getattr(self, name)
            if isinstance(count, bool) or not isinstance(count, int):
                raise TypeError(f"{name} must be an int, got {name}={count!r}")
            if count < 0:
                raise ValueError(f"{name} must be >= 0, got {name}={count!r}")

    def __add__(self, other: CoverageMetrics) -> CoverageMetrics:
        return CoverageMetrics(*map(sum, zip(astuple(self), astuple(other), strict=True)))

    @property
    def total(self) -> int:
        """All answers."""
        return sum(astuple(self))

    @property
    def coverage(self) -> float:
        """The share of REAL answers; 1 of no answers."""
        return self.n_real / self.total if self.total else 1.0

    @property
    def rejection_rate(self) -> float:
        """The share of all other answers."""
        return 1.0 - self.coverage

    @property
    def tag_distribution(self) -> dict[str, int]:
        """Counts by name: n_real, n_pinf, n_ninf, n_phi, n_bottom."""
        return dict(zip(_COUNTED, astuple(self), strict=True))

    @property
    def tag_shares(self) -> dict[str, float]:
        """Shares by name of the tag, which sum to 1; of no answers all are REAL."""
        if not self.total:
            return {tag.name: float(tag is TRTag.REAL) for tag in _TAGS}
        return {tag.name: n / self.total for tag, n in zip(_TAGS, astuple(self), strict=True)}


Answers = Tensor | Sequence[int] | CoverageMetrics
"""What trackers are fed: tags as a tensor of codes or a sequence of `TRTag`, a bool tensor that is True where
an answer is bottom, or counts."""


class CoverageTracker:
    """Coverage of the last batch, of the last `window_size` batches, and of all, against a target.

    An update costs the same however long the window and the history are; the memory is that of one count per
    batch of the window. Tags from a device other than the CPU are counted there; the host waits for them when
    something is read, not before.

    Before the first update, and of batches without answers, coverage is 1. Raises ValueError for a target
    outside of [0, 1], a window below 1 and tags that are none; such tags on a device are found when read.

    Differs from zeroproof 0.1.0: a window that holds nothing is refused, as is what is no tag; an answer with
    the tag BOTTOM is counted as one; `tag_distribution` is counts everywhere; trackers have a state and can
    be merged.
    """

    def __init__(self, target_coverage: float = 0.95, window_size: int | None = None) -> None:
        check_share("target_coverage", target_coverage)
        if window_size is not None:
            _check_at_least_one("window_size", window_size)
        self.target_coverage = target_coverage
        self.window_size = window_size
        self.reset()

    def reset(self) -> None:
        """Begin anew."""
        self._batch = _Tally()
        self._cumulative = _Tally()
        self._in_window = _Tally()
        self._window: deque[TagCounts] = deque()

    def update(self, answers: Answers) -> None:
        """Take one batch into account."""
        self.update_counts(count_tags(answers))

    def update_counts(self, counts: TagCounts) -> None:
        """Take one batch into account that was counted already, by `count_tags` or `count_bottoms`."""
        self._batch = _Tally(counts)
        self._cumulative.add(counts)
        if self.window_size is not None:
            self._push(counts)

    def merge(self, other: CoverageTracker) -> None:
        """Take another worker's counts into account, as if each update had been fed the tags of both.

        Batches of the two windows are joined in pairs, the newest with the newest; of trackers that were
        updated equally often this is exact. ValueError for another target or window.
        """
        self._check_same(other.target_coverage, other.window_size)
        self._batch = _Tally(summed_counts(self._batch.read_counts(), other._batch.read_counts()))
        self._cumulative.add(other._cumulative.read_counts())
        longer, shorter = sorted((list(self._window), list(other._window)), key=len, reverse=True)
        first = len(longer) - len(shorter)
        joined: list[TagCounts]
        joined = [
            summed_counts(_on_host(a), _on_host(b)) for a, b in zip(longer[first:], shorter, strict=True)
        ]
        self._window, self._in_window = deque(), _Tally()
        for counts in [*map(_on_host, longer[:first]), *joined]:
            self._push(counts)

    def _push(self, counts: TagCounts) -> None:
        self._window.append(counts)
        self._in_window.add(counts)
        if self.window_size is not None and len(self._window) > self.window_size:
            self._in_window.subtract(self._window.popleft())

    @property
    def batch(self) -> CoverageMetrics:
        """The counts of the last batch."""
        return self._batch.read()

    @property
    def cumulative(self) -> CoverageMetrics:
        """The counts of all batches."""
        return self._cumulative.read()

    @property
    def window(self) -> CoverageMetrics | None:
        """The counts of the last `window_size` batches; None without a window, or any batch."""
        return self._in_window.read() if self._window else None

    @property
    def batch_coverage(self) -> float:
        """Of the last batch."""
        return self.batch.coverage

    @property
    def cumulative_coverage(self) -> float:
        """Of all answers."""
        return self.cumulative.coverage

    @property
    def window_coverage(self) -> float | None:
        """Of all answers of the window, every answer weighing the same; None where `window` is."""
        window = self.window
        return None if window is None else window.coverage

    @property
    def coverage(self) -> float:
        """Of the window where there is one, else of all answers."""
        return (self.cumulative if self.window is None else self.window).coverage

    @property
    def coverage_gap(self) -> float:
        """Target minus `coverage`, rounded to ten digits: above 0 where too little is answered."""
        return round(self.target_coverage - self.coverage, 10)

    @property
    def tag_distribution(self) -> dict[str, int]:
        """Counts of all answers by tag: n_real, n_pinf, n_ninf, n_phi, n_bottom."""
        return self.cumulative.tag_distribution

    def get_statistics(self) -> dict[str, Any]:
        """Return all of it by name; waits for the device where answers came from one."""
        return {
            "target_coverage": self.target_coverage,
            "current_coverage": self.coverage,
            "coverage_gap": self.coverage_gap,
            "batch_coverage": self.batch_coverage,
            "cumulative_coverage": self.cumulative_coverage,
            "window_coverage": self.window_coverage,
            "total_samples": self.cumulative.total,
            "tag_distribution": self.tag_distribution,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return settings and counts as plain values."""
        return {
            "target_coverage": self.target_coverage,
            "window_size": self.window_size,
            "batch": list(self._batch.read_counts()),
            "cumulative": list(self._cumulative.read_counts()),
            "window": [list(_on_host(counts)) for counts in self._window],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`; ValueError for that of another target or window."""
        self._check_same(state["target_coverage"], state["window_size"])
        self._batch = _Tally(tuple(state["batch"]))
        self._cumulative = _Tally(tuple(state["cumulative"]))
        self._window, self._in_window = deque(), _Tally()
        for counts in state["window"]:
            self._push(tuple(counts))

    def _check_same(self, target_coverage: float, window_size: int | None) -> None:
        for name, other in (("target_coverage", target_coverage), ("window_size", window_size)):
            if other != getattr(self, name):
                raise ValueError(f"{name} must be {getattr(self, name)!r} in both, got {name}={other!r}")


class MultiOutputCoverageTracker:
    """Coverage of every output of a model, and of all of them together.

    aggregate_mode: "mean", the share of REAL among the answers of all outputs together; "mean_of_outputs",
    the mean of the outputs' coverages; their "min"; their "max". ValueError for any other, for fewer than one
    output, and for a target outside of [0, 1].

    Differs from zeroproof 0.1.0: its "mean" is "mean_of_outputs" here, in which an output of one answer
    weighs as much as one of a thousand; an unknown mode is refused when built, not when read.
    """

    def __init__(self, n_outputs: int, target_coverage: float = 0.95, aggregate_mode: str = "mean") -> None:
        _check_at_least_one("n_outputs", n_outputs)
        if aggregate_mode not in AGGREGATE_MODES:
            known = ", ".join(AGGREGATE_MODES)
            raise ValueError(f"aggregate_mode must be one of {known}, got {aggregate_mode=}")
        self.n_outputs = n_outputs
        self.target_coverage = target_coverage
        self.aggregate_mode = aggregate_mode
        self.trackers = tuple(CoverageTracker(target_coverage) for _ in range(n_outputs))

    def reset(self) -> None:
        """Begin anew."""
        for tracker in self.trackers:
            tracker.reset()

    def update(self, answers: Tensor | Sequence[Answers]) -> None:
        """Take one batch into account: (rows, n_outputs) tags or bottoms, or the answers of each output."""
        if isinstance(answers, Tensor):
            if answers.ndim != 2:
                raise ValueError(f"answers must be (rows, n_outputs), got shape {tuple(answers.shape)}")
            answers = answers.unbind(1)
        if len(answers) != self.n_outputs:
            raise ValueError(f"answers must be of {self.n_outputs} outputs, got {len(answers)}")
        for tracker, own in zip(self.trackers, answers, strict=True):
            tracker.update(own)

    def merge(self, other: MultiOutputCoverageTracker) -> None:
        """Take another worker's counts into account; ValueError for other outputs, mode or target."""
        self._check_same(other.n_outputs, other.aggregate_mode)
        for tracker, own in zip(self.trackers, other.trackers, strict=True):
            tracker.merge(own)

    @property
    def coverage(self) -> float:
        """Of all outputs together, as `aggregate_mode` says."""
        if self.aggregate_mode == "mean":
            return sum((tracker.cumulative for tracker in self.trackers), CoverageMetrics()).coverage
        return _AGGREGATES[self.aggregate_mode](self.get_per_output_coverage())

    @property
    def coverage_gap(self) -> float:
        """Target minus `coverage`."""
        return self.target_coverage - self.coverage

    def get_per_output_coverage(self) -> list[float]:
        """Return the coverage of every output, of all its answers."""
        return [tracker.coverage for tracker in self.trackers]

    def state_dict(self) -> dict[str, Any]:
        """Return settings and counts as plain values."""
        return {
            "n_outputs": self.n_outputs,
            "aggregate_mode": self.aggregate_mode,
            "trackers": [tracker.state_dict() for tracker in self.trackers],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`; ValueError for that of other outputs, mode or target."""
        self._check_same(state["n_outputs"], state["aggregate_mode"])
        for tracker, own in zip(self.trackers, state["trackers"], strict=True):
            tracker.load_state_dict(own)

    def _check_same(self, n_outputs: int, aggregate_mode: str) -> None:
        for name, other in (("n_outputs", n_outputs), ("aggregate_mode", aggregate_mode)):
            if other != getattr(self, name):
                raise ValueError(f"{name} must be {getattr(self, name)!r} in both, got {name}={other!r}")


_AGGREGATES: Mapping[str, Callable[[list[float]], float]] = {
    "mean_of_outputs": lambda coverages: sum(coverages) / len(coverages),
    "min": min,
    "max": max,
}


def count_tags(answers: Answers) -> TagCounts:
    """Count the answers of one batch by tag: on the host, or on the device that they are on.

    ValueError for what is no tag, found at once on the CPU; TypeError for a tensor that is neither of
    integers nor of bools. A bool tensor says which answers are bottom.
    """
    if isinstance(answers, CoverageMetrics):
        return (*astuple(answers), 0)
    if not isinstance(answers, Tensor):
        return _count_sequence(answers)
    if answers.dtype.is_floating_point or answers.dtype.is_complex:
        raise TypeError(f"answers must be tags (integers) or bottoms (bool), got {answers.dtype}")
    if answers.dtype == torch.bool:
        return count_bottoms(answers)
    answers = answers.detach()
    codes = torch.arange(len(_TAGS), device=answers.device, dtype=answers.dtype)
    found = (answers.reshape(-1, 1) == codes).sum(0)
    counts = torch.cat([found, answers.numel() - found.sum(0, keepdim=True)])
    return counts if counts.device.type != "cpu" else _on_host(counts)


def count_bottoms(bottom: Tensor, mask: Tensor | None = None) -> TagCounts:
    """Count answers as BOTTOM where `bottom` is True, else as REAL; of those in `mask` alone, if given."""
    if mask is not None:
        bottom = bottom & mask
    if bottom.device.type == "cpu":
        n_bottom = int(bottom.sum())
        total = bottom.numel() if mask is None else int(mask.expand(bottom.shape).sum())
        return (total - n_bottom, 0, 0, 0, n_bottom, 0)
    found = bottom.sum()
    all_of_them = torch.full_like(found, bottom.numel()) if mask is None else mask.expand(bottom.shape).sum()
    none = torch.zeros_like(found)
    return torch.stack([all_of_them - found, none, none, none, found, none])


def summed_counts(*counts: TagCounts) -> TagCounts:
    """Add up what several workers counted of one batch, for an update that is the same for all of them.

    Among processes the sum of the tensors is ``torch.distributed.all_reduce(counts)``. Controllers that are
    told sums never part; multipliers need no averaging, which would not be the same where one met its bounds.
    """
    if not counts:
        raise ValueError("counts must be of at least one worker, got none")
    if all(isinstance(own, Tensor) for own in counts):
        return torch.stack([own for own in counts if isinstance(own, Tensor)]).sum(0)
    return tuple(map(sum, zip(*(_plain(own) for own in counts), strict=True)))


def _count_sequence(answers: Iterable[int]) -> tuple[int, ...]:
    found = Counter(answers)
    counts = [found.pop(tag, 0) for tag in _TAGS]
    if found:
        raise ValueError(f"answers must be tags, {TRTag.REAL:d} to {_TAGS[-1]:d}, got {next(iter(found))!r}")
    return (*counts, 0)


class _Tally:
    """A running sum of counts, on the host and, of what came from a device and was not read yet, there."""

    def __init__(self, counts: TagCounts = _NOTHING) -> None:
        self._host: tuple[int, ...] = _NOTHING
        self._unread: Tensor | None = None
        self.add(counts)

    def add(self, counts: TagCounts) -> None:
        if not isinstance(counts, Tensor):
            self._host = _plain(summed_counts(self._host, counts))
            return
        if self._unread is not None and self._unread.device != counts.device:
            self.read_counts()
        self._unread = counts if self._unread is None else self._unread + counts

    def subtract(self, counts: TagCounts) -> None:
        self.add(-counts if isinstance(counts, Tensor) else tuple(-n for n in counts))

    def read_counts(self) -> tuple[int, ...]:
        """Return the sums, of a device too; ValueError for tags that are none."""
        if self._unread is not None:
            self._host = _plain(summed_counts(self._host, _on_host(self._unread)))
            self._unread = None
        return self._host

    def read(self) -> CoverageMetrics:
        return CoverageMetrics(*self.read_counts()[: len(_TAGS)])


def _plain(counts: TagCounts) -> tuple[int, ...]:
    return tuple(counts.tolist()) if isinstance(counts, Tensor) else counts


def _on_host(counts: TagCounts) -> tuple[int, ...]:
    held = _plain(counts)
    if held[-1]:
        raise ValueError(f"answers must be tags, {TRTag.REAL:d} to {_TAGS[-1]:d}, got {held[-1]} others")
    return held


def _check_at_least_one(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {name}={value!r}")
    if value < 1:
        raise ValueError(f"{name} must be >= 1, got {name}={value!r}")


class EnforcementStep(NamedTuple):
    """What one call of `CoverageEnforcementPolicy` did. near_pole_gap: None without a near-pole coverage."""

    old_lambda: float
    new_lambda: float
    coverage_gap: float
    near_pole_gap: float | None
    lambda_updated: bool
    intervention_triggered: bool
    intervention_count: int


class CoverageEnforcementPolicy:
    """The epoch-level controller of the recorded hybrid trainer: it raises lambda where coverage is too high.

    Its direction is the opposite of that of `AdaptiveLambda`: used together, the two fight. For a lambda that
    multiplies a coverage term, use `scm.training.adaptive_loss` alone; this one is for comparison with
    recorded runs, and for a lambda that rewards abstaining.

    Coverages within `dead_band` of the target change nothing. Beyond, lambda moves by a tenth of the gap,
    times increase_rate up (coverage above the target) or decrease_rate down (below), plus increase_rate times
    a twentieth of what the coverage near poles lacks to `near_pole_target`; it stays in
    [min_lambda, max_lambda]. A change of more than a fifth of lambda is an intervention.

    Differs from zeroproof 0.1.0 in that its arguments are checked; a coverage that is nan changes nothing.
    """

    def __init__(
        self,
        target_coverage: float = 0.90,
        near_pole_target: float = 0.70,
        dead_band: float = 0.02,
        increase_rate: float = 2.0,
        decrease_rate: float = 0.5,
        min_lambda: float = 0.1,
        max_lambda: float = 10.0,
    ) -> None:
        check_share("target_coverage", target_coverage)
        check_share("near_pole_target", near_pole_target)
        named = {
            "dead_band": dead_band,
            "increase_rate": increase_rate,
            "decrease_rate": decrease_rate,
            "min_lambda": min_lambda,
            "max_lambda": max_lambda,
        }
        for name, value in named.items():
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be finite and >= 0, got {name}={value!r}")
        if min_lambda > max_lambda:
            raise ValueError(f"min_lambda must be <= max_lambda, got {min_lambda=}, {max_lambda=}")
        self.target_coverage = target_coverage
        self.near_pole_target = near_pole_target
        self.dead_band = dead_band
        self.increase_rate = increase_rate
        self.decrease_rate = decrease_rate
        self.min_lambda = min_lambda
        self.max_lambda = max_lambda
        self.intervention_count = 0

    def enforce(
        self, coverage: float, current_lambda: float, near_pole_coverage: float | None = None
    ) -> EnforcementStep:
        """Return the lambda to go on with after an epoch of this coverage."""
        gap = self.target_coverage - coverage
        near_gap = None if near_pole_coverage is None else self.near_pole_target - near_pole_coverage
        acts = abs(gap) > self.dead_band  # never for nan
        new = current_lambda
        if acts:
            size = abs(gap) * 0.1
            new += size * self.increase_rate if gap < 0 else -size * self.decrease_rate
            if near_gap is not None and near_gap > 0:
                new += near_gap * 0.05 * self.increase_rate
            new = min(max(new, self.min_lambda), self.max_lambda)
        intervened = abs(new - current_lambda) > 0.2 * current_lambda
        self.intervention_count += intervened
        return EnforcementStep(
            old_lambda=current_lambda,
            new_lambda=new,
            coverage_gap=gap,
            near_pole_gap=near_gap,
            lambda_updated=acts,
            intervention_triggered=intervened,
            intervention_count=self.intervention_count,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return what going on needs."""
        return {"intervention_count": self.intervention_count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.intervention_count = state["intervention_count"]
