"""Whether a model answers alike what is alike: equivariance as a loss, and as a companion.

Decided here: what is compared between views, and in which distance. Which transforms there are is decided in
`symmetry`; when a term that should train is found to train nothing, in `degenerate`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from scm.autodiff.policies import gate_tuple
from scm.guards.degenerate import DegenerateTermDetector
from scm.guards.symmetry import D4, Symmetry, select
from scm.losses.rowwise import bool_mask, check_at_least_zero, mean_over
from scm.losses.terms import LossTerms

if TYPE_CHECKING:
    from scm.training.companion import Moment
    from scm.training.targets import SemanticTargets

DISTANCES = ("kl", "l2")
TRAINS = ("original", "views", "both")
REFERENCE_EPSILON = 1e-8  # what the reference adds within its logarithms
_LEAST_SCORE = -1e30
_OPPOSITE = 1e-6  # bounds the "kl" of two lines at a right angle to 13.8

Compared = Tensor | tuple[Tensor, Tensor]
"""Class scores (B, C, ...), or two tensors of one shape: the pairs (P, Q) of lines."""


def compared(outputs: Any) -> Compared:
    """Return what of a model's outputs is compared between views.

    A tensor (B, C, ...) holds scores of C classes at every place, and so does "class_logits" among named
    tensors, and P where P is (B, C, places...) over one gate Q (B,) for all of them. Every other (P, Q) is a
    pair for each of P's entries, with Q repeated where one serves several.
    """
    if isinstance(outputs, Tensor):
        return outputs
    if not isinstance(outputs, (tuple, list)) or len(outputs) < 2:
        raise TypeError(f"outputs must be a tensor, (P, Q) or (P, Q, named), got {type(outputs).__name__}")
    P, Q = outputs[0], outputs[1]
    if len(outputs) > 2 and "class_logits" in outputs[2]:
        logits: Tensor = outputs[2]["class_logits"]
        return logits
    if P.ndim >= 3 and Q.ndim == 1:
        scores: Tensor = P
        return scores
    while Q.ndim < P.ndim:
        Q = Q.unsqueeze(-1)
    return P, Q.expand_as(P)


class Equivariance(NamedTuple):
    """What a comparison found: the loss, 0-d with its graph, and each view's own, 0-d without."""

    loss: Tensor
    per_view: dict[str, Tensor]


class OutputEquivarianceLoss:
    """How far a model's answers to transformed inputs, transformed back, are from its answers to the inputs.

    loss(model, inputs, outputs) draws `views` of the symmetries (the identity is none) and compares what
    `compared` finds. Class scores become probabilities: their mean over the views is what the original's are
    measured against, in "kl" (the divergence from the mean view, per place) or "l2" (the mean squared
    difference). Pairs (P, Q) are lines, whatever their length: "l2" is the squared sine of the angle between
    them, in [0, 1], "kl" minus the logarithm of the squared cosine, which grows to 13.8 at a right angle;
    a pair (0, 0) is at a right angle to all. Means are over places, and over views for pairs.

    trains: which answers the gradient reaches. With "views" the answers to the inputs, which have labels,
    teach those to the views, which have none; with "original", as in the reference, it is the other way
    round; "both" is the gradient of the distance itself. All but "original" cost a backward pass a view.
    evaluate: whether all answers are given in eval mode, so that noise of training (dropout, batch
    statistics) is not taken for a lack of symmetry; a model with such layers then answers the inputs a second
    time. Otherwise the model's mode stays what it is.
    epsilon: is added within the logarithms of "kl".

    Differs from the reference: what it trains spoils answers that labels had made right, where views are
    seldom trained themselves; its 1e-8 for `epsilon` leaves an answer that is surely wrong without a
    gradient, so that the default is 0; the views come from all symmetries but the identity (there: four of
    them) and from a generator (there: Python's global one); they are answered in eval mode.
    """

    def __init__(
        self,
        symmetries: Mapping[str, Symmetry] = D4,
        *,
        distance: str = "kl",
        views: int = 2,
        trains: str = "views",
        evaluate: bool = True,
        epsilon: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        if distance not in DISTANCES:
            raise ValueError(f"distance must be one of {', '.join(DISTANCES)}, got {distance=}")
        if trains not in TRAINS:
            raise ValueError(f"trains must be one of {', '.join(TRAINS)}, got {trains=}")
        check_at_least_zero("epsilon", epsilon)
        self.symmetries = proper(symmetries)
        if not 1 <= views <= len(self.symmetries):
            raise ValueError(
                f"views must be in [1, {len(self.symmetries)}], as many as there are symmetries beside the "
                f"identity, got {views=}"
            )
        self.distance = distance
        self.views = views
        self.trains = trains
        self.evaluate = evaluate
        self.epsilon = epsilon
        self.generator = generator

    def __call__(
        self,
        model: Callable[[Tensor], Any],
        inputs: Tensor,
        outputs: Any = None,
        *,
        mask: Tensor | None = None,
        names: Sequence[str] | None = None,
    ) -> Equivariance:
        """Compare; `outputs` are the model's to `inputs`, with their graph, where they are known already.

        mask: places to average over (bool, expands to them; for class scores (B, ...) without the classes),
        all by default; over no place the loss is 0. names: the symmetries to view under, instead of a draw.
        """
        symmetries = self.drawn() if names is None else self.named(names)
        with evaluating(model) if self.evaluate and isinstance(model, nn.Module) else nullcontext():
            if outputs is None or (self.evaluate and draws_in_training(model)):
                outputs = model(inputs)
            with torch.no_grad() if self.trains == "original" else nullcontext():
                views = self._views(model, inputs, symmetries)
        original = compared(outputs)
        if self.trains == "views":
            original = original.detach() if isinstance(original, Tensor) else _detached(original)
        if isinstance(original, Tensor):
            loss, each = self._of_classes(original, torch.stack(views), mask)
        else:
            P, Q = zip(*views, strict=True)
            loss, each = self._of_lines(original, (torch.stack(P), torch.stack(Q)), mask)
        return Equivariance(loss, dict(zip([item.name for item in symmetries], each.unbind(), strict=True)))

    def named(self, names: Sequence[str]) -> list[Symmetry]:
        """Return symmetries by name; ValueError naming the known for any other."""
        return [self.symmetries[name] for name in select(self.symmetries, names)]

    def drawn(self) -> list[Symmetry]:
        """Draw `views` of the symmetries, all different."""
        every = list(self.symmetries.values())
        order = torch.randperm(len(every), generator=self.generator)[: self.views]
        return [every[place] for place in order.tolist()]

    def _views(
        self, model: Callable[[Tensor], Any], inputs: Tensor, symmetries: Sequence[Symmetry]
    ) -> list[Any]:
        """Return what is compared of the answers to every view, brought back; by one call where that may be.

        In eval mode a row's answer does not depend on the rows beside it, so that views of one shape are
        answered together.
        """
        turned = [symmetry.apply(inputs) for symmetry in symmetries]
        alike = len({item.shape for item in turned}) == 1
        if len(turned) > 1 and alike and self.evaluate and isinstance(model, nn.Module):
            parts = _parted(model(torch.cat(turned)), len(turned), len(inputs))
        else:
            parts = [model(item) for item in turned]
        return [compared(symmetry.undo(part)) for symmetry, part in zip(symmetries, parts, strict=True)]

    def _of_classes(self, original: Tensor, views: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        mask = None if mask is None else bool_mask("mask", mask, original.select(1, 0))
        classes = 1 - original.ndim  # counted from the end: views stand before the rows
        logs, own = _log_shares(views, classes), _log_shares(original, classes)
        mean = logs[0] if len(views) == 1 else logs.logsumexp(dim=0) - math.log(len(views))
        loss = mean_over(self._divergence(mean, own), mask)[0]
        with torch.no_grad():
            each = loss[None] if len(views) == 1 else _mean_by_view(self._divergence(logs, own), mask)
        return loss, each.detach()

    def _divergence(self, target: Tensor, own: Tensor) -> Tensor:
        """Return what the distribution `own` lacks of `target`, per place; of both the logarithms are given.

        Logarithms of shares are finite where the shares are 0 as floats, and so is every gradient.
        """
        classes = 1 - own.ndim
        shares = target.exp()
        if self.distance == "l2":
            return (shares - own.exp()).square().mean(dim=classes)
        if self.epsilon > 0:
            target, own = (shares + self.epsilon).log(), (own.exp() + self.epsilon).log()
        return (shares * (target - own)).sum(dim=classes)

    def _of_lines(
        self, original: tuple[Tensor, Tensor], views: tuple[Tensor, Tensor], mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        mask = None if mask is None else bool_mask("mask", mask, original[0])
        pair = views if self.trains == "original" else gate_tuple(*views)
        each = _mean_by_view(line_distance(*gate_tuple(*original), *pair, distance=self.distance), mask)
        return each.mean(), each.detach()


def _mean_by_view(values: Tensor, mask: Tensor | None) -> Tensor:
    """Return the means over places of (V, ...), (V,); over the places of `mask`, 0 where there are none."""
    if mask is None:
        return values.flatten(1).mean(dim=1)
    return torch.where(mask, values, 0.0).flatten(1).sum(dim=1) / mask.sum().clamp(min=1)


def _parted(outputs: Any, views: int, rows: int) -> list[Any]:
    """Return the answers to several views from one answer to all of their rows, view by view."""
    if isinstance(outputs, Tensor):
        joined = outputs.ndim > 0 and len(outputs) == views * rows
        return list(outputs.split(rows)) if joined else [outputs] * views
    if isinstance(outputs, Mapping):
        named = {name: _parted(item, views, rows) for name, item in outputs.items()}
        return [{name: items[view] for name, items in named.items()} for view in range(views)]
    if isinstance(outputs, (tuple, list)):
        columns = [_parted(item, views, rows) for item in outputs]
        return [tuple(column[view] for column in columns) for view in range(views)]
    raise TypeError(f"outputs must be tensors in tuples, lists or mappings, got {type(outputs).__name__}")


def _log_shares(scores: Tensor, classes: int) -> Tensor:
    """Return the log-probabilities of scores, a class excluded by -inf with a finite one."""
    scores = scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores
    return scores.clamp(min=_LEAST_SCORE).log_softmax(dim=classes)


def _detached(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return pair[0].detach(), pair[1].detach()


def line_distance(P: Tensor, Q: Tensor, other_P: Tensor, other_Q: Tensor, *, distance: str) -> Tensor:
    """Return the distance of the lines through (P, Q) and (other_P, other_Q), elementwise, >= 0.

    The same for every length and sign of either pair. "l2": the squared sine of the angle between them.
    "kl": minus the logarithm of its squared cosine. (0, 0) is at a right angle to all, without a gradient.
    """
    p, q, zero = _unit_scale(P, Q)
    y, d, other_zero = _unit_scale(other_P, other_Q)
    lengths = (p * p + q * q) * (y * y + d * d)
    nowhere = zero | other_zero
    squared_sine = (p * d - q * y).square() / torch.where(nowhere, 1.0, lengths)
    squared_sine = torch.where(nowhere, 1.0, squared_sine).clamp(max=1.0)
    return squared_sine if distance == "l2" else -torch.log1p(-squared_sine / (1 + _OPPOSITE))


def _unit_scale(P: Tensor, Q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return a pair divided by the larger of its sizes, and where there is none."""
    if P.dtype in (torch.float16, torch.bfloat16):
        P, Q = P.float(), Q.float()
    size = torch.maximum(P.detach().abs(), Q.detach().abs())
    zero = size == 0
    size = torch.where(zero, 1.0, size)
    return P / size, Q / size, zero


def proper(symmetries: Mapping[str, Symmetry]) -> dict[str, Symmetry]:
    """Return the symmetries without "identity", under which there is nothing to compare."""
    return {name: item for name, item in symmetries.items() if name != "identity"}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode, and each of its modules back into its own mode afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


_DRAWING = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._NormBase, nn.RReLU)


def draws_in_training(model: Any) -> bool:
    """Say whether a layer of torch in the model answers otherwise in training mode than in eval mode."""
    if not isinstance(model, nn.Module):
        return False
    for module in model.modules():
        dropout = getattr(module, "dropout", 0.0)  # of attention and of recurrent layers
        if isinstance(module, _DRAWING) or (isinstance(dropout, float) and dropout > 0):
            return True
    return False


# --- the level of weights and contexts -----------------------------------------------------------


class AugmentationEquivarianceLoss:
    """How far what a model makes of a transformed context is from what it makes of the original one.

    loss(original, augmented), of tensors (B, ...) by key (changes of weights, say), for each transform by
    name: ``0.3 * mean((|a| - |b|)^2) + 0.7 * mean(1 - cos(a, b))`` over rows, summed over keys, averaged over
    transforms; a is the original, without a gradient. Both parts are >= 0, and 0 for equal tensors however
    small they are; a row that is 0 in one of them alone has cosine 0.

    Differs from the reference, whose cosine has 1e-8 added to the norms (small changes look different from
    themselves) and rounds to below 0.
    """

    def __init__(self, *, norm_weight: float = 0.3, cosine_weight: float = 0.7) -> None:
        check_at_least_zero("norm_weight", norm_weight)
        check_at_least_zero("cosine_weight", cosine_weight)
        self.norm_weight = norm_weight
        self.cosine_weight = cosine_weight

    def __call__(
        self, original: Mapping[str, Tensor], augmented: Mapping[str, Mapping[str, Tensor]]
    ) -> Equivariance:
        """Compare; without transforms the loss is 0. Raises ValueError where keys differ."""
        each = {name: self._of(original, changed, name) for name, changed in augmented.items()}
        if not each:
            like = next(iter(original.values()), torch.zeros(()))
            return Equivariance(like.new_zeros(()), {})
        loss = torch.stack(list(each.values())).mean()
        return Equivariance(loss, {name: value.detach() for name, value in each.items()})

    def _of(self, original: Mapping[str, Tensor], changed: Mapping[str, Tensor], name: str) -> Tensor:
        if set(original) != set(changed):
            raise ValueError(f"{name!r} must hold the keys {sorted(original)}, got {sorted(changed)}")
        parts = []
        for key, kept in original.items():
            a, b = kept.detach().flatten(1), changed[key].flatten(1)
            length_a, length_b = torch.linalg.vector_norm(a, dim=1), torch.linalg.vector_norm(b, dim=1)
            cosine = _one_minus_cosine(a, b, length_a, length_b)
            norms = (length_a - length_b).square()
            parts.append(self.norm_weight * norms.mean() + self.cosine_weight * cosine.mean())
        return torch.stack(parts).sum()


def _one_minus_cosine(a: Tensor, b: Tensor, length_a: Tensor, length_b: Tensor) -> Tensor:
    """Return 1 - cos by row, as half the squared distance of the unit vectors: exactly 0 for equal ones."""
    none_a, none_b = length_a == 0, length_b == 0
    unit_a = a / torch.where(none_a, 1.0, length_a).unsqueeze(1)
    unit_b = b / torch.where(none_b, 1.0, length_b).unsqueeze(1)
    apart = 0.5 * (unit_a - unit_b).square().sum(dim=1)
    return torch.where(none_a ^ none_b, 1.0, apart)


def global_context(features: Tensor) -> Tensor:
    """Return the mean over the last two axes of (..., H, W), the same for every orientation of them.

    No loss that compares such contexts between orientations of the features can be anything but 0.
    """
    return features.mean(dim=(-2, -1))


def positional_context(features: Tensor) -> Tensor:
    """Return a mean over the last two axes of (..., H, W) in which every cell weighs by its place.

    The weights rise from top to bottom and, half as fast, from left to right, between 1/4 and 7/4: no
    orientation of a grid gives the same context as another, unless the grid itself is symmetric.
    """
    rows, columns = (
        torch.linspace(-1.0, 1.0, size, device=features.device, dtype=features.dtype)
        if size > 1
        else torch.zeros(1, device=features.device, dtype=features.dtype)
        for size in features.shape[-2:]
    )
    return (features * (1.0 + 0.5 * rows[:, None] + 0.25 * columns)).mean(dim=(-2, -1))


class GroupMarginalizedNLLLoss:
    """The negative logarithm of the probability that all views together give to the target.

    loss(model, inputs, targets): probabilities are averaged over the identity and `views` other symmetries,
    every one with its graph. Class scores (B, C, ...) and targets (B, ...) of int64; a target of
    `ignore_index` is passed over, and with nothing else the loss is 0.
    """

    def __init__(
        self,
        symmetries: Mapping[str, Symmetry] = D4,
        *,
        views: int = 2,
        ignore_index: int = -100,
        generator: torch.Generator | None = None,
    ) -> None:
        self._pool = OutputEquivarianceLoss(symmetries, views=views, generator=generator)
        self.ignore_index = ignore_index

    def __call__(
        self,
        model: Callable[[Tensor], Any],
        inputs: Tensor,
        targets: Tensor,
        outputs: Any = None,
        *,
        names: Sequence[str] | None = None,
    ) -> Equivariance:
        """Return the loss, and each view's own; see `OutputEquivarianceLoss` for `outputs` and `names`."""
        pool = self._pool
        symmetries = pool.drawn() if names is None else pool.named(names)
        answers = [_scores(model(inputs) if outputs is None else outputs)]
        answers += [_scores(symmetry.undo(model(symmetry.apply(inputs)))) for symmetry in symmetries]
        valid = targets != self.ignore_index
        index = torch.where(valid, targets, 0).unsqueeze(1)
        logs = torch.stack([item.log_softmax(dim=1).gather(1, index).squeeze(1) for item in answers])
        loss = mean_over(math.log(len(answers)) - logs.logsumexp(dim=0), valid)[0]
        names = ["identity", *(symmetry.name for symmetry in symmetries)]
        each = {name: mean_over(-log.detach(), valid)[0] for name, log in zip(names, logs, strict=True)}
        return Equivariance(loss, each)


def _scores(outputs: Any) -> Tensor:
    scores = compared(outputs)
    if not isinstance(scores, Tensor):
        raise TypeError("outputs must hold class scores, got pairs (P, Q)")
    return scores


# --- in the trainer ------------------------------------------------------------------------------


class EquivarianceGuard:
    """Adds an equivariance term to the loss of every step; a companion of `SCMTrainer`.

    `weight` times `OutputEquivarianceLoss` of the model's raw outputs, as auxiliary "equivariance"; rows that
    are not trained take no part. The views are answered by the same model, under autocast in `amp_dtype`
    where it is given. `weight` may be replaced between steps, by a number or a 0-d tensor.

    Telemetry: equivariance_loss, the unweighted mean over the steps of the newest epoch, and
    equivariance_degenerate, 1 where the term has been found to train nothing (`reason` says why), else 0.
    """

    TERM = "equivariance"

    def __init__(
        self,
        loss: OutputEquivarianceLoss,
        weight: float | Tensor,
        *,
        amp_dtype: torch.dtype | None = None,
        detector: DegenerateTermDetector | None = None,
    ) -> None:
        check_at_least_zero("weight", weight)
        self.loss = loss
        self.weight = weight
        self.amp_dtype = amp_dtype
        self.detector = DegenerateTermDetector() if detector is None else detector
        self.reason = ""
        self._sums: Tensor | None = None  # of losses, and how many

    def begin_epoch(self, epoch: int, facts: dict[str, Any]) -> None:
        """Begin the mean anew."""
        self._sums = None

    def after_forward(self, moment: Moment) -> None:
        """Keep the raw outputs: guards that bound them come later, and views are not bounded."""
        moment.found[self.TERM] = moment.outputs

    def after_loss(self, moment: Moment) -> None:
        """Answer the views and add the term."""
        assert moment.terms is not None
        outputs = moment.found.pop(self.TERM, moment.outputs)
        with self._as_trained(moment.fed.inputs):
            found = self.loss(
                moment.model, moment.fed.inputs, outputs, mask=trained_places(moment.fed.semantic, outputs)
            )
        term = found.loss * self.weight
        terms = moment.terms
        moment.terms = LossTerms(terms.task, {**terms.auxiliaries, self.TERM: term})
        self.detector.observe(self.TERM, term, terms.total() + term)
        told = torch.stack(
            [found.loss.detach().to(torch.float64), torch.ones_like(term, dtype=torch.float64)]
        )
        self._sums = told if self._sums is None else self._sums.to(told.device) + told

    def telemetry(self) -> dict[str, float]:
        """Return the mean, nan without a step, and whether the term is degenerate."""
        total, steps = (0.0, 0.0) if self._sums is None else self._sums.tolist()
        self.reason = self.detector.findings().get(self.TERM, self.reason)
        return {
            "equivariance_loss": total / steps if steps else math.nan,
            "equivariance_degenerate": float(bool(self.reason)),
        }

    def state_dict(self) -> dict[str, Any]:
        """Return what the next draw of views and the telemetry go on from."""
        drawn = self.loss.generator
        return {
            "generator": None if drawn is None else drawn.get_state(),
            "sums": None if self._sums is None else self._sums.clone(),
            "detector": self.detector.state_dict(),
            "reason": self.reason,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        if self.loss.generator is not None and state["generator"] is not None:
            self.loss.generator.set_state(state["generator"].cpu())
        self._sums = state["sums"]
        self.detector.load_state_dict(state["detector"])
        self.reason = state["reason"]

    def _as_trained(self, inputs: Tensor) -> AbstractContextManager[Any]:
        if self.amp_dtype is None:
            return nullcontext()
        return torch.autocast(inputs.device.type, dtype=self.amp_dtype)


def trained_places(semantic: SemanticTargets | None, outputs: Any) -> Tensor | None:
    """Return the mask of the places whose labels are trained, in the shape of what is compared."""
    if semantic is None:
        return None
    mask = semantic.mask_trained
    answer = compared(outputs)
    if isinstance(answer, Tensor):
        return mask.any(dim=1) if mask.ndim == answer.ndim else mask
    while mask.ndim < answer[0].ndim:
        mask = mask.unsqueeze(-1)
    return mask
