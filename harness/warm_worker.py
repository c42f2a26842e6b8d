"""Imported by the workers of a local Ray when they start, before they take work: see `harness.warm_start`."""

from __future__ import annotations

import importlib

from harness.warm_start import noted

# The first optimizer that a process makes imports torch's compiler, which takes a second.
MODULES = ("harness.segments", "pyarrow.compute", "torch._dynamo")

with noted():
    for module in MODULES:
        importlib.import_module(module)
