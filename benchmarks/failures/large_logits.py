"""Logits that are large: what overflows, and what is lost by bounding it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from failures.measuring import (
    TOLERATED,
    UNCHANGED,
    Case,
    Found,
    Setting,
    Target,
    gradient_of,
    largest_difference,
    number,
)
from scm.guards.stablemax import WeightedStablemaxLoss, softmax_entropy, stablemax
from scm.seeding import generator

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_Loss = Callable[[Tensor, Tensor], Tensor]


def reference_stablemax(x: Tensor) -> Tensor:
    """The published form, both of whose branches are differentiated everywhere."""
    x = x.clamp(-1000.0, 1000.0)
    x = torch.where(x.isfinite(), x, 0.0)
    return torch.where(x < 0, 1.0 / (1.0 - x + 1e-30), x + 1.0).clamp(1e-10, 1e10)


def _reference_loss(clamp: float | None) -> _Loss:
    """The published cross-entropy, every class of weight 1: computed in float64, given back as it came."""

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        bounded = logits if clamp is None else logits.clamp(-clamp, clamp)
        s = reference_stablemax(bounded.double())
        log_p = (s.log() - (s.sum(-1, keepdim=True) + 1e-10).log()).clamp(-100.0, 0.0)
        return -log_p.gather(1, targets[:, None]).to(logits.dtype).mean()

    return loss


def _plain_stablemax_loss(clamp: float | None, form: str = "soft") -> nn.Module:
    """Ours, every class of weight 1."""
    return WeightedStablemaxLoss(1.0, 1.0, logit_clamp_max=clamp, logit_clamp_form=form)


def _extreme_logits(setting: Setting) -> tuple[Tensor, Tensor]:
    draws = torch.rand((256, 10), generator=generator(setting.seed, "logits")).to(setting.device)
    return -90.0 + 170.0 * draws, torch.arange(256, device=setting.device) % 10


def _broken_dtypes(loss: _Loss, logits: Tensor, targets: Tensor, dtypes: Iterable[torch.dtype]) -> float:
    """In how many dtypes the loss or its gradient is not finite."""
    broken = 0
    for dtype in dtypes:
        leaf = logits.to(dtype, copy=True).requires_grad_()
        value = loss(leaf, targets)
        broken += not bool(value.isfinite() & gradient_of(value, leaf).isfinite().all())
    return float(broken)


def _compared(one: _Loss, other: _Loss, setting: Setting) -> tuple[float, float, float]:
    """Both losses of ordinary logits in float32, and what differs between values and gradients."""
    logits = (3.0 * setting.normal(256, 10, stream="ordinary")).requires_grad_()
    targets = torch.arange(256, device=setting.device) % 10
    values = [loss(logits, targets) for loss in (one, other)]
    gradients = [gradient_of(value, logits) for value in values]
    change = largest_difference([values[0], gradients[0]], [values[1], gradients[1]])
    return number(values[0]), number(values[1]), change


def extreme_logits(setting: Setting) -> Found:
    """F1a: the published cause of the NaN, on the published loss."""
    logits, targets = _extreme_logits(setting)
    losses = {str(dtype).removeprefix("torch."): logits.to(dtype) for dtype in _DTYPES}
    free = _reference_loss(None)
    clean, guarded, change = _compared(_plain_stablemax_loss(None), _plain_stablemax_loss(50.0), setting)
    return Found(
        without_guard=_broken_dtypes(free, logits, targets, _DTYPES),
        reference_rule=_broken_dtypes(_reference_loss(50.0), logits, targets, _DTYPES),
        with_guard=_broken_dtypes(_plain_stablemax_loss(50.0), logits, targets, _DTYPES),
        clean=clean,
        clean_with_guard=guarded,
        clean_change=change,
        more={f"loss_{name}": float(free(held, targets)) for name, held in losses.items()},
    )


def unshifted_softmax(setting: Setting) -> Found:
    """F1b: an exponential that is not shifted by the largest logit."""
    logits, targets = _extreme_logits(setting)

    def unshifted(x: Tensor, targets: Tensor) -> Tensor:
        p = x.exp() / x.exp().sum(-1, keepdim=True)
        return -p.gather(1, targets[:, None]).log().mean()

    def shifted(x: Tensor, targets: Tensor) -> Tensor:
        return -x.log_softmax(-1).gather(1, targets[:, None]).mean()

    low = _DTYPES[1:]
    clean, clean_guarded, change = _compared(unshifted, shifted, setting)
    return Found(
        without_guard=_broken_dtypes(unshifted, logits, targets, low),
        with_guard=_broken_dtypes(shifted, logits, targets, low),
        clean=clean,
        clean_with_guard=clean_guarded,
        clean_change=change,
    )


def entropy_of_certainty(setting: Setting) -> Found:
    """F1c: p log p where p has rounded to 0."""
    logits, targets = _extreme_logits(setting)

    def plain(x: Tensor, targets: Tensor) -> Tensor:
        p = x.softmax(-1)
        return -(p * p.log()).sum(-1).mean()

    def guarded(x: Tensor, targets: Tensor) -> Tensor:
        return softmax_entropy(x).mean()

    low = _DTYPES[1:]
    clean, clean_guarded, change = _compared(plain, guarded, setting)
    return Found(
        without_guard=_broken_dtypes(plain, logits, targets, low),
        with_guard=_broken_dtypes(guarded, logits, targets, low),
        clean=clean,
        clean_with_guard=clean_guarded,
        clean_change=change,
    )


def logit_of_one(setting: Setting) -> Found:
    """F1d: the point at which the branch that is not taken has an infinite slope."""
    one = torch.ones(1, device=setting.device, requires_grad=True)
    ordinary = (3.0 * setting.normal(4096)).requires_grad_()
    values = [function(ordinary) for function in (reference_stablemax, stablemax)]
    slopes = [gradient_of(value.sum(), ordinary) for value in values]
    half = (3.0 * setting.normal(4, 10, 10, 10, stream="half")).bfloat16().float().requires_grad_()
    in_half = [gradient_of(function(half).sum(), half) for function in (reference_stablemax, stablemax)]
    return Found(
        without_guard=float(gradient_of(reference_stablemax(one).sum(), one)),
        with_guard=float(gradient_of(stablemax(one).sum(), one)),
        clean=float(slopes[0].mean()),
        clean_with_guard=float(slopes[1].mean()),
        clean_change=largest_difference([values[0], slopes[0]], [values[1], slopes[1]]),
        more={
            "nan_of_4000_bfloat16_logits": float(in_half[0].isnan().sum()),
            "nan_with_guard": float(in_half[1].isnan().sum()),
        },
    )


def _learn_four_classes(
    loss: _Loss, start: Tensor, *, learning_rate: float, steps: int = 400
) -> tuple[float, float, Tensor]:
    """Train four rows of logits, of four classes; return accuracy, the first largest gradient, and logits."""
    logits = start.clone().requires_grad_()
    targets = torch.arange(4, device=start.device)
    optimizer = torch.optim.Adam([logits], lr=learning_rate)
    first = math.nan
    for step in range(steps):
        gradient = gradient_of(loss(logits, targets), logits)
        first = float(gradient.abs().max()) if step == 0 else first
        logits.grad = gradient
        optimizer.step()
    return float((logits.argmax(1) == targets).float().mean()), first, logits.detach()


def sure_and_wrong(setting: Setting) -> Found:
    """F1e: whether an answer that is surely wrong can still be learned."""
    wrong = (-90.0 + 170.0 * torch.eye(4).roll(1, 0)).to(setting.device)
    free, first, _ = _learn_four_classes(_plain_stablemax_loss(None), wrong, learning_rate=1.0)
    found = {
        form: _learn_four_classes(_plain_stablemax_loss(50.0, form), wrong, learning_rate=1.0)
        for form in ("hard", "soft", "straight_through")
    }
    ordinary = setting.normal(4, 4)
    # Trained to logits of about 20: below the knee of the soft bound, which is at half its limit.
    clean, guarded = (
        _learn_four_classes(_plain_stablemax_loss(clamp), ordinary, learning_rate=0.05)
        for clamp in (None, 50.0)
    )
    return Found(
        without_guard=free,
        reference_rule=found["hard"][0],
        with_guard=found["soft"][0],
        clean=clean[0],
        clean_with_guard=guarded[0],
        clean_change=largest_difference([clean[2]], [guarded[2]]),
        more={
            "accuracy_straight_through": found["straight_through"][0],
            "first_gradient": first,
            "first_gradient_hard": found["hard"][1],
            "first_gradient_soft": found["soft"][1],
        },
    )


CASES: tuple[Case, ...] = (
    Case(
        id="F1a",
        trigger="logits in [-90, 80], a cross-entropy on stablemax, four dtypes",
        mechanism="none: stablemax has no exponential, and nothing overflows",
        measure="dtypes whose loss or gradient is not finite",
        unit="of 4",
        guard="soft bound at 50",
        reference="hard clamp at 50; the NaN that it is said to prevent does not occur",
        clean_measure="loss of ordinary logits",
        run=extreme_logits,
        targets=(Target("without_guard", "==", 0.0), Target("with_guard", "==", 0.0), UNCHANGED),
    ),
    Case(
        id="F1b",
        trigger="the same logits, log of exp / sum of exp, three dtypes",
        mechanism="an exponential that is not shifted overflows",
        measure="dtypes whose loss or gradient is not finite",
        unit="of 3",
        guard="log_softmax, which shifts",
        clean_measure="loss of ordinary logits",
        run=unshifted_softmax,
        targets=(Target("without_guard", "==", 3.0), Target("with_guard", "==", 0.0), TOLERATED),
    ),
    Case(
        id="F1c",
        trigger="the same logits, the entropy as a sum of p log p, three dtypes",
        mechanism="p rounds to 0, and 0 times -inf is NaN",
        measure="dtypes whose entropy or gradient is not finite",
        unit="of 3",
        guard="softmax_entropy, from log-probabilities",
        clean_measure="entropy of ordinary logits",
        run=entropy_of_certainty,
        targets=(Target("without_guard", "==", 3.0), Target("with_guard", "==", 0.0), TOLERATED),
    ),
    Case(
        id="F1d",
        trigger="a logit of exactly 1 in float32, stablemax in two branches",
        mechanism="the branch that is not taken has an infinite slope there, and 0 times inf is NaN",
        measure="the gradient, which is 1",
        unit="",
        guard="each branch of stablemax sees its own half",
        clean_measure="mean gradient at 4096 ordinary logits",
        run=logit_of_one,
        targets=(
            Target("without_guard", "is nan"),
            Target("with_guard", "==", 1.0),
            Target("nan_with_guard", "==", 0.0),
            UNCHANGED,
        ),
    ),
    Case(
        id="F1e",
        trigger="the true class at -90, a wrong one at 80; 400 steps of Adam",
        mechanism="beyond a hard clamp the gradient is exactly 0: the remedy of F1a is the failure",
        measure="accuracy",
        unit="share of rows",
        guard="soft bound at 50, or straight through",
        reference="hard clamp at 50",
        run=sure_and_wrong,
        targets=(
            Target("without_guard", "==", 1.0),
            Target("reference_rule", "==", 0.0),
            Target("first_gradient_hard", "==", 0.0),
            Target("with_guard", "==", 1.0),
            Target("accuracy_straight_through", "==", 1.0),
            UNCHANGED,
        ),
    ),
)
