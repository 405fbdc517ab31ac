"""Worker processes on this machine: a trial may raise, hang, die or eat memory; others go on."""

import json
import os
import selectors
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import asdict

from posterity.engine.store import Job, Outcome

__all__ = ["run_local"]

ONE_THREAD = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")


class _Worker:
    """A process and the job it has."""

    def __init__(self) -> None:
        environment = dict(os.environ, **dict.fromkeys(ONE_THREAD, "1"))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "posterity.engine.worker"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            env=environment, start_new_session=True,
        )  # fmt: skip
        self.job: Job | None = None
        self.deadline = 0.0
        self.answer = b""

    def start(self, job: Job) -> None:
        self.job = job
        self.deadline = time.monotonic() + job.time_limit
        try:
            assert self.process.stdin is not None
            self.process.stdin.write(json.dumps(asdict(job)).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it died: reading says so

    def read(self) -> Outcome | None:
        """Return the outcome once it has all come, None before."""
        assert self.process.stdout is not None
        piece = os.read(self.process.stdout.fileno(), 1 << 16)
        if not piece:
            code = self.process.wait()
            hint = " (out of memory?)" if code == -9 else ""
            return Outcome(error=f"the worker died with exit code {code}{hint}")
        self.answer += piece
        if not self.answer.endswith(b"\n"):
            return None
        outcome, self.answer = Outcome(**json.loads(self.answer)), b""
        return outcome

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            try:
                if pipe is not None:
                    pipe.close()
            except BrokenPipeError:
                pass


def run_local(jobs: Iterable[Job], *, workers: int | None = None) -> Iterator[tuple[Job, Outcome]]:
    """Run jobs on worker processes and yield each with its outcome as it ends.

    Parameters
    ----------
    jobs : iterable of Job
    workers : int, optional
        Processes at a time, each on one thread; by default one a core.

    Yields
    ------
    tuple of Job and Outcome
        In the order in which they end. Leaving the loop ends the workers.
    """
    todo = deque(jobs)
    count = min(workers or _cores(), len(todo))
    busy: list[_Worker] = []
    ready = selectors.DefaultSelector()

    def employ(worker: _Worker) -> None:
        worker.start(todo.popleft())
        ready.register(worker.process.stdout, selectors.EVENT_READ, worker)  # type: ignore[arg-type]
        busy.append(worker)

    try:
        for _ in range(count):
            employ(_Worker())
        while busy:
            wait = max(0.0, min(worker.deadline for worker in busy) - time.monotonic())
            events = [key.data for key, _ in ready.select(timeout=wait)]
            late = [w for w in busy if w not in events and time.monotonic() >= w.deadline]
            for worker in events + late:
                job = worker.job
                assert job is not None
                if worker in late:
                    outcome = Outcome(
                        seconds=job.time_limit, error=f"passed its time limit of {job.time_limit:g} s"
                    )
                elif (found := worker.read()) is None:
                    continue
                else:
                    outcome = found
                ready.unregister(worker.process.stdout)  # type: ignore[arg-type]
                busy.remove(worker)
                alive = worker not in late and worker.process.poll() is None
                if not alive or not todo:
                    worker.stop()
                if todo:
                    employ(worker if alive else _Worker())
                yield job, outcome
    finally:
        for worker in busy:
            worker.stop()
        ready.close()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
