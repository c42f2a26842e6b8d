"""Freezing tau_infer: chosen on rows that trained no model, chose no config and are reported on nowhere.

A share of the training rows is held back, models are trained on the rest, and the threshold is the largest
that rejects no more of the held-back rows than the config did on the validation rows on which it was chosen:
the operating point stays, and what was guessed or searched becomes what was measured.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from harness.defaults.confirm import Bench, one_thread
from harness.defaults.scenarios import Scenario
from harness.errors import one_line
from scm.inference.calibration import CalibrationError, CalibrationRecord, calibrate
from search_spaces.identity import trial_id
from trainables.held_back import CALIBRATION, denominators, hold_back
from trainables.trained import Trained, train_models
from trainables.trial import error_line

HELD_BACK = 0.15
"""The share of the training rows that is held back."""
LEAST_ROWS = 20
"""Held-back rows with a value, over all models; on fewer a rate says nothing."""


@dataclass(frozen=True, slots=True)
class Threshold:
    """A frozen threshold, or why there is none.

    record: over the held-back rows of all models together; a single model's would be too few on a small
    table. models: by seed, each trained without its own held-back rows.
    """

    record: CalibrationRecord | None
    why_not: str = ""
    max_false_reject: float | None = None
    seeds: tuple[int, ...] = ()
    models: Mapping[int, Trained] = field(default_factory=dict)


def freeze_threshold(
    config: Mapping[str, Any],
    scenario: Scenario,
    seeds: Sequence[int],
    *,
    max_false_reject: float,
    bench: Bench,
) -> Threshold:
    """Calibrate a config's tau_infer, at most its tau_train_min, for this share of rejected in-range rows."""
    text = f"calibrating tau_infer: {len(seeds)} trainings on {scenario.name}"
    bench.say(text)
    bound = min(max(max_false_reject, 0.0), 0.999)

    def none(why: str) -> Threshold:
        return Threshold(None, why, bound, tuple(seeds))

    with one_thread():
        ended = train_models(
            scenario.spec,
            [(trial_id(CALIBRATION, seed), config, seed) for seed in seeds],
            device=bench.device,
            on_epoch=lambda: bench.say(text),
            shelf=bench.shelf(scenario),
            deal=lambda splits, seed: hold_back(splits, seed, share=HELD_BACK),
        )
    models: dict[int, Trained] = {}
    for seed in seeds:
        one = ended[trial_id(CALIBRATION, seed)]
        if not isinstance(one, Trained):
            return none(f"a training without the held-back rows failed: {one['error']}")
        if one.outcome["status"] == "diverged" or one.outcome["nan_count"]:
            return none(f"a training without the held-back rows met non-finite values (seed {seed})")
        models[seed] = one
    try:
        found = {seed: denominators(model, model.splits[CALIBRATION]) for seed, model in models.items()}
    except Exception as error:  # of a task's own model, whatever it raises
        return none(f"the models could not be asked for their denominators: {one_line(error_line(error))}")
    q_abs = torch.cat([q for q, _, _ in found.values()])
    in_range = torch.cat([has_value for _, has_value, _ in found.values()])
    if int(in_range.sum()) < LEAST_ROWS:
        return none(
            f"{int(in_range.sum())} held-back rows with a value are too few, at least {LEAST_ROWS} are needed"
        )
    gauges = {gauge for _, _, gauge in found.values()}
    asked: dict[str, Any] = {
        "split": CALIBRATION,
        "max_false_reject": bound,
        "gauge": gauges.pop() if len(gauges) == 1 else "raw",
        "tau_max": float(config["tau_train_min"]),
        "tau_min": min(1e-12, float(config["tau_train_min"])),
    }
    digests = "".join(model.splits[CALIBRATION].digest() for model in models.values())
    together = hashlib.sha256(digests.encode()).hexdigest()
    try:
        record = calibrate(q_abs, in_range, data_hash=together, **asked)
    except (CalibrationError, ValueError) as error:
        return none(one_line(error))
    for model in models.values():
        for name in ("val", "test"):
            record.check_not_reported_on(name, model.splits[name].digest())
    return Threshold(record, "", bound, tuple(seeds), models)
