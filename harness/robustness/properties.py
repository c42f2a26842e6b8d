"""The table of properties: one line for each, by name."""

from __future__ import annotations

from collections.abc import Iterable

from harness.robustness.coverage_laws import COVERAGE_LAWS
from harness.robustness.decode_laws import DECODE_LAWS
from harness.robustness.law import Property
from harness.robustness.layer_laws import LAYER_LAWS
from harness.robustness.loss_laws import LOSS_LAWS
from harness.robustness.policy_laws import POLICY_LAWS
from harness.robustness.target_laws import TARGET_LAWS


def _by_name(laws: Iterable[Property]) -> dict[str, Property]:
    table: dict[str, Property] = {}
    for law in sorted(laws, key=lambda law: law.group):  # a stable sort: within a group as listed
        if law.name in table:
            raise ValueError(f"two properties are called {law.name!r}")
        table[law.name] = law
    return table


PROPERTIES: dict[str, Property] = _by_name(
    [*LOSS_LAWS, *COVERAGE_LAWS, *DECODE_LAWS, *TARGET_LAWS, *LAYER_LAWS, *POLICY_LAWS]
)
"""Every property by name, in the order of the groups of docs/robustness_laws.md."""
