"""What an attack takes beside the solver's calls, list schedules against scans of sets, and peers under attack."""

import time
from functools import partial
from queue import PriorityQueue

import numpy as np
import torch
from numpy import ndarray
from ortools.constraint_solver import pywrapcp

from benchmarks.timing import race
from posterity.combinatorial import ATSP, Coverage, EditPolicy, Jobs, Scheduling, Sets, attack
from posterity.combinatorial.edit_policy import log_probabilities
from posterity.combinatorial.edited_tours import farthest_insertion, nearest


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(100)


def by_scans(jobs: Jobs) -> list[float]:
    """Return the start times of shortest-first by sets of what each job waits for, all of which are scanned at each event."""
    n = len(jobs.duration)
    waits: dict[int, set[int]] = {k: set() for k in range(n)}
    for i, j in jobs.before.tolist():
        waits[j].add(i)
    queue: PriorityQueue = PriorityQueue()
    used, now, starts = np.zeros(jobs.resources.shape[1]), 0.0, {}
    while len(starts) < n or not queue.empty():
        if not queue.empty():
            now = queue.queue[0][0]
        while not queue.empty() and queue.queue[0][0] == now:
            _, job = queue.get()
            used = used - jobs.resources[job]
            waits.pop(job)
            for rest in waits.values():
                rest.discard(job)
        ready = [k for k, rest in waits.items() if not rest]
        for _, k in sorted((float(jobs.duration[k]), k) for k in ready):
            if k not in starts and np.all(used + jobs.resources[k] <= 1 + 1e-12):
                used = used + jobs.resources[k]
                starts[k] = now
                queue.put((now + float(jobs.duration[k]), k))
    return [starts[k] for k in range(n)]


def project(n: int) -> Jobs:
    """Return jobs in levels of eight, each after one to three of the level before."""
    rng = np.random.default_rng(100)
    pairs = [
        (int(k), job)
        for job in range(8, n)
        for k in rng.choice(np.arange(job - job % 8 - 8, job - job % 8), rng.integers(1, 4), replace=False)
    ]
    return Jobs(rng.integers(1, 11, n).astype(float), rng.integers(1, 11, (n, 1)) / 10, np.array(pairs))


def ortools(costs: ndarray) -> list[int]:
    """Return a tour of OR-Tools after a fixed number of solutions."""
    whole = np.rint(1000 * costs).astype(int).tolist()
    manager = pywrapcp.RoutingIndexManager(len(whole), 1, 0)
    model = pywrapcp.RoutingModel(manager)
    arc = model.RegisterTransitCallback(lambda i, j: whole[manager.IndexToNode(i)][manager.IndexToNode(j)])
    model.SetArcCostEvaluatorOfAllVehicles(arc)
    options = pywrapcp.DefaultRoutingSearchParameters()
    options.solution_limit = 20
    plan, at, tour = model.SolveWithParameters(options), model.Start(0), []
    while not model.IsEnd(at):
        tour.append(manager.IndexToNode(at))
        at = plan.Value(model.NextVar(at))
    return tour


def calls(solver, instance: object, n: int) -> None:
    for _ in range(n):
        solver(instance)


def main() -> None:
    rng, problem = np.random.default_rng(100), ATSP()
    costs = rng.integers(1, 1000, (50, 50)).astype(float)
    why = "listing the allowed arcs and valuing a tour take about 0.04 ms a call, as much as a call of the nearest neighbor and a tenth of one of the insertion"
    for name, solver in (("nearest", nearest), ("farthest-insertion", farthest_insertion)):
        race(
            f"an attack with 300 calls of {name} at 50 cities, against the calls alone",
            lambda solver=solver: attack(problem, solver, costs, generator=generator()),
            partial(calls, solver, costs, 301), target=0.9, rounds=5, why=why,
        )  # fmt: skip
    solver = Scheduling().solvers["shortest-first"]
    for n, target in ((100, 10), (1000, 10)):
        jobs = project(n)
        assert solver(jobs).tolist() == by_scans(jobs)
        race(
            f"the schedule of {n} jobs, against scans of sets",
            partial(solver, jobs), partial(by_scans, jobs), target=target, rounds=9 if n == 100 else 3,
        )  # fmt: skip
    policy = EditPolicy()
    beams = [_State(costs + k, nearest(costs + k)) for k in range(3)]

    def apart() -> None:
        with torch.no_grad():
            for beam in beams:
                log_probabilities(policy, problem, [beam])

    def together() -> None:
        with torch.no_grad():
            log_probabilities(policy, problem, beams)

    race("all edits of three beams in one pass, against a pass each", together, apart, target=1, rounds=15)
    small = rng.integers(1, 1000, (20, 20)).astype(float)
    sets = Sets(rng.random((40, 80)) < 0.1, rng.integers(1, 101, 80).astype(float), 6)
    under = {
        "OR-Tools, 20 solutions, tours of 20 cities": (problem, ortools, small),
        "insertion and Or-opt, tours of 20 cities": (problem, problem.solvers["insertion+or-opt"], small),
        "tetris, 100 jobs": (Scheduling(), Scheduling().solvers["tetris"], project(100)),
        "greedy, 40 sets": (Coverage(), Coverage().solvers["greedy"], sets),
    }
    for name, (what, peer, instance) in under.items():
        began = time.perf_counter()
        found = attack(what, peer, instance, budget=300, generator=generator())
        spent = time.perf_counter() - began
        print(f"{name}: worse by {100 * found.ratio:.1f} % after {len(found.edits)} edits, {spent:.1f} s")


class _State:
    """A beam: costs, a tour and its edits."""

    def __init__(self, instance: ndarray, solution: list[int]) -> None:
        self.instance, self.solution = instance, solution
        self.allowed = ATSP().edits(instance, solution)


if __name__ == "__main__":
    main()
