"""Time one training step of `scm.training.SCMTrainer` against zeroproofml 0.6.1's, on the same model.

Two cases, each with the full objective (fit, margin, orientation, rejection) of the library it runs in:

    labels   rows with statuses. The peer gets words with each batch, as its guide has it; ours lifts integer
             codes once and serves them with TensorBatches. Target: at most 0.70 of the peer's time.
    plain    (x, y) batches, the same list for both. Target: at most 0.90.

Our guard against non-finite steps is on; the peer has none. Runs alternate, so that both see the same
machine; what is compared is the median over runs of the time of one step, in one process, one thread.

    python benchmarks/step_time.py [--quick] [--device cpu|cuda] [--json PATH]

Exit code 0 when both targets are met, 1 when one is missed, 2 when nothing can be measured: zeroproofml is
not installed, or the device is not there.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any

import torch
from benchmark_arguments import device, file_to_write
from torch import Tensor, nn

import scm.losses
import scm.training
from scm.training.loader import TensorBatches
from scm.training.targets import STATUSES, lift_semantic_targets

BATCH_SIZE = 256
TARGETS = {"labels": 0.70, "plain": 0.90}
_LOSS = {"tau_train": 1e-4, "lambda_margin": 0.1, "lambda_sign": 1.0, "lambda_rej": 0.01}


class PatternMLP(nn.Module):
    """The guides' head: 4-64-64-2, its outputs are P and Q; 4 610 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        P, Q = self.layers(x).unbind(dim=-1)
        return P, Q


@dataclass(frozen=True)
class Timing:
    """Microseconds of one step: the median over runs, and the distance of the quartiles."""

    median_us: float
    iqr_us: float
    runs: int


@dataclass(frozen=True)
class Comparison:
    """One case: both sides, the ratio of their medians, and what was to be reached."""

    case: str
    device: str
    ours: Timing
    peer: Timing
    ratio: float
    target: float

    @property
    def met(self) -> bool:
        """Whether the target was reached."""
        return self.ratio <= self.target


def plain_loss(losses: ModuleType) -> Callable[..., Tensor]:
    """Make the full objective out of one library's losses, for targets without statuses."""
    stack = losses.SCMTrainingLoss(losses.LossConfig(**_LOSS))

    def loss(outputs: tuple[Tensor, Tensor], lifted: tuple[Tensor, Tensor], *, tau: float) -> Tensor:
        (P, Q), (Y_n, Y_d) = outputs, lifted
        fit = losses.implicit_loss(P, Q, Y_n, Y_d)
        total, _ = stack(fit, P, Q, Y_n, Y_d, is_bottom=Q.detach().abs() < tau, tau_train=tau)
        return total

    return loss


def labelled_loss(losses: ModuleType) -> Callable[..., Tensor]:
    """Make the full objective out of one library's losses, with the masks that the statuses give."""
    stack = losses.SCMTrainingLoss(losses.LossConfig(**_LOSS))

    def loss(
        outputs: tuple[Tensor, Tensor], lifted: tuple[Tensor, Tensor], *, tau: float, semantic_targets: Any
    ) -> Tensor:
        (P, Q), (Y_n, Y_d) = outputs, lifted
        fit = losses.implicit_loss(P, Q, Y_n, Y_d)
        total, _ = stack(
            fit,
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


def run_once(library: ModuleType, loss: Callable[..., Tensor], loader: Any, device: torch.device) -> float:
    """Train one epoch from the same weights; return the microseconds of one step."""
    torch.manual_seed(0)
    model = PatternMLP().to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    config = library.TrainingConfig(max_epochs=1, device=device)
    trainer = library.SCMTrainer(model, optimizer, loss, loader, config=config)
    if device.type == "cuda":
        torch.cuda.synchronize()
    begun = time.perf_counter()
    steps = len(trainer.fit())
    if device.type == "cuda":
        torch.cuda.synchronize()
    return 1e6 * (time.perf_counter() - begun) / steps


def compare(
    case: str, ours: Callable[[], float], peer: Callable[[], float], *, rounds: int, device: str
) -> Comparison:
    """Alternate both sides for `rounds` runs each, after two that are thrown away."""
    times: dict[str, list[float]] = {"ours": [], "peer": []}
    for number in range(rounds + 2):
        sides = (("ours", ours), ("peer", peer))
        for name, side in sides if number % 2 else reversed(sides):
            measured = side()
            if number >= 2:
                times[name].append(measured)
    summaries = {name: summarise(values) for name, values in times.items()}
    ratio = summaries["ours"].median_us / summaries["peer"].median_us
    return Comparison(case, device, summaries["ours"], summaries["peer"], ratio, TARGETS[case])


def summarise(values: list[float]) -> Timing:
    """Return the median and the spread of the middle half."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return Timing(median_us=middle, iqr_us=high - low, runs=len(values))


def run_cases(
    peer: ModuleType, peer_losses: ModuleType, device: torch.device, *, quick: bool
) -> list[Comparison]:
    """Measure both cases on one device."""
    steps, rounds = (20, 7) if quick else (30, 41)
    rows = steps * BATCH_SIZE
    made = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 4, generator=made)
    y = torch.randn(rows, generator=made)
    # One row in ten is a bottom of some kind; the peer refuses none of these statuses.
    kinds = torch.randint(1, 5, (rows,), generator=made)
    codes = torch.where(torch.rand(rows, generator=made) < 0.1, kinds, 0)
    words = [STATUSES[code] for code in codes.tolist()]
    starts = range(0, rows, BATCH_SIZE)
    x, y = x.to(device), y.to(device)

    worded = [(x[i : i + BATCH_SIZE], y[i : i + BATCH_SIZE], words[i : i + BATCH_SIZE]) for i in starts]
    resident = TensorBatches(x, lift_semantic_targets(y, codes.to(device)), BATCH_SIZE)
    plain = [(x[i : i + BATCH_SIZE], y[i : i + BATCH_SIZE]) for i in starts]
    ours, ours_losses = scm.training, scm.losses
    return [
        compare(
            "labels",
            lambda: run_once(ours, labelled_loss(ours_losses), resident, device),
            lambda: run_once(peer, labelled_loss(peer_losses), worded, device),
            rounds=rounds,
            device=str(device),
        ),
        compare(
            "plain",
            lambda: run_once(ours, plain_loss(ours_losses), plain, device),
            lambda: run_once(peer, plain_loss(peer_losses), plain, device),
            rounds=rounds,
            device=str(device),
        ),
    ]


def render(comparisons: list[Comparison]) -> str:
    """Return the table, one line a case."""
    lines = ["case     device    ours us    iqr   peer us    iqr  ratio  target"]
    for found in comparisons:
        lines.append(
            f"{found.case:8} {found.device:7} {found.ours.median_us:9.0f} {found.ours.iqr_us:6.0f} "
            f"{found.peer.median_us:9.0f} {found.peer.iqr_us:6.0f} {found.ratio:6.2f} <={found.target:5.2f} "
            f"{'met' if found.met else 'MISSED'}"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; return its exit code."""
    arguments = _parser().parse_args(argv)
    try:
        import zeroproofml.losses as peer_losses
        import zeroproofml.training as peer
    except ImportError:
        print("zeroproofml is not installed: pip install 'scm-harness[peer]'", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    if arguments.device is not None:
        devices = [arguments.device]
    comparisons: list[Comparison] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the peer's package, on its own modules
        for device in devices:
            comparisons += run_cases(peer, peer_losses, torch.device(device), quick=arguments.quick)
    print(f"torch {torch.__version__}, Python {platform.python_version()}, batch {BATCH_SIZE}, 1 thread")
    print(render(comparisons))
    if arguments.json is not None:
        payload = {
            "torch": torch.__version__,
            "batch_size": BATCH_SIZE,
            "cases": [asdict(c) | {"met": c.met} for c in comparisons],
        }
        arguments.json.write_text(json.dumps(payload, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return 0 if all(found.met for found in comparisons) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="a few runs of few steps: a check, not a measurement"
    )
    parser.add_argument(
        "--device", type=device, help="cpu, or cuda[:i]; without it the CPU, and a GPU if there is one"
    )
    parser.add_argument("--json", type=file_to_write, help="write the numbers to this file as well")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
