"""What each threshold would do: false rejections, false acceptances and bottoms, as curves over tau_infer."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

CURVE_NAMES = ("taus", "fn_in", "fp_cens", "bottom_rate")


def tau_infer_sweep_from_q_abs(
    q_abs: Tensor, is_in_range: Tensor, taus: Sequence[float] | Iterable[float]
) -> dict[str, list[float]]:
    """Rates that strict decoding would have at each threshold, in the order of `taus`.

    `q_abs` holds |Q| of any shape, `is_in_range` booleans of the same shape (False: censored). The result
    has lists `taus`, `fn_in` (share of in-range rows that are bottom), `fp_cens` (share of censored rows
    that are accepted) and `bottom_rate`; a rate over no rows is NaN. A row is bottom when |Q| < tau, compared
    in the dtype of `q_abs`, or when |Q| is not finite.

    Unlike zeroproofml 0.6.1 non-finite |Q| counts as bottom, as strict decoding has it, and a threshold that
    is NaN, infinite or negative is a ValueError; so is a negative |Q|.
    """
    q, in_range = checked_rows(q_abs, is_in_range)
    thresholds = [_checked_tau(tau) for tau in taus]
    # Rounded as strict decoding rounds them; from there on float64 holds both sides exactly.
    bounds = torch.tensor(thresholds, dtype=q.dtype).to(torch.float64)
    q = q.to(torch.float64)
    bottoms_in = _count_bottoms(q[in_range], bounds)
    bottoms_out = _count_bottoms(q[~in_range], bounds)
    n_in = int(in_range.sum())
    n_out = len(q) - n_in
    return {
        "taus": thresholds,
        "fn_in": [_rate(count, n_in) for count in bottoms_in],
        "fp_cens": [1.0 - _rate(count, n_out) for count in bottoms_out],
        "bottom_rate": [_rate(a + b, len(q)) for a, b in zip(bottoms_in, bottoms_out, strict=True)],
    }


def checked_rows(q_abs: Tensor, is_in_range: Tensor) -> tuple[Tensor, Tensor]:
    """Both as flat CPU tensors; TypeError for other types, ValueError for shapes or signs that cannot be."""
    q = torch.as_tensor(q_abs).detach().cpu()
    in_range = torch.as_tensor(is_in_range).detach().cpu()
    if not q.is_floating_point():
        raise TypeError(f"q_abs must be real floating point, got {q.dtype}")
    if in_range.dtype != torch.bool:
        if in_range.numel():
            raise TypeError(f"is_in_range must be boolean, got {in_range.dtype}")
        in_range = in_range.to(torch.bool)
    if q.shape != in_range.shape:
        raise ValueError(
            f"q_abs and is_in_range must have one shape, got {tuple(q.shape)} and {tuple(in_range.shape)}"
        )
    if bool((q < 0).any()):
        raise ValueError(f"q_abs must be >= 0, got {float(q[q < 0][0])}")
    return q.reshape(-1), in_range.reshape(-1)


def tau_infer_sweep_report(curves: Mapping[str, Sequence[float]], *, title: str | None = None) -> str:
    """The curves as a Markdown page with one table row per threshold; "n/a" for a rate over no rows."""
    _check_curves(curves)
    lines = [
        f"# {title or 'tau_infer sweep'}",
        "",
        "Bottom where `|Q| < τ_infer` or `|Q|` is not finite.",
        "",
        "| τ_infer | FN_in | FP_cens | bottom_rate |",
        "|---:|---:|---:|---:|",
    ]
    for tau, *rates in zip(*(curves[name] for name in CURVE_NAMES), strict=True):
        cells = " | ".join("n/a" if math.isnan(rate) else f"{rate:.6f}" for rate in rates)
        lines.append(f"| {tau:.3e} | {cells} |")
    return "\n".join(lines) + "\n"


def write_tau_infer_sweep(
    out_dir: str | Path,
    curves: Mapping[str, Sequence[float]],
    *,
    provenance: Mapping[str, object] | None = None,
    basename: str = "tau_infer_sweep",
) -> dict[str, object]:
    """Write the curves as BASENAME.json and BASENAME.md under `out_dir`, and return what the JSON says.

    A rate over no rows is written as null. `provenance` should name the split that the curves were computed
    on; it is written as given and must be JSON.
    """
    _check_curves(curves)
    folder = Path(out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    plain = {
        name: [None if math.isnan(value) else float(value) for value in curves[name]] for name in CURVE_NAMES
    }
    payload: dict[str, object] = {"curves": plain, "provenance": dict(provenance or {})}
    text = json.dumps(payload, indent=2, sort_keys=True, allow_nan=False)
    (folder / f"{basename}.json").write_text(text + "\n", encoding="utf-8")
    (folder / f"{basename}.md").write_text(tau_infer_sweep_report(curves), encoding="utf-8")
    return payload


def _checked_tau(tau: float) -> float:
    value = float(tau)
    if not (math.isfinite(value) and value >= 0.0):
        raise ValueError(f"taus must be finite and >= 0, got {tau=}")
    return value


def _count_bottoms(q: Tensor, bounds: Tensor) -> list[int]:
    finite = q[torch.isfinite(q)].sort().values
    # side="left": how many are strictly below, so that |Q| equal to the threshold is accepted.
    below = torch.searchsorted(finite, bounds, side="left")
    return (below + (len(q) - len(finite))).tolist()


def _rate(count: int, total: int) -> float:
    return count / total if total else math.nan


def _check_curves(curves: Mapping[str, Sequence[float]]) -> None:
    missing = [name for name in CURVE_NAMES if name not in curves]
    if missing:
        raise ValueError(f"curves must have {', '.join(CURVE_NAMES)}, missing: {', '.join(missing)}")
    lengths = {name: len(curves[name]) for name in CURVE_NAMES}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"curves must have one length, got {lengths}")
