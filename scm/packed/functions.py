"""What one trial of a pack computes in a step and in a validation, as functions of tensors to be traced.

The parts are those of `SCMTrainer`: its loss functions, its feed, its companions, in its order. Here they are
only put together so that every number that differs from trial to trial is an argument.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from scm.autodiff.policies import gradient_policy, policies_disabled
from scm.losses.terms import LossTerms
from scm.packed.batches import COLUMNS, semantic_targets
from scm.packed.carried import CARRIED, Carried
from scm.packed.control import CONTROL_SETTINGS, control_weight, controlled
from scm.packed.eligibility import IN_LOSS, OWN
from scm.packed.program import Known, ProgramError
from scm.training.companion import Moment
from scm.training.feed import Fed, LossCall
from scm.training.objective import as_trainer_loss, in_terms
from scm.training.records import split_outputs
from scm.trial import LossFn, make_training_loss
from scm.trial_config import TrialConfig

LossOf = Callable[[TrialConfig], "LossFn | None"]

WEIGHTS: Mapping[str, str] = {
    "margin": "lambda_margin",
    "sign": "lambda_sign",
    "rejection": "lambda_rej",
    "push_down": "lambda_push_down",
    "push_up": "lambda_push_up",
}
"""The knob that weighs each term of the objective."""


class Form(NamedTuple):
    """What a step of a pack consists of, beside what `pack_signature` compares."""

    idle: frozenset[str]  # knobs of terms that weigh 0 in every trial, which are not computed
    gated: bool  # whether a trial has a gradient policy
    ramped: bool  # whether a trial's weights grow


class LaneConfig:
    """A trial's config as its loss sees it: numbers that differ from trial to trial are tensors.

    A knob that may differ and is no number of the loss is a ProgramError: a loss that reads it would be
    another function for every trial.
    """

    def __init__(self, config: TrialConfig, numbers: Mapping[str, Tensor | float]) -> None:
        self._config = config
        self._numbers = numbers

    def __getattr__(self, name: str) -> Any:
        if name in self._numbers:
            return self._numbers[name]
        if name in OWN:
            raise ProgramError(f"its loss reads {name}, which differs from trial to trial")
        return getattr(self._config, name)


@dataclass(frozen=True)
class TrialFunctions:
    """The functions of one trial of a pack: `train`, `validate` and `answer`, of tensors by name.

    config: of any trial of the pack, for what is equal in all of them. fixed: names of what the model holds
    besides its trained parameters.
    """

    config: TrialConfig
    model: nn.Module
    parameters: tuple[str, ...]
    fixed: tuple[str, ...]
    loss_of: LossOf | None
    form: Form

    @property
    def carried(self) -> tuple[Carried, ...]:
        """The companions that carry a state from step to step."""
        return tuple(item for item in CARRIED if item.is_on(self.config))

    @property
    def controlled(self) -> bool:
        return self.config.coverage_control != "none"

    def numbers(self) -> tuple[str, ...]:
        """Return the knobs that are arguments, one number a trial."""
        given = (name for name in sorted(IN_LOSS) if getattr(self.config, name) is not None)
        return (*(name for name in given if name not in self.form.idle), "tau_train_min", "tau_train_max")

    def known(self) -> dict[str, Known]:
        """Return every argument of `train`, and when it is known."""
        when = {f"parameter.{name}": Known.PLACE for name in self.parameters}
        when |= {f"fixed.{name}": Known.PACK for name in self.fixed}
        when |= dict.fromkeys(COLUMNS, Known.BATCH) | {"tau": Known.BATCH, "global_step": Known.BATCH}
        when |= dict.fromkeys((*self.numbers(), "epoch"), Known.PACK)
        if self.form.gated:
            when["policy"] = Known.PACK
        if self.controlled:
            when |= {f"control.{name}": Known.PACK for name in CONTROL_SETTINGS}
            when["control.state"] = Known.STEP
        for item in self.carried:
            when |= {f"carried.{item.name}.{name}": Known.STEP for name in item.zeros}
        return when

    @property
    def gradients(self) -> dict[str, str]:
        """The gradients of the loss that make a row, in order, and the input that each is by."""
        return {f"gradient.{name}": f"parameter.{name}" for name in self.parameters}

    def known_still(self) -> dict[str, Known]:
        """Return the arguments of `validate` and `answer`: all but the parameters are known before."""
        own = (*(f"fixed.{name}" for name in self.fixed), *COLUMNS, "tau", "global_step", "epoch")
        when = {f"parameter.{name}": Known.PLACE for name in self.parameters}
        return when | dict.fromkeys((*own, *self.numbers()), Known.PACK)

    def train(self, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return loss, P, Q, and what companions carry on; `gradients` are found from the loss."""
        parameters = {name: held[f"parameter.{name}"] for name in self.parameters}
        with self._policy(held):
            loss, beside = self._objective(parameters, held)
        return {"loss": loss, **beside}

    def validate(self, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return loss, P and Q on held-out rows, at the threshold `tau`, without policy or companions."""
        parameters = {name: held[f"parameter.{name}"] for name in self.parameters}
        config = self._lane_config(held)
        with torch.no_grad(), policies_disabled():
            outputs = self._run(parameters, held)
            P, Q = _answers(outputs)
            loss = self._call(config, apart=False)(outputs, self._fed(held), self._facts(held, config))
        return {"loss": _total(loss), "P": P, "Q": Q}

    def answer(self, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return P and Q of the rows `inputs`."""
        parameters = {name: held[f"parameter.{name}"] for name in self.parameters}
        with torch.no_grad():
            P, Q = _answers(self._run(parameters, held))
        return {"P": P, "Q": Q}

    # --- the parts of a step ------------------------------------------------------------------------

    def _objective(
        self, parameters: dict[str, Tensor], held: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """A micro-batch as `SCMTrainer` meets it, companions included."""
        config = self._lane_config(held)
        companions = [(item, item.make(config, held)) for item in self.carried]
        moment = Moment(self.model, self._fed(held), self._facts(held, config))
        if self.controlled:
            weight = control_weight(held, config, ramped=self.form.ramped)
            weights = moment.facts["loss_weights"] or {}
            moment.facts["loss_weights"] = {**weights, "rejection": weight}
        moment.outputs = self._run(parameters, held)
        P, Q = _answers(moment.outputs)
        _meet("after_forward", companions, moment)
        apart = any(getattr(companion, "needs_terms", False) for _, companion in companions)
        loss = self._call(config, apart=apart)(moment.outputs, moment.fed, moment.facts)
        moment.terms = loss if isinstance(loss, LossTerms) else LossTerms(loss)
        _meet("after_loss", companions, moment)
        beside = {"P": P, "Q": Q}
        if self.controlled:
            beside["control.state"] = controlled(moment, held, self.config.coverage_control, config)
        for item, companion in companions:
            read = item.read(companion)
            beside |= {f"carried.{item.name}.{name}": value.detach() for name, value in read.items()}
        return moment.terms.total(), beside

    def _run(self, parameters: dict[str, Tensor], held: Mapping[str, Tensor]) -> Any:
        fixed = {name: held[f"fixed.{name}"] for name in self.fixed}
        return functional_call(self.model, {**parameters, **fixed}, (held["inputs"],))

    def _call(self, config: LaneConfig, *, apart: bool) -> LossCall:
        typed = cast(TrialConfig, config)
        loss = None if self.loss_of is None else self.loss_of(typed)
        loss = as_trainer_loss(make_training_loss(typed) if loss is None else loss)
        call = LossCall(in_terms(loss) if apart else loss)
        if not call.names_semantic_targets:
            raise ProgramError("its loss does not take semantic_targets, so rows may have to be left out")
        return call

    def _lane_config(self, held: Mapping[str, Tensor]) -> LaneConfig:
        numbers: dict[str, Tensor | float] = {name: held[name] for name in self.numbers()}
        numbers |= dict.fromkeys(self.form.idle, 0.0)
        return LaneConfig(self.config, numbers)

    def _fed(self, held: Mapping[str, Tensor]) -> Fed:
        semantic = semantic_targets(held)
        inputs = held["inputs"]
        return Fed(inputs, semantic, (semantic.Y_n, semantic.Y_d), semantic, int(inputs.shape[0]))

    def _facts(self, held: Mapping[str, Tensor], config: LaneConfig) -> dict[str, Any]:
        weights = (
            {term: getattr(config, knob) for term, knob in WEIGHTS.items()} if self.form.ramped else None
        )
        return {
            "epoch": held["epoch"],
            "global_step": held["global_step"],
            "loss_weights": weights,
            "tau": held["tau"],
        }

    def _policy(self, held: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        if not self.form.gated:
            return policies_disabled()
        return gradient_policy(held["policy"], tau=held["tau"])


def _meet(moment_name: str, companions: Sequence[tuple[Carried, Any]], moment: Moment) -> None:
    for _, companion in companions:
        method = getattr(companion, moment_name, None)
        if method is not None:
            method(moment)


def _answers(outputs: Any) -> tuple[Tensor, Tensor]:
    P, Q = split_outputs(outputs)
    if P is None or Q is None:
        raise ProgramError("its model does not answer (P, Q)")
    return P, Q


def _total(loss: Any) -> Tensor:
    return loss.total() if isinstance(loss, LossTerms) else loss
