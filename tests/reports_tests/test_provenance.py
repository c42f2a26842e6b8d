"""Where a run came from: told without heavy imports and without secrets."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from reports.provenance import gather_provenance, read_commit, row_provenance, write_provenance
from reports.schema import row_schema


def git(folder, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    done = subprocess.run(
        ["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def test_commit_and_dirty_flag_are_those_of_the_repository(tmp_path):
    """The commit is HEAD's; the flag rises with a change to a tracked file."""
    git(tmp_path, "init", "-q")
    (tmp_path / "a.txt").write_text("1")
    git(tmp_path, "add", "a.txt")
    git(tmp_path, "commit", "-q", "-m", "first")
    head = git(tmp_path, "rev-parse", "HEAD")
    assert read_commit(tmp_path) == (head, False)
    (tmp_path / "a.txt").write_text("2")
    assert read_commit(tmp_path) == (head, True)


def test_outside_a_repository_the_commit_is_null(tmp_path, monkeypatch):
    """No repository is no error: the commit is unknown, and says so as null."""
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert read_commit(tmp_path) == (None, None)
    assert gather_provenance(tmp_path)["commit"] is None


def test_without_git_the_commit_is_null(tmp_path, monkeypatch):
    """A machine without git can run a sweep all the same."""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert read_commit(tmp_path) == (None, None)


def test_the_repository_of_a_user_is_not_taken_for_this_codes_own(tmp_path):
    """A repository that does not track this code says nothing about its commit."""
    git(tmp_path, "init", "-q")
    git(tmp_path, "commit", "-q", "--allow-empty", "-m", "a user's")
    assert read_commit(tmp_path, own=True) == (None, None)


def test_provenance_holds_no_environment(monkeypatch, tmp_path):
    """What is in the environment's variables is not in the provenance."""
    monkeypatch.setenv("SOME_TOKEN", "not-to-be-told")
    path = write_provenance(tmp_path, gather_provenance())
    text = path.read_text()
    assert "not-to-be-told" not in text
    assert json.loads(text)["python_version"] == sys.version.split()[0]


def test_row_provenance_names_columns_of_a_row():
    """Everything that goes from the provenance into a row has its column."""
    assert set(row_provenance(gather_provenance())) <= set(row_schema({}).names)


@pytest.mark.parametrize("module", ["provenance", "rows", "history", "ranking", "text"])
def test_reports_start_without_torch_and_ray(module):
    """Reading and ranking must not wait for a training library."""
    code = f"import sys, reports.{module} as m; getattr(m, 'gather_provenance', dict)(); " + (
        "sys.exit(any(name in sys.modules for name in ('torch', 'ray', 'pandas')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
