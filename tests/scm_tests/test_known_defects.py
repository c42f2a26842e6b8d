"""What published implementations get wrong across several modules at once, and what must hold here.

A defect of one module is tested with that module; here are those that no module has alone.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from scm.core.tags import TRTag
from scm.training.adaptive_loss import AdaptiveLambda, AdaptiveLossConfig, CoverageController
from scm.training.control_rules import RULES
from scm.training.coverage import CoverageMetrics, CoverageTracker, MultiOutputCoverageTracker
from scm.training.hybrid_trainer import HybridTrainer, HybridTrainingConfig
from scm.training.loader import TensorBatches
from scm.training.targets import lift_semantic_targets


class Answers(nn.Module):
    """P a line of x, and Q a constant: everywhere far above a threshold, or everywhere far below it."""

    def __init__(self, denominator: float) -> None:
        super().__init__()
        self.line = nn.Linear(1, 1)
        self.register_buffer("denominator", torch.tensor(denominator))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        P = self.line(x).squeeze(-1)
        return P, self.denominator.expand_as(P)


@pytest.mark.parametrize("enforced", [True, False])
@pytest.mark.parametrize(("denominator", "rises"), [(1.0, False), (1e-3, True)], ids=["all", "none"])
def test_one_controller_moves_the_weight_of_coverage_and_in_one_direction(
    enforced: bool, denominator: float, rises: bool
) -> None:
    """With both ways of enforcing coverage asked for, one acts: too much of it lowers the weight, too little
    raises it. Published, two controllers of opposite directions pull at one weight."""
    x = torch.linspace(-1, 1, 32)[:, None]
    targets = lift_semantic_targets(x.squeeze(1), torch.zeros(32, dtype=torch.int64))
    config = HybridTrainingConfig(
        max_epochs=3,
        target_coverage=0.5,
        use_adaptive_loss=True,
        enforce_coverage=enforced,
        adaptive_warmup_steps=0,
        adaptive_update_frequency=1,
        tau_train=0.1,
        tau_infer=0.01,
    )
    trainer = HybridTrainer(Answers(denominator), TensorBatches(x, targets, 8), config=config)
    (held,) = [item for item in trainer.training.controllers.values() if isinstance(item, CoverageController)]
    trainer.fit()
    weights = [value for _, value in held.adaptive.lambda_history]
    assert len(weights) == 13  # the first one, and one for each batch
    for before, after in pairwise(weights):
        assert after > before if rises else after < before
    assert trainer.lambda_rej == weights[-1]


@given(
    st.sampled_from(sorted(RULES)),
    st.floats(0.0, 1.0),
    st.lists(st.integers(0, 50), min_size=1, max_size=20),
    st.booleans(),
)
def test_coverage_above_the_target_never_raises_a_multiplier(rule, target, answered, as_tensors) -> None:
    """Nor does coverage below it lower one, from the first batch to the last; whatever they are told with."""
    adaptive = AdaptiveLambda(AdaptiveLossConfig(rule=rule, target_coverage=target, cumulative_steps=0))
    for n_real in answered:
        before = float(adaptive.lambda_rej)
        counts = CoverageMetrics(n_real=n_real, n_phi=50 - n_real)
        tags = torch.tensor([TRTag.REAL] * n_real + [TRTag.PHI] * (50 - n_real))
        adaptive.update(tags if as_tensors else counts)
        change = float(adaptive.lambda_rej) - before
        assert change <= 0 if n_real / 50 > target else change >= 0


class _Operations(TorchDispatchMode):
    """Counts what torch is asked to do."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "told",
    [CoverageTracker(0.9, 5).update, AdaptiveLambda().update, MultiOutputCoverageTracker(2).update],
    ids=["tracker", "controller", "outputs"],
)
def test_a_batch_of_tags_is_counted_at_once_and_not_tag_by_tag(told: Any) -> None:
    """As many operations for 100 000 answers as for ten; published trackers ask each tag in Python."""
    counts = []
    for rows in (10, 100_000):
        tags = torch.arange(2 * rows).remainder(4).view(rows, 2)
        if not isinstance(told.__self__, MultiOutputCoverageTracker):
            tags = tags.flatten()
        with _Operations() as operations:
            told(tags)
        counts.append(operations.count)
    assert 0 < counts[0] == counts[1]
