"""Means and masses of every domain, force, target, bridge and one step, on stored states."""

import torch

from posterity.generative import Categorical, ConstrainedBridge, Grid, Interval, Points, Product

AGAINST = (
    "scipy's truncated normal law for intervals, and brute force over members for finite sets, in float64"
)


@torch.no_grad()
def pairs(stored):
    """Yield what is compared: name, ours, theirs, allowed difference."""
    z, t, x1, tilt, noise = (torch.tensor(stored[name]) for name in ("z", "t", "x1", "tilt", "noise"))
    points, values = torch.tensor(stored["points"]), torch.tensor(stored["values"])
    product = Product([Interval(-1.0, 1.0), Interval(0.0), Categorical(3), Grid(values), Points(points)])
    bridge = ConstrainedBridge(product, product.dim)
    beta = bridge.beta(torch.ones_like(t))
    yield "variance gone", bridge.beta(t), stored["beta"], 1e-12
    yield "variance a unit of time", bridge.sigma2(t), stored["sigma2"], 1e-12
    left = (beta - bridge.beta(t))[:, None]
    start = 0
    for name, factor in zip(
        ("interval", "half line", "classes", "grid", "points"), product.factors, strict=True
    ):
        own = slice(start, start := start + factor.dim)
        yield f"mean, {name}", factor.endpoint_mean(z[:, own], left), stored["mean"][:, own], 1e-8
    yield "log mass, product", product.log_h(z, left), stored["log_h"], 1e-7
    yield "force", bridge.singular_force(z, t), stored["force"], 1e-6
    yield "target", bridge.target(z, t, x1), stored["target"], 1e-6
    yield "state of the bridge", bridge.interpolate(z, x1, t, noise=noise), stored["between"], 1e-10

    def net(x, t):
        return tilt.expand_as(x)

    yield "tilted drift", bridge.drift(net, z, t), stored["drift"], 1e-6
    one_step = bridge.sample(net, x0=z, n_steps=1, project=False)
    yield "outcome of one step", one_step, stored["outcome"], 1e-8
