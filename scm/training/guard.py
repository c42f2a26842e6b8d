"""The last gate before the weights: no step is taken on a non-finite loss or gradient.

The check is one fused pass over all gradients, which also divides the sum of an accumulated group by its
weight. On the CPU its answer is one flag read there. On CUDA the flag stays on the device where the optimizer
can take it (fused Adam and AdamW skip their update by it, weights and moments untouched), so that the host
never waits inside an epoch; other optimizers on CUDA cost one read of the flag a step, because nothing else
keeps their state untouched.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from scm.gradients import by_kind, clip_by_norm, flag_non_finite

SKIP_KINDS = ("loss", "gradient")


class StepGuard:
    """Check, scale, clip and apply the gradients of one optimizer's parameters."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        *,
        clip_norm: float | None,
        scaler: torch.amp.GradScaler | None,
        host_must_know: bool,
        before_step: Callable[[], None] | None = None,
    ) -> None:
        self._optimizer = optimizer
        self._clip_norm = clip_norm
        self._scaler = scaler
        self._before_step = before_step
        self._found = torch.zeros((), device=device)
        self._one = torch.ones((), device=device)
        self._bad_loss = torch.zeros((), device=device)
        self.waits = (
            device.type != "cuda" or scaler is not None or host_must_know or not _skips_alone(optimizer)
        )
        self._skips = {kind: torch.zeros((), dtype=torch.int64, device=device) for kind in SKIP_KINDS}
        self._host_skips = dict.fromkeys(SKIP_KINDS, 0)
        self.scale_skips = 0

    def watch_loss(self, loss: Tensor) -> bool:
        """Note a non-finite loss of the group under way; returns whether its backward pass is worth doing.

        Waits for the value on the CPU only; elsewhere the answer is True and the flag stays on the device.
        """
        if loss.device.type == "cpu":
            if math.isfinite(loss.item()):
                return True
            self._bad_loss.fill_(1.0)
            return False
        self._bad_loss += (~torch.isfinite(loss.detach())).to(self._bad_loss.dtype)
        return True

    def step(self, parameters: Sequence[Tensor], weight: float | Tensor) -> bool | None:
        """Take one optimizer step on the gradients divided by `weight`, unless they or a loss are not finite.

        weight: a 0-d tensor where only the device knows what the group weighs; of a group that weighs 0 no
        step is taken, and none is counted as skipped. `before_step` is called when a step is to be taken and
        the host knows it. Returns whether the step was taken; None where only the device knows.
        """
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if self._scaler is not None and gradients:
            return self._scaled_step(gradients, weight)
        self._check(gradients, weight)
        if self._clip_norm is not None and gradients:
            clip_by_norm(gradients, self._clip_norm)
        if self.waits:
            return self._waiting_step(weight)
        found_loss = (self._bad_loss > 0).to(torch.int64)
        found_any = torch.maximum(self._found, self._bad_loss).clamp(max=1.0)
        self._skips["loss"] += found_loss
        self._skips["gradient"] += (found_any > 0).to(torch.int64) - found_loss
        if isinstance(weight, Tensor):
            found_any = torch.maximum(found_any, (weight <= 0).to(found_any.dtype))
        self._optimizer.found_inf = found_any  # type: ignore[attr-defined]
        try:
            self._optimizer.step()
        finally:
            del self._optimizer.found_inf  # type: ignore[attr-defined]
        self._bad_loss.zero_()
        return None

    def _check(self, gradients: Iterable[Tensor], weight: float | Tensor) -> None:
        """Raise the flag at the first gradient that is not finite, and divide all of them by `weight`."""
        self._found.zero_()
        groups = by_kind(gradients)
        flag_non_finite(groups, self._found, self._one)
        # Not by the check's kernel: it multiplies in float32, which float64 would feel.
        if isinstance(weight, Tensor):
            for group in groups:
                torch._foreach_div_(group, weight.to(group[0]))
        elif weight != 1.0:
            for group in groups:
                torch._foreach_div_(group, weight)

    def _waiting_step(self, weight: float | Tensor) -> bool:
        if isinstance(weight, Tensor) and not bool(weight > 0):
            return False
        bad_loss = bool(self._bad_loss)
        if bad_loss:
            self._bad_loss.zero_()
        if bad_loss or bool(self._found):
            self._host_skips["loss" if bad_loss else "gradient"] += 1
            return False
        if self._before_step is not None:
            self._before_step()
        self._optimizer.step()
        return True

    def _scaled_step(self, gradients: Sequence[Tensor], weight: float | Tensor) -> bool:
        """The step under a GradScaler: a scale that was too large is no fault of the model.

        Such a step is left out as well, but counted in `scale_skips`; only at a scale of 1 or less does a
        non-finite gradient count as one.
        """
        assert self._scaler is not None
        self._scaler.unscale_(self._optimizer)
        self._check(gradients, weight)
        if self._clip_norm is not None:
            clip_by_norm(gradients, self._clip_norm)
        bad_loss, bad_gradient = bool(self._bad_loss), bool(self._found)
        self._bad_loss.zero_()
        taken = not (bad_loss or bad_gradient)
        if taken:
            if self._before_step is not None:
                self._before_step()
            self._scaler.step(self._optimizer)
        elif bad_loss:
            self._host_skips["loss"] += 1
        elif self._scaler.get_scale() <= 1.0:
            self._host_skips["gradient"] += 1
        else:
            self.scale_skips += 1
        self._scaler.update()
        return taken

    def skips(self) -> dict[str, int]:
        """Return how many steps were skipped by kind; waits for the device where it alone knows."""
        if self.waits:
            return dict(self._host_skips)
        return {kind: self._host_skips[kind] + int(self._skips[kind]) for kind in SKIP_KINDS}

    def wait_from_now_on(self) -> None:
        """Let the host know of every refused step at once: one read of the flag a step."""
        self._host_skips = self.skips()
        for count in self._skips.values():
            count.zero_()
        self.waits = True

    def known_skips(self) -> int:
        """Return how many skipped steps the host knows of, without waiting."""
        return sum(self._host_skips.values())

    def state_dict(self) -> dict[str, int | float]:
        """Return the counts, and whether the group under way met a non-finite loss."""
        counts = {f"{kind}_skips": count for kind, count in self.skips().items()}
        return {**counts, "scale_skips": self.scale_skips, "bad_loss": float(self._bad_loss)}

    def load_state_dict(self, state: dict[str, int | float]) -> None:
        """Go on with the counts of `state_dict`."""
        for kind in SKIP_KINDS:
            self._host_skips[kind] = int(state[f"{kind}_skips"])
            self._skips[kind].zero_()
        self.scale_skips = int(state["scale_skips"])
        self._bad_loss.fill_(float(state["bad_loss"]))


def _skips_alone(optimizer: torch.optim.Optimizer) -> bool:
    fused = all(group.get("fused") for group in optimizer.param_groups)
    return fused and type(optimizer) in (torch.optim.Adam, torch.optim.AdamW)
