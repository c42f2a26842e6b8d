"""What a sweep of the throughput benchmark trains, and how the peer trains it: its usual way, and its best.

The peer is zeroproofml with Ray Tune around its objective. How many configs are asked for, and what is made
of the times, is decided in `sweep_throughput`.
"""

from __future__ import annotations

import itertools
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scm.seeding import generator, seeded_init
from scm.training.targets import STATUSES
from trainables.tasks.table import make_table_task

ROOT = Path(__file__).parents[1]
SEED = 0  # of every trial: weights, order of the rows
BATCH_SIZE, EPOCHS, TAU = 32, 20, 0.1
SHAPE = (5, 64, 64, 2)
KS_OF = ("val_loss", "coverage")
TASK: dict[str, Any] = {
    "name": "table",
    "data": str(ROOT / "data" / "gbsg2.csv"),
    "inputs": ["age", "tsize", "pnodes", "progrec", "estrec"],
    "target": "time",
    "status": {"column": "cens", "values": {"1": "finite", "0": "censored_above"}},
}
FIXED: dict[str, Any] = {
    "max_epochs": EPOCHS,
    "batch_size": BATCH_SIZE,
    "optimizer": "adam",
    # What zeroproofml's objective does: its fit term, its coverage term, and tuples as the layer gives them.
    "fit": "implicit",
    "coverage_term": "hard",
    "tuple_norm": "none",
    "tau_train_min": TAU,
    "tau_train_max": TAU,
    "tau_infer": TAU,
}
Config = Mapping[str, float]


class NotMeasuredError(Exception):
    """Something without which there is no number; the message says what."""


class PatternMLP(nn.Module):
    """The peer's guides' model: P and Q are the two outputs of a ReLU network."""

    def __init__(self) -> None:
        super().__init__()
        wide = [nn.Linear(*pair) for pair in itertools.pairwise(SHAPE)]
        self.layers = nn.Sequential(wide[0], nn.ReLU(), wide[1], nn.ReLU(), wide[2])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        P, Q = self.layers(x).unbind(dim=-1)
        return P, Q


@dataclass(frozen=True, slots=True)
class PeerData:
    """A split as the peer takes it: inputs, values, and a word a row."""

    x: Tensor
    y: Tensor
    words: list[str]


def peer_splits() -> dict[str, PeerData]:
    """The same rows as a sweep trains and validates on."""
    splits = make_table_task({key: value for key, value in TASK.items() if key != "name"}).splits(SEED)
    made = {}
    for name in ("train", "val"):
        targets = splits[name].targets
        y = torch.where(targets.mask_finite, targets.Y_n, 0.0)
        words = [STATUSES[code] for code in splits[name].extras["status"].tolist()]
        made[name] = PeerData(splits[name].inputs, y, words)
    return made


def peer_loss(config: Config) -> Callable[..., Tensor]:
    """The peer's objective with a config's weights, with the masks that the statuses give."""
    from zeroproofml.losses import LossConfig, SCMTrainingLoss, implicit_loss

    weights = {"lambda_margin": config["lambda_margin"], "lambda_sign": config["lambda_sign"]}
    stack = SCMTrainingLoss(LossConfig(tau_train=TAU, **weights))

    def loss(outputs: Any, lifted: Any, *, tau: float, semantic_targets: Any) -> Tensor:
        (P, Q), (Y_n, Y_d) = outputs, lifted
        total, _ = stack(
            implicit_loss(P, Q, Y_n, Y_d),
            P,
            Q,
            Y_n,
            Y_d,
            is_bottom=Q.detach().abs() < tau,
            mask_finite=semantic_targets.mask_finite,
            mask_singular=semantic_targets.mask_bottom,
            tau_train=tau,
        )
        return total

    return loss


def train_peer(
    config: Config,
    train: Any,
    val: Any,
    device: str,
    *,
    fused: bool = False,
    hook: Callable[[Mapping[str, Any]], None] | None = None,
) -> dict[str, float]:
    """Train a config with the peer's trainer; return its last validation."""
    from zeroproofml.training import SCMTrainer, TrainingConfig

    with seeded_init(SEED):
        model = PatternMLP().to(device)
    optimizer = torch.optim.Adam(
        model.parameters(), lr=config["learning_rate"], betas=(config["beta1"], 0.999), fused=fused
    )
    settings = TrainingConfig(
        max_epochs=EPOCHS,
        tau_train_min=TAU,
        tau_train_max=TAU,
        tau_infer=TAU,
        coverage_threshold=0.0,  # every trial trains all its epochs, as ours do
        val_loader=val,
        device=torch.device(device),
        log_hook=hook,
    )
    trainer = SCMTrainer(model, optimizer, peer_loss(config), train, config=settings)
    trainer.fit()
    last = trainer.val_history[-1]
    return {"val_loss": last["val_loss"], "coverage": last["val_coverage"]}


class WordedRows(torch.utils.data.Dataset[tuple[Tensor, Tensor, str]]):
    """Rows of (inputs, value, word), for a DataLoader."""

    def __init__(self, data: PeerData) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data.words)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor, str]:
        return self.data.x[row], self.data.y[row], self.data.words[row]


def usual_trial(config: dict[str, Any], data: dict[str, PeerData], device: str) -> None:
    """The usual function trainable: loaders, fit, a report an epoch."""
    from ray import tune

    def hook(record: Mapping[str, Any]) -> None:
        if record["phase"] == "eval":
            tune.report({"val_loss": record["val_loss"], "coverage": record["val_coverage"]})

    train = torch.utils.data.DataLoader(WordedRows(data["train"]), batch_size=BATCH_SIZE, shuffle=True)
    val = torch.utils.data.DataLoader(WordedRows(data["val"]), batch_size=BATCH_SIZE)
    train_peer(config["trial"], train, val, device, hook=hook)


class IndexedBatches:
    """Batches of lifted rows, in a new order each time: one gather an epoch, then views."""

    def __init__(self, data: PeerData, device: str, batch_size: int, order: torch.Generator | None) -> None:
        from zeroproofml.training import lift_semantic_targets as lift

        lifted = lift(data.y, data.words)
        self.kind = type(lifted)
        held = (data.x, *(getattr(lifted, name) for name in self.kind.__dataclass_fields__))
        self.columns = [column.to(device) for column in held]
        self.batch_size, self.order = batch_size, order

    def __iter__(self) -> Iterator[tuple[Tensor, Any]]:
        columns = self.columns
        if self.order is not None:
            order = torch.randperm(len(columns[0]), generator=self.order).to(columns[0].device)
            columns = [column[order] for column in columns]
        for x, *targets in zip(*(column.split(self.batch_size) for column in columns), strict=True):
            yield x, self.kind(*targets)


def best_trainable() -> type:
    """The best class trainable: its actor is reused, a trial is one step, data lie ready."""
    from ray import tune

    class BestTrial(tune.Trainable):
        def setup(self, config: dict[str, Any], data: dict[str, PeerData], device: str) -> None:
            self.device = device
            self.rows = IndexedBatches(data["train"], device, BATCH_SIZE, None)
            self.held_out = IndexedBatches(data["val"], device, len(data["val"].words), None)
            self.config = config

        def reset_config(self, new_config: dict[str, Any]) -> bool:
            self.config = new_config
            return True

        def step(self) -> dict[str, Any]:
            self.rows.order = generator(SEED, "order")
            made = train_peer(self.config["trial"], self.rows, self.held_out, self.device, fused=True)
            return {**made, "done": True}

        def save_checkpoint(self, checkpoint_dir: str) -> None:
            """Nothing: a trial is one step."""

        def load_checkpoint(self, checkpoint: Any) -> None:
            """Nothing: a trial is one step."""

    return BestTrial


def run_peer(asked: Mapping[str, Any], trainable: Any, *, reuse: bool) -> dict[str, Any]:
    """Run the configs with Tune on all cores; say when each ended, and what it came to."""
    import ray
    from ray import tune

    class Ends(tune.Callback):
        at: list[float] = []  # noqa: RUF012, there is one

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            self.at.append(time.time())

    with tempfile.TemporaryDirectory(prefix="scm-") as scratch:
        ray.init(
            address="local",
            num_cpus=os.cpu_count(),
            include_dashboard=False,
            log_to_driver=False,
            _temp_dir=f"{scratch}/ray",
        )
        ends = Ends()
        share = {"cpu": 1.0, "gpu": 1.0} if asked["device"] == "cuda" else {"cpu": 1.0}
        with_data = tune.with_parameters(trainable, data=peer_splits(), device=asked["device"])
        results = tune.Tuner(
            tune.with_resources(with_data, share),
            param_space={"trial": tune.grid_search(asked["configs"])},
            tune_config=tune.TuneConfig(reuse_actors=reuse),
            run_config=tune.RunConfig(storage_path=f"{scratch}/tune", callbacks=[ends], verbose=0),
        ).fit()
        if results.errors:
            raise NotMeasuredError(f"a trial of the peer failed: {results.errors[0]}")
        values = [
            {name: result.metrics[name] for name in KS_OF}
            for result in map(results.__getitem__, range(len(results)))
        ]
        ray.shutdown()
    return {"ends": sorted(ends.at), "values": values}


def run_usual(asked: Mapping[str, Any]) -> dict[str, Any]:
    """The peer's usual way, with Tune's defaults."""
    return run_peer(asked, usual_trial, reuse=False)


def run_best(asked: Mapping[str, Any]) -> dict[str, Any]:
    """The peer's best way, with nothing that Tune can leave out."""
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    os.environ["TUNE_GLOBAL_CHECKPOINT_S"] = "86400"
    return run_peer(asked, best_trainable(), reuse=True)


def run_nothing(asked: Mapping[str, Any]) -> dict[str, Any]:
    """The peer's best way with trials that end at once: what Ray Tune takes for itself."""

    class NothingTrial(best_trainable()):  # type: ignore[misc]
        def step(self) -> dict[str, Any]:
            return {**dict.fromkeys(KS_OF, 0.0), "done": True}

    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    return run_peer(asked, NothingTrial, reuse=True)
