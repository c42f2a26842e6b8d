"""How much of a training the terms beside the task may make up: a cap on their share, exactly kept.

Decided here: the factor by which auxiliary terms are scaled, in two currencies (values of losses, norms of
gradients), and what becomes of terms that are not finite. What the terms are is decided by whoever gives
them; how a step is taken, in `scm.training.trainer`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from scm.losses.terms import LossTerms

if TYPE_CHECKING:
    from scm.training.companion import Moment

CAP_RULES = ("loss", "reference")
CAP_CURRENCIES = ("loss", "gradient", "reference")
REFERENCE_FLOOR = 0.01  # the reference never scales by less

Weight = float | Tensor


class Cap(NamedTuple):
    """What a cap says of one step, each of the shape of the task's loss: 0-d, or one entry a trial.

    factor: what auxiliaries are multiplied by. limit: what they may sum to, contribution: what they sum to,
    those that are finite. share_before, share_after: of the whole (0 where they sum to 0). excluded: how
    many are not finite. negative: whether they sum to less than 0, where a share means nothing and no cap
    binds.
    """

    factor: Tensor
    limit: Tensor
    contribution: Tensor
    share_before: Tensor
    share_after: Tensor
    excluded: Tensor
    negative: Tensor


def meta_loss_cap(
    task: Tensor,
    auxiliaries: Mapping[str, Tensor] | Sequence[Tensor],
    ratio: Weight,
    *,
    floor: Weight = 0.0,
    rule: str = "loss",
    weights: Mapping[str, Weight] | None = None,
) -> Cap:
    """Return the factor that keeps auxiliary terms to the share `ratio` of the whole, and what it does.

    With T the task's loss and M the sum of the auxiliaries, every one already weighted, the limit is
    ``ratio / (1 - ratio) * T`` and the factor 1 where M is within it, else limit/M: the share is then
    `ratio` exactly. Without a task loss to compare with (T <= 0, nan, inf) the factor is `floor`. Terms that
    are not finite are left out and counted. A `floor` above 0 keeps the auxiliaries alive at any price: where
    it binds, the share is larger than `ratio`.

    rule "reference" is the reference's: it compares the sum of the `weights` (by name, those of the
    auxiliaries) with the limit, whatever the terms are worth, never scales below 0.01, and does not cap at
    all where T is not above 0. It is there to be compared with; a share it does not bound.

    All arguments may be tensors of one entry a trial; nothing is read from a device. Raises ValueError for
    another rule, a ratio outside of [0, 1) or a floor outside of [0, 1]; tensors are trusted. Differs from
    the reference, beside its rule: ratio 0 excludes the auxiliaries, ratio 1 and above are refused.

    >>> cap = meta_loss_cap(torch.tensor(0.17), {"loo": 0.08 * torch.tensor(3.0)}, 0.25)
    >>> f"{float(cap.share_before):.3f} -> {float(cap.share_after):.3f}"
    '0.585 -> 0.250'
    """
    check_cap(ratio, floor)
    if rule not in CAP_RULES:
        raise ValueError(f"rule must be one of {', '.join(CAP_RULES)}, got {rule=}")
    task = _values(task)
    named = auxiliaries if isinstance(auxiliaries, Mapping) else dict(enumerate(auxiliaries))
    contribution, excluded = _finite_sum(task, list(named.values()))
    limit = ratio / (1 - ratio) * task
    if rule == "reference":
        spent = _sum_of_weights(task, named, weights)
        factor = _reference_factor(task, limit, spent, floor)
    else:
        factor = _factor(task, limit, contribution, floor)
    return Cap(
        factor=factor,
        limit=limit,
        contribution=contribution,
        share_before=_share(task, contribution),
        share_after=_share(task, factor * contribution),
        excluded=excluded,
        negative=contribution < 0,
    )


def gradient_cap(task_norm: Tensor, auxiliary_norm: Tensor, ratio: Weight, *, floor: Weight = 0.0) -> Cap:
    """Return the factor that keeps the auxiliaries' gradient to the share `ratio` of both gradients' norms.

    That is ``min(1, ratio / (1 - ratio) * task_norm / auxiliary_norm)``. The factor is 0, and `excluded` 1,
    where the auxiliaries' norm is not finite; `floor` where the task's is 0 or not finite.
    """
    cap = meta_loss_cap(task_norm, [auxiliary_norm], ratio, floor=floor)
    usable = cap.excluded == 0
    return cap._replace(factor=torch.where(usable, cap.factor, 0.0))


def check_cap(ratio: Weight, floor: Weight) -> None:
    """Raise ValueError unless 0 <= ratio < 1 and 0 <= floor <= 1; tensors are trusted, never read."""
    if not isinstance(ratio, Tensor) and not 0 <= ratio < 1:
        raise ValueError(f"ratio must be in [0, 1), got {ratio=}")
    if not isinstance(floor, Tensor) and not 0 <= floor <= 1:
        raise ValueError(f"floor must be in [0, 1], got {floor=}")


def _values(loss: Tensor) -> Tensor:
    """Detach, and leave half precision, in which limits overflow."""
    loss = loss.detach()
    return loss.float() if loss.dtype in (torch.float16, torch.bfloat16) else loss


def _finite_sum(task: Tensor, terms: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the sum of those terms that are finite, and how many are not."""
    total, excluded = torch.zeros_like(task), torch.zeros_like(task)
    for term in terms:
        value = _values(term)
        finite = torch.isfinite(value)
        total = total + torch.where(finite, value, 0.0)
        excluded = excluded + ~finite
    return total, excluded


def _factor(task: Tensor, limit: Tensor, spent: Tensor, floor: Weight) -> Tensor:
    binds = spent > limit
    factor = torch.where(binds, limit / torch.where(binds, spent, 1.0), 1.0)
    factor = torch.where(torch.isfinite(task) & (task > 0), factor, 0.0)
    return _at_least(factor, floor)


def _reference_factor(task: Tensor, limit: Tensor, spent: Tensor, floor: Weight) -> Tensor:
    binds = (task > 0) & (spent > 0) & (spent > limit)
    factor = _at_least(limit / torch.where(binds, spent, 1.0), REFERENCE_FLOOR)
    return torch.where(binds, _at_least(factor, floor), 1.0)


def _at_least(factor: Tensor, floor: Weight) -> Tensor:
    if isinstance(floor, Tensor):
        return torch.maximum(factor, floor.to(factor))
    return factor.clamp(min=floor) if floor > 0 else factor


def _sum_of_weights(
    task: Tensor, terms: Mapping[Any, Tensor], weights: Mapping[str, Weight] | None
) -> Tensor:
    known = {} if weights is None else weights
    missing = [name for name in terms if name not in known]
    if missing:
        raise ValueError(
            f"the reference's rule must know the weight of every auxiliary, got none for {missing[0]!r}; "
            f"known: {', '.join(map(str, known)) or 'none'}"
        )
    total = torch.zeros_like(task)
    for name in terms:
        total = total + known[name]
    return total


def _share(task: Tensor, contribution: Tensor) -> Tensor:
    return torch.where(contribution == 0, 0.0, contribution / (task + contribution))


# --- for any training step -----------------------------------------------------------------------


class Budget:
    """Named auxiliary losses with weights, kept to a share of the whole: for any PyTorch step.

    >>> budget = Budget({"loo": 0.08, "equivariance": 0.03}, ratio=0.25)
    >>> task, losses = torch.tensor(0.17), {"loo": torch.tensor(10.0)}
    >>> total, cap = budget.total(task, losses)
    >>> round(float(cap.share_after), 6), round(float(total / task), 6)
    (0.25, 1.333333)
    """

    def __init__(
        self, weights: Mapping[str, Weight], ratio: Weight, *, floor: Weight = 0.0, rule: str = "loss"
    ) -> None:
        check_cap(ratio, floor)
        if rule not in CAP_RULES:
            raise ValueError(f"rule must be one of {', '.join(CAP_RULES)}, got {rule=}")
        self.weights = dict(weights)
        self.ratio = ratio
        self.floor = floor
        self.rule = rule

    def total(self, task: Tensor, losses: Mapping[str, Tensor]) -> tuple[Tensor, Cap]:
        """Return what to train, and what the cap did. `losses` are unweighted; one may be absent.

        Raises ValueError for a loss that was given no weight. See `capped` for losses that are not finite.
        """
        for name in losses:
            if name not in self.weights:
                raise ValueError(f"unknown loss {name!r}; known: {', '.join(self.weights) or 'none'}")
        terms = LossTerms(task, {name: self.weights[name] * loss for name, loss in losses.items()})
        cap = meta_loss_cap(
            task, terms.auxiliaries, self.ratio, floor=self.floor, rule=self.rule, weights=self.weights
        )
        return capped(terms, cap.factor).total(), cap


def capped(terms: LossTerms, factor: Tensor | None) -> LossTerms:
    """Return the terms with the auxiliaries scaled, and those that are not finite left out.

    On the CPU such a term leaves the graph. On a device it is replaced by 0 without looking; where its own
    backward pass is not finite either, the gradient is not, and the step is for the trainer to refuse.
    """
    kept = {}
    for name, term in terms.auxiliaries.items():
        if _is_known(term):
            if not torch.isfinite(term):
                continue
        else:
            term = torch.where(torch.isfinite(term), term, 0.0)
        kept[name] = term if factor is None else term * factor
    return LossTerms(terms.task, kept)


def _is_known(term: Tensor) -> bool:
    """Say whether looking at the value costs nothing, and is possible at all."""
    return term.ndim == 0 and term.device.type == "cpu" and not torch._C._are_functorch_transforms_active()


class Spent:
    """The auxiliary losses back-propagated under one name, as far as they are known."""

    def __init__(self) -> None:
        self.loss: Tensor | None = None
        self.gradients: list[Tensor | None] = []

    def add(self, loss: Tensor) -> None:
        """Count a weighted loss whose gradient is, or will be, made inside of the same block."""
        value = _values(loss)
        self.loss = value if self.loss is None else self.loss + value


class GradientBudget:
    """Auxiliary gradients in buffers of their own, scaled once it is known what they are worth.

    For steps that back-propagate auxiliaries piece by piece, before the task's loss is known:

        budget = GradientBudget(model.parameters(), ratio=0.25)
        with budget.auxiliary("loo") as spent:
            for part in parts:
                loss = weight * loo_loss(model, part)
                loss.backward()
                spent.add(loss)
        task_loss.backward()
        cap = budget.merge(task_loss)
        optimizer.step()

    The gradients are then those of the capped total, exactly, also where a term is left out because its loss
    or gradient is not finite. currency "loss" compares the values told to `Spent.add`, "gradient" the norms.
    """

    def __init__(
        self, parameters: Iterable[Tensor], ratio: Weight, *, currency: str = "loss", floor: Weight = 0.0
    ) -> None:
        check_cap(ratio, floor)
        if currency not in ("loss", "gradient"):
            raise ValueError(f"currency must be one of loss, gradient, got {currency=}")
        self.parameters = list(parameters)
        self.ratio = ratio
        self.currency = currency
        self.floor = floor
        self._spent: dict[str, Spent] = {}

    @contextmanager
    def auxiliary(self, name: str) -> Iterator[Spent]:
        """Let the gradients made inside go to the buffer `name`, and none to the parameters."""
        spent = self._spent.setdefault(name, Spent())
        outside = [parameter.grad for parameter in self.parameters]
        inside = spent.gradients or [None] * len(self.parameters)
        for parameter, gradient in zip(self.parameters, inside, strict=True):
            parameter.grad = gradient
        try:
            yield spent
        finally:
            spent.gradients = [parameter.grad for parameter in self.parameters]
            for parameter, gradient in zip(self.parameters, outside, strict=True):
                parameter.grad = gradient

    def merge(self, task_loss: Tensor) -> Cap:
        """Add the scaled buffers to the parameters' gradients, forget them, and say what the cap did.

        `task_loss` is what was back-propagated outside of the blocks. Raises ValueError where "loss" is the
        currency and a buffer was filled without its loss being told.
        """
        if self.currency == "loss":
            for name, spent in self._spent.items():
                if spent.loss is None and any(gradient is not None for gradient in spent.gradients):
                    raise ValueError(f"the loss of {name!r} must be told by add(loss) to be capped by value")
        usable = {name: _is_usable(spent, task_loss) for name, spent in self._spent.items()}
        summed = self._summed(usable)
        excluded = sum((~ok).to(task_loss.dtype) for ok in usable.values()) + torch.zeros_like(task_loss)
        if self.currency == "loss":
            losses = {
                name: torch.where(usable[name], spent.loss, 0.0)
                for name, spent in self._spent.items()
                if spent.loss is not None
            }
            cap = meta_loss_cap(task_loss, losses, self.ratio, floor=self.floor)
        else:
            own = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
            beside = [gradient for gradient in summed if gradient is not None]
            cap = gradient_cap(_norm(own, task_loss), _norm(beside, task_loss), self.ratio, floor=self.floor)
        for parameter, gradient in zip(self.parameters, summed, strict=True):
            if gradient is None:
                continue
            scaled = gradient * cap.factor.to(gradient.dtype)
            parameter.grad = scaled if parameter.grad is None else parameter.grad + scaled
        self._spent = {}
        return cap._replace(excluded=excluded.detach())

    def _summed(self, usable: Mapping[str, Tensor]) -> list[Tensor | None]:
        summed: list[Tensor | None] = [None] * len(self.parameters)
        for name, spent in self._spent.items():
            for place, gradient in enumerate(spent.gradients):
                if gradient is None:
                    continue
                kept = torch.where(usable[name].to(gradient.device), gradient, 0.0)
                held = summed[place]
                summed[place] = kept if held is None else held + kept
        return summed


def _is_usable(spent: Spent, like: Tensor) -> Tensor:
    """Say, on the device, whether loss and gradients are finite."""
    usable = torch.ones((), dtype=torch.bool, device=like.device)
    if spent.loss is not None:
        usable = usable & torch.isfinite(spent.loss).all()
    for gradient in spent.gradients:
        if gradient is not None:
            usable = usable & torch.isfinite(gradient).all().to(like.device)
    return usable


def _norm(gradients: list[Tensor], like: Tensor) -> Tensor:
    if not gradients:
        return torch.zeros_like(like.detach())
    return torch.nn.utils.get_total_norm(gradients).to(like.device)


# --- in the trainer ------------------------------------------------------------------------------

_SUMS = ("steps", "cap_factor", "cap_share_before", "cap_share_after", "cap_active_share")
_COUNTS = ("cap_excluded", "cap_negative")


class BudgetGuard:
    """Keeps the terms beside the task's to a share of every step; a companion of `SCMTrainer`.

    currency "loss" caps their values, "gradient" their gradient's norm (the trainer then back-propagates
    them apart, and asks for `auxiliary_factor`), "reference" is the reference's rule, which needs `weights`
    by the names of the terms; those in the facts' `loss_weights` come first. Which to choose: a share of the
    loss is easily read, but a small loss can have a large gradient; the norm bounds what moves the weights.

    Telemetry: cap_factor, cap_share_before and cap_share_after are means over the steps of the newest epoch,
    cap_active_share the share of its steps that were capped; cap_excluded counts terms that were not finite,
    cap_negative steps whose auxiliaries summed to less than 0, both since the training began.
    """

    needs_terms = True

    def __init__(
        self,
        ratio: Weight,
        *,
        currency: str = "loss",
        floor: Weight = 0.0,
        weights: Mapping[str, Weight] | None = None,
    ) -> None:
        check_cap(ratio, floor)
        if currency not in CAP_CURRENCIES:
            raise ValueError(f"currency must be one of {', '.join(CAP_CURRENCIES)}, got {currency=}")
        self.ratio = ratio
        self.currency = currency
        self.floor = floor
        self.weights = dict(weights or {})
        self._sums: Tensor | None = None
        self._counts: Tensor | None = None

    def begin_epoch(self, epoch: int, facts: dict[str, Any]) -> None:
        """Begin the means anew."""
        self._sums = None

    def after_loss(self, moment: Moment) -> None:
        """Leave out terms that are not finite, and scale the others; under "gradient" that is done later."""
        assert moment.terms is not None
        terms = moment.terms
        if self.currency == "gradient":
            moment.terms = capped(terms, None)
            self._count_excluded(terms)
            return
        weights = {**self.weights, **(moment.facts.get("loss_weights") or {})}
        rule = "reference" if self.currency == "reference" else "loss"
        cap = meta_loss_cap(
            terms.task, terms.auxiliaries, self.ratio, floor=self.floor, rule=rule, weights=weights
        )
        moment.terms = capped(terms, cap.factor)
        self._note(cap)

    def auxiliary_factor(self, task_norm: Tensor, auxiliary_norm: Tensor) -> Tensor:
        """Return what the auxiliaries' gradient is to be multiplied by, 0-d, from both gradients' norms."""
        cap = gradient_cap(task_norm, auxiliary_norm, self.ratio, floor=self.floor)
        self._note(cap)
        return cap.factor

    def telemetry(self) -> dict[str, float]:
        """Return means and counts; nan without a step."""
        steps, *sums = [0.0] * len(_SUMS) if self._sums is None else self._sums.tolist()
        counts = [0.0] * len(_COUNTS) if self._counts is None else self._counts.tolist()
        means = [value / steps if steps else float("nan") for value in sums]
        return dict(zip((*_SUMS[1:], *_COUNTS), (*means, *counts), strict=True))

    def state_dict(self) -> dict[str, Any]:
        """Return what the telemetry goes on from."""
        return {"sums": _copied(self._sums), "counts": _copied(self._counts)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self._sums, self._counts = _copied(state["sums"]), _copied(state["counts"])

    def _note(self, cap: Cap) -> None:
        factor = cap.factor.to(torch.float64)
        shares = [_or_zero(cap.share_before), _or_zero(cap.share_after)]
        told = torch.stack([torch.ones_like(factor), factor, *shares, (factor < 1).to(torch.float64)])
        self._sums = told if self._sums is None else self._sums.to(told.device) + told
        self._count(cap.excluded, cap.negative)

    def _count_excluded(self, terms: LossTerms) -> None:
        _, excluded = _finite_sum(_values(terms.task), list(terms.auxiliaries.values()))
        self._count(excluded, torch.zeros_like(excluded))

    def _count(self, excluded: Tensor, negative: Tensor) -> None:
        told = torch.stack([excluded.to(torch.float64), negative.to(torch.float64)])
        self._counts = told if self._counts is None else self._counts.to(told.device) + told


def _or_zero(share: Tensor) -> Tensor:
    """A step without a finite loss is refused and has no share that could be averaged."""
    share = share.to(torch.float64)
    return torch.where(torch.isfinite(share), share, 0.0)


def _copied(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().clone()
