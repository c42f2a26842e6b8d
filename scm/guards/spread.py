"""Guards against collapse: a number that a model gives each row must not become the same for all rows.

Spread is necessary, not sufficient: any spread satisfies these terms. Whether the number has to do with the
difficulty of a row is measured by `relevance`, and reported, never assumed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from scm.guards.bounds import check_limit
from scm.guards.gates import row_scalar, trained_rows
from scm.losses.rowwise import check_at_least_zero

if TYPE_CHECKING:
    from scm.training.companion import Moment

SPREAD_FORMS = ("hinge", "pairwise", "jittered")
_STANDARD_ERRORS = 2.0


def spread_loss(
    values: Tensor,
    target: float | Tensor = 0.5,
    *,
    form: str = "pairwise",
    jitter: float = 1e-3,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return relu(target - spread of the values), 0-d; values (B,), target >= 0 in their unit.

    form, and what is called the spread:
    "hinge"     the standard deviation, as recorded. At exact collapse its gradient is 0.
    "pairwise"  `pairwise_spread`: unbiased in small batches, and with a gradient at exact collapse.
    "jittered"  the standard deviation of the values with normal noise of size `jitter` added, drawn from
                `generator` (required): with a gradient at exact collapse, in a random direction.

    Fewer than two values have no spread: the loss is 0, without a gradient. Raises ValueError otherwise than
    that. For batches of a few rows, see `RunningSpread`.
    """
    if form not in SPREAD_FORMS:
        raise ValueError(f"form must be one of {', '.join(SPREAD_FORMS)}, got {form=}")
    if values.ndim != 1:
        raise ValueError(f"values must have one number per row, got shape {tuple(values.shape)}")
    check_at_least_zero("target", target)
    if form == "jittered":
        if generator is None:
            raise ValueError("form 'jittered' must be given a generator, got generator=None")
        check_limit("jitter", jitter)
        noise = torch.randn(values.shape, generator=generator, device=generator.device, dtype=torch.float32)
        values = values + jitter * noise.to(values)
    if len(values) < 2:
        return torch.zeros_like(values.sum())
    return torch.relu(target - (pairwise_spread(values) if form == "pairwise" else values.std()))


def pairwise_spread(values: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return sqrt(pi)/2 times the mean distance of two rows' values (B,), of `mask`; 0-d, 0 for one row.

    For normal values that is their standard deviation, without bias in a batch of any size. Where values are
    equal the earlier row counts as the lower one, so that rows part even from exact collapse: any function
    that treats rows alike has a gradient of 0 there.
    """
    size = len(values)
    kept = values if mask is None else torch.where(mask, values, math.inf)
    ordered = torch.sort(kept, stable=True).values
    rank = torch.arange(size, device=values.device)
    if mask is None:
        count: Tensor | int = size
        pairs: Tensor | float = max(size * (size - 1), 1)
    else:
        count = mask.sum()
        pairs = (count * (count - 1)).clamp(min=1)
        ordered = torch.where(rank < count, ordered, 0.0)
    # The sum of all distances, from the sorted values: each counts once for every value below it, and minus
    # once for every one above.
    distances = ((2 * rank - (count - 1)).to(values.dtype) * ordered).sum()
    return distances * math.sqrt(math.pi) / pairs


def relevance(values: Tensor, difficulty: Tensor) -> Tensor:
    """Return the correlation of a number per row with the difficulty of the row, 0-d in [-1, 1], detached.

    NaN for fewer than two rows, or where either is the same for all: then there is nothing to correlate.
    """
    if values.shape != difficulty.shape or values.ndim != 1:
        raise ValueError(
            "values and difficulty must have one number per row, got shapes "
            f"{tuple(values.shape)} and {tuple(difficulty.shape)}"
        )
    return _correlation(_moments(values.detach(), difficulty.detach(), None))


class RunningSpread:
    """The spread of a number per row over the last batches, and a term that raises it where it is too small.

    The estimate is of about the last `window` rows, whatever the size of a batch, so that a healthy model is
    not pulled because a batch of two happened to agree: the recorded hinge does so in 68 of 100 such batches.
    The term acts where the spread is below the target by more than two standard errors of the estimate, and
    passes its gradient to the rows of the batch.

    Raises ValueError for a target below 0 or a window below 2.
    """

    def __init__(self, target: float | Tensor = 0.5, window: int = 256) -> None:
        check_at_least_zero("target", target)
        if window < 2:
            raise ValueError(f"window must be >= 2, got {window=}")
        self.target = target
        self.window = window
        self._held: Tensor | None = None  # float64: the estimate, and how many rows it stands on

    def term(self, values: Tensor, mask: Tensor | None = None) -> Tensor:
        """Take in values (B,), those of `mask`; return relu(target - spread), 0-d.

        Values that are not finite are left out. Fewer than two others change nothing, and cost 0.
        """
        finite = values.isfinite()
        mask = finite if mask is None else finite & mask
        spread = pairwise_spread(torch.where(mask, values, 0.0), mask)
        fresh = (mask.sum() - 1).clamp(min=0).double()
        held = torch.zeros(2, dtype=torch.float64, device=values.device) if self._held is None else self._held
        held = held.to(values.device)
        rows = held[1] * (1.0 - fresh / self.window).clamp(min=0) + fresh
        share = fresh / rows.clamp(min=1.0)
        estimate = held[0] + share * (spread.detach().double() - held[0])
        self._held = torch.stack([estimate, rows])
        doubt = 1.0 + _STANDARD_ERRORS / (2.0 * rows.clamp(min=1.0)).sqrt()
        believed = (estimate * doubt).to(spread.dtype)
        # The value is of the running estimate, the gradient of this batch.
        shortfall = torch.relu(self.target - (believed + (spread - spread.detach())))
        return torch.where(fresh > 0, shortfall, 0.0)

    @property
    def estimate(self) -> float:
        """The running estimate, nan before the first two rows; waits for the device."""
        estimate, rows = (0.0, 0.0) if self._held is None else self._held.tolist()
        return estimate if rows else math.nan

    def state_dict(self) -> dict[str, Any]:
        """Return the estimate and what it stands on."""
        return {"held": None if self._held is None else self._held.cpu().clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self._held = None if state["held"] is None else state["held"].clone()


Difficulty = Callable[["Moment"], "Tensor | None"]
"""How hard each row is, (B,), as seen after the loss; None where it cannot be told."""


class SpreadGuard:
    """Adds weight times the term of `RunningSpread` to the loss, as the term "spread".

    The number per row is the model's "clue_count", or else the mean of |Q| over its outputs, in rows that
    may be trained. With a weight of 0, a plain number, only measures. Telemetry: spread_std, the running
    estimate; spread_term, the mean of the unweighted term in the epoch so far; spread_relevance, the
    correlation of the number with `difficulty` in the epoch so far, nan without one.

    Raises ValueError for a weight or target below 0, or a window below 2.
    """

    def __init__(
        self,
        weight: float | Tensor,
        target: float | Tensor = 0.5,
        *,
        window: int = 256,
        difficulty: Difficulty | None = None,
    ) -> None:
        check_at_least_zero("weight", weight)
        self.weight = weight
        self.running = RunningSpread(target, window)
        self.difficulty = difficulty
        self._batches = 0
        self._terms: Tensor | None = None
        self._moments: Tensor | None = None

    def begin_epoch(self, epoch: int, facts: dict[str, Any]) -> None:
        """Begin the epoch's means anew; the running estimate goes on."""
        self._batches, self._terms, self._moments = 0, None, None

    def after_loss(self, moment: Moment) -> None:
        """Add the term."""
        values, mask = row_scalar(moment), trained_rows(moment)
        term = self.running.term(values, mask)
        self._terms = _plus(self._terms, term.detach().double())
        self._batches += 1
        hard = None if self.difficulty is None else self.difficulty(moment)
        if hard is not None:
            self._moments = _plus(self._moments, _moments(values.detach(), hard.detach(), mask))
        if isinstance(self.weight, Tensor) or self.weight > 0:
            assert moment.terms is not None
            moment.terms.auxiliaries["spread"] = self.weight * term

    def telemetry(self) -> dict[str, float]:
        """Return the three numbers, nan where there is nothing to say."""
        term = math.nan if self._terms is None else float(self._terms) / self._batches
        found = math.nan if self._moments is None else float(_correlation(self._moments))
        return {"spread_std": self.running.estimate, "spread_term": term, "spread_relevance": found}

    def state_dict(self) -> dict[str, Any]:
        """Return the running estimate and the sums of the epoch under way."""
        sums = {"terms": self._terms, "moments": self._moments}
        kept = {name: None if item is None else item.cpu().clone() for name, item in sums.items()}
        return {"running": self.running.state_dict(), "batches": self._batches, **kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.running.load_state_dict(state["running"])
        self._batches = int(state["batches"])
        self._terms, self._moments = state["terms"], state["moments"]


def projective_residual(moment: Moment) -> Tensor | None:
    """Return how far each row's (P, Q) is from its target's line, (B,): |P Y_d - Q Y_n|, meaned over outputs.

    None where outputs and targets have not one shape: then only the task knows what is hard.
    """
    outputs = moment.outputs
    Y_n, Y_d = moment.fed.lifted
    if not isinstance(outputs, (tuple, list)) or any(item.shape != Y_n.shape for item in outputs[:2]):
        return None
    P, Q = outputs[0].detach(), outputs[1].detach()
    residual = (P * Y_d - Q * Y_n).abs()
    return residual.flatten(1).mean(1) if residual.ndim > 1 else residual


def _moments(values: Tensor, difficulty: Tensor, mask: Tensor | None) -> Tensor:
    """Return the sums that a correlation is made of, (6,) float64, over finite rows of `mask`."""
    x, y = values.double(), difficulty.double()
    kept = x.isfinite() & y.isfinite()
    if mask is not None:
        kept = kept & mask
    x, y = torch.where(kept, x, 0.0), torch.where(kept, y, 0.0)
    return torch.stack([kept.sum().double(), x.sum(), y.sum(), (x * x).sum(), (y * y).sum(), (x * y).sum()])


def _correlation(moments: Tensor) -> Tensor:
    n, x, y, xx, yy, xy = moments
    variances = (n * xx - x * x, n * yy - y * y)
    # Below this share of what was subtracted, a difference is rounding.
    known = (variances[0] > 1e-10 * n * xx) & (variances[1] > 1e-10 * n * yy) & (n >= 2)
    cosine = (n * xy - x * y) / torch.where(known, variances[0] * variances[1], 1.0).sqrt()
    return torch.where(known, cosine.clamp(-1.0, 1.0), torch.nan)


def _plus(held: Tensor | None, fresh: Tensor) -> Tensor:
    return fresh if held is None else held.to(fresh.device) + fresh
