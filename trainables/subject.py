"""A library as what laws are about: its losses, decoder, targets, layers and policies under fixed names.

The laws of `harness.robustness` see these attributes and nothing else, so that another library can stand in
our library's place. What a library has not is None, and the laws that need it do not apply to it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from scm.autodiff.policies import GradientPolicy, apply_policy, gradient_policy
from scm.autodiff.projective import ProjectiveNormalize
from scm.inference.strict import InferenceConfig, strict_inference
from scm.layers.angular_projective import AngularProjectiveHead
from scm.layers.normalization import SCMNorm, SCMSoftmax
from scm.layers.projective_rational import ProjectiveRationalMultiHead
from scm.layers.scm_rational import SCMRationalLayer
from scm.losses.coverage import coverage, ranked_coverage_loss, rejection_loss, soft_coverage_loss
from scm.losses.implicit import LARGEST, implicit_loss
from scm.losses.margin import margin_loss
from scm.losses.projective import projective_fit_loss
from scm.losses.separation import scm_separation_losses
from scm.losses.sign import sign_consistency_loss
from scm.losses.training import LossConfig, SCMTrainingLoss
from scm.metrics.tau_sweep import tau_infer_sweep_from_q_abs
from scm.training.targets import STATUSES, lift_semantic_targets, lift_targets

ALL_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

Loss = Callable[..., Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class LibrarySubject:
    """The parts of a library; losses are 0-d means over rows, masks are bool, a part that is None is absent.

    device: where tensors of cases are moved to. dtypes: in which the laws are tried.

    fit_loss(P, Q, Y_n, Y_d)               what a training fits with unless told otherwise
    masked_fit_loss(P, Q, Y_n, Y_d, mask)  the same over the rows of a mask
    implicit_loss(P, Q, Y_n, Y_d, gamma, detach_scale)
    implicit_bound                         what no row of it exceeds
    margin_loss(Q, tau, mask, reduction), sign_loss(P, Q, Y_n, Y_d, gamma, mask)
    soft_coverage_loss(Q, tau, temperature, target), ranked_coverage_loss(Q, tau, margin, target)
    separation_losses(Q, mask_censored)    push_down, push_up
    training_loss(P, Q, Y_n, Y_d, mask_finite)   the whole objective, every term in it
    coverage(bottom), rejection_loss(bottom, target)
    decode(P, Q, tau_infer, tau_train)     with decoded and bottom_, gap_, fault_ and semantic_bottom_mask
    answer(P, Q, tau_infer)                the same in the gauge that the library recommends for a threshold
    sweep(q_abs, in_range, taus)           lists fn_in, fp_cens, bottom_rate
    lift(values), lift_words(values, words), statuses
    rational_layer(numerator, denominator) a module: x to (y, bottom)
    multi_head(output_dim, numerator_degree, denominator_degree, q_param, q_min), angular_head(input_dim)
    norm(), softmax()                      modules: x to (y, bottom)
    apply_policy(gradient, is_bottom, word), policy(word, tau)   one of "clamp", "project", "reject", "pass"
    """

    name: str
    device: str = "cpu"
    dtypes: Sequence[torch.dtype] = ALL_DTYPES

    fit_loss: Loss | None = None
    masked_fit_loss: Loss | None = None
    implicit_loss: Loss | None = None
    implicit_bound: float | None = None
    margin_loss: Loss | None = None
    sign_loss: Loss | None = None
    soft_coverage_loss: Loss | None = None
    ranked_coverage_loss: Loss | None = None
    separation_losses: Callable[..., tuple[Tensor, Tensor]] | None = None
    training_loss: Loss | None = None
    coverage: Callable[[Tensor], Tensor] | None = None
    rejection_loss: Callable[[Tensor, float], Tensor] | None = None

    decode: Callable[..., Any] | None = None
    answer: Callable[..., Any] | None = None
    sweep: Callable[..., Mapping[str, Sequence[float]]] | None = None

    lift: Callable[[Any], tuple[Any, Any]] | None = None
    lift_words: Callable[[Any, Sequence[str]], Any] | None = None
    statuses: Sequence[str] | None = None

    rational_layer: Callable[[Tensor, Tensor], nn.Module] | None = None
    multi_head: Callable[..., nn.Module] | None = None
    angular_head: Callable[[int], nn.Module] | None = None
    norm: Callable[[], nn.Module] | None = None
    softmax: Callable[[], nn.Module] | None = None

    apply_policy: Callable[[float, bool, str], float] | None = None
    policy: Callable[[str, float], AbstractContextManager[Any]] | None = None


def own_subject(device: str = "cpu", dtypes: Sequence[torch.dtype] = ALL_DTYPES) -> LibrarySubject:
    """Our own library, `scm`, on a device that is there; RuntimeError where it is not."""
    torch.empty(0, device=device)
    return LibrarySubject(
        name="scm",
        device=device,
        dtypes=tuple(dtypes),
        fit_loss=projective_fit_loss,
        masked_fit_loss=lambda P, Q, Y_n, Y_d, mask: projective_fit_loss(P, Q, Y_n, Y_d, mask=mask),
        implicit_loss=lambda P, Q, Y_n, Y_d, gamma, detach_scale: implicit_loss(
            P, Q, Y_n, Y_d, gamma, detach_scale=detach_scale
        ),
        implicit_bound=LARGEST,
        margin_loss=lambda Q, tau, mask, reduction: margin_loss(Q, tau, mask, reduction=reduction),
        sign_loss=sign_consistency_loss,
        soft_coverage_loss=soft_coverage_loss,
        ranked_coverage_loss=ranked_coverage_loss,
        separation_losses=lambda Q, mask_censored: scm_separation_losses(Q, mask_censored=mask_censored),
        training_loss=_training_loss,
        coverage=lambda bottom: coverage(bottom, bottom),
        rejection_loss=rejection_loss,
        decode=_decode,
        answer=lambda P, Q, tau: _decode(*ProjectiveNormalize("unit_l2_projective")(P, Q), tau),
        sweep=tau_infer_sweep_from_q_abs,
        lift=lift_targets,
        lift_words=lift_semantic_targets,
        statuses=STATUSES,
        rational_layer=_rational_layer,
        multi_head=_multi_head,
        angular_head=AngularProjectiveHead,
        norm=SCMNorm,
        softmax=SCMSoftmax,
        apply_policy=lambda gradient, is_bottom, word: float(
            apply_policy(gradient, is_bottom, GradientPolicy(word))  # type: ignore[arg-type]
        ),
        policy=lambda word, tau: gradient_policy(GradientPolicy(word), tau=tau),
    )


def _training_loss(P: Tensor, Q: Tensor, Y_n: Tensor, Y_d: Tensor, mask_finite: Tensor) -> Tensor:
    config = LossConfig(coverage_term="soft", lambda_push_down=1.0, lambda_push_up=1.0)
    fit = projective_fit_loss(P, Q, Y_n, Y_d)
    return SCMTrainingLoss(config)(fit, P, Q, Y_n, Y_d, mask_finite=mask_finite)[0]


def _decode(P: Any, Q: Any, tau_infer: float, tau_train: float | None = None) -> Any:
    return strict_inference(P, Q, InferenceConfig(tau_infer=tau_infer, tau_train=tau_train))


def _rational_layer(numerator: Tensor, denominator: Tensor) -> nn.Module:
    layer = SCMRationalLayer(len(numerator) - 1, len(denominator) - 1)
    layer.numerator = nn.Parameter(numerator.clone())
    layer.denominator = nn.Parameter(denominator.clone())
    return layer


def _multi_head(
    output_dim: int, numerator_degree: int, denominator_degree: int, q_param: str, q_min: float
) -> nn.Module:
    return ProjectiveRationalMultiHead(
        output_dim, numerator_degree, denominator_degree, q_anchor="none", q_param=q_param, q_min=q_min
    )
