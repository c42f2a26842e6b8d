"""Which trials may share a pack: every knob has its place, and what a pack cannot do is named."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from scm.data import Split
from scm.models import make_model
from scm.packed import eligibility
from scm.packed.eligibility import IN_LOSS, IN_MODEL, OWN, SHARED, pack_signature, why_not_packable
from scm.training.targets import lift_semantic_targets
from scm.trial_config import KNOBS, TrialConfig


def split(rows: int = 8, width: int = 5, status: int = 0) -> Split:
    source = torch.Generator().manual_seed(0)
    values = torch.randn(rows, generator=source)
    statuses = torch.full((rows,), status)
    return Split(torch.randn(rows, width, generator=source), lift_semantic_targets(values, statuses))


def splits(**options: int) -> dict[str, Split]:
    return {"train": split(**options), "val": split(**options)}


def test_no_knob_is_of_two_kinds():
    kinds = (OWN, IN_LOSS, SHARED, IN_MODEL)
    assert sum(map(len, kinds)) == len(frozenset().union(*kinds))
    assert frozenset().union(*kinds) <= set(KNOBS)


# What turns each knob that no pack can do, with what it needs to act.
_ALONE = {
    "mixed_precision": {"mixed_precision": True},
    "finite_action": {"finite_action": "roll_back"},
    "cap_currency": {"cap_ratio": 0.2, "cap_currency": "gradient"},
    "hybrid_schedule": {"fit": "quotient", "hybrid_schedule": "linear"},
    "sampling": {"sampling": "near_pole"},
    "lambda_equivariance": {"lambda_equivariance": 0.1},
    "gap_watch": {"gap_watch": True},
    "lambda_tag": {"lambda_tag": 0.1},
    "lambda_pole": {"lambda_pole": 0.1},
}


@pytest.mark.parametrize("name", sorted(_ALONE))
def test_what_no_pack_can_do_is_named(name):
    config = TrialConfig(**_ALONE[name])
    reason = why_not_packable(config, make_model(config, 5), splits())
    assert reason is not None
    assert reason.startswith(f"{name}=")


def test_every_other_knob_is_done_by_packs():
    """A knob that is added to the trial's and forgotten here is refused, not passed over."""
    known = OWN | IN_LOSS | SHARED | IN_MODEL
    for name in set(KNOBS) - known:
        needs = {knob for told in _ALONE.values() for knob in told}
        only_with = set(KNOBS[name].active_when)
        assert name in _ALONE or only_with & needs, name


def test_a_knob_that_is_not_known_is_refused_as_soon_as_it_is_turned(monkeypatch):
    monkeypatch.setattr(eligibility, "OWN", OWN - {"clip_norm"})
    model = make_model(TrialConfig(), 5)
    assert why_not_packable(TrialConfig(), model, splits()) is None
    assert why_not_packable(TrialConfig(clip_norm=1.0), model, splits()) == "clip_norm=1.0"


def test_what_would_fail_alone_is_left_to_fail_alone():
    """So that the trial's row says what it says without packs."""
    plain = TrialConfig()
    model = make_model(plain, 5)
    assert "val split" in str(why_not_packable(TrialConfig(restore_best=True), model, {"train": split()}))
    assert "no parameters" in str(why_not_packable(plain, nn.Identity(), splits()))
    tiny = TrialConfig(tau_infer=1e-60)
    assert "tau must not round to 0" in str(why_not_packable(tiny, model, splits()))
    floor = TrialConfig(head="multihead", q_param="softplus", q_min=0.1, tuple_norm="none")
    head = make_model(floor, 5)
    assert why_not_packable(floor, head, splits()) is None
    assert "cannot reach" in str(why_not_packable(floor, head, splits(status=3)))


def signature(config: TrialConfig, **options: int) -> tuple[object, ...]:
    return pack_signature(config, make_model(config, options.get("width", 5)), splits(**options))


@pytest.mark.parametrize("name", sorted(OWN | IN_LOSS))
def test_trials_that_differ_in_numbers_of_their_own_may_share_a_pack(name):
    """Save that an optional guard is there in all of them or in none."""
    knob = KNOBS[name]
    needs = {
        "nesterov": {"optimizer": "sgd", "momentum": 0.5},
        "tau_train_min": {"tau_train_max": 1.0},
        "tau_infer": {"tau_train_min": 1.0, "tau_train_max": 1.0},
        "tau_finite": {"tau_bottom": 0.0},
        "output_bound": {"output_bound": 3.0},
        "cap_ratio": {"cap_ratio": 0.7},
        "lambda_saturation": {"lambda_saturation": 0.1},
        "lambda_spread": {"lambda_spread": 0.1},
    }.get(name, {})
    base = TrialConfig(**needs)
    other = {
        "bool": True,
        "int": 7,
        "float": 0.005 if name.startswith("tau_b") else 0.35,
        "str": knob.choices[-1] if knob.choices else None,
    }[knob.type]
    changed = dataclasses.replace(base, **{name: other})
    assert getattr(changed, name) != getattr(base, name)
    assert signature(base) == signature(changed)


@pytest.mark.parametrize(
    "change",
    [
        {"batch_size": 16},
        {"gradient_accumulation_steps": 2},
        {"dtype": "float64"},
        {"fit": "implicit"},
        {"coverage_term": "hard"},
        {"coverage_control": "unbiased"},
        {"output_bound": 2.0},
        {"cap_ratio": 0.5},
        {"lambda_saturation": 0.5},
        {"lambda_spread": 0.5},
        {"hidden_width": 32},
        {"hidden_depth": 1},
        {"head": "angular"},
        {"tuple_norm": "none"},
    ],
)
def test_trials_whose_steps_differ_may_not(change):
    assert signature(TrialConfig()) != signature(TrialConfig(**change))


def test_data_of_other_shapes_make_another_pack():
    plain = TrialConfig()
    assert signature(plain) == signature(plain)
    assert signature(plain) != signature(plain, rows=9)
    model = make_model(plain, 5)
    assert pack_signature(plain, model, splits()) != pack_signature(plain, model, {"train": split()})
