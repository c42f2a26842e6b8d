"""zeroproofml as the laws of `harness.robustness` see a library: the adapter that points them at the peer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import zeroproofml.losses as losses
from torch import Tensor
from zeroproofml.inference import InferenceConfig, strict_inference, strict_inference_numpy
from zeroproofml.metrics import tau_infer_sweep_from_q_abs
from zeroproofml.training.targets import lift_semantic_targets, lift_targets

from scm.training.targets import STATUSES
from trainables.subject import LibrarySubject

# Of a loss that is documented as bounded by 2, whatever its rounding.
DOCUMENTED_BOUND = 2.0


def peer_subject() -> LibrarySubject:
    """The parts of zeroproofml that have a counterpart here, on the CPU, in single and double precision."""
    return LibrarySubject(
        name="zeroproofml",
        dtypes=(torch.float32, torch.float64),
        fit_loss=losses.implicit_loss,
        implicit_loss=lambda P, Q, Y_n, Y_d, gamma, detach_scale: losses.implicit_loss(
            P, Q, Y_n, Y_d, gamma, detach_scale=detach_scale
        ),
        implicit_bound=DOCUMENTED_BOUND,
        margin_loss=lambda Q, tau, mask, reduction: losses.margin_loss(Q, tau, mask, reduction=reduction),
        sign_loss=losses.sign_consistency_loss,
        soft_coverage_loss=losses.soft_coverage_loss,
        separation_losses=lambda Q, mask: losses.scm_separation_losses(Q, mask_censored=mask),
        coverage=lambda bottom: losses.coverage(bottom, bottom),
        rejection_loss=losses.rejection_loss,
        decode=_decode,
        answer=_decode,
        sweep=_sweep,
        lift=lift_targets,
        lift_words=lift_semantic_targets,
        statuses=STATUSES,
    )


def _decode(P: Any, Q: Any, tau_infer: float, tau_train: float | None = None) -> SimpleNamespace:
    config = InferenceConfig(tau_infer=tau_infer, tau_train=tau_train)
    infer = strict_inference_numpy if isinstance(P, np.ndarray) else strict_inference
    decoded, bottom, gap = infer(P, Q, config=config)[:3]
    small = (Q == 0) | (
        abs(Q) < (torch.tensor(tau_infer, dtype=Q.dtype) if isinstance(Q, Tensor) else tau_infer)
    )
    with np.errstate(all="ignore"):
        finite = _is_finite(P) & _is_finite(Q) & (_is_finite(P / Q) | small)
    return SimpleNamespace(
        decoded=decoded,
        bottom_mask=bottom,
        gap_mask=gap,
        # It says that a row is bottom, and not why: split as its own documents describe the two.
        fault_mask=bottom & ~finite,
        semantic_bottom_mask=bottom & small,
    )


def _is_finite(x: Any) -> Any:
    return x.isfinite() if isinstance(x, Tensor) else np.isfinite(x)


def _sweep(q_abs: Any, in_range: Any, taus: Any) -> Any:
    found = tau_infer_sweep_from_q_abs(q_abs, is_in_range=in_range, taus=taus)
    return {name: list(found[name]) for name in ("fn_in", "fp_cens", "bottom_rate")}
