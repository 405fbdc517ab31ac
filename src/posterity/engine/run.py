"""Running: what is not stored is run, here or on a cluster, and kept as it ends."""

from collections.abc import Iterable, Iterator

from posterity.engine.store import Job, Outcome, Store

__all__ = ["execute"]


def execute(
    jobs: Iterable[Job], store: Store, *, on: str = "local", workers: int | None = None, fresh: bool = False
) -> Iterator[tuple[Job, Outcome, bool]]:
    """Run what is not stored, keep it, and yield every job with its outcome.

    Parameters
    ----------
    jobs : iterable of Job
    store : Store
    on : str, default="local"
        ``local``, ``ray``, or ``ray://HOST:PORT``.
    workers : int, optional
    fresh : bool, default=False
        Run stored trials anew.

    Yields
    ------
    tuple of Job, Outcome and bool
        The last says whether it was stored before; stored ones come first.
    """
    jobs = list({job.key: job for job in jobs}.values())
    if fresh:
        store.forget(jobs)
    known = store.get(jobs)
    for job in jobs:
        if job.key in known:
            yield job, known[job.key], True
    missing = [job for job in jobs if job.key not in known]
    if not missing:
        return
    if on == "local":
        from posterity.engine.local import run_local

        done = run_local(missing, workers=workers)
    else:
        from posterity.engine.cluster import run_on_ray

        done = run_on_ray(missing, address=None if on == "ray" else on, workers=workers)
    for job, outcome in done:
        store.put(job, outcome)
        yield job, outcome, False
