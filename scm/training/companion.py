"""What goes along with a training: controllers, schedules, guards and their telemetry, at fixed moments.

A companion is any object with some of the methods of `Companion`; the trainer calls those that it has, in the
order in which the companions were given. The loop itself is decided in `trainer`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

from scm.losses.terms import LossTerms

if TYPE_CHECKING:
    from scm.training.feed import Fed
    from scm.training.records import EpochReport


@dataclass
class Moment:
    """One micro-batch under way; a companion may replace `outputs`, the entries of `facts`, and `terms`.

    facts: what a loss function is told by name (tau, epoch, global_step, loss_weights, and what companions
    add); this micro-batch's own, so that a change ends with it (mappings inside are shared: replace them).
    outputs: as the model gave them, (P, Q) or (P, Q, named tensors); None before the forward pass. What is
    put in their place goes to the loss; records and metrics keep to what the model gave.
    terms: the loss in its parts; None before the loss is computed. All of it is the task's where no
    companion has `needs_terms`.
    """

    model: nn.Module
    fed: Fed
    facts: dict[str, Any]
    outputs: Any = None
    terms: LossTerms | None = None
    found: dict[str, Any] = field(default_factory=dict)  # what companions tell one another

    @property
    def row_weights(self) -> Tensor | None:
        """What each row counts, (rows,): as a companion put it into the facts, else as the loader gave it."""
        told: Tensor | None = self.facts.get("row_weights")
        return self.fed.extras.get("row_weights") if told is None else told


class Companion(Protocol):
    """All that a companion may have; none of it is required.

    Besides methods it may have: `needs_terms = True`, and the loss comes in its parts (the loss function must
    give `LossTerms`, or have a method `terms` that does); `name`, what its state is called in checkpoints
    (the class's name by default); `currency = "gradient"`, and its
    ``auxiliary_factor(task_norm, auxiliary_norm)``, of 0-d tensors, scales the gradient of all auxiliary
    terms together, which is then computed apart from the task's: one more backward pass.

    A companion with `state_dict` and `load_state_dict` is in the checkpoint. An epoch that was interrupted
    is gone on with: `begin_epoch` is not called for it again, its facts are in the checkpoint too (tensors
    and plain values), so whatever the companion remembers of it belongs in its state.
    """

    def begin_epoch(self, epoch: int, facts: dict[str, Any]) -> None:
        """Look at or change the facts of the epoch that begins; they hold in its validation too."""

    def before_forward(self, moment: Moment) -> None:
        """Look at or change the facts of the micro-batch."""

    def after_forward(self, moment: Moment) -> None:
        """Look at the raw outputs, or replace them by bounded ones."""

    def after_loss(self, moment: Moment) -> None:
        """Add terms to the loss, or scale those that are there."""

    def after_backward(self, moment: Moment) -> None:
        """Learn from the micro-batch, also one that was not finite; never waits for the device."""

    def after_epoch(self, report: EpochReport) -> None:
        """Learn from the epoch, validation included."""

    def telemetry(self) -> Mapping[str, float]:
        """Say by name what became of the training so far, nan where there is nothing to say yet.

        Asked once before the training and once an epoch; may wait for the device.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return what going on needs, as tensors and plain values."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""


AnyCompanion = object
"""An object with some of the methods of `Companion`; that all of them are optional, no type can say."""

STEP_MOMENTS = ("before_forward", "after_forward", "after_loss", "after_backward")


class Companions:
    """The companions of one training: their methods by moment, collected once.

    Raises ValueError where two with a state, or two numbers of `telemetry`, have one name, and where more
    than one asks for a currency of gradients.
    """

    def __init__(self, members: Sequence[AnyCompanion] = ()) -> None:
        self.members: tuple[Any, ...] = tuple(members)
        self.begin_epoch = self._methods("begin_epoch")
        self.before_forward = self._methods("before_forward")
        self.after_forward = self._methods("after_forward")
        self.after_loss = self._methods("after_loss")
        self.after_backward = self._methods("after_backward")
        self.after_epoch = self._methods("after_epoch")
        self.needs_terms = any(getattr(member, "needs_terms", False) for member in self.members)
        self.auxiliary_factor = self._auxiliary_factor()
        by_moment = any(self._methods(moment) for moment in STEP_MOMENTS)
        self.in_steps = by_moment or self.needs_terms or self.auxiliary_factor is not None
        self.telemetry()

    def stateful(self) -> dict[str, Any]:
        """Return the companions that a checkpoint must hold, by name."""
        held: dict[str, Any] = {}
        for member in self.members:
            if not (hasattr(member, "state_dict") and hasattr(member, "load_state_dict")):
                continue
            name = getattr(member, "name", type(member).__name__)
            if name in held:
                raise ValueError(f"companions must have names of their own, got two with name={name!r}")
            held[name] = member
        return held

    def telemetry(self) -> dict[str, float]:
        """Return what all companions say, by their own names; may wait for the device."""
        said: dict[str, float] = {}
        owners: dict[str, Any] = {}
        for member in self.members:
            if not hasattr(member, "telemetry"):
                continue
            for name, value in member.telemetry().items():
                if name in owners:
                    two = f"{type(owners[name]).__name__} and {type(member).__name__}"
                    raise ValueError(f"telemetry must have names of its own, got {name!r} from {two}")
                owners[name] = member
                said[name] = float(value)
        return said

    def _methods(self, moment: str) -> tuple[Callable[..., None], ...]:
        return tuple(getattr(member, moment) for member in self.members if hasattr(member, moment))

    def _auxiliary_factor(self) -> Callable[[Tensor, Tensor], Tensor] | None:
        asking = [member for member in self.members if getattr(member, "currency", None) == "gradient"]
        if len(asking) > 1:
            names = " and ".join(type(member).__name__ for member in asking)
            raise ValueError(f"one companion at most may scale gradients, got {names}")
        if not asking:
            return None
        if not getattr(asking[0], "needs_terms", False):
            name = type(asking[0]).__name__
            raise ValueError(
                f"a companion with currency='gradient' must have needs_terms=True, {name} has not"
            )
        factor: Callable[[Tensor, Tensor], Tensor] = asking[0].auxiliary_factor
        return factor
