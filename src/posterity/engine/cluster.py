"""A Ray cluster: each trial is a task with one core, run in a worker process of its node.

The worker is the one that runs trials locally, so time limits, crashes and numbers are
the same; Ray places tasks and repeats those whose node was lost.
"""

import socket
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

from posterity._checks import needs
from posterity.engine.store import Job, Outcome

__all__ = ["run_on_ray"]


def _one(facts: dict[str, Any]) -> dict[str, Any]:
    from posterity.engine.local import run_local

    ((_, outcome),) = run_local([Job(**facts)], workers=1)
    return asdict(outcome)


def _reachable(address: str) -> None:
    """Say at once that nobody listens: Ray itself would try for minutes."""
    host, port = address.removeprefix("ray://").rsplit(":", 1)
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise ValueError(f"no Ray cluster at {address}: {error}") from error


def run_on_ray(
    jobs: Iterable[Job], *, address: str | None = None, workers: int | None = None
) -> Iterator[tuple[Job, Outcome]]:
    """Run jobs on a Ray cluster and yield each with its outcome as it ends.

    Parameters
    ----------
    jobs : iterable of Job
    address : str, optional
        ``ray://HOST:PORT`` or ``HOST:PORT`` of a running cluster; by default one on this
        machine.
    workers : int, optional
        Tasks in flight at a time; by default as many as the cluster takes.

    Yields
    ------
    tuple of Job and Outcome
        In the order in which they end.
    """
    ray = needs("ray", "scale")
    ours = not ray.is_initialized()
    if ours:
        if address:
            _reachable(address)
        options = {"address": address} if address else {"include_dashboard": False, "num_cpus": workers}
        try:
            ray.init(log_to_driver=False, logging_level="ERROR", **options)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ValueError(f"no Ray cluster at {address}: {str(error).splitlines()[0]}") from error
    todo = list(jobs)[::-1]
    room = workers or len(todo)
    flying: dict[Any, Job] = {}
    try:
        while todo or flying:
            while todo and len(flying) < room:
                job = todo.pop()
                gpus = 1 if job.device.startswith("cuda") else 0
                task = ray.remote(_one).options(num_cpus=1, num_gpus=gpus, max_retries=3)
                flying[task.remote(asdict(job))] = job
            done, _ = ray.wait(list(flying), num_returns=1)
            for reference in done:
                job = flying.pop(reference)
                try:
                    outcome = Outcome(**ray.get(reference))
                except ray.exceptions.RayError as error:
                    outcome = Outcome(error=f"Ray: {str(error).splitlines()[0]}")
                yield job, outcome
    finally:
        for reference in flying:
            ray.cancel(reference, force=True)
        if ours:
            ray.shutdown()
