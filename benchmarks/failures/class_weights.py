"""Weights of classes, of which some are absent."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from failures.measuring import (
    Case,
    Found,
    Setting,
    Target,
)
from scm.guards.stablemax import CLASS_WEIGHTINGS, WeightedStablemaxLoss


def _class_weights(law: str, counts: Sequence[int], setting: Setting) -> Tensor:
    return CLASS_WEIGHTINGS[law](torch.tensor(counts, device=setting.device).float(), 2.0, 5.0, 0.1)


def _learn_balanced_classes(setting: Setting, law: str) -> float:
    """Train a linear classifier of ten equally frequent classes; return its accuracy on held-out rows."""
    labels = torch.arange(1200, device=setting.device) % 10
    rows = torch.eye(10, device=setting.device)[labels] + 0.2 * setting.normal(1200, 10)
    model = setting.make(lambda: nn.Linear(10, 10))
    loss = WeightedStablemaxLoss(2.0, 5.0, class_weighting=law, logit_clamp_max=None)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(100):
        optimizer.zero_grad()
        loss(model(rows[:1000]), labels[:1000]).backward()
        optimizer.step()
    with torch.no_grad():
        return float((model(rows[1000:]).argmax(1) == labels[1000:]).float().mean())


def weights_of_classes(setting: Setting) -> Found:
    """F8: one pixel more of nine equal colours, and colours that are not there."""
    before, after = [0, *[10] * 9], [0, 11, *[10] * 8]
    absent = [80, 15, 5, *[0] * 7]
    jumps, sparse = {}, {}
    for law in CLASS_WEIGHTINGS:
        ratio = _class_weights(law, after, setting)[1:] / _class_weights(law, before, setting)[1:]
        jumps[law] = float(ratio.log().abs().max().exp())
        sparse[law] = _class_weights(law, absent, setting).tolist()
    clean, guarded = (_learn_balanced_classes(setting, law) for law in ("reference", "smooth"))
    return Found(
        without_guard=jumps["reference"],
        with_guard=jumps["smooth"],
        clean=clean,
        clean_with_guard=guarded,
        clean_change=abs(clean - guarded),
        more={
            "background": sparse["reference"][0],
            "rarest_present": sparse["reference"][2],
            "background_with_guard": sparse["smooth"][0],
            "rarest_present_with_guard": sparse["smooth"][2],
        },
    )


CASES: tuple[Case, ...] = (
    Case(
        id="F8",
        trigger="one pixel more of one of nine equal colours; colours that are absent",
        mechanism="weights are stretched between the rarest and the commonest class, absent ones included",
        measure="largest factor by which a class weight changes",
        unit="",
        guard="class_weighting='smooth'",
        clean_measure="accuracy on balanced classes",
        run=weights_of_classes,
        targets=(
            Target("without_guard", ">=", 2.5),
            Target("rarest_present", "<", 0.0, beside="background"),
            Target("with_guard", "<=", 1.1),
            Target("rarest_present_with_guard", ">", 0.0, beside="background_with_guard"),
            Target("clean_change", "<=", 0.01),
        ),
    ),
)
