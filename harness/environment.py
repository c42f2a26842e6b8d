"""What a sweep runs on: an embedded Ray of its own or a cluster, and whether it can give what is asked.

Anything that is missing (a GPU, an address, cores for a single trial) is a `UserError` with the exit code for
the environment, raised before the first trial starts.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.errors import EXIT_ENVIRONMENT, EXIT_INTERRUPTED, UserError, one_line
from harness.plan import ResourcesSection
from harness.warm_start import is_warm_start, wait_for_warm_workers, warm_start_settings

CONNECT_TIMEOUT_S = 5.0
JOIN_TIMEOUT_S = 60.0
TERMINATION_S = 30.0

# Joining is tried in a process of its own first: a port that is open but speaks something else can hang or
# abort the process that joins.
JOIN_PROBE = "import sys, ray; ray.init(address=sys.argv[1], log_to_driver=False); ray.shutdown()"

TUNE_SETTINGS = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # rows are Parquet, written by the driver
    "TUNE_GLOBAL_CHECKPOINT_S": "86400",  # a run goes on from its rows, never from Tune's own snapshots
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # a failed trial is a row with its message
    "RAY_AIR_NEW_OUTPUT": "0",  # its tables and banners go to stdout, which is for the ranking
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


@dataclass(frozen=True, slots=True)
class Session:
    """A Ray that trials run on: how many fit at once, and a private folder for what Tune must put on disk.

    is_warm: its workers have imported what trials need, and are waiting for them.
    """

    concurrency: int
    scratch: Path
    is_warm: bool = False


def check_device(resources: ResourcesSection, address: str | None) -> None:
    """Refuse a GPU that this machine does not have; on a cluster, the cluster is asked when it is joined."""
    if resources.gpus_per_trial and address is None:
        import torch

        if not torch.cuda.is_available():
            raise UserError(
                f"resources.gpus_per_trial is {resources.gpus_per_trial:g}, and there is no GPU here",
                EXIT_ENVIRONMENT,
            )


def check_address(address: str) -> None:
    """Refuse an address at which no Ray cluster answers, within `CONNECT_TIMEOUT_S` where nothing listens."""
    host, _, port = address.rpartition(":")
    if address.startswith("ray://") or not host or not port.isdigit():
        raise UserError(
            f"--address must be host:port of a Ray cluster's head, got {address!r}", EXIT_ENVIRONMENT
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        raise UserError(f"no Ray cluster at {address}: {error}", EXIT_ENVIRONMENT) from None
    try:
        probe = subprocess.run(
            [sys.executable, "-c", JOIN_PROBE, address],
            capture_output=True,
            text=True,
            timeout=JOIN_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise UserError(
            f"no Ray cluster at {address}: no answer in {JOIN_TIMEOUT_S:g} s", EXIT_ENVIRONMENT
        ) from None
    if probe.returncode != 0:
        reason = next((line for line in reversed(probe.stderr.splitlines()) if line.strip()), "it closed")
        raise UserError(f"cannot join the Ray cluster at {address}: {one_line(reason)}", EXIT_ENVIRONMENT)


@contextlib.contextmanager
def ray_session(resources: ResourcesSection, address: str | None) -> Iterator[Session]:
    """As `starting_ray`; it is there when the block begins."""
    with starting_ray(resources, address, trials=0) as start:
        yield start.session()


@contextlib.contextmanager
def starting_ray(resources: ResourcesSection, address: str | None, *, trials: int) -> Iterator[RayStart]:
    """A Ray for the time of a `with` block; a local one is shut down at its end and leaves no file behind.

    A local one starts while the block goes on: `RayStart.session` waits for it. Its workers import ahead what
    trials need, where there will be as many `trials` as it has CPUs. Without an address, a Ray that this
    process already runs is used and left running.
    """
    import ray

    joined = ray.is_initialized()
    if joined and address not in (None, ray.get_runtime_context().gcs_address):
        raise UserError(f"this process uses another Ray already, not the one at {address}", EXIT_ENVIRONMENT)
    scratch = Path(tempfile.mkdtemp(prefix="scm-", dir=short_temp_dir()))
    # A start that is interrupted leaves Ray's processes, and their files, to Ray's own exit handler; this one
    # is registered before it, and therefore runs after it.
    atexit.register(remove_folder, scratch, wait_s=3.0)
    local = address is None and not joined
    start = RayStart(resources, scratch, is_warm=local and is_warm_start(resources, trials))
    settings = TUNE_SETTINGS | (warm_start_settings(scratch) if start.is_warm else {})
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        with environment(settings):
            try:
                if local:
                    start.begin(quiet)
                elif not joined:
                    ray.init(address=address, **quiet)
                yield start
            finally:
                if not joined:
                    start.end()
    finally:
        remove_folder(scratch)


class RayStart:
    """A Ray that is there or on its way: a local one takes two seconds, mostly of waiting, in a thread.

    That thread lives as long as its Ray, whose processes the system ends with the thread that made them.
    """

    def __init__(self, resources: ResourcesSection, scratch: Path, *, is_warm: bool) -> None:
        self.is_warm = is_warm
        self._resources = resources
        self._scratch = scratch
        self._failure: BaseException | None = None
        self._is_here, self._is_over = threading.Event(), threading.Event()
        self._is_here.set()

    def session(self) -> Session:
        """Wait until Ray is there; UserError where no trial fits into it."""
        import ray

        self._is_here.wait()
        if self._failure is not None:
            raise self._failure
        if self.is_warm:
            wait_for_warm_workers(self._scratch, int(ray.cluster_resources().get("CPU", 0)))
        return Session(fitting_trials(self._resources), self._scratch, self.is_warm)

    def begin(self, options: Mapping[str, Any]) -> None:
        """Start a local Ray."""
        self._is_here.clear()
        threading.Thread(target=self._start, args=(options,), daemon=True).start()

    def end(self) -> None:
        """Shut down a Ray that was started or joined."""
        import ray

        self._is_here.wait(JOIN_TIMEOUT_S)
        ray.shutdown()
        self._is_over.set()

    def _start(self, options: Mapping[str, Any]) -> None:
        import ray

        try:
            folder = str(self._scratch / "ray")
            ray.init(address="local", include_dashboard=False, _temp_dir=folder, **options)
            stop_monitor()
        except BaseException as error:  # raised in the thread that waits for it
            self._failure = error
        self._is_here.set()
        self._is_over.wait()


def stop_monitor() -> None:
    """End the autoscaler's monitor of a local Ray: it scales nothing, and takes a second to end later."""
    import ray

    node = getattr(ray._private.worker, "_global_node", None)
    kill_monitor = getattr(node, "kill_monitor", None)
    if kill_monitor is not None:
        kill_monitor(check_alive=False)


def remove_folder(folder: Path, wait_s: float = 0.0) -> None:
    """Remove a folder with all that is in it, again while ending processes still write to it."""
    give_up_s = time.monotonic() + wait_s
    shutil.rmtree(folder, ignore_errors=True)
    while folder.exists() and time.monotonic() < give_up_s:
        time.sleep(0.05)
        shutil.rmtree(folder, ignore_errors=True)


def short_temp_dir() -> str:
    """A folder for temporary files whose name leaves room for the sockets below it (a path of 107 bytes)."""
    usual = tempfile.gettempdir()
    return "/tmp" if len(usual) > 30 and os.access("/tmp", os.W_OK) else usual


def fitting_trials(resources: ResourcesSection) -> int:
    """How many trials run at once: what the plan says, or all that fit; none is a `UserError`."""
    import ray

    per_node = [trials_on_node(node["Resources"], resources) for node in ray.nodes() if node["Alive"]]
    if not sum(per_node):
        asked = f"{resources.cpus_per_trial:g} CPUs"
        asked += f" and {resources.gpus_per_trial:g} GPUs" if resources.gpus_per_trial else ""
        raise UserError(f"no machine has the {asked} that one trial is to use", EXIT_ENVIRONMENT)
    return min(resources.max_concurrent or sum(per_node), sum(per_node))


def trials_on_node(has: Mapping[str, float], resources: ResourcesSection) -> int:
    """How many trials fit on a node with these resources."""
    fits = int(has.get("CPU", 0.0) / resources.cpus_per_trial + 1e-9)
    if resources.gpus_per_trial:
        fits = min(fits, int(has.get("GPU", 0.0) / resources.gpus_per_trial + 1e-9))
    return fits


@contextlib.contextmanager
def environment(settings: Mapping[str, str]) -> Iterator[None]:
    """Environment variables for the time of a `with` block."""
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def terminate_as_interrupt() -> Iterator[None]:
    """Let SIGTERM end the sweep as Ctrl-C does: after the current turn, with every finished row kept.

    Ray takes SIGTERM for itself when it starts: this is entered before that and again after it.

    A SIGTERM to the whole process group ends Ray as well, and what waits for Ray then waits for ever: the
    process leaves after `TERMINATION_S` in any case, its rows being on the disk since they were written.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def terminate(number: int, frame: object) -> None:
        last_resort = threading.Timer(TERMINATION_S, os._exit, (EXIT_INTERRUPTED,))
        last_resort.daemon = True
        last_resort.start()
        if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as a shell starts what is in its background
            raise KeyboardInterrupt
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)
