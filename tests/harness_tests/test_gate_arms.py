"""Two arms that train: a commit beside the working tree, launches back to back, signals, acceptance."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from harness.cli.main import main
from harness.errors import EXIT_INTERRUPTED, UserError
from harness.gate.arm_rows import read_arm_folder
from harness.gate.arms import Arm, Worker, WorkerLostError, candidate_arm, commit_arm, greet, python_arm
from harness.gate.codes import EXIT_BASELINE, EXIT_INCOMPLETE, EXIT_PASS, EXIT_REGRESSION
from harness.gate.suite import Suite, load_suite

ROOT = Path(__file__).resolve().parents[2]
OWN_TASK = """
from trainables.tasks.dose import make_dose_task

def make(params):
    return make_dose_task({"n_train": 200, "n_val": 200, "n_test": 50})
"""
# The same, but for answers so small that all of them are bottom.
ABSTAINING = """
import torch
from trainables.tasks.dose import make_dose_task

class Low(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        P, Q = self.inner(x)[:2]
        return P * 1e-9, Q * 1e-9

class make:
    def __init__(self, params):
        self.task = make_dose_task({"n_train": 200, "n_val": 200, "n_test": 50})

    def __getattr__(self, name):
        return getattr(self.task, name)

    def build_model(self, config):
        return Low(self.task.build_model(config))
"""
SUITE = """
name: mine
scenarios:
  - {name: own, task: {name: "own_task:make"}, config: {max_epochs: 2, hidden_width: 8, hidden_depth: 1}}
  - name: table
    task: {name: table, data: data.csv, inputs: [x], target: y}
    config: {max_epochs: 2, hidden_width: 8, hidden_depth: 1, batch_size: 8}
metrics: {coverage: {margin: 0.02}}
looks: [4]
"""


def git(folder: Path, *arguments: str) -> None:
    """Run git in a folder, as nobody in particular."""
    who = ["-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", str(folder), *who, *arguments], check=True, capture_output=True)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Somebody's repository: a suite below its top, a task of their own, data that git does not hold."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    folder = tmp_path / "repository" / "gate"
    folder.mkdir(parents=True)
    (folder / "suite.yaml").write_text(SUITE, encoding="utf-8")
    (folder / "own_task.py").write_text(OWN_TASK, encoding="utf-8")
    (folder / "data.csv").write_text(
        "x,y\n" + "".join(f"{i / 60},{i / 30}\n" for i in range(60)), encoding="utf-8"
    )
    (folder / ".gitignore").write_text("*.csv\nruns\n", encoding="utf-8")
    git(folder.parent, "init", "--quiet")
    git(folder.parent, "add", ".")
    git(folder.parent, "commit", "--quiet", "--message", "first")
    monkeypatch.chdir(folder)
    return folder


def test_a_commit_is_laid_out_beside_the_repository(place: Path) -> None:
    """Its tasks are its own, data that it lacks are those that are here; the repository is not touched."""
    (place / "own_task.py").write_text("raise RuntimeError('changed')\n", encoding="utf-8")
    before = subprocess.run(["git", "status"], capture_output=True, text=True, check=True, cwd=place).stdout
    suite = load_suite(Path("suite.yaml"))
    with commit_arm(suite, "HEAD") as arm:
        own, table = arm.suite.scenarios
        laid_out = own.base_dir
        assert (laid_out / "own_task.py").read_text(encoding="utf-8") == OWN_TASK
        assert table.params["data"] == str(place.resolve() / "data.csv")
        assert arm.path[0] in laid_out.parents
    assert not laid_out.exists()
    after = subprocess.run(["git", "status"], capture_output=True, text=True, check=True, cwd=place).stdout
    assert before == after


@pytest.mark.parametrize("reference", ["none", "--help", "", "HEAD~7"])
def test_a_commit_that_is_not_there_is_no_baseline(reference: str, place: Path) -> None:
    """Whatever it looks like."""
    suite = load_suite(Path("suite.yaml"))
    expected = "--against must name a commit of the repository around"
    with pytest.raises(UserError, match=expected) as caught, commit_arm(suite, reference):
        pass
    assert caught.value.exit_code == EXIT_BASELINE


def test_defaults_that_are_new_have_nothing_to_be_compared_with(place: Path) -> None:
    """A file of defaults that the commit does not hold is said."""
    (place / "defaults.yaml").write_text("task: {name: dose}\nconfig: {max_epochs: 2}\n", encoding="utf-8")
    (place / "suite.yaml").write_text("scenarios: [{name: a, defaults: defaults.yaml}]\n", encoding="utf-8")
    suite = load_suite(Path("suite.yaml"))
    expected = "holds no gate/defaults.yaml; there is no earlier default"
    with pytest.raises(UserError, match=expected), commit_arm(suite, "HEAD"):
        pass


def arm_of(suite: Suite, python: str) -> Arm:
    return python_arm(suite, Path(python))


def test_an_interpreter_without_the_packages_is_no_baseline(place: Path, tmp_path: Path) -> None:
    """What it said last is in the message."""
    suite = load_suite(Path("suite.yaml"))
    with pytest.raises(UserError, match="--baseline-python must be a Python interpreter, got 'none'"):
        arm_of(suite, "none")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n', encoding="utf-8")
    python.chmod(0o755)
    with pytest.raises(UserError, match="cannot train: ModuleNotFoundError: No module named") as caught:
        greet(arm_of(suite, str(python)))
    assert caught.value.exit_code == EXIT_BASELINE


def test_a_worker_that_dies_or_hangs_is_lost_with_its_last_words(place: Path, tmp_path: Path) -> None:
    """Not for ever: there is a limit, and the process is gone after it."""
    suite = load_suite(Path("suite.yaml"))
    for script, said in (
        ("echo the end >&2; exit 7", "ended with code 7: the end"),
        ("exec sleep 60", "no answer within"),
    ):
        python = tmp_path / "python"
        python.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
        python.chmod(0o755)
        with Worker(arm_of(suite, str(python))) as worker, pytest.raises(WorkerLostError, match=said):
            worker.ask({"ask": "hello"}, 0.5)


def test_the_candidate_is_the_code_that_runs_the_gate(place: Path) -> None:
    """Whatever else is installed or stands in the folder; what a task prints is no answer."""
    (place / "scm.py").write_text("raise RuntimeError('not this one')\n", encoding="utf-8")
    (place / "own_task.py").write_text("print('{}')\n" + OWN_TASK, encoding="utf-8")
    told = greet(candidate_arm(load_suite(Path("suite.yaml"))))
    assert told["root"] == str(ROOT)
    assert told["threads"] == 1


@pytest.mark.slow
def test_a_change_of_one_s_own_task_fails_until_it_is_accepted(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Against a commit: exit 1 by the change; accepted with a reason, just this change is no failure."""
    before, _, after = SUITE.partition("  - name: table")
    alone = before + "metrics" + after.partition("\nmetrics")[2]
    (place / "suite.yaml").write_text(alone, encoding="utf-8")
    run = ["gate", "run", "--suite", "suite.yaml", "--against", "HEAD"]
    assert main(run) == EXIT_PASS
    assert "all 4 rows are bit-identical" in capsys.readouterr().out
    (place / "own_task.py").write_text(ABSTAINING, encoding="utf-8")
    assert main(run) == EXIT_REGRESSION
    assert main(["gate", "accept", "--reason", "abstains on purpose", "--approver", "me"]) == EXIT_PASS
    capsys.readouterr()
    assert main(run) == EXIT_PASS
    assert "accepted as v0001 by me (abstains on purpose)" in capsys.readouterr().out
    (place / "own_task.py").write_text(ABSTAINING + "# another\n", encoding="utf-8")
    assert main(run) == EXIT_REGRESSION


@pytest.mark.slow
def test_steps_are_timed_back_to_back(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every scenario and seed has a launch of both arms with the same pair, beside the rows."""
    text = SUITE.replace("metrics: {", "time: {steps: 20}\nmetrics: {step_time_ms: {margin: 2.0}, ")
    (place / "suite.yaml").write_text(text, encoding="utf-8")
    assert main(["gate", "run", "--suite", "suite.yaml", "--any-baseline", "--out", "out"]) == EXIT_PASS
    arms = [read_arm_folder(next((place / "out").glob(f"{name}-*"))) for name in ("baseline", "candidate")]
    assert all(len(arm.launches) == 8 for arm in arms)
    assert all(arms[0].launches[key].keys() == arms[1].launches[key].keys() for key in arms[0].launches)
    assert "proves the machinery and nothing about a change" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "interrupts"),
    [
        (signal.SIGINT, signal.SIG_DFL),
        (signal.SIGTERM, signal.SIG_DFL),
        (signal.SIGTERM, signal.SIG_IGN),
    ],
    ids=["Ctrl-C", "kill", "kill in the background of a shell"],
)
def test_a_signal_ends_a_gate_with_its_rows_kept(
    number: signal.Signals, interrupts: signal.Handlers, place: Path
) -> None:
    """Exit code 130, what to type to go on, and no worker left behind."""
    (place / "suite.yaml").write_text(SUITE.replace("max_epochs: 2", "max_epochs: 40"), encoding="utf-8")
    process = subprocess.Popen(
        [sys.executable, "-m", "harness.cli", "gate", "run", "--suite", "suite.yaml", "--any-baseline"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=place,
        preexec_fn=lambda: signal.signal(signal.SIGINT, interrupts),
    )
    deadline = time.monotonic() + 90
    while not any((place / "runs" / "gate" / "mine").glob("*/rows/*.parquet")):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, number)
    said, errors = process.communicate(timeout=60)
    assert process.returncode == EXIT_INTERRUPTED, errors
    assert said == ""
    assert "Traceback" not in errors
    assert errors.splitlines()[-1] == (
        "interrupted: finished rows are kept in runs/gate/mine; go on with: "
        "scm-harness gate run --suite suite.yaml --any-baseline"
    )


FAILING = """
import os
from trainables.tasks.dose import make_dose_task

class Own:
    def __init__(self, params):
        self.task = make_dose_task({"n_train": 200, "n_val": 200, "n_test": 50})

    def __getattr__(self, name):
        return getattr(self.task, name)

    def splits(self, seed):
        if seed == 2:
            FAIL
        return self.task.splits(seed)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        ("raise OSError('no data today')", "trial of 'own' with seed 2 failed: OSError: no data today"),
        ("os._exit(7)", "trial of 'own' with seed 2 was lost: the worker ended with code 7"),
    ],
    ids=["raises", "ends its process"],
)
def test_a_trial_that_fails_is_never_passed_over(
    failure: str, expected: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit 5, with the reason, also against itself; the other trials are not lost with it."""
    (place / "own_task.py").write_text(FAILING.replace("FAIL", failure), encoding="utf-8")
    (place / "suite.yaml").write_text(SUITE.replace("own_task:make", "own_task:Own"), encoding="utf-8")
    assert main(["gate", "run", "--suite", "suite.yaml", "--any-baseline"]) == EXIT_INCOMPLETE
    said = capsys.readouterr().out
    assert expected in said
    assert "own: coverage of 1 of 4 seeds" in said
    assert "table: coverage" not in said
