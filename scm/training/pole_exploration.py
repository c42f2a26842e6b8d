"""New rows on both sides of a pole, where the function that is learned can be asked for its values.

For inputs of one number alone, where a pole is a point that has sides; with more, a pole is a surface, and
drawing the rows that are near it more often (`near_pole`) takes the place of this. Decided here: where the
model has a pole, which points are trained besides the data, and in which epochs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from scm.guards.gates import RAW_OUTPUTS
from scm.training.loader import TensorBatches
from scm.training.near_pole import NearPoleBatches
from scm.training.targets import SemanticTargets

if TYPE_CHECKING:
    from scm.training.companion import Moment
    from scm.training.records import EpochReport


@dataclass(frozen=True, kw_only=True)
class ExplorationConfig:
    """Where and how long to explore.

    radius: how far beside a pole the two points lie, and how near two poles count as one. epochs: how many
    a pole is explored in after it was found. threshold: |Q| up to which an input counts as one at a pole.
    until_epoch: no exploration from this 0-based epoch on; None, to the end. Raises ValueError for numbers
    out of range.
    """

    radius: float = 0.05
    epochs: int = 5
    threshold: float = 0.1
    until_epoch: int | None = None

    def __post_init__(self) -> None:
        for name in ("radius", "threshold"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be finite and > 0, got {name}={value!r}")
        if self.epochs < 1:
            raise ValueError(f"epochs must be >= 1, got epochs={self.epochs!r}")
        if self.until_epoch is not None and self.until_epoch < 0:
            raise ValueError(f"until_epoch must be >= 0, or None, got until_epoch={self.until_epoch!r}")


def find_poles(inputs: Tensor, q_abs: Tensor, *, threshold: float, radius: float) -> list[float]:
    """Return where |Q| (n,) is smallest in each stretch of inputs (n,) that keeps it <= threshold, ascending.

    Of two that are less than `radius` apart, the one with the smaller |Q| is kept. Waits for the device.
    """
    order = inputs.argsort()
    pairs = zip(inputs[order].tolist(), q_abs[order].tolist(), strict=True)
    lowest: list[tuple[float, float]] = []  # (|Q|, x) of each stretch
    inside = False
    for x, q in pairs:
        near = q <= threshold
        if near and inside:
            lowest[-1] = min(lowest[-1], (q, x))
        elif near:
            lowest.append((q, x))
        inside = near
    poles: list[float] = []
    for _, x in sorted(lowest):
        if all(abs(x - pole) >= radius for pole in poles):
            poles.append(x)
    return sorted(poles)


class PoleExploration:
    """Find the poles of a model while it trains, and say which points beside them are due.

    A pole that was found in an epoch is explored in the next ones: x - radius and x + radius are trained once
    an epoch, labelled by `label`, the function that is learned: points shaped as the data's inputs -> their
    targets. It is a companion, and gives its points to the `ExploringBatches` that the training reads.

    telemetry: poles_explored, how many the newest epoch trained points of; 0 before.

    Differs from zeroproof 0.1.0: poles are looked for in all that the epoch answered, before it is cleared
    and not after; a stretch of small |Q| is one pole, not one for each radius that fits into it.
    """

    def __init__(
        self, label: Callable[[Tensor], SemanticTargets], config: ExplorationConfig | None = None
    ) -> None:
        self.label = label
        self.config = ExplorationConfig() if config is None else config
        self._last_epochs: dict[float, int] = {}  # by pole: the last epoch in which it is explored
        self._due: list[float] = []  # poles explored in the epoch under way
        self._answered: list[tuple[Tensor, Tensor]] = []  # inputs and |Q| of the epoch's micro-batches

    def begin_epoch(self, epoch: int, facts: dict[str, Any]) -> None:
        """Decide which poles are explored in this epoch."""
        self._last_epochs = {x: last for x, last in self._last_epochs.items() if last >= epoch}
        self._due = sorted(self._last_epochs)

    def after_backward(self, moment: Moment) -> None:
        """Keep inputs and |Q|; ValueError for inputs of more than one number."""
        inputs, q = moment.fed.inputs, moment.found.get(RAW_OUTPUTS, moment.outputs)[1]
        if inputs.numel() != len(inputs) or q.numel() != len(q):
            raise ValueError(
                "poles can be explored where a row is one number and one denominator, "
                f"got inputs {tuple(inputs.shape)}, Q {tuple(q.shape)}"
            )
        self._answered.append((inputs.detach().flatten(), q.detach().abs().flatten()))

    def after_epoch(self, report: EpochReport) -> None:
        """Look for poles in what the epoch answered, and have new ones explored from the next epoch on."""
        config = self.config
        inputs, sizes = self._columns()
        self._answered = []
        last = report.epoch + config.epochs
        if config.until_epoch is not None:
            last = min(last, config.until_epoch - 1)
        for pole in find_poles(inputs, sizes, threshold=config.threshold, radius=config.radius):
            if all(abs(pole - known) >= config.radius for known in self._last_epochs):
                self._last_epochs[pole] = last

    def points(self) -> list[float]:
        """Return the points that are due in the epoch under way, ascending."""
        return sorted(x + side * self.config.radius for x in self._due for side in (-1, 1))

    def telemetry(self) -> dict[str, float]:
        """Return how many poles the newest epoch explored."""
        return {"poles_explored": float(len(self._due))}

    def state_dict(self) -> dict[str, Any]:
        """Return the poles that are explored, and what the epoch under way has answered."""
        return {"last_epochs": dict(self._last_epochs), "due": list(self._due), "answered": self._columns()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""
        self._last_epochs = {float(x): int(last) for x, last in state["last_epochs"].items()}
        self._due = [float(x) for x in state["due"]]
        inputs, sizes = state["answered"]
        self._answered = [(inputs.clone(), sizes.clone())]

    def _columns(self) -> tuple[Tensor, Tensor]:
        """All inputs and sizes of the epoch so far, on the CPU."""
        if not self._answered:
            return torch.zeros(0), torch.zeros(0)
        inputs, sizes = zip(*self._answered, strict=True)
        return torch.cat([part.cpu() for part in inputs]), torch.cat([part.cpu() for part in sizes])


class ExploringBatches:
    """The batches of a loader, and at the end of each epoch those of the points that an exploration has due.

    The further batches are (points, targets, {"explored"}); what else is said of rows is the loader's. The
    loader must hold its rows' `inputs`, which say how a point looks, and keep its place, as `TensorBatches`
    and `NearPoleBatches` do.
    """

    def __init__(self, loader: TensorBatches | NearPoleBatches, exploration: PoleExploration) -> None:
        self.loader = loader
        self.exploration = exploration
        self._position = 0  # batches handed out in the epoch under way
        self._resume = False

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        start = self._position if self._resume else 0
        self._resume = False
        self._position = start
        # Beyond the loader's last batch its own epoch is over: asked again, it would begin another.
        if start <= len(self.loader):
            for batch in self.loader:
                self._position += 1
                yield batch
        for batch in self._points()[max(0, start - len(self.loader)) :]:
            self._position += 1
            yield batch
        self._position = 0

    def _points(self) -> list[tuple[Tensor, SemanticTargets, dict[str, Tensor]]]:
        points = self.exploration.points()
        if not points:
            return []
        like = self.loader.inputs
        x = torch.tensor(points, dtype=like.dtype, device=like.device).reshape(-1, *like.shape[1:])
        targets = self.exploration.label(x).to(like.device, self.loader.targets.Y_n.dtype)
        explored = torch.ones(len(x), dtype=torch.bool, device=like.device)
        size = self.loader.batch_size
        parts = [torch.arange(len(x), device=like.device)[i : i + size] for i in range(0, len(x), size)]
        return [(x[rows], targets.index(rows), {"explored": explored[rows]}) for rows in parts]

    def state_dict(self) -> dict[str, Any]:
        """Return the place in the epoch under way; the points are the exploration's own state."""
        return {"position": self._position, "loader": self.loader.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on, at the next iteration, from where `state` was taken; ValueError when the data are others."""
        self.loader.load_state_dict(state["loader"])
        self._position = int(state["position"])
        self._resume = self._position > 0
