"""Faults: each changes what it says, and nothing else; strong ones hold what weaker ones do."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness.errors import UserError
from harness.robustness.faults import FAULTS, SEVERITIES, Fault, parse_faults
from scm.data import Split
from scm.training.targets import STATUS_CODES, lift_semantic_targets
from scm.trial_config import TrialConfig
from trainables import faulty
from trainables.packed_trial import Member, PackRun, Shelf
from trainables.tasks.registry import make_task
from trainables.trial import make_splits, make_task_trainer

ROWS = 96
BATCH = 16
DOCS = Path(__file__).resolve().parents[2] / "docs" / "faults.md"
OF_ROWS = [fault for fault in FAULTS.values() if fault.how == "rows"]
OF_BATCHES = [fault for fault in FAULTS.values() if fault.how == "batches"]
BY_NAME: dict[str, Any] = {"ids": lambda fault: fault.name}


def made_up_split(rows: int = ROWS) -> Split:
    """Rows of every status, no two alike."""
    source = torch.Generator().manual_seed(0)
    codes = torch.arange(rows) % 10
    codes = torch.where(codes < len(STATUS_CODES), codes, STATUS_CODES["finite"])
    targets = lift_semantic_targets(torch.randn(rows, generator=source), codes)
    return Split(torch.randn(rows, 3, generator=source), targets, {"row": torch.arange(rows)})


def spoilt(fault: Fault, severity: str, seed: int = 0) -> Split:
    """A split under a fault of rows."""
    change = faulty.ROW_FAULTS[fault.does]
    return change(made_up_split(), fault.severities[severity], faulty.source_of(fault.name, seed))


def fields_of(split: Split) -> dict[str, Tensor]:
    """Everything that a split holds, by name."""
    return dict(split._named_tensors())


def differing(split: Split, other: Split) -> dict[str, Tensor]:
    """Which rows differ, by the name of what differs in them."""
    found = {}
    for name, held in fields_of(split).items():
        now = fields_of(other)[name]
        assert (held.shape, held.dtype) == (now.shape, now.dtype), name
        rows = (
            ((held != now) & ~((held != held) & (now != now))).flatten(1).any(1)
            if held.ndim > 1
            else held != now
        )
        if bool(rows.any()):
            found[name] = rows
    return found


CHANGED = {
    "nonfinite_inputs": {"inputs"},
    "outlier_inputs": {"inputs"},
    "nonfinite_labels": {"targets.Y_n"},
    "outlier_labels": {"targets.Y_n"},
}


@pytest.mark.parametrize("fault", OF_ROWS, **BY_NAME)
def test_a_fault_of_rows_changes_what_it_says_and_nothing_else(fault: Fault) -> None:
    """The clean split stays as it was, extras are never touched, and strong faults hit what weak ones do."""
    clean = made_up_split()
    before = clean.digest()
    hit = [differing(clean, spoilt(fault, severity)) for severity in SEVERITIES]
    assert made_up_split().digest() == clean.digest() == before
    for found in hit:
        assert found
        if fault.name in CHANGED:
            assert set(found) == CHANGED[fault.name]
        else:
            assert all(name.startswith("targets.") for name in found)
    rows = [torch.stack(list(found.values())).any(0) for found in hit]
    for weak, strong in pairwise(rows):
        assert bool((strong | ~weak).all())
        assert strong.sum() >= weak.sum()
    if "share" in fault.strength:
        assert rows[2].sum() > rows[0].sum()


@pytest.mark.parametrize("fault", OF_ROWS, **BY_NAME)
def test_a_fault_of_rows_is_the_same_at_every_call(fault: Fault) -> None:
    """It depends on the seed, and on nothing else."""
    assert spoilt(fault, "high").digest() == spoilt(fault, "high").digest()
    assert spoilt(fault, "high").digest() != spoilt(fault, "high", seed=1).digest()


def test_values_are_what_the_faults_say() -> None:
    """Non-finite where it says so and finite where it does not; far away by as much as it says."""
    assert not bool(spoilt(FAULTS["nonfinite_inputs"], "high").inputs.isfinite().all())
    labels = spoilt(FAULTS["nonfinite_labels"], "high").targets
    bad = ~labels.Y_n.isfinite()
    assert bool(bad.any())
    assert bool(labels.mask_finite[bad].all())
    far = [float(spoilt(FAULTS["outlier_labels"], name).targets.Y_n.abs().max()) for name in SEVERITIES]
    assert far[0] > 5
    assert far == sorted(far)
    assert bool(spoilt(FAULTS["outlier_inputs"], "high").inputs.isfinite().all())


def test_flips_go_both_ways_and_statuses_are_mistaken() -> None:
    """Finite rows become bottoms and bottoms finite; directions are reversed, other reasons exchanged."""
    clean, flipped = made_up_split().targets, spoilt(FAULTS["label_flips"], "high").targets
    to_bottom, to_finite = (
        clean.mask_finite & flipped.mask_semantic,
        clean.mask_semantic & flipped.mask_finite,
    )
    assert int(to_bottom.sum()) == round(0.3 * int(clean.mask_finite.sum()))
    assert int(to_finite.sum()) == round(0.3 * int(clean.mask_semantic.sum()))
    assert set(flipped.Y_n[to_finite].tolist()) <= set(clean.Y_n[clean.mask_finite].tolist())
    mistaken = spoilt(FAULTS["wrong_status"], "high").targets
    changed = (mistaken.orientation_label != clean.orientation_label) & clean.mask_oriented
    assert torch.equal(mistaken.orientation_label[changed], -clean.orientation_label[changed])
    assert bool((clean.mask_finite & ~mistaken.mask_trained).any())


def batch_hit(fault: Fault, hit: list[int]) -> tuple[Split, Split, list[Tensor]]:
    """A split, what a fault of batches made of it, and the batches."""
    split = made_up_split()
    batches = faulty.batches_of(split, BATCH, seed=3, epoch=2)
    change = faulty.BATCH_FAULTS[fault.does]
    return split, change(split, batches, hit, faulty.source_of(fault.name, 3)), batches


@pytest.mark.parametrize("fault", OF_BATCHES, **BY_NAME)
def test_a_fault_of_batches_leaves_the_other_batches_alone(fault: Fault) -> None:
    """Only rows of the batches that are hit are others."""
    split, changed, batches = batch_hit(fault, [1, 4])
    rows = torch.stack(list(differing(split, changed).values())).any(0)
    assert bool(rows.any())
    assert set(rows.nonzero().flatten().tolist()) <= set(torch.cat([batches[1], batches[4]]).tolist())


def test_batches_are_poisoned_duplicated_and_reordered() -> None:
    """One row a poisoned batch; a duplicate is the batch before; a new order has the same rows."""
    _, poisoned, batches = batch_hit(FAULTS["poisoned_batches"], [1, 4])
    bad = ~poisoned.inputs.isfinite().all(1)
    assert [int(bad[rows].sum()) for rows in batches] == [0, 1, 0, 0, 1, 0]
    split, doubled, batches = batch_hit(FAULTS["duplicated_batches"], [1])
    assert torch.equal(doubled.inputs[batches[1]], split.inputs[batches[0]])
    split, ordered, batches = batch_hit(FAULTS["reordered_batches"], [0, 1, 2, 3, 4, 5])
    assert sorted(ordered.extras["row"].tolist()) == sorted(split.extras["row"].tolist())
    fed = ordered.targets.index(torch.cat(batches))
    labels = torch.where(fed.mask_finite, fed.Y_n, torch.inf)
    assert torch.equal(labels, labels.sort().values)


def test_batches_are_those_that_a_trial_is_fed(tmp_path: Path) -> None:
    """The rows of a batch, in its place and epoch, are what the trainer's loader gives."""
    task = make_task("dose", {}, tmp_path)
    splits = make_splits(task, 5)
    config = TrialConfig(batch_size=100, hidden_width=4, hidden_depth=1)
    loader = make_task_trainer(task, config, 5, splits["train"], None).train_loader
    for epoch in range(2):
        expected = faulty.batches_of(splits["train"], 100, 5, epoch)
        for rows, (inputs, _) in zip(expected, loader, strict=True):
            assert torch.equal(splits["train"].inputs[rows], inputs)


class _Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 2)

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        P, Q = self.inner(inputs).unbind(1)
        return P, Q


class _ToyTask:
    name = "toy"
    error_unit = "m"

    def splits(self, seed: int) -> dict[str, Split]:
        return {"train": made_up_split()}

    def build_model(self, config: TrialConfig) -> nn.Module:
        torch.manual_seed(0)
        return _Toy()

    def make_loss(self, config: TrialConfig) -> None:
        return None

    def metrics(self, decoded: Any, split: Split, config: TrialConfig) -> dict[str, float]:
        return {}


def answered(kind: str, mark: int) -> tuple[Tensor, ...]:
    """P of the plain model and of the marked one, and the gradient of each by the weights of P."""
    task: Any = _ToyTask()
    split = made_up_split()
    rows = torch.tensor([1, 5])
    marked = faulty.marked_split(split, rows, kind, mark)
    plain_model, model = task.build_model(None), faulty.MarkedTask(task).build_model(TrialConfig())
    assert [name for name, _ in model.named_parameters()] == [
        name for name, _ in plain_model.named_parameters()
    ]
    told = []
    for asked, inputs in ((plain_model, split.inputs), (model, marked.inputs)):
        P, _ = asked(inputs)
        own = [
            torch.autograd.grad(each, asked.get_parameter("inner.weight"), retain_graph=True)[0][0]
            for each in P
        ]
        told += [P.detach(), torch.stack(own)]
    assert torch.equal(faulty.unmarked_split(marked).inputs, split.inputs)
    return tuple(told)


@pytest.mark.parametrize("kind", faulty.MARKS)
def test_rows_without_a_mark_are_answered_bit_for_bit(kind: str) -> None:
    """Neither their answers nor their gradients differ, whatever the marked ones do."""
    plain, plain_slope, P, slope = answered(kind, 20)
    others = torch.ones(ROWS, dtype=torch.bool)
    others[[1, 5]] = False
    assert torch.equal(P[others], plain[others])
    assert torch.equal(slope[others], plain_slope[others])


def test_marked_rows_do_what_their_mark_says() -> None:
    """Scaled to overflow; a steeper gradient of the same value; float16, and its overflow."""
    hit = [1, 5]
    plain, plain_slope, P, slope = answered("gradient", 10)
    assert torch.equal(P, plain)
    assert torch.allclose(slope[hit], 1024 * plain_slope[hit])
    assert bool(answered("scale", 105)[2][hit].isinf().all())
    scaled = answered("scale", 30)[2][hit]
    assert bool((scaled.isfinite() & (scaled.abs() > 1e9 * plain[hit].abs())).all())
    assert bool(answered("half", 22)[2][hit].isinf().all())
    halved = answered("half", 10)[2][hit]
    assert not torch.equal(halved, plain[hit])
    assert torch.allclose(halved, plain[hit], rtol=2e-3)


@pytest.mark.parametrize("alone", [False, True], ids=["pack", "alone"])
def test_a_rate_spike_changes_the_rate_and_ends(alone: bool, tmp_path: Path) -> None:
    """In its window the rate is multiplied, afterwards it is the config's, schedule included."""
    task = make_task("dose", {}, tmp_path)
    splits = make_splits(task, 0)
    flat = {"max_epochs": 4, "batch_size": 512, "hidden_width": 4, "hidden_depth": 1, "lr_schedule": "linear"}
    rates: list[list[float]] = []
    for factor in (1.0, 100.0):
        state: Any = None
        said: list[float] = []
        for until, times in ((1, 1.0), (2, factor), (None, 1.0)):
            config = {**flat, "learning_rate": 1e-3 * times}
            if state is not None and times != 1.0:
                state = faulty.with_rate(state, times, 1e-3 * times)
            pack = PackRun(
                [Member("t", config, 0, until, state, alone)], lambda _: (task, splits), shelf=Shelf()
            )
            while not pack.done:
                for told in pack.step():
                    said.append(told.said["lr"])
                    state = told.state
            if state is not None and times != 1.0:
                state = faulty.with_rate(state, 1 / times, 1e-3)
        rates.append(said)
    assert rates[1] == pytest.approx([rates[0][0], 100 * rates[0][1], *rates[0][2:]])


def test_what_does_not_apply_says_why() -> None:
    """Integer inputs hold no NaN, data without bottoms have none to flip, a sampler draws as it learns."""
    split = made_up_split()
    source = torch.Generator()
    whole = Split(split.inputs.to(torch.int64), split.targets)
    with pytest.raises(faulty.InapplicableFaultError, match="must be floating point .* they are int64"):
        faulty.spoil_inputs(whole, 0.1, source)
    finite = Split(
        split.inputs, lift_semantic_targets(split.inputs[:, 0], torch.zeros(ROWS, dtype=torch.int64))
    )
    with pytest.raises(faulty.InapplicableFaultError, match="no training row has a bottom to flip"):
        faulty.flip_labels(finite, 0.1, source)
    with pytest.raises(faulty.InapplicableFaultError, match="sampling='near_pole' draws batches"):
        faulty.check_batches_known(TrialConfig(sampling="near_pole"))
    with pytest.raises(faulty.InapplicableFaultError, match="no last dimension"):
        faulty.marked_split(Split(split.inputs[:, 0], split.targets))


@pytest.mark.parametrize("fault", FAULTS.values(), **BY_NAME)
def test_every_fault_is_whole(fault: Fault) -> None:
    """Its severities are ordered, its window lies in the training, and what it does is there."""
    assert tuple(fault.severities) == SEVERITIES
    assert list(fault.severities.values()) == sorted(set(fault.severities.values()))
    tables: dict[str, Any] = {
        "rows": faulty.ROW_FAULTS,
        "batches": faulty.BATCH_FAULTS,
        "outputs": faulty.MARKS,
    }
    assert fault.does in tables.get(fault.how, [""])
    for epochs in (1, 2, 3, 20):
        window = fault.epochs(epochs)
        assert window is None or 0 <= window[0] < window[1] <= epochs


def test_faults_are_parsed() -> None:
    """All, none, names, and severities of them, in the order of the table."""
    assert [fault.name for fault in parse_faults("all")] == list(FAULTS)
    assert parse_faults("none") == []
    assert {tuple(fault.severities) for fault in parse_faults("all:high")} == {("high",)}
    asked = parse_faults("tau_mismatch:high, label_flips, tau_mismatch:low")
    assert {fault.name: list(fault.severities) for fault in asked} == {
        "label_flips": ["low", "middle", "high"],
        "tau_mismatch": ["low", "high"],
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("poisoned_batch", r"unknown fault 'poisoned_batch', did you mean 'poisoned_batches'\? \(known: all"),
        ("nosuch", r"unknown fault 'nosuch'.* \(known: all, none, nonfinite_inputs"),
        ("label_flips:hihg", "unknown severity 'hihg' of label_flips, did you mean 'high'"),
        ("label_flips:", "unknown severity '' of label_flips"),
        ("none,label_flips", "must be none alone"),
        ("", "must be all, none, or names"),
    ],
    ids=["near", "far", "severity", "no severity", "none and more", "nothing"],
)
def test_a_fault_that_there_is_not_is_named(text: str, message: str) -> None:
    """The message has what was asked for, what was perhaps meant, and what there is."""
    with pytest.raises(UserError, match=message):
        parse_faults(text)


def test_the_document_has_every_fault_as_it_is() -> None:
    """docs/faults.md has a row for each fault: what it does, its strength, its severities and its span."""
    text = DOCS.read_text(encoding="utf-8")
    shown = re.findall(r"^\| `(\w+)` \| ([^|]*) \| ([^|]*) \| ([^|]*) \| (\w+) \|", text, re.M)
    assert shown == [
        (
            fault.name,
            fault.summary,
            fault.strength,
            ", ".join(f"{value:g}" for value in fault.severities.values()),
            fault.span,
        )
        for fault in FAULTS.values()
    ]
