"""Workers of both arms at work at once, each on one core: jobs go in, answers come out as they are ready."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from harness.gate.arms import Arm, Worker, WorkerLostError

TRIES = 2  # of a job whose worker died
WAKE_S = 0.2  # how long Ctrl-C waits at most
MOST_WORKERS = 8  # of one arm: each holds torch and the data


@dataclass(frozen=True, slots=True)
class Job:
    """One request for one arm, on a scenario and a seed."""

    arm: str
    key: tuple[str, int]
    request: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of a job: an answer, or why there is none."""

    job: Job
    told: Mapping[str, Any] | None
    lost: str = ""


class Pool:
    """Workers of some arms, started when they are first needed and ended with the `with` block."""

    def __init__(self, arms: Sequence[Arm], *, cores: int, timeout_s: float) -> None:
        self._arms = {arm.name: arm for arm in arms}
        self._share = max(1, min(MOST_WORKERS, cores // max(1, len(arms))))
        self._timeout_s = timeout_s
        self._jobs: dict[str, queue.Queue[Job | None]] = {name: queue.Queue() for name in self._arms}
        self._answers: queue.Queue[Answer] = queue.Queue()
        self._threads: dict[str, list[threading.Thread]] = {name: [] for name in self._arms}
        self._workers: set[Worker] = set()
        self._lock = threading.Lock()
        self._is_over = False

    def run(self, jobs: Sequence[Job], on_answer: Callable[[Answer], None]) -> None:
        """Have the jobs done, those of each arm in their order; `on_answer` is called here for each."""
        for job in jobs:
            self._jobs[job.arm].put(job)
        for name, threads in self._threads.items():
            wanted = min(self._share, sum(job.arm == name for job in jobs))
            while len(threads) < wanted:
                thread = threading.Thread(target=self._serve, args=(name,), daemon=True)
                threads.append(thread)
                thread.start()
        left = len(jobs)
        while left:
            try:
                answer = self._answers.get(timeout=WAKE_S)
            except queue.Empty:
                continue
            left -= 1
            on_answer(answer)

    def __enter__(self) -> Pool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._is_over = True
            workers = list(self._workers)
        for name, threads in self._threads.items():
            for _ in threads:
                self._jobs[name].put(None)
        for worker in workers:
            worker.kill()  # its thread lets go of it
        for threads in self._threads.values():
            for thread in threads:
                thread.join(timeout=10.0)

    def _serve(self, name: str) -> None:
        worker: Worker | None = None
        while (job := self._jobs[name].get()) is not None and not self._is_over:
            lost = ""
            for _ in range(TRIES):
                try:
                    worker = worker or self._start(name)
                    told = worker.ask(job.request, self._timeout_s)
                    self._answers.put(Answer(job, told))
                    break
                except WorkerLostError as error:
                    lost = str(error)
                    self._end(worker)
                    worker = None
                    if self._is_over:
                        return
            else:
                self._answers.put(Answer(job, None, lost))
        self._end(worker)

    def _start(self, name: str) -> Worker:
        worker = Worker(self._arms[name])
        with self._lock:
            if self._is_over:
                worker.close()
                raise WorkerLostError("the gate has ended")
            self._workers.add(worker)
        return worker

    def _end(self, worker: Worker | None) -> None:
        if worker is None:
            return
        with self._lock:
            self._workers.discard(worker)
        worker.close()
