"""A rational function as a layer: coefficients of P and Q over one basis, Q anchored at 1.

Decided here: how the tuple (P, Q) comes out of coefficients, what keeps the coefficients small, and how far
from a pole an argument is. What a tuple is worth is decided in `scm.core.tags` and `scm.inference`, the basis
in `basis`, what follows from many tuples in `hybrid_rational`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from scm.autodiff.policies import is_transformed
from scm.core.tags import ALGEBRAIC, TagPolicy, TRTag, tags_of_tuples
from scm.layers.basis import BasisFunction, MonomialBasis, finite_columns
from scm.layers.capability import BottomCapability, denominator_capability

_COPRIME_POINTS = (-0.9, -0.3, 0.0, 0.3, 0.9)
_SLOPE_FLOOR = 1e-12


class RejectionPolicy(Protocol):
    """What a layer asks of the controller attached to it; `AdaptiveLambda` is one."""

    @property
    def lambda_rej(self) -> float | Tensor:
        """The penalty for answers that are not REAL."""
        ...

    def report(self, tags: Tensor) -> None:
        """Take the tags of one batch into account; must not wait for a device."""


class LocalScales(NamedTuple):
    """How large the terms of Q and of P may be, 0-d: what `TagPolicy.resolve_thresholds` asks for."""

    q: Tensor
    p: Tensor


@dataclass(frozen=True)
class LayerContract:
    """What the layer promises for arguments in the basis's domain whose |Q| is at least `q_floor`.

    B_k     |ψ_k| at most, over all columns
    H_k     |dψ_k/dx| at most
    y_max   |P/Q| at most
    G_max   |∂(P/Q)/∂w| at most, for every single coefficient w of P or Q
    H_max   |∂²(P/Q)/∂w∂w'| at most, for every two
    """

    B_k: float
    H_k: float
    G_max: float
    H_max: float
    q_floor: float
    y_max: float


class TRRational(nn.Module):
    """P(x) = Σ_{k=0}^{d_p} θ_k·ψ_k(x) over Q(x) = 1 + Σ_{k=1}^{d_q} φ_k·ψ_k(x); answers the tuple.

    Without `output_dim` the layer acts on every element of x alone. With it, the last dimension of x holds an
    argument for each output, or one argument for all, and each output has coefficients of its own; with
    `shared_Q` all outputs share φ. `degree_p`, `degree_q` and `lambda_reg` are other names of d_p, d_q and
    alpha_phi. Coefficients start as −c, c, −c, ... with c = 0.1·√(3/(d_p+1)) for θ and 0.01·√(3/d_q) for φ:
    no random numbers are drawn, and Q is near 1 where the basis is bounded. With monomials Q(0) = 1 for every
    φ: poles at 0 need Chebyshev columns.

    alpha_phi weighs |φ|² and lambda_coprime, with `enable_coprime_regularizer`, the closeness of P and Q to
    common zeros in `regularisation`; l1_projection is the |φ|₁ (of each output) that `project_` leaves at
    most. `adaptive_loss_policy` is told the tags of every training pass and says `lambda_rej`; without one,
    lambda_rej is the constant given. What is REAL is decided by `tag_policy`, by default as P/Q has it.

    Differs from zeroproof 0.1.0: all elements and outputs are one tensor; the tuple comes out, and the value
    and tag by `value_and_tag`; projection is a step of its own, after which training goes on, and not part
    of the forward pass; derivatives by Q have the right sign for negative Q; and an argument that is not
    finite, or so large that a column is not, gives (NaN, NaN) with no gradient instead of spoiling the
    coefficients for all. What concerns single nodes there (projection_index, enable_soa_value_only, the
    contract's depth_hint) is left out.
    """

    def __init__(
        self,
        d_p: int | None = None,
        d_q: int | None = None,
        basis: BasisFunction | None = None,
        *,
        output_dim: int | None = None,
        shared_Q: bool = False,
        lambda_rej: float = 0.0,
        alpha_phi: float | None = None,
        l1_projection: float | None = None,
        adaptive_loss_policy: RejectionPolicy | None = None,
        tag_policy: TagPolicy = ALGEBRAIC,
        enable_coprime_regularizer: bool = False,
        lambda_coprime: float = 0.0,
        degree_p: int | None = None,
        degree_q: int | None = None,
        lambda_reg: float | None = None,
    ) -> None:
        super().__init__()
        self.d_p = _degree("d_p", d_p, "degree_p", degree_p, least=0)
        self.d_q = _degree("d_q", d_q, "degree_q", degree_q, least=1)
        if output_dim is not None and output_dim < 1:
            raise ValueError(f"output_dim must be None or >= 1, got {output_dim=}")
        if shared_Q and output_dim is None:
            raise ValueError("shared_Q needs output_dim: without it there is one denominator, got None")
        alpha = _alias("alpha_phi", alpha_phi, "lambda_reg", lambda_reg)
        self.basis = MonomialBasis() if basis is None else basis
        self.output_dim = output_dim
        self.shared_Q = shared_Q
        self.alpha_phi = _not_negative("alpha_phi", 1e-3 if alpha is None else alpha)
        self.lambda_coprime = _not_negative("lambda_coprime", lambda_coprime)
        self.enable_coprime_regularizer = enable_coprime_regularizer
        if l1_projection is not None and not (math.isfinite(l1_projection) and l1_projection > 0.0):
            raise ValueError(f"l1_projection must be None or finite and > 0, got {l1_projection=}")
        self.l1_projection = l1_projection
        self.adaptive_loss_policy = adaptive_loss_policy
        self.tag_policy = tag_policy
        self._lambda_rej = _not_negative("lambda_rej", lambda_rej)
        heads = () if output_dim is None else (output_dim,)
        theta = _alternating(0.1, self.d_p + 1).expand(*heads, self.d_p + 1)
        phi = _alternating(0.01, self.d_q).expand(*(() if shared_Q else heads), self.d_q)
        self.theta = nn.Parameter(theta.clone())
        self.phi = nn.Parameter(phi.clone())

    # --- answers --------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map x to P and Q: of the shape of x, or (..., output_dim) for x (..., output_dim) or (..., 1).

        TypeError for x that is no real floating point. In training mode the attached policy is told the tags,
        save inside of ``torch.func`` transforms, out of which no tensor can be handed.
        """
        P, Q = self._tuple(x)
        if self.adaptive_loss_policy is not None and self.training and not is_transformed():
            self.adaptive_loss_policy.report(tags_of_tuples(P, Q, self.tag_policy))
        return P, Q

    def value_and_tag(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map x to what `quotient` makes of its tuple."""
        return self.quotient(*self(x))

    def quotient(self, P: Tensor, Q: Tensor) -> tuple[Tensor, Tensor]:
        """Return P/Q, NaN where not REAL, and the codes of `TRTag`; only REAL answers send a gradient."""
        return real_quotient(P, Q, self.tag_policy)

    def bottom_capability(self, tau_infer: float) -> BottomCapability:
        """Always "reachable": no x is out of range; the threshold is checked all the same."""
        return denominator_capability(tau_infer, lower_bound=None, dtype=self.phi.dtype)

    @property
    def lambda_rej(self) -> float | Tensor:
        """The penalty for answers that are not REAL, as the attached policy has it now."""
        policy = self.adaptive_loss_policy
        return self._lambda_rej if policy is None else policy.lambda_rej

    # --- what keeps coefficients small ----------------------------------------------------------------

    def regularisation(self) -> Tensor:
        """alpha_phi/2·|φ|², and Σ lambda_coprime/((1+|P|)(1+|Q|)) over five points of the domain, 0-d."""
        penalty = 0.5 * self.alpha_phi * self.phi.square().sum()
        if self.enable_coprime_regularizer and self.lambda_coprime > 0.0:
            low, high = getattr(self.basis, "domain", (-1.0, 1.0))
            points = _coprime_points(str(self.phi.device), self.phi.dtype)
            points = 0.5 * (low + high) + 0.5 * (high - low) * points
            P, Q = self._tuple(points if self.output_dim is None else points.unsqueeze(-1))
            penalty = penalty + self.lambda_coprime * (1.0 / ((1.0 + P.abs()) * (1.0 + Q.abs()))).sum()
        return penalty

    @torch.no_grad()
    def project_(self) -> None:
        """Shrink φ, of each output alone, to |φ|₁ <= l1_projection; without one nothing happens.

        To be called after an optimizer step; `project_after` does so. On |ψ_k| <= B the projected Q is at
        least 1 − l1_projection·B.
        """
        if self.l1_projection is not None:
            size = self.phi.abs().sum(dim=-1, keepdim=True)
            self.phi.mul_((self.l1_projection / size).clamp(max=1.0))

    def project_after(self, optimizer: torch.optim.Optimizer) -> Any:
        """Project after every step of `optimizer` from now on; the handle's ``remove()`` ends that."""
        return optimizer.register_step_post_hook(lambda *_: self.project_())

    # --- poles ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def get_q_values(self, xs: Tensor) -> Tensor:
        """|Q| at xs, in the shape of P; 0 where Q is not finite."""
        size = self._tuple(xs)[1].abs()
        return torch.where(torch.isfinite(size), size, torch.zeros_like(size))

    @torch.no_grad()
    def compute_q_min(self, xs: Tensor) -> Tensor:
        """The smallest finite |Q| over xs, 0-d; infinite where there is none."""
        size = self._tuple(xs)[1].abs().flatten()
        none = size.new_full((1,), math.inf)
        return torch.cat([torch.where(torch.isfinite(size), size, none), none]).amin()

    @torch.no_grad()
    def estimate_distance(self, x: Tensor) -> Tensor:
        """|Q|/max(|Q'|, 1e-12) at x, Newton's estimate of how far the nearest pole is.

        0 where Q is not finite.

        Differs from zeroproof 0.1.0: Q' is the derivative itself.
        """
        if self.output_dim is not None and x.ndim:
            x = x.expand(*x.shape[:-1], self.output_dim)  # each output's slope by an argument of its own
        Q, pull = torch.func.vjp(lambda held: self._tuple(held)[1], x)[:2]
        (slope,) = pull(torch.ones_like(Q))
        distance = Q.abs() / slope.abs().clamp_min(_SLOPE_FLOOR)
        return torch.where(torch.isfinite(Q), distance, torch.zeros_like(Q))

    @torch.no_grad()
    def estimate_local_scales(self) -> LocalScales:
        """1 + B·|φ|₁ and 1 + B·|θ|₁, B the bound of the basis, at the output where they are largest.

        ValueError for a basis without a bound.
        """
        bound = self._bound()
        return LocalScales(*(1.0 + bound * self._largest(weights) for weights in (self.phi, self.theta)))

    def rounding_policy(self, ulp_scale: float = 4.0) -> TagPolicy:
        """The thresholds under which |Q| and |P| cannot be told from rounding, for the weights of now."""
        scales = self.estimate_local_scales()
        ulp = ulp_scale * float(torch.finfo(self.phi.dtype).eps)
        return self.tag_policy.resolve_thresholds(ulp, scales.q, scales.p)

    @torch.no_grad()
    def get_layer_contract(self, q_floor: float | None = None) -> LayerContract:
        """The bounds that hold in the domain where |Q| >= `q_floor`; waits for the device.

        None takes what the coefficients guarantee, 1 − B·|φ|₁; where that is <= 0 no bound exists, and all
        that depend on Q are infinite. ValueError for a basis without bounds or a floor that is not > 0.
        """
        if q_floor is not None and not q_floor > 0.0:
            raise ValueError(f"q_floor must be None or > 0, got {q_floor=}")
        bound = self._bound()
        slope = self.basis.slope_bound(max(self.d_p, self.d_q))
        if slope is None:
            raise ValueError(f"a contract needs a basis with a slope bound, got {type(self.basis).__name__}")
        phi, theta = float(self._largest(self.phi)), float(self._largest(self.theta))
        floor = max(0.0, 1.0 - bound * phi) if q_floor is None else float(q_floor)
        if floor == 0.0:
            return LayerContract(bound, slope, math.inf, math.inf, 0.0, math.inf)
        y_max = bound * theta / floor
        # By θ: ψ/Q. By φ: −yψ/Q. Twice: 0, −ψψ'/Q² and 2yψψ'/Q².
        first, second = bound / floor, (bound / floor) ** 2
        return LayerContract(
            bound, slope, first * max(1.0, y_max), second * max(1.0, 2.0 * y_max), floor, y_max
        )

    # --- helpers --------------------------------------------------------------------------------------

    def _tuple(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if not x.is_floating_point():
            raise TypeError(f"TRRational needs real floating-point input, got {x.dtype}")
        if self.output_dim is not None and (x.ndim == 0 or x.shape[-1] not in (1, self.output_dim)):
            raise ValueError(
                f"the last dimension of x must be {self.output_dim} (an argument for each output) or 1, "
                f"got shape {tuple(x.shape)}"
            )
        columns, usable = finite_columns(self.basis, x, max(self.d_p, self.d_q))
        P = (columns[..., : self.d_p + 1] * self.theta).sum(dim=-1)
        Q = 1.0 + (columns[..., 1 : self.d_q + 1] * self.phi).sum(dim=-1)
        Q = Q.expand_as(P)  # one argument and one φ for all outputs
        return torch.where(usable, P, math.nan), torch.where(usable, Q, math.nan)

    @staticmethod
    def _largest(weights: Tensor) -> Tensor:
        """The largest |w|₁ of an output's coefficients, 0-d."""
        return weights.abs().sum(dim=-1).amax()

    def _bound(self) -> float:
        bound = self.basis.bound(max(self.d_p, self.d_q))
        if bound is None:
            raise ValueError(f"scales need a basis with a bound, got {type(self.basis).__name__}")
        return bound


def real_quotient(P: Tensor, Q: Tensor, policy: TagPolicy = ALGEBRAIC) -> tuple[Tensor, Tensor]:
    """P/Q, NaN where it is not REAL, and the codes of `TRTag`, in the common shape of P and Q.

    Only REAL answers send a gradient, and of them those whose slope P/Q² the dtype can hold.
    """
    tag = tags_of_tuples(P, Q, policy)
    real = tag == TRTag.REAL
    with torch.no_grad():
        quotient = torch.where(real, P / Q, math.nan)
        passes = real & torch.isfinite(quotient / Q)
    # 0/1 where no gradient passes: the division's own derivative stays finite there.
    value = torch.where(passes, P, torch.zeros_like(P)) / torch.where(passes, Q, torch.ones_like(Q))
    return torch.where(passes, value, quotient), tag


@lru_cache(maxsize=16)
def _coprime_points(device: str, dtype: torch.dtype) -> Tensor:
    # Kept, because copying them to a device would make the host wait at each step.
    with torch.inference_mode(False):
        return torch.tensor(_COPRIME_POINTS, dtype=dtype, device=device)


def _alternating(scale: float, count: int) -> Tensor:
    signs = torch.arange(count, dtype=torch.get_default_dtype()).remainder(2.0) - 0.5
    return scale * (2.0 * math.sqrt(3.0) * signs) / math.sqrt(count)


def _alias(name: str, value: Any, other: str, also: Any) -> Any:
    if value is not None and also is not None and value != also:
        raise ValueError(f"{name} and {other} name the same setting and must agree, got {value} and {also}")
    return also if value is None else value


def _degree(name: str, value: int | None, other: str, also: int | None, *, least: int) -> int:
    degree = _alias(name, value, other, also)
    if isinstance(degree, bool) or not isinstance(degree, int):
        raise TypeError(f"{name} (or {other}) must be an int, got {degree!r}")
    if degree < least:
        raise ValueError(f"{name} must be >= {least}, got {name}={degree}")
    return degree


def _not_negative(name: str, value: float) -> float:
    if not (math.isfinite(value) and value >= 0.0):
        raise ValueError(f"{name} must be finite and >= 0, got {name}={value}")
    return float(value)
