"""The spaces that ship with the harness, by name, and how a plan asks for one.

Ranges are for tuples (P, Q) of unit length, so that |Q| <= 1 and a threshold has the same meaning for every
model. Adding a space is one entry of `SPACES`; a knob is spelled as the field that the training reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from search_spaces.domains import Choice, Float, Int
from search_spaces.errors import SpaceError, nearest_hint
from search_spaces.ordering import LessEqual, listed_constraints
from search_spaces.space import Space, compose

_MOMENTUM = {"optimizer": ("sgd", "rmsprop")}
_ADAM = {"optimizer": ("adam", "adamw")}
_SOFT = {"coverage_term": ("soft",)}
_MULTIHEAD = {"head": ("multihead",)}
_POLYNOMIAL = {"head": ("multihead", "tr_rational")}

_CAPPED = {"cap_ratio": (0.1, 0.25, 0.5)}
_NEAR_POLE = {"sampling": ("near_pole",)}
_QUOTIENT = {"fit": ("quotient",)}
_HYBRID = {**_QUOTIENT, "hybrid_schedule": ("linear", "cosine", "exponential")}
_FIT = Choice(("projective", "implicit", "implicit_detached", "quotient"))  # in two spaces, composable so

_NAMED = (
    Space(
        "coverage_targets",
        {
            # The hard term has no gradient: under it, its target and weight would be knobs that change
            # nothing.
            "coverage_term": Choice(("soft", "hard")),
            "target_coverage": Float(0.5, 0.995, when=_SOFT),
            "lambda_rej": Float(1e-3, 10.0, log=True, when=_SOFT),
            "coverage_temperature": Float(1e-3, 0.1, log=True, when=_SOFT),
        },
        description="The share of answers asked for, and how hard training pulls coverage towards it.",
    ),
    Space(
        "tau_ranges",
        {
            "tau_infer": Float(1e-4, 0.2, log=True),
            "tau_train_min": Float(1e-4, 0.3, log=True),
            "tau_train_max": Float(1e-3, 0.5, log=True),
        },
        [LessEqual("tau_infer", "tau_train_min"), LessEqual("tau_train_min", "tau_train_max")],
        description="Thresholds on |Q|: the range drawn from in training, and the one used in decoding.",
    ),
    Space(
        "loss_weights",
        {
            "fit": _FIT,
            "lambda_margin": Float(1e-3, 10.0, log=True),
            "lambda_sign": Float(1e-3, 10.0, log=True),
            "lambda_push_down": Float(1e-3, 10.0, log=True),
            "lambda_push_up": Float(1e-3, 10.0, log=True),
            "tau_bottom": Float(1e-3, 0.1, log=True),
            "tau_finite": Float(1e-2, 0.5, log=True),
            "loss_ramp_epochs": Int(0, 10),
        },
        [LessEqual("tau_bottom", "tau_finite")],
        description="Which fit term, the weights of the terms beside it, and how long they take to come in.",
    ),
    Space(
        "gradient_policy",
        # "pass" lets everything through, as null does: drawing both would train one config twice.
        {"gradient_policy": Choice((None, "clamp", "project", "reject"))},
        description="What becomes of gradients that pass through a bottom; null leaves them as they are.",
    ),
    Space(
        "optimizer",
        {
            "optimizer": Choice(("adam", "adamw", "sgd", "rmsprop")),
            "learning_rate": Float(1e-4, 3e-2, log=True),
            "weight_decay": Float(1e-6, 1e-2, log=True),
            "momentum": Float(0.5, 0.99, when=_MOMENTUM),
            "nesterov": Choice((False, True), when={"optimizer": ("sgd",)}),
            "beta1": Float(0.8, 0.99, when=_ADAM),
            "beta2": Float(0.9, 0.9999, when=_ADAM),
            "lr_schedule": Choice(("constant", "cosine", "linear")),
            "clip_norm": Choice((None, 0.1, 1.0, 10.0)),
            "batch_size": Choice((16, 32, 64, 128)),
        },
        description="How weights move: the method with its settings, step size, schedule, clipping, batch.",
    ),
    Space(
        "model_size",
        {
            "head": Choice(("pattern", "multihead", "angular", "tr_rational")),
            "hidden_width": Int(8, 128, log=True),
            "hidden_depth": Int(1, 3),
            # An angular head gives tuples of unit length whatever is asked for.
            "tuple_norm": Choice(("unit", "none"), when={"head": ("pattern", "multihead", "tr_rational")}),
            "q_anchor": Choice(("none", "ones"), when=_MULTIHEAD),
            # A raw positive denominator may never get below tau_infer: such a model could not say bottom.
            "q_param": Choice(("none", "softplus"), when={**_MULTIHEAD, "tuple_norm": ("unit",)}),
            "q_min": Float(1e-6, 1e-1, log=True, when={**_MULTIHEAD, "q_param": ("softplus",)}),
            "numerator_degree": Int(1, 5, when=_POLYNOMIAL),
            "denominator_degree": Int(1, 4, when=_POLYNOMIAL),
            "basis": Choice(("monomial", "chebyshev"), when=_POLYNOMIAL),
        },
        description="The head that emits (P, Q), and the size of the network below it.",
    ),
)

# Asked for by name alone: what these vary is off by default, and most searches have no use for it.
_APART = (
    Space(
        "tag_loss",
        {
            "lambda_tag": Float(1e-2, 10.0, log=True),
            "tag_labels": Choice(("data", "model")),
            "tag_adaptive": Choice((False, True)),
        },
        description="How much a head that says what an answer is weighs, and from what it learns that.",
    ),
    Space(
        "pole_head",
        {
            "lambda_pole": Float(1e-3, 1.0, log=True),
            "pole_threshold": Float(1e-2, 0.5, log=True),
        },
        description="How much a head that scores poles weighs, and the |Q| that it calls near one.",
    ),
    Space(
        "hybrid",
        {
            "fit": _FIT,
            "hybrid_schedule": Choice(("none", "linear", "cosine", "exponential"), when=_QUOTIENT),
            "hybrid_warmup_epochs": Int(0, 10, when=_HYBRID),
            "hybrid_transition_epochs": Int(1, 40, log=True, when=_HYBRID),
            "hybrid_delta_init": Float(1e-3, 0.5, log=True, when=_HYBRID),
            "hybrid_delta_final": Float(1e-4, 1e-1, log=True, when=_HYBRID),
            "hybrid_adaptive_delta": Choice((True, False), when=_HYBRID),
            "hybrid_bound": Float(0.1, 1.0, log=True, when=_HYBRID),
        },
        description="How far around a pole gradients saturate, by epoch, where the fit is the quotient.",
    ),
    Space(
        "sampling",
        {
            "sampling": Choice(("shuffle", "near_pole")),
            "sampling_strength": Float(0.5, 16.0, log=True, when=_NEAR_POLE),
            "sampling_beta": Float(1e-2, 1.0, log=True, when=_NEAR_POLE),
            "sampling_memory": Float(0.05, 1.0, when=_NEAR_POLE),
            "sampling_correction": Choice((False, True), when=_NEAR_POLE),
        },
        description="Whether rows near poles are drawn more often, how much, and whether losses undo it.",
    ),
    Space(
        "controller",
        {
            # A term without a gradient cannot be controlled: instead of those of `coverage_targets`.
            "coverage_term": Choice(("ranked", "soft")),
            "target_coverage": Float(0.5, 0.995),
            "coverage_temperature": Float(1e-2, 0.2, log=True),
            "coverage_control": Choice(("unbiased", "reference")),
            "lambda_rej": Float(1e-3, 1.0, log=True),
            "control_rate": Float(1e-2, 0.5, log=True),
            "control_dead_band": Float(0.0, 0.05),
            "control_momentum": Float(0.0, 0.9),
            "control_warmup_steps": Int(0, 400),
            "control_update_frequency": Choice((1, 4, 16)),
            "control_decay": Choice((None, 0.999, 0.99)),
            "control_lambda_min": Float(1e-3, 0.1, log=True),
            "control_lambda_max": Choice((None, 1.0, 10.0)),
        },
        description="A weight of the coverage term that follows the coverage: by which rule, after which "
        "target, how fast, and within which bounds.",
    ),
    Space(
        "guards",
        {
            "output_bound": Choice((None, 0.5, 0.9)),
            "output_bound_form": Choice(
                ("hard", "soft", "straight_through"), when={"output_bound": (0.5, 0.9)}
            ),
            "lambda_saturation": Float(1e-3, 10.0, log=True),
            "saturation_threshold": Float(1.0, 20.0),
            "lambda_spread": Float(1e-2, 10.0, log=True),
            "target_spread": Float(0.02, 0.4),
            "cap_ratio": Choice((None, 0.1, 0.25, 0.5)),
            "cap_currency": Choice(("loss", "gradient", "reference"), when=_CAPPED),
            # The reference's rule has a floor of its own.
            "cap_floor": Float(1e-3, 0.3, log=True, when={**_CAPPED, "cap_currency": ("loss", "gradient")}),
        },
        description="Guards of stability: bounded outputs, gates kept where they can move, rows kept apart, "
        "terms beside the fit kept to a share.",
    ),
    Space(
        "equivariance",
        {
            "lambda_equivariance": Float(1e-2, 10.0, log=True),
            "equivariance_views": Int(1, 3),
            "equivariance_distance": Choice(("kl", "l2")),
        },
        description="How hard answers to transformed inputs are kept alike; for tasks with symmetries().",
    ),
)

SPACES: dict[str, Space] = {space.name: space for space in _NAMED}
SPACES["default"] = compose(*_NAMED, name="default", description="All of the above, together.")
SPACES |= {space.name: space for space in _APART}


def named_space(name: str) -> Space:
    """The space called `name`; SpaceError with the nearest known name where there is none."""
    if name not in SPACES:
        raise SpaceError([f"unknown space {name!r} {nearest_hint(name, SPACES)}"])
    return SPACES[name]


def parse_space(plain: object) -> Space:
    """The space that a plan asks for; SpaceError with every problem found.

    `plain` is a name, a list of names, a mapping of knobs to domains, or a mapping with `use` (names),
    `domains` (further knobs), `constraints` and `override` (other domains for knobs of the spaces used). What
    `Space.to_plain` gives is read back as well.
    """
    if isinstance(plain, Space):
        return plain
    if isinstance(plain, str):
        return named_space(plain)
    if isinstance(plain, list | tuple):
        return _used(plain)
    if not isinstance(plain, Mapping):
        raise SpaceError([f"a space must be a name, a list of names or a mapping, got {plain!r}"])
    if not _EXPLICIT & set(plain):
        return Space.from_plain({"name": "custom", "domains": plain})
    return _parse_explicit(plain)


_EXPLICIT = {"use", "domains", "override"}


def _parse_explicit(plain: Mapping[str, Any]) -> Space:
    given = dict(plain)
    override = given.pop("override", None) or {}
    used = given.pop("use", None) or []
    parts = [_used([used] if isinstance(used, str) else used)] if used else []
    if not isinstance(override, Mapping):
        raise SpaceError([f"override must map knobs to domains, got {override!r}"])
    extra = listed_constraints(given.pop("constraints", None))
    if isinstance(given.get("domains"), Mapping):
        # Conditions and constraints may speak of knobs of the spaces used: all are read as one space.
        domains = {**_plain_domains(parts), **given["domains"]}
        again = [k for k in given["domains"] if parts and k in parts[0].domains]
        if again:
            raise SpaceError([f"{k} is in the spaces used already; change it under override" for k in again])
        listed = [*map(str, parts[0].constraints if parts else ()), *extra]
        space = Space.from_plain({**given, "domains": domains, "constraints": listed})
    elif parts and given.get("domains") is None:
        header = {key: given[key] for key in given if key != "domains"}
        named = {"name": parts[0].name, "description": parts[0].description, **header}
        listed = [*map(str, parts[0].constraints), *extra]
        space = Space.from_plain({**named, "domains": _plain_domains(parts), "constraints": listed})
    else:
        space = Space.from_plain({**given, "constraints": extra})
    return space.override(override) if override else space


def _plain_domains(parts: list[Space]) -> dict[str, Any]:
    return {knob: domain for part in parts for knob, domain in part.domains.items()}


def _used(names: object) -> Space:
    if not isinstance(names, list | tuple) or not names:
        raise SpaceError([f"at least one space must be named, got {names!r}"])
    problems = [
        f"unknown space {name!r} {nearest_hint(str(name), SPACES)}"
        for name in names
        if not isinstance(name, str) or name not in SPACES
    ]
    if problems:
        raise SpaceError(problems)
    spaces = [SPACES[name] for name in names]
    return spaces[0] if len(spaces) == 1 else compose(*spaces, name="+".join(names))
