"""Schedules of jobs that wait for each other, and edits that cannot worsen the best one: fewer precedences.

Jobs take time and shares of resources, each of capacity 1; some must end before others begin. The value is the time when
the last one ends,

    C = max over jobs of (start + duration).                                                  (1)

Without one of the precedences every schedule that was possible still is, so the shortest one falls or stays. A
list scheduler may yet need longer, since it starts what it can as soon as it can: Graham's anomaly.
"""

import heapq
from bisect import insort
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, Num
from numpy import ndarray
from torch import Tensor

from posterity.combinatorial.edited_tours import two_of

__all__ = ["Jobs", "Scheduling"]

FULL = 1 + 1e-12  # of a resource, as sums of shares round
SLACK = 1e-9  # of the makespan, that start times of a solver may round


class Jobs(NamedTuple):
    """An instance of `Scheduling`.

    Attributes
    ----------
    duration : ndarray of shape (n,)
        Finite, positive.
    resources : ndarray of shape (n, r)
        The share of each resource that a job takes while it runs, in [0, 1].
    before : ndarray of shape (m, 2), int
        Pairs (i, j): job i ends before job j begins.
    """

    duration: Float[ndarray, " n"]
    resources: Float[ndarray, "n r"]
    before: Int[ndarray, "m 2"]


class Scheduling:
    """Start times of jobs that wait for each other and share resources; an edit deletes a precedence.

    An instance is a `Jobs`; a solution is an array of n start times, of at least 0; its value is the makespan, when the last job
    ends; an edit is a pair of ``before``.

    Attributes
    ----------
    sense : str
        "min".
    solvers : mapping
        List schedulers: "shortest-first" (duration), "critical-path" (longest path of durations to the end, its own
        included, falling) and "tetris" (sum of demand times what is free, falling). Whenever jobs end, together those that
        end at the same time, the ready jobs are ranked, of equals the lower number first, and each that still fits starts.

    Raises
    ------
    ValueError
        Of a method, if an instance, start times or an edit are not what they must be.

    References
    ----------
    .. [1] Lu et al. ROCO: A general framework for evaluating robustness of combinatorial optimization solvers
       on graphs. ICLR 2023. The no-worse guarantee and the edits of each problem.
    .. [2] Graham. Bounds on multiprocessing timing anomalies. SIAM J. Appl. Math. 17, 1969.

    Examples
    --------
    >>> import numpy as np
    >>> from posterity.combinatorial import Jobs, Scheduling
    >>> jobs = Jobs(np.array([2.0, 3.0, 1.0]), np.array([[0.5], [0.5], [0.5]]), np.array([[0, 2]]))
    >>> problem = Scheduling()
    >>> starts = problem.solvers["shortest-first"](jobs)
    >>> starts.tolist(), problem.value(jobs, starts), problem.edits(jobs, starts).tolist()
    ([0.0, 0.0, 2.0], 3.0, [[0, 2]])
    """

    sense: Literal["min", "max"] = "min"

    @property
    def solvers(self) -> Mapping[str, Callable[..., Float[ndarray, " n"]]]:
        """Simple solvers by name."""
        return SCHEDULERS

    def validate(self, instance: Jobs) -> None:
        """Raise ``ValueError`` if arrays do not fit, a job can never run, or precedences repeat or close a cycle."""
        jobs = _jobs(instance)
        _durations(jobs)
        bad = np.argwhere(~((jobs.resources >= 0) & (jobs.resources <= 1)))
        if len(bad):
            i, r = bad[0]
            raise ValueError(
                f"resources must be in [0, 1], got {jobs.resources[i, r]} for job {i}, which never fits"
            )
        if len({(i, j) for i, j in jobs.before.tolist()}) < len(jobs.before):
            pairs = jobs.before.tolist()
            odd = next(pair for k, pair in enumerate(pairs) if pair in pairs[:k])
            raise ValueError(f"before must have different pairs, has {tuple(odd)} twice")
        if len(_order(jobs)[0]) < len(jobs.duration):
            cycle = " -> ".join(map(str, _cycle(jobs)))
            raise ValueError(f"before must have no cycle, has {cycle}")

    def value(self, instance: Jobs, solution: Sequence[float] | Num[ndarray, " n"]) -> float:
        """Return the makespan of start times that keep precedences and capacities."""
        jobs = _jobs(instance)
        starts = _starts(jobs, solution)
        ends = starts + jobs.duration
        makespan = float(ends.max())
        if not np.isfinite(makespan):
            raise ValueError(f"duration must be finite in sum, the makespan is {makespan}")
        slack = min(SLACK * makespan, float(jobs.duration.min()) / 2)
        early = np.flatnonzero(starts[jobs.before[:, 1]] < ends[jobs.before[:, 0]] - slack)
        if len(early):
            i, j = jobs.before[early[0]].tolist()
            raise ValueError(
                f"solution must keep precedences: job {j} starts at {starts[j]:g}, job {i} ends at {ends[i]:g}"
            )
        by_start, by_end = np.argsort(starts, kind="stable"), np.argsort(ends, kind="stable")
        began = np.searchsorted(starts[by_start], starts, side="right")
        ended = np.searchsorted(ends[by_end], starts + slack, side="right")
        zero = np.zeros((1, jobs.resources.shape[1]))
        used = np.concatenate([zero, jobs.resources[by_start].cumsum(0)])[began]
        used = used - np.concatenate([zero, jobs.resources[by_end].cumsum(0)])[ended]
        over = np.argwhere(used > 1 + SLACK)
        if len(over):
            k, r = over[0].tolist()
            raise ValueError(
                f"solution must keep capacities: at {starts[k]:g} resource {r} is used to {used[k, r]:.6g}"
            )
        return makespan

    def edits(self, instance: Jobs, solution: Sequence[float] | Num[ndarray, " n"]) -> Int[ndarray, "m 2"]:
        """Return the precedences."""
        jobs = _jobs(instance)
        _starts(jobs, solution)
        return jobs.before[np.lexsort((jobs.before[:, 1], jobs.before[:, 0]))].astype(np.int64)

    def apply(self, instance: Jobs, edit: tuple[int, int]) -> Jobs:
        """Return new jobs without one of the precedences."""
        jobs = _jobs(instance)
        i, j = two_of(edit, len(jobs.duration), len(jobs.duration))
        other = (jobs.before[:, 0] != i) | (jobs.before[:, 1] != j)
        if other.all():
            raise ValueError(f"edit must be one of before, got {(i, j)}")
        return jobs._replace(before=jobs.before[other])

    def graph(
        self, instance: Jobs, solution: Sequence[float] | Num[ndarray, " n"]
    ) -> tuple[Float[Tensor, "n 4"], Int[Tensor, "2 e"], Float[Tensor, " e"]]:
        """Return jobs, joined by precedences of weight 1.

        Of each: its duration over the mean, the mean of its demands, its longest path to the end and its start over the
        makespan.
        """
        jobs = _jobs(instance)
        starts = _starts(jobs, solution)
        _durations(jobs)
        makespan = float((starts + jobs.duration).max())
        x = np.stack(
            [
                jobs.duration / jobs.duration.mean(), jobs.resources.mean(1),
                np.array(_longest(jobs)) / makespan, starts / makespan,
            ],
            1,
        )  # fmt: skip
        edges = torch.from_numpy(np.ascontiguousarray(jobs.before.T.astype(np.int64)))
        return torch.from_numpy(x).float(), edges, torch.ones(edges.shape[1])


def list_schedule(rule: str, instance: Jobs) -> Float[ndarray, " n"]:
    """Return the start times of a list scheduler by its rule."""
    jobs = _jobs(instance)
    _durations(jobs)
    n, kinds = jobs.resources.shape
    duration, demand = jobs.duration.tolist(), jobs.resources.tolist()
    waits, after = [0] * n, [[] for _ in range(n)]
    for i, j in jobs.before.tolist():
        after[i].append(j)
        waits[j] += 1
    keys = duration if rule == "shortest-first" else [-path for path in _longest(jobs)]
    order = range(n) if rule == "tetris" else sorted(range(n), key=keys.__getitem__)
    place = [0] * n
    for k, job in enumerate(order):
        place[job] = k
    ready = sorted(place[job] for job in range(n) if not waits[job])  # places in the order
    starts, running, used, now = [-1.0] * n, [], [0.0] * kinds, 0.0
    one = kinds == 1
    least = [min(column) for column in zip(*demand, strict=True)]
    while ready or running:
        turn = ready
        if rule == "tetris":
            free = [1 - u for u in used]
            turn = [k for k in ready if all(u + d <= FULL for u, d in zip(used, demand[k], strict=True))]
            score = {k: sum(d * f for d, f in zip(demand[k], free, strict=True)) for k in turn}
            turn.sort(key=lambda k, score=score: (-score[k], k))
        begun = set()
        for k in turn:
            if one and used[0] + least[0] > FULL:  # nothing fits
                break
            job = order[k]
            need = demand[job]
            if one:
                if used[0] + need[0] > FULL:
                    continue
                used[0] += need[0]
            else:
                if any(u + d > FULL for u, d in zip(used, need, strict=True)):
                    continue
                used = [u + d for u, d in zip(used, need, strict=True)]
            starts[job] = now
            heapq.heappush(running, (now + duration[job], job))
            begun.add(k)
        if begun:
            ready = [k for k in ready if k not in begun]
        if not running:
            raise ValueError("instance must be jobs that can run, has a cycle in before or a demand above 1")
        now = running[0][0]
        while running and running[0][0] == now:
            _, job = heapq.heappop(running)
            if one:
                used[0] -= demand[job][0]
            else:
                used = [u - d for u, d in zip(used, demand[job], strict=True)]
            for k in after[job]:
                waits[k] -= 1
                if not waits[k]:
                    insort(ready, place[k])
        if not running:
            used = [0.0] * kinds  # what rounding has left
    if min(starts) < 0:
        raise ValueError(f"before must have no cycle, has {' -> '.join(map(str, _cycle(jobs)))}")
    return np.array(starts)


SCHEDULERS = MappingProxyType(
    {rule: partial(list_schedule, rule) for rule in ("shortest-first", "critical-path", "tetris")}
)


def _order(jobs: Jobs) -> tuple[list[int], list[list[int]]]:
    """Return jobs, predecessors first, without those behind a cycle, and the successors of each."""
    waits, after = [0] * len(jobs.duration), [[] for _ in jobs.duration]
    for i, j in jobs.before.tolist():
        after[i].append(j)
        waits[j] += 1
    order = [job for job, count in enumerate(waits) if not count]
    for job in order:  # it grows
        for k in after[job]:
            waits[k] -= 1
            if not waits[k]:
                order.append(k)
    return order, after


def _longest(jobs: Jobs) -> list[float]:
    """Return the longest path of durations from each job to the end, its own included."""
    order, after = _order(jobs)
    path = jobs.duration.tolist()
    for job in reversed(order):
        path[job] += max([path[k] for k in after[job]], default=0.0)
    return path


def _cycle(jobs: Jobs) -> list[int]:
    """Return a cycle of precedences, its first job again at the end."""
    stuck = set(range(len(jobs.duration))) - set(_order(jobs)[0])
    back = {j: i for i, j in jobs.before.tolist() if i in stuck and j in stuck}
    path = [min(stuck)]
    while back[path[-1]] not in path:
        path.append(back[path[-1]])
    path.append(back[path[-1]])
    return path[path.index(path[-1]) :][::-1]


def _jobs(instance: Any) -> Jobs:
    """Return an instance whose arrays fit together, times and demands in float64."""
    if not isinstance(instance, tuple) or len(instance) != 3:
        raise ValueError(f"instance must be Jobs(duration, resources, before), got {type(instance).__name__}")
    duration, resources, before = instance
    for name, array, kinds in (
        ("duration", duration, "fiu"),
        ("resources", resources, "fiu"),
        ("before", before, "iu"),
    ):
        if not isinstance(array, ndarray) or (array.dtype.kind not in kinds and array.size):
            raise ValueError(
                f"{name} must be an array of {'integers' if kinds == 'iu' else 'numbers'}, got "
                f"{getattr(array, 'dtype', type(array).__name__)}"
            )
    n = len(duration) if duration.ndim == 1 else 0
    if not n:
        raise ValueError(f"duration must have shape (n,) with n at least 1, got {duration.shape}")
    if resources.ndim != 2 or len(resources) != n or not resources.shape[1]:
        raise ValueError(f"resources must have shape ({n}, r) with r at least 1, got {resources.shape}")
    if before.ndim != 2 or before.shape[1] != 2:
        raise ValueError(f"before must have shape (m, 2), got {before.shape}")
    if before.size and (before.min() < 0 or before.max() >= n):
        raise ValueError(
            f"before must have jobs in 0..{n - 1}, got values from {before.min()} to {before.max()}"
        )
    return Jobs(
        duration.astype(np.float64, copy=False),
        resources.astype(np.float64, copy=False),
        before.astype(np.int64, copy=False),
    )


def _durations(jobs: Jobs) -> None:
    bad = np.flatnonzero(~(np.isfinite(jobs.duration) & (jobs.duration > 0)))
    if len(bad):
        raise ValueError(
            f"duration must be finite and greater than 0, got {jobs.duration[bad[0]]} for job {bad[0]}"
        )


def _starts(jobs: Jobs, solution: Any) -> ndarray:
    """Return start times in float64."""
    if isinstance(solution, Tensor):
        solution = solution.detach().cpu().numpy()
    try:
        starts = np.asarray(solution, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"solution must be start times, got {type(solution).__name__}") from error
    if starts.shape != jobs.duration.shape:
        raise ValueError(f"solution must have {len(jobs.duration)} start times, got shape {starts.shape}")
    bad = np.flatnonzero(~(np.isfinite(starts) & (starts >= 0)))
    if len(bad):
        raise ValueError(
            f"solution must start every job at 0 or later, got {starts[bad[0]]} for job {bad[0]}"
        )
    return starts
