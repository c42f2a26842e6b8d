"""Equivariance that is always 0."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from failures.measuring import (
    TOLERATED,
    Case,
    Found,
    Setting,
    Target,
    largest_difference,
    number,
)
from scm.guards.consistency import (
    AugmentationEquivarianceLoss,
    OutputEquivarianceLoss,
    global_context,
    positional_context,
)
from scm.guards.degenerate import DegenerateTermDetector
from scm.guards.symmetry import D4
from scm.seeding import generator


def _all_orientations(features: Tensor) -> Tensor:
    """The published pool: a global mean, averaged over the eight orientations."""
    return torch.stack([global_context(item.apply(features)) for item in D4.values()]).mean(dim=0)


def inert_equivariance(features: Tensor, context: Callable[[Tensor], Tensor]) -> Tensor:
    """The published use: transforms of feature maps, pooled to contexts that are compared."""
    views = {
        name: {"context": context(item.apply(features))} for name, item in D4.items() if name != "identity"
    }
    return AugmentationEquivarianceLoss()({"context": context(features)}, views).loss


def _is_called_degenerate(term: Callable[[], Tensor]) -> float:
    """Whether the detector of idle terms tells one after five steps in which all else costs 1."""
    detector = DegenerateTermDetector(patience=5)
    for _ in range(5):
        value = term()
        detector.observe("term", value, 1.0 + value.detach())
    return float("term" in detector.findings())


class _CellByCell(nn.Module):
    """Scores of three classes at each cell; `reach` 1 sees the cell alone, which no orientation changes."""

    def __init__(self, reach: int) -> None:
        super().__init__()
        self.encode = nn.Conv2d(1, 8, reach, padding="same")
        self.score = nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.score(torch.relu(self.encode(x)))
        return scores


def _train_cells(setting: Setting, weight: float, steps: int = 30) -> tuple[float, list[Tensor]]:
    """Train a model that no orientation can confuse, perhaps with the term; return task loss and weights."""
    model = setting.make(lambda: _CellByCell(1))
    grids = setting.normal(16, 1, 6, 6)
    classes = (grids[:, 0] > 0.5).long() + (grids[:, 0] > -0.5).long()
    term = OutputEquivarianceLoss(D4, views=2, generator=generator(setting.seed, "views"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    task = torch.zeros(())
    for _ in range(steps):
        scores = model(grids)
        task = functional.cross_entropy(scores, classes)
        loss = task + weight * term(model, grids, scores).loss if weight else task
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return number(task), list(model.parameters())


def pooled_away(setting: Setting) -> Found:
    """F4: what a global mean leaves of orientation, and three ways that leave more."""
    model = setting.make(lambda: _CellByCell(3))
    grids = setting.normal(16, 1, 6, 6)
    features = torch.relu(model.encode(grids))

    def encoded_again() -> Tensor:
        views = {
            name: {"context": global_context(torch.relu(model.encode(item.apply(grids))))}
            for name, item in D4.items()
            if name != "identity"
        }
        return AugmentationEquivarianceLoss()({"context": global_context(features)}, views).loss

    def of_outputs() -> Tensor:
        names = [name for name in D4 if name != "identity"]
        return OutputEquivarianceLoss(D4)(model, grids, names=names).loss

    (clean, weights), (guarded, guarded_weights) = (_train_cells(setting, weight) for weight in (0.0, 1.0))
    return Found(
        without_guard=number(inert_equivariance(features, _all_orientations)),
        reference_rule=number(inert_equivariance(features, global_context)),
        with_guard=number(of_outputs()),
        clean=clean,
        clean_with_guard=guarded,
        clean_change=largest_difference(weights, guarded_weights),
        more={
            "inputs_encoded_again": number(encoded_again()),
            "positional_pool": number(inert_equivariance(features, positional_context)),
            "reference_called_degenerate": _is_called_degenerate(
                lambda: inert_equivariance(features, global_context)
            ),
            "outputs_called_degenerate": _is_called_degenerate(of_outputs),
        },
    )


CASES: tuple[Case, ...] = (
    Case(
        id="F4",
        trigger="feature maps are turned and pooled, and the contexts compared",
        mechanism="a global mean is the same in every orientation: the term is 0 whatever is learned",
        measure="the equivariance term of an untrained model",
        unit="",
        guard="OutputEquivarianceLoss: inputs are turned, outputs turned back",
        reference="pool_context_simple: no mean over orientations, but still a global mean over cells",
        clean_measure="task loss of a model that no orientation confuses",
        run=pooled_away,
        targets=(
            Target("without_guard", "<=", 1e-6),
            Target("reference_rule", "<=", 1e-6),
            Target("reference_called_degenerate", "==", 1.0),
            Target("with_guard", ">=", 1e-3),
            Target("inputs_encoded_again", ">=", 1e-3),
            Target("positional_pool", ">=", 1e-3),
            Target("outputs_called_degenerate", "==", 0.0),
            TOLERATED,
        ),
    ),
)
