"""Domain shift: how trained models answer on data further and further from those of training.

Per level: coverage, errors, the curve of error against coverage, and whether the model abstains where it
should, near poles and not elsewhere. The data are made in `trainables.shifted`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from reports.robustness_shift import (
    lower_auc,
    rank_correlation,
    share_of,
)
from trainables.curves import curve_area, risk_curve
from trainables.scoring import STANDARD_METRICS
from trainables.shifted import (
    BY_TASK,
    UNSHIFTED,
    Answered,
    Shifted,
    answer_split,
    make_shifted,
    shift_identity,
)
from trainables.trained import Trained
from trainables.trial import error_line

NEAR_SHARE = 0.1
"""A row is near a pole when a tenth of the data that are not shifted are as near."""

_FIGURES = ("coverage", *STANDARD_METRICS, "curve_area")


def measure_shift(
    trained: Mapping[str, Trained], *, on_model: Callable[[str], None] = lambda name: None
) -> list[dict[str, Any]]:
    """Measure every shift of every model (by trial_id); rows as `reports.robustness_shift.shift_schema` has.

    What a task raises is a row with its message in `error`, and the other levels and models go on.
    """
    rows: list[dict[str, Any]] = []
    for trial_id, model in trained.items():
        on_model(trial_id)
        identity = {"trial_id": trial_id, "config_id": _config_id(trial_id, model), **shift_identity(model)}
        try:
            shifted = make_shifted(model)
        except Exception as error:  # a task's own code, whatever it raises
            test = model.splits["test"]
            none = Shifted(UNSHIFTED, BY_TASK, 0, None, test)
            rows.append(identity | _place(none) | _nothing(error))
            continue
        within: dict[str, float | None] = {}
        for item in shifted:
            try:
                answered = answer_split(model, item.split)
            except Exception as error:  # a task's own code, whatever it raises
                rows.append(identity | _place(item) | _nothing(error))
                continue
            if item.step == 0:
                within[item.shift] = _near_within(answered)
            rows.append(identity | _place(item) | _figures(answered, within.get(item.shift)))
    return rows


def _config_id(trial_id: str, model: Trained) -> str:
    """A trial's id is its config's and its seed."""
    return trial_id.removesuffix(f"-s{model.seed}")


def _place(item: Shifted) -> dict[str, Any]:
    return {
        "shift": item.shift,
        "made_by": item.made_by,
        "step": item.step,
        "level": item.level,
        "rows": len(item.split),
        "labelled_bottom": 0,
    }


def _nothing(error: BaseException) -> dict[str, Any]:
    return {**dict.fromkeys(_FIGURES, float("nan")), "error": error_line(error)}


def _near_within(answered: Answered) -> float | None:
    if answered.distance is None:
        return None
    return float(np.quantile(answered.distance, NEAR_SHARE, method="higher"))


def _figures(answered: Answered, within: float | None) -> dict[str, Any]:
    coverage, error = risk_curve(answered.curve)
    labelled = answered.labelled
    figures: dict[str, Any] = {
        **answered.metrics,
        "labelled_bottom": int(labelled.sum()),
        "curve_coverage": coverage,
        "curve_error": error,
        "curve_area": curve_area(coverage, error),
        "bottom_auc": lower_auc(answered.certainty, labelled) if 0 < labelled.sum() < labelled.size else None,
        "error": "",
    }
    if answered.distance is None or within is None:
        return figures
    near = answered.distance <= within
    return figures | {
        "pole_correlation": rank_correlation(answered.certainty, answered.distance),
        "near_within": within,
        "near_rows": int(near.sum()),
        "bottoms_near": share_of(answered.bottom, near) if near.any() else None,
        "bottoms_far": share_of(answered.bottom, ~near) if (~near).any() else None,
    }
