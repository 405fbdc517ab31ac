"""A fleet: what it takes to drive from each customer to each, and from where each vehicle starts to where it ends.

A route is a list of customers in the order of their visits, numbered from 0 without depots, and a plan
has one for each vehicle. Vehicle k, that visits v_1 ... v_n, drives

    L_k = leave[k, v_1] + between[v_1, v_2] + ... + enter[k, v_n],                             (1)

and nothing if it visits nobody. Several depots, vehicles that may end at any of them, roads that are
longer one way than back: all are numbers in three tables.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from posterity._checks import at_least, finite, floating, has_shape, one_of
from posterity._precision import wide

__all__ = ["FleetProblem"]

ROUNDED_LOAD = 1e-9  # by how much of the capacity a sum of demands may exceed it


@dataclass(frozen=True, eq=False)
class FleetProblem:
    """Distances of a fleet's customers, starts and ends, with demands and capacities where there are any.

    Parameters
    ----------
    between : Tensor of shape (n, n)
        From customer to customer; the way back may be another, the diagonal is ignored.
    leave : Tensor of shape (vehicles, n)
        From a vehicle's start to a customer; at least two vehicles.
    enter : Tensor of shape (vehicles, n)
        From a customer to a vehicle's end.
    demands : Tensor of shape (n,), optional
        At least 0.
    capacity : float or Tensor of shape (vehicles,), optional
        The largest sum of demands on a route, of all vehicles or of each, at least 0 and finite; None
        is no limit.

    Raises
    ------
    ValueError
        If there is no customer or are less than two vehicles; shapes or dtypes disagree; a distance
        or demand is negative or not finite; a capacity comes without demands; or a demand is above
        every capacity, or all of them above the sum of capacities.

    Examples
    --------
    >>> import torch
    >>> from posterity.combinatorial import FleetProblem
    >>> customers = torch.tensor([[0.0, 1.0], [0.0, 2.0], [3.0, 0.0]])
    >>> problem = FleetProblem.from_coords(customers, torch.zeros(1, 2), vehicles=[0, 0])
    >>> problem.lengths([[0, 1], [2]])
    tensor([4., 6.])
    >>> problem.lengths([[0, 1, 2], []]).round(decimals=2)
    tensor([8.6100, 0.0000])
    """

    between: Float[Tensor, "n n"]
    leave: Float[Tensor, "vehicles n"]
    enter: Float[Tensor, "vehicles n"]
    demands: Float[Tensor, " n"] | None = None
    capacity: float | int | Float[Tensor, " vehicles"] | None = None

    def __post_init__(self) -> None:
        n = len(has_shape("between", floating("between", self.between), (None, None)))
        if n < 1:
            raise ValueError("between must have at least one customer, got none")
        has_shape("between", self.between, (n, n))
        vehicles = len(
            has_shape("leave", floating("leave", self.leave), (None, n), "the customers of between")
        )
        if vehicles < 2:
            raise ValueError(
                f"leave must have a row for each of at least 2 vehicles, got {vehicles}: "
                "the longest of one route is a travelling salesman's problem"
            )
        has_shape("enter", floating("enter", self.enter), (vehicles, n), "vehicles and customers of leave")
        for name in ("between", "leave", "enter", "demands"):
            value = getattr(self, name)
            if value is None:
                continue
            if name == "demands":
                has_shape(name, floating(name, value), (n,), "the customers of between")
            elif value.dtype != self.between.dtype:
                raise ValueError(
                    f"{name} must have the dtype of between, {self.between.dtype}, got {value.dtype}"
                )
            if value.device != self.between.device:
                raise ValueError(
                    f"{name} must be on the device of between, {self.between.device}, got {value.device}"
                )
            if name == "between":
                value = value.masked_fill(torch.eye(n, dtype=torch.bool, device=value.device), 0)
            if float(finite(name, value).min()) < 0:
                raise ValueError(f"{name} must be at least 0, got {float(value.min()):g}")
        if self.capacity is not None:
            self._check_capacity()

    def _check_capacity(self) -> None:
        if self.demands is None:
            raise ValueError("capacity must come with demands, got None for them")
        if isinstance(self.capacity, Tensor):
            has_shape(
                "capacity", floating("capacity", self.capacity), (len(self.leave),), "the vehicles of leave"
            )
            if float(finite("capacity", self.capacity).min()) < 0:
                raise ValueError(f"capacity must be at least 0, got {float(self.capacity.min()):g}")
        else:
            if isinstance(self.capacity, Real) and self.capacity == float("inf"):
                raise ValueError("capacity must be finite, or None for no limit, got inf")
            at_least("capacity", self.capacity, 0)
        loads, rooms = loads_and_rooms(self)
        worst = int(torch.tensor(loads).argmax())
        if not fits(loads[worst], max(rooms)):
            raise ValueError(
                f"demands must fit a vehicle, customer {worst} has {loads[worst]:g} and the largest capacity is {max(rooms):g}"
            )
        if not fits(sum(loads), sum(rooms)):
            raise ValueError(
                f"demands must fit the fleet, all are {sum(loads):g} and all capacities {sum(rooms):g}"
            )

    @classmethod
    def from_coords(
        cls,
        customers: Float[Tensor, "n 2"],
        depots: Float[Tensor, "depots 2"],
        vehicles: Sequence[int],
        *,
        end: str = "start",
        demands: Float[Tensor, " n"] | None = None,
        capacity: float | int | Float[Tensor, " vehicles"] | None = None,
    ) -> "FleetProblem":
        """Return the problem with straight distances.

        Parameters
        ----------
        customers : Tensor of shape (n, 2)
        depots : Tensor of shape (depots, 2)
        vehicles : sequence of int
            The depot at which each vehicle starts, from 0; two vehicles or more.
        end : {"start", "any"}, default="start"
            Whether a vehicle returns to its depot, or to whichever is nearest to its last customer.
        demands : Tensor of shape (n,), optional
        capacity : float or Tensor of shape (vehicles,), optional
            As for the class.

        Returns
        -------
        FleetProblem

        Raises
        ------
        ValueError
            If shapes disagree, a coordinate is not finite, a vehicle names a depot that is not there,
            ``end`` is unknown, or the class refuses it.
        """
        one_of("end", end, ("start", "any"))
        for name, value in (("customers", customers), ("depots", depots)):
            has_shape(name, floating(name, value), (None, 2))
            if not len(value):
                raise ValueError(f"{name} must have at least one row, got none")
            finite(name, value)
        if isinstance(vehicles, str) or not isinstance(vehicles, Sequence):
            raise ValueError(f"vehicles must be a sequence of depots' numbers, got {type(vehicles).__name__}")
        for depot in vehicles:
            if isinstance(depot, bool) or not isinstance(depot, Integral) or not 0 <= depot < len(depots):
                raise ValueError(f"vehicles must name depots in 0..{len(depots) - 1}, got {depot!r}")
        starts = depots.to(customers)[[int(depot) for depot in vehicles]]
        leave = _straight(starts, customers)
        enter = (
            leave
            if end == "start"
            else _straight(depots.to(customers), customers).amin(0).expand(leave.shape)
        )
        return cls(_straight(customers, customers), leave, enter.clone(), demands, capacity)

    def lengths(self, routes: Sequence[Sequence[int]]) -> Float[Tensor, " vehicles"]:
        """Return the length of each route, equation 1.

        Parameters
        ----------
        routes : sequence of sequence of int
            A plan: one route a vehicle, each customer once.

        Returns
        -------
        Tensor of shape (vehicles,)

        Raises
        ------
        ValueError
            If it is no plan for this problem.
        """
        plan = checked_plan(self, routes)
        full = bordered(self)
        nodes = (torch.tensor(ends(self, k, route), device=full.device) for k, route in enumerate(plan))
        return torch.stack([full[at[:-1], at[1:]].sum() for at in nodes]).to(self.between.dtype)


def _straight(a: Tensor, b: Tensor) -> Tensor:
    """Return distances, of the dtype that came."""
    return torch.linalg.vector_norm(wide(a)[:, None] - wide(b), dim=-1).to(a.dtype)


def loads_and_rooms(problem: FleetProblem) -> tuple[list[float], list[float]]:
    """Return demands and capacities as numbers."""
    demands, capacity, vehicles = problem.demands, problem.capacity, len(problem.leave)
    assert demands is not None and capacity is not None
    rooms = capacity.tolist() if isinstance(capacity, Tensor) else [float(capacity)] * vehicles
    return demands.tolist(), rooms


def fits(load: float, room: float) -> bool:
    return load <= room * (1 + ROUNDED_LOAD)


def bordered(problem: FleetProblem) -> Tensor:
    """Return distances of customers, starts and ends in one matrix, in float64 where the device has it.

    Customers come first, then start and end of each vehicle. The way into a start and out of an end,
    which no route takes, is that of the other direction; among starts and ends it is 0.
    """
    dtype = wide(problem.between).dtype if problem.between.device.type == "mps" else torch.float64
    n, vehicles = len(problem.between), len(problem.leave)
    full = torch.zeros(n + 2 * vehicles, n + 2 * vehicles, dtype=dtype, device=problem.between.device)
    full[:n, :n] = problem.between
    full[n::2, :n] = problem.leave.to(dtype)
    full[:n, n::2] = problem.leave.T.to(dtype)
    full[n + 1 :: 2, :n] = problem.enter.to(dtype)
    full[:n, n + 1 :: 2] = problem.enter.T.to(dtype)
    full.diagonal().zero_()
    return full


def ends(problem: FleetProblem, k: int, route: Sequence[int]) -> list[int]:
    """Return a route between its start and its end, in the numbering of `bordered`."""
    start = len(problem.between) + 2 * k
    return [start, *route, start + 1]


def checked_plan(problem: FleetProblem, routes: Any) -> list[list[int]]:
    """Return a plan as lists, or say what is wrong with it."""
    if not isinstance(problem, FleetProblem):
        raise ValueError(f"problem must be a FleetProblem, got {type(problem).__name__}")
    n, vehicles = len(problem.between), len(problem.leave)
    if isinstance(routes, str | bytes | Tensor) or not isinstance(routes, Sequence):
        raise ValueError(f"routes must be a list of lists of customers, got {type(routes).__name__}")
    if len(routes) != vehicles:
        raise ValueError(f"routes must have one route for each of {vehicles} vehicles, got {len(routes)}")
    seen, plan = [0] * n, []
    for k, route in enumerate(routes):
        if isinstance(route, str | bytes | Tensor) or not isinstance(route, Sequence):
            raise ValueError(
                f"routes must be lists of customers, that of vehicle {k} is {type(route).__name__}"
            )
        for customer in route:
            if isinstance(customer, bool) or not isinstance(customer, Integral) or not 0 <= int(customer) < n:
                raise ValueError(f"routes must visit customers in 0..{n - 1}, vehicle {k} has {customer!r}")
            seen[int(customer)] += 1
        plan.append([int(customer) for customer in route])
    for customer, times in enumerate(seen):
        if times != 1:
            raise ValueError(
                f"routes must visit each customer once, customer {customer} is visited {times} times"
            )
    if problem.capacity is not None:
        demands, rooms = loads_and_rooms(problem)
        for k, (route, room) in enumerate(zip(plan, rooms, strict=True)):
            load = sum(demands[c] for c in route)
            if not fits(load, room):
                raise ValueError(
                    f"routes must not overload a vehicle: {k} carries {load:g}, its capacity is {room:g}"
                )
    return plan
