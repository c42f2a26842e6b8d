"""`python -m harness.cli`: the same as the console script."""

from __future__ import annotations

from harness.cli.main import entry

entry()
