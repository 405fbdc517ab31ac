"""Balance a fleet: shorten its longest route by exchanges of stretches that a network picks (Neuro CROSS exchange).

A plan's value is the length of its longest route,

    min over plans of  max_k L_k.                                                             (1)

The longest route swaps a stretch with a shorter one (`cross_exchange`), both are put in a better order, and
so on until no exchange helps. To try every exchange of two routes of n customers takes O(n^4); a network
(`DecrementNet`) ranks the O(n^2) starts in one pass, and stops are tried for the ten best alone. It only ranks:
what is made was computed exactly, so a bad network costs quality and never correctness. Accepted exchanges lower the larger
of two lengths, so the sorted lengths fall in lexicographic order, and the search ends.
"""

import logging
import math
import random
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from scipy.linalg import eigh
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from posterity._checks import at_least, integer
from posterity._models import at_rest
from posterity._random import seed_from
from posterity.combinatorial.fleet_problem import (
    FleetProblem,
    bordered,
    checked_plan,
    ends,
    fits,
    loads_and_rooms,
)
from posterity.combinatorial.segment_exchanges import Exchanges, exchanged, shortened

__all__ = ["FleetPlan", "solve_min_max"]

ENOUGH = 1e-6  # of the value, that an exchange must save
EDGES = 2**17  # pairs of tokens that the network sees between two looks at the clock
TURNS = 500  # where a sweep may begin, at most
KICKS, STRETCH, NEAR, TRIES = (
    2,
    3,
    10,
    20,
)  # of a perturbation: exchanges, customers moved, near ones, attempts


class FleetPlan(NamedTuple):
    """A plan: what `solve_min_max` returns.

    Attributes
    ----------
    routes : list of list of int
        Customers in order of visit, a list a vehicle.
    lengths : Tensor of shape (vehicles,)
        Of the dtype and on the device of the problem.
    value : float
        The longest.
    n_iter : int
        Exchanges made.
    converged : bool
        Whether no exchange was left, in the last descent too; False where ``time_limit`` ended it.
    n_evaluated : int
        Exchanges whose lengths were computed.
    """

    routes: list[list[int]]
    lengths: Float[Tensor, " vehicles"]
    value: float
    n_iter: int
    converged: bool
    n_evaluated: int


def solve_min_max(
    problem: FleetProblem,
    routes: Sequence[Sequence[int]] | None = None,
    *,
    net: nn.Module | None = None,
    top_k: int = 10,
    n_perturbations: int = 0,
    time_limit: float | None = None,
    generator: torch.Generator | None = None,
) -> FleetPlan:
    """Return a plan whose longest route is short, a local minimum of exchanges of stretches.

    Each improvement of the best plan is a line of the logger ``posterity``, at level INFO.

    Parameters
    ----------
    problem : FleetProblem
        The distances and what the vehicles hold.
    routes : sequence of sequence of int, optional
        The plan to start from; by default a sweep around the depots, cut into equal parts, or into parts whose
        loads fit.
    net : nn.Module, optional
        A `DecrementNet`, or any module that is called as one and returns a table a pair: the starts with the
        largest entries are searched. None searches all.
    top_k : int, default=10
        Starts of each pair of routes that are searched with ``net``, at least 1.
    n_perturbations : int, default=0
        How often a few random exchanges are made in the best plan and a new descent begins, at least 0.
    time_limit : float, optional
        Seconds after which the best plan so far is returned, positive. It only cuts short: with few perturbations
        the end is earlier. It is looked at between exchanges and between parts of a table.
    generator : torch.Generator, optional
        Of the perturbations, by default torch's global one.

    Returns
    -------
    FleetPlan
        The best plan found, and what was spent on it.

    Raises
    ------
    ValueError
        If ``routes`` is no plan of ``problem``, a number is out of range, ``net`` returns tables of another shape, or
        ``routes`` is None and no plan is found whose loads fit the vehicles.

    Notes
    -----
    1. The order of a route is improved by turning stretches round where ways back are as long, else by moving up
       to three customers.
    2. With less than some forty customers a route the search of all starts is as fast; the network pays with more.
    3. Angles of the sweep are those of classical scaling of the distances, since roads have no coordinates.

    References
    ----------
    .. [1] Kim, Park, Park. Learning to CROSS exchange to solve min-max vehicle routing problems.
       ICLR 2023. Sections 4 and 5.

    Examples
    --------
    >>> import torch
    >>> from posterity.combinatorial import FleetProblem, solve_min_max
    >>> customers = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [2.0, 0.0], [-2.0, 0.0]])
    >>> problem = FleetProblem.from_coords(customers, torch.zeros(1, 2), vehicles=[0, 0])
    >>> plan = solve_min_max(problem, [[0, 1, 2, 3], []])
    >>> plan.value, plan.lengths, sorted(sorted(route) for route in plan.routes)
    (4.0, tensor([4., 4.]), [[0, 2], [1, 3]])
    """
    began = time.monotonic()
    if not isinstance(problem, FleetProblem):
        raise ValueError(f"problem must be a FleetProblem, got {type(problem).__name__}")
    plan = None if routes is None else checked_plan(problem, routes)
    if net is not None and not isinstance(net, nn.Module):
        raise ValueError(f"net must be a module, or None to search all starts, got {type(net).__name__}")
    integer("top_k", top_k, 1)
    integer("n_perturbations", n_perturbations, 0)
    if time_limit is not None:
        at_least("time_limit", time_limit, 0, strict=True)
    search = _Search(problem, net, top_k, began, math.inf if time_limit is None else time_limit)
    with torch.no_grad(), at_rest(net):
        search.begin(plan)
        converged = search.descend()
        rng = random.Random(seed_from(generator) if n_perturbations else 0)
        for _ in range(n_perturbations):
            if not converged:
                break
            search.perturb(rng)
            converged = search.descend()
    return search.result(converged)


class _Late(Exception):
    """The time is over."""


class _Kept(NamedTuple):
    """A plan as it was."""

    order: tuple[float, ...]  # its lengths, longest first
    plan: list[list[int]]
    versions: list[int]
    lengths: list[float]


class _Search:
    """A plan, the best one so far, and what is known of the exchanges of its routes."""

    def __init__(
        self, problem: FleetProblem, net: nn.Module | None, top_k: int, began: float, seconds: float
    ) -> None:
        self.problem, self.net, self.top_k = problem, net, top_k
        self.began, self.seconds = began, seconds
        self.ways = bordered(problem).cpu().double().numpy()
        n = len(problem.between)
        between = self.ways[:n, :n]
        self.symmetric = bool(np.abs(between - between.T).max() <= 1e-12 * between.max())
        self.loads = None if problem.capacity is None else loads_and_rooms(problem)
        self.n_iter = self.n_evaluated = 0
        self.last_pass = 0.0  # seconds that the network took, which are not begun when fewer are left
        self.known: dict[tuple[int, int], tuple] = {}

    def begin(self, plan: list[list[int]] | None) -> None:
        """Take a plan, or make one, and put its routes in a better order."""
        self.plan = plan if plan is not None else _sweep(self.problem, self.ways)
        self.newest = len(self.plan)
        self.versions = list(range(self.newest))  # what is known of two routes holds while these are the same
        self.lengths = [0.0] * self.newest
        for k in range(len(self.plan)):
            self._change(k, self.plan[k])
        self.best = self._now()
        self._say()

    def descend(self) -> bool:
        """Make exchanges until none is left; False if the time ends it."""
        try:
            while self._step():
                self._keep()
        except _Late:
            return False
        finally:
            self._keep()
        return True

    def perturb(self, rng: random.Random) -> None:
        """Return to the best plan and make random exchanges of near stretches, the first in the longest route."""
        best = self.best
        self.plan, self.versions, self.lengths = list(best.plan), list(best.versions), list(best.lengths)
        for kick in range(KICKS):
            for _ in range(TRIES):
                full = [k for k, route in enumerate(self.plan) if route]
                i = max(full, key=lambda k: self.lengths[k]) if kick == 0 else rng.choice(full)
                if self._kick(rng, i):
                    break

    def result(self, converged: bool) -> FleetPlan:
        """Return the best plan."""
        _, plan, _, lengths = self.best
        exact = torch.tensor(lengths, dtype=torch.float64).to(self.problem.between)
        routes = [list(route) for route in plan]
        return FleetPlan(routes, exact, max(lengths), self.n_iter, converged, self.n_evaluated)

    def _late(self, ahead: float = 0.0) -> bool:
        """Return whether the time is over, or will be after so many seconds more."""
        return time.monotonic() - self.began + ahead >= self.seconds

    def _tick(self, ahead: float = 0.0) -> None:
        if self._late(ahead):
            raise _Late

    def _now(self) -> _Kept:
        order = tuple(sorted(self.lengths, reverse=True))
        return _Kept(order, list(self.plan), list(self.versions), list(self.lengths))

    def _keep(self) -> None:
        """Remember the plan if none was better, and say so where its value is lower."""
        now, before = self._now(), self.best.order
        if now.order <= before:
            self.best = now
            if now.order[0] < before[0]:
                self._say()

    def _say(self) -> None:
        logging.getLogger("posterity").info(
            "longest route %.6g after %.2f s and %d exchanges",
            self.best.order[0], time.monotonic() - self.began, self.n_iter,
        )  # fmt: skip

    def _step(self) -> bool:
        """Make the best exchange of the longest route, or of the next that has one."""
        order = sorted(range(len(self.plan)), key=lambda k: -self.lengths[k])
        least = ENOUGH * self.lengths[order[0]]
        for place, i in enumerate(order[:-1]):
            partners = order[place + 1 :]
            self._search([(i, j) for j in partners])
            gain, i, j, start, stop = max(
                (self.known[min(i, j), max(i, j)][1:] for j in partners), key=lambda x: x[0]
            )
            if gain > least:
                r, s = exchanged(self.plan[i], self.plan[j], start, stop)
                self._change(i, r)
                self._change(j, s)
                self.n_iter += 1
                return True
        return False

    def _search(self, pairs: list[tuple[int, int]]) -> None:
        """Find the best exchange of each pair of routes of which it is not known."""
        now = {(i, j): (self.versions[min(i, j)], self.versions[max(i, j)]) for i, j in pairs}
        pairs = [(i, j) for i, j in pairs if self.known.get((min(i, j), max(i, j)), (None,))[0] != now[i, j]]
        self._tick()
        picked: list[ndarray | None] = []
        most = max([(len(self.plan[i]) + len(self.plan[j]) + 4) ** 2 for i, j in pairs], default=1)
        step = max(1, EDGES // most)
        for some in (pairs[k : k + step] for k in range(0, len(pairs), step)):
            if self.net is None:
                picked += [None] * len(some)
            else:
                self._tick(self.last_pass)
                start = time.monotonic()
                picked += _picked(self.net, self.problem, self.plan, some, self.top_k)
                self.last_pass = time.monotonic() - start
        for (i, j), given in zip(pairs, picked, strict=True):
            exchanges = Exchanges(self.problem, self.ways, self.plan, i, j)
            starts, stops, decrements = exchanges.best(given, tick=self._tick)
            self.n_evaluated += exchanges.count(given)
            k = int(decrements.argmax())
            found = float(decrements[k]), i, j, starts[k].tolist(), stops[k].tolist()
            self.known[min(i, j), max(i, j)] = (now[i, j], *found)

    def _kick(self, rng: random.Random, i: int) -> bool:
        """Exchange short stretches of route i and of one near it; False if that overloads a vehicle."""
        r = self.plan[i]
        a = rng.randrange(len(r))
        owner = {customer: k for k, route in enumerate(self.plan) for customer in route if k != i}
        near = np.argsort(self.ways[r[a], : len(self.problem.between)], kind="stable").tolist()
        near = [customer for customer in near if customer in owner][:NEAR]
        if near:
            customer = rng.choice(near)
            j = owner[customer]
            c = self.plan[j].index(customer)
        else:
            j, c = rng.choice([k for k in range(len(self.plan)) if k != i]), 0
        s = self.plan[j]
        stop = min(len(r), a + rng.randint(1, STRETCH)), min(len(s), c + rng.randint(0, STRETCH))
        r, s = exchanged(r, s, (a, c), stop)
        if self.loads:
            loads, rooms = self.loads
            if not all(fits(sum(loads[v] for v in route), rooms[k]) for k, route in ((i, r), (j, s))):
                return False
        self._change(i, r)
        self._change(j, s)
        return True

    def _change(self, k: int, route: list[int]) -> None:
        """Give a vehicle a route, in a better order."""
        better = shortened(ends(self.problem, k, route), self.ways, self.symmetric, self._late)
        self.plan[k] = better[1:-1]
        self.lengths[k] = self._length(k)
        self.versions[k] = self.newest
        self.newest += 1

    def _length(self, k: int) -> float:
        at = ends(self.problem, k, self.plan[k])
        return float(self.ways[at[:-1], at[1:]].sum())


def _picked(
    net: nn.Module, problem: FleetProblem, plan: list[list[int]], pairs: list[tuple[int, int]], top_k: int
) -> list[ndarray]:
    """Return the starts of each pair with the largest entries of a network's tables."""
    tables = net(problem, plan, pairs)
    wanted = [(len(plan[i]) + 1, len(plan[j]) + 1) for i, j in pairs]
    got = [tuple(getattr(x, "shape", ())) for x in tables] if isinstance(tables, Sequence) else type(tables)
    if got != wanted:
        raise ValueError(f"net must return tables of shapes {wanted}, got {got}")
    picked = []
    for table in tables:
        scores = table.detach().flatten().nan_to_num(-torch.inf)
        flat = scores.topk(min(top_k, len(scores))).indices.cpu().numpy()
        picked.append(np.stack([flat // table.shape[1], flat % table.shape[1]], 1))
    return picked


def _sweep(problem: FleetProblem, ways: ndarray) -> list[list[int]]:
    """Return routes of neighbors in angle around the depots, as many customers each as loads allow."""
    n, vehicles = len(problem.between), len(problem.leave)
    order = _around(ways, n)
    if problem.capacity is None:
        parts = [part.tolist() for part in np.array_split(order, vehicles)]
        far = ways[n::2, :n] + ways[n + 1 :: 2, :n]
        costs = [[float(far[k, part].mean()) if part else 0.0 for part in parts] for k in range(vehicles)]
        return [parts[p] for p in linear_sum_assignment(costs)[1]]
    loads, rooms = loads_and_rooms(problem)
    for most in (math.ceil(n / vehicles), n):
        for turn in np.unique(np.linspace(0, n - 1, min(n, TURNS)).astype(int)):
            plan = _cut(np.roll(order, -turn).tolist(), loads, rooms, most)
            if plan is not None:
                return plan
    place = {customer: k for k, customer in enumerate(order.tolist())}
    packed: list[list[int]] = [[] for _ in rooms]
    filled = [0.0] * vehicles
    for customer in sorted(range(n), key=lambda c: -loads[c]):  # the largest, where it leaves the least
        free = [k for k in range(vehicles) if fits(filled[k] + loads[customer], rooms[k])]
        if not free:
            raise ValueError("routes must be given here: no plan was found whose loads fit the vehicles")
        k = min(free, key=lambda k: rooms[k] - filled[k])
        packed[k].append(customer)
        filled[k] += loads[customer]
    return [sorted(route, key=place.__getitem__) for route in packed]


def _cut(order: list[int], loads: list[float], rooms: list[float], most: int) -> list[list[int]] | None:
    """Return customers in turn, each vehicle taking what it can, or None if some are left."""
    plan, at = [], 0
    for room in rooms:
        begin, load = at, 0.0
        while at < len(order) and at - begin < most and fits(load + loads[order[at]], room):
            load += loads[order[at]]
            at += 1
        plan.append(order[begin:at])
    return plan if at == len(order) else None


def _around(ways: ndarray, n: int) -> ndarray:
    """Return customers by their angle around the depots, in the plane that fits the distances best."""
    square = np.empty((n + 1, n + 1))
    square[:n, :n] = (ways[:n, :n] + ways[:n, :n].T) / 2
    square[n, :n] = square[:n, n] = ways[n:, :n].mean(0)  # the middle of the ends
    square[n, n] = 0
    square = (square / (square.max() or 1.0)) ** 2
    square = square - square.mean(0) - square.mean(1)[:, None] + square.mean()
    if n < 2:
        return np.arange(n)
    size, axes = eigh(-square / 2, subset_by_index=[n - 1, n])
    at = axes * np.sqrt(size.clip(0))
    angle = np.arctan2(*(at[:n] - at[n]).T)
    order = np.argsort(angle, kind="stable")
    gaps = np.diff(angle[order], append=angle[order[0]] + 2 * np.pi)
    return np.roll(order, -int(gaps.argmax()) - 1)
