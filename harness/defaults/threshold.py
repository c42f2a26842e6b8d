"""Freezing tau_infer: chosen on rows that trained no model, chose no config and are reported on nowhere.

A share of the training rows is held back, models are trained on the rest, and the threshold is the largest
that rejects no more of the held-back rows than the config did on the validation rows on which it was chosen:
the operating point stays, and what was guessed or searched becomes what was measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from harness.defaults.confirm import Bench, one_thread
from harness.defaults.scenarios import Scenario
from harness.errors import one_line
from search_spaces.identity import trial_id
from trainables.held_back import CALIBRATION, CalibrationRecord, calibrate_together, hold_back
from trainables.trained import Trained, train_models
from trainables.trial import error_line

HELD_BACK = 0.15
"""The share of the training rows that is held back."""


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
        record = calibrate_together(
            list(models.values()), max_false_reject=bound, tau_max=float(config["tau_train_min"])
        )
    except ValueError as error:  # no threshold, or too few rows
        return none(one_line(error))
    except Exception as error:  # of a task's own model, whatever it raises
        return none(f"the models could not be asked for their denominators: {one_line(error_line(error))}")
    return Threshold(record, "", bound, tuple(seeds), models)
