"""What every benchmark refuses at the start, in one line: it would fail after minutes of measuring."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch

NO_FOLDER = "there is no folder no_such_folder"
NOT_HERE = (["--device", "cuda"], "--device: there is no cuda here")
NUMBERED = (["--device", "gpu"], "--device: must be cpu or cuda[:i], got 'gpu'")
WORKERS = [
    (["--workers", told], f"--workers: must be a whole number >= 1, got {told!r}") for told in ("0", "a")
]


def absent(*options: str) -> list[tuple[list[str], str]]:
    return [([option, "no_such_folder/out"], f"{option}: {NO_FOLDER}") for option in options]


REFUSED: dict[str, list[tuple[list[str], str]]] = {
    "step_time": [NUMBERED, NOT_HERE, *absent("--json")],
    "peer_domains": [*WORKERS, *absent("--json")],
    "peer_counterexamples": [*absent("--json", "--markdown")],
    "gate_calibration": [*absent("--json", "--markdown")],
    "coverage_control": [*WORKERS, *absent("--json")],
    "failure_modes": [
        NUMBERED,
        NOT_HERE,
        (["--ids", "F11"], "--ids: invalid choice: 'F11'"),
        *absent("--json", "--parquet", "--markdown"),
    ],
    "mutation": [
        (["--share", "0"], "--share: must be a number in (0, 1], got '0'"),
        (["--share", "nan"], "--share: must be a number in (0, 1], got 'nan'"),
        (["--share", "0.5", "--quick"], "--quick: not allowed with argument --share"),
        (["--jobs", "0"], "--jobs: must be a whole number >= 1, got '0'"),
        (["--subjects", "loss"], "--subjects: invalid choice: 'loss'"),
        *absent("--resume", "--json", "--markdown"),
    ],
    "sweep_throughput": [
        (["--device", "gpu"], "--device: must be cpu or cuda, got 'gpu'"),
        NOT_HERE,
        (["--part", "half"], "--part: invalid choice: 'half'"),
        *absent("--json", "--markdown"),
    ],
}


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [(name, *case) for name, cases in REFUSED.items() for case in cases],
)
@pytest.mark.usefixtures("with_peer")
def test_bad_arguments_are_refused_before_anything_runs(
    load_benchmark: Callable[[str], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Also a device that is not there is an error of its own code, never taken for a missed target."""
    bench = load_benchmark(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as caught:
        bench.main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
