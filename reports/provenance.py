"""Where a row came from: the code, the libraries, the machine. Nothing of the environment's variables.

Versions are read from the installed packages' metadata, so that no heavy library is imported for its number.
"""

from __future__ import annotations

import platform
import socket
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from reports.fragments import write_json_atomically

PROVENANCE_FILE = "provenance.json"
GIT_TIMEOUT_S = 10.0

# Column or key -> distribution; the first three are columns of every row.
VERSIONS: dict[str, str] = {
    "scm_harness_version": "scm-harness",
    "torch_version": "torch",
    "ray_version": "ray",
    "pyarrow_version": "pyarrow",
    "numpy_version": "numpy",
    "optuna_version": "optuna",
}
ROW_KEYS = ("commit", "scm_harness_version", "torch_version", "ray_version", "python_version", "hostname")


def gather_provenance(root: Path | None = None) -> dict[str, Any]:
    """What code ran on what machine, as plain values: commit, commit_dirty, versions, hostname, platform.

    `root` is a folder of the repository asked about, by default the one that tracks this file. Commit and
    dirty flag are null where there is no repository or no git; a version is null where the package is absent.
    """
    commit, dirty = read_commit(Path(__file__).parent if root is None else root, own=root is None)
    return {
        "commit": commit,
        "commit_dirty": dirty,
        **{key: installed_version(name) for key, name in VERSIONS.items()},
        "python_version": platform.python_version(),
        "hostname": socket.gethostname(),
        "platform": platform.platform(),
    }


def row_provenance(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a provenance that is a column of every row."""
    return {key: provenance.get(key) for key in ROW_KEYS}


def write_provenance(run: Path, provenance: Mapping[str, Any]) -> Path:
    """Writes the run's `provenance.json`, whole or not at all, and returns its path."""
    path = Path(run) / PROVENANCE_FILE
    write_json_atomically(dict(provenance), path)
    return path


def installed_version(distribution: str) -> str | None:
    """The version of an installed distribution, without importing it; None where it is absent."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def read_commit(folder: Path, *, own: bool = False) -> tuple[str | None, bool | None]:
    """Commit and dirty flag of the repository around the folder; (None, None) where there is none.

    With `own`, the repository must track this file: an installed copy inside a virtual environment lies in
    its user's repository, whose commit says nothing about this code.
    """
    if own and ask_git(folder, "ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None, None
    commit = ask_git(folder, "rev-parse", "HEAD")
    if commit is None:
        return None, None
    changes = ask_git(folder, "status", "--porcelain", "--untracked-files=no")
    return commit, None if changes is None else changes != ""


def ask_git(folder: Path, *arguments: str) -> str | None:
    """What git prints in a folder, without the last line's end; None where it fails or is not there."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=GIT_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
