"""Rows of a gate as tests plant them: arms that were never trained, with the figures that a test is about."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from harness.gate.arm_rows import ArmStore
from harness.gate.fingerprint import Fingerprint
from harness.gate.suite import Scenario

HERE = Fingerprint(
    cpu="a processor",
    cores=2,
    architecture="x86_64",
    capability="AVX2",
    python="3.11",
    torch="2",
    device="cpu",
)


def make_scenario(name: str = "one", **pinned: Any) -> Scenario:
    """A scenario of a task that nobody loads."""
    return Scenario(name=name, task="dose", params={"like": name}, base_dir=Path(), pinned=pinned, tested={})


def outcome(**figures: Any) -> dict[str, Any]:
    """What a good trial says, but for `figures`."""
    return {
        "status": "completed",
        "error": "",
        "epochs": 3,
        "nan_count": 0,
        "nan_loss": 0,
        "nan_gradient": 0,
        "nan_output": 0,
        "nan_parameter": 0,
        "coverage": 0.8,
        "accepted_error": 1.0,
        **figures,
    }


def origin_of(arm: str, scenarios: Sequence[Scenario], **more: Any) -> dict[str, Any]:
    """What an arm's folder says of itself."""
    return {
        "arm": arm,
        "label": arm,
        "suite": "suite",
        "digest": f"digest-{arm}",
        "question": "asked",
        "questions": {one.name: one.question for one in scenarios},
        "code": f"code-{arm}",
        "subject": f"subject-{arm}",
        "commit": None,
        "commit_dirty": None,
        "packages": {"torch_version": "2"},
        "threads": 1,
        "fingerprint": HERE.to_plain(),
        **more,
    }


def plant_arm(
    folder: Path,
    arm: str,
    figures: Callable[[str, int], Mapping[str, Any] | None],
    *,
    scenarios: Sequence[Scenario] | None = None,
    seeds: Sequence[int] = range(5),
    launch_ms: Callable[[str, int], float] | None = None,
    pairs: str = "pair",
    data: str = "digest of the data",
    **origin: Any,
) -> Path:
    """Write an arm's folder: `figures` gives what a trial of a scenario and seed says, None for no row."""
    used = [make_scenario()] if scenarios is None else list(scenarios)
    store = ArmStore(folder / arm, origin_of(arm, used, **origin))
    for one in used:
        for place, seed in enumerate(seeds):
            said = figures(one.name, seed)
            if said is None:
                continue
            told = {"outcome": outcome(**said), "active": {}, "data_digest": f"{data} {seed}", "checks": 1000}
            store.add(one, seed, told, {"torch_version": "2", "device": "cpu"})
            if launch_ms is not None:
                at = datetime(2026, 1, 1, tzinfo=UTC)
                store.add_launch(one.name, seed, f"{pairs}-{place}", 0, launch_ms(one.name, seed), at)
    store.close()
    return folder / arm
