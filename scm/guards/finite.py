"""What a training does about values that are not finite: leave out, return, or stop, with counts and limits.

`FiniteGuard` goes around the steps of any PyTorch training; `SCMTrainer` composes the same parts by its
settings. Where such values come from is found in `scm.guards.origin`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from scm.gradients import by_kind, flag_non_finite
from scm.guards.origin import find_origin, named_tensors
from scm.losses.terms import LossTerms

if TYPE_CHECKING:
    from scm.training.companion import Moment

FINITE_ACTIONS = ("skip_step", "skip_micro_batch", "roll_back", "stop")
"""What is done about a non-finite loss or gradient.

skip_step: the optimizer step of its group is not taken. skip_micro_batch: the micro-batch is left out, the
others of its group count; a step without any is not taken. roll_back: as skip_step, and after a streak of
such steps weights, buffers and optimizer state return to the last good ones. stop: as skip_step, and the
training ends.
"""
DEFAULT_STREAKS: Mapping[str, int | None] = {
    "skip_step": None,
    "skip_micro_batch": None,
    "roll_back": 3,
    "stop": 1,
}
_Outputs = TypeVar("_Outputs")


def check_finite_action(action: str) -> None:
    """Raise ValueError unless `action` is one of `FINITE_ACTIONS`."""
    if action not in FINITE_ACTIONS:
        raise ValueError(f"finite_action must be one of {', '.join(FINITE_ACTIONS)}, got {action!r}")


class FiniteWatch:
    """Counts of what was not finite, and whether it has become too much.

    A unit is a step, under skip_micro_batch a micro-batch. streak: how many bad units in a row are too many
    (None: the action's own limit, see `DEFAULT_STREAKS`). A companion of `SCMTrainer`, where it also looks at
    the raw outputs of every micro-batch, before anything bounds or replaces them.
    """

    name = "finite"

    def __init__(self, action: str, *, streak: int | None = None) -> None:
        check_finite_action(action)
        if streak is not None and streak < 1:
            raise ValueError(f"finite_streak must be >= 1 or None, got {streak=}")
        self.action = action
        self.limit = DEFAULT_STREAKS[action] if streak is None else streak
        self.streak = self.longest_streak = 0
        self.skipped_steps = self.bad_micro_batches = self.rollbacks = 0
        self.gate: MicroBatchGate | None = None
        self.snapshot: Snapshot | None = None
        self._bad_outputs: dict[str, Tensor | int] = {}

    def note(self, bad: bool) -> bool:
        """Count a unit; returns whether the streak of bad ones has reached its limit."""
        self.streak = self.streak + 1 if bad else 0
        self.longest_streak = max(self.longest_streak, self.streak)
        return self.limit is not None and self.streak >= self.limit

    def probe(self, outputs: _Outputs) -> _Outputs:
        """Note by name which of nested outputs hold values that are not finite; returns them unchanged.

        Counted where they are, without waiting. For outputs before any clamp or substitution: afterwards
        there is nothing to see.
        """
        for name, tensor in named_tensors(outputs):
            if tensor.is_floating_point():
                bad = ~torch.isfinite(tensor.detach()).all()
                self._bad_outputs[name] = self._bad_outputs.get(name, 0) + bad.to(torch.int64)
        return outputs

    def after_forward(self, moment: Moment) -> None:
        """Look at the raw outputs of a micro-batch."""
        self.probe(moment.outputs)

    def wait_from_now_on(self) -> None:
        """Let the host know of every micro-batch at once: one read a micro-batch. Not inside of a group."""
        if self.gate is not None:
            self._collect()
            self.gate.wait_from_now_on()

    def roll_back(self) -> None:
        """Return to the last good state, if there is one, and begin the streak anew."""
        assert self.snapshot is not None
        self.streak = 0
        if self.snapshot.put_back():
            self.rollbacks += 1

    def telemetry(self) -> dict[str, float]:
        """Say how many units were bad, how many in a row, and which raw outputs were; may wait.

        finite_skipped_steps, finite_longest_streak, finite_bad_micro_batches (under skip_micro_batch),
        finite_rollbacks (under roll_back), and finite_raw_<output>: in how many micro-batches it was not
        finite.
        """
        self._collect()
        said = {
            "finite_skipped_steps": float(self.skipped_steps),
            "finite_longest_streak": float(self.longest_streak),
        }
        if self.gate is not None:
            said["finite_bad_micro_batches"] = float(self.bad_micro_batches)
        if self.snapshot is not None:
            said["finite_rollbacks"] = float(self.rollbacks)
        raw = {f"finite_raw_{name}": float(int(count)) for name, count in self._bad_outputs.items()}
        return {**said, **raw}

    def state_dict(self) -> dict[str, Any]:
        """Return counts, and what the gate and the snapshot hold."""
        self._collect()
        names = ("streak", "longest_streak", "skipped_steps", "bad_micro_batches", "rollbacks")
        return {
            "counts": {name: getattr(self, name) for name in names},
            "bad_outputs": {name: int(count) for name, count in self._bad_outputs.items()},
            "gate": None if self.gate is None else self.gate.state_dict(),
            "snapshot": None if self.snapshot is None else self.snapshot.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        for name, count in state["counts"].items():
            setattr(self, name, count)
        self._bad_outputs = dict(state["bad_outputs"])
        if self.gate is not None:
            self.gate.load_state_dict(state["gate"])
        if self.snapshot is not None:
            self.snapshot.load_state_dict(state["snapshot"])

    def _collect(self) -> None:
        """Take over what the gate has counted on the device."""
        if self.gate is not None:
            self.streak, self.longest_streak = self.gate.streaks(self.streak, self.longest_streak)
            self.bad_micro_batches = sum(self.gate.drops().values())


class MicroBatchGate:
    """Let the gradient of a micro-batch join its group only where it and the loss are finite.

    The gradients that were there before are put aside meanwhile: one more buffer of the parameters' size. So
    are the model's buffers, from `begin` before the forward pass on: running statistics are finite again
    after a micro-batch that was left out. Where it `waits` (on the CPU, and where a streak has a limit) the
    host knows at once; elsewhere flags, counts and the weight that was left out stay on the device.
    """

    def __init__(self, model: nn.Module, device: torch.device, *, waits: bool) -> None:
        self.waits = waits or device.type != "cuda"
        self._buffers = list(model.buffers())
        self._kept: list[Tensor] | None = None  # of the buffers, since the micro-batch under way began
        self._found = torch.zeros((), device=device)
        self._one = torch.ones((), device=device)
        self._host_drops = {"loss": 0, "gradient": 0}
        self._drops = {kind: torch.zeros((), dtype=torch.int64, device=device) for kind in self._host_drops}
        self._dropped_weight = torch.zeros((), dtype=torch.float64, device=device)  # of the group under way
        self._streak = torch.zeros((), dtype=torch.int64, device=device)
        self._longest = torch.zeros((), dtype=torch.int64, device=device)

    def begin(self) -> None:
        """Keep the model's buffers as they are before a micro-batch."""
        self._kept = [buffer.detach().clone() for buffer in self._buffers]

    def join(
        self, loss: Tensor, parameters: Sequence[Tensor], backward: Callable[[], None], weight: float
    ) -> bool | None:
        """Run `backward`; add its gradients to the parameters' where they and `loss` are finite.

        Returns whether they were; None where only the device knows. `weight` is what the micro-batch weighs
        in its group.
        """
        kept, self._kept = self._kept, None
        if self.waits and not math.isfinite(float(loss.detach())):
            self._host_drops["loss"] += 1
            self._put_back(kept)
            return False
        held = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None
        backward()
        self._found.zero_()
        fresh = [parameter.grad for parameter in parameters if parameter.grad is not None]
        flag_non_finite(by_kind(fresh), self._found, self._one)
        if self.waits:
            good = not bool(self._found)
            if not good:
                self._host_drops["gradient"] += 1
                self._put_back(kept)
            for parameter, before in zip(parameters, held, strict=True):
                parameter.grad = _sum(before, parameter.grad) if good else before
            return good
        bad_loss = ~torch.isfinite(loss.detach()).to(self._found.device)
        bad = bad_loss | (self._found > 0)
        for parameter, before in zip(parameters, held, strict=True):
            if parameter.grad is not None:
                parameter.grad = _sum(before, torch.where(bad.to(parameter.device), 0.0, parameter.grad))
            else:
                parameter.grad = before
        self._put_back(kept, bad)
        self._drops["loss"] += bad_loss
        self._drops["gradient"] += bad & ~bad_loss
        self._dropped_weight += bad * weight
        self._streak = (self._streak + 1) * bad
        self._longest = torch.maximum(self._longest, self._streak)
        return None

    def _put_back(self, kept: list[Tensor] | None, bad: Tensor | None = None) -> None:
        """Return the buffers to what they were, where `bad` holds."""
        if kept is None:
            return
        with torch.no_grad():
            for buffer, before in zip(self._buffers, kept, strict=True):
                buffer.copy_(before if bad is None else torch.where(bad.to(buffer.device), before, buffer))

    def wait_from_now_on(self) -> None:
        """Take the counts to the host, which knows at once from then on."""
        self._host_drops = self.drops()
        for count in self._drops.values():
            count.zero_()
        self.waits = True

    def end_group(self, weight: float) -> float | Tensor:
        """Return what the micro-batches that joined weigh together, of a group that weighs `weight` in all.

        A number where the host knows (which leaves the others out of `weight` itself), else a 0-d tensor.
        """
        if self.waits:
            return weight
        joined = weight - self._dropped_weight
        self._dropped_weight = torch.zeros_like(self._dropped_weight)
        return joined

    def known_drops(self) -> int:
        """Return how many micro-batches the host knows were left out, without waiting."""
        return sum(self._host_drops.values())

    def drops(self) -> dict[str, int]:
        """Return how many micro-batches were left out by kind; waits where only the device knows."""
        if self.waits:
            return dict(self._host_drops)
        return {kind: self._host_drops[kind] + int(count) for kind, count in self._drops.items()}

    def streaks(self, streak: int, longest: int) -> tuple[int, int]:
        """Return the streak under way and the longest, as far as this or the host's counts know them."""
        if self.waits:
            return streak, longest
        return int(self._streak), int(self._longest)

    def state_dict(self) -> dict[str, Any]:
        """Return the counts, and what of the group under way was left out."""
        return {
            "drops": self.drops(),
            "dropped_weight": float(self._dropped_weight),
            "streaks": [int(self._streak), int(self._longest)],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self._host_drops = dict(state["drops"])
        for count in self._drops.values():
            count.zero_()
        self._dropped_weight.fill_(state["dropped_weight"])
        self._streak.fill_(state["streaks"][0])
        self._longest.fill_(state["streaks"][1])


class Snapshot:
    """A copy of a model's parameters and buffers and of its optimizer's state, to return to.

    It takes as much memory as they do (with Adam three times the parameters), and as much again in a
    checkpoint; a copy is one pass over them, made every so many good steps.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, *, every: int = 50) -> None:
        if every < 1:
            raise ValueError(f"snapshot_steps must be >= 1, got {every=}")
        self._optimizer = optimizer
        parameters = [item for group in optimizer.param_groups for item in group["params"]]
        known = {id(item) for item in parameters}
        others = (item for item in (*model.parameters(), *model.buffers()) if id(item) not in known)
        self._parameters: list[Tensor] = parameters
        self._tensors: list[Tensor] = [*parameters, *others]
        self._every = every
        self._steps = 0  # good ones since the last copy
        self._held: list[Tensor] | None = None
        self._state: list[dict[str, Any]] = []

    def before_good_step(self) -> None:
        """Copy the state if it is time: loss and gradients found at it are finite, so it is a good one."""
        if self._held is None or self._steps >= self._every:
            self._take()
            self._steps = 0
        self._steps += 1

    def put_back(self) -> bool:
        """Return to the last copy; False, and nothing is changed, where there is none yet."""
        if self._held is None:
            return False
        with torch.no_grad():
            torch._foreach_copy_(self._tensors, self._held)
        for parameter, kept in zip(self._parameters, self._state, strict=True):
            self._optimizer.state[parameter] = _copied(kept)
        self._steps = self._every  # what follows a return is another path: its first good state is kept
        return True

    def _take(self) -> None:
        with torch.no_grad():
            if self._held is None:
                self._held = [tensor.detach().clone() for tensor in self._tensors]
            else:
                torch._foreach_copy_(self._held, self._tensors)
        self._state = [_copied(self._optimizer.state.get(item, {})) for item in self._parameters]

    def state_dict(self) -> dict[str, Any]:
        """Return the copy, and the good steps since."""
        return {"steps": self._steps, "held": self._held, "state": self._state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self._steps = state["steps"]
        held = state["held"]
        self._held = None
        if held is not None:
            pairs = zip(held, self._tensors, strict=True)
            self._held = [kept.to(tensor.device, copy=True) for kept, tensor in pairs]
        self._state = []
        for kept, item in zip(state["state"], self._parameters, strict=False):
            live = self._optimizer.state.get(item, {})
            there = {name: _as_there(value, live.get(name), item) for name, value in kept.items()}
            self._state.append(there)


class FiniteGuard:
    """Keep what is not finite from the weights of any PyTorch training.

        guard = FiniteGuard(model, optimizer, action="skip_micro_batch")
        for x, y in batches:                                  # each a micro-batch
            outputs = guard.probe(model(x))                   # raw, before anything is clamped
            guard.backward(loss_fn(outputs, y), again=lambda: loss_fn(model(x), y))
            guard.step()                                      # or once after several
            if guard.stopped: break

    action, streak: see `FINITE_ACTIONS` and `FiniteWatch`. budget: more bad units than that and the training
    is `stopped`, with the reason in `stop_reason`. snapshot_steps: good steps between copies, see `Snapshot`.
    The mean over a group is that over the micro-batches that counted, by the `weight` given to `backward`.

    `nan_origin` says where the first non-finite loss or gradient came from: its terms, from a `LossTerms`;
    the module, where `again` is given, which runs forward pass and loss once more (at the first bad unit
    only; random states and buffers are put back).

    Healthy steps cost one fused pass over the gradients and one read of its flag, and a copy of the model's
    buffers, if it has any: they are put back when a micro-batch was bad.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        action: str = "skip_step",
        streak: int | None = None,
        budget: int = 10,
        snapshot_steps: int = 50,
    ) -> None:
        if budget < 0:
            raise ValueError(f"budget must be >= 0, got {budget=}")
        self.watch = FiniteWatch(action, streak=streak)
        self.budget = budget
        self.stop_reason = ""
        self.nan_origin = ""
        self._model = model
        self._optimizer = optimizer
        self._parameters = [item for group in optimizer.param_groups for item in group["params"]]
        self._device = self._parameters[0].device
        self._gate = MicroBatchGate(model, self._device, waits=True)
        if any(True for _ in model.buffers()):
            model.register_forward_pre_hook(self._begin)
        if action == "skip_micro_batch":
            self.watch.gate = self._gate
        if action == "roll_back":
            self.watch.snapshot = Snapshot(model, optimizer, every=snapshot_steps)
        self._weight = 0.0
        self._bad = False  # a micro-batch of the group under way was
        self._begun = False  # the model has seen some of the micro-batch under way

    @property
    def stopped(self) -> bool:
        """Whether the training must end."""
        return bool(self.stop_reason)

    def probe(self, outputs: _Outputs) -> _Outputs:
        """Count the raw outputs that are not finite, by name; returns them unchanged."""
        return self.watch.probe(outputs)

    def backward(
        self,
        loss: Tensor | LossTerms,
        *,
        again: Callable[[], Tensor | LossTerms] | None = None,
        weight: float = 1.0,
    ) -> bool:
        """Run the backward pass of a micro-batch; returns whether loss and gradients were finite.

        Gradients that are not finite are never added to those of the group.
        """
        total = loss.total() if isinstance(loss, LossTerms) else loss
        good = self._gate.join(
            total,
            self._parameters,
            lambda: total.backward(gradient=torch.full_like(total, weight)),
            weight,
        )
        if good:
            self._weight += weight
        else:
            self._bad = True
            if not self.nan_origin:
                self.nan_origin = self._origin(loss, again)
        self._begun = False
        if self.watch.action == "skip_micro_batch":
            self._judge(not good)
        return bool(good)

    def step(self) -> bool:
        """Take the group's optimizer step or refuse it, and say which; the gradients are cleared."""
        by_step = self.watch.action != "skip_micro_batch"
        taken = self._weight > 0 and not (by_step and self._bad)
        if taken:
            gradients = [item.grad for item in self._parameters if item.grad is not None]
            if self._weight != 1.0:
                for group in by_kind(gradients):
                    torch._foreach_div_(group, self._weight)
            if self.watch.snapshot is not None:
                self.watch.snapshot.before_good_step()
            self._optimizer.step()
        else:
            self.watch.skipped_steps += 1
        if by_step:
            self._judge(not taken)
        self._optimizer.zero_grad()
        self._weight, self._bad = 0.0, False
        return taken

    def _begin(self, model: nn.Module, inputs: Any) -> None:
        if model.training and torch.is_grad_enabled() and not self._begun:
            self._begun = True
            self._gate.begin()

    def telemetry(self) -> dict[str, float]:
        """Say how many units were bad, see `FiniteWatch.telemetry`."""
        return self.watch.telemetry()

    def _judge(self, bad: bool) -> None:
        too_long = self.watch.note(bad)
        refused = self._gate.known_drops() if self.watch.gate is not None else self.watch.skipped_steps
        unit = "micro-batches" if self.watch.gate is not None else "steps"
        if too_long and self.watch.action == "roll_back":
            self.watch.roll_back()
        elif too_long:
            self.stop_reason = f"{self.watch.streak} {unit} in a row had a non-finite loss or gradient"
        if refused > self.budget:
            self.stop_reason = f"{refused} {unit} had a non-finite loss or gradient"

    def _origin(self, loss: Tensor | LossTerms, again: Callable[[], Tensor | LossTerms] | None) -> str:
        if again is not None:
            with untouched(self._model, self._device):
                return str(find_origin(self._model, again))
        terms = {"task": loss.task, **loss.auxiliaries} if isinstance(loss, LossTerms) else {}
        bad = [name for name, term in terms.items() if not bool(torch.isfinite(term.detach()))]
        if bad:
            return f"loss term {', '.join(bad)}"
        return "loss" if not isinstance(loss, LossTerms) and not bool(torch.isfinite(loss)) else "gradient"


@contextmanager
def untouched(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Put the buffers of a model and torch's global generators back as they were when the block ends."""
    buffers = list(model.buffers())
    kept = [buffer.detach().clone() for buffer in buffers]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield
    with torch.no_grad():
        for buffer, before in zip(buffers, kept, strict=True):
            buffer.copy_(before)


def _sum(before: Tensor | None, gradient: Tensor | None) -> Tensor | None:
    """Add in place, as autograd itself adds to the gradients of a group."""
    if before is None or gradient is None:
        return gradient if before is None else before
    if before.is_sparse and not gradient.is_sparse:
        return gradient + before
    return before.add_(gradient)


def _copied(state: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)
        for name, value in state.items()
    }


def _as_there(value: Any, live: Any, parameter: Tensor) -> Any:
    """Return saved optimizer state where the optimizer has the like of it, or else its parameter."""
    if not isinstance(value, Tensor):
        return copy.deepcopy(value)
    there = live.device if isinstance(live, Tensor) else parameter.device
    return value.to(there, copy=True)
