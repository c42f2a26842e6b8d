"""Which trials may be trained as one: what must be equal of them, and what makes a trial be trained alone.

Every knob of a trial is of one of three kinds: a number that each trial of a pack has for itself, something
that must be equal in all of a pack, or something that no pack can do, which is then named. A knob that this
module does not know is of the third kind as soon as it is turned.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from scm.data import Split
from scm.inference.strict import threshold_in
from scm.packed.batches import split_form
from scm.packed.stack import fingerprint
from scm.training.feed import bottom_is_unreachable
from scm.trial_config import KNOBS, TrialConfig

# What the loop of a pack does for each trial by itself.
OWN: frozenset[str] = frozenset(
    [
        "max_epochs",
        "optimizer",
        "learning_rate",
        "weight_decay",
        "momentum",
        "nesterov",
        "beta1",
        "beta2",
        "lr_schedule",
        "clip_norm",
        "tau_train_min",
        "tau_train_max",
        "tau_infer",
        "loss_ramp_epochs",
        "gradient_policy",
        "coverage_threshold",
        "coverage_patience",
        "nonfinite_budget",
        "finite_action",
        "finite_streak",
        "restore_best",
        "control_rate",
        "control_dead_band",
        "control_momentum",
        "control_warmup_steps",
        "control_update_frequency",
        "control_decay",
        "control_lambda_min",
        "control_lambda_max",
    ]
)
# Numbers in the loss, one a trial. Whether an optional one is given must be equal in all of a pack.
IN_LOSS: frozenset[str] = frozenset(
    [
        "gamma",
        "lambda_margin",
        "lambda_sign",
        "lambda_rej",
        "target_coverage",
        "coverage_temperature",
        "lambda_push_down",
        "lambda_push_up",
        "tau_bottom",
        "tau_finite",
        "hybrid_bound",
        "output_bound",
        "lambda_saturation",
        "saturation_threshold",
        "lambda_spread",
        "target_spread",
        "cap_ratio",
        "cap_floor",
    ]
)
# What a step consists of.
SHARED: frozenset[str] = frozenset(
    [
        "batch_size",
        "gradient_accumulation_steps",
        "dtype",
        "fit",
        "coverage_term",
        "coverage_control",
        "output_bound_form",
        "cap_currency",
    ]
)
# What decides the model, which is compared itself.
IN_MODEL: frozenset[str] = frozenset(
    [
        "head",
        "hidden_width",
        "hidden_depth",
        "tuple_norm",
        "q_anchor",
        "q_param",
        "q_min",
        "numerator_degree",
        "denominator_degree",
        "basis",
    ]
)
# Terms that are there or not for all of a pack, because they carry a state.
_TERMS = ("lambda_saturation", "lambda_spread")

_REFUSED: Mapping[str, Callable[[TrialConfig], bool]] = {
    "mixed_precision": lambda config: config.mixed_precision,
    "finite_action": lambda config: config.finite_action in ("skip_micro_batch", "roll_back"),
    "cap_currency": lambda config: config.cap_ratio is not None and config.cap_currency == "gradient",
}


def why_not_packable(config: TrialConfig, model: nn.Module, splits: Mapping[str, Split]) -> str | None:
    """Return why a trial must be trained alone, as far as it can be told without tracing; None for no reason.

    splits: the trial's, "train" and, if it validates, "val".
    """
    for name, refused in _REFUSED.items():
        if refused(config):
            return f"{name}={getattr(config, name)!r}"
    flat, known = config.to_flat(), OWN | IN_LOSS | SHARED | IN_MODEL
    for name, value in flat.items():
        if name not in known and value != KNOBS[name].default and KNOBS[name].is_active(flat):
            return f"{name}={value!r}"
    if config.restore_best and splits.get("val") is None:
        return "restore_best=True without a val split"
    weights = next(model.parameters(), None)
    if weights is None:
        return "the model has no parameters"
    try:
        threshold_in(config.tau_infer, weights.dtype)
    except ValueError as error:
        return str(error)
    if bottom_is_unreachable(model, config.tau_infer):
        for split in splits.values():
            if bool(split.targets.mask_bottom.any()):
                return "the data hold bottoms, which the head cannot reach"
    return None


def pack_signature(config: TrialConfig, model: nn.Module, splits: Mapping[str, Split]) -> tuple[Any, ...]:
    """Return what is equal in all trials of a pack: two trials may be packed where it is.

    Comparing `splits` keeps the epochs of a pack in step; trials of other seeds may have other data of the
    same shapes. Hashable; of use in one process, see `fingerprint`.
    """
    return (*step_signature(config, splits), fingerprint(model))


def step_signature(config: TrialConfig, splits: Mapping[str, Split]) -> tuple[Any, ...]:
    """Return the part of `pack_signature` that is not the model's."""
    flat = config.to_flat()
    shared = tuple((name, flat[name] if KNOBS[name].is_active(flat) else None) for name in sorted(SHARED))
    given = tuple((name, flat[name] is None) for name in sorted(IN_LOSS) if KNOBS[name].optional)
    terms = tuple((name, getattr(config, name) > 0) for name in _TERMS)
    forms = tuple((name, split_form(split)) for name, split in sorted(splits.items()))
    return (shared, given, terms, forms)
