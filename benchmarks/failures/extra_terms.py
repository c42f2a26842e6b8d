"""Terms beside the task that outweigh it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from failures.measuring import (
    UNCHANGED,
    Case,
    Found,
    Setting,
    Target,
    largest_difference,
    number,
)
from scm.guards.budget import Cap, gradient_cap, meta_loss_cap

_RATIO = 0.25
_PUBLISHED = {"loo": 0.08, "equivariance": 0.03}  # the weights of the published example


def _published_cap(rule: str, loo: float, setting: Setting) -> Cap:
    """What a cap says at the published task loss of 0.17, for one value of the one term that is not 0."""
    task = torch.tensor(0.17, device=setting.device)
    terms = {"loo": _PUBLISHED["loo"] * loo, "equivariance": 0.0}
    weighted = {name: torch.full_like(task, value) for name, value in terms.items()}
    return meta_loss_cap(task, weighted, _RATIO, rule=rule, weights=_PUBLISHED)


@dataclass(frozen=True, slots=True)
class _Conflict:
    """A training beside a term of random labels: its accuracy, that term's largest late share, weights."""

    accuracy: float
    share: float
    weights: list[Tensor]


def _conflict(setting: Setting, rule: str | None, scale: float, steps: int = 120) -> _Conflict:
    rows = setting.normal(256, 8)
    labels = (rows @ setting.normal(8, stream="classes") > 0).long()
    noise = (setting.normal(256, stream="noise") > 0).long()
    model = setting.make(lambda: nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2)))
    weights = list(model.parameters())
    optimizer = torch.optim.Adam(weights, lr=1e-2)
    share = 0.0
    for step in range(steps):
        scores = model(rows)
        task = functional.cross_entropy(scores, labels)
        beside = 0.11 * scale * functional.cross_entropy(scores, noise)
        own = torch.autograd.grad(task, weights, retain_graph=True)
        other = torch.autograd.grad(beside, weights)
        cap: Cap | None = None
        if rule == "gradient":
            norms = [nn.utils.get_total_norm(list(part)) for part in (own, other)]
            cap = gradient_cap(norms[0], norms[1], _RATIO)
        elif rule is not None:
            cap = meta_loss_cap(task, {"noise": beside}, _RATIO, rule=rule, weights={"noise": 0.11})
        factor = torch.ones_like(task) if cap is None else cap.factor
        if step >= steps // 2:
            after = number(factor * beside)
            share = max(share, after / (number(task) + after))
        for weight, a, b in zip(weights, own, other, strict=True):
            weight.grad = a + factor * b
        optimizer.step()
    accuracy = float((model(rows).argmax(1) == labels).float().mean())
    return _Conflict(accuracy, share, weights)


def loud_terms(setting: Setting) -> Found:
    """F3: the published 40.9 %, what each rule makes of it, and a training in which it matters."""
    published = {rule: _published_cap(rule, 1.4706, setting) for rule in ("loss", "reference")}
    louder = {rule: _published_cap(rule, 10.0, setting) for rule in ("loss", "reference")}
    runs = {rule: _conflict(setting, rule, 10.0) for rule in (None, "reference", "loss", "gradient")}
    clean, guarded = (_conflict(setting, rule, 1e-3) for rule in (None, "loss"))
    return Found(
        without_guard=float(published["loss"].share_before),
        reference_rule=float(published["reference"].share_after),
        with_guard=float(published["loss"].share_after),
        clean=clean.share,
        clean_with_guard=guarded.share,
        clean_change=largest_difference(clean.weights, guarded.weights),
        more={
            "share_at_loss_10": float(louder["loss"].share_before),
            "share_at_loss_10_reference": float(louder["reference"].share_after),
            "share_at_loss_10_with_guard": float(louder["loss"].share_after),
            "accuracy": runs[None].accuracy,
            "accuracy_reference": runs["reference"].accuracy,
            "accuracy_with_guard": runs["loss"].accuracy,
            "accuracy_gradient_currency": runs["gradient"].accuracy,
            "trained_share": runs[None].share,
            "trained_share_reference": runs["reference"].share,
            "trained_share_with_guard": runs["loss"].share,
        },
    )


CASES: tuple[Case, ...] = (
    Case(
        id="F3",
        trigger="task loss 0.17 beside 0.08 times 1.4706; a training beside random labels, ten times as loud",
        mechanism="terms beside the task outweigh it",
        measure="share of the terms beside the task",
        unit="",
        guard="meta_loss_cap at 0.25, of values",
        reference="a cap at 0.25 that compares weights with a loss",
        run=loud_terms,
        targets=(
            Target("without_guard", ">=", 0.4),
            Target("share_at_loss_10_reference", ">=", 0.5),
            Target("accuracy_reference", "==", 0.0, beside="accuracy"),
            Target("with_guard", "<=", 0.250001),
            Target("share_at_loss_10_with_guard", "<=", 0.250001),
            Target("trained_share_with_guard", "<=", 0.250001),
            Target("accuracy_with_guard", ">=", 0.03, beside="accuracy"),
            UNCHANGED,
        ),
    ),
)
