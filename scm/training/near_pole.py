"""Drawing rows near poles more often while training: the batches, and what they learn from.

How a row's |Q| becomes its weight is decided in `sampler`; new rows near poles, where the function that is
learned can be asked for them, in `pole_exploration`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from scm.guards.gates import RAW_OUTPUTS
from scm.training.loader import TensorBatches
from scm.training.sampler import AdaptiveSampler, AdaptiveSamplerConfig
from scm.training.targets import SemanticTargets

if TYPE_CHECKING:
    from scm.training.companion import Moment

SampledBatch = tuple[Tensor, SemanticTargets, dict[str, Tensor]]


class NearPoleBatches:
    """Batches as `TensorBatches` gives them, of rows drawn by how far their |Q| is from what it should be.

    An epoch draws as many rows as there are, with replacement, by the weights when it begins: 1 for rows that
    nothing is known of, and more for finite rows with a small |Q| and bottoms with a large one (see
    `AdaptiveSampler`). Rows that may not be trained keep weight 1, whatever the model answers. Each batch is
    (inputs, targets, {"indices"}); with `correct` also "row_weights", under which the mean of a loss
    estimates the plain mean over all rows again.

    config: batch_size and drop_last as well as the weights' form; nothing else of its loader acts here. The
    draws come from a generator of the loader's own, on the CPU; weights stay on `device`, and are read once
    an epoch. Raises ValueError where `TensorBatches` does.
    """

    def __init__(
        self,
        inputs: Tensor,
        targets: SemanticTargets,
        config: AdaptiveSamplerConfig,
        *,
        seed: int = 0,
        correct: bool = False,
        device: str | torch.device | None = None,
    ) -> None:
        self._batches = TensorBatches(
            inputs, targets, config.batch_size, device=device, drop_last=config.drop_last
        )
        self.device = self._batches.device
        self.batch_size = config.batch_size
        self.drop_last = config.drop_last
        self.correct = correct
        self.sampler = AdaptiveSampler(TensorDataset(inputs), config, seed=seed, device=self.device)
        # A row of several outputs is a bottom if one of them is, and trained if one of them is.
        self._bottom = _any_output(self._batches.targets.mask_semantic)
        self._trained = _any_output(self._batches.targets.mask_trained)
        self._position = 0  # batches handed out in the epoch under way
        self._resume = False
        self._drawn = torch.zeros(0, dtype=torch.int64)
        self._importance = torch.zeros(0)

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""
        return len(self._batches)

    @property
    def rows(self) -> int:
        """The number of rows that the data hold, and that an epoch draws."""
        return self._batches.rows

    @property
    def inputs(self) -> Tensor:
        """The rows' inputs, (N, ...), on the device."""
        return self._batches.inputs

    @property
    def targets(self) -> SemanticTargets:
        """The rows' targets, N of them, on the device."""
        return self._batches.targets

    def __iter__(self) -> Iterator[SampledBatch]:
        start = self._position if self._resume else 0
        if not self._resume:
            self._drawn, self._importance = self.sampler.draw(self.rows)
        self._resume = False
        self._position = start
        named = {"indices": self._drawn.split(self.batch_size)}
        if self.correct:
            weights = self._importance.to(self.targets.Y_n.dtype)
            named["row_weights"] = weights.split(self.batch_size)
        for number, batch in enumerate(self._batches.in_order(self._drawn, start), start):
            self._position += 1
            yield *batch, {name: parts[number] for name, parts in named.items()}
        self._position = 0

    def observe(self, q: Tensor, indices: Tensor) -> None:
        """Take in the denominators (n,) or (n, outputs) of rows; the smallest counts. Never waits.

        indices: which rows, int64 (n,), as the batches name them.
        """
        sizes = q.detach().abs().flatten(1).amin(1) if q.ndim > 1 else q.detach().abs()
        sizes = torch.where(self._trained[indices], sizes, torch.inf)
        self.sampler.observe(sizes, self._bottom[indices], indices)

    def state_dict(self) -> dict[str, Any]:
        """Return the weights, the generator, and the place and the rows of the epoch under way."""
        return {
            "rows": self.rows,
            "batch_size": self.batch_size,
            "drop_last": self.drop_last,
            "correct": self.correct,
            "position": self._position,
            "drawn": self._drawn.cpu().clone(),
            "importance": self._importance.cpu().clone(),
            "sampler": self.sampler.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on, at the next iteration, from where `state` was taken.

        Raises ValueError when the state is of other data or batches, or of another way of drawing.
        """
        for name in ("rows", "batch_size", "drop_last", "correct"):
            if state.get(name) != getattr(self, name):
                raise ValueError(f"{name} must be as saved ({state.get(name)}), got {getattr(self, name)}")
        self.sampler.load_state_dict(state["sampler"])
        self._drawn = state["drawn"].to(self.device).clone()
        self._importance = state["importance"].to(self.device).clone()
        self._position = int(state["position"])
        self._resume = self._position > 0


class NearPoleFeedback:
    """Tell a loader what the model answered on its rows, micro-batch by micro-batch, without a wait.

    The loader's own state is in the trainer's checkpoint; there is no other. telemetry, both 1 where all rows
    are drawn alike: sampling_effective_share, the share of rows that would carry as much information if they
    were; sampling_weight_max, of the weights over their mean.
    """

    def __init__(self, batches: NearPoleBatches) -> None:
        self.batches = batches

    def after_backward(self, moment: Moment) -> None:
        """Take in the denominators; ValueError where the training's loader does not name its rows.

        Points that an exploration adds are no rows of the data, and are passed over.
        """
        if "explored" in moment.fed.extras:
            return
        indices = moment.fed.extras.get("indices")
        if indices is None:
            raise ValueError(
                'near-pole sampling needs batches with {"indices"}, as NearPoleBatches gives them'
            )
        self.batches.observe(moment.found.get(RAW_OUTPUTS, moment.outputs)[1], indices)

    def telemetry(self) -> dict[str, float]:
        """Return how unequal the weights are now."""
        weights = self.batches.sampler.weights.to(torch.float64)
        total = weights.sum()
        share = total.square() / (len(weights) * weights.square().sum())
        largest = weights.max() * len(weights) / total
        return dict(
            zip(
                ("sampling_effective_share", "sampling_weight_max"),
                torch.stack([share, largest]).tolist(),
                strict=True,
            )
        )


def _any_output(mask: Tensor) -> Tensor:
    return mask.flatten(1).any(1) if mask.ndim > 1 else mask
