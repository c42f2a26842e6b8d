"""`scm-harness report`: a page or Markdown of a run, its exit codes, and the page in a browser."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from made_runs import made_history, made_row, made_run

from harness.cli.main import main

TRICK = (
    "</script></title><script>document.title='PWNED';alert(1)</script><img src=http://127.0.0.1:9/x>\u202e"
)


@pytest.fixture(autouse=True)
def _no_forest(monkeypatch: pytest.MonkeyPatch):
    """The importance of knobs has tests of its own, and takes a second each time."""
    monkeypatch.setattr("reports.importance.knob_importance", lambda rows, metric, *, seed: [])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_run(tmp_path_factory.mktemp("runs") / "made")


def test_the_page_is_written_into_the_run_and_named(folder: Path, capsys: pytest.CaptureFixture[str]):
    """Only this one file; asked again, the same bytes."""
    before = set(folder.rglob("*"))
    assert main(["report", str(folder)]) == 0
    page = folder / "report.html"
    assert capsys.readouterr().out == f"page: {page}\n"
    first = page.read_bytes()
    assert main(["report", str(folder)]) == 0
    assert page.read_bytes() == first
    assert set(folder.rglob("*")) == before | {page}


def test_markdown_is_printed_or_written(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """The same text either way."""
    assert main(["report", str(folder), "--format", "md"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("### Run made")
    out = tmp_path / "summary.md"
    assert main(["report", str(folder), "--format", "md", "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"report: {out}\n"
    assert out.read_text(encoding="utf-8") == printed


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["{nothing}"], 4, "{nothing} does not exist"),
        (["{empty}"], 4, "{empty} is not a run folder: it holds no rows/"),
        (["{run}", "--out", "{empty}"], 4, "cannot write the report: {empty} is a folder"),
        (["{run}", "--out", "{nothing}/page.html"], 4, "cannot write the report: "),
        (["{run}", "--format", "pdf"], 2, "scm-harness report: argument --format: invalid choice: 'pdf'"),
        (
            ["{run}", "--format", "md", "--interactive"],
            2,
            "--interactive needs --format html, got --format md",
        ),
        ([], 2, "scm-harness report: the following arguments are required: RUN"),
    ],
    ids=["no folder", "no run", "out is a folder", "out in no folder", "format", "interactive", "usage"],
)
def test_what_cannot_be_done_is_one_line(
    folder: Path,
    tmp_path: Path,
    arguments: list[str],
    code: int,
    said: str,
    capsys: pytest.CaptureFixture[str],
):
    """With the exit code that it has everywhere."""
    (tmp_path / "empty").mkdir()
    names = {"run": folder, "nothing": tmp_path / "nothing", "empty": tmp_path / "empty"}
    assert main(["report", *(text.format(**names) for text in arguments)]) == code
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("error: " + said.format(**names))


def test_without_plotly_the_exit_code_is_that_of_the_environment(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """And nothing is written."""
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    out = folder / "interactive.html"
    assert main(["report", str(folder), "--interactive", "--out", str(out)]) == 6
    assert "pip install 'scm-harness[pages]'" in capsys.readouterr().err
    assert not out.exists()


def test_it_starts_without_torch_and_ray(folder: Path):
    """Pages are made where nothing can be trained."""
    script = (
        "import sys\nfrom harness.cli.main import main\n"
        f"assert main(['report', {str(folder)!r}, '--format', 'md']) == 0\n"
        f"assert main(['report', {str(folder)!r}]) == 0\n"
        "print(sorted({'torch', 'ray'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.fixture(scope="module")
def browser() -> Any:
    """A Chromium that playwright can drive: its own, or the one that SCM_HARNESS_CHROMIUM names."""
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as playwright:
        path = (
            os.environ.get("SCM_HARNESS_CHROMIUM")
            or shutil.which("chromium")
            or shutil.which("google-chrome")
        )
        try:
            browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        except api.Error as error:
            pytest.skip(f"no browser starts: {str(error).splitlines()[0]}")
        yield browser
        browser.close()


@pytest.mark.parametrize("interactive", [False, True], ids=["plain", "interactive"])
@pytest.mark.parametrize("scripts", [True, False], ids=["scripts on", "scripts off"])
@pytest.mark.parametrize("width", [1200, 400])
def test_in_a_browser_nothing_is_asked_for_and_no_name_acts(
    browser: Any, tmp_path: Path, width: int, scripts: bool, interactive: bool
):
    """No request but the page, no dialog, no line on the console, the title as written, nothing too wide."""
    if interactive:
        pytest.importorskip("plotly")
    rows = []
    for place in range(12):
        for seed in (0, 1):
            row = made_row(
                place, seed, task=TRICK, nan_origin=TRICK, error=TRICK, config_id=f"{place}{TRICK}"
            )
            row |= {"trial_id": f"{place}{TRICK}{seed}", "config.optimizer": TRICK + str(place % 3)}
            rows.append(row)
    history = [{**row, "config_id": f"{int(row['config_id'][1:])}{TRICK}"} for row in made_history()]
    run = made_run(tmp_path / "tricks", rows=rows, history=history, provenance={TRICK: TRICK}, plan=TRICK)
    assert main(["report", str(run), *(["--interactive"] if interactive else [])]) == 0
    context = browser.new_context(viewport={"width": width, "height": 900}, java_script_enabled=scripts)
    page = context.new_page()
    asked: list[str] = []
    said: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: (said.append(dialog.message), dialog.dismiss()))
    address = (run / "report.html").as_uri()
    page.goto(address)
    page.wait_for_timeout(1500 if interactive and scripts else 200)
    assert asked == [address]
    assert said == []
    assert page.title() == "Run tricks"
    if scripts:
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate("document.querySelectorAll('.plot .main-svg').length > 3") is interactive
    context.close()
