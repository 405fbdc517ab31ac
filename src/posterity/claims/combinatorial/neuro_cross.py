"""Neuro CROSS exchange: starts that a network picks against a rule of thumb, against all, and what each costs."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor, nn

from posterity.claims import Between, Count, Several, Trial, bound, comparison, trend
from posterity.combinatorial import DecrementNet, FleetProblem, cross_exchange, fit_decrements, solve_min_max
from posterity.lab.data import Routing, RoutingData, load_routing
from posterity.lab.nets import seeded
from posterity.lab.tasks import entry
from posterity.lab.tasks.routing import Fleet
from posterity.lab.timing import relative_growth

NOISE = 1.0  # of the angles of a start plan
TOP = 10  # starts of a pair that are searched
SHARE = 0.98  # of the seconds of a comparison, the rest is for the last step


class NearestStarts(nn.Module):
    """The rule of thumb: the start with the shortest of its two new arcs first."""

    def forward(
        self, problem: FleetProblem, routes: Sequence[Sequence[int]], pairs: Sequence[tuple[int, int]]
    ) -> list[Tensor]:
        tables = []
        for i, j in pairs:
            here, there = (torch.tensor([-1, *routes[k], -1]) for k in (i, j))
            arcs = _between(problem, i, here[:-1], there[1:]), _between(problem, j, there[:-1], here[1:]).T
            tables.append(-torch.minimum(*arcs))
        return tables


def _between(problem: FleetProblem, k: int, before: Tensor, after: Tensor) -> Tensor:
    """Return the arcs of vehicle k from each place to each, -1 being its start in the first and its end in the second."""
    arcs = problem.between[before[:, None], after].clone()
    arcs[before < 0], arcs[:, after < 0] = problem.leave[k, after], problem.enter[k, before][:, None]
    arcs[(before < 0)[:, None] & (after < 0)] = 0
    return arcs


def _problem(data: RoutingData, n_vehicles: int, capacitated: bool) -> FleetProblem:
    """Return a fleet that starts and ends at the depots in turn, at the first place where there is none."""
    depots = data.depots or (0,)
    customers = np.setdiff1d(np.arange(len(data.distance)), depots)
    at = [depots[k % len(depots)] for k in range(n_vehicles)]
    distance = torch.from_numpy(data.distance)
    loads = (None, None) if not capacitated else (torch.from_numpy(data.demands[customers]), data.capacity)
    return FleetProblem(
        distance[customers][:, customers].contiguous(), distance[at][:, customers].contiguous(),
        distance[customers][:, at].T.contiguous(), *loads,
    )  # fmt: skip


def _fits(data: Any = None, n_vehicles: int = 2, capacitated: bool = False, **_: Any) -> None:
    if data is None:
        return
    if len(data.distance) - len(data.depots or (0,)) < n_vehicles:
        raise ValueError(f"n_vehicles must be at most the number of customers, got {n_vehicles}")
    if capacitated and (data.demands is None or data.capacity is None):
        raise ValueError("capacitated=True needs demands and a capacity, has none")
    _problem(data, n_vehicles, capacitated)


def _instances(
    trial: Trial, data: str, n_instances: int, n_vehicles: int, capacitated: bool
) -> list[tuple[FleetProblem, list[list[int]] | None]]:
    """Return problems and plans to start from: noisy sweeps, or random ones where places have no coordinates."""
    found = []
    for k in range(n_instances):
        seed = trial.seed * n_instances + k  # no two trials share a made instance
        places = load_routing(data, seed=seed)
        problem = _problem(places, n_vehicles, capacitated)
        rng, n = np.random.default_rng(seed), len(problem.between)
        order = rng.permutation(n)
        if places.points is not None:
            depots = places.depots or (0,)
            customers = np.setdiff1d(np.arange(len(places.distance)), depots)
            x, y = (places.points[customers] - places.points[list(depots)].mean(0)).T
            order = np.argsort(np.arctan2(y, x) + NOISE * rng.standard_normal(n))
        start = [part.tolist() for part in np.array_split(order, n_vehicles)]
        found.append((problem, None if capacitated else start))
    return found


def _trained(seed: int, n_samples: int, n_steps: int) -> tuple[DecrementNet, list[float]]:
    with seeded(seed):
        net = DecrementNet()
    generator = torch.Generator().manual_seed(seed)
    return net, fit_decrements(net, n_samples=n_samples, n_steps=n_steps, generator=generator)


@comparison(
    paper="neuro-cross",
    says="Starts of exchanges that a network picks lead to shorter longest routes than those with the shortest new arcs.",
    where="Section 6",
    arms=("nearest starts", "NCE"),
    metric="longest route, mean over instances",
    better="lower",
    check=_fits,
    smallest={"n_instances": 1, "n_samples": 4, "n_steps": 1},
)
def picked_starts(
    trial: Trial,
    data: Routing = "uniform",
    n_vehicles: Several = 4,
    capacitated: bool = False,
    n_instances: Count = 8,
    n_samples: Count = 1200,
    n_steps: Count = 250,
) -> dict[str, float]:
    """Balance 80 customers over 4 vehicles, searching the ten starts of a pair of routes that each rule ranks first.

    Both arms begin with the same sweep, its angles disturbed by noise of one radian, and descend once. The network is
    trained in the trial on pairs of at most 36 customers, none of them of the test. Recorded: of the best exchange of
    the longest route, the share that the ten best predicted starts and ten random ones reach, and exchanges tried.
    Of a file, instances are disturbed starts of the same places; capacities are left aside unless ``capacitated``, where
    the start is the solver's own.
    """
    net, losses = _trained(trial.seed, n_samples, n_steps)
    for step, loss in enumerate(losses):
        trial.track("loss", step, loss)
    rules, values, tried = {"nearest starts": NearestStarts(), "NCE": net}, {}, {}
    instances = _instances(trial, data, n_instances, n_vehicles, capacitated)
    for name, rule in rules.items():
        plans = [solve_min_max(problem, start, net=rule, top_k=TOP) for problem, start in instances]
        values[name] = float(np.mean([plan.value for plan in plans]))
        tried[name] = float(np.mean([plan.n_evaluated for plan in plans]))
        trial.record(f"exchanges tried, {name}", tried[name])
    generator = torch.Generator().manual_seed(trial.seed)
    starts = [(problem, start) for problem, start in instances if start is not None]
    for name, share in _shares(net, starts, generator).items():
        trial.record(f"share of the best exchange, ten {name} starts", share)
    return values


def _shares(
    net: DecrementNet, instances: list[tuple[FleetProblem, list[list[int]]]], generator: torch.Generator
) -> dict[str, float]:
    """Return what ten starts reach of the best exchange of all, over pairs with the longest route."""
    shares: dict[str, list[float]] = {"predicted": [], "random": []}
    for problem, plan in instances:
        i = int(problem.lengths(plan).argmax())
        pairs = [(i, j) for j in range(len(plan)) if j != i]
        with torch.no_grad():
            tables = net(problem, plan, pairs)
        for (_, j), table in zip(pairs, tables, strict=True):
            exact = cross_exchange(problem, plan, i, j).decrement
            if exact.max() > 0:
                picked = {"predicted": table.flatten(), "random": torch.rand(len(exact), generator=generator)}
                for name, score in picked.items():
                    chosen = score.topk(min(TOP, len(score))).indices
                    shares[name].append(float(exact[chosen].max() / exact.max()))
    return {name: float(np.mean(each)) for name, each in shares.items() if each}


@bound(
    paper="neuro-cross",
    says="Ten starts that a network picks are nearly as good as all starts.",
    where="Section 6",
    metric="longest route of NCE over that of all exchanges, means over instances",
    limit=1.05,
    check=_fits,
    smallest={"n_instances": 1, "n_samples": 4, "n_steps": 1},
)
def nearly_all(
    trial: Trial,
    data: Routing = "uniform",
    n_vehicles: Several = 4,
    capacitated: bool = False,
    n_instances: Count = 8,
    n_samples: Count = 1200,
    n_steps: Count = 250,
) -> float:
    """Descend once from the same starts as `picked_starts`, with the ten best predicted starts of a pair and with all.

    Recorded: the exchanges whose lengths each computed.
    """
    net, _ = _trained(trial.seed, n_samples, n_steps)
    instances = _instances(trial, data, n_instances, n_vehicles, capacitated)
    means = []
    for name, rule in (("ten starts", net), ("all starts", None)):
        plans = [solve_min_max(problem, start, net=rule, top_k=TOP) for problem, start in instances]
        means.append(float(np.mean([plan.value for plan in plans])))
        trial.record(f"exchanges tried, {name}", float(np.mean([plan.n_evaluated for plan in plans])))
    return means[0] / means[1]


@trend(
    paper="neuro-cross",
    says="A step with the network grows with about the square of the customers of a route, not with their fourth power.",
    where="Section 5",
    metric="slope of log seconds of a step against log customers a route",
    high=2.5,
    timed=True,
    smallest={"sizes": (10, 20), "all_sizes": (5, 10), "rounds": 1},
)
def growth(
    trial: Trial,
    sizes: tuple[Annotated[int, Between(2, 400)], ...] = (20, 40, 80, 160),
    all_sizes: tuple[Annotated[int, Between(2, 100)], ...] = (20, 40, 80),
    rounds: Count = 7,
) -> float:
    """Time one step on two routes: the network and the search of its ten starts, or the search of all.

    What a step takes does not depend on the weights, so the network is not trained. The yardstick is the same work at every
    size. Recorded: the slope of a search of all starts, which at these sizes is not yet its fourth power, and the exchanges of both.
    """
    with seeded(trial.seed):
        net = DecrementNet()
    generator = torch.Generator().manual_seed(trial.seed)
    ruler = torch.rand(160, 160, generator=generator)

    def cases(sizes: Sequence[int], work: Callable[..., object]) -> list[Callable[[], object]]:
        works = []
        for n in sizes:
            places = torch.rand(2 * n + 1, 2, generator=generator, dtype=torch.float64)
            problem = FleetProblem.from_coords(places[1:], places[:1], vehicles=[0, 0])
            plan = [list(range(n)), list(range(n, 2 * n))]
            works.append(partial(work, problem, plan))
        return works

    def ten(problem: FleetProblem, plan: list[list[int]]) -> object:
        with torch.no_grad():
            (table,) = net(problem, plan, [(0, 1)])
        flat = table.flatten().topk(TOP).indices
        starts = torch.stack([flat // table.shape[1], flat % table.shape[1]], 1)
        return cross_exchange(problem, plan, 0, 1, starts=starts)

    def every(problem: FleetProblem, plan: list[list[int]]) -> object:
        return cross_exchange(problem, plan, 0, 1)

    seconds = []
    for n, work in zip(all_sizes, cases(all_sizes, every), strict=True):
        turns = []
        for _ in range(max(2, rounds // 2)):
            started = time.perf_counter()
            work()
            turns.append(time.perf_counter() - started)
        seconds.append(min(turns))
        trial.track("seconds: all starts", n, seconds[-1])
    trial.record("slope of a search of all starts", np.polyfit(np.log(all_sizes), np.log(seconds), 1)[0])
    yard = [lambda: ruler @ ruler @ ruler] * len(sizes)
    return relative_growth(trial, sizes, cases(sizes, ten), yard, rounds=rounds, name="ten starts")


@entry("routing", "NCE", paper="neuro-cross")
def balanced(train: Fleet, seed: int) -> Callable[[], list[list[int]]]:
    """Return the search with a network that is trained beforehand, which takes no places from the file, and perturbations until the time is over."""
    distance = torch.from_numpy(np.asarray(train.distance, dtype=float))
    leave, enter = distance[:1, 1:], distance[1:, :1].T
    loads = (None, None)
    if np.isfinite(train.capacity):
        loads = torch.from_numpy(np.asarray(train.demands, dtype=float)), float(train.capacity)
    if train.n_vehicles < 2:
        raise ValueError(f"n_vehicles must be at least 2 for NCE, got {train.n_vehicles}")
    shape = (train.n_vehicles, train.n_customers)
    problem = FleetProblem(
        distance[1:, 1:].contiguous(),
        leave.expand(shape).contiguous(),
        enter.expand(shape).contiguous(),
        *loads,
    )
    net, _ = _trained(seed, 1200, 375)

    def predict() -> list[list[int]]:
        return solve_min_max(
            problem, net=net, top_k=TOP, n_perturbations=10**9, time_limit=SHARE * train.seconds,
            generator=torch.Generator().manual_seed(seed),
        ).routes  # fmt: skip

    return predict
