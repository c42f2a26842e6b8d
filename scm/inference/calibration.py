"""Choosing tau_infer on a named held-out split, and freezing the choice in a record.

The record says what was chosen, on which split and data, for tuples of which gauge, and under which bound;
decoding through it refuses another gauge. The decoding itself is `scm.inference.strict`.

A gauge is the scale of the tuples: "unit" where P² + Q² = 1 holds for every row, "raw" where it does not. The
same value has another |Q| in another gauge, so a threshold means nothing without it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import scm
from scm.inference.strict import (
    InferenceConfig,
    InferenceResult,
    as_inexact,
    strict_inference,
    tensor_of,
    threshold_in,
)
from scm.inference.wrapper import projective_pair
from scm.metrics.tau_sweep import CURVE_NAMES, checked_rows, tau_infer_sweep_from_q_abs

SCHEMA_NAME = "scm_harness.calibration"
SCHEMA_VERSION = 1
GAUGES = ("unit", "raw")
COUNT_NAMES = ("total", "in_range", "censored", "non_finite", "false_accepts", "false_rejects")
BOUND_NAMES = ("max_false_accept", "max_false_reject", "confidence", "tau_min")
TAU_MAX = "tau_max"  # in `bound` only where it was asked for

_CURVE_POINTS = 41


class CalibrationError(ValueError):
    """No threshold meets the bound, or a record does not hold what it says; the message names which."""


class GaugeMismatchError(CalibrationError):
    """Tuples of one gauge were to be decoded with a threshold that was chosen in another."""


class UncalibratedWarning(UserWarning):
    """A head was decoded with a threshold that nobody chose on held-out data."""


@dataclass(frozen=True, kw_only=True)
class CalibrationRecord:
    """A frozen threshold and where it comes from; written and read as strict JSON with a digest.

    tau_infer   in units of |Q| in `gauge`, exactly representable in `dtype`
    split       name of the held-out split; `data_hash` is the sha256 of what it held
    counts      rows: total, in_range, censored, non_finite, false_accepts, false_rejects (at tau_infer)
    bound       max_false_accept, max_false_reject, confidence (None: not asked for) and tau_min; tau_max too
                where there was one
    curve       `tau_infer_sweep_from_q_abs` on the split; a rate over no rows is None
    """

    tau_infer: float
    split: str
    data_hash: str
    gauge: str
    dtype: str
    counts: Mapping[str, int]
    bound: Mapping[str, float | None]
    curve: Mapping[str, tuple[float | None, ...]]
    schema_version: int = SCHEMA_VERSION
    created_by: str = f"scm-harness {scm.__version__}"

    def __post_init__(self) -> None:
        _check_record(self)
        object.__setattr__(self, "counts", MappingProxyType(dict(self.counts)))
        object.__setattr__(self, "bound", MappingProxyType(dict(self.bound)))
        curve = {name: tuple(values) for name, values in self.curve.items()}
        object.__setattr__(self, "curve", MappingProxyType(curve))

    def __hash__(self) -> int:
        return hash(self.digest)

    def __reduce__(self) -> tuple[Any, ...]:
        return (CalibrationRecord.from_json, (self.to_json(),))

    @property
    def false_accept_rate(self) -> float:
        """Share of the split's censored rows that tau_infer accepts; NaN without such rows."""
        return _share(self.counts["false_accepts"], self.counts["censored"])

    @property
    def false_reject_rate(self) -> float:
        """Share of the split's in-range rows that tau_infer rejects; NaN without such rows."""
        return _share(self.counts["false_rejects"], self.counts["in_range"])

    @property
    def digest(self) -> str:
        """sha256 of every field in canonical form."""
        return hashlib.sha256(_canonical(self._plain()).encode("utf-8")).hexdigest()

    def to_json(self) -> str:
        """One line of strict JSON with sorted keys and the digest; `from_json` gives an equal record."""
        return _canonical({**self._plain(), "schema_name": SCHEMA_NAME, "digest": self.digest})

    @classmethod
    def from_json(cls, text: str) -> CalibrationRecord:
        """Read what `to_json` wrote; CalibrationError where fields are missing, unknown or were altered."""
        try:
            payload = json.loads(text, parse_constant=_refuse_constant)
        except json.JSONDecodeError as error:
            raise CalibrationError(f"a calibration record must be JSON: {error}") from error
        if not isinstance(payload, dict) or payload.pop("schema_name", None) != SCHEMA_NAME:
            raise CalibrationError(f"a calibration record must be an object of schema {SCHEMA_NAME!r}")
        if payload.get("schema_version") != SCHEMA_VERSION:
            raise CalibrationError(
                f"schema_version must be {SCHEMA_VERSION}, got {payload.get('schema_version')!r}"
            )
        digest = payload.pop("digest", None)
        names = {item.name for item in dataclasses.fields(cls)}
        if set(payload) != names:
            raise CalibrationError(
                f"a calibration record must have exactly the fields {sorted(names)}; "
                f"missing {sorted(names - set(payload))}, unknown {sorted(set(payload) - names)}"
            )
        record = cls(**payload)
        if digest != record.digest:
            raise CalibrationError(
                f"the calibration record was altered after it was written: it says digest {digest!r}, "
                f"its fields give {record.digest!r}"
            )
        return record

    def check_not_reported_on(self, split: str, data_hash: str | None = None) -> None:
        """Raise CalibrationError where a report would be on the rows that chose the threshold.

        By name, and by `data_hash` where it is given: the same rows under another name are refused as well.
        """
        if split == self.split:
            raise CalibrationError(
                f"tau_infer was chosen on split {self.split!r}; report on another split than {split!r}"
            )
        if data_hash is not None and data_hash == self.data_hash:
            raise CalibrationError(
                f"split {split!r} holds the very rows of {self.split!r}, on which tau_infer was chosen"
            )

    def inference_config(self, *, tau_train: float | None = None) -> InferenceConfig:
        """The configuration that decodes with this threshold."""
        return InferenceConfig(tau_infer=self.tau_infer, tau_train=tau_train)

    def _plain(self) -> dict[str, Any]:
        plain = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        plain["counts"] = dict(self.counts)
        plain["bound"] = dict(self.bound)
        plain["curve"] = {name: list(values) for name, values in self.curve.items()}
        return plain


def calibrate(
    q_abs: Tensor,
    is_in_range: Tensor,
    *,
    split: str,
    max_false_accept: float | None = None,
    max_false_reject: float | None = None,
    gauge: str = "unit",
    data_hash: str | Tensor | None = None,
    confidence: float | None = None,
    tau_min: float = 1e-12,
    tau_max: float | None = None,
) -> CalibrationRecord:
    """Choose tau_infer on a split so that its rates there meet the bound, and return the frozen choice.

    `q_abs` holds |Q| and `is_in_range` booleans of the same shape (False: the right answer is bottom).
    With `max_false_accept` (share of censored rows accepted, in [0, 1)) the smallest threshold in the dtype
    of `q_abs` that meets it is chosen; with `max_false_reject` alone (share of in-range rows rejected, in
    [0, 1)) the largest. With both, the smallest that meets the first must also meet the second.
    Non-finite |Q| is rejected by every threshold. No threshold below `tau_min` is chosen, and none above
    `tau_max`, as where tau_infer must not exceed the thresholds of the training.

    `confidence` (in (0, 1)) tightens each bound so that, for rows drawn alike, the rate in the population
    exceeds it with probability at most 1 − confidence (one-sided exact binomial limit).

    `data_hash` is the digest of the split, or a tensor to be hashed; None hashes the two arguments.
    CalibrationError where no threshold meets the bound, naming the best rate within reach.
    """
    q, in_range = checked_rows(q_abs, is_in_range)
    bound = _checked_bound(max_false_accept, max_false_reject, confidence, tau_min, tau_max)
    _check_gauge_of(q, gauge)
    floor = threshold_in(tau_min, q.dtype)
    ceiling = math.inf if tau_max is None else _largest_within(tau_max, q.dtype)
    if max_false_accept is not None:
        tau = _smallest_for_false_accept(q[~in_range], max_false_accept, confidence, floor)
        if tau > ceiling:
            best = _share(int(_accepted(q[~in_range], ceiling).sum()), int((~in_range).sum()))
            raise CalibrationError(
                f"no tau_infer <= {tau_max} has a false-accept rate <= {max_false_accept}"
                f"{_with_confidence(confidence)}: the best within reach is {best:.6g}; it takes {tau}"
            )
        if max_false_reject is not None:
            _check_false_reject(q[in_range], tau, max_false_reject, confidence, max_false_accept)
    else:
        assert max_false_reject is not None
        tau = min(_largest_for_false_reject(q[in_range], max_false_reject, confidence, floor), ceiling)
    return CalibrationRecord(
        tau_infer=tau,
        split=split,
        data_hash=_data_hash(data_hash, q, in_range),
        gauge=gauge,
        dtype=str(q.dtype).removeprefix("torch."),
        counts={
            "total": len(q),
            "in_range": int(in_range.sum()),
            "censored": int((~in_range).sum()),
            "non_finite": int((~torch.isfinite(q)).sum()),
            "false_accepts": int(_accepted(q[~in_range], tau).sum()),
            "false_rejects": int((~_accepted(q[in_range], tau)).sum()),
        },
        bound=bound,
        curve=_curve(q, in_range, tau),
    )


def calibrated_decode(
    numerator: Any,
    denominator: Any,
    record: CalibrationRecord | None,
    *,
    gauge: str,
    tau_train: float | None = None,
    tau_infer: float | None = None,
) -> InferenceResult:
    """Decode tuples of the stated gauge with a record's threshold.

    GaugeMismatchError where `gauge` is not the record's, and where the tuples are said to be "unit" and their
    norms are not 1 (a zero tuple and rows with non-finite entries are bottoms in any gauge). Without a record
    an UncalibratedWarning is given and `tau_infer` (InferenceConfig's default where None) is used; with one,
    passing `tau_infer` is a ValueError.
    """
    if gauge not in GAUGES:
        raise ValueError(f"gauge must be one of {GAUGES}, got {gauge=}")
    if record is None:
        config = InferenceConfig(tau_train=tau_train)
        if tau_infer is not None:
            config = InferenceConfig(tau_infer=tau_infer, tau_train=tau_train)
        warnings.warn(
            f"decoding with tau_infer={config.tau_infer}, which was not chosen on held-out data; "
            "pass the record of scm.inference.calibrate",
            UncalibratedWarning,
            stacklevel=2,
        )
    else:
        if tau_infer is not None:
            raise ValueError(f"the record decides tau_infer ({record.tau_infer}), got {tau_infer=} as well")
        if gauge != record.gauge:
            raise GaugeMismatchError(
                f"tau_infer was chosen for tuples of gauge {record.gauge!r}, got tuples of gauge {gauge!r}"
            )
        config = record.inference_config(tau_train=tau_train)
    result = strict_inference(numerator, denominator, config)
    if gauge == "unit":
        check_unit_tuples(numerator, denominator)
    return result


class CalibratedHead(nn.Module):
    """A model that answers decoded values with a record's threshold; what it emits must be of `gauge`."""

    def __init__(self, model: nn.Module, record: CalibrationRecord | None, *, gauge: str) -> None:
        super().__init__()
        if gauge not in GAUGES:
            raise ValueError(f"gauge must be one of {GAUGES}, got {gauge=}")
        if record is not None and gauge != record.gauge:
            raise GaugeMismatchError(
                f"tau_infer was chosen for tuples of gauge {record.gauge!r}, got a model of gauge {gauge!r}"
            )
        self.model = model
        self.record = record
        self.gauge = gauge

    def forward(self, *args: Any, **kwargs: Any) -> InferenceResult:
        """Call the model and decode; warns with UncalibratedWarning where there is no record."""
        numerator, denominator = projective_pair(self.model(*args, **kwargs))
        return calibrated_decode(numerator, denominator, self.record, gauge=self.gauge)


def _smallest_for_false_accept(
    censored: Tensor, bound: float, confidence: float | None, floor: float
) -> float:
    allowed = _allowed(bound, len(censored), confidence, "max_false_accept", "censored")
    finite = censored[torch.isfinite(censored)].sort(descending=True).values
    if len(finite) <= allowed:
        return floor
    # The (allowed + 1)-th largest must be rejected, so the threshold is the next number above it.
    must_go = finite[allowed]
    tau = float(torch.nextafter(must_go, torch.full_like(must_go, math.inf)))
    if not math.isfinite(tau):
        best = _share(int((finite >= must_go).sum()), len(censored))
        raise CalibrationError(
            f"no finite tau_infer has a false-accept rate <= {bound}: {must_go} is the largest finite "
            f"{must_go.dtype}; the best within reach is {best:.6g} at tau_infer={float(must_go)}"
        )
    return max(tau, floor)


def _largest_for_false_reject(
    in_range: Tensor, bound: float, confidence: float | None, floor: float
) -> float:
    allowed = _allowed(bound, len(in_range), confidence, "max_false_reject", "in-range")
    lost = int((~_accepted(in_range, floor)).sum())
    if lost > allowed:
        raise CalibrationError(
            f"no tau_infer >= {floor} has a false-reject rate <= {bound}"
            f"{_with_confidence(confidence)}: the best within reach is {lost / len(in_range):.6g} "
            f"({lost} of {len(in_range)} in-range rows are rejected by every threshold)"
        )
    finite = in_range[torch.isfinite(in_range)].sort().values
    return float(finite[allowed - (len(in_range) - len(finite))])


def _check_false_reject(
    in_range: Tensor, tau: float, bound: float, confidence: float | None, max_false_accept: float
) -> None:
    allowed = _allowed(bound, len(in_range), confidence, "max_false_reject", "in-range")
    lost = int((~_accepted(in_range, tau)).sum())
    if lost > allowed:
        raise CalibrationError(
            f"no tau_infer has both a false-accept rate <= {max_false_accept} and a false-reject rate "
            f"<= {bound}{_with_confidence(confidence)}: with the first, the best false-reject rate within "
            f"reach is {lost / len(in_range):.6g}, at tau_infer={tau}"
        )


def _allowed(bound: float, total: int, confidence: float | None, name: str, rows: str) -> int:
    """How many of `total` rows may err."""
    if total == 0:
        raise CalibrationError(f"{name} needs {rows} rows to be measured on, got none")
    count = int(bound * total)
    while (count + 1) / total <= bound:  # the product may have rounded below a whole number
        count += 1
    if count / total > bound:
        count -= 1
    if confidence is None:
        return count
    count = min(count, _largest_count(total, bound, 1.0 - confidence))
    if count < 0:
        needed = math.log(1.0 - confidence) / math.log1p(-bound) if bound > 0.0 else math.inf
        wanted = f"at least {math.ceil(needed)} rows" if math.isfinite(needed) else "a bound above 0"
        reach = 1.0 - (1.0 - confidence) ** (1.0 / total)
        raise CalibrationError(
            f"{total} {rows} rows cannot show {name} <= {bound}{_with_confidence(confidence)}: that needs "
            f"{wanted}; the best within reach is {reach:.6g}"
        )
    return count


def _largest_count(total: int, rate: float, probability: float) -> int:
    """The largest k with P(X <= k) <= probability for X ~ Binomial(total, rate); -1 where there is none."""
    if rate <= 0.0:
        return -1
    below = 0.0
    for k in range(total + 1):
        ways = math.lgamma(total + 1) - math.lgamma(k + 1) - math.lgamma(total - k + 1)
        below += math.exp(ways + k * math.log(rate) + (total - k) * math.log1p(-rate))
        if below > probability:
            return k - 1
    return total


def _with_confidence(confidence: float | None) -> str:
    return "" if confidence is None else f" with confidence {confidence}"


def _largest_within(limit: float, dtype: torch.dtype) -> float:
    """The largest number of `dtype` that is not above `limit`."""
    rounded = torch.tensor(threshold_in(limit, dtype), dtype=dtype)
    if float(rounded) > limit:
        rounded = torch.nextafter(rounded, torch.zeros_like(rounded))
    return float(rounded)


def _accepted(q: Tensor, tau: float) -> Tensor:
    return torch.isfinite(q) & (q >= torch.tensor(tau, dtype=q.dtype))


def _share(count: int, total: int) -> float:
    return count / total if total else math.nan


def _curve(q: Tensor, in_range: Tensor, tau: float) -> dict[str, tuple[float | None, ...]]:
    positive = q[torch.isfinite(q) & (q > 0)].to(torch.float64)
    low = min([tau, *positive.min().reshape(-1).tolist()]) if len(positive) else tau
    high = max([tau, *positive.max().reshape(-1).tolist()]) if len(positive) else tau
    grid = np.geomspace(low, high, _CURVE_POINTS).clip(low, high).tolist()
    taus = sorted({*grid, tau})
    curves = tau_infer_sweep_from_q_abs(q, in_range, taus)
    return {
        name: tuple(None if math.isnan(value) else value for value in curves[name]) for name in CURVE_NAMES
    }


def _data_hash(given: str | Tensor | None, q: Tensor, in_range: Tensor) -> str:
    if isinstance(given, str):
        return given
    tensors = [q, in_range] if given is None else [given.detach().cpu()]
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _check_gauge_of(q: Tensor, gauge: str) -> None:
    if gauge not in GAUGES:
        raise ValueError(f"gauge must be one of {GAUGES}, got {gauge=}")
    beyond = q[torch.isfinite(q) & (q > 1.0 + math.sqrt(torch.finfo(q.dtype).eps))]
    if gauge == "unit" and len(beyond):
        raise GaugeMismatchError(
            f"|Q| <= 1 in the gauge 'unit', got {float(beyond.max())}; normalise, or use gauge='raw'"
        )


def check_unit_tuples(numerator: Any, denominator: Any) -> None:
    """Raise GaugeMismatchError unless P² + Q² = 1 for every tuple that is finite and not (0, 0)."""
    P, Q = (
        as_inexact(tensor_of(part) if isinstance(part, np.ndarray) else part.detach())
        for part in (numerator, denominator)
    )
    if P.shape != Q.shape:
        raise GaugeMismatchError(
            f"'unit' tuples must have P and Q of one shape, got {tuple(P.shape)} and {tuple(Q.shape)}"
        )
    norm = torch.hypot(P.abs().to(torch.float64), Q.abs().to(torch.float64))
    tolerance = math.sqrt(torch.finfo(P.abs().dtype).eps)
    off = torch.isfinite(norm) & (norm != 0) & ((norm - 1.0).abs() > tolerance)
    if bool(off.any()):
        raise GaugeMismatchError(
            f"'unit' tuples must have P² + Q² = 1, got {int(off.sum())} of {off.numel()} that do not, "
            f"the first with norm {float(norm[off][0]):.6g}"
        )


def _checked_bound(
    max_false_accept: float | None,
    max_false_reject: float | None,
    confidence: float | None,
    tau_min: float,
    tau_max: float | None,
) -> dict[str, float | None]:
    if max_false_accept is None and max_false_reject is None:
        raise ValueError("calibrate needs max_false_accept or max_false_reject, got neither")
    for name, rate in (("max_false_accept", max_false_accept), ("max_false_reject", max_false_reject)):
        if rate is not None and not 0.0 <= rate < 1.0:
            raise ValueError(f"{name} must be in [0, 1), got {rate}")
    if confidence is not None and not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence must be in (0, 1), got {confidence=}")
    if not (math.isfinite(tau_min) and tau_min > 0.0):
        raise ValueError(f"tau_min must be finite and > 0, got {tau_min=}")
    if tau_max is not None and not (math.isfinite(tau_max) and tau_max >= tau_min):
        raise ValueError(f"tau_max must be finite and >= tau_min, got {tau_max=}, {tau_min=}")
    values = (max_false_accept, max_false_reject, confidence, tau_min)
    bound = {name: None if v is None else float(v) for name, v in zip(BOUND_NAMES, values, strict=True)}
    return bound if tau_max is None else {**bound, TAU_MAX: float(tau_max)}


def _check_record(record: CalibrationRecord) -> None:
    tau = record.tau_infer
    if isinstance(tau, bool) or not isinstance(tau, float) or not (math.isfinite(tau) and tau > 0.0):
        raise CalibrationError(f"tau_infer must be a finite float > 0, got {tau!r}")
    for name in ("split", "data_hash", "dtype", "created_by"):
        value = getattr(record, name)
        if not isinstance(value, str) or not value:
            raise CalibrationError(f"{name} must be a string that is not empty, got {value!r}")
    if record.gauge not in GAUGES:
        raise CalibrationError(f"gauge must be one of {GAUGES}, got {record.gauge!r}")
    for field, names in (("counts", COUNT_NAMES), ("bound", BOUND_NAMES), ("curve", CURVE_NAMES)):
        value = getattr(record, field)
        optional = {TAU_MAX} if field == "bound" else set()
        if not isinstance(value, Mapping) or set(value) - optional != set(names):
            raise CalibrationError(f"{field} must have exactly the entries {names}, got {value!r}")
    for name, count in record.counts.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise CalibrationError(f"counts must be ints >= 0, got {name}={count!r}")
    dtype = getattr(torch, record.dtype, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise CalibrationError(f"dtype must name a floating-point dtype, got {record.dtype!r}")
    if threshold_in(tau, dtype) != tau:
        raise CalibrationError(f"tau_infer must be representable in {record.dtype}, got {tau!r}")


def _canonical(plain: Mapping[str, Any]) -> str:
    return json.dumps(plain, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _refuse_constant(word: str) -> float:
    raise CalibrationError(f"a calibration record must be strict JSON, got the literal {word}")
