"""A worker of the gate: trains a scenario with a seed, or times its steps, in a process of its own.

This file is run as a script by the interpreter of either arm, so that both arms are asked in the same words
whatever code they have: it imports nothing of `harness`, and of `trainables` only what has long been there.
It reads one JSON request a line from stdin and answers with one JSON line each:

    {"ask": "hello", "device": ..., "files": [...]}                  who answers: code, versions, machine
    {"ask": "digest", "spec": ..., "seed": ...}                      the digest of a scenario's data
    {"ask": "train", "spec": ..., "config": ..., "seed": ..., ...}   the outcome of one trial
    {"ask": "time", ..., "steps": ...}                               the median step of a brief trial, in ms

What goes wrong inside a request is an answer with the key "error"; the worker itself goes on.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

# What decides what a training comes to; the rest of the project only looks at it.
PACKAGES = ("scm", "trainables")
WARM_UP_STEPS = 10  # beyond those that are timed


def answer_hello(request: Mapping[str, Any]) -> dict[str, Any]:
    """Say which code this is, and what it runs on."""
    import torch

    import trainables.trial as trial

    device = str(request.get("device", "cpu"))
    trial.check_device(device)
    root = Path(trial.__file__).resolve().parents[1]
    cuda = device.startswith("cuda")
    told = {
        "code": digest_of_code([Path(name) for name in request.get("files", [])]),
        "root": str(root),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "capability": str(torch.backends.cpu.get_cpu_capability()),
        "threads": int(torch.get_num_threads()),
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
    }
    try:
        from reports.provenance import gather_provenance
    except ImportError:  # of other packages, or of another age
        return {**told, "provenance": {}}
    return {**told, "provenance": gather_provenance()}


def answer_digest(request: Mapping[str, Any]) -> dict[str, Any]:
    """Say which data a scenario has with a seed."""
    from trainables.loading import load_task

    return {"data_digest": load_task(request["spec"], request["seed"]).data_digest}


def answer_train(request: Mapping[str, Any]) -> dict[str, Any]:
    """Train one trial to its end; a task that raises is the outcome "failed"."""
    from trainables.configs import active_knobs, resolve_config
    from trainables.loading import load_task
    from trainables.trial import TrialRun, failed_outcome

    config, seed = request["config"], request["seed"]
    try:
        loaded = load_task(request["spec"], seed)
        resolved = resolve_config(config)
        active = active_knobs(config)
    except (Exception, SystemExit) as error:
        return {"outcome": failed_outcome(error, config), "active": {}, "data_digest": None, "checks": 0}
    run = TrialRun(loaded.task, resolved, seed, request.get("device", "cpu"), splits=loaded.splits)
    while not run.done:
        run.step()
    outcome = run.outcome()
    # Every epoch looks at the outputs of the rows that train and of those that validate.
    rows = len(loaded.splits["train"]) + len(loaded.splits["val"])
    return {
        "outcome": outcome,
        "active": active,
        "data_digest": loaded.data_digest,
        "checks": int(outcome["epochs"]) * rows,
    }


def answer_time(request: Mapping[str, Any]) -> dict[str, Any]:
    """Train as many steps as are asked for, on as few rows as that takes, and give their median time."""
    import torch

    from trainables.configs import resolve_config
    from trainables.loading import load_task
    from trainables.trial import TrialRun

    loaded = load_task(request["spec"], request["seed"])
    config = resolve_config(request["config"])
    wanted = int(request["steps"]) + WARM_UP_STEPS
    group = int(config["batch_size"]) * int(config.get("gradient_accumulation_steps") or 1)
    train = loaded.splits["train"]
    rows = torch.arange(min(len(train), group * wanted))
    few = type(train)(
        train.inputs[rows],
        train.targets.index(rows),
        {name: extra[rows] for name, extra in train.extras.items()},
    )
    per_epoch = max(1, -(-len(rows) // group))
    brief = {**config, "max_epochs": -(-wanted // per_epoch)}
    if "coverage_threshold" in brief:
        brief["coverage_threshold"] = 0.0  # it would end the training before its steps are done
    splits = {**loaded.splits, "train": few}
    run = TrialRun(loaded.task, brief, request["seed"], request.get("device", "cpu"), splits=splits)
    while not run.done:
        run.step()
    outcome = run.outcome()
    if outcome["status"] == "failed":
        return {"error": outcome["error"]}
    return {"step_time_ms": float(outcome["step_time_ms"]), "data_digest": loaded.data_digest}


ANSWERS: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "hello": answer_hello,
    "digest": answer_digest,
    "train": answer_train,
    "time": answer_time,
}


def digest_of_code(files: list[Path]) -> str:
    """16 hex characters, equal for equal sources of `PACKAGES` and of the given files, wherever they lie."""
    import importlib

    hashed = hashlib.sha256()
    for name in PACKAGES:
        module = importlib.import_module(name)
        folder = Path(str(module.__file__)).parent
        for path in sorted(folder.rglob("*.py")):
            hashed.update(f"{name}/{path.relative_to(folder).as_posix()}|".encode())
            hashed.update(hashlib.sha256(path.read_bytes()).digest())
    for path in files:
        if path.is_file():
            hashed.update(f"{path.name}|".encode())
            hashed.update(hashlib.sha256(path.read_bytes()).digest())
    return hashed.hexdigest()[:16]


def error_text(error: BaseException) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]


def serve(requests: TextIO, replies: TextIO) -> None:
    """Answer every line of `requests` until they end."""
    for line in requests:
        request = json.loads(line)
        try:
            import torch

            torch.set_num_threads(1)
            reply = ANSWERS[request["ask"]](request)
        except (Exception, SystemExit) as error:
            reply = {"error": error_text(error)}
        replies.write(json.dumps(reply, default=str) + "\n")
        replies.flush()


def main() -> None:
    """Serve on stdin and stdout; what a task prints goes to stderr."""
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    serve(sys.stdin, replies)


if __name__ == "__main__":
    main()
