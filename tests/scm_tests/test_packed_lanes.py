"""Trials looked at before they make a pack: which of them share a first model."""

from __future__ import annotations

import copy
import dataclasses

import torch
from torch import nn

from scm.data import Split
from scm.models import make_model
from scm.packed.lanes import FirstModels, PackTrial, look_at
from scm.training.targets import lift_semantic_targets
from scm.trial_config import TrialConfig

SPLITS = {"train": Split(torch.zeros(8, 5), lift_semantic_targets(torch.zeros(8), ["finite"] * 8))}


def build(config: TrialConfig) -> nn.Module:
    return make_model(config, 5)


class Scaled(nn.Module):
    """A model that keeps its config, to read it when it is run."""

    def __init__(self, config: TrialConfig) -> None:
        super().__init__()
        self.config = config
        self.linear = nn.Linear(5, 2)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        P, Q = (self.config.lambda_margin * self.linear(x)).unbind(-1)
        return P, Q


def models(builder, *pairs):
    looking = FirstModels(builder)
    trials = [PackTrial(TrialConfig(**told), seed, str(place)) for place, (told, seed) in enumerate(pairs)]
    return [looking.look_at(trial, SPLITS).model for trial in trials]


def test_trials_that_differ_in_what_the_builder_does_not_read_share_a_model():
    first, second = models(build, ({"learning_rate": 0.1}, 0), ({"learning_rate": 0.2, "gamma": 0.1}, 0))
    assert first is second


def test_what_the_builder_reads_and_the_seed_make_another_model():
    first, wider, other = models(build, ({}, 0), ({"hidden_width": 3}, 0), ({}, 1))
    assert len({id(first), id(wider), id(other)}) == 3
    assert not torch.equal(next(first.parameters()), next(other.parameters()))


def test_a_knob_that_is_read_for_some_configs_only_tells_those_apart():
    def picky(config: TrialConfig) -> nn.Module:
        return nn.Linear(5, 2 if config.head == "pattern" else config.hidden_width)

    angular = {"head": "angular"}
    pairs = [({}, 0), ({"hidden_width": 3}, 0), (angular, 0), ({**angular, "hidden_width": 3}, 0)]
    one, same, wide, narrow = models(picky, *pairs)
    assert one is same
    assert (wide.out_features, narrow.out_features) == (64, 3)


def test_a_model_that_keeps_its_config_is_shared_by_equal_configs_only():
    pairs = [({"lambda_margin": 0.1}, 0), ({"lambda_margin": 0.2}, 0), ({"lambda_margin": 0.1}, 0)]
    first, second, third = models(Scaled, *pairs)
    assert (first.config.lambda_margin, second.config.lambda_margin) == (0.1, 0.2)
    assert first is third


def test_a_builder_may_do_with_a_config_what_it_likes():
    def handy(config: TrialConfig) -> nn.Module:
        assert isinstance(config, TrialConfig)
        changed = dataclasses.replace(config, hidden_width=2 * config.hidden_width)
        assert copy.deepcopy(changed) == changed
        assert TrialConfig.from_flat(changed.to_flat()).hidden_width == 2 * config.hidden_width
        return build(changed)

    first, second = models(handy, ({"gamma": 0.1}, 0), ({"gamma": 0.2}, 0))
    assert first is not second  # all knobs went into the copy


def test_a_trial_among_others_is_seen_as_it_is_alone():
    looking = FirstModels(build)
    for place, told in enumerate(
        ({}, {"learning_rate": 0.1}, {"mixed_precision": True}, {"head": "angular"})
    ):
        trial = PackTrial(TrialConfig(**told), 0, str(place))
        found, alone = looking.look_at(trial, SPLITS), look_at(trial, build, SPLITS)
        assert (found.trial, found.signature, found.reason) == (trial, alone.signature, alone.reason)
        for one, other in zip(found.model.parameters(), alone.model.parameters(), strict=True):
            assert torch.equal(one, other)
