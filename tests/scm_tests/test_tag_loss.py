"""The tag loss against the recorded numbers and plain cross-entropy, its labels, and trainings with it."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import grad, vmap

from scm.core import TRTag
from scm.data import Split
from scm.losses.terms import LossTerms
from scm.models import make_model
from scm.training.companion import Moment
from scm.training.feed import Fed
from scm.training.tag_loss import (
    NO_LABEL,
    TagLossTerm,
    TagPredictionHead,
    adaptive_tag_weight,
    compute_tag_loss,
    tag_accuracy,
    tag_confusion,
    tags_of_rows,
    tags_of_statuses,
)
from scm.training.targets import STATUS_CODES, STATUSES, lift_semantic_targets
from scm.trial import make_trainer
from scm.trial_config import TrialConfig

F64 = torch.float64
REAL, PINF, NINF, PHI, BOTTOM = TRTag


def codes(*tags: int) -> Tensor:
    return torch.tensor(tags, dtype=torch.int8)


def plain_loss(labels: list[int], logits: np.ndarray, weight: float) -> float:
    """The definition, row by row."""
    costs = []
    for label, row in zip(labels, logits, strict=True):
        if label == NO_LABEL:
            continue
        log_sum = math.log(sum(math.exp(z - max(row)) for z in row)) + max(row)
        costs.append((1 if label == REAL else 2) * (log_sum - row[min(label, PHI)]))
    return weight * sum(costs) / len(costs) if costs else 0.0


def test_losses_match_the_recorded_exact_ones(vector_group):
    """True cross-entropy, non-REAL rows twice, the adaptive weight of each coverage."""
    for case in vector_group("tag_loss_upstream_taylor"):
        labels = codes(*(TRTag[tag] for tag in case["tags"]))
        logits = torch.tensor(case["logits"], dtype=F64)
        loss = compute_tag_loss(
            labels, logits, case["weight"], case["coverage"] is not None, case["coverage"]
        )
        assert loss.item() == pytest.approx(case["exact"], rel=1e-10)
        coverage = 0.0 if case["coverage"] is None else case["coverage"]
        weight = adaptive_tag_weight(case["weight"], coverage)
        assert weight == pytest.approx(case["effective_weight"], rel=1e-10)


@given(
    st.lists(st.tuples(st.integers(-1, 4), st.lists(st.floats(-30, 30), min_size=4, max_size=4)), max_size=6)
)
def test_the_loss_is_the_mean_cross_entropy_of_labelled_rows(rows):
    """For any labels, those without one included, and any logits; BOTTOM is labelled as PHI is."""
    labels = [label for label, _ in rows]
    logits = torch.tensor([row for _, row in rows], dtype=F64).reshape(-1, 4)
    loss = compute_tag_loss(torch.tensor(labels, dtype=torch.int8), logits, 0.3)
    assert loss.item() == pytest.approx(plain_loss(labels, logits.numpy(), 0.3), rel=1e-9, abs=1e-12)


def test_every_class_has_its_probability_and_a_gradient():
    """No class falls to probability 0 because its logit is a few below the largest."""
    logits = torch.tensor([[0.0, -1.0, -3.0, -6.0]], dtype=F64, requires_grad=True)
    compute_tag_loss(codes(REAL), logits, 1.0).backward()
    probabilities = torch.softmax(logits.detach(), -1)
    assert probabilities[0].tolist() == pytest.approx([0.704, 0.259, 0.035, 0.002], abs=1e-3)
    expected = probabilities - torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=F64)
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, expected)


def test_a_confident_mistake_costs_as_much_as_it_is_confident():
    """The cost grows with the gap of the logits, it does not saturate near 1.5; nor does its gradient."""
    for gap in (5.0, 50.0, 500.0):
        logits = torch.tensor([[gap, 0.0, 0.0, 0.0]], requires_grad=True)
        loss = compute_tag_loss(codes(PINF), logits, 1.0)
        assert loss.item() == pytest.approx(2 * gap, rel=2e-2)
        loss.backward()
        assert logits.grad is not None
        assert logits.grad[0, 1].item() == pytest.approx(-2.0, rel=2e-2)


def test_a_new_head_treats_no_two_tags_or_hidden_units_alike():
    """No two rows of any weight are equal, and a training keeps hidden units apart."""
    torch.manual_seed(0)
    head = TagPredictionHead(3).double()
    features = torch.randn(64, 3, dtype=F64)
    assert head(features).shape == (64, 4)
    assert head(torch.zeros(5, 2, 3, dtype=F64)).shape == (5, 2, 4)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    for _ in range(5):
        for weight in (head.hidden.weight, head.logits.weight):
            for one, other in itertools.combinations(weight, 2):
                assert not torch.allclose(one, other)
        optimizer.zero_grad()
        compute_tag_loss(codes(*(k % 4 for k in range(64))), head(features), 1.0).backward()
        optimizer.step()
    torch.manual_seed(1)
    assert not torch.equal(TagPredictionHead(3).hidden.weight.double(), head.hidden.weight)


@pytest.mark.parametrize("status, tag", list(zip(STATUSES, [0, 3, 2, 1, 3, -1, -1], strict=True)))
def test_each_status_has_its_tag_and_broken_rows_have_none(status, tag):
    """As targets and as codes."""
    code = torch.tensor([STATUS_CODES[status]])
    assert tags_of_statuses(code).tolist() == [tag]
    assert tags_of_statuses(lift_semantic_targets(torch.zeros(1), code)).tolist() == [tag]


def test_targets_are_taken_as_labels_as_they_are():
    """Their rows that are missing or a fault change neither value nor gradient, even where logits are nan."""
    targets = lift_semantic_targets(torch.zeros(4), ["finite", "missing", "censored_below", "fault"])
    logits = torch.tensor(
        [[1.0, 2, 3, 4], [math.nan] * 4, [0.0, 1, 0, 0], [math.inf] * 4], requires_grad=True
    )
    loss = compute_tag_loss(targets, logits, 1.0)
    kept = logits.detach()[[0, 2]].clone().requires_grad_()
    expected = compute_tag_loss(codes(REAL, NINF), kept, 1.0)
    assert loss.item() == pytest.approx(expected.item())
    loss.backward()
    expected.backward()
    assert logits.grad is not None
    assert torch.equal(logits.grad[[0, 2]], kept.grad)
    assert not logits.grad[[1, 3]].any()


def test_a_bad_row_leaves_the_gradients_of_the_others_as_they_were():
    """A nan in a labelled row is in the loss, and in that row's gradient alone."""
    logits = torch.arange(12.0).reshape(3, 4).sin()

    def gradient(bad: bool) -> Tensor:
        given = logits.clone()
        if bad:
            given[1] = math.nan
        given.requires_grad_()
        compute_tag_loss(codes(PINF, REAL, PHI), given, 1.0).backward()
        assert given.grad is not None
        return given.grad

    assert torch.equal(gradient(True)[[0, 2]], gradient(False)[[0, 2]])
    assert gradient(True)[1].isnan().all()


@pytest.mark.parametrize("labels", [codes(), codes(NO_LABEL, NO_LABEL)], ids=["empty", "unlabelled"])
def test_nothing_to_learn_from_costs_nothing(labels):
    """0, with a gradient of 0."""
    logits = torch.zeros(len(labels), 4, requires_grad=True)
    loss = compute_tag_loss(labels, logits)
    loss.backward()
    assert loss.item() == 0.0
    assert logits.grad is not None
    assert not logits.grad.any()
    assert tag_accuracy(labels, logits).item() == 0.0


@given(st.floats(0.0, 1.0), st.floats(0.0, 2.0))
def test_both_ways_of_adapting_the_weight_are_one(coverage, weight):
    """1 to 4 times the weight is the way from the weight to a largest of 4 times; tensors agree."""
    rising = weight * (1 + 3 * max(0.0, (coverage - 0.98) / 0.02))
    largest = min(4 * weight, weight + max(0.0, (coverage - 0.98) / 0.02) * (4 * weight - weight))
    found = adaptive_tag_weight(weight, coverage)
    assert found == pytest.approx(rising) == pytest.approx(largest)
    tensors = adaptive_tag_weight(torch.tensor(weight, dtype=F64), torch.tensor(coverage, dtype=F64))
    assert float(tensors) == pytest.approx(found, abs=1e-12)
    assert adaptive_tag_weight(weight, 1.0, max_weight=0.5) == pytest.approx(0.5)


def test_row_weights_make_a_weighted_mean():
    """A row of weight 2 counts as two, a row of weight 0 is not there."""
    logits = torch.tensor([[1.0, 0, 0, 0], [0.0, 2, 0, 0], [math.nan] * 4])
    weighted = compute_tag_loss(
        codes(PINF, REAL, PHI), logits, 1.0, row_weights=torch.tensor([2.0, 1.0, 0.0])
    )
    repeated = compute_tag_loss(codes(PINF, PINF, REAL), logits[[0, 0, 1]], 1.0)
    assert weighted.item() == pytest.approx(repeated.item())


def test_a_stack_of_trials_trains_each_as_if_alone():
    """Weights and coverages of their own in one vmap(grad), with rows without a label."""
    drawn = torch.Generator().manual_seed(2)
    logits = torch.randn(3, 10, 4, generator=drawn, dtype=F64)
    labels = torch.randint(-1, 5, (3, 10), generator=drawn)
    weights, shares = torch.tensor([0.1, 1.0, 2.0], dtype=F64), torch.tensor([0.5, 0.99, 1.0], dtype=F64)

    def loss(z: Tensor, y: Tensor, weight: Tensor, share: Tensor) -> Tensor:
        return compute_tag_loss(y, z, weight, True, share)

    stacked = vmap(grad(loss))(logits, labels, weights, shares)
    counts = vmap(tag_confusion)(labels, logits)
    for k in range(3):
        alone = logits[k].clone().requires_grad_()
        compute_tag_loss(labels[k], alone, weights[k].item(), True, shares[k].item()).backward()
        torch.testing.assert_close(stacked[k], alone.grad)
        assert torch.equal(counts[k], tag_confusion(labels[k], logits[k]))


def test_accuracy_and_confusion_count_the_labelled_rows():
    """Rows are tags, columns what they were called."""
    labels = codes(REAL, REAL, PINF, NINF, BOTTOM, NO_LABEL)
    said = torch.tensor([REAL, PHI, PINF, PINF, PHI, REAL])
    logits = torch.nn.functional.one_hot(said, 4).float()
    expected = torch.zeros(4, 4, dtype=torch.int64)
    for tag, called in ((REAL, REAL), (REAL, PHI), (PINF, PINF), (NINF, PINF), (PHI, PHI)):
        expected[tag, called] += 1
    assert torch.equal(tag_confusion(labels, logits), expected)
    assert tag_accuracy(labels, logits).item() == pytest.approx(3 / 5)


def test_the_label_of_a_row_is_the_tag_of_its_strict_sum():
    """One output without value decides; a row with an unlabelled output has no label."""
    tags = codes(REAL, REAL, REAL, PINF, PINF, NINF, PHI, REAL, NO_LABEL, PHI).view(5, 2)
    assert tags_of_rows(tags).tolist() == [REAL, PINF, PHI, PHI, NO_LABEL]
    assert tags_of_rows(codes(PHI, REAL)).tolist() == [PHI, REAL]


@pytest.mark.parametrize(
    "call, error, message",
    [
        (
            lambda: compute_tag_loss(codes(0, 1), torch.zeros(3, 4)),
            ValueError,
            r"tag_logits must .* \(3, 4\) and \(2,\)",
        ),
        (
            lambda: compute_tag_loss(codes(0, 1), torch.zeros(2, 5)),
            ValueError,
            r"one dimension of 4 more, got \(2, 5\)",
        ),
        (lambda: compute_tag_loss(codes(0, 7), torch.zeros(2, 4)), ValueError, "got 7"),
        (lambda: compute_tag_loss(codes(-2, 0), torch.zeros(2, 4)), ValueError, "got -2"),
        (
            lambda: compute_tag_loss(torch.zeros(2), torch.zeros(2, 4)),
            TypeError,
            "integer codes of tags, got dtype torch.float32",
        ),
        (
            lambda: compute_tag_loss(codes(0), torch.zeros(1, 4), -0.1),
            ValueError,
            "weight must be finite and >= 0, got weight=-0.1",
        ),
        (
            lambda: compute_tag_loss(codes(0), torch.zeros(1, 4), adaptive_weight=True),
            ValueError,
            "coverage must be given with adaptive_weight",
        ),
        (
            lambda: adaptive_tag_weight(0.1, 1.5),
            ValueError,
            r"coverage must be in \[0, 1\], got coverage=1.5",
        ),
        (lambda: tag_accuracy(codes(0), torch.zeros(2, 4)), ValueError, "tag_logits must have"),
        (lambda: TagPredictionHead(0), ValueError, "input_dim must be >= 1, got input_dim=0"),
        (lambda: TagPredictionHead(2, 0), ValueError, "hidden_dim must be >= 1, got hidden_dim=0"),
        (lambda: TagLossTerm(-1.0), ValueError, "weight must be finite and >= 0"),
        (
            lambda: TagLossTerm(1.0, labels="both"),
            ValueError,
            "labels must be one of model, data, got labels='both'",
        ),
    ],
)
def test_bad_arguments_are_refused(call, error, message):
    """The error names the rule, the argument and the value."""
    with pytest.raises(error, match=message):
        call()


def moment_of(outputs: Any, targets: Any, tau: float = 0.1, **extras: Tensor) -> Moment:
    """A micro-batch under way whose loss so far is 0."""
    fed = Fed(None, targets, (targets.Y_n, targets.Y_d), targets, len(targets), extras)
    return Moment(nn.Identity(), fed, {"tau": tau}, outputs, LossTerms(torch.zeros(())))


def outputs_of(Q: list[float], logits: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    return torch.ones(len(Q)), torch.tensor(Q), {"tag_logits": logits}


TARGETS = lift_semantic_targets(torch.zeros(4), ["finite", "censored_below", "bottom", "missing"])
LOGITS = torch.arange(16.0).reshape(4, 4).sin()


@pytest.mark.parametrize(
    "labels, tags",
    [("data", [REAL, NINF, PHI, NO_LABEL]), ("model", [PINF, REAL, NINF, NO_LABEL])],
)
def test_the_term_learns_from_the_data_or_from_the_model(labels, tags):
    """The model's own tags are those at the micro-batch's threshold; missing rows have no label in either."""
    moment = moment_of(outputs_of([0.05, 0.5, -0.05, 0.0], LOGITS), TARGETS)
    term = TagLossTerm(0.5, labels=labels)
    assert all(math.isnan(value) for value in term.telemetry().values())
    term.after_loss(moment)
    assert moment.terms is not None
    expected = compute_tag_loss(codes(*tags), LOGITS, 1.0).item()
    assert moment.terms.total().item() == pytest.approx(0.5 * expected)
    told = term.telemetry()
    assert told["tag_loss"] == pytest.approx(expected)
    assert told["tag_accuracy"] == pytest.approx(tag_accuracy(codes(*tags), LOGITS).item())


@pytest.mark.parametrize("Q, coverage", [([0.5, 0.5, 0.5, 0.0], 1.0), ([0.5, 0.0, 0.5, 0.5], 2 / 3)])
def test_the_adaptive_term_follows_the_coverage_of_its_micro_batch(Q, coverage):
    """Four times the weight where every labelled answer has a value, the plain one below 0.98."""
    moment = moment_of(outputs_of(Q, LOGITS), TARGETS)
    TagLossTerm(0.5, adaptive=True).after_loss(moment)
    assert moment.terms is not None
    expected = compute_tag_loss(TARGETS, LOGITS, 0.5, True, coverage).item()
    assert moment.terms.auxiliaries["tag"].item() == pytest.approx(expected)


def test_the_term_weighs_rows_as_the_loader_says():
    """Importance weights of the draw reach it too."""
    weights = torch.tensor([1.0, 3.0, 0.0, 1.0])
    moment = moment_of(outputs_of([0.5] * 4, LOGITS), TARGETS, row_weights=weights)
    TagLossTerm(1.0).after_loss(moment)
    assert moment.terms is not None
    expected = compute_tag_loss(TARGETS, LOGITS, 1.0, row_weights=weights)
    assert moment.terms.auxiliaries["tag"].item() == pytest.approx(expected.item())


def test_several_outputs_share_the_row_or_have_logits_each():
    """(B, 4) beside (B, 2) answers is about rows, (B, 2, 4) about answers."""
    targets = lift_semantic_targets(torch.zeros(2, 2), [["finite", "censored_above"], ["finite", "finite"]])
    logits = torch.arange(16.0).reshape(2, 2, 4).cos()
    for answers, labels in (
        (logits[:, 0], codes(PINF, REAL)),
        (logits, codes(REAL, PINF, REAL, REAL).view(2, 2)),
    ):
        moment = moment_of((torch.ones(2, 2), torch.ones(2, 2), {"tag_logits": answers}), targets)
        TagLossTerm(1.0).after_loss(moment)
        assert moment.terms is not None
        expected = compute_tag_loss(labels, answers, 1.0).item()
        assert moment.terms.auxiliaries["tag"].item() == pytest.approx(expected)


def test_sentinels_are_statuses_where_the_loss_is_fed_none():
    """nan has no side, whatever the lifted tuple says."""
    y = torch.tensor([1.0, math.inf, -math.inf, math.nan])
    fed = Fed(None, y, (y, y), None, 4, {})
    moment = Moment(
        nn.Identity(), fed, {"tau": 0.1}, outputs_of([1.0] * 4, LOGITS), LossTerms(torch.zeros(()))
    )
    TagLossTerm(1.0).after_loss(moment)
    assert moment.terms is not None
    expected = compute_tag_loss(codes(REAL, PINF, NINF, PHI), LOGITS, 1.0).item()
    assert moment.terms.auxiliaries["tag"].item() == pytest.approx(expected)


@pytest.mark.parametrize(
    "outputs, got",
    [((1, 2), "one without named outputs"), ((1, 2, {"context": 3}), r"one that names \['context'\]")],
)
def test_a_model_that_names_no_tag_logits_is_told_what_is_missing(outputs, got):
    """The error names the output, not a key of a dict."""
    with pytest.raises(ValueError, match=f'named output "tag_logits": .*, got {got}'):
        TagLossTerm(1.0).after_loss(moment_of(outputs, TARGETS))


def test_an_epoch_that_is_gone_on_with_counts_what_was_seen():
    """The state holds the sums of the epoch under way; a new epoch begins without them."""
    first, second = TagLossTerm(1.0), TagLossTerm(1.0)
    moments = [moment_of(outputs_of([0.5] * 4, logits), TARGETS) for logits in (LOGITS, LOGITS.flip(1))]
    first.after_loss(moments[0])
    second.load_state_dict(first.state_dict())
    for term in (first, second):
        term.after_loss(moments[1])
    assert first.telemetry() == second.telemetry()
    first.begin_epoch(1, {})
    assert math.isnan(first.telemetry()["tag_loss"])
    second.load_state_dict(first.state_dict())
    assert math.isnan(second.telemetry()["tag_loss"])


class WithTags(nn.Module):
    """A projective network over features that a tag head sees as well."""

    def __init__(self, config: TrialConfig) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Linear(1, 16), nn.Tanh())
        self.network = make_model(config, 16)
        self.tags = TagPredictionHead(16)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        features = self.features(x)
        P, Q = self.network(features)[:2]
        return P, Q, {"tag_logits": self.tags(features)}


def test_a_training_learns_the_tags_of_the_data():
    """With a weight, a head tells numbers, both infinities and bottoms apart, and features learn from it."""
    x = torch.linspace(-1, 1, 128)[:, None]
    status = (x[:, 0] * 2 + 2).floor().clamp(max=3).to(torch.int64)  # one status a quarter of the range
    train = Split(x, lift_semantic_targets(x[:, 0], status))
    config = TrialConfig(max_epochs=40, hidden_width=8, hidden_depth=1, learning_rate=0.03, lambda_tag=1.0)

    def fitted(config: TrialConfig) -> Any:
        # The network of the trial has no tag head of its own here: the one beside it is what is trained.
        bare = TrialConfig(hidden_width=8, hidden_depth=1)
        trainer = make_trainer(config, 0, lambda: WithTags(bare), train, None)
        trainer.fit()
        return trainer

    trainer = fitted(config)
    told = trainer.telemetry()
    assert told["tag_accuracy"] > 0.9
    assert 0.0 < told["tag_loss"] < 0.6
    logits = trainer.model(x)[2]["tag_logits"]
    assert tag_confusion(train.targets, logits).diagonal().min().item() >= 24  # of 32 each
    without = fitted(TrialConfig.from_flat({**config.to_flat(), "lambda_tag": 0.0, "max_epochs": 2}))
    with_it = fitted(TrialConfig.from_flat({**config.to_flat(), "max_epochs": 2}))
    assert "tag_loss" not in without.telemetry()
    assert not torch.equal(without.model.features[0].weight, with_it.model.features[0].weight)


@pytest.mark.parametrize("labels", ["data", "model"])
def test_the_term_never_waits_for_the_device(labels, monkeypatch):
    """No value is read back while a micro-batch is under way, the adaptive weight included."""
    logits = LOGITS.clone().requires_grad_()
    moment = moment_of(outputs_of([0.5, 0.05, 0.5, 0.5], logits), TARGETS, tau=torch.tensor(0.1))
    term = TagLossTerm(torch.tensor(0.5), labels=labels, adaptive=True)
    with monkeypatch.context() as patched:
        for name in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu", "numpy"):
            patched.setattr(Tensor, name, refused)
        term.after_loss(moment)
        assert moment.terms is not None
        moment.terms.total().backward()
    assert logits.grad is not None
    assert logits.grad[:3].abs().sum(1).min() > 0


def refused(*_: Any, **__: Any) -> Any:
    raise AssertionError("a value was read back")
