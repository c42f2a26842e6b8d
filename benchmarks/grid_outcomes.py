"""What guards are for, measured on the task `grid`: the six outcomes that the reference expected.

Model and data are real, if small: 24 puzzles of coloured grids, attention, a stop head, eight symmetries. A
failure is one that the training has by itself, or one that is put into its start or its data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from failures.equivariance import inert_equivariance
from failures.measuring import UNCHANGED, Case, Found, Setting, Target, largest_difference
from torch import Tensor, nn

from scm.autodiff.policies import policies_disabled
from scm.guards.consistency import EquivarianceGuard, OutputEquivarianceLoss, global_context
from scm.guards.gap import Consensus
from scm.guards.symmetry import D4
from scm.losses.terms import LossTerms
from scm.seeding import generator, seeded_init
from scm.training.companion import Moment
from scm.training.loader import TensorBatches
from scm.training.trainer import SCMTrainer
from scm.trial import decode_split, make_optimizer, make_trainer
from scm.trial_config import TrialConfig
from trainables.tasks.grid import SUGGESTED, GridTask, consensus, make_grid_task
from trainables.tasks.grid_model import GridReasoner

DATA = Path(__file__).resolve().parents[1] / "data" / "grids.json"

Knobs = dict[str, Any]
Prepare = Callable[[GridReasoner], None]


@cache
def grid_task(**params: float) -> GridTask:
    """The task on the example puzzles; `TaskError` where they cannot be read."""
    return make_grid_task({"data": DATA, **params})


@dataclass
class _Record:
    """What micro-batches came out as: the share of the terms beside the task's, and what is not finite."""

    needs_terms = True
    shares: list[float] = field(default_factory=list)
    contaminated: int = 0  # the loss is not finite, though the inputs are

    def after_backward(self, moment: Moment) -> None:
        """Look at the terms as they were trained."""
        assert moment.terms is not None
        self.add(moment.fed.inputs, moment.terms)

    def add(self, inputs: Tensor, terms: LossTerms) -> None:
        """Take in one micro-batch."""
        total = float(terms.total().detach())
        self.shares.append(1.0 - float(terms.task.detach()) / total)
        self.contaminated += bool(inputs.isfinite().all()) and not math.isfinite(total)


@dataclass(frozen=True)
class _Run:
    """One training of the reasoner."""

    setting: Setting
    task: GridTask
    model: GridReasoner
    record: _Record

    def weights(self) -> list[Tensor]:
        return list(self.model.parameters())

    def inputs(self, part: str = "train") -> Tensor:
        return self.task.splits(0)[part].inputs.to(self.setting.device)

    def accuracy(self) -> float:
        """The right share of the cells of the validation rows."""
        config, split = _config({}), self.task.splits(0)["val"]
        decoded = decode_split(self.model, split, tau_infer=config.tau_infer)
        return self.task.metrics(decoded, split, config)["cell_accuracy"]

    def consensus(self, part: str = "val") -> Consensus:
        return consensus(self.model, self.task, self.task.splits(0)[part])

    def stop_logits(self) -> Tensor:
        with torch.no_grad():
            logits: Tensor = self.model(self.inputs())[2]["stop_logits"]
        return logits

    def clue_spread(self) -> float:
        """The standard deviation of the clue count between training rows."""
        with torch.no_grad():
            return float(self.model(self.inputs())[2]["clue_count"].std())

    def stop_gradient(self) -> float:
        """The norm of the gradient that the task's loss and its terms give the stop head."""
        config, split = _config({}), self.task.splits(0)["train"]
        targets = split.targets.to(self.setting.device)
        loss: Any = self.task.make_loss(config)
        terms = loss(self.model(self.inputs()), (targets.Y_n, targets.Y_d), tau=0.5, semantic_targets=targets)
        found = torch.autograd.grad(terms.total(), list(self.model.stop.parameters()))
        return float(nn.utils.get_total_norm(list(found)))


def _config(knobs: Knobs) -> TrialConfig:
    return TrialConfig.from_flat({**SUGGESTED, **knobs})


def _built(task: GridTask, config: TrialConfig, prepare: Prepare | None) -> Callable[[], GridReasoner]:
    def build() -> GridReasoner:
        model = task.build_model(config)
        assert isinstance(model, GridReasoner)
        if prepare is not None:
            prepare(model)
        return model

    return build


def _train(
    setting: Setting,
    *,
    params: Knobs | None = None,
    prepare: Prepare | None = None,
    broken_row: int | None = None,
    companions: Sequence[Any] = (),
    **knobs: Any,
) -> _Run:
    """Train as a trial of a sweep is trained, from weights that `prepare` may change."""
    task = grid_task(**(params or {}))
    config, splits, record = _config(knobs), task.splits(0), _Record()
    train = splits["train"]
    if broken_row is not None:
        train = replace(train, inputs=_with_broken_row(train.inputs, broken_row))
    trainer: SCMTrainer = make_trainer(
        config,
        setting.seed,
        _built(task, config, prepare),
        train,
        splits["val"],
        loss_fn=task.make_loss(config),
        device=setting.device,
        companions=[record, *companions],
        symmetries=task.symmetries(),
    )
    trainer.fit()
    assert isinstance(trainer.model, GridReasoner)
    return _Run(setting, task, trainer.model, record)


@cache
def _plain(setting: Setting) -> _Run:
    """The task's suggested settings, as they are."""
    return _train(setting)


# --- 1: batches that are not finite --------------------------------------------------------------

_UNCLIPPED: Knobs = {"clip_norm": None, "lr_schedule": "constant"}  # what a plain loop can do as well
_BROKEN = 3


def _with_broken_row(inputs: Tensor, row: int) -> Tensor:
    broken = inputs.clone()
    broken[row] = math.nan
    return broken


def _train_bare(setting: Setting, broken_row: int | None = None) -> _Run:
    """The same training in a plain loop without any guard: the same rows, weights, loss and optimizer."""
    task = grid_task()
    config, split, record = _config(_UNCLIPPED), task.splits(0)["train"], _Record()
    with seeded_init(setting.seed, "init"):
        model = _built(task, config, None)().to(setting.device)
    inputs = split.inputs if broken_row is None else _with_broken_row(split.inputs, broken_row)
    order = generator(setting.seed, "order")
    batches = TensorBatches(inputs, split.targets, config.batch_size, order, setting.device)
    optimizer = make_optimizer(config, model.parameters())
    loss: Any = task.make_loss(config)
    with policies_disabled():
        for _ in range(config.max_epochs):
            for rows, targets in batches:
                outputs = model(rows)
                terms = loss(outputs, (targets.Y_n, targets.Y_d), tau=0.5, semantic_targets=targets)
                optimizer.zero_grad()
                terms.total().backward()
                optimizer.step()
                record.add(rows, terms)
    return _Run(setting, task, model, record)


def no_more_nan_batches(setting: Setting) -> Found:
    """Outcome 1: one row of the data is not a number; how many batches without it are not, either."""
    guard = {**_UNCLIPPED, "finite_action": "skip_micro_batch", "nonfinite_budget": 1000}
    bare, clean = _train_bare(setting, _BROKEN), _train_bare(setting)
    guarded = _train(setting, broken_row=_BROKEN, **guard)
    clean_guarded = _train(setting, **guard)
    return Found(
        without_guard=bare.record.contaminated,
        with_guard=guarded.record.contaminated,
        clean=clean.record.contaminated,
        clean_with_guard=clean_guarded.record.contaminated,
        clean_change=largest_difference(clean.weights(), clean_guarded.weights()),
        more={
            "batches": float(len(bare.record.shares)),
            "accuracy": bare.accuracy(),
            "accuracy_with_guard": guarded.accuracy(),
            "accuracy_clean": clean.accuracy(),
        },
    )


# --- 2: the task's share -------------------------------------------------------------------------

_QUIET: Knobs = {"clue_weight": 0.05, "confidence_weight": 0.05}


def _saturated(setting: Setting) -> Prepare:
    """Spread the stop head's logits 300-fold, around 40: where a sigmoid has no slope."""
    inputs = grid_task().splits(0)["train"].inputs

    def prepare(model: GridReasoner) -> None:
        last = model.stop[-1]
        assert isinstance(last, nn.Linear)
        with torch.no_grad():
            last.weight.mul_(300.0)
            last.bias.zero_()
            last.bias.add_(40.0 - model(inputs)[2]["stop_logits"].median())

    return prepare


def task_keeps_its_share(setting: Setting) -> Found:
    """Outcome 2: a saturated stop head makes a small weight's term loud; the largest share of any step."""
    start = _saturated(setting)
    capped: Knobs = {"cap_ratio": 0.25}

    def train(**knobs: Any) -> _Run:
        return _train(setting, params=_QUIET, prepare=start, lambda_saturation=0.05, **knobs)

    free, guarded = train(), train(**capped)
    reference = train(**capped, cap_currency="reference")
    clean, clean_guarded = (_train(setting, params=_QUIET, **knobs) for knobs in ({}, capped))
    return Found(
        without_guard=max(free.record.shares),
        reference_rule=max(reference.record.shares),
        with_guard=max(guarded.record.shares),
        clean=max(clean.record.shares),
        clean_with_guard=max(clean_guarded.record.shares),
        clean_change=largest_difference(clean.weights(), clean_guarded.weights()),
    )


# --- 3: an equivariance term that is not 0 -------------------------------------------------------


def _features(model: GridReasoner, inputs: Tensor) -> Tensor:
    """The feature maps of the grids that are asked about, as the model makes them."""
    planes = model.embed.in_channels
    with torch.no_grad():
        features = model.embed(inputs[:, -planes:])
        for layer in model.layers:
            features = features + torch.relu(layer(features))
    return features


def _output_distance(run: _Run) -> float:
    """The equivariance of the outputs, over all seven views of the training rows."""
    loss = OutputEquivarianceLoss(run.task.symmetries())
    names = [name for name in D4 if name != "identity"]
    with torch.no_grad():
        return float(loss(run.model, run.inputs(), names=names).loss)


def equivariance_is_not_zero(setting: Setting) -> Found:
    """Outcome 3: the term on transformed features and on outputs; measuring it changes no training."""
    plain = _plain(setting)
    features = _features(plain.model, plain.inputs())
    term = OutputEquivarianceLoss(plain.task.symmetries(), generator=generator(setting.seed, "views"))
    watched = _train(setting, companions=[EquivarianceGuard(term, 0.0)])

    def averaged(features: Tensor) -> Tensor:
        return torch.stack([global_context(item.apply(features)) for item in D4.values()]).mean(dim=0)

    return Found(
        without_guard=float(inert_equivariance(features, averaged)),
        reference_rule=float(inert_equivariance(features, global_context)),
        with_guard=_output_distance(plain),
        clean=plain.accuracy(),
        clean_with_guard=watched.accuracy(),
        clean_change=largest_difference(plain.weights(), watched.weights()),
        more={"after_training_with_it": _output_distance(_equivariant(setting))},
    )


# --- 4: clue counts that differ ------------------------------------------------------------------


def clue_counts_differ(setting: Setting) -> Found:
    """Outcome 4: the stop head of the plain training, and with the spread term; a head that is healthy."""
    plain, guarded = _plain(setting), _train(setting, lambda_spread=1.0)
    healthy = {name: item.cpu() for name, item in guarded.model.state_dict().items()}

    def start(model: GridReasoner) -> None:
        model.load_state_dict(healthy)

    gently: Knobs = {"max_epochs": 2, "learning_rate": 3e-4}
    clean, clean_guarded = (
        _train(setting, prepare=start, **gently, lambda_spread=weight) for weight in (0.0, 1.0)
    )
    return Found(
        without_guard=plain.clue_spread(),
        with_guard=guarded.clue_spread(),
        clean=clean.clue_spread(),
        clean_with_guard=clean_guarded.clue_spread(),
        clean_change=largest_difference(clean.weights(), clean_guarded.weights()),
        more={"accuracy": plain.accuracy(), "accuracy_with_guard": guarded.accuracy()},
    )


# --- 5: a stop head that can learn ---------------------------------------------------------------


def stop_head_can_learn(setting: Setting) -> Found:
    """Outcome 5: a stop head that starts saturated; the gradient that reaches it after training."""
    start = _saturated(setting)
    free = _train(setting, prepare=start)
    guarded = _train(setting, prepare=start, lambda_saturation=0.5)
    clean, clean_guarded = _plain(setting), _train(setting, lambda_saturation=0.5)
    return Found(
        without_guard=free.stop_gradient(),
        with_guard=guarded.stop_gradient(),
        clean=clean.stop_gradient(),
        clean_with_guard=clean_guarded.stop_gradient(),
        clean_change=largest_difference(clean.weights(), clean_guarded.weights()),
        more={
            "largest_stop_logit": float(free.stop_logits().abs().max()),
            "largest_stop_logit_with_guard": float(guarded.stop_logits().abs().max()),
        },
    )


# --- 6: views that agree -------------------------------------------------------------------------


@cache
def _equivariant(setting: Setting) -> _Run:
    return _train(setting, lambda_equivariance=5.0)


def views_agree(setting: Setting) -> Found:
    """Outcome 6: the share of eight views of a validation row that give the commonest answer."""
    plain, guarded = _plain(setting), _equivariant(setting)
    votes, guarded_votes = plain.consensus(), guarded.consensus()
    return Found(
        without_guard=votes.share,
        with_guard=guarded_votes.share,
        clean=plain.accuracy(),
        clean_with_guard=guarded.accuracy(),
        clean_change=abs(plain.accuracy() - guarded.accuracy()),
        more={
            "different_answers": votes.different,
            "different_answers_with_guard": guarded_votes.different,
            "trusted": float(votes.trusted),
            "trusted_with_guard": float(guarded_votes.trusted),
            "training_rows": plain.consensus("train").share,
            "training_rows_with_guard": guarded.consensus("train").share,
        },
    )


# --- all of them ---------------------------------------------------------------------------------

OUTCOMES: tuple[Case, ...] = (
    Case(
        id="outcome_1",
        group="outcome",
        trigger="one row of 58 is NaN; ten epochs",
        mechanism="one step on it, and every later batch is NaN",
        measure="NaN batches without that row",
        unit="of 30",
        guard="finite_action='skip_micro_batch'",
        run=no_more_nan_batches,
        targets=(
            Target("without_guard", ">=", 20.0),
            Target("with_guard", "==", 0.0),
            Target("accuracy_with_guard", ">=", -0.03, beside="accuracy_clean"),
            UNCHANGED,
        ),
    ),
    Case(
        id="outcome_2",
        group="outcome",
        trigger="a saturated stop head, whose penalty of weight 0.05 is loud",
        mechanism="a small weight of a large loss",
        measure="largest share of the terms beside the task, of any step",
        unit="",
        guard="cap_ratio=0.25",
        reference="cap_currency='reference': weights compared with a loss",
        run=task_keeps_its_share,
        targets=(
            Target("without_guard", ">=", 0.5),
            Target("reference_rule", ">=", 0.5),
            Target("with_guard", "<=", 0.250001),
            UNCHANGED,
        ),
    ),
    Case(
        id="outcome_3",
        group="outcome",
        trigger="the trained reasoner's feature maps, turned and pooled",
        mechanism="a global mean is the same in every orientation",
        measure="the equivariance term",
        unit="",
        guard="OutputEquivarianceLoss over seven views",
        reference="pool_context_simple",
        clean_measure="cell accuracy, the term measured with weight 0 in training",
        run=equivariance_is_not_zero,
        targets=(
            Target("without_guard", "<=", 1e-6),
            Target("reference_rule", "<=", 1e-6),
            Target("with_guard", ">=", 0.01),
            Target("after_training_with_it", "<", 0.0, beside="with_guard"),
            UNCHANGED,
        ),
    ),
    Case(
        id="outcome_4",
        group="outcome",
        trigger="none: the stop head collapses by itself",
        mechanism="nothing asks for counts that differ",
        measure="deviation of the clue count",
        unit="clues",
        guard="lambda_spread=1, target_spread=0.5",
        clean_measure="of a head that differs already, trained on gently",
        run=clue_counts_differ,
        targets=(
            Target("without_guard", "<=", 0.1),
            Target("with_guard", ">=", 0.5),
            Target("accuracy_with_guard", ">=", -0.02, beside="accuracy"),
            UNCHANGED,
        ),
    ),
    Case(
        id="outcome_5",
        group="outcome",
        trigger="a stop head that starts at logits of about 40",
        mechanism="a sigmoid has no slope there",
        measure="norm of the stop head's gradient after training",
        unit="",
        guard="lambda_saturation=0.5, saturation_threshold=5",
        run=stop_head_can_learn,
        targets=(
            Target("without_guard", "<=", 1e-6),
            Target("with_guard", ">=", 1e-2),
            Target("largest_stop_logit_with_guard", "<=", 10.0),
            UNCHANGED,
        ),
    ),
    Case(
        id="outcome_6",
        group="outcome",
        trigger="none: views of a validation row are answered differently",
        mechanism="every row is seen in one orientation",
        measure="share of eight views that give the commonest answer",
        unit="",
        guard="lambda_equivariance=5",
        clean_measure="cell accuracy of the same two trainings",
        run=views_agree,
        targets=(
            Target("with_guard", ">=", 0.03, beside="without_guard"),
            Target("trusted_with_guard", "==", 1.0),
            Target("clean_with_guard", ">=", -0.02, beside="clean"),
        ),
    ),
)
