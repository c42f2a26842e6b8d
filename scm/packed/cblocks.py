"""C that every lowered step begins with: products of small matrices, sums, transposes, in two precisions.

Vectors are the compiler's own (``vector_size``), so the text is the same for every processor. What is called
with which numbers is decided in `lowering`; those numbers are literals there, so that loops are unrolled.
"""

from __future__ import annotations

from collections.abc import Sequence

VECTOR = {"float": 16, "double": 8}
"""How many numbers a vector holds."""

_ROWS = 8  # of a product's tile, with two vectors each: as many sums as fit into the registers


def prelude() -> str:
    """Return the text of all building blocks."""
    return "\n".join([_HEAD, *(_blocks(kind, lanes) for kind, lanes in VECTOR.items())])


_HEAD = r"""
#include <math.h>
#include <stdint.h>
#include <string.h>
typedef unsigned char flag;
#define INLINE static inline __attribute__((always_inline))
#define LARGER(name, T) INLINE T name(T a, T b) { return a != a || a > b ? a : b; }
#define SMALLER(name, T) INLINE T name(T a, T b) { return a != a || a < b ? a : b; }
#define REMAINDER(name, T, fmod) \
  INLINE T name(T a, T b) { T r = fmod(a, b); return r != 0 && (r < 0) != (b < 0) ? r + b : r; }
REMAINDER(remainder_float, float, fmodf) REMAINDER(remainder_double, double, fmod)
LARGER(larger_float, float) LARGER(larger_double, double) LARGER(larger_int64_t, int64_t)
SMALLER(smaller_float, float) SMALLER(smaller_double, double) SMALLER(smaller_int64_t, int64_t)
"""


def _blocks(kind: str, lanes: int) -> str:
    tiles = [_tile(kind, rows, vectors) for vectors in (2, 1) for rows in (_ROWS, 4, 2, 1)]
    text = _TYPES + "\n".join(tiles) + _PRODUCT + _transpose(lanes) + _sums(lanes)
    return text.replace("@T", kind).replace("@V", str(lanes)).replace("@B", str(lanes * _SIZE[kind]))


_SIZE = {"float": 4, "double": 8}

_TYPES = """
typedef @T vec_@T __attribute__((vector_size(@B), aligned(__alignof__(@T)), may_alias));
"""


def _tile(kind: str, rows: int, vectors: int) -> str:
    """C[rows, vectors] = A·B over k; A is read number by number, so it may lie either way."""
    sums = [(row, place) for row in range(rows) for place in range(vectors)]
    lines = [
        f"static inline void tile_@T_{rows}_{vectors}(long K, const @T *A, long a0, long a1,"
        " const @T *B, long b0, @T *C, long c0) {",
        *(f"  vec_@T s{row}_{place} = {{0}};" for row, place in sums),
        "  for (long k = 0; k < K; ++k) {",
        *(f"    vec_@T v{place} = *(const vec_@T *)(B + k * b0 + {place} * @V);" for place in range(vectors)),
    ]
    for row in range(rows):
        lines.append(f"    {{ @T a = A[{row} * a0 + k * a1];")
        lines += [f"      s{row}_{place} += a * v{place};" for place in range(vectors)]
        lines.append("    }")
    lines.append("  }")
    lines += [f"  *(vec_@T *)(C + {row} * c0 + {place} * @V) = s{row}_{place};" for row, place in sums]
    return "\n".join([*lines, "}"])


_PRODUCT = """
/* C (M, N) = A (M, K) . B (K, N); B and C have rows of N numbers, N a multiple of @V. */
INLINE void product_@T(long M, long N, long K, const @T *A, long a0, long a1,
                       const @T *B, long b0, @T *C, long c0) {
  long n = 0;
  for (; n + 2 * @V <= N; n += 2 * @V) {
    long m = 0;
    for (; m + 8 <= M; m += 8) tile_@T_8_2(K, A + m * a0, a0, a1, B + n, b0, C + m * c0 + n, c0);
    if (M & 4) { tile_@T_4_2(K, A + m * a0, a0, a1, B + n, b0, C + m * c0 + n, c0); m += 4; }
    if (M & 2) { tile_@T_2_2(K, A + m * a0, a0, a1, B + n, b0, C + m * c0 + n, c0); m += 2; }
    if (M & 1) tile_@T_1_2(K, A + m * a0, a0, a1, B + n, b0, C + m * c0 + n, c0);
  }
  for (; n < N; n += @V) {
    long m = 0;
    for (; m + 8 <= M; m += 8) tile_@T_8_1(K, A + m * a0, a0, a1, B + n, b0, C + m * c0 + n, c0);
    if (M & 4) { tile_@T_4_1(K, A + m * a0, a0, a1, B + n, b0, C + m * c0 + n, c0); m += 4; }
    if (M & 2) { tile_@T_2_1(K, A + m * a0, a0, a1, B + n, b0, C + m * c0 + n, c0); m += 2; }
    if (M & 1) tile_@T_1_1(K, A + m * a0, a0, a1, B + n, b0, C + m * c0 + n, c0);
  }
}
"""


def _shuffle(one: str, two: str, places: Sequence[int]) -> str:
    return f"__builtin_shufflevector({one}, {two}, {', '.join(map(str, places))})"


def _transpose(lanes: int) -> str:
    """Turn a square of vectors by exchanging its halves, its quarters, and so on."""
    lines = [
        "INLINE void turn_block_@T(const @T *A, long a0, @T *C, long c0) {",
        *(f"  vec_@T r{row} = *(const vec_@T *)(A + {row} * a0);" for row in range(lanes)),
        "  vec_@T low, high;",
    ]
    size = lanes // 2
    while size:
        low = [place if not place & size else lanes + place - size for place in range(lanes)]
        high = [place + size if not place & size else lanes + place for place in range(lanes)]
        for row in range(lanes):
            if not row & size:
                pair = f"r{row}", f"r{row + size}"
                lines.append(f"  low = {_shuffle(*pair, low)}; high = {_shuffle(*pair, high)};")
                lines.append(f"  {pair[0]} = low; {pair[1]} = high;")
        size //= 2
    lines += [f"  *(vec_@T *)(C + {row} * c0) = r{row};" for row in range(lanes)]
    lines.append("}")
    return "\n".join(lines) + _TURN


_TURN = """
/* C (N, M) = the transpose of A (M, N). */
INLINE void turn_@T(long M, long N, const @T *A, long a0, @T *C, long c0) {
  long m = 0;
  for (; m + @V <= M; m += @V) {
    long n = 0;
    for (; n + @V <= N; n += @V) turn_block_@T(A + m * a0 + n, a0, C + n * c0 + m, c0);
    for (; n < N; ++n) for (long i = 0; i < @V; ++i) C[n * c0 + m + i] = A[(m + i) * a0 + n];
  }
  for (; m < M; ++m) for (long n = 0; n < N; ++n) C[n * c0 + m] = A[m * a0 + n];
}
"""


def _sums(lanes: int) -> str:
    """Sums along rows: a vector of partial sums a row, then as many rows at once as a vector holds."""
    lines = [
        "INLINE vec_@T partial_@T(const @T *x, long n) {",
        "  vec_@T s = {0}; long i = 0;",
        "  for (; i + @V <= n; i += @V) s += *(const vec_@T *)(x + i);",
        "  @T rest[@V] = {0};",
        "  if (i < n) { for (long j = 0; i + j < n; ++j) rest[j] = x[i + j]; s += *(vec_@T *)rest; }",
        "  return s;",
        "}",
        "INLINE @T total_@T(vec_@T s) {",
    ]
    size = lanes // 2
    while size:
        places = [(place + size) % lanes for place in range(lanes)]
        lines.append(f"  s += {_shuffle('s', 's', places)};")
        size //= 2
    lines += [
        "  return s[0];",
        "}",
        "INLINE @T sum_@T(const @T *x, long n) { return total_@T(partial_@T(x, n)); }",
        # With weights below one over the number the mean cannot overflow, and is finite only if all are.
        "INLINE @T finite_mean_@T(const @T *x, long n, @T weight) {",
        "  vec_@T s = {0}, t = {0}; long i = 0; @T rest = 0;",
        "  for (; i + 2 * @V <= n; i += 2 * @V) {",
        "    s += *(const vec_@T *)(x + i) * weight; t += *(const vec_@T *)(x + i + @V) * weight;",
        "  }",
        "  for (; i < n; ++i) rest += x[i] * weight;",
        "  return total_@T(s + t) + rest;",
        "}",
        "INLINE @T dot_@T(const @T *x, const @T *y, long n) {",
        "  vec_@T s = {0}; long i = 0; @T rest = 0;",
        "  for (; i + @V <= n; i += @V) s += *(const vec_@T *)(x + i) * *(const vec_@T *)(y + i);",
        "  for (; i < n; ++i) rest += x[i] * y[i];",
        "  return total_@T(s) + rest;",
        "}",
        "INLINE void sum_block_@T(const @T *x, long x0, long n, @T *out) {",
        *(f"  vec_@T r{row} = partial_@T(x + {row} * x0, n);" for row in range(lanes)),
    ]
    # Each round folds two vectors into one; what is left holds the rows' sums in the order of `order`.
    held = [[(row, place) for place in range(lanes)] for row in range(lanes)]
    names = [f"r{row}" for row in range(lanes)]
    half = lanes // 2
    group = lanes
    while len(names) > 1:
        group //= 2
        kept_names, kept_held = [], []
        for place in range(half):
            one, two = names[place], names[place + half]
            both = held[place] + held[place + half]
            low = [start + i for start in range(0, 2 * lanes, 2 * group) for i in range(group)]
            high = [item + group for item in low]
            lines.append(f"  {one} = {_shuffle(one, two, low)} + {_shuffle(one, two, high)};")
            kept_names.append(one)
            kept_held.append([both[item] for item in low])
        names, held, half = kept_names, kept_held, half // 2
    order = [row for row, _ in held[0]]
    places = [order.index(row) for row in range(lanes)]
    lines += [f"  *(vec_@T *)out = {_shuffle(names[0], names[0], places)};", "}"]
    return "\n" + "\n".join(lines) + _ROW_SUMS


_ROW_SUMS = """
/* out[m] = the sum of row m of x (M, n). */
INLINE void row_sums_@T(long M, long n, const @T *x, long x0, @T *out) {
  long m = 0;
  for (; m + @V <= M; m += @V) sum_block_@T(x + m * x0, x0, n, out + m);
  for (; m < M; ++m) out[m] = sum_@T(x + m * x0, n);
}
"""
