"""ROCO: what ten edits that cannot worsen the optimum do to a solver, by search, by chance and by a learned policy."""

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy import ndarray

from posterity.claims import Between, Count, Trial, bound, comparison
from posterity.combinatorial import (
    ATSP,
    Coverage,
    EditPolicy,
    Jobs,
    Scheduling,
    Sets,
    attack,
    fit_edit_policy,
)
from posterity.lab.data import Routing, RoutingData, dataset, load_routing
from posterity.lab.nets import seeded

CITIES = 30  # of the made set
HIGHEST = 10**6  # of its costs, before they are closed under the triangle inequality
Problem = Literal["atsp", "scheduling", "coverage"]


@dataset(Routing, "triangle-atsp")
def triangle(seed: int) -> RoutingData:
    """Return cities whose directed costs are whole numbers and obey the triangle inequality."""
    costs = np.random.default_rng(seed).integers(1, HIGHEST + 1, (CITIES, CITIES)).astype(float)
    np.fill_diagonal(costs, 0)
    for k in range(CITIES):
        costs = np.minimum(costs, costs[:, k : k + 1] + costs[k])
    return RoutingData(
        costs, note=f"triangle-atsp: {CITIES} cities, directed costs under the triangle inequality"
    )


def _levels(seed: int) -> Jobs:
    """Return jobs in four to six levels of four to eight, each after one to three of the level before."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(4, 9, rng.integers(4, 7))
    firsts = np.concatenate([[0], sizes.cumsum()])
    n, pairs = int(firsts[-1]), []
    for low, start, size in zip(firsts, firsts[1:], sizes[1:], strict=False):
        for job in range(start, start + size):
            before = rng.choice(
                np.arange(low, start), rng.integers(1, min(3, start - low) + 1), replace=False
            )
            pairs += [(int(k), job) for k in sorted(before)]
    return Jobs(
        rng.integers(1, 11, n).astype(float),
        rng.integers(1, 11, (n, 1)) / 10,
        np.array(pairs, dtype=np.int64),
    )


def _groups(seed: int) -> Sets:
    """Return 40 sets over 80 weighted elements, six of which may be chosen."""
    rng = np.random.default_rng(seed)
    return Sets(rng.random((40, 80)) < 0.1, rng.integers(1, 101, 80).astype(float), 6)


PROBLEMS: dict[str, Any] = {"atsp": ATSP(), "scheduling": Scheduling(), "coverage": Coverage()}


def _fits(
    data: Any = None, problem: str = "atsp", solver: str = "nearest", n_cities: int = 3, **_: Any
) -> None:
    known = PROBLEMS[problem].solvers
    if solver not in known:
        raise ValueError(f"solver must be one of {', '.join(map(repr, known))} for {problem}, got {solver!r}")
    if data is not None:
        PROBLEMS["atsp"].validate(data.distance)
        if len(data.distance) < n_cities:
            raise ValueError(
                f"n_cities must be at most {len(data.distance)}, the cities there are, got {n_cities}"
            )
        if not data.distance[~np.eye(len(data.distance), dtype=bool)].any():
            raise ValueError("data must have a distance above 0, has none")


def _instances(trial: Trial, data: str, problem: str, n_instances: int) -> list[Any]:
    """Return instances that no two trials share, but where they come from a file."""
    make: dict[str, Callable[[int], Any]] = {
        "atsp": lambda seed: load_routing(data, seed=seed).distance, "scheduling": _levels, "coverage": _groups
    }  # fmt: skip
    return [make[problem](trial.seed * n_instances + k) for k in range(n_instances)]


def _by_chance(problem: Any, solver: Callable[[Any], Any], instance: Any, n_edits: int, rng: Any) -> float:
    """Return the relative worsening after edits drawn one after the other, negative where the solver does better."""
    solution = solver(instance)
    clean = value = problem.value(instance, solution)
    for _ in range(n_edits):
        edits = problem.edits(instance, solution)
        if not len(edits):
            break
        instance = problem.apply(instance, tuple(edits[rng.integers(len(edits))].tolist()))
        solution = solver(instance)
        value = problem.value(instance, solution)
    return (value - clean) / clean * (1 if problem.sense == "min" else -1)


@comparison(
    paper="roco",
    says="A heuristic that seems sound fails by a tenth and more after ten edits that cannot worsen the optimum.",
    where="abstract and the tables of its experiments",
    arms=("random edits", "attack"),
    metric="relative rise of the solver's cost, mean over instances",
    better="higher",
    check=_fits,
    smallest={"n_instances": 1, "budget": 10},
)
def worsened(
    trial: Trial,
    data: Routing = "triangle-atsp",
    problem: Problem = "atsp",
    solver: str = "nearest",
    n_edits: Count = 10,
    budget: Count = 300,
    n_instances: Count = 20,
) -> dict[str, float]:
    """Make ten edits by chance, mean of three draws, and by annealing with 300 calls of the solver.

    Each edit halves the cost of an arc that is not on the solver's tour. By chance it does as much good as harm.
    ``problem="scheduling"`` and ``"coverage"`` draw instances of their own and take a solver of theirs, as
    ``solver="tetris"`` or ``"greedy"``; ``data`` is of cities alone, and a file is attacked as often as there are instances. Recorded: the share
    of instances whose solver does worse by a tenth.
    """
    what = PROBLEMS[problem]
    by = what.solvers[solver]
    rng, generator = np.random.default_rng(trial.seed), torch.Generator().manual_seed(trial.seed)
    chance, found = [], []
    for instance in _instances(trial, data, problem, n_instances):
        chance += [_by_chance(what, by, instance, n_edits, rng) for _ in range(3)]
        result = attack(what, by, instance, n_edits=n_edits, budget=budget, generator=generator)
        found.append(result.ratio)
        for call, ratio in enumerate(result.history):
            if call % 10 == 0 and len(found) == 1:
                trial.track("worsening after calls, first instance", call, ratio)
    trial.record("share of instances worse by a tenth", float(np.mean(np.array(found) >= 0.1)))
    return {"random edits": float(np.mean(chance)), "attack": float(np.mean(found))}


@comparison(
    paper="roco",
    says="Annealing finds worse instances than random sequences of edits do with as many calls of the solver.",
    where="the attackers that it compares",
    arms=("random", "anneal"),
    metric="relative rise of the solver's cost, mean over instances",
    better="higher",
    check=_fits,
    smallest={"n_instances": 1, "budget": 10},
)
def searched(
    trial: Trial,
    data: Routing = "triangle-atsp",
    problem: Problem = "atsp",
    solver: str = "farthest-insertion",
    n_edits: Count = 10,
    budget: Count = 300,
    n_instances: Count = 10,
) -> dict[str, float]:
    """Attack the same instances by both methods, each with 300 calls; of a random sequence the best beginning counts.

    Recorded: the genetic search with as many calls.
    """
    what = PROBLEMS[problem]
    by = what.solvers[solver]
    instances = _instances(trial, data, problem, n_instances)

    def mean(method: Literal["random", "anneal", "genetic"]) -> float:
        generator = torch.Generator().manual_seed(trial.seed)
        options: dict[str, Any] = {"n_edits": n_edits, "budget": budget, "generator": generator}
        return float(np.mean([attack(what, by, each, method=method, **options).ratio for each in instances]))

    trial.record("genetic", mean("genetic"))
    return {"random": mean("random"), "anneal": mean("anneal")}


def _optimum(costs: ndarray) -> float:
    """Return the cost of the best tour, by the paths through every set of cities (Held and Karp)."""
    n = len(costs) - 1  # city n is where it begins
    best = np.full((1 << n, n), np.inf)
    for k in range(n):
        best[1 << k, k] = costs[n, k]
    for some in range(1, 1 << n):
        inside = [k for k in range(n) if some >> k & 1]
        for k in range(n):
            if not some >> k & 1:
                best[some | 1 << k, k] = min(
                    best[some | 1 << k, k], (best[some, inside] + costs[inside, k]).min()
                )
    return float((best[-1] + costs[:n, n]).min())


@bound(
    paper="roco",
    says="No attack worsens the optimum.",
    where="the no-worse optimal cost guarantee",
    metric="largest optimum after an attack over that before it",
    limit=1.0,
    check=_fits,
    smallest={"n_cities": 5, "n_instances": 1, "budget": 5},
)
def no_worse(
    trial: Trial,
    data: Routing = "triangle-atsp",
    n_cities: Annotated[int, Between(3, 13)] = 9,
    n_edits: Count = 10,
    budget: Count = 60,
    n_instances: Count = 2,
) -> float:
    """Attack three solvers of tours through nine of the cities by each method, and find the best tours before and after.

    The policy is not trained: the guarantee is that of the edits. Recorded: the mean rise of the solvers' cost, and how far
    the optimum falls on average.
    """
    problem, rng = PROBLEMS["atsp"], np.random.default_rng(trial.seed)
    generator = torch.Generator().manual_seed(trial.seed)
    with seeded(trial.seed):
        policy = EditPolicy()
    shares, rises = [], []
    for whole in _instances(trial, data, "atsp", n_instances):
        some = rng.choice(len(whole), n_cities, replace=False)
        costs = whole[np.ix_(some, some)]
        before = _optimum(costs)
        for solver in problem.solvers.values():
            if not before > 0:  # places that coincide
                break
            for method in ("random", "anneal", "genetic", "policy"):
                found = attack(
                    problem, solver, costs, method=method, n_edits=n_edits, budget=budget, policy=policy,
                    generator=generator,
                )  # fmt: skip
                shares.append(_optimum(found.instance) / before)
                rises.append(found.ratio)
    trial.record("rise of the solvers' cost, mean", float(np.mean(rises)) if rises else 0.0)
    trial.record("optimum after over before, mean", float(np.mean(shares)) if shares else 1.0)
    return max(shares, default=1.0)


@comparison(
    paper="roco",
    says="A policy trained on other instances finds worse ones than random sequences do with no more calls of the solver.",
    where="the learned attacker and the tables of its experiments",
    arms=("random", "policy"),
    metric="relative rise of the solver's cost, mean over instances",
    better="higher",
    check=_fits,
    reason="returns hardly rise in a hundred episodes, nor in five hundred: a node's features do not say which arc misleads",
    smallest={"n_instances": 1, "n_train": 1, "episodes": 1, "n_edits": 2},
)
def learned(
    trial: Trial,
    data: Routing = "triangle-atsp",
    problem: Problem = "atsp",
    solver: str = "farthest-insertion",
    n_edits: Count = 10,
    n_instances: Count = 3,
    n_train: Count = 20,
    episodes: Count = 100,
) -> dict[str, float]:
    """Train a policy on instances of its own, and attack others by its three beams and by chance, with equal calls.

    Training makes a thousand calls more, which are not counted. Recorded: annealing with as many calls.
    """
    what = PROBLEMS[problem]
    by = what.solvers[solver]
    every = _instances(trial, data, problem, n_instances + n_train)
    test, train = every[:n_instances], every[n_instances:]
    with seeded(trial.seed):
        policy = EditPolicy()
    generator = torch.Generator().manual_seed(trial.seed)
    returns = fit_edit_policy(
        policy, what, by, train, episodes=episodes, n_edits=n_edits, generator=generator
    )
    for step, value in enumerate(returns):
        trial.track("return", step, value)
    values: dict[str, Sequence[float]] = {"random": [], "anneal": [], "policy": []}
    for instance in test:
        found = attack(what, by, instance, method="policy", n_edits=n_edits, policy=policy)
        values["policy"] = [*values["policy"], found.ratio]
        for method in ("random", "anneal"):
            other = attack(
                what, by, instance, method=method, n_edits=n_edits, budget=max(1, found.n_calls - 1), generator=generator
            )  # fmt: skip
            values[method] = [*values[method], other.ratio]
    trial.record("annealing", float(np.mean(values["anneal"])))
    return {name: float(np.mean(values[name])) for name in ("random", "policy")}
