"""Projections to the sparse simplex, optima at seven strengths and caps, and plans where the optimum is smooth."""

import torch

from posterity.transport import project_sparse_simplex, sparse_transport

AGAINST = "POT 0.9.7 (projections and plans), and for optima of an exact convex program"
PRECISE = {"max_iter": 3000, "tol": 1e-9}


def pairs(stored):
    """Yield what is compared: name, ours, theirs, allowed difference."""
    vectors = torch.tensor(stored["vectors"])
    for total, name in {1.0: "projections", 2.5: "projections_to_2_5"}.items():
        for k, theirs in zip(stored["k"], stored[name], strict=True):
            ours = project_sparse_simplex(vectors, int(k), total=total, dim=0)
            yield f"projection to {k} entries of total {total:g}", ours, theirs, 1e-9
    a, b, cost = (torch.tensor(stored[name]) for name in ("a", "b", "cost"))
    plans = iter(stored["plans"])
    for reg, k, optimum, smooth in zip(
        *(stored[name] for name in ("reg", "limit", "optimum", "smooth")), strict=True
    ):
        name = f"at strength {reg:g}, {k} a column"
        found = sparse_transport(a, b, cost, k=int(k), reg=float(reg), **PRECISE)
        above, below = 1e-6 * optimum + 1e-8, (1e-5 if smooth else 3e-3) * optimum
        value = float(found.value)  # of the dual: a lower bound
        yield f"value {name}", value, optimum, above if value > optimum else below
        if smooth:
            yield f"plan {name}", found.plan, next(plans), 1e-5
            yield f"row sums {name}", found.plan.sum(1), a, 1e-5
    theirs = stored["plans"][2]  # at strength 1 and without a cap
    rows = sparse_transport(b, a, cost.T.contiguous(), k=14, per="row", **PRECISE).plan
    yield "plan of the transposed problem", rows.T, theirs, 1e-5
    cost.requires_grad_()
    (gradient,) = torch.autograd.grad(sparse_transport(a, b, cost, k=14, **PRECISE).value, cost)
    yield "gradient with respect to the cost", gradient, theirs, 1e-5
