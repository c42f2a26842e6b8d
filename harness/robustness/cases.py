"""Cases as text and back, bit for bit: NaN payloads, signed zeros and dtypes stay what they are."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from harness.robustness.law import Case

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
        torch.int8,
        torch.int16,
        torch.int32,
        torch.int64,
        torch.uint8,
        torch.bool,
    )
}
_SHOWN = 8  # values of a tensor that a line shows


def encode_case(case: Case) -> str:
    """A case as one line of JSON; TypeError for a value that is neither a tensor nor plain."""
    return json.dumps({name: _encode(name, value) for name, value in case.items()}, allow_nan=False)


def decode_case(text: str) -> dict[str, Any]:
    """The case that `encode_case` wrote, its tensors on the CPU; ValueError for any other text."""
    try:
        held = json.loads(text)
        return {str(name): _decode(value) for name, value in held.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(
            f"a case must be text of encode_case, got {text[:60]!r} ({type(error).__name__}: {error})"
        ) from None


def show_case(case: Case) -> str:
    """A case for people, in one line.

    >>> show_case({"Q": torch.tensor([0.0, 1e-6]), "tau": 1e-6})
    'Q=[0, 1e-06], tau=1e-06'
    """
    return ", ".join(f"{name}={_show(value)}" for name, value in case.items())


def _encode(name: str, value: Any) -> Any:
    if isinstance(value, Tensor):
        held = value.detach().cpu().contiguous()
        kind = str(held.dtype).removeprefix("torch.")
        if kind not in _DTYPES:
            raise TypeError(f"a tensor of a case must be one of {', '.join(_DTYPES)}, got {name} of {kind}")
        raw = held.reshape(-1).view(torch.uint8).numpy().tobytes() if held.numel() else b""
        return {"dtype": kind, "shape": list(held.shape), "bytes": base64.b64encode(raw).decode("ascii")}
    if isinstance(value, bool | int | str) or value is None:
        return {"value": value}
    if isinstance(value, float):
        return {"float": value.hex() if math.isfinite(value) else repr(value)}
    if isinstance(value, list | tuple):
        return {"items": [_encode(name, item) for item in value]}
    if isinstance(value, Mapping):
        return {"mapping": {str(key): _encode(name, item) for key, item in value.items()}}
    raise TypeError(
        f"a case must hold tensors, numbers, texts, lists and mappings of them, "
        f"got {name} of type {type(value).__name__}"
    )


def _decode(held: Mapping[str, Any]) -> Any:
    if "dtype" in held:
        raw = bytearray(base64.b64decode(held["bytes"], validate=True))
        dtype, shape = _DTYPES[held["dtype"]], held["shape"]
        if not raw:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(raw, dtype=torch.uint8).view(dtype).reshape(shape)
    if "float" in held:
        text = held["float"]
        return float.fromhex(text) if "0x" in text else float(text)
    if "items" in held:
        return [_decode(item) for item in held["items"]]
    if "mapping" in held:
        return {key: _decode(item) for key, item in held["mapping"].items()}
    return held["value"]


def _show(value: Any) -> str:
    if isinstance(value, Tensor):
        flat = value.reshape(-1)
        few = ", ".join(f"{item:.9g}" for item in flat[:_SHOWN].tolist())
        more = f", ... ({flat.numel()})" if flat.numel() > _SHOWN else ""
        kind = str(value.dtype).removeprefix("torch.")
        return f"[{few}{more}]" + ("" if value.dtype == torch.float32 else f" {kind}")
    if isinstance(value, float):
        return f"{value:.9g}"
    return str(value)
