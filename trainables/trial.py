"""One trial: a config trained with a seed, epoch by epoch, ending in an outcome whatever happens on the way.

The training itself is `scm.trial`'s; what is learned and how it is scored is the task's. Decided here: what
an epoch and an ended trial say, and that trouble of the task or the training is an outcome, never a crash.
"""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from scm.data import Split
from scm.seeding import seeded_init
from scm.trial import Decoded, decode_split, make_trainer
from scm.trial_config import TrialConfig
from trainables.configs import resolve_config
from trainables.curves import curve_columns, empty_curve, risk_points, smallest_tau
from trainables.scoring import NAN, STANDARD_METRICS, metric_columns
from trainables.tasks.protocol import Task, TaskError, check_splits, task_symmetries

if TYPE_CHECKING:
    from torch import nn

    from scm.training.companion import AnyCompanion
    from scm.training.trainer import SCMTrainer

HISTORY_KEYS: tuple[str, ...] = (
    "epoch",
    "loss",
    "val_loss",
    "coverage",
    *STANDARD_METRICS,
    "nan_count",
    "lr",
    "step_time_ms",
)
TELEMETRY_PREFIX = "telemetry."
_NAN_KINDS: tuple[str, ...] = ("loss", "gradient", "output", "parameter")
# What of a trial is saved besides its trainer: the name in the file, and the attribute.
_SAVED: dict[str, str] = {
    "config": "config",
    "seed": "seed",
    "done": "done",
    "epoch": "_epoch",
    "spent_s": "_spent_s",
    "stop_reason": "_stop_reason",
    "said": "_said",
    "outcome": "_outcome",
}


class DeviceError(TaskError):
    """A device was asked for that this machine does not have."""


def check_device(device: str) -> None:
    """Raise `DeviceError` unless torch can use `device` ("cpu", "cuda" or "cuda:<index>") here."""
    kind, _, index = device.partition(":")
    if kind == "cpu" and not index:
        return
    if kind != "cuda" or (index and not index.isdigit()):
        raise DeviceError(f"device must be cpu, cuda or cuda:<index>, got {device=}")
    if not torch.cuda.is_available():
        raise DeviceError(f"a GPU was asked for and torch sees none on this machine, got {device=}")
    if index and int(index) >= torch.cuda.device_count():
        raise DeviceError(f"device must be one of {torch.cuda.device_count()} GPUs, got {device=}")


def run_trial(
    task: Task,
    config: Mapping[str, Any],
    seed: int,
    device: str = "cpu",
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Train one config with one seed to its end and give the outcome (see `TrialRun.outcome`).

    `on_epoch` is called with what each epoch said. Raises only `DeviceError`; a task that raises is an
    outcome with the status "failed".
    """
    run = TrialRun(task, config, seed, device)
    while not run.done:
        said = run.step()
        if said and on_epoch is not None:
            on_epoch(said)
    return run.outcome()


def failed_outcome(error: BaseException, config: Mapping[str, Any]) -> dict[str, Any]:
    """Give the outcome of a trial that an exception kept from starting: every key, NaN for its metrics."""
    return empty_outcome(config) | {"status": "failed", "error": error_line(error)}


def error_line(error: BaseException) -> str:
    """Say an exception in one line: type, message, and the innermost place that is not a library's."""
    message = " ".join(str(error).split())
    line = f"{type(error).__name__}: {message}" if message else type(error).__name__
    line = line.encode(errors="backslashreplace").decode()  # a lone surrogate cannot be written to a row
    places = [
        frame for frame in traceback.extract_tb(error.__traceback__) if "site-packages" not in frame.filename
    ]
    place = f" ({Path(places[-1].filename).name}:{places[-1].lineno})" if places else ""
    return line[:500] + place


def abstaining(decoded: Decoded) -> Decoded:
    """The answers of a model that abstains everywhere, in the shapes of `decoded`."""
    return Decoded(
        torch.full_like(decoded.decoded, NAN),
        torch.ones_like(decoded.bottom),
        torch.zeros_like(decoded.fault),
        torch.zeros_like(decoded.q_abs),
        None if decoded.numerator is None else torch.zeros_like(decoded.numerator),
    )


def make_splits(task: Task, seed: int) -> Mapping[str, Split]:
    """Take a task's splits for a seed, checked; `TaskError` names what is wrong with them."""
    with seeded_init(seed, "splits"):  # a task that draws from the global generators repeats itself too
        splits = task.splits(seed)
    check_splits(splits, task.name)
    return splits


def make_task_trainer(
    task: Task,
    config: TrialConfig,
    seed: int,
    train: Split,
    val: Split | None,
    *,
    device: str = "cpu",
    companions: Sequence[AnyCompanion] = (),
) -> SCMTrainer:
    """Make the trainer of one trial of a task; `companions` go along before those that the config asks for.

    Raises whatever the task raises, and what `scm.trial.make_trainer` does.
    """
    return make_trainer(
        config,
        seed,
        lambda: task.build_model(config),
        train,
        val,
        loss_fn=task.make_loss(config),
        device=device,
        companions=companions,
        symmetries=task_symmetries(task),
    )


class TrialRun:
    """One trial under way: step it epoch by epoch until `done`, then take its outcome.

    Nothing that a task or a training does escapes as an exception: the trial is then `done`, and its outcome
    has the status "failed" and a message. Raises `DeviceError` at once when the device is absent. `splits`
    are those of `make_splits(task, seed)`, where the caller has them already.

    The same task, config and seed give the same outcome, times apart, whatever ran in this process before.
    """

    def __init__(
        self,
        task: Task,
        config: Mapping[str, Any],
        seed: int,
        device: str = "cpu",
        *,
        splits: Mapping[str, Split] | None = None,
    ) -> None:
        check_device(device)
        self.task = task
        self.config: dict[str, Any] = dict(config)
        self.seed = seed
        self.device = device
        self.done = False
        self._epoch = 0
        self._spent_s = 0.0
        self._stop_reason = ""
        self._said: dict[str, Any] = {}
        self._outcome: dict[str, Any] | None = None
        self._trainer: SCMTrainer | None = None
        with self._guarded():
            self._build(splits)

    @property
    def model(self) -> nn.Module | None:
        """The model with its weights of now; None where the trial failed before it had one."""
        return None if self._trainer is None else self._trainer.model

    def step(self) -> dict[str, Any]:
        """Train one epoch and say how it went, as numbers.

        Keys are `HISTORY_KEYS`, the task's own `metric.<name>`, and `telemetry.<name>` of what the config
        turns on. `epoch` counts from 1. Empty when the trial ended without finishing the epoch.
        `step_time_ms` is the median step so far, `nan_count` all non-finite values met so far. Raises
        RuntimeError when the trial is done.
        """
        if self.done:
            raise RuntimeError("step() must not be called on a trial that is done")
        before = self._epoch
        with self._guarded():
            self._train_epoch()
        return dict(self._said) if self._epoch > before else {}

    def stop(self, reason: str) -> None:
        """End the trial before its last epoch; its status becomes "stopped" with this reason."""
        if not self.done:
            self._stop_reason = reason
            self.done = True

    def outcome(self) -> dict[str, Any]:
        """Say how the trial ended, or would end if it were stopped now: status, counts, times, metrics.

        Keys, units and meanings are those of a run's rows, `telemetry.<name>` included; metrics are those of
        the val split, and with the prefix `test_` those of the test split. NaN where nothing was measured.
        """
        if self._outcome is not None:
            return dict(self._outcome)
        outcome: dict[str, Any] = {}
        with self._guarded():
            outcome = self._measure_outcome()
        if self._outcome is not None:  # measuring it failed, and this is what that trial has to say
            return dict(self._outcome)
        if self.done:
            self._outcome = outcome
        return dict(outcome)

    def save(self, folder: Path) -> None:
        """Write everything that `load` needs to go on bit for bit (on the CPU) into `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        if self._trainer is not None:
            self._trainer.save_checkpoint(folder / "trainer.pt")
        state = {name: getattr(self, attribute) for name, attribute in _SAVED.items()}
        (folder / "trial.json").write_text(json.dumps(state), encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Go on from where a trial of the same config and seed was saved; ValueError for another's."""
        state = json.loads((folder / "trial.json").read_text(encoding="utf-8"))
        for name in ("config", "seed"):
            if state[name] != json.loads(json.dumps(getattr(self, name))):
                raise ValueError(
                    f"a trial must be loaded with its own {name}, got that of another in {folder}"
                )
        if self._trainer is None:  # the trial failed at its start, here and now, and stays so
            return
        if (folder / "trainer.pt").is_file():  # a trial that failed at its start has none
            self._trainer.load_checkpoint(folder / "trainer.pt")
            self._epochs = self._trainer.epochs()
        for name, attribute in _SAVED.items():
            setattr(self, attribute, state[name])

    def _build(self, splits: Mapping[str, Split] | None) -> None:
        self.config = resolve_config(self.config)
        self._settings = TrialConfig.from_flat(self.config)
        self._splits = make_splits(self.task, self.seed) if splits is None else splits
        trainer = make_task_trainer(
            self.task,
            self._settings,
            self.seed,
            self._splits["train"],
            self._splits["val"],
            device=self.device,
        )
        self._trainer, self._epochs = trainer, trainer.epochs()

    def _train_epoch(self) -> None:
        assert self._trainer is not None
        report = next(self._epochs)
        metrics, coverage = self._score("val", self._decode("val"))
        epoch = report.epoch + 1
        self._said = {
            "epoch": epoch,
            "loss": report.train["loss"],
            "val_loss": NAN if report.val is None else report.val["val_loss"],
            "coverage": coverage,
            **metrics,
            "nan_count": sum(report.nan_counts.values()),
            "lr": report.train["lr"],
            "step_time_ms": self._trainer.step_time_ms,
            **self._telemetry(),
        }
        self._epoch = epoch
        self.done = report.status != "running"

    def _decode(self, name: str) -> Decoded:
        """Decode a split at tau_infer."""
        assert self._trainer is not None
        return decode_split(self._trainer.model, self._splits[name], tau_infer=self._settings.tau_infer)

    def _curve(self) -> dict[str, Any]:
        """Return the curve of error against coverage on the validation split, as columns."""
        assert self._trainer is not None
        model, split = self._trainer.model, self._splits["val"]
        tau = smallest_tau(next(model.parameters()).dtype)
        many = Decoded(
            *(item[None] for item in decode_split(model, split, tau_infer=tau) if item is not None)
        )
        return curve_columns(risk_points(self.task, split, [self._settings], many)[0])

    def _score(self, name: str, decoded: Decoded) -> tuple[dict[str, float], float]:
        """Return the metrics of decoded answers by column name, and their coverage."""
        metrics = self.task.metrics(decoded, self._splits[name], self._settings)
        return metric_columns(metrics, self.task.name), 1.0 - float(decoded.bottom.to(torch.float64).mean())

    def _score_abstaining(self, name: str, decoded: Decoded) -> float:
        """Return the charged_error of a model that abstains everywhere; NaN where the task cannot say it."""
        try:
            metrics, _ = self._score(name, abstaining(decoded))
        except (Exception, SystemExit):  # of a trial that did answer, nothing is lost by not knowing
            return NAN
        return metrics["charged_error"]

    def _telemetry(self) -> dict[str, float]:
        assert self._trainer is not None
        return {f"{TELEMETRY_PREFIX}{name}": value for name, value in self._trainer.telemetry().items()}

    def _measure_outcome(self) -> dict[str, Any]:
        assert self._trainer is not None
        outcome = self._counts()
        for name, prefix in (("val", ""), ("test", "test_")):
            decoded = self._decode(name)
            metrics, coverage = self._score(name, decoded)
            outcome[f"{prefix}coverage"] = coverage
            outcome |= {f"{prefix}{key}": value for key, value in metrics.items()}
            outcome[f"{prefix}trivial_error"] = self._score_abstaining(name, decoded)
        outcome |= self._curve()
        status, reason = self._trainer.status, self._trainer.stop_reason
        if status == "running":
            status, reason = "stopped", self._stop_reason
        told = {"status": status, "stop_reason": reason, "duration_s": self._spent_s}
        return outcome | self._telemetry() | told

    def _counts(self) -> dict[str, Any]:
        """Give an outcome with what is known without decoding: counts, losses, times, sizes."""
        outcome = empty_outcome(self.config)
        if self._trainer is None:
            return outcome
        kinds = {f"nan_{kind}": count for kind, count in self._trainer.nan_counts.items()}
        return outcome | {
            **kinds,
            "nan_count": sum(kinds.values()),
            "step_time_ms": self._trainer.step_time_ms,
            "loss": self._said.get("loss", NAN),
            "val_loss": self._said.get("val_loss", NAN),
            "epochs": self._epoch,
            "parameters": sum(parameter.numel() for parameter in self._trainer.model.parameters()),
            "nan_origin": self._trainer.nan_origin,
        }

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Make whatever is raised inside the trial's outcome, and count the time."""
        started = time.perf_counter()
        try:
            yield
        except (Exception, SystemExit) as error:  # what a task or a training raises is a row with its message
            self._outcome = self._counts() | {
                "status": "failed",
                "error": error_line(error),
                "duration_s": self._spent_s + time.perf_counter() - started,
            }
            self.done = True
        finally:
            self._spent_s += time.perf_counter() - started


def empty_outcome(config: Mapping[str, Any]) -> dict[str, Any]:
    """Give every key of an outcome, with NaN, 0 or "" where nothing is known yet."""
    measured = ("coverage", *STANDARD_METRICS, "trivial_error")
    target = config.get("target_coverage")
    return {
        "status": "failed",
        "stop_reason": "",
        "nan_origin": "",
        "error": "",
        "epochs": 0,
        "parameters": 0,
        "nan_count": 0,
        **{f"nan_{kind}": 0 for kind in _NAN_KINDS},
        "step_time_ms": NAN,
        "duration_s": 0.0,
        "loss": NAN,
        "val_loss": NAN,
        "target_coverage": float(target) if isinstance(target, (int, float)) else NAN,
        **dict.fromkeys(measured, NAN),
        **{f"test_{name}": NAN for name in measured},
        **empty_curve(),
    }
