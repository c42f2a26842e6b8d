"""Every knob of a trial, its default and its rules: the one home of both. Needs no torch.

`TrialConfig` is what one training knows besides its seed, its data and its model's dimensions. Search
spaces, tables and the command line read names, types and defaults from here (`KNOBS`); what a knob does is
decided in `scm.trial` and `scm.models`.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, cast


@dataclass(frozen=True, slots=True)
class Condition:
    """Values of a knob that a rule tells, because they cannot be listed; asked with `in`, as a tuple is."""

    rule: str
    holds: Callable[[Any], bool]

    def __contains__(self, value: Any) -> bool:
        return self.holds(value)


POSITIVE = Condition("> 0", lambda value: value is not None and value > 0)
GIVEN = Condition("not None", lambda value: value is not None)


@dataclass(frozen=True, slots=True)
class Knob:
    """What may be said about one field of `TrialConfig`.

    `type` is "float", "int", "bool" or "str"; `optional` allows None. `choices` lists the values of a str
    knob. `active_when` names other knobs and the values of theirs under which this one changes anything.
    """

    type: str
    default: float | int | bool | str | None
    optional: bool
    choices: tuple[str, ...]
    active_when: Mapping[str, tuple[Any, ...] | Condition]
    rule: str

    def is_active(self, config: Mapping[str, Any]) -> bool:
        """Tell whether the knob changes anything in `config`, a flat mapping that names every knob."""
        for name, values in self.active_when.items():  # noqa: SIM110, all(...) takes three times as long
            if config[name] not in values:
                return False
        return True


_TYPES: Mapping[str, tuple[type, ...]] = {
    "bool": (bool,),
    "int": (int,),
    "float": (int, float),
    "str": (str,),
}
_Rule = tuple[str, Callable[[Any], bool]]
_ANY: _Rule = ("", lambda value: True)
_POSITIVE: _Rule = ("> 0", lambda value: value > 0)
_NOT_NEGATIVE: _Rule = (">= 0", lambda value: value >= 0)
_SHARE: _Rule = ("in [0, 1]", lambda value: 0 <= value <= 1)
_DECAY: _Rule = ("in [0, 1)", lambda value: 0 <= value < 1)
_AT_LEAST_ONE: _Rule = (">= 1", lambda value: value >= 1)
_MEMORY: _Rule = ("in (0, 1]", lambda value: 0 < value <= 1)


def _knob(
    default: Any,
    rule: _Rule = _ANY,
    /,
    *,
    choices: tuple[str, ...] = (),
    **active_when: tuple[Any, ...] | Condition,
) -> Any:
    metadata = {"rule": rule, "choices": choices, "active_when": MappingProxyType(active_when)}
    return field(default=default, metadata=metadata)


_HYBRID: dict[str, tuple[Any, ...]] = {
    "fit": ("quotient",),
    "hybrid_schedule": ("linear", "cosine", "exponential"),
}
_CONTROL: dict[str, tuple[Any, ...]] = {"coverage_control": ("reference", "unbiased")}


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialConfig:
    """What one training needs to know besides its seed, data and dimensions; valid once built.

    Raises TypeError for a value of another type, ValueError for one out of range. An int is taken where a
    float is asked for. Thresholds are in units of |Q|, rates and weights have no unit.
    """

    max_epochs: int = _knob(20, _AT_LEAST_ONE)
    batch_size: int = _knob(32, _AT_LEAST_ONE)
    optimizer: str = _knob("adam", choices=("adam", "adamw", "sgd", "rmsprop"))
    learning_rate: float = _knob(1e-3, _POSITIVE)
    weight_decay: float = _knob(0.0, _NOT_NEGATIVE)
    momentum: float = _knob(0.0, _DECAY, optimizer=("sgd", "rmsprop"))
    nesterov: bool = _knob(False, optimizer=("sgd",))
    beta1: float = _knob(0.9, _DECAY, optimizer=("adam", "adamw"))
    beta2: float = _knob(0.999, _DECAY, optimizer=("adam", "adamw"))
    lr_schedule: str = _knob("constant", choices=("constant", "cosine", "linear"))
    clip_norm: float | None = _knob(None, _POSITIVE)
    gradient_accumulation_steps: int = _knob(1, _AT_LEAST_ONE)
    mixed_precision: bool = _knob(False)
    amp_dtype: str = _knob("bfloat16", choices=("float16", "bfloat16"), mixed_precision=(True,))
    dtype: str = _knob("float32", choices=("float32", "float64"))

    tau_train_min: float = _knob(1e-4, _POSITIVE)
    tau_train_max: float = _knob(1e-4, _POSITIVE)
    tau_infer: float = _knob(1e-6, _POSITIVE)

    fit: str = _knob("projective", choices=("projective", "implicit", "implicit_detached", "quotient"))
    gamma: float = _knob(1e-9, _NOT_NEGATIVE)
    lambda_margin: float = _knob(0.1, _NOT_NEGATIVE)
    lambda_sign: float = _knob(1.0, _NOT_NEGATIVE)
    lambda_rej: float = _knob(0.01, _NOT_NEGATIVE)
    target_coverage: float = _knob(0.95, _SHARE)
    coverage_term: str = _knob("soft", choices=("soft", "ranked", "hard"))
    coverage_temperature: float = _knob(1e-2, _POSITIVE, coverage_term=("soft", "ranked"))
    lambda_push_down: float = _knob(0.0, _NOT_NEGATIVE)
    lambda_push_up: float = _knob(0.0, _NOT_NEGATIVE)
    tau_bottom: float = _knob(1e-2, _NOT_NEGATIVE)
    tau_finite: float = _knob(5e-2, _NOT_NEGATIVE)
    loss_ramp_epochs: int = _knob(0, _NOT_NEGATIVE)

    gradient_policy: str | None = _knob(None, choices=("clamp", "project", "reject", "pass"))
    coverage_threshold: float = _knob(0.0, _SHARE)
    coverage_patience: int = _knob(3, _AT_LEAST_ONE)
    nonfinite_budget: int = _knob(10, _NOT_NEGATIVE)
    finite_action: str = _knob("skip_step", choices=("skip_step", "skip_micro_batch", "roll_back", "stop"))
    finite_streak: int | None = _knob(
        None, _AT_LEAST_ONE, finite_action=("skip_micro_batch", "roll_back", "stop")
    )
    restore_best: bool = _knob(False)

    coverage_control: str = _knob("none", choices=("none", "reference", "unbiased"))
    control_rate: float = _knob(0.03, _POSITIVE, **_CONTROL)
    control_dead_band: float | None = _knob(None, _SHARE, **_CONTROL)
    control_momentum: float = _knob(0.0, _DECAY, **_CONTROL)
    control_warmup_steps: int = _knob(200, _NOT_NEGATIVE, **_CONTROL)
    control_update_frequency: int = _knob(1, _AT_LEAST_ONE, **_CONTROL)
    control_decay: float | None = _knob(None, _MEMORY, **_CONTROL)
    control_lambda_min: float | None = _knob(None, _NOT_NEGATIVE, **_CONTROL)
    control_lambda_max: float | None = _knob(None, _POSITIVE, **_CONTROL)

    hybrid_schedule: str = _knob(
        "none", choices=("none", "linear", "cosine", "exponential"), fit=("quotient",)
    )
    hybrid_warmup_epochs: int = _knob(0, _NOT_NEGATIVE, **_HYBRID)
    hybrid_transition_epochs: int = _knob(20, _NOT_NEGATIVE, **_HYBRID)
    hybrid_delta_init: float = _knob(1e-2, _POSITIVE, **_HYBRID)
    hybrid_delta_final: float = _knob(1e-6, _POSITIVE, **_HYBRID)
    hybrid_adaptive_delta: bool = _knob(True, **_HYBRID)
    hybrid_bound: float = _knob(1.0, _POSITIVE, **_HYBRID)

    sampling: str = _knob("shuffle", choices=("shuffle", "near_pole"))
    sampling_strength: float = _knob(1.0, _POSITIVE, sampling=("near_pole",))
    sampling_beta: float = _knob(0.1, _POSITIVE, sampling=("near_pole",))
    sampling_memory: float = _knob(0.3, _MEMORY, sampling=("near_pole",))
    sampling_correction: bool = _knob(False, sampling=("near_pole",))

    output_bound: float | None = _knob(None, _POSITIVE)
    output_bound_form: str = _knob("soft", choices=("hard", "soft", "straight_through"), output_bound=GIVEN)
    lambda_saturation: float = _knob(0.0, _NOT_NEGATIVE)
    saturation_threshold: float = _knob(5.0, _NOT_NEGATIVE, lambda_saturation=POSITIVE)
    lambda_spread: float = _knob(0.0, _NOT_NEGATIVE)
    target_spread: float = _knob(0.5, _NOT_NEGATIVE, lambda_spread=POSITIVE)
    cap_ratio: float | None = _knob(None, _DECAY)
    cap_currency: str = _knob("loss", choices=("loss", "gradient", "reference"), cap_ratio=GIVEN)
    cap_floor: float = _knob(0.0, _SHARE, cap_ratio=GIVEN, cap_currency=("loss", "gradient"))
    lambda_equivariance: float = _knob(0.0, _NOT_NEGATIVE)
    equivariance_views: int = _knob(2, _AT_LEAST_ONE, lambda_equivariance=POSITIVE)
    equivariance_distance: str = _knob("kl", choices=("kl", "l2"), lambda_equivariance=POSITIVE)
    gap_watch: bool = _knob(False)
    lambda_tag: float = _knob(0.0, _NOT_NEGATIVE)
    tag_labels: str = _knob("data", choices=("model", "data"), lambda_tag=POSITIVE)
    tag_adaptive: bool = _knob(False, lambda_tag=POSITIVE)
    lambda_pole: float = _knob(0.0, _NOT_NEGATIVE)
    pole_threshold: float = _knob(0.1, _POSITIVE, lambda_pole=POSITIVE)

    head: str = _knob("pattern", choices=("pattern", "multihead", "angular", "tr_rational"))
    hidden_width: int = _knob(64, _AT_LEAST_ONE)
    hidden_depth: int = _knob(2, _NOT_NEGATIVE)
    tuple_norm: str = _knob("unit", choices=("unit", "none"), head=("pattern", "multihead", "tr_rational"))
    q_anchor: str = _knob("none", choices=("none", "ones"), head=("multihead",))
    q_param: str = _knob("none", choices=("none", "softplus"), head=("multihead",))
    q_min: float = _knob(0.0, _NOT_NEGATIVE, head=("multihead",), q_param=("softplus",))
    numerator_degree: int = _knob(3, _NOT_NEGATIVE, head=("multihead", "tr_rational"))
    denominator_degree: int = _knob(2, _AT_LEAST_ONE, head=("multihead", "tr_rational"))
    basis: str = _knob("monomial", choices=("monomial", "chebyshev"), head=("multihead", "tr_rational"))

    def __post_init__(self) -> None:
        for name, knob in KNOBS.items():
            value = getattr(self, name)
            if (
                value is not knob.default
            ):  # most are left alone, and defaults were checked when they were read
                object.__setattr__(self, name, _checked(name, knob, value))
        _check_order(self, "tau_train_min", "tau_train_max")
        _check_order(self, "tau_infer", "tau_train_min")
        _check_order(self, "tau_bottom", "tau_finite")
        if self.nesterov and self.optimizer == "sgd" and self.momentum == 0:
            raise ValueError(f"nesterov needs momentum > 0, got momentum={self.momentum!r}")
        if self.coverage_control != "none":
            self._check_control()

    def _check_control(self) -> None:
        if self.coverage_term == "hard":
            raise ValueError(
                "coverage_control needs a coverage term with a gradient, coverage_term ranked or soft, "
                f"got coverage_term={self.coverage_term!r} with coverage_control={self.coverage_control!r}"
            )
        low, high = self.control_lambda_min, self.control_lambda_max
        if low is not None and high is not None and low > high:
            values = f"control_lambda_min={low!r}, control_lambda_max={high!r}"
            raise ValueError(f"control_lambda_min must be <= control_lambda_max, got {values}")

    @classmethod
    def from_flat(cls, mapping: Mapping[str, Any]) -> TrialConfig:
        """Build a config from plain values by name; what is absent takes its default.

        The keys "task" and "task.<anything>" belong to the task and are passed over. Raises ValueError for
        any other key that is no knob, naming the nearest one.
        """
        known: dict[str, Any] = {}
        for name, value in mapping.items():
            if name == "task" or str(name).startswith("task."):
                continue
            if name not in KNOBS:
                raise ValueError(_unknown_knob(str(name)))
            known[name] = value
        return cls(**known)

    def to_flat(self) -> dict[str, float | int | bool | str | None]:
        """Return every knob by name, as plain values; `from_flat` of it is an equal config."""
        return {name: getattr(self, name) for name in KNOBS}

    def active(self) -> dict[str, float | int | bool | str | None]:
        """Return those knobs that change anything, given the values of the others."""
        flat = self.to_flat()
        return {name: value for name, value in flat.items() if KNOBS[name].is_active(flat)}


def _unknown_knob(name: str) -> str:
    near = difflib.get_close_matches(name, list(KNOBS), n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(KNOBS))}"
    return f"unknown knob {name!r}; {hint}"


def _checked(name: str, knob: Knob, value: Any) -> Any:
    if value is None and knob.optional:
        return None
    value = _typed(name, knob, value)
    if knob.choices and value not in knob.choices:
        also = " or None (null in a plan)" if knob.optional else ""
        raise ValueError(f"{name} must be one of {', '.join(knob.choices)}{also}, got {name}={value!r}")
    _, holds = _RULES[name]
    if not holds(value):
        raise ValueError(f"{name} must be {knob.rule}, got {name}={value!r}")
    return value


def _typed(name: str, knob: Knob, value: Any) -> Any:
    """Return `value` as the knob's type, refusing what would have to be guessed (True for 1, "1" for 1)."""
    if not isinstance(value, _TYPES[knob.type]) or (isinstance(value, bool) and knob.type != "bool"):
        also = " or None" if knob.optional else ""
        raise TypeError(f"{name} must be of type {knob.type}{also}, got {name}={value!r}")
    if not isinstance(value, (int, float)) or knob.type != "float":
        return value
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {name}={value!r}")
    return float(value)


def _check_order(config: TrialConfig, low: str, high: str) -> None:
    if getattr(config, low) > getattr(config, high):
        values = f"{low}={getattr(config, low)!r}, {high}={getattr(config, high)!r}"
        raise ValueError(f"{low} must be <= {high}, got {values}")


def _knobs() -> dict[str, Knob]:
    made = {}
    for item in dataclasses.fields(TrialConfig):
        words = str(item.type).replace(" ", "").split("|")
        made[item.name] = Knob(
            type=words[0],
            default=cast(Any, item.default),
            optional="None" in words,
            choices=item.metadata["choices"],
            active_when=item.metadata["active_when"],
            rule=item.metadata["rule"][0],
        )
        _checked(item.name, made[item.name], item.default)
    return made


_RULES: dict[str, _Rule] = {item.name: item.metadata["rule"] for item in dataclasses.fields(TrialConfig)}
KNOBS: Mapping[str, Knob] = MappingProxyType(_knobs())
