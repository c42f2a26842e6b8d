"""How training compares with what is held out: entropy, score, stopping, and agreement of views.

All measures are normalised, so that sizes of canvases do not show in them, and none is trusted where a model
answers everything alike. Decided here: the measures and the thresholds; not what to do about them.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from scm.guards.consistency import compared, evaluating, line_distance, trained_places
from scm.training.random_state import unmoved_random_state

if TYPE_CHECKING:
    from scm.training.records import EpochReport
    from scm.training.targets import SemanticTargets

_LINES = 1000  # angles of pairs are told apart in so many steps over half a turn


# --- measures ------------------------------------------------------------------------------------


def normalised_entropy(weights: Tensor, *, axes: int = 1, usable: Tensor | None = None) -> Tensor:
    """Return the entropy of weights >= 0 over their last `axes` axes, divided by that of equal weights.

    In [0, 1]: 0 where one entry has all the weight, or there is only one, 1 where all have the same. Weights
    need not sum to 1; where they sum to 0 the result is nan. usable: how many of the entries can have weight
    at all, per distribution, where that is not all of them (a grid on a larger canvas).

    Differs from the reference, which takes every weight as 1e-6 at least: a perfectly sharp distribution then
    has an entropy that grows with the canvas.

    >>> [round(float(normalised_entropy(torch.eye(n)[0])), 3) for n in (9, 900)]
    [0.0, 0.0]
    """
    flat = weights.flatten(-axes)
    flat = flat.float() if flat.dtype in (torch.float16, torch.bfloat16) else flat
    shares = flat / flat.sum(dim=-1, keepdim=True)
    count = torch.as_tensor(flat.shape[-1], device=flat.device) if usable is None else usable
    most = count.to(flat.dtype).log()
    shares = torch.where(shares == 0, 1.0, shares)  # adds 0 either way, and has no gradient of -inf
    entropy = torch.special.entr(shares).sum(dim=-1)
    return torch.where(most > 0, entropy / torch.where(most > 0, most, 1.0), entropy * 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What one side of a comparison measured; nan where it did not.

    score: higher is better, in [0, 1] (a share of right answers). entropy: of attention or answers, as
    `normalised_entropy` gives it. stop: the mean of a stopping probability. loss: of the task. distinct: how
    many different answers there are; with one alone, nothing else is to be trusted.
    """

    score: float = math.nan
    entropy: float = math.nan
    stop: float = math.nan
    loss: float = math.nan
    distinct: float = math.inf


# --- thresholds ----------------------------------------------------------------------------------

_Levels = tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class GapThresholds:
    """Above which gaps are warnings, and above which critical.

    score and stop are differences (train - held out; of stop its size), loss is the ratio held out / train.
    entropy is the difference held out - train, or their ratio where `entropy_as_ratio`. A gap of score or
    entropy that has risen over `trend_points` epochs in a row is a warning above score_trend, entropy_trend.
    Ratios are taken where the training side is above `least`.
    """

    score: _Levels = (0.10, 0.20)
    entropy: _Levels = (0.10, 0.25)
    entropy_as_ratio: bool = False
    stop: _Levels = (0.15, 0.25)
    loss: _Levels = (1.5, 2.0)
    score_trend: float = 0.05
    entropy_trend: float = 0.05
    trend_points: int = 3
    least: float = 1e-3


REFERENCE_THRESHOLDS = GapThresholds(entropy=(2.0, 5.0), entropy_as_ratio=True, entropy_trend=1.5)
"""The reference's, whose entropy is compared as a ratio: of values that tend to 0 on one side."""


class GapAlert(NamedTuple):
    """One gap above its threshold. severity: "warning" or "critical"."""

    metric: str
    severity: str
    gap: float
    threshold: float


class GapMonitor:
    """Compares what training and held-out data measured, epoch by epoch, and keeps the last gaps for trends.

    Differs from the reference, whose monitor no training calls: where either side answers everything alike,
    the one alert is "degenerate", critical, and no gap is called healthy or not.
    """

    def __init__(self, thresholds: GapThresholds | None = None) -> None:
        self.thresholds = GapThresholds() if thresholds is None else thresholds
        self.history: dict[str, list[float]] = {"score": [], "entropy": []}

    def add(self, train: Measured, held_out: Measured) -> list[GapAlert]:
        """Compare one epoch; return its alerts."""
        distinct = min(train.distinct, held_out.distinct)
        if distinct <= 1:
            return [GapAlert("degenerate", "critical", distinct, 1.0)]
        limits = self.thresholds
        gaps = {
            "score": train.score - held_out.score,
            "entropy": self._entropy_gap(train.entropy, held_out.entropy),
            "stop": abs(train.stop - held_out.stop),
            "loss": self._ratio(train.loss, held_out.loss),
        }
        alerts = []
        for metric, gap in gaps.items():
            low, high = getattr(limits, metric)
            if gap > low:
                severity, threshold = ("critical", high) if gap > high else ("warning", low)
                alerts.append(GapAlert(metric, severity, gap, threshold))
        for metric, least in (("score", limits.score_trend), ("entropy", limits.entropy_trend)):
            alerts += self._trend(metric, gaps[metric], least)
        return alerts

    def state_dict(self) -> dict[str, Any]:
        """Return the gaps that trends go on from."""
        return {name: list(gaps) for name, gaps in self.history.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.history = {name: list(state[name]) for name in self.history}

    def _entropy_gap(self, train: float, held_out: float) -> float:
        return self._ratio(train, held_out) if self.thresholds.entropy_as_ratio else held_out - train

    def _ratio(self, train: float, held_out: float) -> float:
        return held_out / train if train > self.thresholds.least else math.nan

    def _trend(self, metric: str, gap: float, least: float) -> list[GapAlert]:
        if math.isnan(gap):
            return []
        kept = self.history[metric]
        kept.append(gap)
        del kept[: -self.thresholds.trend_points]
        rising = all(after > before for before, after in pairwise(kept))
        if len(kept) < self.thresholds.trend_points or not rising or gap <= least:
            return []
        return [GapAlert(f"{metric}_trend", "warning", gap - kept[0], 0.0)]


# --- agreement of views --------------------------------------------------------------------------


class Vote(NamedTuple):
    """The commonest of several answers, its share of the votes, how many differ, and whether it is a tie."""

    winner: Tensor
    share: float
    different: int
    tied: bool


def vote(answers: Sequence[Tensor]) -> Vote:
    """Return which answer is given most often; of answers as often given, the first.

    Two answers are the same when shape and values are. Differs from the reference, which compares values
    alone: a grid of 2x3 votes there for one of 3x2. Raises ValueError for no answers.
    """
    if not answers:
        raise ValueError("answers must hold at least one, got none")
    counts: dict[Hashable, int] = {}
    firsts: dict[Hashable, Tensor] = {}
    for answer in answers:
        key = _vote_key(answer)
        counts[key] = counts.get(key, 0) + 1
        firsts.setdefault(key, answer)
    best = max(counts, key=lambda key: counts[key])
    most = counts[best]
    tied = sum(count == most for count in counts.values()) > 1
    return Vote(firsts[best], most / len(answers), len(counts), tied)


def _vote_key(answer: Tensor) -> Hashable:
    answer = answer.detach().cpu()
    # One type for all, and one zero: -0.0 and 0.0 are the same answer.
    answer = answer.to(torch.float64) + 0.0 if answer.is_floating_point() else answer.to(torch.int64)
    return tuple(answer.shape), answer.numpy().tobytes()


CONSENSUS_LEVELS: tuple[tuple[str, float], ...] = (("critical", 0.15), ("low", 0.25), ("moderate", 0.5))


class Consensus(NamedTuple):
    """How far views of the same rows are answered alike.

    share: the mean share of the commonest answer. different: the mean number of different answers. ties: the
    share of rows in which no answer is the commonest alone. distinct: how many different commonest answers
    there are, of `rows`.
    """

    share: float
    different: float
    ties: float
    distinct: int
    rows: int

    @property
    def trusted(self) -> bool:
        """Whether agreement means anything: a model that answers all rows alike agrees with itself always."""
        return self.distinct > 1

    @property
    def level(self) -> str:
        """What the share is called: critical, low, moderate, good; "degenerate" where it is not trusted."""
        if not self.trusted:
            return "degenerate"
        return next((name for name, bound in CONSENSUS_LEVELS if self.share < bound), "good")


def consensus(rows: Iterable[Sequence[Tensor]]) -> Consensus:
    """Vote row by row; each row holds the answers to its views, brought back to one orientation.

    Consensus is not correctness: it says nothing of whether the answers are right. Raises ValueError for no
    rows.
    """
    votes = [vote(answers) for answers in rows]
    if not votes:
        raise ValueError("rows must hold at least one, got none")
    count = len(votes)
    return Consensus(
        share=sum(item.share for item in votes) / count,
        different=sum(item.different for item in votes) / count,
        ties=sum(item.tied for item in votes) / count,
        distinct=len({_vote_key(item.winner) for item in votes}),
        rows=count,
    )


# --- in the trainer ------------------------------------------------------------------------------


def measure_outputs(outputs: Any, targets: SemanticTargets) -> Measured:
    """Measure what a model answered on rows with these targets; waits for the device.

    Class scores (see `compared`) score by the share of trained places whose largest target they find, pairs
    by one minus the mean squared sine to the targets' lines. The entropy is that of the named tensor
    "attention" over its last two axes, else of the classes' probabilities; pairs alone have none. `stop` is
    of the named "stop_logits". distinct: answers that differ between rows; 1 also where one class stands at
    all trained places.
    """
    named = outputs[2] if isinstance(outputs, (tuple, list)) and len(outputs) > 2 else {}
    answer, mask = compared(outputs), trained_places(targets, outputs)
    assert mask is not None
    entropy = score = torch.tensor(math.nan)
    if isinstance(answer, Tensor):
        called = answer.argmax(dim=1)
        mask = mask.expand_as(called)
        entropy = normalised_entropy(answer.softmax(dim=1).movedim(1, -1))[mask].mean()
        if targets.Y_n.shape == answer.shape:
            score = (called == targets.Y_n.argmax(dim=1))[mask].double().mean()
        distinct = len(called.flatten(1).unique(dim=0)) if len(called[mask].unique()) > 1 else 1
    else:
        P, Q = answer
        Y_n, Y_d = (item.reshape(P.shape) for item in (targets.Y_n, targets.Y_d))
        mask = mask.expand_as(P)
        score = 1.0 - line_distance(P, Q, Y_n, Y_d, distance="l2")[mask].mean()
        steps = (torch.atan2(P, Q) * (_LINES / math.pi)).round().remainder(_LINES)
        distinct = len(steps.reshape(len(P), -1).unique(dim=0))
    if "attention" in named:
        entropy = normalised_entropy(named["attention"], axes=2).mean()
    stop = named["stop_logits"].sigmoid().mean() if "stop_logits" in named else math.nan
    return Measured(score=float(score), entropy=float(entropy), stop=float(stop), distinct=float(distinct))


@dataclass
class _Probe:
    """Rows on which both sides are measured."""

    inputs: Tensor
    targets: SemanticTargets

    @classmethod
    def of(cls, loader: Any, rows: int) -> _Probe:
        """Take so many rows, evenly spaced, of what holds `inputs` and `targets` whole."""
        count = len(loader.inputs)
        places = torch.linspace(0, count - 1, min(rows, count), device=loader.inputs.device).round().long()
        return cls(loader.inputs.index_select(0, places), loader.targets.index(places))


@dataclass
class GapWatch:
    """Measures after every epoch how training and held-out rows are answered; a companion of `SCMTrainer`.

    The same number of rows of each is answered by the same weights: both in eval mode, and the training rows
    in training mode as well. train, held_out: what holds all `inputs` and `targets` (a `TensorBatches`);
    without held-out rows every gap is nan. Neither weights, buffers nor random states are moved, and no step
    takes longer.

    Telemetry: gap_score (train - held out, both in eval mode), gap_entropy (held out in eval mode - train in
    training mode, the difference of normalised entropies), gap_entropy_mode (the part of it that the mode
    makes, on the training rows), gap_trusted (1 where both sides answer more than one thing, else 0).
    `alerts` holds those of the newest epoch.
    """

    model: nn.Module
    train: Any
    held_out: Any | None
    rows: int = 256
    monitor: GapMonitor = field(default_factory=GapMonitor)

    def __post_init__(self) -> None:
        if self.rows < 2:
            raise ValueError(f"rows must be >= 2, got rows={self.rows}")
        self.alerts: list[GapAlert] = []
        self._said = dict.fromkeys(_SAID, math.nan)
        self._probes: list[_Probe] | None = None
        if self.held_out is not None:
            self._probes = [_Probe.of(loader, self.rows) for loader in (self.train, self.held_out)]

    def after_epoch(self, report: EpochReport) -> None:
        """Answer the rows and compare."""
        if self._probes is None:
            return
        train, held_out = self._probes
        with evaluating(self.model):
            at_rest = self._measure(train)
            beside = self._measure(held_out)
        with _training_without_a_trace(self.model, train.inputs.device):
            as_trained = self._measure(train)
        self.alerts = self.monitor.add(Measured(**{**asdict(at_rest), "entropy": as_trained.entropy}), beside)
        values = (
            at_rest.score - beside.score,
            beside.entropy - as_trained.entropy,
            at_rest.entropy - as_trained.entropy,
            float(min(at_rest.distinct, beside.distinct) > 1),
        )
        self._said = dict(zip(_SAID, values, strict=True))

    def telemetry(self) -> dict[str, float]:
        """Return the gaps after the newest epoch; nan before the first, and where nothing was measured."""
        return dict(self._said)

    def state_dict(self) -> dict[str, Any]:
        """Return what was said last, and what trends go on from."""
        return {"said": dict(self._said), "monitor": self.monitor.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self._said = dict(state["said"])
        self.monitor.load_state_dict(state["monitor"])

    def _measure(self, probe: _Probe) -> Measured:
        with torch.no_grad():
            return measure_outputs(self.model(probe.inputs), probe.targets)


@contextmanager
def _training_without_a_trace(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Put a model into training mode; its buffers, its modules' modes and random states come back after."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    with unmoved_random_state(device):
        model.train()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)


_SAID = ("gap_score", "gap_entropy", "gap_entropy_mode", "gap_trusted")
