"""Which machine and libraries numbers were measured on: what may be compared with what.

Rows of different fingerprints are never compared: another CPU rounds otherwise and takes other times.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Fingerprint:
    """What decides whether numbers compare; every field is text or a count, and part of the identity."""

    cpu: str
    cores: int
    architecture: str
    capability: str  # the instructions that torch uses
    python: str
    torch: str
    device: str  # cpu, or the accelerator by name

    @property
    def identity(self) -> str:
        """A name for folders: the architecture, the kind of device, and a hash of every field."""
        text = json.dumps(asdict(self), sort_keys=True)
        kind = "cpu" if self.device == "cpu" else "gpu"
        plain = "".join(letter if letter.isalnum() else "-" for letter in self.architecture)
        return f"{plain}-{kind}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"

    def to_plain(self) -> dict[str, Any]:
        """The fields by name."""
        return asdict(self)


def machine_fingerprint(told: Mapping[str, Any]) -> Fingerprint:
    """The fingerprint of this machine with what a worker told of its interpreter (`launch.answer_hello`)."""
    return Fingerprint(
        cpu=cpu_model(),
        cores=usable_cores(),
        architecture=platform.machine() or "unknown",
        capability=str(told["capability"]),
        python=".".join(str(told["python"]).split(".")[:2]),
        torch=str(told["torch"]),
        device=str(told["device"]),
    )


def parse_fingerprint(values: Mapping[str, Any]) -> Fingerprint:
    """The fingerprint that `to_plain` gave; ValueError where a field is missing or of another type."""
    read: dict[str, Any] = {}
    for field in fields(Fingerprint):
        value = values.get(field.name)
        wanted = int if field.name == "cores" else str
        if isinstance(value, bool) or not isinstance(value, wanted):
            raise ValueError(f"fingerprint.{field.name} must be {wanted.__name__}, got {value!r}")
        read[field.name] = value
    return Fingerprint(**read)


def fingerprint_differences(stored: Fingerprint, here: Fingerprint) -> list[str]:
    """What differs, each as `field: stored there, other here`; empty where nothing does."""
    return [
        f"{field.name}: {getattr(stored, field.name)} there, {getattr(here, field.name)} here"
        for field in fields(Fingerprint)
        if getattr(stored, field.name) != getattr(here, field.name)
    ]


def usable_cores() -> int:
    """How many CPUs this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on this system
        return os.cpu_count() or 1


def cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor by name; on Linux with family and model, as hosts call many processors the same."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").split("\n\n")[0].splitlines()
    except OSError:
        lines = []
    said = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name = said.get("model name") or platform.processor() or platform.machine() or "unknown"
    numbers = [said[key] for key in ("cpu family", "model") if said.get(key)]
    return f"{name} ({'/'.join(numbers)})" if numbers else name
