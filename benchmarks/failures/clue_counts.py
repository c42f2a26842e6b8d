"""Clue counts that are all alike."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from failures.measuring import (
    UNCHANGED,
    Case,
    Found,
    Setting,
    Target,
    largest_difference,
    number,
)
from scm.guards.spread import relevance, spread_loss
from scm.guards.stopping import SparsityRegularization

_CLUES = 6
_STOP_TERMS: dict[str, Any] = {
    "min_clues": 1.0,
    "ponder_weight": 0.02,
    "min_clue_weight": 5.0,
    "entropy_ponder_weight": 0.02,
}


@dataclass(slots=True)
class _StopHead:
    """A linear stop head on fixed features: stop logits (B, K), and the expected clue count of each row."""

    features: Tensor
    weight: Tensor
    bias: Tensor

    @classmethod
    def make(cls, setting: Setting, *, mean: float, deviation: float) -> _StopHead:
        """A head that uses `mean` clues on average, with this standard deviation between rows."""
        features = setting.normal(64, 8, stream="features")
        weight = 0.05 * setting.normal(8, _CLUES, stream="head")
        bias = torch.full((_CLUES,), math.log((_CLUES - mean) / mean), device=setting.device)
        head = cls(features, weight, bias)
        for _ in range(30 if deviation else 0):
            head.weight = head.weight * (deviation / head.counts().std())
        if not deviation:
            head.weight = torch.zeros_like(weight)
        head.weight.requires_grad_()
        head.bias.requires_grad_()
        return head

    def logits(self) -> Tensor:
        return self.features @ self.weight + self.bias

    def counts(self) -> Tensor:
        return (1.0 - self.logits().sigmoid()).sum(1)


def _train_stop_head(
    head: _StopHead, loss: Callable[[_StopHead], Tensor], steps: int = 200
) -> tuple[list[float], float]:
    """Train; return the deviation of the counts after each step, and the first step's largest gradient."""
    optimizer = torch.optim.Adam([head.weight, head.bias], lr=1e-2)
    trace, first = [], math.nan
    for step in range(steps):
        optimizer.zero_grad()
        loss(head).backward()
        assert head.weight.grad is not None
        first = float(head.weight.grad.abs().max()) if step == 0 else first
        optimizer.step()
        counts = head.counts().detach()
        trace.append(float(counts.std()) if len(counts) > 1 else math.nan)
    return trace, first


def _wired(weight: float, form: str = "pairwise") -> Callable[[_StopHead], Tensor]:
    """All stop terms, as ours adds them up."""
    terms = SparsityRegularization(**_STOP_TERMS, variance_weight=weight, variance_form=form)
    return lambda head: terms(head.logits()).total


def _wired_as_published(weight: float) -> Callable[[_StopHead], Tensor]:
    """The scalar that is returned where samples are asked for apart: variance and saturation are dropped."""
    terms = SparsityRegularization(**_STOP_TERMS, variance_weight=weight)

    def loss(head: _StopHead) -> Tensor:
        found = terms(head.logits())
        return found.base_pondering + found.entropy_pondering + found.per_sample.mean()

    return loss


def collapsed_counts(setting: Setting) -> Found:
    """F5: a stop head whose rows all use nearly the same number of clues."""

    def train(loss: Callable[[_StopHead], Tensor]) -> tuple[_StopHead, list[float]]:
        head = _StopHead.make(setting, mean=1.16, deviation=0.07)
        return head, _train_stop_head(head, loss)[0]

    (_, plain), (_, published) = train(_wired(0.0)), train(_wired_as_published(1.0))
    head, guarded = train(_wired(1.0))
    healthy = []
    for weight in (0.0, 1.0):
        one = _StopHead.make(setting, mean=3.0, deviation=1.0)
        healthy.append((_train_stop_head(one, _wired(weight), steps=50)[0][-1], [one.weight, one.bias]))
    difficulty = setting.normal(64, stream="difficulty")
    return Found(
        without_guard=plain[-1],
        reference_rule=published[-1],
        with_guard=guarded[-1],
        clean=healthy[0][0],
        clean_with_guard=healthy[1][0],
        clean_change=largest_difference(healthy[0][1], healthy[1][1]),
        more={
            "steps_to_0.5": float(next((i for i, std in enumerate(guarded, 1) if std >= 0.5), math.inf)),
            "mean_count": number(head.counts().mean()),
            "correlation_with_difficulty": float(relevance(head.counts(), difficulty)),
        },
    )


def exact_collapse(setting: Setting) -> Found:
    """F5b: rows that are exactly alike, and a batch of one row."""

    def train(form: str) -> tuple[list[float], float]:
        head = _StopHead.make(setting, mean=1.16, deviation=0.0)
        return _train_stop_head(head, lambda head: spread_loss(head.counts(), form=form))

    (hinge, first), (pairwise, first_guarded) = train("hinge"), train("pairwise")
    single = torch.tensor([[0.5, -0.5]], device=setting.device)
    count = (1.0 - single.sigmoid()).sum(1)
    deviation = ((count - count.mean()).square().sum() / (len(count) - 1)).sqrt()
    alone = SparsityRegularization(**_STOP_TERMS, variance_weight=1.0)(single).total
    healthy = []
    for weight in (0.0, 1.0):
        one = _StopHead.make(setting, mean=3.0, deviation=1.0)
        one.features = one.features[:1]
        _train_stop_head(one, _wired(weight), steps=20)
        healthy.append((number(one.counts().mean()), [one.weight, one.bias]))
    return Found(
        without_guard=hinge[-1],
        with_guard=pairwise[-1],
        clean=healthy[0][0],
        clean_with_guard=healthy[1][0],
        clean_change=largest_difference(healthy[0][1], healthy[1][1]),
        more={
            "first_gradient": first,
            "first_gradient_with_guard": first_guarded,
            "one_row": float(torch.relu(0.5 - deviation)),
            "one_row_with_guard": float(alone),
        },
    )


CASES: tuple[Case, ...] = (
    Case(
        id="F5",
        trigger="a stop head of mean count 1.16 and deviation 0.07; 200 steps",
        mechanism="nothing in the loss asks for counts that differ",
        measure="deviation of the clue count",
        unit="clues",
        guard="SparsityRegularization(variance_weight=1), pairwise",
        reference="the same weight, in a total that drops the term",
        run=collapsed_counts,
        targets=(
            Target("without_guard", "<=", 0.1),
            Target("reference_rule", "==", 0.0, beside="without_guard"),
            Target("with_guard", ">=", 0.45),  # the term asks for 0.5, and leaves off there
            Target("steps_to_0.5", "<=", 50.0),
            UNCHANGED,
        ),
    ),
    Case(
        id="F5b",
        trigger="rows that are exactly alike, for 200 steps; a batch of one row",
        mechanism="a deviation has no slope at 0, and none at all for one row",
        measure="deviation of the clue count",
        unit="clues",
        guard="the pairwise form; no term for one row",
        clean_measure="clue count of a batch of one row, trained",
        run=exact_collapse,
        targets=(
            Target("without_guard", "==", 0.0),
            Target("first_gradient", "==", 0.0),
            Target("one_row", "is nan"),
            Target("with_guard", ">=", 0.5),
            Target("one_row_with_guard", "<=", 1.0),
            UNCHANGED,
        ),
    ),
)
