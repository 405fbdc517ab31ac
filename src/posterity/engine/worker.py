"""A worker process: reads jobs as JSON lines, runs them, writes outcomes as JSON lines.

Started as ``python -m posterity.engine.worker``. It computes on one thread, whatever the
machine, so that the same seed gives the same numbers everywhere; and it ends when whoever
started it does.
"""

import json
import os
import queue
import sys
import threading
import time
import traceback
from importlib import import_module
from typing import Any

__all__ = ["main", "perform"]


def perform(job: dict[str, Any]) -> dict[str, Any]:
    """Run one job and return its outcome; whatever it raises becomes the outcome's error."""
    from posterity.claims import Trial

    trial = Trial(seed=job["seed"], device=job["device"])
    start = time.perf_counter()
    value, error = None, ""
    try:
        module, name = job["call"].split(":")
        call = getattr(import_module(module), name)
        _settle(trial.seed)
        start = time.perf_counter()
        value = call(trial, **job["params"])
        json.dumps(value)
    except MemoryError:
        error = "MemoryError: out of memory"
    except Exception as failure:
        where = traceback.extract_tb(failure.__traceback__)[-1]
        error = f"{type(failure).__name__}: {failure} ({where.filename}:{where.lineno})"
    seconds = time.perf_counter() - start
    return {
        "value": value, "curves": trial.curves, "records": trial.records, "pictures": trial.pictures,
        "seconds": seconds, "error": error,
    }  # fmt: skip


def _settle(seed: int) -> None:
    """Set threads, and the global generators, from which code of users may draw; only of what is loaded."""
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % 2**32)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
        sys.modules["torch"].manual_seed(seed)


def main() -> None:
    """Serve jobs from standard input until it ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a trial prints is no answer
    jobs: queue.SimpleQueue[str] = queue.SimpleQueue()

    def read() -> None:
        for line in sys.stdin:
            jobs.put(line)
        os._exit(0)  # the parent is gone: so is the reason for this trial

    threading.Thread(target=read, daemon=True).start()
    if limit := os.environ.get("POSTERITY_MEMORY_LIMIT"):
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (int(float(limit)), int(float(limit))))
    while True:
        outcome = perform(json.loads(jobs.get()))
        print(json.dumps(outcome), file=answers, flush=True)


if __name__ == "__main__":
    main()
