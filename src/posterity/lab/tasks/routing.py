"""Routing: train is a `Fleet`, predict is a function without arguments that returns its plan, a list of customers a vehicle.

All vehicles start and end at one depot; a file without one has its first place for that. Customers are numbered without
the depot. An entry may prepare itself as it likes: what counts is the plan that it finds within so many seconds by the clock
of this machine (ask for ``--workers 1`` where they matter), and a plan is refused if it leaves a customer out, visits one twice,
or overloads a vehicle. Which plan is best depends on what is asked: who minimises the total length lets one vehicle
drive far, who minimises the longest route drives more in all. Both stand in the ranking, with the gap of the total to
the best known length where the file has one, and the seconds that were spent.

Ordinary choices are nearest neighbour with 2-opt, OR-Tools with a cost on the longest route, and PyVRP, which minimises
the total, where they are installed.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Annotated, Any

import numpy as np
from numpy import ndarray

from posterity._checks import needs
from posterity.claims import Between, Positive
from posterity.lab.data import Routing, RoutingData, load_routing
from posterity.lab.tasks import Task, entry

__all__ = ["Fleet", "measure_plan"]

Plan = list[list[int]]

WHOLE = 10**4  # the longest distance where a solver wants whole numbers
VEHICLES = 4  # where neither file nor capacity says how many


@dataclass(frozen=True)
class Fleet:
    """One depot, its customers and its vehicles.

    Attributes
    ----------
    distance : ndarray of shape (n + 1, n + 1)
        Among depot, number 0, and customers, numbers 1 to n.
    demands : ndarray of shape (n,)
        Zeros where the file has none.
    capacity : float
        Of each vehicle; infinite where the file has none.
    n_vehicles : int
    seconds : float
        That a plan may take.
    points : ndarray of shape (n + 1, 2), optional
    """

    distance: ndarray
    demands: ndarray
    capacity: float
    n_vehicles: int
    seconds: float
    points: ndarray | None = None

    @property
    def n_customers(self) -> int:
        """How many customers there are."""
        return len(self.distance) - 1


def _needs(data: RoutingData, *, n_vehicles: int = 0, **_: Any) -> None:
    if len(data.depots) > 1:
        raise ValueError(f"one depot is asked for, has {len(data.depots)}")
    _fleet(data, n_vehicles, 1.0)


def _fleet(data: RoutingData, n_vehicles: int, seconds: float) -> Fleet:
    depot = data.depots[0] if data.depots else 0
    order = np.concatenate([[depot], np.setdiff1d(np.arange(len(data.distance)), [depot])])
    demands, capacity = np.zeros(len(order) - 1), np.inf
    if data.demands is not None and data.capacity is not None:
        demands, capacity = data.demands[order[1:]], data.capacity
    if demands.max() > capacity:
        raise ValueError(f"a customer's demand {demands.max():g} is above the capacity {capacity:g}")
    least = max(1, int(np.ceil(demands.sum() / capacity)))
    n = n_vehicles or data.n_vehicles or max(least, min(VEHICLES, len(order) - 1))
    if n < least:
        raise ValueError(
            f"n_vehicles must be {least} or more: all demands are {demands.sum():g}, the capacity is {capacity:g}; got {n}"
        )
    points = None if data.points is None else data.points[order]
    return Fleet(data.distance[np.ix_(order, order)], demands, capacity, n, seconds, points)


def measure_plan(fleet: Fleet, plan: Sequence[Sequence[int]]) -> tuple[float, float]:
    """Return the longest route and the total length of a plan, or refuse it.

    Parameters
    ----------
    fleet : Fleet
    plan : sequence of sequence of int
        Customers, from 0, one sequence a vehicle.

    Returns
    -------
    tuple of float

    Raises
    ------
    ValueError
        If it has more routes than there are vehicles, leaves a customer out, visits one twice, or overloads a
        vehicle.
    """
    if len(plan) > fleet.n_vehicles:
        raise ValueError(f"entry must use at most {fleet.n_vehicles} vehicles, used {len(plan)}")
    counts = np.bincount([c for route in plan for c in route], minlength=fleet.n_customers)
    if len(counts) > fleet.n_customers or (counts != 1).any():
        odd = int(np.flatnonzero(counts != 1)[0]) if (counts != 1).any() else len(counts) - 1
        raise ValueError(
            f"entry must visit each customer once, visits {odd} {counts[odd]} times of {fleet.n_customers}"
        )
    lengths = []
    for k, route in enumerate(plan):
        load = fleet.demands[list(route)].sum()
        if load > fleet.capacity * (1 + 1e-9):
            raise ValueError(f"entry must not overload vehicle {k}: {load:g} of {fleet.capacity:g}")
        stops = [0, *(c + 1 for c in route), 0]
        lengths.append(fleet.distance[stops[:-1], stops[1:]].sum())
    return float(max(lengths)), float(sum(lengths))


def _score(
    fit: Callable[..., Any], seed: int, data: str, target: str | None, *,
    seconds: Positive = 2.0, n_vehicles: Annotated[int, Between(0, 1000)] = 0,
) -> dict[str, float]:  # fmt: skip
    places = load_routing(data, seed=seed)
    fleet = _fleet(places, n_vehicles, seconds)
    predict = fit(fleet, seed)
    started = time.perf_counter()
    plan = predict()
    spent = time.perf_counter() - started
    longest, total = measure_plan(fleet, plan)
    gap = {} if places.best is None else {"gap to best known": total / places.best - 1}
    return {"longest route": longest, "total length": total, **gap, "seconds": spent}


TASK = Task("routing", Routing, "longest route", "lower", "uniform", _score, needs=_needs)


@entry("routing", "nearest neighbour, 2-opt")
def nearest_neighbour(train: Fleet, seed: int) -> Callable[[], Plan]:
    """Return routes that go to the nearest customer that still fits, up to an equal share of all, mended by 2-opt."""

    def predict() -> Plan:
        return [_two_opt(route, train.distance) for route in _nearest(train)]

    return predict


def _nearest(fleet: Fleet) -> Plan:
    """Return the nearest customers in turn; where that leaves one who fits nowhere, the largest demands first."""
    share = int(np.ceil(fleet.n_customers / fleet.n_vehicles))
    demands, room = fleet.demands, fleet.capacity * (1 + 1e-9)
    left, plan = np.ones(fleet.n_customers, dtype=bool), []
    for _ in range(fleet.n_vehicles):
        route, load, at = [], 0.0, 0
        most = share if np.isinf(room) else fleet.n_customers
        while len(route) < most:
            open_ = left & (load + demands <= room)
            if not open_.any():
                break
            nearest = int(np.where(open_, fleet.distance[at, 1:], np.inf).argmin())
            left[nearest] = False
            route.append(nearest)
            load, at = load + demands[nearest], nearest + 1
        plan.append(route)
    return plan if not left.any() else _packed(fleet, room)


def _packed(fleet: Fleet, room: float) -> Plan:
    """Return routes whose loads fit: each customer, largest demand first, to the vehicle with the least room that has enough."""
    loads, held = np.zeros(fleet.n_vehicles), [[] for _ in range(fleet.n_vehicles)]
    for customer in np.argsort(-fleet.demands, kind="stable").tolist():
        rest = np.where(loads + fleet.demands[customer] <= room, room - loads, np.inf)
        k = int(rest.argmin())
        if not np.isfinite(rest[k]):
            raise ValueError("found no plan whose loads fit the vehicles")
        loads[k] += fleet.demands[customer]
        held[k].append(customer)
    plan = []
    for members in held:
        route, at, rest = [], 0, set(members)
        while rest:
            nearest = min(sorted(rest), key=lambda c: fleet.distance[at, c + 1])
            rest.remove(nearest)
            route.append(nearest)
            at = nearest + 1
        plan.append(route)
    return plan


def _two_opt(route: list[int], distance: ndarray) -> list[int]:
    """Return a route of which no stretch is shorter the other way round, for whatever distances."""
    tour = np.array([0, *(c + 1 for c in route), 0])
    n = len(tour)
    while True:
        there, back = (
            np.concatenate([[0.0], np.cumsum(d)])
            for d in (distance[tour[:-1], tour[1:]], distance[tour[1:], tour[:-1]])
        )
        i, j = np.triu_indices(n - 2, 1)
        i, j = i + 1, j + 1  # the stretch that turns
        old = distance[tour[i - 1], tour[i]] + distance[tour[j], tour[j + 1]] + there[j] - there[i]
        new = distance[tour[i - 1], tour[j]] + distance[tour[i], tour[j + 1]] + back[j] - back[i]
        gain = old - new
        if not len(gain) or gain.max() <= 1e-9 * (1 + there[-1]):
            return [int(c) - 1 for c in tour[1:-1]]
        best = gain.argmax()
        tour[i[best] : j[best] + 1] = tour[i[best] : j[best] + 1][::-1].copy()


def _whole(distance: ndarray) -> tuple[ndarray, float]:
    """Return numbers as whole ones, a fraction rounded up, and what one stands for."""
    if (distance == np.round(distance)).all() and distance.max() <= WHOLE:
        return distance.astype(np.int64), 1.0
    unit = float(distance.max()) / WHOLE
    return np.ceil(distance / unit).astype(np.int64), unit


def ortools(train: Fleet, seed: int) -> Callable[[], Plan]:
    """Return OR-Tools' routing: cheapest arcs, guided local search, and a cost of the longest route that outweighs the rest."""
    routing = needs("ortools.constraint_solver.pywrapcp", "optimization")
    enums = needs("ortools.constraint_solver.routing_enums_pb2", "optimization")
    distance, _ = _whole(train.distance)

    def predict() -> Plan:
        places = routing.RoutingIndexManager(len(distance), train.n_vehicles, 0)
        model = routing.RoutingModel(places)
        arc = model.RegisterTransitMatrix(distance.tolist())
        model.SetArcCostEvaluatorOfAllVehicles(arc)
        model.AddDimension(arc, 0, int(distance.max()) * len(distance), True, "length")
        model.GetDimensionOrDie("length").SetGlobalSpanCostCoefficient(100)
        if np.isfinite(train.capacity):
            loads, unit = _whole(train.demands)
            demand = model.RegisterUnaryTransitVector([0, *loads.tolist()])
            model.AddDimension(demand, 0, int(train.capacity / unit), True, "load")
        how = routing.DefaultRoutingSearchParameters()
        how.first_solution_strategy = enums.FirstSolutionStrategy.PATH_CHEAPEST_ARC
        how.local_search_metaheuristic = enums.LocalSearchMetaheuristic.GUIDED_LOCAL_SEARCH
        how.time_limit.FromMilliseconds(max(1, round(1000 * train.seconds)))
        found = model.SolveWithParameters(how)
        if found is None:
            raise ValueError("found no plan whose loads fit the vehicles")
        plan = []
        for k in range(train.n_vehicles):
            at, route = found.Value(model.NextVar(model.Start(k))), []
            while not model.IsEnd(at):
                route.append(places.IndexToNode(at) - 1)
                at = found.Value(model.NextVar(at))
            plan.append(route)
        return plan

    return predict


def pyvrp(train: Fleet, seed: int) -> Callable[[], Plan]:
    """Return PyVRP's hybrid genetic search of the least total length."""
    solver, until = needs("pyvrp", "combinatorial"), needs("pyvrp.stop", "combinatorial")
    distance, _ = _whole(train.distance)
    loads, unit = _whole(train.demands)

    def predict() -> Plan:
        started = time.perf_counter()
        model = solver.Model()
        places = [model.add_location(0, 0) for _ in distance]
        depot = model.add_depot(places[0])
        for place, load in zip(places[1:], loads.tolist(), strict=True):
            model.add_client(place, delivery=load)
        room = int(min(loads.sum(), train.capacity / unit))
        model.add_vehicle_type(train.n_vehicles, room, depot, depot)
        for i, a in enumerate(places):
            for j, b in enumerate(places):
                model.add_edge(a, b, int(distance[i, j]))
        left = max(0.01, train.seconds - (time.perf_counter() - started))
        best = model.solve(until.MaxRuntime(left), seed=seed, display=False, collect_stats=False).best
        if not best.is_feasible():
            raise ValueError("found no plan whose loads fit the vehicles")
        return [[stop.idx for stop in route if stop.is_client()] for route in best.routes()]

    return predict


for module, name, fit in (
    ("ortools", "OR-Tools, longest route", ortools),
    ("pyvrp", "PyVRP, total length", pyvrp),
):
    if find_spec(module):
        entry("routing", name)(fit)
