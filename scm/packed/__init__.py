"""Many trials trained as one vectorised model, each with its own settings, streams, fate and results."""

from __future__ import annotations

from scm.packed.eligibility import pack_signature, why_not_packable
from scm.packed.engine import PackedTrainer
from scm.packed.lanes import Entrant, NotPackable, PackTrial, look_at
from scm.packed.reports import PackEpoch

__all__ = [
    "Entrant",
    "NotPackable",
    "PackEpoch",
    "PackTrial",
    "PackedTrainer",
    "look_at",
    "pack_signature",
    "why_not_packable",
]
