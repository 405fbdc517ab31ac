"""Exchanges by tables against plain loops, the network against all starts, and OR-Tools beside the whole search."""

import itertools
from collections.abc import Callable
from functools import partial

import torch

from benchmarks.timing import race
from posterity.combinatorial import DecrementNet, FleetProblem, cross_exchange, fit_decrements, solve_min_max
from posterity.lab.tasks import routing


def by_loops(problem: FleetProblem, plan: list[list[int]]) -> list[float]:
    """Return the best decrement of each start: four loops, each exchange made and both routes measured."""
    between, leave, enter = (x.tolist() for x in (problem.between, problem.leave, problem.enter))
    r, s = plan

    def length(k: int, route: list[int]) -> float:
        if not route:
            return 0.0
        arcs = sum([between[u][v] for u, v in itertools.pairwise(route)])
        return leave[k][route[0]] + arcs + enter[k][route[-1]]

    old, table = max(length(0, r), length(1, s)), []
    for a, c in itertools.product(range(len(r) + 1), range(len(s) + 1)):
        best = 0.0
        for b in range(a, len(r) + 1):
            for d in range(c, len(s) + 1):
                new = max(length(0, r[:a] + s[c:d] + r[b:]), length(1, s[:c] + r[a:b] + s[d:]))
                best = max(best, old - new)
        table.append(best)
    return table


def fleet(n: int, vehicles: int) -> tuple[FleetProblem, list[list[int]]]:
    """Return places in the square and a plan of random routes."""
    generator = torch.Generator().manual_seed(100)
    places = torch.rand(n, 2, generator=generator, dtype=torch.float64)
    depot = torch.rand(1, 2, generator=generator, dtype=torch.float64)
    plan = [list(range(k, n, vehicles)) for k in range(vehicles)]
    return FleetProblem.from_coords(places, depot, [0] * vehicles), plan


def search(problem: FleetProblem, net: DecrementNet | None) -> Callable[[], object]:
    return lambda: solve_min_max(problem, net=net)


def main() -> None:
    for n, rounds in ((12, 15), (24, 3)):
        problem, plan = fleet(2 * n, 2)
        want = torch.tensor(by_loops(problem, plan), dtype=torch.float64)
        torch.testing.assert_close(cross_exchange(problem, plan, 0, 1).decrement, want)
        race(
            f"all starts of two routes of {n}, against plain loops",
            partial(cross_exchange, problem, plan, 0, 1), partial(by_loops, problem, plan), target=100, rounds=rounds,
            why="half of the time are some eighty calls of numpy, which cost the same at any size",
        )  # fmt: skip
    torch.manual_seed(100)
    net = DecrementNet()
    fit_decrements(net, n_steps=250, generator=torch.Generator().manual_seed(100))
    why = "all starts of two routes of 40 are tried in 6 ms, since what an exchange makes is a sum of two tables"
    for n, vehicles, rounds in ((120, 3, 5), (480, 3, 1)):
        problem, _ = fleet(n, vehicles)
        values = [solve_min_max(problem, net=which).value for which in (net, None)]
        race(
            f"a search with the network, {n // vehicles} customers a route, against all starts",
            search(problem, net), search(problem, None), target=8, rounds=rounds, why=why,
        )  # fmt: skip
        print(f"  longest route {values[0]:.3f}, with all starts {values[1]:.3f}")
    problem, _ = fleet(80, 4)
    whole = torch.cat(
        [
            torch.cat([torch.zeros(1, 1), problem.leave[:1]], 1),
            torch.cat([problem.leave[:1].T, problem.between], 1),
        ]
    )
    train = routing.Fleet(whole.numpy(), torch.zeros(80).numpy(), float("inf"), 4, 2.0)
    theirs, _ = routing.measure_plan(train, routing.ortools(train, 0)())
    ours = [
        solve_min_max(
            problem,
            net=which,
            n_perturbations=10**9,
            time_limit=2.0,
            generator=torch.Generator().manual_seed(0),
        ).value
        for which in (net, None)
    ]
    print(
        f"80 customers, 4 vehicles, 2 s: network {ours[0]:.3f}, all starts {ours[1]:.3f}, OR-Tools {theirs:.3f}"
    )


if __name__ == "__main__":
    main()
