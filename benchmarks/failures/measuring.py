"""What a failure is measured by: what is told to a case, what it finds, and the bounds that must hold."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from scm.seeding import generator, seeded_init
from scm.training.config import TrainingConfig
from scm.training.trainer import SCMTrainer


@dataclass(frozen=True, slots=True)
class Setting:
    """What a measurement is told: its seed, and where it runs."""

    seed: int
    device: torch.device

    def normal(self, *shape: int, stream: str = "data") -> Tensor:
        """Draw normal numbers from one stream of the seed, the same on every device."""
        return torch.randn(shape, generator=generator(self.seed, stream)).to(self.device)

    def make(self, build: Callable[[], nn.Module]) -> Any:
        """Build a model under the seed, the same weights at every call."""
        with seeded_init(self.seed):
            return build().to(self.device)


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a case measured.

    without_guard, with_guard: the measure where the failure is injected. reference_rule: with the published
    remedy in the guard's place, None where there is none to compare with. clean, clean_with_guard: the
    measure where nothing is injected; clean_change: the largest difference between those two runs, in
    whatever they leave (weights, gradients, losses), so that 0 says bit for bit the same. more: further
    numbers by name.
    """

    without_guard: float
    with_guard: float
    clean: float
    clean_with_guard: float
    clean_change: float
    reference_rule: float | None = None
    more: Mapping[str, float] = field(default_factory=dict)

    def value(self, name: str) -> float:
        """Return a number by its name, those of `more` included; nan for one that was not measured."""
        held = self.more[name] if name in self.more else getattr(self, name)
        return math.nan if held is None else float(held)


_RULES: dict[str, Callable[[float, float], bool]] = {
    "==": operator.eq,
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}


@dataclass(frozen=True, slots=True)
class Target:
    """A bound that a number of a case must keep at every seed; with `beside`, relative to another number."""

    name: str
    rule: str  # of `_RULES`, or "is nan"
    limit: float = 0.0
    beside: str = ""

    def holds(self, found: Found) -> bool:
        """Whether the bound is kept; nan keeps none but its own."""
        value = found.value(self.name)
        if self.rule == "is nan":
            return math.isnan(value)
        limit = self.limit + (found.value(self.beside) if self.beside else 0.0)
        return _RULES[self.rule](value, limit)

    def __str__(self) -> str:
        if self.rule == "is nan":
            return f"{self.name} is nan"
        if not self.beside:
            return f"{self.name} {self.rule} {self.limit:g}"
        shift = f" {'-' if self.limit < 0 else '+'} {abs(self.limit):g}" if self.limit else ""
        return f"{self.name} {self.rule} {self.beside}{shift}"


UNCHANGED = Target("clean_change", "==", 0.0)
TOLERATED = Target("clean_change", "<=", 1e-6)  # another formula of the same number


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One failure: what is done, why it fails, what is measured, and what must come out.

    clean_measure: what is measured of the runs without the failure, where that is something else. group:
    "failure", or "outcome" for what the reference expected of its remedies. reference: the published remedy
    or claim, where it is measured.
    """

    id: str
    trigger: str
    mechanism: str
    measure: str
    unit: str
    guard: str
    run: Callable[[Setting], Found]
    targets: tuple[Target, ...]
    clean_measure: str = ""
    group: str = "failure"
    reference: str = ""


def largest_difference(one: Iterable[Tensor], other: Iterable[Tensor]) -> float:
    """Return the largest absolute difference of two lists of tensors; nan where one holds a nan."""
    gaps = [(a.detach() - b.detach()).abs().max().double() for a, b in zip(one, other, strict=True)]
    return float(torch.stack(gaps).max())  # max of torch passes nan on, Python's loses it


def number(value: Tensor) -> float:
    """Return a 0-d tensor as a plain number."""
    return float(value.detach())


def gradient_of(value: Tensor, of: Tensor) -> Tensor:
    """Return the gradient of a 0-d tensor."""
    (found,) = torch.autograd.grad(value, of)
    return found


def train_guarded(
    model: nn.Module,
    loss_fn: Callable[..., Tensor],
    batches: Iterable[Any],
    setting: Setting,
    *,
    companions: Sequence[Any] = (),
    **config: Any,
) -> SCMTrainer:
    """Train a model with `SCMTrainer` and its guards, Adam at 0.01 and the settings of `config`."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    told = TrainingConfig(coverage_threshold=0.0, seed=setting.seed, device=setting.device, **config)
    trainer = SCMTrainer(model, optimizer, loss_fn, batches, config=told, companions=companions)
    trainer.fit()
    return trainer
