"""A small model that reads a puzzle's pairs and answers its last grid: votes, clues, and a gate.

How rows are laid out is decided in `grid_data`, what the answer costs in `grid`. Plain batched operations and
no buffers, so that many of equal shapes can be stacked and vectorised.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from trainables.tasks.grid_data import COLOURS, PLANES

_NEAR = 3  # the side of the neighbourhood in which cells are compared
_FAR_BELOW = 1e4  # what a score loses outside of a grid: no float has a softmax of it left, float16 included
# Where training begins: a cell votes with cells of its colour first, with like surroundings next, and the
# answer is the vote with the input behind it. Stablemax grows linearly, so that scores are of this size.
_ITSELF, _AROUND = 2.0, 0.5
_VOTE, _COPY = 10.0, 4.0


class _Cells(NamedTuple):
    """Grids cell by cell: `features` (B, G, S*S, D), one-hot `colours` (B, G, S*S, PLANES), the one-hot
    neighbourhood `near` (B, G, S*S, 9 * PLANES), and `inside` (B, G, S*S), 1 or 0."""

    features: Tensor
    colours: Tensor
    near: Tensor
    inside: Tensor


class GridReasoner(nn.Module):
    """Answer the last grid of a row from the pairs before it; about 30 thousand weights at width 32.

    Convolutions see every input grid alike. Each cell asked about attends to the cells shown, by learned
    features and by how far the neighbourhoods agree in colour, and is told the colours that stand there in
    the outputs (the vote). `clues` attention maps look for what else matters; a stop head says of each how
    likely it is not needed, and the others join the decoder, as far as they are. A gate says how many cells
    of the answer are right, by the model's own estimate.
    """

    def __init__(self, *, width: int, depth: int, clues: int) -> None:
        super().__init__()
        self.clues = clues
        self.embed = nn.Conv2d(PLANES, width, 1)
        self.layers = nn.ModuleList(nn.Conv2d(width, width, _NEAR, padding="same") for _ in range(depth))
        self.key = nn.Linear(width, width, bias=False)
        self.query = nn.Linear(width, width, bias=False)
        nearness = torch.full((_NEAR * _NEAR,), _AROUND)
        nearness[_NEAR * _NEAR // 2] = _ITSELF
        self.nearness = nn.Parameter(nearness)
        self.change = nn.Linear(width + 2 * PLANES, width)
        self.clue = nn.Linear(width, clues)
        self.clue_in_context = nn.Linear(width, clues * width)
        self.stop = nn.Sequential(nn.Linear(2 * width, width), nn.ReLU(), nn.Linear(width, 1))
        self.tell = nn.Linear(width, width)
        self.decode = nn.Sequential(
            nn.Linear(3 * width + PLANES + COLOURS, width), nn.ReLU(), nn.Linear(width, COLOURS)
        )
        self.vote_scale = nn.Parameter(torch.tensor(_VOTE))
        self.copy_scale = nn.Parameter(torch.tensor(_COPY))
        self.gate = nn.Sequential(nn.Linear(2 * width + 2, width), nn.ReLU(), nn.Linear(width, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Map rows (B, (2 M + 1) * PLANES, S, S) to P (B, COLOURS, S, S), Q (B,) in [0, 1], and by name:

        stop_logits (B, K), attention (B, K, S, S; sums to 1 within the grid), clue_count (B,; the sum of
        1 - sigmoid of the stop logits), context (B, D; what the pairs shown say).
        """
        rows, _, height, width = x.shape
        grids = x.reshape(rows, -1, PLANES, height, width)
        cells = self._cells(torch.cat([grids[:, :-1:2], grids[:, -1:]], dim=1))
        answers = grids[:, 1:-1:2].flatten(3).transpose(2, 3)  # (B, M, S*S, PLANES)

        vote = self._vote(cells, answers)
        context = self._context(cells, answers)
        features, colours, inside = cells.features[:, -1], cells.colours[:, -1], cells.inside[:, -1]
        attention = self._attention(features, inside, context)
        found = attention @ features  # (B, K, D)
        told = context.unsqueeze(1).expand(-1, self.clues, -1)
        stop_logits = self.stop(torch.cat([found, told], dim=-1)).squeeze(-1)
        used = torch.sigmoid(-stop_logits)
        clue_count = used.sum(dim=-1)

        # A map sums to 1 whatever the grid's size; times the root of its cells, it is as large in each cell.
        spread = inside.sum(dim=-1).sqrt()[:, None, None]
        clues = (attention * used.unsqueeze(-1)).transpose(1, 2) @ self.tell(found) * spread
        everywhere = context.unsqueeze(1).expand(-1, features.shape[1], -1)
        scores = self.decode(torch.cat([features, colours, vote, clues, everywhere], dim=-1))
        scores = scores + self.vote_scale * vote + self.copy_scale * colours[..., :COLOURS]

        sure = _mean_inside(vote.amax(dim=-1, keepdim=True), inside)
        summary = torch.cat([context, _mean_inside(features, inside), sure, clue_count.unsqueeze(-1)], dim=-1)
        Q = torch.sigmoid(self.gate(summary)).squeeze(-1)
        named = {
            "stop_logits": stop_logits,
            "attention": attention.reshape(rows, self.clues, height, width),
            "clue_count": clue_count,
            "context": context,
        }
        return scores.transpose(1, 2).reshape(rows, COLOURS, height, width), Q, named

    def _cells(self, grids: Tensor) -> _Cells:
        """Look at grids (B, G, PLANES, S, S) cell by cell."""
        rows, count = grids.shape[:2]
        flat = grids.flatten(0, 1)
        features = self.embed(flat)
        for layer in self.layers:
            features = features + torch.relu(layer(features))
        colours = grids.flatten(3).transpose(2, 3)
        near = _neighbourhoods(flat).reshape(rows, count, -1, _NEAR * _NEAR * PLANES)
        features = features.flatten(2).transpose(1, 2).reshape(rows, count, colours.shape[2], -1)
        return _Cells(features, colours, near, 1.0 - colours[..., -1])

    def _vote(self, cells: _Cells, answers: Tensor) -> Tensor:
        """The colours (B, S*S, COLOURS) that stand in the outputs where the inputs look alike, by weight."""
        keys = self.key(cells.features[:, :-1]).flatten(1, 2)
        scores = self.query(cells.features[:, -1]) @ keys.transpose(1, 2) / math.sqrt(keys.shape[-1])
        weights = self.nearness.repeat_interleave(PLANES)
        alike = (cells.near[:, -1] * weights) @ cells.near[:, :-1].flatten(1, 2).transpose(1, 2)
        outside = 1.0 - cells.inside[:, :-1].flatten(1)
        shown = torch.softmax(scores + alike - _FAR_BELOW * outside.unsqueeze(1), dim=-1)
        return shown @ answers.flatten(1, 2)[..., :COLOURS]

    def _context(self, cells: _Cells, answers: Tensor) -> Tensor:
        """What changes between inputs and outputs, (B, D): the mean over the cells shown."""
        pairs = torch.cat([cells.features[:, :-1], cells.colours[:, :-1], answers], dim=-1).flatten(1, 2)
        return _mean_inside(torch.relu(self.change(pairs)), cells.inside[:, :-1].flatten(1))

    def _attention(self, features: Tensor, inside: Tensor, context: Tensor) -> Tensor:
        """Maps (B, K, S*S) over the cells of the grid asked about, each of sum 1."""
        asked = self.clue_in_context(context).unflatten(-1, (self.clues, -1))
        scores = self.clue(features).transpose(1, 2)
        scores = scores + asked @ features.transpose(1, 2) / math.sqrt(features.shape[-1])
        return torch.softmax(scores - _FAR_BELOW * (1.0 - inside).unsqueeze(1), dim=-1)


def _neighbourhoods(planes: Tensor) -> Tensor:
    """The one-hot colours around each cell, (N, S*S, 9 * PLANES); beyond the canvas all is outside."""
    height, width = planes.shape[2:]
    reach = _NEAR // 2
    frame = (reach, reach, reach, reach)
    padded = torch.cat(
        [
            nn.functional.pad(planes[:, :COLOURS], frame),
            nn.functional.pad(planes[:, COLOURS:], frame, value=1.0),
        ],
        dim=1,
    )
    shifted = [
        padded[:, :, down : down + height, right : right + width]
        for down in range(_NEAR)
        for right in range(_NEAR)
    ]
    return torch.cat(shifted, dim=1).flatten(2).transpose(1, 2)


def _mean_inside(values: Tensor, inside: Tensor) -> Tensor:
    """The mean (B, D) of values (B, cells, D) over the cells inside; 0 where there are none."""
    weights = inside.unsqueeze(-1)
    return (values * weights).sum(dim=1) / weights.sum(dim=1).clamp_min(1.0)
