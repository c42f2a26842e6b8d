"""What a model's inputs may be turned into without changing what is asked: the square's eight, and one's own.

Decided here: what a transform does to inputs, and how it is taken back from outputs. What is made of the
views is decided in `consistency`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

Action = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Symmetry:
    """One transform of inputs (B, ...), and what takes it back.

    `inverse` undoes `forward` on inputs. `restore` takes the transform back from what the model answered,
    in whatever structure that is; without it, `inverse` is applied to every tensor of the answer, as suits
    answers that lie where the inputs lie (a class at every cell of a grid). An answer that should not change
    at all is restored by `unchanged`.
    """

    name: str
    forward: Action
    inverse: Action
    restore: Callable[[Any], Any] | None = None

    def apply(self, inputs: Tensor) -> Tensor:
        """Return the transformed inputs, contiguous, as models expect their batches."""
        return self.forward(inputs).contiguous()

    def undo(self, outputs: Any) -> Any:
        """Return what the model answered to transformed inputs, as an answer to the original ones."""
        if self.restore is not None:
            return self.restore(outputs)
        return _each(self.inverse, outputs)


def unchanged(outputs: Any) -> Any:
    """Return the outputs as they are: how an answer is restored that the transform should not change."""
    return outputs


def _each(action: Action, outputs: Any) -> Any:
    if isinstance(outputs, Tensor):
        return action(outputs)
    if isinstance(outputs, Mapping):
        return {name: _each(action, item) for name, item in outputs.items()}
    if isinstance(outputs, (tuple, list)):
        return tuple(_each(action, item) for item in outputs)
    raise TypeError(f"outputs must be tensors in tuples, lists or mappings, got {type(outputs).__name__}")


# --- the square ----------------------------------------------------------------------------------


def _turned(quarters: int) -> Action:
    return lambda grid: torch.rot90(grid, quarters, (-2, -1))


def _flipped(axis: int) -> Action:
    return lambda grid: grid.flip(axis)


def _transposed(grid: Tensor) -> Tensor:
    return grid.transpose(-2, -1)


def _anti_transposed(grid: Tensor) -> Tensor:
    return grid.flip(-2, -1).transpose(-2, -1)


_SQUARE = (
    Symmetry("identity", unchanged, unchanged),
    Symmetry("rotate_90", _turned(1), _turned(3)),
    Symmetry("rotate_180", _turned(2), _turned(2)),
    Symmetry("rotate_270", _turned(3), _turned(1)),
    Symmetry("flip_h", _flipped(-1), _flipped(-1)),
    Symmetry("flip_v", _flipped(-2), _flipped(-2)),
    Symmetry("transpose", _transposed, _transposed),
    Symmetry("anti_transpose", _anti_transposed, _anti_transposed),
)
D4: Mapping[str, Symmetry] = MappingProxyType({element.name: element for element in _SQUARE})
"""The symmetries of the square, of the last two axes, in the order of their ids 0 to 7.

Rotations are counter-clockwise; flip_h turns left and right around, flip_v top and bottom. Sides need not be
equal: a quarter turn of (H, W) is (W, H), and its inverse (H, W) again.
"""

D4_ALIASES: Mapping[str, str] = MappingProxyType(
    {
        "rot90_ccw": "rotate_90",
        "rot180": "rotate_180",
        "rot270_ccw": "rotate_270",
        "fliplr": "flip_h",
        "flipud": "flip_v",
        "transpose_neg": "anti_transpose",
    }
)


def d4(name: str | int) -> Symmetry:
    """Return one symmetry of the square by its name, an alias, or its id.

    Raises ValueError naming the known ones. Differs from the reference, whose losses know five of the names
    and take every other one for the identity.

    >>> d4("transpose_neg").name, d4(1).name
    ('anti_transpose', 'rotate_90')
    """
    if isinstance(name, int) and not isinstance(name, bool) and 0 <= name < len(_SQUARE):
        return _SQUARE[name]
    (found,) = select(D4, [name], aliases=D4_ALIASES)
    return D4[found]


def select(
    symmetries: Mapping[str, Symmetry], names: Sequence[Any], *, aliases: Mapping[str, str] = D4_ALIASES
) -> tuple[str, ...]:
    """Return the names as they are called in `symmetries`; ValueError naming the known for any other."""
    found = []
    for name in names:
        own = name if name in symmetries else aliases.get(name, name)
        if own not in symmetries:
            near = get_close_matches(str(name), list(symmetries), n=1, cutoff=0.5)
            guess = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"unknown symmetry {name!r}{guess} known: {', '.join(symmetries)}")
        found.append(own)
    return tuple(found)


# --- groups of one's own -------------------------------------------------------------------------

Actions = tuple[Action, Action] | tuple[Action, Action, Callable[[Any], Any]]
"""(forward, inverse) on inputs, and how outputs are restored where that is not `inverse` on each tensor."""


def make_symmetries(actions: Mapping[str, Actions], sample: Tensor) -> dict[str, Symmetry]:
    """Make symmetries of one's own from functions by name, tried on `sample`, a batch of inputs.

    Raises ValueError when an inverse does not bring the sample back.
    """
    made = {name: Symmetry(name, *functions) for name, functions in actions.items()}
    check_symmetries(made, sample)
    return made


def check_symmetries(symmetries: Mapping[str, Symmetry], sample: Tensor) -> None:
    """Raise ValueError unless there is one at least, and each inverse brings `sample` back.

    Floating-point inputs may come back with rounding errors.
    """
    if not symmetries:
        raise ValueError("symmetries must hold at least one, got none")
    for name, symmetry in symmetries.items():
        back = symmetry.inverse(symmetry.forward(sample))
        if not _same(back, sample):
            raise ValueError(f"the inverse of the symmetry {name!r} must undo it, it does not on the sample")


def _same(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if not one.is_floating_point():
        return torch.equal(one, other)
    near = torch.finfo(one.dtype).eps ** 0.5
    return torch.allclose(one, other, rtol=near, atol=near, equal_nan=True)


def then_table(symmetries: Mapping[str, Symmetry], sample: Tensor) -> list[list[int]]:
    """Return the table of the group: entry [a][b] is the place of "a, then b" in `symmetries`.

    `sample` must look different under each of them. Raises ValueError when two of them act alike on it, or
    when one after another is none of them: they are no group.
    """
    moved = [symmetry.forward(sample) for symmetry in symmetries.values()]
    names = list(symmetries)
    for place, image in enumerate(moved):
        if _places(moved, image) != [place]:
            raise ValueError(f"sample must show the symmetries apart, {names[place]!r} acts like another")
    table = []
    for first, image in zip(names, moved, strict=True):
        row = []
        for second, symmetry in symmetries.items():
            found = _places(moved, symmetry.forward(image))
            if not found:
                raise ValueError(f"symmetries must form a group, {first!r} then {second!r} is none of them")
            row.append(found[0])
        table.append(row)
    return table


def _places(images: list[Tensor], image: Tensor) -> list[int]:
    return [place for place, other in enumerate(images) if _same(image, other)]
