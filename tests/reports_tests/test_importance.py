"""Importance of knobs: a planted effect is found, and what cannot be told is refused."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from reports import importance
from reports.importance import ImportanceUnavailableError, knob_importance


def rows_of(values, knobs: dict[str, list], seeds: int = 2) -> pa.Table:
    """Rows of as many configs as there are values."""
    held = [
        {
            "config_id": f"c{config:02}",
            "trial_id": f"c{config:02}-s{seed}",
            "seed": seed,
            "status": "completed",
            "coverage": 0.9,
            "target_coverage": 0.9,
            "nan_count": 0,
            "loss": float(value),
            **{f"config.{name}": each[config] for name, each in knobs.items()},
        }
        for config, value in enumerate(values)
        for seed in range(seeds)
    ]
    return pa.Table.from_pylist(held)


def planted(configs: int = 40, seed: int = 0) -> tuple[np.ndarray, dict[str, list]]:
    source = np.random.default_rng(seed)
    rate = 10 ** source.uniform(-5, -1, configs)
    kind = source.choice(["adam", "sgd"], configs)
    noise = source.uniform(0, 1, configs)
    loss = np.log10(rate) * 2 + (kind == "sgd") * 1.5 + 0.05 * source.normal(size=configs)
    return loss, {"rate": rate.tolist(), "kind": kind.tolist(), "noise": noise.tolist()}


@pytest.fixture(autouse=True)
def _sklearn():
    pytest.importorskip("sklearn")


def test_a_planted_effect_is_found_and_noise_is_not():
    loss, knobs = planted()
    found = knob_importance(rows_of(loss, knobs), "loss")
    assert [item.knob for item in found][:1] == ["rate"]
    share = {item.knob: item.share for item in found}
    assert share["rate"] > 0.5
    assert share["rate"] > 3 * share["noise"]
    assert all(0 <= item.low <= item.share <= item.high <= 1 for item in found)
    assert {item.knob: item.values for item in found} == {"rate": 40, "kind": 2, "noise": 40}


def test_equal_rows_give_equal_shares_in_any_order():
    loss, knobs = planted()
    rows = rows_of(loss, knobs)
    turned = rows.take(list(reversed(range(len(rows)))))
    assert knob_importance(rows, "loss") == knob_importance(turned, "loss")


def test_a_disaster_hides_nothing():
    """Ranks count: one config that is a million times worse leaves the others their effect."""
    loss, knobs = planted()
    loss = loss - loss.min() + 1.0
    loss[3] = 1e6
    assert knob_importance(rows_of(loss, knobs), "loss")[0].knob == "rate"


def test_an_inactive_knob_counts_as_a_value_of_its_own():
    source = np.random.default_rng(0)
    active = source.uniform(size=40) < 0.5
    momentum = [float(source.uniform(0, 1)) if on else None for on in active]
    found = knob_importance(
        rows_of(np.where(active, 1.0, 3.0), {"momentum": momentum, "x": [*range(40)]}), "loss"
    )
    assert found[0].knob == "momentum"


def test_configs_without_a_value_are_left_out():
    loss, knobs = planted()
    loss[:5] = np.nan
    assert knob_importance(rows_of(loss, knobs), "loss")[0].values == 35


@pytest.mark.parametrize(
    "values, knobs, metric, said",
    [
        (range(7), {"x": [*range(7)]}, "loss", "at least 8 configs with a finite loss, got 7"),
        ([np.nan] * 10, {"x": [*range(10)]}, "loss", "at least 8 configs with a finite loss, got 0"),
        (range(10), {"x": [1] * 10}, "loss", "a knob that varies"),
        ([1] * 10, {"x": [*range(10)]}, "loss", "a loss that varies"),
        (range(10), {"x": [*range(10)]}, "los", "no metric los; did you mean loss"),
    ],
)
def test_what_cannot_be_told_is_refused(values, knobs, metric, said):
    with pytest.raises(ValueError, match=said):
        knob_importance(rows_of(values, knobs), metric)


def test_without_scikit_learn_it_is_said_how_to_get_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn", None)
    monkeypatch.setitem(__import__("sys").modules, "sklearn.ensemble", None)
    loss, knobs = planted()
    with pytest.raises(ImportanceUnavailableError, match=r"pip install 'scm-harness\[pages\]'"):
        knob_importance(rows_of(loss, knobs), "loss")
    assert importance.LEAST_CONFIGS == 8
