"""Models at the end of their trials: kept by packs, written to files that run nothing, read back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from scm.training.checkpoint import CheckpointError, write_checkpoint
from scm.trial import decode_split
from trainables.trained import Trained, read_trained, train_models, write_trained

SPEC = {"name": "rr_ik", "params": {}, "base_dir": "."}
CONFIG = {"max_epochs": 2, "hidden_width": 8, "batch_size": 256}


@pytest.fixture(scope="module")
def ended() -> dict[str, Any]:
    """Two configs of one pack."""
    return train_models(SPEC, [("a", CONFIG, 0), ("b", {**CONFIG, "learning_rate": 0.01}, 0)])


def test_the_model_of_a_pack_is_the_one_that_was_scored(ended: dict[str, Any]) -> None:
    """What a kept model answers has the coverage that its trial's row says."""
    assert set(ended) == {"a", "b"}
    for held in ended.values():
        assert isinstance(held, Trained)
        decoded = decode_split(held.model, held.splits["test"], tau_infer=held.settings.tau_infer)
        assert 1 - decoded.bottom.double().mean().item() == pytest.approx(held.outcome["test_coverage"])
    assert ended["a"].digest != ended["b"].digest


def test_a_model_trained_alone_is_kept_as_well() -> None:
    """A config that no pack can train gives its model all the same."""
    (held,) = train_models(SPEC, [("a", {**CONFIG, "sampling": "near_pole"}, 0)]).values()
    assert isinstance(held, Trained)
    assert held.outcome["pack_note"]


def test_a_trained_model_survives_its_file(ended: dict[str, Any], tmp_path: Path) -> None:
    """Read back, it has the same weights, config, seed and data."""
    write_trained(ended["a"], tmp_path / "a.pt")
    back = read_trained(tmp_path / "a.pt")
    assert (back.digest, back.config, back.seed) == (ended["a"].digest, ended["a"].config, 0)
    assert back.data_digest == ended["a"].data_digest


def test_a_trial_that_ends_without_a_model_is_there_with_its_outcome() -> None:
    """A task that refuses a config leaves a failed outcome and takes no other trial with it."""
    ended = train_models(SPEC, [("a", {**CONFIG, "nesterov": True, "optimizer": "sgd"}, 0), ("b", CONFIG, 0)])
    assert isinstance(ended["b"], Trained)
    assert ended["a"]["status"] == "failed"


def test_a_checkpoint_of_something_else_is_refused(ended: dict[str, Any], tmp_path: Path) -> None:
    """A training under way, and weights of another shape, are named for what they are."""
    write_checkpoint(tmp_path / "other.pt", {"pack": {}})
    with pytest.raises(CheckpointError, match="must be of a trained model"):
        read_trained(tmp_path / "other.pt")
    write_trained(ended["a"], tmp_path / "a.pt")
    content = torch.load(tmp_path / "a.pt", weights_only=True)
    content["trained"]["config"]["hidden_width"] = 16
    write_checkpoint(tmp_path / "wide.pt", content)
    with pytest.raises(CheckpointError, match="of another model: other shapes"):
        read_trained(tmp_path / "wide.pt")
