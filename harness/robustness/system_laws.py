"""The table of the laws of the system around the model: trainings, files, plans, decisions, and histories.

They see a subject's attributes only, which `own_system` says of this project.
"""

from __future__ import annotations

from harness.robustness.gate_laws import GATE_LAWS
from harness.robustness.law import Property
from harness.robustness.machines import MACHINES, machine_property
from harness.robustness.plan_laws import PLAN_LAWS
from harness.robustness.ranking_laws import RANKING_LAWS
from harness.robustness.storage_laws import STORAGE_LAWS
from harness.robustness.training_laws import TRAINING_LAWS

SYSTEM_LAWS: list[Property] = sorted(
    [*TRAINING_LAWS, *STORAGE_LAWS, *PLAN_LAWS, *RANKING_LAWS, *GATE_LAWS, *map(machine_property, MACHINES)],
    key=lambda prop: prop.group,
)
