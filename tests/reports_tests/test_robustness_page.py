"""The page of a robustness run: its numbers as plain data, and that nothing in it can act."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from reports.pages import shade
from reports.robustness_page import PARTS, write_page
from reports.robustness_shift import write_shift
from reports.robustness_view import (
    MOST_BROKEN,
    MOST_CONFIGS,
    abstention,
    answer,
    broken_laws,
    command_of,
    fault_figures,
    matrix,
    ordered_configs,
    page_view,
    shift_figures,
    verdict_table,
)

CONFIGS = ["c44a74ec8e1b", "4b470cb9238f", "0c1fbc2caec5"]
FAULTS = {"nonfinite_labels": 0.9, "label_flips": 0.6, "gradient_spikes": 0.95, "half_overflow": 0.2}
SEVERITIES = {"low": 0.01, "middle": 0.1, "high": 0.5}


def made_cells() -> list[dict[str, Any]]:
    rows = []
    for place, config in enumerate(CONFIGS):
        for seed in (0, 1):
            for fault, kept in FAULTS.items():
                for step, (severity, strength) in enumerate(SEVERITIES.items()):
                    retained = max(0.0, kept - 0.12 * step - 0.08 * place + 0.02 * seed)
                    failed = fault == "half_overflow" and severity == "high"
                    away = fault == "gradient_spikes" and place == 2
                    rows.append(
                        {
                            "config_id": config,
                            "trial_id": f"{config}-s{seed}",
                            "seed": seed,
                            "fault": fault,
                            "severity": severity,
                            "strength": strength,
                            "status": "not_applicable" if away else "failed" if failed else "completed",
                            "reason": "no gradient is clipped by this config" if away else "",
                            "error": "RuntimeError: overflow" if failed else "",
                            "nan_count": 7 * step if fault == "nonfinite_labels" else 0,
                            "nan_loss": 7 * step if fault == "nonfinite_labels" else 0,
                            "nan_gradient": 0,
                            "nan_output": 0,
                            "nan_parameter": 0,
                            "coverage": 0.0 if failed else 0.9 - 0.1 * step,
                            "accepted_error": math.nan if failed else 40.0 / (retained + 0.1),
                            "charged_error": math.nan if failed else 50.0 / (retained + 0.05),
                            "clean_coverage": 0.92,
                            "clean_accepted_error": 38.0,
                            "clean_charged_error": 48.0 + place,
                            "retained": None if away else 0.0 if failed else retained,
                            "recovered": step < 2 if fault == "gradient_spikes" else None,
                            "epochs_to_recover": 3 if fault == "gradient_spikes" and step < 2 else None,
                        }
                    )
    return rows


def made_scores() -> list[dict[str, Any]]:
    return [
        {
            "config_id": config,
            "robustness": 0.74 - 0.11 * place,
            "low": 0.66 - 0.11 * place,
            "high": 0.81 - 0.11 * place,
            "adversarial_fault": "half_overflow",
            "adversarial_severity": "high",
            "adversarial_retained": 0.0,
            "recovered_share": 0.67,
            "n_measured": 24,
            "n_failed": 2,
        }
        for place, config in enumerate(CONFIGS)
    ]


def made_verdicts() -> list[dict[str, Any]]:
    rows = []
    for config in CONFIGS:
        for seed in (0, 1):
            for name in (
                "bottom_has_no_number",
                "permuted_rows",
                "decode_is_monotone_in_tau",
                "half_precision",
            ):
                broken = name == "bottom_has_no_number" and config == CONFIGS[2]
                away = name == "half_precision"
                rows.append(
                    {
                        "config_id": config,
                        "trial_id": f"{config}-s{seed}",
                        "property": name,
                        "status": "not_applicable" if away else "broken" if broken else "holds",
                        "message": "the subject has no half" if away else "",
                    }
                )
    return rows


def made_counterexamples() -> list[dict[str, Any]]:
    return [
        {
            "id": f"3f9a1c{seed}",
            "property": "bottom_has_no_number",
            "message": "row 0 is accepted at |Q| = 0",
            "shown": "inputs=[0, 1.5], tau=1e-06",
            "config_id": CONFIGS[2],
            "trial_id": f"{CONFIGS[2]}-s{seed}",
            "status": "broken",
        }
        for seed in (0, 1)
    ]


def made_shift() -> list[dict[str, Any]]:
    rows = []
    for place, config in enumerate(CONFIGS):
        for seed in (0, 1):
            for name, levels in {"near_pole": (None, 0.5, 0.2, 0.05), "noise": (None, 0.01, 0.1)}.items():
                for step, level in enumerate(levels):
                    share = [0.1 * (i + 1) for i in range(10)]
                    rows.append(
                        {
                            "config_id": config,
                            "trial_id": f"{config}-s{seed}",
                            "seed": seed,
                            "model_digest": "d" * 16,
                            "shift": name,
                            "made_by": "task",
                            "step": step,
                            "level": level,
                            "rows": 300,
                            "labelled_bottom": 20 + 50 * step,
                            "tau_infer": 0.05,
                            "error_unit": "days",
                            "coverage": 0.93 - 0.15 * step - 0.05 * place + 0.03 * seed,
                            "accepted_error": 40.0 * (1 + step) ** 1.5,
                            "charged_error": 60.0 * (1 + step) ** 1.5 + 10 * place,
                            "false_accept_rate": 0.1 * step,
                            "false_reject_rate": 0.05 * step,
                            "curve_coverage": share,
                            "curve_error": [20.0 + 60 * (1 + step) * s**2 + 5 * place for s in share],
                            "curve_area": 40.0 + step,
                            "bottom_auc": 0.97 - 0.1 * step,
                            "pole_correlation": 0.8 - 0.1 * step,
                            "near_within": 0.08,
                            "near_rows": 30,
                            "bottoms_near": 0.6,
                            "bottoms_far": 0.01 * step,
                            "error": "",
                        }
                    )
    return rows


def made_parts() -> dict[str, Any]:
    return {
        "cells": made_cells(),
        "scores": made_scores(),
        "verdicts": made_verdicts(),
        "counterexamples": made_counterexamples(),
        "shift": made_shift(),
    }


PROVENANCE = {
    "command": "scm-harness robustness runs/demo/gbsg2 --top 3 --profile smoke",
    "profile": "smoke",
    "seeds": [0, 1],
    "faults": list(FAULTS),
    "scm_harness_version": "0.1",
}


def write_folder(folder: Path, **changes: list[dict[str, Any]] | None) -> Path:
    """Write all parts, with some replaced; None leaves a part out."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (made_parts() | changes).items():
        if rows is None:
            continue
        if name == "shift":
            write_shift(folder, rows)
        else:
            pq.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet")
    (folder / "robustness.json").write_text(json.dumps(PROVENANCE), encoding="utf-8")
    return folder


def parts(**changes: Any) -> dict[str, Any]:
    held: dict[str, Any] = made_parts()
    return held | changes


class Elements(HTMLParser):
    """Every element of a page, with its attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_configs_stand_by_their_robustness():
    """The most robust first, those without a score last; every part's configs are there."""
    held = parts(scores=made_scores()[::-1])
    held["cells"].append({**held["cells"][0], "config_id": "unscored"})
    assert ordered_configs(held) == [*CONFIGS, "unscored"]


def test_the_answer_has_scores_laws_and_the_adversarial_cell():
    """One entry per config, from scores and verdicts."""
    entries = answer(parts(), CONFIGS)
    assert [entry["robustness"] for entry in entries] == pytest.approx([0.74, 0.63, 0.52])
    assert [entry["broken"] for entry in entries] == [[], [], ["bottom_has_no_number"]]
    assert [entry["tried"] for entry in entries] == [3, 3, 3]
    assert entries[0]["adversarial"] == "half_overflow:high"
    assert (entries[0]["n_failed"], entries[0]["n_measured"]) == (2, 24)


def test_curves_are_means_over_seeds_beside_the_clean_twin():
    """Each severity's mean and range; a failed trial makes a mean that is not finite; what does not apply
    has no line."""
    figures = {figure["name"]: figure for figure in fault_figures(made_cells(), CONFIGS)}
    assert figures["label_flips"]["labels"] == ["clean", "low", "middle", "high"]
    retained, charged, coverage = figures["label_flips"]["panels"]
    assert retained["series"][0]["values"] == pytest.approx([None, 0.61, 0.49, 0.37])
    assert retained["series"][0]["low"] == pytest.approx([None, 0.6, 0.48, 0.36])
    assert charged["series"][1]["values"][0] == 49.0
    assert coverage["series"][0]["values"] == pytest.approx([0.92, 0.9, 0.8, 0.7])
    overflow = figures["half_overflow"]["panels"]
    assert math.isnan(overflow[1]["series"][0]["values"][3])
    assert overflow[0]["series"][0]["values"][3] == 0.0
    spikes = figures["gradient_spikes"]
    assert [item["name"] for item in spikes["panels"][0]["series"]] == CONFIGS[:2]
    assert spikes["not_applicable"] == ["no gradient is clipped by this config"]


def test_the_matrix_says_what_became_of_every_cell():
    """Missing, not applicable, gone wrong, recovered, and non-finite values by kind."""
    cells = [row for row in made_cells() if row["config_id"] != CONFIGS[1] or row["fault"] != "label_flips"]
    rows = {(row["fault"], row["severity"]): row for row in matrix(cells, CONFIGS)}
    assert rows["label_flips", "low"]["cells"][1] is None
    assert rows["gradient_spikes", "low"]["cells"][2] == {
        "applies": False,
        "why": "no gradient is clipped by this config",
    }
    spikes = rows["gradient_spikes", "high"]["cells"][0]
    assert (spikes["recovered"], spikes["asked"], spikes["epochs_to_recover"]) == (0, 2, None)
    overflow = rows["half_overflow", "high"]["cells"][0]
    assert (overflow["wrong"], overflow["seeds"], overflow["error"]) == (2, 2, "RuntimeError: overflow")
    labels = rows["nonfinite_labels", "high"]["cells"][0]
    assert (labels["nan_count"], labels["nan_kinds"]) == (28, {"loss": 28})
    assert rows["label_flips", "low"]["strength"] == 0.01


def test_shift_curves_are_coverage_by_level_and_error_by_coverage():
    """From data not shifted to the last level, with the curve of the first seed at both ends."""
    near, noise = shift_figures(made_shift(), CONFIGS)
    assert near["levels"] == [None, 0.5, 0.2, 0.05]
    assert near["unit"] == "days"
    assert near["panels"][0]["series"][0]["values"] == pytest.approx([0.945, 0.795, 0.645, 0.495])
    assert [curve["step"] for curve in near["curves"]] == [0, 3]
    assert near["curves"][0]["series"][0]["values"][-1] == pytest.approx(80.0)
    assert noise["levels"] == [None, 0.01, 0.1]
    rows = abstention(made_shift(), CONFIGS)
    assert len(rows) == 3 * 7
    assert rows[1]["bottom_auc"] == pytest.approx(0.87)


def test_verdicts_are_counted_with_the_reason_of_what_was_not_tried():
    """Broken properties first."""
    first, *others = verdict_table(made_verdicts())
    assert (first["property"], first["broken"], first["holds"]) == ("bottom_has_no_number", 2, 4)
    half = next(row for row in others if row["property"] == "half_precision")
    assert (half["not_applicable"], half["why"]) == (6, "the subject has no half")


def test_a_broken_law_has_its_case_and_its_command():
    """The command is the row's own where it has one; very many are counted, not shown."""
    first = broken_laws(made_counterexamples())["shown"][0]
    assert first["command"] == "scm-harness replay 3f9a1c0"
    assert first["shown"] == "inputs=[0, 1.5], tau=1e-06"
    many = [{**made_counterexamples()[0], "id": str(index)} for index in range(MOST_BROKEN + 3)]
    held = broken_laws(many)
    assert (len(held["shown"]), held["left_out"]) == (MOST_BROKEN, 3)
    assert broken_laws([{"id": "a; rm -rf /"}])["shown"][0]["command"] == "scm-harness replay 'a; rm -rf /'"
    assert broken_laws(None) is None


def test_the_page_begins_with_the_answer(tmp_path: Path):
    """Score with its interval, laws, adversarial cell; then laws, curves, matrix, shift, provenance."""
    page = write_page(write_folder(tmp_path / "run" / "robustness")).read_text(encoding="utf-8")
    assert "Robustness of run" in page
    assert "<strong>0.74</strong>" in page
    assert "0.66 – 0.81" in page
    heads = re.findall(r"<h2>(.*?)</h2>", page)
    assert heads == [
        "Broken laws",
        "Degradation under training faults",
        "The matrix",
        "Domain shift",
        "Provenance",
    ]
    assert "Laws are broken by 1 of 3 configs." in page
    assert "scm-harness replay 3f9a1c0" in page
    assert "scm-harness robustness runs/demo/gbsg2 --top 3 --profile smoke" in page
    assert page.count("<svg") >= 4 * 3 + 2 * 4
    assert "missing" not in re.sub(r"<style>.*?</style>", "", page, flags=re.S)


@pytest.mark.parametrize("gone", [*PARTS, "everything"])
def test_a_part_that_is_missing_is_said(tmp_path: Path, gone: str):
    """The page is made of what is there, and names the file that is not."""
    names = list(PARTS) if gone == "everything" else [gone]
    folder = write_folder(tmp_path / "robustness", **dict.fromkeys(names))
    if gone == "everything":
        (folder / "robustness.json").unlink()
        names = [*names, "robustness.json"]
    page = write_page(folder).read_text(encoding="utf-8")
    for name in names:
        assert f"{name if '.' in name else name + '.parquet'} is missing" in page


def test_a_file_that_is_corrupt_or_empty_is_said(tmp_path: Path):
    """Damage is named in its place, tables without rows say that there is nothing, and the rest is shown."""
    folder = write_folder(tmp_path / "robustness", shift=[])
    (folder / "cells.parquet").write_bytes(b"PAR1 no")
    (folder / "robustness.json").write_text("{", encoding="utf-8")
    page = write_page(folder).read_text(encoding="utf-8")
    assert "cells.parquet cannot be read as Parquet" in page
    assert "robustness.json cannot be read as JSON" in page
    assert "No shift was measured." in page
    assert "<strong>0.74</strong>" in page


HOSTILE = "</style></svg><script>alert(1)</script><img src=x onerror=alert(1)>\"'`{{7*7}}{% raw %}"


def test_hostile_texts_are_inert(tmp_path: Path):
    """Names and messages from a task, wherever they stand, make no element and no attribute."""
    cells = [{**row, "fault": HOSTILE, "reason": HOSTILE, "error": HOSTILE} for row in made_cells()[:4]]
    cells.append({**cells[0], "seed": 5, "status": "not_applicable"})
    changes = {
        "cells": [
            {**row, "severity": HOSTILE if i else "low", "config_id": HOSTILE} for i, row in enumerate(cells)
        ],
        "scores": [{**made_scores()[0], "config_id": HOSTILE, "adversarial_fault": HOSTILE}],
        "verdicts": [{**row, "property": HOSTILE, "message": HOSTILE} for row in made_verdicts()],
        "counterexamples": [dict.fromkeys(made_counterexamples()[0], HOSTILE)],
        "shift": [
            {**row, "shift": HOSTILE, "error": HOSTILE, "error_unit": HOSTILE, "config_id": HOSTILE}
            for row in made_shift()[:3]
        ],
    }
    plain = write_page(write_folder(tmp_path / "plain" / "robustness")).read_text(encoding="utf-8")
    folder = write_folder(tmp_path / "<script>alert(2)" / "robustness", **changes)
    (folder / "robustness.json").write_text(
        json.dumps({HOSTILE: HOSTILE, "command": HOSTILE}), encoding="utf-8"
    )
    page = write_page(folder).read_text(encoding="utf-8")
    elements, known = Elements(page).found, Elements(plain).found
    assert {tag for tag, _ in elements} <= {tag for tag, _ in known}
    names = {name for _, attributes in elements for name in attributes}
    assert names <= {name for _, attributes in known for name in attributes}
    assert not {"src", "href", "style", "onerror", "onload"} & names
    assert "7*7" in page
    assert page.count("<style>") == page.count("</style>") == 1


def test_the_policy_allows_the_pages_own_style_and_nothing_else(tmp_path: Path):
    """No script, no picture, no request; the hash is that of the style as it stands in the page."""
    page = write_page(write_folder(tmp_path / "robustness")).read_text(encoding="utf-8")
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    style = re.search(r"<style>(.*?)</style>", page, re.S)
    assert style is not None
    digest = base64.b64encode(hashlib.sha256(style.group(1).encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    assert not re.search(r"https?:|url\(|@import|<script|<link|<iframe", page)


def test_a_large_run_makes_a_page_of_bounded_size(tmp_path: Path):
    """Twenty-four configs, fifteen faults and hundreds of counterexamples stay below 400 kB."""
    names = [f"{index:012x}" for index in range(24)]
    base = [row for row in made_cells() if row["config_id"] == CONFIGS[0] and row["fault"] == "label_flips"]
    cells = [
        {
            **row,
            "config_id": name,
            "fault": f"a_fault_with_a_name_{fault}",
            "error": "x" * 300,
            "status": "failed",
            "nan_count": 123456,
            "nan_loss": 12345,
            "nan_gradient": 12345,
            "recovered": False,
            "epochs_to_recover": 3,
        }
        for name in names
        for fault in range(15)
        for row in base
    ]
    shift = [
        {**row, "config_id": name} for name in names for row in made_shift() if row["config_id"] == CONFIGS[0]
    ]
    found = [{**made_counterexamples()[0], "id": str(i), "shown": "9" * 5000} for i in range(300)]
    scores = [{**made_scores()[0], "config_id": name} for name in names]
    folder = write_folder(
        tmp_path / "robustness",
        cells=cells,
        shift=shift,
        counterexamples=found,
        scores=scores,
        verdicts=[
            {**made_verdicts()[0], "property": f"law_{i}", "status": "error", "message": "m" * 999}
            for i in range(50)
        ],
    )
    path = write_page(folder)
    assert path.stat().st_size < 400_000
    assert f"{24 + 2 - MOST_CONFIGS} more configs" in path.read_text(encoding="utf-8")


def test_the_page_is_the_same_for_the_same_files(tmp_path: Path):
    """No clock and no order of a dictionary goes into it; nothing else is written."""
    folder = write_folder(tmp_path / "robustness")
    before = {path.name for path in folder.iterdir()}
    first = write_page(folder).read_bytes()
    assert write_page(folder).read_bytes() == first
    assert {path.name for path in folder.iterdir()} == before | {"report.html"}


def test_a_view_of_nothing_says_nothing():
    """Without any part there is no config, and no figure is made up."""
    view = page_view(dict.fromkeys(PARTS), None)
    assert view["configs"] == view["answer"] == []
    assert view["faults"] is view["matrix"] is view["shifts"] is view["broken"] is None
    assert command_of({"command": ["scm-harness", "robustness", "a b"]}) == "scm-harness robustness 'a b'"


def test_shades_are_those_of_shares():
    """None and NaN have none."""
    assert [shade(value) for value in (-0.1, 0.05, 0.999, 1.5, math.nan, None)] == [0, 0, 9, 10, -1, -1]
