"""The page of a run: what it says where something is missing, and that nothing in it can act."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from made_runs import made_history, made_row, made_rows, made_run

from reports.fragments import RunReadError
from reports.run_interactive import PlotlyMissingError, inert_json, interactive_figures, render_interactive
from reports.run_markdown import render_markdown
from reports.run_page import read_run, render_run
from reports.run_view import run_view
from reports.visible import visible

HOSTILE = (
    "</script></style></svg></title><script>document.title='PWNED'</script>"
    "<img src=//h/x onerror=alert(1)>\"'`\u202e|@all"
)
needs_plotly = pytest.mark.skipif(
    importlib.util.find_spec("plotly") is None, reason="plotly is not installed"
)


class Elements(HTMLParser):
    """Every element of a page with the names of its attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, tuple[str, ...]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, tuple(name for name, _ in attributes)))


@pytest.fixture(autouse=True)
def _no_forest(monkeypatch: pytest.MonkeyPatch):
    """The importance of knobs has tests of its own, and takes a second each time."""
    monkeypatch.setattr("reports.importance.knob_importance", lambda rows, metric, *, seed: [])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_run(tmp_path_factory.mktemp("runs") / "made")


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "made"))


def hostile_rows() -> list[dict[str, Any]]:
    rows = []
    for place in range(12):
        for seed in (0, 1):
            row = made_row(place, seed)
            row |= {
                "task": HOSTILE,
                "config_id": f"{place}{HOSTILE}",
                "error": HOSTILE,
                "device_name": HOSTILE,
            }
            row |= {"trial_id": f"{place}{HOSTILE}{seed}", "config.optimizer": f"{HOSTILE}{place % 3}"}
            row |= {"nan_origin": HOSTILE, "searcher": HOSTILE, f"metric.{HOSTILE}": float(place)}
            row[f"config.{HOSTILE}"] = float(place)
            rows.append(row)
    return rows


def hostile_history() -> list[dict[str, Any]]:
    return [
        {
            **row,
            "config_id": f"{int(row['config_id'][1:])}{HOSTILE}",
            "trial_id": f"{row['config_id']}{HOSTILE}",
        }
        for row in made_history()
    ]


def hostile_run(folder: Path) -> Path:
    return made_run(
        folder,
        rows=hostile_rows(),
        history=hostile_history(),
        provenance={HOSTILE: HOSTILE, "nested": {HOSTILE: [HOSTILE]}},
        plan=f"name: {HOSTILE}\n",
    )


def test_the_page_begins_with_the_verdict(folder: Path):
    """Then the leaderboard, then the figures, each with the SQL of its numbers."""
    page = render_run(read_run(folder))
    heads = re.findall(r"<h2>(.*?)</h2>", page)
    assert heads == [
        "Leaderboard",
        "Coverage and error",
        "Knobs",
        "Importance of the knobs",
        "Error when only the surest answer",
        "Non-finite values",
        "Learning",
        "Robustness",
        "Provenance",
    ]
    assert page.index("Of 12 configs, 9 can be ranked and 7 beat abstaining everywhere.") < page.index("<h2>")
    assert page.count('<details class="sql">') == 10
    assert "The run was not examined" in page


@pytest.mark.parametrize(
    ("gone", "said"),
    [
        ("leaderboard.parquet", "leaderboard.parquet is missing"),
        ("history", "holds no history/"),
        ("provenance.json", "provenance.json is missing"),
        ("plan.yaml", "plan.yaml is missing"),
    ],
)
def test_a_part_that_is_missing_is_said(copy: Path, gone: str, said: str):
    """In its place; the rest is shown."""
    path = copy / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    page = render_run(read_run(copy))
    assert said in page
    assert "<h2>Provenance</h2>" in page


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ("rows/driver-00000.parquet", "cannot be read as Parquet"),
        ("history/driver-00000.parquet", "cannot be read as Parquet"),
        ("leaderboard.parquet", "leaderboard.parquet cannot be read as Parquet"),
        ("provenance.json", "provenance.json cannot be read as JSON"),
    ],
)
def test_a_part_that_is_damaged_is_said(copy: Path, broken: str, said: str):
    """A file cut in half is named, and every other part is still there."""
    path = copy / broken
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    page = render_run(read_run(copy))
    assert said in page
    assert "Traceback" not in page


def test_a_leaderboard_of_other_columns_is_said(copy: Path):
    """It names what is not there."""
    shutil.copy(copy / "history" / "driver-00000.parquet", copy / "leaderboard.parquet")
    assert "leaderboard.parquet lacks rank, feasible, front" in render_run(read_run(copy))


@pytest.mark.parametrize("kind", ["nothing", "a file", "an empty folder"])
def test_what_is_no_run_is_refused(tmp_path: Path, kind: str):
    """In one line that names it."""
    path = tmp_path / "x"
    if kind == "a file":
        path.write_text("", encoding="utf-8")
    elif kind == "an empty folder":
        path.mkdir()
    with pytest.raises(RunReadError, match=re.escape(str(path))):
        read_run(path)


def test_hostile_names_are_inert(folder: Path, tmp_path: Path):
    """Wherever they stand they make no element, no attribute and no turned text."""
    plain = render_run(read_run(folder))
    page = render_run(read_run(hostile_run(tmp_path / "<script>alert(2)<")))
    known = Elements(plain).found
    elements = Elements(page).found
    assert {tag for tag, _ in elements} <= {tag for tag, _ in known}
    names = {name for _, attributes in elements for name in attributes}
    assert names <= {name for _, attributes in known for name in attributes}
    assert not {"src", "href", "style", "onerror", "onload"} & names
    assert page.count("<style>") == page.count("</style>") == 1
    assert "\u202e" not in page
    assert "\\u202e" in page
    assert "PWNED" in page


def test_the_policy_allows_the_pages_own_style_and_nothing_else(folder: Path):
    """No script, no picture, no request."""
    page = render_run(read_run(folder))
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    style = re.search(r"<style>(.*?)</style>", page, re.S)
    assert style is not None
    digest = base64.b64encode(hashlib.sha256(style.group(1).encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    assert not re.search(r"https?:|url\(|@import|<script|<link|<iframe", page)


def test_a_run_of_a_thousand_configs_makes_a_page_of_bounded_size(tmp_path: Path):
    """Below 400 kB, with what is left out counted."""
    knobs = {f"config.knob_with_a_long_name_{i}": i / 7 for i in range(30)}
    rows = made_rows(configs=1000)
    for row in rows:
        row |= {name: value + row["place"] for name, value in knobs.items()}
        row |= {"nan_count": 3, "nan_origin": "x" * 300} if row["place"] % 3 == 1 else {}
    history = made_history(configs=1000, epochs=6)
    folder = made_run(tmp_path / "large", rows=rows, history=history, plan="a: b\n" * 9000)
    page = render_run(read_run(folder))
    assert len(page.encode()) < 400_000
    assert re.search(r"\d+ more configs are in leaderboard.parquet", page)
    assert "… (cut here)" in page


def test_the_page_is_the_same_for_the_same_files(folder: Path):
    """No clock goes into it, and nothing is written."""
    before = sorted(folder.rglob("*"))
    assert render_run(read_run(folder)) == render_run(read_run(folder))
    assert sorted(folder.rglob("*")) == before


def test_markdown_is_short_and_inert(folder: Path, tmp_path: Path):
    """Verdict, table, warnings; a name makes no cell, element, mention or link."""
    plain = render_markdown(read_run(folder))
    assert plain.startswith("### Run made\n\nOf 12 configs, 9 can be ranked")
    assert len(plain.splitlines()) < 40
    assert "**Careful:**" in plain
    hostile = render_markdown(read_run(hostile_run(tmp_path / "hostile")))
    rows = [line for line in hostile.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in rows}) == 1
    assert not re.search(r"[<>@\u202e`]", hostile.replace("&#", ""))
    (tmp_path / "empty" / "rows").mkdir(parents=True)
    assert "leaderboard.parquet is missing" in render_markdown(read_run(tmp_path / "empty"))


@needs_plotly
def test_the_interactive_page_names_its_scripts(folder: Path, tmp_path: Path):
    """Two scripts run, by their hashes; the data stand apart, and cannot end their element."""
    page = render_interactive(read_run(hostile_run(tmp_path / "hostile")))
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    scripts = re.findall(r"<script>(.*?)</script>", page, re.S)
    assert len(scripts) == 2
    for script in scripts:
        assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() in policy
    assert "'unsafe-eval'" not in policy
    assert policy.count("'unsafe-inline'") == 1
    assert "style-src-attr 'unsafe-inline'" in policy
    (data,) = re.findall(r'<script type="application/json" id="figures">(.*?)</script>', page, re.S)
    assert not set("<>&") & set(data)
    assert {figure["name"] for figure in json.loads(data)} >= {"scatter", "targets", "knobs"}


def test_interactive_figures_are_plain_data(folder: Path):
    """The numbers of the view; texts are escaped for plotly, which reads some HTML."""
    view = run_view(read_run(folder).parts)
    figures = {figure["name"]: figure for figure in interactive_figures(view)}
    assert sum(len(trace["x"]) for trace in figures["scatter"]["traces"]) == len(view["scatter"]["points"])
    view["scatter"]["points"][0]["config_id"] = "<b>&"
    texts = json.dumps(interactive_figures(view))
    assert "<b>" not in texts
    knobs = figures["knobs"]
    assert all(y is None or 0.0 <= y <= 1.0 for trace in knobs["traces"] for y in trace["y"])
    assert inert_json(["</script>"]) == '["\\u003c/script\\u003e"]'


def test_without_plotly_one_line_says_how_to_get_it(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """The command makes exit code 6 of it."""
    monkeypatch.setitem(__import__("sys").modules, "plotly.offline", None)
    with pytest.raises(PlotlyMissingError, match=r"pip install 'scm-harness\[pages\]'"):
        render_interactive(read_run(folder))


@pytest.mark.parametrize("character", ["\u202e", "\u2066", "\u200b", "\ufeff", "\x07", "\u2028"])
def test_what_is_not_seen_is_spelled(character: str):
    """So that it neither turns nor hides the text around it."""
    assert visible(f"a{character}b") == f"a\\u{ord(character):04x}b"
