"""Sampling rows near the singular set more often, with the weights that undo the change of objective."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sized
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, WeightedRandomSampler

_STATE_VERSION = 3


@dataclass(frozen=True)
class AdaptiveSamplerConfig:
    """How `AdaptiveSampler` weighs rows and what its loader looks like; valid once built.

    tau_train and beta (> 0) are in units of |Q|; gamma in (0, 1] is the weight of the newest update; alpha
    >= 0 the strength; s_min > 0 a floor, which acts only above 1 because weights start there. `normalized`
    divides the probability by its value at Q = 0: without it (the recorded formula) a beta far above
    tau_train keeps it at about one half even there, so that bottoms that decode well are drawn 1.5 times.
    """

    tau_train: float = 1e-4
    beta: float = 0.1
    gamma: float = 0.1
    alpha: float = 1.0
    s_min: float = 0.1
    batch_size: int = 32
    num_workers: int = 0
    drop_last: bool = False
    pin_memory: bool = False
    normalized: bool = False

    def __post_init__(self) -> None:
        rules = [
            ("tau_train", self.tau_train >= 0.0 and math.isfinite(self.tau_train), "finite and >= 0"),
            ("beta", self.beta > 0.0 and math.isfinite(self.beta), "finite and > 0"),
            ("gamma", 0.0 < self.gamma <= 1.0, "in (0, 1]"),
            ("alpha", self.alpha >= 0.0 and math.isfinite(self.alpha), "finite and >= 0"),
            ("s_min", self.s_min > 0.0 and math.isfinite(self.s_min), "finite and > 0"),
            ("batch_size", self.batch_size >= 1, ">= 1"),
            ("num_workers", self.num_workers >= 0, ">= 0"),
        ]
        for name, holds, rule in rules:
            if not holds:
                raise ValueError(f"{name} must be {rule}, got {getattr(self, name)}")


class AdaptiveSampler:
    """Draws dataset rows by how far their singularity probability is from their bottom label.

    `update` feeds |Q| of the whole dataset in index order, or of some rows with `indices`; `observe` feeds
    those of a training's own batches. The weight of a row is max(s_min, 1 + alpha·|p̃ − 1(bottom)|), p̃ the
    moving average (from 0) of σ((tau_train − |q|)/beta). State is float32 on `device`; draws come from a
    generator of the sampler's own, so that no other stream of random numbers moves. Drawing changes the
    objective from a mean over rows to a weighted one; multiply losses by `importance_weights` of the drawn
    rows to have the mean back.

    Iterating over it is an epoch: the rows are drawn when it begins, so that an `update` acts on the next
    one, and the place in it is part of the state, so that a trainer's checkpoint goes on in mid-epoch.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        config: AdaptiveSamplerConfig | None = None,
        *,
        seed: int = 0,
        device: str | torch.device = "cpu",
    ) -> None:
        self.dataset = dataset
        self.config = AdaptiveSamplerConfig() if config is None else config
        self.generator = torch.Generator().manual_seed(seed)
        rows = len(cast(Sized, dataset))
        if rows == 0:
            raise ValueError("dataset must have at least one row, got 0")
        self._probabilities = torch.zeros(rows, dtype=torch.float32, device=device)
        self._bottom = torch.zeros(rows, dtype=torch.float32, device=device)
        self._seen = torch.zeros(rows, dtype=torch.bool, device=device)
        self._order = torch.zeros(0, dtype=torch.int64)  # the rows of the epoch under way
        self._worker_seed = 0
        self._position = 0  # batches handed out of it
        self._resume = False

    def __len__(self) -> int:
        return len(self._probabilities)

    @property
    def weights(self) -> Tensor:
        """Unnormalised sampling weights (N,), float32; all 1 before the first update."""
        return sampling_weights(
            self._probabilities, self._bottom, alpha=self.config.alpha, s_min=self.config.s_min
        )

    @property
    def importance_weights(self) -> Tensor:
        """Weights (N,) that undo the sampling: the mean of weight·loss over draws estimates the mean."""
        weights = self.weights
        return weights.mean() / weights

    def update(
        self, q_values: Tensor, bottom_mask: Tensor | None = None, *, indices: Tensor | None = None
    ) -> None:
        """Take in denominators (N,) or (N, 1) and bottom labels of all rows, or of the rows `indices`.

        A NaN denominator decodes as bottom and counts as probability 1. Without a mask rows count as finite.
        Tensors may live on any device and carry gradients; the state stays where it is. ValueError for shapes
        that do not match, for indices out of range or named twice.
        """
        device = self._probabilities.device
        where = self._rows(indices)
        count = len(self) if where is None else len(where)
        q = _flat_rows("q_values", q_values, count).to(device=device, dtype=torch.float32)
        if bottom_mask is None:
            bottom = torch.zeros(count, dtype=torch.float32, device=device)
        else:
            bottom = _flat_rows("bottom_mask", bottom_mask, count).to(device=device, dtype=torch.float32)
        fresh = singularity_prob(
            q, self.config.tau_train, self.config.beta, normalized=self.config.normalized
        )
        if where is None:
            self._probabilities = ema_update(self._probabilities, fresh, self.config.gamma)
            self._bottom = bottom
            self._seen.fill_(True)
        else:
            self._probabilities[where] = ema_update(self._probabilities[where], fresh, self.config.gamma)
            self._bottom[where] = bottom
            self._seen[where] = True

    def observe(self, q_values: Tensor, bottom_mask: Tensor, indices: Tensor) -> None:
        """Take in denominators (n,) and bottom labels of the rows `indices`, on the state's device.

        Made for a step: nothing is checked, nothing waits for the device, and a row may come twice (the
        larger probability counts). Differs from `update`, whose averages start at 0: the first that is heard
        of a row counts whole, so that weights mean something after one epoch, not after 1 / gamma of them.
        """
        fresh = singularity_prob(
            q_values.detach().to(torch.float32),
            self.config.tau_train,
            self.config.beta,
            normalized=self.config.normalized,
        )
        averaged = ema_update(self._probabilities[indices], fresh, self.config.gamma)
        averaged = torch.where(self._seen[indices], averaged, fresh)
        # Whatever the order in which a device writes, the largest of a row's values is left.
        self._probabilities.scatter_reduce_(0, indices, averaged, "amax", include_self=False)
        self._bottom[indices] = bottom_mask.to(torch.float32)
        self._seen.index_fill_(0, indices, True)  # an assignment of True would copy it, and wait

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """Draw `count` row indices with replacement, and their importance weights, on the state's device."""
        weights = self.weights.cpu()
        indices = torch.multinomial(weights, count, replacement=True, generator=self.generator)
        device = self._probabilities.device
        return indices.to(device), self.importance_weights[indices.to(device)]

    def dataloader(self, **overrides: Any) -> DataLoader[Any]:
        """A DataLoader that draws len(dataset) rows with replacement by the weights of this moment."""
        sampler = WeightedRandomSampler(
            self.weights.tolist(), num_samples=len(self), replacement=True, generator=self.generator
        )
        settings: dict[str, Any] = {
            "batch_size": self.config.batch_size,
            "num_workers": self.config.num_workers,
            "drop_last": self.config.drop_last,
            "pin_memory": self.config.pin_memory,
            "sampler": sampler,
            # The loader draws its workers' seed too; left to itself it would take it from the global stream.
            "generator": self.generator,
        }
        return DataLoader(self.dataset, **{**settings, **overrides})

    def __iter__(self) -> Iterator[Any]:
        if not self._resume:
            self._order = self.draw(len(self))[0].cpu()
            self._worker_seed = int(torch.randint(2**62, (), generator=self.generator))
            self._position = 0
        self._resume = False
        left = self._order[self._position * self.config.batch_size :]
        # The loader draws too; from this generator, so that a resumed epoch ends where it would have.
        own = torch.Generator().manual_seed(self._worker_seed)
        for batch in self.dataloader(sampler=left.tolist(), generator=own):
            self._position += 1
            yield batch
        self._position = 0

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next draws depend on, as tensors and ints."""
        return {
            "version": _STATE_VERSION,
            "probabilities": self._probabilities.detach().cpu().clone(),
            "bottom": self._bottom.detach().cpu().clone(),
            "seen": self._seen.cpu().clone(),
            "generator": self.generator.get_state(),
            "order": self._order.clone(),
            "worker_seed": self._worker_seed,
            "position": self._position,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`, an epoch under way included.

        ValueError for another version or another number of rows.
        """
        if state.get("version") != _STATE_VERSION:
            raise ValueError(
                f"sampler state must be of version {_STATE_VERSION}, got {state.get('version')!r}"
            )
        if len(state["probabilities"]) != len(self):
            raise ValueError(f"sampler state must have {len(self)} rows, got {len(state['probabilities'])}")
        device = self._probabilities.device
        self._probabilities = state["probabilities"].to(device).clone()
        self._bottom = state["bottom"].to(device).clone()
        self._seen = state["seen"].to(device).clone()
        self.generator.set_state(state["generator"].cpu())
        self._order = state["order"].cpu().clone()
        self._worker_seed = int(state["worker_seed"])
        self._position = int(state["position"])
        self._resume = self._position > 0

    def _rows(self, indices: Tensor | None) -> Tensor | None:
        if indices is None:
            return None
        where = torch.as_tensor(indices).detach().to(self._probabilities.device)
        if where.ndim != 1 or where.dtype != torch.int64:
            raise ValueError(f"indices must be int64 of shape (n,), got {where.dtype} {tuple(where.shape)}")
        if len(where) and not (int(where.min()) >= 0 and int(where.max()) < len(self)):
            raise ValueError(
                f"indices must be in [0, {len(self)}), got {int(where.min())} to {int(where.max())}"
            )
        if len(where.unique()) != len(where):
            raise ValueError("indices must name each row once, got duplicates")
        return where


def singularity_prob(
    q_values: Tensor, tau_train: float, beta: float = 0.1, *, normalized: bool = False
) -> Tensor:
    """σ((tau_train − |q|)/beta), divided by its value at q = 0 where `normalized`; 1 for a NaN q.

    Unlike zeroproofml 0.6.1 a NaN denominator, which decodes as bottom, is certain and does not spread.
    """
    if not beta > 0.0:
        raise ValueError(f"beta must be > 0, got {beta=}")
    probability = torch.sigmoid((tau_train - q_values.abs()) / beta)
    if normalized:
        probability = probability / torch.sigmoid(torch.tensor(tau_train / beta, dtype=probability.dtype))
    return torch.where(torch.isnan(q_values), torch.ones_like(probability), probability)


def ema_update(previous: Tensor, current: Tensor, gamma: float = 0.1) -> Tensor:
    """gamma·current + (1 − gamma)·previous; ValueError unless gamma is in (0, 1] and the shapes are equal."""
    if not 0.0 < gamma <= 1.0:
        raise ValueError(f"gamma must be in (0, 1], got {gamma=}")
    if previous.shape != current.shape:
        raise ValueError(
            f"previous and current must have one shape, got {tuple(previous.shape)}, {tuple(current.shape)}"
        )
    return gamma * current + (1.0 - gamma) * previous


def sampling_weights(
    probabilities: Tensor, bottom_mask: Tensor | None = None, *, alpha: float = 1.0, s_min: float = 0.1
) -> Tensor:
    """max(s_min, 1 + alpha·|p − 1(bottom)|); a mask that is left out marks no row."""
    if bottom_mask is None:
        mismatch = probabilities.abs()
    else:
        if bottom_mask.shape != probabilities.shape:
            raise ValueError(
                f"bottom_mask must have shape {tuple(probabilities.shape)}, got {tuple(bottom_mask.shape)}"
            )
        mismatch = (probabilities - bottom_mask.to(probabilities.dtype)).abs()
    return (1.0 + alpha * mismatch).clamp_min(s_min)


def _flat_rows(name: str, given: Tensor, count: int) -> Tensor:
    if tuple(given.shape) not in {(count,), (count, 1)}:
        raise ValueError(f"{name} must have shape ({count},) or ({count}, 1), got {tuple(given.shape)}")
    return given.detach().reshape(count)
