"""Race the graph with enumerated trajectories, the solver with torchdiffeq, aggregation with a loop over rows.

Run from the repository root: ``python -m benchmarks.robustness.gains``.
"""

import time

import torch
from torch import Tensor, nn

from benchmarks.timing import race
from posterity.robustness import (
    NeuralODEBlock,
    TimeLinear,
    aggregate_linear_bounds,
    controlled_adaptive_solve,
    trajectory_graph,
)
from posterity.robustness.boxes import SLACK, between, error_bounds, through_step, widen
from posterity.robustness.ode_solver import GROW, KEEP, REJECT


def enumerated(block: NeuralODEBlock, lower: Tensor, upper: Tensor) -> tuple[int, Tensor, Tensor]:
    """Follow every trajectory on its own: their number and the hull of their ends."""
    control, tableau, first = block._control()
    waiting, count, low, high = [(first, between(lower, upper))], 0, lower * 0 + 1e9, lower * 0 - 1e9
    while waiting:
        step, box = waiting.pop()
        if step is None:
            count, low, high = count + 1, torch.minimum(low, box.lower), torch.maximum(high, box.upper)
            continue
        new, error, _ = through_step(block.func, step, box, tableau, SLACK)
        least, most = (float(end) for end in error_bounds(error, block.atol, SLACK))
        if step.forced:
            actions = [KEEP]
        else:
            can = {GROW: least <= control.easy, KEEP: least <= 1 and most > control.easy, REJECT: most > 1}
            actions = [action for action, possible in can.items() if possible]
        ends = {(control.after(step, action), action == REJECT) for action in actions}
        waiting += [(after, box if rejected else widen(new, SLACK)) for after, rejected in ends]
    return count, low, high


def in_a_loop(
    A1: Tensor, c1: Tensor, A2: Tensor, c2: Tensor, lower: Tensor, upper: Tensor
) -> tuple[Tensor, Tensor]:
    """Aggregate lower bounds row by row, coordinate by coordinate."""
    A, c = [], []
    for a1, b1, a2, b2 in zip(A1, c1, A2, c2, strict=True):
        low = high = float(b1 - b2)
        for slope, left, right in zip(a1 - a2, lower, upper, strict=True):
            low += float(min(slope * left, slope * right))
            high += float(max(slope * left, slope * right))
        if high <= 0 or low >= 0:
            A.append(a1 if high <= 0 else a2)
            c.append(b1 if high <= 0 else b2)
        else:
            A.append((-low * a1 + high * a2) / (high - low))
            c.append((-low * b1 + high * b2 + low * high) / (high - low))
    return torch.stack(A), torch.stack(c)


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    func = nn.Sequential(TimeLinear(12, 12), nn.ReLU(), TimeLinear(12, 12))
    block = NeuralODEBlock(func, method="bosh3").double().eval()
    block.h0.fill_(0.25)
    x = torch.rand(1, 12, dtype=torch.float64)
    eps, graph = 1e-3, trajectory_graph(block, x, x)
    while len(graph.nodes) < 101:  # the smallest box with a graph of that size
        eps *= 1.05
        graph = trajectory_graph(block, x - eps, x + eps)
    size, count = len(graph.nodes) - 1, graph.n_trajectories
    if count > 30_000:  # then a part of them, in proportion
        print(f"{size} nodes, {count} trajectories: enumeration is timed at a smaller box")
    small = eps
    while graph.n_trajectories > 3_000:
        small /= 1.02
        graph = trajectory_graph(block, x - small, x + small)
    with torch.no_grad():
        start = time.perf_counter()
        counted, low, high = enumerated(block, x - small, x + small)
        each = (time.perf_counter() - start) / counted
    assert counted <= graph.n_trajectories  # joined boxes are larger, and can do more
    assert bool((low >= graph.output_bounds[0]).all() & (high <= graph.output_bounds[1]).all())
    name = f"{len(graph.nodes) - 1} nodes, {counted} trajectories one by one ({1e3 * each:.2f} ms each)"
    with torch.no_grad():
        race(f"trajectory graph, {name}", lambda: trajectory_graph(block, x - small, x + small),
             lambda: enumerated(block, x - small, x + small), target=20, rounds=1)  # fmt: skip

    import torchdiffeq

    field = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    y0, calls = torch.randn(32, 64), 0

    def counting(t: Tensor, y: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return field(y)

    for with_gradient in (False, True):
        with torch.set_grad_enabled(with_gradient):
            calls = 0
            torchdiffeq.odeint(counting, y0, torch.tensor([0.0, 1.0]), rtol=1e-6, atol=1e-6, method="dopri5")
            theirs = calls
            steps = (theirs - 2) // 6  # as many steps of a fixed size: equal evaluations, but for one
            h = 1 / steps
            race(f"solver, {steps} steps{' with gradients' if with_gradient else ''}, against torchdiffeq, by evaluation",
                 lambda: [controlled_adaptive_solve(lambda t, y: field(y), y0, h0=h, atol=1e-12, min_step=h)  # noqa: B023
                          for _ in range(2)],
                 lambda: [torchdiffeq.odeint(lambda t, y: field(y), y0, torch.tensor([0.0, 1.0]), rtol=1e-6, atol=1e-6,
                                             method="dopri5") for _ in range(2)],
                 target=1 / 1.2, rounds=15)  # fmt: skip

    rows = [
        torch.randn(100, 24),
        torch.randn(100),
        torch.randn(100, 24),
        torch.randn(100),
        -torch.rand(24),
        torch.rand(24),
    ]
    for ours, theirs in zip(aggregate_linear_bounds(*rows, kind="lower"), in_a_loop(*rows), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    race("aggregation of 100 rows, against a loop", lambda: aggregate_linear_bounds(*rows, kind="lower"),
         lambda: in_a_loop(*rows), target=50, rounds=5)  # fmt: skip


if __name__ == "__main__":
    main()
