"""The multiplier that follows coverage: two rules, one controller and many, and its place in a training."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from scm.core.tags import TRTag
from scm.data import Split
from scm.losses.coverage import ranked_coverage_loss
from scm.losses.quotient import quotient_loss
from scm.losses.training import LossConfig, SCMTrainingLoss
from scm.models import make_model
from scm.training.adaptive_loss import (
    AdaptiveLambda,
    AdaptiveLoss,
    AdaptiveLossConfig,
    CoverageController,
    create_adaptive_loss,
)
from scm.training.companion import Moment
from scm.training.config import TrainingConfig
from scm.training.control_rules import RULES, ControlSettings, ControlState, pick
from scm.training.coverage import CoverageMetrics, count_tags, summed_counts
from scm.training.curriculum import LinearRamp, LossWeightsCurriculum
from scm.training.feed import Fed
from scm.training.loader import TensorBatches
from scm.training.tag_loss import adaptive_tag_weight
from scm.training.targets import STATUS_CODES, SemanticTargets, lift_semantic_targets
from scm.training.trainer import SCMTrainer
from scm.trial import make_trainer
from scm.trial_config import TrialConfig

Cases = Callable[[str], list[dict[str, Any]]]

RULE_NAMES = sorted(RULES)


def controller(rule: str = "unbiased", **settings: Any) -> AdaptiveLambda:
    """A controller of a rule, with 0.1 of the gap at a step where nothing else is said."""
    return AdaptiveLambda(AdaptiveLossConfig(rule=rule, **{"learning_rate": 0.1, **settings}))


def answers(finite: int, counted: int) -> CoverageMetrics:
    """So many answers with a value, of so many."""
    return CoverageMetrics(n_real=finite, n_phi=counted - finite)


# --- the recorded rule ----------------------------------------------------------------------------------


def test_the_reference_is_the_recorded_controller(vector_group: Cases) -> None:
    """18 configs, 200 batches each: the multiplier and all that is said beside it, after every batch."""
    for case in vector_group("adaptive_lambda"):
        adaptive = AdaptiveLambda(AdaptiveLossConfig(**case["config"]))
        expected = case["expected"]
        for number, counts in enumerate(case["tag_counts"]):
            adaptive.update([tag for tag, count in enumerate(counts) for _ in range(count)])
            said = adaptive.get_statistics()
            found = {
                "lambda_rej": adaptive.get_penalty(),
                "batch_coverage": said["batch_coverage"],
                "velocity": said["velocity"],
                "learning_rate": said["learning_rate"],
                "tag_loss_weight": adaptive.get_tag_loss_weight(),
                "n_updates": len(adaptive.update_history),
            }
            wanted = {name: expected[name][number] for name in found}
            assert found == pytest.approx(wanted, rel=1e-11, abs=0.0), (case["id"], number)
        assert len(adaptive.lambda_history) == expected["lambda_history_length"]
        final = adaptive.get_statistics()
        del final["tag_distribution"]["n_bottom"]
        for name, value in expected["final_statistics"].items():
            assert final[name] == (value if value is None else pytest.approx(value, rel=1e-11)), name
        assert set(final) == set(expected["final_statistics"])


def test_the_defaults_are_the_recorded_ones() -> None:
    """What is None in the signature is the reference's own value, once built."""
    config = AdaptiveLossConfig()
    assert (config.initial_lambda, config.target_coverage, config.learning_rate) == (1.0, 0.95, 0.01)
    assert (config.lambda_min, config.lambda_max, config.lambda_rej_min) == (0.1, None, 0.1)
    assert (config.momentum, config.warmup_steps, config.update_frequency) == (0.0, 0, 1)
    assert (config.dead_band, config.rate_up, config.rate_down, config.cumulative_steps) == (
        0.02,
        0.5,
        2.0,
        2,
    )
    made = create_adaptive_loss(tag_loss_weight=0.1).adaptive.config
    assert (made.momentum, made.warmup_steps, made.update_frequency) == (0.9, 100, 10)
    assert made.tag_loss_max_weight == pytest.approx(0.4)


@pytest.mark.parametrize("rule", RULE_NAMES)
def test_too_little_coverage_raises_the_multiplier_and_too_much_lowers_it(rule: str) -> None:
    """One direction only, whatever the rule."""
    low, high = (controller(rule, target_coverage=0.5, cumulative_steps=0) for _ in range(2))
    low.update(answers(1, 10))
    high.update(answers(9, 10))
    assert low.lambda_rej > 1.0 > high.lambda_rej


# --- what noise does ------------------------------------------------------------------------------------


def test_zero_mean_noise_leaves_the_unbiased_rule_where_it_is_and_drifts_the_reference_to_its_floor() -> None:
    """20,000 batches whose coverage is right on average: a defect of one rule that the other has not."""
    noise = torch.randn(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.05
    both = {rule: controller(rule, target_coverage=0.8, learning_rate=0.01) for rule in RULE_NAMES}
    averaged = controller("unbiased", target_coverage=0.8, learning_rate=0.01, momentum=0.9)
    for gap in (noise - noise.mean()).tolist():
        for adaptive in (*both.values(), averaged):
            adaptive.observe(min(max(0.8 - gap, 0.0), 1.0))
    assert both["reference"].lambda_rej == 0.1
    assert both["unbiased"].lambda_rej == pytest.approx(1.0, abs=0.01)
    assert averaged.lambda_rej == pytest.approx(1.0, abs=0.02)


@given(told=st.lists(st.floats(0, 1), max_size=20), rule=st.sampled_from(RULE_NAMES), nan=st.integers(0, 20))
def test_a_coverage_that_is_not_a_number_moves_nothing(told: list[float], rule: str, nan: int) -> None:
    """Neither the multiplier nor the velocity, nor what is judged later."""
    adaptive = controller(rule, momentum=0.5, cumulative_steps=0)
    for coverage in told[:nan]:
        adaptive.observe(coverage)
    before = (adaptive.lambda_rej, adaptive.get_statistics()["velocity"])
    for coverage in (math.nan, math.inf, -math.inf):
        adaptive.observe(coverage)
    assert (adaptive.lambda_rej, adaptive.get_statistics()["velocity"]) == before
    plain = controller(rule, momentum=0.5, cumulative_steps=0)
    for coverage in told:
        plain.observe(coverage)
    for coverage in told[nan:]:
        adaptive.observe(coverage)
    assert adaptive.lambda_rej == plain.lambda_rej


@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 20), st.integers(1, 20))
def test_the_unbiased_rule_judges_by_all_answers_since_its_last_update(
    a: int, b: int, c: int, d: int
) -> None:
    """Two batches of different sizes count as one; what came before the last update is forgotten."""
    adaptive = controller(target_coverage=0.5, update_frequency=2, warmup_steps=1)
    adaptive.update(answers(0, 20))  # warm-up
    adaptive.update(answers(min(a, b), b))
    adaptive.update(answers(min(c, d), d))
    first = 1.0 + 0.1 * (0.5 - (min(a, b) + min(c, d)) / (b + d))
    assert adaptive.lambda_rej == pytest.approx(max(first, 0.0))
    adaptive.update([])
    adaptive.update(answers(1, 2))
    assert adaptive.lambda_rej == pytest.approx(max(first, 0.0))
    assert [step for step, _ in adaptive.lambda_history] == [0, 3, 5]


def test_no_answers_at_all_are_no_reason_to_move() -> None:
    """The unbiased rule waits for an answer; the reference takes coverage to be 1, as is recorded."""
    unbiased, reference = controller("unbiased"), controller("reference")
    for _ in range(3):
        unbiased.update([])
        reference.update([])
    assert unbiased.lambda_rej == 1.0
    assert reference.lambda_rej < 1.0
    assert unbiased.update_history == []


def test_the_dead_band_stops_velocity_in_one_rule_and_keeps_it_in_the_other() -> None:
    """Inside of it the unbiased velocity fades; the recorded one is frozen and goes on afterwards."""
    settings: dict[str, Any] = {"target_coverage": 0.5, "momentum": 0.5, "dead_band": 0.2}
    velocities = {}
    for rule in RULE_NAMES:
        adaptive = controller(rule, **settings)
        adaptive.observe(0.0)
        for _ in range(20):
            adaptive.observe(0.5)
        velocities[rule] = adaptive.get_statistics()["velocity"]
    assert velocities["reference"] == pytest.approx(0.05)
    assert velocities["unbiased"] < 1e-6


def test_the_rate_decays_with_every_batch_after_warm_up() -> None:
    """Also with those that changed nothing."""
    adaptive = controller(exponential_decay=0.5, warmup_steps=1, update_frequency=2, target_coverage=1.0)
    for _ in range(3):
        adaptive.observe(0.0)
    assert adaptive.update_history == [(3, pytest.approx(0.1 * 0.25))]


# --- many controllers -----------------------------------------------------------------------------------


def stacked(settings: list[ControlSettings]) -> ControlSettings:
    """Many settings as one, with a float64 tensor in each field."""
    return ControlSettings(
        *(torch.tensor(column, dtype=torch.float64) for column in zip(*settings, strict=True))
    )


def random_settings(rule: str, drawn: torch.Generator) -> ControlSettings:
    """Settings of a rule, every field its own."""
    u = torch.rand(8, generator=drawn).tolist()
    own: dict[str, Any] = {"rate_up": 1.0 + u[6], "rate_down": 1.0 + u[7], "cumulative_steps": int(9 * u[5])}
    return AdaptiveLossConfig(
        rule=rule,
        target_coverage=u[0],
        learning_rate=u[1],
        lambda_max=1.0 + u[2] if u[2] > 0.3 else None,
        momentum=0.9 * u[3] if u[3] > 0.5 else 0.0,
        warmup_steps=int(10 * u[4]),
        update_frequency=1 + int(4 * u[5]),
        exponential_decay=0.9 + 0.1 * u[6] if u[6] > 0.5 else None,
        dead_band=0.1 * u[7],
        **(own if rule == "reference" else {}),
    ).settings()


@pytest.mark.parametrize("vmapped", [False, True], ids=["stacked", "vmapped"])
@pytest.mark.parametrize("rule", RULE_NAMES)
def test_many_controllers_at_once_are_each_of_them_alone(rule: str, vmapped: bool) -> None:
    """The update of K controllers with settings of their own equals K updates, to the last bits."""
    drawn = torch.Generator().manual_seed(1)
    settings = [random_settings(rule, drawn) for _ in range(24)]
    step = RULES[rule].step
    together = ControlState(*(torch.full((24,), value, dtype=torch.float64) for value in (1.0, *[0.0] * 6)))
    alone = [ControlState(1.0) for _ in settings]
    many = stacked(settings)
    advance = torch.vmap(step) if vmapped else step
    for number in range(40):
        counted = torch.randint(0, 9, (24,), generator=drawn).to(torch.float64)
        finite = (counted * torch.rand(24, generator=drawn)).floor()
        heard = torch.rand(24, generator=drawn) > 0.1
        together = advance(together, finite, counted, many, heard)
        alone = [
            step(state, float(finite[k]), float(counted[k]), settings[k], bool(heard[k]))
            for k, state in enumerate(alone)
        ]
        expected = torch.tensor(alone, dtype=torch.float64).T
        found = torch.stack([torch.as_tensor(field) for field in together])
        assert torch.allclose(found, expected, rtol=1e-12, atol=1e-15), number
    assert all(field.dtype == torch.float64 for field in together)
    assert len(set(together.multiplier.tolist())) > 12


@pytest.mark.parametrize("rule", RULE_NAMES)
def test_counts_that_stay_on_their_device_are_not_waited_for(rule: str) -> None:
    """Told tensors, here of the device "meta" that has no values, it never asks for one."""
    adaptive = controller(rule, momentum=0.5, update_frequency=2, use_tag_loss=True)
    for _ in range(6):
        adaptive.update(torch.zeros(8, dtype=torch.int8, device="meta"))
    assert isinstance(adaptive.lambda_rej, Tensor)
    assert adaptive.lambda_rej.shape == ()
    assert isinstance(adaptive.get_tag_loss_weight(), Tensor)
    with pytest.raises((RuntimeError, NotImplementedError)):
        float(adaptive.lambda_rej)


def test_workers_that_share_their_counts_have_one_multiplier() -> None:
    """As one that saw all answers has; the multipliers of workers on their own differ from it."""
    drawn = torch.Generator().manual_seed(0)
    settings: dict[str, Any] = {"rule": "reference", "target_coverage": 0.6, "momentum": 0.5}
    whole, shared, lonely = (controller(**settings) for _ in range(3))
    for _ in range(50):
        parts = [
            torch.randint(0, 4, (n,), generator=drawn) * (torch.rand(n, generator=drawn) < 0.5)
            for n in (3, 17)
        ]
        whole.update(torch.cat(parts))
        shared.update_counts(summed_counts(*(count_tags(part) for part in parts)))
        lonely.update(parts[0])
    assert shared.lambda_rej == whole.lambda_rej
    assert shared.get_statistics() == whole.get_statistics()
    assert lonely.lambda_rej != whole.lambda_rej


# --- state, histories, cost -----------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULE_NAMES)
def test_a_controller_goes_on_from_its_state(rule: str) -> None:
    """Statistics and histories after going on are those of never having stopped."""
    drawn = torch.Generator().manual_seed(0)
    told = [torch.randint(0, 5, (8,), generator=drawn) for _ in range(30)]
    through, before, after = (
        controller(rule, momentum=0.5, warmup_steps=3, update_frequency=2, history_size=7) for _ in range(3)
    )
    for codes in told:
        through.update(codes)
    for codes in told[:14]:
        before.update(codes)
    after.load_state_dict(before.state_dict())
    for codes in told[14:]:
        after.update(codes)
    assert after.get_statistics() == through.get_statistics()
    assert after.state_dict() == through.state_dict()


def test_histories_are_bounded_and_say_which_batch_they_are_of() -> None:
    """Each entry has its step, so that histories of different lengths can be laid over one another."""
    adaptive = controller(history_size=5, update_frequency=3, target_coverage=0.5)
    for number in range(1, 41):
        adaptive.update(answers(number % 2, 1))
    assert [step for step, _ in adaptive.coverage_history] == [36, 37, 38, 39, 40]
    assert [step for step, _ in adaptive.lambda_history] == [27, 30, 33, 36, 39]
    assert [step for step, _ in adaptive.update_history] == [27, 30, 33, 36, 39]
    assert adaptive.coverage_history[-1] == (40, 0.0)
    assert adaptive.lambda_history[-1][1] == adaptive.lambda_rej
    adaptive.reset()
    assert adaptive.lambda_history == [(0, 1.0)]
    assert (adaptive.step_count, adaptive.update_history, adaptive.tracker.cumulative.total) == (0, [], 0)


def test_an_update_is_cheap() -> None:
    """Well below a tenth of a millisecond a batch on the CPU, tags counted included."""
    adaptive = controller()
    codes = torch.zeros(64, dtype=torch.int8)
    best = math.inf
    for _ in range(20):
        begun = time.perf_counter()
        for _ in range(50):
            adaptive.update(codes)
        best = min(best, (time.perf_counter() - begun) / 50)
    assert best < 100e-6


# --- settings -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"target_coverage": 1.1}, ValueError, "target_coverage must be finite and in"),
        ({"target_coverage": math.nan}, ValueError, "target_coverage"),
        ({"initial_lambda": -1.0}, ValueError, "initial_lambda must be finite and >= 0"),
        ({"learning_rate": math.inf}, ValueError, "learning_rate"),
        ({"learning_rate": "0.1"}, TypeError, "learning_rate must be a number"),
        ({"lambda_min": -0.1}, ValueError, "lambda_min"),
        ({"lambda_rej_min": -0.1}, ValueError, "lambda_rej_min"),
        ({"lambda_max": math.nan}, ValueError, "lambda_max"),
        ({"momentum": 1.0}, ValueError, "momentum must be finite and in"),
        ({"warmup_steps": -1}, ValueError, "warmup_steps must be >= 0"),
        ({"update_frequency": 0}, ValueError, "update_frequency must be >= 1"),
        ({"update_frequency": 2.0}, TypeError, "update_frequency must be an int"),
        ({"exponential_decay": 0.0}, ValueError, "exponential_decay"),
        ({"exponential_decay": 1.5}, ValueError, "exponential_decay"),
        ({"dead_band": -0.02}, ValueError, "dead_band"),
        ({"rate_up": -1.0}, ValueError, "rate_up"),
        ({"rate_down": math.nan}, ValueError, "rate_down"),
        ({"cumulative_steps": -2}, ValueError, "cumulative_steps"),
        ({"history_size": 0}, ValueError, "history_size must be >= 1"),
        ({"use_tag_loss": 1}, TypeError, "use_tag_loss must be a bool"),
        ({"tag_loss_adaptive": None}, TypeError, "tag_loss_adaptive must be a bool"),
        ({"tag_loss_weight": -0.1}, ValueError, "tag_loss_weight"),
        ({"tag_loss_weight": 0.3}, ValueError, "tag_loss_max_weight must be >= tag_loss_weight"),
        ({"rule": "both"}, ValueError, "rule must be one of reference, unbiased"),
        ({"rule": "unbiased", "rate_up": 0.5}, ValueError, "rate_up == rate_down"),
        ({"rule": "unbiased", "cumulative_steps": 2}, ValueError, "cumulative_steps == 0"),
    ],
)
def test_settings_that_cannot_be_right_are_refused(
    settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    """Every field is checked when built, and the message names it with its value."""
    with pytest.raises(error, match=message):
        AdaptiveLossConfig(**settings)


def test_every_setting_of_the_controller_is_checked() -> None:
    """A value of another type is refused for each field, so that none can be forgotten."""
    for item in fields(AdaptiveLossConfig):
        with pytest.raises((TypeError, ValueError), match=item.name):
            AdaptiveLossConfig(**{item.name: object()})


@pytest.mark.parametrize("rule", RULE_NAMES)
def test_a_coverage_that_a_device_measured_is_taken_as_a_number(rule: str) -> None:
    """One of a tensor moves the multiplier by as much, and one that is not finite is ignored."""
    plain, kept = controller(rule), controller(rule)
    for coverage, number in ((0.25, 8.0), (math.nan, 4.0), (0.75, 2.0), (1.0, 4.0)):
        plain.observe(coverage, number)
        kept.observe(torch.tensor(coverage), torch.tensor(number, dtype=torch.float64))
    assert isinstance(kept.lambda_rej, Tensor)
    assert kept.lambda_rej.dtype == torch.float64
    assert float(kept.lambda_rej) == pytest.approx(plain.lambda_rej, rel=1e-12)
    for name in ("lambda_history", "coverage_history", "update_history"):
        found = dict(getattr(kept, name))  # of a batch that was ignored it may say that nothing changed
        assert {step: found[step] for step, _ in getattr(plain, name)} == pytest.approx(
            dict(getattr(plain, name)), rel=1e-12
        )


def test_histories_of_a_device_begin_after_the_warm_up() -> None:
    """As on the host: in the first batches nothing is updated, and nothing is written down."""
    kept = controller("unbiased", warmup_steps=2, update_frequency=2)
    for _ in range(5):
        kept.update_counts(torch.tensor([3, 0, 0, 0, 1, 0]))
    assert [step for step, _ in kept.lambda_history] == [0, 4]
    assert [step for step, _ in kept.update_history] == [4]


def test_the_weight_of_the_tag_loss_is_capped_by_its_own_setting() -> None:
    """Not by the default cap."""
    capped = AdaptiveLossConfig(use_tag_loss=True, tag_loss_weight=0.05, tag_loss_max_weight=0.06)
    adaptive = AdaptiveLambda(capped)
    adaptive.update(answers(10, 10))
    assert adaptive.get_tag_loss_weight() <= 0.06
    assert adaptive.get_tag_loss_weight() == pytest.approx(
        adaptive_tag_weight(0.05, 1.0, max_weight=0.06), rel=1e-12
    )


def test_the_unbiased_rule_remembers_and_has_a_dead_band() -> None:
    """v = momentum * v + rate * gap, and the multiplier changes by v; a smaller gap than the band is none."""
    heavy = controller("unbiased", momentum=0.5, target_coverage=1.0)
    for expected in (1.1, 1.25, 1.425):  # gaps of 1: v is 0.1, 0.15, 0.175
        heavy.update(answers(0, 4))
        assert heavy.lambda_rej == pytest.approx(expected)
    assert heavy.get_statistics()["velocity"] == pytest.approx(0.175)
    still = controller("unbiased", dead_band=0.25, target_coverage=0.75)
    still.update(answers(9, 16))  # a gap of 3/16
    assert still.lambda_rej == 1.0
    still.update(answers(4, 8))  # a gap of just the band
    assert still.lambda_rej == pytest.approx(1.0 + 0.1 * 0.25)


def test_batches_of_the_warm_up_are_not_judged_later() -> None:
    """The first update of the unbiased rule is by the answers after the warm-up alone."""
    warm = controller("unbiased", warmup_steps=1, update_frequency=2, target_coverage=0.5)
    warm.update(answers(0, 10))
    warm.update(answers(10, 10))
    warm.update(answers(10, 10))
    assert warm.lambda_rej == pytest.approx(1.0 - 0.1 * 0.5)


def test_a_batch_counts_as_one_answer_unless_said_otherwise() -> None:
    """In the coverage of all answers since the last update."""
    told = controller("unbiased", update_frequency=2, target_coverage=1.0)
    told.observe(0.0)
    told.observe(1.0, 3.0)
    assert told.lambda_rej == pytest.approx(1.0 + 0.1 * 0.25)


@pytest.mark.parametrize("rule", RULE_NAMES)
def test_updates_are_counted(rule: str) -> None:
    """Each batch at which the multiplier was due, whether it moved or not."""
    counted = controller(rule, update_frequency=2)
    for _ in range(5):
        counted.update(answers(1, 2))
    assert counted.state_dict()["state"]["updates"] == 2.0


def test_a_cap_of_the_tag_loss_may_be_its_weight() -> None:
    """Then it does not adapt, and is no error."""
    config = AdaptiveLossConfig(use_tag_loss=True, tag_loss_weight=0.1, tag_loss_max_weight=0.1)
    assert AdaptiveLambda(config).get_tag_loss_weight() == pytest.approx(0.1)


def test_a_choice_between_numbers_is_made_in_double_precision() -> None:
    """Where the condition is a tensor and both numbers are plain, or one of them is."""
    condition = torch.tensor([True, False])
    for chosen in (pick(condition, 0.1, 0.2), pick(condition, torch.tensor(0.1).double() * 0 + 0.1, 0.2)):
        assert isinstance(chosen, Tensor)
        assert chosen.tolist() == [0.1, 0.2]
    assert pick(condition, 0.1, torch.full((2,), 0.2, dtype=torch.float64)).tolist() == [0.1, 0.2]
    assert (pick(True, 0.1, 0.2), pick(False, 0.1, 0.2)) == (0.1, 0.2)


def test_a_rate_of_zero_is_a_rate() -> None:
    """What may be None by default is not taken for unset where it is 0."""
    settings = AdaptiveLossConfig(rate_up=0.0, rate_down=0.0, dead_band=0.0, cumulative_steps=0).settings()
    assert (settings.rate_up, settings.rate_down, settings.dead_band, settings.cumulative_steps) == (0,) * 4
    still = controller("reference", rate_up=0.0)
    still.update(answers(0, 10))
    assert still.lambda_rej == 1.0
    assert AdaptiveLossConfig(exponential_decay=1.0).settings().decay == 1.0


def test_the_unbiased_step_is_scaled_by_its_one_rate() -> None:
    """Both factors, which must be equal, multiply the change."""
    scaled = controller("unbiased", rate_up=4.0, rate_down=4.0, target_coverage=1.0)
    scaled.update(answers(0, 10))
    assert scaled.lambda_rej == pytest.approx(1.0 + 4.0 * 0.1)
    assert scaled.state_dict()["state"]["updates"] == 1.0


def test_a_measured_coverage_must_be_a_share() -> None:
    """Outside of [0, 1] it is an error, at the call."""
    with pytest.raises(ValueError, match="coverage must be in"):
        controller().observe(1.5)


# --- in a training --------------------------------------------------------------------------------------


def linear_problem(rows: int = 96) -> Split:
    """Numbers on a line, every fourth row a bottom, and some that are missing."""
    drawn = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 2, generator=drawn)
    codes = torch.zeros(rows, dtype=torch.int64)
    codes[::4] = STATUS_CODES["bottom"]
    codes[5::16] = STATUS_CODES["missing"]
    return Split(x, lift_semantic_targets(x[:, 0] * 2, codes))


PROBLEM = linear_problem()
CONTROLLED: dict[str, Any] = {
    "coverage_control": "unbiased",
    "coverage_term": "ranked",
    "coverage_temperature": 0.1,
    "control_warmup_steps": 3,
    "tau_train_min": 0.3,
    "tau_train_max": 0.3,
    "tau_infer": 0.3,
    "batch_size": 16,
    "learning_rate": 0.02,
    "max_epochs": 4,
    "hidden_width": 8,
}


def trial(**knobs: Any) -> SCMTrainer:
    """The trainer of a controlled trial."""
    config = TrialConfig.from_flat({**CONTROLLED, **knobs})
    return make_trainer(config, 0, lambda: make_model(config, 2), PROBLEM, PROBLEM)


def adaptive_of(trainer: SCMTrainer) -> AdaptiveLambda:
    """The controller of a trial."""
    return trainer.controllers["coverage_controller"].adaptive


def moment(P: Tensor, Q: Tensor, *, tau: float = 0.5, codes: Tensor | None = None, **facts: Any) -> Moment:
    """A micro-batch of these answers."""
    semantic: SemanticTargets | None = (
        None if codes is None else lift_semantic_targets(torch.ones(len(P)), codes)
    )
    fed = Fed(P, P, (P, Q), semantic, len(P))
    return Moment(nn.Linear(1, 1), fed, {"tau": tau, "loss_weights": None, **facts}, (P, Q))


def test_the_companion_is_told_what_strict_decoding_accepts_of_the_trained_rows() -> None:
    """Small |Q|, NaN, infinities and quotients that overflow are not; missing and fault rows do not count."""
    inf, nan = math.inf, math.nan
    P = torch.tensor([1.0, 1.0, nan, inf, 3e38, 1.0, 1.0, 1.0, 1.0])
    Q = torch.tensor([0.5, 0.4, 1.0, 1.0, 0.6, nan, inf, -2.0, 2.0])
    codes = torch.tensor([0, 0, 0, 0, 0, 1, 1, STATUS_CODES["missing"], STATUS_CODES["fault"]])
    companion = CoverageController(controller())
    companion.after_backward(moment(P, Q, codes=codes))
    assert companion.adaptive.tracker.cumulative == CoverageMetrics(n_real=1, n_bottom=6)
    companion.after_backward(moment(P, Q))
    assert companion.adaptive.tracker.batch == CoverageMetrics(n_real=3, n_bottom=6)


def test_row_weights_weigh_the_coverage_that_is_told() -> None:
    """A row that stands for three counts as three."""
    Q = torch.tensor([1.0, 0.0, 1.0])
    companion = CoverageController(controller())
    companion.after_backward(moment(torch.ones(3), Q, row_weights=torch.tensor([1.0, 3.0, 0.0])))
    assert companion.adaptive.coverage_history == [(1, 0.25)]
    assert companion.telemetry()["control_coverage"] == 0.25
    companion.after_backward(moment(torch.ones(3), Q, row_weights=torch.zeros(3)))
    assert companion.adaptive.coverage_history[-1] == (2, 0.25)


def test_a_multiplier_of_a_device_weighs_in_the_dtype_of_the_model() -> None:
    """It is float64 there; the weight that the objective is told is of the model's own dtype."""
    companion = CoverageController(controller())
    companion.adaptive.update_counts(torch.tensor([1, 0, 0, 0, 3, 0]))
    now = moment(torch.ones(2), torch.ones(2))
    companion.before_forward(now)
    weight = now.facts["loss_weights"]["rejection"]
    assert weight.dtype == torch.float32
    assert float(weight) == pytest.approx(float(companion.adaptive.lambda_rej))


def test_weights_of_rows_that_are_not_trained_do_not_count() -> None:
    """Missing and fault rows are left out of the weighted coverage as of the plain one."""
    Q = torch.tensor([1.0, 0.0, 0.0, 0.0])
    codes = torch.tensor([0, 1, STATUS_CODES["missing"], STATUS_CODES["fault"]])
    companion = CoverageController(controller())
    weights = torch.tensor([3.0, 1.0, 5.0, 7.0])
    companion.after_backward(moment(torch.ones(4), Q, codes=codes, row_weights=weights))
    assert companion.adaptive.coverage_history == [(1, 0.75)]
    assert companion.telemetry()["control_coverage"] == 0.75
    more = moment(torch.ones(4), torch.tensor([1.0, 0.0, 0.0, 0.0]), row_weights=torch.ones(4))
    companion.after_backward(more)
    # Two answers of which 3/4 of the weight was accepted, and four of which 1/4 was.
    assert companion.telemetry()["control_coverage"] == pytest.approx((2 * 0.75 + 4 * 0.25) / 6)
    companion.begin_epoch(1, {})
    assert math.isnan(companion.telemetry()["control_coverage"])


def test_a_model_of_plain_values_cannot_be_controlled() -> None:
    """It has no denominator that could be pushed out."""
    plain = moment(torch.ones(3), torch.ones(3))
    plain.outputs = torch.ones(3)
    with pytest.raises(ValueError, match="needs a model that answers"):
        CoverageController(controller()).after_backward(plain)


def test_the_multiplier_is_the_weight_of_the_coverage_term() -> None:
    """It takes the place of the given weight, scaled by it over the initial one; other weights stay."""
    companion = CoverageController(controller(initial_lambda=2.0))
    for given_weights, expected in (
        (None, 2.0),
        ({"margin": 0.3}, 2.0),
        ({"margin": 0.3, "rejection": 0.5}, 0.5),
        ({"rejection": 0.0}, 0.0),
    ):
        now = moment(torch.ones(2), torch.ones(2), loss_weights=given_weights)
        companion.before_forward(now)
        assert now.facts["loss_weights"] == {**(given_weights or {}), "rejection": expected}
    companion.after_backward(now)
    assert companion.adaptive.step_count == 0  # a weight of 0 teaches nothing about the multiplier


def test_a_multiplier_that_begins_at_zero_is_the_weight_itself() -> None:
    """There is nothing to scale a given weight by."""
    companion = CoverageController(controller(initial_lambda=0.0, target_coverage=1.0))
    now = moment(torch.ones(2), torch.zeros(2), loss_weights={"rejection": 0.5})
    companion.before_forward(now)
    assert now.facts["loss_weights"] == {"rejection": 0.0}
    companion.after_backward(now)
    companion.before_forward(now)
    assert now.facts["loss_weights"]["rejection"] == pytest.approx(0.1)


def test_a_ramp_of_the_weights_ramps_the_multiplier() -> None:
    """In the epochs of `loss_ramp_epochs` the term weighs its share; what is learned is not lost."""
    trainer = trial(loss_ramp_epochs=2, lambda_rej=0.5, max_epochs=3)
    weights: list[float] = []
    objective = trainer._loss.function

    def listening(*arguments: Any, **facts: Any) -> Any:
        if torch.is_grad_enabled():
            weights.append(facts["loss_weights"]["rejection"])
        return objective(*arguments, **facts)

    trainer._loss_terms.function = listening
    trainer.fit()
    steps = len(weights) // 3
    assert weights[:steps] == [0.0] * steps
    # Told nothing in the first epoch, it is where it began, and has moved by the third.
    assert weights[steps] == 0.25
    history = [value for _, value in adaptive_of(trainer).lambda_history]
    assert weights[-1] == pytest.approx(history[-2])
    assert len(set(history)) > 3


@pytest.mark.parametrize("rule", RULE_NAMES)
def test_a_controlled_training_goes_on_from_its_checkpoint(rule: str, tmp_path: Any) -> None:
    """Interrupted in mid-epoch, it ends as one that was not, multiplier and telemetry included."""
    through = trial(coverage_control=rule)
    through.fit()
    stopped = trial(coverage_control=rule)
    saved = tmp_path / "half.pt"

    def save_once(record: Any) -> None:
        if stopped.global_step == 9 and not saved.exists():
            stopped.save_checkpoint(saved)

    stopped.config.log_hook = save_once
    stopped.fit()
    resumed = trial(coverage_control=rule)
    resumed.load_checkpoint(saved)
    resumed.fit()
    assert adaptive_of(resumed).state_dict() == adaptive_of(through).state_dict()
    assert resumed.telemetry() == through.telemetry()
    for one, other in zip(resumed.model.parameters(), through.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_telemetry_says_the_multiplier_and_the_coverage_of_the_epoch() -> None:
    """nan before anything was seen; afterwards that of the last epoch alone."""
    trainer = trial()
    assert math.isnan(trainer.telemetry()["control_coverage"])
    trainer.fit()
    said = trainer.telemetry()
    steps = adaptive_of(trainer).step_count // 4
    counted = [coverage for _, coverage in adaptive_of(trainer).coverage_history][-steps:]
    assert said["lambda_rej"] == adaptive_of(trainer).lambda_rej
    assert min(counted) <= said["control_coverage"] <= max(counted)


def test_control_raises_coverage_where_a_training_would_abstain() -> None:
    """Every fourth row is a bottom, and rejected; under control with a target of 0.95 most are answered."""

    def late(trainer: SCMTrainer) -> float:
        trainer.fit()
        return sum(val["val_coverage"] for val in trainer.val_history[-5:]) / 5

    long = {"max_epochs": 40, "control_warmup_steps": 20}
    alone = late(trial(**long, coverage_control="none", lambda_rej=0.0))
    controlled = late(trial(**long, target_coverage=0.95))
    assert alone < 0.85
    assert controlled > 0.9


def test_a_hard_coverage_term_cannot_be_controlled() -> None:
    """It has no gradient: the config says which terms have one."""
    with pytest.raises(ValueError, match="coverage_term ranked or soft, got coverage_term='hard'"):
        TrialConfig(coverage_control="unbiased", coverage_term="hard")
    TrialConfig(coverage_control="none", coverage_term="hard")


def test_bounds_of_the_multiplier_must_be_in_order() -> None:
    """Without control they are not looked at."""
    crossed: dict[str, Any] = {"control_lambda_min": 2.0, "control_lambda_max": 1.0}
    with pytest.raises(ValueError, match="control_lambda_min must be <= control_lambda_max"):
        TrialConfig(coverage_control="reference", **crossed)
    TrialConfig(**crossed)


# --- as one loss function -------------------------------------------------------------------------------


def adaptive_training(base_loss: str, companions: tuple[Any, ...] = ()) -> tuple[SCMTrainer, Any]:
    """A training of two epochs on the quotient with the adaptive loss."""
    torch.manual_seed(0)
    model = make_model(TrialConfig(hidden_width=8), 2)
    loss = create_adaptive_loss(0.9, 0.5, 1.0, base_loss, warmup_steps=0, update_frequency=1)
    trainer = SCMTrainer(
        model,
        torch.optim.SGD(model.parameters(), lr=0.05),
        loss,
        TensorBatches(PROBLEM.inputs, PROBLEM.targets, 16),
        config=TrainingConfig(
            max_epochs=2, tau_train_min=0.3, tau_train_max=0.3, tau_infer=0.3, coverage_threshold=0.0
        ),
        companions=companions,
    )
    return trainer, loss


@pytest.mark.parametrize("base_loss", ["mse", "mae", "huber"])
def test_the_adaptive_loss_reaches_every_parameter(base_loss: str) -> None:
    """No weight is left as it was: the data loss and the coverage term have gradients."""
    trainer, loss = adaptive_training(base_loss)
    before = [item.detach().clone() for item in trainer.model.parameters()]
    trainer.fit()
    assert not any(
        torch.equal(one, other) for one, other in zip(before, trainer.model.parameters(), strict=True)
    )
    assert loss.adaptive.lambda_rej != 1.0
    assert loss.adaptive.step_count == trainer.global_step


def test_an_answer_without_a_value_is_pushed_to_have_one() -> None:
    """The recorded penalty is a constant; here it moves the denominator, and the more, the higher it is."""
    slopes = []
    for penalty in (1.0, 3.0):
        loss = create_adaptive_loss(0.95, initial_lambda=penalty)
        P, Q = torch.tensor([1.0, 1.0]), torch.tensor([0.1, -0.2], requires_grad=True)
        loss((P, Q), (torch.ones(2), torch.ones(2)), tau=0.5).backward()
        assert Q.grad is not None
        assert Q.grad[0] < 0 < Q.grad[1]  # descent moves both away from 0
        slopes.append(Q.grad.abs())
    assert torch.allclose(slopes[1], 3 * slopes[0])


def test_looking_at_the_adaptive_loss_teaches_it_nothing() -> None:
    """In validation, where there are no gradients, the multiplier is only read."""
    loss = create_adaptive_loss(warmup_steps=0, update_frequency=1)
    with torch.no_grad():
        loss((torch.ones(3), torch.zeros(3)), (torch.ones(3), torch.ones(3)), tau=0.5)
    assert loss.adaptive.step_count == 0


def test_the_adaptive_loss_is_in_the_checkpoint(tmp_path: Any) -> None:
    """A training that goes on has the multiplier that it had."""
    trainer, loss = adaptive_training("mse")
    trainer.fit()
    trainer.save_checkpoint(tmp_path / "end.pt")
    again, fresh = adaptive_training("mse")
    again.load_checkpoint(tmp_path / "end.pt")
    assert fresh.adaptive.state_dict() == loss.adaptive.state_dict()


def test_the_adaptive_loss_is_its_two_terms() -> None:
    """The quotient loss at the multiplier, and the multiplier times the ranked coverage; weights in both."""
    drawn = torch.Generator().manual_seed(5)
    P, Q, y = torch.randn(3, 12, generator=drawn, dtype=torch.float64).unbind(0)
    targets = lift_semantic_targets(y, torch.arange(12) % 7)
    weights = torch.rand(12, generator=drawn, dtype=torch.float64)
    loss = create_adaptive_loss(1.0, initial_lambda=2.5, base_loss="huber", warmup_steps=100)
    rows = {"mask": targets.mask_trained, "row_weights": weights}
    fit = quotient_loss(
        *(P, Q, targets.Y_n, targets.Y_d),
        tau=1.5,
        mask_finite=targets.mask_finite,
        orientation=targets.orientation_label,
        base="huber",
        lambda_rej=2.5,
        **rows,
    )
    covered = ranked_coverage_loss(Q, 1.5, 0.01, 1.0, **rows)
    assert covered > 0
    lifted = (targets.Y_n, targets.Y_d)
    found = loss((P, Q, y), lifted, tau=1.5, semantic_targets=targets, row_weights=weights)
    assert found.item() == pytest.approx((fit + 2.5 * covered).item(), rel=1e-14)
    assert loss.adaptive.tracker.cumulative.total == int(targets.mask_trained.sum())


def test_the_adaptive_loss_tells_its_controller_what_strict_decoding_accepts() -> None:
    """Where P, Q or the quotient is not finite, or |Q| below tau, an answer is bottom."""
    inf, nan = math.inf, math.nan
    P = torch.tensor([1.0, 1.0, nan, inf, 3e38, 1.0, 1.0])
    Q = torch.tensor([0.5, 0.4, 1.0, 1.0, 0.6, nan, inf])
    loss = create_adaptive_loss(warmup_steps=0, update_frequency=1)
    loss((P, Q), (torch.ones(7), torch.ones(7)), tau=0.5)
    assert loss.adaptive.tracker.cumulative == CoverageMetrics(n_real=1, n_bottom=6)


def test_a_multiplier_of_a_device_keeps_the_dtype_of_the_loss() -> None:
    """It is float64 and a tensor there; the loss stays what its outputs are."""
    loss = create_adaptive_loss(warmup_steps=0, update_frequency=1)
    loss.adaptive.observe(torch.tensor(0.5), torch.tensor(4.0, dtype=torch.float64))
    Q = torch.tensor([0.3, 0.1], requires_grad=True)
    found = loss((torch.ones(2), Q), (torch.ones(2), torch.ones(2)), tau=0.2)
    assert found.dtype == torch.float32


def test_the_factory_hands_on_what_it_is_told() -> None:
    """Every argument is a setting of the same name, and the defaults are the documented ones."""
    told: dict[str, Any] = {
        "target_coverage": 0.7,
        "learning_rate": 0.3,
        "initial_lambda": 1.5,
        "momentum": 0.4,
        "warmup_steps": 7,
        "update_frequency": 3,
        "exponential_decay": 0.99,
        "lambda_min": 0.2,
        "lambda_max": 9.0,
        "lambda_rej_min": 0.3,
        "use_tag_loss": True,
        "tag_loss_weight": 0.07,
        "tag_loss_adaptive": False,
        "rule": "unbiased",
    }
    config = create_adaptive_loss(**told).adaptive.config
    assert {name: getattr(config, name) for name in told} == told
    assert config.tag_loss_max_weight == pytest.approx(0.28)
    usual = create_adaptive_loss().adaptive.config
    named = ("target_coverage", "learning_rate", "initial_lambda", "momentum", "warmup_steps")
    assert [getattr(usual, name) for name in named] == [0.95, 0.01, 1.0, 0.9, 100]
    assert (usual.update_frequency, usual.lambda_min, usual.lambda_max) == (10, 0.1, None)
    assert (usual.lambda_rej_min, usual.use_tag_loss) == (0.1, False)
    assert (usual.tag_loss_weight, usual.tag_loss_adaptive) == (0.05, True)
    assert create_adaptive_loss(base_loss="mae").base_loss == "mae"
    assert create_adaptive_loss().base_loss == AdaptiveLoss(controller()).base_loss == "mse"


@pytest.mark.parametrize("margin", [0.0, -1.0, math.inf, math.nan])
def test_the_margin_above_the_threshold_is_a_positive_number(margin: float) -> None:
    """Without an end nothing would be covered, and at 0 the coverage term divides by nothing at tau 0."""
    with pytest.raises(ValueError, match="margin must be finite and > 0, got margin="):
        AdaptiveLoss(controller(), margin=margin)


@pytest.mark.parametrize("arguments", [{"base_loss": "square"}, {"learning_rate": -1.0}])
def test_the_factory_checks_what_it_is_told(arguments: dict[str, Any]) -> None:
    """The base loss must be one of three, and settings are those of `AdaptiveLossConfig`."""
    with pytest.raises(ValueError, match="must be"):
        create_adaptive_loss(**arguments)


def test_a_layer_may_report_its_tags() -> None:
    """`report` is what a layer with an attached controller calls."""
    adaptive = controller(target_coverage=1.0)
    adaptive.report(torch.full((4,), TRTag.PHI))
    assert adaptive.lambda_rej == pytest.approx(1.1)


def test_the_hard_term_ignores_a_controller_that_is_put_beside_it() -> None:
    """What the refusal of the config is about: its weight changes the loss and no gradient."""
    loss = SCMTrainingLoss(LossConfig(coverage_term="hard"))
    Q = torch.tensor([0.1, 0.2], requires_grad=True)
    grads = []
    for weight in (0.0, 5.0):
        total, _ = loss(
            Q.sum(), Q, Q, torch.ones(2), torch.ones(2), is_bottom=Q < 1, weights={"rejection": weight}
        )
        grads.append(torch.autograd.grad(total, Q)[0])
    assert torch.equal(*grads)


def test_a_curriculum_given_to_the_trainer_is_respected() -> None:
    """A ramp by hand, of the trainer's own config, scales the multiplier as the trial's does."""
    weights = LossWeightsCurriculum({"rejection": LinearRamp(0.0, 1.0, 0, 4)}).weights(1)
    companion = CoverageController(controller())
    now = moment(torch.ones(2), torch.ones(2), loss_weights=weights)
    companion.before_forward(now)
    assert now.facts["loss_weights"] == {"rejection": 0.25}
