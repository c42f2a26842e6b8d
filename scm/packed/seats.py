"""Who is in a pack, and what is kept of each: weights, optimizers, counts and settings, as tensors.

Everything here has the trials first and holds until someone enters or leaves. What is done with it in a step
is decided in `engine`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from scm.autodiff.policies import POLICY_CODES, GradientPolicy
from scm.data import Split
from scm.guards.finite import DEFAULT_STREAKS
from scm.packed.batches import StackedSplit
from scm.packed.carried import CARRIED
from scm.packed.control import CONTROL_SETTINGS, control_settings, first_state
from scm.packed.eligibility import IN_LOSS
from scm.packed.functions import WEIGHTS, Form
from scm.packed.gradients import FiniteProbe
from scm.packed.lanes import Entrant, Lane
from scm.packed.optimizers import PackOptimizer, State, usual_way
from scm.packed.program import BoundStep, Program
from scm.packed.stack import Layout
from scm.trial_config import TrialConfig


class Marks(NamedTuple):
    """What is counted of each trial on the device, step by step."""

    loss_skips: int  # steps not taken for a bad loss
    gradient_skips: int
    streak: int  # of steps not taken, that has not ended
    longest_streak: int
    steps: int  # taken


class Shared:
    """What is equal in all trials of a pack, taken from the first: `config` stands for all of them there."""

    def __init__(
        self, entrant: Entrant, device: torch.device, *, compiled: bool = False, native: bool = False
    ) -> None:
        self.config = entrant.trial.config
        self.signature = entrant.signature
        self.layout = Layout(entrant.model)
        self.device = device
        self.way = usual_way(device, compiled=compiled, native=native)
        self.rows = len(entrant.splits["train"])
        self.micro_batches = -(-self.rows // self.config.batch_size)
        self.validates = entrant.splits.get("val") is not None
        self.probe = FiniteProbe(self.layout.size, self.layout.dtype, device)


class Seats:
    """The trials of a pack side by side, those with one optimizer next to each other.

    held: what is kept of each trial by name, "weights" and the rest of `first_rows`; states: what their
    optimizers remember, {} for a trial that begins; splits: the data of each.
    """

    def __init__(
        self,
        shared: Shared,
        lanes: Sequence[Lane],
        held: Mapping[str, Tensor],
        states: Sequence[State],
        splits: Sequence[Mapping[str, Split]],
    ) -> None:
        order = sorted(range(len(lanes)), key=lambda place: lanes[place].config.optimizer)
        where = torch.tensor(order, device=shared.device)
        self.shared = shared
        self.lanes = [lanes[place] for place in order]
        self.keys = tuple(lane.trial.key for lane in self.lanes)
        self.places = {key: place for place, key in enumerate(self.keys)}
        self.splits = [splits[place] for place in order]
        self.held = {name: item.index_select(0, where) for name, item in held.items()}
        self.configs = [lane.config for lane in self.lanes]
        weights = self.weights
        held_states = [states[place] for place in order]
        self.optimizer = PackOptimizer(weights, self.configs, held_states, shared.way)
        self.gradients = torch.empty_like(weights)
        accumulates = shared.config.gradient_accumulation_steps > 1
        self.spare = torch.empty_like(weights) if accumulates else None
        self.parameters = self.named_parameters(weights)
        self.alive = torch.ones(len(self), dtype=torch.bool, device=shared.device)
        self.form = form_of(self.configs)
        self.numbers = self._numbers()
        self._settle_limits()
        self.train = self.stacked("train")
        self.val = self.stacked("val") if shared.validates else None
        self._bound: dict[Hashable, tuple[Program, list[Tensor], BoundStep]] = {}
        self._rows: dict[Hashable, dict[str, Tensor]] = {}

    def __len__(self) -> int:
        return len(self.lanes)

    @property
    def weights(self) -> Tensor:
        """All trained parameters, one row a trial."""
        return self.held["weights"]

    @property
    def taus(self) -> list[float]:
        """The thresholds at which answers are decoded."""
        return [config.tau_infer for config in self.configs]

    def named_parameters(self, weights: Tensor) -> dict[str, Tensor]:
        """Return rows as what a traced function calls them, views by name."""
        return {f"parameter.{name}": view for name, view in self.shared.layout.views(weights).items()}

    def fixed(self) -> dict[str, Tensor]:
        """Return what of the models is not trained, as a traced function calls it."""
        return {name: held for name, held in self.held.items() if name.startswith("fixed.")}

    def marks(self) -> list[Marks]:
        """Return what was counted of each trial; waits for the device."""
        counted = torch.stack([self.held[name] for name in Marks._fields], dim=1)
        return [Marks(*row) for row in counted.tolist()]

    def stacked(self, name: str) -> StackedSplit:
        """Return a split of all trials, on the device."""
        dtype = self.shared.layout.dtype
        return StackedSplit([splits[name] for splits in self.splits], dtype, self.shared.device)

    def bound(
        self, program: Program, given: Mapping[str, Tensor], into: Tensor | None, key: Hashable
    ) -> BoundStep:
        """Bind a program to these trials, or return what was bound under the key while it holds."""
        told = [given[name] for name in program.pack_inputs]
        kept = self._bound.get(key)
        if kept is not None and kept[0] is program and all(map(operator.is_, kept[1], told)):
            return kept[2]
        made = program.bind(len(self), given, into)
        self._bound[key] = (program, told, made)
        return made

    def kept_rows(self, key: Hashable, gather: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return what `gather` returned when it was first called for the key."""
        if key not in self._rows:
            self._rows[key] = gather()
        return self._rows[key]

    def of_lanes(self, values: Iterable[float], dtype: torch.dtype = torch.float64) -> Tensor:
        """Return one number a trial as a tensor on the device."""
        return torch.tensor(list(values), dtype=dtype, device=self.shared.device)

    def _numbers(self) -> dict[str, Tensor]:
        """Return what each trial's loss is told, by the names of a traced function's inputs."""
        names = [name for name in sorted(IN_LOSS) if getattr(self.configs[0], name) is not None]
        names += ["tau_train_min", "tau_train_max"]
        numbers = {name: self.of_lanes(getattr(item, name) for item in self.configs) for name in names}
        if self.configs[0].coverage_control != "none":
            told = self.of_lanes(value for item in self.configs for value in control_settings(item))
            columns = told.unflatten(0, (len(self), -1)).unbind(1)
            numbers |= {f"control.{name}": x for name, x in zip(CONTROL_SETTINGS, columns, strict=True)}
        codes = (_policy_code(item.gradient_policy) for item in self.configs)
        numbers["policy"] = self.of_lanes(codes, torch.int64)
        return numbers

    def _settle_limits(self) -> None:
        limits = [math.inf if item.clip_norm is None else item.clip_norm for item in self.configs]
        self.clips, self.clip_limits = any(map(math.isfinite, limits)), self.of_lanes(limits)
        self.budgets = self.of_lanes(item.nonfinite_budget for item in self.configs)
        self.streak_limits = self.of_lanes(map(streak_limit, self.configs))
        # The bounds of thresholds stay on the CPU, where their draws are.
        self.low = torch.tensor([item.tau_train_min for item in self.configs], dtype=torch.float64)
        self.high = torch.tensor([item.tau_train_max for item in self.configs], dtype=torch.float64)
        self.middle = (0.5 * (self.low + self.high)).to(self.shared.device, self.shared.layout.dtype)
        self.draws_tau = bool((self.low < self.high).any())
        # On the CPU a look is free: while all is well, nothing is masked.
        on_cpu = self.shared.device.type == "cpu"
        self.masked = not on_cpu or bool((self.held["streak"] > 0).any())
        # Elsewhere nobody looks, until a trial had a bad step and nobody saw where it came from.
        self.looks = on_cpu or self.must_look()

    def must_look(self) -> bool:
        """Say whether the origin of a bad step is still to be found."""
        return any(lane.skipped_steps and not lane.nan_origin for lane in self.lanes)


def first_rows(entrants: Sequence[Entrant], layout: Layout) -> dict[str, Tensor]:
    """Return what is kept of trials before their first step, by name."""
    configs = [entrant.trial.config for entrant in entrants]
    distinct = {id(entrant.model): entrant.model for entrant in entrants}
    first = {
        key: {"weights": layout.row_of(model)}
        | {f"fixed.{name}": held for name, held in layout.fixed_of(model).items()}
        for key, model in distinct.items()
    }
    own = [first[id(entrant.model)] for entrant in entrants]
    rows = {name: torch.stack([held[name] for held in own]) for name in own[0]}
    rows |= {name: torch.zeros(len(entrants), dtype=torch.int64) for name in Marks._fields}
    if configs[0].coverage_control != "none":
        rows["control.state"] = torch.stack([first_state(config) for config in configs])
    for item in CARRIED:
        if item.is_on(configs[0]):  # in all of a pack or in none
            rows |= {name: held.expand(len(entrants), *held.shape) for name, held in item.first().items()}
    return rows


def seated(
    shared: Shared,
    seats: Seats | None,
    kept: Sequence[int],
    entering: Sequence[Entrant],
) -> Seats | None:
    """Return the seats of those that stay, by their places now, and of those that enter; None for nobody."""
    lanes = [] if seats is None else [seats.lanes[place] for place in kept]
    splits = [] if seats is None else [seats.splits[place] for place in kept]
    states = [] if seats is None else seats.optimizer.states()
    states = [states[place] for place in kept] + [{} for _ in entering]
    lanes += [Lane(entrant.trial) for entrant in entering]
    splits += [entrant.splits for entrant in entering]
    if not lanes:
        return None
    parts: list[Mapping[str, Tensor]] = []
    if seats is not None and kept:
        where = torch.tensor(kept, dtype=torch.int64, device=shared.device)
        parts.append({name: held.index_select(0, where) for name, held in seats.held.items()})
    if entering:
        firsts = first_rows(entering, shared.layout)
        parts.append({name: held.to(shared.device) for name, held in firsts.items()})
    held = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return Seats(shared, lanes, held, states, splits)


def form_of(configs: Sequence[TrialConfig]) -> Form:
    """Return what the steps of these trials consist of together."""
    idle = (knob for knob in WEIGHTS.values() if all(getattr(item, knob) == 0 for item in configs))
    gated = any(item.gradient_policy is not None for item in configs)
    return Form(frozenset(idle), gated, any(item.loss_ramp_epochs > 0 for item in configs))


def streak_limit(config: TrialConfig) -> float:
    """Return how many steps in a row must be bad to end a trial; inf for no such limit."""
    if config.finite_action != "stop":
        return math.inf
    limit = DEFAULT_STREAKS["stop"] if config.finite_streak is None else config.finite_streak
    return math.inf if limit is None else float(limit)


def _policy_code(policy: str | None) -> int:
    """No policy lets every gradient pass, as the one of that name does."""
    return POLICY_CODES[GradientPolicy.PASSTHROUGH if policy is None else GradientPolicy(policy)]
