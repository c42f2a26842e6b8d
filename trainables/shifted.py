"""Data further and further from those of training, and what a trained model answers on them.

A task that knows its truth draws them anew (`Task.shifts`). For any other they are made of its test split:
less of it, or with noise on the inputs. What the answers amount to is computed elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from scm.data import Split
from scm.inference.strict import InferenceConfig, strict_inference
from scm.seeding import generator, seeded_init
from scm.trial import Decoded
from trainables.curves import risk_points, smallest_tau
from trainables.scoring import STANDARD_METRICS, metric_columns
from trainables.tasks.protocol import POLE_DISTANCE, task_shifts
from trainables.trained import Trained

BY_TASK, BY_DATA = "task", "data"
UNSHIFTED = "none"
LEFT_OUT = (0.5, 0.75, 0.9)
NOISES = (0.05, 0.1, 0.2, 0.5)  # in standard deviations of each input column
LEAST_ROWS = 8  # of fewer rows with a value, an error says nothing
_CURVE_LEVELS = 20
_MOST_BOTTOMS = 2_000  # training rows that distances are taken to
_BATCH = 4_096

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class Shifted:
    """One level of one shift. step: its place, 0 for data that are not shifted, whose level is None."""

    shift: str
    made_by: str
    step: int
    level: float | None
    split: Split


@dataclass(frozen=True, slots=True, eq=False)
class Answered:
    """What a model answers on a split, by row.

    metrics: coverage and `STANDARD_METRICS` at tau_infer. curve: (coverage, accepted_error) at thresholds
    that keep less and less. certainty (N,): the smallest |Q| of a row, -1 where it is a fault. bottom (N,):
    some output of the row is bottom. labelled (N,): some output should be. distance (N,): to the nearest
    pole, None where that is not known.
    """

    metrics: Mapping[str, float]
    curve: Sequence[tuple[float, float]]
    certainty: Floats
    bottom: Bools
    labelled: Bools
    distance: Floats | None


def make_shifted(trained: Trained) -> list[Shifted]:
    """All shifts of a trained model's task at the model's seed, each beginning with data not shifted.

    Where none can be made (inputs that are no numbers) there is the test split alone, as the shift "none".
    Raises what the task's `shifts` raises, and `TaskError` for what it must not return.
    """
    test = trained.splits["test"]
    with seeded_init(trained.seed, "shifts"):  # a task that draws from the global generators repeats itself
        found = task_shifts(trained.task, trained.seed, test)
    made_by = BY_DATA if found is None else BY_TASK
    by_name = _shifts_of_data(trained) if found is None else found
    shifted = []
    for name, levels in by_name.items():
        with_first = levels if levels[0][0] is None else [(None, test), *levels]
        for step, (level, split) in enumerate(with_first):
            shifted.append(Shifted(name, made_by, step, None if level is None else float(level), split))
    return shifted or [Shifted(UNSHIFTED, made_by, 0, None, test)]


def answer_split(trained: Trained, split: Split) -> Answered:
    """Let the model answer a split, at its tau_infer and at the thresholds of the curve."""
    outputs = _outputs(trained, split)
    settings = trained.settings
    decoded = _decode(outputs, settings.tau_infer)
    certainty = _rows(decoded.q_abs.to(torch.float64), split).amin(dim=1)
    certainty = torch.where(_rows(decoded.fault, split).any(dim=1), -1.0, certainty)
    lenient = _decode(outputs, smallest_tau(outputs[1].dtype))
    many = Decoded(*(item[None] for item in lenient if item is not None))
    curve = risk_points(trained.task, split, [settings], many, levels=_CURVE_LEVELS)[0]
    distance = split.extras.get(POLE_DISTANCE)
    return Answered(
        metrics=_scores(trained, decoded, split),
        curve=curve,
        certainty=certainty.numpy(),
        bottom=_rows(decoded.bottom, split).any(dim=1).numpy(),
        labelled=_rows(torch.as_tensor(split.targets.mask_semantic), split).any(dim=1).numpy(),
        distance=None if distance is None else distance.to(torch.float64).numpy(),
    )


def _outputs(trained: Trained, split: Split) -> tuple[Tensor, Tensor]:
    weight = next(trained.model.parameters())
    inputs = split.inputs.to(weight.dtype) if split.inputs.is_floating_point() else split.inputs
    parts: list[tuple[Tensor, Tensor]] = []
    with torch.no_grad():
        for rows in inputs.split(_BATCH):
            P, Q = trained.model(rows.to(weight.device))[:2]
            parts.append((P.cpu(), Q.cpu()))
    numerators, denominators = zip(*parts, strict=True)
    return torch.cat(numerators), torch.cat(denominators)


def _decode(outputs: tuple[Tensor, Tensor], tau: float) -> Decoded:
    P, Q = outputs
    result = strict_inference(P, Q, InferenceConfig(tau_infer=tau))
    return Decoded(result.decoded, result.bottom_mask, result.fault_mask, Q.abs(), P)


def _scores(trained: Trained, decoded: Decoded, split: Split) -> dict[str, float]:
    told = metric_columns(trained.task.metrics(decoded, split, trained.settings), trained.task.name)
    answered = 1.0 - float(decoded.bottom.to(torch.float64).mean())
    return {"coverage": answered, **{name: told[name] for name in STANDARD_METRICS}}


def _rows(values: Tensor, split: Split) -> Tensor:
    return values.reshape(len(split), -1)


def _shifts_of_data(trained: Trained) -> dict[str, list[tuple[float | None, Split]]]:
    train, test = trained.splits["train"], trained.splits["test"]
    if not test.inputs.is_floating_point() or test.inputs.ndim != 2:
        return {}
    known = train.inputs.to(torch.float64)
    scale = known.std(dim=0, correction=0)
    # A column of two values says yes or no: with noise on it, it would say what no row can say.
    varying = torch.tensor([len(column.unique()) > 2 for column in known.T], dtype=torch.bool)
    distance = _distance_to_bottoms(train, test, scale)
    near = replace(test, extras={**test.extras, POLE_DISTANCE: distance}) if distance is not None else test
    made: dict[str, list[tuple[float | None, Split]]] = {}
    if distance is not None:
        labelled = _rows(torch.as_tensor(test.targets.mask_semantic), test).any(dim=1)
        made["near_pole"] = [(None, near), *_nearest(near, distance, always=labelled)]
    if bool(varying.any()):
        apart = ((test.inputs.to(torch.float64) - known.mean(dim=0)) / scale)[:, varying].abs()
        none = torch.zeros(len(test), dtype=torch.bool)
        made["longer_range"] = [(None, near), *_nearest(near, -apart.amax(dim=1), always=none)]
        spread = torch.where(varying, scale, 0.0)
        made["noise"] = [(None, near)]
        for noise in NOISES:
            drawn = torch.randn(
                test.inputs.shape,
                generator=generator(trained.seed, f"shift noise {noise}"),
                dtype=torch.float64,
            )
            noisy = test.inputs + (noise * spread * drawn).to(test.inputs.dtype)
            made["noise"].append((noise, replace(near, inputs=noisy)))
    return {name: levels for name, levels in made.items() if len(levels) > 1}


def _nearest(split: Split, distance: Tensor, *, always: Tensor) -> Iterator[tuple[float, Split]]:
    """Leave out more and more of the rows with the largest distance; `always` marks rows that stay."""
    ranked = torch.argsort(torch.where(always, -torch.inf, distance), stable=True)
    kept, others = int(always.sum()), len(split) - int(always.sum())
    for share in LEFT_OUT:
        part = _take(split, ranked[: kept + round((1.0 - share) * others)].sort().values)
        if int(_rows(torch.as_tensor(part.targets.mask_finite), part).any(dim=1).sum()) >= LEAST_ROWS:
            yield share, part


def _take(split: Split, rows: Tensor) -> Split:
    return Split(
        inputs=split.inputs[rows],
        targets=split.targets.index(rows),
        extras={name: extra[rows] for name, extra in split.extras.items()},
    )


def _distance_to_bottoms(train: Split, test: Split, scale: Tensor) -> Tensor | None:
    """How far each test row seems to be from a pole: a stand-in for what only a generator knows.

    With rows labelled bottom in training, the distance of the inputs (in standard deviations) to the nearest
    of them, 0 for one labelled so itself; without any, 1 / (1 + |label|), as a quotient grows towards a pole.
    """
    labelled = _rows(torch.as_tensor(train.targets.mask_semantic), train).any(dim=1)
    should = _rows(torch.as_tensor(test.targets.mask_semantic), test).any(dim=1)
    unit = torch.where(scale > 0, scale, 1.0)
    if bool(labelled.any()):
        bottoms = (train.inputs.to(torch.float64) / unit)[labelled][:_MOST_BOTTOMS]
        inputs = test.inputs.to(torch.float64) / unit
        apart = torch.cat([torch.cdist(rows, bottoms).amin(dim=1) for rows in inputs.split(_BATCH)])
        return torch.where(should, 0.0, apart)
    finite = _rows(torch.as_tensor(test.targets.mask_finite), test)
    size = _rows(torch.as_tensor(test.targets.Y_n), test).to(torch.float64).abs()
    largest = torch.where(finite, size, 0.0).amax(dim=1)
    return 1.0 / (1.0 + largest) if bool((largest > 0).any()) else None


def shift_identity(trained: Trained) -> dict[str, Any]:
    """What every row of a model's shifts says of the model."""
    return {
        "seed": trained.seed,
        "model_digest": trained.digest,
        "error_unit": trained.task.error_unit,
        "tau_infer": trained.settings.tau_infer,
    }
