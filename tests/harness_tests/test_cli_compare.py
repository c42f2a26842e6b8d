"""`scm-harness compare` from two folders of rows to what is said of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from harness.cli.main import main
from reports.rows import RowWriter
from reports.schema import row_schema

PLAN = "task: {{name: toy}}\nspace: [optimizer]\nseeds: [0, 1]\nsearch: {{configs: {configs}}}\n"


def write_run(folder: Path, error: float, *, configs: int = 2) -> Path:
    with RowWriter(folder / "rows", "driver", row_schema({"learning_rate": "float64"})) as writer:
        for config in ("aaa", "bbb"):
            for seed in (0, 1):
                row: dict[str, Any] = {
                    "run_id": folder.name,
                    "task": "toy",
                    "config_id": config,
                    "trial_id": f"{config}-s{seed}",
                    "seed": seed,
                    "status": "completed",
                    "nan_count": 0,
                    "coverage": 0.95,
                    "target_coverage": 0.95,
                    "accepted_error": error,
                    "step_time_ms": 2.0,
                    "data_digest": "d",
                    "curve_coverage": [0.5, 1.0],
                    "curve_error": [0.5 * error, error],
                    "curve_area": 0.75 * error,
                    "config.learning_rate": 1e-3 if config == "aaa" else 1e-2,
                }
                writer.append(row)
    (folder / "plan.yaml").write_text(PLAN.format(configs=configs), encoding="utf-8")
    (folder / "provenance.json").write_text(json.dumps({"commit": folder.name}), encoding="utf-8")
    return folder


@pytest.fixture
def runs(tmp_path):
    return str(write_run(tmp_path / "one", 1.0)), str(write_run(tmp_path / "two", 1.5, configs=3))


def test_compare_says_what_differs_and_what_changed(runs, capsys):
    """Errors that grew, the key of the plan, the commit; nothing is written into the runs."""
    before = sorted(path for run in runs for path in Path(run).rglob("*"))
    assert main(["compare", *runs]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.startswith(
        "B against A (2 common configs, 4 pairs of trials): accepted_error is worse in B, x 1.5"
    )
    assert "search.configs: 2 -> 3" in out
    assert 'commit: "one" -> "two"' in out
    assert sorted(path for run in runs for path in Path(run).rglob("*")) == before


def test_a_run_against_itself_has_no_difference(runs, capsys):
    assert main(["compare", runs[0], runs[0]]) == 0
    assert capsys.readouterr().out.startswith("No difference: 2 common configs, 4 pairs of trials")


def test_every_form_can_be_printed_or_written(runs, tmp_path, capsys):
    """`--out` writes the same as is printed, and prints nothing."""
    for form, begin in (("md", "### Comparison"), ("html", "<!doctype html>"), ("text", "B against A")):
        assert main(["compare", *runs, "--format", form]) == 0
        printed = capsys.readouterr().out
        assert printed.startswith(begin)
        assert main(["compare", *runs, "--format", form, "--out", str(tmp_path / "out")]) == 0
        assert capsys.readouterr().out == ""
        assert (tmp_path / "out").read_text(encoding="utf-8") == printed
    assert main(["compare", *runs, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["pairs"], told["same_data"], told["matched_by"]) == (4, True, "config_id")


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["{one}", "{one}x"], 4, "onex does not exist"),
        (["{one}", "{empty}"], 4, "is not a run folder"),
        (["{one}"], 2, "RUN_B"),
        (["{one}", "{two}", "--level", "1"], 2, "must be a number between 0 and 1, got '1'"),
        (["{one}", "{two}", "--format", "pdf"], 2, "pdf"),
        (["{one}", "{two}", "--format", "md", "--json"], 2, "ask for two forms"),
        (["{one}", "{two}", "--top", "0"], 2, "must be a positive number or all"),
        (["{one}", "{two}", "--out", "{empty}/no/file"], 2, "cannot be written"),
    ],
)
def test_what_cannot_be_compared_is_one_line(runs, tmp_path, capsys, arguments, code, said):
    (tmp_path / "empty").mkdir()
    names = {"one": runs[0], "two": runs[1], "empty": tmp_path / "empty"}
    assert main(["compare", *(text.format(**names) for text in arguments)]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert said in err


def test_a_plan_that_is_gone_is_said(runs, capsys):
    """Rows can be compared without it."""
    (Path(runs[1]) / "plan.yaml").unlink()
    assert main(["compare", *runs]) == 0
    assert "what changed in the plan is not known" in " ".join(capsys.readouterr().out.split())


def test_compare_loads_neither_torch_nor_ray(runs):
    code = (
        "import sys\nfrom harness.cli.main import main\n"
        f"main(['compare', {runs[0]!r}, {runs[1]!r}, '--format', 'html'])\n"
        "print(sorted({'torch', 'ray'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
