"""Costs of paths, trees, tours and assignments, projections with the gradient through them, and the black box."""

import torch

from posterity.optimization import (
    CombinatorialLayer,
    assignment,
    grid_shortest_path,
    project_costs,
    spanning_tree,
    travelling_salesman,
)

AGAINST = (
    "networkx (paths by Bellman and Ford, trees by Prim), enumeration of all decisions, and formulas in numpy"
)


def pairs(stored):
    """Yield what is compared: name, ours, theirs, allowed difference."""
    edges = torch.tensor(stored["edges"])
    solved = {
        "paths_4": (grid_shortest_path(4), "grids"),
        "paths_8": (grid_shortest_path(8), "grids"),
        "trees": (spanning_tree(edges, int(edges.max()) + 1), "weights"),
        "tours": (travelling_salesman("exact"), "lengths"),
        "assignments": (assignment(), "matrices"),
    }
    for name, (solver, given) in solved.items():
        costs = torch.tensor(stored[given])
        value = (solver(costs) * costs).flatten(1).sum(1)
        yield f"cost of {name}".replace("_", ", neighbours: "), value, stored[name], 1e-10
    slopes = torch.tensor(stored["slopes"])
    for kind in ("mean", "norm", "std"):
        costs = torch.tensor(stored["costs"], requires_grad=True)
        yield f"projection {kind}", project_costs(costs, kind), stored[f"projected_{kind}"], 1e-12
        decision = CombinatorialLayer(assignment(), projection=kind)(costs)
        (gradient,) = torch.autograd.grad((slopes * decision).sum(), costs)
        yield f"gradient through {kind}", gradient, stored[f"gradient_{kind}"], 1e-12
    costs = torch.tensor(stored["costs"], requires_grad=True)
    decision = CombinatorialLayer(assignment(), gradient="blackbox", strength=2.0)(costs)
    (gradient,) = torch.autograd.grad((slopes * decision).sum(), costs)
    yield "gradient of the black box", gradient, stored["blackbox"], 1e-12
