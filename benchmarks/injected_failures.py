"""Ways in which a training fails, each injected into a tiny one: without a guard, with it, and with neither.

A case is measured by one function, which trains or evaluates the same small thing several times: with the
failure and no guard, with the failure and the guard, and twice without the failure. Where somebody published
a remedy that does not work, it is measured as well. What is made of the numbers is decided in
`failure_modes`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from scm.guards.bounds import saturation_penalty
from scm.guards.budget import Cap, gradient_cap, meta_loss_cap
from scm.guards.consistency import (
    AugmentationEquivarianceLoss,
    OutputEquivarianceLoss,
    global_context,
    positional_context,
)
from scm.guards.degenerate import DegenerateTermDetector
from scm.guards.gap import GapMonitor, GapWatch, Measured, consensus, normalised_entropy
from scm.guards.range import RangeGuard
from scm.guards.spread import relevance, spread_loss
from scm.guards.stablemax import CLASS_WEIGHTINGS, WeightedStablemaxLoss, softmax_entropy, stablemax
from scm.guards.stopping import SparsityRegularization
from scm.guards.symmetry import D4
from scm.seeding import generator, seeded_init
from scm.training.config import TrainingConfig
from scm.training.loader import TensorBatches
from scm.training.targets import lift_semantic_targets
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


def _number(value: Tensor) -> float:
    return float(value.detach())


def _gradient(value: Tensor, of: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(value, of)
    return found


# --- F1: logits that are large -------------------------------------------------------------------

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
        broken += not bool(value.isfinite() & _gradient(value, leaf).isfinite().all())
    return float(broken)


def _compared(one: _Loss, other: _Loss, setting: Setting) -> tuple[float, float, float]:
    """Both losses of ordinary logits in float32, and what differs between values and gradients."""
    logits = (3.0 * setting.normal(256, 10, stream="ordinary")).requires_grad_()
    targets = torch.arange(256, device=setting.device) % 10
    values = [loss(logits, targets) for loss in (one, other)]
    gradients = [_gradient(value, logits) for value in values]
    change = largest_difference([values[0], gradients[0]], [values[1], gradients[1]])
    return _number(values[0]), _number(values[1]), change


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
    slopes = [_gradient(value.sum(), ordinary) for value in values]
    half = (3.0 * setting.normal(4, 10, 10, 10, stream="half")).bfloat16().float().requires_grad_()
    in_half = [_gradient(function(half).sum(), half) for function in (reference_stablemax, stablemax)]
    return Found(
        without_guard=float(_gradient(reference_stablemax(one).sum(), one)),
        with_guard=float(_gradient(stablemax(one).sum(), one)),
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
        gradient = _gradient(loss(logits, targets), logits)
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


# --- F2: values that are not finite --------------------------------------------------------------

_BATCHES, _ROWS = 64, 32
_POISONED = (5, 17, 30, 41, 56)
_Batch = tuple[Tensor, Tensor]


class _Radial(nn.Module):
    """Four scores from the inputs and their learned length, whose root has no slope at 0."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))
        self.body = nn.Sequential(nn.Linear(9, 32), nn.ReLU(), nn.Linear(32, 4))

    def forward(self, x: Tensor) -> Tensor:
        scaled = x * self.scale
        squared = scaled.square().sum(-1, keepdim=True)
        length = torch.where(squared > 0, squared.sqrt(), 0.0)
        scores: Tensor = self.body(torch.cat([scaled, length], dim=-1))
        return scores


def _make_scores() -> nn.Module:
    """Four scores from the inputs."""
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))


@dataclass(frozen=True, slots=True)
class _Problem:
    """Batches of four classes, of which some may be poisoned, and rows that are held out."""

    batches: list[_Batch]
    held_out: _Batch

    @classmethod
    def draw(cls, setting: Setting) -> _Problem:
        rows = setting.normal(_BATCHES * _ROWS + 1024, 8)
        labels = (rows @ setting.normal(8, 4, stream="classes")).argmax(1).float()
        count = _BATCHES * _ROWS
        batches = list(zip(rows[:count].split(_ROWS), labels[:count].split(_ROWS), strict=True))
        return cls(batches, (rows[count:], labels[count:]))

    def poisoned(self, values: Sequence[float]) -> list[_Batch]:
        """Put a value, in turn one of `values`, into all inputs of one row of five batches."""
        batches = list(self.batches)
        for number, place in enumerate(_POISONED):
            rows = batches[place][0].clone()
            rows[3] = values[number % len(values)]
            batches[place] = rows, batches[place][1]
        return batches

    def accuracy(self, model: nn.Module) -> float:
        rows, labels = self.held_out
        with torch.no_grad():
            return float((model(rows).argmax(1) == labels).float().mean())


def _class_loss(scores: Tensor, lifted: tuple[Tensor, Tensor]) -> Tensor:
    return functional.cross_entropy(scores, lifted[0].long())


def _sanitised_loss(scores: Tensor, lifted: tuple[Tensor, Tensor]) -> Tensor:
    """The published order of things: what is not finite becomes 0 before the loss."""
    return _class_loss(torch.where(scores.isfinite(), scores, 0.0), lifted)


def _bare(
    model: nn.Module, loss_fn: Callable[..., Tensor], batches: Sequence[_Batch], *, checks_loss: bool
) -> int:
    """Train in a plain loop, which may pass over losses that are not finite; return how many it did."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    passed_over = 0
    for rows, labels in batches:
        loss = loss_fn(model(rows), (labels, torch.ones_like(labels)))
        if checks_loss and not bool(loss.isfinite()):
            passed_over += 1
            continue
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return passed_over


def _guarded(
    model: nn.Module,
    loss_fn: Callable[..., Tensor],
    batches: Iterable[Any],
    setting: Setting,
    *,
    companions: Sequence[Any] = (),
    **config: Any,
) -> SCMTrainer:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    told = TrainingConfig(coverage_threshold=0.0, seed=setting.seed, device=setting.device, **config)
    trainer = SCMTrainer(model, optimizer, loss_fn, batches, config=told, companions=companions)
    trainer.fit()
    return trainer


def _poisoned_training(
    setting: Setting,
    build: Callable[[], nn.Module],
    loss_fn: Callable[..., Tensor],
    poison: Sequence[float],
    *,
    checks_loss: bool,
) -> Found:
    """Train on five poisoned batches of 64: in a plain loop, which may check its loss, and with the guard."""
    problem = _Problem.draw(setting)
    spoiled = problem.poisoned(poison)
    bare, clean = setting.make(build), setting.make(build)
    passed_over = _bare(bare, loss_fn, spoiled, checks_loss=checks_loss)
    _bare(clean, loss_fn, problem.batches, checks_loss=checks_loss)
    action = "skip_micro_batch"  # which also looks at the raw outputs
    guarded, clean_guarded = (
        _guarded(setting.make(build), loss_fn, batches, setting, finite_action=action)
        for batches in (spoiled, problem.batches)
    )
    telemetry = guarded.telemetry()
    lost = sum(int((~item.isfinite()).sum()) for item in bare.parameters())
    return Found(
        without_guard=problem.accuracy(bare),
        with_guard=problem.accuracy(guarded.model),
        clean=problem.accuracy(clean),
        clean_with_guard=problem.accuracy(clean_guarded.model),
        clean_change=largest_difference(clean.parameters(), clean_guarded.model.parameters()),
        more={
            "lost_weights": float(lost),
            "lost_weights_with_guard": float(guarded.nan_counts["parameter"]),
            "passed_over": float(passed_over),
            "left_out_with_guard": telemetry["finite_bad_micro_batches"],
            "raw_outputs_seen": telemetry["finite_raw_output"],
        },
    )


def poisoned_batches(setting: Setting) -> Found:
    """F2: five batches of 64 hold a row that is not a number, or infinite."""
    return _poisoned_training(setting, _make_scores, _class_loss, (math.nan, math.inf), checks_loss=False)


def sanitised_logits(setting: Setting) -> Found:
    """F2b: the same behind a sanitiser, under which the loss looks healthy."""
    return _poisoned_training(setting, _make_scores, _sanitised_loss, (math.nan, math.inf), checks_loss=True)


def backward_only(setting: Setting) -> Found:
    """F2c: rows of zeros, whose length has a value and no slope."""
    return _poisoned_training(setting, _Radial, _class_loss, (0.0,), checks_loss=True)


_GROUP = 7
_BAD_OF_70 = (6, 20, 33, 45, 58)  # in half of the ten groups one micro-batch is bad, now late, now early


def _used(ledger: nn.Module) -> float:
    """How many micro-batches have moved their weight."""
    (weight,) = ledger.parameters()
    return float((weight != 0).sum())


class _Ledger(nn.Module):
    """One weight a micro-batch, which moves when the micro-batch is used."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(10 * _GROUP))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


def _sum_of_outputs(outputs: Tensor, lifted: tuple[Tensor, Tensor]) -> Tensor:
    return outputs.sum()


def _accumulated_by_the_reference(model: nn.Module, batches: Sequence[_Batch]) -> int:
    """The published loop: a loss that is not finite clears the window, whose end stays where it was."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    steps = 0
    for number, (rows, _) in enumerate(batches, 1):
        loss = model(rows).sum()
        if not bool(loss.isfinite()):
            optimizer.zero_grad()
            continue
        (loss / _GROUP).backward()
        if number % _GROUP == 0:
            optimizer.step()
            optimizer.zero_grad()
            steps += 1
    return steps


def accumulated(setting: Setting) -> Found:
    """F2d: what a bad micro-batch takes with it where seven make a step."""
    count = 10 * _GROUP
    marks = torch.eye(count, device=setting.device)
    batches = [(mark[None], torch.zeros(1, device=setting.device)) for mark in marks]
    spoiled = [
        (rows * math.nan, y) if place in _BAD_OF_70 else (rows, y) for place, (rows, y) in enumerate(batches)
    ]

    def trained(batches: Sequence[_Batch]) -> SCMTrainer:
        model = _Ledger().to(setting.device)
        config = TrainingConfig(
            gradient_accumulation_steps=_GROUP,
            finite_action="skip_micro_batch",
            coverage_threshold=0.0,
            device=setting.device,
        )
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        trainer = SCMTrainer(model, optimizer, _sum_of_outputs, batches, config=config)
        trainer.fit()
        return trainer

    bare, clean = _Ledger().to(setting.device), _Ledger().to(setting.device)
    steps = _accumulated_by_the_reference(bare, spoiled)
    _accumulated_by_the_reference(clean, batches)
    guarded, clean_guarded = trained(spoiled), trained(batches)
    return Found(
        without_guard=_used(bare),
        with_guard=_used(guarded.model),
        clean=_used(clean),
        clean_with_guard=_used(clean_guarded.model),
        clean_change=largest_difference(clean.parameters(), clean_guarded.model.parameters()),
        more={"steps": float(steps), "steps_with_guard": float(guarded.optimizer_steps)},
    )


# --- F3: terms beside the task -------------------------------------------------------------------

_RATIO = 0.25
_PUBLISHED = {"loo": 0.08, "equivariance": 0.03}  # the weights of the published example


def _published_cap(rule: str, loo: float, setting: Setting) -> Cap:
    """What a cap says at the published task loss of 0.17, for one value of the one term that is not 0."""
    task = torch.tensor(0.17, device=setting.device)
    terms = {"loo": _PUBLISHED["loo"] * loo, "equivariance": 0.0}
    weighted = {name: torch.full_like(task, value) for name, value in terms.items()}
    return meta_loss_cap(task, weighted, _RATIO, rule=rule, weights=_PUBLISHED)


@dataclass(frozen=True, slots=True)
class _Conflict:
    """A training beside a term of random labels: its accuracy, that term's largest late share, weights."""

    accuracy: float
    share: float
    weights: list[Tensor]


def _conflict(setting: Setting, rule: str | None, scale: float, steps: int = 120) -> _Conflict:
    rows = setting.normal(256, 8)
    labels = (rows @ setting.normal(8, stream="classes") > 0).long()
    noise = (setting.normal(256, stream="noise") > 0).long()
    model = setting.make(lambda: nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2)))
    weights = list(model.parameters())
    optimizer = torch.optim.Adam(weights, lr=1e-2)
    share = 0.0
    for step in range(steps):
        scores = model(rows)
        task = functional.cross_entropy(scores, labels)
        beside = 0.11 * scale * functional.cross_entropy(scores, noise)
        own = torch.autograd.grad(task, weights, retain_graph=True)
        other = torch.autograd.grad(beside, weights)
        cap: Cap | None = None
        if rule == "gradient":
            norms = [nn.utils.get_total_norm(list(part)) for part in (own, other)]
            cap = gradient_cap(norms[0], norms[1], _RATIO)
        elif rule is not None:
            cap = meta_loss_cap(task, {"noise": beside}, _RATIO, rule=rule, weights={"noise": 0.11})
        factor = torch.ones_like(task) if cap is None else cap.factor
        if step >= steps // 2:
            after = _number(factor * beside)
            share = max(share, after / (_number(task) + after))
        for weight, a, b in zip(weights, own, other, strict=True):
            weight.grad = a + factor * b
        optimizer.step()
    accuracy = float((model(rows).argmax(1) == labels).float().mean())
    return _Conflict(accuracy, share, weights)


def loud_terms(setting: Setting) -> Found:
    """F3: the published 40.9 %, what each rule makes of it, and a training in which it matters."""
    published = {rule: _published_cap(rule, 1.4706, setting) for rule in ("loss", "reference")}
    louder = {rule: _published_cap(rule, 10.0, setting) for rule in ("loss", "reference")}
    runs = {rule: _conflict(setting, rule, 10.0) for rule in (None, "reference", "loss", "gradient")}
    clean, guarded = (_conflict(setting, rule, 1e-3) for rule in (None, "loss"))
    return Found(
        without_guard=float(published["loss"].share_before),
        reference_rule=float(published["reference"].share_after),
        with_guard=float(published["loss"].share_after),
        clean=clean.share,
        clean_with_guard=guarded.share,
        clean_change=largest_difference(clean.weights, guarded.weights),
        more={
            "share_at_loss_10": float(louder["loss"].share_before),
            "share_at_loss_10_reference": float(louder["reference"].share_after),
            "share_at_loss_10_with_guard": float(louder["loss"].share_after),
            "accuracy": runs[None].accuracy,
            "accuracy_reference": runs["reference"].accuracy,
            "accuracy_with_guard": runs["loss"].accuracy,
            "accuracy_gradient_currency": runs["gradient"].accuracy,
            "trained_share": runs[None].share,
            "trained_share_reference": runs["reference"].share,
            "trained_share_with_guard": runs["loss"].share,
        },
    )


# --- F4: equivariance that is always 0 -----------------------------------------------------------


def _all_orientations(features: Tensor) -> Tensor:
    """The published pool: a global mean, averaged over the eight orientations."""
    return torch.stack([global_context(item.apply(features)) for item in D4.values()]).mean(dim=0)


def inert_equivariance(features: Tensor, context: Callable[[Tensor], Tensor]) -> Tensor:
    """The published use: transforms of feature maps, pooled to contexts that are compared."""
    views = {
        name: {"context": context(item.apply(features))} for name, item in D4.items() if name != "identity"
    }
    return AugmentationEquivarianceLoss()({"context": context(features)}, views).loss


def _is_called_degenerate(term: Callable[[], Tensor]) -> float:
    """Whether the detector of idle terms tells one after five steps in which all else costs 1."""
    detector = DegenerateTermDetector(patience=5)
    for _ in range(5):
        value = term()
        detector.observe("term", value, 1.0 + value.detach())
    return float("term" in detector.findings())


class _CellByCell(nn.Module):
    """Scores of three classes at each cell; `reach` 1 sees the cell alone, which no orientation changes."""

    def __init__(self, reach: int) -> None:
        super().__init__()
        self.encode = nn.Conv2d(1, 8, reach, padding="same")
        self.score = nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.score(torch.relu(self.encode(x)))
        return scores


def _train_cells(setting: Setting, weight: float, steps: int = 30) -> tuple[float, list[Tensor]]:
    """Train a model that no orientation can confuse, perhaps with the term; return task loss and weights."""
    model = setting.make(lambda: _CellByCell(1))
    grids = setting.normal(16, 1, 6, 6)
    classes = (grids[:, 0] > 0.5).long() + (grids[:, 0] > -0.5).long()
    term = OutputEquivarianceLoss(D4, views=2, generator=generator(setting.seed, "views"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    task = torch.zeros(())
    for _ in range(steps):
        scores = model(grids)
        task = functional.cross_entropy(scores, classes)
        loss = task + weight * term(model, grids, scores).loss if weight else task
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return _number(task), list(model.parameters())


def pooled_away(setting: Setting) -> Found:
    """F4: what a global mean leaves of orientation, and three ways that leave more."""
    model = setting.make(lambda: _CellByCell(3))
    grids = setting.normal(16, 1, 6, 6)
    features = torch.relu(model.encode(grids))

    def encoded_again() -> Tensor:
        views = {
            name: {"context": global_context(torch.relu(model.encode(item.apply(grids))))}
            for name, item in D4.items()
            if name != "identity"
        }
        return AugmentationEquivarianceLoss()({"context": global_context(features)}, views).loss

    def of_outputs() -> Tensor:
        names = [name for name in D4 if name != "identity"]
        return OutputEquivarianceLoss(D4)(model, grids, names=names).loss

    (clean, weights), (guarded, guarded_weights) = (_train_cells(setting, weight) for weight in (0.0, 1.0))
    return Found(
        without_guard=_number(inert_equivariance(features, _all_orientations)),
        reference_rule=_number(inert_equivariance(features, global_context)),
        with_guard=_number(of_outputs()),
        clean=clean,
        clean_with_guard=guarded,
        clean_change=largest_difference(weights, guarded_weights),
        more={
            "inputs_encoded_again": _number(encoded_again()),
            "positional_pool": _number(inert_equivariance(features, positional_context)),
            "reference_called_degenerate": _is_called_degenerate(
                lambda: inert_equivariance(features, global_context)
            ),
            "outputs_called_degenerate": _is_called_degenerate(of_outputs),
        },
    )


# --- F5: clue counts that are all alike ----------------------------------------------------------

_CLUES = 6
_STOP_TERMS: dict[str, Any] = {
    "min_clues": 1.0,
    "ponder_weight": 0.02,
    "min_clue_weight": 5.0,
    "entropy_ponder_weight": 0.02,
}


@dataclass(slots=True)
class _StopHead:
    """A linear stop head on fixed features: stop logits (B, K), and the expected clue count of each row."""

    features: Tensor
    weight: Tensor
    bias: Tensor

    @classmethod
    def make(cls, setting: Setting, *, mean: float, deviation: float) -> _StopHead:
        """A head that uses `mean` clues on average, with this standard deviation between rows."""
        features = setting.normal(64, 8, stream="features")
        weight = 0.05 * setting.normal(8, _CLUES, stream="head")
        bias = torch.full((_CLUES,), math.log((_CLUES - mean) / mean), device=setting.device)
        head = cls(features, weight, bias)
        for _ in range(30 if deviation else 0):
            head.weight = head.weight * (deviation / head.counts().std())
        if not deviation:
            head.weight = torch.zeros_like(weight)
        head.weight.requires_grad_()
        head.bias.requires_grad_()
        return head

    def logits(self) -> Tensor:
        return self.features @ self.weight + self.bias

    def counts(self) -> Tensor:
        return (1.0 - self.logits().sigmoid()).sum(1)


def _train_stop_head(
    head: _StopHead, loss: Callable[[_StopHead], Tensor], steps: int = 200
) -> tuple[list[float], float]:
    """Train; return the deviation of the counts after each step, and the first step's largest gradient."""
    optimizer = torch.optim.Adam([head.weight, head.bias], lr=1e-2)
    trace, first = [], math.nan
    for step in range(steps):
        optimizer.zero_grad()
        loss(head).backward()
        assert head.weight.grad is not None
        first = float(head.weight.grad.abs().max()) if step == 0 else first
        optimizer.step()
        counts = head.counts().detach()
        trace.append(float(counts.std()) if len(counts) > 1 else math.nan)
    return trace, first


def _wired(weight: float, form: str = "pairwise") -> Callable[[_StopHead], Tensor]:
    """All stop terms, as ours adds them up."""
    terms = SparsityRegularization(**_STOP_TERMS, variance_weight=weight, variance_form=form)
    return lambda head: terms(head.logits()).total


def _wired_as_published(weight: float) -> Callable[[_StopHead], Tensor]:
    """The scalar that is returned where samples are asked for apart: variance and saturation are dropped."""
    terms = SparsityRegularization(**_STOP_TERMS, variance_weight=weight)

    def loss(head: _StopHead) -> Tensor:
        found = terms(head.logits())
        return found.base_pondering + found.entropy_pondering + found.per_sample.mean()

    return loss


def collapsed_counts(setting: Setting) -> Found:
    """F5: a stop head whose rows all use nearly the same number of clues."""

    def train(loss: Callable[[_StopHead], Tensor]) -> tuple[_StopHead, list[float]]:
        head = _StopHead.make(setting, mean=1.16, deviation=0.07)
        return head, _train_stop_head(head, loss)[0]

    (_, plain), (_, published) = train(_wired(0.0)), train(_wired_as_published(1.0))
    head, guarded = train(_wired(1.0))
    healthy = []
    for weight in (0.0, 1.0):
        one = _StopHead.make(setting, mean=3.0, deviation=1.0)
        healthy.append((_train_stop_head(one, _wired(weight), steps=50)[0][-1], [one.weight, one.bias]))
    difficulty = setting.normal(64, stream="difficulty")
    return Found(
        without_guard=plain[-1],
        reference_rule=published[-1],
        with_guard=guarded[-1],
        clean=healthy[0][0],
        clean_with_guard=healthy[1][0],
        clean_change=largest_difference(healthy[0][1], healthy[1][1]),
        more={
            "steps_to_0.5": float(next((i for i, std in enumerate(guarded, 1) if std >= 0.5), math.inf)),
            "mean_count": _number(head.counts().mean()),
            "correlation_with_difficulty": float(relevance(head.counts(), difficulty)),
        },
    )


def exact_collapse(setting: Setting) -> Found:
    """F5b: rows that are exactly alike, and a batch of one row."""

    def train(form: str) -> tuple[list[float], float]:
        head = _StopHead.make(setting, mean=1.16, deviation=0.0)
        return _train_stop_head(head, lambda head: spread_loss(head.counts(), form=form))

    (hinge, first), (pairwise, first_guarded) = train("hinge"), train("pairwise")
    single = torch.tensor([[0.5, -0.5]], device=setting.device)
    count = (1.0 - single.sigmoid()).sum(1)
    deviation = ((count - count.mean()).square().sum() / (len(count) - 1)).sqrt()
    alone = SparsityRegularization(**_STOP_TERMS, variance_weight=1.0)(single).total
    healthy = []
    for weight in (0.0, 1.0):
        one = _StopHead.make(setting, mean=3.0, deviation=1.0)
        one.features = one.features[:1]
        _train_stop_head(one, _wired(weight), steps=20)
        healthy.append((_number(one.counts().mean()), [one.weight, one.bias]))
    return Found(
        without_guard=hinge[-1],
        with_guard=pairwise[-1],
        clean=healthy[0][0],
        clean_with_guard=healthy[1][0],
        clean_change=largest_difference(healthy[0][1], healthy[1][1]),
        more={
            "first_gradient": first,
            "first_gradient_with_guard": first_guarded,
            "one_row": float(torch.relu(0.5 - deviation)),
            "one_row_with_guard": float(alone),
        },
    )


# --- F6: gates that are sure ---------------------------------------------------------------------


def _raw(z: Tensor) -> Tensor:
    return z


def _squashed(z: Tensor) -> Tensor:
    return 6.0 * torch.tanh(z / 6.0)


def _train_gate(
    start: Tensor,
    squash: Callable[[Tensor], Tensor],
    penalise: Callable[[Tensor], Tensor],
    weight: float,
    *,
    learning_rate: float = 0.5,
    steps: int = 600,
) -> tuple[float, Tensor]:
    """Train gates towards the opposite of their signs; return the task's loss and what they became."""
    z = start.clone().requires_grad_()
    wanted = (start < 0).to(start.dtype)
    optimizer = torch.optim.Adam([z], lr=learning_rate)
    for _ in range(steps):
        task = (squash(z).sigmoid() - wanted).square().mean()
        loss = task + weight * saturation_penalty(penalise(z), 5.0) if weight else task
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    task = (squash(z).sigmoid() - wanted).square().mean()
    return _number(task), z.detach()


def saturated_gates(setting: Setting) -> Found:
    """F6: stop logits where a sigmoid has no slope left, and a penalty before and behind a squash."""
    start = torch.tensor([-90.0, 80.0, -90.0, 80.0], device=setting.device)
    stuck, z = _train_gate(start, _raw, _raw, 0.0)
    recovered, guarded = _train_gate(start, _raw, _raw, 0.5)
    ordinary = 0.5 * start.sign()
    clean = [_train_gate(ordinary, _raw, _raw, weight, learning_rate=0.05, steps=60) for weight in (0.0, 0.5)]
    return Found(
        without_guard=stuck,
        reference_rule=_train_gate(start, _squashed, _squashed, 0.5)[0],
        with_guard=recovered,
        clean=clean[0][0],
        clean_with_guard=clean[1][0],
        clean_change=largest_difference([clean[0][1]], [clean[1][1]]),
        more={
            "largest_logit": float(z.abs().max()),
            "largest_logit_with_guard": float(guarded.abs().max()),
            "penalty_before_the_squash": _train_gate(start, _squashed, _raw, 0.5)[0],
        },
    )


# --- F7: training compared with what is held out -------------------------------------------------


class _Attends(nn.Module):
    """Attend to one of nine cells, with Gumbel noise in training mode, at a temperature."""

    def __init__(self, temperature: float, noise: float) -> None:
        super().__init__()
        self.temperature = temperature
        self.noise = noise
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.value = nn.Linear(9, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        scores = self.scale * x
        if self.training and self.noise:
            scores = scores - self.noise * torch.empty_like(scores).exponential_().log()
        attention = (scores / self.temperature).softmax(dim=-1)
        P, Q = self.value(attention * x).unbind(-1)
        return P, Q, {"attention": attention.view(-1, 1, 3, 3)}


def _largest_of_nine(setting: Setting, stream: str, rows: int = 256) -> TensorBatches:
    x = torch.rand((rows, 9), generator=generator(setting.seed, stream)).to(setting.device)
    targets = lift_semantic_targets(x.amax(1), torch.zeros(rows, dtype=torch.int64, device=x.device))
    return TensorBatches(x, targets, 32, generator=generator(setting.seed, "order"))


def _fit_of_pairs(outputs: Any, lifted: tuple[Tensor, Tensor]) -> Tensor:
    return (outputs[0] - lifted[0]).square().mean() + (outputs[1] - 1.0).square().mean()


def _train_attention(
    setting: Setting, temperature: float, noise: float, *, watch: bool = True
) -> tuple[SCMTrainer, float]:
    """Train for two epochs; return the trainer and the ratio of entropies, held-out mode to training mode."""
    model = setting.make(lambda: _Attends(temperature, noise))
    train, held_out = _largest_of_nine(setting, "train"), _largest_of_nine(setting, "held out")
    watching = [GapWatch(model, train, held_out)] if watch else []
    trainer = _guarded(model, _fit_of_pairs, train, setting, companions=watching, max_epochs=2)
    entropies = []
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(setting.seed)
        for training in (False, True):
            model.train(training)
            attention = model(train.inputs)[2]["attention"]
            entropies.append(float(normalised_entropy(attention, axes=2).mean()))
    return trainer, entropies[0] / entropies[1]


def noise_in_training_mode(setting: Setting) -> Found:
    """F7: attention that is sampled in training and not when it is asked."""
    temperatures = (1.0, 0.5, 0.1, 0.05)
    noisy = {t: _train_attention(setting, t, 1.0) for t in temperatures}
    quiet = {t: _train_attention(setting, t, 0.0) for t in temperatures}
    unwatched, ratio = _train_attention(setting, 0.1, 0.0, watch=False)
    watched = quiet[0.1][0]
    return Found(
        without_guard=noisy[0.1][1],
        with_guard=quiet[0.1][1],
        clean=ratio,
        clean_with_guard=quiet[0.1][1],
        clean_change=largest_difference(unwatched.model.parameters(), watched.model.parameters()),
        more={
            **{f"ratio_at_temperature_{t:g}": found[1] for t, found in noisy.items()},
            "largest_ratio_without_noise": max(found[1] for found in quiet.values()),
            "gap_entropy_mode": noisy[0.1][0].telemetry()["gap_entropy_mode"],
            "gap_entropy_mode_without_noise": watched.telemetry()["gap_entropy_mode"],
        },
    )


def _reference_entropy(weights: Tensor) -> Tensor:
    """The published measure: every weight counts as 1e-6 at least."""
    kept = weights.clamp(min=1e-6)
    return -(kept * kept.log()).sum()


def sharp_on_two_canvases(setting: Setting) -> Found:
    """F7b: the same attention, on all of one cell, on canvases of two sizes; and an ordinary one."""
    sharp = {side: torch.zeros(side, side, device=setting.device) for side in (3, 10, 30)}
    for canvas in sharp.values():
        canvas[1, 1] = 1.0
    ordinary = setting.normal(100).softmax(-1)
    published = {side: float(_reference_entropy(canvas)) for side, canvas in sharp.items()}
    ours = {side: float(normalised_entropy(canvas, axes=2)) for side, canvas in sharp.items()}
    clean = float(_reference_entropy(ordinary)) / math.log(100)
    guarded = float(normalised_entropy(ordinary))
    return Found(
        without_guard=published[30] / published[10],
        with_guard=ours[30] - ours[10],
        clean=clean,
        clean_with_guard=guarded,
        clean_change=abs(clean - guarded),
        more={"ratio_30_to_3": published[30] / published[3], "difference_30_to_3": ours[30] - ours[3]},
    )


# --- F8: weights of classes ----------------------------------------------------------------------


def _class_weights(law: str, counts: Sequence[int], setting: Setting) -> Tensor:
    return CLASS_WEIGHTINGS[law](torch.tensor(counts, device=setting.device).float(), 2.0, 5.0, 0.1)


def _learn_balanced_classes(setting: Setting, law: str) -> float:
    """Train a linear classifier of ten equally frequent classes; return its accuracy on held-out rows."""
    labels = torch.arange(1200, device=setting.device) % 10
    rows = torch.eye(10, device=setting.device)[labels] + 0.2 * setting.normal(1200, 10)
    model = setting.make(lambda: nn.Linear(10, 10))
    loss = WeightedStablemaxLoss(2.0, 5.0, class_weighting=law, logit_clamp_max=None)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(100):
        optimizer.zero_grad()
        loss(model(rows[:1000]), labels[:1000]).backward()
        optimizer.step()
    with torch.no_grad():
        return float((model(rows[1000:]).argmax(1) == labels[1000:]).float().mean())


def weights_of_classes(setting: Setting) -> Found:
    """F8: one pixel more of nine equal colours, and colours that are not there."""
    before, after = [0, *[10] * 9], [0, 11, *[10] * 8]
    absent = [80, 15, 5, *[0] * 7]
    jumps, sparse = {}, {}
    for law in CLASS_WEIGHTINGS:
        ratio = _class_weights(law, after, setting)[1:] / _class_weights(law, before, setting)[1:]
        jumps[law] = float(ratio.log().abs().max().exp())
        sparse[law] = _class_weights(law, absent, setting).tolist()
    clean, guarded = (_learn_balanced_classes(setting, law) for law in ("reference", "smooth"))
    return Found(
        without_guard=jumps["reference"],
        with_guard=jumps["smooth"],
        clean=clean,
        clean_with_guard=guarded,
        clean_change=abs(clean - guarded),
        more={
            "background": sparse["reference"][0],
            "rarest_present": sparse["reference"][2],
            "background_with_guard": sparse["smooth"][0],
            "rarest_present_with_guard": sparse["smooth"][2],
        },
    )


# --- F9: monitors behind a clamp -----------------------------------------------------------------


class _Scaled(nn.Module):
    """A large or small multiple of a bent line."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.line = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * torch.tanh(self.line(x)).squeeze(-1)


def _monitored(setting: Setting, scale: float, *, guard: bool) -> tuple[SCMTrainer, float]:
    """Train one epoch with a bound of 1; return the trainer, and what a monitor within the loss saw."""
    seen = 0.0

    def loss(outputs: Tensor, lifted: tuple[Tensor, Tensor]) -> Tensor:
        nonlocal seen
        seen = max(seen, float(outputs.detach().abs().max()))
        return (outputs - lifted[0]).square().mean()

    rows = setting.normal(256, 4)
    labels = 0.1 * rows[:, 0].tanh()
    batches = list(zip(rows.split(32), labels.split(32), strict=True))
    watching = [RangeGuard(1.0, "soft")] if guard else []
    model = setting.make(lambda: _Scaled(scale))
    return _guarded(model, loss, batches, setting, companions=watching), seen


def monitor_behind_a_clamp(setting: Setting) -> Found:
    """F9: the same training watched behind the bound and before it."""
    trainer, behind = _monitored(setting, 100.0, guard=True)
    clean, clean_seen = _monitored(setting, 0.4, guard=False)  # below the knee of the bound
    guarded, _ = _monitored(setting, 0.4, guard=True)
    return Found(
        without_guard=behind,
        with_guard=trainer.telemetry()["range_max_abs"],
        clean=clean_seen,
        clean_with_guard=guarded.telemetry()["range_max_abs"],
        clean_change=largest_difference(clean.model.parameters(), guarded.model.parameters()),
        more={"share_of_values_beyond": trainer.telemetry()["range_over_share"]},
    )


# --- F10: agreement of a model that always says the same -----------------------------------------

_GOOD = 0.5  # the published share of votes from which consensus is called good


def _views(answer: Callable[[Tensor], Tensor], grids: Tensor) -> list[list[Tensor]]:
    """What a model answers to the eight orientations of each grid, turned back."""
    views = [item.undo(answer(item.apply(grids))) for item in D4.values()]
    return [[view[row] for view in views] for row in range(len(grids))]


def _published_health(rows: Iterable[Sequence[Tensor]], gap: float) -> tuple[float, float]:
    """The published verdict, from the mean share of votes and the gap alone; and that share."""
    shares = []
    for answers in rows:
        keys = [answer.numpy(force=True).tobytes() for answer in answers]
        shares.append(max(keys.count(key) for key in keys) / len(keys))
    share = sum(shares) / len(shares)
    return float(share >= _GOOD and gap <= 0.1), share


def _health(rows: Iterable[Sequence[Tensor]], train: Measured, held_out: Measured) -> tuple[float, Any]:
    """Our verdict: agreement and gap count where answers differ."""
    agreed = consensus(rows)
    alerts = GapMonitor().add(train, held_out)
    return float(agreed.level == "good" and not alerts), agreed


def constant_predictor(setting: Setting) -> Found:
    """F10: colour 0 everywhere, on 50 grids; and a model that copies, which is right."""
    grids = (3.0 * setting.normal(50, 5, 5)).abs().long().clamp(max=9)
    answers: dict[str, Callable[[Tensor], Tensor]] = {"constant": torch.zeros_like, "copies": torch.clone}
    verdicts: dict[str, tuple[float, float, float, Any]] = {}
    for name, answer in answers.items():
        rows = _views(answer, grids)
        given = answer(grids)
        right = float((given == grids).all(dim=(1, 2)).float().mean())
        side = Measured(score=right, distinct=float(len(given.unique(dim=0))))
        published, share = _published_health(rows, gap=0.0)
        ours, agreed = _health(rows, side, side)
        verdicts[name] = published, ours, share, agreed
    constant, copies = verdicts["constant"], verdicts["copies"]
    return Found(
        without_guard=constant[0],
        with_guard=constant[1],
        clean=copies[0],
        clean_with_guard=copies[1],
        clean_change=abs(copies[2] - copies[3].share),
        more={
            "share_of_votes": constant[3].share,
            "exact_match": float((torch.zeros_like(grids) == grids).all(dim=(1, 2)).float().mean()),
            "different_answers_of_50": float(constant[3].distinct),
        },
    )


# --- all of them ---------------------------------------------------------------------------------

_TOLERATED = Target("clean_change", "<=", 1e-6)  # another formula of the same number
_LEARNED = Target("with_guard", ">=", -0.02, beside="clean")
_LOST = (Target("without_guard", "<=", 0.35), Target("lost_weights", ">", 0.0))
_KEPT = (_LEARNED, Target("lost_weights_with_guard", "==", 0.0), Target("left_out_with_guard", "==", 5.0))

FAILURES: tuple[Case, ...] = (
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
        targets=(Target("without_guard", "==", 3.0), Target("with_guard", "==", 0.0), _TOLERATED),
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
        targets=(Target("without_guard", "==", 3.0), Target("with_guard", "==", 0.0), _TOLERATED),
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
    Case(
        id="F2",
        trigger="five batches of 64 with a row of NaN or infinities",
        mechanism="one step on a gradient that is not finite, and every weight is NaN",
        measure="accuracy on held-out rows",
        unit="share of rows",
        guard="SCMTrainer: loss and gradients are looked at before a step",
        run=poisoned_batches,
        targets=(*_LOST, *_KEPT, UNCHANGED),
    ),
    Case(
        id="F2b",
        trigger="F2, with logits that are not finite replaced by 0, and a check of the loss",
        mechanism="the loss is finite, the gradient is not: the check passes over nothing",
        measure="accuracy on held-out rows",
        unit="share of rows",
        guard="SCMTrainer, which looks at gradients, and at outputs as the model gave them",
        run=sanitised_logits,
        targets=(
            Target("passed_over", "==", 0.0),
            *_LOST,
            *_KEPT,
            Target("raw_outputs_seen", "==", 5.0),
            UNCHANGED,
        ),
    ),
    Case(
        id="F2c",
        trigger="five batches of 64 with a row of zeros under a root, and a check of the loss",
        mechanism="the root has a value at 0 and no slope; the check sees only the batches after the damage",
        measure="accuracy on held-out rows",
        unit="share of rows",
        guard="SCMTrainer, which looks at gradients",
        run=backward_only,
        targets=(Target("passed_over", "==", 58.0), *_LOST, *_KEPT, UNCHANGED),
    ),
    Case(
        id="F2d",
        trigger="five bad micro-batches of 70, seven to a step",
        mechanism="a bad one clears what its window had gathered, and the window ends where it would have",
        measure="good micro-batches that moved a weight",
        unit="of 65",
        guard="SCMTrainer(finite_action='skip_micro_batch')",
        clean_measure="of 70 good ones",
        run=accumulated,
        targets=(
            Target("without_guard", "==", 43.0),
            Target("with_guard", "==", 65.0),
            Target("steps_with_guard", "==", 10.0),
            UNCHANGED,
        ),
    ),
    Case(
        id="F3",
        trigger="task loss 0.17 beside 0.08 times 1.4706; a training beside random labels, ten times as loud",
        mechanism="terms beside the task outweigh it",
        measure="share of the terms beside the task",
        unit="",
        guard="meta_loss_cap at 0.25, of values",
        reference="a cap at 0.25 that compares weights with a loss",
        run=loud_terms,
        targets=(
            Target("without_guard", ">=", 0.4),
            Target("share_at_loss_10_reference", ">=", 0.5),
            Target("accuracy_reference", "==", 0.0, beside="accuracy"),
            Target("with_guard", "<=", 0.250001),
            Target("share_at_loss_10_with_guard", "<=", 0.250001),
            Target("trained_share_with_guard", "<=", 0.250001),
            Target("accuracy_with_guard", ">=", 0.03, beside="accuracy"),
            UNCHANGED,
        ),
    ),
    Case(
        id="F4",
        trigger="feature maps are turned and pooled, and the contexts compared",
        mechanism="a global mean is the same in every orientation: the term is 0 whatever is learned",
        measure="the equivariance term of an untrained model",
        unit="",
        guard="OutputEquivarianceLoss: inputs are turned, outputs turned back",
        reference="pool_context_simple: no mean over orientations, but still a global mean over cells",
        clean_measure="task loss of a model that no orientation confuses",
        run=pooled_away,
        targets=(
            Target("without_guard", "<=", 1e-6),
            Target("reference_rule", "<=", 1e-6),
            Target("reference_called_degenerate", "==", 1.0),
            Target("with_guard", ">=", 1e-3),
            Target("inputs_encoded_again", ">=", 1e-3),
            Target("positional_pool", ">=", 1e-3),
            Target("outputs_called_degenerate", "==", 0.0),
            _TOLERATED,
        ),
    ),
    Case(
        id="F5",
        trigger="a stop head of mean count 1.16 and deviation 0.07; 200 steps",
        mechanism="nothing in the loss asks for counts that differ",
        measure="deviation of the clue count",
        unit="clues",
        guard="SparsityRegularization(variance_weight=1), pairwise",
        reference="the same weight, in a total that drops the term",
        run=collapsed_counts,
        targets=(
            Target("without_guard", "<=", 0.1),
            Target("reference_rule", "==", 0.0, beside="without_guard"),
            Target("with_guard", ">=", 0.45),  # the term asks for 0.5, and leaves off there
            Target("steps_to_0.5", "<=", 50.0),
            UNCHANGED,
        ),
    ),
    Case(
        id="F5b",
        trigger="rows that are exactly alike, for 200 steps; a batch of one row",
        mechanism="a deviation has no slope at 0, and none at all for one row",
        measure="deviation of the clue count",
        unit="clues",
        guard="the pairwise form; no term for one row",
        clean_measure="clue count of a batch of one row, trained",
        run=exact_collapse,
        targets=(
            Target("without_guard", "==", 0.0),
            Target("first_gradient", "==", 0.0),
            Target("one_row", "is nan"),
            Target("with_guard", ">=", 0.5),
            Target("one_row_with_guard", "<=", 1.0),
            UNCHANGED,
        ),
    ),
    Case(
        id="F6",
        trigger="stop logits of -90 and 80 that should be the opposite; 600 steps",
        mechanism="a sigmoid has no slope there, in float32 exactly none",
        measure="task loss",
        unit="",
        guard="saturation_penalty of the raw logits",
        reference="the penalty behind a squash 6 tanh(z / 6), which never leaves it",
        run=saturated_gates,
        targets=(
            Target("without_guard", ">=", 0.9),
            Target("reference_rule", ">=", 0.9),
            Target("with_guard", "<=", 0.01),
            Target("penalty_before_the_squash", "<=", 0.01),
            UNCHANGED,
        ),
    ),
    Case(
        id="F7",
        trigger="Gumbel noise on attention in training mode alone, temperature 0.1",
        mechanism="attention is sampled in training and not when it is asked",
        measure="entropy in eval mode / in training mode",
        unit="",
        guard="no noise; GapWatch names the part that the mode makes (gap_entropy_mode)",
        run=noise_in_training_mode,
        targets=(
            Target("without_guard", ">=", 2.0),
            Target("gap_entropy_mode", ">=", 0.1),
            Target("with_guard", "==", 1.0),
            Target("largest_ratio_without_noise", "==", 1.0),
            Target("gap_entropy_mode_without_noise", "==", 0.0),
            UNCHANGED,
        ),
    ),
    Case(
        id="F7b",
        trigger="attention on one cell alone, on canvases of 10x10 and 30x30",
        mechanism="an entropy of weights of 1e-6 at least grows with the canvas: the gap is the measure's",
        measure="ratio without the guard, difference with it",
        unit="",
        guard="normalised_entropy, compared as a difference",
        clean_measure="normalised entropy of ordinary attention",
        run=sharp_on_two_canvases,
        targets=(
            Target("without_guard", ">=", 9.0),
            Target("with_guard", "==", 0.0),
            Target("difference_30_to_3", "==", 0.0),
            _TOLERATED,
        ),
    ),
    Case(
        id="F8",
        trigger="one pixel more of one of nine equal colours; colours that are absent",
        mechanism="weights are stretched between the rarest and the commonest class, absent ones included",
        measure="largest factor by which a class weight changes",
        unit="",
        guard="class_weighting='smooth'",
        clean_measure="accuracy on balanced classes",
        run=weights_of_classes,
        targets=(
            Target("without_guard", ">=", 2.5),
            Target("rarest_present", "<", 0.0, beside="background"),
            Target("with_guard", "<=", 1.1),
            Target("rarest_present_with_guard", ">", 0.0, beside="background_with_guard"),
            Target("clean_change", "<=", 0.01),
        ),
    ),
    Case(
        id="F9",
        trigger="outputs of about 100, bounded to 1 for the loss, and a monitor",
        mechanism="a monitor behind a bound sees the bound",
        measure="largest value that the monitor saw",
        unit="",
        guard="RangeGuard, which measures before it bounds",
        run=monitor_behind_a_clamp,
        targets=(
            Target("without_guard", "<=", 1.0),
            Target("with_guard", ">=", 10.0),
            UNCHANGED,
        ),
    ),
    Case(
        id="F10",
        trigger="a model that answers colour 0 to each of 50 grids",
        mechanism="one answer agrees with itself in every view, and has no gap",
        measure="called healthy",
        unit="1 or 0",
        guard="consensus and GapMonitor, which trust nothing where all answers are alike",
        run=constant_predictor,
        targets=(
            Target("without_guard", "==", 1.0),
            Target("share_of_votes", "==", 1.0),
            Target("exact_match", "==", 0.0),
            Target("with_guard", "==", 0.0),
            Target("clean_with_guard", "==", 1.0),
            UNCHANGED,
        ),
    ),
)
