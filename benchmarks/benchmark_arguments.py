"""Arguments that several benchmarks take, refused before anything is measured."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch


def device(text: str) -> str:
    """Take ``cpu`` or ``cuda[:i]``, where it is there."""
    kind, _, number = text.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdecimal()):
        raise argparse.ArgumentTypeError(f"must be cpu or cuda[:i], got {text!r}")
    if kind == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("there is no cuda here")
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(f"there are {torch.cuda.device_count()} cuda devices, got {text!r}")
    return text


def positive(text: str) -> int:
    """Take a whole number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number >= 1, got {text!r}")
    return int(text)


def file_to_write(text: str) -> Path:
    """Take a file in a folder that is there."""
    if not Path(text).parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {Path(text).parent}")
    return Path(text)
