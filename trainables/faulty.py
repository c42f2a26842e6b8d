"""Faults done to a training: to the rows that it is fed, to its order, its outputs, its rate, its threshold.

Which faults there are, how strong they get and how long they last is decided in `harness.robustness.faults`.
Here is what each of them does, and nothing else: whatever a fault does not name stays bit for bit what it
was. Held-out splits are never touched, and an answer is always that of the plain model.
"""

from __future__ import annotations

import inspect
import json
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scm.data import Split
from scm.packed.streams import EpochStream, row_orders
from scm.seeding import generator
from scm.training.checkpoint import read_checkpoint, write_checkpoint
from scm.training.targets import SEMANTIC, STATUS_CODES, SemanticTargets, lift_semantic_targets
from scm.trial import Decoded, decode_split
from scm.trial_config import TrialConfig
from trainables.lane_states import AloneState, LaneState, pack_folder, unpack_folder
from trainables.scoring import metric_columns
from trainables.tasks.protocol import LossFn, Task

_NON_FINITE = (math.nan, math.inf, -math.inf)
_SHARE_OF_OUTLIERS = 0.02
_TARGET_FIELDS = tuple(item.name for item in fields(SemanticTargets))


class InapplicableFaultError(ValueError):
    """A fault that says nothing about this task or config; the message says why, in words for a report."""


def source_of(fault: str, seed: int) -> torch.Generator:
    """Where a fault draws from in a trial of this seed; the trial's own streams stay as they are."""
    return generator(seed, f"fault.{fault}")


# --- faults of rows: (split, strength, source) -> split -----------------------------------------------
#
# Rows are drawn from the source in an order that does not depend on the strength, so that what a strong
# fault hits includes what a weaker one does.

RowFault = Callable[[Split, float, torch.Generator], Split]


def spoil_inputs(split: Split, share: float, source: torch.Generator) -> Split:
    """All inputs of a share of the rows become NaN, +inf or -inf, in turns."""
    _check_floats(split.inputs, "inputs")
    inputs = split.inputs.clone()
    rows = _drawn(torch.arange(len(split)), share, source)
    for turn, value in enumerate(_NON_FINITE):
        inputs[rows[turn::3]] = value
    return Split(inputs, split.targets, split.extras)


def spoil_labels(split: Split, share: float, source: torch.Generator) -> Split:
    """The labels of a share of the finite rows become NaN, +inf or -inf, and pass for finite all the same."""
    targets = split.targets
    _check_floats(targets.Y_n, "labels")
    rows = _drawn(_rows_with(targets.mask_finite, "a finite label"), share, source)
    labels = targets.Y_n.clone()
    for turn, value in enumerate(_NON_FINITE):
        own = rows[turn::3]
        labels[own] = torch.where(targets.mask_finite[own], value, labels[own])
    return Split(split.inputs, replace(targets, Y_n=labels), split.extras)


def outlie_inputs(split: Split, size: float, source: torch.Generator) -> Split:
    """The inputs of 2 % of the rows move by `size` times each input's deviation, up or down."""
    _check_floats(split.inputs, "inputs")
    rows = _drawn(torch.arange(len(split)), _SHARE_OF_OUTLIERS, source)
    spread = split.inputs.std(dim=0, correction=0)
    spread = torch.where(spread > 0, spread, torch.ones_like(spread))
    inputs = split.inputs.clone()
    inputs[rows] = inputs[rows] + size * _signs(inputs[rows], source) * spread
    return Split(inputs, split.targets, split.extras)


def outlie_labels(split: Split, size: float, source: torch.Generator) -> Split:
    """The labels of 2 % of the finite rows move by `size` times the labels' deviation, up or down."""
    targets = split.targets
    _check_floats(targets.Y_n, "labels")
    rows = _drawn(_rows_with(targets.mask_finite, "a finite label"), _SHARE_OF_OUTLIERS, source)
    spread = float(targets.Y_n[targets.mask_finite].std(correction=0)) or 1.0
    own = targets.Y_n[rows]
    moved = own + size * spread * _signs(own, source)
    labels = targets.Y_n.clone()
    labels[rows] = torch.where(targets.mask_finite[rows], moved, own)
    return Split(split.inputs, replace(targets, Y_n=labels), split.extras)


def flip_labels(split: Split, share: float, source: torch.Generator) -> Split:
    """A share of the finite rows becomes bottom, the same share of the bottoms the label of a finite row."""
    targets = split.targets
    finite = _rows_with(targets.mask_finite, "a finite label")
    bottom = _rows_with(targets.mask_semantic, "a bottom to flip")
    given = targets.Y_n[targets.mask_finite]
    drawn = torch.randint(len(given), targets.Y_n.shape, generator=source)
    to_bottom = _entries_of(targets.mask_finite, _drawn(finite, share, source))
    to_finite = _entries_of(targets.mask_semantic, _drawn(bottom, share, source))
    codes = torch.where(to_bottom, STATUS_CODES["bottom"], STATUS_CODES["finite"])
    values = torch.where(to_bottom, targets.Y_n, given[drawn])
    return _relabelled(split, to_bottom | to_finite, values, codes)


def mistake_status(split: Split, share: float, source: torch.Generator) -> Split:
    """A share of the rows gets a wrong status: what is told of it is another reason than the true one.

    Finite becomes missing, censored below and above are taken for each other, a bottom without direction
    becomes a fault, and a fault or a missing row a bottom.
    """
    targets = split.targets
    codes = torch.full(targets.Y_n.shape, STATUS_CODES["bottom"])
    codes[targets.mask_finite] = STATUS_CODES["missing"]
    codes[targets.bottom_kind == SEMANTIC] = STATUS_CODES["fault"]
    codes[targets.orientation_label < 0] = STATUS_CODES["censored_above"]
    codes[targets.orientation_label > 0] = STATUS_CODES["censored_below"]
    rows = _drawn(torch.arange(len(split)), share, source)
    hit = _entries_of(torch.ones_like(targets.mask_finite), rows)
    return _relabelled(split, hit, torch.zeros_like(targets.Y_n), codes)


def _check_floats(values: Tensor, what: str) -> None:
    if not values.is_floating_point():
        kind = str(values.dtype).removeprefix("torch.")
        raise InapplicableFaultError(f"the {what} must be floating point to be changed so, they are {kind}")


def _rows_with(mask: Tensor, what: str) -> Tensor:
    rows: Tensor = mask.flatten(1).any(1) if mask.ndim > 1 else mask
    found = rows.nonzero().flatten()
    if not len(found):
        raise InapplicableFaultError(f"no training row has {what}")
    return found


def _drawn(rows: Tensor, share: float, source: torch.Generator) -> Tensor:
    """A share of the rows, at least one."""
    order = torch.randperm(len(rows), generator=source)
    return rows[order[: max(1, round(share * len(rows)))]]


def _signs(like: Tensor, source: torch.Generator) -> Tensor:
    """+1 or -1 a row, in a shape that spreads over the row."""
    signs = torch.randint(2, (len(like),), generator=source) * 2 - 1
    return signs.to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))


def _entries_of(mask: Tensor, rows: Tensor) -> Tensor:
    """The entries of a mask that are in these rows."""
    chosen = torch.zeros_like(mask)
    chosen[rows] = mask[rows]
    return chosen


def _relabelled(split: Split, entries: Tensor, values: Tensor, codes: Tensor) -> Split:
    """The split with other labels at some entries."""
    codes = torch.where(entries, codes, STATUS_CODES["bottom"])  # so that no value of another is looked at
    lifted = lift_semantic_targets(values, codes)
    held = {
        name: torch.where(entries, getattr(lifted, name), getattr(split.targets, name))
        for name in _TARGET_FIELDS
    }
    return Split(split.inputs, SemanticTargets(**held), split.extras)


# --- faults of batches: (split, batches, hit, source) -> split ----------------------------------------
#
# The rows of an epoch come in an order that the trial's seed decides. A batch is changed by changing the rows
# that will be in it.

BatchFault = Callable[[Split, Sequence[Tensor], Sequence[int], torch.Generator], Split]


def batches_of(split: Split, batch_size: int, seed: int, epoch: int) -> list[Tensor]:
    """The rows of each batch of an epoch (from 0), as a trial of this seed is fed them."""
    return list(_orders(len(split)).of(seed, epoch).split(batch_size))


@lru_cache(maxsize=8)
def _orders(rows: int) -> EpochStream:
    return row_orders(rows)


def poison_batches(
    split: Split, batches: Sequence[Tensor], hit: Sequence[int], source: torch.Generator
) -> Split:
    """One row of each batch that is hit has inputs that are NaN, +inf or -inf."""
    _check_floats(split.inputs, "inputs")
    inputs = split.inputs.clone()
    for batch in hit:
        rows = batches[batch]
        place, kind = (int(torch.randint(limit, (), generator=source)) for limit in (len(rows), 3))
        inputs[rows[place]] = _NON_FINITE[kind]
    return Split(inputs, split.targets, split.extras)


def duplicate_batches(
    split: Split, batches: Sequence[Tensor], hit: Sequence[int], source: torch.Generator
) -> Split:
    """Each batch that is hit is the one before it once more, and its own rows are not seen."""
    taken = torch.arange(len(split))
    for batch in hit:
        before = batches[batch - 1]  # of the first, the last
        own = batches[batch]
        taken[own] = before[torch.arange(len(own)) % len(before)]
    return _taken(split, taken)


def sort_batches(
    split: Split, batches: Sequence[Tensor], hit: Sequence[int], source: torch.Generator
) -> Split:
    """The rows of all batches that are hit come sorted by their labels, bottoms last, instead of shuffled."""
    if len(hit) < 2:
        return split
    places = torch.cat([batches[batch] for batch in sorted(hit)])
    targets = split.targets.index(places)
    first = targets.Y_n.flatten(1)[:, 0] if targets.Y_n.ndim > 1 else targets.Y_n
    finite = targets.mask_finite.flatten(1)[:, 0] if targets.mask_finite.ndim > 1 else targets.mask_finite
    label = torch.where(finite, first.double(), math.inf)
    taken = torch.arange(len(split))
    taken[places] = places[label.argsort(stable=True)]
    return _taken(split, taken)


def _taken(split: Split, rows: Tensor) -> Split:
    extras = {name: extra[rows] for name, extra in split.extras.items()}
    return Split(split.inputs[rows], split.targets.index(rows), extras)


# --- faults of outputs: marks beside the inputs, and a model that reads them --------------------------

MARKS = ("scale", "gradient", "half")
"""What a mark of a row asks for, one number each, 0 for nothing; in the order of the columns."""


def marked_split(split: Split, rows: Tensor | None = None, kind: str = MARKS[0], mark: int = 0) -> Split:
    """The split with a column for each of `MARKS` behind its inputs, `mark` in these rows and else 0."""
    if split.inputs.ndim < 2:
        raise InapplicableFaultError("the inputs have no last dimension to mark rows in")
    marks = split.inputs.new_zeros((*split.inputs.shape[:-1], len(MARKS)))
    if rows is not None:
        marks[rows, ..., MARKS.index(kind)] = mark
    return Split(torch.cat([split.inputs, marks], dim=-1), split.targets, split.extras)


def unmarked_split(split: Split) -> Split:
    """What `marked_split` was made of."""
    return Split(split.inputs[..., : -len(MARKS)], split.targets, split.extras)


class MarkedTask:
    """A task whose models read `MARKS` behind the inputs: the same weights, the same answers where unmarked.

    A row marked "scale" has P and Q times the largest number of their dtype to the power mark / 100. One
    marked "gradient" has the P and Q that it has, and their gradient times 2 ** mark. One marked "half" has P
    and Q through float16, at 2 ** mark times their size. Raises InapplicableFaultError for a loss that reads
    the inputs, and for a task whose symmetries would move the marks.
    """

    def __init__(self, task: Task) -> None:
        self._task = task
        self.name = task.name
        self.error_unit = task.error_unit
        if hasattr(task, "pack_metrics"):
            self.pack_metrics = self._pack_metrics

    def splits(self, seed: int) -> Mapping[str, Split]:
        """Give the task's splits with no row marked."""
        return {name: marked_split(split) for name, split in self._task.splits(seed).items()}

    def build_model(self, config: TrialConfig) -> nn.Module:
        """Build the task's model, with another forward; parameters keep their names and order."""
        model = self._task.build_model(config)
        model.forward = partial(_marked_forward, model.forward)
        return model

    def make_loss(self, config: TrialConfig) -> LossFn | None:
        """Give the task's loss."""
        return self._task.make_loss(config)

    def metrics(self, decoded: Decoded, split: Split, config: TrialConfig) -> dict[str, float]:
        """Score as the task does."""
        return self._task.metrics(decoded, unmarked_split(split), config)

    def _pack_metrics(
        self, decoded: Decoded, split: Split, configs: Sequence[TrialConfig]
    ) -> list[dict[str, float]]:
        many: list[dict[str, float]] = self._task.pack_metrics(  # type: ignore[attr-defined]
            decoded, unmarked_split(split), configs
        )
        return many


def check_markable(task: Task, config: TrialConfig) -> None:
    """Raise InapplicableFaultError where something else than the model would see the marks."""
    if config.lambda_equivariance > 0:
        raise InapplicableFaultError("lambda_equivariance turns the inputs, in which this fault marks rows")
    loss = task.make_loss(config)
    if loss is not None and "inputs" in inspect.signature(loss).parameters:
        raise InapplicableFaultError("the task's loss reads the inputs, in which this fault marks rows")


def check_batches_known(config: TrialConfig) -> None:
    """Raise InapplicableFaultError where the batches of an epoch are not those of the seed's shuffle."""
    if config.sampling != "shuffle":
        raise InapplicableFaultError(
            f"sampling={config.sampling!r} draws batches as it learns, so that none can be named before"
        )


def _marked_forward(forward: Callable[[Tensor], Any], inputs: Tensor) -> tuple[Any, ...]:
    outputs = forward(inputs[..., : -len(MARKS)])
    P, Q, *others = outputs
    scale, gradient, half = inputs.flatten(1)[:, -len(MARKS) :].unbind(1)
    return (*(_marked(held, scale, gradient, half) for held in (P, Q)), *others)


def _marked(values: Tensor, scale: Tensor, gradient: Tensor, half: Tensor) -> Tensor:
    bits = math.ceil(math.log2(torch.finfo(values.dtype).max))
    spike = torch.exp2(_spread(gradient, values))
    values = values + (spike - 1.0) * (values - values.detach())
    # In two steps, because the whole factor may be no number of this dtype.
    root = torch.exp2(_spread(scale, values) * (bits / 200.0))
    values = values * root * root
    size = torch.exp2(_spread(half, values))
    halved = (values * size).to(torch.float16).to(values.dtype) / size
    return torch.where(_spread(half, values) > 0, halved, values)


def _spread(mark: Tensor, values: Tensor) -> Tensor:
    return mark.to(values.dtype).reshape(-1, *[1] * (values.ndim - 1))


# --- the learning rate of a trial that has begun ------------------------------------------------------


def with_rate(state: LaneState | AloneState, factor: float, rate: float) -> LaneState | AloneState:
    """The state of a trial whose learning rate is now `rate`, which is `factor` times what it was."""
    if isinstance(state, LaneState):
        config = {**state.lane["config"], "learning_rate": rate}
        return replace(state, lane={**state.lane, "config": config})
    with tempfile.TemporaryDirectory(prefix="scm-state-") as name:
        folder = Path(name)
        unpack_folder(state.files, folder)
        trial = json.loads((folder / "trial.json").read_text(encoding="utf-8"))
        trial["config"]["learning_rate"] = rate
        (folder / "trial.json").write_text(json.dumps(trial), encoding="utf-8")
        if (folder / "trainer.pt").is_file():
            content = read_checkpoint(folder / "trainer.pt")
            if "learning_rate" in content["identity"]:
                content["identity"]["learning_rate"] = rate
            for group in content["optimizer"]["param_groups"]:
                group |= {key: group[key] * factor for key in ("lr", "initial_lr") if key in group}
            schedule = content["scheduler"] or {}
            for key in ("base_lrs", "_last_lr"):
                if key in schedule:
                    schedule[key] = [each * factor for each in schedule[key]]
            write_checkpoint(folder / "trainer.pt", content)
        return replace(state, files=pack_folder(folder))


# --- answers ------------------------------------------------------------------------------------------


def answers_at(
    task: Task, model: nn.Module, splits: Mapping[str, Split], config: TrialConfig, tau_infer: float
) -> dict[str, float]:
    """Coverage and metrics of a model whose answers are decoded at this threshold, named as in an outcome."""
    raised = max(tau_infer, config.tau_train_min)
    settings = replace(
        config, tau_infer=tau_infer, tau_train_min=raised, tau_train_max=max(raised, config.tau_train_max)
    )
    told: dict[str, float] = {}
    for name, before in (("val", ""), ("test", "test_")):
        decoded = decode_split(model, splits[name], tau_infer=tau_infer)
        told[f"{before}coverage"] = 1.0 - float(decoded.bottom.to(torch.float64).mean())
        scored = metric_columns(task.metrics(decoded, splits[name], settings), task.name)
        told |= {f"{before}{key}": value for key, value in scored.items()}
    return told


def trivial_errors(
    task: Task, model: nn.Module, splits: Mapping[str, Split], config: TrialConfig
) -> dict[str, float]:
    """What abstaining everywhere costs: `trivial_error` of the validation and `test_trivial_error`."""
    told = {}
    for name, before in (("val", ""), ("test", "test_")):
        decoded = decode_split(model, splits[name], tau_infer=config.tau_infer)
        nowhere = Decoded(
            torch.full_like(decoded.decoded, math.nan),
            torch.ones_like(decoded.bottom),
            torch.zeros_like(decoded.fault),
            torch.zeros_like(decoded.q_abs),
            None if decoded.numerator is None else torch.zeros_like(decoded.numerator),
        )
        charged = task.metrics(nowhere, splits[name], config).get("charged_error", math.nan)
        told[f"{before}trivial_error"] = float(charged)
    return told


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    """Whether two models of one form have the same weights, bit for bit, NaN included."""
    held, others = one.state_dict(), other.state_dict()
    return held.keys() == others.keys() and all(
        _bytes_of(item) == _bytes_of(others[name]) for name, item in held.items()
    )


def _bytes_of(values: Tensor) -> bytes:
    flat = values.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


ROW_FAULTS: dict[str, RowFault] = {
    "spoil_inputs": spoil_inputs,
    "spoil_labels": spoil_labels,
    "outlie_inputs": outlie_inputs,
    "outlie_labels": outlie_labels,
    "flip_labels": flip_labels,
    "mistake_status": mistake_status,
}
BATCH_FAULTS: dict[str, BatchFault] = {
    "poison_batches": poison_batches,
    "duplicate_batches": duplicate_batches,
    "sort_batches": sort_batches,
}
