"""The task `table`: learn from any CSV or Parquet file, censored and missing targets told by a status column.

What a file may hold, and what is said when it does not, is in `trainables.tasks.table_data`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pyarrow as pa
import torch

from scm.data import Split
from scm.models import make_model
from scm.training.targets import STATUS_CODES, STATUSES, lift_semantic_targets
from trainables.metrics import pack_metrics, standard_metrics
from trainables.tasks.protocol import SPLIT_NAMES, TaskError, check_params, nearest
from trainables.tasks.table_data import (
    KINDS,
    MISSING_RULES,
    check_columns,
    encode_inputs,
    fit_scale,
    keep_rows,
    mapped_labels,
    read_input,
    read_table,
    stratified_split,
    to_numbers,
)

if TYPE_CHECKING:
    from torch import nn

    from scm.trial import Decoded
    from scm.trial_config import TrialConfig
    from trainables.tasks.protocol import LossFn

_Scores = TypeVar("_Scores")

TRANSFORMS: tuple[str, ...] = ("none", "log")


@dataclass(frozen=True, slots=True, kw_only=True)
class TableParams:
    """What the task `table` needs to know; the one home of its defaults.

    `data`: the file. `inputs`, `target`: columns (a list of targets trains one output each). Inputs are
    always named, so that a column which gives the target away does not slip in.
    `status`: {column, values}: a column of labels (or one per target) and what each label means, one of
    `STATUSES`. A finite label on an empty target is `missing`; a censored row's target is its bound.
    `split`: {column, values}: a column that says train, val or test (through the optional map `values`);
    without it rows are dealt by `fractions`, each status in proportion, from `split_seed`, so that all
    seeds of a sweep share one split and differ in training alone.
    `missing_inputs`: error, mean (of the training split) or drop (the row); empty, NA, NaN and null cells are
    missing. `types`: a column's kind where the file's type does not say it. `max_levels`: the most levels
    that a categorical input may have.
    """

    data: Path
    inputs: tuple[str, ...]
    target: tuple[str, ...]
    target_transform: str = "none"
    status: Mapping[str, Any] | None = None
    split: Mapping[str, Any] | None = None
    fractions: tuple[float, ...] = (0.6, 0.2, 0.2)
    split_seed: int = 0
    missing_inputs: str = "error"
    types: Mapping[str, str] = field(default_factory=dict)
    max_levels: int = 64

    def __post_init__(self) -> None:
        for name, used in (("inputs", self.inputs), ("target", self.target)):
            if not used:
                raise TaskError(f"{name} must name at least one column, got none")
            if len(set(used)) < len(used):
                raise TaskError(f"{name} must name each column once, got {list(used)}")
        _check_choice("target_transform", self.target_transform, TRANSFORMS)
        _check_choice("missing_inputs", self.missing_inputs, MISSING_RULES)
        for column, kind in self.types.items():
            if column not in self.inputs:
                raise TaskError(f"types must name inputs, got {column!r}{nearest(str(column), self.inputs)}")
            _check_choice(f"type of {column!r}", kind, KINDS)
        if len(self.fractions) != 3 or not all(0 < part < 1 for part in self.fractions):
            raise TaskError(f"fractions must be three shares in (0, 1), got {list(self.fractions)}")
        if abs(sum(self.fractions) - 1) > 1e-6:
            raise TaskError(
                f"fractions must sum to 1, got {list(self.fractions)} with sum {sum(self.fractions)}"
            )
        if self.max_levels < 1:
            raise TaskError(f"max_levels must be >= 1, got {self.max_levels}")
        if len(self.status_columns) not in (0, 1, len(self.target)):
            raise TaskError(
                f"status.column must be one column or one per target, got {len(self.status_columns)} for "
                f"{len(self.target)} targets"
            )
        for role, columns in (
            ("target", self.target),
            ("status", self.status_columns),
            ("split", self.split_columns),
        ):
            leaked = [name for name in self.inputs if name in columns]
            if leaked:
                raise TaskError(f"inputs must not hold the {role} column, got {leaked[0]!r}")

    @property
    def status_columns(self) -> tuple[str, ...]:
        return _names("status.column", self.status["column"]) if self.status else ()

    @property
    def split_columns(self) -> tuple[str, ...]:
        return _names("split.column", self.split["column"]) if self.split else ()


def parse_table_params(params: Mapping[str, Any]) -> TableParams:
    """Turn a plan's words into `TableParams`; `TaskError` names the first that is unknown or does not fit."""
    known = TableParams.__dataclass_fields__
    check_params("table", params, known)
    for name in ("data", "inputs", "target"):
        if params.get(name) is None:
            raise TaskError(f"the task 'table' needs the parameter {name!r}, got {sorted(params)}")
    typed = dict(params)
    if not isinstance(typed["data"], (str, Path)):
        raise TaskError(f"data must be a path, got {typed['data']!r}")
    typed["data"] = Path(typed["data"])
    typed["inputs"] = _names("inputs", typed["inputs"])
    typed["target"] = _names("target", typed["target"])
    for name, needed in (("status", ("column", "values")), ("split", ("column",))):
        if typed.get(name) is not None:
            typed[name] = _section(name, typed[name], needed)
    if "fractions" in typed:
        if not isinstance(typed["fractions"], Sequence) or not all(map(_is_real, typed["fractions"])):
            raise TaskError(f"fractions must be three numbers, got {typed['fractions']!r}")
        typed["fractions"] = tuple(float(part) for part in typed["fractions"])
    for name in ("split_seed", "max_levels"):
        if name in typed and (not isinstance(typed[name], int) or isinstance(typed[name], bool)):
            raise TaskError(f"{name} must be a whole number, got {typed[name]!r}")
    if typed.get("split_seed", 0) < 0:
        raise TaskError(f"split_seed must be >= 0, got {typed['split_seed']}")
    if not isinstance(typed.get("types", {}), Mapping):
        raise TaskError(f"types must map inputs to kinds ({', '.join(KINDS)}), got {typed['types']!r}")
    return TableParams(**typed)


def make_table_task(params: Mapping[str, Any]) -> TableTask:
    """Read the file and make the task; `TaskError` says in one line what is wrong with words or data."""
    return TableTask(parse_table_params(params))


class TableTask:
    """A table's rows as splits of standardised inputs and projective targets, scored in the target's unit.

    Inputs and target are standardised with the training split's mean and deviation alone. The split does not
    depend on the trial's seed. Each `Split.extras` holds `value`, the target as recorded (float64; a censored
    row's bound; NaN where missing), and `status`, its code (int64), both of the targets' shape: (N,) for one
    target and (N, O) for several.
    """

    name = "table"

    def __init__(self, params: TableParams) -> None:
        self.params = params
        table = read_table(params.data, (*params.status_columns, *params.split_columns))
        file = params.data.name
        check_columns(table, "target", params.target, file)
        check_columns(table, "inputs", params.inputs, file)
        check_columns(table, "status.column", params.status_columns, file)
        check_columns(table, "split.column", params.split_columns, file)
        value, status = _read_targets(table, params)
        columns = [read_input(table, name, params.types.get(name)) for name in params.inputs]
        keep = keep_rows(columns, params.missing_inputs)
        rows = _read_split_column(table, params, keep) or _deal_rows(status, params, keep)
        _check_split_rows(rows, status)

        inputs, self.features = encode_inputs(columns, rows["train"], params.max_levels)
        self.error_unit = ", ".join(params.target)
        self._fit_target(value[rows["train"]], status[rows["train"]])
        self._splits = {name: self._make_split(inputs, value, status, rows[name]) for name in SPLIT_NAMES}

    def splits(self, seed: int) -> Mapping[str, Split]:
        """Give the splits, which are the same for every seed (see `TableParams.split_seed`)."""
        return self._splits

    def build_model(self, config: TrialConfig) -> nn.Module:
        """Build the config's head on as many inputs as there are features, with one output per target."""
        return make_model(config, len(self.features), len(self.params.target))

    def make_loss(self, config: TrialConfig) -> LossFn | None:
        """Take the config's own loss."""
        return None

    def metrics(self, decoded: Decoded, split: Split, config: TrialConfig) -> dict[str, float]:
        """Score in the target's unit; an abstention is charged the error of answering the training median."""
        return self._scored(standard_metrics, decoded, split)

    def pack_metrics(
        self, decoded: Decoded, split: Split, configs: Sequence[TrialConfig]
    ) -> list[dict[str, float]]:
        """Score many trials at once; of `decoded`, every tensor has the trials before the rows."""
        return self._scored(pack_metrics, decoded, split)

    def _scored(self, score: Callable[..., _Scores], decoded: Decoded, split: Split) -> _Scores:
        value, status = split.extras["value"], split.extras["status"]
        prediction = self.to_target_units(decoded.decoded.to(value.device))
        return score(
            prediction,
            ~decoded.bottom.to(value.device),
            value,
            status,
            baseline=self.baseline.to(value.device),
        )

    def to_target_units(self, standardised: torch.Tensor) -> torch.Tensor:
        """Undo standardisation and transform: float64, of the same shape (N,) or (N, O)."""
        centre, scale = self._centre, self._scale
        restored = standardised.to(torch.float64) * scale.to(standardised.device) + centre.to(
            standardised.device
        )
        return restored.exp() if self.params.target_transform == "log" else restored

    def _fit_target(self, value: np.ndarray, status: np.ndarray) -> None:
        """Fit scale and baseline on the finite rows of the training split, given as (N, O) each."""
        fits, medians = [], []
        for output in range(value.shape[1]):
            finite = value[status[:, output] == STATUS_CODES["finite"], output]
            fits.append(fit_scale(self._transformed(finite), f"target {self.params.target[output]!r}"))
            medians.append(float(np.median(finite)))
        shape = (-1,) if value.shape[1] > 1 else ()
        self._centre = torch.tensor([centre for centre, _ in fits], dtype=torch.float64).reshape(shape)
        self._scale = torch.tensor([scale for _, scale in fits], dtype=torch.float64).reshape(shape)
        self.baseline = torch.tensor(medians, dtype=torch.float64).reshape(shape)

    def _transformed(self, value: np.ndarray) -> np.ndarray:
        return np.log(value) if self.params.target_transform == "log" else value

    def _make_split(
        self, inputs: np.ndarray, value: np.ndarray, status: np.ndarray, rows: np.ndarray
    ) -> Split:
        value, status = value[rows], status[rows]
        if value.shape[1] == 1:
            value, status = value[:, 0], status[:, 0]
        finite = status == STATUS_CODES["finite"]
        payload = self._transformed(np.where(finite, value, 1.0))
        standardised = ((torch.from_numpy(payload) - self._centre) / self._scale).to(torch.float32)
        beyond = np.argwhere(finite & ~standardised.isfinite().numpy())
        if beyond.size:
            raise TaskError(
                "a target must stay within float32 when scaled as the training split is, got "
                f"{value[tuple(beyond[0])]} in row {rows[beyond[0][0]] + 1}"
            )
        codes = torch.from_numpy(status)
        return Split(
            inputs=torch.from_numpy(inputs[rows]).to(torch.float32),
            targets=lift_semantic_targets(standardised, codes),
            extras={"value": torch.from_numpy(value), "status": codes},
        )


def _read_targets(table: pa.Table, params: TableParams) -> tuple[np.ndarray, np.ndarray]:
    """Give recorded values (N, O) float64 and status codes (N, O) int64; refuses what cannot be a target."""
    value = np.stack([to_numbers(name, table.column(name)) for name in params.target], axis=1)
    status = np.full(value.shape, STATUS_CODES["finite"], dtype=np.int64)
    for output in range(value.shape[1]) if params.status else ():
        assert params.status is not None
        column = params.status_columns[min(output, len(params.status_columns) - 1)]
        labels = mapped_labels(table, column, params.status["values"], STATUSES, "status")
        unlabelled = np.flatnonzero((labels == "") & ~np.isnan(value[:, output]))
        if unlabelled.size:
            raise TaskError(
                f"every row with a target must have a status, got none in column {column!r}, "
                f"row {unlabelled[0] + 1}"
            )
        status[:, output] = [STATUS_CODES[label or "missing"] for label in labels]
    status[(status == STATUS_CODES["finite"]) & np.isnan(value)] = STATUS_CODES["missing"]
    for output, name in enumerate(params.target):
        finite = status[:, output] == STATUS_CODES["finite"]
        if (status[:, output] == STATUS_CODES["missing"]).all():
            raise TaskError(
                f"the target {name!r} must have values, got none in {len(value)} rows of {params.data.name}"
            )
        _refuse(
            finite & np.isinf(value[:, output]), value[:, output], f"a finite target {name!r} must be finite"
        )
        if params.target_transform == "log":
            _refuse(
                finite & (value[:, output] <= 0),
                value[:, output],
                f"target_transform: log needs {name!r} > 0",
            )
    return value, status


def _refuse(bad: np.ndarray, value: np.ndarray, rule: str) -> None:
    rows = np.flatnonzero(bad)
    if rows.size:
        raise TaskError(f"{rule}, got {value[rows[0]]} in row {rows[0] + 1} ({rows.size} such rows)")


def _read_split_column(
    table: pa.Table, params: TableParams, keep: np.ndarray
) -> dict[str, np.ndarray] | None:
    if params.split is None:
        return None
    (column,) = params.split_columns
    values = params.split.get("values") or {name: name for name in SPLIT_NAMES}
    labels = mapped_labels(table, column, values, SPLIT_NAMES, "split")
    unlabelled = np.flatnonzero(labels == "")
    if unlabelled.size:
        raise TaskError(
            f"every row must have a split, got none in column {column!r}, row {unlabelled[0] + 1}"
        )
    return {name: np.flatnonzero((labels == name) & keep) for name in SPLIT_NAMES}


def _deal_rows(status: np.ndarray, params: TableParams, keep: np.ndarray) -> dict[str, np.ndarray]:
    kept = np.flatnonzero(keep)
    _, strata = np.unique(status[kept], axis=0, return_inverse=True)
    dealt = stratified_split(strata.reshape(-1), params.fractions, np.random.default_rng(params.split_seed))
    return {name: kept[rows] for name, rows in dealt.items()}


def _check_split_rows(rows: Mapping[str, np.ndarray], status: np.ndarray) -> None:
    sizes = ", ".join(f"{name} {rows[name].size}" for name in SPLIT_NAMES)
    for name, least in (("train", 2), ("val", 1), ("test", 1)):
        if rows[name].size < least:
            raise TaskError(f"the {name} split must have at least {least} rows, got too few rows: {sizes}")
        finite = (status[rows[name]] == STATUS_CODES["finite"]).any(axis=0)
        if not finite.all():
            raise TaskError(
                f"the {name} split must have a finite row for every target, got no finite row among "
                f"{rows[name].size}"
            )


def _check_choice(name: str, value: object, known: Sequence[str]) -> None:
    if value not in known:
        raise TaskError(f"unknown {name} {value!r}{nearest(str(value), known)}")


def _names(name: str, value: object) -> tuple[str, ...]:
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, (list, tuple)) or not all(isinstance(item, str) for item in names):
        raise TaskError(f"{name} must be a column name or a list of them, got {value!r}")
    return tuple(names)


def _section(name: str, value: object, needed: Sequence[str]) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise TaskError(f"{name} must be a mapping with {' and '.join(needed)}, got {value!r}")
    for key in value:
        if key not in ("column", "values"):
            raise TaskError(f"unknown parameter {name}.{key}{nearest(str(key), ('column', 'values'))}")
    for key in needed:
        if key not in value:
            raise TaskError(f"{name} needs {key!r}, got {sorted(map(str, value))}")
    if not isinstance(value.get("values", {}), Mapping):
        raise TaskError(f"{name}.values must map the file's labels, got {value['values']!r}")
    if name == "split" and len(_names("split.column", value["column"])) != 1:
        raise TaskError(f"split.column must be one column, got {value['column']!r}")
    return value


def _is_real(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
