"""Strict decoding: which projective tuples have a value, and which are bottom, and why.

A tuple is bottom when |Q| < tau_infer, or when P, Q or the quotient is not finite. How tau_infer is chosen
is decided in `scm.inference.calibration`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from scm.layers.capability import check_tau_infer

PROVENANCE_FINITE, PROVENANCE_FAULT, PROVENANCE_SEMANTIC, PROVENANCE_MIXED = 0, 1, 2, 3

_PROVENANCE_MODES = ("off", "experimental")
_PROVENANCE_REPRESENTATIONS = ("split_masks", "bottom_provenance")


@dataclass(frozen=True)
class InferenceConfig:
    """Thresholds of strict decoding, in units of |Q|; valid once built.

    tau_infer must be finite and > 0. tau_train, where given, must be finite and >= tau_infer: accepted
    tuples with |Q| below it are flagged as the gap. `numerical_hazard_threshold` (also under its older name
    `provenance_fault_threshold`) flags accepted tuples with |Q| below it. The two provenance fields are
    checked and otherwise without effect: every result carries the split masks and the codes.
    """

    tau_infer: float = 1e-6
    tau_train: float | None = None
    provenance: Literal["off", "experimental"] | str = "off"
    provenance_fault_threshold: float | None = None
    provenance_representation: Literal["split_masks", "bottom_provenance"] | str = "split_masks"
    numerical_hazard_threshold: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "tau_infer", check_tau_infer(self.tau_infer))
        if self.tau_train is not None:
            tau_train = float(self.tau_train)
            if not (math.isfinite(tau_train) and tau_train >= self.tau_infer):
                raise ValueError(
                    f"tau_train must be finite and >= tau_infer={self.tau_infer}, got {self.tau_train=}"
                )
            object.__setattr__(self, "tau_train", tau_train)
        if self.provenance not in _PROVENANCE_MODES:
            raise ValueError(f"provenance must be one of {_PROVENANCE_MODES}, got {self.provenance!r}")
        if self.provenance_representation not in _PROVENANCE_REPRESENTATIONS:
            raise ValueError(
                f"provenance_representation must be one of {_PROVENANCE_REPRESENTATIONS}, "
                f"got {self.provenance_representation!r}"
            )
        self._agree_on_hazard()

    def _agree_on_hazard(self) -> None:
        old, new = self.provenance_fault_threshold, self.numerical_hazard_threshold
        if old is not None and new is not None and old != new:
            raise ValueError(
                "numerical_hazard_threshold and its older name provenance_fault_threshold must agree, "
                f"got {new} and {old}"
            )
        hazard = old if new is None else new
        if hazard is None:
            return
        if not (math.isfinite(hazard) and hazard >= 0.0):
            raise ValueError(f"numerical_hazard_threshold must be finite and >= 0, got {hazard}")
        object.__setattr__(self, "numerical_hazard_threshold", float(hazard))
        object.__setattr__(self, "provenance_fault_threshold", float(hazard))


class InferenceResult(tuple[Any, Any, Any]):
    """What strict decoding found; unpacks as (decoded, bottom_mask, gap_mask), the rest are attributes.

    decoded            P/Q, NaN at bottoms; shape of P
    bottom_mask        fault or semantic; this and every mask below: bool, shape of Q
    gap_mask           accepted with |Q| < tau_train
    fault_mask         a non-finite P, Q, validity factor or quotient
    semantic_bottom_mask (also `semantic_mask`)  |Q| < tau_infer, or a validity factor below its threshold
    bottom_provenance  int64: 0 finite, 1 fault, 2 semantic, 3 both
    hazard_mask        accepted with |Q| < numerical_hazard_threshold
    """

    fault_mask: Any
    semantic_bottom_mask: Any
    bottom_provenance: Any
    hazard_mask: Any

    def __new__(
        cls,
        decoded: Any,
        bottom_mask: Any,
        gap_mask: Any,
        fault_mask: Any = None,
        semantic_bottom_mask: Any = None,
        bottom_provenance: Any = None,
        hazard_mask: Any = None,
    ) -> InferenceResult:
        self = super().__new__(cls, (decoded, bottom_mask, gap_mask))
        self.fault_mask = fault_mask
        self.semantic_bottom_mask = semantic_bottom_mask
        self.bottom_provenance = bottom_provenance
        self.hazard_mask = hazard_mask
        return self

    def __getnewargs__(self) -> tuple[Any, ...]:
        return self.fields()

    def __repr__(self) -> str:
        return (
            f"InferenceResult(decoded={self.decoded}, bottom_mask={self.bottom_mask}, "
            f"gap_mask={self.gap_mask}, bottom_provenance={self.bottom_provenance})"
        )

    @property
    def decoded(self) -> Any:
        """P/Q, NaN at bottoms."""
        return self[0]

    @property
    def bottom_mask(self) -> Any:
        """True where there is no value."""
        return self[1]

    @property
    def gap_mask(self) -> Any:
        """True where accepted with |Q| below tau_train."""
        return self[2]

    @property
    def semantic_mask(self) -> Any:
        """The same as `semantic_bottom_mask`."""
        return self.semantic_bottom_mask

    def fields(self) -> tuple[Any, ...]:
        """All seven parts, in the order of the constructor."""
        return (
            *self,
            self.fault_mask,
            self.semantic_bottom_mask,
            self.bottom_provenance,
            self.hazard_mask,
        )


def strict_inference(
    numerator: Any,
    denominator: Any,
    config: InferenceConfig | None = None,
    *,
    experimental_provenance: bool | None = None,
    validity_factors: Any | None = None,
    validity_taus: float | Sequence[float] = 1e-6,
) -> InferenceResult:
    """Decode (P, Q) to P/Q where |Q| >= tau_infer and everything is finite, and to NaN with a mask elsewhere.

    P and Q are both torch tensors or both NumPy arrays and the result is of the same kind; P has the shape of
    Q, or trailing dimensions more (one denominator for a vector of numerators: one bad entry makes the whole
    vector bottom). tau_infer is rounded to Q's dtype, and |Q| equal to it is accepted. `validity_factors` are
    further denominators (an array or a sequence of arrays, shaped as Q) that gate in the same way, with a
    threshold each. Gradients through `decoded` are 0 at bottoms, never NaN.

    TypeError for other kinds of arguments; ValueError for shapes that do not fit and for a threshold that
    rounds to 0 or infinity in Q's dtype. `experimental_provenance` is taken for the sake of older callers:
    provenance is always part of the result.
    """
    config = InferenceConfig() if config is None else config
    factors = _as_sequence(validity_factors)
    given = (numerator, denominator, *factors)
    if all(isinstance(item, Tensor) for item in given):
        return _decode(numerator, denominator, config, factors, validity_taus)
    if all(isinstance(item, np.ndarray) for item in given):
        return strict_inference_numpy(
            numerator, denominator, config, validity_factors=validity_factors, validity_taus=validity_taus
        )
    kinds = ", ".join(type(item).__name__ for item in given)
    raise TypeError(f"P, Q and validity factors must all be torch.Tensor or all numpy.ndarray, got {kinds}")


def strict_inference_numpy(
    numerator: np.ndarray,
    denominator: np.ndarray,
    config: InferenceConfig | None = None,
    *,
    experimental_provenance: bool | None = None,
    validity_factors: Any | None = None,
    validity_taus: float | Sequence[float] = 1e-6,
) -> InferenceResult:
    """`strict_inference` of NumPy arrays, by the same code as for tensors, so the two cannot disagree."""
    tensors = [tensor_of(item) for item in (numerator, denominator, *_as_sequence(validity_factors))]
    config = InferenceConfig() if config is None else config
    result = _decode(tensors[0], tensors[1], config, tensors[2:], validity_taus)
    return InferenceResult(*(part.numpy() for part in result.fields()))


@lru_cache(maxsize=64)
def threshold_in(tau: float, dtype: torch.dtype) -> float:
    """`tau` as strict decoding uses it on denominators of `dtype`: rounded to the nearest number there.

    ValueError where that is 0 (the gate could not tell the boundary from an exact zero) or infinite.
    """
    real = torch.empty(0, dtype=dtype).abs().dtype
    rounded = float(torch.tensor(tau, dtype=real))
    if rounded == 0.0:
        smallest = torch.finfo(real).smallest_normal
        raise ValueError(
            f"tau must not round to 0 in {real}, got {tau=}; use tau >= {smallest} or a wider dtype for Q"
        )
    if not math.isfinite(rounded):
        raise ValueError(f"tau must not exceed {torch.finfo(real).max} in {real}, got {tau=}")
    return rounded


def _decode(
    numerator: Tensor,
    denominator: Tensor,
    config: InferenceConfig,
    factors: Sequence[Tensor],
    validity_taus: float | Sequence[float],
) -> InferenceResult:
    P, Q = _matched(as_inexact(numerator), as_inexact(denominator))
    magnitude = Q.abs()
    fault = ~_reduce_all(torch.isfinite(P), Q.ndim) | ~torch.isfinite(Q)
    semantic = (Q == 0) | (magnitude < threshold_in(config.tau_infer, Q.dtype))
    for factor, tau in zip(factors, _taus_for(factors, validity_taus), strict=True):
        V = _factor_like(as_inexact(factor), Q)
        fault = fault | ~torch.isfinite(V)
        semantic = semantic | (V == 0) | (V.abs() < threshold_in(tau, V.dtype))

    fault = fault | (~semantic & ~_reduce_all(torch.isfinite(P.detach() / _under(Q.detach(), P)), Q.ndim))
    bottom = fault | semantic
    # Dividing 0 by 1 where the answer is thrown away keeps the division's gradient finite there.
    quotient = torch.where(_under(bottom, P), torch.zeros_like(P), P) / _under(
        torch.where(bottom, torch.ones_like(Q), Q), P
    )
    decoded = torch.where(_under(bottom, P), torch.full_like(quotient, math.nan), quotient)

    return InferenceResult(
        decoded,
        bottom,
        ~bottom & _below(magnitude, config.tau_train),
        fault,
        semantic,
        fault.to(torch.int64) * PROVENANCE_FAULT + semantic.to(torch.int64) * PROVENANCE_SEMANTIC,
        ~bottom & _below(magnitude, config.numerical_hazard_threshold),
    )


def _as_sequence(factors: Any | None) -> Sequence[Any]:
    if factors is None:
        return ()
    return tuple(factors) if isinstance(factors, (list, tuple)) else (factors,)


def tensor_of(array: np.ndarray) -> Tensor:
    """A copy of `array` as a tensor."""
    # A copy: torch warns about read-only arrays and cannot take negative strides or foreign byte order.
    native = np.array(array, dtype=array.dtype.newbyteorder("="), order="C")
    return torch.from_numpy(native)


def as_inexact(x: Tensor) -> Tensor:
    """`x`, integers and bools as the default floating-point dtype."""
    return x if x.is_floating_point() or x.is_complex() else x.to(torch.get_default_dtype())


def _matched(P: Tensor, Q: Tensor) -> tuple[Tensor, Tensor]:
    """P and Q broadcast so that P's leading dimensions are exactly Q's."""
    rule = (
        f"P must have the shape of Q, or trailing dimensions more, got {tuple(P.shape)} and {tuple(Q.shape)}"
    )
    if P.ndim < Q.ndim:
        raise ValueError(rule)
    try:
        # torch's own would import sympy on its first call, a quarter of a second
        leading = np.broadcast_shapes(P.shape[: Q.ndim], Q.shape)
    except ValueError as error:
        raise ValueError(rule) from error
    return P.expand(*leading, *P.shape[Q.ndim :]), Q.expand(leading)


def _reduce_all(mask: Tensor, rank: int) -> Tensor:
    return mask.flatten(start_dim=rank).all(dim=-1) if mask.ndim > rank else mask


def _under(x: Tensor, P: Tensor) -> Tensor:
    """`x`, shaped as Q, with the trailing dimensions that P has more."""
    return x.reshape(*x.shape, *(1,) * (P.ndim - x.ndim))


def _taus_for(factors: Sequence[Tensor], taus: float | Sequence[float]) -> list[float]:
    values = list(taus) if isinstance(taus, (list, tuple)) else [taus] * len(factors)
    if len(values) != len(factors):
        raise ValueError(
            f"validity_taus must be one number or one per validity factor ({len(factors)}), got {taus!r}"
        )
    return [check_tau_infer(tau) for tau in values]


def _factor_like(V: Tensor, Q: Tensor) -> Tensor:
    if V.ndim == Q.ndim + 1 and V.shape[-1] == 1:
        V = V.squeeze(-1)
    if V.ndim > Q.ndim:
        raise ValueError(
            f"a validity factor must have the shape of Q, got {tuple(V.shape)}, {tuple(Q.shape)}"
        )
    try:
        return V.expand(Q.shape)
    except RuntimeError as error:
        raise ValueError(
            f"a validity factor must have the shape of Q, got {tuple(V.shape)} and {tuple(Q.shape)}"
        ) from error


def _below(magnitude: Tensor, tau: float | None) -> Tensor:
    if tau is None:
        return torch.zeros_like(magnitude, dtype=torch.bool)
    return magnitude < torch.tensor(tau, dtype=magnitude.dtype)
