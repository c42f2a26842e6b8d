"""The weight of the coverage term as a multiplier that follows the coverage: by itself, and in a training.

Coverage below the target raises the multiplier, coverage above it lowers it: by how much, and when, is
decided in `control_rules`. What the multiplier weighs is decided in `scm.losses.coverage`; how coverage is
counted over time, in `scm.training.coverage`.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from scm.guards.gates import RAW_OUTPUTS
from scm.losses.coverage import check_share, ranked_coverage_loss
from scm.losses.quotient import BASES, quotient_loss
from scm.losses.rowwise import bool_mask, weights_of_rows
from scm.training.control_rules import RULES, ControlSettings, ControlState, Number, pick, share_of
from scm.training.coverage import Answers, CoverageTracker, TagCounts, count_bottoms, count_tags
from scm.training.records import split_outputs
from scm.training.tag_loss import adaptive_tag_weight

if TYPE_CHECKING:
    from scm.training.companion import Moment
    from scm.training.targets import SemanticTargets


@dataclass(frozen=True, kw_only=True)
class AdaptiveLossConfig:
    """What `AdaptiveLambda` is told; checked when built. Where None is the default, it is the rule's own.

    rule: "reference" is the recorded controller; "unbiased" ascends on the multiplier as an optimizer would.
    Choose "unbiased": the reference's halves steps up and doubles steps down, so that coverage which is right
    on average but noisy drives it to its floor, where it no longer controls anything, and its dead band lets
    coverage settle below the target. Choose "reference" to compare with recorded runs. See `RULES`.

    initial_lambda, target_coverage, learning_rate: where the multiplier begins, what it is after, and by how
    much of the gap it moves at a step. lambda_min and lambda_rej_min: floors, the higher one holds (0.1 each;
    unbiased: 0). lambda_max: the cap, None for none; one below a floor wins.
    momentum: in [0, 1), of past updates. warmup_steps: first batches that change nothing. update_frequency:
    every so many batches the multiplier is updated; by the last batch alone under "reference", by all batches
    since the last update under "unbiased". exponential_decay: in (0, 1], of the learning rate a batch.
    dead_band: gaps that are smaller change nothing (0.02; unbiased: 0). rate_up, rate_down: factors of steps
    up and down (0.5 and 2; unbiased: 1 and 1, and must be equal). cumulative_steps: so many first batches are
    judged by all coverage so far instead of by their own (2; not of "unbiased"). history_size: how many
    entries of each history are kept.

    use_tag_loss, tag_loss_weight, tag_loss_adaptive, tag_loss_max_weight: what `get_tag_loss_weight` says.

    Raises TypeError for a value of another type, ValueError for one out of range.

    Differs from zeroproof 0.1.0, which checks no field but the target; dead band, factors and the cumulative
    batches are constants there, and histories grow with the training.
    """

    initial_lambda: float = 1.0
    target_coverage: float = 0.95
    learning_rate: float = 0.01
    lambda_min: float | None = None
    lambda_max: float | None = None
    lambda_rej_min: float | None = None
    momentum: float = 0.0
    warmup_steps: int = 0
    update_frequency: int = 1
    exponential_decay: float | None = None
    use_tag_loss: bool = False
    tag_loss_weight: float = 0.05
    tag_loss_adaptive: bool = True
    tag_loss_max_weight: float = 0.2
    rule: str = "reference"
    dead_band: float | None = None
    rate_up: float | None = None
    rate_down: float | None = None
    cumulative_steps: int | None = None
    history_size: int = 1000

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise ValueError(f"rule must be one of {', '.join(RULES)}, got rule={self.rule!r}")
        for name, own in RULES[self.rule].defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, own)
        for name in ("initial_lambda", "learning_rate", "lambda_min", "lambda_rej_min", "dead_band"):
            _check_number(name, getattr(self, name))
        for name in ("rate_up", "rate_down", "tag_loss_weight", "tag_loss_max_weight"):
            _check_number(name, getattr(self, name))
        if self.lambda_max is not None:
            _check_number("lambda_max", self.lambda_max)
        _check_number("momentum", self.momentum, rule="in [0, 1)", holds=lambda x: 0 <= x < 1)
        if self.exponential_decay is not None:
            decay = self.exponential_decay
            _check_number("exponential_decay", decay, rule="in (0, 1]", holds=lambda x: 0 < x <= 1)
        _check_number("target_coverage", self.target_coverage, rule="in [0, 1]", holds=lambda x: 0 <= x <= 1)
        for name, least in (
            ("warmup_steps", 0),
            ("update_frequency", 1),
            ("cumulative_steps", 0),
            ("history_size", 1),
        ):
            _check_count(name, getattr(self, name), least)
        for name in ("use_tag_loss", "tag_loss_adaptive"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be a bool, got {name}={getattr(self, name)!r}")
        if self.tag_loss_max_weight < self.tag_loss_weight:
            raise ValueError(
                "tag_loss_max_weight must be >= tag_loss_weight, got "
                f"tag_loss_max_weight={self.tag_loss_max_weight!r}, tag_loss_weight={self.tag_loss_weight!r}"
            )
        if self.rule == "unbiased" and (self.rate_up != self.rate_down or self.cumulative_steps != 0):
            raise ValueError(
                "rule='unbiased' must have rate_up == rate_down and cumulative_steps == 0, got "
                f"rate_up={self.rate_up!r}, rate_down={self.rate_down!r}, "
                f"cumulative_steps={self.cumulative_steps!r}"
            )

    def settings(self) -> ControlSettings:
        """Return what the pure update reads, as plain numbers."""
        floors = [floor for floor in (self.lambda_min, self.lambda_rej_min) if floor is not None]
        return ControlSettings(
            target=float(self.target_coverage),
            rate=float(self.learning_rate),
            floor=float(max(floors)),
            cap=math.inf if self.lambda_max is None else float(self.lambda_max),
            momentum=float(self.momentum),
            warmup_steps=float(self.warmup_steps),
            update_frequency=float(self.update_frequency),
            decay=1.0 if self.exponential_decay is None else float(self.exponential_decay),
            dead_band=float(self.dead_band or 0.0),
            rate_up=float(self.rate_up or 0.0),
            rate_down=float(self.rate_down or 0.0),
            cumulative_steps=float(self.cumulative_steps or 0),
        )


# --- one controller -------------------------------------------------------------------------------------


class AdaptiveLambda:
    """One multiplier that follows the coverage of the batches that it is told of; see `AdaptiveLossConfig`.

    Fed from the CPU it computes in plain numbers, a few microseconds a batch. Fed from another device it
    stays there: `lambda_rej` is then a 0-d float64 tensor, and the host waits only where statistics,
    histories or the state are read.

    Differs from zeroproof 0.1.0: every setting is checked; histories are bounded and say which batch they are
    of; there is a state for checkpoints.
    """

    def __init__(self, config: AdaptiveLossConfig | None = None) -> None:
        self.config = AdaptiveLossConfig() if config is None else config
        self._settings = self.config.settings()
        self._rule = RULES[self.config.rule].step
        self.tracker = CoverageTracker(self.config.target_coverage)
        self.reset()

    def reset(self) -> None:
        """Begin anew, histories included."""
        self.tracker.reset()
        self._state = ControlState(float(self.config.initial_lambda))
        self.step_count = 0  # batches
        self._coverage: Number = 1.0
        kept = self.config.history_size
        self._lambdas: deque[tuple[int, Number]] = deque([(0, self._state.multiplier)], kept)
        self._coverages: deque[tuple[int, Number]] = deque(maxlen=kept)
        self._updates: deque[tuple[int, Number]] = deque(maxlen=kept)

    @property
    def lambda_rej(self) -> Number:
        """The multiplier; a tensor where it was told from a device other than the CPU."""
        return self._state.multiplier

    def get_penalty(self) -> Number:
        """Return the multiplier."""
        return self.lambda_rej

    def update(self, answers: Answers) -> None:
        """Take one batch into account: tags, which answers are bottom, or counts; never waits for a device.

        With several workers, give each of them the counts of all: `scm.training.coverage.summed_counts`.
        """
        self.update_counts(count_tags(answers))

    def report(self, tags: Tensor) -> None:
        """`update` under the name by which a layer calls the controller that is attached to it."""
        self.update(tags)

    def update_counts(self, counts: TagCounts) -> None:
        """Take one batch into account that was counted already, by `count_tags` or `count_bottoms`."""
        if isinstance(counts, Tensor):
            self._advance(counts[0].to(torch.float64), counts.sum().to(torch.float64))
        else:
            self._advance(float(counts[0]), float(sum(counts)))
        self.tracker.update_counts(counts)

    def observe(self, coverage: Number, answers: Number = 1.0) -> None:
        """Take one batch into account of which the coverage was measured, of so many answers.

        A coverage that is not finite is ignored; one outside of [0, 1] is a ValueError, on the CPU. The
        tracker, which counts whole answers, is not told.
        """
        if isinstance(coverage, Tensor):
            self._advance(coverage.to(torch.float64) * answers, answers, torch.isfinite(coverage))
            return
        heard = math.isfinite(coverage)
        check_share("coverage", coverage if heard else 0.0)
        self._advance(coverage * answers, answers, heard)

    def _advance(self, finite: Number, counted: Number, heard: bool | Tensor = True) -> None:
        before = self._state
        self._state = self._rule(before, finite, counted, self._settings, heard)
        self.step_count += 1
        self._coverage = pick(heard, share_of(finite, counted), self._coverage)
        self._coverages.append((self.step_count, self._coverage))
        updated = self._state.updates
        # A count of updates on a device is not waited for: what was on time was due, save without answers.
        if isinstance(updated, Tensor) or updated != before.updates:
            since = self.step_count - self.config.warmup_steps
            if since > 0 and since % self.config.update_frequency == 0:
                self._lambdas.append((self.step_count, self._state.multiplier))
                self._updates.append((self.step_count, self._state.last_update))

    @property
    def lambda_history(self) -> list[tuple[int, float]]:
        """The multiplier at step 0 and after each update: (step, value), the last ones."""
        return _read(self._lambdas)

    @property
    def coverage_history(self) -> list[tuple[int, float]]:
        """The coverage of each batch: (step, value), the last ones."""
        return _read(self._coverages)

    @property
    def update_history(self) -> list[tuple[int, float]]:
        """By how much each update changed the multiplier, before its bounds: (step, value), the last ones."""
        return _read(self._updates)

    def get_tag_loss_weight(self) -> Number:
        """Return what the tag loss weighs: more, the less there is left to reject (`adaptive_tag_weight`)."""
        config = self.config
        if not config.use_tag_loss:
            return 0.0
        if not config.tag_loss_adaptive:
            return config.tag_loss_weight
        return adaptive_tag_weight(
            config.tag_loss_weight, self._coverage, max_weight=config.tag_loss_max_weight
        )

    def get_statistics(self) -> dict[str, Any]:
        """Return the tracker's statistics and the controller's by name; waits for the device."""
        config = self.config
        decay = 1.0 if config.exponential_decay is None else config.exponential_decay
        return {
            **self.tracker.get_statistics(),
            "lambda_rej": float(self._state.multiplier),
            "lambda_rej_min": config.lambda_rej_min,
            "step_count": self.step_count,
            "learning_rate": config.learning_rate * decay ** (self.step_count - config.warmup_steps),
            "velocity": float(self._state.velocity),
            "last_update": float(self._state.last_update),
            "tag_loss_weight": float(self.get_tag_loss_weight()),
        }

    def state_dict(self) -> dict[str, Any]:
        """Return what going on needs, as plain values; waits for the device."""
        return {
            "state": {name: float(value) for name, value in self._state._asdict().items()},
            "coverage": float(self._coverage),
            "tracker": self.tracker.state_dict(),
            "lambda_history": self.lambda_history,
            "coverage_history": self.coverage_history,
            "update_history": self.update_history,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`; ValueError for that of another target."""
        self.tracker.load_state_dict(state["tracker"])
        self._state = ControlState(**state["state"])
        self.step_count = int(state["state"]["step"])
        self._coverage = state["coverage"]
        kept = self.config.history_size
        self._lambdas = deque(map(_entry, state["lambda_history"]), kept)
        self._coverages = deque(map(_entry, state["coverage_history"]), kept)
        self._updates = deque(map(_entry, state["update_history"]), kept)


def _read(history: Iterable[tuple[int, Number]]) -> list[tuple[int, float]]:
    """Return a history as plain numbers, waiting once for those that are on a device."""
    steps, values = [step for step, _ in history], [value for _, value in history]
    held = [value for value in values if isinstance(value, Tensor)]
    read = iter(torch.stack(held).tolist() if held else ())
    plain = [next(read) if isinstance(value, Tensor) else value for value in values]
    return list(zip(steps, plain, strict=True))


def _entry(entry: Iterable[Any]) -> tuple[int, Number]:
    step, value = entry
    return int(step), float(value)


# --- in a training --------------------------------------------------------------------------------------


class CoverageController:
    """The companion that weighs a training's coverage term with a multiplier that follows the coverage.

    Before each micro-batch the multiplier takes the place of ``loss_weights["rejection"]``; where a
    curriculum or the config has given that a weight, it is scaled by that weight over the initial multiplier,
    so that a ramp from 0 ramps here too, and while it is 0 nothing is learned. After the backward pass the
    controller is told the coverage of the micro-batch: the share of trained answers that strict decoding at
    its threshold accepts, each output of a row counted; with row weights, their share of the weight. On the
    CPU values are read, which costs less there than not to; on other devices nothing waits.

    The loss must have a coverage term with a gradient, "ranked" or "soft" of `SCMTrainingLoss`.

    Telemetry: lambda_rej, the multiplier; control_coverage, the coverage of the epoch so far, nan before any.
    Raises ValueError for a model that does not answer (P, Q).
    """

    name = "coverage_controller"

    def __init__(self, adaptive: AdaptiveLambda) -> None:
        self.adaptive = adaptive
        self._share = 1.0  # of the multiplier, in the micro-batch under way
        self._finite: Number = 0.0
        self._counted: Number = 0.0

    def begin_epoch(self, epoch: int, facts: dict[str, Any]) -> None:
        """Count anew."""
        self._finite = self._counted = 0.0

    def before_forward(self, moment: Moment) -> None:
        """Say what the coverage term weighs."""
        given = moment.facts.get("loss_weights") or {}
        initial = self.adaptive.config.initial_lambda
        self._share = given["rejection"] / initial if "rejection" in given and initial > 0 else 1.0
        weight = self.adaptive.lambda_rej
        if isinstance(weight, Tensor):  # 0-d and float64, it would make the loss one
            weight = weight.to(next(moment.model.parameters()).dtype)
        moment.facts["loss_weights"] = {**given, "rejection": weight * self._share}

    def after_backward(self, moment: Moment) -> None:
        """Learn from the micro-batch's answers."""
        accepted, trained, weights = _answers(moment)
        if weights is None:
            counts = count_bottoms(~accepted, trained)
            self._note(counts[0], sum(counts) if isinstance(counts, tuple) else counts.sum())
            if self._share != 0:
                self.adaptive.update_counts(counts)
            return
        if trained is not None:
            weights = torch.where(trained, weights, 0.0)
        weights = weights.to(torch.float64)
        total, number = weights.sum(), (weights != 0).sum()
        coverage = torch.where(accepted, weights, 0.0).sum() / total  # nan of nothing is ignored
        finite, counted = torch.where(number > 0, coverage * number, 0.0), number.to(torch.float64)
        on_host = coverage.device.type == "cpu"
        self._note(finite.item() if on_host else finite, counted.item() if on_host else counted)
        if self._share != 0:
            told = (coverage.item(), counted.item()) if on_host else (coverage, counted)
            self.adaptive.observe(*told)

    def _note(self, finite: Number, counted: Number) -> None:
        self._finite, self._counted = self._finite + finite, self._counted + counted

    def telemetry(self) -> Mapping[str, float]:
        """Return lambda_rej and control_coverage; waits for the device."""
        counted = float(self._counted)
        return {
            "lambda_rej": float(self.adaptive.lambda_rej),
            "control_coverage": float(self._finite) / counted if counted else math.nan,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return what going on needs; waits for the device."""
        epoch = {"finite": float(self._finite), "counted": float(self._counted)}
        return {"adaptive": self.adaptive.state_dict(), "epoch": epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.adaptive.load_state_dict(state["adaptive"])
        self._finite, self._counted = state["epoch"]["finite"], state["epoch"]["counted"]


def _answers(moment: Moment) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return which answers are accepted, which of them are trained (None: all), and what each weighs."""
    P, Q = split_outputs(moment.found.get(RAW_OUTPUTS, moment.outputs))
    if P is None or Q is None:
        raise ValueError("coverage control needs a model that answers (P, Q), got outputs of another kind")
    accepted = (P / Q).isfinite() & Q.isfinite() & (Q.abs() >= moment.facts["tau"])
    semantic = moment.fed.semantic
    trained = None if semantic is None else bool_mask("mask_trained", semantic.mask_trained, accepted)
    return accepted, trained, weights_of_rows(moment.row_weights, accepted)


# --- as one loss function -------------------------------------------------------------------------------


class AdaptiveLoss:
    """The data loss on the quotient, whose price of having no value follows the coverage; a loss function.

    loss(outputs, (Y_n, Y_d), *, tau) is ``quotient_loss(..., lambda_rej=L) + L * ranked coverage``, with L
    the multiplier of `adaptive`, which is told first, and in training only (where gradients are on), which
    answers have a value at tau. margin: how far above tau the coverage term wants |Q|. Given to `SCMTrainer`
    as it is, its state is in the checkpoint.

    Differs from zeroproof 0.1.0: gradients reach the model, also those of answers without a value; "huber" is
    huber; the tag loss is a term of its own (`scm.training.tag_loss`) and not divided by the batch twice.
    """

    def __init__(self, adaptive: AdaptiveLambda, *, base_loss: str = "mse", margin: float = 1e-2) -> None:
        if base_loss not in BASES:
            raise ValueError(f"base_loss must be one of {', '.join(BASES)}, got {base_loss=}")
        if not 0 < margin < math.inf:
            raise ValueError(f"margin must be finite and > 0, got {margin=}")
        self.adaptive = adaptive
        self.base_loss = base_loss
        self.margin = margin

    def __call__(
        self,
        outputs: tuple[Tensor, ...],
        lifted: tuple[Tensor, Tensor],
        *,
        tau: float | Tensor,
        semantic_targets: SemanticTargets | None = None,
        row_weights: Tensor | None = None,
    ) -> Tensor:
        """Return the loss, 0-d. Rows labelled missing or fault take no part."""
        (P, Q), (Y_n, Y_d) = outputs[:2], lifted
        trained = None if semantic_targets is None else semantic_targets.mask_trained
        if torch.is_grad_enabled():
            p, q = P.detach(), Q.detach()
            bottom = ~((p / q).isfinite() & q.isfinite() & (q.abs() >= tau))
            self.adaptive.update_counts(count_bottoms(bottom, trained))
        penalty = self.adaptive.lambda_rej
        if isinstance(penalty, Tensor):
            penalty = penalty.to(Q.dtype)
        fit = quotient_loss(
            P,
            Q,
            Y_n,
            Y_d,
            tau=tau,
            mask=trained,
            mask_finite=None if semantic_targets is None else semantic_targets.mask_finite,
            orientation=None if semantic_targets is None else semantic_targets.orientation_label,
            base=self.base_loss,
            lambda_rej=penalty,
            row_weights=row_weights,
        )
        target = self.adaptive.config.target_coverage
        covered = ranked_coverage_loss(Q, tau, self.margin, target, mask=trained, row_weights=row_weights)
        return fit + penalty * covered

    def state_dict(self) -> dict[str, Any]:
        """Return the multiplier's state."""
        return self.adaptive.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.adaptive.load_state_dict(state)


def create_adaptive_loss(
    target_coverage: float = 0.95,
    learning_rate: float = 0.01,
    initial_lambda: float = 1.0,
    base_loss: str = "mse",
    *,
    momentum: float = 0.9,
    warmup_steps: int = 100,
    update_frequency: int = 10,
    exponential_decay: float | None = None,
    lambda_min: float = 0.1,
    lambda_max: float | None = None,
    lambda_rej_min: float = 0.1,
    use_tag_loss: bool = False,
    tag_loss_weight: float = 0.05,
    tag_loss_adaptive: bool = True,
    rule: str = "reference",
) -> AdaptiveLoss:
    """Make the loss with its multiplier; tag_loss_max_weight is 4 times tag_loss_weight.

    Momentum, warm-up and frequency have other defaults here than in `AdaptiveLossConfig`, as recorded.
    """
    config = AdaptiveLossConfig(
        target_coverage=target_coverage,
        learning_rate=learning_rate,
        initial_lambda=initial_lambda,
        momentum=momentum,
        warmup_steps=warmup_steps,
        update_frequency=update_frequency,
        exponential_decay=exponential_decay,
        lambda_min=lambda_min,
        lambda_max=lambda_max,
        lambda_rej_min=lambda_rej_min,
        use_tag_loss=use_tag_loss,
        tag_loss_weight=tag_loss_weight,
        tag_loss_adaptive=tag_loss_adaptive,
        tag_loss_max_weight=4.0 * tag_loss_weight,
        rule=rule,
    )
    return AdaptiveLoss(AdaptiveLambda(config), base_loss=base_loss)


def _check_number(
    name: str,
    value: object,
    *,
    rule: str = ">= 0",
    holds: Callable[[float], bool] = lambda x: x >= 0,
) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {name}={value!r}")
    if not (math.isfinite(value) and holds(value)):
        raise ValueError(f"{name} must be finite and {rule}, got {name}={value!r}")


def _check_count(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {name}={value!r}")
    if value < least:
        raise ValueError(f"{name} must be >= {least}, got {name}={value!r}")
