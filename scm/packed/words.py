"""Operations on single numbers, as C says them; nan and infinite numbers are treated as torch treats them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from scm.packed.cblocks import VECTOR

aten = torch.ops.aten


class LoweringError(ValueError):
    """A graph that cannot be written as C; the message says what has no words."""


C_TYPES: Mapping[torch.dtype, str] = {
    torch.float32: "float",
    torch.float64: "double",
    torch.int64: "int64_t",
    torch.int32: "int32_t",
    torch.bool: "flag",
}


def number_text(value: Any, kind: str) -> str:
    """Return a number as C says it, exactly."""
    if kind in ("int64_t", "int32_t", "flag"):
        return f"(({kind}){int(value)})"
    value = float(value)
    if math.isnan(value):
        return f"(({kind})NAN)"
    if math.isinf(value):
        return f"(({kind}){'-' if value < 0 else ''}INFINITY)"
    return f"(({kind}){value.hex()})"


def cast_text(text: str, kind: str, to: str) -> str:
    """Say a number in another type; what is not 0 is true."""
    if kind == to:
        return text
    return f"({text} != 0)" if to == "flag" else f"(({to}){text})"


@dataclass(frozen=True)
class Words:
    """How an operation on single numbers is said.

    as_result: operands are taken in the result's dtype, else in the one that they have in common. as_is:
    which ones are taken as they are. options: keyword arguments that are understood.
    """

    say: Callable[..., str]
    as_result: bool = True
    as_is: frozenset[int] = frozenset()
    options: frozenset[str] = frozenset()


def _floating(name: str) -> Callable[..., str]:
    """Say a function of the mathematical library, in its form for the dtype."""

    def say(kind: str, *items: str) -> str:
        return f"{named(name, kind)}({', '.join(items)})"

    return say


def named(name: str, kind: str) -> str:
    if kind not in VECTOR:
        raise LoweringError(f"{name} of {kind}")
    return name + ("f" if kind == "float" else "")


def _scaled(alpha: Any, kind: str, item: str) -> str:
    return item if alpha == 1 else f"{number_text(alpha, kind)} * {item}"


def _add(kind: str, a: str, b: str, alpha: Any = 1) -> str:
    return f"{a} || {b}" if kind == "flag" else f"{a} + {_scaled(alpha, kind, b)}"


def _sub(kind: str, a: str, b: str, alpha: Any = 1) -> str:
    return f"{a} - {_scaled(alpha, kind, b)}"


def _rsub(kind: str, a: str, b: str, alpha: Any = 1) -> str:
    return f"{b} - {_scaled(alpha, kind, a)}"


def _mul(kind: str, a: str, b: str) -> str:
    return f"{a} & {b}" if kind == "flag" else f"{a} * {b}"


def _addcmul(kind: str, a: str, b: str, c: str, value: Any = 1) -> str:
    return f"{a} + {_scaled(value, kind, b)} * {c}"


def _clamp(kind: str, x: str, low: str | None = None, high: str | None = None) -> str:
    if low is not None:
        x = f"({x} < {low} ? {low} : {x})"  # nan is no less than anything, and stays
    if high is not None:
        x = f"({x} > {high} ? {high} : {x})"
    return x


def _clamp_between(kind: str, x: str, low: str | None = None, high: str | None = None) -> str:
    """Clamp to bounds that are values themselves: a bound that is nan gives nan."""
    if low is not None:
        x = f"larger_{kind}({low}, larger_{kind}({x}, {low}))"
    if high is not None:
        x = f"smaller_{kind}({high}, smaller_{kind}({x}, {high}))"
    return x


def power_text(kind: str, x: str, exponent: str) -> str:
    return f"{named('pow', kind)}({x}, {exponent})"


def _sign(kind: str, x: str) -> str:
    return f"({kind})(({x} > 0) - ({x} < 0))"


def _remainder(kind: str, a: str, b: str) -> str:
    """What is left of a, of the sign of b."""
    if kind not in VECTOR:
        raise LoweringError(f"remainder of {kind}")
    return f"remainder_{kind}({a}, {b})"


def _without_nan(
    kind: str, x: str, nan: str | None = None, high: str | None = None, low: str | None = None
) -> str:
    """Say 0 for nan and the largest numbers for infinite ones, or what is given."""
    largest = {"float": "0x1.fffffep127f", "double": "0x1.fffffffffffffp1023"}.get(kind)
    if largest is None:
        return x
    high, low = high or largest, low or f"-{largest}"
    return f"{x} != {x} ? {nan or '0'} : {x} == INFINITY ? {high} : {x} == -INFINITY ? {low} : {x}"


def _compared(sign: str) -> Words:
    return Words(lambda kind, a, b: f"{a} {sign} {b}", as_result=False)


def _both(sign: str) -> Words:
    return Words(lambda kind, a, b: f"{a} {sign} {b}")


POINTWISE: Mapping[Any, Words] = {
    aten.add.Tensor: Words(_add, options=frozenset({"alpha"})),
    aten.add.Scalar: Words(_add, options=frozenset({"alpha"})),
    aten.sub.Tensor: Words(_sub, options=frozenset({"alpha"})),
    aten.sub.Scalar: Words(_sub, options=frozenset({"alpha"})),
    aten.rsub.Scalar: Words(_rsub, options=frozenset({"alpha"})),
    aten.mul.Tensor: Words(_mul),
    aten.mul.Scalar: Words(_mul),
    aten.div.Tensor: Words(lambda kind, a, b: f"{a} / {b}"),
    aten.div.Scalar: Words(lambda kind, a, b: f"{a} / {b}"),
    aten.addcmul.default: Words(_addcmul, options=frozenset({"value"})),
    aten.neg.default: Words(lambda kind, x: f"-{x}"),
    aten.abs.default: Words(_floating("fabs")),
    aten.relu.default: Words(lambda kind, x: f"{x} < 0 ? 0 : {x}"),
    aten.threshold_backward.default: Words(lambda kind, g, x, t: f"{x} <= {t} ? 0 : {g}"),
    aten.sqrt.default: Words(_floating("sqrt")),
    aten.rsqrt.default: Words(lambda kind, x: f"1 / {named('sqrt', kind)}({x})"),
    aten.reciprocal.default: Words(lambda kind, x: f"1 / {x}"),
    aten.exp.default: Words(_floating("exp")),
    aten.exp2.default: Words(_floating("exp2")),
    aten.log.default: Words(_floating("log")),
    aten.log2.default: Words(_floating("log2")),
    aten.log1p.default: Words(_floating("log1p")),
    aten.sin.default: Words(_floating("sin")),
    aten.cos.default: Words(_floating("cos")),
    aten.tanh.default: Words(_floating("tanh")),
    aten.floor.default: Words(_floating("floor")),
    aten.ceil.default: Words(_floating("ceil")),
    aten.atan2.default: Words(_floating("atan2")),
    aten.copysign.Tensor: Words(_floating("copysign")),
    aten.sigmoid.default: Words(lambda kind, x: f"1 / (1 + {named('exp', kind)}(-{x}))"),
    aten.sigmoid_backward.default: Words(lambda kind, g, y: f"{g} * (1 - {y}) * {y}"),
    aten.tanh_backward.default: Words(lambda kind, g, y: f"{g} * (1 - {y} * {y})"),
    aten.sign.default: Words(_sign),
    aten.sgn.default: Words(_sign),
    aten.square.default: Words(lambda kind, x: f"{x} * {x}"),
    aten.maximum.default: Words(lambda kind, a, b: f"larger_{kind}({a}, larger_{kind}({b}, {a}))"),
    aten.minimum.default: Words(lambda kind, a, b: f"smaller_{kind}({a}, smaller_{kind}({b}, {a}))"),
    aten.clamp.default: Words(_clamp),
    aten.clamp_min.default: Words(_clamp),
    aten.clamp_max.default: Words(lambda kind, x, high: _clamp(kind, x, None, high)),
    aten.clamp.Tensor: Words(_clamp_between),
    aten.pow.Tensor_Tensor: Words(power_text),
    aten.nan_to_num.default: Words(_without_nan),
    aten.remainder.Tensor: Words(_remainder),
    aten.remainder.Scalar: Words(_remainder),
    aten.where.self: Words(lambda kind, c, a, b: f"{c} ? {a} : {b}", as_is=frozenset({0})),
    aten._to_copy.default: Words(lambda kind, x, **told: x, options=frozenset({"dtype", "layout", "device"})),
    aten.clone.default: Words(lambda kind, x, **told: x, options=frozenset({"memory_format"})),
    aten.eq.Tensor: _compared("=="),
    aten.eq.Scalar: _compared("=="),
    aten.ne.Tensor: _compared("!="),
    aten.ne.Scalar: _compared("!="),
    aten.lt.Tensor: _compared("<"),
    aten.lt.Scalar: _compared("<"),
    aten.le.Tensor: _compared("<="),
    aten.le.Scalar: _compared("<="),
    aten.gt.Tensor: _compared(">"),
    aten.gt.Scalar: _compared(">"),
    aten.ge.Tensor: _compared(">="),
    aten.ge.Scalar: _compared(">="),
    aten.isinf.default: Words(lambda kind, x: f"fabs({x}) == INFINITY", as_result=False),
    aten.isnan.default: Words(lambda kind, x: f"{x} != {x}", as_result=False),
    aten.logical_not.default: Words(lambda kind, x: f"{x} == 0", as_result=False),
    aten.logical_and.default: Words(lambda kind, a, b: f"({a} != 0) & ({b} != 0)", as_result=False),
    aten.logical_or.default: Words(lambda kind, a, b: f"({a} != 0) | ({b} != 0)", as_result=False),
    aten.bitwise_and.Tensor: _both("&"),
    aten.bitwise_and.Scalar: _both("&"),
    aten.bitwise_or.Tensor: _both("|"),
    aten.bitwise_or.Scalar: _both("|"),
    aten.bitwise_xor.Tensor: _both("^"),
    aten.bitwise_not.default: Words(lambda kind, x: f"{x} == 0" if kind == "flag" else f"~{x}"),
}
