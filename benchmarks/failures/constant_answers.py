"""Agreement of a model that always says the same."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from failures.measuring import (
    UNCHANGED,
    Case,
    Found,
    Setting,
    Target,
)
from scm.guards.gap import GapMonitor, Measured, consensus
from scm.guards.symmetry import D4

_GOOD = 0.5  # the published share of votes from which consensus is called good


def _views(answer: Callable[[Tensor], Tensor], grids: Tensor) -> list[list[Tensor]]:
    """What a model answers to the eight orientations of each grid, turned back."""
    views = [item.undo(answer(item.apply(grids))) for item in D4.values()]
    return [[view[row] for view in views] for row in range(len(grids))]


def _published_health(rows: Iterable[Sequence[Tensor]], gap: float) -> tuple[float, float]:
    """The published verdict, from the mean share of votes and the gap alone; and that share."""
    shares = []
    for answers in rows:
        keys = [answer.numpy(force=True).tobytes() for answer in answers]
        shares.append(max(keys.count(key) for key in keys) / len(keys))
    share = sum(shares) / len(shares)
    return float(share >= _GOOD and gap <= 0.1), share


def _health(rows: Iterable[Sequence[Tensor]], train: Measured, held_out: Measured) -> tuple[float, Any]:
    """Our verdict: agreement and gap count where answers differ."""
    agreed = consensus(rows)
    alerts = GapMonitor().add(train, held_out)
    return float(agreed.level == "good" and not alerts), agreed


def constant_predictor(setting: Setting) -> Found:
    """F10: colour 0 everywhere, on 50 grids; and a model that copies, which is right."""
    grids = (3.0 * setting.normal(50, 5, 5)).abs().long().clamp(max=9)
    answers: dict[str, Callable[[Tensor], Tensor]] = {"constant": torch.zeros_like, "copies": torch.clone}
    verdicts: dict[str, tuple[float, float, float, Any]] = {}
    for name, answer in answers.items():
        rows = _views(answer, grids)
        given = answer(grids)
        right = float((given == grids).all(dim=(1, 2)).float().mean())
        side = Measured(score=right, distinct=float(len(given.unique(dim=0))))
        published, share = _published_health(rows, gap=0.0)
        ours, agreed = _health(rows, side, side)
        verdicts[name] = published, ours, share, agreed
    constant, copies = verdicts["constant"], verdicts["copies"]
    return Found(
        without_guard=constant[0],
        with_guard=constant[1],
        clean=copies[0],
        clean_with_guard=copies[1],
        clean_change=abs(copies[2] - copies[3].share),
        more={
            "share_of_votes": constant[3].share,
            "exact_match": float((torch.zeros_like(grids) == grids).all(dim=(1, 2)).float().mean()),
            "different_answers_of_50": float(constant[3].distinct),
        },
    )


CASES: tuple[Case, ...] = (
    Case(
        id="F10",
        trigger="a model that answers colour 0 to each of 50 grids",
        mechanism="one answer agrees with itself in every view, and has no gap",
        measure="called healthy",
        unit="1 or 0",
        guard="consensus and GapMonitor, which trust nothing where all answers are alike",
        run=constant_predictor,
        targets=(
            Target("without_guard", "==", 1.0),
            Target("share_of_votes", "==", 1.0),
            Target("exact_match", "==", 0.0),
            Target("with_guard", "==", 0.0),
            Target("clean_with_guard", "==", 1.0),
            UNCHANGED,
        ),
    ),
)
