"""Dose-response curves: how they are drawn, how calls are scored, and what the task makes of both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from scm.training.targets import STATUS_CODES
from scm.trial import Decoded
from scm.trial_config import TrialConfig
from trainables.tasks.dose import SUGGESTED, DoseTask, make_dose_task
from trainables.tasks.dose_data import ABOVE, BELOW, IN_RANGE, REGIMES, draw_dose_rows, hill, three_way_scores
from trainables.tasks.protocol import SPLIT_NAMES, TaskError
from trainables.trial import run_trial

_VECTORS = Path(__file__).parents[1] / "scm_tests" / "data" / "vectors_scm.json"
SMALL = {"n_train": 400, "n_val": 200, "n_test": 300}
CONFIG = TrialConfig.from_flat(SUGGESTED)


def _cases(group: str) -> list[Any]:
    cases = json.loads(_VECTORS.read_text(encoding="utf-8"))["groups"][group]["cases"]
    return [pytest.param(case, id=case["id"]) for case in cases]


def _answers(task: DoseTask, *, values: torch.Tensor, outside: torch.Tensor, p: torch.Tensor) -> Decoded:
    """What a model says that answers `values` (log10 IC50) where not `outside`, with numerators `p`."""
    decoded = torch.where(outside, torch.nan, (values + 7.0) / task.params.decades_per_unit)
    return Decoded(
        decoded=decoded.to(torch.float32),
        bottom=outside,
        fault=torch.zeros_like(outside),
        q_abs=torch.where(outside, 0.0, 1.0),
        numerator=p,
    )


@pytest.mark.parametrize("case", _cases("bench_hill"))
def test_hill_matches_the_recorded_responses(case: dict[str, Any]) -> None:
    """The response to a dose is that of the reference benchmark."""
    got = hill(case["C"], case["IC50"], case["h"], case["Emin"], case["Emax"])
    assert float(got) == pytest.approx(case["expected"], rel=1e-12)


@pytest.mark.parametrize("case", _cases("bench_dose_metrics"))
def test_three_way_scores_match_the_recorded_ones(case: dict[str, Any]) -> None:
    """Precision, recall, F1 and both confusion rates are those of the reference benchmark."""
    scores = three_way_scores(case["y_true"], case["y_pred"])
    for name, expected in case["expected"].items():
        assert scores[name] == pytest.approx(expected, rel=1e-12), name


def test_drawn_curves_have_the_stated_distribution() -> None:
    """Regimes, null effects, ranges of IC50 and the layout of rows are as the docstrings say."""
    rows = draw_dose_rows(60_000, np.random.default_rng(3))
    assert rows.x.shape == (60_000, 20)
    assert rows.y.shape == (60_000, 5)
    assert rows.x.dtype == rows.y.dtype == np.float32
    np.testing.assert_array_equal(rows.x[0, ::2], np.linspace(-9, -5, 10, dtype=np.float32))
    log_ic50, label, clamped, y_n, y_d = rows.y.T
    shares = [np.mean(label == kind) for kind in (BELOW, IN_RANGE, ABOVE)]
    np.testing.assert_allclose(shares, [0.3, 0.3, 0.4], atol=0.01)
    low, high = REGIMES[IN_RANGE]
    inside = label == IN_RANGE
    assert np.all((log_ic50[inside] > low) & (log_ic50[inside] < high))
    np.testing.assert_array_equal(clamped[inside], log_ic50[inside])
    np.testing.assert_array_equal(y_n[label == BELOW], -1.0)
    np.testing.assert_array_equal(y_n[label == ABOVE], 1.0)
    np.testing.assert_array_equal(y_d, inside.astype(np.float32))
    flat = (label == ABOVE) & (rows.x[:, 1::2].mean(axis=1) < 0.5)
    assert flat.mean() == pytest.approx(0.1, abs=0.01)


def test_calling_flat_curves_below_gives_the_stated_limit() -> None:
    """A rule that knows everything but which flat curves are null reaches a macro-F1 of 0.9048, no more."""
    rows = draw_dose_rows(60_000, np.random.default_rng(4))
    truth = rows.y[:, 1].astype(int)
    flat = (truth == ABOVE) & (rows.x[:, 1::2].mean(axis=1) < 0.5)
    scores = three_way_scores(truth, np.where(flat, BELOW, truth))
    assert scores["macro_f1"] == pytest.approx(0.9048, abs=0.004)


def test_splits_are_reproducible_disjoint_and_balanced_in_the_test_part() -> None:
    """Splits come from the data seed alone, share no curve, and the test part is balanced by regime."""
    task = make_dose_task(SMALL)
    splits = task.splits(0)
    assert {name: len(splits[name]) for name in SPLIT_NAMES} == {"train": 400, "val": 200, "test": 300}
    again = make_dose_task(SMALL).splits(7)
    other = make_dose_task(SMALL | {"data_seed": 1}).splits(0)
    for name in SPLIT_NAMES:
        assert again[name].digest() == splits[name].digest()
        assert other[name].digest() != splits[name].digest()
    rows = np.concatenate([splits[name].inputs.numpy() for name in SPLIT_NAMES])
    assert len(np.unique(rows, axis=0)) == len(rows)
    balanced = draw_dose_rows(300, np.random.default_rng(0), balanced=True)
    regime = np.digitize(balanced.y[:, 0], [-9.5, -4.5])
    np.testing.assert_array_equal(np.bincount(regime), [100, 100, 100])


def test_neighbouring_data_seeds_share_no_curve() -> None:
    """The validation curves of one data seed are never the training curves of the next."""
    first = make_dose_task({"n_train": 100, "n_val": 100, "n_test": 100, "data_seed": 0}).splits(0)
    second = make_dose_task({"n_train": 100, "n_val": 100, "n_test": 100, "data_seed": 1}).splits(0)
    val, train = first["val"].extras, second["train"].extras
    inside = [part["value"][part["label"] == IN_RANGE] for part in (val, train)]
    assert not torch.isin(inside[0], inside[1]).any()


def test_redraw_data_gives_each_trial_seed_data_of_its_own() -> None:
    """With `redraw_data` the spread over seeds is a spread over data as well."""
    task = make_dose_task(SMALL | {"redraw_data": True})
    first, second = task.splits(0)["train"].digest(), task.splits(1)["train"].digest()
    assert first != second
    assert task.splits(0)["train"].digest() == first


def test_inputs_are_standardised_on_the_training_part_and_constants_left_out() -> None:
    """Ten inputs with mean 0 and deviation 1 in training; targets carry the status of their class."""
    splits = make_dose_task(SMALL).splits(0)
    inputs = splits["train"].inputs
    assert inputs.shape == (400, 10)
    torch.testing.assert_close(inputs.mean(dim=0), torch.zeros(10), atol=1e-5, rtol=0)
    torch.testing.assert_close(inputs.std(dim=0, correction=0), torch.ones(10), atol=1e-5, rtol=0)
    label, targets = splits["test"].extras["label"], splits["test"].targets
    assert torch.equal(targets.mask_finite, label == IN_RANGE)
    assert torch.equal(targets.orientation_label, label - 1)
    assert torch.equal(splits["test"].extras["status"] == STATUS_CODES["censored_below"], label == BELOW)


def test_a_perfect_answer_scores_perfectly() -> None:
    """Right calls and right values give macro-F1 1 and no error of any kind."""
    task = make_dose_task(SMALL)
    split = task.splits(0)["test"]
    label = split.extras["label"]
    decoded = _answers(task, values=split.extras["value"], outside=label != IN_RANGE, p=label - 1.0)
    scores = task.metrics(decoded, split, CONFIG)
    assert scores["macro_f1"] == scores["direction_macro_f1"] == 1.0
    for name in ("accepted_error", "charged_error", "finite_mae"):
        assert scores[name] == pytest.approx(0.0, abs=1e-5)
    assert scores["false_accept_rate"] == scores["false_reject_rate"] == 0.0


def test_abstaining_everywhere_looks_bad() -> None:
    """A model that never answers pays what answering the middle of the doses would cost, and has no F1."""
    task = make_dose_task(SMALL)
    split = task.splits(0)["test"]
    everywhere = torch.ones(len(split), dtype=torch.bool)
    decoded = _answers(task, values=split.extras["value"], outside=everywhere, p=torch.ones(len(split)))
    scores = task.metrics(decoded, split, CONFIG)
    in_range = split.extras["label"] == IN_RANGE
    trivial = (split.extras["value"][in_range] + 7.0).abs().mean()
    assert scores["charged_error"] == pytest.approx(float(trivial))
    assert scores["charged_error"] > 0.5
    assert scores["false_reject_rate"] == scores["false_censored_rate_on_in_range"] == 1.0
    assert scores["macro_f1"] < 0.25


def test_decoding_to_garbage_looks_bad() -> None:
    """A model that answers every curve, far off, is charged for it and calls nothing right outside."""
    task = make_dose_task(SMALL)
    split = task.splits(0)["test"]
    nowhere = torch.zeros(len(split), dtype=torch.bool)
    values = torch.full((len(split),), 1e4, dtype=torch.float64)
    decoded = _answers(task, values=values, outside=nowhere, p=torch.ones(len(split)))
    scores = task.metrics(decoded, split, CONFIG)
    assert scores["charged_error"] > 1e3
    assert scores["accepted_error"] > 1e3
    assert scores["false_in_range_rate_on_censored"] == scores["false_accept_rate"] == 1.0


def test_a_fault_is_a_call_of_no_class() -> None:
    """Where P or Q is not finite, no class is called: it can never be right."""
    task = make_dose_task(SMALL)
    split = task.splits(0)["test"]
    fault = torch.ones(len(split), dtype=torch.bool)
    nan = torch.full((len(split),), torch.nan)
    decoded = Decoded(decoded=nan, bottom=fault, fault=fault, q_abs=nan, numerator=nan)
    assert torch.equal(task.calls(decoded), torch.full((len(split),), -1))
    scores = task.metrics(decoded, split, CONFIG)
    assert scores["macro_f1"] == scores["direction_macro_f1"] == 0.0


def test_a_bottom_without_direction_is_a_call_of_no_class() -> None:
    """A model that answers (0, 0) everywhere has said neither below nor above, and gets neither right."""
    task = make_dose_task(SMALL)
    split = task.splits(0)["test"]
    everywhere = torch.ones(len(split), dtype=torch.bool)
    zeros = torch.zeros(len(split))
    scores = task.metrics(_answers(task, values=zeros, outside=everywhere, p=zeros), split, CONFIG)
    assert scores["macro_f1"] == scores["direction_macro_f1"] == 0.0


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"n_trian": 5}, "did you mean 'n_train'"),
        ({"size": "papre"}, "did you mean 'paper'"),
        ({"size": ["quick"]}, r"unknown size \['quick'\]"),
        ({"n_val": 0}, "n_val must be a whole number >= 1, got 0"),
        ({"n_train": 2.5}, "n_train must be a whole number >= 1, got 2.5"),
        ({"data_seed": -1}, "data_seed must be a whole number >= 0, got -1"),
        ({"redraw_data": 1}, "redraw_data must be true or false, got 1"),
        ({"decades_per_unit": 0}, "decades_per_unit must be a number > 0.0, got 0"),
    ],
    ids=["unknown", "size", "sizes", "zero", "fraction", "seed", "flag", "unit"],
)
def test_bad_parameters_are_named(params: dict[str, Any], message: str) -> None:
    """Each wrong parameter is one line that names it, its value and what would be right."""
    with pytest.raises(TaskError, match=message) as caught:
        make_dose_task(params)
    assert "\n" not in str(caught.value)


def test_a_trial_learns_to_call_curves_with_at_most_six_thousand_weights() -> None:
    """A short training with the suggested settings is far better than chance, and says the same again."""
    task = make_dose_task({"n_train": 2_000, "n_val": 300, "n_test": 600})
    config = dict(SUGGESTED) | {"max_epochs": 5}
    outcomes = [run_trial(task, config, seed) for seed in (0, 0, 1, 2)]
    for outcome in outcomes:
        assert outcome["status"] == "completed", outcome["error"]
        assert outcome["test_metric.macro_f1"] > 0.85
        assert outcome["parameters"] <= 6_000
    assert outcomes[0]["loss"] == outcomes[1]["loss"]
    assert outcomes[0]["loss"] != outcomes[2]["loss"]


def test_a_weak_orientation_term_leaves_bottoms_on_the_wrong_side() -> None:
    """Bottoms that the fit pulls to the wrong end of the circle stay there unless lambda_sign beats it."""
    task = make_dose_task({"n_train": 2_000, "n_val": 300, "n_test": 600})
    config = dict(SUGGESTED) | {"max_epochs": 5, "lambda_sign": 0.1}
    weak = [run_trial(task, config, seed)["test_metric.macro_f1"] for seed in (0, 1, 2)]
    assert min(weak) < 0.7


def test_many_trials_scored_at_once_are_scored_as_each_alone() -> None:
    """Calls, directions and values of three models, one of which abstains everywhere and one has faults."""
    task = make_dose_task({"size": "quick"})
    split = task.splits(0)["val"]
    rows = len(split)
    draw = torch.Generator().manual_seed(0)
    p, q = torch.randn(3, rows, generator=draw), torch.randn(3, rows, generator=draw)
    bottom = (q.abs() < 0.3) | (torch.arange(3)[:, None] == 1)
    fault = torch.zeros_like(bottom)
    fault[2, ::7] = True
    bottom |= fault
    many = Decoded((p / q).masked_fill(bottom, torch.nan), bottom, fault, q.abs(), p)
    config = TrialConfig()
    together = task.pack_metrics(many, split, [config] * 3)
    for place, scores in enumerate(together):
        alone = task.metrics(Decoded(*(item[place] for item in many)), split, config)
        assert scores == pytest.approx(alone, nan_ok=True)
        called = task.calls(Decoded(*(item[place] for item in many)))
        reference = three_way_scores(split.extras["label"], called)
        assert {name: scores[name] for name in reference} == pytest.approx(reference, nan_ok=True)
