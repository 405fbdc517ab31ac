"""The identity against black-box differentiation in two calls, and batched solvers against loops over instances."""

import itertools
import time
import warnings
from statistics import median

import torch
from torch import Tensor

from benchmarks.timing import race
from posterity.optimization import (
    CombinatorialLayer,
    grid_shortest_path,
    ranking,
    spanning_tree,
    top_k,
    travelling_salesman,
)


class TwoCalls(torch.autograd.Function):
    """Black-box differentiation as its paper writes it."""

    @staticmethod
    def forward(ctx, costs: Tensor, solver, strength: float) -> Tensor:
        decision = solver(costs.detach())
        ctx.save_for_backward(costs, decision)
        ctx.solver, ctx.strength = solver, strength
        return decision

    @staticmethod
    def backward(ctx, gradient: Tensor):
        costs, decision = ctx.saved_tensors
        return (ctx.solver(costs + ctx.strength * gradient) - decision) / ctx.strength, None, None


def top_k_by_instance(costs: Tensor) -> Tensor:
    """Return 10-hot rows, sorted one by one."""
    rows = []
    for row in costs:
        decision = torch.zeros_like(row)
        decision[row.argsort()[:10]] = 1
        rows.append(decision)
    return torch.stack(rows)


def ranks_by_instance(costs: Tensor) -> Tensor:
    """Return ranks, row by row."""
    return torch.stack([row.argsort(descending=True).argsort().to(row) for row in costs])


def trees_by_instance(costs: Tensor, pairs: list[tuple[int, int]], n_nodes: int) -> Tensor:
    """Return spanning trees by Kruskal's algorithm, graph by graph."""
    decisions = torch.zeros_like(costs)
    for row, decision in zip(costs, decisions, strict=True):
        group = list(range(n_nodes))
        for edge in row.argsort().tolist():
            a, b = (group[node] for node in pairs[edge])
            if a != b:
                decision[edge] = 1
                group = [a if g == b else g for g in group]
    return decisions


def seconds(work, rounds: int = 9) -> float:
    """Return the median of a few runs."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return median(times)


def main() -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "negative costs")  # where the black box moved them
    generator, solver = torch.Generator().manual_seed(0), grid_shortest_path()
    layer = CombinatorialLayer(solver)
    for side in (12, 24):
        costs = torch.rand(32, side, side, generator=generator).requires_grad_()
        truth = solver(torch.rand(32, side, side, generator=generator))

        def step(decision: Tensor) -> None:
            torch.autograd.grad((decision - truth).square().sum(), costs)  # noqa: B023

        race(
            f"a step through {side} x {side} grids, batch 32, against two calls",
            lambda: step(layer(costs)), lambda: step(TwoCalls.apply(costs, solver, 0.1)),  # noqa: B023
            target=1.8, rounds=101,
        )  # fmt: skip
    many = torch.rand(1000, 20, generator=generator)
    assert torch.equal(top_k(10)(many), top_k_by_instance(many))
    assert torch.equal(ranking()(many), ranks_by_instance(many))
    race(
        "top 10 of 20, ten batches of 1000, against a loop",
        lambda: [top_k(10)(many) for _ in range(10)], lambda: [top_k_by_instance(many) for _ in range(10)], target=50,
    )  # fmt: skip
    few = many[:, :10].contiguous()
    race(
        "ranks of 10, ten batches of 1000, against a loop",
        lambda: [ranking()(few) for _ in range(10)], lambda: [ranks_by_instance(few) for _ in range(10)], target=50,
    )  # fmt: skip
    pairs = list(itertools.combinations(range(12), 2))
    graphs = torch.rand(32, len(pairs), generator=generator)
    tree = spanning_tree(torch.tensor(pairs).T, 12)
    assert torch.equal(tree(graphs), trees_by_instance(graphs, pairs, 12))
    race(
        "spanning trees of 12 nodes, batch 32, against a loop",
        lambda: tree(graphs), lambda: trees_by_instance(graphs, pairs, 12), target=2,
    )  # fmt: skip
    grids = torch.rand(32, 12, 12, generator=generator)
    print(f"12 x 12 grids, batch 32: {1e3 * seconds(lambda: solver(grids)):.2f} ms (target at most 15 ms)")
    points = torch.rand(32, 10, 2, generator=generator)
    lengths, trip = torch.cdist(points, points), travelling_salesman("exact")
    print(f"tours of 10 cities, batch 32: {seconds(lambda: trip(lengths)):.3f} s (target at most 0.3 s)")


if __name__ == "__main__":
    main()
