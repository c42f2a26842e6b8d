"""A task of your own: where does a thin lens form its image?

An object at distance d from a lens of focal length f has its image at d f / (d - f). At d = f there is none:
the rays leave in parallel, and the only right answer is bottom. The plan beside this file names the class:

    scm-harness sweep examples/own_task.yaml
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from scm.data import Split
from scm.seeding import generator
from scm.training.targets import STATUS_CODES, lift_semantic_targets
from scm.trial import Decoded
from scm.trial_config import TrialConfig
from trainables.metrics import standard_metrics
from trainables.tasks.protocol import LossFn, TaskError, check_params


class LensModel(nn.Module):
    """A numerator and a denominator (P, Q), each (B,), from object distance and focal length (B, 2)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh())
        self.head = nn.Linear(width, 2)

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        # On the unit circle |Q| is a share, so that a threshold on it means the same for every model.
        p, q = nn.functional.normalize(self.head(self.body(inputs)), dim=-1).unbind(-1)
        return p, q


class LensTask:
    """Image distances in focal lengths, with the rows that have no image labelled bottom."""

    name = "lens"
    error_unit = "focal lengths"

    def __init__(self, params: Mapping[str, Any]) -> None:
        check_params(self.name, params, ("rows", "blur"))
        self.rows = params.get("rows", 600)
        self.blur = params.get("blur", 0.05)  # nearer to the focus than this, relative, there is no image
        if not isinstance(self.rows, int) or self.rows < 30:
            raise TaskError(f"rows must be a whole number >= 30, got {self.rows!r}")

    def splits(self, seed: int) -> Mapping[str, Split]:
        """Draw the three splits from generators of their own: new data for every seed of the plan."""
        sizes = {"train": self.rows, "val": self.rows // 3, "test": self.rows // 3}
        return {name: self._draw(count, generator(seed, f"lens {name}")) for name, count in sizes.items()}

    def shifts(self, seed: int) -> Mapping[str, Sequence[tuple[float, Split]]]:
        """Optional, for `scm-harness robustness`: objects nearer to the focus (as a share of f), further away
        than in training (in f), and both lengths read with noise (in lengths)."""
        levels = {
            "near_pole": [(near, {"low": 1.0 - near, "high": 1.0 + near}) for near in (0.5, 0.2, 0.08)],
            "longer_range": [(far, {"low": 2.5, "high": far}) for far in (4.0, 8.0, 16.0)],
            "noise": [(noise, {"noise": noise}) for noise in (0.01, 0.03, 0.1)],
        }
        return {
            name: [(level, self._draw(300, generator(seed, f"{name} {level}"), **how)) for level, how in hows]
            for name, hows in levels.items()
        }

    def build_model(self, config: TrialConfig) -> nn.Module:
        """Any module that gives (P, Q); knobs of the config are there to be read."""
        return LensModel(config.hidden_width)

    def make_loss(self, config: TrialConfig) -> LossFn | None:
        """None takes the loss that the config describes; docs/tasks.md shows how to give one of your own."""
        return None

    def metrics(self, decoded: Decoded, split: Split, config: TrialConfig) -> dict[str, float]:
        """Score in focal lengths; an abstention is charged the error of answering the usual 2 f."""
        value, status = split.extras["value"], split.extras["status"]
        scores = standard_metrics(decoded.decoded, ~decoded.bottom, value, status, baseline=2.0)
        real = ~decoded.bottom & (value > 0) & (status == STATUS_CODES["finite"])
        scores["right_side"] = float((decoded.decoded[real] > 0).float().mean())  # column metric.right_side
        return scores

    def _draw(
        self, count: int, draws: torch.Generator, low: float = 0.5, high: float = 2.5, noise: float = 0.0
    ) -> Split:
        focal = 0.5 + torch.rand(count, generator=draws)
        distance = focal * (low + (high - low) * torch.rand(count, generator=draws))
        from_focus = (distance / focal - 1.0).abs()
        no_image = from_focus < self.blur
        value = torch.where(no_image, torch.nan, distance / (distance - focal))
        status = torch.where(no_image, STATUS_CODES["bottom"], STATUS_CODES["finite"])
        inputs = torch.stack([distance, focal], dim=-1)
        return Split(
            inputs=inputs + noise * torch.randn(inputs.shape, generator=draws),
            targets=lift_semantic_targets(value, status),
            extras={"value": value, "status": status, "pole_distance": from_focus},
        )
