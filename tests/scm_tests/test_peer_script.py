"""A script written for zeroproofml runs when its imports name `scm`, and trains the same."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

# What the guides show, put together: head, targets, losses, policy, curriculum, logger, trainer, decoding.
SCRIPT = """
import torch
import torch.nn as nn
from {library}.autodiff.policies import GradientPolicy, gradient_policy
from {library}.inference import InferenceConfig, strict_inference
from {library}.losses import LossConfig, SCMTrainingLoss, implicit_loss
from {library}.training import SCMTrainer, TrainingConfig, lift_semantic_targets, lift_targets
from {library}.training.curriculum import LinearRamp, LossWeightsCurriculum
from {library}.utils.logging import JsonlLogger, read_jsonl

torch.manual_seed(0)


class RationalHead(nn.Module):
    def __init__(self, input_dim: int):
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Linear(input_dim, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(),
        )
        self.head = nn.Linear(64, 2)

    def forward(self, x):
        p, q = self.head(self.backbone(x)).unbind(dim=-1)
        return p, q


x = torch.randn(96, 3, dtype=torch.float64)
y = torch.sin(x).sum(-1) + 3.0
model = RationalHead(3).double()
with torch.no_grad():
    model.head.bias.copy_(torch.tensor([0.0, 2.0]))
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.95)
stack = SCMTrainingLoss(
    LossConfig(tau_train=1e-4, target_coverage=0.95, lambda_margin=0.1, lambda_sign=1.0, lambda_rej=0.01)
)


def loss_fn(outputs, lifted, *, tau, loss_weights=None, semantic_targets=None):
    P, Q = outputs
    Y_n, Y_d = lifted
    fit = implicit_loss(P, Q, Y_n, Y_d)
    total, _ = stack(
        fit, P, Q, Y_n, Y_d, is_bottom=Q.detach().abs() < tau, mask_finite=Y_d != 0, tau_train=tau
    )
    return total * (loss_weights or {{}}).get("all", 1.0)


batches = [(x[i : i + 32], y[i : i + 32]) for i in range(0, 96, 32)]
batches[1] = (*batches[1], ["finite"] * 32)
batches[2] = (batches[2][0], lift_semantic_targets(batches[2][1], ["finite"] * 32))
config = TrainingConfig(
    max_epochs=6,
    tau_train_min=1e-4,
    tau_train_max=1e-4,
    coverage_threshold=0.90,
    coverage_patience=5,
    gradient_policy=GradientPolicy.PROJECT,
    loss_curriculum=LossWeightsCurriculum({{"all": LinearRamp(0.5, 1.0, 0, 3)}}),
    val_loader=[(x, y)],
    log_hook=JsonlLogger(path),
    scheduler_cadence="per_epoch",
)
trainer = SCMTrainer(
    model=model,
    optimizer=optimizer,
    loss_fn=loss_fn,
    train_loader=batches,
    scheduler=scheduler,
    config=config,
)
logs = trainer.fit()
trainer.save_checkpoint(checkpoint)

# The same by hand, with the policy around the backward pass, as the older guide has it.
by_hand = RationalHead(3).double()
Y_n, Y_d = lift_targets(y)
with gradient_policy(GradientPolicy.PROJECT):
    loss_fn(by_hand(x), (Y_n, Y_d), tau=1e-4).backward()
by_hand_norm = by_hand.head.weight.grad.norm().item()

with torch.no_grad():
    decoded, bottom, gap = strict_inference(*model(x), config=InferenceConfig(tau_infer=1e-6))
records = read_jsonl(path)
"""


def run_script(library: str, folder: Path) -> dict[str, Any]:
    """Run the script for one library; return its names."""
    folder.mkdir()
    names: dict[str, Any] = {"path": str(folder / "log.jsonl"), "checkpoint": str(folder / "checkpoint.pt")}
    exec(compile(SCRIPT.format(library=library), f"{library}_script.py", "exec"), names)
    return names


def test_the_script_runs_under_our_names(tmp_path: Path) -> None:
    """It trains, logs one record a batch and one a validation, saves, and decodes."""
    ran = run_script("scm", tmp_path / "ours")
    losses = [log["loss"] for log in ran["logs"]]
    assert len(losses) == 18
    assert all(math.isfinite(loss) for loss in losses)
    assert ran["trainer"].val_history[-1]["val_loss"] < ran["trainer"].val_history[0]["val_loss"]
    phases = [record["phase"] for record in ran["records"]]
    assert phases == (["train"] * 3 + ["eval"]) * 6
    assert ran["records"][0]["loss"] == pytest.approx(losses[0], rel=1e-12)
    assert not bool(ran["bottom"].any())
    assert ran["by_hand_norm"] > 0


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_script_trains_as_the_peer_does(tmp_path: Path) -> None:
    """Without bottoms, missing rows or short batches both libraries give the same trajectory."""
    pytest.importorskip("zeroproofml")
    ours, peers = (run_script(name, tmp_path / name) for name in ("scm", "zeroproofml"))
    assert len(ours["logs"]) == len(peers["logs"])
    for one, other in zip(ours["logs"], peers["logs"], strict=True):
        assert one == pytest.approx(other, rel=1e-6)
    for one, other in zip(ours["trainer"].val_history, peers["trainer"].val_history, strict=True):
        assert one.keys() == other.keys()
        # The peer decodes at the middle of the training thresholds, ours at tau_infer.
        assert one["val_loss"] == pytest.approx(other["val_loss"], rel=1e-6)
        assert one["val_denom_abs_min"] == pytest.approx(other["val_denom_abs_min"], rel=1e-6)
    assert [record.keys() for record in ours["records"]] == [record.keys() for record in peers["records"]]
    assert ours["decoded"].tolist() == pytest.approx(peers["decoded"].tolist(), rel=1e-6)
    assert ours["by_hand_norm"] == pytest.approx(peers["by_hand_norm"], rel=1e-6)
