"""Resonators: their response, what each split has seen, and how answers and peaks are scored."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from scm.trial import Decoded
from scm.trial_config import TrialConfig
from trainables.tasks.protocol import SPLIT_NAMES, TaskError
from trainables.tasks.rf import SUGGESTED, Resonator, make_rf_task
from trainables.tasks.rf_data import (
    draw_filters,
    draw_points,
    encode_points,
    encode_response,
    peak_scores,
    response,
)
from trainables.tasks.shared_denominator import row_fit_loss, row_fit_training_loss, unit_rows
from trainables.trial import run_trial

_VECTORS = Path(__file__).parents[1] / "scm_tests" / "data" / "vectors_scm.json"
SMALL = {"n_train": 40, "n_val": 10, "n_test": 40, "points_per_filter": 16}
CONFIG = TrialConfig.from_flat(SUGGESTED)


def _cases() -> list[Any]:
    cases = json.loads(_VECTORS.read_text(encoding="utf-8"))["groups"]["bench_resonator"]["cases"]
    return [pytest.param(case, id=case["id"]) for case in cases]


def _answers(values: torch.Tensor, rejected: torch.Tensor) -> Decoded:
    bottom = rejected.unsqueeze(-1).expand(values.shape)
    return Decoded(
        decoded=torch.where(bottom, torch.nan, values).to(torch.float32),
        bottom=bottom,
        fault=torch.zeros_like(bottom),
        q_abs=torch.where(bottom, 0.0, 1.0),
        numerator=values,
    )


def _exact_resonator() -> Resonator:
    """The resonator whose coefficients are the true ones: p = b0 = w0^2, b1 = w0 / Q."""
    model = Resonator(1, 0).to(torch.float64)
    with torch.no_grad():
        layer = model.net[0]
        layer.weight.copy_(torch.tensor([[2.0, 0.0], [2.0, 0.0], [1.0, -1.0]]))
        layer.bias.zero_()
    return model


@pytest.mark.parametrize("case", _cases())
def test_the_response_matches_the_recorded_one(case: dict[str, Any]) -> None:
    """Real and imaginary part are those of the reference benchmark."""
    h = complex(response(case["w"], case["w0"], case["Q"]))
    np.testing.assert_allclose([h.real, h.imag], case["expected"], rtol=1e-12, atol=1e-15)


def test_drawn_filters_and_points_have_the_stated_distribution() -> None:
    """w0, Q and w are log-uniform over their ranges, with one row per filter and point."""
    rng = np.random.default_rng(0)
    filters = draw_filters(4_000, 500.0, rng)
    points = draw_points(filters, 3, rng)
    assert points.shape == (12_000, 3)
    w = points[:, 0]
    for drawn, (low, high) in ((filters.w0, (0.5, 5)), (filters.quality, (2, 500)), (w, (0.1, 10))):
        share = np.log(drawn / low) / np.log(high / low)
        assert share.min() >= 0
        assert share.max() <= 1
        assert share.mean() == pytest.approx(0.5, abs=0.02)
        assert share.std() == pytest.approx(1 / math.sqrt(12), abs=0.01)
    np.testing.assert_array_equal(points[::3, 1], filters.w0)
    np.testing.assert_allclose(encode_points(points), np.log10(points).astype(np.float32))


def test_focus_draws_half_of_the_points_near_the_resonance() -> None:
    """With `focus`, about half of the points lie within a few bandwidths of their resonance."""
    rng = np.random.default_rng(0)
    filters = draw_filters(500, 500.0, rng)
    shares = []
    for focus in (False, True):
        w, w0, quality = draw_points(filters, 16, rng, focus=focus).T
        shares.append(np.mean(np.abs(w - w0) < 3 * w0 / quality))
    assert shares[1] - shares[0] == pytest.approx(0.5 * (1 - shares[0]), abs=0.05)


def test_only_the_test_part_has_sharper_resonances() -> None:
    """Training and validation stop at Q = 30, the test goes to `quality_max`; splits follow the data seed."""
    task = make_rf_task(SMALL)
    splits = task.splits(0)
    assert {name: len(splits[name]) for name in SPLIT_NAMES} == {"train": 640, "val": 160, "test": 640}
    tops = {name: float(splits[name].extras["quality"].max()) for name in SPLIT_NAMES}
    assert tops["train"] <= 30
    assert tops["val"] <= 30
    assert 30 < tops["test"] <= 500
    assert bool(splits["train"].targets.mask_finite.all())
    assert make_rf_task(SMALL).splits(5)["test"].digest() == splits["test"].digest()
    redrawn = make_rf_task(SMALL | {"redraw_data": True})
    assert redrawn.splits(1)["train"].digest() != redrawn.splits(2)["train"].digest()


def test_the_true_coefficients_answer_exactly() -> None:
    """With the true coefficients the model's P / Q is the response, and no |Q| comes near a threshold."""
    rng = np.random.default_rng(1)
    points = draw_points(draw_filters(200, 500.0, rng), 8, rng)
    with torch.no_grad():
        P, Q = _exact_resonator()(torch.from_numpy(np.log10(points)))
    np.testing.assert_allclose((P / Q).numpy(), encode_response(points), rtol=1e-4, atol=1e-6)
    assert float(Q.abs().min()) > 1e-4


def test_scores_split_at_the_seen_quality_and_charge_abstention() -> None:
    """In band and beyond are scored apart; rejecting the sharp peaks costs what answering zero would."""
    task = make_rf_task(SMALL)
    split = task.splits(0)["test"]
    value, quality = split.extras["value"], split.extras["quality"]
    nothing = torch.zeros(len(split), dtype=torch.bool)
    off = value + torch.where(quality > 30, 0.2, 0.1).unsqueeze(-1)
    full = task.metrics(_answers(off, nothing), split, CONFIG)
    assert full["in_band_mse"] == pytest.approx(0.01, rel=1e-4)
    assert full["extrapolation_mse"] == pytest.approx(0.04, rel=1e-4)
    assert full["coverage_rate"] == 1.0
    shy = task.metrics(_answers(off, quality > 30), split, CONFIG)
    assert math.isnan(shy["extrapolation_mse"])
    assert shy["charged_extrapolation_mse"] == pytest.approx(shy["predict_zero_extrapolation_mse"])
    assert shy["charged_extrapolation_mse"] > full["charged_extrapolation_mse"]
    assert shy["strict_trigger_rate"] == pytest.approx(float((quality > 30).double().mean()))
    garbage = task.metrics(_answers(torch.full_like(value, 1e6), nothing), split, CONFIG)
    assert garbage["charged_mse"] > 1e11


def test_peaks_are_kept_by_the_truth_and_lost_by_zero() -> None:
    """The true response keeps every peak; zero and abstaining keep none; a doubled one hallucinates all."""
    filters = draw_filters(20, 500.0, np.random.default_rng(2))
    exact = peak_scores(lambda points: response(*points.T), filters, count=256, filters_at_once=7)
    assert exact["peak_retention_yield"] == 1.0
    assert exact["false_peak_hallucination_rate"] == 0.0
    assert exact["peak_ratio_p50"] == pytest.approx(1.0)
    doubled = peak_scores(lambda points: 2 * response(*points.T), filters, count=256)
    assert doubled["false_peak_hallucination_rate"] == 1.0
    for nothing in (0.0, math.nan):
        lost = peak_scores(lambda points, x=nothing: np.full(len(points), complex(x)), filters, count=256)
        assert lost["peak_retention_yield"] == 0.0


def test_the_task_judges_the_peaks_of_its_own_test_filters() -> None:
    """A model with the true coefficients keeps the peaks of the test split."""
    task = make_rf_task(SMALL)
    top = float(task.splits(0)["test"].extras["quality"].max())
    assert task.test_filters(0).quality.max() == pytest.approx(top)
    scores = task.score_peaks(_exact_resonator().float(), 1e-6, 0, count=256)
    assert scores["peak_retention_yield"] == 1.0
    refused = task.score_peaks(_exact_resonator().float(), 1.0, 0, count=256)
    assert refused["peak_retention_yield"] == 0.0


class _Overflowing(torch.nn.Module):
    """Answers every row with a numerator that its denominator makes infinite in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.size = torch.nn.Parameter(torch.tensor(1e38))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        P = self.size.expand(len(x), 2)
        return P, torch.full_like(P, 1e-3)


def test_peaks_are_judged_by_strict_answers_and_leave_the_model_in_training() -> None:
    """A quotient that overflows is a bottom, no peak; a model in training mode stays in it."""
    task, model = make_rf_task(SMALL), _Overflowing()
    scores = task.score_peaks(model, 1e-6, 0, count=256)
    assert scores["peak_retention_yield"] == scores["false_peak_hallucination_rate"] == 0.0
    assert model.training


def test_unit_rows_keep_the_quotient_at_every_size() -> None:
    """Rows become unit length from 1e-38 to 1e38 in float32, and a row of zeros stays zero."""
    P, q = torch.tensor([[3.0, -1.0]]), torch.tensor([[2.0]])
    for size in (1e-37, 1.0, 1e37):
        unit_p, unit_q = unit_rows(P * size, q * size)
        torch.testing.assert_close(unit_p / unit_q, P / q)
        torch.testing.assert_close(unit_p.square().sum(-1) + unit_q[:, 0].square(), torch.ones(1))
    zero_p, zero_q = unit_rows(torch.zeros(1, 2), torch.zeros(1, 1))
    assert float(zero_p.abs().max()) == float(zero_q.abs().max()) == 0.0


def test_the_row_fit_is_bounded_and_zero_at_the_answer() -> None:
    """The term of a row is 0 where P / Q is the target, at most 1 anywhere, and falls as the angle does."""
    y = torch.tensor([[0.3, -0.2], [40.0, 1.0], [0.0, 0.0]])
    ones = torch.ones_like(y)
    P, Q = unit_rows(y, torch.ones(3, 1))
    assert float(row_fit_loss(P, Q, y, ones)) == pytest.approx(0.0, abs=1e-7)
    opposite = unit_rows(torch.stack([y[:, 1] + 1.0, -y[:, 0]], dim=-1), torch.zeros(3, 1))
    assert 0.5 < float(row_fit_loss(*opposite, y, ones)) <= 1.0
    assert float(row_fit_loss(*opposite, y, ones, weight_cap=4.0)) <= 4.0


def test_the_row_fit_of_a_row_of_zeros_has_a_gradient() -> None:
    """At P = Q = 0 nothing is pulled anywhere, and no NaN spoils the other rows."""
    P = torch.tensor([[0.0, 0.0], [1.0, 2.0]], requires_grad=True)
    Q = torch.tensor([[0.0, 0.0], [1.0, 1.0]], requires_grad=True)
    y, ones = torch.tensor([[1.0, 0.0], [3.0, 2.0]]), torch.ones(2, 2)
    row_fit_loss(P, Q, y, ones).backward()
    assert P.grad is not None
    assert Q.grad is not None
    assert torch.equal(P.grad[0], torch.zeros(2))
    assert torch.equal(Q.grad[0], torch.zeros(2))
    assert bool(P.grad[1].isfinite().all())
    assert bool(P.grad[1].ne(0).any())


def test_row_weights_count_rows_of_the_row_fit() -> None:
    """A row of weight 2 counts as two, one of weight 0 not at all, however wrong it is; masks as well."""
    drawn = torch.Generator().manual_seed(0)
    P, Q, y = (torch.randn(4, 2, generator=drawn, dtype=torch.float64) for _ in range(3))
    Q = Q[:, :1].expand(4, 2)
    P[3] = math.inf
    ones = torch.ones_like(y)
    rows = torch.tensor([0, 1, 1, 2])
    doubled = row_fit_loss(P[rows], Q[rows], y[rows], ones[rows])
    weights = torch.tensor([1.0, 2.0, 1.0, 0.0])
    torch.testing.assert_close(row_fit_loss(P, Q, y, ones, row_weights=weights), doubled)
    mask = torch.tensor([True, True, False, True])[:, None].expand(4, 2)
    rows = rows[:3]
    doubled = row_fit_loss(P[rows], Q[rows], y[rows], ones[rows])
    torch.testing.assert_close(row_fit_loss(P, Q, y, ones, mask, row_weights=weights), doubled)


def test_a_task_with_a_fit_of_its_own_can_undo_near_pole_sampling() -> None:
    """Its loss takes the weights of rows that were drawn unequally often."""
    config = {**SUGGESTED, "max_epochs": 1, "sampling": "near_pole", "sampling_correction": True}
    outcome = run_trial(make_rf_task({}), config, seed=0)
    assert outcome["status"] == "completed", outcome["error"]


def test_the_row_fit_weight_restores_squared_errors_near_the_answer() -> None:
    """With an open cap, a small error along the answer costs about its square, small or large the answer."""
    ones = torch.ones(1, 2, dtype=torch.float64)
    for size in (0.1, 1.0, 10.0):
        y = torch.tensor([[size, 0.0]], dtype=torch.float64)
        P, Q = unit_rows(y + torch.tensor([[1e-3, 0.0]]), ones[:, :1])
        assert float(row_fit_loss(P, Q, y, ones, weight_cap=1e9)) == pytest.approx(1e-6, rel=0.02)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"qualty_max": 5}, "did you mean 'quality_max'"),
        ({"quality_max": 30}, "quality_max must be a number > 30.0, got 30"),
        ({"points_per_filter": 0}, "points_per_filter must be a whole number >= 1, got 0"),
        ({"focus": "yes"}, "focus must be true or false, got 'yes'"),
        ({"structure": "powerlaw"}, "did you mean 'power_law'"),
    ],
    ids=["unknown", "quality", "points", "focus", "structure"],
)
def test_bad_parameters_are_named(params: dict[str, Any], message: str) -> None:
    """Each wrong parameter is one line that names it, its value and what would be right."""
    with pytest.raises(TaskError, match=message):
        make_rf_task(params)


def test_nine_weights_extrapolate_after_a_short_trial() -> None:
    """The power law finds the resonators from blunt ones and answers the sharp ones, far better than zero."""
    task = make_rf_task({"n_train": 96, "n_val": 16, "n_test": 64})
    outcome = run_trial(task, dict(SUGGESTED) | {"max_epochs": 12, "batch_size": 128}, seed=0)
    assert outcome["status"] == "completed", outcome["error"]
    assert outcome["parameters"] == 9
    zero = outcome["test_metric.predict_zero_extrapolation_mse"]
    assert outcome["test_metric.charged_extrapolation_mse"] < 0.05 * zero


@pytest.mark.parametrize("structure", ["network", "free"])
def test_the_other_structures_train_to_their_end(structure: str) -> None:
    """Every structure learns: its loss falls, and it ends with a charged error for every part."""
    task = make_rf_task(SMALL | {"structure": structure})
    history: list[dict[str, Any]] = []
    config = dict(SUGGESTED) | {"max_epochs": 4, "learning_rate": 3e-3, "batch_size": 64}
    outcome = run_trial(task, config, seed=0, on_epoch=history.append)
    assert outcome["status"] == "completed", outcome["error"]
    assert history[-1]["loss"] < history[0]["loss"]
    assert not math.isnan(outcome["test_metric.charged_extrapolation_mse"])


def test_the_objective_of_a_pack_is_that_of_its_members() -> None:
    """Vectorised over models, the row fit and its constraints give each model the gradients it gets alone."""
    split = make_rf_task(SMALL).splits(0)["train"]
    x, targets = split.inputs[:32], split.targets.index(slice(0, 32))
    loss_fn = row_fit_training_loss(CONFIG, weight_cap=4.0)
    torch.manual_seed(0)
    models = [Resonator(8, 1) for _ in range(3)]

    def loss(parameters: dict[str, torch.Tensor]) -> torch.Tensor:
        outputs = torch.func.functional_call(models[0], parameters, (x,))
        return loss_fn(outputs, (targets.Y_n, targets.Y_d), tau=1e-4, semantic_targets=targets)

    single = [torch.func.grad(loss)(dict(model.named_parameters())) for model in models]
    stacked, _ = torch.func.stack_module_state(models)
    packed = torch.func.vmap(torch.func.grad(loss))(stacked)
    for number, gradients in enumerate(single):
        for name, gradient in gradients.items():
            torch.testing.assert_close(packed[name][number], gradient, rtol=1e-4, atol=1e-6)
