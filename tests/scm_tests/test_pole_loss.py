"""What pole scores are trained to be: sources and their order, both forms, the counts, the companion."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import grad, vmap

from scm.core.tags import TRTag
from scm.data import Split
from scm.losses.pole import FORMS, PoleCounts, PoleTargets, pole_loss, pole_targets
from scm.losses.terms import LossTerms
from scm.models import make_model
from scm.training.companion import Moment
from scm.training.feed import Fed
from scm.training.pole_loss import PoleLossTerm
from scm.training.targets import STATUS_CODES, lift_semantic_targets, lift_targets
from scm.trial import decode_split, make_trainer
from scm.trial_config import TrialConfig

F64 = torch.float64
logits = st.lists(st.floats(-30, 30), min_size=1, max_size=8)


def tensor(values):
    return torch.tensor(values, dtype=F64)


# --- targets --------------------------------------------------------------------------------------


def test_each_row_asks_the_best_source_that_knows_it():
    """The teacher, then |Q| under the threshold, then the tag, each with its weight; 0 where none knows."""
    nan = math.nan
    targets = pole_targets(
        torch.zeros(6, dtype=F64),
        teacher=tensor([1.0, 0.25, nan, nan, nan, nan]),
        q_abs=tensor([5.0, 0.0, 0.05, 0.1, nan, math.inf]),
        tags=torch.tensor([TRTag.REAL, TRTag.REAL, TRTag.REAL, TRTag.PHI, TRTag.PINF, TRTag.PHI]),
        teacher_weight=0.7,
        proximity_threshold=0.1,
    )
    assert targets.target.tolist() == [1.0, 0.25, 1.0, 0.0, 1.0, 0.0]
    assert targets.weight.tolist() == pytest.approx([0.7, 0.7, 0.3, 0.3, 0.5, 0.3])
    assert pole_targets(torch.zeros(2)).weight.tolist() == [0.0, 0.0]


def test_sources_get_no_gradient():
    """Nothing pulls the denominators, or the teacher, towards what the head says."""
    q_abs, teacher = tensor([0.05, 2.0]).requires_grad_(), tensor([math.nan, 0.5]).requires_grad_()
    score = torch.zeros(2, dtype=F64, requires_grad=True)
    pole_loss(score, pole_targets(score, q_abs=q_abs, teacher=teacher)).backward()
    assert q_abs.grad is teacher.grad is None
    assert (score.grad != 0).tolist() == [True, False]  # σ(0) is what the teacher says of the second row


# --- the loss -------------------------------------------------------------------------------------


@given(logits, st.data())
def test_both_forms_are_their_formulas(scores, data):
    """Weighted means over the rows known of: cross-entropy, (σ − t)², and (logit − t)² unnormalised."""
    n = len(scores)
    target = data.draw(st.lists(st.floats(0, 1), min_size=n, max_size=n))
    weight = data.draw(st.lists(st.sampled_from([0.0, 0.3, 0.5, 1.0]), min_size=n, max_size=n))
    targets = PoleTargets(tensor(target), tensor(weight))
    z, t, w = (np.asarray(item) for item in (scores, target, weight))
    p, known = 1.0 / (1.0 + np.exp(-z)), max(1, int((w > 0).sum()))
    expected = {
        "bce": t * np.logaddexp(0, -z) + (1 - t) * np.logaddexp(0, z),
        "squared": (p - t) ** 2,
        "raw": (z - t) ** 2,
    }
    for form, normalize in (("bce", True), ("squared", True), ("squared", False)):
        got = pole_loss(tensor(scores), targets, form=form, normalize_output=normalize).item()
        each = expected[form if normalize else "raw"]
        assert got == pytest.approx((w * each).sum() / known, rel=1e-6, abs=1e-9)


def test_confident_mistakes_keep_their_gradient_in_the_default_form():
    """Cross-entropy grows with the logit; its gradient at a confident mistake is the weight itself."""
    score = tensor([-40.0]).requires_grad_()
    targets = PoleTargets(tensor([1.0]), tensor([0.5]))
    loss = pole_loss(score, targets)
    loss.backward()
    assert loss.item() == pytest.approx(20.0)
    assert score.grad.item() == pytest.approx(-0.5)
    score.grad = None
    pole_loss(score, targets, form="squared").backward()
    assert abs(score.grad.item()) < 1e-15


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, F64], ids=str)
def test_targets_are_of_the_dtype_of_the_scores(dtype):
    """Whatever the sources are kept in, a target and its weight are numbers like the scores."""
    score = torch.zeros(3, dtype=dtype)
    sources = {
        "tags": torch.tensor([TRTag.REAL, TRTag.PINF, TRTag.PHI], dtype=torch.int8),
        "q_abs": torch.tensor([0.05, 0.5, 0.09], dtype=F64),
        "teacher": torch.tensor([0.25, 0.5, 1.0], dtype=F64),
    }
    for name, source in sources.items():
        targets = pole_targets(score, **{name: source})
        assert (targets.target.dtype, targets.weight.dtype) == (dtype, dtype), name


def test_near_a_pole_is_below_a_tenth_unless_said_otherwise():
    """The default threshold, which itself is not near."""
    score = torch.zeros(4, dtype=F64)
    q_abs = tensor([0.0, math.nextafter(0.1, 0.0), 0.1, 0.9])
    assert pole_targets(score, q_abs=q_abs).target.tolist() == [1.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_no_number_has_no_gradient(form, bad):
    """Nor is it counted: the other rows learn as without it."""
    alone = tensor([0.3]).requires_grad_()
    pole_loss(alone, PoleTargets(tensor([0.9]), tensor([0.5])), form=form).backward()
    score = tensor([0.3, bad]).requires_grad_()
    pole_loss(score, PoleTargets(tensor([0.9, 1.0]), tensor([0.5, 0.5])), form=form).backward()
    assert score.grad.tolist() == [alone.grad.item(), 0.0]


@pytest.mark.parametrize("form", FORMS)
def test_rows_that_do_not_count_leave_the_others_alone(form):
    """A NaN logit, a row nothing is known of and a row of weight 0 change neither loss nor gradient."""
    alone = tensor([0.3, -1.0]).requires_grad_()
    expected = pole_loss(alone, PoleTargets(tensor([1.0, 0.0]), tensor([0.5, 0.5])), form=form)
    expected.backward()
    score = tensor([0.3, math.nan, 7.0, -1.0, 5.0]).requires_grad_()
    targets = PoleTargets(tensor([1.0, 1.0, 0.0, 0.0, 0.0]), tensor([0.5, 0.5, 0.0, 0.5, 0.5]))
    loss = pole_loss(score, targets, form=form, row_weights=tensor([2.0, 1.0, 1.0, 2.0, 0.0]))
    assert loss.item() == pytest.approx(expected.item())
    loss.backward()
    assert score.grad.tolist() == pytest.approx([alone.grad[0].item(), 0.0, 0.0, alone.grad[1].item(), 0.0])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("normalize", [True, False])
def test_gradients_are_those_of_finite_differences(form, normalize):
    """Once and twice, with and without weights of the rows."""
    score = torch.linspace(-3, 3, 5, dtype=F64).requires_grad_()
    targets = PoleTargets(tensor([1.0, 0.0, 0.25, 1.0, 0.0]), tensor([0.5, 0.5, 0.3, 0.0, 0.7]))
    for weights in (None, tensor([1.0, 2.0, 0.0, 1.0, 0.5])):

        def loss(score, weights=weights):
            return pole_loss(score, targets, form=form, normalize_output=normalize, row_weights=weights)

        assert torch.autograd.gradcheck(loss, score)
        assert torch.autograd.gradgradcheck(loss, score)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rows", [0, 3])
def test_without_a_row_that_counts_the_loss_is_zero(form, rows):
    """Also on batches of no rows, with finite gradients."""
    score = torch.ones(rows, requires_grad=True)
    loss = pole_loss(score, pole_targets(score), form=form)
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(score.grad, torch.zeros(rows))


def test_row_weights_make_a_weighted_mean():
    """A row of weight 3 counts as three rows."""
    targets = PoleTargets(tensor([1.0, 0.0]), tensor([0.5, 0.5]))
    score = tensor([0.2, 0.4])
    weighted = pole_loss(score, targets, row_weights=tensor([3.0, 1.0]))
    repeated = PoleTargets(tensor([1.0, 1.0, 1.0, 0.0]), tensor([0.5] * 4))
    assert weighted.item() == pytest.approx(pole_loss(tensor([0.2, 0.2, 0.2, 0.4]), repeated).item())


def test_the_loss_vectorises():
    """Under vmap every stack entry has its own loss and gradient, also with thresholds of its own."""
    score, q_abs = torch.randn(3, 5, dtype=F64), torch.rand(3, 5, dtype=F64)
    thresholds = tensor([0.2, 0.5, 0.8])

    def loss(score, q_abs, threshold):
        return pole_loss(score, pole_targets(score, q_abs=q_abs, proximity_threshold=threshold))

    together = vmap(grad(loss))(score, q_abs, thresholds)
    for k in range(3):
        assert torch.allclose(together[k], grad(loss)(score[k], q_abs[k], float(thresholds[k])))


# --- counts ---------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.floats(-5, 5), st.sampled_from([0.0, 1.0]), st.booleans()), max_size=30))
def test_counts_are_those_of_the_rows_known_and_add_up(rows):
    """The four counts and the shares are those of plain counting, in one batch or in two."""
    score = tensor([row[0] for row in rows])
    targets = PoleTargets(tensor([row[1] for row in rows]), tensor([0.5 * row[2] for row in rows]))
    known = [(score >= 0, target == 1.0) for score, target, counts in rows if counts]
    tp, fp, tn, fn = (
        known.count(pair) for pair in ((True, True), (True, False), (False, False), (False, True))
    )
    half = len(rows) // 2
    parts = (slice(0, half), slice(half, None))
    together = PoleCounts.none()
    for part in parts:
        together = together + PoleCounts.of(
            score[part], PoleTargets(targets.target[part], targets.weight[part])
        )
    for counts in (PoleCounts.of(score, targets), together):
        found = counts.metrics()
        assert [found[f"{name}_positives"] for name in ("true", "false")] == [tp, fp]
        assert [found[f"{name}_negatives"] for name in ("true", "false")] == [tn, fn]
        assert found["accuracy"] == pytest.approx((tp + tn) / len(known) if known else 0.0)
        assert found["precision"] == pytest.approx(tp / (tp + fp) if tp + fp else 0.0)
        assert found["recall"] == pytest.approx(tp / (tp + fn) if tp + fn else 0.0)
        assert found["f1"] == pytest.approx(2 * tp / (2 * tp + fp + fn) if tp + fp + fn else 0.0)
        assert found["pole_rate"] == pytest.approx((tp + fn) / len(known) if known else 0.0)


def test_counts_are_kept_on_the_device_that_is_asked_for():
    """And counts of two devices add up on the second one's."""
    assert PoleCounts.none("meta").table.device.type == "meta"
    assert (PoleCounts.none() + PoleCounts.none("meta")).table.device.type == "meta"


def test_counts_are_whole_numbers_and_bounds_belong_to_the_pole():
    """A score of exactly the threshold says "pole", and so does a target of exactly one half."""
    assert PoleCounts.none().table.tolist() == [0, 0, 0, 0]
    assert PoleCounts.none().table.dtype == torch.int64
    targets = PoleTargets(tensor([0.5, 0.5, 0.49]), tensor([1.0, 1.0, 1.0]))
    counts = PoleCounts.of(tensor([0.0, -1e-12, 0.0]), targets)
    assert counts.table.tolist() == [1, 1, 0, 1]


@pytest.mark.parametrize("threshold", [0.0, 1.0, -0.5, math.nan])
def test_a_threshold_of_scores_lies_between_zero_and_one(threshold):
    """At the ends every score would be on one side."""
    with pytest.raises(ValueError, match=r"threshold must be in \(0, 1\), got threshold="):
        PoleCounts.of(tensor([0.0]), PoleTargets(tensor([1.0]), tensor([1.0])), threshold=threshold)


# --- the companion --------------------------------------------------------------------------------


def moment(score, Q, statuses=None, values=None, facts=None):
    rows = len(score)
    values = torch.ones(rows, dtype=F64) if values is None else tensor(values)
    semantic = None
    lifted = lift_targets(values)
    if statuses is not None:
        codes = torch.tensor([STATUS_CODES[status] for status in statuses])
        semantic = lift_semantic_targets(values, codes)
        lifted = (semantic.Y_n, semantic.Y_d)
    outputs = (torch.ones_like(Q), Q, {"pole_score": score})
    fed = Fed(torch.zeros(rows, 1), values, lifted, semantic, rows)
    made = Moment(model=torch.nn.Identity(), fed=fed, facts=dict(facts or {}), outputs=outputs)
    made.terms = LossTerms(torch.zeros((), dtype=F64))
    return made


def test_the_term_is_the_weighted_loss_against_data_and_denominators():
    """Rows the data call bottom are poles; finite ones go by |Q|; missing and fault rows are left out."""
    score = tensor([0.5, -0.5, 1.0, 2.0, 3.0]).requires_grad_()
    statuses = ["bottom", "finite", "finite", "missing", "fault"]
    made = moment(score, tensor([5.0, 0.05, 5.0, 0.0, 0.0]), statuses)
    PoleLossTerm(0.2, proximity_threshold=0.1).after_loss(made)
    expected = 0.2 * pole_loss(score[:3], PoleTargets(tensor([1.0, 1.0, 0.0]), tensor([0.5] * 3)))
    assert made.terms.auxiliaries["pole"].item() == pytest.approx(expected.item())
    made.terms.total().backward()
    assert (score.grad != 0).tolist() == [True, True, True, False, False]


def test_a_row_of_several_outputs_is_near_a_pole_where_one_of_them_is():
    """The smallest |Q| of a row counts, and a bottom in any output."""
    score = tensor([0.5, 0.5, 0.5])
    Q = tensor([[5.0, -0.01], [5.0, 5.0], [5.0, 5.0]])
    made = moment(score, Q, values=[[1.0, 1.0], [1.0, math.inf], [1.0, 1.0]])
    term = PoleLossTerm(1.0)
    term.after_loss(made)
    told = term.telemetry()
    assert told["pole_rate"] == pytest.approx(2 / 3)
    assert (told["pole_recall"], told["pole_precision"]) == (1.0, pytest.approx(2 / 3))


def test_telemetry_is_of_the_epoch_and_its_state_goes_on():
    """NaN before any batch, then exact over the epoch's rows, in one go or interrupted."""
    term, other = PoleLossTerm(1.0), PoleLossTerm(1.0)
    names = {"pole_loss", "pole_accuracy", "pole_precision", "pole_recall", "pole_f1", "pole_rate"}
    assert set(term.telemetry()) == names
    assert all(math.isnan(value) for value in term.telemetry().values())
    batches = [moment(tensor([1.0, -1.0]), tensor([0.0, 0.0])), moment(tensor([1.0]), tensor([3.0]))]
    term.after_loss(batches[0])
    other.load_state_dict(term.state_dict())
    for each in (term, other):
        each.after_loss(batches[1])
        told = each.telemetry()
        assert set(told) == names
        assert (told["pole_accuracy"], told["pole_f1"]) == (pytest.approx(1 / 3), 0.5)
        losses = [batch.terms.auxiliaries["pole"].item() for batch in batches]
        assert told["pole_loss"] == pytest.approx(sum(losses) / 2)
        each.begin_epoch(1, {})
        assert math.isnan(each.telemetry()["pole_f1"])


def test_importance_weights_of_the_rows_count_in_the_term():
    """They are taken from the facts, as the task's loss takes them."""
    made = moment(tensor([2.0, 2.0]), tensor([0.0, 5.0]), facts={"row_weights": tensor([1.0, 0.0])})
    PoleLossTerm(1.0).after_loss(made)
    expected = pole_loss(tensor([2.0]), PoleTargets(tensor([1.0]), tensor([0.5])))
    assert made.terms.auxiliaries["pole"].item() == pytest.approx(expected.item())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_step_path_never_waits_for_the_device():
    """On CUDA, adding the term and counting raise nothing where every wait is an error."""
    term = PoleLossTerm(0.5)
    made = moment(tensor([1.0, -1.0]), tensor([0.0, 5.0]), ["bottom", "finite"])
    fed = made.fed._replace(semantic=made.fed.semantic.to(torch.device("cuda")))
    score = torch.ones(2, dtype=F64, device="cuda", requires_grad=True)
    outputs = (torch.ones(2, device="cuda"), made.outputs[1].cuda(), {"pole_score": score})
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(130):  # what is put aside is counted twice meanwhile
            made = Moment(model=made.model, fed=fed, facts={}, outputs=outputs)
            made.terms = LossTerms(torch.zeros((), dtype=F64, device="cuda"))
            term.after_loss(made)
            made.terms.total().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert term.telemetry()["pole_rate"] == 0.5


def rows_of(seed, rows=96):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.rand((rows, 1), generator=generator, dtype=F64) * 2 - 1
    codes = torch.full((rows,), STATUS_CODES["finite"])
    codes[inputs[:, 0].abs() < 0.25] = STATUS_CODES["bottom"]
    return Split(inputs, lift_semantic_targets(1.0 / inputs[:, 0], codes))


@pytest.mark.parametrize("mixed", [False, True], ids=["full precision", "mixed precision"])
def test_a_trial_trains_its_pole_head_and_tells_how_good_it_is(mixed, tmp_path):
    """The head finds the bottoms of the data; interrupted and resumed it is the same training."""
    config = TrialConfig(
        lambda_pole=1.0, max_epochs=40, learning_rate=2e-2, hidden_width=16, mixed_precision=mixed
    )

    def make():
        return make_trainer(config, 0, lambda: make_model(config, 1), rows_of(0), rows_of(1))

    trainer = make()
    reports = []
    for report in trainer.epochs():
        reports.append(trainer.telemetry())
        if report.epoch == 5:
            trainer.save_checkpoint(tmp_path / "half")
    assert trainer.status == "completed"
    assert reports[-1]["pole_f1"] > 0.8 > reports[0]["pole_f1"]
    assert reports[-1]["pole_loss"] < reports[0]["pole_loss"]
    resumed = make()
    resumed.load_checkpoint(tmp_path / "half")
    resumed.fit()
    assert resumed.telemetry() == trainer.telemetry()
    for ours, theirs in zip(trainer.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    decoded = decode_split(trainer.model, rows_of(1), tau_infer=config.tau_infer)
    assert decoded.decoded.shape == (96,)


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: PoleLossTerm(0.0), "lambda_pole must be finite and > 0"),
        (lambda: PoleLossTerm(1.0, proximity_threshold=0.0), "proximity_threshold must be finite and > 0"),
        (lambda: PoleLossTerm(1.0, teacher_weight=1.5), r"teacher_weight must be in \[0, 1\]"),
        (lambda: PoleLossTerm(1.0, form="hinge"), "form must be one of bce, squared"),
        (
            lambda: PoleCounts.of(torch.ones(1), pole_targets(torch.ones(1)), threshold=1.0),
            r"threshold must be in \(0, 1\)",
        ),
        (lambda: pole_loss(torch.ones(1), pole_targets(torch.ones(1)), form="x"), "form must be one of bce"),
    ],
)
def test_bad_arguments_are_refused(build, message):
    """Each refusal names the rule and the value."""
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("outputs", [(torch.ones(2), torch.ones(2)), (torch.ones(2), torch.ones(2), {})])
def test_a_model_without_scores_is_refused(outputs):
    """A weight that would train nothing is an error and not silence."""
    made = moment(torch.ones(2), torch.ones(2))
    made.outputs = outputs
    with pytest.raises(ValueError, match="lambda_pole > 0 needs a model that answers .* 'pole_score'"):
        PoleLossTerm(1.0).after_loss(made)
