"""Stored baselines: what is accepted and what is not, and which versions a candidate is held to."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from harness.errors import UserError
from harness.gate.accepting import accept
from harness.gate.arm_rows import ArmRows, keyed_rows, read_arm_folder
from harness.gate.baselines import (
    MANIFEST_FILE,
    Version,
    accepted_as,
    anchors,
    find_manifest,
    read_baseline,
    read_manifest,
)
from harness.gate.codes import EXIT_BASELINE, EXIT_INCOMPLETE, EXIT_REGRESSION, EXIT_USAGE
from harness.gate.comparison import same_row
from harness.gate.fingerprint import Fingerprint, cpu_model, fingerprint_differences, parse_fingerprint
from harness.gate.rules import GateRules, MetricRule
from harness.gate.suite import Suite

sys.path.insert(0, str(Path(__file__).parent))
from gate_rows import HERE, make_scenario, plant_arm

TODAY = date(2026, 11, 26)
COVERAGE = MetricRule(metric="coverage", compare="difference", worse="lower", margin=0.01)
Figures = Callable[[str, int], Mapping[str, Any] | None]


def make_suite(tmp_path: Path, *names: str, nan_allowance: int = 0) -> Suite:
    """A suite of two looks, for the scenarios that the tests plant."""
    return Suite(
        name="suite",
        path=tmp_path / "suite.yaml",
        scenarios=tuple(make_scenario(name) for name in names or ("one",)),
        seeds=tuple(range(6)),
        rules=GateRules(metrics=(COVERAGE,), looks=(3, 6), nan_allowance=nan_allowance),
        launches=1,
        steps=100,
        device="cpu",
        timeout_s=10.0,
    )


def take(
    suite: Suite, folder: Path, figures: Figures = lambda scenario, seed: {}, *, seeds: int = 3, **given: Any
) -> Version:
    """Plant a candidate in a gate's folder and accept it."""
    origin = {name: given.pop(name) for name in ("subject", "fingerprint") if name in given}
    out = folder / f"out-{len(list(folder.iterdir()))}"
    plant_arm(out, "candidate", figures, scenarios=suite.scenarios, seeds=range(seeds), **origin)
    session = {"suite": suite.name, "suite_path": str(suite.path), "arms": {"candidate": "candidate"}}
    (out / "session.json").write_text(json.dumps(session), encoding="utf-8")
    words: dict[str, Any] = {"reason": "why", "expires": None, "release": False, "approver": "me", **given}
    return accept(suite, out, root=None, today=TODAY, **words)


def test_a_version_holds_its_rows_and_says_where_they_are_from(tmp_path: Path) -> None:
    """The rows come back as they were; the manifest names code, packages, seeds, reason and approver."""
    suite = make_suite(tmp_path, "one", "two")
    version = take(suite, tmp_path, lambda scenario, seed: {"coverage": 0.5 + seed / 100}, seeds=4)
    (manifest_path,) = tmp_path.glob(f"baselines/suite/*/{MANIFEST_FILE}")
    manifest = read_manifest(manifest_path.parent)
    assert manifest_path.parent.name == HERE.identity
    assert version.path.name == "v0001.parquet"
    said = dict(manifest.versions[0].said)
    assert said["reason"] == "why"
    assert said["approver"] == "me"
    assert said["seeds"] == [0, 1, 2, 3]
    assert said["config"] == {one.name: one.question for one in suite.scenarios}
    assert {"commit", "packages", "threads", "created", "sha256", "code"} <= said.keys()
    back = read_baseline(manifest, manifest.versions[0])
    (before,) = tmp_path.glob("out-*/candidate")
    written = read_arm_folder(before).rows
    assert back.rows.keys() == written.keys()
    assert all(same_row(back.rows[key], written[key]) for key in written)
    assert "hostname" not in pq.read_schema(version.path).names


def test_versions_are_added_and_never_changed(tmp_path: Path) -> None:
    """The next number, beside the one before."""
    suite = make_suite(tmp_path)
    first = take(suite, tmp_path)
    content = first.path.read_bytes()
    second = take(suite, tmp_path, lambda scenario, seed: {"coverage": 0.9})
    assert [first.name, second.name] == ["v0001", "v0002"]
    assert first.path.read_bytes() == content
    assert [one.name for one in read_manifest(second.path.parent).versions] == ["v0001", "v0002"]


def test_a_candidate_is_held_to_the_previous_version_and_to_the_last_release(tmp_path: Path) -> None:
    """Small steps, each within its margin, do not add up unseen."""
    suite = make_suite(tmp_path)
    take(suite, tmp_path, release=True)
    take(suite, tmp_path)
    take(suite, tmp_path, release=True)
    folder = take(suite, tmp_path).path.parent
    assert [(name, one.name) for name, one in anchors(read_manifest(folder))] == [
        ("previous", "v0004"),
        ("release", "v0003"),
    ]
    take(suite, tmp_path, release=True)
    assert [(name, one.name) for name, one in anchors(read_manifest(folder))] == [("previous", "v0005")]


@pytest.mark.parametrize(
    ("figures", "given", "code", "expected"),
    [
        (lambda _, seed: None if seed == 1 else {}, {}, EXIT_INCOMPLETE, "scenario 'one', seed 1: no row"),
        (
            lambda _, seed: {"status": "failed", "error": "boom"},
            {},
            EXIT_INCOMPLETE,
            "seed 0, 1, 2: its trial failed: boom",
        ),
        (lambda _, seed: {"nan_count": 1}, {}, EXIT_REGRESSION, "met 3 non-finite values and 0 are allowed"),
        (lambda _, seed: {}, {"expires": date(2026, 1, 1)}, EXIT_USAGE, "--expires must be today or later"),
        (
            lambda _, seed: {},
            {"expires": date(2027, 1, 1), "release": True},
            EXIT_USAGE,
            "--release holds until the next one",
        ),
    ],
    ids=["missing row", "failed", "non-finite", "past", "release that expires"],
)
def test_what_is_not_whole_is_not_accepted(
    figures: Figures, given: dict[str, Any], code: int, expected: str, tmp_path: Path
) -> None:
    """A line that says why, and no file."""
    with pytest.raises(UserError) as caught:
        take(make_suite(tmp_path), tmp_path, figures, **given)
    assert caught.value.exit_code == code
    assert expected in str(caught.value)
    assert not (tmp_path / "baselines").exists()


def test_the_allowance_for_non_finite_values_only_falls(tmp_path: Path) -> None:
    """It falls to what the accepted rows met, whatever the suite would allow."""
    suite = make_suite(tmp_path, nan_allowance=9)
    first = take(suite, tmp_path, lambda _, seed: {"nan_count": 2})
    assert first.said["nan_allowance"] == 6
    with pytest.raises(
        UserError, match="met 9 non-finite values and 6 are allowed; the allowance may only fall"
    ):
        take(suite, tmp_path, lambda _, seed: {"nan_count": 3})
    assert take(suite, tmp_path, lambda _, seed: {"nan_count": int(seed == 0)}).said["nan_allowance"] == 1


def test_a_suite_that_has_changed_since_wants_a_new_run(tmp_path: Path) -> None:
    """Rows of another question are not accepted as answers to this one."""
    suite = make_suite(tmp_path)
    take(suite, tmp_path)
    (out,) = tmp_path.glob("out-*")
    other = Suite(
        **{
            **{name: getattr(suite, name) for name in Suite.__dataclass_fields__},
            "scenarios": (make_scenario("one", max_epochs=9),),
        }
    )
    with pytest.raises(UserError, match="scenario 'one' has changed since .* was trained") as caught:
        accept(other, out, root=None, reason="r", expires=None, release=False, approver="me", today=TODAY)
    assert caught.value.exit_code == EXIT_INCOMPLETE


def test_code_that_was_accepted_is_known_on_any_machine(tmp_path: Path) -> None:
    """By the digest of its sources and settings, as long as the acceptance lasts."""
    suite = make_suite(tmp_path)
    elsewhere = {**HERE.to_plain(), "cpu": "another"}
    take(suite, tmp_path, subject="this", fingerprint=elsewhere, expires=date(2026, 12, 1))
    root = tmp_path / "baselines"
    found = accepted_as(root, "suite", "this", TODAY)
    assert found is not None
    assert found.name == "v0001"
    assert accepted_as(root, "suite", "this", date(2026, 12, 2)) is None
    assert accepted_as(root, "suite", "that", TODAY) is None
    assert find_manifest(root, "suite", HERE) is None


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda values: values.update(schema_version=9), "schema_version must be 1 here, got 9"),
        (lambda values: values.pop("fingerprint"), "KeyError: 'fingerprint'"),
        (lambda values: values["fingerprint"].update(cores="2"), "fingerprint.cores must be int, got '2'"),
        (lambda values: values["versions"][0].update(file="../x.parquet"), "must be a name in its folder"),
        (lambda values: values["versions"][0].pop("code"), "KeyError: 'code'"),
        (lambda values: values["versions"][0].update(expires="soon"), "Invalid isoformat string"),
        (lambda values: values.update(versions=3), "TypeError"),
    ],
    ids=["newer", "no fingerprint", "bad fingerprint", "path", "no code", "bad day", "no list"],
)
def test_a_damaged_manifest_is_no_baseline(
    change: Callable[[dict[str, Any]], Any], expected: str, tmp_path: Path
) -> None:
    """It is named with what is wrong, and nothing outside of its folder is opened."""
    folder = take(make_suite(tmp_path), tmp_path).path.parent
    values = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
    change(values)
    (folder / MANIFEST_FILE).write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(UserError) as caught:
        read_manifest(folder)
    assert caught.value.exit_code == EXIT_BASELINE
    assert expected in str(caught.value)


def test_a_flipped_bit_in_a_baseline_is_seen(tmp_path: Path) -> None:
    """Its digest is not that of the manifest."""
    version = take(make_suite(tmp_path), tmp_path)
    content = bytearray(version.path.read_bytes())
    content[len(content) // 2] ^= 1
    version.path.write_bytes(bytes(content))
    with pytest.raises(UserError, match="is not the file that its manifest names") as caught:
        read_baseline(read_manifest(version.path.parent), version)
    assert caught.value.exit_code == EXIT_BASELINE


def test_fingerprints_say_what_differs() -> None:
    """Field by field; the identity is a folder's name and follows every field."""
    other = Fingerprint(**{**HERE.to_plain(), "torch": "3", "cores": 8})
    assert fingerprint_differences(HERE, other) == ["cores: 2 there, 8 here", "torch: 2 there, 3 here"]
    assert HERE.identity != other.identity
    assert parse_fingerprint(HERE.to_plain()) == HERE
    assert HERE.identity.replace("-", "").isalnum()


def test_a_processor_has_a_name_everywhere(tmp_path: Path) -> None:
    """From /proc where that is, else whatever the system says."""
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(
        "processor: 0\ncpu family\t: 6\nmodel\t\t: 85\nmodel name\t: Some CPU\n\nprocessor: 1\n",
        encoding="utf-8",
    )
    assert cpu_model(cpuinfo) == "Some CPU (6/85)"
    assert cpu_model(tmp_path / "none")


def test_rows_of_a_run_have_a_scenario_for_each_config() -> None:
    """Rows that no gate wrote are told apart by task and config."""
    import pyarrow as pa

    rows = [{"task": "dose", "config_id": name, "seed": seed} for name in "ab" for seed in (0, 1)]
    keyed = keyed_rows(pa.Table.from_pylist(rows), "a run")
    assert ArmRows("a run", keyed).scenarios == ["dose a", "dose b"]


def test_rows_are_the_same_in_what_both_say() -> None:
    """Bit for bit: NaN is NaN, a list is its values; columns of newer code and times do not count."""
    row = {
        "coverage": 0.8,
        "loss": float("nan"),
        "curve": [0.1, float("nan")],
        "error": "",
        "duration_s": 1.0,
    }
    assert same_row(row, {**row, "curve": [0.1, float("nan")], "duration_s": 2.0, "newer": 1.0})
    assert same_row(row, {**row, "loss": None, "error": None})
    assert not same_row(row, {**row, "coverage": 0.8000000000000002})
    assert not same_row(row, {**row, "curve": [0.1, 0.2]})
    assert not same_row(row, {**row, "curve": [0.1]})
    assert not same_row(row, {**row, "loss": 0.0})
