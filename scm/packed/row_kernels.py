"""Optimizer steps of many rows as machine code: one row after another, each read and written once.

Every rule is that of `optimizers`, where it is said on tensors; which rows take a step is decided there too.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from scm.packed.native import row_shares, run_shares
from scm.packed.toolchain import load_library

_KINDS = {torch.float32: "float", torch.float64: "double"}

_TEXT = """
#include <float.h>
#include <math.h>
#include <stdint.h>
#define ROW(T, name, place) T *restrict name = (T *)(at[place] + row * by[place])
#define NUMBER(place) (*(const double *)(at[place] + row * by[place]))
#define EACH _Pragma("GCC ivdep") for (long i = 0; i < width; ++i)
typedef unsigned char flag;
/* What is remembered of weights without a gradient fades until it is subnormal, and stays so for ever.
   Such numbers take the processor many times as long, and are too small for any weight to feel. */
#define NORMAL_float(x) (fabsf(x) < FLT_MIN ? 0 : (x))
#define NORMAL_double(x) (fabs(x) < DBL_MIN ? 0 : (x))
"""

# at: weights, gradients, taken or null, width; what follows is the rule's own.
_RULES = """
void adam_@T(long first, long last, char **at, const long *by, char *none) {
  const long width = *(const int64_t *)at[3];
  const flag *taken = (const flag *)at[2];
  for (long row = first; row < last; ++row) {
    if (taken && !taken[row]) continue;
    ROW(@T, w, 0); ROW(@T, g, 1); ROW(@T, m, 4); ROW(@T, v, 5); ROW(float, steps, 6);
    const double rate = NUMBER(7), beta1 = NUMBER(8), beta2 = NUMBER(9), decay = NUMBER(10);
    const double count = *steps += 1;
    const @T gain1 = 1 - beta1, gain2 = 1 - beta2, keep2 = beta2, eps = @EPSILON;
    const @T size = rate / (1 - pow(beta1, count)), shrink = 1 / sqrt(1 - pow(beta2, count));
    if (decay != 0 && *(const int64_t *)at[11]) { const @T left = 1 - rate * decay; EACH w[i] *= left; }
    else if (decay != 0) { const @T more = decay; EACH g[i] += more * w[i]; }
    EACH {
      const @T a = m[i] + gain1 * (g[i] - m[i]), b = keep2 * v[i] + gain2 * g[i] * g[i];
      m[i] = NORMAL_@T(a); v[i] = NORMAL_@T(b);
      w[i] -= size * a / (SQRT_@T(b) * shrink + eps);
    }
  }
}

void sgd_@T(long first, long last, char **at, const long *by, char *none) {
  const long width = *(const int64_t *)at[3];
  const flag *taken = (const flag *)at[2];
  for (long row = first; row < last; ++row) {
    if (taken && !taken[row]) continue;
    ROW(@T, w, 0); ROW(@T, g, 1); ROW(@T, v, 4); ROW(float, steps, 5);
    const @T rate = NUMBER(6), momentum = NUMBER(7), decay = NUMBER(8);
    const int ahead = *(const flag *)(at[9] + row * by[9]), begins = *steps == 0;
    *steps += 1;
    if (decay != 0) EACH g[i] += decay * w[i];
    if (momentum == 0) { EACH w[i] -= rate * g[i]; continue; }
    if (begins) EACH v[i] = g[i];
    else EACH { const @T a = momentum * v[i] + g[i]; v[i] = NORMAL_@T(a); }
    if (ahead) EACH w[i] -= rate * (g[i] + momentum * v[i]);
    else EACH w[i] -= rate * v[i];
  }
}

void rmsprop_@T(long first, long last, char **at, const long *by, char *none) {
  const long width = *(const int64_t *)at[3];
  const flag *taken = (const flag *)at[2];
  const @T eps = @EPSILON, keep = @SMOOTHING, gain = 1 - @SMOOTHING;
  for (long row = first; row < last; ++row) {
    if (taken && !taken[row]) continue;
    ROW(@T, w, 0); ROW(@T, g, 1); ROW(@T, s, 4); ROW(@T, v, 5);
    const @T rate = NUMBER(6), momentum = NUMBER(7), decay = NUMBER(8);
    if (decay != 0) EACH g[i] += decay * w[i];
    if (momentum == 0) {
      EACH {
        const @T a = keep * s[i] + gain * g[i] * g[i];
        s[i] = NORMAL_@T(a);
        w[i] -= rate * g[i] / (SQRT_@T(s[i]) + eps);
      }
      continue;
    }
    EACH {
      const @T a = keep * s[i] + gain * g[i] * g[i];
      s[i] = NORMAL_@T(a);
      const @T b = momentum * v[i] + g[i] / (SQRT_@T(s[i]) + eps);
      v[i] = NORMAL_@T(b);
      w[i] -= rate * v[i];
    }
  }
}
"""


def rule_library(epsilon: float, smoothing: float) -> ctypes.CDLL:
    """Return all rules, compiled; ToolchainError where they cannot be."""
    text = _TEXT + "".join(
        f"#define SQRT_{kind} {root}\n"
        + _RULES.replace("@T", kind).replace("@EPSILON", epsilon.hex()).replace("@SMOOTHING", smoothing.hex())
        for kind, root in (("float", "sqrtf"), ("double", "sqrt"))
    )
    return load_library(text)


class RowKernel:
    """A rule as machine code, on matrices of weights and state that stay where they are.

    rule: "adam", "sgd" or "rmsprop". tensors: what the rule takes after the width, each with the rows first,
    or None for what it does not look at; told: a plain number that comes last. Raises ToolchainError.
    """

    def __init__(
        self,
        rule: str,
        weights: Tensor,
        tensors: Sequence[Tensor | None],
        told: int,
        *,
        epsilon: float,
        smoothing: float,
    ) -> None:
        self._step = getattr(rule_library(epsilon, smoothing), f"{rule}_{_KINDS[weights.dtype]}")
        self._step.argtypes = (ctypes.c_long, ctypes.c_long, *[ctypes.c_void_p] * 3)
        self._step.restype = None
        self._shares = row_shares(len(weights))
        self._scratch = [0] * len(self._shares)
        numbers = torch.tensor([weights.shape[1], told], dtype=torch.int64)
        self._held = [weights, numbers, *tensors]  # their memory must live as long as this
        every: list[Tensor | None] = [weights, None, None, numbers[:1], *tensors, numbers[1:]]
        self._at = (ctypes.c_void_p * len(every))(
            *(item.data_ptr() if item is not None else 0 for item in every)
        )
        self._by = (ctypes.c_long * len(every))(*(_step_of(item) for item in every))

    def step(self, gradients: Tensor, taken: Tensor | None) -> None:
        """Take a step of every row, or of those that are `taken`."""
        at: Any = self._at
        at[1], self._by[1] = gradients.data_ptr(), _step_of(gradients)
        at[2] = 0 if taken is None else taken.data_ptr()
        run_shares(self._step, self._shares, at, self._by, self._scratch)


def _step_of(item: Tensor | None) -> int:
    return item.stride(0) * item.element_size() if item is not None and item.ndim else 0
