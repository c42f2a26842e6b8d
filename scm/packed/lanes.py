"""The trials of a pack as the host knows them: what each was told, where it stands, how it ends."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import nn

from scm.data import Split
from scm.packed.eligibility import step_signature, why_not_packable
from scm.packed.stack import Layout, fingerprint
from scm.seeding import seeded_init
from scm.trial import DTYPES, make_scheduler
from scm.trial_config import KNOBS, TrialConfig

BuildModel = Callable[[TrialConfig], nn.Module]
SplitsOf = Callable[[int], Mapping[str, Split]]
NAN_KINDS = ("loss", "gradient", "output", "parameter")


class NotPackable(ValueError):  # noqa: N818, it is an answer rather than an error
    """A trial that must be trained alone; `reason` says why."""

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(f"trial {key} must be trained alone: {reason}")
        self.key = key
        self.reason = reason


@dataclass(frozen=True, slots=True)
class PackTrial:
    """One trial: its config, its seed, and the key by which it is asked for."""

    config: TrialConfig
    seed: int
    key: str


@dataclass(frozen=True)
class Entrant:
    """A trial that was looked at: its first weights, and with which others it may be trained.

    signature: equal for trials of one pack. reason: why it must be trained alone, None where it need not.
    """

    trial: PackTrial
    signature: tuple[Any, ...]
    reason: str | None
    model: nn.Module
    splits: Mapping[str, Split]


def build_first_model(trial: PackTrial, build_model: BuildModel) -> nn.Module:
    """Build a trial's model with its first weights, as `make_trainer` does."""
    with seeded_init(trial.seed, "init"):
        return build_model(trial.config).to(DTYPES[trial.config.dtype])


def look_at(trial: PackTrial, build_model: BuildModel, splits: Mapping[str, Split]) -> Entrant:
    """Build a trial's model as `make_trainer` does, and say with which others it may be trained."""
    return FirstModels(build_model).look_at(trial, splits)


class FirstModel(NamedTuple):
    """A model with its first weights, and what is seen of it: why it has no layout, its `fingerprint`."""

    model: nn.Module
    refusal: str | None
    print: Any


class FirstModels:
    """Looks at trials, and builds for those of one seed that differ in nothing the builder reads one model.

    The models are for looking and for copying from: nobody trains them.
    """

    def __init__(self, build_model: BuildModel) -> None:
        self._build_model = build_model
        # By seed and by what was read of the config: the values of those knobs, and what came of them.
        self._built: dict[tuple[int, tuple[str, ...]], dict[tuple[str, ...], FirstModel]] = {}

    def look_at(self, trial: PackTrial, splits: Mapping[str, Split]) -> Entrant:
        """Say with which others a trial may be trained, as `look_at` does."""
        model, refusal, printed = self._of(trial)
        reason = why_not_packable(trial.config, model, splits) or refusal
        signature = () if reason is not None else (*step_signature(trial.config, splits), printed)
        return Entrant(trial, signature, reason, model, splits)

    def _of(self, trial: PackTrial) -> FirstModel:
        for (seed, names), models in self._built.items():
            found = models.get(_values(trial.config, names)) if seed == trial.seed else None
            if found is not None:
                return found
        watched = _WatchedConfig.of(trial.config)
        model = build_first_model(replace(trial, config=watched), self._build_model)
        # A model that keeps its config may read it later on. Its fingerprint reads all that it keeps.
        made = FirstModel(model, _refusal(model), fingerprint(model))
        names = tuple(sorted(watched.read))
        self._built.setdefault((trial.seed, names), {})[_values(trial.config, names)] = made
        return made


def _values(config: TrialConfig, names: Sequence[str]) -> tuple[str, ...]:
    return tuple(repr(getattr(config, name)) for name in names)


def _refusal(model: nn.Module) -> str | None:
    try:
        Layout(model)
    except ValueError as error:
        return str(error)
    return None


class _WatchedConfig(TrialConfig):
    """A config that notes which of its knobs are read; a copy of it is made by reading all."""

    __slots__ = ("read",)
    read: set[str]

    @classmethod
    def of(cls, config: TrialConfig) -> _WatchedConfig:
        """Return a config with the values of one, which are known to be right."""
        watched = object.__new__(cls)
        for name, value in config.to_flat().items():
            object.__setattr__(watched, name, value)
        object.__setattr__(watched, "read", set())
        return watched

    def __getattribute__(self, name: str) -> Any:
        if name in KNOBS:
            with suppress(AttributeError):  # a copy notes nothing
                object.__getattribute__(self, "read").add(name)
        return object.__getattribute__(self, name)


@dataclass
class Lane:
    """Where one trial stands; what changes at every step is kept on the device instead."""

    trial: PackTrial
    epoch: int = 0  # the next one to run, 0-based
    status: str = "running"
    stop_reason: str = ""
    nan_counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(NAN_KINDS, 0))
    nan_origin: str = ""
    global_step: int = 0  # micro-batches
    optimizer_steps: int = 0  # taken
    schedule_moves: int = 0
    best_epoch: int | None = None
    best_val_loss: float = math.inf
    short_epochs: int = 0  # in a row, with too little coverage
    epoch_steps: int = 0  # micro-batches of the newest epoch
    skipped_steps: int = 0
    longest_streak: int = 0  # of skipped steps
    bad_numerators: int = 0  # micro-batches with a P that is not finite
    bad_denominators: int = 0

    @property
    def config(self) -> TrialConfig:
        return self.trial.config

    @property
    def learning_rate(self) -> float:
        """The rate of the epoch that comes."""
        shares = rate_shares(self.config.lr_schedule, self.config.max_epochs)
        return self.config.learning_rate * shares[min(self.schedule_moves, len(shares) - 1)]

    def weight_share(self) -> float:
        """The share of its weights that a trial's curriculum gives in the epoch that comes."""
        ramp = self.config.loss_ramp_epochs
        return 1.0 if self.epoch >= ramp else self.epoch / ramp

    def end(self, status: str, reason: str) -> None:
        """Note how the trial ended."""
        self.status, self.stop_reason = status, reason

    def finite_telemetry(self) -> dict[str, float]:
        """Return what `scm.guards.finite.FiniteWatch` says of a training."""
        return {
            "finite_skipped_steps": float(self.skipped_steps),
            "finite_longest_streak": float(self.longest_streak),
            "finite_raw_P": float(self.bad_numerators),
            "finite_raw_Q": float(self.bad_denominators),
        }

    def state_dict(self) -> dict[str, Any]:
        """Return all of it as plain values."""
        told = {"config": self.config.to_flat(), "seed": self.trial.seed, "key": self.trial.key}
        return {**told, **{name: getattr(self, name) for name in _PLAIN}, "nan_counts": dict(self.nan_counts)}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Lane:
        """Return the lane that `state_dict` was taken of."""
        trial = PackTrial(TrialConfig.from_flat(state["config"]), state["seed"], state["key"])
        plain = {name: state[name] for name in _PLAIN}
        return cls(trial, nan_counts=dict(state["nan_counts"]), **plain)


_PLAIN = (
    "epoch",
    "status",
    "stop_reason",
    "nan_origin",
    "global_step",
    "optimizer_steps",
    "schedule_moves",
    "best_epoch",
    "best_val_loss",
    "short_epochs",
    "epoch_steps",
    "skipped_steps",
    "longest_streak",
    "bad_numerators",
    "bad_denominators",
)


@lru_cache(maxsize=256)
def rate_shares(schedule: str, max_epochs: int) -> tuple[float, ...]:
    """Return the share of the learning rate that torch's own schedule leaves after 0, 1, ... moves."""
    if schedule == "constant":  # an optimizer imports the compiler, which takes a second
        return (1.0,)
    config = TrialConfig(lr_schedule=schedule, max_epochs=max_epochs, learning_rate=1.0)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=1.0)
    scheduler = make_scheduler(config, optimizer)
    assert scheduler is not None
    shares = [1.0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it asks for a step of an optimizer that trains nothing
        for _ in range(max_epochs):
            scheduler.step()
            shares.append(float(optimizer.param_groups[0]["lr"]))
    return tuple(shares)
