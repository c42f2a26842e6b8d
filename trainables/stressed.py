"""A trained model as laws see it: its answers to any rows, and what its loss and task make of any answers.

Nothing here decides what must hold; that is `harness.robustness.model_laws`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from scm.data import Split
from scm.inference.strict import InferenceConfig, strict_inference, threshold_in
from scm.training.feed import Feeder, LossCall
from scm.training.objective import as_trainer_loss
from scm.training.targets import STATUS_CODES, lift_semantic_targets
from scm.trial import Decoded, decode_split, make_training_loss
from trainables.tasks.protocol import check_metrics
from trainables.trained import Trained
from trainables.trial import make_splits

OwnDecode = Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]
TRAINED_STATUSES: tuple[str, ...] = ("finite", "bottom", "censored_below", "censored_above")
PRECISIONS: Mapping[str, torch.dtype] = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}
_EDGE_ROWS = 16
_BISECTIONS = 60
_MOST_ROWS = 2048  # rows of a split that are looked through


class Answer(NamedTuple):
    """What a model says of rows: P and Q as it gave them, P/Q (NaN at bottoms), and which are bottom."""

    P: Tensor
    Q: Tensor
    decoded: Tensor
    bottom: Tensor


class LossSaid(NamedTuple):
    """A loss, and the gradients of what it was asked about."""

    value: float
    gradients: tuple[Tensor, ...]


class StressedModel:
    """A trained model under stress; everything that it is asked leaves it as it was.

    tau_infer is that of its config, in the model's dtype. `own_decode` is the task's method of that name,
    None where it has none.
    """

    def __init__(self, trained: Trained) -> None:
        self.trained = trained
        self.task = trained.task
        self.config = trained.settings
        self.splits = trained.splits
        self.model = trained.model.eval()
        weight = next(self.model.parameters())
        self.dtype, self.device = weight.dtype, weight.device
        self.tau_infer = threshold_in(self.config.tau_infer, self.dtype)
        self._strict = InferenceConfig(tau_infer=self.config.tau_infer)
        self._in_precision: dict[str, nn.Module] = {}
        self._held: dict[str, Any] = {}

    # --- what it answers ----------------------------------------------------------------------------

    def tuples(self, inputs: Tensor, model: nn.Module | None = None) -> tuple[Tensor, Tensor]:
        """P and Q of rows, on the CPU."""
        asked = self.model if model is None else model
        weight = next(asked.parameters())
        if inputs.is_floating_point():
            inputs = inputs.to(weight.dtype)
        with torch.no_grad():
            P, Q = asked(inputs.to(weight.device))[:2]
        return P.cpu(), Q.cpu()

    def answer(self, inputs: Tensor) -> Answer:
        """What the model says of rows, decoded strictly at tau_infer."""
        P, Q = self.tuples(inputs)
        return Answer(P, Q, *self.decode(P, Q))

    def decode(self, P: Tensor, Q: Tensor, tau: float | None = None) -> tuple[Tensor, Tensor]:
        """P/Q and which of them are bottom, by strict decoding."""
        strict = self._strict if tau is None else InferenceConfig(tau_infer=tau)
        result = strict_inference(P, Q, strict)
        return result.decoded, result.bottom_mask

    @property
    def own_decode(self) -> OwnDecode | None:
        """The task's own decode(P, Q, tau_infer) -> (answers, accepted)."""
        found = getattr(self.task, "decode", None)
        return found if callable(found) else None

    def answer_in(self, precision: str, inputs: Tensor) -> Answer:
        """What the model says when it runs in another precision; whatever torch raises where it cannot."""
        if precision not in self._in_precision:
            self._in_precision[precision] = copy.deepcopy(self.model).to(PRECISIONS[precision]).eval()
        P, Q = self.tuples(inputs, self._in_precision[precision])
        tau = max(self.config.tau_infer, float(torch.finfo(Q.dtype).smallest_normal))
        return Answer(P, Q, *self.decode(P, Q, tau))

    # --- where its data lie ----------------------------------------------------------------------------

    @property
    def is_float(self) -> bool:
        """Whether rows can be moved a little; others (labels, colours) can only be taken as they are."""
        return self.splits["train"].inputs.is_floating_point()

    @cached_property
    def rows(self) -> Tensor:
        """Training rows, at most 2,048."""
        return self.splits["train"].inputs[:_MOST_ROWS]

    @cached_property
    def ranges(self) -> tuple[Tensor, Tensor]:
        """The least and the largest of each input in training, as flat columns."""
        flat = self.splits["train"].inputs.flatten(1)
        return flat.amin(0), flat.amax(0)

    @cached_property
    def edge_rows(self) -> Tensor:
        """Rows at the threshold: between a row that is answered and one that is not, by bisection.

        Where the model answers everything or nothing, the rows whose |Q| is nearest to the threshold.
        """
        if not self.is_float:
            return self.rows[:_EDGE_ROWS]
        answered = self.answer(self.rows)
        bottom = answered.bottom.flatten(1).any(1) if answered.bottom.ndim > 1 else answered.bottom
        good, bad = self.rows[~bottom], self.rows[bottom]
        if not len(good) or not len(bad):
            q_abs = answered.Q.abs().flatten(1).amin(1) if answered.Q.ndim > 1 else answered.Q.abs()
            near = (q_abs.nan_to_num(nan=math.inf) - self.tau_infer).abs().argsort()
            return self.rows[near[:_EDGE_ROWS]]
        count = min(_EDGE_ROWS, len(good), len(bad))
        low, high = good[:count].to(self.dtype), bad[:count].to(self.dtype)
        for _ in range(_BISECTIONS):
            middle = low + (high - low) / 2
            found = self.answer(middle).bottom
            is_bottom = (found.flatten(1).any(1) if found.ndim > 1 else found).reshape(
                -1, *[1] * (middle.ndim - 1)
            )
            low, high = torch.where(is_bottom, low, middle), torch.where(is_bottom, middle, high)
        return torch.cat([low, high])

    @cached_property
    def largest_target(self) -> float:
        """The largest number among the training targets, as the loss sees them; 1 where there is none."""
        targets = self.splits["train"].targets
        values = targets.Y_n[targets.mask_finite].abs()
        return max(1.0, float(values.max())) if values.numel() else 1.0

    @cached_property
    def target_shape(self) -> tuple[int, ...]:
        """The shape of one row's targets."""
        return tuple(self.splits["train"].targets.Y_n.shape[1:])

    # --- its loss -----------------------------------------------------------------------------------

    @cached_property
    def _loss(self) -> LossCall:
        made = self.task.make_loss(self.config)
        return LossCall(as_trainer_loss(make_training_loss(self.config) if made is None else made))

    def loss_of_tuples(self, inputs: Tensor, P: Tensor, Q: Tensor, value: Tensor, status: Tensor) -> LossSaid:
        """The training loss of answers (P, Q) to rows, and its gradients with respect to both.

        value, status: of the targets, in the units of the loss, codes of `STATUS_CODES`.
        """
        held = [item.to(self.dtype).to(self.device).requires_grad_() for item in (P, Q)]
        if inputs.is_floating_point():
            inputs = inputs.to(self.dtype)
        with torch.no_grad():
            others = tuple(self.model(inputs.to(self.device))[2:])
        lifted = lift_semantic_targets(value.to(self.dtype), status)
        fed = Feeder(self._loss, self.device, unreachable=False).prepare((inputs, lifted))
        assert fed is not None
        known = {
            "epoch": 0,
            "global_step": 0,
            "loss_weights": None,
            "tau": 0.5 * (self.config.tau_train_min + self.config.tau_train_max),
        }
        said = self._loss((*held, *others), fed, known)
        total = said if isinstance(said, Tensor) else said.total()
        if not total.requires_grad:
            return LossSaid(float(total), tuple(torch.zeros_like(item) for item in held))
        grads = torch.autograd.grad(total, held, allow_unused=True)
        return LossSaid(
            float(total.detach()),
            tuple(
                torch.zeros_like(item) if grad is None else grad.cpu()
                for grad, item in zip(grads, held, strict=True)
            ),
        )

    # --- its task -----------------------------------------------------------------------------------

    def metrics(self, decoded: Tensor, bottom: Tensor, numerator: Tensor, rows: Tensor) -> dict[str, float]:
        """What the task makes of answers to these rows (indices) of its val split."""
        split = rows_of(self.splits["val"], rows)
        nan = torch.full_like(decoded, math.nan)
        wide = bottom.reshape(*bottom.shape, *[1] * (decoded.ndim - bottom.ndim))
        q_abs = torch.where(bottom, 0.0, 1.0).to(decoded.dtype)
        told = Decoded(torch.where(wide, nan, decoded), bottom, torch.zeros_like(bottom), q_abs, numerator)
        found = self.task.metrics(told, split, self.config)
        check_metrics(found, self.task.name)
        return found

    @cached_property
    def val_answer(self) -> Decoded:
        """The model's answers on its val split."""
        return decode_split(self.model, self.splits["val"], tau_infer=self.config.tau_infer)

    @property
    def finite_of_val(self) -> Tensor:
        """Which targets of the val split are finite, in the shape of the targets."""
        return self.splits["val"].targets.mask_finite

    @cached_property
    def val_truth(self) -> Tensor:
        """The targets of the val split as answers, in its dtype; NaN where they are not finite."""
        targets = self.splits["val"].targets
        quotient = (targets.Y_n / targets.Y_d).to(self.val_answer.decoded.dtype)
        return torch.where(targets.mask_finite, quotient, math.nan)

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """What `make` gave when it was first asked for under this name."""
        if name not in self._held:
            self._held[name] = make()
        return self._held[name]

    def splits_again(self) -> Mapping[str, Split]:
        """The splits of the same seed, asked of the task once more."""
        return make_splits(self.task, self.trained.seed)


def rows_of(split: Split, rows: Tensor) -> Split:
    """Some rows of a split, in this order."""
    extras = {name: extra[rows] for name, extra in split.extras.items()}
    return Split(split.inputs[rows], split.targets.index(rows), extras)


def code_of(status: str) -> int:
    """The code of a status in words."""
    return STATUS_CODES[status]


def row_bytes(split: Split, *, targets: bool = True) -> list[bytes]:
    """Each row as bytes, equal for equal inputs (and targets): what says that two splits share a row."""
    parts: list[Any] = [split.inputs.flatten(1)]
    if targets:
        held = split.targets
        parts += [item.reshape(len(split), -1) for item in (held.Y_n, held.Y_d, held.bottom_kind)]
    raw = [
        part.detach().cpu().contiguous().view(torch.uint8).reshape(len(split), -1).numpy() for part in parts
    ]
    return [b"|".join(part[row].tobytes() for part in raw) for row in range(len(split))]
