"""C compiled while the program runs: a text becomes a shared library, once on a machine, and is loaded.

What is compiled is decided by the callers. Where there is no compiler, they do without.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

CACHE_VARIABLE = "SCM_NATIVE_CACHE"
"""The environment variable that names the folder where compiled libraries are kept."""

# Memory is used again for numbers of another type, hence no-strict-aliasing.
_OPTIONS: tuple[str, ...] = ("-O3", "-march=native", "-std=gnu11", "-fPIC", "-shared", "-fno-strict-aliasing")
_OPTIONS += ("-fno-math-errno", "-fno-trapping-math")
# Of some processors the compiler thinks that half of the width is enough.
_WIDE = "-mprefer-vector-width=512"


class ToolchainError(RuntimeError):
    """No compiler, or one that does not take the text; the message is its own."""


@functools.cache
def load_library(text: str) -> ctypes.CDLL:
    """Return the library of a C text: from this process, else from the folder, else compiled now.

    Several processes may do so at once. Raises ToolchainError.
    """
    command = _command()
    told = "\n".join([*command, platform.machine(), _processor(), text])
    name = hashlib.sha256(told.encode()).hexdigest()[:32]
    path = _folder() / f"{name}.so"
    if not path.exists():
        _compile(command, text, path)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise ToolchainError(f"{path} could not be loaded: {error}") from error


def has_compiler() -> bool:
    """Say whether texts can be compiled here."""
    try:
        _command()
    except ToolchainError:
        return False
    return True


@functools.cache
def _command() -> tuple[str, ...]:
    """Return the compiler and its options; gcc's and clang's are understood."""
    names = [os.environ.get("CC", ""), "cc", "gcc", "clang"]
    for words in (shlex.split(name) for name in names if name):
        if shutil.which(words[0]) is None:
            continue
        for options in ((*_OPTIONS, _WIDE), _OPTIONS):
            if _takes((*words, *options)):
                return (*words, *options)
    raise ToolchainError("no C compiler that builds a shared library was found (CC, cc, gcc, clang)")


def _takes(command: tuple[str, ...]) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        try:
            _compile(command, "int one(void) { return 1; }\n", Path(folder) / "one.so")
        except ToolchainError:
            return False
    return True


def _compile(command: tuple[str, ...], text: str, path: Path) -> None:
    """Compile beside and rename, so that nobody loads half a library."""
    try:
        handle, name = tempfile.mkstemp(prefix=".", suffix=".so", dir=path.parent)
    except OSError as error:
        raise ToolchainError(f"{path.parent} cannot be written to: {error}") from error
    os.close(handle)
    beside = Path(name)
    try:
        ran = subprocess.run(
            [*command, "-x", "c", "-", "-o", name, "-lm"],
            input=text,
            capture_output=True,
            text=True,
            check=False,
        )
        if ran.returncode:
            raise ToolchainError(f"{command[0]} ended with {ran.returncode}: {ran.stderr[-2000:]}")
        os.replace(beside, path)
    except OSError as error:
        raise ToolchainError(f"{command[0]} could not be run: {error}") from error
    finally:
        beside.unlink(missing_ok=True)


@functools.cache
def _folder() -> Path:
    """Return the folder of compiled libraries: what lies in it is run, so it must be the user's own.

    Where it is not, or cannot be written to, the process makes one for itself.
    """
    given = os.environ.get(CACHE_VARIABLE)
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = Path(given) if given else Path(home).expanduser() / "scm-harness" / "native"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if _is_own(folder):
            with tempfile.TemporaryFile(dir=folder):
                return folder
    except OSError:
        pass
    made = Path(tempfile.mkdtemp(prefix="scm-native-"))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return made


def _is_own(folder: Path) -> bool:
    """Say whether nobody else can put a library there."""
    if not hasattr(os, "getuid"):
        return True
    found = folder.stat()
    return found.st_uid == os.getuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _processor() -> str:
    """Name the processor: libraries are made for its own instructions, and folders are shared by machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    kept = [line for line in lines if line.startswith(("model name", "flags", "Features"))]
    return "\n".join(dict.fromkeys(kept))
