"""Where a trial's first non-finite loss or gradient came from: the bad step once more, alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

from torch import Tensor, nn

from scm.autodiff.policies import GradientPolicy, gradient_policy
from scm.guards.origin import find_origin
from scm.losses.terms import LossTerms
from scm.packed.batches import semantic_targets
from scm.training.feed import Fed, LossCall
from scm.training.objective import as_trainer_loss, in_terms
from scm.trial import LossFn
from scm.trial_config import TrialConfig


class MicroBatch(NamedTuple):
    """One trial's micro-batch: its columns, and what its loss is told."""

    columns: Mapping[str, Tensor]
    facts: Mapping[str, Any]


def origin_of(model: nn.Module, loss: LossFn, config: TrialConfig, group: Sequence[MicroBatch]) -> str:
    """Say where the group's first non-finite loss or gradient came from, as `SCMTrainer` says it.

    model: with the weights before the step. Waits for the device.
    """
    call = LossCall(in_terms(as_trainer_loss(loss)))
    policy = None if config.gradient_policy is None else GradientPolicy(config.gradient_policy)
    said = ""
    for columns, facts in group:
        semantic = semantic_targets(columns)
        inputs = columns["inputs"]
        fed = Fed(inputs, semantic, (semantic.Y_n, semantic.Y_d), semantic, int(inputs.shape[0]))

        def again(fed: Fed = fed, facts: Mapping[str, Any] = facts) -> Tensor | LossTerms:
            found: Tensor | LossTerms = call(model(fed.inputs), fed, facts)
            return found

        with nullcontext() if policy is None else gradient_policy(policy, tau=facts["tau"]):
            origin = find_origin(model, again)
        said = f"micro-batch {facts['global_step']}: {origin}"
        if origin.kind != "unknown":
            break
    return said
