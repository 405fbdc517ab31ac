"""Lengths and all starts of two routes on four kinds of problems, and the longest route of small ones."""

import torch

from posterity.combinatorial import FleetProblem, cross_exchange, solve_min_max

AGAINST = "plain loops over all exchanges, and over all partitions and orders of seven customers, in float64"


def pairs(stored):
    """Yield what is compared: name, ours, theirs, allowed difference."""
    plan = [list(range(7)), list(range(7, 11))]
    for kind in ("one", "flexible", "roads", "loads"):
        names = ("between", "leave", "enter", *(("demands", "capacity") if kind == "loads" else ()))
        problem = FleetProblem(*(torch.tensor(stored[f"{kind}_{name}"]) for name in names))
        yield f"{kind}: lengths", problem.lengths(plan), stored[f"{kind}_lengths"], 1e-12
        yield (
            f"{kind}: decrements",
            cross_exchange(problem, plan, 0, 1).decrement,
            stored[f"{kind}_table"],
            1e-12,
        )
    found = []
    for between, leave in zip(stored["small_between"], stored["small_leave"], strict=True):
        problem = FleetProblem(torch.tensor(between), torch.tensor(leave), torch.tensor(leave))
        generator = torch.Generator().manual_seed(0)
        found.append(solve_min_max(problem, n_perturbations=30, generator=generator).value)
    yield (
        "seven customers: longest route",
        torch.tensor(found, dtype=torch.float64),
        stored["small_best"],
        1e-12,
    )
