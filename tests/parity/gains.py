"""Six solutions step by step, six trajectory graphs with their bounds, and aggregated linear bounds."""

import torch
from torch import nn

from posterity.robustness import (
    NeuralODEBlock,
    TimeLinear,
    aggregate_linear_bounds,
    controlled_adaptive_solve,
    trajectory_graph,
)

AGAINST = "numpy in floats: the rules with scipy's Runge-Kutta weights, intervals by their two ends, and chords by a fit"


def pairs(stored):
    """Yield what is compared: name, ours, theirs, allowed difference."""
    for case in range(6):
        s = {
            name: torch.tensor(stored[f"{case}_{name}"])
            for name in ["W1", "b1", "W2", "b2", "y0", "steps", "r", "settings"]
        }
        h0, atol, second = s["settings"].tolist()
        method = "bosh3" if second else "dopri5"
        func = nn.Sequential(TimeLinear(4, 6), nn.ReLU(), TimeLinear(6, 4))
        block = NeuralODEBlock(func, atol=atol, method=method).double().eval()
        for k, layer in ((1, func[0]), (2, func[2])):
            layer.weight.data, layer.bias.data = s[f"W{k}"], s[f"b{k}"]
        block.h0.fill_(h0)
        y0 = s["y0"][None]
        ours = controlled_adaptive_solve(block._field, y0, h0=h0, atol=atol, method=method)
        tried = torch.tensor([ours.times, ours.step_sizes, ours.actions]).T
        yield f"steps and actions, {case}", tried, s["steps"], 1e-6
        yield f"state at the end, {case}", ours.y[0].detach(), stored[f"{case}_y"], 1e-9
        yield f"the block's, {case}", block(y0)[0].detach(), stored[f"{case}_y"], 1e-9
        graph = trajectory_graph(block, y0 - s["r"], y0 + s["r"])
        yield (
            f"nodes and trajectories, {case}",
            [len(graph.nodes) - 1, graph.n_trajectories],
            stored[f"{case}_count"],
            0,
        )
        for side, bound in zip(("low", "high"), graph.output_bounds, strict=True):
            yield f"{side} ends, {case}", bound[0], stored[f"{case}_{side}"], 1e-5
    rows = [torch.tensor(stored[name]) for name in ("A1", "c1", "A2", "c2", "lo", "hi")]
    A, c = aggregate_linear_bounds(*rows, kind="lower")
    yield "aggregated coefficients", A, stored["A"], 1e-9
    yield "aggregated constants", c, stored["c"], 1e-9
    A, c = aggregate_linear_bounds(*(-part for part in rows[:4]), *rows[4:], kind="upper")
    yield "aggregated from above", torch.cat([A, c[:, None]], 1), -torch.cat([torch.tensor(stored["A"]), torch.tensor(stored["c"])[:, None]], 1), 1e-9  # fmt: skip
