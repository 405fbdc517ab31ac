"""CROSS exchanges: two vehicles swap a stretch of their routes, and the longer one gets shorter.

Of routes r and s, the exchange with starts (a, c) and stops (b, d) makes

    r[:a] + s[c:d] + r[b:]    and    s[:c] + r[a:b] + s[d:].                                  (1)

With P the length up to a position and S that from it on, the first of them has the length

    P_r(a) + (r[a-1] to s[c]) - P_s(c) + P_s(d-1) + (s[d-1] to r[b]) + S_r(b) = A[a, c] + B[b, d],   (2)

one term of the starts, one of the stops; so all stops of a start cost a sum, a maximum and a minimum
over a table, and all starts of two routes of n customers O(n^4) of them.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor

from posterity._checks import indices, integer
from posterity._precision import wide
from posterity.combinatorial.fleet_problem import (
    ROUNDED_LOAD,
    FleetProblem,
    bordered,
    checked_plan,
    ends,
    loads_and_rooms,
)

__all__ = ["CrossExchange", "cross_exchange"]

CACHED = 2**15  # entries at once: what stays in a processor's cache
SHIFTED = 3  # the longest stretch that moves within a route
LEAST = 1e-9  # of a route, that a change of its order must save


class CrossExchange(NamedTuple):
    """The best stops of some starts: fields of `cross_exchange`.

    Attributes
    ----------
    start : Tensor of shape (K, 2), int64
        Positions (a, c) of equation 1.
    stop : Tensor of shape (K, 2), int64
        Positions (b, d).
    decrement : Tensor of shape (K,)
        By how much the longer of the two routes gets shorter, at least 0.
    """

    start: Int[Tensor, "K 2"]
    stop: Int[Tensor, "K 2"]
    decrement: Float[Tensor, " K"]


def cross_exchange(
    problem: FleetProblem,
    routes: Sequence[Sequence[int]],
    i: int,
    j: int,
    *,
    starts: Int[Tensor, "K 2"] | None = None,
) -> CrossExchange:
    """Return the best stops of the starts of an exchange between two routes, all stops being tried.

    Parameters
    ----------
    problem : FleetProblem
        The distances and what the vehicles hold.
    routes : sequence of sequence of int
        A plan of it: one route a vehicle.
    i, j : int
        Two different vehicles, whose routes are r and s.
    starts : Tensor of shape (K, 2), integers, optional
        Positions (a, c), a in 0 .. len(r) and c in 0 .. len(s); by default all, a row a position of r,
        so that ``decrement.reshape(len(r) + 1, len(s) + 1)`` is a table.

    Returns
    -------
    CrossExchange
        Of several stops that are best, which one is not said. Exchanges that overload a vehicle do not
        count; to change nothing, with a decrement of 0, is always possible.

    Raises
    ------
    ValueError
        If ``routes`` is no plan of ``problem``, ``i`` and ``j`` are not two of its vehicles, or ``starts`` lie
        outside the routes.

    References
    ----------
    .. [1] Kim, Park, Park. Learning to CROSS exchange to solve min-max vehicle routing problems.
       ICLR 2023. Section 4.

    Examples
    --------
    >>> import torch
    >>> from posterity.combinatorial import FleetProblem, cross_exchange
    >>> customers = torch.tensor([[1.0, 0.0], [2.0, 0.0], [-1.0, 0.0], [-2.0, 0.0]])
    >>> problem = FleetProblem.from_coords(customers, torch.zeros(1, 2), vehicles=[0, 0])
    >>> best = cross_exchange(problem, [[0, 1, 2, 3], []], 0, 1, starts=torch.tensor([[2, 0]]))
    >>> best.stop, best.decrement  # the second vehicle takes the last two: 8 becomes 4
    (tensor([[4, 0]]), tensor([4.]))
    """
    plan = checked_plan(problem, routes)
    for name, value in (("i", i), ("j", j)):
        if not 0 <= integer(name, value) < len(plan):
            raise ValueError(f"{name} must be a vehicle in 0..{len(plan) - 1}, got {value}")
    if i == j:
        raise ValueError(f"i and j must be two different vehicles, got {i} twice")
    device, given = problem.between.device, None
    if starts is not None:
        given = indices("starts", starts, (None, 2)).cpu().numpy().astype(np.int64)
        if len(given) and (given.min() < 0 or (given > (len(plan[i]), len(plan[j]))).any()):
            raise ValueError(
                f"starts must lie in 0..{len(plan[i])} and 0..{len(plan[j])}, "
                f"got {given.min(0).tolist()} to {given.max(0).tolist()}"
            )
    ways = bordered(problem).cpu().double().numpy()
    exchanges = Exchanges(problem, ways, plan, int(i), int(j), wide(problem.between).dtype)
    begin, stop, decrement = (torch.from_numpy(x).to(device) for x in exchanges.best(given))
    return CrossExchange(begin, stop, decrement.to(problem.between.dtype))


class Exchanges:
    """All exchanges of two routes as the tables of equation 2, on the CPU: thousands of small sums.

    Parameters
    ----------
    problem : FleetProblem
    ways : ndarray
        Its distances, as `bordered` has them, in float64.
    plan : list of list of int
    i, j : int
    dtype : torch.dtype
        In which stops are compared: float32 is twice as fast as float64.
    """

    def __init__(
        self,
        problem: FleetProblem,
        ways: ndarray,
        plan: list[list[int]],
        i: int,
        j: int,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        r, s = (np.array(ends(problem, k, plan[k])) for k in (i, j))
        self.n, self.m = len(r) - 2, len(s) - 2
        there, back = ways[r[:, None], s], ways[s, r[:, None]]  # both by position in r and in s
        own, other = ways[r[:, None], r], ways[s[:, None], s]
        p, q = (np.concatenate([[0.0], x.diagonal(1).cumsum()]) for x in (own, other))  # P of each
        rest, other_rest = p[-1] - p[1:, None], q[-1] - q[1:]
        self.length = max(p[-1], q[-1])
        tables = (
            p[:-1, None] + there[:-1, 1:] - q[1:],  # A[a, c]
            q[:-1] + back[1:, :-1] + rest,  # B[b, d]
            p[:-1, None] + own[:-1, 1:] + rest.T,  # nothing comes in for r[a:b]
            q[:-1] + back[1:, :-1] - p[1:, None],  # the same of the second route
            p[:-1, None] + there[:-1, 1:] + other_rest,
            q[:-1, None] + other[:-1, 1:] + other_rest,
        )
        kind = np.float32 if dtype == torch.float32 else np.float64
        self.tables = [table.astype(kind) for table in tables]
        self.late = [np.tril(np.full((k + 1, k + 1), np.inf, kind), -1) for k in (self.n, self.m)]
        self.rooms = None
        if problem.capacity is not None:
            self._weigh(problem, plan[i], plan[j], i, j)

    def _weigh(self, problem: FleetProblem, r: list[int], s: list[int], i: int, j: int) -> None:
        """Keep what a route may gain, of what one stop leaves and the other brings."""
        demands, rooms = loads_and_rooms(problem)
        p, q = (np.concatenate([[0.0], np.cumsum([demands[v] for v in route])]) for route in (r, s))
        start = q - p[:, None]  # of (a, c); the first route gains that of (b, d) less this
        most, least = (max(0.0, rooms[k] * (1 + ROUNDED_LOAD) - x[-1]) for k, x in ((i, p), (j, q)))
        self.rooms = start, start + most, start - least

    def best(
        self, starts: ndarray | None = None, *, tick: Callable[[], None] = lambda: None
    ) -> tuple[ndarray, ndarray, ndarray]:
        """Return starts, their best stops and decrements; ``tick`` is called before each part of the work."""
        begin = starts if starts is not None else np.indices((self.n + 1, self.m + 1)).reshape(2, -1).T
        flat, value = np.empty(len(begin), np.int64), np.empty(len(begin), self.tables[0].dtype)
        at = 0
        while at < len(begin):
            tick()
            below = self.n + 1 - int(begin[at, 0]) if starts is None else self.n + 1  # stops that may be
            part = slice(at, at + max(1, CACHED // (below * (self.m + 1))))
            flat[part], value[part] = self._search(begin[part])
            at = part.stop
        return np.ascontiguousarray(begin), np.stack([flat // (self.m + 1), flat % (self.m + 1)], 1), value

    def count(self, starts: ndarray | None = None) -> int:
        """Return how many exchanges there are from these starts."""
        if starts is None:
            return (self.n + 1) * (self.n + 2) * (self.m + 1) * (self.m + 2) // 4
        return int(((self.n + 1 - starts[:, 0]) * (self.m + 1 - starts[:, 1])).sum())

    def _search(self, starts: ndarray) -> tuple[ndarray, ndarray]:
        """Return the best stops of starts, as positions in the table of b and d, and their decrements."""
        a, c = starts.T
        first, first_stop, alone, second, second_stop, other_alone = self.tables
        low = int(a.min())  # below the least a there is no stop
        k = np.arange(len(a))
        worse = first[a, c][:, None, None] + first_stop[low:]
        worse[k, :, c] = alone[a, low:]
        other = second[a, c][:, None, None] + second_stop[low:]
        other[k, a - low] = other_alone[c]
        np.maximum(worse, other, out=worse)
        worse += self.late[0][a, low:, None]
        worse += self.late[1][c, None]
        if self.rooms is not None:
            gain, most, least = self.rooms
            most, least = most[a, c][:, None, None], least[a, c][:, None, None]
            worse[(gain[low:] > most) | (gain[low:] < least)] = np.inf
            worse[k, a - low, c] = self.length  # to change nothing is always possible
        worse = worse.reshape(len(a), -1)
        flat = worse.argmin(1)
        return flat + low * (self.m + 1), np.maximum(self.length - worse[k, flat], 0)


def exchanged(
    r: list[int], s: list[int], start: Sequence[int], stop: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Return both routes after an exchange, equation 1."""
    (a, c), (b, d) = start, stop
    return r[:a] + s[c:d] + r[b:], s[:c] + r[a:b] + s[d:]


def shortened(
    route: list[int], full: ndarray, symmetric: bool, late: Callable[[], bool] = lambda: False
) -> list[int]:
    """Return a route, with its ends, that no single change of its order makes shorter.

    Where ways back are as long, a change turns a stretch round (2-opt); elsewhere it moves one of at most
    three customers to another place (Or-opt). The best is made until there is none, or ``late()``.
    """
    change = _turned if symmetric else _shifted
    better: list[int] | None = route
    while better is not None and len(better) > 3 and not late():
        route, better = better, change(better, full)
    return better or route


def _turned(route: list[int], full: ndarray) -> list[int] | None:
    """Return a route with the stretch turned round that shortens it most, None where none does."""
    at = np.array(route)
    ways = full[at[:, None], at]
    arcs = ways.diagonal(1)
    new = ways[:-2, 1:-1] + ways[1:-1, 2:] - arcs[:-1, None] - arcs[1:]  # of the stretch from i + 1 to j + 1
    i, j = divmod(int(np.triu(new, 1).argmin()), len(at) - 2)
    if j <= i or new[i, j] >= -LEAST * arcs.sum():
        return None
    return route[: i + 1] + route[j + 1 : i : -1] + route[j + 2 :]


def _shifted(route: list[int], full: ndarray) -> list[int] | None:
    """Return a route with the stretch moved that shortens it most, None where none does."""
    at = np.array(route)
    ways = full[at[:, None], at]
    arcs, n = ways.diagonal(1), len(at) - 2
    best, found = -LEAST * arcs.sum(), None
    for size in range(1, min(SHIFTED, n - 1) + 1):
        i = np.arange(1, n - size + 2)  # where stretches begin
        saved = arcs[i - 1] + arcs[i + size - 1] - ways[i - 1, i + size]
        cost = ways[:-1, i].T + ways[i + size - 1, 1:] - arcs  # of one between k and k + 1
        for inside in range(-1, size):
            cost[i - 1, i + inside] = np.inf
        gain = cost - saved[:, None]
        row, k = divmod(int(gain.argmin()), n + 1)
        if gain[row, k] < best:
            best, found = gain[row, k], (row + 1, size, k)
    if found is None:
        return None
    i, size, k = found
    stretch, rest = route[i : i + size], route[:i] + route[i + size :]
    k = k if k < i else k - size
    return rest[: k + 1] + stretch + rest[k + 1 :]
