"""The command line: bad input is one line and a documented exit code, and leaves no folder half made."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.cli.main import COMMANDS, main
from harness.errors import (
    EXIT_BAD_INPUT,
    EXIT_ENVIRONMENT,
    EXIT_INTERRUPTED,
    EXIT_OK,
    EXIT_RUN_FOLDER,
    UserError,
)
from harness.plan import load_plan
from harness.run_folder import create_run, read_run_id

TABLE = {
    "name": "table",
    "data": "data.csv",
    "inputs": ["x", "z"],
    "target": "y",
    "status": {"column": "censored", "values": {"low": "censored_below", "no": "finite"}},
}


def rewrite_data(folder: Path, change: Callable[[list[str]], list[str]]) -> None:
    header, *rows = (folder / "data.csv").read_text(encoding="utf-8").splitlines()
    changed = [",".join(change(row.split(","))) for row in rows]
    (folder / "data.csv").write_text("\n".join([header, *changed]) + "\n", encoding="utf-8")


# name -> (sections of the plan, what is done to the folder before, words of the error)
BAD_PLANS: dict[str, tuple[dict[str, Any], Callable[[Path], Any], str]] = {
    "unknown plan key": ({"serch": {}}, lambda folder: None, "unknown key 'serch', did you mean 'search'?"),
    "unknown space": ({"space": ["tau_range"]}, lambda folder: None, "unknown space 'tau_range'"),
    "empty domain": (
        {"space": {"optimizer": {"type": "choice", "options": []}}},
        lambda folder: None,
        "options must not be empty",
    ),
    "inverted range": (
        {"space": {"tau_infer": {"type": "float", "low": 0.1, "high": 0.01}}},
        lambda folder: None,
        "low must be < high",
    ),
    "inverted tau range": (
        {"config": {"tau_train_min": 0.1, "tau_train_max": 0.01}},
        lambda folder: None,
        "tau_train_min <= tau_train_max must hold",
    ),
    "unknown search algorithm": ({"search": {"algorithm": "tpf"}}, lambda folder: None, "'tpf'"),
    "grid too large": ({"search": {"algorithm": "grid", "configs": 2}}, lambda folder: None, "grid"),
    "unknown task": ({"task": {"name": "tabel"}}, lambda folder: None, "did you mean 'table'?"),
    "missing file": ({"task": TABLE | {"data": "dat.csv"}}, lambda folder: None, "dat.csv"),
    "no target column": ({"task": TABLE | {"target": "yy"}}, lambda folder: None, "'yy'"),
    "unknown status label": (
        {"task": TABLE | {"status": {"column": "censored", "values": {"low": "below", "no": "finite"}}}},
        lambda folder: None,
        "below",
    ),
    "status value without a label": (
        {"task": TABLE | {"status": {"column": "censored", "values": {"no": "finite"}}}},
        lambda folder: None,
        "low",
    ),
    "NaN inputs": (
        {},
        lambda folder: rewrite_data(folder, lambda row: ["nan", *row[1:]]),
        "x",
    ),
    "all rows missing": (
        {"task": TABLE | {"status": {"column": "censored", "values": {"low": "missing", "no": "missing"}}}},
        lambda folder: None,
        "must have values, got none in 60 rows",
    ),
    "unknown task parameter": (
        {"task": TABLE | {"inptus": 1}},
        lambda folder: None,
        "did you mean 'inputs'?",
    ),
}


@pytest.mark.parametrize("name", BAD_PLANS)
def test_bad_input_is_one_line_and_exit_code_2(
    name: str, write_plan: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever is wrong with plan, space or data is said in one line before anything is written."""
    sections, prepare, words = BAD_PLANS[name]
    plan = write_plan(**sections)
    prepare(tmp_path)
    before = sorted(tmp_path.iterdir())
    assert main(["sweep", str(plan), "--out", str(tmp_path / "runs" / "out")]) == EXIT_BAD_INPUT
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    assert line.startswith("error: ")
    assert words in line
    assert sorted(tmp_path.iterdir()) == before


def test_a_plan_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A missing plan file is named."""
    assert main(["sweep", str(tmp_path / "no.yaml")]) == EXIT_BAD_INPUT
    assert capsys.readouterr().err == f"error: {tmp_path / 'no.yaml'}: no such file\n"


@pytest.mark.parametrize("arguments", [[], ["swep"], ["sweep"], ["sweep", "a", "--fast"], ["spaces", "tau"]])
def test_usage_errors(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """No command, an unknown one or a missing argument exits with 2; with a command, in one line."""
    assert main(arguments) == EXIT_BAD_INPUT
    assert len(capsys.readouterr().err.splitlines()) == (1 if arguments else 0)


def test_a_gpu_that_is_not_there(
    write_plan: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A GPU asked for and absent is exit code 6 before anything is written."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    plan = write_plan(resources={"gpus_per_trial": 1})
    assert main(["sweep", str(plan), "--out", str(tmp_path / "out")]) == EXIT_ENVIRONMENT
    assert "no GPU" in one_error(capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "address", ["localhost", "ray://localhost:1", "no-such-host.invalid:6379", "127.0.0.1:1"]
)
def test_an_address_without_a_cluster(
    address: str, write_plan: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An address that is none, or where nothing listens, is exit code 6 within seconds."""
    started = time.monotonic()
    code = main(["sweep", str(write_plan()), "--out", str(tmp_path / "out"), "--address", address])
    assert code == EXIT_ENVIRONMENT
    assert address in one_error(capsys)
    assert time.monotonic() - started < 20
    assert not (tmp_path / "out").exists()


def test_an_address_where_something_else_listens(
    write_plan: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A port that is open and no Ray is given up after a bounded time."""
    monkeypatch.setattr("harness.environment.JOIN_TIMEOUT_S", 3.0)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        address = f"127.0.0.1:{other.getsockname()[1]}"
        code = main(["sweep", str(write_plan()), "--out", str(tmp_path / "out"), "--address", address])
    assert code == EXIT_ENVIRONMENT
    assert address in one_error(capsys)
    assert not (tmp_path / "out").exists()


def test_run_folders_that_cannot_be_used(
    write_plan: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not empty, a file, below a file, or not writable: exit code 4, and what is there stays as it is."""
    plan = str(write_plan())
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("keep", encoding="utf-8")
    file = tmp_path / "file"
    file.write_text("keep", encoding="utf-8")
    for out, words in (
        (full, "not empty"),
        (file, "is a file"),
        (file / "below", "cannot be written"),
        (Path("/proc/scm-harness-run"), "cannot be written"),
    ):
        assert main(["sweep", plan, "--out", str(out)]) == EXIT_RUN_FOLDER
        line = one_error(capsys)
        assert str(out) in line
        assert words in line
    assert sorted(path.name for path in full.iterdir()) == ["mine.txt"]
    assert file.read_text(encoding="utf-8") == "keep"


OWN_TASKS = """
import sys

def leaves(params):
    print("hello from the task")
    sys.exit(0)

def prints(params):
    print("hello from the task")
    raise ValueError("two\\nlines")
"""


@pytest.mark.parametrize(("name", "said"), [("leaves", "SystemExit: 0"), ("prints", "ValueError: two lines")])
def test_a_task_that_prints_and_does_not_start(
    name: str, said: str, write_plan: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever it raises, sys.exit(0) included, is one line and exit code 2; stdout is for the ranking."""
    (tmp_path / f"own_task_{name}.py").write_text(OWN_TASKS, encoding="utf-8")
    plan = write_plan(task={"name": f"own_task_{name}:{name}"})
    assert main(["sweep", str(plan), "--out", str(tmp_path / "out")]) == EXIT_BAD_INPUT
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[0] == "hello from the task"
    assert said in err.splitlines()[1]
    assert len(err.splitlines()) == 2


@pytest.mark.parametrize("top", ["0", "-1", "many", "²"])
def test_a_wrong_number_of_configs_to_print(top: str, capsys: pytest.CaptureFixture[str]) -> None:
    """It is refused before anything runs, and not after the sweep."""
    assert main(["sweep", "plan.yaml", f"--top={top}"]) == EXIT_BAD_INPUT
    assert "must be a positive number or all" in one_error(capsys)


@pytest.mark.parametrize("every", ["0", "-1", "all", "1.5"])
def test_a_wrong_number_of_epochs_between_lines(every: str, capsys: pytest.CaptureFixture[str]) -> None:
    """It is refused before anything runs."""
    assert main(["sweep", "plan.yaml", f"--log-every={every}"]) == EXIT_BAD_INPUT
    assert "--log-every: must be a positive number, got" in one_error(capsys)


@pytest.mark.parametrize("text", [None, "", "[]", "{}", '{"run_id"'])
def test_a_run_that_lost_its_identity(text: str | None, tmp_path: Path) -> None:
    """A missing or damaged provenance file is one line and exit code 4."""
    if text is not None:
        (tmp_path / "provenance.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match="provenance.json does not say which run this is") as caught:
        read_run_id(tmp_path)
    assert caught.value.exit_code == EXIT_RUN_FOLDER


def test_a_reader_that_goes_away_is_no_error() -> None:
    """`scm-harness spaces | head` ends without a word about the pipe."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "harness.cli", "spaces"]
    with os.fdopen(write, "wb") as closed:
        done = subprocess.run(command, stdout=closed, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (EXIT_OK, "")


def test_resume_without_a_run(
    write_plan: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """There is nothing to go on with in a folder that is missing or holds no plan."""
    plan = str(write_plan())
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "none", tmp_path / "empty"):
        assert main(["sweep", plan, "--out", str(out), "--resume"]) == EXIT_RUN_FOLDER
        assert "not a run" in one_error(capsys)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_of_the_table_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """`COMMAND --help` prints its usage and exits with 0."""
    assert main([name, "--help"]) == EXIT_OK
    assert f"scm-harness {name}" in capsys.readouterr().out


def test_lists_of_spaces_and_tasks(capsys: pytest.CaptureFixture[str]) -> None:
    """Both tables can be read from the command line."""
    assert main(["spaces", "tau_ranges"]) == EXIT_OK
    assert "tau_infer <= tau_train_min" in capsys.readouterr().out
    assert main(["tasks"]) == EXIT_OK
    assert "dose" in capsys.readouterr().out


def test_help_starts_without_torch_and_ray() -> None:
    """What does not train does not load what trains."""
    code = (
        "import sys\n"
        "from harness.cli.main import main\n"
        "codes = [main(['--help']), main(['spaces']), main(['tasks'])]\n"
        "heavy = {'torch', 'ray', 'optuna'} & set(sys.modules)\n"
        "sys.exit(f'{codes} {heavy}' if any(codes) or heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def one_error(capsys: pytest.CaptureFixture[str]) -> str:
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return str(line)


def test_a_start_that_is_interrupted_leaves_no_folder(tmp_path: Path) -> None:
    """What Ray's processes still write while they end goes with the folder, when the process ends."""
    code = f"""
import sys, tempfile
tempfile.tempdir = {str(tmp_path)!r}
import ray
from harness import environment
from harness.plan import ResourcesSection

def interrupted(**settings):
    import atexit, pathlib
    late = pathlib.Path(settings["_temp_dir"])
    atexit.register(lambda: (late.mkdir(parents=True), (late / "log").write_text("the last words")))
    raise KeyboardInterrupt

ray.init = interrupted
environment.short_temp_dir = tempfile.gettempdir
try:
    with environment.ray_session(ResourcesSection(), None):
        pass
except KeyboardInterrupt:
    sys.exit(130)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "")
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_becomes_the_run(
    write_plan: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder that the user made, and may stand in, is filled and not replaced by another."""
    plan = load_plan(write_plan())
    out = tmp_path / "mine"
    out.mkdir()
    monkeypatch.chdir(out)
    before = out.stat().st_ino
    create_run(Path("."), plan, {})
    assert out.stat().st_ino == before
    assert sorted(path.name for path in out.iterdir()) == ["plan.yaml", "provenance.json"]


def test_termination_while_ray_starts_is_an_interruption(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray turns SIGTERM into an exit of its own; the exit code is still a documented one."""

    def terminated(argv: object) -> int:
        sys.exit(signal.SIGTERM)

    monkeypatch.setattr("harness.cli.tasks.main", terminated)
    assert main(["tasks"]) == EXIT_INTERRUPTED
    assert one_error(capsys) == "error: interrupted"
