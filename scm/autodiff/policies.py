"""What a gradient becomes on its way to (P, Q), element by element, where the answer is bottom.

Decided here: the four policies, which one is in force (explicit argument, then the surrounding context,
then the layer's registered default, then CLAMP), and the gates that the losses put on (P, Q).
Which losses are gated is decided by the losses: fit, margin, sign and separation are, coverage is not,
so that REJECT learns through coverage alone.

A gate acts in one of two ways. Inside ``with gradient_policy(p):`` the forward pass captures ``p``.
Outside of any context a *late* gate is left behind, which does nothing unless a context surrounds
``backward()``: both ways of writing the loop therefore train the same.
"""

from __future__ import annotations

import enum
import math
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor

Numeric = int | float | complex

DEFAULT_BOTTOM_TAU = 1e-4
"""|Q| below this is a bottom for losses that are not given a threshold (the fit terms)."""


class GradientPolicy(enum.Enum):
    """How gradients are treated: at finite elements, and at bottoms.

    CLAMP: clamped to [-1, 1], 0 at bottoms. PROJECT: unchanged, 0 at bottoms.
    REJECT: 0 everywhere. PASSTHROUGH: unchanged everywhere.
    """

    CLAMP = "clamp"
    PROJECT = "project"
    REJECT = "reject"
    PASSTHROUGH = "pass"


POLICY_CODES: Mapping[GradientPolicy, int] = MappingProxyType(
    {
        GradientPolicy.CLAMP: 0,
        GradientPolicy.PROJECT: 1,
        GradientPolicy.REJECT: 2,
        GradientPolicy.PASSTHROUGH: 3,
    }
)
"""Each policy as an integer, so that a tensor can hold one policy per trial."""

_CLAMP, _REJECT, _PASS = 0, 2, 3


@dataclass(frozen=True, slots=True)
class GradientPolicyConfig:
    """A policy as plain data: ``{"policy": "project"}`` and back."""

    policy: GradientPolicy = GradientPolicy.CLAMP

    def to_dict(self) -> dict[str, str]:
        """Return the plain form."""
        return {"policy": self.policy.value}

    @classmethod
    def from_dict(cls, payload: Mapping[str, Any]) -> GradientPolicyConfig:
        """Read the plain form; an unknown value is a ValueError that names the known ones."""
        value = payload.get("policy", GradientPolicy.CLAMP.value)
        known = [policy.value for policy in GradientPolicy]
        if value not in known:
            raise ValueError(f"policy must be one of {known}, got {value!r}")
        return cls(GradientPolicy(value))


# --- the registry of layer defaults ---------------------------------------------------------------

_LOCK = threading.RLock()
_REGISTRY: dict[str, GradientPolicy] = {
    "scm_rational": GradientPolicy.PROJECT,
    "scm_norm": GradientPolicy.CLAMP,
    "scm_softmax": GradientPolicy.CLAMP,
    "coverage": GradientPolicy.CLAMP,
    "rejection_loss": GradientPolicy.CLAMP,
}
POLICY_REGISTRY: Mapping[str, GradientPolicy] = MappingProxyType(_REGISTRY)
"""The layers' default policies, read-only; `register_policy` changes them."""


def register_policy(layer: str, policy: GradientPolicy) -> None:
    """Make `policy` the default of `layer` (name stripped and lower-cased) outside of any context."""
    name = _layer_name(layer)
    _check_policy(policy)
    with _LOCK:
        _REGISTRY[name] = policy


def get_policy(layer: str | None = None) -> GradientPolicy:
    """Return the policy in force: the surrounding context's, else the layer's default, else CLAMP.

    TypeError inside of a context that holds one code per trial: see `policy_in_force`.
    """
    return _check_policy(policy_in_force(layer))


def policy_in_force(layer: str | None = None) -> GradientPolicy | Tensor:
    """Return what `get_policy` does, or the codes of a context that was given a tensor of them."""
    setting = _ACTIVE.get()
    if setting is not None and setting.policy is not None:
        return setting.policy
    if layer is None:
        return GradientPolicy.CLAMP
    name = _layer_name(layer)
    with _LOCK:
        return _REGISTRY.get(name, GradientPolicy.CLAMP)


def policy_registry_snapshot() -> Mapping[str, GradientPolicy]:
    """Return a copy of the layers' defaults that later registrations do not change."""
    with _LOCK:
        return MappingProxyType(dict(_REGISTRY))


def restore_policy_registry(snapshot: Mapping[str, GradientPolicy]) -> None:
    """Replace all layers' defaults by a snapshot; nothing changes when an entry is invalid."""
    checked = {_layer_name(layer): _check_policy(policy) for layer, policy in snapshot.items()}
    with _LOCK:
        _REGISTRY.clear()
        _REGISTRY.update(checked)


def _layer_name(layer: str) -> str:
    if not isinstance(layer, str):
        raise TypeError(f"layer must be a str, got {type(layer).__name__}")
    name = layer.strip().lower()
    if not name:
        raise ValueError(f"layer must not be empty, got {layer=}")
    return name


def _check_policy(policy: GradientPolicy | Tensor) -> GradientPolicy:
    if isinstance(policy, Tensor):
        raise TypeError("policy must be a GradientPolicy here, got a tensor of codes")
    if not isinstance(policy, GradientPolicy):
        raise TypeError(f"policy must be a GradientPolicy, got {policy!r}")
    return policy


# --- the context ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Setting:
    """What a context says; `policy` is None inside `policies_disabled()`."""

    policy: GradientPolicy | Tensor | None
    tau: float | Tensor = DEFAULT_BOTTOM_TAU


_ACTIVE: ContextVar[_Setting | None] = ContextVar("scm_gradient_policy", default=None)


@contextmanager
def gradient_policy(policy: GradientPolicy | Tensor, *, tau: float | Tensor | None = None) -> Iterator[None]:
    """Put `policy` in force for the forward passes, or the lone ``backward()`` calls, of the block.

    policy: a GradientPolicy; or, where many trials are trained as one, an integer tensor of `POLICY_CODES`
    that broadcasts against P, Q and the outputs of layers (under vmap: 0-d, a code per trial).
    tau: threshold (>= 0) below which |Q| is a bottom in losses that are not given one; 1e-4 by default.
    Contexts nest, are restored by exceptions, are copied into asyncio children when those are created,
    and are absent in new threads.
    """
    if not _is_codes(policy):
        _check_policy(policy)
    if tau is None:
        tau = DEFAULT_BOTTOM_TAU
    if not isinstance(tau, Tensor) and not (math.isfinite(tau) and tau >= 0):
        raise ValueError(f"tau must be finite and >= 0, got {tau=}")
    with _in_force(_Setting(policy, tau)):
        yield


@contextmanager
def policies_disabled() -> Iterator[None]:
    """Put no policy in force and leave no gate on (P, Q): losses cost nothing more."""
    with _in_force(_Setting(None)):
        yield


def _is_codes(policy: object) -> bool:
    return isinstance(policy, Tensor) and policy.dtype in (torch.int64, torch.int32, torch.int16, torch.int8)


@contextmanager
def scaled_gradients(scale: Tensor) -> Iterator[None]:
    """Have the gates of the block's forward passes expect gradients that are `scale` times too large.

    scale: 0-d, > 0. CLAMP then clamps to [-scale, scale], so that a `GradScaler` changes no training.
    """
    token = _GRADIENT_SCALE.set(scale)
    try:
        yield
    finally:
        _GRADIENT_SCALE.reset(token)


_GRADIENT_SCALE: ContextVar[Tensor | None] = ContextVar("scm_gradient_scale", default=None)


def clamp_limit() -> float | Tensor:
    """Return where CLAMP clamps in this context: 1, or the scale of `scaled_gradients`."""
    scale = _GRADIENT_SCALE.get()
    return 1.0 if scale is None else scale


def has_active_policy() -> bool:
    """Say whether a ``with gradient_policy(...)`` block surrounds the caller."""
    setting = _ACTIVE.get()
    return setting is not None and setting.policy is not None


@contextmanager
def _in_force(setting: _Setting) -> Iterator[None]:
    outer = _ACTIVE.get()
    token = _ACTIVE.set(setting)
    _tell_late_gates(setting)
    try:
        yield
    finally:
        _ACTIVE.reset(token)
        _tell_late_gates(outer)


# --- the policies themselves ----------------------------------------------------------------------


def apply_policy(gradient: Numeric, is_bottom: bool, policy: GradientPolicy | None = None) -> Numeric:
    """Apply a policy to one number; complex numbers are not clamped.

    Differs from zeroproofml 0.6.1: CLAMP leaves nan as nan, as the tensor form does, instead of +1.
    """
    policy = get_policy() if policy is None else _check_policy(policy)
    zero = 0j if isinstance(gradient, complex) else 0.0
    if policy is GradientPolicy.REJECT:
        return zero
    if policy is GradientPolicy.PASSTHROUGH:
        return gradient
    if is_bottom:
        return zero
    if policy is GradientPolicy.PROJECT or isinstance(gradient, complex) or math.isnan(gradient):
        return gradient
    return max(-1.0, min(1.0, gradient))


def apply_policy_vector(
    gradients: Iterable[Numeric], is_bottom: bool, policy: GradientPolicy | None = None
) -> list[Numeric]:
    """Apply a policy to each number of a sequence that shares one bottom flag."""
    return [apply_policy(gradient, is_bottom, policy) for gradient in gradients]


def apply_policy_tensor(
    gradient: Tensor, bottom: Tensor, policy: GradientPolicy | Tensor, *, limit: float | Tensor = 1.0
) -> Tensor:
    """Apply a policy element by element; `bottom` and a code tensor broadcast against `gradient`.

    policy: a GradientPolicy, or an integer tensor of `POLICY_CODES` (one per trial, for instance).
    limit: what CLAMP clamps to, 1 unless gradients are scaled.
    A nan at a finite element stays nan under CLAMP, PROJECT and PASSTHROUGH.
    """
    if isinstance(policy, Tensor):
        if not gradient.is_complex():
            gradient = torch.where(policy == _CLAMP, _clamped(gradient, limit), gradient)
        return torch.where((bottom & (policy != _PASS)) | (policy == _REJECT), 0.0, gradient)
    if policy is GradientPolicy.PASSTHROUGH:
        return gradient
    if policy is GradientPolicy.REJECT:
        return torch.zeros_like(gradient)
    if policy is GradientPolicy.CLAMP and not gradient.is_complex():
        gradient = _clamped(gradient, limit)
    return torch.where(bottom, 0.0, gradient)


def _clamped(gradient: Tensor, limit: float | Tensor) -> Tensor:
    if isinstance(limit, Tensor):
        limit = limit.to(device=gradient.device, dtype=gradient.dtype)
        return gradient.clamp(-limit, limit)
    return gradient.clamp(-limit, limit)


# --- gates on (P, Q) ------------------------------------------------------------------------------


def gate_gradients(x: Tensor, bottom: Tensor, policy: GradientPolicy | Tensor) -> Tensor:
    """Return `x` unchanged, with a backward pass that applies `policy` to the incoming gradient.

    bottom: bool, the shape of `x`. policy: a GradientPolicy or an integer tensor of `POLICY_CODES` that
    broadcasts against `x`. Works inside ``torch.func`` transforms.
    """
    limit = clamp_limit()
    if isinstance(policy, Tensor) or is_transformed():
        codes = policy if isinstance(policy, Tensor) else torch.tensor(POLICY_CODES[_check_policy(policy)])
        gated: Tensor = _Gate.apply(x, bottom, codes, torch.as_tensor(limit))
        return gated
    _check_policy(policy)
    if not (torch.is_grad_enabled() and x.requires_grad):
        return x
    # A hook costs a tenth of a custom Function on small tensors, but transforms do not run hooks.
    gated = x.view_as(x)

    def hook(gradient: Tensor | None) -> Tensor | None:
        if gradient is None:  # no term of the loss depends on x
            return None
        return apply_policy_tensor(gradient, bottom, policy, limit=limit)

    gated.register_hook(hook)
    return gated


class _Gate(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, bottom: Tensor, codes: Tensor, limit: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        bottom, codes, limit = ctx.saved_tensors
        codes = codes.to(gradient.device)
        return apply_policy_tensor(gradient, bottom, codes, limit=limit), None, None, None


def gate_tuple(P: Tensor, Q: Tensor, *, tau: float | Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return (P, Q) with the gates that the policy in force asks for; bottom is |Q| < tau or non-finite.

    tau None: the threshold of the context. Outside of any context late gates are left behind (not under
    ``no_grad`` or ``torch.func`` transforms); inside `policies_disabled()` the tuple itself is returned.
    """
    gated = _gated((P, Q), tau)
    return gated[0], gated[1]


def gate_denominator(Q: Tensor, *, tau: float | Tensor | None = None) -> Tensor:
    """Return Q gated as `gate_tuple` does it, for losses that see no numerator."""
    return _gated((Q,), tau)[0]


def bottom_mask(Q: Tensor, tau: float | Tensor, P: Tensor | None = None) -> Tensor:
    """Return where |Q| < tau or P or Q is not finite; bool, the broadcast shape of P and Q."""
    # A nan fails every comparison, so "not at least tau" holds for it too.
    bottom = ~(Q.abs() >= tau) | Q.isinf()
    return bottom if P is None else bottom | ~P.isfinite()


def _gated(members: tuple[Tensor, ...], tau: float | Tensor | None) -> tuple[Tensor, ...]:
    setting = _ACTIVE.get()
    if (setting is not None and setting.policy is None) or not torch.is_grad_enabled():
        return members
    if setting is not None and setting.policy is not None:
        bottom = _bottom_of([x.detach() for x in members], setting.tau if tau is None else tau)
        return tuple(gate_gradients(x, _reduced_like(bottom, x), setting.policy) for x in members)
    if is_transformed() or not any(x.requires_grad for x in members):
        return members
    gate = _LateGate([x.detach() for x in members], tau)
    remember_late_gate(gate)
    return tuple(gate.on(x) for x in members)


def _bottom_of(members: Sequence[Tensor], tau: float | Tensor) -> Tensor:
    return bottom_mask(members[-1], tau, members[0] if len(members) > 1 else None)


def _reduced_like(bottom: Tensor, x: Tensor) -> Tensor:
    """A denominator that several numerators share is a bottom as soon as one of them is."""
    if bottom.shape == x.shape:
        return bottom
    return bottom.to(torch.float32).sum_to_size(x.shape) > 0


class _LateGate:
    """A gate of the losses whose policy is known when ``backward()`` runs."""

    __slots__ = ("__weakref__", "limit", "members", "setting", "tau", "thread")

    def __init__(self, members: Sequence[Tensor], tau: float | Tensor | None) -> None:
        self.members = members
        self.tau = tau
        self.limit = clamp_limit()
        self.thread = threading.get_ident()
        self.setting: _Setting | None = None

    def on(self, x: Tensor) -> Tensor:
        if not x.requires_grad:
            return x
        gated = x.view_as(x)
        gated.register_hook(self)
        return gated

    def __call__(self, gradient: Tensor | None) -> Tensor | None:
        if gradient is None:
            return None
        setting = _ACTIVE.get()
        # CUDA gradients are computed on the engine's own threads, which see no context variable: there the
        # setting counts that a context of the forward pass's thread wrote into the gate.
        if setting is None and threading.get_ident() != self.thread:
            setting = self.setting
        if setting is None or setting.policy is None:
            return None
        bottom = _bottom_of(self.members, setting.tau if self.tau is None else self.tau)
        bottom = _reduced_like(bottom, gradient)
        return apply_policy_tensor(gradient, bottom, setting.policy, limit=self.limit)


class LateGate(Protocol):
    """A hook that opening and leaving contexts tell of, by its attribute `setting` (None: no context)."""

    setting: Any


def remember_late_gate(gate: LateGate) -> None:
    """Have the contexts of this thread write into `gate` for as long as something else keeps it alive."""
    _LOCAL.gates.add(gate)


class _Local(threading.local):
    def __init__(self) -> None:
        self.gates: weakref.WeakSet[LateGate] = weakref.WeakSet()


_LOCAL = _Local()


def _tell_late_gates(setting: _Setting | None) -> None:
    for gate in list(_LOCAL.gates):
        gate.setting = setting


def is_transformed() -> bool:
    """Say whether a ``torch.func`` transform surrounds the caller, where hooks do not run."""
    # The check that torch.autograd.Function.apply itself makes.
    return torch._C._are_functorch_transforms_active()
