"""A landscape and a held norm after some steps, least squares on spheres, and the steps of a decay."""

import math

import torch
from torch import nn
from torch.nn import functional as F

from posterity.dynamics import constrain_norm, generalization_time, reduced_landscape, weight_norm

AGAINST = "numpy loops with gradients by hand, and the secular equation of ridge regression by scipy"


def _network(stored):
    net = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)).double()
    with torch.no_grad():
        for p, name in zip(net.parameters(), ("w0", "b0", "w1", "b1"), strict=True):
            p.copy_(torch.tensor(stored[name]))
    return net


def pairs(stored):
    """Yield what is compared: name, ours, theirs, allowed difference."""
    x, y, x_test, y_test, alphas = (
        torch.tensor(stored[name]) for name in ("x", "y", "x_test", "y_test", "alphas")
    )
    for vectorize in (True, False):
        found = reduced_landscape(
            _network(stored), x, y, x_test, y_test, alphas=alphas, lr=0.01, n_steps=40, vectorize=vectorize
        )
        way = "together" if vectorize else "one by one"
        yield f"training loss, {way}", found.train_loss, stored["train"], 1e-9
        yield f"test loss, {way}", found.test_loss, stored["test"], 1e-9
        yield f"norms, {way}", found.norm, stored["norm"], 1e-12

    net = _network(stored)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    constrain_norm(optimizer)
    for _ in range(30):
        optimizer.zero_grad()
        F.mse_loss(net(x), y).backward()
        optimizer.step()
    yield (
        "weights, norm held",
        torch.cat([p.detach().flatten() for p in net.parameters()]),
        stored["held"],
        1e-9,
    )

    line = nn.Linear(5, 1, bias=False).double()
    with torch.no_grad():
        line.weight.copy_(torch.tensor(stored["start"])[None])
    x, y = torch.tensor(stored["X"]), torch.tensor(stored["Y"])[:, None]
    alphas = torch.tensor(stored["radii"]) / weight_norm(line)
    ridge = reduced_landscape(line, x, y, x, y, alphas=alphas, lr=0.05, n_steps=150)
    yield "least squares on three spheres", ridge.train_loss, stored["ridge"], 1e-5
    steps = generalization_time(7.3, 2.1, lr=0.003, weight_decay=0.4)
    yield "steps of a decay, rounded up", torch.tensor(math.ceil(steps)), stored["steps"], 0
