"""Decoding patterns above strict inference: bottoms that mean "out of range", with a direction."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from scm.inference.strict import PROVENANCE_FAULT, PROVENANCE_SEMANTIC, InferenceConfig, strict_inference

CLASS_BELOW, CLASS_IN_RANGE, CLASS_ABOVE = 0, 1, 2


class SemanticDecodeResult(NamedTuple):
    """decoded: P/Q, NaN at bottoms; bottom_mask: bool; class_id: int64, 0 below, 1 in range, 2 above."""

    decoded: Tensor
    bottom_mask: Tensor
    class_id: Tensor


def decode_strict_censored_3way(
    numerator: Tensor,
    denominator: Tensor,
    tau_infer: float,
    *,
    direction_logits: Tensor | None = None,
    orientation_signal: Tensor | None = None,
    fault_mask: Tensor | None = None,
    semantic_bottom_mask: Tensor | None = None,
    bottom_provenance: Tensor | None = None,
) -> SemanticDecodeResult:
    """Decode tuples and say of each whether its value is below, in or above the range; P and Q share a shape.

    Accepted tuples are in range. A semantic bottom points where the sign of P points, zero counting as
    above; `orientation_signal` (shape of P; < 0 below, > 0 above, 0 in range) replaces that sign and is also
    followed at faults; `direction_logits` (shape (*P.shape, 2), [below, above]) decides at semantic bottoms
    before both. Faults without a signal are class 1, "nothing known", with bottom_mask set.

    Masks or provenance codes of an earlier decoding (for instance with validity factors) are added to what is
    found here. Unlike zeroproofml 0.6.1 a quotient that overflows is a bottom, a mask that is passed in also
    reaches `bottom_mask` and `decoded`, and direction logits, which an input that broke the tuple broke as
    well, have no say at faults.
    """
    if numerator.shape != denominator.shape:
        raise ValueError(
            f"P and Q must have one shape, got {tuple(numerator.shape)} and {tuple(denominator.shape)}"
        )
    strict = strict_inference(numerator, denominator, InferenceConfig(tau_infer=tau_infer))
    fault, semantic = strict.fault_mask, strict.semantic_bottom_mask
    if bottom_provenance is not None:
        codes = _shaped("bottom_provenance", bottom_provenance, numerator)
        fault = fault | (codes & PROVENANCE_FAULT).bool()
        semantic = semantic | (codes & PROVENANCE_SEMANTIC).bool()
    if fault_mask is not None:
        fault = fault | _shaped("fault_mask", fault_mask, numerator).bool()
    if semantic_bottom_mask is not None:
        semantic = semantic | _shaped("semantic_bottom_mask", semantic_bottom_mask, numerator).bool()
    bottom = fault | semantic

    in_range = torch.full_like(bottom, CLASS_IN_RANGE, dtype=torch.int64)
    class_id = torch.where(semantic & ~fault, _class_of_sign(numerator), in_range)
    if orientation_signal is not None:
        signal = _shaped("orientation_signal", orientation_signal, numerator)
        class_id = torch.where(bottom, _class_of_signal(signal), in_range)
    if direction_logits is not None:
        class_id = torch.where(semantic, _class_of_logits(direction_logits, numerator), class_id)
    decoded = torch.where(bottom, torch.full_like(strict.decoded, torch.nan), strict.decoded)
    return SemanticDecodeResult(decoded, bottom, class_id)


def _class_of_sign(P: Tensor) -> Tensor:
    return torch.where(P >= 0, CLASS_ABOVE, CLASS_BELOW)


def _class_of_signal(signal: Tensor) -> Tensor:
    return CLASS_IN_RANGE + (signal > 0).to(torch.int64) - (signal < 0).to(torch.int64)


def _class_of_logits(logits: Tensor, P: Tensor) -> Tensor:
    if tuple(logits.shape) != (*P.shape, 2):
        raise ValueError(f"direction_logits must have shape {(*P.shape, 2)}, got {tuple(logits.shape)}")
    return torch.where(logits.argmax(dim=-1) == 1, CLASS_ABOVE, CLASS_BELOW)


def _shaped(name: str, given: Tensor, P: Tensor) -> Tensor:
    if given.shape != P.shape:
        raise ValueError(f"{name} must have the shape of P {tuple(P.shape)}, got {tuple(given.shape)}")
    return given
