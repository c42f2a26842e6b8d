"""Tasks with their data, loaded once in a process, as jobs name them."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from scm.data import Split
from trainables.tasks.protocol import Task, data_digest
from trainables.tasks.registry import PATH_PARAMETER, make_task
from trainables.trial import make_splits

_KEPT_DATA = 4  # tasks x seeds: a sweep has one task and a handful of seeds, and each may be large


@dataclass(frozen=True)
class LoadedTask:
    """A task with the splits of one seed, checked, and their digest."""

    task: Task
    splits: Mapping[str, Split]
    data_digest: str


_loaded: OrderedDict[str, LoadedTask] = OrderedDict()


def load_task(spec: Mapping[str, Any], seed: int) -> LoadedTask:
    """Make the task and the splits that a job names, once per process, spec, seed and content of its file.

    `spec` is {"name", "params", "base_dir"}. Whatever the task raises comes through.
    """
    base_dir = Path(spec["base_dir"])
    key = json.dumps([spec, seed, _file_digest(spec, base_dir)], sort_keys=True, default=str)
    if key in _loaded:
        _loaded.move_to_end(key)
        return _loaded[key]
    task = make_task(spec["name"], spec.get("params", {}), base_dir)
    splits = make_splits(task, seed)
    _loaded[key] = LoadedTask(task=task, splits=splits, data_digest=data_digest(splits))
    while len(_loaded) > _KEPT_DATA:
        _loaded.popitem(last=False)
    return _loaded[key]


def _file_digest(spec: Mapping[str, Any], base_dir: Path) -> str:
    data = spec.get("params", {}).get(PATH_PARAMETER)
    path = base_dir / Path(data).expanduser() if isinstance(data, str) else None
    if path is None or not path.is_file():
        return ""
    stat = path.stat()
    return _digest_of(str(path), stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=16)
def _digest_of(path: str, size: int, modified_ns: int) -> str:
    """Hash a file, again only when its size or time of change is another."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
